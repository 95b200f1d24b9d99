"""Answers the questions of a file about many videos, each video encoded once.

What is surprising:
* Every process appends its answers to a journal of its own next to the output. The output is written from the
  journals, in the order of the questions, when all is done or the run is interrupted; after a crash, by the next run.
* A run goes on where an earlier one stopped, whatever the number of processes then and now: what has an answer is not
  asked again, what has an error is. Settings must be those of the earlier run, which lie beside the output.
* The estimate of the time left is not tqdm's. Videos differ in length, so time is counted per sampled frame and per
  question, both as measured in this run; until both are known there is none.
"""

import argparse
import contextlib
import glob
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

from .options import (
    BAD_INPUT,
    Parser,
    add_encoding_options,
    add_model_options,
    check_file,
    check_model,
    choose_device,
    errors_as_status,
    fail,
    generation_settings,
    load_model,
    sampling_of,
)
from .records import Question, answers_in, json_line, read_json, read_questions, replace_file

SOME_FAILED = 3
# How long a process waits for the slowest one. The default of torch.distributed, minutes, would end the run.
PATIENCE = timedelta(days=30)
# Where standard error is no terminal, it gets a line this often, in seconds.
LINE_EVERY = 30

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
tried again, new lines of questions.jsonl are answered too.

examples:
  %(prog)s questions.jsonl --out answers.jsonl --model converted/ --dtype bfloat16
  accelerate launch --num_processes 4 -m videoxl.cli batch questions.jsonl --out answers.jsonl --model converted/
      The videos are shared out among four processes, on one GPU each.

exit status:
  0 all answered; 3 done, but some lines have an error; 2 bad usage or bad input; 130 interrupted; 1 anything else
  (accelerate launch turns each of them into 1)
