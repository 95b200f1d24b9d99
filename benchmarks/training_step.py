"""A training step: samples and tokens a second, memory, and the logits that the loss needs, by what is switched on.

What is surprising:
* Every way sees the same samples, drawn once: texts, single groups of frames and short videos, as mixtures have them.
  "baseline" pads batches of some samples drawn at random and computes logits for every token, as a plain `Trainer`
  with labels does; the others change one thing each, and "together" all but checkpointing.
* Speed is given by CPU seconds, too: on a machine with other work they say more than those of wall time.
* The tower and the compressor are frozen in all ways, projector and language model are trained, by SGD, whose state
  takes no memory.
* Memory on a CPU is the growth of resident memory over the loaded model, in a process of its own.
"""

import contextlib
import statistics
import tempfile
import time
from importlib import import_module

import numpy as np
import torch
from common import MIB, PeakMemory, build_model, clock, in_fresh_process, load_config, parse, parser, report, table

EPILOG = """\
examples:
  python benchmarks/training_step.py --out training_cpu
      Width 512, two CPU threads (minutes).

  python benchmarks/training_step.py --preset video-xl-2-8b --device cuda --samples 32 --out training_h200
      A published model's sizes on a GPU (bfloat16 weights, so one of 141 GB holds them, gradients and activations).
"""
WAYS = {
    "baseline": {},
    "logits where labels are": {"visible": True},
    "checkpointing": {"visible": True, "checkpointing": True},
    "grouped by length": {"visible": True, "grouped": True},
    "packing": {"visible": True, "packing": True},
    "kept features": {"visible": True, "features": True},
    "together": {"visible": True, "packing": True, "features": True},
}
IGNORE, ANSWER = -100, 12


def main() -> None:
    arguments = parser(__doc__, EPILOG)
    for flag, default, text in (
        ("--hidden", 512, "width of the language model"),
        ("--layers", 4, "its layers"),
        ("--heads", 8, "query heads"),
        ("--kv-heads", 2, "key-value heads"),
        ("--mlp", 1376, "width of its MLP"),
        ("--vocabulary", 32768, "words"),
        ("--tower", 192, "width of the vision tower, of 4 layers over 224 x 224 pixels"),
        ("--samples", 48, "samples in all"),
        ("--batch", 8, "samples in a padded batch"),
        ("--seed", 0, "of the samples"),
    ):
        arguments.add_argument(flag, type=int, default=default, help=text)
    args = parse(arguments)
    ways = {name: in_fresh_process(run_way, name, args) for name in WAYS}
    base = ways["baseline"]
    rows = []
    for name, found in ways.items():
        if found == "out of memory":
            rows.append([name, found, "", "", "", "", ""])
            continue
        rates = [found["samples_a_second"], found["tokens_a_second"], found["cpu_samples_a_second"]]
        gain = found["cpu_samples_a_second"] / base["cpu_samples_a_second"] if base != "out of memory" else 0
        rows.append([name, *(f"{rate:.2f}" for rate in rates), f"{gain:.2f}", found["peak_mib"], found["logits_mib"]])
    header = ["way", "samples/s", "tokens/s", "samples/CPU s", "gain", "growth MiB", "largest logits MiB"]
    table(header, rows)
    loss = in_fresh_process(loss_memory, args)
    table(["visual tokens", "logits of all, MiB", "where labels are, MiB"], [list(row.values()) for row in loss])
    report("training_step", args, {"ways": ways, "loss": loss})


def draw_samples(config, args) -> list[dict]:
    """Ids, labels and the number of frames of each sample."""
    rng, samples = np.random.default_rng(args.seed), []
    group = config.compressor_config.tokens_per_group
    for _ in range(args.samples):
        kind = rng.random()
        groups = 0 if kind < 0.5 else 1 if kind < 0.8 else int(rng.integers(2, 9))
        text = rng.integers(40, 160 if groups else 240)
        ids = rng.integers(10, 1000, int(text) + ANSWER)
        visual = np.full(groups * group, config.video_token_id)
        ids = torch.from_numpy(np.concatenate([ids[:14], visual, ids[14:]]))
        labels = torch.full_like(ids, IGNORE)
        labels[-ANSWER:] = ids[-ANSWER:]
        samples.append({"ids": ids, "labels": labels, "frames": 4 * groups})
    return samples


def make_config(args):
    """The language model of the flags with a tower that takes its share of the time."""
    args.group_tokens = args.timestamp_tokens = args.chunk_groups = args.window_chunks = 1
    config = load_config(args)
    if args.preset:
        return config
    facts = config.to_dict()
    facts["text_config"] |= {"vocab_size": args.vocabulary}
    facts["vision_config"] |= {
        "hidden_size": args.tower, "intermediate_size": 4 * args.tower, "num_hidden_layers": 5,
        "num_attention_heads": 4, "image_size": 224, "patch_size": 14,
    }  # fmt: skip
    facts["compressor_config"] |= {"hidden_size": args.tower, "grid_size": 24, "projector_pool_size": 2}
    facts |= {"time_format": None, "time_start_token_id": None, "time_end_token_id": None}
    return type(config).from_dict(facts)


