"""Asks questions about a video from a shell; the video is encoded once, whatever the number of questions.

What is surprising:
* With `--json`, standard output gets one JSON object and nothing else; warnings and progress go to standard error.
* A model folder is used without the network, and its code runs: the caller names that folder (by default this
  one). A Hub id means code from elsewhere, so it needs `--trust-remote-code`.
* `--load` takes the place of the video: what was encoded then is asked now, so settings of encoding are refused.
* torch and transformers are imported after the arguments were checked, so that a typing mistake is answered at once.

Exit status: 0, or 2 for bad usage and bad input, or 1 for anything else.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
MIB = 2**20
# A table of chunks shows at most so many; --json has them all.
MAX_ROWS = 40
BAR_WIDTH = 24
# Options of encoding: they mean nothing for a video that is encoded already.
FRAME_OPTIONS = ("max_num_frames", "sample_fps", "max_sample_fps", "uniform")
PREFILL_FIELDS = ("prefill", "chunk_groups", "window_chunks")
DECODE_FIELDS = ("decode", "decode_chunk_groups", "pool_size")

EPILOG = """\
examples:
  python cli.py talk.mp4 "What is this talk about?"
      Takes 1 to 4 frames a second, at most 512, and asks the model in the folder of cli.py.

  python cli.py match.mp4 "Who wins?" "When is the first goal?" --stats
      Encodes the video once, answers both questions, and tells where time and memory went.

  python cli.py film.mp4 "Tell the plot." --uniform --max-num-frames 1024
      Spreads 1024 frames over the whole film, whatever its length.

  python cli.py film.mp4 "Tell the plot." --model converted/ --device cuda --dtype bfloat16 --json
      Another model folder (convert_weights.py writes them), on a GPU, answering in JSON.

  python cli.py talk.mp4 "Who speaks at 12:34?" --prefill streaming --decode bilevel --show-chunks --save talk.videoxl
      Sparse attention; the chunks that the question chose, with times and scores; keeps the encoded video in a file.

  python cli.py --load talk.videoxl "And who speaks last?" --decode bilevel
      Asks the saved video: nothing is decoded or encoded.

exit status:
  0 done; 2 bad usage or bad input (no such file, not a video, not a model); 1 anything else
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(2, f"{message} (see --help)")


class TokenCounter:
    """A streamer that counts the tokens of an answer; the prompt comes first, in one piece."""

    def __init__(self):
        self.calls = 0

    def put(self, value) -> None:
        self.calls += 1

    def end(self) -> None:
        """Nothing is left to write."""

    @property
    def tokens(self) -> int:
        return max(self.calls - 1, 0)


