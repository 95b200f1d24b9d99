"""A model of some thousand parameters and recipes on generated clips, for the training tests."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from videoxl.training.recipe import check_recipe
from videoxl.training.trainer import BrokenReport

CLIPS = {"world": {"size": 8, "clip": {"seconds": 4, "num_questions": 2}, "sample_fps": 2}, "source": "clips"}


def write_tiny_folder(root: Path, folder: Path) -> Path:
    """Code, tokenizer and processor of the root with a config of tiny sizes; no weights."""
    folder.mkdir(parents=True)
    for path in root.iterdir():
        if path.suffix in {".py", ".json", ".jinja"}:
            shutil.copy(path, folder)
    config = json.loads((root / "config.json").read_text())
    config["vision_config"] |= {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config["compressor_config"] |= {"hidden_size": 32, "grid_size": 4, "projector_pool_size": 2}
    config["text_config"] |= {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "initializer_range": 0.1,
    }  # fmt: skip
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((root / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(processor | {"image_size": 28, "tokens_per_group": 4}))
    return folder


def tiny_recipe(folder: Path, output: Path, **changes) -> dict:
    """A recipe of a few steps from random weights."""
    recipe = {
        "init": {"config": str(folder), "seed": 1},
        "data": [CLIPS],
        "output_dir": str(output),
        "learning_rate": 1e-2,
        "batch_size": 4,
        "max_steps": 6,
        "warmup": 0,
        "scheduler": "constant",
        "logging_steps": 1,
        "save_steps": 100,
    }
    return check_recipe(recipe | changes)


def fsdp_launcher(root: Path, folder: Path) -> list[str]:
    """Arguments of Python that launch a program with the shipped config of FSDP, on two CPU processes."""
    text = (root / "training" / "accelerate" / "fsdp.yaml").read_text()
    config = folder / "fsdp.yaml"
    config.write_text(text.replace("use_cpu: false", "use_cpu: true").replace("num_processes: 8", "num_processes: 2"))
    return ["-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port=0"]


# The six members, as their published checkpoints at tiny size, by folders of goldens. March is made of two: the vision
# and the selector of April, the language model of Video-XL.
MEMBERS = {
    "videoxl2": "videoxl2/checkpoint",
    "pro_april": "videoxlpro/checkpoint",
    "pro_march": "videoxlpro/checkpoint",
    "videoxl": "videoxl1/checkpoint",
    "flash_umt": "videochatflash/checkpoint_res224",
    "flash_internvideo2": "videochatflash/checkpoint_internvideo2",
}
# Words of the bundled tokenizer; the goldens have 256.
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def member_folder(name: str, goldens: Path, folder: Path, scale: float = 1.0) -> Path:
    """A member's golden checkpoint with the bundled tokenizer, through the converter.

    Args:
        name: Of `MEMBERS`.
        goldens: The folder of goldens.
        folder: To be made; it must be called as no other folder of code.
        scale: Of the standard deviation of the words that the golden does not have.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer
    from videoxl.hub.convert import convert

    root = Path(__file__).resolve().parent.parent
    source, published = folder.with_name(f"{folder.name}_published"), goldens / MEMBERS[name]
    source.mkdir(parents=True)
    config, tensors = json.loads((published / "config.json").read_text()), load_file(published / "model.safetensors")
    if name == "pro_march":
        other = goldens / MEMBERS["videoxl"]
        vision = ("model.vision_tower.", "model.sae.", "model.mm_projector.", "model.text_mlp.")
        language = load_file(other / "model.safetensors")
        tensors = {key: tensor for key, tensor in tensors.items() if key.startswith(vision)}
        tensors |= {key: tensor for key, tensor in language.items() if not key.startswith(vision)}
        keys = ("vision_config", "mm_vision_tower", "mm_hidden_size", "image_grid_pinpoints")
        beacon = json.loads((other / "config.json").read_text())
        config = beacon | {key: config[key] for key in keys if key in config} | {"beacon_ratio": [4]}
    for file in _TOKENIZER:
        shutil.copy(root / file, source)
    words = len(AutoTokenizer.from_pretrained(root, trust_remote_code=True))
    generator = torch.Generator().manual_seed(0)
    for key in _VOCABULARY:
        if key in tensors:
            known = tensors[key]
            more = torch.randn(words - len(known), known.shape[1], generator=generator) * known.std() * scale
            tensors[key] = torch.cat([known, more.to(known.dtype)])
    own = json.loads((root / "config.json").read_text())
    for key in ("video_token_id", "time_start_token_id", "time_end_token_id"):
        if key in config:
            config[key] = own[key]
    for key in ("bos_token_id", "eos_token_id"):
        config.pop(key, None)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": words}))
    return Path(convert(source, folder))


@contextmanager
def interrupted(monkeypatch, at):
    """What trains meanwhile is interrupted when it takes its samples in this step."""
    take = BrokenReport.take

    def interrupt(self, broken, samples, step):
        if step == at:
            raise KeyboardInterrupt
        take(self, broken, samples, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BrokenReport, "take", interrupt)
        yield
