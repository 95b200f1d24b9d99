"""The doors: Auto classes from a folder, from a simulated Hub cache without network, and after save_pretrained.

Every variant runs in a process of its own: transformers reuses remote code within one process.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from transformers import AutoConfig, AutoModel

SCRIPT = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
import transformers
import transformers.modeling_utils  # imports accelerate by itself where that is installed
theirs = set(sys.modules)
source, clip, save_to = sys.argv[1:]
options = {"trust_remote_code": True}
model, loading = AutoModel.from_pretrained(source, output_loading_info=True, **options)
tokenizer = AutoTokenizer.from_pretrained(source, **options)
processor = AutoProcessor.from_pretrained(source, **options)
names = [type(model).__name__]
others = [AutoModelForCausalLM, AutoModelForImageTextToText, getattr(transformers, "AutoModelForMultimodalLM", None)]
names += [type(auto.from_pretrained(source, **options)).__name__ for auto in others if auto is not None]
settings = {"max_new_tokens": 6, "min_new_tokens": 6}
answer = model.chat(clip, tokenizer, "What moves?", return_history=False, max_num_frames=8, generation_config=settings)
text = processor.apply_chat_template(
    [{"role": "user", "content": "Who are you?"}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
).to(model.device)
reply = processor.decode(model.generate(**text, max_new_tokens=4)[0][text["input_ids"].shape[-1]:])
if save_to != "-":
    for part in (model, tokenizer, processor):
        part.save_pretrained(save_to)
optional = {"torchvision", "decord", "torchcodec", "flash_attn", "accelerate", "gradio", "peft", "bitsandbytes"}
optional |= {"torchao", "optimum", "matplotlib", "lmms_eval", "datasets"}
print(json.dumps({
    "names": names, "answer": answer, "reply": reply, "processor": type(processor).__name__,
    "missing": sorted(map(str, loading["missing_keys"])), "unexpected": sorted(map(str, loading["unexpected_keys"])),
    "optional": sorted(optional & (set(sys.modules) - theirs)), "dtype": str(model.dtype),
}))
"""


def load(source, clip, home, save_to="-"):
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(source), clip, str(save_to)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def repository(root, tmp_path_factory):
    """What a clone of the Hub repository holds: the root's files without folders that are not part of the model."""
    folder = tmp_path_factory.mktemp("clone") / "video-xl.small-1"
    folder.mkdir()
    for path in root.iterdir():
        if path.is_file() and path.suffix in {".py", ".json", ".jinja", ".safetensors"}:
            shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def from_folder(repository, clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return load(repository, clips[0], tmp_path_factory.mktemp("home"), folder), folder


def test_every_auto_class_gives_our_model(from_folder):
    result, _ = from_folder
    assert set(result["names"]) == {"VideoXLForConditionalGeneration"} and len(result["names"]) >= 3
    assert result["processor"] == "VideoXLProcessor"
    assert result["missing"] == result["unexpected"] == []
    assert isinstance(result["answer"], str) and result["reply"]
    assert result["dtype"] == "torch.float32"


def test_optional_packages_are_not_imported(from_folder):
    assert from_folder[0]["optional"] == []


def test_hub_cache_without_network_gives_the_same(from_folder, repository, clips, tmp_path):
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--video-xl-small"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(repository, cached / "snapshots" / revision)
    assert load("someone/video-xl-small", clips[0], tmp_path) == from_folder[0]


def test_saved_checkpoint_is_self_contained(from_folder, clips, tmp_path):
    result, folder = from_folder
    moved = shutil.copytree(folder, tmp_path / "fine-tuned")
    assert load(moved, clips[0], tmp_path / "home") == result


def test_a_folder_as_published_is_refused_with_what_to_do(repository, test_data, tmp_path):
    """Also where the code was put beside the published weights."""
    published = json.loads((test_data / "golden" / "videoxl2" / "checkpoint" / "config.json").read_text())
    folder = shutil.copytree(repository, tmp_path / "published")
    ours = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**published, "auto_map": ours["auto_map"]}))
    for auto in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match=r"python convert_weights\.py SOURCE OUTPUT"):
            auto.from_pretrained(folder, trust_remote_code=True)


def test_sparse_attention_settings_are_checked_and_published_switches_win():
    from videoxl.configuration_videoxl import VideoXLConfig

    config = VideoXLConfig()
    config.sparse_attention = {"prefill": "mask", "decode": "bilevel"}
    settings = config.resolve_sparse_attention()
    assert (settings.prefill, settings.chunk_groups, settings.window_chunks, settings.reload) == ("mask", 4, 3, "auto")
    config.enable_sparse, config.sparse_mode = True, "streaming"
    config.sparse_config = {"block_size_chosed": 6, "prev_blocks_num": 5}
    settings = config.resolve_sparse_attention()
    assert (settings.prefill, settings.chunk_groups, settings.window_chunks) == ("streaming", 6, 5)
    assert settings.decode == "bilevel"
    config.enable_sparse = False
    assert config.resolve_sparse_attention().prefill == "mask"
    config.enable_chunk_prefill = True
    config.prefill_config = {"chunk_prefill_mode": "streaming", "chunk_size": 2, "step_size": 1, "offload": True}
    settings = config.resolve_sparse_attention()
    assert (settings.prefill, settings.chunk_groups, settings.window_chunks) == ("streaming", 2, 1)
    for wrong in ({"prefil": "mask"}, {"prefill": "dense"}, {"chunk_groups": 0}, {"pool_size": 1.5}):
        with pytest.raises(ValueError, match="sparse_attention"):
            config.sparse_attention = wrong
    round_trip = VideoXLConfig.from_dict(config.to_dict())
    assert round_trip.to_dict() == config.to_dict()
