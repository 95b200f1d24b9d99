"""vLLM with this package's plug-in: a first and a second question about a video, and many clients at once.

What is surprising:
* It runs where vLLM is: `make test-serving` makes `.venv-serving`.
* The first numbers are of a model with random weights, asked for one token: decoding, vision, prefill. The clients ask
  the bundled checkpoint, through vLLM's server and OpenAI's client.
* The other system message changes the text in front of the video, so its key-values are of no use, but frames and
  visual tokens are still cached.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import torch
from common import ROOT, add_llm_flags, in_fresh_process, median, parse, parser, report, table
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

# Of the made-up videos; and patches along the side of the compressor's output, so 144 tokens a group.
FRAMES_A_SECOND, GRID = 2, 12
QUESTIONS = (
    *("What color is the star?", "Which way does the ring move?", "Is the triangle small or large?"),
    *("What is on the card with the purple ring?", "When is the card with the purple ring shown?"),
)
QUICK = {
    **{"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"},
    **{"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"},
}
EPILOG = """\
examples:
  .venv-serving/bin/python benchmarks/serve.py --out serve_cpu
      128 and 512 frames, 16 clients (minutes).

  .venv-serving/bin/python benchmarks/serve.py --frames 64 --repeats 1
      A quick look.
"""


def save_model(folder, args) -> None:
    """A checkpoint of the bundled vision path with the flags' language model and random weights."""
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    text = config.text_config.to_dict()
    text.pop("layer_types", None)
    text |= {"hidden_size": args.hidden, "num_hidden_layers": args.layers, "num_attention_heads": args.heads}
    text |= {"num_key_value_heads": args.kv_heads, "intermediate_size": args.mlp}
    config.text_config = type(config.text_config)(**text)
    config.compressor_config.grid_size, config.compressor_config.projector_pool_size = GRID, 1
    config.sparse_attention = {}
    torch.manual_seed(0)
    AutoModel.from_config(config, trust_remote_code=True).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(ROOT, trust_remote_code=True)
    processor = type(AutoProcessor.from_pretrained(ROOT, trust_remote_code=True))
    for part in (tokenizer, processor.from_config(config, tokenizer)):
        part.save_pretrained(folder)


def write_video(path, count) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_A_SECOND)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 5 * index, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def messages(path, question, system="You are a helpful assistant."):
    video = {"type": "video_url", "video_url": {"url": Path(path).as_uri()}}
    content = [video, {"type": "text", "text": question}]
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def in_vllm(folder, path, count, args) -> dict:
    """Seconds to the first token about a new video, of a further question, and behind another system message."""
    os.environ |= QUICK | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder), trust_remote_code=True, dtype=args.dtype, enforce_eager=True, allowed_local_media_path="/",
        max_model_len=32768, mm_processor_kwargs={"fps": FRAMES_A_SECOND, "max_num_frames": None},
    )  # fmt: skip
    one = SamplingParams(temperature=0, max_tokens=1)

    def seconds(*conversation):
        started = time.perf_counter()
        output = engine.chat(messages(path, *conversation), one, use_tqdm=False)[0]
        return time.perf_counter() - started, len(output.prompt_token_ids)

    first, *further = [seconds(question) for question in QUESTIONS]
    other = seconds(QUESTIONS[0], "Be brief.")
    second = median([wait for wait, _ in further])
    return {"first": first[0], "second": second, "other system message": other[0], "tokens": first[1]}


def in_package(folder, path, count, args) -> dict:
    """Seconds of `encode_video` and of `chat` about it, for the same video."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    one = {"return_history": False, "generation_config": {"max_new_tokens": 1}}
    ticks = [time.perf_counter()]
    video = model.encode_video(
        str(path), tokenizer, max_num_frames=count, sample_fps=FRAMES_A_SECOND, max_sample_fps=None
    )
    for question in QUESTIONS:
        model.chat(video, tokenizer, question, **one)
        ticks.append(time.perf_counter())
    first, *further = [later - earlier for earlier, later in zip(ticks, ticks[1:], strict=False)]
    return {"first": first, "second": median(further)}


def clients(args) -> dict:
    """Four questions of each client, at once, to vLLM's server of the bundled checkpoint; the video is new to it."""
    from openai import OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", ROOT, "--trust-remote-code"]
    command += ["--dtype", args.dtype, "--enforce-eager", "--max-model-len", "2048", "--host", "127.0.0.1"]
    command += ["--port", port, "--allowed-local-media-path", ROOT, "--served-model-name", "bundled"]
    started = time.perf_counter()
    server = subprocess.Popen(list(map(str, command)), env={**os.environ, **QUICK}, stdout=subprocess.DEVNULL)
    try:
        while not _is_up(port):
            if server.poll() is not None:
                raise SystemExit("the server ended; its message is above")
            time.sleep(0.2)
        loaded = time.perf_counter() - started
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

        def ask(question):
            asked = time.perf_counter()
            conversation = messages(ROOT / "assets" / "demo.mp4", question)
            client.chat.completions.create(model="bundled", messages=conversation)
            return time.perf_counter() - asked

        started = time.perf_counter()
        with ThreadPoolExecutor(args.clients) as pool:
            waits = list(pool.map(ask, [QUESTIONS[number % len(QUESTIONS)] for number in range(4 * args.clients)]))
        seconds = time.perf_counter() - started
    finally:
        server.terminate()
        server.wait()
    return {"start": loaded, "questions": len(waits), "seconds": seconds, "median wait": median(waits)}


def _is_up(port) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    add_llm_flags(arguments)
    arguments.add_argument("--frames", type=int, nargs="+", default=[128, 512], help="frames of the videos")
    arguments.add_argument("--clients", type=int, default=16, help="clients that ask at once")
    args = parse(arguments)
    results, rows = {}, []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "serving-model"
        in_fresh_process(save_model, folder, args)
        for count in args.frames:
            path = Path(place) / f"{count}.mp4"
            write_video(path, count)
            for name, measure in (("vLLM", in_vllm), ("package", in_package)):
                runs = [in_fresh_process(measure, folder, path, count, args) for _ in range(args.repeats)]
                found = {key: median([run[key] for run in runs]) for key in runs[0]}
                results[f"{name}, {count} frames"] = found
                row = [found.get(key, "") for key in ("tokens", "first", "second", "other system message")]
                rows.append([f"{count}", name, *row])
    table(["frames", "", "tokens", "first, s", "second, s", "other system message, s"], rows)
    results["clients"] = found = clients(args)
    table(["clients", "questions", "seconds", "median wait, s"],
          [[f"{args.clients}", *(found[key] for key in ("questions", "seconds", "median wait"))]])  # fmt: skip
    report("serve", args, results)


if __name__ == "__main__":
    main()
