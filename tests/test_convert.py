"""The converter accounts for every tensor, writes whole folders or nothing, and says what is wrong with a source."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from goldens import FIXTURES
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer
from videoxl.configuration_videoxl import VideoXLConfig
from videoxl.hub import convert as convert_weights
from videoxl.hub import families
from videoxl.hub.convert import convert, name_table, recognise_family

CHECKPOINT = FIXTURES / "videoxl2" / "checkpoint"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Goldens have no tokenizer.
pytestmark = pytest.mark.filterwarnings("ignore:.*need the tokenizer")


@pytest.fixture
def tensors():
    """The tensors of the shipped golden checkpoint, to be changed at will."""
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture
def make_source(tmp_path):
    """Writes a published checkpoint: the shipped one or other tensors, in one file or several, with config changes."""

    def make(tensors=None, shards=1, **config):
        source = tmp_path / "source"
        source.mkdir()
        published = json.loads((CHECKPOINT / "config.json").read_text()) | config
        (source / "config.json").write_text(json.dumps(published))
        tensors = load_file(CHECKPOINT / "model.safetensors") if tensors is None else tensors
        if shards == 1:
            save_file(tensors, source / "model.safetensors")
            return source
        place = {name: f"model-{number % shards + 1:05}.safetensors" for number, name in enumerate(tensors)}
        for file in set(place.values()):
            save_file({name: tensor for name, tensor in tensors.items() if place[name] == file}, source / file)
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
        return source

    return make


def converted_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_nothing_left(tmp_path):
    """Neither the output nor a temporary folder is there."""
    assert not [path.name for path in tmp_path.iterdir() if path.name != "source"]


# ------------------------------------------------------------------------------------------------ names and shapes


class Manifest(dict):
    """Name -> shape of a published checkpoint's tensors."""

    def add(self, name, *shape, bias=True):
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = shape[:1]

    def add_language_model(self, layers, hidden, mlp, key_values, vocabulary, beacons=False, head=True):
        self.add("model.embed_tokens", vocabulary, hidden, bias=False)
        self.add("model.norm", hidden, bias=False)
        if head:
            self.add("lm_head", vocabulary, hidden, bias=False)
        for layer in (f"model.layers.{number}" for number in range(layers)):
            for kind in ("", "beacon_") if beacons else ("",):
                self.add(f"{layer}.self_attn.{kind}q_proj", hidden, hidden)
                self.add(f"{layer}.self_attn.{kind}k_proj", key_values, hidden)
                self.add(f"{layer}.self_attn.{kind}v_proj", key_values, hidden)
            self.add(f"{layer}.self_attn.o_proj", hidden, hidden, bias=False)
            self.add(f"{layer}.mlp.gate_proj", mlp, hidden, bias=False)
            self.add(f"{layer}.mlp.up_proj", mlp, hidden, bias=False)
            self.add(f"{layer}.mlp.down_proj", hidden, mlp, bias=False)
            self.add(f"{layer}.input_layernorm", hidden, bias=False)
            self.add(f"{layer}.post_attention_layernorm", hidden, bias=False)
        if beacons:
            self["model.beacon_embed_tokens.weight"] = (1, hidden)

    def add_tower(self, layers, hidden, mlp, positions):
        tower = "model.vision_tower.vision_tower.vision_model"
        self.add(f"{tower}.embeddings.position_embedding", positions, hidden, bias=False)
        self.add(f"{tower}.post_layernorm", hidden)
        for layer in (f"{tower}.encoder.layers.{number}" for number in range(layers)):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                self.add(f"{layer}.self_attn.{part}", hidden, hidden)
            self.add(f"{layer}.layer_norm1", hidden)
            self.add(f"{layer}.layer_norm2", hidden)
            self.add(f"{layer}.mlp.fc1", mlp, hidden)
            self.add(f"{layer}.mlp.fc2", hidden, mlp)
        return tower

    def add_siglip_and_dts(self, hidden):
        tower = self.add_tower(26, 1152, 4304, 729)
        self.add(f"{tower}.embeddings.patch_embedding", 1152, 3, 14, 14)
        self["model.sae.temporal_encoding"] = (4, 1152)
        for spatial, temporal, convolution in ((0, 1, 2), (3, 4, 5)):
            self.add(f"model.sae.encoder.{spatial}.norm", 1152)
            for part in ("q", "k", "v", "proj_out"):
                self.add(f"model.sae.encoder.{spatial}.{part}", 1152, 1152, 1, 1, 1)
            self.add(f"model.sae.encoder.{temporal}.norm", 1152)
            self.add(f"model.sae.encoder.{temporal}.qkv", 3456, 1152, 1)
            self.add(f"model.sae.encoder.{temporal}.proj_out", 1152, 1152, 1)
            for table in ("relative_position_k", "relative_position_v"):
                self[f"model.sae.encoder.{temporal}.{table}.embeddings_table"] = (129, 1152)
            self.add(f"model.sae.encoder.{convolution}.conv", 1152, 1152, 3, 3, 3)
        self.add("model.mm_projector.0", hidden, 1152)
        self.add("model.mm_projector.2", hidden, hidden)


