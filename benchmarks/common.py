"""What the benchmarks share: flags, a model with random weights, layouts, clocks, memory and result files.

What is surprising:
* Importing this module makes the package `videoxl` importable in a clone; import it before `videoxl.*`.
* The small model of the CPU runs has a language model of width 512 and a toy vision tower, so that a prefill benchmark
  measures the language model. `--preset` takes a published model's sizes instead.
* Result files go to benchmarks/results, or to the folder that BENCHMARK_RESULTS names.
* Memory on a CPU is resident memory, which only grows usefully in a fresh process: `in_fresh_process` gives one.
"""

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).resolve().parent / "results")
MIB = 2**20
# A machine is quiet when its CPUs were busy for less than this share of so many seconds.
QUIET_SHARE, QUIET_SECONDS = 0.1, 3.0
# Ids of the small model's prompt header, video placeholder and end; it has no tokenizer.
SMALL_VOCABULARY = 2048
# Tokens of the prompt header in front of a video (the published template, spec of Video-XL-2).
HEADER_TOKENS = 14
# Layers whose FLOPs are two for each weight and row.
COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description and the examples as they are written."""


def parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """An argument parser with the flags that every benchmark has."""
    result = argparse.ArgumentParser(description=description, epilog=epilog, formatter_class=HelpFormatter)
    result.add_argument("--device", help="cpu or cuda; without it cuda with --preset, else cpu")
    result.add_argument("--dtype", help="float32 or bfloat16; without it bfloat16 with --preset, else float32")
    result.add_argument("--preset", help="sizes of a published model, a name in presets/ (random weights)")
    result.add_argument("--attention", default="sdpa", help="transformers' name of the attention that is used")
    result.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    result.add_argument("--repeats", type=int, default=3, help="runs of each measurement; the median counts")
    result.add_argument(
        "--patience", type=float, default=0, help="seconds to wait, before each process, for the CPUs to be idle"
    )
    result.add_argument("--out", metavar="NAME", help="also write the JSON to benchmarks/results/NAME.json")
    return result


def add_llm_flags(arguments: argparse.ArgumentParser) -> None:
    """Sizes of the language model and of the prompt."""
    model = arguments.add_argument_group("language model (without --preset)")
    for flag, default, text in (
        ("--hidden", 512, "width"),
        ("--layers", 4, "layers"),
        ("--heads", 8, "query heads"),
        ("--kv-heads", 2, "key-value heads"),
        ("--mlp", 1376, "width of the MLP"),
    ):
        model.add_argument(flag, type=int, default=default, help=text)
    video = arguments.add_argument_group("video")
    video.add_argument("--group-tokens", type=int, default=153, help="tokens of a group, with its timestamp")
    video.add_argument("--timestamp-tokens", type=int, default=9, help="how many of them are the timestamp")
    video.add_argument("--chunk-groups", type=int, default=4, help="groups in a prefill chunk")
    video.add_argument("--window-chunks", type=int, default=3, help="earlier chunks that a chunk sees in full")


def parse(arguments: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line and fills in what depends on --preset."""
    args = arguments.parse_args()
    args.device = args.device or ("cuda" if args.preset else "cpu")
    args.dtype = args.dtype or ("bfloat16" if args.preset else "float32")
    if args.device == "cuda" and not torch.cuda.is_available():
        arguments.error("there is no CUDA device here; --device cpu measures the model on the CPU")
    if args.preset and not (ROOT / "presets" / f"{args.preset}.json").is_file():
        arguments.error(f"presets/ has no {args.preset}.json")
    torch.set_num_threads(args.threads)
    return args


def load_config(args):
    """The `VideoXLConfig` that the flags describe."""
    config_class = import_module("videoxl").VideoXLConfig
    if args.preset:
        return config_class(**json.loads((ROOT / "presets" / f"{args.preset}.json").read_text()))
    side = {"image_size": 56, "patch_size": 14, "num_hidden_layers": 2, "num_attention_heads": 2}
    return config_class(
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, **side},
        compressor_config={"hidden_size": 32, "grid_size": 4, "projector_pool_size": 2},
        text_config={
            "model_type": "qwen2",
            "vocab_size": SMALL_VOCABULARY,
            "hidden_size": args.hidden,
            "intermediate_size": args.mlp,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "max_position_embeddings": 131072,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        video_token_id=SMALL_VOCABULARY - 1,
        time_start_token_id=SMALL_VOCABULARY - 2,
        time_end_token_id=SMALL_VOCABULARY - 3,
    )


def build_model(config, args):
    """A model with random weights (seed 0) through the Auto classes, of our config or of its `text_config`."""
    if config.model_type == "videoxl":
        model_class = import_module("videoxl").VideoXLForConditionalGeneration
        AutoConfig.register("videoxl", type(config), exist_ok=True)
        AutoModel.register(type(config), model_class, exist_ok=True)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModel.from_config(config, dtype=getattr(torch, args.dtype), attn_implementation=args.attention)
    return model.to(args.device).eval()


def video_layout(length: int, args):
    """The layout of a prompt of `length` tokens: header, one video of as many groups as fit, the rest text."""
    module = import_module("videoxl.sparse_attention")
    starts = range(HEADER_TOKENS, length - args.group_tokens + 1, args.group_tokens)
    groups = (module.GroupSpan(at, at + args.timestamp_tokens, at + args.group_tokens) for at in starts)
    return module.VisualLayout((tuple(groups),), length)