"""


@dataclass
class Video:
    """A video, the questions about it that are to be answered, and its number of sampled frames (0: unreadable)."""

    path: str
    questions: list[Question] = field(default_factory=list)
    frames: int = 0


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


class Journal:
    """Answers on disk: what this and earlier runs have, and the file that puts them in order.

    Args:
        out: The file of answers. Its journals lie beside it.
        questions: All questions, in their order.
    """

    def __init__(self, out: Path, questions: list[Question]):
        self.out, self.questions = out, questions
        self.settings_file = out.with_name(f"{out.name}.settings.json")

    def parts(self) -> list[Path]:
        """The journals of all processes, of this run and of runs that crashed."""
        return sorted(self.out.parent.glob(f"{glob.escape(self.out.name)}.part-*"))

    def known(self) -> dict[tuple[str, str], dict]:
        """The newest entry for each key, an answer before an error."""
        entries = {}
        for file in [self.out] * self.out.is_file() + self.parts():
            for entry in answers_in(file):
                key = (entry.get("video"), entry.get("question"))
                if "answer" in entry or "answer" not in entries.get(key, {}):
                    entries[key] = entry
        return entries

    def to_ask(self) -> list[Video]:
        """The videos with questions that have no answer yet, in the order of their first question."""
        answered = {key for key, entry in self.known().items() if "answer" in entry}
        videos = {}
        for question in self.questions:
            if question.key not in answered:
                answered.add(question.key)
                videos.setdefault(question.path, Video(question.path)).questions.append(question)
        return list(videos.values())

    def collect(self) -> tuple[int, int]:
        """Writes the file of answers from all that is known, and removes the journals.

        Returns:
            The number of lines with an answer, and with an error.
        """
        parts, known = self.parts(), self.known()
        lines, counts = [], {"answer": 0, "error": 0}
        for question in self.questions:
            if entry := known.get(question.key):
                lines.append(json_line({**entry, "id": question.id}))
                counts["answer" if "answer" in entry else "error"] += 1
        replace_file(self.out, "".join(lines))
        for file in parts:
            file.unlink()
        return counts["answer"], counts["error"]

    def settle(self, settings: dict) -> None:
        """Keeps the settings, or checks that the answers that exist were made with the same.

        Raises:
            ValueError: If they were not, or answer other questions.
        """
        exists = self.out.exists() or bool(self.parts())
        if exists and self.settings_file.is_file():
            try:
                before = read_json(self.settings_file)
            except ValueError as error:
                raise ValueError(f"{self.settings_file} is damaged; choose another --out") from error
            if changed := sorted(key for key in settings.keys() | before if settings.get(key) != before.get(key)):
                raise ValueError(
                    f"{self.out} has answers of another {changed[0]}: {before.get(changed[0])} then, "
                    f"{settings.get(changed[0])} now; use the same settings, or another --out"
                )
            if others := self.known().keys() - {question.key for question in self.questions}:
                raise ValueError(
                    f"{self.out} answers {len(others)} questions that are no longer asked, such as {min(others)}, and "
                    "would lose them; choose another --out"
                )
        elif exists:
            raise ValueError(f"{self.out} exists, and was not written by this program; choose another --out")
        else:
            replace_file(self.settings_file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


class Clock:
    """How long the rest will take, from what was measured: seconds per frame encoded and per question answered."""

    def __init__(self, videos: Iterable[Video]):
        self.frames = self.questions = 0
        for video in videos:
            self.frames += video.frames
            self.questions += len(video.questions)
        self.encoding, self.answering = [0.0, 0], [0.0, 0]

    def encoded(self, frames: int, seconds: float) -> None:
        self.encoding[0] += seconds
        self.encoding[1] += frames

    def answered(self, seconds: float) -> None:
        self.answering[0] += seconds
        self.answering[1] += 1

    def skipped(self, video: Video) -> None:
        """A video that could not be read takes its frames and questions with it."""
        self.frames -= video.frames
        self.questions -= len(video.questions)

    def left(self) -> float | None:
        """Seconds until the end, None as long as nothing was measured."""
        if not (self.encoding[1] and self.answering[1]):
            return None
        frames, questions = self.frames - self.encoding[1], self.questions - self.answering[1]
        per_frame, per_question = (total / count for total, count in (self.encoding, self.answering))
        return max(frames, 0) * per_frame + max(questions, 0) * per_question

    def __str__(self):
        left = self.left()
        if left is None:
            return "time left not known yet"
        if left < 90:
            return f"about {left:.0f} s left"
        return f"about {left / 60:.0f} min left" if left < 5400 else f"about {left / 3600:.1f} h left"


@dataclass
class Processes:
    """This process among those that `accelerate launch` started; alone without it."""

    index: int = 0
    count: int = 1
    device: str | None = None
    state: object = None

    @classmethod
    def join(cls, device: str | None) -> "Processes":
        """Raises ValueError if there are several processes, and accelerate is missing."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls(device=device)
        try:
            # Imported after the group is made, it would hold the group for ever (as a default argument), and gloo's
            # threads would outlive leave(): one that is busy when the interpreter ends can abort the process.
            import torch.distributed.nn  # noqa: F401
            from accelerate import PartialState
        except ImportError as error:
            raise ValueError("several processes need accelerate: pip install accelerate") from error
        state = PartialState(cpu=device == "cpu", timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, device or str(state.device), state)

    def wait(self) -> None:
        """Returns when all processes have come here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def leave(self) -> None:
        """Takes leave of the others, without which torch warns."""
        if self.state is not None:
            self.state.destroy_process_group()


class Worker:
    """Answers the questions about some videos, one video after the other."""

    def __init__(self, options, sampling: dict, processes: Processes, journal: Journal):
        self.options, self.sampling, self.journal, self.processes = options, sampling, journal, processes
        self.model, self.tokenizer = load_model(options, choose_device(processes.device), quiet=True)

    def run(self, videos: list[Video]) -> None:
        """Answers all that is to be asked about `videos`; whatever happens is in the journal at once."""
        for video in videos:
            with contextlib.suppress(Exception):  # reported when it is its turn
                plan = self.model.plan(video_path=video.path, tokenizer=self.tokenizer, **self.sampling)
                video.frames = plan.frames
        clock, file = Clock(videos), self.journal.out.with_name(f"{self.journal.out.name}.part-{self.processes.index}")
        share = f", process {self.processes.index + 1} of {self.processes.count}" * (self.processes.count > 1)
        shown = self.processes.index == 0
        on_terminal = shown and sys.stderr.isatty()
        total, said = sum(len(video.questions) for video in videos), time.monotonic()
        with (
            open(file, "a", encoding="utf-8") as part,
            # {remaining} would be an average over questions of short and long videos alike.
            tqdm(total=total, unit="question", desc=f"{len(videos)} videos{share}", disable=not on_terminal,
                 bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} questions, {elapsed} gone{postfix}",
                 ) as bar,
        ):  # fmt: skip
            bar.set_postfix_str(str(clock))
            for done, entry in enumerate(self.answers(videos, clock), 1):
                part.write(json_line(entry))
                part.flush()
                bar.set_postfix_str(str(clock), refresh=False)
                bar.update()
                if shown and not on_terminal and time.monotonic() - said >= LINE_EVERY:
                    said = time.monotonic()
                    print(f"{done}/{total} questions{share}, {clock}", file=sys.stderr)

    def answers(self, videos: list[Video], clock: Clock) -> Iterator[dict]:
        """One entry per question; what goes wrong is an entry, too."""
        for video in videos:
            encoded, reason, started = None, None, time.perf_counter()
            try:
                encoded = self.model.encode_video(video.path, self.tokenizer, **self.sampling, progress=False)
                clock.encoded(video.frames, time.perf_counter() - started)
            except Exception as error:  # of whatever kind: one bad video must not stop the rest
                reason = describe_error(error)
                clock.skipped(video)
            for question in video.questions:
                yield question.entry | (
                    {"error": reason} if encoded is None else self.answer(encoded, question, clock)
                )

    def answer(self, encoded, question: Question, clock: Clock) -> dict:
        """The answer with its tokens and seconds, or the error."""
        from .output import AnswerStreamer

        streamer, started = AnswerStreamer(self.tokenizer), time.perf_counter()
        settings = {"return_history": False, "generation_config": generation_settings(self.options)}
        try:
            answer = self.model.chat(encoded, self.tokenizer, question.text, streamer=streamer, **settings)
        except Exception as error:
            return {"error": describe_error(error)}
        finally:
            seconds = time.perf_counter() - started
            clock.answered(seconds)
        return {"answer": answer, "tokens": streamer.tokens, "seconds": round(seconds, 3)}


def describe_error(error: Exception) -> str:
    """One line for an answer that is none."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def settings_of(options: argparse.Namespace, sampling: dict) -> dict:
    """What answers depend on: everything that was said on the command line but where files and devices are."""
    places = ("questions", "out", "device", "trust_remote_code", "uniform")
    said = {key: value for key, value in vars(options).items() if key not in places} | sampling
    said["videos"] = str(Path(options.videos or Path(options.questions).parent).resolve())
    if (model := Path(options.model)).is_dir():
        said["model"] = str(model.resolve())
        states = [(file.name, file.stat()) for file in sorted(model.glob("*.safetensors"))]
        said["weights"] = [f"{name}: {state.st_size} bytes of {state.st_mtime:.0f}" for name, state in states]
    return said


