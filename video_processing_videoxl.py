"""Videos and frame lists to uint8 frames of one size with the seconds at which they are shown.

Surprising here: every frame is found by its presentation time, never by counting, because edit lists, variable rates
and reordered frames make the n-th decoded picture another one than expected. The times of all frames come from reading
the packets without decoding them (some 200,000 a second): the index inside an MP4 holds decoding times, that inside a
Matroska file only keyframes, so neither replaces it. A frame is resized as soon as it is decoded, in a background
thread, so memory does not grow with the length or the size of the video and decoding overlaps with the consumer.
Files that break off give what is readable and one warning. Nothing is ever fetched from a network.

Shapes: F frames of the source, n frames of a batch, H x W the size of the source, S the edge of the square result.
"""

import atexit
import math
import os
import re
import struct
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from numbers import Integral
from queue import SimpleQueue
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import logging

try:
    import decord
except (ImportError, OSError):  # OSError: a wheel whose shared libraries this system lacks
    decord = None

logger = logging.get_logger(__name__)

# Frames. A seek empties the decoder's pipeline (up to 16 frames in flight), so it must skip more than that to pay.
_SEEK_SAVES_FRAMES = 16
# Batches that wait for the consumer. One is enough to overlap, two hide uneven decoding times.
_QUEUED_BATCHES = 2
# Frame intervals. Below half an interval of jitter frame i is still the one nearest to time i / fps, so that sampling
# by index and by time choose alike; above it they differ.
_JITTER_FRAMES = 0.5
# Seconds. Absorbs float rounding when a wanted time falls on a frame; no real frame is that short.
_TIME_EPSILON = 1e-6
# Seconds. Decoding times that fall back further than muxer noise are a second recording glued to the first.
_TIME_JUMP = 1.0
# Seconds. decord rounds its times to float32 (0.25 ms at one hour); another frame is further away than this.
_DECORD_SECONDS = 5e-3
# Seconds. How far the length in a header may be off: rounding, and the unknown duration of the last frame.
_TIME_SLACK = 0.5
# Largest denominator tried for a rate that is a simple fraction: 1001 is that of the NTSC rates.
_MAX_RATE_DENOMINATOR = 1001
# Containers whose seeks go by an index. Others (MPEG-TS, AVI, …) are read in order.
_SEEKABLE_FORMATS = {"mov", "mp4", "matroska", "webm"}
_BACKENDS = ("pyav", "decord")


class VideoDecodeError(ValueError):
    """A video that cannot be read; the message names the file, what was expected, what came and what to do."""


