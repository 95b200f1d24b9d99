"""The vision path: the towers, and how videos and images become visual tokens a bounded number of frames at a time.

SigLIP and CLIP are transformers' own. UMT-L and InternVideo2-1B, which see clips of four frames, are built here.

What is surprising about encoding:
* Groups of frames never see each other, so videos may share a pass, and any split into whole groups gives the same
  tokens. Where the tower sees whole clips each runs by itself: token merging decides between near ties, and in another
  batch the last bits of a sum, so the choice, could differ.
* A tile of an image, which the tower sees once, is a group of equal frames, or of one frame where it sees clips.
* An image with an overview has the squashed picture as its first tile. The tokens of the others are laid out as one
  picture's, line by line through all tiles, so its pixels say how many rows and columns of tiles there are: they come
  as [1 + rows, columns, 3, S, S], the first row holding copies of the overview.

What is surprising about the towers over clips, all of it what the published weights were trained with
(VideoChat-Flash, arXiv 2501.00574; public reference `vision_tower_builder.py`):
* Attention is joint over space and time, inside one clip of four frames, without a mask. Clips never see each other.
* UMT's position code is the sinusoid of a patch's place in the flattened clip of 14 x 14 grids: one running number,
  not factorised. Larger grids interpolate it frame by frame. It is neither parameter nor in any file.
* UMT's queries and values have biases, its keys have none; InternVideo2 has none, and normalises queries and keys over
  all heads at once.
* InternVideo2's position tables were trained, one for clips and one for images, and are stored. It has no final norm.

V videos, F frames, G groups of frames, N visual tokens per group, B clips (or images of one frame), T frames of a clip
or tiles of an image, P patches of a frame, C tower channels, S side of a frame in pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.siglip.modeling_siglip import SiglipMLP, eager_attention_forward
from transformers.utils import ModelOutput

from .compressor_videoxl import duplicated_frames, pad_to_whole_groups
from .configuration_videoxl import VideoXLInternVideo2Config, VideoXLUMTConfig

# Frames, and patches along a side, that UMT was pretrained with: its position codes count in these.
PRETRAINED_FRAMES, PRETRAINED_GRID = 4, 14
# What layer scale is before training (the published values are loaded).
INITIAL_LAYER_SCALE = 1e-5
# Bytes of the widest activation in tower or compressor on a CPU. Larger ones leave its caches and are paged in anew
# for each operation: a SigLIP of a quarter of the width ran at 57 instead of 70 GFLOP/s a core.
CPU_CACHE_BYTES = 4 * 2**20


@dataclass
class VideoXLVideoFeatures(ModelOutput):
    """Visual features of several videos.

    Args:
        pooler_output: Per video, its visual tokens [G, N, hidden].
        tower_features: Per video, the vision tower's output [F, P, C], if asked for.
    """

    pooler_output: tuple[torch.Tensor, ...] | None = None
    tower_features: tuple[torch.Tensor, ...] | None = None


def encode_videos(
    model, pixel_values_videos, output_tower_features: bool = False, return_dict: bool = True
) -> VideoXLVideoFeatures | tuple:
    """Encodes videos into visual tokens, a bounded number of frames at a time.

    Args:
        model: A `VideoXLModel`: its `vision_tower`, `compressor` and `multi_modal_projector` run.
        pixel_values_videos: [V, F, 3, H, W], or a list of [F_i, 3, H, W] (a video) and [T_i, 1, 3, H, W] (an image;
            with an overview [1 + rows, columns, 3, H, W]); any device and float dtype. A video may come as its
            `tower_features` [F_i, P, C] instead, in whole groups.
        output_tower_features: Also return the tower's output.
        return_dict: False returns a plain tuple.

    Returns:
        `VideoXLVideoFeatures`; per video, `pooler_output` holds [G, N, hidden] and `tower_features` [F, P, C]; per
        image, [T, N, hidden] and [T, P, C].

    Raises:
        ValueError: On pixels of another shape.
    """
    _require_pixels(model.config, pixel_values_videos)
    columns = [pixels.shape[1] if pixels.ndim == 5 else 1 for pixels in pixel_values_videos]
    videos = [_fill_groups(model.config, pixels) for pixels in pixel_values_videos]
    size = model.config.frames_per_group
    tokens, towers = [[] for _ in videos], [[] for _ in videos]
    for chunk in _share_chunks(model.config, videos):
        parts = [part for _, part in chunk]
        pixels = torch.cat(parts) if len(parts) > 1 else parts[0]
        copies, frames = size if pixels.ndim == 5 else 1, [len(part) for part in parts]
        visual, tower = _encode_frames(model, pixels if pixels.ndim == 3 else pixels.flatten(0, -4), copies)
        for (video, _), part in zip(
            chunk, visual.split([-(-count * copies // size) for count in frames]), strict=True
        ):
            tokens[video].append(part)
        if output_tower_features:
            for (video, _), part in zip(chunk, tower.split(frames), strict=True):
                towers[video].append(part)
        del tower  # else the next chunk's would live beside it
    tokens = [interleave_tiles(torch.cat(parts), count) for parts, count in zip(tokens, columns, strict=True)]
    towers = tuple(torch.cat(parts) for parts in towers) if output_tower_features else None
    output = VideoXLVideoFeatures(tuple(tokens), towers)
    return output if return_dict else output.to_tuple()


def _require_pixels(config, pixel_values_videos) -> None:
    """Raises ValueError if pixels are not of the form that `encode_videos` takes."""
    side, channels = config.vision_config.image_size, config.vision_config.num_channels
    frame, tiled = (channels, side, side), config.image_tiling == "overview"
    listed = isinstance(pixel_values_videos, (list, tuple)) and len(pixel_values_videos) > 0
    if not (torch.is_tensor(pixel_values_videos) or listed and all(map(torch.is_tensor, pixel_values_videos))):
        raise ValueError(
            f"pixel_values_videos must be a tensor [videos, frames, {channels}, {side}, {side}] or a list of tensors "
            f"[frames, {channels}, {side}, {side}], got {type(pixel_values_videos).__name__}; the processor builds it"
        )
    for pixels in pixel_values_videos:
        columns = pixels.shape[1] if tiled and pixels.ndim == 5 else 1
        if pixels.ndim == 3 and pixels.shape[2] == config.vision_config.hidden_size:
            if len(pixels) == 0 or len(pixels) % config.frames_per_group:
                raise ValueError(
                    f"tower features of a video come in whole groups of {config.frames_per_group} frames, got "
                    f"{len(pixels)}; repeat the last frame in front of the tower"
                )
            continue
        if 0 in pixels.shape or tuple(pixels.shape[1:]) not in (frame, (columns, *frame)):
            raise ValueError(
                f"each video in pixel_values_videos must be [frames, {channels}, {side}, {side}] with at least one "
                f"frame (an image [tiles, 1, {channels}, {side}, {side}]), got {tuple(pixels.shape)}; the processor "
                "builds it"
            )


def _fill_groups(config, pixels: torch.Tensor) -> torch.Tensor:
    """A video's frames, in whole groups where random ones are doubled; the compressor repeats the last one itself.

    Of an image's overview one copy is left: [1 + rows * columns, 1, 3, S, S].
    """
    if pixels.ndim == 5 and pixels.shape[1] > 1:
        return torch.cat([pixels[0, :1], pixels[1:].flatten(0, 1)])[:, None]
    if config.frame_padding not in ("last", "random"):
        raise ValueError(f"frame_padding must be 'last' or 'random', got {config.frame_padding!r:.200}")
    if config.frame_padding == "last" or pixels.ndim == 5:
        return pixels
    return pixels[duplicated_frames(len(pixels), config.frames_per_group, config.frame_padding_seed)]


def _share_chunks(config, videos):
    """Yields lists of (video, some of its frames): images, and short videos in whole groups, share a chunk."""
    limit, size, chunk, total = config.resolve_vision_chunk_frames(), config.frames_per_group, [], 0
    for video, pixels in enumerate(videos):
        for part in pixels.split(limit):
            alike = not chunk or (part.device, part.ndim) == (chunk[0][1].device, chunk[0][1].ndim)
            if chunk and (not alike or total + len(part) > limit or part.ndim == 4 and total % size):
                yield chunk
                chunk, total = [], 0
            chunk.append((video, part))
            total += len(part)
    yield chunk


def _encode_frames(model, pixels: torch.Tensor, copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames [F, 3, S, S] (the last group may be partial) or tower [F, P, C] -> visual tokens [G, N, hidden], tower.

    The compressor sees every frame's features `copies` times.
    """
    patch_embedding = model.vision_tower.embeddings.patch_embedding.weight
    device = patch_embedding.device if patch_embedding.device.type != "meta" else model.device  # offloaded
    pixels = pixels.to(device=device, dtype=patch_embedding.dtype)
    if model.config.sees_clips:
        return _encode_clips(model, pixels, 1 if copies > 1 else model.config.frames_per_group)
    config, size = model.config, pixels.element_size()
    vision, compressor, group = config.vision_config, config.compressor_config, config.frames_per_group
    features = pixels
    if pixels.ndim == 4:
        frame_bytes = (vision.image_size // vision.patch_size) ** 2 * vision.intermediate_size * size
        features = _in_turns(lambda part: TOWERS[vision.model_type](model.vision_tower, part), pixels, 1, frame_bytes)
    repeated = features.repeat_interleave(copies, dim=0) if copies > 1 else features
    group_bytes = group * compressor.grid_size**2 * compressor.hidden_size * size
    tokens = _in_turns(lambda part: model.multi_modal_projector(model.compressor(part)), repeated, group, group_bytes)
    return tokens, features


def frames_at_once(device_type: str, frames: int, unit: int, unit_bytes: int) -> int:
    """How many of `frames` a tower or compressor takes at once: on a CPU as many units as its caches hold."""
    return min(frames, max(CPU_CACHE_BYTES // unit_bytes, 1) * unit) if device_type == "cpu" else frames


def _in_turns(run, frames: torch.Tensor, unit: int, unit_bytes: int) -> torch.Tensor:
    at_once = frames_at_once(frames.device.type, len(frames), unit, unit_bytes)
    return run(frames) if at_once == len(frames) else torch.cat([run(part) for part in frames.split(at_once)])


def _encode_clips(model, pixels: torch.Tensor, clip_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_encode_frames`, clip by clip; the last clip is filled by repeating the last frame."""
    clips = pad_to_whole_groups(pixels, clip_frames).split(clip_frames)
    towers = [clip.flatten(0, 1)[None] if clip.ndim == 3 else model.vision_tower(clip[None]) for clip in clips]
    tokens = torch.cat([model.multi_modal_projector(model.compressor(tower)) for tower in towers])
    return tokens, torch.cat(towers).unflatten(1, (clip_frames, -1)).flatten(0, 1)[: len(pixels)]


def interleave_tiles(tokens: torch.Tensor, columns: int) -> torch.Tensor:
    """Lays the tokens of an image's tiles out as one picture's, line by line, behind those of its overview.

    Args:
        tokens: [1 + rows * columns, N, hidden], N a square number: the overview, then the tiles row by row. Returned
            in the same shape.
        columns: Tiles side by side; with 1 the tokens are in that order already.
    """
    if columns == 1:
        return tokens
    side = int(tokens.shape[1] ** 0.5)
    picture = rearrange(tokens[1:], "(r c) (y x) h -> (r y c x) h", c=columns, y=side)
    return torch.cat([tokens[:1], picture.view_as(tokens[1:])])


def clip_position_table(num_frames: int, grid_size: int, channels: int) -> torch.Tensor:
    """UMT's position code of a clip: that of the pretrained grids, interpolated to these frames and this grid.

    Even channels are sin, odd ones cos, of position / 10000^(2 * (channel div 2) / C).

    Args:
        num_frames: T; other numbers than the pretrained one are interpolated linearly over time, a single frame takes
            the pretrained first one.
        grid_size: Patches along the side of a frame; interpolated bicubically, frame by frame.

    Returns:
        [T * P, C] in float32, on the CPU.
    """
    frames, channel = 1 if num_frames == 1 else PRETRAINED_FRAMES, torch.arange(channels, device="cpu")
    positions = torch.arange(frames * PRETRAINED_GRID**2, dtype=torch.float64, device="cpu")
    angle = positions[:, None] / 10000.0 ** (2 * (channel // 2).double() / channels)
    table = torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()
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

    time, side = code(num_frames, channels // 4), code(grid_size, channels // 8 * 3)
    parts = (time[:, None, None], side[None, None], side[None, :, None])  # time, x, y
    table = torch.cat([part.expand(num_frames, grid_size, grid_size, -1) for part in parts], dim=3).flatten(0, 2)
    return F.pad(table.float(), (0, 0, 1, 0))


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
        frames = {"clip_positions": self.config.num_frames, "image_positions": 1}
        sizes = self.config.grid_size, self.config.hidden_size
        return {name: clip_position_table(count, *sizes) for name, count in frames.items()}

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, T, 3, S, S] -> [B, T * P, C], without positions."""
        return rearrange(self.patch_embedding(pixels.transpose(1, 2)), "b c t y x -> b (t y x) c")

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patches(pixels)
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
        return {}  # they are parameters

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.patches(pixels)
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
            self.q_norm, self.k_norm = (Qwen2RMSNorm(channels, eps=config.norm_eps) for _ in range(2))
        else:
            self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(channels)) for _ in range(2))
        self.proj = nn.Linear(channels, channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        if self.q_bias is None:
            query, key = self.q_norm(query), self.k_norm(key)
        else:
            query, value = query + self.q_bias, value + self.v_bias
        split = [rearrange(states, "b n (h d) -> b h n d", d=self.head_dim) for states in (query, key, value)]
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attention(self, *split, None, is_causal=False, scaling=self.scale, dropout=0.0)
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
        scale = VideoXLLayerScale if config.layer_scale else nn.Identity
        self.scale1, self.scale2 = scale(config.hidden_size), scale(config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.scale1(self.self_attn(self.layer_norm1(hidden_states)))
        return hidden_states + self.scale2(self.mlp(self.layer_norm2(hidden_states)))


class VideoXLFrameFormat(NamedTuple):
    """What the published quick start takes for an image processor: (height, width) of the tower's frames in pixels."""

    size: tuple[int, int]

    def preprocess(self, images=None, return_tensors=None):
        """Raises ValueError: frames are prepared elsewhere."""
        raise ValueError("AutoProcessor.from_pretrained(...) of this model's folder prepares frames; chat does so too")


class VideoXLVideoTower(PreTrainedModel):
    """A tower over clips: pixels [B, T, 3, S, S] (T = 1: images) -> features [B, T * P, C], by frame, row, column."""

    base_model_prefix = "vision_tower"
    main_input_name = "pixels"
    input_modalities = ("video",)
    supports_gradient_checkpointing = _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True
    _no_split_modules = ["VideoXLClipLayer", "VideoXLClipEmbeddings", "VideoXLClassClipEmbeddings"]

    embeddings_class = VideoXLClipEmbeddings

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        # As in transformers' towers, layers are under `encoder.layers`.
        layers = [VideoXLClipLayer(config) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
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
        """For the published quick start, which takes it and does nothing with it: `model.get_vision_tower()`'s."""
        return VideoXLFrameFormat((self.config.image_size, self.config.image_size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embeddings(pixels)
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states)
        return self.final_norm(hidden_states[:, -pixels.shape[1] * self.config.grid_size**2 :])


class VideoXLUMT(VideoXLVideoTower):
    """UMT-L, without the masking and the decoder that it was pretrained with."""

    config_class = VideoXLUMTConfig


class VideoXLInternVideo2(VideoXLVideoTower):
    """InternVideo2-1B, without its pooling and its projections; its class token is dropped behind the last block."""

    config_class = VideoXLInternVideo2Config
    embeddings_class = VideoXLClassClipEmbeddings


def _siglip_features(tower, pixels: torch.Tensor) -> torch.Tensor:
    # Through the tower's parts: only the last built layer's output is wanted, without the norm that follows it.
    return tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state


def _clip_features(tower, pixels: torch.Tensor) -> torch.Tensor:
    # As above. The first token is the class token, which no member of the family uses.
    embedded = tower.pre_layrnorm(tower.embeddings(pixels))
    return tower.encoder(inputs_embeds=embedded).last_hidden_state[:, 1:]


# Towers over clips, and over frames (from the tower and pixels [F, 3, S, S] to features [F, P, C]), by model type.
CLIP_TOWERS = {tower.config_class.model_type: tower for tower in (VideoXLUMT, VideoXLInternVideo2)}
TOWERS = {"siglip_vision_model": _siglip_features, "clip_vision_model": _clip_features}


def build_vision_tower(config) -> PreTrainedModel:
    """The tower that `config.vision_config` names, else ValueError; up to the layer `config.vision_feature_layer`."""
    vision_config, layer = config.vision_config, config.vision_feature_layer
    kind, known = vision_config.model_type, {**TOWERS, **CLIP_TOWERS}
    if kind not in known:
        raise ValueError(f"vision_config.model_type must be one of {', '.join(known)}, got {kind!r:.200}")
    tower = CLIP_TOWERS.get(kind, AutoModel.from_config)(vision_config)
    del tower.encoder.layers[layer if layer >= 0 else vision_config.num_hidden_layers + 1 + layer :]
    return tower
