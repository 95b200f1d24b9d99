"""Merges a LoRA adapter that `train.py` saved into the model that it was trained on.

    python training/merge_lora.py ADAPTER OUTPUT [--model BASE]

OUTPUT is a folder that the Auto classes load, without peft. Its model card has the base's metadata (licence, tags) and
a text that says what it is.

What is surprising:
* peft (0.21) takes kernels of 1 x 1 x 1 for those of 1 x 1 when it merges, and fails. The compressor has some; what
  they gain is computed here.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

from huggingface_hub import ModelCard
from torch import nn
from transformers import AutoModel, AutoProcessor
from transformers.utils import cached_file


def merge(adapter: str | Path, output: str | Path, base: str | Path | None = None) -> None:
    """Writes the merged model with its code, tokenizer and processor.

    Args:
        adapter: Folder with `adapter_config.json`.
        output: Folder to write.
        base: The model that the adapter belongs to; None takes the one that the adapter names.

    Raises:
        ValueError: If the adapter names no model and `base` is None.
    """
    from peft import PeftConfig, PeftModel

    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not name the model it was trained on; pass --model")
    model = AutoModel.from_pretrained(base, trust_remote_code=True)
    adapted = PeftModel.from_pretrained(model, adapter)
    for module in adapted.modules():
        inner = module.get_base_layer() if hasattr(module, "lora_A") else None
        if isinstance(inner, nn.Conv3d) and inner.weight[0, 0].numel() == 1:
            module.get_delta_weight = partial(pointwise_gain, module)
    adapted.merge_and_unload(safe_merge=True).save_pretrained(output)
    AutoProcessor.from_pretrained(base, trust_remote_code=True).save_pretrained(output)
    write_card(adapter, output, base)


def write_card(adapter: str | Path, output: str | Path, base: str | Path) -> None:
    """Gives the merged model its base's card, with a text of its own, and its base's licences."""
    found = {}
    for name in ("README.md", "LICENSE", "LICENSE-CODE"):
        found[name] = cached_file(base, name, _raise_exceptions_for_missing_entries=False)
    for name in ("LICENSE", "LICENSE-CODE"):
        if found[name] is not None:
            shutil.copyfile(found[name], Path(output) / name)
    card = ModelCard.load(found["README.md"], ignore_metadata_errors=True) if found["README.md"] else None
    if card is None:
        return
    local = Path(base).is_dir()
    if not local:
        card.data.base_model = str(base)
    named = Path(base).resolve().name if local else base
    name, of = Path(output).resolve().name, Path(adapter).resolve().name
    card.text = (
        f"\n# {name}\n\n{named} with the LoRA adapter {of} merged into its weights. It loads and answers as its base "
        "does:\n\n```python\nfrom transformers import AutoModel\n\n"
        'model = AutoModel.from_pretrained("this repository", trust_remote_code=True)\n```\n'
    )
    card.save(Path(output) / "README.md")


def pointwise_gain(layer, adapter: str):
    """What an adapter adds to the weight [out, in, 1, 1, 1] of a convolution of single cells."""
    down, up = (part[adapter].weight.flatten(1).float() for part in (layer.lora_A, layer.lora_B))
    weight = layer.get_base_layer().weight
    return (up @ down * layer.scaling[adapter]).view_as(weight).to(weight.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", help="the model that the adapter was trained on, if it has moved")
    arguments = parser.parse_args()
    merge(arguments.adapter, arguments.output, arguments.model)
    print(f"merged model in {arguments.output}")


if __name__ == "__main__":
    main()
