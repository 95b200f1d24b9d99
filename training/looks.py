"""Where heads of attention should look while a small language model learns to read.

Of many questions it is known where in the prompt their answer is best read: on a card, in a shape's slot, at the right
one of several options. A head that is told so finds the way in a few hundred steps; the loss of the answer alone is a
slow teacher of where to look (`small_model.py`, `look`).

R questions, L of the longest, P positions of a clip's prompt, G groups, T frames a group, N visual tokens a group,
M looks.
"""

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from videoxl.training.slots import CARD, NUM_SLOTS, SIGN
from videoxl.video_world import SHAPES
from videoxl.video_world.questions import LETTERS

# Questions by where their answer is to be seen: on a card, in a shape's slot where it stands or once it was seen.
ONE_CARD, TWO_CARDS, SHAPE_SEEN = ("needle", "two_hop", "when_card"), ("card_first",), ("shape", "between")
SHAPE_KNOWN = ("color", "change", "size", "motion", "direction", "when_gone", "duration", "times", "exists")
SIGNS = ("sign_word", "sign_digit")
TWO_SHAPES = ("first", "longer")
LOOKS = ("card", "shape", "letter", "choice")
OF_VIDEO = LOOKS[:2]


def looks_of(question, groups, visual) -> list[tuple[str, str, np.ndarray]]:
    """Where a question is best answered from, if its answer is to be seen in one or two places.

    Args:
        question: A `video_world.Question`.
        groups: Seconds of the frames, [G, T].
        visual: Which positions of the prompt hold visual tokens, bool [P].

    Returns:
        Of each look one of `LOOKS`, what is read last before it (the question's text up to there; "" for all of it,
        "article" for the answer's first word, "answer" for all but its last one) and positions of the prompt to look
        at, bool [P].
    """

    def places(slots, chosen) -> np.ndarray:
        wanted = np.zeros((len(groups), NUM_SLOTS), bool)
        wanted[np.ix_(chosen, np.isin(np.arange(NUM_SLOTS), slots))] = True
        result = np.zeros(len(visual), bool)
        result[visual] = wanted.reshape(-1)
        return result

    def during(span):
        return ((groups >= span[0]) & (groups < span[1])).any(axis=1)

    def since(second):
        later = groups[:, -1] >= second
        later[-1] = True
        return later

    evidence, kind = question.evidence, question.type
    text = question.text.partition("\n")[0].rstrip("?.")
    # Open answers begin with an article.
    words, answer = (("", "article"), question.answer) if question.choices is None else (("",), option_of(question))
    named = [SHAPES.index(word) for word in text.replace(",", "").split() if word in SHAPES]
    if kind == "absent_card":
        # No card fits: the head looks at what stands before the video, where it finds nothing.
        return [("card", "", ~visual & (visual.cumsum() == 0))]
    if kind in ("absent", "absent_sign"):
        return [("shape", "", places(named[:1] or (SIGN,), since(np.inf)))]
    if kind in ONE_CARD:
        return [
            ("card", begin, places(CARD, during(span))) for begin, span in zip(("", "answer"), evidence, strict=False)
        ]
    if kind in TWO_CARDS:
        # At each card's name: before " or ", and at the question's end.
        begins = text[: text.index(" or ")], text
        looks = [("card", begin, places(CARD, during(span))) for begin, span in zip(begins, evidence, strict=True)]
        return [*looks, *(("shape", word, places(CARD, during(min(evidence)))) for word in words)]
    if kind in SHAPE_SEEN:
        return [("shape", "", places((SHAPES.index(answer.split()[-1]),), during(evidence[0])))]
    if kind == "when":
        return [("shape", "", places(named[:1], during(evidence[0])))]
    if kind in SIGNS:
        return [("shape", "", places((SIGN,), during(evidence[0])))]
    if kind in SHAPE_KNOWN:
        # A second before the end of the last span: what ends there is known a group later, or at the end.
        second = evidence[-1][0] if kind in ("color", "size") else evidence[-1][1] - 1
        return [("shape", "", places(named[:1], since(second)))]
    if kind in TWO_SHAPES:
        # A head that prefers what is earlier, or longer, has compared.
        slot = SHAPES.index(answer.split()[-1])
        second = evidence[named.index(slot)][0] if kind == "first" else max(max(evidence))
        return [("shape", word, places((slot,), since(second))) for word in words]
    return []


