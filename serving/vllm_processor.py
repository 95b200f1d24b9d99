"""vLLM's view of the processor: how requests become token ids, frames and names for vLLM's caches.

What is surprising:
* A video is several items of vLLM, of as many frames as the tower takes at once. Other requests wait for one of them
  instead of for the whole video, and a video that has grown costs only what is new. Groups of frames never see each
  other, so the tokens are those of one item.
* An item's name is a hash of its frames and times, never what a client calls it. Which items a file had is kept, so a
  file is decoded again only where vLLM has forgotten one of them.
* Prompts come as token ids with one marker for each video and image, and are tokenised again around them: a message
  about a video may stand behind its marker, and tokens span the border between message and question.

F frames, S side of a frame in pixels, T tiles of an image.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser, VideoProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)

# Files whose items are remembered: some kilobytes for an hour of video.
KNOWN_VIDEOS = 4096
# Rows and columns of the largest grid of tiles where a config names no grids.
LARGEST_GRID = 6


class VideoXLDataParser(MultiModalDataParser):
    """Videos as pairs of (bytes of a file, {}) or (frames, {"timestamps": seconds}); images as files or pictures."""

    def _parse_video_data(self, data):
        return VideoProcessorItems([self._video(item) for item in (data if isinstance(data, list) else [data])])

    def _parse_image_data(self, data):
        images = data if isinstance(data, list) else [data]
        if any(image is None for image in images):
            raise ValueError("an image came without its data: a uuid alone names nothing here; send the image")
        # The file, not what vLLM made of it: colours become RGB as everywhere in this package.
        return ImageProcessorItems([
            image.original_bytes if isinstance(image, MediaWithBytes) else image for image in images
        ])  # fmt: skip

    @staticmethod
    def _video(item):
        if isinstance(item, bytes):
            return np.frombuffer(item, np.uint8), {}
        pair = item.media if isinstance(item, MediaWithBytes) else item
        pixels, metadata = pair if isinstance(pair, tuple) and len(pair) == 2 else (None, {})
        if not isinstance(pixels, (np.ndarray, torch.Tensor)) or (pixels.ndim != 1 and "timestamps" not in metadata):
            raise ValueError(
                "a video must be a file (a video_url; offline its bytes), or offline a pair of frames [F, H, W, 3] of "
                f"uint8 and {{'timestamps': seconds}}, got {'nothing' if item is None else type(pair).__name__}"
            )
        return pair


class VideoXLProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model before there is a request."""

    @cached_property
    def processor(self):
        """The checkpoint's `VideoXLProcessor`."""
        config = self.ctx.model_config
        return AutoProcessor.from_pretrained(
            config.model, revision=config.revision, trust_remote_code=config.trust_remote_code
        )

    def get_hf_processor(self, **kwargs):
        # override: vLLM would build one for each combination of sampling arguments
        return self.processor

    def get_data_parser(self):
        return VideoXLDataParser()

    def get_supported_mm_limits(self):
        return {"video": None, "image": None}

    @cached_property
    def chunk_frames(self) -> int:
        """Frames of one item."""
        return self.get_hf_config().resolve_vision_chunk_frames()

    @cached_property
    def largest_image(self) -> tuple[int, int]:
        """(width, height) in pixels of an image that becomes as many tiles as any."""
        side = self.processor.image_size
        grids = self.processor.image_grid_pinpoints or [(LARGEST_GRID * side,) * 2]
        return tuple(max(grids, key=lambda grid: grid[0] * grid[1]))

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]):
        # override: else vLLM would process the largest image and video at start
        tiles = count_tiles(self.processor.read_tiles(Image.new("RGB", self.largest_image)))
        return {
            "video": self.processor.num_video_tokens(self.chunk_frames),
            "image": tiles * self.processor.tokens_per_group,
        }


