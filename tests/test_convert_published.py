"""Published folders as they are: two config.json as published, with their indices, at true size and tiny ones."""

import json
import re
import socket

import pytest
import torch
from goldens import FIXTURES
from safetensors.torch import load_file, save_file
from test_convert import EMBEDDING, HEAD, converted_tensors
from test_convert_flash import published_config, published_tensors
from transformers import AutoModel
from videoxl.configuration_videoxl import VideoXLConfig
from videoxl.hub import convert as convert_weights
from videoxl.hub.convert import convert
from videoxl.hub.families import name_table
from videoxl.hub.published_configs import build_config
from videoxl.hub.tensors import SourceTensor, match_tensors

TWO_B, ONE_M = "videochat-flash-2b-448", "videochat-flash-7b-1m-224"
# A tiny checkpoint of the same layout gives what has a size; every other key stays as published.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "mm_hidden_size", "vision_config", "image_grid_pinpoints")
TINY = {TWO_B: "checkpoint_res448", ONE_M: "checkpoint_res224"}

# Goldens have no tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.*need the tokenizer")


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    """A conversion that opens a connection fails."""

    def refuse(*arguments):
        raise AssertionError(f"a connection to {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def published_index(shapes, shards):
    """The index of a published checkpoint in bfloat16, tensor after tensor."""
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    place, read = {}, 0
    for name, shape in shapes.items():
        place[name] = f"model-{read * shards // total + 1:05}-of-{shards:05}.safetensors"
        read += 2 * torch.Size(shape).numel()
    return {"metadata": {"total_size": total}, "weight_map": place}


@pytest.fixture
def make_published(tmp_path):
    """Writes the published folder `name` at tiny size, in four shards.

    `head` makes the output head from the embedding, or None; `changes` are keys of config.json, None leaves one out.
    """

    def make(name, head, **changes):
        source, golden = tmp_path / name, FIXTURES / "videochatflash"
        source.mkdir()
        sizes = json.loads((golden / TINY[name] / "config.json").read_text())
        config = published_config(name) | {key: sizes[key] for key in SIZES} | changes
        left_out = [key for key, value in changes.items() if value is None]
        config = {key: value for key, value in config.items() if key not in left_out}
        (source / "config.json").write_text(json.dumps(config))
        generation = FIXTURES / "published" / name / "generation_config.json"
        (source / "generation_config.json").write_bytes(generation.read_bytes())
        for file in ("modeling_videochat_flash.py", "pytorch_model.bin", "training_args.bin"):
            (source / file).write_text("raise RuntimeError('nobody runs this')")
        tensors = load_file(golden / "checkpoint_res224" / "model.safetensors")
        tensors = {key: tensor.bfloat16() for key, tensor in tensors.items() if key != HEAD}
        if (made := head(tensors[EMBEDDING].clone())) is not None:
            tensors[HEAD] = made
        index = published_index({key: tensor.shape for key, tensor in tensors.items()}, 4)
        for file in set(index["weight_map"].values()):
            part = {key: tensor for key, tensor in tensors.items() if index["weight_map"][key] == file}
            save_file(part, source / file, metadata={"format": "pt"})
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        return source, tensors

    return make


# ------------------------------------------------------------------------------------------------ at true size


@pytest.mark.parametrize(("name", "shards", "total"), [(TWO_B, 1, 4_143_004_672), (ONE_M, 4, 15_845_235_712)])
def test_every_tensor_of_a_published_index_has_its_place(name, shards, total, tmp_path):
    published = published_config(name)
    shapes = published_tensors(published)
    index = published_index(shapes, shards)
    assert index["metadata"]["total_size"] == total and len(set(index["weight_map"].values())) == shards
    sources = {
        key: SourceTensor(tmp_path / file, key, shapes[key], "BF16") for key, file in index["weight_map"].items()
    }
    table = name_table(convert_weights.recognise_family(published, sources))
    config = build_config(published, convert_weights.choose_preset(table, published))
    expected = convert_weights.expected_shapes(config)
    plan = match_tensors(
        sources, table, expected, config.tie_word_embeddings, convert_weights.unused_layers(config, expected)
    )
    assert plan.keys() == expected.keys()
    assert {tensor.name for tensor in plan.values()} == sources.keys()
    for missing in ("model.norm.weight", "model.vision_tower.vision_tower.encoder.vision_layernorm.bias"):
        fewer = {key: tensor for key, tensor in sources.items() if key != missing}
        with pytest.raises(ValueError, match=rf"lacks {missing}"):
            match_tensors(fewer, table, expected, config.tie_word_embeddings)


@pytest.mark.parametrize("name", [TWO_B, ONE_M])
def test_presets_say_what_the_published_files_say(name):
    preset, published = convert_weights.read_preset(name), published_config(name)
    read, known = build_config(published, preset), VideoXLConfig.from_dict(preset)
    side = known.vision_config.image_size
    grids = [[side * columns, side * rows] for columns in range(1, 7) for rows in range(1, 7)]
    assert read.image_grid_pinpoints == grids and known.image_grid_pinpoints is None  # which means the same
    read.image_grid_pinpoints = None
    assert read.to_dict() == known.to_dict()
    # What a config takes from either is compared above; here what both say by the same name.
    stated = {**preset["text_config"], **preset, "rope_theta": preset["text_config"]["rope_parameters"]["rope_theta"]}
    same = {key: value for key, value in stated.items() if key in published and key != "model_type"}
    assert len(same) == 20 and same == {key: published[key] for key in same}


def test_what_the_two_published_models_are():
    read = {}
    for name in (TWO_B, ONE_M):
        read[name] = build_config(published_config(name), convert_weights.read_preset(name))
    two_b, one_m = read[TWO_B], read[ONE_M]
    assert (two_b.tie_word_embeddings, one_m.tie_word_embeddings) == (True, False)
    assert (two_b.text_config.rms_norm_eps, one_m.text_config.rms_norm_eps) == (1e-6, 1e-5)
    assert one_m.text_config.rope_parameters["rope_theta"] == 1e7
    # Positions reach a million, and a prompt no further than the published code cuts it.
    assert one_m.text_config.max_position_embeddings == 1010000 and one_m.resolve_context_limit()[0] == 32768
    two_b.mm_llm_compress = one_m.mm_llm_compress = True
    assert two_b.resolve_llm_compression() == {"type": "attention", "layers": [24], "ratios": [1.0, 0.5]}
    assert one_m.resolve_llm_compression()["layers"] == [8, 16, 24]


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("model_type", ["qwen2", "llava_qwen", "videochat_flash_qwen", None])
def test_a_published_config_is_refused_with_what_to_do(model_type):
    for published in (
        published_config(ONE_M, model_type=model_type),
        json.loads((FIXTURES / "videoxl2" / "checkpoint" / "config.json").read_text()) | {"model_type": model_type},
    ):
        with pytest.raises(ValueError, match=r"python convert_weights\.py SOURCE OUTPUT.*videoxl convert"):
            VideoXLConfig.from_dict(published)


def test_our_own_and_plain_configs_are_not_taken_for_published_ones():
    ours = VideoXLConfig(mm_llm_compress=False).to_dict()
    assert VideoXLConfig.from_dict(ours).to_dict() == ours
    assert VideoXLConfig.from_dict({"mm_llm_compress": False}).to_dict() == ours
    with pytest.raises(ValueError, match="no text_config"):
        VideoXLConfig.from_dict({"model_type": "qwen2", "hidden_size": 64})


def test_a_plain_language_model_is_refused(make_published, tmp_path):
    source, _ = make_published(ONE_M, random_head)
    config = json.loads((source / "config.json").read_text())
    plain = {key: value for key, value in config.items() if not key.startswith("mm_")}
    (source / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"model_type 'qwen2'\) has no mm_\* keys.*plain language model"):
        convert(source, tmp_path / "output")


def test_video_xl_2_may_call_itself_qwen2_and_its_tower_by_a_path(tmp_path):
    """As its users report of the published folder."""
    source, golden = tmp_path / "video_xl_2", FIXTURES / "videoxl2" / "checkpoint"
    source.mkdir()
    config = json.loads((golden / "config.json").read_text())
    config |= {"model_type": "qwen2", "mm_vision_tower": "/home/authors/google/siglip-so400m-patch14-384"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes((golden / "model.safetensors").read_bytes())
    output = convert(source, tmp_path / "output")
    assert converted_tensors(output).keys() == converted_tensors(convert(golden, tmp_path / "again")).keys()
    assert (output / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    assert "/home/authors" not in (output / "config.json").read_text()


# ------------------------------------------------------------------------------------------------ whole folders


def test_the_2b_is_converted_with_its_embeddings_tied(make_published, tmp_path):
    source, tensors = make_published(TWO_B, lambda embedding: embedding)
    report = []
    output = convert(source, tmp_path / "flash_two_b", log=report.append)
    assert [line for line in report if "lm_head.weight is a copy" in line]
    assert [line for line in report if line.startswith("generation_config.json: answers are sampled")]
    assert not [line for line in report if "dropped" in line or "left out, as" in line]
    assert not list(output.glob("*.bin")) and not (output / "modeling_videochat_flash.py").exists()
    written, table = converted_tensors(output), name_table("videochatflash")
    assert {table.to_published(name) for name in written} == tensors.keys() - {HEAD}
    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(map(torch.numel, written.values()))
    assert (model.config.llm_compress_layer_list, model.config.llm_image_token_ratio_list) == ([24], [1.0, 0.5])
    # The penalty holds for greedy answers, too, as it does in the published code.
    generation = model.generation_config
    assert (generation.do_sample, generation.temperature, generation.repetition_penalty) == (True, 0.7, 1.1)
    assert (generation.top_p, generation.top_k, generation.eos_token_id) == (0.8, 20, [151645, 151643])
    model.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    assert again.lm_head.weight is again.model.language_model.embed_tokens.weight
    assert again.generation_config.to_diff_dict() == generation.to_diff_dict()


def random_head(embedding):
    return torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def last_value_changed(embedding):
    embedding[-1, -1] += 1
    return embedding


# What a folder stores as its head, given the embedding: what config.json says (None: nothing), whether the result ties
# the two, and what the report says of the head.
HEADS = {
    "none": (lambda embedding: None, True, True, None),
    "none, the preset ties": (lambda embedding: None, None, True, None),
    "a copy": (lambda embedding: embedding, True, True, "is a copy of model.embed_tokens.weight"),
    "a copy, the preset ties": (lambda embedding: embedding, None, True, "is a copy of model.embed_tokens.weight"),
    "a copy in another precision": (lambda embedding: embedding.float(), True, True, "is a copy of"),
    "a copy that nobody ties": (lambda embedding: embedding, False, False, None),
    "another": (random_head, True, False, "differs from .* tie_word_embeddings: false"),
    "another, the preset ties": (random_head, None, False, "differs from model.embed_tokens.weight"),
    "another in one value": (last_value_changed, True, False, "differs from model.embed_tokens.weight"),
    "another in precision": (lambda embedding: embedding.float() * (1 + 1e-5), True, False, "differs from"),
    "another that nobody ties": (random_head, False, False, None),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_stored_head_decides_whether_embeddings_are_tied(make_published, tmp_path, head):
    make, stated, tied, said = HEADS[head]
    source, tensors = make_published(TWO_B, make, tie_word_embeddings=stated)
    report = []
    output = convert(source, tmp_path / f"flash_head_{list(HEADS).index(head)}", log=report.append)
    lines = [line for line in report if HEAD in line]
    assert len(lines) == (said is not None) and all(re.search(said, line) for line in lines)
    assert json.loads((output / "config.json").read_text())["tie_word_embeddings"] is tied
    written = converted_tensors(output)
    assert (HEAD in written) is not tied and (tied or torch.equal(written[HEAD], tensors[HEAD]))
    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    embedding = model.model.language_model.embed_tokens.weight
    assert torch.equal(embedding, tensors[EMBEDDING])
    assert (model.lm_head.weight is embedding) is tied
    assert tied or torch.equal(model.lm_head.weight, tensors[HEAD].to(model.dtype))


def test_a_head_that_nobody_ties_must_be_there(make_published, tmp_path):
    source, _ = make_published(TWO_B, lambda embedding: None, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight \(256, 64\): only with tie_word_embeddings true"):
        convert(source, tmp_path / "output")


def test_the_1m_is_converted_and_the_report_is_printed(make_published, tmp_path, capsys):
    source, tensors = make_published(ONE_M, random_head)
    output = tmp_path / "flash_one_m"
    assert convert_weights.main([str(source), str(output), "--max-shard-size", "500KB"]) == 0
    printed = capsys.readouterr().out
    assert "config.json: dual_chunk_attention_config is dropped" in printed
    assert "repetition_penalty 1.05" in printed and "lm_head" not in printed
    assert "dual_chunk" not in (output / "config.json").read_text()
    written, table = converted_tensors(output), name_table("videochatflash")
    assert {table.to_published(name): tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    assert all(torch.equal(tensor, tensors[table.to_published(name)]) for name, tensor in written.items())
    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    text = model.config.text_config
    assert (text.rms_norm_eps, text.rope_parameters["rope_theta"]) == (1e-5, 1e7)
    assert model.config.resolve_context_limit()[0] == 32768


def test_a_scaling_that_is_never_applied_is_reported(tmp_path):
    source, golden = tmp_path / "video_xl", FIXTURES / "videoxl1" / "checkpoint"
    source.mkdir()
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = json.loads((golden / "config.json").read_text()) | {"rope_scaling": scaling}
    (source / "config.json").write_text(json.dumps(config))
    (source / "model.safetensors").write_bytes((golden / "model.safetensors").read_bytes())
    report = []
    convert(source, tmp_path / "output", log=report.append)
    assert [line for line in report if line.startswith("config.json: rope_scaling is dropped")]
