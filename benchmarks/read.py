"""Reading chosen frames of files: this package beside decoding everything with PyAV, and beside other readers.

What is surprising:
* Each reader runs in a process of its own, readers in turn, and gives its frames as uint8 arrays of the file's own
  size, unresized. All are asked for the same frames by number; how far their pixels are from PyAV's is in the table.
* Readers that are not installed are left out and named (`make .venv-peers/.installed` installs all of them, to be run
  with `.venv-peers/bin/python`). OpenCV counts frames, so its times are no part of this.
* Opening, and reading the index of the file where a reader does, are part of the time.
* CPU seconds tell more than the clock's where other work shares the machine.
"""

import resource
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
from common import clock, in_fresh_process, median, parse, parser, report, table

# Encoder, its options, size and seconds of the clips that are made: keyframes are 250 pictures apart.
CLIPS = {
    "h264_480p.mp4": ("libx264", {"x264-params": "keyint=250"}, (854, 480), 60),
    "h264_1080p.mp4": ("libx264", {"x264-params": "keyint=250", "preset": "fast"}, (1920, 1080), 60),
    "hevc_480p.mp4": ("libx265", {"x265-params": "keyint=250:log-level=none", "preset": "fast"}, (854, 480), 60),
    "vp9_480p.webm": ("libvpx-vp9", {"g": "250", "deadline": "realtime", "cpu-used": "6"}, (854, 480), 60),
}
RATE, UNIFORM = 25, 64

EPILOG = """\
examples:
  python benchmarks/read.py --out read_cpu
      Four clips of a minute that are made on the spot, every reader that is installed.

  python benchmarks/read.py --video talk.mp4 lecture.mkv
      Files of yours.
"""


def make_clip(path: Path, name: str) -> None:
    """Writes a clip of soft textures that move across each other, with the noise of a camera."""
    codec, options, (width, height), seconds = CLIPS[name]
    random = np.random.default_rng(0)

    def texture(cell, size):
        coarse = random.integers(0, 255, (size[1] // cell + 2, size[0] // cell + 2, 3), dtype=np.uint8)
        frame = av.VideoFrame.from_ndarray(coarse, format="rgb24")
        return frame.reformat(width=size[0], height=size[1], interpolation="BICUBIC").to_ndarray()

    behind, before = texture(40, (width + 400, height)), texture(12, (width // 3, height // 3))
    noise = random.normal(0, 3, (height + 64, width + 64, 1)).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(seconds * RATE):
            at = int(200 + 200 * np.sin(index / 60))
            picture = behind[:, at : at + width].copy()
            left, top = (int(part / 3 * (1 + np.sin(index / turn))) for part, turn in ((width, 25), (height, 40)))
            picture[top : top + before.shape[0], left : left + before.shape[1]] = before
            y, x = random.integers(0, 64, 2)
            picture = np.clip(picture + noise[y : y + height, x : x + width], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def read_ours(path, wanted):
    from videoxl.video_decoding_videoxl import open_pyav
    from videoxl.video_index_videoxl import read_index

    return [pixels for pixels, _ in open_pyav(path, read_index(path), wanted)(np.asarray)]


def read_everything(path, wanted):
    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        chosen = set(wanted)
        frames = (frame for number, frame in enumerate(container.decode(video=0)) if number in chosen)
        return [frame.reformat(format="rgb24").to_ndarray() for frame in frames]


def read_decord(path, wanted):
    import decord

    return list(decord.VideoReader(path).get_batch(wanted).asnumpy())


def read_torchcodec(path, wanted):
    from torchcodec.decoders import VideoDecoder

    frames = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=0).get_frames_at(wanted)
    return list(frames.data.numpy())


def read_opencv(path, wanted):
    import cv2

    video, chosen = cv2.VideoCapture(path), set(wanted)
    grabbed = (number for number in range(wanted[-1] + 1) if video.grab() and number in chosen)
    return [cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB) for _ in grabbed]


# What reads, and the package that it needs.
READERS = {
    "all, PyAV": (read_everything, "av"),
    "this package": (read_ours, "av"),
    "decord": (read_decord, "decord"),
    "torchcodec": (read_torchcodec, "torchcodec"),
    "OpenCV": (read_opencv, "cv2"),
}


PACKAGES = {"all, PyAV": "av", "decord": "decord2", "torchcodec": "torchcodec", "OpenCV": "opencv-python-headless"}


def measure(reader: str, path: str, wanted: list[int], args) -> dict:
    """One run of one reader, in this process; the pixels are compared with those of every frame decoded."""

    def cpu():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    function, _ = READERS[reader]
    function(path, wanted[:1])  # imports and first opening
    started, cpu_started = clock("cpu"), cpu()
    frames = function(path, wanted)
    seconds, cpu_seconds = clock("cpu") - started, cpu() - cpu_started
    reference = frames if reader == "all, PyAV" else read_everything(path, wanted)
    off = [int(np.abs(one.astype(int) - other).max()) for one, other in zip(frames, reference, strict=False)]
    return {"frames": len(frames), "seconds": seconds, "cpu_seconds": cpu_seconds, "largest_difference": max(off)}


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    arguments.add_argument("--video", nargs="+", help="files to read; without them clips are made")
    args = parse(arguments)
    readers = [name for name, (_, package) in READERS.items() if find_spec(package)]
    absent = sorted(set(READERS) - set(readers))
    results, rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(path) for path in args.video or (Path(folder) / name for name in CLIPS)]
        for path in paths:
            if not args.video:
                make_clip(path, path.name)
            with av.open(str(path)) as container:
                count = sum(packet.size > 0 for packet in container.demux(video=0))
            choices = {
                "1 a second": list(range(0, count, RATE)),
                f"{UNIFORM} uniform": np.linspace(0, count - 1, UNIFORM, dtype=int).tolist(),
            }
            for choice, wanted in choices.items():
                runs = {name: [] for name in readers}
                for _ in range(args.repeats):
                    for name in readers:
                        runs[name].append(in_fresh_process(measure, name, str(path), wanted, args))
                for name, found in runs.items():
                    best = {key: median([run[key] for run in found]) for key in ("seconds", "cpu_seconds")}
                    result = {"file": path.name, "wanted": choice, "reader": name, **found[0], **best}
                    results.append(result)
                    base = next(other for other in reversed(results) if other["reader"] == "all, PyAV")
                    faster = [f"{base[key] / result[key]:.2f}" for key in ("seconds", "cpu_seconds")]
                    rows.append([path.name, choice, name, result["frames"], result["seconds"], result["cpu_seconds"],
                                 *faster, result["largest_difference"]])  # fmt: skip
    table(["file", "frames", "reader", "read", "seconds", "CPU", "x faster", "x CPU", "levels off"], rows)
    if absent:
        print(f"not installed: {', '.join(absent)}")
    args.video = args.video and [Path(path).name for path in args.video]
    versions = {name: version(package) for name, package in PACKAGES.items() if name in readers}
    report("read", args, {"readers": results, "not_installed": absent, "packages": versions})


if __name__ == "__main__":
    main()
