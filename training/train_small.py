"""Trains the bundled checkpoint from nothing: all recipes of training/recipes/small, one after the other.

    python training/train_small.py [--output outputs/small] [--from STAGE] [--install]

A stage that is finished is skipped and one that was interrupted goes on where its last checkpoint stands, so the same
command resumes. `--from 4_settle` starts at that stage from the repository's committed weights instead of the stage
before it. `--install` copies the result into the repository's root, the logs into training/logs/small and draws the
curves.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.shell.records import json_lines  # noqa: E402

RECIPES = ROOT / "training" / "recipes" / "small"
LOGS = ROOT / "training" / "logs" / "small"
HEADS = LOGS / "heads.safetensors"  # of the last reading stage; they go along from stage to stage
PROGRAMS = {"see": "pretrain_vision.py", "read": "pretrain_reading.py"}


def stages() -> list[str]:
    """Names of the stages, in order."""
    return sorted((path.stem for path in RECIPES.glob("*.yaml")), key=number_of)


def within(output: Path, path: str) -> Path:
    """Where a file or folder of a recipe's `outputs/small` lies when the stages' folders are in `output`."""
    return output / Path(path).relative_to("outputs/small")


def number_of(stage: str) -> int:
    """The number in front of a stage's name."""
    return int(stage.partition("_")[0])


def train(output: Path, first: str | None) -> Path:
    """Runs what is not finished yet.

    Args:
        output: Folder with one folder a stage.
        first: Stage to start from the committed weights, or None to start from nothing.

    Returns:
        The last stage's folder.

    Raises:
        ValueError: If there is no such stage.
        subprocess.CalledProcessError: If a stage fails.
    """
    names = stages()
    if first is not None and first not in names:
        raise ValueError(f"there is no stage {first!r}; there are {', '.join(names)}")
    names = names[names.index(first) if first else 0 :]
    for name in names:
        folder = output / name
        if (folder / "model.safetensors").is_file():
            print(f"{name}: finished before, in {folder}")
            continue
        recipe = RECIPES / f"{name}.yaml"
        given = yaml.safe_load(recipe.read_text())
        settings = {"output_dir": folder}
        if name == first:
            # What the stage would take from earlier ones is in the committed weights.
            settings |= {"init": "null", "model": ROOT, "load": "{}"}
            settings |= {"heads": HEADS} if given["stage"] == "read" else {}
        else:
            for key in ("model", "heads"):
                if given.get(key):
                    settings[key] = within(output, given[key])
            for module, part in given.get("load", {}).items():
                settings[f"load.{module}.path"] = within(output, part["path"])
        command = [sys.executable, str(ROOT / "training" / PROGRAMS[given["stage"]]), str(recipe), "--resume"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return output / names[-1]


def read_logs(folder: Path) -> list[tuple[str, list[dict]]]:
    """Per stage its name and the lines of its log."""
    return [
        (path.stem, [line for _, line in json_lines(path)])
        for path in sorted(folder.glob("*.jsonl"), key=lambda path: number_of(path.stem))
    ]


def draw_curves(logs: list[tuple[str, list[dict]]], path: Path) -> None:
    """Draws loss and held-out accuracy over the steps of each stage, as PNG.

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
        evaluated = [line for line in lines if "eval_accuracy" in line]
        for kind in ("", *sorted({key[13:] for line in evaluated for key in line if key.count("/") == 1})):
            # What a reading stage asks of each kind of clips; a seeing stage has a kind for each fact.
            known = [line for line in evaluated if f"eval_accuracy{kind}" in line]
            places, values = [line["step"] for line in known], [line[f"eval_accuracy{kind}"] for line in known]
            bottom.plot(places, values, "o-", label=kind.strip("/") or "all", markersize=3)
        bottom.set(xlabel="steps", ylim=(0, 1))
        bottom.legend(fontsize=7)
    axes[0, 0].set(ylabel="training loss")
    axes[1, 0].set(ylabel="right, held out")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def install(folder: Path, output: Path) -> None:
    """Copies weights and logs into the repository and draws the curves."""
    shutil.copyfile(folder / "model.safetensors", ROOT / "model.safetensors")
    LOGS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "heads.safetensors", HEADS)
    for name in stages():
        if (output / name / "log.jsonl").is_file():
            shutil.copy(output / name / "log.jsonl", LOGS / f"{name}.jsonl")
    draw_curves(read_logs(LOGS), LOGS / "curves.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "small", help="folder of the stages")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="start here, from the committed weights")
    parser.add_argument("--install", action="store_true", help="copy the result into the repository's root")
    arguments = parser.parse_args()
    folder = train(arguments.output.resolve(), arguments.first)
    print(f"the model is in {folder}")
    if arguments.install:
        install(folder, arguments.output.resolve())


if __name__ == "__main__":
    main()
