"""One encoded video as one safetensors file: tensors, facts about them, and a digest over every byte.

What is surprising:
* The file is written here, not by `safetensors.save_file`, which wants contiguous tensors on the CPU: keys that are a
  view of a longer buffer, or on a GPU, would be copied whole. Here they pass in pieces. The library reads the file.
* The digest is the sha256 of the whole file with its own 64 digits set to "0". They stand at a fixed offset, so one
  pass over the data writes and hashes. A file that another program has written anew counts as damaged.
* A file has its name only once it is complete and on the disk. On Linux it has no name at all before that, so a killed
  process leaves nothing behind; elsewhere it can leave a `.videoxl-*.part`, which is never read.
* Tensors loaded to the CPU are a private map of the file: writing into them changes no file, and saving over the path,
  or deleting it, does not disturb them. Overwriting the bytes in place (`cp`) does: load it again then.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets

import torch
from safetensors import SafetensorError, safe_open

FORMAT = "videoxl.encoded_video"
LAYOUT_VERSION = 1
PIECE_BYTES = 8 * 2**20  # copied, hashed and written at once: little beside a video, enough for full speed
SOURCE_END_BYTES = 2**20  # read at each end of a video for its fingerprint
SAMPLED_VALUES = 64  # read of each weight for the model's fingerprint
LOAD_TRIES = 10  # a load starts anew if the file is replaced under it
MAX_HEADER_BYTES = 100_000_000  # the safetensors library reads no longer header

_HEADER_START = b'{"__metadata__":{"digest":"'
_NO_DIGEST = b"0" * 64
_DIGEST_FROM, _DIGEST_TO = len(_HEADER_START), len(_HEADER_START) + len(_NO_DIGEST)
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
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
        tensors: By name; any strides and device, also views that share storage (each is written out in full).
        facts: What JSON can hold; comes back as JSON gives it (lists for tuples).

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If the path is not a file's, or tensors or facts cannot be stored.
    """
    path = os.path.realpath(os.fsdecode(path))
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is a folder or a device: give the name of a file to save the video in")
    if not os.path.isdir(folder := os.path.dirname(path)):
        raise FileNotFoundError(f"the folder {folder} does not exist: create it, or save the video elsewhere")
    # Larger items first, as the library does: every tensor starts at a multiple of its item's size.
    names = sorted(tensors, key=lambda name: (-_checked(name, tensors[name]).element_size(), name))
    header = _header(names, tensors, facts)
    digest = hashlib.sha256(header)
    with _complete_file(path) as file:
        file.write(header)
        for name in names:
            for piece in _pieces(tensors[name].detach()):
                # Contiguous before it moves: a strided copy between devices goes through a second one. A single value
                # is contiguous with any stride, but only stride 1 can be viewed as bytes.
                piece = piece.contiguous().cpu()
                data = memoryview(piece.as_strided((piece.numel(),), (1,)).view(torch.uint8).numpy())
                digest.update(data)
                file.write(data)
        file.seek(8 + _DIGEST_FROM)
        file.write(digest.hexdigest().encode())


def load_video_file(path, *, verify: bool = True, device="cpu") -> tuple[dict[str, torch.Tensor], dict]:
    """Reads what `save_video_file` wrote.

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
            facts = _read_facts(file, path, verify)
            try:
                with safe_open(path, framework="pt", device="cpu") as content:
                    tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no iterator)
            except SafetensorError as error:
                raise _refusal(path, f"what safetensors cannot read ({error})") from error
            # The library opens the path by itself: what was checked must be what it has mapped.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return {name: tensor.to(device) for name, tensor in tensors.items()}, facts
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


def _checked(name, tensor) -> torch.Tensor:
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f'a stored tensor\'s name must be a string other than "__metadata__", got {name!r}')
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        raise ValueError(f"{name} must be a dense tensor that holds values, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be of one of {', '.join(map(str, _DTYPES))}, got {tensor.dtype}: convert it")
    return tensor


def _header(names, tensors, facts) -> bytes:
    """The file up to the data, without the digest: length (8 bytes), then JSON, padded so that the data is aligned."""
    try:
        text = json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts must be what JSON can hold (no tensors, no NaN): {error}") from error
    entries, end = {}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    metadata = {"digest": _NO_DIGEST.decode(), "format": FORMAT, "layout_version": str(LAYOUT_VERSION)}
    metadata |= {"data_bytes": str(end), "facts": text}
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"facts of {len(header)} bytes, at most {MAX_HEADER_BYTES} fit: store long lists as tensors")
    return len(header).to_bytes(8, "little") + header


def _pieces(tensor):
    """Views of a tensor, in the order of its values, each of at most `PIECE_BYTES`."""
    if tensor.nbytes <= PIECE_BYTES:
        if tensor.numel():
            yield tensor
    elif rows := PIECE_BYTES // (tensor.nbytes // tensor.shape[0]):
        yield from tensor.split(rows)
    else:
        for row in tensor:
            yield from _pieces(row)


@contextlib.contextmanager
def _complete_file(path):
    """A new file that takes the name `path` when the block ends without an error, and is gone otherwise."""
    folder = os.path.dirname(path)
    part = os.path.join(folder, f".videoxl-{os.getpid()}-{secrets.token_hex(8)}.part")
    unnamed = _open_unnamed(folder)
    file = unnamed or open(part, "xb")  # noqa: SIM115 (closed below)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if unnamed:
                # A name for the complete file; Python follows the link in /proc only if a folder is given.
                os.link(f"/proc/self/fd/{file.fileno()}", part, src_dir_fd=file.fileno(), follow_symlinks=True)
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)
        raise


def _open_unnamed(folder):
    """A file without a name in the folder, None where the system cannot make one or give it a name later."""
    if not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"):
        return None
    with contextlib.suppress(OSError):
        return os.fdopen(os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666), "w+b")


def _read_facts(file, path, verify) -> dict:
    """Checks an open file, all of it or only its form, and returns its facts."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise _refusal(path, f"{size} bytes that do not begin with a whole safetensors header")
    header = file.read(length)
    try:
        metadata = json.loads(header).get("__metadata__", {})
        found, version, stored = (metadata.get(key) for key in ("format", "layout_version", "data_bytes"))
        facts = json.loads(metadata.get("facts", "{}"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _refusal(path, "a header that is not JSON of the expected form") from error
    if found != FORMAT or not header.startswith(_HEADER_START):
        raise _refusal(path, f"a safetensors file of format {found!r} instead of {FORMAT!r}")
    if version != str(LAYOUT_VERSION):
        raise _refusal(path, f"layout version {version} (this code reads {LAYOUT_VERSION}, newer code newer ones)")
    if (held := str(size - 8 - length)) != stored:
        raise _refusal(path, f"{held} bytes of data instead of {stored} (cut short?)")
    if verify:
        digest = hashlib.sha256(start + header[:_DIGEST_FROM] + _NO_DIGEST + header[_DIGEST_TO:])
        buffer = memoryview(bytearray(PIECE_BYTES))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
        if digest.hexdigest().encode() != header[_DIGEST_FROM:_DIGEST_TO]:
            raise _refusal(path, "content that does not agree with its digest")
    return facts


def _refusal(path, found) -> ValueError:
    expected, remedy = "expected a video saved by EncodedVideo.save", "Encode the video again and save it"
    return ValueError(f"{path} is damaged or of another kind: {expected}, found {found}. {remedy}")
