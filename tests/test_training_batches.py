"""Batches: all kinds of samples in one, packing, budgets of tokens, kept features; collators for other trainers."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from PIL import Image
from training_setup import tiny_recipe, write_tiny_folder
from transformers import AutoModel, Qwen2ForCausalLM, Trainer, TrainingArguments
from videoxl import VideoXLCollator
from videoxl.training.batches import BudgetBatches, Collator, EpochSampler, measure_lengths, videos_of
from videoxl.training.collator import IGNORE
from videoxl.training.data import BrokenSample, MixtureDataset
from videoxl.training.features import FeatureCache
from videoxl.training.train import build_model, disk_is_full, run

PLANS = [{"prefill": prefill, "chunk_groups": 1, "window_chunks": 1} for prefill in ("full", "streaming", "mask")]


@pytest.fixture(scope="module")
def tiny(root, tmp_path_factory):
    return write_tiny_folder(root, tmp_path_factory.mktemp("batches") / "tiny-video-xl")


@pytest.fixture(scope="module")
def model_and_processor(tiny, tmp_path_factory):
    return build_model(tiny_recipe(tiny, tmp_path_factory.mktemp("out")))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, clips):
    """A folder with a mixture of every kind of sample, broken ones among them."""
    folder = tmp_path_factory.mktemp("mixed")
    for number in range(6):
        Image.new("RGB", (40, 30), (40 * number, 80, 0)).save(folder / f"f_{number}.png")
    Image.new("RGB", (70, 40), (0, 90, 200)).save(folder / "wide.png")
    answer = {"role": "assistant", "content": "A red ball."}
    file, other = (
        {"type": "video", "video": clip, "num_frames": count} for clip, count in zip(clips, (8, 5), strict=True)
    )
    frames, picture = (
        {"type": "video", "video": [f"f_{n}.png" for n in range(6)]},
        {"type": "image", "image": "wide.png"},
    )
    good = {
        "text": ["What is red?"], "file": [file, "What?"], "frames": [frames, "What?"], "image": [picture, "What?"],
        "two": [file, "and", other, "What?"], "both": [picture, frames, "What?"],
    }  # fmt: skip
    records = [{"id": name, "messages": [{"role": "user", "content": c}, answer]} for name, c in good.items()]
    turns = [{"role": "user", "content": "<video>What moves here, and in <image>?"}, answer]
    records.append({"id": "swift", "messages": turns, "videos": [clips[0]], "images": ["wide.png"]})
    factory = [{"from": "human", "value": "<video>\nWhat moves?"}, {"from": "gpt", "value": "A ball."}]
    records.append({"id": "factory", "conversations": factory, "videos": [clips[1]]})
    (folder / "cut.mp4").write_bytes(b"no video")
    (folder / "broken.png").write_bytes(b"no picture")
    bad = {
        "gone": [{"type": "video", "video": "gone.mp4"}, "What?"],
        "cut": [{"type": "video", "video": "cut.mp4"}, "What?"],
        "picture": [{"type": "image", "image": "broken.png"}, "What?"],
        "frame": [{"type": "video", "video": ["f_0.png", "f_9.png"]}, "What?"],
    }  # fmt: skip
    broken = [{"id": f"bad-{name}", "messages": [{"role": "user", "content": c}, answer]} for name, c in bad.items()]
    broken.append({"id": "bad-count", "messages": turns, "videos": [], "images": ["wide.png"]})
    broken.append({"id": "bad-answer", "messages": [turns[0], {"role": "assistant", "content": " "}], "videos": ["a"]})
    broken.append({"id": "bad-turns", "conversations": factory[:1], "videos": [clips[1]]})
    broken.append("bad-record")
    (folder / "good.json").write_text(json.dumps(records))
    (folder / "all.json").write_text(json.dumps(records + broken))
    return folder


def losses_of(model, batch, plan, packed=False):
    """Summed loss and gradients of a collator's batch."""
    model.zero_grad()
    model.config.sparse_attention = plan
    extra = {"position_ids": batch["position_ids"]} if packed else {}
    videos = videos_of(batch)
    output = model(
        batch["input_ids"], labels=batch["labels"], num_items_in_batch=1, pixel_values_videos=videos or None, **extra
    )
    output.loss.backward()
    model.config.sparse_attention = {}
    return output.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan["prefill"])
