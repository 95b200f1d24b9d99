"""`handler.py` as Inference Endpoints use it: imported from the root of a repository, where nothing else of us is."""

import base64
import importlib.util
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
from videoxl.hub.upload import assemble

CLIP = Path(__file__).resolve().parent.parent / "assets" / "demo.mp4"
QUESTION = {"question": "What color is the star?", "parameters": {"max_num_frames": 32, "max_new_tokens": 8}}
# What the service does, without this package: a fresh process in another folder, whose path has the root's only.
SERVICE = """
import base64, json, sys
folder, clip = sys.argv[1:]
sys.path.insert(0, folder)
from handler import EndpointHandler
handler = EndpointHandler(path=folder)
content, rest = open(clip, "rb").read(), json.load(sys.stdin)
text = base64.b64encode(content).decode()
requests = [text, "data:video/mp4;base64," + text, content, "eHh4" * 99]
print(json.dumps([handler({"inputs": inputs, **rest}) for inputs in requests]))
assert not any(name.split(".")[0] == "videoxl" for name in sys.modules)
"""


def test_the_service_answers_from_an_assembled_repository(root, tmp_path):
    assembly = assemble(root, tmp_path / "repository")
    command = [sys.executable, "-c", SERVICE, str(assembly.folder), str(CLIP)]
    done = subprocess.run(command, cwd=tmp_path, input=json.dumps(QUESTION), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    *answers, no_video = json.loads(done.stdout.splitlines()[-1])
    assert answers == [{"answer": "orange"}] * 3
    assert list(no_video) == ["error"] and "/" not in no_video["error"]
    assert "Traceback" in done.stderr, "what the client is not told is in the log"


@pytest.fixture
def handler(bundle, root):
    """A handler with the bundled checkpoint."""
    spec = importlib.util.spec_from_file_location("handler", root / "handler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.EndpointHandler.__new__(module.EndpointHandler)
    made.model, made.tokenizer, made.lock = *bundle[:2], module.threading.Lock()
    made.module = module
    return made


CONTENT = base64.b64encode(b"some bytes").decode()
REFUSED = {
    "a list": ([], "a JSON object"),
    "nothing": ({}, '"question"'),
    "no inputs": ({"question": "?"}, '"inputs" must be'),
    "empty inputs": ({"question": "?", "inputs": ""}, '"inputs" must be'),
    "no question": ({"inputs": CONTENT}, '"question"'),
    "an empty question": ({"inputs": CONTENT, "question": "  "}, '"question"'),
    "a long question": ({"inputs": CONTENT, "question": "a" * 9000}, '"question"'),
    "a number": ({"inputs": 3, "question": "?"}, '"inputs" must be'),
    "an unknown field": ({"inputs": CONTENT, "question": "?", "video": "x"}, "unknown: video"),
    "a path": ({"inputs": str(CLIP), "question": "?"}, "paths and addresses are not opened"),
    "a path from here": ({"inputs": "./demo.mp4", "question": "?"}, "paths and addresses are not opened"),
    "a name": ({"inputs": "demo.mp4", "question": "?"}, "no valid base64"),
    "a file address": ({"inputs": CLIP.as_uri(), "question": "?"}, "paths and addresses are not opened"),
    "an address": ({"inputs": "http://127.0.0.1/a.mp4", "question": "?"}, "paths and addresses are not opened"),
    "data without base64": ({"inputs": "data:text/plain,hello", "question": "?"}, "paths and addresses"),
    "parameters as a list": ({"inputs": CONTENT, "question": "?", "parameters": []}, '"parameters" must be'),
    "an unknown parameter": (
        {"inputs": CONTENT, "question": "?", "parameters": {"video_backend": 1}},
        "video_backend",
    ),
    "a text for a number": ({"inputs": CONTENT, "question": "?", "parameters": {"max_num_frames": "8"}}, "1 to 512"),
    "truth for a number": ({"inputs": CONTENT, "question": "?", "parameters": {"max_new_tokens": True}}, "1 to 1024"),
    "too many": ({"inputs": CONTENT, "question": "?", "parameters": {"max_num_frames": 10**6}}, "1 to 512"),
    "not a number": ({"inputs": CONTENT, "question": "?", "parameters": {"sample_fps": float("nan")}}, "0.01 to 60"),
    "no video": ({"inputs": CONTENT, "question": "?"}, ""),
    "half a letter": ({"inputs": CONTENT, "question": "\ud800"}, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_change_and_nothing_of_the_machine(handler, name, root):
    request, said = REFUSED[name]
    reply = handler(request)
    assert list(reply) == ["error"] and said in reply["error"] and reply["error"]
    assert not any(part in reply["error"] for part in (str(root), "/work", "/tmp", "/proc", "Traceback", "some bytes"))


def test_what_is_too_large_is_refused_before_it_is_decoded(handler, monkeypatch):
    monkeypatch.setattr(handler.module, "MAX_BYTES", 2**20)
    monkeypatch.setattr(handler.module.base64, "b64decode", lambda *_, **__: pytest.fail("it was decoded"))
    assert "may have 1 MiB, got 2" in handler({"inputs": "A" * (2 * 2**20), "question": "?"})["error"]
    assert "may have 1 MiB, got 3" in handler({"inputs": bytes(3 * 2**20), "question": "?"})["error"]


def test_what_fails_here_is_in_the_log_alone(handler, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("/secret/place is full")

    monkeypatch.setattr(handler, "model", types.SimpleNamespace(chat=fail))
    reply = handler({"inputs": CONTENT, "question": "?"})
    assert list(reply) == ["error"] and "/secret" not in reply["error"]
    assert "/secret/place is full" in caplog.text


def test_settings_and_images_reach_the_model(handler, bundle):
    asked = []
    model = bundle[0]
    handler.model = types.SimpleNamespace(
        chat=lambda *args, **kwargs: asked.append((args, kwargs)) or model.chat(*args, **kwargs)
    )
    parameters = {
        "max_num_frames": 8,
        "sample_fps": None,
        "max_sample_fps": None,
        "max_new_tokens": 2,
        "do_sample": False,
    }
    request = {"inputs": CLIP.read_bytes(), "question": "What happens?", "parameters": parameters}
    assert isinstance(handler(request)["answer"], str)
    _, said = asked[0]
    assert (said["max_num_frames"], said["sample_fps"], said["max_sample_fps"]) == (8, None, None)
    assert said["generation_config"] == {"max_new_tokens": 2, "do_sample": False}
