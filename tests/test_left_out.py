"""Frames that nobody asked for and no other refers to are not decoded, and several decoders read at once.

Those that are wanted are what one decoder gives that decodes all of them.
"""

import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest
from test_field import edit
from videoxl import video_decoding_videoxl as vd
from videoxl.video_index_videoxl import VideoDecodeError, read_index

# Encoder, container, options, whether it says which frames are referred to.
KINDS = {
    "x264": ("libx264", "mp4", {"x264-params": "bframes=3:keyint=20"}, True),
    "b-pyramid": ("libx264", "mp4", {"x264-params": "bframes=8:b-pyramid=normal:b-adapt=0:keyint=20"}, True),
    "open gop": ("libx264", "mkv", {"x264-params": "bframes=3:open-gop=1:keyint=20:bluray-compat=1"}, True),
    "field-coded": ("libx264", "mp4", {"x264-params": "interlaced=1:tff=1:bframes=3:keyint=20"}, True),
    "no b-frames": ("libx264", "mp4", {"x264-params": "bframes=0:keyint=20"}, False),
    "stream": ("libx264", "mpegts", {"x264-params": "bframes=3:keyint=20"}, True),
    "avi": ("mpeg4", "avi", {"bf": "2", "g": "20"}, False),
    "x265": ("libx265", "mp4", {"x265-params": "bframes=4:keyint=20:log-level=none"}, True),
    "vp9": ("libvpx-vp9", "webm", {"cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16", "g": "20"}, False),
    "mpeg-2": ("mpeg2video", "mpeg", {"bf": "2", "g": "20"}, True),
    "mpeg-4": ("mpeg4", "mp4", {"bf": "2", "g": "20"}, True),
    "mjpeg": ("mjpeg", "mov", {}, True),
    "edit list": ("libx264", "mp4", {"x264-params": "bframes=3:keyint=20"}, False),
    "edit list of parts": ("libx264", "mp4", {"x264-params": "bframes=3:keyint=20"}, False),
}  # fmt: skip
EDITS = {"edit list": [(1.3, 4, 1)], "edit list of parts": [(3, 1.5, 1), (0.5, 3, 1), (4, 1, 1)]}


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


def read(path, wanted, monkeypatch, cores=1, everything=False):
    """Pixels and seconds of wanted positions, how many frames were decoded, and how many decoders read at once."""
    index, given, decoders = read_index(str(path)), [], [1]
    decode, in_order = vd._decode, vd._in_order

    def counted(*arguments):
        for place, frame in decode(*(arguments[:4] if everything else arguments)):
            given.append(place)
            yield place, frame

    def watched(jobs, threads):
        decoders.append(threads)
        return in_order(jobs, threads)

    with monkeypatch.context() as patch:
        patch.setattr(vd, "_decode", counted)
        patch.setattr(vd, "_in_order", watched)
        patch.setattr(vd, "_cores", lambda: cores)
        patch.setattr(vd, "_RUN_FRAMES", 1)
        frames = list(vd.open_pyav(str(path), index, wanted)(np.asarray))
    return frames, len(given), max(decoders)


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
    if kind in EDITS:
        edit(tmp_path / "a", EDITS[kind])
    index = read_index(str(tmp_path / "a"))
    count = len(index.times)
    random = np.random.default_rng(11)
    behind_keyframes = [place + 1 for place in index.keyframes[::2] if place + 1 < count] or [1]
    for wanted in ([*range(0, count - 10, 12)], list(range(count)), [count - 1], behind_keyframes,
                   sorted(random.choice(count, 20, replace=False).tolist())):  # fmt: skip
        all_of_them, decoded, _ = read(tmp_path / "a", wanted, monkeypatch, everything=True)
        assert len(all_of_them) == len(wanted)
        for cores in (1, 3, 9):
            found, fewer, decoders = read(tmp_path / "a", wanted, monkeypatch, cores)
            assert same(found, all_of_them)
            if cores == 1 or len(wanted) < 4 or not index.keyframes:
                assert decoders == 1
            elif kind not in EDITS:
                assert decoders > 1
        if wanted[0] == 0 and wanted[1] == 12 and tells:
            assert fewer < 0.8 * decoded


def test_every_real_file(test_data, monkeypatch):
    videos = test_data / "data" / "videos"
    for path in sorted([*videos.glob("*.*"), *videos.glob("derived/*.*")]):
        if path.suffix in (".md", ".json"):
            continue
        try:
            times = read_index(str(path)).times
        except VideoDecodeError:
            continue
        seconds = np.arange(0, min(times[-1], 20) + 1e-9, 1.0)
        wanted = sorted({int(place) for place in np.searchsorted(times, seconds).clip(max=len(times) - 1)})
        before = until_an_error(path, wanted, monkeypatch, 1, everything=True)
        assert all(same(until_an_error(path, wanted, monkeypatch, cores), before) for cores in (1, 9)), path


def until_an_error(path, wanted, monkeypatch, cores, everything=False):
    try:
        return read(path, wanted, monkeypatch, cores, everything)[0]
    except av.FFmpegError:
        return []


def test_a_missing_picture_shows_the_one_before(monkeypatch):
    """Also where several are missing and the one before was left out: then everything is decoded."""
    frames = [(place, f"picture {place}") for place in (0, 1, 2, 5, 6)]
    assert list(vd.pick_frames(iter(frames), [0, 3], lean=True))[1:] == [(2, "picture 2")]
    with pytest.raises(vd._LeftOut):
        list(vd.pick_frames(iter(frames), [0, 4], lean=True))


def clip_with_keyframes(path):
    film(path, "libx264", "mp4", {"x264-params": "bframes=3:keyint=20"}, [4 * number for number in range(160)])
    return read_index(str(path))


@pytest.mark.parametrize("cores", [1, 2, 9])
def test_little_is_held_ahead_of_a_slow_consumer(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(vd, "_cores", lambda: cores)
    monkeypatch.setattr(vd, "_RUN_FRAMES", 1)
    index, made = clip_with_keyframes(tmp_path / "a"), []
    reader = vd.open_pyav(str(tmp_path / "a"), index, list(range(0, 160, 4)))(made.append)
    for number in range(1, 41):
        next(reader)
        time.sleep(0.02)
        # Runs of 5 frames: those that threads decode, one more, and the one that the consumer has begun.
        assert len(made) <= number + (3 if cores == 1 else (min(cores, 4) + 2) * 5)
    reader.close()


@pytest.mark.parametrize("cores", [1, 2])
def test_an_error_comes_behind_what_was_read_before_it(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(vd, "_cores", lambda: cores)
    monkeypatch.setattr(vd, "_RUN_FRAMES", 1)
    index, found, lock = clip_with_keyframes(tmp_path / "a"), [], threading.Lock()

    def fail_at_some(pixels):
        with lock:
            found.append(pixels)
            if len(found) == 12:
                raise MemoryError("no room")
        return pixels

    read = []
    with pytest.raises(MemoryError, match="no room"):
        read.extend(vd.open_pyav(str(tmp_path / "a"), index, list(range(0, 160, 4)))(fail_at_some))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(vd.DECODER_THREADS)]
