"""Dropping visual tokens between layers of the language model (VideoChat-Flash, arXiv 2501.00574, public reference
`modeling_qwen2_flash.py`): the stages, what each keeps, and how a sequence goes through them.

What is surprising:
* A stage stands behind some layers. What it drops, later layers never see; what earlier layers hold of it stays. So
  layers hold different numbers of keys, and in each one tokens stand at the positions 0, 1, 2, ... of what it holds.
* A uniform stage needs to know where a video ends, a stage by attention also the question: it keeps what the prompt's
  last token looks at. Until then a sequence waits behind the layers that it has passed, as hidden states
  (`cache.waiting`); later layers hold only the text in front of its videos.
* What a stage keeps is counted from the number of tokens that a video had at first, and rounded down.
* Several videos and images of a prompt go through the stages each by itself, as if it were the only one; softmax and
  positions are over the whole sequence. (The reference takes one video a prompt.)

Layers hold, of a text T, visual tokens 1 to 8 and a question Q, with stages behind 2 and 4 of 6 layers that keep 3/4
and 1/4:

    layers 0, 1     T 1 2 3 4 5 6 7 8 Q
    layers 2, 3     T 1 2 3   5 6 7   Q
    layers 4, 5     T     3     6     Q

n rows (tokens in a layer), V visual tokens of a video, H query heads, K key-value heads, D head size.
"""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from .kv_cache import CACHE_NAME, WaitingRows
from .prefill_videoxl import Kept, SequencePolicy, run_text
from .sparse_attention import AttentionPlan, AttentionStep, VisualLayout, attention_mass, plan_prefill

# How many of the first stages are uniform, by the published names of `llm_compress_type`.
UNIFORM_STAGES = {"attention": 0, "uniform0_attention": 1, "uniform1_attention": 2, "uniform": None}


class DropStage(NamedTuple):
    """Behind the first `layers` layers, int(V * before) tokens of a video become int(V * after)."""

    layers: int
    by_attention: bool
    before: float
    after: float


def uniform_choice(tokens: int, keep: int) -> torch.Tensor:
    """[keep] evenly spread indices of `tokens` tokens, ascending.

    The integer algorithm of `torch.linspace` on a CPU, which rounds otherwise than floating-point ones in places.
    """
    return torch.linspace(0, tokens - 1, keep, dtype=torch.int64, device="cpu")


