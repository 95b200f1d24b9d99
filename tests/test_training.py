"""Training: the loss, stages that move what they should, resuming, LoRA, broken samples, evaluation, two processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="training needs accelerate")

from training_setup import CLIPS, fsdp_launcher, interrupted, tiny_recipe, write_tiny_folder
from videoxl.training.batches import Collator, videos_of
from videoxl.training.collator import IGNORE
from videoxl.training.data import MixtureDataset, load_mixture
from videoxl.training.recipe import MODULES, check_recipe, load_recipe, module_of
from videoxl.training.train import build_model, newest_checkpoint, run, training_arguments
from videoxl.training.trainer import VideoXLTrainer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tiny(root, tmp_path_factory):
    return write_tiny_folder(root, tmp_path_factory.mktemp("tiny") / "tiny-video-xl")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def moved(before: dict, after: dict) -> set:
    """Modules of which some parameter changed."""
    return {module_of(name) for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def losses(output):
    lines = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def trainer_for(recipe, **options):
    model, processor = build_model(recipe)
    dataset = MixtureDataset(recipe["data"], processor, **options)
    trainer = VideoXLTrainer(
        recipe=recipe, model=model, args=training_arguments(recipe), train_dataset=dataset,
        data_collator=Collator(processor), processing_class=processor,
    )  # fmt: skip
    return trainer, dataset


PLANS = [{"prefill": prefill, "chunk_groups": 1, "window_chunks": 1} for prefill in ("full", "streaming", "mask")]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["prefill"])
def test_loss_is_the_models_own(tiny, tmp_path, plan):
    """Padded batches without a mask, logits only at labels: the loss of each sample by itself, in every plan."""
    clips = [{"world": CLIPS["world"] | {"sample_fps": [1, 4]}}]
    trainer, dataset = trainer_for(tiny_recipe(tiny, tmp_path, data=clips))
    samples = [dataset[index] for index in range(4)]
    assert len({len(sample["input_ids"]) for sample in samples}) > 1
    batch = trainer.data_collator(samples)
    model = trainer.model.eval()
    total, right = trainer.token_losses(model, batch, plan)
    assert model.config.sparse_attention.prefill == "full"  # as before
    model.config.sparse_attention = plan
    expected, count = 0.0, 0
    with torch.no_grad():
        for row, sample in enumerate(samples):
            ids, labels = sample["input_ids"][None], sample["labels"][None]
            output = model(ids, pixel_values_videos=sample["pixel_values_videos"], labels=labels)
            labelled = int((labels != IGNORE).sum())
            expected, count = expected + output.loss.item() * labelled, count + labelled
            hits = output.logits[0, :-1].argmax(-1) == labels[0, 1:]
            assert torch.equal(right[row, 1 : ids.shape[1]], hits & (labels[0, 1:] != IGNORE))
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert int((batch["labels"] != IGNORE).sum()) == count


def test_a_loss_that_is_no_number_ends_training(tiny, tmp_path):
    with pytest.raises(ValueError, match="the loss is (nan|inf)"):
        run(tiny_recipe(tiny, tmp_path, learning_rate=1e30, max_grad_norm=0.0, trainer={"optim": "sgd"}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stretched_positions_reach_the_model(tiny, tmp_path, attention):
    """The jumps change positions alone: every token still sees its whole past (no packing is read into them)."""
    recipe = tiny_recipe(tiny, tmp_path, attn_implementation=attention)
    trainer, dataset = trainer_for(recipe, position_stretch=3000)
    batch = trainer.data_collator([dataset[0], dataset[1]])
    model = trainer.model.eval()
    stretched, _ = trainer.token_losses(model, batch, {"prefill": "full"})
    plain, _ = trainer.token_losses(model, {k: v for k, v in batch.items() if k != "position_ids"}, {})
    assert abs(stretched.item() - plain.item()) > 1e-3
    shifted, _ = trainer.token_losses(model, batch | {"position_ids": batch["position_ids"] + 77}, {})
    assert shifted.item() == pytest.approx(stretched.item(), rel=1e-4)  # rotary positions are relative
    captured = {}
    hook = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    trainer.token_losses(model, batch, {"prefill": "full"})
    hook.remove()
    mask = captured["attention_mask"]
    if mask is not None:  # bool or additive
        seen = mask if mask.dtype == torch.bool else mask == 0
        assert (seen == torch.ones(mask.shape[-2:]).tril().bool()).all()
    assert (mask is None) == (attention == "sdpa")
    counted, _ = trainer.token_losses(model, batch, PLANS[1])  # sparse plans count positions
    assert counted.item() == pytest.approx(
        trainer.token_losses(model, {k: v for k, v in batch.items() if k != "position_ids"}, PLANS[1])[0].item()
    )


# Of the bundled architecture.
EVERYTHING = {"vision_tower", "compressor", "projector", "language_model"}
STAGES = {
    "2 alignment": (
        {"modules": dict.fromkeys(("vision_tower", "compressor", "language_model"), "frozen")},
        {"projector"},
    ),
    "3 captions": ({}, EVERYTHING),
    "4 instructions": (
        {"sparse_attention": PLANS, "modules": {"vision_tower": 1e-3}, "gradient_checkpointing": True, "bf16": True},
        EVERYTHING,
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_stage(tiny, tmp_path, stage):
    """Loss falls, what is trained moves, what is frozen does not, the result loads."""
    changes, expected = STAGES[stage]
    recipe = tiny_recipe(tiny, tmp_path / "out", max_steps=10, **changes)
    before = {name: tensor.clone() for name, tensor in build_model(recipe)[0].state_dict().items()}
    trainer = run(recipe)
    assert moved(before, trainer.model.state_dict()) == expected
    found = losses(tmp_path / "out")
    assert len(found) == 10 and sum(found[-3:]) < 0.98 * sum(found[:3])
    saved, _ = build_model(recipe | {"init": None, "model": str(tmp_path / "out")})
    assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in trainer.model.state_dict().items())
    assert saved.config.sparse_attention.prefill == "full"
    assert load_recipe(tmp_path / "out" / "recipe.yaml") == recipe
    assert not (tmp_path / "out" / "training_args.bin").exists()


def test_learning_rates_per_module(tiny, tmp_path):
    modules = {"vision_tower": "frozen", "projector": 0.5, "compressor": "2.0e-1"}
    trainer, _ = trainer_for(tiny_recipe(tiny, tmp_path, modules=modules, weight_decay=0.1))
    rates = {}
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            rates.setdefault(module_of(name), set()).add(group["lr"])
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1 or "table" in name), name
    assert rates["projector"] == {0.5} and rates["compressor"] == {0.2} and rates["language_model"] == {1e-2}


def test_dts_pretraining(tiny, tmp_path):
    """Stage 1: reconstruction improves, DTS moves, nothing else does, and stage 2 takes the result."""
    recipe = tiny_recipe(
        tiny, tmp_path / "one", stage="dts", max_steps=12, eval={"data": [CLIPS], "steps": 12},
        dts={"decoder_heads": 2, "decoder_layers": 1},
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in build_model(recipe)[0].state_dict().items()}
    trainer = run(recipe)
    found = losses(tmp_path / "one")
    assert sum(found[-3:]) < 0.9 * sum(found[:3])
    line = json.loads((tmp_path / "one" / "log.jsonl").read_text().splitlines()[0])
    assert line["masked_loss"] + line["visible_loss"] == pytest.approx(line["loss"], rel=1e-3)
    after = build_model(recipe | {"init": None, "model": str(tmp_path / "one")})[0].state_dict()
    assert moved(before, after) == {"compressor"}
    queries = trainer.model.masking
    for query in (queries.temporal_query, queries.spatial_query):  # the scores learn, too
        assert trainer.optimizer.state[query.weight]["exp_avg"].abs().sum() > 0
    alone = load_file(tmp_path / "one" / "dts.safetensors")
    assert all(torch.equal(tensor, after[f"model.compressor.{name}"]) for name, tensor in alone.items())

    second = tiny_recipe(tiny, tmp_path / "two", load={"compressor": str(tmp_path / "one" / "dts.safetensors")})
    loaded = build_model(second)[0].state_dict()
    assert moved(after, loaded) == set()  # all from the same seed, the compressor from stage 1
    with pytest.raises(ValueError, match="projector lacks"):
        build_model(second | {"load": {"projector": str(tmp_path / "one" / "dts.safetensors")}})


def test_semantic_guided_masking():
    from videoxl.training.dts import SemanticGuidedMasking

    torch.manual_seed(0)
    masking = SemanticGuidedMasking(8, mask_ratio=0.25, candidate_share=0.5, temperature=1.0)
    features = torch.randn(3, 4, 16, 8)
    mask = masking(features)
    assert torch.allclose(mask.sum(-1), torch.full((3, 4), 4.0), atol=1e-5)
    scores = masking.score(features)
    highest = torch.where(mask > 0.5, scores, -torch.inf).amax(-1)
    assert (highest <= scores.sort(-1).values[..., 7] + 1e-6).all()  # only among the lower half
    normed = torch.nn.functional.layer_norm(features, (8,))
    group, frame, token = 1, 2, 5
    value = normed[group, frame, token] @ masking.temporal_query(normed[group, frame - 1, token])
    value = value + normed[group, frame, token] @ masking.spatial_query(normed[group, frame].mean(0))
    assert scores[group, frame, token].item() == pytest.approx((value / 8**0.5).item(), abs=1e-5)
    with pytest.raises(ValueError, match="mask_ratio <= candidate_share"):
        SemanticGuidedMasking(8, 0.6, 0.5, 1.0)


def test_lora(tiny, tmp_path):
    """Only the adapter moves; it loads, and merging it gives the same model without peft."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModel
    from videoxl.training.merge_lora import merge

    base, processor = build_model(tiny_recipe(tiny, tmp_path))
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    lora = {"target": r".*language_model.*\.(q_proj|v_proj)", "r": 4, "train_also": ["multi_modal_projector"]}
    recipe = tiny_recipe(tiny, tmp_path / "adapter", init=None, model=str(tmp_path / "base"), lora=lora, max_steps=8)
    trainer = run(recipe)
    found = losses(tmp_path / "adapter")
    assert sum(found[-3:]) < sum(found[:3])
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained) and len(trained) == 2 * 2 * 2 + 4
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    batch = trainer.data_collator([trainer.train_dataset[0]])
    arguments = {"input_ids": batch["input_ids"], "pixel_values_videos": videos_of(batch)}
    with torch.no_grad():
        expected = trainer.model.eval()(**arguments).logits
        loaded = AutoModel.from_pretrained(tmp_path / "base", trust_remote_code=True)
        plain = loaded.eval()(**arguments).logits
        assert (plain - expected).abs().max() > 1e-3
        adapted = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()(**arguments).logits
        assert torch.allclose(adapted, expected, atol=1e-5)
        merge(tmp_path / "adapter", tmp_path / "merged")
        merged = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
        assert torch.allclose(merged.eval()(**arguments).logits, expected, atol=1e-4)


