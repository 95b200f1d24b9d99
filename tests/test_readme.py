"""The README and the pages of docs/ as users meet them: their Python runs, links lead somewhere, commands exist.

Blocks fenced as `python` run in order, each page's in a namespace of its own, in the root: they share names and use
the bundled checkpoint and clip. All pages run in one subprocess, so that torch is imported once. Only the length of
the quick start's answers is cut. A block fenced as `python norun` (it needs a GPU, say) is just compiled; renderers
highlight both alike.
"""

import json
import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
# The README is a model card that people read to the end, in lines.
README_LINES = 250
# The published length of an answer, and one that a test can wait for, in tokens.
PUBLISHED_LENGTH, TEST_LENGTH = '"max_new_tokens": 256', '"max_new_tokens": 8'
FENCE = r"^```{language}(?P<mark>[^\n]*)\n(?P<code>.*?)^```$"
# A command line with one of our programs, up to a comment.
PROGRAM = re.compile(r"(?<![\w./])(?P<program>[\w/]+\.py)(?P<arguments>[^#\n]*)")
# Runs the blocks of a file by page, and writes what went wrong after each page.
RUN_PAGES = """
import contextlib, io, json, sys, traceback
jobs, ran = json.load(open(sys.argv[1], encoding="utf-8")), {}
for page, codes in jobs.items():
    names, printed, error = {"__name__": "__main__"}, [], ""
    try:
        for code in codes:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, page, "exec"), names)
            printed.append(out.getvalue())
    except Exception:
        error = traceback.format_exc()[-3000:]
    ran[page] = {"error": error, "printed": printed}
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(ran, file)
"""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[tuple[int, str, str]]:
    """(line of the code, mark after the language, code) of every block of a page."""
    fence = re.compile(FENCE.format(language=language), re.MULTILINE | re.DOTALL)
    found = fence.finditer(text)
    return [(text.count("\n", 0, each.start("code")) + 1, each["mark"].strip(), each["code"]) for each in found]


@pytest.fixture(scope="module")
def readme() -> str:
    return read("README.md")


@pytest.fixture(scope="module")
def ran(root, tmp_path_factory) -> dict[str, dict]:
    """By page, the traceback of what went wrong, empty if nothing did, and what each block printed.

    Pages behind one that crashed are missing. Under "stderr" there is what all of them wrote there.
    """
    folder, jobs = tmp_path_factory.mktemp("pages"), {}
    for page in PAGES:
        found = [(line, code) for line, mark, code in blocks(read(page), "python") if not mark]
        # Blank lines in front: errors name the page's lines.
        jobs[page] = ["\n" * (line - 1) + code.replace(PUBLISHED_LENGTH, TEST_LENGTH) for line, code in found]
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    command = [sys.executable, "-c", RUN_PAGES, folder / "jobs.json", folder / "ran.json"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert (folder / "ran.json").exists(), done.stderr[-3000:]
    return json.loads((folder / "ran.json").read_text(encoding="utf-8")) | {"stderr": done.stderr}


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, ran):
    for line, mark, code in blocks(read(page), "python"):
        assert mark in ("", "norun"), f"{page}, line {line}: unknown mark {mark!r}"
        compile(code, page, "exec")
    error = ran.get(page, {"error": "did not finish"})["error"]
    assert error == "", error


def test_the_readme_shows_what_its_python_prints(readme, ran):
    follows = re.compile(
        FENCE.format(language="python") + r"(?:\s*^```text\n(?P<shown>.*?)^```$)?", re.MULTILINE | re.DOTALL
    )
    shown = [found["shown"] for found in follows.finditer(readme) if not found["mark"].strip()]
    assert shown == ran["README.md"]["printed"]


def test_nothing_is_said_of_settings_that_are_dropped(ran):
    assert "generation flags" not in ran["stderr"]


@pytest.mark.parametrize("page", PAGES)
def test_data_blocks_can_be_read(page):
    for _, _, text in blocks(read(page), "yaml"):
        assert yaml.safe_load(text)
    for _, _, text in blocks(read(page), "json"):
        assert json.loads(text)


def test_the_readme_is_short_and_has_examples(readme):
    assert len(readme.splitlines()) <= README_LINES
    assert len(blocks(readme, "python")) >= 5, "the README lost its examples"


def test_quick_start_is_the_published_call(readme):
    code = "".join(blocks(readme, "python")[0][2].split())
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


def anchors(page: str) -> set[str]:
    """What a page's headings are linked by."""
    text = re.sub(FENCE.format(language=r"\w+"), "", read(page), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page, root):
    text = read(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        linked = posixpath.normpath(posixpath.join(posixpath.dirname(page), file)) if file else page
        assert (root / linked).is_file(), f"no file {target}"
        assert not anchor or anchor in anchors(linked), f"no section {target}"
    for name in re.findall(r"(?:`|python )([\w./]+\.(?:py|txt|cff))\b", text):
        known = [root / name, *root.glob(f"evaluation/{name}"), *root.glob(f"training/**/{name}")]
        assert any(file.is_file() for file in known), f"no file {name}"


def test_every_page_is_linked_from_the_readme(readme):
    for page in PAGES[1:]:
        assert f"]({page})" in readme


def test_make_commands_exist(readme, root):
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    targets = {page: re.findall(r"(?:^|`)make ([a-z-]+)", read(page), re.MULTILINE) for page in PAGES}
    assert {"demo", "page"} <= set(targets["README.md"])
    for target in {target for found in targets.values() for target in found}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"no make target {target}"


def command_lines() -> dict[str, set[str]]:
    """By program (`cli.py`, or `cli.py batch`), the options that the pages use."""
    options = {}
    for page in PAGES:
        text = read(page)
        spans = [code for _, _, code in blocks(text, "bash")] + re.findall(r"`([^`\n]+)`", text)
        for span in spans:
            for found in PROGRAM.finditer(span.replace("\\\n", " ")):
                program, arguments = found["program"], found["arguments"]
                program += " batch" if arguments.startswith(" batch") else ""
                options.setdefault(program, set()).update(re.findall(r"(?<!\S)--[a-z][\w-]*", arguments))
    return {program: found for program, found in options.items() if found - {"--help"}}


@pytest.mark.slow
@pytest.mark.parametrize("program", command_lines())
def test_options_on_the_pages_exist(program, root):
    if program.endswith("lmms_eval_videoxl.py"):
        pytest.skip("lmms-eval's own command line")
    done = subprocess.run(
        [sys.executable, *program.split(), "--help"], cwd=root, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for option in command_lines()[program]:
        assert re.search(rf"{option}\b", done.stdout), f"{program} has no {option}"


def test_citation_file(root, readme):
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == "Apache-2.0"
    urls = [reference["url"] for reference in citation["references"]]
    assert urls and all(url in readme for url in urls)