# ------------------------------------------------------------------------------------------------ sampling


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def _check_sampling(max_num_frames: int, sample_fps: float | None, max_sample_fps: float | None) -> None:
    _check_count("max_num_frames", max_num_frames)
    for name, value in (("sample_fps", sample_fps), ("max_sample_fps", max_sample_fps)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be frames per second above 0, or None, got {value!r}.")


def _uniform_indices(num_frames: int, count: int) -> list[int]:
    return np.linspace(0, num_frames - 1, count, dtype=int).tolist()


def sample_frame_indices(
    num_frames: int,
    fps: float,
    *,
    max_num_frames: int,
    sample_fps: float | None = 1,
    max_sample_fps: float | None = 4,
) -> list[int]:
    """Chooses frames of a constant-rate video as the reference sampler of Video-XL-2 does.

    Every `round(fps / sample_fps)`-th frame (halves round to even); more of them, up to `max_sample_fps`, while a
    whole multiple fits into `max_num_frames`; and if even the first choice does not fit, `max_num_frames` frames
    spread uniformly. A step below one frame, also that of an unknown rate (`fps <= 0`), is one frame.

    Args:
        num_frames: Frames of the video.
        fps: Its frames per second.
        max_num_frames: The most frames to choose.
        sample_fps: Frames per second to choose; None spreads `min(max_num_frames, num_frames)` frames uniformly.
        max_sample_fps: Upper rate for short videos; None for no more than `sample_fps`.

    Returns:
        Increasing frame indices, none twice; empty for a video without frames.

    Raises:
        ValueError: A setting out of its range.
    """
    _check_sampling(max_num_frames, sample_fps, max_sample_fps)
    if num_frames < 0 or not math.isfinite(fps):
        raise ValueError(f"num_frames must not be negative and fps must be finite, got {num_frames} and {fps}.")
    if num_frames == 0:
        return []
    if sample_fps is None:
        return _uniform_indices(num_frames, min(max_num_frames, num_frames))
    indices = range(0, num_frames, max(1, round(fps / sample_fps)))
    if max_sample_fps is not None:
        # The reference reads this multiple of the chosen frames as a rate, which is exact for sample_fps=1 only.
        rate = min(max_num_frames // len(indices), max_sample_fps)
        if rate > sample_fps:
            indices = range(0, num_frames, max(1, round(fps / rate)))
    if len(indices) > max_num_frames:
        return _uniform_indices(num_frames, max_num_frames)
    return list(indices)


def _constant_rate(times: np.ndarray, nominal: float | None) -> float | None:
    """The frames per second of equally spaced times, or None if they are not equally spaced."""
    last = len(times) - 1
    span = times[-1] - times[0]
    mean = last / span
    jitter = np.abs(times - times[0] - np.arange(last + 1) / mean).max()
    if jitter * mean > _JITTER_FRAMES:
        return None
    # First and last time are each known to the jitter only, so any rate in this interval explains the times. Steps
    # round at halves (30 fps / 4 = 7.5): a mean of 29.9999 from rounded times would choose other frames than 30.
    low = last / (span + 2 * jitter) * (1 - 1e-9)
    high = last / max(span - 2 * jitter, span * 1e-3) * (1 + 1e-9)
    if nominal is not None and low <= nominal <= high:
        return nominal
    for denominator in range(1, _MAX_RATE_DENOMINATOR + 1):
        rate = round(mean * denominator) / denominator
        if low <= rate <= high:
            return rate
    return mean


def _on_display(times: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.unique(np.searchsorted(times, targets + _TIME_EPSILON, side="right") - 1)


def _uniform_in_time(times: np.ndarray, count: int) -> list[int]:
    """Exactly `count` different frames, each on display at its uniformly spread time or else the next one free."""
    shown = np.searchsorted(times, np.linspace(times[0], times[-1], count) + _TIME_EPSILON, side="right") - 1
    chosen: list[int] = []
    for rank, index in enumerate(shown.tolist()):
        latest = len(times) - count + rank
        chosen.append(min(max(index, chosen[-1] + 1 if chosen else 0), latest))
    return chosen


def sample_frame_times(
    frame_times: Sequence[float],
    *,
    max_num_frames: int,
    sample_fps: float | None = 1,
    max_sample_fps: float | None = 4,
    frame_rate: float | None = None,
) -> list[int]:
    """Chooses frames by the times at which they are displayed.

    Times that stay within half a frame interval of an equally spaced grid are a constant rate: the result is that of
    `sample_frame_indices`. Otherwise the same rules hold in the time domain: the frame on display at each multiple
    of `1 / sample_fps`, none twice; the counts that the rules compare are counts of different frames.

    Args:
        frame_times: Display times of all frames in seconds, strictly increasing.
        max_num_frames: As in `sample_frame_indices`.
        sample_fps: As in `sample_frame_indices`.
        max_sample_fps: As in `sample_frame_indices`.
        frame_rate: The rate that the file names, if it does. Of the rates that explain a constant-rate file's rounded
            times it is preferred.

    Returns:
        Increasing frame indices, none twice.

    Raises:
        ValueError: Times that are not finite and strictly increasing, or a setting out of its range.
    """
    _check_sampling(max_num_frames, sample_fps, max_sample_fps)
    times = np.asarray(frame_times, dtype=np.float64)
    if times.ndim != 1 or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise ValueError("frame_times must be a flat list of finite, strictly increasing seconds.")
    if len(times) < 2:
        return list(range(len(times)))
    rate = _constant_rate(times, frame_rate)
    if rate is not None:
        return sample_frame_indices(
            len(times), rate, max_num_frames=max_num_frames, sample_fps=sample_fps, max_sample_fps=max_sample_fps
        )
    if sample_fps is None:
        return _uniform_in_time(times, min(max_num_frames, len(times)))

    def every(per_second: float) -> np.ndarray:
        count = math.floor((times[-1] - times[0] + _TIME_EPSILON) * per_second) + 1
        return _on_display(times, times[0] + np.arange(count) / per_second)

    indices = every(sample_fps)
    if max_sample_fps is not None:
        raised = min(max_num_frames // len(indices), max_sample_fps)
        if raised > sample_fps:
            indices = every(raised)
    if len(indices) > max_num_frames:
        return _uniform_in_time(times, max_num_frames)
    return indices.tolist()


# ------------------------------------------------------------------------------------------------ pixels


def resize_frames(frames: torch.Tensor, size: int, *, exact: bool = False) -> torch.Tensor:
    """Stretches frames to a square, bicubic and antialiased, without keeping the aspect ratio.

    Args:
        frames: uint8 [n, 3, H, W]. NHWC memory (a permuted [n, H, W, 3]) is about twice as fast.
        size: S, in pixels.
        exact: Through PIL, bit for bit what the reference preprocessing computes, some ten times slower. Otherwise
            torch's uint8 kernel, at most 2 of 255 levels away from it.

    Returns:
        uint8 [n, 3, S, S], contiguous, on the device of `frames` (the work is done on the CPU, where torch has the
        uint8 kernel, so the result does not depend on the device).

    Raises:
        ValueError: Another dtype or shape.
    """
    _check_frames(frames)
    if frames.shape[0] == 0:
        return frames.new_empty((0, 3, size, size))
    pixels = frames.cpu()
    if exact:
        images = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in pixels]
        resized = [np.array(image.resize((size, size), Image.Resampling.BICUBIC)) for image in images]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    else:
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return pixels.contiguous().to(frames.device)


def normalize_frames(
    frames: torch.Tensor,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Turns levels into the tower's input: `(frames / 255 - mean) / std`, in float32, then cast.

    Args:
        frames: uint8 [n, 3, S, S], on any device.
        mean: One value, or one per channel.
        std: One value, or one per channel.
        dtype: Of the result.

    Returns:
        [n, 3, S, S] on the device of `frames`.

    Raises:
        ValueError: Another dtype or shape.
    """
    _check_frames(frames)
    mean_, std_ = (torch.tensor(v, dtype=torch.float32, device=frames.device).reshape(-1, 1, 1) for v in (mean, std))
    return frames.to(torch.float32).div_(255).sub_(mean_).div_(std_).to(dtype)


def _check_frames(frames: torch.Tensor) -> None:
    if not isinstance(frames, torch.Tensor) or frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        came = f"{frames.dtype} {tuple(frames.shape)}" if isinstance(frames, torch.Tensor) else type(frames).__name__
        raise ValueError(f"Expected a uint8 tensor [n, 3, H, W], got {came}.")


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d): the stored point (p, q) is shown at (a p + c q, b p + d q).

    One for the whole file: asking a PyAV frame for its side data ties it into a reference cycle, and a hundred large
    frames would wait for the garbage collector.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
            return a, b, c, d
    return 1, 0, 0, 1


def _upright_rgb(frame: av.VideoFrame, matrix: tuple[int, int, int, int]) -> np.ndarray:
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


# ------------------------------------------------------------------------------------------------ files


@dataclass(frozen=True)
class _Index:
    """What the packets of a file tell about its F displayed frames, in display order."""

    keys: list[int]  # presentation time in ticks; the running number where the container stores none
    times: list[float]  # seconds from the first displayed frame
    keyframes: list[int]  # positions in `keys` at which decoding can start
    duration: float  # seconds until the last frame ends
    rate: float | None
    format: str
    numbered: bool
    damage: str | None  # what is wrong with the file, if the packets show it

    def place_of(self, key: int | None) -> int | None:
        """The position of a decoded frame; None for one that is not displayed."""
        place = -1 if key is None else bisect_right(self.keys, key) - 1
        return place if place >= 0 and self.keys[place] == key else None

    def runs(self, wanted: Sequence[int]) -> list[tuple[int | None, list[int]]]:
        """Splits increasing positions into runs to decode in one go, each with the keyframe to seek to, if any."""
        seekable = not self.numbered and not _SEEKABLE_FORMATS.isdisjoint(self.format.split(","))
        runs: list[tuple[int | None, list[int]]] = [(None, [])]
        last = -1
        for place in wanted:
            before = bisect_right(self.keyframes, place) - 1
            if seekable and before >= 0 and self.keyframes[before] - last > _SEEK_SAVES_FRAMES:
                runs.append((self.keyframes[before], []))
            runs[-1][1].append(place)
            last = place
        return runs


def _open(path: str) -> Any:
    # `file:` keeps FFmpeg from reading "a:b.mp4" as a protocol and the whitelist keeps playlists from reaching for a
    # network; "none" keeps a still image called "x%03d.png" from meaning a numbered series. Metadata of old phones is
    # not always UTF-8.
    options = {"protocol_whitelist": "file", "pattern_type": "none"}
    return av.open(f"file:{os.path.abspath(path)}", metadata_errors="ignore", options=options)


def _video_stream(container: Any, path: str) -> Any:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise VideoDecodeError(f"{path}: expected a video stream, found only other streams. Is this an audio file?")
    if stream.codec_context is None:
        raise VideoDecodeError(
            f"{path}: this FFmpeg has no decoder for its video stream. Re-encode it, e.g. to H.264."
        )
    return stream


def _read_index(path: str) -> _Index:
    """Reads the packets of the video stream; see `_Index`."""
    try:
        container = _open(path)
    except av.FFmpegError as error:
        raise VideoDecodeError(
            f"{path}: expected a video file, but FFmpeg cannot open it ({error.strerror}). It may be no video, or cut "
            "off before its index was written: record or copy it again."
        ) from error
    with container:
        stream = _video_stream(container, path)
        packets: list[Any] = []
        keyframes: list[int | None] = []
        intact, damage, latest = 0, None, None
        jump = round(_TIME_JUMP / stream.time_base)
        try:
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                if packet.is_corrupt:
                    damage = "a packet is cut off"
                    continue
                intact += 1
                if packet.dts is not None:
                    if latest is not None and packet.dts < latest - jump:
                        damage = "its clock jumps back (recordings glued together?), only the part before is read"
                        break
                    latest = packet.dts
                if packet.is_keyframe:
                    if not keyframes:
                        packets.clear()  # nothing before the first keyframe can be decoded
                    keyframes.append(packet.pts)
                if not packet.is_discard:  # an edit list has them decoded but not displayed
                    packets.append((packet.pts, packet.dts, packet.duration or 0))
        except av.FFmpegError as error:
            damage = error.strerror
        formats = container.format.name
        announced = len(getattr(stream, "index_entries", ()))  # PyAV before 18 does not show the index
        if "mp4" in formats and intact < announced:
            damage = f"only {intact} of its {announced} frames are in the file"
        index = _build_index(path, packets, keyframes, stream, formats, damage)
        if "matroska" in formats and damage is None:
            # A cut Matroska file just ends. Its header knows the length of the stream, or of the longest stream.
            clock = stream.metadata.get("DURATION", "").split(":")
            announced = (
                sum(float(part) * unit for part, unit in zip(clock, (3600, 60, 1), strict=True))
                if clock[1:]
                else ((container.duration or 0) / av.time_base if len(container.streams) == 1 else 0)
            )
            end = float((stream.start_time or 0) * stream.time_base) + index.duration
            if end < announced - _TIME_SLACK:
                index = replace(index, damage=f"it ends at second {end:.2f} of {announced:.2f}")
        return index


def _build_index(path: str, packets: list, keyframes: list, stream: Any, formats: str, damage: str | None) -> _Index:
    tick, rate = stream.time_base, float(stream.average_rate or 0) or None
    # AVI stores no presentation times (FFmpeg guesses, wrongly for reordered frames), raw streams no times at all.
    numbered = formats == "avi" or all(pts is None for pts, _, _ in packets)
    if numbered:
        ticks = sorted({dts for _, dts, _ in packets if dts is not None})
        if len(ticks) < len(packets):
            tick, ticks = 1 / (stream.average_rate or stream.guessed_rate or 25), list(range(len(packets)))
            if packets:
                logger.warning(f"{path}: the file stores no times; {float(1 / tick):g} frames per second are assumed.")
        durations, start = {}, 0
    else:
        durations = {pts: duration for pts, _, duration in packets if pts is not None}
        # Frames shown before the first keyframe depend on pictures that are not in the file.
        start = keyframes[0] if keyframes and keyframes[0] is not None else min(durations)
        ticks = sorted(pts for pts in durations if pts >= start)
    if not ticks:
        raise VideoDecodeError(f"{path}: expected video frames, the file has none that can be displayed.")
    times = [float((value - ticks[0]) * tick) for value in ticks]
    last = durations.get(ticks[-1], 0) * tick or (times[-1] / (len(times) - 1) if len(times) > 1 else 1 / (rate or 1))
    places = {value: place for place, value in enumerate(ticks)}
    return _Index(
        keys=list(range(len(ticks))) if numbered else ticks,
        times=times,
        keyframes=sorted({places[pts] for pts in keyframes if pts in places}),
        duration=times[-1] + float(last),
        rate=rate,
        format=formats,
        numbered=numbered,
        damage=damage,
    )


def _decode(container: Any, stream: Any, index: _Index) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields the displayed frames with their positions, from wherever the container stands."""
    seen = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            if seen:
                raise
            continue  # a recording that starts between keyframes
        for frame in frames:
            place = index.place_of(seen if index.numbered else frame.pts)
            seen += 1
            if place is not None:
                yield place, frame


def _seek(container: Any, stream: Any, index: _Index, start: int) -> Iterator[tuple[int, av.VideoFrame]] | None:
    """Yields from the keyframe at `start` on; None if the seek led past it."""
    try:
        container.seek(index.keys[start], stream=stream)
        decoded = _decode(container, stream, index)
        for place, frame in decoded:
            # Earlier ones: the seek landed earlier, or they refer to pictures before the keyframe and are broken.
            if place >= start:
                return chain([(place, frame)], decoded) if place == start else None
    except av.FFmpegError:
        pass
    return None


def _pick(decoded: Iterator[tuple[int, av.VideoFrame]], places: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Takes the frames at increasing `places`, and reads no further than the last."""
    targets = deque(places)
    passed: tuple[int, av.VideoFrame] | None = None
    while targets:
        place, frame = next(decoded, (None, None))
        if place is None:
            return
        while targets and targets[0] < place:
            # A packet without a picture (second field, invisible reference): the picture before is on display then.
            targets.popleft()
            if passed is not None:
                yield passed
                passed = None
        if targets and targets[0] == place:
            targets.popleft()
            yield place, frame
            passed = None
        else:
            passed = place, frame


def _read_pyav(path: str, index: _Index, wanted: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
    """Yields uint8 [H, W, 3] and seconds of the wanted positions; ends early where the file does.

    Raises:
        av.FFmpegError: The decoder gave up.
    """
    runs = index.runs(wanted)
    matrix: tuple[int, int, int, int] | None = None
    with _open(path) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        decoded: Iterator[tuple[int, av.VideoFrame]] | None = _decode(container, stream, index)
        for number, (start, places) in enumerate(runs):
            if start is not None:
                decoded = _seek(container, stream, index, start)
            if decoded is None:
                rest = [place for _, later in runs[number:] for place in later]
                break
            for place, frame in _pick(decoded, places):
                matrix = matrix or _display_matrix(frame)
                yield _upright_rgb(frame, matrix), index.times[place]
        else:
            return
    # The index of the container misled the seek: the rest is read in order, from the start.
    yield from _read_pyav(path, replace(index, keyframes=[]), rest)


def _read_decord(path: str, index: _Index, wanted: Sequence[int]) -> Callable[[], Iterator[tuple[np.ndarray, float]]]:
    """As `_read_pyav`, but opened at once and only for files whose frames decord provably finds.

    decord ignores display matrices and edit lists, and hangs on MPEG-TS.
    """
    if decord is None:
        raise ValueError('backend="decord" needs the package decord, which is not installed; use backend="pyav".')
    with _open(path) as container:
        _, frame = next(_decode(container, _video_stream(container, path), index), (0, None))
    if index.numbered or "mpegts" in index.format or (frame is not None and _display_matrix(frame)[0] <= 0):
        raise ValueError(f'{path}: decord hangs on, misplaces or does not turn such files; use backend="pyav".')
    failure = f'{path}: decord cannot read this file; use backend="pyav".'
    try:
        reader = decord.VideoReader(path, ctx=decord.cpu(0))
        starts = np.asarray(reader.get_frame_timestamp(range(len(reader))))[:, 0]
    except (RuntimeError, decord.DECORDError) as error:
        raise VideoDecodeError(failure) from error
    if len(starts) != len(index.times) or np.abs(starts - starts[0] - index.times).max() > _DECORD_SECONDS:
        raise ValueError(
            f"{path}: decord sees {len(starts)} frames at other times than the {len(index.times)} that the file "
            'displays; use backend="pyav".'
        )

    def read() -> Iterator[tuple[np.ndarray, float]]:
        try:
            for place in wanted:
                yield reader[place].asnumpy(), index.times[place]
        except decord.DECORDError as error:
            raise VideoDecodeError(failure) from error

    return read


# ------------------------------------------------------------------------------------------------ frames in memory


def _check_memory_frames(source: Any) -> None:
    """Accepts what `open_video` documents; the pixels are touched only when they are read."""
    whole = isinstance(source, (np.ndarray, torch.Tensor))
    for number, frame in enumerate([source] if whole else source):
        if isinstance(frame, Image.Image):
            kind, fits = f"a PIL image of size {frame.size}", 0 not in frame.size
        elif isinstance(frame, (np.ndarray, torch.Tensor)):
            shape = tuple(frame.shape)
            kind = f"{frame.dtype} {shape}"
            fits = frame.dtype in (np.uint8, torch.uint8) and len(shape) == 3 + whole and shape[-1] == 3
            fits = fits and 0 not in shape[-3:]
        else:
            kind, fits = type(frame).__name__, False
        if not fits:
            expected = "uint8 frames [F, H, W, 3]" if whole else f"frame {number} as a PIL image or uint8 [H, W, 3]"
            raise ValueError(f"Expected {expected}, got {kind}. Channels are RGB and come last.")
    if len(source) == 0:
        raise ValueError("Expected at least one frame, got none.")


def _read_memory(source: Any, seconds: Sequence[float]) -> Iterator[tuple[np.ndarray, float]]:
    for frame, second in zip(source, seconds, strict=True):
        pixels = frame.cpu().numpy() if isinstance(frame, torch.Tensor) else frame
        if isinstance(pixels, Image.Image):
            pixels = pixels.convert("RGB")
        yield np.array(pixels), second  # a copy: torch refuses negative strides and warns of read-only memory


def _memory_timestamps(timestamps: Sequence[float] | None, count: int, sample_fps: float | None) -> list[float]:
    if timestamps is None:
        step = 1 / (sample_fps or 1)
        logger.warning_once(
            f"Frames came without timestamps; they are taken to be {step:g} s apart, from 0. Pass timestamps=[…]."
        )
        return [number * step for number in range(count)]
    seconds = [float(value) for value in timestamps]
    rising = all(later > earlier for earlier, later in zip(seconds, seconds[1:], strict=False))
    if len(seconds) != count or not all(map(math.isfinite, seconds)) or not rising or seconds[0] < 0:
        raise ValueError(
            f"timestamps must be {count} strictly increasing, finite seconds from 0 on, one a frame; got "
            f"{len(seconds)}: {seconds[:6]}{' …' if len(seconds) > 6 else ''}."
        )
    return seconds


# ------------------------------------------------------------------------------------------------ the door


@dataclass(frozen=True)
class FrameBatch:
    """Consecutive frames: `frames` uint8 [n, 3, S, S], `timestamps` n seconds from the first displayed frame."""

    frames: torch.Tensor
    timestamps: list[float]


class VideoFrames:
    """The chosen frames of one video; iterate once to get them as `FrameBatch`es.

    A background thread decodes while the consumer works, at most two batches ahead. Leaving the loop, `close()` or
    the end of a `with` block stops the thread and closes the file. A damaged file may give fewer frames than planned,
    with one warning.

    Attributes:
        num_frames: Frames planned.
        timestamps: Their seconds from the first displayed frame, as planned.
        duration: Seconds from the first displayed frame to the end of the last frame of the source.
        source: The path as given; None for frames in memory.
        sampling: The settings, ready for JSON.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[tuple[np.ndarray, float]]],
        *,
        timestamps: list[float],
        duration: float,
        source: str | None,
        sampling: dict[str, Any],
        batch_frames: int,
        damage: str | None = None,
    ):
        self.num_frames = len(timestamps)
        self.timestamps = timestamps
        self.duration = duration
        self.source = source
        self.sampling = sampling
        self._read = read
        self._batch_frames = batch_frames
        self._damage = damage
        self._started = False
        self._stop = threading.Event()
        self._room = threading.Semaphore(_QUEUED_BATCHES)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "VideoFrames":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops decoding and closes the file. Closing twice does nothing."""
        self._stop.set()
        self._room.release()  # wakes a decoder that waits for the consumer
        # The garbage collector may close an abandoned iterator from any thread, also from the decoder's own.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __iter__(self) -> Iterator[FrameBatch]:
        if self._started or self._stop.is_set():
            raise RuntimeError(
                "These frames were read or closed before: they are decoded once. Call open_video again."
            )
        self._started = True
        return self._batches()

    def _batches(self) -> Iterator[FrameBatch]:
        # Unbounded, but a batch enters only where there is room; the end always does, so that nobody waits forever.
        queue: SimpleQueue = SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(queue,), name="video-decoder", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # an interpreter that ends in the middle must not wait for a thread it froze
        try:
            while (item := queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                self._room.release()
                yield item
        finally:
            atexit.unregister(self.close)
            self.close()

    def _work(self, queue: SimpleQueue) -> None:
        end: BaseException | None = None
        try:
            self._produce(queue)
        except BaseException as error:  # whatever it is, the consumer must see it instead of waiting
            end = error
        queue.put(end)

    def _produce(self, queue: SimpleQueue) -> None:
        size, exact = self.sampling["size"], self.sampling["exact_resize"]
        frames: list[torch.Tensor] = []
        seconds: list[float] = []
        delivered, until, damage = 0, 0.0, self._damage
        cause: BaseException | None = None

        def flush() -> None:
            if frames:
                self._room.acquire()
                queue.put(FrameBatch(torch.cat(frames), list(seconds)))
                frames.clear()
                seconds.clear()

        with closing(self._read()) as reader:
            try:
                for pixels, second in reader:
                    if self._stop.is_set():
                        return
                    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
                    frames.append(resize_frames(image, size, exact=exact))
                    seconds.append(second)
                    delivered, until = delivered + 1, second
                    if len(frames) == self._batch_frames:
                        flush()
            except av.FFmpegError as error:
                cause, damage = error, error.strerror
        name = self.source or "frames in memory"
        if delivered == 0:
            raise VideoDecodeError(
                f"{name}: expected {self.num_frames} frames, none could be decoded ({damage or 'no picture came'}). "
                "The file is damaged: record or copy it again."
            ) from cause
        flush()
        if damage is not None or delivered < self.num_frames:
            logger.warning(
                f"{name} is damaged ({damage or 'pictures are missing'}): {delivered} of {self.num_frames} chosen "
                f"frames could be read, until second {until:.2f}; only these are used."
            )


def open_video(
    source: Any,
    *,
    size: int,
    max_num_frames: int = 512,
    sample_fps: float | None = 1,
    max_sample_fps: float | None = 4,
    timestamps: Sequence[float] | None = None,
    backend: str = "pyav",
    batch_frames: int = 32,
    exact_resize: bool = False,
) -> VideoFrames:
    """Opens a video, chooses its frames and gives them batch by batch, resized.

    Args:
        source: Path of a local file; or frames in memory: a list of PIL images or of uint8 arrays [H, W, 3], or one
            uint8 numpy array or torch tensor [F, H, W, 3]. Frames in memory were chosen by the caller: all of them
            are used, also more than `max_num_frames`.
        size: S, the edge of the square that frames are stretched to, in pixels.
        max_num_frames: The most frames to choose from a file.
        sample_fps: Frames per second to choose from a file; None spreads `max_num_frames` over it.
        max_sample_fps: Upper rate for short files; None for no more than `sample_fps`. See `sample_frame_indices`.
        timestamps: Seconds of frames in memory, strictly increasing. Without them they are `1 / sample_fps` apart.
        backend: "pyav", or "decord" where installed: it refuses the files whose frames decord misplaces, gives up on
            damaged ones, and its colours differ by some levels on 10-bit video.
        batch_frames: n, the most frames of a batch; never changes a frame.
        exact_resize: See `resize_frames`.

    Returns:
        The planned frames; decoding starts with the iteration.

    Raises:
        FileNotFoundError: No such file.
        VideoDecodeError: A file that holds no readable video.
        ValueError: Anything else that was given wrongly.
    """
    _check_sampling(max_num_frames, sample_fps, max_sample_fps)
    _check_count("size", size)
    _check_count("batch_frames", batch_frames)
    if backend not in _BACKENDS:
        raise ValueError(f"Unknown backend {backend!r}; expected one of {', '.join(_BACKENDS)}.")
    sampling = {
        "size": int(size),
        "max_num_frames": int(max_num_frames),
        "sample_fps": sample_fps,
        "max_sample_fps": max_sample_fps,
        "backend": backend,
        "exact_resize": bool(exact_resize),
    }
    if isinstance(source, (str, bytes, os.PathLike)):
        if timestamps is not None:
            raise ValueError("timestamps belong to frames in memory; a file has its own. Leave them out.")
        path = _local_file(os.fsdecode(source))
        index = _read_index(path)
        wanted = sample_frame_times(
            index.times,
            max_num_frames=max_num_frames,
            sample_fps=sample_fps,
            max_sample_fps=max_sample_fps,
            frame_rate=index.rate,
        )
        read = _read_decord(path, index, wanted) if backend == "decord" else partial(_read_pyav, path, index, wanted)
        seconds, duration, damage = [index.times[place] for place in wanted], index.duration, index.damage
    elif isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        _check_memory_frames(source)
        path, damage = None, None
        seconds = _memory_timestamps(timestamps, len(source), sample_fps)
        read = partial(_read_memory, source, seconds)
        last = seconds[-1] - seconds[-2] if len(seconds) > 1 else 1 / (sample_fps or 1)
        duration = seconds[-1] - seconds[0] + last
    else:
        raise ValueError(
            "Expected a path, a list of PIL images or uint8 arrays [H, W, 3], or one uint8 array or tensor "
            f"[F, H, W, 3], got {type(source).__name__}."
        )
    return VideoFrames(
        read,
        timestamps=seconds,
        duration=duration,
        source=path,
        sampling=sampling,
        batch_frames=batch_frames,
        damage=damage,
    )


def _local_file(path: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", path) and not os.path.exists(path):
        raise ValueError(f"{path} is an address; only local files are opened. Download it and pass the path.")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such video file (looked from {os.getcwd()}).")
    if os.path.isdir(path):
        raise VideoDecodeError(f"{path} is a folder, expected a video file. Pass its frames as a list of PIL images.")
    if not os.path.isfile(path):
        raise VideoDecodeError(f"{path} is not a regular file; expected a video file.")
    if os.path.getsize(path) == 0:
        raise VideoDecodeError(f"{path} is empty (0 bytes), expected a video file. Record or copy it again.")
    return path
