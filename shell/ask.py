"""Asks questions about a video from a shell; the video is encoded once, whatever the number of questions.

What is surprising:
* With `--json`, standard output gets one JSON object and nothing else; warnings and progress go to standard error.
* Questions on the command line know nothing of each other; those of a conversation follow one another.
* `--load` takes the place of the video: what was encoded then is asked now, so settings of encoding are refused.
* Words in front that are files are what is asked about: one video, or the pictures of a video.
* A file that cannot be saved (the disk is full) does not cost the answers: they come first, then the error.
"""

import argparse
import contextlib
import os
import sys
import time

from . import pictures
from .options import (
    DECODE_FIELDS,
    FAILED,
    FRAME_OPTIONS,
    PREFILL_FIELDS,
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
    rate,
    sampling_of,
    say,
)
from .records import json_line

PROMPT = "\nyou> "
EPILOG = """\
examples:
  %(prog)s talk.mp4 "What is this talk about?"
      Takes 1 to 4 frames a second, at most 512, and asks the bundled model.

  %(prog)s talk.mp4
      A conversation: each question is answered in the light of the earlier ones, until Ctrl-D.

  %(prog)s match.mp4 "Who wins?" "When is the first goal?" --stats
      Encodes the video once, answers both questions, each by itself, and tells where time and memory went.

  %(prog)s film.mp4 --plan --uniform --max-num-frames 1024
      Says what that would take in tokens and memory, before anything is decoded.

  %(prog)s film.mp4 "Tell the plot." --uniform --max-num-frames 1024
      Spreads 1024 frames over the whole film, whatever its length.

  %(prog)s shots/ "What changes?" --fps 0.5
  %(prog)s a.jpg b.jpg c.jpg "What changes?" --timestamps 0 20 65
      Pictures as a video: all of a folder in the order of their names and numbers, or those that are named.

  %(prog)s film.mp4 "Tell the plot." --model converted/ --device cuda --dtype bfloat16 --json
      Another model folder (convert_weights.py writes them), on a GPU, answering in JSON.

  %(prog)s talk.mp4 "Who speaks at 12:34?" --prefill streaming --decode bilevel --show-chunks --save talk.videoxl
      Sparse attention; the chunks that the question chose, with times and scores; keeps the encoded video in a file.

  %(prog)s --load talk.videoxl "And who speaks last?" --decode bilevel
      Asks the saved video: nothing is decoded or encoded.

many videos: the command batch, see its --help

exit status:
  0 done; 2 bad usage or bad input (no such file, not a video, not a model); 130 interrupted; 1 anything else
"""


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        epilog=EPILOG,
        usage="%(prog)s [options] VIDEO [QUESTION ...]\n       %(prog)s [options] PICTURES [QUESTION ...]\n"
        "       %(prog)s [options] --load FILE [QUESTION ...]\n"
        "       %(prog)s [options] --plan VIDEO",
        description="Ask about a video. It is encoded once; every question is answered on the encoded video. Without "
        "a question, a terminal becomes a conversation.",
    )
    parser.add_argument(
        "video", metavar="VIDEO", nargs="?", help="a video file, a folder of pictures, or several pictures"
    )
    parser.add_argument("questions", metavar="QUESTION", nargs="*", help="one question or more, each in quotes")
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="go on with questions from standard input, one a line"
    )
    frames = add_encoding_options(parser)
    frames.add_argument("--fps", metavar="FPS", type=rate, help="pictures a second, of pictures (default: 1)")
    frames.add_argument(
        "--timestamps", metavar="SECONDS", type=float, nargs="+", help="when each picture was taken, of pictures"
    )
    files = parser.add_argument_group("encoded videos")
    files.add_argument(
        "--save",
        metavar="FILE",
        help="keep the encoded video in FILE, which must not exist yet; questions are optional",
    )
    files.add_argument("--load", metavar="FILE", help="ask the video that --save kept, instead of VIDEO")
    add_model_options(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--plan", action="store_true", help="print what VIDEO would take in tokens and memory, and stop"
    )
    output.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    output.add_argument("--show-chunks", action="store_true", help="also print what each answer saw of the video")
    output.add_argument("--stats", action="store_true", help="also print model, precision, memory and speed")
    return parser


