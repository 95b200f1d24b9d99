"""What callers hand to the processor, checked and brought into one form: messages, videos, images, other arguments.

Surprising here: nothing is ignored silently. Transformers' pipelines and evaluation clients pass a lot that has no
effect on this model; that is listed below, and whatever is not listed is refused with what to do instead.

Each function takes plain values and gives plain values, so the processor stays the only place that knows the tokenizer
and opens videos.
"""

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from PIL import Image

ROLES = ("system", "user", "assistant")

# Where a video given as a dict (as a message's video item is) names its source and its sampling.
SOURCE_KEYS = ("video", "video_path", "path", "url")
SAMPLING_KEYS = {name: name for name in ("max_num_frames", "sample_fps", "max_sample_fps", "num_frames", "fps")}
SAMPLING_KEYS |= {"max_frames": "max_num_frames", "nframes": "num_frames"}
# Pixel budgets are other models' settings: here every frame has the tower's size.
IGNORED_KEYS = {"type", "max_pixels", "min_pixels", "total_pixels", "resized_height", "resized_width"}
# Where an image given as a dict names its source.
IMAGE_SOURCE_KEYS = ("image", "path", "url")
VIDEO_KEYS = {*SOURCE_KEYS, *SAMPLING_KEYS, *IGNORED_KEYS, "timestamps", "media_dict"}
# How the published VideoChat-Flash code calls what a path leads to, in the words of `open_video`. A video file has two
# names there, for two decoders; here they are one.
READ_TYPES = {"decord": "file", "av": "file", "gif": "gif", "img": "folder", "frame": "folder"}
# What two names for one thing exclude.
RIVALS = {"num_frames": ("max_num_frames", "fps", "sample_fps"), "fps": ("sample_fps", "max_sample_fps")}

# What pipelines and evaluation clients pass: without effect here whatever the value, or as long as it is empty.
HARMLESS = {"add_special_tokens", "do_sample_frames", "load_audio_from_video", "return_attention_mask", "verbose"}
HARMLESS_IF_EMPTY = {
    *("images", "audios", "audio", "tools", "documents", "video_metadata", "max_length", "pad_to_multiple_of"),
    *("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs", "sanitize_control_tokens"),
    *("return_metadata", "return_assistant_tokens_mask", "return_token_type_ids", "return_mm_token_type_ids"),
    "reasoning_effort",
}


def read_messages(conversation, markers):
    """Checks a conversation.

    Args:
        conversation: A list of messages, or an object with `messages` (the pipelines' `Chat`).
        markers: Per kind of visual item (`"video"`, `"image"`) its marker, which no text may contain.

    Returns:
        Its messages with bare visual items, and the full visual items in order.

    Raises:
        ValueError: On a malformed message.
    """
    messages, visuals = [], []
    for number, message in enumerate(getattr(conversation, "messages", conversation)):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"message {number} must be a dict with a role of {', '.join(ROLES)}: {message!r:.200}")
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)):
            raise ValueError(f"message {number}: content must be a string or a list of items, got {content!r:.200}")
        items = []
        for item in [content] if isinstance(content, str) else content:
            item = {"type": "text", "text": item} if isinstance(item, str) else item
            kind = item.get("type") if isinstance(item, dict) else type(item).__name__
            if kind in markers:
                visuals.append(item)
                items.append({"type": kind})
            elif kind == "text" and isinstance(item.get("text"), str):
                if found := [marker for marker in markers.values() if marker in item["text"]]:
                    raise ValueError(
                        f"message {number} has {found[0]} in its text, where only video and image items put it; "
                        "remove it and pass {'type': 'video', 'video': ...} in its place"
                    )
                items.append({"type": "text", "text": item["text"]})
            else:
                raise ValueError(
                    f"message {number}: an item must be {{'type': 'text', 'text': ...}}, {{'type': 'video', "
                    f"'video': ...}} or {{'type': 'image', 'image': ...}}, got type {kind!r}"
                )
        messages.append({**message, "content": content if isinstance(content, str) else items})
    return messages, visuals


