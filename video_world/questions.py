"""Questions about clips, in natural sentences, with exact answers and where in time the answer is to be seen.

Every question has one right answer: what it names occurs once in the clip, or the question is not asked. With options
it follows the benchmarks' format (letters with full stops, "Answer with the option's letter ...").
"""

from dataclasses import dataclass
from itertools import combinations

from .drawing import COLORS, DIGITS, SHAPES, SIZES, WORDS

CHOICE_PROMPT = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCD"
NEEDLE_KINDS = ("single", "multi_hop", "ordering", "counting")


@dataclass(frozen=True)
class Question:
    """A user turn and its answer.

    Attributes:
        type: What is asked for.
        text: The whole user turn, with options if there are any.
        answer: The exact answer; the letter where options are offered.
        choices: The options' texts, in order, or None.
        evidence: (start, end) in seconds, where the answer is to be seen.
    """

    type: str
    text: str
    answer: str
    choices: tuple[str, ...] | None = None
    evidence: tuple[tuple[float, float], ...] = ()


# Wordings of each question; {} are filled by name. The bundled checkpoint of before knows the first two.
TEXTS = {
    "color": (
        "What color is the {shape}?",
        "Which color does the {shape} have?",
        "The {shape} is of which color?",
        "Of which color is the {shape}?",
    ),
    "shape": (
        "What shape is {color}?",
        "Which {color} shape is there?",
        "Which of the shapes is {color}?",
        "What is the shape that is {color}?",
    ),
    "size": (
        "Is the {shape} small or large?",
        "How big is the {shape}?",
        "How large is the {shape}?",
        "Is the {shape} large or small?",
    ),
    "direction": (
        "Which way does the {shape} move?",
        "In which direction does the {shape} move?",
        "Where does the {shape} move to?",
        "To which side does the {shape} move?",
    ),
    "motion": (
        "Does the {shape} move?",
        "Is the {shape} moving?",
        "Is the {shape} moving or not?",
        "Does the {shape} move at all?",
    ),
    "change": (
        "Which color does the {shape} turn into?",
        "What color does the {shape} become?",
        "To which color does the {shape} change?",
        "What is the new color of the {shape}?",
    ),
    "count": (
        "How many shapes are there, cards aside?",
        "How many different shapes appear, cards aside?",
        "How many shapes do you see, cards aside?",
        "How many different shapes are shown, cards aside?",
    ),
    "times": (
        "How many times does the {shape} appear?",
        "How often does the {shape} appear?",
        "How many times do you see the {shape}?",
        "How many times is the {shape} shown?",
    ),
    "exists": (
        "Is there a {shape}, cards aside?",
        "Does a {shape} appear, cards aside?",
        "Do you see a {shape}, cards aside?",
        "Is a {shape} shown, cards aside?",
    ),
    "when": (
        "When does the {shape} first appear?",
        "At what time does the {shape} first appear?",
        "At which second does the {shape} first appear?",
        "When do you first see the {shape}?",
    ),
    "when_gone": (
        "When does the {shape} disappear?",
        "At what time does the {shape} disappear?",
        "At which second does the {shape} disappear?",
        "When does the {shape} leave?",
    ),
    "when_card": (
        "When is the card with the {key} shown?",
        "At what time is the card with the {key} shown?",
        "When do you see the card with the {key}?",
        "At which second is the card with the {key} shown?",
    ),
    "duration": (
        "How long is the {shape} visible?",
        "For how many seconds is the {shape} visible?",
        "How many seconds is the {shape} shown?",
        "For how long do you see the {shape}?",
    ),
    "first": (
        "Which comes first, the {a} or the {b}?",
        "What appears first, the {a} or the {b}?",
        "Which do you see first, the {a} or the {b}?",
        "What is seen first, the {a} or the {b}?",
    ),
    "longer": (
        "Which is visible longer, the {a} or the {b}?",
        "What is visible longer, the {a} or the {b}?",
        "Which is shown longer, the {a} or the {b}?",
        "Which stays longer, the {a} or the {b}?",
    ),
    "between": (
        "What appears between {a} and {b} seconds?",
        "Which shape appears between {a} and {b} seconds?",
        "Which shape comes between {a} and {b} seconds?",
        "What do you see first between {a} and {b} seconds?",
    ),
    "sign_word": (
        "Which word is on the sign?",
        "What word does the sign show?",
        "Read the word on the sign.",
        "Which word does the sign say?",
    ),
    "sign_digit": (
        "Which digit is on the sign?",
        "What digit does the sign show?",
        "Read the digit on the sign.",
        "Which digit does the sign say?",
    ),
    "needle": (
        "What is on the card with the {key}?",
        "What does the card with the {key} say?",
        "What does the card with the {key} show?",
        "Read the card with the {key}.",
    ),
    "two_hop": (
        "Follow the word on the card with the {key} to the next card. What do they say?",
        "The card with the {key} names the next card. What do the two cards say?",
        "Read the card with the {key} and the card that it names.",
        "What do the card with the {key} and the card that it names say?",
    ),
    "card_count": (
        "How many cards are shown?",
        "How many cards are there?",
        "How many cards do you see?",
        "How many cards appear?",
    ),
    "card_order": (
        "What do the cards say, in order of appearance?",
        "Read the cards in order of appearance.",
        "What is on the cards, from first to last?",
        "Read the cards from first to last.",
    ),
    "card_first": (
        "Which card comes first, the one with the {a} or the one with the {b}?",
        "Which card is shown first, the one with the {a} or the one with the {b}?",
        "Which card do you see first, the one with the {a} or the one with the {b}?",
        "Which card is seen first, the one with the {a} or the one with the {b}?",
    ),
    "caption": ("Describe the video.", "What happens in this video?"),
    "describe": ("Describe the clip.", "Describe the clip in two sentences.", "Describe what you see."),
}
WORDINGS = 4
# What asks for a thing that is not there: type, and the types whose wordings it has.
ABSENT = {
    "absent": ("color", "size", "direction", "change", "times", "when", "when_gone", "duration"),
    "absent_card": ("needle", "when_card", "two_hop"),
    "absent_sign": ("sign_word", "sign_digit"),
}
NOT_THERE = "not in the video"
# Types that are drawn only when they are asked for.
OPTIONAL = ("caption", "describe", *ABSENT)
POOLS = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "direction": ("left", "right", "up", "down"),
    "change": tuple(COLORS),
    "sign_word": WORDS,
    "sign_digit": DIGITS,
}
# Types that stay open: their answers are lists or sentences.
OPEN = ("two_hop", "card_order", *OPTIONAL)


