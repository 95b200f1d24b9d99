"""LoRA adapters by the documentation's recipe, on language model and compressor, merged into the weights."""

import re

import pytest
import torch

pytest.importorskip("accelerate", reason="peft needs accelerate")
pytest.importorskip("peft")

import peft
from training_setup import tiny_recipe, write_tiny_folder
from transformers import AutoModel
from videoxl.training.merge_lora import merge
from videoxl.training.train import build_model


@pytest.fixture(scope="module")
def base(root, tmp_path_factory):
    """A folder with a small model, and its processor."""
    folder = tmp_path_factory.mktemp("base")
    tiny = write_tiny_folder(root, folder / "tiny-video-xl")
    model, processor = build_model(tiny_recipe(tiny, folder))
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder / "base", processor


@pytest.fixture(scope="module")
def documented(root):
    """The pattern of the documentation."""
    return re.search(r'targets = r"(.*)"', (root / "docs" / "tools.md").read_text(encoding="utf-8"))[1]


def load(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


def adapted_model(folder, targets, name="default", **options):
    """An adapter that changes something: peft's own begin with zeros."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(load(folder), peft.LoraConfig(r=4, target_modules=targets, **options)).eval()
    names = []
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
            names.append(parameter_name)
    assert any("compressor" in name for name in names) and any("language_model" in name for name in names)
    assert not any("vision_tower" in name for name in names)
    return adapted


@torch.no_grad()
def scores(model, processor):
    frames = torch.randint(0, 255, (8, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    content = [{"type": "video", "video": frames.numpy(), "timestamps": [float(number) for number in range(8)]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": [*content, "What?"]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    return model(**inputs, logits_to_keep=1).logits[0, -1].float()


def test_the_documented_recipe_merges(base, documented):
    folder, processor = base
    adapted = adapted_model(folder, documented)
    expected = scores(adapted, processor)
    assert (expected - scores(load(folder), processor)).abs().max() > 1e-2
    merged = adapted.merge_and_unload(safe_merge=True)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(scores(merged, processor), expected, atol=1e-4, rtol=1e-3)


COMPRESSOR = r".*(language_model.*\.(q_proj|v_proj)|compressor\.encoder\.\d+\.(q|k|v|qkv|proj_out|conv))"


@pytest.mark.parametrize("targets", ["documented", COMPRESSOR])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_program_merges_any_layer(base, documented, tmp_path, targets, dtype):
    folder, processor = base
    adapted = adapted_model(folder, documented if targets == "documented" else targets)
    adapted.save_pretrained(tmp_path / "adapter")
    if dtype is not torch.float32:
        load(folder).to(dtype).save_pretrained(tmp_path / "half")
        processor.save_pretrained(tmp_path / "half")
        merge(tmp_path / "adapter", tmp_path / "merged", tmp_path / "half")
    else:
        merge(tmp_path / "adapter", tmp_path / "merged")
    merged = load(tmp_path / "merged")
    assert merged.dtype is dtype
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    expected = scores(adapted, processor)
    torch.testing.assert_close(scores(merged.float(), processor), expected, atol=tolerance, rtol=10 * tolerance)


def test_merged_weights_can_be_adapted_and_merged_again(base, documented, tmp_path):
    folder, processor = base
    adapted_model(folder, COMPRESSOR).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    again = adapted_model(tmp_path / "merged", documented)
    expected = scores(again, processor)
    torch.testing.assert_close(scores(again.merge_and_unload(), processor), expected, atol=1e-4, rtol=1e-3)


def test_an_adapter_of_quantised_weights_merges_into_the_others(base, documented, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    folder, processor = base
    kept = ["model.vision_tower", "model.compressor", "model.multi_modal_projector", "lm_head"]
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, quantization_config=quantization)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=documented, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged", folder)
    again = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True, quantization_config=quantization)
    torch.testing.assert_close(scores(again, processor), scores(adapted, processor), atol=0.3, rtol=0.3)
