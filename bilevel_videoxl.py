"""Bi-level decoding: for one question, dense key-values of the relevant chunks and pooled ones of the others.

What is surprising:
* Prefill has nothing to do with it. A video's dense key-values do not depend on the question; per question a mixed
  cache is put together from them, and the question runs behind it (Video-XL-2, arXiv 2506.19225; public reference
  `w_chunk_bilevel`). Chunks of decoding are counted from the start of each video, and are not the chunks of prefill.
* Choosing needs the question: it is run once over the cache in which everything is pooled, and what the queries of its
  last token, behind which the answer begins, would attend to among the dense keys ranks the chunks. Attention mass is
  taken per key, so that no chunk is relevant for being long.
* The first and last chunk of every video are dense whatever the question says. They do not count as chosen; `count`,
  `share` and `mass` limit the chunks in between.
* A budget is spent along one fixed list of upgrades, each by rank: timestamps (with `timestamps="kept"` only those of
  chunks that are kept), chosen chunks pooled, chosen chunks dense, others pooled. Spending stops at the first upgrade
  that does not fit, which leaves less than a chunk unused: if cheaper ones filled the rest, a larger budget could
  lower a chunk's level.

C chunks over all videos of a prompt, G groups, N visual tokens per group, n question tokens, H query heads, K
key-value heads (H a multiple of K), L keys, D head size.
"""

import copy
import math
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import NamedTuple

import torch

from .kv_cache import ROTATED_AT_ONCE, VideoXLCache, VideoXLCacheLayer, rotate
from .prefill_videoxl import Decoding, Kept, positions_after, run_text
from .sparse_attention import attention_mass

DENSE, POOLED, DROPPED = "dense", "pooled", "dropped"
LIMITS = ("count", "share", "mass")
# Share of the chunks that "auto" keeps dense: with pooling by 4, 0.2 + 0.8 / 4 = 40 % of the visual KV stays.
AUTO_SHARE = 0.2


def _is_number(value, kind, least, most=math.inf) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


@dataclass(frozen=True)
class ReloadPolicy:
    """How relevant chunks are chosen from the question: the parsed `sparse_attention.reload`.

    The limits `count`, `share` and `mass` hold together (the smallest counts); without any, every chunk is chosen. Of
    `max_tokens` and `max_bytes`, which bound the whole kept KV, the smaller holds. A value outside its range is a
    ValueError.
    """

    method: str = "probe"  # or "none" (only the first and last chunk of a video), "all"
    count: int | None = None  # at most so many chosen chunks
    share: float | None = None  # at most this share of all chunks, rounded up
    mass: float | None = None  # the fewest chunks that, with the first and last ones, hold this share of the score sum
    max_tokens: int | None = None
    max_bytes: int | None = None
    timestamps: str = "all"  # whose stay within the budget: all chunks' first, or ("kept") those of what is kept
    positions: str = "compact"  # of the kept keys: 0, 1, 2, ... or "true"
    layers: tuple[float, float] = (1 / 3, 2 / 3)  # which of the layers choose, as shares of their number

    def __post_init__(self):
        words = {"positions": ("compact", "true"), "timestamps": ("all", "kept")}
        methods, whole = ("probe", "none", "all"), "None or an integer of at least {}"
        layers = isinstance(self.layers, tuple) and all(_is_number(end, Real, 0, 1) for end in self.layers)
        for name, valid, expected in (
            ("method", self.method in methods, f"one of {('auto', *methods)}"),
            ("count", self._fits("count", Integral, 0), whole.format(0)),
            *((name, self._fits(name, Real, 0, 1), "None or a number from 0 to 1") for name in ("share", "mass")),
            *((name, self._fits(name, Integral, 1), whole.format(1)) for name in ("max_tokens", "max_bytes")),
            *((name, getattr(self, name) in known, f"one of {known}") for name, known in words.items()),
            ("layers", layers and len(self.layers) == 2 and self.layers[0] < self.layers[1], "two ascending shares"),
            *((name, self.scores or getattr(self, name) is None, f"None with {self.method!r}") for name in LIMITS),
        ):
            if not valid:
                raise ValueError(
                    f"sparse_attention.reload: {name} must be {expected}, got {getattr(self, name)!r:.90}"
                )

    @property
    def scores(self) -> bool:
        """Whether the method chooses by score."""
        return self.method == "probe"

    def _fits(self, name, *bounds):
        return getattr(self, name) is None or _is_number(getattr(self, name), *bounds)

    @classmethod
    def parse(cls, reload) -> "ReloadPolicy":
        """Reads `sparse_attention.reload`: `"auto"`, a method's name, or a dict of this class's fields.

        A method that scores gets `share=AUTO_SHARE` if none of `count`, `share` and `mass` is given.
        """
        if not isinstance(reload, str | dict):
            raise ValueError(f"sparse_attention.reload must be a method's name or a dict, got {reload!r:.90}")
        settings = {"method": reload} if isinstance(reload, str) else dict(reload)
        known = cls.__dataclass_fields__
        settings.pop("reduce", None)  # configs of earlier releases have it; its rules are gone
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"sparse_attention.reload has no field {unknown[0]!r:.200}; it has {', '.join(known)}")
        if settings.get("method", "auto") == "auto":
            settings["method"] = "probe"
        if isinstance(settings.get("layers"), list):  # as it comes back from config.json
            settings["layers"] = tuple(settings["layers"])
        if settings["method"] == "probe" and all(settings.get(name) is None for name in LIMITS):
            settings["share"] = AUTO_SHARE
        return cls(**settings)


