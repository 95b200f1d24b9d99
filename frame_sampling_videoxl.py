"""Which frames of a video are used, chosen by number or by display time: pure functions over numbers.

Surprising here: a file whose times are equally spaced, up to the rounding of its clock, is sampled by frame number as
the reference does; only a truly variable rate is sampled in the time domain.
"""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

# Frame intervals. Below half an interval of jitter frame i is still the one nearest to time i / fps, so that sampling
# by index and by time choose alike; above it they differ.
_JITTER_FRAMES = 0.5
# Seconds. Absorbs float rounding when a wanted time falls on a frame; no real frame is that short.
_TIME_EPSILON = 1e-6
# Largest denominator tried for a rate that is a simple fraction: 1001 is that of the NTSC rates.
_MAX_RATE_DENOMINATOR = 1001


def check_count(name: str, value: int) -> None:
    """Raises `ValueError` unless the setting `name` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def check_sampling(max_num_frames: int, sample_fps: float | None, max_sample_fps: float | None) -> None:
    """Raises `ValueError` for a setting of `sample_frame_indices` out of its range."""
    check_count("max_num_frames", max_num_frames)
    for name, value in (("sample_fps", sample_fps), ("max_sample_fps", max_sample_fps)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (Real, np.floating)) or not 0 < value < math.inf:
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
    check_sampling(max_num_frames, sample_fps, max_sample_fps)
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
    return np.searchsorted(times, targets + _TIME_EPSILON, side="right") - 1


def _uniform_in_time(times: np.ndarray, count: int) -> list[int]:
    """Exactly `count` different frames, each on display at its uniformly spread time or else the next one free."""
    chosen: list[int] = []
    for rank, index in enumerate(_on_display(times, np.linspace(times[0], times[-1], count)).tolist()):
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
    check_sampling(max_num_frames, sample_fps, max_sample_fps)
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
        return np.unique(_on_display(times, times[0] + np.arange(count) / per_second))

    indices = every(sample_fps)
    if max_sample_fps is not None:
        raised = min(max_num_frames // len(indices), max_sample_fps)
        if raised > sample_fps:
            indices = every(raised)
    if len(indices) > max_num_frames:
        return _uniform_in_time(times, max_num_frames)
    return indices.tolist()
