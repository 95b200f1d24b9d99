"""From a tower's frame features to visual tokens: compressors (dynamic token synthesis, token merging) and projector.

What is surprising about dynamic token synthesis, all of it load-bearing because the published weights were trained
with it (Video-XL-2, arXiv 2506.19225; public reference `sae.py`, `sae_utils.py`, `attention_temporal_videoae.py`):
* Grouping re-reads memory: four frames stacked as [4, C, h, w] are *viewed* as [C, 4, h, w]. What the module calls
  "time" is the channel index modulo 4, and a "channel" is (frame in group, channel div 4).
* The relative-position term of the temporal attention is transposed: logit (i, j) uses the query at j and the offset
  i - j.
* The 3-D convolutions pad time in front only (replicating), and nothing non-linear stands between the layers.
* The projector runs on every cell, pooling comes after it; the two do not commute because of the GELU.

What is surprising about token merging (ToMe, arXiv 2210.09461), which averages similar patches of a clip until 64
tokens are left, likewise trained so (VideoChat-Flash, arXiv 2501.00574, section "HiCo"; public reference
`mm_projector_builder.py`):
* Each round halves the tokens at most: those with an even number look for the most similar one with an odd number, and
  the best matches are averaged into it, weighted by how many patches each stands for.
* What is left of the even ones stands in front, the most similar first, and the odd ones follow in order. So the 64
  tokens are in no order of time or place, and 16 of them are not one frame.
* All of it runs in float32 whatever the model's dtype, with stable sorts, ties to the lowest number, and sums in a
  fixed order. The public code runs in the model's dtype: there bfloat16 loses patches of large clusters, float16
  overflows, and runs differ.

Six tokens, of which two are merged (e: even, o: odd; e2 is most similar to o1, then e0 to o1, then e4 to o5):

    before   e0 o1 e2 o3 e4 o5
    after    e4 | o1+e2+e0  o3  o5

B batch of groups (= G in a chunk), F frames, G groups of `frames_per_group` frames, P patches of the tower, C
channels, T time steps left in a group, S side of the resized grid, N = (S / pool)^2 tokens per group; U units of
merging (clips, or tiles of images), n tokens of a unit, r tokens that a round removes, d = C / heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers.activations import ACT2FN


def resize_feature_grid(features: torch.Tensor, grid_size: int) -> torch.Tensor:
    """Resizes each frame's square grid of features bilinearly (no antialias, corners not aligned, in float32).

    Args:
        features: [F, P, C], P a square number, row-major.
        grid_size: S, the new side: [F, C, S, S] in the dtype of `features` is returned.
    """
    side = int(features.shape[1] ** 0.5)
    if side * side != features.shape[1]:
        raise ValueError(f"the tower's {features.shape[1]} patches do not form a square grid")
    grid = rearrange(features, "f (y x) c -> f c y x", y=side)
    resized = F.interpolate(grid.float(), size=(grid_size, grid_size), mode="bilinear", align_corners=False)
    return resized.to(features.dtype)


def pad_to_whole_groups(frames: torch.Tensor, frames_per_group: int) -> torch.Tensor:
    """Repeats the last entry of the first axis until its length is a multiple of `frames_per_group`."""
    missing = -len(frames) % frames_per_group
    return torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])]) if missing else frames


def duplicated_frames(num_frames: int, frames_per_group: int, seed: int) -> list[int]:
    """How the published Video-XL-Pro code makes whole groups: frames that are drawn at random come twice, in place.

    Fewer frames than a group has are filled by repeating the last. Returns indices of frames, ascending.
    """
    missing = -num_frames % frames_per_group
    if num_frames < frames_per_group:
        return [*range(num_frames), *[num_frames - 1] * missing]
    drawn = torch.randperm(num_frames, generator=torch.Generator().manual_seed(seed))[:missing]
    return sorted([*range(num_frames), *drawn.tolist()])


def group_frames(grids: torch.Tensor, frames_per_group: int) -> torch.Tensor:
    """Views whole groups of frames [G * frames_per_group, C, S, S] as volumes [G, C, frames_per_group, S, S].

    In the published memory order, see the module docstring.
    """
    t = frames_per_group
    return rearrange(grids, "(g f) (q t) y x -> g (f q) t y x", f=t, t=t)


class VideoXLGroupNorm(nn.GroupNorm):
    """Group normalisation with statistics in float32."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # override: half-precision statistics overflow on the tower's large activations
        affine = self.weight.float(), self.bias.float()
        return F.group_norm(hidden_states.float(), self.num_groups, *affine, self.eps).to(hidden_states.dtype)


