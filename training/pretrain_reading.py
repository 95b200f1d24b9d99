"""Teaches the language model of a small model to read what its visual tokens tell, before and after they can be seen.

    python training/pretrain_reading.py RECIPE.yaml [--set key=value ...] [--resume]

The published model's language model has read a good part of the internet. One that starts from nothing has to learn
everything from questions about clips, and learns little from one question at a time about a clip that was decoded,
encoded and prefilled for it. So this stage, which is ours,

* reads facts (`source: facts`): visual tokens are made from what a clip shows (`slots.py`), with noise, and the vision
  path is not run; or frames (`source: frames`), as they are seen;
* asks many questions about a clip: it is prefilled once, and each question runs behind its key-values alone, at the
  positions it would have in a conversation of its own;
* asks at the visual tokens of one layer for the story so far (`slots.story_of`), by heads that are thrown away.

B clips in a batch, R questions, P positions of a clip's prompt, L of the longest question, G groups, N visual tokens a
group, K facts a token, C width.
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoProcessor, DynamicCache, Trainer

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.training.collator import IGNORE  # noqa: E402
from videoxl.training.looks import LOOKS, Queries  # noqa: E402
from videoxl.training.muon import is_matrix, make_optimizer  # noqa: E402
from videoxl.training.reading_data import ClipBatches  # noqa: E402
from videoxl.training.slots import NUM_SLOTS, STORY, SlotCode  # noqa: E402
from videoxl.training.small_stages import (  # noqa: E402
    NothingBroken,
    build_model,
    checkpoint_of,
    read_stage,
    stage_arguments,
)
from videoxl.training.train import main_of  # noqa: E402
from videoxl.training.trainer import Journal, JournalCallback  # noqa: E402

DEFAULTS = {
    "stage": "read",
    "init": None,
    "model": None,
    "load": {},
    "heads": None,  # heads.safetensors of an earlier stage; without them fresh ones disturb what was learnt
    "output_dir": None,
    "data": [],
    "held_out": [],
    "source": "facts",
    "noise": 0.1,
    "lost": 0.02,  # share of the facts that are not told
    "story_layer": 2,
    "story_weight": 0.3,
    "look": {},  # [layer, head] for each kind of `looks.LOOKS`: it should look where an answer is best read
    "look_weight": 0.5,
    "embedding_scale": 1.0,  # of a new model's embeddings
    "learning_rate": 1e-3,
    "muon": True,
    "weight_decay": 0.01,
    "warmup": 100,
    "scheduler": "constant_with_warmup",
    "max_steps": 1000,
    "save_steps": 500,
    "logging_steps": 50,
    "eval_steps": 500,
    "eval_batches": 6,
    "seed": 0,
    "trainer": {},
}
# Of the story, what are numbers; and the waves that write numbers.
NUMBERS = ("time", "first", "begin", "gone", "length")
# Layers whose visual tokens are asked for parts of the story; what is not named is asked of `story_layer`.
EARLY = {"time": 0, "before": 1}
PERIODS = (2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 1024)


def number_codes(count: int) -> torch.Tensor:
    """Numbers 0 .. count - 1 as waves, so that neighbours are near each other and none are alike. [count, 22]."""
    numbers = torch.arange(count, dtype=torch.float64)[:, None]
    angles = 2 * torch.pi * numbers / torch.tensor(PERIODS, dtype=torch.float64)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class NumberHead(nn.Module):
    """Logits of the numbers 0 .. classes - 2 by their codes, and of "none". [..., C] -> [..., classes]."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.register_buffer("codes", number_codes(classes - 1), persistent=False)
        self.linear = nn.Linear(width, self.codes.shape[1] + 1)

    def forward(self, hidden):
        code, none = self.linear(hidden).split([self.codes.shape[1], 1], dim=-1)
        return torch.cat([code @ self.codes.T, none], dim=-1)


@torch.no_grad()
def set_embeddings(model, tokenizer, scale: float) -> None:
    """A new model's embeddings: all louder, and those of numbers by their codes, so that neighbours are alike.

    Args:
        model: The model, with random weights.
        tokenizer: Its tokenizer, in which numbers are single tokens.
        scale: What the embeddings are multiplied by.
    """
    weight = model.get_input_embeddings().weight
    weight.mul_(scale)
    size = weight.std() * weight.shape[1] ** 0.5
    codes = number_codes(1000)
    generator = torch.Generator().manual_seed(1)
    directions, _ = torch.linalg.qr(torch.randn(weight.shape[1], codes.shape[1], generator=generator))
    codes = codes / codes.shape[1] ** 0.5 * 2**0.5 @ directions.T
    for number in range(len(codes)):
        for text in (f" {number}", f"{number}"):
            ids = tokenizer.encode(text)
            if len(ids) == 1:
                weight[ids[0]] = size * codes[number] + 0.3 * weight[ids[0]]


