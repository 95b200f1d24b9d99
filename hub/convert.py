"""Converts a published checkpoint of the Video-XL family into a folder that `Auto*.from_pretrained` loads.

    python convert_weights.py SOURCE OUTPUT [--preset NAME] [--dtype bfloat16] [--max-shard-size 5GB]
    videoxl convert SOURCE OUTPUT ...          # where the package is installed

What is surprising:
* Which family a checkpoint belongs to, and what its tensors are called, is said in `families`.
* The folder is complete (weights, configs, tokenizer, template, remote code, model card) and appears at once:
  everything goes to a hidden sibling folder that is renamed at the end, so OUTPUT is never half-written.
* Expected names and shapes come from our model class on the meta device: a table cannot silently drift from the model.
* What is not taken over as it stands is said, one line each: settings without effect, tensors without a place, an
  output head that is the embedding although stored twice, or is not although the config says so.
"""

import argparse
import json
import os
import re
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import Qwen2Tokenizer
from transformers.dynamic_module_utils import get_relative_import_files
from videoxl import VideoXLForConditionalGeneration, VideoXLProcessor

from .cards import converted_card
from .families import Family, name_table, recognise_family
from .published_configs import PUBLISHED_TOWERS, build_config, dropped_settings
from .tensors import (
    PICKLE_SUFFIXES,
    STORED_DTYPES,
    TOWER,
    WEIGHTS_INDEX,
    match_tensors,
    pickle_message,
    read_json,
    read_source,
    settle_head,
    some_names,
    write_json,
    write_weights,
)

ROOT = Path(__file__).resolve().parent.parent
PRESETS = ROOT / "presets"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json")
PLACEHOLDER = "<|vision_pad|>"
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
DTYPES = ("float32", "bfloat16", "float16")

# The entry points of the remote code; every file that they reach by relative imports is part of the output.
MODELING_FILE, PROCESSING_FILE = "modeling_videoxl.py", "processing_videoxl.py"
CHAT_TEMPLATE = "chat_template.jinja"
ARCHITECTURE = "VideoXLForConditionalGeneration"
# By hand, because `register_for_auto_class` keeps only its last entry.
AUTO_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
AUTO_MAP = {
    "AutoConfig": "configuration_videoxl.VideoXLConfig",
    "AutoProcessor": "processing_videoxl.VideoXLProcessor",
}
AUTO_MAP |= dict.fromkeys(AUTO_MODELS, f"modeling_videoxl.{ARCHITECTURE}")


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    preset: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    """Converts a published checkpoint.

    Args:
        source: Local folder, or Hub id (`org/name`) if no such folder exists.
        output: Folder to write; must not exist, or be empty.
        preset: Name of a file in `presets/`; None takes the family's own.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`; None keeps each tensor as it is stored.
        max_shard_size: Largest file of weights, such as `"5GB"`; also about the memory that is needed.
        log: Receives the report: one line per step, and per thing that is not taken over as it stands.

    Returns:
        The path of `output`.

    Raises:
        FileNotFoundError: If the source, or a file that it must have, is missing.
        ValueError: If the source is no checkpoint of a supported family, if a tensor is unknown, missing, damaged or
            has the wrong shape, or if `output` cannot be used.
    """
    output = _check_output(output)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    hub_id, source = None if Path(source).expanduser().is_dir() else str(source), _find_source(source)
    if output == source or source in output.parents:
        raise ValueError(f"OUTPUT {output} lies inside SOURCE {source}; choose a folder outside of it")

    published = read_json(source / "config.json")
    family, config, plan = _plan_conversion(source, published, preset, dtype, log)

    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        video_token = _copy_tokenizer(source, partial, config, "video_token_id" in published)
        _write_configs(config, video_token, source, partial, log)
        _write_card(family, hub_id, source, partial)
        for file in remote_code_files():
            shutil.copyfile(ROOT / file, partial / file)
        write_weights(plan, partial, dtype, max_shard_size, log)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log(f"{output}: done")
    return output


