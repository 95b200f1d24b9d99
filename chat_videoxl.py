"""`chat` and `encode_video`: from a file and a question to an answer, encoding each video once.

What is surprising:
* A video or image stands before all text about it and everything is causal, so its key-values do not depend on the
  question. A question runs behind a fork of an `EncodedVideo`'s cache; several videos or turns are one growing
  sequence.
* Nothing is kept in the model: whether a video can be reused is decided by comparing its token ids with the
  conversation's.
"""

import copy
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.utils import logging

from .encoded_video_videoxl import EncodedVideo
from .frame_sampling_videoxl import SAMPLING_FIELDS, plain_number
from .kv_tiers_videoxl import require_store
from .messages_videoxl import (
    VISUAL_KINDS,
    chunks_at,
    is_encoded,
    origin_of,
    part_of,
    place_visual,
    read_history,
    read_media_dict,
    readable_source,
    source_of,
    times_in_text,
    turn_items,
    video_request,
    visual_items,
)
from .prefill_videoxl import InForce, evaluating, prefill_text, require_context
from .processing_videoxl import VideoXLProcessor
from .video_processing_videoxl import open_video

logger = logging.get_logger(__name__)

# An answer's length where neither the caller nor the checkpoint says one, in tokens.
DEFAULT_MAX_NEW_TOKENS = 1024
# Values of a generation config that are what they seem.
_PLAIN = (bool, int, float, str, list)
# From this many frames on, encoding shows a progress bar on a terminal.
PROGRESS_MIN_FRAMES = 256


