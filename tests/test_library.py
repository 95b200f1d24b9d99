"""What this code relies on in transformers: stand-ins for a next release that does otherwise, and canaries.

A stand-in changes what `generate` hands to `forward`; each must be an error, never another answer. A canary fails with
the name of the part of transformers that changed.
"""

import functools
import inspect

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.qwen2 import modeling_qwen2
from videoxl.kv_cache import CACHE_NAME, CACHE_NAMES

BILEVEL = {"decode": "bilevel", "decode_chunk_groups": 1, "reload": {"method": "none"}}
NEW_TOKENS = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def prompt(processor):
    """What the processor gives for 24 frames of noise and a question."""
    frames = torch.randint(0, 255, (24, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    content = [{"type": "video", "video": frames, "timestamps": list(range(24))}, {"type": "text", "text": "What?"}]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )
    )  # fmt: skip


@pytest.fixture
def text(tokenizer):
    return dict(tokenizer("What color is the star?", return_tensors="pt"))


def stand_in(monkeypatch, model, change):
    """Lets `change` rewrite what `generate` hands to `forward`, as another release might."""
    prepare = model.prepare_inputs_for_generation
    steps = iter(range(100))

    @functools.wraps(prepare)
    def prepare_otherwise(*args, **kwargs):
        inputs = prepare(*args, **kwargs)
        change(inputs, next(steps))
        return inputs

    monkeypatch.setattr(model, "prepare_inputs_for_generation", prepare_otherwise)


def _unknown_name(inputs, step):
    inputs["kv_store"] = inputs.pop(CACHE_NAME)


def _inside_a_dict(inputs, step):
    inputs["state"] = {"attention": inputs.pop(CACHE_NAME)}


def _inside_a_tuple(inputs, step):
    inputs["state"] = (inputs.pop(CACHE_NAME), None)


def _dict_under_its_name(inputs, step):
    inputs[CACHE_NAME] = {"attention": inputs[CACHE_NAME]}


def _tuple_under_its_name(inputs, step):
    inputs[CACHE_NAME] = (inputs[CACHE_NAME],)


def _under_a_name_without_effect(inputs, step):
    inputs["tokenizer"] = inputs.pop(CACHE_NAME)


def _not_from_the_second_step_on(inputs, step):
    if step:
        del inputs[CACHE_NAME]


def _not_from_the_second_step_on_nor_a_mask(inputs, step):
    if step:
        del inputs[CACHE_NAME]
        inputs.pop("attention_mask", None)


def _mask_under_an_unknown_name(inputs, step):
    inputs["padding_mask"] = _mask(inputs)
    inputs.pop("attention_mask", None)


def _wider_mask(inputs, step):
    inputs["attention_mask"] = torch.nn.functional.pad(_mask(inputs), (0, 1), value=1)


def _mask(inputs):
    """The mask, which `generate` leaves out where nothing is padding."""
    length = int(inputs["position_ids"].max()) + 1
    return inputs.get("attention_mask", torch.ones(len(inputs["input_ids"]), length, dtype=torch.long))


