"""What a group of frames of the world shows, told by slots: one visual token for each thing that can be seen.

A group of four frames has nine visual tokens. The small model's vision path is taught to say something definite with
each: tokens 0 to 5 tell of one shape each, token 6 of signs, tokens 7 and 8 of a card. What a token says is a sum of
fixed directions of the language model's width, one for each fact: which slot it is, in which frames its thing stands,
its first and last colour, size, way, text and key. So a language model can learn to read before the vision path
has learnt to see (`SlotCode.tokens` of the facts of a clip), and read its tokens afterwards.

`story_of` tells what can be known at the end of each group about what was seen up to then. A small language model is
asked for it at the visual tokens while it learns to read (`small_model.py`).

G groups, T frames a group, N slots = visual tokens a group, K facts a slot, C width of the language model.
"""

import numpy as np
import torch
from videoxl.video_world import COLORS, DIGITS, SHAPES, SIZES, WORDS

COLOR_NAMES, SIZE_NAMES, TEXTS = tuple(COLORS), tuple(SIZES), WORDS + DIGITS
DIRECTIONS = ("left", "right", "up", "down")
FRAMES = 4
SIGN, CARD, NUM_SLOTS = len(SHAPES), (len(SHAPES) + 1, len(SHAPES) + 2), len(SHAPES) + 3
# Facts of a slot, by kind, in this order.
KINDS = {
    "slot": NUM_SLOTS,
    "frames": FRAMES,
    "color": len(COLOR_NAMES),
    "last_color": len(COLOR_NAMES),
    "size": len(SIZE_NAMES),
    "way": len(DIRECTIONS),
    "text": len(TEXTS),
    "key_word": len(WORDS),
    "key_color": len(COLOR_NAMES),
    "key_shape": len(SHAPES),
}
STARTS = dict(zip(KINDS, np.cumsum([0, *KINDS.values()]).tolist(), strict=False))
NUM_FACTS = sum(KINDS.values())
SHARPNESS = 8.0  # of what tokens tell, where it is taken for logits
# What a story tells, per slot: number of classes, the last of them "not yet" or "none".
SECONDS = 128
STORY = {
    "time": SECONDS + 1,  # second of the group's first frame
    "before": 3,  # whether the thing stood in the frame before the group
    "first": SECONDS + 1,  # second of the thing's first appearance
    "begin": SECONDS + 1,  # of its latest appearance
    "gone": SECONDS + 1,  # when it was gone after it, if it is
    "times": 5,
    "length": 32,  # seconds visible up to now
    "color": len(COLOR_NAMES) + 1,
    "size": len(SIZE_NAMES) + 1,
    "way": len(DIRECTIONS) + 1,
    "text": len(TEXTS) + 1,
}


def _column(kind: str, value: int) -> int:
    return STARTS[kind] + value


def facts_of(clip, times) -> np.ndarray:
    """What a group shows.

    Args:
        clip: A `video_world.Clip`.
        times: Seconds of its T frames.

    Returns:
        [N, K] float32 of 0 and 1.
    """
    facts = np.zeros((NUM_SLOTS, NUM_FACTS), np.float32)
    facts[np.arange(NUM_SLOTS), np.arange(NUM_SLOTS)] = 1
    seen = {}
    for frame, time in enumerate(times):
        second = time - clip.start
        card = _card_at(clip, second)
        if card is not None:
            for slot in CARD:
                row = facts[slot]
                row[_column("frames", frame)] = row[_column("text", TEXTS.index(card.value))] = 1
                if isinstance(card.key, str):
                    row[_column("key_word", WORDS.index(card.key))] = 1
                else:
                    row[_column("key_color", COLOR_NAMES.index(card.key[0]))] = 1
                    row[_column("key_shape", SHAPES.index(card.key[1]))] = 1
            continue
        for item in clip.items:
            if item.span_at(second) is None:
                continue
            row = facts[SHAPES.index(item.shape) if item.shape else SIGN]
            row[_column("frames", frame)] = 1
            if item.text:
                row[_column("text", TEXTS.index(item.text))] = 1
                continue
            row[_column("size", SIZE_NAMES.index(item.size))] = 1
            color = item.change[1] if item.change and second >= item.change[0] else item.color
            seen.setdefault(item.shape, []).append((color, item.direction, item.span_at(second)))
    for shape, looks in seen.items():
        row = facts[SHAPES.index(shape)]
        row[_column("color", COLOR_NAMES.index(looks[0][0]))] = 1
        row[_column("last_color", COLOR_NAMES.index(looks[-1][0]))] = 1
        if looks[0][1] and len(looks) > 1:
            row[_column("way", DIRECTIONS.index(looks[0][1]))] = 1
    return facts


