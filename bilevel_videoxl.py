"""Bi-level decoding: for one question, dense key-values of the relevant chunks and pooled ones of the others.

What is surprising:
* Prefill has nothing to do with it. A video's dense key-values do not depend on the question; per question a mixed
  cache is put together from them, and the question runs behind it (Video-XL-2, arXiv 2506.19225; public reference
  `w_chunk_bilevel`). Chunks of decoding are counted from the start of each video, and are not the chunks of prefill.
* Choosing needs the question: it is run once over the cache in which everything is pooled, and what its tokens look
  at there (or how their queries match the chunks' mean keys) ranks the chunks.

C chunks over all videos of a prompt, G groups, N visual tokens per group, n question tokens, K key-value heads, L
tokens, D head size.
"""

import copy
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import NamedTuple

import torch

from .kv_cache import ROTATED_AT_ONCE, VideoXLCache, VideoXLCacheLayer, rotate
from .prefill_videoxl import Decoding, Kept, positions_after, run_text
from .selection_videoxl import DENSE, POOLED, AttentionProbe, ChunkCost, Levels, ReloadPolicy, choose_levels

SCORED_TOKENS = 1024  # last ones of the question that choose chunks: no more than run through the model at once


class Chunk(NamedTuple):
    """A run of groups of one video; `groups` numbers them over all videos of the prompt."""

    video: int
    index: int
    groups: range


class ChunkChoice(NamedTuple):
    """What became of a chunk: its level, and its score where the question chose."""

    video: int
    index: int
    groups: range
    level: str
    score: float | None


class KeptSpan(NamedTuple):
    """A run of tokens in a mixed cache: [start, stop) of the dense one, as it is or (`group`) that group pooled."""

    start: int
    stop: int
    group: int | None = None


def chunks_of(layout, chunk_groups: int) -> list[Chunk]:
    """The chunks of decoding of all videos, in order."""
    chunks, first_group = [], 0
    for number, video in enumerate(layout.videos):
        for index, first in enumerate(range(0, len(video), chunk_groups)):
            last = min(first + chunk_groups, len(video))
            chunks.append(Chunk(number, index, range(first_group + first, first_group + last)))
        first_group += len(video)
    return chunks


def explicit_chunks(dense_chunks, chunks) -> list[int] | None:
    """Numbers over all videos of the chunks that the caller named; None if the choice is automatic.

    Args:
        dense_chunks: None, a list of 0-based chunks of the only video, or one such list per video.
        chunks: From `chunks_of`.
    """
    if dense_chunks is None:
        return None
    if isinstance(dense_chunks, (str, Integral)) or not hasattr(dense_chunks, "__iter__"):
        raise ValueError(f"dense_chunks must be a list of chunk numbers, or one a video, got {dense_chunks!r:.90}")
    videos = chunks[-1].video + 1
    nested = [list(entry) if isinstance(entry, (list, tuple, range)) else entry for entry in dense_chunks]
    listed = all(isinstance(entry, list) for entry in nested) and (nested or videos > 1)
    per_video = nested if listed else [nested]
    if len(per_video) != videos:
        raise ValueError(f"dense_chunks must be a list of {videos} lists, one per video, got {dense_chunks!r:.200}")
    named = []
    for video, wanted in enumerate(per_video):
        numbers = [number for number, chunk in enumerate(chunks) if chunk.video == video]
        for index in wanted:
            if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= index < len(numbers):
                has = f"has chunks 0 to {len(numbers) - 1} of decode_chunk_groups groups"
                raise ValueError(f"dense_chunks names chunk {index!r:.200} of video {video}, which {has}")
            named.append(numbers[int(index)])
    return sorted(set(named))


