"""The vision path: the tower, and how videos and images become visual tokens a bounded number of frames at a time.

What is surprising:
* Groups of frames never see each other, so videos may share a pass, and any split into whole groups gives the same
  tokens. Where the tower sees whole clips each runs by itself: token merging decides between near ties, and in another
  batch the last bits of a sum, so the choice, could differ.
* A tile of an image is a group of equal frames, or (where the tower sees clips) of one frame; the tower runs on it
  once.
* An image with an overview has the squashed picture as its first tile. The tokens of the others are laid out as one
  picture's, line by line through all tiles, so its pixels say how many rows and columns of tiles there are: they come
  as [1 + rows, columns, 3, S, S], the first row holding copies of the overview.

V videos, F frames, G groups of frames, T tiles, N visual tokens per group, P patches, C tower channels, S image side.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from transformers import AutoModel, PreTrainedModel
from transformers.utils import ModelOutput

from .compressor_videoxl import duplicated_frames, pad_to_whole_groups
from .video_towers_videoxl import VIDEO_TOWER_MODELS


@dataclass
class VideoXLVideoFeatures(ModelOutput):
    """Visual features of several videos.

    Args:
        pooler_output: Per video, its visual tokens [G, N, hidden].
        tower_features: Per video, the vision tower's output [F, P, C], if asked for.
    """

    pooler_output: tuple[torch.Tensor, ...] | None = None
    tower_features: tuple[torch.Tensor, ...] | None = None


class VideoXLVisionMixin:
    """Encoding for a model with `vision_tower`, `compressor`, `multi_modal_projector` and a `config`."""

    def get_video_features(self, pixel_values_videos, output_tower_features=False, return_dict=True):
        """Encodes videos into visual tokens, a bounded number of frames at a time.

        Args:
            pixel_values_videos: [V, F, 3, H, W], or a list of [F_i, 3, H, W] (a video) and [T_i, 1, 3, H, W] (an
                image; with an overview [1 + rows, columns, 3, H, W]); any device and float dtype.
            output_tower_features: Also return the tower's output.
            return_dict: False returns a plain tuple.

        Returns:
            `VideoXLVideoFeatures`; per video, `pooler_output` holds [G, N, hidden] and `tower_features` [F, P, C];
            per image, [T, N, hidden] and [T, P, C].

        Raises:
            ValueError: On pixels of another shape.
        """
        side, channels = self.config.vision_config.image_size, self.config.vision_config.num_channels
        listed = isinstance(pixel_values_videos, (list, tuple)) and len(pixel_values_videos) > 0
        if not (torch.is_tensor(pixel_values_videos) or listed and all(map(torch.is_tensor, pixel_values_videos))):
            raise ValueError(
                f"pixel_values_videos must be a tensor [videos, frames, {channels}, {side}, {side}] or a list of "
                f"tensors [frames, {channels}, {side}, {side}], got {type(pixel_values_videos).__name__}; the "
                "processor builds it"
            )
        for pixels in pixel_values_videos:
            frame, tiled = (channels, side, side), self.config.image_tiling == "overview"
            columns = pixels.shape[1] if tiled and pixels.ndim == 5 else 1
            if 0 in pixels.shape or tuple(pixels.shape[1:]) not in (frame, (columns, *frame)):
                raise ValueError(
                    f"each video in pixel_values_videos must be [frames, {channels}, {side}, {side}] with at least "
                    f"one frame (an image [tiles, 1, {channels}, {side}, {side}]), got {tuple(pixels.shape)}; the "
                    "processor builds it"
                )
        columns = [pixels.shape[1] if pixels.ndim == 5 else 1 for pixels in pixel_values_videos]
        pixel_values_videos = [self._fill_groups(pixels) for pixels in pixel_values_videos]
        size = self.config.compressor_config.frames_per_group
        tokens, towers = [[] for _ in pixel_values_videos], [[] for _ in pixel_values_videos]
        for owners, chunk in self._vision_chunks(pixel_values_videos):
            copies = size if chunk.ndim == 5 else 1
            visual, tower = self._encode_frames(chunk.flatten(0, -4), copies)
            groups = [-(-frames * copies // size) for _, frames in owners]
            for (video, _), part in zip(owners, visual.split(groups), strict=True):
                tokens[video].append(part)
            if output_tower_features:
                for (video, _), part in zip(owners, tower.split([frames for _, frames in owners]), strict=True):
                    towers[video].append(part)
            del tower  # else the next chunk's would live beside it
        tokens, towers = [torch.cat(parts) for parts in tokens], [torch.cat(p) for p in towers if p]
        tokens = [interleave_tiles(*tiled) for tiled in zip(tokens, columns, strict=True)]
        output = VideoXLVideoFeatures(tuple(tokens), tuple(towers) if output_tower_features else None)
        return output if return_dict else output.to_tuple()

    def _vision_chunks(self, videos):
        """Yields ([(video, frames)], pixels): images, and short videos in whole groups, share a chunk."""
        limit, size = self.config.resolve_vision_chunk_frames(), self.config.compressor_config.frames_per_group
        owners, parts, total = [], [], 0
        for video, pixels in enumerate(videos):
            for part in pixels.split(limit):
                if parts and (
                    total + part.shape[0] > limit
                    or (part.device, part.ndim) != (parts[0].device, parts[0].ndim)
                    or (part.ndim == 4 and total % size)
                ):
                    yield owners, torch.cat(parts) if len(parts) > 1 else parts[0]
                    owners, parts, total = [], [], 0
                owners.append((video, part.shape[0]))
                parts.append(part)
                total += part.shape[0]
        yield owners, torch.cat(parts) if len(parts) > 1 else parts[0]

    def _encode_frames(self, pixels: torch.Tensor, copies: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames [F, 3, H, W] (the last group may be partial) -> visual tokens [G, N, hidden], tower [F, P, C].

        With `copies` each frame counts so many times, behind the tower.
        """
        patch_embedding = self.vision_tower.embeddings.patch_embedding.weight
        device = patch_embedding.device if patch_embedding.device.type != "meta" else self.device  # offloaded
        pixels = pixels.to(device=device, dtype=patch_embedding.dtype)
        if self.config.sees_clips:
            return self._encode_clips(pixels, 1 if copies > 1 else self.config.frames_per_group)
        features = TOWERS[self.config.vision_config.model_type](self.vision_tower, pixels)
        repeated = features.repeat_interleave(copies, dim=0) if copies > 1 else features
        return self.multi_modal_projector(self.compressor(repeated)), features

    def _encode_clips(self, pixels: torch.Tensor, clip_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As `_encode_frames`, clip by clip; the last clip is filled by repeating the last frame."""
        tokens, towers = [], []
        for clip in pad_to_whole_groups(pixels, clip_frames).split(clip_frames):
            tower = self.vision_tower(clip[None])
            tokens.append(self.multi_modal_projector(self.compressor(tower)))
            towers.append(tower)
        features = torch.cat(towers).unflatten(1, (clip_frames, -1)).flatten(0, 1)
        return torch.cat(tokens), features[: len(pixels)]

    def _fill_groups(self, pixels: torch.Tensor) -> torch.Tensor:
        """Frames of a video in whole groups where random ones are doubled; the compressor repeats the last one.

        Of an image's overview one copy is left: [1 + rows * columns, 1, 3, S, S].
        """
        if pixels.ndim == 5 and pixels.shape[1] > 1:
            return torch.cat([pixels[0, :1], pixels[1:].flatten(0, 1)])[:, None]
        padding = self.config.frame_padding
        if padding not in ("last", "random"):
            raise ValueError(f"frame_padding must be 'last' or 'random', got {padding!r}")
        if padding == "last" or pixels.ndim == 5:
            return pixels
        order = duplicated_frames(len(pixels), self.config.frames_per_group, self.config.frame_padding_seed)
        return pixels[order]


def interleave_tiles(tokens: torch.Tensor, columns: int) -> torch.Tensor:
    """Lays the tokens of an image's tiles out as one picture's, behind those of its overview.

    Args:
        tokens: [1 + rows * columns, N, hidden], N a square number: the overview, then the tiles row by row.
        columns: Tiles side by side.

    Returns:
        The same shape; line by line through all tiles of a row of tiles.
    """
    if columns == 1:
        return tokens
    side = int(tokens.shape[1] ** 0.5)
    picture = rearrange(tokens[1:], "(r c) (y x) h -> (r y c x) h", c=columns, y=side)
    return torch.cat([tokens[:1], picture.view_as(tokens[1:])])


def _siglip_features(tower, pixels: torch.Tensor) -> torch.Tensor:
    # Through the tower's parts: only the last built layer's output is wanted, without the norm that follows it.
    return tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state


def _clip_features(tower, pixels: torch.Tensor) -> torch.Tensor:
    # As above. The first token is the class token, which no member of the family uses.
    embedded = tower.pre_layrnorm(tower.embeddings(pixels))
    return tower.encoder(inputs_embeds=embedded).last_hidden_state[:, 1:]


# Towers by their config's model type: a function of the tower and pixels [F, 3, S, S] that gives features [F, P, C].
TOWERS = {"siglip_vision_model": _siglip_features, "clip_vision_model": _clip_features}


def build_vision_tower(config) -> PreTrainedModel:
    """The tower that `config.vision_config` names, without the layers above `config.vision_feature_layer`.

    Raises:
        ValueError: If the slot has no such value.
    """
    vision_config = config.vision_config
    known = {**TOWERS, **VIDEO_TOWER_MODELS}
    if vision_config.model_type not in known:
        raise ValueError(
            f"vision_config.model_type must be one of {', '.join(known)}, got {vision_config.model_type!r}"
        )
    if vision_config.model_type in VIDEO_TOWER_MODELS:
        tower = VIDEO_TOWER_MODELS[vision_config.model_type](vision_config)
    else:
        tower = AutoModel.from_config(vision_config)
    del tower.encoder.layers[tower_depth(config) :]
    return tower


def tower_depth(config) -> int:
    """Layers of the tower that are used."""
    layer = config.vision_feature_layer
    return layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer


__all__ = ["VideoXLVideoFeatures", "VideoXLVisionMixin", "build_vision_tower", "interleave_tiles", "tower_depth"]
