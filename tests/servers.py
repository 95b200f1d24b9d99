"""Servers in processes of their own on 127.0.0.1, for tests, and what OpenAI's client sends them."""

import base64
import contextlib
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

# What is to be seen in the bundled clip.
DEMO = {
    "What color is the star?": "orange",
    "Which way does the ring move?": "right",
    "Is the triangle small or large?": "large",
    "What is on the card with the purple ring?": "egg",
    "When is the card with the purple ring shown?": "At 9 seconds",
}


@contextlib.contextmanager
def served(command, log, environment=None, seconds=300):
    """Runs a server that takes `--host` and `--port`, until the block ends; gives an OpenAI client of it."""
    openai = pytest.importorskip("openai")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "w") as output:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            env=environment, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + seconds
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start:\n{Path(log).read_text()[-4000:]}")
            time.sleep(0.2)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        process.terminate()
        process.wait(60)


def _answers(address) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def addresses(path, media_type) -> dict[str, str]:
    """The ways in which a client may name a file: kind -> address."""
    content = base64.b64encode(Path(path).read_bytes()).decode()
    return {"file": Path(path).as_uri(), "data": f"data:{media_type};base64,{content}"}


def user(*parts) -> list[dict]:
    """Messages of one user's turn; parts are texts, or pairs of `video` or `image` and an address."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": f"{part[0]}_url", f"{part[0]}_url": {"url": part[1]}}
        for part in parts
    ]
    return [{"role": "user", "content": content}]
