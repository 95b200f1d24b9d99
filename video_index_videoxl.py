"""What the packets of a video file tell, decoding none: its frames, when they are shown, where decoding can begin.

What is surprising:
* The times of all frames come from reading the packets (some 200,000 a second): the index inside an MP4 holds decoding
  times, that inside a Matroska file only keyframes, so neither replaces it.
* Nothing is ever fetched from a network, and a file never leads to another one: FFmpeg's formats that open further
  files (playlists, descriptions of streams, numbered series) are not on the list of those that are read, whatever a
  file is called.
* An edit list of several parts is read here: FFmpeg repeats packets for it, at times that may occur twice.

Shapes: F frames of the source.
"""

import math
import os
import re
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import Any, BinaryIO

import av
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Frames. A seek empties the decoder's pipeline (up to 16 frames in flight), so it must skip more than that to pay.
_SEEK_SAVES_FRAMES = 16
_TIME_JUMP = 1.0  # seconds; decoding times that fall back further are a second recording glued to the first
_WRONG_TIMES = 4  # packets in a row that may have a wrong time; more are a second recording
_CLOCK_LEAP = 86_400.0  # seconds: no picture is shown for a day, so the time of the next is wrong
_REORDERED = 4  # pictures that are commonly decoded behind one that is shown later
_TIME_SLACK = 0.5  # seconds that the length in a header may be off: rounding, the unknown duration of the last frame
_EDIT_SLACK = 2e-3  # seconds; edit lists count in other ticks than the pictures, what is closer is meant to be equal
# What an honest file stays far below: boxes of an MP4 at one level, pictures that an edit list shows.
_MOST_BOXES, _MOST_PICTURES = 100_000, 10_000_000
# By FFmpeg's format: what begins as an encrypted piece, and what as any, in transport streams (their packets of 188
# bytes), programme streams (pictures on a DVD) and ASF (the GUID of its object about encryption; its header).
_SCRAMBLED = {
    "mpegts": (rb"\x47..[\x80-\xff].{184}(?=\x47)", rb"\x47.{187}(?=\x47)"),
    "mpeg": (rb"\0\0\x01[\xe0-\xef]..[\x90-\xbf]", rb"\0\0\x01[\xe0-\xef]..[\x80-\xbf]"),
    "asf": (rb"\xfb\xb3\x11\x22\x23\xbd\xd2\x11\xb4\xb7\0\xa0\xc9\x55\xfc\x6e", rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
}
_SCRAMBLED_BYTES = 1_000_000  # read to find them
# How Matroska files say how long a stream is.
_CLOCK = re.compile(r"(\d+):(\d+):(\d+(?:\.\d+)?)$", re.ASCII)
_READ_TRIES = 8  # behind a place of a file that cannot be read, before the rest counts as lost
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
SERIES_FORMAT, _PLANE_SUFFIX = "image2", ".y"
# How texts begin that name other files or streams, in small letters; FFmpeg may see others in them under other names.
PLAYLISTS = dict.fromkeys((b"#extm3u", b"[playlist]", b"[reference]", b"<asx", b"<smil"), "a playlist")
PLAYLISTS |= {b"ffconcat": "a list of files (ffconcat)", b"v=0": "a description of streams (SDP)"}
PLAYLISTS |= {b"<mpd": "a DASH manifest", b"<smoothstreamingmedia": "a manifest of streams"}
_HEAD_BYTES = 4096  # read of a file to tell a playlist


@dataclass(frozen=True, eq=False)
class MemoryFile:
    """The content of a file, taken wherever the path of one is; as a string, what messages call it."""

    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return "the file from memory"


AnyFile = str | MemoryFile  # a path, or the content of a file


def open_bytes(path: AnyFile) -> BinaryIO:
    """Opens a file for reading."""
    return BytesIO(path.data) if isinstance(path, MemoryFile) else open(path, "rb")  # noqa: SIM115 (callers close it)


def size_of(path: AnyFile) -> int:
    """Bytes of a file."""
    return len(path.data) if isinstance(path, MemoryFile) else os.path.getsize(path)


class VideoDecodeError(ValueError):
    """A video that cannot be read; the message names the file, what was expected, what came and what to do."""


@dataclass(frozen=True)
class VideoIndex:
    """What the packets of a file tell about its F displayed frames, in display order."""

    keys: list[int]  # presentation time in ticks; the running number where the container stores none
    times: list[float]  # seconds from the first displayed frame
    start: float  # the second of the first frame by the container's clock
    keyframes: list[int]  # positions in `keys` to which a seek leads; none where the file is to be read in order
    duration: float  # seconds until the last frame ends
    rate: float | None
    numbered: bool
    damage: str | None  # what is wrong with the file, if the packets show it
    guessed: frozenset[int] = frozenset()  # positions whose times are laid between those that the file stores
    # Of an edit list's parts, whose pictures `times` lists: the position of the first there, and in `keys`.
    parts: tuple[tuple[int, int], ...] = ()

    def stretches(self, wanted: Sequence[int]) -> list[tuple[int, int, list[int]]]:
        """Splits what is wanted by parts.

        Returns:
            Of each part how far `times` is ahead of `keys`, its first position in `keys`, and those wanted of `keys`.
        """
        if not self.parts:
            return [(0, 0, list(wanted))]
        starts = [shown for shown, _ in self.parts]
        grouped: dict[int, list[int]] = {}
        for shown in wanted:
            grouped.setdefault(bisect_right(starts, shown) - 1, []).append(shown)
        stretches = []
        for part, places in grouped.items():
            start, first = self.parts[part]
            stretches.append((start - first, first, [place - start + first for place in places]))
        return stretches

    def place_of(self, key: int | None, last: int) -> int | None:
        """The position of a decoded frame behind that at `last`; None for one that is not displayed."""
        if key is None:
            return last + 1 if last + 1 in self.guessed else None
        place = bisect_right(self.keys, key) - 1
        return place if place >= 0 and self.keys[place] == key else None

    def runs(self, wanted: Sequence[int], enough: float = math.inf) -> list[tuple[int | None, list[int]]]:
        """Splits increasing positions into runs to decode in one go, each with the keyframe to seek to, if any.

        A run ends where a seek saves time, and with `enough` positions at any keyframe.
        """
        runs: list[tuple[int | None, list[int]]] = [(None, [])]
        last = -1
        for place in wanted:
            before = bisect_right(self.keyframes, place) - 1
            saved = self.keyframes[before] - last if before >= 0 else 0
            if saved > _SEEK_SAVES_FRAMES or (saved > 0 and len(runs[-1][1]) >= enough):
                runs.append((self.keyframes[before], []))
            runs[-1][1].append(place)
            last = place
        return runs


def open_file(path: AnyFile, *, whole: bool = False) -> Any:
    """Opens a file as a container.

    Args:
        path: Of a local file, or its content.
        whole: Give all pictures of an MP4, as if it had no edit list.
    """
    # `file:` keeps FFmpeg from reading "a:b.mp4" as a protocol, and the list of formats, which holds before a format
    # reads anything, from opening other files. References of MOV to other files are off by default and stay so.
    # Metadata of old phones is not always UTF-8.
    formats = _FORMATS.split()
    source = open_bytes(path) if isinstance(path, MemoryFile) else f"file:{os.path.abspath(path)}"
    if not str(path).lower().endswith(_PLANE_SUFFIX):
        formats.append(SERIES_FORMAT)
    options = {
        "format_whitelist": ",".join(formats),
        "protocol_whitelist": "file",
        "pattern_type": "none",
        "enable_drefs": "0",
        "use_absolute_path": "0",
        "ignore_editlist": "1" if whole else "0",
    }
    return av.open(source, metadata_errors="ignore", options=options)


def _refuse_playlist(path: AnyFile) -> None:
    with open_bytes(path) as file:
        head = file.read(_HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    xml = head if head.startswith(b"<") else b""  # may begin with comments and the like
    found = (kind for mark, kind in PLAYLISTS.items() if head.startswith(mark) or (mark[0:1] == b"<" and mark in xml))
    if (found := next(found, None)) is not None:
        raise VideoDecodeError(
            f"{path}: expected a video file, found {found}. It names other files, and those are not opened for it. "
            "Give the video file itself, or make one: ffmpeg -i FILE -c copy video.mp4"
        )


def open_container(path: AnyFile) -> Any:
    """Opens a video file; for another file the error says what it is."""
    try:
        _refuse_playlist(path)
        return open_file(path)
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


def video_stream(container: Any, path: AnyFile) -> Any:
    # FFmpeg prefers a cover to a film for the visually or hearing impaired.
    films = [film for film in container.streams.video if not film.disposition & av.stream.Disposition.attached_pic]
    stream = container.streams.best("video")
    if films and stream not in films:
        stream = max(
            films, key=lambda film: film.codec_context.width * film.codec_context.height if film.codec_context else 0
        )
    if not films:
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


def read_index(path: AnyFile) -> VideoIndex:
    """Reads the packets of the video stream, decoding none.

    Raises:
        VideoDecodeError: A file that is no video, or of which nothing can be shown.
    """
    with open_container(path) as container:
        if _is_encrypted(path, container):
            raise VideoDecodeError(f"{path}: expected a video, its pictures are encrypted (DRM). Give a file without.")
        stream = video_stream(container, path)
        edits = _read_edits(path, stream.id) if "mp4" in container.format.name else []
        if not edits:
            return _index_of(path, container, stream)
    with open_file(path, whole=True) as container:
        return _apply_edits(path, _index_of(path, container, video_stream(container, path)), edits)


def _index_of(path: AnyFile, container: Any, stream: Any) -> VideoIndex:
    formats, packets = container.format.name, _list_packets(container, stream)
    listed = len(getattr(stream, "index_entries", ()))  # PyAV before 17, which lmms-eval pins, has none
    if "mp4" in formats and packets.intact < listed:
        packets.damage = f"only {packets.intact} of its {listed} frames are in the file"
    index = _build_index(path, stream, formats, packets)
    if "matroska" in formats and index.damage is None:
        announced = _announced_seconds(container, stream)
        start = float((stream.start_time or 0) * stream.time_base)
        if start + index.duration < announced - _TIME_SLACK:
            if _is_cut_matroska(path):
                index = replace(index, damage=f"it ends at second {start + index.duration:.2f} of {announced:.2f}")
            else:  # the last picture stands until the end, as in recordings of screens
                index = replace(index, duration=announced - start)
    return index


@dataclass(frozen=True)
class _Edit:
    """A part of an edit list."""

    media: float | None  # the second of the track at which it begins; None for a gap
    seconds: float  # how long it is shown
    speed: float  # 0 holds one picture


def _boxes(file: Any, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Yields the kind, the start and the end of the content of the boxes that lie between two places of an MP4."""
    for _ in range(_MOST_BOXES):
        file.seek(start)
        header = file.read(16)
        if len(header) < 8 or start >= end:
            return
        size, kind = struct.unpack_from(">I4s", header)
        inside = start + 8
        if size == 1 and len(header) == 16:
            size, inside = struct.unpack_from(">Q", header, 8)[0], start + 16
        stop = end if size == 0 else min(start + size, end)
        if stop < inside:
            return
        yield kind, inside, stop
        start = stop


def _box(file: Any, place: tuple[int, int], *names: bytes) -> tuple[int, int] | None:
    """Where the content of a box in boxes lies."""
    for name in names:
        place = next((span for kind, *span in _boxes(file, *place) if kind == name), None)
        if place is None:
            return None
    return place


def _fields(file: Any, place: tuple[int, int], old: str, new: str) -> tuple[int, ...]:
    """Fields at the start of a box, by its version."""
    file.seek(place[0])
    data = file.read(min(place[1] - place[0], 64))
    layout = ">4x" + (new if data[:1] == b"\1" else old)
    return struct.unpack_from(layout, data)


def _tracks(file: Any, size: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the contents of the movie box of an MP4 lie, and of each track in it."""
    movie = _box(file, (0, size), b"moov") or (0, 0)
    for kind, *track in _boxes(file, *movie):
        if kind == b"trak":
            yield movie, tuple(track)


def _read_edits(path: AnyFile, number: int) -> list[_Edit]:
    """The edit list of a track of an MP4, if it has more than one part; what FFmpeg does with one part is right."""
    with open_bytes(path) as file:
        try:
            for movie, track in _tracks(file, size_of(path)):
                if _fields(file, _box(file, track, b"tkhd"), "8xI", "16xI") == (number,):
                    scales = (_box(file, movie, b"mvhd"), _box(file, track, b"mdia", b"mdhd"))
                    clock, scale = (_fields(file, box, "8xI", "16xI")[0] for box in scales)
                    entries = _edit_entries(file, *_box(file, track, b"edts", b"elst"))
                    edits = [_Edit(None if at < 0 else at / scale, long / clock, speed) for long, at, speed in entries]
                    return edits if sum(edit.media is not None for edit in edits) > 1 else []
        except (TypeError, IndexError, struct.error, ZeroDivisionError):  # boxes are missing or cut off
            pass
    return []


def _is_encrypted(path: AnyFile, container: Any) -> bool:
    """Whether the pictures lie in the file encrypted. FFmpeg would decode what is no picture."""
    formats = container.format.name
    if any("enc_key_id" in stream.metadata for stream in container.streams.video):  # Matroska
        return True
    with open_bytes(path) as file:
        if "mp4" in formats:
            for _, track in _tracks(file, size_of(path)):
                described = _box(file, track, b"mdia", b"minf", b"stbl", b"stsd")
                file.seek(described[0] if described else 0)
                if described and file.read(16)[12:] in (b"encv", b"drmi"):
                    return True
            return False
        marks = _SCRAMBLED.get(formats)
        head = file.read(_SCRAMBLED_BYTES) if marks else b""
    marked, all_of_them = (len(re.findall(mark, head, re.DOTALL)) for mark in marks or (b"x", b"x"))
    return marked > all_of_them / 4


def _edit_entries(file: Any, start: int, end: int) -> list[tuple[int, int, float]]:
    """Ticks of the movie that a part lasts, ticks of the track at which it begins, and its speed."""
    file.seek(start)
    data = file.read(min(end - start, 20 * _MOST_BOXES))
    layout = struct.Struct(">Qqi" if data[0] == 1 else ">Iii")
    count = min(struct.unpack_from(">I", data, 4)[0], (len(data) - 8) // layout.size)
    entries = (layout.unpack_from(data, 8 + number * layout.size) for number in range(count))
    return [(long, at, speed / 65536) for long, at, speed in entries]


def _apply_edits(path: AnyFile, index: VideoIndex, edits: list[_Edit]) -> VideoIndex:
    """The index of the pictures that an edit list of several parts shows, from that of all pictures of its track."""
    media = [index.start + second for second in index.times]
    times, parts, clock, end = [], [], 0.0, 0.0
    for edit in edits:
        if edit.media is not None and edit.seconds > 0 and edit.media < media[0] + index.duration:
            # The picture that is on display where the part begins, then those that begin in it.
            first = max(bisect_right(media, edit.media + _EDIT_SLACK) - 1, 0)
            until = edit.media + edit.seconds * max(edit.speed, 0) - _EDIT_SLACK
            past = max(bisect_left(media, until), first + 1)
            slow = 1 / edit.speed if edit.speed > 0 else 0
            if media[first] <= max(until, edit.media):
                parts.append((len(times), first))
                times += [clock + max(second - edit.media, 0) * slow for second in media[first:past]]
                end = clock + edit.seconds
        clock += edit.seconds
        if len(times) > _MOST_PICTURES:
            raise VideoDecodeError(
                f"{path}: its edit list shows more than {_MOST_PICTURES:,} pictures. Re-encode what you need of it."
            )
    if not times:
        return index
    return replace(index, times=[time - times[0] for time in times], duration=end - times[0], parts=tuple(parts))


def read_packets(container: Any, stream: Any, problems: list[str]) -> Iterator[Any]:
    """Yields the packets of a stream, also those behind a place that cannot be read; says so in `problems`."""
    idle, ended = 0, False
    while not ended and idle < _READ_TRIES:
        found, ended = yield from _read_on(container, stream, problems)
        idle = 0 if found else idle + 1


def _read_on(container: Any, stream: Any, problems: list[str]) -> Iterator[Any]:
    found = False
    try:
        for packet in container.demux(stream):
            found = True
            yield packet
    except av.FFmpegError as error:
        problems.append(error.strerror)
    except IndexError:  # another stream began, of which PyAV learns when it is asked anew
        pass
    else:
        return found, True
    return found, False


class _Clock:
    """Tells a few wrong decoding times from a clock that begins anew.

    Args:
        jump: Ticks that a time may lie behind the latest one.
    """

    def __init__(self, jump: int):
        self.jump, self.latest, self.wrong = jump, None, False
        self.behind = 0  # packets in a row that lie too far behind
        self._calm, self._mark = None, 0  # the latest time before a leap forward, pictures until then

    def accepts(self, time: int, found: _Packets) -> bool:
        """Whether a packet's time fits; takes back what was found at times that turn out to be wrong."""
        if self.latest is not None and time < self.latest - self.jump:
            leaped = self._calm is not None and len(found.shown) - self._mark <= _WRONG_TIMES
            if not leaped or time < self._calm - self.jump:
                self.behind += 1
                return False
            del found.shown[self._mark :]
            self.wrong = True
        elif self.latest is not None and time > self.latest + self.jump:
            self._calm, self._mark = self.latest, len(found.shown)
        self.behind, self.latest = 0, time
        return True


def _list_packets(container: Any, stream: Any) -> _Packets:
    found, fields = _Packets([], []), SecondFields(container, stream)
    clock = _Clock(round(_TIME_JUMP / stream.time_base))
    problems: list[str] = []
    for packet in read_packets(container, stream, problems):
        if packet.size == 0:
            continue
        if packet.is_corrupt:
            found.damage = "a packet is cut off"
            continue
        found.intact += 1
        if packet.dts is not None and not clock.accepts(packet.dts, found):
            if clock.behind > _WRONG_TIMES:
                found.damage = "its clock jumps back (recordings glued together?), only the part before is read"
                break
            continue
        if packet.is_keyframe:
            if not found.keyframes:
                found.shown.clear()  # nothing before the first keyframe can be decoded
            found.keyframes.append(packet.pts)
        if packet.is_discard:  # an edit list has them decoded but not displayed
            continue
        if fields.half and fields.completes(packet):
            pts, dts, duration = found.shown.pop()
            found.shown.append((pts, dts, duration + packet.duration))
        else:
            found.shown.append((packet.pts, packet.dts, packet.duration or 0))
    if found.damage is None and (clock.behind or clock.wrong):
        found.damage = "some of its times are wrong"
    if problems:
        found.damage = problems[0]
    return found


class SecondFields:
    """Tells which packets hold the second field of a picture: H.264 in streams may have a packet for each field."""

    def __init__(self, container: Any, stream: Any):
        split = stream.codec_context.name == "h264" and _SEEKABLE_FORMATS.isdisjoint(container.format.name.split(","))
        # By its parser FFmpeg gives such packets half of a picture's duration.
        rate = stream.codec_context.framerate if split else None
        self.half = round(1 / (2 * rate * stream.time_base)) if rate else 0
        self._first: Any = None  # the packet of a first field, if it was the last one

    def completes(self, packet: Any) -> bool:
        first, self._first = self._first, None
        if not self.half or packet.duration != self.half:
            return False
        if first is not None and (None in (first.pts, packet.pts) or abs(packet.pts - first.pts) <= self.half):
            return True
        self._first = packet
        return False


def _complete_times(shown: list, step: int) -> tuple[list[int], frozenset[int]]:
    """The times of all pictures, in ticks, and which positions among them are not from the file.

    A packet of a stream may hold several pictures and store the time of the first. The others belong into the gaps.

    Args:
        shown: As in `_Packets`, in the order of decoding.
        step: Ticks from a picture to the next.
    """
    ticks = sorted({pts for pts, _, _ in shown if pts is not None})
    stored = [place for place, (pts, _, _) in enumerate(shown) if pts is not None]
    missing, filled = len(shown) - len(stored), []
    if missing and step > 0:
        before, behind = stored[0], len(shown) - 1 - stored[-1]
        filled = [ticks[0] - step * (number + 1) for number in range(before)]
        missing -= before
        for tick, later in zip(ticks, ticks[1:], strict=False):
            room = min(round((later - tick) / step) - 1, missing)
            filled += [tick + (later - tick) * (number + 1) // (room + 1) for number in range(room)]
            missing -= max(room, 0)
        filled += [ticks[-1] + step * (number + 1) for number in range(min(behind + _REORDERED, missing))]
    ticks, guessed = sorted({*ticks, *filled}), set(filled)
    return ticks, frozenset(place for place, tick in enumerate(ticks) if tick in guessed)


def _announced_seconds(container: Any, stream: Any) -> float:
    """When a Matroska stream ends by its header, which knows the length of the stream, or of the longest stream."""
    clock = _CLOCK.match(stream.metadata.get("DURATION", ""))
    if clock is not None:
        return sum(float(part) * unit for part, unit in zip(clock.groups(), (3600, 60, 1), strict=True))
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0


def _is_cut_matroska(path: AnyFile) -> bool:
    """Whether a file ends before its segment does, or does not say where that ends."""
    with open_bytes(path) as file:
        head = file.read(_HEAD_BYTES)
    place, size = 0, len(head)
    for mark in (b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"):
        place = head.find(mark, place) + len(mark)
        if place < len(mark) or place >= len(head) or head[place] == 0:
            return True
        length = 9 - head[place].bit_length()  # leading zeros of the first byte tell how many bytes the size has
        size = int.from_bytes(head[place : place + length], "big") ^ (1 << 7 * length)
        place += length + (size if mark[0] == 0x1A else 0)
    return size == (1 << 7 * length) - 1 or place + size > size_of(path)


def _without_leaps(ticks: list[int], leap: int, damage: str | None) -> tuple[list[int], str | None]:
    """The most ticks that follow each other without a leap, and what is wrong with the file."""
    ends = [place for place in range(1, len(ticks)) if ticks[place] - ticks[place - 1] > leap]
    if not ends:
        return ticks, damage
    pieces = [ticks[start:end] for start, end in zip([0, *ends], [*ends, len(ticks)], strict=True)]
    return max(pieces, key=len), damage or "its clock leaps by days"


def _build_index(path: AnyFile, stream: Any, formats: str, packets: _Packets) -> VideoIndex:
    tick, rate, shown = stream.time_base, float(stream.average_rate or 0) or None, packets.shown
    # AVI stores no presentation times (FFmpeg guesses, wrongly for reordered frames), raw streams no times at all.
    numbered, guessed = formats == "avi" or all(pts is None for pts, _, _ in shown), frozenset()
    if numbered:
        durations, ticks = {}, sorted({dts for _, dts, _ in shown if dts is not None})
        if len(ticks) < len(shown):
            tick, ticks = 1 / (stream.average_rate or stream.guessed_rate or 25), list(range(len(shown)))
            logger.warning(f"{path}: the file stores no times; {float(1 / tick):g} frames per second are assumed.")
    else:
        durations = {pts: duration for pts, _, duration in shown if pts is not None}
        # Frames shown before the first keyframe depend on pictures that are not in the file.
        first = packets.keyframes[0] if packets.keyframes else None
        shown = [entry for entry in shown if None in (first, entry[0]) or entry[0] >= first]
        lasting = sorted(duration for _, _, duration in shown)[len(shown) // 2] if shown else 0
        ticks, guessed = _complete_times(shown, lasting or round(1 / ((rate or 25) * tick)))
    if not ticks:
        found = f" ({packets.damage})" if packets.damage else ""
        raise VideoDecodeError(
            f"{path}: expected video frames, the file has none that can be displayed{found}. If they lie in another "
            "file, give that one."
        )
    ticks, damage = _without_leaps(ticks, round(_CLOCK_LEAP / tick), packets.damage)
    times = [float((value - ticks[0]) * tick) for value in ticks]
    last = durations.get(ticks[-1], 0) * tick or (times[-1] / (len(times) - 1) if len(times) > 1 else 1 / (rate or 1))
    seekable = not numbered and not _SEEKABLE_FORMATS.isdisjoint(formats.split(","))
    places = {value: place for place, value in enumerate(ticks)} if seekable else {}
    return VideoIndex(
        keys=list(range(len(ticks))) if numbered else ticks,
        times=times,
        start=float(ticks[0] * tick),
        keyframes=sorted({places[pts] for pts in packets.keyframes if pts in places}),
        duration=times[-1] + float(last),
        rate=rate,
        numbered=numbered,
        damage=damage,
        guessed=guessed,
    )
