"""Teaches tower, compressor and projector of a small model to see, before any language model reads them.

    python training/pretrain_vision.py RECIPE.yaml [--set key=value ...] [--resume]

The published model starts from a SigLIP tower that has seen billions of pictures. A small model that starts from
nothing has none, and the language model's loss alone is a slow teacher. So this stage, which is ours, asks the visual
tokens of a group of frames for its facts directly (`slots.py`). The output folder holds the whole model, whose
language model stays what it was.

G groups in a batch, T frames a group, N visual tokens a group, K facts a token, S image side.
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoProcessor, Trainer

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.training.muon import is_matrix, make_optimizer  # noqa: E402
from videoxl.training.recipe import module_of  # noqa: E402
from videoxl.training.slots import FRAMES, STARTS, SlotCode, confused, facts_of, shows, told_right  # noqa: E402
from videoxl.training.small_stages import (  # noqa: E402
    NothingBroken,
    build_model,
    checkpoint_of,
    read_stage,
    stage_arguments,
)
from videoxl.training.train import main_of  # noqa: E402
from videoxl.training.trainer import Journal, JournalCallback  # noqa: E402
from videoxl.video_world import make_clip  # noqa: E402

# In the loss: a fact of a slot that shows nothing, and what tokens hold beside facts.
EMPTY_WEIGHT, BESIDE_WEIGHT = 0.1, 0.1
# Squared distances hardly tell look-alikes apart; so where there is a fact of a kind, cross-entropy counts, too.
CONFUSED_WEIGHT = 0.5
DEFAULTS = {
    "stage": "see",
    "init": None,
    "model": None,
    "load": {},
    "output_dir": None,
    "data": {"split": "train", "size": 2_000_000, "first_seed": 0, "clip": {"seconds": 8}, "sample_fps": [1, 2, 4]},
    "learning_rate": 1e-3,
    "muon": True,
    "modules": {},
    "weight_decay": 0.01,
    "warmup": 100,
    "batch_size": 64,
    "max_steps": 1000,
    "save_steps": 500,
    "logging_steps": 50,
    "eval_steps": 500,
    "eval_size": 1024,
    "seed": 0,
    "workers": 0,
    "trainer": {},
}


class GroupDataset(Dataset):
    """Groups of frames from clips of the world, each with its facts.

    Args:
        data: `split`, `size`, `first_seed`, `clip` (arguments of `make_clip`), `sample_fps`; of the last two one or
            several, to draw from.
        processor: The model's, for the size of frames and groups and the normalisation.
        seed: Of rates and places in the clip.
    """

    def __init__(self, data: dict, processor, seed: int):
        self.data, self.processor, self.seed = data, processor, seed
        rates = data.get("sample_fps", 1)
        self.rates = [float(rate) for rate in (rates if isinstance(rates, list) else [rates])]

    def __len__(self):
        return int(self.data["size"])

    def __getitem__(self, index: int) -> dict:
        """`pixels` [T, 3, S, S] and `facts` [N, K]."""
        processor, rng = self.processor, random.Random(f"{self.seed}-{index}")
        seed = int(self.data.get("first_seed", 0)) + index
        options = self.data["clip"]
        options = rng.choice(options) if isinstance(options, list) else options
        clip = make_clip(seed, self.data.get("split", "train"), size=processor.image_size, num_questions=0, **options)
        rate, count = rng.choice(self.rates), processor.frames_per_group
        last = max(int(clip.seconds * rate) - count, 0)
        first = rng.randint(0, last)
        times = [min(number, int(clip.seconds * rate) - 1) / rate for number in range(first, first + count)]
        return {
            "pixels": normalise(clip.frames(times), processor),
            "facts": torch.from_numpy(facts_of(clip, times)),
        }


def normalise(frames: np.ndarray, processor) -> torch.Tensor:
    """Frames as the tower takes them. uint8 [F, S, S, 3] -> float32 [F, 3, S, S]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - mean) / std