def _plan_conversion(source, published, preset, dtype, log):
    """The family, our config and its tensors; reads headers only, and the values of a head that may be a copy."""
    tensors = read_source(source)
    family = recognise_family(published, tensors)
    table = name_table(family)
    log(f"{source}: {table.title}, {len(tensors)} tensors")
    known = read_preset(preset) if preset else choose_preset(table, published)
    config = _complete_config(published, known, tensors, dtype)
    for line in dropped_settings(published):
        log(f"config.json: {line}")
    surplus = config.text_config.vocab_size - known.get("text_config", {}).get("vocab_size", 0)
    if 0 < surplus <= table.extra_rows:
        config.text_config.vocab_size -= surplus  # saved with the rows that training appended; nobody trained them
    expected = expected_shapes(config)
    plan = match_tensors(tensors, table, expected, config.tie_word_embeddings, unused_layers(config, expected))
    read = {tensor.name for tensor in plan.values()}
    if left := [name for name in tensors if name not in read]:
        log(f"left out, as the model has no use for them: {some_names(left)}")
    if line := settle_head(plan, config):
        log(line)
    return family, config, plan


def _check_output(output):
    output = Path(output).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"OUTPUT {output} is a file; give a folder that does not exist yet")
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"OUTPUT {output} is not empty; give a folder that does not exist yet, or empty it")
    return output


def _find_source(source):
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.exists():
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(pickle_message(path.name))
        raise ValueError(f"SOURCE {path} is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(source)):
        raise FileNotFoundError(f"SOURCE {source} is neither an existing folder nor a Hub id (org/name)")
    patterns = ["*.safetensors", WEIGHTS_INDEX, "config.json", "generation_config.json", *TOKENIZER_FILES]
    patterns += ["README.md", "LICENSE"]
    try:
        return Path(snapshot_download(str(source), allow_patterns=patterns)).resolve()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"SOURCE {source} is no local folder, and it could not be fetched from the Hub ({type(error).__name__}): "
            "check the name, the network and, for a private repository, `hf auth login`"
        ) from error


def read_preset(name: str) -> dict:
    """The config that `presets/NAME.json` holds; ValueError if there is none."""
    known = sorted(path.stem for path in PRESETS.glob("*.json"))
    if name not in known:
        raise ValueError(f"there is no preset {name!r}; known are {', '.join(known)}")
    return read_json(PRESETS / f"{name}.json")


def choose_preset(table: Family, published: dict) -> dict:
    """The family's preset that a published config.json agrees with most; the tower counts before sizes."""
    presets = [read_preset(name) for name in table.presets]
    if len(presets) == 1:
        return presets[0]
    tower = PUBLISHED_TOWERS.get(published.get("mm_vision_tower"), {})

    def agreement(preset):
        same_tower = all(preset["vision_config"].get(key) == value for key, value in tower.items())
        return same_tower, sum(published.get(key) == value for key, value in preset["text_config"].items())

    return max(presets, key=agreement)


def _complete_config(published, preset, tensors, dtype):
    try:
        config = build_config(published, preset)
    except Exception as error:  # wrong types and values surface as the library's own kinds
        raise ValueError(f"config.json cannot be read as a published config: {error!r}") from error
    if dtype is None and config.dtype is None:
        stored = next(iter(tensors.values())).dtype
        dtype = str(STORED_DTYPES.get(stored, torch.float32)).removeprefix("torch.")
    if dtype is not None:
        config.dtype = dtype
    config.architectures = [ARCHITECTURE]
    config.auto_map = dict(AUTO_MAP)
    return config