def name_of(key) -> str:
    """How a question names a card: "red star", or "word sun"."""
    return f"word {key}" if isinstance(key, str) else " ".join(key)


def render_choices(text: str, answer: str, pool, rng) -> tuple[str, str, tuple[str, ...]]:
    """A question with up to four options: (user turn, letter of the answer, options)."""
    others = [str(other) for other in rng.permutation(sorted({str(option) for option in pool} - {answer}))]
    options = [str(option) for option in rng.permutation([answer, *others[: len(LETTERS) - 1]])]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([text, *lines, CHOICE_PROMPT]), LETTERS[options.index(answer)], tuple(options)


def _time(second: float) -> str:
    return f"At {second:g} seconds"


class _Asker:
    """Collects the questions that can be asked; `ask` adds one in a random wording, perhaps with options."""

    def __init__(self, rng, choice_share, wordings=2):
        self.rng, self.choice_share, self.wordings, self.questions = rng, choice_share, wordings, []

    def ask(self, kind, answer, evidence, pool=(), wording=None, **names):
        texts = TEXTS[wording or kind][: self.wordings]
        text = texts[int(self.rng.integers(len(texts)))].format(**names)
        with_choices = self.rng.random() < self.choice_share and kind not in OPEN
        choices = None
        if with_choices and len({str(option) for option in pool} | {answer}) > 1:
            text, answer, choices = render_choices(text, answer, pool, self.rng)
        self.questions.append(Question(kind, text, answer, choices, tuple(evidence)))


