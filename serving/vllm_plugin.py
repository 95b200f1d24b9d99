"""The vLLM plug-in: tells vLLM about the model, and refuses at start what the engine cannot express.

vLLM calls `register` in each of its processes, because the package names it as an entry point of
`vllm.general_plugins`: also where it serves another model, so what only this one needs is imported later.

What is surprising:
* vLLM samples at temperature 1 unless it is told otherwise: it does not read `do_sample`. Here greedy is the default.
* vLLM's own video loaders know no times of variable-rate files, so videos are opened by the checkpoint's processor.
  The loader hands on the bytes of the file, and nothing is decoded while what is known of it is in the caches.
"""

from typing import Any

import numpy as np

ARCHITECTURE = "VideoXLForConditionalGeneration"
# Of `media_io_kwargs`, and of the loader that it names.
LOADER = "videoxl"
PACKAGE = __package__


class FileBytes:
    """A video loader, as vLLM takes one, that decodes nothing."""

    @classmethod
    def load_bytes(cls, data: bytes, num_frames: int = -1, **kwargs) -> tuple[np.ndarray, dict[str, Any]]:
        """Gives a file as bytes [n]; `ValueError` on arguments that would choose frames."""
        if num_frames != -1 or kwargs:
            asked = ", ".join(kwargs) or f"num_frames={num_frames}"
            raise ValueError(
                f"media_io_kwargs ask for {asked}, but frames are not chosen there: pass mm_processor_kwargs with "
                "max_num_frames, sample_fps, max_sample_fps, num_frames or fps"
            )
        return np.frombuffer(data, np.uint8), {}


def register() -> None:
    """Registers model, video loader and config check; calling it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    class Config(VerifyAndUpdateConfig):
        verify_and_update_model_config = staticmethod(prepare_config)

    ModelRegistry.register_model(ARCHITECTURE, f"{PACKAGE}.vllm_model:VideoXLForConditionalGeneration")
    VIDEO_LOADER_REGISTRY.register(LOADER)(FileBytes)
    MODELS_CONFIG_MAP[ARCHITECTURE] = Config


def prepare_config(model_config) -> None:
    """Sets what vLLM would choose otherwise in its `ModelConfig`.

    Raises:
        ValueError: If the checkpoint is set to something that an engine with paged attention cannot express.
    """
    config = model_config.hf_config
    refuse_unserved(config)
    if not model_config.trust_remote_code:
        raise ValueError("the model's vision path is code in the checkpoint's folder: start with --trust-remote-code")
    # vLLM's Qwen2 looks for it there.
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    limit = config.resolve_context_limit()
    if limit is not None:
        model_config.max_model_len = min(model_config.max_model_len, limit[0])
    model_config.override_generation_config = {"temperature": 0.0, **model_config.override_generation_config}
    media = model_config.multimodal_config.media_io_kwargs
    # -1 is no number of frames that a client would ask for, so the loader hears of those that are.
    media["video"] = {"video_backend": LOADER, "num_frames": -1, **media.get("video", {})}


def refuse_unserved(config) -> None:
    """Raises ValueError on settings of a `VideoXLConfig` that need more than dense attention over all tokens."""
    settings = config.resolve_sparse_attention()
    reasons = {
        "sparse_attention": (
            (settings.prefill, settings.decode) != ("full", "full")
            and f"prefill={settings.prefill!r} and decode={settings.decode!r} show each token a part of the video",
            'set prefill and decode to "full" (vLLM: --hf-overrides \'{"sparse_attention": {"prefill": "full", '
            '"decode": "full"}}\'; where the published switches are on, enable_sparse and enable_chunk_prefill to '
            "false, too)",
        ),
        "beacon_ratio": (
            settings.beacons and "beacons take the place of the visual tokens of a window",
            'set it to "none" (vLLM: --hf-overrides \'{"beacon_ratio": "none"}\')',
        ),
        "mm_llm_compress": (
            settings.dropping and "layers keep different tokens",
            "set it to false (vLLM: --hf-overrides '{\"mm_llm_compress\": false}')",
        ),
        "token_selector": (
            config.token_selector and "the question decides which visual tokens there are",
            "take another member of the family",
        ),
        "frame_padding": (
            config.frame_padding != "last" and "random frames of the whole video fill its last group",
            'set it to "last" (vLLM: --hf-overrides \'{"frame_padding": "last"}\')',
        ),
    }
    for name, (reason, remedy) in reasons.items():
        if reason:
            raise ValueError(
                f"vLLM cannot serve this checkpoint with its {name}: {reason}, but the engine keeps the same "
                "key-values of all tokens, in all layers, for every question. Ask it with the package itself (chat, "
                f"videoxl batch), or {remedy}"
            )
