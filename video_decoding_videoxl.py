"""Video files as upright RGB frames with the seconds at which they are shown.

What is surprising:
* Every frame is found by its presentation time, never by counting, because edit lists, variable rates and reordered
  frames make the n-th decoded picture another one than expected.
* Behind a packet that cannot be decoded, decoding goes on at the next keyframe. Which pictures are keyframes only the
  decoder knows: containers flag all of them where their table of keyframes is missing.
* Where there are keyframes enough, several decoders work at once, each from keyframe to keyframe: FFmpeg's own threads
  wait for each other's pictures.

A new decoder is one function with the signature of `open_pyav` and one line in `BACKENDS`.

Shapes: F frames of the source, H x W its size.
"""

import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import av
import numpy as np
import torch
from av.video.frame import PictureType
from transformers.utils import logging

from .video_index_videoxl import (
    SERIES_FORMAT,
    AnyFile,
    MemoryFile,
    SecondFields,
    VideoDecodeError,
    VideoIndex,
    open_file,
    read_packets,
    video_stream,
)

try:
    import decord
except (ImportError, OSError):  # OSError: a wheel whose shared libraries this system lacks
    decord = None

logger = logging.get_logger(__name__)

# Seconds. decord rounds its times to float32 (0.25 ms at one hour); another frame is further away than this.
_FOREIGN_SECONDS = 5e-3
# Decoders that show nothing until they met a picture that needs no other, whatever its packet is flagged as.
_STRICT_DECODERS = {"h264", "hevc", "vvc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9"}
# Decoders of one file at once: each holds the pictures that others refer to.
_MOST_DECODERS = 4
# Chosen frames that one of them reads in one go: it ends at the first keyframe behind so many. What it made of them is
# held, so with more than the most in one go a single decoder reads the file.
_RUN_FRAMES, _MOST_RUN_FRAMES = 8, 48
# From here on a decoder gets a second thread, which costs 5 to 15 % of all work, and up to a fifth of small pictures'.
_UNEVEN = 1.15
DECODER_THREADS = "video-decoder"  # how their names begin

# Reads the chosen frames, once a call: what its argument makes of each (uint8 [H, W, 3]), and its second.
FrameReader = Callable[[Callable[[np.ndarray], Any]], Iterator[tuple[Any, float]]]


class _Misled(Exception):
    """A seek led elsewhere than the index says."""