class VideoXLDummyInputs(BaseDummyInputsBuilder[VideoXLProcessingInfo]):
    """The largest items, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts):
        processor = self.info.processor
        return processor.video_token * mm_counts.get("video", 0) + processor.image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        count, side = self.info.chunk_frames, self.info.processor.image_size
        video = np.zeros((count, side, side, 3), np.uint8), {"timestamps": list(map(float, range(count)))}
        image = Image.new("RGB", self.info.largest_image)
        return {"video": [video] * mm_counts.get("video", 0), "image": [image] * mm_counts.get("image", 0)}


@dataclass(frozen=True)
class KnownVideo:
    """What is kept of a video: the names of its items, and what a message says of it."""

    names: list[str]
    duration: float
    num_frames: int


class VideoXLMultiModalProcessor(BaseMultiModalProcessor[VideoXLProcessingInfo]):
    """Turns requests into what vLLM runs; see the module's docstring."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._known: OrderedDict[str, KnownVideo] = OrderedDict()

    def apply(self, inputs, timing_ctx):
        # override: what the base class calls an item is a part of a video here
        processor, data = self.info.processor, inputs.mm_data_items
        for kind, marker in self._markers.items():
            count, items = inputs.prompt.count(marker), data.get_count(kind, strict=False)
            if count != items:
                text = processor.tokenizer.convert_ids_to_tokens(marker)
                raise ValueError(
                    f"the prompt has {count} markers ({text}) for {items} {kind}s: only {kind} items put them there, "
                    "remove them from texts"
                )
        sampling = self.info.ctx.get_merged_mm_kwargs(inputs.hf_processor_mm_kwargs)
        videos, chunks, data = [], [], {**data}
        for source, metadata in data["video"].get_all() if "video" in data else ():
            video, parts = self._read(source, metadata.get("timestamps"), sampling, inputs.cache)
            videos.append(video)
            chunks += parts
        names = {}
        if videos:
            data["video"] = VideoProcessorItems(chunks)
            names["video"] = [name for video in videos for name in video.names]
        inputs = replace(
            inputs,
            prompt=self._with_a_marker_per_item(inputs.prompt, videos),
            mm_data_items=MultiModalDataItems(data),
            mm_uuid_items=names,
            # Else vLLM would hash them into the names.
            hf_processor_mm_kwargs={},
            media_io_kwargs={},
        )
        return super().apply(inputs, timing_ctx)

    @property
    def _markers(self):
        tokenizer, processor = self.info.processor.tokenizer, self.info.processor
        return {"video": processor.video_token_id, "image": tokenizer.convert_tokens_to_ids(processor.image_token)}

    def _read(self, source, timestamps, sampling, cache) -> tuple[KnownVideo, list]:
        """A video, and its parts: (frames, metadata), or None for all where vLLM's cache has them."""
        key = _hash(self.info.model_id, source, json.dumps([timestamps, sampling], sort_keys=True, default=float))
        known = self._known.get(key)
        if known is not None and cache is not None and all(cache.is_cached(known.names)):
            self._known.move_to_end(key)
            return known, [None] * len(known.names)
        opened = source.tobytes() if source.ndim == 1 else source
        frames, seconds, duration = self.info.processor.read_video(opened, timestamps, **sampling)
        size = self.info.chunk_frames
        parts = [
            (part, {"timestamps": seconds[start : start + size]})
            for start, part in zip(range(0, len(frames), size), frames.split(size), strict=True)
        ]
        names = [_hash(self.info.model_id, part.numpy(), json.dumps(times["timestamps"])) for part, times in parts]
        self._known[key] = known = KnownVideo(names, duration, len(frames))
        if len(self._known) > KNOWN_VIDEOS:
            self._known.popitem(last=False)
        return known, parts

    def _with_a_marker_per_item(self, prompt: list[int], videos: Sequence[KnownVideo]) -> list[int]:
        """The prompt with the messages about videos, each video's marker as often as it has items."""
        processor, rest = self.info.processor, iter(videos)
        markers = [token for token in prompt if token in self._markers.values()]
        of = [next(rest) if marker == self._markers["video"] else None for marker in markers]
        text = processor.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        shown = [video and (video.duration, video.num_frames) for video in of]
        first, *pieces = processor.prompt_pieces(text, shown)
        for marker, video, piece in zip(markers, of, pieces, strict=True):
            first += [marker] * (len(video.names) if video else 1) + piece
        return first

    def _call_hf_processor(self, hf_data, hf_kwargs):
        # override: the videos are read already
        fields = {}
        if videos := hf_data.get("videos"):
            fields["pixel_values_videos"] = [frames for frames, _ in videos]
            # In double precision: else 5.005 becomes "5.01".
            fields["timestamps"] = [torch.tensor(times["timestamps"], dtype=torch.float64) for _, times in videos]
        if images := hf_data.get("images"):
            fields["pixel_values_images"] = [self.info.processor.read_tiles(image) for image in images]
        return BatchFeature(fields)

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        modalities = {"pixel_values_videos": "video", "timestamps": "video", "pixel_values_images": "image"}
        return {name: MultiModalFieldConfig.batched(modalities[name]) for name in hf_inputs}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        processor = self.info.processor

        def shown(kind):
            def replacement(index):
                item = out_mm_kwargs[kind][index]
                if kind == "video":
                    facts = item["timestamps"].data.tolist()
                else:
                    facts = count_tiles(item["pixel_values_images"].data)
                ids = processor.expand([[], []], [facts])
                return PromptUpdateDetails.select_token_id(ids, processor.video_token_id)

            return replacement

        return [PromptReplacement(kind, [marker], shown(kind)) for kind, marker in self._markers.items()]


def count_tiles(tiles: torch.Tensor) -> int:
    """T of what the processor's `read_tiles` gives; copies of an overview do not count."""
    return 1 + (tiles.shape[0] - 1) * tiles.shape[1]


def _hash(model_id: str, pixels: np.ndarray, facts: str) -> str:
    digest = hashlib.sha256(f"{model_id}\n{facts}\n{pixels.shape}\n".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
