"""`upload_to_hub.py`: what is gathered, what is refused, and pushes to a local stand-in by the Hub's own client."""

import hashlib
import json
import os
import pickle
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from command_line import run_main
from hub_stand_in import TOKEN, stand_in
from huggingface_hub import EvalResultEntry, ModelCard, constants, eval_result_entries_to_yaml
from safetensors.torch import load_file, save_file
from videoxl.hub import upload as upload_to_hub
from videoxl.hub.cards import PUBLISHED, check_card, converted_card, with_results
from videoxl.hub.checks import check_files, check_loading
from videoxl.hub.upload import UploadError, assemble, check, push

REPO = "someone/video-xl"


@pytest.fixture(scope="module")
def bundled(root, tmp_path_factory):
    """The assembly of the bundled checkpoint; not to be changed."""
    return assemble(root, tmp_path_factory.mktemp("assembled") / "bundled")


@pytest.fixture(scope="module")
def published(root, tmp_path_factory):
    """A published Video-XL-2 checkpoint at tiny size, with a tokenizer that fits it."""
    source = tmp_path_factory.mktemp("published") / "Video-XL-2"
    source.mkdir()
    golden = root / "tests" / "fixtures" / "videoxl2" / "checkpoint"
    tensors, config = load_file(golden / "model.safetensors"), json.loads((golden / "config.json").read_text())
    bundled = json.loads((root / "config.json").read_text())
    rows = bundled["text_config"]["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = 0.1 * torch.randn(rows, tensors[name].shape[1], generator=generator)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    ids = {name: bundled[name] for name in ("video_token_id", "time_start_token_id", "time_end_token_id")}
    ids |= {"vocab_size": rows, "eos_token_id": bundled["text_config"]["eos_token_id"]}
    (source / "config.json").write_text(json.dumps(config | ids))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / name, source)
    return source


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory):
    """What convert_weights.py makes of it; copy it to change it."""
    from videoxl.hub.convert import convert

    return convert(published, tmp_path_factory.mktemp("converted") / "Video-XL-2")


@pytest.fixture
def folder(converted, tmp_path):
    """A converted checkpoint, to be changed at will."""
    return shutil.copytree(converted, tmp_path / "checkpoint")


# ------------------------------------------------------------------------------------------------ assembling, checking


def test_the_bundled_checkpoint_is_gathered_without_the_workshop(bundled, root):
    from videoxl.hub.convert import remote_code_files

    files = set(bundled.files)
    assert {name for name in files if name.endswith(".py")} == {*remote_code_files(), "handler.py"}
    assert {"config.json", "processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
            "model.safetensors", "README.md", "LICENSE", "assets/demo.mp4"} <= files  # fmt: skip
    rest = {name for name in files if not name.endswith(".png")}
    assert not [name for name in rest if name.startswith(("tests", "evaluation", ".")) or name == "cli.py"]
    assert {f"docs/{path.name}" for path in (root / "docs").glob("*.md")} <= files
    assert bundled.size == sum((bundled.folder / name).stat().st_size for name in files)
    card = (bundled.folder / "README.md").read_text()
    for page in ("README.md", *(name for name in files if name.startswith("docs/") and name.endswith(".md"))):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (bundled.folder / page).read_text())
        linked = {posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links}
        assert linked and linked <= files, page
    assert card.split("---\n", 2)[2].strip() == (root / "README.md").read_text().split("---\n", 2)[2].strip()


def test_the_bundled_checkpoint_passes_and_answers_from_a_hub_cache(bundled):
    loaded = check(bundled)
    assert loaded["model"] == "VideoXLForConditionalGeneration"
    assert isinstance(loaded["answer"], str)