@dataclass(frozen=True)
class VideoEncoder:
    """How one call encodes its videos and images: each behind what the conversation holds before it.

    Args:
        model: A `VideoXLForConditionalGeneration`.
        processor: Its processor.
        in_force: Settings and policy of the call.
        rates: `max_num_frames`, `sample_fps` and `max_sample_fps` of the call; items may say otherwise.
        backend, progress, system_prompt, store: See `encode_video`.
    """

    model: Any
    processor: VideoXLProcessor
    in_force: InForce
    rates: dict
    backend: str
    progress: bool | None
    system_prompt: str | None = None
    store: str | None = None

    def encode_conversation(self, messages) -> tuple[EncodedVideo | None, list[int]]:
        """The conversation's last video or image (None without one), and the ids that follow it."""
        text, shown, encoded = self.processor.render(messages), [], None
        for number, item in enumerate(visual_items(messages)):
            # What is said behind a video hangs on what was read of it.
            prefix = self.processor.prompt_pieces(text, shown)[number]
            video, before = source_of(item), torch.tensor(prefix)
            if encoded is not None:
                before = torch.cat([encoded.input_ids, before])
            if is_encoded(video) and video.continues(self.model, before, encoded):
                encoded = video
                video.adopt(self.processor)
            else:
                if is_encoded(video):
                    _require_readable(video)
                encoded = item[item["type"]] = self.encode(item, encoded, prefix)
            item.pop("timestamps", None)
            shown.append(encoded.shown)
        return encoded, self.processor.prompt_pieces(text, shown)[-1]

    def encode(self, item, base, prefix) -> EncodedVideo:
        """Streams a video or image through tower and language model, behind `base` (or None) and the prefix ids."""
        source = readable_source(item)
        if self.store is not None:
            require_store(self.store, self.in_force.policy)
        if item["type"] == "video":
            return self._encode_video(item, base, prefix)
        if item.get("timestamps") is not None:
            raise ValueError("timestamps belong to frames of a video; an image has none. Leave them out")
        tiles = self.processor.read_tiles(source)
        encoded = self._start(source, base, prefix, kind="image", sampling={"size": self.processor.image_size})
        encoded.extend_image(tiles)
        return encoded if self.store is None else encoded.quantize(self.store)

    def _encode_video(self, item, base, prefix) -> EncodedVideo:
        config, model = self.model.config, self.model.model
        if config.frame_padding != "last":
            raise ValueError(
                "frame_padding='random' needs all frames at once, so it is for forward and generate; set it to 'last'"
            )
        unit = self.in_force.policy.unit_frames(config)
        batch_frames = max(config.resolve_vision_chunk_frames() // unit, 1) * unit
        # An item that was encoded before brings its sampling.
        options = {**video_request(item, self.processor.sampling(**self.rates)), **self.processor.frame_options}
        with open_video(**options, backend=self.backend, batch_frames=batch_frames) as reader:
            tokens = -(-reader.num_frames // config.frames_per_group) * model.tokens_per_group
            require_context(model, len(prefix) + tokens + (0 if base is None else len(base.input_ids)))
            encoded = self._start(options["source"], base, prefix, sampling=reader.sampling)
            encoded.start, shown = reader.start, self.progress
            if shown is None:
                shown = reader.num_frames >= PROGRESS_MIN_FRAMES and sys.stderr.isatty()
            shown_as = shown if callable(shown) else tqdm
            with shown_as(total=reader.num_frames, unit="frame", desc="encoding video", disable=not shown) as bar:
                for batch in reader:
                    encoded.extend(batch)
                    bar.update(len(batch.timestamps))
        encoded.duration = reader.duration
        return encoded if self.store is None else encoded.quantize(self.store)

    def _start(self, source, base, prefix, **facts) -> EncodedVideo:
        path = os.fspath(source) if isinstance(source, (str, os.PathLike)) else None
        ids, cache = torch.tensor(prefix), None
        if base is not None:
            ids, cache = torch.cat([base.input_ids, ids]), base.cache.fork()
        encoded = EncodedVideo(
            path,
            origin=None if path else origin_of(source),
            processor=self.processor,
            model=self.model,
            cache=prefill_text(self.model.model, cache, prefix, self.in_force),
            input_ids=ids,
            behind=None if base is None else base.mark,
            system_prompt=self.system_prompt,
            **facts,
        )
        if self.store is not None and encoded.policy.prefill == "streaming":
            encoded.quantize(self.store)  # what its window leaves behind is packed as it goes
        return encoded


def _require_readable(video) -> None:
    if not str(video) or video.appended:
        raise ValueError(
            "this EncodedVideo was made behind another prompt (system message, earlier turns, videos) or by another "
            "model, and its frames are in no file to be encoded from again. Ask it behind the prompt it was made with "
            "(its system_prompt), or pass its frames"
        )
    logger.warning(f"{video} is encoded again: the conversation before it has changed")


def _answering(method):
    """Without gradients, and as the model answers, whatever mode it is in."""

    @wraps(method)
    @torch.no_grad()
    def run(self, *args, **kwargs):
        with evaluating(self):
            return method(self, *args, **kwargs)

    return run


class VideoXLChatMixin:
    """`chat`, `chat_batch`, `encode_video` and `load_video` for a model that offers `generate`."""

    @_answering
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
        media_dict=None,
        store=None,
    ) -> EncodedVideo:
        """Decodes, encodes and prefills a video once; `chat` then answers any number of questions about it.

        Args:
            video_path: A path, a `file://` or `data:` address, bytes or an open binary file; or frames: a list of PIL
                images or of image files, or uint8 [F, H, W, 3]. Or one image: such a file, a PIL image or uint8
                [H, W, 3].
            tokenizer: The checkpoint's tokenizer.
            max_num_frames: At most so many frames.
            sample_fps: Frames per second of video; None spreads `max_num_frames` frames uniformly.
            max_sample_fps: Upper rate for short videos; None for no up-sampling. Members with a `frame_sampler` of
                their own (VideoChat-Flash) follow that while both rates are at their defaults.
            timestamps: Seconds of the frames, for frames from memory.
            system_prompt: System message of the conversations to come; None takes the template's.
            video_backend: `"pyav"`, `"decord"` or `"torchcodec"`.
            progress: True or False forces or forbids the progress bar; None shows it for long videos on a terminal. Or
                a class like tqdm, which is told of each batch of frames.
            media_dict: What of the path is wanted, in the words of VideoChat-Flash: `start` and `end` of a part, in
                seconds, and `video_read_type`: `"decord"` or `"av"` (a video file, read by `video_backend`), `"gif"`
                (each frame of the file is a second), `"img"` or `"frame"` (a folder of numbered pictures).
            store: `"int8"` or `"int4"` packs the key-values, see `EncodedVideo.quantize`.

        Returns:
            An `EncodedVideo`.

        Raises:
            FileNotFoundError, ValueError, VideoDecodeError: On a video that cannot be read or settings out of range.
        """
        items = turn_items(video_path, self.config.max_source_bytes)
        if [item["type"] in VISUAL_KINDS for item in items] != [True]:
            raise ValueError("encode_video needs one video (a path, or frames with timestamps) or one image")
        processor = VideoXLProcessor.from_config(self.config, tokenizer)
        messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        messages.append({"role": "user", "content": items})
        if timestamps is not None:
            items[0].setdefault("timestamps", timestamps)
        items[0][items[0]["type"]] = readable_source(items[0])
        self._set_media(items, media_dict)
        prefix = processor.prompt_pieces(processor.render(messages))[0]
        rates = {"max_num_frames": max_num_frames, "sample_fps": sample_fps, "max_sample_fps": max_sample_fps}
        encoder = VideoEncoder(
            self, processor, InForce(self.config), rates, video_backend, progress, system_prompt, store
        )
        return encoder.encode(items[0], None, prefix)

    @_answering
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
        dense_chunks=None,
        selector=None,
        return_chunks=False,
        media_dict=None,
        logits_processor=(),
        stopping_criteria=(),
    ):
        """Answers a question about videos and images, or continues a conversation.

        Args:
            video_path: A video or image as `encode_video` takes them, an `EncodedVideo`, or None: text only, or the
                video of the history. For several a list of items in order of appearance: `{"type": "image",
                "image": ...}`, `{"type": "video", "video": ...}` (frames with `"timestamps"`), `{"type": "text",
                "text": ...}`.
            tokenizer: The checkpoint's tokenizer.
            user_prompt: The question.
            chat_history: What an earlier call returned: `{"role", "content"}` messages. Never changed in place. Its
                videos are reused without decoding, encoding or prefilling them again; a path that it does not hold is
                a new video.
            return_history: Also return the history with this turn.
            max_num_frames, sample_fps, max_sample_fps: Sampling, see `encode_video`.
            generation_config: A dict or `GenerationConfig`; None takes the checkpoint's own, else greedy decoding of
                at most 1,024 new tokens. Entries that are None, unknown or without meaning for greedy decoding are
                dropped; `until` is a stop string or a list of them; `repetition_penalty`, `no_repeat_ngram_size` and
                stop strings look at words of the answer alone.
            streamer: A transformers streamer.
            progress, timestamps, video_backend: See `encode_video`.
            dense_chunks: Bi-level decoding: the chunks that stay dense, 0-based, instead of the automatic choice; one
                list per video of the conversation, or a plain list for one video.
            selector: Bi-level decoding: a callable `selector(question, chunks)` that returns `dense_chunks`; the
                chunks come as in `return_chunks`, without levels and scores.
            return_chunks: Also return the chunks of the conversation's videos and images: dicts with `video` (its
                number), `index`, `start` and `end` in seconds (0 for an image), `level` (`"dense"`, `"pooled"`,
                `"dropped"`) and `score` (None where nothing was scored).
            media_dict: See `encode_video`; a part of a file that the history does not hold is a new video.
            logits_processor, stopping_criteria: Lists of transformers' `LogitsProcessor`s and `StoppingCriteria`, or
                functions like them, in addition to those of `generation_config`. As in `generate` they get the ids of
                the whole sequence, prompt and answer.

        Returns:
            The answer, or a tuple of the answer and what was asked for, in the order history, chunks.

        Raises:
            FileNotFoundError, ValueError, VideoDecodeError: On bad input, with what to do.
        """
        if not isinstance(user_prompt, str) or not user_prompt.strip():
            raise ValueError(f"user_prompt must be a question in text, got {user_prompt!r:.200}")
        added = _callables(logits_processor=logits_processor, stopping_criteria=stopping_criteria)
        processor = VideoXLProcessor.from_config(self.config, tokenizer)
        messages = self._read_turn(video_path, user_prompt, chat_history, timestamps, media_dict)
        rates = {"max_num_frames": max_num_frames, "sample_fps": sample_fps, "max_sample_fps": max_sample_fps}
        in_force = InForce(self.config)
        system = messages[0]["content"] if messages[0]["role"] == "system" else None
        encoder = VideoEncoder(self, processor, in_force, rates, video_backend, progress, system)
        encoded, suffix = encoder.encode_conversation(messages)
        videos = [source_of(item) for item in visual_items(messages)]
        reload = _reload_options(in_force.settings, videos, user_prompt, dense_chunks, selector)
        cache = None if encoded is None else encoded.question_cache(in_force)
        shared, behind = [] if encoded is None else encoded.input_ids, {"past_key_values": cache, **reload, **added}
        answer = self._answer(shared, [suffix], generation_config, tokenizer, streamer, **behind)[0]
        messages.append({"role": "assistant", "content": answer})
        result = [answer] + [messages] * bool(return_history)
        if return_chunks:
            choices = None if cache is None else cache.choices
            result.append(_chunk_facts(videos, in_force.settings.decode_chunk_groups, choices))
        return tuple(result) if len(result) > 1 else answer

    def _read_turn(self, video_path, user_prompt, chat_history, timestamps, media_dict) -> list[dict]:
        """The conversation up to this turn's question, as messages of our own."""
        items = turn_items(video_path, self.config.max_source_bytes)
        visuals = [item for item in items if item["type"] in VISUAL_KINDS]
        if timestamps is not None:
            if len(visuals) != 1 or visuals[0]["type"] != "video" or is_encoded(source_of(visuals[0])):
                raise ValueError("timestamps belong to frames from memory; this turn brings no new frames")
            visuals[0].setdefault("timestamps", timestamps)
        self._set_media(visuals, media_dict, chat_history)
        messages = read_history(chat_history, visuals[0] if len(visuals) == 1 else None, self.config.max_source_bytes)
        first = source_of(visuals[0]) if visuals else None
        if not messages and is_encoded(first) and first.system_prompt is not None:
            messages.append({"role": "system", "content": first.system_prompt})
        known = [visual for visual in visuals or [None] if place_visual(messages, visual)]
        if timestamps is not None and known and not any("timestamps" in item for item in visual_items(messages)):
            raise ValueError("timestamps belong to frames from memory; this turn brings no new frames")
        new = [item for item in items if not any(item is visual for visual in known)]
        question = [{"type": "text", "text": user_prompt}]
        messages.append({"role": "user", "content": [*new, *question] if new else user_prompt})
        return messages

    @_answering
    def chat_batch(self, video, tokenizer, user_prompts, generation_config=None, *, dense_chunks=None) -> list[str]:
        """Answers several questions about one encoded video in one call of `generate`.

        Args:
            video: An `EncodedVideo`.
            tokenizer: The checkpoint's tokenizer.
            user_prompts: The questions, each by itself: any iterable of texts.
            generation_config, dense_chunks: See `chat`; `dense_chunks` holds for every question.

        Returns:
            One answer per question, equal to what single calls give.

        Raises:
            ValueError: On a video that is not encoded, no questions, or one without text.
        """
        if not is_encoded(video):
            raise ValueError("chat_batch asks an EncodedVideo: call model.encode_video first")
        listed = [] if isinstance(user_prompts, str) or not isinstance(user_prompts, Iterable) else list(user_prompts)
        if not listed:
            raise ValueError(f"user_prompts must be a list of questions, got {user_prompts!r:.200}")
        for number, prompt in enumerate(listed):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"user_prompts: question {number} must be a question in text, got {prompt!r:.200}")
        processor = VideoXLProcessor.from_config(self.config, tokenizer)
        system = [] if video.system_prompt is None else [{"role": "system", "content": video.system_prompt}]
        suffixes = []
        for prompt in listed:
            content = [{"type": video.kind, video.kind: video}, {"type": "text", "text": prompt}]
            text = processor.render([*system, {"role": "user", "content": content}])
            prefix, suffix = processor.prompt_pieces(text, [video.shown])
            suffixes.append(suffix)
        if not video.continues(self, torch.tensor(prefix)):
            raise ValueError(
                "this EncodedVideo was made by another model or behind earlier turns; ask it with chat and its "
                "history, or encode it again"
            )
        in_force = InForce(self.config)
        reloads = [_reload_options(in_force.settings, [video], prompt, dense_chunks, None) for prompt in listed]
        reload = reloads[0]
        if any("required_chunks" in each for each in reloads):
            reload = {"required_chunks": tuple(each.get("required_chunks", ()) for each in reloads)}
        cache = video.question_cache(in_force)
        return self._answer(
            video.input_ids, suffixes, generation_config, tokenizer, None, past_key_values=cache, **reload
        )

    @torch.no_grad()
    def load_video(self, path, tokenizer=None, *, verify=True, source=None, **sampling) -> EncodedVideo:
        """Loads what `EncodedVideo.save` wrote.

        Args:
            path: The file.
            tokenizer: Only needed to `append` frames later.
            verify: Check every byte. False maps the file without reading it: instant at any size, and unchecked.
            source: Where the video file is now, if it has moved.
            sampling: `max_num_frames`, `sample_fps`, `max_sample_fps`, `start`, `end` and `read_as` (see `open_video`)
                that it must have been made with.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or was made by another model, from another video file, or with another
                sampling.
        """
        if unknown := sorted(set(sampling) - set(SAMPLING_FIELDS)):
            raise ValueError(f"load_video knows no {', '.join(unknown):.200}; it takes {', '.join(SAMPLING_FIELDS)}")
        sampling = {name: plain_number(value) for name, value in sampling.items()}
        processor = None if tokenizer is None else VideoXLProcessor.from_config(self.config, tokenizer)
        return EncodedVideo.load(path, self, processor, verify, source, **sampling)

    def _answer(self, shared, suffixes, generation_config, tokenizer, streamer, **behind) -> list[str]:
        """Decodes answers to questions (token ids) that follow the same ids; `behind` goes to `generate` as it is."""
        settings = self._generation_settings(generation_config, tokenizer)
        shared = torch.as_tensor(shared, dtype=torch.long)
        width = max(map(len, suffixes))
        # Padding goes between video and question: the video's key-values are one row that all questions share.
        padding = settings.pad_token_id or 0
        texts = torch.tensor([[padding] * (width - len(suffix)) + suffix for suffix in suffixes])
        rows = shared.expand(len(suffixes), -1)
        mask = torch.tensor([[0] * (width - len(suffix)) + [1] * len(suffix) for suffix in suffixes])
        given = {name: behind.pop(name, ()) for name in ("logits_processor", "stopping_criteria")}
        processors, criteria = _of_answer(settings, len(shared) + width, tokenizer)
        output = self.generate(
            input_ids=torch.cat([rows, texts], dim=1).to(self.device),
            attention_mask=torch.cat([torch.ones_like(rows), mask], dim=1).to(self.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([*processors, *given["logits_processor"]]),
            stopping_criteria=StoppingCriteriaList([*criteria, *given["stopping_criteria"]]),
            streamer=streamer,
            tokenizer=tokenizer,
            **behind,
        )
        returned = settings.num_return_sequences or 1
        texts = tokenizer.batch_decode(output[::returned, len(shared) + width :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    @staticmethod
    def _set_media(visuals, media_dict, history=None) -> None:
        """Notes what is wanted of the one path that a turn brings; what it does not bring must be so already."""
        wanted = read_media_dict(media_dict)
        if len(visuals) == 1 and visuals[0]["type"] == "video" and not is_encoded(source_of(visuals[0])):
            if media_dict is not None:
                visuals[0].setdefault("media_dict", dict(media_dict))
        elif wanted and all(part_of(item) != wanted for item in visuals or visual_items(read_history(history, None))):
            raise ValueError(
                "media_dict is about the path of one video, which this turn does not bring anew; leave it out, or "
                "give each item of several videos its own"
            )

    def _generation_settings(self, given, tokenizer) -> GenerationConfig:
        settings = copy.deepcopy(self.generation_config)
        if given is not None and not isinstance(given, (dict, GenerationConfig)):
            raise ValueError(f"generation_config must be a dict or a GenerationConfig, got {given!r:.200}")
        given = given.to_diff_dict() if isinstance(given, GenerationConfig) else dict(given or {})
        given = {key: value for key, value in given.items() if value is not None}
        given |= {key: plain_number(value) for key, value in given.items() if type(value) not in _PLAIN}
        if not isinstance(given.get("temperature", 0), (int, float)):
            raise ValueError(f"generation_config: temperature must be a number, got {given['temperature']!r:.200}")
        if until := given.pop("until", None):
            given["stop_strings"] = [until] if isinstance(until, str) else list(until)
        known = set(GenerationConfig().to_dict())
        if unknown := sorted(set(given) - known, key=str):
            logger.warning_once(f"generation_config: dropped unknown entries {', '.join(map(str, unknown)):.200}")
        given = {key: value for key, value in given.items() if key in known}
        if "temperature" in given:
            given.setdefault("do_sample", given["temperature"] > 0)
        if given.get("do_sample") and given.get("temperature") == 0:
            given["do_sample"] = False
        if not given.get("do_sample", settings.do_sample):
            # Before the library sees them, which warns of what means nothing here.
            given |= {"do_sample": False} | dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))
        settings.update(**given)
        # The answer is text, and it is decoded over the video's key-values: neither is a matter of choice here.
        settings.return_dict_in_generate, settings.use_cache = False, True
        if settings.max_new_tokens is None and "max_length" not in given:
            settings.max_new_tokens = DEFAULT_MAX_NEW_TOKENS
        if settings.eos_token_id is None:
            settings.eos_token_id = tokenizer.eos_token_id
        if settings.pad_token_id is None:
            settings.pad_token_id = (
                tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            )
        return settings


def _of_answer(settings: GenerationConfig, prompt: int, tokenizer) -> tuple[list, list]:
    """Takes from settings what the library would apply to the prompt of so many tokens, too.

    The published code generates from embeddings, where the answer is all that these see.

    Returns:
        Logits processors and stopping criteria that do the same to the answer alone.
    """
    processors, criteria = [], []
    if settings.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty, prompt_ignore_length=prompt))
    if settings.no_repeat_ngram_size:
        repeated = NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size)
        processors.append(lambda ids, scores: repeated(ids[:, prompt:], scores))
    if settings.stop_strings:
        ended = StopStringCriteria(tokenizer, settings.stop_strings)
        criteria.append(lambda ids, scores, **options: ended(ids[:, prompt:], scores, **options))
    # Not None, in whose place the library takes what the checkpoint says.
    settings.repetition_penalty, settings.no_repeat_ngram_size, settings.stop_strings = 1.0, 0, None
    return processors, criteria


