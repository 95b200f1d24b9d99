"""The model as vLLM runs it: vLLM's own Qwen2 behind the vision path of the checkpoint's remote code.

What is surprising:
* The vision path is whole on every tensor-parallel rank; the language model is split as vLLM splits it.
* Pixels come as uint8 and are normalised here: a quarter of the bytes between processes and in vLLM's caches.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from videoxl.serving.vllm_processor import VideoXLDummyInputs, VideoXLMultiModalProcessor, VideoXLProcessingInfo
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY


class VisionPath(nn.Module):
    """Tower, compressor and projector, under the names that they have in checkpoints.

    Args:
        config: The `VideoXLConfig`.
        remote: Gives a class or function of the checkpoint's code by its name.
    """

    def __init__(self, config, remote):
        super().__init__()
        self.config, compressor = config, config.compressor_config
        self.vision_tower = remote("vision_videoxl.build_vision_tower")(config)
        self.compressor = remote("compressor_videoxl.build_compressor")(compressor)
        projector = remote("compressor_videoxl.VideoXLMultiModalProjector")
        self.multi_modal_projector = projector(compressor, config.text_config.hidden_size)
        self._normalize = remote("video_processing_videoxl.normalize_frames")
        self._encode = remote("vision_videoxl.encode_videos")

    def forward(self, items: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """uint8 frames [F, 3, S, S] or tiles of images [T, 1, 3, S, S] -> visual tokens [G * N, hidden] of each."""
        mean, std = self.config.image_mean, self.config.image_std
        pixels = [
            self._normalize(item.flatten(0, -4), mean, std).unflatten(0, item.shape[:-3]) for item in items
        ]  # fmt: skip
        return [tokens.flatten(0, 1) for tokens in self._encode(self, pixels).pooler_output]


@MULTIMODAL_REGISTRY.register_processor(
    VideoXLMultiModalProcessor, info=VideoXLProcessingInfo, dummy_inputs=VideoXLDummyInputs
)
class VideoXLForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """All members of the family while they attend to all of their tokens, see `refuse_unserved`."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.vision_tower.": "vision.vision_tower.",
            "model.compressor.": "vision.compressor.",
            "model.multi_modal_projector.": "vision.multi_modal_projector.",
        },
        orig_to_new_substr={"beacon_": None},  # Video-XL's, which are not used where its beacons are off
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return {"video": "<|vision_pad|>", "image": "<|image_pad|>"}[modality]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = config = model_config.hf_config

        # On the Hub, the code may lie in another repository.
        home = config.auto_map["AutoModel"].rpartition("modeling_videoxl.")[0]
        revisions = {"revision": model_config.revision, "code_revision": model_config.code_revision}

        def remote(name):
            return get_class_from_dynamic_module(home + name, model_config.model, **revisions)

        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.vision = VisionPath(config, remote)
        # Sub-configs have a dtype of their own, and some tables are made on the CPU.
        self.vision.to(device=vllm_config.device_config.device, dtype=model_config.dtype)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config,
                hf_config=config.text_config,
                architectures=["Qwen2ForCausalLM"],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, pixel_values_videos=None, pixel_values_images=None, **kwargs) -> list[torch.Tensor]:
        return [
            tokens for items in (pixel_values_videos, pixel_values_images) if items is not None
            for tokens in self.vision(items)
        ]  # fmt: skip

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model",
            connector=["vision.compressor", "vision.multi_modal_projector"],
            tower_model="vision.vision_tower",
        )
