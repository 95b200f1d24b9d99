"""Training data: mixtures in the published format, clips generated on the fly, label masking.

What is surprising:
* Nothing is replaced and nothing is cut. A sample that cannot be used (missing file, malformed conversation, longer
  than `max_length`) comes out of the dataset as a `BrokenSample`; see `batches.py` for what becomes of it.
* Prompts come from the processor alone, so training sees exactly the ids that `generate` sees. The published code
  differs: it writes the newline behind the video twice in training.
* An image is cut in tiles and has no timestamp, as in the published code; see the processor.
* Everything random is drawn from (seed, entry, index), never from a worker's state, so a resumed run sees the same
  samples.

L sequence, F frames, T tiles, S image side.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset
from videoxl import open_video
from videoxl.shell.records import json_lines, read_json

# What the loss leaves out (PyTorch's and transformers' convention).
IGNORE = -100

MEDIA_MARKER = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}

_ENTRY_KEYS = {"json_path", "sampling_strategy", "source", "root", "sample_fps"}
_WORLD_ENTRY_KEYS = {"world", "source"}
_WORLD_KEYS = {"split", "size", "first_seed", "clip", "sample_fps", "time_offset_max"}
_VIDEO_KEYS = {"max_num_frames", "sample_fps", "max_sample_fps"}


@dataclass(frozen=True)
class BrokenSample:
    """A sample that cannot be used: where it comes from, its name and why."""

    source: str
    name: str
    reason: str


def load_mixture(mixture: dict | list | str | Path) -> tuple[list[dict], Path]:
    """Reads a mixture.

    Args:
        mixture: Path of a YAML file, or its parsed content: `{"datasets": [...]}` or the bare list.

    Returns:
        The entries, and the folder that their relative paths count from (the file's, else the working directory).

    Raises:
        ValueError: On an unknown key or a missing one.
    """
    folder = Path.cwd()
    if isinstance(mixture, (str, Path)):
        path = Path(mixture)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such mixture; expected a YAML file with a list 'datasets'")
        folder, mixture = path.resolve().parent, yaml.safe_load(path.read_text())
    entries = mixture.get("datasets") if isinstance(mixture, dict) else mixture
    if not isinstance(entries, list) or not entries:
        raise ValueError("a mixture is {'datasets': [...]} with at least one entry")
    for number, entry in enumerate(entries):
        known = _WORLD_ENTRY_KEYS if isinstance(entry, dict) and "world" in entry else _ENTRY_KEYS
        if not isinstance(entry, dict) or not set(entry) <= known or not {"world", "json_path"} & set(entry):
            raise ValueError(
                f"entry {number} of the mixture must have json_path ({', '.join(sorted(_ENTRY_KEYS))}) or world "
                f"({', '.join(sorted(_WORLD_ENTRY_KEYS))}), got {entry!r:.200}"
            )
        if "world" in entry and not (set(entry["world"]) <= _WORLD_KEYS and {"size"} <= set(entry["world"])):
            raise ValueError(
                f"entry {number}: world needs size and takes {', '.join(sorted(_WORLD_KEYS))}, got "
                f"{', '.join(entry['world'])}"
            )
    return entries, folder


def choose_samples(count: int, strategy: str, seed: int | str) -> list[int]:
    """Applies a published sampling strategy.

    Args:
        count: Number of samples in the file.
        strategy: `all`, `first:N`, `end:N` or `random:N`; N is a number or, for any of them, a share like `10%`.
        seed: What `random` draws from.

    Returns:
        The chosen indices; for `random` in the order drawn.

    Raises:
        ValueError: On another strategy, or more samples than there are.
    """
    if strategy == "all":
        return list(range(count))
    kind, _, amount = str(strategy).partition(":")
    try:
        # The published code rounds shares up.
        wanted = -int(-float(amount[:-1]) * count // 100) if amount.endswith("%") else int(amount)
    except ValueError:
        kind, wanted = None, 0
    if kind not in ("first", "end", "random") or wanted < 0:
        raise ValueError(f"sampling_strategy must be all, first:N, end:N or random:N (N or N%), got {strategy!r}")
    if wanted > count:
        raise ValueError(f"sampling_strategy {strategy!r} asks for {wanted} of {count} samples; lower it")
    if kind == "random":
        return random.Random(seed).sample(range(count), wanted)
    return list(range(count))[:wanted] if kind == "first" else list(range(count))[count - wanted :]


def read_conversation(record: dict, num_media: int) -> tuple[list[dict], list[str]]:
    """Turns a published conversation into messages with the media in front of the first human turn.

    Args:
        record: `{"conversations": [{"from", "value"}, ...]}`; a human turn may carry a `type` (of the question).
        num_media: Videos or images of the sample.

    Returns:
        Messages (media items are bare), and per assistant turn the type of its question ("" if there is none).

    Raises:
        ValueError: If turns do not alternate, are empty, or the markers do not fit the media.
    """
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and turn.get("from") in ROLES and isinstance(turn.get("value"), str) for turn in turns
    ):
        raise ValueError("conversations must be a list of {'from': 'human' or 'gpt', 'value': text}")
    system = turns[:1] if turns and turns[0]["from"] == "system" else []
    turns = turns[len(system) :]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or [ROLES[turn["from"]] for turn in turns] != expected:
        raise ValueError("conversations must alternate human, gpt, ... and end with gpt")
    markers = [turn["value"].count(MEDIA_MARKER) for turn in turns]
    if any(markers[1:]) or markers[0] not in ({1, num_media} if num_media else {0}):
        raise ValueError(
            f"{num_media} images or videos need {MEDIA_MARKER} in the first human turn and nowhere else; it stands "
            f"{markers[0]} times there and {sum(markers[1:])} times later"
        )
    messages = [{"role": "system", "content": turn["value"]} for turn in system]
    types = []
    for number, turn in enumerate(turns):
        # As published: the marker goes to the front; the template writes the newline behind a video.
        text = turn["value"].replace(MEDIA_MARKER, "").strip()
        if not text:
            raise ValueError(f"turn {number} of the conversation is empty")
        media = [{"type": "image" if "image" in record else "video"}] * num_media
        content = [*media, {"type": "text", "text": text}] if number == 0 else text
        messages.append({"role": ROLES[turn["from"]], "content": content})
        if number % 2 == 0:
            types.append(turn.get("type", ""))
    return messages, types


def answer_spans(ids: list[int], tokenizer, messages: list[dict]) -> list[tuple[int, int]]:
    """Where the assistant's tokens stand in an expanded prompt, each answer with its `<|im_end|>`.

    Args:
        ids: Token ids of the whole conversation.
        tokenizer: The checkpoint's.
        messages: The conversation that `ids` were rendered from.

    Returns:
        (start, stop) per assistant message.

    Raises:
        ValueError: If a text holds chat markers, so that turns cannot be told apart.
    """
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    header = [begin, *tokenizer("assistant\n", add_special_tokens=False)["input_ids"]]
    total = len(messages) + (messages[0]["role"] != "system")
    if ids.count(begin) != total or ids.count(end) != total:
        raise ValueError("a text of the conversation contains <|im_start|> or <|im_end|>; remove it")
    spans, cursor = [], 0
    for message in messages:
        if message["role"] != "assistant":
            continue
        while ids[cursor : cursor + len(header)] != header:
            cursor = ids.index(begin, cursor + 1)
        start = cursor + len(header)
        cursor = ids.index(end, start) + 1
        spans.append((start, cursor))
    return spans


def mask_labels(ids: list[int], spans: list[tuple[int, int]]) -> torch.Tensor:
    """Labels [L]: the ids inside the spans, `IGNORE` elsewhere.

    Only what the model has to write carries loss: the assistant's content and its `<|im_end|>`. The published code
    also supervises `<|im_start|>`, `<|im_end|>` and the newline behind it of every turn, system and user included;
    that teaches nothing that is ever generated.
    """
    labels = torch.full((len(ids),), IGNORE)
    for start, stop in spans:
        labels[start:stop] = torch.tensor(ids[start:stop])
    return labels


def stretch_positions(input_ids: torch.Tensor, processor, limit: int, rng: np.random.Generator) -> torch.Tensor:
    """Positions with random jumps behind groups of frames, as if frames were missing there (our augmentation).

    A short video then shows the rotary positions of a long one. Groups stay whole, and the distance from the prompt's
    start to the first group stays. How much is skipped is uniform in 0 .. limit - L; how evenly it is spread over the
    groups varies from sample to sample.

    Args:
        input_ids: [L], expanded.
        processor: The checkpoint's, for the placeholder's id and `tokens_per_group`.
        limit: Positions stay below this number.
        rng: What is drawn from.

    Returns:
        [L] increasing positions; without a video or room plain 0 .. L - 1.
    """
    positions = torch.arange(len(input_ids))
    visual = (input_ids == processor.video_token_id).nonzero().flatten()
    behind = visual[processor.tokens_per_group - 1 :: processor.tokens_per_group] + 1
    room = limit - len(input_ids)
    if len(behind) == 0 or room <= 0:
        return positions
    evenness = 10 ** rng.uniform(-1.5, 0.5)
    shares = rng.gamma(evenness, size=len(behind)) + 1e-12
    jumps = rng.multinomial(int(rng.integers(0, room + 1)), shares / shares.sum())
    steps = torch.zeros(len(input_ids) + 1, dtype=torch.long)
    steps[behind] = torch.from_numpy(jumps)
    return positions + steps[:-1].cumsum(0)


class MixtureDataset(Dataset):
    """The samples of a mixture, one after the other.

    Args:
        mixture: See `load_mixture`.
        processor: The checkpoint's processor.
        seed: At least 0; of everything random: `random:N`, sampling rates, sampling offsets, positions.
        max_length: Longest sequence in tokens; longer samples are broken ones. None for no limit.
        video: `max_num_frames`, `sample_fps`, `max_sample_fps` for video files; missing ones are the processor's.
        position_stretch: See `stretch_positions`; 0 for plain positions.
        answers: False for videos alone: conversations are not read and may be missing.

    Raises:
        ValueError: On a malformed mixture or file.
        FileNotFoundError: If a JSON file is missing.
    """

    def __init__(self, mixture, processor, seed=0, max_length=None, video=None, position_stretch=0, answers=True):
        self.processor = processor
        self.seed = seed
        self.max_length = max_length
        self.video = video or {}
        self.position_stretch = position_stretch
        self.answers = answers
        if not set(self.video) <= _VIDEO_KEYS:
            raise ValueError(f"video takes {', '.join(sorted(_VIDEO_KEYS))}, got {', '.join(self.video)}")
        self.entries, folder = load_mixture(mixture)
        self._samples = [
            _WorldSamples(entry["world"], f"{seed}-{number}")
            if "world" in entry
            else _JsonSamples(entry, folder, f"{seed}-{number}")
            for number, entry in enumerate(self.entries)
        ]
        self._ends = np.cumsum([len(samples) for samples in self._samples])
        if self._ends[-1] == 0:
            raise ValueError("the mixture has no samples; check its sampling strategies and sizes")

    def __len__(self):
        return int(self._ends[-1])

    @property
    def ranges(self) -> list[range]:
        """Per entry, the indices of its samples."""
        starts = [0, *self._ends[:-1].tolist()]
        return [range(start, int(end)) for start, end in zip(starts, self._ends, strict=True)]

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the entry, and of the sample within it."""
        entry = int(np.searchsorted(self._ends, index, side="right"))
        return entry, index - (int(self._ends[entry - 1]) if entry else 0)

    def __getitem__(self, index: int) -> dict | BrokenSample:
        """One sample.

        Returns:
            `input_ids` and `labels` [L], `pixel_values_videos` (list of [F, 3, S, S] and, for images,
            [T, 1, 3, S, S]), `answers` (list of (start, stop, type)), `position_ids` [L] if positions are stretched,
            `source`, `name`; or a `BrokenSample`.
        """
        number, inner = self.locate(index)
        samples = self._samples[number]
        source, name = self.entries[number].get("source") or samples.name, samples.sample_name(inner)
        if isinstance(samples, _WorldSamples):
            # An error here is a bug of the world, not a broken file.
            messages, types, videos = samples.load(inner)
            if not self.answers:
                messages, types = _without_text(len(videos), "video")
            return self._prepare(messages, types, {"videos": videos}, source, name, index)
        try:
            kind, media = samples.media(inner, self._open_scaled)
            if self.answers:
                messages, types = samples.conversation(inner, len(media))
            else:
                messages, types = _without_text(len(media), kind)
            return self._prepare(messages, types, {f"{kind}s": media}, source, name, index)
        except Exception as error:  # decoders raise what they like; the reason is reported by name
            return BrokenSample(source, name, f"{type(error).__name__}: {error}")

    def _prepare(self, messages, types, media, source, name, index):
        text = self.processor.render(messages, add_generation_prompt=False)
        inputs = self.processor([text], **{kind: [items] for kind, items in media.items()}, **self.video)
        ids = inputs["input_ids"][0]
        if self.max_length is not None and len(ids) > self.max_length:
            return BrokenSample(source, name, f"{len(ids)} tokens, max_length is {self.max_length}")
        spans = answer_spans(ids, self.processor.tokenizer, messages)
        sample = {
            "input_ids": torch.tensor(ids),
            "labels": mask_labels(ids, spans),
            "pixel_values_videos": list(inputs.get("pixel_values_videos", ())),
            "answers": [(*span, kind or source) for span, kind in zip(spans, types, strict=True)],
            "source": source,
            "name": name,
        }
        if self.position_stretch:
            rng = np.random.default_rng([self.seed, index])
            sample["position_ids"] = stretch_positions(sample["input_ids"], self.processor, self.position_stretch, rng)
        return sample

    def _open_scaled(self, path, scale):
        """Frames of a file with scaled timestamps, as a video item."""
        sampling = self.processor.sampling(**self.video)
        batches = list(open_video(path, sampling=sampling, **self.processor.frame_options))
        frames = torch.cat([batch.frames for batch in batches]).permute(0, 2, 3, 1)
        return {"video": frames, "timestamps": [scale * time for batch in batches for time in batch.timestamps]}


def _without_text(count, kind):
    if not count:
        raise ValueError("the sample has neither a video nor an image")
    return [{"role": "user", "content": [{"type": kind}] * count}], []


class _JsonSamples:
    """Samples of one JSON file in the published schema."""

    def __init__(self, entry, folder, seed):
        path = folder / entry["json_path"]
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; json_path is relative to the mixture's folder")
        lines = path.suffix == ".jsonl"
        records = [record for _, record in json_lines(path)] if lines else read_json(path)
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a list of samples, got {type(records).__name__}")
        chosen = choose_samples(len(records), entry.get("sampling_strategy", "all"), seed)
        self.name = path.stem
        self.records = [records[index] for index in chosen]
        self.root = folder / entry["root"] if entry.get("root") else path.parent
        self.sample_fps = entry.get("sample_fps", 1)

    def __len__(self):
        return len(self.records)

    def sample_name(self, index):
        record = self.records[index]
        known = record if isinstance(record, dict) else {}
        media = known.get("video") or known.get("image") or ""
        return f"{known.get('id', index)} {media if isinstance(media, str) else ', '.join(map(str, media))}".strip()

    def media(self, index, open_scaled):
        """What the sample shows: `"video"` or `"image"`, and a list of items."""
        record = self.records[index]
        if not isinstance(record, dict) or ("image" in record and "video" in record):
            raise ValueError("a sample is a dict with conversations and at most one of image and video")
        scale = float(record.get("scale", 1.0))
        if "image" in record:
            images = record["image"] if isinstance(record["image"], list) else [record["image"]]
            return "image", [str(self.root / image) for image in images]
        videos = []
        if "video" in record:
            path = self.root / record["video"]
            if path.is_dir():
                frames = [Image.open(file) for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
                if not frames:
                    raise ValueError(f"{path}: the folder has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
                times = [scale * number / self.sample_fps for number in range(len(frames))]
                videos = [{"video": frames, "timestamps": times}]
            elif scale != 1.0:
                videos = [open_scaled(str(path), scale)]
            else:
                videos = [{"video": str(path)}]
        return "video", videos

    def conversation(self, index, num_media):
        return read_conversation(self.records[index], num_media)


class _WorldSamples:
    """Clips of the procedural video world, made when they are asked for."""

    name = "world"

    def __init__(self, world, seed):
        self.size = int(world["size"])
        self.split = world.get("split", "train")
        self.first_seed = int(world.get("first_seed", 0))
        self.clip = world.get("clip") or {}
        rates = world.get("sample_fps", 1)
        self.rates = [float(rate) for rate in (rates if isinstance(rates, list) else [rates])]
        # The clip's first second is drawn from 0 .. this, so that timestamps do not always begin at 0.
        self.time_offset_max = int(world.get("time_offset_max", 0))
        self.seed = seed
        if not self.rates or min(self.rates) <= 0 or self.time_offset_max < 0:
            raise ValueError("world needs sample_fps above 0 and time_offset_max of at least 0 seconds")

    def __len__(self):
        return self.size

    def sample_name(self, index):
        return f"{self.split}:{self.first_seed + index}"

    def load(self, index):
        from videoxl.video_world import make_clip

        rng = random.Random(f"{self.seed}-{index}")
        rate = rng.choice(self.rates)
        # Whole seconds, so that answers about time stay short.
        start = {"start": float(rng.randint(0, self.time_offset_max))} if self.time_offset_max else {}
        clip = make_clip(self.first_seed + index, split=self.split, **self.clip, **start)
        first = start.get("start", float(self.clip.get("start", 0)))
        times = [first + number / rate for number in range(max(int(clip.seconds * rate), 1))]
        messages = []
        for number, question in enumerate(clip.questions):
            text = {"type": "text", "text": question.text}
            messages.append({"role": "user", "content": [{"type": "video"}, text] if number == 0 else question.text})
            messages.append({"role": "assistant", "content": question.answer})
        types = [question.type for question in clip.questions]
        return messages, types, [{"video": clip.frames(times), "timestamps": times}]
