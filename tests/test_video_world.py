"""The procedural world: determinism, splits, and answers recomputed from what is where and when, and from pixels."""

import os
import re
import subprocess
import sys
from itertools import combinations

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videoxl.video_world import (
    ABSENT,
    CHOICE_PROMPT,
    COLORS,
    DIGITS,
    NEEDLE_KINDS,
    NOT_THERE,
    SHAPES,
    SIZES,
    SPLITS,
    TEXTS,
    WORDINGS,
    WORDS,
    Card,
    absent_keys,
    draw_needle,
    facts_told,
    haystack_frames,
    make_clip,
    name_of,
    needle_questions,
    render_choices,
)
from videoxl.video_world.drawing import compress

SIDE = 48  # of frames, in pixels
LETTERS = "ABCD"

clips = st.builds(
    make_clip,
    st.integers(0, 10**6),
    st.sampled_from(SPLITS),
    st.integers(1, 70),
    start=st.sampled_from([0.0, 100.0]),
    choice_share=st.sampled_from([0.0, 0.5, 1.0]),
    wordings=st.sampled_from([2, WORDINGS]),
)


def said(question):
    """The answer as text: what the letter stands for where options are offered."""
    return question.answer if question.choices is None else question.choices[LETTERS.index(question.answer)]


def names_in(question):
    """What a question fills into its wording: {"shape": "star"}."""
    text = question.text.split("\n")[0]
    for wording in TEXTS[question.type]:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+)", re.escape(wording))
        if match := re.fullmatch(pattern, text):
            return match.groupdict()
    raise AssertionError(f"no wording of {question.type!r} fits {text!r}")


def visible(item, clip):
    """Whole seconds, from the clip's first frame, in which an item is there (a card may cover it)."""
    return [second for second in range(clip.seconds) if item.span_at(second + 0.5)]


def appearances(item, clip):
    seconds = visible(item, clip)
    return [second for second in seconds if second - 1 not in seconds]


def right_answer(clip, question):
    """The answer, from items and cards alone; every question must have exactly one."""
    names, start = names_in(question), clip.start
    shapes = {item.shape: item for item in clip.items if item.shape}
    assert len(shapes) == sum(bool(item.shape) for item in clip.items), "a shape comes once in a clip"
    item = shapes.get(names.get("shape"))
    kind = question.type

    def called(text):  # "the star", "the red star" and "the word sun" of two
        return text.removeprefix("the ")

    def card(name):
        keys = [("word " + each.key) if isinstance(each.key, str) else " ".join(each.key) for each in clip.cards]
        assert keys.count(called(name)) == 1
        return clip.cards[keys.index(called(name))]

    def at(second):
        return f"At {start + second:g} seconds"

    if kind == "exists":
        return "yes" if item else "no"
    if kind == "shape":
        wearing = {
            each.shape for each in shapes.values() if names["color"] in (each.color, (each.change or (0, 0))[1])
        }
        assert len(wearing) == 1
        return wearing.pop()
    if kind in ("color", "size", "direction"):
        assert kind != "color" or item.change is None
        return getattr(item, kind)
    if kind == "motion":
        return "yes" if item.direction else "no"
    if kind == "change":
        return item.change[1]
    if kind == "count":
        return str(len(shapes))
    if kind == "times":
        return str(len(appearances(item, clip)))
    if kind == "when":
        return at(visible(item, clip)[0])
    if kind == "when_gone":
        assert len(appearances(item, clip)) == 1
        return at(visible(item, clip)[-1] + 1)
    if kind == "duration":
        assert len(appearances(item, clip)) == 1
        return f"{len(visible(item, clip))} seconds"
    if kind in ("first", "longer"):
        pair = [shapes[called(names[name])] for name in "ab"]
        values = [visible(each, clip)[0] if kind == "first" else -len(visible(each, clip)) for each in pair]
        assert values[0] != values[1]
        return f"the {pair[values[0] > values[1]].shape}"
    if kind == "between":
        a, b = (float(names[name]) - start for name in "ab")
        there = [each for each in shapes.values() for second in appearances(each, clip) if a <= second <= b]
        assert len(there) == 1
        return f"a {there[0].color} {there[0].shape}"
    if kind in ("sign_word", "sign_digit"):
        shown = [each.text for each in clip.items if each.text in (WORDS if kind == "sign_word" else DIGITS)]
        assert len(shown) == 1
        return shown[0]
    if kind == "needle":
        return card(names["key"]).value
    if kind == "two_hop":
        value = card(names["key"]).value
        return f"{value}, {card('word ' + value).value}"
    if kind == "card_count":
        return str(len(clip.cards))
    if kind == "card_order":
        return ", ".join(each.value for each in sorted(clip.cards, key=lambda each: each.second))
    if kind == "card_first":
        return f"the {min((names['a'], names['b']), key=lambda name: card(name).second)}"
    if kind == "when_card":
        return at(card(names["key"]).second)
    raise AssertionError(f"no oracle for {kind!r}")


