"""Videos, configs, folders and histories that an earlier version wrote still load, and give what they gave then.

`fixtures/before/README.md` says how they were made. They stay as they are: files of users are out there.
"""

import contextlib
import functools
import json
import shutil

import pytest
import torch
from old_files import (
    BEFORE,
    CHECKPOINTS,
    CLIP,
    NEW_TOKENS,
    ROOT,
    SAVED,
    TOLERANCES,
    VIDEOS,
    append,
    ask,
    digests,
    encode,
    inputs_of,
    load,
    old_folder,
    pictures,
    seconds,
    set_config,
)
from safetensors.torch import load_file
from transformers import AutoConfig

FACTS = json.loads((BEFORE / "before.json").read_text())
QUESTION = "What color is the star?"
# What "auto" chose then.
CHOSEN = {"saved": [1]}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Opens "bundled", a member or a name of `SAVED`: (model, tokenizer, processor), once each."""
    folders = {"bundled": ROOT}

    @functools.cache
    def open_it(name, dtype="float32"):
        if name not in folders:
            folders[name] = old_folder(name, tmp_path_factory.mktemp("before"))
        return load(folders[name], dtype)

    return open_it


@pytest.fixture
def user(opened):
    """Opens a model with these settings of the config alone, until the next call or the end of the test."""
    with contextlib.ExitStack() as settings_in_use:

        def open_with(name, dtype, settings):
            settings_in_use.close()
            model, tokenizer, _ = opened(name, dtype)
            settings_in_use.callback(model.config.__dict__.update, dict(model.config.__dict__))
            set_config(model, settings)
            return model, tokenizer

        yield open_with


def assert_as_before(asked, key, fact, dtype="float32"):
    """The first step's logits, and the tokens whose lead was recorded as safe."""
    answer, logits = asked
    expected = load_file(BEFORE / "logits.safetensors")[key]
    assert (logits[0] - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()
    sure = fact["sure_steps"]
    assert logits.argmax(-1).tolist()[:sure] == fact["tokens"][:sure]
    if sure == NEW_TOKENS:
        assert answer == fact["answer"]


@pytest.mark.ties  # only words that lead clearly are compared
@pytest.mark.parametrize("name", VIDEOS)
def test_saved_videos_load_and_answer_as_they_did(name, user):
    case, facts = VIDEOS[name], FACTS["videos"][name]
    dtype = case.get("dtype", "float32")
    source = {"source": CLIP} if "clip" in case else {}
    for number, (question, settings, options) in enumerate(case["asked"]):
        model, tokenizer = user(case["model"], dtype, settings)
        video = model.load_video(BEFORE / f"{name}.videoxl", tokenizer, **source)
        assert [video.num_frames, video.duration, video.timestamps, len(video.input_ids)] == [
            facts[key] for key in ("num_frames", "duration", "timestamps", "tokens")
        ]
        asked = ask(model, tokenizer, video, question, **options)
        assert_as_before(asked, f"{name}.{number}", facts["asked"][number], dtype)
    if "append" in case:
        append(video, case)
        asked = ask(model, tokenizer, video, question, **options)
        assert_as_before(asked, f"{name}.appended", facts["appended"], dtype)


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_encoded_anew_answer_as_the_saved_ones(name, user, tmp_path):
    case, facts = VIDEOS[name], FACTS["videos"][name]
    dtype = case.get("dtype", "float32")
    question, settings, options = case["asked"][0]
    model, tokenizer = user(case["model"], dtype, case["settings"])
    encode(model, tokenizer, case, CLIP).save(tmp_path / "new.videoxl")
    model, tokenizer = user(case["model"], dtype, settings)
    video = model.load_video(tmp_path / "new.videoxl", tokenizer)
    asked = ask(model, tokenizer, video, question, **options)
    assert_as_before(asked, f"{name}.0", facts["asked"][0], dtype)


def test_saved_videos_are_refused_by_others_than_their_own(user, tmp_path, clips):
    model, tokenizer = user("bundled", "float32", {})
    path = BEFORE / "bundled_full.videoxl"
    assert model.load_video(path, source=CLIP, max_num_frames=7, sample_fps=None).num_frames == 7
    with pytest.raises(ValueError, match="source_fingerprint"):
        model.load_video(path, source=clips[0])
    with pytest.raises(ValueError, match="max_num_frames"):
        model.load_video(path, source=CLIP, max_num_frames=8)
    with pytest.raises(ValueError, match="model"):
        model.load_video(BEFORE / "videoxlpro_deferred.videoxl")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged.videoxl").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        model.load_video(tmp_path / "damaged.videoxl", source=CLIP)


@pytest.mark.parametrize("name", [*CHECKPOINTS, *SAVED])
def test_folders_load_and_answer_as_they_did(name, opened):
    model, tokenizer, processor = opened(name)
    facts = FACTS["folders"][name]
    assert inputs_of(processor) == {
        "ids": facts["ids"],
        "shape": facts["shape"],
        "pixels": pytest.approx(facts["pixels"], abs=2e-5),
    }
    video = model.encode_video(pictures(14), tokenizer, timestamps=seconds(14))
    # Chunks are chosen by another rule today; behind those of that day the answer is the same.
    chosen = {"dense_chunks": CHOSEN[name]} if name in CHOSEN else {}
    assert_as_before(ask(model, tokenizer, video, QUESTION, **chosen), f"folders.{name}", facts)


@pytest.mark.parametrize("name", [*CHECKPOINTS, *SAVED])
def test_folders_saved_again_load_as_the_old_ones(name, opened, tmp_path):
    """What `save_pretrained` makes of an old folder is the same model: it takes the old model's videos."""
    model, tokenizer, processor = opened(name)
    folder = tmp_path / f"again_{name}"
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    again, tokenizer, processor = load(folder)
    video = model.encode_video(pictures(5), tokenizer, timestamps=seconds(5))
    video.save(tmp_path / "a.videoxl")
    expected = ask(model, tokenizer, video, QUESTION)[1]
    logits = ask(again, tokenizer, again.load_video(tmp_path / "a.videoxl", tokenizer), QUESTION)[1]
    torch.testing.assert_close(logits[0], expected[0], rtol=0, atol=1e-4 * expected.abs().max().item())
    assert inputs_of(processor)["ids"] == FACTS["folders"][name]["ids"]


# What was corrected since, by the published files.
CORRECTED = {
    "videochat-flash-2b-448": {
        *("tie_word_embeddings", "llm_compress_layer_list", "llm_image_token_ratio_list"),
        "text_config.max_window_layers",
    },
    "videochat-flash-7b-1m-224": {"text_config.rms_norm_eps", "text_config.max_window_layers"},
}


@pytest.mark.parametrize("path", sorted((BEFORE / "presets").glob("*.json")), ids=lambda path: path.stem)
def test_full_size_configs_say_what_the_presets_say(path, tmp_path):
    """The config.json of each published checkpoint, as converted then, is the config that the preset makes now."""
    shutil.copyfile(path, tmp_path / "config.json")
    for file in ROOT.glob("*.py"):
        shutil.copyfile(file, tmp_path / file.name)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    preset = type(config)(**json.loads((ROOT / "presets" / path.name).read_text()))
    # What the library keeps of where and with what a config was written.
    theirs = ("_name_or_path", "auto_map", "architectures", "transformers_version")
    old, new = (
        {key: value for key, value in flat(each.to_dict()) if key.split(".")[0] not in theirs}
        for each in (config, preset)
    )
    differing = {key for key in {*old, *new} if old.get(key) != new.get(key)}
    assert differing <= CORRECTED.get(path.stem, set())


def flat(values, prefix=""):
    """Items of a nested dict, by names like `text_config.hidden_size`."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.parametrize("member", CHECKPOINTS)
def test_the_converter_writes_the_tensors_that_it_wrote(member, opened, tmp_path):
    """Old weights load under their old names; whether they also keep these names is said here."""
    model, _, _ = opened(member)
    wanted = json.loads((BEFORE / member / "weights.json").read_text())
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(model.state_dict()) - tied == set(wanted)
    model.save_pretrained(tmp_path)
    assert digests(tmp_path / "model.safetensors") == wanted


def test_a_history_from_json_is_continued(user, monkeypatch):
    model, tokenizer = user("bundled", "float32", {})
    monkeypatch.chdir(CLIP.parent)
    history, options = FACTS["history"]["history"], {"max_num_frames": 24, "generation_config": {"max_new_tokens": 8}}
    first, second = FACTS["history"]["answers"]
    assert (
        model.chat("demo.mp4", tokenizer, history[0]["content"][1]["text"], return_history=False, **options) == first
    )
    answer, longer = model.chat(None, tokenizer, "When does the circle first appear?", history, **options)
    assert answer == second
    assert longer[1]["content"] == history[1]["content"] == first