class _LeftOut(Exception):
    """A frame that was left out is needed."""


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d): the stored point (p, q) is shown at (a p + c q, b p + d q).

    One for the whole file: asking a PyAV frame for its side data ties it into a reference cycle, and a hundred large
    frames would wait for the garbage collector.
    """
    try:
        for data in frame.side_data:
            if data.type.name == "DISPLAYMATRIX":
                a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
                return a, b, c, d
    except ValueError:  # PyAV has no name for some kind beside it (EXIF, spatial video), and so gives none of them
        turn = math.radians(frame.rotation)
        a, b = round(math.cos(turn)), -round(math.sin(turn))
        return a, b, -b, a
    return 1, 0, 0, 1


def upright_rgb(frame: av.VideoFrame, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """A decoded frame as uint8 [H, W, 3], turned and mirrored as the display matrix says."""
    try:
        pixels = frame.reformat(format="rgb24").to_ndarray()
    except OSError:
        logger.warning_once(f"FFmpeg cannot convert the colour matrix {frame.colorspace}; BT.601 is used instead.")
        frame.colorspace = 2  # AVCOL_SPC_UNSPECIFIED
        pixels = frame.reformat(format="rgb24").to_ndarray()
    a, b, c, d = matrix
    # The larger of |a| and |b| tells whether the axes swap, the signs which of them run backwards.
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def _enters(stream: Any, index: VideoIndex, frame: av.VideoFrame) -> bool:
    """Whether a decoder that knew nothing can have made this frame, whatever its packet was flagged as."""
    codec = stream.codec_context.codec
    if codec.name in _STRICT_DECODERS or codec.intra_only:
        return True
    if frame.pict_type == PictureType.NONE:  # all packets flagged as keyframes: a container without such flags
        return len(index.keyframes) < len(index.keys)
    return frame.pict_type in (PictureType.I, PictureType.SI, PictureType.BI)


def _drain(context: Any) -> list[av.VideoFrame]:
    """Empties a decoder that failed, and makes it ready for a keyframe."""
    try:
        return context.decode(None)
    except av.FFmpegError:
        return []
    finally:
        context.flush_buffers()


class _Skips:
    """Has a decoder leave out what nobody needs: frames to which no other one refers.

    Args:
        stream, index: Of the file.
        needed: See `_decode`.
    """

    def __init__(self, stream: Any, index: VideoIndex, needed: set[int] | None):
        self._context, self._index, self._needed = stream.codec_context, index, needed
        # Of another run the decoder may still be told to skip.
        self._context.skip_frame, self._skipping = "DEFAULT", False

    def leaves_out(self, packet: av.Packet) -> bool:
        """Whether not to decode a packet at all; tells the decoder what to do with it otherwise."""
        if self._needed is None:
            return False
        place = None if packet.pts is None else self._index.place_of(packet.pts, -1)
        idle = place is not None and place not in self._needed
        if idle and self._context.codec.intra_only:
            return True
        if (skip := idle and not packet.is_keyframe) != self._skipping:
            self._context.skip_frame, self._skipping = "NONREF" if skip else "DEFAULT", skip
        return False


def _decode(
    container: Any, stream: Any, index: VideoIndex, careful=False, needed: set[int] | None = None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields the displayed frames with their positions, from wherever the container stands.

    Args:
        needed: Positions of frames that have to come; of the others those may be missing that no frame refers to.
            None for all.
        careful: Go on at the next keyframe behind a packet that cannot be decoded. Right only without threads: with
            them an error comes packets late.

    Raises:
        av.FFmpegError: A packet cannot be decoded, unless `careful`.
    """
    fields = SecondFields(container, stream) if careful else None
    skips = _Skips(stream, index, needed)
    count, seen, last = 0, 0, -1  # packets with pictures, frames, the last position
    # For a keyframe behind an error; its position; a frame that needs no other.
    waiting, start, entered = False, 0, True
    for packet in read_packets(container, stream, []):
        if waiting and packet.is_keyframe:
            place = index.place_of(count if index.numbered else packet.pts, last)
            seen, waiting, start, entered = count, False, last + 1 if place is None else place, False
        if careful:
            count += not fields.completes(packet)
        if waiting or skips.leaves_out(packet):
            continue
        try:
            frames = packet.decode()
        except av.FFmpegError:
            if careful:
                frames, waiting = [frame for frame in _drain(stream.codec_context) if frame.pts != packet.pts], True
            elif seen:
                raise
            else:
                continue  # a recording that starts between keyframes
        for frame in frames:
            place = index.place_of(seen if index.numbered else frame.pts, last)
            seen += 1
            if place is None:
                continue
            entered = entered or (place >= start and _enters(stream, index, frame))
            if entered:
                last = place
                yield place, frame


def _seek(container: Any, stream: Any, index: VideoIndex, start: int, *how) -> Iterator:
    """Returns an iterator of frames and positions from the keyframe of a run on.

    Args:
        start: The position of the keyframe.
        how: `careful` and `needed` of `_decode`.

    Raises:
        av.FFmpegError: A packet cannot be decoded, unless `careful`.
        _Misled: The seek led elsewhere, or to what is no keyframe.
    """
    try:
        container.seek(index.keys[start], stream=stream)
    except av.FFmpegError as error:
        raise _Misled from error
    decoded = _decode(container, stream, index, *how)
    # Earlier ones: the seek landed earlier, or they refer to pictures before the keyframe and are broken.
    place, frame = next((found for found in decoded if found[0] >= start), (None, None))
    if place != start or not _enters(stream, index, frame):
        raise _Misled
    return chain([(place, frame)], decoded)


