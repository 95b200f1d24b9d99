"""This package against what a user would pick instead: transformers' Qwen3-VL and Qwen2.5-VL.

What is surprising:
* All weights are random. The language model is the same for all; the vision towers are the published ones, width and
  depth divided by `--scale`. Every run has a process of its own, and the systems take turns.
* The peers read, sample and resize with their own processors. By default frames keep their pixels, as ours do;
  `qwen3-vl-budget` has the published limit of pixels a video, so its frames shrink from 172 of 384 pixels on.
* `second` is a second question: ours over the encoded video; a peer's anew, from pixels that are kept prepared, so
  only tower and prefill run again. `by hand` keeps a peer's key-values up to the end of the video, which no call of
  its interface does; how far its logits are from those of asking anew is in the result file.
* FLOPs are counted: linear layers and convolutions by the rows that pass them, attention by the pairs that are
  visible. Rows depend on no width, so the same rows give the FLOPs at the published sizes.
* "rest" is the first answer's time outside of tower and language model: decoding as far as it isn't hidden, resizing,
  Python. Ours decodes while the tower runs.
"""

import argparse
import inspect
import json
import math
import signal
import tempfile
import time
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from common import (
    MIB,
    RESULTS,
    ROOT,
    PeakMemory,
    Stages,
    build_model,
    clock,
    in_fresh_process,
    linear_flop,
    median,
    parse,
    parser,
    report,
    table,
    video_layout,
)
from prefill import visible_pairs
from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer

PEERS = {"qwen3-vl": "qwen3_vl", "qwen3-vl-budget": "qwen3_vl", "qwen2.5-vl": "qwen2_5_vl"}
OURS = ("full", "streaming", "bilevel", "videochat-flash")
# In this order, so that what takes longest is what is left out where the time is short.
SYSTEMS = (*OURS, "qwen3-vl-budget", "qwen3-vl", "qwen2.5-vl")
# Beyond so many frames a peer's second question is not run anew: it is the first one's tower and prefill.
ANEW_FRAMES = 256
# The language model of all, small and with Qwen2.5-7B's sizes: width, of the MLP, layers, heads, key-value heads.
TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SMALL, TRUE = (512, 1376, 4, 8, 2), (3584, 18944, 28, 28, 4)
# The published towers of the peers: Qwen3-VL-8B's and Qwen2.5-VL-7B's.
TOWERS = {
    "qwen3_vl": {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16},
    "qwen2_5_vl": {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16},
}
# Layers behind which Qwen3-VL hands features to the language model, and those of Qwen2.5-VL that see whole frames.
LAYER_LISTS = {
    "qwen3_vl": ("deepstack_visual_indexes", (8, 16, 24)),
    "qwen2_5_vl": ("fullatt_block_indexes", (7, 15, 23, 31)),
}
PEER_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# Patches of a window of Qwen2.5-VL's tower: 112 pixels of 14 along a side.
WINDOW_PATCHES = 64
# Of 128 rotary channels of a head, halved: time, height, width.
MROPE = {"qwen3_vl": (24, 20, 20), "qwen2_5_vl": (16, 24, 24)}
# Pixels of a video that the published Qwen3-VL allows (`longest_edge` of its video preprocessor).
PUBLISHED_BUDGET = 25165824
PUBLISHED_WORDS = 152064
SIDE, RATE = 384, 2
QUESTIONS = ("What happens in this video?", "Which color comes first?", "Where is the circle at the end?")
ONE_TOKEN = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False}
# Targets: second question against the fastest peer's, at this length; seconds a FLOP against the best peer's.
TARGET_SECOND, TARGET_FRAMES, TARGET_SECONDS_PER_FLOP = 100, 256, 0.8
GIVE_UP_SECONDS = 1200
WARM_UP_FRAMES = 8
# Visual tokens of a group of four frames of Video-XL-2.
VISUAL_TOKENS = 144

EPILOG = """\
examples:
  python benchmarks/peers.py --out peers_cpu --frames 64 256
      The comparison at reduced width on a CPU. Needs torchvision and torchcodec for the peers' processors.

  python benchmarks/peers.py --frames 64 --only qwen3-vl streaming
      Two systems at one length.

  python benchmarks/peers.py --out peers_cpu --resume --minutes 25
      Adds what the result file lacks: 1,024 frames.

  python benchmarks/peers.py --out peers_cpu --draw docs/peers.png
      Draws the result file and measures nothing. Needs matplotlib.

  python benchmarks/peers.py --true-size --device cuda --dtype bfloat16 --tokenizer PATH --out peers_gpu
      Published sizes with random weights on a GPU.
"""


