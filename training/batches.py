"""Batches of training samples, and their order.

What is surprising:
* Batches are padded on the right and have no attention mask: attention is causal and padding has no label, so nothing
  that counts can see it, and without a mask attention runs its fast causal kernel.
* Broken samples leave the batch here, and their names and reasons travel with it to the trainer, which reports them.

* A packed batch is one sequence. Its positions start anew with every sample, which tells the model what to keep apart.

B batch, L sequence, F frames, P patches, C tower channels, S image side.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from videoxl.shell.records import read_json, replace_file
from videoxl.training.collator import IGNORE, pad_samples
from videoxl.training.data import BrokenSample, MixtureDataset

# Batches, and samples, among which those of like length are looked for.
SORTED_BLOCKS, SORTED_SAMPLES = 50, 2000


class Collator:
    """Makes batches of samples, without the broken ones.

    Args:
        processor: The checkpoint's processor.
        always_video: Adds a row with one group of black frames and no labels to batches without a video. Processes
            that train together must all run the tower.
        packing: Puts all samples of a batch one behind the other into one sequence instead of padding them.
    """

    def __init__(self, processor, always_video=False, packing=False):
        self.processor = processor
        self.always_video = always_video
        self.packing = packing

    def __call__(self, samples: list) -> dict:
        """Pads on the right, or packs.

        Returns:
            `input_ids`, `labels` [B, L] and, where there are any, `position_ids` [B, L], `pixels` [frames and tiles of
            all videos and images, 3, S, S], `features` [frames, P, C] and `shapes` (see `videos_of`); `keys`: per
            video under which its features are to be kept, or None; `answers`: (row, start, stop, type); `broken`:
            (source, name, reason); `samples`: how many came. If all are broken the batch is one row without labels,
            whose loss is zero.
        """
        good = [sample for sample in samples if not isinstance(sample, BrokenSample)]
        broken = [
            (sample.source, sample.name, sample.reason) for sample in samples if isinstance(sample, BrokenSample)
        ]
        rows = list(good)
        if not rows or (self.always_video and not any(sample["pixel_values_videos"] for sample in rows)):
            rows.append(self._filler())
        batch = (self._packed if self.packing else self._padded)(rows)
        batch |= {"broken": broken, "samples": len(samples)}
        videos = [video for sample in rows for video in sample["pixel_values_videos"]]
        # One tensor of each kind: each tensor costs its own way from the worker to the trainer.
        if pixels := [video.flatten(0, -4) for video in videos if video.ndim > 3]:
            batch["pixels"] = torch.cat(pixels)
        if features := [video for video in videos if video.ndim == 3]:
            batch["features"] = torch.cat(features)
        if videos:
            batch["shapes"] = [tuple(video.shape[:-3]) or len(video) for video in videos]
            batch["keys"] = [key for sample in rows for key in keys_of(sample)]
        return batch

    def _padded(self, rows):
        batch = pad_samples(rows, self.processor.tokenizer)
        batch["answers"] = [(row, *answer) for row, sample in enumerate(rows) for answer in sample["answers"]]
        if any("position_ids" in sample for sample in rows):
            length = batch["input_ids"].shape[1]
            positions = torch.arange(length).repeat(len(rows), 1)
            for row, sample in enumerate(rows):
                if "position_ids" in sample:
                    own = sample["position_ids"]
                    positions[row, : len(own)] = own
                    positions[row, len(own) :] = own[-1] + 1 + torch.arange(length - len(own))
            batch["position_ids"] = positions
        return batch

    def _packed(self, rows):
        positions = [sample.get("position_ids", torch.arange(len(sample["input_ids"]))) for sample in rows]
        batch = {name: torch.cat([sample[name] for sample in rows])[None] for name in ("input_ids", "labels")}
        answers, begin = [], 0
        for sample in rows:
            answers += [(0, begin + start, begin + stop, kind) for start, stop, kind in sample["answers"]]
            begin += len(sample["input_ids"])
        return batch | {"answers": answers, "position_ids": torch.cat(positions)[None]}

    def _filler(self):
        """A sample of one group of black frames without labels."""
        processor = self.processor
        side, count = processor.image_size, processor.frames_per_group
        frames = np.zeros((count, side, side, 3), dtype=np.uint8)
        text = processor.render([{"role": "user", "content": [{"type": "video"}]}], add_generation_prompt=False)
        video = {"video": frames, "timestamps": [float(number) for number in range(count)]}
        inputs = processor([text], videos=[[video]])
        ids = torch.tensor(inputs["input_ids"][0])
        return {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORE),
            "pixel_values_videos": list(inputs["pixel_values_videos"]),
            "answers": [],
        }


def keys_of(sample: dict) -> list:
    """Per video of a sample, under which key its features are to be kept; None where they are not."""
    return sample.get("keys") or [None] * len(sample["pixel_values_videos"])


def videos_of(batch: dict) -> list[torch.Tensor]:
    """What a collator's batch shows, in order of appearance.

    Returns:
        Videos [F, 3, S, S] or, where they are kept, their features [F, P, C]; images [T, 1, 3, S, S].
    """
    videos, used = [], {"pixels": 0, "features": 0}
    for shape in batch.get("shapes", ()):
        kind, count = ("features", shape) if isinstance(shape, int) else ("pixels", int(np.prod(shape)))
        part = batch[kind][used[kind] : used[kind] + count]
        used[kind] += count
        videos.append(part if kind == "features" else part.unflatten(0, shape))
    return videos


class EpochSampler(Sampler):
    """Shuffled indices, a function of seed and epoch alone.

    Args:
        dataset: A `MixtureDataset`.
        seed: Of the order.
        epoch: Function without arguments that gives the number of the epoch; called when an iteration begins.
        block: With more than 1, so many neighbours at a time come from one entry of the mixture (where it has enough
            left), so that batches hold samples of like length.
        lengths: Of all samples, in tokens: neighbours are then of about one length instead.
    """

    def __init__(self, dataset: MixtureDataset, seed: int, epoch, block: int = 1, lengths=None):
        self.lengths = lengths
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self.block = block

    def __len__(self):
        return len(self.dataset)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, int(self.epoch())])
        if self.lengths is not None:
            yield from self._by_length(rng)
            return
        if self.block == 1:
            yield from rng.permutation(len(self.dataset)).tolist()
            return
        blocks, rest = [], []
        for indices in self.dataset.ranges:
            shuffled = indices.start + rng.permutation(len(indices))
            whole = len(shuffled) // self.block * self.block
            blocks += list(shuffled[:whole].reshape(-1, self.block))
            rest.append(shuffled[whole:])
        rest = np.concatenate(rest)
        for number in rng.permutation(len(blocks)):
            yield from blocks[number].tolist()
        yield from rest[rng.permutation(len(rest))].tolist()

    def _by_length(self, rng):
        """Sorted within large random parts, so that batches are alike inside and differ from epoch to epoch."""
        lengths, order, blocks = np.array(self.lengths), rng.permutation(len(self.dataset)), []
        for part in np.array_split(order, max(len(order) // (SORTED_BLOCKS * self.block), 1)):
            ranked = part[np.argsort(-lengths[part], kind="stable")]
            blocks += [ranked[start : start + self.block] for start in range(0, len(ranked), self.block)]
        whole = [block for block in blocks if len(block) == self.block]
        for number in rng.permutation(len(whole)):
            yield from whole[number].tolist()
        for block in blocks:
            if len(block) < self.block:
                yield from block.tolist()


class BudgetBatches(Sampler):
    """Batches of as many samples as a number of tokens holds; the longest go first into what they leave least of.

    What is in a batch hangs on the seed alone, so that all epochs have equally many; their order on the epoch, too.

    Args:
        lengths: Of all samples, in tokens.
        budget: Tokens of a batch, padding included; a longer sample is a batch of its own.
        packing: Whether batches are packed instead of padded.
        seed, epoch: See `EpochSampler`.
        place: (number of this process, processes): each takes its share of every so many batches.
    """

    def __init__(self, lengths: list[int], budget: int, packing: bool, seed: int, epoch, place=(0, 1)):
        self.seed, self.epoch, self.place = seed, epoch, place
        lengths, rng = np.array(lengths), np.random.default_rng(seed)
        self.batches = []
        for part in np.array_split(rng.permutation(len(lengths)), max(len(lengths) // SORTED_SAMPLES, 1)):
            self.batches += _filled(part[np.argsort(-lengths[part], kind="stable")], lengths, budget, packing)
        if len(self.batches) < place[1]:
            raise ValueError(
                f"token_budget={budget} makes {len(self.batches)} batches for {place[1]} processes: lower it"
            )

    def __len__(self):
        return len(self.batches) // self.place[1]

    def __iter__(self):
        order = np.random.default_rng([self.seed, int(self.epoch())]).permutation(len(self.batches)).tolist()
        for number in order[self.place[0] : len(self) * self.place[1] : self.place[1]]:
            yield self.batches[number]


def _filled(ranked, lengths, budget: int, packing: bool) -> list[list[int]]:
    """Samples, the longest first, in batches: padded ones take neighbours, packed ones the first that has room."""
    batches, room = [], []
    for index in ranked.tolist():
        if packing:
            fits = next((number for number, left in enumerate(room) if left >= lengths[index]), None)
        else:  # a batch is as wide as its first sample
            fits = len(batches) - 1 if batches and room[-1] >= lengths[batches[-1][0]] else None
        if fits is None:
            batches.append([])
            room.append(budget)
            fits = len(batches) - 1
        batches[fits].append(index)
        room[fits] -= lengths[index] if packing else lengths[batches[fits][0]]
    return batches


def measure_lengths(dataset: MixtureDataset, folder: Path, workers: int = 0) -> list[int]:
    """Lengths of all samples in tokens, 1 for broken ones; read from `lengths.json` in the folder if they are there.

    Every sample is read once for it: where videos are long, keep features (`feature_cache`), too.
    """
    path, told = folder / "lengths.json", [dataset.entries, dataset.video, dataset.seed]
    if path.is_file() and (found := read_json(path))["mixture"] == json.loads(json.dumps(told)):
        return found["lengths"]
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, collate_fn=_length_of)
    lengths = list(loader)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"mixture": told, "lengths": lengths}))
    return lengths


def _length_of(sample) -> int:
    return 1 if isinstance(sample, BrokenSample) else len(sample["input_ids"])
