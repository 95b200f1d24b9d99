"""One decode step against stock Qwen2 with a dynamic cache of the same length, and compiled; a second question.

What is surprising:
* Both models have the same weights and key-values, and take turns, so that what else the machine does meets both. On a
  CPU, CPU seconds are given beside: on a machine that is not quiet they say more.
* `forward` is called as `generate` calls it in a step: one id, a mask and a position. Stock Qwen2 copies its whole
  cache for each step, and ours appends in place: the longer the video, the larger the difference.
* "outside kernels" is the share of a step that torch's operators do not account for: Python, and the way to kernels.
* The bundled model is asked about random embeddings, as what key-values hold changes no time.
* Compiled is `forward` through `torch.compile(dynamic=True)`, after its warm-up, and needs a C++ compiler.
"""

import copy
import statistics
import time
from functools import partial
from importlib import import_module

import torch
from common import (
    ROOT,
    add_llm_flags,
    build_model,
    in_fresh_process,
    load_config,
    parse,
    parser,
    report,
    set_sparse_attention,
    table,
    video_layout,
)
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModel, DynamicCache, Qwen2ForCausalLM

# Most that a step may cost of stock Qwen2's, and least that compiling it should gain: the targets.
MOST_OF_STOCK, LEAST_GAIN = 1.15, 1.3
QUESTION_TOKENS = 32
# A measurement is so many steps, taken `--repeats` times in turns.
STEPS = 10

EPILOG = """\
examples:
  python benchmarks/step.py --repeats 9 --out step_cpu
      The bundled size and 512 x 4, at 2,000 and 20,000 tokens, float32 and bfloat16.

  python benchmarks/step.py --models flags --hidden 1536 --layers 8 --lengths 20000 --dtypes bfloat16
      Another size.
"""


def load(which: str, dtype: str, args):
    """The bundled checkpoint, or a model of the flags' sizes with random weights."""
    args = copy.copy(args)
    args.dtype = dtype
    if which == "flags":
        return build_model(load_config(args), args)
    import_module("videoxl").register()
    return AutoModel.from_pretrained(ROOT, dtype=getattr(torch, dtype)).to(args.device).eval()


def stock_of(model):
    """Stock Qwen2 with a model's language model in it."""
    config = copy.deepcopy(model.config.text_config)
    config._attn_implementation = "sdpa"
    stock = Qwen2ForCausalLM(config).to(model.device, model.dtype).eval()
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.weight.copy_(model.lm_head.weight)
    return stock


def step(forward, cache, **options) -> None:
    """A further token behind a cache."""
    past = cache.get_seq_length()
    ids = torch.zeros(1, 1, dtype=torch.long, device=options.pop("device"))
    mask, positions = torch.ones(1, past + 1, dtype=torch.long, device=ids.device), torch.full_like(ids, past)
    forward(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **options
    )


def in_turns(calls: dict, repeats: int, device: str) -> dict:
    """Milliseconds of each call, medians: of wall and of CPU."""
    found = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            cpu, wall = time.process_time(), time.perf_counter()
            call()
            if device == "cuda":
                torch.cuda.synchronize()
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {
        name: [statistics.median(values) * 1e3 for values in zip(*runs, strict=True)] for name, runs in found.items()
    }
    return {name: {"ms": round(wall, 3), "cpu_ms": round(cpu, 3)} for name, (wall, cpu) in medians.items()}


