"""Accuracy by question type and mode of sparse attention: one table in Markdown and JSON.

What is surprising:
* A video is encoded once for each kind of prefill; every question is asked by itself, in all modes.
* A member of the family that takes no sparse attention is asked in the modes that it has; the others are named.
* The oracle is told where the evidence is; questions without evidence are left out of its column, and counted.
* Errors in seconds are measured on open `when` questions. An answer that is no time has an infinite error, so a median
  exists only where more than half of the answers are times.
* A description is right if it says everything, and nothing else; `facts told` is the mean F1 of its single facts.
* With --turns every question is asked a second time, in conversations of so many questions with the model's own
  answers between them. Of things that are not there (types `absent...`) it should say so, and only of those.
* "Lost" and "gained" compare each mode with the first one question by question: both can be large where the
  accuracies agree. A mode over packed key-values (`--store`) is compared with itself over the model's precision.

    python evaluation/report.py --clips 50 --seconds 64 --out report.json
    python evaluation/report.py --model converted/ --data questions.json --modes full bilevel --out report.json
"""

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.evaluation import harness  # noqa: E402
from videoxl.evaluation.scoring import accuracy, f1, is_correct, mean, normalize, seconds_off  # noqa: E402
from videoxl.shell.records import read_json  # noqa: E402
from videoxl.video_world import ABSENT, NOT_THERE, facts_told, make_clip  # noqa: E402

FORMAT = "videoxl-report-1"
REQUIRED = ("video", "question", "answer", "type")
# Frames a second of the H.264 files that --encode h264 writes.
FILE_FPS = 8
# An answer to a `when` question counts as close within so many seconds.
CLOSE_SECONDS = 1.0
DESCRIPTION_TOKENS = 96  # at least so many for the answer, where a clip is to be described


@dataclass(frozen=True)
class Asked:
    """A question: its fields are those of `video_world.Question`."""

    type: str
    text: str
    answer: str
    choices: tuple[str, ...] | None = None
    evidence: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Video:
    """A video with its questions; `encode(model, tokenizer)` gives the `EncodedVideo`."""

    name: str
    questions: tuple[Asked, ...]
    encode: Callable


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    harness.add_model_arguments(parser)
    parser.add_argument("--modes", nargs="+", choices=harness.MODES, default=list(harness.MODES))
    parser.add_argument(
        "--store", nargs="+", choices=("int8", "int4"), default=[], help="ask each mode over packed key-values, too"
    )
    parser.add_argument("--turns", type=int, default=0, help="also ask in conversations of so many questions")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="FILE.md gets the table")
    parser.add_argument(
        "--answers", action=argparse.BooleanOptionalAction, default=True, help="keep single answers in the JSON"
    )
    clips = parser.add_argument_group("clips of the procedural world (without --data)")
    clips.add_argument("--clips", type=int, default=50, help="number of clips")
    clips.add_argument("--first-seed", type=int, default=0, help="seed of the first clip; the others follow")
    clips.add_argument("--split", default="held_out", help="of the procedural world")
    clips.add_argument("--seconds", type=int, nargs="+", default=[64], help="length; several lengths take turns")
    clips.add_argument("--fps", type=float, default=1.0, help="frames a second")
    clips.add_argument("--frame-size", type=int, help="side of the frames in pixels (default: the model's)")
    clips.add_argument("--questions", type=int, help="questions a clip (default: all that can be asked)")
    clips.add_argument("--kinds", nargs="+", help="question types (default: all that are scored exactly)")
    clips.add_argument("--choice-share", type=float, default=0.3, help="share of questions with options")
    clips.add_argument("--wordings", type=int, default=2, help="of each question, to draw from")
    clips.add_argument("--lifelike", type=float, default=0.0, help="share of clips that look like films")
    clips.add_argument(
        "--encode", choices=("frames", "h264"), default="frames", help="h264 writes and decodes a video file"
    )
    data = parser.add_argument_group("questions from a file")
    data.add_argument("--data", type=Path, metavar="FILE.json", help=f"a list of objects with {', '.join(REQUIRED)}")
    data.add_argument("--max-num-frames", type=int, default=512)
    data.add_argument("--sample-fps", type=float, default=1.0)
    data.add_argument("--max-sample-fps", type=float, default=4.0)
    return parser


