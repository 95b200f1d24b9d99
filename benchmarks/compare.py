"""Two checkouts against each other: prefill of a long video, a second question, a decode step.

What is surprising:
* Each checkout runs in a process of its own that stays, and they take turns, in changing order: a machine that becomes
  busy or slow is unfair to none. The ratio is the median of the rounds' ratios, each of two runs side by side.
* Ratios of CPU seconds are given too, of all rounds and of each side's fastest one: on a machine with other work they
  say more than those of wall time.
* Only public names are used (Auto classes, `encode_video`, `chat`), so the checkouts may differ in all their files.
  The model is the bundled architecture with a larger language model; its random weights hang on their names alone.
* One call of `chat` gives the time to the first token of a further question, and the steps behind it, from a streamer.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from common import HelpFormatter, clock, git_revision, report, table
from transformers import AutoConfig, AutoModel, AutoTokenizer

# Beyond this ratio of new to old a measurement is called slower.
SLOWER = 1.03
# Frames of a second of the made-up video; tokens of a group: 144 visual ones and about four of its timestamp.
FRAMES_A_SECOND, GRID, GROUP_TOKENS = 2, 12, 148
DECODE_MODES = ("full", "bilevel")
QUESTIONS = ("What color is the star?", "Which way does the ring move?", "Is the triangle small or large?")

EPILOG = """\
examples:
  git worktree add ../before HEAD~1 && python benchmarks/compare.py ../before .
      The commit before against the working tree: 20,000 tokens, float32, one CPU thread (minutes).

  python benchmarks/compare.py . . --rounds 5
      A checkout against itself: how much of a difference is noise.

  python benchmarks/compare.py ../before . --device cuda --dtype bfloat16 --hidden 3584 --layers 28
      On a GPU, near true size.