def test_a_converted_checkpoint_passes_in_shards(converted, tmp_path):
    assembly = assemble(converted, tmp_path / "assembled", shard_size=200_000)
    shards = [name for name in assembly.files if name.endswith(".safetensors")]
    assert len(shards) > 2 and "model.safetensors" not in shards
    assert json.loads((assembly.folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    before = load_file(converted / "model.safetensors")
    after = {name: tensor for file in shards for name, tensor in load_file(assembly.folder / file).items()}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert check(assembly)["model"] == "VideoXLForConditionalGeneration"
    # The same again: so a second upload finds that nothing has changed.
    again = assemble(converted, tmp_path / "again", shard_size=200_000)
    assert all((again.folder / name).read_bytes() == (assembly.folder / name).read_bytes() for name in again.files)


def test_shards_are_kept_as_they_are(converted, tmp_path):
    sharded = assemble(converted, tmp_path / "sharded", shard_size=200_000)
    assembly = assemble(sharded.folder, tmp_path / "assembled")
    assert assembly.files == sharded.files


def write(name, content):
    def change(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def edit(name, old, new):
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def set_json(name, **values):
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))

    return change


def link(name):
    def change(folder):
        (folder / name).rename(folder.parent / f"elsewhere-{Path(name).name}")
        (folder / name).symlink_to(folder.parent / f"elsewhere-{Path(name).name}")

    return change


def weights_with_metadata(folder):
    file = folder / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "made_in": "/home/someone/run"})


