"""Language-model prefill against length: time, arithmetic and peak memory, sparse and dense.

What is surprising:
* Five ways to fill the same cache. `dense-mask` is what the public Video-XL-2 code does: an additive L x L mask of 0
  and -1e9 through stock Qwen2, one forward; its time includes building the mask, in place and in the model's dtype
  (the public code takes several such tensors). `dense` is stock Qwen2 with causal attention and no mask. `full`,
  `streaming` and `mask` are ours, through `extend_cache`.
* Every measurement runs in a fresh process, after a short warm-up; the first run gives the memory. On a CPU the ways
  take turns, one run each, so that a machine that becomes busy is unfair to none.
* FLOPs are counted, not estimated: linear layers plus two products per pair of query and key. A mask hides results,
  not arithmetic, so `dense-mask` counts L x L pairs; the others count the pairs that are visible, from the layout.
* Ours leaves out the last layer's attention where nobody asked for a hidden state, and stock Qwen2 never does. With
  `--hidden-states all` ours does the same work as stock; `last` is what a user gets. The FLOPs are of what runs.
"""

import torch
from common import (
    MIB,
    PeakMemory,
    add_llm_flags,
    build_model,
    clock,
    cpu_waited,
    in_fresh_process,
    load_config,
    median,
    parse,
    parser,
    report,
    set_sparse_attention,
    table,
    video_layout,
)
from torch import nn
from transformers import DynamicCache

OURS = ("full", "streaming", "mask")
MODES = ("dense-mask", "dense", *OURS)
# Stands for "not visible" in the public code's mask.
HIDDEN = -1e9
# Rows of that mask that are made causal at once.
MASK_ROWS = 1024
# Chunks that run before the clock starts: threads, kernels and allocators wake up.
WARM_UP_CHUNKS = 6

EPILOG = """\
examples:
  python benchmarks/prefill.py
      A small model in float32 on two CPU threads, 20,000 and 40,000 tokens (some minutes, 12 GB).

  python benchmarks/prefill.py --lengths 5000 10000 --modes dense streaming --out prefill_short
      Two of the ways, shorter; the result also goes to benchmarks/results/prefill_short.json.

  python benchmarks/prefill.py --preset video-xl-2-8b --lengths 20000 78000 382000
      True size with random weights in bfloat16 on a GPU: about 512, 2,048 and 10,000 frames. What does not fit is
      reported as out of memory.
"""


def visible_pairs(layout, mode, chunk_groups, window_chunks) -> int:
    """Pairs of query and key that attention has to compute, without an L x L tensor."""
    length = layout.length
    if mode == "dense-mask":
        return length * length
    pairs = length * (length + 1) // 2
    if mode in ("dense", "full"):
        return pairs
    visual_before = 0  # visual tokens of earlier videos: hidden from all of a later video
    for video in layout.videos:
        for first in range(0, len(video), chunk_groups):
            queries = video[first : first + chunk_groups]
            left = video[: max(first - window_chunks * chunk_groups, 0)]
            hidden = visual_before + sum(group.end - group.visual_start for group in left)
            for group in queries:
                begin = group.visual_start if mode == "mask" else group.start
                pairs -= hidden * (group.end - begin)
        visual_before += sum(group.end - group.visual_start for group in video)
    return pairs


def unread_pairs(layout, mode, args) -> int:
    """Pairs that our last layer leaves out when only the last hidden state is asked for: all but the last step's."""
    from videoxl.sparse_attention import plan_prefill

    last = plan_prefill(layout, mode, args.chunk_groups, args.window_chunks)[-1]
    queries = last.stop - last.start
    seen = last.start - last.window_start + (0 if last.gathered is None else len(last.gathered))
    assert last.wide is None, "the prompt ends with text, which sees everything"
    computed = queries * seen + queries * (queries + 1) // 2
    return visible_pairs(layout, mode, args.chunk_groups, args.window_chunks) - computed


def additive_mask(layout, args) -> torch.Tensor:
    """[1, 1, L, L] of 0 and -1e9: the reference's rules a-e, filled row block by row block."""
    length = layout.length
    mask = torch.full((length, length), HIDDEN, dtype=getattr(torch, args.dtype), device=args.device)
    non_visual = layout.non_visual.to(args.device)
    (groups,) = layout.videos
    for first in range(0, len(groups), args.chunk_groups):
        chunk = groups[first : first + args.chunk_groups]
        window_start = groups[max(first - args.window_chunks * args.chunk_groups, 0)].start
        rows = mask[chunk[0].start : chunk[-1].end]
        rows[:, non_visual] = 0
        rows[:, window_start : chunk[-1].end] = 0
        for group in chunk:
            mask[group.start : group.visual_start] = 0
    mask[: groups[0].start] = 0
    mask[groups[-1].end :] = 0
    block = 1024
    for begin in range(0, length, block):
        rows = mask[begin : begin + block]
        later = (
            torch.arange(length, device=mask.device)
            > torch.arange(begin, begin + len(rows), device=mask.device)[:, None]
        )
        rows.masked_fill_(later, HIDDEN)
    return mask[None, None]