def check_options(options: argparse.Namespace) -> dict:
    """Checks what needs no model; returns the sampling settings for `encode_video`.

    Raises:
        FileNotFoundError, ValueError: With what to do.
    """
    options.pictures = None
    if options.load is not None:
        # Without a VIDEO, all words are questions.
        options.questions[:0] = [] if options.video is None else [options.video]
        options.video = None
        if fixed := [name for name in (*FRAME_OPTIONS, "store", *PREFILL_FIELDS) if hasattr(options, name)]:
            raise ValueError(f"--{fixed[0].replace('_', '-')} was settled when {options.load} was saved; leave it out")
        check_file(options.load, "file of an encoded video")
    elif options.video is not None:
        _take_pictures(options)
    if options.pictures is None and (options.fps is not None or options.timestamps is not None):
        raise ValueError("--fps and --timestamps are for pictures; a video file has times of its own")
    if options.plan:
        if options.video is None or options.questions or options.interactive:
            raise ValueError("--plan takes a VIDEO and no questions")
        if options.save is not None:
            raise ValueError("--plan encodes nothing that --save could keep; leave one of them out")
    elif options.video is None and options.load is None:
        raise ValueError("VIDEO and QUESTION are missing, see --help")
    elif not options.questions and not options.interactive and options.save is None:
        # At a terminal, the user can still be asked.
        if options.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise ValueError("QUESTION is missing; write it in quotes behind the video")
        options.interactive = True
    if not all(map(str.strip, options.questions)):
        raise ValueError("a question is empty; write it in quotes")
    if len(options.questions) > 2 and not any(" " in question for question in options.questions):
        raise ValueError(f"{len(options.questions)} questions of one word each: write a question in quotes")
    if options.interactive and options.json:
        raise ValueError("--json prints one object at the end; a conversation (--interactive) has none")
    sampling = sampling_of(options)
    if options.save is not None:
        if os.path.lexists(options.save):
            raise ValueError(f"--save {options.save} exists already; remove it, or save under another name")
        if not os.path.isdir(folder := os.path.dirname(options.save) or "."):
            raise FileNotFoundError(f"--save {options.save}: there is no folder {folder}")
    check_model(options)
    return sampling


def _take_pictures(options: argparse.Namespace) -> None:
    """Finds out what the first words are: a video file, or the pictures of a video, with their times.

    Raises:
        FileNotFoundError, ValueError: If they are neither.
    """
    if not os.path.isdir(options.video):
        check_file(options.video, "video file")
    words = [options.video, *options.questions]
    count = next((number for number, word in enumerate(words) if not os.path.isfile(word)), len(words))
    options.questions[:] = words[max(count, 1) :]
    options.pictures = pictures.pictures_of(words[: max(count, 1)])
    if options.pictures is None:
        return
    options.video = options.video if count == 0 else f"{count} pictures"
    most = getattr(options, "max_num_frames", 512)
    if len(options.pictures) > most:
        raise ValueError(f"{len(options.pictures)} pictures, of which all are taken; --max-num-frames allows {most}")
    if given := [name for name in FRAME_OPTIONS if hasattr(options, name) and name != "max_num_frames"]:
        raise ValueError(f"--{given[0].replace('_', '-')} is for video files; of pictures all are taken, see --fps")
    options.timestamps = pictures.times_of(len(options.pictures), options.fps, options.timestamps)