def set_sparse_attention(model, args, **fields) -> None:
    """Sets the model's sparse attention to the flags' plan, with further fields."""
    model.config.sparse_attention = {"chunk_groups": args.chunk_groups, "window_chunks": args.window_chunks, **fields}


def clock(device: str) -> float:
    """Seconds, when everything asked of the device so far is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def cpu_waited() -> float:
    """Seconds so far in which some task of this machine waited for a CPU (its pressure file); 0 if unknown."""
    try:
        return int(Path("/proc/pressure/cpu").read_text().splitlines()[0].rsplit("total=", 1)[1]) / 1e6
    except (OSError, IndexError):
        return 0.0


def wait_for_quiet(patience: float) -> None:
    """Returns when the CPUs have been idle for a while, or after `patience` seconds."""

    def ticks():
        counts = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(counts), counts[3] + counts[4]  # all, idle and waiting for disks

    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        before = ticks()
        time.sleep(QUIET_SECONDS)
        passed, idle = (now - earlier for now, earlier in zip(ticks(), before, strict=True))
        if passed - idle < QUIET_SHARE * passed:
            return


class PeakMemory:
    """Growth of memory from now on: of resident memory on a CPU, of allocated memory on CUDA."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with contextlib.suppress(AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # else freed memory is reused, and the growth looks too small
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
            self.before = _resident("VmRSS")

    def growth(self) -> int:
        """Bytes between the peak since then and what was held then."""
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM")
        return max(peak - self.before, 0)


class Stages:
    """Seconds inside of modules, by name; and how many rows passed each linear layer and convolution."""

    def __init__(self, model, stages: dict, device: str):
        self.seconds, self.rows, self.depth, self.device = Counter(), Counter(), 0, device
        for name, modules in stages.items():
            for module in modules:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(lambda *_, name=name: self._leave(name), always_call=True)
        for name, module in model.named_modules():
            if isinstance(module, COUNTED):
                module.register_forward_hook(lambda module, _, output, name=name: self._count(name, module, output))

    def _enter(self, *_):
        self.depth += 1
        if self.depth == 1:
            self.started = clock(self.device)

    def _leave(self, name):
        self.depth -= 1
        if self.depth == 0:
            self.seconds[name] += clock(self.device) - self.started

    def _count(self, name, module, output):
        self.rows[name] += output.numel() // module.weight.shape[0]

    def reset(self) -> None:
        self.seconds.clear()
        self.rows.clear()


def linear_flop(model, rows: Counter) -> int:
    """FLOPs of linear layers and convolutions; layers that the counted model lacks have the rows of its first."""

    def kind(name):
        return re.sub(r"(layers|blocks)\.\d+", r"\1.0", name)

    by_kind = Counter()
    for name, count in rows.items():
        by_kind[kind(name)] = max(by_kind[kind(name)], count)
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, COUNTED))
    return sum(2 * module.weight.numel() * by_kind[kind(name)] for name, module in modules)


def gemm_flops(args) -> float:
    """FLOPs a second of a matrix product on the device in the dtype: the best of ten."""
    side, dtype = (8192 if args.device == "cuda" else 2048), getattr(torch, args.dtype)
    first, second = (torch.randn(side, side, dtype=dtype, device=args.device) for _ in range(2))
    seconds = []
    for _ in range(10):
        started = clock(args.device)
        torch.mm(first, second)
        seconds.append(clock(args.device) - started)
    return 2 * side**3 / min(seconds)


def _resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_fresh_process(function, *arguments):
    """Runs a module-level function in a new process; its result, or `"out of memory"`.

    Raises:
        Exception: Whatever else the function raised.
    """
    wait_for_quiet(_namespace(arguments).patience)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_run_in_fresh_process, function, arguments).result()
        except BrokenProcessPool:
            return "out of memory"  # the kernel ends a process that takes too much


def _run_in_fresh_process(function, arguments):
    torch.set_num_threads(_namespace(arguments).threads)
    try:
        with torch.no_grad():
            return function(*arguments)
    except torch.OutOfMemoryError:
        return "out of memory"
    except RuntimeError as error:
        if "allocate memory" in str(error):
            return "out of memory"
        raise


def _namespace(arguments) -> argparse.Namespace:
    return next(argument for argument in arguments if isinstance(argument, argparse.Namespace))


def median(values) -> float:
    """The median, rounded to microseconds."""
    return round(statistics.median(values), 6)


def table(header: list[str], rows: list[list]) -> None:
    """Prints a table, numbers to the right."""
    texts = [header] + [[cell if isinstance(cell, str) else f"{cell:,.3g}" for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for row in texts:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)))


def report(name: str, args, results) -> None:
    """Ends a benchmark: one line of JSON with results, configuration, versions, hardware; a file with --out."""
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    line = {
        "benchmark": name,
        "results": results,
        "configuration": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": _hardware(args.device),
        "git_revision": git_revision(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }
    print(json.dumps(line))
    if args.out:
        RESULTS.mkdir(parents=True, exist_ok=True)
        path = RESULTS / f"{Path(args.out).stem}.json"
        path.write_text(json.dumps(line, indent=1) + "\n")
        print(f"written to {os.path.relpath(path, ROOT)}", file=sys.stderr)


def _hardware(device: str) -> dict:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    result = {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30)}
    return result


def git_revision(folder=ROOT) -> str:
    """The commit of a checkout, with "-dirty" where its Python files have changed since."""

    def git(*command):
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "*.py").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