def option_of(question) -> str:
    """The right one of a question's options."""
    return question.choices[LETTERS.index(question.answer)]


def option_lines(question) -> list[tuple[str, str, str]]:
    """Of each option of a question the text up to its letter, up to its words, and to their end."""
    lines, begin = [], 0
    for letter in LETTERS[: len(question.choices)]:
        begin = question.text.index(f"\n{letter}. ", begin) + 2
        stop = question.text.index("\n", begin)
        lines.append((question.text[:begin], question.text[: begin + 1], question.text[:stop]))
    return lines


class Queries:
    """Takes queries of attention while a language model runs, to say where its heads look.

    Args:
        language_model: A Qwen2 model.
        heads: (layer, head) of each kind of `LOOKS`.
        length: L of the rows that are run.
    """

    def __init__(self, language_model, heads: dict, length: int):
        self.model, self.heads, self.length = language_model, heads, length
        self.taken, self.before_choice, self.hooks = {}, None, []

    def __enter__(self):
        for layer in {layer for layer, _ in self.heads.values()}:
            module = self.model.layers[layer].self_attn.q_proj
            self.hooks.append(
                module.register_forward_hook(lambda _, given, out, layer=layer: self.taken.__setitem__(layer, out))
            )
        if "choice" in self.heads:
            module = self.model.layers[self.heads["choice"][0]]
            self.hooks.append(module.register_forward_pre_hook(self._take_before_choice))
        return self

    def _take_before_choice(self, _, given):
        self.before_choice = given[0]

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def shares(self, kind, positions, cache, visual, rows, place, look) -> list[torch.Tensor]:
        """The share of a head's attention that goes where it should, and to the right groups if keys were pooled.

        The second is what chooses chunks in bi-level decoding. In the question there is nothing to pool, nor in front
        of the video.

        Args:
            kind: Of `heads`.
            positions: Of the questions, [R, L].
            cache: Key-values of prompts and questions.
            visual: Which positions of the prompts hold visual tokens, bool [R, P]; None if some are pooled already.
            rows: Of the R, [M].
            place: In the question, from which the head looks, [M].
            look: Where it should look in prompt and question, bool [M, P + L].

        Returns:
            One or two tensors [M].
        """
        (layer, head), config = self.heads[kind], self.model.config
        keys = cache.layers[layer].keys[rows]
        keys = keys[:, head * keys.shape[1] // config.num_attention_heads]
        query = self.taken[layer][rows, place].unflatten(-1, (config.num_attention_heads, -1))[:, None, None, head]
        cos, sin = self.model.rotary_emb(query, positions[rows, place][:, None])
        query = apply_rotary_pos_emb(query, query, cos, sin)[0][:, 0, 0] * query.shape[-1] ** -0.5
        logits = (keys @ query[..., None])[..., 0]
        prompt = keys.shape[1] - self.length
        later = torch.arange(keys.shape[1], device=keys.device) > (prompt + place)[:, None]
        logits = logits.masked_fill(later, -torch.inf)
        shares = [(logits.softmax(dim=-1) * look).sum(dim=-1)]
        if kind not in OF_VIDEO or visual is None:
            return shares
        found = (look[:, :prompt] & visual[rows]).any(dim=1)
        logits, look, seen = logits[found], look[found], visual[rows][found]
        if not len(seen):
            return shares

        def groups(values):
            return values[:, :prompt][seen].unflatten(0, (len(seen), -1, NUM_SLOTS))

        # The mean of keys gives the mean of their logits.
        rest = logits.masked_fill(F.pad(seen, (0, logits.shape[1] - prompt)), -torch.inf)
        pooled = torch.cat([groups(logits).mean(dim=-1), rest], dim=-1).softmax(dim=-1)
        wanted = groups(look).any(dim=-1)
        return [*shares, (pooled[:, : wanted.shape[1]] * wanted).sum(dim=-1)]

    def said(self, rows, place, tokens=slice(None)) -> torch.Tensor:
        """What a question's tokens would say if there were no layers from the choice on: logits [M, tokens].

        Args:
            rows, place: See `shares`.
            tokens: Those to choose from; the whole vocabulary by default.
        """
        hidden = self.model.norm(self.before_choice[rows, place])
        return hidden @ self.model.embed_tokens.weight[tokens].T
