"""The handler of Hugging Face Inference Endpoints: a video or image and a question go in, an answer comes out.

The service imports this file from a model repository's root, where nothing else of this package's programs exists, so
it needs no more than the repository's own model code. A request is JSON:

    {"inputs": "<base64, or data:video/mp4;base64,...>", "question": "What happens?",
     "parameters": {"max_num_frames": 64, "max_new_tokens": 128}}

and the reply `{"answer": "..."}`, or `{"error": "..."}` with what to change.

What is surprising:
* Nothing is opened by name: no path, no `file://`, no address. What comes is the content of a file, or it is refused.
* An error that the request did not cause says nothing about this machine; it is in the log.
"""

import base64
import logging
import re
import threading

import torch
from transformers import AutoModel, AutoTokenizer

# What one request may bring and ask for. Greater numbers need more memory than an endpoint may have.
MAX_BYTES = 64 * 2**20
MAX_QUESTION = 8_000  # letters
# By name: type, least and most. Booleans are no numbers here.
SAMPLING = {
    "max_num_frames": (int, 1, 512),
    "sample_fps": (float, 0.01, 60),
    "max_sample_fps": (float, 0.01, 60),
}
GENERATION = {
    "max_new_tokens": (int, 1, 1024),
    "do_sample": (bool, False, True),
    "temperature": (float, 0, 5),
    "top_p": (float, 0.001, 1),
    "top_k": (int, 1, 10_000),
    "repetition_penalty": (float, 0.1, 10),
}
FIELDS = ("inputs", "question", "parameters")
DATA = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:|[./~\\]", re.IGNORECASE)
# What would tell of this machine's folders.
PATH = re.compile(r"(?<![\w.])[/~\\][\w.-]|\b[a-z]:\\|file:", re.IGNORECASE)
REFUSED = "the model refuses this; send a whole file that plays elsewhere, and a question in plain text"
logger = logging.getLogger(__name__)


class EndpointHandler:
    """What the service makes once, and calls for every request.

    Args:
        path: The folder of the repository.
    """

    def __init__(self, path: str = ""):
        where = {"pretrained_model_name_or_path": path or ".", "trust_remote_code": True}
        self.tokenizer = AutoTokenizer.from_pretrained(**where)
        self.model = AutoModel.from_pretrained(**where, dtype="auto")
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        # The service may call from several threads, and one video at a time is what memory was planned for.
        self.lock = threading.Lock()

    def __call__(self, data: dict) -> dict:
        """Answers a request; see the top of this file."""
        try:
            source, question, sampling, generation = read_request(data)
        except ValueError as error:
            return {"error": str(error)}
        try:
            with self.lock:
                answer = self.model.chat(
                    source,
                    self.tokenizer,
                    question,
                    return_history=False,
                    progress=False,
                    generation_config=generation,
                    **sampling,
                )
        except ValueError as error:  # the request's fault: a damaged file, say, or more tokens than the model takes
            logger.warning("a request was refused", exc_info=True)
            return {"error": REFUSED if PATH.search(str(error)) else " ".join(str(error).split())}
        except Exception:
            logger.exception("a request failed")
            return {"error": "the request failed on this side; a shorter video or fewer frames may help"}
        return {"answer": answer}


def read_request(data) -> tuple[bytes, str, dict, dict]:
    """The video or image, the question, and the settings of sampling and generation.

    Raises:
        ValueError: With what is missing, unknown or out of range; it repeats names that came, not contents.
    """
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object with {', '.join(FIELDS)}, got {type(data).__name__}")
    if unknown := sorted(str(name)[:40] for name in data if name not in FIELDS):
        raise ValueError(f"unknown: {', '.join(unknown[:5])}; expected {', '.join(FIELDS)}")
    question = data.get("question")
    if not isinstance(question, str) or not 0 < len(question.strip()) <= MAX_QUESTION:
        raise ValueError(f'"question" must be a text of 1 to {MAX_QUESTION} letters')
    settings = data.get("parameters")
    if not isinstance(settings, dict | None):
        raise ValueError(f'"parameters" must be an object, got {type(settings).__name__}')
    known, chosen = SAMPLING | GENERATION, {}
    for name, value in (settings or {}).items():
        if name not in known:
            raise ValueError(f'"parameters" has no {str(name)[:40]}; it takes {", ".join(known)}')
        chosen[name] = _in_range(name, value, *known[name])
    sampling = {name: value for name, value in chosen.items() if name in SAMPLING}
    return read_content(data.get("inputs")), question, sampling, {k: v for k, v in chosen.items() if k in GENERATION}


def _in_range(name, value, kind, least, most):
    # None means what it means in `chat`: frames spread over the whole video.
    if value is None and name in ("sample_fps", "max_sample_fps"):
        return None
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool) or not least <= value <= most:
        between = "true or false" if kind is bool else f"a number from {least} to {most}"
        raise ValueError(f'"{name}" must be {between}{", without a fraction" * (kind is int)}')
    return value


def read_content(inputs) -> bytes:
    """The content of the file that a request brings: bytes, base64, or a `data:` address.

    Raises:
        ValueError: If it is anything else, such as a path or an address, or too large.
    """
    if isinstance(inputs, str):
        head = DATA.match(inputs)
        if head is None and ADDRESS.match(inputs):
            raise ValueError('"inputs" must be the content of a file; paths and addresses are not opened')
        # Before it is decoded, which would take as much memory again.
        _require_size(len(inputs) * 3 // 4)
        try:
            text = "".join(inputs[head.end() if head else 0 :].split())
            inputs = base64.b64decode(text, validate=True)
        except ValueError:
            raise ValueError('"inputs" is no valid base64') from None
    if not isinstance(inputs, (bytes, bytearray)) or not inputs:
        raise ValueError('"inputs" must be a video or image file in base64, or data:video/mp4;base64,…')
    _require_size(len(inputs))
    return bytes(inputs)


def _require_size(count):
    if count > MAX_BYTES:
        raise ValueError(f'"inputs" may have {MAX_BYTES // 2**20} MiB, got {-(-count // 2**20)}; send a shorter video')
