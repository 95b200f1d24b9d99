"""Which frames, times and failures `open_video` gives: sampling, decoding and the door.

Generated clips carry their frame number in ten black or white blocks, so that a test can prove which frame came.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sampled import open_video, sample_frame_indices, sample_frame_times
from videoxl import video_decoding_videoxl as vd
from videoxl import video_processing_videoxl as vp
from videoxl.video_index_videoxl import read_index

# Opens a program in a process of its own; its arguments are the repository root and a video.
IMPORT = """
import sys, types
package = types.ModuleType("videoxl")
package.__path__ = [sys.argv[1]]
sys.modules["videoxl"] = package
from videoxl import video_processing_videoxl as vp
from videoxl.frame_sampling_videoxl import Sampling
"""
EVERY_FRAME = {"max_num_frames": 10_000, "sample_fps": 1000, "max_sample_fps": None}
LONG = [round(number * 1000 / 30) for number in range(400)]
THIRTIETHS = LONG[:90]


def numbered_picture(number: int, width: int = 160, height: int = 96) -> np.ndarray:
    bits = np.array([number >> bit & 1 for bit in range(10)], dtype=np.uint8).reshape(2, 5) * 255
    return np.repeat(bits.repeat(height // 2, 0).repeat(width // 5, 1)[..., None], 3, axis=-1)


def number_in(frame: torch.Tensor) -> int:
    size = frame.shape[-1]
    rows, columns = [size // 4, 3 * size // 4], [(2 * block + 1) * size // 10 for block in range(5)]
    bits = (frame[0][rows][:, columns] > 127).flatten().tolist()
    return sum(bit << place for place, bit in enumerate(bits))


def write_clip(
    path,
    ticks=THIRTIETHS,
    base=Fraction(1, 1000),
    codec="libx264",
    keyframes=12,
    container=None,
    options=None,
    setup=lambda stream: None,
    picture=numbered_picture,
):
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=30)
        height, width = picture(0).shape[:2]
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        stream.codec_context.gop_size = keyframes
        stream.codec_context.max_b_frames = 2
        setup(stream)
        for number, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture(number)), format="rgb24")
            frame.pts, frame.time_base = tick, base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def read(source, size=96, **settings_):
    with open_video(source, size=size, **settings_) as video:
        batches = list(video)
    numbers = [number_in(frame) for batch in batches for frame in batch.frames]
    return video, numbers, [second for batch in batches for second in batch.timestamps]


@pytest.fixture
def videos(test_data):
    return test_data / "data" / "videos"


def test_sampling_equals_the_reference(test_data):
    rows = json.loads((test_data / "golden" / "videoxl2" / "frame_sampling.json").read_text())["rows"]
    for row in rows:
        chosen = {name: row[name] for name in ("max_num_frames", "sample_fps", "max_sample_fps")}
        indices = sample_frame_indices(row["num_frames"], row["avg_fps"], **chosen)
        assert (len(indices), indices[: len(row["head"])]) == (row["count"], row["head"])
        assert indices[-len(row["tail"]) :] == row["tail"]
        assert hashlib.sha1(",".join(map(str, indices)).encode()).hexdigest() == row["sha1_of_indices"]
        times = [number / row["avg_fps"] for number in range(row["num_frames"])]
        assert sample_frame_times(times, **chosen) == indices
    assert len(rows) == 432


@pytest.mark.parametrize(
    ("num_frames", "fps", "settings_", "expected"),
    [
        (6, 0.3, {"max_num_frames": 8}, [0, 1, 2, 3, 4, 5]),  # the reference divides by a step of 0
        (6, 1.5, {"max_num_frames": 100}, [0, 1, 2, 3, 4, 5]),
        (6, 0.0, {"max_num_frames": 3}, [0, 2, 5]),
        (0, 25.0, {"max_num_frames": 3}, []),
        (3, 25.0, {"max_num_frames": 8, "sample_fps": None}, [0, 1, 2]),
        (10, 25.0, {"max_num_frames": 4, "sample_fps": None}, [0, 3, 6, 9]),
        (100, 25.0, {"max_num_frames": 1, "sample_fps": None}, [0]),
        (60, 30.0, {"max_num_frames": 100, "max_sample_fps": None}, [0, 30]),
    ],
)
def test_sampling_where_the_reference_crashes_or_has_no_rule(num_frames, fps, settings_, expected):
    assert sample_frame_indices(num_frames, fps, **settings_) == expected


RATES = st.sampled_from([5.0, 10.0, 12.5, 15.0, 24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60.0])
SETTINGS = st.fixed_dictionaries(
    {
        "max_num_frames": st.integers(1, 300),
        "sample_fps": st.sampled_from([None, 0.2, 0.5, 1, 2, 7.5]),
        "max_sample_fps": st.sampled_from([None, 1, 2, 4, 30]),
    }
)


@given(st.integers(1, 2000), RATES, SETTINGS, st.sampled_from([1000, 90000]))
@settings(max_examples=150, deadline=None)
def test_rounded_times_of_a_constant_rate_choose_like_the_rate(num_frames, fps, chosen, ticks_a_second):
    times = [round(number / fps * ticks_a_second) / ticks_a_second for number in range(num_frames)]
    expected = sample_frame_indices(num_frames, fps, **chosen)
    if num_frames > 2:  # two rounded times do not tell the rate
        assert sample_frame_times(times, frame_rate=fps, **chosen) == expected


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=400), SETTINGS)
@settings(max_examples=150, deadline=None)
def test_any_times_give_increasing_frames_within_the_budget(gaps, chosen):
    times = (np.cumsum(gaps) / 1000).tolist()
    indices = sample_frame_times(times, **chosen)
    assert indices == sorted(set(indices))
    assert 0 <= indices[0] <= indices[-1] < len(times)
    assert 1 <= len(indices) <= chosen["max_num_frames"]
    if chosen["sample_fps"] is None:
        assert len(indices) == min(chosen["max_num_frames"], len(times))


def test_variable_rate_takes_what_is_on_display():
    times = [0.0, 0.9, 1.1, 1.2, 5.0, 5.1, 8.0]
    assert sample_frame_times(times, max_num_frames=7, max_sample_fps=None) == [0, 1, 3, 4, 5, 6]
    assert sample_frame_times(times, max_num_frames=3, sample_fps=None) == [0, 3, 6]
    assert sample_frame_times([5.0], max_num_frames=3) == [0]


@pytest.mark.parametrize(
    "settings_",
    [
        {"max_num_frames": 0},
        {"max_num_frames": None},
        {"max_num_frames": 2.5},
        {"max_num_frames": 8, "sample_fps": 0},
        {"max_num_frames": 8, "sample_fps": -1},
        {"max_num_frames": 8, "sample_fps": float("nan")},
        {"max_num_frames": 8, "max_sample_fps": 0},
    ],
)
def test_settings_out_of_range(settings_, tmp_path):
    with pytest.raises(ValueError, match="max_num_frames|sample_fps"):
        sample_frame_indices(10, 25.0, **settings_)
    with pytest.raises(ValueError, match="max_num_frames|sample_fps"):
        open_video([Image.new("RGB", (8, 8))], size=8, **settings_)


def test_times_that_do_not_increase():
    with pytest.raises(ValueError, match="strictly increasing"):
        sample_frame_times([0.0, 0.5, 0.5], max_num_frames=4)


def test_resize_is_pil_or_two_levels_from_it():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 90, 130, 3), dtype=np.uint8))
    frames = pixels.permute(0, 3, 1, 2)
    images = [Image.fromarray(p.numpy()).resize((56, 56), Image.Resampling.BICUBIC) for p in pixels]
    expected = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
    assert torch.equal(vp.resize_frames(frames, 56, exact=True), expected)
    fast = vp.resize_frames(frames, 56)
    assert fast.shape == (2, 3, 56, 56)
    assert fast.is_contiguous()
    assert (fast.int() - expected.int()).abs().max() <= 2
    assert torch.equal(vp.resize_frames(frames.contiguous(), 56), fast)
    assert vp.resize_frames(frames[:0], 56).shape == (0, 3, 56, 56)


def test_normalize():
    frames = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert torch.allclose(vp.normalize_frames(frames, 0.5, 0.5)[0, :, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    half = vp.normalize_frames(frames, [0.5, 0.2, 0.0], [0.5, 1.0, 2.0], dtype=torch.float16)
    assert half.dtype == torch.float16
    assert torch.allclose(half[0, :, 0, 0].float(), torch.tensor([-1.0, 0.0, 0.5]), atol=1e-3)


@pytest.mark.parametrize("frames", [torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, 3, dtype=torch.uint8), "frames"])
def test_pixels_of_another_kind(frames):
    for act in (lambda: vp.resize_frames(frames, 8), lambda: vp.normalize_frames(frames, 0.5, 0.5)):
        with pytest.raises(ValueError, match=r"uint8 tensor \[n, 3, H, W\]"):
            act()


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("a.mp4", {}),
        ("fragmented.mp4", {"options": {"movflags": "frag_keyframe+empty_moov"}}),
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx"}),
        ("a.ts", {}),
        ("a.flv", {}),
        ("a.avi", {"ticks": range(90), "base": Fraction(1, 30)}),
    ],
)
def test_every_frame_of_every_container(tmp_path, warnings, name, how):
    video, numbers, seconds = read(write_clip(tmp_path / name, **how), **EVERY_FRAME)
    assert numbers == list(range(90))
    assert seconds == video.timestamps
    assert np.allclose(seconds, np.arange(90) / 30, atol=1.1e-3)
    assert video.duration == pytest.approx(3.0, abs=0.01)
    assert not warnings


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
@pytest.mark.parametrize("settings_", [{}, {"max_sample_fps": None}, {"max_num_frames": 7, "sample_fps": None}])
def test_sampled_frames_are_those_of_the_sampler(tmp_path, name, settings_):
    path = write_clip(tmp_path / name, LONG, keyframes=40)
    chosen = {"max_num_frames": 60, **settings_}
    _, numbers, seconds = read(path, **chosen)
    assert numbers == sample_frame_indices(400, 30.0, **chosen)
    assert np.allclose(seconds, np.array(numbers) / 30, atol=1.1e-3)


def test_a_seek_past_the_keyframe_is_made_good_by_reading_on(tmp_path):
    path = str(write_clip(tmp_path / "a.mp4", LONG, keyframes=40))
    index = read_index(path)
    key = index.keyframes[2]
    # An index that misleads: by it this keyframe lies a tick earlier, so the frame there is never met.
    misled = replace(index, keys=[*index.keys[:key], index.keys[key] - 1, *index.keys[key + 1 :]])
    wanted = [0, key + 1, key + 9, 300]
    for one in (index, misled):
        frames = list(vd.open_pyav(path, one, wanted)(np.asarray))
        pixels = [vp.resize_frames(torch.from_numpy(frame).permute(2, 0, 1)[None], 96)[0] for frame, _ in frames]
        assert [number_in(frame) for frame in pixels] == wanted
        assert [second for _, second in frames] == [index.times[place] for place in wanted]


def test_a_packet_without_a_picture_shows_the_picture_before():
    decoded = [(place, f"picture {place}") for place in (0, 1, 4, 5, 6)]
    assert list(vd.pick_frames(iter(decoded), [0, 2, 3, 5])) == [(0, "picture 0"), (1, "picture 1"), (5, "picture 5")]
    left = iter(decoded)
    list(vd.pick_frames(left, [1]))
    assert next(left)[0] == 4  # nothing beyond the last wanted frame is decoded


def test_variable_rate_file(tmp_path):
    ticks = [*range(0, 2000, 40), *range(2000, 6000, 500), *range(6000, 8000, 100)]
    path = write_clip(tmp_path / "vfr.mp4", ticks)
    _, numbers, seconds = read(path, **EVERY_FRAME)
    assert numbers == list(range(len(ticks)))
    assert np.allclose(seconds, np.array(ticks) / 1000, atol=1e-4)
    _, numbers, seconds = read(path, max_num_frames=100, max_sample_fps=None)
    assert np.allclose(seconds, range(8), atol=1e-4)
    assert [ticks[number] for number in numbers] == [second * 1000 for second in range(8)]


def test_edit_list_hides_frames_before_the_start(tmp_path, warnings):
    path = write_clip(tmp_path / "edit.mp4", [tick - 500 for tick in THIRTIETHS])
    _, numbers, seconds = read(path, **EVERY_FRAME)
    assert numbers == list(range(15, 90))
    assert np.allclose(seconds, np.arange(75) / 30, atol=1.1e-3)
    assert not warnings


def test_late_first_frame_is_second_zero(tmp_path):
    for name in ("late.mkv", "late.ts"):
        _, numbers, seconds = read(write_clip(tmp_path / name, [tick + 700 for tick in THIRTIETHS]), **EVERY_FRAME)
        assert (numbers, seconds[0]) == (list(range(90)), 0.0)


def test_recording_that_starts_between_keyframes(tmp_path):
    data = write_clip(tmp_path / "a.ts").read_bytes()
    path = tmp_path / "cut.ts"
    path.write_bytes(data[188 * 30 :])
    _, numbers, seconds = read(path, **EVERY_FRAME)
    assert 0 < numbers[0] < 89
    assert numbers == list(range(numbers[0], 90))
    assert np.allclose(seconds, (np.array(numbers) - numbers[0]) / 30, atol=1e-3)


def test_two_recordings_glued_together(tmp_path, warnings):
    data = write_clip(tmp_path / "a.ts").read_bytes()
    path = tmp_path / "twice.ts"
    path.write_bytes(data + data)
    _, numbers, seconds = read(path, **EVERY_FRAME)
    # FFmpeg may flag the packet at the seam as broken, so one frame may be absent.
    assert len(numbers) >= 89
    assert np.allclose(seconds, np.array(numbers) / 30, atol=1e-3)
    assert len(warnings) == 1
    assert "jumps back" in warnings[0]


def test_raw_stream_without_times_says_which_rate_it_assumes(tmp_path, warnings):
    _, numbers, seconds = read(write_clip(tmp_path / "a.h264", container="h264"), **EVERY_FRAME)
    assert numbers == list(range(90))
    assert np.allclose(np.diff(seconds), seconds[1])
    assert "stores no times" in warnings[0]


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_cut_file_gives_its_readable_part_and_one_warning(tmp_path, warnings, name):
    data = write_clip(tmp_path / name, options={"movflags": "faststart"} if name == "a.mp4" else None).read_bytes()
    path = tmp_path / f"cut_{name}"
    path.write_bytes(data[: len(data) * 6 // 10])
    _, numbers, seconds = read(path, **EVERY_FRAME)
    assert 5 < len(numbers) < 90
    assert numbers == list(range(len(numbers)))
    assert np.allclose(seconds, np.arange(len(numbers)) / 30, atol=1.1e-3)
    assert len(warnings) == 1
    assert f"{len(numbers)} of " in warnings[0]
    assert f"until second {seconds[-1]:.2f}" in warnings[0]


UPRIGHT = (1, 0, 0, 1)


def corners() -> np.ndarray:
    picture = np.zeros((96, 160, 3), np.uint8)
    picture[:48, :80], picture[:48, 80:], picture[48:, :80] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return picture


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda image: image),
        ((0, 1, -1, 0), lambda image: image.transpose(Image.Transpose.ROTATE_270)),  # PIL turns counter-clockwise
        ((-1, 0, 0, -1), lambda image: image.transpose(Image.Transpose.ROTATE_180)),
        ((0, -1, 1, 0), lambda image: image.transpose(Image.Transpose.ROTATE_90)),
        ((-1, 0, 0, 1), lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        ((1, 0, 0, -1), lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)),
        ((0, 1, 1, 0), lambda image: image.transpose(Image.Transpose.TRANSPOSE)),
        ((0, -1, -1, 0), lambda image: image.transpose(Image.Transpose.TRANSVERSE)),
    ],
)
def test_display_matrix(matrix, turn):
    class Turned:
        colorspace = 2
        side_data = ()

        def reformat(self, format):
            return av.VideoFrame.from_ndarray(corners(), format="rgb24")

    class Data(bytes):
        type = av.sidedata.sidedata.Type.DISPLAYMATRIX

    frame = Turned()
    a, b, c, d = (value << 16 for value in matrix)
    frame.side_data = [Data(struct.pack("=9i", a, b, 0, c, d, 0, 0, 0, 1 << 30))]
    assert vd.display_matrix(frame) == (a, b, c, d)
    assert np.array_equal(vd.upright_rgb(frame, (a, b, c, d)), np.array(turn(Image.fromarray(corners()))))


@pytest.mark.parametrize(("space", "red"), [(1, (0.2126, 0.0722)), (6, (0.299, 0.114)), (9, (0.2627, 0.0593))])
@pytest.mark.parametrize("full", [False, True])
def test_colour_matrix_and_range(space, red, full):
    luma, blue, red_ = 120, 90, 170
    frame = av.VideoFrame(64, 48, "yuv420p")
    for plane, level in zip(frame.planes, (luma, blue, red_), strict=True):
        plane.update(bytes([level]) * plane.buffer_size)
    frame.colorspace, frame.color_range = space, 2 if full else 1
    y, u, v = (
        (luma, blue - 128, red_ - 128)
        if full
        else ((luma - 16) * 255 / 219, (blue - 128) * 255 / 224, (red_ - 128) * 255 / 224)
    )
    kr, kb = red
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    expected = np.clip([r, (y - kr * r - kb * b) / (1 - kr - kb), b], 0, 255)
    assert np.abs(vd.upright_rgb(frame, UPRIGHT)[20, 20] - expected).max() <= 3


def test_colour_matrix_that_ffmpeg_cannot_convert_is_said(warnings):
    frame = av.VideoFrame(64, 48, "yuv420p")
    frame.colorspace = 14  # ICtCp
    assert vd.upright_rgb(frame, UPRIGHT).shape == (48, 64, 3)
    assert "BT.601" in warnings[0]


def test_batch_size_changes_no_frame(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    whole = list(open_video(path, size=48, batch_frames=1000, **EVERY_FRAME))
    assert len(whole) == 1
    for batch_frames in (1, 7, 90):
        batches = list(open_video(path, size=48, batch_frames=batch_frames, **EVERY_FRAME))
        assert all(len(batch.frames) == len(batch.timestamps) <= batch_frames for batch in batches)
        assert torch.equal(torch.cat([batch.frames for batch in batches]), whole[0].frames)
        assert [second for batch in batches for second in batch.timestamps] == whole[0].timestamps


def test_exact_resize_of_a_file_is_pil(tmp_path):
    path = write_clip(tmp_path / "a.mp4", THIRTIETHS[:3])
    with av.open(str(path)) as container:
        decoded = [frame.to_image() for frame in container.decode(video=0)]
    batch = next(iter(open_video(path, size=56, exact_resize=True, **EVERY_FRAME)))
    for frame, image in zip(batch.frames, decoded, strict=True):
        expected = np.array(image.resize((56, 56), Image.Resampling.BICUBIC))
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected)


def decoder_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("video-decoder")]


@pytest.mark.parametrize("cores", [1, 4])
def test_leaving_early_stops_the_threads_and_closes_the_file(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(vd, "_cores", lambda: cores)
    path = write_clip(tmp_path / "a.mp4")

    def nothing_left():
        fds = "/proc/self/fd"
        held = [os.path.realpath(f"{fds}/{fd}") for fd in os.listdir(fds)] if os.path.isdir(fds) else []
        return not decoder_threads() and str(path.resolve()) not in held

    for _ in open_video(path, size=48, batch_frames=1, **EVERY_FRAME):
        assert not nothing_left()
        break
    assert nothing_left()

    with open_video(path, size=48, batch_frames=1, **EVERY_FRAME) as video:
        batches = iter(video)
        next(batches)
    assert nothing_left()

    video = open_video(path, size=48, batch_frames=1, **EVERY_FRAME)
    with pytest.raises(KeyError):
        for _ in video:
            raise KeyError("the consumer's own mistake")
    assert nothing_left()

    with open_video(path, size=48):
        assert nothing_left(), "nothing starts before the first frame is asked for"
    assert nothing_left()


def test_a_program_may_end_in_the_middle_of_a_video(tmp_path, root):
    path = write_clip(tmp_path / "a.mp4")
    program = IMPORT + "left = iter(vp.open_video(sys.argv[2], size=384, batch_frames=1)); next(left); print('done')"
    command = [sys.executable, "-c", program, str(root), str(path)]
    assert subprocess.run(command, capture_output=True, check=True, text=True, timeout=300).stdout == "done\n"


def test_frames_are_read_once(tmp_path):
    video = open_video(write_clip(tmp_path / "a.mp4"), size=48)
    list(video)
    with pytest.raises(RuntimeError, match="once"):
        iter(video)
    closed = open_video(tmp_path / "a.mp4", size=48)
    closed.close()
    with pytest.raises(RuntimeError, match="closed"):
        iter(closed)


def test_facts_known_before_decoding(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    video = open_video(path, size=48, max_num_frames=np.int64(6), sample_fps=None)
    assert video.source == str(path)
    assert (video.num_frames, len(video.timestamps)) == (6, 6)
    assert json.loads(json.dumps(video.sampling)) == video.sampling
    assert video.sampling["max_num_frames"] == 6


def test_frames_in_memory_are_used_as_they_are(warnings):
    array = np.stack([numbered_picture(number) for number in range(5)])
    stamps = [0.0, 0.5, 2.0, 2.25, 9.0]
    sources = [
        array,
        torch.from_numpy(array),
        list(array),
        tuple(torch.from_numpy(array)),
        [Image.fromarray(picture) for picture in array],
        array[:, :, ::-1][:, :, ::-1],
    ]
    for source in sources:
        video, numbers, seconds = read(source, timestamps=stamps, max_num_frames=2)
        assert (numbers, seconds, video.source) == (list(range(5)), stamps, None)
        assert video.duration == 9.0 + 6.75
    assert not warnings


def test_frames_in_memory_may_differ_in_size_and_mode():
    images = [Image.new("L", (30, 20), 255), Image.new("RGBA", (50, 90), (255, 0, 0, 0)), Image.new("P", (8, 8))]
    batch = next(iter(open_video(images, size=16, timestamps=[0, 1, 2])))
    assert batch.frames.shape == (3, 3, 16, 16)
    assert batch.frames[:, :, 8, 8].tolist() == [[255, 255, 255], [255, 0, 0], [0, 0, 0]]


def test_missing_timestamps_are_assumed_aloud(warnings):
    array = np.zeros((3, 8, 8, 3), np.uint8)
    assert open_video(array, size=8, sample_fps=2).timestamps == [0.0, 0.5, 1.0]
    assert open_video(array, size=8, sample_fps=None).timestamps == [0.0, 1.0, 2.0]
    assert len(warnings) == 2
    assert "without timestamps" in warnings[0]


@pytest.mark.parametrize(
    "stamps", [[0.0, 1.0], [0.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [0.0, float("nan"), 2.0], [0.0, 1.0, float("inf")]]
)
def test_timestamps_that_cannot_be(stamps):
    with pytest.raises(ValueError, match="3 strictly increasing, finite seconds"):
        open_video(np.zeros((3, 8, 8, 3), np.uint8), size=8, timestamps=stamps)


@pytest.mark.parametrize(
    "source",
    [
        [],
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
        torch.zeros(2, 8, 8, 3),
        [np.zeros((8, 8), np.uint8)],
        [np.zeros((8, 8, 4), np.uint8)],
        [None],
        7,
        None,
        {"video": 1},
    ],
)
def test_frames_of_another_kind(source):
    with pytest.raises(ValueError, match="Expected"):
        open_video(source, size=8)


def test_files_that_are_no_video(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("This is not a video. " * 50)
    with av.open(str(tmp_path / "sound.m4a"), "w") as output:
        stream = output.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    for name, hint in (("empty.mp4", "empty"), ("text.mp4", "cannot open"), ("sound.m4a", "audio"), ("", "folder")):
        with pytest.raises(vp.VideoDecodeError, match=hint) as caught:
            open_video(str(tmp_path / name), size=8)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        open_video(tmp_path / "missing.mp4", size=8)


def test_a_video_of_which_nothing_decodes(tmp_path):
    path = write_clip(tmp_path / "a.mp4", options={"movflags": "faststart"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    data[start:] = b"\xff" * (len(data) - start)
    path.write_bytes(data)
    with pytest.raises(vp.VideoDecodeError, match="none could be decoded"):
        list(open_video(path, size=8))
    assert not decoder_threads()


@pytest.mark.parametrize("address", ["http://example.org/a.mp4", "https://example.org/a.mp4", "rtsp://camera/1"])
def test_nothing_is_fetched(address):
    with pytest.raises(ValueError, match="Download"):
        open_video(address, size=8)


def test_protocols_and_patterns_in_names_are_only_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_video("concat:a.mp4|b.mp4", size=8)
    write_clip("a.mp4", THIRTIETHS[:4])
    os.rename("a.mp4", "concat:a.mp4")
    assert read("concat:a.mp4", **EVERY_FRAME)[1] == [0, 1, 2, 3]
    Image.fromarray(numbered_picture(5)).save("p001.png")
    Image.fromarray(numbered_picture(9)).save("p%03d.png")
    assert read("p%03d.png")[1] == [9]
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(vp.VideoDecodeError):
        list(open_video("list.m3u8", size=8))


def test_animated_image(tmp_path):
    images = [Image.fromarray(numbered_picture(number)) for number in range(6)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
    _, numbers, seconds = read(tmp_path / "a.gif", **EVERY_FRAME)
    assert numbers == list(range(6))
    assert np.allclose(seconds, np.arange(6) / 10)


def test_arguments_that_do_not_go_together(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", THIRTIETHS[:4])
    monkeypatch.setattr(vd, "decord", None)
    for wrong, found in (
        ({"timestamps": [0, 1, 2, 3]}, "timestamps belong"),
        ({"backend": "opencv"}, "Unknown backend"),
        ({"backend": "decord"}, "not installed"),
        ({"size": 0}, "size"),
        ({"batch_frames": 0}, "batch_frames"),
    ):
        with pytest.raises(ValueError, match=found):
            open_video(path, **{"size": 8, **wrong})


@pytest.mark.parametrize("backend", ["decord", "torchcodec"])
def test_another_backend_gives_the_same_frames_or_refuses(tmp_path, backend):
    pytest.importorskip(backend, reason=f"{backend} is optional; make test-peers installs it")
    path = write_clip(tmp_path / "a.mp4")
    expected = read(path, max_num_frames=20)[1:]
    assert read(path, max_num_frames=20, backend=backend)[1:] == expected
    with pytest.raises(ValueError, match=backend):
        open_video(write_clip(tmp_path / "a.ts"), size=8, backend=backend)
    edited = write_clip(tmp_path / "edit.mp4", [tick - 500 for tick in THIRTIETHS])
    if backend == "decord":
        with pytest.raises(ValueError, match="decord crashes on, misplaces"):
            open_video(write_clip(tmp_path / "hevc.mp4", codec="libx265"), size=8, backend=backend)
        with pytest.raises(ValueError, match="decord sees .* frames at other times than the 75"):
            open_video(edited, size=8, backend=backend)
    else:
        assert read(edited, **EVERY_FRAME, backend=backend)[1:] == read(edited, **EVERY_FRAME)[1:]
    with pytest.raises(ValueError, match="local files only"):
        open_video(path.read_bytes(), size=8, backend=backend)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError):
        list(open_video(path, size=8, backend=backend))


def test_torchcodec_where_it_cannot_work(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.mp4", THIRTIETHS[:4])
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match='needs the package torchcodec .* use backend="pyav"'):
        open_video(path, size=8, backend="torchcodec")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(VideoDecoder=None))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            open_video(path, size=8, backend="torchcodec:cuda")


# The clock's border: light grey, red, green, blue, 15 seconds each.
BORDERS = np.array([(218, 218, 218), (255, 0, 0), (0, 128, 0), (0, 0, 255)])
READABLE = [
    "bbb_480p_30s.mp4",
    "bottle_detection_40s.mp4",
    "bt709_full_range_1s.mp4",
    "counting_10s_mpeg4.mp4",
    "derived/bbb_240s_300s_448x252_vp9.webm",
    "derived/bbb_240s_300s_640x360_h265.mp4",
    "flower_timelapse_5s_vp8.webm",
    "frame_numbers_1s_h265.mp4",
    "h264_10bit_1s.mp4",
    "h265_10bit_1s.mp4",
    "one_by_one_person_139s.mp4",
    "phone_desk_h263_vfr.3gp",
    "phone_hevc_hdr10_1s.mp4",
    "phone_portrait_4k60_rot90.mp4",
    "rotation_0_3frames.mov",
    "rotation_90_3frames.mov",
    "rotation_180_3frames.mov",
    "rotation_270_3frames.mov",
    "testpattern_2s_vp9.webm",
    "testsrc_5s_av1.mkv",
]


@pytest.mark.parametrize("name", READABLE)
def test_real_file_gives_the_frames_of_a_plain_decode(videos, warnings, name):
    video = open_video(videos / name, size=32, max_num_frames=9, sample_fps=None)
    batch = next(iter(video))
    assert batch.timestamps == video.timestamps
    wanted, plain, start = dict(zip(batch.timestamps, batch.frames, strict=True)), {}, None
    with av.open(str(videos / name), metadata_errors="ignore") as container:
        for frame in container.decode(video=0):
            start = frame.pts if start is None else start
            second = float((frame.pts - start) * frame.time_base)
            if second in wanted:
                pixels = torch.from_numpy(vd.upright_rgb(frame, vd.display_matrix(frame)))
                plain[second] = vp.resize_frames(pixels.permute(2, 0, 1)[None], 32)
    assert plain.keys() == wanted.keys()
    assert all(torch.equal(plain[second][0], wanted[second]) for second in wanted)
    assert not warnings


@pytest.mark.parametrize("name", ["clock_movie_300s.mp4", "derived/clock_300s_vfr_24_6_12fps.mp4"])
@pytest.mark.parametrize("settings_", [{}, {"max_num_frames": 40, "sample_fps": None}, {"max_num_frames": 100}])
def test_burnt_in_clock(videos, name, settings_):
    video = open_video(videos / name, size=64, **settings_)
    count = 0
    for batch in video:
        for second, colour in zip(batch.timestamps, batch.frames[:, :, 32, 1], strict=True):
            nearest = np.abs(BORDERS - colour.numpy().astype(int)).sum(-1).argmin()
            assert nearest == int(second / 15) % 4, second
            count += 1
    assert count == video.num_frames == settings_.get("max_num_frames", 300)
    if not settings_:
        assert video.timestamps == pytest.approx(list(range(300)))
    assert video.duration == pytest.approx(300, abs=0.1)


@pytest.mark.parametrize(
    ("degrees", "shape"), [(0, (320, 568)), (90, (568, 320)), (180, (320, 568)), (270, (568, 320))]
)
def test_phone_clips_stand_upright(videos, degrees, shape):
    with av.open(str(videos / f"rotation_{degrees}_3frames.mov")) as container:
        frame = next(container.decode(video=0))
    stored = Image.fromarray(frame.to_ndarray(format="rgb24"))
    upright = vd.upright_rgb(frame, vd.display_matrix(frame))
    assert upright.shape == (*shape, 3)
    assert np.array_equal(upright, np.array(stored.rotate(-degrees, expand=True)))


def test_damaged_real_files(videos, warnings):
    video = open_video(videos / "corrupted_decord.mp4", size=32)
    seconds = [second for batch in video for second in batch.timestamps]
    # The picture at 3.0 s is broken; that at 3.2 s was decoded before it, and no key frame follows.
    assert seconds == [second for second in video.timestamps if second <= 3.2 and second != 3.0]
    assert f"{len(seconds)} of {video.num_frames}" in warnings.pop()

    video = open_video(videos / "derived/truncated_moov_front.mp4", size=32)
    whole = open_video(videos / "derived/clock_300s_vfr_24_6_12fps.mp4", size=32, **EVERY_FRAME)
    seconds = [second for batch in video for second in batch.timestamps]
    assert set(seconds) <= set(whole.timestamps)
    assert 179 < seconds[-1] < 182
    assert "of its 3600 frames" in warnings.pop()
    assert not warnings

    with pytest.raises(vp.VideoDecodeError, match="cut off"):
        open_video(videos / "derived/truncated_no_moov.mp4", size=32)


MEMORY = """
import resource
next(iter(vp.open_video(sys.argv[2], size=384, sampling=Sampling(4))))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
frames = sum(len(batch.frames) for batch in vp.open_video(sys.argv[2], size=384, sampling=Sampling(sample_fps=30)))
print(frames, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the resident set in KiB, as Linux does")
def test_memory_does_not_grow_with_the_video(tmp_path, root):
    path = write_clip(
        tmp_path / "long.mp4",
        range(400),
        base=Fraction(1, 30),
        codec="mpeg4",
        picture=lambda number: numbered_picture(number, 1920, 1080),
    )
    command = [sys.executable, "-c", IMPORT + MEMORY, str(root), str(path)]
    frames, grown = map(int, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert frames == 400
    assert grown < 250 * 1024  # KiB; 400 full frames would be 2.4 GB, all resized ones alone 170 MB