REFUSED = {
    "pickle by another name": (
        write("generation_config.json", pickle.dumps({})),
        "cannot be read as what its name says",
    ),
    "token in the card": (edit("README.md", "# Video", "hf_" + "a" * 34 + "\n# Video"), "looks like a token or a key"),
    "key in a file": (write("generation_config.json", '{"a": "-----BEGIN PRIVATE KEY-----"}'), "token or a key"),
    "path in config": (set_json("config.json", _name_or_path="/home/someone/run"), "config.json has a path of this"),
    "path in tokenizer": (
        set_json("tokenizer_config.json", name_or_path="/data/tok"),
        "tokenizer_config.json has a path",
    ),
    "path in card": (edit("README.md", "# Video", "See /home/someone/run.\n# Video"), "README.md has a path of this"),
    "path in code": (edit("kv_cache.py", "import torch", "import torch\nX = '/home/me/x'"), "kv_cache.py has a path"),
    "address in code": (
        edit("kv_cache.py", "import torch", "import torch\nX = 'file:///home/me/x'"),
        "a path of this",
    ),
    "path in weights": (weights_with_metadata, "model.safetensors has a path of this machine in its header"),
    "no card": (
        lambda folder: (folder / "README.md").unlink(),
        "lacks README.md; a converted checkpoint gets its card",
    ),
    "no licence": (lambda folder: (folder / "LICENSE-CODE").unlink(), "has no licence"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "no metadata": (lambda folder: (folder / "README.md").write_text("# Hello"), "has no metadata"),
    "no base model": (edit("README.md", "base_model:\n- BAAI/Video-XL-2\n", ""), "base_model is missing"),
    "no licence in the card": (
        edit("README.md", "license: apache-2.0\n", ""),
        "license must be one that the Hub knows",
    ),
    "wrong task": (edit("README.md", "video-text-to-text", "text-generation"), "pipeline_tag must be"),
    "dead link": (
        edit("README.md", "## Results", "[See](training/README.md)\n## Results"),
        "links to training/README",
    ),
    "dead link of a page": (
        lambda folder: [
            edit("README.md", "## Results", "[See](docs/more.md)\n## Results")(folder),
            write("docs/more.md", "x")(folder),
        ],
        "README.md links to docs/more.md, which the repository would not have",
    ),
    "path in a page": (write("docs/members.md", "See /home/someone/run."), "docs/members.md has a path of this"),
    "key in a picture": (
        write("assets/demo.mp4", b"\0\xff hf_" + b"a" * 34),
        "demo.mp4 holds what looks like a token",
    ),
    "results of no data set": (write(".eval_results/x.yaml", "- value: 3\n"), "x.yaml cannot be read as .* task_id"),
    "linked config": (link("config.json"), "config.json is a symbolic link"),
    "linked weights": (link("model.safetensors"), "model.safetensors is a symbolic link"),
    "linked code": (link("kv_cache.py"), "kv_cache.py is a symbolic link"),
    "no chat tag": (edit("README.md", "- conversational\n", ""), "tags lack conversational"),
    "results by hand": (edit("README.md", "tags:", "model-index:\n- name: x\n  results: []\ntags:"), "result files"),
    "no auto_map": (set_json("config.json", auto_map={}), "auto_map of config.json lacks AutoConfig"),
    "foreign code": (set_json("processor_config.json", auto_map={"AutoProcessor": "a/b--c.D"}), "another repository"),
    "lost code": (lambda folder: (folder / "modeling_videoxl.py").unlink(), "lacks modeling_videoxl.py"),
    "broken weights": (write("model.safetensors", b"\0" * 100), "damaged or truncated"),
    "broken code": (edit("kv_cache.py", "import torch", "import torch ("), "kv_cache.py cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_must_not_be_published_is_refused(folder, tmp_path, name):
    change, said = REFUSED[name]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        check(assemble(folder, tmp_path / "assembled"), load=False)
    assert "a" * 34 not in str(caught.value)


# What may lie in the folder of somebody who works in it.
STRANGERS = (
    "my_video.mp4", "assets/holiday.mp4", "assets/demo2.png", "docs/diary.md", "docs/scan.png", "notes.txt",
    "other.py",
    ".env", ".env.local", "deploy.pem", "id_rsa", "credentials.json", "token", "talk.videoxl", "videos/a.mkv",
    "notebooks/mine.ipynb", "questions.jsonl", "answers.jsonl", "answers.jsonl.settings.json", "training_args.bin",
    "optimizer.pt", "checkpoint-10/trainer_state.json", "adapter.safetensors", "wandb/run.log", ".ssh/config",
    "evaluation/results/mine.json", ".eval_results/notes.txt", "tokenizer.json.bak", "README.md~",
)  # fmt: skip


PRIVATE = "what nobody else may see"


def make_strangers(folder):
    for name in STRANGERS:
        write(name, f"{PRIVATE} {name}")(folder)
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "members.md").write_text(PRIVATE)
    (outside / "results.yaml").write_text("- {dataset: {id: a/b, task_id: c}, value: 1}")
    (folder / "CITATION.cff").unlink(missing_ok=True)
    (folder / "CITATION.cff").symlink_to(outside / "members.md")
    (folder / "linked").symlink_to(outside)
    (folder / ".eval_results" / "linked.yaml").symlink_to(outside / "results.yaml")
    return {*STRANGERS, "CITATION.cff", "linked", ".eval_results/linked.yaml"}


def test_only_files_of_the_package_travel(folder, small, tmp_path):
    strangers = make_strangers(folder)
    assembly = assemble(folder, tmp_path / "assembled")
    assert assembly.files == small.files
    for name in strangers:  # named, or the folder from which nothing was taken is
        assert any(f"{name}/".startswith(left.rstrip("/") + "/") for left in assembly.left_out), name
    assert not any(PRIVATE in path.read_text("latin-1") for path in assembly.folder.rglob("*") if path.is_file())


def test_a_linked_folder_is_not_entered(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "members.md").write_text(PRIVATE)
    (folder / "docs").symlink_to(tmp_path / "outside")
    assembly = assemble(folder, tmp_path / "assembled")
    assert "docs" in assembly.left_out and not (assembly.folder / "docs").exists()


def test_a_dry_run_of_the_bundled_checkpoint_beside_strangers(root, bundled, upload, tmp_path):
    folder = tmp_path / "clone"
    for name in bundled.files:
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    (folder / "README.md").write_bytes((bundled.folder / "README.md").read_bytes().replace(b"model-index", b"results"))
    card = (root / "README.md").read_text().replace("license: apache-2.0", "license: apache-2.0\nbase_model: a/b")
    (folder / "README.md").write_text(card)
    strangers = make_strangers(folder)
    done = upload(folder, REPO, "--dry-run", "--no-load", tokens=[TOKEN])
    assert done.stdout.endswith("status 0\n"), done.stderr
    listed, left_out = done.stdout.split("\nleft out ")
    listed = {line.split()[0] for line in listed.splitlines() if line.startswith("  ")}
    assert listed == set(bundled.files) - {"CITATION.cff"}
    left_out = left_out.splitlines()[0]
    assert "my_video.mp4" in left_out and ".env" in left_out and "talk.videoxl" in left_out
    assert not strangers & listed


def test_more_files_travel_where_they_are_named(folder, tmp_path):
    write("assets/curve.png", b"\x89PNG")(folder)
    edit("README.md", "## Results", "![A curve](assets/curve.png)\n## Results")(folder)
    with pytest.raises(ValueError, match=r"README.md links to assets/curve.png.*--include"):
        assemble(folder, tmp_path / "assembled")
    assembly = assemble(folder, tmp_path / "assembled", include=["assets/../assets/curve.png"])
    assert "assets/curve.png" in assembly.files and assembly.left_out == []


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (".env", "looks like a secret"),
        ("keys/deploy.pem", "looks like a secret"),
        ("secrets/a.mp4", "looks like a secret"),
        (".git/config", "is hidden"),
        ("model.pt", "is a pickle"),
        ("nowhere.png", "no such file"),
        ("docs", "no such file"),
        ("../outside.png", "no such file"),
        ("linked.png", "is a symbolic link"),
        ("key.txt", "holds what looks like a token or a key"),
        ("key.mp4", "holds what looks like a token or a key"),
    ],
)
def test_what_may_not_be_included(folder, tmp_path, name, said):
    for file in (
        ".env",
        "keys/deploy.pem",
        "secrets/a.mp4",
        ".git/config",
        "model.pt",
        "docs/a.png",
        "../outside.png",
    ):
        write(file, "x")(folder)
    (folder / "linked.png").symlink_to(folder / "README.md")
    write("key.txt", "-----BEGIN RSA PRIVATE KEY-----")(folder)
    write("key.mp4", b"\0\xff -----BEGIN RSA PRIVATE KEY-----")(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        check_files(assemble(folder, tmp_path / "assembled", include=[name]).folder)


def test_the_list_has_all_that_the_package_shows(root):
    pages = {path.relative_to(root).as_posix() for path in root.glob("docs/*.md")}
    assert set(upload_to_hub.PAGES) == pages
    shown = set()
    for page in ("README.md", *pages):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (root / page).read_text())
        shown |= {posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in links}
    # The clip is named in the quick start.
    assert {name for name in shown if not name.endswith(".md")} | {"assets/demo.mp4"} == set(upload_to_hub.SHOWN)