def published_video_xl_2():
    """The 805 tensors of BAAI/Video-XL-2, as the public model classes build them."""
    shapes = Manifest()
    shapes.add_language_model(28, 3584, 18944, 512, 152064)
    shapes.add_siglip_and_dts(3584)
    return shapes


def published_video_xl():
    """Video-XL, as the public model classes build it with the tower's last layer taken."""
    shapes = Manifest()
    shapes.add_language_model(28, 3584, 18944, 512, 152064, beacons=True)
    tower = shapes.add_tower(24, 1024, 4096, 577)
    shapes.add(f"{tower}.embeddings.patch_embedding", 1024, 3, 14, 14, bias=False)
    shapes[f"{tower}.embeddings.class_embedding"] = (1024,)
    shapes.add(f"{tower}.pre_layrnorm", 1024)
    shapes.add("model.mm_projector.0", 3584, 1024)
    shapes.add("model.mm_projector.2", 3584, 3584)
    return shapes


def published_video_xl_pro(beacons):
    """Video-XL-Pro of March 2025 (with beacons) or of April 2025; the head is the embedding."""
    shapes = Manifest()
    shapes.add_language_model(36, 2048, 11008, 256, 151936, beacons=beacons, head=False)
    shapes.add_siglip_and_dts(2048)
    shapes.add("model.text_mlp.0", 2048, 2048)
    if not beacons:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes.add(f"model.WindowTimeToTokenAttention.{part}", 2048, 2048)
    return shapes


@pytest.mark.parametrize(
    ("family", "published", "count", "parameters"),
    [
        ("videoxl2", published_video_xl_2(), 805, 8_123_871_520),
        ("videoxl1", published_video_xl(), None, None),
        ("videoxlpro", published_video_xl_pro(beacons=False), None, None),
        ("videoxlpro_march", published_video_xl_pro(beacons=True), None, None),
    ],
)
def test_at_true_size_a_member_has_exactly_the_published_tensors(family, published, count, parameters):
    table = name_table(family)
    assert recognise_family({"mm_hidden_size": 1}, published) == family
    preset = json.loads((convert_weights.PRESETS / f"{table.presets[0]}.json").read_text())
    config = VideoXLConfig.from_dict(preset)
    ours = convert_weights.expected_shapes(config)
    if config.tie_word_embeddings:
        del ours[HEAD]
    wanted = {name: shape for name, shape in published.items() if not table.ignores(name)}
    assert {table.to_published(name): shape for name, shape in ours.items()} == wanted
    assert {name: table.to_ours(table.to_published(name)) for name in ours} == {name: name for name in ours}
    if count is not None:
        assert len(published) == count
        assert sum(torch.Size(shape).numel() for shape in published.values()) == parameters
    assert config.compressor_config.tokens_per_group == 144
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    extra = {name: shape for name, shape in published.items() if "beacon" in name}
    # 28 layers of 7B and 36 of 3B, with biases, and the one embedding.
    expected = {"videoxl1": 462_554_624, "videoxlpro_march": 188_837_888}.get(family, 0)
    assert sum(torch.Size(shape).numel() for shape in extra.values()) == expected


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("videoxl2", ["model.sae.temporal_encoding", "model.text_mlp.0.weight"]),
        ("videoxlpro", ["model.sae.temporal_encoding", "model.WindowTimeToTokenAttention.q_proj.weight"]),
        (
            "videoxlpro_march",
            ["model.sae.temporal_encoding", "model.text_mlp.0.weight", "model.beacon_embed_tokens.weight"],
        ),
        ("videoxl1", ["model.beacon_embed_tokens.weight", "model.mm_projector.0.weight"]),
        ("videochatflash", ["model.mm_projector.mlp.0.weight"]),
    ],
)
def test_families_are_told_apart(family, names):
    published = {"model_type": "llava_qwen", "mm_projector_type": "mlp2x_gelu"}
    assert recognise_family(published, [EMBEDDING, *names]) == family


