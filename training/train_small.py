"""Trains the bundled checkpoint from nothing: the parts of training/recipes/small, stage by stage.

    python training/train_small.py [--hours HOURS] [--state FOLDER] [--install]

A part is one recipe; those that begin with the same number are a stage and run at the same time, each on one core (or
`processes`, each with batches of its own). What a part has reached is one file of the state's folder: its weights,
what the optimizer remembers (in bfloat16, to which it is rounded in memory, too, when it is saved) and the step.
Seeds and the place in the data follow from the step. So the same command goes on where it stopped, on any machine: in
the same order of data, and on the same processor to the bit. `--hours` stops in time for that; `--install` puts the
weights and logs of a finished run into the repository.
"""

import argparse
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, set_seed

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.shell.records import json_lines  # noqa: E402
from videoxl.training.looks import LOOKS  # noqa: E402
from videoxl.training.muon import MuonWithAdamW, is_matrix  # noqa: E402
from videoxl.training.recipe import read_numbers, read_recipe  # noqa: E402
from videoxl.training.small_data import ClipBatches, GroupBatches  # noqa: E402
from videoxl.training.small_model import Reading, Seeing, set_embeddings, set_positions  # noqa: E402
from videoxl.training.trainer import Journal  # noqa: E402

RECIPES = ROOT / "training" / "recipes" / "small"
STATE = ROOT / "training" / "state"
LOGS = ROOT / "training" / "logs" / "small"
DEFAULTS = {
    "trains": None,  # "see" or "read"
    "from": [],  # parts whose weights it starts from
    "processes": 1,
    "frames": False,  # whether `read` reads what the vision path sees, instead of facts
    "look": {},
    "text_config": {},  # of the language model's config, what differs from the repository's
    "groups": 64,  # of a batch of `see`
    "data": [],
    "held_out": [],
    "learning_rate": 1e-3,
    "modules": {},  # other rates, by the beginning of parameters' names
    "rates": {0: 0, 50: 1},  # what the rates are multiplied by at steps; straight lines between these
    "beta2": 0.98,
    "max_norm": 1.0,
    "weight_decay": 0.01,
    "steps": 1000,
    "save_steps": 250,
    "log_steps": 25,
    "eval_steps": 500,
    "eval_batches": 2,
    "seed": 0,
}


def parts() -> list[str]:
    """Names of all parts, in order."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_part(path: Path, overrides=()) -> dict:
    """A recipe with its defaults; ValueError on an unknown key or a value that is none."""
    given = read_recipe(path, list(overrides))
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise ValueError(f"a part's recipe has no {', '.join(unknown)}; it has {', '.join(DEFAULTS)}")
    recipe = DEFAULTS | given
    read_numbers(recipe, DEFAULTS)
    if recipe["trains"] not in ("see", "read"):
        raise ValueError(f"trains must be see or read, got {recipe['trains']!r}")
    numbers = [value for pair in recipe["rates"].items() for value in pair]
    if not numbers or not all(isinstance(value, (int, float)) for value in numbers):
        raise ValueError(f"rates must be numbers by step, as {{0: 0, 100: 1}}, got {recipe['rates']!r}")
    if unknown := sorted(set(recipe["look"]) - set(LOOKS)):
        raise ValueError(f"look has no {', '.join(unknown)}; it takes {', '.join(LOOKS)}")
    return recipe


def machine() -> str:
    """The machine, for the log."""
    cpu, told = platform.machine(), Path("/proc/cpuinfo")
    if told.is_file():
        names = [line for line in told.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__}"


class State:
    """A part's file: weights, the optimizer's state, and facts (`step`, `seconds`, `finished`)."""

    def __init__(self, folder: Path, name: str):
        self.path, self.facts, self.tensors = folder / f"{name}.safetensors", {"step": 0, "seconds": 0.0}, {}
        if self.path.is_file():
            with safe_open(self.path, "pt") as file:
                self.facts = json.loads(file.metadata()["facts"])
                self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights by their parameters' names."""
        return {key.removeprefix("weights/"): value for key, value in self.tensors.items() if key[0] == "w"}

    def restore(self, module, optimizer) -> None:
        """Gives a module and its optimizer what the file holds, if there is one."""
        if not self.tensors:
            return
        load_weights(module, self.weights())
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                own = f"optimizer/{name}/"
                found = {k.removeprefix(own): v for k, v in self.tensors.items() if k.startswith(own)}
                part = next(part for part in optimizer.parts if _holds(part, parameter))
                part.state[parameter] = {field: value.float() for field, value in found.items()}

    def save(self, module, optimizer, write: bool = True, **facts) -> None:
        """Rounds the optimizer's state to what the file holds, and writes the file."""
        tensors = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            tensors[f"weights/{name}"] = parameter.detach().contiguous()
            for part in optimizer.parts:
                for field, value in part.state.get(parameter, {}).items():
                    if value.ndim:
                        tensors[f"optimizer/{name}/{field}"] = short = value.bfloat16()
                        value.copy_(short)
                    else:
                        tensors[f"optimizer/{name}/{field}"] = value
        if write:
            self.facts |= facts
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            save_file(tensors, new, {"format": "pt", "facts": json.dumps(self.facts)})
            new.chmod(0o644)  # safetensors writes it for its owner alone
            new.replace(self.path)


