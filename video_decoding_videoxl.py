"""Video files, GIFs and folders of pictures as upright RGB frames with the seconds at which they are shown.

What is surprising:
* Every frame is found by its presentation time, never by counting, because edit lists, variable rates and reordered
  frames make the n-th decoded picture another one than expected.
* Behind a packet that cannot be decoded, decoding goes on at the next keyframe. Which pictures are keyframes only the
  decoder knows: containers flag all of them where their table of keyframes is missing.
* Frames that were chosen several times are decoded once.
* A GIF read as "gif" shows each of its frames for a second, as the public VideoChat-Flash code has it; read as "file",
  for as long as it says.
* A folder of pictures stores no times. The public VideoChat-Flash code takes its pictures to be a second apart, and
  three to the second where the path contains "tvqa" (that data set's frames); so does this. Pictures are ordered by
  the number at the end of their names, not alphabetically, and numbers may be missing.

A new decoder is one function with the signature of `open_pyav` and one line in `BACKENDS`.

Shapes: F frames of the source, H x W its size.
"""

import math
import os
import re
import struct
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from transformers.utils import logging

from .frame_sampling_videoxl import Sampling, choose_frames, choose_numbered_frames
from .image_processing_videoxl import is_heif, load_image
from .video_index_videoxl import (
    SERIES_FORMAT,
    AnyFile,
    MemoryFile,
    SecondFields,
    VideoDecodeError,
    VideoIndex,
    open_file,
    read_index,
    read_packets,
    size_of,
    video_stream,
)

try:
    import decord
except (ImportError, OSError):  # OSError: a wheel whose shared libraries this system lacks
    decord = None

logger = logging.get_logger(__name__)

# Seconds. decord rounds its times to float32 (0.25 ms at one hour); another frame is further away than this.
_DECORD_SECONDS = 5e-3
# Decoders that show nothing until they met a picture that needs no other, whatever its packet is flagged as.
_STRICT_DECODERS = {"h264", "hevc", "vvc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9"}
# Endings of a folder's pictures; other files in it are left alone. How many are a second, by what the path contains.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
FOLDER_RATES = (("tvqa", 3.0), ("", 1.0))
_PICTURE_NUMBER = re.compile(r"(\d+)\.\w+$")


# Reads the chosen frames, once a call: uint8 [H, W, 3] and the second of each.
FrameReader = Callable[[], Iterator[tuple[np.ndarray, float]]]


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
        self._skipping = False

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


def _read_runs(
    path: AnyFile, index: VideoIndex, wanted: Sequence[int], careful: bool, lean: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields positions and uint8 [H, W, 3]; ends early where the file does.

    Args:
        careful: See `_decode`.
        lean: Leave out frames that are not needed, where that can be told.

    Raises:
        _LeftOut: A frame that was left out is needed.
        av.FFmpegError: A packet cannot be decoded, unless `careful`.
        _Misled: A seek led elsewhere, so the index of the container is not to be trusted.
    """
    matrix: tuple[int, int, int, int] | None = None
    with open_file(path, whole=bool(index.parts)) as container:
        stream = video_stream(container, path)
        stream.thread_type = "NONE" if careful else "AUTO"
        # Where a packet has no picture of its own, the one before is shown.
        needed = {place - before for place in wanted for before in (0, 1)} if lean else None
        decoded = _decode(container, stream, index, careful, needed)
        for start, places in index.runs(wanted):
            if start is not None:
                decoded = _seek(container, stream, index, start, careful, needed)
            for place, frame in pick_frames(decoded, places, lean):
                matrix = matrix or display_matrix(frame)
                yield place, upright_rgb(frame, matrix)


def _read_pyav(path: AnyFile, index: VideoIndex, wanted: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
    """Yields uint8 [H, W, 3] and seconds of the wanted positions that the file has.

    Raises:
        av.FFmpegError: Behind the last frame, if some packet could not be decoded.
    """
    problem = None
    # The times of packets tell which frame is in them, but not in all files, and damage may hide in what is left out.
    lean = not index.numbered and not index.guessed and index.damage is None
    for ahead, first, places in index.stretches(wanted):
        left, last, careful = deque(places), first - 1, False
        while left:
            try:
                for place, pixels in _read_runs(path, index, list(left), careful, lean and not careful):
                    while left and left[0] <= place:
                        left.popleft()
                    if place > last:
                        last = place
                        yield pixels, index.times[place + ahead]
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


def open_decord(path: AnyFile, index: VideoIndex, wanted: Sequence[int]) -> FrameReader:
    """As `open_pyav`, but opened at once and only for files whose frames decord provably finds.

    decord ignores display matrices and edit lists, and hangs on MPEG-TS.

    Raises:
        VideoDecodeError: A file that decord cannot read.
        ValueError: decord is not installed, or would not give the frames that the file displays.
    """
    if decord is None:
        raise ValueError('backend="decord" needs the package decord, which is not installed; use backend="pyav".')
    if isinstance(path, MemoryFile):
        raise ValueError('backend="decord" reads local files only, not what is in memory; use backend="pyav".')
    with open_file(path) as container:
        misread = any(name in container.format.name for name in ("mpegts", SERIES_FORMAT))
        _, frame = next(_decode(container, video_stream(container, path), index), (0, None))
    if index.numbered or index.parts or misread or (frame is not None and display_matrix(frame)[0] <= 0):
        raise ValueError(f'{path}: decord hangs on, misplaces or does not turn such files; use backend="pyav".')
    failure = f'{path}: decord cannot read this file; use backend="pyav".'
    try:
        reader = decord.VideoReader(os.path.abspath(path), ctx=decord.cpu(0))
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


BACKENDS: dict[str, Callable[[AnyFile, VideoIndex, Sequence[int]], FrameReader]] = {
    "pyav": open_pyav,
    "decord": open_decord,
}


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
    """The reader of the pictures at positions `wanted`: uint8 [H, W, 3], and the second of each."""

    def read() -> Iterator[tuple[np.ndarray, float]]:
        for place in wanted:
            yield np.array(load_image(paths[place])), seconds[place]

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


def _read_again(read: FrameReader, counts: dict[float, int]) -> Iterator[tuple[np.ndarray, float]]:
    with closing(read()) as reader:
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