def measure(mode: str, length: int, runs: int, args) -> dict:
    """Times one way of prefilling one length, in this process.

    Returns:
        `seconds`, `mask_build_seconds` and `cpu_contention` (share of the time in which some task waited for a CPU)
        list the runs; the rest is the same for all.
    """
    config = load_config(args)
    layout = video_layout(length, args)
    warm_up = video_layout(
        min(length, WARM_UP_CHUNKS * args.chunk_groups * args.group_tokens + layout.videos[0][0].start), args
    )
    if mode in ("dense", "dense-mask"):
        model = language_model = build_model(config.text_config, args)

        def prefill(embeds, layout):
            started = clock(args.device)
            mask = additive_mask(layout, args) if mode == "dense-mask" else None
            built = clock(args.device) - started
            cache = DynamicCache()
            model(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True)
            return cache, built
    else:
        model = build_model(config, args)
        language_model = model.model.language_model
        set_sparse_attention(model, args, prefill=mode)

        def prefill(embeds, layout):
            cache = model.model.new_cache()
            model.model.extend_cache(embeds, layout, cache, keep_hidden=1 if args.hidden_states == "last" else 0)
            return cache, 0.0

    dtype = getattr(torch, args.dtype)
    embeds = torch.randn(1, length, config.text_config.hidden_size, dtype=dtype, device=args.device)
    prefill(embeds[:, : warm_up.length], warm_up)
    seconds, build_seconds, waited, kv_bytes = [], [], [], 0
    memory = PeakMemory(args.device)
    for _ in range(runs):
        started, waited_before = clock(args.device), cpu_waited()
        cache, built = prefill(embeds, layout)
        seconds.append(round(clock(args.device) - started, 6))
        build_seconds.append(round(built, 6))
        waited.append(round((cpu_waited() - waited_before) / seconds[-1], 3))
        if not kv_bytes:
            peak_bytes = memory.growth()
            kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        del cache
    text = config.text_config
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    linear = sum(module.weight.numel() for module in language_model.modules() if isinstance(module, nn.Linear))
    pairs = visible_pairs(layout, mode, args.chunk_groups, args.window_chunks)
    computed = pairs * text.num_hidden_layers
    if mode in OURS and args.hidden_states == "last":
        computed -= unread_pairs(layout, mode, args)
    attention = 4 * computed * text.num_attention_heads * head_size
    return {
        "mode": mode,
        "tokens": length,
        "seconds": seconds,
        "cpu_contention": waited,
        "mask_build_seconds": build_seconds,
        "tflop": round((2 * linear * length + attention) / 1e12, 6),
        "pairs": pairs,
        "peak_bytes": peak_bytes,
        "kv_bytes": kv_bytes,
    }


def measure_all(length: int, args) -> list[dict]:
    """Measures all ways at one length: a dict per way, with the median and the single runs, or with `failed`."""
    rounds, runs = (args.repeats, 1) if args.device == "cpu" else (1, args.repeats)
    merged = {}
    for _ in range(rounds):
        for mode in args.modes:
            if "failed" in merged.get(mode, {}):
                continue
            result = in_fresh_process(measure, mode, length, runs, args)
            if not isinstance(result, dict):
                merged[mode] = {"mode": mode, "tokens": length, "failed": result}
            elif mode in merged:
                for field in ("seconds", "cpu_contention", "mask_build_seconds"):
                    merged[mode][field] += result[field]
            else:
                merged[mode] = result
    for result in merged.values():
        if "failed" not in result:
            result["runs"] = result["seconds"]
            result["seconds"] = median(result["runs"])
            result["mask_build_seconds"] = median(result["mask_build_seconds"])
    return list(merged.values())


def show(results: list[dict], lengths) -> None:
    """Prints the table; a ratio is "how many times faster", with the ratio of FLOPs in brackets."""
    by_key = {(result["mode"], result["tokens"]): result for result in results}

    def ratio(slow, fast):
        if slow is None or "seconds" not in slow:
            return "-"
        return f"{slow['seconds'] / fast['seconds']:.2f} ({slow['tflop'] / fast['tflop']:.2f})"

    rows = []
    for result in results:
        mode, length = result["mode"], result["tokens"]
        if "seconds" not in result:
            rows.append([f"{length:,}", mode, "out of memory", *["-"] * 8])
            continue
        shorter = by_key.get((mode, lengths[lengths.index(length) - 1])) if lengths.index(length) else None
        growth = "-" if not shorter or "seconds" not in shorter else f"{result['seconds'] / shorter['seconds']:.2f}"
        rows.append(
            [
                f"{length:,}",
                mode,
                f"{result['seconds']:.3f}",
                f"{result['tflop'] / result['seconds']:.3f}",
                ratio(by_key.get(("dense-mask", length)), result),
                ratio(by_key.get(("dense", length)), result),
                growth,
                f"{result['peak_bytes'] / MIB:,.0f}",
                f"{result['kv_bytes'] / MIB:,.0f}",
                f"{(result['peak_bytes'] - result['kv_bytes']) / MIB:,.0f}",
                f"{result['mask_build_seconds']:.2f}",
            ]
        )
    header = ["tokens", "mode", "seconds", "TFLOP/s", "x dense-mask (FLOP)", "x dense (FLOP)", "x shorter"]
    table([*header, "peak MiB", "KV MiB", "beside KV", "mask build s"], rows)


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    add_llm_flags(arguments)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[20000, 40000], help="tokens of the prompt")
    arguments.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="what to compare")
    arguments.add_argument(
        "--hidden-states", choices=("last", "all"), default="last", help="which ours returns; stock returns all"
    )
    args = parse(arguments)
    results = []
    for length in args.lengths:
        results += measure_all(length, args)
    show(results, args.lengths)
    report("prefill", args, results)


if __name__ == "__main__":
    main()
