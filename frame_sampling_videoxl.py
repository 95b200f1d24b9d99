"""Which frames of a video are used, chosen by number or by display time: pure functions over numbers.

What is surprising:
* A file whose times are equally spaced, up to the rounding of its clock, is sampled by frame number as the references
  do; only a truly variable rate is sampled in the time domain.
* Every member of the family has its rule, a `FrameSampler`. That of VideoChat-Flash may take a frame several times, as
  published. It holds while `sample_fps` and `max_sample_fps` are at their defaults; with other values a caller has
  asked for a rate, and gets it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

# Where the caller names none: the most frames, frames per second, and the most of these for short videos.
MAX_NUM_FRAMES, SAMPLE_FPS, MAX_SAMPLE_FPS = 512, 1, 4
# What a path leads to: a video file, a GIF whose frames are a second each, a folder of numbered pictures.
READINGS = ("file", "gif", "folder")
# Seconds at the end of a video that the public code keeps clips away from.
CLIP_END_MARGIN = 0.1
_FPS_MODE = re.compile(r"fps(\d+(?:\.\d+)?)")
# Frame intervals. Below half an interval of jitter frame i is still the one nearest to time i / fps, so that sampling
# by index and by time choose alike; above it they differ.
_JITTER_FRAMES = 0.5
# Seconds. Absorbs float rounding when a wanted time falls on a frame; no real frame is that short.
_TIME_EPSILON = 1e-6
# Moments of a rate that are listed; of more, only those near which a frame appears.
_MOST_TARGETS = 10_000_000
# Largest denominator tried for a rate that is a simple fraction: 1001 is that of the NTSC rates.
_MAX_RATE_DENOMINATOR = 1001


def check_count(name: str, value: int) -> None:
    """Raises `ValueError` unless the setting `name` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