# What a patch of the tower may show: number of classes, the last of them "none of these".
PATCH = {
    "shape": len(SHAPES) + 1,
    "color": len(COLOR_NAMES) + 1,
    "size": len(SIZE_NAMES) + 1,
    "text": len(TEXTS) + 1,
    "card": 2,  # whether the patch belongs to a card
    "key_word": len(WORDS) + 1,
    "key_color": len(COLOR_NAMES) + 1,
    "key_shape": len(SHAPES) + 1,
}
# As shares of the frame's side: how far a sign's board reaches across and down; on a card the middle of its key and of
# its text, and how far a shape that is its key reaches.
SIGN_REACH, KEY_MIDDLE, TEXT_MIDDLE, KEY_REACH = (0.2, 0.13), 0.29, 0.75, (0.21, 0.21)


def patches_of(clip, times, side: int) -> np.ndarray:
    """What stands where.

    Args:
        clip: A `video_world.Clip`.
        times: Seconds of T frames.
        side: Patches in a row.

    Returns:
        Classes as in `PATCH`, [T, side * side, 8] int64.
    """
    found = np.tile(np.array([classes - 1 for classes in PATCH.values()]), (len(times), side * side, 1))
    centres = (np.arange(side) + 0.5) / side

    def inside(x, y, reach):
        across, down = (
            np.abs(centres - place) < max(half, 0.5 / side + 1e-6) for place, half in zip((x, y), reach, strict=True)
        )
        return (down[:, None] & across).reshape(-1)

    for frame, time in enumerate(times):
        second = time - clip.start
        card = _card_at(clip, second)
        if card is not None:
            found[frame, :, 4] = 0
            found[frame, inside(0.5, TEXT_MIDDLE, SIGN_REACH), 3] = TEXTS.index(card.value)
            if isinstance(card.key, str):
                found[frame, inside(0.5, KEY_MIDDLE, SIGN_REACH), 5] = WORDS.index(card.key)
            else:
                color, shape = card.key
                found[frame, inside(0.5, KEY_MIDDLE, KEY_REACH), 6:] = COLOR_NAMES.index(color), SHAPES.index(shape)
            continue
        for item in clip.items:
            if item.span_at(second) is None:
                continue
            reach = SIGN_REACH if item.text else (SIZES[item.size] / 2,) * 2
            own = inside(*clip.place_of(item, second), reach)
            if item.text:
                found[frame, own, 3] = TEXTS.index(item.text)
                continue
            color = item.change[1] if item.change and second >= item.change[0] else item.color
            row = SHAPES.index(item.shape), COLOR_NAMES.index(color), SIZE_NAMES.index(item.size)
            found[frame, own, :3] = row
    return found


def places_of(clip, times) -> np.ndarray:
    """Where shapes stand, their middles from the left and from the top. [shapes, T, 2], NaN where one is not shown."""
    places = np.full((len(SHAPES), len(times), 2), np.nan, np.float32)
    for frame, time in enumerate(times):
        second = time - clip.start
        if _card_at(clip, second) is None:
            for item in clip.items:
                if item.shape and item.span_at(second) is not None:
                    places[SHAPES.index(item.shape), frame] = clip.place_of(item, second)
    return places


def _card_at(clip, second):
    return next((card for card in clip.cards if card.second <= second < card.second + card.seconds), None)


