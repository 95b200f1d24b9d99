"""From a file to visual tokens: frames per second of the vision tower with compressor, and of decoding the file.

What is surprising:
* FLOP/s of tower and compressor stand beside those of a plain matrix product in the same process, measured before and
  after. FLOPs are counted: linear layers and convolutions by their rows, attention by its pairs.
* The tower's numbers are for random pixels through `get_video_features`; the language model is a stub that only gives
  the projector its width. Without `--preset` the tower is much smaller than the published one, for a CPU.
* Decoding is counted in *chosen* frames, resized, as `chat` reads them. A file has to be decoded between them too, so
  fewer frames per second of video make fewer of them per second; "x real time" is what stays comparable.
"""

import tempfile
from pathlib import Path

import torch
from common import (
    MIB,
    PeakMemory,
    Stages,
    build_model,
    clock,
    gemm_flops,
    in_fresh_process,
    linear_flop,
    load_config,
    median,
    parse,
    parser,
    report,
    table,
)

# The clip that is made where no file is given: moving stripes, H.264.
CLIP = {"seconds": 60, "rate": 25, "width": 640, "height": 360}

# The published tower's MLP is 4304 wide for 1152 channels.
MLP_RATIO = 4304 / 1152

EPILOG = """\
examples:
  python benchmarks/encode.py
      A small tower on two CPU threads, and a clip that is made on the spot.

  python benchmarks/encode.py --video talk.mp4 --sample-fps 1 4 --max-num-frames 2048
      Decoding of a file of yours at two sampling rates.

  python benchmarks/encode.py --frames 32 --image-size 384 --vision-hidden 288 --vision-layers 7 --vision-heads 4 \\
      --tower-only --out encode_cpu
      A quarter of the published tower. --vision-hidden 1152 --vision-layers 26 --vision-heads 16 is all of it.

  python benchmarks/encode.py --preset video-xl-2-8b --frames 512 2048 --out encode_8b
      The published tower and compressor with random weights in bfloat16 on a GPU.
"""


