"""Needle in a haystack, on video: is something that was shown for a moment found, wherever it was and however long
the video?

What is surprising:
* A haystack is encoded once and asked many questions; see `haystacks` for what it carries. Cells of the single-hop and
  multi-hop kinds are depth x length; ordering and counting have one cell a length, as they ask for the whole video.
* The result file is written after every haystack. Run again with the same settings it goes on where it stopped, or
  adds lengths, kinds and haystacks; with other settings it refuses.
* Where a haystack is expensive, the kinds beside single-hop get fewer of them (`--other-frames`), never fewer than
  four. The number of questions of every cell is in the result.

* The needles of VideoChat-Flash's published harness, single-hop and multi-hop, are kinds of their own; see
  `published_needles` for their rules.

    python evaluation/niah.py --mode bilevel --out niah.json
    python evaluation/niah.py --model converted/ --haystack film.mp4 --needles needles/ --options --out film_niah.json
    python evaluation/niah.py --model converted/ --haystack film.mp4 --mode full --out multi_hop.json \\
        --kinds published_caption published_qa --needles niah-coco-multihop-100.json --images pictures/
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.evaluation import harness, published_needles  # noqa: E402
from videoxl.evaluation.haystacks import (  # noqa: E402
    KINDS,
    FilmFrames,
    GeneratedFrames,
    Haystack,
    Settings,
    encode,
    make_haystack,
    needles_at_depth,
    recipe_of,
)
from videoxl.evaluation.scoring import accuracy, is_correct, mean  # noqa: E402

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096, 10000)
DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)
FORMAT = "videoxl-niah-1"
MIN_HAYSTACKS = 4


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    harness.add_model_arguments(parser)
    hay = parser.add_argument_group("haystacks and needles")
    hay.add_argument("--haystack", default="generated", metavar="FILE", help='a video file, or "generated"')
    hay.add_argument("--needles", default="cards", metavar="PATH", help='folder with qa.json, JSON file, or "cards"')
    hay.add_argument("--images", metavar="FOLDER", help="pictures of published needles (default: beside the file)")
    hay.add_argument("--samples", type=int, help="at most so many published needles or chains (default: all)")
    hay.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="frames")
    hay.add_argument("--depths", type=float, nargs="+", default=list(DEPTHS), help="percent of the length")
    hay.add_argument("--kinds", nargs="+", choices=(*KINDS, *published_needles.KINDS), default=["single"])
    hay.add_argument("--questions-per-cell", type=int, default=20, help="at least, for single-hop")
    hay.add_argument("--needles-per-depth", type=int, default=4, help="at most, in one haystack")
    hay.add_argument("--needle-frames", type=int, default=1, help="frames that show one needle")
    hay.add_argument("--other-frames", type=int, default=20480, help="frames a length for haystacks of other kinds")
    hay.add_argument("--options", action=argparse.BooleanOptionalAction, default=False, help="offer options")
    hay.add_argument("--fps", type=float, default=1.0, help="frames a second of the haystack")
    hay.add_argument("--frame-size", type=int, help="side of the frames in pixels (default: the model's, at most 224)")
    hay.add_argument("--split", default="held_out", help="of the procedural world")
    hay.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--mode",
        choices=harness.MODES,
        help="prefill and decoding (default: bilevel, or full with a model that does not have that)",
    )
    parser.add_argument("--store", choices=("int8", "int4"), help="pack the haystacks' key-values in 8 or 4 bits")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="result file; pictures beside it")
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True, help="draw pictures")
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with one line on a setting out of range."""
    for name in ("questions_per_cell", "needles_per_depth", "needle_frames", "samples"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.lengths) < 8:
        parser.error("--lengths must be at least 8 frames")
    if not all(0 <= depth <= 100 for depth in args.depths) or len(set(args.depths)) < len(args.depths):
        parser.error("--depths must be different percentages from 0 to 100")
    if not args.fps > 0:
        parser.error("--fps must be above 0")
    published = [kind in published_needles.KINDS for kind in args.kinds]
    if any(published) and not (all(published) and len({*map(published_needles.recipe_of, args.kinds)}) == 1):
        parser.error("--kinds: published_single goes by itself, as do published_caption and published_qa")
    if any(published) != args.needles.endswith(".json"):
        parser.error("--needles must be the JSON file of published needles for kinds published_..., and only for them")
    if args.out.suffix != ".json":
        parser.error("--out must end in .json")


