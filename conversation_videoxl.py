"""Conversations: histories in all the forms that callers have them, and which videos and images a turn is about.

What is surprising:
* The returned form holds `EncodedVideo`s. After JSON they are paths, or empty strings for frames from memory; after a
  deep copy they are other objects that stand for the same content. All of these are the same video.
* The published code's form (role strings of the template, `<image>` in front of the first question) is understood,
  too.
* A part of a video, or a folder or GIF, is told from the whole file by its item's `media_dict`.
"""

import os

from .image_processing_videoxl import is_image
from .processor_inputs_videoxl import READ_TYPES, read_media_dict

# The kinds of items that are seen; each names its source by its kind.
VISUAL_KINDS = ("video", "image")
# The video's place in a message of the published code, and its role strings.
PUBLISHED_VIDEO_MARK = "<image>\n"
PUBLISHED_ROLE_PREFIX = "<|im_start|>"


def turn_items(visual) -> list[dict]:
    """What a turn brings to see, as content items.

    Args:
        visual: None, one video or image (also as a list of one path), or a list of content items (`{"type": "video",
            "video": ...}`, `"image"`, `"text"`) for several of them.

    Returns:
        New dicts: `{"type": kind, kind: source}`, a video of frames with its `timestamps`, a part of a path with its
        `media_dict`, or text.

    Raises:
        ValueError: On an item of another form.
    """
    if visual is None:
        return []
    if isinstance(visual, dict):
        visual = [visual]
    if isinstance(visual, (list, tuple)) and visual and all(isinstance(part, (str, os.PathLike)) for part in visual):
        if len(visual) > 1:
            raise ValueError("several videos are a list of items {'type': 'video', 'video': path}, not of paths")
        visual = visual[0]
    if not (isinstance(visual, (list, tuple)) and len(visual) > 0 and isinstance(visual[0], dict)):
        kind = visual.kind if is_encoded(visual) else "image" if is_image(visual) else "video"
        item = {"type": kind, kind: visual}
        if is_encoded(visual) and (part := part_of(item)):
            read_type = next(name for name, value in READ_TYPES.items() if value == part.pop("read_as", "file"))
            item["media_dict"] = {"video_read_type": read_type, **part}  # what is left of it in JSON
        return [item]
    items = []
    for item in visual:
        kind = item.get("type") if isinstance(item, dict) else None
        takes = {"video": ("timestamps", "media_dict"), "image": (), "text": ()}.get(kind)
        source = next((item[key] for key in (kind, "path") if takes is not None and item.get(key) is not None), None)
        if source is None or not set(item) <= {"type", kind, "path", *takes}:
            raise ValueError(
                "items must be {'type': 'video', 'video': ...} (with timestamps for frames from memory, with "
                "media_dict for a part of a file), {'type': 'image', 'image': ...} or {'type': 'text', 'text': ...}, "
                f"got {item!r:.200}"
            )
        items.append({"type": kind, kind: source, **{key: item[key] for key in takes if key in item}})
    return items


def source_of(item):
    """The video or image of a visual item."""
    return item[item["type"]]


def read_history(history, visual) -> list[dict]:
    """A copy of a history in our form.

    Args:
        history: None, or `{"role", "content"}` messages.
        visual: The item of the turn's video or image, which a published history means by its mark; or None.

    Raises:
        ValueError: On anything else.
    """
    if history is not None and not isinstance(history, (list, tuple)):
        raise ValueError(f"chat_history must be a list of messages, got {type(history).__name__}")
    messages = []
    for message in history or []:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f'chat_history must be a list of {{"role", "content"}} messages, got {message!r}')
        role, content = message["role"], message["content"]
        items = isinstance(content, (list, tuple)) and all(isinstance(item, dict) for item in content)
        if not isinstance(role, str) or not (isinstance(content, str) or items):
            raise ValueError(
                "a message of chat_history needs a role in text, and as content text or a list of text, video and "
                f"image items; got {message!r}"
            )
        if isinstance(content, str) and content.startswith(PUBLISHED_VIDEO_MARK) and not visual_items(messages):
            if visual is None:
                raise ValueError("chat_history means a video by '<image>' but does not hold it: pass its path")
            content = [dict(visual), {"type": "text", "text": content.removeprefix(PUBLISHED_VIDEO_MARK)}]
        elif not isinstance(content, str):
            content = [_read_item(item) for item in content]
        messages.append({"role": role.removeprefix(PUBLISHED_ROLE_PREFIX), "content": content})
    return messages


def _read_item(item) -> dict:
    kind = item.get("type")
    if kind not in VISUAL_KINDS:
        return dict(item)
    source = next((item[key] for key in (kind, "path") if item.get(key) is not None), "")
    part = {"media_dict": item["media_dict"]} if item.get("media_dict") is not None else {}
    return {"type": kind, kind: source, **part}


def visual_items(messages) -> list[dict]:
    """The video and image items of all messages, in order; changing one changes the conversation."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [item for content in contents for item in content if item.get("type") in VISUAL_KINDS]


def is_encoded(video) -> bool:
    """Whether this is an `EncodedVideo` (of any copy of the remote code)."""
    return getattr(video, "is_encoded_video", False)


def place_visual(messages, visual) -> bool:
    """Finds a turn's video or image among those of the conversation; where that lacks its content, puts it there.

    Args:
        messages: The conversation.
        visual: A visual item, or None.

    Returns:
        Whether the conversation has it; False for a new one. None is no new one.

    Raises:
        ValueError: If the conversation is about frames from memory that neither it nor the turn holds.
    """
    items = visual_items(messages)
    video = None if visual is None else source_of(visual)
    lost = [
        item
        for item in items
        if isinstance(source_of(item), str) and not (source_of(item) or is_encoded(source_of(item)))
    ]
    if lost:
        if len(lost) > 1 or video is None or _path(video) and not is_encoded(video):
            raise ValueError(
                "a video or image in chat_history has no path: what comes from memory does not survive JSON. Pass "
                "these frames, this image (or the EncodedVideo of it) with this turn"
            )
        lost[0].clear()
        lost[0].update(visual)
        return True
    if video is None:
        return True
    for item in items:
        known = source_of(item)
        if video is known and "timestamps" in visual:
            item["timestamps"] = visual["timestamps"]
        if video is known or is_encoded(video) and is_encoded(known) and video.mark is known.mark:
            return True
        if _path(video) and _path(known) and os.path.realpath(_path(video)) == os.path.realpath(_path(known)):
            if not _same_part(visual, item):
                continue
            if is_encoded(video):
                item[item["type"]] = video
            elif is_encoded(known) and not known.is_current():
                item[item["type"]] = _path(video)  # another file by now
            return True
    return False


def _same_part(visual, item) -> bool:
    """Whether a turn's video shows the same of its path as one of the conversation; one that does not say so does."""
    if not is_encoded(source_of(visual)) and visual.get("media_dict") is None:
        return True
    return part_of(visual) == part_of(item)


def part_of(item) -> dict:
    """What a video item shows of its path, see `read_media_dict`."""
    if is_encoded(video := source_of(item)):
        found = {name: video.sampling.get(name) for name in ("read_as", "start", "end")}
        return {name: value for name, value in found.items() if value not in (None, "file")}
    return read_media_dict(item.get("media_dict"))


def _path(video) -> str:
    return os.fspath(video) if isinstance(video, (str, os.PathLike)) else ""
