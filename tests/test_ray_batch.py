"""`serving/ray_batch.py`: the files of `videoxl batch`, actors that share the work, and whoever is killed.

What needs Ray is skipped without it: `make test-ray`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import run_main
from videoxl.serving import ray_batch
from videoxl.shell import batch
from videoxl.shell.records import answers_in, open_answers

SETTINGS = {"max_num_frames": 8, "max_new_tokens": 4}
OPTIONS = ["--max-num-frames", "8", "--max-new-tokens", "4"]


@pytest.fixture
def folder(clips, tmp_path):
    """Five videos, one of them broken, with three questions each."""
    videos = [f"{number}.mp4" for number in range(4)]
    for number, name in enumerate(videos):
        (tmp_path / name).write_bytes(Path(clips[number % 2]).read_bytes())
    (tmp_path / "broken.mp4").write_text("no video")
    ask(tmp_path, [*videos, "broken.mp4"], 3)
    return tmp_path


def ask(folder, videos, questions):
    lines = [{"video": video, "question": f"What is {n}?"} for n in range(questions) for video in videos]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def answers(folder, name="answers.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def command(folder, root, *more):
    # As users name what is near: relative to where they are, which is not where an actor is.
    places = [os.path.relpath(folder / "questions.jsonl", root), "--out", folder / "answers.jsonl", "--model", "."]
    return [*map(str, places), "--settings", json.dumps(SETTINGS), *more]


def without_seconds(entries):
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def test_an_actor_answers_as_batch_does(folder, root):
    opened = open_answers(str(folder / "questions.jsonl"), str(folder / "answers.jsonl"), None)
    jobs = [
        json.dumps({"file": str(opened.part(questions)), "questions": list(map(asdict, questions))})
        for questions in opened.to_ask()
    ]
    actor = ray_batch.Actor({"model": str(root), "dtype": "auto", **SETTINGS})
    assert len(actor({"job": jobs})["actor"]) == 5
    assert opened.collect() == (12, 3)
    done = run_main(batch.main, folder / "questions.jsonl", "--out", folder / "batch.jsonl", *OPTIONS)
    assert done.returncode == 3, done.stderr
    assert without_seconds(answers(folder)) == without_seconds(answers(folder, "batch.jsonl"))


def test_either_program_goes_on_with_the_others_files(folder, root, monkeypatch):
    done = run_main(batch.main, folder / "questions.jsonl", "--out", folder / "answers.jsonl", *OPTIONS)
    assert done.returncode == 3, done.stderr
    monkeypatch.chdir(root)
    options = ray_batch.build_parser().parse_args(command(folder, root))
    opened = open_answers(options.questions, options.out, options.videos)
    opened.settle(ray_batch.settings_from(options))  # or raises
    assert len(opened.to_ask()) == 1, "the broken video alone"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--settings", '{"max_num_frame": 8}'], "got max_num_frame"),
        (["--settings", "{"], "--settings is not JSON"),
        (["--settings", "nowhere.json"], "nowhere.json"),
        (["--engine-args", '{"dtype": "auto"}'], "add --engine vllm"),
        (["--actors", "0"], "--actors must be at least 1"),
        (["--model", "someone/model"], "--trust-remote-code"),
        (["--model", "tests"], "has no config.json"),
        (["--out", "nowhere/a.jsonl"], "there is no folder"),
        (["--videos", "nowhere"], "does --videos fit"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(folder, root, change, said):
    done = run_main(ray_batch.main, *command(folder, root, *change), cwd=root)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (folder / "answers.jsonl").exists()


def test_a_file_of_others_is_left_alone(folder, root):
    (folder / "answers.jsonl").write_text("mine\n")
    done = run_main(ray_batch.main, *command(folder, root), cwd=root)
    assert done.returncode == 2 and "was not written by this program" in done.stderr
    assert (folder / "answers.jsonl").read_text() == "mine\n"


def test_without_ray_it_says_what_to_install(folder, root, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    done = run_main(ray_batch.main, *command(folder, root), cwd=root)
    assert done.returncode == 2 and "pip install" in done.stderr.splitlines()[-1]


# ------------------------------------------------------------------------------------------------ with Ray


@pytest.fixture
def run(folder, root):
    """Starts the program: with `wait`, to its end."""
    pytest.importorskip("ray")
    started = []

    def start(*more, wait=True):
        program = [sys.executable, "-m", "videoxl.serving.ray_batch", *command(folder, root, *more)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(program, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        if wait:
            process.said = process.communicate(timeout=400)[1]
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def kept(folder):
    """What is on disk of a run that goes on."""
    return [entry for file in (folder / "answers.jsonl.parts").glob("*.jsonl") for entry in answers_in(file)]


def wait_for(condition, process=None):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


def actors_of(process) -> list[int]:
    """Process ids of the actors that a driver's own Ray has started."""
    parents, found = {}, []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone meanwhile
            number, parent = int(status.parent.name), status.read_text().rpartition(")")[2].split()[1]
            parents[number] = int(parent)
            if b"ray::MapWorker" in (status.parent / "cmdline").read_bytes():
                found.append(number)

    def ancestors(number):
        while number := parents.get(number):
            yield number

    return [number for number in found if process.pid in ancestors(number)]


