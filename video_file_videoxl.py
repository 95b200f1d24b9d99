"""The file of an `EncodedVideo`: tensors, facts about them, and a digest over every byte, in one safetensors file.

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
import tempfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .witness_videoxl import canonical

FORMAT = "videoxl.encoded_video"
# Version 1 had every tensor in one piece, and an entry of metadata for each of what is now one; version 2 held nothing
# packed.
LAYOUT_VERSION = 3
HASHED_AT_ONCE = 8 * 2**20  # bytes read at a time for digests
SOURCE_END_BYTES = 2**20  # read at each end of a video for its fingerprint
LOAD_TRIES = 10  # a load starts anew if the file is replaced under it

_NO_DIGEST = "0" * 64
# What reading a damaged header can lead to.
_DAMAGE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def save_video_file(path, tensors: dict[str, torch.Tensor], facts: dict) -> None:
    """Writes tensors and facts as one file that is either complete or not there.

    Args:
        path: Where to; an existing file is replaced once the new one is complete. A link is followed.
        tensors: By name; any strides and device. No two may overlap in memory.
        facts: What JSON can hold; comes back as JSON gives it (lists for tuples).

    Raises:
        FileNotFoundError, OSError, ValueError: If there is no such folder, the file cannot be written, or the path,
            the tensors or the facts are none that a file can have.
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
        verify: Read the whole file once and compare its digest. False is instant at any size, and unchecked but for
            the header's form and the file's size.
        device: Where the tensors go. On "cpu" they stay backed by the file and take memory as they are read.

    Returns:
        Tensors by name, and the facts.

    Raises:
        FileNotFoundError, ValueError: If there is no such file, or it is damaged, cut short, of another kind or of
            another layout version.
    """
    if os.path.isdir(path := os.fsdecode(path)):
        raise ValueError(f"{path} is a folder: give the file that EncodedVideo.save wrote")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no saved video {path}: check the path, or encode the video and save it there")
    for _ in range(LOAD_TRIES):
        with open(path, "rb") as file:
            try:
                (tensors, facts), refused = _read(file, path, verify), None
            except (SafetensorError, *_DAMAGE) as error:
                refused = error
            # The library opens the path by itself: what was checked must be what it has mapped.
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                continue
        if refused is None:
            return {name: tensor.to(device) for name, tensor in tensors.items()}, facts
        raise ValueError(
            f"{path} is damaged or of another kind: expected a video saved by EncodedVideo.save, found {refused}. "
            "Encode the video again and save it"
        ) from refused
    raise ValueError(f"{path} was replaced {LOAD_TRIES} times while it was read: load it when it is no longer written")


def source_fingerprint(path) -> dict | None:
    """Size, and sha256 of the size and of the first and last MiB, of a file; None where there is no file."""
    if not path or not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode() + file.read(SOURCE_END_BYTES))
        file.seek(max(size - SOURCE_END_BYTES, 0))
        digest.update(file.read(SOURCE_END_BYTES))
    return {"size": size, "sha256": digest.hexdigest()}


def require_match(facts: dict, expected: dict, what: str) -> None:
    """Compares the facts of a file with what is asked for.

    Args:
        facts: What the file says.
        expected: What must agree, nested like `facts`; None at any depth asks for nothing.
        what: What is being loaded, for the message: a ValueError with both values of every entry that differs.
    """
    if differing := "; ".join(_mismatches(facts, expected, "")):
        remedy = "Load it with the model, settings and video it was made with, or encode the video again and save it"
        raise ValueError(f"{what} does not fit: {differing}. {remedy}")


def _mismatches(facts, expected, prefix):
    for key, asked in expected.items():
        stored = facts.get(key)
        if isinstance(asked, dict) and isinstance(stored, dict):
            yield from _mismatches(stored, asked, f"{prefix}{key}.")
        elif asked is not None and stored != json.loads(canonical(asked)):
            held, asked = (text if len(text) <= 80 else f"{text[:77]}..." for text in map(canonical, (stored, asked)))
            yield f"{prefix}{key}: the file has {held if key in facts else 'nothing'}, asked for {asked}"


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
        raise ValueError(f"a safetensors file of format {metadata.get('format')!r:.200} instead of {FORMAT!r:.200}")
    about = json.loads(metadata[FORMAT]) if FORMAT in metadata else metadata
    if (version := str(about["layout_version"])) not in map(str, range(1, LAYOUT_VERSION + 1)):
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
