"""Questions about a video that is already encoded: time to the first token, and per further token.

What is surprising:
* The first question's time is prefill of the video's tokens plus question plus first token. The vision tower is left
  out, so the share that a second question takes is an upper bound of what users see.
* Everything after the prefill goes through `generate`, over a fork of the encoded video, as `chat` does; so
  the times include `generate`'s own.
* With `bilevel` each question chooses its chunks and runs over dense and pooled key-values. Its first question also
  pools the video once, which later questions find done.
"""

import torch
from common import (
    MIB,
    PeakMemory,
    add_llm_flags,
    build_model,
    clock,
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

DECODE_MODES = ("full", "bilevel")
# Time to first token of a second question, as a share of the first one's: the target.
TARGET_SHARE = 0.03

EPILOG = """\
examples:
  python benchmarks/decode.py
      20,000 tokens, a small model in float32 on two CPU threads.

  python benchmarks/decode.py --lengths 5000 20000 --decode full --new-tokens 64
      Two lengths, decoding over all key-values only.

  python benchmarks/decode.py --preset video-xl-2-8b --lengths 78000 382000 --out decode_8b
      True size with random weights on a GPU; the result also goes to benchmarks/results/decode_8b.json.
"""


def measure(decode: str, length: int, args) -> dict:
    """Times questions about a video of one length, in this process."""
    config = load_config(args)
    model = build_model(config, args)
    set_sparse_attention(model, args, prefill=args.prefill, decode=decode)
    layout = video_layout(length, args)
    # The video ends where its last group does; what is left of the length is the first question.
    videos, end = layout.videos, layout.end
    layout = type(layout)(videos, end)
    width = config.text_config.hidden_size
    embeds = torch.randn(1, end, width, dtype=getattr(torch, args.dtype), device=args.device)
    video_ids = torch.full((end,), config.time_start_token_id, device=args.device)
    for group in layout.groups:
        video_ids[group.visual_start : group.end] = config.video_token_id
    generator = torch.Generator().manual_seed(0)

    def encode():
        cache = model.model.new_cache()
        model.model.extend_cache(embeds, layout, cache, keep_hidden=1)
        return cache

    def ask(cache, new_tokens):
        """Seconds to `new_tokens` tokens of the answer to another random question, and the cache's keys after it."""
        question = torch.randint(
            min(1000, config.text_config.vocab_size), (args.question_tokens,), generator=generator
        )
        ids = torch.cat([video_ids, question.to(args.device)])[None]
        started = clock(args.device)
        cache = cache.fork()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
        return clock(args.device) - started, cache.layers[0].keys.shape[-2]

    ask(encode(), 2)  # warm-up
    encode_seconds, first, second, token = [], [], [], []
    for _ in range(args.repeats):
        started = clock(args.device)
        cache = encode()
        encode_seconds.append(clock(args.device) - started)
        first.append(encode_seconds[-1] + ask(cache, 1)[0])
        memory = PeakMemory(args.device)
        seconds, held = ask(cache, 1)
        second.append(seconds)
        second_bytes = memory.growth()
        token.append((ask(cache, 1 + args.new_tokens)[0] - ask(cache, 1)[0]) / args.new_tokens)
    return {
        "decode": decode,
        "tokens": end + args.question_tokens,
        "prefill_seconds": median(encode_seconds),
        "first_question_seconds": median(first),
        "second_question_seconds": median(second),
        "second_share": round(median(second) / median(first), 6),
        "second_runs": [round(seconds, 6) for seconds in second],
        "second_peak_bytes": second_bytes,
        "seconds_per_token": median(token),
        "keys_held": held,
    }


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    add_llm_flags(arguments)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[20000], help="tokens of prompt and video")
    arguments.add_argument("--decode", nargs="+", choices=DECODE_MODES, default=list(DECODE_MODES), help="modes")
    arguments.add_argument(
        "--prefill", choices=("full", "streaming", "mask"), default="streaming", help="of the video"
    )
    arguments.add_argument("--question-tokens", type=int, default=32, help="tokens of each question")
    arguments.add_argument("--new-tokens", type=int, default=32, help="tokens over which decoding is timed")
    args = parse(arguments)
    results, rows = [], []
    for length in args.lengths:
        for decode in args.decode:
            result = in_fresh_process(measure, decode, length, args)
            if not isinstance(result, dict):
                results.append({"decode": decode, "tokens": length, "failed": result})
                rows.append([f"{length:,}", decode, result, *["-"] * 6])
                continue
            results.append(result)
            share = result["second_share"]
            rows.append(
                [
                    f"{result['tokens']:,}",
                    decode,
                    f"{result['prefill_seconds']:.3f}",
                    f"{result['first_question_seconds']:.3f}",
                    f"{result['second_question_seconds'] * 1e3:.1f}",
                    f"{share:.2%} ({'<=' if share <= TARGET_SHARE else '>'} {TARGET_SHARE:.0%})",
                    f"{result['second_peak_bytes'] / MIB:,.0f}",
                    f"{result['seconds_per_token'] * 1e3:.2f}",
                    f"{result['keys_held']:,}",
                ]
            )
    header = ["tokens", "decode", "prefill s", "first question s", "second question ms", "share (target)"]
    table([*header, "its memory MiB", "ms per token", "keys held"], rows)
    report("decode", args, results)


if __name__ == "__main__":
    main()
