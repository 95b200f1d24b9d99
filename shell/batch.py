"""Answers the questions of a file about many videos, each video encoded once.

What is surprising:
* A run goes on where an earlier one stopped, whoever wrote its files, this program or `serving/ray_batch.py`: what has
  an answer is not asked again, what has an error is. Settings must be those of the earlier run, which lie beside the
  output.
* The estimate of the time left is not tqdm's. Videos differ in length, so time is counted per sampled frame and per
  question, both as measured in this run, and it moves while a video is being encoded.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from .options import (
    Parser,
    add_encoding_options,
    add_model_options,
    check_file,
    check_model,
    choose_device,
    errors_as_status,
    load_model,
    sampling_of,
)
from .records import (
    Answers,
    Question,
    ask_video,
    keep_answers,
    open_answers,
    settings_of,
    videos_folder,
)

SOME_FAILED = 3
# How often the line on a terminal changes, and how often standard error gets a line where it is none, in seconds.
REFRESH, LINE_EVERY = 0.2, 30

EPILOG = """\
questions.jsonl has one JSON object a line; "id" is optional and comes back with the answer:
  {"video": "talks/a.mp4", "question": "What is this talk about?"}
  {"video": "talks/a.mp4", "question": "Who asks the first question?", "id": "a-2"}
Paths are relative to the folder of questions.jsonl, unless --videos names another.

answers.jsonl gets one line for each line of questions.jsonl, in their order:
  {"id": 1, "video": "talks/a.mp4", "question": "...", "answer": "...", "tokens": 9, "seconds": 0.4}
  {"id": "a-2", "video": "talks/a.mp4", "question": "...", "error": "VideoDecodeError: ..."}
answers.jsonl.settings.json says what they were made with.

Stop it whenever you like, and run the same command again to go on: what is answered is not asked again, errors are
tried again, new lines of questions.jsonl are answered too. What a killed run has answered lies in answers.jsonl.parts
until then.

example:
  %(prog)s questions.jsonl --out answers.jsonl --model converted/ --dtype bfloat16

several GPUs or machines: python -m videoxl.serving.ray_batch, which reads and writes the same files

exit status:
  0 all answered; 3 done, but some lines have an error; 2 bad usage or bad input; 130 interrupted; 1 anything else
