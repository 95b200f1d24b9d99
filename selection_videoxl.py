"""Which chunks of a video stay dense, are pooled, or are dropped: the policy of bi-level decoding, and its scorers.

What is surprising:
* The first and last chunk of every video are dense whatever the question says. They do not count as chosen; `count`,
  `share` and `mass` limit the chunks in between.
* A budget is spent along one fixed list of upgrades, each by rank: timestamps (with `timestamps="kept"` only those of
  chunks that are kept), chosen chunks pooled, chosen chunks dense, others pooled. Spending stops at the first upgrade
  that does not fit, which leaves less than a chunk unused: if cheaper ones filled the rest, a larger budget could
  lower a chunk's level.
* Attention mass is taken per key, so that no chunk is relevant for being long (the last one may be short).

H query heads, K key-value heads (H a multiple of K), n question tokens, L keys, D head size, C chunks of all videos.
"""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from .sparse_attention import attention_mass, attention_rows

DENSE, POOLED, DROPPED = "dense", "pooled", "dropped"
SCORERS, LIMITS = ("probe", "mean_key"), ("count", "share", "mass")
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

    method: str = "probe"  # or "mean_key", "none" (only the first and last chunk of a video), "all"
    count: int | None = None  # at most so many chosen chunks
    share: float | None = None  # at most this share of all chunks, rounded up
    mass: float | None = None  # the fewest chunks that, with the first and last ones, hold this share of the score sum
    max_tokens: int | None = None
    max_bytes: int | None = None
    timestamps: str = "all"  # whose stay within the budget: all chunks' first, or ("kept") those of what is kept
    positions: str = "compact"  # of the kept keys: 0, 1, 2, ... or "true"
    layers: tuple[float, float] = (1 / 3, 2 / 3)  # which of the layers the scorer reads, as shares of their number
    reduce: str = "sum"  # of the attention of all heads and words of the question, or the one that gives most ("max")

    def __post_init__(self):
        words = {"positions": ("compact", "true"), "timestamps": ("all", "kept"), "reduce": ("sum", "max")}
        methods, whole = (*SCORERS, "none", "all"), "None or an integer of at least {}"
        layers = isinstance(self.layers, tuple) and all(_is_number(end, Real, 0, 1) for end in self.layers)
        for name, valid, expected in (
            ("method", self.method in methods, f"one of {('auto', *methods)}"),
            ("count", self._fits("count", Integral, 0), whole.format(0)),
            *((name, self._fits(name, Real, 0, 1), "None or a number from 0 to 1") for name in ("share", "mass")),
            *((name, self._fits(name, Integral, 1), whole.format(1)) for name in ("max_tokens", "max_bytes")),
            *((name, getattr(self, name) in known, f"one of {known}") for name, known in words.items()),
            ("reduce", self.reduce == "sum" or self.method == "probe", "'sum' with every method but 'probe'"),
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
        return self.method in SCORERS

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
        if unknown := [name for name in settings if name not in known]:
            raise ValueError(f"sparse_attention.reload has no field {unknown[0]!r:.200}; it has {', '.join(known)}")
        if settings.get("method", "auto") == "auto":
            settings["method"] = "probe"
        if isinstance(settings.get("layers"), list):  # as it comes back from config.json
            settings["layers"] = tuple(settings["layers"])
        if settings["method"] in SCORERS and all(settings.get(name) is None for name in LIMITS):
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


class AttentionProbe:
    """Scores chunks while the language model runs the question over the pooled KV.

    `"probe"` adds up the attention of the question's tokens to the keys of each chunk (as FlexSelect does in a middle
    layer, here over `layers`), or takes the largest that one head gives from one token (`reduce`): a model whose heads
    each look for something of their own says more by its best head than by their sum. `"mean_key"` collects what
    `mean_key_scores` needs.

    Args:
        key_chunk: [keys] the chunk of each key of the pooled KV, -1 for text and timestamps.
        num_chunks: Chunks in all.
        layers: Layers to read; the others are ignored.
        method: One of `SCORERS`.
        reduce: For `"probe"`: `"sum"` or `"max"`.
        unrotate: For `"mean_key"`: turns rotated queries [1, H, n, D] into un-rotated ones.
        mean_keys: For `"mean_key"`: indexed by layer, un-rotated mean keys [C, K, D].
    """

    def __init__(self, key_chunk, num_chunks, layers, method="probe", unrotate=None, mean_keys=None, reduce="sum"):
        assert method in SCORERS, f"method {method!r:.200} scores nothing"
        self.layers, self.method, self._unrotate, self._mean_keys = layers, method, unrotate, mean_keys
        self._key_chunk, self._num_chunks, self._reduce, self._queries = key_chunk, num_chunks, reduce, {}
        self._mass = torch.zeros(len(key_chunk) if reduce == "sum" else num_chunks, dtype=torch.float32)

    @torch.no_grad()
    def record(self, layer_idx: int, query: torch.Tensor, key: torch.Tensor, scaling: float | None = None) -> None:
        """Takes in one layer of the question's pass; a question may come in several pieces.

        Args:
            query: [1, H, n, D], rotated.
            key: [1, K, L, D], rotated: the pooled KV, earlier pieces of the question, and last the piece's own n keys.
            scaling: See `attention_rows`.
        """
        if layer_idx not in self.layers:
            return
        assert query.shape[0] == 1, "the probe reads one sequence"
        if self.method == "mean_key":
            # A sum serves as the mean does: scores are standardised per layer.
            self._queries[layer_idx] = self._queries.get(layer_idx, 0) + self._unrotate(query)[0].float().sum(dim=1)
            return
        self._mass = self._mass.to(query.device)
        if self._reduce == "sum":
            self._mass += attention_mass(query, key, scaling)[: len(self._key_chunk)]
            return
        slot = self._key_chunk.to(query.device) + 1
        for weights in attention_rows(query, key, scaling):
            chunks = weights.new_zeros(len(weights), self._num_chunks + 1)
            chunks.index_add_(1, slot, weights[:, : len(slot)])
            self._mass = torch.maximum(self._mass, chunks[:, 1:].amax(dim=0))

    def scores(self) -> list[float]:
        """Per chunk: for `"probe"` the mean attention per key, scaled to sum 1; else see `mean_key_scores`."""
        if self.method == "mean_key":
            return mean_key_scores(list(self._queries.values()), [self._mean_keys[layer] for layer in self._queries])
        # On the CPU and in float64: a GPU's unordered additions could change a rank. Entry 0 is text and timestamps.
        mass, slot, count = self._mass.cpu().double(), self._key_chunk.cpu() + 1, self._num_chunks + 1
        keys = torch.bincount(slot, minlength=count)[1:].clamp(min=1)
        per_key = (torch.bincount(slot, mass, minlength=count)[1:] if self._reduce == "sum" else mass) / keys
        return (per_key / (per_key.sum() or 1)).tolist()


def mean_key_scores(question_query, chunk_mean_keys) -> list[float]:
    """Scores by mean query . mean key: the in-model rule of ReKV (public code), but one ranking for all layers.

    Per layer the dot product over all heads, standardised over the chunks (layers differ in scale), then averaged, and
    scaled to [0, 1]; all 0 if the chunks do not differ. Both sides are un-rotated, so the distance in time between
    question and chunk plays no part.

    Args:
        question_query: Per layer, [H, D] mean over the question's tokens.
        chunk_mean_keys: Per layer, [C, K, D] mean over a chunk's visual keys; a key head serves H / K query heads.
    """
    assert len(question_query) == len(chunk_mean_keys) > 0, "the question was not run through any layer to be read"
    mean = 0.0
    for query, keys in zip(question_query, chunk_mean_keys, strict=True):
        shared = query.to(keys.device).float().view(keys.shape[1], -1, keys.shape[2]).sum(dim=1)
        score = torch.einsum("ckd,kd->c", keys.float(), shared).cpu().double()
        spread = score.std(correction=0)
        differ = spread > 1e-6 * score.abs().max()  # else it is float32 rounding, not to be blown up
        mean = mean + (score - score.mean()) * differ / spread.clamp(min=1e-12) / len(question_query)
    return ((mean - mean.min()) / (mean.max() - mean.min()).clamp(min=1e-12)).tolist()
