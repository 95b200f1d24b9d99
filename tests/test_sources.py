"""What is taken wherever a path is: addresses, bytes, open files; and lists of frame files as videos."""

import base64
import copy
import io
import json
import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from videoxl import video_decoding_videoxl
from videoxl.messages_videoxl import is_image, read_source
from videoxl.video_processing_videoxl import open_video

SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}
COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 40), (40, 220, 220)]


class Pipe:
    """An open file that cannot be sought in and gives less than is asked for, as a download or a pipe does."""

    def __init__(self, content):
        self._left = io.BytesIO(content)

    def read(self, count=-1):
        return self._left.read(min(count, 5000))


def encoded(content, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# Every way to give a file, from its path.
FORMS = {
    "path": str,
    "Path": Path,
    "file address": lambda path: Path(path).resolve().as_uri(),
    "file address with a host": lambda path: f"FILE://localhost{path}",
    "file address without slashes": lambda path: f"file:{path}",
    "data address": lambda path: encoded(Path(path).read_bytes()),
    "data address of another kind": lambda path: encoded(Path(path).read_bytes(), "application/octet-stream"),
    "data address in lines": lambda path: (
        "Data:video/mp4;name=a;BASE64,\n" + base64.encodebytes(Path(path).read_bytes()).decode()
    ),
    "data address without padding": lambda path: encoded(Path(path).read_bytes()).rstrip("="),
    "bytes": lambda path: Path(path).read_bytes(),
    "bytearray": lambda path: bytearray(Path(path).read_bytes()),
    "memoryview": lambda path: memoryview(Path(path).read_bytes()),
    "BytesIO": lambda path: io.BytesIO(Path(path).read_bytes()),
    "BytesIO at its end": lambda path: (file := io.BytesIO(), file.write(Path(path).read_bytes()))[0],
    "open file": lambda path: open(path, "rb"),  # noqa: SIM115
    "data address behind blanks": lambda path: "\n " + encoded(Path(path).read_bytes()),
    "pipe": lambda path: Pipe(Path(path).read_bytes()),
}


@pytest.fixture
def clip(clips, tmp_path):
    """A video whose name has to be escaped in an address."""
    path = tmp_path / "a film, 50%20 #1.mp4"
    shutil.copyfile(clips[0], path)
    return str(path)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "ein Bild.png"
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture
def frames(tmp_path):
    """Files of five frames of one color each, in an order of their own."""
    folder = tmp_path / "frames"
    folder.mkdir()
    paths = [
        str(folder / f"{name}.{end}") for name, end in zip("zbxay", ("png", "jpg", "webp", "png", "bmp"), strict=True)
    ]
    for path, color in zip(paths, COLORS, strict=True):
        Image.new("RGB", (40, 30), color).save(path)
    return paths


def prepare(processor, item, **options):
    messages = [{"role": "user", "content": [item, {"type": "text", "text": "What?"}]}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)


def same_pixels(first, second):
    first, second = (batch["pixel_values_videos"] for batch in (first, second))
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("form", FORMS)
def test_a_video_in_every_form(model, tokenizer, processor, clip, form):
    expected = model.encode_video(clip, tokenizer)
    video = model.encode_video(FORMS[form](clip), tokenizer)
    assert video.timestamps == expected.timestamps and video.duration == expected.duration
    assert torch.equal(video.cache.layers[0].keys, expected.cache.layers[0].keys)
    assert str(video) in ("", clip)
    named = prepare(processor, {"type": "video", "video": clip})
    for item in ({"type": "video", "url": FORMS[form](clip)}, {"type": "video_url", "video_url": FORMS[form](clip)},
                 {"type": "video_url", "video_url": {"url": FORMS[form](clip)}}):  # fmt: skip
        found = prepare(processor, item)
        assert torch.equal(found["input_ids"], named["input_ids"]) and same_pixels(found, named)
    text = processor.render([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}])
    assert same_pixels(processor(text, videos=FORMS[form](clip)), named)
    assert same_pixels(processor(text, videos=[FORMS[form](clip)]), named)


@pytest.mark.parametrize("form", FORMS)
def test_an_image_in_every_form(model, tokenizer, processor, photo, form):
    expected = model.encode_video(photo, tokenizer)
    image = model.encode_video(FORMS[form](photo), tokenizer)
    assert image.kind == "image"
    assert torch.equal(image.cache.layers[0].keys, expected.cache.layers[0].keys)
    named = prepare(processor, {"type": "image", "image": photo})
    url = {"url": FORMS[form](photo), "detail": "high"}
    for item in ({"type": "image_url", "image_url": url}, {"type": "image", "image": FORMS[form](photo)}):
        assert same_pixels(prepare(processor, item), named)
    text = processor.render([{"role": "user", "content": [{"type": "image"}]}])
    assert same_pixels(
        processor(text, images=FORMS[form](photo)), prepare(processor, {"type": "image", "path": photo})
    )


def test_contents_decide_what_bytes_are(photo, clip, tmp_path):
    image = Image.open(photo)
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP"):
        image.save(file := io.BytesIO(), kind)
        assert is_image(read_source(file)), kind
    image.save(file := io.BytesIO(), "GIF")
    assert not is_image(read_source(file)) and not is_image(read_source(Path(clip).read_bytes()))


