"""Conversations: histories in all the forms that callers have them, and which of their videos a turn is about.

What is surprising:
* The returned form holds `EncodedVideo`s. After JSON they are paths, or empty strings for frames from memory; after a
  deep copy they are other objects that stand for the same content. All of these are the same video.
* The published code's form (role strings of the template, `<image>` in front of the first question) is understood,
  too.
"""

import os

# The video's place in a message of the published code, and its role strings.
PUBLISHED_VIDEO_MARK = "<image>\n"
PUBLISHED_ROLE_PREFIX = "<|im_start|>"


def read_history(history, video) -> list[dict]:
    """A copy of a history in our form.

    Args:
        history: None, or `{"role", "content"}` messages.
        video: The turn's video, which a published history means by its mark.

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
                "a message of chat_history needs a role in text, and as content text or a list of text and video "
                f"items; got {message!r}"
            )
        if isinstance(content, str) and content.startswith(PUBLISHED_VIDEO_MARK) and not video_items(messages):
            if video is None:
                raise ValueError("chat_history means a video by '<image>' but does not hold it: pass its path")
            text = content.removeprefix(PUBLISHED_VIDEO_MARK)
            content = [{"type": "video", "video": video}, {"type": "text", "text": text}]
        elif not isinstance(content, str):
            content = [_read_item(item) for item in content]
        messages.append({"role": role.removeprefix(PUBLISHED_ROLE_PREFIX), "content": content})
    return messages


def _read_item(item) -> dict:
    if item.get("type") != "video":
        return dict(item)
    return {"type": "video", "video": next((item[key] for key in ("video", "path") if item.get(key) is not None), "")}


def video_items(messages) -> list[dict]:
    """The video items of all messages, in order; changing one changes the conversation."""
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [item for content in contents for item in content if item.get("type") == "video"]


def is_encoded(video) -> bool:
    """Whether this is an `EncodedVideo` (of any copy of the remote code)."""
    return getattr(video, "is_encoded_video", False)


def place_video(messages, video) -> bool:
    """Finds a turn's video among those of the conversation; where the conversation lacks its content, puts it there.

    Returns:
        Whether the conversation has it; False for a new video. None is no new video.

    Raises:
        ValueError: If the conversation is about frames from memory that neither it nor the turn holds.
    """
    items = video_items(messages)
    lost = [
        item for item in items if isinstance(item["video"], str) and not (item["video"] or is_encoded(item["video"]))
    ]
    if lost:
        if len(lost) > 1 or video is None or _path(video) and not is_encoded(video):
            raise ValueError(
                "a video in chat_history has no path: frames from memory do not survive JSON. Pass these frames (or "
                "their EncodedVideo) as the video of this turn"
            )
        lost[0]["video"] = video
        return True
    if video is None:
        return True
    for item in items:
        known = item["video"]
        if video is known or is_encoded(video) and is_encoded(known) and video.mark is known.mark:
            return True
        if _path(video) and _path(known) and os.path.realpath(_path(video)) == os.path.realpath(_path(known)):
            if is_encoded(video):
                item["video"] = video
            elif is_encoded(known) and not known.is_current():
                item["video"] = _path(video)  # another file by now
            return True
    return False


def _path(video) -> str:
    return os.fspath(video) if isinstance(video, (str, os.PathLike)) else ""
