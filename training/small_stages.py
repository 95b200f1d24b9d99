"""What the programs of a small model's own stages share: recipes, the model to start from, the library's arguments.

`pretrain_vision.py` and `pretrain_reading.py` are such programs. `train.py` is not: its stages are the published ones.
"""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, TrainingArguments, set_seed
from videoxl.training.recipe import read_numbers, read_recipe
from videoxl.training.train import load_part, newest_checkpoint


def read_stage(path: Path, overrides: list[str], defaults: dict) -> dict:
    """Reads a recipe with the fields of `defaults`; ValueError on an unknown key, or not one of `model` and `init`."""
    given = read_recipe(path, overrides)
    if unknown := sorted(set(given) - set(defaults)):
        raise ValueError(f"a recipe of this stage has no {', '.join(unknown)}; it has {', '.join(defaults)}")
    if bool(given.get("init")) == bool(given.get("model")):
        raise ValueError("a recipe has exactly one of model (a folder to start from) and init ({config, seed})")
    recipe = defaults | given
    read_numbers(recipe, defaults)
    return recipe


def checkpoint_of(recipe: dict, resume: bool) -> str | None:
    """The newest checkpoint of the output folder, to go on from.

    Raises:
        ValueError: If there is one and `resume` is not set.
    """
    output = Path(recipe["output_dir"])
    checkpoint = newest_checkpoint(output)
    if checkpoint is not None and not resume:
        raise ValueError(f"{output} holds {checkpoint.name}; pass --resume to continue, or take another output_dir")
    return str(checkpoint) if checkpoint else None


def build_model(recipe: dict, attn_implementation: str) -> tuple[torch.nn.Module, str]:
    """The model that a recipe starts from, and the folder of its processor.

    `init` may hold `text_config`: entries of the language model's config that differ from the folder's.
    """
    options = {"trust_remote_code": True, "attn_implementation": attn_implementation}
    set_seed((recipe["init"] or {}).get("seed", recipe["seed"]))
    if recipe["model"]:
        source = recipe["model"]
        model = AutoModel.from_pretrained(source, **options)
    else:
        source = recipe["init"]["config"]
        config = AutoConfig.from_pretrained(source, trust_remote_code=True)
        text = config.text_config.to_dict() | recipe["init"].get("text_config", {})
        text.pop("layer_types", None)  # one a layer
        config.text_config = type(config.text_config)(**text)
        model = AutoModel.from_config(config, **options)
    for module, part in recipe["load"].items():
        load_part(model, module, **({"path": part} if isinstance(part, str) else part))
    return model, source


def stage_arguments(recipe: dict, **more) -> TrainingArguments:
    """The recipe in the library's words; `more` is the stage's own, and the recipe's `trainer` entries win."""
    same = ("output_dir", "learning_rate", "weight_decay", "max_steps", "save_steps", "logging_steps", "eval_steps")
    arguments = {name: recipe[name] for name in (*same, "seed")} | {
        "warmup_steps": recipe["warmup"],
        "save_total_limit": 2,
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return TrainingArguments(**(arguments | more | recipe["trainer"]))


class NothingBroken:
    """Clips of the world are never broken."""

    def resume(self, step, samples_per_step):
        """Nothing to go back to."""
