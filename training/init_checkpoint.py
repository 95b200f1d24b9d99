"""Writes the small checkpoint of the repository root with random weights from a fixed seed.

The architecture is Video-XL-2's, only the sizes are small, so that everything that works on it works on the published
weights. It cannot answer anything; a trained one replaces it.

    python training/init_checkpoint.py [FOLDER]
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoTokenizer

SEED = 0
CODE = {
    "AutoConfig": "configuration_videoxl.VideoXLConfig",
    "AutoProcessor": "processing_videoxl.VideoXLProcessor",
    **dict.fromkeys(
        ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
        "modeling_videoxl.VideoXLForConditionalGeneration",
    ),
}


def small_config(tokenizer) -> dict:
    """The small model's config.json."""
    time_ids = tokenizer.encode("Time 0.0s:", add_special_tokens=False)
    return {
        "architectures": ["VideoXLForConditionalGeneration"],
        "auto_map": CODE,
        "model_type": "videoxl",
        "dtype": "float32",
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 48,
            "patch_size": 8,
            "vision_use_head": False,
        },
        "vision_feature_layer": -2,
        "compressor_config": {
            "model_type": "videoxl_compressor",
            "compressor_type": "dts",
            "hidden_size": 96,
            "frames_per_group": 4,
            "grid_size": 6,
            "projector_pool_size": 2,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            # Above the usual 1e6: with heads of 32 channels, half of them then hardly turn within 60,000 positions.
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000000.0},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
        },
        "sparse_attention": {
            "model_type": "videoxl_sparse_attention",
            "prefill": "full",
            "decode": "full",
            "decode_chunk_groups": 1,
            "pool_size": 9,
            # One head of the third and one of the fourth layer look for what is asked (see training/looks.py).
            "reload": {"method": "auto", "count": 32, "share": 0.18, "layers": [0.4, 0.8]},
        },
        "video_token_id": tokenizer.convert_tokens_to_ids("<|vision_pad|>"),
        "time_start_token_id": time_ids[0],
        "time_end_token_id": time_ids[-1],
        "frames_config": {"model_type": "videoxl_frames", "time_format": "Time {seconds:.1f}s:"},
    }


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", default=Path(__file__).resolve().parent.parent, type=Path)
    folder = parser.parse_args().folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    write_json(folder / "config.json", small_config(tokenizer))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_json(folder / "generation_config.json", {"do_sample": False, "max_new_tokens": 64, **ids})
    torch.manual_seed(SEED)
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    print(f"{sum(tensor.numel() for tensor in state.values()):,} parameters in {folder / 'model.safetensors'}")


if __name__ == "__main__":
    main()
