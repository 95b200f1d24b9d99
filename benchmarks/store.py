"""Key-values in 8 and 4 bits: bytes by part, time to pack and unpack, a second question's time, and logits' distances.

What is surprising:
* Key-values are made up, at the shape of Video-XL-2's layers, of which there are few here: all are alike, so shares of
  bytes hold for any number, and seconds are given a layer where they are those of layers.
* Distances need weights that were not made up at once with the key-values: those of the goldens (`--goldens`), whose
  logits come from the reference implementation. What answers lose is measured by `evaluation/report.py --store`.

    python benchmarks/store.py --out store_cpu
    python benchmarks/store.py --goldens ../shared/golden/videoxl2 --out store_cpu
"""

import json
import math
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from common import (
    HEADER_TOKENS,
    ROOT,
    build_model,
    clock,
    load_config,
    median,
    parse,
    parser,
    report,
    table,
    video_layout,
)
from safetensors.torch import load_file
from transformers import AutoModel

STORES = (None, "int8", "int4")
GROUP_FRAMES = 4
QUESTION_TOKENS = 24
# Golden cases from so many frames on are the larger ones.
LARGE_CASE = 18


def made_up_cache(model, layout, dtype):
    """A cache of the layout's length: noise, with an offset of its own in each channel, as keys of Qwen2 have."""
    cache, text = model.model.new_cache(), model.config.text_config
    shape = 1, text.num_key_value_heads, layout.length, text.hidden_size // text.num_attention_heads
    for layer in cache.layers:
        offset = 4 * torch.randn(2, 1, shape[1], 1, shape[3])
        layer.set_content(*((torch.randn(shape) + part).to(dtype) for part in offset))
    cache.layout = layout
    import_module("videoxl.prefill_videoxl").InForce(model.config).policy.begin(cache)
    return cache


