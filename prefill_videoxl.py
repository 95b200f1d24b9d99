"""Filling caches: how the language model runs over sequences with videos and over text behind them.

What is surprising:
* A family member is a `SequencePolicy`: how further tokens run into a cache, and how a question runs behind it. The
  base class runs every token as it comes, by the plan of sparse attention; members add their own to `POLICIES`.
* A cache keeps the policy that its tokens were run by. What the config says later counts for other sequences.
* Every prompt is prefilled by itself, at its own positions, and the caches are stacked afterwards, padded on the
  left. So a batch gives what single calls give, also where each prompt keeps another part of its key-values.
* Positions in the plan of attention are places in the cache; positions given to the language model are the rotary
  ones. They are the same until key-values are compressed, dropped or pooled.

B batch, L sequence, n new tokens; "hidden" is the language model's width.
"""

from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from .kv_cache import CACHE_NAME, VideoXLCache
from .kv_tiers_videoxl import offload_cache
from .sparse_attention import AttentionPlan, GroupSpan, PromptRow, VisualLayout, plan_prefill

logger = logging.get_logger(__name__)

# Tokens of a prompt that run through the language model at once while a cache is filled. Bounds the activations (the
# widest is the MLP's, [segment, intermediate_size]); large enough that matrix products stay efficient.
SEGMENT_TOKENS = 4096


