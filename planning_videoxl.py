"""`plan`: what a video will cost before it is decoded: tokens, key-value bytes, peak memory by stage, frames that fit.

What is surprising:
* Tokens and key-value bytes are exact: they equal what `encode_video` makes. Peaks count the tensors that live at once;
  every term is named, and derived where it is computed. Not counted: the process itself (a CUDA context is about half
  a gigabyte), workspaces of cuDNN, cuBLAS and oneDNN, and what an allocator keeps for itself.
* A growing layer has spare room (`kv_cache.GROWTH`). CUDA pays for it at once; on a CPU pages that nothing was written
  to take no memory, so the spare room counts as 0 there.
* More frames can need less: behind a buffer that has just grown, a question finds room that it lacked one group
  earlier. `max_frames` is the length up to which *every* length fits, so it is monotone.
* Attention is taken to be SDPA, which keeps no scores. On a CPU it needs a mask, which is turned into floats.

F frames, G groups of frames, N visual tokens a group, n tokens that run at once, r queries of an attention step, v keys
that they see, M tokens of a mixed cache, H heads, K key-value heads, D head size, h width of the language model, P
patches and C channels of the tower, S side of the compressor's grid, e bytes per element.
"""

import re
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from .kv_cache import GROWTH, MIN_SPARE_TOKENS, ROTATED_AT_ONCE
from .prefill_videoxl import SEGMENT_TOKENS
from .processing_videoxl import VideoXLProcessor
from .selection_videoxl import ChunkCost, ReloadPolicy, choose_levels
from .sparse_attention import MAX_STEP_QUERIES
from .video_processing_videoxl import open_video

# Tokens in front of a video where no tokenizer is given: the default prompt's header under Qwen2's tokenizer.
HEADER_TOKENS = 14
# Batches of uint8 frames in memory while a batch is encoded: it, two in the queue, and one that is being filled.
FRAME_BATCHES = 4
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
        kv_bytes: Keys and values of the encoded video.
        mixed_tokens, mixed_kv_bytes, pooled_kv_bytes: Bi-level decoding (else None): the cache that a question runs
            behind (an upper bound if `reload` limits by mass), and pooled keys and values, kept beside the dense ones.
        weight_bytes: Parameters and buffers of the model.
        stages: Per stage the named terms of its peak, weights and key-values among them.
        device: Where the model is; the terms depend on it.
        memory_bytes, max_frames_in_memory: The given memory, and how many frames fit it.
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
    _planner: object = field(default=None, repr=False, compare=False)

    @property
    def peak_bytes(self) -> int:
        """The largest stage's sum."""
        return max(sum(terms.values()) for terms in self.stages.values())

    def beyond(self, stage: str) -> int:
        """Bytes of a stage's peak beyond the model's weights."""
        return sum(self.stages[stage].values()) - self.weight_bytes

    def max_frames(self, memory) -> int:
        """The largest number of frames such that it and every smaller number fits.

        Args:
            memory: Bytes, or a string such as `"24GB"` (10^9) or `"24GiB"` (2^30).

        Returns:
            Frames at the interval of this plan's; 0 if not even one fits.

        Raises:
            ValueError: On memory that cannot be read.
        """
        return self._planner.max_frames(parse_memory(memory))

    def to_dict(self) -> dict:
        """All of it, ready for JSON, with `peak_bytes`."""
        facts = asdict(replace(self, _planner=None))
        del facts["_planner"]
        return {**facts, "peak_bytes": self.peak_bytes}

    def __str__(self) -> str:
        rows = [("frames (groups)", f"{self.frames:,} ({self.groups:,})"), ("tokens", f"{self.total_tokens:,}")]
        parts = {"visual": self.visual_tokens, "timestamps": self.timestamp_tokens, "text": self.text_tokens}
        rows += [(f"  {name}", f"{count:,}") for name, count in parts.items()]
        rows += [("key-values", _readable(self.kv_bytes))]
        if self.mixed_tokens is not None:
            rows += [(f"  mixed, {self.mixed_tokens:,} tokens", _readable(self.mixed_kv_bytes))]
            rows += [("  pooled", _readable(self.pooled_kv_bytes))]
        for stage, terms in self.stages.items():
            rows += [(f"peak, {stage}", _readable(sum(terms.values())))]
            rows += [(f"  {name}", _readable(size)) for name, size in terms.items() if size]
        if self.memory_bytes is not None:
            rows += [(f"frames that fit {_readable(self.memory_bytes)}", f"{self.max_frames_in_memory:,}")]
        left, right = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in rows)


