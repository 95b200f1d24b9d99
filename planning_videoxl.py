"""`plan`: what a video will cost before it is decoded: tokens, key-value bytes, peak memory by stage, frames that fit.

What is surprising:
* Tokens and key-value bytes are exact: they equal what `encode_video` makes.
* Peaks are estimates, one sum a stage: weights, what is kept, pixels, and the widest moment of the activations. Every
  buffer counts as if it had just grown. At published sizes they were within 1.2 % below and 3.7 % above a count of
  each tensor; against measured growth of memory on a CPU, encoding was within 11 % below and 18 % above.
* Peaks never fall as a video gets longer. So `max_frames` is a search, and every shorter video fits, too.
* Not counted: the process itself (a CUDA context is some hundred megabytes), workspaces of cuDNN, cuBLAS and oneDNN,
  what an allocator keeps for later, and the copy of the video's key-values that a second question at the same time
  makes, or an answer that is longer than the room left behind them (at first 256 tokens, then a quarter of the video).
* With `offload` and a window peaks are the device's: the rest of the key-values is host memory.

G groups of frames; a row is one token on its way through the language model.
"""

import re
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from numbers import Integral

import numpy as np

from .frame_sampling_videoxl import FrameSampler, Sampling
from .kv_cache import GROWTH, MIN_SPARE_TOKENS
from .kv_tiers_videoxl import BLOCK_ROWS, ROWS_AT_ONCE, packed_bytes, require_store
from .messages_videoxl import is_image
from .prefill_videoxl import SEGMENT_TOKENS, InForce, SequenceSize
from .processing_videoxl import VideoXLProcessor
from .sparse_attention import MASK_ROWS
from .video_processing_videoxl import open_video
from .vision_videoxl import frames_at_once

# Tokens in front of a video where no tokenizer is given: the default prompt's header under Qwen2's tokenizer.
HEADER_TOKENS = 14
# Batches of uint8 frames in memory while a batch is encoded: it, two in the queue, and one that is being filled.
FRAME_BATCHES = 4
# Units of memory, as powers of 1000 or 1024.
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class VideoPlan:
    """What a video costs. Sizes are bytes.

    Attributes:
        frames, groups: Sampled frames, and groups of them (the last one may be partial).
        visual_tokens, timestamp_tokens, text_tokens: Placeholders; the groups' times; the prompt's header.
        total_tokens: Their sum, the length of `EncodedVideo.input_ids`.
        counted_by: `"tokenizer"`, or `"time_format"`: one token for its word and one for every other character, and a
            header of `HEADER_TOKENS`; exact for Qwen2's tokenizer and the default prompt.
        question_tokens, max_new_tokens: What the stages `question` and `decode` were planned for.
        kv_bytes: Keys and values of the encoded video; also what waits for a question: with a token selector its
            features, and hidden states where tokens are dropped between layers.
        mixed_tokens, mixed_kv_bytes: Where it is another one (else None), the cache that a question runs behind: with
            bi-level decoding (an upper bound if `reload` limits by mass), beacon memory or a token selector; where
            tokens are dropped between layers, the mean over them, rounded down.
        pooled_kv_bytes: Bi-level decoding (else None): pooled keys and values, kept beside the dense ones.
        weight_bytes: Parameters and buffers of the model.
        stages: Per stage (vision, prefill, store, question, decode) the terms of its peak, weights among them.
        device: Where the model is; the terms depend on it.
        memory_bytes, max_frames_in_memory: The given memory, and how many frames fit it.
        context_limit: Tokens that the model takes, question included; None where nothing limits it. More are an error.
        store: In what the video's key-values are packed, None for the model's precision. `kv_bytes` are the packed
            ones; the question's, in `stages`, are unpacked.
    """

    frames: int
    groups: int
    visual_tokens: int
    timestamp_tokens: int
    text_tokens: int
    total_tokens: int
    counted_by: str
    question_tokens: int
    max_new_tokens: int
    kv_bytes: int
    mixed_tokens: int | None
    mixed_kv_bytes: int | None
    pooled_kv_bytes: int | None
    weight_bytes: int
    stages: dict[str, dict[str, int]]
    device: str
    memory_bytes: int | None = None
    max_frames_in_memory: int | None = None
    context_limit: int | None = None
    store: str | None = None
    _planner: object = field(default=None, repr=False, compare=False)

    @property
    def peak_bytes(self) -> int:
        """The largest stage's sum."""
        return max(sum(terms.values()) for terms in self.stages.values())

    def beyond(self, stage: str) -> int:
        """Bytes of a stage's peak beyond the model's weights."""
        return sum(self.stages[stage].values()) - self.weight_bytes

    def max_frames(self, memory) -> int:
        """The largest number of frames, at this plan's interval, such that it and every smaller number fits; maybe 0.

        Args:
            memory: Bytes, or a string such as `"24GB"` (10^9) or `"24GiB"` (2^30); ValueError on another.
        """
        return self._planner.max_frames(parse_memory(memory))

    def to_dict(self) -> dict:
        """All of it, ready for JSON, with `peak_bytes`."""
        facts = asdict(replace(self, _planner=None)) | {"peak_bytes": self.peak_bytes}
        del facts["_planner"]
        return facts

    def __str__(self) -> str:
        rows = [("frames (groups)", f"{self.frames:,} ({self.groups:,})"), ("tokens", f"{self.total_tokens:,}")]
        parts = {"visual": self.visual_tokens, "timestamps": self.timestamp_tokens, "text": self.text_tokens}
        parts |= {"at most, with the question": self.context_limit}
        rows += [(f"  {name}", f"{count:,}") for name, count in parts.items() if count is not None]
        mixed = None if self.mixed_tokens is None else f"  mixed, {self.mixed_tokens:,} tokens"
        sizes = [("key-values", self.kv_bytes), (mixed, self.mixed_kv_bytes), ("  pooled", self.pooled_kv_bytes)]
        for stage, terms in self.stages.items():
            sizes += [(f"peak, {stage}", sum(terms.values()))]
            sizes += [(f"  {name}", size or None) for name, size in terms.items()]
        rows += [(name, _readable(size)) for name, size in sizes if size is not None]
        if self.memory_bytes is not None:
            rows += [(f"frames that fit {_readable(self.memory_bytes)}", f"{self.max_frames_in_memory:,}")]
        left, right = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in rows)