def test_frames_of_other_kinds_of_files(processor, test_data):
    """Containers that FFmpeg seeks in or reads in order, damage and edit lists: from memory as from the disk."""
    for path in (
        sorted((test_data / "data" / "field").glob("*.m*")) + sorted((test_data / "data" / "videos").glob("*"))[:12]
    ):
        if path.is_dir() or path.suffix in (".md", ".json", ".txt"):
            continue
        named = prepare(processor, {"type": "video", "video": str(path), "num_frames": 8})
        given = prepare(processor, {"type": "video", "video": path.read_bytes(), "num_frames": 8})
        assert torch.equal(named["input_ids"], given["input_ids"]) and same_pixels(named, given), path


def test_open_files_are_left_where_they_were(model, tokenizer, clip):
    with open(clip, "rb") as file:
        file.seek(7)
        model.encode_video(file, tokenizer)
        assert file.tell() == 7 and not file.closed


def test_later_turns_reuse_what_came_without_a_path(model, tokenizer, clip, frames, caplog):
    content = Path(clip).read_bytes()
    for source, again in ((content, encoded(content)), (frames, tuple(frames)), (io.BytesIO(content), content)):
        _, history = model.chat(source, tokenizer, "What?", generation_config=SHORT)
        video = history[0]["content"][0]["video"]
        for visual in (again, None, video):
            _, later = model.chat(visual, tokenizer, "And then?", history, generation_config=SHORT)
            assert [part["video"] for message in later for part in message["content"] if isinstance(part, dict)
                    and part["type"] == "video"] == [video]  # fmt: skip
            assert later[0]["content"][0]["video"] is video
        # Through JSON it is lost, and comes again.
        lost = json.loads(json.dumps(history))
        answer, later = model.chat(again, tokenizer, "And then?", lost, generation_config=SHORT)
        assert later[0]["content"][0]["video"].timestamps == video.timestamps
        with pytest.raises(ValueError, match="has no path"):
            model.chat(None, tokenizer, "And then?", lost, generation_config=SHORT)
    other = bytearray(content)
    other[-1] ^= 1
    _, later = model.chat(other, tokenizer, "And this?", history, generation_config=SHORT)
    assert len(later[-2]["content"]) == 2


def test_a_video_from_memory_is_saved_for_good(model, tokenizer, clip, tmp_path):
    video = model.encode_video(Path(clip).read_bytes(), tokenizer)
    video.save(tmp_path / "v.videoxl")
    assert model.load_video(tmp_path / "v.videoxl").timestamps == video.timestamps


# ---------------------------------------------------------------- refusals


def test_too_much_is_refused_before_it_is_decoded(model, tokenizer, processor, clip, monkeypatch):
    content = Path(clip).read_bytes()
    model.config.max_source_bytes = len(content)
    assert model.encode_video(content, tokenizer).num_frames
    model.config.max_source_bytes = len(content) - 1
    monkeypatch.setattr(base64, "b64decode", None)  # is not reached
    for form in ("bytes", "bytearray", "BytesIO", "open file", "pipe", "data address", "data address in lines"):
        with pytest.raises(ValueError, match=rf"{len(content):,} bytes came, at most {len(content) - 1:,}"):
            model.encode_video(FORMS[form](clip), tokenizer)
    processor = copy.deepcopy(processor)
    processor.max_source_bytes = 1000
    with pytest.raises(ValueError, match=r"at most 1,000 are taken"):
        prepare(processor, {"type": "video_url", "video_url": {"url": encoded(content)}})
    assert model.encode_video(clip, tokenizer).num_frames  # of a path it says nothing


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("data:video/mp4,SECRET", "must be data:video/mp4;base64"),
        ("data:" + "SECRET" * 99, "must be data:video/mp4;base64"),
        ("data:video/mp4;base64,SECRET*" + "SECRET" * 99, "no valid base64"),
        ("data:video/mp4;base64,SECRETS-_" * 9, "no valid base64"),
        (encoded(b"SECRET" * 99), "from memory: expected a video file"),
        (b"SECRET" * 99, "from memory: expected a video file"),
        (b"", "from memory is empty"),
        (b"#EXTM3U\nfile:///etc/passwd", "found a playlist"),
        (io.StringIO("SECRET"), "binary mode"),
        ([b"SECRET"] * 3, "several videos are a list of"),
        (base64.b64encode(b"SECRET" * 999).decode(), "letters is no path; if it is base64"),
        ("file://elsewhere/SECRET.mp4", "no address of a file on this machine"),
        ("file:///no/such/film.mp4", "/no/such/film.mp4: no such"),
        ("https://example.com/a.mp4", "is an address; only local files are opened"),
        (["https://example.com/a.jpg", "b.jpg"], "is an address; only local files are opened"),
    ],
)
def test_what_is_refused_is_told_without_its_content(model, tokenizer, processor, source, says):
    for call in (
        lambda: model.encode_video(source, tokenizer),
        lambda: model.chat([{"type": "video", "video": source}], tokenizer, "What?"),
        lambda: prepare(processor, {"type": "video", "video": source}),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says) as raised:
            call()
        if "elsewhere" not in says and "machine" not in says:
            assert "SECRET" not in str(raised.value)
            assert raised.value.__cause__ is None or "SECRET" not in str(raised.value.__cause__)


