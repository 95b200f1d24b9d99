"""Videos, GIFs, folders of pictures and frame lists to uint8 frames of one size with the seconds they are shown at.

What is surprising:
* A frame is resized as soon as it is decoded, in background threads, so memory does not grow with the length or the
  size of the video and decoding overlaps with the consumer.
* Files that break off give what is readable and one warning.
* Frames that were chosen several times are decoded once.
* A GIF read as "gif" shows each of its frames for a second, as the public VideoChat-Flash code has it; read as "file",
  for as long as it says.
* A folder of pictures stores no times. The public VideoChat-Flash code takes its pictures to be a second apart, and
  three to the second where the path contains "tvqa" (that data set's frames); so does this. Pictures are ordered by
  the number at the end of their names, not alphabetically, and numbers may be missing.

Shapes: F frames of the source, n frames of a batch, H x W the size of the source, S the edge of the square result.
"""

import atexit
import math
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from queue import SimpleQueue
from typing import Any

import av
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import logging

from .frame_sampling_videoxl import SAMPLE_FPS, Sampling, check_count, choose_frames, choose_numbered_frames
from .image_processing_videoxl import existing_image, is_heif, is_image_file, load_image, reading_image, to_rgb
from .video_decoding_videoxl import BACKENDS, DECODER_THREADS, FrameReader
from .video_index_videoxl import AnyFile, MemoryFile, VideoDecodeError, read_index, size_of

__all__ = ["FrameBatch", "VideoDecodeError", "VideoFrames", "normalize_frames", "open_video", "resize_frames"]

logger = logging.get_logger(__name__)

# Batches that wait for the consumer. One is enough to overlap, two hide uneven decoding times.
_QUEUED_BATCHES = 2
# Of a damaged file, in a warning.
_NAMED_SPANS = 3
# Endings of a folder's pictures; other files in it are left alone. How many are a second, by what the path contains.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
FOLDER_RATES = (("tvqa", 3.0), ("", 1.0))
_PICTURE_NUMBER = re.compile(r"(\d+)\.\w+$")
# How a frame becomes a square, see `resize_frames`.
FITS = ("stretch", "crop")


def resize_frames(frames: torch.Tensor, size: int, *, exact: bool = False, fit: str = "stretch") -> torch.Tensor:
    """Makes frames square, bicubic and antialiased.

    Args:
        frames: uint8 [n, 3, H, W]. NHWC memory (a permuted [n, H, W, 3]) is about twice as fast.
        size: S, in pixels.
        exact: Through PIL, bit for bit what the reference preprocessing computes, some ten times slower. Otherwise
            torch's uint8 kernel, at most 2 of 255 levels away from it.
        fit: `"stretch"` changes the shape to a square, `"crop"` scales the short side to S and cuts out the middle.

    Returns:
        uint8 [n, 3, S, S], contiguous, on the device of `frames` (the work is done on the CPU, where torch has the
        uint8 kernel, so the result does not depend on the device).

    Raises:
        ValueError: Another dtype, shape or fit.
    """
    _check_frames(frames)
    _check_fit(fit)
    if frames.shape[0] == 0:
        return frames.new_empty((0, 3, size, size))
    pixels, (height, width) = frames.cpu(), (size, size)
    if fit == "crop":
        # The long side is truncated to whole pixels, as in the reference (CLIP's preprocessing).
        short = min(frames.shape[2:])
        height, width = (size * side // short for side in frames.shape[2:])
    if exact:
        images = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in pixels]
        resized = [np.array(image.resize((width, height), Image.Resampling.BICUBIC)) for image in images]
        pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)
    else:
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, :, top : top + size, left : left + size].contiguous().to(frames.device)


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


def _check_fit(fit: str) -> None:
    if fit not in FITS:
        raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r:.200}.")


def _check_memory_frames(source: Any) -> None:
    """Accepts what `open_video` documents; the pixels are touched only when they are read."""
    whole = isinstance(source, (np.ndarray, torch.Tensor))
    for number, frame in enumerate([source] if whole else source):
        if isinstance(frame, Image.Image):
            kind, fits = f"a PIL image of size {frame.size}", 0 not in frame.size
        elif isinstance(frame, (str, os.PathLike)):
            kind, fits = f"the path {frame}", is_image_file(os.fspath(frame)) and existing_image(os.fspath(frame))
        elif isinstance(frame, (np.ndarray, torch.Tensor)):
            shape = tuple(frame.shape)
            kind = f"{frame.dtype} {shape}"
            fits = frame.dtype in (np.uint8, torch.uint8) and len(shape) == 3 + whole and shape[-1] == 3
            fits = fits and 0 not in shape[-3:]
        else:
            kind = type(frame).__name__
            fits = isinstance(frame, MemoryFile) and is_image_file(frame)
        if not fits:
            frame_kinds = "a PIL image, uint8 [H, W, 3] or an image file"
            expected = "uint8 frames [F, H, W, 3]" if whole else f"frame {number} as {frame_kinds}"
            several = "; several videos are a list of {'type': 'video', 'video': path}" * isinstance(
                frame, (str, MemoryFile)
            )
            raise ValueError(f"Expected {expected}, got {kind}{several}. Channels are RGB and come last.")
    if len(source) == 0:
        raise ValueError("Expected at least one frame, got none.")