def plan_video(
    model,
    num_frames=None,
    *,
    video_path=None,
    tokenizer=None,
    max_num_frames=512,
    sample_fps=1,
    max_sample_fps=4,
    question_tokens=64,
    max_new_tokens=1024,
    memory=None,
    store=None,
) -> VideoPlan:
    """Says what encoding a video and asking about it will cost, under the config's settings of this moment.

    Args:
        num_frames: Frames that will be sampled, `1 / sample_fps` seconds apart (1 second if that is None).
        video_path: A file, or frames, instead: opened, not decoded, and sampled as `encode_video` would.
        tokenizer: The checkpoint's tokenizer; without it tokens are counted from `config.time_format`.
        max_num_frames, sample_fps, max_sample_fps: See `encode_video`; the first and last for files only.
        question_tokens: Tokens behind the video, the assistant's header included.
        max_new_tokens: Tokens of the answer.
        memory: Bytes, or such as `"24GB"`: also say how many frames fit.
        store: See `encode_video`.

    Returns:
        A `VideoPlan`; `print` shows it as a table.

    Raises:
        FileNotFoundError, ValueError, VideoDecodeError: On a file that cannot be opened or numbers out of range.
    """
    if (num_frames is None) == (video_path is None):
        given = "neither" if num_frames is None else "both"
        raise ValueError(f"plan needs either num_frames or video_path, got {given}; give one of them")
    counts = {"num_frames": (num_frames, 1), "question_tokens": (question_tokens, 1)}
    for name, (value, least) in {**counts, "max_new_tokens": (max_new_tokens, 0)}.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r:.200}")
    if sample_fps is not None and not sample_fps > 0:
        raise ValueError(f"sample_fps must be frames per second above 0, or None, got {sample_fps!r:.200}")
    memory = None if memory is None else parse_memory(memory)
    step, times = 1 / (sample_fps or 1), None
    if video_path is not None:
        sampler = FrameSampler.of(model.config.frames_config)
        if is_image(video_path):
            raise ValueError("plan counts the frames of videos; this is an image, of tokens_per_group tokens a tile")
        sampling = Sampling(max_num_frames, sample_fps, max_sample_fps, sampler)
        with open_video(video_path, size=model.config.vision_config.image_size, sampling=sampling) as reader:
            times = list(reader.timestamps)
        step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else step
    planner = _Planner(model, tokenizer, step, question_tokens, max_new_tokens, store)
    plan = planner.plan(num_frames or len(times), times)
    if memory is not None:
        plan = replace(plan, memory_bytes=memory, max_frames_in_memory=planner.max_frames(memory))
    return plan


