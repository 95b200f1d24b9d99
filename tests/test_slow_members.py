"""Video-XL and Video-XL-Pro against an independent slow reference, in cases that the goldens do not have.

Odd ratios and remainders, several videos, batches with padding on the left, timestamps of unequal length, videos of
one frame and beyond the selector's cap. The reference itself is held to the goldens first.
"""

import json

import pytest
import torch
from goldens import FIXTURES, assert_close, open_golden
from margins import greedy_choice
from safetensors.torch import load_file, save_file
from slow_members import SlowMember
from transformers import AutoModel
from videoxl.convert_weights import convert

FEATURES, LOGITS = 1e-4, 3e-4
PRO_TOKENS = 144
VISION = ("model.vision_tower.", "model.sae.", "model.mm_projector.", "model.text_mlp.")

pytestmark = pytest.mark.filterwarnings("ignore:.*need the tokenizer")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def published(family):
    folder = FIXTURES / family / "checkpoint"
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def slow():
    """The reference of each member."""
    pro, beacon = published("videoxlpro"), published("videoxl1")
    # March: Pro's vision and text features, and Video-XL's language model.
    tensors = {name: tensor for name, tensor in pro[1].items() if name.startswith(VISION)}
    tensors |= {name: tensor for name, tensor in beacon[1].items() if not name.startswith(VISION)}
    keys = ("vision_config", "mm_vision_tower", "mm_hidden_size", "image_grid_pinpoints", "video_token_id")
    config = beacon[0] | {key: pro[0][key] for key in keys} | {"beacon_ratio": [4]}
    return {"videoxl1": SlowMember(*beacon), "videoxlpro": SlowMember(*pro), "march": SlowMember(config, tensors)}


@pytest.fixture
def fast(request, slow, tmp_path_factory):
    """The converted model of a member; what is set on its config is undone."""
    made = {}

    def load(name):
        if name == "march":
            source = tmp_path_factory.mktemp("slow") / "source"
            source.mkdir()
            save_file(slow[name].tensors, source / "model.safetensors")
            (source / "config.json").write_text(json.dumps(slow[name].config))
            folder = convert(source, source.with_name("march_against_slow"))
            model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        else:
            model = open_golden(request, name, "shipped").model
        made[name] = (model, dict(model.config.__dict__))
        return model

    yield load
    for model, before in made.values():
        model.config.__dict__.clear()
        model.config.__dict__.update(before)