def scaled(value: int, args) -> int:
    """`value` divided by the scale, half a unit up, at least 1."""
    return value if args.true_size else max(int(value / args.scale + 0.5), 1)


def text_config(tokenizer, args) -> dict:
    """What the language models of all have in common."""
    sizes = dict(zip(TEXT, TRUE if args.true_size else SMALL, strict=True))
    sizes["head_dim"] = sizes["hidden_size"] // sizes["num_attention_heads"]
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    words = max(len(tokenizer), PUBLISHED_WORDS if args.true_size else 0)
    return {**sizes, **ids, "vocab_size": words, "max_position_embeddings": 2**20}


def peer_config(system: str, tokenizer, args):
    """The config of a peer, from its config class."""
    kind, text = PEERS[system], text_config(tokenizer, args)
    section = [part * text["head_dim"] // 128 for part in MROPE[kind]]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    vision = {name: scaled(value, args) for name, value in TOWERS[kind].items()}
    name, layers = LAYER_LISTS[kind]
    vision[name] = sorted({min(scaled(layer, args), vision["depth"] - 1) for layer in layers})
    vision["out_hidden_size"] = text["hidden_size"]
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in PEER_TOKENS.items()}
    transformers = import_module("transformers")
    config_class = transformers.Qwen3VLConfig if kind == "qwen3_vl" else transformers.Qwen2_5_VLConfig
    return config_class(text_config=text, vision_config=vision, **ids)


def our_config(system: str, tokenizer, args):
    """A preset with the scale's tower, the language model of all, and the tokenizer's ids."""
    preset = "videochat-flash-7b-224" if system == "videochat-flash" else "video-xl-2-8b"
    values = json.loads((ROOT / "presets" / f"{preset}.json").read_text())
    vision, compressor = values["vision_config"], values["compressor_config"]
    for name in ("hidden_size", "intermediate_size", "num_attention_heads"):
        if name in vision:
            vision[name] = scaled(vision[name], args)
    vision["num_hidden_layers"] = scaled(vision["num_hidden_layers"] - 1, args) + 1  # the last one is dropped
    compressor["hidden_size"] = vision["hidden_size"]
    if compressor["compressor_type"] == "dts":
        compressor["norm_groups"] = math.gcd(32, vision["hidden_size"])
    values["text_config"] |= text_config(tokenizer, args)
    values["video_token_id"] = tokenizer.convert_tokens_to_ids("<|vision_pad|>")
    if time_format := values["frames_config"]["time_format"]:
        ids = tokenizer(time_format.format(seconds=0.0), add_special_tokens=False)["input_ids"]
        values |= {"time_start_token_id": ids[0], "time_end_token_id": ids[-1]}
    return import_module("videoxl").VideoXLConfig(**values | {"dtype": None})


