"""What the evaluations share: a checkpoint and its identity, modes of sparse attention, one question, result files.

What is surprising:
* A mode is a value (`Mode`): how the video is prefilled, how a question decodes, and which chunks stay dense. Modes
  with the same prefill share one encoded video.
* `pooled` names no chunk at all instead of choosing none: a chunk whose time the question names is pooled, too. The
  first and last chunk of a video are dense in every bi-level mode.
* Questions are asked one by one: on a CPU a batch saves nothing (every row has its own mixed cache), and over a dense
  cache it copies all key-values for every row (5.8 s instead of 1.3 s for 8 questions on 10,000 frames).
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoTokenizer
from videoxl.shell.records import files_hash

ROOT = Path(__file__).resolve().parent.parent

DENSE, POOLED = "dense", "pooled"
# Frames are drawn at the model's own size, but no larger than this: 10,000 of them stay below 1.6 GB.
MAX_FRAME_SIZE = 224


@dataclass(frozen=True)
class Mode:
    """How a video is encoded and a question about it answered.

    Attributes:
        name: As in tables and on the command line.
        prefill, decode: The fields of `sparse_attention`.
        chunks: Who says which chunks stay dense: "auto" (the model, from the question), "oracle" (the question's
            evidence), "none" (nobody); None where nothing is chosen.
        store: In what the video's key-values are packed; None for the model's precision.
    """

    name: str
    prefill: str
    decode: str
    chunks: str | None = None
    store: str | None = None


MODES = {
    mode.name: mode
    for mode in (
        Mode("full", "full", "full"),
        Mode("mask", "mask", "full"),
        Mode("streaming", "streaming", "full"),
        Mode("bilevel", "streaming", "bilevel", "auto"),
        Mode("oracle", "streaming", "bilevel", "oracle"),
        Mode("pooled", "streaming", "bilevel", "none"),
    )
}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and what identifies it."""

    model: torch.nn.Module
    tokenizer: object
    facts: dict


@dataclass(frozen=True)
class Reply:
    """An answer and what it cost.

    Attributes:
        text: The answer.
        seconds: From the question to the whole answer.
        chunks: Per chunk of the video, a dict as `chat(..., return_chunks=True)` gives it.
        kept_tokens: Visual tokens of which key-values were kept, pooled ones counted as what is left of them.
        kept_share: `kept_tokens` over all visual tokens.
        history: The conversation with this turn.
    """

    text: str
    seconds: float
    chunks: list[dict]
    kept_tokens: int
    kept_share: float
    history: list[dict]

    @property
    def dense(self) -> list[int]:
        """Chunks that stayed dense."""
        return [chunk["index"] for chunk in self.chunks if chunk["level"] == DENSE]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for the checkpoint and for sparse attention."""
    parser.add_argument("--model", default=str(ROOT), metavar="DIR", help="checkpoint folder in this project's format")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of torch; 0 leaves it to torch")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="longest answer")
    sparse = parser.add_argument_group("sparse attention (what is not given is the checkpoint's own setting)")
    sparse.add_argument("--chunk-groups", type=int, help="groups of 4 frames in a prefill chunk")
    sparse.add_argument("--window-chunks", type=int, help="earlier chunks that a prefill chunk sees in full")
    sparse.add_argument("--decode-chunk-groups", type=int, help="groups in a chunk of bi-level decoding")
    sparse.add_argument("--pool-size", type=int, help="pooling over a group's visual key-values")
    sparse.add_argument("--reload-method", choices=("auto", "probe", "all"), help="how chunks are chosen")
    sparse.add_argument("--reload-count", type=int, help="at most so many chosen chunks")
    sparse.add_argument("--reload-share", type=float, help="at most this share of all chunks")
    sparse.add_argument("--reload-mass", type=float, help="the fewest chunks that hold this share of the score")
    sparse.add_argument("--reload-max-tokens", type=int, help="budget of the whole kept KV, in tokens")
    sparse.add_argument("--reload-timestamps", choices=("all", "kept"), help="whose timestamps stay within the budget")
    sparse.add_argument("--reload-positions", choices=("compact", "true"), help="positions of kept keys")
    sparse.add_argument(
        "--reload-layers", type=float, nargs=2, metavar="SHARE", help="layers that are read, as shares"
    )


def sparse_settings(args: argparse.Namespace, model) -> dict:
    """All fields of `sparse_attention` but `prefill` and `decode`: the checkpoint's, with the flags on top."""
    own = model.config.resolve_sparse_attention()
    settings = {"offload": own.offload}
    for name in ("chunk_groups", "window_chunks", "decode_chunk_groups", "pool_size"):
        settings[name] = getattr(own, name) if getattr(args, name) is None else getattr(args, name)
    fields = ("method", "count", "share", "mass", "max_tokens", "timestamps", "positions", "layers")
    reload = {name: value for name in fields if (value := getattr(args, f"reload_{name}")) is not None}
    base = {"method": own.reload} if isinstance(own.reload, str) else dict(own.reload)
    if {"count", "share", "mass"} & set(reload):
        base = {name: value for name, value in base.items() if name not in ("count", "share", "mass")}
    settings["reload"] = base | reload
    return settings


