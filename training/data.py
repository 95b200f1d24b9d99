"""Training data: mixtures in the published format or of messages, clips generated on the fly, label masking.

What is surprising:
* Nothing is replaced and nothing is cut. A sample that cannot be used (missing file, malformed conversation, longer
  than `max_length`) comes out of the dataset as a `BrokenSample`; see `batches.py` for what becomes of it.
* How a conversation becomes a sample with masked labels stands in `collator.py`.
* A folder of frames is read in the order of the numbers at the ends of their names, as `chat` reads it.
* An image is cut in tiles and has no timestamp, as in the published code; see the processor.
* Everything random is drawn from (seed, entry, index), never from a worker's state, so a resumed run sees the same
  samples.

L sequence, F frames, T tiles, S image side.
"""

import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch.utils.data import Dataset
from videoxl import open_video
from videoxl.shell.records import json_lines, read_json
from videoxl.training.collator import SOURCES, conversation_of, encode_messages, visual_items
from videoxl.training.features import identity_of
from videoxl.video_world import grounding_moments, grounding_question, make_clip

MEDIA_MARKER = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}

_ENTRY_KEYS = {"json_path", "sampling_strategy", "source", "root", "sample_fps", "grounding"}
_WORLD_ENTRY_KEYS = {"world", "source"}
_WORLD_KEYS = {"split", "size", "first_seed", "clip", "sample_fps", "time_offset_max", "grounding"}
_VIDEO_KEYS = {"max_num_frames", "sample_fps", "max_sample_fps"}


@dataclass(frozen=True)
class BrokenSample:
    """A sample that cannot be used: where it comes from, its name and why."""

    source: str
    name: str
    reason: str


