"""Video files, GIFs and folders of pictures as upright RGB frames with the seconds at which they are shown.

What is surprising:
* Every frame is found by its presentation time, never by counting, because edit lists, variable rates and reordered
  frames make the n-th decoded picture another one than expected. The times of all frames come from reading the packets
  without decoding them (some 200,000 a second): the index inside an MP4 holds decoding times, that inside a Matroska
  file only keyframes, so neither replaces it.
* Nothing is ever fetched from a network, and a file never leads to another one: FFmpeg's formats that open further
  files (playlists, descriptions of streams, numbered series) are not on the list of those that are read, whatever a
  file is called.
* Frames that were chosen several times are decoded once.
* A GIF read as "gif" shows each of its frames for a second, as the public VideoChat-Flash code has it; read as "file",
  for as long as it says.
* A folder of pictures stores no times. The public VideoChat-Flash code takes its pictures to be a second apart, and
  three to the second where the path contains "tvqa" (that data set's frames); so does this. Pictures are ordered by
  the number at the end of their names, not alphabetically, and numbers may be missing.

A new decoder is one function with the signature of `open_pyav` and one line in `BACKENDS`.

Shapes: F frames of the source, H x W its size.
"""

import os
import re
import struct
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import av
import numpy as np
from transformers.utils import logging

from .frame_sampling_videoxl import Sampling, choose_frames, choose_numbered_frames
from .image_processing_videoxl import load_image

try:
    import decord
except (ImportError, OSError):  # OSError: a wheel whose shared libraries this system lacks
    decord = None

logger = logging.get_logger(__name__)

# Frames. A seek empties the decoder's pipeline (up to 16 frames in flight), so it must skip more than that to pay.
_SEEK_SAVES_FRAMES = 16
# Seconds. Decoding times that fall back further than muxer noise are a second recording glued to the first.
_TIME_JUMP = 1.0
# Seconds. decord rounds its times to float32 (0.25 ms at one hour); another frame is further away than this.
_DECORD_SECONDS = 5e-3
# Seconds. How far the length in a header may be off: rounding, and the unknown duration of the last frame.
_TIME_SLACK = 0.5
# Containers whose seeks go by an index. Others (MPEG-TS, AVI, …) are read in order.
_SEEKABLE_FORMATS = {"mov", "mp4", "matroska", "webm"}
# What FFmpeg may take a file for, by its names: containers, streams of pictures, formats of games, single pictures and
# sound (which is told apart later). All of them read that one file only. Left out are those that open others (hls,
# dash, concat, sdp, rtsp, imf, mlv, vobsub, webm_dash_manifest, …), devices, and text that is drawn.
_FORMATS = """
mov mp4 matroska webm avi mpeg mpegts mpegtsraw flv live_flv kux asf asf_o ogg gif mxf gxf nut nuv nsv rm ivr swf wtv
ty dv dhav ivf avs lxf lvf pva pmp pdv mtv r3d cine ser usm xmv vividas vivo mods moflex mgsts lmlm4 ingenient
simbiosis_imx
h261 h263 h264 hevc vvc evc apv m4v mpegvideo mpjpeg mjpeg mjpeg_2000 smjpeg av1 obu vc1 vc1test dirac dnxhd cavsvideo
avs2 avs3 v210 v210x rawvideo yuv4mpegpipe ipu ipmovie
3dostr 4xm alp anm argo_brp argo_cvg bethsoftvid bfi bink bmv c93 cdg cdxl dcstr derf dfa dsicin dxa ea film_cpk
filmstrip flic frm gdv hnm hxvs idcin iff ifv iv8 jv mm msp mv mvi mxg nc paf psxstr rl2 roq rpl sdr2 sga siff smk
smush sol thp tiertexseq tmv txd vmd wc3movie xa yop
apng bmp_pipe cri_pipe dds_pipe dpx_pipe exr_pipe fits gem_pipe gif_pipe hdr_pipe ico j2k_pipe jpeg_pipe jpegls_pipe
jpegxl_anim jpegxl_pipe jpegxs_pipe pam_pipe pbm_pipe pcx_pipe pfm_pipe pgm_pipe pgmyuv_pipe pgx_pipe phm_pipe
photocd_pipe pictor_pipe png_pipe ppm_pipe psd_pipe qdraw_pipe qoi_pipe sgi_pipe sunrast_pipe tiff_pipe vbn_pipe webp
webp_pipe xbm_pipe xpm_pipe xwd_pipe
aa aac aax ac3 ac4 adx aiff amr amrnb amrwb ape au caf dsf dts dtshd eac3 flac gsm iamf loas mp3 mpc mpc8 oma qcp shn
spdif tak truehd mlp tta voc vqf w64 wav wv xwma
"""
# A file of a series by its name. "none" (see `_open`) keeps it from being a pattern; planes alone lie in three files.
_SERIES, _PLANE_SUFFIX = "image2", ".y"
# How texts begin that name other files or streams, in small letters; FFmpeg may see others in them under other names.
PLAYLISTS = {
    b"#extm3u": "an HLS or M3U playlist",
    b"ffconcat": "a list of files (ffconcat)",
    b"v=0": "a description of streams (SDP)",
    b"[playlist]": "a playlist",
    b"[reference]": "a playlist",
    b"<mpd": "a DASH manifest",
    b"<smoothstreamingmedia": "a manifest of streams",
    b"<asx": "a playlist",
    b"<smil": "a playlist",
}
_HEAD_BYTES = 4096  # read of a file to tell a playlist
# Endings of a folder's pictures; other files in it are left alone. How many are a second, by what the path contains.
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png")
FOLDER_RATES = (("tvqa", 3.0), ("", 1.0))
_PICTURE_NUMBER = re.compile(r"(\d+)\.\w+$")


