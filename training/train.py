"""Trains a Video-XL model as a recipe says.

    python training/train.py RECIPE.yaml [--set key=value key=value ...] [--resume]
    accelerate launch --config_file training/accelerate/fsdp.yaml training/train.py RECIPE.yaml

The output folder holds the trained model with its code, tokenizer and processor (it loads through the Auto classes),
`recipe.yaml`, `log.jsonl`, `broken_samples.jsonl` if there were any, and the last checkpoints; after stage dts also
`dts.safetensors`, the compressor alone; with lora the adapter instead of the model (see merge_lora.py). `--resume`
continues from the newest complete checkpoint, and starts from the beginning if there is none yet.
"""

import argparse
import gc
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed.nn  # before there is a process group, see end_process_group()
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, TrainingArguments, set_seed

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.training.batches import Collator  # noqa: E402
from videoxl.training.data import MixtureDataset  # noqa: E402
from videoxl.training.dts import DTSPretraining, DTSTrainer  # noqa: E402
from videoxl.training.features import FeatureCache  # noqa: E402
from videoxl.training.recipe import (  # noqa: E402
    MODULES,
    behind_videos_only,
    learning_rates,
    load_recipe,
    module_of,
    require_trainable,
)
from videoxl.training.trainer import VideoXLTrainer  # noqa: E402

# Part of SigLIP and CLIP, of no effect: Video-XL takes the features in front of this norm.
_UNUSED = ("model.vision_tower.post_layernorm.",)


def build_model(recipe: dict) -> tuple[torch.nn.Module, object]:
    """The model that a recipe starts from, and its processor.

    Args:
        recipe: See `recipe.py`.

    Returns:
        The model in float32 and training mode, and the processor.

    Raises:
        ValueError: If a part to be loaded does not fit.
    """
    options = {"trust_remote_code": True}
    attention = {"attn_implementation": recipe["attn_implementation"]} if recipe["attn_implementation"] else {}
    if recipe["init"]:
        source = recipe["init"]["config"]
        set_seed(recipe["init"].get("seed", 0))
        model = AutoModel.from_config(AutoConfig.from_pretrained(source, **options), **options, **attention)
    else:
        source = recipe["model"]
        # Master weights in float32; with bf16 the products run in bfloat16 (autocast), the sums do not.
        options_of_weights = {"dtype": torch.float32, **attention, **_quantised(recipe["lora"] or {})}
        model = AutoModel.from_pretrained(source, **options_of_weights, **options)
        if Path(source).is_dir():
            model.name_or_path = str(Path(source).resolve())  # an adapter says so, whichever folder it is read from
    for module, part in recipe["load"].items():
        load_part(model, module, **({"path": part} if isinstance(part, str) else part))
    if recipe["vision_chunk_frames"]:
        model.config.vision_chunk_frames = recipe["vision_chunk_frames"]
    return model, AutoProcessor.from_pretrained(source, **options)


def _quantised(lora: dict) -> dict:
    """What `from_pretrained` is told for a language model in few bits; the rest of the model stays as it is."""
    if not lora.get("bits"):
        return {}
    from transformers import BitsAndBytesConfig

    kept = ["vision_tower", "compressor", "multi_modal_projector", "token_selector", "beacon_embed_tokens", "lm_head"]
    return {
        "quantization_config": BitsAndBytesConfig(**{f"load_in_{lora['bits']}bit": True}, llm_int8_skip_modules=kept)
    }


def load_part(model, module: str, path: str, strip: str = "") -> int:
    """Loads one module's weights from safetensors, for example stage 1's compressor into stage 2's model.

    Args:
        model: The model.
        module: A name of `MODULES`.
        path: A safetensors file, or a folder with some.
        strip: Beginning of the names in the file that stands in the module's place; tensors without it are ignored.

    Returns:
        How many tensors were loaded.

    Raises:
        ValueError: If a tensor of the module is missing or has another shape.
    """
    if module not in MODULES:
        raise ValueError(f"load takes {', '.join(MODULES)}, got {module!r}")
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path}: no safetensors there, to load {module} from")
    target = model.get_submodule(MODULES[module][0].rstrip("."))
    wanted, state, head = target.state_dict(), {}, False
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name.startswith(strip) and name[len(strip) :] in wanted:
                    state[name[len(strip) :]] = tensors.get_tensor(name)
                elif module == "language_model" and name == "lm_head.weight":
                    model.lm_head.weight.data.copy_(tensors.get_tensor(name))
                    head = True
    missing = sorted(set(wanted) - set(state))
    if module == "language_model" and not (head or model.config.tie_word_embeddings):
        missing.append("lm_head.weight")
    if missing:
        raise ValueError(f"{path}: {module} lacks {len(missing)} tensors there, {missing[0]} among them; check strip")
    wrong = [name for name, tensor in wanted.items() if tensor.shape != state[name].shape]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} of {module} has shape {tuple(state[wrong[0]].shape)}, another model's")
    target.load_state_dict(state)
    return len(state)