def clip_questions(clip, rng, count, kinds, choice_share, wordings=2) -> tuple[Question, ...]:
    """Draws questions about a clip: `count` of them (None: all), by kind first, so that rare kinds are not drowned."""
    known = tuple(dict.fromkeys((*TEXTS, *ABSENT)))
    if kinds is None:
        kinds = tuple(kind for kind in known if kind not in OPTIONAL)
    weights = dict(kinds) if isinstance(kinds, dict) else dict.fromkeys(kinds, 1.0)
    if unknown := [kind for kind in weights if kind not in known]:
        raise ValueError(f"there is no question type {unknown[0]!r}; there are {', '.join(known)}")
    if count == 0:
        return ()
    asker = _Asker(rng, choice_share, wordings)
    _ask_about_shapes(clip, asker)
    _ask_about_signs(clip, asker)
    _ask_about_cards(clip.cards, asker, clip.start, whole=((clip.start, clip.start + clip.seconds),))
    _ask_for_caption(clip, asker)
    if "describe" in weights:
        _ask_for_description(clip, asker)
    if ABSENT.keys() & weights.keys():
        _ask_for_absent(clip, asker)
    by_kind = {}
    for index in rng.permutation(len(asker.questions)):
        question = asker.questions[index]
        if question.type in weights:
            by_kind.setdefault(question.type, []).append(question)
    chosen = []
    while by_kind and (count is None or len(chosen) < count):
        names = list(by_kind)
        share = [weights[name] for name in names]
        name = names[int(rng.choice(len(names), p=[value / sum(share) for value in share]))]
        chosen.append(by_kind[name].pop())
        if not by_kind[name]:
            del by_kind[name]
    return tuple(chosen)


def _ask_about_shapes(clip, asker):
    rng, start = asker.rng, clip.start
    shapes = [item for item in clip.items if item.shape]
    whole = ((start, start + clip.seconds),)
    seconds = range(0, clip.seconds + 1)
    times = [_time(start + second) for second in seconds]
    for item in shapes:
        spans = [(start + a, start + b) for a, b in item.spans]
        facts = {"shape": item.shape}
        if not item.change:
            asker.ask("color", item.color, spans, COLORS, **facts)
        else:
            second = start + item.change[0]
            asker.ask("change", item.change[1], [(second, second + 1)], COLORS, **facts)
        wears = [other for other in shapes if item.color in (other.color, other.change and other.change[1])]
        if wears == [item] and not item.change:
            asker.ask("shape", item.shape, spans, SHAPES, color=item.color)
        asker.ask("size", item.size, spans, SIZES, **facts)
        asker.ask("motion", "yes" if item.direction else "no", spans, ("yes", "no"), **facts)
        if item.direction:
            asker.ask("direction", item.direction, spans, POOLS["direction"], **facts)
        near = [times[min(max(item.spans[0][0] + shift, 0), clip.seconds)] for shift in (-9, -6, -3, 3, 6, 9)]
        asker.ask("when", _time(spans[0][0]), [(spans[0][0], spans[0][0] + 1)], near, **facts)
        asker.ask("times", str(len(spans)), spans, "123", **facts)
        if len(spans) == 1:
            if item.spans[0][1] < clip.seconds:
                near = [times[min(max(item.spans[0][1] + shift, 0), clip.seconds)] for shift in (-9, -6, -3, 3, 6, 9)]
                asker.ask("when_gone", _time(spans[0][1]), [(spans[0][1] - 1, spans[0][1] + 1)], near, **facts)
            length = item.spans[0][1] - item.spans[0][0]
            pool = [f"{other} seconds" for other in range(2, 11)]
            asker.ask("duration", f"{length} seconds", spans, pool, **facts)
    for a, b in combinations(shapes, 2):
        if rng.random() < 0.5:
            a, b = b, a
        pair = (f"the {a.shape}", f"the {b.shape}")
        names = {"a": a.shape, "b": b.shape}
        if a.spans[0][0] != b.spans[0][0]:
            spans = [(start + item.spans[0][0], start + item.spans[0][0] + 1) for item in (a, b)]
            asker.ask("first", pair[a.spans[0][0] > b.spans[0][0]], spans, pair, **names)
        lengths = [sum(end - begin for begin, end in item.spans) for item in (a, b)]
        if abs(lengths[0] - lengths[1]) >= 2:
            spans = [(start + begin, start + end) for item in (a, b) for begin, end in item.spans]
            asker.ask("longer", pair[lengths[0] < lengths[1]], spans, pair, **names)
    asker.ask(
        "count",
        str(len(shapes)),
        whole,
        "123456",
    )
    there = {item.shape for item in shapes}
    for shape in rng.permutation(SHAPES)[:2]:
        asker.ask("exists", "yes" if shape in there else "no", whole, ("yes", "no"), shape=str(shape))
    _ask_between(clip, shapes, asker)