def test_the_notebook_travels_without_outputs(bundled, root):
    name = upload_to_hub.NOTEBOOK
    ours, sent = (json.loads((folder / name).read_text())["cells"] for folder in (root, bundled.folder))
    assert [cell["source"] for cell in sent] == [cell["source"] for cell in ours]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in sent)


def test_an_endpoint_installs_what_the_package_needs(bundled, root):
    wanted = (root / "pyproject.toml").read_text().split("dependencies = [\n")[1].split("]")[0]
    wanted = set(re.findall(r'"([^"]+)"', wanted)) - {"torch>=2.11"}
    assert set((bundled.folder / "requirements.txt").read_text().split()) == wanted
    assert (bundled.folder / "handler.py").read_bytes() == (root / "handler.py").read_bytes()


def test_results_on_registered_benchmarks_travel(folder, tmp_path):
    entry = EvalResultEntry(dataset_id="lmms-lab/Video-MME", task_id="default", value=61.5, notes="full attention")
    write(".eval_results/videomme.yaml", yaml.safe_dump(eval_result_entries_to_yaml([entry])))(folder)
    assembly = assemble(folder, tmp_path / "assembled")
    check(assembly, load=False)
    assert ".eval_results/videomme.yaml" in assembly.files and assembly.left_out == []