# Reads the chosen frames, once a call: uint8 [H, W, 3] and the second of each.
FrameReader = Callable[[], Iterator[tuple[np.ndarray, float]]]


class VideoDecodeError(ValueError):
    """A video that cannot be read; the message names the file, what was expected, what came and what to do."""


@dataclass(frozen=True)
class VideoIndex:
    """What the packets of a file tell about its F displayed frames, in display order."""

    keys: list[int]  # presentation time in ticks; the running number where the container stores none
    times: list[float]  # seconds from the first displayed frame
    keyframes: list[int]  # positions in `keys` to which a seek leads; none where the file is to be read in order
    duration: float  # seconds until the last frame ends
    rate: float | None
    numbered: bool
    damage: str | None  # what is wrong with the file, if the packets show it

    def place_of(self, key: int | None) -> int | None:
        """The position of a decoded frame; None for one that is not displayed."""
        place = -1 if key is None else bisect_right(self.keys, key) - 1
        return place if place >= 0 and self.keys[place] == key else None

    def runs(self, wanted: Sequence[int]) -> list[tuple[int | None, list[int]]]:
        """Splits increasing positions into runs to decode in one go, each with the keyframe to seek to, if any."""
        runs: list[tuple[int | None, list[int]]] = [(None, [])]
        last = -1
        for place in wanted:
            before = bisect_right(self.keyframes, place) - 1
            if before >= 0 and self.keyframes[before] - last > _SEEK_SAVES_FRAMES:
                runs.append((self.keyframes[before], []))
            runs[-1][1].append(place)
            last = place
        return runs


def _open(path: str) -> Any:
    # `file:` keeps FFmpeg from reading "a:b.mp4" as a protocol, and the list of formats, which holds before a format
    # reads anything, from opening other files. References of MOV to other files are off by default and stay so.
    # Metadata of old phones is not always UTF-8.
    formats = _FORMATS.split()
    if not path.lower().endswith(_PLANE_SUFFIX):
        formats.append(_SERIES)
    options = {
        "format_whitelist": ",".join(formats),
        "protocol_whitelist": "file",
        "pattern_type": "none",
        "enable_drefs": "0",
        "use_absolute_path": "0",
    }
    return av.open(f"file:{os.path.abspath(path)}", metadata_errors="ignore", options=options)


def _refuse_playlist(path: str) -> None:
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(b"<"):  # XML may begin with comments and the like
        found = next((kind for mark, kind in PLAYLISTS.items() if mark.startswith(b"<") and mark in head), None)
    else:
        found = next((kind for mark, kind in PLAYLISTS.items() if head.startswith(mark)), None)
    if found is not None:
        raise VideoDecodeError(
            f"{path}: expected a video file, found {found}. It names other files, and those are not opened for it. "
            "Give the video file itself, or make one: ffmpeg -i FILE -c copy video.mp4"
        )


def _open_video(path: str) -> Any:
    """Opens a video file; for another file the error says what it is."""
    try:
        _refuse_playlist(path)
        return _open(path)
    except av.ArgumentError as error:
        raise VideoDecodeError(
            f"{path}: expected a video file, but FFmpeg takes it for a format that is not read here, such as one that "
            "names other files. Give the video file itself, or make one: ffmpeg -i FILE -c copy video.mp4"
        ) from error
    except (av.FFmpegError, OSError) as error:
        raise VideoDecodeError(
            f"{path}: expected a video file, but FFmpeg cannot open it ({error.strerror}). It may be no video, or cut "
            "off before its index was written: record or copy it again."
        ) from error


def _video_stream(container: Any, path: str) -> Any:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise VideoDecodeError(f"{path}: expected a video stream, found only other streams. Is this an audio file?")
    if stream.codec_context is None:
        raise VideoDecodeError(
            f"{path}: this FFmpeg has no decoder for its video stream. Re-encode it, e.g. to H.264."
        )
    return stream