def refuse_unsupported(kwargs: dict, known: Iterable[str], truncation=False) -> None:
    """Raises on what would otherwise be ignored silently; see `HARMLESS`. `known` are the arguments that are taken."""
    if truncation not in (None, False, "do_not_truncate"):
        raise ValueError("a prompt is never truncated (frames or the question would go); lower max_num_frames")
    unknown = sorted(set(kwargs) - HARMLESS - HARMLESS_IF_EMPTY)
    if unknown:
        raise ValueError(f"unknown arguments: {', '.join(unknown)}; the processor takes {', '.join(known)}")
    unsupported = [name for name, value in kwargs.items() if name not in HARMLESS and not _is_empty(value)]
    if unsupported:
        raise ValueError(f"not supported: {', '.join(unsupported)}; leave them out")


def assign_visuals(visuals, counts, marker, kind="video"):
    """Distributes the videos, or the images, over the texts.

    Args:
        visuals: None, one of them, a flat list, or a list (or None) per text.
        counts: The markers of each text.
        marker: The marker, for the message.
        kind: `"video"` or `"image"`.

    Returns:
        A list per text, as long as it has markers.

    Raises:
        ValueError: If visuals and markers do not fit.
    """
    is_one = _is_one_video if kind == "video" else _is_one_image
    if visuals is None:
        visuals = []
    elif is_one(visuals):
        visuals = [visuals]
    nested = [visual is None or not is_one(visual) for visual in visuals]
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
    return groups


def assign_timestamps(timestamps, count):
    """One entry (a list of seconds or None) per video."""
    timestamps = [None] * count if timestamps is None else list(timestamps)
    if timestamps and all(time is not None and np.ndim(time) == 0 for time in timestamps):
        timestamps = [timestamps]
    if len(timestamps) != count:
        raise ValueError(f"timestamps has entries for {len(timestamps)} videos, but {count} videos came")
    return timestamps


def video_request(video, timestamps, given, defaults):
    """One video as arguments of `open_video`.

    Args:
        video: A source, or a dict that names it; a dict's own settings win over the call's.
        timestamps: Seconds of frames in memory, or None.
        given: The sampling settings that the call names; of these only the two `sample_fps` may be None.
        defaults: `max_num_frames`, `sample_fps` and `max_sample_fps` of the processor.

    Returns:
        The arguments, `source` among them.

    Raises:
        ValueError: On unknown keys, no source, or settings that exclude each other.
    """
    part = {}
    while isinstance(video, dict):
        sources = [name for name in SOURCE_KEYS if video.get(name) is not None]
        if len(sources) != 1 or not set(video) <= VIDEO_KEYS:
            raise ValueError(
                f"a video item takes one of {', '.join(SOURCE_KEYS)}, and timestamps, {', '.join(SAMPLING_KEYS)}; "
                f"got {', '.join(map(str, video))}"
            )
        timestamps, part = video.get("timestamps", timestamps), read_media_dict(video.get("media_dict"))
        own = {SAMPLING_KEYS[name]: value for name, value in video.items() if name in SAMPLING_KEYS}
        given = given | {name: value for name, value in own.items() if value is not None or "sample_fps" in name}
        video = video[sources[0]]

    for name, others in RIVALS.items():
        clash = [other for other in others if given.get(other) is not None]
        if name in given and clash:
            raise ValueError(f"{name} conflicts with {', '.join(clash)}; pass one of them")
    request = {name: given.get(name, default) for name, default in defaults.items()}
    if "num_frames" in given:
        request = {"max_num_frames": given["num_frames"], "sample_fps": None, "max_sample_fps": None}
        video, timestamps = _choose_in_memory(video, timestamps, given["num_frames"], defaults["sample_fps"])
    elif "fps" in given:
        request |= {"sample_fps": given["fps"], "max_sample_fps": None}
    return {"source": video, "timestamps": timestamps, **request, **part}


