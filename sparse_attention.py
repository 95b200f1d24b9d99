"""Who may see whom: where videos lie in a sequence, the chunk plan of sparse prefill, the attention that follows it.

What is surprising:
* One rule covers all modes. A *visual* key is hidden from a query of the same video that is more than `window_chunks`
  chunks later, and from every query of another video; text and timestamps are visible to all that follow. Queries that
  are text see everything before them; in `mask` mode so do timestamp queries (rule e of the reference), in `streaming`
  mode they are treated like any token of their chunk. Everything is causal, also inside a chunk.
* The plan is a list of `AttentionStep`s. A step's keys are some gathered positions, then a contiguous run that ends
  with the queries themselves: "causal, aligned at the lower right" is all masking that is left; no L x L tensor.
* Visibility depends on positions alone. Any split of a sequence into calls, also inside a chunk, is the same model.

The reference's rules (public Video-XL-2 code, `w_chunk`), for one prefix token P, four groups of one timestamp T and
one visual token V, one group per chunk, a window of one chunk, and a question Q; rows are queries, `mask` mode on the
left and `streaming` (no rule e) on the right:

        P T V T V T V T V Q           P T V T V T V T V Q
    P   1 0 0 0 0 0 0 0 0 0       P   1 0 0 0 0 0 0 0 0 0     a) the prefix is visible to all
    T   1 1 0 0 0 0 0 0 0 0       T   1 1 0 0 0 0 0 0 0 0     b) text after the video sees everything
    V   1 1 1 0 0 0 0 0 0 0       V   1 1 1 0 0 0 0 0 0 0     c) a chunk sees itself and the window before it
    T   1 1 1 1 0 0 0 0 0 0       T   1 1 1 1 0 0 0 0 0 0     d) timestamps are visible to all later tokens
    V   1 1 1 1 1 0 0 0 0 0       V   1 1 1 1 1 0 0 0 0 0     e) timestamps see everything before them
    T   1 1 1 1 1 1 0 0 0 0       T   1 1 0 1 1 1 0 0 0 0
    V   1 1 0 1 1 1 1 0 0 0       V   1 1 0 1 1 1 1 0 0 0
    T   1 1 1 1 1 1 1 1 0 0       T   1 1 0 1 0 1 1 1 0 0
    V   1 1 0 1 0 1 1 1 1 0       V   1 1 0 1 0 1 1 1 1 0
    Q   1 1 1 1 1 1 1 1 1 1       Q   1 1 1 1 1 1 1 1 1 1

B batch (1 on the sparse path), H query heads, K key-value heads, L sequence, n queries of a step, D head size.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers import __version__ as transformers_version
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

MAX_STEP_QUERIES = 1024  # queries per attention call, and so rows of a mask where one has to be built
# Of these, queries per kernel call on a CPU: its kernel computes masked pairs too, so smaller blocks waste fewer. The
# kernel's own blocks have 256 rows. Measured at 612 queries: 256 and 320 are alike, 128 and 612 are 4 to 6 % slower.
MASK_ROWS = 256
# Elements of the float32 buffers where attention weights are summed: 32 MB (at least one row), and 8 MB (twice).
MAX_WEIGHTS, MAX_KEY_ELEMENTS = 8 * 2**20, 2 * 2**20


class GroupSpan(NamedTuple):
    """One group of frames in the sequence: timestamp [start, visual_start), visual tokens [visual_start, end)."""

    start: int
    visual_start: int
    end: int


@dataclass(frozen=True)
class VisualLayout:
    """Where the videos lie in one sequence."""

    videos: tuple[tuple[GroupSpan, ...], ...] = ()  # in order; the groups of a video are adjacent
    length: int = 0  # tokens in the whole sequence

    @classmethod
    def from_ids(
        cls,
        input_ids,
        groups_per_video,
        tokens_per_group,
        video_token_id,
        time_start_token_id,
        time_end_token_id,
        offset=0,
        timed=None,
    ) -> "VisualLayout":
        """Finds the groups of one unpadded sequence.

        Placeholders decide where visual tokens are; the timestamp of a group is the text from the last
        `time_start_token_id` before it, if the token just before its placeholders is `time_end_token_id`. Anywhere
        else, in a question for instance, these ids mean nothing.

        Args:
            input_ids: [L] ids, on any device.
            groups_per_video: Number of groups of each video, in order of appearance.
            offset: Position of the first id.
            timed: Per video, whether its groups have timestamps (images have none); None where all may have.

        Raises:
            ValueError: If the number of placeholders is not the number of visual tokens, or placeholders of a group
                are torn apart.
        """
        ids, count = input_ids.tolist(), sum(groups_per_video)
        places = [place for place, token in enumerate(ids) if token == video_token_id]
        if len(places) != count * tokens_per_group:
            raise ValueError(
                f"the prompt has {len(places)} video placeholders (id {video_token_id}), but its videos have "
                f"{count * tokens_per_group} visual tokens ({count} groups of {tokens_per_group}). Build the prompt "
                "with the processor, and keep the placeholder out of the text."
            )
        videos, cursor, visual_starts = [], 0, iter(places[::tokens_per_group])
        for number, group_count in enumerate(groups_per_video):
            has_times = time_start_token_id is not None and (timed is None or timed[number])
            groups = []
            for start in islice(visual_starts, group_count):
                visual_start, end = start, start + tokens_per_group
                if ids[start:end] != [video_token_id] * tokens_per_group:
                    raise ValueError(f"the {tokens_per_group} placeholders of a group must be adjacent (at {start})")
                if has_times and visual_start > cursor and ids[visual_start - 1] == time_end_token_id:
                    before = range(visual_start - 1, cursor - 1, -1)
                    start = next((i for i in before if ids[i] == time_start_token_id), visual_start)
                if groups and start != cursor:
                    raise ValueError(f"the groups of one video must be adjacent; there is text in front of {start}")
                groups.append(GroupSpan(start + offset, visual_start + offset, end + offset))
                cursor = end
            videos.append(tuple(groups))
        return cls(tuple(videos), len(ids) + offset)

    def until(self, length: int) -> "VisualLayout":
        """This layout without what lies behind its first `length` positions, which end with a whole group."""
        videos = (tuple(group for group in video if group.end <= length) for video in self.videos)
        return VisualLayout(tuple(video for video in videos if video), length)

    @property
    def groups(self) -> list[GroupSpan]:
        """The groups of all videos, in order."""
        return [group for video in self.videos for group in video]

    @property
    def end(self) -> int:
        """Position behind the last visual token, 0 without a video."""
        return self.videos[-1][-1].end if self.videos else 0

    @cached_property
    def non_visual(self) -> torch.Tensor:
        """[.] positions of text and timestamps, ascending."""
        steps = torch.zeros(self.length + 1, dtype=torch.int8)
        if groups := self.groups:
            _, starts, ends = torch.tensor(groups).unbind(1)
            steps.index_fill_(0, starts, 1)
            steps[ends] -= 1  # after the starts: adjacent visual runs (no timestamps) cancel out
        return (steps[:-1].cumsum(0) == 0).nonzero().flatten()


class PromptRow(NamedTuple):
    """One prompt of a batch: its columns [.] that are not padding, its layout, and the numbers of its videos."""

    columns: torch.Tensor
    layout: VisualLayout
    videos: range


def prompt_rows(config, input_ids, attention_mask, features, timed, prompt_length=None) -> list[PromptRow]:
    """Where the videos of several prompts lie.

    Args:
        config: The model's, for the ids that mean something.
        input_ids: [B, L] new tokens.
        attention_mask: [B, cached and new tokens], 0 on padding.
        features: Per video or image, in order of appearance, its visual tokens [G, N, hidden].
        timed: Per video or image, whether its groups have timestamps.
        prompt_length: Columns from here on are generated tokens; None if there are none.

    Raises:
        ValueError: If placeholders and visual tokens do not fit.
    """
    rows, used, past_length = [], 0, attention_mask.shape[1] - input_ids.shape[1]
    tokens = (config.video_token_id, config.time_start_token_id, config.time_end_token_id)
    size = config.compressor_config.tokens_per_group
    for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
        past, columns = int(mask[:past_length].sum()), mask[past_length:].nonzero().flatten()
        prompt = ids[columns] if prompt_length is None else ids[columns[columns < prompt_length]]
        wanted = int((prompt == config.video_token_id).sum())
        counts, first = [], used
        while used < len(features) and sum(counts) * size < wanted:
            counts.append(features[used].shape[0])
            used += 1
        layout = VisualLayout.from_ids(prompt, counts, size, *tokens, offset=past, timed=timed[first:used])
        rows.append(PromptRow(columns, VisualLayout(layout.videos, past + len(columns)), range(first, used)))
    if used != len(features):
        raise ValueError(
            f"{len(features)} videos came, but the prompts have placeholders for {used} of them: "
            f"{sum(f.shape[0] * f.shape[1] for f in features)} visual tokens against "
            f"{int((input_ids == config.video_token_id).sum())} placeholders"
        )
    return rows


@dataclass(frozen=True)
class AttentionStep:
    """Queries at [start, stop) see the positions `gathered`, and causally everything from `window_start` on."""

    start: int
    stop: int
    window_start: int = 0
    gathered: torch.Tensor | None = None  # before `window_start`, ascending; None if there are none
    wide: torch.Tensor | None = None  # positions of queries that see their whole past instead; None if there are none
    origin: int = 0  # where the past begins

    def moved(self, places: int) -> "AttentionStep":
        """This step of a sequence that stands so many places further on, behind others that it does not see."""
        gathered, wide = (None if index is None else index + places for index in (self.gathered, self.wide))
        edges = (edge + places for edge in (self.start, self.stop, self.window_start))
        return AttentionStep(*edges, gathered, wide, self.origin + places)


@dataclass(frozen=True)
class AttentionPlan:
    """What one run through layers of the language model follows. It travels as one argument to every layer."""

    steps: list[AttentionStep]  # cover the run's rows without gaps
    probe: Any = None  # an object whose `record(layer_idx, query, key, scaling)` sees every layer's attention
    layers: Any = None  # the cache's, where keys and values are not all on the device: see `planned_attention`
    unread: bool = False  # whether nobody reads what the model's last layer makes of these rows
    beacon_places: torch.Tensor | None = None  # [b] rows that are beacons, see `beacon_memory_videoxl`
    followed: set = field(default_factory=set)  # numbers of the layers that followed it so far

    def require_followed(self, layers: range) -> None:
        """Raises RuntimeError unless these layers have all followed the plan: an answer without it would be wrong."""
        if not self.followed.issuperset(layers):
            raise RuntimeError(
                f"transformers {transformers_version} did not hand the attention plan to layers "
                f"{sorted(set(layers) - self.followed)} of the language model; use a release this code was tested "
                "with (see the README)"
            )


def plan_prefill(
    layout: VisualLayout, prefill: str, chunk_groups: int, window_chunks: int, start=0, device="cpu"
) -> list[AttentionStep]:
    """Steps for the positions [start, layout.length) of a sequence whose earlier positions are cached.

    Args:
        layout: The whole sequence, cached positions included.
        prefill: `"full"`, `"streaming"` or `"mask"`.
        chunk_groups: Groups in a chunk. Chunks are counted from the start of each video.
        window_chunks: Earlier chunks that a chunk sees in full.
        start: First position that is not cached yet.
        device: Where the steps' tensors go: once for the whole plan, not once per layer.

    Returns:
        Steps in order, covering [start, layout.length) without gaps, each with at most `MAX_STEP_QUERIES` queries.
    """
    steps: list[AttentionStep] = []

    def add(begin, end, window_start=0, gathered=None, wide=()):
        for first in range(max(begin, start), end, MAX_STEP_QUERIES):
            stop = min(first + MAX_STEP_QUERIES, end)
            inside = [place for place in wide if first <= place < stop]
            inside = torch.tensor(inside, device=device) if inside else None
            steps.append(AttentionStep(first, stop, window_start, gathered, inside))

    if prefill == "full":
        add(0, layout.length)
        return steps
    non_visual, cursor = layout.non_visual, 0
    non_visual_there = non_visual.to(device)  # every step's `gathered` is a view of it
    for video in layout.videos:
        add(cursor, video[0].start)
        for first in range(0, len(video), chunk_groups):
            chunk = video[first : first + chunk_groups]
            if chunk[-1].end <= start:
                continue
            window_start = video[max(first - window_chunks * chunk_groups, 0)].start
            gathered = non_visual_there[: int(torch.searchsorted(non_visual, window_start))]
            if len(gathered) == window_start:
                add(chunk[0].start, chunk[-1].end)
                continue
            stamps = [place for group in chunk for place in range(group.start, group.visual_start)]
            add(chunk[0].start, chunk[-1].end, window_start, gathered, stamps if prefill == "mask" else ())
        cursor = video[-1].end
    add(cursor, layout.length)
    return steps


def plan_packed(rows, prefill: str, chunk_groups: int, window_chunks: int, device) -> list[AttentionStep]:
    """Steps for whole prompts (`PromptRow`s) that stand one behind the other in one sequence; none sees another."""
    steps = []
    for row in rows:
        plan = plan_prefill(row.layout, prefill, chunk_groups, window_chunks, device=device)
        if prefill == "full":  # as one step, which needs no mask
            plan = [AttentionStep(0, row.layout.length)]
        steps += [step.moved(int(row.columns[0])) for step in plan]
    return steps


def dense_mask(layout: VisualLayout, prefill: str, chunk_groups: int, window_chunks: int) -> torch.Tensor:
    """The oracle: the same visibility as a dense mask, from the reference's rules. For tests and baselines only.

    Returns:
        [L, L] bool, True where the query (row) sees the key (column).
    """
    length = layout.length
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    if prefill == "full":
        return causal
    chunk = torch.full((length,), -1)  # number of the chunk, counted over all videos with a gap between videos
    visual = torch.zeros(length, dtype=torch.bool)
    timestamp = torch.zeros(length, dtype=torch.bool)
    next_chunk = 0
    for video in layout.videos:
        for index, group in enumerate(video):
            chunk[group.start : group.end] = next_chunk + index // chunk_groups
            timestamp[group.start : group.visual_start] = True
            visual[group.visual_start : group.end] = True
        next_chunk += -(-len(video) // chunk_groups) + window_chunks + 1
    in_window = (chunk[:, None] >= chunk[None, :]) & (chunk[:, None] - chunk[None, :] <= window_chunks)
    allowed = ~visual[None, :] | (chunk < 0)[:, None] | in_window
    if prefill == "mask":
        allowed = allowed | timestamp[:, None]
    return causal & allowed


def register_attention(base: str) -> str:
    """Registers the attention that follows a plan where there is one and is `base` elsewhere; returns its name.

    The language model's config names the attention for all its calls, so one function has to serve the planned prefill
    and the ordinary calls (decoding, training, text).
    """
    name = base if base.startswith("videoxl_") else f"videoxl_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():

        def forward(module, query, key, value, attention_mask, attention_plan=None, **kwargs):
            if attention_plan is None:
                if base == "sdpa" and query.shape[2] == 1 and not query.is_cuda:
                    options = kwargs.get("dropout", 0.0), kwargs.get("scaling"), attention_mask
                    output = _one_query_attention(query.to(key.dtype), key, value, *options)
                    return output.to(query.dtype).transpose(1, 2), None
                caller = module if base in ("eager", "sdpa") else _NamedCaller(module, base)
                # The library keeps no global eager function: each model file has its own.
                attend = eager_attention_forward if base == "eager" else ALL_ATTENTION_FUNCTIONS[base]
                output, weights = attend(caller, query.to(key.dtype), key, value, attention_mask, **kwargs)
                return output.to(query.dtype), weights
            return follow_plan(module, query, key, value, attention_plan, **kwargs), None

        AttentionInterface.register(name, forward)
        if base in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


class _NamedCaller:
    """An attention module whose config names `base`: flash attention loads its kernel by that name."""

    def __init__(self, module, base: str):
        self._module = module
        self.config = copy.copy(module.config)
        self.config._attn_implementation = base

    def __getattr__(self, name):
        return getattr(self._module, name)


def follow_plan(module, query, key, value, plan: AttentionPlan, dropout=0.0, scaling=None, **_) -> torch.Tensor:
    """One layer's attention by a plan; see `planned_attention` for the shapes."""
    if plan.probe is not None:
        plan.probe.record(module.layer_idx, query, key, scaling)
    plan.followed.add(module.layer_idx)
    if plan.unread and module.layer_idx == module.config.num_hidden_layers - 1:
        # Its keys and values are cached by now, and nobody reads what the last layer makes of them.
        return torch.zeros_like(query).transpose(1, 2)
    layer = None if plan.layers is None else plan.layers[module.layer_idx]
    # In the dtype of what is kept, which autocast, or the lack of it since, may have made another one.
    output = planned_attention(query.to(key.dtype), key, value, plan.steps, dropout, scaling, layer)
    return output.to(query.dtype)


