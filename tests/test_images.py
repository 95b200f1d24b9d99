"""Images: how they are cut, what the processor and the model make of them, and chat about one, several, and mixed."""

import contextlib
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from margins import beam_scores
from PIL import Image
from sampled import open_video
from videoxl.image_processing_videoxl import choose_grid, cut_tiles, load_image
from videoxl.messages_videoxl import is_image

SHORT = {"max_new_tokens": 6, "min_new_tokens": 6}


def picture(width=100, height=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def item(source, kind="image"):
    return {"type": kind, kind: source}


def user(*content):
    return [{"role": "user", "content": list(content)}]


def ask(text="What is this?"):
    return {"type": "text", "text": text}


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    picture(130, 40, seed=3).save(path)
    return str(path)


def prepare(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def generated(model, processor, messages, **kwargs):
    inputs = prepare(processor, messages, **kwargs)
    output = model.generate(**inputs, **SHORT)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# ---------------------------------------------------------------- cutting


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900))
def test_the_grid_is_the_published_choice(width, height):
    """The rule, step by step as it is published: more effective pixels win, then less waste, then the earlier one."""
    grids = [(48 * columns, 48 * rows) for columns in range(1, 7) for rows in range(1, 7)]
    best, most, least = None, 0, float("inf")
    for full_width, full_height in grids:
        scale = min(full_width / width, full_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        waste = full_width * full_height - effective
        if effective > most or (effective == most and waste < least):
            best, most, least = (full_width, full_height), effective, waste
    # An image so thin that no grid keeps a pixel of it has no published choice.
    assert best is None or choose_grid((width, height), grids) == best


@pytest.mark.parametrize(
    ("size", "grid"),
    [((48, 48), (1, 1)), ((20, 10), (1, 1)), ((96, 40), (2, 1)), ((100, 200), (3, 5)), ((900, 9), (6, 1))],
)
def test_tiles_are_the_fitted_image_row_by_row(size, grid):
    image, (columns, rows) = picture(*size), grid
    tiles = cut_tiles(image, 48)
    assert tiles.shape == (columns * rows, 3, 48, 48) and tiles.dtype == torch.uint8
    whole = torch.cat(
        [torch.cat(list(tiles[row * columns : (row + 1) * columns]), dim=2) for row in range(rows)], dim=1
    )
    scale = min(48 * columns / size[0], 48 * rows / size[1])
    width, height = min(math.ceil(size[0] * scale), 48 * columns), min(math.ceil(size[1] * scale), 48 * rows)
    left, top = (48 * columns - width) // 2, (48 * rows - height) // 2
    expected = np.zeros((48 * rows, 48 * columns, 3), dtype=np.uint8)
    expected[top : top + height, left : left + width] = np.array(
        image.resize((width, height), Image.Resampling.BICUBIC)
    )
    assert torch.equal(whole, torch.from_numpy(expected).permute(2, 0, 1))


def test_an_exact_quotient_gets_the_published_pixel_more():
    """75 x 150 on 336 x 336: 336 / 150 in floating point times 75 is above 168, and is rounded up to 169."""
    assert 75 * (336 / 150) > 168
    (tile,) = cut_tiles(Image.new("RGB", (75, 150), (255, 255, 255)), 336, [(336, 336)])
    columns = (tile[0].amax(dim=0) > 0).sum().item()
    assert columns == 169


def test_named_grids_and_wrong_ones():
    assert len(cut_tiles(picture(300, 300), 48, [(48, 96), (96, 96)])) == 4
    for wrong in ([(50, 48)], [(48,)], [(0, 48)]):
        with pytest.raises(ValueError, match="multiples of 48"):
            cut_tiles(picture(), 48, wrong)


def test_what_is_an_image(tmp_path, photo, clips):
    assert is_image(photo) and is_image("a.JPG") and is_image(picture()) and is_image(np.zeros((4, 5, 3), np.uint8))
    assert not any(map(is_image, (clips[0], "a.gif", [picture()], np.zeros((2, 4, 5, 3), np.uint8), None)))
    array = np.array(picture())
    for same in (array, torch.from_numpy(array), picture()):
        assert np.array_equal(np.array(load_image(same)), array)
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture(64, 32).save(turned, exif=exif)
    assert load_image(str(turned)).size == (32, 64)
    assert load_image(Image.new("LA", (3, 4))).mode == "RGB"


def test_what_is_no_image(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    for source, error, found in (
        (tmp_path / "text.png", ValueError, "no image that can be read"),
        (tmp_path / "cut.png", ValueError, "no image that can be read"),
        (tmp_path / "none.png", FileNotFoundError, "no such image"),
        ("https://example.org/a.png", ValueError, "only local files"),
        ("data:image/png;base64,AAAA", ValueError, "only local files"),
        (np.zeros((4, 4, 2), np.float32), ValueError, "uint8"),
        (np.zeros((4, 4, 3), np.complex64), ValueError, "uint8"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "pixels"),
        (7, ValueError, "an image must be"),
    ):
        with pytest.raises(error, match=found):
            load_image(source)


def test_a_huge_image_is_refused_with_what_to_do(tmp_path, processor, photo, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 130 * 40 // 4)
    folder = tmp_path / "frames"
    folder.mkdir()
    picture(130, 40).save(folder / "frame_1.png")
    for read in (
        lambda: load_image(photo),
        lambda: prepare(processor, user(item(photo), ask())),
        lambda: list(open_video(folder, size=8, read_as="folder")),
    ):
        with pytest.raises(ValueError, match="png is too large .* save it smaller"):
            read()


def test_a_program_that_looks_like_an_image_is_not_run(tmp_path):
    picture(20, 20).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is no image .*program"):
        load_image(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore")  # PIL's, about what it reads all the same
@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "tif", "gif"])
def test_broken_files_and_objects_raise_only_value_errors(tmp_path, suffix):
    """Of each format cut and spoiled copies: read, or refused by name; from its path, as an object, as a frame."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    whole = tmp_path / f"whole.{suffix}"
    picture(40, 30).save(whole, **({"exif": exif} if suffix in ("png", "jpg", "webp", "tif") else {}))
    data, random, refused = whole.read_bytes(), np.random.default_rng(0), 0
    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(60):
        spoiled = bytearray(data[: random.integers(len(data))] if number % 3 == 0 else data)
        early = min(len(spoiled), 200) if number % 3 == 1 else len(spoiled)
        for place in random.integers(early, size=4 if early else 0):
            spoiled[place] = random.integers(256)
        path = folder / (f"frame_1.{suffix}" if suffix in ("png", "jpg") else "frame_1.png")
        path.write_bytes(spoiled)
        readers = [lambda path=path: load_image(path)]
        readers.append(lambda: list(open_video(folder, size=8, read_as="folder")))
        with contextlib.suppress(Exception):
            opened = [Image.open(path), Image.open(path)]
            readers.append(lambda opened=opened: load_image(opened[0]))
            readers.append(lambda opened=opened: list(open_video([opened[1]], size=8, timestamps=[0])))
        said = [text for text in map(_refusal, readers) if text]
        assert all("frame_1" in text or "Expected" in text or "pixels" in text for text in said)
        refused += len(said)
    assert refused > 10


def _refusal(read):
    try:
        read()
    except ValueError as error:
        return str(error)


def test_broken_gifs_raise_only_value_errors(tmp_path):
    frames = [picture(40, 30, seed) for seed in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=100)
    data, random = (tmp_path / "a.gif").read_bytes(), np.random.default_rng(0)
    for number in range(40):
        spoiled = bytearray(data[: random.integers(len(data))] if number % 2 else data)
        for place in random.integers(len(spoiled), size=8) if spoiled else ():
            spoiled[place] = random.integers(256)
        (tmp_path / "a.gif").write_bytes(spoiled)
        with contextlib.suppress(ValueError):
            list(open_video(tmp_path / "a.gif", size=8, read_as="gif"))


# ---------------------------------------------------------------- processor


def test_an_image_is_its_tiles_without_times(processor, photo):
    inputs = prepare(processor, user(item(photo), ask()))
    tiles = cut_tiles(load_image(photo), processor.image_size)
    (pixels,) = inputs["pixel_values_videos"]
    assert pixels.shape == (len(tiles), 1, *tiles.shape[1:]) and len(tiles) > 1
    torch.testing.assert_close(pixels[:, 0], (tiles / 255 - 0.5) / 0.5)
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.video_token_id) == len(tiles) * processor.tokens_per_group
    text = processor.decode(ids)
    assert "Time" not in text and processor.image_token not in text
    assert f"user\n{processor.video_token}" in text and f"{processor.video_token}\nWhat" in text


def test_order_of_images_and_videos(processor, clips, photo):
    frames = [picture(seed=number) for number in range(3)]
    video = {"type": "video", "video": frames, "timestamps": [0.0, 1.0, 2.0]}
    inputs = prepare(processor, user(item(photo), ask("a"), video, ask("b"), item(frames[0]), ask("c")))
    shapes = [tuple(pixels.shape[:-3]) for pixels in inputs["pixel_values_videos"]]
    assert shapes == [(3, 1), (3,), (6, 1)]
    rendered = processor.apply_chat_template(user(item(photo), item(clips[0], "video"), ask()))
    assert rendered.index(processor.image_token) < rendered.index(processor.video_token)
    # Clients that render and call in two steps pass images and videos apart.
    both = processor(rendered, images=photo, videos=clips[0], max_num_frames=4)
    nested = processor([rendered], images=[[photo]], videos=[[clips[0]]], max_num_frames=4)
    assert nested["input_ids"] == both["input_ids"]
    assert all(map(torch.equal, nested["pixel_values_videos"], both["pixel_values_videos"]))
    assert [pixels.ndim for pixels in both["pixel_values_videos"]] == [5, 4]
    for arguments, found in (
        ({"images": [photo, photo], "videos": clips[0]}, "1 image markers .* 2 images"),
        ({"videos": clips[0]}, "1 image markers .* 0 images"),
        ({"images": {"image": photo, "size": 3}, "videos": clips[0]}, "an image item takes"),
        ({"images": {"path": None}, "videos": clips[0]}, "an image item takes"),
    ):
        with pytest.raises(ValueError, match=found):
            processor(rendered, **arguments)


@pytest.mark.parametrize("form", [np.asarray, lambda pixels: torch.from_numpy(pixels.copy())], ids=["array", "tensor"])
def test_pixels_are_never_asked_for_their_truth_value(processor, clips, photo, form):
    """Images, frames and settings as arrays and tensors, in every argument that takes them."""
    image, frames = form(np.array(Image.open(photo))), form(np.stack([picture(seed=number) for number in range(3)]))
    rendered = processor.apply_chat_template(user(item(photo), item(clips[0], "video"), ask()))
    expected = processor(rendered, images=photo, videos=frames, timestamps=[0, 1, 2])
    times = form(np.array([0.0, 1.0, 2.0]))
    for images, videos, timestamps in (
        (image, frames, times),
        ([image], [frames], [times]),
        ([[image]], [[list(frames)]], times),
        ({"image": image}, {"video": frames, "timestamps": times}, None),
    ):
        given = processor(rendered, images=images, videos=videos, timestamps=timestamps)
        assert given["input_ids"] == expected["input_ids"]
        assert all(map(torch.equal, given["pixel_values_videos"], expected["pixel_values_videos"]))
    two = processor.apply_chat_template(user(item(photo), item(photo), ask()))
    alike = processor(two, images=[image, image])["pixel_values_videos"]
    assert isinstance(alike, list) and torch.equal(*alike)
    with pytest.raises(ValueError, match="sample_fps must be"):
        processor(rendered, images=photo, videos=clips[0], sample_fps=form(np.ones(2)))
    with pytest.raises(ValueError, match="text must be"):
        processor(form(np.zeros(2)))


def test_frames_of_unequal_sizes_are_one_video_a_text(processor):
    frames = [picture(*size) for size in ((8, 6), (6, 8))]
    rendered = processor.apply_chat_template(user(item("a.mp4", "video"), ask()))
    nested, flat = (processor(rendered, videos=videos, timestamps=[0, 1]) for videos in ([[frames]], frames))
    assert torch.equal(nested["pixel_values_videos"], flat["pixel_values_videos"])


# ---------------------------------------------------------------- model


def test_a_tile_is_a_group_of_equal_frames(model, processor, photo):
    tiles = prepare(processor, user(item(photo)))["pixel_values_videos"][0]
    repeated = tiles.flatten(0, 1).repeat_interleave(4, dim=0)
    video = torch.randn(6, 3, 48, 48)
    with torch.no_grad():
        image = model.get_video_features([tiles]).pooler_output[0]
        as_video = model.get_video_features(repeated[None]).pooler_output[0]
        mixed = model.get_video_features([tiles, video, tiles[:1]], output_tower_features=True)
        model.config.vision_chunk_frames = 4
        in_parts = model.get_video_features([tiles.repeat(3, 1, 1, 1, 1), video]).pooler_output
    torch.testing.assert_close(image, as_video, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(mixed.pooler_output[0], image, atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(mixed.pooler_output[2], image[:1], atol=1e-2, rtol=1e-3)
    torch.testing.assert_close(in_parts[0], image.repeat(3, 1, 1), atol=1e-2, rtol=1e-3)
    assert [len(part) for part in mixed.pooler_output] == [len(tiles), 2, 1]
    assert [len(part) for part in mixed.tower_features] == [len(tiles), 6, 1]
    for wrong in (tiles[None], tiles.transpose(0, 1), tiles[:0]):
        with pytest.raises(ValueError, match=r"an image \[tiles, 1"):
            model.get_video_features([wrong])


@pytest.mark.parametrize(
    "plan",
    [
        {},
        {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1},
        {"prefill": "mask", "chunk_groups": 2, "window_chunks": 1},
        {"prefill": "streaming", "chunk_groups": 1, "window_chunks": 1, "decode": "bilevel", "decode_chunk_groups": 1},
    ],
)
def test_chat_is_generate_on_the_processors_prompt(model, tokenizer, processor, clips, photo, plan):
    model.config.sparse_attention = plan
    # "Time" and ":" in front of an image are no timestamp: under a sparse plan that would hide the first video.
    content = [item(clips[0], "video"), ask("Time to compare. Look at this:"), item(photo), item(picture(200, 40))]
    answer = model.chat(
        content, tokenizer, "What is it?", return_history=False, max_num_frames=20, generation_config=SHORT
    )
    assert answer == generated(model, processor, user(*content, ask("What is it?")), max_num_frames=20)
    with torch.no_grad():
        inputs = prepare(processor, user(*content, ask("What is it?")), max_num_frames=20)
        cached = model(**inputs, logits_to_keep=3).logits
        at_once = model(**inputs, logits_to_keep=3, use_cache=False).logits
    torch.testing.assert_close(cached, at_once, atol=3e-4, rtol=0)


def test_beams_and_batches_with_images(model, processor, clips, photo):
    single = [user(item(photo), ask()), user(item(clips[0], "video"), item(picture()), ask("And this?"))]
    inputs = prepare(processor, single, padding=True, max_num_frames=8)
    batched = model.generate(**inputs, **SHORT)[:, inputs["input_ids"].shape[1] :]
    for row, messages in zip(batched, single, strict=True):
        alone = prepare(processor, messages, max_num_frames=8)
        assert row.tolist() == model.generate(**alone, **SHORT)[0, alone["input_ids"].shape[1] :].tolist()
    scores = [beam_scores(model, **inputs, **SHORT, num_beams=2, use_cache=cached) for cached in (True, False)]
    torch.testing.assert_close(*scores, atol=1e-3, rtol=0)


# ---------------------------------------------------------------- chat


def test_one_image_in_all_its_forms(model, tokenizer, processor, photo):
    array = np.array(Image.open(photo))
    expected = generated(model, processor, user(item(photo), ask()))
    for image in (photo, Image.open(photo), array, [item(photo)], item(photo), model.encode_video(photo, tokenizer)):
        assert model.chat(image, tokenizer, ask()["text"], return_history=False, generation_config=SHORT) == expected
    published = [
        {"role": "<|im_start|>user", "content": "<image>\nWhat is this?"},
        {"role": "<|im_start|>assistant", "content": "x"},
    ]
    ours = [*user(item(photo), ask()), {"role": "assistant", "content": "x"}]
    answers = [
        model.chat(photo, tokenizer, "And?", past, False, generation_config=SHORT) for past in (published, ours)
    ]
    assert answers[0] == answers[1]


def test_later_turns_reuse_images_and_add_new_ones(model, tokenizer, processor, clips, photo):
    from unittest.mock import patch

    settings = {"generation_config": SHORT, "max_num_frames": 8}
    memory = picture(seed=5)
    first, history = model.chat([item(photo), item(memory)], tokenizer, "What differs?", **settings)
    with patch.object(type(model), "get_video_features", side_effect=AssertionError("encoded again")):
        second, longer = model.chat(photo, tokenizer, "Why?", chat_history=history, **settings)
        assert model.chat(None, tokenizer, "Why?", chat_history=history, **settings)[0] == second
    third, last = model.chat(clips[0], tokenizer, "And in the clip?", chat_history=longer, **settings)
    turns = [
        *user(item(photo), item(memory), ask("What differs?")),
        {"role": "assistant", "content": first},
        *user(ask("Why?")),
        {"role": "assistant", "content": second},
        *user(item(clips[0], "video"), ask("And in the clip?")),
    ]
    assert third == generated(model, processor, turns, max_num_frames=8)
    assert [entry["type"] for entry in last[0]["content"]] == ["image", "image", "text"]
    # Through JSON: the file comes back by its path, what was in memory must be given again.
    written = json.loads(json.dumps(history))
    with pytest.raises(ValueError, match="does not survive JSON"):
        model.chat(None, tokenizer, "Why?", chat_history=written, **settings)
    assert model.chat(memory, tokenizer, "Why?", chat_history=written, **settings)[0] == second


def test_an_encoded_image_is_saved_and_asked_like_a_video(model, tokenizer, photo, tmp_path):
    image = model.encode_video(photo, tokenizer)
    assert (image.kind, image.num_frames, image.duration, str(image)) == ("image", 0, 0.0, photo)
    image.save(tmp_path / "photo.videoxl")
    loaded = model.load_video(tmp_path / "photo.videoxl", tokenizer)
    questions = ["What is this?", "Is it red?"]
    answers = model.chat_batch(loaded, tokenizer, questions, generation_config=SHORT)
    settings = {"return_history": False, "generation_config": SHORT}
    assert answers == [model.chat(image, tokenizer, question, **settings) for question in questions]
    with pytest.raises(ValueError, match="cannot be extended"):
        loaded.append([picture()], [1.0])
    picture(50, 50).save(photo)
    with pytest.raises(ValueError, match="does not fit"):
        model.load_video(tmp_path / "photo.videoxl", tokenizer)


def test_an_encoded_image_among_items_keeps_its_system_prompt(model, tokenizer, processor, clips, photo):
    image = model.encode_video(photo, tokenizer, system_prompt="Be brief.")
    items = [item(image, "image"), item(clips[0], "video")]
    settings = {"max_num_frames": 8, "generation_config": SHORT}
    answer, history = model.chat(items, tokenizer, "What is it?", **settings)
    messages = [{"role": "system", "content": "Be brief."}]
    messages += user(item(photo), item(clips[0], "video"), ask("What is it?"))
    assert answer == generated(model, processor, messages, max_num_frames=8)
    assert history[1]["content"][0]["image"] is image


@pytest.mark.ties  # no word is compared
def test_chunks_of_a_conversation_with_images(model, tokenizer, clips, photo):
    model.config.sparse_attention = {"decode": "bilevel", "decode_chunk_groups": 1}
    content = [item(clips[0], "video"), item(photo)]
    # A time in the question means the video, never a tile.
    _, chunks = model.chat(
        content, tokenizer, "What is at 0:04?", return_history=False, return_chunks=True, generation_config=SHORT
    )
    tiles = [chunk for chunk in chunks if chunk["video"] == 1]
    assert len(tiles) == 3 and {(chunk["start"], chunk["end"]) for chunk in tiles} == {(0.0, 0.0)}
    (named,) = (chunk for chunk in chunks if chunk["video"] == 0 and chunk["start"] <= 4 < chunk["end"])
    assert named["level"] == "dense"


@pytest.mark.parametrize(
    ("content", "options", "found"),
    [
        ([{"type": "audio", "audio": "a.wav"}], {}, "an item must be|item takes one of"),
        ([{"type": "image"}], {}, "an item must be|item takes one of"),
        ([{"type": "image", "image": "a.png", "timestamps": [0.0]}], {}, "an item must be|item takes one of"),
        ([{"type": "image", "image": picture()}, "clip.mp4"], {}, "an item must be|item takes one of"),
        (picture(), {"timestamps": [0.0]}, "timestamps belong to frames"),
    ],
)
def test_refused_items(model, tokenizer, content, options, found):
    with pytest.raises(ValueError, match=found):
        model.chat(content, tokenizer, "What?", **options)


def test_encode_video_takes_one(model, tokenizer):
    for several in ([item(picture()), item(picture())], [ask()], None):
        with pytest.raises(ValueError, match="one video .* or one image"):
            model.encode_video(several, tokenizer)


def test_frames_with_timestamps_as_an_item(model, tokenizer):
    frames, times = [picture(seed=number) for number in range(5)], [0.0, 0.5, 1.0, 3.0, 8.0]
    settings = {"return_history": False, "generation_config": SHORT}
    as_item = {"type": "video", "video": frames, "timestamps": times}
    plain = model.chat(frames, tokenizer, "What?", timestamps=times, **settings)
    assert model.chat([as_item], tokenizer, "What?", **settings) == plain
    assert as_item == {"type": "video", "video": frames, "timestamps": times}
    assert model.encode_video(as_item, tokenizer).timestamps == times


def test_a_plan_is_about_videos(model, photo):
    with pytest.raises(ValueError, match="this is an image"):
        model.plan(video_path=photo)
