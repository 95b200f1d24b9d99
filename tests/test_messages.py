"""What callers say: items in one form for `chat` and the processor, what they want of a path, times in a question."""

import copy
import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from videoxl.frame_sampling_videoxl import Sampling
from videoxl.messages_videoxl import chunks_at, read_history, read_item, times_in_text, turn_items, video_request

SHORT = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
TEXT = {"type": "text", "text": "What moves?"}


def user(*content):
    return [{"role": "user", "content": list(content)}]


# --- items ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "read"),
    [
        ({"type": "video", "path": "a.mp4"}, {"type": "video", "video": "a.mp4"}),
        ({"type": "video", "url": "a.mp4", "image": None, "text": None}, {"type": "video", "video": "a.mp4"}),
        ({"type": "video", "video": "a.mp4", "max_pixels": 9}, {"type": "video", "video": "a.mp4"}),
        ({"type": "video", "video": "a", "nframes": 8, "fps": None}, {"type": "video", "video": "a", "nframes": 8}),
        (
            {"type": "video", "video": {"video_path": "a", "fps": 2}, "fps": 1, "start": 3},
            {"type": "video", "video": "a", "fps": 2, "start": 3},
        ),
        ({"type": "image", "image": {"url": "a.png"}}, {"type": "image", "image": "a.png"}),
        ({"type": "text", "text": "", "video": None}, {"type": "text", "text": ""}),
    ],
)
def test_items_are_read_into_one_form(item, read):
    before = copy.deepcopy(item)
    assert read_item(item) == read and item == before
    assert turn_items([item]) == [read]
    assert read_history(user(item), None) == user(read)


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"video": "a.mp4"}, "an item must be"),
        ({"type": "audio", "audio": "a.wav"}, "an item must be"),
        ("a.mp4", "an item must be"),
        ({"type": "video"}, "a video item takes one of .* got nothing"),
        ({"type": "video", "video": None}, "a video item takes one of"),
        ({"type": "video", "video": "a", "url": "b"}, "a video item takes one of .* got video, url"),
        ({"type": "video", "video": "a", "frames": 8}, "a video item takes one of .*num_frames.*got video, frames"),
        (
            {"type": "image", "image": "a.png", "fps": 1},
            "an image item takes one of image, path, url, image_url; got image, fps",
        ),
        ({"type": "text", "text": "a", "video": "b"}, "a text item takes one of text; got text, video"),
        ({"type": "text", "text": 3}, "needs its text as a string"),
    ],
)
def test_items_of_another_form_are_refused_by_both(model, tokenizer, processor, item, says):
    with pytest.raises(ValueError, match=says):
        model.chat([TEXT, item], tokenizer, "What?")
    if isinstance(item, dict):
        with pytest.raises(ValueError, match=says):
            processor.apply_chat_template(user(item), tokenize=True)


@pytest.mark.ties  # the same computation twice
def test_chat_and_processor_read_the_same_frames(model, tokenizer, processor, clips):
    """Whatever an item says of its video: the keys of both, of other libraries, and of the published code."""
    frames = np.random.default_rng(0).integers(0, 255, (7, 40, 60, 3), dtype=np.uint8)
    for own in (
        {"num_frames": 5},
        {"fps": 0.5},
        {"sample_fps": 2, "max_num_frames": 6, "max_sample_fps": None},
        {"start": 1, "end": 4.5, "fps": 2},
        {"media_dict": {"start": 1, "end": 4.5}, "max_frames": 3},
    ):
        for item in ({"type": "video", "video": clips[0], **own}, {"type": "video", "path": clips[0], **own}):
            assert_same(model, tokenizer, processor, item)
        assert_same(model, tokenizer, processor, {"type": "video", "video": {"video_path": clips[0], **own}})
    memory = {"type": "video", "video": frames, "timestamps": [0.5 * number for number in range(7)]}
    assert_same(model, tokenizer, processor, memory)
    assert_same(model, tokenizer, processor, {**memory, "num_frames": 3})
    assert_same(model, tokenizer, processor, {"type": "image", "image": Image.fromarray(frames[0])})