def pick_frames(decoded: Iterator[tuple[int, Any]], places: Sequence[int], lean=False) -> Iterator[tuple[int, Any]]:
    """Takes the frames at increasing `places`, and reads no further than the last.

    Args:
        decoded: Positions, increasing, and frames.
        places: Positions that are wanted.
        lean: Some other frames are left out, but none at these positions or right before them.

    Raises:
        _LeftOut: A frame is needed in whose place another one has to be shown, which was left out.
    """
    targets = deque(places)
    passed: tuple[int, av.VideoFrame] | None = None
    last = -1
    while targets:
        place, frame = next(decoded, (None, None))
        if place is None:
            return
        while targets and targets[0] < place:
            # A packet without a picture (second field, invisible reference): the picture before is on display then.
            if targets.popleft() - 1 != last and lean:
                raise _LeftOut
            if passed is not None:
                yield passed
                passed = None
        last = place
        if targets and targets[0] == place:
            targets.popleft()
            yield place, frame
            passed = None
        else:
            passed = place, frame


def _in_order(jobs: Iterable[Callable[[], Any]], threads: int) -> Iterator[Any]:
    """Runs jobs in threads and yields their results in order, at most one job more ahead than there are threads.

    What `jobs` itself raises comes behind the results of those before.
    """
    waiting: deque[Future] = deque()

    def started() -> Iterator[Future]:
        try:
            yield from (pool.submit(job) for job in jobs)
        except Exception as error:
            failed = Future()
            failed.set_exception(error)
            yield failed

    with ThreadPoolExecutor(threads, DECODER_THREADS) as pool:
        try:
            for future in started():
                waiting.append(future)
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@dataclass(frozen=True)
class _Reading:
    """How a file is read.

    Attributes:
        path, index: The file.
        finish: Makes of uint8 [H, W, 3] what is yielded.
        careful, needed: See `_decode`.

    All methods raise:
        _LeftOut: A frame that was left out is needed.
        av.FFmpegError: A packet cannot be decoded, unless `careful`.
        _Misled: A seek led elsewhere, so the index of the container is not to be trusted.
    """

    path: AnyFile
    index: VideoIndex
    finish: Callable[[np.ndarray], Any]
    careful: bool
    needed: set[int] | None

    def open(self, files: ExitStack, threads: int) -> tuple[Any, Any]:
        """Opens the file for a decoder with so many threads, 0 for as many as there are cores."""
        container = files.enter_context(open_file(self.path, whole=bool(self.index.parts)))
        stream = video_stream(container, self.path)
        stream.thread_type = "NONE" if threads == 1 else "AUTO"
        stream.codec_context.thread_count = threads
        return container, stream

    def decode(self, file: tuple[Any, Any], runs: Iterable[tuple[int | None, list[int]]]) -> Iterator:
        """Yields positions and frames of runs; ends early where the file does."""
        decoded = _decode(*file, self.index, self.careful, self.needed)
        for start, places in runs:
            if start is not None:
                decoded = _seek(*file, self.index, start, self.careful, self.needed)
            yield from pick_frames(decoded, places, lean=self.needed is not None)

    def finished(self, place: int, frame: av.VideoFrame, matrix: tuple[int, int, int, int]) -> tuple[int, Any]:
        return place, self.finish(upright_rgb(frame, matrix))

    def in_one_go(self, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yields positions and finished frames, read by one decoder; another thread finishes them."""
        with ExitStack() as files:
            decoded = self.decode(self.open(files, int(self.careful)), self.index.runs(wanted))
            if first := next(decoded, None):
                matrix = display_matrix(first[1])
                yield from _in_order((partial(self.finished, *found, matrix) for found in chain([first], decoded)), 1)

    def apart(self, runs: Sequence[tuple[int | None, list[int]]], decoders: int) -> Iterator[tuple[int, Any]]:
        """Yields the same, read by several decoders."""
        # The last ones of uneven runs would leave cores idle.
        threads, idle = max(_cores() // decoders, 1 + (_unevenness(runs, decoders) > _UNEVEN)), []

        def read(file, decoded) -> list[tuple[int, Any]]:
            found = [self.finished(*one, matrix) for one in decoded]
            idle.append(file)
            return found

        def read_run(run) -> list[tuple[int, Any]]:
            try:
                file = idle.pop()
            except IndexError:
                file = self.open(files, threads)
            return read(file, self.decode(file, [run]))

        with ExitStack() as files:
            file = self.open(files, threads)
            decoded = self.decode(file, runs[:1])
            first = next(decoded, None)
            if first is None:
                raise _LeftOut
            matrix = display_matrix(first[1])
            jobs = [partial(read, file, chain([first], decoded)), *(partial(read_run, run) for run in runs[1:])]
            yield from chain.from_iterable(_in_order(jobs, decoders))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unevenness(runs: Sequence[tuple[int | None, list[int]]], decoders: int) -> float:
    """How many times longer the busiest decoder works than they do on average."""
    loads = [0] * decoders
    for start, places in runs:
        loads[loads.index(min(loads))] += places[-1] - (start or 0) + 1
    return max(loads) * decoders / sum(loads)


def _read_runs(reading: _Reading, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Yields positions and finished frames, read in the fastest way."""
    runs = [run for run in reading.index.runs(wanted, _RUN_FRAMES) if run[1]]
    # With fewer runs than two for each the last one is waited for too long.
    decoders = min(_cores(), _MOST_DECODERS, len(runs) // 2)
    if reading.needed is None or decoders < 2 or max(len(places) for _, places in runs) > _MOST_RUN_FRAMES:
        return reading.in_one_go(wanted)
    return reading.apart(runs, decoders)


def _read_pyav(path: AnyFile, index: VideoIndex, wanted: Sequence[int], finish: Callable) -> Iterator:
    """Yields what `finish` makes of the wanted positions that the file has, and their seconds.

    Raises:
        av.FFmpegError: Behind the last frame, if some packet could not be decoded.
    """
    problem = None
    # The times of packets tell which frame is in them, but not in all files, and damage may hide in what is left out.
    lean = not index.numbered and not index.guessed and index.damage is None
    for ahead, first, places in index.stretches(wanted):
        left, last, careful = deque(places), first - 1, False
        while left:
            # Where a packet has no picture of its own, the one before is shown.
            needed = {place - before for place in left for before in (0, 1)} if lean and not careful else None
            try:
                with closing(_read_runs(_Reading(path, index, finish, careful, needed), list(left))) as found:
                    for place, finished in found:
                        while left and left[0] <= place:
                            left.popleft()
                        if place > last:
                            last = place
                            yield finished, index.times[place + ahead]
                break
            except _Misled:  # they are read in order, from the start
                index = replace(index, keyframes=[])
            except _LeftOut:
                lean = False
            except av.FFmpegError as error:
                problem = problem or error
                if careful:
                    break
                careful = True
    if problem is not None:
        raise problem


def open_pyav(path: AnyFile, index: VideoIndex, wanted: Sequence[int]) -> FrameReader:
    """The reader of the frames at increasing positions `wanted`; the file is opened when reading starts."""
    return partial(_read_pyav, path, index, wanted)


def _refuse_for(backend: str, path: AnyFile, index: VideoIndex) -> None:
    """Refuses the files of which other decoders ignore the display matrix or the edit list, or on which they hang."""
    if isinstance(path, MemoryFile):
        raise ValueError(f'backend="{backend}" reads local files only, not what is in memory; use backend="pyav".')
    with open_file(path) as container:
        misread = any(name in container.format.name for name in ("mpegts", SERIES_FORMAT))
        stream = video_stream(container, path)
        # decord 3 takes other pictures of HEVC. Two copies of a codec's own library in one process, PyAV's and the
        # system's, crash (libdav1d).
        misread = misread or stream.codec_context.codec.name.startswith("hevc" if backend == "decord" else "lib")
        _, frame = next(_decode(container, stream, index), (0, None))
    if index.numbered or index.parts or misread or (frame is not None and display_matrix(frame)[0] <= 0):
        raise ValueError(f'{path}: {backend} crashes on, misplaces or does not turn such files; use backend="pyav".')


def _refuse_times(backend: str, path: AnyFile, index: VideoIndex, count: int, off: float) -> None:
    if count != len(index.times) or off > _FOREIGN_SECONDS:
        raise ValueError(
            f"{path}: {backend} sees {count} frames at other times than the {len(index.times)} that the file "
            'displays; use backend="pyav".'
        )


def open_decord(path: AnyFile, index: VideoIndex, wanted: Sequence[int]) -> FrameReader:
    """As `open_pyav`, but opened at once and only for files whose frames decord provably finds.

    Raises:
        VideoDecodeError: A file that decord cannot read.
        ValueError: decord is not installed, or would not give the frames that the file displays.
    """
    if decord is None:
        raise ValueError('backend="decord" needs the package decord, which is not installed; use backend="pyav".')
    _refuse_for("decord", path, index)
    failure = f'{path}: decord cannot read this file; use backend="pyav".'
    try:
        reader = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0))
        starts = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
    except (RuntimeError, decord.DECORDError) as error:
        raise VideoDecodeError(failure) from error
    same = len(starts) == len(index.times)
    _refuse_times("decord", path, index, len(starts), np.abs(starts - starts[0] - index.times).max() if same else 0)

    def read(finish: Callable) -> Iterator[tuple[Any, float]]:
        try:
            for place in wanted:
                yield finish(reader[place].asnumpy()), index.times[place]
        except decord.DECORDError as error:
            raise VideoDecodeError(failure) from error

    return read


