"""The other members in the doors that users know: encoding, chat, files, growth, batches, several videos."""

import copy
import sys

import pytest
import torch
from PIL import Image

GREEDY = {"generation_config": {"max_new_tokens": 5, "do_sample": False}}
ONE_PER_SECOND = {"max_num_frames": 64, "sample_fps": 1, "max_sample_fps": None}
# Float32 rounding of other splits of the same sums.
TOLERANCE = 2e-3
QUESTION = "What color is the star?"


def frames_of(seed, count):
    return torch.randint(0, 255, (count, 40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def ask(model, tokenizer, video, question=QUESTION, **options):
    return model.chat(video, tokenizer, question, return_history=False, **GREEDY, **options)


@torch.no_grad()
def first_logits(model, processor, video, question=QUESTION):
    """Logits of the first token of the answer about an encoded video."""
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    suffix = processor.prompt_pieces(processor.render([{"role": "user", "content": content}]), [video.shown])[-1]
    cache = video.question_cache()
    return model(input_ids=torch.tensor([suffix]), past_key_values=cache, logits_to_keep=1).logits[0, -1]


@pytest.fixture
def own_processor(member, tokenizer):
    from videoxl.processing_videoxl import VideoXLProcessor

    return VideoXLProcessor.from_config(member.config, tokenizer)


@pytest.fixture
def inputs(own_processor):
    """What the processor gives for one video, or several, and a question."""

    def build(*videos, text=QUESTION, **options):
        content = [{"type": "video", "video": frames, "timestamps": times} for frames, times in videos]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        return own_processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        )

    return build


def video_of(seed, count, step=1.0):
    return frames_of(seed, count), [number * step for number in range(count)]


def test_encoded_equals_forward_over_the_whole_prompt(member, tokenizer, own_processor, inputs):
    frames, times = video_of(1, 27)
    video = member.encode_video(frames, tokenizer, timestamps=times)
    prompt = inputs((frames, times))
    with torch.no_grad():
        expected = member(**prompt, logits_to_keep=1).logits[0, -1]
    assert len(video.input_ids) == member.model.config.compressor_config.tokens_per_group * len(
        video.layout.groups
    ) + len(video.layout.non_visual)
    assert torch.allclose(first_logits(member, own_processor, video), expected, atol=TOLERANCE)


def test_two_calls_give_one_answer_and_videos_may_be_interleaved(member, tokenizer, clips):
    alone = [ask(member, tokenizer, clip, **ONE_PER_SECOND) for clip in clips]
    assert alone == [ask(member, tokenizer, clip, **ONE_PER_SECOND) for clip in clips]
    first, second = (member.encode_video(clip, tokenizer, **ONE_PER_SECOND) for clip in clips)
    kept = first.nbytes
    answers = [ask(member, tokenizer, first), ask(member, tokenizer, second), ask(member, tokenizer, first)]
    assert answers == [alone[0], alone[1], alone[0]]
    assert first.nbytes == kept


def test_histories_and_other_system_messages(member, tokenizer, clips):
    question = f"Tell me: {QUESTION}"
    answer, history = member.chat(clips[0], tokenizer, question, **GREEDY, **ONE_PER_SECOND)
    before = copy.deepcopy([message["role"] for message in history])
    second = member.chat(None, tokenizer, "Tell me: And then?", chat_history=history, return_history=False, **GREEDY)
    again = member.chat(None, tokenizer, "Tell me: And then?", chat_history=history, return_history=False, **GREEDY)
    assert second == again and [message["role"] for message in history] == before
    for system in ("You see films.", "Time : Time 0000.0s: watch closely and answer in one word, please."):
        video = member.encode_video(clips[0], tokenizer, system_prompt=system, **ONE_PER_SECOND)
        asked = member.chat(
            clips[0], tokenizer, question, chat_history=[{"role": "system", "content": system}],
            return_history=False, **GREEDY, **ONE_PER_SECOND,
        )  # fmt: skip
        assert ask(member, tokenizer, video, question) == asked


def test_questions_in_one_batch_equal_single_ones(member, tokenizer, clips):
    video = member.encode_video(clips[0], tokenizer, **ONE_PER_SECOND)
    questions = [QUESTION, "Which way does the ring move, and how fast is it?", "What happens?"]
    settings = GREEDY["generation_config"]
    assert member.chat_batch(video, tokenizer, questions, generation_config=settings) == [
        ask(member, tokenizer, video, question) for question in questions
    ]


def test_files(member, tokenizer, own_processor, clips, tmp_path):
    video = member.encode_video(clips[0], tokenizer, **ONE_PER_SECOND)
    video.save(tmp_path / "clip.videoxl")
    loaded = member.load_video(tmp_path / "clip.videoxl", tokenizer)
    assert loaded.nbytes == video.nbytes and loaded.layout == video.layout and loaded.prefill == video.prefill
    for mine, theirs in zip(loaded.cache.layers, video.cache.layers, strict=True):
        if theirs.keys is None:  # its rows wait for a question
            assert mine.keys is None
            continue
        assert torch.equal(mine.keys, theirs.keys) and torch.equal(mine.values, theirs.values)
    # Equal numbers elsewhere in memory may be added up in another order.
    logits = [first_logits(member, own_processor, each) for each in (loaded, video)]
    torch.testing.assert_close(*logits, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("cuts", [[9], [3, 4, 14], [1, 2, 3, 5, 22]])
def test_growing_equals_encoding_at_once(member, tokenizer, own_processor, tmp_path, cuts):
    member.config.vision_chunk_frames = 8
    frames, times = video_of(2, 23)
    expected = member.encode_video(frames, tokenizer, timestamps=times)
    first, *rest = cuts
    grown = member.encode_video(frames[:first], tokenizer, timestamps=times[:first])
    for number, (start, stop) in enumerate(zip(cuts, [*rest, 23], strict=True)):
        if number == 1:  # also through a file
            grown.save(tmp_path / "grown.videoxl")
            grown = member.load_video(tmp_path / "grown.videoxl", tokenizer)
        grown.append(frames[start:stop], times[start:stop])
    assert torch.equal(grown.input_ids, expected.input_ids) and grown.layout == expected.layout
    assert grown.nbytes == expected.nbytes and grown.timestamps == expected.timestamps
    assert torch.allclose(
        first_logits(member, own_processor, grown), first_logits(member, own_processor, expected), atol=TOLERANCE
    )


def test_size_of_vision_chunks_does_not_matter(member, tokenizer, own_processor, monkeypatch):
    frames, times = video_of(3, 21)
    logits, package = [], type(member).__module__.rpartition(".")[0]
    for size, cached in ((1, 2**22), (6, 2**22), (64, 2**22), (64, 1)):
        member.config.vision_chunk_frames = size
        monkeypatch.setattr(sys.modules[f"{package}.vision_videoxl"], "CPU_CACHE_BYTES", cached)
        video = member.encode_video(frames, tokenizer, timestamps=times)
        logits.append(first_logits(member, own_processor, video))
    for other in logits[1:]:
        assert torch.allclose(logits[0], other, atol=TOLERANCE)


def test_padded_batches_several_videos_and_beams(member, inputs):
    videos = [video_of(4, 9), video_of(5, 6)]
    singles = [inputs(videos[0], text="What happens in this video?"), inputs(videos[1])]
    together = inputs(*videos)
    with torch.no_grad():
        expected = [member(**single, logits_to_keep=1).logits[0, -1] for single in singles]
        width = max(single["input_ids"].shape[1] for single in singles)
        ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        for row, single in enumerate(singles):
            length = single["input_ids"].shape[1]
            ids[row, width - length :], mask[row, width - length :] = single["input_ids"][0], 1
        pixels = [single["pixel_values_videos"][0] for single in singles]
        batch = {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels}
        rows = member(**batch, logits_to_keep=1).logits[:, -1]
    assert torch.allclose(rows, torch.stack(expected), atol=TOLERANCE)
    options = {"do_sample": False, "max_new_tokens": 4}
    answers = [member.generate(**single, **options)[0, -4:].tolist() for single in singles]
    assert member.generate(**batch, **options)[:, -4:].tolist() == answers
    uncached = member.generate(**singles[1], **options, use_cache=False)
    assert uncached[0, -4:].tolist() == answers[1]
    beams = member.generate(**singles[1], **options, num_beams=2)
    assert torch.equal(beams, member.generate(**singles[1], **options, num_beams=2))
    both = member.generate(**together, **options)
    assert torch.equal(both, member.generate(**together, **options))


def test_a_second_video_is_seen(member, tokenizer, inputs, clips):
    first, second, third = video_of(4, 9), video_of(5, 6), video_of(6, 6)
    with torch.no_grad():
        logits = [member(**inputs(first, other), logits_to_keep=1).logits for other in (second, third)]
    assert (logits[0] - logits[1]).abs().max() > 100 * TOLERANCE
    _, history = member.chat(clips[0], tokenizer, QUESTION, **GREEDY, **ONE_PER_SECOND)
    answer, grown = member.chat(clips[1], tokenizer, "And this?", chat_history=history, **GREEDY, **ONE_PER_SECOND)
    assert len(grown[2]["content"][0]["video"].layout.videos) == 2
    assert answer == member.chat(
        clips[1], tokenizer, "And this?", chat_history=history, return_history=False, **GREEDY, **ONE_PER_SECOND
    )


def test_images_in_chat_files_and_mixed_with_videos(member, tokenizer, own_processor, clips, tmp_path):
    question = "Please say what you see."
    picture = Image.fromarray(frames_of(9, 1)[0].numpy())
    picture.resize((150, 50)).save(tmp_path / "photo.png")
    photo = {"type": "image", "image": str(tmp_path / "photo.png")}
    clip = {"type": "video", "video": clips[0]}
    for content in ([photo], [clip, photo], [photo, clip, photo]):
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = own_processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            **ONE_PER_SECOND,
        )  # fmt: skip
        output = member.generate(**inputs, **GREEDY["generation_config"])[0, inputs["input_ids"].shape[1] :]
        answer = ask(member, tokenizer, content, question, **ONE_PER_SECOND)
        assert answer == own_processor.decode(output, skip_special_tokens=True).strip()
    image = member.encode_video(photo["image"], tokenizer)
    image.save(tmp_path / "photo.videoxl")
    loaded = member.load_video(tmp_path / "photo.videoxl", tokenizer)
    answers = [ask(member, tokenizer, each, question) for each in (loaded, image, photo["image"])]
    assert answers[0] == answers[1] == answers[2]


def test_a_loss_reaches_every_part(member, inputs):
    prompt = inputs(video_of(6, 9))
    labels = prompt["input_ids"].clone()
    if member.config.mm_llm_compress:
        with pytest.raises(ValueError, match="labels cannot be used with mm_llm_compress"):
            member(**prompt, labels=labels)
        member.config.mm_llm_compress = False
    loss = member(**prompt, labels=labels).loss
    assert torch.isfinite(loss)
    member.zero_grad()
    loss.backward()
    wanted = ["multi_modal_projector.linear_1.weight", "q_proj.weight"]
    wanted += ["beacon_k_proj.weight", "beacon_embed_tokens.weight"] if member.config.beacon_window else []
    wanted += ["text_projection.weight"] if member.config.token_selector else []
    for name in wanted:
        found = [p.grad for key, p in member.named_parameters() if key.endswith(name) and "vision" not in key]
        assert found and any(grad is not None and grad.abs().sum() > 0 for grad in found), name
    member.zero_grad(set_to_none=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_under_inference_mode(member, tokenizer, clips, dtype):
    half = copy.deepcopy(member).to(dtype)
    with torch.inference_mode():
        video = half.encode_video(clips[0], tokenizer, **ONE_PER_SECOND)
    assert isinstance(ask(half, tokenizer, video), str)
    with torch.inference_mode():
        assert ask(half, tokenizer, video) == ask(half, tokenizer, video)
    assert video.nbytes == member.encode_video(clips[0], tokenizer, **ONE_PER_SECOND).nbytes // 2


def test_sparse_attention_is_refused_with_the_way_out(member, tokenizer, inputs):
    if not (member.config.beacon_window or member.config.token_selector):
        pytest.skip("this member keeps all visual tokens, so sparse attention works with it")
    prompt = inputs(video_of(7, 5))
    for settings in ({"prefill": "streaming"}, {"decode": "bilevel"}, {"offload": True}):
        member.config.sparse_attention = settings
        with pytest.raises(ValueError, match="sparse_attention at its defaults only"):
            member(**prompt)
    member.config.sparse_attention = {}
    if member.config.beacon_window and not member.config.token_selector:
        member.config.beacon_ratio = "none"
        with torch.no_grad():
            dense = member(**prompt, logits_to_keep=1).logits
            member.config.sparse_attention = {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1}
            assert not torch.allclose(member(**prompt, logits_to_keep=1).logits, dense)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beacon_ratio": 0}, "whole number of at least 1"),
        ({"beacon_ratio": []}, "whole number of at least 1"),
        ({"beacon_ratio": [2, "4"]}, "whole number of at least 1"),
        ({"beacon_ratio": [5, 7]}, "none of beacon_ratio=.5, 7. divides a window"),
        ({"beacon_ratio_mix": "adapt-1024"}, "beacon_ratio_mix must be one of"),
        ({"keep_ratio": 0.0}, "keep_ratio must be"),
        ({"keep_ratio": 1.5}, "keep_ratio must be"),
        ({"frame_padding": "first"}, "frame_padding must be"),
    ],
)
def test_settings_out_of_range(member, inputs, settings, message):
    name = next(iter(settings))
    if name.startswith("beacon") and not member.config.beacon_window:
        pytest.skip("this member has no beacons")
    if name.startswith("keep") and not member.config.token_selector:
        pytest.skip("this member has no token selector")
    if settings.get("beacon_ratio") == [5, 7] and member.config.token_selector:
        pytest.skip("the selector's number of tokens is another one")
    if name == "beacon_ratio_mix":
        member.config.beacon_ratio = [2, 4]
    member.config.__dict__.update(settings)
    with pytest.raises(ValueError, match=message):
        member(**inputs(video_of(7, 5)))


