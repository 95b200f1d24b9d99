"""Kinds of files that users have reported to other tools: every kind of damage and oddity, and its neighbours.

The shared clips are 64 x 64 and carry their number in two rows of eight bars, as the clips that are made here do.
"""

import io
import os
import re
import struct
import types
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from h264_fields import DELIMITER, fields
from PIL import Image, ImageOps
from sampled import choose_frames, open_video
from videoxl import image_processing_videoxl as ip
from videoxl import video_processing_videoxl as vp
from videoxl.image_processing_videoxl import load_image
from videoxl.messages_videoxl import is_image

EVERY_FRAME = {"max_num_frames": 10_000, "sample_fps": 1000, "max_sample_fps": None}


PIXELS = {"qtrle": "rgb24", "rpza": "rgb555le", "svq1": "yuv410p", "mjpeg": "yuvj420p"}


pytestmark = pytest.mark.usefixtures("warnings")


@pytest.fixture
def field(test_data):
    return test_data / "data" / "field"


def bars(number):
    """uint8 [64, 64]: the upper row of bars is the low byte of a number, the lowest bit at the left."""
    bits = np.array([number >> bit & 1 for bit in range(16)], np.uint8).reshape(2, 8)
    return (bits * 200 + 25).repeat(32, 0).repeat(8, 1)


def number_in(frame):
    size = frame.shape[-1]
    rows, columns = [size // 4, 3 * size // 4], [(2 * bar + 1) * size // 16 for bar in range(8)]
    bits = (frame[0][rows][:, columns] > 127).flatten().tolist()
    return sum(bit << place for place, bit in enumerate(bits))


def read(path, **options):
    """(numbers, seconds, duration) of every picture."""
    with open_video(str(path), size=64, **(options or EVERY_FRAME)) as video:
        batches = list(video)
    numbers = [number_in(frame) for batch in batches for frame in batch.frames]
    return numbers, [second for batch in batches for second in batch.timestamps], video.duration


def write(
    path, count=100, codec="libx264", rate=25, container=None, options=None, b_frames=2, keys=12, settings=None, flag=0
):
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=settings or {})
        stream.width = stream.height = 64
        stream.pix_fmt = {"qtrle": "rgb24", "rpza": "rgb555le", "svq1": "yuv410p", "mjpeg": "yuvj420p"}.get(
            codec, "yuv420p"
        )
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = b_frames, keys
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(bars(number), format="gray8")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            for packet in stream.encode(frame):
                packet.is_keyframe = packet.is_keyframe or (flag > 0 and number % flag == 0)
                output.mux(packet)
        output.mux(stream.encode())
    return path


# --- pictures without a time


@pytest.mark.parametrize("codec", ["libx264", "mpeg1video", "mpeg2video", "mpeg4"])
@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("container", ["vob", "mpeg"])
def test_pictures_of_programme_streams(tmp_path, warnings, codec, b_frames, container):
    """A pack of 2 kB holds dozens of small pictures and the time of one."""
    numbers, seconds, duration = read(write(tmp_path / "a.mpg", 100, codec, container=container, b_frames=b_frames))
    assert numbers == list(range(100))
    assert seconds == pytest.approx(np.arange(100) / 25, abs=0.003)
    assert duration == pytest.approx(4.0, abs=0.1)
    assert not warnings


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("pictures", [2, 3, 5])
def test_several_pictures_in_one_packet_of_a_transport_stream(tmp_path, warnings, b_frames, pictures):
    write(tmp_path / "a.mp4", 100, b_frames=b_frames)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "a.ts"), "w") as output:
        filtered = av.BitStreamFilterContext("h264_mp4toannexb", source.streams.video[0])
        stream = output.add_mux_stream("h264", rate=25, width=64, height=64)
        parts = [part for packet in source.demux(video=0) for part in filtered.filter(packet if packet.size else None)]
        for first in range(0, len(parts), pictures):
            packet = av.Packet(b"".join(DELIMITER + bytes(part) for part in parts[first : first + pictures]))
            packet.stream, packet.time_base = stream, parts[first].time_base
            packet.pts, packet.dts = parts[first].pts, parts[first].dts
            packet.is_keyframe = parts[first].is_keyframe
            output.mux(packet)
    numbers, seconds, _ = read(tmp_path / "a.ts")
    assert numbers == list(range(100))
    assert seconds == pytest.approx(np.arange(100) / 25, abs=0.003)
    assert not warnings


