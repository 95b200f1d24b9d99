"""Temporal grounding: times in answers, scores, moments of the video world, the program from data to figures."""

import json

import pytest
from videoxl.evaluation.grounding import grounding_score, main, overlap, read_queries, spans_in_answer, summarize
from videoxl.video_world import GROUNDING_PROMPTS, grounding_moments, grounding_question, make_clip

ANSWERS = {
    "The event happens in the 24.3 - 30.4 seonds.": [(24.3, 30.4)],
    "24.3 - 30.4": [(24.3, 30.4)],
    "from 5 to 10 seconds": [(5, 10)],
    "From second 5 to second 10.": [],
    "between 0:05 and 1:10": [(5, 70)],
    "00:01:05 - 00:02:00.5": [(65, 120.5)],
    "[12.0, 15.5]": [(12, 15.5)],
    "(1:02:03–1:02:10)": [(3723, 3730)],
    "start: 3s, end: 9s": [(3, 9)],
    "It starts at 12 seconds and ends at 20 seconds.": [(12, 20)],
    "The start time is 4.5 and the end time is 6.": [(4.5, 6)],
    "1 minute 5 seconds to 1 minute 20 seconds": [(65, 80)],
    "1 - 2 minutes": [(60, 120)],
    "30 to 10 seconds": [(10, 30)],
    "0 - 5, 12 - 20 and 31 - 40": [(0, 5), (12, 20), (31, 40)],
    "5s-10s; 0:20-0:25": [(5, 10), (20, 25)],
    "At 9 seconds": [(9, 9)],
    "At 9 seconds - At 12 seconds": [(9, 12)],
    "I cannot tell.": [],
    "": [],
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_times_in_answers(answer):
    if answer.startswith("From second"):
        assert spans_in_answer(answer) == [(5, 10)]
    else:
        assert spans_in_answer(answer) == ANSWERS[answer]


def test_scores():
    assert overlap((0, 10), (5, 15)) == pytest.approx(1 / 3) and overlap((0, 1), (2, 3)) == 0 == overlap(
        (1, 1), (0, 2)
    )
    assert grounding_score("5 - 10", [(0, 1), (5, 10)]) == 1 and grounding_score("no idea", [(0, 1)]) == 0
    assert grounding_score("0 - 1, 5 - 10", [(5, 10)]) == 0  # the first counts
    assert summarize([0.29, 0.3, 0.5, 1.0], 1) == {
        "r@0.3": 0.75, "r@0.5": 0.5, "r@0.7": 0.25, "miou": 0.5225, "queries": 4, "unread": 1,
    }  # fmt: skip
    assert summarize([]) == {"queries": 0, "unread": 0}


def test_moments_are_where_they_are_said_to_be():
    kinds = set()
    for seed in range(30):
        clip = make_clip(seed, "held_out", 32)
        for moment in grounding_moments(clip):
            kinds.add(moment.kind)
            assert all(clip.start <= begin < end <= clip.start + clip.seconds for begin, end in moment.spans)
        shapes = {moment.subject: moment for moment in grounding_moments(clip) if moment.kind == "shape"}
        for question in clip.questions:
            if question.type == "when" and question.choices is None:
                shape = next(name for name in shapes if f" {name} " in question.text)
                assert question.answer == f"At {shapes[shape].spans[0][0]:g} seconds"
    assert kinds == {"shape", "motion", "change", "sign", "card"}


def test_queries_are_checked(tmp_path):
    good = {"video": "a.mp4", "query": "it rains", "span": [1, 2]}
    for wrong in ({"query": "x"}, {**good, "span": [3, 2]}, {**good, "span": None}, {**good, "query": 3}):
        (tmp_path / "q.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(wrong) + "\n")
        with pytest.raises(ValueError, match="line 2: expected"):
            read_queries(tmp_path / "q.jsonl", tmp_path)
    (tmp_path / "q.jsonl").write_text(json.dumps(good))
    assert read_queries(tmp_path / "q.jsonl", tmp_path)[0]["spans"] == [[1, 2]]


@pytest.mark.ties
def test_the_program(tmp_path, clips, capsys):
    main(["--clips", "1", "--seconds", "8", "--prompt", "twice", "--out", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["summary"]["all"]["queries"] == len(result["records"]) and result["configuration"]["checkpoint"]
    (tmp_path / "q.jsonl").write_text(json.dumps({"video": clips[0], "query": "it rains", "span": [1, 2]}))
    main(["--data", str(tmp_path / "q.jsonl"), "--prompt", "charades", "--max-new-tokens", "4"])
    assert "| all |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--data", "none.jsonl", "--prompt", "twice"])


@pytest.mark.parametrize("prompt", GROUNDING_PROMPTS)
def test_queries_are_trained_as_they_are_scored(tmp_path, clips, processor, prompt):
    data = pytest.importorskip("videoxl.training.data")
    spans = [[1, 2.5], [4, 5]]
    assert grounding_score(grounding_question("it rains.", spans, prompt).answer, spans[:1]) == 1
    with pytest.raises(ValueError, match="spans must be"):
        grounding_question("it rains", [[2, 1]], prompt)
    records = [{"video": clips[0], "query": "it rains", "spans": spans}, {"video": clips[0], "query": "x", "span": 3}]
    (tmp_path / "q.json").write_text(json.dumps(records))
    world = {"world": {"size": 1, "grounding": prompt, "clip": {"seconds": 8}}}
    mixture = [{"json_path": str(tmp_path / "q.json"), "grounding": prompt}, world]
    dataset = data.MixtureDataset(mixture, processor, video={"max_num_frames": 8})
    told = [processor.tokenizer.decode(s["input_ids"][slice(*s["answers"][0][:2])]) for s in (dataset[0], dataset[2])]
    assert spans_in_answer(told[0])[0] == (1, 2.5) and spans_in_answer(told[1])
    assert "spans must be" in dataset[1].reason
