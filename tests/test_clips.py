"""Clips of VideoChat-Flash: merging keeps every patch, and tokens hang on nothing but the clip itself."""

import copy
import subprocess
import sys

import pytest
import torch
from goldens import open_flash_case
from hypothesis import given, settings
from hypothesis import strategies as st
from videoxl.compressor_videoxl import match_tokens, merge_schedule, merge_sum, merge_tokens

LENGTHS = st.integers(5, 90)
SEEDS = st.integers(0, 10_000)


@pytest.fixture(params=["videochatflash", "videochatflash_internvideo2"])
def flash(request, family_models):
    """A model over clips; what a test sets on its config is undone."""
    from conftest import _undone

    with _undone(family_models[request.param]) as model:
        yield model


def random_tokens(seed, count, units=2, spread=1.0, channels=8):
    generator = torch.Generator().manual_seed(seed)
    return 3.0 + spread * torch.randn(units, count, channels, generator=generator)


def clip_pixels(model, frames, seed=0):
    side = model.config.vision_config.image_size
    return torch.randn(frames, 3, side, side, generator=torch.Generator().manual_seed(seed))


def encode(model, *videos, **options):
    with torch.inference_mode():
        return model.get_video_features(list(videos), **options).pooler_output


# ---------------------------------------------------------------- merging