@pytest.mark.parametrize(
    ("published", "names", "message"),
    [
        (
            {"model_type": "llava_qwen", "mm_hidden_size": 64},
            [EMBEDDING],
            "known family .*llava_qwen.* names of the t",
        ),
        ({"model_type": "qwen2"}, [EMBEDDING], r"'qwen2'\) has no mm_\* keys, .*plain language model"),
        ({"model_type": "llava_qwen"}, ["model.sae.temporal_encoding"], r"has no mm_\* keys"),
        ({"model_type": "videoxl"}, ["model.compressor.temporal_encoding"], "already in our format"),
    ],
)
def test_other_checkpoints_are_refused(published, names, message):
    with pytest.raises(ValueError, match=message):
        recognise_family(published, names)


def test_unknown_and_unsupported_families_are_refused(make_source, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown family"):
        name_table("videoxl3")
    unsupported = dataclasses.replace(families.FAMILIES["videoxl2"], presets=())
    monkeypatch.setitem(families.FAMILIES, "videoxl2", unsupported)
    with pytest.raises(ValueError, match="Video-XL-2 .*not supported yet"):
        convert(make_source(), tmp_path / "output")
    assert_nothing_left(tmp_path)


# ------------------------------------------------------------------------------------------------ what is written


def test_a_converted_folder_is_complete(make_source, tensors, tmp_path, root):
    output = convert(make_source(), tmp_path / "output")
    assert output == tmp_path / "output"
    table = name_table("videoxl2")
    written = converted_tensors(output)
    assert {table.to_published(name) for name in written} == {name for name in tensors if "text_mlp" not in name}
    assert all(torch.equal(tensor, tensors[table.to_published(name)]) for name, tensor in written.items())

    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["VideoXLForConditionalGeneration"]
    assert set(config["auto_map"]) >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoProcessor"}
    processor = json.loads((output / "processor_config.json").read_text())
    assert (processor["image_size"], processor["tokens_per_group"], processor["frames_per_group"]) == (56, 144, 4)
    assert (output / "chat_template.jinja").read_text() == (root / "chat_template.jinja").read_text()
    code = {path.name for path in output.glob("*.py")}
    assert {"modeling_videoxl.py", "configuration_videoxl.py", "processing_videoxl.py"} <= code
    assert not code & {"convert_weights.py", "cli.py"}
    card = ModelCard.load(output / "README.md")
    assert (card.data.base_model, card.data.license) == (["BAAI/Video-XL-2"], "apache-2.0")
    # The licence of the code must not look like that of the weights.
    assert [path.name for path in output.glob("LICENSE*")] == ["LICENSE-CODE"]
    assert {path.stat().st_mode for path in output.iterdir()} == {(output / "config.json").stat().st_mode}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_weights_keep_their_licence(make_source, tmp_path):
    source = make_source()
    (source / "LICENSE").write_text("theirs")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: theirs\nlicense_link: LICENSE\n---\n# Theirs\n"
    )
    output = convert(source, tmp_path / "output")
    assert (output / "LICENSE").read_text() == "theirs" and (output / "LICENSE-CODE").is_file()
    data = ModelCard.load(output / "README.md").data
    assert (data.license, data.license_name, data.license_link) == ("other", "theirs", "LICENSE")


