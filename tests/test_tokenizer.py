"""The small tokenizer: what it promises to the processor and to any text, and that its files come from its script."""

import importlib.util
import json
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def tokenizer(root):
    return Qwen2Tokenizer.from_pretrained(root)


@pytest.fixture(scope="module")
def script(root):
    spec = importlib.util.spec_from_file_location("make_tokenizer", root / "training" / "make_tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_writes_the_bundled_files_byte_for_byte(root, tmp_path):
    command = [sys.executable, root / "training" / "make_tokenizer.py", tmp_path]
    subprocess.run(command, check=True, timeout=120)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes(), f"{name} is not what the script writes"


def test_time_string_splits_as_in_the_published_tokenizer(tokenizer):
    assert tokenizer.tokenize("Time 12.0s:") == ["Time", "Ġ", "1", "2", ".", "0", "s", ":"]


def test_same_special_tokens_as_the_real_tokenizer(tokenizer, test_data):
    real = json.loads((test_data / "data" / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    wanted = [token["content"] for token in real["added_tokens"] if token["special"]]
    ids = tokenizer.convert_tokens_to_ids(wanted)
    assert ids == list(range(len(tokenizer) - len(wanted), len(tokenizer)))


def test_splits_like_the_real_tokenizer(root, test_data):
    small, real = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for folder in (root, test_data / "data" / "tokenizer")
    )
    for part in ("normalizer", "pre_tokenizer"):
        wanted, got = real[part], small[part]
        assert got["type"] == wanted["type"]
    patterns = [part["pre_tokenizer"]["pretokenizers"][0]["pattern"] for part in (small, real)]
    assert patterns[0] == patterns[1]


def test_settings(tokenizer):
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert (tokenizer.padding_side, tokenizer.bos_token) == ("left", None)
    assert 1000 <= len(tokenizer) <= 1500


def test_words_of_the_task_are_single_tokens(tokenizer, script):
    words = " ".join((script.COLORS, script.SHAPES, script.MOTIONS, script.NUMBERS, script.PLACES)).split()
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