class SequenceSize(NamedTuple):
    """A prompt's header and the video behind it, for the planner."""

    header: int  # tokens
    stamps: np.ndarray  # [G] tokens of the groups' timestamps
    visual: int  # tokens
    layers: int  # of the language model
    layer_bytes: int  # keys and values of one token in one layer
    row_bytes: int  # one token on its way through the language model

    @property
    def text(self) -> int:
        """Tokens that are not visual."""
        return self.header + int(self.stamps.sum())

    @property
    def total(self) -> int:
        return self.text + self.visual

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in all layers."""
        return self.layers * self.layer_bytes


class Kept(NamedTuple):
    """What is kept of a sequence, for the planner: in bytes, but for tokens and rows."""

    held: int  # key-values of the encoded video
    waiting: int = 0  # its rows that wait for a question
    seen_tokens: int | None = None  # what a question runs behind, the mean over the layers; None where it is `held`
    seen: int | None = None
    pooled: int | None = None  # pooled key-values beside the video; None without bi-level decoding
    own: int = 0  # what a question keeps for itself, at most for any video up to this length; 0 if it continues `held`
    most_held: int | None = None  # what is held, at most for any video up to this length; None for `held`
    unpacked: int | None = None  # what is held while it is encoded, if that is packed at the end
    rows: int = 0  # rows of the video that run with each question
    rows_at_once: int | None = None  # how many rows run at once, at most; None for the usual number
    passing: int = 0  # room for rows whose key-values do not stay
    asking: int = 0  # what is there while a question is prepared, and gone while it runs


class InForce:
    """The settings of one call, and the policy of new sequences under them: resolved once, where they are needed."""

    def __init__(self, config):
        self._config = config

    @cached_property
    def settings(self):
        """The `Settings` that the config resolves to now."""
        return self._config.resolve_sparse_attention()

    @cached_property
    def policy(self) -> "SequencePolicy":
        return policy_of(self._config, self.settings.plan)

    @property
    def decoding(self) -> "Decoding":
        """How a question sees the videos in front of it."""
        return DECODINGS[self.settings.decode]

    @property
    def text_only(self) -> bool:
        """Whether of a video nothing but key-values is left, so that only text behind it has outputs."""
        return self.policy.text_only or self.decoding.text_only


@dataclass(frozen=True)
class Call:
    """What one call of `forward` is told beside its tokens.

    Attributes:
        in_force: Settings and policy.
        prompt_length: Positions from here on are generated tokens; None if there are none.
        num_expanded: How many times `generate` repeated each prompt.
        keep_hidden: How many of the last positions' hidden states are wanted; 0 for all.
        dense_chunks: Bi-level decoding: chunks that the caller named, one list a video; None for none.
        required_chunks: Chunks, numbered over all videos, that the automatic choice must include.
        labels: [B, L] what is trained, -100 elsewhere: the question ends where that begins; None if nothing is.
        asked: How many of the first tokens behind the videos are the question; None for all.
        before: Tokens in front of these, without padding; None for all that the cache counts.
    """

    in_force: InForce
    prompt_length: int | None = None
    num_expanded: int = 1
    keep_hidden: int = 0
    dense_chunks: Any = None
    required_chunks: tuple = ()
    labels: Any = None
    asked: int | None = None
    before: int | None = None

    def of_row(self, row: int, layouts: list[VisualLayout]) -> "Call":
        """The call for one of several prompts with these videos."""
        dense, required = self.dense_chunks, self.required_chunks
        if len(layouts) > 1 and dense is not None:
            counts = [len(layout.videos) for layout in layouts]
            if len(dense) != sum(counts):
                raise ValueError(f"dense_chunks must have a list for each of {sum(counts)} videos, got {dense!r:.90}")
            dense = dense[sum(counts[:row]) : sum(counts[: row + 1])]
        if required and isinstance(required[0], tuple):
            required = required[row]
        labels = None if self.labels is None else self.labels[row]
        return replace(self, dense_chunks=dense, required_chunks=required, labels=labels)


@dataclass(frozen=True)
class SequencePolicy:
    """How sequences are run: every token as it comes, by the plan of sparse attention. The base of members' policies.

    A policy is a value; what it notes about a sequence is in the cache. Its methods take the `VideoXLModel`, whose
    parts run the rows.

    Args:
        prefill, chunk_groups, window_chunks: See `VideoXLSparseAttentionConfig`.
    """

    prefill: str = "full"
    chunk_groups: int = 4
    window_chunks: int = 3

    # Whether of a video nothing but key-values is left, so that only text behind it has outputs.
    text_only = False
    # Whether questions are run by its settings, too, so that later ones do not reach a video that was encoded before.
    runs_questions = False
    untrainable = None  # why it cannot be trained; None if it can
    switch = None  # the entry of `facts`, or of the config, that asks for it

    @classmethod
    def apply(cls, config, facts: dict, policy: "SequencePolicy") -> "SequencePolicy":
        """The policy in place of `policy`, where its `switch` is on.

        Args:
            config: The model's.
            facts: What `facts` gave for this sequence, or would give under the settings in force.
            policy: What was asked for so far.
        """
        return cls(**policy.facts())

    @classmethod
    def add_modules(cls, model) -> None:
        """Gives a `VideoXLModel` the modules that this policy's members have."""

    def facts(self) -> dict:
        """What a saved video says of it, ready for JSON."""
        return {name: getattr(self, name) for name in ("prefill", "chunk_groups", "window_chunks")}

    def unit_frames(self, config) -> int:
        """Frames behind which a video can be continued as if it had not ended."""
        return config.frames_per_group

    def require_same(self, other: "SequencePolicy") -> None:
        """Raises ValueError if a sequence under way under this policy cannot go on where another one is asked for."""

    def kept(self, size: SequenceSize, config) -> Kept:
        """What is kept of a sequence, for the planner."""
        return Kept(size.total * size.token_bytes)

    def begin(self, cache: VideoXLCache) -> None:
        """Notes in a cache that was loaded what `extend` would have noted."""
        cache.policy = self

    def extend(self, model, inputs_embeds, layout, cache, keep_hidden=0):
        """Runs further positions of one sequence, segment by segment, into its cache.

        Args:
            model: The `VideoXLModel`.
            inputs_embeds: [1, n, hidden], the positions [layout.length - n, layout.length).
            layout: `VisualLayout` of the whole sequence; it becomes the cache's.
            cache: Holds all earlier positions; extended in place.
            keep_hidden: How many of the last positions' hidden states to return; 0 for all, None for none.

        Returns:
            [1, keep_hidden or n, hidden], after the final norm; None if none were asked for or none exist.
        """
        begin, cache.layout = layout.length - inputs_embeds.shape[1], layout
        steps = plan_prefill(layout, **SequencePolicy.facts(self), start=begin, device=inputs_embeds.device)
        for layer in cache.layers:
            layer.reserve(layout.length)
        positions = torch.arange(begin, layout.length, device=inputs_embeds.device)[None]
        return run_steps(model, inputs_embeds, positions, steps, cache, keep_hidden)

    def waits(self, cache: VideoXLCache) -> bool:
        """Whether something waits for the next question."""
        return cache.waiting is not None

    def settled(self, model, cache: VideoXLCache) -> VideoXLCache:
        """What follows from a cache whatever is asked; the given one is unchanged."""
        return cache

    def ask(self, model, cache, text, call: Call) -> torch.Tensor:
        """Runs text [1, n, hidden] behind a cache of one row, in place; returns its hidden states."""
        return run_text(model, text, cache, before=call.before)

    def decode(self, model, inputs_embeds, attention_mask, position_ids, cache, options) -> BaseModelOutputWithPast:
        """Runs further tokens [B, n, hidden] behind any number of rows, the library's way.

        Args:
            attention_mask: [B, cached and new tokens], or None.
            position_ids: [B, n], or None.
            options: What the language model is told besides, `use_cache` and wanted outputs.
        """
        layer, past = cache.layers[0], cache.get_seq_length()
        new = inputs_embeds.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions_of(attention_mask)[:, past:]
        if layer.row_shift is not None:
            if position_ids is None:
                counted = torch.arange(past, past + new, device=inputs_embeds.device)
                position_ids = counted.expand(inputs_embeds.shape[0], -1)
            position_ids = position_ids - layer.row_shift.to(position_ids.device)[:, None]
        if layer.hidden or layer.row_padding is not None:
            # The keys that are held stand at the end of the logical past: say which of them are padding.
            mask = torch.ones(inputs_embeds.shape[0], past + new, dtype=torch.long, device=inputs_embeds.device)
            if layer.row_padding is not None:
                columns = torch.arange(mask.shape[1], device=mask.device)
                mask[columns < layer.hidden + layer.row_padding.to(mask.device)[:, None]] = 0
            if attention_mask is not None:
                mask[:, past:] = attention_mask[:, past:]
            attention_mask = mask
        return model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE_NAME: cache},
            **options,
        )


