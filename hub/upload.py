"""Puts a checkpoint on the Hub: gathers exactly the files that a repository needs, checks, shows or pushes them.

    python upload_to_hub.py FOLDER ORG/NAME --dry-run
    python upload_to_hub.py FOLDER ORG/NAME --tag v1.0
    videoxl upload FOLDER ORG/NAME ...         # where the package is installed

FOLDER is this repository's root (the bundled checkpoint), or a folder that convert_weights.py or training wrote.

What is surprising:
* What travels is a fixed list of names, below; whatever else lies in the folder is named as left out. `.gitignore`
  means nothing to the Hub's client. Other pictures or clips of a card need `--include`, which takes no keys.
* Symbolic links are never followed: what they lead to may be anybody's.
* The notebook travels without its outputs, which may show videos of yours.
* Nothing is kept between runs. The same command sends the same files; those that have arrived are not sent again.
* Weights that are in the repository and not in this upload are deleted by its commit: a stale `model.safetensors`
  would be loaded in place of new shards.
* The token is the client's own (`hf auth login`, or HF_TOKEN). It is no option: options show in lists of processes.

Exit status: 0; 2 if the folder or the usage is refused; 1 if the Hub is, or the connection.
"""

import argparse
import contextlib
import glob
import json
import os
import posixpath
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files
from videoxl.shell.records import files_hash

from .cards import check_card, with_results
from .checks import EVAL_RESULTS, check_files, check_loading, link_or_copy, why_not
from .tensors import read_json, read_source, write_weights

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evaluation" / "results"
SHARD_SIZE = 5 * 10**9  # bytes: "5GB"; transformers' default is ten times as much

WEIGHTS, INDEX = "*.safetensors", "model.safetensors.index.json"
REQUIRED = (
    "config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)
LICENSES = ("LICENSE", "LICENSE-CODE")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
PAGES = tuple(f"docs/{page}.md" for page in (
    "checkpoints", "evaluation", "files_and_histories", "frames_and_times", "measurements", "members", "memory",
    "questions", "serving", "sparse_attention", "tools", "training"))  # fmt: skip
# What the pages show or link to.
NOTEBOOK = "notebooks/quickstart.ipynb"
SHOWN = ("assets/demo.mp4", "assets/demo_page.png", "docs/peers.png", "evaluation/results/niah_single.png",
         "training/logs/small/curves.png", NOTEBOOK)  # fmt: skip
HANDLER = "handler.py"
OPTIONAL = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.json",
            "merges.txt", "preprocessor_config.json", "video_preprocessor_config.json", *LICENSES, "CITATION.cff",
            HANDLER, *PAGES, *SHOWN)  # fmt: skip
# For Inference Endpoints, which install it. Their image brings the torch that fits its GPU.
REQUIREMENTS = "transformers>=5.17,<6\nsafetensors\nhuggingface_hub\nnumpy\npillow\ntqdm\neinops\nav>=17\n"
AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText")
# What clients of the Hub and Python leave in a folder: nobody needs to be told.
NOT_OURS = (".git", ".gitattributes", ".cache", "__pycache__")
# Links of the card to files, not to addresses or headings.
LINKS = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
TOKEN = re.compile(r"hf_[A-Za-z0-9]+")


class UploadError(RuntimeError):
    """The Hub refused, or could not be reached; the message says what to do and holds no token."""


@dataclass(frozen=True)
class Assembly:
    """A folder that is ready for the Hub.

    Args:
        folder: Where it is.
        files: Names in the repository and sizes in bytes.
        results: Result files whose figures went into the card.
        left_out: What else lies where they came from: files, and folders from which nothing was taken.
    """

    folder: Path
    files: dict[str, int]
    results: list[str]
    left_out: list[str]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(self.files.values())


