"""Which frames of a video are used, chosen by number or by display time: pure functions over numbers.

What is surprising:
* A file whose times are equally spaced, up to the rounding of its clock, is sampled by frame number as the references
  do; only a truly variable rate is sampled in the time domain.
* How frames are chosen is a policy of the family's member, a `FrameSampler`. Those of VideoChat-Flash may take a frame
  several times, as published.
* Such a policy is in force while `sample_fps` and `max_sample_fps` are at their defaults; with other values a caller
  has asked for a rate, and gets it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

# Frames per second, and the most for short videos, where the caller names none.
SAMPLE_FPS, MAX_SAMPLE_FPS = 1, 4
# Seconds at the end of a video that the public code keeps clips away from.
CLIP_END_MARGIN = 0.1
_FPS_MODE = re.compile(r"fps(\d+(?:\.\d+)?)")


def check_count(name: str, value: int) -> None:
    """Raises `ValueError` unless the setting `name` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


@dataclass(frozen=True)
class FrameSampler:
    """How frames of a file are chosen.

    Source of all modes but "fps": `get_frame_indices` of the public VideoChat-Flash code.

    Attributes:
        mode: "fps": by `sample_fps`, raised to `max_sample_fps` in short videos (Video-XL-2). "dynamic_fps1": about
            one frame a second (VideoChat-Flash). "middle": the middles of `max_num_frames` equal parts. "fps0.5",
            "fps2", ...: so many frames a second, the first in the middle of the first interval.
        min_num_frames: "dynamic_fps1" takes at least so many, as long as the video has them.
        frame_multiple: "dynamic_fps1" takes a multiple of so many. Published is 8, though the tower's clips have 4.

    Raises:
        ValueError: On an unknown mode or numbers below 1.
    """

    mode: str = "fps"
    min_num_frames: int = 64
    frame_multiple: int = 8

    def __post_init__(self):
        if self.mode not in ("fps", "dynamic_fps1", "middle") and not self.rate:
            raise ValueError(
                f'frame_sampler must be "fps", "dynamic_fps1", "middle" or such as "fps0.5", got {self.mode!r}.'
            )
        check_count("min_num_frames", self.min_num_frames)
        check_count("frame_multiple", self.frame_multiple)

    @property
    def rate(self) -> float | None:
        """Frames per second of the modes that name them; None for others."""
        match = _FPS_MODE.fullmatch(self.mode) if isinstance(self.mode, str) else None
        return float(match[1]) if match and float(match[1]) > 0 else None

    def decides(self, sample_fps: float | None, max_sample_fps: float | None) -> bool:
        """Whether it is this mode, not `sample_fps` and `max_sample_fps`, that says which frames are taken."""
        return self.mode != "fps" and (sample_fps, max_sample_fps) == (SAMPLE_FPS, MAX_SAMPLE_FPS)

    def interval_times(self, seconds: float) -> np.ndarray:
        """When the modes that name a rate take frames of a video of so many seconds."""
        step = 1 / self.rate
        return np.arange(step / 2, seconds + step / 2, step)

    def count(self, num_frames: int, seconds: float, max_num_frames: int) -> int:
        """How many frames the other modes take of a video.

        The least beats the most: a `max_num_frames` below 64 is without effect on videos of 64 frames and more. It
        need be no multiple, then the count is none either; 0 and -1 are no limit.
        """
        if self.mode == "middle":
            return max_num_frames
        multiple = self.frame_multiple
        least = self.min_num_frames if self.min_num_frames <= num_frames else num_frames // multiple * multiple
        count = max(int(seconds // multiple), 1) * multiple
        return max(least, min(count, max_num_frames) if max_num_frames > 0 else count)


# Of all members but VideoChat-Flash.
BY_RATE = FrameSampler()

# Frame intervals. Below half an interval of jitter frame i is still the one nearest to time i / fps, so that sampling
# by index and by time choose alike; above it they differ.
_JITTER_FRAMES = 0.5
# Seconds. Absorbs float rounding when a wanted time falls on a frame; no real frame is that short.
_TIME_EPSILON = 1e-6
# Largest denominator tried for a rate that is a simple fraction: 1001 is that of the NTSC rates.
_MAX_RATE_DENOMINATOR = 1001


def check_sampling(
    max_num_frames: int, sample_fps: float | None, max_sample_fps: float | None, sampler: FrameSampler = BY_RATE
) -> None:
    """Raises `ValueError` for a setting of `sample_frame_indices` out of its range."""
    limited = sampler.mode == "middle" or not sampler.decides(sample_fps, max_sample_fps)
    if limited or not isinstance(max_num_frames, Integral) or max_num_frames > 0:
        check_count("max_num_frames", max_num_frames)
    for name, value in (("sample_fps", sample_fps), ("max_sample_fps", max_sample_fps)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (Real, np.floating)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be frames per second above 0, or None, got {value!r}.")


def _uniform_indices(num_frames: int, count: int) -> list[int]:
    return np.linspace(0, num_frames - 1, count, dtype=int).tolist()


def middle_frame_indices(num_frames: int, count: int) -> list[int]:
    """The middle frames of `count` equal parts of a video; the last one again where it has fewer frames."""
    bounds = np.linspace(0, num_frames, min(count, num_frames) + 1).astype(int)
    indices = ((bounds[:-1] + bounds[1:] - 1) // 2).tolist()
    return indices + indices[-1:] * (count - len(indices))


def sample_frame_indices(
    num_frames: int,
    fps: float,
    *,
    max_num_frames: int,
    sample_fps: float | None = SAMPLE_FPS,
    max_sample_fps: float | None = MAX_SAMPLE_FPS,
    sampler: FrameSampler = BY_RATE,
) -> list[int]:
    """Chooses frames of a constant-rate video as the reference of its sampler does.

    "fps", the sampler of Video-XL-2:

    Every `round(fps / sample_fps)`-th frame (halves round to even); more of them, up to `max_sample_fps`, while a
    whole multiple fits into `max_num_frames`; and if even the first choice does not fit, `max_num_frames` frames
    spread uniformly. A step below one frame, also that of an unknown rate (`fps <= 0`), is one frame.

    Args:
        num_frames: Frames of the video.
        fps: Its frames per second.
        max_num_frames: The most frames to choose.
        sample_fps: Frames per second to choose; None spreads `min(max_num_frames, num_frames)` frames uniformly.
        max_sample_fps: Upper rate for short videos; None for no more than `sample_fps`.
        sampler: The policy.

    Returns:
        Increasing frame indices, by "fps" none twice; empty for a video without frames, or shorter than half an
        interval of "fpsX".

    Raises:
        ValueError: A setting out of its range.
    """
    check_sampling(max_num_frames, sample_fps, max_sample_fps, sampler)
    if num_frames < 0 or not math.isfinite(fps):
        raise ValueError(f"num_frames must not be negative and fps must be finite, got {num_frames} and {fps}.")
    if num_frames == 0:
        return []
    if sampler.decides(sample_fps, max_sample_fps):
        fps = fps if fps > 0 else 1.0
        seconds = num_frames / fps
        if sampler.rate is None:
            return middle_frame_indices(num_frames, sampler.count(num_frames, seconds, max_num_frames))
        indices = np.around(sampler.interval_times(seconds) * fps).astype(int)
        indices = indices[indices < num_frames].tolist()
        return indices[:max_num_frames] if max_num_frames > 0 else indices
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


def _different_frames(times: np.ndarray, targets: np.ndarray) -> list[int]:
    """As many different frames as there are increasing targets, each on display at its target or the next one free."""
    chosen: list[int] = []
    count = len(targets)
    for rank, index in enumerate(_on_display(times, targets).tolist()):
        latest = len(times) - count + rank
        chosen.append(min(max(index, chosen[-1] + 1 if chosen else 0), latest))
    return chosen


def _uniform_in_time(times: np.ndarray, count: int) -> list[int]:
    return _different_frames(times, np.linspace(times[0], times[-1], count))


def _sampled_in_time(times: np.ndarray, seconds: float, sampler: FrameSampler, max_num_frames: int) -> list[int]:
    """The modes other than "fps" in the time domain, for a video of so many seconds."""
    if sampler.rate is not None:
        targets = sampler.interval_times(seconds)
        indices = _on_display(times, times[0] + targets[targets < seconds]).tolist()
        return indices[:max_num_frames] if max_num_frames > 0 else indices
    count = sampler.count(len(times), seconds, max_num_frames)
    parts = min(count, len(times))
    indices = _different_frames(times, times[0] + (np.arange(parts) + 0.5) * seconds / parts)
    return indices + indices[-1:] * (count - parts)


def sample_frame_times(
    frame_times: Sequence[float],
    *,
    max_num_frames: int,
    sample_fps: float | None = SAMPLE_FPS,
    max_sample_fps: float | None = MAX_SAMPLE_FPS,
    frame_rate: float | None = None,
    sampler: FrameSampler = BY_RATE,
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
        sampler: The policy.

    Returns:
        Increasing frame indices, by "fps" none twice.

    Raises:
        ValueError: Times that are not finite and strictly increasing, or a setting out of its range.
    """
    times = _checked_times(frame_times)
    if len(times) == 0:
        return []
    rates = {"sample_fps": sample_fps, "max_sample_fps": max_sample_fps}
    end = _end_of(times, frame_rate)
    return choose_frames(times, end, frame_rate, max_num_frames=max_num_frames, sampler=sampler, **rates).indices


def _checked_times(frame_times: Sequence[float]) -> np.ndarray:
    times = np.asarray(frame_times, dtype=np.float64)
    if times.ndim != 1 or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise ValueError("frame_times must be a flat list of finite, strictly increasing seconds.")
    return times


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are used, and of how much of it.

    Attributes:
        indices: Of the frames, in order.
        start: Where the part begins that they were chosen from, in seconds.
        seconds: Its length.
    """

    indices: list[int]
    start: float
    seconds: float


def choose_frames(
    frame_times: Sequence[float],
    duration: float,
    frame_rate: float | None = None,
    *,
    max_num_frames: int,
    sample_fps: float | None = SAMPLE_FPS,
    max_sample_fps: float | None = MAX_SAMPLE_FPS,
    sampler: FrameSampler = BY_RATE,
    start: float | None = None,
    end: float | None = None,
) -> FrameChoice:
    """Chooses frames of a video, or of a part of it.

    Args:
        frame_times, frame_rate: As in `sample_frame_times`; at least one frame.
        duration: Seconds until the last frame ends.
        max_num_frames, sample_fps, max_sample_fps, sampler: As in `sample_frame_indices`.
        start, end: Of the part, in seconds; None for the video's. As in the public VideoChat-Flash code the part ends
            at least 0.1 s before the video.

    Raises:
        ValueError: As `sample_frame_times`, or a part that is empty or outside the video.
    """
    check_sampling(max_num_frames, sample_fps, max_sample_fps, sampler)
    times = _checked_times(frame_times)
    rate = _constant_rate(times, frame_rate) if len(times) > 1 else frame_rate or 1 / max(duration, _TIME_EPSILON)
    if rate is not None:
        duration = len(times) / rate
    first, count, begin, seconds = 0, len(times), 0.0, duration
    if start is not None or end is not None:
        begin, seconds = _part(start, end, duration)
        if rate is not None:
            # By number, as published; a part shorter than a frame is one frame.
            first = min(int(begin * rate), len(times) - 1)
            count = min(max(int(seconds * rate), 1), len(times) - first)
        else:
            first = max(int(_on_display(times, np.array([times[0] + begin]))[0]), 0)
            count = max(int(np.searchsorted(times, times[0] + begin + seconds - _TIME_EPSILON)) - first, 1)
    settings = {"max_num_frames": max_num_frames, "sample_fps": sample_fps, "max_sample_fps": max_sample_fps}
    if rate is not None:
        indices = sample_frame_indices(count, rate, **settings, sampler=sampler)
    elif sampler.decides(sample_fps, max_sample_fps):
        indices = _sampled_in_time(times[first : first + count], seconds, sampler, max_num_frames)
    else:
        indices = _by_rate_in_time(times[first : first + count], **settings)
    # A video too short for its interval shows at least its middle.
    return FrameChoice([first + index for index in indices or [count // 2]], begin, seconds)


def choose_numbered_frames(
    num_frames: int,
    fps: float,
    *,
    max_num_frames: int,
    sample_fps: float | None = SAMPLE_FPS,
    max_sample_fps: float | None = MAX_SAMPLE_FPS,
    sampler: FrameSampler = BY_RATE,
    start: float | None = None,
    end: float | None = None,
) -> FrameChoice:
    """Chooses frames of a folder, by the rules of the public VideoChat-Flash code where a mode of its is in force.

    Those rules are not those for files: without a part the modes take one frame for a second whatever `fps` is, frame
    0 belongs to no part, and the chosen frames go from the first to the last one of the part.

    Args:
        num_frames: Files in the folder, at least one.
        fps: Frames per second that they stand for.
        max_num_frames, sample_fps, max_sample_fps, sampler, start, end: As in `choose_frames`.

    Raises:
        ValueError: As `choose_frames`.
    """
    settings = {"max_num_frames": max_num_frames, "sample_fps": sample_fps, "max_sample_fps": max_sample_fps}
    settings["sampler"] = sampler
    duration = num_frames / fps
    if not sampler.decides(sample_fps, max_sample_fps):
        times = np.arange(num_frames) / fps
        return choose_frames(times, duration, fps, **settings, start=start, end=end)
    if start is None and end is None:
        return FrameChoice(sample_frame_indices(num_frames, 1.0, **settings) or [num_frames // 2], 0.0, duration)
    _part(start, end, duration)  # raises
    begin, until = max(float(start or 0), 0.0), duration if end is None else float(end)
    first, last = max(1, round(begin * fps)), min(round(until * fps), num_frames - 1)
    count = len(sample_frame_indices(max(int((until - begin) * fps), 1), fps, **settings)) or 1
    indices = np.round(np.linspace(min(first, last), last, count)).astype(int).tolist()
    return FrameChoice(indices, begin, until - begin)


def _part(start: float | None, end: float | None, duration: float) -> tuple[float, float]:
    """Begin and length of a part of a video, in seconds, as published."""
    for name, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)):
            raise ValueError(f"{name} must be a number of seconds, got {value!r}.")
    begin = max(start or 0.0, 0.0)
    until = duration if end is None else end
    # A video that is over within that margin would have no part at all.
    stops = min(duration - CLIP_END_MARGIN, until), min(duration, until)
    stop = next((stop for stop in stops if stop > begin), None)
    if stop is None:
        raise ValueError(
            f"The clip from {start} to {end} s holds nothing of the video, which lasts {duration:.2f} s. Give a start "
            "before its end, and an end behind the start."
        )
    return float(begin), float(stop - begin)


def _end_of(times: np.ndarray, frame_rate: float | None) -> float:
    """When the last frame ends, where nothing says it: after the mean interval."""
    if len(times) > 1:
        return float(times[-1] + (times[-1] - times[0]) / (len(times) - 1))
    return float(times[-1]) + 1 / (frame_rate or 1)


def _by_rate_in_time(
    times: np.ndarray, max_num_frames: int, sample_fps: float | None, max_sample_fps: float | None
) -> list[int]:
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
