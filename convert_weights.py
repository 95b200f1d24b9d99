"""Converts a published checkpoint of the Video-XL family into a folder that `Auto*.from_pretrained` loads.

    python convert_weights.py SOURCE OUTPUT [--preset NAME] [--dtype bfloat16] [--max-shard-size 5GB]

What is surprising:
* Which family a checkpoint belongs to, and what its tensors are called, is said in `convert_families`.
* The folder is complete (weights, configs, tokenizer, template, remote code, model card) and appears at once:
  everything goes to a hidden sibling folder that is renamed at the end, so OUTPUT is never half-written.
* Expected names and shapes come from our model class on the meta device: a table cannot silently drift from the model.
* Only safetensors are read. A pickle can run code while it is being loaded.
* What is not taken over as it stands is said, one line each: settings without effect, tensors without a place, an
  output head that is the embedding although stored twice, or is not although the config says so.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import sys
import types
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import Qwen2Tokenizer
from transformers.dynamic_module_utils import get_relative_import_files

from convert_families import Family, name_table, recognise_family
from model_card import converted_card

ROOT = Path(__file__).resolve().parent
PRESETS = ROOT / "presets"

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json")
PLACEHOLDER = "<|vision_pad|>"
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")
# Our names of these two, and of all tensors of the tower.
EMBEDDING, HEAD, TOWER = "model.language_model.embed_tokens.weight", "lm_head.weight", "model.vision_tower."
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


def _remote_code(module):
    # The remote files import each other relatively, so the flat root is imported as a package.
    package = types.ModuleType("videoxl")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault("videoxl", package)
    return importlib.import_module(f"videoxl.{module}")


@dataclass(frozen=True)
class SourceTensor:
    """Where a published tensor lies, and what its header says: `shape`, and `dtype` in safetensors' words (`BF16`).

    `shape` may have fewer rows than are stored: only these are read.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


# What a model weight may be stored as; anything else is a quantised or damaged checkpoint.
_STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    known = _read_preset(preset) if preset else choose_preset(table, published)
    config = _build_config(published, known, tensors, dtype)
    for line in _remote_code("published_config_videoxl").dropped_settings(published):
        log(f"config.json: {line}")
    surplus = config.text_config.vocab_size - known.get("text_config", {}).get("vocab_size", 0)
    if 0 < surplus <= table.extra_rows:
        config.text_config.vocab_size -= surplus  # saved with the rows that training appended; nobody trained them
    plan = match_tensors(tensors, table, expected_shapes(config), config.tie_word_embeddings, unused_layers(config))
    read = {tensor.name for tensor in plan.values()}
    if left := [name for name in tensors if name not in read]:
        log(f"left out, as the model has no use for them: {_some(left)}")
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
            raise ValueError(_pickle_message(path.name))
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


def _pickle_message(file):
    return (
        f"{file} is a pickle, which can run code while it is being loaded, so only safetensors are read. Save the "
        "weights as safetensors in an environment that you trust (save_pretrained does so) and convert those"
    )


def read_json(path: Path) -> dict:
    """Reads a file that holds a JSON object.

    Raises:
        FileNotFoundError, ValueError: If it is missing, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_preset(name):
    known = sorted(path.stem for path in PRESETS.glob("*.json"))
    if name not in known:
        raise ValueError(f"there is no preset {name!r}; known are {', '.join(known)}")
    return read_json(PRESETS / f"{name}.json")


def choose_preset(table: Family, published: dict) -> dict:
    """The family's preset that a published config.json agrees with most; the tower counts before sizes."""
    presets = [_read_preset(name) for name in table.presets]
    if len(presets) == 1:
        return presets[0]
    towers = _remote_code("published_config_videoxl").PUBLISHED_TOWERS
    tower = towers.get(published.get("mm_vision_tower"), {})

    def agreement(preset):
        same_tower = all(preset["vision_config"].get(key) == value for key, value in tower.items())
        return same_tower, sum(published.get(key) == value for key, value in preset["text_config"].items())

    return max(presets, key=agreement)