def world_videos(args: argparse.Namespace, size: int) -> Iterator[Video]:
    """Clips of the procedural world.

    Raises:
        ValueError: On settings that the world refuses.
    """
    for number in range(args.clips):
        seed, seconds = args.first_seed + number, args.seconds[number % len(args.seconds)]
        clip = make_clip(
            seed,
            args.split,
            seconds,
            size=size,
            num_questions=args.questions,
            kinds=None if args.kinds is None else tuple(args.kinds),
            choice_share=args.choice_share,
            wordings=args.wordings,
            lifelike=args.lifelike,
        )
        # What is seen nowhere ("how many cards": none) takes the whole clip to know.
        whole = ((clip.start, clip.start + clip.seconds),)
        questions = tuple(Asked(q.type, q.text, q.answer, q.choices, q.evidence or whole) for q in clip.questions)

        def encode(model, tokenizer, clip=clip):
            if args.encode == "frames":
                times = [clip.start + frame / args.fps for frame in range(int(clip.seconds * args.fps))]
                return model.encode_video(clip.frames(times), tokenizer, timestamps=times, progress=False)
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "clip.mp4")
                clip.write_video(path, fps=FILE_FPS)
                rate = {"max_num_frames": 10**6, "sample_fps": args.fps, "max_sample_fps": args.fps}
                return model.encode_video(path, tokenizer, progress=False, **rate)

        yield Video(f"{args.split}/{seed}/{seconds}s", questions, encode)


def file_videos(args: argparse.Namespace) -> Iterator[Video]:
    """Videos and questions of a JSON file; paths of videos are relative to it.

    Raises:
        FileNotFoundError, ValueError: If a file is missing or an entry is incomplete, with its number.
    """
    entries = read_json(args.data)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{args.data} must hold a list of questions: objects with {', '.join(REQUIRED)}")
    by_video: dict[str, list[Asked]] = {}
    for number, entry in enumerate(entries):
        missing = [name for name in REQUIRED if not isinstance(entry, dict) or not isinstance(entry.get(name), str)]
        if missing:
            raise ValueError(f"{args.data}, entry {number}: {missing[0]!r} must be a text, and is not")
        if not (args.data.parent / entry["video"]).is_file():
            raise FileNotFoundError(f"{args.data}, entry {number}: there is no video {entry['video']}")
        choices = tuple(entry["choices"]) if entry.get("choices") else None
        evidence = tuple((float(start), float(end)) for start, end in entry.get("evidence") or ())
        asked = Asked(entry["type"], entry["question"], entry["answer"], choices, evidence)
        is_correct("", asked.answer, choices)  # an answer that no option has is found before anything is encoded
        by_video.setdefault(entry["video"], []).append(asked)
    for name, questions in by_video.items():

        def encode(model, tokenizer, path=str(args.data.parent / name)):
            rate = {"sample_fps": args.sample_fps, "max_sample_fps": args.max_sample_fps}
            return model.encode_video(path, tokenizer, max_num_frames=args.max_num_frames, progress=False, **rate)

        yield Video(name, tuple(questions), encode)