class Session:
    """A loaded model and an encoded video, to be asked.

    Args:
        options, sampling: What `check_options` has seen and returned.

    Attributes:
        facts: What --json prints, without answers.
    """

    def __init__(self, options: argparse.Namespace, sampling: dict):
        started, self.unsaved = time.perf_counter(), None
        say("loading the model ...")
        self.options, self.device = options, choose_device(options.device)
        self.model, self.tokenizer = load_model(options, self.device, options.json or not sys.stderr.isatty())
        self.facts = {"model": options.model}
        self.stored = {"store": options.store} if hasattr(options, "store") else {}
        loaded = time.perf_counter()
        if options.plan:
            what = {"video_path": options.video, **sampling}
            what = what if options.pictures is None else {"num_frames": len(options.pictures)}
            self.plan = self.model.plan(
                tokenizer=self.tokenizer, max_new_tokens=options.max_new_tokens, **what, **self.stored
            )
            return
        say("reading the video ...")
        if options.load is not None:
            self.video = self.model.load_video(options.load, self.tokenizer)
        else:
            seen = {"video_path": options.video, **sampling}
            if options.pictures is not None:
                seen = {"video_path": options.pictures, "timestamps": options.timestamps}
            self.video = self.model.encode_video(tokenizer=self.tokenizer, **seen, **self.stored)
        encoded = time.perf_counter()
        if options.save is not None:
            try:
                self.video.save(options.save)
            except OSError as error:
                self.unsaved = f"--save {options.save}: the file was not written: {error.strerror or error}"
        sparse = self.model.config.resolve_sparse_attention()
        self.facts |= {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "device": str(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "video": str(self.video) or options.video,
            "loaded_from": options.load,
            "saved_to": None if self.unsaved else options.save,
            "duration": round(self.video.duration, 3),
            "num_frames": self.video.num_frames,
            "visual_tokens": self.video.num_visual_tokens,
            "tokens": len(self.video.input_ids),
            "cache_bytes": self.video.nbytes,
            "load_seconds": round(loaded - started, 3),
            "encode_seconds": round(encoded - loaded, 3),
            "sparse_attention": {**self.video.prefill, **{name: getattr(sparse, name) for name in DECODE_FIELDS}},
        }

    def ask(self, question: str, out=None, history=None) -> tuple[dict, list]:
        """Answers a question, streaming to the text file `out` if there is one.

        Returns:
            What --json says about the answer, and the history with this turn.
        """
        from .output import AnswerStreamer

        streamer, before = AnswerStreamer(self.tokenizer, out), time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            answer, history, chunks = self.model.chat(
                self.video,
                self.tokenizer,
                question,
                chat_history=history,
                return_chunks=True,
                streamer=streamer,
                generation_config=generation_settings(self.options),
            )
        entry = {"question": question, "answer": answer, "tokens": streamer.tokens}
        entry["seconds"] = round(time.perf_counter() - before, 3)
        return entry | ({"chunks": chunks} if self.options.show_chunks else {}), history

    def peak_memory(self) -> int | None:
        """Bytes: of the GPU that was used, else of this process; None where the system does not tell."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(session: Session, question: str, history=None) -> list:
    """Asks and prints; returns the history."""
    from .output import describe_answer

    sys.stdout.write("A  ")
    sys.stdout.flush()
    entry, history = session.ask(question, sys.stdout, history)
    sys.stdout.write("\n" + describe_answer(entry, session.options.stats))
    sys.stdout.flush()
    return history


def converse(session: Session, history: list | None) -> None:
    """Answers questions from standard input, each in the light of the earlier ones, until its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (lets `input` edit its line)

    typed, interrupted = sys.stdin.isatty(), False
    if typed:
        print(
            "\nAsk on. /new forgets the conversation (not the video), /quit or Ctrl-D ends it. Ctrl-C stops an "
            "answer, or clears the line; twice ends it."
        )
    while True:
        try:
            question = input(PROMPT if typed else "").strip()
        except KeyboardInterrupt:
            if interrupted or not typed:
                raise
            interrupted = True
            print()
            continue
        except EOFError:
            if typed:
                print()
            return
        interrupted = False
        if question == "/quit":
            return
        if question == "/new":
            history = None
        elif question.startswith("/"):
            print(f"there is no {question.split()[0]}; there are /new and /quit")
        elif question:
            if not typed:
                print(f"\nQ  {question}")
            try:
                history = show(session, question, history)
            except KeyboardInterrupt:
                # The turn is not in the history: it can be asked again.
                print("\n   [stopped]")
            except (ValueError, RuntimeError) as error:
                print(f"\n   [{type(error).__name__}: {' '.join(str(error).split())}]")


def run(options: argparse.Namespace, sampling: dict) -> None:
    """Does what the options say, and prints it."""
    # Whatever libraries print must not get between the caller and the result.
    with contextlib.redirect_stdout(sys.stderr):
        session = Session(options, sampling)
    if options.plan:
        facts = {**session.facts, "video": options.video, "plan": session.plan.to_dict()}
        print(json_line(facts).strip() if options.json else session.plan)
    elif options.json:
        answers = [session.ask(question)[0] for question in options.questions]
        facts = {**session.facts, "answers": answers, "peak_memory_bytes": session.peak_memory()}
        print(json_line(facts), end="")
    else:
        from .output import describe_memory, describe_video

        sys.stdout.write(describe_video(session.facts, options.stats))
        history = None
        for question in options.questions:
            print(f"\nQ  {question}")
            # Questions of one command know nothing of each other, unless they begin a conversation.
            history = show(session, question, history if options.interactive else None)
        if options.interactive:
            converse(session, history)
        if options.stats:
            sys.stdout.write(describe_memory(session.peak_memory()))
    if session.unsaved:
        sys.stdout.flush()
        fail(FAILED, session.unsaved)


def main(arguments: list[str], prog: str | None = None) -> int:
    """The command line, of a program of this name; returns the exit status."""
    options = build_parser(prog).parse_intermixed_args(arguments)
    with errors_as_status():
        run(options, check_options(options))
        sys.stdout.flush()
    return 0
