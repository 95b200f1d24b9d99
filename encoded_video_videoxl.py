"""`EncodedVideo`: a video (or image) as the language model holds it; asked many times, extended, saved and loaded.

What is surprising:
* It is a `str`, the path it was made from. So a history that holds one survives `json.dumps`; what comes back is the
  path, and the video is encoded anew.
* Its cache stands for everything up to the end of the video, the prompt's header included: `input_ids` says which
  tokens. It can be continued by any text, and by none that comes before it.
* Where visual tokens are dropped between layers, it holds the layers in front of the first stage, and what they made
  of its tokens; so frames can be added. What follows without a question is done when the first one comes, and kept
  until the video grows. It is not in the file.
* Other weights or adapters would have given other key-values: a `Witness` of them is kept, and compared at each use.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging

from .image_processing_videoxl import count_tiles
from .kv_cache import VideoXLCache, WaitingRows
from .kv_tiers_videoxl import STORES, VideoXLPackedLayer, pack_cache, require_store
from .prefill_videoxl import InForce, policy_of, prefill_frames, require_context
from .sparse_attention import GroupSpan, VisualLayout, plan_prefill
from .video_file_videoxl import load_video_file, require_match, save_video_file, source_fingerprint
from .video_processing_videoxl import normalize_frames, open_video
from .witness_videoxl import Witness, model_fingerprint

logger = logging.get_logger(__name__)

# What of an encoded video a file holds as it is.
_SAVED = ("kind", "sampling", "system_prompt", "appended", "timestamps", "start", "duration")


class EncodedVideo(str):
    """A video as the language model holds it, for any number of questions. Made by `model.encode_video`.

    As a string it is the path of its file, or empty for frames from memory. It may also be an image: that has no
    frames, timestamps or duration, and cannot be extended.

    Attributes:
        kind: `"video"` or `"image"`.
        timestamps: Seconds of every sampled frame, from the first displayed frame of the file.
        start: Where a part of a file begins, in its seconds; 0 for a whole one.
        duration: Seconds of the whole video, or of that part.
        sampling: The sampling settings.
        system_prompt: The system message it was encoded behind, None for the template's.
        appended: Whether frames were added that its file does not hold.
        input_ids: [L] token ids of everything up to the end of the video: prompt header, timestamps, placeholders.
        cache: Their key-values (`VideoXLCache`). Never extend it; fork it, or take `question_cache`.
        origin: What tells contents that came without a path from others; None for frames.
        mark: Stands for the content; it is another object once that has changed.
    """

    is_encoded_video = True

    def __new__(cls, source, **state):
        return super().__new__(cls, source or "")

    def __init__(
        self,
        source,
        *,
        model,
        processor,
        cache,
        input_ids,
        sampling,
        behind=None,
        system_prompt=None,
        kind="video",
        origin=None,
    ):
        super().__init__()
        self._processor, self._model, self._witness = processor, model, Witness(model)
        self.cache, self.input_ids = cache, input_ids
        self.kind, self.sampling, self.system_prompt, self.appended = kind, sampling, system_prompt, False
        self.origin, self.mark, self._behind = (
            origin,
            object(),
            behind,
        )  # `_behind` is the mark of the video in front of it
        self.timestamps: list[float] = []
        self.start, self.duration = 0.0, 0.0
        # Frames of a last, partial group or beacon window: they are encoded again when more frames come. And how many
        # tokens, and keys of them, are there without it.
        self._tail, self._whole = None, (0, 0)
        self._settled = None  # what follows from the cache without a question, see `question_cache`
        self._stamp = _file_stamp(source)

    @property
    def num_frames(self) -> int:
        """Sampled frames."""
        return len(self.timestamps)

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of this video."""
        return sum(group.end - group.visual_start for group in self.layout.videos[-1])

    @property
    def end(self) -> float:
        """Where it ends, in seconds of its file."""
        return self.start + self.duration

    @property
    def shown(self) -> tuple[float, int] | None:
        """What a prompt may say about it (see `VideoXLProcessor.prompt_pieces`): duration and number of frames."""
        return None if self.kind == "image" else (self.duration, self.num_frames)

    @property
    def layout(self) -> VisualLayout:
        """Where the visual tokens are among `input_ids`."""
        return self.cache.layout

    @property
    def nbytes(self) -> int:
        """Bytes of the key-values, and of what waits where the question decides what runs.

        Not counted is what questions leave beside them: pooled key-values, what follows without a question.
        """
        return self.cache.nbytes

    @property
    def store(self) -> str | None:
        """`"int8"` or `"int4"`, in which visual key-values are packed; None for the model's precision."""
        return self.cache.store

    @property
    def policy(self):
        """How its tokens were run; later changes of the config do not touch it."""
        return self.cache.policy

    @property
    def prefill(self) -> dict:
        """The prefill settings it was made with, ready for JSON."""
        return self.policy.facts()

    def question_cache(self, in_force: InForce | None = None) -> VideoXLCache:
        """A cache that a question may extend; of what bi-level decoding drops nothing comes to the device.

        `in_force` holds the settings of the call, by default those of the config now. ValueError if the model's
        weights or active adapters have changed.
        """
        self._witness.require(self._model)
        in_force = InForce(self._model.config) if in_force is None else in_force
        if self.policy.runs_questions and self.policy != in_force.policy:
            logger.warning_once(
                "a video was encoded with other settings of its model's compression than the config's, and is asked "
                "with its own; encode it again to change them"
            )
        settled = self._settled or self.policy.settled(self._model.model, self.cache)
        if settled is not self.cache:
            self._settled = settled
        device, sees_all = self._model.device, not in_force.decoding.text_only
        here = settled.held > 0 and settled.layers[0].keys.device == device
        cache = settled.fork(make_room=here and sees_all)
        if sees_all and settled.waiting is None:
            cache.unpack(device)
        return cache

    def is_current(self) -> bool:
        """Whether the file it was made from is unchanged, or gone (always true for frames from memory)."""
        return _file_stamp(str(self)) in (None, self._stamp)

    def to(self, device) -> "EncodedVideo":
        """Moves what it holds to a device, in place: `"cpu"` frees the GPU, a question brings back what it needs."""
        self.cache.move(device)
        self._settled = None
        return self

    def quantize(self, store: str) -> "EncodedVideo":
        """Packs the key-values of visual tokens, in place, all of them or (on an error) none; returns the video.

        Text and timestamps stay as they are. So does, after streaming prefill, the window that further frames see:
        these come out as if nothing were packed. After other kinds of prefill they see unpacked key-values.

        Args:
            store: `"int8"` or `"int4"`. A question asks what is unpacked for it; fewer bits may follow, more do not.

        Raises:
            ValueError: On another store, one of more bits than the video's, or a video of which not every visual token
                has key-values.
        """
        require_store(store, self.policy)
        if self.store and STORES[store] > STORES[self.store]:
            raise ValueError(f"the video is packed in {self.store}, which {store} cannot improve: encode it again")
        self._pack(store, ragged=self.policy.prefill != "streaming" and self.store != store)
        return self

    def _pack(self, store, ragged=False) -> None:
        before, model = self._before_tail[0], self._model.model
        if self.policy.prefill == "streaming" and before:
            steps = plan_prefill(self.layout, **self.policy.facts(), start=self.layout.length - 1)
            before = min(before, steps[-1].window_start)
        pack_cache(self.cache, store, before, model.language_model.rotary_emb.inv_freq, model.device, ragged)
        self._settled = None

    def adopt(self, processor) -> None:
        """Gives a loaded video the processor it needs to take in more frames."""
        self._processor = self._processor or processor

    def continues(self, model, ids, base=None) -> bool:
        """Whether this model made it (or loaded it) behind exactly these token ids [.] and this earlier video.

        ValueError if it did, and its weights or active adapters have changed.
        """
        start = self.layout.videos[-1][0].start
        same_base = self._behind is (None if base is None else base.mark)
        if self._model is not model or not same_base or not torch.equal(self.input_ids[:start], ids):
            return False
        self._witness.require(model)
        return True

    def chunks(self, chunk_groups) -> list[tuple[float, float]]:
        """(start, end) seconds of the video's chunks of `chunk_groups` groups each; zeros for an image."""
        if self.kind == "image":
            return [(0.0, 0.0)] * -(-len(self.layout.videos[-1]) // chunk_groups)
        starts = self.timestamps[:: chunk_groups * self._model.config.frames_per_group]
        return list(zip(starts, [*starts[1:], max(self.end, self.timestamps[-1])], strict=True))

    def save(self, path, source=None) -> None:
        """Writes the video to one safetensors file, which `model.load_video` reads.

        The file is complete or not there, whenever the process is killed. The first save reads all weights once.

        Args:
            path: Where to; an existing file is replaced.
            source: What it says of where its video file is, in place of the path: "" for a file that others get.

        Raises:
            FileNotFoundError, ValueError: If the file cannot be written there, or the video file, the model's weights
                or its active adapters have changed since.
        """
        if not self.is_current() and not self.appended:
            raise ValueError(f"{self} has changed since it was encoded: encode it again before saving")
        self._witness.require(self._model)
        tensors = {"input_ids": self.input_ids}
        for index, layer in enumerate(self.cache.layers):
            tensors |= {f"layers.{index}.{name}": states for name, states in layer.state().items()}
        if self.cache.waiting is not None:
            tensors["deferred"] = self.cache.waiting[:]
        if self._tail is not None:
            tensors["tail"] = self._tail
        facts = {name: getattr(self, name) for name in _SAVED} | {
            "model": model_fingerprint(self._model),
            "weights": self._witness.digest(self._model),
            "source": (os.path.abspath(self) if self else "") if source is None else os.fspath(source),
            # A video that grew beyond its file is bound to no file.
            "source_fingerprint": None if self.appended else source_fingerprint(str(self)),
            "prefill": self.prefill,
            "videos": self.layout.videos,
            "whole": self._whole,
            "store": self.store,
        }
        save_video_file(path, tensors, facts)

    @classmethod
    def load(cls, path, model, processor=None, verify=True, source=None, **sampling) -> "EncodedVideo":
        """See `model.load_video`."""
        tensors, facts = load_video_file(path, verify=verify)
        source, witness = facts["source"] if source is None else os.fspath(source), Witness(model)
        expected = {
            "model": model_fingerprint(model),
            "weights": witness.digest(model) if "weights" in facts else None,  # earlier versions' have none
            "source_fingerprint": None if facts["appended"] else source_fingerprint(source),
            "sampling": sampling or None,
        }
        require_match(facts, expected, f"the saved video {os.fspath(path)}")
        ids, cache = tensors["input_ids"], VideoXLCache(model.config.text_config.num_hidden_layers)
        videos = tuple(tuple(GroupSpan(*group) for group in video) for video in facts["videos"])
        cache.layout = VisualLayout(videos, len(ids))
        for index, layer in enumerate(cache.layers):
            prefix = f"layers.{index}."
            state = {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}
            if store := facts.get("store"):
                inv_freq = model.model.language_model.rotary_emb.inv_freq
                cache.layers[index] = layer = VideoXLPackedLayer(store, inv_freq, model.device)
                layer.restore(state, cache.layout.non_visual, len(ids))
            elif state:
                layer.set_content(*(state[name].to(model.device) for name in ("keys", "values")))
            # Compressed tokens, and those that wait for the question, have no keys.
            layer.pass_by(len(ids) - layer.held)
        if "deferred" in tensors:
            rows = tensors["deferred"].to(model.device)
            cache.waiting = WaitingRows((rows,), len(ids) - len(rows))
        policy_of(model.config, facts["prefill"]).begin(cache)
        video = cls(source, model=model, processor=processor, cache=cache, input_ids=ids, sampling=facts["sampling"])
        video.__dict__.update({name: facts[name] for name in _SAVED if name in facts})  # so have not all of these
        video._tail, video._whole, video._witness = tensors.get("tail"), tuple(facts["whole"]), witness
        return video

    def append(self, frames, timestamps) -> None:
        """Adds frames to the end of the video; afterwards it equals one that was encoded from all frames at once.

        All of them or none: if it fails or is interrupted, the video is what it was, and can be asked and tried again.

        Args:
            frames: PIL images or uint8 [F, H, W, 3].
            timestamps: Their seconds, increasing, later than the last frame so far.

        Raises:
            ValueError: On frames or timestamps of another form, times that do not follow, more tokens than the model
                takes, or weights or active adapters that have changed.
        """
        if self.kind == "image":
            raise ValueError("an image cannot be extended: encode a video, or ask with several items")
        if self._processor is None:
            raise ValueError("a loaded video needs its tokenizer to take in frames: model.load_video(path, tokenizer)")
        self._witness.require(self._model)
        sampling = self._processor.sampling(sample_fps=None)
        with open_video(frames, timestamps=timestamps, sampling=sampling, **self._processor.frame_options) as reader:
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
                if self.store:
                    self._pack(self.store)
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
        if not self.cache.layers[0].works_on(self._model.device):
            self.cache.move(self._model.device)
        frames, times = batch.frames, list(batch.timestamps)
        if self._tail is not None:
            kept = len(self._tail)
            frames, times = torch.cat([self._tail, frames]), self.timestamps[-kept:] + times
            del self.timestamps[-kept:]
            self.cache.rewind(*self._whole)
            self.cache.layout = self.layout.until(self._whole[0])
            self.input_ids = self.input_ids[: self._whole[0]]
        processor = self._processor
        pixels = normalize_frames(frames.to(self._model.device), processor.image_mean, processor.image_std)
        unit = self.policy.unit_frames(self._model.config)
        # Where not every token leaves a key, what may be taken back is run by itself.
        whole = len(times) // unit * unit if self.policy.text_only else len(times)
        for part in (slice(0, whole), slice(whole, len(times))):
            if not times[part]:
                continue
            self._whole = len(self.input_ids), self.cache.held
            time_ids = [processor.time_token_ids(seconds) for seconds in times[part][:: processor.frames_per_group]]
            self._run(pixels[part], time_ids, continues=bool(self.timestamps))
            self.timestamps += times[part]
        self.duration = max(self.duration, times[-1] - self.start)
        partial = len(times) % unit
        self._tail = frames[-partial:] if partial else None
        if partial and whole == len(times):
            removed = len(self.input_ids) - self.layout.videos[-1][-1].start
            self._whole = len(self.input_ids) - removed, max(self.cache.held - removed, 0)

    @torch.no_grad()
    def extend_image(self, tiles) -> None:
        """Adds an image's tiles, uint8 as `VideoXLProcessor.read_tiles` gives them, as groups without timestamps."""
        stamp = self._processor.time_token_ids(0.0) if self._processor.image_timestamps else []
        pixels = self._processor.normalize_tiles(tiles.to(self._model.device))
        self._run(pixels, [stamp] * count_tiles(tiles), continues=False)

    def _run(self, pixels, time_ids, continues) -> None:
        """Encodes pixels and runs their tokens behind all others, see `prefill_frames`."""
        ids = prefill_frames(self._model.model, self.cache, pixels, time_ids, self.policy, continues)
        self.input_ids = torch.cat([self.input_ids, torch.tensor(ids)])

    @property
    def _before_tail(self) -> tuple[int, int]:
        """Tokens, and keys of them, that stay when frames are added; those of a last, partial group are run again."""
        return (len(self.input_ids), self.cache.held) if self._tail is None else self._whole

    def _tokens_with(self, times) -> int:
        """Tokens of the whole sequence with frames at these seconds added."""
        times = self.timestamps[len(self.timestamps) - (0 if self._tail is None else len(self._tail)) :] + list(times)
        starts = times[:: self._processor.frames_per_group]
        stamps = sum(len(self._processor.time_token_ids(seconds)) for seconds in starts)
        return self._before_tail[0] + stamps + len(starts) * self._model.model.tokens_per_group

    def __deepcopy__(self, memo):
        # Histories are copied freely: share the tensors, never copy the model.
        other = EncodedVideo.__new__(EncodedVideo, str(self))
        other.__dict__.update(self.__dict__, cache=self.cache.fork(), timestamps=list(self.timestamps))
        return other

    def __reduce__(self):
        raise TypeError("an EncodedVideo cannot be pickled: pass its path, or encode the video again where needed")


def _file_stamp(path) -> tuple[int, int] | None:
    """Size and modification time of a file, None where there is no file."""
    try:
        status = os.stat(path) if path else None
    except OSError:
        return None
    return status and (status.st_size, status.st_mtime_ns)