class Decoding:
    """How a question sees the videos in front of it: this one, as they are. The base of other ways."""

    text_only = False  # as of `SequencePolicy`

    def waits(self, cache: VideoXLCache) -> bool:
        """Whether the next question changes what is kept."""
        return cache.store is not None

    def kept(self, kept: Kept, size: SequenceSize, settings) -> Kept:
        """What becomes, for the planner, of what a policy keeps."""
        return kept

    def prepare(self, model, cache, question, call: Call) -> None:
        """Makes of a cache of one row, in place, what the question [1, n, hidden] sees."""
        if self.waits(cache):
            cache.unpack(model.device)


# What members and modes add: policies in the order in which they are asked for, and ways of decoding by name.
POLICIES: list[type[SequencePolicy]] = []
DECODINGS: dict[str, Decoding] = {"full": Decoding()}


def policy_of(config, facts: dict) -> SequencePolicy:
    """The policy that a config asks for, see `SequencePolicy.apply`."""
    policy = SequencePolicy(*(facts[name] for name in ("prefill", "chunk_groups", "window_chunks")))
    for kind in POLICIES:
        if facts.get(kind.switch) or getattr(config, kind.switch, None):
            policy = kind.apply(config, facts, policy)
    return policy


def waits_for_question(cache, call: Call) -> bool:
    """Whether something in a cache waits for the next question."""
    return cache.policy is not None and (cache.policy.waits(cache) or call.in_force.decoding.waits(cache))


def require_context(model, tokens: int) -> None:
    """Raises ValueError if a sequence of so many tokens is longer than the model's limit: nothing is ever cut."""
    limit, rope = model.config.resolve_context_limit(), model.config.text_config.rope_parameters
    if rope != model.built_rope:
        raise ValueError(
            f"the model was built with rope parameters {model.built_rope}, and its config now says {rope}: load it "
            "anew with rope_scaling=..."
        )
    if limit is not None and tokens > limit[0]:
        raise ValueError(
            f"the prompt has {tokens} tokens, visual ones included, and this model takes {limit[0]}: {limit[1]}. "
            "Give fewer frames, or raise the limit"
        )


