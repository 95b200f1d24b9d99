"""`plan`: tokens and key-values equal what is made, peaks are near what is allocated, `max_frames` is its inverse."""

import json

import numpy as np
import pytest
import torch
from transformers import Qwen2Tokenizer
from videoxl.planning_videoxl import parse_memory
from videoxl.sparse_attention import MASK_ROWS

PREFILLS = ("full", "streaming", "mask")
FRAMES = np.zeros((150, 8, 8, 3), np.uint8)


def kv_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def encode(model, tokenizer, count, step=1.0):
    return model.encode_video(FRAMES[:count], tokenizer, timestamps=[index * step for index in range(count)])


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("count", [1, 3, 4, 5, 37, 150])
def test_tokens_and_key_values_are_exact(model, tokenizer, prefill, count):
    model.config.sparse_attention = {"prefill": prefill}
    video = encode(model, tokenizer, count)
    plan = model.plan(count, tokenizer=tokenizer)
    assert plan.frames == video.num_frames
    assert plan.total_tokens == len(video.input_ids)
    assert plan.visual_tokens == int(sum(id == model.config.video_token_id for id in video.input_ids))
    assert plan.timestamp_tokens == 4 * plan.groups
    assert plan.total_tokens == plan.visual_tokens + plan.timestamp_tokens + plan.text_tokens
    assert plan.kv_bytes == kv_bytes(video.cache)
    assert plan.mixed_tokens is None
    assert plan.counted_by == "tokenizer"


@pytest.mark.parametrize(("count", "sample_fps"), [(1, 1), (37, 1), (150, 2.5), (41, 1 / 300)])
def test_without_a_tokenizer_times_are_counted_as_in_the_published_one(model, test_data, count, sample_fps):
    real = Qwen2Tokenizer.from_pretrained(test_data / "data" / "tokenizer")
    plan = model.plan(count, sample_fps=sample_fps)
    texts = [model.config.time_format.format(seconds=first / sample_fps) for first in range(0, count, 4)]
    assert plan.counted_by == "time_format"
    assert plan.timestamp_tokens == sum(len(real(text)["input_ids"]) for text in texts)
    assert plan.total_tokens == plan.visual_tokens + plan.timestamp_tokens + plan.text_tokens


def test_more_digits_are_more_tokens(model, tokenizer):
    video = encode(model, tokenizer, 9, step=300.0)  # groups at 0, 1,200 and 2,400 s: four digits are two tokens
    plan = model.plan(9, tokenizer=tokenizer, sample_fps=1 / 300)
    assert plan.total_tokens == len(video.input_ids) == model.plan(9, tokenizer=tokenizer).total_tokens + 2


@pytest.mark.parametrize("sampling", [{}, {"max_num_frames": 6}, {"sample_fps": None, "max_num_frames": 11}])
def test_a_file_is_planned_as_it_is_encoded(model, tokenizer, clips, sampling):
    for clip in clips:
        video = model.encode_video(clip, tokenizer, **sampling)
        plan = model.plan(video_path=clip, tokenizer=tokenizer, **sampling)
        assert (plan.frames, plan.total_tokens) == (video.num_frames, len(video.input_ids))
        assert plan.kv_bytes == kv_bytes(video.cache)


