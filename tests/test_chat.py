"""chat and encode_video: turns, reuse, isolation, frames, settings, bad input, and the real files."""

import copy
import json
import pickle
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

SHORT = {"max_new_tokens": 6, "min_new_tokens": 6}


def counted(model):
    """Counts the calls that a reused video must not make."""
    calls = []

    def count(name, original):
        def call(self, *args, **kwargs):
            calls.append(name)
            return original(self, *args, **kwargs)

        return call

    names = ("get_video_features", "prefill_frames", "prefill_text")
    return calls, [patch.object(type(model), name, count(name, getattr(type(model), name))) for name in names]


@pytest.mark.ties  # the same computation twice
def test_published_quick_start(model, tokenizer, clips):
    gen_kwargs = {
        "do_sample": False,
        "temperature": 0.01,
        "top_p": 0.001,
        "num_beams": 1,
        "use_cache": True,
        "max_new_tokens": 24,
    }
    video_path, question1 = clips[0], "Please describe this video."
    with torch.inference_mode():
        answer = model.chat(
            video_path, tokenizer, question1, chat_history=None, return_history=False, max_num_frames=100,
            sample_fps=1, max_sample_fps=4, generation_config=gen_kwargs,
        )  # fmt: skip
        again = model.chat(video_path, tokenizer, question1, None, False, 100, 1, 4, gen_kwargs)
    assert isinstance(answer, str) and answer == again


def test_chat_is_generate_on_the_processors_prompt(model, tokenizer, processor, clips):
    answer = model.chat(clips[0], tokenizer, "What moves?", return_history=False, generation_config=SHORT)
    messages = [
        {"role": "user", "content": [{"type": "video", "path": clips[0]}, {"type": "text", "text": "What moves?"}]}
    ]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, **SHORT)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer


def test_second_turn_touches_no_video(model, tokenizer, clips):
    first, history = model.chat(clips[0], tokenizer, "Tell me: What moves?", generation_config=SHORT)
    before = copy.deepcopy(history)
    calls, patches = counted(model)
    with patches[0], patches[1], patches[2]:
        second, longer = model.chat(
            clips[0], tokenizer, "Tell me: And then?", chat_history=history, generation_config=SHORT
        )
        without_path, _ = model.chat(
            None, tokenizer, "Tell me: And then?", chat_history=history, generation_config=SHORT
        )
        third, _ = model.chat(clips[0], tokenizer, "Tell me: Why?", chat_history=longer, generation_config=SHORT)
    assert calls == []
    assert second == without_path
    assert history == before and len(longer) == 4
    assert longer[0]["content"][0]["video"] is history[0]["content"][0]["video"]
    assert [message["role"] for message in longer] == ["user", "assistant"] * 2
    # The text of earlier turns is really there.
    alone = model.chat(clips[0], tokenizer, "Tell me: And then?", return_history=False, generation_config=SHORT)
    assert third and second != alone


def test_history_through_json_encodes_anew(model, tokenizer, clips):
    _, history = model.chat(clips[0], tokenizer, "What moves?", generation_config=SHORT)
    expected, _ = model.chat(clips[0], tokenizer, "Tell me: And then?", chat_history=history, generation_config=SHORT)
    restored = json.loads(json.dumps(history))
    calls, patches = counted(model)
    with patches[0], patches[1], patches[2]:
        answers = [
            model.chat(p, tokenizer, "Tell me: And then?", restored, False, generation_config=SHORT)
            for p in (clips[0], None)
        ]
    assert answers == [expected] * 2
    assert calls.count("get_video_features") > 0
    published = [
        {"role": "<|im_start|>user", "content": "<image>\nWhat moves?"},
        {"role": "<|im_start|>assistant", "content": history[1]["content"]},
    ]
    assert model.chat(clips[0], tokenizer, "Tell me: And then?", published, False, generation_config=SHORT) == expected


def test_encode_once_equals_chat_on_the_path(model, tokenizer, clips):
    questions = ("What moves?", "How many are there?", "What moves?")
    expected = [model.chat(clips[0], tokenizer, q, return_history=False, generation_config=SHORT) for q in questions]
    video = model.encode_video(clips[0], tokenizer)
    assert [
        model.chat(video, tokenizer, q, return_history=False, generation_config=SHORT) for q in questions
    ] == expected
    assert video.num_frames == len(video.timestamps) > 0
    assert video.duration == pytest.approx(9.0, abs=0.2)
    assert video.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in video.cache.layers) > 0
    beams = {**SHORT, "num_beams": 3}
    on_path = model.chat(clips[0], tokenizer, "What moves?", return_history=False, generation_config=beams)
    assert model.chat(video, tokenizer, "What moves?", return_history=False, generation_config=beams) == on_path


