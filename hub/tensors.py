"""The tensors of a published checkpoint: where they lie, which of ours each one is, and writing them in shards.

What is surprising:
* Only safetensors are read. A pickle can run code while it is being loaded.
* Headers are read first; values only while they are written, one shard at a time.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .families import Family

WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Our names of these two, and of all tensors of the tower.
EMBEDDING, HEAD, TOWER = "model.language_model.embed_tokens.weight", "lm_head.weight", "model.vision_tower."
# What a model weight may be stored as; anything else is a quantised or damaged checkpoint.
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class SourceTensor:
    """Where a published tensor lies, and what its header says: `shape`, and `dtype` in safetensors' words (`BF16`).

    `shape` may have fewer rows than are stored: only these are read.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


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


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def some_names(names, limit=5):
    return ", ".join(map(str, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def pickle_message(file):
    return (
        f"{file} is a pickle, which can run code while it is being loaded, so only safetensors are read. Save the "
        "weights as safetensors in an environment that you trust (save_pretrained does so) and convert those"
    )


def read_source(source: Path) -> dict[str, SourceTensor]:
    """Reads the headers of a folder's safetensors: every tensor of every shard, by its published name.

    Raises:
        FileNotFoundError: If there are no weights, or a shard of the index is missing.
        ValueError: If there are only pickles, a file is damaged, or index and shards disagree.
    """
    files, listed = _weight_files(source)
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
                f"{WEIGHTS_INDEX} and the shards disagree about {some_names(wrong)}: {wrong[0]} is listed in "
                f"{listed.get(wrong[0])} and stored in {place.get(wrong[0])}"
            )
    return tensors


def _weight_files(source):
    """The files of weights in a folder, and the index that lists their tensors; None where there is one file."""
    if (source / WEIGHTS).is_file():
        return [WEIGHTS], None
    if not (source / WEIGHTS_INDEX).is_file():
        found = sorted(path.name for path in source.iterdir())
        if shards := [name for name in found if name.endswith(".safetensors")]:
            raise FileNotFoundError(f"{source} has {some_names(shards)} but neither {WEIGHTS} nor {WEIGHTS_INDEX}")
        if pickles := [name for name in found if name.endswith(PICKLE_SUFFIXES)]:
            raise ValueError(pickle_message(source / pickles[0]))
        raise FileNotFoundError(f"{source} has no weights: neither {WEIGHTS} nor {WEIGHTS_INDEX}")
    listed = read_json(source / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ValueError(f"{source / WEIGHTS_INDEX} has no weight_map of tensor names to file names")
    files = sorted(set(listed.values()))
    if strange := [file for file in files if file != Path(file).name]:
        raise ValueError(f"{source / WEIGHTS_INDEX} names files outside its folder: {some_names(strange)}")
    if missing := [file for file in files if not (source / file).is_file()]:
        raise FileNotFoundError(f"{source} lacks {some_names(missing)}, named in {WEIGHTS_INDEX}: download the rest")
    return files, listed


def _open_shard(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): download it again") from error


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
        raise ValueError(f"the checkpoint lacks {some_names(names)}: {_advice(missing, expected)}")
    for ours in {HEAD, EMBEDDING} & set(plan):
        rows, *rest = plan[ours].shape
        if 0 < rows - expected[ours][0] <= table.extra_rows:
            plan[ours] = replace(plan[ours], shape=(expected[ours][0], *rest))
    for ours, tensor in plan.items():
        if tensor.shape != expected[ours]:
            raise ValueError(f"tensor {tensor.name} has shape {tensor.shape}, expected is {expected[ours]}")
        if tensor.dtype not in STORED_DTYPES:
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
    values = [read_tensor(tensor) for tensor in (head, embedding)]
    dtype = torch.promote_types(values[0].dtype, values[1].dtype)
    if torch.equal(values[0].to(dtype), values[1].to(dtype)):
        del plan[HEAD]
        return f"{head.name} is a copy of {embedding.name}: the embeddings stay tied, the copy is left out"
    config.tie_word_embeddings = False
    return (
        f"{head.name} differs from {embedding.name}, although its config ties them: both are kept as they are "
        "stored, and the new config.json says tie_word_embeddings: false"
    )


def read_tensor(tensor, dtype=None):
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
        stored_as = getattr(torch, dtype) if dtype else STORED_DTYPES[tensor.dtype]
        sizes[ours] = torch.empty(tensor.shape, dtype=stored_as, device="meta")
    split = split_torch_state_dict_into_shards(
        sizes, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        save_file({ours: read_tensor(plan[ours], dtype) for ours in names}, folder / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        shutil.copymode(folder / "config.json", folder / file)
        log(f"{file}: {len(names)} tensors")
    if split.is_sharded:
        write_json(folder / WEIGHTS_INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
