"""What callers pass: numbers of other libraries, processors of their own, and nonsense of any size."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

FRAMES = [np.random.default_rng(7).integers(0, 255, (24, 32, 3), dtype=np.uint8) for _ in range(6)]
TIMES = [float(second) for second in range(6)]
NUMBERS = [
    np.int64(1),
    np.int32(1),
    np.uint8(1),
    np.float32(0.5),
    np.float64(0.5),
    np.float16(0.5),
    Fraction(1, 2),
    1,
    0.5,
]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_any_kind_of_number_samples_and_is_saved(bundled_model, tokenizer, clips, tmp_path, number):
    model = bundled_model
    options = {"sample_fps": number, "max_sample_fps": number, "max_num_frames": np.int64(8)}
    video = model.encode_video(clips[0], tokenizer, **options)
    expected = model.encode_video(clips[0], tokenizer, 8, float(number), float(number))
    assert video.timestamps == expected.timestamps
    assert json.loads(json.dumps(video.sampling)) == expected.sampling
    video.save(tmp_path / "v.videoxl")
    for asked in (options, {"sample_fps": float(number)}):
        assert model.load_video(tmp_path / "v.videoxl", **asked).timestamps == video.timestamps
    part = {"type": "video", "video": clips[0], "start": number, "end": np.float32(3.0), "fps": number}
    encoded = model.chat([part], tokenizer, "What?", generation_config={"max_new_tokens": 1})[1][0]["content"][0][
        "video"
    ]
    encoded.save(tmp_path / "part.videoxl")
    assert model.plan(video_path=clips[0], sample_fps=number, max_sample_fps=number, max_num_frames=np.int64(8)).frames


@pytest.mark.ties
def test_numbers_of_generation_may_be_of_any_kind(model, tokenizer):
    answers = []
    for temperature, count in ((0.5, 4), (np.float32(0.5), np.int64(4)), (Fraction(1, 2), 4), (np.float64(0.5), 4)):
        torch.manual_seed(0)
        settings = {
            "temperature": temperature,
            "max_new_tokens": count,
            "do_sample": np.bool_(True),
            "top_p": np.float32(0.9),
        }
        answers.append(model.chat(None, tokenizer, "What?", return_history=False, generation_config=settings))
    assert len(set(answers)) == 1
    with pytest.raises(ValueError, match="temperature must be a number"):
        model.chat(None, tokenizer, "What?", generation_config={"temperature": "warm"})


class Once(LogitsProcessor):
    """Lets only one token be written."""

    def __init__(self, token):
        self.token, self.seen = token, []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.shape[1])
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([self.token]), 0.0)


class After(StoppingCriteria):
    def __init__(self, calls):
        self.left = calls

    def __call__(self, input_ids, scores, **options):
        self.left -= 1
        return torch.full((len(input_ids),), self.left <= 0)


def test_own_processors_and_criteria(model, tokenizer):
    video = model.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    token = tokenizer("star", add_special_tokens=False)["input_ids"][0]
    for source in (video, None):
        for kinds in ((list, list), (LogitsProcessorList, StoppingCriteriaList), (tuple, tuple)):
            only, stop = Once(token), After(3)
            answer = model.chat(
                source, tokenizer, "What?", return_history=False, generation_config={"max_new_tokens": 9},
                logits_processor=kinds[0]([only]), stopping_criteria=kinds[1]([stop]),
            )  # fmt: skip
            assert answer == tokenizer.decode([token] * 3).strip() and len(only.seen) == 3
            assert source is None or only.seen[0] > len(video.input_ids)  # the whole sequence, as in `generate`
    for wrong in (Once(token), [3], "x"):
        with pytest.raises(ValueError, match="must be a list of functions"):
            model.chat(None, tokenizer, "What?", logits_processor=wrong)
    with pytest.raises(ValueError, match="stopping_criteria must be a list"):
        model.chat(None, tokenizer, "What?", stopping_criteria=After(3))


def only(*tokens):
    def prefer(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(tokens), 0.0)

    return [prefer]


def test_forbidden_repetition_is_that_of_the_answer(model, tokenizer):
    """The question holds the word, and the answer may hold it once."""
    star, box = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("star", "box"))
    video = model.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    for source in (video, None):
        answer = model.chat(
            source, tokenizer, "Is it a star, star, star or a box?", return_history=False,
            generation_config={"max_new_tokens": 2, "no_repeat_ngram_size": 1},
            logits_processor=[lambda ids, scores: scores + 1000 * only(star, box)[0](ids, scores).exp()],
        )  # fmt: skip
        assert sorted(tokenizer(answer, add_special_tokens=False)["input_ids"]) == sorted([star, box])
        answer = model.chat(
            source, tokenizer, "star star star", return_history=False, logits_processor=only(star),
            generation_config={"max_new_tokens": 3, "no_repeat_ngram_size": 4},
        )  # fmt: skip
        assert answer == tokenizer.decode([star] * 3).strip()


def test_a_stop_string_does_not_begin_in_the_prompt(model, tokenizer):
    token = tokenizer("star", add_special_tokens=False)["input_ids"][0]
    settings = {"max_new_tokens": 3, "until": "assistant\nstar"}
    answer = model.chat(
        None, tokenizer, "What?", return_history=False, generation_config=settings, logits_processor=only(token)
    )
    assert answer == tokenizer.decode([token] * 3).strip()
    settings["until"] = "starstar"
    answer = model.chat(
        None, tokenizer, "What?", return_history=False, generation_config=settings, logits_processor=only(token)
    )
    assert answer == tokenizer.decode([token] * 2).strip()


LONG = "x" * 190_000
BYTES = b"\x00" * 190_000


def message_of(call):
    try:
        call()
    except (ValueError, FileNotFoundError, TypeError) as error:
        return str(error)
    return None


@pytest.mark.ties
def test_no_message_is_as_long_as_what_was_passed(model, tokenizer, processor, clips):
    def chat(**changes):
        given = {"video_path": None, "user_prompt": "What?", **changes}
        return model.chat(given.pop("video_path"), tokenizer, given.pop("user_prompt"), **given)

    video = model.encode_video(FRAMES, tokenizer, timestamps=TIMES)
    calls = [lambda: model.chat_batch(video, tokenizer, BYTES), lambda: model.chat_batch(video, tokenizer, [BYTES])]
    for value in (LONG, BYTES, [LONG] * 2, {LONG: LONG}, {"type": LONG}, [{"type": "video", LONG: 1}]):
        calls += [
            lambda value=value, name=name: chat(**{name: value})
            for name in ("user_prompt", "chat_history", "generation_config", "media_dict", "selector",
                         "dense_chunks", "logits_processor", "sample_fps", "max_num_frames", "max_sample_fps")
            if not (name == "user_prompt" and value is LONG)
        ]  # fmt: skip
        calls += [
            lambda value=value: chat(chat_history=[{"role": value, "content": "x"}]),
            lambda value=value: chat(
                chat_history=[{"role": "user", "content": [{"type": "video", "video": "a", "fps": value}]}]
            ),
            lambda value=value: chat(generation_config={"temperature": value}),
            lambda value=value: chat(media_dict={"video_read_type": value}),
            lambda value=value: chat(media_dict=value),
            lambda value=value: model.load_video("no", **{"sampling": value, LONG: 1}),
            lambda value=value: model.plan(num_frames=value),
            lambda value=value: processor.render([{"role": "user", "content": [value]}]),
            lambda value=value: processor(["x"], **{LONG: value}),
            lambda value=value: model(torch.zeros(1, 1, dtype=torch.long), **{LONG: value}),
            lambda value=value: setattr(model.config, "sparse_attention", {"prefill": value}),
            lambda value=value: setattr(model.config, "sparse_attention", {LONG: value}),
            lambda value=value: setattr(model.config, "sparse_attention", {"decode": "bilevel", "reload": value}),
        ]
    messages = [message for message in map(message_of, calls) if message is not None]
    assert len(messages) > 0.8 * len(calls)
    for message in messages:
        assert len(message) < 1000, message[:300]


@pytest.mark.ties
def test_keys_without_a_value_are_absent(model, tokenizer, processor, clips):
    """The `datasets` library gives every item the keys of all others."""
    empty = {
        "text": None,
        "video": None,
        "image": None,
        "path": None,
        "fps": None,
        "timestamps": None,
        "max_pixels": None,
    }
    plain = [{"type": "video", "video": clips[0]}, {"type": "text", "text": "What moves?"}]
    rows = [empty | item for item in plain]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "num_frames": 4}
    one, other = (processor.apply_chat_template([{"role": "user", "content": each, "name": None}], **options)
                  for each in (plain, rows))  # fmt: skip
    assert one["input_ids"] == other["input_ids"]
    assert all(map(torch.equal, one["pixel_values_videos"], other["pixel_values_videos"]))
    settings = {"generation_config": {"max_new_tokens": 2}, "return_history": False, "max_num_frames": 4}
    assert model.chat(rows[:1], tokenizer, "What?", **settings) == model.chat(
        plain[:1], tokenizer, "What?", **settings
    )
    history = [{"role": "user", "content": rows}, {"role": "assistant", "content": "A card.", "tool_calls": None}]
    assert isinstance(model.chat(None, tokenizer, "And then?", history, **settings), str)