def pack(model, cache, store, streaming: bool):
    """A packed copy of a cache as it is after full prefill, or after streaming, which leaves a window."""
    settings, video = model.config.resolve_sparse_attention(), cache.layout.videos[-1]
    chunk = settings.chunk_groups
    window = max((len(video) - 1) // chunk - settings.window_chunks, 0) * chunk
    before, packed = (video[window].start if streaming else cache.layout.length), cache.fork()
    inv_freq = model.model.language_model.rotary_emb.inv_freq
    module = import_module("videoxl.kv_tiers_videoxl")
    module.pack_cache(packed, store, before, inv_freq, model.device, ragged=not streaming)
    return packed


def bytes_by_part(model, layout, dtype) -> list[dict]:
    """Of one layer: what text, window and packed rows take, and the shares of the model's precision."""
    cache, results = made_up_cache(model, layout, dtype), []
    token = cache.nbytes // layout.length
    text = len(layout.non_visual) * token
    for store in STORES[1:]:
        for streaming in (False, True):
            packed = pack(model, cache, store, streaming)
            tensors = packed.layers[0].state()
            rows = tensors["codes"].nbytes + tensors["scales"].nbytes
            count = tensors["codes"].shape[1] * len(cache.layers)
            results.append(
                {
                    "store": store,
                    "prefill": "streaming" if streaming else "full",
                    "text_share": text / cache.nbytes,
                    "window_share": (packed.nbytes - text - rows * len(cache.layers)) / cache.nbytes,
                    "packed_share": rows * len(cache.layers) / cache.nbytes,
                    "share_of_all": packed.nbytes / cache.nbytes,
                    "share_of_packed_rows": rows * len(cache.layers) / (count * token / len(cache.layers)),
                }
            )
    return results


def seconds(args, function) -> float:
    """Median seconds of several runs, after one that is not counted."""
    taken = []
    for _ in range(args.repeats + 1):
        start = clock(args.device)
        function()
        taken.append(clock(args.device) - start)
    return median(taken[1:])


def times(args, model, layout) -> list[dict]:
    """Seconds to pack, to unpack for a question, and to answer a second question's first token."""
    cache, results = made_up_cache(model, layout, model.dtype), []
    ids = torch.arange(1, 1 + QUESTION_TOKENS, device=model.device)[None]
    layers = len(cache.layers)
    for store in STORES:
        video, result = cache, {"store": store or "none"}
        if store is not None:
            video = pack(model, cache, store, streaming=False)
            result["pack_seconds_a_layer"] = seconds(args, lambda s=store: pack(model, cache, s, False)) / layers
            opened = seconds(args, lambda v=video: v.fork().unpack(model.device))
            result["unpack_seconds_a_layer"] = opened / layers
        for decode in ("full", "bilevel"):
            model.config.sparse_attention = {"decode": decode}

            def ask(video=video):
                model(input_ids=ids, past_key_values=video.fork(make_room=True), logits_to_keep=1)

            result[f"second_question_{decode}_seconds"] = seconds(args, ask)
        results.append(result)
    model.config.sparse_attention = {}
    return results


def distances(folder: Path) -> list[dict]:
    """How far logits of the goldens' larger cases move: root mean square and maximum, beside their spread."""
    with tempfile.TemporaryDirectory() as converted:
        command = [sys.executable, ROOT / "convert_weights.py", folder / "checkpoint", converted]
        subprocess.run(command, check=True, capture_output=True)
        model = AutoModel.from_pretrained(converted, trust_remote_code=True).eval()
    tensors, results = load_file(folder / "golden.safetensors"), []
    cases = json.loads((folder / "golden.json").read_text())["cases"]
    for case in (case for case in cases if case["frames"] >= LARGE_CASE):
        name, end = case["case"], case["visual_end"]
        ids, expected = tensors[f"{name}.input_ids"][None], tensors[f"{name}.logits.full"]
        pixels = [tensors[f"{name}.pixel_values"]]
        for decode in ("full", "bilevel"):
            logits = {}
            for store in STORES:
                model.config.sparse_attention = {}
                cache = model(input_ids=ids[:, :end], pixel_values_videos=pixels, use_cache=True).past_key_values
                video = cache if store is None else pack(model, cache, store, streaming=False)
                model.config.sparse_attention = {"decode": decode}
                logits[store] = model(input_ids=ids[:, end:], past_key_values=video).logits[0]
            for store in STORES[1:]:
                moved = logits[store] - logits[None]
                results.append(
                    {
                        "case": name,
                        "frames": case["frames"],
                        "decode": decode,
                        "store": store,
                        "rms": moved.square().mean().sqrt().item(),
                        "max": moved.abs().max().item(),
                        "spread": expected.std().item(),
                        "same_first": (logits[store].argmax(-1) == logits[None].argmax(-1)).float().mean().item(),
                    }
                )
    return results


@torch.no_grad()
def main() -> None:
    arguments = parser(__doc__.splitlines()[0], "")
    arguments.add_argument("--frames", type=int, default=2048, help="frames of the made-up video")
    arguments.add_argument("--layers", type=int, default=4, help="layers; Video-XL-2 has 28")
    arguments.add_argument("--kv-heads", type=int, default=4, help="key-value heads")
    arguments.add_argument("--heads", type=int, default=28, help="query heads")
    arguments.add_argument("--head-size", type=int, default=128, help="channels of a head")
    arguments.add_argument("--group-tokens", type=int, default=153, help="tokens of a group, with its timestamp")
    arguments.add_argument("--timestamp-tokens", type=int, default=9, help="how many of them are the timestamp")
    arguments.add_argument("--goldens", type=Path, help="folder of Video-XL-2's goldens, for distances of logits")
    arguments.set_defaults(dtype="bfloat16")
    args = parse(arguments)
    if args.frames < 128:
        arguments.error("--frames must be at least 128: what the window of streaming prefill holds is never packed")
    args.hidden, args.mlp = args.heads * args.head_size, 4 * args.head_size
    model = build_model(load_config(args), args)
    layout = video_layout(HEADER_TOKENS + args.frames // GROUP_FRAMES * args.group_tokens, args)
    found = {"bytes": bytes_by_part(model, layout, model.dtype)}
    shares = ("text_share", "window_share", "packed_share", "share_of_all", "share_of_packed_rows")
    rows = [[part["store"], part["prefill"], *(part[name] for name in shares)] for part in found["bytes"]]
    table(["store", "prefill", "text", "window", "packed", "all", "packed rows"], rows)
    found["seconds"] = times(args, model, layout)
    names = sorted({name for result in found["seconds"] for name in result} - {"store"})
    rows = [[each["store"], *(each.get(name, math.nan) for name in names)] for each in found["seconds"]]
    table(["store", *(name.removesuffix("_seconds") for name in names)], rows)
    if args.goldens is not None:
        found["distances"] = distances(args.goldens)
        table(list(found["distances"][0]), [list(each.values()) for each in found["distances"]])
    args.goldens = args.goldens and args.goldens.name
    report("store", args, found)


if __name__ == "__main__":
    main()