@dataclass
class _Packets:
    """What the packets of a stream say."""

    shown: list  # (presentation time, decoding time, duration) in ticks
    keyframes: list  # presentation times
    intact: int = 0
    damage: str | None = None


def read_index(path: str) -> VideoIndex:
    """Reads the packets of the video stream, decoding none.

    Raises:
        VideoDecodeError: A file that is no video, or of which nothing can be shown.
    """
    with _open_video(path) as container:
        stream, formats = _video_stream(container, path), container.format.name
        packets = _read_packets(container, stream)
        listed = len(getattr(stream, "index_entries", ()))  # PyAV before 17, which lmms-eval pins, has none
        if "mp4" in formats and packets.intact < listed:
            packets.damage = f"only {packets.intact} of its {listed} frames are in the file"
        index = _build_index(path, stream, formats, packets)
        if "matroska" in formats and index.damage is None:
            # A cut Matroska file just ends.
            announced = _announced_seconds(container, stream)
            end = float((stream.start_time or 0) * stream.time_base) + index.duration
            if end < announced - _TIME_SLACK:
                index = replace(index, damage=f"it ends at second {end:.2f} of {announced:.2f}")
        return index


def _read_packets(container: Any, stream: Any) -> _Packets:
    found, latest = _Packets([], []), None
    jump = round(_TIME_JUMP / stream.time_base)
    try:
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.is_corrupt:
                found.damage = "a packet is cut off"
                continue
            found.intact += 1
            if packet.dts is not None:
                if latest is not None and packet.dts < latest - jump:
                    found.damage = "its clock jumps back (recordings glued together?), only the part before is read"
                    break
                latest = packet.dts
            if packet.is_keyframe:
                if not found.keyframes:
                    found.shown.clear()  # nothing before the first keyframe can be decoded
                found.keyframes.append(packet.pts)
            if not packet.is_discard:  # an edit list has them decoded but not displayed
                found.shown.append((packet.pts, packet.dts, packet.duration or 0))
    except av.FFmpegError as error:
        found.damage = error.strerror
    return found


def _announced_seconds(container: Any, stream: Any) -> float:
    """When a Matroska stream ends by its header, which knows the length of the stream, or of the longest stream."""
    clock = stream.metadata.get("DURATION", "").split(":")
    if clock[1:]:
        return sum(float(part) * unit for part, unit in zip(clock, (3600, 60, 1), strict=True))
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0


def _build_index(path: str, stream: Any, formats: str, packets: _Packets) -> VideoIndex:
    tick, rate, shown = stream.time_base, float(stream.average_rate or 0) or None, packets.shown
    # AVI stores no presentation times (FFmpeg guesses, wrongly for reordered frames), raw streams no times at all.
    numbered = formats == "avi" or all(pts is None for pts, _, _ in shown)
    if numbered:
        durations, ticks = {}, sorted({dts for _, dts, _ in shown if dts is not None})
        if len(ticks) < len(shown):
            tick, ticks = 1 / (stream.average_rate or stream.guessed_rate or 25), list(range(len(shown)))
            logger.warning(f"{path}: the file stores no times; {float(1 / tick):g} frames per second are assumed.")
    else:
        durations = {pts: duration for pts, _, duration in shown if pts is not None}
        # Frames shown before the first keyframe depend on pictures that are not in the file.
        first = packets.keyframes[0] if packets.keyframes else None
        start = min(durations) if first is None else first
        ticks = sorted(pts for pts in durations if pts >= start)
    if not ticks:
        found = f" ({packets.damage})" if packets.damage else ""
        raise VideoDecodeError(
            f"{path}: expected video frames, the file has none that can be displayed{found}. If they lie in another "
            "file, give that one."
        )
    times = [float((value - ticks[0]) * tick) for value in ticks]
    last = durations.get(ticks[-1], 0) * tick or (times[-1] / (len(times) - 1) if len(times) > 1 else 1 / (rate or 1))
    seekable = not numbered and not _SEEKABLE_FORMATS.isdisjoint(formats.split(","))
    places = {value: place for place, value in enumerate(ticks)} if seekable else {}
    return VideoIndex(
        keys=list(range(len(ticks))) if numbered else ticks,
        times=times,
        keyframes=sorted({places[pts] for pts in packets.keyframes if pts in places}),
        duration=times[-1] + float(last),
        rate=rate,
        numbered=numbered,
        damage=packets.damage,
    )