def ask_video(checkpoint, video: Video, modes, sparse: dict, max_new_tokens: int, turns=0) -> tuple[dict, list[dict]]:
    """Encodes a video once for each prefill and asks all questions in all modes, with `turns` also in conversations.

    Returns:
        Facts of the video, and a record for each question.
    """
    records = [
        {
            "video": video.name,
            "type": asked.type,
            "question": asked.text,
            "choices": asked.choices,
            "expected": asked.answer,
            "modes": {},
        }
        for asked in video.questions
    ]
    facts = {"video": video.name, "encode_seconds": {}}
    for prefill in dict.fromkeys(mode.prefill for mode in modes):
        same = [mode for mode in modes if mode.prefill == prefill]
        with harness.sparse_attention(checkpoint.model, same[0], sparse):
            begin = time.perf_counter()
            encoded = video.encode(checkpoint.model, checkpoint.tokenizer)
            facts["encode_seconds"][prefill] = round(time.perf_counter() - begin, 4)
        facts |= {
            "frames": encoded.num_frames,
            "tokens": len(encoded.input_ids),
            "visual_tokens": encoded.num_visual_tokens,
            "chunks": len(encoded.chunks(sparse["decode_chunk_groups"])),
        }
        stored = {None: encoded}
        for store in {mode.store for mode in same} - {None}:
            stored[store] = copy.deepcopy(encoded).quantize(store)
            facts.setdefault("store_share", {})[f"{prefill} {store}"] = round(stored[store].nbytes / encoded.nbytes, 4)
        for mode in same:
            history = None
            for number, (asked, record) in enumerate(zip(video.questions, records, strict=True)):
                if mode.chunks == "oracle" and not asked.evidence:
                    continue
                ask = partial(harness.ask, checkpoint, stored[mode.store], asked.text, mode, sparse, asked.evidence)
                longest = max(max_new_tokens, DESCRIPTION_TOKENS * (asked.type == "describe"))
                reply = ask(longest)
                record["modes"][mode.name] = verdict(reply.text, asked) | {
                    "seconds": round(reply.seconds, 4),
                    "kept_tokens": reply.kept_tokens,
                    "kept_share": round(reply.kept_share, 4),
                }
                if turns:
                    reply = ask(longest, history if number % turns else None)
                    history = reply.history
                    record["modes"][mode.name]["in_turn"] = {"turn": number % turns + 1, **verdict(reply.text, asked)}
    return facts, records


def verdict(answer: str, asked: Asked) -> dict:
    """An answer, whether it is right, and of a description the F1 of its facts."""
    result = {"answer": answer, "correct": is_correct(answer, asked.answer, asked.choices)}
    if asked.type == "describe":
        result["facts"] = round(f1(facts_told(answer), facts_told(asked.answer)), 4)
    return result


def is_time_question(record: dict) -> bool:
    """Whether errors of this question are measured in seconds."""
    return record["type"].startswith("when") and not record["choices"]


def summarize(records: Sequence[dict], videos: Sequence[dict], modes) -> dict:
    """Per mode: accuracy in all and by type, errors in seconds, tokens kept, seconds, and the comparison."""
    types = sorted({record["type"] for record in records})
    summary = {}
    for mode in modes:
        own = [record for record in records if mode.name in record["modes"]]
        replies = [record["modes"][mode.name] for record in own]
        entry = {"all": accuracy(reply["correct"] for reply in replies)}
        entry["types"] = {
            name: accuracy(record["modes"][mode.name]["correct"] for record in own if record["type"] == name)
            for name in types
        }
        for name, wanted in (("open", False), ("with_options", True)):
            chosen = [record for record in own if bool(record["choices"]) == wanted]
            entry[name] = accuracy(record["modes"][mode.name]["correct"] for record in chosen)
        times = {record["type"]: [] for record in own if is_time_question(record)}
        for record in own:
            if is_time_question(record):
                times[record["type"]].append(seconds_off(record["modes"][mode.name]["answer"], record["expected"]))
        entry["when"] = time_errors([error for errors in times.values() for error in errors])
        entry["when_types"] = {name: time_errors(errors) for name, errors in sorted(times.items())}
        entry["in_turns"] = accuracy(reply["in_turn"]["correct"] for reply in replies if "in_turn" in reply)
        # Of what is not there it should say so, and only of that.
        for name, absent in (("absent", True), ("wrongly_absent", False)):
            chosen = [
                reply for record, reply in zip(own, replies, strict=True) if (record["type"] in ABSENT) == absent
            ]
            entry[name] = accuracy(normalize(reply["answer"]) == NOT_THERE for reply in chosen)
        entry["facts"] = mean(reply.get("facts") for reply in replies)
        for name in ("seconds", "kept_share", "kept_tokens"):
            entry[name] = mean(reply[name] for reply in replies)
        entry["encode_seconds"] = mean(video["encode_seconds"][mode.prefill] for video in videos)
        first = modes[0].name if mode.store is None else mode.name.removesuffix(f" {mode.store}")
        pairs = [(record["video"], record["modes"][first]["correct"], record["modes"][mode.name]["correct"])
                 for record in own if first in record["modes"]]  # fmt: skip
        entry["against"] = first
        entry |= paired_difference(pairs)
        entry["lost"] = sum(before and not now for _, before, now in pairs)
        entry["gained"] = sum(now and not before for _, before, now in pairs)
        summary[mode.name] = entry
    return summary


