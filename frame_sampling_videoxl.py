"""Which frames of a video are used, chosen by number or by display time: pure functions over numbers.

F frames, times in seconds. A setting out of its range is a ValueError.

What is surprising:
* A file whose times are equally spaced, up to the rounding of its clock, is sampled by frame number as the references
  do; only a truly variable rate is sampled in the time domain.
* Every member of the family has its rule, a `FrameSampler`. That of VideoChat-Flash may take a frame several times, as
  published. It holds while `sample_fps` and `max_sample_fps` are at their defaults; with other values a caller has
  asked for a rate, and gets it.
"""

import math
import re
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
# In frame intervals. Below it frame i is still nearest to time i / fps: sampling by number and by time choose alike.
_JITTER_FRAMES = 0.5
_TIME_EPSILON = 1e-6  # seconds; absorbs float rounding when a wanted time falls on a frame: no frame is that short
_MOST_TARGETS = 10_000_000  # moments of a rate that are listed; of more, only those near which a frame appears
_MAX_RATE_DENOMINATOR = 1001  # the largest one tried for a rate that is a simple fraction: that of the NTSC rates


def plain_number(value: Any) -> Any:
    """A number of whatever kind (numpy's, fractions) as Python's own, which JSON knows; other values as they are."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, (Real, np.floating)) else value


def check_count(name: str, value: int) -> None:
    """Raises `ValueError` unless the setting `name` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r:.200}.")


@dataclass(frozen=True)
class FrameSampler:
    """The rule of a member for which frames of a file are taken.

    "fps": by `sample_fps`, raised to `max_sample_fps` in short videos (Video-XL-2). The other modes are those of
    `get_frame_indices` in the public VideoChat-Flash code. "dynamic_fps1": about one frame a second. "middle": the
    middles of `max_num_frames` equal parts. "fps0.5", "fps2", ...: so many frames a second, the first in the middle of
    the first interval.
    """

    mode: str = "fps"
    min_num_frames: int = 64  # that "dynamic_fps1" takes, as long as the video has them
    frame_multiple: int = 8  # of which "dynamic_fps1" takes a multiple; as published, though the tower's clips have 4

    def __post_init__(self):
        if self.mode not in ("fps", "dynamic_fps1", "middle") and not self.rate:
            known = '"fps", "dynamic_fps1", "middle" or such as "fps0.5"'
            raise ValueError(f"frame_sampler must be {known}, got {self.mode!r:.200}.")
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
    """Which frames of a path are wanted. Frames in memory were chosen by the caller: all of them are used."""

    max_num_frames: int = MAX_NUM_FRAMES  # at most; all modes of `sampler` but "middle" take 0 and -1 for no limit
    sample_fps: float | None = SAMPLE_FPS  # frames per second; None spreads `max_num_frames` frames uniformly
    max_sample_fps: float | None = MAX_SAMPLE_FPS  # for short videos; None for no more than `sample_fps`
    sampler: FrameSampler = FrameSampler()  # the member's rule, in force while both rates are at their defaults
    start: float | None = None  # of the part that is wanted, in seconds; None for the video's own start and end
    end: float | None = None
    read_as: str = "file"  # what the path leads to, one of `READINGS`

    def __post_init__(self):
        for name in ("max_num_frames", "sample_fps", "max_sample_fps", "start", "end"):
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        for name in ("sample_fps", "max_sample_fps", "start", "end"):
            value, is_rate = getattr(self, name), name.endswith("fps")
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and not (number and (value > 0 or not is_rate)):
                wanted = "frames per second above 0, or None" if is_rate else "a number of seconds"
                raise ValueError(f"{name} must be {wanted}, got {value!r:.200}.")
        unlimited = self.by_mode and self.sampler.mode != "middle" and isinstance(self.max_num_frames, Integral)
        if not unlimited or self.max_num_frames > 0:
            check_count("max_num_frames", self.max_num_frames)
        if self.read_as not in READINGS:
            raise ValueError(f"read_as must be one of {', '.join(READINGS)}, got {self.read_as!r:.200}.")

    @property
    def by_mode(self) -> bool:
        """Whether the sampler's mode, not `sample_fps` and `max_sample_fps`, says which frames are taken."""
        return self.sampler.mode != "fps" and (self.sample_fps, self.max_sample_fps) == (SAMPLE_FPS, MAX_SAMPLE_FPS)

    @property
    def has_part(self) -> bool:
        """Whether a part of the video is wanted."""
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

        `min_num_frames` wins over `max_num_frames`; what that cuts off need not leave a multiple of `frame_multiple`.
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
    """Which frames of a video are used, in order, and the part that they were chosen from: its start and length."""

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

    "fps", the sampler of Video-XL-2: every `round(fps / sample_fps)`-th frame (halves round to even); more of them, up
    to `max_sample_fps`, while a whole multiple fits into `max_num_frames`; and if even the first choice does not fit,
    `max_num_frames` frames spread uniformly. A step below one frame is one frame.

    Args:
        num_frames: Frames to choose from.
        fps: Their number per second; 0 or less where it is not known.
        sampling: What is wanted of them; its `start` and `end` are not looked at.

    Returns:
        Increasing frame numbers, by "fps" none twice; none of a video shorter than half an interval of "fpsX".
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
    return _by_rate(
        lambda per_second: list(range(0, num_frames, max(1, round(fps / per_second)))),
        lambda count: np.linspace(0, num_frames - 1, count, dtype=int).tolist(),
        num_frames,
        sampling,
    )


