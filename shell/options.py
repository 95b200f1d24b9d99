"""What `ask` and `batch` share: options of frames, sparse attention and model, checks, loading, errors.

What is surprising:
* A model folder is used without the network, and its code runs: the caller names that folder (by default the
  bundled one). A Hub id means code from elsewhere, so it needs `--trust-remote-code`.
* torch and transformers are imported inside functions, after the arguments were checked, so that a typing mistake is
  answered at once.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

from .model_files import check_model_files

# The bundled checkpoint: the root of a clone, or the installed package.
BUNDLED = Path(__file__).resolve().parent.parent
# Options of encoding: they mean nothing for a video that is encoded already.
FRAME_OPTIONS = ("max_num_frames", "sample_fps", "max_sample_fps", "uniform")
PREFILL_FIELDS = ("prefill", "chunk_groups", "window_chunks")
DECODE_FIELDS = ("decode", "decode_chunk_groups", "pool_size")

# What processors that compute in bfloat16 have, and the width of the language model from which on all parts of an
# answer were faster in it (of 128, 256, 512 and 1,536; at 256 a decode step was not).
BFLOAT16_FLAGS, BFLOAT16_MIN_WIDTH = ("amx_bf16", "avx512_bf16"), 512

# Exit status, see the epilogs.
FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and whose epilogue keeps its lines."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        fail(BAD_INPUT, f"{message} (see --help)")


def fail(status: int, message: object) -> NoReturn:
    """Ends the program with one line on standard error."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(status)


def say(text: str) -> None:
    """Tells somebody at a terminal what takes its time; what is piped elsewhere is left alone."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def terminated_as_interrupted():
    """Lets a request to end (SIGTERM) clean up as Ctrl-C does: no half-written file stays behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def errors_as_status():
    """Turns what goes wrong into one line and an exit status."""
    try:
        with terminated_as_interrupted():
            yield
    except BrokenPipeError:
        # The reader (head, less) has gone. Nothing is left to be said to it, not even when Python flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except (FileNotFoundError, ValueError) as error:
        fail(BAD_INPUT, error)
    except (ImportError, OSError, RuntimeError) as error:
        fail(FAILED, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        fail(INTERRUPTED, "interrupted")


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


def add_encoding_options(parser: argparse.ArgumentParser):
    """Adds the options of frames, whose group is returned, and of sparse attention.

    What is not given is no attribute of the result.
    """
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

    frames.add_argument(
        "--store",
        choices=("int8", "int4"),
        default=argparse.SUPPRESS,
        help="keep the video's key-values in 8 or 4 bits (default: in the model's precision)",
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
    return frames


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the model and of the length of its answers."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="DIR_OR_ID", default=str(BUNDLED), help="folder or Hub id (default: the bundled one)"
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run code from the Hub; needed for a Hub id")
    model.add_argument("--device", help="cpu, cuda, cuda:1, mps ... (default: cuda if there is one, else cpu)")
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision (default: auto: that of the stored weights, or on a CPU bfloat16 where that is faster)",
    )
    model.add_argument(
        "--max-new-tokens", metavar="N", type=positive_int, default=256, help="longest answer (default: %(default)s)"
    )


def sampling_of(options: argparse.Namespace) -> dict:
    """The sampling settings for `encode_video`.

    Raises:
        ValueError: If they contradict each other.
    """
    given = {name: getattr(options, name) for name in FRAME_OPTIONS if hasattr(options, name)}
    if not given.pop("uniform", False):
        return given
    if set(given) - {"max_num_frames"}:
        raise ValueError("--uniform takes frames without a rate; leave --sample-fps and --max-sample-fps out")
    return given | {"sample_fps": None, "max_sample_fps": None}


def check_file(path: str, what: str) -> None:
    """Raises FileNotFoundError or ValueError if `path` is no file."""
    if not os.path.exists(path):
        if "://" in path:
            raise ValueError(f"{path} is an address; only local files are opened. Download it and pass the path.")
        raise FileNotFoundError(f"{path}: no such {what} (looked from {os.getcwd()})")
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder, expected a {what}")


def check_model(options: argparse.Namespace) -> None:
    """Raises ValueError if `--model` cannot be a model; a folder switches the network off."""
    folder = Path(options.model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a model folder: it has no config.json")
        check_model_files(folder)
        # Read by huggingface_hub when it is imported, so before transformers is.
        os.environ["HF_HUB_OFFLINE"] = "1"
    elif folder.exists() or options.model.startswith((".", "/", "~")) or options.model.count("/") != 1:
        raise ValueError(f"{options.model} is neither a model folder nor a Hub id (org/name)")
    elif not options.trust_remote_code:
        raise ValueError(
            f"no folder {options.model} here, so it is a Hub id, and its code would run on this machine; "
            "add --trust-remote-code if you trust it"
        )


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


def choose_dtype(name: str, device, config, capabilities: dict | None = None) -> str:
    """What `--dtype` means here: itself, and for "auto" bfloat16 on a CPU that computes with it, if the model is wide.

    Args:
        name: Of `--dtype`.
        device: Where the model will run.
        config: The model's.
        capabilities: What the processor can do, by the names of `torch.cpu.get_capabilities`, which tells by default.
    """
    if name != "auto" or device.type != "cpu" or config.text_config.hidden_size < BFLOAT16_MIN_WIDTH:
        return name
    import torch

    if capabilities is None:  # an older torch does not tell
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bfloat16" if any(capabilities.get(flag) for flag in BFLOAT16_FLAGS) else name


def load_model(options: argparse.Namespace, device, quiet: bool):
    """Loads model and tokenizer and sets what the options say of sparse attention; returns both."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    if quiet:
        logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(options.model, trust_remote_code=True)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True)
    dtype = choose_dtype(options.dtype, device, config)
    stored = str(config.dtype or "float32").removeprefix("torch.")
    if dtype not in (options.dtype, stored):
        print(f"{dtype}, which is faster on this processor; --dtype {stored} for what is stored", file=sys.stderr)
    model = AutoModel.from_pretrained(options.model, trust_remote_code=True, dtype=dtype).to(device)
    config, current = model.config, model.config.resolve_sparse_attention()
    given = {name: getattr(options, name) for name in PREFILL_FIELDS + DECODE_FIELDS if hasattr(options, name)}
    if any(name in given for name in PREFILL_FIELDS):
        # The published switches would win over what the user has typed.
        config.enable_sparse = config.enable_chunk_prefill = False
    fields = config.sparse_attention.fields
    config.sparse_attention = {name: given.get(name, getattr(current, name)) for name in fields}
    return model, tokenizer


def generation_settings(options: argparse.Namespace) -> dict:
    """How answers are generated: greedily, so that the same question gets the same answer."""
    return {"do_sample": False, "max_new_tokens": options.max_new_tokens}
