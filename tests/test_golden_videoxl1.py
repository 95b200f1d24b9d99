"""Video-XL gives the reference's numbers: pixels, tower, visual tokens, beacon memory, logits at every ratio."""

import pytest
import torch
from goldens import assert_close, open_golden
from margins import CHOSEN
from videoxl.beacon_memory_videoxl import kept_tokens, plan_windows
from videoxl.cache_layers_videoxl import rotate
from videoxl.video_processing_videoxl import normalize_frames, resize_frames

# Absolute, as the golden's notes suggest.
FEATURES, MEMORY, LOGITS = 1e-4, 1e-4, 2e-4
# Of keys that are turned by their place: another `exp` moves a frequency by a unit in its last place, and with it the
# key by place times amplitude as much, 1e-4 at the last places here.
TURNED = 1e-3
CASES = [("shipped", "c3"), *(("full", f"c{number}") for number in range(7))]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    source, name = request.param
    case = open_golden(request, "videoxl1", source).case(name)
    before = dict(case.model.config.__dict__)
    yield case
    case.model.config.__dict__.update(before)


def runs(case):
    """The runs of a case, each with the config set to it."""
    for run in case.settings["runs"]:
        case.model.config.beacon_ratio = run["beacon_ratio"]
        case.model.config.beacon_ratio_mix = run["beacon_ratio_mix"]
        yield run, lambda name, run=run: case.tensor(f"{run['run']}.{name}")


def test_tiles_of_an_image(request):
    open_golden(request, "videoxl1", "full").case("c6").assert_tiles(1e-6)


@pytest.mark.parametrize("source", ["shipped", "full"])
def test_pixels(request, source):
    golden = open_golden(request, "videoxl1", source)
    config = golden.model.config
    assert config.frame_fit == "crop"
    for name in ("", "preprocess."):
        frames = golden.tensors[f"{name}frames"].permute(0, 3, 1, 2)
        expected = golden.tensors[f"{name}pixel_values"]
        resized = resize_frames(frames, config.vision_config.image_size, exact=True, fit="crop")
        assert_close(normalize_frames(resized, config.image_mean, config.image_std), expected, 1e-6)
        fast = resize_frames(frames, config.vision_config.image_size, fit="crop")
        assert (fast.int() - resized.int()).abs().max() <= 2


@pytest.mark.parametrize("layer", [-1, -2])
def test_both_candidate_layers_of_the_tower(request, layer):
    golden = open_golden(request, "videoxl1", "full", mm_vision_select_layer=layer)
    assert golden.model.config.vision_feature_layer == layer
    assert len(golden.model.model.vision_tower.encoder.layers) == 4 + layer
    with torch.inference_mode():
        features = golden.model.get_video_features([golden.tensors["pixel_values"][:2]], output_tower_features=True)
    assert_close(features.tower_features[0], golden.tensors[f"tower.select_{layer}"], FEATURES)


def test_tower_features_visual_tokens_and_embeddings(case):
    model = case.model.model
    with torch.inference_mode():
        features = case.model.get_video_features([case.pixels], output_tower_features=True)
        (tower,), (tokens,) = features.tower_features, features.pooler_output
        skipped = 1 if case.settings["kind"] == "image" else 0
        assert_close(tower, case.tensor("tower_features")[skipped:], FEATURES)
        assert_close(tokens.flatten(0, 1), case.tensor("visual_tokens"), FEATURES)
        embeds = model.embed_prompt(case.inputs["input_ids"])[0]
        prefix = case.settings["prefix"]
        embeds[prefix : prefix + case.settings["visual_tokens"]] = tokens.flatten(0, 1)
        assert_close(embeds, case.tensor("merged_embeds"), FEATURES)


def test_no_compression(case):
    case.model.config.beacon_ratio, suffix = "none", case.settings["suffix"]
    with torch.inference_mode():
        outputs = case.model(**case.inputs, logits_to_keep=suffix)
    assert_close(outputs.logits[0], case.tensor("none.logits"), LOGITS)
    assert outputs.past_key_values.get_seq_length() == case.settings["none"]["memory_after_prefill"]
    greedy = case.settings["none"]["greedy"]
    assert_close(case.decode_logits(outputs.past_key_values, greedy[:-1]), case.tensor("none.decode_logits"), LOGITS)


def test_windows_and_their_embeddings(case):
    tokens, prefix = case.settings["visual_tokens"], case.settings["prefix"]
    visual, beacon = case.tensor("visual_tokens"), case.model.model.beacon_embed_tokens.weight.detach()
    for run, tensor in runs(case):
        beacons = case.model.config.resolve_beacons()
        assert kept_tokens(tokens, beacons) == run["memory_after_prefill"]["beacon"]
        places, memory, stream = [], prefix, prefix
        windows = plan_windows(tokens, **beacons)
        for number, (window, facts) in enumerate(zip(windows, run["windows"], strict=True)):
            assert [window.start, window.stop] == facts["visual_range"] and window.ratio == facts["ratio"]
            assert window.places("cpu").tolist() == facts["beacon_indices_in_window"]
            rows = window.interleave(visual[window.start : window.stop], beacon)
            assert [memory, memory + len(rows)] == facts["query_positions"]
            name = f"{case.name}.{run['run']}.window{number}.inputs_embeds"
            if name in case.golden.tensors:
                assert_close(rows, case.golden.tensors[name], FEATURES)
            places += (stream + window.places("cpu")).tolist()
            memory, stream = memory + window.count, stream + len(rows)
        assert places == tensor("beacon_stream_positions").tolist()


def test_memory_logits_and_answers_at_every_ratio(case):
    suffix, inv_freq = case.settings["suffix"], case.model.model.language_model.rotary_emb.inv_freq
    for run, tensor in runs(case):
        with torch.inference_mode():
            outputs = case.model(**case.inputs, logits_to_keep=suffix)
            uncached = case.model(**case.inputs, use_cache=False)
        assert_close(outputs.logits[0], tensor("logits"), LOGITS)
        assert_close(uncached.logits[0], tensor("logits"), LOGITS)
        cache = outputs.past_key_values
        assert [layer.held for layer in cache.layers] == run["memory_after_prefill"]["per_layer"]
        positions = torch.arange(cache.layers[0].held)
        keys = torch.cat([rotate(layer.keys, positions, None, inv_freq) for layer in cache.layers])
        assert_close(keys, tensor("memory_k"), TURNED)
        assert_close(torch.cat([layer.values for layer in cache.layers]), tensor("memory_v"), MEMORY)
        greedy = run["greedy"]
        assert_close(case.decode_logits(cache, greedy[:-1]), tensor("decode_logits"), LOGITS)
        # Where the two best tokens are closer, rounding may choose the other: the logits above must do.
        if min(run["greedy_margins"]) > CHOSEN:
            generated = case.model.generate(**case.inputs, do_sample=False, max_new_tokens=6)
            assert generated[0, case.inputs["input_ids"].shape[1] :].tolist() == greedy
