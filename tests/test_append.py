"""`EncodedVideo.append` adds all of its frames or none, wherever it fails, and copies no key-values for that."""

import copy
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from test_families import TOLERANCE, first_logits, frames_of, own_processor  # noqa: F401 (a fixture)

SECONDS = [0.5 * number for number in range(60)]
FRAMES = frames_of(5, 60)
MODES = {
    "full": {},
    "streaming": {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1},
    "mask": {"prefill": "mask", "chunk_groups": 1, "window_chunks": 1},
    "offload": {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 2, "offload": True},
}


def encode(model, tokenizer, count):
    return model.encode_video(FRAMES[:count], tokenizer, timestamps=SECONDS[:count])


def state(video):
    """What can be seen of a video; what cannot shows when frames are appended again."""
    layers = [(layer.hidden, layer.held, layer.get_seq_length(), layer.row_shift) for layer in video.cache.layers]
    tensors = [video.input_ids]
    for layer in video.cache.layers:
        tensors += [layer.keys, layer.values] if layer.held else []
    waiting = video.cache.waiting
    tensors += [] if waiting is None or not len(waiting) else [waiting[:]]
    facts = (video.num_frames, video.duration, video.start, video.end, video.appended, video.mark, video.layout)
    facts += (list(video.timestamps), video.nbytes, str(layers), video.prefill, video.cache.choices)
    return facts, [tensor.clone() for tensor in tensors]


def assert_unchanged(video, before):
    facts, tensors = state(video)
    assert facts == before[0]
    assert len(tensors) == len(before[1]) and all(map(torch.equal, tensors, before[1]))


@contextmanager
def failing(model, where, error, call=1):
    """The tower, or a layer of the language model before or behind its work, raises at its `call`-th use."""
    left, layers = [call], model.model.language_model.layers

    def fail(*_):
        left[0] -= 1
        if left[0] == 0:
            raise error

    with pytest.MonkeyPatch.context() as patch:
        hook = None
        if where == "tower":
            features = model.model.get_video_features
            patch.setattr(model.model, "get_video_features", lambda *args: fail() or features(*args), raising=False)
        elif where == "first layer":
            hook = layers[0].register_forward_pre_hook(fail)
        elif where == "attention":
            hook = layers[0].self_attn.register_forward_hook(fail)
        else:
            hook = layers[1].register_forward_hook(fail)
        try:
            with pytest.raises(type(error)):
                yield
        finally:
            if hook is not None:
                hook.remove()


def assert_equal_at_once(model, processor, grown, at_once):
    assert torch.equal(grown.input_ids, at_once.input_ids) and grown.layout == at_once.layout
    assert grown.timestamps == at_once.timestamps and grown.duration == at_once.duration
    assert grown.nbytes == at_once.nbytes
    logits = [first_logits(model, processor, video) for video in (grown, at_once)]
    assert torch.allclose(*logits, atol=TOLERANCE)


FAULTS = [
    ("tower", torch.OutOfMemoryError("no memory")),
    ("first layer", KeyboardInterrupt()),
    ("attention", RuntimeError("broken")),
    ("second layer", MemoryError()),
]


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_append_changes_nothing(model, tokenizer, processor, mode):
    model.config.sparse_attention = MODES[mode]
    for first in (6, 8):  # with and without a partial group
        video, at_once = encode(model, tokenizer, first), encode(model, tokenizer, 12)
        before, logits = state(video), first_logits(model, processor, video)
        for where, error in FAULTS:
            with failing(model, where, error):
                video.append(FRAMES[first:12], SECONDS[first:12])
            assert_unchanged(video, before)
            assert torch.equal(first_logits(model, processor, video), logits)
        video.append(FRAMES[first:10], SECONDS[first:10])
        video.append(FRAMES[10:12], SECONDS[10:12])
        assert_equal_at_once(model, processor, video, at_once)


def test_it_holds_for_every_member(member, tokenizer, own_processor):  # noqa: F811
    member.config.vision_chunk_frames = 8
    video, at_once = encode(member, tokenizer, 9), encode(member, tokenizer, 23)
    before, logits = state(video), first_logits(member, own_processor, video)
    # Where the question decides what runs, rows wait for it: in front of all layers, or of those behind a stage.
    waits = member.config.token_selector is not None
    faults = FAULTS[: 1 if waits else 3 if member.config.mm_llm_compress else 4]
    for where, error in faults:
        with failing(member, where, error):
            video.append(FRAMES[9:23], SECONDS[9:23])
        assert_unchanged(video, before)
        assert torch.allclose(first_logits(member, own_processor, video), logits, atol=TOLERANCE)
    video.append(FRAMES[9:14], SECONDS[9:14])
    again = state(video)
    with failing(member, *faults[-1]):
        video.append(FRAMES[14:23], SECONDS[14:23])
    assert_unchanged(video, again)
    video.append(FRAMES[14:23], SECONDS[14:23])
    assert_equal_at_once(member, own_processor, video, at_once)


