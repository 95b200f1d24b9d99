"""Pictures in place of a video file: those of a folder, or several named one after the other."""

import os
import re
from pathlib import Path

SUFFIXES = (".avif", ".bmp", ".heic", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def pictures_of(paths: list[str]) -> list[str] | None:
    """The pictures that a folder, or several paths, stand for; None for one file, which is a video or an image.

    Raises:
        ValueError: If there is anything else among them.
    """
    if len(paths) == 1 and not os.path.isdir(paths[0]):
        return None
    if len(paths) == 1:
        files = [path for path in Path(paths[0]).iterdir() if not path.name.startswith(".")]
        # As people number them: 2 comes before 10.
        key = [(_numbered(path.name), str(path)) for path in files]
        paths, where = [path for _, path in sorted(key)], f"{paths[0]} is a folder, and "
    else:
        where = "of several files each must be a picture, and "
    others = [path for path in paths if not path.lower().endswith(SUFFIXES) or os.path.isdir(path)]
    if others or not paths:
        found = f"{Path(others[0]).name} is none" if others else "it is empty"
        raise ValueError(f"{where}{found}: expected one video file, or pictures only ({', '.join(SUFFIXES)})")
    return paths


def _numbered(name: str) -> list:
    return [(1, int(part), "") if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name)]


def times_of(count: int, fps: float | None, timestamps: list[float] | None) -> list[float]:
    """Seconds of so many pictures; a second each where nothing else is said. ValueError if there are not as many."""
    if timestamps is None:
        return [number / (fps or 1) for number in range(count)]
    if fps is not None:
        raise ValueError("--fps and --timestamps say the same in two ways; leave one of them out")
    if len(timestamps) != count:
        raise ValueError(f"--timestamps has {len(timestamps)} times for {count} pictures; give one for each")
    return timestamps
