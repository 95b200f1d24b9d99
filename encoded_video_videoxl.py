"""`EncodedVideo`: a video (or image) as the language model holds it; asked many times, extended, saved and loaded.

What is surprising:
* It is a `str`, the path it was made from. So a history that holds one survives `json.dumps`; what comes back is the
  path, and the video is encoded anew.
* Its cache stands for everything up to the end of the video, the prompt's header included: `input_ids` says which
  tokens. It can be continued by any text, and by none that comes before it.
* Where visual tokens are dropped between layers, it holds the layers in front of the first stage, and what they made
  of its tokens; so frames can be added. What follows without a question is done when the first one comes, and kept
  until the video grows. It is not in the file.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

from .image_processing_videoxl import count_tiles
from .kv_cache import VideoXLCache, WaitingRows
from .prefill_videoxl import InForce, policy_of, prefill_frames, require_context
from .sparse_attention import GroupSpan, VisualLayout
from .video_file_videoxl import load_video_file, model_fingerprint, require_match, save_video_file, source_fingerprint
from .video_processing_videoxl import normalize_frames, open_video

logger = logging.get_logger(__name__)


class EncodedVideo(str):
    """A video as the language model holds it, for any number of questions. Made by `model.encode_video`.

    As a string it is the path of its file, or empty for frames from memory. It may also be an image: that has no
    frames, timestamps or duration, and takes in no more.

    Attributes:
        kind: `"video"` or `"image"`.
        num_frames: Sampled frames.
        timestamps: Seconds of every sampled frame, from the first displayed frame of the file.
        start: Where a part of a file begins, in its seconds; 0 for a whole one.
        duration: Seconds of the whole video, or of that part.
        sampling: The sampling settings.
        system_prompt: The system message it was encoded behind, None for the template's.
        appended: Whether frames were added that its file does not hold.
        policy: How its tokens were run; later changes of the config do not touch it.
        input_ids: [L] token ids of everything up to the end of the video: prompt header, timestamps, placeholders.
        layout: Where the visual tokens are among them.
        cache: Their key-values (`VideoXLCache`). Never extend it; fork it, or take `question_cache`.
    """

    is_encoded_video = True

    def __new__(cls, source, **state):
        return super().__new__(cls, source or "")

    def __init__(
        self,
        source,
        *,
        model,
        cache,
        input_ids,
        sampling,
        processor=None,
        behind=None,
        system_prompt=None,
        kind="video",
    ):
        super().__init__()
        self.kind = kind
        self._processor, self._model = processor, model
        self.cache, self.input_ids = cache, input_ids
        self.sampling, self.system_prompt = sampling, system_prompt
        self.appended = False  # holds frames that its file does not
        self.mark, self._behind = object(), behind  # stands for the content; that of the video in front of it
        self.timestamps: list[float] = []
        self.start, self.duration = 0.0, 0.0
        # Frames of a last, partial group or beacon window: they are encoded again when more frames come. And how many
        # tokens, and keys of them, are there without it.
        self._tail, self._whole = None, (0, 0)
        self._settled = None  # what follows from the cache without a question, see `question_cache`
        self._stamp = _file_stamp(source)

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    @property
    def end(self) -> float:
        """Where it ends, in seconds of its file."""
        return self.start + self.duration

    @property
    def shown(self) -> tuple[float, int] | None:
        """What a prompt may say about it (see `VideoXLProcessor.prompt_pieces`): duration and number of frames."""
        return None if self.kind == "image" else (self.duration, self.num_frames)

    @property
    def layout(self):
        return self.cache.layout

    @property
    def nbytes(self) -> int:
        """Bytes of the key-values, and of what waits where the question decides what runs.

        What questions leave beside them (pooled key-values, what follows without a question) is not counted; `to`
        lets go of what of it lies on another device.
        """
        return self.cache.nbytes

    @property
    def policy(self):
        return self.cache.policy

    @property
    def prefill(self) -> dict:
        """The prefill settings it was made with, ready for JSON."""
        return self.policy.facts()

    def question_cache(self, in_force: InForce | None = None) -> VideoXLCache:
        """A cache that a question may extend; of what bi-level decoding drops nothing comes to the device.

        Args:
            in_force: Settings of the call; None for those of the model's config now.
        """
        in_force = InForce(self._model.config) if in_force is None else in_force
        if self.policy.runs_questions and self.policy != in_force.policy:
            logger.warning_once(
                "a video was encoded with other settings of its model's compression than the config's, and is asked "
                "with its own; encode it again to change them"
            )
        settled = self._settled or self.policy.settled(self._model.model, self.cache)
        if settled is not self.cache:
            self._settled = settled
        whole = not in_force.decoding.text_only and settled.waiting is None
        device = self._model.device
        here = settled.held > 0 and settled.layers[0].keys.device == device
        cache = settled.fork(make_room=here and not in_force.decoding.text_only)
        if whole:
            cache.move(device)
        return cache

    def is_current(self) -> bool:
        """Whether the file it was made from is unchanged, or gone (always true for frames from memory)."""
        stamp = _file_stamp(str(self))
        return stamp is None or stamp == self._stamp

    def to(self, device) -> "EncodedVideo":
        """Moves what it holds to a device, in place: `"cpu"` frees the GPU, a question brings back what it needs."""
        self.cache.move(device)
        self._settled = None
        return self

    def adopt(self, processor) -> None:
        """Gives a loaded video the processor it needs to take in more frames."""
        self._processor = self._processor or processor

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of this video."""
        return sum(group.end - group.visual_start for group in self.layout.videos[-1])

    def continues(self, model, ids, base=None) -> bool:
        """Whether this model made it (or loaded it) behind exactly these token ids [.] and this earlier video."""
        start = self.layout.videos[-1][0].start
        same_base = self._behind is (None if base is None else base.mark)
        return self._model is model and same_base and torch.equal(self.input_ids[:start], ids)

    def chunks(self, chunk_groups) -> list[tuple[float, float]]:
        """(start, end) seconds of the video's chunks of `chunk_groups` groups each; zeros for an image."""
        if self.kind == "image":
            return [(0.0, 0.0)] * -(-len(self.layout.videos[-1]) // chunk_groups)
        starts = self.timestamps[:: chunk_groups * self._model.config.frames_per_group]
        return list(zip(starts, [*starts[1:], max(self.end, self.timestamps[-1])], strict=True))

    def save(self, path) -> None:
        """Writes the video to one safetensors file, which `model.load_video` reads.

        The file is complete or not there, whenever the process is killed.

        Args:
            path: Where to; an existing file is replaced.

        Raises:
            FileNotFoundError, ValueError: If the file cannot be written there, or the video file has changed since.
        """
        if not self.is_current() and not self.appended:
            raise ValueError(f"{self} has changed since it was encoded: encode it again before saving")
        tensors = {"input_ids": self.input_ids}
        for index, layer in enumerate(self.cache.layers):
            if layer.held:
                tensors[f"layers.{index}.keys"], tensors[f"layers.{index}.values"] = layer.keys, layer.values
        if self.cache.waiting is not None:
            tensors["deferred"] = self.cache.waiting[:]
        if self._tail is not None:
            tensors["tail"] = self._tail
        facts = {
            "model": model_fingerprint(self._model),
            "source": os.path.abspath(self) if self else "",
            # A video that grew beyond its file is bound to no file.
            "source_fingerprint": None if self.appended else source_fingerprint(str(self)),
            "sampling": self.sampling,
            "prefill": self.policy.facts(),
            "timestamps": self.timestamps,
            "start": self.start,
            "duration": self.duration,
            "videos": self.layout.videos,
            "whole": self._whole,
            "system_prompt": self.system_prompt,
            "appended": self.appended,
            "kind": self.kind,
        }
        save_video_file(path, tensors, facts)

    @classmethod
    def load(cls, path, model, processor=None, verify=True, source=None, **sampling) -> "EncodedVideo":
        """See `model.load_video`."""
        tensors, facts = load_video_file(path, verify=verify)
        source = os.fspath(source) if source is not None else facts["source"]
        expected = {
            "model": model_fingerprint(model),
            "source_fingerprint": None if facts["appended"] else source_fingerprint(source),
            "sampling": sampling or None,
        }
        require_match(facts, expected, f"the saved video {os.fspath(path)}")
        cache = VideoXLCache(model.config.text_config.num_hidden_layers)
        for index, layer in enumerate(cache.layers):
            if f"layers.{index}.keys" in tensors:
                layer.set_content(*(tensors[f"layers.{index}.{name}"].to(model.device) for name in ("keys", "values")))
            # Compressed tokens, and those that wait for the question, have no keys.
            layer.pass_by(len(tensors["input_ids"]) - layer.held)
        if "deferred" in tensors:
            begin = len(tensors["input_ids"]) - len(tensors["deferred"])
            cache.waiting = WaitingRows((tensors["deferred"].to(model.device),), begin)
        policy_of(model.config, facts["prefill"]).begin(cache)
        video_groups = [tuple(GroupSpan(*group) for group in video) for video in facts["videos"]]
        cache.layout = VisualLayout(tuple(video_groups), cache.get_seq_length())
        state = {"sampling": facts["sampling"], "system_prompt": facts["system_prompt"]}
        state["kind"] = facts.get("kind", "video")  # files of earlier versions hold videos only
        video = cls(source, model=model, processor=processor, cache=cache, input_ids=tensors["input_ids"], **state)
        video.appended = facts["appended"]
        video.timestamps, video.duration = facts["timestamps"], facts["duration"]
        video.start = facts.get("start", 0.0)
        video._tail, video._whole = tensors.get("tail"), tuple(facts["whole"])
        return video

    def append(self, frames, timestamps) -> None:
        """Adds frames to the end of the video; afterwards it equals one that was encoded from all frames at once.

        All of them or none: if it fails or is interrupted, the video is what it was, and can be asked and tried again.

        Args:
            frames: PIL images or uint8 [F, H, W, 3].
            timestamps: Their seconds, increasing, later than the last frame so far.

        Raises:
            ValueError: On frames or timestamps of another form, times that do not follow, or more tokens than the
                model takes.
        """
        if self.kind == "image":
            raise ValueError("an image takes in no frames; encode a video, or ask with several items")
        if self._processor is None:
            raise ValueError("a loaded video needs its tokenizer to take in frames: model.load_video(path, tokenizer)")
        sampling = self._processor.sampling(sample_fps=None)
        reader = open_video(frames, timestamps=timestamps, sampling=sampling, **self._processor.frame_options)
        with reader:
            if self.timestamps and reader.timestamps[0] <= self.timestamps[-1]:
                raise ValueError(
                    f"appended frames must be later than the last one at {self.timestamps[-1]} s, the first new one "
                    f"is at {reader.timestamps[0]} s"
                )
            tokens = self._tokens_with(reader.timestamps)
            require_context(self._model.model, tokens)
            with self._all_or_nothing(tokens):
                self.appended = True
                for batch in reader:
                    self.extend(batch)
                if len(self.timestamps) > 1:
                    duration = 2 * self.timestamps[-1] - self.timestamps[-2] - self.start
                    # Of frames from memory alone it follows from their times, as when all had come at once.
                    self.duration = max(self.duration, duration) if self else duration

    @contextmanager
    def _all_or_nothing(self, tokens: int) -> Iterator[None]:
        """Undoes what an error, or an interrupt, leaves half done; `tokens` is the length that is aimed at."""
        self._settled = None  # follows from the cache again, and would fill memory meanwhile
        for layer in self.cache.layers:
            # A buffer that grew later would lie beside the old one, which is kept for the case of failure. Layers that
            # do not hold every token are small, and those that are elsewhere are copied anyway.
            stays = layer.is_offloaded or layer.held and layer.keys.device == self._model.device
            if stays and not layer.hidden:
                layer.make_room(tokens - layer.held)
        restore = self.cache.snapshot(self._before_tail[1])
        before = {**self.__dict__, "timestamps": list(self.timestamps)}
        try:
            yield
        except BaseException:
            restore()
            self.__dict__.update(before)
            raise

    @torch.no_grad()
    def extend(self, batch) -> None:
        """Adds a `FrameBatch`, see `append`."""
        require_context(self._model.model, self._tokens_with(batch.timestamps))
        self.mark, self._settled = object(), None
        if not self.cache.layers[0].is_offloaded:
            self.cache.move(self._model.device)
        frames, times = batch.frames, list(batch.timestamps)
        if self._tail is not None:
            kept = len(self._tail)
            frames, times = torch.cat([self._tail, frames]), self.timestamps[-kept:] + times
            del self.timestamps[-kept:]
            self.cache.rewind(*self._whole)
            self.cache.layout = self.layout.until(self._whole[0])
            self.input_ids = self.input_ids[: self._whole[0]]
        processor, layer = self._processor, self.cache.layers[0]
        pixels = normalize_frames(frames.to(self._model.device), processor.image_mean, processor.image_std)
        unit = self.policy.unit_frames(self._model.config)
        # Where not every token leaves a key, what may be taken back is run by itself.
        whole = len(times) // unit * unit if self.policy.text_only else len(times)
        for part in (slice(0, whole), slice(whole, len(times))):
            if not times[part]:
                continue
            self._whole = len(self.input_ids), layer.held
            time_ids = [processor.time_token_ids(seconds) for seconds in times[part][:: processor.frames_per_group]]
            grows = bool(self.timestamps)
            ids = prefill_frames(self._model.model, self.cache, pixels[part], time_ids, self.policy, grows)
            self.input_ids = torch.cat([self.input_ids, torch.tensor(ids)])
            self.timestamps += times[part]
            layer = self.cache.layers[0]
        self.duration = max(self.duration, times[-1] - self.start)
        partial = len(times) % unit
        self._tail = frames[-partial:] if partial else None
        if partial and whole == len(times):
            removed = len(self.input_ids) - self.layout.videos[-1][-1].start
            self._whole = len(self.input_ids) - removed, max(layer.held - removed, 0)

    @property
    def _before_tail(self) -> tuple[int, int]:
        """Tokens, and keys of them, that stay when frames are added; those of a last, partial group are run again."""
        return (len(self.input_ids), self.cache.layers[0].held) if self._tail is None else self._whole

    def _tokens_with(self, times) -> int:
        """Tokens of the whole sequence with frames at these seconds added."""
        times = self.timestamps[len(self.timestamps) - (0 if self._tail is None else len(self._tail)) :] + list(times)
        starts = times[:: self._processor.frames_per_group]
        stamps = sum(len(self._processor.time_token_ids(seconds)) for seconds in starts)
        return self._before_tail[0] + stamps + len(starts) * self._model.model.tokens_per_group

    @torch.no_grad()
    def extend_image(self, tiles) -> None:
        """Adds an image's tiles, uint8 as `VideoXLProcessor.read_tiles` gives them, as groups without timestamps."""
        pixels = self._processor.normalize_tiles(tiles.to(self._model.device))
        stamp = self._processor.time_token_ids(0.0) if self._processor.image_timestamps else []
        stamps = [stamp] * count_tiles(tiles)
        ids = prefill_frames(self._model.model, self.cache, pixels, stamps, self.policy, continues=False)
        self.input_ids = torch.cat([self.input_ids, torch.tensor(ids)])

    def __deepcopy__(self, memo):
        # Histories are copied freely: share the tensors, never copy the model.
        other = EncodedVideo.__new__(EncodedVideo, str(self))
        other.__dict__.update(self.__dict__)
        other.cache = self.cache.fork()
        other.timestamps = list(self.timestamps)
        return other

    def __reduce__(self):
        raise TypeError(
            "an EncodedVideo cannot be pickled; pass its path, or encode the video again where it is needed"
        )


def _file_stamp(path):
    """Size and modification time of a file, None where there is no file."""
    try:
        status = os.stat(path) if path else None
    except OSError:
        return None
    return status and (status.st_size, status.st_mtime_ns)