class Reading(nn.Module):
    """A model that reads clips and answers, with heads for the story.

    Args:
        model: A Video-XL model. Its vision path is left alone.
        recipe: See `DEFAULTS`.
    """

    def __init__(self, model, recipe: dict):
        super().__init__()
        self.config, self.recipe = model.config, recipe
        self.language_model = model.model.language_model
        self.encode = model.get_video_features
        width = model.config.text_config.hidden_size
        self.code = SlotCode(width)
        self.story_norm = nn.RMSNorm(width)
        self.story_heads = nn.ModuleDict(
            {
                kind: NumberHead(width, classes) if kind in NUMBERS else nn.Linear(width, classes)
                for kind, classes in STORY.items()
            }
        )

    def forward(self, ids, positions, facts, asked, story=None, pixels=None):
        """The loss of a batch (see `ClipBatches`), which answers are right per type, and the story's accuracy."""
        tokens = self.tokens(facts) if pixels is None else self.see(pixels)
        embeds = self.language_model.embed_tokens(ids)
        visual = ids == self.config.video_token_id
        embeds = embeds.masked_scatter(visual[..., None], tokens.flatten(0, 2).to(embeds.dtype))
        kept = []
        hooks = [
            layer.register_forward_hook(
                lambda module, given, out: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in self.language_model.layers
        ]
        try:
            cache = self.language_model(
                inputs_embeds=embeds, position_ids=positions, past_key_values=DynamicCache(), use_cache=True
            ).past_key_values
        finally:
            for hook in hooks:
                hook.remove()
        loss, told = embeds.new_zeros(()), {}
        if story is not None and self.recipe["story_weight"]:
            for kind, head in self.story_heads.items():
                hidden = self.story_norm(kept[EARLY.get(kind, self.recipe["story_layer"])][visual])
                logits, target = head(hidden), story[kind].flatten()
                loss = loss + self.recipe["story_weight"] * F.cross_entropy(logits, target)
                there = target != STORY[kind] - 1
                right = logits.argmax(dim=-1) == target
                if there.any():
                    told[f"story/{kind}"] = right[there].float().mean().item()
        hits, seen, said, total, count = (
            defaultdict(list),
            defaultdict(list),
            defaultdict(list),
            embeds.new_zeros(()),
            0,
        )
        for part in asked:
            rows, labels = part["rows"], part["labels"]
            behind = DynamicCache()
            for number, kept_layer in enumerate(cache.layers):
                behind.update(kept_layer.keys[rows], kept_layer.values[rows], number)
            length = part["ids"].shape[1]
            places = positions[rows, -1:] + 1 + torch.arange(length, device=rows.device)
            with Queries(self.language_model, self.recipe["look"]) as queries:
                hidden = self.language_model(
                    input_ids=part["ids"], position_ids=places, past_key_values=behind, use_cache=True
                ).last_hidden_state
            wanted = labels[:, 1:] != IGNORE
            for kind in self.recipe["look"].keys() & part["looks"].keys():
                looks = part["looks"][kind]
                where = looks["rows"], looks["place"], looks["look"]
                shares = queries.shares(kind, places, behind, visual[rows], *where)
                for name, share in zip((kind, f"pooled {kind}"), shares, strict=False):
                    seen[name].append(share)
                if "word" in looks:
                    # An option has to know its letter, and the question's end what it looks for, before it is chosen.
                    logits = queries.said(looks["rows"], looks["place"], looks.get("among", slice(None)))
                    said[kind].append((logits, looks["word"]))
            logits = hidden[:, :-1][wanted] @ self.language_model.embed_tokens.weight.T
            targets = labels[:, 1:][wanted]
            total = total + F.cross_entropy(logits, targets, reduction="sum")
            count += len(targets)
            right = torch.ones_like(wanted)
            right[wanted] = logits.detach().argmax(dim=-1) == targets
            for kind, hit in zip(part["types"], right.all(dim=1).tolist(), strict=True):
                hits[kind + "+" * part["options"]].append(hit)
        loss = loss + total / max(count, 1)
        for kind, shares in seen.items():
            shares = torch.cat(shares)
            loss = loss - self.recipe["look_weight"] * shares.clamp(min=1e-6).log().mean()
            told[f"look/{kind}"] = shares.mean().item()
        for kind, parts in said.items():
            logits, words = (torch.cat(part) for part in zip(*parts, strict=True))
            loss = loss + self.recipe["look_weight"] * F.cross_entropy(logits, words)
            told[f"said/{kind}"] = (logits.argmax(dim=-1) == words).float().mean().item()
        return {"loss": loss, "hits": dict(hits), "told": told}

    def tokens(self, facts):
        """Visual tokens that tell facts, with noise and gaps. [B, G, N, K] -> [B, G, N, C]."""
        noise = self.recipe["noise"]
        if self.training and noise:
            lost = torch.rand_like(facts) < self.recipe["lost"]
            lost[..., :NUM_SLOTS] = False
            told = facts.masked_fill(lost, 0) + noise * torch.randn_like(facts)
            tokens = self.code.tokens(told)
            return tokens + 0.3 * noise * self.code.loudness * torch.randn_like(tokens)
        return self.code.tokens(facts)

    @torch.no_grad()
    def see(self, pixels):
        """Visual tokens of frames. [B, F, 3, S, S] -> [B, G, N, C]."""
        return torch.stack(list(self.encode(pixels).pooler_output))


class ReadingTrainer(Trainer):
    """The library's Trainer with Muon, and an evaluation by type of question."""

    def __init__(self, *, recipe, **kwargs):
        super().__init__(**kwargs)
        self.recipe = recipe
        self.journal = Journal(Path(self.args.output_dir) / "log.jsonl")
        self.broken = NothingBroken()
        self.told = defaultdict(list)
        self.add_callback(JournalCallback(self))

    # override: Muon for matrices
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = []
            for name, parameter in self.model.named_parameters():
                if not parameter.requires_grad:
                    continue
                decay = self.args.weight_decay if parameter.ndim > 1 else 0.0
                group = {"params": [parameter], "lr": self.args.learning_rate, "weight_decay": decay}
                if self.recipe["muon"]:
                    group["muon"] = is_matrix(name, parameter) and "head" not in name
                    group["lr"] *= 1.0 if group["muon"] else 0.5
                groups.append(group)
            self.optimizer = make_optimizer(self, groups)
        return self.optimizer

    # override: the story's accuracy goes into the log
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(**inputs)
        for kind, value in output["told"].items():
            self.told[kind].append(value)
        for kind, hits in output["hits"].items():
            self.told["right" + "+" * kind.endswith("+")] += hits
        return (output["loss"], None) if return_outputs else output["loss"]

    # override: answers of which every token is the most likely one, by type; a plus stands for options
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self.model.eval()
        metrics = {}
        with torch.no_grad():
            for name, dataset in self.eval_dataset.items():
                hits = defaultdict(list)
                for index in range(len(dataset)):
                    batch = self._prepare_inputs(dataset[index])
                    for kind, found in self.model(**batch)["hits"].items():
                        hits[kind] += found
                every = [hit for found in hits.values() for hit in found]
                prefix = f"{metric_key_prefix}_accuracy/{name}"
                metrics[prefix] = sum(every) / len(every)
                metrics |= {f"{prefix}/{kind}": round(sum(f) / len(f), 3) for kind, f in sorted(hits.items())}
        self.model.train()
        metrics[f"{metric_key_prefix}_accuracy"] = metrics[
            f"{metric_key_prefix}_accuracy/{next(iter(self.eval_dataset))}"
        ]
        self.log(metrics)
        return metrics

    # override: see compute_loss
    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs |= {kind: round(sum(values) / len(values), 3) for kind, values in self.told.items()}
            self.told.clear()
            logs["samples"] = self.state.global_step
        super().log(logs, start_time)


def load_recipe(path: Path, overrides: list[str]) -> dict:
    """Reads a recipe; ValueError on an unknown key or kind of look."""
    recipe = read_stage(path, overrides, DEFAULTS)
    if unknown := sorted(set(recipe["look"]) - set(LOOKS)):
        raise ValueError(f"look has no {', '.join(unknown)}; it takes {', '.join(LOOKS)}")
    return recipe


def first_of(items):
    """An item is a batch."""
    return items[0]


def run(recipe: dict, resume: bool = False) -> ReadingTrainer:
    """Trains, and writes the model's folder.

    Raises:
        ValueError: If the output folder holds checkpoints and `resume` is not set.
    """
    output, checkpoint = Path(recipe["output_dir"]), checkpoint_of(recipe, resume)
    model, source = build_model(recipe, "sdpa")
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    if recipe["init"] and "language_model" not in recipe["load"]:
        set_embeddings(model, processor.tokenizer, recipe["embedding_scale"])
    kept_chunk, model.config.vision_chunk_frames = model.config.vision_chunk_frames, 1024
    reading = Reading(model, recipe)
    if recipe["heads"]:
        reading.load_state_dict(load_file(recipe["heads"]), strict=False)
    arguments = stage_arguments(
        recipe,
        lr_scheduler_type=recipe["scheduler"],
        per_device_train_batch_size=1,
        eval_strategy="steps" if recipe["held_out"] else "no",
    )
    frames = recipe["source"] == "frames"
    size = recipe["max_steps"] + 1
    held_out = {
        item.get("name", str(number)): ClipBatches(
            [item], processor, number, recipe["eval_batches"], frames, "held_out"
        )
        for number, item in enumerate(recipe["held_out"])
    }
    trainer = ReadingTrainer(
        recipe=recipe,
        model=reading,
        args=arguments,
        data_collator=first_of,
        train_dataset=ClipBatches(recipe["data"], processor, recipe["seed"], size, frames),
        eval_dataset=held_out,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model.config.vision_chunk_frames = kept_chunk
    if arguments.process_index == 0:
        model.save_pretrained(output)
        processor.save_pretrained(output)
        heads = {name: tensor for name, tensor in reading.state_dict().items() if name.startswith("story_")}
        save_file(heads, output / "heads.safetensors")
    return trainer


if __name__ == "__main__":
    main_of(__doc__, load_recipe, run)