class VideoXLPlanningMixin:
    """`plan` for a `VideoXLForConditionalGeneration`."""

    def plan(
        self,
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
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
        if sample_fps is not None and not sample_fps > 0:
            raise ValueError(f"sample_fps must be frames per second above 0, or None, got {sample_fps!r}")
        memory = None if memory is None else parse_memory(memory)
        step, times = 1 / (sample_fps or 1), None
        if video_path is not None:
            sampling = {"max_num_frames": max_num_frames, "sample_fps": sample_fps, "max_sample_fps": max_sample_fps}
            with open_video(video_path, size=self.config.vision_config.image_size, **sampling) as reader:
                times = list(reader.timestamps)
            step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else step
        planner = _Planner(self, tokenizer, step, question_tokens, max_new_tokens)
        plan = planner.plan(num_frames or len(times), times)
        if memory is not None:
            plan = replace(plan, memory_bytes=memory, max_frames_in_memory=planner.max_frames(memory))
        return plan


class _Planner:
    """The formulas, with every size that they read."""

    def __init__(self, model, tokenizer, step, question_tokens, max_new_tokens):
        config, text, vision = model.config, model.config.text_config, model.config.vision_config
        self.settings, self.compressor, self.vision = (
            config.resolve_sparse_attention(),
            config.compressor_config,
            vision,
        )
        self.policy = replace(ReloadPolicy.parse(self.settings.reload), mass=None)
        self.step, self.question, self.answer = step, question_tokens, max_new_tokens
        self.frames_per_group, self.visual = config.frames_per_group, self.compressor.tokens_per_group
        self.batch_frames = config.resolve_vision_chunk_frames()
        self.batch = self.batch_frames // self.frames_per_group
        weights = model.get_input_embeddings().weight
        self.e, self.device, self.on_cpu = weights.element_size(), weights.device.type, weights.device.type == "cpu"
        self.layers, self.h, self.mlp = text.num_hidden_layers, text.hidden_size, text.intermediate_size
        self.heads, self.kv_heads, self.vocabulary = (
            text.num_attention_heads,
            text.num_key_value_heads,
            text.vocab_size,
        )
        self.head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.per_layer = 2 * self.kv_heads * self.head_size * self.e  # keys and values of a token in one layer
        self.per_token = self.per_layer * self.layers
        self.weight_bytes = model.get_memory_footprint()
        processor = None if tokenizer is None else VideoXLProcessor.from_config(config, tokenizer)
        if processor is not None:
            question = [{"role": "user", "content": [{"type": "video", "video": ""}]}]
            self.header = len(processor.prompt_pieces(processor.render(question))[0])
            self.count = lambda seconds: len(processor.time_token_ids(seconds))
        else:
            self.header, format_ = HEADER_TOKENS, config.time_format or ""
            self.count = lambda seconds: len(re.sub(r"^\w+", "x", format_.format(seconds=float(seconds))))
        self.counted_by = "time_format" if processor is None else "tokenizer"
        self._stamps = []

    def stamps_until(self, groups) -> np.ndarray:
        """[groups] tokens of the timestamps of groups that are `step` apart."""
        for group in range(len(self._stamps), groups):
            self._stamps.append(self.count(group * self.frames_per_group * self.step))
        return np.array(self._stamps[:groups], dtype=np.int64)

    def plan(self, frames, times=None) -> VideoPlan:
        groups = -(-frames // self.frames_per_group)
        stamps = self.stamps_until(groups) if times is None else None
        if stamps is None:
            stamps = np.array([self.count(seconds) for seconds in times[:: self.frames_per_group]], dtype=np.int64)
        ends = self.header + np.cumsum(stamps + self.visual)  # [G] tokens up to the end of each group
        total = int(ends[-1])
        mixed = pooled = None
        if self.settings.decode == "bilevel":
            mixed = self._mixed_tokens(stamps)
            pooled = groups * (self.visual // self.settings.pool_size)
        capacity = self._capacity(ends, groups)[0]
        stages = {"vision": [], "prefill": []}
        # The last full batch is the worst of the full ones, as what it sees grows; a last, partial one may lie behind.
        for last in sorted({groups // self.batch * self.batch, groups} - {0}):
            first = (last - 1) // self.batch * self.batch
            in_batch = min(frames - first * self.frames_per_group, self.batch_frames)
            pixels = self._pixels(frames, in_batch)
            before, room = self._end(ends, first), self._capacity(ends, first)[0]
            stages["vision"].append(self._cached(before, room) | pixels | self._vision(in_batch))
            held, (room, grown_from, _) = self._end(ends, last), self._capacity(ends, last)
            moved = grown_from if grown_from is not None and grown_from >= before else 0
            stages["prefill"].append(
                self._cached(held, room) | pixels | self._prefill(ends, stamps, first, last, moved)
            )
        stages["question"], stages["decode"] = self._answering(total, capacity, mixed, pooled, int(stamps.sum()))
        stages = {name: _largest(*found) for name, found in stages.items()}
        return VideoPlan(
            frames,
            groups,
            groups * self.visual,
            int(stamps.sum()),
            self.header,
            total,
            self.counted_by,
            self.question,
            self.answer,
            total * self.per_token,
            mixed,
            None if mixed is None else mixed * self.per_token,
            None if pooled is None else pooled * self.per_token,
            self.weight_bytes,
            stages,
            self.device,
            _planner=self,
        )

    def max_frames(self, memory) -> int:
        def fits(frames):
            return all(self.plan(length).peak_bytes <= memory for length in self._worst_until(frames))

        low, high = 0, self.batch_frames
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _worst_until(self, frames) -> set[int]:
        """Lengths up to `frames` one of which needs the most: it, and those behind which less is needed (see above)."""
        groups = -(-frames // self.frames_per_group)
        ends = self.header + np.cumsum(self.stamps_until(groups) + self.visual)
        # The fullest buffer before the last growth; and the last whole chunk of decoding, dense as long as it is last.
        full = int(np.searchsorted(ends, self._capacity(ends, groups)[2], side="right"))
        whole = groups // self.settings.decode_chunk_groups * self.settings.decode_chunk_groups
        return {min(count * self.frames_per_group, frames) for count in (groups, full, whole) if count}

    def _end(self, ends, groups) -> int:
        return int(ends[groups - 1]) if groups else self.header

    def _capacity(self, ends, groups) -> tuple[int, int | None, int]:
        """Tokens that a layer's buffers have room for behind `groups` groups, as `VideoXLCacheLayer` grows them.

        Returns:
            The room, the tokens held when it last grew (None: never), and the room before that.
        """
        room, grown_from, earlier = _room(self.header), None, 0
        while room < self._end(ends, groups):
            first = int(np.searchsorted(ends, room, side="right")) // self.batch * self.batch
            stop = min(first + self.batch, groups)
            grown_from = self._end(ends, first)
            for rows in self._segments(ends, first, stop):
                if grown_from + rows > room:
                    break
                grown_from += rows
            room, earlier = max(_room(grown_from + rows), self._end(ends, stop)), room
        return room, grown_from, earlier

    def _steps(self, ends, first, last) -> list[tuple[int, int, int]]:
        """Attention steps of groups [first, last), as `plan_prefill` makes them: (group, first token, last token)."""
        size = self.settings.chunk_groups
        begins = [first]
        if self.settings.prefill != "full":
            begins += range((first // size + 1) * size, last, size)
        steps = []
        for begin, end in zip(begins, [*begins[1:], last], strict=True):
            stop = self._end(ends, end)
            steps += [
                (begin, token, min(token + MAX_STEP_QUERIES, stop))
                for token in range(self._end(ends, begin), stop, MAX_STEP_QUERIES)
            ]
        return steps

    def _segments(self, ends, first, last) -> list[int]:
        """Tokens of each run through the language model over groups [first, last)."""
        segments = [0]
        for _, start, stop in self._steps(ends, first, last):
            if segments[-1] and segments[-1] + stop - start > SEGMENT_TOKENS:
                segments.append(0)
            segments[-1] += stop - start
        return segments

    def _cached(self, held, room) -> dict[str, int]:
        spare = 0 if self.on_cpu else (room - held) * self.per_token
        return {"weights": self.weight_bytes, "key-values": held * self.per_token, "spare room": spare}

    def _pixels(self, frames, in_batch) -> dict[str, int]:
        # float32 pixels of the batch live until its prefill is done; uint8 frames are host memory.
        frame = 3 * self.vision.image_size**2
        queued = min(FRAME_BATCHES * self.batch_frames, frames) * frame if self.on_cpu else 0
        return {"pixels": 4 * in_batch * frame, "decoded frames": queued}

    def _vision(self, frames) -> dict[str, int]:
        """Tower, compressor and projector over one batch of frames, whichever needs most."""
        e, c, vision = self.e, self.compressor, self.vision
        whole = -(-frames // self.frames_per_group) * self.frames_per_group
        features = frames * (vision.image_size // vision.patch_size) ** 2 * vision.hidden_size * e
        cast = {"cast pixels": 0 if e == 4 else frames * 3 * vision.image_size**2 * e}
        # Embeddings, a layer's input, and in the MLP: residual and normed states, both sides of the activation; in
        # attention: normed states, queries, keys, values, output and its projection.
        widened = features * vision.intermediate_size // vision.hidden_size
        tower = {"tower's states": 4 * features, "tower's MLP": 2 * widened}
        attention = {"tower's states": 8 * features}
        cells = whole * c.grid_size**2  # F S^2
        values = cells * c.hidden_size
        # Temporal attention in its projection: resized grid, input, cells, queries-keys-values (3), attended, the same
        # in the convolution's order, output: 9 e; float32 queries and keys: 8; on a CPU oneDNN's own order: e.
        temporal = {"tower's features": features, "temporal attention": values * (9 * e + 8 + e * self.on_cpu)}
        # Spatial attention: resized grid, input, normed, queries, keys, values, attended: 7 e. Logits and their
        # softmax in float32, and in half precision its cast: 8 or 10 bytes for each pair of a frame's cells.
        pairs = cells * c.grid_size**2 * (8 if e == 4 else 10)
        spatial = {"tower's features": features, "spatial attention": values * 7 * e, "its logits": pairs}
        # Convolution: resized grid, input, output of half the size; padded by 1 and k - 1, twice (reordered, or
        # float32 before the cast); kernels reordered.
        time, side, k = self.frames_per_group, c.grid_size, c.kernel_size
        padded = values * (time + 1) * (side + k - 1) ** 2 // (time * side**2) * (2 * e if e == 4 else 4 + e)
        kernels = k**3 * c.hidden_size**2 * e
        convolution = {"tower's features": features, "convolution": values * 5 * e // 2 + padded + kernels}
        # Projector: its input, and both sides of the activation.
        groups = whole // self.frames_per_group
        projector = {"tower's features": features, "projector": groups * side**2 * (c.hidden_size + 2 * self.h) * e}
        return cast | _largest(tower, attention, temporal, spatial, convolution, projector)

    def _prefill(self, ends, stamps, first, last, moved) -> dict[str, int]:
        """The language model over groups [first, last); `moved` tokens were in a layer that grows meanwhile."""
        settings, found = self.settings, []
        tokens = self._end(ends, last) - self._end(ends, first) + (last - first) * self.visual
        for group, start, stop in self._steps(ends, first, last):
            rows, keys, gathered, wide = stop - start, stop, 0, 0
            if settings.prefill != "full":
                chunk = group // settings.chunk_groups * settings.chunk_groups
                window = max(chunk - settings.window_chunks * settings.chunk_groups, 0)
                if window:
                    keys = gathered = self.header + int(stamps[:window].sum()) + stop - self._end(ends, window)
                    wide = int(stamps[group : chunk + settings.chunk_groups].sum()) * (settings.prefill == "mask")
            found.append((rows, keys, gathered, min(wide, rows), stop))
        return _largest(*(self._pass(max(self._segments(ends, first, last)), tokens, *step, moved) for step in found))

    def _pass(self, n, inputs, rows, keys, gathered=0, wide=0, past=0, moved=0) -> dict[str, int]:
        """n tokens through one layer, whichever part needs most, beside `inputs` embeddings."""
        states, queries = n * self.h * self.e, n * self.heads * self.head_size * self.e
        always = {"embeddings": inputs * self.h * self.e, "rotary tables": 2 * n * self.head_size * self.e}
        # The layer's input, residual and normed states; activated gate, the other half, their product.
        mlp = {"hidden states": 3 * states, "MLP": 3 * n * self.mlp * self.e}
        # Query, finished outputs and on a CPU, under a mask, the step's queries folded. Every key of a mask is a bool
        # for all heads, then one for every query head of a key head, then a float.
        folded = queries * rows // n if self.on_cpu else 0
        per_key = 1 + self.heads // self.kv_heads * (1 + self.e)
        attention = {
            "hidden states": 2 * states,
            "queries and outputs": 2 * queries + folded,
            "gathered keys and values": gathered * self.per_layer,
            "attention mask": max(rows * keys * self.on_cpu * (rows > 1), wide * past) * per_key,
        }
        # Query, the steps' outputs, those in one piece, those token by token; so many during rotation, too.
        joined = {"hidden states": 2 * states, "queries and outputs": 4 * queries}
        # While a layer moves into a larger buffer, the old one is still there.
        growing = {"hidden states": 2 * states, "queries and outputs": queries + n * self.per_layer}
        growing["layer that grows"] = moved * self.per_layer
        return always | _largest(mlp, attention, joined, growing)

    def _mixed_tokens(self, stamps) -> int:
        """Tokens of the mixed cache. Which chunks are chosen does not change it: only the last one may be shorter."""
        size, visual = self.settings.decode_chunk_groups, self.visual
        starts = range(0, len(stamps), size)
        groups = [min(size, len(stamps) - start) for start in starts]
        cost = ChunkCost(
            text=self.header,
            timestamps=tuple(int(stamps[start : start + size].sum()) for start in starts),
            dense=tuple(count * visual for count in groups),
            pooled=tuple(count * (visual // self.settings.pool_size) for count in groups),
            bytes_per_token=self.per_token,
        )
        scores = [1.0] * len(groups) if self._scores(len(groups)) else None
        return choose_levels(self.policy, scores, cost, [0] * len(groups)).tokens

    def _scores(self, chunks) -> bool:
        return chunks > 2 and self.policy.method in ("probe", "mean_key")

    def _answering(self, total, room, mixed, pooled, stamps) -> tuple[list, list]:
        """Candidates for the peaks of the question's run and of decoding."""
        asked = total + self.question
        row = {"ids and masks": 24 * (asked + self.answer), "logits": self.vocabulary * (self.e + 4)}
        always = self._cached(total, room) | row
        if mixed is None:
            # The question runs in the spare room behind the video; without enough of it every layer is copied.
            copy, kept = (_room(asked), asked) if asked > room else (0, 0)
            added = {"copy of the key-values": self._paid(kept, copy), "new key-values": self._written(asked - total)}
            question = always | added | self._pass(self.question, self.question, self.question, asked)
            held = asked + self.answer
            if held > (copy or room):
                copy, kept = _room((copy or room) + 1), held
            added = {"copy of the key-values": self._paid(kept, copy), "new key-values": self._written(held - total)}
            return [question], [always | added]
        # Bi-level: the pooled keys stay with the video. While the mixed cache is made, the one in which everything is
        # pooled, which the scorer has run over, is still there; then the question's first token copies each layer.
        kept = always | {"pooled key-values": pooled * self.per_token}
        probed = self.header + stamps + pooled + self.question
        probe = self._paid(probed, _room(probed)) if self._scores(-(-total // max(self.visual, 1))) else 0
        d, k = self.head_size, self.kv_heads
        # Rotation of m keys: as they are and in float32, four halves of products or the result, angles in float64.
        rotation = d * ((self.e if self.e == 4 else self.e + 4) * k + 8 * k + 8)
        mixing = {"probed cache": probe, "mixed cache": mixed * self.per_token}
        mixing["rotation"] = min(max(pooled, mixed - pooled), max(pooled, ROTATED_AT_ONCE)) * rotation
        asked = mixed + self.question
        running = {"mixed cache": self._paid(asked, _room(asked))}
        running |= self._pass(self.question, self.question, self.question, asked, moved=mixed)
        held, room = asked + self.answer, _room(asked)
        room = room if held <= room else _room(room + 1)
        return [kept | mixing, kept | running], [kept | {"mixed cache": self._paid(held, room)}]

    def _paid(self, held, room) -> int:
        return (held if self.on_cpu else room) * self.per_token

    def _written(self, tokens) -> int:
        return tokens * self.per_token if self.on_cpu else 0


def _room(tokens) -> int:
    """Tokens that a buffer has room for when it grows to hold `tokens`."""
    return tokens + max(int(GROWTH * tokens), MIN_SPARE_TOKENS)


def _largest(*candidates) -> dict[str, int]:
    return max(candidates, key=lambda terms: sum(terms.values()))


def parse_memory(memory) -> int:
    """Bytes of `memory`: a number, or a string such as `"24GB"` (10^9) or `"24GiB"` (2^30)."""
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*", memory, re.IGNORECASE)
        if match:
            return int(float(match[1]) * (1024 if match[3] else 1000) ** _POWERS[match[2].upper()])
    elif isinstance(memory, int | float) and not isinstance(memory, bool) and 0 < memory < float("inf"):
        return int(memory)
    raise ValueError(f'memory must be bytes above 0 or a string such as "24GB" or "24GiB", got {memory!r}')


def _readable(size) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size} B"