@contextlib.contextmanager
def sparse_attention(model, mode: Mode, settings: dict) -> Iterator[None]:
    """Sets the model's sparse attention to a mode for the duration of a `with` block."""
    before = model.config.sparse_attention
    model.config.sparse_attention = {"prefill": mode.prefill, "decode": mode.decode, **settings}
    try:
        yield
    finally:
        model.config.sparse_attention = before


def offered_modes(model, wanted: Iterable[str], settings: dict) -> tuple[list[Mode], list[str]]:
    """Which of these modes the model has, and the names of those that it has not.

    Members that compress, select or drop visual tokens take no sparse attention.

    Raises:
        ValueError: If it has none of them, or the settings are wrong for all models.
    """
    with sparse_attention(model, MODES["full"], settings):
        model.config.resolve_sparse_attention()  # every model has it: what is refused here are the settings
    refused = {name: error for name in wanted if (error := _refused(model, MODES[name], settings))}
    offered = [MODES[name] for name in dict.fromkeys(wanted) if name not in refused]
    if not offered:
        error = next(iter(refused.values()))
        raise ValueError(f"the mode {' or '.join(refused)} is none of this model's, take full: {error}") from error
    return offered, list(refused)


def _refused(model, mode: Mode, settings: dict) -> ValueError | None:
    """Why the model does not take a mode."""
    try:
        with sparse_attention(model, mode, settings):
            model.config.resolve_sparse_attention()
    except ValueError as error:
        return error