def planned_attention(query, key, value, steps, dropout=0.0, scaling=None, layer=None) -> torch.Tensor:
    """Attention of consecutive queries that follows a plan.

    Args:
        query: [1, H, n, D], the queries at positions [steps[0].start, steps[-1].stop).
        key, value: [1, K, L, D] for positions 0 .. L - 1, L = steps[-1].stop; H is a multiple of K.
        steps: From `plan_prefill`, adjacent.
        layer: Where keys and values come from instead, if they are not all on the device: an object with
            `visible(step)` and `whole(stop)`.

    Returns:
        [1, n, H, D].
    """
    first = steps[0].start
    assert query.shape[2] == steps[-1].stop - first, "the plan must cover exactly the queries at hand"
    assert layer is not None or key.shape[2] == steps[-1].stop, "the keys must be those of all positions so far"
    outputs = []
    for step in steps:
        step_query = query[:, :, step.start - first : step.stop - first]
        seen = (_visible(key, step), _visible(value, step)) if layer is None else layer.visible(step)
        output = _causal_attention(step_query, *seen, dropout, scaling)
        if step.wide is not None:
            wide = step.wide.to(query.device)
            reach = slice(step.origin, step.stop)
            past = (key[:, :, reach], value[:, :, reach]) if layer is None else layer.whole(step.stop)
            hidden = torch.arange(step.origin, step.stop, device=query.device) > wide[:, None]
            wide_query = query.index_select(2, wide - first)
            wide_output = _masked_attention(wide_query, *past, hidden, dropout, scaling)
            output = output.index_copy(2, wide - step.start, wide_output)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _visible(states: torch.Tensor, step: AttentionStep) -> torch.Tensor:
    window = states[:, :, step.window_start : step.stop]
    if step.gathered is None:
        return window
    return torch.cat([states.index_select(2, step.gathered.to(states.device)), window], dim=2)


