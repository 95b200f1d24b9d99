"""Batches of training samples, and their order.

What is surprising:
* Batches are padded on the right and have no attention mask: attention is causal and padding has no label, so nothing
  that counts can see it, and without a mask attention runs its fast causal kernel.
* Broken samples leave the batch here, and their names and reasons travel with it to the trainer, which reports them.

B batch, L sequence, F frames, S image side.
"""

import numpy as np
import torch
from torch.utils.data import Sampler
from videoxl.training.data import IGNORE, BrokenSample, MixtureDataset


class Collator:
    """Makes batches of samples, without the broken ones.

    Args:
        processor: The checkpoint's processor.
        always_video: Adds a row with one group of black frames and no labels to batches without a video. Processes
            that train together must all run the tower.
    """

    def __init__(self, processor, always_video=False):
        self.processor = processor
        self.always_video = always_video
        tokenizer = processor.tokenizer
        self.pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def __call__(self, samples: list) -> dict:
        """Pads on the right.

        Returns:
            `input_ids`, `labels` [B, L] and, where there are any, `position_ids` [B, L], `pixels` [frames and tiles of
            all videos and images, 3, S, S] and `shapes` (see `videos_of`); `answers`: (row, start, stop, type);
            `broken`: (source, name, reason); `samples`: how many came. If all are broken the batch is one row without
            labels, whose loss is zero.
        """
        good = [sample for sample in samples if not isinstance(sample, BrokenSample)]
        broken = [
            (sample.source, sample.name, sample.reason) for sample in samples if isinstance(sample, BrokenSample)
        ]
        rows = list(good)
        if not rows or (self.always_video and not any(sample["pixel_values_videos"] for sample in rows)):
            rows.append(self._filler())
        length = max(len(sample["input_ids"]) for sample in rows)
        input_ids = torch.full((len(rows), length), self.pad_id)
        labels = torch.full((len(rows), length), IGNORE)
        for row, sample in enumerate(rows):
            input_ids[row, : len(sample["input_ids"])] = sample["input_ids"]
            labels[row, : len(sample["labels"])] = sample["labels"]
        batch = {
            "input_ids": input_ids,
            "labels": labels,
            "answers": [(row, *answer) for row, sample in enumerate(rows) for answer in sample["answers"]],
            "broken": broken,
            "samples": len(samples),
        }
        if any("position_ids" in sample for sample in rows):
            positions = torch.arange(length).repeat(len(rows), 1)
            for row, sample in enumerate(rows):
                if "position_ids" in sample:
                    own = sample["position_ids"]
                    positions[row, : len(own)] = own
                    positions[row, len(own) :] = own[-1] + 1 + torch.arange(length - len(own))
            batch["position_ids"] = positions
        if pixels := [video for sample in rows for video in sample["pixel_values_videos"]]:
            # One tensor: each costs its own way from the worker to the trainer.
            batch["pixels"] = torch.cat([video.flatten(0, -4) for video in pixels])
            batch["shapes"] = [tuple(video.shape[:-3]) for video in pixels]
        return batch

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


def videos_of(batch: dict) -> list[torch.Tensor]:
    """The videos [F, 3, S, S] and images [T, 1, 3, S, S] of a collator's batch, in order of appearance."""
    if "pixels" not in batch:
        return []
    parts = batch["pixels"].split([shape[0] for shape in batch["shapes"]])
    return [part.unflatten(0, shape) for part, shape in zip(parts, batch["shapes"], strict=True)]


class EpochSampler(Sampler):
    """Shuffled indices, a function of seed and epoch alone.

    Args:
        dataset: A `MixtureDataset`.
        seed: Of the order.
        epoch: Function without arguments that gives the number of the epoch; called when an iteration begins.
        block: With more than 1, so many neighbours at a time come from one entry of the mixture (where it has enough
            left), so that batches hold samples of like length.
    """

    def __init__(self, dataset: MixtureDataset, seed: int, epoch, block: int = 1):
        self.dataset = dataset
        self.seed = seed
        self.epoch = epoch
        self.block = block

    def __len__(self):
        return len(self.dataset)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, int(self.epoch())])
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