def best_choice(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """[keep] indices of the largest scores [n], ascending; of equal ones the first are kept."""
    return scores.argsort(descending=True, stable=True)[:keep].sort().values


@dataclass(frozen=True)
class DropProgress:
    """How far a cache's sequence is on its way through the stages. A value: `choose` gives the next one.

    Attributes:
        stages: All of them.
        kept: Per stage that is done, per video the indices [.] among its V tokens that are left, ascending.
    """

    stages: tuple[DropStage, ...]
    kept: tuple[tuple[torch.Tensor, ...], ...] = ()

    @property
    def done(self) -> bool:
        """Whether all stages are done, so that nothing waits."""
        return len(self.kept) == len(self.stages)

    @property
    def next_stage(self) -> DropStage:
        """The stage that the waiting rows stand in front of."""
        return self.stages[len(self.kept)]

    def spans(self, num_layers: int) -> list[range]:
        """The layers in front of each stage, and those behind the last."""
        edges = [0, *(stage.layers for stage in self.stages), num_layers]
        return [range(first, stop) for first, stop in zip(edges, edges[1:], strict=False)]

    def places(self, layout: VisualLayout, begin: int) -> list[torch.Tensor]:
        """Per video, the places [.] of its tokens that are left among the rows that are left.

        Args:
            layout: Of the sequence whose rows from position `begin` on went through the stages.
        """
        videos = _waiting_videos(layout, begin)
        kept = [places[left] for places, left in zip(videos, self.kept[-1], strict=True)] if self.kept else videos
        order = _alive(layout.length - begin, videos, kept).cumsum(0) - 1
        return [order[places] for places in kept]

    def choose(self, layout: VisualLayout, begin: int, rows: int, scores=None) -> tuple["DropProgress", torch.Tensor]:
        """What the next stage keeps: the state behind it, and the places of the rows that stay, ascending.

        Args:
            layout, begin: See `places`.
            rows: Rows that wait.
            scores: [rows] of a stage by attention.
        """
        stage, places, choices = self.next_stage, self.places(layout, begin), []
        for own, original in zip(places, _waiting_videos(layout, begin), strict=True):
            keep = int(len(original) * stage.after)
            assert len(own) == int(len(original) * stage.before), "a stage begins with what the last one left"
            choices.append(best_choice(scores[own], keep) if stage.by_attention else uniform_choice(len(own), keep))
        alive = _alive(rows, places, [own[choice] for own, choice in zip(places, choices, strict=True)])
        if self.kept:
            choices = [kept[choice] for kept, choice in zip(self.kept[-1], choices, strict=True)]
        return replace(self, kept=(*self.kept, tuple(choices))), alive.nonzero().flatten()


def _waiting_videos(layout: VisualLayout, begin: int) -> list[torch.Tensor]:
    """Per video that begins at position `begin` or later, the places of its tokens, counted from there."""
    return [
        torch.cat([torch.arange(group.visual_start, group.end) for group in video]) - begin
        for video in layout.videos
        if video[0].start >= begin
    ]


def _alive(rows: int, videos: list[torch.Tensor], kept: list[torch.Tensor]) -> torch.Tensor:
    """[rows] whether each stays: all but those of videos, and of these the kept ones."""
    alive = torch.ones(rows, dtype=torch.bool)
    alive[torch.cat(videos)] = False
    alive[torch.cat(kept)] = True
    return alive


@dataclass(frozen=True)
class TokenDropping(SequencePolicy):
    """Runs sequences with videos through the stages, and what a stage cannot do without a question when one comes.

    What a cache's `progress` holds is a `DropProgress`; its `waiting` rows stand in front of the next stage.

    Args:
        kind, layers, ratios: See `VideoXLConfig.resolve_llm_compression`.
    """

    kind: str = "uniform"
    layers: tuple[int, ...] = ()
    ratios: tuple[float, ...] = ()

    text_only = runs_questions = True
    switch = "dropping"
    untrainable = (
        "mm_llm_compress, whose choice of tokens depends on where the prompt ends: set it to False for training, as "
        "the published weights were trained"
    )

    @classmethod
    def apply(cls, config, facts, policy):
        dropping = facts["dropping"]
        layers, ratios = (tuple(dropping[name]) for name in ("layers", "ratios"))
        return cls(**policy.facts(), kind=dropping["type"], layers=layers, ratios=ratios)

    @cached_property
    def stages(self) -> tuple[DropStage, ...]:
        """All stages, in order."""
        uniform, ratios = UNIFORM_STAGES[self.kind], self.ratios
        steps = enumerate(zip(self.layers, ratios, ratios[1:], strict=False))
        return tuple(DropStage(n, uniform is not None and number >= uniform, *kept) for number, (n, *kept) in steps)

    def facts(self):
        dropping = {"type": self.kind, "layers": list(self.layers), "ratios": list(self.ratios)}
        return {**super().facts(), "dropping": dropping}

    def kept(self, size, config):
        layers = [len(span) for span in DropProgress(self.stages).spans(size.layers)]
        left = [size.visual, *(int(size.visual * stage.after) for stage in self.stages)]  # in each span of layers
        held = (layers[0] * size.visual + size.layers * size.text) * size.layer_bytes
        seen = sum(n * (size.text + tokens) for n, tokens in zip(layers, left, strict=True)) * size.layer_bytes
        own = seen + left[1] * size.row_bytes  # rows wait behind the first stage, too
        return Kept(held, size.visual * size.row_bytes, seen // size.token_bytes, seen, own=own, rows=left[1])

    def begin(self, cache):
        super().begin(cache)
        cache.progress = DropProgress(self.stages)

    def extend(self, model, inputs_embeds, layout, cache, keep_hidden=0):
        """As the base's; rows from the first video on run up to the first stage, where they wait for the question.

        Raises:
            ValueError: If the cache's sequence went through stages already, or waits in front of other ones.
        """
        state, begin = cache.progress, layout.length - inputs_embeds.shape[1]
        if state is None and layout.end <= begin:
            return super().extend(model, inputs_embeds, layout, cache, keep_hidden)
        if state is None:
            first = next(video[0].start for video in layout.videos if video[0].start >= begin)
            if first > begin:
                run_text(model, inputs_embeds[:, : first - begin], cache, keep_hidden=None)
            inputs_embeds, begin = inputs_embeds[:, first - begin :], first
            state = cache.progress = DropProgress(self.stages)
            cache.waiting = WaitingRows(begin=begin)
        elif cache.waiting is None or state.kept:
            raise ValueError(
                "a video cannot follow text whose visual tokens were dropped already: give the whole prompt, with all "
                "its videos, at once"
            )
        passed = state.spans(len(cache.layers))[0]
        hidden = _run_layers(model, inputs_embeds, cache, passed)
        cache.layout, cache.waiting = layout, cache.waiting.then(hidden[0])
        for layer in cache.layers[passed.stop :]:
            layer.pass_by(hidden.shape[1])
        return None

    def require_same(self, other):
        if self != other and isinstance(other, type(self)):
            raise ValueError(
                "the conversation's earlier video was encoded with other settings of mm_llm_compress and "
                "llm_compress_*: set them back, or begin a new conversation"
            )

    def settled(self, model, cache):
        settled = cache.fork()
        settled.move(model.device)
        _run_stages(model, settled)
        return settled

    def ask(self, model, cache, text, call):
        if cache.progress is None:
            return super().ask(model, cache, text, call)
        return _run_stages(model, cache, text, call.asked)

    def decode(self, model, inputs_embeds, attention_mask, position_ids, cache, options):
        if cache.progress is None:
            return super().decode(model, inputs_embeds, attention_mask, position_ids, cache, options)
        if options.get("output_hidden_states") or options.get("output_attentions"):
            raise ValueError(
                "output_hidden_states and output_attentions do not go with dropped visual tokens, of which layers "
                "hold different numbers; set mm_llm_compress to False"
            )
        return _decode_stages(model, inputs_embeds, attention_mask, cache)


def _run_stages(model, cache, text=None, asked=None):
    """Takes a cache of one row, whose rows wait or are through, to its end in place, and text through all layers.

    Args:
        text: [1, n, hidden] embeddings of what follows; None takes the rows as far as no question is needed.
        asked: How many of them are the prompt's, whose last one scores; by default all.

    Returns:
        [1, n, hidden], after the final norm; None without text.
    """
    state, waiting = cache.progress, cache.waiting
    spans = state.spans(len(cache.layers))
    for span in spans[: len(state.kept) + 1]:
        text = text if text is None else _run_layers(model, text, cache, span)
    while not state.done and not (text is None and state.next_stage.by_attention):
        scores = None
        if state.next_stage.by_attention:
            query = text if asked is None else text[:, :asked]
            if not query.shape[1]:
                raise ValueError("token dropping by attention needs a question: put text behind the video")
            scores = _scores(model, cache, state.next_stage.layers, waiting, query)
        state, places = state.choose(cache.layout, waiting.begin, len(waiting), scores)
        waiting, span = waiting.select(places), spans[len(state.kept)]
        for index in span:
            cache.layers[index].pass_by(-len(places))
        rows = torch.cat([*waiting.parts, *([] if text is None else text)])[None]
        # Behind the last layer nobody reads what waited.
        unread = len(places) if span.stop == len(cache.layers) else 0
        hidden = _run_layers(model, rows, cache, span, unread)
        read = len(places) - unread
        waiting = WaitingRows((hidden[0, :read],), waiting.begin)
        text = text if text is None else hidden[:, read:]
    cache.progress, cache.waiting = state, None if state.done else waiting
    return None if text is None else model.language_model.norm(text)


def _decode_stages(model, embeds, attention_mask, cache) -> BaseModelOutputWithPast:
    """Further tokens [B, n, hidden] behind rows whose stages are done: each layer at its own positions."""
    hidden, count, language_model = embeds, embeds.shape[1], model.language_model
    if count > 1 and attention_mask is not None and not attention_mask[:, -count:].all():
        raise ValueError(
            "several prompts behind a batch whose visual tokens were dropped must be of one length: ask one at a time"
        )
    for span in filter(len, cache.progress.spans(len(cache.layers))):
        layer, mask, plan = cache.layers[span.start], None, None
        positions = torch.arange(layer.held, layer.held + count, device=embeds.device).expand(len(embeds), -1)
        if layer.row_padding is None:
            plan = AttentionPlan([AttentionStep(layer.held, layer.held + count)])
        else:
            padding = layer.row_padding.to(embeds.device)[:, None]
            positions = positions - padding
            columns = torch.arange(layer.get_seq_length() + count, device=embeds.device)
            # Sized by the first of these layers, as the library would by the first of all.
            view = copy.copy(cache)
            view.layers = cache.layers[span.start :]
            mask = create_causal_mask(
                config=language_model.config,
                inputs_embeds=hidden,
                attention_mask=(columns >= layer.hidden + padding).long(),
                **{CACHE_NAME: view},
            )
        hidden = _run_span(language_model, hidden, positions, cache, span, plan, mask)
    return BaseModelOutputWithPast(last_hidden_state=language_model.norm(hidden), **{CACHE_NAME: cache})


def _run_layers(model, rows, cache, span: range, unread=0) -> torch.Tensor:
    """Runs rows [1, n, hidden] behind a cache of one row through layers that hold equally many keys, some at once.

    Returns:
        [1, n - unread, hidden]: without the final norm, and without the first `unread` rows.
    """
    count, kept = rows.shape[1], []
    held = cache.layers[span.start].held if span else 0
    for index in span:
        cache.layers[index].reserve(held + count)
    edges = sorted({*range(0, count, model.segment_tokens), unread, count})
    for begin, stop in zip(edges, edges[1:], strict=False):
        positions = torch.arange(held + begin, held + stop, device=rows.device)[None]
        steps = plan_prefill(VisualLayout(length=held + stop), "full", 1, 1, held + begin)
        plan = AttentionPlan(steps, unread=stop <= unread)
        hidden = _run_span(model.language_model, rows[:, begin:stop], positions, cache, span, plan)
        if begin >= unread:
            kept.append(hidden)
    return torch.cat(kept, dim=1) if kept else rows[:, :0]


def _scores(model, cache, index, waiting, text) -> torch.Tensor:
    """[rows] attention of the text's last token to the rows that wait in front of layer `index`, mean over heads.

    One row of the layer's attention, whose softmax is over the whole sequence: text that the layer holds, waiting
    rows, text behind them.
    """
    language_model = model.language_model
    layer, held = language_model.layers[index], cache.layers[index].held
    attention, keys = layer.self_attn, [cache.layers[index].keys] if held else []
    rows = torch.cat([*waiting.parts, text[0]])[None]
    for begin in range(0, rows.shape[1], model.segment_tokens):
        normed = layer.input_layernorm(rows[:, begin : begin + model.segment_tokens])
        positions = torch.arange(held + begin, held + begin + normed.shape[1], device=normed.device)[None]
        rotary = language_model.rotary_emb(normed, positions)
        key = attention.k_proj(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        keys.append(apply_rotary_pos_emb(key[:, :0], key, *rotary)[1])
    query = attention.q_proj(normed[:, -1:]).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
    query = apply_rotary_pos_emb(query, key[:, :0, :1], *(table[:, -1:] for table in rotary))[0]
    keys = torch.cat([part.to(query.device) for part in keys], dim=2)
    mass = attention_mass(query, keys, attention.scaling) / query.shape[1]
    return mass[held : held + len(waiting)].cpu()


def _run_span(model, hidden, positions, cache, span, plan=None, attention_mask=None) -> torch.Tensor:
    """Some of the host's layers, called as the host calls them."""
    rotary = model.rotary_emb(hidden, positions)
    for index in span:
        hidden = model.layers[index](
            hidden,
            attention_mask=attention_mask,
            position_embeddings=rotary,
            position_ids=positions,
            use_cache=True,
            attention_plan=plan,
            **{CACHE_NAME: cache},
        )
    if plan is not None:
        plan.require_followed(span)
    return hidden


__all__ = ["DropProgress", "DropStage", "TokenDropping", "best_choice", "uniform_choice"]