def _causal_attention(query, key, value, dropout, scaling) -> torch.Tensor:
    """Attention of the last positions of `key`, causal and aligned at the lower right."""
    queries, keys, grouped = query.shape[2], key.shape[2], query.shape[1] != key.shape[1]
    if queries == 1 and not query.is_cuda:
        return _one_query_attention(query, key, value, dropout, scaling)
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling, enable_gqa=grouped)
    if queries in (1, keys):
        return attend(query, key, value, is_causal=queries > 1)
    if query.is_cuda and query.dtype != torch.float32:
        # A bias object, not a tensor: the flash kernel aligns at the lower right itself.
        return attend(query, key, value, attn_mask=causal_lower_right(queries, keys))
    # Elsewhere `is_causal` means the upper left. Blocks of rows, each with the keys up to its last row, need one small
    # mask: that of the last full block; the others' are its lower rows and right columns.
    rows = min(MASK_ROWS, queries)
    mask = query.new_zeros(rows, keys)
    mask[:, keys - rows :] = query.new_full((rows, rows), -torch.inf).triu(1)
    outputs = []
    for begin in range(0, queries, rows):
        end = min(begin + rows, queries)
        seen = keys - queries + end
        block_mask = mask[rows - (end - begin) :, keys - seen :]
        outputs.append(attend(query[:, :, begin:end], key[:, :, :seen], value[:, :, :seen], attn_mask=block_mask))
    return torch.cat(outputs, dim=2)