def test_the_token_in_use_is_found_in_files(bundled):
    part = (bundled.folder / "config.json").read_text()[30:60]
    with pytest.raises(ValueError, match="config.json holds what looks like a token"):
        check_files(bundled.folder, secrets=(part,))


def test_what_clients_leave_behind_is_no_obstacle(folder, tmp_path):
    for name in (".git/config", ".gitattributes", ".cache/huggingface/a.lock", "__pycache__/a.pyc"):
        write(name, "x")(folder)
    assembly = assemble(folder, tmp_path / "assembled")
    assert not [name for name in assembly.files if name.startswith((".", "__"))]


def test_the_real_tokenizer_is_no_secret_and_no_path(test_data, tmp_path):
    for file in (test_data / "data" / "tokenizer").glob("*.json"):
        shutil.copyfile(file, tmp_path / file.name)
    check_files(tmp_path)


def test_code_that_loads_only_locally_is_refused(converted, tmp_path):
    folder = shutil.copytree(converted, tmp_path / "checkpoint")
    edit("kv_cache.py", "import torch\n", "import torch\nimport no_such_package\n")(folder)
    assembly = assemble(folder, tmp_path / "assembled")
    with pytest.raises(ValueError, match=r"does not load from the Hub.*no_such_package"):
        check_loading(assembly.folder)


# ------------------------------------------------------------------------------------------------ cards


@pytest.mark.parametrize("family", PUBLISHED)
def test_cards_of_converted_checkpoints(family):
    facts = PUBLISHED[family]
    card = converted_card(family, facts.base_models[0])
    data = check_card(card)
    assert data["base_model"] == [facts.base_models[0]]
    assert data["license"] == (facts.license or "other")
    assert f"https://arxiv.org/abs/{facts.arxiv}" in card and facts.paper in card and "REPOSITORY" in card
    assert ModelCard(card).data.to_dict() == data
    mit = converted_card(family, "someone/tuned", published_card="---\nlicense: mit\n---\n# Theirs\n")
    assert ModelCard(mit).data.base_model == ["someone/tuned"]
    assert ModelCard(mit).data.license == "mit" and "`mit` by its own card, https" in mit


def test_a_family_of_several_checkpoints_is_told_apart_by_name():
    known = PUBLISHED["videochatflash"].base_models[2]
    assert f"- {known}\n" in converted_card("videochatflash", None, known.split("/")[1])
    with pytest.raises(ValueError, match="base_model is missing"):
        check_card(converted_card("videochatflash", None, "weights"))


def test_every_family_of_the_converter_has_a_card():
    from videoxl.hub.families import FAMILIES

    assert FAMILIES.keys() <= PUBLISHED.keys()
    assert all(FAMILIES[name].title.startswith(PUBLISHED[name].title) for name in FAMILIES)


def test_results_come_from_files_about_these_very_weights(root, tmp_path):
    from videoxl.evaluation.harness import weights_hash

    weights = weights_hash(root)
    assert weights == hashlib.sha256((root / "model.safetensors").read_bytes()).hexdigest()
    card = (root / "README.md").read_text()
    files = list((root / "evaluation" / "results").glob("report_*.json"))
    assert files
    for file in files:
        report = json.loads(file.read_text())
        named = report["configuration"]["checkpoint"]["weights_sha256"]
        filled, used = with_results(card, [file], named)
        assert used == [file.name]
        values = {result.metric_name: result.metric_value for result in ModelCard(filled).data.eval_results}
        assert values["Exact match, full"] == report["summary"]["full"]["all"]["accuracy"]
        assert len(values) == len(report["summary"])
        assert with_results(card, [file], "0" * 64) == (card, [])


def test_the_root_card_passes(root):
    check_card((root / "README.md").read_text(), needs_base_model=False)