def batches_of(samples, way, args) -> list[list[int]]:
    """Which samples are run at once: as many tokens on average, padding included, in every way."""
    batches = import_module("videoxl.training.batches")
    lengths = [len(sample["ids"]) for sample in samples]
    if way.get("packing"):
        budget = int(statistics.fmean(lengths) * args.batch)
        return list(batches.BudgetBatches(lengths, budget, True, args.seed, lambda: 0))
    order = np.random.default_rng(args.seed).permutation(len(samples))
    if way.get("grouped"):
        order = order[np.argsort([lengths[index] for index in order], kind="stable")]
    return [order[start : start + args.batch].tolist() for start in range(0, len(order), args.batch)]


def inputs_of(samples, chosen, videos, way, device) -> dict:
    """The model's arguments for some samples."""
    picked = [samples[index] for index in chosen]
    if way.get("packing"):
        inputs = {name: torch.cat([sample[key] for sample in picked])[None] for name, key in KEYS}
        inputs["position_ids"] = torch.cat([torch.arange(len(sample["ids"])) for sample in picked])[None]
    else:
        width = max(len(sample["ids"]) for sample in picked)
        fillers = {"input_ids": 0, "labels": IGNORE}
        inputs = {name: torch.full((len(picked), width), fillers[name]) for name, _ in KEYS}
        for row, sample in enumerate(picked):
            for name, key in KEYS:
                inputs[name][row, : len(sample[key])] = sample[key]
    if way.get("visible"):
        inputs["logits_to_keep"] = inputs["labels"][:, 1:].ne(IGNORE).any(dim=0).nonzero().flatten()
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    if shown := [videos[index] for index in chosen if index in videos]:
        inputs["pixel_values_videos"] = shown
    return inputs


KEYS = (("input_ids", "ids"), ("labels", "labels"))


@torch.enable_grad()
def run_way(name: str, args) -> dict:
    """Trains on all samples once to warm up and `repeats` times measured; the median counts."""
    way, config = WAYS[name], make_config(args)
    model = build_model(config, args).train()
    model.model.vision_tower.requires_grad_(False)
    model.model.compressor.requires_grad_(False)
    if way.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    samples, side = draw_samples(config, args), config.vision_config.image_size
    generator, dtype = torch.Generator().manual_seed(args.seed), getattr(torch, args.dtype)
    videos = {
        index: torch.randn(sample["frames"], 3, side, side, generator=generator, dtype=dtype)
        for index, sample in enumerate(samples)
        if sample["frames"]
    }
    logits, files = [0], contextlib.ExitStack()
    folder = files.enter_context(tempfile.TemporaryDirectory())
    if way.get("features"):
        videos = kept_features(model, videos, folder)
    hook = model.lm_head.register_forward_hook(lambda module, given, out: logits.append(out.numel() * 4))
    batches, times = batches_of(samples, way, args), []
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    peak = PeakMemory(args.device)
    for _ in range(args.repeats + 1):
        begin, cpu = clock(args.device), time.process_time()
        for chosen in batches:
            shown = {index: read(videos[index]) for index in chosen if index in videos}
            model(**inputs_of(samples, chosen, shown, way, args.device), use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        times.append((clock(args.device) - begin, time.process_time() - cpu))
    hook.remove()
    files.close()
    wall, cpu = (statistics.median(values) for values in zip(*times[1:], strict=True))
    tokens = sum(len(sample["ids"]) for sample in samples)
    run_tokens = sum(
        (sum if way.get("packing") else lambda n: max(n) * len(n))([len(samples[index]["ids"]) for index in chosen])
        for chosen in batches
    )
    return {
        "samples_a_second": len(samples) / wall,
        "tokens_a_second": tokens / wall,
        "cpu_samples_a_second": len(samples) / cpu,
        "share_of_padding": round(1 - tokens / run_tokens, 3),
        "batches": len(batches),
        "peak_mib": round(peak.growth() / MIB),
        "logits_mib": round(max(logits) / MIB),
    }


def read(video):
    """A video's pixels, or its features from the file where they are kept."""
    if torch.is_tensor(video):
        return video
    from safetensors.torch import load_file

    return load_file(video)["features"]


@torch.no_grad()
def kept_features(model, videos: dict, folder: str) -> dict:
    """Files with the tower's output, as training keeps them."""
    from safetensors.torch import save_file

    files = {}
    for index, pixels in videos.items():
        features = model.get_video_features([pixels], output_tower_features=True).tower_features[0]
        files[index] = f"{folder}/{index}.safetensors"
        save_file({"features": features.cpu().contiguous()}, files[index])
    return files


def loss_memory(args) -> list[dict]:
    """What the head puts out for one sample, by its visual tokens, in MiB."""
    config = make_config(args)
    model, side, rows, sizes = build_model(config, args), config.vision_config.image_size, [], []
    model.lm_head.register_forward_hook(lambda module, given, out: sizes.append(out.numel() * out.element_size()))
    for groups in (1, 4, 16):
        visual = torch.full((groups * config.compressor_config.tokens_per_group,), config.video_token_id)
        ids = torch.cat([torch.arange(10, 24), visual, torch.arange(30, 30 + 2 * ANSWER)])
        sample = {"ids": ids, "labels": torch.full_like(ids, IGNORE)}
        sample["labels"][-ANSWER:] = ids[-ANSWER:]
        videos = {0: torch.zeros(4 * groups, 3, side, side, dtype=getattr(torch, args.dtype))}
        for way in ({}, {"visible": True}):
            model(**inputs_of([sample], [0], videos, way, args.device), use_cache=False)
        rows.append({"visual": len(visual), "all": round(sizes[-2] / MIB, 2), "kept": round(sizes[-1] / MIB, 2)})
    return rows


if __name__ == "__main__":
    main()