def test_packing_and_composition_leave_loss_and_gradient(model_and_processor, mixed, plan):
    """Single samples, a padded batch and one packed sequence of texts, files, frames, tiles and several videos."""
    model, processor = model_and_processor
    dataset = MixtureDataset([{"json_path": str(mixed / "good.json")}], processor, video={"max_num_frames": 12})
    samples = [dataset[index] for index in range(len(dataset))]
    assert not [sample for sample in samples if isinstance(sample, BrokenSample)] and len(samples) == 8
    singles = [losses_of(model, Collator(processor)([sample]), plan) for sample in samples]
    total, gradients = sum(loss for loss, _ in singles), {}
    for _, found in singles:
        for name, gradient in found.items():
            gradients[name] = gradients.get(name, 0) + gradient
    for packing in (False, True):
        batch = Collator(processor, packing=packing)(samples)
        assert batch["input_ids"].shape[0] == (1 if packing else 8)
        loss, found = losses_of(model, batch, plan, packing)
        assert loss == pytest.approx(total, rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=2e-4 * max(gradient.abs().max(), 1), rtol=1e-2)
    begins = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert begins == np.cumsum([0, *(len(sample["input_ids"]) for sample in samples[:-1])]).tolist()
    places = [batch["labels"][0, start:stop].ne(IGNORE).all() for _, start, stop, _ in batch["answers"]]
    assert all(places) and len(places) == 8


def test_packed_texts_have_the_loss_of_the_stock_language_model(model_and_processor):
    model, _ = model_and_processor
    stock = Qwen2ForCausalLM(model.config.text_config)
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    ids = [torch.randint(0, 1000, (1, length), generator=torch.Generator().manual_seed(length)) for length in (9, 20)]
    apart = sum(stock(one, labels=one, num_items_in_batch=1).loss.item() for one in ids)
    labels = [one.clone().index_fill_(1, torch.tensor(0), IGNORE) for one in ids]
    positions = torch.cat([torch.arange(one.shape[1]) for one in ids])[None]
    packed = {"input_ids": torch.cat(ids, 1), "labels": torch.cat(labels, 1), "position_ids": positions}
    assert model(**packed, num_items_in_batch=1, use_cache=False).loss.item() == pytest.approx(apart, rel=1e-5)


def test_packed_prompts_are_refused_where_they_cannot_be(model_and_processor, mixed):
    model, processor = model_and_processor
    dataset = MixtureDataset([{"json_path": str(mixed / "good.json")}], processor, video={"max_num_frames": 8})
    batch = Collator(processor, packing=True)([dataset[1], dataset[2]])
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with pytest.raises(ValueError, match="one prompt a row"):
        model(**inputs, pixel_values_videos=videos_of(batch), use_cache=True)


def test_broken_samples_of_every_kind_are_named_and_counted(tiny, tmp_path, mixed):
    data = [{"json_path": str(mixed / "all.json"), "source": "mixed"}]
    recipe = tiny_recipe(
        tiny, tmp_path, data=data, batch_size=4, max_steps=4, max_broken=0.6, video={"max_num_frames": 6}, packing=True
    )
    trainer = run(recipe)
    lines = [json.loads(line) for line in (tmp_path / "broken_samples.jsonl").read_text().splitlines()]
    names = sorted(line["name"].split()[0] for line in lines)
    assert names == sorted(
        [f"bad-{n}" for n in ("gone", "cut", "picture", "frame", "count", "answer", "turns")] + ["15"]
    )
    assert all(line["source"] == "mixed" and len(line["reason"]) > 20 for line in lines)
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert (last["broken"], last["samples"]) == (8, 16)