def _read_memory(source: Any, seconds: Sequence[float], finish: Callable) -> Iterator[tuple[Any, float]]:
    for number, (frame, second) in enumerate(zip(source, seconds, strict=True)):
        pixels = frame.cpu().numpy() if isinstance(frame, torch.Tensor) else frame
        if isinstance(pixels, Image.Image):
            with reading_image(f"frame {number} {getattr(frame, 'filename', '')}".rstrip()):
                pixels = to_rgb(pixels)
        elif isinstance(pixels, (str, os.PathLike, MemoryFile)):
            pixels = load_image(pixels)
        yield finish(np.array(pixels)), second  # a copy: torch refuses negative strides and warns of read-only memory


def _memory_timestamps(timestamps: Sequence[float] | None, count: int, sample_fps: float | None) -> list[float]:
    if timestamps is None:
        step = 1 / (sample_fps or SAMPLE_FPS)
        logger.warning_once(
            f"Frames came without timestamps; they are taken to be {step:g} s apart, from 0. Pass timestamps=[…]."
        )
        return [number * step for number in range(count)]
    try:
        seconds = [float(value) for value in timestamps]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"timestamps must be {count} numbers, the seconds of the frames; got {timestamps!r:.200}."
        ) from error
    rising = all(later > earlier for earlier, later in zip(seconds, seconds[1:], strict=False))
    if len(seconds) != count or not all(map(math.isfinite, seconds)) or not rising or seconds[0] < 0:
        raise ValueError(
            f"timestamps must be {count} strictly increasing, finite seconds from 0 on, one a frame; got "
            f"{len(seconds)}: {seconds[:6]}{' …' if len(seconds) > 6 else ''}."
        )
    return seconds


def list_pictures(folder: AnyFile) -> list[str]:
    """The paths of a folder's pictures, in the order of their numbers.

    Raises:
        FileNotFoundError: No such folder.
        VideoDecodeError: A file, or a folder without numbered pictures.
    """
    if isinstance(folder, MemoryFile):
        raise VideoDecodeError(f"{folder} is no folder of pictures; its video_read_type is 'decord' or 'gif'.")
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{folder:.300}: no such folder (looked from {os.getcwd()}).")
    if not os.path.isdir(folder):
        raise VideoDecodeError(
            f"{folder} is a file, expected a folder of pictures. For a video file the video_read_type is 'decord'."
        )
    names = [name for name in os.listdir(folder) if name.lower().endswith(PICTURE_SUFFIXES) and name[0] != "."]
    numbers = {name: _PICTURE_NUMBER.search(name) for name in names}
    if not names or (unnumbered := sorted(name for name in names if numbers[name] is None)):
        found = f"{unnumbered[0]} has none" if names else "there is no picture in it"
        raise VideoDecodeError(
            f"{folder}: expected pictures whose names end in their number, such as frame_1.jpg; {found}. Rename them, "
            "or pass the frames as a list of PIL images with timestamps."
        )
    # The text in front of the number only orders pictures of the same number.
    ordered = sorted(names, key=lambda name: (int(numbers[name][1]), name))
    return [os.path.join(folder, name) for name in ordered]


def open_pictures(paths: Sequence[str], seconds: Sequence[float], wanted: Sequence[int]) -> FrameReader:
    """The reader of the pictures at positions `wanted`."""

    def read(finish: Callable) -> Iterator[tuple[Any, float]]:
        for place in wanted:
            yield finish(np.array(load_image(paths[place]))), seconds[place]

    return read


@dataclass(frozen=True)
class ChosenFrames:
    """Which frames of a source are read, and how.

    Attributes:
        read: Gives the frames.
        seconds: Of the frames, as planned; some come several times.
        start: Seconds at which the part begins that they are from.
        duration: Seconds of that part.
        damage: What is wrong with a file, if its packets show it.
    """

    read: FrameReader
    seconds: list[float]
    start: float
    duration: float
    damage: str | None = None


