"""What the vLLM plug-in decides before vLLM loads a model; with vLLM itself it is `test_serving_vllm.py`."""

import re
from types import SimpleNamespace

import pytest
from videoxl.serving.vllm_plugin import prepare_config, refuse_unserved

REFUSED = {
    "sparse_attention: prefill='streaming'": {"sparse_attention": {"prefill": "streaming"}},
    "sparse_attention: prefill='full' and decode='bilevel'": {"sparse_attention": {"decode": "bilevel"}},
    "sparse_attention: prefill='mask'": {"enable_sparse": True, "sparse_mode": "mask"},
    "beacon_ratio": {"beacon_window": 32, "beacon_ratio": 4},
    "token_selector": {"token_selector": "query"},
    "frame_padding": {"frame_padding": "random"},
    "mm_llm_compress": {
        **{"compressor_config": {"compressor_type": "tome"}, "mm_llm_compress": True, "llm_compress_type": "uniform"},
        **{"llm_compress_layer_list": [1], "llm_image_token_ratio_list": [1, 0.5]},
    },
}


def changed(config, **values):
    return type(config).from_dict({**config.to_dict(), "sparse_attention": {}, **values})


@pytest.mark.parametrize("reason", REFUSED)
def test_settings_that_an_engine_cannot_express_are_refused(random_model, reason):
    config = changed(random_model.config, **REFUSED[reason])
    with pytest.raises(ValueError, match=f"{re.escape(reason)}.* package itself"):
        refuse_unserved(config)


def model_config(config, **values):
    """The parts of vLLM's `ModelConfig` that are read or written."""
    media = SimpleNamespace(media_io_kwargs={})
    defaults = {"trust_remote_code": True, "max_model_len": 131072, "override_generation_config": {}}
    return SimpleNamespace(hf_config=config, multimodal_config=media, **{**defaults, **values})


def test_what_vllm_is_told(random_model):
    """And told again, as in each of its processes, it is the same."""
    tied = random_model.config.tie_word_embeddings
    text = {**random_model.config.text_config.to_dict(), "tie_word_embeddings": not tied}
    told = model_config(changed(random_model.config, tokenizer_model_max_length=3000, text_config=text))
    for _ in range(2):
        prepare_config(told)
        assert told.hf_config.text_config.tie_word_embeddings == tied
        assert told.max_model_len == 3000
        assert told.override_generation_config == {"temperature": 0.0}
        assert told.multimodal_config.media_io_kwargs == {"video": {"video_backend": "videoxl", "num_frames": -1}}
    warm = {"temperature": 0.7}
    wishes = model_config(changed(random_model.config), override_generation_config=warm, max_model_len=99)
    prepare_config(wishes)
    assert (wishes.override_generation_config, wishes.max_model_len) == (warm, 99)


def test_without_trust_it_says_what_to_start_with(random_model):
    with pytest.raises(ValueError, match="--trust-remote-code"):
        prepare_config(model_config(changed(random_model.config), trust_remote_code=False))