def resumable(tiny, output, **changes):
    return tiny_recipe(
        tiny, output, batch_size=3, max_steps=7, save_steps=2, sparse_attention=PLANS, position_stretch=500,
        warmup=2, workers=1, **{"scheduler": "cosine"} | changes,
    )  # fmt: skip


def test_muon_takes_the_matrices(tiny, tmp_path):
    """Matrices but embeddings are Muon's, the rest is AdamW's, each group at its module's rate and on schedule."""
    modules = {"vision_tower": 1e-4}
    recipe = tiny_recipe(tiny, tmp_path / "out", muon=True, modules=modules, scheduler="linear", max_steps=4)
    trainer, _ = trainer_for(recipe)
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    ours = {True: set(), False: set()}
    for group in optimizer.param_groups:
        ours[group["muon"]] |= {names[id(parameter)] for parameter in group["params"]}
        assert group["lr"] in (1e-4, recipe["learning_rate"])
    assert {name for name in ours[True] if "vision_tower" in name and name.endswith("fc1.weight")}
    assert any("embed_tokens" in name for name in ours[False]) and any(name.endswith("bias") for name in ours[False])
    assert not any("embed" in name or name.endswith("bias") for name in ours[True])
    everything = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert ours[True] | ours[False] == everything and not ours[True] & ours[False]
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    still = {name for name, parameter in trainer.model.named_parameters() if torch.equal(before[name], parameter)}
    assert all("post_layernorm" in name for name in still)  # behind the layer that is read
    assert all(group["lr"] == 0 for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize(
    "own",
    [{}, {"muon": True, "scheduler": "linear"}, {"stage": "dts", "dts": {"decoder_heads": 2}}],
    ids=["sft", "muon", "dts"],
)
def test_resume_is_bitwise(tiny, tmp_path, monkeypatch, own):
    """Interrupted in step 6 (in the third epoch) with a half-written checkpoint beside: the weights of one go."""
    run(resumable(tiny, tmp_path / "whole", **own))

    with interrupted(monkeypatch, 5):
        run(resumable(tiny, tmp_path / "parts", **own))
    half = tmp_path / "parts" / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path / "parts").name == "checkpoint-4"
    with pytest.raises(ValueError, match="--resume"):
        run(resumable(tiny, tmp_path / "parts", **own))
    run(resumable(tiny, tmp_path / "parts", **own), resume=True)
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys() and all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_broken_samples_are_counted(tiny, tmp_path):
    good = [{"from": "human", "value": "What color is it?"}, {"from": "gpt", "value": "Red."}]
    records = [{"id": f"text-{number}", "conversations": good} for number in range(6)]
    seen = [{**good[0], "value": "<image>\nWhat color is it?"}, good[1]]
    records += [{"id": f"gone-{number}", "video": "none.mp4", "conversations": seen} for number in range(2)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = [{"json_path": str(tmp_path / "data.json"), "source": "mine"}]
    recipe = tiny_recipe(tiny, tmp_path / "out", data=data, batch_size=1, max_steps=16, max_broken=0.3)
    run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "out" / "broken_samples.jsonl").read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == ["gone-0 none.mp4"] * 2 + ["gone-1 none.mp4"] * 2
    assert all("no such video" in line["reason"] and line["source"] == "mine" for line in lines)
    last = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-2])
    assert last["broken"] == 4 and last["samples"] == 16
    steps = {line["step"] for line in lines}
    assert {losses(tmp_path / "out")[step] for step in steps} == {0.0}
    with pytest.raises(ValueError, match="gone-. none.mp4.*max_broken"):
        run(recipe | {"output_dir": str(tmp_path / "strict"), "max_broken": 0.0})