def _holds(optimizer, parameter) -> bool:
    return any(parameter is other for group in optimizer.param_groups for other in group["params"])


@torch.no_grad()
def load_weights(module, weights: dict) -> None:
    """Copies the weights that a module has parameters for."""
    for name, parameter in module.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])


def build(recipe: dict, folder: Path):
    """What a part trains, with the weights that it starts from, and the processor."""
    set_seed(0)
    options = {"trust_remote_code": True, "attn_implementation": "eager" if recipe["trains"] == "see" else "sdpa"}
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    config.vision_chunk_frames = 1024
    text = config.text_config.to_dict() | recipe["text_config"]
    text.pop("layer_types", None)  # one a layer
    config.text_config = type(config.text_config)(**text)
    model = AutoModel.from_config(config, **options)
    processor = AutoProcessor.from_pretrained(ROOT, trust_remote_code=True)
    if recipe["trains"] == "see":
        set_positions(model)
        module = Seeing(model)
    else:
        set_embeddings(model, processor.tokenizer)
        module = Reading(model, recipe["look"])
    for name in recipe["from"]:
        state = State(folder, name)
        if not state.facts.get("finished"):
            raise ValueError(f"{name} is not finished, and this part starts from it")
        load_weights(module, state.weights())
        load_weights(model.model, state.weights())
    return module, processor


def batches_of(recipe: dict, processor, sources=None, seed=None):
    """The part's batches; with `sources` held-out ones."""
    split, seed = ("train", recipe["seed"]) if sources is None else ("held_out", seed)
    sources = recipe["data"] if sources is None else sources
    if recipe["trains"] == "see":
        return GroupBatches(sources, processor, seed, split, recipe["groups"])
    return ClipBatches(sources, processor, seed, split, recipe["frames"])


def optimizer_of(module, recipe: dict) -> MuonWithAdamW:
    """Muon for matrices, AdamW at half the rate for the rest."""
    groups = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            matrix = is_matrix(name, parameter) and "head" not in name
            rates = [rate for prefix, rate in recipe["modules"].items() if name.startswith(prefix)]
            rate = float([recipe["learning_rate"], *rates][-1]) * (1.0 if matrix or recipe["trains"] == "see" else 0.5)
            decay = recipe["weight_decay"] if parameter.ndim > 1 else 0.0
            group = {"params": [parameter], "lr": rate, "rate": rate, "weight_decay": decay, "muon": matrix}
            groups.append(group)
    return MuonWithAdamW(groups, betas=(0.9, recipe["beta2"]))


def share_of_rate(recipe: dict, step: int) -> float:
    """What a step's learning rates are multiplied by."""
    points = sorted(recipe["rates"].items())
    return float(np.interp(step + 1, *zip(*points, strict=True)))


