"""Questions and answers in files: JSON lines, one reader and one writer for all programs, and how one video is asked.

A line of questions is `{"video": ..., "question": ..., "id": ...}`, where `id` is optional; a line of answers is the
same with `"answer"` or `"error"` and whatever else is known of it.

What is surprising:
* While a run answers, each video has a file of its own beside the output, which is replaced as a whole with every
  answer. Whoever is killed, on whatever machine, loses the answer that it was about to give and nothing else. The
  output is joined from these files, in the order of the questions.
* Python ends lines at letters that JSON does not (U+2028, U+0085), so `str.splitlines` has no place here. These are
  read wherever they stand, and written escaped, for the sake of other programs.
* JSON can escape half of a pair of surrogates, which is no letter. Paths may have such halves (that is how Python
  names files that are not UTF-8), texts may not.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
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
    """Replaces a file as a whole, so that it is never half-written.

    Raises:
        OSError: With the file's name where the disk is full, say. What was there before stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, f"cannot write {path}: {error.strerror}") from error


class Answers:
    """Answers on disk: what this and earlier runs have, and the file that puts them in order.

    Args:
        out: The file of answers. Those that are not in it yet lie beside it, in a folder with a file a video.
        questions: All questions, in their order.
    """

    def __init__(self, out: Path, questions: list[Question]):
        self.out, self.questions = out, questions
        self.settings_file = out.with_name(f"{out.name}.settings.json")
        self.parts = out.with_name(f"{out.name}.parts")

    def known(self) -> dict[tuple[str, str], dict]:
        """The newest entry for each key, an answer before an error."""
        entries = {}
        for file in [self.out] * self.out.is_file() + sorted(self.parts.glob("*.jsonl")):
            for entry in answers_in(file):
                key = (entry.get("video"), entry.get("question"))
                if "answer" in entry or "answer" not in entries.get(key, {}):
                    entries[key] = entry
        return entries

    def to_ask(self) -> list[list[Question]]:
        """The questions that have no answer yet, by video, in the order of each video's first."""
        answered = {key for key, entry in self.known().items() if "answer" in entry}
        videos = {}
        for question in self.questions:
            if question.key not in answered:
                answered.add(question.key)
                videos.setdefault(question.path, []).append(question)
        return list(videos.values())

    def part(self, questions: list[Question]) -> Path:
        """The file for the answers about a video, in a folder that exists."""
        self.parts.mkdir(exist_ok=True)
        return self.parts / f"{hashlib.sha256(os.fsencode(questions[0].path)).hexdigest()[:32]}.jsonl"

    def collect(self) -> tuple[int, int]:
        """Writes the file of answers from all that is known, and removes the files of single videos.

        Returns:
            The number of lines with an answer, and with an error.
        """
        known = self.known()
        lines, counts = [], {"answer": 0, "error": 0}
        for question in self.questions:
            if entry := known.get(question.key):
                lines.append(json_line({**entry, "id": question.id}))
                counts["answer" if "answer" in entry else "error"] += 1
        replace_file(self.out, "".join(lines))
        shutil.rmtree(self.parts, ignore_errors=True)
        return counts["answer"], counts["error"]

    def settle(self, settings: dict) -> None:
        """Keeps the settings, or checks that the answers that exist were made with the same.

        Raises:
            ValueError: If they were not, or answer other questions.
        """
        exists = self.out.exists() or self.parts.exists()
        if exists and not self.settings_file.is_file():
            raise ValueError(f"{self.out} exists, and was not written by this program; choose another --out")
        known = self.known() if exists else {}
        if any("answer" in entry for entry in known.values()):
            try:
                before = read_json(self.settings_file)
            except ValueError as error:
                raise ValueError(f"{self.settings_file} is damaged; choose another --out") from error
            if changed := sorted(key for key in settings.keys() | before if settings.get(key) != before.get(key)):
                raise ValueError(
                    f"{self.out} has answers of another {changed[0]}: {before.get(changed[0])} then, "
                    f"{settings.get(changed[0])} now; use the same settings, or another --out"
                )
            if others := known.keys() - {question.key for question in self.questions}:
                raise ValueError(
                    f"{self.out} answers {len(others)} questions that are no longer asked, such as {min(others)}, and "
                    "would lose them; choose another --out"
                )
        else:  # whatever has gone wrong before is tried again, so it binds nobody
            replace_file(self.settings_file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def open_answers(questions: str, out: str, videos: str | None) -> Answers:
    """The answers to a file of questions, as a command line names them.

    Args:
        questions: The file of questions.
        out: The file of answers; it need not exist.
        videos: The folder of the videos; None is that of the questions.

    Raises:
        FileNotFoundError, ValueError: With what to do.
    """
    source, target = Path(questions), Path(out).absolute()
    if target.is_dir() or target == source.absolute():
        raise ValueError(f"--out {out} must be a file of its own")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"--out {out}: there is no folder {target.parent}")
    return Answers(target, read_questions(source, videos_folder(questions, videos)))


