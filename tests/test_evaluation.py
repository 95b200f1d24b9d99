"""Evaluation: haystacks, oracle chunks, kept key-values, result files, pictures and the report, on the bundled model.

The bundled checkpoint is taken as it is; nothing here depends on what it answers.
"""

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

harness = pytest.importorskip("videoxl.evaluation.harness")
haystacks = pytest.importorskip("videoxl.evaluation.haystacks")
niah = pytest.importorskip("videoxl.evaluation.niah")
report = pytest.importorskip("videoxl.evaluation.report")

SETTINGS = haystacks.Settings(size=32)
QUICK = ("--threads", "1", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def checkpoint():
    return harness.load_checkpoint(str(ROOT))


@pytest.fixture(scope="module")
def video(checkpoint):
    """A video of 61 frames, prefilled in streaming mode: the last group is a partial one."""
    settings = harness.sparse_settings(niah.build_parser().parse_args(["--out", "x.json"]), checkpoint.model)
    haystack = haystacks.make_haystack("single", 61, 0, SETTINGS)
    with harness.sparse_attention(checkpoint.model, harness.MODES["bilevel"], settings):
        return haystacks.encode(checkpoint, haystack, haystacks.GeneratedFrames(SETTINGS), SETTINGS)


def sparse(checkpoint, *flags):
    arguments = niah.build_parser().parse_args(["--out", "x.json", *flags])
    return harness.sparse_settings(arguments, checkpoint.model)


# --- where needles stand ---


@pytest.mark.parametrize("length", [64, 128, 1000, 10000])
@pytest.mark.parametrize("count", [1, 4])
def test_needles_stand_at_their_depths(length, count):
    settings = haystacks.Settings(size=32, needle_frames=count, needles_per_depth=3)
    haystack = haystacks.make_haystack("single", length, 1, settings)
    by_depth = {}
    for asked in haystack.asked:
        by_depth.setdefault(asked.depth, []).append(asked.evidence[0][0])
    assert sorted(by_depth) == [0, 25, 50, 75, 100]
    for depth, frames in by_depth.items():
        exact = depth / 100 * (length - count)
        assert len(frames) == haystacks.needles_at_depth("single", length, settings)
        assert any(abs(frame - exact) <= 0.5 for frame in frames)
        assert all(abs(frame - exact) <= haystacks.SPREAD * length + 1 for frame in frames)
    frames = [needle.frame for needle in haystack.needles]
    assert frames == sorted(frames)
    assert min(np.diff(frames)) >= count + haystacks.GAP
    assert frames[-1] + count <= length


def test_too_many_needles_are_an_error():
    with pytest.raises(ValueError, match="do not fit into 16 frames"):
        haystacks.make_haystack("multi_hop", 16, 0, SETTINGS)
    with pytest.raises(ValueError, match="need as many keys"):
        haystacks.make_haystack("single", 10000, 0, haystacks.Settings(needles_per_depth=30))


def test_a_haystack_follows_from_its_number_and_nothing_else():
    first, again = (haystacks.make_haystack("single", 128, 3, SETTINGS) for _ in range(2))
    assert first.asked == again.asked
    other = haystacks.make_haystack("single", 128, 4, SETTINGS)
    assert first.asked != other.asked
    shown = [question.text.rsplit("with the ", 1)[-1] for question in first.asked]
    assert len(set(shown)) == len(shown), "every needle has a key of its own"


def test_second_cards_stand_at_the_depths():
    haystack = haystacks.make_haystack("multi_hop", 256, 0, SETTINGS)
    assert {asked.kind for asked in haystack.asked} == {"multi_hop"}
    for asked in haystack.asked:
        assert abs(asked.evidence[-1][0] - asked.depth / 100 * 255) <= haystacks.SPREAD * 256 + 1
        assert asked.answer.count(", ") == 1
    assert len(haystack.needles) == 2 * len(haystack.asked)


@pytest.mark.parametrize("number", range(4))
def test_ordering_and_counting_share_haystacks(number):
    haystack = haystacks.make_haystack("few", 64, number, SETTINGS)
    counting = [asked for asked in haystack.asked if asked.kind == "counting"]
    assert [asked.answer for asked in counting] == [str(len(haystack.needles))] == [str(number + 1)]
    assert all(asked.depth is None for asked in haystack.asked)
    ordering = [asked for asked in haystack.asked if asked.kind == "ordering"]
    assert bool(ordering) == (number > 0)


def test_options_are_offered_where_asked_for():
    settings = haystacks.Settings(size=32, options=True)
    for asked in haystacks.make_haystack("single", 64, 0, settings).asked:
        assert asked.answer in "ABCD"
        assert f"{asked.answer}. {asked.choices['ABCD'.index(asked.answer)]}" in asked.text


# --- frames ---


@pytest.mark.parametrize("count", [1, 5])
def test_needle_frames_replace_haystack_frames(monkeypatch, count):
    settings = haystacks.Settings(size=32, needle_frames=count, fps=2.0)
    haystack = haystacks.make_haystack("single", 150, 0, settings)
    source = haystacks.GeneratedFrames(settings)
    bare = source.block(haystack, 0, 150)
    monkeypatch.setattr(haystacks, "BLOCK_FRAMES", 50)
    parts = list(haystacks.blocks(haystack, source, settings))
    frames, times = np.concatenate([part for part, _ in parts]), sum((part for _, part in parts), [])
    assert times == [frame / 2 for frame in range(150)]
    untouched = np.ones(150, dtype=bool)
    for needle in haystack.needles:
        untouched[needle.frame : needle.frame + count] = False
        assert (frames[needle.frame : needle.frame + count] == needle.picture).all()
    assert (~untouched).sum() == count * len(haystack.needles)
    assert (frames[untouched] == bare[untouched]).all()
    for asked in haystack.asked:
        start, end = asked.evidence[0]
        assert start * 2 in [needle.frame for needle in haystack.needles]
        assert end - start == pytest.approx(count / 2)


def test_haystack_from_a_video_file_begins_again_at_its_end(clips):
    film = haystacks.FilmFrames(clips[0], SETTINGS, most=64)
    first, second = (haystacks.make_haystack("single", 64, number, SETTINGS) for number in range(2))
    frames = film.block(first, 0, 64)
    assert frames.shape == (64, 32, 32, 3)
    assert frames.dtype == np.uint8
    seconds = next(step for step in range(1, 64) if (frames[step] == frames[0]).all())
    assert seconds == 9, "9 s at one frame a second"
    assert (frames[seconds:] == frames[:-seconds]).all()
    assert (film.block(first, 10, 20) == frames[10:20]).all()
    assert any((film.block(second, 0, 1)[0] == frame).all() for frame in frames)


def test_blockwise_encoding_equals_encoding_at_once(checkpoint, monkeypatch):
    haystack, source = haystacks.make_haystack("single", 84, 0, SETTINGS), haystacks.GeneratedFrames(SETTINGS)
    monkeypatch.setattr(haystacks, "BLOCK_FRAMES", 32)
    parts = haystacks.encode(checkpoint, haystack, source, SETTINGS)
    monkeypatch.setattr(haystacks, "BLOCK_FRAMES", 512)
    whole = haystacks.encode(checkpoint, haystack, source, SETTINGS)
    assert parts.timestamps == whole.timestamps
    assert torch.equal(parts.input_ids, whole.input_ids)
    for ours, theirs in zip(parts.cache.layers, whole.cache.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=1e-4)
    assert parts.chunks(4) == whole.chunks(4)


@pytest.fixture
def photos(tmp_path):
    """A folder with two pictures and questions about them."""
    for name, level in (("a.png", 0), ("b.png", 255)):
        Image.new("RGB", (40, 30), (level, level, level)).save(tmp_path / name)
    texts = [f"Question: {name}?\nOptions:(A) black\n(B) white\nChoose the best option." for name in "ab"]
    lists = {"needle": ["a.png", "b.png"], "retrieval_question": texts, "answer": ["A", "B"]}
    (tmp_path / "qa.json").write_text(json.dumps(lists))
    return tmp_path


def test_pictures_as_needles(photos):
    settings = haystacks.Settings(size=32, depths=(0.0, 100.0), options=True, photos=str(photos))
    haystack = haystacks.make_haystack("photos", 64, 1, settings)
    assert [needle.frame for needle in haystack.needles] == [0, 63]
    assert [needle.picture.max() for needle in haystack.needles] == [255, 0], "pictures take turns at the depths"
    assert [(asked.answer, asked.choices) for asked in haystack.asked] == [(a, ("black", "white")) for a in "BA"]
    with pytest.raises(ValueError, match="use --options"):
        haystacks.make_haystack("photos", 64, 0, haystacks.Settings(photos=str(photos), depths=(0.0,)))
    with pytest.raises(ValueError, match="serve kind single"):
        haystacks.recipe_of("counting", settings)
    with pytest.raises(FileNotFoundError, match="qa.json"):
        haystacks.read_photos(str(photos / "nowhere"), 32)
    lists = json.loads((photos / "qa.json").read_text())
    (photos / "qa.json").write_text(json.dumps(lists | {"answer": ["A", "C"]}))
    with pytest.raises(ValueError, match="needs options"):
        haystacks.read_photos(str(photos), 32)


def test_published_needles_can_be_read(test_data):
    photos = haystacks.read_photos(str(test_data / "data" / "niah" / "clean_needles"), 56)
    assert len(photos) == 8
    assert photos[0][2:] == ("B", ("CAT", "SAM", "RUN", "BOX"))


# --- chunks, levels, modes ---

SPANS = [(0.0, 16.0), (16.0, 32.0), (32.0, 48.0)]


@pytest.mark.parametrize(
    ("evidence", "chunks"),
    [
        ([(0, 1)], [0]),
        ([(15, 16)], [0]),  # the end is not part of it
        ([(15, 16.5)], [0, 1]),
        ([(16, 16)], [1]),  # a moment
        ([(0, 48)], [0, 1, 2]),
        ([(40, 41), (2, 3), (41, 42)], [0, 2]),
        ([(48, 48)], [2]),  # the very end
        ([(47, 60)], [2]),
        ([], []),
    ],
)
def test_evidence_becomes_chunks(evidence, chunks):
    assert harness.evidence_chunks(SPANS, evidence) == chunks


@pytest.mark.parametrize("evidence", [(49, 50), (-2, -1), (3, 2)])
def test_evidence_outside_the_video_is_an_error(evidence):
    with pytest.raises(ValueError, match="not in the video"):
        harness.evidence_chunks(SPANS, [evidence])


def test_ranges_can_be_read_again():
    plots = pytest.importorskip("videoxl.evaluation.plots")
    assert harness.ranges([12, 5, 6, 7, 0]) == "0,5-7,12"
    assert plots.parse_ranges("0,5-7,12") == [0, 5, 6, 7, 12]
    assert plots.parse_ranges(harness.ranges([])) == []


@pytest.mark.parametrize("flags", [(), ("--decode-chunk-groups", "1", "--pool-size", "3", "--reload-count", "2")])
def test_kept_tokens_are_those_in_the_cache(checkpoint, video, flags):
    settings, mode = sparse(checkpoint, *flags), harness.MODES["bilevel"]
    question = "What is on the card with the red star?"
    reply = harness.ask(checkpoint, video, question, mode, settings, max_new_tokens=1)
    layout = video.layout.videos[-1]
    text = len(video.input_ids) - video.num_visual_tokens
    suffix = torch.zeros(1, 5, dtype=torch.long)
    cache = copy.deepcopy(video).cache
    with harness.sparse_attention(checkpoint.model, mode, settings):
        ids = torch.cat([video.input_ids[None], suffix], dim=1)
        options = {"dense_chunks": reply.dense, "max_new_tokens": 1, "do_sample": False}
        checkpoint.model.generate(input_ids=ids, past_key_values=cache, **options)
    assert cache.layers[0].keys.shape[2] - suffix.shape[1] - text == reply.kept_tokens
    assert reply.kept_share == reply.kept_tokens / video.num_visual_tokens < 1
    assert video.num_visual_tokens == sum(group.end - group.visual_start for group in layout)


def test_modes_choose_their_chunks(checkpoint, video):
    settings = sparse(checkpoint, "--decode-chunk-groups", "2")
    last = len(video.chunks(2)) - 1
    evidence = ((17.0, 18.0), (33.0, 34.0))

    def dense(name, question="What happens at 42 seconds?"):
        reply = harness.ask(checkpoint, video, question, harness.MODES[name], settings, evidence, max_new_tokens=1)
        return reply.dense

    assert dense("streaming") == list(range(last + 1))
    assert dense("oracle") == [0, 2, 4, last]
    assert dense("pooled") == [0, last], "also where the question names a time"
    assert 5 in dense("bilevel"), "the question names a time"


def test_a_mode_refuses_what_it_cannot_use(checkpoint, video):
    settings = sparse(checkpoint)
    with pytest.raises(ValueError, match="encode it again"):
        harness.ask(checkpoint, video, "What?", harness.MODES["full"], settings)
    with pytest.raises(ValueError, match="needs the question's evidence"):
        harness.ask(checkpoint, video, "What?", harness.MODES["oracle"], settings)


def test_settings_of_the_command_line_win(checkpoint, monkeypatch):
    flags = ("--pool-size", "2", "--reload-count", "3", "--reload-layers", "0", "0.5", "--reload-positions", "true")
    settings = sparse(checkpoint, *flags)
    assert settings["pool_size"] == 2
    assert {"count": 3, "positions": "true", "layers": [0.0, 0.5]}.items() <= settings["reload"].items()
    before = checkpoint.model.config.sparse_attention
    with harness.sparse_attention(checkpoint.model, harness.MODES["bilevel"], settings):
        resolved = checkpoint.model.config.resolve_sparse_attention()
        assert (resolved.prefill, resolved.decode, resolved.pool_size) == ("streaming", "bilevel", 2)
    assert checkpoint.model.config.sparse_attention is before


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        harness.load_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="holds no \\*.safetensors"):
        harness.weights_hash(tmp_path)
    for name in ("nowhere", str(tmp_path / "nowhere"), "./nowhere"):
        with pytest.raises(ValueError, match="neither a checkpoint's folder nor a Hub id"):
            harness.load_checkpoint(name)


