"""Recipes: YAML files that say what `train.py` does. Unknown keys are errors, and every default stands below.

stage: sft                     # sft: next-token loss on answers; dts: reconstruction (see dts.py)
model: outputs/stage2          # folder or Hub id to start from, or
init: {config: ., seed: 0}     # a folder whose config, tokenizer and code give a model with random weights
load: {compressor: {path: outputs/stage1/dts.safetensors}}   # parts taken from elsewhere, after that
data: mixture.yaml             # or the mixture itself
modules: {vision_tower: frozen, projector: 1.0e-3}           # frozen, a learning rate, or train
sparse_attention: {prefill: mask, chunk_groups: 4, window_chunks: 3}   # or a list to draw from, step by step
"""

import copy
from pathlib import Path

import yaml

# Groups of parameters by the beginning of their names.
MODULES = {
    "vision_tower": ("model.vision_tower.",),
    "compressor": ("model.compressor.",),
    "projector": ("model.multi_modal_projector.",),
    "language_model": ("model.language_model.", "lm_head."),
}

DEFAULTS = {
    "stage": "sft",
    "model": None,
    "init": None,
    "load": {},
    "data": None,
    "output_dir": None,
    "modules": {},
    "sparse_attention": {"prefill": "full"},
    "learning_rate": 1e-5,
    "muon": False,  # Muon for the matrices, AdamW for the rest; see muon.py
    "weight_decay": 0.0,
    "warmup": 0.03,  # steps, or below 1 a share of all steps
    "scheduler": "cosine",
    "max_grad_norm": 1.0,
    "batch_size": 1,  # samples of one process in one pass
    "gradient_accumulation": 1,  # passes per optimizer step
    "max_steps": -1,  # of the optimizer; above 0 it wins over epochs
    "epochs": 1,
    "save_steps": 1000,
    "save_total_limit": 2,
    "logging_steps": 10,
    "seed": 0,
    "bf16": False,
    "gradient_checkpointing": False,
    "attn_implementation": None,  # None: the library's choice
    "vision_chunk_frames": None,  # frames in one pass of the tower; None: the config's
    "max_length": None,  # tokens; None: no limit
    "video": {},  # max_num_frames, sample_fps, max_sample_fps of video files
    "position_stretch": 0,  # positions reach up to this number; 0: plain positions
    "group_by_source": False,
    "max_broken": 0.1,  # share of the samples seen
    "workers": 0,  # processes that load data; 0: the trainer itself
    "lora": None,  # target, r, alpha, dropout, train_also
    "eval": None,  # data, steps, batch_size, sparse_attention
    "dts": {},  # see dts.py
    "trainer": {},  # further TrainingArguments
}

_NESTED_KEYS = {
    "init": {"config", "seed"},
    "lora": {"target", "r", "alpha", "dropout", "train_also"},
    "eval": {"data", "steps", "batch_size", "sparse_attention"},
    "dts": {"mask_ratio", "candidate_share", "visible_weight", "decoder_layers", "decoder_heads", "sgm_temperature"},
}


def load_recipe(path: str | Path, overrides: list[str] = ()) -> dict:
    """Reads a recipe.

    Args:
        path: YAML file.
        overrides: `key=value` with the value in YAML; dots go into nested keys (`eval.steps=50`).

    Returns:
        The recipe with all its defaults.

    Raises:
        ValueError: On an unknown key, or a value that does not fit.
    """
    return check_recipe(read_recipe(path, overrides))


def read_recipe(path: str | Path, overrides: list[str] = ()) -> dict:
    """What a recipe's file says, with overrides and without defaults; see `load_recipe`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe; training/recipes has some")
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file ({error}); training/recipes has examples") from error
    if not isinstance(given, dict):
        raise ValueError(f"{path} must hold key: value entries, see training/recipes; got {type(given).__name__}")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, got {override!r}")
        target, parts = given, key.split(".")
        for part in parts[:-1]:
            target[part] = target[part] if isinstance(target.get(part), dict) else {}
            target = target[part]
        target[parts[-1]] = yaml.safe_load(value)
    return given


def read_numbers(recipe: dict, defaults: dict) -> None:
    """Reads text as a number where the default is one, in place: YAML takes 1e-4 for text and wants 1.0e-4."""
    for name, value in defaults.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isinstance(recipe[name], str):
            try:
                recipe[name] = type(value)(float(recipe[name]))
            except ValueError:
                raise ValueError(f"{name} must be a number, got {recipe[name]!r}") from None


def check_recipe(given: dict) -> dict:
    """Fills in the defaults; see `load_recipe` for the errors."""
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise ValueError(f"a recipe has no {', '.join(unknown)}; it has {', '.join(DEFAULTS)}")
    recipe = copy.deepcopy(DEFAULTS) | given
    for name, known in _NESTED_KEYS.items():
        if recipe[name] and (unknown := sorted(set(recipe[name]) - known)):
            raise ValueError(f"{name} has no {', '.join(unknown)}; it takes {', '.join(sorted(known))}")
    read_numbers(recipe, DEFAULTS)
    if (recipe["model"] is None) == (recipe["init"] is None):
        raise ValueError("a recipe has exactly one of model (a folder to start from) and init ({config, seed})")
    for name in ("data", "output_dir"):
        if not recipe[name]:
            raise ValueError(f"the recipe lacks {name}")
    if recipe["stage"] not in ("sft", "dts"):
        raise ValueError(f"stage must be sft or dts, got {recipe['stage']!r}")
    if unknown := sorted(set(recipe["modules"]) - set(MODULES)):
        raise ValueError(f"modules has no {', '.join(unknown)}; it takes {', '.join(MODULES)}")
    learning_rates(recipe)
    plans(recipe["sparse_attention"])
    if recipe["stage"] == "dts" and (recipe["lora"] or recipe["modules"] or recipe["gradient_checkpointing"]):
        raise ValueError("stage dts trains the compressor and its decoder: leave lora, modules, checkpointing out")
    if recipe["lora"] and recipe["modules"]:
        raise ValueError("with lora everything else is frozen: leave modules out; lora.train_also names exceptions")
    return recipe


def learning_rates(recipe: dict) -> dict[str, float | None]:
    """Per module its learning rate; None where it is frozen. Modules that the recipe does not name are trained."""
    rates = {}
    for module in MODULES:
        value = recipe["modules"].get(module, "train")
        if value in ("train", True):
            rates[module] = float(recipe["learning_rate"])
        elif value in ("frozen", False):
            rates[module] = None
        else:
            try:
                rates[module] = float(value)
            except (TypeError, ValueError):
                raise ValueError(f"modules.{module} must be train, frozen or a rate, got {value!r}") from None
    return rates


def plans(sparse_attention: dict | list) -> list[dict]:
    """The prefill plans that training draws from.

    Raises:
        ValueError: On bi-level decoding, which has no loss.
    """
    plans = sparse_attention if isinstance(sparse_attention, list) else [sparse_attention]
    if not plans or not all(isinstance(plan, dict) and plan.get("decode", "full") == "full" for plan in plans):
        raise ValueError(
            "sparse_attention is a dict of config.sparse_attention with a prefill plan, or a list of such dicts; "
            "bi-level decoding cannot be trained"
        )
    return plans
