"""Who answers on the page: videos are encoded and asked for any number of visitors, whose videos are theirs.

What is surprising:
* A visitor's encoded video and conversation are a value (`Session`); the model holds nothing of them.
* What reading a video warns of (it is damaged, say) is part of the session: the visitor has no other way to hear it.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import TextIteratorStreamer
from videoxl import open_video, times_in_text

from .saved import SavedVideos
from .timeline import clock


@dataclass(frozen=True)
class Limits:
    """What a visitor may ask for.

    Attributes:
        max_num_frames: Frames of a video that are read, at most.
        max_minutes: Longest video.
        max_new_tokens: Longest answer.
    """

    max_num_frames: int = 512
    max_minutes: float = 120
    max_new_tokens: int = 512


@dataclass(frozen=True, eq=False)  # gradio hashes what a session holds: by identity, for histories have no hash
class Session:
    """One visitor's encoded video and the conversation about it; the history is None before the first answer.

    `warnings` is what reading the video warned of.
    """

    video: object
    history: list | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer as far as it has come; complete when it has the session that follow-up questions go to.

    Attributes:
        text: The answer.
        chunks: What it saw of the video, see `return_chunks` of `model.chat`.
        cited: (start, end) seconds of the times that the answer names.
    """

    text: str
    session: Session | None = None
    chunks: Sequence[dict] = ()
    cited: Sequence[tuple[float, float]] = ()


class _Stopped(Exception):
    """Nobody waits for the answer any more."""


class _Streamer(TextIteratorStreamer):
    """Hands pieces of an answer from the thread that generates; ends that thread when it was told to stop."""

    stopped = False

    def put(self, value):
        if self.stopped:
            raise _Stopped
        super().put(value)


class VideoChat:
    """Encodes videos and answers questions, for any number of visitors: what is theirs is a `Session`."""

    def __init__(self, model, tokenizer, limits: Limits):
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.saved = SavedVideos(model, tokenizer, limits.max_num_frames)

    def encode(self, path: str) -> Session:
        """Reads and encodes a video file.

        Raises:
            FileNotFoundError, ValueError: If it cannot be read, is too long, or is no file.
        """
        if not os.path.isabs(path):
            raise ValueError(f"{path} is an address or a path: give the video itself")
        with open_video(path, size=1) as reader:
            duration = reader.duration
        if duration > 60 * self.limits.max_minutes:
            raise ValueError(
                f"{path} is {clock(duration)} long; this page takes up to {clock(60 * self.limits.max_minutes)}. "
                "Cut it, and upload the part that you want to ask about."
            )
        sampling = {"max_num_frames": self.limits.max_num_frames}
        with heard() as warnings:
            video = self.model.encode_video(path, self.tokenizer, **sampling, progress=True)
        # Idle visitors must not fill the GPU; a question brings back what it needs.
        video = video if self.model.device.type == "cpu" else video.to("cpu")
        return Session(video, warnings=tuple(explain(text, path) for text in warnings))

    def open_saved(self, path: str) -> Session:
        """The session of a video that a page saved; ValueError if the file is not such a one."""
        video = self.saved.load(path)
        return Session(video if self.model.device.type == "cpu" else video.to("cpu"))

    def ask(self, session: Session, question: str, remember: bool = True) -> Iterator[Reply]:
        """Answers a question about the session's video, which is not read or encoded again.

        Args:
            session: From `encode`, or from the reply before.
            question: The question.
            remember: Whether the answer may refer to earlier questions and answers.

        Yields:
            The answer as it grows, then the complete reply. Closing the iterator stops the answer.

        Raises:
            ValueError: On an empty question, and for what `model.chat` raises it.
        """
        streamer = _Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        turn = {
            "chat_history": session.history if remember else None,
            "return_chunks": True,
            "streamer": streamer,
            "generation_config": {"max_new_tokens": self.limits.max_new_tokens},
        }
        with ThreadPoolExecutor(1) as worker:
            answering = worker.submit(self.model.chat, session.video, self.tokenizer, question, **turn)
            # An error ends the answer, too.
            answering.add_done_callback(lambda _: streamer.on_finalized_text("", stream_end=True))
            text = ""
            try:
                for piece in streamer:
                    text += piece
                    yield Reply(text.strip())
            finally:
                streamer.stopped = True
            answer, history, chunks = answering.result()
        cited = times_in_text(answer)
        duration = session.video.duration
        # A negative start counts from the end of the video.
        cited = [(max(duration + start, 0) if start < 0 else start, min(end, duration)) for start, end in cited]
        cited = [(start, end) for start, end in cited if start <= end]
        yield Reply(answer, replace(session, history=history), chunks, cited)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """A list of what the model's code warns of in the meantime; one video at a time is read, so it is this one's."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    # Loaded by `Auto*`, the code has another package for each folder; its modules keep their names.
    handler.addFilter(lambda record: "videoxl" in record.name or "videoxl" in record.module)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger().removeHandler(handler)


def explain(error: Exception | str, path: str | None) -> str:
    """A message for a visitor, who knows the name of the file but not where this machine keeps it."""
    if isinstance(error, torch.OutOfMemoryError):
        return "The memory of this machine is too small for that. Try a shorter video."
    return str(error).replace(path, Path(path).name) if path else str(error)