def test_batches_of_one_append_go_together(model, tokenizer, processor, tmp_path):
    """More frames than are read at once: the first batch is in the cache when the second fails."""
    video, at_once = encode(model, tokenizer, 6), encode(model, tokenizer, 44)
    before = state(video)
    for where, call in (("tower", 2), ("second layer", 2)):
        with failing(model, where, RuntimeError("broken"), call):
            video.append(FRAMES[6:44], SECONDS[6:44])
        assert_unchanged(video, before)
    Image.fromarray(FRAMES[0].numpy()).save(tmp_path / "frame.png")
    whole = (tmp_path / "frame.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    broken = [*(Image.fromarray(frame.numpy()) for frame in FRAMES[6:43]), Image.open(tmp_path / "cut.png")]
    with pytest.raises(ValueError, match="frame 37 .*cut.png is no image"):
        video.append(broken, SECONDS[6:44])
    assert_unchanged(video, before)
    video.append(FRAMES[6:44], SECONDS[6:44])
    assert_equal_at_once(model, processor, video, at_once)


def test_the_limit_holds_for_all_frames_before_the_first(model, tokenizer, processor):
    video, at_once = encode(model, tokenizer, 6), encode(model, tokenizer, 44)
    before = state(video)
    length = len(at_once.input_ids)
    model.config.tokenizer_model_max_length = length - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "get_video_features", lambda *_: pytest.fail("the tower ran"), raising=False)
        with pytest.raises(ValueError, match=f"has {length} tokens"):
            video.append(FRAMES[6:44], SECONDS[6:44])
    assert_unchanged(video, before)
    model.config.tokenizer_model_max_length = length
    video.append(FRAMES[6:44], SECONDS[6:44])
    model.config.tokenizer_model_max_length = None
    assert_equal_at_once(model, processor, video, at_once)


def test_followers_do_not_notice(model, tokenizer, processor):
    """Histories hold copies that share a video's buffers, and videos are encoded behind each other."""
    video = encode(model, tokenizer, 6)
    follower = copy.deepcopy(video)
    _, history = model.chat(video, tokenizer, "What?", generation_config={"max_new_tokens": 2})
    second = {"timestamps": SECONDS[:5], "chat_history": history, "generation_config": {"max_new_tokens": 2}}
    _, history = model.chat(FRAMES[:5], tokenizer, "And here?", **second)
    behind = history[2]["content"][0]["video"]
    before = [state(each) for each in (video, follower, behind)]
    for where, error in FAULTS:
        with failing(model, where, error):
            video.append(FRAMES[6:12], SECONDS[6:12])
        with failing(model, where, error):
            behind.append(FRAMES[6:12], SECONDS[6:12])
        for each, then in zip((video, follower, behind), before, strict=True):
            assert_unchanged(each, then)
    answer, longer = model.chat(None, tokenizer, "And?", history, generation_config={"max_new_tokens": 2})
    assert longer[2]["content"][0]["video"] is behind, "what was encoded behind it is still current"
    video.append(FRAMES[6:12], SECONDS[6:12])
    assert_unchanged(follower, before[1])
    assert_equal_at_once(model, processor, video, encode(model, tokenizer, 12))


def test_a_video_from_a_file(model, tokenizer, processor, tmp_path):
    encode(model, tokenizer, 6).save(tmp_path / "video.videoxl")
    stored = (tmp_path / "video.videoxl").read_bytes()
    video = model.load_video(tmp_path / "video.videoxl", tokenizer)
    before = state(video)
    for where, error in FAULTS:
        with failing(model, where, error):
            video.append(FRAMES[6:12], SECONDS[6:12])
        assert_unchanged(video, before)
    video.append(FRAMES[6:12], SECONDS[6:12])
    assert_equal_at_once(model, processor, video, encode(model, tokenizer, 12))
    assert (tmp_path / "video.videoxl").read_bytes() == stored


def test_appending_copies_no_keys(model, tokenizer):
    """A frame at a time, as from a camera: the buffer stays where it is until it is full, failures or not."""
    video, places = encode(model, tokenizer, 6), []
    for number in range(6, 26):
        if number % 5 == 0:
            with failing(model, "second layer", RuntimeError("broken")):
                video.append(FRAMES[number : number + 1], SECONDS[number : number + 1])
        video.append(FRAMES[number : number + 1], SECONDS[number : number + 1])
        places.append(video.cache.layers[0].keys.data_ptr())
    tokens = len(video.input_ids)
    moves = sum(place != later for place, later in zip(places, places[1:], strict=False))
    assert moves <= tokens // 256 + 1, "at least MIN_SPARE_TOKENS of room each time"