# ---------------------------------------------------------------- what follows from a seed


def same(clip, other):
    arrays = all(np.array_equal(getattr(clip, name), getattr(other, name)) for name in ("backdrop", "noise"))
    return arrays and (clip.items, clip.cards, clip.questions) == (other.items, other.cards, other.questions)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(SPLITS), st.integers(1, 40))
def test_a_seed_is_a_clip(seed, split, seconds):
    clip, again = make_clip(seed, split, seconds), make_clip(seed, split, seconds)
    assert same(clip, again)
    assert not same(clip, make_clip(seed + 1, split, seconds))


DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from videoxl.video_world import make_clip
clip = make_clip(5, "train", 24, cards=3, chains=1)
print(hashlib.sha256(repr(clip.questions).encode() + clip.frames([0, 7.5, 23]).tobytes()).hexdigest())
"""


def test_every_process_makes_the_same_clip(root):
    command = [sys.executable, "-c", DIGEST, str(root)]
    digests = {
        subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True, text=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_splits_share_nothing():
    seen = {}
    for split in SPLITS:
        for seed in range(60):
            clip = make_clip(seed, split, 8, num_questions=0)
            key = clip.backdrop.tobytes()
            assert key not in seen, f"{split} {seed} repeats {seen[key]}"
            seen[key] = (split, seed)
    hays = [haystack_frames(3, [0.0, 64.0], split=split) for split in SPLITS]
    assert all((a != b).any(axis=(1, 2, 3)).all() for a, b in combinations(hays, 2))


def test_the_start_shifts_times_and_nothing_else():
    clip, later = (make_clip(4, "train", 24, start=start, choice_share=0.0) for start in (0.0, 100.0))
    assert (clip.items, clip.cards) == (later.items, later.cards)
    assert np.array_equal(clip.frames([0, 5.5]), later.frames([100, 105.5]))
    for question, shifted in zip(clip.questions, later.questions, strict=True):
        assert shifted.evidence == tuple((a + 100, b + 100) for a, b in question.evidence)
    when = [each.answer for each in later.questions if each.type in ("when", "when_gone", "when_card")]
    assert when and all(100 <= int(re.fullmatch(r"At (\d+) seconds", answer)[1]) <= 124 for answer in when)


# ---------------------------------------------------------------- questions


@settings(max_examples=150, deadline=None)
@given(clips)
def test_answers_are_what_items_and_cards_say(clip):
    assert clip.questions
    for question in clip.questions:
        assert said(question) == right_answer(clip, question), question


def test_every_type_of_question_is_asked():
    asked = {question.type for seed in range(40) for question in make_clip(seed, "train", 32).questions}
    assert asked == set(TEXTS) - {"caption", "describe"}
    caption = make_clip(0, "train", 8, kinds=("caption",)).questions
    assert [question.type for question in caption] == ["caption"] and caption[0].answer


@settings(max_examples=60, deadline=None)
@given(clips)
def test_evidence_lies_in_the_clip(clip):
    for question in clip.questions:
        assert question.evidence, question
        for begin, end in question.evidence:
            assert clip.start <= begin < end <= clip.start + clip.seconds, question


@settings(max_examples=60, deadline=None)
@given(clips)
def test_options_hold_the_answer_once(clip):
    for question in clip.questions:
        if question.choices is None:
            assert "\n" not in question.text
            continue
        text, *options, prompt = question.text.split("\n")
        assert prompt == CHOICE_PROMPT and text.endswith(("?", "."))
        assert options == [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
        assert 2 <= len(question.choices) == len(set(question.choices)) <= 4
        assert question.answer in LETTERS and question.choices.count(said(question)) == 1


def test_letters_are_spread():
    rng, letters = np.random.default_rng(0), []
    for _ in range(400):
        text, letter, choices = render_choices("What?", "red", COLORS, rng)
        assert choices[LETTERS.index(letter)] == "red" and len(choices) == 4
        letters.append(letter)
    assert all(60 < letters.count(letter) < 140 for letter in LETTERS)


def test_kinds_and_numbers_of_questions_are_chosen():
    clip = make_clip(1, "train", 32, num_questions=3, kinds=("color", "when"), choice_share=0.0)
    assert len(clip.questions) == 3 and {question.type for question in clip.questions} <= {"color", "when"}
    assert all(question.choices is None for question in clip.questions)
    weighted = [
        make_clip(seed, "train", 32, num_questions=1, kinds={"count": 9.0, "exists": 1.0}).questions[0].type
        for seed in range(100)
    ]
    assert weighted.count("count") > weighted.count("exists") > 0
    bare = make_clip(2, "train", 16, shapes=0, signs=0, cards=0)
    assert bare.items == bare.cards == ()
    assert {said(question) for question in bare.questions if question.type in ("count", "card_count")} == {"0"}
    assert make_clip(1, num_questions=0).questions == ()


def test_every_wording_is_asked_and_no_other_question_changes():
    few, many = (
        {
            question.text.split("\n")[0]
            for seed in range(100)
            for question in make_clip(seed, seconds=32, wordings=wordings).questions
        }
        for wordings in (2, WORDINGS)
    )
    for kind, wordings in TEXTS.items():
        for number, wording in enumerate(wordings if kind not in ("caption", "describe") else ()):
            pattern = re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(wording)))
            assert any(pattern.fullmatch(text) for text in many), wording
            assert any(pattern.fullmatch(text) for text in few) == (number < 2), wording
    assert all(
        len(set(wordings)) == WORDINGS for kind, wordings in TEXTS.items() if kind not in ("caption", "describe")
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([8, 24, 64]))
def test_what_is_absent_is_not_there(seed, seconds):
    clip = make_clip(seed, "held_out", seconds, kinds=tuple(ABSENT), choice_share=0.5, wordings=WORDINGS)
    named = {item.shape for item in clip.items if item.shape}
    for question in clip.questions:
        assert question.answer == NOT_THERE and question.choices is None
        assert question.evidence == ((0.0, float(seconds)),)
        if question.type == "absent":
            assert any(shape in question.text for shape in SHAPES)
            assert not any(shape in question.text for shape in named), "asked for a shape that is there"
        if question.type == "absent_sign":
            assert not any(item.text for item in clip.items)
        if question.type == "absent_card":
            assert not any(f"the {name_of(card.key)}" in question.text for card in clip.cards)
    assert clip.questions


def test_absent_cards_resemble_those_that_are_there():
    keys = [("red", "star"), "sun"]
    absent = absent_keys(keys, np.random.default_rng(0))
    assert not set(keys) & set(absent) and len(absent) == len(COLORS) * len(SHAPES) + len(WORDS) - 2
    assert all("red" in key or "star" in key for key in absent[:2])


def test_a_description_tells_true_facts_in_two_sentences():
    seen = set()
    for seed in range(30):
        clip = make_clip(seed, "train", 24, kinds=("describe",), wordings=WORDINGS)
        (question,) = clip.questions
        sentences = question.answer.removesuffix(".").split(". ")
        assert len(sentences) == 2 and sentences[0].startswith("There is ")
        places = []
        for item in clip.items:
            if item.shape:
                assert f"a {item.size} {item.color} {item.shape}" in sentences[0]
                places.append((item.spans[0][0], sentences[0].index(item.shape)))
            else:
                assert item.text in sentences[1]
        assert sorted(places, key=lambda place: place[1]) == sorted(places, key=lambda place: (place[0], place[1]))
        facts = facts_told(question.answer)
        shapes = sum(bool(item.shape) for item in clip.items)
        assert len(facts) == max(shapes, 1) + max(len(clip.items) - shapes, 1) + 1
        number = {0: "no card", 1: "1 card"}.get(len(clip.cards), f"{len(clip.cards)} cards")
        assert sentences[1].endswith(f" and there {'is' if len(clip.cards) < 2 else 'are'} {number}")
        seen |= {question.text}
        assert facts_told("something else") != facts
    assert seen == set(TEXTS["describe"])


@pytest.mark.parametrize("kind", NEEDLE_KINDS)
def test_questions_about_cards_in_a_haystack(kind):
    cards = (
        Card(10, ("red", "star"), "sun"),
        Card(700, "sun", "4"),
        Card(2000, ("blue", "ring"), "9", seconds=2),
    )
    questions = needle_questions(cards, kind, np.random.default_rng(0), start=0.5)
    expected = {
        "single": [("needle", "sun"), ("needle", "4"), ("needle", "9")],
        "multi_hop": [("two_hop", "sun, 4")],
        "ordering": [
            ("card_order", "sun, 4, 9"),
            *[("card_first", "the red star")] * 2,
            ("card_first", "the word sun"),
        ],
        "counting": [("card_count", "3")],
    }  # fmt: skip
    assert [(question.type, question.answer) for question in questions] == expected[kind]
    spans = {(10.5, 11.5), (700.5, 701.5), (2000.5, 2002.5)}
    assert all(set(question.evidence) <= spans and question.evidence for question in questions)


# ---------------------------------------------------------------- pictures


def colour_near(frame, x, y, reach=1):
    """The colour's name that fits the pixels around (x, y) best, and how far off it is."""
    x, y = (int(min(max(value * SIDE, reach), SIDE - 1 - reach)) for value in (x, y))
    patch = frame[y - reach : y + reach + 1, x - reach : x + reach + 1].reshape(-1, 3).mean(axis=0)
    distances = {name: float(np.abs(patch - np.array(rgb)).max()) for name, rgb in COLORS.items()}
    return min(distances.items(), key=lambda pair: pair[1])


