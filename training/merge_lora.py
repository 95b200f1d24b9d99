"""Merges a LoRA adapter that `train.py` saved into the model that it was trained on.

    python training/merge_lora.py ADAPTER OUTPUT [--model BASE]

OUTPUT is a folder that the Auto classes load, without peft.
"""

import argparse
from pathlib import Path

from transformers import AutoModel, AutoProcessor


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
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(output)
    AutoProcessor.from_pretrained(base, trust_remote_code=True).save_pretrained(output)


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