def test_interleaved_videos_equal_separate_runs(model, tokenizer, clips):
    def two_turns(path):
        first, history = model.chat(path, tokenizer, "Now, what moves?", generation_config=SHORT)
        return [first, model.chat(path, tokenizer, "Now, and then?", history, False, generation_config=SHORT)]

    separate = [two_turns(path) for path in clips]
    assert separate[0] != separate[1]
    histories, interleaved = [], [[], []]
    for number, path in enumerate(clips):
        answer, history = model.chat(path, tokenizer, "Now, what moves?", generation_config=SHORT)
        interleaved[number].append(answer)
        histories.append(history)
    for number in (1, 0):
        interleaved[number].append(
            model.chat(clips[number], tokenizer, "Now, and then?", histories[number], False, generation_config=SHORT)
        )
    assert interleaved == separate


def test_another_path_adds_a_video_to_the_conversation(model, tokenizer, processor, clips):
    _, history = model.chat(clips[0], tokenizer, "What moves?", generation_config=SHORT)
    calls, patches = counted(model)
    with patches[0], patches[1], patches[2]:
        answer, longer = model.chat(clips[1], tokenizer, "And here?", chat_history=history, generation_config=SHORT)
        videos = [
            item["video"]
            for message in longer
            for item in message["content"]
            if isinstance(item, dict) and "video" in item
        ]
        frames_encoded = calls.count("prefill_frames")
        follow_up, _ = model.chat(clips[0], tokenizer, "Compare.", chat_history=longer, generation_config=SHORT)
        assert calls.count("prefill_frames") == frames_encoded
    assert videos == list(clips) and videos[0] is history[0]["content"][0]["video"]
    plain = json.loads(json.dumps(longer[:3]))
    inputs = processor.apply_chat_template(
        plain, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, **SHORT)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer
    assert follow_up


def test_frames_from_memory(model, tokenizer):
    frames = np.random.default_rng(0).integers(0, 255, (6, 40, 60, 3), dtype=np.uint8)
    times = [0.0, 0.5, 1.0, 1.5, 2.0, 7.5]
    forms = (frames, torch.from_numpy(frames), [Image.fromarray(frame) for frame in frames], list(frames))
    options = {"timestamps": times, "generation_config": SHORT}
    results = [model.chat(form, tokenizer, "What moves?", **options) for form in forms]
    assert len({answer for answer, _ in results}) == 1
    history = results[0][1]
    assert history[0]["content"][0]["video"].timestamps == times
    assert model.chat(None, tokenizer, "And then?", history, False, generation_config=SHORT)
    with pytest.raises(ValueError, match="JSON"):
        model.chat(None, tokenizer, "And then?", json.loads(json.dumps(history)))


def test_append_equals_encoding_at_once(model, tokenizer):
    frames = np.random.default_rng(0).integers(0, 255, (15, 40, 60, 3), dtype=np.uint8)
    times = [0.5 * index for index in range(15)]
    for settings in ({}, {"prefill": "mask", "chunk_groups": 1, "window_chunks": 1}):
        model.config.sparse_attention = settings
        at_once = model.encode_video(frames, tokenizer, timestamps=times)
        grown = model.encode_video(frames[:3], tokenizer, timestamps=times[:3])
        before = model.chat(grown, tokenizer, "What moves?", return_history=False, generation_config=SHORT)
        holder = copy.deepcopy(grown)
        for first, last in ((3, 4), (4, 9), (9, 15)):
            grown.append(frames[first:last], times[first:last])
        assert torch.equal(grown.input_ids, at_once.input_ids) and grown.layout == at_once.layout
        assert grown.timestamps == at_once.timestamps == times
        for mine, theirs in zip(grown.cache.layers, at_once.cache.layers, strict=True):
            torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=1e-4)
        assert holder.num_frames == 3
        assert model.chat(holder, tokenizer, "What moves?", return_history=False, generation_config=SHORT) == before
    with pytest.raises(ValueError, match="later"):
        grown.append(frames[:1], [3.0])


