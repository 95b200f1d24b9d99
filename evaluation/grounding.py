"""Temporal grounding: when does something happen? Prompts, a reader of times in answers, and scores.

    python evaluation/grounding.py --clips 40 --seconds 32 --prompt world --out results/grounding.json
    python evaluation/grounding.py --data charades.jsonl --videos DIR --model converted/Video-XL-2 --prompt charades

Data is JSON lines: `{"video": "a.mp4", "query": "person turns a light on", "span": [24.3, 30.4]}`; several true spans
come as `"spans": [[s, e], ...]`.

What is surprising:
* An answer that says no span counts as wrong, with an intersection over union (IoU) of 0; it is never left out.
* The model's first span counts (R@1). The IoU is that with the true span it fits best, as for QVHighlights' several
  windows; a video with one true span has but one choice.
* A time alone is a span of no length, whose IoU is 0. Times are seconds unless a unit or colons say otherwise.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.evaluation.harness import (  # noqa: E402
    add_model_arguments,
    dump,
    environment,
    frame_size,
    start,
    write_text,
)
from videoxl.shell.records import json_lines  # noqa: E402
from videoxl.video_world import GROUNDING_PROMPTS, grounding_moments, make_clip  # noqa: E402

# What a query is asked as. "twice" asks as the video world's questions do, which the bundled checkpoint was trained
# on: for the beginning and for the end, of shapes alone.
PROMPTS = {
    **GROUNDING_PROMPTS,
    "twice": ("When does the {subject} first appear?", "When does the {subject} disappear?"),
}
THRESHOLDS = (0.3, 0.5, 0.7)

_UNIT = r"(?:\s*(?:seconds?|seonds?|secs?|s)\b)?"
_CLOCK = rf"(?:\d{{1,2}}:)?\d{{1,3}}:[0-5]\d(?:\.\d+)?{_UNIT}"
_WORDS = (
    r"(?:\d+(?:\.\d+)?\s*(?:hours?|hrs?|h)\b\s*(?:and\s*)?)?(?:\d+(?:\.\d+)?\s*(?:minutes?|mins?|m)\b\s*(?:and\s*)?)?"
    r"\d+(?:\.\d+)?\s*(?:seconds?|seonds?|secs?|s)\b"
)
_LONG = r"\d+(?:\.\d+)?\s*(?:hours?|hrs?|h|minutes?|mins?|m)\b"
_TIME = rf"(?:{_CLOCK}|{_WORDS}|{_LONG}|\d+(?:\.\d+)?)"
_BETWEEN = r"\s*(?:-{1,2}|–|—|~|,|to|till|until|through|and)\s*(?:ends?\s+)?(?:at\s+|about\s+|around\s+)?"
_NAMED = re.compile(
    rf"(?:start|begin)\w*(?:\s+time)?\W{{0,3}}(?:\s*(?:is|at|of))?\s*:?\s*({_TIME}).{{0,40}}?"
    rf"(?:end|finish|stop)\w*(?:\s+time)?\W{{0,3}}(?:\s*(?:is|at|of))?\s*:?\s*({_TIME})",
    re.IGNORECASE | re.DOTALL,
)
_RANGE = re.compile(rf"(?<![\d.:])({_TIME}){_BETWEEN}({_TIME})(?![\d:])", re.IGNORECASE)
_SINGLE = re.compile(rf"(?<![\d.:])({_TIME})(?![\d:])", re.IGNORECASE)


def seconds_of_time(text: str) -> float:
    """A time as seconds: `75`, `75.0 s`, `1:15`, `00:01:15.5`, `1 minute 15 seconds`."""
    text = text.strip().lower()
    if ":" in text:
        total = 0.0
        for part in re.findall(r"\d+(?:\.\d+)?", text):
            total = 60 * total + float(part)
        return total
    units = {"h": 3600, "m": 60}
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text)
    return sum(float(number) * units.get(unit[:1], 1) for number, unit in parts)


def spans_in_answer(answer: str) -> list[tuple[float, float]]:
    """The spans of time that an answer names, in its order; ends in front of their starts are turned around.

    Ranges (`24.3 - 30.4`, `from 0:24 to 0:30`, `between 24 and 30 seconds`, `[24.3, 30.4]`, `start: 24, end: 30`) win
    over single times, of which the first two make a span, and one alone a span of no length.
    """
    text = re.sub(r"[\[\]()'\"*]", " ", answer)
    text = re.sub(r"\b(?:from|between)\b", " ", text, flags=re.IGNORECASE)
    found = [match.groups() for match in _NAMED.finditer(text)]
    found = found or [match.groups() for match in _RANGE.finditer(text)]
    if not found:
        times = _SINGLE.findall(text)
        found = [(times[0], times[1] if len(times) > 1 else times[0])] if times else []
    spans = []
    for first, last in found:
        # "1:05 - 10 s" is one clock and one number; a unit behind the last counts for both: "1 - 2 minutes".
        if re.fullmatch(r"\d+(?:\.\d+)?", first.strip()) and (unit := re.search(r"[a-z]+$", last.strip().lower())):
            first = f"{first} {unit[0]}"
        spans.append(tuple(sorted((seconds_of_time(first), seconds_of_time(last)))))
    return spans


def overlap(span: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two spans of time; 0 if either has no length."""
    common = min(span[1], other[1]) - max(span[0], other[0])
    joined = max(span[1], other[1]) - min(span[0], other[0])
    return common / joined if common > 0 else 0.0