def assemble(
    folder: str | os.PathLike,
    output: str | os.PathLike,
    *,
    include: Iterable[str] = (),
    shard_size: int = SHARD_SIZE,
    log: Callable[[str], None] = lambda line: None,
) -> Assembly:
    """Gathers exactly the files that a Hub repository needs.

    Weights are linked where they are no larger than `shard_size`, and written anew in shards where they are.

    Args:
        folder: The root of this repository, or a checkpoint with its code, tokenizer and card.
        output: A folder to fill; must not exist, or be empty.
        include: Further files of the folder that are to travel.
        shard_size: Largest file of weights in bytes, unless one tensor alone is larger.
        log: Receives a line per step.

    Returns:
        The assembly. It is not checked yet, see `check`.

    Raises:
        FileNotFoundError, ValueError: If something is missing, damaged or not meant for others.
    """
    folder, output = Path(folder).resolve(), Path(output)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; give a folder that does not exist yet")
    _check_complete(folder)
    tensors = read_source(folder)
    shards = sorted({tensor.file.name for tensor in tensors.values()})
    names = [*REQUIRED, *_code(folder), *_included(folder, include)]
    if linked := [name for name in (*names, *shards) if _is_link(folder, name)]:
        raise ValueError(
            f"{folder}: {', '.join(linked)} is a symbolic link, and links are not followed; give a folder with the "
            "files themselves (hf download --local-dir makes one)"
        )
    optional = (*OPTIONAL, *(path.relative_to(folder).as_posix() for path in sorted(folder.glob(EVAL_RESULTS))))
    names += [name for name in optional if (folder / name).is_file() and not _is_link(folder, name)]
    pages = {name: (folder / name).read_text(encoding="utf-8") for name in names if name.endswith(".md")}
    check_card(pages["README.md"], needs_base_model=folder != ROOT)
    for page, text in pages.items():
        if dead := sorted(_links(page, text) - set(names)):
            raise ValueError(
                f"{page} links to {', '.join(dead)}, which the repository would not have; take the link out, or "
                "--include a file that everybody may see"
            )
    output.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(names):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, output / name)
    _add_ours(output)
    _place_weights(tensors, output, shard_size, log)
    weights = files_hash(folder / name for name in shards)
    card, results = with_results(pages["README.md"], RESULTS.glob("*.json"), weights)
    (output / "README.md").write_text(card, encoding="utf-8")
    log("results in the card: " + (", ".join(results) or "none, since none was measured on these weights"))
    found = sorted(path for path in output.rglob("*") if path.is_file())
    files = {path.relative_to(output).as_posix(): path.stat().st_size for path in found}
    return Assembly(output, files, results, _left_out(folder, {*names, *shards, *files}))


def _is_link(folder, name):
    """Whether a file of the folder, or a folder on the way to it, is a symbolic link."""
    return any((folder / part).is_symlink() for part in (Path(name), *Path(name).parents))


def _included(folder, include):
    """The names of further files, which must be there and be nobody's secret."""
    for given in include:
        name = Path(os.path.relpath(folder / given, folder)).as_posix()
        if name.startswith("..") or not (folder / name).is_file():
            raise FileNotFoundError(f"--include {given}: there is no such file in {folder}")
        if reason := why_not(name):
            raise ValueError(f"--include {given}: {reason}; it is not sent")
        yield name


