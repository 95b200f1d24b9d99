"""`VideoXLProcessor`: prompts token for token, counts, every input form, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer
from videoxl import processing_videoxl
from videoxl.configuration_videoxl import VideoXLConfig
from videoxl.processing_videoxl import DEFAULT_CHAT_TEMPLATE, VideoXLProcessor
from videoxl.video_processing_videoxl import normalize_frames

SIZE, TOKENS = 28, 3
MARKER = "<|vision_pad|>"
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"{MARKER}\nWhat happens?<|im_end|>\n<|im_start|>assistant\n"
)
# What the processor needs of the root, and so what it saves; a loader also asks for the model's config.
FOLDER = (
    *("processing_videoxl.py", "messages_videoxl.py", "video_processing_videoxl.py", "configuration_videoxl.py"),
    *("frame_sampling_videoxl.py", "video_decoding_videoxl.py", "image_processing_videoxl.py"),
    "video_index_videoxl.py",
    *("processor_config.json", "chat_template.jinja"),
    *("tokenizer.json", "tokenizer_config.json"),
)


@pytest.fixture(scope="module")
def tokenizer(root):
    return PreTrainedTokenizerFast.from_pretrained(root)


@pytest.fixture(scope="module")
def processor(tokenizer):
    return VideoXLProcessor(tokenizer, image_size=SIZE, tokens_per_group=TOKENS)


@pytest.fixture(scope="module")
def real_tokenizer(test_data):
    return Qwen2Tokenizer.from_pretrained(test_data / "data" / "tokenizer")


def frames(count, value=0):
    return np.full((count, 20, 30, 3), value, dtype=np.uint8)


def user(*content):
    return [{"role": "user", "content": list(content)}]


def video(source, **settings):
    return {"type": "video", "video": source, **settings}


def text(words="What happens?"):
    return {"type": "text", "text": words}


@pytest.fixture
def opened(monkeypatch):
    """Records the arguments with which videos are opened, and opens none."""
    calls = []

    def open_video(source, **arguments):
        sampling = vars(arguments.pop("sampling"))
        calls.append({"source": source, **arguments, **sampling})
        batch = SimpleNamespace(frames=torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8), timestamps=[0.0])
        return [batch]

    monkeypatch.setattr(processing_videoxl, "open_video", open_video)
    return calls


# ---------------------------------------------------------------- wording and ids


def test_published_prompt(processor):
    assert processor.render(user(video("a.mp4"), text())) == PROMPT


def test_published_ids(real_tokenizer):
    processor = VideoXLProcessor(real_tokenizer)
    prefix, suffix = processor.prompt_pieces(PROMPT)
    assert prefix == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
    assert suffix[0] == 198 and suffix[-5:] == [151645, 198, 151644, 77091, 198]
    assert processor.time_token_ids(0) == [1462, 220, 15, 13, 15, 82, 25]
    assert processor.time_token_ids(1234.54) == [1462, 220, 16, 17, 18, 19, 13, 20, 82, 25]
    assert processor.video_token_id == 151654


def test_template_file_is_the_constant(root):
    assert (root / "chat_template.jinja").read_text(encoding="utf-8") == DEFAULT_CHAT_TEMPLATE


def test_tokenizer_renders_the_same_text(tokenizer):
    messages = user(video("a.mp4"), text())
    rendered = tokenizer.apply_chat_template(
        messages, chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert rendered == PROMPT


def test_conversation_of_several_turns(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        *user(video("a.mp4"), text("One?")),
        {"role": "assistant", "content": "Yes."},
        *user(text("Two? "), video("b.mp4"), text("Three?")),
    ]
    before = json.dumps(messages)
    assert processor.render(messages, add_generation_prompt=False) == (
        f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{MARKER}\nOne?<|im_end|>\n"
        f"<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nTwo? {MARKER}\nThree?<|im_end|>\n"
    )
    assert json.dumps(messages) == before


def test_string_and_list_content_render_alike(processor):
    assert processor.render(user(text("Hi"))) == processor.render([{"role": "user", "content": "Hi"}])


def test_pieces_are_tokenised_by_themselves(processor, tokenizer):
    pieces = processor.prompt_pieces(f"a{MARKER}b {MARKER}")
    assert pieces == [tokenizer("a")["input_ids"], tokenizer("b ")["input_ids"], []]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 11), max_size=3), st.integers(1, 5), st.booleans())
def test_expand_counts(tokenizer, counts, group, timed):
    settings_ = {"time_format": "Time {seconds:.1f}s:" if timed else None, "frames_per_group": group}
    processor = VideoXLProcessor(tokenizer, tokens_per_group=TOKENS, **settings_)
    pieces = [[1] * (n + 1) for n in range(len(counts) + 1)]
    ids = processor.expand(pieces, [[0.5 * frame for frame in range(count)] for count in counts])
    placeholders = ids.count(processor.video_token_id)
    assert placeholders == sum(processor.num_video_tokens(count) for count in counts)
    assert placeholders == sum(-(-count // group) * TOKENS for count in counts)
    rest = [token for token in ids if token != processor.video_token_id]
    times = [processor.time_token_ids(0.5 * first) for count in counts for first in range(0, count, group)]
    assert len(rest) == sum(map(len, pieces)) + sum(map(len, times))


def test_expand_layout(processor):
    pad = [processor.video_token_id] * TOKENS
    ids = processor.expand([[1, 2], [3]], [[0.0, 1.0, 2.0, 3.0, 4.04]])
    assert ids == [1, 2, *processor.time_token_ids(0.0), *pad, *processor.time_token_ids(4.0), *pad, 3]


def test_expand_without_timestamps_is_one_run(tokenizer):
    processor = VideoXLProcessor(tokenizer, frames_per_group=1, tokens_per_group=2, time_format=None)
    assert processor.expand([[1], [3]], [[0, 1, 2]]) == [1, *[processor.video_token_id] * 6, 3]


def test_padded_time_format(tokenizer):
    processor = VideoXLProcessor(tokenizer, time_format="Time {seconds:06.1f}s:")
    assert tokenizer.decode(processor.time_token_ids(12.34)) == "Time 0012.3s:"


@pytest.mark.parametrize("timestamps", [[], [[0.0], [0.0]], [[]]])
def test_expand_refuses(processor, timestamps):
    with pytest.raises(ValueError, match="pieces|no frames"):
        processor.expand([[1], [2]], timestamps)


# ---------------------------------------------------------------- the model's config


def config(**changes):
    values = {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 98, "patch_size": 7},
        "compressor_config": {"grid_size": 8, "frames_per_group": 2},
        **{"image_mean": [0.1] * 3, "image_std": [0.2] * 3},
        **{"video_token_id": 151654, "time_start_token_id": 1462, "time_end_token_id": 25},
    }
    return VideoXLConfig(**values | changes)


def test_from_config(real_tokenizer):
    processor = VideoXLProcessor.from_config(config(), real_tokenizer)
    assert (processor.image_size, processor.tokens_per_group, processor.frames_per_group) == (98, 16, 2)
    assert (processor.video_token, processor.image_mean, processor.image_std) == (MARKER, [0.1] * 3, [0.2] * 3)
    untimed = config(time_format=None, time_start_token_id=None, time_end_token_id=None)
    assert VideoXLProcessor.from_config(untimed, real_tokenizer).time_token_ids(1.0) == []


@pytest.mark.parametrize(
    "changes",
    [{"time_start_token_id": 7}, {"time_end_token_id": 7}, {"video_token_id": 64}, {"video_token_id": 10**7}],
)
def test_from_config_refuses_other_ids(real_tokenizer, changes):
    with pytest.raises(ValueError, match="checkpoint's"):
        VideoXLProcessor.from_config(config(**changes), real_tokenizer)


def test_from_config_refuses_another_tokenizer(tokenizer):
    with pytest.raises(ValueError, match="checkpoint's"):
        VideoXLProcessor.from_config(config(), tokenizer)


def test_needs_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        VideoXLProcessor()


# ---------------------------------------------------------------- videos and texts

PILS = [Image.fromarray(frame) for frame in frames(5, 9)]


@pytest.mark.parametrize(
    "source",
    [frames(5, 9), torch.from_numpy(frames(5, 9)), PILS, list(frames(5, 9)), frames(5, 9)[None], [PILS], [[PILS]]],
    ids=["array", "tensor", "PIL", "arrays", "batch of one", "list of one", "nested"],
)
def test_forms_of_one_video(processor, source):
    inputs = processor(PROMPT, source, timestamps=[0, 1, 2, 3, 4.5], return_tensors="pt")
    times = [[0, 1, 2, 3, 4.5]]
    assert inputs["input_ids"].tolist() == [processor.expand(processor.prompt_pieces(PROMPT), times)]
    assert inputs["input_ids"].dtype == torch.int64
    assert inputs["attention_mask"].all()
    assert inputs["pixel_values_videos"].shape == (1, 5, 3, SIZE, SIZE)
    assert inputs["pixel_values_videos"].dtype == torch.float32
    assert torch.allclose(inputs["pixel_values_videos"], torch.tensor((9 / 255 - 0.5) / 0.5))


def test_list_of_paths_is_several_videos(processor, opened):
    processor(PROMPT + PROMPT, ["a.mp4", "b.mp4"])
    processor([PROMPT, PROMPT], [["c.mp4"], ["d.mp4"]])
    assert [call["source"] for call in opened] == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    assert {call["size"] for call in opened} == {SIZE}


def test_flat_list_is_distributed_in_order(processor, opened):
    inputs = processor([PROMPT, "Hello", PROMPT + PROMPT], ["a", "b", "c"])
    counts = [row.count(processor.video_token_id) for row in inputs["input_ids"]]
    assert counts == [TOKENS, 0, 2 * TOKENS]
    assert [call["source"] for call in opened] == ["a", "b", "c"]


def test_timestamps_per_video(processor):
    times = [[0.0, 1.0], [5.0, 6.0, 7.0]]
    inputs = processor(PROMPT + PROMPT, [frames(2), frames(3)], timestamps=times)
    assert inputs["input_ids"] == [processor.expand(processor.prompt_pieces(PROMPT + PROMPT), times)]
    assert [len(video) for video in inputs["pixel_values_videos"]] == [2, 3]
    with pytest.raises(ValueError, match="1 videos, but 2 videos"):
        processor(PROMPT + PROMPT, [frames(2), frames(3)], timestamps=[0.0, 1.0])


def test_frames_of_equal_length_are_stacked(processor):
    inputs = processor(PROMPT + PROMPT, [frames(2), frames(2)])
    assert inputs["pixel_values_videos"].shape == (2, 2, 3, SIZE, SIZE)


def test_ragged_videos_survive_moves_and_conversion(processor):
    inputs = processor(PROMPT + PROMPT, [frames(2), frames(3)], return_tensors="pt")
    inputs = inputs.to("cpu", torch.float16)
    assert [video.dtype for video in inputs["pixel_values_videos"]] == [torch.float16] * 2
    assert inputs["input_ids"].dtype == torch.int64
    assert isinstance(inputs.convert_to_tensors("pt")["pixel_values_videos"], list)


@pytest.mark.parametrize(
    ("prompt", "videos", "found"),
    [
        (PROMPT, None, "1 video markers.* 0 videos"),
        ("Hello", "a.mp4", "0 video markers.* 1 videos"),
        (PROMPT, ["a", "b"], "1 video markers.* 2 videos"),
        ([PROMPT, PROMPT], ["a"], "text 1 has 1 video markers.* 0 videos"),
        ([PROMPT, PROMPT], [["a"], []], "text 1 has 1 video markers.* 0 videos"),
        ([PROMPT, PROMPT], [["a"]], "one list per text"),
        ([PROMPT, PROMPT], [["a"], "b"], "one list per text"),
    ],
)
def test_counts_must_agree(processor, opened, prompt, videos, found):
    with pytest.raises(ValueError, match=found):
        processor(prompt, videos)
    assert opened == [], "counts are checked before a video is opened"


def test_text_only_has_no_pixels(processor):
    inputs = processor(text=["Hello"], images=[], videos=[], audios=[], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert set(inputs) <= set(processor.model_input_names)


def test_left_padding(processor, tokenizer):
    short, long = tokenizer("Hello")["input_ids"], tokenizer("Hello, what is this?")["input_ids"]
    inputs = processor(["Hello", "Hello, what is this?"], padding=True, return_tensors="pt")
    gap = len(long) - len(short)
    assert inputs["input_ids"].tolist() == [[tokenizer.pad_token_id] * gap + short, long]
    assert inputs["attention_mask"].tolist() == [[0] * gap + [1] * len(short), [1] * len(long)]
    right = processor(["Hello", "Hello, what is this?"], padding=True, padding_side="right")
    assert right["input_ids"][0] == short + [tokenizer.pad_token_id] * gap
    assert processor(["Hello", "Hello, what is this?"])["input_ids"] == [short, long]
    assert isinstance(processor("Hello", return_tensors="np")["input_ids"], np.ndarray)
    with pytest.raises(ValueError, match="padding=True"):
        processor(["Hello", "Hello, what is this?"], return_tensors="pt")


def test_pads_with_eos_without_a_pad_token(root):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    tokenizer.pad_token = None
    inputs = VideoXLProcessor(tokenizer)(["Hello", "Hello there"], padding=True)
    assert inputs["input_ids"][0][0] == tokenizer.eos_token_id


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, (512, 1, 4)),
        ({"max_num_frames": 8, "sample_fps": None, "max_sample_fps": None}, (8, None, None)),
        ({"sample_fps": 2}, (512, 2, 4)),
        ({"num_frames": 8}, (8, None, None)),
        ({"fps": 0.5}, (512, 0.5, None)),
        ({"fps": 2, "max_num_frames": 9}, (9, 2, None)),
        ({"num_frames": None, "fps": None, "max_num_frames": None}, (512, 1, 4)),
        ({"num_frames": 8, "sample_fps": None}, (8, None, None)),
    ],
)
def test_sampling_arguments(processor, opened, arguments, expected):
    processor(PROMPT, "a.mp4", **arguments)
    processor.apply_chat_template(user(video("a.mp4"), text()), tokenize=True, processor_kwargs=arguments)
    for call in opened:
        assert (call["max_num_frames"], call["sample_fps"], call["max_sample_fps"]) == expected
    assert len(opened) == 2


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"sample_fps": 2}, (512, 2, 4)),
        ({"num_frames": 8}, (8, None, None)),
        ({"nframes": 8, "fps": None}, (8, None, None)),
        ({"fps": 0.5}, (512, 0.5, None)),
        ({"fps": 2, "max_frames": 9}, (9, 2, None)),
        ({"max_num_frames": 9, "sample_fps": None, "max_sample_fps": None}, (9, 1, 4)),  # None is no key
    ],
)
def test_sampling_of_one_item(processor, opened, keys, expected):
    processor(PROMPT, {"video_path": "a.mp4", **keys})
    processor(PROMPT, {"video": {"path": "a.mp4", **keys}})
    processor.apply_chat_template(user(video("a.mp4", **keys), text()), tokenize=True)
    for call in opened:
        assert (call["max_num_frames"], call["sample_fps"], call["max_sample_fps"]) == expected
    assert len(opened) == 3


@pytest.mark.parametrize(
    "arguments", [{"num_frames": 8, "fps": 1}, {"num_frames": 8, "max_num_frames": 8}, {"fps": 1, "sample_fps": 1}]
)
def test_conflicting_sampling(processor, opened, arguments):
    with pytest.raises(ValueError, match="conflicts with"):
        processor(PROMPT, "a.mp4", **arguments)


def test_settings_of_one_video_win(processor, opened):
    messages = user(
        video({"video_path": "a.mp4", "fps": 2, "max_frames": 7}), video("b.mp4", max_pixels=99), text("Hi")
    )
    processor.apply_chat_template(messages, tokenize=True, max_num_frames=5)
    assert [(call["source"], call["max_num_frames"], call["sample_fps"]) for call in opened] == [
        ("a.mp4", 7, 2),
        ("b.mp4", 5, 1),
    ]


@pytest.mark.parametrize("entry", [{"fps": 1}, {"path": "a", "url": "b"}, {"path": "a", "begin": 3}])
def test_odd_video_entries(processor, entry):
    with pytest.raises(ValueError, match="a video item takes one of"):
        processor(PROMPT, entry)


@pytest.mark.parametrize("timestamps", [None, [10.0, 11.0, 12.0, 13.0, 14.0]])
def test_num_frames_chooses_among_frames_in_memory(processor, opened, timestamps):
    processor(PROMPT, PILS, timestamps=timestamps, num_frames=3)
    first = timestamps[0] if timestamps else 0
    assert opened[0]["source"] == [PILS[0], PILS[2], PILS[4]]
    assert opened[0]["timestamps"] == [first, first + 2, first + 4]


def test_a_file_gives_as_many_placeholders_as_frames_need(processor, test_data):
    path = test_data / "data" / "videos" / "testpattern_2s_vp9.webm"
    inputs = processor.apply_chat_template(
        user({"type": "video", "path": str(path)}, text()), tokenize=True, return_dict=True, num_frames=6
    )
    assert inputs["pixel_values_videos"].shape == (1, 6, 3, SIZE, SIZE)
    assert inputs["input_ids"][0].count(processor.video_token_id) == processor.num_video_tokens(6) == 2 * TOKENS


# ---------------------------------------------------------------- chat template


def test_use_this_model_snippet(processor):
    messages = [{"role": "user", "content": "Who are you?"}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to("cpu")
    assert processor.decode(inputs["input_ids"][0]) == processor.render(messages)
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_tensors="pt")
    assert ids.tolist() == inputs["input_ids"].tolist()


def test_batch_of_conversations_equals_single_ones(processor):
    chats = [user(video(frames(2)), text("One?")), user(text("Nothing to see.")), user(video(frames(5)), text("Two?"))]
    batch = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", padding=True, add_generation_prompt=True
    )
    for row, mask, chat in zip(batch["input_ids"], batch["attention_mask"], chats, strict=True):
        single = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
        assert row[mask.bool()].tolist() == single[0]
    assert [len(clip) for clip in batch["pixel_values_videos"]] == [2, 5]
    assert processor.apply_chat_template(chats)[1] == processor.apply_chat_template(chats[1])


def test_continue_final_message(processor):
    messages = [*user(text("Hi")), {"role": "assistant", "content": [text("The circle ")]}]
    assert processor.apply_chat_template(messages, continue_final_message=True).endswith("assistant\nThe circle ")
    with pytest.raises(ValueError, match="exclude each other"):
        processor.apply_chat_template(messages, continue_final_message=True, add_generation_prompt=True)


def test_other_templates(tokenizer, processor):
    named = VideoXLProcessor(tokenizer, chat_template={"default": "{{ messages[0].content }}", "two": "{{ mood }}"})
    messages = [{"role": "user", "content": "Hi"}]
    assert named.apply_chat_template(messages) == "Hi"
    assert named.apply_chat_template(messages, chat_template="two", mood="good") == "good"
    assert processor.apply_chat_template(messages, chat_template="{{ messages | length }}") == "1"


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "non-empty list"),
        ("Hello", "non-empty list"),
        ([{"role": "tool", "content": "x"}], "role"),
        ([{"role": "user"}], "content"),
        (user(text("look <|image_pad|>")), "message 0 has"),
        (user({"type": "audio", "audio": "a.wav"}), "an item must be"),
        (user(text(f"look {MARKER}")), "message 0 has"),
        ([{"role": "user", "content": MARKER}], "message 0 has"),
        ([{"role": "system", "content": MARKER}, *user(text())], "message 0 has"),
        (user(text("<|vision_"), text("pad|>")), "1 markers .* for 0 video items"),
    ],
)
def test_refused_messages(processor, messages, found):
    with pytest.raises(ValueError, match=found):
        processor.apply_chat_template(messages)


# ---------------------------------------------------------------- clients' arguments


@pytest.mark.parametrize(
    "arguments",
    [
        {"images": None, "audio": None, "do_sample_frames": True, "load_audio_from_video": False},
        {"images": [[]], "videos": [[]], "audios": []},
        {"videos": [None], "truncation": None, "processor_kwargs": {}, "tools": None, "return_metadata": False},
        {"padding": True, "padding_side": "right", "pad_to_multiple_of": None, "add_special_tokens": False},
    ],
)
def test_harmless_arguments(processor, arguments):
    call = {name: value for name, value in arguments.items() if name != "processor_kwargs"}
    assert processor("Hello", **call)["input_ids"] == processor("Hello")["input_ids"]
    template = {name: value for name, value in arguments.items() if name != "videos"}
    messages = [{"role": "user", "content": "Hello"}]
    assert processor.apply_chat_template(messages, tokenize=True, **template)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({"images": [PILS[0]]}, "0 image markers .* 1 images"),
        ({"audio": ["a.wav"]}, "audio"),
        ({"truncation": True}, "never truncated"),
        ({"max_length": 12}, "max_length"),
        ({"nonsense": None}, "unknown arguments: nonsense"),
        ({"size": 3, "do_resize": True}, "unknown arguments: do_resize, size"),
        ({"padding": "max_length"}, "padding"),
        ({"return_tensors": "tf"}, "return_tensors"),
        ({"text": 5}, "text must be"),
        ({"text": []}, "text must be"),
        ({"text": None}, "text must be"),
    ],
)
def test_refused_arguments(processor, arguments, found):
    with pytest.raises(ValueError, match=found):
        processor(**{"text": "Hello", **arguments})


@pytest.mark.parametrize("tokenize", [True, False])
@pytest.mark.parametrize(
    "arguments", [{"tools": [{"name": "f"}]}, {"documents": [{"text": "x"}]}, {"add_generation_promt": True}]
)
def test_refused_template_arguments(processor, tokenize, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        processor.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=tokenize, **arguments)


def test_decoding(processor, tokenizer):
    ids = torch.tensor([tokenizer(" A star. <|im_end|>")["input_ids"]])
    assert processor.post_process_image_text_to_text(ids) == [" A star. "]
    assert processor.post_process_image_text_to_text(ids, strip=True) == ["A star."]
    assert processor.post_process_image_text_to_text(ids, skip_special_tokens=False) == [" A star. <|im_end|>"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == [" A star. "]


# ---------------------------------------------------------------- loading, each in a fresh process

LOAD = """
import json, sys
import numpy as np
from transformers import AutoProcessor, AutoTokenizer
source, target = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True, max_num_frames=9)
inputs = processor.apply_chat_template(
    [{"role": "user", "content": [{"type": "video", "video": np.zeros((5, 8, 8, 3), dtype=np.uint8)}]}],
    tokenize=True, return_dict=True, return_tensors="pt",
)
processor.save_pretrained(target)
print(json.dumps({
    "class": type(processor).__name__, "tokenizer": type(tokenizer).__name__, "config": processor.to_dict(),
    "ids": inputs["input_ids"][0].tolist(), "shape": list(inputs["pixel_values_videos"].shape),
    "template": processor.chat_template, "same": tokenizer.chat_template == processor.chat_template,
}))
"""


def load_in_fresh_process(source, target, cache):
    environment = os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(name, None)
    command = [sys.executable, "-c", LOAD, str(source), str(target)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=cache)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_loads_from_a_folder_then_what_it_saved_from_the_hub_cache(root, tmp_path, processor):
    folder, saved, cache = tmp_path / "checkpoint", tmp_path / "saved", tmp_path / "cache"
    cache.mkdir()
    folder.mkdir()
    config = ("config.json", "configuration_videoxl.py")
    for name in (*FOLDER, *config):
        shutil.copy(root / name, folder / name)
    local = load_in_fresh_process(folder, saved, cache)
    bundled = json.loads((root / "processor_config.json").read_text())
    assert local["class"] == "VideoXLProcessor"
    assert local["tokenizer"] != "Qwen2Tokenizer", "Qwen2's class would split numbers into digits"
    assert local["shape"] == [1, 5, 3, bundled["image_size"], bundled["image_size"]]
    assert local["ids"].count(processor.video_token_id) == 2 * bundled["tokens_per_group"]
    assert local["template"] == DEFAULT_CHAT_TEMPLATE and local["same"]
    assert local["config"]["max_num_frames"] == 9, "an argument of from_pretrained overrides the file"

    written = json.loads((saved / "processor_config.json").read_text())
    assert written["auto_map"] == {"AutoProcessor": "processing_videoxl.VideoXLProcessor"}
    for name in config:
        shutil.copy(folder / name, saved)
    commit = "0" * 39 + "1"
    repository = cache / "hub" / "models--someone--videoxl"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(saved, repository / "snapshots" / commit)
    hub = load_in_fresh_process("someone/videoxl", tmp_path / "again", cache)
    assert hub["ids"] == local["ids"]
    for loaded in (local, hub):
        # Loading from the Hub's cache writes the repository's name in front.
        loaded["config"].pop("auto_map", None)
    assert {name: hub[name] for name in ("config", "template", "class", "same")} == {
        name: local[name] for name in ("config", "template", "class", "same")
    }


def test_a_processor_built_in_code_is_saved_with_its_code(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= set(FOLDER)
    written = json.loads((tmp_path / "processor_config.json").read_text())
    assert written["auto_map"] == {"AutoProcessor": "processing_videoxl.VideoXLProcessor"}
    assert (written["image_size"], written["tokens_per_group"]) == (SIZE, TOKENS)
    again = VideoXLProcessor.from_pretrained(tmp_path)
    # Saving leaves its `auto_map` on the object.
    assert again.to_dict() | {"auto_map": processor.auto_map} == processor.to_dict()
    assert again.chat_template == processor.chat_template


def test_bundled_settings_are_the_model_s(root, bundle):
    model, tokenizer, _ = bundle
    bundled = VideoXLProcessor.from_pretrained(root)
    built = VideoXLProcessor.from_config(model.config, tokenizer).to_dict()
    assert bundled.to_dict() | {"auto_map": None} == built | {"auto_map": None}
    names = {"image_size", "frames_per_group", "tokens_per_group", "frames_config"}
    assert names | {"max_num_frames", "sample_fps", "max_sample_fps", "video_token", "image_token"} <= set(built)


def test_settings_of_earlier_versions_are_taken_over(root, tmp_path, tokenizer):
    """They stood by themselves, beside what the processor has of its own."""
    old = {
        "image_size": SIZE,
        "tokens_per_group": TOKENS,
        "time_format": None,
        "frame_fit": "crop",
        "sample_fps": None,
    }
    (tmp_path / "processor_config.json").write_text(json.dumps(old))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / name, tmp_path / name)
    processor = VideoXLProcessor.from_pretrained(tmp_path)
    assert (processor.image_size, processor.tokens_per_group, processor.sample_fps) == (SIZE, TOKENS, None)
    assert (
        (processor.time_format, processor.frame_fit)
        == (None, "crop")
        == (
            processor.frames_config.time_format,
            processor.frames_config.frame_fit,
        )
    )
    loaded = VideoXLProcessor.from_pretrained(tmp_path, time_format="{seconds}:", exact_resize=True)
    assert (loaded.time_format, loaded.frame_fit, loaded.exact_resize) == ("{seconds}:", "crop", True)
    loaded.time_format = "Time {seconds:.1f}s:"
    assert loaded.time_token_ids(0) == VideoXLProcessor(tokenizer).time_token_ids(0)
    loaded.save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "processor_config.json").read_text())
    assert "time_format" not in written and written["frames_config"]["frame_fit"] == "crop"
    assert VideoXLProcessor.from_pretrained(tmp_path / "new").to_dict() | {"auto_map": None} == loaded.to_dict() | {
        "auto_map": None
    }
    with pytest.raises(ValueError, match="frame_fit must be one of"):
        VideoXLProcessor.from_pretrained(tmp_path, frame_fit="shrink")
    with pytest.raises(ValueError, match="no setting time_fromat"):
        VideoXLProcessor(tokenizer, time_fromat=None)


def test_frames_for_engines_are_those_of_a_call(processor, clips):
    """`read_video` gives a call's frames before they are normalised, from a path and from the file's content."""
    prompt = processor.render([{"role": "user", "content": [{"type": "video", "video": clips[0]}]}])
    for sampling in ({}, {"num_frames": 5}, {"fps": 3}, {"sample_fps": None, "max_num_frames": 7}):
        inputs = processor(prompt, videos=[clips[0]], return_tensors="pt", **sampling)
        for source in (clips[0], Path(clips[0]).read_bytes()):
            frames, seconds, duration = processor.read_video(source, **sampling)
            assert frames.dtype == torch.uint8 and len(seconds) == len(frames) and duration == pytest.approx(9.0)
            normalised = normalize_frames(frames, processor.image_mean, processor.image_std)
            torch.testing.assert_close(normalised, inputs["pixel_values_videos"][0], atol=0, rtol=0)
    _, seconds, _ = processor.read_video(clips[0], start=2, end=4)
    assert seconds[0] >= 2 and seconds[-1] < 4
    still = np.zeros((3, 8, 8, 3), np.uint8)
    assert processor.read_video(still, timestamps=[0.0, 0.5, 2.0])[1:] == ([0.0, 0.5, 2.0], 3.5)
    with pytest.raises(ValueError, match="unknown arguments: frames; known are max_num_frames"):
        processor.read_video(clips[0], frames=3)
