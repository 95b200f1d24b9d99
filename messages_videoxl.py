"""What callers say: content items, histories, and times named in a question; the same for `chat` and the processor.

What does not fit is a ValueError that says what was expected and what came.

What is surprising:
* An item is read into one form, a dict: `type`, the source under the type's name, and settings (timestamps, sampling,
  a part of a file). A key whose value is None counts as absent, because the `datasets` library gives every item the
  keys of all others. So an item asks for uniform sampling by `num_frames`, not by `sample_fps: None`.
* `chat` returns histories that hold `EncodedVideo`s. After JSON these are paths, or empty strings for frames from
  memory; after a deep copy they are other objects for the same content. All of these are the same video.
* Histories of the published code are understood, too: role strings of the template, and `<image>` in front of the
  first question.
* A time in a question is a guess about words. A false one costs one dense chunk, so doubtful phrases count as times.
"""

import base64
import hashlib
import math
import os
import re
from dataclasses import replace
from itertools import islice
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image

from .frame_sampling_videoxl import SAMPLING_FIELDS, Sampling
from .image_processing_videoxl import is_image_file
from .video_index_videoxl import MemoryFile

ROLES, VISUAL_KINDS = ("system", "user", "assistant"), ("video", "image")
# Where an item names its source; the first is the one that it has here.
SOURCE_KEYS = {
    "video": ("video", "video_path", "path", "url", "video_url"),
    "image": ("image", "path", "url", "image_url"),
}
SOURCE_KEYS["text"] = ("text",)
# Types of items as clients of OpenAI's interface write them.
TYPE_NAMES = {"video_url": "video", "image_url": "image"}
# What a video item may say of its sampling: names of `Sampling`, and transformers' and other libraries' names.
SAMPLING_KEYS = {name: name for name in ("max_num_frames", "sample_fps", "max_sample_fps", "start", "end")}
SAMPLING_KEYS |= {"num_frames": "num_frames", "fps": "fps", "max_frames": "max_num_frames", "nframes": "num_frames"}
OWN_KEYS = {"video": (*SAMPLING_KEYS, "timestamps", "media_dict"), "image": (), "text": ()}
# Pixel budgets and levels of detail are other models' settings: here every frame has the tower's size.
IGNORED_KEYS = {"type", "max_pixels", "min_pixels", "total_pixels", "resized_height", "resized_width", "detail"}
# The names of the published VideoChat-Flash code for what a path leads to, and those of `Sampling.read_as`. It names a
# video file by its decoder, which is another setting here.
READ_TYPES = {"decord": "file", "av": "file", "gif": "gif", "img": "folder", "frame": "folder"}
# Settings that say the same thing twice.
RIVALS = {"num_frames": ("max_num_frames", "fps", "sample_fps"), "fps": ("sample_fps", "max_sample_fps")}
# The video's place in a message of the published code, and its role strings.
PUBLISHED_VIDEO_MARK = "<image>\n"
PUBLISHED_ROLE_PREFIX = "<|im_start|>"
HALF_LETTER = re.compile("[\ud800-\udfff]")
# Bytes of a file in memory where no `frames_config` says how many may come.
MAX_SOURCE_BYTES = 2**30
_DATA, _FILE = re.compile(r"\s*data:([^,]{0,200}),", re.I), re.compile(r"file:(?://([^/]*))?(/.*)", re.I | re.S)
_LONGEST_PATH = 4096  # letters: what is longer is no path


def read_source(source, max_bytes=MAX_SOURCE_BYTES):
    """A video or image as callers give it, in the form that is opened.

    A `file://` address becomes a path; a `data:` address, bytes, and a binary file, from its start, become a
    `MemoryFile`. A list is read item by item, everything else stays.

    Raises:
        ValueError: On an address of another form, a file of text, or more than `max_bytes`.
    """
    if isinstance(source, (list, tuple)) and any(map(_is_reference, source)):
        return [read_source(part, max_bytes) for part in source]
    if isinstance(source, str) and not is_encoded(source):
        if source[:50].lstrip()[:5].lower() == "data:":
            return MemoryFile(_read_data(source, max_bytes))
        if len(source) > _LONGEST_PATH:
            raise ValueError(
                f"a text of {len(source):,} letters is no path; if it is base64, put data:video/mp4;base64, before it"
            )
        return _read_file_address(source) if source[:6].lower() == "file:/" else source
    if isinstance(source, (bytes, bytearray, memoryview)):
        _require_bytes(memoryview(source).nbytes, max_bytes)
        return MemoryFile(bytes(source))
    return MemoryFile(_read_file(source, max_bytes)) if hasattr(source, "read") else source