def test_shards_in_and_out(make_source, tensors, tmp_path):
    source = make_source(shards=3)
    table = name_table("videoxl2")
    output = convert(source, tmp_path / "sharded_videoxl2", max_shard_size="500KB")
    index = json.loads((output / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert all((output / file).stat().st_size < 600_000 for file in files)
    written = converted_tensors(output)
    assert index["weight_map"].keys() == written.keys()
    assert all(torch.equal(tensor, tensors[table.to_published(name)]) for name, tensor in written.items())
    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    assert all(torch.equal(parameter, written[name]) for name, parameter in model.named_parameters())


def test_dtype(make_source, tmp_path):
    output = convert(make_source(), tmp_path / "bfloat16_videoxl2", dtype="bfloat16")
    assert {tensor.dtype for tensor in converted_tensors(output).values()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(output, trust_remote_code=True).dtype == torch.bfloat16
    assert AutoModel.from_pretrained(output, trust_remote_code=True).dtype == torch.bfloat16


def test_dtype_of_a_silent_config_is_the_stored_one(make_source, tensors, tmp_path):
    source = make_source({name: tensor.half() for name, tensor in tensors.items()}, torch_dtype=None)
    assert json.loads((convert(source, tmp_path / "output") / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize("with_head", [False, True])
def test_tied_embeddings(make_source, tensors, tmp_path, with_head):
    del tensors[HEAD]
    if with_head:
        tensors[HEAD] = tensors[EMBEDDING].clone()
    output = convert(make_source(tensors, tie_word_embeddings=True), tmp_path / f"tied_{with_head}")
    assert HEAD not in converted_tensors(output)
    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors[EMBEDDING])


def test_the_report_names_what_is_left_out(make_source, tensors, tmp_path):
    report, frequencies = [], [f"model.layers.{number}.self_attn.rotary_emb.inv_freq" for number in range(3)]
    source = make_source(tensors | {name: torch.ones(8) for name in frequencies})
    written = converted_tensors(convert(source, tmp_path / "output", log=report.append))
    assert not [name for name in written if "inv_freq" in name]
    (line,) = (line for line in report if "left out" in line)
    assert all(name in line for name in [*frequencies, "model.text_mlp.0.weight"])


def test_tokenizer_and_generation_config_come_along(make_source, tmp_path, root, recwarn):
    ids = Tokenizer.from_file(str(root / "tokenizer.json"))
    source = make_source(
        video_token_id=ids.token_to_id("<|vision_pad|>"),
        time_start_token_id=ids.encode("Time 0.0s:").ids[0],
        time_end_token_id=ids.encode("Time 0.0s:").ids[-1],
    )
    shutil.copy(root / "tokenizer.json", source)
    settings = json.loads((root / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "another family's"}))
    (source / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05}))
    (source / "pytorch_model.bin").write_bytes(b"not looked at: there are safetensors")
    output = convert(source, tmp_path / "with_tokenizer")
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    assert json.loads((output / "generation_config.json").read_text()) == {"repetition_penalty": 1.05}
    assert not (output / "pytorch_model.bin").exists()

    tokenizer = AutoTokenizer.from_pretrained(output, trust_remote_code=True)
    assert tokenizer("Time 4.0s:")["input_ids"] == ids.encode("Time 4.0s:").ids
    assert "chat_template" not in json.loads((output / "tokenizer_config.json").read_text())
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert (processor.video_token, processor.tokens_per_group, processor.image_size) == ("<|vision_pad|>", 144, 56)


def test_rows_for_a_marker_are_cut(tmp_path):
    source = tmp_path / "video_xl"
    shutil.copytree(FIXTURES / "videoxl1" / "checkpoint", source)
    tensors = load_file(source / "model.safetensors")
    longer = {name: torch.cat([tensors[name], torch.ones(1, 64)]) for name in (EMBEDDING, HEAD)}
    save_file(tensors | longer, source / "model.safetensors")
    written = converted_tensors(convert(source, tmp_path / "output"))
    table = name_table("videoxl1")
    assert all(torch.equal(written[table.to_ours(name)], tensors[name]) for name in longer)
    save_file(tensors | {HEAD: torch.ones(258, 64)}, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(258, 64\), expected is \(256, 64\)"):
        convert(source, tmp_path / "other")


def test_a_config_with_the_markers_row_and_a_rope_scaling(tmp_path, monkeypatch):
    """Saved with the appended row, and with a scaling that the published code of this member never applies."""
    source = tmp_path / "video_xl"
    shutil.copytree(FIXTURES / "videoxl1" / "checkpoint", source)
    tensors = load_file(source / "model.safetensors")
    longer = {name: torch.cat([tensors[name], torch.ones(1, 64)]) for name in (EMBEDDING, HEAD)}
    save_file(tensors | longer, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 257, "rope_scaling": scaling}))
    read = convert_weights.read_preset

    def small(name):
        preset = read(name)
        preset["text_config"]["vocab_size"] = 256
        return preset

    monkeypatch.setattr(convert_weights, "read_preset", small)
    output = convert(source, tmp_path / "output")
    text = json.loads((output / "config.json").read_text())["text_config"]
    assert text["vocab_size"] == 256 and text["rope_parameters"]["rope_type"] == "default"
    assert all(len(converted_tensors(output)[name_table("videoxl1").to_ours(name)]) == 256 for name in longer)