# --- needle in a haystack, end to end ---


def run_niah(out, *flags):
    base = ("--lengths", "64", "--questions-per-cell", "2", "--frame-size", "32", "--no-plots", "--out", str(out))
    niah.main([*QUICK, *base, *flags])
    return json.loads(out.read_text())


def test_niah_writes_resumes_and_grows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "niah.json"
    result = run_niah(out)
    assert [cell["total"] for cell in result["cells"]] == [2] * 5
    assert [fact["haystack"] for fact in result["haystacks"]] == ["single/64/0", "single/64/1"]
    record = result["questions"][0]
    assert {"answer", "correct", "kept_share", "needle_chunks", "needle_reloaded", "reloaded", "scores"} <= set(record)
    assert len(record["scores"]) == result["haystacks"][0]["chunks"]
    assert "| all |" in capsys.readouterr().out
    text = out.read_text()
    assert str(ROOT) not in text
    assert str(tmp_path) not in text
    assert len(result["configuration"]["checkpoint"]["weights_sha256"]) == 64

    # As after a kill: the second haystack is missing.
    cut = result | {"haystacks": result["haystacks"][:1], "questions": result["questions"][:5]}
    out.write_text(json.dumps(cut))
    encoded = []
    encode = haystacks.encode
    monkeypatch.setattr(niah, "encode", lambda model, haystack, *rest: encoded.append(haystack.name) or encode(
        model, haystack, *rest))  # fmt: skip
    again = run_niah(out)
    assert encoded == ["single/64/1"]
    answers = [[(record["question"], record["answer"]) for record in each["questions"]] for each in (result, again)]
    assert answers[0] == answers[1]

    # Kinds that share haystacks, and more questions, are added.
    encoded.clear()
    grown = run_niah(out, "--kinds", "single", "counting", "--lengths", "64", "80")
    assert encoded == ["few/64/0", "few/64/1", "few/80/0", "few/80/1", "single/80/0", "single/80/1"]
    encoded.clear()
    grown = run_niah(out, "--kinds", "ordering", "counting", "--lengths", "64")
    assert encoded == ["few/64/1"], "the first haystack has one card, and nothing to order"
    assert set(grown["overall"]) == {"single", "ordering", "counting"}
    assert sum(total["total"] for total in grown["overall"].values()) == len(grown["questions"])
    names = [fact["haystack"] for fact in grown["haystacks"]]
    assert len(names) == len(set(names))
    encoded.clear()
    run_niah(out, "--kinds", "ordering", "counting", "--lengths", "64")
    assert encoded == []

    with pytest.raises(SystemExit):
        run_niah(out, "--pool-size", "2")
    assert "made with other settings (sparse_attention;" in capsys.readouterr().err
    out.write_text("{")
    with pytest.raises(SystemExit):
        run_niah(out)
    assert "is not JSON" in capsys.readouterr().err


