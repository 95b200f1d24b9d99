"""The timeline under a video: HTML of what an answer saw of the video, and of the times that it names.

What is surprising:
* A bar stands for a part of the video that was chosen or not (a chunk). A long video has more parts than pixels, so
  neighbours share a bar; all of them are in a second strip, which can be unfolded and scrolled.
* A model that chooses nothing has no bars: it saw the whole video.
"""

import math
from collections.abc import Sequence

# Steps of the time axis, in seconds; the first one that gives at most so many ticks is taken.
TICK_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
MAX_TICKS = 5
# On a phone a bar of so many is 5 pixels wide.
MAX_BARS = 60
MAX_CHIPS = 6
# Width of a bar in the strip that shows every part.
ZOOMED_PIXELS = 14
CLOSELY = "dense"
WORDS = {CLOSELY: "seen closely", "pooled": "seen in summary", "dropped": "left out"}


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss, with a tenth of a second where there is one."""
    minutes, tenths = divmod(round(10 * seconds), 600)
    hours, minutes = divmod(minutes, 60)
    text = f"{tenths // 10:02d}" + (f".{tenths % 10}" if tenths % 10 else "")
    return f"{hours}:{minutes:02d}:{text}" if hours else f"{minutes}:{text}"


def span(start: float, end: float) -> str:
    """A time or a range of time in words of the clock."""
    return clock(start) if end == start else f"{clock(start)} – {clock(end)}"


def timeline(chunks: Sequence[dict], duration: float, cited: Sequence[tuple[float, float]] = ()) -> str:
    """HTML of what an answer saw of the video: bars that are higher where it fits the question, and times named.

    Args:
        chunks: See `return_chunks` of `model.chat`.
        duration: Seconds.
        cited: (start, end) seconds.
    """
    duration = max(duration, max(chunk["end"] for chunk in chunks)) or 1.0
    chosen = any(chunk["level"] != CLOSELY for chunk in chunks)
    largest = max(chunk["score"] or 0 for chunk in chunks) or 1
    parts = [""]
    if chosen:
        shown = _merged(chunks)
        parts = [_bars(shown, duration, largest)]
        if len(shown) < len(chunks):
            wide = f'<div class="wide" style="width:{ZOOMED_PIXELS * len(chunks)}px">'
            strip = _bars(chunks, duration, largest) + _ticks(duration, len(chunks) // 4)
            parts.append(f'<details><summary>Zoom in</summary><div class="scroll">{wide}{strip}</div></div></details>')
    parts.insert(1, _ticks(duration, MAX_TICKS))
    marks = [
        f'<div class="cite" data-seconds="{start:.3f}" title="in the answer: {span(start, end)}" '
        f"{_place(start, end, duration)}></div>"
        for start, end in cited
    ]
    title, legend = _summary(chunks, chosen, bool(cited))
    chips = [_chips("Times in the answer:", cited, "named")] if cited else []
    if chosen:
        chips.append(_chips("Seen closely:", _close_spans(chunks), "closely"))
    return (
        f'<section class="timeline"><header><strong>{title}</strong><div class="legend">{legend}</div></header>'
        f'<div class="cites">{"".join(marks)}</div>{"".join(parts)}{"".join(chips)}</section>'
    )


def _place(start, end, duration) -> str:
    return f'style="left:{100 * start / duration:.3f}%;width:{100 * (end - start) / duration:.3f}%"'


def _summary(chunks, chosen, cited) -> tuple[str, str]:
    """The heading, and the legend below it."""
    counts = {level: sum(chunk["level"] == level for chunk in chunks) for level in WORDS}
    entries = [(level, WORDS[level]) for level, count in counts.items() if count and chosen]
    entries += [("named", "time in the answer")] * cited
    legend = "".join(f'<span><b class="{style}"></b>{words}</span>' for style, words in entries)
    if not chosen:
        return "For this answer the whole video was looked at", legend
    if any(chunk["score"] for chunk in chunks):
        legend += "<span>higher: fits the question better</span>"
    seconds = sum(chunk["end"] - chunk["start"] for chunk in chunks if chunk["level"] == CLOSELY)
    whole = sum(chunk["end"] - chunk["start"] for chunk in chunks) or 1
    return f"For this answer {100 * seconds / whole:.0f} % of the video was looked at closely", legend


def _merged(chunks) -> Sequence[dict]:
    """As many neighbours put into one as it takes to have few bars; one that was seen closely shows through."""
    step = math.ceil(len(chunks) / MAX_BARS)
    if step == 1:
        return chunks
    bars = []
    for first in range(0, len(chunks), step):
        part = chunks[first : first + step]
        levels = [chunk["level"] for chunk in part]
        bars.append(
            {
                "start": part[0]["start"],
                "end": part[-1]["end"],
                "level": next(level for level in WORDS if level in levels),
                "score": max((chunk["score"] or 0) for chunk in part),
                "closely": (levels.count(CLOSELY), len(part)),
            }
        )
    return bars


def _bars(chunks, duration, largest) -> str:
    bars = []
    for chunk in chunks:
        start, end, level = (chunk[key] for key in ("start", "end", "level"))
        words = WORDS[level]
        closely, of = chunk.get("closely", (0, 0))
        if level == CLOSELY and closely < of:
            words = f"{closely} of {of} parts {words}"
        bars.append(
            f'<div class="chunk {level}" data-seconds="{start:.3f}" title="{span(start, end)}: {words}" '
            f'{_place(start, end, duration)}><i style="height:{100 * (chunk["score"] or 0) / largest:.1f}%"></i></div>'
        )
    return f'<div class="bars">{"".join(bars)}</div>'


def _ticks(duration, most) -> str:
    step = next((step for step in TICK_STEPS if duration / step < most), math.ceil(duration / max(most, 1)))
    ticks = [f"<span {_place(at, at, duration)}>{clock(at)}</span>" for at in range(0, int(0.94 * duration) + 1, step)]
    return f'<div class="ticks">{"".join(ticks)}</div>'


def _close_spans(chunks) -> list[tuple[float, float]]:
    """(start, end) of what was seen closely, neighbours put together; what fits the question best comes first."""
    spans: list[list[float]] = []
    for chunk in chunks:
        if chunk["level"] != CLOSELY:
            continue
        if spans and spans[-1][1] == chunk["start"]:
            spans[-1][1:] = chunk["end"], max(spans[-1][2], chunk["score"] or 0)
        else:
            spans.append([chunk["start"], chunk["end"], chunk["score"] or 0])
    return [(start, end) for start, end, _ in sorted(spans, key=lambda each: -each[2])]


def _chips(label, spans, style) -> str:
    """Buttons that show times in the video; those beyond the first few are folded."""
    buttons = [
        f'<button type="button" class="{style}" data-seconds="{start:.3f}">{span(start, end)}</button>'
        for start, end in spans
    ]
    first, more = "".join(buttons[:MAX_CHIPS]), buttons[MAX_CHIPS:]
    folded = f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>" if more else ""
    return f'<div class="chips {style}">{label} {first}{folded}</div>'
