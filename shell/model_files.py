"""Looks at the files of a model folder before anything is loaded: a damaged one is named at once, with a remedy."""

import json
import os
from pathlib import Path

REMEDY = "copy the folder again, or convert the published checkpoint again with convert_weights.py"
# Longest header that safetensors allows.
MAX_HEADER_BYTES = 100_000_000


def check_model_files(folder: Path) -> None:
    """Raises ValueError if a file that loading needs is missing, or cannot be what it should be."""
    # A tokenizer may also be there as a vocabulary and its merges.
    tokenizer = "vocab.json" if (folder / "vocab.json").is_file() else "tokenizer.json"
    others = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
    for name in ("config.json", tokenizer, *(name for name in others if (folder / name).is_file())):
        _read_json(folder / name)
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        named = _read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named:
            raise ValueError(f"{index} names no files of weights; {REMEDY}")
        names = sorted(set(named.values()))
    for name in names:
        _check_weights(folder / name)


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise ValueError(f"{path} is missing; {REMEDY}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (no JSON object); {REMEDY}")
    return content


def _check_weights(path: Path) -> None:
    """Compares a file's size with what its header says."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; {REMEDY}")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
                raise ValueError("no header of safetensors")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); {REMEDY}") from error
    if needed != size:
        raise ValueError(f"{path} is damaged: {needed:,} bytes expected, {size:,} found; {REMEDY}")
