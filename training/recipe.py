"""Recipes: YAML files that say what `train.py` does. Unknown keys are errors, and every default stands below.

stage: sft                     # sft: next-token loss on answers; dts: reconstruction (see dts.py)
model: outputs/stage2          # folder or Hub id to start from, or
init: {config: ., seed: 0}     # a folder whose config, tokenizer and code give a model with random weights
load: {compressor: {path: outputs/stage1/dts.safetensors}}   # parts taken from elsewhere, after that
data: mixture.yaml             # or the mixture itself
modules: {vision_tower: frozen, projector: 1.0e-3}           # frozen, a learning rate, or train
member: {beacon_ratio: [2, 4, 8], keep_ratio: [0.7, 0.99]}   # the member's settings while it trains
sparse_attention: {prefill: mask, chunk_groups: 4, window_chunks: 3}   # or a list to draw from, step by step
"""

import copy
import random
from contextlib import contextmanager
from pathlib import Path

import yaml

# Groups of parameters by what their names begin with, behind some dot; the first that fits. A member lacks some.
MODULES = {
    "beacons": ("beacon_",),
    "token_selector": ("model.token_selector.",),
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
    "member": {},  # of the config: beacon_ratio, beacon_ratio_mix, keep_ratio; seeds are drawn anew in every step
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
    "group_by_length": False,  # batches of samples that are about equally long
    "token_budget": None,  # tokens of a batch, which holds as many samples as fit, instead of batch_size
    "packing": False,  # the samples of a batch one behind the other, instead of padded
    "feature_cache": None,  # a folder where features of the frozen tower are kept
    "max_broken": 0.1,  # share of the samples seen
    "workers": 0,  # processes that load data; 0: the trainer itself
    "lora": None,  # target, r, alpha, dropout, train_also, dora, bits
    "eval": None,  # data, steps, batch_size, sparse_attention
    "dts": {},  # see dts.py
    "trainer": {},  # further TrainingArguments
}