def _is_reference(source) -> bool:
    """Whether this stands for a file, or is a list, which may hold such."""
    return isinstance(source, (str, bytes, bytearray, memoryview, list, tuple)) or hasattr(source, "read")


def _require_bytes(found, allowed) -> None:
    if found > allowed:
        raise ValueError(
            f"a file of {found:,} bytes came, at most {allowed:,} are taken into memory; write it to a file and pass "
            "its path, or raise frames_config.max_source_bytes"
        )


def _read_data(address, max_bytes) -> bytes:
    head = _DATA.match(address)
    if head is None or not head[1].lower().replace(" ", "").endswith(";base64"):
        raise ValueError("a data: address must be data:video/mp4;base64,… (or another type of video or image)")
    text = "".join(address[head.end() :].split()).rstrip("=")
    _require_bytes(len(text) * 3 // 4, max_bytes)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        # Not chained: the cause would show what came.
        raise ValueError("a data: address holds no valid base64; was it cut off, or encoded for a URL?") from None


def _read_file_address(address) -> str:
    found = _FILE.match(address)
    if found is None or (found[1] or "localhost").lower() != "localhost":
        raise ValueError(f"{address:.200} is no address of a file on this machine; expected file:///folder/video.mp4")
    path = found[2][1:] if re.match("/[A-Za-z]:", found[2]) else found[2]  # a drive of Windows
    return path if os.path.exists(path) else unquote(path)


def _read_file(file, max_bytes) -> bytes:
    if seekable := getattr(file, "seekable", lambda: False)():
        place = file.tell()
        _require_bytes(file.seek(0, os.SEEK_END), max_bytes)
        file.seek(0)
    parts, total = [], 0
    while total <= max_bytes and (part := file.read(max_bytes + 1 - total)):  # pipes give less than is asked for
        if not isinstance(part, bytes):
            raise ValueError("a file was opened as text; open it in binary mode: open(path, 'rb')")
        parts.append(part)
        total += len(part)
    if seekable:
        file.seek(place)
    _require_bytes(total, max_bytes)
    return b"".join(parts)


def _told(value) -> str:
    """What callers gave, for a message: short, and without the content of files."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r:.40}: {_told(each)}" for key, each in list(value.items())[:6]) + "}"
    if isinstance(value, (bytes, bytearray, memoryview, MemoryFile)) or str(value)[:5].lower() == "data:":
        return "the content of a file"
    return f"{value!r:.200}"


def read_item(item, needs_source=True, max_bytes=MAX_SOURCE_BYTES) -> dict:
    """Reads a content item into a new one of the one form.

    Args:
        item: A dict with a `type`. Its source may be another dict, whose keys win.
        needs_source: False accepts a video or image without a source, which becomes `""`.
        max_bytes: See `read_source`.
    """
    kind = item.get("type") if isinstance(item, dict) else None
    kind = TYPE_NAMES.get(kind, kind) if isinstance(kind, str) else None
    if kind not in SOURCE_KEYS:
        raise ValueError(
            "an item must be {'type': 'text', 'text': ...}, {'type': 'video', 'video': ...} or {'type': 'image', "
            f"'image': ...}}, got {_told(item)}"
        )
    given = {key: value for key, value in item.items() if value is not None and key not in IGNORED_KEYS}
    sources = [key for key in SOURCE_KEYS[kind] if key in given]
    unknown = sorted(map(str, given.keys() - {*SOURCE_KEYS[kind], *OWN_KEYS[kind]}))
    if unknown or len(sources) > 1 or (needs_source and not sources):
        a_kind, own = f"{'an' if kind == 'image' else 'a'} {kind}", ", ".join(OWN_KEYS[kind])
        takes = ", ".join(SOURCE_KEYS[kind]) + (own and f" and {own}")
        raise ValueError(f"{a_kind} item takes one of {takes}; got {', '.join(map(str, given)) or 'nothing'}")
    source = given.pop(sources[0]) if sources else ""
    if isinstance(source, dict):
        return {**given, **read_item({**source, "type": kind}, needs_source, max_bytes)}
    if kind == "text" and not isinstance(source, str):
        raise ValueError(f"a text item needs its text as a string, got {source!r:.200}")
    return {"type": kind, kind: source if kind == "text" else read_source(source, max_bytes), **given}


def source_of(item):
    """The video or image of a visual item."""
    return item[item["type"]]


def readable_source(item):
    """The video or image of a visual item in a form that can be opened; an `EncodedVideo` becomes its path."""
    source = source_of(item)
    if not is_encoded(source):
        return source
    if not str(source) or source.appended:
        raise ValueError(
            "this EncodedVideo holds frames that are in no file to be read from again: pass the frames themselves, or "
            "ask it by chat behind the prompt that it was made with"
        )
    return str(source)


def turn_items(visual, max_bytes=MAX_SOURCE_BYTES) -> list[dict]:
    """The items that a turn of `chat` brings.

    Args:
        visual: None, a video (frame files, too), an image, a list of one path, or items.
        max_bytes: See `read_source`.
    """
    if visual is None:
        return []
    parts = visual if isinstance(visual, (list, tuple)) else [visual]
    if parts and isinstance(parts[0], dict):
        return [read_item(item, True, max_bytes) for item in parts]
    visual = read_source(visual, max_bytes)
    if isinstance(visual, list) and len(visual) == 1 and isinstance(visual[0], (str, os.PathLike, MemoryFile)):
        visual = visual[0]
    kind = visual.kind if is_encoded(visual) else "image" if is_image(visual) else "video"
    item = {"type": kind, kind: visual}
    if is_encoded(visual) and (part := part_of(item)):
        read_as = part.pop("read_as", "file")
        read_type = next(name for name, value in READ_TYPES.items() if value == read_as)
        item["media_dict"] = {"video_read_type": read_type, **part}  # JSON keeps this beside the path
    return [item]


def is_image(source) -> bool:
    """Whether this is one image, not a video: a PIL image, an array [H, W, 3], or an image file."""
    if isinstance(source, (str, os.PathLike, MemoryFile)):
        return is_image_file(source if isinstance(source, MemoryFile) else os.fspath(source))
    return isinstance(source, Image.Image) or (isinstance(source, (np.ndarray, torch.Tensor)) and source.ndim == 3)


def is_encoded(visual) -> bool:
    """Whether this is an `EncodedVideo` (of any copy of the remote code), or an item of one."""
    return getattr(source_of(visual) if isinstance(visual, dict) else visual, "is_encoded_video", False)


def read_media_dict(media_dict) -> dict:
    """Which part of a path is wanted, as fields of `Sampling` that differ from the defaults.

    Args:
        media_dict: As in the published VideoChat-Flash code: None, or a dict with some of `video_read_type`, and
            `start` and `end` in seconds.
    """
    if media_dict is not None and not isinstance(media_dict, dict):
        raise ValueError(f"media_dict must be a dict, got {media_dict!r:.100}")
    given = {name: value for name, value in (media_dict or {}).items() if value is not None}
    if unknown := sorted(set(given) - {"video_read_type", "start", "end"}):
        raise ValueError(f"media_dict takes video_read_type, start and end, not {', '.join(map(str, unknown)):.200}")
    kind = given.pop("video_read_type", "decord")
    if kind not in READ_TYPES:
        raise ValueError(f"media_dict: video_read_type must be one of {', '.join(READ_TYPES)}, got {kind!r:.200}")
    return given | ({} if READ_TYPES[kind] == "file" else {"read_as": READ_TYPES[kind]})


def named_sampling(given) -> dict:
    """The settings by any name of `SAMPLING_KEYS`, under the names of `Sampling`.

    `num_frames` stays among them, because it also chooses among frames in memory.
    """
    named = {SAMPLING_KEYS[name]: value for name, value in given.items() if name in SAMPLING_KEYS}
    for name, others in RIVALS.items():
        clash = [other for other in others if named.get(other) is not None]
        if name in named and clash:
            raise ValueError(f"{name} conflicts with {', '.join(clash)}; pass one of them")
    if "num_frames" in named:
        return {**named, "max_num_frames": named["num_frames"], "sample_fps": None, "max_sample_fps": None}
    if "fps" in named:
        named |= {"sample_fps": named.pop("fps"), "max_sample_fps": None}
    return named


def part_of(item) -> dict:
    """The part of its path that a video item shows, in the form of `read_media_dict`."""
    found = {name: value for name, value in wanted_of(item).items() if name in ("read_as", "start", "end")}
    return {name: value for name, value in found.items() if value not in (None, "file")}


def wanted_of(item) -> dict:
    """The sampling that a video item asks for, as `named_sampling` gives it; for an `EncodedVideo`, its own."""
    if is_encoded(item):
        return {name: value for name, value in source_of(item).sampling.items() if name in SAMPLING_FIELDS}
    part, named = read_media_dict(item.get("media_dict")), named_sampling(item)
    if clash := [name for name in part if name in named]:
        raise ValueError(f"media_dict and the item both say {', '.join(clash)}; say it once")
    return part | named


def video_request(item, sampling: Sampling, called=None) -> dict:
    """A video item as the arguments `source`, `timestamps` and `sampling` of `open_video`.

    Args:
        item: As `read_item` gives it.
        sampling: The settings that neither item nor call name.
        called: The settings that the call names, as `named_sampling` gives them; the item's own win.
    """
    source, seconds, own = readable_source(item), item.get("timestamps"), wanted_of(item)
    called, spacing = called or {}, sampling.sample_fps or 1
    settings = {**({} if "num_frames" in called and "max_num_frames" in own else called), **own}
    count, sampling = settings.pop("num_frames", None), replace(sampling, **settings)
    in_memory = isinstance(source, (list, tuple, np.ndarray, torch.Tensor))
    if in_memory and seconds is None and own.get("sample_fps"):
        seconds = [index / own["sample_fps"] for index in range(len(source))]  # the item knows how far they are apart
    if in_memory and count is not None and len(source) > count > 0:
        if seconds is None:
            seconds = [index / spacing for index in range(len(source))]
        if len(seconds) == len(source):
            chosen = np.linspace(0, len(source) - 1, count, dtype=int).tolist()
            source, seconds = [source[index] for index in chosen], [seconds[index] for index in chosen]
    return {"source": source, "timestamps": seconds, "sampling": sampling}


def read_messages(messages, name="message", needs_source=True, max_bytes=MAX_SOURCE_BYTES) -> list[dict]:
    """Reads messages into new ones, their items into the one form; what else they hold stays.

    Args:
        messages: A list of `{"role", "content"}`; content is text or a list of items, of which a string is text, too.
        name: What a message is called in errors.
        needs_source, max_bytes: See `read_item`.
    """
    read = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        role = role.removeprefix(PUBLISHED_ROLE_PREFIX) if isinstance(role, str) else None
        if role not in ROLES:
            raise ValueError(f"{name} {number} must be a dict with a role of {', '.join(ROLES)}: {_told(message)}")
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(f"{name} {number}: content must be a string or a list of items, got {_told(content)}")
        if not isinstance(content, str):
            items = [{"type": "text", "text": item} if isinstance(item, str) else item for item in content]
            content = [read_item(item, needs_source, max_bytes) for item in items]
        read.append({**message, "role": role, "content": content})
    return read


def without_sources(messages, markers) -> list[dict]:
    """What the template sees of messages: texts, none with a marker or half a letter, and the types of the rest."""
    bare = []
    for number, message in enumerate(messages):
        content = message["content"]
        texts = [content] if isinstance(content, str) else [item.get("text", "") for item in content]
        if found := [marker for marker in markers for text in texts if marker in text]:
            raise ValueError(
                f"message {number} has {found[0]} in its text, where only video and image items put it; "
                "remove it and pass {'type': 'video', 'video': ...} in its place"
            )
        if halves := [half for text in texts for half in HALF_LETTER.findall(text)]:
            raise ValueError(
                f"message {number} has half of a letter in its text (\\u{ord(halves[0]):04x}, a lone surrogate): it "
                "was cut within a letter, or decoded with surrogateescape; mend it"
            )
        if not isinstance(content, str):
            content = [item if item["type"] == "text" else {"type": item["type"]} for item in content]
        bare.append({**message, "content": content})
    return bare


def read_history(history, visual, max_bytes=MAX_SOURCE_BYTES) -> list[dict]:
    """A copy of a history, its items in the one form.

    Args:
        history: None, or messages, whose videos and images may have lost their source in JSON.
        visual: The item of the turn's video or image, which a published history means by its mark; or None.
        max_bytes: See `read_source`.
    """
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"chat_history must be a list of messages, got {type(history).__name__}")
    messages = read_messages(history or [], "chat_history: message", False, max_bytes)
    for message in messages:
        text = message["content"]
        if isinstance(text, str) and text.startswith(PUBLISHED_VIDEO_MARK) and not visual_items(messages):
            if visual is None:
                raise ValueError("chat_history means a video by '<image>' but does not hold it: pass its path")
            question = {"type": "text", "text": text.removeprefix(PUBLISHED_VIDEO_MARK)}
            message["content"] = [dict(visual), question]
    return messages


def visual_items(messages) -> list[dict]:
    """The video and image items of all messages, in order; changing one changes the conversation."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [item for content in contents for item in content if item["type"] in VISUAL_KINDS]


def place_visual(messages, visual) -> bool:
    """Whether a conversation holds a turn's video or image (an item, or None, which it always holds).

    Frames from memory do not survive JSON: the one item that lost its source there takes the turn's, and so holds it.
    """
    items = visual_items(messages)
    lost = [item for item in items if isinstance(source_of(item), str) and not _path(item) and not is_encoded(item)]
    if lost:
        if len(lost) > 1 or visual is None or _path(visual) and not is_encoded(visual):
            raise ValueError(
                "a video or image in chat_history has no path: what comes from memory does not survive JSON. Pass "
                "these frames, this image (or the EncodedVideo of it) with this turn"
            )
        lost[0].clear()
        lost[0].update(visual)
        return True
    return visual is None or any(_is_same(visual, item) for item in items)


def _is_same(visual, item) -> bool:
    """Whether a turn's video or image is this one of the conversation; if so, the conversation takes the newer one."""
    video, known = source_of(visual), source_of(item)
    if video is known and "timestamps" in visual:
        item["timestamps"] = visual["timestamps"]
    if video is known or is_encoded(visual) and is_encoded(item) and video.mark is known.mark:
        return True
    if (origin := origin_of(video)) is None or origin != origin_of(known):
        return False
    if "timestamps" in visual and is_encoded(item):  # frame files, of which only the order is in the origin
        if list(map(float, visual["timestamps"])) != known.timestamps:
            return False
        item["timestamps"] = visual["timestamps"]
    # A turn that names no part and no sampling takes what is there.
    names_part = is_encoded(visual) or not {"media_dict", "start", "end"}.isdisjoint(visual)
    wanted, shown = {} if is_encoded(visual) else wanted_of(visual), wanted_of(item)
    counts = [name for name in ("max_num_frames", "sample_fps", "max_sample_fps") if name in wanted]
    if names_part and part_of(visual) != part_of(item) or any(shown.get(name) != wanted[name] for name in counts):
        return False
    if is_encoded(visual):
        item[item["type"]] = video
    elif is_encoded(item) and not known.is_current():
        item[item["type"]] = _path(visual)  # another file by now
    return True


def origin_of(source) -> str | None:
    """What tells a video or image from others by its files: a path, or a digest; None for frames from memory."""
    if is_encoded(source) and not str(source):
        return source.origin
    if isinstance(source, MemoryFile):
        return hashlib.sha256(source.data).hexdigest()
    if isinstance(source, list):
        parts = [origin_of(part) for part in source]
        return None if None in parts else hashlib.sha256("\0".join(parts).encode("utf-8", "replace")).hexdigest()
    return os.path.realpath(source) if isinstance(source, (str, os.PathLike)) else None


def _path(item) -> str:
    source = source_of(item)
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""


def assign_visuals(
    visuals, texts, marker, kind="video", timestamps=None, max_bytes=MAX_SOURCE_BYTES
) -> list[list[dict]]:
    """Distributes the videos, or the images, of a call over its texts: a list of items per text, one per marker.

    Args:
        visuals: None, one of them, a flat list, or a list (or None) per text. Each is a source, or an item whose
            `type` may be left out.
        texts: The rendered prompts.
        marker: Stands for one of them in a text.
        kind: `"video"` or `"image"`.
        timestamps: Seconds of the frames of one video, or a list with such a list (or None) per video.
        max_bytes: See `read_source`.
    """
    counts = [text.count(marker) for text in texts]
    visuals = read_source(visuals, max_bytes)
    visuals = [] if visuals is None else [visuals] if _is_one(visuals, kind) else visuals
    nested = [visual is None or not _is_one(visual, kind) for visual in visuals]
    if any(nested):
        if not all(nested) or len(nested) != len(counts):
            raise ValueError(
                f"{kind}s must be a flat list, or a list of lists with one list per text; got {len(nested)} entries, "
                f"{sum(nested)} of them lists, for {len(counts)} texts"
            )
        groups = [[] if group is None else list(group) for group in visuals]
    else:
        rest = iter(visuals)
        groups = [list(islice(rest, count)) for count in counts]
        groups[-1] += rest
    for number, (group, count) in enumerate(zip(groups, counts, strict=True)):
        if len(group) != count:
            raise ValueError(
                f"text {number} has {count} {kind} markers ({marker}), but there are {len(group)} {kind}s "
                f"for it; write the text with apply_chat_template from messages with one {kind} item per {kind}"
            )
    items, total = (
        [[read_item({"type": kind, kind: visual}, True, max_bytes) for visual in group] for group in groups],
        sum(counts),
    )
    times = [None] * total if timestamps is None else list(timestamps)
    if times and all(time is not None and np.ndim(time) == 0 for time in times):
        times = [times]
    if len(times) != total:
        raise ValueError(f"timestamps has entries for {len(times)} videos, but {total} videos came")
    return [[{"timestamps": times.pop(0), **item} for item in group] for group in items]


def _is_one(value, kind) -> bool:
    """Whether this is a single video (frames, a path, a dict, anything but a list of videos) or a single image."""
    if isinstance(value, (list, tuple)):
        return kind == "video" and len(value) > 0 and all(map(is_image, value))
    return kind == "image" or getattr(value, "ndim", 4) != 5


# All repetitions are bounded, so the work is linear in the text.
_NUMBER, _PART, _AND = r"[0-9]{1,6}(?:\.[0-9]{1,3})?", r"[0-5]?[0-9](?:\.[0-9]{1,3})?", r"(?:, ?| )?(?:and )?"
_SECONDS = r"[ -]?(?:seconds?|secs?|s)"
_MINUTES = rf"[ -]?(?:minutes?|mins?|m)(?:{_AND}{_PART}{_SECONDS})?"
_HOURS = rf"[ -]?(?:hours?|hrs?|h)(?:{_AND}{_PART}(?:{_MINUTES}|{_SECONDS}))?"
_CLOCK = r"(?:[0-9]{1,2}:[0-5][0-9]|[0-9]{1,3}):[0-5][0-9](?:\.[0-9]{1,3})?(?![\w:]|\.[0-9])"
_FLAGS = re.ASCII | re.IGNORECASE
_TIME = re.compile(rf"(?<![\w.:,])(?:{_CLOCK}|{_NUMBER}(?:{_HOURS}|{_MINUTES}|{_SECONDS})(?!\w))", _FLAGS)
_LONE = re.compile(rf"{_NUMBER} ?[hm]", _FLAGS)
_UNITS = {"h": 3600, "m": 60, "s": 1}
# A time (or a number that borrows the unit) that begins a range, up to where the range's second time follows.
_RANGE = r"(?:\bbetween (?:the )?{0} ?and|{0} ?(?:-|–|—|to|until|till|through)) ?(?:the )?$"
_TIME_RANGE = re.compile(_RANGE.format(">"), _FLAGS)
_NUMBER_RANGE = re.compile(_RANGE.format(rf"(?<![\w.:,])({_NUMBER})"), _FLAGS)
_CONTEXT = 40  # characters that are read on either side of a time
# The first line whose pattern fits says what a time means in its context. @ is the time, < and > its borders, THE an
# optional article. In order: timestamps, times of day, dates and scores; ratios; decades; ...; durations; "10-second".
_READINGS = r"""
no      (?-i:Time )@:|[0-9]> ?(?:[ap]\.?m\b|o'?clock|ratio|aspect|score|odds|win\b)|[0-9]{4}-[0-9]{2}-[0-9]{2} @
no      \b(?:ratio|aspect|score|scale|odds|won|lost)(?: (?:of|is|was|by|at))? <[0-9]+:
no      (?:\b(?:the|early|late|mid)[ -]|')<[0-9]+0s>(?! mark)|<(?:18|19|20)[0-9]0s>
after   \bafter the first @|\bfrom (?:the )?@ (?:on|onwards?|forward|(?:to|until|till) the end)\b
before  \b(?:first|initial|opening) @|\bfrom the (?:start|beginning) (?:to|until|till) @
last    \b(?:last|final|closing|the past) @|@ (?:before|from) the end\b
after   \b(?:after|since|past) THE@
before  \b(?:before|until|till|up to) THE@
at      \b(?:at|around) THE@
no      \b(?:for|every|each|within|than|lasts?|lasting|takes?|took|next|previous|another|per) THE@
at      @ (?:mark|point|in\b|into)
no      [a-z]> (?:long|later|ago|apart|each|earlier|before|prior|of|after(?! the (?:start|beginning)))\b
no      <[0-9.]+-[a-z]+>|\b(?:an?|the|this|that) <[0-9.]+ (?:hour|minute|second)>
at      @
""".replace("@", "<[^>]*>").replace("THE", "(?:(?:the|about|around|only|an?) )?")
_MEANINGS = [(line[:8].strip(), re.compile(line[8:], _FLAGS)) for line in _READINGS.strip().splitlines()]


def times_in_text(text) -> list[tuple[float, float]]:
    """The times that a question names, in order of appearance.

    * m:ss, mm:ss, h:mm:ss: two digits below 60 after a colon (so not 16:9), without am, pm, ratio, score or a date.
    * Numbers with a unit, also joined: 75 s, 1.5 min, 2 minutes and 5 seconds, 1h02m03s. A lone m or h is none, nor
      are durations (for 10 s, a 10-second clip), decades (the 80s) and the prompt's own `Time 4.0s:`.
    * Ranges: between A and B, from A to B, A-B, where A may borrow B's unit.

    Returns:
        (start, end) in seconds. "at A" is (A, A), "after A" (A, inf), "before A" and "the first A" are (0, A), "the
        last A" is (-A, inf): a negative start counts from the video's end, which `chunks_at` knows.
    """
    text = " ".join(re.sub("[<>]", " ", text).split())
    matches = [match for match in _TIME.finditer(text) if not _LONE.fullmatch(match[0])]
    found, index = [], 0
    while index < len(matches):
        time, (start, end) = matches[index][0], matches[index].span()
        lead, low = text[max(start - _CONTEXT, 0) : start], _seconds(time)
        high = low
        index += 1
        if index < len(matches) and _TIME_RANGE.search(f"{lead}>{text[end : matches[index].start()]}"):
            end, high = matches[index].end(), _seconds(matches[index][0])
            index += 1
        elif ":" not in time and (bare := _NUMBER_RANGE.search(lead)):
            low = float(bare[1] or bare[2]) * _UNITS[re.search("[hms]", time.lower())[0]]
            lead = lead[: bare.start()]
        context = f"{lead}<{time}>{text[end : end + _CONTEXT]}"
        low, high = min(low, high), max(low, high)
        readings = {"at": (low, high), "after": (low, math.inf), "before": (0.0, high), "last": (-high, math.inf)}
        meaning = next(meaning for meaning, pattern in _MEANINGS if pattern.search(context))
        if meaning != "no":
            found.append(readings[meaning])
    return found


def _seconds(time: str) -> float:
    if ":" in time:
        return sum(float(part) * 60**power for power, part in enumerate(reversed(time.split(":"))))
    pieces = re.findall(r"([0-9.]+)[ -]?([hms])", time.lower())
    return sum(float(number) * _UNITS[unit] for number, unit in pieces)


def chunks_at(times, chunk_starts, chunk_ends, duration) -> list[int]:
    """The numbers of one video's chunks that overlap any of the times, ascending.

    A moment chooses the chunk that contains it, in a gap the one before.

    Args:
        times: From `times_in_text`; a negative start counts from `duration`.
        chunk_starts, chunk_ends: Per chunk, in seconds, ascending; there may be gaps between chunks.
        duration: Seconds; a time that starts behind it chooses nothing.
    """
    chosen = set()
    for start, end in times:
        start = max(duration + start, 0.0) if start < 0 else start
        if start > duration:
            continue
        inside = [chunk for chunk, first in enumerate(chunk_starts) if start < first < end]
        before = [chunk for chunk, first in enumerate(chunk_starts) if first <= start][-1:]
        if before and (not inside or chunk_ends[before[0]] > start or chunk_starts[before[0]] == start):
            inside += before
        chosen.update(inside)
    return sorted(chosen)
