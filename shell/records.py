"""Questions and answers in files: JSON lines, one reader and one writer for all programs.

A line of questions is `{"video": ..., "question": ..., "id": ...}`, where `id` is optional; a line of answers is the
same with `"answer"` or `"error"` and whatever else is known of it.

What is surprising:
* Python ends lines at letters that JSON does not (U+2028, U+0085), so `str.splitlines` has no place here. These are
  read wherever they stand, and written escaped, for the sake of other programs.
* JSON can escape half of a pair of surrogates, which is no letter. Paths may have such halves (that is how Python
  names files that are not UTF-8), texts may not.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """A line of the questions: what it says, and the video's place on this machine."""

    id: str | int
    video: str
    text: str
    path: str

    @property
    def key(self) -> tuple[str, str]:
        """Lines with the same key have the same answer."""
        return self.video, self.text

    @property
    def entry(self) -> dict:
        """What a line of answers says about its question."""
        return {"id": self.id, "video": self.video, "question": self.text}


def files_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over files in the given order: how results say which weights they are about."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


# Letters that end lines for some programs, and halves of letters, which UTF-8 does not have.
_ESCAPED = re.compile("[\x85\u2028\u2029\ud800-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")
_MARK = "\ufeff".encode()  # a byte order mark, also of a file that was appended to another


def json_line(entry: dict) -> str:
    """An object as a line of a file."""
    text = json.dumps(entry, ensure_ascii=False)
    return _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def json_lines(path: Path, cut_off: bool = False) -> Iterator[tuple[int, dict]]:
    """The objects of a file with one a line, each with the number of its line; empty lines are left out.

    Args:
        path: The file.
        cut_off: Whether a last line without its end is left out where it is no object: a process was killed there.

    Raises:
        ValueError: With the line, if one holds something else, or is not in UTF-8.
    """
    number = 0
    with open(path, "rb") as file:
        for piece in file:
            for line in piece.splitlines():  # of bytes: at line feeds and carriage returns alone
                number += 1
                line = line.removeprefix(_MARK)
                if not line.strip():
                    continue
                try:
                    entry = _decoded(line, f"{path}, line {number}", "damaged" if cut_off else "not JSON")
                    if not isinstance(entry, dict):
                        kind = type(entry).__name__
                        raise ValueError(f"{path}, line {number}: expected an object, got {kind}")
                except ValueError:
                    if cut_off and not piece.endswith((b"\n", b"\r")):
                        return
                    raise
                yield number, entry


def read_json(path: Path):
    """What a file of JSON holds, with a byte order mark or without.

    Raises:
        ValueError: With the line, if it is no JSON or not in UTF-8.
    """
    return _decoded(Path(path).read_bytes().removeprefix(_MARK), f"{path}")


def _decoded(data: bytes, where: str, fault: str = "not JSON"):
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = "" if ", line " in where else f", line {data.count(10, 0, error.start) + 1}"
        raise ValueError(
            f"{where}{line} is not in UTF-8 (byte {data[error.start]:#04x}): save the file as UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:
        other = "; its zero bytes look like UTF-16: save the file as UTF-8" if b"\0" in data else ""
        raise ValueError(f"{where} is {fault} ({error}){other}") from error


def read_questions(path: Path, videos: Path) -> list[Question]:
    """Reads a file of questions.

    Args:
        path: The file.
        videos: The folder that the videos' paths are relative to.

    Raises:
        FileNotFoundError: If none of the videos exists.
        ValueError: With the line, if one is not as it must be.
    """
    questions = list(_questions(path, videos))
    if not questions:
        raise ValueError(f"{path} has no questions")
    missing = dict.fromkeys(question.path for question in questions if not os.path.exists(question.path))
    if len(missing) == len({question.path for question in questions}):
        raise FileNotFoundError(f"none of the videos exists, not even {next(iter(missing))}; does --videos fit?")
    return questions


def _questions(path, videos) -> Iterable[Question]:
    seen = {}
    for number, entry in json_lines(path):
        where = f"{path}, line {number}"
        for name in ("video", "question"):
            if not isinstance(entry.get(name), str) or not entry[name].strip():
                raise ValueError(f'{where}: "{name}" must be a text that is not empty, got {entry.get(name)!r:.200}')
        if half := _HALF.search(entry["question"]):
            raise ValueError(f'{where}: "question" has half of a letter (\\u{ord(half[0]):04x}): mend its escapes')
        given = entry.get("id", number)
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise ValueError(f'{where}: "id" must be a text or a whole number, got {given!r:.200}')
        if given in seen:
            raise ValueError(f'{where}: "id" {given!r:.200} is that of line {seen[given]}, too')
        seen[given] = number
        yield Question(given, entry["video"], entry["question"], str(videos / entry["video"]))


def answers_in(file: Path) -> Iterator[dict]:
    """The entries of a file of answers; a last line that a killed process left unfinished is not there.

    Raises:
        ValueError: With the line, if another one is damaged.
    """
    for _, entry in json_lines(file, cut_off=True):
        yield entry


def replace_file(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that it is never half-written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