def assert_same(model, tokenizer, processor, item):
    answer, history = model.chat([item], tokenizer, "What moves?", generation_config=SHORT)
    inputs = processor.apply_chat_template(
        user(item, TEXT), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    video = history[0]["content"][0][item["type"]]
    assert torch.equal(inputs["input_ids"][0, : len(video.input_ids)], video.input_ids)
    output = model.generate(**inputs, **SHORT)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer


def test_a_prompt_is_written_without_its_videos(processor, clips):
    """As transformers' users do: the text first, and the videos with it."""
    text = processor.apply_chat_template(user({"type": "video"}, {"type": "image"}, TEXT))
    assert text == processor.render(user({"type": "video", "video": clips[0]}, {"type": "image", "image": "a"}, TEXT),
                                    add_generation_prompt=False)  # fmt: skip
    with pytest.raises(ValueError, match="a video item takes one of"):
        processor.apply_chat_template(user({"type": "video"}), tokenize=True)


@pytest.mark.ties  # no words are compared
def test_the_processor_takes_the_history_that_chat_returned(model, tokenizer, processor, clips):
    _, history = model.chat(clips[0], tokenizer, "What moves?", max_num_frames=5, generation_config=SHORT)
    video = history[0]["content"][0]["video"]
    inputs = processor.apply_chat_template(history, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(inputs["input_ids"][0, : len(video.input_ids)], video.input_ids)
    _, memory = model.chat(np.zeros((3, 8, 8, 3), np.uint8), tokenizer, "What?", timestamps=[0, 1, 2])
    with pytest.raises(ValueError, match="in no file to be read from again"):
        processor.apply_chat_template(memory, tokenize=True)


def test_what_an_item_says_stays_in_the_history(model, tokenizer, clips):
    item = {"type": "video", "video": clips[0], "num_frames": 5}
    answer, history = model.chat([item], tokenizer, "What moves?", generation_config=SHORT)
    video = history[0]["content"][0]["video"]
    assert video.num_frames == 5 and item == {"type": "video", "video": clips[0], "num_frames": 5}
    # The same words mean the same video, others another one; who says nothing means the one that is there.
    for visual, count in ((item, 1), (clips[0], 1), ({**item, "num_frames": 4}, 2), ({**item, "start": 1}, 2)):
        _, longer = model.chat(
            [visual] if isinstance(visual, dict) else visual, tokenizer, "And?", history, generation_config=SHORT
        )
        videos = [part["video"] for message in longer[::2] for part in message["content"] if isinstance(part, dict)
                  and part["type"] == "video"]  # fmt: skip
        assert len(videos) == count and videos[0] is video
    written = json.loads(json.dumps(history))
    assert (
        model.chat(None, tokenizer, "And?", written, generation_config=SHORT)[1][0]["content"][0]["video"].timestamps
        == video.timestamps
    )


@pytest.mark.parametrize(
    ("item", "called", "wanted"),
    [
        ({}, {}, {}),
        ({"fps": 2}, {"max_num_frames": 5}, {"max_num_frames": 5, "sample_fps": 2, "max_sample_fps": None}),
        ({"max_frames": 7}, {"max_num_frames": 5, "sample_fps": 2}, {"max_num_frames": 7, "sample_fps": 2}),
        (
            {"media_dict": {"video_read_type": "img", "start": 1}, "end": 4},
            {},
            {"read_as": "folder", "start": 1, "end": 4},
        ),
    ],
)
def test_what_an_item_says_counts_more_than_the_call(item, called, wanted):
    request = video_request({"type": "video", "video": "a.mp4", **item}, Sampling(), called)
    assert request == {"source": "a.mp4", "timestamps": None, "sampling": Sampling(**wanted)}


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"fps": 2, "sample_fps": 1}, "fps conflicts with sample_fps"),
        ({"num_frames": 2, "max_frames": 1}, "num_frames conflicts with max_num_frames"),
        ({"start": 2, "media_dict": {"start": 1}}, "both say start"),
        ({"start": "2"}, "start must be a number of seconds"),
        ({"max_num_frames": 0}, "max_num_frames must be"),
    ],
)
def test_what_excludes_each_other(item, says):
    with pytest.raises(ValueError, match=says):
        video_request({"type": "video", "video": "a.mp4", **item}, Sampling())