def extend_cache(model, inputs_embeds, layout, cache, policy: SequencePolicy, keep_hidden=0):
    """Runs further positions of one sequence into its cache; see `SequencePolicy.extend`.

    Raises:
        ValueError: If the sequence gets longer than the model's limit, or cannot go on.
    """
    assert cache.get_seq_length() == layout.length - inputs_embeds.shape[1], "the cache must hold what is before"
    require_context(model, layout.length)
    layer = cache.layers[0]
    if layer.hidden != (0 if layer.row_shift is None else int(layer.row_shift)) or cache.choices is not None:
        raise ValueError(
            "a video cannot follow a question that bi-level decoding has answered from pooled key-values; start from "
            "the dense cache"
        )
    if cache.progress is not None:  # it goes on as it began
        cache.policy.require_same(policy)
        policy = cache.policy
    cache.policy = policy
    return policy.extend(model, inputs_embeds, layout, cache, keep_hidden)


def ask(model, cache, text, call: Call) -> torch.Tensor:
    """Runs text [1, n, hidden], of which the first `call.asked` tokens are the question, behind a cache of one row."""
    call.in_force.decoding.prepare(model, cache, text[:, : call.asked], call)
    return cache.policy.ask(model, cache, text, call)


def run_text(model, inputs_embeds, cache, keep_hidden=0, probe=None, before=None) -> torch.Tensor:
    """Runs text behind a cache of one row, dense or mixed; every token sees all that is held.

    Args:
        model: The `VideoXLModel`.
        inputs_embeds: [1, n, hidden].
        cache: It grows by n.
        keep_hidden: See `SequencePolicy.extend`.
        probe: See `AttentionPlan`.
        before: Tokens before these, without padding; None for all that the cache counts.

    Returns:
        [1, keep_hidden or n, hidden], after the final norm.
    """
    positions = positions_after(cache, inputs_embeds.shape[1], before, inputs_embeds.device)
    return run_behind(model, inputs_embeds, cache, keep_hidden, positions, probe=probe)


def run_behind(model, inputs_embeds, cache, keep_hidden, positions=None, **options):
    """Runs rows behind all that a cache of one row holds; by default at the positions of their places in it."""
    held, count = cache.held, inputs_embeds.shape[1]
    if positions is None:
        positions = torch.arange(held, held + count, device=inputs_embeds.device)[None]
    steps = plan_prefill(VisualLayout(length=held + count), "full", 1, 1, start=held)
    return run_steps(model, inputs_embeds, positions, steps, cache, keep_hidden, **options)


def positions_after(cache, count, before=None, device=None) -> torch.Tensor:
    """[1, count] positions of the next tokens behind a cache of one row."""
    layer = cache.layers[0]
    first = layer.get_seq_length() if before is None else before
    if layer.row_shift is not None:
        first -= int(layer.row_shift)
    return torch.arange(first, first + count, device=device)[None]


def run_steps(model, inputs_embeds, positions, steps, cache, keep_hidden=0, probe=None, beacon_places=None):
    """Runs rows [1, n, hidden] by attention steps that cover them, a bounded number at once; returns as `run_text`.

    Args:
        positions: [1, n] rotary positions.
        steps: From `plan_prefill`.
        cache: None for all rows at once without one, in which gradients flow.
        beacon_places: [b] rows that are beacons.
    """
    begin, end = steps[0].start, steps[-1].stop
    keep_from = end if keep_hidden is None else end - keep_hidden if keep_hidden else begin
    offloaded, kept = cache is not None and cache.layers[0].is_offloaded, []
    while steps:
        count = len(steps) if cache is None else _steps_at_once(steps, keep_from, model.segment_tokens)
        segment, steps = steps[:count], steps[count:]
        start, stop = segment[0].start, segment[-1].stop
        places, rows = beacon_places, slice(start - begin, stop - begin)
        if places is not None and (start > begin or stop < end):  # a window larger than a segment
            places = places[(places >= rows.start) & (places < rows.stop)] - rows.start
        unread = cache is not None and stop <= keep_from
        plan = AttentionPlan(segment, probe, cache.layers if offloaded else None, unread, places)
        hidden = model.language_model(
            inputs_embeds=inputs_embeds[:, rows],
            position_ids=positions[:, rows],
            # As the library hands masks to itself: none is to be made.
            attention_mask={"full_attention": None},
            use_cache=cache is not None,
            attention_plan=plan,
            **{CACHE_NAME: cache},
        ).last_hidden_state
        plan.require_followed(range(model.language_model.config.num_hidden_layers))
        if offloaded:
            for layer in cache.layers:
                layer.retire(cache.layout.non_visual, (steps or segment[-1:])[0].window_start)
        if stop > keep_from:
            kept.append(hidden[:, max(keep_from - start, 0) :])
    return torch.cat(kept, dim=1) if kept else None