def open_path(path: AnyFile, sampling: Sampling, backend: str = "pyav") -> ChosenFrames:
    """Chooses frames of what a path leads to.

    Args:
        path: Of a local file or folder, or a file's content.
        sampling: What is wanted of it.
        backend: Of a file, a name in `BACKENDS`.

    Raises:
        FileNotFoundError, ValueError, VideoDecodeError: If there is nothing that can be read, or nothing of the part.
    """
    damage = None
    if sampling.read_as == "folder":
        pictures, rate = list_pictures(path), next(rate for part, rate in FOLDER_RATES if part in path)
        times = [number / rate for number in range(len(pictures))]
        choice = choose_numbered_frames(len(pictures), rate, sampling)
        duration, opener = choice.seconds, partial(open_pictures, pictures, times)
    elif is_heif(_local_file(path)):
        load_image(path)  # refused now, not when it is read
        times = [0.0]
        choice = choose_numbered_frames(1, 1.0, sampling)
        duration, opener = choice.seconds, partial(open_pictures, [path], times)
    else:
        index = read_index(path)
        if sampling.read_as == "gif":
            times = [float(number) for number in range(len(index.times))]
            index = replace(index, times=times, rate=1.0, duration=float(len(times)))
        times, damage = index.times, index.damage
        choice = choose_frames(times, index.duration, index.rate, sampling)
        whole = sampling.sampler.mode == "fps" and not sampling.has_part
        duration, opener = index.duration if whole else choice.seconds, partial(BACKENDS[backend], path, index)
    counts = Counter(choice.indices)
    read = opener(list(counts))
    if len(counts) < len(choice.indices):
        read = partial(_read_again, read, {times[place]: count for place, count in counts.items()})
    return ChosenFrames(read, [times[place] for place in choice.indices], choice.start, duration, damage)


def _read_again(read: FrameReader, counts: dict[float, int], finish: Callable) -> Iterator[tuple[Any, float]]:
    with closing(read(finish)) as reader:
        for pixels, second in reader:
            # A damaged file may give another frame than the chosen one.
            for _ in range(counts.get(second, 1)):
                yield pixels, second


def _local_file(path: AnyFile) -> AnyFile:
    if not isinstance(path, MemoryFile):
        _require_file(path)
    if size_of(path) == 0:
        raise VideoDecodeError(f"{path} is empty (0 bytes), expected a video file. Record or copy it again.")
    return path


