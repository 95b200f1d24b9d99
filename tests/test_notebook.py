"""`notebooks/quickstart.ipynb`: as committed, executed anew, and from the Hub in a folder without the repository."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def path(root):
    return root / "notebooks" / "quickstart.ipynb"


def read(path):
    """(cells of code, text of their printed outputs, number of pictures among these)."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    printed = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    return cells, printed, sum("image/png" in output.get("data", {}) for output in outputs)


def assert_complete(path):
    cells, printed, pictures = read(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]}
    assert kinds <= {("stream", "stdout"), ("display_data", None)}, "an error or a warning is among the outputs"
    assert pictures == 2, "the frames and the chunks must be shown"
    assert printed.count("\nA  ") == printed.count("Q  ") == 4
    encoding = float(re.search(r"key-values in ([\d.]+) s", printed)[1])
    second = float(re.findall(r"\[(\d+) ms\]", printed)[1])
    assert 0 < second < 1000 * encoding, "the second question must not encode again"
    scores = [float(score) for score in re.findall(r"^ *[\d.]+ - +[\d.]+ +([\d.]+)$", printed, re.MULTILINE)]
    assert len(scores) >= 5, "the dense chunks must be listed"


def test_committed_outputs_are_complete(path, root):
    assert_complete(path)
    text = path.read_text(encoding="utf-8")
    assert str(root) not in text and not re.search(r"/(?:home|root|tmp|work)/", text), "a path of somebody's machine"
    assert path.stat().st_size < 400_000


def test_it_runs(path, root, tmp_path):
    for package in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed: the notebook is not executed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the notebook draws with it")
    fresh = tmp_path / "fresh.ipynb"
    command = [sys.executable, str(root / "notebooks" / "execute.py"), str(path), "--out", str(fresh)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_complete(fresh)
    source = [[cell["source"] for cell in read(each)[0]] for each in (path, fresh)]
    assert source[0] == source[1]


def test_what_was_measured_makes_no_difference(path, root, tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason="nbclient is not installed: the notebook is not executed")
    import nbformat

    monkeypatch.syspath_prepend(str(root / "notebooks"))
    import execute

    copied = tmp_path / "copied.ipynb"
    text = path.read_text(encoding="utf-8")

    def slower(saved):
        return re.sub(r"\[\d+ ms\]", "[12345 ms]", saved)

    def other(saved):
        return saved.replace("24.0 s of video, 96 frames", "24.0 s of video, 95 frames")

    assert slower(text) != text != other(text)
    for changed, stays in ((slower(text), True), (other(text), False)):

        class Client:
            """Gives these outputs."""

            outputs = nbformat.reads(changed, as_version=4).cells

            def __init__(self, notebook, **_):
                self.notebook = notebook

            def execute(self):
                self.notebook.cells = self.outputs

        monkeypatch.setattr(execute, "NotebookClient", Client)
        copied.write_text(text, encoding="utf-8")
        execute.execute(copied, copied)
        assert (copied.read_text(encoding="utf-8") == text) == stays


def test_it_loads_from_the_hub_and_says_what_is_missing(path, root, tmp_path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--someone--video-xl" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(revision)
    for file in root.iterdir():
        if file.is_file() and file.suffix in {".py", ".json", ".jinja", ".safetensors"}:
            shutil.copy(file, snapshot)
    code = ["".join(cell["source"]) for cell in read(path)[0][:3]]  # settings, loading, encoding
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    settings = {'MODEL = ""': 'MODEL = "someone/video-xl"', 'VIDEO = ""': f'VIDEO = "{root}/assets/demo.mp4"'}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def run(script):
        options = {"cwd": elsewhere, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        return subprocess.run([sys.executable, "-c", script], **options)

    done = run(code[0])
    assert "set MODEL to a Hub id and VIDEO to a video file" in done.stderr
    for old, new in settings.items():
        assert code[0].count(old) == 1
        code[0] = code[0].replace(old, new)
    done = run("\n".join(code))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "24.0 s of video, 96 frames" in done.stdout
