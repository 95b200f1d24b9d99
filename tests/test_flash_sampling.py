"""VideoChat-Flash's choice of frames: its published tables, parts of files, folders, GIFs, and what is repeated."""

import hashlib
import json

import av
import numpy as np
import pytest
from PIL import Image
from sampled import choose_frames, choose_numbered_frames, open_video, sample_frame_indices, sample_frame_times
from videoxl.frame_sampling_videoxl import FrameSampler, middle_frame_indices
from videoxl.video_processing_videoxl import VideoDecodeError

DYNAMIC = FrameSampler("dynamic_fps1")
MESSAGE = "\nThe video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled from it. "


@pytest.fixture(scope="module")
def golden(test_data):
    return json.loads((test_data / "golden" / "videochatflash" / "frame_sampling.json").read_text())


def assert_indices(indices, entry):
    assert len(indices) == entry["num_frames"]
    if "indices" in entry:
        assert indices == entry["indices"]
    else:
        text = json.dumps(indices, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == entry["indices_sha256"]


def part_of(entry):
    return {name: (entry.get("media_dict") or {}).get(name) for name in ("start", "end")}


# ---------------------------------------------------------------- the published tables


def test_published_index_function(golden):
    for entry in golden["get_frame_indices"]:
        frames, fps, most = entry["total_frames"], entry["fps"], entry["max_num_frames"]
        if entry["sample"] == "dynamic_fps1":
            sampler = FrameSampler("dynamic_fps1", entry["min_num_frames"], entry["local_num_frames"])
        else:
            sampler = FrameSampler(entry["sample"])
        assert_indices(sample_frame_indices(frames, fps, max_num_frames=most, sampler=sampler), entry)


def test_published_loader_with_and_without_a_part(golden):
    assert len(golden["load_video"]) == 372
    for entry in golden["load_video"]:
        frames, fps = entry["total_frames"], entry["fps"]
        times = [number / fps for number in range(frames)]
        settings = {"max_num_frames": entry["max_num_frames"], "sampler": DYNAMIC, **part_of(entry)}
        choice = choose_frames(times, frames / fps, fps, **settings)
        assert_indices(choice.indices, entry)
        said = MESSAGE.format(duration=choice.seconds, num_frames=len(choice.indices))
        assert said == entry["time_msg"]


def test_published_folder_reader(golden):
    for entry in golden["img_reader"]:
        rate = 3.0 if entry["path_contains_tvqa"] else 1.0
        settings = {"max_num_frames": entry["max_num_frames"], "sampler": DYNAMIC, **part_of(entry)}
        choice = choose_numbered_frames(entry["files"], rate, **settings)
        assert_indices(choice.indices, entry)
        assert MESSAGE.format(duration=choice.seconds, num_frames=len(choice.indices)) == entry["time_msg"]


@pytest.mark.parametrize(
    ("frames", "fps", "most", "count"),
    [
        (5, 30, 512, 8), (60, 30, 512, 56), (63, 30, 512, 56), (64, 30, 512, 64), (300, 30, 512, 64),
        (3000, 30, 512, 96), (3000, 30, 100, 96), (3000, 30, 32, 64), (18000, 30, 512, 512), (18000, 30, 510, 510),
        (108000, 30, 512, 512), (108000, 30, 10000, 3600), (108000, 30, 640, 640), (108000, 30, -1, 3600),
        (108000, 30, 0, 3600), (1, 30, 512, 8),
    ],
)  # fmt: skip
def test_counts(frames, fps, most, count):
    indices = sample_frame_indices(frames, fps, max_num_frames=most, sampler=DYNAMIC)
    assert len(indices) == count and indices == sorted(indices) and set(indices) <= set(range(frames))
    assert len(set(indices)) == min(count, frames)


def test_middles():
    assert middle_frame_indices(300, 64)[:4] == [1, 6, 11, 15]
    assert middle_frame_indices(3, 8) == [0, 1, 2, 2, 2, 2, 2, 2]


def test_a_caller_who_names_a_rate_gets_it():
    options = {"max_num_frames": 512, "sampler": DYNAMIC}
    assert sample_frame_indices(300, 30, **options, sample_fps=None, max_sample_fps=None) == list(range(300))
    assert len(sample_frame_indices(300, 30, sample_fps=2, **options)) == 38  # as Video-XL-2's sampler does
    assert len(sample_frame_indices(300, 30, sample_fps=1, max_sample_fps=None, **options)) == 10
    assert len(sample_frame_indices(300, 30, **options)) == 64
    with pytest.raises(ValueError, match="max_num_frames"):
        sample_frame_indices(300, 30, max_num_frames=0, sample_fps=None, sampler=DYNAMIC)


@pytest.mark.parametrize("mode", ["", "fps0", "rate", "fps-1", "dynamic_fps2", None, 3])
def test_unknown_modes_are_refused(mode):
    with pytest.raises(ValueError, match="frame_sampler must be"):
        FrameSampler(mode)


# ---------------------------------------------------------------- variable rates


def test_a_variable_rate_is_sampled_by_time():
    times = [*np.arange(0, 10, 1 / 30), *np.arange(10, 100, 1.0)]  # 300 frames in 10 s, then 90 in 90 s
    indices = sample_frame_times(times, max_num_frames=512, sampler=DYNAMIC)
    assert len(indices) == 96
    # By number a tenth of the frames would be from behind second 10; by time it is all but the first ten seconds.
    chosen = np.array(times)[indices]
    assert (chosen < 10).sum() <= 24 and len(set(indices)) == 96
    assert indices == sorted(indices)
    few = sample_frame_times([0.0, 0.1, 5.0, 5.05, 40.0], max_num_frames=512, sampler=DYNAMIC)
    assert len(few) == 48 and few[:5] == [0, 1, 2, 3, 4] and set(few[5:]) == {4}
    rated = sample_frame_times(times, max_num_frames=-1, sampler=FrameSampler("fps0.5"))
    assert len(rated) == 50 and abs(times[rated[-1]] - 99) < 1e-6


def test_parts_of_a_variable_rate():
    times = [*np.arange(0, 10, 1 / 30), *np.arange(10, 100, 1.0)]
    choice = choose_frames(times, 100.0, max_num_frames=512, sampler=DYNAMIC, start=20, end=60)
    assert choice.seconds == 40.0 and choice.start == 20.0
    shown = np.array(times)[choice.indices]
    assert shown.min() >= 20 and shown.max() < 60 and len(choice.indices) == 40
    whole = choose_frames(times, 100.0, max_num_frames=512, start=20, end=60, sample_fps=1, max_sample_fps=None)
    assert np.array(times)[whole.indices].tolist() == list(range(20, 60))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "part",
    [
        {"start": 3, "end": 3},
        {"start": 5, "end": 3},
        {"start": 30},
        {"end": -1},
        {"start": "1"},
        {"end": float("nan")},
    ],
)
def test_empty_parts_are_refused(part):
    times = [number / 10 for number in range(100)]
    with pytest.raises(ValueError, match="holds nothing|must be a number"):
        choose_frames(times, 10.0, 10.0, max_num_frames=512, sampler=DYNAMIC, **part)
    with pytest.raises(ValueError, match="holds nothing|must be a number"):
        choose_numbered_frames(10, 1.0, max_num_frames=512, sampler=DYNAMIC, **part)


