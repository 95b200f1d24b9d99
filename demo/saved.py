"""Saved videos that a visitor brings: looked at closely before anything of them is read.

What is surprising:
* What is expected is not written down here: the page's own model saves a video of a few frames, and a visitor's file
  must have the header of that one, but for lengths. So no other model's file passes, nor other prefill settings.
* Only then it is loaded as any file is: digest, weights and model are compared.
* Nothing that the file says about where its video lies is used: a visitor has no paths on this machine.
"""

import json
import math
import os
import tempfile
from pathlib import Path

import torch

# Facts about a video, and a few lines for each tensor: nothing of the model's size is in a header.
MAX_HEADER_BYTES = 4 * 2**20
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "I8": 1}
# Frames of the video that shows what a file looks like; the last of them are a group that is not complete.
EXAMPLE_FRAMES = 9
# Entries that say which model made the video, and how: they must be this model's.
SAME_FACTS = ("model", "weights", "prefill", "kind")


class SavedVideos:
    """Saves a visitor's video, and loads one that a visitor brings.

    Args:
        model, tokenizer: The page's.
        max_frames: Frames that a video may have.
    """

    def __init__(self, model, tokenizer, max_frames: int):
        self.model, self.tokenizer, self.max_frames = model, tokenizer, max_frames
        self._form = None

    def save(self, video, path: Path) -> None:
        """Writes a file that does not say where the video lies on this machine."""
        video.save(path, source="")

    def load(self, path: str):
        """Loads a file that nobody has reason to trust.

        Raises:
            ValueError: If it is not one that this page could have written.
        """
        try:
            tensors, facts = read_header(path)
            self._check(tensors, facts)
            video = self.model.load_video(path, self.tokenizer, source="")
            ids = video.input_ids
            _require(int(ids.min()) >= 0 and int(ids.max()) < self.model.config.text_config.vocab_size, "its text")
        except (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a video that this page has saved, or is damaged ({error}). Take the file as it was "
                "downloaded from a page with the same model, or give the video itself."
            ) from error
        return video

    def _check(self, tensors: dict, facts: dict) -> None:
        """Compares names, shapes, dtypes and facts with those of a file of this model's."""
        if self._form is None:
            self._form = self._example()
        expected, own_facts = self._form
        _require(set(tensors) - {"tail"} == set(expected) - {"tail"}, "names of tensors")
        length = tensors["input_ids"][1][0]
        limit = self.model.plan(num_frames=self.max_frames).total_tokens
        _require(0 < length <= limit, f"{length} tokens, of at most {limit}")
        for name, (dtype, shape) in tensors.items():
            # Of keys and values [1, heads, tokens, head size] the tokens vary, else what comes first.
            varies = 2 if len(shape) == 4 and name != "tail" else 0
            other_dtype, other = expected[name]
            fits = len(shape) == len(other) and all(
                size == wanted or number == varies
                for number, (size, wanted) in enumerate(zip(shape, other, strict=False))
            )
            _require(dtype == other_dtype and fits and 0 < shape[varies] <= length, f"the form of {name:.40}")
        for name in SAME_FACTS:
            _require(facts[name] == own_facts[name], f"{name}, which differs from that of this page")
        times = facts["timestamps"]
        _require(
            0 < len(times) <= self.max_frames
            and all(type(seconds) in (int, float) and 0 <= seconds < math.inf for seconds in times)
            and all(earlier < later for earlier, later in zip(times, times[1:], strict=False)),
            "times",
        )
        _require(all(type(facts[name]) in (int, float) for name in ("start", "duration")), "its length")
        (groups,) = facts["videos"]
        places = [place for group in groups for place in group]
        _require(all(len(group) == 3 for group in groups) and all(type(place) is int for place in places), "groups")
        _require(places == sorted(places) and places[0] >= 0 and places[-1] <= length, "groups")
        # As many groups as its frames make, as in the example.
        _require(len(groups) == -(-len(times) // self.model.config.frames_per_group), "groups")
        _require(len(facts["whole"]) == 2 and all(0 <= size <= length for size in facts["whole"]), "groups")

    def _example(self) -> tuple[dict, dict]:
        side = self.model.config.vision_config.image_size
        frames = torch.zeros(EXAMPLE_FRAMES, side, side, 3, dtype=torch.uint8)
        times = [float(number) for number in range(EXAMPLE_FRAMES)]
        video = self.model.encode_video(frames, self.tokenizer, timestamps=times, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "example.videoxl"
            self.save(video, path)
            return read_header(path)


def read_header(path) -> tuple[dict[str, tuple[str, list[int]]], dict]:
    """Dtype and shape of every tensor of a saved video, and its facts; nothing else is read.

    Raises:
        ValueError: If the header is too long, or does not account for every byte of the file exactly once.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        _require(2 <= length <= min(MAX_HEADER_BYTES, size - 8), f"a header of {length} bytes")
        entries = json.loads(file.read(length))
    (about,) = entries.pop("__metadata__").values()
    about = json.loads(about)
    tensors, pieces, end = {}, {}, 0
    for name, entry in sorted(entries.items(), key=lambda each: each[1]["data_offsets"]):
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        _require(all(type(number) is int and number >= 0 for number in (*shape, start, stop)), "sizes")
        _require(start == end and stop - start == BYTES[dtype] * math.prod(shape), f"the place of {name:.40}")
        whole, end = name.rpartition("/")[0], stop
        if whole in about["shapes"]:
            # A tensor in pieces: `shapes` says how it is put together.
            tensors.setdefault(whole, (dtype, about["shapes"][whole]))
            pieces[whole] = pieces.get(whole, 0) + stop - start
            _require(tensors[whole][0] == dtype, f"the form of {whole:.40}")
        else:
            tensors[name] = dtype, shape
    for name, found in pieces.items():
        dtype, shape = tensors[name]
        _require(all(type(number) is int and number >= 0 for number in shape), "sizes")
        _require(found == BYTES[dtype] * math.prod(shape), f"the pieces of {name:.40}")
    _require(end == size - 8 - length, "its size")
    return tensors, about["facts"]


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(f"unexpected: {what}")