def _one_query_attention(query, key, value, dropout, scaling, mask=None) -> torch.Tensor:
    """Attention of one query a row [B, H, 1, D] to all keys; `mask` is None or [B, 1, 1, L].

    A CPU's kernel reads the keys once for each query head: as rows of one head, those of a key head share them.
    """
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    attended = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    return attended.reshape(query.shape)


def _masked_attention(query, key, value, hidden, dropout, scaling) -> torch.Tensor:
    """Attention under a mask [n, L], True where a query does not see a key, that all heads share."""
    # Additive: SDPA would turn a boolean mask into this, anew and in a slower way.
    mask = query.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    attend = partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    if not query.is_cuda:
        return attend(query, key, value, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1])
    # No CUDA kernel takes a mask and fewer key heads: the query heads of one key head become rows, no key is repeated.
    per_key_head = query.shape[1] // key.shape[1]
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    return attend(folded, key, value, attn_mask=mask.repeat(per_key_head, 1)).reshape(query.shape)


@torch.no_grad()
def attention_mass(query: torch.Tensor, key: torch.Tensor, scaling: float | None = None) -> torch.Tensor:
    """The weights of `attention_rows`, summed over heads and queries: [L] float32, whose sum is H * n."""
    total = torch.zeros(key.shape[2], dtype=torch.float32, device=query.device)
    for weights in attention_rows(query, key, scaling):
        total += weights.sum(dim=0)
    return total