def grounding_score(answer: str, spans: Iterable[Sequence[float]]) -> float:
    """The IoU of an answer's first span with the true span that it fits best; 0 for an answer without one."""
    told = spans_in_answer(answer)
    return max((overlap(told[0], span) for span in spans), default=0.0) if told else 0.0


def summarize(scores: Sequence[float], unread: int = 0) -> dict:
    """`r@0.3`, `r@0.5`, `r@0.7`, `miou`, the number of queries, and how many answers named no time."""
    if not scores:
        return {"queries": 0, "unread": unread}
    recall = {f"r@{least}": round(statistics.fmean(score >= least for score in scores), 4) for least in THRESHOLDS}
    return {**recall, "miou": round(statistics.fmean(scores), 4), "queries": len(scores), "unread": unread}


def read_queries(path: Path, videos: Path) -> list[dict]:
    """Queries of a JSON-lines file: `video` (a path), `query`, `spans`.

    Raises:
        ValueError: On a line that is none, with its number.
    """
    read = []
    for number, line in json_lines(path):
        spans = line.get("spans", [line.get("span")]) if isinstance(line, dict) else None
        fits = isinstance(spans, list) and spans and all(_is_span(span) for span in spans)
        if not fits or not all(isinstance(line.get(key), str) for key in ("video", "query")):
            raise ValueError(
                f"{path}, line {number}: expected {{'video': path, 'query': text, 'span': [start, end]}} (or spans), "
                f"got {line!r:.200}"
            )
        read.append({"video": str(videos / line["video"]), "query": line["query"], "spans": spans, "kind": "all"})
    return read


def _is_span(span) -> bool:
    numbers = isinstance(span, (list, tuple)) and len(span) == 2 and all(isinstance(n, (int, float)) for n in span)
    return bool(numbers and 0 <= span[0] <= span[1])


def world_queries(args, size: int) -> Iterable[tuple[dict, list[dict]]]:
    """Clips of the video world, as arguments of `encode_video`, with their queries."""
    for seed in range(args.first_seed, args.first_seed + args.clips):
        clip = make_clip(seed, "held_out", args.seconds, size=size, num_questions=0)
        times = [clip.start + second for second in range(args.seconds)]
        moments = [
            {"video": f"held_out:{seed}", "query": moment.query, "spans": moment.spans, "kind": moment.kind}
            | {"subject": moment.subject}
            for moment in grounding_moments(clip)
            if args.prompt != "twice" or moment.kind == "shape" and len(moment.spans) == 1
        ]
        yield {"video_path": clip.frames(times), "timestamps": times}, moments


def file_queries(args) -> Iterable[tuple[dict, list[dict]]]:
    """Videos of a file with their queries, each video once."""
    by_video = {}
    for query in read_queries(args.data, args.videos or args.data.parent):
        by_video.setdefault(query["video"], []).append(query)
    for video, queries in by_video.items():
        yield {"video_path": video}, queries


def run(args) -> dict:
    """Asks all queries; returns the result."""
    checkpoint = start(args)
    model, tokenizer, records = checkpoint.model, checkpoint.tokenizer, []
    videos = file_queries(args) if args.data else world_queries(args, frame_size(model))
    greedy = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    for source, queries in videos:
        video = model.encode_video(source.pop("video_path"), tokenizer, **source)
        for query in queries:
            prompts = PROMPTS[args.prompt]
            answers = [
                model.chat(video, tokenizer, prompt.format(**query), return_history=False, generation_config=greedy)
                for prompt in ([prompts] if isinstance(prompts, str) else prompts)
            ]
            answer = " - ".join(answers)
            spans = [list(span) for span in spans_in_answer(answer)]
            score = grounding_score(answer, query["spans"])
            records.append({**query, "answer": answer, "told": spans, "iou": round(score, 4)})
    kinds = sorted({record["kind"] for record in records} - {"all"})
    summary = {}
    for kind in ["all", *kinds]:
        chosen = [record for record in records if kind in ("all", record["kind"])]
        unread = sum(not record["told"] for record in chosen)
        summary[kind] = summarize([record["iou"] for record in chosen], unread)
    # Where files lie is this machine's matter.
    said = {key: value for key, value in vars(args).items() if key not in ("model", "out", "videos")}
    configuration = {key: value.name if isinstance(value, Path) else value for key, value in said.items()}
    return {
        "format": "videoxl-grounding",
        "configuration": {**configuration, "checkpoint": checkpoint.facts},
        "environment": environment(args.device),
        "summary": summary,
        "records": records,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--data", type=Path, help="JSON lines; without it clips of the video world")
    parser.add_argument("--videos", type=Path, help="folder that the videos' paths count from (the file's)")
    parser.add_argument("--prompt", choices=PROMPTS, default="world", help="how a query is asked")
    parser.add_argument("--clips", type=int, default=20, help="clips of the video world")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=32, help="length of a clip")
    parser.set_defaults(max_new_tokens=50)
    parser.add_argument("--out", type=Path, help="write the result there")
    args = parser.parse_args(arguments)
    if args.data and args.prompt == "twice":
        parser.error("--prompt twice asks about shapes of the video world: leave --data out")
    try:
        result = run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    print("| kind | " + " | ".join(f"R@{least}" for least in THRESHOLDS) + " | mIoU | queries | without a time |")
    print("| --- " * 7 + "|")
    for kind, found in result["summary"].items():
        figures = [found.get(name, "") for name in (*(f"r@{least}" for least in THRESHOLDS), "miou")]
        print("| " + " | ".join(map(str, [kind, *figures, found["queries"], found["unread"]])) + " |")
    if args.out:
        write_text(args.out, dump(result))


if __name__ == "__main__":
    main()
