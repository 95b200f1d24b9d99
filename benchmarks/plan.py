"""What `model.plan` predicts against what is measured: tokens, key-values, and peak memory of encoding and asking.

What is surprising:
* Videos go through the public door, `encode_video` and `chat`, with frames from memory that are tiny before they are
  resized. Each case runs in a fresh process, after a short video that wakes up threads and kernels.
* A peak is the growth since then: of resident memory on a CPU, of allocated memory on CUDA. Both sides are beyond the
  weights and with the key-values. `encode` is the larger of the stages `vision` and `prefill`, `answer` of `question`
  and `decode`.
* `beside KV` is the measured peak of encoding without the key-values: it should not grow with the video.
"""

import json
from pathlib import Path

import numpy as np
from common import MIB, ROOT, PeakMemory, build_model, in_fresh_process, load_config, parse, parser, report, table
from transformers import AutoTokenizer

# The tower of the small cases: two layers of it, so that its time does not matter.
TOWER = {"image_size": 384, "patch_size": 14, "num_hidden_layers": 3, "num_attention_heads": 12}
SMALL_TOWER = {
    "image_size": 28,
    "patch_size": 14,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
WIDE = {"hidden_size": 1024, "intermediate_size": 4096}
NARROW = {"hidden_size": 512, "intermediate_size": 1376}

# Name: (frames, frames in a chunk of the tower, vision, language model, sparse attention); 38 tokens a frame.
CASES = {
    "tower": (64, 64, {**TOWER, "hidden_size": 768, "intermediate_size": 3072}, None, {}),
    "compressor": (96, 96, {**TOWER, "hidden_size": 768, "intermediate_size": 768}, None, {}),
    "wide": (528, 32, None, WIDE, {"prefill": "streaming"}),
    "streaming-20k": (528, 32, None, NARROW, {"prefill": "streaming"}),
    "streaming-40k": (1056, 32, None, NARROW, {"prefill": "streaming"}),
    "large-chunks": (640, 128, None, NARROW, {"prefill": "streaming"}),
    "mask-20k": (528, 32, None, NARROW, {"prefill": "mask"}),
    "full-20k": (528, 32, None, NARROW, {"prefill": "full"}),
    "bilevel-40k": (1056, 32, None, NARROW, {"prefill": "streaming", "decode": "bilevel"}),
}
# Other members of the family at reduced width, with their numbers of tokens: 144 a frame, or a group of four.
# Name: (frames, preset, settings).
MEMBERS = {
    "video-xl-r16": (2048, "video-xl-7b", {"beacon_ratio": 16}),
    "pro-march": (10000, "video-xl-pro-3b-march", {"beacon_ratio": 16}),
    "pro-april": (600, "video-xl-pro-3b", {}),
}
MEMBER_TOWERS = {
    "siglip_vision_model": SMALL_TOWER,
    "clip_vision_model": {**SMALL_TOWER, "image_size": 48, "patch_size": 2},
}
QUESTION = "What is this? " * 8

EPILOG = """\
examples:
  python benchmarks/plan.py --out plan_cpu
      All cases at reduced width on two CPU threads (some 20 minutes, 8 GB). glibc keeps small freed blocks, so
      resident memory is a little more; MALLOC_MMAP_THRESHOLD_=131072 MALLOC_TRIM_THRESHOLD_=131072 ends that.

  python benchmarks/plan.py --cases compressor mask-20k
      Two of them.

  python benchmarks/plan.py --cases video-xl-r16 pro-march pro-april --out plan_members_cpu
      The other members of the family: 2,048, 10,000 and 600 frames (some 15 minutes).

  python benchmarks/plan.py --preset video-xl-2-8b --tokenizer PATH --frames 512 2048 10000
      True size with random weights on a GPU, against CUDA's counter. PATH is a folder with the published tokenizer.
"""


def settings_of(case, args):
    """(frames, config, sparse attention) of a case: a name, or with --preset a number of frames."""
    config = load_config(args)
    if args.preset:
        return case, config, {"prefill": "streaming"}
    if case in MEMBERS:
        return _member(case, config)
    frames, chunk, vision, text, sparse = CASES[case]
    bundled = type(config).from_pretrained(ROOT)
    text_config = bundled.text_config.to_dict()
    del text_config["layer_types"]  # one entry a layer
    text_config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    text_config |= {"num_hidden_layers": 8 if text else 1, "initializer_range": 0.02} | (text or NARROW)
    vision = {"model_type": "siglip_vision_model", **(vision or SMALL_TOWER)}
    # 144 tokens per group either way.
    grid = {"grid_size": 24, "projector_pool_size": 2} if text is None else {"grid_size": 12, "projector_pool_size": 1}
    config = type(config)(
        vision_config=vision,
        compressor_config={"hidden_size": vision["hidden_size"], **grid},
        text_config=text_config,
        vision_chunk_frames=chunk,
        tie_word_embeddings=True,
        **{name: getattr(bundled, name) for name in ("video_token_id", "time_start_token_id", "time_end_token_id")},
    )
    return frames, config, sparse


def _member(case, config):
    """A preset with a narrow tower and language model, and the bundled tokenizer's ids."""
    frames, preset, settings = MEMBERS[case]
    values = json.loads((ROOT / "presets" / f"{preset}.json").read_text())
    bundled = type(config).from_pretrained(ROOT)
    values["vision_config"] |= MEMBER_TOWERS[values["vision_config"]["model_type"]]
    values["compressor_config"] |= {"hidden_size": SMALL_TOWER["hidden_size"]}
    text_config = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text_config |= {"hidden_size": 64, "intermediate_size": 128, "vocab_size": bundled.text_config.vocab_size}
    values["text_config"] |= text_config | {"bos_token_id": None, "eos_token_id": None}
    values["video_token_id"] = bundled.video_token_id
    if values["frames_config"]["time_format"] is not None:
        values |= {name: getattr(bundled, name) for name in ("time_start_token_id", "time_end_token_id")}
    return frames, type(config)(**values | settings | {"dtype": None}), {}


def measure(case, args) -> dict:
    """Plans and runs one case, in this process."""
    frames, config, sparse = settings_of(case, args)
    model, tokenizer = build_model(config, args), AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=True)
    model.config.sparse_attention = sparse
    answer = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}

    def encode(count):
        return model.encode_video(np.zeros((count, 8, 8, 3), np.uint8), tokenizer, timestamps=list(range(count)))

    def ask(video):
        model.chat(video, tokenizer, QUESTION, return_history=False, generation_config=answer)

    ask(encode(8))
    question_tokens = len(tokenizer(QUESTION)["input_ids"])
    plan = model.plan(frames, tokenizer=tokenizer, question_tokens=question_tokens, max_new_tokens=args.new_tokens)
    memory = PeakMemory(args.device)
    start = memory.before
    video = encode(frames)
    encoded = memory.growth()
    memory = PeakMemory(args.device)
    ask(video)
    answered = memory.before + memory.growth() - start
    return {
        "case": str(case),
        "frames": frames,
        "tokens": plan.total_tokens,
        "tokens_exact": plan.total_tokens == len(video.input_ids),
        "kv_bytes": plan.kv_bytes,
        "kv_exact": plan.kv_bytes == video.nbytes,
        "encode": {"predicted": max(plan.beyond("vision"), plan.beyond("prefill")), "measured": encoded},
        "answer": {"predicted": max(plan.beyond("question"), plan.beyond("decode")), "measured": answered},
        "stages": plan.stages,
        "text_config": {key: getattr(config.text_config, key) for key in ("hidden_size", "num_hidden_layers")},
        "vision_chunk_frames": config.vision_chunk_frames,
        "sparse_attention": sparse,
    }


