"""Teaches tower, compressor and projector of a small model to see, before any language model reads them.

    python training/pretrain_vision.py RECIPE.yaml [--set key=value ...] [--resume]

The published model starts from a SigLIP tower that has seen billions of pictures. A small model that starts from
nothing has none, and the language model's loss alone is a slow teacher. So this stage, which is ours, asks for what a
group of frames shows directly. A linear head on the group's visual tokens names, for each of the four frames, the
coloured shapes and their sizes and places, the words and digits on signs, and the key and value of a card. A second
one sees only their mean, which is what a head of attention can read with one look and what pooled key-values still
hold. It names what any of the four frames shows, in which of them shapes, signs and cards stand, which way shapes move
and which colour they end in. A third one asks as a language model does: for each shape, for a sign and for a card, one
query attends to the tokens and finds what is to be known, or that there is none. The output folder holds the whole
model, whose language model stays what it was, and the heads in `heads.safetensors`: a later stage may give the third
one to the language model (`hand_over.py`).

G groups in a batch, T frames a group, N visual tokens a group.
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoProcessor, Trainer

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # for `training` and `video_world`

from training import slots  # noqa: E402
from training.muon import is_matrix, make_optimizer  # noqa: E402
from training.small_stages import (  # noqa: E402
    NothingBroken,
    build_model,
    checkpoint_of,
    main_of,
    read_stage,
    stage_arguments,
)
from training.trainer import Journal, JournalCallback, module_of  # noqa: E402
from training.vision_facts import (  # noqa: E402
    DIRECTIONS,
    NUM_FACTS,
    NUM_PLACES,
    PAIRS,
    SHARES,
    TEXTS,
    AskingHead,
    asked_of,
    course_of,
    course_shares,
    facts_of,
    split_things,
)
from video_world import COLORS, SHAPES, SIZES, WORDS, make_clip  # noqa: E402

# Root mean square that the visual tokens are drawn to: nothing in DTS normalises what its convolutions put out.
TOKEN_SCALE, SCALE_WEIGHT = 0.2, 0.05
DEFAULTS = {
    "stage": "see",
    "init": None,
    "model": None,
    "output_dir": None,
    "load": {},
    "teach": "heads",  # or slots
    "trunk": 0,  # layers of DTS that are frozen with the tower, and run once; with slots
    "bank": 64_000,  # groups of frames that they are run for
    "data": {"split": "train", "size": 2_000_000, "first_seed": 0, "clip": {"seconds": 8}, "sample_fps": [1, 2, 4]},
    "mean_weight": 1.0,
    "asked_weight": 0.0,
    "learning_rate": 1e-3,
    "muon": False,
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
    "bf16": False,
    "workers": 1,
    "trainer": {},
}


class GroupDataset(Dataset):
    """Groups of frames from clips of the world, each with its facts.

    Args:
        data: `split`, `size`, `first_seed`, `clip` (arguments of `make_clip`), `sample_fps` (one or several).
        processor: The model's, for the size of frames and groups and the normalisation.
        seed: Of rates and places in the clip.
        teach: `heads` or `slots`.
    """

    def __init__(self, data: dict, processor, seed: int, teach: str = "heads"):
        self.data, self.processor, self.seed, self.teach = data, processor, seed, teach
        rates = data.get("sample_fps", 1)
        self.rates = [float(rate) for rate in (rates if isinstance(rates, list) else [rates])]

    def __len__(self):
        return int(self.data["size"])

    def __getitem__(self, index: int) -> dict:
        """`pixels` [T, 3, S, S], `facts` [T, NUM_FACTS], `places` [T, NUM_PLACES], `course` (see `course_of`); with
        slots only `pixels` and `facts` [N, K] (see `slots.facts_of`)."""
        processor, rng = self.processor, random.Random(f"{self.seed}-{index}")
        seed = int(self.data.get("first_seed", 0)) + index
        clip = make_clip(
            seed, self.data.get("split", "train"), size=processor.image_size, num_questions=0, **self.data["clip"]
        )
        rate, count = rng.choice(self.rates), processor.frames_per_group
        last = max(int(clip.seconds * rate) - count, 0)
        first = rng.randint(0, last)
        times = [min(number, int(clip.seconds * rate) - 1) / rate for number in range(first, first + count)]
        pixels = normalise(clip.frames(times), processor)
        if self.teach == "slots":
            return {"pixels": pixels, "facts": torch.from_numpy(slots.facts_of(clip, times))}
        facts, places = zip(*(facts_of(clip, time) for time in times), strict=True)
        return {
            "pixels": pixels,
            "facts": torch.from_numpy(np.stack(facts)),
            "places": torch.from_numpy(np.stack(places)),
            "course": torch.from_numpy(course_of(clip, times)),
        }


def normalise(frames: np.ndarray, processor) -> torch.Tensor:
    """Frames as the tower takes them. uint8 [F, S, S, 3] -> float32 [F, 3, S, S]."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255 - mean) / std