@pytest.mark.parametrize("count", [5, 16, 37, 49, 150])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pool_size": 3, "decode_chunk_groups": 3},
        {"reload": {"method": "probe", "share": 0.5}},
        {"reload": "none"},
        {"reload": {"method": "probe", "count": 1, "max_tokens": 250}},
    ],
)
def test_mixed_key_values_are_exact(model, tokenizer, count, settings):
    model.config.sparse_attention = {"prefill": "streaming", "decode": "bilevel", **settings}
    video = encode(model, tokenizer, count)
    plan = model.plan(count, tokenizer=tokenizer)
    question = torch.tensor([tokenizer("What moves?")["input_ids"]])
    resolved, mixed = model.config.resolve_sparse_attention(), video.question_cache()
    with torch.no_grad():
        model(input_ids=question, past_key_values=mixed)
    assert plan.mixed_tokens == mixed.held - question.shape[1]
    assert plan.mixed_kv_bytes == kv_bytes(mixed) * plan.mixed_tokens // mixed.held
    assert plan.kv_bytes == kv_bytes(video.cache)
    visual = [(group.visual_start, group.end) for group in video.layout.groups]
    inv_freq = model.model.language_model.rotary_emb.inv_freq
    pooled = [layer.pooled_groups(visual, resolved.pool_size, inv_freq) for layer in video.cache.layers]
    assert plan.pooled_kv_bytes in (0, sum(states.nbytes for layer in pooled for states in layer))
    assert (plan.pooled_kv_bytes > 0) == (len(video.layout.groups) > 2 * resolved.decode_chunk_groups)


def test_settings_are_read_at_call_time(model):
    before = model.plan(150)
    model.config.vision_chunk_frames = 64
    assert model.plan(150).stages["vision"]["activations"] == 2 * before.stages["vision"]["activations"]
    model.config.sparse_attention = {"decode": "bilevel"}
    assert model.plan(150).mixed_tokens < before.total_tokens