CHANGES = [
    _unknown_name, _inside_a_dict, _inside_a_tuple, _dict_under_its_name, _tuple_under_its_name, _wider_mask,
    _under_a_name_without_effect, _not_from_the_second_step_on, _not_from_the_second_step_on_nor_a_mask,
    _mask_under_an_unknown_name,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("settings", [{}, {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1}, BILEVEL])
def test_a_release_that_hands_over_otherwise_is_an_error(model, prompt, text, monkeypatch, change, settings):
    model.config.sparse_attention = settings
    stand_in(monkeypatch, model, change)
    for inputs in (prompt, text):
        with pytest.raises(ValueError, match="kv_store|state|cache|padding_mask|attention_mask"):
            model.generate(**inputs, **NEW_TOKENS)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_so_it_is_for_chat_and_every_member(member, tokenizer, monkeypatch, change):
    frames = torch.randint(0, 255, (8, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    video = member.encode_video(frames, tokenizer, timestamps=list(range(8)))
    stand_in(monkeypatch, member, change)
    with pytest.raises(ValueError, match="kv_store|state|cache|padding_mask|attention_mask"):
        member.chat(video, tokenizer, "What?", return_history=False, generation_config=NEW_TOKENS)


def test_forward_refuses_what_it_does_not_know(model, text):
    cache = DynamicCache()
    for name, value in (("labls", text["input_ids"]), ("kv", cache), ("memory", {"a": [cache]}), ("flag", False)):
        for call in (model, model.model):
            with pytest.raises(ValueError, match=name):
                call(**text, **{name: value})
    assert model(**text, something=None).logits is not None  # None says nothing


def test_both_names_of_the_cache_are_taken_and_both_at_once_refused(model, text):
    ids = text["input_ids"]
    expected = model(input_ids=ids).logits[:, -1]
    for name in CACHE_NAMES:
        cache = DynamicCache()
        model(input_ids=ids[:, :-1], use_cache=True, **{name: cache})
        assert cache.get_seq_length() == ids.shape[1] - 1
        last = model(input_ids=ids[:, -1:], **{name: cache}).logits[:, -1]
        torch.testing.assert_close(last, expected, atol=1e-3, rtol=0)
        options = {"max_new_tokens": 1, "return_dict_in_generate": True, "output_logits": True}
        first = model.generate(**text, **options, **{name: DynamicCache()}).logits[0]
        torch.testing.assert_close(first, expected, atol=1e-3, rtol=0)
    both = dict.fromkeys(CACHE_NAMES, DynamicCache())
    for call in (model, model.model, functools.partial(model.generate, **NEW_TOKENS)):
        with pytest.raises(ValueError, match="two names"):
            call(input_ids=ids, **both)


def test_a_plan_that_does_not_reach_every_layer_is_an_error(model, prompt, monkeypatch):
    layer = model.model.language_model.layers[1]
    forward = layer.forward

    def without_plan(*args, attention_plan=None, **kwargs):
        return forward(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", without_plan)
    with pytest.raises(RuntimeError, match=r"layers \[1\]"):
        model(**prompt)


def test_settings_are_resolved_a_bounded_number_of_times_an_answer(model, tokenizer, monkeypatch):
    frames = torch.zeros(8, 40, 60, 3, dtype=torch.uint8)
    resolved = []
    resolve = type(model.config).resolve_sparse_attention
    monkeypatch.setattr(
        type(model.config), "resolve_sparse_attention", lambda config: (resolved.append(1), resolve(config))[1]
    )
    counts = []
    for new_tokens in (1, 12):
        resolved.clear()
        settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        model.chat(frames, tokenizer, "What?", timestamps=list(range(8)), generation_config=settings)
        counts.append(len(resolved))
    assert counts[0] == counts[1], "decode steps must not read the settings again"


# Canaries


def test_canary_the_name_of_the_cache():
    layer = modeling_qwen2.Qwen2DecoderLayer
    for function in (
        layer.forward,
        modeling_qwen2.Qwen2Attention.forward,
        GenerationMixin.prepare_inputs_for_generation,
    ):
        assert CACHE_NAME in inspect.signature(function).parameters, (
            f"{function.__qualname__} names its cache otherwise"
        )
    for output in (BaseModelOutputWithPast, CausalLMOutputWithPast):
        assert CACHE_NAME in output.__dataclass_fields__, f"{output.__name__} names its cache otherwise"


def test_canary_generate_expands_through_our_method_and_hands_on_what_it_does_not_know(model, prompt):
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    model.generate(**prompt, **NEW_TOKENS, num_beams=2)
    hook.remove()
    assert seen[0].get("num_expanded") == 2, "_expand_inputs_for_generation is not called by generate any more"
    assert seen[0].get("prompt_length") == prompt["input_ids"].shape[1], "generate drops arguments that forward names"
    assert isinstance(seen[0]["pixel_values_videos"], list), "generate changes lists of videos"


def test_canary_a_ready_mask_is_taken_as_it_is(model, prompt, monkeypatch):
    masks = []
    layer = model.model.language_model.layers[0]
    forward = layer.forward
    monkeypatch.setattr(
        layer, "forward", lambda *args, **kwargs: (masks.append(kwargs["attention_mask"]), forward(*args, **kwargs))[1]
    )
    model(**prompt)
    assert masks == [None], "Qwen2Model no longer takes attention_mask={'full_attention': None} as it is"


def test_canary_the_attention_by_name(model):
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        attention = model.model.language_model.config._attn_implementation
        assert attention == f"videoxl_{name}", "the language model's attention is not chosen by its config any more"
    assert model.config._attn_implementation == "sdpa"


def test_canary_layers_of_a_cache_may_be_replaced(model, prompt):
    cache = DynamicCache()
    model(**prompt, past_key_values=cache, use_cache=True)
    model(input_ids=prompt["input_ids"][:, -1:], past_key_values=cache)
    assert len(cache.layers) == model.config.text_config.num_hidden_layers, "Cache.update adds layers of its own"
    assert {layer.get_seq_length() for layer in cache.layers} == {prompt["input_ids"].shape[1] + 1}


def test_canary_clip_s_norm_in_front_of_its_layers():
    config = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
    )
    assert hasattr(CLIPVisionModel(config), "pre_layrnorm"), "CLIPVisionModel renamed pre_layrnorm"


def test_canary_where_offloaded_weights_run(root):
    accelerate = pytest.importorskip("accelerate", reason="offloading needs accelerate")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(root, trust_remote_code=True)
    accelerate.cpu_offload(model)
    assert next(model.parameters()).device.type == "meta"
    assert model.device.type == "cpu", "accelerate no longer leaves a hook named _hf_hook on modules"
