"""Kinds of files that users have reported to other tools: every kind of damage and oddity, and its neighbours.

The shared clips are 64 x 64 and carry their number in two rows of eight bars, as the clips that are made here do.
"""

from fractions import Fraction

import av
import numpy as np
import pytest
from h264_fields import DELIMITER, fields
from sampled import open_video
from videoxl import video_decoding_videoxl as vd
from videoxl import video_processing_videoxl as vp

EVERY_FRAME = {"max_num_frames": 10_000, "sample_fps": 1000, "max_sample_fps": None}


@pytest.fixture
def field(test_data):
    return test_data / "data" / "field"


@pytest.fixture(autouse=True)
def warnings(monkeypatch):
    said = []
    for logger in (vp.logger, vd.logger):
        monkeypatch.setattr(logger, "warning", lambda text, *_: said.append(text))
        monkeypatch.setattr(logger, "warning_once", lambda text, *_: said.append(text))
    return said


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


def write(path, count=100, codec="libx264", rate=25, container=None, options=None, b_frames=2, keys=12, settings=None):
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=rate, options=settings or {})
        stream.width = stream.height = 64
        stream.pix_fmt = stream.codec_context.codec.video_formats[0].name if codec == "qtrle" else "yuv420p"
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = b_frames, keys
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(bars(number), format="gray8")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            output.mux(stream.encode(frame))
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