def test_evaluation_by_type(tiny, tmp_path):
    """Teacher-forced accuracy of whole answers, per type; generation agrees with it."""
    held_out = [{"world": CLIPS["world"] | {"split": "held_out", "size": 4}}]
    recipe = tiny_recipe(
        tiny, tmp_path / "out", max_steps=30, data=held_out, eval={"data": held_out, "steps": 30, "batch_size": 3},
        learning_rate=2e-2,
    )  # fmt: skip
    trainer = run(recipe)
    line = next(json.loads(t) for t in (tmp_path / "out" / "log.jsonl").read_text().splitlines() if "eval_loss" in t)
    assert line["eval_answers"] == 8 and line["step"] == 30
    dataset, hits = trainer.eval_dataset, {}
    model = trainer.model.eval()
    for index in range(4):
        sample = dataset[index]
        for start, stop, kind in sample["answers"]:
            output = model.generate(
                sample["input_ids"][None, :start], pixel_values_videos=sample["pixel_values_videos"],
                max_new_tokens=stop - start, do_sample=False,
            )  # fmt: skip
            answer = sample["input_ids"][start:stop]
            hits.setdefault(kind, []).append(torch.equal(output[0, start:][: len(answer)], answer))
    every = [hit for kind in hits.values() for hit in kind]
    assert line["eval_accuracy"] == pytest.approx(sum(every) / 8)
    assert {name for name in line if "/" in name} == {f"eval_accuracy/{kind}" for kind in hits}
    assert all(line[f"eval_accuracy/{kind}"] == pytest.approx(sum(hit) / len(hit)) for kind, hit in hits.items())
    assert any(every)  # it has learnt something by heart