def videos_folder(questions: str, videos: str | None) -> Path:
    """The folder that the videos' paths are relative to."""
    return Path(videos or Path(questions).parent)


def settings_of(said: dict, model: str, videos: Path) -> dict:
    """What answers depend on: what was said of frames, attention and answers, the model with its weights, the videos.

    Programs that name the same settings alike can go on with each other's answers.
    """
    settings = {**said, "model": model, "videos": str(videos.resolve())}
    if (folder := Path(model)).is_dir():
        settings["model"] = str(folder.resolve())
        states = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
        settings["weights"] = [f"{name}: {state.st_size} bytes of {state.st_mtime:.0f}" for name, state in states]
    return settings


def keep_answers(
    file: Path, questions: list[Question], ask: Callable[[list[Question]], Iterable[dict]]
) -> Iterator[dict]:
    """Asks about one video what its file has no answer to; each entry is in the file before it is handed on.

    Args:
        file: See `Answers.part`.
        questions: About one video.
        ask: Takes such questions, and gives an entry for each, see `ask_video`.
    """
    kept = [entry for entry in answers_in(file) if "answer" in entry] if file.exists() else []
    yield from kept
    answered = {(entry["video"], entry["question"]) for entry in kept}
    if left := [question for question in questions if question.key not in answered]:
        for entry in ask(left):
            kept.append(entry)
            replace_file(file, "".join(map(json_line, kept)))
            yield entry


class _Count:
    """Counts the tokens of an answer; the first call brings the prompt."""

    tokens = -1

    def put(self, value):
        self.tokens += 1

    def end(self):
        pass


def ask_video(model, tokenizer, questions: list[Question], max_new_tokens: int, **encoding) -> Iterator[dict]:
    """Encodes a video once and gives an entry a question; what goes wrong is an entry, too.

    Args:
        model, tokenizer: As `Auto*` loads them.
        questions: About one video.
        max_new_tokens: Length of an answer. It is greedy, so the same question gets the same answer.
        encoding: For `encode_video`.
    """
    settings = {"return_history": False, "generation_config": {"do_sample": False, "max_new_tokens": max_new_tokens}}
    encoded = reason = None
    try:
        encoded = model.encode_video(questions[0].path, tokenizer, **encoding)
    except Exception as error:  # of whatever kind: one bad video must not stop the rest
        reason = describe_error(error)
    for question in questions:
        said, count, started = {"error": reason}, _Count(), time.perf_counter()
        if encoded is not None:
            try:
                answer = model.chat(encoded, tokenizer, question.text, streamer=count, **settings)
                seconds = round(time.perf_counter() - started, 3)
                said = {"answer": answer, "tokens": max(count.tokens, 0), "seconds": seconds}
            except Exception as error:
                said = {"error": describe_error(error)}
        yield question.entry | said


def describe_error(error: Exception) -> str:
    """One line for an answer that is none."""
    return " ".join(f"{type(error).__name__}: {error}".split())