def noise(seed, frames, side):
    return torch.randn(frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def words(seed, count):
    """Ids that are neither placeholders nor parts of a timestamp."""
    return torch.randint(20, 250, (count,), generator=torch.Generator().manual_seed(seed))


def stamp_ids(seed, length):
    """A made-up timestamp of the tiny tokenizer: Time, space, digits, point, digit, s, colon."""
    digits = torch.randint(10, 20, (length - 5,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [5, 8, *digits[:-1], 9, digits[-1], 4, 7]


class Prompt:
    """Texts with videos between them, for both sides.

    Args:
        model: The fast one.
        texts: Lengths of the texts, one more than videos.
        frames: Lengths of the videos.
        stamps: Per video and group how long its timestamp is; None for members without them.
    """

    def __init__(self, model, seed, texts, frames, stamps=None):
        side, size = model.config.vision_config.image_size, model.config.frames_per_group
        tokens = model.config.compressor_config.tokens_per_group
        self.texts = [words(seed + number, count) for number, count in enumerate(texts)]
        self.videos = [noise(seed + number, count, side) for number, count in enumerate(frames)]
        self.stamps = stamps or [[0] * -(-count // size) for count in frames]
        self.placeholder = model.config.video_token_id
        self.blocks, ids = [], [self.texts[0]]
        for number, (video, text) in enumerate(zip(self.stamps, self.texts[1:], strict=True)):
            block = []
            for group, length in enumerate(video):
                block += stamp_ids(seed + 10 * number + group, length) if length else []
                block += [self.placeholder] * tokens
            self.blocks.append(torch.tensor(block))
            ids += [self.blocks[-1], text]
        self.ids = torch.cat(ids)

    @property
    def inputs(self):
        return {"input_ids": self.ids[None], "pixel_values_videos": self.videos}

    def pieces(self, slow, keep_ratio=1.0, limit=None):
        """Texts and videos' rows in turns, as the reference takes them."""
        pieces = [self.texts[0]]
        for video, block, stamps, text in zip(self.videos, self.blocks, self.stamps, self.texts[1:], strict=True):
            rows = slow.tensors["model.embed_tokens.weight"][block.clamp(max=255)]
            rows[block == self.placeholder] = slow.visual_tokens(video)
            if slow.has_selector:
                rows = slow.select(rows, stamps, PRO_TOKENS, torch.cat(self.texts), keep_ratio, limit)
            pieces += [rows, text]
        return pieces


def check(fast, slow, prompt, beacons=("none",), **selection):
    outputs = fast(**prompt.inputs, logits_to_keep=len(prompt.texts[-1]))
    expected = slow.logits(prompt.pieces(slow, **selection), *beacons)
    assert_close(outputs.logits[0], expected[-len(prompt.texts[-1]) :], LOGITS)
    held = {layer.held for layer in outputs.past_key_values.layers}
    assert held == {len(keys) for keys, _ in slow.memory}


@pytest.mark.parametrize("family", ["videoxl1", "videoxlpro"])
def test_the_reference_gives_the_golden_s_numbers(request, slow, family):
    golden, reference = open_golden(request, family, "shipped"), slow[family]
    case = golden.case("c3" if family == "videoxl1" else "c1")
    assert_close(reference.visual_tokens(case.pixels), case.tensor("visual_tokens"), FEATURES)
    ids, visual = case.tensor("input_ids"), case.tensor("visual_tokens")
    place = ids.tolist().index(-200)
    before, behind = ids[:place], ids[place + 1 :]
    if family == "videoxl1":
        assert_close(reference.logits([before, visual, behind])[-len(behind) :], case.tensor("none.logits"), LOGITS)
    for run in case.settings["runs"]:
        if family == "videoxl1":
            settings = (run["beacon_ratio"], run["beacon_ratio_mix"])
            logits, name = reference.logits([before, visual, behind], *settings), f"{case.name}.{run['run']}"
        else:
            text, keep_ratio = torch.cat([before, behind]), run["keep_ratio"]
            rows = reference.select(case.tensor("block"), [10], PRO_TOKENS, text, keep_ratio)
            logits, name = reference.logits([before, rows, behind]), run["run"]
        assert_close(logits[-len(behind) :], golden.tensors[f"{name}.logits"], LOGITS)


@pytest.mark.parametrize(
    "ratio", [1, 3, 5, 7, 12, 31, 33, 64, 100, [2, 4, 8], [16, 3, 2], "none"], ids=lambda ratio: str(ratio)
)
@pytest.mark.parametrize(
    ("texts", "frames"), [((3, 1), (1,)), ((9, 70), (7,)), ((5, 0, 7), (4, 9)), ((1, 4, 2, 8), (1, 2, 13))]
)
def test_beacons(fast, slow, ratio, texts, frames):
    model = fast("videoxl1")
    prompt = Prompt(model, 11, texts, frames)
    for mix, seed in [("step-random", 42), ("step-random", 7), ("instance-random", 42), ("sequence", 1)]:
        model.config.beacon_ratio, model.config.beacon_ratio_mix, model.config.beacon_seed = ratio, mix, seed
        check(model, slow["videoxl1"], prompt, (ratio, mix, seed))
        if not isinstance(ratio, list):
            break


@pytest.mark.parametrize("keep_ratio", [0.99, 0.7, 0.35])
@pytest.mark.parametrize(
    ("texts", "frames", "stamps"),
    [
        ((3, 1), (1,), [[10]]),
        ((9, 30), (13,), [[10, 10, 11, 11]]),
        ((5, 1, 7), (6, 9), [[10, 11], [11, 11, 11]]),
    ],
)
def test_selection_by_the_question(fast, slow, keep_ratio, texts, frames, stamps):
    model = fast("videoxlpro")
    model.config.keep_ratio = keep_ratio
    check(model, slow["videoxlpro"], Prompt(model, 21, texts, frames, stamps), keep_ratio=keep_ratio)


@pytest.mark.parametrize(("limit", "ratio"), [(9600, 4), (9600, [2, 4, 8]), (400, 8), (100, 3), (160, "none")])
@pytest.mark.parametrize(("texts", "frames"), [((14, 9), (5,)), ((4, 5, 6), (18, 6))])
def test_selection_and_beacons(fast, slow, limit, ratio, texts, frames):
    model = fast("march")
    model.config.max_visual_tokens, model.config.beacon_ratio = limit, ratio
    check(model, slow["march"], Prompt(model, 41, texts, frames), (ratio,), limit=limit)


@pytest.mark.slow
def test_more_than_the_cap_of_9600_tokens(fast, slow):
    model = fast("march")
    model.config.beacon_ratio = 16
    assert model.config.max_visual_tokens == 9600
    check(model, slow["march"], Prompt(model, 43, (14, 9), (277,)), (16,), limit=9600)


@pytest.mark.parametrize("family", ["videoxl1", "videoxlpro"])
def test_padded_batches(fast, slow, family):
    """Prompts with one video, two and none, padded on the left: each row's answer is the reference's."""
    model, reference = fast(family), slow[family]
    if family == "videoxl1":
        model.config.beacon_ratio, beacons, selection = [2, 8], ([2, 8],), {}
        rows = [((14, 9), (5,), None), ((3, 6, 7), (2, 6), None), ((40,), (), None)]
    else:
        model.config.keep_ratio, beacons, selection = 0.6, (), {"keep_ratio": 0.6}
        rows = [((14, 9), (5,), [[10, 10]]), ((5, 6, 7), (5, 3), [[10, 11], [11]]), ((40,), (), None)]
    prompts = [Prompt(model, 60 + number, *row) for number, row in enumerate(rows)]
    width = max(len(prompt.ids) for prompt in prompts)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :], mask[row, width - len(prompt.ids) :] = prompt.ids, 1
    pixels = [video for prompt in prompts for video in prompt.videos]
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}
    logits = model(**batch, logits_to_keep=1).logits[:, -1]
    answers = model.generate(**batch, do_sample=False, max_new_tokens=5)[:, width:].tolist()
    for row, prompt in enumerate(prompts):
        wanted, answer = reference.logits(prompt.pieces(reference, **selection), *beacons)[-1], []
        assert_close(logits[row], wanted, LOGITS)
        for _ in range(5):
            answer.append(greedy_choice(wanted))
            wanted = reference.continue_with(answer[-1])
        assert answers[row] == answer
