"""Which chunks of a video stay dense, are pooled, or are dropped: the policy of bi-level decoding, and its scorers.

What is surprising:
* The first and last chunk of every video are dense whatever the question says. They are not counted as chosen; `count`,
  `share` and `mass` limit the chunks in between.
* A budget is spent along one fixed list of upgrades (timestamps, chosen chunks pooled, chosen chunks dense, other chunks
  pooled; each by rank) and spending stops at the first one that does not fit. Filling the rest with later, cheaper upgrades
  would let a larger budget lower a chunk's level. The price is less than one chunk of unused budget.
* Attention mass is taken per key, so that a chunk is not relevant because it is long (the last one may be short).
* A time in a question is a guess about words. Too eager costs one dense chunk, so doubtful phrases count as times, but
  durations ("for 10 s"), times of day, ratios and decades do not.

H query heads, K key-value heads (H is a multiple of K), n question tokens, L keys, D head size, C chunks of all videos.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

DENSE, POOLED, DROPPED = "dense", "pooled", "dropped"
RELOAD_METHODS = ("probe", "mean_key", "none", "all")
RELOAD_POSITIONS = ("compact", "true")
# Share of the chunks that "auto" keeps dense: with pooling by 4, 0.2 + 0.8 / 4 = 40 % of the visual KV stays. Video-XL-2's
# published selections keep between half and two thirds of it, with top-k tuned by hand per benchmark category.
AUTO_SHARE = 0.2
# Bounds of the probe's float32 buffers, in elements: 32 MB of attention weights and 16 MB of converted keys.
MAX_WEIGHTS = 8 * 2**20
MAX_KEY_ELEMENTS = 4 * 2**20


@dataclass(frozen=True)
class ReloadPolicy:
    """How relevant chunks are chosen from the question: the parsed `sparse_attention.reload`.

    The limits `count`, `share` and `mass` hold together (the smallest counts); with none of them every chunk is chosen.

    Args:
        method: `"probe"` (attention mass of the question over the pooled KV), `"mean_key"` (mean query . mean key),
            `"none"` (only the first and last chunk of a video) or `"all"`.
        count: At most so many chosen chunks.
        share: At most this share of all chunks, rounded up.
        mass: The fewest chunks that, with the first and last ones, hold this share of the scores' sum.
        max_tokens: Budget of the whole kept KV, in tokens; the least relevant chunks are dropped to keep it.
        max_bytes: The same in bytes. With both, the smaller one holds.
        positions: Positions of the kept keys: `"compact"` (0, 1, 2, ...) or `"true"`.
        layers: Which part of the language model's layers the scorer reads, as shares of their number.

    Raises:
        ValueError: On a value outside its range.
    """

    method: str = "probe"
    count: int | None = None
    share: float | None = None
    mass: float | None = None
    max_tokens: int | None = None
    max_bytes: int | None = None
    positions: str = "compact"
    layers: tuple[float, float] = (1 / 3, 2 / 3)

    def __post_init__(self):
        _require(self.method in RELOAD_METHODS, "method", f"one of {RELOAD_METHODS} or 'auto'", self.method)
        _require(self.positions in RELOAD_POSITIONS, "positions", f"one of {RELOAD_POSITIONS}", self.positions)
        for name, least in (("count", 0), ("max_tokens", 1), ("max_bytes", 1)):
            value = getattr(self, name)
            valid = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
            _require(valid, name, f"None or an integer of at least {least}", value)
        for name in ("share", "mass"):
            value = getattr(self, name)
            _require(value is None or _is_share(value), name, "None or a number from 0 to 1", value)
        layers = self.layers
        valid = (
            isinstance(layers, tuple) and len(layers) == 2 and all(map(_is_share, layers)) and layers[0] < layers[1]
        )
        _require(valid, "layers", "two ascending numbers from 0 to 1", layers)
        for name in ("count", "share", "mass") if self.method in ("none", "all") else ():
            _require(getattr(self, name) is None, name, f"absent with method {self.method!r}", getattr(self, name))

    @classmethod
    def parse(cls, reload) -> "ReloadPolicy":
        """Reads `sparse_attention.reload`.

        Args:
            reload: `"auto"`, the name of a method, or a dict of this class's fields whose method may be `"auto"` too. A
                method that scores chunks gets `share=AUTO_SHARE` if none of `count`, `share` and `mass` is given.

        Raises:
            ValueError: On an unknown field or a value outside its range, with what is possible.
        """
        settings = {"method": reload} if isinstance(reload, str) else reload
        if not isinstance(settings, dict):
            raise ValueError(f"sparse_attention.reload must be a method name or a dict of settings, got {reload!r}")
        names = [field.name for field in fields(cls)]
        if unknown := [name for name in settings if name not in names]:
            raise ValueError(f"sparse_attention.reload has no field {unknown[0]!r}; it has {', '.join(names)}")
        settings = dict(settings)
        if settings.get("method", "auto") == "auto":
            settings["method"] = "probe"
        if isinstance(settings.get("layers"), list):
            settings["layers"] = tuple(settings["layers"])
        unlimited = all(settings.get(name) is None for name in ("count", "share", "mass"))
        if unlimited and settings["method"] in ("probe", "mean_key"):
            settings["share"] = AUTO_SHARE
        return cls(**settings)

    def layer_range(self, num_layers: int) -> range:
        """The layers that the scorer reads, at least one: 9..18 of Video-XL-2's 28 by default."""
        first = min(round(self.layers[0] * num_layers), num_layers - 1)
        return range(first, max(round(self.layers[1] * num_layers), first + 1))