class Bank(Dataset):
    """What frozen layers put out for the first groups of a dataset.

    Args:
        dataset: Groups with `pixels` and `facts`.
        pretraining: A `SlotPretraining`.
        size: How many groups.
    """

    def __init__(self, dataset, pretraining, size: int, chunk: int = 64):
        hidden, facts = [], []
        for begin in range(0, size, chunk):
            groups = [dataset[number] for number in range(begin, min(begin + chunk, size))]
            hidden.append(pretraining.run_trunk(torch.stack([group["pixels"] for group in groups])).half())
            facts.append(torch.stack([group["facts"] for group in groups]).bool())
        self.hidden, self.facts = torch.cat(hidden), torch.cat(facts)

    def __len__(self):
        return len(self.hidden)

    def __getitem__(self, index: int) -> dict:
        return {"hidden": self.hidden[index], "facts": self.facts[index]}


class VisionPretraining(nn.Module):
    """A model's vision path with heads that name facts.

    Args:
        model: A Video-XL model; its language model is left alone.
        frames_per_group: T.
        mean_weight, asked_weight: Of what is named from the mean of the tokens, and of what is found by queries, in
            the loss.
    """

    def __init__(self, model, frames_per_group: int, mean_weight: float = 1.0, asked_weight: float = 0.0):
        super().__init__()
        self.mean_weight, self.asked_weight = mean_weight, asked_weight
        self.config = model.config
        self.vision_tower = model.model.vision_tower
        self.compressor = model.model.compressor
        self.multi_modal_projector = model.model.multi_modal_projector
        self.encode = model.get_video_features
        hidden_size = model.config.text_config.hidden_size
        self.of_group = SHARES | course_shares(frames_per_group)
        width = model.model.tokens_per_group * hidden_size
        self.head = nn.Linear(width, frames_per_group * (NUM_FACTS + NUM_PLACES))
        self.mean_head = nn.Linear(hidden_size, sum(self.of_group.values()))
        self.asking_head = AskingHead(hidden_size, frames_per_group)

    def forward(self, pixels, facts, places, course):
        """The loss of G groups and logits: of facts per frame [G, T, NUM_FACTS], of a group's facts from the mean of
        its tokens [G, ...], and what the queries find (see `AskingHead.forward`).

        Args:
            pixels: [G, T, 3, S, S].
            facts, places: See `facts_of`, [G, T, ...].
            course: See `course_of`, [G, ...].
        """
        tokens = torch.cat(self.encode(pixels).pooler_output).float()
        scale = tokens.pow(2).mean(dim=-1).clamp(min=1e-12).sqrt()
        normed = tokens / scale[..., None]
        named, placed = (
            self.head(normed.flatten(1))
            .float()
            .unflatten(1, facts.shape[1:2] + (-1,))
            .split([NUM_FACTS, NUM_PLACES], -1)
        )
        groups = len(facts)
        loss = missed(named, facts) / facts.shape[:2].numel()
        seen = places.isfinite()
        loss = loss + 4 * F.mse_loss(placed[seen], places[seen]) if seen.any() else loss
        of_mean = self.mean_head(normed.mean(dim=1)).float()
        shown = torch.cat([facts.amax(dim=1), course], dim=1)
        loss = loss + self.mean_weight * missed(of_mean, shown) / groups
        there, found = self.asking_head(normed)
        is_there, asked = asked_of(shown, self.of_group)
        of_asked = missed(there, is_there)
        for part, wanted, present in zip(found, asked, split_things(is_there), strict=True):
            of_asked = of_asked + missed(part[present], wanted[present])
        loss = loss + self.asked_weight * of_asked / groups
        loss = loss + SCALE_WEIGHT * (scale / TOKEN_SCALE).log().pow(2).mean()
        return {"loss": loss, "logits": named, "of_mean": of_mean, "there": there, "found": found}