# ------------------------------------------------------------------------------------------------ pushing


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the Hub, whom the client in this process knows as the Hub and trusts with the token."""
    with stand_in() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        # The client waits between its attempts.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


@pytest.fixture(scope="module")
def small(converted, tmp_path_factory):
    return assemble(converted, tmp_path_factory.mktemp("small") / "assembled")


def contents(assembly):
    return {name: (assembly.folder / name).read_bytes() for name in assembly.files}


def test_push_creates_sends_everything_and_tags(hub, small):
    address = push(small, REPO, private=True, tag="v1", message="First", endpoint=hub.url)
    repo = hub.repos[REPO]
    assert repo["files"] == contents(small) and repo["private"]
    assert address.endswith(f"{REPO}/commit/{repo['commits'][-1]}") and repo["tags"] == {"v1": repo["commits"][-1]}
    assert hub.count("PUT", "/lfs/") == 1

    # Once more: nothing is sent, nothing changes, and the tag is as it should be.
    assert push(small, REPO, tag="v1", endpoint=hub.url) == address
    assert hub.count("PUT", "/lfs/") == 1 and hub.count("POST", "/commit/") == 1


def test_a_tag_is_never_moved(hub, small):
    hub.add(REPO)
    hub.repos[REPO]["tags"]["v1"] = "1" * 40
    with pytest.raises(UploadError, match="the tag v1 is taken by 1111"):
        push(small, REPO, tag="v1", endpoint=hub.url)


def test_stale_weights_are_deleted_and_nothing_else(hub, small):
    hub.add(
        REPO, {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes": b"kept"}
    )
    push(small, REPO, endpoint=hub.url)
    assert hub.repos[REPO]["files"] == {**contents(small), "notes": b"kept"}


def test_pull_request(hub, small):
    hub.add(REPO, {"notes": b"kept"})
    assert push(small, REPO, pull_request=True, endpoint=hub.url).endswith("/discussions/1")
    assert hub.repos[REPO]["files"] == {"notes": b"kept"}
    assert hub.repos[REPO]["pulls"] == [{**contents(small), "notes": b"kept"}]
    assert hub.count("POST", "/api/repos/create") == 0


@pytest.mark.parametrize(
    ("request_", "status", "message", "said"),
    [
        (("POST", "/repos/create"), 403, "no write access to someone", "must be allowed to write"),
        (("POST", "/preupload/"), 401, "Invalid credentials", "is the token valid"),
        (("POST", "objects/batch"), 403, "Private repository storage limit reached", "must have room"),
        (("POST", "objects/batch"), 413, "file too large", "larger than the account may store"),
        (("PUT", "/lfs/"), 413, "file too large", "larger than the account may store"),
        (("POST", "/commit/"), 403, "storage limit reached", "storage limit reached.*must have room"),
        (("POST", "/commit/"), 412, "a commit has happened since", "run the same command again"),
        (("POST", "/commit/"), 500, "Internal error", "run the same command again"),
        (("PUT", "/lfs/"), None, "", "connection to the Hub broke.*run the same command again"),
        (("POST", "/commit/"), None, "", "connection to the Hub broke.*run the same command again"),
    ],
)
def test_a_push_that_fails_says_why_and_goes_on_later(hub, small, request_, status, message, said):
    hub.fail[request_] = {"status": status, "message": message, "times": 20}
    with pytest.raises(UploadError, match=said) as caught:
        push(small, REPO, tag="v1", endpoint=hub.url)
    assert TOKEN not in str(caught.value) and message in str(caught.value)
    assert hub.repos.get(REPO, {"files": {}})["files"] == {}, "half a commit"
    sent = hub.count("PUT", "/lfs/")
    arrived = bool(hub.blobs)
    hub.fail.clear()
    push(small, REPO, tag="v1", endpoint=hub.url)
    assert hub.repos[REPO]["files"] == contents(small) and "v1" in hub.repos[REPO]["tags"]
    assert hub.count("PUT", "/lfs/") - sent == (not arrived), "weights that have arrived are not sent again"


def test_a_short_break_is_bridged_by_the_client(hub, small):
    hub.fail["PUT", "/lfs/"] = {"status": None, "message": "", "times": 2}
    push(small, REPO, endpoint=hub.url)
    assert hub.repos[REPO]["files"] == contents(small)


def test_a_card_that_the_hub_refuses(hub, folder, tmp_path):
    edit("README.md", "license: apache-2.0", "license: afl-3.0")(folder)  # unknown to the stand-in
    with pytest.raises(UploadError, match='"license" must be one of'):
        push(assemble(folder, tmp_path / "assembled"), REPO, endpoint=hub.url)
    assert hub.count("PUT", "/lfs/") == 0


@pytest.mark.skipif(int(huggingface_hub.__version__.split(".")[0]) < 2, reason="its validation asks the real Hub only")
def test_the_clients_own_validation(hub, bundled, small):
    for assembly in (bundled, small):
        ModelCard.load(assembly.folder / "README.md").validate()
    assert hub.count("POST", "/api/validate-yaml") == 2
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: no such\n---\n# x").validate()


def test_nobody_home(hub, small, monkeypatch):
    with pytest.raises(UploadError, match="connection to the Hub broke"):
        push(small, REPO, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UploadError, match="HF_HUB_OFFLINE"):
        push(small, REPO, endpoint=hub.url)
    monkeypatch.setattr(upload_to_hub, "get_token", lambda: None)
    with pytest.raises(UploadError, match="hf auth login"):
        push(small, REPO, endpoint=hub.url)


# ------------------------------------------------------------------------------------------------ the command line


# Runs the command line once for each token; the client reads its other settings when it is imported.
UPLOAD = """
import json, os, sys
import upload_to_hub
for token in json.loads(os.environ.pop("TOKENS")):
    os.environ["HF_TOKEN"] = token
    status = upload_to_hub.main(sys.argv[1:])
    print(f"status {status}", flush=True)
