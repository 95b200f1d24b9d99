"""JSON lines: one reader for questions, answers, journals and training data, whatever letters they hold."""

import json
import shutil

import pytest
from command_line import one_line_error
from test_cli import cli  # noqa: F401 (a fixture)
from videoxl.shell.records import answers_in, json_line, json_lines, read_json, read_questions
from videoxl.training.data import MixtureDataset
from videoxl.training.trainer import BrokenReport, Journal

# End lines for `str.splitlines`: U+2028, U+2029, U+0085. And what JSON escapes: control characters.
LETTERS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\r\nh"
SAMPLE = {"video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nWhat moves?"}]}


def sample(answer):
    return SAMPLE | {"conversations": [*SAMPLE["conversations"], {"from": "gpt", "value": answer}]}


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_lines_end_where_json_ends_them(tmp_path, escaped, end, mark):
    entries = [{"text": LETTERS}, {"text": "plain"}, {"text": "\N{GRINNING FACE}"}]
    lines = [json.dumps(entry, ensure_ascii=escaped) for entry in entries]
    # A file that was appended to another brings its mark along.
    (tmp_path / "a.jsonl").write_bytes(f"{mark}{lines[0]}{end}{end}{mark}{lines[1]}{end}{lines[2]}".encode())
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, entries[0]), (3, entries[1]), (4, entries[2])]


def test_what_is_written_has_no_letter_that_ends_lines_elsewhere(tmp_path):
    entry = {"text": LETTERS, "path": "half \ud83d of a letter", "whole": "\N{GRINNING FACE}é"}
    line = json_line(entry)
    assert len(line.splitlines()) == 1 and "\N{GRINNING FACE}é" in line
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8")
    assert list(answers_in(tmp_path / "a.jsonl")) == [entry]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252"])
def test_another_encoding_is_named_with_its_line(tmp_path, encoding):
    path = tmp_path / "questions.jsonl"
    lines = ['{"video": "a.mp4", "question": "What?"}', '{"video": "é.mp4", "question": "What?"}']
    path.write_bytes("\n".join(lines).encode(encoding))
    number = 1 if "utf" in encoding else 2
    with pytest.raises(ValueError, match=rf"questions.jsonl, line {number} is not .*save the file as UTF-8"):
        list(json_lines(path))
    with pytest.raises(ValueError, match=rf"questions.jsonl, line {number} is not"):
        read_questions(path, tmp_path)
    path.write_bytes(("[" + ",\n".join(lines) + "]").encode(encoding))
    with pytest.raises(ValueError, match="save the file as UTF-8"):
        read_json(path)


def test_half_a_letter_is_named_with_its_line(tmp_path, bundle):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"video": "a.mp4", "question": "What?"}\n{"video": "a.mp4", "question": "\\ud83d?"}\n')
    with pytest.raises(ValueError, match=r"line 2: .*half of a letter \(\\ud83d\)"):
        read_questions(path, tmp_path)
    model, tokenizer, processor = bundle
    for ask in (lambda: model.chat(None, tokenizer, "What \ud83d?"), lambda: processor.render(
        [{"role": "user", "content": [{"type": "text", "text": "\udc80"}]}])):  # fmt: skip
        with pytest.raises(ValueError, match="half of a letter"):
            ask()


def test_only_an_unfinished_last_line_is_left_out(tmp_path):
    path, whole = tmp_path / "a.part-0", json_line({"video": "é", "question": "q", "answer": LETTERS})
    for cut in range(1, len(whole.encode()) - 1):
        path.write_bytes(whole.encode() + whole.encode()[:cut])
        assert len(list(answers_in(path))) == 1, cut
    path.write_bytes(whole.encode()[:-20] + b"\n" + whole.encode())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        list(answers_in(path))


def test_training_data_and_journals(processor, tmp_path):
    answer = LETTERS.replace("\r\n", " ")
    for name, content, mark in (("a.jsonl", json.dumps(sample(answer), ensure_ascii=False) + "\n", "\ufeff"),
                                ("b.json", json.dumps([sample(answer)], ensure_ascii=False), "\ufeff"),
                                ("c.json", json.dumps([sample(answer)]), "")):  # fmt: skip
        (tmp_path / name).write_text(mark + content, encoding="utf-8")
        assert len(MixtureDataset([{"json_path": str(tmp_path / name)}], processor)) == 1
    (tmp_path / "d.json").write_bytes(json.dumps([sample("é")], ensure_ascii=False).encode("utf-16"))
    with pytest.raises(ValueError, match=r"d.json, line 1 is not in UTF-8"):
        MixtureDataset([{"json_path": str(tmp_path / "d.json")}], processor)
    report = BrokenReport(tmp_path / "broken_samples.jsonl", 1.0)
    report.take([("source", "half \ud83d", LETTERS)], 1, step=0)
    report.take([("source", "another", "reason")], 1, step=1)
    report.resume(2, 1)
    assert report.count == 2
    report.resume(1, 1)
    assert report.count == 1
    journal = Journal(tmp_path / "log.jsonl")
    journal.write(1, {"note": LETTERS})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "no')
    journal.resume(3)
    assert [line["note"] for _, line in json_lines(tmp_path / "log.jsonl")] == [LETTERS]


def test_the_shared_files(cli, root, test_data, processor, tmp_path):  # noqa: F811
    field = test_data / "data" / "field"
    for name in ("training_separator.jsonl", "training_bom.json"):
        dataset = MixtureDataset([{"json_path": str(field / name)}], processor)
        assert len(dataset) == 1
    shutil.copy(root / "assets" / "demo.mp4", tmp_path)
    for name in ("separators_raw.jsonl", "separators_escaped.jsonl"):
        shutil.copy(field / name, tmp_path)
        out = tmp_path / f"{name}.answers"
        arguments = ["batch", tmp_path / name, "--out", out, "--max-new-tokens", "4", "--max-num-frames", "4"]
        for _ in range(2):
            done = cli(*arguments)
            assert done.returncode == 0, done.stderr
            assert [set(entry) >= {"answer"} for entry in answers_in(out)] == [True, True]
        assert "0 questions about 0 videos, 2 of 2 lines need no asking" in done.stderr


def test_a_question_file_in_another_encoding_is_bad_usage(cli, tmp_path):  # noqa: F811
    (tmp_path / "q.jsonl").write_bytes('{"video": "a.mp4", "question": "What?"}\n'.encode("utf-16"))
    done = cli("batch", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl")
    assert done.returncode == 2
    assert "q.jsonl, line 1 is not in UTF-8" in one_line_error(done)