def test_niah_counts_right_answers_and_draws_them(tmp_path, monkeypatch):
    plots = pytest.importorskip("videoxl.evaluation.plots")
    ask = harness.ask

    def perfect(checkpoint, video, text, *rest):
        reply = ask(checkpoint, video, text, *rest)
        return replace(reply, text=answers[text])

    answers = {}
    make = haystacks.make_haystack

    def remembered(*arguments):
        haystack = make(*arguments)
        answers.update({asked.text: asked.answer for asked in haystack.asked})
        return haystack

    monkeypatch.setattr(harness, "ask", perfect)
    monkeypatch.setattr(niah, "make_haystack", remembered)
    out = tmp_path / "perfect.json"
    result = run_niah(out, "--questions-per-cell", "1", "--kinds", *niah.KINDS, "--options", "--plots")
    assert all(total["accuracy"] == 1 for total in result["overall"].values())
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == ["perfect_chunks.png", "perfect_multi_hop.png", "perfect_single.png"]
    for name in pictures:
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, "not empty"
    assert plots.heat_map(result, "single").axes[0].get_title() == "answers right: 100.0 %"


@pytest.mark.parametrize("mode", ["full", "mask", "oracle", "pooled"])
def test_niah_in_other_modes(tmp_path, mode):
    result = run_niah(tmp_path / "niah.json", "--mode", mode, "--questions-per-cell", "1", "--depths", "0", "50")
    records = result["questions"]
    assert result["configuration"]["mode"]["name"] == mode
    assert all(("kept_share" in record) == (mode in ("oracle", "pooled")) for record in records)
    if mode == "oracle":
        assert all(record["needle_reloaded"] for record in records)