def test_layers_above_the_one_that_is_taken_are_accounted_for(tmp_path):
    source = tmp_path / "video_xl"
    shutil.copytree(FIXTURES / "videoxl1" / "checkpoint", source)
    tensors = load_file(source / "model.safetensors")
    unused = [name for name in tensors if ".encoder.layers.2." in name]
    written = converted_tensors(convert(source, tmp_path / "output"))
    assert len(unused) == 16 and len(written) == len(tensors) - len(unused)
    beyond = {name.replace(".layers.2.", ".layers.3."): tensors[name].clone() for name in unused}
    save_file(tensors | beyond, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown tensor .*encoder.layers.3\."):
        convert(source, tmp_path / "other")


def test_a_tokenizer_without_a_placeholder_gets_one(make_source, tmp_path, test_data):
    """Qwen2's tokenizer is Qwen2.5's without the special tokens behind the first three."""
    output = tmp_path / "with_placeholder"
    source = tmp_path / "video_xl"
    shutil.copytree(FIXTURES / "videoxl1" / "checkpoint", source)
    vocabulary = json.loads((test_data / "data" / "tokenizer" / "tokenizer.json").read_text())
    vocabulary["added_tokens"] = [token for token in vocabulary["added_tokens"] if token["id"] < 151646]
    (source / "tokenizer.json").write_text(json.dumps(vocabulary))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": "another one"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, output)
    processor = AutoProcessor.from_pretrained(output, trust_remote_code=True)
    assert (processor.video_token, processor.video_token_id) == ("<|vision_pad|>", 151646)
    assert (processor.frame_fit, processor.time_format, processor.tokens_per_group) == ("crop", None, 16)
    messages = [{"role": "user", "content": [{"type": "video", "video": ""}, {"type": "text", "text": "Hello"}]}]
    # The 14 tokens in front of the video that the published code counts on.
    assert len(processor.prompt_pieces(processor.render(messages))[0]) == 14
    assert "chat_template" not in json.loads((output / "tokenizer_config.json").read_text())


def test_the_real_tokenizer_fits_the_preset(make_source, tmp_path, test_data, recwarn):
    source = make_source(video_token_id=151654, time_start_token_id=1462, time_end_token_id=25)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(test_data / "data" / "tokenizer" / file, source / file)
    output = convert(source, tmp_path / "real_tokenizer")
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    assert json.loads((output / "processor_config.json").read_text())["video_token"] == "<|vision_pad|>"


@pytest.mark.filterwarnings("default")
def test_a_missing_or_foreign_tokenizer_is_a_warning(make_source, tmp_path, root):
    source = make_source()
    with pytest.warns(UserWarning, match=r"no tokenizer\.json .*tokenizer_config\.json"):
        convert(source, tmp_path / "without")
    shutil.copy(root / "tokenizer.json", source)
    shutil.copy(root / "tokenizer_config.json", source)
    with pytest.warns(UserWarning, match="does not fit its weights"):
        convert(source, tmp_path / "foreign")
    assert "video_token" not in json.loads((tmp_path / "foreign" / "processor_config.json").read_text())


def test_the_command_line(make_source, tmp_path, root):
    script = [sys.executable, str(root / "convert_weights.py")]
    source = make_source()
    done = subprocess.run([*script, "source", "new/output", "--dtype", "float16"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / "output" / "model.safetensors").is_file()
    failed = subprocess.run([*script, source, tmp_path / "new"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "is not empty" in failed.stderr and "Traceback" not in failed.stderr


def test_a_hub_id_is_fetched_without_pickles(make_source, tmp_path, monkeypatch):
    source, asked = make_source(), {}

    def snapshot_download(repo_id, allow_patterns):
        asked[repo_id] = allow_patterns
        return str(source)

    monkeypatch.setattr(convert_weights, "snapshot_download", snapshot_download)
    assert (convert("BAAI/Video-XL-2", tmp_path / "output") / "model.safetensors").is_file()
    assert list(asked) == ["BAAI/Video-XL-2"]
    assert not [pattern for pattern in asked["BAAI/Video-XL-2"] if pattern.endswith((".bin", ".py", "*"))]


# ------------------------------------------------------------------------------------------------ bad input


def rename(tensors, old, new):
    tensors[new] = tensors.pop(old)


BAD_TENSORS = {
    "unknown": (lambda t: t.update(surprise=torch.zeros(3)), r"unknown tensor surprise \(3,\)"),
    "unknown layer": (
        lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.zeros(96, 64)}),
        r"unknown tensor model\.layers\.3\.mlp",
    ),
    "our name": (
        lambda t: rename(t, EMBEDDING, "model.language_model.embed_tokens.weight"),
        "unknown tensor model.lang",
    ),
    "missing": (lambda t: t.pop("model.mm_projector.2.bias"), r"lacks model\.mm_projector\.2\.bias \(64,\)"),
    "missing head": (lambda t: t.pop(HEAD), r"lacks lm_head\.weight .*only with tie_word_embeddings true"),
    "no tower": (
        lambda t: [t.pop(name) for name in list(t) if "vision_tower" in name],
        r"lacks model\.vision_tower\.vision_tower.* and \d+ more: the whole vision tower is not in it",
    ),
    "shape": (lambda t: t.update({HEAD: torch.zeros(256, 32)}), r"lm_head\.weight has shape \(256, 32\).*\(256, 64\)"),
    "integers": (lambda t: t.update({HEAD: torch.zeros(256, 64, dtype=torch.int8)}), "stored as I8"),
}


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_every_tensor_is_accounted_for(make_source, tensors, tmp_path, change, message):
    change(tensors)
    with pytest.raises(ValueError, match=message):
        convert(make_source(tensors), tmp_path / "output")
    assert_nothing_left(tmp_path)


def test_values_beyond_the_asked_dtype(make_source, tensors, tmp_path):
    tensors[HEAD][0, 0] = 1e6
    with pytest.raises(ValueError, match="lm_head.weight has values beyond the range of float16"):
        convert(make_source(tensors), tmp_path / "output", dtype="float16")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": "64"}, "config.json cannot be read .*hidden_size"),
        ({"vision_config": [64]}, "config.json cannot be read"),
        ({"torch_dtype": "float31"}, "config.json cannot be read .*float31"),
        ({"num_attention_heads": 0}, "no model can be built"),
        ({"mm_hidden_size": 48}, "no model can be built .*48"),
        ({"num_hidden_layers": 2}, "unknown tensor model.layers.2"),
        ({"num_hidden_layers": 4}, "lacks model.layers.3"),
    ],
)
def test_configs_that_do_not_fit(make_source, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        convert(make_source(**config), tmp_path / "output")
    assert_nothing_left(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def edit_index(change):
    def edit(source):
        path = source / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return edit


def only_pickle(source):
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")


BAD_SOURCES = {
    "no config": (lambda s: (s / "config.json").unlink(), FileNotFoundError, "config.json is missing"),
    "torn config": (lambda s: truncate(s / "config.json"), ValueError, "config.json is not valid JSON"),
    "list config": (lambda s: (s / "config.json").write_text("[]"), ValueError, "must hold a JSON object, got list"),
    "truncated shard": (lambda s: truncate(s / "model-00002.safetensors"), ValueError, "00002.* damaged or truncated"),
    "garbage shard": (
        lambda s: (s / "model-00002.safetensors").write_bytes(b"<html>not found</html>"),
        ValueError,
        "00002.* damaged or truncated",
    ),
    "empty shard": (lambda s: (s / "model-00002.safetensors").write_bytes(b""), ValueError, "00002.* damaged"),
    "missing shard": (lambda s: (s / "model-00002.safetensors").unlink(), FileNotFoundError, "lacks model-00002"),
    "no index": (
        lambda s: (s / "model.safetensors.index.json").unlink(),
        FileNotFoundError,
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "index without map": (
        lambda s: (s / "model.safetensors.index.json").write_text("{}"),
        ValueError,
        "has no weight_map",
    ),
    "index out of the folder": (
        edit_index(lambda weight_map: weight_map.update({HEAD: "../other.safetensors"})),
        ValueError,
        "outside its folder",
    ),
    "index of another tensor": (
        edit_index(lambda weight_map: rename(weight_map, HEAD, "lm_head.bias")),
        ValueError,
        "disagree about lm_head.bias, lm_head.weight",
    ),
    "only a pickle": (only_pickle, ValueError, "pytorch_model.bin is a pickle, which can run code"),
    "no weights": (lambda s: [path.unlink() for path in s.glob("model*")], FileNotFoundError, "has no weights"),
    "broken tokenizer": (
        lambda s: [(s / name).write_text("{}") for name in ("tokenizer.json", "tokenizer_config.json")],
        ValueError,
        "tokenizer files of .* cannot be read",
    ),
}


@pytest.mark.parametrize(("damage", "error", "message"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_damaged_sources(make_source, tmp_path, damage, error, message):
    source = make_source(shards=3)
    damage(source)
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "output")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("./no_such_folder", FileNotFoundError, "neither an existing folder nor a Hub id"),
        ("/no/such/folder", FileNotFoundError, "neither an existing folder nor a Hub id"),
        ("model.safetensors", ValueError, "is a file; give the folder"),
        ("pytorch_model.bin", ValueError, "is a pickle"),
    ],
)
def test_sources_that_are_no_folder(tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    for file in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "output")


def test_a_hub_id_that_cannot_be_fetched(tmp_path, monkeypatch):
    def snapshot_download(repo_id, allow_patterns):
        raise convert_weights.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(convert_weights, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="could not be fetched from the Hub"):
        convert("no/such", tmp_path / "output")


def test_outputs_that_cannot_be_used(make_source, tmp_path):
    source = make_source()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (source / "empty").mkdir()
    for output, message in (
        (tmp_path / "full", "is not empty"),
        (tmp_path / "full" / "thesis.txt", "is a file"),
        (source, "is not empty"),
        (source / "new" / "output", "lies inside SOURCE"),
        (source / "empty", "lies inside SOURCE"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, output)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["thesis.txt"]
    (tmp_path / "there").mkdir()
    assert (convert(source, tmp_path / "there") / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "../secret"}, "no preset '../secret'; known are .*video-xl-2-8b"),
        ({"dtype": "int8"}, "dtype must be one of float32"),
        ({"max_shard_size": "huge"}, "huge"),
    ],
)
def test_bad_options(make_source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        convert(make_source(), tmp_path / "output", **options)
    assert_nothing_left(tmp_path)


def test_an_interruption_leaves_nothing(make_source, tmp_path, monkeypatch):
    def save_file(tensors, path: Path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("videoxl.hub.tensors.save_file", save_file)
    with pytest.raises(KeyboardInterrupt):
        convert(make_source(), tmp_path / "output")
    assert_nothing_left(tmp_path)