def test_parts_from_elsewhere(tiny, tmp_path):
    """A language model and a tower under the names that their own repositories use."""
    from safetensors.torch import save_file

    model, _ = build_model(tiny_recipe(tiny, tmp_path, init={"config": str(tiny), "seed": 7}))
    state = model.state_dict()
    (tmp_path / "qwen").mkdir()
    inner = {name.removeprefix("model.language_model."): t for name, t in state.items() if "language_model" in name}
    save_file({f"model.{name}": tensor.clone() for name, tensor in inner.items()}, tmp_path / "qwen" / "a.safetensors")
    tower = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.vision_tower.")}
    names = {name.replace("vision_tower.", "vision_model."): tensor.clone() for name, tensor in tower.items()}
    save_file(names | {"text_model.weight": torch.zeros(1)}, tmp_path / "siglip.safetensors")
    load = {
        "language_model": {"path": str(tmp_path / "qwen"), "strip": "model."},
        "vision_tower": {"path": str(tmp_path / "siglip.safetensors"), "strip": "vision_model."},
    }
    recipe = tiny_recipe(tiny, tmp_path, load=load)
    loaded = build_model(recipe)[0].state_dict()
    assert moved(state, loaded) == {"compressor", "projector"}
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "siglip.safetensors")
    with pytest.raises(ValueError, match="another model's"):
        build_model(recipe)


def test_shipped_recipes_are_valid():
    recipes = sorted((ROOT / "training" / "recipes").rglob("*.yaml"))
    assert len(recipes) >= 5
    for path in recipes:
        if path.parent.name == "small":
            continue  # another program's, see test_training_small.py
        recipe = load_recipe(path)
        training_arguments(recipe | {"bf16": False})
        if "world" in str(recipe["data"]):
            load_mixture(recipe["data"])


