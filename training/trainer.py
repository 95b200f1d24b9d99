"""The Trainer: transformers' own, with a loss that computes logits only where labels are, per-module learning rates,
attention plans drawn per step, a report of broken samples, and accuracy of answers by type of question.

What is surprising:
* The loss is the mean over all answer tokens of an optimizer step (all processes and accumulated batches), so long
  answers weigh more than short ones and the number of processes changes nothing. The published code takes the mean
  per sample.
* Positions in a batch are shared: logits are computed for every position that has a label in any row.
* Everything drawn in a step is drawn from (seed, step). A resumed run repeats it.
"""

import math
import time
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from videoxl.shell.records import json_line, json_lines
from videoxl.training.batches import BudgetBatches, EpochSampler, measure_lengths, videos_of
from videoxl.training.collator import IGNORE, labelled_columns
from videoxl.training.muon import is_matrix, make_optimizer
from videoxl.training.recipe import behind_videos_only, drawn, in_force, learning_rates, module_of

# Samples of which `max_broken` is a share at least: one bad file among the first three is no reason to stop.
MIN_SEEN = 50


class VideoXLTrainer(Trainer):
    """Trains with the next-token loss on answers.

    Args:
        recipe: See `recipe.py`.
        eval_collator: Makes the batches of the held-out evaluation, if `eval_dataset` is given.
        features: The `FeatureCache` that the samples' keys are of; None without one.
        **kwargs: The library's.
    """

    def __init__(self, *, recipe: dict, eval_collator=None, features=None, **kwargs):
        super().__init__(**kwargs)
        self.recipe, self.features = recipe, features
        self.eval_collator = eval_collator
        self.model_accepts_loss_kwargs = True  # the loss below is a mean over the whole accumulated batch
        output = Path(self.args.output_dir)
        self.journal = Journal(output / "log.jsonl") if self.args.process_index == 0 else None
        self.broken = BrokenReport(output / "broken_samples.jsonl", recipe["max_broken"], self.args.process_index)
        self.add_callback(JournalCallback(self))

    # override: an order that depends on seed and epoch alone, on request with batches from one source
    def _get_train_sampler(self, train_dataset=None):
        block = self.args.per_device_train_batch_size * self.args.world_size if self.recipe["group_by_source"] else 1
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = None
        if self.recipe["group_by_length"]:
            lengths, block = self._lengths(), self.args.per_device_train_batch_size * self.args.world_size
        return EpochSampler(dataset, self._data_seed, self._epoch, block, lengths)

    @property
    def _data_seed(self):
        return self.args.data_seed or self.args.seed

    def _epoch(self):
        # The library counts epochs as a float that is whole when an epoch begins.
        return self.state.epoch or 0

    def _lengths(self):
        """The samples' lengths in tokens, which one process measures and all read."""
        with self.args.main_process_first(desc="measuring the lengths of samples"):
            return measure_lengths(self.train_dataset, Path(self.args.output_dir), self.args.dataloader_num_workers)

    # override: batches of as many samples as fit a number of tokens
    def get_train_dataloader(self):
        budget = self.recipe["token_budget"]
        if budget is None:
            return super().get_train_dataloader()
        place = (self.args.process_index, self.args.world_size)
        batches = BudgetBatches(self._lengths(), budget, self.recipe["packing"], self._data_seed, self._epoch, place)
        return DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    # override: learning rates per module
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            opt_model = self.model if model is None else model
            decay = set(self.get_decay_parameter_names(opt_model))
            rates = learning_rates(self.recipe)
            groups = defaultdict(list)
            for name, parameter in opt_model.named_parameters():
                if parameter.requires_grad:
                    rate = rates.get(module_of(name)) or self.args.learning_rate
                    muon = self.recipe["muon"] and is_matrix(name, parameter)
                    groups[rate, self.args.weight_decay if name in decay else 0.0, muon].append(parameter)
            if not groups:
                raise ValueError("every module is frozen, there is nothing to train; see 'modules' in the recipe")
            groups = [
                {"params": parameters, "lr": rate, "weight_decay": weight_decay}
                | ({"muon": muon} if self.recipe["muon"] else {})
                for (rate, weight_decay, muon), parameters in groups.items()
            ]
            self.optimizer = make_optimizer(self, groups)
        return self.optimizer

    # override: logits only where labels are
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.broken.take(inputs.pop("broken"), inputs.pop("samples"), self.state.global_step)
        inputs.pop("answers")
        entries = drawn(self.recipe, f"{self.args.seed}-{self.state.global_step}")
        total, _ = self.token_losses(model, inputs, entries.pop("sparse_attention"), entries)
        if num_items_in_batch is None:
            num_items_in_batch = inputs["labels"].ne(IGNORE).sum()
        # The library averages gradients over processes; the divisor already counts the tokens of all of them.
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = total * scale / torch.as_tensor(num_items_in_batch).clamp(min=1)
        return (loss, None) if return_outputs else loss

    # override: with beacon memory or a token selector gradients reach earlier calls of a layer through the cache. FSDP
    # does not see that, and would have given the layer's weights away by then
    def training_step(self, model, inputs, num_items_in_batch=None):
        sharded = []
        if self.is_fsdp_enabled and behind_videos_only(self.accelerator.unwrap_model(model).config, self.recipe):
            sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for module in sharded:
            module.set_reshard_after_backward(False, recurse=False)
        loss = super().training_step(model, inputs, num_items_in_batch)
        for module in sharded:
            module.reshard()
        return loss

    # override: FSDP gives a module a class of its own, whose file would be saved as the model's code
    def _save(self, output_dir=None, state_dict=None):
        kind = type(self.model)
        if isinstance(self.model, FSDPModule):
            self.model.__class__ = next(base for base in kind.__bases__ if base is not FSDPModule)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = kind

    def token_losses(self, model, inputs: dict, plan: dict, entries=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs a batch.

        Args:
            model: The model, wrapped or not.
            inputs: A collator's batch.
            plan: `config.sparse_attention` during the call.
            entries: Further entries of the config, see `drawn`.

        Returns:
            The summed loss of all labels, and [B, L] bool: where the most likely token is the label.
        """
        labels = inputs["labels"]
        columns = labelled_columns(labels)
        arguments = {"input_ids": inputs["input_ids"], "labels": labels, "logits_to_keep": columns, "use_cache": False}
        config = self.accelerator.unwrap_model(model, keep_torch_compile=False).config
        with in_force(config, {"sparse_attention": plan, **(entries or {})}):
            if videos := self._videos(inputs):
                arguments["pixel_values_videos"] = videos
            if "position_ids" in inputs and (self.recipe["packing"] or plan.get("prefill", "full") == "full"):
                arguments["position_ids"] = inputs["position_ids"]
            output = model(**arguments, num_items_in_batch=1)
        targets = F.pad(labels, (0, 1), value=IGNORE)[:, columns + 1]
        labelled = targets != IGNORE
        logits, targets = output.logits[labelled], targets[labelled]
        right = torch.zeros_like(labels, dtype=torch.bool)
        right[:, 1:][labels[:, 1:] != IGNORE] = logits.detach().argmax(dim=-1) == targets
        if smoothing := self.args.label_smoothing_factor:
            return F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing), right
        return output.loss, right

    def _videos(self, inputs):
        """A batch's videos; those whose features are to be kept go through the tower here."""
        videos, keys = videos_of(inputs), inputs.get("keys", ())
        if not any(keys):
            return videos
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return [
            video if key is None else self.features.features(model, video, key)
            for video, key in zip(videos, keys, strict=True)
        ]

    # override: teacher-forced accuracy of whole answers
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss and share of answers of which every token is the most likely one, over all and by type of question.

        Every process runs the whole set: it is meant to be small.

        Returns:
            `eval_loss`, `eval_accuracy`, `eval_accuracy/{type}`, `eval_answers`, `eval_broken`, `eval_seconds`.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        settings = self.recipe["eval"] or {}
        loader = DataLoader(
            dataset,
            batch_size=settings.get("batch_size", self.args.per_device_eval_batch_size),
            collate_fn=self.eval_collator,
            num_workers=min(self.args.dataloader_num_workers, 1),
        )
        model, begin = self.model_wrapped, time.perf_counter()
        model.eval()
        hits, total, tokens, broken = defaultdict(list), 0.0, 0, 0
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in loader:
                batch = self._prepare_inputs(batch)
                broken += len(batch["broken"])
                entries = drawn(self.recipe, "eval", settings.get("sparse_attention") or {})
                losses, right = self.token_losses(model, batch, entries.pop("sparse_attention"), entries)
                total, tokens = total + losses.item(), tokens + int(batch["labels"].ne(IGNORE).sum())
                for row, start, stop, kind in batch["answers"]:
                    hits[kind].append(bool(right[row, start:stop].all()))
        model.train()
        every = [hit for kind in hits.values() for hit in kind]
        metrics = {"loss": total / max(tokens, 1), "accuracy": sum(every) / max(len(every), 1), "answers": len(every)}
        metrics |= {f"accuracy/{kind}": sum(found) / len(found) for kind, found in sorted(hits.items())}
        metrics |= {"broken": broken, "seconds": round(time.perf_counter() - begin, 1)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # override: the log says how many samples were broken; a loss that is no number ends training
    def log(self, logs, start_time=None):
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower the learning rate or warm up "
                    "longer, and resume from a checkpoint before it"
                )
            logs["broken"] = self.broken.count
            logs["samples"] = self.broken.seen
        super().log(logs, start_time)


class BrokenReport:
    """Counts broken samples and writes `broken_samples.jsonl`: one line each with step, source, name and reason.

    Args:
        path: The file. Processes append to the same one.
        max_broken: Training stops when a larger share of the samples seen is broken.
        process: Index of this process.
    """

    def __init__(self, path: Path, max_broken: float, process: int = 0):
        self.path, self.max_broken, self.process = path, float(max_broken), process
        self.seen = self.count = 0

    def resume(self, step: int, samples_per_step: int) -> None:
        """Continues at `step`: later lines of an interrupted run go, earlier ones count."""
        lines = _keep_lines(self.path, step - 1, rewrite=self.process == 0)
        self.count = sum(line["process"] == self.process for line in lines)
        self.seen = step * samples_per_step

    def take(self, broken: list, samples: int, step: int) -> None:
        """Records a batch.

        Raises:
            ValueError: If too many samples are broken.
        """
        self.seen += samples
        if not broken:
            return
        self.count += len(broken)
        with self.path.open("a", encoding="utf-8") as file:
            for source, name, reason in broken:
                line = {"step": step, "process": self.process, "source": source, "name": name, "reason": reason}
                file.write(json_line(line))
        if self.count > self.max_broken * max(self.seen, MIN_SEEN):
            raise ValueError(
                f"{self.count} of {self.seen} samples are broken, more than max_broken = {self.max_broken:g} allows; "
                f"the last: {name} ({reason}). All are in {self.path}: mend the data, or raise max_broken"
            )


class Journal:
    """`log.jsonl`: what the Trainer logs, a line each, with the step and the seconds since the process began."""

    def __init__(self, path: Path):
        self.path, self.begin = path, time.perf_counter()

    def resume(self, step: int) -> None:
        """Continues at `step`: later lines of an interrupted run go."""
        _keep_lines(self.path, step, rewrite=True)

    def write(self, step: int, logs: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            line = {"step": step, **logs, "wall_seconds": round(time.perf_counter() - self.begin, 1)}
            file.write(json_line(line))


def _keep_lines(path, last_step, rewrite):
    """The lines up to a step; with `rewrite` the others leave the file."""
    if not path.is_file():
        return []
    # The line that was being written when the process was killed is no line.
    lines = [line for _, line in json_lines(path, cut_off=True) if line["step"] <= last_step]
    if rewrite:
        path.write_text("".join(map(json_line, lines)), encoding="utf-8")
    return lines


class JournalCallback(TrainerCallback):
    """Writes the log, and cuts it back to the checkpoint when training resumes."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.trainer.broken.resume(state.global_step, per_step)
        if self.trainer.journal is not None:
            self.trainer.journal.resume(state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.trainer.journal is not None:
            self.trainer.journal.write(state.global_step, logs)