def fail(status: int, message: object) -> NoReturn:
    """Ends the program with one line on standard error."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def rate(text: str) -> float | None:
    """Frames a second, or None for "none"."""
    if text.lower() == "none":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f'expected frames a second above 0, or "none", got {text!r}')
    return value


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="cli.py",
        usage="cli.py [options] VIDEO QUESTION [QUESTION ...]\n       "
        "cli.py [options] --load FILE QUESTION [QUESTION ...]\n       cli.py [options] --plan VIDEO",
        description="Ask about a video. It is encoded once; every question is answered on the encoded video.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("video", metavar="VIDEO", nargs="?", help="path of a video file; not with --load")
    parser.add_argument("questions", metavar="QUESTION", nargs="*", help="one question or more, each in quotes")

    frames = parser.add_argument_group("frames")
    frames.add_argument(
        "--max-num-frames", metavar="N", type=positive_int, default=argparse.SUPPRESS, help="at most N (default: 512)"
    )
    frames.add_argument(
        "--sample-fps", metavar="FPS", type=rate, default=argparse.SUPPRESS, help="frames a second (default: 1)"
    )
    frames.add_argument(
        "--max-sample-fps",
        metavar="FPS",
        type=rate,
        default=argparse.SUPPRESS,
        help='rate of short videos, as far as N allows; "none": always --sample-fps (default: 4)',
    )
    frames.add_argument(
        "--uniform",
        action="store_true",
        default=argparse.SUPPRESS,
        help="spread N frames over the whole video, without a rate",
    )

    sparse = parser.add_argument_group("sparse attention", "Where nothing is given, the model's config decides.")
    for name, kind, text in (
        ("prefill", {"choices": ("full", "streaming", "mask")}, "what a part of the video sees of earlier parts"),
        ("chunk-groups", {}, "groups of frames in a chunk of prefill"),
        ("window-chunks", {}, "earlier chunks that a chunk sees in full"),
        ("decode", {"choices": ("full", "bilevel")}, "what a question sees: all, or pooled where it matters less"),
        ("decode-chunk-groups", {}, "groups of frames in a chunk of bilevel decoding"),
        ("pool-size", {}, "visual tokens that become one where pooled"),
    ):
        kind = kind or {"metavar": "N", "type": positive_int}
        sparse.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **kind)

    files = parser.add_argument_group("encoded videos")
    files.add_argument("--save", metavar="FILE", help="keep the encoded video in FILE, which must not exist yet")
    files.add_argument("--load", metavar="FILE", help="ask the video that --save kept, instead of VIDEO")

    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="DIR_OR_ID", default=str(HERE), help="folder or Hub id (default: the folder of cli.py)"
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run code from the Hub; needed for a Hub id")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: cuda if there is one, else cpu)")
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision (default: auto, which is that of the stored weights)",
    )
    model.add_argument(
        "--max-new-tokens", metavar="N", type=positive_int, default=256, help="longest answer (default: %(default)s)"
    )

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
    given = {name: getattr(options, name) for name in FRAME_OPTIONS if hasattr(options, name)}
    uniform = given.pop("uniform", False)
    if options.load is not None:
        # Without a VIDEO, all words are questions.
        options.questions[:0] = [] if options.video is None else [options.video]
        options.video = None
        if fixed := [name for name in (*FRAME_OPTIONS, *PREFILL_FIELDS) if hasattr(options, name)]:
            raise ValueError(f"--{fixed[0].replace('_', '-')} was settled when {options.load} was saved; leave it out")
        check_file(options.load, "file of an encoded video")
    elif options.video is not None:
        check_file(options.video, "video file")
    if options.plan and (options.video is None or options.questions):
        raise ValueError("--plan takes a VIDEO and no questions")
    if not (options.questions or options.plan):
        raise ValueError(f"{'QUESTION is' if options.video or options.load else 'VIDEO and QUESTION are'} missing")
    if not all(map(str.strip, options.questions)):
        raise ValueError("a question is empty; write it in quotes")
    if uniform and set(given) - {"max_num_frames"}:
        raise ValueError("--uniform takes frames without a rate; leave --sample-fps and --max-sample-fps out")
    if options.save is not None:
        if os.path.lexists(options.save):
            raise ValueError(f"--save {options.save} exists already; remove it, or save under another name")
        if not os.path.isdir(folder := os.path.dirname(options.save) or "."):
            raise FileNotFoundError(f"--save {options.save}: there is no folder {folder}")
    folder = Path(options.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a model folder: it has no config.json")
        # Read by huggingface_hub when it is imported, so before transformers is.
        os.environ["HF_HUB_OFFLINE"] = "1"
    elif folder.exists() or options.model.startswith((".", "/", "~")) or options.model.count("/") != 1:
        raise ValueError(f"{options.model} is neither a model folder nor a Hub id (org/name)")
    elif not options.trust_remote_code:
        raise ValueError(
            f"no folder {options.model} here, so it is a Hub id, and its code would run on this machine; "
            "add --trust-remote-code if you trust it"
        )
    return given | ({"sample_fps": None, "max_sample_fps": None} if uniform else {})


def check_file(path: str, what: str) -> None:
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such {what} (looked from {os.getcwd()})")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, expected a {what}")


def configure(config, options: argparse.Namespace) -> None:
    """Sets what the options say of sparse attention; all else stays as the model has it."""
    current = config.resolve_sparse_attention()
    given = {name: getattr(options, name) for name in PREFILL_FIELDS + DECODE_FIELDS if hasattr(options, name)}
    if any(name in given for name in PREFILL_FIELDS):
        # The published switches would win over what the user has typed.
        config.enable_sparse = config.enable_chunk_prefill = False
    config.sparse_attention = {name: given.get(name, getattr(current, name)) for name in current.fields}


def choose_device(name: str | None):
    """A device that works here.

    Raises:
        ValueError: If it does not.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def ask(options: argparse.Namespace, sampling: dict) -> dict:
    """Loads the model, encodes the video and answers all questions; returns what there is to say about it."""
    started = time.perf_counter()
    device = choose_device(options.device)
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    if options.json or not sys.stderr.isatty():
        logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=options.dtype).to(device)
    loaded = time.perf_counter()
    configure(model.config, options)
    if options.plan:
        length = {"max_new_tokens": options.max_new_tokens}
        plan = model.plan(video_path=options.video, tokenizer=tokenizer, **sampling, **length)
        return {"model": options.model, "video": options.video, "plan": plan.to_dict() if options.json else str(plan)}
    if options.load is not None:
        video = model.load_video(options.load, tokenizer)
    else:
        video = model.encode_video(options.video, tokenizer, **sampling)
    encoded = time.perf_counter()
    if options.save is not None:
        video.save(options.save)
    sparse = model.config.resolve_sparse_attention()
    result = {
        "model": options.model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "video": str(video),
        "loaded_from": options.load,
        "saved_to": options.save,
        "duration": round(video.duration, 3),
        "num_frames": video.num_frames,
        "visual_tokens": video.num_visual_tokens,
        "tokens": len(video.input_ids),
        "cache_bytes": video.nbytes,
        "load_seconds": round(loaded - started, 3),
        "encode_seconds": round(encoded - loaded, 3),
        "sparse_attention": {**video.prefill, **{name: getattr(sparse, name) for name in DECODE_FIELDS}},
        "answers": [],
    }
    settings = {"do_sample": False, "max_new_tokens": options.max_new_tokens}
    told = {"return_history": False, "return_chunks": True, "generation_config": settings}
    for question in options.questions:
        counter, before = TokenCounter(), time.perf_counter()
        answer, chunks = model.chat(video, tokenizer, question, streamer=counter, **told)
        entry = {"question": question, "answer": answer, "tokens": counter.tokens}
        entry["seconds"] = round(time.perf_counter() - before, 3)
        result["answers"].append(entry | ({"chunks": chunks} if options.show_chunks else {}))
    result["peak_memory_bytes"] = peak_memory(device)
    return result