def _callables(**lists) -> dict[str, list]:
    """Raises ValueError unless each argument is a list of functions, or None."""
    found = {}
    for name, given in lists.items():
        listed = list(given or ()) if isinstance(given, (list, tuple)) or given is None else None
        if listed is None or not all(map(callable, listed)):
            raise ValueError(f"{name} must be a list of functions like transformers' classes, got {given!r:.200}")
        found[name] = listed
    return found


def _reload_options(settings, videos, question, dense_chunks, selector) -> dict:
    """What bi-level decoding is told beside the question: named chunks, or those at times that it names."""
    if settings.decode == "full":
        if dense_chunks is not None or selector is not None:
            raise ValueError(
                "dense_chunks and selector need bi-level decoding: set sparse_attention's decode='bilevel'"
            )
        return {}
    if not videos:
        if dense_chunks is not None or selector is not None:
            raise ValueError("dense_chunks and selector need a video; this conversation has none")
        return {}
    chunk_groups = settings.decode_chunk_groups
    if selector is not None:
        if dense_chunks is not None:
            raise ValueError("give dense_chunks or a selector, not both")
        if not callable(selector):
            raise ValueError(f"selector must be a function of (question, chunks), got {selector!r:.200}")
        facts = [
            {key: fact[key] for key in ("video", "index", "start", "end")}
            for fact in _chunk_facts(videos, chunk_groups)
        ]
        dense_chunks = selector(question, facts)
    if dense_chunks is not None:
        return {"dense_chunks": dense_chunks}
    required, first = [], 0
    times = times_in_text(question) if question else []
    for video in videos:
        spans = video.chunks(chunk_groups)
        if video.kind == "image":
            first += len(spans)
            continue
        required += [first + chunk for chunk in chunks_at(times, *zip(*spans, strict=True), video.end)]
        first += len(spans)
    return {"required_chunks": tuple(required)} if required else {}


def _chunk_facts(videos, chunk_groups: int, choices=None) -> list[dict]:
    """The chunks of decoding of several videos, for callers."""
    facts = [
        {"video": number, "index": index, "start": start, "end": end, "level": "dense", "score": None}
        for number, video in enumerate(videos)
        for index, (start, end) in enumerate(video.chunks(chunk_groups))
    ]
    for fact, choice in zip(facts, choices or (), strict=False):
        fact.update(level=choice.level, score=choice.score)
    return facts