# --- times in a question --------------------------------------------------------------------------------------------
INF = math.inf
TIMES = [
    ("What is shown at 12:34?", [(754, 754)]),
    ("1:02:03", [(3723, 3723)]),
    ("at 00:01:02.5.", [(62.5, 62.5)]),
    ("at 125:30", [(7530, 7530)]),
    ("at 75 s", [(75, 75)]),
    ("at 75s, before the goal", [(75, 75)]),
    ("75 seconds", [(75, 75)]),
    ("at about 75 sec", [(75, 75)]),
    ("at 2 minutes 5 s", [(125, 125)]),
    ("at 2 minutes and 5 seconds", [(125, 125)]),
    ("at 2 minutes, 5 seconds into the video", [(125, 125)]),
    ("at 1 hour 2 min 5 s", [(3725, 3725)]),
    ("1 hour and 5 seconds", [(3605, 3605)]),
    ("at 1h02m03s", [(3723, 3723)]),
    ("at 2m5s and at 2m 9s", [(125, 125), (129, 129)]),
    ("at 1.5 min", [(90, 90)]),
    ("the 30-second mark", [(30, 30)]),
    ("30 seconds into the video", [(30, 30)]),
    ("at 10 s and 20 s", [(10, 10), (20, 20)]),
    ("between 40 s and 55 s", [(40, 55)]),
    ("between 40 and 55 seconds", [(40, 55)]),
    ("between 1 minute and 90 seconds", [(60, 90)]),
    ("between\n55 s and  40 s", [(40, 55)]),
    ("from 0:40 to 0:55", [(40, 55)]),
    ("from 1 to 2 minutes", [(60, 120)]),
    ("What happens from 25:50-30:15?", [(1550, 1815)]),
    ("25:50 – 30:15", [(1550, 1815)]),
    ("40-55 s", [(40, 55)]),
    ("in the first 30 seconds", [(0, 30)]),
    ("the first 30-second part", [(0, 30)]),
    ("from the start to 0:40", [(0, 40)]),
    ("before 3:20", [(0, 200)]),
    ("until 3:20", [(0, 200)]),
    ("after 3:20", [(200, INF)]),
    ("from 3:20 on", [(200, INF)]),
    ("from 3:20 to the end", [(200, INF)]),
    ("after the first 30 seconds", [(30, INF)]),
    ("in the last 10 seconds", [(-10, INF)]),
    ("10 seconds before the end", [(-10, INF)]),
    ("视频在12:34发生了什么", [(754, 754)]),
    # no times
    ("", []),
    ("Are there 2 cats?", []),
    ("at 5 pm", []),
    ("at 4:30 pm", []),
    ("from 2:30-3:30 p.m.", []),
    ("is it 16:9 or 4:3?", []),
    ("an aspect ratio of 16:10", []),
    ("the 3:2 score", []),
    ("they won 12:10", []),
    ("a score of 21:19", []),
    ("at 0:75, 12:5, 1:2:03 or 01:02:03:04", []),
    ("2024-05-03 12:34", []),
    ("in 2019, since the 1990s and the 80s", []),
    ("1920x1080 at 60 fps", []),
    ("Time 4.0s:", []),
    ("a 10-second clip", []),
    ("the 10 second clip", []),
    ("for 10 seconds", []),
    ("for about 10 to 20 seconds", []),
    ("every 5 seconds", []),
    ("lasts 3 minutes", []),
    ("5 seconds later", []),
    ("3 minutes long", []),
    ("100 m in 2 h", []),
    ("1,000 seconds", []),
    ("version 1.2.3 s", []),
]


@pytest.mark.parametrize(("text", "times"), TIMES)
def test_times_in_text(text, times):
    assert times_in_text(text) == times


@pytest.mark.parametrize(
    "piece", ["1", "1:", "12:34 ", "12:34-", "between ", "1 h ", "1 minute and ", "1 s-", " ", "1 to ", "<", "1.", "0"]
)
def test_hostile_text_takes_linear_time(piece):
    text = (piece * 60000)[:60000]
    start = time.process_time()  # whatever else runs on the machine
    times_in_text(text)
    assert time.process_time() - start < 5


@given(st.text(alphabet="0123456789:.,-– smhinutecodbrwafl<>\0T", max_size=60))
@settings(deadline=None, max_examples=300)
def test_any_text_gives_intervals(text):
    for start, end in times_in_text(text):
        assert start <= end and end >= 0 and not math.isnan(start)


STARTS, ENDS = [0.0, 10.0, 20.0, 30.0], [9.0, 19.0, 29.0, 35.0]


@pytest.mark.parametrize(
    ("times", "chunks"),
    [
        ([(0, 0)], [0]),
        ([(9.5, 9.5)], [0]),
        ([(10, 10)], [1]),
        ([(36, 36)], []),
        ([(5, 25)], [0, 1, 2]),
        ([(9.5, 12)], [1]),
        ([(9.2, 9.8)], [0]),
        ([(10, 20)], [1]),
        ([(0, 20)], [0, 1]),
        ([(25, INF)], [2, 3]),
        ([(-10, INF)], [2, 3]),
        ([(-100, INF)], [0, 1, 2, 3]),
        ([(31, 31), (0, 1)], [0, 3]),
        ([], []),
    ],
)
def test_chunks_at(times, chunks):
    assert chunks_at(times, STARTS, ENDS, 35.0) == chunks


def test_chunks_at_of_a_video_of_single_frames():
    assert chunks_at([(1, 2)], [0, 1, 2, 3], [0, 1, 2, 3], 3) == [1]
    assert chunks_at([(1, 1)], [], [], 0) == []