def main(arguments: list[str], prog: str | None = None) -> int:
    """The command line, of a program of this name; returns the exit status."""
    options = build_parser(prog).parse_intermixed_args(arguments)
    with errors_as_status():
        check_file(options.questions, "file of questions")
        source, out = Path(options.questions), Path(options.out).absolute()
        if out.is_dir() or out == source.absolute():
            raise ValueError(f"--out {options.out} must be a file of its own")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"--out {options.out}: there is no folder {out.parent}")
        questions = read_questions(source, Path(options.videos) if options.videos else source.parent)
        sampling = sampling_of(options)
        check_model(options)
        processes = Processes.join(options.device)
        journal = Journal(out, questions)
        problem = None
        if processes.index == 0:
            try:
                journal.settle(settings_of(options, sampling))
                journal.collect()
            except ValueError as error:
                problem = error
        processes.wait()
        if problem is not None:
            fail(BAD_INPUT, problem)
        return answer_all(options, sampling, processes, journal)


def answer_all(options, sampling: dict, processes: Processes, journal: Journal) -> int:
    """Answers this process's share, waits for the others, and puts the answers in order."""
    videos = journal.to_ask()
    # Nobody writes before all have read, so that all agree about the shares.
    processes.wait()
    mine, total = videos[processes.index :: processes.count], len(journal.questions)
    if processes.index == 0:
        asked = sum(len(video.questions) for video in videos)
        already = f", {total - asked} of {total} lines need no asking" if asked < total else ""
        print(f"{asked} questions about {len(videos)} videos{already}", file=sys.stderr)
    try:
        if mine:
            with contextlib.redirect_stdout(sys.stderr):
                Worker(options, sampling, processes, journal).run(mine)
        if processes.index == 0 and processes.count > 1:
            print("waiting for the other processes", file=sys.stderr)
        processes.wait()
    except BaseException:
        if processes.count == 1:
            # Alone, so nobody else writes: what is there is worth having.
            journal.collect()
        raise
    failed = 0
    if processes.index == 0:
        answered, failed = journal.collect()
        print(f"{journal.out}: {answered} answers, {failed} errors", file=sys.stderr)
    processes.leave()
    return SOME_FAILED if failed else 0
