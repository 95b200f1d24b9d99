"""Reads thousands of broken videos and counts what comes of them: `python tests/fuzz_videos.py [number of files]`.

Clips of many codecs and containers are made, bytes of them overwritten, cut out, repeated or cut off, by the seeds
below, so that every run sees the same files. Two processes read them one after the other; one that crashes, or is
silent for 20 seconds, is counted and replaced, and its file kept. Not part of the tests: it takes minutes.

What must hold: every file is read, read with a warning, or refused by a `ValueError`; times rise and lie within the
video; the processes do not grow. The exit status says whether it does; the last line is JSON.
"""

import collections
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import warnings
from multiprocessing import connection
from pathlib import Path

FILES, SECONDS, WORKERS = 2000, 20, 2
# Bytes that a process may grow by after its first 100 files: caches of the allocator, not what files leave.
GROWTH, WARM = 300 << 20, 100
CLIPS = {
    **dict.fromkeys(("a.mp4", "a.mkv", "a.ts", "a.flv", "a.h264", "fragmented.mp4"), "libx264"),
    **dict.fromkeys(("b.avi", "b.mp4", "b.mkv", "b.vob"), "mpeg4"),
    **dict.fromkeys(("c.mpg", "c.mxf", "c.ts"), "mpeg2video"),
    **{"d.mp4": "libx265", "e.webm": "libvpx", "f.webm": "libvpx-vp9", "g.mkv": "libsvtav1", "h.asf": "msmpeg4"},
    **{"i.mov": "qtrle", "j.mov": "mjpeg", "k.avi": "mjpeg", "l.3gp": "mpeg4", "m.mov": "svq1", "n.mkv": "ffv1"},
}


def make_clips(folder):
    """The intact files: name -> bytes."""
    import test_field

    clips = {}
    for name, codec in CLIPS.items():
        b_frames = 2 if codec in ("libx264", "mpeg2video", "libx265") else 0
        fragments = {"movflags": "frag_keyframe+empty_moov"} if name.startswith("frag") else {}
        options = {"options": fragments, "settings": test_field.QUIET.get(codec)}
        test_field.write(folder / name, 60, codec, b_frames=b_frames, keys=15, **options)
        clips[name] = (folder / name).read_bytes()
    test_field.edit(folder / "a.mp4", [(0.5, 1, 1), (None, 0.5, 1), (0.2, 1, 1)])
    clips["edited.mp4"] = (folder / "a.mp4").read_bytes()
    if shared := os.environ.get("VIDEOXL_TEST_DATA"):
        for path in sorted(Path(shared, "data", "field").iterdir()):
            if path.suffix in (".mp4", ".mkv", ".avi", ".jfif", ".png"):
                clips[path.name] = path.read_bytes()
    return clips


def mutate(data, random):
    """One to six changes, anywhere or among the first bytes, where the facts of a file lie."""
    data = bytearray(data)
    for _ in range(int(random.integers(1, 7))):
        reach = len(data) if random.random() < 0.85 else min(len(data), 2000)
        if reach < 16:
            break
        place, length = int(random.integers(0, reach)), int(2 ** random.uniform(0, 9))
        kind = random.choice(
            ["byte", "noise", "zeros", "ones", "cut out", "repeat", "cut off"], p=[0.5, *[0.092] * 5, 0.04]
        )
        part = data[place : place + length]
        if kind == "byte":
            data[place] = int(random.integers(0, 256))
        elif kind == "noise":
            data[place : place + length] = random.integers(0, 256, len(part), dtype="uint8").tobytes()
        elif kind in ("zeros", "ones"):
            data[place : place + length] = (b"\0" if kind == "zeros" else b"\xff") * len(part)
        elif kind == "cut out":
            del data[place : place + length]
        elif kind == "repeat":
            data[place:place] = part
        else:
            del data[max(place, 64) :]
    return bytes(data)