def start(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that the flags of `add_model_arguments` name, with torch's threads set."""
    if args.threads:
        torch.set_num_threads(args.threads)
    return load_checkpoint(args.model, args.device, args.dtype)


def load_checkpoint(source: str, device="cpu", dtype="auto") -> Checkpoint:
    """Loads a checkpoint through the Auto classes; its code runs, so it must be a folder or repository you trust.

    Raises:
        ValueError: If the folder holds no checkpoint, or is none.
    """
    local = os.path.isdir(source)
    if local and not os.path.isfile(os.path.join(source, "config.json")):
        raise ValueError(f"{source} holds no config.json; give a folder that convert_weights.py or training wrote")
    if not local and (source.startswith((".", "/", "~")) or source.count("/") != 1):
        raise ValueError(f"{source} is neither a checkpoint's folder nor a Hub id (org/name)")
    folder = Path(source if local else snapshot_download(source))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=dtype).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = model.config.text_config
    facts = {
        "name": "repository root" if folder.resolve() == ROOT else Path(source).name if local else source,
        "weights_sha256": weights_hash(folder),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return Checkpoint(model, tokenizer, facts)


def weights_hash(folder: Path) -> str:
    """SHA-256 over the safetensors files of a folder, in the order of their names.

    Raises:
        ValueError: If there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} holds no *.safetensors file: convert the checkpoint with convert_weights.py")
    return files_hash(files)


def frame_size(model, wanted: int | None = None) -> int:
    """Side of the frames to draw, in pixels: as wanted, else the model's own, at most `MAX_FRAME_SIZE`."""
    return wanted or min(model.config.vision_config.image_size, MAX_FRAME_SIZE)


def evidence_chunks(spans: Sequence[tuple[float, float]], evidence: Iterable[tuple[float, float]]) -> list[int]:
    """The chunks in which evidence is to be seen.

    Args:
        spans: (start, end) seconds of the chunks, adjacent, ascending: `EncodedVideo.chunks(decode_chunk_groups)`.
        evidence: (start, end) seconds. The end is not part of it, unless it is the start: then it is a moment.

    Returns:
        Chunk numbers, ascending, each once.

    Raises:
        ValueError: On evidence outside the video.
    """
    found, (first, last) = set(), (spans[0][0], spans[-1][1])
    for start, end in evidence:
        if end < start or start > last or end < first:
            raise ValueError(
                f"evidence from {start} to {end} s is not in the video, which goes from {first} to {last}"
            )
        inside = {
            number
            for number, (begin, stop) in enumerate(spans)
            if (begin < end and start < stop) or begin <= start < stop
        }
        found |= inside or {len(spans) - 1}  # the very end belongs to the last chunk
    return sorted(found)


@contextlib.contextmanager
def no_message(model) -> Iterator[None]:
    """For the duration of a `with` block nothing is said about a video behind it (see `VideoXLConfig`)."""
    before = model.config.video_message
    model.config.video_message = None
    try:
        yield
    finally:
        model.config.video_message = before


def ask(
    checkpoint: Checkpoint,
    video,
    text: str,
    mode: Mode,
    settings: dict,
    evidence=(),
    max_new_tokens=24,
    history=None,
    **generation,
) -> Reply:
    """Asks one question about an encoded video, by itself or after others, and greedily.

    Args:
        checkpoint: From `load_checkpoint`.
        video: An `EncodedVideo` that was encoded with the mode's prefill.
        text: The whole user turn.
        mode, settings: How to decode, see `sparse_settings`.
        evidence: (start, end) seconds, for the oracle.
        max_new_tokens: Longest answer.
        history: Of the earlier reply's, to go on with its conversation.
        **generation: Further generation settings.

    Raises:
        ValueError: If the oracle gets no evidence, or the video was encoded with another prefill.
    """
    if video.prefill["prefill"] != mode.prefill:
        raise ValueError(
            f"mode {mode.name} needs a video encoded with prefill={mode.prefill!r}, this one was encoded with "
            f"{video.prefill['prefill']!r}: encode it again"
        )
    chunk_groups, options = settings["decode_chunk_groups"], {}
    if mode.chunks == "none":
        options["dense_chunks"] = []
    elif mode.chunks == "oracle":
        if not evidence:
            raise ValueError("the oracle needs the question's evidence: (start, end) in seconds")
        options["dense_chunks"] = evidence_chunks(video.chunks(chunk_groups), evidence)
    with sparse_attention(checkpoint.model, mode, settings):
        begin = time.perf_counter()
        answer, history, chunks = checkpoint.model.chat(
            video,
            checkpoint.tokenizer,
            text,
            history,
            generation_config={"max_new_tokens": max_new_tokens, "do_sample": False, **generation},
            return_chunks=True,
            **options,
        )
        seconds = time.perf_counter() - begin
    kept = kept_visual_tokens(checkpoint.model, video, chunks, chunk_groups, settings["pool_size"])
    return Reply(answer, seconds, chunks, kept, kept / video.num_visual_tokens, history)


def kept_visual_tokens(model, video, chunks: Sequence[dict], chunk_groups: int, pool_size: int) -> int:
    """Visual tokens of one video whose key-values are kept, given the levels of its chunks.

    Members of the family that compress or select visual tokens keep what their plan says, whatever the chunks.
    """
    if video.cache.waiting is not None or video.prefill.get("beacons"):
        plan = model.plan(video.num_frames)
        return plan.mixed_tokens - plan.text_tokens - plan.timestamp_tokens
    groups = [group.end - group.visual_start for group in video.layout.videos[-1]]
    kept = 0
    for chunk in chunks:
        sizes = groups[chunk["index"] * chunk_groups : (chunk["index"] + 1) * chunk_groups]
        if chunk["level"] == DENSE:
            kept += sum(sizes)
        elif chunk["level"] == POOLED:
            kept += sum(size // pool_size for size in sizes)
    return kept


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in short: "0,5-7,12"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in parts)


def environment(device: str) -> dict:
    """Versions, hardware and code revision, without names or paths of this machine."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    hardware = {"cpu": names[0] if names else platform.machine(), "cores": len(os.sched_getaffinity(0))}
    if device != "cpu":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, numpy)}
    return {
        "hardware": hardware | {"torch_threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **versions},
        "git_revision": _git_revision(),
    }


def _git_revision() -> str:
    def git(*command):
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py").strip()
        return git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_text(path: Path, text: str) -> None:
    """Writes a file that is complete or not there, whenever the process is killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def dump(result: dict) -> str:
    """JSON of a result file: indented, but one line for each entry of its lists."""
    lines = []
    for name, value in result.items():
        if isinstance(value, list) and value:
            entries = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in value)
            lines.append(f" {json.dumps(name)}: [\n  {entries}\n ]")
        else:
            body = json.dumps(value, ensure_ascii=False, indent=1).replace("\n", "\n ")
            lines.append(f" {json.dumps(name)}: {body}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
