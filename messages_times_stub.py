"""Temporary."""

import math
import re

# Times in a question. All repetitions are bounded, so the work is linear in the text.
_NUMBER, _PART, _AND = r"[0-9]{1,6}(?:\.[0-9]{1,3})?", r"[0-5]?[0-9](?:\.[0-9]{1,3})?", r"(?:, ?| )?(?:and )?"
_SECONDS = r"[ -]?(?:seconds?|secs?|s)"
_MINUTES = rf"[ -]?(?:minutes?|mins?|m)(?:{_AND}{_PART}{_SECONDS})?"
_HOURS = rf"[ -]?(?:hours?|hrs?|h)(?:{_AND}{_PART}(?:{_MINUTES}|{_SECONDS}))?"
_CLOCK = r"(?:[0-9]{1,2}:[0-5][0-9]|[0-9]{1,3}):[0-5][0-9](?:\.[0-9]{1,3})?(?![\w:]|\.[0-9])"
_FLAGS = re.ASCII | re.IGNORECASE
_TIME = re.compile(rf"(?<![\w.:,])(?:{_CLOCK}|{_NUMBER}(?:{_HOURS}|{_MINUTES}|{_SECONDS})(?!\w))", _FLAGS)
_LONE = re.compile(rf"{_NUMBER} ?[hm]", _FLAGS)
_UNITS = {"h": 3600, "m": 60, "s": 1}
# A time (or a number that borrows the unit) that begins a range, up to where the range's second time follows.
_RANGE = r"(?:\bbetween (?:the )?{0} ?and|{0} ?(?:-|–|—|to|until|till|through)) ?(?:the )?$"
_TIME_RANGE = re.compile(_RANGE.format(">"), _FLAGS)
_NUMBER_RANGE = re.compile(_RANGE.format(rf"(?<![\w.:,])({_NUMBER})"), _FLAGS)
_CONTEXT = 40  # characters that are read on either side of a time
# The first line whose pattern fits says what a time means in its context. @ is the time, < and > its borders, THE an
# optional article. In order: timestamps, times of day, dates and scores; ratios; decades; ...; durations; "10-second".
_READINGS = r"""
no      (?-i:Time )@:|[0-9]> ?(?:[ap]\.?m\b|o'?clock|ratio|aspect|score|odds|win\b)|[0-9]{4}-[0-9]{2}-[0-9]{2} @
no      \b(?:ratio|aspect|score|scale|odds|won|lost)(?: (?:of|is|was|by|at))? <[0-9]+:
no      (?:\b(?:the|early|late|mid)[ -]|')<[0-9]+0s>(?! mark)|<(?:18|19|20)[0-9]0s>
after   \bafter the first @|\bfrom (?:the )?@ (?:on|onwards?|forward|(?:to|until|till) the end)\b
before  \b(?:first|initial|opening) @|\bfrom the (?:start|beginning) (?:to|until|till) @
last    \b(?:last|final|closing|the past) @|@ (?:before|from) the end\b
after   \b(?:after|since|past) THE@
before  \b(?:before|until|till|up to) THE@
at      \b(?:at|around) THE@
no      \b(?:for|every|each|within|than|lasts?|lasting|takes?|took|next|previous|another|per) THE@
at      @ (?:mark|point|in\b|into)
no      [a-z]> (?:long|later|ago|apart|each|earlier|before|prior|of|after(?! the (?:start|beginning)))\b
no      <[0-9.]+-[a-z]+>|\b(?:an?|the|this|that) <[0-9.]+ (?:hour|minute|second)>
at      @
""".replace("@", "<[^>]*>").replace("THE", "(?:(?:the|about|around|only|an?) )?")
_MEANINGS = [(line[:8].strip(), re.compile(line[8:], _FLAGS)) for line in _READINGS.strip().splitlines()]


def times_in_text(text) -> list[tuple[float, float]]:
    """The times that a question names, in order of appearance.

    * m:ss, mm:ss, h:mm:ss: two digits below 60 after a colon (so not 16:9), without am, pm, ratio, score or a date.
    * Numbers with a unit, also joined: 75 s, 1.5 min, 2 minutes and 5 seconds, 1h02m03s. A lone m or h is none, nor
      are durations (for 10 s, a 10-second clip), decades (the 80s) and the prompt's own `Time 4.0s:`.
    * Ranges: between A and B, from A to B, A-B, where A may borrow B's unit.

    Returns:
        (start, end) in seconds. "at A" is (A, A), "after A" (A, inf), "before A" and "the first A" are (0, A), "the
        last A" is (-A, inf): a negative start counts from the video's end, which `chunks_at` knows.
    """
    text = " ".join(re.sub("[<>]", " ", text).split())
    matches = [match for match in _TIME.finditer(text) if not _LONE.fullmatch(match[0])]
    found, index = [], 0
    while index < len(matches):
        time, (start, end) = matches[index][0], matches[index].span()
        lead, low = text[max(start - _CONTEXT, 0) : start], _seconds(time)
        high = low
        index += 1
        if index < len(matches) and _TIME_RANGE.search(f"{lead}>{text[end : matches[index].start()]}"):
            end, high = matches[index].end(), _seconds(matches[index][0])
            index += 1
        elif ":" not in time and (bare := _NUMBER_RANGE.search(lead)):
            low = float(bare[1] or bare[2]) * _UNITS[re.search("[hms]", time.lower())[0]]
            lead = lead[: bare.start()]
        context = f"{lead}<{time}>{text[end : end + _CONTEXT]}"
        low, high = min(low, high), max(low, high)
        readings = {"at": (low, high), "after": (low, math.inf), "before": (0.0, high), "last": (-high, math.inf)}
        meaning = next(meaning for meaning, pattern in _MEANINGS if pattern.search(context))
        if meaning != "no":
            found.append(readings[meaning])
    return found


def _seconds(time: str) -> float:
    if ":" in time:
        return sum(float(part) * 60**power for power, part in enumerate(reversed(time.split(":"))))
    pieces = re.findall(r"([0-9.]+)[ -]?([hms])", time.lower())
    return sum(float(number) * _UNITS[unit] for number, unit in pieces)


def chunks_at(times, chunk_starts, chunk_ends, duration) -> list[int]:
    """The chunks of one video that overlap any of the times.

    Args:
        times: From `times_in_text`; a negative start counts from `duration`.
        chunk_starts, chunk_ends: Per chunk, in seconds, ascending; there may be gaps between chunks.
        duration: Seconds; a time that starts behind it chooses nothing.

    Returns:
        Chunk numbers, ascending. A moment chooses the chunk that contains it, in a gap the one before.
    """
    chosen = set()
    for start, end in times:
        start = max(duration + start, 0.0) if start < 0 else start
        if start > duration:
            continue
        inside = [chunk for chunk, first in enumerate(chunk_starts) if start < first < end]
        before = [chunk for chunk, first in enumerate(chunk_starts) if first <= start][-1:]
        if before and (not inside or chunk_ends[before[0]] > start or chunk_starts[before[0]] == start):
            inside += before
        chosen.update(inside)
    return sorted(chosen)
