"""Many questions about many videos: `videoxl batch`, Ray, and vLLM in Ray's actors, on the same generated clips.

Each program runs in fresh processes, from its start to its file of answers, so imports and loading count. Answers of
the bundled checkpoint are compared word by word.

What is surprising:
* Each program runs in the environment of this script, so it needs one with Ray, and with vLLM for `--engines vllm`.
* On a CPU vLLM computes graphs ahead for minutes unless it is told not to.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from videoxl.shell.records import answers_in, json_line
from videoxl.video_world import make_clip

EPILOG = """examples:
  python benchmarks/batch.py --videos 20 --questions 5 --engines batch ray --out batch_cpu"""

RAY = ("-m", "videoxl.serving.ray_batch", "--model", ".")
PROGRAMS = {
    "batch": ("cli.py", "batch"),
    "ray": (*RAY, "--actors", "2"),
    "vllm": (*RAY, "--engine", "vllm", "--engine-args", '{"enforce_eager": true, "max_model_len": 8192}'),
}
# vLLM's on a CPU: the engine in the actor's own process, and GiB of key-values.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def make_videos(folder: Path, videos: int, questions: int, seconds: int) -> None:
    """Writes clips, and questions about them."""
    lines = []
    for seed in range(videos):
        clip = make_clip(seed, "held_out", seconds=seconds, num_questions=questions)
        clip.write_video(folder / f"{seed}.mp4")
        lines += [{"video": f"{seed}.mp4", "question": question.text} for question in clip.questions]
    (folder / "questions.jsonl").write_text("".join(map(json_line, lines)), encoding="utf-8")


def run(program: str, folder: Path, out: Path, threads: int) -> float:
    """Runs a program to its end; returns seconds."""
    command = [sys.executable, *PROGRAMS[program], folder / "questions.jsonl", "--out", out]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), cwd=common.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{program} ended with {done.returncode}: {done.stderr[-3000:]}")
    return time.perf_counter() - started


def main() -> None:
    arguments = common.parser(__doc__, EPILOG)
    arguments.add_argument("--videos", type=int, default=20, help="how many clips")
    arguments.add_argument("--questions", type=int, default=5, help="at most, about each clip")
    arguments.add_argument("--seconds", type=int, default=32, help="length of a clip")
    arguments.add_argument("--engines", nargs="+", choices=PROGRAMS, default=list(PROGRAMS), help="what runs")
    arguments.set_defaults(threads=1)
    args = common.parse(arguments)
    results, answers = {}, {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make_videos(folder, args.videos, args.questions, args.seconds)
        taken = {program: [] for program in args.engines}
        for number in range(args.repeats):  # in turn, as the load of the machine changes
            for program in args.engines:
                out = folder / f"{program}-{number}.jsonl"
                taken[program].append(round(run(program, folder, out, args.threads), 2))
                answers[program] = [entry["answer"] for entry in answers_in(out)]
    for program, seconds in taken.items():
        same = sum(a == b for a, b in zip(answers[program], answers[args.engines[0]], strict=True))
        results[program] = {"seconds": seconds, "answers": len(answers[program]), "as_first": same}
    rows = [
        [name, *map(str, found["seconds"]), f"{found['as_first']}/{found['answers']}"]
        for name, found in results.items()
    ]
    common.table(["", *(f"run {number + 1}, s" for number in range(args.repeats)), "answers as the first's"], rows)
    common.report("batch", args, results)


if __name__ == "__main__":
    main()
