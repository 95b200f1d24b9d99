"""The bundled checkpoint itself: that its files fit together, and that the modes agree whatever it was trained to.

What it answers is no matter here; the modes are tested closely in the other files, on random weights.
"""

import json

import numpy as np
import pytest
import torch
from test_modeling import pixels, prompt
from videoxl.video_world import make_clip

SHORT = {"do_sample": False, "max_new_tokens": 8}
TIMES = [0.5 * index for index in range(48)]
QUESTIONS = ("What color is the star?", "When does the circle first appear?", "How many cards are shown?")
EXACT = (
    {"prefill": "streaming", "chunk_groups": 2, "window_chunks": 5},
    {"prefill": "mask", "chunk_groups": 12, "window_chunks": 1},
    {"decode": "bilevel", "decode_chunk_groups": 1, "reload": "all"},
)


@pytest.fixture(scope="module")
def frames():
    return make_clip(0, split="demo", seconds=24, num_questions=0, cards=2).frames(TIMES)


def assert_close(got, expected):
    """Up to rounding: relative to the largest logit, which in a trained model may be a two-digit number."""
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_files_fit_together(bundle, root):
    model, tokenizer, processor = bundle
    config = model.config
    assert (processor.image_size, processor.frames_per_group) == (
        config.vision_config.image_size,
        config.compressor_config.frames_per_group,
    )
    assert processor.tokens_per_group == config.compressor_config.tokens_per_group
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == config.text_config.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id == config.text_config.pad_token_id
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert (root / "model.safetensors").stat().st_size < 32 * 2**20
    assert json.loads((root / "config.json").read_text())["model_type"] == "videoxl"


@pytest.mark.parametrize("settings", EXACT)
def test_modes_that_lose_nothing_agree_with_full_attention(bundled_model, settings):
    ids, videos = prompt(bundled_model, [6]), [pixels(bundled_model, 24)]
    with torch.no_grad():
        full = bundled_model(torch.tensor([ids]), pixel_values_videos=videos).logits[0, -4:]
        bundled_model.config.sparse_attention = settings
        for use_cache in (True, False):
            out = bundled_model(torch.tensor([ids]), pixel_values_videos=videos, use_cache=use_cache)
            assert_close(out.logits[0, -4:], full)


@pytest.mark.parametrize("settings", [{}, {"prefill": "mask", "chunk_groups": 1, "window_chunks": 1}])
def test_cache_no_cache_and_padding_agree(bundled_model, settings):
    bundled_model.config.sparse_attention = settings
    row, videos = prompt(bundled_model, [5]), [pixels(bundled_model, 18)]
    padded = torch.tensor([[0] * 3 + row])
    with torch.no_grad():
        expected = bundled_model(torch.tensor([row]), pixel_values_videos=videos).logits[0]
        bare = bundled_model(torch.tensor([row]), pixel_values_videos=videos, use_cache=False).logits[0]
        left = bundled_model(padded, attention_mask=(torch.arange(len(row) + 3) > 2).long()[None],
                             pixel_values_videos=videos).logits[0, 3:]  # fmt: skip
    assert_close(bare, expected)
    assert_close(left, expected)


@pytest.mark.parametrize("settings", [{}, *EXACT, {"decode": "bilevel", "decode_chunk_groups": 1}])
def test_encode_once_save_and_batch_change_no_answer(bundled_model, tokenizer, frames, tmp_path, settings):
    bundled_model.config.sparse_attention = settings
    video = bundled_model.encode_video(frames, tokenizer, timestamps=TIMES)
    options = {"return_history": False, "generation_config": SHORT}
    answers = [bundled_model.chat(video, tokenizer, question, **options) for question in QUESTIONS]
    assert all(isinstance(answer, str) for answer in answers)
    assert bundled_model.chat(frames, tokenizer, QUESTIONS[0], timestamps=TIMES, **options) == answers[0]
    assert bundled_model.chat_batch(video, tokenizer, list(QUESTIONS), generation_config=SHORT) == answers
    video.save(tmp_path / "clip.videoxl")
    loaded = bundled_model.load_video(tmp_path / "clip.videoxl", tokenizer)
    assert [bundled_model.chat(loaded, tokenizer, question, **options) for question in QUESTIONS] == answers


def test_the_video_reaches_the_answer(bundled_model, tokenizer, frames):
    videos = [
        bundled_model.encode_video(each, tokenizer, timestamps=TIMES) for each in (frames, np.zeros_like(frames))
    ]
    values = [video.cache.layers[-1].values for video in videos]
    assert (values[0] - values[1]).abs().max() > 1e-3 * values[0].abs().max()