@pytest.mark.parametrize("packing", [False, True])
def test_budget_batches(packing):
    lengths = np.random.default_rng(1).integers(10, 400, 300).tolist() + [900]
    batches = BudgetBatches(lengths, 800, packing, seed=3, epoch=lambda: 0)
    taken = list(batches)
    assert sorted(index for batch in taken for index in batch) == list(range(301)) and len(taken) == len(batches)
    sizes = [[lengths[index] for index in batch] for batch in taken]
    cost = [sum(batch) if packing else max(batch) * len(batch) for batch in sizes]
    assert all(tokens <= 800 or len(batch) == 1 for tokens, batch in zip(cost, sizes, strict=True))
    assert sum(lengths) / sum(cost) > 0.9 and sum(cost) / (800 * len(cost)) > (0.9 if packing else 0.75)
    assert list(batches) == taken != list(BudgetBatches(lengths, 800, packing, 3, lambda: 1))
    shares = [list(BudgetBatches(lengths, 800, packing, 3, lambda: 0, (rank, 2))) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(taken) // 2 and not [b for b in shares[0] if b in shares[1]]
    with pytest.raises(ValueError, match="lower it"):
        BudgetBatches([5], 800, packing, 3, lambda: 0, (0, 2))


def test_group_by_length():
    lengths = np.random.default_rng(1).integers(10, 400, 403)
    dataset = type("Sized", (), {"__len__": lambda self: 403})()
    order = list(EpochSampler(dataset, 0, lambda: 0, block=4, lengths=lengths.tolist()))
    assert sorted(order) == list(range(403))
    blocks = lengths[order[:400]].reshape(-1, 4)
    assert (blocks.max(1) - blocks.min(1)).mean() < 12
    assert order != list(EpochSampler(dataset, 0, lambda: 1, block=4, lengths=lengths.tolist()))


def test_a_budget_trains_and_resumes_bitwise(tiny, tmp_path, monkeypatch):
    data = [{"world": {"size": 12, "clip": {"seconds": 4, "num_questions": 1}, "sample_fps": [1, 4]}}]
    changes = {"token_budget": 200, "packing": True, "data": data, "max_steps": 5, "save_steps": 2}
    trainer = run(tiny_recipe(tiny, tmp_path / "whole", **changes))
    assert max(len(batch) for batch in trainer.get_train_dataloader().batch_sampler) > 1
    assert len(measure_lengths(trainer.train_dataset, tmp_path / "whole")) == 12
    run(tiny_recipe(tiny, tmp_path / "parts", **changes | {"max_steps": 2}))
    run(tiny_recipe(tiny, tmp_path / "parts", **changes), resume=True)
    models = [AutoModel.from_pretrained(tmp_path / part, trust_remote_code=True) for part in ("whole", "parts")]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    run(tiny_recipe(tiny, tmp_path / "grouped", group_by_length=True, data=data, max_steps=2))


def test_kept_features_give_the_same_training(tiny, tmp_path, mixed, monkeypatch):
    data = [{"json_path": str(mixed / "good.json")}, {"world": {"size": 3, "clip": {"seconds": 4}}}]
    changes = {"data": data, "modules": {"vision_tower": "frozen"}, "video": {"max_num_frames": 7}, "max_steps": 5}
    # Not Adam: its first steps turn the rounding noise of vanishing gradients into whole steps.
    changes |= {"learning_rate": 0.1, "trainer": {"optim": "sgd"}}
    plain = run(tiny_recipe(tiny, tmp_path / "plain", **changes))
    cached = {"feature_cache": str(tmp_path / "cache"), **changes}
    first = run(tiny_recipe(tiny, tmp_path / "first", **cached))
    assert len(list((tmp_path / "cache").glob("*.features"))) == 7  # four of the JSON, three of the world
    tower = type(first.model.model.vision_tower.encoder)
    frames = []
    before = tower.forward
    monkeypatch.setattr(
        tower, "forward", lambda self, *args, **kwargs: frames.append(1) or before(self, *args, **kwargs)
    )
    monkeypatch.setattr("videoxl.processing_videoxl.open_video", None)
    second = run(tiny_recipe(tiny, tmp_path / "second", **cached))
    assert len(frames) < 12  # only images
    for other in (first, second):
        for name, tensor in plain.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], tensor, atol=1e-4, rtol=1e-3)
    # Another tower, another sampling or another file: another key.
    model, processor = build_model(tiny_recipe(tiny, tmp_path, init={"config": str(tiny), "seed": 5}))
    caches = [
        FeatureCache(tmp_path / "cache", second.model, processor, {}),
        FeatureCache(tmp_path / "cache", second.model, processor, {"sample_fps": 2}),
        FeatureCache(tmp_path / "cache", model, processor, {}),
    ]
    assert len({cache.key(["a"]) for cache in caches}) == 3
    with pytest.raises(ValueError, match="set modules.vision_tower to frozen"):
        tiny_recipe(tiny, tmp_path, feature_cache="somewhere")


