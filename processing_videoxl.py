"""`VideoXLProcessor`: prompts, timestamps, placeholders and pixels for Video-XL models.

A rendered prompt holds one marker per video (`video_token`) and per image (`image_token`); `expand` replaces it by the
groups, each the tokens of its time followed by its placeholders. An image is one group per tile, without times, and
its placeholders are the same token:

    prefix | Time 0.0s: v v v v | Time 4.0s: v v v v | text | v v v v | v v v v | question

Text left and right of a marker is tokenised by itself, as in the published code, so no token spans a border. Members
with a `video_message` are told behind the marker how long the video lasts. A marker can only come from a video or
image item: text that contains a literal marker is refused.

What is surprising:
* The only sub-processor is the tokenizer: the library's video loading and video processors are not used.
* The processor holds a copy of the model's `frames_config`. Its settings can be read and set as the processor's own,
  as processor_config.json of earlier versions has them.
* Nothing is ignored silently. Pipelines and evaluation clients pass many arguments that have no effect on this model;
  these are listed below, and all others, as all input that does not fit, are a ValueError that says what to do.

Shapes: V videos and images, F frames, T tiles, S image side, L sequence, B batch; G = ceil(F / frames_per_group).
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from string import Formatter
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from .configuration_videoxl import FRAME_SETTINGS, SharesFrameSettings, VideoXLFramesConfig
from .frame_sampling_videoxl import MAX_NUM_FRAMES, MAX_SAMPLE_FPS, SAMPLE_FPS, FrameSampler, Sampling
from .image_processing_videoxl import count_tiles, load_image, tile_image
from .messages_videoxl import (
    SAMPLING_KEYS,
    assign_visuals,
    named_sampling,
    read_item,
    read_messages,
    read_source,
    readable_source,
    video_request,
    visual_items,
    without_sources,
)
from .video_processing_videoxl import normalize_frames, open_video

# "What the processor was built with": None has a meaning of its own for the sampling rates.
DEFAULT = "default"
# What pipelines and evaluation clients pass: without effect here whatever the value, or as long as it is empty.
HARMLESS = {"add_special_tokens", "do_sample_frames", "load_audio_from_video", "return_attention_mask", "verbose"}
HARMLESS_IF_EMPTY = {
    *("images", "audios", "audio", "tools", "documents", "video_metadata", "max_length", "pad_to_multiple_of"),
    *("text_kwargs", "images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs", "sanitize_control_tokens"),
    *("return_metadata", "return_assistant_tokens_mask", "return_token_type_ids", "return_mm_token_type_ids"),
    "reasoning_effort",
}
# chat_template.jinja holds the same text, for the tokenizer. vLLM must find a loop over `message.content` in it, or it
# puts videos in front of the texts that they stand between.
DEFAULT_CHAT_TEMPLATE = r"""{%- if not messages or messages[0].role != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for item in message.content -%}
{%- if item.type == 'video' -%}{{- video_token | default('<|vision_pad|>', true) + '\n' -}}
{%- elif item.type == 'image' -%}{{- image_token | default('<|image_pad|>', true) + '\n' -}}
{%- elif item.type == 'text' -%}{{- item.text -}}
{%- else -%}{{- raise_exception('Content items are of type text, image or video, not ' + item.type | string) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


class VideoXLProcessor(SharesFrameSettings, ProcessorMixin):
    """Turns conversations and videos into what `generate` takes.

    Args:
        tokenizer: The checkpoint's tokenizer.
        image_size: Side of the square frames, in pixels.
        frames_per_group: Frames that share one timestamp and one run of placeholders.
        tokens_per_group: Placeholders of one group.
        frames_config: See `VideoXLFramesConfig`; a dict with some of its settings, or such a config. None takes the
            defaults.
        video_token: The placeholder, also the marker of a video in a rendered prompt.
        image_token: The marker of an image in a rendered prompt; its placeholders are `video_token`, too.
        max_num_frames, sample_fps, max_sample_fps: Default sampling, with the meanings they have in `chat`.
        chat_template: Jinja text (or a dict of named ones); None takes `DEFAULT_CHAT_TEMPLATE`.
        **frame_settings: Settings of `frames_config` by themselves.
    """

    # override: a processor that was built in code is saved with its code and `auto_map`, as a loaded one is.
    _auto_class = "AutoProcessor"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_size: int = 384,
        frames_per_group: int = 4,
        tokens_per_group: int = 144,
        frames_config: dict[str, Any] | VideoXLFramesConfig | None = None,
        video_token: str = "<|vision_pad|>",
        image_token: str = "<|image_pad|>",
        max_num_frames: int = MAX_NUM_FRAMES,
        sample_fps: float | None = SAMPLE_FPS,
        max_sample_fps: float | None = MAX_SAMPLE_FPS,
        chat_template: str | dict[str, str] | None = None,
        **frame_settings,
    ):
        if tokenizer is None or video_token not in tokenizer.get_added_vocab():
            raise ValueError(
                "VideoXLProcessor needs this checkpoint's tokenizer, which has the placeholder of visual tokens "
                f"({video_token!r:.200}) as a special token; load it from the model's folder"
            )
        if unknown := sorted(frame_settings.keys() - {*FRAME_SETTINGS}):
            known = ", ".join(FRAME_SETTINGS)
            raise ValueError(f"the processor has no setting {', '.join(unknown)}; of frames: {known}")
        super().__init__(tokenizer, chat_template=chat_template or DEFAULT_CHAT_TEMPLATE)
        self.frames_config = VideoXLFramesConfig(**{**_frame_settings(frames_config), **frame_settings})
        self.image_size, self.frames_per_group, self.tokens_per_group = image_size, frames_per_group, tokens_per_group
        self.video_token, self.image_token = video_token, image_token
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        self.max_num_frames, self.sample_fps, self.max_sample_fps = max_num_frames, sample_fps, max_sample_fps

    @staticmethod
    def settings_of(config: Any) -> dict[str, Any]:
        """The arguments of this class that a `VideoXLConfig` decides, ready for processor_config.json."""
        return {
            "image_size": config.vision_config.image_size,
            "frames_per_group": config.compressor_config.frames_per_group,
            "tokens_per_group": config.compressor_config.tokens_per_group,
            "frames_config": _frame_settings(config.frames_config),
        }

    @classmethod
    def from_config(cls, config: Any, tokenizer: PreTrainedTokenizerBase) -> "VideoXLProcessor":
        """Builds a model's processor from its `VideoXLConfig` and the checkpoint's tokenizer, whose ids must agree."""
        if not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise ValueError(f"tokenizer must be the checkpoint's tokenizer (AutoTokenizer...), got {tokenizer!r:.90}")
        marker = tokenizer.convert_ids_to_tokens(config.video_token_id)
        processor = cls(tokenizer, video_token=marker, **cls.settings_of(config))
        ids = processor.time_token_ids(0.0)
        expected = (config.time_start_token_id, config.time_end_token_id)
        if ids and (ids[0], ids[-1]) != expected:
            raise ValueError(
                f"the tokenizer is not this checkpoint's: it writes {processor.time_format!r:.200} as {ids}, but the "
                f"config's time_start_token_id and time_end_token_id are {expected}; load the tokenizer from the "
                "model's folder"
            )
        return processor

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        # override: settings of `frames_config` may stand by themselves, in files of earlier versions and among the
        # arguments of `from_pretrained`; the library would drop them, as `__init__` does not name them.
        given = {**processor_dict, **kwargs}
        frames = {name: given[name] for name in FRAME_SETTINGS if name in given}
        rest = {name: value for name, value in kwargs.items() if name not in FRAME_SETTINGS}
        rest["frames_config"] = {**_frame_settings(given.get("frames_config")), **frames}
        return super().from_args_and_dict(args, processor_dict, **rest)

    def to_dict(self) -> dict[str, Any]:
        # override: of a config the library would also write what all configs have
        return {**super().to_dict(), "frames_config": _frame_settings(self.frames_config)}

    def render(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """Writes a conversation as prompt text (see `apply_chat_template`), with one marker per video and image."""
        return self.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)

    def prompt_pieces(self, text: str, shown: Sequence[tuple[float, int] | None] = ()) -> list[list[int]]:
        """Tokenises the text around the markers, each piece by itself and without added special tokens.

        Args:
            text: A rendered prompt with n markers.
            shown: For each marker, from the first on: of a video what its `video_message` tells, as (duration in
                seconds, number of frames), or None for an image. Markers beyond the list get no message.

        Returns:
            n + 1 lists of token ids.
        """
        pieces = self._marker.split(text)
        for number, facts in enumerate(shown, start=1):
            if facts is not None and self.video_message is not None:
                pieces[number] = _with_video_message(pieces[number], self.video_message, *facts)
        return [self._ids(piece) for piece in pieces]

    def time_token_ids(self, seconds: float) -> list[int]:
        """Token ids of the timestamp of a group, from its first frame's time; none for families without timestamps."""
        return self._ids("" if self.time_format is None else self.time_format.format(seconds=float(seconds)))

    def _ids(self, text):
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def num_video_tokens(self, num_frames: int) -> int:
        """Placeholders of a video of `num_frames` frames; the last group may be partial, its tokens are not."""
        return -(-num_frames // self.frames_per_group) * self.tokens_per_group

    def expand(self, pieces: Sequence[list[int]], timestamps: Sequence[Sequence[float] | int]) -> list[int]:
        """Puts timestamps and placeholders between the pieces of a prompt, and returns the ids of the whole sequence.

        Args:
            pieces: Lists of token ids, one more than videos and images (see `prompt_pieces`).
            timestamps: For every video the times of all its frames, in seconds; for every image how many tiles it has.
        """
        count, group = len(timestamps), [self.video_token_id] * self.tokens_per_group
        if len(pieces) != count + 1:
            raise ValueError(f"{count} videos and images need {count + 1} pieces of text around, got {len(pieces)}")
        ids = list(pieces[0])
        for number, (times, piece) in enumerate(zip(timestamps, pieces[1:], strict=True)):
            if isinstance(times, int):
                ids += [*(self.time_token_ids(0.0) if self.image_timestamps else []), *group] * times
            elif len(times) == 0:
                raise ValueError(f"video {number} has no frames; pass the time of each of its frames")
            else:
                for seconds in times[:: self.frames_per_group]:
                    ids += [*self.time_token_ids(seconds), *group]
            ids += piece
        return ids

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        images: Any = None,
        audios: Any = None,
        timestamps: Sequence | None = None,
        padding: bool | str | None = False,
        padding_side: str | None = "left",
        truncation: bool | str | None = False,
        return_tensors: str | None = None,
        max_num_frames: int | None = None,
        sample_fps: float | str | None = DEFAULT,
        max_sample_fps: float | str | None = DEFAULT,
        num_frames: int | None = None,
        fps: float | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Prepares rendered prompts and their videos and images.

        Args:
            text: A prompt or a list of prompts, with a marker per video or image (`apply_chat_template` writes them).
            videos: One video, a list in order of appearance over all texts, or one list per text. A video is what
                `encode_video` takes, or a dict with one of `video`, `video_path`, `path`, `url` and, for this video
                alone, `timestamps` and sampling settings.
            images: Likewise; or a dict with one of `image`, `path`, `url`.
            audios, truncation: Nothing, and False: no sound is read, and nothing is truncated.
            timestamps: Seconds of the frames of one in-memory video, or a list with such a list (or None) per video.
            padding, padding_side: Whether prompts are padded to the longest, on the `"left"` or `"right"`.
            return_tensors: `"pt"`, `"np"`, or None for lists of ids.
            max_num_frames, sample_fps, max_sample_fps: Which frames of a file are taken, see `Sampling`; the
                processor's own by default. Frames in memory without `timestamps` are `1 / sample_fps` seconds apart.
            num_frames: transformers' name for `max_num_frames=..., sample_fps=None`; also for frames in memory.
            fps: transformers' name for `sample_fps=..., max_sample_fps=None`.
            **kwargs: What clients pass without effect; anything else is an error.

        Returns:
            `BatchFeature` with `input_ids` and `attention_mask` [B, L], and where there are videos or images
            `pixel_values_videos`: float32 [V, F, 3, S, S], or, if their lengths differ or there are images, a list in
            order of appearance of [F_i, 3, S, S] for a video and [T_i, 1, 3, S, S] for an image (with an overview
            [1 + rows, columns, 3, S, S], see `tile_image`).

        Raises:
            VideoDecodeError: A ValueError, if a video cannot be read.
        """
        self._refuse_unsupported({**kwargs, "audios": audios}, truncation)
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(prompt, str) for prompt in texts):
            raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
        given = {"max_num_frames": max_num_frames, "num_frames": num_frames, "fps": fps}
        given |= {"sample_fps": sample_fps, "max_sample_fps": max_sample_fps}

        # Everything is checked before the first video is opened.
        most = self.max_source_bytes
        films = assign_visuals(videos, texts, self.video_token, timestamps=timestamps, max_bytes=most)
        pictures = assign_visuals(images, texts, self.image_token, "image", max_bytes=most)
        called, own = _called_sampling(given), self.sampling()
        films = [[video_request(item, own, called) for item in group] for group in films]
        pictures = [[readable_source(item) for item in group] for group in pictures]
        rows, pixels = [], []
        for prompt, of_videos, of_images in zip(texts, map(iter, films), map(iter, pictures), strict=True):
            loaded = [
                self._load_video(next(of_videos)) if marker == self.video_token else self._load_image(next(of_images))
                for marker in self._marker.findall(prompt)
            ]
            frames, seconds, shown = zip(*loaded, strict=True) if loaded else ((), (), ())
            rows.append(self.expand(self.prompt_pieces(prompt, shown), seconds))
            pixels += frames
        data = self._pad(rows, padding, padding_side, return_tensors)
        if pixels:
            if not any(pictures) and len(set(map(len, pixels))) == 1:
                # One video is the common and largest case: no copy.
                pixels = torch.stack(pixels) if len(pixels) > 1 else pixels[0].unsqueeze(0)
            data["pixel_values_videos"] = pixels
        # A list of videos must stay one: the library's conversion would stack unequal lengths.
        return BatchFeature(data, skip_tensor_conversion=["pixel_values_videos"])

    def apply_chat_template(
        self,
        conversation: Sequence,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        continue_final_message: bool = False,
        processor_kwargs: dict | None = None,
        **kwargs,
    ) -> Any:
        """Renders a conversation (or a list of them) and, on request, prepares it together with its videos.

        Args:
            conversation: List of `{"role", "content"}`, or a list of conversations; content is a string or a list of
                text, video and image items.
            chat_template: Jinja text, or the name of one of the processor's templates; None takes the processor's.
            add_generation_prompt: Whether the assistant's header is appended.
            tokenize: False returns text.
            return_dict: With `tokenize`, whether to return everything or only `input_ids`.
            return_tensors: As in `__call__`.
            continue_final_message: Leaves the last message open, so that the model continues it.
            processor_kwargs: Keyword arguments for `__call__`.
            **kwargs: The same, or variables that the template mentions (the default one has no tools or documents).

        Returns:
            Text, ids or `BatchFeature`; text is one string for one conversation, ids always have a batch dimension.
        """
        template = self._select_template(chat_template)
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other; drop one of them")
        call_names = set(self._argument_names) - {"text", "videos", "images"}
        mentioned = (set(re.findall(r"\w+", template)) - call_names) & kwargs.keys()
        variables = {name: kwargs.pop(name) for name in mentioned}
        kwargs = {**(processor_kwargs or {}), **kwargs}
        self._refuse_unsupported({name: value for name, value in kwargs.items() if name not in call_names})

        is_list = isinstance(conversation, (list, tuple))
        if not (is_list or hasattr(conversation, "messages")) or not conversation:
            raise ValueError("a conversation is a non-empty list of {'role': ..., 'content': ...}")
        batched = is_list and not isinstance(conversation[0], dict)
        markers = {"video": self.video_token, "image": self.image_token}
        chats = conversation if batched else [conversation]
        # A prompt may be written without its videos, which the caller then passes with it.
        most = {"needs_source": tokenize, "max_bytes": self.max_source_bytes}
        chats = [read_messages(getattr(chat, "messages", chat), **most) for chat in chats]
        texts, _ = render_jinja_template(
            [without_sources(messages, markers.values()) for messages in chats],
            chat_template=template,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **self.tokenizer.special_tokens_map | {f"{kind}_token": marker for kind, marker in markers.items()},
            **variables,
        )
        visuals = {}
        for kind, marker in markers.items():
            visuals[kind] = [[item for item in visual_items(chat) if item["type"] == kind] for chat in chats]
            for text, items in zip(texts, visuals[kind], strict=True):
                if text.count(marker) != len(items):
                    raise ValueError(
                        f"the rendered text has {text.count(marker)} markers ({marker}) for {len(items)} {kind} "
                        "items; the chat template or the messages put the literal marker elsewhere"
                    )
        if not tokenize:
            return texts if batched else texts[0]
        kwargs.pop("images", None)  # empty, as some clients pass it
        inputs = self(texts, videos=visuals["video"], images=visuals["image"], return_tensors=return_tensors, **kwargs)
        return inputs if return_dict else inputs["input_ids"]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, strip: bool = False, **kwargs
    ) -> list[str]:
        """Decodes generated ids [B, L] into B texts, placeholders left out as special tokens, on request stripped.

        `**kwargs` go to the tokenizer's `batch_decode`.
        """
        texts = self.tokenizer.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [text.strip() for text in texts] if strip else texts

    @property
    def model_input_names(self) -> list[str]:
        """Keys that `__call__` can return."""
        return ["input_ids", "attention_mask", "pixel_values_videos"]

    @property
    def _marker(self):
        """Finds the places of videos and images in a rendered prompt."""
        return re.compile("|".join(map(re.escape, (self.video_token, self.image_token))))

    @property
    def _argument_names(self):
        """What `__call__` takes by name."""
        return [name for name in signature(self.__call__).parameters if name != "kwargs"]

    def _refuse_unsupported(self, kwargs, truncation=False):
        """Raises on what would otherwise be ignored silently; see `HARMLESS`."""
        if truncation not in (None, False, "do_not_truncate"):
            raise ValueError("a prompt is never truncated (frames or the question would go); lower max_num_frames")
        if unknown := sorted(set(kwargs) - HARMLESS - HARMLESS_IF_EMPTY):
            known = ", ".join(self._argument_names)
            raise ValueError(f"unknown arguments: {', '.join(unknown):.200}; the processor takes {known}")
        if unsupported := [name for name, value in kwargs.items() if name not in HARMLESS and not _is_empty(value)]:
            raise ValueError(f"not supported: {', '.join(unsupported)}; leave them out")

    def _select_template(self, name_or_text):
        """The template's text: the argument, the one it names, or the processor's."""
        named = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        template = named.get(name_or_text or "default", name_or_text)
        if template is None:
            raise ValueError(f"name one of the processor's chat templates: {', '.join(named)}")
        return template

    @property
    def frame_options(self) -> dict[str, Any]:
        """The arguments of `open_video` that make a frame what the tower takes."""
        return {"size": self.image_size, "fit": self.frame_fit, "exact_resize": self.exact_resize}

    def sampling(self, **settings) -> Sampling:
        """The processor's sampling, with these settings in the place of its own."""
        rule = FrameSampler.of(self.frames_config)
        return replace(Sampling(self.max_num_frames, self.sample_fps, self.max_sample_fps, rule), **settings)

    def read_video(self, source: Any, timestamps: Sequence[float] | None = None, **sampling):
        """Opens a video and chooses its frames, as `__call__` does; engines normalise them where the tower runs.

        Args:
            source, timestamps: Of one video, see `__call__`.
            **sampling: The sampling arguments of `__call__`, or `start` and `end` in seconds.

        Returns:
            Frames, uint8 [F, 3, S, S], the seconds of each, and the duration that a `video_message` tells.

        Raises:
            ValueError: On other arguments, and on what cannot be read.
        """
        if unknown := sorted(sampling.keys() - SAMPLING_KEYS.keys()):
            raise ValueError(f"unknown arguments: {', '.join(unknown):.200}; known are {', '.join(SAMPLING_KEYS)}")
        item = {"type": "video", "video": source, "timestamps": timestamps}
        item = read_item(item, max_bytes=self.max_source_bytes)
        frames, seconds, reader = self._read_frames(video_request(item, self.sampling(), _called_sampling(sampling)))
        return frames, seconds, reader.duration

    def _read_frames(self, request):
        reader = open_video(**request, **self.frame_options)
        batches = list(reader)
        seconds = [time for batch in batches for time in batch.timestamps]
        return torch.cat([batch.frames for batch in batches]), seconds, reader

    def _load_video(self, request):
        """Pixels [F, 3, S, S] and times of a video's sampled frames, and the facts for its `video_message`."""
        frames, seconds, reader = self._read_frames(request)
        shown = None if self.video_message is None else (reader.duration, len(seconds))
        return normalize_frames(frames, self.image_mean, self.image_std), seconds, shown

    def _load_image(self, source):
        """Pixels of an image's tiles, as `read_tiles` shapes them, their number, and None: images have no message."""
        tiles = self.read_tiles(source)
        return self.normalize_tiles(tiles), count_tiles(tiles), None

    def normalize_tiles(self, tiles: torch.Tensor) -> torch.Tensor:
        """The tower's input from what `read_tiles` gives: float32 of the same shape, on the same device."""
        return normalize_frames(tiles.flatten(0, 1), self.image_mean, self.image_std).unflatten(0, tiles.shape[:2])

    def read_tiles(self, source: Any) -> torch.Tensor:
        """Opens an image (see `images` of `__call__`) and cuts it.

        Returns:
            uint8 [T, 1, 3, S, S], or with an overview [1 + rows, columns, 3, S, S], see `tile_image`.
        """
        image = load_image(read_source(source, self.max_source_bytes))
        return tile_image(image, self.image_size, self.image_grid_pinpoints, self.image_tiling)

    def _pad(self, rows, padding, padding_side, return_tensors) -> dict[str, Any]:
        """Pads rows of ids; `input_ids` and `attention_mask` in the form that is asked for."""
        padded = {None: False, False: False, "do_not_pad": False, True: True, "longest": True}.get(padding)
        if padded is None or padding_side not in (None, "left", "right") or return_tensors not in (None, "pt", "np"):
            raise ValueError(
                "padding must be True or False, padding_side 'left' or 'right', return_tensors 'pt', 'np' or None; "
                f"got {padding!r:.200}, {padding_side!r:.200}, {return_tensors!r:.200}"
            )
        if return_tensors is not None and not padded and len(set(map(len, rows))) > 1:
            raise ValueError("the prompts have unequal lengths; pass padding=True to get one tensor")
        filler = self.tokenizer.pad_token_id
        filler = self.tokenizer.eos_token_id if filler is None else filler
        ids, mask = rows, [[1] * len(row) for row in rows]
        if padded:
            side = padding_side or "left"
            ids, mask = (
                pad_sequence([torch.tensor(row) for row in part], True, value, side).tolist()
                for part, value in ((ids, filler), (mask, 0))
            )
        convert = {None: list, "pt": torch.tensor, "np": np.array}[return_tensors]
        return {"input_ids": convert(ids), "attention_mask": convert(mask)}


def _frame_settings(frames_config) -> dict[str, Any]:
    """The settings of a `frames_config`: None, a dict, or a config that another copy of this code may have made."""
    if frames_config is None or isinstance(frames_config, dict):
        return dict(frames_config or {})
    return {name: copy.deepcopy(getattr(frames_config, name)) for name in FRAME_SETTINGS}


def _called_sampling(given) -> dict[str, Any]:
    """The sampling that a call asks for; of all arguments only the two rates mean something by None."""

    def is_said(name, value):
        if name in ("sample_fps", "max_sample_fps"):
            return not isinstance(value, str) or value != DEFAULT
        return value is not None

    return named_sampling({name: value for name, value in given.items() if is_said(name, value)})


def _is_empty(value) -> bool:
    """Whether an argument asks for nothing: None, False, or nothing inside, however deep."""
    if isinstance(value, (list, tuple, dict)):
        return all(map(_is_empty, value))
    return value is None or value is False


def _with_video_message(text: str, message: str, duration: float, num_frames: int) -> str:
    """Puts a video's message in front of the text behind its marker, after a leading newline.

    A text that begins with such a message stays as it is: histories of the published VideoChat-Flash code have it in
    the text of their first turn.
    """
    rest, fields = text.removeprefix("\n"), Formatter().parse(message)
    if re.match("".join(re.escape(literal) + (".+?" if name else "") for literal, name, _, _ in fields), rest):
        return text
    newline = text[: len(text) - len(rest)]
    return f"{newline}{message.format(duration=float(duration), num_frames=num_frames)}{rest}"