def test_shapes_are_drawn_where_and_when_they_are():
    checked = set()
    for seed in range(40):
        clip = make_clip(seed, "train", 16, signs=0, cards=0, num_questions=0)
        for item in clip.items:
            side = SIZES[item.size]
            # A ring is open in the middle: half-way between its edges.
            shift = 0.365 * side if item.shape == "ring" else 0.0
            for second in visible(item, clip):
                x, y = clip.place_of(item, second + 0.5)
                name, distance = colour_near(clip.frames([second + 0.5])[0], x + shift, y, reach=0)
                changed = item.change and second >= item.change[0]
                assert name == (item.change[1] if changed else item.color) and distance < 25, (seed, item, second)
                checked.add((item.shape, item.size, bool(changed)))
    assert {(shape, size) for shape, size, _ in checked} == {(shape, size) for shape in SHAPES for size in SIZES}
    assert any(changed for _, _, changed in checked)


def test_clips_like_films_show_and_ask_the_same():
    """Landscapes, cuts and compression change pictures, not what happens; and follow from the seed."""
    cuts = compressed = 0
    for seed in range(12):
        plain, film, again = (make_clip(seed, "train", 32, lifelike=share) for share in (0.0, 1.0, 1.0))
        assert (plain.items, plain.cards, plain.questions) == (film.items, film.cards, film.questions)
        times = np.arange(32.0)
        frames, drawn = film.frames(times), plain.frames(times)
        assert np.array_equal(frames, again.frames(times))
        assert not np.array_equal(frames, drawn)
        for card in film.cards:
            off = frames[card.second].astype(float) - draw_needle(card.key, card.value, SIDE)
            assert np.abs(off).mean() < 12, "a card can still be read"
        assert [second for second, _ in film.cuts] == sorted({second for second, _ in film.cuts})
        for (second, after), before in zip(film.cuts, [film.backdrop, *(view for _, view in film.cuts)], strict=False):
            assert 0 < second < 32 and np.abs(after - before).mean() > 1
        cuts += len(film.cuts)
        compressed += film.loss > 0
    assert cuts > 12 and 3 < compressed < 12