def freeze(model, recipe: dict) -> None:
    """Freezes what the recipe does not train."""
    rates = learning_rates(recipe)
    if recipe["member"].get("beacon_ratio", model.config.beacon_ratio) in (None, "none"):
        rates["beacons"] = None  # they never run
    # Nobody reads what beacons ask for in the last layer: only their keys and values stay.
    last = f"model.language_model.layers.{model.config.text_config.num_hidden_layers - 1}.self_attn.beacon_q_proj."
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rates[module_of(name)] is not None and not name.startswith((*_UNUSED, last)))


def add_lora(model, lora: dict):
    """Wraps the model in peft's LoRA; everything else is frozen.

    Args:
        model: The model.
        lora: `target` (names of `MODULES`, whose linear layers are adapted, or a regular expression of module names),
            `r`, `alpha`, `dropout`, `dora`, `train_also` (names of `MODULES` or of modules that are trained in full
            and saved with the adapter).

    Returns:
        The peft model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install peft") from error
    settings = LoraConfig(
        target_modules=_linear_layers(model, lora["target"]) if isinstance(lora["target"], list) else lora["target"],
        r=lora.get("r", 16),
        lora_alpha=lora.get("alpha", 2 * lora.get("r", 16)),
        lora_dropout=lora.get("dropout", 0.0),
        modules_to_save=[name for also in lora.get("train_also") or () for name in _module_names(model, also)] or None,
        use_dora=bool(lora.get("dora")),
    )
    return get_peft_model(model, settings)


def _linear_layers(model, modules: list[str]) -> list[str]:
    """Names of all linear layers of some of `MODULES`, without the head."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings()
    return [name for name, module in layers if module is not head and module_of(f"{name}.weight") in modules]


def _module_names(model, also: str) -> list[str]:
    """What peft calls one of `MODULES`, or the name as it is."""
    if also == "beacons":
        return sorted({name.split(".")[-2] for name, _ in model.named_parameters() if module_of(name) == also})
    return [MODULES[also][0].strip(".").removeprefix("model.")] if also in MODULES else [also]