def _require(valid: bool, name: str, expected: str, value) -> None:
    if not valid:
        raise ValueError(f"sparse_attention.reload: {name} must be {expected}, got {value!r}")


def _is_share(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


@dataclass(frozen=True)
class ChunkCost:
    """What keeping costs, in tokens.

    Args:
        text: Everything that is always kept.
        timestamps: Per chunk, its timestamp tokens.
        dense, pooled: Per chunk, its visual tokens at either level.
        bytes_per_token: KV bytes of one token over all layers.
    """

    text: int
    timestamps: tuple[int, ...]
    dense: tuple[int, ...]
    pooled: tuple[int, ...]
    bytes_per_token: int


@dataclass(frozen=True)
class Levels:
    """What is kept: per chunk its level and whether its timestamps stay, and the kept KV tokens in all."""

    levels: tuple[str, ...]
    timestamps: tuple[bool, ...]
    tokens: int


def rank(scores) -> list[int]:
    """Chunk numbers by descending score, the earlier chunk first on ties; ValueError on NaN."""
    if bad := [index for index, score in enumerate(scores) if math.isnan(score)]:
        raise ValueError(f"the score of chunk {bad[0]} is not a number; scores must be comparable")
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def choose_levels(policy, scores, cost, video_of_chunk, required=(), explicit=None) -> Levels:
    """Decides the level of every chunk.

    Kept in any case: the text, and the first and last chunk of every video, dense and with their timestamps. A chunk whose
    visual KV stays always keeps its timestamps.

    Args:
        policy: A `ReloadPolicy`.
        scores: Relevance per chunk over all videos of the prompt, or None where nothing was scored.
        cost: A `ChunkCost`.
        video_of_chunk: Per chunk, the number of its video; the chunks of a video are adjacent.
        required: Chunks that the question names by time: chosen before all others and counted within the limits, but
            never cut by them.
        explicit: Chunks that the user names (None: automatic). Exactly these are chosen, the policy's limits are ignored
            and the budget is not. By score if there are scores, else in the order given.

    Raises:
        ValueError: If even what is always kept exceeds the budget, a chunk number is out of range, or the scores are
            missing or do not fit.
    """
    total = len(video_of_chunk)
    assert total == len(cost.timestamps) == len(cost.dense) == len(cost.pooled), "one cost a chunk is needed"
    for chunk in (*required, *(explicit or ())):
        if isinstance(chunk, bool) or not 0 <= chunk < total:
            raise ValueError(f"there is no chunk {chunk!r}: the videos have {total} chunks, counted from 0")
    if scores is not None and len(scores) != total:
        raise ValueError(f"expected one score for each of the {total} chunks, got {len(scores)} scores")
    borders = [
        True,
        *(before != after for before, after in zip(video_of_chunk, video_of_chunk[1:], strict=False)),
        True,
    ]
    ends = {chunk for chunk in range(total) if borders[chunk] or borders[chunk + 1]}

    chosen, others = _choose(policy, scores, ends, total, required, explicit)
    levels = [DENSE if chunk in ends else DROPPED for chunk in range(total)]
    timestamps = [chunk in ends for chunk in range(total)]
    tokens = cost.text + sum(cost.timestamps[chunk] + cost.dense[chunk] for chunk in ends)
    budget = _budget(policy, cost, tokens)
    upgrades = (
        *((chunk, None, cost.timestamps[chunk]) for chunk in chosen + others),
        *((chunk, POOLED, cost.pooled[chunk]) for chunk in chosen),
        *((chunk, DENSE, cost.dense[chunk] - cost.pooled[chunk]) for chunk in chosen),
        *((chunk, POOLED, cost.pooled[chunk]) for chunk in others),
    )
    for chunk, level, added in upgrades:
        if tokens + added > budget:
            break
        tokens += added
        if level is None:
            timestamps[chunk] = True
        else:
            levels[chunk] = level
    return Levels(tuple(levels), tuple(timestamps), tokens)


def _choose(policy, scores, ends, total, required, explicit) -> tuple[list[int], list[int]]:
    """The chosen chunks and the others, without the ends, each by rank."""
    order = [chunk for chunk in (range(total) if scores is None else rank(scores)) if chunk not in ends]
    first = [chunk for chunk in order if chunk in set(required)]
    order = first + [chunk for chunk in order if chunk not in set(first)]
    if explicit is not None:
        given = dict.fromkeys(explicit) if scores is None else order
        chosen = [chunk for chunk in given if chunk in set(explicit) and chunk not in ends]
        return chosen, [chunk for chunk in order if chunk not in set(chosen)]
    if policy.method in ("none", "all"):
        limit = 0 if policy.method == "none" else total
    elif scores is None and len(first) < len(order):
        raise ValueError(f"method {policy.method!r} chooses by score, but there are no scores")
    else:
        limit = len(order)
        if policy.count is not None:
            limit = min(limit, policy.count)
        if policy.share is not None:
            # 0.2 * 15 is above 3 in floating point; rounding up must not see that.
            limit = min(limit, math.ceil(policy.share * total - 1e-9))
        if policy.mass is not None and order:
            limit = min(limit, _chunks_for_mass(policy.mass, scores, ends, order))
    limit = max(limit, len(first))
    return order[:limit], order[limit:]


def _chunks_for_mass(mass, scores, ends, order) -> int:
    """How many chunks of `order` hold, together with the ends, the given share of the scores' sum."""
    if scores is None:
        return len(order)
    if not all(math.isfinite(score) and score >= 0 for score in scores):
        raise ValueError(
            "sparse_attention.reload: mass needs finite scores of at least 0; limit by count or share instead"
        )
    if not any(scores):
        scores = [1.0] * len(scores)
    missing = mass * math.fsum(scores) - math.fsum(scores[chunk] for chunk in ends)
    tolerance = 1e-9 * math.fsum(scores)
    for number, chunk in enumerate(order):
        if missing <= tolerance:
            return number
        missing -= scores[chunk]
    return len(order)


def _budget(policy, cost, least) -> float:
    """The budget in tokens; ValueError if it is below `least`."""
    budget = math.inf
    for name, value, unit in (
        ("max_tokens", policy.max_tokens, 1),
        ("max_bytes", policy.max_bytes, cost.bytes_per_token),
    ):
        if value is None:
            continue
        if value < least * unit:
            raise ValueError(
                f"sparse_attention.reload: {name}={value} is too small: the text and the first and last chunk of every "
                f"video need {least * unit}. Raise {name} to at least that, or give fewer frames."
            )
        budget = min(budget, value // unit)
    return budget


# ---------------------------------------------------------------------------------------------- times in a question
_NUMBER = r"[0-9]{1,6}(?:\.[0-9]{1,3})?"
_TIME = re.compile(
    r"(?<![\w.:,])(?:"
    r"(?P<clock>(?:[0-9]{1,2}:)?[0-9]{1,3}:[0-9]{2}(?:\.[0-9]{1,3})?)(?![\w:]|\.[0-9])"
    r"|(?P<compact>[0-9]{1,2}h[0-9]{1,2}m(?:[0-9]{1,2}s)?|[0-9]{1,3}m[0-9]{1,2}s)(?!\w)"
    rf"|(?P<number>{_NUMBER})(?P<gap>[\s-]?)(?P<unit>hours?|hrs?|h|minutes?|mins?|m|seconds?|secs?|s)(?!\w))",
    re.ASCII | re.IGNORECASE,
)
_SECONDS = {"h": 3600, "m": 60, "s": 1}
_CONTEXT = 40  # characters looked at on either side of a time; bounds the work per time


def _pattern(text: str) -> re.Pattern:
    return re.compile(text, re.ASCII | re.IGNORECASE)


_ARTICLE = r"(?:(?:the|about|around|roughly|only|at least|an?)\s)?"
_AND = _pattern(r",?\s?(?:and\s)?")
_TO = _pattern(r"\s?(?:-|–|—|->|to|until|till|through|(?P<both>and))\s?(?:the\s)?")
_BARE = _pattern(rf"(?<![\w.:,])({_NUMBER})\s?(?:-|–|—|to|until|(?P<both>and))\s?$")
_BETWEEN = _pattern(r"\bbetween\s(?:the\s)?$")
_AFTER_FIRST = _pattern(r"\bafter\sthe\sfirst\s$")
_FIRST = _pattern(r"\b(?:first|initial|opening)\s$")
_LAST = _pattern(r"\b(?:last|final|closing|the\spast)\s$")
_AFTER = _pattern(rf"\b(?:after|since|past)\s{_ARTICLE}$")
_BEFORE = _pattern(rf"\b(?:before|until|till|up\sto)\s{_ARTICLE}$")
_FROM = _pattern(r"\bfrom\s(?:the\s)?$")
_ONWARDS = _pattern(r"\s(?:on|onwards?|forward)\b")
_TO_END = _pattern(r"\s(?:before|from)\sthe\send\b")
_AT = _pattern(rf"(?:\bat|@|\baround)\s{_ARTICLE}$")
_MARK = _pattern(r"\s(?:mark|point|in\b|into)")
_LASTING = _pattern(
    rf"\b(?:for|every|each|within|than|lasts?|lasting|takes?|took|next|previous|another|per)\s{_ARTICLE}$"
)
_LONG = _pattern(r"\s(?:long|later|ago|apart|each|earlier|before|prior|of|after(?!\sthe\s(?:start|beginning)))\b")
_DECADE = _pattern(r"(?:\b(?:the|early|late|mid)[\s-]|')$")
_ADJECTIVE = _pattern(r"\b(?:an?|the|this|that)\s$")
_NO_CLOCK_BEFORE = _pattern(
    r"(?:\b(?:ratio|aspect|score|scale|odds|won|lost)(?:\s(?:of|is|was|by|at))?\s|[0-9]{4}-[0-9]{2}-[0-9]{2}\s)$"
)
_NO_CLOCK_AFTER = _pattern(r"\s?(?:[ap]\.?m\b|o'?clock|ratio|aspect|score|scale|odds|win\b|victory)")


class _Time(NamedTuple):
    start: int
    end: int
    seconds: float
    unit: str = ""  # as written; empty for 12:34
    gap: str = ""
    number: str = ""


def times_in_text(text: str) -> list[tuple[float, float]]:
    """The times that a question names, in order of appearance.

    * `m:ss`, `mm:ss`, `h:mm:ss`: exactly two digits and below 60 after a colon, so 16:9 and 3:2 are none; neither is what
      says am, pm, ratio, score or stands behind a date. `3:20` in other words is a time.
    * Numbers with a unit, also joined: 75 s, 1.5 min, 2 minutes and 5 seconds, 1h02m03s. A lone m or h is none (metres).
      Durations (for 10 s, 5 seconds later, a 10-second clip), decades (the 80s) and the prompt's own `Time 4.0s:` are none.
    * Ranges: between A and B, from A to B, A-B, where A may borrow B's unit.

    Returns:
        (start, end) in seconds. A moment has start == end; "after A" is (A, inf), "before A" and "in the first A" are
        (0, A). "the last A" is relative to an end that the text does not know: (-A, inf), resolved by `chunks_at`.
    """
    times, found = _find_times(text), []
    skip = False
    for index, time in enumerate(times):
        if skip:
            skip = False
            continue
        following = times[index + 1] if index + 1 < len(times) else None
        lead = text[max(time.start - _CONTEXT, 0) : time.start]
        if following and (joined := _TO.fullmatch(text[time.end : min(following.start, time.end + _CONTEXT)])):
            if not joined["both"] or _BETWEEN.search(lead):
                found.append(tuple(sorted((time.seconds, following.seconds))))
                skip = True
                continue
        interval = _read_one(time, lead, text[time.end : time.end + _CONTEXT])
        if interval is not None:
            found.append(interval)
    return found


def _find_times(text: str) -> list[_Time]:
    times: list[_Time] = []
    for match in _TIME.finditer(text):
        if match["number"]:
            unit = match["unit"].lower()
            size = _SECONDS[unit[0]]
            time = _Time(*match.span(), float(match["number"]) * size, unit, match["gap"], match["number"])
            last = times[-1] if times else None
            if (
                last is not None
                and last.unit
                and size < _SECONDS[last.unit[0]]
                and time.seconds < 60 * size
                and _AND.fullmatch(text[last.end : min(time.start, last.end + _CONTEXT)])
            ):
                # "2 minutes and 5 s": one time, of the last unit, which may be followed by a smaller one.
                times[-1] = _Time(last.start, time.end, last.seconds + time.seconds, unit + " ")
            else:
                times.append(time)
            continue
        if match["compact"]:
            pieces = re.findall(r"([0-9]+)([hms])", match["compact"].lower())
            seconds = float(sum(int(number) * _SECONDS[unit] for number, unit in pieces))
        else:
            *larger, last_part = match["clock"].split(":")
            minutes_fit = len(larger) == 1 or (len(larger[1]) == 2 and int(larger[1]) < 60)
            lead, tail = (
                text[max(match.start() - _CONTEXT, 0) : match.start()],
                text[match.end() : match.end() + _CONTEXT],
            )
            if (
                float(last_part) >= 60
                or not minutes_fit
                or _NO_CLOCK_BEFORE.search(lead)
                or _NO_CLOCK_AFTER.match(tail)
            ):
                continue
            seconds = float(last_part)
            for power, part in enumerate(reversed(larger), start=1):
                seconds += int(part) * 60**power
        times.append(_Time(*match.span(), seconds))
    return [time for time in times if time.unit not in ("h", "m")]


def _read_one(time: _Time, lead: str, tail: str) -> tuple[float, float] | None:
    """The interval that a single time means in its context, None if it is no time after all."""
    if time.number and (bare := _BARE.search(lead)) and (not bare["both"] or _BETWEEN.search(lead[: bare.start()])):
        if _LASTING.search(lead[: bare.start()]):
            return None
        other = float(bare[1]) * _SECONDS[time.unit[0]]
        return min(other, time.seconds), max(other, time.seconds)
    if _AFTER_FIRST.search(lead) or (_FROM.search(lead) and _ONWARDS.match(tail)):
        return time.seconds, math.inf
    if _FIRST.search(lead):
        return 0.0, time.seconds
    if _LAST.search(lead) or _TO_END.match(tail):
        return -time.seconds, math.inf
    if _AFTER.search(lead):
        return time.seconds, math.inf
    if _BEFORE.search(lead):
        return 0.0, time.seconds
    if time.unit and not _is_moment(time, lead, tail):
        return None
    return time.seconds, time.seconds


def _is_moment(time: _Time, lead: str, tail: str) -> bool:
    if lead[-5:] == "Time " and tail[:1] == ":":
        return False
    if _LASTING.search(lead) or (_LONG.match(tail) and not _AT.search(lead)):
        return False
    if _MARK.match(tail):
        return True
    if time.unit == "s" and not time.gap and time.number.endswith("0") and "." not in time.number:
        year = len(time.number) == 4 and time.number[:2] in ("18", "19", "20")
        if year or _DECADE.search(lead):
            return False
    return time.gap != "-" and not (time.unit in ("hour", "minute", "second") and _ADJECTIVE.search(lead))


def chunks_at(times, chunk_starts, chunk_ends, duration) -> list[int]:
    """The chunks of one video that overlap any of the times.

    Args:
        times: From `times_in_text`; a negative start counts from `duration`.
        chunk_starts, chunk_ends: Per chunk, in seconds, ascending; there may be gaps between chunks.
        duration: Seconds; what lies behind it chooses nothing.

    Returns:
        Chunk numbers, ascending. A moment chooses the chunk that contains it, in a gap the one before.
    """
    chosen = set()
    for start, end in times:
        start = max(duration + start, 0.0) if start < 0 else start
        if start > duration:
            continue
        inside = [chunk for chunk, first in enumerate(chunk_starts) if start < first < end]
        before = [chunk for chunk, first in enumerate(chunk_starts) if first <= start][-1:]
        if before and (not inside or chunk_ends[before[0]] > start or chunk_starts[before[0]] == start):
            inside += before
        chosen.update(inside)
    return sorted(chosen)


# ----------------------------------------------------------------------------------------------------------- scorers
class AttentionProbe:
    """Scores chunks while the language model runs the question over the pooled KV.

    Method `"probe"` adds up the attention that the question's tokens pay to the keys of each chunk (the idea of FlexSelect,
    which reads a middle layer; here averaged over `layers`). Method `"mean_key"` collects what `mean_key_scores` needs.

    Args:
        key_chunk: [keys] number of the chunk of each key of the pooled KV, -1 for text and timestamps.
        num_chunks: Chunks in all.
        layers: Layers to read; the others are ignored.
        method: `"probe"` or `"mean_key"`.
        unrotate: For `"mean_key"`: takes rotated queries [1, H, n, D] to un-rotated ones.
        mean_keys: For `"mean_key"`: indexed by layer, the un-rotated mean keys [C, K, D].
    """

    def __init__(self, key_chunk, num_chunks, layers, method="probe", unrotate=None, mean_keys=None):
        assert method in ("probe", "mean_key"), f"method {method!r} scores nothing"
        self.layers, self.method = layers, method
        self._key_chunk, self._num_chunks = key_chunk, num_chunks
        self._unrotate, self._mean_keys = unrotate, mean_keys
        self._mass = torch.zeros(num_chunks, dtype=torch.float64)
        self._queries, self._keys = [], []

    @torch.no_grad()
    def record(self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, scaling: float | None = None) -> None:
        """Takes in one layer of the question's pass; a question may come in several pieces.

        Args:
            query: [1, H, n, D], rotated.
            key: [1, K, L, D], rotated: the pooled KV, earlier pieces of the question, and last the piece's own n keys.
            scaling: Factor of the dot products, 1 / sqrt(D) if None.
        """
        if layer_idx not in self.layers:
            return
        assert query.shape[0] == 1, "the probe reads one sequence"
        if self.method == "mean_key":
            self._queries.append(self._unrotate(query)[0].float().mean(dim=1))
            self._keys.append(self._mean_keys[layer_idx])
            return
        mass = attention_mass(query, key, scaling)[: len(self._key_chunk)]
        self._key_chunk = self._key_chunk.to(mass.device)
        # Row 0 takes text and timestamps. Added in float64, so that the order of additions on a GPU cannot change a rank.
        per_chunk = mass.new_zeros(self._num_chunks + 1).index_add_(0, self._key_chunk + 1, mass)[1:]
        self._mass = self._mass.to(mass.device) + per_chunk

    def scores(self) -> list[float]:
        """Per chunk: `"probe"`: mean attention per key, scaled to sum 1; `"mean_key"`: see `mean_key_scores`."""
        if self.method == "mean_key":
            return mean_key_scores(self._queries, self._keys)
        keys = torch.bincount(self._key_chunk + 1, minlength=self._num_chunks + 1)[1:]
        per_key = self._mass.to(keys.device) / keys.clamp(min=1)
        total = per_key.sum()
        return (per_key / torch.where(total > 0, total, 1)).tolist()


def attention_mass(query: torch.Tensor, key: torch.Tensor, scaling: float | None = None) -> torch.Tensor:
    """Attention weights of the last n positions, causal, summed over heads and queries.

    Exact softmax in float32. Memory is bounded by `MAX_WEIGHTS` and `MAX_KEY_ELEMENTS` (beside one row of weights): some
    queries of one key-value head at a time over all keys, which are converted block by block.

    Args:
        query: [1, H, n, D].
        key: [1, K, L, D], the last n of which are the queries' own.

    Returns:
        [L] float64; sums to H * n.
    """
    heads, queries, size = query.shape[1:]
    kv_heads, length = key.shape[1:3]
    scaling = size**-0.5 if scaling is None else scaling
    total = torch.zeros(length, dtype=torch.float64, device=key.device)
    rows = max(MAX_WEIGHTS // length, 1)
    columns = max(MAX_KEY_ELEMENTS // size, 1)
    own = torch.arange(queries, device=key.device)
    position = own.repeat(heads // kv_heads)
    for head in range(kv_heads):
        grouped = query[0].view(kv_heads, -1, size)[head] if query.is_contiguous() else None
        if grouped is None:
            grouped = query[0].reshape(kv_heads, -1, size)[head]
        for row in range(0, len(grouped), rows):
            block = grouped[row : row + rows].float() * scaling
            weights = block.new_empty(len(block), length)
            for column in range(0, length, columns):
                keys = key[0, head, column : column + columns].float()
                weights[:, column : column + columns] = block @ keys.T
            future = own > position[row : row + rows, None]
            weights[:, length - queries :].masked_fill_(future, -torch.inf)
            weights.sub_(weights.amax(dim=1, keepdim=True)).exp_().div_(weights.sum(dim=1, keepdim=True))
            total += weights.sum(dim=0)
    return total


def mean_key_scores(question_query, chunk_mean_keys) -> list[float]:
    """Scores by mean query . mean key, the in-model rule of ReKV (public code), but one ranking for all layers.

    Per layer the dot product over all heads, standardised over the chunks (layers differ in scale), then averaged over
    layers. Both sides are un-rotated, so the distance in time between question and chunk plays no part.

    Args:
        question_query: Per layer, [H, D] mean over the question's tokens.
        chunk_mean_keys: Per layer, [C, K, D] mean over the chunk's visual keys; a key head serves H / K query heads.

    Returns:
        Per chunk, scaled to [0, 1]; all 0 if the chunks do not differ.
    """
    assert len(question_query) == len(chunk_mean_keys) > 0, "the question's queries of at least one layer are needed"
    total = 0.0
    for query, keys in zip(question_query, chunk_mean_keys, strict=True):
        kv_heads, size = keys.shape[1:]
        shared = query.float().view(kv_heads, -1, size).sum(dim=1)
        score = torch.einsum("ckd,kd->c", keys.float(), shared.to(keys.device)).double().cpu()
        spread = score.std(correction=0)
        total = total + (score - score.mean()) / spread if spread > 0 else total + torch.zeros_like(score)
    low, high = total.min(), total.max()
    return ((total - low) / (high - low)).tolist() if high > low else [0.0] * len(total)