def _require_file(path: str) -> None:
    if not os.path.exists(path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", path):
            raise ValueError(
                f"{path:.100} is an address; only local files are opened. Download it and pass the path, or its bytes."
            )
        raise FileNotFoundError(f"{path:.300}: no such video file (looked from {os.getcwd()}).")
    if os.path.isdir(path):
        raise VideoDecodeError(
            f"{path} is a folder, expected a video file. Pass its frames as a list of PIL images, or, for numbered "
            "pictures, media_dict={'video_read_type': 'img'}."
        )
    if not os.path.isfile(path):
        raise VideoDecodeError(f"{path} is not a regular file; expected a video file.")


class _Stopped(Exception):
    """Nobody reads the frames any more."""


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

    Args:
        chosen: The frames and who reads them.
        source: The path as given, or the file's content; None for frames in memory.
        sampling: The settings, ready for JSON; `size`, `exact_resize` and `fit` among them.
        batch_frames: n, the most frames of a batch.

    Attributes:
        num_frames: Frames planned.
        timestamps: Their seconds from the first displayed frame, as planned. Some samplers take frames several times.
        start: Seconds at which the part of the source begins that the frames are from; 0 without a part.
        duration: Seconds from `start` to the end of the last frame of the source, or to the end of its part.
        source, sampling: As given.
    """

    def __init__(self, chosen: ChosenFrames, source: AnyFile | None, sampling: dict[str, Any], batch_frames: int):
        self.num_frames, self.timestamps = len(chosen.seconds), chosen.seconds
        self.start, self.duration = chosen.start, chosen.duration
        self.source, self.sampling = source, sampling
        self._chosen, self._batch_frames = chosen, batch_frames
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
        if self._thread is not None and not threading.current_thread().name.startswith(DECODER_THREADS):
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
        self._thread = threading.Thread(target=self._work, args=(queue,), name=DECODER_THREADS, daemon=True)
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
        frames, seconds = [], []
        delivered, missing, until, damage = 0, Counter(self._chosen.seconds), 0.0, self._chosen.damage
        cause: BaseException | None = None

        def flush() -> None:
            if frames:
                self._room.acquire()
                queue.put(FrameBatch(torch.cat(frames), list(seconds)))
                frames.clear()
                seconds.clear()

        with closing(self._chosen.read(self._resized)) as reader:
            try:
                for resized, second in reader:
                    if self._stop.is_set():
                        return
                    frames.append(resized)
                    seconds.append(second)
                    delivered, until = delivered + 1, second
                    missing[second] -= 1
                    if len(frames) == self._batch_frames:
                        flush()
            except _Stopped:
                return
            except av.FFmpegError as error:
                cause, damage = error, damage or error.strerror  # what the index counted says more
        if delivered == 0:
            raise VideoDecodeError(
                f"{self.source}: expected {self.num_frames} frames, none could be decoded "
                f"({damage or 'no picture came'}). The file is damaged: record or copy it again."
            ) from cause
        flush()
        if damage is not None or delivered < self.num_frames:
            logger.warning(
                f"{self.source} is damaged ({damage or 'pictures are missing'}): {delivered} of {self.num_frames} "
                f"chosen frames could be read, until second {until:.2f}; only these are used.{self._spans(missing)}"
            )

    def _spans(self, missing: Counter) -> str:
        """Between which planned seconds nothing was read, as a sentence."""
        spans = [list(seconds) for absent, seconds in groupby(self.timestamps, lambda s: missing[s] > 0) if absent]
        named = [f"{seconds[0]:.2f} to {seconds[-1]:.2f}" for seconds in spans[:_NAMED_SPANS]]
        more = f" and {len(spans) - len(named)} more spans" if len(spans) > len(named) else ""
        return f" Missing: second {', '.join(named)}{more}." if spans else ""

    def _resized(self, pixels: np.ndarray) -> torch.Tensor:
        if self._stop.is_set():
            raise _Stopped
        size, exact, fit = (self.sampling[name] for name in ("size", "exact_resize", "fit"))
        return resize_frames(torch.from_numpy(pixels).permute(2, 0, 1)[None], size, exact=exact, fit=fit)


def open_video(
    source: Any,
    *,
    size: int,
    sampling: Sampling | None = None,
    timestamps: Sequence[float] | None = None,
    backend: str = "pyav",
    batch_frames: int = 32,
    exact_resize: bool = False,
    fit: str = "stretch",
) -> VideoFrames:
    """Opens a video, chooses its frames and gives them batch by batch, resized.

    Args:
        source: Path of a local file, or its content (bytes); or frames: a list of PIL images, of uint8 arrays
            [H, W, 3] or of paths of image files, or one uint8 numpy array or torch tensor [F, H, W, 3]. Frames were
            chosen by the caller: all of them are used, also more than `max_num_frames`.
        size: S, the edge of the square that frames become, in pixels.
        sampling: Which frames of a path are wanted; None for the default.
        timestamps: Seconds of these frames, strictly increasing. Without them they are `1 / sample_fps` apart.
        backend: "pyav", or "decord" or "torchcodec" where installed: they refuse the files whose frames they misplace,
            give up on damaged ones, and their colours differ by some levels on 10-bit video. "torchcodec:cuda" decodes
            on the GPU; its colours are not the same to the bit.
        batch_frames: n, the most frames of a batch; never changes a frame.
        exact_resize, fit: See `resize_frames`.

    Returns:
        The planned frames; decoding starts with the iteration.

    Raises:
        FileNotFoundError: No such file.
        VideoDecodeError: A file that holds no readable video.
        ValueError: Anything else that was given wrongly.
    """
    sampling = Sampling() if sampling is None else sampling
    check_count("size", size)
    check_count("batch_frames", batch_frames)
    _check_fit(fit)
    if backend not in BACKENDS:
        raise ValueError(f"Unknown backend {backend!r:.200}; expected one of {', '.join(BACKENDS)}.")
    used = {"size": int(size), "backend": backend, "exact_resize": bool(exact_resize), "fit": fit}
    settings = sampling.to_dict()
    source = MemoryFile(source) if isinstance(source, bytes) else source
    if isinstance(source, (str, os.PathLike, MemoryFile)):
        if timestamps is not None:
            raise ValueError("timestamps belong to frames in memory; a file has its own. Leave them out.")
        path = source if isinstance(source, MemoryFile) else os.fsdecode(source)
        return VideoFrames(open_path(path, sampling, backend), path, {**used, **settings}, batch_frames)
    if not isinstance(source, (list, tuple, np.ndarray, torch.Tensor)):
        raise ValueError(
            "Expected a path, bytes, a list of PIL images, uint8 arrays [H, W, 3] or image files, or one uint8 array "
            f"or tensor [F, H, W, 3], got {type(source).__name__}."
        )
    if sampling.has_part or sampling.read_as != "file":
        raise ValueError("start, end and read_as are for paths; of frames in memory pass those that are wanted.")
    used |= {name: settings[name] for name in ("max_num_frames", "sample_fps", "max_sample_fps")}
    return VideoFrames(_open_memory(source, timestamps, sampling.sample_fps), None, used, batch_frames)


def _open_memory(source: Any, timestamps: Sequence[float] | None, sample_fps: float | None) -> ChosenFrames:
    _check_memory_frames(source)
    seconds = _memory_timestamps(timestamps, len(source), sample_fps)
    last = seconds[-1] - seconds[-2] if len(seconds) > 1 else 1 / (sample_fps or SAMPLE_FPS)
    return ChosenFrames(partial(_read_memory, source, seconds), seconds, 0.0, seconds[-1] + last)