_NESTED_KEYS = {
    "init": {"config", "seed"},
    "lora": {"target", "r", "alpha", "dropout", "train_also", "dora", "bits"},
    "member": {"beacon_ratio", "beacon_ratio_mix", "keep_ratio"},
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
    _check_lora(recipe["lora"] or {})
    _check_batches(recipe)
    return recipe


def _check_lora(lora):
    for name in ("target", "train_also"):
        value = lora.get(name)
        if name == "target" and lora and not value:
            raise ValueError(f"lora needs target: some of {', '.join(MODULES)}, or a regular expression")
        wrong = [part for part in value if part not in MODULES] if name == "target" and isinstance(value, list) else []
        if wrong:
            raise ValueError(f"lora.target as a list takes {', '.join(MODULES)}, got {wrong[0]!r}")
    if lora.get("bits") not in (None, 4, 8):
        raise ValueError(f"lora.bits is 4 or 8, for base weights quantised by bitsandbytes; got {lora['bits']!r}")


def _check_batches(recipe):
    """Raises ValueError where ways to make batches exclude each other."""
    budget = recipe["token_budget"]
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise ValueError(f"token_budget is a number of tokens, got {budget!r}")
    if budget and (recipe["group_by_source"] or recipe["group_by_length"]):
        raise ValueError("token_budget makes its own batches: leave group_by_source and group_by_length out")
    if recipe["group_by_source"] and recipe["group_by_length"]:
        raise ValueError("group_by_source and group_by_length exclude each other")
    if recipe["stage"] == "dts" and (recipe["packing"] or budget or recipe["feature_cache"] or recipe["member"]):
        raise ValueError("stage dts trains on frames: leave packing, token_budget, feature_cache and member out")
    if recipe["feature_cache"] and not recipe["lora"] and learning_rates(recipe)["vision_tower"] is not None:
        raise ValueError("feature_cache keeps what a frozen tower sees: set modules.vision_tower to frozen")


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


def require_trainable(recipe: dict, model) -> None:
    """Raises ValueError, before the first step, where a recipe asks for what a model cannot do, with the reason."""
    config, stage = model.config, recipe["stage"]
    names = [name for name, _ in model.named_parameters()]
    there = {module_of(name) for name in names}
    named = [module for module, value in recipe["modules"].items() if value not in ("frozen", False)]
    target = (recipe["lora"] or {}).get("target")
    named += target if isinstance(target, list) else []
    if missing := [module for module in named if module not in there]:
        raise ValueError(
            f"this model has nothing to train in {missing[0]!r}: it has weights in {', '.join(sorted(there))}"
        )
    if stage == "dts" and config.compressor_config.compressor_type != "dts":
        raise ValueError(
            "stage dts trains the compressor of Video-XL-2 and Video-XL-Pro; this model's compressor is "
            f"{config.compressor_config.compressor_type!r}, which has no such stage"
        )
    entries = recipe["member"]
    if "keep_ratio" in entries and config.token_selector is None:
        raise ValueError("member.keep_ratio is the token selector's, which this model does not have: leave it out")
    if "beacon_ratio" in entries and config.beacon_window is None:
        raise ValueError("member.beacon_ratio is the beacon memory's, which this model does not have: leave it out")
    if config.mm_llm_compress:
        raise ValueError(
            "config.mm_llm_compress drops tokens by where the prompt ends, which has no loss: set it to false in the "
            "model's config.json for training, as the published weights were trained, and back afterwards"
        )
    if stage == "dts":
        return
    for plan in plans(recipe["sparse_attention"]):
        with in_force(config, {"sparse_attention": plan, **drawn(recipe, "check", plan)}):
            config.resolve_sparse_attention()
            config.resolve_keep_ratio()
    if behind_videos_only(config, recipe):
        for name in ("packing", "position_stretch"):
            if recipe[name]:
                raise ValueError(
                    f"{name} needs outputs at every token; with beacon memory or a token selector each prompt runs "
                    f"by itself, unpadded, and at positions of its own: leave {name} out"
                )
    if "beacons" in named and entries.get("beacon_ratio", config.beacon_ratio) in (None, "none"):
        raise ValueError("beacons are to be trained and beacon_ratio is 'none', so none would ever run")


def module_of(name: str) -> str | None:
    """The module of `MODULES` that a parameter belongs to, also behind wrappers' prefixes."""
    for module, prefixes in MODULES.items():
        if any(f".{prefix}" in f".{name}" for prefix in prefixes):
            return module
    return None


def behind_videos_only(config, recipe: dict) -> bool:
    """Whether a model trained like this has outputs behind the last video only."""
    ratio = recipe["member"].get("beacon_ratio", config.beacon_ratio)
    return config.token_selector is not None or ratio not in (None, "none")


def drawn(recipe: dict, seed, plan: dict | None = None) -> dict:
    """Entries of the config for one step: the member's settings, with what is random drawn from the seed.

    Args:
        recipe: With `member`.
        seed: Anything that is printed differently for different steps.
        plan: Of sparse attention; None draws one of the recipe's.
    """
    generator, options = random.Random(seed), plans(recipe["sparse_attention"])
    entries = {"sparse_attention": options[generator.randrange(len(options))] if plan is None else plan}
    entries |= recipe["member"]
    if isinstance(entries.get("beacon_ratio"), list):
        entries["beacon_seed"] = generator.randrange(2**31)
    if isinstance(ratio := entries.get("keep_ratio"), list):
        if len(ratio) != 2 or not all(isinstance(edge, (int, float)) for edge in ratio):
            raise ValueError(f"member.keep_ratio is a share, or the two shares to draw between, got {ratio!r}")
        entries["keep_ratio"] = generator.uniform(*ratio)
    if "keep_ratio" in entries:
        entries["keep_seed"] = None
    return entries


@contextmanager
def in_force(config, entries: dict):
    """Meanwhile these entries of a config are in force."""
    before = {name: getattr(config, name) for name in entries}
    try:
        for name, value in entries.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
