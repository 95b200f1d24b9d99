"""The newcomer's path, as printed: from an empty directory to an answer, and to a push that is not done.

Every line of the blocks marked `newcomer` in README.md and docs/checkpoints.md runs, in order. Stood in for are the
three that need the world: cloning (a copy), downloading (a checkpoint in the published layout at tiny size) and
logging in. `make` finds its packages here.
"""

import os
import re
import shutil
import site
import stat
import subprocess
import sys

import pytest
from test_upload import published  # noqa: F401 (a fixture)

HF = """#!/bin/sh
case "$1 $2" in
  "download BAAI/Video-XL-2") cp -r "{published}" "$4" ;;
  "auth login") ;;
  *) exit 9 ;;
esac
"""


@pytest.mark.slow
def test_the_path_as_printed(root, published, tmp_path):  # noqa: F811
    pages = ("README.md", "docs/checkpoints.md")
    text = "\n".join((root / page).read_text(encoding="utf-8") for page in pages)
    lines = [
        line
        for block in re.findall(r"^```bash newcomer\n(.*?)^```$", text, re.M | re.S)
        for line in block.splitlines()
    ]
    commands = [line.split("  #")[0].strip() for line in lines]
    assert commands[:2] == ["git clone ADDRESS video-xl", "cd video-xl"]
    clone = tmp_path / "video-xl"
    ignored = shutil.ignore_patterns(
        ".git", ".venv*", "__pycache__", ".pytest_cache", ".ruff_cache", "outputs", "tests"
    )
    shutil.copytree(root, clone, ignore=ignored)
    # What `make` would install is taken from the environment of the tests.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", clone / ".venv"], check=True)
    packages = next((clone / ".venv").glob("lib/python*/site-packages"))
    (packages / "here.pth").write_text("\n".join(site.getsitepackages()))
    (clone / ".venv" / ".installed").touch()
    hf = clone / ".venv" / "bin" / "hf"
    hf.write_text(HF.format(published=published))
    hf.chmod(hf.stat().st_mode | stat.S_IXUSR)

    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    said = []
    for command in commands[2:]:
        pushes = "upload_to_hub.py" in command and "--dry-run" not in command
        done = subprocess.run(
            command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, timeout=600
        )
        # There is no token here, and nobody to send anything to.
        assert done.returncode == (1 if pushes else 0), f"{command}\n{done.stdout}\n{done.stderr}"
        assert not pushes or "run `hf auth login`" in done.stderr
        said.append(done.stdout)
    everything = "\n".join(said)
    # What README.md shows of it; how long things take differs.
    for block in re.findall(r"^```text newcomer\n(.*?)^```$", text, re.M | re.S):
        for line in block.splitlines():
            pattern = re.sub(r"\d+\\\.\d+\\ s\b(?!\\ )", r"\\d+\\.\\d+\\ s", re.escape(line))
            assert re.search(f"^{pattern}$", everything, re.M), line
    for shown in ("Q  What color is the star?", "Q  What happens?", "Video-XL-2, ", "dry run: nothing was sent",
                  "loads without network and answers"):  # fmt: skip
        assert shown in everything
