"""A long video at a published model's sizes: frames in memory to the first answer, then second questions.

What is surprising:
* Frames come from memory, decoded: how fast files are read is `read.py`'s. They are the same picture over and over,
  which costs what others would. Weights are random.
* `vision` and `prefill` are the seconds inside of tower with compressor, and inside of the language model. What is
  left of the first answer is resizing, copies to the device, and Python.
* `from the host` is a second question while the video's key-values lie in host memory (`video.to("cpu")`).
"""

import inspect

import numpy as np
from common import ROOT, PeakMemory, Stages, clock, gemm_flops, in_fresh_process, median, parse, parser, report, table
from peers import QUESTIONS, Ours

EPILOG = """\
examples:
  python benchmarks/end_to_end.py --frames 64 --scale 16
      A small model on a CPU.

  python benchmarks/end_to_end.py --true-size --device cuda --dtype bfloat16 --frames 2048 10000 --out end_to_end_gpu
      Video-XL-2's sizes on a GPU.
"""
WARM_UP_FRAMES, SIDE = 32, 384


def measure(frames: int, store: str | None, args) -> dict:
    """One length, in this process."""
    asked = Ours(args.system, args)
    model, tokenizer, seconds = asked.model, asked.tokenizer, {}
    stages = Stages(model, asked.stages, args.device)
    picture = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    options = {"store": store} if store else {}

    def encode(count):
        pixels = np.broadcast_to(picture, (count, *picture.shape))
        return model.encode_video(pixels, tokenizer, timestamps=list(range(count)), progress=False, **options)

    def ask(question, new_tokens=1):
        answer = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        started = clock(args.device)
        model.chat(asked.video, tokenizer, question, return_history=False, generation_config=answer)
        return clock(args.device) - started

    asked.video = encode(WARM_UP_FRAMES)
    ask(QUESTIONS[0], 2)
    gemm = gemm_flops(args)
    asked.video = None
    stages.reset()
    memory, started = PeakMemory(args.device), clock(args.device)
    asked.video = encode(frames)
    seconds["encode"] = clock(args.device) - started
    seconds |= stages.seconds
    seconds["first"] = seconds["encode"] + ask(QUESTIONS[0])
    peak = memory.growth() + (memory.before if args.device == "cuda" else 0)
    seconds["second"] = median([ask(question) for question in QUESTIONS])
    seconds["token"] = (ask(QUESTIONS[0], 1 + args.new_tokens) - ask(QUESTIONS[0])) / args.new_tokens
    plan = model.plan(frames, tokenizer=tokenizer, max_new_tokens=1)
    result = {
        "planned_peak_bytes": plan.peak_bytes,
        "nbytes": asked.video.nbytes,
        "tokens": len(asked.video.input_ids),
    }
    asked.video = asked.video.to("cpu")
    seconds["second_from_host"] = median([ask(question) for question in QUESTIONS])
    return {
        "frames": frames,
        "store": store,
        **result,
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "peak_bytes": peak,  # on a GPU with the weights, as in the plan; on a CPU beyond the model
        "matrix_product_tflop_per_second": round(gemm / 1e12, 3),
    }


def has_stores() -> bool:
    from videoxl import VideoXLForConditionalGeneration

    return "store" in inspect.signature(VideoXLForConditionalGeneration.encode_video).parameters


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    arguments.add_argument("--frames", type=int, nargs="+", default=[2048], help="frames of the videos")
    arguments.add_argument("--system", choices=("full", "streaming", "bilevel"), default="streaming", help="mode")
    arguments.add_argument("--stores", nargs="+", default=["none"], help="none, int8, int4: how key-values are kept")
    arguments.add_argument("--new-tokens", type=int, default=16, help="tokens over which decoding is timed")
    arguments.add_argument("--scale", type=int, default=4, help="divides width and depth of the vision tower")
    arguments.add_argument("--true-size", action="store_true", help="published sizes, language model included")
    arguments.add_argument("--tokenizer", default=str(ROOT), help="folder of the tokenizer")
    args = parse(arguments)
    results, rows = [], []
    for frames in args.frames:
        for store in args.stores:
            if store != "none" and not has_stores():
                result = "this version keeps no packed key-values"
            else:
                result = in_fresh_process(measure, frames, None if store == "none" else store, args)
            if not isinstance(result, dict):
                results.append({"frames": frames, "store": store, "failed": result})
                rows.append([f"{frames:,}", store, result, *["-"] * 8])
                continue
            results.append(result)
            names = ("first", "vision", "prefill", "second", "second_from_host", "token")
            row = [f"{result['seconds'].get(name, 0):.3f}" for name in names]
            sizes = [f"{result[name] / 1e9:.2f}" for name in ("nbytes", "peak_bytes")]
            rows.append([f"{frames:,}", store, f"{result['tokens']:,}", *row, *sizes])
    header = ["frames", "store", "tokens", "first s", "vision s", "prefill s", "second s", "from the host", "a token"]
    table([*header, "kept GB", "peak GB"], rows)
    args.tokenizer = None
    report("end_to_end", args, results)


if __name__ == "__main__":
    main()
