"""What a folder must be before it goes to the Hub: files that hold what they say and no secrets, and an answer.

What is surprising:
* Names are the business of `upload`; here files are opened. JSON must be JSON, weights must be safetensors,
  so a pickle under another name does not pass. Every file is searched for tokens and keys, pictures, too.
* The folder is loaded as a stranger would: from a Hub cache made up for it, without network, in a fresh process.
  What loads from a local folder may fail from the Hub, as more files are looked at there.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import parse_eval_result_entries

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
SECRET_NAMES = re.compile(
    r"^\.env|^\.netrc|^id_(rsa|dsa|ecdsa|ed25519)|\.(pem|key|p12|pfx|keystore)$|credential|secret|passw|^\.?(hf_)?token(s|\.txt)?$",
    re.IGNORECASE,
)
SECRETS = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{24,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
# In running text only folders that hold somebody's files: "/" is also division, and part of an address.
LOCAL_PATHS = re.compile(
    r"(?:(?<![\w.:/~)\]}-])/|\bfile:/+)(?:home|root|Users|tmp|var|mnt|media|opt|srv|scratch|workspace|work|data|gpfs|nfs)/[\w.-]+"
    r"|\b[A-Za-z]:\\{1,2}Users\\"
)
# The whole of a value in a config.
LOCAL_VALUE = re.compile(r"(/|~/|[A-Za-z]:[\\/]|file://|\\\\).+", re.DOTALL)
# Files whose strings are vocabulary: "/home" is a token of many.
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
TEXTS = (".json", ".py", ".ipynb", ".svg", ".jinja", ".md", ".txt", ".cff", "")
# The longest header that a file of weights may have, in bytes; the format's own limit.
MAX_HEADER = 100_000_000
# Results on benchmarks that are registered as data sets of the Hub, which shows them beside the data set.
EVAL_RESULTS = ".eval_results/*.yaml"

LOAD = """
import json, sys
import numpy as np, torch
from transformers import AutoModel, AutoProcessor, AutoTokenizer
name, settings = sys.argv[1], {"trust_remote_code": True}
model, found = AutoModel.from_pretrained(name, dtype="auto", output_loading_info=True, **settings)
for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    if found[kind]:
        sys.exit(f"{kind.replace('_', ' ')}: {', '.join(sorted(map(str, found[kind]))[:5])}")
model = model.to("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = AutoTokenizer.from_pretrained(name, **settings)
AutoProcessor.from_pretrained(name, **settings)
frames = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
answer = model.chat(
    frames, tokenizer, "What happens?", return_history=False, timestamps=[0.5 * index for index in range(8)],
    generation_config={"do_sample": False, "max_new_tokens": 8},
)
print(json.dumps({"model": type(model).__name__, "device": str(model.device), "answer": answer}))
"""


def why_not(name: str) -> str | None:
    """The reason why a file of this name is nothing for others; None if there is none."""
    if any(SECRET_NAMES.search(part) for part in Path(name).parts):
        return "it looks like a secret"
    if any(part.startswith(".") for part in Path(name).parts):
        return "it is hidden"
    if name.endswith(PICKLES):
        return "it is a pickle, which can run code when it is loaded"
    return None


def check_files(folder: Path, secrets: tuple[str, ...] = ()) -> None:
    """Looks into every file of an assembled folder.

    Args:
        folder: The folder.
        secrets: Texts that must not be in it, such as the token that is about to be used.

    Raises:
        ValueError: With all that is wrong.
    """
    wrong = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        name = path.relative_to(folder).as_posix()
        try:
            wrong += [f"{name} {what}" for what in _look_into(path, secrets)]
        except (ValueError, OSError, SyntaxError) as error:
            wrong.append(f"{name} cannot be read as what its name says: {error}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _look_into(path, secrets):
    if path.suffix == ".safetensors":
        values = _strings(_safetensors_header(path).get("__metadata__", {}))
        return [f"has a path of this machine in its header: {value!r}" for value in values if LOCAL_VALUE.match(value)]
    content, found = path.read_bytes(), []
    raw = content.decode("latin-1")
    if SECRETS.search(raw) or any(secret in raw for secret in secrets):
        found.append("holds what looks like a token or a key")  # and is not to be quoted
    if path.match(EVAL_RESULTS):
        _check_eval_results(content)
    if path.suffix not in TEXTS:
        return found
    text = content.decode("utf-8")
    if path.suffix == ".json":
        content = json.loads(text)
        if path.name not in VOCABULARY:
            found += [
                f"has a path of this machine: {value!r}" for value in _strings(content) if LOCAL_VALUE.fullmatch(value)
            ]
    elif path.name not in VOCABULARY and (match := LOCAL_PATHS.search(text)):
        found.append(f"has a path of this machine: {match[0]!r}")
    if path.suffix == ".py":
        ast.parse(text)
    return found


def _check_eval_results(content):
    """Raises ValueError unless a file of results is what the Hub's own client reads as such."""
    try:
        entries = parse_eval_result_entries(yaml.safe_load(content))
    except (AttributeError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"a list of results with dataset id, task_id and value ({error!r})") from error
    if not entries:
        raise ValueError("a list of results, and it has none")


def _strings(content):
    if isinstance(content, str):
        yield content
    elif isinstance(content, (list, dict)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _strings(value)


def _safetensors_header(path):
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= MAX_HEADER:
            raise ValueError("no safetensors header")
        return json.loads(file.read(length))


def check_loading(folder: Path) -> dict:
    """Loads an assembled folder through a made-up Hub cache, without network, in a fresh process, and asks it once.

    Args:
        folder: The folder.

    Returns:
        Class of the model, device, and answer.

    Raises:
        ValueError: If it does not load or answer, with the last lines of the reason.
    """
    with tempfile.TemporaryDirectory() as home:
        revision = "0" * 40
        cached = Path(home, "hub", "models--someone--model")
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(revision)
        shutil.copytree(folder, cached / "snapshots" / revision, copy_function=link_or_copy)
        # Without the caller's token and cache: only what is in the folder counts.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        environment = kept | {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-c", LOAD, "someone/model"]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        reason = " / ".join(line.strip() for line in done.stderr.strip().splitlines()[-3:])
        raise ValueError(f"it does not load from the Hub, or does not answer: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def link_or_copy(source, target) -> None:
    """Puts a file in place without copying gigabytes, where the system allows it."""
    try:
        os.symlink(os.path.realpath(source), target)
    except OSError:  # Windows asks for a privilege
        shutil.copyfile(source, target)
