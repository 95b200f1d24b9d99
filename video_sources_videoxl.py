"""What a path leads to: a video file, a GIF, a folder of numbered pictures; which frames of it, and who reads them.

What is surprising:
* Frames that were chosen several times are decoded once.
* A GIF read as "gif" shows each of its frames for a second, as the public VideoChat-Flash code has it; read as "file",
  for as long as it says.
* A folder stores no times. The public VideoChat-Flash code takes its pictures to be a second apart, and three to the
  second where the path contains "tvqa" (that data set's frames); so does this.
* Pictures are ordered by the number at the end of their names, not alphabetically, and numbers may be missing.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from .frame_sampling_videoxl import choose_frames, choose_numbered_frames
from .image_processing_videoxl import load_image
from .video_decoding_videoxl import FrameReader, VideoDecodeError, VideoIndex, read_index

READINGS = ("file", "gif", "folder")
# Endings of the pictures; other files in the folder are left alone.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
# Pictures per second, by what the path contains; the first that fits counts.
FOLDER_RATES = (("tvqa", 3.0), ("", 1.0))

_NUMBER = re.compile(r"(\d+)\.\w+$")


def list_pictures(folder: str) -> list[str]:
    """The paths of a folder's pictures, in the order of their numbers.

    Raises:
        FileNotFoundError: No such folder.
        VideoDecodeError: A file, or a folder without numbered pictures.
    """
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{folder}: no such folder (looked from {os.getcwd()}).")
    if not os.path.isdir(folder):
        raise VideoDecodeError(
            f"{folder} is a file, expected a folder of pictures. For a video file the video_read_type is 'decord'."
        )
    names = [name for name in os.listdir(folder) if name.lower().endswith(PICTURE_SUFFIXES) and name[0] != "."]
    numbers = {name: _NUMBER.search(name) for name in names}
    if not names or (unnumbered := sorted(name for name in names if numbers[name] is None)):
        found = f"{unnumbered[0]} has none" if names else "there is no picture in it"
        raise VideoDecodeError(
            f"{folder}: expected pictures whose names end in their number, such as frame_1.jpg; {found}. Rename them, "
            "or pass the frames as a list of PIL images with timestamps."
        )
    # The text in front of the number only orders pictures of the same number.
    ordered = sorted(names, key=lambda name: (int(numbers[name][1]), name))
    return [os.path.join(folder, name) for name in ordered]


def folder_rate(folder: str) -> float:
    """How many of a folder's pictures are a second, see `FOLDER_RATES`."""
    return next(rate for part, rate in FOLDER_RATES if part in folder)


def _read(paths: Sequence[str], seconds: Sequence[float], wanted: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
    for place in wanted:
        yield np.array(load_image(paths[place])), seconds[place]


def open_pictures(paths: Sequence[str], seconds: Sequence[float], wanted: Sequence[int]) -> FrameReader:
    """The reader of the pictures at positions `wanted`: uint8 [H, W, 3], and the second of each."""
    return partial(_read, paths, seconds, wanted)


@dataclass(frozen=True)
class SourcePlan:
    """Which frames of a path are read, and how.

    Attributes:
        read: Gives the chosen frames.
        seconds: Of the chosen frames; some come several times.
        start: Seconds at which the part begins that they are from.
        duration: Seconds of that part.
        damage: What is wrong with a file, if its packets show it.
    """

    read: FrameReader
    seconds: list[float]
    start: float
    duration: float
    damage: str | None = None


def plan_path(
    path: str,
    read_as: str,
    open_file: Callable[[str, VideoIndex, Sequence[int]], FrameReader],
    rules: dict[str, Any],
) -> SourcePlan:
    """Chooses frames of what a path leads to.

    Args:
        path: Of a local file or folder.
        read_as: One of `READINGS`.
        open_file: A decoder, see `BACKENDS`.
        rules: Keyword arguments of `choose_frames`.

    Raises:
        FileNotFoundError, ValueError, VideoDecodeError: If there is nothing that can be read, or rules do not fit.
    """
    damage = None
    if read_as == "folder":
        pictures, rate = list_pictures(path), folder_rate(path)
        times = [number / rate for number in range(len(pictures))]
        choice = choose_numbered_frames(len(pictures), rate, **rules)
        duration, opener = choice.seconds, partial(open_pictures, pictures, times)
    else:
        index = read_index(_local_file(path))
        if read_as == "gif":
            times = [float(number) for number in range(len(index.times))]
            index = replace(index, times=times, rate=1.0, duration=float(len(times)))
        times, damage = index.times, index.damage
        choice = choose_frames(times, index.duration, index.rate, **rules)
        whole = rules["sampler"].mode == "fps" and rules["start"] is None and rules["end"] is None
        duration, opener = index.duration if whole else choice.seconds, partial(open_file, path, index)
    counts = Counter(choice.indices)
    read = opener(list(counts))
    if len(counts) < len(choice.indices):
        read = partial(_read_again, read, {times[place]: count for place, count in counts.items()})
    return SourcePlan(read, [times[place] for place in choice.indices], choice.start, duration, damage)


def _read_again(read: FrameReader, counts: dict[float, int]) -> Iterator[tuple[np.ndarray, float]]:
    with closing(read()) as reader:
        for pixels, second in reader:
            # A damaged file may give another frame than the chosen one.
            for _ in range(counts.get(second, 1)):
                yield pixels, second


def _local_file(path: str) -> str:
    if not os.path.exists(path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", path):
            raise ValueError(f"{path} is an address; only local files are opened. Download it and pass the path.")
        raise FileNotFoundError(f"{path}: no such video file (looked from {os.getcwd()}).")
    if os.path.isdir(path):
        raise VideoDecodeError(
            f"{path} is a folder, expected a video file. Pass its frames as a list of PIL images, or, for numbered "
            "pictures, media_dict={'video_read_type': 'img'}."
        )
    if not os.path.isfile(path):
        raise VideoDecodeError(f"{path} is not a regular file; expected a video file.")
    if os.path.getsize(path) == 0:
        raise VideoDecodeError(f"{path} is empty (0 bytes), expected a video file. Record or copy it again.")
    return path
