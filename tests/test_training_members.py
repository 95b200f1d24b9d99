"""Training of every member: what moves, adapters, what cannot be trained, packing, kept features, other trainers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("accelerate", reason="training needs accelerate")

from margins import TIE
from PIL import Image
from safetensors.torch import load_file
from training_setup import MEMBERS, fsdp_launcher, interrupted, member_folder
from transformers import AutoModel, AutoProcessor
from videoxl.training.batches import Collator, videos_of
from videoxl.training.collator import IGNORE
from videoxl.training.data import BrokenSample, MixtureDataset
from videoxl.training.merge_lora import merge
from videoxl.training.recipe import check_recipe, drawn, module_of, require_trainable
from videoxl.training.train import build_model, newest_checkpoint, run

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
CLIP = {"seconds": 4, "num_questions": 2}
BEACONS = ("pro_march", "videoxl")
TEXT_ONLY = (*BEACONS, "pro_april")
PARTS = {
    "videoxl2": {"vision_tower", "compressor", "projector", "language_model"},
    "pro_april": {"vision_tower", "compressor", "projector", "language_model", "token_selector"},
    "pro_march": {"vision_tower", "compressor", "projector", "language_model", "token_selector", "beacons"},
    "videoxl": {"vision_tower", "projector", "language_model", "beacons"},
    "flash_umt": {"vision_tower", "projector", "language_model"},
    "flash_internvideo2": {"vision_tower", "projector", "language_model"},
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folders(request, tmp_path_factory):
    """Folder of a member, made when it is asked for."""
    made = {}

    def folder(name):
        if name not in made:
            goldens = FIXTURES
            if name == "flash_internvideo2":
                goldens = request.getfixturevalue("test_data") / "golden"
            made[name] = member_folder(name, goldens, tmp_path_factory.mktemp(name) / f"tiny_{name}")
        return made[name]

    return folder


def world(size, split="train", fps=1, **clip):
    return {"world": {"size": size, "split": split, "clip": CLIP | clip, "sample_fps": fps}, "source": split}


def recipe_for(folder, output, **changes):
    recipe = {
        "model": str(folder), "data": [world(6)], "output_dir": str(output), "learning_rate": 1e-2, "batch_size": 2,
        "max_steps": 3, "warmup": 0, "scheduler": "constant", "logging_steps": 1, "save_steps": 100,
    }  # fmt: skip
    return check_recipe(recipe | changes)


def lora_for(name, **changes):
    return {"target": ["language_model", *(["beacons"] if name in BEACONS else [])], "r": 16, **changes}


def losses(trainer, key="loss"):
    return [line[key] for line in trainer.state.log_history if key in line]


def load(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True).eval()


@torch.no_grad()
def scores(model, sample):
    """Logits behind a sample's question, before its first answer."""
    ids = sample["input_ids"][None, : sample["answers"][0][0]]
    return model(ids, pixel_values_videos=sample["pixel_values_videos"], logits_to_keep=1).logits[0, -1].float()


@pytest.mark.parametrize("name", MEMBERS)
def test_full_training_moves_what_is_trained_and_nothing_else(folders, tmp_path, name):
    folder, parts = folders(name), PARTS[name]
    before = {name: tensor.clone() for name, tensor in load(folder).state_dict().items()}
    entries = {"keep_ratio": [0.7, 0.99]} if "token_selector" in parts else {}
    for frozen in ([], ["vision_tower", "language_model"]):
        recipe = recipe_for(
            folder, tmp_path / str(len(frozen)), modules=dict.fromkeys(frozen, "frozen"), member=entries, max_steps=2
        )
        trainer = run(recipe)
        after = trainer.model.state_dict()
        moved = {module_of(key) for key, tensor in before.items() if not torch.equal(tensor, after[key])}
        assert moved == parts - set(frozen)
        still = [key for key, p in trainer.model.named_parameters() if p.requires_grad and torch.equal(before[key], p)]
        # Tables of relative positions, of which few rows are used, and positions of images.
        assert not [key for key in still if "embeddings_table" not in key and "image_position" not in key], still
        assert trainer.model.config.beacon_seed == 42 and trainer.model.config.keep_seed is None


