"""`plan`: what a video will cost before it is decoded: tokens, key-value bytes, peak memory by stage, frames that fit.

What is surprising:
* Tokens and key-value bytes are exact: they equal what `encode_video` makes. Peaks count the tensors that live at once
  (`planning_memory_videoxl`).
* More frames can need less: behind a buffer that has just grown, a question finds the room that it lacked one group
  earlier. `max_frames` is the length up to which *every* length fits, so it is monotone.

G groups of frames.
"""

import re
from bisect import bisect_left
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from .cache_layers_videoxl import MIN_SPARE_TOKENS
from .frame_sampling_videoxl import FrameSampler, Sampling
from .messages_videoxl import is_image
from .planning_dropping_videoxl import dropping_stages
from .planning_families_videoxl import compressed_stages
from .planning_memory_videoxl import MemoryFormulas, largest
from .processing_videoxl import VideoXLProcessor
from .selection_videoxl import POOLED, ChunkCost, Levels, ReloadPolicy, choose_levels
from .video_processing_videoxl import open_video

# Tokens in front of a video where no tokenizer is given: the default prompt's header under Qwen2's tokenizer.
HEADER_TOKENS = 14
# Decimal and binary units of memory, as powers.
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
        stages: Per stage the named terms of its peak, weights and key-values among them.
        device: Where the model is; the terms depend on it.
        memory_bytes, max_frames_in_memory: The given memory, and how many frames fit it.
        context_limit: Tokens that the model takes, question included; None where nothing limits it. More are an error.
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
        if self.context_limit is not None:
            rows += [("  at most, with the question", f"{self.context_limit:,}")]
        rows += [("key-values", _readable(self.kv_bytes))]
        if self.mixed_tokens is not None:
            rows += [(f"  mixed, {self.mixed_tokens:,} tokens", _readable(self.mixed_kv_bytes))]
        if self.pooled_kv_bytes is not None:
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
        if is_image(video_path):
            raise ValueError(
                "plan counts the frames of videos, and this is an image: it takes tokens_per_group a tile"
            )
        if video_path is not None:
            rule = FrameSampler.of(self.config.frames_config)
            sampling = Sampling(max_num_frames, sample_fps, max_sample_fps, rule)
            with open_video(video_path, size=self.config.vision_config.image_size, sampling=sampling) as reader:
                times = list(reader.timestamps)
            step = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else step
        planner = _Planner(self, tokenizer, step, question_tokens, max_new_tokens)
        plan = planner.plan(num_frames or len(times), times)
        if memory is not None:
            plan = replace(plan, memory_bytes=memory, max_frames_in_memory=planner.max_frames(memory))
        return plan