class UnusableSample(ValueError):
    """Why a sample that could be read cannot be trained."""


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
        media = [{"type": "image" if "image" in record else "video"} for _ in range(num_media)]
        content = [*media, {"type": "text", "text": text}] if number == 0 else text
        messages.append({"role": ROLES[turn["from"]], "content": content})
        if number % 2 == 0:
            types.append(turn.get("type") or "")
    return messages, types


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
        behind_videos: Whether answers must stand behind the last video, where alone some members have outputs.
        features: A `FeatureCache` of the model's frozen tower; None reads every video anew.

    Raises:
        ValueError: On a malformed mixture or file.
        FileNotFoundError: If a JSON file is missing.
    """

    def __init__(
        self, mixture, processor, seed=0, max_length=None, video=None, position_stretch=0, answers=True,
        behind_videos=False, features=None,
    ):  # fmt: skip
        self.processor = processor
        self.behind_videos, self.features = behind_videos, features
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
        try:
            sample = self._cached(samples, inner) or self._read(samples, inner)
            self._require_usable(sample)
        except UnusableSample as error:
            return BrokenSample(source, name, str(error))
        except Exception as error:  # decoders raise what they like; the reason is reported by name
            if isinstance(samples, _WorldSamples):
                raise  # a bug of the world, not a broken file
            return BrokenSample(source, name, f"{type(error).__name__}: {error}")
        sample["answers"] = [(start, stop, kind or source) for start, stop, kind in sample["answers"]]
        if self.position_stretch:
            rng = np.random.default_rng([self.seed, index])
            sample["position_ids"] = stretch_positions(sample["input_ids"], self.processor, self.position_stretch, rng)
        return sample | {"source": source, "name": name}

    def _read(self, samples, inner):
        messages, types = samples.load(inner, self._open_scaled, self.answers)
        if not self.answers:
            items = [item for message in messages for item in visual_items(message)]
            if not items:
                raise ValueError("the sample has neither a video nor an image")
            messages, types = [{"role": "user", "content": items}], []
        sample = encode_messages(self.processor, messages, **self.video)
        spans = sample.pop("spans")
        return sample | {"answers": [(*span, kind) for span, kind in zip(spans, types, strict=True)]}

    def _cached(self, samples, inner):
        """A sample whose videos come as features, or with keys under which these are to be kept; None without."""
        if self.features is None:
            return None
        identities, record = samples.identities(inner)
        if identities is None:
            return None
        keys = [self.features.key(identity) for identity in identities]
        own = self.features.key([record, keys])
        if sample := self.features.load_sample(own):
            return sample
        sample = self._read(samples, inner)
        self.features.save_sample(own, sample, keys)
        return sample | {"keys": keys}

    def _require_usable(self, sample):
        count = len(sample["input_ids"])
        if self.max_length is not None and count > self.max_length:
            raise UnusableSample(f"{count} tokens, max_length is {self.max_length}")
        places = (sample["input_ids"] == self.processor.video_token_id).nonzero().flatten()
        if self.behind_videos and len(places) and any(start <= places[-1] for start, *_ in sample["answers"]):
            raise UnusableSample(
                "an answer stands in front of a video, and this model (with beacon memory or a token selector) has "
                "outputs behind the last video only: make two samples of it"
            )

    def _open_scaled(self, path, scale):
        """Frames of a file with scaled timestamps, as a video item."""
        sampling = self.processor.sampling(**self.video)
        batches = list(open_video(path, sampling=sampling, **self.processor.frame_options))
        frames = torch.cat([batch.frames for batch in batches]).permute(0, 2, 3, 1)
        return {"video": frames, "timestamps": [scale * time for batch in batches for time in batch.timestamps]}


class _JsonSamples:
    """Samples of one JSON file, each in the published schema or with `messages`."""

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
        self.grounding = entry.get("grounding", "charades")

    def __len__(self):
        return len(self.records)

    def sample_name(self, index):
        record = self.records[index]
        known = record if isinstance(record, dict) else {}
        media = known.get("video") or known.get("image") or ""
        shown = ", ".join(map(str, media)) if isinstance(media, list) else str(media)
        return f"{known.get('id', index)} {shown:.200}".strip()

    def load(self, index, open_scaled, answers):
        """Messages with their media, and per answer the type of its question.

        Args:
            index: Of the sample.
            open_scaled: (path, factor) -> a video item of a file with its times multiplied.
            answers: False for the media alone.
        """
        record = self.records[index]
        if isinstance(record, dict):
            record = {key: value for key, value in record.items() if value is not None}
        if isinstance(record, dict) and "query" in record:
            question = grounding_question(record["query"], record.get("spans", [record.get("span")]), self.grounding)
            item, text = self._read_item({"type": "video", "video": record.get("video")}), {"type": "text"}
            user = {"role": "user", "content": [item, text | {"text": question.text}]}
            return [user, {"role": "assistant", "content": question.answer}], [question.type]
        if isinstance(record, dict) and "conversations" in record and {"videos", "images"} & set(record):
            record = dict(record)
            record["messages"] = _renamed_turns(record.pop("conversations"))
        if not isinstance(record, dict) or ("messages" in record) == bool({"conversations", *SOURCES} & set(record)):
            raise ValueError("a sample is a dict with messages, or with conversations and its image or video")
        if "messages" in record:
            return conversation_of(record, self._read_item, answers)
        media = self._published_media(record, open_scaled)
        if not answers:
            return [{"role": "user", "content": media}], []
        messages, types = read_conversation(record, len(media))
        for item, found in zip([item for message in messages for item in visual_items(message)], media, strict=True):
            item.update(found)
        return messages, types

    def identities(self, index):
        """What tells the sample's videos from others, and the sample; (None, None) if it cannot be kept on disk."""
        messages, _ = self.load(index, lambda path, scale: {"video": path, "scale": scale}, False)
        items = [item for message in messages for item in visual_items(message)]
        if not items or any(item["type"] == "image" for item in items):
            return None, None
        return [identity_of(item) for item in items], self.records[index]

    def _published_media(self, record, open_scaled) -> list[dict]:
        given = {kind: record[kind] for kind in SOURCES if kind in record}
        if len(given) > 1:
            raise ValueError("a sample with conversations has at most one of image and video; use messages for both")
        scale, media = float(record.get("scale", 1.0)), []
        for kind, sources in given.items():
            frames = kind == "video" and isinstance(sources, list) and _are_pictures(sources)
            for source in [sources] if frames or not isinstance(sources, list) else sources:
                item = self._read_item({"type": kind, kind: source})
                if "timestamps" in item:
                    item["timestamps"] = [scale * time for time in item["timestamps"]]
                elif kind == "video" and scale != 1.0:
                    item = {"type": kind, **open_scaled(item[kind], scale)}
                media.append(item)
        return media

    def _read_item(self, item: dict) -> dict:
        """An item with its paths counted from the root, and the frames of a folder or list with their times."""
        kind = item["type"]
        given = {key: value for key, value in item.items() if value is not None}
        for key in SOURCES[kind]:
            source = given.get(key)
            if isinstance(source, str) and "://" not in source and not source.startswith("data:"):
                source = given[key] = str(self.root / source)
                if kind == "video" and os.path.isdir(source):
                    source = _numbered_pictures(source)
            if kind == "video" and isinstance(source, list):
                if not _are_pictures(source):
                    raise ValueError(
                        f"a list as one video holds frame files ({', '.join(sorted(IMAGE_SUFFIXES))}), got "
                        f"{source!r:.200}; several videos are items of their own"
                    )
                given[key] = [Image.open(self.root / file) for file in source]
                if "timestamps" not in given and "fps" not in given:
                    given["timestamps"] = [number / self.sample_fps for number in range(len(source))]
        return given


