"""`cli.py batch`: many questions about many videos: in order, once each, through errors, kills and a full disk."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import one_line_error
from test_cli import cli  # noqa: F401 (a fixture)
from videoxl.shell import batch as cli_batch
from videoxl.shell.batch import Clock, Video
from videoxl.shell.records import Answers, Question, answers_in, json_line, keep_answers, read_questions, replace_file

QUICK = ["--max-new-tokens", "4", "--max-num-frames", "8"]
LINES = 120
QUESTIONS = [
    {"video": "a.mp4", "question": "What moves?"},
    {"video": "b.mp4", "question": "What moves?"},
    {"video": "broken.mp4", "question": "What moves?", "id": "no video"},
    {"video": "a.mp4", "question": "Which colour?", "id": "colour"},
    {"video": "b.mp4", "question": "What moves?", "id": "again"},
]


@pytest.fixture
def folder(clips, tmp_path):
    """A folder with two videos, a broken one, and questions about them."""
    for path in clips:
        (tmp_path / Path(path).name).write_bytes(Path(path).read_bytes())
    (tmp_path / "broken.mp4").write_text("no video")
    ask(tmp_path, QUESTIONS)
    return tmp_path


def ask(folder, questions):
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions))


def answers(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "answers")))


def test_answers_come_in_order_and_are_not_asked_again(cli, folder):  # noqa: F811
    arguments = ["batch", folder / "questions.jsonl", "--out", folder / "answers.jsonl", *QUICK]
    done = cli(*arguments)
    assert done.returncode == 3, done.stderr
    assert done.stdout == ""
    assert "4 questions about 3 videos, 1 of 5 lines" in done.stderr
    first = answers(folder)
    assert [entry["id"] for entry in first] == [1, 2, "no video", "colour", "again"]
    assert [(entry["video"], entry["question"]) for entry in first] == [
        (line["video"], line["question"]) for line in QUESTIONS
    ]
    assert first[2]["error"].startswith("VideoDecodeError: ") and "answer" not in first[2]
    assert all(isinstance(first[line]["answer"], str) and "error" not in first[line] for line in (0, 1, 3, 4))
    assert first[4] == {**first[1], "id": "again"}
    assert files(folder) == ["answers.jsonl", "answers.jsonl.settings.json"]

    # The broken video is mended and a line is new; the rest is not touched.
    (folder / "broken.mp4").write_bytes((folder / "a.mp4").read_bytes())
    ask(folder, [*QUESTIONS, {"video": "b.mp4", "question": "Where?"}])
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    assert "2 questions about 2 videos" in done.stderr
    second = answers(folder)
    assert second[:2] + second[3:5] == first[:2] + first[3:]
    assert second[2]["answer"] == first[0]["answer"] and "answer" in second[5]

    done = cli(*arguments[:-1], "9")
    assert "max_num_frames: 8 then, 9 now" in one_line_error(done)
    assert done.returncode == 2
    ask(folder, QUESTIONS[:2])
    done = cli(*arguments)
    assert "no longer asked" in one_line_error(done)
    assert answers(folder) == second


def test_answers_are_those_of_single_questions(cli, folder):  # noqa: F811
    ask(folder, QUESTIONS[:1] + QUESTIONS[3:4])
    cli("batch", folder / "questions.jsonl", "--out", folder / "answers.jsonl", *QUICK)
    done = cli(folder / "a.mp4", "What moves?", "Which colour?", "--json", *QUICK)
    expected = [entry["answer"] for entry in json.loads(done.stdout)["answers"]]
    assert [entry["answer"] for entry in answers(folder)] == expected


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on(folder, root, cli, sign):  # noqa: F811
    # Seconds of work: it is stopped after the third line.
    questions = [
        {"video": name, "question": f"What is {i}?"} for i in range(LINES // 2) for name in ("a.mp4", "b.mp4")
    ]
    ask(folder, questions)
    arguments = ["batch", folder / "questions.jsonl", "--out", folder / "answers.jsonl", *QUICK]
    process = subprocess.Popen(
        [sys.executable, root / "cli.py", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        # Shells let what they start in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    parts, deadline = folder / "answers.jsonl.parts", time.monotonic() + 200

    def kept():
        return [entry for file in parts.glob("*.jsonl") for entry in answers_in(file)]

    while len(kept()) < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sign)
    said = process.communicate()[1]
    if sign == signal.SIGINT:
        assert process.returncode == 130 and said.endswith("error: interrupted\n")
        early = answers(folder)
        assert not parts.exists()
    else:
        early = kept()
    assert 3 <= len(early) < LINES
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"{LINES - len(early)} questions about" in done.stderr
    final = answers(folder)
    assert files(folder) == ["answers.jsonl", "answers.jsonl.settings.json"]
    assert [entry["id"] for entry in final] == list(range(1, LINES + 1))
    kept = {entry["id"]: entry for entry in early}
    assert all(final[number - 1] == entry for number, entry in kept.items())


def test_several_processes_are_refused(cli, folder):  # noqa: F811
    done = cli("batch", folder / "questions.jsonl", "--out", folder / "answers.jsonl", WORLD_SIZE="2")
    assert done.returncode == 2 and "videoxl.serving.ray_batch" in one_line_error(done)
    assert files(folder) == []


def test_each_video_is_encoded_once(model, tokenizer, folder, monkeypatch):
    encoded = []
    encode_video = type(model).encode_video
    monkeypatch.setattr(
        type(model),
        "encode_video",
        lambda self, path, *a, **k: encoded.append(path) or encode_video(self, path, *a, **k),
    )
    monkeypatch.setattr(cli_batch, "load_model", lambda *_, **__: (model, tokenizer))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status = cli_batch.main([str(folder / "questions.jsonl"), "--out", str(folder / "answers.jsonl"), *QUICK])
    assert status == 3
    assert [Path(path).name for path in encoded] == ["a.mp4", "b.mp4", "broken.mp4"]


def test_the_estimate_counts_frames_not_videos():
    question = Question(1, "v", "?", "v")
    videos = [Video([question], 10), Video([question] * 3, 1000), Video([question], 50)]
    clock = Clock(videos)
    assert str(clock) == "time left not known yet"
    clock.did("frames", 10, 2.0)
    assert str(clock) == "more than 4 min left"  # of encoding; how long answers take is not known yet
    clock.did("questions", 1, 5.0)
    assert clock.seconds("frames") == pytest.approx((1000 + 50) * 0.2)
    assert clock.seconds("questions") == pytest.approx(4 * 5)
    clock.skipped("frames", 50)
    clock.skipped("questions", 1)
    assert clock.seconds("frames") + clock.seconds("questions") == pytest.approx(1000 * 0.2 + 3 * 5)
    assert str(clock) == "about 4 min left"
    clock.did("frames", 1000, 200.0)
    clock.did("questions", 3, 15.0)
    assert str(clock) == "about 0 s left"


def test_progress_inside_a_video_that_is_being_encoded(model, tokenizer, folder, monkeypatch, capsys):
    model.config.vision_chunk_frames = 8
    monkeypatch.setattr(cli_batch, "load_model", lambda *_, **__: (model, tokenizer))
    monkeypatch.setattr(cli_batch, "LINE_EVERY", 0)
    ask(folder, QUESTIONS[:3])
    arguments = [folder / "questions.jsonl", "--out", folder / "answers.jsonl", *QUICK[:-1], 24]
    assert cli_batch.main(list(map(str, arguments))) == 3
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "3 questions about 3 videos"
    lengths = re.findall(r"^0/3 questions, a.mp4: (\d+) of 18 frames, more than", "\n".join(said), re.MULTILINE)
    assert lengths == ["8", "16", "18"]
    assert re.search(r"^1/3 questions, b.mp4: 8 of 22 frames, about ", "\n".join(said), re.MULTILINE)
    # What the broken video would have taken is left out.
    assert said[-2].startswith("3/3 questions, broken.mp4, about 0 s left")


def test_a_full_disk_names_the_file_and_leaves_nothing_half_written(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "answers.jsonl"
    replace_file(file, "before\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Python ignores the signal, so writing fails as on a disk without room.
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(OSError, match=f"cannot write {re.escape(str(file))}: "):
            replace_file(file, "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_text() == "before\n"


def test_a_run_without_room_keeps_what_it_has(model, tokenizer, folder, monkeypatch, cli):  # noqa: F811
    monkeypatch.setattr(cli_batch, "load_model", lambda *_, **__: (model, tokenizer))
    full, original = [], os.replace

    def replace(source, target):
        if full and str(folder) in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(source, target)
        full.extend([1] * str(target).endswith(".parts/" + Path(target).name))

    monkeypatch.setattr("videoxl.shell.records.os.replace", replace)
    arguments = ["batch", folder / "questions.jsonl", "--out", folder / "answers.jsonl", *QUICK]
    done = cli(*arguments)
    assert done.returncode == 1
    assert re.search(r"^error: OSError: .*cannot write .*parts/\w+\.jsonl: No space left", done.stderr, re.MULTILINE)
    assert not list(folder.rglob("*.partial"))
    monkeypatch.undo()
    monkeypatch.setattr(cli_batch, "load_model", lambda *_, **__: (model, tokenizer))
    done = cli(*arguments)
    assert done.returncode == 3 and "3 questions about 3 videos" in done.stderr
    assert len(answers(folder)) == 5


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "expected an object"),
        ('{"video": "a.mp4"}', '"question" must be'),
        ('{"video": "a.mp4", "question": " "}', '"question" must be'),
        ('{"video": "a.mp4", "question": "a", "id": 1.5}', '"id" must be'),
        ('{"video": "a.mp4", "question": "a", "id": 2}\n{"video": "a.mp4", "question": "b"}', "that of line 1, too"),
        ("\n", "has no questions"),
        ('{"video": "none.mp4", "question": "a"}', "none of the videos exists"),
    ],
)
def test_bad_questions_are_told_by_line(folder, lines, said):
    (folder / "questions.jsonl").write_text(lines)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read_questions(folder / "questions.jsonl", folder)


def test_bad_usage_is_one_line_and_status_2(cli, folder):  # noqa: F811
    questions = str(folder / "questions.jsonl")
    (folder / "foreign.jsonl").write_text("{}\n")
    for arguments, said in (
        ([questions], "--out"),
        ([questions, "--out", questions], "a file of its own"),
        ([questions, "--out", str(folder / "no" / "a.jsonl")], "there is no folder"),
        (["missing.jsonl", "--out", "a"], "no such file of questions"),
        ([questions, "--out", "a", "--videos", "nowhere"], "--videos"),
        ([questions, "--out", str(folder / "foreign.jsonl")], "not written by this program"),
    ):
        done = cli("batch", *arguments, *QUICK)
        assert said in one_line_error(done)
        assert done.returncode == 2
    assert (folder / "foreign.jsonl").read_text() == "{}\n"
    assert "ray_batch" in cli("batch", "--help").stdout


def test_what_one_video_has_is_not_asked_again(tmp_path):
    questions = [Question(number, "v", f"{number}?", "/v") for number in range(3)]
    answers, asked = Answers(tmp_path / "out.jsonl", questions), []
    (videos,) = answers.to_ask()

    def say(questions):
        for question in questions:
            asked.append(question.id)
            yield question.entry | ({"answer": "x"} if question.id < 2 or len(asked) > 3 else {"error": "y"})

    file = answers.part(videos)
    entries = keep_answers(file, videos, say)
    assert next(entries) == questions[0].entry | {"answer": "x"}
    # On disk before it is handed on; here the process is killed.
    assert [entry["id"] for entry in answers_in(file)] == [0]
    assert [list(entry)[-1] for entry in keep_answers(file, videos, say)] == ["answer", "answer", "error"]
    assert asked == [0, 1, 2]
    assert [entry["answer"] for entry in keep_answers(file, videos, say)] == ["x"] * 3
    assert asked == [0, 1, 2, 2]
    assert answers.collect() == (3, 0) and not answers.parts.exists()


def test_a_damaged_file_of_a_video_is_not_passed_over(tmp_path):
    questions = [Question(1, "v", "?", "v")]
    answers = Answers(tmp_path / "out.jsonl", questions)
    answers.part(questions).write_text('{"id"\n' + json_line(questions[0].entry | {"answer": "x"}))
    with pytest.raises(ValueError, match="parts.*, line 1 is damaged"):
        answers.known()
