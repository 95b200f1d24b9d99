"""Video towers that transformers does not have: UMT-L and InternVideo2-1B, transformers over the patches of a clip.

What is surprising, all of it what the published weights were trained with (VideoChat-Flash, arXiv 2501.00574; public
reference `vision_tower_builder.py`):
* Attention is joint over space and time, inside one clip of four frames, without a mask. Clips never see each other.
* UMT's position code is the sinusoid of a patch's place in the flattened clip of 14 x 14 grids: one running number,
  not factorised. Larger grids interpolate it frame by frame. It is neither parameter nor in any file.
* UMT's queries and values have biases, its keys have none; InternVideo2 has none, and normalises queries and keys over
  all heads at once.
* InternVideo2's position tables were trained, one for clips and one for images, and are stored. It has no final norm.

B clips (or images of one frame), T frames of a clip, P patches of a frame, C channels, S side of a frame in pixels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.siglip.modeling_siglip import SiglipMLP, eager_attention_forward

from .configuration_videoxl import VideoXLInternVideo2Config, VideoXLUMTConfig

# Frames, and patches along a side, that UMT was pretrained with: its position codes count in these.
PRETRAINED_FRAMES, PRETRAINED_GRID = 4, 14
# What layer scale is before training (the published values are loaded).
INITIAL_LAYER_SCALE = 1e-5


def sinusoid_table(num_positions: int, channels: int) -> torch.Tensor:
    """Sinusoidal code: even channels sin, odd ones cos, of position / 10000^(2 * (channel div 2) / C).

    Returns:
        [num_positions, C] in float32, computed in float64.
    """
    channel = torch.arange(channels, dtype=torch.float64, device="cpu")
    position = torch.arange(num_positions, dtype=torch.float64, device="cpu")
    angle = position[:, None] / 10000.0 ** (2 * (channel // 2) / channels)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def clip_position_table(num_frames: int, grid_size: int, channels: int) -> torch.Tensor:
    """UMT's position code of a clip: that of the pretrained grids, interpolated to these frames and this grid.

    Args:
        num_frames: T; other numbers than the pretrained one are interpolated linearly over time, a single frame takes
            the pretrained first one.
        grid_size: Patches along the side of a frame; interpolated bicubically, frame by frame.

    Returns:
        [T * P, C] in float32, on the CPU.
    """
    frames = 1 if num_frames == 1 else PRETRAINED_FRAMES
    table = sinusoid_table(frames * PRETRAINED_GRID**2, channels)
    if num_frames != frames:
        over_time = rearrange(table, "(t p) c -> p c t", t=frames)
        resized = F.interpolate(over_time, size=num_frames, mode="linear", align_corners=False)
        table = rearrange(resized, "p c t -> (t p) c")
    if grid_size != PRETRAINED_GRID:
        grids = rearrange(table, "(t y x) c -> t c y x", t=num_frames, y=PRETRAINED_GRID)
        resized = F.interpolate(grids, size=(grid_size, grid_size), mode="bicubic", align_corners=False)
        table = rearrange(resized, "t c y x -> (t y x) c")
    return table


def factorised_position_table(num_frames: int, grid_size: int, channels: int) -> torch.Tensor:
    """InternVideo2's position code before training: a quarter of the channels tells the time, the rest x and y.

    Returns:
        [1 + T * P, C] in float32, on the CPU; the first row, the class token's, is zero.
    """

    def code(count, width):
        frequency = 10000.0 ** (torch.arange(width // 2, dtype=torch.float64, device="cpu") / -(width // 2))
        angle = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    over_time, over_side = code(num_frames, channels // 4), code(grid_size, channels // 8 * 3)
    shape = (num_frames, grid_size, grid_size, -1)
    parts = [over_time[:, None, None], over_side[None, None], over_side[None, :, None]]  # time, x, y
    table = torch.cat([part.expand(shape) for part in parts], dim=3).flatten(0, 2).float()
    return torch.cat([torch.zeros(1, table.shape[1], device="cpu"), table])


class VideoXLClipEmbeddings(nn.Module):
    """Patches of a clip as vectors, with UMT's position code. [B, T, 3, S, S] -> [B, T * P, C]."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        patch = (1, config.patch_size, config.patch_size)
        self.patch_embedding = nn.Conv3d(config.num_channels, config.hidden_size, patch, stride=patch)
        for name, table in self.position_tables().items():
            self.register_buffer(name, table, persistent=False)

    def position_tables(self) -> dict[str, torch.Tensor]:
        """The tables that this module holds outside of checkpoints."""
        grid, channels = self.config.grid_size, self.config.hidden_size
        return {
            "clip_positions": clip_position_table(self.config.num_frames, grid, channels),
            "image_positions": clip_position_table(1, grid, channels),
        }

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = rearrange(self.patch_embedding(pixels.transpose(1, 2)), "b c t y x -> b (t y x) c")
        positions = self.image_positions if pixels.shape[1] == 1 else self.clip_positions
        return patches + positions.to(patches.dtype)


class VideoXLClassClipEmbeddings(VideoXLClipEmbeddings):
    """InternVideo2's: a class token in front, and trained positions. [B, T, 3, S, S] -> [B, 1 + T * P, C]."""

    def __init__(self, config):
        super().__init__(config)
        patches, channels = config.grid_size**2, config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, channels))
        self.clip_position_embedding = nn.Parameter(torch.zeros(1, 1 + config.num_frames * patches, channels))
        self.image_position_embedding = nn.Parameter(torch.zeros(1, 1 + patches, channels))

    def position_tables(self) -> dict[str, torch.Tensor]:
        return {}

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = rearrange(self.patch_embedding(pixels.transpose(1, 2)), "b c t y x -> b (t y x) c")
        tokens = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        return tokens + (self.image_position_embedding if pixels.shape[1] == 1 else self.clip_position_embedding)