class Told:
    """Gathers what the forward passes tell, for the log."""

    def __init__(self):
        self.values = defaultdict(list)

    def add(self, output: dict) -> None:
        """The loss and what else a forward pass returns."""
        self.values["loss"].append(output["loss"].item())
        for kind, value in output["told"].items():
            self.values[kind].append(value)
        for kind, hits in output.get("hits", {}).items():
            self.values[f"right/{kind}"] += hits
            self.values["right+" if kind.endswith("+") else "right"] += hits

    def means(self, short=False) -> dict:
        """Means since the last time; `short` leaves single types of questions out."""
        means = {
            kind: round(sum(values) / len(values), 4)
            for kind, values in sorted(self.values.items())
            if not (short and kind.startswith("right/"))
        }
        self.values.clear()
        return means


@torch.no_grad()
def evaluate(module, recipe: dict, processor) -> dict:
    """What is right in held-out batches, by the names of the recipe's `held_out`."""
    found = {}
    module.eval()
    for number, source in enumerate(recipe["held_out"]):
        told, batches = Told(), batches_of(recipe, processor, [source], source.get("seed", number))
        for index in range(recipe["eval_batches"]):
            told.add(module(**batches[index]))
        found |= {f"held_out/{source.get('name', number)}/{kind}": value for kind, value in told.means().items()}
    module.train()
    return found


def train_part(name: str, folder: Path, until: float = math.inf, place=(0, 1, 0), recipe: dict | None = None) -> State:
    """Trains a part from where its state is to its end, or to a time.

    Args:
        name: Of the part.
        folder: The state's.
        until: Seconds since the epoch, at which it stops.
        place: (number of this process, processes, port on which they meet).
        recipe: Instead of the part's own.
    """
    rank, world, port = place
    torch.set_num_threads(1)
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    recipe = recipe or read_part(RECIPES / f"{name}.yaml")
    module, processor = build(recipe, folder)
    module.train()
    optimizer, state, told = optimizer_of(module, recipe), State(folder, name), Told()
    state.restore(module, optimizer)
    begin, before, first = time.time(), state.facts["seconds"], state.facts["step"]
    batches, journal = batches_of(recipe, processor), Journal(folder / f"{name}.jsonl")
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        journal.resume(first)
        journal.write(first, {"machine": machine(), "processes": world})
    for step in range(first, recipe["steps"]):
        stop = _step(module, optimizer, batches[step * world + rank], recipe, step, rank, world, until, told)
        done = step + 1
        if rank == 0 and done % recipe["log_steps"] == 0:
            journal.write(done, told.means(short=True))
        if rank == 0 and recipe["held_out"] and done % recipe["eval_steps"] == 0:
            journal.write(done, evaluate(module, recipe, processor))
        finished = done == recipe["steps"]
        if finished or stop or done % recipe["save_steps"] == 0:
            seconds = round(before + time.time() - begin, 1)
            state.save(module, optimizer, write=rank == 0, step=done, seconds=seconds, finished=finished)
        if stop:
            break
    return state


def _step(module, optimizer, batch, recipe, step, rank, world, until, told) -> bool:
    """One step; whether it is time to stop, on which all processes agree."""
    for group in optimizer.param_groups:
        group["lr"] = group["rate"] * share_of_rate(recipe, step)
    torch.manual_seed(1_000_003 * recipe["seed"] + world * step + rank)
    output = module(**batch)
    output["loss"].backward()
    told.add(output)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    late = torch.tensor([float(rank == 0 and time.time() > until)])
    if world > 1:
        # Also where a process had nothing for a parameter, as none of its rows had options.
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(grad.flatten() for grad in grads), late])
        torch.distributed.all_reduce(flat)
        late = flat[-1:]
        for parameter, grad in zip(parameters, flat[:-1].split([g.numel() for g in grads]), strict=True):
            parameter.grad = grad.view_as(parameter) / world
    torch.nn.utils.clip_grad_norm_(parameters, recipe["max_norm"])
    optimizer.step()
    optimizer.zero_grad()
    return bool(late > 0)