@dataclass(frozen=True)
class FrameSampler:
    """The rule of a member for which frames of a file are taken.

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

    @classmethod
    def of(cls, frames_config: Any) -> "FrameSampler":
        """The rule that a `VideoXLFramesConfig` names, or anything with its settings."""
        return cls(frames_config.frame_sampler, frames_config.min_num_frames, frames_config.frame_multiple)

    @property
    def rate(self) -> float | None:
        """Frames per second of the modes that name them; None for others."""
        match = _FPS_MODE.fullmatch(self.mode) if isinstance(self.mode, str) else None
        return float(match[1]) if match and float(match[1]) > 0 else None


@dataclass(frozen=True)
class Sampling:
    """Which frames of a path are wanted. Frames in memory were chosen by the caller: all of them are used.

    Attributes:
        max_num_frames: The most frames. Modes of `sampler` other than "middle" take 0 and -1 for no limit.
        sample_fps: Frames per second; None spreads `max_num_frames` frames uniformly.
        max_sample_fps: Upper rate for short videos; None for no more than `sample_fps`.
        sampler: The member's rule, in force while both rates are at their defaults.
        start, end: The part of the video, in seconds; None for the video's own start and end.
        read_as: What the path leads to, one of `READINGS`.

    Raises:
        ValueError: On a setting out of its range.
    """

    max_num_frames: int = MAX_NUM_FRAMES
    sample_fps: float | None = SAMPLE_FPS
    max_sample_fps: float | None = MAX_SAMPLE_FPS
    sampler: FrameSampler = FrameSampler()
    start: float | None = None
    end: float | None = None
    read_as: str = "file"

    def __post_init__(self):
        for name in ("sample_fps", "max_sample_fps"):
            value = getattr(self, name)
            number = isinstance(value, (Real, np.floating)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < math.inf):
                raise ValueError(f"{name} must be frames per second above 0, or None, got {value!r}.")
        unlimited = self.by_mode and self.sampler.mode != "middle" and isinstance(self.max_num_frames, Integral)
        if not unlimited or self.max_num_frames > 0:
            check_count("max_num_frames", self.max_num_frames)
        for name in ("start", "end"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and math.isfinite(value)):
                raise ValueError(f"{name} must be a number of seconds, got {value!r}.")
        if self.read_as not in READINGS:
            raise ValueError(f"read_as must be one of {', '.join(READINGS)}, got {self.read_as!r}.")

    @property
    def by_mode(self) -> bool:
        """Whether the sampler's mode, not `sample_fps` and `max_sample_fps`, says which frames are taken."""
        return self.sampler.mode != "fps" and (self.sample_fps, self.max_sample_fps) == (SAMPLE_FPS, MAX_SAMPLE_FPS)

    @property
    def has_part(self) -> bool:
        """Whether `start` or `end` is given."""
        return self.start is not None or self.end is not None

    @property
    def limit(self) -> int | None:
        """`max_num_frames`, None where that means no limit."""
        return self.max_num_frames if self.max_num_frames > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        part = {name: None if getattr(self, name) is None else float(getattr(self, name)) for name in ("start", "end")}
        return {**asdict(self), "max_num_frames": int(self.max_num_frames), **part}

    def mode_times(self, seconds: float) -> np.ndarray:
        """The seconds at which a mode that names a rate takes frames of a video that lasts `seconds`."""
        step = 1 / self.sampler.rate
        return np.arange(step / 2, seconds + step / 2, step)

    def mode_count(self, num_frames: int, seconds: float) -> int:
        """How many frames a mode that names no rate takes of a video.

        `min_num_frames` wins over `max_num_frames`: a limit below 64 does nothing to a video of 64 frames or more. The
        count is a multiple of `frame_multiple` unless the limit, which need not be one, cuts it.
        """
        if self.sampler.mode == "middle":
            return self.max_num_frames
        least, multiple = self.sampler.min_num_frames, self.sampler.frame_multiple
        if least > num_frames:
            least = num_frames // multiple * multiple
        count = max(int(seconds // multiple), 1) * multiple
        return max(least, min(count, self.limit or count))


# The settings of a call or an item that decide which frames of a file are taken; the rest is the member's.
SAMPLING_FIELDS = tuple(field.name for field in fields(Sampling) if field.name != "sampler")


@dataclass(frozen=True)
class FrameChoice:
    """Which frames of a video are used, and of how much of it.

    Attributes:
        indices: The frames' numbers, in order.
        start: The second at which the part begins that they were chosen from.
        seconds: The length of that part.
    """

    indices: list[int]
    start: float
    seconds: float


def middle_frame_indices(num_frames: int, count: int) -> list[int]:
    """The middle frames of `count` equal parts of a video; the last one again where it has fewer frames."""
    bounds = np.linspace(0, num_frames, min(count, num_frames) + 1).astype(int)
    indices = ((bounds[:-1] + bounds[1:] - 1) // 2).tolist()
    return indices + indices[-1:] * (count - len(indices))


def sample_frame_indices(num_frames: int, fps: float, sampling: Sampling) -> list[int]:
    """Chooses frames of a constant-rate video, or of a part of one, as the reference of its sampler does.

    "fps", the sampler of Video-XL-2:

    Every `round(fps / sample_fps)`-th frame (halves round to even); more of them, up to `max_sample_fps`, while a
    whole multiple fits into `max_num_frames`; and if even the first choice does not fit, `max_num_frames` frames
    spread uniformly. A step below one frame, also that of an unknown rate (`fps <= 0`), is one frame.

    Args:
        num_frames: Frames to choose from.
        fps: Frames per second.
        sampling: What is wanted of them; its `start` and `end` are not looked at.

    Returns:
        Increasing frame indices, by "fps" none twice; empty for a video without frames, or shorter than half an
        interval of "fpsX".

    Raises:
        ValueError: On numbers out of their range.
    """
    if num_frames < 0 or not math.isfinite(fps):
        raise ValueError(f"num_frames must not be negative and fps must be finite, got {num_frames} and {fps}.")
    if num_frames == 0:
        return []
    if sampling.by_mode:
        fps = fps if fps > 0 else 1.0
        seconds = num_frames / fps
        if sampling.sampler.rate is None:
            return middle_frame_indices(num_frames, sampling.mode_count(num_frames, seconds))
        indices = np.around(sampling.mode_times(seconds) * fps).astype(int)
        return indices[indices < num_frames].tolist()[: sampling.limit]

    def uniform(count: int) -> list[int]:
        return np.linspace(0, num_frames - 1, count, dtype=int).tolist()

    def every(per_second: float) -> list[int]:
        return list(range(0, num_frames, max(1, round(fps / per_second))))

    return _by_rate(every, uniform, num_frames, sampling)


def choose_frames(
    frame_times: Sequence[float], duration: float, frame_rate: float | None, sampling: Sampling
) -> FrameChoice:
    """Chooses frames of a video, or of a part of it, by the times at which they are displayed.

    Times that stay within half a frame interval of an equally spaced grid are a constant rate: the result is that of
    `sample_frame_indices`. Otherwise the same rules hold in the time domain: the frame on display at each multiple
    of `1 / sample_fps`, none twice; the counts that the rules compare are counts of different frames.

    Args:
        frame_times: Display times of all frames in seconds, strictly increasing; at least one.
        duration: Seconds until the last frame ends.
        frame_rate: The rate that the file names, if it does. Of the rates that explain a constant-rate file's rounded
            times it is preferred.
        sampling: What is wanted. As in the public VideoChat-Flash code a part ends at least 0.1 s before the video.

    Raises:
        ValueError: Times that are not finite and strictly increasing, or a part that holds nothing of the video.
    """
    times = np.asarray(frame_times, dtype=np.float64)
    if times.ndim != 1 or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise ValueError("frame_times must be a flat list of finite, strictly increasing seconds.")
    rate = _constant_rate(times, frame_rate) if len(times) > 1 else frame_rate or 1 / max(duration, _TIME_EPSILON)
    if rate is not None:
        duration = len(times) / rate
    first, count, begin, seconds = 0, len(times), 0.0, duration
    if sampling.has_part:
        begin, seconds = _part(sampling, duration)
        if rate is not None:
            # By number, as published; a part shorter than a frame is one frame.
            first = min(int(begin * rate), len(times) - 1)
            count = min(max(int(seconds * rate), 1), len(times) - first)
        else:
            first = max(int(_on_display(times, np.array([times[0] + begin]))[0]), 0)
            count = max(int(np.searchsorted(times, times[0] + begin + seconds - _TIME_EPSILON)) - first, 1)
    if rate is not None:
        indices = sample_frame_indices(count, rate, sampling)
    else:
        indices = _in_time(times[first : first + count], seconds, sampling)
    # A video too short for its interval shows at least its middle.
    return FrameChoice([first + index for index in indices or [count // 2]], begin, seconds)


def choose_numbered_frames(num_frames: int, fps: float, sampling: Sampling) -> FrameChoice:
    """Chooses frames of a folder; where a mode is in force, by the public VideoChat-Flash code's rules for folders.

    These are not the rules for files: without a part the modes take one frame for a second whatever `fps` is, frame 0
    belongs to no part, and the chosen frames go from the first to the last one of the part.

    Args:
        num_frames: Files in the folder, at least one.
        fps: Frames per second that they stand for.
        sampling: What is wanted.

    Raises:
        ValueError: On a part that holds nothing of the folder.
    """
    duration = num_frames / fps
    if not sampling.by_mode:
        return choose_frames(np.arange(num_frames) / fps, duration, fps, sampling)
    if not sampling.has_part:
        return FrameChoice(sample_frame_indices(num_frames, 1.0, sampling) or [num_frames // 2], 0.0, duration)
    _part(sampling, duration)  # raises
    begin, until = max(float(sampling.start or 0), 0.0), duration if sampling.end is None else float(sampling.end)
    first, last = max(1, round(begin * fps)), min(round(until * fps), num_frames - 1)
    count = len(sample_frame_indices(max(int((until - begin) * fps), 1), fps, sampling)) or 1
    indices = np.round(np.linspace(min(first, last), last, count)).astype(int).tolist()
    return FrameChoice(indices, begin, until - begin)


def _by_rate(every, uniform, num_frames: int, sampling: Sampling) -> list[int]:
    """The rule of "fps"; `every(per_second)` and `uniform(count)` give indices, by number or by time."""
    if sampling.sample_fps is None:
        return uniform(min(sampling.max_num_frames, num_frames))
    indices = every(sampling.sample_fps)
    if sampling.max_sample_fps is not None:
        # The reference reads this multiple of the chosen frames as a rate, which is exact for sample_fps=1 only.
        raised = min(sampling.max_num_frames // len(indices), sampling.max_sample_fps)
        if raised > sampling.sample_fps:
            indices = every(raised)
    return indices if len(indices) <= sampling.max_num_frames else uniform(sampling.max_num_frames)


def _in_time(times: np.ndarray, seconds: float, sampling: Sampling) -> list[int]:
    """Chooses among frames of a variable rate, which last for so many seconds."""

    def every(per_second: float) -> list[int]:
        count = math.floor((times[-1] - times[0] + _TIME_EPSILON) * per_second) + 1
        targets = np.arange(count) if count <= _MOST_TARGETS else _first_targets(times, per_second, count)
        return np.unique(_on_display(times, times[0] + targets / per_second)).tolist()

    def uniform(count: int) -> list[int]:
        return _different_frames(times, np.linspace(times[0], times[-1], count))

    if not sampling.by_mode:
        return _by_rate(every, uniform, len(times), sampling)
    if sampling.sampler.rate is not None:
        targets = sampling.mode_times(seconds)
        return _on_display(times, times[0] + targets[targets < seconds]).tolist()[: sampling.limit]
    count = sampling.mode_count(len(times), seconds)
    parts = min(count, len(times))
    indices = _different_frames(times, times[0] + (np.arange(parts) + 0.5) * seconds / parts)
    return indices + indices[-1:] * (count - parts)


def _first_targets(times: np.ndarray, per_second: float, count: int) -> np.ndarray:
    """Of the first `count` moments of a rate those around which a frame appears."""
    near = np.ceil((times - times[0] - _TIME_EPSILON) * per_second)
    return np.clip(np.concatenate([near - 1, near, near + 1]), 0, count - 1)


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


def _part(sampling: Sampling, duration: float) -> tuple[float, float]:
    """Begin and length in seconds of the wanted part of a video, as published."""
    begin = max(sampling.start or 0.0, 0.0)
    until = duration if sampling.end is None else sampling.end
    # A video that is over within that margin would have no part at all.
    stops = min(duration - CLIP_END_MARGIN, until), min(duration, until)
    stop = next((stop for stop in stops if stop > begin), None)
    if stop is None:
        raise ValueError(
            f"The clip from {sampling.start} to {sampling.end} s holds nothing of the video, which lasts "
            f"{duration:.2f} s. Give a start before its end, and an end behind the start."
        )
    return float(begin), float(stop - begin)
