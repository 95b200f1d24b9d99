"""Token merging (ToMe, arXiv 2210.09461): the patches of a clip become 64 tokens by averaging similar ones.

What is surprising, all of it what the published weights were trained with (VideoChat-Flash, arXiv 2501.00574, section
"HiCo"; public reference `mm_projector_builder.py`):
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

U units (clips, or tiles of images), n tokens of a unit, r tokens that a round removes, C channels, d = C / heads.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


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
    """One round's matching.

    Args:
        metric: [U, n, d] what tokens are compared by, with the cosine.
        removed: r, at most n // 2; more is cut to that.
    """
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
    even, odd = tokens[:, ::2], tokens[:, 1::2]

    def taken(numbers):
        return even.gather(1, numbers[..., None].expand(-1, -1, channels))

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
    while num_tokens > target:
        schedule.append(min(num_tokens - target, num_tokens // 2))
        num_tokens -= schedule[-1]
    return schedule


def merge_tokens(tokens: torch.Tensor, heads: int, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges the tokens of each unit until `target` are left.

    Args:
        tokens: [U, n, C].
        heads: Tokens are compared by the mean over so many equal parts of their channels.
        target: Tokens that are left.

    Returns:
        `(merged, sizes)` in float32: [U, target, C], and [U, target] how many of the n tokens each averages.

    Raises:
        ValueError: If there are fewer than `target` tokens.
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


__all__ = ["TokenMatch", "VideoXLTokenMerging", "match_tokens", "merge_schedule", "merge_sum", "merge_tokens"]