def free_port() -> int:
    """A port of this machine at which processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_finished(folder: Path, name: str) -> bool:
    """Whether a part is at the end of its recipe, which may have become longer since."""
    facts = State(folder, name).facts
    return facts.get("finished", False) and facts["step"] >= read_part(RECIPES / f"{name}.yaml")["steps"]


def train(folder: Path, hours: float = math.inf) -> bool:
    """Runs all that is not finished, stage by stage; whether all is finished then.

    Raises:
        RuntimeError: If a process fails.
    """
    until, names = time.time() + 3600 * hours, parts()
    for stage in sorted({name.partition("_")[0] for name in names}):
        running = []
        for name in (name for name in names if name.partition("_")[0] == stage):
            if is_finished(folder, name):
                print(f"{name}: finished before", flush=True)
                continue
            processes = read_part(RECIPES / f"{name}.yaml")["processes"]
            port = free_port()
            for rank in range(processes):
                command = [sys.executable, str(Path(__file__).resolve()), "--state", str(folder), "--part", name]
                command += ["--place", str(rank), str(processes), str(port)]
                command += ["--until", str(until)] if math.isfinite(until) else []
                running.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}))
        try:
            while any(process.poll() is None for process in running):
                if any(process.poll() for process in running):
                    break
                time.sleep(1)
        finally:
            for process in running:
                if process.poll() is None:
                    process.terminate()
        if any(process.wait() for process in running):
            raise RuntimeError(f"a process of stage {stage} failed; what it wrote is above")
        if not all(is_finished(folder, name) for name in names if name.startswith(f"{stage}_")):
            return False
    return True


def install(folder: Path, root: Path = ROOT) -> None:
    """Puts the weights and logs of a finished run into a repository, and draws the curves."""
    set_seed(0)  # of what no part trains
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True)
    for name in parts():
        load_weights(model.model, State(folder, name).weights())
    with tempfile.TemporaryDirectory() as written:
        model.save_pretrained(written)
        shutil.copyfile(Path(written) / "model.safetensors", root / "model.safetensors")
    logs = root / LOGS.relative_to(ROOT)
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    for name in parts():
        shutil.copyfile(folder / f"{name}.jsonl", logs / f"{name}.jsonl")
    draw_curves(read_logs(logs), logs / "curves.png")


def read_logs(folder: Path) -> list[tuple[str, list[dict]]]:
    """Per part its name and the lines of its log."""
    return [(path.stem, [line for _, line in json_lines(path)]) for path in sorted(folder.glob("*.jsonl"))]


def draw_curves(logs: list[tuple[str, list[dict]]], path: Path) -> None:
    """Draws loss and held-out accuracy over the steps of each part, as PNG.

    Args:
        logs: See `read_logs`.
        path: The picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = {"figsize": (4 * len(logs), 6), "constrained_layout": True, "squeeze": False}
    figure, axes = pyplot.subplots(2, len(logs), sharex="col", **size)
    for (name, lines), (top, bottom) in zip(logs, axes.T, strict=True):
        steps = [line for line in lines if "loss" in line]
        top.plot([line["step"] for line in steps], [line["loss"] for line in steps])
        top.set(title=name, yscale="log")
        for kind in sorted({key for line in lines for key in line if key.startswith("held_out/")}):
            if kind.count("/") == 2 and kind.endswith("/right"):
                known = [line for line in lines if kind in line]
                values = [line[kind] for line in known]
                bottom.plot([line["step"] for line in known], values, "o-", label=kind.split("/")[1], markersize=3)
        bottom.set(xlabel="steps", ylim=(0, 1))
        if bottom.lines:
            bottom.legend(fontsize=7)
    axes[0, 0].set(ylabel="training loss")
    axes[1, 0].set(ylabel="right, held out")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, default=STATE, help="folder of the parts' states")
    parser.add_argument("--hours", type=float, default=math.inf, help="stop after so many, to go on later")
    parser.add_argument("--install", action="store_true", help="put a finished run into the repository")
    # Of the processes that it starts.
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=int, nargs=3, default=(0, 1, 0), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.state.resolve()
    if arguments.part:
        train_part(arguments.part, folder, arguments.until, tuple(arguments.place))
        return
    if not train(folder, arguments.hours):
        print(f"not finished; the same command goes on from {folder}")
    elif arguments.install:
        install(folder)


if __name__ == "__main__":
    main()
