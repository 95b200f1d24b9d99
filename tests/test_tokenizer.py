"""The small tokenizer: what it promises to the processor and to any text, and that its files come from its script."""

import importlib.util
import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoProcessor, AutoTokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def tokenizer(root):
    return AutoTokenizer.from_pretrained(root, trust_remote_code=True)


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("make_tokenizer", root / "training" / "make_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_writes_the_bundled_files_byte_for_byte(root, tmp_path):
    command = [sys.executable, root / "training" / "make_tokenizer.py", tmp_path]
    subprocess.run(command, check=True, timeout=300)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes(), f"{name} is not what the script writes"


@pytest.mark.parametrize("number", [0, 7, 12, 485, 999])
def test_a_timestamp_is_four_tokens_and_a_number_up_to_999_is_one(root, tokenizer, number):
    # Qwen2Tokenizer, which would be taken for this vocabulary's family, brings its own split of numbers.
    processor = AutoProcessor.from_pretrained(root, trust_remote_code=True)
    for each in (tokenizer, processor.tokenizer):
        assert each.tokenize(f"Time {number}.0s:") == ["Time", f"Ġ{number}", ".0s", ":"]
        assert each.tokenize(f"At {number} seconds") == ["At", f"Ġ{number}", "Ġseconds"]
    assert len(processor.time_token_ids(number)) == 4


def test_longer_numbers_and_other_tails_are_split(tokenizer):
    assert tokenizer.tokenize("Time 1344.5s:") == ["Time", "Ġ134", "4", ".5s", ":"]
    assert tokenizer.tokenize("12.5s") == ["12", ".", "5", "s"], "only before a colon is it a timestamp's tail"


def test_the_config_names_the_tokens_around_a_time(root, tokenizer):
    config = json.loads((root / "config.json").read_text())
    ids = tokenizer(config["frames_config"]["time_format"].format(seconds=3.25))["input_ids"]
    assert (ids[0], ids[-1]) == (config["time_start_token_id"], config["time_end_token_id"])
    assert tokenizer.convert_tokens_to_ids("<|vision_pad|>") == config["video_token_id"]
    text = config["text_config"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (text["eos_token_id"], text["pad_token_id"])
    assert len(tokenizer) == text["vocab_size"]


def test_same_special_tokens_as_the_real_tokenizer(tokenizer, test_data):
    real = json.loads((test_data / "data" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    wanted = [token["content"] for token in real["added_tokens"] if token["special"]]
    ids = tokenizer.convert_tokens_to_ids(wanted)
    assert ids == list(range(len(tokenizer) - len(wanted), len(tokenizer)))


def test_splits_text_without_numbers_like_the_real_tokenizer(root, test_data):
    small, real = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for folder in (root, test_data / "data" / "tokenizer")
    )
    assert small["normalizer"] == real["normalizer"]
    patterns = [part["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] for part in (small, real)]
    tail, numbers = r"\.\p{N}s(?=:)|", (r"| ?\p{N}{1,3}|", r"|\p{N}|")
    assert patterns[0] == tail + patterns[1].replace(numbers[1], numbers[0])


def test_settings(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (tokenizer.padding_side, tokenizer.bos_token) == ("left", None)
    assert 1000 <= len(tokenizer) <= 2500 and len(tokenizer) % 64 == 0


def test_words_of_the_task_are_single_tokens(tokenizer, script):
    words = " ".join((script.COLORS, script.SHAPES, script.MOTIONS, script.NUMBERS, script.PLACES)).split()
    words += [*script.WORLD_WORDS]
    assert [word for word in words if len(tokenizer.tokenize(f" {word}")) > 1] == []


def test_special_tokens_vanish_from_decoded_answers(tokenizer):
    ids = tokenizer("<|im_start|>a red circle<|vision_pad|><|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red circle"


# Text in NFC comes back as it was; other text comes back in NFC, as with Qwen2.
@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_round_trips(tokenizer, text):
    if any(token in text for token in tokenizer.all_special_tokens):
        return
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    "text", ["视频里有什么？", "🎬👩‍👩‍👧 42", "naïve Ünïcödé\n\n\t x", " leading and trailing ", "1234.5"]
)
def test_known_texts_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