@dataclass(frozen=True)
class ChunkCost:
    """What keeping costs, in tokens: `text` is all that is always kept; per chunk, its timestamp and visual tokens."""

    text: int
    timestamps: tuple[int, ...]
    dense: tuple[int, ...]
    pooled: tuple[int, ...]
    bytes_per_token: int  # over all layers


@dataclass(frozen=True)
class Levels:
    """What is kept: per chunk its level and whether its timestamps stay, and the kept KV tokens in all."""

    levels: tuple[str, ...]
    timestamps: tuple[bool, ...]
    tokens: int


def rank(scores) -> list[int]:
    """Chunk numbers by descending score, the earlier chunk first on ties; ValueError on NaN."""
    if bad := [index for index, score in enumerate(scores) if math.isnan(score)]:
        raise ValueError(f"the score of chunk {bad[0]} is NaN; every chunk needs a number")
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def choose_levels(policy, scores, cost, video_of_chunk, required=(), explicit=None) -> Levels:
    """Decides the level of every chunk.

    The text and the first and last chunk of every video, dense and with timestamps, are kept in any case; a budget
    that is too small for that is a ValueError. A chunk that keeps visual KV keeps its timestamps.

    Args:
        policy: A `ReloadPolicy`.
        scores: Relevance per chunk over all videos of the prompt, or None where nothing was scored.
        cost: A `ChunkCost`.
        video_of_chunk: Per chunk, the number of its video; the chunks of a video are adjacent.
        required: Chunks that the question names by time: chosen before all others and counted within the limits, but
            never cut by them.
        explicit: Chunks that the user names (None: automatic): exactly these are chosen. The limits are ignored, the
            budget is not; they rank by score, without scores in the order given.
    """
    total = len(video_of_chunk)
    assert total == len(cost.timestamps) == len(cost.dense) == len(cost.pooled), "one cost a chunk is needed"
    for chunk in (*required, *(explicit or ())):
        if not _is_number(chunk, Integral, 0, total - 1):
            raise ValueError(f"there is no chunk {chunk!r:.200}: the videos have {total} chunks, counted from 0")
    if scores is not None and len(scores) != total:
        raise ValueError(f"expected {total} scores, one for each chunk, got {len(scores)}")
    around = (None, *video_of_chunk, None)
    ends = {i for i in range(total) if around[i] != around[i + 1] or around[i + 1] != around[i + 2]}
    chosen, others = _choose(policy, scores, ends, total, required, explicit)
    levels, timestamps = ([DENSE if i in ends else DROPPED for i in range(total)], [i in ends for i in range(total)])
    tokens = cost.text + sum(cost.timestamps[chunk] + cost.dense[chunk] for chunk in ends)
    # Not rounded down to whole tokens: sums of whole tokens are compared with it.
    budget = min(policy.max_tokens or math.inf, (policy.max_bytes or math.inf) / cost.bytes_per_token)
    if tokens > budget:
        raise ValueError(
            f"sparse_attention.reload: max_tokens={policy.max_tokens}, max_bytes={policy.max_bytes} is too small: the "
            f"text and the first and last chunk of every video need {tokens} tokens, {tokens * cost.bytes_per_token} "
            "bytes. Allow at least that, or give fewer frames."
        )
    with_stamps = policy.timestamps == "kept"
    pooled = [size + stamp * with_stamps for size, stamp in zip(cost.pooled, cost.timestamps, strict=True)]
    upgrades = (
        *((chunk, None, cost.timestamps[chunk]) for chunk in (chosen + others) * (not with_stamps)),
        *((chunk, POOLED, pooled[chunk]) for chunk in chosen),
        *((chunk, DENSE, cost.dense[chunk] - cost.pooled[chunk]) for chunk in chosen),
        *((chunk, POOLED, pooled[chunk]) for chunk in others),
    )
    for chunk, level, added in upgrades:
        if tokens + added > budget:
            break
        tokens += added
        timestamps[chunk] = True
        levels[chunk] = level or levels[chunk]
    return Levels(tuple(levels), tuple(timestamps), tokens)


