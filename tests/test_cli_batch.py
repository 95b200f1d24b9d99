"""`cli.py batch`: many questions about many videos: in order, once each, through errors, kills and in processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import one_line_error
from test_cli import cli  # noqa: F401 (a fixture)

import cli_batch
from cli_batch import Clock, Journal, Question, Video, read_questions

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
    journal = folder / "answers.jsonl.part-0"
    deadline = time.monotonic() + 200
    while not (journal.exists() and journal.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sign)
    said = process.communicate()[1]
    if sign == signal.SIGINT:
        assert process.returncode == 130 and said.endswith("error: interrupted\n")
        early = answers(folder)
        assert not journal.exists()
    else:
        # As if the last line had been half written.
        with open(journal, "a") as file:
            file.write('{"id": 3, "vid')
        early = [json.loads(line) for line in journal.read_text().splitlines()[:-1]]
    assert 3 <= len(early) < LINES
    done = cli(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"{LINES - len(early)} questions about" in done.stderr
    final = answers(folder)
    assert [entry["id"] for entry in final] == list(range(1, LINES + 1))
    kept = {entry["id"]: entry for entry in early}
    assert all(final[number - 1] == entry for number, entry in kept.items())


def test_two_processes_share_the_videos(folder, root):
    pytest.importorskip("accelerate")
    # --multi_gpu starts several processes, also where there is no GPU; --cpu would start one.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", "0"]  # fmt: skip
    ask(folder, [line for line in QUESTIONS if line["video"] != "broken.mp4"])
    command = [
        *launch,
        root / "cli.py",
        "batch",
        "questions.jsonl",
        "--out",
        "answers.jsonl",
        "--device",
        "cpu",
        *QUICK,
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert [entry["id"] for entry in answers(folder)] == [1, 2, "colour", "again"]
    assert all("answer" in entry for entry in answers(folder))
    assert "waiting for the other processes" in done.stderr
    assert files(folder) == ["answers.jsonl", "answers.jsonl.settings.json"]


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
    videos = [Video("short", [question], 10), Video("long", [question] * 3, 1000), Video("bad", [question], 50)]
    clock = Clock(videos)
    assert clock.left() is None and "not known" in str(clock)
    clock.encoded(10, 2.0)
    assert clock.left() is None
    clock.answered(5.0)
    assert clock.left() == pytest.approx((1000 + 50) * 0.2 + 4 * 5)
    clock.skipped(videos[2])
    assert clock.left() == pytest.approx(1000 * 0.2 + 3 * 5)
    assert str(clock) == "about 4 min left"
    clock.encoded(1000, 200.0)
    for _ in range(3):
        clock.answered(5.0)
    assert clock.left() == 0


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
    assert "accelerate launch" in cli("batch", "--help").stdout


def test_a_damaged_journal_is_not_passed_over(tmp_path):
    questions = [Question(1, "v", "?", "v")]
    journal = Journal(tmp_path / "out.jsonl", questions)
    (tmp_path / "out.jsonl.part-3").write_text('{"id"\n{"id": 1, "video": "v", "question": "?", "answer": "x"}\n')
    with pytest.raises(ValueError, match="part-3, line 1 is damaged"):
        journal.known()
