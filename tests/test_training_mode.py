"""Asking a model that is in training: dropout, gradient checkpointing, and training through a cache."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from videoxl.processing_videoxl import VideoXLProcessor

FRAMES = [np.random.default_rng(7).integers(0, 255, (24, 32, 3), dtype=np.uint8) for _ in range(9)]
TIMES = [float(second) for second in range(9)]
SHORT = {"generation_config": {"max_new_tokens": 3}}


@pytest.fixture(params=["videoxl2", "videoxl1", "videoxlpro", "videoxlpro_march", "videochatflash_dropping"])
def any_member(request, model, family_models):
    from conftest import _undone

    with _undone(model if request.param == "videoxl2" else family_models[request.param]) as chosen:
        yield chosen


@contextlib.contextmanager
def in_training(model, checkpointing):
    """Training mode with dropout in the language model, a frozen tower in evaluation mode, and checkpointing."""
    attentions = [layer.self_attn for layer in model.model.language_model.layers]
    model.train()
    model.model.vision_tower.eval()
    for attention in attentions:
        attention.attention_dropout = 0.5
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = [module.training for module in model.modules()]
    yield
    assert [module.training for module in model.modules()] == before
    for attention in attentions:
        attention.attention_dropout = 0.0
    model.gradient_checkpointing_disable()
    model.eval()


def scores_of(model, call):
    """What the language-model head gave at each step of a call."""
    caught = []
    hook = model.lm_head.register_forward_hook(lambda module, arguments, output: caught.append(output[:, -1]))
    call()
    hook.remove()
    return torch.stack(caught)


def prompt_of(model, tokenizer, answer=None):
    content = [{"type": "video", "video": np.stack(FRAMES), "timestamps": TIMES}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}] + [{"role": "assistant", "content": answer}] * (
        answer is not None
    )
    return VideoXLProcessor.from_config(model.config, tokenizer).apply_chat_template(
        messages, add_generation_prompt=answer is None, tokenize=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.ties
@pytest.mark.parametrize("checkpointing", [False, True])
def test_chat_answers_as_ever_and_leaves_the_mode(any_member, tokenizer, checkpointing):
    model = any_member

    def calls():
        video = model.encode_video(FRAMES[:5], tokenizer, timestamps=TIMES[:5])
        video.append(FRAMES[5:], TIMES[5:])
        yield lambda: model.chat(video, tokenizer, "What is shown?", **SHORT)
        yield lambda: model.chat(FRAMES, tokenizer, "What is shown?", timestamps=TIMES, **SHORT)
        yield lambda: model.chat_batch(video, tokenizer, ["What is shown?", "Where?"], **SHORT)
        yield lambda: model.chat(None, tokenizer, "What is shown?", **SHORT)

    expected = [scores_of(model, call) for call in calls()]
    with in_training(model, checkpointing):
        found = [scores_of(model, call) for call in calls()]
        with pytest.raises(ValueError, match="must be a question"):
            model.chat(None, tokenizer, "")
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=2e-3)


@pytest.mark.ties
def test_generate_is_right_under_checkpointing(any_member, tokenizer):
    model, inputs = any_member, prompt_of(any_member, tokenizer)
    text = {"input_ids": tokenizer("What moves there?", return_tensors="pt")["input_ids"]}
    for given in (inputs, text):
        expected = scores_of(model, lambda given=given: model.generate(**given, max_new_tokens=3))
        model.train()
        model.gradient_checkpointing_enable()
        try:
            found = scores_of(model, lambda given=given: model.generate(**given, max_new_tokens=3))
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
        torch.testing.assert_close(expected, found, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("options", [{}, {"use_cache": True}], ids=str)
def test_checkpointing_changes_neither_loss_nor_gradients(any_member, tokenizer, options):
    """Also where the language model runs through a cache: memory windows, chosen tokens."""
    model = copy.deepcopy(any_member).train()
    model.config.mm_llm_compress = False  # which has no loss
    inputs = prompt_of(model, tokenizer, "A yellow circle moves to the left.")
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(**inputs, labels=inputs["input_ids"], **options).loss
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    assert len(results[0][1]) == len(results[1][1])
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-3)


def test_without_labels_checkpointing_needs_no_cache(any_member, tokenizer):
    """As label smoothing calls it: whole sequences at once, as the library does it."""
    model = copy.deepcopy(any_member).train()
    model.config.mm_llm_compress = False
    model.gradient_checkpointing_enable()
    output = model(**prompt_of(model, tokenizer, "A circle."))
    assert output.get("past_key_values") is None and output.get("cache") is None
    output.logits.sum().backward()