def _renamed_turns(turns) -> list[dict]:
    """Turns `{"from", "value"}` as messages `{"role", "content"}`."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and turn.get("from") in ROLES for turn in turns):
        raise ValueError("conversations must be a list of {'from': 'human' or 'gpt', 'value': text}")
    return [{"role": ROLES[turn["from"]], "content": turn.get("value")} for turn in turns]


def _are_pictures(sources) -> bool:
    """Whether a list holds frame files; a list of videos holds none."""
    return bool(sources) and all(
        isinstance(source, str) and Path(source).suffix.lower() in IMAGE_SUFFIXES for source in sources
    )


def _numbered_pictures(folder: str) -> list[str]:
    """The paths of a folder's pictures, in the order of the numbers at the ends of their names."""
    files = [file for file in Path(folder).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and file.name[0] != "."]
    if not files:
        raise ValueError(f"{folder}: the folder has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    numbers = {file: re.search(r"(\d+)$", file.stem) for file in files}
    if without := sorted(file.name for file in files if numbers[file] is None):
        raise ValueError(
            f"{folder}: the names of frames end in their number, such as frame_1.jpg; {without[0]} has none. Rename "
            "them, or give the frames as a list of files in their order"
        )
    return [str(file) for file in sorted(files, key=lambda file: (int(numbers[file][1]), file.name))]


class _WorldSamples:
    """Clips of the procedural video world, made when they are asked for."""

    name = "world"

    def __init__(self, world, seed):
        self.size = int(world["size"])
        self.split = world.get("split", "train")
        self.first_seed = int(world.get("first_seed", 0))
        self.clip = world.get("clip") or {}
        self.grounding = world.get("grounding")  # a prompt: when is something, instead of the clip's questions
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

    def identities(self, index):
        told = [
            self.split,
            self.first_seed + index,
            self.clip,
            self.grounding,
            self.rates,
            self.time_offset_max,
            self.seed,
            index,
        ]
        return [told], told

    def load(self, index, open_scaled=None, answers=True):
        rng = random.Random(f"{self.seed}-{index}")
        rate = rng.choice(self.rates)
        # Whole seconds, so that answers about time stay short.
        start = {"start": float(rng.randint(0, self.time_offset_max))} if self.time_offset_max else {}
        clip = make_clip(self.first_seed + index, split=self.split, **self.clip, **start)
        first = start.get("start", float(self.clip.get("start", 0)))
        times = [first + number / rate for number in range(max(int(clip.seconds * rate), 1))]
        video, messages = {"type": "video", "video": clip.frames(times), "timestamps": times}, []
        for number, question in enumerate(self._questions(clip)):
            text = {"type": "text", "text": question.text}
            messages.append({"role": "user", "content": [video, text] if number == 0 else question.text})
            messages.append({"role": "assistant", "content": question.answer})
        return messages, [question.type for question in self._questions(clip)]

    def _questions(self, clip):
        if self.grounding is None:
            return clip.questions
        return [grounding_question(moment.query, moment.spans, self.grounding) for moment in grounding_moments(clip)]