@pytest.mark.parametrize("container", ["mpegts", "vob", "h264"])
@pytest.mark.parametrize("times", ["of pictures", "of fields"])
def test_fields_are_no_pictures(tmp_path, container, times):
    path = tmp_path / "a"
    pairs = list(fields(30, bars))
    if container == "h264":
        path.write_bytes(b"".join(b"".join(pair) for pair in pairs))
    else:
        with av.open(str(path), "w", format=container) as output:
            stream = output.add_mux_stream("h264", rate=25, width=64, height=64)
            for number, (first, second) in enumerate(pairs):
                parts = (DELIMITER + first, second) if times == "of fields" else (DELIMITER + first + second,)
                for later, data in enumerate(parts):
                    packet = av.Packet(data)
                    packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 50), number % 12 == 0
                    packet.pts = packet.dts = 2 * number + later
                    output.mux(packet)
    numbers, seconds, duration = read(path)
    assert numbers == list(range(30))
    assert seconds == pytest.approx(np.arange(30) / 25, abs=0.001)
    assert duration == pytest.approx(1.2, abs=0.05)


# --- damage between two key frames


def spoil(path, packet, length=40):
    """Overwrites bytes of one packet, counted in the order of the file; which packets are key frames."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [part for part in container.demux(video=0) if part.size]
    part = bytes(packets[packet])
    place = data.index(part, packets[packet].pos or 0)
    length = min(length, len(part) - 6)
    data[place + 6 : place + 6 + length] = b"\xff" * length
    path.write_bytes(data)
    return [number for number, part in enumerate(packets) if part.is_keyframe]


QUIET = {
    "libsvtav1": {"svtav1-params": "keyint=20:lp=1"},
    "libx265": {"x265-params": "keyint=20:min-keyint=20:no-open-gop=1:log-level=0:pools=none"},
}
DAMAGED = {
    "a.mp4": "libx264",
    "a.mkv": "libx264",
    "b.mp4": "mpeg4",
    "a.avi": "mpeg4",
    "c.mp4": "libx265",
    "a.webm": "libvpx-vp9",
    "b.webm": "libvpx",
    "b.mkv": "libsvtav1",
    "a.mov": "mjpeg",
    "a.flv": "flv",
    "c.mkv": "ffv1",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("place", [0, 20, 49, 52, 60, 118])
def test_only_pictures_up_to_the_next_key_frame_are_lost(tmp_path, name, place):
    codec = DAMAGED[name]
    b_frames = 0 if codec in ("mpeg4", "flv", "mjpeg") else 2
    write(tmp_path / name, 120, codec, b_frames=b_frames, keys=20, settings=QUIET.get(codec))
    intact = read(tmp_path / name)
    assert intact[0] == list(range(120))
    keys = spoil(tmp_path / name, place)
    numbers, seconds, duration = read(tmp_path / name)
    assert duration == intact[2]
    pairs = dict(zip(seconds, numbers, strict=True))
    # A spoiled key frame may take the pictures with it that wait in the decoder.
    last = max(key for key in keys if key <= place)
    damaged = range(last - 2 * (last == place), min((key for key in keys if key > place), default=120))
    wrong = [number for number, second in zip(*intact[:2], strict=True) if pairs.get(second, number) != number]
    missing = [number for number, second in zip(*intact[:2], strict=True) if second not in pairs]
    assert set(wrong + missing) <= set(damaged), (wrong, missing)
    assert set(pairs) <= set(intact[1])


def test_a_spoiled_picture(field, warnings):
    numbers, seconds, _ = read(field / "spoiled.mp4")
    assert set(range(600)) - set(numbers) <= set(range(150, 160))
    assert seconds == pytest.approx([number / 10 for number in numbers])
    assert len(warnings) == 1
    assert "Missing: second 15.00 to 15.90." in warnings[0]
    numbers, seconds, _ = read(field / "spoiled.mp4", max_num_frames=600, sample_fps=1, max_sample_fps=None)
    assert len(numbers) >= 59
    assert numbers[-1] == 590
    assert seconds == pytest.approx([number / 10 for number in numbers])
    assert len(warnings) == 2


# --- every picture flagged as a key frame


def test_a_missing_sync_table(field, warnings):
    for name in ("allsync_mpeg4.mp4", "allsync_h264.mp4"):
        numbers, seconds, _ = read(field / name, max_num_frames=100, sample_fps=0.5, max_sample_fps=None)
        assert numbers == [0, 50, 100, 150, 200]
        assert seconds == [0, 2, 4, 6, 8]
    assert not warnings


@pytest.mark.parametrize("every", [1, 7])
@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("a.mov", codec) for codec in ("mpeg4", "svq1", "mpeg2video", "libx265", "mjpeg")),
        *(("a.mkv", codec) for codec in ("msmpeg4", "mpeg4", "libvpx", "snow")),
        *(("a.mov", codec) for codec in ("qtrle", "rpza")),
    ],
)
def test_flags_that_lie(tmp_path, codec, name, every):
    if codec in ("qtrle", "rpza") and every > 1:
        pytest.skip("nothing in these packets says which of them stand alone")
    write(tmp_path / name, 250, codec, b_frames=0, keys=1000, settings=QUIET.get(codec), flag=every)
    numbers, seconds, _ = read(tmp_path / name, max_num_frames=100, sample_fps=0.5, max_sample_fps=None)
    assert numbers == [0, 50, 100, 150, 200]
    assert seconds == pytest.approx([0, 2, 4, 6, 8], abs=0.001)


# --- edit lists of several parts


def edit(path, edits, long_boxes=False):
    """Gives the video track of an MP4 an edit list: (seconds or None, seconds that it lasts, speed) each."""
    data = path.read_bytes()
    places, start = [], 0
    for name in (b"moov", b"trak"):
        while data[start + 4 : start + 8] != name:
            start += int.from_bytes(data[start : start + 4], "big")
        places.append(start)
        start += 8
    movie = int.from_bytes(data[data.index(b"mvhd") + 16 : data.index(b"mvhd") + 20], "big")
    media = int.from_bytes(data[data.index(b"mdhd") + 16 : data.index(b"mdhd") + 20], "big")
    layout = ">QqI" if long_boxes else ">IiI"
    entries = b"".join(
        struct.pack(layout, round(long * movie), -1 if at is None else round(at * media), round(speed * 65536))
        for at, long, speed in edits
    )
    inner = struct.pack(">I4sB3xI", len(entries) + 16, b"elst", long_boxes, len(edits)) + entries
    box = struct.pack(">I4s", len(inner) + 8, b"edts") + inner
    old = data.index(b"edts") - 4
    size = int.from_bytes(data[old : old + 4], "big")
    for place in places:
        grown = int.from_bytes(data[place : place + 4], "big") + len(box) - size
        data = data[:place] + grown.to_bytes(4, "big") + data[place + 4 :]
    path.write_bytes(data[:old] + box + data[old + size :])


PARTS = {
    "the middle cut out": ([(0, 1, 1), (2, 1, 1)], [*range(25), *range(50, 75)]),
    "turned round": ([(3, 0.4, 1), (2, 0.4, 1), (1, 0.4, 1)], [*range(75, 85), *range(50, 60), *range(25, 35)]),
    "between key frames": ([(0.52, 0.2, 1), (2.2, 0.2, 1)], [*range(13, 18), *range(55, 60)]),
    "repeated": ([(1, 0.4, 1)] * 4, [*range(25, 35)] * 4),
    "a gap in front": ([(None, 1, 1), (0, 0.4, 1), (2, 0.4, 1)], [*range(10), *range(50, 60)]),
    "a gap between": ([(0, 0.4, 1), (None, 1, 1), (2, 0.4, 1)], [*range(10), *range(50, 60)]),
    "a gap behind": ([(0, 0.4, 1), (2, 0.4, 1), (None, 1, 1)], [*range(10), *range(50, 60)]),
    "held, then twice as fast": ([(1, 1, 0), (2, 0.4, 2)], [25, *range(50, 70)]),
    "beyond the end": ([(3.6, 1, 1), (7, 1, 1), (0, 0.4, 1)], [*range(90, 100), *range(10)]),
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("long_boxes", [False, True])
def test_edit_lists_of_several_parts(tmp_path, warnings, kind, b_frames, long_boxes):
    edits, expected = PARTS[kind]
    edit(write(tmp_path / "a.mp4", 100, b_frames=b_frames, keys=25), edits, long_boxes)
    shift = 2 / 25 if b_frames else 0  # the second of the track at which its first picture is shown
    edit(tmp_path / "a.mp4", [(None if at is None else at + shift, *rest) for at, *rest in edits], long_boxes)
    numbers, seconds, duration = read(tmp_path / "a.mp4")
    assert numbers == expected
    times, clock, end = [], 0, 0
    for at, long, speed in edits:
        if at is not None and at < 4:
            count = (
                1
                if speed == 0
                else len([place for place in range(100) if at <= place / 25 < at + long * speed - 1e-6])
            )
            times += [clock + (place / 25 / speed if speed else 0) for place in range(count)]
            end = clock + long
        clock += long
    assert seconds == pytest.approx([second - times[0] for second in times], abs=0.003)
    assert duration == pytest.approx(end - times[0], abs=0.003)
    assert not warnings
    sampled, _, _ = read(tmp_path / "a.mp4", max_num_frames=5, sample_fps=None)
    assert set(sampled) <= set(expected)


@pytest.mark.parametrize(("name", "first"), [("two_segments.mp4", 50), ("same_segment_twice.mp4", 0)])
def test_shared_edit_lists(field, warnings, name, first):
    numbers, seconds, duration = read(field / name)
    assert numbers == [*range(first, first + 25), *range(25)]
    assert seconds == pytest.approx(np.arange(50) / 25, abs=0.001)
    assert duration == pytest.approx(2.0)
    assert not warnings


# --- grey of more than 8 bits


RAMP = np.linspace(0, 1, 64)[None].repeat(4, 0)
GREY = {
    "16 bits": (RAMP * 65535).round().astype(np.uint16),
    "12 bits of 32": (RAMP * 65535).astype(np.int32),
    "32 bits": (RAMP * (2**31 - 1)).astype(np.int32),
    "32 bits with a sign": ((RAMP - 0.5) * (2**31 - 1)).astype(np.int32),
    "floats": RAMP.astype(np.float32),
    "floats of levels": (RAMP * 255).astype(np.float32),
    "large floats": (RAMP * 1e6).astype(np.float32),
    "floats with a sign": (RAMP * 2 - 1).astype(np.float32),
}


def assert_ramp(image, expected=RAMP * 255):
    levels = np.array(image)
    assert levels.shape == (*expected.shape, 3)
    assert np.abs(levels.astype(float) - expected[..., None]).max() <= 2


@pytest.mark.parametrize("kind", GREY)
def test_grey_of_more_than_8_bits(tmp_path, kind):
    levels = GREY[kind]
    image = Image.fromarray(levels)
    image.save(tmp_path / "a.tiff")
    tensor = torch.from_numpy(levels.astype(np.int32) if levels.dtype == np.uint16 else levels)
    for source in (image, levels, tensor, tmp_path / "a.tiff"):
        assert_ramp(load_image(source))
    if levels.dtype == np.uint16:
        image.save(tmp_path / "a.png")
        assert_ramp(load_image(tmp_path / "a.png"))
        assert_ramp(load_image(np.stack([levels] * 3, -1)))
    with open_video([image, image], size=64, timestamps=[0, 1]) as video:
        frames = next(iter(video)).frames
    assert np.abs(frames[0, 0, 0].numpy() - RAMP[0] * 255).max() <= 4


def test_unsigned_grey_of_32_bits(tmp_path):
    levels = (RAMP * (2**32 - 1)).astype(np.uint32)
    Image.frombuffer("I", (64, 4), levels.tobytes(), "raw", "I", 0, 1).save(tmp_path / "a.tiff")
    signed, unsigned = (struct.pack("<HHIH", 339, 3, 1, sign) for sign in (2, 1))
    data = (tmp_path / "a.tiff").read_bytes()
    assert signed in data
    (tmp_path / "a.tiff").write_bytes(data.replace(signed, unsigned))
    assert_ramp(load_image(tmp_path / "a.tiff"))
    assert_ramp(load_image(levels))


def test_shared_grey(field):
    assert_ramp(load_image(field / "grey16.png"), RAMP[:1].repeat(64, 0) * 255)


def test_plain_images_stay_what_they_are():
    for mode, color in (
        ("L", 9),
        ("LA", (9, 128)),
        ("1", 1),
        ("P", 3),
        ("RGBA", (1, 2, 3, 4)),
        ("CMYK", (1, 2, 3, 4)),
    ):
        image = Image.new(mode, (3, 2), color)
        assert np.array_equal(np.array(load_image(image)), np.array(image.convert("RGB")))


# --- side data that PyAV has no name for; JPEG by other names


def test_exif_in_an_avi(field, warnings):
    with open_video(str(field / "mjpeg_exif.avi"), size=64, **EVERY_FRAME) as video:
        batches = list(video)
    assert [number_in(frame) & 255 for batch in batches for frame in batch.frames] == list(range(10))
    assert [second for batch in batches for second in batch.timestamps] == pytest.approx(np.arange(10) / 10)
    assert video.duration == pytest.approx(1.0)
    assert not warnings


def exif_jpeg(orientation):
    corners = np.full((32, 64, 3), 128, np.uint8)
    corners[:16, :32] = 255
    corners[16:, 32:] = 0
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112], exif[0x010F] = orientation, "camera"
    Image.fromarray(corners).save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_with_exif_stand_upright(tmp_path, orientation):
    data = exif_jpeg(orientation)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB").resize((64, 64)), int)
    with av.open(str(tmp_path / "a.avi"), "w") as output:
        stream = output.add_mux_stream("mjpeg", rate=10, width=64, height=32)
        for number in range(4):
            packet = av.Packet(data)
            packet.stream, packet.time_base, packet.is_keyframe = stream, Fraction(1, 10), True
            packet.pts = packet.dts = number
            output.mux(packet)
    for name in ("a.jpg", "a.mp4", "a.jfif", "a"):
        (tmp_path / name).write_bytes(data)
    for name, count in (("a.avi", 4), ("a.jpg", 1), ("a.mp4", 1), ("a.jfif", 1), ("a", 1)):
        with open_video(str(tmp_path / name), size=64, **EVERY_FRAME) as video:
            frames = next(iter(video)).frames
        assert len(frames) == count
        assert np.abs(frames[0].permute(1, 2, 0).numpy() - expected).mean() < 12, name
        assert is_image(tmp_path / name) == (name != "a.avi")
        if name != "a.avi":
            assert np.abs(np.array(load_image(tmp_path / name).resize((64, 64)), int) - expected).mean() < 12


def test_a_shared_jfif(field):
    assert is_image(field / "exif.jfif")
    bits = np.array(load_image(field / "exif.jfif").convert("L"))[16, 4::8] > 127
    assert sum(int(bit) << place for place, bit in enumerate(bits)) == 9


# --- photos that video readers see as tiles


def test_contents_decide_what_is_an_image(tmp_path):
    write(tmp_path / "video.mp4", 4)
    os.rename(tmp_path / "video.mp4", tmp_path / "video.jpg")
    assert not is_image(tmp_path / "video.jpg")
    for kind in ("PNG", "WEBP", "TIFF", "JPEG", "AVIF"):
        Image.new("RGB", (8, 8)).save(tmp_path / "a.mp4", kind)
        assert is_image(tmp_path / "a.mp4"), kind
        assert load_image(tmp_path / "a.mp4").size == (8, 8)
    assert is_image("none.heic")
    assert not is_image("none.mp4")
    write(tmp_path / "a.mjpeg", 4, "mjpeg", b_frames=0)
    assert not is_image(tmp_path / "a.mjpeg")


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
@pytest.mark.parametrize("name", ["a.heic", "a.HEIF", "a.jpg", "a.mp4", "a.avif", "a"])
def test_heif_is_read_whole_or_refused(tmp_path, monkeypatch, brand, name):
    path = tmp_path / name
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(100))
    assert is_image(path)
    monkeypatch.setattr(ip, "pillow_heif", None)
    for reader in (load_image, lambda path: open_video(str(path), size=8)):
        with pytest.raises(ValueError, match="pillow-heif") as caught:
            reader(path)
        assert str(path) in str(caught.value)
    whole = types.SimpleNamespace(to_pillow=lambda: Image.new("RGB", (1024, 768), (9, 8, 7)))
    monkeypatch.setattr(ip, "pillow_heif", types.SimpleNamespace(open_heif=lambda path: whole))
    assert load_image(path).size == (1024, 768)
    assert next(iter(open_video(str(path), size=8))).frames[0, :, 0, 0].tolist() == [9, 8, 7]


def test_avif_is_one_picture(tmp_path):
    for name in ("a.avif", "a.jpg", "a.mp4"):
        Image.new("RGB", (640, 480), (200, 20, 20)).save(tmp_path / name, "AVIF")
        assert is_image(tmp_path / name)
        assert load_image(tmp_path / name).size == (640, 480)
        with open_video(str(tmp_path / name), size=16) as video:
            assert next(iter(video)).frames.shape == (1, 3, 16, 16)


# --- encrypted files


@pytest.mark.parametrize("flags", ["faststart", "frag_keyframe+empty_moov"])
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_encrypted_mp4(tmp_path, flags, codec):
    options = {"encryption_scheme": "cenc-aes-ctr", "encryption_key": "76a6" * 8, "encryption_kid": "a7e6" * 8}
    write(tmp_path / "a.mp4", 30, codec, options={**options, "movflags": flags}, settings=QUIET.get(codec))
    with pytest.raises(vp.VideoDecodeError, match=r"a\.mp4.*encrypted"):
        open_video(str(tmp_path / "a.mp4"), size=8)


def test_encrypted_streams(tmp_path):
    write(tmp_path / "a.ts", 60)
    data = bytearray((tmp_path / "a.ts").read_bytes())
    for place in range(0, len(data), 188):
        if (data[place + 1] & 31, data[place + 2]) == (1, 0):  # the packets of the video, id 256
            data[place + 3] |= 0x80
    (tmp_path / "a.ts").write_bytes(data)
    data = bytearray(write(tmp_path / "a.vob", 60, "mpeg2video", container="vob").read_bytes())
    for found in re.finditer(rb"\x00\x00\x01\xe0..", bytes(data), re.DOTALL):
        data[found.end()] |= 0x10
    (tmp_path / "a.vob").write_bytes(data)
    for name in ("a.ts", "a.vob"):
        with pytest.raises(vp.VideoDecodeError, match="encrypted"):
            open_video(str(tmp_path / name), size=8)


# --- a picture that stands until the end; films behind covers


def test_the_last_picture_may_be_held(field, tmp_path, warnings):
    with open_video(str(field / "held.mkv"), size=64) as video:
        seconds = [second for batch in video for second in batch.timestamps]
    assert video.duration == pytest.approx(30)
    assert seconds == video.timestamps
    assert not warnings
    data = (field / "held.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) * 3 // 4])
    list(open_video(str(tmp_path / "cut.mkv"), size=64))
    assert "of 30.00" in warnings.pop()


@pytest.mark.parametrize("flag", ["visual_impaired", "hearing_impaired", "comment", "dub"])
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_a_film_beside_a_cover(tmp_path, name, flag):
    cover = io.BytesIO()
    Image.new("RGB", (600, 600), (255, 0, 0)).save(cover, "JPEG")
    write(tmp_path / "film.mp4", 20)
    with av.open(str(tmp_path / "film.mp4")) as source, av.open(str(tmp_path / name), "w") as output:
        packet = None
        if name == "a.mkv":
            output.add_attachment("cover.jpg", "image/jpeg", cover.getvalue())
        else:
            packet = av.Packet(cover.getvalue())
            packet.stream = output.add_mux_stream("mjpeg", width=600, height=600)
            packet.stream.disposition = av.stream.Disposition.attached_pic
            packet.time_base, packet.pts, packet.dts, packet.is_keyframe = Fraction(1, 25), 0, 0, True
        film = output.add_stream_from_template(source.streams.video[0])
        film.disposition = av.stream.Disposition[flag]
        if packet is not None:
            output.mux(packet)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = film
                output.mux(packet)
    with av.open(str(tmp_path / name)) as container:
        assert any(stream.disposition & av.stream.Disposition.attached_pic for stream in container.streams.video)
    assert read(tmp_path / name)[0] == list(range(20))


# --- wrong times


@pytest.mark.parametrize("wrong", [0, 0x7F, 0xFF])
@pytest.mark.parametrize("place", [10, 30])
def test_one_wrong_time_loses_one_picture(tmp_path, warnings, wrong, place):
    """The extended byte of a time in an FLV: 194 days later, or 194 days earlier."""
    write(tmp_path / "a.flv", 60, "flv", b_frames=0)
    with av.open(str(tmp_path / "a.flv")) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray((tmp_path / "a.flv").read_bytes())
    data[data.index(bytes(packets[place])) - 5] = wrong
    (tmp_path / "a.flv").write_bytes(data)
    numbers, seconds, duration = read(tmp_path / "a.flv")
    assert {*range(60)} - {*numbers} <= {place}
    assert seconds == pytest.approx([number / 25 for number in numbers], abs=0.001)
    assert duration == pytest.approx(2.4, abs=0.05)
    assert len(warnings) == (wrong > 0)


def test_rates_over_a_long_time():
    """A rate has more moments than there are frames: a frame is chosen if one of them lies in its time."""
    ticks = np.cumsum(np.random.default_rng(0).choice([1, 2, 3, 5, 500_000], 400)).tolist()  # milliseconds
    times = [(tick - ticks[0]) / 1000 for tick in ticks]
    chosen = choose_frames(times, times[-1] + 1, max_num_frames=10_000, sample_fps=250, max_sample_fps=None).indices
    ends = [*ticks[1:], ticks[-1] + 1]
    shown = [-(-(tick - ticks[0]) // 4) * 4 < end - ticks[0] for tick, end in zip(ticks, ends, strict=True)]
    assert times[-1] * 250 > 10_000_000
    assert chosen == [place for place, seen in enumerate(shown) if seen]
