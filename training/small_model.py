"""What the small model's stages train: a vision path that tells facts, a language model that reads them.

The published model starts from a tower that has seen billions of pictures and a language model that has read a good
part of the internet. One that starts from nothing is told more than answers:

* `Seeing` asks the visual tokens of a group of frames for its facts directly (`slots.py`), without a language model.
* `Reading` prefills a clip once and asks many questions and conversations, each behind its key-values alone, at the
  positions it would have in a conversation of its own. Visual tokens are made from what a clip shows, with noise, or
  are those of its frames. Heads that are thrown away ask at them for the story so far (`slots.story_of`), and heads of
  attention are told where to look (`looks.py`).

B clips in a batch, R rows of questions, P positions of a clip's prompt, L of the longest row, G groups, T frames a
group, N visual tokens a group, K facts a token, C width, n positions that are left of a mixed prompt, S image side.
"""

from collections import defaultdict
from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from videoxl.training.collator import IGNORE
from videoxl.training.looks import Queries
from videoxl.training.slots import FRAMES, NUM_SLOTS, PATCH, SIGN, STARTS, STORY, SlotCode, confused, shows, told_right

# What the installed transformers calls a cache that is given to a language model.
CACHE_NAME = "cache" if "cache" in signature(Qwen2Model.forward).parameters else "past_key_values"
# A fact of a slot that shows nothing, or of a story that tells nothing yet.
EMPTY_WEIGHT = 0.1
# In the loss of `Seeing` what tokens hold beside facts.
BESIDE_WEIGHT = 0.1
# Squared distances hardly tell look-alikes apart; so where there is a fact of a kind, cross-entropy counts, too.
CONFUSED_WEIGHT = 0.5
# Beside them what patches show, where slots look, and where shapes stand.
PATCH_WEIGHT, GAZE_WEIGHT, PLACE_WEIGHT = 2.0, 2.0, 10.0
# In the loss of `Reading`, beside the answers.
STORY_WEIGHT, LOOK_WEIGHT = 0.3, 0.5
# Of visual tokens that are made from facts: noise, and the share of the facts that are not told.
NOISE, LOST = 0.1, 0.02
EMBEDDING_SCALE = 5.0
# Of the story, what are numbers; the waves that write numbers; and the layers whose visual tokens are asked for it.
NUMBERS = ("time", "first", "begin", "gone", "length")
PERIODS = (2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 1024)
EARLY, STORY_LAYER = {"time": 0, "before": 1}, 2


