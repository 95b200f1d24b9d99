"""Query-aware token selection (Video-XL-Pro, arXiv 2503.18478): which visual tokens the language model sees.

What is surprising, all of it what the published weights were trained with (public reference `llava_arch.py`):
* The choice depends on all text of the prompt, so it is made per question; what a video can be encoded to beforehand
  are its visual tokens.
* The selector also changes what it keeps: every row of a video (timestamps too) is rotated by its place in the video,
  before the language model rotates its keys, and every visual row gets its score added to all its channels.
* In the attention to timestamps visual rows are the queries through `k_proj`, timestamps are keys *and values* through
  `q_proj`, and the result replaces the visual row. It serves the scores only.

A video is a block of n rows: per group T rows of its timestamp (none in the first generation) and N visual tokens.
G groups, K rows that are kept, H the language model's width.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from .prefill_videoxl import Kept, SequencePolicy
from .sparse_attention import GroupSpan, VisualLayout

# Base of the rotation of rows, as in the reference.
ROW_ROPE_THETA = 1e6
# The number of kept visual tokens is a multiple of this, so that beacon windows divide evenly.
KEEP_MULTIPLE = 16
# Rows that are scored or rotated at once: bounds the temporary copies, [rows, H] in float32.
ROWS_AT_ONCE = 16384


class VideoXLTimeAttention(nn.Module):
    """Attention of visual tokens to the timestamp of their group. [G, T, H], [G, N, H] -> [G, N, H]."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.out_proj = (nn.Linear(hidden_size, hidden_size) for _ in range(3))

    def forward(self, timestamps: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        projected = self.q_proj(timestamps), self.k_proj(visual)
        times, queries = (rearrange(states, "g n (h d) -> g h n d", h=self.num_heads) for states in projected)
        attended = F.scaled_dot_product_attention(queries, times, times)
        return self.out_proj(rearrange(attended, "g h n d -> g n (h d)"))


class VideoXLTokenSelector(nn.Module):
    """Scores visual tokens against the prompt's text, and keeps the best.

    Args:
        hidden_size: H.
        num_heads: Heads of the attention to timestamps; None for the generation without it.
    """

    def __init__(self, hidden_size: int, num_heads: int | None = None):
        super().__init__()
        self.text_projection = nn.Linear(hidden_size, hidden_size)
        self.time_attention = None if num_heads is None else VideoXLTimeAttention(hidden_size, num_heads)

    def text_features(self, text: torch.Tensor) -> torch.Tensor:
        """Embeddings of the prompt's text [M, H] as scores take them, [M, H]."""
        return F.gelu(self.text_projection(text))

    def condition(self, rows: torch.Tensor, groups) -> torch.Tensor:
        """Visual tokens as the scores take them: attended to the timestamps, or (first generation) as they are.

        Args:
            rows: [n, H].
            groups: Per group (first row, first visual row, end), all with the same T and N.

        Returns:
            [G * N, H].
        """
        start, visual_start, end = groups[0]
        grouped = rearrange(rows, "(g n) h -> g n h", g=len(groups))
        timestamps, visual = grouped[:, : visual_start - start], grouped[:, visual_start - start : end - start]
        if self.time_attention is not None:
            visual = self.time_attention(timestamps, visual)
        return visual.flatten(0, 1)

    def scores(self, block, groups, text: torch.Tensor) -> torch.Tensor:
        """Scores of all visual tokens of a video, scaled to 0..1.

        Args:
            block: Rows of the video: something that gives [rows, H] for `block[start:stop]`, on any device.
            groups: Per group (first row, first visual row, end) in the block, adjacent.
            text: [M, H] embeddings of the prompt's text.

        Returns:
            [G * N] in float32; all 0 where they do not differ.
        """
        wanted = self.text_features(text).float().mean(dim=0)
        scores = []
        for part in _equal_parts(groups):
            conditioned = self.condition(block[part[0][0] : part[-1][2]].to(text.device), part).float()
            with torch.autocast(text.device.type, enabled=False):  # a score decides, and is added to the row
                scores.append(conditioned @ wanted)
        scores = torch.cat(scores)
        lowest, highest = scores.aminmax()
        return (scores - lowest) / (highest - lowest).clamp(min=torch.finfo(torch.float32).tiny)

    def forward(self, block, groups, text: torch.Tensor, keep_ratio=1.0, max_tokens=None):
        """Selects the rows of one video.

        Args:
            block, groups, text: See `scores`.
            keep_ratio: Share of the visual tokens to keep.
            max_tokens: At most so many; None for no limit.

        Returns:
            `(kept, rows)`: the kept rows' numbers in the block [K], ascending, timestamps among them, and these rows
            [K, H] as the language model gets them.
        """
        scores, size = self.scores(block, groups, text), groups[0][2] - groups[0][1]
        starts = torch.tensor([group[1] for group in groups], device=scores.device)
        visual = (starts[:, None] + torch.arange(size, device=scores.device)).flatten()  # numbers of the visual rows
        count = kept_count(len(visual), keep_ratio, max_tokens)
        bonus = torch.full((groups[-1][2],), -1.0, device=scores.device)
        bonus[visual] = scores
        is_kept = bonus < 0
        is_kept[visual[scores.topk(count).indices]] = True
        kept = is_kept.nonzero().flatten()
        rows, starts = [], range(0, len(bonus), ROWS_AT_ONCE)
        bounds = torch.searchsorted(kept, torch.tensor([*starts, len(bonus)], device=kept.device)).tolist()
        for start, first, last in zip(starts, bounds[:-1], bounds[1:], strict=True):
            numbers = kept[first:last]
            taken = block[start : start + ROWS_AT_ONCE].to(text.device).index_select(0, numbers - start)
            rows.append(rotate_rows(taken, numbers) + bonus[numbers].clamp(min=0)[:, None].to(taken.dtype))
        return kept, torch.cat(rows)


def kept_count(tokens: int, keep_ratio: float, max_tokens: int | None) -> int:
    """How many of a video's visual tokens are kept, see `VideoXLTokenSelector.forward`."""
    count = int(tokens * keep_ratio)
    count = count if max_tokens is None else min(count, max_tokens)
    # A handful of tokens would round down to none.
    return count // KEEP_MULTIPLE * KEEP_MULTIPLE or count


def rotate_rows(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Rotates neighbouring channels (2i, 2i + 1) of rows [K, H] by their places [K] * theta^(-2i / H), in float32.

    Places are the rows' numbers in the video. Returns [K, H] in the dtype of `rows`.
    """
    width = rows.shape[1]
    # The exponential form: the power form differs from the reference by 1e-4 at a few thousand rows.
    step = -math.log(ROW_ROPE_THETA) / width
    frequencies = torch.exp(torch.arange(0, width, 2, device=rows.device).float() * step)
    angle = places.float()[:, None] * frequencies
    even, odd = rows[:, 0::2].float(), rows[:, 1::2].float()
    turned = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=2)
    return turned.flatten(1).to(rows.dtype)


def _equal_parts(groups):
    """Runs of groups with equally long timestamps (those of ten hours have a digit more), of bounded size."""
    first = 0
    for number in range(1, len(groups) + 1):
        start, visual_start, end = groups[first]
        limit = max(ROWS_AT_ONCE // (end - start), 1)
        ends = number == len(groups) or number - first == limit
        if ends or groups[number][1] - groups[number][0] != visual_start - start:
            yield groups[first:number]
            first = number


@dataclass(frozen=True)
class TokenSelection(SequencePolicy):
    """Puts a sequence's rows aside until a question comes, and runs those that the selector keeps for it.

    Args:
        inner: How these are run.
    """

    inner: SequencePolicy = field(default_factory=SequencePolicy)

    text_only = True
    switch = "token_selector"

    @classmethod
    def apply(cls, config, facts, policy):
        return cls(policy.prefill, policy.chunk_groups, policy.window_chunks, inner=policy)

    @classmethod
    def add_modules(cls, model):
        config, model.token_selector = model.config, None
        if config.token_selector is not None:
            heads = config.selector_heads if config.token_selector == "timed_query" else None
            model.token_selector = VideoXLTokenSelector(config.text_config.hidden_size, heads)

    def facts(self):
        return self.inner.facts()

    def kept(self, size, config):
        kept = kept_count(size.visual, config.resolve_keep_ratio(), config.max_visual_tokens)
        run = self.inner.kept(size._replace(visual=kept), config)
        # A part of the rows as it is read, in float32, and with timestamps projected, attended and projected again.
        exact = 4 * config.text_config.hidden_size
        read = size.row_bytes * (5 if config.token_selector == "timed_query" else 1) + exact * (size.row_bytes < exact)
        scoring = min(ROWS_AT_ONCE, size.total) * read + 16 * size.visual
        return Kept(
            held=0,
            waiting=size.total * size.row_bytes,
            seen_tokens=run.held // size.token_bytes,
            seen=run.held,
            own=(run.most_held or run.held) + run.passing,
            rows=size.text + kept,
            rows_at_once=run.rows_at_once,
            asking=scoring,
        )

    def extend(self, model, inputs_embeds, layout, cache, keep_hidden=0):
        if cache.held or cache.waiting is None and cache.get_seq_length():
            raise ValueError(
                "a video cannot follow text whose visual tokens were chosen already: give the whole prompt, with all "
                "its videos, at once"
            )
        cache.layout = layout
        cache.wait(inputs_embeds[0])

    def ask(self, model, cache, text, call):
        if cache.waiting is not None:
            self._run_selected(model, cache, text[:, : call.asked])
        return super().ask(model, cache, text, call)

    def _run_selected(self, model, cache, question):
        """Runs the rows that wait in a cache, of the videos' those that the selector keeps for the text."""
        waiting, layout = cache.waiting, cache.layout
        keep_ratio, limit = model.config.resolve_keep_ratio(), model.config.max_visual_tokens
        # Text before, between and behind the videos, whose timestamps are theirs.
        edges = [0, *(edge for video in layout.videos for edge in (video[0].start, video[-1].end)), layout.length]
        pieces = [
            waiting[start:stop].to(question) if stop > start else question[0, :0]
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
        ]
        text = torch.cat([*pieces, question[0]])
        parts, videos, cursor = [pieces[0]], [], len(pieces[0])
        for video, piece in zip(layout.videos, pieces[1:], strict=True):
            start = video[0].start
            groups = [tuple(place - start for place in group) for group in video]
            _, kept = model.token_selector(waiting.until(video[-1].end).since(start), groups, text, keep_ratio, limit)
            videos.append((GroupSpan(cursor, cursor, cursor + len(kept)),))
            parts += [kept, piece]
            cursor += len(kept) + len(piece)
        cache.waiting = None
        for layer in cache.layers:
            layer.reset()
        selected = VisualLayout(tuple(videos), cursor)
        self.inner.extend(model, torch.cat(parts)[None], selected, cache, keep_hidden=None)
        cache.layout = layout
        for layer in cache.layers:
            layer.pass_by(layout.length - cursor)


__all__ = ["TokenSelection", "VideoXLTokenSelector", "kept_count", "rotate_rows"]
