"""The published needles of VideoChat-Flash: where they stand, how they are scored, and a run on stand-in pictures."""

import json

import numpy as np
import pytest
from PIL import Image

haystacks = pytest.importorskip("videoxl.evaluation.haystacks")
harness = pytest.importorskip("videoxl.evaluation.harness")
niah = pytest.importorskip("videoxl.evaluation.niah")
published = pytest.importorskip("videoxl.evaluation.published_needles")

OPTIONS = "\nOptions: (A) red\n(B) green\n(C) blue\n(D) grey\nOnly give the best option. Best option: ("


def picture(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((30, 40, 3), level, dtype=np.uint8)).save(path)


@pytest.fixture
def single(tmp_path):
    """A file of two single-hop needles with pictures beside it."""
    samples = []
    for number, level in enumerate((200, 220)):
        name = f"single/needle_{number}.png"
        picture(tmp_path / name, level)
        question = f"Find the frame of a wall {number}. what is its color{OPTIONS}"
        samples.append({"question": question, "answer": "BD"[number], "image": name, "id": number})
    (tmp_path / "single.json").write_text(json.dumps(samples))
    return tmp_path / "single.json"


@pytest.fixture
def multi(tmp_path):
    """A file of two chains, of 5 and 7 pictures; the pictures lie in one folder elsewhere."""
    samples = []
    for number, count in enumerate((5, 7)):
        names = [f"multi/niah_{number}_{place}.png" for place in range(count)]
        for place, name in enumerate(names):
            picture(tmp_path / "pictures" / name.split("/")[1], 200 + 5 * place)
        text = f"Find the frame of wall {number}. Locate the final frame, and "
        sample = {"images": names, "question1": f"{text}choose{OPTIONS}", "answer1": "A"}
        samples.append({**sample, "question2": f"{text}answer: what{OPTIONS}", "answer2": "C"})
    (tmp_path / "multi.json").write_text(json.dumps(samples))
    return tmp_path / "multi.json"


def settings_of(path, **more):
    return haystacks.Settings(size=8, depths=(0.0, 20.0, 40.0, 60.0, 80.0, 100.0), published=str(path), **more)


class Numbered:
    """A haystack whose frames say their number: level i % 190, below all needles."""

    def block(self, haystack, first, stop):
        return np.stack([np.full((8, 8, 3), number % 190, dtype=np.uint8) for number in range(first, stop)])


def levels(haystack, settings):
    frames = np.concatenate([frames for frames, _ in haystacks.blocks(haystack, Numbered(), settings)])
    return frames[:, 0, 0, 0].tolist()


