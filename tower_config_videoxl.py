"""Configurations of the video towers that transformers does not have: UMT-L and InternVideo2-1B.

What is surprising:
* One class of values serves both; the class names the tower, as `model_type` does for the towers of transformers.
* The width of the MLP is `int(hidden_size * mlp_ratio)`, as in the public references: 418 for 96 * 48 / 11.
* The towers' sizes stand nowhere in the published files, so they are the defaults here.
"""

from transformers import PreTrainedConfig


class VideoXLVideoTowerConfig(PreTrainedConfig):
    """A transformer over the patches of all frames of a clip; the base of the towers' own classes.

    Args:
        hidden_size: C, channels.
        num_hidden_layers: Layers of the whole tower; `VideoXLConfig.vision_feature_layer` says how many are built.
        num_attention_heads: Heads of the attention, and of the token merging behind it.
        num_channels: Colours of a frame.
        image_size, patch_size: Side of the square frames and of a patch, in pixels.
        num_frames: Frames of a clip.
        mlp_ratio: Width of the MLP over `hidden_size`.
        hidden_act: Its activation.
        norm_eps: Of the norms inside the blocks.
        final_norm_eps: Of the norm behind the last block; None for a tower without one.
    """

    base_config_key = "vision_config"
    qk_norm = layer_scale = False

    def __init__(
        self,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_channels=3,
        image_size=224,
        patch_size=16,
        num_frames=4,
        mlp_ratio=4.0,
        hidden_act="gelu",
        norm_eps=1e-6,
        final_norm_eps=1e-12,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_frames = num_frames
        self.mlp_ratio = mlp_ratio
        self.hidden_act = hidden_act
        self.norm_eps = norm_eps
        self.final_norm_eps = final_norm_eps
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_attention_heads}"
            )
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} must be a multiple of patch_size {patch_size}")

    @property
    def intermediate_size(self) -> int:
        """Width of the MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def grid_size(self) -> int:
        """Patches along the side of a frame."""
        return self.image_size // self.patch_size


class VideoXLUMTConfig(VideoXLVideoTowerConfig):
    """UMT-L (Unmasked Teacher, arXiv 2303.16058) as VideoChat-Flash uses it; the defaults are `umt-large`'s."""

    model_type = "videoxl_umt"

    def __init__(self, **kwargs):
        # The library turns configs without an `__init__` of their own into data classes, which skip the base's.
        super().__init__(**kwargs)


class VideoXLInternVideo2Config(VideoXLVideoTowerConfig):
    """InternVideo2-1B (arXiv 2403.15377) as VideoChat-Flash uses it."""

    model_type = "videoxl_internvideo2"
    qk_norm = layer_scale = True

    def __init__(
        self,
        hidden_size=1408,
        num_hidden_layers=40,
        patch_size=14,
        mlp_ratio=48 / 11,
        final_norm_eps=None,
        **kwargs,
    ):
        super().__init__(
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            final_norm_eps=final_norm_eps,
            **kwargs,
        )


VIDEO_TOWERS = {config.model_type: config for config in (VideoXLUMTConfig, VideoXLInternVideo2Config)}