def expected_shapes(config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of our model with this config; costs no memory.

    Raises:
        ValueError: If the config's sizes do not go together.
    """
    try:
        with torch.device("meta"):
            model = VideoXLForConditionalGeneration(config)
    except Exception as error:  # as above: sizes that do not go together
        raise ValueError(f"no model can be built from the sizes in config.json: {error!r}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def unused_layers(config, expected: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Prefixes of the tower's layers that our model does not build: some checkpoints store them, some do not.

    Args:
        config: Our config.
        expected: As `expected_shapes` gave it.
    """
    layers = (f"{TOWER}encoder.layers.{number}." for number in range(config.vision_config.num_hidden_layers))
    return tuple(layer for layer in layers if not any(name.startswith(layer) for name in expected))


def _copy_tokenizer(source, folder, config, has_token_ids):
    """Copies the tokenizer and returns the placeholder's text, if there is a tokenizer that has it.

    Of families without timestamps the tokenizer decides about the placeholder's id, unless the source has stated it.
    """
    found = {name for name in TOKENIZER_FILES if (source / name).is_file()}
    for name in found:
        shutil.copyfile(source / name, folder / name)
    if "tokenizer_config.json" in found:
        _drop_chat_template(folder)
    missing = [] if "tokenizer_config.json" in found else ["tokenizer_config.json"]
    if no_vocabulary := "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= found:
        missing.insert(0, "tokenizer.json (or vocab.json and merges.txt)")
    if missing:
        _warn(
            f"{source} has no {' and no '.join(missing)}: AutoTokenizer, AutoProcessor and chat need the tokenizer; "
            "add the files of the language model that the checkpoint was trained from"
        )
    if no_vocabulary:
        return None
    try:
        tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    except Exception as error:  # the library's own are bare Exceptions
        raise ValueError(f"the tokenizer files of {source} cannot be read: {error}") from error
    placeholder = tokenizer.get_added_vocab().get(PLACEHOLDER)
    if config.time_format is None and not has_token_ids:
        config.video_token_id = len(tokenizer) if placeholder is None else placeholder
    if placeholder is None and config.video_token_id == len(tokenizer):
        # Qwen2's tokenizer has no placeholder; it gets the first id that it leaves free.
        tokenizer.add_tokens([PLACEHOLDER], special_tokens=True)
        tokenizer.save_pretrained(folder)
        _drop_chat_template(folder)
    try:
        return VideoXLProcessor.from_config(config, tokenizer).video_token
    except (ValueError, TypeError) as error:
        _warn(f"the tokenizer of {source} does not fit its weights: {error}")
        return None


def _drop_chat_template(folder):
    # Ours, in chat_template.jinja, replaces it.
    settings = read_json(folder / "tokenizer_config.json")
    settings.pop("chat_template", None)
    write_json(folder / "tokenizer_config.json", settings)


def _warn(message):
    warnings.warn(message, stacklevel=4)


def _write_configs(config, video_token, source, folder, log):
    write_json(folder / "config.json", json.loads(config.to_json_string()))
    processor = {
        "processor_class": "VideoXLProcessor",
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        **VideoXLProcessor.settings_of(config),
    }
    if video_token is not None:
        processor["video_token"] = video_token
    write_json(folder / "processor_config.json", processor)
    if (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
        write_json(folder / "generation_config.json", generation)
        if generation.get("do_sample"):
            kept = ", ".join(f"{key} {generation[key]}" for key in SAMPLING if key in generation)
            log(f"generation_config.json: answers are sampled unless a call says otherwise, as published ({kept})")
    shutil.copyfile(ROOT / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)


def _write_card(family, hub_id, source, folder):
    # The root's licence is that of the code, and must not look like that of the weights.
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE-CODE")
    if (source / "LICENSE").is_file():
        shutil.copyfile(source / "LICENSE", folder / "LICENSE")
    published = source / "README.md"
    card = published.read_text(encoding="utf-8") if published.is_file() else None
    (folder / "README.md").write_text(converted_card(family, hub_id, source.name, card), encoding="utf-8")


def remote_code_files() -> list[str]:
    """The files of the root that a converted folder needs: the model, the processor and all that they import."""
    files = {MODELING_FILE, PROCESSING_FILE}
    for entry in (MODELING_FILE, PROCESSING_FILE):
        files |= {Path(file).name for file in get_relative_import_files(ROOT / entry)}
    return sorted(files)


def main(arguments: list[str] | None = None, prog: str | None = None) -> int:
    """The command line, of a program of this name; returns the exit status."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="folder as published, or its Hub id (org/name)")
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; must not exist, or be empty")
    parser.add_argument("--preset", metavar="NAME", help="a file of presets/ (default: the family's own)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        convert(**vars(options), log=print)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