"""


@dataclass
class Video:
    """The questions about a video that are to be answered, and its number of sampled frames (0: not known)."""

    questions: list[Question]
    frames: int = 0

    @property
    def path(self) -> str:
        return self.questions[0].path


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        epilog=EPILOG,
        description="Answer many questions about many videos; each video is encoded once.",
    )
    parser.add_argument("questions", metavar="QUESTIONS", help="file of questions, one JSON object a line")
    parser.add_argument("--out", metavar="ANSWERS", required=True, help="file of answers; goes on if it exists")
    parser.add_argument("--videos", metavar="DIR", help="folder of the videos (default: that of QUESTIONS)")
    add_encoding_options(parser)
    add_model_options(parser)
    return parser


class Clock:
    """How long the rest will take, from what was measured: seconds per frame encoded and per question answered."""

    def __init__(self, videos: Iterable[Video]):
        self.left = {"frames": 0, "questions": 0}
        for video in videos:
            self.left["frames"] += video.frames
            self.left["questions"] += len(video.questions)
        self.measured = {"frames": [0.0, 0], "questions": [0.0, 0]}

    def did(self, what: str, count: int, seconds: float) -> None:
        """So many frames or questions took so long."""
        self.left[what] -= count
        spent = self.measured[what]
        spent[:] = spent[0] + seconds, spent[1] + count

    def skipped(self, what: str, count: int) -> None:
        """So many will not be done: their video cannot be read."""
        self.left[what] -= count

    def seconds(self, what: str) -> float | None:
        """How long the rest of the frames or questions will take; None as long as none was measured."""
        spent, count = self.measured[what]
        return max(self.left[what], 0) * spent / count if count else None

    def __str__(self):
        known = [seconds for what in self.left if (seconds := self.seconds(what)) is not None]
        if not known:
            return "time left not known yet"
        # Of the first video, all that is known at first is how long encoding takes.
        about = "about" if len(known) == len(self.left) else "more than"
        left = sum(known)
        if left < 90:
            return f"{about} {left:.0f} s left"
        return f"{about} {left / 60:.0f} min left" if left < 5400 else f"{about} {left / 3600:.1f} h left"


class Display:
    """The line that says how far a run is, inside a video that is being encoded, too."""

    def __init__(self, videos: list[Video]):
        self.clock, self.done, self.video, self.frames = Clock(videos), 0, "", ""
        self.total = sum(len(video.questions) for video in videos)
        self.on_terminal, self.said = sys.stderr.isatty(), time.monotonic()
        # {remaining} would be an average over questions of short and long videos alike.
        self.bar = tqdm(
            total=self.total,
            disable=not self.on_terminal,
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} questions, {elapsed} gone{postfix}",
        )

    def show(self) -> None:
        """Says how far it is, if it is time to."""
        if time.monotonic() - self.said < (REFRESH if self.on_terminal else LINE_EVERY):
            return
        from .output import printable

        self.said = time.monotonic()
        line = printable(f"{os.path.basename(self.video)}{self.frames}, {self.clock}")
        if self.on_terminal:
            self.bar.set_postfix_str(line)
        else:
            print(f"{self.done}/{self.total} questions, {line}", file=sys.stderr)

    def answered(self, entry: dict) -> None:
        self.done += 1
        if "answer" in entry:
            self.clock.did("questions", 1, entry["seconds"])
        else:
            self.clock.skipped("questions", 1)
        self.bar.update()
        self.show()


class FrameBar:
    """What `encode_video` takes for a progress bar: tells the display of each batch of frames."""

    def __init__(self, display: Display, total: int, **_):
        self.display, self.total, self.count = display, total, 0

    def __enter__(self):
        self.since = time.perf_counter()
        return self

    def update(self, count: int) -> None:
        now = time.perf_counter()
        self.count += count
        self.display.clock.did("frames", count, now - self.since)
        self.display.frames, self.since = f": {self.count} of {self.total} frames", now
        self.display.show()

    def __exit__(self, *_):
        self.display.frames = ""


def run(options, sampling: dict, answers: Answers, videos: list[Video]) -> None:
    """Answers all that is to be asked about `videos`."""
    model, tokenizer = load_model(options, choose_device(options.device), quiet=True)
    for video in videos:
        with contextlib.suppress(Exception):  # reported when it is its turn
            video.frames = model.plan(video_path=video.path, tokenizer=tokenizer, **sampling).frames
    display = Display(videos)
    ask = partial(
        ask_video,
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        progress=partial(FrameBar, display),
        **sampling,
        **({"store": options.store} if hasattr(options, "store") else {}),
    )
    with display.bar:
        for video in videos:
            display.video, before = video.path, display.clock.left["frames"]
            for entry in keep_answers(answers.part(video.questions), video.questions, ask):
                display.answered(entry)
            # Where it could not be read to its end.
            display.clock.skipped("frames", video.frames - (before - display.clock.left["frames"]))


def said_of(options: argparse.Namespace, sampling: dict) -> dict:
    """What the command line said of that which answers depend on, so not of where files and devices are."""
    places = ("questions", "out", "videos", "model", "device", "trust_remote_code", "uniform")
    return {key: value for key, value in vars(options).items() if key not in places} | sampling


def main(arguments: list[str], prog: str | None = None) -> int:
    """The command line, of a program of this name; returns the exit status."""
    options = build_parser(prog).parse_intermixed_args(arguments)
    with errors_as_status():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                "batch is one process, and each of those that were launched would do all the work; for several GPUs "
                "use python -m videoxl.serving.ray_batch"
            )
        check_file(options.questions, "file of questions")
        answers = open_answers(options.questions, options.out, options.videos)
        sampling = sampling_of(options)
        check_model(options)
        videos = videos_folder(options.questions, options.videos)
        answers.settle(settings_of(said_of(options, sampling), options.model, videos))
        answers.collect()
        return answer_all(options, sampling, answers)


def answer_all(options, sampling: dict, answers: Answers) -> int:
    """Answers what has no answer yet, and puts the answers in order."""
    videos, total = [Video(questions) for questions in answers.to_ask()], len(answers.questions)
    asked = sum(len(video.questions) for video in videos)
    already = f", {total - asked} of {total} lines need no asking" if asked < total else ""
    print(f"{asked} questions about {len(videos)} videos{already}", file=sys.stderr)
    try:
        if videos:
            with contextlib.redirect_stdout(sys.stderr):
                run(options, sampling, answers, videos)
    except BaseException:
        # What is there is worth having; without room for it, it stays where it is for the next run.
        with contextlib.suppress(OSError):
            answers.collect()
        raise
    answered, failed = answers.collect()
    print(f"{answers.out}: {answered} answers, {failed} errors", file=sys.stderr)
    return SOME_FAILED if failed else 0