def show(results) -> None:
    """Prints the table."""
    rows = []
    for result in results:
        if "encode" not in result:
            rows.append([result["case"], "out of memory", *["-"] * 9])
            continue
        exact = "yes" if result["tokens_exact"] and result["kv_exact"] else "NO"
        row = [result["case"], f"{result['tokens']:,}", exact, f"{result['kv_bytes'] / MIB:,.0f}"]
        for name in ("encode", "answer"):
            predicted, measured = result[name]["predicted"], result[name]["measured"]
            error = result[name]["error"] = round(predicted / measured - 1, 4)
            row += [f"{predicted / MIB:,.0f}", f"{measured / MIB:,.0f}", f"{error:+.1%}"]
        rows.append([*row, f"{(result['encode']['measured'] - result['kv_bytes']) / MIB:,.0f}"])
    header = [
        "case",
        "tokens",
        "exact",
        "KV MiB",
        "encode plan",
        "measured",
        "error",
        "answer plan",
        "measured",
        "error",
    ]
    table([*header, "beside KV"], rows)


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    arguments.add_argument("--cases", nargs="+", choices=[*CASES, *MEMBERS], default=list(CASES), help="which")
    arguments.add_argument("--frames", type=int, nargs="+", default=[512, 2048], help="lengths, with --preset")
    arguments.add_argument("--tokenizer", default=str(ROOT), help="folder of the tokenizer; needed with --preset")
    arguments.add_argument("--new-tokens", type=int, default=16, help="length of the answer")
    for name, value in {"hidden": 64, "mlp": 64, "layers": 1, "heads": 2, "kv_heads": 2}.items():
        arguments.set_defaults(**{name: value})  # `load_config` wants a model; the cases bring their own
    args = parse(arguments)
    results = []
    for case in args.frames if args.preset else args.cases:
        result = in_fresh_process(measure, case, args)
        results.append(result if isinstance(result, dict) else {"case": str(case), "failed": result})
    show(results)
    args.tokenizer = "bundled" if Path(args.tokenizer).resolve() == ROOT else Path(args.tokenizer).name
    report("plan", args, results)


if __name__ == "__main__":
    main()