def kept_spans(layout, chunks, levels: Levels, length: int) -> list[KeptSpan]:
    """What of a dense cache of `length` tokens the levels keep, in order."""
    groups, spans, cursor = layout.groups, [], 0

    def keep(start, stop):
        if spans and spans[-1].group is None and spans[-1].stop == start:
            spans[-1] = KeptSpan(spans[-1].start, stop)
        elif stop > start:
            spans.append(KeptSpan(start, stop))

    for chunk, level, timestamps in zip(chunks, levels.levels, levels.timestamps, strict=True):
        for number in chunk.groups:
            group = groups[number]
            keep(cursor, group.start)
            if timestamps:
                keep(group.start, group.visual_start)
            if level == DENSE:
                keep(group.visual_start, group.end)
            elif level == POOLED:
                spans.append(KeptSpan(group.visual_start, group.end, number))
            cursor = group.end
    keep(cursor, length)
    return spans


class BilevelDecoding(Decoding):
    """A question sees relevant chunks in full, and the others pooled."""

    text_only = True

    def waits(self, cache):
        layout = cache.layout
        return cache.choices is None and layout is not None and bool(layout.videos)

    def kept(self, kept, size, settings):
        # Which chunks are chosen does not change how much that is: only the last one, always dense, may be shorter.
        groups, chunk, per_group = len(size.stamps), settings.decode_chunk_groups, size.visual // len(size.stamps)
        starts = range(0, groups, chunk)
        policy = replace(ReloadPolicy.parse(settings.reload), mass=None)
        scored = len(starts) > 2 and policy.scores

        def levels(policy, counts, stamps):
            dense, pooled = (
                tuple(count * tokens for count in counts) for tokens in (per_group, per_group // settings.pool_size)
            )
            cost = ChunkCost(size.header, tuple(stamps), dense, pooled, size.token_bytes)
            return choose_levels(policy, [1.0] * len(counts) if scored else None, cost, [0] * len(counts))

        stamps = [int(size.stamps[start : start + chunk].sum()) for start in starts]
        mixed = levels(policy, [min(chunk, groups - start) for start in starts], stamps)
        # At most: the last chunk is full, and the budget, if there is one, is spent to the end.
        stamps[-1] = chunk * int(size.stamps.max())
        unlimited = levels(replace(policy, max_tokens=None, max_bytes=None), [chunk] * len(starts), stamps).tokens
        budgets = [unlimited, policy.max_tokens, policy.max_bytes and policy.max_bytes // size.token_bytes]
        most = max(mixed.tokens, min(tokens for tokens in budgets if tokens))
        pooled = groups * (per_group // settings.pool_size) if scored or POOLED in mixed.levels else 0
        # The cache that the scorer runs over, and rotated keys of a layer, in several precisions.
        asking = (size.text + pooled) * size.token_bytes * scored
        asking += 4 * max(pooled, min(most, ROTATED_AT_ONCE)) * size.layer_bytes
        return Kept(
            held=size.total * size.token_bytes,
            seen_tokens=mixed.tokens,
            seen=mixed.tokens * size.token_bytes,
            pooled=pooled * size.token_bytes,
            own=most * size.token_bytes,
            asking=asking,
        )

    def prepare(self, model, cache, question, call):
        if not self.waits(cache):
            return
        if cache.policy.text_only:
            raise ValueError(
                "bi-level decoding needs all key-values of a video; this one was encoded with beacon memory, a token "
                "selector or token dropping: set sparse_attention's decode to 'full', or encode it again"
            )
        video = DenseVideo(model, cache, call.in_force.settings)
        levels, scores = video.choose(question, call.dense_chunks, call.required_chunks)
        mixed = video.mix(levels, video.policy.positions == "true")
        cache.layers[:] = mixed.layers
        cache.choices = [
            ChunkChoice(*chunk, level, None if scores is None else scores[number])
            for number, (chunk, level) in enumerate(zip(video.chunks, levels.levels, strict=True))
        ]


class DenseVideo:
    """A dense cache of one sequence on its way to a mixed one.

    Args:
        model: The `VideoXLModel`.
        cache: Dense, with its `layout`; unchanged.
        settings: The `Settings` in force.
    """

    def __init__(self, model, cache, settings):
        self.model, self.cache, self.pool_size = model, cache, settings.pool_size
        self.chunks = chunks_of(cache.layout, settings.decode_chunk_groups)
        self.policy = ReloadPolicy.parse(settings.reload)
        self.groups = cache.layout.groups
        self.visual = [(group.visual_start, group.end) for group in self.groups]
        self.tokens_per_group = self.groups[0].end - self.groups[0].visual_start
        self.inv_freq = model.language_model.rotary_emb.inv_freq
        if self.pool_size > self.tokens_per_group:
            raise ValueError(
                f"sparse_attention.pool_size={self.pool_size} would leave nothing of a group of "
                f"{self.tokens_per_group} visual tokens; choose at most that many"
            )

    @property
    def cost(self) -> ChunkCost:
        """What keeping the chunks costs."""
        keys, layers = self.cache.layers[0].keys, self.cache.layers
        stamp_of = [group.visual_start - group.start for group in self.groups]
        sizes = [len(chunk.groups) for chunk in self.chunks]
        return ChunkCost(
            text=self.cache.get_seq_length() - sum(group.end - group.start for group in self.groups),
            timestamps=tuple(sum(stamp_of[group] for group in chunk.groups) for chunk in self.chunks),
            dense=tuple(size * self.tokens_per_group for size in sizes),
            pooled=tuple(size * (self.tokens_per_group // self.pool_size) for size in sizes),
            bytes_per_token=2 * keys.shape[1] * keys.shape[3] * keys.element_size() * len(layers),
        )

    def choose(self, question, dense_chunks=None, required_chunks=()) -> tuple[Levels, list[float] | None]:
        """What becomes of every chunk for a question, and the chunks' scores where it chose.

        Args:
            question: [1, n, hidden] embeddings of what follows the videos.
            dense_chunks: See `explicit_chunks`.
            required_chunks: Chunks (numbers over all videos) that an explicit time in the question names.
        """
        explicit, scores = explicit_chunks(dense_chunks, self.chunks), None
        if explicit is None and len(self.chunks) > 2 and self.policy.scores:
            scores = self._scores(question[:, -SCORED_TOKENS:])
        videos = [chunk.video for chunk in self.chunks]
        return choose_levels(self.policy, scores, self.cost, videos, tuple(required_chunks), explicit), scores

    def mix(self, levels: Levels, true_positions=False) -> VideoXLCache:
        """The cache that the levels keep, see `mix_cache`."""
        return mix_cache(self.cache, self._spans(levels), self.visual, self.pool_size, self.inv_freq, true_positions)

    def _spans(self, levels: Levels) -> list[KeptSpan]:
        return kept_spans(self.cache.layout, self.chunks, levels, self.cache.get_seq_length())

    def _scores(self, question) -> list[float]:
        """Scored over the cache in which everything is pooled, at compact positions whatever the answer's are."""
        everything = Levels((POOLED,) * len(self.chunks), (True,) * len(self.chunks), 0)
        pooled_cache = self.mix(everything)
        probe = self._probe(pooled_cache, self._spans(everything), question.shape[1])
        run_text(self.model, question, pooled_cache, keep_hidden=None, probe=probe)
        return probe.scores()

    def _probe(self, pooled_cache, spans, tokens) -> AttentionProbe:
        """The scorer for one run of a question of `tokens` tokens over the pooled cache."""
        count, policy = len(self.cache.layers), self.policy
        first = int(policy.layers[0] * count)
        layers = range(first, max(int(policy.layers[1] * count), first + 1))
        chunk_of_group = {group: number for number, chunk in enumerate(self.chunks) for group in chunk.groups}
        pooled_per_group = self.tokens_per_group // self.pool_size
        key_chunk = []
        for start, stop, group in spans:
            key_chunk += [-1] * (stop - start) if group is None else [chunk_of_group[group]] * pooled_per_group
        positions, means = positions_after(pooled_cache, tokens, device=self.inv_freq.device)[0], {}
        for layer in layers if policy.method == "mean_key" else ():
            pooled = self.cache.layers[layer].pooled_groups(self.visual, self.pool_size, self.inv_freq)[0]
            per_group = pooled[0].float().mean(dim=2)
            parts = [per_group[:, chunk.groups.start : chunk.groups.stop].mean(dim=1) for chunk in self.chunks]
            means[layer] = torch.stack(parts)
        unrotate = partial(rotate, old=positions, new=None, inv_freq=self.inv_freq)
        places = torch.tensor(key_chunk), len(self.chunks), layers
        return AttentionProbe(*places, policy.method, unrotate, means, policy.reduce)


def mix_cache(cache: VideoXLCache, spans, groups, pool_size, inv_freq, true_positions=False) -> VideoXLCache:
    """Builds a cache of dense and pooled key-values from a dense one, which is unchanged and may lie elsewhere.

    Args:
        cache: One row that holds all its tokens at their positions.
        spans: `KeptSpan`s in order; what they leave out is dropped.
        groups: (start, stop) of every group's visual tokens.
        pool_size: Kernel and stride of the pooling.
        inv_freq: [D / 2] rotary frequencies of the language model, on the device where the new cache is to be.
        true_positions: Keep positions (a pooled key stands in the middle of its tokens) instead of counting the kept
            keys from 0, which is what the reference does.
    """
    length, device = cache.get_seq_length(), inv_freq.device
    size = (groups[0][1] - groups[0][0]) // pool_size if groups else 0
    dense = torch.tensor([span.group is None for span in spans], dtype=torch.bool)
    starts = torch.tensor([span.start for span in spans], dtype=torch.long)
    kept = torch.tensor([span.stop - span.start if span.group is None else size for span in spans], dtype=torch.long)
    targets, cursor = kept.cumsum(0) - kept, int(kept.sum())
    dense_from, dense_to = _runs(starts[dense], kept[dense]), _runs(targets[dense], kept[dense])
    stay = true_positions or torch.equal(dense_from, dense_to)
    pooled_from = torch.tensor([span.group for span in spans if span.group is not None], dtype=torch.long).to(device)
    dense_to, pooled_to = dense_to.to(device), _runs(targets[~dense], kept[~dense]).to(device)
    positions = pooled_to
    if true_positions:
        middles = torch.arange(size, device=device) * pool_size + (pool_size - 1) / 2
        positions = (starts[~dense].to(device)[:, None] + middles).flatten()
    mixed = copy.copy(cache)
    mixed.layers = []
    for layer in cache.layers:
        shape = (*layer.keys.shape[:2], cursor, layer.keys.shape[3])
        keys, values = (layer.keys.new_empty(shape, device=device) for _ in range(2))
        for begin in range(0, len(dense_from), ROTATED_AT_ONCE):
            part = slice(begin, begin + ROTATED_AT_ONCE)
            source, target = dense_from[part].to(layer.keys.device), dense_to[part]
            moved = layer.keys.index_select(2, source).to(device)
            keys.index_copy_(2, target, moved if stay else rotate(moved, source, target, inv_freq).to(keys.dtype))
            values.index_copy_(2, target, layer.values.index_select(2, source).to(device))
        if len(pooled_from):
            pooled = layer.pooled_groups(groups, pool_size, inv_freq)
            picked, picked_values = (part.index_select(2, pooled_from).flatten(2, 3) for part in pooled)
            keys.index_copy_(2, pooled_to, rotate(picked, None, positions, inv_freq).to(keys.dtype))
            values.index_copy_(2, pooled_to, picked_values)
        new_layer = VideoXLCacheLayer()
        new_layer.set_content(keys, values)
        new_layer.hidden = length - cursor
        new_layer.row_shift = None if true_positions else torch.tensor([length - cursor], device=device)
        mixed.layers.append(new_layer)
    return mixed


def _runs(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The numbers of adjacent runs: start, start + 1, ... of each."""
    offsets = starts - (lengths.cumsum(0) - lengths)
    return offsets.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


__all__ = ["BilevelDecoding", "Chunk", "ChunkChoice", "chunks_of", "explicit_chunks"]