def outside_kernels(call) -> float:
    """The share of a call's time, under the profiler, in which no operator of torch runs."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        call()
        passed = time.perf_counter() - started
    return round(max(1 - sum(event.self_cpu_time_total for event in seen.key_averages()) / 1e6 / passed, 0.0), 3)


def several(call) -> None:
    for _ in range(STEPS):
        call()


def measure(which: str, dtype: str, length: int, args) -> dict:
    """All that is told of one size, precision and length, in this process."""
    model = load(which, dtype, args)
    device, text = args.device, model.config.text_config
    # One group a chunk, so that bi-level decoding has something to pool in short videos, too.
    set_sparse_attention(model, args, prefill="streaming", decode_chunk_groups=1)
    layout = video_layout(length, args)
    layout, video = type(layout)(layout.videos, layout.end), model.model.new_cache()
    embeds = torch.randn(1, layout.length, text.hidden_size, device=device, dtype=model.dtype)
    started = time.perf_counter()
    model.model.extend_cache(embeds, layout, video, keep_hidden=1)
    filled = time.perf_counter() - started
    question = torch.zeros(1, QUESTION_TOKENS, dtype=torch.long, device=device)

    def ask(decode="full"):
        model.config.sparse_attention = {**model.config.sparse_attention.to_dict(), "decode": decode}
        cache = video.fork(make_room=decode == "full")
        model(input_ids=question, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    caches = {"ours": ask(), "bilevel": ask("bilevel")}
    held = caches["bilevel"].held
    stock, prompt = stock_of(model), layout.length + QUESTION_TOKENS
    run = partial(partial, step, device=device)
    steps = {}
    for name, cache in caches.items():
        theirs = DynamicCache()  # as long as what is kept for a question
        for index, layer in enumerate(cache.layers):
            theirs.update(layer.keys.clone(), layer.values.clone(), index)
        steps["stock" if name == "ours" else "stock_as_bilevel"] = run(stock.forward, theirs)
        steps[name] = run(model.forward, cache, prompt_length=prompt)
    if args.compiled:
        compiled = torch.compile(model.forward, dynamic=True)
        steps["compiled"] = run(compiled, ask(), prompt_length=prompt)
        several(steps["compiled"])
    several_of = {name: partial(several, call) for name, call in steps.items()}
    in_turns(several_of, 1, device)
    found = in_turns(several_of, args.repeats, device)
    found = {name: {unit: round(ms / STEPS, 3) for unit, ms in times.items()} for name, times in found.items()}
    questions = in_turns({"full": ask, "bilevel": partial(ask, "bilevel")}, args.repeats, device)
    return {
        **{
            "model": which,
            "dtype": dtype,
            "tokens": prompt,
            "hidden": text.hidden_size,
            "layers": text.num_hidden_layers,
        },
        **{"step": found, "keys_in_bilevel": held, "second_question": questions, "prefill_seconds": round(filled, 3)},
        "outside_kernels": outside_kernels(several_of["ours"]),
    }


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    add_llm_flags(arguments)
    arguments.add_argument("--models", nargs="+", choices=("bundled", "flags"), default=["bundled", "flags"])
    arguments.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="of these precisions each")
    arguments.add_argument("--lengths", type=int, nargs="+", default=[2000, 20000], help="tokens of prompt and video")
    arguments.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    args = parse(arguments)
    results, rows = [], []
    for which, dtype, length in ((m, d, n) for m in args.models for d in args.dtypes for n in args.lengths):
        result = in_fresh_process(measure, which, dtype, length, args)
        if not isinstance(result, dict):
            raise SystemExit(f"{which}, {dtype}, {length} tokens: {result}")
        results.append(result)
        cpu = {name: times["cpu_ms"] for name, times in result["step"].items()}
        ratio, gain = cpu["ours"] / cpu["stock"], cpu["ours"] / cpu["compiled"] if args.compiled else None
        result |= {"of_stock": round(ratio, 3), "bilevel_of_stock": round(cpu["bilevel"] / cpu["stock_as_bilevel"], 3)}
        result["gain_compiled"] = None if gain is None else round(gain, 3)
        rows.append([which, dtype, f"{result['tokens']:,}", *(f"{cpu[name]:.2f}" for name in ("stock", "ours"))])
        rows[-1] += [f"{ratio:.2f} ({'<=' if ratio <= MOST_OF_STOCK else '>'} {MOST_OF_STOCK})"]
        rows[-1] += [f"{cpu['bilevel']:.2f}", f"{result['bilevel_of_stock']:.2f}"]
        rows[-1] += ["-" if gain is None else f"{gain:.2f} ({'>=' if gain >= LEAST_GAIN else '<'} {LEAST_GAIN})"]
        rows[-1] += [f"{result['second_question'][name]['cpu_ms']:.1f}" for name in ("full", "bilevel")]
        rows[-1] += [f"{result['outside_kernels']:.0%}"]
    header = ["model", "dtype", "tokens", "stock ms", "ours", "of stock (target)", "bi-level", "of stock"]
    table([*header, "compiled gains", "question ms", "bi-level", "outside kernels"], rows)
    report("step", args, results)


if __name__ == "__main__":
    main()
