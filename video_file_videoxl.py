"""One encoded video as one safetensors file: tensors, facts about them, and a digest over every byte.

What is surprising:
* safetensors writes contiguous tensors only, and key-values are views of longer buffers: contiguous for every head. So
  they are stored head by head ("layers.0.keys/00000" and so on), which copies nothing; a map of the file joins them
  again. From a GPU all tensors come to the host before they are written.
* The digest is the sha256 of the whole file with its own 64 digits set to "0". A file that another program has written
  anew counts as damaged.
* A file is written and checked in a temporary folder beside its place, `.videoxl-*`, and moved there once it is on the
  disk. A killed process can leave such a folder behind, which is never read.
* Tensors loaded to the CPU are a private map of the file: writing into them changes no file, and saving over the path,
  or deleting it, does not disturb them. Overwriting the bytes in place (`cp`) does: load it again then.
"""

import hashlib
import json
import math
import os
import re
import tempfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = "videoxl.encoded_video"
# Version 1 had every tensor in one piece, and an entry of metadata for each of what is now one.
LAYOUT_VERSION = 2
HASHED_AT_ONCE = 8 * 2**20  # bytes read at a time for the digest
SOURCE_END_BYTES = 2**20  # read at each end of a video for its fingerprint
SAMPLED_VALUES = 64  # read of each weight for the model's fingerprint
LOAD_TRIES = 10  # a load starts anew if the file is replaced under it

_NO_DIGEST = "0" * 64
# What reading a damaged header can lead to.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Config entries that do not say what the model computes from given weights: private ones, the library's own, ...
_LIBRARY_KEYS = (
    "_.*|architectures|attention_dropout|auto_map|bos_token_id|chunk_size_feed_forward|dtype|eos_token_id|id2label"
    "|initializer_range|is_encoder_decoder|label2id|output_attentions|output_hidden_states|pad_token_id|problem_type"
    "|quantization_config|return_dict|tie_word_embeddings|torch_dtype|transformers_version|use_cache"
)
# ... and those that users set between calls. What of them changes an encoded video belongs into its facts.
_CALL_TIME_KEYS = (
    "sparse_attention|enable_sparse|sparse_mode|sparse_config|enable_chunk_prefill|prefill_config|vision_chunk_frames"
    "|beacon_ratio|keep_ratio|keep_seed|mm_llm_compress|llm_compress_.*|llm_image_token_ratio_list"
    "|tokenizer_model_max_length"
)
_VOLATILE_KEY = re.compile(f"{_LIBRARY_KEYS}|{_CALL_TIME_KEYS}")


