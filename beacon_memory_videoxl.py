"""Beacon memory (Video-XL, arXiv 2409.14485): windows of visual tokens, of which only their beacons' key-values stay.

What is surprising, all of it what the published weights were trained with (public reference `modeling_beacon.py`,
`modeling_qwen.py`):
* A window is its visual tokens with one beacon after every r of them. All beacons are the same embedding; in every
  layer they have projections of their own for queries, keys and values, and share the rest.
* Attention is causal over memory and window, nothing else is hidden: beacons see all earlier visual tokens of their
  window, and later visual tokens see the beacons. So memory and window are one sequence with positions 0, 1, 2, ...
* When the window is done only its beacons' key-values stay, moved up behind the memory. Text is never compressed.

A window of 6 visual tokens v at r = 3 behind a memory of 2, its positions and what becomes of them:

    window      v1 v2 v3 B1 v4 v5 v6 B2
    positions    2  3  4  5  6  7  8  9
    afterwards            2           3

n visual tokens of a window, b beacons, r visual tokens per beacon, H the language model's width.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, apply_rotary_pos_emb

from .kv_cache import CACHE_NAME
from .prefill_videoxl import Kept, SequencePolicy, run_behind, run_text
from .sparse_attention import follow_plan


class BeaconWindow(NamedTuple):
    """Visual tokens [start, stop) of a video; a beacon after the first `first` and every further `ratio` of them."""

    start: int
    stop: int
    ratio: int
    first: int

    @property
    def count(self) -> int:
        """Beacons; the tokens behind the last one are seen by nobody later."""
        return max((self.stop - self.start - self.first) // self.ratio + 1, 0)

    def places(self, device) -> torch.Tensor:
        """[b] places of the beacons in the window of n + b rows."""
        return self.first + torch.arange(self.count, device=device) * (self.ratio + 1)

    def interleave(self, visual: torch.Tensor, beacon: torch.Tensor) -> torch.Tensor:
        """The window's rows [n + b, H] from its visual tokens [n, H] and the beacon's embedding [1, H]."""
        is_beacon = torch.zeros(len(visual) + self.count, dtype=torch.bool, device=visual.device)
        is_beacon[self.places(visual.device)] = True
        source = torch.where(is_beacon, len(visual), (~is_beacon).cumsum(0) - 1)
        return torch.cat([visual, beacon.to(visual)]).index_select(0, source)


def plan_windows(tokens: int, window: int, ratios, mix: str, seed: int) -> list[BeaconWindow]:
    """The windows of a video.

    Args:
        tokens: Its visual tokens.
        window: Tokens in a window; the last one may be shorter.
        ratios, mix, seed: See `VideoXLConfig.resolve_beacons`. A single ratio holds for every window, and a remainder
            is carried into the next one; of several, those that divide a window evenly are candidates for it (none:
            ValueError). A plan of more tokens begins with the same full windows.
    """
    generator, windows, carried, candidates, ratio = np.random.default_rng(seed), [], 0, [], None
    for start in range(0, tokens, window):
        stop = min(start + window, tokens)
        if len(ratios) == 1:
            ratio = ratios[0]
        elif not windows or mix == "step-random":
            candidates = [r for r in ratios if (stop - start) % r == 0]
            if not candidates:
                raise ValueError(
                    f"none of beacon_ratio={list(ratios)} divides a window of {stop - start} visual tokens; add one "
                    "that does, or give a single ratio"
                )
            ratio = candidates[0] if mix == "sequence" else int(generator.choice(candidates))
        elif mix == "sequence":
            ratio = candidates[len(windows) % len(candidates)]
        windows.append(BeaconWindow(start, stop, ratio, max(ratio - carried, 1)))
        carried = (carried + stop - start) % ratio
    return windows


class VideoXLBeaconAttention(Qwen2Attention):
    """Qwen2's attention, in which some rows may be beacons with projections of their own."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        for name in ("q_proj", "k_proj", "v_proj"):
            ordinary = getattr(self, name)
            setattr(self, f"beacon_{name}", nn.Linear(ordinary.in_features, ordinary.out_features, bias=True))

    def forward(self, hidden_states, position_embeddings, attention_mask=None, attention_plan=None, **kwargs):
        """As the host's; the plan says which rows of `hidden_states` [1, n + b, H] are beacons."""
        # override: the host has no place at which rows of one call could be projected differently
        beacon_places = None if attention_plan is None else attention_plan.beacon_places
        if beacon_places is None:
            kwargs["attention_plan"] = attention_plan
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        beacons = hidden_states.index_select(1, beacon_places)

        def project(ordinary, own):
            states = ordinary(hidden_states).index_copy(1, beacon_places, own(beacons))
            return states.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

        query, key = apply_rotary_pos_emb(
            project(self.q_proj, self.beacon_q_proj), project(self.k_proj, self.beacon_k_proj), *position_embeddings
        )
        value = project(self.v_proj, self.beacon_v_proj)
        key, value = kwargs[CACHE_NAME].update(key, value, self.layer_idx)
        dropout = self.attention_dropout if self.training else 0.0
        output = follow_plan(self, query, key, value, attention_plan, dropout, self.scaling)
        return self.o_proj(output.flatten(2)), None