def missed(logits: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    """The sum of binary cross-entropies."""
    return F.binary_cross_entropy_with_logits(logits, facts, reduction="sum")


def accuracy(logits: torch.Tensor, facts: torch.Tensor, shares: dict[str, int]) -> dict[str, float]:
    """Per kind of fact, of the rows that show any, the share in which exactly the right ones are named.

    Args:
        logits, facts: [R, number of facts].
        shares: How many of them each kind has.
    """
    result, sizes = {}, list(shares.values())
    for kind, found, shown in zip(shares, (logits > 0).split(sizes, 1), facts.bool().split(sizes, 1), strict=True):
        exact, any_shown = (found == shown).all(dim=1), shown.any(dim=1)
        result[kind] = exact[any_shown].float().mean().item() if any_shown.any() else float("nan")
    return result


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
                    groups[-1]["muon"] = is_matrix(name, parameter) and "head" not in name
            self.optimizer = make_optimizer(self, groups)
        return self.optimizer

    # override: shares of frames that are named right
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        if self.recipe["teach"] == "slots":
            return self._evaluate_slots(eval_dataset, metric_key_prefix)
        named, of_mean, facts, of_group, losses = [], [], [], [], []
        there, found = [], ([], [], [])
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader(eval_dataset):
                output = self.model(**batch)
                named.append(output["logits"].flatten(0, 1))
                facts.append(batch["facts"].flatten(0, 1))
                of_mean.append(output["of_mean"])
                of_group.append(torch.cat([batch["facts"].amax(dim=1), batch["course"]], dim=1))
                there.append(output["there"])
                for parts, part in zip(found, output["found"], strict=True):
                    parts.append(part)
                losses.append(float(output["loss"]))
        self.model.train()
        of_group, shares = torch.cat(of_group), self.model.of_group
        kinds = accuracy(torch.cat(named), torch.cat(facts), SHARES)
        kinds |= {f"{kind} of mean": value for kind, value in accuracy(torch.cat(of_mean), of_group, shares).items()}
        is_there, asked = asked_of(of_group, shares)
        kinds["there asked"] = ((torch.cat(there) > 0) == is_there.bool()).all(dim=1).float().mean().item()
        frames = shares["standing"] // (len(SHAPES) + 2)
        texts = {"text": len(TEXTS), "frames": frames}
        names = (
            {
                "color": len(COLORS),
                "last color": len(COLORS),
                "size": len(SIZES),
                "way": len(DIRECTIONS),
                "frames": frames,
            },
            {f"sign {name}": size for name, size in texts.items()},
            {"card key": len(PAIRS + WORDS)} | {f"card {name}": size for name, size in texts.items()},
        )
        for share, parts, wanted, present in zip(names, found, asked, split_things(is_there), strict=True):
            right = accuracy(torch.cat(parts)[present], wanted[present], share)
            kinds |= {f"{name} asked": value for name, value in right.items()}
        metrics = {f"{metric_key_prefix}_loss": sum(losses) / len(losses)}
        metrics[f"{metric_key_prefix}_accuracy"] = sum(kinds.values()) / len(kinds)
        metrics |= {f"{metric_key_prefix}_accuracy/{kind}": value for kind, value in kinds.items()}
        self.log(metrics)
        return metrics

    def _evaluate_slots(self, eval_dataset, prefix):
        told, facts, losses = [], [], []
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader(eval_dataset):
                output = self.model(**batch)
                told.append(output["told"])
                facts.append(batch["facts"])
                losses.append(float(output["loss"]))
        self.model.train()
        kinds = slots.told_right(torch.cat(told), torch.cat(facts))
        metrics = {f"{prefix}_loss": sum(losses) / len(losses)}
        metrics[f"{prefix}_accuracy"] = sum(kinds.values()) / len(kinds)
        metrics |= {f"{prefix}_accuracy/{kind}": value for kind, value in kinds.items()}
        self.log(metrics)
        return metrics

    # override: the samples seen, as in the other stages' logs
    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["samples"] = self.state.global_step * self.args.per_device_train_batch_size
        super().log(logs, start_time)


def load_recipe(path: Path, overrides: list[str]) -> dict:
    """Reads a recipe; ValueError on an unknown key or value."""
    recipe = read_stage(path, overrides, DEFAULTS)
    if recipe["teach"] not in ("heads", "slots") or (recipe["trunk"] and recipe["teach"] != "slots"):
        raise ValueError("teach must be heads or slots, and trunk goes with slots")
    return recipe


def run(recipe: dict, resume: bool = False) -> None:
    """Trains, and writes the model's folder.

    Raises:
        ValueError: If the output folder holds checkpoints and `resume` is not set.
    """
    output, checkpoint = Path(recipe["output_dir"]), checkpoint_of(recipe, resume)
    model, source = build_model(recipe, "eager")
    kept_chunk = model.config.vision_chunk_frames
    model.config.vision_chunk_frames = 1024
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    if recipe["teach"] == "slots":
        pretraining = slots.SlotPretraining(model, recipe["trunk"])
    else:
        weights = recipe["mean_weight"], recipe["asked_weight"]
        pretraining = VisionPretraining(model, processor.frames_per_group, *weights)
    pretraining.vision_tower.post_layernorm.requires_grad_(False)  # not on the path
    arguments = stage_arguments(
        recipe,
        lr_scheduler_type="cosine",
        per_device_train_batch_size=recipe["batch_size"],
        per_device_eval_batch_size=recipe["batch_size"],
        eval_strategy="steps",
        bf16=recipe["bf16"],
        dataloader_num_workers=recipe["workers"],
    )
    held_out = recipe["data"] | {"split": "held_out", "size": recipe["eval_size"]}
    train_dataset = GroupDataset(recipe["data"], processor, recipe["seed"], recipe["teach"])
    eval_dataset = GroupDataset(held_out, processor, recipe["seed"], recipe["teach"])
    if recipe["trunk"]:
        train_dataset = Bank(train_dataset, pretraining, recipe["bank"])
        eval_dataset = Bank(eval_dataset, pretraining, recipe["eval_size"])
    trainer = VisionTrainer(
        recipe=recipe,
        model=pretraining,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model.config.vision_chunk_frames = kept_chunk
    model.save_pretrained(output)
    processor.save_pretrained(output)
    heads = {
        name: tensor for name, tensor in pretraining.state_dict().items() if name.partition(".")[0].endswith("head")
    }
    if heads:
        save_file(heads, output / "heads.safetensors")


if __name__ == "__main__":
    main_of(__doc__, load_recipe, run)
