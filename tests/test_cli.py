"""`cli.py` as a user runs it, on the bundled checkpoint and clip, here and in processes; and what the clip shows."""

import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from command_line import one_line_error, run_main
from videoxl import cli as cli_program
from videoxl.shell.options import BFLOAT16_MIN_WIDTH, choose_dtype
from videoxl.shell.output import chunk_table, printable

CLIP = os.path.join("assets", "demo.mp4")


@pytest.fixture(scope="module")
def cli(root):
    """Runs the command line in this process, from the root."""

    def run(*arguments, cwd=root, **surroundings) -> subprocess.CompletedProcess:
        return run_main(cli_program.main, *arguments, cwd=cwd, **surroundings)

    return run


@pytest.fixture(scope="module")
def cli_process(root):
    """Runs the command line in a process of its own, from the root."""

    def run(*arguments, cwd=root) -> subprocess.CompletedProcess:
        command = [sys.executable, str(root / "cli.py"), *map(str, arguments)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def tokens_per_group(root):
    return json.loads((root / "processor_config.json").read_text())["tokens_per_group"]


def test_answers_are_shown(cli, tokens_per_group):
    done = cli(CLIP, "What happens?", "--stats", "--max-new-tokens", "6", "--max-num-frames", "9", "--uniform")
    assert done.returncode == 0, done.stderr
    for shown in (
        "frames           9",
        f"visual tokens    {3 * tokens_per_group}",
        "decode + encode",
        "24.0 s",
        "Q  What happens?",
        "\nA  ",
    ):
        assert shown in done.stdout
    for shown in ("cpu, float32", "key-values"):
        assert shown in done.stdout
    assert re.search(r"\[\d+\.\d+ s, [1-6] tokens, \d+ a second\]", done.stdout)
    assert all(sign.isprintable() or sign == "\n" for sign in done.stdout)


@pytest.mark.parametrize(
    ("name", "device", "width", "capabilities", "chosen"),
    [
        ("auto", "cpu", BFLOAT16_MIN_WIDTH, {"avx512_bf16": True}, "bfloat16"),
        ("auto", "cpu", BFLOAT16_MIN_WIDTH, {"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ("auto", "cpu", BFLOAT16_MIN_WIDTH, {"avx2": True, "avx512_bf16": False}, "auto"),
        ("auto", "cpu", BFLOAT16_MIN_WIDTH, {}, "auto"),
        ("auto", "cpu", BFLOAT16_MIN_WIDTH - 1, {"avx512_bf16": True}, "auto"),
        ("auto", "cuda", BFLOAT16_MIN_WIDTH, {"avx512_bf16": True}, "auto"),
        ("float32", "cpu", BFLOAT16_MIN_WIDTH, {"avx512_bf16": True}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_a_cpu_is_faster_in_it(name, device, width, capabilities, chosen):
    config = SimpleNamespace(text_config=SimpleNamespace(hidden_size=width))
    assert choose_dtype(name, torch.device(device), config, capabilities) == chosen


def test_json_with_several_questions(cli_process, root, tmp_path, tokens_per_group):
    questions = ["What happens?", "Which colour is the circle?", "What happens?"]
    # From another folder, and where the hub could not be reached: the default model is the folder of cli.py.
    video = root / CLIP
    options = ["--json", "--max-new-tokens", "6", "--max-num-frames", "12", "--dtype", "bfloat16"]
    done = cli_process(video, *questions, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert result["video"] == str(video)
    assert result["num_frames"] == 12
    assert result["visual_tokens"] == 3 * tokens_per_group
    assert result["duration"] == pytest.approx(24.0)
    assert (result["device"], result["dtype"]) == ("cpu", "bfloat16")
    assert [entry["question"] for entry in result["answers"]] == questions
    assert result["answers"][0]["answer"] == result["answers"][2]["answer"], "a question changed the encoded video"
    assert all(0 < entry["tokens"] <= 6 and entry["seconds"] > 0 for entry in result["answers"])
    assert result["encode_seconds"] > 0


def test_sparse_attention_chunks_save_and_load(cli, root, tmp_path):
    saved, questions = tmp_path / "demo.videoxl", ["What happens at 0:09?", "Why?"]
    decode = ["--decode", "bilevel", "--decode-chunk-groups", "1", "--pool-size", "8", "--max-new-tokens", "6"]
    prefill = ["--prefill", "streaming", "--chunk-groups", "2", "--window-chunks", "1"]
    done = cli(root / CLIP, "--json", *questions, "--show-chunks", "--save", saved, *prefill, *decode)
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    attention = {"prefill": "streaming", "chunk_groups": 2, "window_chunks": 1}
    attention |= {"decode": "bilevel", "decode_chunk_groups": 1, "pool_size": 8}
    assert first["sparse_attention"] == attention
    assert (first["saved_to"], first["loaded_from"]) == (str(saved), None)
    chunks = first["answers"][0]["chunks"]
    assert [(chunk["start"], chunk["end"]) for chunk in chunks] == [(index, index + 1.0) for index in range(24)]
    assert {chunks[index]["level"] for index in (0, 9, 23)} == {"dense"}, "a time in the question chooses its chunk"
    assert "pooled" in {chunk["level"] for chunk in chunks}

    # The saved video keeps its prefill, and nothing is encoded again: the same answers, the same choice.
    done = cli("--load", saved, *questions, "--json", "--show-chunks", *decode)
    assert done.returncode == 0, done.stderr
    second = json.loads(done.stdout)
    assert second["loaded_from"] == str(saved)
    for key in ("video", "num_frames", "tokens", "cache_bytes", "sparse_attention"):
        assert second[key] == first[key]
    for mine, theirs in zip(second["answers"], first["answers"], strict=True):
        assert (mine["answer"], mine["chunks"]) == (theirs["answer"], theirs["chunks"])

    done = cli("--load", saved, "Why?", "--show-chunks", *decode)
    assert done.returncode == 0, done.stderr
    assert "read saved video" in done.stdout and "24 chunks: " in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.lstrip().startswith("9  "))
    assert row.split()[:5] == ["9", "9.0", "-", "10.0", second["answers"][1]["chunks"][9]["level"]]
    assert "####" in done.stdout

    for arguments, said in (
        (["--load", saved, "Why?", "--sample-fps", "2"], "--sample-fps was settled"),
        (["--load", saved, "Why?", "--prefill", "mask"], "--prefill was settled"),
        (["--load", saved], "QUESTION is missing"),
        ([CLIP, "Why?", "--save", saved], "exists already"),
    ):
        done = cli(*arguments)
        assert said in one_line_error(done)
        assert done.returncode == 2
    damaged = bytearray(saved.read_bytes())
    damaged[-1] ^= 1
    saved.write_bytes(damaged)
    done = cli("--load", saved, "Why?", "--json")
    assert "damaged" in one_line_error(done)
    assert done.returncode == 2


def test_plan_says_what_encoding_gives(cli):
    options = ["--max-num-frames", "10", "--decode", "bilevel", "--decode-chunk-groups", "1"]
    plan = json.loads(cli(CLIP, "--plan", "--json", *options).stdout)["plan"]
    asked = json.loads(cli(CLIP, "What?", "--json", "--max-new-tokens", "2", *options).stdout)
    assert (plan["frames"], plan["total_tokens"]) == (asked["num_frames"], asked["tokens"]) == (10, asked["tokens"])
    assert plan["kv_bytes"] == asked["cache_bytes"]
    done = cli(CLIP, "--plan", *options)
    assert done.returncode == 0, done.stderr
    assert "frames" in done.stdout and "peak" in done.stdout


def test_conversation_from_a_pipe(cli):
    typed = "And then?\n\n/new\n/what\nWhat happens?\n/quit\nNever asked?\n"
    done = cli(CLIP, "What happens?", "-i", "--max-new-tokens", "4", "--max-num-frames", "8", typed=typed)
    assert done.returncode == 0, done.stderr
    turns = re.findall(r"^Q  (.*)\nA  (.*)", done.stdout, re.MULTILINE)
    assert [question for question, _ in turns] == ["What happens?", "And then?", "What happens?"]
    assert turns[0] == turns[2], "/new forgets the conversation"
    assert "there is no /what" in done.stdout
    assert done.stdout.count("decode + encode") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are driven through pty")
@pytest.mark.parametrize("status", [0, 130], ids=["Ctrl-D", "Ctrl-C twice"])
def test_conversation_at_a_terminal(root, status):
    import fcntl
    import pty
    import termios

    main, child = pty.openpty()
    command = [sys.executable, "cli.py", CLIP, "--max-new-tokens", "400", "--max-num-frames", "8"]
    process = subprocess.Popen(
        command,
        cwd=root,
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
        # The terminal is the program's own: without that, Ctrl-C is nobody's.
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(child)
    killer = threading.Timer(250, process.kill)
    killer.start()
    try:
        shown = read_until(main, "you> ")
        assert "Ctrl-D" in shown and "Q  " not in shown
        # Somebody who waits is told what for.
        assert shown.index("loading the model") < shown.index("reading the video") < shown.index("decode + encode")
        interrupt(main)
        assert "A  " not in read_until(main, "you> "), "Ctrl-C clears the line"
        os.write(main, b"What happens?\n")
        assert re.search(r"A  .*\[\d+\.\d+ s\]", read_until(main, "you> "), re.DOTALL)
        interrupt(main)
        read_until(main, "you> ")
        interrupt(main) if status else os.write(main, b"\x04")
        read_until(main, None)
        assert process.wait() == status
    finally:
        killer.cancel()
        process.kill()
        process.wait()
        os.close(main)


def interrupt(terminal):
    """Ctrl-C on a line that is being typed, and edited: the way back to its start shows that the program reads it."""
    os.write(terminal, b"half\x01")
    read_until(terminal, "\b" * 4)
    time.sleep(0.3)
    os.write(terminal, b"\x03")
    # Python hears of one that comes in the instant before readline waits at the next key.
    while not select.select([terminal], [], [], 2)[0]:
        os.write(terminal, b"\x01")


def read_until(terminal, end):
    """What a terminal shows up to `end`, or (None) until the program has closed it."""
    shown = ""
    while end is None or not shown.endswith(end):
        try:
            data = os.read(terminal, 4096)
        except OSError:  # Linux says so that the other side is closed
            data = b""
        if not data:
            assert end is None, f"ended before {end!r}: {shown}"
            return shown
        shown += data.decode(errors="replace")
    return shown


def test_answers_stream_word_by_word(tokenizer):
    from videoxl.shell.output import AnswerStreamer

    class Pieces(list):
        write = list.append

        def flush(self):
            self.append(None)

    pieces, ids = Pieces(), tokenizer("  At 14 seconds")["input_ids"]
    streamer = AnswerStreamer(tokenizer, pieces)
    streamer.put(tokenizer("prompt", return_tensors="pt")["input_ids"])
    for number in ids:
        streamer.put(torch.tensor([number]))
    streamer.end()
    written = [piece for piece in pieces if piece]
    assert "".join(written) == "At 14 seconds" and len(written) >= 3
    assert streamer.tokens == len(ids)
    assert printable("a\x1b[2Jb\n") == "a\N{REPLACEMENT CHARACTER}[2Jb\n"


def test_encoding_for_later_needs_no_question(cli, tmp_path):
    done = cli(CLIP, "--save", tmp_path / "demo.videoxl", "--max-num-frames", "8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demo.videoxl").is_file() and "saved to" in done.stdout and "Q  " not in done.stdout


def test_a_reader_that_leaves_early_is_no_error(root):
    pipeline = f"{shlex.quote(sys.executable)} cli.py {CLIP} What? How? --max-num-frames 8 | head -c 1"
    done = subprocess.run(pipeline, shell=True, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.stdout, done.stderr) == ("v", "")


def test_table_of_many_chunks_keeps_the_chosen_ones():
    chunks = [
        {"index": index, "start": 4.0 * index, "end": 4.0 * index + 4, "level": "pooled", "score": index / 1000}
        for index in range(100)
    ]
    for index in (0, 50, 99):
        chunks[index]["level"] = "dense"
    lines = chunk_table(chunks)
    assert "100 chunks: 3 dense, 97 pooled; 40 are shown" in lines[1]
    shown = [int(line.split()[0]) for line in lines[3:]]
    assert shown == [0, 50, *range(62, 100)]
    assert lines[-1].endswith("0.099 " + 24 * "#")
    unscored = [{**chunk, "score": None} for chunk in chunks[:2]]
    assert [line.split()[-1] for line in chunk_table(unscored)[3:]] == ["-", "-"]
    assert chunk_table([]) == []


def test_help_teaches(cli):
    done = cli("--help")
    assert done.returncode == 0
    assert "examples:" in done.stdout and "exit status" in done.stdout and "--max-sample-fps" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.mp4", "What?"], "missing.mp4: no such video file"),
        (["assets", "What?"], "is a folder, and demo.mp4 is none"),
        ([CLIP], "QUESTION is missing"),
        ([], "VIDEO and QUESTION are missing"),
        (["https://example.com/a.mp4", "What?"], "is an address"),
        (["--load", "missing.videoxl", "What?"], "no such file of an encoded video"),
        ([CLIP, "What?", "--plan"], "--plan takes a VIDEO and no questions"),
        ([CLIP, "--plan", "--save", "file"], "--plan encodes nothing"),
        ([CLIP, "--json", "--interactive"], "--json prints one object"),
        ([CLIP, "What?", "--save", "nowhere/file"], "there is no folder nowhere"),
        ([CLIP, "What?", "--prefill", "dense"], "--prefill"),
        ([CLIP, "What?", "--pool-size", "0"], "at least 1, got '0'"),
        ([CLIP, " "], "empty"),
        ([CLIP, "Why", "is", "it", "red?"], "4 questions of one word each"),
        ([CLIP, "What?", "--frames", "3"], "unrecognized arguments: --frames"),
        ([CLIP, "What?", "--max-num-frames", "0"], "at least 1, got '0'"),
        ([CLIP, "What?", "--max-new-tokens", "many"], "at least 1, got 'many'"),
        ([CLIP, "What?", "--sample-fps", "-1"], "frames a second above 0"),
        ([CLIP, "What?", "--max-sample-fps", "nan"], "frames a second above 0"),
        ([CLIP, "What?", "--uniform", "--sample-fps", "2"], "--uniform"),
        ([CLIP, "What?", "--dtype", "int8"], "--dtype"),
        ([CLIP, "What?", "--model", "assets"], "no config.json"),
        ([CLIP, "What?", "--model", "./nowhere"], "neither a model folder nor a Hub id"),
        ([CLIP, "What?", "--model", "someone/something"], "--trust-remote-code"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(cli, arguments, said):
    done = cli(*arguments)
    assert said in one_line_error(done)
    assert done.returncode == 2


def test_a_process_that_is_used_badly_says_one_line(cli_process):
    done = cli_process(CLIP, "What?", "--model", "someone/something")
    assert "--trust-remote-code" in one_line_error(done)
    assert done.returncode == 2


def test_unreadable_video_is_bad_input(cli, tmp_path):
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    done = cli(empty, "What?", "--json")
    assert done.returncode == 2
    assert "empty" in one_line_error(done)


def test_unusable_device_is_bad_input(cli):
    done = cli(CLIP, "What?", "--device", "abacus")
    assert done.returncode == 2
    assert "--device abacus" in one_line_error(done)


@pytest.fixture
def model_folder(root, tmp_path):
    """A copy of the bundled model's folder, to be damaged."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (*root.glob("*.json"), *root.glob("*.py"), *root.glob("*.jinja"), root / "model.safetensors"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors", "config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "other"])
def test_a_damaged_model_is_one_sentence(cli, root, model_folder, name, damage):
    if (name, damage) == ("tokenizer_config.json", "missing"):
        pytest.skip("loading does without")
    file = model_folder / name
    data = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "other": b"[1, 2]" * 99}[damage])
    done = cli(root / CLIP, "What?", "--model", model_folder, "--json")
    said = one_line_error(done)
    assert done.returncode == 2 and name in said
    assert "copy the folder again" in said or (name, damage) == ("config.json", "missing")


def test_a_model_in_pieces_is_looked_at_piece_by_piece(cli, root, model_folder, bundled_model):
    (model_folder / "model.safetensors").unlink()
    bundled_model.save_pretrained(model_folder, max_shard_size="3MB")
    pieces = sorted(model_folder.glob("model-*.safetensors"))
    assert len(pieces) > 2 and cli(root / CLIP, "--plan", "--model", model_folder).returncode == 0
    pieces[1].unlink()
    assert f"{pieces[1].name} is missing" in one_line_error(cli(root / CLIP, "--plan", "--model", model_folder))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of files are set through ulimit")
def test_a_full_disk_costs_no_answer_and_names_the_file(root, tmp_path):
    asked = f"{shlex.quote(sys.executable)} cli.py {CLIP} 'What color is the star?' --save {tmp_path}/a.videoxl"
    command = f"ulimit -f 100; exec {asked}"
    done = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, timeout=300)
    assert "A  orange" in done.stdout and "saved to" not in done.stdout
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"error: --save {tmp_path}/a.videoxl: the file was not written") and done.returncode == 1
    assert list(tmp_path.iterdir()) == [], "a partial file stays behind"


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGTERM")
def test_ended_while_saving_nothing_stays_behind(root, tmp_path):
    # Saving waits until somebody ends the program.
    script = (
        "import sys, time, videoxl\n"
        "import videoxl.video_file_videoxl as code\n"
        "code._write_digest = lambda path: (print('saving', file=sys.stderr, flush=True), time.sleep(300))\n"
        "videoxl.register()\n"
        "from videoxl.shell.ask import main\n"
        f"main([{CLIP!r}, '--save', {str(tmp_path / 'a.videoxl')!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stderr=subprocess.PIPE, text=True)
    killer = threading.Timer(200, process.kill)
    killer.start()
    try:
        while "saving" not in (line := process.stderr.readline()):
            assert line, "it ended before it saved"
        assert len(list(tmp_path.iterdir())) == 1
        process.terminate()
        assert process.stderr.read() == "error: interrupted\n" and process.wait() == 130
    finally:
        killer.cancel()
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == [], "a partial file stays behind"


def test_pictures_are_a_video(cli, root, tmp_path):
    from PIL import Image

    folder = tmp_path / "shots"
    folder.mkdir()
    with av.open(str(root / CLIP)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number % 8 == 0:
                frame.to_image().save(folder / f"{number // 8}.png")
    question = "What is on the card with the purple ring?"
    done = cli(folder, question, "When does the ring disappear?", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["num_frames"], result["duration"], result["video"]) == (24, 24.0, str(folder))
    assert result["answers"][0]["answer"] == "egg"

    some = [folder / f"{number}.png" for number in (8, 9, 10, 11)]
    done = cli(*some, question, "--timestamps", 8, 9, 10, 11, "--json")
    result = json.loads(done.stdout)
    assert (result["num_frames"], result["answers"][0]["answer"], result["video"]) == (4, "egg", "4 pictures")
    plan = json.loads(cli(*some, "--plan", "--json", "--fps", 2).stdout)["plan"]
    assert (plan["frames"], plan["total_tokens"]) == (4, result["tokens"])
    assert json.loads(cli(*some, question, "--fps", 2, "--json").stdout)["duration"] == 2.0

    Image.new("RGB", (8, 8)).save(folder / "10b.png")
    (folder / ".hidden").write_text("")
    assert json.loads(cli(folder, question, "--json").stdout)["num_frames"] == 25
    (folder / "notes.txt").write_text("")
    for arguments, said in (
        ([folder, question], "notes.txt is none"),
        ([root / CLIP, some[0], question], "of several files each must be a picture, and demo.mp4 is none"),
        ([*some, question, "--timestamps", 1, 2], "2 times for 4 pictures"),
        ([*some, question, "--timestamps", 1, 2, 3, 4, "--fps", 2], "leave one of them out"),
        ([*some, question, "--uniform"], "--uniform is for video files"),
        ([*some, question, "--max-num-frames", 3], "4 pictures, of which all are taken"),
        ([root / CLIP, question, "--fps", 2], "are for pictures"),
    ):
        done = cli(*arguments)
        assert said in one_line_error(done) and done.returncode == 2


@pytest.fixture(scope="module")
def demo_clip(root):
    """What training/render_demo.py draws."""
    from videoxl.training.render_demo import demo_clip

    return demo_clip()


def test_demo_clip_is_what_its_script_draws(root, demo_clip):
    with av.open(str(root / CLIP)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        decoded = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
    assert [seconds for seconds, _ in decoded] == pytest.approx([number / 8 for number in range(24 * 8)], abs=1e-3)
    drawn = demo_clip.frames([seconds for seconds, _ in decoded])
    side, small = decoded[0][1].shape[0], drawn.shape[1]
    pictures = np.stack([frame for _, frame in decoded]).reshape(-1, small, side // small, small, side // small, 3)
    error = np.abs(pictures.mean(axis=(2, 4)) - drawn)
    assert error.mean() < 6 and error.mean(axis=(1, 2, 3)).max() < 12


def test_demo_clip_is_rich(demo_clip):
    shapes = [item for item in demo_clip.items if item.shape]
    assert [(item.color, item.shape, item.size, item.direction) for item in shapes] == [
        ("green", "circle", "small", ""),
        ("orange", "star", "small", ""),
        ("blue", "ring", "small", "right"),
        ("red", "triangle", "large", ""),
    ]
    assert [item.spans for item in shapes] == [((3, 5),), ((7, 13),), ((11, 16),), ((14, 22),)]
    assert [item.change for item in shapes] == [None, None, None, (18, "cyan")]
    assert [(item.text, item.spans) for item in demo_clip.items if item.text] == [("6", ((1, 8),))]
    assert [(card.second, card.key, card.value) for card in demo_clip.cards] == [
        (9, ("purple", "ring"), "egg"),
        (19, ("red", "circle"), "box"),
        (23, ("yellow", "square"), "4"),
    ]


def test_make_demo_prints_the_right_answers(root, demo_clip):
    makefile = (root / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    questions, answers = (
        shlex.split(re.search(rf"^DEMO_{name} = (.*)$", makefile, re.MULTILINE)[1])
        for name in ("QUESTIONS", "ANSWERS")
    )
    # The clip words a question in one of two ways.
    types = ("color", "direction", "size", "needle", "when_card")
    names = ("star", "ring", "triangle", "purple ring", "purple ring")
    expected = [
        question.answer
        for kind, name in zip(types, names, strict=True)
        for question in demo_clip.questions
        if question.type == kind and name in question.text
    ]
    assert " / ".join(expected) == answers[0]
    assert all(name in question for name, question in zip(names, questions, strict=True))