def paired_difference(results: Iterable[tuple[str, bool, bool]]) -> dict:
    """How much accuracy differs between two ways of asking the same questions.

    Args:
        results: Per question its video, and whether it was answered rightly in one way and in the other.

    Returns:
        The difference of the other way, and its 95 % interval, in which the questions of a video count as one.
    """
    by_video: dict[str, list[int]] = {}
    for video, before, now in results:
        by_video.setdefault(video, []).append(int(now) - int(before))
    total = sum(map(len, by_video.values()))
    if not total:
        return {"difference": None, "difference_interval": None}
    mean_difference = sum(map(sum, by_video.values())) / total
    squares = sum((sum(own) - mean_difference * len(own)) ** 2 for own in by_video.values())
    half = 1.96 * math.sqrt(squares) / total
    return {
        "difference": round(mean_difference, 5),
        "difference_interval": [round(mean_difference - half, 5), round(mean_difference + half, 5)],
    }


def time_errors(errors: Sequence[float]) -> dict:
    """Median, share within `CLOSE_SECONDS` and number of errors in seconds; a median of None is infinite."""
    if not errors:
        return {"median_error": None, "close": None, "total": 0, "no_time": 0}
    median = statistics.median(errors)
    return {
        "median_error": median if math.isfinite(median) else None,
        "close": round(sum(error <= CLOSE_SECONDS for error in errors) / len(errors), 4),
        "total": len(errors),
        "no_time": sum(math.isinf(error) for error in errors),
    }


def markdown(result: dict) -> str:
    """The table, with what it was made from above it."""
    summary = result["summary"]
    configuration, names = result["configuration"], list(summary)
    rows = [["question type", "questions", *names]]

    def interval(entry):
        if not entry["total"]:
            return "-"
        low, high = (100 * end for end in entry["interval"])
        return f"{100 * entry['accuracy']:.1f} ({low:.0f}-{high:.0f})"

    def row(label, text, total=""):
        rows.append([label, str(total), *(text(summary[name]) for name in names)])

    for kind in summary[names[0]]["types"]:
        most = max(summary[name]["types"][kind]["total"] for name in names)
        row(kind, lambda entry, kind=kind: interval(entry["types"][kind]), most)
    total = max(summary[name]["all"]["total"] for name in names)
    row("**all**", lambda entry: f"**{interval(entry['all'])}**", total)
    for label, field in (("all, open", "open"), ("all, with options", "with_options")):
        count = max(summary[name][field]["total"] for name in names)
        if count:
            row(label, lambda entry, field=field: interval(entry[field]), count)
    if turns := configuration.get("turns"):
        row(f"all, in conversations of {turns} turns", lambda entry: interval(entry["in_turns"]), total)
    if summary[names[0]]["absent"]["total"]:
        for label, field in (("says that it is not there: where so", "absent"), ("where not so", "wrongly_absent")):
            row(label, lambda entry, field=field: interval(entry[field]), summary[names[0]][field]["total"])
    if summary[names[0]]["facts"] is not None:
        row("descriptions: facts told (F1)", lambda entry: _percent(entry["facts"]))
    asked = max(summary[name]["when"]["total"] for name in names)
    if asked:
        row("`when`: median error, s", lambda entry: _number(entry["when"]["median_error"]), asked)
        row(f"`when`: within {CLOSE_SECONDS:g} s", lambda entry: _percent(entry["when"]["close"]), asked)
    row(f"lost / gained against {names[0]}", lambda entry: f"{entry['lost']} / {entry['gained']}")
    if any(mode["store"] for mode in configuration["modes"]):
        rows[-1][0] = f"lost / gained against {names[0]}, or the same mode unpacked"
        row("difference, points", _difference)
    row("visual KV kept", lambda entry: _percent(entry["kept_share"]))
    row("visual tokens kept", lambda entry: f"{entry['kept_tokens']:,.0f}")
    row("s per question", lambda entry: _number(entry["seconds"]))
    row("s to encode a video", lambda entry: _number(entry["encode_seconds"]))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|---:|" + "---:|" * len(names))
    sparse, checkpoint = configuration["sparse_attention"], configuration["checkpoint"]
    left_out = configuration.get("modes_left_out", ())
    videos = result["videos"]
    frames = sorted({video["frames"] for video in videos})
    many = f"{frames[0]} to {frames[-1]}" if len(frames) > 1 else str(frames[0])
    head = [
        f"Accuracy in percent, with Wilson's 95 % interval; {len(videos)} videos of {many} frames "
        f"({configuration['source']}). Checkpoint {checkpoint['name']}, {checkpoint['parameters'] / 1e6:.1f} M "
        f"parameters, weights {checkpoint['weights_sha256'][:12]}. Prefill: {sparse['chunk_groups']} groups a chunk, "
        f"window {sparse['window_chunks']} chunks. Bi-level: {sparse['decode_chunk_groups']} groups a chunk, pooling "
        f"by {sparse['pool_size']}, reload {json.dumps(sparse['reload'])}."
        + (f" Modes that this model does not have: {', '.join(left_out)}." if left_out else ""),
        "",
    ]
    return "\n".join(head + lines) + "\n"