def _ask_between(clip, shapes, asker):
    """A span of time in which exactly one shape appears."""
    rng, begins = asker.rng, [(span[0], item) for item in shapes for span in item.spans]
    for second, item in begins:
        a = second - int(rng.integers(1, 4))
        b = second + int(rng.integers(2, 5))
        others = [other for other, _ in begins if a - 1 <= other <= b + 1]
        if len(others) == 1 and a >= 0 and b <= clip.seconds:
            answer = f"a {item.color} {item.shape}"
            pool = [f"a {color} {shape}" for color, shape in zip(rng.permutation(list(COLORS)), SHAPES, strict=False)]
            start = clip.start
            asker.ask(
                "between", answer, [(start + second, start + second + 1)], pool, a=f"{start + a:g}", b=f"{start + b:g}"
            )


def _ask_about_signs(clip, asker):
    signs = [item for item in clip.items if item.text]
    for kind, pool in (("sign_word", WORDS), ("sign_digit", DIGITS)):
        shown = [item for item in signs if item.text in pool]
        if len(shown) == 1:
            spans = [(clip.start + a, clip.start + b) for a, b in shown[0].spans]
            asker.ask(kind, shown[0].text, spans, pool)


def _ask_about_cards(cards, asker, start, kinds=None, whole=()):
    """Questions about cards, in order of time; `kinds` limits the types, `whole` is where there is no card at all."""
    kinds = kinds or ("needle", "two_hop", "card_count", "card_order", "card_first", "when_card")
    spans = [(start + card.second, start + card.second + card.seconds) for card in cards]
    leads = {card.key: number for number, card in enumerate(cards) if isinstance(card.key, str)}
    for card, span in zip(cards, spans, strict=True):
        names = {"key": name_of(card.key)}
        if "needle" in kinds:
            asker.ask("needle", card.value, [span], WORDS if card.value in WORDS else DIGITS, **names)
        if "two_hop" in kinds and card.value in leads:
            following = leads[card.value]
            asker.ask("two_hop", f"{card.value}, {cards[following].value}", [span, spans[following]], **names)
        if "when_card" in kinds:
            near = [_time(max(span[0] + shift, start)) for shift in (-9, -6, -3, 3, 6, 9)]
            asker.ask("when_card", _time(span[0]), [span], near, **names)
    if "card_count" in kinds:
        asker.ask("card_count", str(len(cards)), spans or whole, "01234")
    if "card_order" in kinds and len(cards) > 1:
        asker.ask("card_order", ", ".join(card.value for card in cards), spans)
    if "card_first" in kinds:
        for a, b in combinations(range(len(cards)), 2):
            first = name_of(cards[a].key)
            if asker.rng.random() < 0.5:
                a, b = b, a
            names = {"a": name_of(cards[a].key), "b": name_of(cards[b].key)}
            pool = tuple(f"the {name}" for name in names.values())
            asker.ask("card_first", f"the {first}", [spans[a], spans[b]], pool, **names)


def _ask_for_caption(clip, asker):
    parts = []
    for item in clip.items:
        if item.text:
            words = f"a sign with {item.text}"
        else:
            words = f"a {item.size} {item.color} {item.shape}"
            words += f" moving {item.direction}" * bool(item.direction)
            words += f" turning {item.change[1]}" if item.change else ""
        parts.append((item.spans[0][0], words))
    parts += [(card.second, f"a card with {name_of(card.key)} and {card.value}") for card in clip.cards]
    answer = ", ".join(words for _, words in sorted(parts)) or "nothing"
    asker.ask("caption", answer, [(clip.start, clip.start + clip.seconds)])


