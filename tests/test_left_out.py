"""Frames that nobody asked for and no other refers to are not decoded; those that are wanted are what they were."""

from fractions import Fraction

import av
import numpy as np
import pytest
from videoxl import video_decoding_videoxl as vd
from videoxl.video_index_videoxl import read_index

# Encoder, container, options, whether it says which frames are referred to.
KINDS = {
    "x264": ("libx264", "mp4", {"x264-params": "bframes=3:keyint=60"}, True),
    "b-pyramid": ("libx264", "mp4", {"x264-params": "bframes=8:b-pyramid=normal:b-adapt=0:keyint=60"}, True),
    "open gop": ("libx264", "mkv", {"x264-params": "bframes=3:open-gop=1:keyint=30:bluray-compat=1"}, True),
    "field-coded": ("libx264", "mp4", {"x264-params": "interlaced=1:tff=1:bframes=3:keyint=60"}, True),
    "no b-frames": ("libx264", "mp4", {"x264-params": "bframes=0:keyint=60"}, False),
    "stream": ("libx264", "mpegts", {"x264-params": "bframes=3:keyint=60"}, True),
    "avi": ("mpeg4", "avi", {"bf": "2", "g": "60"}, False),
    "x265": ("libx265", "mp4", {"x265-params": "bframes=4:keyint=60:log-level=none"}, True),
    "vp9": ("libvpx-vp9", "webm", {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}, False),
    "mpeg-2": ("mpeg2video", "mpeg", {"bf": "2", "g": "30"}, True),
    "mpeg-4": ("mpeg4", "mp4", {"bf": "2", "g": "60"}, True),
    "mjpeg": ("mjpeg", "mov", {}, True),
}  # fmt: skip


def film(path, codec, container, options, times):
    """A video of moving noise, so that every frame differs and refers to others, shown at these ticks of 1/100 s."""
    random = np.random.default_rng(3)
    scene = random.integers(0, 255, (96, 400, 3), dtype=np.uint8)
    with av.open(str(path), "w", format={"mkv": "matroska"}.get(container, container)) as output:
        stream = output.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = 128, 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 100 if container in ("mp4", "mkv", "webm", "mov") else 25)
        for number, tick in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(scene[:, number : number + 128]), format="rgb24")
            frame.pts, frame.time_base = tick, Fraction(1, 100)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def read(path, wanted, monkeypatch, everything=False):
    """Pixels and seconds of wanted positions, and how many frames the decoder gave."""
    index, given = read_index(str(path)), []
    decode = vd._decode

    def counted(*arguments):
        for place, frame in decode(*(arguments[:4] if everything else arguments)):
            given.append(place)
            yield place, frame

    with monkeypatch.context() as patch:
        patch.setattr(vd, "_decode", counted)
        frames = list(vd.open_pyav(str(path), index, wanted)())
    return frames, len(given)


def same(first, second):
    return len(first) == len(second) and all(
        one[1] == other[1] and np.array_equal(one[0], other[0]) for one, other in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("rate", ["constant", "variable"])
@pytest.mark.parametrize("kind", KINDS)
def test_wanted_frames_are_what_they_were(tmp_path, monkeypatch, kind, rate):
    codec, container, options, tells = KINDS[kind]
    times = [4 * number for number in range(160)]
    if rate == "variable":
        if container in ("mpegts", "avi", "mpeg"):
            pytest.skip("written with a constant rate")
        times = np.cumsum(np.random.default_rng(5).choice([2, 4, 9], 160)).tolist()
    film(tmp_path / "a", codec, container, options, times)
    count = len(read_index(str(tmp_path / "a")).times)
    random = np.random.default_rng(11)
    for wanted in ([*range(0, 150, 12)], list(range(count)), [count - 1],
                   sorted(random.choice(count, 20, replace=False).tolist())):  # fmt: skip
        all_of_them, decoded = read(tmp_path / "a", wanted, monkeypatch, everything=True)
        found, fewer = read(tmp_path / "a", wanted, monkeypatch)
        assert len(found) == len(wanted)
        assert same(found, all_of_them)
        if wanted[0] == 0 and wanted[1] == 12 and tells:
            assert fewer < 0.8 * decoded


def test_every_real_file(test_data, monkeypatch):
    videos = test_data / "data" / "videos"
    for path in sorted([*videos.glob("*.*"), *videos.glob("derived/*.*")]):
        if path.suffix in (".md", ".json"):
            continue
        try:
            times = read_index(str(path)).times
        except vd.VideoDecodeError:
            continue
        seconds = np.arange(0, min(times[-1], 20) + 1e-9, 1.0)
        wanted = sorted({int(place) for place in np.searchsorted(times, seconds).clip(max=len(times) - 1)})
        assert same(*(until_an_error(path, wanted, monkeypatch, every) for every in (False, True))), path


def until_an_error(path, wanted, monkeypatch, everything):
    try:
        return read(path, wanted, monkeypatch, everything)[0]
    except av.FFmpegError:
        return []


def test_a_missing_picture_shows_the_one_before(monkeypatch):
    """Also where several are missing and the one before was left out: then everything is decoded."""
    frames = [(place, f"picture {place}") for place in (0, 1, 2, 5, 6)]
    assert list(vd.pick_frames(iter(frames), [0, 3], lean=True))[1:] == [(2, "picture 2")]
    with pytest.raises(vd._LeftOut):
        list(vd.pick_frames(iter(frames), [0, 4], lean=True))