@settings(max_examples=40, deadline=None)
@given(SEEDS, LENGTHS, st.integers(1, 5), st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
def test_every_patch_is_in_one_token(seed, count, target, spread):
    tokens = random_tokens(seed, count, spread=spread)
    merged, sizes = merge_tokens(tokens, 2, target)
    assert merged.shape == (2, target, 8) and merged.dtype == torch.float32
    assert torch.equal(sizes, sizes.round()) and (sizes >= 1).all()
    assert sizes.sum(dim=1).tolist() == [count, count]
    # Averages weighted by sizes: the mean of all patches stays what it was.
    torch.testing.assert_close(
        (merged * sizes[..., None]).sum(dim=1) / count, tokens.mean(dim=1), rtol=1e-4, atol=1e-3
    )


@settings(max_examples=40, deadline=None)
@given(SEEDS, LENGTHS, st.integers(0, 50))
def test_a_round_is_what_its_words_say(seed, count, removed):
    """Against the plainest form: one token after the other, in Python."""
    tokens = random_tokens(seed, count, units=1)
    match = match_tokens(tokens, removed)
    directions = torch.nn.functional.normalize(tokens[0], dim=1)
    even, odd = range(0, count, 2), range(1, count, 2)
    similarity = directions[::2] @ directions[1::2].T
    order = sorted(range(len(even)), key=lambda number: -similarity[number].max().item())
    moved = order[: min(removed, count // 2)]
    sums = {number: tokens[0, number].clone() for number in odd}
    for number in moved:
        sums[odd[int(similarity[number].argmax())]] += tokens[0, even[number]]
    expected = [tokens[0, even[number]] for number in order[len(moved) :]] + [sums[number] for number in odd]
    torch.testing.assert_close(merge_sum(tokens, match)[0], torch.stack(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("count", "target", "schedule"),
    [
        (3136, 64, [1568, 784, 392, 196, 98, 34]),
        (784, 64, [392, 196, 98, 34]),
        (196, 64, [98, 34]),
        (1024, 64, [512, 256, 128, 64]),
        (256, 64, [128, 64]),
        (64, 64, []),
    ],
)
def test_schedules(count, target, schedule):
    assert merge_schedule(count, target) == schedule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_still_clip_in_half_precision_loses_no_patch(dtype):
    """One cluster takes nearly all: bfloat16 cannot count it, and sums of it overflow float16."""
    noise = torch.randn(1, 3136, 64, generator=torch.Generator().manual_seed(0))
    tokens = (60.0 + 1e-3 * noise).to(dtype)
    merged, sizes = merge_tokens(tokens, 4, 64)
    assert sizes.sum() == 3136 and sizes.max() > 1500
    assert torch.isfinite(merged).all() and (merged - 60).abs().max() < 0.3


def test_equal_and_empty_patches():
    same, sizes = merge_tokens(torch.ones(1, 784, 16), 4, 64)
    assert torch.equal(same, torch.ones(1, 64, 16)) and sizes.sum() == 784
    # The published code divides zero by zero here.
    zeros, sizes = merge_tokens(torch.zeros(1, 784, 16), 4, 64)
    assert torch.equal(zeros, torch.zeros(1, 64, 16)) and sizes.sum() == 784
    with pytest.raises(ValueError, match="leaves 64 tokens .* only 63"):
        merge_tokens(torch.ones(1, 63, 16), 4, 64)


def test_autocast_leaves_merging_in_float32():
    tokens = random_tokens(1, 300, channels=32)
    expected = merge_tokens(tokens, 4, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = merge_tokens(tokens, 4, 64)
    assert all(map(torch.equal, found, expected))


# ---------------------------------------------------------------- encoding


@pytest.mark.parametrize("case", [("shipped", "c0"), ("shipped", "i1"), ("full", "h1"), ("full", "v1")], ids="-".join)
def test_twenty_runs_give_the_same_bits_and_two_thread_counts_the_same_merges(request, case):
    """Whether two thread counts give the same bits is up to the libraries; another merge would move tokens by far."""
    case, threads = open_flash_case(request, *case), torch.get_num_threads()
    found = {1: [], 2: []}
    try:
        for run in range(20 if case.name == "c0" else 4):
            torch.set_num_threads(1 + run % 2)
            found[1 + run % 2].append(encode(case.model, case.pixels)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(tokens, runs[0]) for runs in found.values() for tokens in runs)
    torch.testing.assert_close(found[1][0], found[2][0], atol=1e-4, rtol=0)


def test_a_clip_s_tokens_hang_on_nothing_else(flash):
    first, second = clip_pixels(flash, 12), clip_pixels(flash, 7, seed=1)
    (alone,), (other,) = encode(flash, first), encode(flash, second)
    assert alone.shape[:2] == (3, 9) and other.shape[0] == 2
    for frames in (1, 4, 8, 1000):
        flash.config.vision_chunk_frames = frames
        found = encode(flash, first, second)
        assert torch.equal(found[0], alone) and torch.equal(found[1], other)
    assert torch.equal(encode(flash, first[4:8])[0][0], alone[1])
    assert not torch.equal(encode(flash, first[[4, 6, 5, 7]])[0][0], alone[1])  # the tower sees the order


def test_a_last_clip_is_filled_with_its_last_frame(flash):
    frames = clip_pixels(flash, 6)
    full = torch.cat([frames, frames[-1:], frames[-1:]])
    with torch.inference_mode():
        features = flash.get_video_features([frames], output_tower_features=True)
        expected = flash.get_video_features([full], output_tower_features=True)
    assert torch.equal(features.pooler_output[0], expected.pooler_output[0])
    assert torch.equal(features.tower_features[0], expected.tower_features[0][:6])
    assert features.tower_features[0].shape == (6, 36, 96)


def test_images_are_encoded_tile_by_tile_and_laid_out_as_one_picture(flash):
    side = flash.config.vision_config.image_size
    tiles = torch.randn(3, 2, 3, side, side, generator=torch.Generator().manual_seed(2))  # 2 rows, 2 columns
    tiles[0] = tiles[0, :1]
    (tokens,) = encode(flash, tiles)
    singles = [encode(flash, tile[None, None])[0][0] for tile in (tiles[0, 0], *tiles[1:].flatten(0, 1))]
    assert tokens.shape[:2] == (5, 9) and torch.equal(tokens[0], singles[0])
    grids = [tile.view(3, 3, -1) for tile in singles[1:]]
    picture = torch.cat([torch.cat(grids[:2], dim=1), torch.cat(grids[2:], dim=1)])
    assert torch.equal(tokens[1:].flatten(0, 1), picture.flatten(0, 1))
    (column,) = encode(flash, tiles[:, :1])
    assert torch.equal(column, torch.stack([singles[0], singles[1], singles[3]]))
    with pytest.raises(ValueError, match="must be"):
        encode(flash, tiles[:, :0])


def test_work_is_one_pass_per_clip_and_no_pass_is_larger(flash):
    shapes = []
    hook = flash.model.vision_tower.register_forward_pre_hook(lambda tower, inputs: shapes.append(inputs[0].shape))
    try:
        for clips in (1, 5, 20):
            shapes.clear()
            encode(flash, clip_pixels(flash, 4 * clips))
            assert shapes == [(1, 4, 3, 48, 48)] * clips
    finally:
        hook.remove()


def test_attention_implementations_agree(flash):
    pixels = clip_pixels(flash, 8)
    eager = copy.deepcopy(flash)
    eager.set_attn_implementation("eager")
    assert eager.model.vision_tower.config._attn_implementation == "eager"
    with torch.inference_mode():
        towers = [
            model.get_video_features([pixels], output_tower_features=True).tower_features[0]
            for model in (flash, eager)
        ]
    torch.testing.assert_close(*towers, rtol=1e-4, atol=1e-4)


def test_the_quick_start_s_image_processor(flash):
    image_processor = flash.get_vision_tower().image_processor
    assert image_processor.size == (48, 48)
    with pytest.raises(ValueError, match="AutoProcessor"):
        image_processor.preprocess([], return_tensors="pt")


def test_gradients_reach_tower_and_projector(flash):
    flash.zero_grad()
    flash.get_video_features([clip_pixels(flash, 4)]).pooler_output[0].square().sum().backward()
    for part in (flash.model.vision_tower.embeddings.patch_embedding, flash.model.multi_modal_projector.linear_1):
        assert part.weight.grad.abs().sum() > 0
    flash.zero_grad(set_to_none=True)


MEASURE = """
import sys, torch
sys.path.insert(0, sys.argv[1] + "/tests")
import conftest
from transformers import AutoConfig, AutoModel, AutoTokenizer

def resident(key):
    return next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith(key))

config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)
changed = type(config).from_dict({**config.to_dict(), **conftest.FAMILY_CHANGES["videochatflash"]})
changed.auto_map = config.auto_map
model = AutoModel.from_config(changed, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
frames = torch.zeros(1, 48, 48, 3, dtype=torch.uint8).expand(10_000, -1, -1, -1)
model.encode_video(frames[:64], tokenizer, timestamps=list(range(64)))
before = resident("VmHWM:")
video = model.encode_video(frames, tokenizer, timestamps=list(range(10_000)))
print(video.num_frames, video.nbytes // 2**20, resident("VmHWM:") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_thousand_frames_in_bounded_memory(root):
    done = subprocess.run([sys.executable, "-c", MEASURE, str(root)], capture_output=True, text=True, check=True)
    frames, held, grown = map(int, done.stdout.split())
    # Pixels of all frames would be 276 MB in float32; what grows with the video is its key-values.
    assert frames == 10_000 and grown < held * 2 + 120, done.stdout