def test_a_part_shorter_than_a_frame_and_one_at_the_very_end():
    times = [number / 10 for number in range(100)]
    settings = {"max_num_frames": 512, "sampler": DYNAMIC}
    assert choose_frames(times, 10.0, 10.0, start=4.01, end=4.02, **settings).indices == [40] * 8
    last = choose_frames(times, 10.0, 10.0, start=9.95, end=99, **settings)
    assert set(last.indices) == {99} and last.seconds == pytest.approx(0.05)


# ---------------------------------------------------------------- files, folders, GIFs


def pictures(count):
    """Pictures that are told apart by their level: picture i has level 2 i."""
    return [np.full((20, 30, 3), 2 * number, dtype=np.uint8) for number in range(count)]


def levels(frames):
    return [round(float(frame.float().mean()) / 2) for frame in frames]


def read(source, **options):
    with open_video(source, size=8, exact_resize=True, **options) as reader:
        batches = list(reader)
    frames = [frame for batch in batches for frame in batch.frames]
    times = [time for batch in batches for time in batch.timestamps]
    assert times == reader.timestamps and len(times) == reader.num_frames
    return levels(frames), times, reader


@pytest.fixture(scope="module")
def lossless(tmp_path_factory):
    """A file of 50 frames at 10 a second, in which every frame is found exactly; in two containers."""
    folder = tmp_path_factory.mktemp("lossless")
    for name, codec in (("film.mkv", "ffv1"), ("film.avi", "ffv1")):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 30, 20, "bgr0"
            for picture in pictures(50):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return folder