def test_random_padding_is_for_whole_videos(member, tokenizer):
    member.config.frame_padding = "random"
    with pytest.raises(ValueError, match="for forward and generate"):
        member.encode_video(frames_of(1, 5), tokenizer, timestamps=[0.0, 1.0, 2.0, 3.0, 4.0])


def test_ratios_change_what_is_kept_and_nothing_else(family_models, tokenizer, clips):
    from conftest import _undone

    with _undone(family_models["videoxl1"]) as model:
        sizes = {}
        for ratio in ("none", 3, 9, [3, 9]):
            model.config.beacon_ratio = ratio
            video = model.encode_video(clips[0], tokenizer, **ONE_PER_SECOND)
            sizes[str(ratio)] = video.cache.layers[0].held - len(video.layout.non_visual)
            model.config.beacon_ratio = 1  # an encoded video keeps its own
            assert ask(model, tokenizer, video)
        visual = video.num_visual_tokens
        assert sizes["none"] == visual and sizes["3"] == visual // 3 and sizes["9"] == visual // 9
        assert sizes["9"] <= sizes["[3, 9]"] <= sizes["3"]


def test_timestamps_of_many_hours(family_models, tokenizer):
    from conftest import _undone

    with _undone(family_models["videoxlpro"]) as model:
        frames = frames_of(8, 16)
        times = [9990.0 + 2 * number for number in range(16)]  # a digit more from the second group on
        video = model.encode_video(frames, tokenizer, timestamps=times)
        stamps = [group.visual_start - group.start for group in video.layout.groups]
        assert len(set(stamps)) == 2
        model.config.keep_ratio = 0.9
        assert ask(model, tokenizer, video) == ask(model, tokenizer, video)
        cache = video.question_cache()
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]), past_key_values=cache)
        kept = int(4 * 9 * 0.9) // 16 * 16
        assert cache.layers[0].held == len(video.layout.non_visual) + kept + 3
