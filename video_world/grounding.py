"""Temporal grounding in clips: sentences about what is seen, and all the times at which it is to be seen.

Nothing here is random, so the streams of clips and questions stay what they are.
"""

from dataclasses import dataclass

from .clips import Clip
from .questions import Question, name_of

# What a query is asked as. "charades" is the public benchmark task's wording (lmms-eval's charades_sta, by which
# VideoChat-Flash is evaluated), its slip of the pen included: a model is asked as others ask it. "qvhighlights" asks
# for all windows; its wording is ours, as no member's authors publish one.
GROUNDING_PROMPTS = {
    "charades": (
        "Please find the visual event described by a sentence in the video, determining its starting and ending "
        "times. The format should be: 'The event happens in the start time - end time'. For example, The event "
        "'person turn a light on' happens in the 24.3 - 30.4 seonds. Now I will give you the textual sentence: "
        "{query}. Please return its start time and end time."
    ),
    "qvhighlights": (
        "Find all moments of the video that fit the sentence '{query}'. Give the start and end of each in seconds, as "
        "'start - end', separated by commas."
    ),
    "world": "When is it so that {query}? Give the start and the end.",
}


@dataclass(frozen=True)
class Moment:
    """A sentence and its times.

    Attributes:
        kind: `shape`, `motion`, `change`, `sign` or `card`.
        query: The sentence, without a full stop.
        spans: (start, end) in seconds, ascending: all the times at which it is so.
        subject: What the sentence is about, as questions name it.
    """

    kind: str
    query: str
    spans: tuple[tuple[float, float], ...]
    subject: str


def grounding_moments(clip: Clip) -> tuple[Moment, ...]:
    """The moments of a clip whose sentences fit nothing else in it, in order of time."""
    found = []
    for item in clip.items:
        spans = tuple((clip.start + begin, clip.start + end) for begin, end in item.spans)
        if item.text:
            found.append(Moment("sign", f"a sign with {item.text} is visible", spans, "sign"))
            continue
        if item.change:
            second, color = item.change
            after = ((clip.start + second, spans[-1][1]),)
            found.append(Moment("change", f"the {item.shape} is {color} after it was {item.color}", after, item.shape))
        if item.direction:
            found.append(Moment("motion", f"a {item.shape} moves {item.direction}", spans, item.shape))
        found.append(Moment("shape", f"a {item.shape} is visible", spans, item.shape))
    for card in clip.cards:
        span = (clip.start + card.second, clip.start + card.second + card.seconds)
        found.append(
            Moment(
                "card", f"a card with the {name_of(card.key)} is shown", (span,), f"card with the {name_of(card.key)}"
            )
        )
    return tuple(sorted(found, key=lambda moment: moment.spans))


def grounding_question(query: str, spans, prompt: str = "charades") -> Question:
    """A query as a question, and its true spans as the answer, in seconds.

    Args:
        query: A sentence.
        spans: (start, end) in seconds; `charades` asks for one, so it takes the first.
        prompt: Of `GROUNDING_PROMPTS`.

    Raises:
        ValueError: On another prompt, or spans that are none.
    """
    if prompt not in GROUNDING_PROMPTS:
        raise ValueError(f"prompt must be one of {', '.join(GROUNDING_PROMPTS)}, got {prompt!r}")
    fits = isinstance(spans, (list, tuple)) and spans
    if not fits or not all(
        isinstance(span, (list, tuple)) and len(span) == 2 and span[0] <= span[1] for span in spans
    ):
        raise ValueError(f"spans must be [[start, end], ...] in seconds, got {spans!r:.200}")
    told = [f"{begin:g} - {end:g}" for begin, end in spans]
    answer = f"The event happens in the {told[0]} seconds." if prompt == "charades" else f"{', '.join(told)} seconds"
    text = GROUNDING_PROMPTS[prompt].format(query=query.strip().rstrip("."))
    return Question("grounding", text, answer, None, tuple(map(tuple, spans)))