@pytest.fixture
def numbered(tmp_path):
    """A folder of 12 pictures with gaps in their numbers, and what else lies in such folders."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for place, picture in enumerate(pictures(12)):
        number = 3 * place + (90 if place > 6 else 1)
        Image.fromarray(picture).save(folder / f"shot_{number}.png")
    (folder / "subtitles.json").write_text("{}")
    (folder / ".shot_7.png").write_bytes(b"")
    return folder


@pytest.mark.parametrize("name", ["film.mkv", "film.avi"])
def test_frames_of_files_are_the_chosen_ones(lossless, name):
    seen, times, reader = read(str(lossless / name), sampler=DYNAMIC)
    assert seen == middle_frame_indices(50, 48) and reader.duration == pytest.approx(5.0)
    seen, times, reader = read(str(lossless / name), sampler=DYNAMIC, start=1.5, end=2.05)
    assert (reader.start, reader.duration) == (1.5, pytest.approx(0.55))
    assert seen == [15, 16, 17, 18, 19, 19, 19, 19] and times == pytest.approx([level / 10 for level in seen])
    seen, _, reader = read(str(lossless / name), start=1.0, end=3.0, sample_fps=2, max_sample_fps=None)
    assert seen == [10, 15, 20, 25]


def test_batches_of_repeated_frames(lossless):
    with open_video(str(lossless / "film.mkv"), size=8, sampler=DYNAMIC, start=0, end=0.3, batch_frames=4) as reader:
        assert [len(batch.frames) for batch in reader] == [4, 4]
    assert reader.num_frames == 8 and json.loads(json.dumps(reader.sampling))["end"] == 0.3


def test_a_folder_of_pictures(numbered):
    seen, times, reader = read(numbered, read_as="folder", sampler=DYNAMIC)
    assert seen == middle_frame_indices(12, 8) and reader.duration == 12.0 and times == [float(i) for i in seen]
    assert read(str(numbered), read_as="folder", sample_fps=None, max_sample_fps=None)[0] == list(range(12))
    seen, _, reader = read(numbered, read_as="folder", sampler=DYNAMIC, start=2, end=5.4)
    assert seen == np.round(np.linspace(2, 5, 8)).astype(int).tolist() and reader.duration == pytest.approx(3.4)
    tvqa = numbered.rename(numbered.with_name("tvqa_frames"))
    seen, times, reader = read(tvqa, read_as="folder", sampler=DYNAMIC)
    assert len(seen) == 8 and reader.duration == 4.0 and times[-1] == pytest.approx(seen[-1] / 3)


def test_folders_that_cannot_be_read(numbered, tmp_path, lossless):
    (tmp_path / "empty").mkdir()
    options = {"size": 8, "read_as": "folder"}
    with pytest.raises(VideoDecodeError, match="no picture in it"):
        open_video(tmp_path / "empty", **options)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_video(tmp_path / "nowhere", **options)
    with pytest.raises(VideoDecodeError, match="is a file, expected a folder"):
        open_video(lossless / "film.mkv", **options)
    with pytest.raises(VideoDecodeError, match="video_read_type"):
        open_video(numbered, size=8)
    Image.new("RGB", (4, 4)).save(numbered / "cover.jpg")
    with pytest.raises(VideoDecodeError, match="cover.jpg has none"):
        open_video(numbered, **options)
    (numbered / "cover.jpg").unlink()
    (numbered / "shot_4.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="shot_4.png is no image"):
        read(numbered, read_as="folder")
    with pytest.raises(ValueError, match="are for paths"):
        open_video(pictures(3), size=8, start=0, end=1, timestamps=[0, 1, 2])
    with pytest.raises(ValueError, match="read_as must be"):
        open_video(numbered, size=8, read_as="img")


def test_gifs_by_their_own_clock_or_a_second_a_frame(tmp_path):
    path = str(tmp_path / "loop.gif")
    images = [Image.fromarray(picture) for picture in pictures(9)]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=[100, 300, 100, 100, 700, 100, 100, 100, 200]
    )
    seen, times, reader = read(path, read_as="gif", sampler=DYNAMIC)
    assert (len(seen), reader.duration) == (8, 9.0)
    assert seen == middle_frame_indices(9, 8) and times == [float(i) for i in seen]
    seen, times, reader = read(path, sample_fps=None, max_sample_fps=None)
    assert seen == list(range(9)) and times == pytest.approx([0, 0.1, 0.4, 0.5, 0.6, 1.3, 1.4, 1.5, 1.6])
    assert read(path, sampler=DYNAMIC)[2].duration == pytest.approx(1.8, abs=0.11)