class SlotCode:
    """Directions of the facts in the language model's width, the same for every model of that width.

    Args:
        hidden_size: C, at least K.
        loudness: Length of each direction.
    """

    def __init__(self, hidden_size: int, loudness: float = 0.5):
        if hidden_size < NUM_FACTS:
            raise ValueError(f"{NUM_FACTS} facts do not fit into a width of {hidden_size}")
        generator = torch.Generator().manual_seed(20250621)
        basis, _ = torch.linalg.qr(torch.randn(hidden_size, hidden_size, generator=generator, dtype=torch.float64))
        self.basis = basis.T[:NUM_FACTS].float().contiguous()  # [K, C], orthonormal
        self.loudness = loudness

    def tokens(self, facts: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., C]."""
        return self.loudness * facts @ self.basis.to(facts.device)

    def facts(self, tokens: torch.Tensor) -> torch.Tensor:
        """What tokens say, near 0 or 1 where they are clear. [..., C] -> [..., K]."""
        return tokens @ self.basis.to(tokens.device).T / self.loudness

    def words(self) -> dict[str, torch.Tensor]:
        """For each word that names facts the sum of their directions, at length 1, [C]."""
        named = {"color": COLOR_NAMES, "last_color": COLOR_NAMES, "key_color": COLOR_NAMES, "slot": SHAPES}
        named |= {"key_shape": SHAPES, "size": SIZE_NAMES, "way": DIRECTIONS, "text": TEXTS, "key_word": WORDS}
        columns = {}
        for kind, words in named.items():
            for value, word in enumerate(words):
                columns.setdefault(word, []).append(_column(kind, value))
        return {word: self.basis[own].sum(dim=0) / len(own) ** 0.5 for word, own in columns.items()}


def story_of(facts: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """What is known at the end of each group.

    Args:
        facts: Of all groups in order, [G, N, K].
        times: Seconds of the frames, [G, T].

    Returns:
        For each kind of `STORY` the class, [G, N] int64.
    """
    groups = len(facts)
    story = {kind: np.full((groups, NUM_SLOTS), classes - 1, np.int64) for kind, classes in STORY.items()}
    start = STARTS["frames"]
    standing = facts[:, :, start : start + FRAMES].transpose(1, 0, 2).reshape(NUM_SLOTS, -1) > 0  # [N, G * T]
    flat = times.reshape(-1)
    story["time"][:] = np.minimum(times[:, :1].astype(np.int64), SECONDS - 1)
    story["before"][1:] = standing[:, FRAMES - 1 : -1 : FRAMES].T
    # A card hides what stands behind it for its second, and what it hides is not gone.
    hidden = standing[CARD[0]].copy()
    step = float(flat[1] - flat[0]) if len(flat) > 1 else 1.0
    for slot in range(NUM_SLOTS):
        shows = standing[slot]
        first = begin = gone = None
        count, length, was, last = 0, 0.0, False, -1
        known = {kind: STORY[kind] - 1 for kind in ("color", "size", "way", "text")}
        for number, time in enumerate(flat):
            group = number // FRAMES
            if shows[number]:
                # Longer out of sight than a card lasts: it came again.
                if not was:
                    begin, gone, count = time, None, count + 1
                    first = time if first is None else first
                length += step
                was, last = True, number
            elif was and not (hidden[number] and slot < SIGN + 1):
                was, gone = False, flat[last] + step
            if number % FRAMES == FRAMES - 1:
                row = facts[group, slot]
                for kind, source in (("color", "last_color"), ("size", "size"), ("way", "way"), ("text", "text")):
                    part = row[STARTS[source] : STARTS[source] + KINDS[source]]
                    if part.any():
                        known[kind] = int(part.argmax())
                values = {
                    "first": first,
                    "begin": begin,
                    "gone": gone,
                    "times": min(count, 3) if count else None,
                    "length": min(length, STORY["length"] - 2) if count else None,
                }
                for kind, value in values.items():
                    if value is not None:
                        story[kind][group, slot] = min(int(value), STORY[kind] - 2)
                for kind, value in known.items():
                    story[kind][group, slot] = value
    return story


def confused(told: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """The sum of cross-entropies between the facts of each kind, over the slots that have one.

    Args:
        told, facts: [G, N, K].
    """
    total = told.new_zeros(())
    for kind, size in KINDS.items():
        if kind in ("slot", "frames"):
            continue
        part = slice(STARTS[kind], STARTS[kind] + size)
        right = facts[..., part]
        has = right.any(dim=-1)
        # With a word and a digit at once each is half of what is right.
        share = right[has] / right[has].sum(dim=-1, keepdim=True)
        total = total - (share * (SHARPNESS * told[..., part][has]).log_softmax(dim=-1)).sum()
    return total


def shows(facts: torch.Tensor) -> torch.Tensor:
    """Whether a slot's thing stands in any frame. [..., N, K] -> bool [..., N]."""
    return facts[..., STARTS["frames"] : STARTS["frames"] + FRAMES].any(dim=-1)


def told_right(told: torch.Tensor, facts: torch.Tensor) -> dict[str, float]:
    """Per kind of fact the share of slots that tell it right, of those that have it; `frames` over all slots.

    A kind that no slot has is left out.

    Args:
        told, facts: [G, N, K].
    """
    result = {}
    for kind, size in KINDS.items():
        part = slice(STARTS[kind], STARTS[kind] + size)
        if kind == "frames":
            right = ((told[..., part] > 0.5) == facts[..., part].bool()).all(dim=-1)
            result["frames"] = right.float().mean().item()
            if shows(facts).any():
                result["frames of shown"] = right[shows(facts)].float().mean().item()
        elif kind != "slot":
            # With a word and a digit at once either counts.
            has = facts[..., part].any(dim=-1)
            if not has.any():
                continue
            right = facts[..., part].float().gather(-1, told[..., part].argmax(dim=-1, keepdim=True))[..., 0]
            result[kind] = right[has].mean().item()
    return result
