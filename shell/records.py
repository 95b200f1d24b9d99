"""Questions and answers in files: JSON lines, one reader and one writer for all programs.

A line of questions is `{"video": ..., "question": ..., "id": ...}`, where `id` is optional; a line of answers is the
same with `"answer"` or `"error"` and whatever else is known of it.
"""

import json
import os
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


def json_line(entry: dict) -> str:
    """An object as a line of a file."""
    return json.dumps(entry, ensure_ascii=False) + "\n"


def json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    """The objects of a file with one a line, each with the number of its line; empty lines are left out.

    Raises:
        ValueError: With the line, if one holds something else.
    """
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}); expected one object a line") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(entry).__name__}")
        yield number, entry


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
                raise ValueError(f'{where}: "{name}" must be a text that is not empty, got {entry.get(name)!r}')
        given = entry.get("id", number)
        if isinstance(given, bool) or not isinstance(given, (str, int)):
            raise ValueError(f'{where}: "id" must be a text or a whole number, got {given!r}')
        if given in seen:
            raise ValueError(f'{where}: "id" {given!r} is that of line {seen[given]}, too')
        seen[given] = number
        yield Question(given, entry["video"], entry["question"], str(videos / entry["video"]))


def answers_in(file: Path) -> Iterator[dict]:
    """The entries of a file of answers; a last line that a killed process left unfinished is not there.

    Raises:
        ValueError: With the line, if another one is damaged.
    """
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("not an object")
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                return
            raise ValueError(f"{file}, line {number} is damaged ({error}): mend or remove it") from error
        yield entry


def replace_file(path: Path, text: str) -> None:
    """Replaces a file as a whole, so that it is never half-written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