@pytest.mark.parametrize("name", MEMBERS)
def test_an_adapter_saves_merges_loads_and_answers_as_trained(folders, tmp_path, name):
    peft = pytest.importorskip("peft")
    folder = folders(name)
    trainer = run(recipe_for(folder, tmp_path / "adapter", lora=lora_for(name), max_steps=2))
    sample = trainer.train_dataset[0]
    model = trainer.model.eval()
    expected, plain = scores(model, sample), scores(load(folder), sample)
    assert (expected - plain).abs().max() > 1e-3
    adapted = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(scores(adapted, sample), expected, atol=1e-5, rtol=1e-4)
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(told) == Path(folder).resolve()
    merge(tmp_path / "adapter", tmp_path / f"merged_{name}")
    merged = load(tmp_path / f"merged_{name}")
    torch.testing.assert_close(scores(merged, sample), expected, atol=2e-4, rtol=1e-3)
    two = expected.topk(2).values
    if two[0] - two[1] > TIE:
        ids = sample["input_ids"][None, : sample["answers"][0][0]]
        arguments = {"pixel_values_videos": sample["pixel_values_videos"], "max_new_tokens": 1, "do_sample": False}
        assert int(merged.generate(ids, **arguments)[0, -1]) == int(expected.argmax())
    card = (tmp_path / f"merged_{name}" / "README.md").read_text()
    assert card.startswith("---\n") and "license" in card and f"# merged_{name}" in card


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", MEMBERS)
def test_an_adapter_over_quantised_weights_learns(folders, tmp_path, name, bits):
    """QLoRA: weights of the language model in few bits, which stay, and an adapter that loads over them again."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    recipe = recipe_for(folders(name), tmp_path, lora={**lora_for(name), "bits": bits}, max_steps=8, batch_size=2)
    trainer = run(recipe)
    found = losses(trainer)
    assert found[-1] < found[0]
    kinds = {type(part).__name__ for part in trainer.model.modules()}
    assert any("bit" in kind for kind in kinds), kinds
    moved = {key for key, part in trainer.model.named_parameters() if part.requires_grad}
    assert moved and all("lora_" in key for key in moved)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_lora_on_twenty_clips_halves_the_loss(folders, tmp_path, name):
    """The last five steps against the first five, and the loss on clips that were never seen."""
    recipe = recipe_for(
        folders(name), tmp_path, data=[world(20)], lora=lora_for(name), batch_size=4, max_steps=30,
        eval={"data": [world(6, "held_out")], "steps": 30, "batch_size": 6}, trainer={"eval_on_start": True},
    )  # fmt: skip
    trainer = run(recipe)
    found, held_out = losses(trainer), losses(trainer, "eval_loss")
    assert sum(found[-5:]) <= 0.5 * sum(found[:5]), (found[:5], found[-5:])
    assert held_out[-1] < held_out[0]


@pytest.mark.parametrize(
    "name", [*TEXT_ONLY, *(pytest.param(name, marks=pytest.mark.slow) for name in ("flash_umt", "flash_internvideo2"))]
)
def test_an_interrupted_run_goes_on_bitwise(folders, tmp_path, monkeypatch, name):
    """What a step draws (ratios of beacons, share of tokens) hangs on the step alone."""
    entries = {"keep_ratio": [0.7, 0.99]} if name.startswith("pro") else {}

    def recipe(output):
        return recipe_for(folders(name), output, max_steps=4, save_steps=2, member=entries)

    run(recipe(tmp_path / "whole"))
    with interrupted(monkeypatch, 3):
        run(recipe(tmp_path / "parts"))
    assert newest_checkpoint(tmp_path / "parts").name == "checkpoint-2"
    run(recipe(tmp_path / "parts"), resume=True)
    whole, parts = (load_file(tmp_path / part / "model.safetensors") for part in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("videoxl2", {"modules": {"beacons": "train"}}, "nothing to train in 'beacons'"),
        ("flash_umt", {"modules": {"compressor": 1e-3}}, "nothing to train in 'compressor'"),
        ("flash_umt", {"lora": {"target": ["token_selector"]}}, "nothing to train in 'token_selector'"),
        ("flash_umt", {"stage": "dts"}, "compressor is 'tome'"),
        ("videoxl", {"stage": "dts"}, "compressor is 'none'"),
        ("videoxl2", {"member": {"keep_ratio": 0.8}}, "does not have"),
        ("pro_april", {"member": {"beacon_ratio": 4}}, "does not have"),
        ("pro_april", {"member": {"keep_ratio": [0.7]}}, "two shares"),
        ("videoxl", {"sparse_attention": {"prefill": "mask"}}, "has beacon memory"),
        ("pro_april", {"sparse_attention": {"prefill": "streaming"}}, "selects visual tokens"),
        ("pro_april", {"packing": True}, "leave packing out"),
        ("videoxl", {"position_stretch": 999}, "leave position_stretch out"),
        ("videoxl", {"modules": {"beacons": "train"}, "member": {"beacon_ratio": "none"}}, "none would ever run"),
    ],
)
def test_what_cannot_be_trained_says_so_before_the_first_step(folders, tmp_path, name, changes, reason):
    with pytest.raises(ValueError, match=reason):
        run(recipe_for(folders(name), tmp_path, **changes))
    assert not (tmp_path / "log.jsonl").exists()


def test_dropping_is_off_in_training(folders, tmp_path):
    model, _ = build_model(recipe_for(folders("flash_umt"), tmp_path))
    model.config.mm_llm_compress = True
    with pytest.raises(ValueError, match="set it to false"):
        require_trainable(recipe_for(folders("flash_umt"), tmp_path), model)


def test_beacons_stay_where_none_run(folders, tmp_path):
    trainer = run(recipe_for(folders("videoxl"), tmp_path, member={"beacon_ratio": "none"}, max_steps=1))
    frozen = {module_of(key) for key, parameter in trainer.model.named_parameters() if not parameter.requires_grad}
    assert "beacons" in frozen and trainer.model.config.beacon_ratio == [2, 4, 8]


def test_each_step_draws_its_own(folders, tmp_path):
    recipe = recipe_for(folders("pro_april"), tmp_path, member={"keep_ratio": [0.7, 0.99], "beacon_ratio": [2, 4]})
    steps = [drawn(recipe, f"0-{step}") for step in (0, 0, 1)]
    assert steps[0] == steps[1] != steps[2]
    assert all(0.7 <= step["keep_ratio"] <= 0.99 and step["beacon_ratio"] == [2, 4] for step in steps)


@pytest.mark.parametrize("name", ["pro_april", "pro_march"])
def test_the_selector_does_not_see_the_answer(folders, name):
    """In training it keeps the tokens that it keeps when it is asked, also in a padded batch."""
    model = load(folders(name))
    model.config.keep_ratio = 0.5
    dataset = MixtureDataset([world(2)], AutoProcessor.from_pretrained(folders(name), trust_remote_code=True))
    samples = [dataset[index] for index in range(2)]
    batch = Collator(dataset.processor)(samples)
    output = model(batch["input_ids"], labels=batch["labels"], pixel_values_videos=videos_of(batch))
    first = batch["input_ids"].shape[1] - output.logits.shape[1]
    for row, sample in enumerate(samples):
        place = sample["answers"][0][0] - 1 - first
        torch.testing.assert_close(output.logits[row, place], scores(model, sample), atol=1e-4, rtol=1e-3)
    without = model(batch["input_ids"], pixel_values_videos=videos_of(batch)).logits
    assert (without - output.logits).abs().max() > 1e-3  # with the answer in sight it keeps others


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TEXT_ONLY)
def test_a_padded_batch_has_the_loss_of_its_samples(folders, name, side):
    processor = AutoProcessor.from_pretrained(folders(name), trust_remote_code=True)
    dataset = MixtureDataset([world(3, fps=[1, 2])], processor)
    model, samples = load(folders(name)), [dataset[index] for index in range(3)]
    total = sum(
        model(
            s["input_ids"][None], labels=s["labels"][None], pixel_values_videos=s["pixel_values_videos"],
            num_items_in_batch=1,
        ).loss.item()
        for s in samples
    )  # fmt: skip
    width = max(len(s["input_ids"]) for s in samples) + 3

    def padded(values, filler):
        room = [values.new_full((width - len(values),), filler)]
        return torch.cat([*room, values] if side == "left" else [values, *room])

    batch = {
        "input_ids": torch.stack([padded(s["input_ids"], 0) for s in samples]),
        "labels": torch.stack([padded(s["labels"], IGNORE) for s in samples]),
        "attention_mask": torch.stack([padded(torch.ones_like(s["input_ids"]), 0) for s in samples]),
        "pixel_values_videos": [video for s in samples for video in s["pixel_values_videos"]],
    }
    assert model(**batch, num_items_in_batch=1).loss.item() == pytest.approx(total, rel=1e-4)


def test_answers_in_front_of_a_video_are_broken_where_they_have_no_loss(folders, tmp_path):
    frames = [f"f_{number}.png" for number in range(4)]
    for file in frames:
        Image.new("RGB", (40, 40), (number_of(file) * 50, 0, 0)).save(tmp_path / file)
    video = {"type": "video", "video": frames}
    turns = [
        {"role": "user", "content": [video, "What?"]}, {"role": "assistant", "content": "Red."},
        {"role": "user", "content": [video, "And now?"]}, {"role": "assistant", "content": "Redder."},
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps([{"id": "two", "messages": turns}]))
    processor = AutoProcessor.from_pretrained(folders("pro_april"), trust_remote_code=True)
    mixture = [{"json_path": str(tmp_path / "data.json")}]
    assert not isinstance(MixtureDataset(mixture, processor)[0], BrokenSample)
    assert "make two samples" in MixtureDataset(mixture, processor, behind_videos=True)[0].reason


def number_of(file):
    return int(file.split("_")[1].split(".")[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
def test_two_processes_with_fsdp_give_the_losses_of_one(folders, tmp_path, name):
    """FSDP 2 on two CPU processes. Every process has to call every layer equally often, so all clips are alike."""
    entries = {"keep_ratio": 0.8} if name.startswith("pro") else {}
    changes = {"max_steps": 2, "learning_rate": 0.1, "trainer": {"optim": "sgd"}, "member": entries}
    run(recipe_for(folders(name), tmp_path / "one", batch_size=2, **changes))
    recipe = recipe_for(folders(name), tmp_path / "two", batch_size=1, **changes)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    program = [ROOT / "tests" / "sharded.py", ROOT / "training" / "train.py"]
    command = [*fsdp_launcher(ROOT, tmp_path), *program]
    done = subprocess.run(
        [sys.executable, *map(str, command), str(tmp_path / "r.yaml")], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    def told(folder):
        lines = [json.loads(line) for line in (tmp_path / folder / "log.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    assert told("two") == pytest.approx(told("one"), rel=1e-3)
    # As loaded: of two tied weights either may be the one that is saved.
    one, two = (load(tmp_path / part).state_dict() for part in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(two[key], one[key], atol=1e-3) for key in one)