def test_compression_loses_detail_and_keeps_flat_pictures():
    flat = np.full((SIDE, SIDE, 3), (120.0, 60.0, 200.0), np.float32)
    assert np.abs(compress(flat, 8.0) - flat).max() < 20
    card = draw_needle(("red", "star"), "cat", SIDE).astype(np.float32)
    errors = [float(np.abs(compress(card, loss) - card).mean()) for loss in (0.01, 5.0, 40.0)]
    assert errors[0] < 0.1 < errors[1] < errors[2]
    odd = compress(card[:45, :45], 10.0)
    assert odd.shape == (45, 45, 3)


def test_what_is_gone_is_not_drawn():
    for seed in range(20):
        clip = make_clip(seed, "train", 16, shapes=1, signs=0, cards=0, num_questions=0)
        (item,) = clip.items
        seconds = visible(item, clip)
        bare = make_clip(seed, "train", 16, shapes=1, signs=0, cards=0, num_questions=0).backdrop
        for second, frame in enumerate(clip.frames(range(16))):
            error = np.abs(frame - np.clip(bare, 0, 255)).max(axis=2) > 40  # five deviations of the strongest noise
            assert (error.sum() > 20) == (second in seconds), (seed, second)


def test_moving_shapes_move_as_they_are_said_to():
    directions = set()
    for seed in range(40):
        clip = make_clip(seed, "train", 16, signs=0, cards=0, num_questions=0)
        for item in clip.items:
            if not item.direction:
                begin, end = item.spans[0]
                assert clip.place_of(item, begin) == clip.place_of(item, end - 0.1)
                continue
            ((begin, end),) = item.spans
            places = []
            for time in (begin, end - 0.1):
                frame = clip.frames([time])[0].astype(int)
                near = np.abs(frame - np.array(COLORS[item.color])).max(axis=2) < 25
                # Its own lane only: another shape may have its colour.
                other = (
                    (slice(None), slice(SIDE // 2, None)) if clip.columns else (slice(SIDE // 2, None), slice(None))
                )
                lower = np.zeros_like(near)
                lower[other] = True
                ys, xs = np.nonzero(near & (lower == bool(item.lane)))
                places.append((xs.mean(), ys.mean()))
            moved = np.subtract(places[1], places[0])
            axis = int(item.direction in ("up", "down"))
            assert (moved[axis] < 0) == (item.direction in ("left", "up")) and abs(moved[axis]) > SIDE / 4
            directions.add(item.direction)
    assert directions == {"left", "right", "up", "down"}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(4, 64))
def test_cards_fill_the_frame_and_keep_their_distance(seed, seconds):
    clip = make_clip(seed, "held_out", seconds, cards=4, num_questions=0)
    assert clip.cards
    for first, second in combinations(clip.cards, 2):
        assert abs(first.second - second.second) >= 4
    for card in clip.cards:
        picture = draw_needle(card.key, card.value, SIDE)
        frames = clip.frames([card.second, card.second + 0.9])
        assert np.array_equal(frames[0], picture) and np.array_equal(frames[1], picture)
        for time in (card.second - 0.1, card.second + 1):
            assert not 0 <= time < seconds or not np.array_equal(clip.frames([time])[0], picture)


def test_cards_differ():
    keys = [(color, shape) for color in COLORS for shape in SHAPES] + list(WORDS)
    tops = {draw_needle(key, "0", SIDE).tobytes() for key in keys}
    values = {draw_needle(("red", "star"), value, SIDE).tobytes() for value in WORDS + DIGITS}
    assert len(tops) == len(keys) and len(values) == len(WORDS) + len(DIGITS)


def test_written_video_decodes_to_the_frames(tmp_path):
    clip = make_clip(3, "train", 6, cards=1, num_questions=0)
    clip.write_video(tmp_path / "clip.mp4", fps=8, side=2 * SIDE)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        decoded = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert [time for time, _ in decoded] == pytest.approx([number / 8 for number in range(48)], abs=1e-3)
    drawn = clip.frames([time for time, _ in decoded]).astype(float)
    pictures = np.stack([frame for _, frame in decoded]).reshape(48, SIDE, 2, SIDE, 2, 3).mean(axis=(2, 4))
    error = np.abs(pictures - drawn).mean(axis=(1, 2, 3))
    assert error.max() < 10
    # Each frame is nearest to its own second's picture, so nothing is shifted in time.
    (card,) = clip.cards
    dark_border = [frame[0].mean() < 60 for frame in pictures]
    assert [time for (time, _), dark in zip(decoded, dark_border, strict=True) if dark] == pytest.approx(
        [card.second + number / 8 for number in range(8)]
    )


def test_haystacks_are_endless_and_hold_no_cards():
    times = [*np.arange(0, 200, 2.5), 5000.0]
    frames = haystack_frames(7, times)
    assert frames.shape == (len(times), SIDE, SIDE, 3) and frames.dtype == np.uint8
    assert np.array_equal(haystack_frames(7, times[40:])[:5], frames[40:45])
    assert not np.array_equal(haystack_frames(8, times[:1]), frames[:1])
    edges = np.stack([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
    assert edges.reshape(len(times), -1).mean(axis=1).min() > 30, "a card has an edge of ink all around"


@pytest.mark.parametrize("size", [32, 96])
def test_other_sizes(size):
    clip = make_clip(0, "train", 8, size=size, cards=1, num_questions=0)
    assert clip.frames([0, 1, 7.9]).shape == (3, size, size, 3)
    assert clip.items == make_clip(0, "train", 8, cards=1, num_questions=0).items


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: make_clip(0, "test"), "split must be one of"),
        (lambda: make_clip(0, seconds=0), "seconds must be at least 1"),
        (lambda: make_clip(0, kinds=("colour",)), "no question type 'colour'"),
        (lambda: make_clip(0, seconds=4).frames([4.0]), "from 0.0 to 4.0 s, not at 4.0"),
        (lambda: make_clip(0, seconds=4, start=10).frames([9.9]), "not at 9.9"),
        (lambda: needle_questions((), "double", np.random.default_rng(0)), "kind must be one of"),
        (lambda: haystack_frames(0, [0.0], split="test"), "split must be one of"),
    ],
)
def test_errors_say_what_is_wrong(call, says):
    with pytest.raises(ValueError, match=says):
        call()