def test_text_only_and_system_messages(model, tokenizer, clips):
    answer, history = model.chat(None, tokenizer, "Hello", generation_config=SHORT)
    assert answer and history[0]["content"] == "Hello"
    system = [{"role": "system", "content": "You are terse: Time is money."}]
    with_system = model.chat(clips[0], tokenizer, "What moves?", system, False, generation_config=SHORT)
    assert with_system != model.chat(clips[0], tokenizer, "What moves?", return_history=False, generation_config=SHORT)
    video = model.encode_video(clips[0], tokenizer, system_prompt="You are terse: Time is money.")
    assert model.chat(video, tokenizer, "What moves?", system, False, generation_config=SHORT) == with_system
    memory = model.encode_video(np.zeros((2, 8, 8, 3), np.uint8), tokenizer, timestamps=[0, 1])
    with pytest.raises(ValueError, match="another prompt"):
        model.chat(memory, tokenizer, "What moves?", system)


def test_streamer_until_and_half_precision(model, tokenizer, clips):
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = model.chat(clips[0], tokenizer, "What?", return_history=False, generation_config=SHORT, streamer=streamer)
    assert "".join(streamer).strip() == answer
    word = answer[2:6]
    cut = model.chat(
        clips[0],
        tokenizer,
        "What?",
        return_history=False,
        generation_config={"max_new_tokens": 6, "until": [word], "x": 1},
    )
    assert word in cut and len(cut) <= len(answer)
    for dtype in (torch.float16, torch.bfloat16):
        halved = copy.deepcopy(model).to(dtype)
        assert halved.chat(clips[0], tokenizer, "What?", return_history=False, generation_config=SHORT)


