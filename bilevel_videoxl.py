"""Bi-level decoding: for one question, dense key-values of the relevant chunks and pooled ones of the others.

What is surprising:
* Prefill has nothing to do with it. A video's dense key-values do not depend on the question; per question a mixed
  cache is put together from them, and the question runs behind it (Video-XL-2, arXiv 2506.19225; public reference
  `w_chunk_bilevel`).
* Chunks of decoding are counted from the start of each video and have nothing to do with the chunks of prefill. The
  first and the last one of every video are always dense.
* Choosing needs the question: it is run once over the cache in which everything is pooled, and what its tokens look
  at there (or how their queries match the chunks' mean keys) ranks the chunks.

C chunks over all videos of a prompt, G groups, N visual tokens per group, n question tokens.
"""

from numbers import Integral
from typing import NamedTuple

import torch

from .cache_layers_videoxl import rotate
from .kv_cache import KeptSpan, mix_cache
from .selection_videoxl import (
    DENSE,
    DROPPED,
    POOLED,
    AttentionProbe,
    ChunkCost,
    Levels,
    ReloadPolicy,
    choose_levels,
)

# Last tokens of the question that choose chunks; no more than run through the language model at once.
SCORED_TOKENS = 1024


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

    Raises:
        ValueError: On a chunk outside its video, or lists that do not fit the number of videos.
    """
    if dense_chunks is None:
        return None
    if isinstance(dense_chunks, (str, Integral)) or not hasattr(dense_chunks, "__iter__"):
        raise ValueError(f"dense_chunks must be a list of chunk numbers, or one list per video, got {dense_chunks!r}")
    videos = chunks[-1].video + 1
    nested = [list(entry) if isinstance(entry, (list, tuple, range)) else entry for entry in dense_chunks]
    listed = all(isinstance(entry, list) for entry in nested) and (nested or videos > 1)
    per_video = nested if listed else [nested]
    if len(per_video) != videos:
        raise ValueError(f"dense_chunks must be a list of {videos} lists, one per video, got {dense_chunks!r}")
    named = []
    for video, wanted in enumerate(per_video):
        numbers = [number for number, chunk in enumerate(chunks) if chunk.video == video]
        for index in wanted:
            if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= index < len(numbers):
                raise ValueError(
                    f"dense_chunks names chunk {index!r} of video {video}, which has chunks 0 to "
                    f"{len(numbers) - 1} of decode_chunk_groups groups"
                )
            named.append(numbers[int(index)])
    return sorted(set(named))


def pending_choice(cache, settings) -> bool:
    """Whether something waits for the next question: rows to select from, or a dense cache with videos to be mixed."""
    if getattr(cache, "deferred", None) is not None:
        return True
    layout = getattr(cache, "layout", None)
    return settings.decode == "bilevel" and bool(layout and layout.videos) and getattr(cache, "choices", None) is None


def split_per_row(dense_chunks, videos_per_row) -> list:
    """Gives each prompt of a batch its part of `dense_chunks`, which lists the videos of all prompts in order."""
    if dense_chunks is None or len(videos_per_row) == 1:
        return [dense_chunks] * len(videos_per_row)
    if len(dense_chunks) != sum(videos_per_row):
        raise ValueError(
            f"dense_chunks must have one list for each of {sum(videos_per_row)} videos, got {dense_chunks!r}"
        )
    entries = iter(dense_chunks)
    return [[next(entries) for _ in range(count)] for count in videos_per_row]


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


def choose_for_question(model, cache, question, settings, dense_chunks=None, required_chunks=()):
    """Puts together the mixed cache for a question.

    Args:
        model: The `VideoXLModel`.
        cache: Dense cache of one sequence, with its `layout`; unchanged.
        question: [1, n, hidden] embeddings of what follows the videos.
        settings: Resolved sparse-attention settings.
        dense_chunks: See `explicit_chunks`.
        required_chunks: Chunks (numbers over all videos) that an explicit time in the question names.

    Returns:
        `(mixed cache, choices)`, one `ChunkChoice` per chunk.

    Raises:
        ValueError: On chunks outside the video, a reload policy that is malformed, or a budget that is too small.
    """
    layout, length = cache.layout, cache.get_seq_length()
    chunks = chunks_of(layout, settings.decode_chunk_groups)
    explicit = explicit_chunks(dense_chunks, chunks)
    policy = ReloadPolicy.parse(settings.reload)
    groups = layout.groups
    visual = [(group.visual_start, group.end) for group in groups]
    tokens_per_group = groups[0].end - groups[0].visual_start
    if settings.pool_size > tokens_per_group:
        raise ValueError(
            f"sparse_attention.pool_size={settings.pool_size} would leave nothing of a group of {tokens_per_group} "
            "visual tokens; choose at most that many"
        )
    stamps = [sum(groups[g].visual_start - groups[g].start for g in chunk.groups) for chunk in chunks]
    sizes = [len(chunk.groups) for chunk in chunks]
    keys = cache.layers[0].keys
    cost = ChunkCost(
        text=length - sum(group.end - group.start for group in groups),
        timestamps=tuple(stamps),
        dense=tuple(size * tokens_per_group for size in sizes),
        pooled=tuple(size * (tokens_per_group // settings.pool_size) for size in sizes),
        bytes_per_token=2 * keys.shape[1] * keys.shape[3] * keys.element_size() * len(cache.layers),
    )
    inv_freq = model.language_model.rotary_emb.inv_freq

    def mixed(levels, true_positions=False):
        spans = kept_spans(layout, chunks, levels, length)
        return mix_cache(cache, spans, visual, settings.pool_size, inv_freq, true_positions), spans

    scores = None
    if explicit is None and len(chunks) > 2 and policy.method in ("probe", "mean_key"):
        # Scored over the cache in which everything is pooled, at compact positions whatever the answer's are.
        everything = Levels((POOLED,) * len(chunks), (True,) * len(chunks), 0)
        pooled_cache, spans = mixed(everything)
        question = question[:, -SCORED_TOKENS:]
        probe = _probe(
            model, cache, pooled_cache, spans, chunks, visual, settings.pool_size, policy, question.shape[1]
        )
        model.run_text(question, pooled_cache, keep_hidden=None, attention_probe=probe)
        scores = probe.scores()
    video_of_chunk = [chunk.video for chunk in chunks]
    levels = choose_levels(policy, scores, cost, video_of_chunk, tuple(required_chunks), explicit)
    choices = [
        ChunkChoice(*chunk, level, None if scores is None else scores[number])
        for number, (chunk, level) in enumerate(zip(chunks, levels.levels, strict=True))
    ]
    return mixed(levels, policy.positions == "true")[0], choices


def _probe(model, cache, pooled_cache, spans, chunks, visual, pool_size, policy, tokens) -> AttentionProbe:
    """The scorer for one run of a question of `tokens` tokens over the pooled cache."""
    count = len(cache.layers)
    first = int(policy.layers[0] * count)
    layers = range(first, max(int(policy.layers[1] * count), first + 1))
    chunk_of_group = {group: number for number, chunk in enumerate(chunks) for group in chunk.groups}
    pooled_per_group = (visual[0][1] - visual[0][0]) // pool_size
    key_chunk = []
    for span in spans:
        if span.group is None:
            key_chunk += [-1] * (span.stop - span.start)
        else:
            key_chunk += [chunk_of_group[span.group]] * pooled_per_group
    inv_freq = model.language_model.rotary_emb.inv_freq
    positions, means = model.positions_after(pooled_cache, tokens)[0], {}
    if policy.method == "mean_key":
        for layer in layers:
            per_group = cache.layers[layer].pooled_groups(visual, pool_size, inv_freq)[0][0].float().mean(dim=2)
            parts = [per_group[:, chunk.groups.start : chunk.groups.stop].mean(dim=1) for chunk in chunks]
            means[layer] = torch.stack(parts)
    return AttentionProbe(
        torch.tensor(key_chunk),
        len(chunks),
        layers,
        policy.method,
        unrotate=lambda query: rotate(query, positions, None, inv_freq),
        mean_keys=means,
        reduce=policy.reduce,
    )


__all__ = ["DENSE", "DROPPED", "POOLED", "Chunk", "ChunkChoice", "choose_for_question", "chunks_of", "explicit_chunks"]