def conversation(video, answer="A red ball."):
    question = [{"type": "video", "video": video, "num_frames": 4}, {"type": "text", "text": "What moves?"}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_the_collator_masks_and_pads(model_and_processor, clips):
    model, processor = model_and_processor
    examples = [
        conversation(clips[0]),
        {"messages": [{"role": "user", "content": "Say it."}] + conversation(clips[0])["messages"][1:]},
    ]
    batch = VideoXLCollator(processor)(examples)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "pixel_values_videos"}
    for row, example in enumerate(examples):
        kept = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        whole = processor.apply_chat_template(example["messages"], tokenize=True, return_dict=True)["input_ids"][0]
        assert kept == whole
        told = batch["labels"][row][batch["labels"][row] != IGNORE]
        assert processor.tokenizer.decode(told) == "A red ball.<|im_end|>"
    expected = model(**batch).loss
    short = VideoXLCollator(processor, logits_where_labelled=True)(examples)
    output = model(**short)
    assert output.logits.shape[1] == len(short["logits_to_keep"]) < 20
    torch.testing.assert_close(output.loss, expected)
    # A table gives every item all columns; media beside the messages stand where the texts say.
    table = json.loads(json.dumps(examples[0]))
    for item in table["messages"][0]["content"]:
        for key in ("video", "text", "num_frames", "image"):
            item.setdefault(key, None)
    texts = [{"role": "user", "content": "<video>What moves?"}, examples[0]["messages"][1]]
    listed = VideoXLCollator(processor, num_frames=4)([{"messages": texts, "videos": [clips[0]]}])
    for other in (VideoXLCollator(processor)([table]), listed):
        assert torch.equal(other["input_ids"][0], batch["input_ids"][0])
    for wrong, reason in (
        ({"messages": examples[0]["messages"][:1]}, "must end with the assistant"),
        ({"messages": texts, "videos": []}, "videos has 0 entries"),
        (conversation("none.mp4"), "no such video"),
        ({"text": "a"}, "messages must be a list"),
    ):
        with pytest.raises(ValueError, match=f"example 1 of the batch cannot be used: .*{reason}"):
            VideoXLCollator(processor)([examples[1], wrong])
    with pytest.raises(ValueError, match="max_length is 30"):
        VideoXLCollator(processor, max_length=30)(examples)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, None], ids=["lora", "dora", "full"])
def test_the_librarys_trainer_takes_the_collator(tiny, tmp_path, clips, options):
    peft = pytest.importorskip("peft")
    model, processor = build_model(tiny_recipe(tiny, tmp_path))
    if options is not None:
        targets = r".*language_model.*\.(q_proj|v_proj|up_proj|down_proj)"
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets, **options))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=8, learning_rate=2e-2, logging_steps=1,
        report_to="none", use_cpu=True, remove_unused_columns=False, disable_tqdm=True, save_strategy="no",
        eval_strategy="steps", eval_steps=8, lr_scheduler_type="constant",
    )  # fmt: skip
    examples = [conversation(clips[0]), conversation(clips[1], "A blue square.")]
    collator = VideoXLCollator(processor, logits_where_labelled=True)
    trainer = Trainer(model, arguments, collator, examples, examples[:1], processing_class=processor)
    trainer.train()
    found = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert sum(found[-2:]) < 0.9 * sum(found[:2]) and trainer.state.log_history[-2]["eval_loss"] > 0


def test_a_full_disk_is_told(tmp_path):
    assert disk_is_full(OSError(28, "No space left on device"), tmp_path)
    assert not disk_is_full(ValueError("written wrongly"), tmp_path) and not disk_is_full(OSError("gone"), tmp_path)