def test_single_hop_needles_are_inserted_at_their_depth(single):
    settings = settings_of(single)
    assert published.number_of_haystacks("published_single", settings, None) == 12
    assert published.number_of_haystacks("published_single", settings, 1) == 6
    for number in range(12):
        haystack = published.published_haystack("published_single", 1000, number, settings)
        depth = settings.depths[number % 6]
        place = int(depth / 100 * 1000)
        assert place % 4 == 0 and haystack.total == 1004 and haystack.needles[0].frame == place
        seen = levels(haystack, settings)
        own = [number % 190 for number in range(1000)]
        assert seen == own[:place] + [200 + 20 * (number // 6)] * 4 + own[place:]
        (asked,) = haystack.asked
        assert (asked.kind, asked.depth, asked.answer) == ("published_single", depth, "BD"[number // 6])
        assert asked.choices == ("red", "green", "blue", "grey") and asked.evidence == ((place, place + 4),)


def test_multi_hop_pictures_stand_at_equal_distances(multi):
    assert published.multi_hop_places(1000, 5) == [0, 250, 500, 750, 1000]
    assert published.multi_hop_places(1000, 7) == [0, 166, 333, 500, 666, 833, 1000]
    settings = settings_of(multi, images=str(multi.parent / "pictures"))
    assert published.number_of_haystacks("published_multi_hop", settings, None) == 2
    haystack = published.published_haystack("published_multi_hop", 1000, 1, settings)
    seen, expected = levels(haystack, settings), []
    own, bounds = [number % 190 for number in range(1000)], [0, 164, 332, 500, 664, 832, 1000]
    for place in range(7):
        expected += [200 + 5 * place] * 4 + own[bounds[place] : (bounds[place + 1] if place < 6 else 1000)]
    assert seen == expected and haystack.total == 1028
    assert [(asked.kind, asked.answer) for asked in haystack.asked] == [
        ("published_caption", "A"),
        ("published_qa", "C"),
    ]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("B", True), ("b", True), ("(B)", True), (" B ", True), ("A", False), ("(", False), ("", False)],
)
def test_the_published_rule_for_answers(answer, right):
    assert published.is_right(answer, "B") is right


def test_scores_as_the_published_harness_reports_them():
    records = []
    for number, (caption, qa) in enumerate([(True, True), (True, False), (False, False), (True, True)]):
        shared = {"length": 1000, "haystack": f"published_multi_hop/1000/{number}"}
        records.append({"kind": "published_caption", "correct": caption, **shared})
        records.append({"kind": "published_qa", "correct": qa, **shared})
    records.append({"kind": "published_qa", "correct": True, "length": 1000, "haystack": "half a sample"})
    assert published.published_scores(records) == [
        {
            "length": 1000, "samples": 4, "score": 0.625, "caption_score": 0.75, "qa_score": 0.5,
            "both": 2, "only_caption": 1, "only_qa": 0, "none": 1,
        }
    ]  # fmt: skip
    assert published.published_scores([]) == []


def test_the_published_files(test_data, tmp_path):
    folder = test_data / "data" / "niah" / "videochatflash"
    single = published.read_samples(str(folder / "niah-coco-singlehop_20.json"), "published_single")
    multi = published.read_samples(str(folder / "niah-coco-multihop-100.json"), "published_multi_hop")
    assert (len(single), len(multi)) == (20, 100)
    for name in {name for sample in multi for name in sample["images"]} | {sample["image"] for sample in single}:
        picture(tmp_path / name, 250)
    for path, recipe, count in (("niah-coco-singlehop_20.json", "published_single", 120),
                                ("niah-coco-multihop-100.json", "published_multi_hop", 100)):  # fmt: skip
        settings = settings_of(folder / path, images=str(tmp_path))
        assert published.number_of_haystacks(recipe, settings, None) == count
        for number in range(count):
            haystack = published.published_haystack(recipe, 64, number, settings)
            assert all(len(asked.choices) == 4 and asked.answer in "ABCD" for asked in haystack.asked)
            assert [needle.frame % 4 for needle in haystack.needles] == [0] * len(haystack.needles)


def run(out, *flags):
    quick = ("--threads", "1", "--lengths", "16", "--mode", "full", "--no-plots", "--frame-size", "32")
    niah.main([*quick, "--out", str(out), *flags])
    return json.loads(out.read_text())


def test_a_run_of_each_kind_that_resumes(single, multi, tmp_path, capsys, monkeypatch):
    flags = ("--needles", str(single), "--kinds", "published_single", "--depths", "0", "50", "100", "--samples", "1")
    result = run(tmp_path / "one.json", *flags)
    assert [(cell["depth"], cell["total"]) for cell in result["cells"]] == [(0, 1), (50, 1), (100, 1)]
    assert all(haystack["frames"] == 20 for haystack in result["haystacks"])
    assert result["configuration"]["published"] == "single.json" and str(tmp_path) not in json.dumps(result)
    grown = run(tmp_path / "one.json", *flags[:-2])
    assert [cell["total"] for cell in grown["cells"]] == [2, 2, 2]
    assert grown["questions"][:3] == result["questions"]

    asked = []
    ask = harness.ask
    monkeypatch.setattr(harness, "ask", lambda checkpoint, *rest, **more: asked.append(
        (checkpoint.model.config.video_message, rest[-1], more)) or ask(checkpoint, *rest, **more))  # fmt: skip
    flags = ("--needles", str(multi), "--images", str(tmp_path / "pictures"))
    result = run(tmp_path / "chains.json", *flags, "--kinds", "published_caption", "published_qa")
    assert set(map(str, asked)) == {"(None, 1, {'repetition_penalty': 1.0})"}
    (scores,) = result["published_scores"]
    assert scores["samples"] == 2 and scores["both"] + scores["only_caption"] + scores["only_qa"] + scores["none"] == 2
    assert [haystack["frames"] for haystack in result["haystacks"]] == [16 + 4 * 5, 16 + 4 * 7]
    assert "caption score" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kinds", "published_qa"), "must be the JSON file of published needles"),
        (("--kinds", "single", "--needles", "x.json"), "and only for them"),
        (("--kinds", "published_qa", "single", "--needles", "x.json"), "goes by itself"),
        (("--kinds", "published_qa", "published_single", "--needles", "x.json"), "goes by itself"),
        (("--kinds", "published_qa", "--needles", "x.json"), "x.json does not exist"),
        (("--kinds", "published_single", "--needles", "{multi}"), "sample 0 lacks image, question, answer"),
        (("--kinds", "published_qa", "--needles", "{multi}"), "--images names the folder"),
    ],
)
def test_what_is_wrong_is_said(multi, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit):
        run(tmp_path / "out.json", *(flag.format(multi=multi) for flag in flags))
    assert message in capsys.readouterr().err