class Seeing(nn.Module):
    """A model's vision path, whose tokens should tell facts.

    Three things are asked for on the way, since the loss of the tokens alone is a slow teacher of what stands where:
    each patch of the tower should tell what it shows, what the compressor puts into a shape's slot should tell where
    it stands in each frame (two heads that are thrown away), and the cells from which a slot's token is made should
    look at the cells in which its thing stands, in the compressor's first attention.

    Args:
        model: A Video-XL model with DTS; its language model is left alone.
    """

    def __init__(self, model):
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.compressor = model.model.compressor
        self.multi_modal_projector = model.model.multi_modal_projector
        self.encode = model.get_video_features
        self.code = SlotCode(model.config.text_config.hidden_size)
        self.vision_tower.post_layernorm.requires_grad_(False)  # not on the path
        self.patch_head = nn.Linear(model.config.vision_config.hidden_size, sum(PATCH.values()))
        self.place_head = nn.Linear(model.config.compressor_config.hidden_size, 2 * FRAMES)
        self.pool = model.config.compressor_config.projector_pool_size
        self.taken = {}
        asked = {"patches": self.compressor, "cells": self.compressor.encoder[0], "merged": self.multi_modal_projector}
        for name, module in asked.items():
            module.register_forward_pre_hook(lambda _, given, name=name: self.taken.__setitem__(name, given[0]))

    def forward(self, pixels, facts, patches, places) -> dict:
        """The loss of G groups, and how much of it is told right.

        Args:
            pixels: [G, T, 3, S, S].
            facts: See `facts_of`, [G, N, K].
            patches: See `patches_of`, [G, T, P, 8] with P patches.
            places: See `places_of`, [G, shapes, T, 2].
        """
        # bfloat16 takes two thirds of the time here, where processors have it, and none of the precision.
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
            tokens = torch.cat(self.encode(pixels).pooler_output)
            told_by_patches = self.patch_head(self.taken["patches"])
            shares, told_places = self._shares(patches), self._places()
        tokens = tokens.float()
        told = self.code.facts(tokens)
        beside = (tokens - self.code.tokens(told)) / self.code.loudness
        weight = torch.where(shows(facts)[..., None], 1.0, EMPTY_WEIGHT).expand_as(facts).clone()
        weight[..., STARTS["frames"] : STARTS["frames"] + FRAMES] = 1.0
        loss = (weight * (told - facts).square()).sum() + BESIDE_WEIGHT * beside.square().sum()
        loss = (loss + CONFUSED_WEIGHT * confused(told, facts)) / len(facts)
        kinds = told_right(told.detach(), facts)
        result = kinds | {"right": sum(kinds.values()) / len(kinds)}
        if len(shares):
            loss = loss - GAZE_WEIGHT * shares.clamp(min=1e-6).log().mean()
            result["look"] = shares.mean().item()
        shown = places.isfinite()
        if shown.any():
            off = (told_places.float() - places)[shown].abs()
            loss, result["off"] = loss + PLACE_WEIGHT * off.mean(), off.detach().mean().item()
        asked = zip(
            PATCH, told_by_patches.float().split(list(PATCH.values()), dim=-1), patches.unbind(-1), strict=True
        )
        for kind, logits, wanted in asked:
            logits, wanted = logits.flatten(0, -2), wanted.flatten()
            # What shows nothing is most of a frame.
            counts = torch.where(wanted == PATCH[kind] - 1, EMPTY_WEIGHT, 1.0)
            losses = F.cross_entropy(logits, wanted, reduction="none")
            loss = loss + PATCH_WEIGHT * (counts * losses).sum() / counts.sum()
            there = wanted != PATCH[kind] - 1
            if there.any():
                result[f"patch/{kind}"] = (logits.argmax(dim=-1) == wanted)[there].float().mean().item()
        return {"loss": loss, "told": result}

    def _places(self):
        """Where each shape stands by its slot, [G, shapes, T, 2]."""
        merged = self.taken["merged"]
        side = int(merged.shape[1] ** 0.5)
        slots = F.avg_pool2d(merged.transpose(1, 2).unflatten(2, (side, side)), self.pool).flatten(2)
        return self.place_head(slots.transpose(1, 2)[:, :SIGN]).unflatten(2, (FRAMES, 2))

    def _shares(self, patches):
        """How much of its attention a slot's cells give to the cells where its thing stands, of all that show one."""
        module, cells = self.compressor.encoder[0], self.taken["cells"]
        normed = module.norm(cells)
        query, key = (layer(normed).flatten(3).permute(0, 2, 3, 1).float() for layer in (module.q, module.k))
        shares = (query @ key.transpose(2, 3) * module.scale).softmax(dim=-1)  # [G, time, cells, cells]
        shapes = torch.arange(SIGN, device=patches.device)
        stands = (patches[..., None, 0] == shapes).any(dim=1).transpose(1, 2)  # [G, shapes, cells]
        on_card = patches[..., 4] == 0
        sign = ((patches[..., 3] != PATCH["text"] - 1) & ~on_card).any(dim=1)
        stands = torch.cat([stands, sign[:, None]], dim=1)
        side = int(stands.shape[-1] ** 0.5)
        # A token is the mean of two by two cells.
        of_slot = torch.arange(side**2, device=patches.device)
        of_slot = of_slot // side // 2 * (side // 2) + of_slot % side // 2
        group, slot = stands.any(dim=-1).nonzero(as_tuple=True)
        own = of_slot == slot[:, None]  # [things, cells]
        looked = (shares[group] * stands[group, slot][:, None, None]).sum(dim=-1).mean(dim=1)
        return (looked * own).sum(dim=-1) / own.sum(dim=-1)