class _Planner:
    """Counts tokens, and sums up what lives at once."""

    def __init__(self, model, tokenizer, step, question_tokens, max_new_tokens, store=None):
        config, text, in_force = model.config, model.config.text_config, InForce(model.config)
        self.settings, self.policy, self.decoding = in_force.settings, in_force.policy, in_force.decoding
        self.config, self.step, self.store = config, step, store
        if store is not None:
            require_store(store, self.policy)
        self.question_tokens, self.max_new_tokens = question_tokens, max_new_tokens
        # As `encode_video` reads a file: whole units at a time.
        unit = self.policy.unit_frames(config)
        self.chunk_frames = config.resolve_vision_chunk_frames()
        self.batch_frames = max(self.chunk_frames // unit, 1) * unit
        weights = model.get_input_embeddings().weight
        self.bytes, self.device = weights.element_size(), weights.device.type
        self.head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        layer_bytes = 2 * text.num_key_value_heads * self.head_size * self.bytes
        self.sizes = (text.num_hidden_layers, layer_bytes, text.hidden_size * self.bytes)
        self.weight_bytes = model.get_memory_footprint()
        if tokenizer is None:
            self.header, time_format = HEADER_TOKENS, config.time_format or ""
            self._count = lambda seconds: len(re.sub(r"^\w+", "x", time_format.format(seconds=float(seconds))))
        else:
            processor = VideoXLProcessor.from_config(config, tokenizer)
            message = {"role": "user", "content": [{"type": "video", "video": ""}]}
            self.header = len(processor.prompt_pieces(processor.render([message]))[0])
            self._count = lambda seconds: len(processor.time_token_ids(seconds))
        self._count = cache(self._count)  # a search asks for the same times again
        self.counted_by = "time_format" if tokenizer is None else "tokenizer"

    def _stamps_of(self, groups, times) -> np.ndarray:
        """[G] tokens of the groups' timestamps, at `times` of the frames or `step` seconds apart."""
        size = self.config.frames_per_group
        starts = (group * size * self.step for group in range(groups)) if times is None else times[::size]
        return np.fromiter(map(self._count, starts), dtype=np.int64)

    def plan(self, frames, times=None) -> VideoPlan:
        """The plan of `frames` frames, `step` seconds apart or at `times`."""
        groups = -(-frames // self.config.frames_per_group)
        visual = groups * self.config.compressor_config.tokens_per_group
        size = SequenceSize(self.header, self._stamps_of(groups, times), visual, *self.sizes)
        kept = self.decoding.kept(self.policy.kept(size, self.config), size, self.settings)
        kept = kept if self.store is None else self._packed(kept, size, frames)
        return VideoPlan(
            frames=frames,
            groups=groups,
            visual_tokens=visual,
            timestamp_tokens=size.text - size.header,
            text_tokens=size.header,
            total_tokens=size.total,
            counted_by=self.counted_by,
            question_tokens=self.question_tokens,
            max_new_tokens=self.max_new_tokens,
            kv_bytes=kept.held + kept.waiting,
            mixed_tokens=kept.seen_tokens,
            mixed_kv_bytes=kept.seen,
            pooled_kv_bytes=kept.pooled,
            weight_bytes=self.weight_bytes,
            stages=self._stages(frames, size, kept),
            device=self.device,
            context_limit=(self.config.resolve_context_limit() or (None,))[0],
            store=self.store,
            _planner=self,
        )

    def max_frames(self, memory) -> int:
        """See `VideoPlan.max_frames`."""
        low, high = 0, self.batch_frames
        while self.plan(high).peak_bytes <= memory:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.plan(middle).peak_bytes <= memory else (low, middle)
        return low

    def _packed(self, kept, size, frames):
        """What is kept where visual tokens are packed: all but a window and a partial block, or a partial group."""
        groups, chunk, settings = len(size.stamps), self.settings.chunk_groups, self.settings
        per_group, streaming = size.visual // groups, settings.prefill == "streaming"
        rows = frames // self.config.frames_per_group * per_group
        left = per_group  # unpacked tokens at most
        if streaming:
            first = max((groups - 1) // chunk - settings.window_chunks, 0) * chunk
            rows = first * per_group // BLOCK_ROWS * BLOCK_ROWS
            batch = -(-min(frames, self.batch_frames) // self.config.frames_per_group)
            left = ((settings.window_chunks + 1) * chunk + batch) * per_group + BLOCK_ROWS

        def held(packed, tokens):
            channels = size.layer_bytes // self.bytes
            packed = packed_bytes(packed, -(-packed // BLOCK_ROWS), channels, self.store)
            return tokens * size.token_bytes + size.layers * packed

        return kept._replace(
            held=held(rows, size.total - rows),
            most_held=min(kept.held, held(size.visual, size.text + left)),
            unpacked=None if streaming else kept.held,
            own=kept.own or kept.held,
            asking=max(kept.asking, self._converting(size)),
        )

    def _converting(self, size) -> int:
        """Rows of a layer in float32 while they are packed or unpacked: as they are, on a grid, rotated (twice)."""
        return 5 * min(size.visual, ROWS_AT_ONCE) * size.layer_bytes // self.bytes * 4

    def _stages(self, frames, size, kept) -> dict[str, dict[str, int]]:
        """The terms of each stage's peak."""
        most, own = kept.most_held or kept.held, kept.own
        in_batch = min(frames, self.batch_frames)
        per_group = size.visual // len(size.stamps) + int(size.stamps.max())
        batch = size.header + -(-in_batch // self.config.frames_per_group) * per_group
        at_once = kept.rows_at_once or SEGMENT_TOKENS
        encoded = most if kept.unpacked is None else kept.unpacked
        always = self._always(encoded, size, kept, batch)
        frame = 3 * self.config.vision_config.image_size**2
        queued = min(FRAME_BATCHES * self.batch_frames, frames) * frame if self.device == "cpu" else 0
        encoding = always | {"pixels": 4 * in_batch * frame + queued}  # float32; uint8 frames are host memory
        stages = {"vision": encoding | {"activations": self._vision(min(in_batch, self.chunk_frames))}}
        rows = min(batch, at_once) if kept.held else 0
        running = self._language(rows, encoded // size.token_bytes, size.layer_bytes)
        # The sequence's rows, and the visual tokens that went into them.
        stages["prefill"] = encoding | {"activations": running + 2 * batch * size.row_bytes}
        if kept.unpacked is not None:
            stages["store"] = always | {"packed key-values": most, "activations": self._converting(size)}
        always = self._always(most, size, kept, batch)
        asked, answered = self.question_tokens, self.question_tokens + self.max_new_tokens
        # Ids, mask and positions in int64; one row of logits, and its float32 copy that `generate` picks from.
        vocabulary = self.config.text_config.vocab_size * (self.bytes + 4)
        ids = 24 * (size.total + answered)
        asking = always | {"pooled key-values": kept.pooled or 0, "ids and logits": ids + vocabulary}
        # The spare room behind a short video does not hold a long answer: its key-values are copied.
        short = min(most, int(answered / GROWTH) * size.token_bytes) if answered > MIN_SPARE_TOKENS else 0
        asking["question's key-values"] = own or short
        asking["spare room"] += self._spare(own or short, size)
        rows = min(kept.rows + asked, at_once) if kept.rows else asked
        running = self._language(rows, (own or most) // size.token_bytes, size.layer_bytes)
        running = max(running + 2 * (kept.rows + asked) * size.row_bytes, kept.asking)
        stages["question"] = asking | {"new key-values": asked * size.token_bytes, "activations": running}
        stages["decode"] = asking | {"new key-values": answered * size.token_bytes}
        return stages

    def _always(self, held, size, kept, batch) -> dict[str, int]:
        """What is there all the time."""
        device = self._on_device(held, size, batch)
        spare = 0 if self.store is not None and held != kept.unpacked else self._spare(device, size)
        always = {"weights": self.weight_bytes, "key-values": device, "spare room": spare}
        return always | {"rows that wait": kept.waiting, "rows that pass": kept.passing}

    def _on_device(self, held, size, batch) -> int:
        """Bytes of key-values where the model is: with `offload` and a window that, text and what just came."""
        settings, per_group = self.settings, size.visual // len(size.stamps)
        window = (settings.window_chunks + 1) * settings.chunk_groups * per_group + batch
        near = min(held, (size.text + window) * size.token_bytes)
        return near if settings.offload and settings.prefill != "full" and self.device != "cpu" else held

    def _spare(self, held, size) -> int:
        """Room behind key-values in buffers that have just grown; on a CPU untouched pages take no memory."""
        spare = max(int(GROWTH * held), MIN_SPARE_TOKENS * size.token_bytes)
        return 0 if self.device == "cpu" or not held else spare

    def _vision(self, frames) -> int:
        """The widest moment of tower, compressor and projector over one chunk of frames."""
        e, compressor, tower = self.bytes, self.config.compressor_config, self.config.vision_config
        whole = -(-frames // self.config.frames_per_group) * self.config.frames_per_group
        cast = 0 if e == 4 else whole * 3 * tower.image_size**2 * e
        features = whole * (tower.image_size // tower.patch_size) ** 2 * tower.hidden_size * e
        # Eight copies in attention (input, normed, queries, keys, values, output, its projection, ...), or four and
        # both sides of the MLP's activation.
        copies = max(8, 4 + 2 * tower.intermediate_size // tower.hidden_size)
        layer = features * copies
        if compressor.compressor_type == "tome":
            # Clip by clip, merged in float32; the features of all frames stay to the end, and are joined there.
            return cast + features + max(features, 5 * layer * self.config.frames_per_group // (4 * whole))
        frame, group = features // whole, self.config.frames_per_group
        at_once = frames_at_once(self.device, whole, 1, frame // tower.hidden_size * tower.intermediate_size)
        found = [frame * at_once * copies + (features if at_once < whole else 0)]
        at_once = frames_at_once(
            self.device, whole, group, group * compressor.grid_size**2 * compressor.hidden_size * e
        )
        cells = at_once * compressor.grid_size**2
        width = compressor.hidden_size + 2 * self.config.text_config.hidden_size
        found.append(features + cells // group * width * e)
        if compressor.compressor_type == "dts":
            # Temporal attention: ten copies, and queries and keys in float32. Spatial: seven, and the logits' three.
            temporal, logits = compressor.hidden_size * (10 * e + 8), 10 * compressor.grid_size**2
            found.append(features + cells * max(temporal, 7 * compressor.hidden_size * e + logits))
        return cast + max(found)

    def _language(self, rows, held, layer_bytes) -> int:
        """Rows through one layer of the language model, behind `held` tokens."""
        text, e, keys = self.config.text_config, self.bytes, held + rows
        queries = 4 * text.num_attention_heads * self.head_size * e + layer_bytes
        row = 3 * text.hidden_size * e + max(3 * text.intermediate_size * e, queries) + 2 * self.head_size * e
        # Flash kernels, which need no mask, are not on CPUs and not in float32.
        mask = min(rows, MASK_ROWS) * keys * e if rows > 1 and (self.device == "cpu" or e == 4) else 0
        # Before there is a mask, the layer's keys and values once more: in the buffer that they have outgrown.
        return rows and rows * row + max(mask, keys * layer_bytes)


def parse_memory(memory) -> int:
    """Bytes of `memory`: a number, or a string such as `"24GB"` (10^9) or `"24GiB"` (2^30)."""
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", memory, re.IGNORECASE)
        if match:
            return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].upper()])
    elif isinstance(memory, int | float) and not isinstance(memory, bool) and 0 < memory < float("inf"):
        return int(memory)
    raise ValueError(f'memory must be bytes above 0 or a string such as "24GB" or "24GiB", got {memory!r:.200}')


def _readable(size) -> str:
    units = (f"{size / scale:,.2f} {unit}" for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= scale)
    return next(units, f"{size} B")