def test_changed_file_is_encoded_again(model, tokenizer, clips, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copyfile(clips[0], path)
    _, history = model.chat(str(path), tokenizer, "What moves?", generation_config=SHORT)
    shutil.copyfile(clips[1], path)
    _, longer = model.chat(str(path), tokenizer, "And then?", chat_history=history, generation_config=SHORT)
    assert longer[0]["content"][0]["video"].duration > history[0]["content"][0]["video"].duration


def test_encoded_video_is_not_pickled(model, tokenizer, clips):
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(model.encode_video(clips[0], tokenizer, max_num_frames=4))


FRAMES = np.zeros((3, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("video", "options", "error", "says"),
    [
        ("missing.mp4", {}, FileNotFoundError, "missing.mp4"),
        (".", {}, ValueError, "folder|directory"),
        ("empty", {}, ValueError, "empty"),
        ([], {}, ValueError, "frame"),
        (FRAMES[:0], {}, ValueError, "frame"),
        (FRAMES.astype(np.float32), {}, ValueError, "uint8"),
        (FRAMES[..., 0], {}, ValueError, "3"),
        (FRAMES, {"timestamps": [0, 1]}, ValueError, "timestamps"),
        (FRAMES, {"timestamps": [0, 2, 1]}, ValueError, "increasing"),
        ("clip", {"max_num_frames": 0}, ValueError, "max_num_frames"),
        ("clip", {"sample_fps": 0}, ValueError, "sample_fps"),
        ("clip", {"timestamps": [0.0]}, ValueError, "timestamps"),
        ("clip", {"video_backend": "nothing"}, ValueError, "backend"),
        (42, {}, (ValueError, TypeError), "int"),
        ("clip", {"user_prompt": "What is <|vision_pad|>?"}, ValueError, "vision_pad"),
        ("clip", {"user_prompt": ""}, ValueError, "question"),
        ("clip", {"chat_history": ["hello"]}, ValueError, "chat_history"),
    ],
)
def test_bad_input(model, tokenizer, clips, tmp_path, video, options, error, says):
    if isinstance(video, str) and video == "clip":
        video = clips[0]
    if isinstance(video, str) and video == "empty":
        video = str(tmp_path / "empty.mp4")
        open(video, "w").close()
    with pytest.raises(error, match=says):
        model.chat(video, tokenizer, **{"user_prompt": "What?", **options})
    if "user_prompt" not in options and "chat_history" not in options:
        with pytest.raises(error, match=says):
            model.encode_video(video, tokenizer, **options)


def test_encode_needs_a_video(model, tokenizer):
    with pytest.raises(ValueError, match="video"):
        model.encode_video(None, tokenizer)


@pytest.mark.ties
def test_every_real_file(model, tokenizer, test_data):
    from videoxl.video_processing_videoxl import VideoDecodeError

    folder = test_data / "data" / "videos"
    facts = {fact["file"]: fact for fact in json.loads((folder / "videos.json").read_text())}
    unreadable = []
    for name, fact in facts.items():
        try:
            video = model.encode_video(folder / name, tokenizer, max_num_frames=12, sample_fps=None)
        except ValueError as error:
            assert type(error).__name__ == VideoDecodeError.__name__ and name.split("/")[-1] in str(error)
            unreadable.append(name)
            continue
        assert video.timestamps == sorted(set(video.timestamps)) and video.timestamps[0] == 0
        if "runc" not in name and "corrupt" not in name:
            assert video.duration == pytest.approx(fact["duration"], abs=0.3)
            assert video.num_frames == 12 or video.num_frames < 12 and video.duration < 2
        assert model.chat(video, tokenizer, "What is shown?", return_history=False, generation_config=SHORT)
    assert unreadable == ["derived/truncated_no_moov.mp4"]


def test_settings_that_mean_nothing_here_change_nothing(model, tokenizer, clips):
    options = {"return_history": False, "max_num_frames": 8}
    expected = model.chat(clips[0], tokenizer, "What?", generation_config=SHORT, **options)
    for extra in ({"use_cache": False}, {"return_dict_in_generate": True}, {"temperature": 0.0, "do_sample": True}):
        assert model.chat(clips[0], tokenizer, "What?", generation_config={**SHORT, **extra}, **options) == expected
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.chat(clips[0], tokenizer, "What?", generation_config={"prefill_chunk_size": 8}, **options)
    for wrong in ([1], "x", {"temperature": "hot"}):
        with pytest.raises(ValueError, match="generation_config"):
            model.chat(clips[0], tokenizer, "What?", generation_config=wrong, **options)


def test_appended_frames_are_never_lost(model, tokenizer, clips):
    video = model.encode_video(clips[0], tokenizer, max_num_frames=8)
    last = video.timestamps[-1]
    video.append(FRAMES, [last + 1, last + 2, last + 3])
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with pytest.raises(ValueError, match="in no file"):
        model.chat(video, tokenizer, "What?", chat_history=turn)
    assert model.chat(video, tokenizer, "What?", return_history=False, generation_config=SHORT)


def test_an_encoded_video_finds_its_place_in_any_history(model, tokenizer, clips):
    video = model.encode_video(clips[0], tokenizer, max_num_frames=8, sample_fps=None)
    _, history = model.chat(video, tokenizer, "What moves?", generation_config=SHORT)
    expected = model.chat(video, tokenizer, "And?", history, False, generation_config=SHORT)
    for form in (json.loads(json.dumps(history)), copy.deepcopy(history)):
        assert model.chat(video, tokenizer, "And?", form, False, generation_config=SHORT) == expected
    memory = model.encode_video(FRAMES, tokenizer, timestamps=[0, 1, 2])
    _, history = model.chat(memory, tokenizer, "What moves?", generation_config=SHORT)
    expected = model.chat(None, tokenizer, "And?", history, False, generation_config=SHORT)
    restored = json.loads(json.dumps(history))
    assert model.chat(memory, tokenizer, "And?", restored, False, generation_config=SHORT) == expected
    again = model.chat(FRAMES, tokenizer, "And?", restored, False, timestamps=[0, 1, 2], generation_config=SHORT)
    assert again == expected
    with pytest.raises(ValueError, match="path"):
        model.chat(None, tokenizer, "And?", [{"role": "user", "content": "<image>\nWhat moves?"}])


def test_a_video_keeps_its_system_prompt(model, tokenizer):
    system = "You are terse."
    video = model.encode_video(FRAMES, tokenizer, timestamps=[0, 1, 2], system_prompt=system)
    answer, history = model.chat(video, tokenizer, "What?", generation_config=SHORT)
    assert history[0] == {"role": "system", "content": system}
    assert model.chat_batch(video, tokenizer, ["What?"], generation_config=SHORT) == [answer]
    longer = [{"role": "system", "content": system}]
    assert model.chat(video, tokenizer, "What?", longer, False, generation_config=SHORT) == answer


def test_a_deleted_file_does_not_matter(model, tokenizer, clips, tmp_path):
    path = tmp_path / "clip.mp4"
    shutil.copyfile(clips[0], path)
    video = model.encode_video(path, tokenizer, max_num_frames=8)
    answer = model.chat(video, tokenizer, "What?", return_history=False, generation_config=SHORT)
    path.unlink()
    assert model.chat(video, tokenizer, "What?", return_history=False, generation_config=SHORT) == answer


@pytest.mark.parametrize("message", [{"role": 3, "content": "a"}, {"role": "user", "content": None}, {"content": "a"}])
def test_malformed_history(model, tokenizer, message):
    with pytest.raises(ValueError, match="chat_history"):
        model.chat(None, tokenizer, "What?", [message])
    with pytest.raises(ValueError, match="tokenizer"):
        model.chat(None, None, "What?")