class VideoXLSpatialAttention(nn.Module):
    """Single-head attention over the cells of one time step, with a residual. [B, C, T, S, S] -> the same."""

    def __init__(self, config):
        super().__init__()
        channels = config.hidden_size
        self.scale = channels**-0.5
        self.norm = VideoXLGroupNorm(config.norm_groups, channels, eps=config.norm_eps)
        self.q, self.k, self.v, self.proj_out = (nn.Conv3d(channels, channels, kernel_size=1) for _ in range(4))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, _, time, height, width = hidden_states.shape
        normed = self.norm(hidden_states)
        projected = (layer(normed) for layer in (self.q, self.k, self.v))
        query, key, value = (rearrange(states, "b c t y x -> (b t) (y x) c") for states in projected)
        # The dot product runs over all channels: in half precision it overflows, scaled or not.
        logits = torch.matmul(query.float() * self.scale, key.float().transpose(1, 2))
        attended = torch.matmul(logits.softmax(dim=-1).to(value.dtype), value)
        attended = rearrange(attended, "(b t) (y x) c -> b c t y x", b=batch, t=time, y=height, x=width)
        return hidden_states + self.proj_out(attended)


class VideoXLRelativePosition(nn.Module):
    """Table of learned vectors for clipped offsets -max..max between time steps."""

    def __init__(self, max_relative_position: int, channels: int):
        super().__init__()
        self.max_relative_position = max_relative_position
        self.embeddings_table = nn.Parameter(torch.empty(2 * max_relative_position + 1, channels))

    def forward(self, length: int) -> torch.Tensor:
        """Vectors R[i, j] of the offset j - i: [length, length, C]."""
        steps, most = torch.arange(length, device=self.embeddings_table.device), self.max_relative_position
        return self.embeddings_table[(steps[None, :] - steps[:, None]).clamp(-most, most) + most]


class VideoXLTemporalAttention(nn.Module):
    """Single-head attention over the time steps of one cell, with a residual. [B, C, T, S, S] -> the same."""

    def __init__(self, config):
        super().__init__()
        channels, most = config.hidden_size, config.max_relative_position
        self.scale = channels**-0.25
        self.norm = VideoXLGroupNorm(config.norm_groups, channels, eps=config.norm_eps)
        self.qkv = nn.Conv1d(channels, 3 * channels, kernel_size=1)
        self.relative_position_k, self.relative_position_v = (
            VideoXLRelativePosition(most, channels) for _ in range(2)
        )
        self.proj_out = nn.Conv1d(channels, channels, kernel_size=1)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, _, time, height, width = hidden_states.shape
        cells = rearrange(hidden_states, "b c t y x -> (b y x) c t")
        query, key, value = rearrange(self.qkv(self.norm(cells)), "n (three c) t -> three n t c", three=3)
        query, key = query.float() * self.scale, key.float() * self.scale
        # Transposed relative term: row i, column j takes the query at j and the vector of offset i - j, R_k[j, i].
        relative = torch.einsum("n j c, j i c -> n i j", query, self.relative_position_k(time).float())
        weights = (torch.matmul(query, key.transpose(1, 2)) + relative).softmax(dim=-1).to(value.dtype)
        attended = torch.matmul(weights, value)
        attended = attended + torch.einsum("n i j, i j c -> n i c", weights, self.relative_position_v(time))
        projected = self.proj_out(attended.transpose(1, 2))
        return hidden_states + rearrange(projected, "(b y x) c t -> b c t y x", b=batch, y=height, x=width)