def read(path):
    """(outcome, what was wrong) of one file."""
    from sampled import open_video

    said = Said()
    logging.getLogger("transformers").addHandler(said)
    logging.getLogger("videoxl").addHandler(said)
    try:
        with open_video(path, size=32, max_num_frames=500, sample_fps=1000, max_sample_fps=None) as video:
            seconds = [second for batch in video for second in batch.timestamps]
        rising = all(later >= earlier for earlier, later in zip(seconds, seconds[1:], strict=False))
        within = all(math.isfinite(second) and 0 <= second <= video.duration for second in seconds)
        if not rising or not within:
            return "wrong times", f"{seconds[:5]} ... {seconds[-5:]} of {video.duration}"
        return "read with a warning" if said.lines else "read", ""
    except FileNotFoundError:
        raise
    except ValueError as error:
        known = path in str(error)
        return ("refused" if known else "refused without a name"), f"{type(error).__name__}: {error}"
    except BaseException as error:
        return "another error", f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("transformers").removeHandler(said)
        logging.getLogger("videoxl").removeHandler(said)


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def work(pipe):
    """Reads the files whose paths come, and answers with outcome, detail and resident bytes."""
    import conftest  # noqa: F401  (puts the package on the path)
    import torch

    torch.set_num_threads(1)
    logging.getLogger("libav").setLevel(logging.CRITICAL)
    with open(os.devnull, "w") as silence:
        os.dup2(silence.fileno(), 2)
    while (path := pipe.recv()) is not None:
        outcome = read(path)
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
        pipe.send((*outcome, pages * os.sysconf("SC_PAGE_SIZE")))


class Worker:
    """A process that reads files, replaced when it dies or hangs."""

    def __init__(self):
        self.job, self.counted, self.grown = None, 0, 0
        self.start()

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.warm = None

    def give(self, job, path):
        self.job, self.since = (job, path), time.monotonic()
        self.pipe.send(str(path))

    def answer(self):
        """(outcome, detail), None while it reads."""
        try:
            if self.pipe.poll():
                outcome, detail, resident = self.pipe.recv()
                self.counted += 1
                if self.counted == WARM:
                    self.warm = resident
                self.grown = max(self.grown, resident - self.warm if self.warm else 0)
                return outcome, detail
            if self.process.is_alive() and time.monotonic() - self.since < SECONDS:
                return None
            outcome = "hung" if self.process.is_alive() else f"crashed ({self.process.exitcode})"
        except (EOFError, OSError):
            self.process.join(5)
            outcome = f"crashed ({self.process.exitcode})"
        self.process.kill()
        self.process.join()
        self.start()
        return outcome, "the process was replaced"


def main(count):
    import conftest  # noqa: F401  (puts the package on the path)
    import numpy as np

    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(prefix="videoxl-fuzz-"))
    clips = make_clips(folder)
    names = sorted(clips)
    outcomes, bad = collections.Counter(), []
    workers, jobs, start = [Worker() for _ in range(WORKERS)], iter(range(count)), time.monotonic()
    busy = []

    def feed(worker):
        if (job := next(jobs, None)) is None:
            return
        name = names[job % len(names)]
        path = folder / f"{job}_{name}"
        path.write_bytes(mutate(clips[name], np.random.default_rng(job)))
        worker.give(job, path)
        busy.append(worker)

    for worker in workers:
        feed(worker)
    while busy:
        connection.wait([worker.pipe for worker in busy], timeout=1)
        for worker in list(busy):
            if (answer := worker.answer()) is None:
                continue
            busy.remove(worker)
            job, path = worker.job
            outcomes[answer[0]] += 1
            if answer[0] in ("read", "read with a warning", "refused"):
                path.unlink()
            else:
                bad.append((str(path), *answer))
                print(path, *answer)
            feed(worker)
            if sum(outcomes.values()) % 200 == 0:
                print(f"{sum(outcomes.values())} files, {time.monotonic() - start:.0f} s", dict(outcomes))
    grown = max(worker.grown for worker in workers)
    for worker in workers:
        worker.pipe.send(None)
    if not bad:
        shutil.rmtree(folder)
    report = {"files": count, "outcomes": dict(outcomes), "grown_mib": grown >> 20}
    print(json.dumps({**report, "seconds": round(time.monotonic() - start)}))
    return 1 if bad or grown > GROWTH else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if sys.argv[1:] else FILES))