def allocated_peak(function) -> int:
    """Bytes of the allocator at the peak of a call, above those before it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


@pytest.mark.parametrize("prefill", PREFILLS)
def test_peak_is_near_what_the_allocator_sees(model, tokenizer, prefill):
    model.config.sparse_attention = {"prefill": prefill}
    encode(model, tokenizer, 4)
    videos = []
    peak = allocated_peak(lambda: videos.append(encode(model, tokenizer, 150)))
    plan = model.plan(150, tokenizer=tokenizer)
    layers = videos[0].cache.layers
    buffers = sum(states.untyped_storage().nbytes() for layer in layers for states in (layer.keys, layer.values))
    expected = max(plan.beyond("vision"), plan.beyond("prefill")) + buffers - plan.kv_bytes
    assert abs(expected / peak - 1) < 0.15, (expected, peak)


@pytest.mark.parametrize("count", [1, 4, 5, 37, 150])
def test_other_members_tokens_and_sizes_are_exact(member, tokenizer, count):
    video = encode(member, tokenizer, count)
    plan = member.plan(count, tokenizer=tokenizer)
    assert (plan.frames, plan.groups) == (count, len(video.layout.groups))
    assert plan.total_tokens == len(video.input_ids) and plan.visual_tokens == video.num_visual_tokens
    assert plan.kv_bytes == video.nbytes
    cache = video.question_cache()
    with torch.no_grad():
        member(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
    seen = [layer.held - 3 for layer in cache.layers]
    if plan.mixed_tokens is None:
        assert seen == [plan.total_tokens] * 4
    else:
        assert plan.mixed_tokens == sum(seen) // 4
        assert plan.mixed_kv_bytes == sum(seen) * 2 * 2 * 32 * 4  # 2 heads of 32, float32
        waits = member.config.token_selector is not None or member.config.mm_llm_compress
        assert (plan.mixed_kv_bytes == plan.kv_bytes) == (not waits)
    assert "key-values" in str(plan) and plan.to_dict()["kv_bytes"] == plan.kv_bytes


def test_other_members_peaks_are_near_what_the_allocator_sees(member, tokenizer):
    encode(member, tokenizer, 4)
    frames = np.zeros((600, 8, 8, 3), np.uint8)
    plan, videos = member.plan(600, tokenizer=tokenizer, max_new_tokens=1, question_tokens=3), []
    times = [float(second) for second in range(600)]
    peak = allocated_peak(lambda: videos.append(member.encode_video(frames, tokenizer, timestamps=times)))
    # Buffers are allocated with their spare room, which counts as memory on a GPU only.
    layers = videos[0].cache.layers
    spare = sum(
        states.untyped_storage().nbytes() - states.nbytes
        for layer in layers if layer.held for states in (layer.keys, layer.values)
    )  # fmt: skip
    expected = max(plan.beyond("vision"), plan.beyond("prefill")) + spare
    assert 0.8 < expected / peak < 1.35, (expected, peak)
    if member.config.token_selector or member.config.mm_llm_compress:
        ids = {"input_ids": torch.tensor([[5, 6, 7]])}
        with torch.no_grad():
            peak = allocated_peak(lambda: member(**ids, past_key_values=videos[0].question_cache()))
        expected = plan.beyond("question") - videos[0].nbytes
        assert 0.9 < expected / peak < 1.7, (expected, peak)


def test_other_members_run_in_bounded_memory(member, tokenizer):
    """What four times the frames need more is what is kept: key-values of beacons, or features."""

    def encoded(count):
        frames, videos = np.zeros((count, 8, 8, 3), np.uint8), []
        times = [float(second) for second in range(count)]
        peak = allocated_peak(lambda: videos.append(member.encode_video(frames, tokenizer, timestamps=times)))
        return peak, videos[0]

    encoded(4)
    (short_peak, short), (long_peak, long) = encoded(150), encoded(600)
    # Buffers have up to a quarter of spare room, and one that grows is there twice for a moment.
    allowed = (1.25 + 0.25) * (long.nbytes - short.nbytes) + 0.05 * short_peak
    # Attention's mask on a CPU: a bounded number of rows over all keys.
    allowed += 4 * MASK_ROWS * (long.cache.layers[0].held - short.cache.layers[0].held)
    assert long_peak - short_peak < allowed, (short_peak, long_peak, short.nbytes, long.nbytes)
    if member.config.max_visual_tokens is not None:
        question = {"input_ids": torch.tensor([[5, 6, 7]])}
        caches = [video.question_cache() for video in (short, long)]
        with torch.no_grad():
            peaks = [allocated_peak(lambda cache=cache: member(**question, past_key_values=cache)) for cache in caches]
        assert caches[0].layers[0].held == caches[1].layers[0].held, "the same number of tokens, whatever the length"
        # Scores are a few numbers a token; rows are scored a bounded number at a time.
        assert peaks[1] < 1.5 * peaks[0]


def test_other_members_peaks_never_fall(member):
    peaks = [member.plan(count).peak_bytes for count in range(1, 120)]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize(
    "settings",
    [
        {"prefill": "streaming"},
        {"decode": "bilevel"},
        {"decode": "bilevel", "pool_size": 3, "reload": {"method": "probe", "share": 0.5, "max_tokens": 300}},
        {"decode": "bilevel", "decode_chunk_groups": 3, "reload": "none"},
        {"decode": "bilevel", "reload": {"method": "probe", "count": 1, "timestamps": "kept", "max_tokens": 250}},
    ],
)
def test_peaks_never_fall(model, settings):
    model.config.sparse_attention = settings
    peaks = [model.plan(count).peak_bytes for count in range(1, 240)]
    assert peaks == sorted(peaks)


@pytest.fixture(scope="module")
def published(random_model, root):
    """Video-XL-2 at its published size, in shapes alone: on no device, planned as for a GPU."""
    values = json.loads((root / "presets" / "video-xl-2-8b.json").read_text())
    with torch.device("meta"):
        return type(random_model)(type(random_model.config)(**values)).to(torch.bfloat16)


def test_published_size(published):
    """What docs/memory.md says: 18.4 GB for 512 frames, by a count of each tensor 18.3 GB."""
    plan = published.plan(512, max_new_tokens=256)
    assert plan.kv_bytes == plan.total_tokens * 57344
    assert 18.2e9 < plan.peak_bytes < 18.6e9
    assert 2000 < plan.max_frames("24GB") < 3000
    small = published.plan(512, max_new_tokens=256).beyond("vision")
    published.config.vision_chunk_frames = 8
    assert published.plan(512, max_new_tokens=256).beyond("vision") < small - 0.4e9
    published.config.vision_chunk_frames = 32


def test_offloaded_key_values_are_host_memory(published):
    """The device holds text, timestamps and a window, however long the video."""
    published.config.sparse_attention = {"prefill": "streaming", "offload": True}
    short, long = published.plan(512), published.plan(2048)
    published.config.sparse_attention = {"prefill": "streaming"}
    whole = published.plan(2048)
    assert whole.kv_bytes == long.kv_bytes
    text = long.timestamp_tokens - short.timestamp_tokens
    more = long.stages["prefill"]["key-values"] - short.stages["prefill"]["key-values"]
    assert 0 <= more - text * 57344 < 16 * 57344  # the timestamps of a batch may have a digit more
    assert whole.stages["prefill"]["key-values"] == whole.kv_bytes > 4 * long.stages["prefill"]["key-values"]


@pytest.mark.parametrize("lengths", [10, pytest.param(None, marks=pytest.mark.slow)])
def test_other_members_max_frames(member, lengths):
    """All lengths up to the longest fit: ten of them quickly, every seventh slowly."""
    weights = member.plan(1).weight_bytes
    for extra in (8, 15, 30):
        frames = member.plan(1).max_frames(weights + extra * 10**6)
        assert frames > 0 and member.plan(frames).peak_bytes <= weights + extra * 10**6
        assert all(member.plan(length).peak_bytes <= weights + extra * 10**6 for length in range(1, frames, 7))
        assert member.plan(2 * frames + 16).peak_bytes > weights + extra * 10**6


@pytest.mark.parametrize("settings", [{"prefill": "streaming"}, {"decode": "bilevel"}, {"prefill": "mask"}])
def test_max_frames_is_monotone_and_the_inverse(model, settings):
    model.config.sparse_attention = settings
    weights = model.plan(1).weight_bytes
    assert model.plan(1, memory=weights).max_frames_in_memory == 0
    found = []
    for extra in (3, 8, 9, 15, 30):
        memory = weights + extra * 10**6
        plan = model.plan(1, memory=memory)
        frames = plan.max_frames_in_memory
        assert frames == plan.max_frames(memory) > 0
        assert model.plan(frames).peak_bytes <= memory
        found.append(frames)
        # Every length up to it fits, and the next ones do not all.
        assert all(model.plan(length).peak_bytes <= memory for length in range(1, frames, 7))
        assert any(model.plan(length).peak_bytes > memory for length in range(frames + 1, frames + 64))
    assert found == sorted(found)


def test_plan_is_printed_and_written(model):
    model.config.sparse_attention = {"decode": "bilevel"}
    plan = model.plan(150, memory="1GB")
    facts = json.loads(json.dumps(plan.to_dict()))
    assert facts["peak_bytes"] == plan.peak_bytes == max(sum(terms.values()) for terms in plan.stages.values())
    assert all(stage in str(plan) for stage in ("vision", "prefill", "question", "decode"))
    assert "frames that fit 1.00 GB" in str(plan)
    assert len({len(line) for line in str(plan).splitlines()}) == 1


@pytest.mark.parametrize(
    ("memory", "expected"), [(5, 5), ("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), ("80g", 8 * 10**10), ("7", 7)]
)
def test_memory_is_read(memory, expected):
    assert parse_memory(memory) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither"),
        ({"num_frames": 4, "video_path": "a.mp4"}, "both"),
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": -4}, "num_frames"),
        ({"num_frames": 4.0}, "num_frames"),
        ({"num_frames": 4, "memory": "much"}, "24GB"),
        ({"num_frames": 4, "memory": -1}, "24GB"),
        ({"num_frames": 4, "memory": "24 apples"}, "24GB"),
        ({"num_frames": 4, "question_tokens": 0}, "question_tokens"),
        ({"num_frames": 4, "max_new_tokens": -1}, "max_new_tokens"),
        ({"num_frames": 4, "sample_fps": 0}, "sample_fps"),
    ],
)
def test_bad_input_says_what_to_do(model, arguments, words):
    with pytest.raises(ValueError, match=words):
        model.plan(**arguments)
    with pytest.raises(FileNotFoundError):
        model.plan(video_path="no/such/file.mp4")