@dataclass(frozen=True)
class BeaconMemory(SequencePolicy):
    """Runs text as it is and videos window by window, of which only the beacons' key-values stay.

    Args:
        window, ratios, mix, seed: See `plan_windows`.
    """

    window: int = 0
    ratios: tuple[int, ...] = ()
    mix: str = "step-random"
    seed: int = 42

    text_only = True
    switch = "beacons"

    @classmethod
    def apply(cls, config, facts, policy):
        beacons = facts["beacons"]
        return cls(**policy.facts(), **{**beacons, "ratios": tuple(beacons["ratios"])})

    @classmethod
    def add_modules(cls, model):
        if model.config.beacon_window is not None:
            model.beacon_embed_tokens = nn.Embedding(1, model.config.text_config.hidden_size)
            for index, layer in enumerate(model.language_model.layers):
                layer.self_attn = VideoXLBeaconAttention(model.language_model.config, index)

    @property
    def _windows(self) -> dict:
        return {"window": self.window, "ratios": list(self.ratios), "mix": self.mix, "seed": self.seed}

    def facts(self):
        return {**super().facts(), "beacons": self._windows}

    def unit_frames(self, config):
        return (
            self.window // math.gcd(self.window, config.compressor_config.tokens_per_group) * config.frames_per_group
        )

    def kept(self, size, config):
        # Text and beacons stay, and for a moment the key-values of a window.
        windows = plan_windows(size.visual, **self._windows)
        held = size.text + sum(window.count for window in windows)
        longest = min(size.visual, self.window)
        most = longest // min(self.ratios) + 1
        rows, held_bytes = longest + most, held * size.token_bytes
        return Kept(
            held_bytes,
            seen_tokens=held,
            seen=held_bytes,
            # With several ratios a last, partial window may leave more beacons than it does once it is full.
            most_held=held_bytes + (most - windows[-1].count) * size.token_bytes,
            rows_at_once=rows,
            passing=rows * (size.token_bytes + 2 * size.row_bytes),
        )

    def extend(self, model, inputs_embeds, layout, cache, keep_hidden=0):
        begin = cursor = layout.length - inputs_embeds.shape[1]
        cache.layout = layout
        # Through the module, whose weight may be offloaded.
        beacon = model.beacon_embed_tokens(torch.zeros(1, dtype=torch.long, device=inputs_embeds.device))
        inv_freq = model.language_model.rotary_emb.inv_freq
        for video in layout.videos:
            start, end = video[0].start, video[-1].end
            if end <= begin:
                continue
            assert video[0].visual_start == start, "windows hold visual tokens only"
            if start > cursor:
                run_text(model, inputs_embeds[:, cursor - begin : start - begin], cache, keep_hidden=None)
            for window in plan_windows(end - start, **self._windows):
                first, last = start + window.start - begin, start + window.stop - begin
                if last <= 0:
                    continue
                assert first >= 0, "a window that grows is run anew from its start"
                places = window.places(inputs_embeds.device)
                rows = window.interleave(inputs_embeds[0, first:last], beacon)
                run_behind(model, rows[None], cache, None, beacon_places=places)
                for layer in cache.layers:
                    layer.keep_of_last(len(rows), places, window.stop - window.start, inv_freq)
            cursor = end
        behind = inputs_embeds[:, cursor - begin :]
        return run_text(model, behind, cache, keep_hidden) if cursor < layout.length else None


__all__ = ["BeaconMemory", "BeaconWindow", "plan_windows"]