def _difference(entry) -> str:
    if entry["difference"] is None:
        return "-"
    low, high = (100 * end for end in entry["difference_interval"])
    return f"{100 * entry['difference']:+.2f} ({low:+.2f} to {high:+.2f})"


def _number(value) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def run(args: argparse.Namespace) -> dict:
    """Asks everything and writes both files; returns what is in the JSON.

    Raises:
        FileNotFoundError, ValueError: On bad settings or files, with what to do.
    """
    checkpoint = harness.start(args)
    sparse = harness.sparse_settings(args, checkpoint.model)
    modes, left_out = harness.offered_modes(checkpoint.model, args.modes, sparse)
    if left_out:
        print(f"left out, as this model does not have them: {', '.join(left_out)}", file=sys.stderr)
    modes = [
        mode if store is None else replace(mode, name=f"{mode.name} {store}", store=store)
        for mode in modes
        for store in (None, *args.store)
    ]
    size = harness.frame_size(checkpoint.model, args.frame_size)
    if args.data is None:
        source, videos = f"procedural world, {args.split}", world_videos(args, size)
        names = ("clips", "first_seed", "split", "seconds", "fps", "questions", "kinds", "choice_share", "encode")
        names += ("wordings", "lifelike")
    else:
        source, videos = args.data.name, file_videos(args)
        names = ("max_num_frames", "sample_fps", "max_sample_fps")
    settings = {name: getattr(args, name) for name in names} | ({"frame_size": size} if args.data is None else {})
    facts, records = [], []
    for number, video in enumerate(videos, 1):
        own_facts, own_records = ask_video(checkpoint, video, modes, sparse, args.max_new_tokens, args.turns)
        facts.append(own_facts)
        records += own_records
        shares = (
            f"{mode.name} {sum(each['modes'][mode.name]['correct'] for each in asked) / len(asked):.3f}"
            for mode in modes
            if (asked := [record for record in records if mode.name in record["modes"]])
        )
        print(f"{number} videos, {len(records)} questions: {', '.join(shares)}", file=sys.stderr)
    if not records:
        raise ValueError("there is nothing to ask: no video has a question of the wanted kinds")
    result = {
        "format": FORMAT,
        "configuration": {
            "checkpoint": checkpoint.facts,
            "modes": [asdict(mode) for mode in modes],
            "modes_left_out": left_out,
            "sparse_attention": sparse,
            "max_new_tokens": args.max_new_tokens,
            "turns": args.turns,
            "source": source,
            **settings,
        },
        "environment": harness.environment(args.device),
        "summary": summarize(records, facts, modes),
        "videos": facts,
        "questions": records if args.answers else [],
    }
    harness.write_text(args.out, harness.dump(result))
    harness.write_text(args.out.with_suffix(".md"), markdown(result))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs from a command line."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.out.suffix != ".json":
        parser.error("--out must end in .json")
    if args.clips < 1 or min(args.seconds) < 1 or not args.fps > 0:
        parser.error("--clips, --seconds and --fps must be above 0")
    try:
        result = run(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {' '.join(str(error).split())}\n")
    print(markdown(result))
    print(f"written: {args.out}, {args.out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
