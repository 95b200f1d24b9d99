"""Whether an answer is right: exact match after normalisation, and the statistics of many such verdicts.

What is surprising:
* "Exact" is meant: the whole answer must be the expected one. "It is red" and "red star" are wrong where "red" is
  expected; letter case, surrounding punctuation, a leading article and number words make no difference.
* With options the expected answer is a letter. "B", "(B)", "B. cat", "B) cat" and the option's text alone count for B;
  a letter beside the text of another option does not.
* An answer in seconds is compared as a number: "12 seconds", "12 s", "12.0 seconds" and "0:12" are one answer. A bare
  "12" is none, but it is read where errors in seconds are measured.
"""

import math
import re
import statistics
import string
import unicodedata
from collections.abc import Iterable, Sequence

NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
# Quantile of the normal distribution for two-sided 95 % intervals.
Z_95 = 1.959964

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_SECONDS = re.compile(rf"({_NUMBER}) ?(?:s|secs?|seconds?)")
_CLOCK = re.compile(r"(?:([0-9]{1,2}):)?([0-9]{1,3}):([0-5][0-9](?:\.[0-9]+)?)")
_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:,]+\s*|$)(.*)", re.DOTALL)
_AROUND = string.punctuation + string.whitespace + "“”‘’…"


def normalize(text: str) -> str:
    """Lower case, single spaces, no punctuation around it, no leading article, number words as digits."""
    text = unicodedata.normalize("NFKC", text)
    stripped = text.strip(_AROUND)
    if f"-{stripped}" in text and stripped[:1].isdigit():  # a sign is no punctuation
        stripped = f"-{stripped}"
    words = stripped.lower().split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(str(NUMBER_WORDS.index(word)) if word in NUMBER_WORDS else word for word in words)


def seconds_of(answer: str, bare=False) -> float | None:
    """The time that an answer consists of, in seconds; None if it is anything else.

    Args:
        answer: "12 seconds", "12.5 s", "at 12 seconds", "1:05".
        bare: Also take a number without a unit.
    """
    text = re.sub(r"^(?:at|after|around|about) ", "", normalize(answer))
    if match := _SECONDS.fullmatch(text):
        return float(match[1])
    if match := _CLOCK.fullmatch(text):
        return float(match[1] or 0) * 3600 + float(match[2]) * 60 + float(match[3])
    if bare and re.fullmatch(_NUMBER, text):
        return float(text)
    return None


def chosen_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The option that an answer names, as "A", "B", ...; None if it names none, or a letter and another's text."""
    texts = [normalize(choice) for choice in choices]
    if (whole := normalize(answer)) in texts:
        return chr(ord("A") + texts.index(whole))
    match = _LETTER.fullmatch(answer.strip())
    if match is None or not 0 <= (index := ord(match[1].upper()) - ord("A")) < len(choices):
        return None
    rest = normalize(match[2])
    return match[1].upper() if rest in ("", texts[index]) else None


def is_correct(answer: str, expected: str, choices: Sequence[str] | None = None) -> bool:
    """Whether an answer is the expected one.

    Args:
        answer: What the model said.
        expected: The answer in full, or, with choices, the letter of the right one.
        choices: Texts of the options, in order; None for an open question.

    Raises:
        ValueError: If the expected letter is none of the options.
    """
    if choices:
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        if expected not in letters:
            raise ValueError(f"expected answer {expected!r} is not one of the options {', '.join(letters)}")
        return chosen_letter(answer, choices) == expected
    if (time := seconds_of(expected)) is not None:
        given = seconds_of(answer)
        return given is not None and math.isclose(given, time, abs_tol=1e-6)
    return normalize(answer) == normalize(expected)


def seconds_off(answer: str, expected: str) -> float:
    """Absolute error of an answer in seconds; infinite if the answer is no time.

    Raises:
        ValueError: If the expected answer is no time.
    """
    time = seconds_of(expected, bare=True)
    if time is None:
        raise ValueError(f"expected a time such as '12 seconds', got {expected!r}")
    given = seconds_of(answer, bare=True)
    return math.inf if given is None else abs(given - time)


def f1(told: set, expected: set) -> float:
    """The harmonic mean of how many of the told facts are expected and how many of the expected are told."""
    return 2 * len(told & expected) / (len(told) + len(expected))


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, (0, 1) where nothing was asked."""
    if not 0 <= correct <= total:
        raise ValueError(f"expected 0 <= correct <= total, got {correct} of {total}")
    if total == 0:
        return 0.0, 1.0
    share, square = correct / total, Z_95**2 / total
    centre = (share + square / 2) / (1 + square)
    half = Z_95 * math.sqrt(share * (1 - share) / total + square / (4 * total)) / (1 + square)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def accuracy(verdicts: Iterable[bool]) -> dict:
    """`correct`, `total`, `accuracy` (None for nothing) and `interval` (Wilson, 95 %) of some verdicts."""
    verdicts = list(verdicts)
    correct, total = sum(verdicts), len(verdicts)
    interval = [round(end, 4) for end in wilson(correct, total)]
    return {
        "correct": correct,
        "total": total,
        "accuracy": round(correct / total, 4) if total else None,
        "interval": interval,
    }


def mean(values) -> float | None:
    """Mean of what is not None, to 4 digits; None without values."""
    known = [value for value in values if value is not None]
    return round(statistics.fmean(known), 4) if known else None