def _steps_at_once(steps, keep_from, limit) -> int:
    """How many of the next steps make a segment: `limit` tokens at most, all or none of them before `keep_from`."""
    unread = steps[0].stop <= keep_from
    for count, step in enumerate(steps[1:], 1):
        if step.stop - steps[0].start > limit or (step.stop <= keep_from) != unread:
            return count
    return len(steps)


def prefill_rows(model, embeds, rows: list[PromptRow], cache, call: Call) -> BaseModelOutputWithPast:
    """Prefills each prompt [B, L, hidden] by itself; several caches are stacked, padded on the left, into `cache`."""
    single = len(rows) == 1
    if not single and cache.get_seq_length():
        raise ValueError("a cache that already holds tokens can be continued with videos one prompt at a time only")
    past, length, layouts = cache.get_seq_length(), embeds.shape[1], [row.layout for row in rows]
    states, caches = [], []
    for number, row in enumerate(rows):
        row_cache = cache if single else VideoXLCache(len(cache.layers))
        own = embeds[number : number + 1, row.columns]
        states.append(_prefill_row(model, own, row, row_cache, call.of_row(number, layouts)))
        caches.append(row_cache)
    if not single:
        cache.stack(caches, past + length)
    elif length > len(rows[0].columns):
        for layer in cache.layers:
            layer.hidden += length - len(rows[0].columns)
    if call.keep_hidden:
        return _expanded(_pad_left(states), cache, call)
    # Of all columns, or of those from the first on that has an output in some row.
    places = [row.columns[-part.shape[1] :] for row, part in zip(rows, states, strict=True)]
    first = min(int(columns[0]) for columns in places) if call.in_force.text_only else 0
    hidden = embeds.new_zeros(len(rows), length - first, embeds.shape[2])
    for number, (columns, part) in enumerate(zip(places, states, strict=True)):
        hidden[number, columns - first] = part[0].to(hidden.dtype)
    return _expanded(hidden, cache, call)


def _prefill_row(model, embeds, row: PromptRow, cache, call: Call):
    # What a cache that is continued holds already: its visual tokens stay out of the new videos' windows.
    earlier = () if cache.layout is None else cache.layout.videos
    layout = VisualLayout(earlier + row.layout.videos, row.layout.length)
    if not call.in_force.text_only or not layout.videos:
        policy = call.in_force.policy if layout.videos else SequencePolicy()
        return extend_cache(model, embeds, layout, cache, policy, call.keep_hidden)
    begin = layout.length - len(row.columns)
    if layout.end == layout.length:
        raise ValueError("the prompt ends with its video; put a question behind it")
    videos = VisualLayout(layout.videos, layout.end)
    extend_cache(model, embeds[:, : layout.end - begin], videos, cache, call.in_force.policy, keep_hidden=None)
    if call.prompt_length is not None:
        call = replace(call, asked=int((row.columns < call.prompt_length).sum()) + begin - layout.end)
    elif call.labels is not None:  # as when it is asked: the choice of tokens knows the question, not the answer
        answer = (call.labels[row.columns][layout.end - begin :] != -100).nonzero()
        call = replace(call, asked=int(answer[0]) if len(answer) and answer[0] else None)
    return ask(model, cache, embeds[:, layout.end - begin :], call)


def continue_rows(model, embeds, attention_mask, cache, call: Call) -> BaseModelOutputWithPast:
    """Text behind a cache of one row, or several texts [B, n, hidden] behind copies of it."""
    repeats = call.num_expanded  # `generate` has repeated the prompts, not yet the cache
    if cache.rows != 1:
        raise ValueError(
            f"{len(embeds)} prompts cannot follow a cache of {cache.rows} rows; give one prompt a row, or one row"
        )
    embeds, count, past = embeds[::repeats], embeds.shape[1], cache.get_seq_length()
    mask = embeds.new_ones(len(embeds), count) if attention_mask is None else attention_mask[::repeats, -count:]
    asked = None if call.prompt_length is None else call.prompt_length - past
    states, caches = [], []
    for row in range(len(embeds)):
        row_cache = cache if len(embeds) == 1 else cache.fork()
        columns = mask[row].nonzero().flatten()
        own = replace(
            call.of_row(row, [cache.layout]),
            asked=None if asked is None else int((columns < asked).sum()),
            before=None if attention_mask is None else int(attention_mask[row * repeats, :-count].sum()),
        )
        states.append(ask(model, row_cache, embeds[row : row + 1, columns], own))
        caches.append(row_cache)
    if len(embeds) > 1:
        cache.stack(caches, past + count)
    return _expanded(_pad_left(states, count), cache, call)


