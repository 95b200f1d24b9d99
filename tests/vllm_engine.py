"""Runs vLLM in a process of its own, for tests: `ask` from a test, this file as the program.

A process holds one engine at most, and one that failed to start leaves things behind.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

# The engine in the process itself starts in 4 s instead of 20.
QUICK = {
    **{"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"},
    **{"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
}


def ask(model, requests, environment=None, **settings) -> list[dict]:
    """Starts vLLM and asks it one request after another.

    Args:
        model: A checkpoint's folder.
        requests: Dicts of `messages` (or `prompt` and `multi_modal_data`), and `sampling`, the request's
            `mm_processor_kwargs`, and `lora`, an adapter's folder.
        environment: Further variables for the process.
        **settings: Arguments of `vllm.LLM`.

    Returns:
        For each request the `ids` of its prompt, the `tokens` of the answer with their `logprobs`, how many tokens
        of the prompt were `cached`, and the `text`; or its `error`.

    Raises:
        RuntimeError: With what vLLM said, if it did not start.
    """
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "allowed_local_media_path": "/"}
    settings = {"model": str(model), "trust_remote_code": True, "seed": 0, **defaults, **settings}
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("job", "results")]
        files[0].write_bytes(pickle.dumps({"settings": settings, "requests": requests}))
        done = subprocess.run(
            [sys.executable, __file__, *files],
            env={**os.environ, **QUICK, **(environment or {})}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        if not files[1].is_file():
            raise RuntimeError(done.stderr[-20_000:])
        return pickle.loads(files[1].read_bytes())


def answer(engine, request, params) -> dict:
    from vllm.lora.request import LoRARequest

    sampling = request.get("sampling") or None
    call = {"use_tqdm": False}
    if "lora" in request:
        call["lora_request"] = LoRARequest("adapter", 1, request["lora"])
    try:
        if "messages" in request:
            output = engine.chat(request["messages"], params, mm_processor_kwargs=sampling, **call)[0]
        else:
            prompt = {key: request[key] for key in ("prompt", "multi_modal_data") if key in request}
            prompt |= {"mm_processor_kwargs": sampling} if sampling else {}
            output = engine.generate(prompt, params, **call)[0]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    best = output.outputs[0]
    logprobs = [step[token].logprob for step, token in zip(best.logprobs or [], best.token_ids, strict=False)]
    return {
        "ids": list(output.prompt_token_ids), "tokens": list(best.token_ids), "logprobs": logprobs,
        "cached": output.num_cached_tokens, "text": best.text,
    }  # fmt: skip


def main(job, results):
    from vllm import LLM, SamplingParams

    given = pickle.loads(Path(job).read_bytes())
    engine = LLM(**given["settings"])
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    found = [answer(engine, request, request.get("params", params)) for request in given["requests"]]
    Path(results).write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
