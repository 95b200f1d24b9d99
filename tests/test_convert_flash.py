"""VideoChat-Flash's published checkpoints: their tensors at true size, their presets, what their configs may say."""

import json
import shutil

import pytest
import torch
from goldens import FIXTURES
from safetensors.torch import load_file, save_file
from test_convert import Manifest
from transformers import AutoConfig, AutoModel
from videoxl import modeling_videoxl
from videoxl.configuration_videoxl import VideoXLConfig
from videoxl.hub import convert as convert_weights
from videoxl.hub.convert import choose_preset, convert, name_table, recognise_family
from videoxl.hub.published_configs import build_config

CHECKPOINT = FIXTURES / "videochatflash" / "checkpoint_res224"
PINPOINTS = [[56 * columns, 56 * rows] for columns in range(1, 4) for rows in range(1, 4)]

# What is expected of the three checkpoints whose files are not known: the tower, its width, the language model.
QWEN2_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN2_7B |= {"vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1e6, "num_hidden_layers": 28}
EXPECTED = {
    "videochat-flash-7b-224": ("umt-large", 1024),
    "videochat-flash-7b-448": ("umt-hd-large", 1024),
    "videochat-flash-7b-internvideo2": ("internvideo2", 1408),
}

# Goldens have no tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.*need the tokenizer")


def published_config(name, **changes):
    """The config.json of a checkpoint: as published where that is known, else as expected."""
    if (path := FIXTURES / "published" / name / "config.json").is_file():
        return json.loads(path.read_text()) | changes
    tower, width = EXPECTED[name]
    config = {
        **{"model_type": "qwen2", "architectures": ["VideoChatFlashQwenForCausalLM"], "rope_scaling": None},
        **{"mm_vision_tower": tower, "mm_hidden_size": width, "mm_vision_select_layer": -2, "mm_local_num_frames": 4},
        **{"mm_projector_type": "tome16_mlp_hd64", "mm_pos_num_frames": 8, "mm_spatial_pool_mode": "bilinear"},
        **{"mm_num_compress_latents": 128, "vision_encode_type": "video_image", "torch_dtype": "bfloat16"},
        **{"mm_llm_compress": False, "llm_compress_layer_list": [24], "llm_image_token_ratio_list": [1.0, 0.5]},
        **{"tokenizer_model_max_length": 16384, "image_grid_pinpoints": PINPOINTS, "frame_grid_pinpoints": None},
    }
    return {**QWEN2_7B, **config, **changes}


def published_tensors(config):
    """Names and shapes of the tensors of a checkpoint, as the public model classes build them from its config.json."""
    tower, width, hidden = config["mm_vision_tower"], config["mm_hidden_size"], config["hidden_size"]
    key_values = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = Manifest()
    shapes.add_language_model(28, hidden, config["intermediate_size"], key_values, config["vocab_size"])
    shapes.add("model.mm_projector.mlp.0", hidden, width)
    shapes.add("model.mm_projector.mlp.2", hidden, hidden)
    prefix = "model.vision_tower.vision_tower"
    if tower == "internvideo2":
        shapes |= {f"{prefix}.cls_token": (1, 1, 1408), f"{prefix}.pos_embed": (1, 1025, 1408)}
        shapes |= {f"{prefix}.img_pos_embed": (1, 257, 1408)}
        shapes.add(f"{prefix}.patch_embed.proj", 1408, 3, 1, 14, 14)
        for block in (f"{prefix}.blocks.{number}" for number in range(39)):
            for part in ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "ls1", "ls2"):
                shapes.add(f"{block}.{part}", 1408, bias=False)
            shapes.add(f"{block}.attn.qkv", 4224, 1408, bias=False)
            shapes.add(f"{block}.attn.proj", 1408, 1408)
            shapes.add(f"{block}.mlp.fc1", 6144, 1408)
            shapes.add(f"{block}.mlp.fc2", 1408, 6144)
        return shapes
    prefix += ".encoder"
    shapes.add(f"{prefix}.patch_embed.proj", 1024, 3, 1, 16, 16)
    shapes.add(f"{prefix}.vision_layernorm", 1024)
    for block in (f"{prefix}.blocks.{number}" for number in range(23)):
        shapes.add(f"{block}.norm1", 1024)
        shapes.add(f"{block}.norm2", 1024)
        shapes.add(f"{block}.attn.qkv", 3072, 1024, bias=False)
        shapes |= {f"{block}.attn.q_bias": (1024,), f"{block}.attn.v_bias": (1024,)}
        shapes.add(f"{block}.attn.proj", 1024, 1024)
        shapes.add(f"{block}.mlp.fc1", 4096, 1024)
        shapes.add(f"{block}.mlp.fc2", 1024, 4096)
    return shapes