def _expanded(hidden, cache, call: Call) -> BaseModelOutputWithPast:
    if call.num_expanded > 1:
        cache.batch_repeat_interleave(call.num_expanded)
        hidden = hidden.repeat_interleave(call.num_expanded, dim=0)
    return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE_NAME: cache})


def run_without_cache(model, embeds, rows: list[PromptRow], policy) -> BaseModelOutputWithPast:
    """Sparse prefill of whole prompts [B, L, hidden] at once, without a cache: differentiable, for training."""
    outputs = []
    for number, row in enumerate(rows):
        steps = plan_prefill(row.layout, **SequencePolicy.facts(policy), device=embeds.device)
        positions = torch.arange(row.layout.length, device=embeds.device)[None]
        states = run_steps(model, embeds[number : number + 1, row.columns], positions, steps, None)
        outputs.append(embeds.new_zeros(embeds.shape[1:]).index_copy(0, row.columns, states[0]))
    return BaseModelOutputWithPast(last_hidden_state=torch.stack(outputs))


@contextmanager
def evaluating(model):
    """Meanwhile a model runs as it answers, without dropout and gradient checkpointing; its mode is left as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def prefill_text(model, cache, ids, in_force: InForce):
    """Runs text behind a cached sequence, without outputs.

    Args:
        model: The `VideoXLModel`.
        cache: Extended in place; None starts a sequence.
        ids, in_force: Token ids; settings and policy of the call.

    Returns:
        The cache; its `layout` says where its videos are.
    """
    cache = VideoXLCache(model.config.text_config.num_hidden_layers) if cache is None else cache
    if in_force.settings.offload:
        offload_cache(cache, model.device)
    cache.layout = cache.layout or VisualLayout()
    if ids:
        embeds = model.get_input_embeddings()(torch.tensor([ids], device=model.device))
        layout = VisualLayout(cache.layout.videos, cache.layout.length + len(ids))
        extend_cache(model, embeds, layout, cache, in_force.policy, keep_hidden=None)
    return cache


@torch.no_grad()
def prefill_frames(model, cache, pixels, time_ids, policy, continues=True) -> list[int]:
    """Encodes further frames of a video and runs them behind a cached sequence.

    Args:
        model, cache: See `prefill_text`; the cache is extended in place.
        pixels: [F, 3, H, W]; a partial group is filled by repeating the last frame.
        time_ids: Per group, the token ids of its timestamp.
        policy: How they are run.
        continues: Whether the groups belong to the sequence's last video; else they start a new one.

    Returns:
        The token ids that were appended.
    """
    with evaluating(model):
        tokens = model.get_video_features([pixels]).pooler_output[0]
    ids, groups, position = [], [], cache.layout.length
    for group_ids in time_ids:
        visual_start = position + len(group_ids)
        groups.append(GroupSpan(position, visual_start, visual_start + tokens.shape[1]))
        ids += [*group_ids, *[model.config.video_token_id] * tokens.shape[1]]
        position = groups[-1].end
    earlier = cache.layout.videos
    videos = (*earlier[:-1], earlier[-1] + tuple(groups)) if continues else (*earlier, tuple(groups))
    embeds = model.embed_prompt(torch.tensor([ids], device=model.device))
    is_visual = torch.tensor(ids, device=embeds.device) == model.config.video_token_id
    embeds = embeds.index_put((is_visual[None],), tokens.to(embeds.device, embeds.dtype).flatten(0, 1))
    with evaluating(model):
        extend_cache(model, embeds, VisualLayout(videos, position), cache, policy, keep_hidden=None)
    return ids


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions [B, L] counted over the tokens that are not padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _pad_left(states, length=None) -> torch.Tensor:
    """Stacks hidden states [1, n_i, hidden] of several rows, zero-padded on the left to `length` or the longest."""
    length = max(part.shape[1] for part in states) if length is None else length
    return torch.cat([F.pad(part, (0, 0, length - part.shape[1], 0)) for part in states])