def _add_ours(output):
    """What every repository gets: the handler of endpoints, what it needs, and a notebook without outputs."""
    if not (output / HANDLER).exists():
        shutil.copyfile(ROOT / HANDLER, output / HANDLER)
    (output / "requirements.txt").write_text(REQUIREMENTS, encoding="utf-8")
    if (notebook := output / NOTEBOOK).exists():
        content = json.loads(notebook.read_text(encoding="utf-8"))
        for cell in content["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
        notebook.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _left_out(folder, taken):
    """Names of what is not taken: files, and folders of which nothing is, with a slash and without looking inside."""
    names, on_the_way = [], {parent.as_posix() for name in taken for parent in Path(name).parents}
    waiting = [folder]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if name in taken or path.name in NOT_OURS:
                continue
            if path.is_dir() and not path.is_symlink() and name in on_the_way:
                waiting.append(path)
            else:
                names.append(name + "/" * (path.is_dir() and not path.is_symlink()))
    return sorted(names)


def _check_complete(folder):
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json")
    if missing := [name for name in REQUIRED if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}{_advice(missing)}")
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        raise FileNotFoundError(f"{folder} has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt")
    if not any((folder / name).is_file() for name in LICENSES):
        raise FileNotFoundError(f"{folder} has no licence: neither {' nor '.join(LICENSES)}")


def _place_weights(tensors, output, shard_size, log):
    """Links the files of weights, or writes them anew where one is too large."""
    files = {tensor.file for tensor in tensors.values()}
    sizes = [file.stat().st_size for file in files]
    if max(sizes) <= shard_size or len(tensors) == 1:
        folder = next(iter(files)).parent
        index = [folder / INDEX] if {file.name for file in files} != {"model.safetensors"} else []
        for file in [*files, *index]:
            link_or_copy(file, output / file.name)
        return
    if (free := shutil.disk_usage(output).free) < sum(sizes):
        raise ValueError(
            f"new shards take {_size(sum(sizes))}, and {output} has room for {_size(free)}: "
            "set TMPDIR to a folder with more"
        )
    try:
        write_weights(tensors, output, None, shard_size, log)
    except KeyError as error:
        raise ValueError(
            f"weights of type {error} cannot be put into new shards: save them with max_shard_size='5GB'"
        ) from error


def _advice(missing):
    if "README.md" in missing:
        return "; a converted checkpoint gets its card from convert_weights.py, another one from you"
    return ""


def _code(folder):
    """The remote code: what the auto_map of the configs names, and all that it imports."""
    entries = set()
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        auto_map = read_json(folder / name).get("auto_map", {})
        for target in auto_map.values():
            for reference in [target] if isinstance(target, str) else filter(None, target):
                if "--" in reference:
                    raise ValueError(f"{name} takes code from another repository ({reference}); save the code with it")
                entries.add(reference.split(".")[0] + ".py")
        wanted = {"config.json": AUTO_CLASSES, "processor_config.json": ("AutoProcessor",)}.get(name, ())
        if lacking := [auto for auto in wanted if auto not in auto_map]:
            raise ValueError(
                f"the auto_map of {name} lacks {', '.join(lacking)}: Auto classes would not find the code"
            )
    if missing := sorted(entry for entry in entries if not (folder / entry).is_file()):
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, named in an auto_map")
    reached = {Path(file).name for entry in entries for file in get_relative_import_files(folder / entry)}
    return sorted(entries | reached)


def _links(page, text):
    """The files that a page links to, as names in the repository."""
    return {posixpath.normpath(posixpath.join(posixpath.dirname(page), link)) for link in LINKS.findall(text)}


def check(assembly: Assembly, load: bool = True) -> dict | None:
    """Looks into all files and, if `load`, loads them from a made-up Hub cache and asks once.

    Returns:
        What loading gave, see `checks.check_loading`; None without it.

    Raises:
        ValueError: With what is wrong.
    """
    check_files(assembly.folder, secrets=tuple(filter(None, [get_token()])))
    return check_loading(assembly.folder) if load else None


def push(
    assembly: Assembly,
    repo_id: str,
    *,
    private: bool = False,
    pull_request: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Sends an assembly to the Hub; the same call again goes on where it broke.

    Args:
        assembly: What `assemble` gave, and `check` has seen.
        repo_id: Repository, `org/name`; it is created if it does not exist, unless a pull request is wanted.
        private: If created, then private.
        pull_request: Open a pull request instead of committing.
        revision: Branch, or `refs/pr/N` to go on with a pull request.
        tag: Name for the new state.
        message: Of the commit.
        endpoint: Address of the Hub; None takes the client's own.

    Returns:
        The address of the commit or the pull request.

    Raises:
        UploadError: If the Hub refuses or cannot be reached.
    """
    if get_token() is None:
        raise UploadError("there is no token: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint)
    try:
        if not pull_request and revision is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=assembly.folder,
            allow_patterns=list(map(glob.escape, assembly.files)),
            ignore_patterns=[".git*", "**/__pycache__/**"],
            delete_patterns=[WEIGHTS, INDEX],
            commit_message=message or "Upload model",
            revision=revision,
            create_pr=pull_request,
        )
        if tag is not None:
            _tag(api, repo_id, tag, commit.oid)
    except UploadError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UploadError(without_token(explain(error, repo_id))) from error
    return commit.pr_url or commit.commit_url


def _tag(api, repo_id, tag, commit):
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        existing = {found.name: found.target_commit for found in api.list_repo_refs(repo_id).tags}
        if existing.get(tag) != commit:
            raise UploadError(
                f"the files are there as commit {commit}, but the tag {tag} is taken by {existing.get(tag)}; "
                "choose another --tag"
            ) from error


def explain(error: BaseException, repo_id: str) -> str:
    """What went wrong with the Hub, and what to do."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    again = "run the same command again; what has arrived is not sent again"
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "the network is switched off by HF_HUB_OFFLINE; unset it"
    for link in chain:
        if isinstance(link, HfHubHTTPError):
            status, said = link.response.status_code, getattr(link, "server_message", None) or str(link)
            said = f"the Hub answered {status} ({' '.join(said.split())})"
            advice = {
                400: "see what it says about the files or the metadata",
                401: f"is the token valid (`hf auth login`), and does {repo_id} exist for it?",
                402: "the account has no room for this: make room, or upgrade it",
                403: f"the token must be allowed to write to {repo_id}, and the account must have room for the files",
                404: f"does {repo_id} exist, and may the token see it?",
                409: f"somebody else has changed {repo_id} meanwhile: {again}",
                412: f"somebody else has changed {repo_id} meanwhile: {again}",
                413: "a file or the repository is larger than the account may store",
                429: f"too many requests: wait, then {again}",
            }
            return f"{said}: {advice.get(status, again)}"
    for link in chain:
        if isinstance(link, (HTTPError, ConnectionError, TimeoutError)):
            return f"the connection to the Hub broke ({type(link).__name__}: {link}): {again}"
    return " ".join(str(chain[0]).split()) or type(chain[0]).__name__


def without_token(text: str) -> str:
    """The text without anything that is, or looks like, a token."""
    if token := get_token():
        text = text.replace(token, "***")
    return TOKEN.sub("hf_***", text)


def _size(count) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def describe(assembly: Assembly, options: argparse.Namespace, loaded: dict | None) -> str:
    """The plan: what goes where."""
    if options.pull_request:
        what = "open a pull request"
    elif options.revision:
        what = f"commit to {options.revision}"
    else:
        what = f"create it{' (private)' * options.private} unless it exists, and commit"
    what += f"; delete other weights there{f'; tag it {options.tag}' if options.tag else ''}"
    answered = "NOT loaded (--no-load)"
    if loaded is not None:
        answered = f"{loaded['model']} loads without network and answers {loaded['answer']!r}"
    width = max(map(len, assembly.files))
    return "\n".join(
        [
            f"repository  {options.repository}: {what}",
            f"files       {len(assembly.files)}, together {_size(assembly.size)}",
            *(f"  {name:<{width}}  {_size(size):>9}" for name, size in assembly.files.items()),
            f"results     {', '.join(assembly.results) or 'none: no result file is about these weights'}",
            f"left out    {', '.join(assembly.left_out) or 'nothing'}",
            f"checked     names, metadata, secrets, paths; {answered}",
        ]
    )


def build_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="FOLDER", help="the checkpoint; . in this repository is the bundled one")
    parser.add_argument("repository", metavar="ORG/NAME", help="the repository on the Hub")
    parser.add_argument(
        "--include",
        metavar="FILE",
        action="append",
        default=[],
        help="a further file of FOLDER, such as a picture of the card; may be given several times",
    )
    parser.add_argument("--dry-run", action="store_true", help="assemble, check, print the plan, send nothing")
    parser.add_argument("--private", action="store_true", help="make the repository private if it is created")
    parser.add_argument("--pull-request", action="store_true", help="open a pull request in an existing repository")
    parser.add_argument("--revision", metavar="REF", help="commit to a branch; refs/pr/N goes on with a pull request")
    parser.add_argument("--tag", help="tag the commit, so that users can pin it")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--keep", metavar="DIR", help="keep the assembled folder there")
    parser.add_argument("--no-load", action="store_true", help="do not load the model to check it (not enough memory)")
    return parser


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """The command line, of a program of this name; returns the exit status."""
    options = build_parser(prog).parse_args(arguments)
    with contextlib.ExitStack() as stack:
        try:
            validate_repo_id(options.repository)
            if options.repository.count("/") != 1:
                raise ValueError(f"the repository must be ORG/NAME, got {options.repository!r}")
            if options.pull_request and (options.revision or options.tag):
                raise ValueError("a pull request has no --revision and gets no --tag")
            output = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()), "repository")
            assembly = assemble(options.folder, output, include=options.include, log=print)
            loaded = check(assembly, load=not options.no_load)
        except (ValueError, OSError, HFValidationError) as error:
            print(f"error: {without_token(str(error))}", file=sys.stderr)
            return 2
        print(describe(assembly, options, loaded))
        if options.dry_run:
            print("dry run: nothing was sent")
            return 0
        settings = {name: getattr(options, name) for name in ("private", "pull_request", "revision", "tag", "message")}
        try:
            print(f"done: {push(assembly, options.repository, **settings)}")
        except UploadError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0