def number_of_haystacks(recipe: str, length: int, settings: Settings, questions: int, other_frames: int) -> int:
    """Haystacks of a recipe and length, for `questions` a cell; the frames of other kinds than single are limited."""
    wanted = questions if recipe == "few" else math.ceil(questions / needles_at_depth(recipe, length, settings))
    if recipe in ("single", "photos"):
        return wanted
    return min(wanted, max(MIN_HAYSTACKS, other_frames // length))


def ask_haystack(checkpoint, haystack: Haystack, source, settings: Settings, kinds, mode, sparse, max_new_tokens):
    """Encodes a haystack and asks its questions.

    Returns:
        Facts of the haystack, and a record for each question.
    """
    with harness.sparse_attention(checkpoint.model, mode, sparse):
        begin = time.perf_counter()
        video = encode(checkpoint, haystack, source, settings, mode.store)
        seconds = time.perf_counter() - begin
    as_published = haystack.recipe in published_needles.RECIPES
    spans = video.chunks(sparse["decode_chunk_groups"])
    facts = {
        "haystack": haystack.name,
        "frames": video.num_frames,
        "tokens": len(video.input_ids),
        "visual_tokens": video.num_visual_tokens,
        "kv_bytes": video.nbytes,
        "chunks": len(spans),
        "needles": [needle.frame for needle in haystack.needles],
        "encode_seconds": round(seconds, 3),
    }
    records, plotted = [], set()
    for asked in haystack.asked:
        if asked.kind not in kinds:
            continue
        if as_published:
            # The most probable token, undisturbed by what a checkpoint's generation settings hold.
            with harness.no_message(checkpoint.model):
                arguments = checkpoint, video, asked.text, mode, sparse, asked.evidence, 1
                reply = harness.ask(*arguments, repetition_penalty=1.0)
            right = published_needles.is_right(reply.text, asked.answer)
        else:
            reply = harness.ask(checkpoint, video, asked.text, mode, sparse, asked.evidence, max_new_tokens)
            right = is_correct(reply.text, asked.answer, asked.choices)
        record = {
            "haystack": haystack.name,
            "kind": asked.kind,
            "length": haystack.length,
            "depth": asked.depth,
            "type": asked.type,
            "question": asked.text,
            "choices": asked.choices,
            "expected": asked.answer,
            "answer": reply.text,
            "correct": right,
            "seconds": round(reply.seconds, 4),
        }
        if mode.decode == "bilevel":
            wanted = harness.evidence_chunks(spans, asked.evidence)
            record |= {
                "kept_tokens": reply.kept_tokens,
                "kept_share": round(reply.kept_share, 4),
                "needle_chunks": wanted,
                "needle_reloaded": set(wanted) <= set(reply.dense),
                "reloaded": harness.ranges(reply.dense),
            }
            scores = [chunk["score"] for chunk in reply.chunks]
            if scores[0] is not None:
                record["needle_rank"] = max(sum(other > scores[chunk] for other in scores) + 1 for chunk in wanted)
                # All scores of one question a cell and haystack: enough for a picture, small enough for a file.
                if haystack.number == 0 and (cell := (asked.kind, asked.depth)) not in plotted:
                    plotted.add(cell)
                    record["scores"] = [float(f"{score:.3g}") for score in scores]
        records.append(record)
    return facts, records


def summarize(records: Sequence[dict], haystacks: Sequence[dict], kinds: Sequence[str]) -> tuple[list, list]:
    """Cells (kind x length x depth) and lengths (kind x length), from the records of all questions."""
    cells, lengths = [], []
    for kind in kinds:
        own = [record for record in records if record["kind"] == kind]
        for length in sorted({record["length"] for record in own}):
            here = [record for record in own if record["length"] == length]
            for depth in sorted({record["depth"] for record in here}, key=lambda depth: (depth is None, depth)):
                cell = [record for record in here if record["depth"] == depth]
                cells.append({"kind": kind, "length": length, "depth": depth, **_statistics(cell)})
            names = {record["haystack"] for record in here}
            encoding = [fact["encode_seconds"] for fact in haystacks if fact["haystack"] in names]
            lengths.append(
                {
                    "kind": kind,
                    "length": length,
                    **_statistics(here),
                    "haystacks": len(names),
                    "encode_seconds": round(statistics.median(encoding), 3),
                }
            )
    return cells, lengths


def _statistics(records: Sequence[dict]) -> dict:
    result = accuracy(record["correct"] for record in records)
    result["seconds"] = round(statistics.median(record["seconds"] for record in records), 4)
    if "kept_share" in records[0]:
        result["kept_share"] = mean(record["kept_share"] for record in records)
        result["needle_reloaded"] = mean(record["needle_reloaded"] for record in records)
        result["needle_rank"] = mean(record.get("needle_rank") for record in records)
    return result


def table(cells: Sequence[dict], lengths: Sequence[dict], kind: str) -> str:
    """Accuracy in percent, depth x length, with the mean of each length and what its questions cost; Markdown."""
    own = [cell for cell in cells if cell["kind"] == kind]
    columns = [entry for entry in lengths if entry["kind"] == kind]
    rows = [["depth", *(str(entry["length"]) for entry in columns)]]
    for depth in sorted({cell["depth"] for cell in own if cell["depth"] is not None}):
        found = {cell["length"]: cell for cell in own if cell["depth"] == depth}
        values = [found.get(entry["length"], {}).get("accuracy") for entry in columns]
        rows.append([f"{depth:g} %", *("-" if value is None else f"{100 * value:.0f}" for value in values)])

    def row(name, text):
        rows.append([name, *(text(entry) for entry in columns)])

    row("all", lambda entry: f"{100 * entry['accuracy']:.1f}")
    row("95 % interval", lambda entry: "{:.0f}-{:.0f}".format(*(100 * end for end in entry["interval"])))
    row("questions", lambda entry: str(entry["total"]))
    if columns and "kept_share" in columns[0]:
        row("visual KV kept", lambda entry: f"{100 * entry['kept_share']:.1f} %")
        row("needle reloaded", lambda entry: f"{100 * entry['needle_reloaded']:.0f} %")
    row("s per question", lambda entry: f"{entry['seconds']:.3g}")
    row("s to encode", lambda entry: f"{entry['encode_seconds']:.3g}")
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * len(columns), *lines[1:]])


