"""The timeline under an answer: HTML of what the answer saw of the video, and of the times that it names."""

import math
from collections.abc import Sequence

# Steps of the time axis, in seconds; the first one that gives at most so many ticks is taken.
TICK_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600)
MAX_TICKS = 8
LEVELS = {"dense": "seen in full", "pooled": "pooled", "dropped": "left out"}


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
    """HTML of what an answer saw of the video: a bar a chunk, as high as its score, and the times that it names.

    Args:
        chunks: See `return_chunks` of `model.chat`.
        duration: Seconds.
        cited: (start, end) seconds.
    """
    duration = max(duration, max(chunk["end"] for chunk in chunks)) or 1.0

    def place(start, end):
        return f'style="left:{100 * start / duration:.3f}%;width:{100 * (end - start) / duration:.3f}%"'

    def button(start, end, style, more=""):
        return f'<button type="button" class="{style}" data-seconds="{start:.3f}">{span(start, end)}{more}</button>'

    largest = max(chunk["score"] or 0 for chunk in chunks) or 1
    bars = []
    for chunk in chunks:
        start, end, level, score = (chunk[key] for key in ("start", "end", "level", "score"))
        title = f"{span(start, end)}: {LEVELS[level]}" + ("" if score is None else f", score {score:.3f}")
        bars.append(
            f'<div class="chunk {level}" data-seconds="{start:.3f}" title="{title}" {place(start, end)}>'
            f'<i style="height:{100 * (score or 0) / largest:.1f}%"></i></div>'
        )
    marks = [
        f'<div class="cite" data-seconds="{start:.3f}" title="in the answer: {span(start, end)}" '
        f"{place(start, end)}></div>"
        for start, end in cited
    ]
    step = next((step for step in TICK_STEPS if duration / step < MAX_TICKS), math.ceil(duration / MAX_TICKS))
    ticks = [f"<span {place(at, at)}>{clock(at)}</span>" for at in range(0, int(0.97 * duration) + 1, step)]
    counts = {level: sum(chunk["level"] == level for chunk in chunks) for level in LEVELS}
    title = ", ".join(f"{count} {LEVELS[level]}" for level, count in counts.items() if count)
    legend = [f'<span><b class="{level}"></b>{LEVELS[level]}</span>' for level, count in counts.items() if count]
    if cited:
        legend.append('<span><b class="named"></b>time in the answer</span>')
    chips = [
        button(
            chunk["start"], chunk["end"], "", "" if chunk["score"] is None else f"<span>{chunk['score']:.3f}</span>"
        )
        for chunk in chunks
        if chunk["level"] == "dense"
    ]
    named = [button(start, end, "named") for start, end in cited]
    return (
        f'<section class="timeline"><header><strong>{len(chunks)} chunks: {title}</strong>'
        f'<div class="legend">{"".join(legend)}</div></header>'
        f'<div class="cites">{"".join(marks)}</div><div class="bars">{"".join(bars)}</div>'
        f'<div class="ticks">{"".join(ticks)}</div>'
        + (f'<div class="chips">Times in the answer: {"".join(named)}</div>' if named else "")
        + f'<div class="chips reloaded">Seen in full, with scores: {"".join(chips)}</div></section>'
    )