def description_of(clip) -> str:
    """Two sentences: the shapes in order of their first appearance, then the signs and the number of cards."""
    shapes = sorted((item for item in clip.items if item.shape), key=lambda item: (item.spans[0][0], item.shape))
    told = [f"a {item.size} {item.color} {item.shape}" for item in shapes]
    signs = sorted((item.spans[0][0], item.text) for item in clip.items if item.text)
    signs = f"The sign says {', then '.join(text for _, text in signs)}" if signs else "There is no sign"
    cards = {0: "there is no card", 1: "there is 1 card"}.get(len(clip.cards), f"there are {len(clip.cards)} cards")
    return f"There is {', then '.join(told) or 'no shape'}. {signs} and {cards}."


def facts_told(description: str) -> set[str]:
    """The single facts of a description, to compare those of two: shapes with size and colour, signs, cards."""
    body = description.strip().removeprefix("There is ").rstrip(".")
    shapes, _, rest = body.partition(". ")
    signs, _, cards = rest.partition(" and ")
    found = {f"shape: {part}" for part in shapes.split(", then ")}
    found |= {f"sign: {part}" for part in signs.removeprefix("The sign says ").split(", then ")}
    return {*found, f"cards: {cards}"}


def _ask_for_description(clip, asker):
    asker.ask("describe", description_of(clip), [(clip.start, clip.start + clip.seconds)])


def _ask_for_absent(clip, asker):
    """What is asked of things that are there, of things that are not."""
    rng, whole = asker.rng, ((clip.start, clip.start + clip.seconds),)

    def ask(kind, **names):
        wording = str(rng.choice(ABSENT[kind]))
        asker.ask(kind, NOT_THERE, whole, wording=wording, **names)

    there = {item.shape for item in clip.items}
    for shape in rng.permutation([shape for shape in SHAPES if shape not in there])[:3]:
        ask("absent", shape=str(shape))
    if not any(item.text for item in clip.items):
        ask("absent_sign")
    for key in absent_keys([card.key for card in clip.cards], rng)[:3]:
        ask("absent_card", key=name_of(key))


def absent_keys(keys, rng) -> list:
    """Keys of cards that are not there, in random order but those that resemble one that is there first."""
    every = [(color, shape) for color in COLORS for shape in SHAPES] + list(WORDS)
    absent = [every[index] for index in rng.permutation(len(every)) if every[index] not in keys]
    near = [key for key in absent if any(_resemble(key, other) for other in keys)]
    # One of three resembles none.
    near = near[:2]
    return near + [key for key in absent if key not in near]


def _resemble(key, other) -> bool:
    return not isinstance(key, str) and not isinstance(other, str) and (key[0] == other[0] or key[1] == other[1])


_NEEDLE_TYPES = {
    "single": ("needle",),
    "multi_hop": ("two_hop",),
    "ordering": ("card_order", "card_first"),
    "counting": ("card_count",),
}


def needle_questions(
    cards, kind: str, rng, choice_share: float = 0.0, start: float = 0.0, wordings: int = 2
) -> list[Question]:
    """The questions of a kind about cards in a haystack.

    Args:
        cards: `Card`s in order of time.
        kind: One of `NEEDLE_KINDS`.
        rng: `numpy.random.Generator` for wording and options.
        choice_share: Share of questions with options.
        start: Time of the haystack's first frame, in seconds.
        wordings: See `make_clip`.

    Raises:
        ValueError: On an unknown kind.
    """
    if kind not in NEEDLE_KINDS:
        raise ValueError(f"kind must be one of {NEEDLE_KINDS}, got {kind!r}")
    asker = _Asker(rng, choice_share, wordings)
    _ask_about_cards(tuple(cards), asker, start, _NEEDLE_TYPES[kind])
    return asker.questions