class VideoXLTimeHalvingConv(nn.Module):
    """3-D convolution that halves time and keeps height and width. [B, C, T, S, S] -> [B, C, T / 2, S, S]."""

    def __init__(self, config):
        super().__init__()
        stride = (2, 1, 1)
        self.conv = nn.Conv3d(config.hidden_size, config.hidden_size, config.kernel_size, stride=stride)
        # kernel - stride per axis, the larger half in front; F.pad wants the last axis first.
        spans = [config.kernel_size - step for step in reversed(stride)]
        self.padding = [side for span in spans for side in ((span + 1) // 2, span // 2)]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        padded = F.pad(hidden_states.float(), self.padding, mode="replicate").to(hidden_states.dtype)
        return self.conv(padded)


class VideoXLDynamicTokenSynthesis(nn.Module):
    """DTS: merges each group of frames into one grid of features, [F, P, C] -> [G, S * S, C].

    The last group is filled by repeating the last frame, so a single image is a group of equal frames.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.temporal_encoding = nn.Parameter(torch.empty(config.frames_per_group, config.hidden_size))
        halving = (VideoXLSpatialAttention, VideoXLTemporalAttention, VideoXLTimeHalvingConv)
        times = config.frames_per_group.bit_length() - 1
        self.encoder = nn.ModuleList([layer(config) for _ in range(times) for layer in halving])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        frames_per_group = self.config.frames_per_group
        grids = pad_to_whole_groups(resize_feature_grid(features, self.config.grid_size), frames_per_group)
        hidden_states = group_frames(grids, frames_per_group) + rearrange(self.temporal_encoding, "t c -> c t 1 1")
        for layer in self.encoder:
            hidden_states = layer(hidden_states)
        return rearrange(hidden_states, "g c 1 y x -> g (y x) c")


class TokenMatch(NamedTuple):
    """Which tokens of a round are merged: numbers among the even-numbered tokens, except `partner`.

    Args:
        unmerged: [U, ceil(n / 2) - r] even tokens that stay, the most similar first.
        merged: [U, r] even tokens that go, the most similar first.
        partner: [U, r] where these go: numbers among the odd-numbered tokens.
    """

    unmerged: torch.Tensor
    merged: torch.Tensor
    partner: torch.Tensor


def match_tokens(metric: torch.Tensor, removed: int) -> TokenMatch:
    """One round's matching of tokens by the cosine of `metric` [U, n, d]; at most n // 2 are removed."""
    removed = min(removed, metric.shape[1] // 2)
    directions = F.normalize(metric, dim=-1)  # a zero vector stays zero, similar to nothing
    similarity = directions[:, ::2] @ directions[:, 1::2].transpose(1, 2)
    best, partner = similarity.max(dim=2)
    order = best.sort(dim=1, descending=True, stable=True).indices
    merged = order[:, :removed]
    return TokenMatch(order[:, removed:], merged, partner.gather(1, merged))


def merge_sum(tokens: torch.Tensor, match: TokenMatch) -> torch.Tensor:
    """Adds the merged tokens to their partners. [U, n, C] -> [U, n - r, C], unmerged ones in front."""
    units, _, channels = tokens.shape
    odd = tokens[:, 1::2]

    def taken(even):
        return tokens[:, ::2].gather(1, even[..., None].expand(-1, -1, channels))

    # Segments rather than scattered adds, whose order differs from run to run on a GPU.
    partner, order = match.partner.sort(dim=1, stable=True)
    segments = partner + torch.arange(units, device=partner.device)[:, None] * odd.shape[1]
    lengths = torch.bincount(segments.flatten(), minlength=units * odd.shape[1])
    moved = taken(match.merged.gather(1, order)).flatten(0, 1)
    # "unsafe" leaves out a check of the lengths that would wait for the GPU.
    sums = torch.segment_reduce(moved, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return torch.cat([taken(match.unmerged), odd + sums.view_as(odd)], dim=1)


def merge_schedule(num_tokens: int, target: int) -> list[int]:
    """Tokens that each round removes, from `num_tokens` down to `target`."""
    schedule = []
    while (left := num_tokens - sum(schedule)) > target:
        schedule.append(min(left - target, left // 2))
    return schedule


def merge_tokens(tokens: torch.Tensor, heads: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the tokens [U, n, C] of each unit until `target` are left; ValueError if there are fewer.

    Tokens are compared by the mean over `heads` equal parts of their channels.

    Returns:
        `(merged, sizes)` in float32: [U, target, C], and [U, target] how many of the n tokens each averages.
    """
    if tokens.shape[1] < target:
        raise ValueError(
            f"token merging leaves {target} tokens of a clip or image, but there are only {tokens.shape[1]}: the "
            "tower's patches are too large for its frames"
        )
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.float()
        sizes = tokens.new_ones(*tokens.shape[:2], 1)
        for removed in merge_schedule(tokens.shape[1], target):
            match = match_tokens(tokens.unflatten(2, (heads, -1)).mean(dim=2), removed)
            tokens, sizes = merge_sum(tokens * sizes, match), merge_sum(sizes, match)
            tokens = tokens / sizes
    return tokens, sizes[..., 0]


class VideoXLTokenMerging(nn.Module):
    """The compressor of VideoChat-Flash; it has no weights. [U, n, C] -> [U, grid_size^2, C]."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.target = config.merge_heads, config.grid_size**2

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return merge_tokens(features, self.heads, self.target)[0].to(features.dtype)


class VideoXLMultiModalProjector(nn.Module):
    """Two-layer MLP into the language model's width, then average pooling. [G, S * S, C] -> [G, N, hidden]."""

    def __init__(self, config, text_hidden_size: int):
        super().__init__()
        self.grid_size, self.pool_size = config.grid_size, config.projector_pool_size
        self.linear_1 = nn.Linear(config.hidden_size, text_hidden_size)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(text_hidden_size, text_hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        projected = self.linear_2(self.act(self.linear_1(features)))
        if self.pool_size == 1:
            return projected
        grid = rearrange(projected, "g (y x) c -> g c y x", y=self.grid_size)
        return rearrange(F.avg_pool2d(grid, self.pool_size), "g c y x -> g (y x) c")


# Compressors: frame features [F, P, C] (token merging: those of whole units [U, n, C]) -> [G, S * S, C].
COMPRESSORS = {"dts": VideoXLDynamicTokenSynthesis, "none": nn.Identity, "tome": VideoXLTokenMerging}


def build_compressor(config) -> nn.Module:
    """The compressor that `config.compressor_type` names; ValueError if there is none."""
    if config.compressor_type not in COMPRESSORS:
        raise ValueError(f"compressor_type must be one of {tuple(COMPRESSORS)}, got {config.compressor_type!r:.200}")
    return COMPRESSORS[config.compressor_type](config)