def display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """(a, b, c, d): the stored point (p, q) is shown at (a p + c q, b p + d q).

    One for the whole file: asking a PyAV frame for its side data ties it into a reference cycle, and a hundred large
    frames would wait for the garbage collector.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
            return a, b, c, d
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


def _decode(container: Any, stream: Any, index: VideoIndex) -> Iterator[tuple[int, av.VideoFrame]]:
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


def _seek(container: Any, stream: Any, index: VideoIndex, start: int) -> Iterator[tuple[int, av.VideoFrame]] | None:
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


def pick_frames(decoded: Iterator[tuple[int, Any]], places: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Takes the frames at increasing `places`, and reads no further than the last.

    Args:
        decoded: Positions, increasing, and frames.
        places: Positions that are wanted.
    """
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


def _read_pyav(path: str, index: VideoIndex, wanted: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
    """Yields uint8 [H, W, 3] and seconds of the wanted positions; ends early where the file does.

    Raises:
        av.FFmpegError: The decoder gave up.
    """
    runs = index.runs(wanted)
    rest: list[int] = []
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
            for place, frame in pick_frames(decoded, places):
                matrix = matrix or display_matrix(frame)
                yield upright_rgb(frame, matrix), index.times[place]
    if rest:  # the index of the container misled the seek: they are read in order, from the start
        yield from _read_pyav(path, replace(index, keyframes=[]), rest)


def open_pyav(path: str, index: VideoIndex, wanted: Sequence[int]) -> FrameReader:
    """The reader of the frames at increasing positions `wanted`; the file is opened when reading starts."""
    return partial(_read_pyav, path, index, wanted)


def open_decord(path: str, index: VideoIndex, wanted: Sequence[int]) -> FrameReader:
    """As `open_pyav`, but opened at once and only for files whose frames decord provably finds.

    decord ignores display matrices and edit lists, and hangs on MPEG-TS.

    Raises:
        VideoDecodeError: A file that decord cannot read.
        ValueError: decord is not installed, or would not give the frames that the file displays.
    """
    if decord is None:
        raise ValueError('backend="decord" needs the package decord, which is not installed; use backend="pyav".')
    with _open(path) as container:
        misread = any(name in container.format.name for name in ("mpegts", _SERIES))
        _, frame = next(_decode(container, _video_stream(container, path), index), (0, None))
    if index.numbered or misread or (frame is not None and display_matrix(frame)[0] <= 0):
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


BACKENDS: dict[str, Callable[[str, VideoIndex, Sequence[int]], FrameReader]] = {
    "pyav": open_pyav,
    "decord": open_decord,
}


def list_pictures(folder: str) -> list[str]:
    """The paths of a folder's pictures, in the order of their numbers.

    Raises:
        FileNotFoundError: No such folder.
        VideoDecodeError: A file, or a folder without numbered pictures.
    """
    if not os.path.exists(folder):
        raise FileNotFoundError(f"{folder}: no such folder (looked from {os.getcwd()}).")
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
    """The chosen frames of a source, and how they are read.

    Attributes:
        read: Gives the frames.
        seconds: The seconds of the frames, as planned; some come several times.
        start: The second at which the part begins that they are from.
        duration: The length of that part in seconds.
        damage: What is wrong with a file, if its packets show it.
    """

    read: FrameReader
    seconds: list[float]
    start: float
    duration: float
    damage: str | None = None


def open_path(path: str, sampling: Sampling, backend: str = "pyav") -> ChosenFrames:
    """Chooses frames of a video file, a GIF or a folder of pictures.

    Args:
        path: A local file or folder.
        sampling: Which frames are wanted, and what the path leads to.
        backend: Who decodes a file, a name in `BACKENDS`.

    Raises:
        FileNotFoundError, ValueError, VideoDecodeError: If nothing can be read, or the part holds no frames.
    """
    damage = None
    if sampling.read_as == "folder":
        pictures, rate = list_pictures(path), next(rate for part, rate in FOLDER_RATES if part in path)
        times = [number / rate for number in range(len(pictures))]
        choice = choose_numbered_frames(len(pictures), rate, sampling)
        duration, opener = choice.seconds, partial(open_pictures, pictures, times)
    else:
        index = read_index(_local_file(path))
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


def _local_file(path: str) -> str:
    if not os.path.exists(path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*://", path):
            raise ValueError(f"{path} is an address; only local files are opened. Download it and pass the path.")
        raise FileNotFoundError(f"{path}: no such video file (looked from {os.getcwd()}).")
    if os.path.isdir(path):
        raise VideoDecodeError(
            f"{path} is a folder, expected a video file. Pass its frames as a list of PIL images, or, for numbered "
            "pictures, media_dict={'video_read_type': 'img'}."
        )
    if not os.path.isfile(path):
        raise VideoDecodeError(f"{path} is not a regular file; expected a video file.")
    if os.path.getsize(path) == 0:
        raise VideoDecodeError(f"{path} is empty (0 bytes), expected a video file. Record or copy it again.")
    return path