def training_arguments(recipe: dict) -> TrainingArguments:
    """The recipe in the library's words; the recipe's `trainer` entries win."""
    evaluation = recipe["eval"] or {}
    arguments = {
        "output_dir": recipe["output_dir"],
        "learning_rate": recipe["learning_rate"],
        "weight_decay": recipe["weight_decay"],
        "warmup_steps": recipe["warmup"],
        "lr_scheduler_type": recipe["scheduler"],
        "max_grad_norm": recipe["max_grad_norm"],
        "per_device_train_batch_size": recipe["batch_size"],
        "gradient_accumulation_steps": recipe["gradient_accumulation"],
        "max_steps": recipe["max_steps"],
        "num_train_epochs": recipe["epochs"],
        "save_steps": recipe["save_steps"],
        "save_total_limit": recipe["save_total_limit"],
        "logging_steps": recipe["logging_steps"],
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "seed": recipe["seed"],
        "bf16": recipe["bf16"],
        "activation_checkpointing": recipe["gradient_checkpointing"],
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_num_workers": recipe["workers"],
        "dataloader_pin_memory": torch.cuda.is_available(),
        "eval_strategy": "steps" if evaluation else "no",
        "eval_steps": evaluation.get("steps", 500) if evaluation else None,
        "per_device_eval_batch_size": evaluation.get("batch_size", recipe["batch_size"]),
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        # Parameters without a gradient in some step (text-only data) must not stop distributed training.
        "ddp_find_unused_parameters": False,
    }
    if not torch.cuda.is_available():
        arguments["use_cpu"] = True
    return TrainingArguments(**(arguments | recipe["trainer"]))


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The newest complete checkpoint: its state is written last, so a checkpoint without one was interrupted."""

    def complete(folder):
        try:
            return bool(json.loads((folder / "trainer_state.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return False

    folders = sorted(output_dir.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    return next(filter(complete, folders), None)


def run(recipe: dict, resume: bool = False) -> VideoXLTrainer:
    """Trains, and writes the result.

    Args:
        recipe: See `recipe.py`.
        resume: Continue from the newest complete checkpoint in the output folder.

    Returns:
        The trainer.

    Raises:
        ValueError: If the output folder holds checkpoints and `resume` is not set.
    """
    output = Path(recipe["output_dir"])
    checkpoint = newest_checkpoint(output)
    if checkpoint is not None and not resume:
        raise ValueError(f"{output} holds {checkpoint.name}; pass --resume to continue, or take another output_dir")
    arguments = training_arguments(recipe)
    output.mkdir(parents=True, exist_ok=True)
    model, processor = build_model(recipe)
    pretraining = recipe["stage"] == "dts"
    require_trainable(recipe, model)
    # What FSDP shards by itself: of the layers that any member has, this one's.
    kinds = {type(module).__name__ for module in model.modules()}
    model._no_split_modules = [kind for kind in model._no_split_modules if kind in kinds]
    features = None
    if recipe["feature_cache"]:
        features = FeatureCache(recipe["feature_cache"], model, processor, recipe["video"])
    if pretraining:
        trained = DTSPretraining(model, recipe["dts"])
        trained.vision_tower.requires_grad_(False)
    elif recipe["lora"]:
        trained = add_lora(model, recipe["lora"])
    else:
        trained = model
        freeze(model, recipe)
    options = {"seed": recipe["seed"], "max_length": recipe["max_length"], "video": recipe["video"]}
    options |= {"answers": not pretraining, "features": features}
    options["behind_videos"] = not pretraining and behind_videos_only(model.config, recipe)
    dataset = MixtureDataset(recipe["data"], processor, position_stretch=recipe["position_stretch"], **options)
    evaluation = MixtureDataset(recipe["eval"]["data"], processor, **options) if recipe["eval"] else None
    needs_video = pretraining or arguments.world_size > 1
    trainer = (DTSTrainer if pretraining else VideoXLTrainer)(
        recipe=recipe,
        features=features,
        model=trained,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=evaluation,
        data_collator=Collator(processor, always_video=needs_video, packing=recipe["packing"]),
        eval_collator=Collator(processor, always_video=pretraining, packing=recipe["packing"]),
        processing_class=processor,
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise ValueError(
            "accelerate was launched with FSDP and shards nothing here (it does not on CPUs): launch with torchrun, "
            "for plain data parallelism"
        )
    if pretraining and trainer.is_fsdp_enabled:
        raise ValueError("stage dts is small and runs with plain data parallelism: launch it without FSDP")
    if features is not None and trainer.is_fsdp_enabled:
        raise ValueError("feature_cache runs the tower outside of the sharded model: launch it without FSDP")
    if arguments.process_index == 0:
        (output / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        if not checkpoint:
            for name in ("log.jsonl", "broken_samples.jsonl"):
                (output / name).unlink(missing_ok=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if pretraining:
        if arguments.process_index == 0:
            model.save_pretrained(output)
            processor.save_pretrained(output)
            state = {name: tensor.contiguous() for name, tensor in trained.compressor.state_dict().items()}
            save_file(state, output / "dts.safetensors", metadata={"format": "pt"})
    else:
        trainer.save_model(str(output))
    if arguments.process_index == 0:
        (output / "training_args.bin").unlink(missing_ok=True)  # a pickle, with this machine's paths
    return trainer


def end_process_group() -> None:
    """Ends gloo's and NCCL's threads, after the last reference to a trainer is gone.

    A thread that is still busy when the interpreter ends can abort the process ("terminate called without an active
    exception", seen on a loaded machine). The group's destructor joins its threads, and runs when nothing holds the
    group: DistributedDataParallel does while it lives, and torch.distributed.nn would for ever, as a default argument,
    were it imported after the group had been made.
    """
    if not torch.distributed.is_initialized():
        return
    gc.collect()  # trainer, model and callbacks refer to each other
    torch.distributed.destroy_process_group()


def main_of(description: str, load_recipe, run) -> None:
    """The command line of a stage's program: a recipe, other values, `--resume`.

    Args:
        description: Help.
        load_recipe: (path, overrides) -> recipe.
        run: (recipe, resume) -> trainer.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe's entry")
    parser.add_argument("more", nargs="*", default=[], metavar="KEY=VALUE", help="further ones")
    parser.add_argument("--resume", action="store_true", help="continue from the newest complete checkpoint")
    arguments = parser.parse_intermixed_args()
    try:
        recipe = load_recipe(arguments.recipe, [*arguments.set, *arguments.more])
    except (FileNotFoundError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    try:
        trainer = run(recipe, arguments.resume)
        if trainer.args.process_index == 0:
            kind = "adapter" if recipe.get("lora") else "model"
            print(f"{trainer.state.global_step} steps; the {kind} is in {recipe['output_dir']}")
        trainer.accelerator.wait_for_everyone()  # the first process keeps the store that the others leave by
        del trainer
    except Exception as error:
        if not disk_is_full(error, recipe["output_dir"]):
            raise
        parser.exit(
            1, f"{recipe['output_dir']}: the disk is full ({error}); make room, then run again with --resume\n"
        )
    finally:
        end_process_group()


def disk_is_full(error: Exception, folder: str | Path) -> bool:
    """Whether writing failed for want of room: safetensors and torch say so in words of their own, or not at all."""
    if "No space left" in str(error):
        return True
    folder = next(path for path in (Path(folder).resolve(), *Path(folder).resolve().parents) if path.is_dir())
    writes = "write" in str(error) or "writing" in str(error)
    return writes and shutil.disk_usage(folder).free < 2**20


if __name__ == "__main__":
    main_of(__doc__, load_recipe, run)