def peak_memory(device) -> int | None:
    """Bytes: of the GPU that was used, else of this process; None where the system does not tell."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe(result: dict, stats: bool) -> str:
    """The result as text for a terminal."""
    if "plan" in result:
        return result["plan"]
    rows = [
        ("video", f"{result['video'] or 'frames from memory'}, {result['duration']:.1f} s"),
        ("frames", f"{result['num_frames']}"),
        ("visual tokens", f"{result['visual_tokens']}"),
        ("read saved video" if result["loaded_from"] else "decode + encode", f"{result['encode_seconds']:.2f} s"),
    ]
    if stats:
        peak = result["peak_memory_bytes"]
        rows[:0] = [
            ("model", f"{result['model']}, {result['parameters'] / 1e6:,.1f} M parameters"),
            ("runs on", f"{result['device']}, {result['dtype']}"),
            ("load", f"{result['load_seconds']:.2f} s"),
        ]
        rows += [
            ("attention", ", ".join(f"{name} {value}" for name, value in result["sparse_attention"].items())),
            ("encoded video", f"{result['tokens']} tokens, {result['cache_bytes'] / MIB:.1f} MiB of key-values"),
            ("peak memory", "unknown" if peak is None else f"{peak / MIB:,.0f} MiB"),
        ]
    lines = [f"{name:<17}{value}" for name, value in rows]
    for entry in result["answers"]:
        spent = f"{entry['seconds']:.2f} s"
        if stats and entry["seconds"] > 0:
            spent += f", {entry['tokens']} tokens, {entry['tokens'] / entry['seconds']:.0f} a second"
        lines += ["", f"Q  {entry['question']}", f"A  {entry['answer']}", f"   [{spent}]"]
        lines += chunk_table(entry.get("chunks", ()))
    # A model may write any byte; control characters would steer the terminal.
    return "".join(
        sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in "\n".join(lines)
    )


def chunk_table(chunks) -> list[str]:
    """Lines that show what became of each chunk; of many chunks, those that matter most."""
    if not chunks:
        return []
    levels = [chunk["level"] for chunk in chunks]
    counts = ", ".join(f"{levels.count(level)} {level}" for level in dict.fromkeys(levels))
    order = ("dense", "pooled", "dropped")
    ranked = sorted(chunks, key=lambda chunk: (order.index(chunk["level"]), -(chunk["score"] or 0)))
    shown = sorted(ranked[:MAX_ROWS], key=chunks.index)
    largest = max((chunk["score"] or 0 for chunk in chunks), default=0) or 1
    lines = ["", f"   {len(chunks)} chunks: {counts}" + f"; {MAX_ROWS} are shown" * (len(chunks) > MAX_ROWS)]
    lines.append(f"   chunk  {'seconds':^17}  level    score")
    for chunk in shown:
        times, score = f"{chunk['start']:7.1f} - {chunk['end']:7.1f}", chunk["score"]
        bar = "-" if score is None else f"{score:.3f} " + "#" * round(BAR_WIDTH * score / largest)
        lines.append(f"   {chunk['index']:>5}  {times}  {chunk['level']:<7}  {bar}".rstrip())
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = build_parser().parse_intermixed_args(arguments)
    try:
        sampling = check_options(options)
        # Whatever libraries print must not get between the caller and the result.
        with contextlib.redirect_stdout(sys.stderr):
            result = ask(options, sampling)
    except (FileNotFoundError, ValueError) as error:
        fail(2, error)
    except (ImportError, OSError, RuntimeError) as error:
        fail(1, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        fail(1, "interrupted")
    print(json.dumps(result, ensure_ascii=False) if options.json else describe(result, options.stats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