class VideoXLClipAttention(nn.Module):
    """Attention over all patches of a clip, with fused projections. [B, n, C] -> the same."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        channels = config.hidden_size
        self.head_dim = channels // config.num_attention_heads
        self.scale = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.q_bias = self.v_bias = self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = Qwen2RMSNorm(channels, eps=config.norm_eps)
            self.k_norm = Qwen2RMSNorm(channels, eps=config.norm_eps)
        else:
            self.q_bias = nn.Parameter(torch.zeros(channels))
            self.v_bias = nn.Parameter(torch.zeros(channels))
        self.proj = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        if self.q_bias is None:
            query, key = self.q_norm(query), self.k_norm(key)
        else:
            query, value = query + self.q_bias, value + self.v_bias
        query, key, value = (
            rearrange(states, "b n (h d) -> b h n d", d=self.head_dim) for states in (query, key, value)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attention(self, query, key, value, None, is_causal=False, scaling=self.scale, dropout=0.0)
        return self.proj(attended.flatten(2))


class VideoXLLayerScale(nn.Module):
    """A trained factor per channel, multiplied in float32."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), INITIAL_LAYER_SCALE))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return (hidden_states.float() * self.weight.float()).to(hidden_states.dtype)


class VideoXLClipLayer(GradientCheckpointingLayer):
    """A pre-norm block. [B, n, C] -> the same."""

    def __init__(self, config):
        super().__init__()
        # The tower with normalised queries and keys has root-mean-square norms throughout.
        norm = Qwen2RMSNorm if config.qk_norm else nn.LayerNorm
        self.layer_norm1 = norm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = VideoXLClipAttention(config)
        self.layer_norm2 = norm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SiglipMLP(config)
        self.scale1, self.scale2 = (
            VideoXLLayerScale(config.hidden_size) if config.layer_scale else nn.Identity() for _ in range(2)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.scale1(self.self_attn(self.layer_norm1(hidden_states)))
        return hidden_states + self.scale2(self.mlp(self.layer_norm2(hidden_states)))


class VideoXLClipEncoder(nn.Module):
    """The blocks of a tower, one after the other. [B, n, C] -> the same."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList([VideoXLClipLayer(config) for _ in range(config.num_hidden_layers)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class VideoXLFrameFormat(NamedTuple):
    """What the published quick start takes for an image processor: `model.get_vision_tower().image_processor`.

    Args:
        size: (height, width) of the frames that the tower takes, in pixels.
    """

    size: tuple[int, int]

    def preprocess(self, images=None, return_tensors=None):
        """Frames are prepared elsewhere.

        Raises:
            ValueError: Always, with the way.
        """
        raise ValueError(
            "AutoProcessor.from_pretrained(...) of this model's folder prepares frames; chat does so itself"
        )


class VideoXLVideoTower(PreTrainedModel):
    """A tower over clips: pixels [B, T, 3, S, S] (T = 1: images) -> features [B, T * P, C], by frame, row, column."""

    base_model_prefix = "vision_tower"
    main_input_name = "pixels"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoXLClipLayer", "VideoXLClipEmbeddings", "VideoXLClassClipEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    embeddings_class = VideoXLClipEmbeddings

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        self.encoder = VideoXLClipEncoder(config)
        eps = config.final_norm_eps
        self.final_norm = nn.Identity() if eps is None else nn.LayerNorm(config.hidden_size, eps=eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        # override: the library's default leaves bare parameters, and tables that loading from "meta" emptied
        super()._init_weights(module)
        if isinstance(module, VideoXLClassClipEmbeddings):
            config = module.config
            for name, frames in (("clip", config.num_frames), ("image", 1)):
                positions = factorised_position_table(frames, config.grid_size, config.hidden_size)
                init.copy_(getattr(module, f"{name}_position_embedding"), positions[None])
            init.normal_(module.class_embedding, std=0.02)
        elif isinstance(module, VideoXLClipEmbeddings):
            for name, table in module.position_tables().items():
                init.copy_(getattr(module, name), table)
        elif isinstance(module, VideoXLLayerScale):
            init.constant_(module.weight, INITIAL_LAYER_SCALE)
        elif isinstance(module, VideoXLClipAttention) and module.q_bias is not None:
            init.zeros_(module.q_bias)
            init.zeros_(module.v_bias)

    @property
    def image_processor(self) -> VideoXLFrameFormat:
        """For the published quick start, which takes it and does nothing with it."""
        return VideoXLFrameFormat((self.config.image_size, self.config.image_size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        embedded = self.embeddings(pixels)
        patches = pixels.shape[1] * self.config.grid_size**2
        return self.final_norm(self.encoder(embedded)[:, -patches:])


class VideoXLUMT(VideoXLVideoTower):
    """UMT-L, without the masking and the decoder that it was pretrained with."""

    config_class = VideoXLUMTConfig


class VideoXLInternVideo2(VideoXLVideoTower):
    """InternVideo2-1B, without its pooling and its projections; its class token is dropped behind the last block."""

    config_class = VideoXLInternVideo2Config
    embeddings_class = VideoXLClassClipEmbeddings


VIDEO_TOWER_MODELS = {model.config_class.model_type: model for model in (VideoXLUMT, VideoXLInternVideo2)}

__all__ = [
    "VIDEO_TOWER_MODELS",
    "VideoXLInternVideo2",
    "VideoXLUMT",
    "VideoXLVideoTower",
    "clip_position_table",
    "factorised_position_table",
]