def read_media_dict(media_dict) -> dict:
    """What clients of the published VideoChat-Flash code say about a path, as arguments of `open_video`.

    Args:
        media_dict: None, or a dict with some of `video_read_type`, and `start` and `end` in seconds.

    Returns:
        Those of `read_as`, `start` and `end` that differ from the defaults.

    Raises:
        ValueError: On anything else.
    """
    if media_dict is not None and not isinstance(media_dict, dict):
        raise ValueError(f"media_dict must be a dict, got {media_dict!r:.100}")
    given = {name: value for name, value in (media_dict or {}).items() if value is not None}
    if unknown := sorted(set(given) - {"video_read_type", "start", "end"}):
        raise ValueError(f"media_dict takes video_read_type, start and end, not {', '.join(map(str, unknown))}")
    kind = given.pop("video_read_type", "decord")
    if kind not in READ_TYPES:
        raise ValueError(f"media_dict: video_read_type must be one of {', '.join(READ_TYPES)}, got {kind!r}")
    return given | ({} if READ_TYPES[kind] == "file" else {"read_as": READ_TYPES[kind]})


def image_source(image):
    """The source of an image, which may be given as a dict (as a message's image item is).

    Raises:
        ValueError: On unknown keys or no source.
    """
    if not isinstance(image, dict):
        return image
    sources = [name for name in IMAGE_SOURCE_KEYS if image.get(name) is not None]
    if len(sources) != 1 or not set(image) <= {*IMAGE_SOURCE_KEYS, *IGNORED_KEYS}:
        raise ValueError(
            f"an image item takes one of {', '.join(IMAGE_SOURCE_KEYS)}; got {', '.join(map(str, image))}"
        )
    return image[sources[0]]


def pad_rows(rows, pad_id, padding, padding_side, return_tensors):
    """Pads rows of ids; `input_ids` and `attention_mask` in the form that is asked for.

    Raises:
        ValueError: On an unknown form, or unequal rows that are to be one tensor without padding.
    """
    padded = {None: False, False: False, "do_not_pad": False, True: True, "longest": True}.get(padding)
    if padded is None or padding_side not in (None, "left", "right") or return_tensors not in (None, "pt", "np"):
        raise ValueError(
            "padding must be True or False, padding_side 'left' or 'right', return_tensors 'pt', 'np' or None; "
            f"got {padding!r}, {padding_side!r}, {return_tensors!r}"
        )
    longest = max(map(len, rows))
    if return_tensors is not None and not padded and min(map(len, rows)) < longest:
        raise ValueError("the prompts have unequal lengths; pass padding=True to get one tensor")
    ids, mask = [], []
    for row in rows:
        pads, ones = [pad_id] * (longest - len(row) if padded else 0), [1] * len(row)
        zeros = [0] * len(pads)
        ids.append(row + pads if padding_side == "right" else pads + row)
        mask.append(ones + zeros if padding_side == "right" else zeros + ones)
    convert = {None: list, "pt": torch.tensor, "np": np.array}[return_tensors]
    return {"input_ids": convert(ids), "attention_mask": convert(mask)}


def _choose_in_memory(video, timestamps, count, sample_fps):
    """Spreads `count` frames over those in memory, all of which `open_video` would use; a file is left alone."""
    if isinstance(video, (list, tuple, np.ndarray, torch.Tensor)) and len(video) > count > 0:
        if timestamps is None:
            timestamps = [index / (sample_fps or 1) for index in range(len(video))]
        if len(timestamps) == len(video):
            chosen = np.linspace(0, len(video) - 1, count, dtype=int).tolist()
            return [video[index] for index in chosen], [timestamps[index] for index in chosen]
    return video, timestamps


def _is_one_video(value):
    """Whether this is a single video: frames, a path, a dict, anything but a list of videos."""
    if isinstance(value, (list, tuple)):
        return len(value) > 0 and (isinstance(value[0], Image.Image) or getattr(value[0], "ndim", None) == 3)
    return getattr(value, "ndim", 4) != 5


def _is_one_image(value):
    """Whether this is a single image: anything but a list."""
    return not isinstance(value, (list, tuple))


def _is_empty(value):
    """Whether an argument asks for nothing: None, False, or nothing inside, however deep."""
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_empty, value))
    return value is None or value is False
