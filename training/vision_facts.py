"""What a group of frames of the world shows, as numbers, and a head of attention that asks for it.

G groups, T frames a group, N visual tokens a group.
"""

import numpy as np
import torch
from torch import nn

from video_world import COLORS, DIGITS, SHAPES, SIZES, WORDS

TEXTS = WORDS + DIGITS
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
# What is named per frame; one yes or no each. Places are two numbers per shape.
FACTS = {
    "shape": PAIRS,
    "size": tuple((shape, size) for shape in SHAPES for size in SIZES),
    "sign": TEXTS,
    "card_key": PAIRS + WORDS,
    "card_value": TEXTS,
}
INDEX = {}
for _kind, _values in FACTS.items():
    for _value in _values:
        INDEX[_kind, _value] = len(INDEX)
NUM_FACTS, NUM_PLACES = len(INDEX), 2 * len(SHAPES)
DIRECTIONS = ("left", "right", "up", "down")
SHARES = {kind: len(values) for kind, values in FACTS.items()}


def course_shares(frames_per_group: int) -> dict[str, int]:
    """How many facts of each kind `course_of` has: shapes, sign and card per frame, ways, last colours."""
    return {
        "standing": (len(SHAPES) + 2) * frames_per_group,
        "moving": len(SHAPES) * len(DIRECTIONS),
        "ending": len(PAIRS),
    }


def facts_of(clip, time: float) -> tuple[np.ndarray, np.ndarray]:
    """What a frame shows.

    Args:
        clip: A `video_world.Clip`.
        time: Seconds.

    Returns:
        Facts [NUM_FACTS] of 0 and 1, and places [NUM_PLACES], 0 to 1 and NaN for shapes that are not there.
    """
    facts, places = np.zeros(NUM_FACTS, np.float32), np.full(NUM_PLACES, np.nan, np.float32)
    second = time - clip.start
    for card in clip.cards:
        if card.second <= second < card.second + card.seconds:
            facts[INDEX["card_key", card.key]] = facts[INDEX["card_value", card.value]] = 1
            return facts, places
    for item in clip.items:
        if item.span_at(second) is None:
            continue
        if item.text:
            facts[INDEX["sign", item.text]] = 1
            continue
        color = item.change[1] if item.change and second >= item.change[0] else item.color
        facts[INDEX["shape", (color, item.shape)]] = facts[INDEX["size", (item.shape, item.size)]] = 1
        number = SHAPES.index(item.shape)
        places[2 * number : 2 * number + 2] = clip.place_of(item, second)
    return facts, places


def course_of(clip, times) -> np.ndarray:
    """What happens in a group of frames: who stands where in time, who moves which way, who ends in which colour.

    Args:
        clip: A `video_world.Clip`.
        times: Seconds of the T frames.

    Returns:
        0 and 1, as `course_shares` says.
    """
    standing = np.zeros((len(SHAPES) + 2, len(times)), np.float32)
    moving, ending = np.zeros((len(SHAPES), len(DIRECTIONS)), np.float32), np.zeros(len(PAIRS), np.float32)
    last = {}
    for number, time in enumerate(times):
        second = time - clip.start
        if any(card.second <= second < card.second + card.seconds for card in clip.cards):
            standing[-1, number] = 1
            continue
        for item in clip.items:
            if item.span_at(second) is None:
                continue
            row = -2 if item.text else SHAPES.index(item.shape)
            standing[row, number] = 1
            if item.text:
                continue
            last[item.shape] = item.change[1] if item.change and second >= item.change[0] else item.color
            if item.direction and standing[row].sum() > 1:
                moving[row, DIRECTIONS.index(item.direction)] = 1
    for shape, color in last.items():
        ending[PAIRS.index((color, shape))] = 1
    return np.concatenate([standing.ravel(), moving.ravel(), ending])


class AskingHead(nn.Module):
    """One learned query for each shape, for a sign and for a card, which attends to a group's tokens.

    What it finds is read by one linear layer for all shapes, so a token has to say the colour, size and way of what
    stands there, and by one each for signs and cards.

    Args:
        hidden_size: Width of a token.
        frames_per_group: T.
        head_size: Of queries and keys.
    """

    def __init__(self, hidden_size: int, frames_per_group: int, head_size: int = 32):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(SHAPES) + 2, head_size))
        self.key = nn.Linear(hidden_size, head_size)
        self.value = nn.Linear(hidden_size, 2 * head_size)
        self.thresholds = nn.Parameter(torch.zeros(len(SHAPES) + 2))
        self.shape = nn.Linear(2 * head_size, 2 * len(COLORS) + len(SIZES) + len(DIRECTIONS) + frames_per_group)
        self.sign = nn.Linear(2 * head_size, len(TEXTS) + frames_per_group)
        self.card = nn.Linear(2 * head_size, len(PAIRS + WORDS) + len(TEXTS) + frames_per_group)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits that a thing is there [G, shapes + 2], and of what is asked of it: see `asked_of`.

        Args:
            tokens: [G, N, hidden_size].
        """
        scores = torch.einsum("qd,gnd->gqn", self.queries, self.key(tokens)).float()
        found = (scores.softmax(dim=-1).to(tokens.dtype) @ self.value(tokens)).float()
        count = len(SHAPES)
        there = scores.logsumexp(dim=-1) - self.thresholds
        return there, [self.shape(found[:, :count]), self.sign(found[:, count]), self.card(found[:, count + 1])]


def asked_of(shown: torch.Tensor, shares: dict[str, int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What an `AskingHead` should find.

    Args:
        shown: Facts of a group, [G, ...].
        shares: Their kinds, see `VisionPretraining.of_group`.

    Returns:
        What is there [G, shapes + 2]; of shapes their colours, last colours, sizes, ways and frames [G, shapes, ...],
        of the sign its text and frames [G, ...], of the card its key, value and frames.
    """
    facts = dict(zip(shares, shown.split(list(shares.values()), dim=1), strict=True))
    count = len(SHAPES)
    standing = facts["standing"].unflatten(1, (count + 2, -1))
    colors, ending = (facts[kind].unflatten(1, (-1, count)).transpose(1, 2) for kind in ("shape", "ending"))
    sizes, moving = (facts[kind].unflatten(1, (count, -1)) for kind in ("size", "moving"))
    return standing.amax(dim=-1), [
        torch.cat([colors, ending, sizes, moving, standing[:, :count]], dim=-1),
        torch.cat([facts["sign"], standing[:, count]], dim=-1),
        torch.cat([facts["card_key"], facts["card_value"], standing[:, count + 1]], dim=-1),
    ]


def split_things(is_there: torch.Tensor) -> list[torch.Tensor]:
    """[G, shapes + 2] as masks of shapes [G, shapes], of signs [G] and of cards [G]."""
    is_there = is_there.bool()
    return [is_there[:, : len(SHAPES)], is_there[:, -2], is_there[:, -1]]