def test_recipe_errors(tiny, tmp_path):
    good = {"model": "m", "data": "d.yaml", "output_dir": "o"}
    assert check_recipe(good | {"learning_rate": "1e-4"})["learning_rate"] == 1e-4  # YAML reads this as text
    for change, reason in (
        ({"lr": 1}, "no lr"),
        ({"init": {"config": "."}}, "exactly one"),
        ({"data": None}, "lacks data"),
        ({"modules": {"tower": "frozen"}}, "modules has no"),
        ({"modules": {"projector": "maybe"}}, "modules.projector"),
        ({"sparse_attention": {"decode": "bilevel"}}, "bi-level"),
        ({"lora": {"target": "x"}, "modules": {"projector": "train"}}, "leave modules out"),
        ({"lora": {"goal": "x"}}, "lora has no"),
        ({"stage": "five"}, "stage must be"),
        ({"stage": "dts", "modules": {"projector": "train"}}, "stage dts"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_recipe(good | change)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(good))
    recipe = load_recipe(tmp_path / "r.yaml", ["eval.data=e.yaml", "eval.steps=5", "learning_rate=2.0e-3"])
    assert recipe["eval"] == {"data": "e.yaml", "steps": 5} and recipe["learning_rate"] == 2e-3
    for text, reason in (("- a\n- list\n", "key: value"), ("---\na: b\n---\nc: d\n", "no YAML file")):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(ValueError, match=reason):
            load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="nothing to train"):
        run(tiny_recipe(tiny, tmp_path / "o", modules=dict.fromkeys(MODULES, "frozen")))


def start(recipe, path, *arguments, launcher=(), **variables):
    """Starts train.py in a process of its own."""
    path.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, *launcher, str(ROOT / "training" / "train.py"), str(path), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, **pipes)


# Two processes that find a port themselves: one that is looked for beforehand can be taken by the time it is used.
TWO = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0",
       "--local-addr=127.0.0.1")  # fmt: skip

# A thread of gloo that is there when the interpreter ends may abort the process.
NO_THREAD_LEFT = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
names = [(thread / "comm").read_text() for thread in Path("/proc/self/task").glob("*")]
assert not any("gloo" in name for name in names), names
"""


def finish(process):
    errors = process.communicate()[1]
    assert process.returncode == 0, errors[-3000:]


def test_two_processes_give_the_loss_of_one(tiny, tmp_path):
    """Data parallelism over gloo: the same samples, so the same losses and weights as one process."""
    # Not Adam: its first steps turn the rounding noise of vanishing gradients into whole steps.
    settings = {"max_steps": 3, "learning_rate": 0.1, "trainer": {"optim": "sgd"}}
    trainer = run(tiny_recipe(tiny, tmp_path / "one", batch_size=4, **settings))
    recipe = tiny_recipe(tiny, tmp_path / "two", batch_size=2, **settings)
    (tmp_path / "rank.py").write_text(NO_THREAD_LEFT)
    finish(start(recipe, tmp_path / "r.yaml", launcher=(*TWO, str(tmp_path / "rank.py"))))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, two = trainer.model.state_dict(), load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.allclose(tensor, one[name], atol=1e-5) for name, tensor in two.items())


@pytest.mark.slow
def test_two_processes_with_fsdp(tiny, tmp_path):
    settings = {"max_steps": 3, "learning_rate": 0.1, "trainer": {"optim": "sgd"}}
    trainer = run(tiny_recipe(tiny, tmp_path / "one", batch_size=4, **settings))
    recipe = tiny_recipe(tiny, tmp_path / "two", batch_size=2, save_steps=2, **settings)
    launcher = fsdp_launcher(ROOT, tmp_path)
    assert "shards nothing here" in start(recipe, tmp_path / "r.yaml", launcher=launcher).communicate()[1]
    launcher.append(str(ROOT / "tests" / "sharded.py"))
    finish(start(recipe, tmp_path / "r.yaml", launcher=launcher))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = trainer.model.state_dict(), load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.allclose(tensor, one[name], atol=1e-4) for name, tensor in two.items())


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_weights(tiny, tmp_path):
    """kill -9 in the middle, then --resume: bitwise the weights of an uninterrupted process."""
    changes = {"max_steps": 150, "save_steps": 5}
    recipes = [tiny_recipe(tiny, tmp_path / name, workers=1, **changes) for name in ("whole", "parts")]
    finish(start(recipes[0], tmp_path / "whole.yaml"))
    process = start(recipes[1], tmp_path / "parts.yaml")
    until = time.time() + 300
    while newest_checkpoint(tmp_path / "parts") is None and time.time() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert 5 <= int(newest_checkpoint(tmp_path / "parts").name.split("-")[1]) < 150
    finish(start(recipes[1], tmp_path / "parts.yaml", "--resume"))
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