def open_torchcodec(path: AnyFile, index: VideoIndex, wanted: Sequence[int], device: str = "cpu") -> FrameReader:
    """As `open_decord`, with torchcodec; on a GPU's own decoder the colours are not the same to the bit.

    Raises:
        VideoDecodeError: A file that torchcodec cannot read.
        ValueError: torchcodec does not load, or would not give the frames that the file displays; the latter may show
            when a frame is read.
    """
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: this system lacks FFmpeg's libraries
        raise ValueError(
            'backend="torchcodec" needs the package torchcodec and FFmpeg\'s libraries, and one of them is not '
            f'installed ({str(error).strip().splitlines()[0]}); use backend="pyav".'
        ) from error
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('backend="torchcodec:cuda" needs a CUDA device, there is none; use "torchcodec" or "pyav".')
    _refuse_for("torchcodec", path, index)
    failure = f'{path}: torchcodec cannot read this file{f" on {device}" * (device != "cpu")}; use backend="pyav".'
    try:
        reader = VideoDecoder(os.path.abspath(path), dimension_order="NHWC", num_ffmpeg_threads=0, device=device)
    except (RuntimeError, ValueError) as error:
        raise VideoDecodeError(failure) from error
    begin = reader.metadata.begin_stream_seconds
    _refuse_times("torchcodec", path, index, len(reader), 0)

    def read(finish: Callable) -> Iterator[tuple[Any, float]]:
        for place in wanted:
            try:
                frame = reader.get_frame_at(place)
            except (RuntimeError, IndexError) as error:
                raise VideoDecodeError(failure) from error
            off = abs(frame.pts_seconds - begin - index.times[place])
            _refuse_times("torchcodec", path, index, len(reader), off)
            yield finish(frame.data.cpu().numpy()), index.times[place]

    return read


BACKENDS: dict[str, Callable[[AnyFile, VideoIndex, Sequence[int]], FrameReader]] = {
    "pyav": open_pyav,
    "decord": open_decord,
    "torchcodec": open_torchcodec,
    "torchcodec:cuda": partial(open_torchcodec, device="cuda"),
}