def read_source(source: Path) -> dict[str, SourceTensor]:
    """Reads the headers of a folder's safetensors: every tensor of every shard, by its published name.

    Raises:
        FileNotFoundError: If there are no weights, or a shard of the index is missing.
        ValueError: If there are only pickles, a file is damaged, or index and shards disagree.
    """
    if (source / WEIGHTS).is_file():
        files, listed = [WEIGHTS], None
    elif (source / WEIGHTS_INDEX).is_file():
        listed = read_json(source / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise ValueError(f"{source / WEIGHTS_INDEX} has no weight_map of tensor names to file names")
        files = sorted(set(listed.values()))
        if strange := [file for file in files if file != Path(file).name]:
            raise ValueError(f"{source / WEIGHTS_INDEX} names files outside its folder: {_some(strange)}")
        if missing := [file for file in files if not (source / file).is_file()]:
            raise FileNotFoundError(f"{source} lacks {_some(missing)}, named in {WEIGHTS_INDEX}: download the rest")
    else:
        found = sorted(path.name for path in source.iterdir())
        if shards := [name for name in found if name.endswith(".safetensors")]:
            raise FileNotFoundError(f"{source} has {_some(shards)} but neither {WEIGHTS} nor {WEIGHTS_INDEX}")
        if pickles := [name for name in found if name.endswith(PICKLE_SUFFIXES)]:
            raise ValueError(_pickle_message(source / pickles[0]))
        raise FileNotFoundError(f"{source} has no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}")

    tensors = {}
    for file in files:
        with _open_shard(source / file) as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                if name in tensors:
                    raise ValueError(f"tensor {name} is in {tensors[name].file.name} and again in {file}")
                header = shard.get_slice(name)
                tensors[name] = SourceTensor(source / file, name, tuple(header.get_shape()), header.get_dtype())
    if listed is not None:
        place = {name: tensor.file.name for name, tensor in tensors.items()}
        if wrong := sorted(name for name in listed.keys() | place.keys() if listed.get(name) != place.get(name)):
            raise ValueError(
                f"{WEIGHTS_INDEX} and the shards disagree about {_some(wrong)}: {wrong[0]} is listed in "
                f"{listed.get(wrong[0])} and stored in {place.get(wrong[0])}"
            )
    return tensors


def _open_shard(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): download it again") from error


def _some(names, limit=5):
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _build_config(published, preset, tensors, dtype):
    config_class = _remote_code("configuration_videoxl").VideoXLConfig
    try:
        config = config_class.from_published(published, preset)
    except Exception as error:  # wrong types and values surface as the library's own kinds
        raise ValueError(f"config.json cannot be read as a published config: {error!r}") from error
    if dtype is None and config.dtype is None:
        stored = next(iter(tensors.values())).dtype
        dtype = str(_STORED_DTYPES.get(stored, torch.float32)).removeprefix("torch.")
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
    model_class = getattr(_remote_code("modeling_videoxl"), ARCHITECTURE)
    try:
        with torch.device("meta"):
            model = model_class(config)
    except Exception as error:  # as above: sizes that do not go together
        raise ValueError(f"no model can be built from the sizes in config.json: {error!r}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def unused_layers(config) -> tuple[str, ...]:
    """Prefixes of the tower's layers above the one whose output is taken: some checkpoints store them, some do not."""
    depth = _remote_code("vision_videoxl").tower_depth(config)
    return tuple(
        f"model.vision_tower.encoder.layers.{number}."
        for number in range(depth, config.vision_config.num_hidden_layers)
    )


def match_tensors(
    tensors: dict[str, SourceTensor],
    table: Family,
    expected: dict[str, tuple[int, ...]],
    tied: bool,
    unused: tuple[str, ...] = (),
) -> dict[str, SourceTensor]:
    """Pairs every tensor of our model with a published one, and accounts for every published one.

    Args:
        tensors: The source, by published name.
        table: The family's names.
        expected: Our names and shapes.
        tied: The output head is the embedding, so `lm_head.weight` may be absent.
        unused: Our prefixes of tensors that may be stored and are not read, see `unused_layers`.

    Returns:
        The source by our name, in the order of the source.

    Raises:
        ValueError: With the name, if a tensor is unknown, missing, has another shape or no floating-point type.
    """
    plan = {}
    for name, tensor in tensors.items():
        ours = table.to_ours(name)
        if ours in expected:
            plan[ours] = tensor
        elif not table.ignores(name) and not (ours or "").startswith(unused):
            raise ValueError(f"unknown tensor {name} {tensor.shape}: {table.title} has no place for it")
    optional = {HEAD} if tied else set()
    if missing := [name for name in expected if name not in plan and name not in optional]:
        names = [f"{table.to_published(name)} {expected[name]}" for name in missing]
        raise ValueError(f"the checkpoint lacks {_some(names)}: {_advice(missing, expected)}")
    for ours in {HEAD, EMBEDDING} & set(plan):
        rows, *rest = plan[ours].shape
        if 0 < rows - expected[ours][0] <= table.extra_rows:
            plan[ours] = replace(plan[ours], shape=(expected[ours][0], *rest))
    for ours, tensor in plan.items():
        if tensor.shape != expected[ours]:
            raise ValueError(f"tensor {tensor.name} has shape {tensor.shape}, expected is {expected[ours]}")
        if tensor.dtype not in _STORED_DTYPES:
            raise ValueError(f"tensor {tensor.name} is stored as {tensor.dtype}; quantised checkpoints are not read")
    return plan


def _advice(missing, expected):
    if missing == [HEAD]:
        return "only with tie_word_embeddings true in config.json is the embedding the output head"
    if {name for name in expected if name.startswith(TOWER)} <= set(missing):
        return (
            "the whole vision tower is not in it. Load the checkpoint with the published code, which fetches the "
            "tower that mm_vision_tower names, save the model as safetensors and convert that"
        )
    return "is the download complete?"


def settle_head(plan: dict[str, SourceTensor], config) -> str | None:
    """Settles whether the output head is the embedding; the stored weights have the last word, not the config.

    Where the config ties the two and both are stored, a head that is a copy leaves `plan` (written next to the
    embedding it would untie them on loading), and one that differs stays and unties them in `config`.

    Args:
        plan: As `match_tensors` gave it.
        config: Our config.

    Returns:
        A sentence for the report; None if the config and the stored weights say the same.
    """
    if not config.tie_word_embeddings or HEAD not in plan:
        return None
    head, embedding = plan[HEAD], plan[EMBEDDING]
    values = [_read_tensor(tensor) for tensor in (head, embedding)]
    dtype = torch.promote_types(values[0].dtype, values[1].dtype)
    if torch.equal(values[0].to(dtype), values[1].to(dtype)):
        del plan[HEAD]
        return f"{head.name} is a copy of {embedding.name}: the embeddings stay tied, the copy is left out"
    config.tie_word_embeddings = False
    return (
        f"{head.name} differs from {embedding.name}, although its config ties them: both are kept as they are "
        "stored, and the new config.json says tie_word_embeddings: false"
    )


def _read_tensor(tensor, dtype=None):
    with _open_shard(tensor.file) as shard:
        try:
            stored = shard.get_slice(tensor.name)[: tensor.shape[0]] if tensor.shape else shard.get_tensor(tensor.name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"tensor {tensor.name} in {tensor.file} cannot be read ({error})") from error
    if dtype is None:
        return stored
    cast = stored.to(getattr(torch, dtype))
    if cast.isinf().any() and not stored.isinf().any():
        raise ValueError(f"tensor {tensor.name} has values beyond the range of {dtype}; choose another dtype")
    return cast


def write_weights(plan: dict[str, SourceTensor], folder: Path, dtype: str | None, max_shard_size, log) -> None:
    """Writes the tensors of `plan` shard by shard, with an index if there is more than one shard."""
    sizes = {}
    for ours, tensor in plan.items():
        stored_as = getattr(torch, dtype) if dtype else _STORED_DTYPES[tensor.dtype]
        sizes[ours] = torch.empty(tensor.shape, dtype=stored_as, device="meta")
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        save_file({ours: _read_tensor(plan[ours], dtype) for ours in names}, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        shutil.copymode(folder / "config.json", folder / file)
        log(f"{file}: {len(names)} tensors")
    if split.is_sharded:
        _write_json(folder / WEIGHTS_INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
        return _remote_code("processing_videoxl").VideoXLProcessor.from_config(config, tokenizer).video_token
    except (ValueError, TypeError) as error:
        _warn(f"the tokenizer of {source} does not fit its weights: {error}")
        return None


def _drop_chat_template(folder):
    # Ours, in chat_template.jinja, replaces it.
    settings = read_json(folder / "tokenizer_config.json")
    settings.pop("chat_template", None)
    _write_json(folder / "tokenizer_config.json", settings)


def _warn(message):
    warnings.warn(message, stacklevel=4)


def _write_configs(config, video_token, source, folder, log):
    _write_json(folder / "config.json", json.loads(config.to_json_string()))
    processor = {
        "processor_class": "VideoXLProcessor",
        "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
        **_remote_code("processing_videoxl").VideoXLProcessor.settings_of(config),
    }
    if video_token is not None:
        processor["video_token"] = video_token
    _write_json(folder / "processor_config.json", processor)
    if (source / "generation_config.json").is_file():
        generation = read_json(source / "generation_config.json")
        _write_json(folder / "generation_config.json", generation)
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


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


if __name__ == "__main__":
    sys.exit(main())