def make_clip(path: Path, frames: int) -> None:
    """Writes `frames` seconds of a soft texture that moves, H.264."""
    import av

    random = np.random.default_rng(0)
    coarse = av.VideoFrame.from_ndarray(random.integers(0, 255, (14, 14, 3), dtype=np.uint8), format="rgb24")
    texture = coarse.reformat(width=SIDE, height=SIDE, interpolation="BICUBIC").to_ndarray()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for index in range(RATE * frames):
            frame = av.VideoFrame.from_ndarray(np.roll(texture, (3 * index, 5 * index), (0, 1)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class Ours:
    """This package, as its users call it."""

    def __init__(self, system: str, args):
        self.args, self.flash = args, system == "videochat-flash"
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=True)
        self.config = our_config(system, self.tokenizer, args)
        self.model = build_model(self.config, args)
        prefill = "full" if system in ("full", "videochat-flash") else "streaming"
        self.model.config.sparse_attention = {
            "prefill": prefill,
            "decode": "bilevel" if system == "bilevel" else "full",
        }
        whole, tower = self.model.model, self.model.model.vision_tower
        vision = [tower, tower.embeddings, tower.encoder, whole.compressor, whole.multi_modal_projector]
        self.stages = {"vision": vision, "prefill": [whole.language_model]}

    def first(self, path: str, frames: int, question: str) -> dict:
        rates = {} if self.flash else {"max_sample_fps": None}  # other rates than its own switch its sampler off
        self.video = self.model.encode_video(path, self.tokenizer, max_num_frames=frames, progress=False, **rates)
        self.second(question)
        tower = self.config.vision_config
        patches = (tower.image_size // tower.patch_size) ** 2
        return {"tokens": len(self.video.input_ids), "frames_read": self.video.num_frames, "patches": patches}

    def second(self, question: str) -> None:
        self.model.chat(self.video, self.tokenizer, question, return_history=False, generation_config=ONE_TOKEN)


class Peer:
    """A model of transformers with its own processor."""

    def __init__(self, system: str, args):
        self.args, transformers = args, import_module("transformers")
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=True)
        self.config = peer_config(system, self.tokenizer, args)
        torch.manual_seed(0)
        dtype = getattr(torch, args.dtype)
        with torch.device(args.device):
            self.model = AutoModelForImageTextToText.from_config(
                self.config, dtype=dtype, attn_implementation=args.attention
            )
        self.model.eval()
        self.model.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
        self.stages = {"vision": [self.model.model.visual], "prefill": [self.model.model.language_model]}
        if PEERS[system] == "qwen3_vl":
            most = PUBLISHED_BUDGET if system == "qwen3-vl-budget" else 2**40
            size = {"shortest_edge": 4096, "longest_edge": most}
            videos = transformers.Qwen3VLVideoProcessor(size=size, cap_pixels_per_frame=False)
            images = transformers.Qwen2VLImageProcessor(patch_size=16)
            self.processor = transformers.Qwen3VLProcessor(images, self.tokenizer, videos)
        else:
            images, videos = (
                transformers.Qwen2VLImageProcessor(),
                transformers.Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
            )
            self.processor = transformers.Qwen2_5_VLProcessor(images, self.tokenizer, videos)

    def prompt(self, question: str) -> str:
        # Qwen3-VL's processor puts the marks around each pair of frames itself, in place of the marks here.
        video = "<|vision_start|><|video_pad|><|vision_end|>"
        return f"<|im_start|>user\n{video}{question}<|im_end|>\n<|im_start|>assistant\n"

    def first(self, path: str, frames: int, question: str) -> dict:
        def sample(metadata, **_):
            return np.arange(0, metadata.total_num_frames, RATE)[:frames]

        pixels, metadata = self.processor.video_processor.fetch_videos(path, sample_indices_fn=sample)
        options = {"do_sample_frames": False, "return_tensors": "pt"}
        text = [self.prompt(question)]
        self.inputs = self.processor(text=text, videos=[pixels], video_metadata=[metadata], **options)
        self.inputs = self.inputs.to(self.args.device, getattr(torch, self.args.dtype))
        output = self.ask(self.inputs)
        self.cache = getattr(output, "cache", None) or output.past_key_values
        ids, grid = self.inputs["input_ids"][0], self.inputs["video_grid_thw"][0].tolist()
        end = self.config.vision_end_token_id
        self.prefix = int((ids == end).nonzero()[-1]) + 1
        # Where the text behind the video begins, for time, height and width: [3, 1, 1].
        place = self.model.model.get_rope_index
        taken = {name: self.inputs[name] for name in inspect.signature(place).parameters if name in self.inputs}
        self.next_position = place(**taken)[0][:, :, self.prefix : self.prefix + 1]
        return {"tokens": len(ids), "frames_read": len(pixels), "patches": grid[1] * grid[2]}

    def ask(self, inputs):
        return self.model.generate(**inputs, **ONE_TOKEN, return_dict_in_generate=True, output_logits=True)

    def suffix(self, question: str) -> torch.Tensor:
        """Ids of what follows the video."""
        text = self.prompt(question).rsplit("<|vision_end|>", 1)[1]
        return self.tokenizer(text, return_tensors="pt")["input_ids"].to(self.args.device)

    def second(self, question: str):
        """Asks anew, with the pixels that are prepared already."""
        ids = torch.cat([self.inputs["input_ids"][:, : self.prefix], self.suffix(question)], dim=1)
        types = self.inputs["mm_token_type_ids"]
        types = torch.cat([types[:, : self.prefix], types.new_zeros(1, ids.shape[1] - self.prefix)], dim=1)
        changed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
        return self.ask({**self.inputs, **changed}).logits[0]

    def by_hand(self, question: str):
        """Asks behind the key-values up to the end of the video, which the caller has kept."""
        self.cache.crop(self.prefix - self.cache.get_seq_length())  # negative: how many go
        ids = self.suffix(question)
        positions = self.next_position + torch.arange(ids.shape[1], device=ids.device)
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        output = self.model(
            input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1, **{name: self.cache}
        )
        return output.logits[:, -1]


def attention_flop(config, system: str, frames: int, patches: int, tokens: int) -> int:
    """FLOPs of all attention: two products for each visible pair."""
    vision, text = config.vision_config, config.text_config
    if system in PEERS:
        pairs, units = vision.depth * patches**2, -(-frames // vision.temporal_patch_size)
        if hasattr(vision, "fullatt_block_indexes"):
            full = len(vision.fullatt_block_indexes)
            pairs = full * patches**2 + (vision.depth - full) * patches * WINDOW_PATCHES
    else:
        layers, units = vision.num_hidden_layers - 1, -(-frames // 4)  # clips or groups of four
        clip = system == "videochat-flash"
        pairs = layers * (16 if clip else 4) * patches**2
        if not clip:
            # In the compressor the cells of each of four steps, then of two, see each other.
            pairs += 6 * config.compressor_config.grid_size**4
    seen = text_pairs(system, frames, tokens) * text.num_hidden_layers
    return 4 * (units * pairs * vision.hidden_size + seen * text.num_attention_heads * text.head_dim)


def text_pairs(system: str, frames: int, tokens: int) -> int:
    """Visible pairs of a layer of the language model."""
    if system not in ("streaming", "bilevel"):
        return tokens * (tokens + 1) // 2
    group = int(tokens * 4 / frames)
    sizes = argparse.Namespace(group_tokens=group, timestamp_tokens=max(group - VISUAL_TOKENS, 1))
    return visible_pairs(video_layout(tokens, sizes), "streaming", 4, 3)


def true_config(system: str, tokenizer, args):
    """A system's config at the published sizes."""
    sizes = argparse.Namespace(**{**vars(args), "true_size": True})
    return peer_config(system, tokenizer, sizes) if system in PEERS else our_config(system, tokenizer, sizes)


def measure(system: str, frames: int, path: str, warm_up: str, seconds: float, args):
    """One run of one system, in this process; `"not finished"` after so many seconds."""

    def give_up(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return run(system, frames, path, warm_up, args)
    except TimeoutError:
        return "not finished"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def run(system: str, frames: int, path: str, warm_up: str, args) -> dict:
    asked = (Peer if system in PEERS else Ours)(system, args)
    stages = Stages(asked.model, asked.stages, args.device)
    for question in QUESTIONS[:2]:
        asked.first(warm_up, WARM_UP_FRAMES, question)
        asked.second(question)
    stages.reset()
    memory, cpu, started = PeakMemory(args.device), time.process_time(), clock(args.device)
    found = asked.first(path, frames, QUESTIONS[0])
    seconds = {"first": clock(args.device) - started, **stages.seconds}
    seconds["first_cpu"] = time.process_time() - cpu  # of all threads: what a shared machine does not change much
    peak, rows = memory.growth(), Counter(stages.rows)

    def timed(ask):
        started = clock(args.device)
        output = ask(QUESTIONS[1])
        return clock(args.device) - started, output

    off = None
    if system not in PEERS:
        seconds["second"] = median([timed(asked.second)[0] for _ in range(3)])
    else:
        asked.by_hand(QUESTIONS[2])
        kept = [timed(asked.by_hand) for _ in range(3)]
        seconds["by_hand"] = median([each[0] for each in kept])
        seconds["second"] = seconds["vision"] + seconds["prefill"]
        if frames <= ANEW_FRAMES:
            seconds["second"], anew = timed(asked.second)
            off = float((kept[0][1] - anew).abs().max() / anew.abs().max())
    counts = (system, found["frames_read"], found["patches"], found["tokens"])
    true = true_config(system, asked.tokenizer, args)
    with torch.device("meta"):  # shapes without memory
        published = (AutoModelForImageTextToText if system in PEERS else AutoModel).from_config(true)
    return {
        "system": system,
        "frames": frames,
        **found,
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "by_hand_difference": off,
        "peak_bytes": peak,
        "linear_tflop": linear_flop(asked.model, rows) / 1e12,
        "tflop": (linear_flop(asked.model, rows) + attention_flop(asked.config, *counts)) / 1e12,
        "true_linear_tflop": linear_flop(published, rows) / 1e12,
        "true_tflop": (linear_flop(published, rows) + attention_flop(true, *counts)) / 1e12,
    }


def merged(runs: list[dict]) -> dict:
    """Runs of one system at one length as one: medians of seconds, the first one's memory and counts."""
    names = runs[0]["seconds"]
    seconds = {name: median([run["seconds"][name] for run in runs]) for name in names}
    seconds["rest"] = round(seconds["first"] - seconds["vision"] - seconds["prefill"], 6)
    return {**runs[0], "seconds": seconds, "runs": [run["seconds"] for run in runs]}


def show(results: list[dict]) -> None:
    """Prints the table."""
    rows = []
    for result in results:
        row = [f"{result['frames']:,}", result["system"]]
        if "failed" in result:
            rows.append([*row, result["failed"], *["-"] * 9])
            continue
        seconds = result["seconds"]
        row += [f"{result['tokens'] / result['frames_read']:.1f}"]
        row += [f"{seconds[name]:.2f}" for name in ("first", "rest", "vision", "prefill")]
        row += [f"{seconds[name] * 1e3:,.0f}" if name in seconds else "-" for name in ("second", "by_hand")]
        row += [f"{result['peak_bytes'] / MIB:,.0f}", f"{result['tflop'] / seconds['first'] * 1e3:.0f}"]
        rows.append([*row, f"{result['true_tflop']:,.0f}"])
    header = ["frames", "system", "tokens a frame", "first s", "rest", "vision", "prefill", "second ms", "by hand ms"]
    table([*header, "peak MiB", "GFLOP/s", "published TFLOP"], rows)


def compare(results: list[dict]) -> list[dict]:
    """The targets at each length: what was measured, and whether it was reached."""
    found = []
    for frames in sorted({result["frames"] for result in results}):
        here = {result["system"]: result for result in results if result["frames"] == frames and "tokens" in result}
        peers = [here[name] for name in PEERS if name in here]
        for name in OURS:
            if name not in here or not peers:
                continue
            ours = here[name]

            def ratio(value, ours=ours, peers=peers):
                return min(map(value, peers)) / value(ours)

            faster = ratio(lambda result: result["seconds"]["second"])
            slowness = 1 / ratio(lambda result: result["seconds"]["first"] / result["tflop"])
            memory = 1 / ratio(lambda result: result["peak_bytes"])
            by_cpu = 1 / ratio(lambda result: result["seconds"]["first_cpu"] / result["tflop"])
            by_hand = min(peer["seconds"]["by_hand"] for peer in peers) / ours["seconds"]["second"]
            asked = frames >= TARGET_FRAMES
            found.append(
                {
                    "frames": frames,
                    "system": name,
                    "second_times_faster": round(faster, 1),
                    "second_against_by_hand": round(by_hand, 2),
                    "seconds_per_flop": round(slowness, 3),
                    "cpu_seconds_per_flop": round(by_cpu, 3),
                    "memory": round(memory, 3),
                    "reached": {
                        "second": faster >= TARGET_SECOND if asked else None,
                        "seconds_per_flop": slowness <= TARGET_SECONDS_PER_FLOP,
                        "memory": memory < 1 if asked else None,
                    },
                }
            )
    return found


def overtaking(results: list[dict], args) -> dict[str, int | None]:
    """From how many frames on the first answer of streaming takes fewer FLOPs than another's, at published sizes."""
    longest = {result["system"]: result for result in results if "tokens" in result}
    names = [name for name in ("qwen3-vl", "qwen2.5-vl", "full") if name in longest and "streaming" in longest]
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=True)
    configs = {name: true_config(name, tokenizer, args) for name in [*names, "streaming"]}

    def flop(name, frames):
        found = longest[name]
        share = frames / found["frames_read"]
        counts = (name, frames, found["patches"], int(found["tokens"] * share))
        return 1e12 * found["true_linear_tflop"] * share + attention_flop(configs[name], *counts)

    lengths = [64 * count for count in (*range(1, 33), *range(36, 256, 4))]
    return {
        name: next((frames for frames in lengths if flop("streaming", frames) < flop(name, frames)), None)
        for name in names
    }


def plot(line: dict, path: Path) -> None:
    """Draws seconds to both answers and memory against length, from a result file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    found = [result for result in line["results"]["runs"] if "tokens" in result]
    titles = ("Seconds to the first answer", "Seconds to a second question", "Peak memory beyond the model, MiB")
    values = (
        lambda result: result["seconds"]["first"],
        lambda result: result["seconds"]["second"],
        lambda result: result["peak_bytes"] / MIB,
    )
    for axis, title, value in zip(axes, titles, values, strict=True):
        for system in (*PEERS, *OURS):
            points = [(result["frames"], value(result)) for result in found if result["system"] == system]
            style = "s--" if system in PEERS else "o-"
            if points:
                axis.plot(*zip(*sorted(points), strict=True), style, label=system, markersize=4)
        axis.set(title=title, xlabel="frames", xscale="log", yscale="log")
        frames = sorted({result["frames"] for result in found})
        axis.set_xticks(frames, [f"{count:,}" for count in frames])
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


def missing_packages(system: str) -> list[str]:
    """Packages that a peer's processor needs and that are not here."""
    needed = ("torchvision", "torchcodec") if system in PEERS else ()
    return [name for name in needed if not find_spec(name)]


def measure_all(done: dict, args) -> dict:
    """All systems at all lengths in turns: lists of runs, or what failed, by (frames, system)."""
    deadline, found = time.monotonic() + 60 * args.minutes, dict(done)
    systems = [name for name in SYSTEMS if not args.only or name in args.only]
    todo = [(frames, name) for frames in args.frames for name in systems if (frames, name) not in done]
    with tempfile.TemporaryDirectory() as folder:
        warm_up = Path(folder) / "warm_up.mp4"
        make_clip(warm_up, WARM_UP_FRAMES)
        for turn in range(args.repeats):
            for frames, name in todo:
                path, left = Path(folder) / f"{frames}.mp4", deadline - time.monotonic()
                missing = missing_packages(name)
                if missing or isinstance(found.get((frames, name)), str):
                    found[frames, name] = f"without {', '.join(missing)}" if missing else found[frames, name]
                    continue
                if left <= 0:
                    found.setdefault((frames, name), "no time left")
                    continue
                if not path.exists():
                    make_clip(path, frames)
                limit = min(left, GIVE_UP_SECONDS)
                try:
                    result = in_fresh_process(measure, name, frames, str(path), str(warm_up), limit, args)
                except Exception as error:  # what one system cannot do costs the others nothing
                    result = f"{type(error).__name__}: {error}"[:200]
                if isinstance(result, dict):
                    found[frames, name] = [*found.get((frames, name), []), result]
                elif not turn:
                    cut = result == "not finished" and limit < GIVE_UP_SECONDS
                    found[frames, name] = "no time left" if cut else result
                print(f"{frames:,} frames, {name}: {'measured' if isinstance(result, dict) else result}", flush=True)
    return found


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    arguments.add_argument("--frames", type=int, nargs="+", default=[64, 256, 1024], help="frames of the videos")
    arguments.add_argument("--only", nargs="+", choices=SYSTEMS, help="some of the systems")
    arguments.add_argument("--minutes", type=float, default=25, help="no run starts later, and none lasts longer")
    arguments.add_argument("--resume", action="store_true", help="keep what the result file has, measure the rest")
    arguments.add_argument("--scale", type=int, default=4, help="divides width and depth of the vision towers")
    arguments.add_argument("--true-size", action="store_true", help="published sizes, language model included")
    arguments.add_argument("--tokenizer", default=str(ROOT), help="folder of a tokenizer with Qwen2-VL's marks")
    arguments.add_argument("--draw", metavar="FILE", help="draw the result file of --out, and measure nothing")
    arguments.set_defaults(repeats=1)
    args = parse(arguments)
    path, done = RESULTS / f"{Path(args.out or 'peers_cpu').stem}.json", {}
    if args.draw:
        plot(json.loads(path.read_text()), Path(args.draw))
        return
    if args.resume and path.is_file():
        kept = [result for result in json.loads(path.read_text())["results"]["runs"] if "tokens" in result]
        done = {(result["frames"], result["system"]): result for result in kept}
    found = measure_all(done, args)
    results = [
        merged(runs)
        if isinstance(runs, list)
        else (runs if isinstance(runs, dict) else {"frames": frames, "system": name, "failed": runs})
        for (frames, name), runs in sorted(found.items(), key=lambda item: item[0][0])
    ]
    show(results)
    compared, overtakes = compare(results), overtaking(results, args)
    for row in compared:
        print(row)
    print("streaming takes fewer FLOPs at published sizes from (frames):", overtakes)
    args.tokenizer = "bundled" if Path(args.tokenizer).resolve() == ROOT else Path(args.tokenizer).name
    everything = {"runs": results, "targets": compared, "streaming_overtakes_from_frames": overtakes}
    report("peers", args, everything)


if __name__ == "__main__":
    main()
