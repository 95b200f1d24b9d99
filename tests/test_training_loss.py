"""transformers' own `Trainer`: what it makes of our loss, with stock Qwen2 as the oracle."""

import sys

import pytest
import torch

pytest.importorskip("accelerate", reason="training needs accelerate")

from training_setup import tiny_recipe, write_tiny_folder
from transformers import Qwen2ForCausalLM, Trainer, TrainingArguments
from videoxl.training.collator import IGNORE
from videoxl.training.data import MixtureDataset
from videoxl.training.train import build_model, training_arguments
from videoxl.training.trainer import VideoXLTrainer

SPLITS = [(4, 1), (2, 2), (1, 4)]


@pytest.fixture(scope="module")
def tiny(root, tmp_path_factory):
    return write_tiny_folder(root, tmp_path_factory.mktemp("loss") / "tiny-video-xl")


@pytest.fixture(scope="module")
def model_and_processor(tiny, tmp_path_factory):
    return build_model(tiny_recipe(tiny, tmp_path_factory.mktemp("out")))


@pytest.fixture(scope="module")
def samples(model_and_processor, tmp_path_factory):
    """Four samples with videos, whose answers differ in length."""
    clips = {"world": {"size": 4, "clip": {"seconds": 4, "num_questions": 2}, "sample_fps": [1, 4]}}
    dataset = MixtureDataset([clips], model_and_processor[1])
    return [dataset[index] for index in range(4)]


def collate(samples):
    length = max(len(sample["input_ids"]) for sample in samples)

    def padded(name, value):
        rows = torch.full((len(samples), length), value)
        for row, sample in zip(rows, samples, strict=True):
            row[: len(sample[name])] = sample[name]
        return rows

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORE)}
    videos = [video for sample in samples for video in sample["pixel_values_videos"]]
    return batch | ({"pixel_values_videos": videos} if videos else {})


def logged(model, samples, size, steps, folder, smoothing=0.0, kind=Trainer, **options):
    """Loss and gradient norm that a step over all samples logs."""
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=1,
        learning_rate=0.0, logging_steps=1, report_to="none", use_cpu=True, remove_unused_columns=False,
        label_smoothing_factor=smoothing, disable_tqdm=True, save_strategy="no", max_grad_norm=1e9,
    )  # fmt: skip
    options.setdefault("data_collator", collate)
    trainer = kind(model=model, args=arguments, train_dataset=samples, **options)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    return line["loss"], line["grad_norm"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_text_trains_as_with_the_stock_language_model(model_and_processor, tmp_path, smoothing):
    model, _ = model_and_processor
    stock = Qwen2ForCausalLM(model.config.text_config)
    stock.model.load_state_dict(model.model.language_model.state_dict())
    stock.lm_head.load_state_dict(model.lm_head.state_dict())
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in (9, 30, 14, 21):
        ids = torch.randint(0, 1000, (length,), generator=generator)
        labels = torch.where(torch.arange(length) < 4, IGNORE, ids)
        samples.append({"input_ids": ids, "labels": labels, "pixel_values_videos": []})
    # Of ours the tower and the compressor get no gradient, and the norm is over the others.
    for size, steps in SPLITS:
        expected = logged(stock, samples, size, steps, tmp_path, smoothing)
        assert logged(model, samples, size, steps, tmp_path, smoothing) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulation_changes_neither_loss_nor_gradient(model_and_processor, samples, tmp_path, smoothing):
    model, _ = model_and_processor
    runs = [logged(model, samples, size, steps, tmp_path, smoothing) for size, steps in SPLITS]
    assert runs[1] == pytest.approx(runs[0], rel=1e-3) and runs[2] == pytest.approx(runs[0], rel=1e-3)
    assert runs[0][1] > 1e-2


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_our_trainer_and_the_librarys_agree(tiny, model_and_processor, samples, tmp_path, smoothing):
    model, processor = model_and_processor
    recipe = tiny_recipe(tiny, tmp_path)

    def collate_with_facts(samples):
        return collate(samples) | {"broken": [], "samples": len(samples), "answers": []}

    class Ours(VideoXLTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return Trainer._get_train_sampler(self, train_dataset)

        def token_losses(self, model, inputs, plan, entries=None):
            videos = inputs["pixel_values_videos"]
            facts = {"pixels": torch.cat(videos), "shapes": [tuple(video.shape[:1]) for video in videos]}
            return super().token_losses(model, inputs | facts, plan, entries)

    own = {"kind": Ours, "recipe": recipe, "data_collator": collate_with_facts}
    for size, steps in SPLITS[::2]:
        expected = logged(model, samples, size, steps, tmp_path, smoothing)
        assert logged(model, samples, size, steps, tmp_path, smoothing, **own) == pytest.approx(expected, rel=1e-3)
    assert training_arguments(recipe).label_smoothing_factor == 0


def test_the_number_of_items_divides_the_loss(model_and_processor, samples):
    model, _ = model_and_processor
    batch = collate(samples)
    with torch.no_grad():
        plain, one, two = (model(**batch, num_items_in_batch=n).loss.item() for n in (None, 50, 100))
    count = int((batch["labels"][:, 1:] != IGNORE).sum())
    assert two == pytest.approx(one / 2) and one == pytest.approx(plain * count / 50)


def test_labels_where_no_loss_is_are_told_to_whoever_counts_them(model_and_processor, samples, monkeypatch):
    """A collator that labels every token: the trainer counts visual ones, too, and divides by too much."""
    model, _ = model_and_processor
    said = []
    monkeypatch.setattr(sys.modules[type(model).__module__].logger, "warning_once", lambda text, *_: said.append(text))
    batch = collate(samples)
    every = batch | {"labels": batch["input_ids"].clone()}
    with torch.no_grad():
        model(**batch, num_items_in_batch=50)
        model(**every)
        assert not said
        model(**every, num_items_in_batch=50)
    assert "set them to -100" in said[0]