def _choose(policy, scores, ends, total, required, explicit) -> tuple[list[int], list[int]]:
    """The chosen chunks and the others, both without the ends and by rank."""
    order = [chunk for chunk in (range(total) if scores is None else rank(scores)) if chunk not in ends]
    order.sort(key=lambda chunk: chunk not in required)
    if explicit is not None:
        wanted = dict.fromkeys(explicit) if scores is None else [chunk for chunk in order if chunk in explicit]
        return [chunk for chunk in wanted if chunk not in ends], [chunk for chunk in order if chunk not in wanted]
    limit, named = len(order), sum(chunk in required for chunk in order)
    if policy.method == "none":
        limit = 0
    elif policy.scores and named < len(order):
        if scores is None:
            raise ValueError(f"method {policy.method!r:.200} chooses by score, but there are no scores")
        if policy.count is not None:
            limit = policy.count
        if policy.share is not None:
            # 0.07 * 100 is a little above 7 in floating point; rounding up must not see that.
            limit = min(limit, math.ceil(policy.share * total - 1e-9))
        if policy.mass is not None:
            limit = min(limit, _count_for_mass(policy.mass, scores, order))
    limit = max(limit, named)
    return order[:limit], order[limit:]


def _count_for_mass(mass, scores, order) -> int:
    """How many of the first chunks of `order` hold, with all chunks outside it, this share of the scores' sum."""
    if not all(math.isfinite(score) and score >= 0 for score in scores):
        raise ValueError("sparse_attention.reload: mass needs finite scores of at least 0; use count or share instead")
    scores = scores if any(scores) else [1.0] * len(scores)
    surplus = (1 - mass + 1e-9) * math.fsum(scores)
    count = len(order)
    while count and scores[order[count - 1]] <= surplus:
        count -= 1
        surplus -= scores[order[count]]
    return count


class LastQueries:
    """Collects, while the language model runs a question, the queries of its last token in some layers.

    Args:
        layers: Numbers of the layers.
    """

    def __init__(self, layers):
        self._layers, self.queries = layers, {}

    def record(self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, scaling: float | None = None) -> None:
        """Takes in one layer's `query` [1, H, n, D], rotated; of a question in pieces the last one stays."""
        if layer_idx in self._layers:
            assert query.shape[0] == 1, "the question of one sequence chooses its chunks"
            self.queries[layer_idx] = query[:, :, -1:].detach(), scaling


SCORED_TOKENS = 1024  # last ones of the question that choose chunks: no more than run through the model at once


class Chunk(NamedTuple):
    """A run of groups of one video; `groups` numbers them over all videos of the prompt."""

    video: int
    index: int
    groups: range
    level: str | None = None  # what became of it for a question
    score: float | None = None  # where the question chose


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
        return cache.choices is None and cache.layout is not None and bool(cache.layout.videos)

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
            chunk._replace(level=level, score=None if scores is None else scores[number])
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
            scores = self.scores(question[:, -SCORED_TOKENS:])
        videos = [chunk.video for chunk in self.chunks]
        return choose_levels(self.policy, scores, self.cost, videos, tuple(required_chunks), explicit), scores

    def mix(self, levels: Levels, true_positions=False) -> VideoXLCache:
        """The cache that the levels keep, see `mix_cache`."""
        return mix_cache(self.cache, self._spans(levels), self.visual, self.pool_size, self.inv_freq, true_positions)

    def _spans(self, levels: Levels) -> list[KeptSpan]:
        return kept_spans(self.cache.layout, self.chunks, levels, self.cache.get_seq_length())

    @torch.no_grad()
    def scores(self, question) -> list[float]:
        """Mean attention of the question's last token to the dense visual keys of each chunk, scaled to sum 1.

        What the token asks for is found behind the pooled video, at compact positions whatever the answer's are. Where
        that is, pooled keys tell too coarsely: its queries are matched with every dense key, at its place behind them.
        """
        pooled = self.mix(Levels((POOLED,) * len(self.chunks), (True,) * len(self.chunks), 0))
        first, last = (int(share * len(self.cache.layers)) for share in self.policy.layers)
        probe = LastQueries(range(first, max(last, first + 1)))
        here, behind = (positions_after(cache, question.shape[1])[0, -1:] for cache in (pooled, self.cache))
        run_text(self.model, question, pooled, keep_hidden=None, probe=probe)
        mass = 0.0
        for layer, (query, scaling) in probe.queries.items():
            query = rotate(query, here.to(query.device), behind.to(query.device), self.inv_freq)
            # On the CPU and in float64: a GPU's unordered additions could change a rank.
            mass = mass + attention_mass(query, self.cache.layers[layer].all_keys(), scaling).cpu().double()
        starts = torch.tensor([start for start, _ in self.visual])
        of_group = mass[starts[:, None] + torch.arange(self.tokens_per_group)].mean(dim=1)
        means = torch.stack([part.mean() for part in of_group.split([len(chunk.groups) for chunk in self.chunks])])
        return (means / (means.sum() or 1)).tolist()


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
            source, target = dense_from[part], dense_to[part]
            moved, moved_values = layer.read(source, source if stay else target, inv_freq)
            keys.index_copy_(2, target, moved.to(keys.dtype))
            values.index_copy_(2, target, moved_values)
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


__all__ = ["BilevelDecoding", "Chunk", "chunks_of", "explicit_chunks"]