"""


@pytest.fixture
def upload(root, tmp_path):
    def run(*arguments, tokens, **environment):
        settings = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        settings |= {"TOKENS": json.dumps(tokens), "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", UPLOAD, *map(str, arguments)]
        env = {**os.environ, **settings, **environment}
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done

    return run


def test_dry_run_prints_the_plan_and_sends_nothing(upload, converted, hub):
    arguments = [converted, REPO, "--dry-run", "--tag", "v1.0", "--private"]
    done = upload(*arguments, tokens=[TOKEN], HF_ENDPOINT=hub.url)
    assert done.stdout.endswith("status 0\n"), done.stderr
    for shown in ("create it (private) unless it exists", "tag it v1.0", "model.safetensors", "kB", "dry run",
                  "VideoXLForConditionalGeneration loads without network and answers"):  # fmt: skip
        assert shown in done.stdout
    assert hub.requests == []
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.parametrize("debug", ["", "1"])
def test_the_token_is_never_printed(upload, converted, hub, debug):
    arguments, other = [converted, REPO, "--no-load"], TOKEN.replace("good", "bad")
    done = upload(*arguments, tokens=[other, TOKEN], HF_ENDPOINT=hub.url, HF_DEBUG=debug)
    refused, accepted, _ = re.split(r"^status \d\n", done.stdout, flags=re.MULTILINE)
    assert re.findall(r"^status (\d)$", done.stdout, re.MULTILINE) == ["1", "0"]
    assert "is the token valid" in done.stderr and "done: " not in refused
    assert debug or "Traceback" not in done.stderr  # the client's own log has some
    assert f"done: {hub.url}/{REPO}/commit/" in accepted
    assert not any(token in done.stdout + done.stderr for token in (other, TOKEN))


def test_bad_usage(converted, tmp_path):
    for arguments, said in (
        ([tmp_path / "nowhere", REPO], "is no checkpoint"),
        ([converted, "no-organisation"], "must be ORG/NAME"),
        ([converted, "a/b/c"], "a/b/c"),
        ([converted, REPO, "--pull-request", "--tag", "v1"], "gets no --tag"),
    ):
        done = run_main(upload_to_hub.main, *arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
