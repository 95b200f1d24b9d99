"""`chat`, `encode_video` and `EncodedVideo`: from a file and a question to an answer, encoding each video once.

What is surprising:
* A video stands before all text about it and everything is causal, so its key-values do not depend on the question. An
  `EncodedVideo` is that cache with the token ids it belongs to; a question runs behind a fork of it, and several
  videos or turns are one growing sequence.
* `EncodedVideo` is a `str`, the path it was made from. So a history that holds one survives `json.dumps`; what comes
  back is the path, and the video is encoded anew.
* Nothing is kept in the model: whether a video can be reused is decided by comparing its token ids with the
  conversation's.
"""

import copy
import os
import sys

import torch
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.utils import logging

from .kv_cache import fork_cache
from .processing_videoxl import VideoXLProcessor
from .video_processing_videoxl import normalize_frames, open_video

logger = logging.get_logger(__name__)

# An answer's length where neither the caller nor the checkpoint says one, in tokens.
DEFAULT_MAX_NEW_TOKENS = 1024
# From this many frames on, encoding shows a progress bar on a terminal.
PROGRESS_MIN_FRAMES = 256
# What of an `EncodedVideo`'s sampling settings is needed to sample the same frames again.
SAMPLING = ("max_num_frames", "sample_fps", "max_sample_fps")
# The video's place in a message of the published code, and its role strings.
PUBLISHED_VIDEO_MARK = "<image>\n"
PUBLISHED_ROLE_PREFIX = "<|im_start|>"


class EncodedVideo(str):
    """A video as the language model holds it, for any number of questions. Made by `model.encode_video`.

    As a string it is the path of its file, or empty for frames from memory.

    Attributes:
        num_frames: Sampled frames.
        timestamps: Seconds of every sampled frame, from the first displayed frame of the file.
        duration: Seconds of the whole video.
        sampling: The sampling settings.
        input_ids: Token ids of everything up to the end of the video: prompt header, timestamps and placeholders.
        layout: Where the visual tokens are among them.
        cache: Their key-values. Never extend it; `fork_cache` it.
    """

    is_encoded_video = True

    def __new__(cls, source, **state):
        return super().__new__(cls, source or "")

    def __init__(self, source, *, processor, model, cache, input_ids, sampling):
        super().__init__()
        self._processor, self._model = processor, model
        self.cache, self.input_ids = cache, input_ids
        self.sampling = sampling
        self.timestamps: list[float] = []
        self.duration = 0.0
        self._tail = None  # frames of a last, partial group: they are encoded again when more frames come
        self._stamp = _file_stamp(source)

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    @property
    def layout(self):
        return self.cache.layout

    @property
    def nbytes(self) -> int:
        """Bytes of the key-values."""
        return sum(layer.nbytes for layer in self.cache.layers)

    def is_current(self) -> bool:
        """Whether the file it was made from is still the same (always true for frames from memory)."""
        return _file_stamp(str(self)) == self._stamp

    def append(self, frames, timestamps) -> None:
        """Adds frames to the end of the video; afterwards it equals one that was encoded from all frames at once.

        Args:
            frames: PIL images or uint8 [F, H, W, 3].
            timestamps: Their seconds, increasing, later than the last frame so far.

        Raises:
            ValueError: On frames or timestamps of another form, or times that do not follow.
        """
        reader = open_video(frames, size=self._processor.image_size, timestamps=timestamps, sample_fps=None)
        with reader:
            if self.timestamps and reader.timestamps[0] <= self.timestamps[-1]:
                raise ValueError(
                    f"appended frames must be later than the last one at {self.timestamps[-1]} s, the first new one is at "
                    f"{reader.timestamps[0]} s"
                )
            for batch in reader:
                self._extend(batch)

    @torch.no_grad()
    def _extend(self, batch) -> None:
        frames, times = batch.frames, list(batch.timestamps)
        if self._tail is not None:
            kept = len(self._tail)
            frames, times = torch.cat([self._tail, frames]), self.timestamps[-kept:] + times
            del self.timestamps[-kept:]
            self._model.drop_last_group(self.cache)
            del self.input_ids[self.layout.length :]
        processor = self._processor
        pixels = normalize_frames(frames.to(self._model.device), processor.image_mean, processor.image_std)
        time_ids = [processor.time_token_ids(seconds) for seconds in times[:: processor.frames_per_group]]
        self.input_ids += self._model.prefill_frames(self.cache, pixels, time_ids, bool(self.timestamps))
        self.timestamps += times
        self.duration = max(self.duration, times[-1])
        partial = len(times) % processor.frames_per_group
        self._tail = frames[-partial:] if partial else None

    def __deepcopy__(self, memo):
        # Histories are copied freely: share the tensors, never copy the model.
        other = EncodedVideo.__new__(EncodedVideo, str(self))
        other.__dict__.update(self.__dict__)
        other.cache = fork_cache(self.cache)
        other.input_ids, other.timestamps = list(self.input_ids), list(self.timestamps)
        return other

    def __reduce__(self):
        raise TypeError(
            "an EncodedVideo cannot be pickled; pass its path, or encode the video again where it is needed"
        )