def start(path: Path, configuration: dict) -> dict:
    """The result so far: that of an earlier run with the same configuration, or an empty one.

    Raises:
        ValueError: If the file is of another kind or another configuration.
    """
    empty = {"format": FORMAT, "configuration": configuration, "runs": [], "haystacks": [], "questions": []}
    if not path.exists():
        return empty
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): choose another --out, or remove it") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"{path} is no result of niah.py: choose another --out")
    before, now = result["configuration"], json.loads(json.dumps(configuration))
    if different := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
        key = different[0]
        raise ValueError(
            f"{path} was made with other settings ({', '.join(different)}; {key} was {before.get(key)!r}, is "
            f"{now.get(key)!r}): choose another --out, or remove it to begin anew"
        )
    return {name: result[name] for name in empty}


def run(args: argparse.Namespace) -> dict:
    """Asks what is missing in the result file and returns the whole result.

    Raises:
        FileNotFoundError, ValueError: On bad settings or files, with what to do.
    """
    checkpoint = harness.start(args)
    sparse = harness.sparse_settings(args, checkpoint.model)
    wanted_modes = ["bilevel", "full"] if args.mode is None else [args.mode]
    (mode, *_), left_out = harness.offered_modes(checkpoint.model, wanted_modes, sparse)
    if left_out:
        print(f"this model does not have the mode {left_out[0]}: {mode.name} is taken", file=sys.stderr)
    mode = replace(mode, store=args.store)
    settings = Settings(
        seed=args.seed,
        size=harness.frame_size(checkpoint.model, args.frame_size),
        fps=args.fps,
        depths=tuple(sorted(args.depths)),
        needles_per_depth=args.needles_per_depth,
        needle_frames=args.needle_frames,
        options=args.options,
        split=args.split,
        photos=None if args.needles == "cards" or args.needles.endswith(".json") else args.needles,
        published=args.needles if args.needles.endswith(".json") else None,
        images=args.images,
    )
    generated = args.haystack == "generated"
    configuration = {
        "checkpoint": checkpoint.facts,
        "mode": asdict(mode),
        "sparse_attention": sparse,
        "max_new_tokens": args.max_new_tokens,
        "haystack": "generated" if generated else Path(args.haystack).name,
        **asdict(settings),
        **{
            name: None if getattr(settings, name) is None else Path(getattr(settings, name)).name
            for name in ("photos", "published", "images")
        },
    }
    result = start(args.out, configuration)
    result["runs"].append(harness.environment(args.device))
    if settings.published is None:
        recipes, plan = sorted({recipe_of(kind, settings) for kind in args.kinds}), make_haystack
    else:
        recipes, plan = [published_needles.recipe_of(args.kinds[0])], published_needles.published_haystack

    def wanted(recipe, length):
        if settings.published is not None:
            return published_needles.number_of_haystacks(recipe, settings, args.samples)
        return number_of_haystacks(recipe, length, settings, args.questions_per_cell, args.other_frames)

    todo = [
        (length, recipe, number)
        for length in sorted(set(args.lengths))
        for recipe in recipes
        for number in range(wanted(recipe, length))
    ]
    source = GeneratedFrames(settings) if generated else FilmFrames(args.haystack, settings, max(args.lengths))
    # Ordering and counting share haystacks: what was asked of one of them counts for the kinds asked then.
    done = {(record["haystack"], record["kind"]) for record in result["questions"]}
    for length, recipe, number in todo:
        haystack = plan(recipe, length, number, settings)
        kinds = [kind for kind in args.kinds if (haystack.name, kind) not in done]
        if not any(asked.kind in kinds for asked in haystack.asked):
            continue
        facts, records = ask_haystack(checkpoint, haystack, source, settings, kinds, mode, sparse, args.max_new_tokens)
        known = [fact for fact in result["haystacks"] if fact["haystack"] != haystack.name]
        result["haystacks"] = [*known, facts]
        result["questions"] += records
        right = sum(record["correct"] for record in records)
        print(
            f"{haystack.name}: {right} of {len(records)} right, {facts['encode_seconds']:.1f} s to encode, "
            f"{sum(record['seconds'] for record in records):.1f} s to answer",
            file=sys.stderr,
        )
        save(args.out, result)
    return save(args.out, result)