def save_video_file(path, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Writes tensors and facts as one file that is either complete or not there.

    Args:
        path: Where to; an existing file is replaced once the new one is complete. A link is followed.
        tensors: By name; any strides and device. No two may overlap in memory.
        facts: What JSON can hold; comes back as JSON gives it (lists for tuples).

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the file cannot be written.
        ValueError: If the path is not a file's, or tensors or facts cannot be stored.
    """
    path = os.path.realpath(os.fsdecode(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is a folder or a device: give the name of a file to save the video in")
    if not os.path.isdir(folder := os.path.dirname(path)):
        raise FileNotFoundError(f"the folder {folder} does not exist: create it, or save the video elsewhere")
    blocks, shapes = {}, {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{name} must be a dense tensor that holds values, got {type(tensor).__name__}")
        parts = _contiguous_blocks(tensor)
        blocks |= {f"{name}/{n:05}": part for n, part in enumerate(parts)} if len(parts) > 1 else {name: parts[0]}
        shapes |= {name: list(tensor.shape)} if len(parts) > 1 else {}
    about = {"digest": _NO_DIGEST, "facts": facts, "layout_version": LAYOUT_VERSION, "shapes": shapes}
    try:
        # One entry, because the library writes several in any order; the digest is the first thing in it.
        metadata = {FORMAT: json.dumps(about, sort_keys=True, separators=(",", ":"), allow_nan=False)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts must be what JSON can hold (no tensors, no NaN): {error}") from error
    with tempfile.TemporaryDirectory(prefix=".videoxl-", dir=folder) as temporary:
        part = os.path.join(temporary, "part")
        try:
            save_file(blocks, part, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"tensors must be of a dtype that safetensors has, and not overlap: {error}") from error
        _write_digest(part)
        os.replace(part, path)


def load_video_file(path, *, verify: bool = True, device="cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Reads what `save_video_file` wrote, also in its layout version 1.

    Args:
        path: The file.
        verify: Read the whole file once and compare its digest. False is instant at any size, and unchecked but for
            the header's form and the file's size.
        device: Where the tensors go. On "cpu" they stay backed by the file and take memory as they are read.

    Returns:
        Tensors by name, and the facts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, cut short, of another kind or of another layout version.
    """
    path = os.fsdecode(path)
    if os.path.isdir(path):
        raise ValueError(f"{path} is a folder: give the file that EncodedVideo.save wrote")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no saved video {path}: check the path, or encode the video and save it there")
    for _ in range(LOAD_TRIES):
        with open(path, "rb") as file:
            refused = None
            try:
                tensors, facts = _read(file, path, verify)
            except (SafetensorError, *_DAMAGE) as error:
                refused = error
            # The library opens the path by itself: what was checked must be what it has mapped.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                if refused is None:
                    return {name: tensor.to(device) for name, tensor in tensors.items()}, facts
                raise ValueError(
                    f"{path} is damaged or of another kind: expected a video saved by EncodedVideo.save, found "
                    f"{refused}. Encode the video again and save it"
                ) from refused
    raise ValueError(f"{path} was replaced {LOAD_TRIES} times while it was read: load it when it is no longer written")


def source_fingerprint(path) -> dict | None:
    """Size, and sha256 of the size and of the first and last MiB, of a file; None where there is no file."""
    if not path or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        digest.update(file.read(SOURCE_END_BYTES))
        file.seek(max(size - SOURCE_END_BYTES, 0))
        digest.update(file.read(SOURCE_END_BYTES))
    return {"size": size, "sha256": digest.hexdigest()}


def model_fingerprint(model) -> str:
    """Tells one model from another by its config and a sample of its weights, without reading them all.

    The dtype enters as the weights' own; `config.dtype`, which a model built from a config leaves unset, does not, nor
    do settings that users change between calls.

    Args:
        model: A transformers model on any device.

    Returns:
        A sha256, the same in every process and on every device.

    Raises:
        ValueError: If weights are offloaded to the meta device: nothing would tell such models apart.
    """
    config = model.config.to_dict()
    config = {**config.pop("frames_config"), **config}  # flat, as in the files of earlier versions
    digest = hashlib.sha256(_canonical(_architecture(config)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_meta:
            raise ValueError(f"the weight {name} is on the meta device: load the model without offloading it")
        digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]).encode())
        values = tensor.detach().reshape(-1)
        # An odd step, so that a matrix with an even number of columns is not sampled in one column only.
        sample = values[:: values.numel() // SAMPLED_VALUES | 1][:SAMPLED_VALUES]
        digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def require_match(facts: dict, expected: dict, what: str) -> None:
    """Compares the facts of a file with what is asked for.

    Args:
        facts: What the file says.
        expected: What must agree, nested like `facts`; None at any depth asks for nothing.
        what: What is being loaded, for the message.

    Raises:
        ValueError: Naming every entry that differs, with both values.
    """
    if differing := "; ".join(_mismatches(facts, expected, "")):
        remedy = "Load it with the model, settings and video it was made with, or encode the video again and save it"
        raise ValueError(f"{what} does not fit: {differing}. {remedy}")


def _mismatches(facts, expected, prefix):
    for key, asked in expected.items():
        stored = facts.get(key)
        if isinstance(asked, dict) and isinstance(stored, dict):
            yield from _mismatches(stored, asked, f"{prefix}{key}.")
        elif asked is not None and stored != json.loads(_canonical(asked)):
            held, asked = (text if len(text) <= 80 else f"{text[:77]}..." for text in map(_canonical, (stored, asked)))
            yield f"{prefix}{key}: the file has {held if key in facts else 'nothing'}, asked for {asked}"


def _architecture(config: dict) -> dict:
    """A config's dict without what is volatile or unset, at every depth."""
    return {
        key: _architecture(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value is not None and not _VOLATILE_KEY.fullmatch(str(key))
    }


def _canonical(value) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def _contiguous_blocks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """A tensor's values in order, as contiguous views of it; as a copy where rows of values are not contiguous."""
    if tensor.is_contiguous() or tensor.ndim <= 2:
        return [tensor.contiguous()]
    return [block for part in tensor for block in _contiguous_blocks(part)]


def _write_digest(path) -> None:
    """Puts a file's digest in its place, and makes it as readable as other files (the library's are their owner's)."""
    with open(path, "r+b") as file, open(f"{path}.plain", "xb") as plain:
        try:
            safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"the facts, or a tensor's name, cannot be read again: {error}") from error
        digest = _file_digest(file, _NO_DIGEST)
        file.seek(0)
        file.seek(file.read(HASHED_AT_ONCE).index(_NO_DIGEST.encode()))
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())
        os.chmod(path, os.fstat(plain.fileno()).st_mode)


def _file_digest(file, digest: str) -> str:
    """The digest of an open file that holds `digest` at present."""
    file.seek(0)
    start = file.read(8)
    header = file.read(int.from_bytes(start, "little")).replace(digest.encode(), _NO_DIGEST.encode(), 1)
    found = hashlib.sha256(start + header)
    while piece := file.read(HASHED_AT_ONCE):
        found.update(piece)
    return found.hexdigest()


def _read(file, path, verify) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors, mapped, and facts of an open file; fails in many ways if it is not what `save_video_file` writes."""
    with safe_open(path, framework="pt", device="cpu") as content:
        metadata, blocks = content.metadata() or {}, {name: content.get_tensor(name) for name in content.offset_keys()}
    if FORMAT not in metadata and metadata.get("format") != FORMAT:
        raise ValueError(f"a safetensors file of format {metadata.get('format')!r} instead of {FORMAT!r}")
    about = json.loads(metadata[FORMAT]) if FORMAT in metadata else metadata
    if (version := str(about["layout_version"])) not in ("1", str(LAYOUT_VERSION)):
        raise ValueError(f"layout version {version} (this code reads 1 to {LAYOUT_VERSION}, newer code newer ones)")
    if verify and _file_digest(file, about["digest"]) != about["digest"]:
        raise ValueError("content that does not agree with its digest")
    if version == "1":
        return blocks, json.loads(about["facts"])
    return _joined(blocks, about["shapes"], path, os.fstat(file.fileno()).st_size), about["facts"]


def _joined(blocks, shapes, path, size) -> dict[str, torch.Tensor]:
    """Tensors of a file of `size` bytes: of `blocks`, in the file's order, those of each name in `shapes` are one."""
    content = torch.from_file(path, size=size, dtype=torch.uint8)  # a private map, as the library's is
    start, tensors = size - sum(block.nbytes for block in blocks.values()), {}
    for name, block in blocks.items():
        whole = name.rpartition("/")[0]
        if whole not in shapes:
            tensors[name] = block
        elif whole not in tensors:
            stop = start + math.prod(shapes[whole]) * block.itemsize
            tensors[whole] = content[start:stop].view(block.dtype).view(shapes[whole])
        start += block.nbytes
    return tensors