def test_niah_on_other_members_of_the_family(tmp_path, member, tokenizer, capsys):
    folder = tmp_path / f"member_{member.config.token_selector}_{member.config.beacon_window}"
    member.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "niah.json"
    flags = ["--model", str(folder), "--mode", "full", "--lengths", "24", "--questions-per-cell", "1", "--no-plots"]
    flags += ["--depths", "0", "100", "--needles-per-depth", "1", *QUICK]
    niah.main(["--out", str(out), *flags])
    result = json.loads(out.read_text())
    videos = result["haystacks"]
    assert videos and all(video["frames"] == 24 for video in videos)
    assert result["questions"] and all("answer" in record for record in result["questions"])
    bilevel = ["--out", str(tmp_path / "other.json"), *flags[:2], "--mode", "bilevel", *flags[4:]]
    if member.config.beacon_window or member.config.token_selector or member.config.mm_llm_compress:
        with pytest.raises(SystemExit):
            niah.main(bilevel)
        assert "sparse_attention at its defaults only" in capsys.readouterr().err
        niah.main(bilevel[:2] + flags[:2] + flags[4:])
        taken, said = "full", "does not have the mode bilevel: full is taken"
    else:
        niah.main(bilevel)
        taken, said = "bilevel", ""
    assert said in capsys.readouterr().err
    result = json.loads((tmp_path / "other.json").read_text())
    assert result["questions"] and result["configuration"]["mode"]["name"] == taken