def number_codes(count: int) -> torch.Tensor:
    """Numbers 0 .. count - 1 as waves, so that neighbours are near each other and none are alike. [count, 22]."""
    numbers = torch.arange(count, dtype=torch.float64)[:, None]
    angles = 2 * torch.pi * numbers / torch.tensor(PERIODS, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class NumberHead(nn.Module):
    """Logits of the numbers 0 .. classes - 2 by their codes, and of "none". [..., C] -> [..., classes]."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.register_buffer("codes", number_codes(classes - 1), persistent=False)
        self.linear = nn.Linear(width, self.codes.shape[1] + 1)

    def forward(self, hidden):
        code, none = self.linear(hidden).split([self.codes.shape[1], 1], dim=-1)
        return torch.cat([code @ self.codes.T, none], dim=-1)


@torch.no_grad()
def set_positions(model) -> None:
    """A new tower's positions as waves across and down, so that to look at a neighbour is the same from everywhere."""
    weight = model.model.vision_tower.get_parameter(
        next(name for name, _ in model.model.vision_tower.named_parameters() if "position_embedding" in name)
    )
    side = int(len(weight) ** 0.5)
    codes = number_codes(side)[:, [0, 1, 2, 3, 4, 11, 12, 13, 14, 15]]  # the waves that are no longer than a row
    codes = torch.cat([codes.repeat_interleave(side, 0), codes.repeat(side, 1)], dim=1)
    generator = torch.Generator().manual_seed(2)
    directions, _ = torch.linalg.qr(torch.randn(weight.shape[1], codes.shape[1], generator=generator))
    size = weight.std() * weight.shape[1] ** 0.5
    weight.copy_(size * codes / codes.shape[1] ** 0.5 * 2**0.5 @ directions.T + 0.1 * weight)


@torch.no_grad()
def set_embeddings(model, tokenizer) -> None:
    """A new model's embeddings: louder, of numbers by their codes (neighbours are alike), of words like their facts.

    What a visual token tells and what is said about it are alike from the start, so that heads can compare and copy.

    Args:
        model: The model, with random weights.
        tokenizer: Its tokenizer, in which numbers and the names of facts are single tokens.
    """
    weight = model.get_input_embeddings().weight
    weight.mul_(EMBEDDING_SCALE)
    size = weight.std() * weight.shape[1] ** 0.5
    codes = number_codes(1000)
    generator = torch.Generator().manual_seed(1)
    directions, _ = torch.linalg.qr(torch.randn(weight.shape[1], codes.shape[1], generator=generator))
    codes = codes / codes.shape[1] ** 0.5 * 2**0.5 @ directions.T
    for number in range(len(codes)):
        for text in (f" {number}", f"{number}"):
            ids = tokenizer.encode(text)
            if len(ids) == 1:
                weight[ids[0]] = size * codes[number] + 0.3 * weight[ids[0]]
    for word, direction in SlotCode(weight.shape[1]).words().items():
        for text in (f" {word}", word):
            ids = tokenizer.encode(text)
            if len(ids) == 1:
                # A digit is both: a number, and a text on a card.
                weight[ids[0]] = size * direction + (0.7 if word.isdigit() else 0.3) * weight[ids[0]]


class Reading(nn.Module):
    """A model that reads clips and answers, with heads for the story.

    Args:
        model: A Video-XL model. Its vision path is left alone.
        look: [layer, head] for each kind of `looks.LOOKS`: it should look where an answer is best read.
    """

    def __init__(self, model, look: dict):
        super().__init__()
        self.config, self.look = model.config, look
        self.language_model = model.model.language_model
        self.encode = model.get_video_features
        width = model.config.text_config.hidden_size
        self.code = SlotCode(width)
        self.story_norm = nn.RMSNorm(width)
        self.story_heads = nn.ModuleDict(
            {
                kind: NumberHead(width, classes) if kind in NUMBERS else nn.Linear(width, classes)
                for kind, classes in STORY.items()
            }
        )

    def forward(self, ids, positions, facts, asked, window=0, story=None, pixels=None, mix=None) -> dict:
        """The loss of a batch (see `ClipBatches`), which answers are right per type, and how well the rest is told."""
        tokens = self.tokens(facts) if pixels is None else self.see(pixels)
        embeds = self.language_model.embed_tokens(ids)
        visual = ids == self.config.video_token_id
        embeds = embeds.masked_scatter(visual[..., None], tokens.flatten(0, 2).to(embeds.dtype))
        cache = DynamicCache()
        output = self.language_model(
            inputs_embeds=embeds,
            attention_mask=self._window(visual, window) if window else None,
            position_ids=positions,
            **{CACHE_NAME: cache},
            use_cache=True,
            output_hidden_states=True,
        )
        loss, told = self._story(output.hidden_states[1:], visual, story or {})
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        if mix is not None:
            layers, positions, visual = self._mix(layers, positions, mix), self._compact(mix), None
        hits, shares, said, answers = defaultdict(list), defaultdict(list), defaultdict(list), []
        for part in asked:
            self._ask(part, layers, positions, visual, hits, shares, said, answers)
        logits, targets = (torch.cat(parts) for parts in zip(*answers, strict=True))
        loss = loss + F.cross_entropy(logits, targets)
        for kind, found in shares.items():
            found = torch.cat(found)
            if len(found):
                loss = loss - LOOK_WEIGHT * found.clamp(min=1e-6).log().mean()
                told[f"look/{kind}"] = found.mean().item()
        for kind, parts in said.items():
            logits, words = (torch.cat(part) for part in zip(*parts, strict=True))
            loss = loss + LOOK_WEIGHT * F.cross_entropy(logits, words)
            told[f"said/{kind}"] = (logits.argmax(dim=-1) == words).float().mean().item()
        return {"loss": loss, "hits": dict(hits), "told": told}

    def _story(self, hidden_states, visual, story):
        loss, told = visual.new_zeros((), dtype=torch.float32), {}
        for kind, target in story.items():
            hidden = self.story_norm(hidden_states[EARLY.get(kind, STORY_LAYER)][visual])
            logits, target = self.story_heads[kind](hidden), target.flatten()
            there = target != STORY[kind] - 1
            counts = torch.where(there, 1.0, EMPTY_WEIGHT)
            losses = F.cross_entropy(logits, target, reduction="none")
            loss = loss + STORY_WEIGHT * (counts * losses).sum() / counts.sum()
            if there.any():
                told[f"story/{kind}"] = (logits.argmax(dim=-1) == target)[there].float().mean().item()
        return loss, told

    def _ask(self, part, layers, positions, visual, hits, shares, said, answers):
        """Runs rows of questions behind their clips; what comes of it is added to the last four."""
        rows, labels, length = part["rows"], part["labels"], part["ids"].shape[1]
        behind = DynamicCache()
        for number, (keys, values) in enumerate(layers):
            behind.update(keys[rows], values[rows], number)
        places = positions[rows, -1:] + 1 + torch.arange(length, device=rows.device)
        with Queries(self.language_model, self.look, length) as queries:
            hidden = self.language_model(
                input_ids=part["ids"], position_ids=places, use_cache=True, **{CACHE_NAME: behind}
            ).last_hidden_state
        for kind in self.look.keys() & part["looks"].keys():
            looks = part["looks"][kind]
            where = looks["rows"], looks["place"], looks["look"]
            found = queries.shares(kind, places, behind, None if visual is None else visual[rows], *where)
            for name, share in zip((kind, f"pooled {kind}"), found, strict=False):
                shares[name].append(share)
            if "word" in looks:
                # An option has to know its letter, and the question's end what it looks for, before it is chosen.
                among = looks.get("among", slice(None))
                said[kind].append((queries.said(looks["rows"], looks["place"], among), looks["word"]))
        wanted = labels[:, 1:] != IGNORE
        logits = hidden[:, :-1][wanted] @ self.language_model.embed_tokens.weight.T
        targets = labels[:, 1:][wanted]
        answers.append((logits, targets))
        wrong = part["owners"][:, 1:][wanted][logits.detach().argmax(dim=-1) != targets]
        right = torch.ones(len(part["types"]), dtype=torch.bool)
        right[wrong.cpu()] = False
        for kind, hit in zip(part["types"], right.tolist(), strict=True):
            hits[kind].append(hit)

    def _window(self, visual, window):
        """What streaming prefill lets each position see, bool [1, 1, P, P]: not the visual tokens of chunks long ago.

        Without having learnt with it, a model misreads a sixth of the cards behind the first window.

        Args:
            visual: Which positions hold visual tokens, [B, P], the same in all rows.
            window: In chunks.
        """
        seen = visual[0].cumsum(0)
        group = (seen - visual[0].long()).div(NUM_SLOTS, rounding_mode="floor")
        chunk = group.div(self.config.resolve_sparse_attention().chunk_groups, rounding_mode="floor")
        far = chunk[:, None] - chunk[None] > window
        return (~(far & visual[0])).tril()[None, None]

    def _compact(self, mix):
        return torch.arange(mix.shape[1], device=mix.device).expand(len(mix), -1)

    def _mix(self, layers, positions, mix):
        """Key-values of which some are pooled over their group, at the positions that bi-level decoding gives them.

        Args:
            layers: Per layer keys and values, [B, heads, P, D].
            positions: Of the keys, [B, P].
            mix: What each kept position is made of, [B, n, P].
        """
        mixed = []
        frequencies = self.language_model.rotary_emb.inv_freq
        for keys, values in layers:
            keys = mix[:, None] @ _turned(keys, -positions, frequencies)
            mixed.append((_turned(keys, self._compact(mix), frequencies), mix[:, None] @ values))
        return mixed

    def tokens(self, facts):
        """Visual tokens that tell facts, with noise and gaps while it trains. [B, G, N, K] -> [B, G, N, C]."""
        if not self.training:
            return self.code.tokens(facts)
        lost = torch.rand_like(facts) < LOST
        lost[..., :NUM_SLOTS] = False
        tokens = self.code.tokens(facts.masked_fill(lost, 0) + NOISE * torch.randn_like(facts))
        return tokens + 0.3 * NOISE * self.code.loudness * torch.randn_like(tokens)

    @torch.no_grad()
    def see(self, pixels):
        """Visual tokens of frames. [B, F, 3, S, S] -> [B, G, N, C]."""
        return torch.stack(list(self.encode(pixels).pooler_output))


def _turned(keys, positions, frequencies):
    """Keys turned on by positions (back, if these are negative). [B, heads, L, D], [B, L] -> [B, heads, L, D]."""
    angles = positions[:, None, :, None].double() * frequencies.double()
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = keys.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