class _Planner(MemoryFormulas):
    """Counts tokens, and puts the formulas together."""

    def __init__(self, model, tokenizer, step, question_tokens, max_new_tokens):
        super().__init__(model)
        self.config = model.config
        self.compressed = model.model.leaves_only_text(self.settings) and self.settings.decode == "full"
        self.policy = replace(ReloadPolicy.parse(self.settings.reload), mass=None)
        self.step, self.question_tokens, self.max_new_tokens = step, question_tokens, max_new_tokens
        if tokenizer is None:
            self.header, time_format = HEADER_TOKENS, model.config.time_format or ""
            self._count = lambda seconds: len(re.sub(r"^\w+", "x", time_format.format(seconds=float(seconds))))
        else:
            processor = VideoXLProcessor.from_config(model.config, tokenizer)
            message = {"role": "user", "content": [{"type": "video", "video": ""}]}
            self.header = len(processor.prompt_pieces(processor.render([message]))[0])
            self._count = lambda seconds: len(processor.time_token_ids(seconds))
        self.counted_by = "time_format" if tokenizer is None else "tokenizer"
        self._stamps = []

    def _stamps_until(self, groups) -> np.ndarray:
        """[G] tokens of the timestamps of groups that are `step` apart."""
        for group in range(len(self._stamps), groups):
            self._stamps.append(self._count(group * self.frames_per_group * self.step))
        return np.array(self._stamps[:groups], dtype=np.int64)

    def plan(self, frames, times=None) -> VideoPlan:
        """The plan of `frames` frames, `step` seconds apart or at `times`."""
        groups = -(-frames // self.frames_per_group)
        stamps = self._stamps_until(groups)
        if times is not None:
            stamps = np.array([self._count(seconds) for seconds in times[:: self.frames_per_group]], dtype=np.int64)
        ends = self.header + np.cumsum(stamps + self.visual)
        total = int(ends[-1])
        facts = {
            "frames": frames,
            "groups": groups,
            "visual_tokens": groups * self.visual,
            "timestamp_tokens": int(stamps.sum()),
            "text_tokens": self.header,
            "total_tokens": total,
            "counted_by": self.counted_by,
            "question_tokens": self.question_tokens,
            "max_new_tokens": self.max_new_tokens,
            "weight_bytes": self.weight_bytes,
            "device": self.device,
            "context_limit": (self.config.resolve_context_limit() or (None,))[0],
            "_planner": self,
        }
        sizes = (frames, groups, total, self.question_tokens, self.max_new_tokens)
        if self.settings.dropping is not None:
            stages, size, seen = dropping_stages(self, self.config, *sizes)
            mixed = {"mixed_tokens": seen // self.per_token, "mixed_kv_bytes": seen, "pooled_kv_bytes": None}
            return VideoPlan(**facts, **mixed, kv_bytes=size, stages=stages)
        if self.compressed:
            stages, size, seen = compressed_stages(self, self.config, *sizes)
            mixed = {"mixed_tokens": seen, "mixed_kv_bytes": seen * self.per_token, "pooled_kv_bytes": None}
            return VideoPlan(**facts, **mixed, kv_bytes=size, stages=stages)
        capacity = self.capacity(ends, groups)[0]
        stages = {"vision": [], "prefill": []}
        # The last full batch is the worst of the full ones, as what it sees grows. A partial one may lie behind it,
        # and before it the one in which the layers grew for the last time.
        grown_from = self.capacity(ends, groups)[1] or 0
        grown = (int(np.searchsorted(ends, grown_from, side="right")) // self.batch + 1) * self.batch
        for last in sorted({groups // self.batch * self.batch, groups, min(grown, groups)} - {0}):
            first = (last - 1) // self.batch * self.batch
            in_batch = min(frames - first * self.frames_per_group, self.batch_frames)
            pixels, before = self.pixels(frames, in_batch), self.end(ends, first)
            stages["vision"].append(
                self.cached(before, self.capacity(ends, first)[0]) | pixels | self.vision(in_batch)
            )
            room, grown_from, _ = self.capacity(ends, last)
            moved = grown_from if grown_from is not None and grown_from >= before else 0
            terms = self.prefill(ends, stamps, first, last, moved)
            stages["prefill"].append(self.cached(self.end(ends, last), room) | pixels | terms)
        sizes, mixed, pooled = (total, capacity, self.question_tokens, self.max_new_tokens), None, None
        if self.settings.decode == "full":
            stages["question"], stages["decode"] = self.question(*sizes)
        else:
            levels, scored = self._levels(stamps)
            mixed, everything = levels.tokens, groups * (self.visual // self.settings.pool_size)
            pooled = everything if scored or POOLED in levels.levels else 0
            probed = self.header + int(stamps.sum()) + pooled if scored else 0
            stages["question"], stages["decode"] = self.mixed_question(*sizes, mixed, pooled, probed)
        return VideoPlan(
            **facts,
            kv_bytes=total * self.per_token,
            mixed_tokens=mixed,
            mixed_kv_bytes=None if mixed is None else mixed * self.per_token,
            pooled_kv_bytes=None if pooled is None else pooled * self.per_token,
            stages={name: largest(*candidates) for name, candidates in stages.items()},
        )

    def max_frames(self, memory) -> int:
        """See `VideoPlan.max_frames`."""

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
        """Lengths up to `frames` of which one needs the most: it, and those behind which less is needed."""
        groups = -(-frames // self.frames_per_group)
        if self.compressed:
            # As below, the longest one whose answer copies the buffers.
            def has_room(count):
                return "copy of the key-values" not in self.plan(count * self.frames_per_group).stages["decode"]

            copying = bisect_left(range(1, groups + 1), True, key=has_room) * self.frames_per_group
            whole = frames // self.batch_frames * self.batch_frames
            return {length for length in (frames, whole, min(copying, frames)) if length}
        ends = self.header + np.cumsum(self._stamps_until(groups) + self.visual)
        # Buffers that are nearly full, now or before the last growth: a long answer copies them, unless hardly
        # anything fits. And whole chunks of decoding: the last one is dense while it is last.
        room, _, earlier = self.capacity(ends, groups)
        full = np.searchsorted(ends, np.array([room, earlier, earlier + MIN_SPARE_TOKENS]) - MIN_SPARE_TOKENS, "right")
        whole = groups // self.settings.decode_chunk_groups * self.settings.decode_chunk_groups
        return {min(count * self.frames_per_group, frames) for count in (groups, whole, *full.tolist()) if count}

    def _levels(self, stamps) -> tuple[Levels, bool]:
        """What bi-level decoding keeps, and whether a scorer chooses it.

        Which chunks are chosen does not change how much that is: only the last one, always dense, may be shorter.
        """
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
        scored = len(groups) > 2 and self.policy.method in ("probe", "mean_key")
        scores = [1.0] * len(groups) if scored else None
        return choose_levels(self.policy, scores, cost, [0] * len(groups)), scored


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