def tower_config(args):
    """The config to measure: the flags' tower, or the preset's, over a language model of one thin layer."""
    config = load_config(args)
    text = config.text_config.to_dict()
    text |= {"num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64, "layer_types": None}
    vision = config.vision_config.to_dict()
    compressor = config.compressor_config.to_dict()
    if not args.preset:
        side, wide = args.image_size // 14, args.vision_hidden
        vision |= {"hidden_size": wide, "intermediate_size": round(wide * MLP_RATIO), "image_size": args.image_size}
        heads = args.vision_heads or wide // 64
        vision |= {"num_hidden_layers": args.vision_layers + 1, "num_attention_heads": heads}
        compressor |= {"hidden_size": wide, "grid_size": side // 8 * 8}  # 24 of 27, as published
    settings = {"vision_feature_layer": config.vision_feature_layer, "vision_chunk_frames": args.chunk_frames}
    return type(config)(vision_config=vision, compressor_config=compressor, text_config=text, **settings)


def attention_flop(config, frames: int) -> dict[str, int]:
    """FLOPs of attention in the tower and, over the cells of a step, in the compressor."""
    vision, compressor = config.vision_config, config.compressor_config
    patches = (vision.image_size // vision.patch_size) ** 2
    groups, cells = -(-frames // compressor.frames_per_group), compressor.grid_size**2
    steps = compressor.frames_per_group + compressor.frames_per_group // 2
    return {
        "tower": 4 * frames * (vision.num_hidden_layers - 1) * patches**2 * vision.hidden_size,
        "compressor": 4 * groups * steps * cells**2 * compressor.hidden_size,
        "projector": 0,
    }


def measure_tower(frames: int, args) -> dict:
    """Times `get_video_features` on one number of frames, in this process."""
    config = tower_config(args)
    model = build_model(config, args)
    whole, side = model.model, config.vision_config.image_size
    if args.channels_last:
        whole.compressor.to(memory_format=torch.channels_last_3d)
    pixels = torch.randn(frames, 3, side, side, dtype=getattr(torch, args.dtype), device=args.device)
    parts = {
        "tower": (whole.vision_tower, [whole.vision_tower.embeddings, whole.vision_tower.encoder]),
        "compressor": (whole.compressor, [whole.compressor]),
        "projector": (whole.multi_modal_projector, [whole.multi_modal_projector]),
    }
    model.get_video_features([pixels[: args.chunk_frames]])
    gemm, found = [gemm_flops(args)], []
    memory = PeakMemory(args.device)
    stages = Stages(model, {name: modules for name, (_, modules) in parts.items()}, args.device)
    for _ in range(args.repeats):
        stages.reset()
        started = clock(args.device)
        tokens = model.get_video_features([pixels]).pooler_output[0]
        found.append({"all": clock(args.device) - started, **stages.seconds})
        if len(found) == 1:
            peak_bytes = memory.growth()
    gemm.append(gemm_flops(args))
    attention, seconds, tflops = attention_flop(config, frames), {}, {}
    for name in ("all", *parts):
        seconds[name] = median([run[name] for run in found])
    for name, (module, _) in parts.items():
        rows = {key: count for key, count in stages.rows.items() if module is model.get_submodule(_room(key))}
        flop = linear_flop(model, rows) + attention[name]
        tflops[name] = round(flop / seconds[name] / 1e12, 4)
    return {
        "frames": frames,
        "image_size": side,
        "seconds": seconds.pop("all"),
        "stage_seconds": seconds,
        "runs": [round(run["all"], 6) for run in found],
        "frames_per_second": round(frames / median([run["all"] for run in found]), 3),
        "tflop_per_second": tflops,
        "matrix_product_tflop_per_second": round(max(gemm) / 1e12, 4),
        "visual_tokens": tokens.shape[0] * tokens.shape[1],
        "peak_bytes": peak_bytes,
    }


def _room(name: str) -> str:
    """The part of the model that a layer is in: the first two names of its path."""
    return ".".join(name.split(".")[:2])


def make_clip(path: Path) -> None:
    """Writes the clip of `CLIP`."""
    import av
    import numpy as np

    rows = np.arange(CLIP["height"])[:, None, None]
    columns = np.arange(CLIP["width"])[None, :, None]
    picture = ((rows // 9 * 37 + columns // 16 * 53) * np.array([1, 2, 3]) % 256).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=CLIP["rate"])
        stream.width, stream.height, stream.pix_fmt = CLIP["width"], CLIP["height"], "yuv420p"
        for index in range(CLIP["seconds"] * CLIP["rate"]):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 4 * index, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def measure_decoding(path: str, sample_fps: float, args) -> dict:
    """Times reading a file's chosen frames."""
    from videoxl import Sampling, open_video

    seconds = []
    for _ in range(args.repeats):
        started = clock("cpu")
        options = {"size": args.image_size, "batch_frames": args.chunk_frames}
        with open_video(path, sampling=Sampling(args.max_num_frames, sample_fps, None), **options) as reader:
            count = sum(len(batch.timestamps) for batch in reader)
            duration = reader.duration
        seconds.append(round(clock("cpu") - started, 6))
    return {
        "sample_fps": sample_fps,
        "frames": count,
        "seconds": median(seconds),
        "runs": seconds,
        "frames_per_second": round(count / median(seconds), 3),
        "video_seconds_per_second": round(duration / median(seconds), 3),
    }


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    arguments.add_argument("--frames", type=int, nargs="+", default=[32, 64], help="frames through the tower at once")
    arguments.add_argument("--image-size", type=int, default=224, help="side of a frame in pixels (without --preset)")
    arguments.add_argument("--vision-hidden", type=int, default=256, help="tower's width, a multiple of 64")
    arguments.add_argument("--vision-layers", type=int, default=4, help="layers of the tower (without --preset)")
    arguments.add_argument("--vision-heads", type=int, help="heads of the tower; without it one for 64 channels")
    arguments.add_argument(
        "--channels-last", action="store_true", help="the compressor's convolutions in channels-last format"
    )
    arguments.add_argument("--tower-only", action="store_true", help="decode nothing")
    arguments.add_argument("--chunk-frames", type=int, default=32, help="frames per call of the tower")
    arguments.add_argument("--video", help="file to decode; without it a clip is made")
    arguments.add_argument("--sample-fps", type=float, nargs="+", default=[1.0, 4.0], help="frames taken per second")
    arguments.add_argument("--max-num-frames", type=int, default=512, help="at most so many frames of the file")
    # Of the language model only the width matters here.
    arguments.set_defaults(hidden=512, layers=1, heads=8, kv_heads=2, mlp=64)
    args = parse(arguments)
    if args.preset:
        args.image_size = load_config(args).vision_config.image_size
    tower = []
    for frames in args.frames:
        result = in_fresh_process(measure_tower, frames, args)
        tower.append(result if isinstance(result, dict) else {"frames": frames, "failed": result})
    rows = [
        [f"{result['frames']:,}", result["failed"], *["-"] * 7]
        if "failed" in result
        else [
            f"{result['frames']:,}",
            f"{result['image_size']}",
            f"{result['seconds']:.3f}",
            f"{result['frames_per_second']:,.1f}",
            f"{result['visual_tokens']:,}",
            *(f"{result['tflop_per_second'][part]:.3f}" for part in ("tower", "compressor")),
            f"{result['matrix_product_tflop_per_second']:.3f}",
            f"{result['peak_bytes'] / MIB:,.0f}",
        ]
        for result in tower
    ]
    header = ["frames", "pixels", "seconds", "tower frames/s", "visual tokens"]
    table([*header, "tower TFLOP/s", "compressor", "matrix product", "peak MiB"], rows)
    if args.tower_only:
        report("encode", args, {"tower": tower})
        return
    with tempfile.TemporaryDirectory() as folder:
        path = args.video
        if path is None:
            path = str(Path(folder) / "clip.mp4")
            make_clip(Path(path))
        decoding = [in_fresh_process(measure_decoding, path, rate, args) for rate in args.sample_fps]
    rows = [
        [f"{result['sample_fps']:g}", f"{result['frames']:,}", f"{result['seconds']:.3f}"]
        + [f"{result['frames_per_second']:,.1f}", f"{result['video_seconds_per_second']:,.1f}"]
        for result in decoding
    ]
    print()
    table(["taken per s", "frames", "seconds", "decoded frames/s", "x real time"], rows)
    video = Path(args.video).name if args.video else CLIP
    args.video = None
    report("encode", args, {"tower": tower, "decoding": decoding, "video": video})


if __name__ == "__main__":
    main()