class VideoXLChatMixin:
    """`chat` and `encode_video` for a model that offers `prefill_text`, `prefill_frames` and `generate`."""

    @torch.no_grad()
    def encode_video(
        self,
        video_path,
        tokenizer,
        max_num_frames=512,
        sample_fps=1,
        max_sample_fps=4,
        *,
        timestamps=None,
        system_prompt=None,
        video_backend="pyav",
        progress=None,
    ) -> EncodedVideo:
        """Decodes, encodes and prefills a video once; `chat` then answers any number of questions about it.

        Args:
            video_path: A path, or frames: a list of PIL images or uint8 [F, H, W, 3].
            tokenizer: The checkpoint's tokenizer.
            max_num_frames: At most so many frames.
            sample_fps: Frames per second of video; None spreads `max_num_frames` frames uniformly.
            max_sample_fps: Upper rate for short videos; None for no up-sampling.
            timestamps: Seconds of the frames, for frames from memory.
            system_prompt: System message of the conversations to come; None takes the template's.
            video_backend: `"pyav"` or `"decord"`.
            progress: True or False forces or forbids the progress bar; None shows it for long videos on a terminal.

        Returns:
            An `EncodedVideo`.

        Raises:
            FileNotFoundError, ValueError, VideoDecodeError: On a video that cannot be read or settings out of range.
        """
        if video_path is None:
            raise ValueError("encode_video needs a video: a path, or frames with timestamps")
        processor = VideoXLProcessor.from_config(self.config, tokenizer)
        messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        messages.append({"role": "user", "content": [{"type": "video", "video": video_path}]})
        prefix = processor.prompt_pieces(processor.render(messages))[0]
        options = {"timestamps": timestamps, "backend": video_backend}
        options |= {"max_num_frames": max_num_frames, "sample_fps": sample_fps, "max_sample_fps": max_sample_fps}
        return self._encode(processor, video_path, None, prefix, options, progress)

    @torch.no_grad()
    def chat(
        self,
        video_path,
        tokenizer,
        user_prompt,
        chat_history=None,
        return_history=True,
        max_num_frames=512,
        sample_fps=1,
        max_sample_fps=4,
        generation_config=None,
        *,
        streamer=None,
        progress=None,
        timestamps=None,
        video_backend="pyav",
    ):
        """Answers a question about a video, or continues a conversation.

        Args:
            video_path: A path, an `EncodedVideo`, frames (PIL images or uint8 [F, H, W, 3]), or None: text only, or
                the video of the history.
            tokenizer: The checkpoint's tokenizer.
            user_prompt: The question.
            chat_history: What an earlier call returned: `{"role", "content"}` messages. Never changed in place. Its
                videos are reused without decoding, encoding or prefilling them again; a path that it does not hold is
                a new video.
            return_history: Also return the history with this turn.
            max_num_frames, sample_fps, max_sample_fps: Sampling, see `encode_video`.
            generation_config: A dict or `GenerationConfig`; None takes the checkpoint's own, else greedy decoding of
                at most 1,024 new tokens. Entries that are None, unknown or without meaning for greedy decoding are
                dropped; `until` is a stop string or a list of them.
            streamer: A transformers streamer.
            progress, timestamps, video_backend: See `encode_video`.

        Returns:
            The answer, or `(answer, history)`.

        Raises:
            FileNotFoundError, ValueError, VideoDecodeError: On bad input, with what to do.
        """
        if not isinstance(user_prompt, str) or not user_prompt.strip():
            raise ValueError(f"user_prompt must be a question in text, got {user_prompt!r}")
        processor = VideoXLProcessor.from_config(self.config, tokenizer)
        messages = _normalise_history(chat_history, video_path)
        known = [item["video"] for item in _video_items(messages)]
        if video_path is None or any(_same_video(video_path, video) for video in known):
            if timestamps is not None:
                raise ValueError("timestamps belong to frames from memory; this turn brings no new frames")
            messages.append({"role": "user", "content": user_prompt})
        else:
            content = [{"type": "video", "video": video_path}, {"type": "text", "text": user_prompt}]
            messages.append({"role": "user", "content": content})
        options = {"timestamps": timestamps, "backend": video_backend}
        options |= {"max_num_frames": max_num_frames, "sample_fps": sample_fps, "max_sample_fps": max_sample_fps}
        encoded, suffix = self._encode_conversation(processor, messages, options, progress)
        settings = self._generation_settings(generation_config, tokenizer)
        ids = (encoded.input_ids if encoded is not None else []) + suffix
        input_ids = torch.tensor([ids], device=self.device)
        output = self.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            past_key_values=fork_cache(encoded.cache) if encoded is not None else None,
            generation_config=settings,
            streamer=streamer,
            tokenizer=tokenizer,
        )
        answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": answer})
        return (answer, messages) if return_history else answer

    def _encode_conversation(self, processor, messages, options, progress):
        """The conversation's last video, encoded behind everything before it (None without one), and the ids that follow."""
        items = _video_items(messages)
        pieces = processor.prompt_pieces(processor.render(messages))
        encoded = None
        for item, piece in zip(items, pieces[:-1], strict=True):
            video, prefix = item["video"], piece
            before = encoded.input_ids if encoded is not None else []
            if getattr(video, "is_encoded_video", False):
                own = processor.expand([before + prefix, []], [video.timestamps])
                if own == video.input_ids and video.is_current():
                    encoded = video
                    continue
                if not str(video):
                    raise ValueError(
                        "this EncodedVideo was made behind another prompt (system message, earlier turns or videos) or by "
                        "another model, and has no file to be encoded from again; pass its frames"
                    )
                logger.warning_once("a video is encoded again: the conversation before it, or its file, has changed")
                sampling = {key: value for key, value in video.sampling.items() if key in SAMPLING}
                video, options = str(video), {**options, **sampling}
            new_frames = video is items[-1]["video"]
            frame_options = options if new_frames else {**options, "timestamps": None}
            encoded = item["video"] = self._encode(processor, video, encoded, prefix, frame_options, progress)
        return encoded, pieces[-1]

    def _encode(self, processor, source, base, prefix, options, progress) -> EncodedVideo:
        """Streams a video through tower and language model, behind `base` and the prefix ids."""
        reader = open_video(
            source, size=processor.image_size, batch_frames=self.config.resolve_vision_chunk_frames(), **options
        )
        with reader:
            cache = self.prefill_text(None if base is None else fork_cache(base.cache), prefix)
            encoded = EncodedVideo(
                reader.source,
                processor=processor,
                model=self,
                cache=cache,
                input_ids=(list(base.input_ids) if base is not None else []) + prefix,
                sampling=reader.sampling,
            )
            if progress is None:
                progress = reader.num_frames >= PROGRESS_MIN_FRAMES and sys.stderr.isatty()
            with tqdm(total=reader.num_frames, unit="frame", desc="encoding video", disable=not progress) as bar:
                for batch in reader:
                    encoded._extend(batch)
                    bar.update(len(batch.timestamps))
        encoded.duration = max(encoded.duration, reader.duration)
        return encoded

    def _generation_settings(self, given, tokenizer) -> GenerationConfig:
        settings = copy.deepcopy(self.generation_config)
        given = given.to_diff_dict() if isinstance(given, GenerationConfig) else dict(given or {})
        given = {key: value for key, value in given.items() if value is not None}
        if until := given.pop("until", None):
            given["stop_strings"] = [until] if isinstance(until, str) else list(until)
        known = set(GenerationConfig().to_dict())
        if unknown := sorted(set(given) - known):
            logger.warning_once(f"generation_config: dropped unknown entries {', '.join(unknown)}")
        given = {key: value for key, value in given.items() if key in known}
        if "temperature" in given:
            given.setdefault("do_sample", given["temperature"] > 0)
        if given.get("do_sample") and given.get("temperature") == 0:
            given["do_sample"] = False
        settings.update(**given)
        if not settings.do_sample:
            settings.do_sample = False
            settings.temperature = settings.top_p = settings.top_k = None
        if settings.max_new_tokens is None and "max_length" not in given:
            settings.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        if settings.pad_token_id is None:
            settings.pad_token_id = (
                tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            )
        return settings


