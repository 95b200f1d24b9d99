"""Automatic mixed precision: bfloat16 autocast around any of encoding, asking and training."""

import contextlib

import numpy as np
import pytest
import torch
from videoxl.processing_videoxl import VideoXLProcessor

FRAMES = [np.random.default_rng(7).integers(0, 255, (24, 32, 3), dtype=np.uint8) for _ in range(9)]
TIMES = [float(second) for second in range(9)]
MEMBERS = ["videoxl2", "videoxl1", "videoxlpro", "videoxlpro_march", "videochatflash", "videochatflash_dropping"]
MODES = {
    "full": {},
    "streaming": {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1},
    "mask": {"prefill": "mask", "chunk_groups": 1, "window_chunks": 1},
    "bilevel": {"decode": "bilevel", "decode_chunk_groups": 1, "reload": "none"},
    "bilevel by probe": {"decode": "bilevel", "decode_chunk_groups": 1, "reload": {"method": "probe", "count": 1}},
}


def mixed(on):
    return torch.autocast("cpu", torch.bfloat16) if on else contextlib.nullcontext()


@pytest.fixture(params=[*(("videoxl2", mode) for mode in MODES), *((member, "full") for member in MEMBERS[1:])],
                ids="-".join)  # fmt: skip
def mixed_model(request, model, family_models):
    from conftest import _undone

    member, mode = request.param
    with _undone(model if member == "videoxl2" else family_models[member]) as chosen:
        if mode != "full":
            chosen.config.sparse_attention = MODES[mode]
        yield chosen


def first_scores(model, video, tokenizer):
    """Log-probabilities of the first word of an answer about an encoded video."""
    caught = []
    hook = model.lm_head.register_forward_hook(lambda module, arguments, output: caught.append(output[0, -1]))
    model.chat(video, tokenizer, "What is shown?", generation_config={"max_new_tokens": 2})
    hook.remove()
    return caught[0].float().log_softmax(-1)


@pytest.mark.ties
@pytest.mark.parametrize("asks", [False, True], ids=["asks plainly", "asks mixed"])
@pytest.mark.parametrize("encodes", [False, True], ids=["encodes plainly", "encodes mixed"])
def test_encoding_and_asking(mixed_model, tokenizer, encodes, asks):
    """Whichever is under autocast, the answer is that in float32, up to bfloat16's rounding."""
    model = mixed_model
    video = model.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    expected = first_scores(model, video, tokenizer)
    with mixed(encodes):
        video = model.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    for layer in video.cache.layers:
        assert layer.keys is None or layer.keys.dtype == layer.values.dtype
    with mixed(asks):
        found = first_scores(model, video, tokenizer)
    assert (found.exp() - expected.exp()).abs().sum() < (0.5 if encodes or asks else 1e-5)


@pytest.mark.ties
def test_growing_and_saving(mixed_model, tokenizer, tmp_path):
    """A video that grows and is asked under autocast or not, by turns, holds one kind of numbers, and can be saved."""
    model = mixed_model
    with mixed(True):
        video = model.encode_video(FRAMES[:4], tokenizer, timestamps=TIMES[:4])
    video.append(FRAMES[4:6], TIMES[4:6])
    with mixed(True):
        video.append(FRAMES[6:], TIMES[6:])
        _, history = model.chat(video, tokenizer, "What is shown?", generation_config={"max_new_tokens": 2})
    model.chat(None, tokenizer, "And then?", history, generation_config={"max_new_tokens": 2})
    for layer in video.cache.layers:
        assert layer.keys is None or layer.keys.dtype == layer.values.dtype
    whole = model.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    expected, found = (first_scores(model, asked, tokenizer).exp() for asked in (whole, video))
    assert (found - expected).abs().sum() < 0.5
    video.save(tmp_path / "mixed.videoxl")
    loaded = first_scores(model, model.load_video(tmp_path / "mixed.videoxl"), tokenizer).exp()
    assert (loaded - found).abs().sum() < 0.2  # what a first question under autocast left behind is not in the file


def test_training(mixed_model, tokenizer):
    """The loss and the gradients are those of float32, up to bfloat16's rounding."""
    model = mixed_model
    if model.config.sparse_attention.decode == "bilevel" or model.config.mm_llm_compress:
        pytest.skip("labels are refused there")
    content = [{"type": "video", "video": np.stack(FRAMES), "timestamps": TIMES}, {"type": "text", "text": "What?"}]
    inputs = VideoXLProcessor.from_config(model.config, tokenizer).apply_chat_template(
        [{"role": "user", "content": content}, {"role": "assistant", "content": "A yellow circle moves to the left."}],
        tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    losses, gradients = [], []
    for on in (False, True):
        model.zero_grad()
        with mixed(on):
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad(set_to_none=True)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.9
