"""VideoChat-Flash in its doors: the published prompt, `chat` as its clients call it, parts, folders, growth."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import VIDEOCHAT_FLASH_DOORS, _undone
from margins import greedy_choice
from PIL import Image
from safetensors.torch import load_file, save_file
from sampled import open_video
from transformers import AutoModel, AutoProcessor, AutoTokenizer, Qwen2Tokenizer
from videoxl.hub.cards import check_card, converted_card
from videoxl.hub.convert import convert
from videoxl.messages_videoxl import read_history, turn_items
from videoxl.processing_videoxl import VideoXLProcessor

GREEDY = {"generation_config": {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}}
MARKER = "<|vision_pad|>"
MESSAGE = VIDEOCHAT_FLASH_DOORS["video_message"]


@pytest.fixture
def flash(family_models):
    """A small VideoChat-Flash with random weights; what a test sets on its config is undone."""
    with _undone(family_models["videochatflash"]) as model:
        yield model


@pytest.fixture
def flash_processor(flash, tokenizer):
    return VideoXLProcessor.from_config(flash.config, tokenizer)


@pytest.fixture
def folder(tmp_path):
    """A folder of 30 numbered pictures."""
    path = tmp_path / "pictures"
    path.mkdir()
    for number, picture in enumerate(np.random.default_rng(0).integers(0, 255, (30, 24, 32, 3), dtype=np.uint8)):
        Image.fromarray(picture).save(path / f"frame_{number + 1}.jpg")
    return path


def ask(model, tokenizer, video, question="What happens?", **options):
    return model.chat(video, tokenizer, question, return_history=False, **GREEDY, **options)


def suffix_of(processor, video, question):
    """The text of a prompt behind a video, as it is tokenised."""
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    text = processor.render([{"role": "user", "content": content}])
    return processor.tokenizer.decode(processor.prompt_pieces(text, [video.shown])[-1])


# ---------------------------------------------------------------- the published prompt


def test_published_prompts_and_the_texts_left_and_right(test_data):
    tokenizer = Qwen2Tokenizer.from_pretrained(test_data / "data" / "tokenizer")
    processor = VideoXLProcessor(tokenizer, video_message=MESSAGE, time_format=None)
    golden = json.loads((test_data / "golden" / "videochatflash" / "frame_sampling.json").read_text())
    for entry in golden["chat_prompt"]:
        duration = entry["total_frames"] / entry["fps"]
        messages = read_history(entry["chat_history"], {"type": "video", "video": "a.mp4"})
        if messages:
            messages.append({"role": "user", "content": entry["question"]})
        else:
            content = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": entry["question"]}]
            messages = [{"role": "user", "content": content}]
        text = processor.render(messages)
        assert text.count(MARKER) == entry["n_image_placeholders"]
        pieces = processor.prompt_pieces(text, [(duration, entry["num_frames"])])
        expected = [
            tokenizer(entry[name], add_special_tokens=False)["input_ids"]
            for name in ("text_before_image", "text_after_image")
        ]
        assert pieces == expected
        assert len(pieces[0]) == 14 and pieces[1][-5:] == [151645, 198, 151644, 77091, 198]
        # Our own history says nothing of the video in its text; it comes out alike.
        if entry["chat_history"]:
            asked = messages[0]["content"][1]
            asked["text"] = asked["text"].removeprefix(MESSAGE.format(duration=duration, num_frames=120))
            assert processor.prompt_pieces(processor.render(messages), [(duration, 120)]) == expected


def test_what_a_history_says_of_its_video_is_replayed(flash_processor):
    said = MESSAGE.format(duration=7, num_frames=9) + "What?"
    for text in (f"{MARKER}\n{said}", f"{MARKER}{said}"):
        assert flash_processor.prompt_pieces(text, [(12.5, 64)]) == flash_processor.prompt_pieces(text)
    plain = flash_processor.prompt_pieces(f"a{MARKER}What?", [(7.0, 9)])
    assert plain == flash_processor.prompt_pieces(f"a{MARKER}{said}")
    both = flash_processor.prompt_pieces(f"{MARKER}\n<|image_pad|>\nWhat?", [(7.0, 9), None])
    assert flash_processor.tokenizer.decode(both[2]) == "\nWhat?"


def test_processor_expands_prefix_placeholders_question(flash, flash_processor, tokenizer, clips):
    messages = [{"role": "user", "content": [{"type": "video", "video": clips[0]}, {"type": "text", "text": "What?"}]}]
    inputs = flash_processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    # 90 frames at 10 a second: nine seconds, and at least 64 frames.
    said = MESSAGE.format(duration=9, num_frames=64)
    text = flash_processor.render(messages).replace(f"{MARKER}\n", f"{MARKER}\n{said}")
    prefix, suffix = flash_processor.prompt_pieces(text)
    placeholders = [flash.config.video_token_id] * flash_processor.num_video_tokens(64)
    assert inputs["input_ids"][0].tolist() == [*prefix, *placeholders, *suffix]
    assert inputs["pixel_values_videos"].shape[:2] == (1, 64)
    answer = flash.generate(**inputs, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == ask(
        flash, tokenizer, clips[0], "What?"
    )


def test_pixels_are_the_reference_s(flash, flash_processor, tokenizer, test_data):
    tensors = load_file(test_data / "golden" / "videochatflash" / "golden.safetensors")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    for case, size in (("c0", 56), ("h0", 112), ("v0", 64)):
        processor = VideoXLProcessor(tokenizer, image_size=size, image_mean=mean, image_std=std, exact_resize=True)
        frames = tensors[f"{case}.frames"]
        inputs = processor(f"{MARKER}", videos=[frames], timestamps=list(range(len(frames))))
        expected = tensors[f"{case}.pixel_values"]
        assert (inputs["pixel_values_videos"][0] - expected.flatten(0, expected.ndim - 4)).abs().max() < 1e-5


# ---------------------------------------------------------------- chat


def test_chat_samples_and_words_as_published(flash, flash_processor, tokenizer, clips):
    video = flash.encode_video(clips[0], tokenizer)
    assert (video.num_frames, video.duration) == (64, pytest.approx(9.0))
    assert suffix_of(flash_processor, video, " Where? ").startswith(
        "\nThe video lasts for 9.00 seconds, and 64 frames are uniformly sampled from it.  Where? <|im_end|>"
    )
    assert ask(flash, tokenizer, video) == ask(flash, tokenizer, clips[0]) == ask(flash, tokenizer, [clips[0]])
    # The least beats the most; a caller who names a rate gets it.
    assert flash.encode_video(clips[0], tokenizer, max_num_frames=8).num_frames == 64
    assert flash.encode_video(clips[0], tokenizer, max_num_frames=8, sample_fps=None).num_frames == 8
    assert flash.encode_video(clips[0], tokenizer, sample_fps=2, max_sample_fps=None).num_frames == 18
    assert flash.encode_video(clips[0], tokenizer, max_num_frames=-1).num_frames == 64


def test_a_limit_that_is_no_multiple_of_four_is_no_crash(flash, tokenizer, clips):
    with open_video(clips[1], size=8, max_num_frames=66, **_sampler(flash, tokenizer)) as reader:
        assert reader.num_frames == 64
    frames = torch.randint(0, 255, (66, 24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    times = [float(number) for number in range(66)]
    video = flash.encode_video(frames, tokenizer, timestamps=times)
    padded = flash.encode_video(
        torch.cat([frames, frames[-1:], frames[-1:]]), tokenizer, timestamps=[*times, 66.0, 67.0]
    )
    # The last clip is filled with its last frame; the prompt counts the frames that there are.
    assert video.num_frames == 66 and video.num_visual_tokens == padded.num_visual_tokens
    assert torch.equal(video.input_ids, padded.input_ids)
    for mine, other in zip(video.cache.layers, padded.cache.layers, strict=True):
        assert torch.allclose(mine.keys, other.keys, atol=1e-4)


def _sampler(model, tokenizer):
    return {"sampler": VideoXLProcessor.from_config(model.config, tokenizer).sampling().sampler}


def test_second_turns_carry_no_sentence_and_reuse_the_video(flash, tokenizer, clips, monkeypatch):
    answer, history = flash.chat(clips[0], tokenizer, "What?", **GREEDY)
    video = history[0]["content"][0]["video"]
    assert history[0]["content"][1]["text"] == "What?"
    monkeypatch.setattr(flash.model, "get_video_features", None)
    second, longer = flash.chat(clips[0], tokenizer, "And then?", chat_history=history, **GREEDY)
    assert longer[0]["content"][0]["video"] is video
    assert [message["content"] for message in longer[1:]] == [answer, "And then?", second]
    monkeypatch.undo()
    said = MESSAGE.format(duration=9, num_frames=64)
    published = [
        {"role": "<|im_start|>user", "content": f"<image>\n{said}What?"},
        {"role": "<|im_start|>assistant", "content": answer},
    ]
    before = json.dumps(published)
    assert ask(flash, tokenizer, clips[0], "And then?", chat_history=published) == second
    assert json.dumps(published) == before
    assert ask(flash, tokenizer, clips[0], "And then?", chat_history=json.loads(json.dumps(history))) == second


def test_published_call_by_keywords(flash, tokenizer, clips):
    settings = {"do_sample": False, "temperature": 0.0, "max_new_tokens": 5, "top_p": 0.1, "num_beams": 1}
    answer, history = flash.chat(
        video_path=clips[0], tokenizer=tokenizer, user_prompt="Describe this video in detail.", chat_history=None,
        return_history=True, max_num_frames=512, media_dict=None, generation_config=settings,
    )  # fmt: skip
    assert isinstance(answer, str) and history[-1] == {"role": "assistant", "content": answer}
    only = flash.chat(
        video_path=clips[0], tokenizer=tokenizer, user_prompt="Describe this video in detail.", return_history=False,
        max_num_frames=512, generation_config=settings, media_dict={"video_read_type": "av"},
    )  # fmt: skip
    assert only == answer


def test_parts_of_a_video(flash, flash_processor, tokenizer, clips, tmp_path):
    part = {"video_read_type": "decord", "start": 2, "end": 5.5}
    answer, history = flash.chat(clips[0], tokenizer, "Please say: What?", media_dict=part, **GREEDY)
    video = history[0]["content"][0]["video"]
    assert (video.start, video.duration, video.end) == (2.0, 3.5, 5.5)
    assert video.num_frames == 32 and video.timestamps[0] >= 2 and video.timestamps[-1] < 5.5
    assert "lasts for 3.50 seconds, and 32 frames" in suffix_of(flash_processor, video, "Please say: What?")
    assert answer == ask(
        flash, tokenizer, flash.encode_video(clips[0], tokenizer, media_dict=part), "Please say: What?"
    )
    # The same part is reused, with and without saying so; another part, or the whole, is another video.
    for same in ({}, {"media_dict": part}):
        _, longer = flash.chat(clips[0], tokenizer, "Then?", chat_history=history, **same, **GREEDY)
        assert longer[0]["content"][0]["video"] is video and isinstance(longer[2]["content"], str)
    for other in ({"start": 2, "end": 5}, {}):
        _, longer = flash.chat(clips[0], tokenizer, "Then?", chat_history=history, media_dict=other, **GREEDY)
        assert len(longer[2]["content"]) == 2
    # It survives JSON and files, also as the caller's own EncodedVideo.
    kept = json.loads(json.dumps(history))
    _, longer = flash.chat(None, tokenizer, "Then?", chat_history=kept, **GREEDY)
    assert longer[0]["content"][0]["video"].duration == 3.5
    _, own = flash.chat(video, tokenizer, "Please say: What?", **GREEDY)
    _, longer = flash.chat(None, tokenizer, "Then?", chat_history=json.loads(json.dumps(own)), **GREEDY)
    assert longer[0]["content"][0]["video"].num_frames == 32
    video.save(tmp_path / "part.videoxl")
    loaded = flash.load_video(tmp_path / "part.videoxl", tokenizer, start=2, end=5.5)
    assert (loaded.start, loaded.duration) == (2.0, 3.5) and ask(
        flash, tokenizer, loaded, "Please say: What?"
    ) == answer
    with pytest.raises(ValueError, match="does not fit"):
        flash.load_video(tmp_path / "part.videoxl", tokenizer, start=1)


def test_media_dict_of_what_a_turn_does_not_bring(flash, tokenizer, clips):
    part = {"start": 2, "end": 5.5}
    video = flash.encode_video(clips[0], tokenizer, media_dict=part)
    assert ask(flash, tokenizer, video, media_dict=part) == ask(flash, tokenizer, video, media_dict={})
    for visual in (video, None, [{"type": "video", "video": clip} for clip in clips]):
        with pytest.raises(ValueError, match="media_dict is about the path"):
            ask(flash, tokenizer, visual, media_dict={"start": 0, "end": 1})
    for wrong in ({"begin": 1}, {"video_read_type": "opencv"}, "decord"):
        with pytest.raises(ValueError, match="media_dict"):
            ask(flash, tokenizer, clips[0], media_dict=wrong)
    with pytest.raises(ValueError, match="several videos are a list of"):
        ask(flash, tokenizer, list(clips))
    items = [{"type": "video", "video": clips[0], "media_dict": {"start": 0, "end": 3}}, {"type": "text", "text": "?"}]
    assert isinstance(ask(flash, tokenizer, items), str)


def test_folders_and_gifs(flash, flash_processor, tokenizer, folder, tmp_path):
    for kind in ("img", "frame"):
        _, history = flash.chat(folder, tokenizer, "What?", media_dict={"video_read_type": kind}, **GREEDY)
        video = history[0]["content"][0]["video"]
        assert (video.num_frames, video.duration) == (24, 30.0)
    assert "30.00 seconds, and 24 frames" in suffix_of(flash_processor, video, "What?")
    pictures = [Image.open(path) for path in sorted(folder.iterdir())[:10]]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=40)
    gif = flash.encode_video(tmp_path / "a.gif", tokenizer, media_dict={"video_read_type": "gif"})
    assert (gif.num_frames, gif.duration) == (8, 10.0)
    # What JSON keeps beside the path says that it is read as a GIF again.
    assert turn_items(gif)[0]["media_dict"] == {"video_read_type": "gif"}
    own = flash.encode_video(tmp_path / "a.gif", tokenizer)
    assert (own.num_frames, own.duration) == (8, pytest.approx(0.4))
    message = {"type": "video", "video": str(folder), "media_dict": {"video_read_type": "img", "start": 5, "end": 20}}
    inputs = flash_processor.apply_chat_template(
        [{"role": "user", "content": [message]}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["pixel_values_videos"].shape[1] == 8
    assert "lasts for 15.00 seconds, and 8 frames" in tokenizer.decode(inputs["input_ids"][0])


def test_a_growing_video_says_how_long_it_is_by_now(flash, flash_processor, tokenizer):
    frames = torch.randint(0, 255, (21, 24, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    times = [0.0, 9.0, *[9.5 + number / 2 for number in range(19)]]
    whole = flash.encode_video(frames, tokenizer, timestamps=times)
    grown = flash.encode_video(frames[:2], tokenizer, timestamps=times[:2])
    grown.append(frames[2:9], times[2:9])
    grown.append(frames[9:], times[9:])
    assert suffix_of(flash_processor, grown, "What?") == suffix_of(flash_processor, whole, "What?")
    assert "lasts for 19.00 seconds, and 21 frames" in suffix_of(flash_processor, grown, "What?")
    assert ask(flash, tokenizer, grown) == ask(flash, tokenizer, whole)
    questions = ["What?", "Where is it, then?"]
    assert flash.chat_batch(grown, tokenizer, questions, **GREEDY) == [
        ask(flash, tokenizer, whole, question) for question in questions
    ]


def test_several_videos_each_say_their_own(flash, flash_processor, tokenizer, clips):
    items = [{"type": "video", "video": clip} for clip in clips]
    answer, history = flash.chat(items, tokenizer, "Which is longer?", **GREEDY)
    second = history[0]["content"][1]["video"]
    text = tokenizer.decode(second.input_ids.tolist())
    assert text.count("uniformly sampled") == 1 and "9.00 seconds, and 64 frames" in text
    inputs = flash_processor.apply_chat_template(
        [{"role": "user", "content": [*items, {"type": "text", "text": "Which is longer?"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert tokenizer.decode(inputs["input_ids"][0]).count("uniformly sampled from it. ") == 2
    output = flash.generate(**inputs, **GREEDY["generation_config"])
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer


def test_only_words_of_the_answer_count_as_repeated(flash, tokenizer, clips):
    """As in the published code, which generates from embeddings. A penalty below 1 favours what counts: it shows."""
    video = flash.encode_video(clips[0], tokenizer)
    prompt, penalty = "What happens? What moves?", 0.1
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "repetition_penalty": penalty}
    answer = flash.chat(video, tokenizer, prompt, return_history=False, generation_config=settings)

    def favour(scores, tokens):
        changed = scores.clone()
        for token in set(tokens):
            changed[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
        return greedy_choice(changed)

    content = [{"type": "video", "video": video}, {"type": "text", "text": prompt}]
    processor = VideoXLProcessor.from_config(flash.config, tokenizer)
    text = processor.render([{"role": "user", "content": content}])
    asked = processor.prompt_pieces(text, [video.shown])[1]
    ids, said, unfavoured = torch.tensor([asked]), [], []
    cache = video.question_cache()
    with torch.no_grad():
        for _ in range(6):
            scores = flash(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
            scores[tokenizer.eos_token_id] = -torch.inf
            unfavoured.append(greedy_choice(scores))
            if not said:
                assert favour(scores, asked) != unfavoured[0], "words of the question would show if they counted"
            said.append(favour(scores, said))
            ids = torch.tensor([said[-1:]])
    assert answer == tokenizer.decode(said, skip_special_tokens=True).strip()
    assert said != unfavoured


def test_images_have_no_sentence(flash, tokenizer):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 90, 3), dtype=np.uint8))
    answer, history = flash.chat(picture, tokenizer, "What is it?", **GREEDY)
    image = history[0]["content"][0]["image"]
    assert image.kind == "image" and image.shown is None
    assert ask(flash, tokenizer, image, "What is it?") == answer


def test_plans_sample_as_encoding_does(flash, tokenizer, clips):
    video = flash.encode_video(clips[0], tokenizer)
    plan = flash.plan(video_path=clips[0], tokenizer=tokenizer)
    assert (plan.frames, plan.kv_bytes) == (video.num_frames, video.nbytes)


# ---------------------------------------------------------------- a converted checkpoint


@pytest.fixture(scope="module")
def converted(test_data, root, tmp_path_factory):
    """The golden checkpoint with the bundled tokenizer and as many rows as that needs, through the converter."""
    folder = tmp_path_factory.mktemp("doors")
    source, golden = folder / "source", test_data / "golden" / "videochatflash" / "checkpoint_res224"
    shutil.copytree(golden, source, copy_function=shutil.copyfile)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(root / name, source / name)
    rows = json.loads((root / "config.json").read_text())["text_config"]["vocab_size"]
    tensors = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = torch.randn(rows - len(tensors[name]), tensors[name].shape[1], generator=generator)
        tensors[name] = torch.cat([tensors[name], more * tensors[name].std()])
    (source / "model.safetensors").unlink()
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"vocab_size": rows}
    token = json.loads((root / "config.json").read_text())["video_token_id"]
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config | {"video_token_id": token}))
    return convert(source, folder / "videochatflash_doors")


def test_converted_checkpoint_through_the_auto_classes(converted, clips):
    model = AutoModel.from_pretrained(converted, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(converted, trust_remote_code=True)
    assert (processor.frame_sampler, processor.video_message) == ("dynamic_fps1", MESSAGE)
    built = VideoXLProcessor.from_config(model.config, tokenizer)
    assert processor.frame_options == built.frame_options
    assert str(processor.sampling()) == str(built.sampling())  # two copies of the code have no equal objects
    assert processor.exact_resize and processor.image_size == 56
    answer, history = model.chat(clips[0], tokenizer, "What happens?", **GREEDY)
    video = history[0]["content"][0]["video"]
    assert (video.num_frames, video.num_visual_tokens) == (64, 1024)
    content = [{"type": "video", "video": clips[0]}, {"type": "text", "text": "What happens?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, **GREEDY["generation_config"])
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == answer
    part, _ = model.chat(
        clips[1], tokenizer, "And this?", chat_history=history, media_dict={"start": 1, "end": 4}, **GREEDY
    )
    assert isinstance(part, str)


def test_published_needles_on_a_converted_checkpoint(converted, root, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "evaluation"))
    niah = pytest.importorskip("videoxl.evaluation.niah")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    question = "Find the frame of a wall. what is its color\nOptions: (A) red\n(B) blue\nBest option: ("
    samples = [{"image": "red.png", "question": question, "answer": "A"}]
    (tmp_path / "needles.json").write_text(json.dumps(samples))
    flags = ["--model", str(converted), "--mode", "full", "--lengths", "16", "--depths", "0", "100", "--no-plots"]
    flags += ["--needles", str(tmp_path / "needles.json"), "--kinds", "published_single", "--threads", "1"]
    niah.main([*flags, "--out", str(tmp_path / "niah.json")])
    result = json.loads((tmp_path / "niah.json").read_text())
    assert [(fact["frames"], fact["visual_tokens"]) for fact in result["haystacks"]] == [(20, 320)] * 2
    assert result["configuration"]["published"] == "needles.json"


@pytest.mark.parametrize(
    ("family", "folder"),
    [
        ("videochatflash", "VideoChat-Flash-Qwen2-7B_res448"),
        ("videochatflash", "VideoChat-Flash-Qwen2-7B_res224"),
        ("videochatflash", "VideoChat-Flash-Qwen2_5-2B_res448"),
        ("videochatflash", "VideoChat-Flash-Qwen2_5-7B-1M_res224"),
        ("videochatflash_internvideo2", "VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B"),
    ],
)
def test_cards_of_the_published_checkpoints(family, folder):
    for hub_id in (None, f"OpenGVLab/{folder}"):
        card = converted_card(family, hub_id, folder)
        data = check_card(card)
        assert (data["license"], data["base_model"]) == ("apache-2.0", [f"OpenGVLab/{folder}"])
        assert "arXiv:2501.00574" in card and "VideoChat-Flash: Hierarchical Compression" in card


@pytest.mark.slow
def test_real_videos(converted, test_data):
    model = AutoModel.from_pretrained(converted, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(converted, trust_remote_code=True)
    videos = test_data / "data" / "videos"
    expected = {
        "counting_10s_mpeg4.mp4": (64, 9.83),
        "frame_numbers_1s_h265.mp4": (8, 1.0),
        "rotation_90_3frames.mov": (8, 0.1),
        "bottle_detection_40s.mp4": (64, 39.85),
        "phone_desk_h263_vfr.3gp": (64, 5.02),
        "testsrc_5s_av1.mkv": (64, 5.0),
        "one_by_one_person_139s.mp4": (136, 139.4),
    }
    for name, (count, seconds) in expected.items():
        video = model.encode_video(videos / name, tokenizer, max_num_frames=512)
        assert (video.num_frames, video.num_visual_tokens) == (count, 16 * count), name
        assert video.duration == pytest.approx(seconds, abs=0.02), name
        assert isinstance(ask(model, tokenizer, video), str)