@pytest.mark.parametrize(
    ("name", "count", "stored", "distinct"),
    [
        ("videochat-flash-2b-448", 646, 2_071_502_336, 1_838_128_640),  # the head is the embedding
        ("videochat-flash-7b-224", 646, 7_922_617_856, 7_922_617_856),
        ("videochat-flash-7b-448", 646, 7_922_617_856, 7_922_617_856),
        ("videochat-flash-7b-1m-224", 646, 7_922_617_856, 7_922_617_856),
        ("videochat-flash-7b-internvideo2", 855, 8_620_852_736, 8_620_852_736),
    ],
)
def test_at_true_size_a_checkpoint_has_exactly_the_published_tensors(name, count, stored, distinct):
    published = published_config(name)
    wanted = published_tensors(published)
    assert len(wanted) == count
    assert sum(torch.Size(shape).numel() for shape in wanted.values()) == stored
    table = name_table(recognise_family(published, wanted))
    preset = choose_preset(table, published)
    assert preset == convert_weights.read_preset(name)
    for config in (build_config(published, preset), VideoXLConfig.from_dict(preset)):
        ours = convert_weights.expected_shapes(config)
        assert {table.to_published(mine): shape for mine, shape in ours.items()} == wanted
        assert {mine: table.to_ours(table.to_published(mine)) for mine in ours} == {mine: mine for mine in ours}
        with torch.device("meta"):
            model = modeling_videoxl.VideoXLForConditionalGeneration(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == distinct
        assert config.vision_config.image_size == (448 if name.endswith("448") else 224)
        assert config.compressor_config.tokens_per_group == 64 and config.frames_per_group == 4
        assert (config.image_mean, config.image_tiling) == ([0.485, 0.456, 0.406], "overview")


def test_what_the_published_config_says_about_compression_and_context():
    preset = convert_weights.read_preset("videochat-flash-7b-224")
    published = published_config("videochat-flash-7b-224", tie_word_embeddings=True)
    config = build_config(published, preset)
    assert (config.mm_llm_compress, config.llm_compress_type) == (False, "attention")
    assert (config.llm_compress_layer_list, config.llm_image_token_ratio_list) == ([24], [1.0, 0.5])
    assert config.tokenizer_model_max_length == 16384 and config.tie_word_embeddings
    assert config.image_grid_pinpoints == PINPOINTS
    again = VideoXLConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mm_projector_type": "tome4_mlp_hd64"}, "tome16_mlp_hd64.*tome4"),
        ({"mm_local_num_frames": 8}, "mm_local_num_frames.*8"),
        ({"mm_vision_tower": "umt-giant"}, "mm_vision_tower must be one of umt-large, .*'umt-giant'"),
        ({"vision_config": {"hidden_size": 100}}, "multiple of num_attention_heads"),
    ],
)
def test_other_algorithms_are_refused(changes, message):
    preset = convert_weights.read_preset("videochat-flash-7b-224")
    with pytest.raises(ValueError, match=message):
        build_config(published_config("videochat-flash-7b-224", **changes), preset)


def test_missing_and_unknown_tensors_are_named_as_published(tmp_path):
    source = tmp_path / "flash"
    shutil.copytree(CHECKPOINT, source)
    tensors = load_file(source / "model.safetensors")
    bias = "model.vision_tower.vision_tower.encoder.blocks.1.attn.q_bias"
    save_file({name: tensor for name, tensor in tensors.items() if name != bias}, source / "model.safetensors")
    with pytest.raises(ValueError, match=rf"lacks {bias}"):
        convert(source, tmp_path / "output")
    block = {
        name.replace("blocks.2.", "blocks.5."): tensor.clone()
        for name, tensor in tensors.items()
        if "blocks.2." in name
    }
    save_file(tensors | block, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown tensor .*blocks\.5\."):
        convert(source, tmp_path / "output")
    # A layer above the one that is taken may be stored, as for the other members.
    above = {
        name.replace("blocks.2.", "blocks.3."): tensor.clone()
        for name, tensor in tensors.items()
        if "blocks.2." in name
    }
    save_file(tensors | above, source / "model.safetensors")
    written = load_file(convert(source, tmp_path / "output") / "model.safetensors")
    assert len(written) == len(tensors) and not [name for name in written if "layers.3.mlp.fc1" in name]


def test_position_tables_are_there_however_the_model_is_loaded(tmp_path):
    output = convert(CHECKPOINT, tmp_path / "flash_tables")
    names = ("clip_positions", "image_positions")
    models = [AutoModel.from_pretrained(output, trust_remote_code=True, dtype=dtype) for dtype in ("auto", "bfloat16")]
    config = AutoConfig.from_pretrained(output, trust_remote_code=True)
    models.append(AutoModel.from_config(config, trust_remote_code=True))
    expected = [getattr(models[2].model.vision_tower.embeddings, name) for name in names]
    assert expected[0].shape == (784, 64) and expected[0].abs().sum() > 0
    for model in models[:2]:
        found = [getattr(model.model.vision_tower.embeddings, name) for name in names]
        assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(expected, found, strict=True))
    models[0].save_pretrained(tmp_path / "saved")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [name for name in stored if "_positions" in name]
    again = json.loads((tmp_path / "saved" / "config.json").read_text())["vision_config"]
    assert (again["model_type"], again["mlp_ratio"], again["final_norm_eps"]) == ("videoxl_umt", 4.0, 1e-12)