"""


class Stopwatch:
    """A streamer that notes when each token comes: (wall, CPU) seconds."""

    def __init__(self, device):
        self.device, self.ticks = device, []
        self.put(None)

    def put(self, value):
        self.ticks.append((clock(self.device), time.process_time()))

    def end(self):
        pass


class Worker:
    """One checkout, measured in this process."""

    def __init__(self, args):
        folder, self.args = args.worker, args
        torch.set_num_threads(args.threads)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        text = config.text_config.to_dict()
        text.pop("layer_types", None)
        text |= {"hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": args.heads}
        text |= {"num_key_value_heads": args.kv_heads, "intermediate_size": args.mlp}
        config.text_config = type(config.text_config)(**text)
        config.compressor_config.grid_size, config.compressor_config.projector_pool_size = GRID, 1
        config.sparse_attention = {}
        model = AutoModel.from_config(config, trust_remote_code=True, dtype=getattr(torch, args.dtype))
        self.model = model.to(args.device).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                    weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        count = args.tokens // GROUP_TOKENS * 4
        size = config.vision_config.image_size
        self.frames = np.random.default_rng(0).integers(0, 255, (count, size, size, 3), dtype=np.uint8)
        self.times = [number / FRAMES_A_SECOND for number in range(count)]
        self.video = self.encode("streaming")
        self.asked = 0

    def encode(self, mode):
        self.model.config.sparse_attention = {"prefill": mode}
        return self.model.encode_video(self.frames, self.tokenizer, timestamps=self.times)

    def prefill(self, mode) -> dict:
        started, cpu = clock(self.args.device), time.process_time()
        video = self.encode(mode)
        seconds = clock(self.args.device) - started, time.process_time() - cpu
        return {f"prefill {mode}": seconds, "tokens": len(video.input_ids)}

    def ask(self, mode) -> dict:
        self.model.config.sparse_attention = {"prefill": "streaming", "decode": mode}
        question = QUESTIONS[self.asked % len(QUESTIONS)]
        self.asked += 1
        tokens = self.args.new_tokens
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        watch = Stopwatch(self.args.device)
        self.model.chat(
            self.video, self.tokenizer, question, return_history=False, generation_config=settings, streamer=watch
        )
        start, *ticks = watch.ticks
        ticks = ticks[-tokens:]  # in front of them stands the prompt
        steps = torch.tensor(ticks, dtype=torch.float64).diff(dim=0).median(dim=0).values
        return {
            f"question {mode}": [now - earlier for now, earlier in zip(ticks[0], start, strict=True)],
            f"step {mode}": steps.tolist(),
        }

    def serve(self) -> None:
        """Answers each line of standard input, such as `["ask", "full"]`, with a line of JSON."""
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            action, mode = json.loads(line)
            print(json.dumps(getattr(self, action)(mode)), flush=True)


class Checkout:
    """A `Worker` in a process of its own."""

    def __init__(self, folder, modules, args):
        names = ("device", "dtype", "threads", "tokens", "new_tokens", "hidden", "layers", "heads", "kv_heads", "mlp")
        flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
        # Each has copies of its own of the remote code: folders of one name would share them.
        environment = os.environ | {"HF_MODULES_CACHE": modules, "OMP_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", folder, *flags],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment},
        )
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a measuring process ended with status {self.process.wait()}; its message is above")
        return json.loads(line)

    def measure(self, action, mode) -> dict:
        self.process.stdin.write(json.dumps([action, mode]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def run(checkouts, action, mode, rounds, warm_up) -> dict[str, list]:
    """Measures both in turns, `rounds` times after `warm_up` rounds: name -> [old, new] of each round."""
    collected = {}
    for number in range(warm_up + rounds):
        order = (0, 1) if number % 2 else (1, 0)
        results = {which: checkouts[which].measure(action, mode) for which in order}
        if number >= warm_up:
            for name in results[0]:
                collected.setdefault(name, []).append([results[0][name], results[1][name]])
    return collected


def summary(name, pairs) -> dict:
    """Medians of wall seconds, and of the rounds' ratios new / old of wall and CPU seconds."""
    walls = [[old[0], new[0]] for old, new in pairs]
    ratios = sorted(new / old for old, new in walls)
    quarter = len(ratios) // 4
    return {
        "measure": name,
        "old_seconds": round(statistics.median(old for old, _ in walls), 6),
        "new_seconds": round(statistics.median(new for _, new in walls), 6),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_quartiles": [round(ratios[quarter], 4), round(ratios[-1 - quarter], 4)],
        "cpu_ratio": round(statistics.median(new[1] / old[1] for old, new in pairs), 4),
        "fastest_cpu_ratio": round(min(new[1] for _, new in pairs) / min(old[1] for old, _ in pairs), 4),
        "rounds": len(pairs),
    }


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=HelpFormatter)
    arguments.add_argument("old", nargs="?", help="a checkout of the project")
    arguments.add_argument("new", nargs="?", help="another")
    arguments.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    arguments.add_argument("--rounds", type=int, default=20, help="rounds of questions")
    arguments.add_argument("--prefills", type=int, default=5, help="rounds of each prefill")
    arguments.add_argument("--prefill", nargs="*", default=["streaming", "full"], help="prefill modes to measure")
    arguments.add_argument("--tokens", type=int, default=20000, help="of the video")
    arguments.add_argument("--new-tokens", type=int, default=17, help="of each answer; the steps behind the first")
    arguments.add_argument("--hidden", type=int, default=256, help="width of the language model")
    arguments.add_argument("--layers", type=int, default=4, help="its layers")
    arguments.add_argument("--heads", type=int, default=4, help="its query heads")
    arguments.add_argument("--kv-heads", type=int, default=2, help="its key-value heads")
    arguments.add_argument("--mlp", type=int, default=704, help="width of its MLP")
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    arguments.add_argument("--out", metavar="NAME", help="also write the JSON to benchmarks/results/NAME.json")
    args = arguments.parse_args()
    if args.worker is None and args.new is None:
        arguments.error("give two checkouts: OLD NEW")
    return args


def main() -> None:
    args = parse()
    if args.worker is not None:
        return Worker(args).serve()
    folders = [str(Path(folder).resolve()) for folder in (args.old, args.new)]
    with tempfile.TemporaryDirectory() as modules:
        checkouts = [Checkout(folder, f"{modules}/{side}", args) for side, folder in enumerate(folders)]
        collected = {}
        for mode in DECODE_MODES:
            collected |= run(checkouts, "ask", mode, args.rounds, 1)
        for mode in args.prefill:
            collected |= run(checkouts, "prefill", mode, args.prefills, 0)
            tokens = collected.pop("tokens")[-1]
        for checkout in checkouts:
            checkout.close()
    results = [summary(name, pairs) for name, pairs in collected.items()]
    rows = [
        [
            result["measure"],
            *(f"{result[f'{side}_seconds'] * 1e3:,.2f}" for side in ("old", "new")),
            f"{result['ratio']:.3f}" + (" slower" if result["ratio"] > SLOWER else ""),
            "{:.3f}-{:.3f}".format(*result["ratio_quartiles"]),
            f"{result['cpu_ratio']:.3f}",
            f"{result['fastest_cpu_ratio']:.3f}",
        ]
        for result in results
    ]
    print(f"{tokens[0]:,} tokens")
    table(["measure", "old ms", "new ms", "new / old", "its quartiles", "of CPU s", "of fastest CPU s"], rows)
    for side, folder in (("old", folders[0]), ("new", folders[1])):
        setattr(args, side, git_revision(folder))
    del args.worker
    report("compare", args, results)


if __name__ == "__main__":
    main()