def choose_frames(frame_times, duration: float, frame_rate: float | None, sampling: Sampling) -> FrameChoice:
    """Chooses frames of a video, or of a part of it, by the times at which they are displayed.

    Times that stay within half a frame interval of an equally spaced grid are a constant rate: the result is that of
    `sample_frame_indices`. Otherwise the same rules hold in the time domain: the frame on display at each multiple
    of `1 / sample_fps`, none twice; the counts that the rules compare are counts of different frames.

    Args:
        frame_times: [F] when the frames are displayed, strictly increasing; at least one.
        duration: Seconds until the last frame ends.
        frame_rate: The rate that the file names, if it does: preferred among those that explain rounded times.
        sampling: What is wanted. As in the public VideoChat-Flash code a part ends at least 0.1 s before the video.

    Raises:
        ValueError: Also on times that do not increase, or a part that holds nothing of the video.
    """
    times = np.asarray(frame_times, dtype=np.float64)
    if times.ndim != 1 or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        raise ValueError("frame_times must be a flat list of finite, strictly increasing seconds.")
    rate = _constant_rate(times, frame_rate) if len(times) > 1 else frame_rate or 1 / max(duration, _TIME_EPSILON)
    if rate is not None:
        duration = len(times) / rate
    begin, seconds = _part(sampling, duration) if sampling.has_part else (0.0, duration)
    first, count = 0, len(times)
    if rate is not None:
        if sampling.has_part:  # by number, as published; a part shorter than a frame is one frame
            first = min(int(begin * rate), len(times) - 1)
            count = min(max(int(seconds * rate), 1), len(times) - first)
        indices = sample_frame_indices(count, rate, sampling)
    else:
        if sampling.has_part:
            first = max(int(_on_display(times, times[0] + begin)), 0)
            count = max(int(np.searchsorted(times, times[0] + begin + seconds - _TIME_EPSILON)) - first, 1)
        indices = _in_time(times[first : first + count], seconds, sampling)
    # A video too short for its interval shows at least its middle.
    return FrameChoice([first + index for index in indices or [count // 2]], begin, seconds)


def choose_numbered_frames(num_frames: int, fps: float, sampling: Sampling) -> FrameChoice:
    """Chooses frames of a folder; where a mode is in force, by the public VideoChat-Flash code's rules for folders.

    These are not the rules for files: without a part the modes take one frame for a second whatever `fps` is, frame 0
    belongs to no part, and the chosen frames go from the first to the last one of the part. `num_frames` is the number
    of files, at least one; `fps` is how many of them stand for a second.
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
    last, span = len(times) - 1, times[-1] - times[0]
    mean = last / span
    jitter = np.abs(times - times[0] - np.arange(last + 1) / mean).max()
    if jitter * mean > _JITTER_FRAMES:
        return None
    # Both ends are known to the jitter only, so any rate in this interval explains the times. Steps round at halves
    # (30 fps / 4 = 7.5): a mean of 29.9999 from rounded times would choose other frames than 30.
    low = last / (span + 2 * jitter) * (1 - 1e-9)
    high = last / max(span - 2 * jitter, span * 1e-3) * (1 + 1e-9)
    if nominal is not None and low <= nominal <= high:
        return nominal
    for denominator in range(1, _MAX_RATE_DENOMINATOR + 1):
        rate = round(mean * denominator) / denominator
        if low <= rate <= high:
            return rate
    return mean


def _on_display(times: np.ndarray, targets):
    return np.searchsorted(times, targets + _TIME_EPSILON, side="right") - 1


def _different_frames(times: np.ndarray, targets: np.ndarray) -> list[int]:
    """As many different frames as there are increasing targets, each on display at its target or the next one free."""
    chosen: list[int] = []
    for latest, index in enumerate(_on_display(times, targets).tolist(), start=len(times) - len(targets)):
        chosen.append(min(max(index, chosen[-1] + 1 if chosen else 0), latest))
    return chosen


def _part(sampling: Sampling, duration: float) -> tuple[float, float]:
    """Begin and length of a part of a video, in seconds, as published."""
    begin, until = max(sampling.start or 0.0, 0.0), duration if sampling.end is None else sampling.end
    # A video that is over within that margin would have no part at all.
    for stop in (min(duration - CLIP_END_MARGIN, until), min(duration, until)):
        if stop > begin:
            return float(begin), float(stop - begin)
    raise ValueError(
        f"The clip from {sampling.start} to {sampling.end} s holds nothing of the video, which lasts {duration:.2f} "
        "s. Give a start before its end, and an end behind the start."
    )