def test_items_that_do_not_fit_are_told_without_their_content(model, tokenizer):
    for source in (encoded(b"SECRET" * 9), b"SECRET"):
        told = encoded(b"SECRET")[-7:]
        for item in ({"type": "movie", "video": source}, {"type": "video", "video": source, "path": "b"}):
            with pytest.raises(ValueError) as raised:
                model.chat([item], tokenizer, "What?")
            assert "SECRET" not in str(raised.value) and told not in str(raised.value)


def test_decord_reads_files_only(model, tokenizer, clip, monkeypatch):
    monkeypatch.setattr(video_decoding_videoxl, "decord", object())
    with pytest.raises(ValueError, match="decord.* reads local files only"):
        open_video(Path(clip).read_bytes(), size=32, backend="decord")


def test_media_dict_of_what_is_in_memory(model, tokenizer, clip):
    content = Path(clip).read_bytes()
    part = {"start": 1, "end": 3}
    named, given = (model.encode_video(source, tokenizer, media_dict=part) for source in (clip, content))
    assert given.timestamps == named.timestamps and given.start == named.start
    with pytest.raises(ValueError, match="no folder of pictures"):
        model.encode_video(content, tokenizer, media_dict={"video_read_type": "img"})


# ---------------------------------------------------------------- frame files


def test_frame_files_are_the_frames(model, tokenizer, processor, frames):
    times = [0.0, 1.5, 2.0, 4.0, 8.0]
    pictures = [Image.open(path).convert("RGB") for path in frames]
    expected = model.encode_video(pictures, tokenizer, timestamps=times)
    for source in (frames, [Path(path) for path in frames], [Path(path).as_uri() for path in frames],
                   [Path(path).read_bytes() for path in frames], [encoded(Path(path).read_bytes()) for path in frames],
                   [frames[0], pictures[1], *frames[2:]]):  # fmt: skip
        video = model.encode_video(source, tokenizer, timestamps=times)
        assert video.timestamps == times and video.duration == expected.duration
        assert torch.equal(video.cache.layers[0].keys, expected.cache.layers[0].keys)
        item = {"type": "video", "video": source, "timestamps": times}
        named = prepare(processor, {**item, "video": pictures})
        assert same_pixels(prepare(processor, item), named)
        text = processor.render([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}])
        for videos in (source, [source], [[source]]):
            assert same_pixels(processor(text, videos=videos, timestamps=times), named)


def test_the_rate_of_frame_files_is_what_the_item_says(model, tokenizer, processor, frames, caplog):
    with caplog.at_level(logging.WARNING):
        item = {"type": "video", "video": frames, "fps": 4}
        video = model.chat([item], tokenizer, "What?", generation_config=SHORT)[1][0]["content"][0]["video"]
    assert video.timestamps == [0.0, 0.25, 0.5, 0.75, 1.0] and "timestamps" not in caplog.text
    few = prepare(processor, {"type": "video", "video": frames, "num_frames": 3})
    named = prepare(processor, {"type": "video", "video": frames[::2], "timestamps": [0, 2, 4]})
    assert torch.equal(few["input_ids"], named["input_ids"]) and same_pixels(few, named)


def test_frame_files_come_late(model, tokenizer, tmp_path):
    """One after the other, so a long list takes no more memory than a short one; but none is missing at the start."""
    paths = [tmp_path / f"{number}.png" for number in range(40)]
    for path in paths:
        Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(FileNotFoundError, match="nowhere.png: no such image file"):
        model.encode_video([*paths, "nowhere.png"], tokenizer)
    paths[30].write_bytes(b"no image")
    with pytest.raises(ValueError, match="30.png is no image that can be read"):
        model.encode_video(paths, tokenizer)


def test_frame_files_are_appended(model, tokenizer, frames):
    times = [0.0, 1.0, 2.0, 3.0, 4.0]
    grown = model.encode_video(frames[:2], tokenizer, timestamps=times[:2])
    grown.append(frames[2:], times[2:])
    whole = model.encode_video(frames, tokenizer, timestamps=times)
    assert torch.equal(grown.cache.layers[0].keys, whole.cache.layers[0].keys)


def test_other_lists_of_paths_are_no_video(model, tokenizer, processor, clip, frames):
    for paths in ([clip, clip], [frames[0], clip]):
        with pytest.raises(ValueError, match="several videos are a list of"):
            model.chat(paths, tokenizer, "What?")
    text = processor.render([{"role": "user", "content": [{"type": "video"}, {"type": "video"}]}])
    assert len(processor(text, videos=[clip, clip])["pixel_values_videos"]) == 2
    with tempfile.TemporaryDirectory() as folder, pytest.raises(ValueError, match="is a folder"):
        model.encode_video(folder, tokenizer)
