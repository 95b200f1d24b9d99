"""The README as users meet it: its Python runs, its metadata is valid, its links lead somewhere.

Blocks fenced as `python` run in order, in one subprocess, in the root: they share names and use the bundled checkpoint
and clip. Only the length of their answers is cut. A block fenced as `python norun` (it needs a GPU, say) is just
compiled; renderers highlight both alike.
"""

import re
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import ModelCard

# The published length of an answer, and one that a test can wait for, in tokens.
PUBLISHED_LENGTH, TEST_LENGTH = '"max_new_tokens": 256', '"max_new_tokens": 8'
FENCE = re.compile(r"^```python(?P<mark>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def readme(root) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def python_blocks(text: str) -> list[tuple[int, str, str]]:
    """(line of the code, mark after `python`, code) of every block; blank lines in front keep the README's numbers."""
    blocks = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        blocks.append((line + 1, match["mark"].strip(), "\n" * line + match["code"]))
    return blocks


def test_python_blocks_run(readme, root, tmp_path):
    blocks = python_blocks(readme)
    assert len(blocks) >= 5, "the README lost its examples"
    script = ["names = {'__name__': '__main__'}"]
    for line, mark, code in blocks:
        assert mark in ("", "norun"), f"README.md, line {line}: unknown mark {mark!r}"
        compile(code, "README.md", "exec")
        if not mark:
            code = code.replace(PUBLISHED_LENGTH, TEST_LENGTH)
            script.append(f"exec(compile({code!r}, 'README.md', 'exec'), names)")
    file = tmp_path / "readme_blocks.py"
    file.write_text("\n".join(script), encoding="utf-8")
    done = subprocess.run([sys.executable, file], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_quick_start_is_the_published_call(readme):
    code = "".join(python_blocks(readme)[0][2].split())
    published = """model.chat(
        video_path, tokenizer, question1, chat_history=None, return_history=False, max_num_frames=100, sample_fps=1,
        max_sample_fps=4, generation_config=gen_kwargs,
    )"""
    assert "".join(published.split()) in code
    assert "".join(PUBLISHED_LENGTH.split()) in code
    for entry in ("do_sample", "temperature", "top_p", "num_beams", "use_cache", "max_new_tokens"):
        assert f'"{entry}":' in code


def test_metadata(readme):
    card = ModelCard(readme)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "video-text-to-text"
    assert data["language"] in ("en", ["en"])
    assert {"video", "conversational", "custom_code"} <= set(data["tags"])
    assert "toy world" in card.text[:500], "the card must say at the top what the bundled weights are"


def test_links_and_files_exist(readme, root):
    anchors = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", readme, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", readme):
        if target.startswith("#"):
            assert target[1:] in anchors, f"no section {target}"
        elif not target.startswith("https://"):
            assert (root / target).exists(), f"no file {target}"
    for name in re.findall(r"(?:`|python )([\w./]+\.(?:py|txt|cff))\b", readme):
        assert (root / name).exists(), f"no file {name}"


def test_make_commands_exist(readme, root):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"(?:^|`)make ([a-z-]+)", readme, re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make target {target}"


def test_citation_file(root):
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    urls = [reference["url"] for reference in citation["references"]]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert urls and all(url in readme for url in urls)
