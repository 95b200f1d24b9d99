"""A model of some thousand parameters and recipes on generated clips, for the training tests."""

import json
import shutil
from pathlib import Path

from videoxl.training.recipe import check_recipe

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