class VisionPretraining(nn.Module):
    """A model's vision path, whose tokens should tell facts.

    Args:
        model: A Video-XL model with DTS; its language model is left alone.
    """

    def __init__(self, model):
        super().__init__()
        self.config = model.config
        self.vision_tower = model.model.vision_tower
        self.compressor = model.model.compressor
        self.multi_modal_projector = model.model.multi_modal_projector
        self.encode = model.get_video_features
        self.code = SlotCode(model.config.text_config.hidden_size)

    def forward(self, pixels, facts) -> dict:
        """The loss of G groups, and what their tokens tell [G, N, K].

        Args:
            pixels: [G, T, 3, S, S].
            facts: See `facts_of`, [G, N, K].
        """
        tokens = torch.cat(self.encode(pixels).pooler_output).float()
        told = self.code.facts(tokens)
        beside = (tokens - self.code.tokens(told)) / self.code.loudness
        weight = torch.where(shows(facts)[..., None], 1.0, EMPTY_WEIGHT).expand_as(facts).clone()
        weight[..., STARTS["frames"] : STARTS["frames"] + FRAMES] = 1.0
        loss = (weight * (told - facts).square()).sum() + BESIDE_WEIGHT * beside.square().sum()
        loss = loss + CONFUSED_WEIGHT * confused(told, facts)
        return {"loss": loss / len(facts), "told": told}


class VisionTrainer(Trainer):
    """The library's Trainer with rates per module, and an evaluation that counts named facts."""

    def __init__(self, *, recipe, **kwargs):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.journal = Journal(Path(self.args.output_dir) / "log.jsonl")
        self.broken = NothingBroken()
        self.add_callback(JournalCallback(self))

    # override: learning rates per module
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = []
            for name, parameter in self.model.named_parameters():
                rate = float(self.recipe["modules"].get(module_of("model." + name), self.args.learning_rate))
                decay = self.args.weight_decay if parameter.ndim > 1 else 0.0
                groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
                if self.recipe["muon"]:
                    groups[-1]["muon"] = is_matrix(name, parameter)
            self.optimizer = make_optimizer(self, groups)
        return self.optimizer

    # override: shares of facts that are told right
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        told, facts, losses = [], [], []
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader(eval_dataset):
                output = self.model(**batch)
                told.append(output["told"])
                facts.append(batch["facts"])
                losses.append(float(output["loss"]))
        self.model.train()
        kinds = told_right(torch.cat(told), torch.cat(facts))
        metrics = {f"{metric_key_prefix}_loss": sum(losses) / len(losses)}
        metrics[f"{metric_key_prefix}_accuracy"] = sum(kinds.values()) / len(kinds)
        metrics |= {f"{metric_key_prefix}_accuracy/{kind}": value for kind, value in kinds.items()}
        self.log(metrics)
        return metrics

    # override: the samples seen, as in the other stages' logs
    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["samples"] = self.state.global_step * self.args.per_device_train_batch_size
        super().log(logs, start_time)


def load_recipe(path: Path, overrides: list[str]) -> dict:
    """Reads a recipe; ValueError on an unknown key."""
    return read_stage(path, overrides, DEFAULTS)


def run(recipe: dict, resume: bool = False) -> VisionTrainer:
    """Trains, and writes the model's folder.

    Raises:
        ValueError: If the output folder holds checkpoints and `resume` is not set.
    """
    output, checkpoint = Path(recipe["output_dir"]), checkpoint_of(recipe, resume)
    model, source = build_model(recipe, "eager")
    kept_chunk = model.config.vision_chunk_frames
    model.config.vision_chunk_frames = 1024
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    pretraining = VisionPretraining(model)
    pretraining.vision_tower.post_layernorm.requires_grad_(False)  # not on the path
    arguments = stage_arguments(
        recipe,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=recipe["batch_size"],
        per_device_eval_batch_size=recipe["batch_size"],
        eval_strategy="steps",
        dataloader_num_workers=recipe["workers"],
    )
    held_out = recipe["data"] | {"split": "held_out", "size": recipe["eval_size"]}
    train_dataset = GroupDataset(recipe["data"], processor, recipe["seed"])
    eval_dataset = GroupDataset(held_out, processor, recipe["seed"])
    trainer = VisionTrainer(
        recipe=recipe,
        model=pretraining,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model.config.vision_chunk_frames = kept_chunk
    if arguments.process_index == 0:
        model.save_pretrained(output)
        processor.save_pretrained(output)
    return trainer


if __name__ == "__main__":
    main_of(__doc__, load_recipe, run)
