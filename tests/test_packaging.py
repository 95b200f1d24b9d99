"""The package: what a wheel holds, what `import videoxl` gives, which folder imports what, an installed command."""

import ast
import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import videoxl
from conftest import ROOT
from videoxl.hub.convert import remote_code_files

# Folders that are installed beside the files of the root.
FOLDERS = ("demo", "evaluation", "hub", "serving", "shell", "training", "video_world")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of this folder, without network."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("package")
    left_out = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info", "results", "logs")
    shutil.copytree(ROOT, folder / "source", ignore=left_out)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder)], cwd=folder / "source", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def packed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_holds_the_model_and_the_workshop(packed):
    wanted = {f"videoxl/{name}" for name in remote_code_files()}
    wanted |= {
        f"videoxl/{file.relative_to(ROOT).as_posix()}" for name in FOLDERS for file in (ROOT / name).glob("*.py")
    }
    # What programs take by default: the bundled checkpoint, presets and the template of the converter, recipes.
    wanted |= {f"videoxl/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json", "LICENSE")}
    wanted |= {f"videoxl/presets/{file.name}" for file in (ROOT / "presets").glob("*.json")}
    wanted |= {"videoxl/handler.py", "videoxl/chat_template.jinja", "videoxl/training/recipes/lora.yaml"}
    assert wanted <= packed.keys()
    folders = {name.split("/")[1] for name in packed if name.count("/") > 1 and name.startswith("videoxl/")}
    assert folders == {*FOLDERS, "assets", "presets"}


def test_a_wheel_brings_the_command_and_the_extras(packed):
    texts = {Path(name).name: content.decode() for name, content in packed.items() if ".dist-info/" in name}
    assert "videoxl = videoxl.cli:main" in texts["entry_points.txt"]
    for package, extra in (("gradio", "demo"), ("matplotlib", "evaluation"), ("bitsandbytes", "quantisation"),
                           ("ray[data]", "ray"), ("vllm", "serving"), ("peft", "training"),
                           ("pyyaml", "training")):  # fmt: skip
        assert any(
            line.startswith(f"Requires-Dist: {package}") and f'extra == "{extra}"' in line
            for line in texts["METADATA"].splitlines()
        )


def test_public_names_are_there():
    for name in videoxl.__all__:
        assert callable(getattr(videoxl, name)) and name in dir(videoxl)
    with pytest.raises(AttributeError, match="VideoXLConfig"):
        videoxl.VideoXLModell  # noqa: B018


REGISTERED = """
import sys, videoxl
assert not {"torch", "transformers"} & set(sys.modules), "importing videoxl is to take no time"
videoxl.register()
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
source, output = sys.argv[1:]
model, tokenizer = AutoModel.from_pretrained(source), AutoTokenizer.from_pretrained(source)
assert type(model) is videoxl.VideoXLForConditionalGeneration
assert type(AutoProcessor.from_pretrained(source)) is videoxl.VideoXLProcessor
model.save_pretrained(output)
"""


def test_after_register_auto_classes_take_the_installed_code(root, tmp_path):
    command = [sys.executable, "-c", REGISTERED, str(root), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # Others, who have not installed it, can load what was saved.
    named = json.loads((tmp_path / "config.json").read_text())["auto_map"].values()
    assert all((tmp_path / f"{target.split('.')[0]}.py").is_file() for target in named if "processing" not in target)


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_reach_the_model_by_public_names_and_leave_each_other_alone(folder):
    """Except for the one reader of questions and answers, and the world that clips are made of."""
    shared = ("videoxl.shell.records", "videoxl.video_world")
    for file in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                imported = [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                imported = [(alias.name, None) for alias in node.names]
            else:
                continue
            for module, name in imported:
                if not f"{module}.".startswith("videoxl."):
                    continue
                allowed = module.startswith((f"videoxl.{folder}", *shared))
                allowed = allowed or (module == "videoxl" and name in {None, "video_world", *videoxl.__all__})
                assert allowed, f"{file.name} imports {module}.{name}"


@pytest.mark.slow
def test_an_installed_wheel_asks_and_converts(wheel, root, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    (packages / "here.pth").write_text("\n".join(site.getsitepackages()))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*command):
        done = subprocess.run(
            list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run(python, "-m", "pip", "install", "--no-deps", "--no-index", "-q", wheel)
    where = run(python, "-c", "import videoxl; print(videoxl.VideoXLProcessor.__module__, videoxl.__file__)").split()
    assert where[0] == "videoxl.processing_videoxl" and Path(where[1]).is_relative_to(packages)
    command = [python.parent / "videoxl", "ask", root / "assets" / "demo.mp4", "What color is the star?", "--json"]
    answers = [json.loads(run(*command, *model))["answers"][0] for model in ([], ["--model", root])]
    assert answers[0]["answer"] == answers[1]["answer"]
    for name in ("batch", "convert", "upload"):
        assert run(python.parent / "videoxl", name, "--help").startswith(f"usage: videoxl {name} ")
    for module in ("videoxl.training.train", "videoxl.evaluation.niah"):
        assert run(python, "-m", module, "--help").startswith("usage: ")