def test_two_actors_share_the_videos(run, folder):
    # Enough for the second to have started before the first is through.
    for number in range(4, 12):
        (folder / f"{number}.mp4").write_bytes((folder / "0.mp4").read_bytes())
    ask(folder, [*(f"{number}.mp4" for number in range(12)), "broken.mp4"], 60)
    done = run("--actors", "2")
    assert done.returncode == 3, done.said
    shares = next(line for line in done.said.splitlines() if line.startswith("videos of each actor: "))
    shares = list(map(int, shares.split(": ")[1].split()))
    assert len(shares) == 2 and sum(shares) == 13 and min(shares) >= 2
    entries = answers(folder)
    assert [entry["id"] for entry in entries] == list(range(1, 13 * 60 + 1))
    assert all(("error" in entry) == (entry["video"] == "broken.mp4") for entry in entries)
    # Once more: only what has an error is asked.
    done = run("--actors", "2")
    assert done.returncode == 3 and "1 videos with questions" in done.said
    assert [entry for entry in answers(folder) if "answer" in entry] == [e for e in entries if "answer" in e]


def test_an_actor_that_is_killed_loses_nothing_and_asks_nothing_twice(run, folder):
    ask(folder, [f"{number}.mp4" for number in range(4)], 60)
    process = run("--actors", "2", wait=False)
    wait_for(lambda: len(kept(folder)) >= 5, process)
    victim = actors_of(process)[0]
    os.kill(victim, signal.SIGKILL)
    early = kept(folder)
    assert len(early) < 240
    said = process.communicate(timeout=400)[1]
    assert process.returncode == 0, said
    entries = answers(folder)
    assert [entry["id"] for entry in entries] == list(range(1, 241))
    # An answer given twice would have taken other seconds.
    assert all(entries[entry["id"] - 1] == entry for entry in early)
    assert victim not in actors_of(process)


def test_a_driver_that_is_killed_goes_on(run, folder):
    ask(folder, [f"{number}.mp4" for number in range(4)], 60)
    process = run("--actors", "2", wait=False)
    wait_for(lambda: len(kept(folder)) >= 5, process)
    actors = actors_of(process)
    assert len(actors) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{actor}").exists() for actor in actors))
    early = kept(folder)
    assert 5 <= len(early) < 240
    done = run("--actors", "2")
    assert done.returncode == 0, done.said
    entries = answers(folder)
    assert [entry["id"] for entry in entries] == list(range(1, 241))
    assert all(entries[entry["id"] - 1] == entry for entry in early)
    assert not (folder / "answers.jsonl.parts").exists()


def test_what_an_actor_refuses_is_one_line(run, folder):
    done = run("--settings", '{"prefill": "nonsense"}')
    assert done.returncode == 1
    last = done.said.splitlines()[-1]
    assert last.startswith("error: ") and "got 'nonsense'" in last
    # What was refused does not bind the next run.
    assert run("--settings", '{"prefill": "streaming", "max_new_tokens": 2}').returncode == 3