def save(path: Path, result: dict) -> dict:
    """Writes the result with its summary in front of the single questions; returns it."""
    known = (*KINDS, *published_needles.KINDS)
    kinds = [kind for kind in known if any(record["kind"] == kind for record in result["questions"])]
    cells, lengths = summarize(result["questions"], result["haystacks"], kinds)
    overall = {
        kind: accuracy(record["correct"] for record in result["questions"] if record["kind"] == kind) for kind in kinds
    }
    head = {name: result[name] for name in ("format", "configuration", "runs")}
    body = {"overall": overall, "lengths": lengths, "cells": cells}
    if scores := published_needles.published_scores(result["questions"]):
        body["published_scores"] = scores
    result = {**head, **body, "haystacks": result["haystacks"], "questions": result["questions"]}
    harness.write_text(path, harness.dump(result))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs from a command line."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    check(parser, args)
    if args.plots:
        try:
            from videoxl.evaluation import plots
        except ImportError:
            parser.error("pictures need matplotlib (pip install matplotlib); --no-plots does without")
    try:
        result = run(args)
        pictures = plots.draw(result, args.out) if args.plots else []
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    for kind, total in result["overall"].items():
        print(f"\n{kind}: {total['correct']} of {total['total']} right\n")
        print(table(result["cells"], result["lengths"], kind))
    for entry in result.get("published_scores", ()):
        print("\n" + ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in entry.items()))
    print("\nwritten:", ", ".join(str(path) for path in (args.out, *pictures)))


if __name__ == "__main__":
    main()