def test_the_report_takes_the_modes_that_a_member_has(tmp_path, member, tokenizer, capsys):
    folder = tmp_path / f"report_{member.config.token_selector}_{member.config.beacon_window}"
    member.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ("--model", str(folder), "--clips", "1", "--seconds", "8", "--questions", "1")
    result, table = run_report(tmp_path / "report.json", *flags)
    compresses = member.config.beacon_window or member.config.token_selector or member.config.mm_llm_compress
    left_out = list(harness.MODES)[1:] if compresses else []
    assert list(result["summary"]) == [name for name in harness.MODES if name not in left_out]
    assert result["configuration"]["modes_left_out"] == left_out
    said = f"left out, as this model does not have them: {', '.join(left_out)}"
    assert (said in capsys.readouterr().err) == bool(left_out) == ("does not have" in table)


def test_niah_on_a_video_file(tmp_path, clips, photos):
    flags = ("--haystack", clips[0], "--needles", str(photos), "--options", "--depths", "0", "100")
    result = run_niah(tmp_path / "film.json", *flags)
    assert result["configuration"]["haystack"] == "a.mp4"
    assert {record["expected"] for record in result["questions"]} == {"A", "B"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lengths", "4"), "at least 8 frames"),
        (("--depths", "50", "101"), "percentages from 0 to 100"),
        (("--out", "x.txt"), "must end in .json"),
        (("--haystack", "nowhere.mp4"), "nowhere.mp4"),
        (("--reload-share", "2"), "share must be"),
    ],
)
def test_niah_says_what_is_wrong(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        run_niah(tmp_path / "x.json", *flags)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# --- the report ---


def run_report(out, *flags):
    report.main([*QUICK, "--frame-size", "32", "--out", str(out), *flags])
    return json.loads(out.read_text()), out.with_suffix(".md").read_text()


def test_report_has_all_modes(tmp_path):
    flags = ("--clips", "2", "--seconds", "24", "64", "--questions", "6", "--decode-chunk-groups", "1")
    result, table = run_report(tmp_path / "report.json", *flags)
    assert list(result["summary"]) == list(harness.MODES)
    for name, entry in result["summary"].items():
        assert entry["all"]["total"] == 12
        assert sum(each["total"] for each in entry["types"].values()) == 12
        assert (entry["kept_share"] < 1) == (harness.MODES[name].decode == "bilevel")
    assert result["summary"]["pooled"]["kept_share"] < result["summary"]["bilevel"]["kept_share"]
    assert [video["frames"] for video in result["videos"]] == [24, 64]
    assert set(result["videos"][0]["encode_seconds"]) == {"full", "mask", "streaming"}
    assert "| question type | questions | full | mask | streaming | bilevel | oracle | pooled |" in table
    assert all(line.count("|") == 9 for line in table.splitlines() if line.startswith("|"))
    assert str(ROOT) not in json.dumps(result) + table


def test_report_on_absent_things_descriptions_and_conversations(tmp_path, monkeypatch):
    """What was said in a conversation is asked behind; who says that a thing is absent is counted."""
    prompts = []

    def chat(video, tokenizer, text, history=None, **options):
        prompts.append((text, len(history or [])))
        right = next(asked for asked in clip.questions if asked.text == text)
        answer = "Not in the video." if right.type == "color" else right.answer
        if right.type == "describe" and not history:
            answer = answer.replace("There is a", "There is a small", 1)
        return answer, [*(history or []), {"role": "user"}, {"role": "assistant"}], []

    kinds = ("absent", "color", "describe")
    clip = report.make_clip(3, "held_out", 16, kinds=kinds, wordings=4, num_questions=5, choice_share=0.0)
    start = harness.start

    def started(args):
        checkpoint = start(args)
        monkeypatch.setattr(checkpoint.model, "chat", chat)
        return checkpoint

    monkeypatch.setattr(harness, "start", started)
    flags = ("--clips", "1", "--first-seed", "3", "--seconds", "16", "--questions", "5", "--wordings", "4")
    flags += ("--choice-share", "0", "--kinds", *kinds, "--turns", "2", "--modes", "full", "--lifelike", "1")
    result, table = run_report(tmp_path / "report.json", *flags)
    texts = [asked.text for asked in clip.questions]
    behind = [0, 0, 0, 2, 0, 0, 0, 2, 0, 0]
    assert prompts == [(text, turn) for text, turn in zip(np.repeat(texts, 2), behind, strict=True)]
    entry = result["summary"]["full"]
    colors = sum(asked.type == "color" for asked in clip.questions)
    assert colors and entry["absent"]["accuracy"] == 1 and entry["wrongly_absent"]["correct"] == colors
    assert entry["in_turns"]["total"] == 5 and 0 < entry["facts"] < 1
    for row in ("in conversations of 2 turns", "it is not there: where so", "| where not so", "facts told (F1)"):
        assert row in table


def test_report_on_written_files(tmp_path):
    flags = ("--clips", "1", "--seconds", "12", "--questions", "2", "--modes", "full", "--encode", "h264")
    result, _ = run_report(tmp_path / "report.json", *flags, "--no-answers")
    assert result["videos"][0]["frames"] == 12
    assert result["questions"] == []


def test_report_on_a_file_of_questions(tmp_path, clips, capsys):
    name = clips[0].rsplit("/", 1)[-1]
    shutil.copy(clips[0], tmp_path)
    entries = [
        {"video": name, "type": "color", "question": "Which color?", "answer": "red", "evidence": [[1, 2]]},
        {"video": name, "type": "color", "question": "A or B?", "answer": "B", "choices": ["red", "blue"]},
    ]
    data = tmp_path / "questions.json"
    data.write_text(json.dumps(entries))
    result, table = run_report(tmp_path / "r.json", "--data", str(data), "--modes", "streaming", "oracle")
    totals = {name: entry["all"]["total"] for name, entry in result["summary"].items()}
    assert totals == {"streaming": 2, "oracle": 1}, "the oracle needs evidence"
    assert str(tmp_path) not in json.dumps(result) + table
    for change, message in (
        ({"video": "none.mp4"}, "entry 0: there is no video none.mp4"),
        ({"answer": 3}, "entry 0: 'answer' must be a text"),
        ({"choices": ["red"]}, "'red' is not one of the options A"),
    ):
        data.write_text(json.dumps([entries[0] | change]))
        with pytest.raises(SystemExit):
            run_report(tmp_path / "r.json", "--data", str(data))
        assert message in capsys.readouterr().err


def test_summary_counts_errors_in_seconds_and_what_changed():
    def record(kind, expected, choices=None, **modes):
        replies = {
            name: {
                "answer": answer,
                "correct": answer == expected,
                "seconds": 1.0,
                "kept_share": 0.5,
                "kept_tokens": 4,
            }
            for name, answer in modes.items()
        }
        return {"video": "a", "type": kind, "expected": expected, "choices": choices, "modes": replies}

    records = [
        record("when", "At 4 seconds", full="At 4 seconds", bilevel="At 6 seconds"),
        record("when", "At 8 seconds", full="At 9 seconds", bilevel="soon"),
        record("when_gone", "At 2 seconds", full="At 2 seconds", bilevel="never"),
        record("when", "B", ("At 1 seconds", "At 2 seconds"), full="A", bilevel="B"),
    ]
    modes = [harness.MODES["full"], harness.MODES["bilevel"]]
    videos = [{"encode_seconds": {"full": 2.0, "streaming": 1.0}}]
    summary = report.summarize(records, videos, modes)
    expected = {"median_error": 0, "close": 1.0, "total": 3, "no_time": 0}
    assert summary["full"]["when"] == expected
    assert summary["bilevel"]["when"] == {"median_error": None, "close": 0.0, "total": 3, "no_time": 2}
    assert (summary["bilevel"]["lost"], summary["bilevel"]["gained"]) == (2, 1)
    assert summary["full"]["open"]["total"] == 3
    assert summary["bilevel"]["encode_seconds"] == 1.0


def test_report_asks_packed_videos_too(tmp_path):
    flags = ("--clips", "1", "--seconds", "64", "--questions", "3", "--modes", "full", "bilevel")
    result, table = run_report(tmp_path / "report.json", *flags, "--store", "int8", "int4")
    names = ["full", "full int8", "full int4", "bilevel", "bilevel int8", "bilevel int4"]
    assert list(result["summary"]) == names and "difference, points" in table
    against = [result["summary"][name]["against"] for name in names]
    assert against == ["full", "full", "full", "full", "bilevel", "bilevel"]
    shares = result["videos"][0]["store_share"]
    assert shares["full int4"] < shares["full int8"] < 0.8  # of float32, with timestamps of as many tokens


def test_paired_differences_count_a_video_as_one():
    alike = [("a", True, False)] * 10 + [("b", False, False)] * 10
    found = report.paired_difference(alike)
    assert found["difference"] == -0.5
    low, high = found["difference_interval"]
    assert low == pytest.approx(-0.5 - 1.96 * 50**0.5 / 20, abs=1e-4) and high == pytest.approx(-1 - low, abs=1e-4)
    assert report.paired_difference([]) == {"difference": None, "difference_interval": None}


def test_a_killed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    harness.write_text(path, "old")
    monkeypatch.setattr(harness.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        harness.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_result_files_are_json_with_one_line_an_entry():
    result = {"a": {"b": [1, 2]}, "list": [{"x": 1}, {"x": "é"}], "empty": []}
    text = harness.dump(result)
    assert json.loads(text) == result
    assert '\n  {"x": 1},\n' in text


def test_environment_names_no_machine():
    facts = harness.environment("cpu")
    assert facts["hardware"]["cores"] >= 1
    assert set(facts["versions"]) == {"python", "torch", "transformers", "numpy"}
    assert SimpleNamespace(**facts).git_revision