def attention_rows(query: torch.Tensor, key: torch.Tensor, scaling: float | None = None) -> Iterator[torch.Tensor]:
    """Attention weights of the last n positions, causal: exact softmax in float32.

    Some queries of one key-value head at a time over all keys, so memory stays bounded (`MAX_WEIGHTS`).

    Args:
        query: [1, H, n, D].
        key: [1, K, L, D], the last n of them the queries' own, or those before a single query; may lie elsewhere.

    Yields:
        [rows, L] float32, valid until the next.
    """
    (heads, queries, size), (kv_heads, length) = query.shape[1:], key.shape[1:3]
    own = torch.arange(queries, device=query.device)
    position = own.repeat(heads // kv_heads)
    rows, columns = max(MAX_WEIGHTS // length, 1), max(MAX_KEY_ELEMENTS // size, 1)
    buffer = torch.empty(min(rows, len(position)), length, dtype=torch.float32, device=query.device)
    for head, head_queries in enumerate(query[0].reshape(kv_heads, -1, size)):
        for row in range(0, len(head_queries), rows):
            block = head_queries[row : row + rows].float() * (size**-0.5 if scaling is None else scaling)
            weights = buffer[: len(block)]
            for column in range(0, length, columns):
                # A copy: products round by how memory is aligned, and equal keys are to give equal weights.
                keys = key[0, head, column : column + columns].to(query.device, torch.float32, copy=True)
                with torch.autocast(query.device.type, enabled=False):
                    torch.mm(block, keys.T, out=weights[:, column : column + columns])
            weights[:, length - queries :].masked_fill_(own > position[row : row + rows, None], -torch.inf)
            weights.sub_(weights.amax(dim=1, keepdim=True)).exp_()
            yield weights.div_(weights.sum(dim=1, keepdim=True))