def _normalise_history(history, video_path) -> list[dict]:
    """A copy of the history in our form; the published form (role strings, `<image>` mark) is understood."""
    messages = []
    for message in history or []:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f'chat_history must be a list of {{"role", "content"}} messages, got {message!r}')
        role = message["role"].removeprefix(PUBLISHED_ROLE_PREFIX)
        content = message["content"]
        if isinstance(content, str):
            if content.startswith(PUBLISHED_VIDEO_MARK) and video_path is not None and not _video_items(messages):
                text = content.removeprefix(PUBLISHED_VIDEO_MARK)
                content = [{"type": "video", "video": video_path}, {"type": "text", "text": text}]
        else:
            content = [_normalise_item(item) for item in content]
        messages.append({"role": role, "content": content})
    return messages


def _normalise_item(item) -> dict:
    item = dict(item)
    if item.get("type") == "video":
        source = next((item[key] for key in ("video", "path") if item.get(key) is not None), None)
        if source is None or (isinstance(source, str) and not source and not hasattr(source, "is_encoded_video")):
            raise ValueError(
                "a video in chat_history has no path: frames from memory do not survive JSON. Start again with the frames"
            )
        item = {"type": "video", "video": source}
    return item


def _video_items(messages) -> list[dict]:
    contents = [message["content"] for message in messages if not isinstance(message["content"], str)]
    return [item for content in contents for item in content if item.get("type") == "video"]


def _same_video(given, known) -> bool:
    if given is known:
        return True
    if not isinstance(given, (str, os.PathLike)) or not isinstance(known, (str, os.PathLike)):
        return False
    if getattr(given, "is_encoded_video", False) and getattr(known, "is_encoded_video", False):
        return given.cache is known.cache
    return bool(str(known)) and os.path.realpath(given) == os.path.realpath(known)


def _file_stamp(path):
    """Size and modification time of a file, None where there is no file."""
    try:
        status = os.stat(path) if path else None
    except OSError:
        return None
    return status and (status.st_size, status.st_mtime_ns)
