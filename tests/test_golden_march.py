"""Video-XL-Pro of March 2025: no golden of its own exists, so it is put together from the two that contain its parts.

Its tower, compressor, projector and text features are the April checkpoint's, its language model with beacons is
Video-XL's. So a checkpoint is made of these tensors, converted, and compared: visual tokens with April's golden, what
is kept with the formulas, and logits with the converted Video-XL, whose beacon memory is proven by its golden.
"""

import json
import math
import shutil

import pytest
import torch
from goldens import FIXTURES, assert_close, open_golden
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from videoxl.hub.convert import convert, read_source, recognise_family
from videoxl.sparse_attention import GroupSpan, VisualLayout

FEATURES, LOGITS = 1e-4, 3e-4
PREFIX, SUFFIX = [3, 40, 77, 120, 9], [8, 200, 31, 64, 5, 11]

pytestmark = pytest.mark.filterwarnings("ignore:.*need the tokenizer")


@pytest.fixture(scope="module")
def march(request, tmp_path_factory):
    """(March model, Video-XL model with the same language model, April's case)."""
    april = open_golden(request, "videoxlpro", "shipped").case("c1")
    source = tmp_path_factory.mktemp("march") / "source"
    source.mkdir()
    pro, beacon = (
        load_file(FIXTURES / family / "checkpoint" / "model.safetensors") for family in ("videoxlpro", "videoxl1")
    )
    vision = ("model.vision_tower.", "model.sae.", "model.mm_projector.", "model.text_mlp.")
    tensors = {name: tensor for name, tensor in pro.items() if name.startswith(vision)}
    tensors |= {name: tensor for name, tensor in beacon.items() if not name.startswith(vision)}
    save_file(tensors, source / "model.safetensors")
    config = json.loads((FIXTURES / "videoxl1" / "checkpoint" / "config.json").read_text())
    own = json.loads((FIXTURES / "videoxlpro" / "checkpoint" / "config.json").read_text())
    keys = ("vision_config", "mm_vision_tower", "mm_hidden_size", "image_grid_pinpoints", "video_token_id")
    config |= {key: own[key] for key in keys} | {"beacon_ratio": [4], "mm_vision_select_layer": -1}
    (source / "config.json").write_text(json.dumps(config))
    assert recognise_family(config, read_source(source)) == "videoxlpro_march"
    output = convert(source, tmp_path_factory.mktemp("converted") / "march")
    shutil.rmtree(source)
    model = AutoModel.from_pretrained(output, trust_remote_code=True).eval()
    return model, open_golden(request, "videoxl1", "shipped").model, april


@pytest.fixture
def model(march):
    model = march[0]
    yield model
    model.config.max_visual_tokens, model.config.keep_ratio, model.config.beacon_ratio = 9600, 1.0, [4]


def selected(model, tokens, limit):
    """What the spec says: kept visual rows [K, H] for the prompt PREFIX + video + SUFFIX."""
    embeddings = model.get_input_embeddings().weight
    text = embeddings[PREFIX + SUFFIX]
    linear = model.model.token_selector.text_projection
    features = torch.nn.functional.gelu(text @ linear.weight.T + linear.bias)
    scores = torch.stack([(tokens @ row) for row in features]).mean(dim=0)
    scores = (scores - scores.min()) / (scores.max() - scores.min())
    rows, width = torch.empty_like(tokens), tokens.shape[1]
    for i in range(width // 2):
        angle = torch.arange(len(tokens)) * math.exp(-2 * i * math.log(1e6) / width)
        even, odd = tokens[:, 2 * i], tokens[:, 2 * i + 1]
        rows[:, 2 * i] = even * angle.cos() - odd * angle.sin()
        rows[:, 2 * i + 1] = odd * angle.cos() + even * angle.sin()
    rows = rows + scores[:, None]
    kept = scores.argsort(descending=True)[: min(len(tokens), limit) // 16 * 16].sort().values
    return rows[kept]


@pytest.mark.parametrize("ratio", [2, 4, 8, 16, [2, 4, 8], "none"])
@pytest.mark.parametrize("limit", [9600, 100])
@torch.no_grad()
def test_selection_and_beacons_compose(march, model, ratio, limit):
    _, reference, april = march
    model.config.beacon_ratio, model.config.max_visual_tokens = ratio, limit
    tokens = model.get_video_features([april.pixels]).pooler_output[0].flatten(0, 1)
    assert_close(tokens, april.tensor("visual_tokens"), FEATURES)

    rows = selected(model, tokens, limit)
    reference.config.beacon_ratio = ratio
    embeddings = reference.get_input_embeddings().weight
    embeds = torch.cat([embeddings[PREFIX], rows, embeddings[SUFFIX]])[None]
    video = GroupSpan(len(PREFIX), len(PREFIX), len(PREFIX) + len(rows))
    cache = reference.model.new_cache()
    layout = VisualLayout(((video,),), embeds.shape[1])
    hidden = reference.model.extend_cache(embeds, layout, cache, keep_hidden=len(SUFFIX))
    expected = reference.lm_head(hidden[0])
    reference.config.beacon_ratio = [2, 4, 8]

    ids = torch.tensor([PREFIX + [model.config.video_token_id] * len(tokens) + SUFFIX])
    outputs = model(input_ids=ids, pixel_values_videos=[april.pixels], logits_to_keep=len(SUFFIX))
    assert_close(outputs.logits[0], expected, LOGITS)
    assert [layer.held for layer in outputs.past_key_values.layers] == [layer.held for layer in cache.layers]
    for ours, theirs in zip(outputs.past_key_values.layers, cache.layers, strict=True):
        assert_close(ours.keys, theirs.keys, LOGITS)
        assert_close(ours.values, theirs.values, LOGITS)
    generated = model.generate(input_ids=ids, pixel_values_videos=[april.pixels], do_sample=False, max_new_tokens=4)
    again = model.generate(input_ids=ids, pixel_values_videos=[april.pixels], do_sample=False, max_new_tokens=4)
    assert torch.equal(generated, again)
