"""Trains the bundled checkpoint from nothing: all recipes of training/recipes/small, one after the other.

    python training/train_small.py [--output outputs/small] [--from STAGE] [--install]

A stage that is finished is skipped and one that was interrupted goes on where its last checkpoint stands, so the same
command resumes. `--from 6_long` starts at that stage from the repository's committed weights instead of the stage
before it. `--install` copies the result into the repository's root, the logs into training/logs/small and draws the
curves.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "training" / "recipes" / "small"
LOGS = ROOT / "training" / "logs" / "small"


def stages() -> list[str]:
    """Names of the stages, in order."""
    return sorted((path.stem for path in RECIPES.glob("*.yaml")), key=number_of)


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
            settings |= {"init": "null", "model": ROOT} | ({"load": "{}"} if "load" in given else {})
        elif "model" in given:
            settings["model"] = output / Path(given["model"]).name
            for module, part in given.get("load", {}).items():
                settings[f"load.{module}.path"] = output / Path(part["path"]).name
        program = "pretrain_vision" if given.get("stage") == "see" else "train"
        command = [sys.executable, str(ROOT / "training" / f"{program}.py"), str(recipe), "--resume"]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        subprocess.run(command, cwd=ROOT, check=True)
    return output / names[-1]


def read_logs(folder: Path) -> list[tuple[str, list[dict]]]:
    """Per stage its name and the lines of its log."""
    return [
        (path.stem, [json.loads(line) for line in path.read_text().splitlines()])
        for path in sorted(folder.glob("*.jsonl"), key=lambda path: number_of(path.stem))
    ]


def draw_curves(logs: list[tuple[str, list[dict]]], path: Path) -> None:
    """Draws loss and held-out accuracy over the samples of all stages, as PNG.

    Args:
        logs: See `read_logs`.
        path: The picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(10, 7), sharex=True, constrained_layout=True)
    begin = 0.0
    for number, (name, lines) in enumerate(logs):
        steps = [line for line in lines if "loss" in line]
        batch = steps[-1]["samples"] / steps[-1]["step"]
        color = f"C{number}"
        top.plot([begin + line["step"] * batch for line in steps], [line["loss"] for line in steps], color=color)
        evaluated = [line for line in lines if "eval_accuracy" in line]
        places = [begin + line["step"] * batch for line in evaluated]
        bottom.plot(places, [line["eval_accuracy"] for line in evaluated], "o-", color=color, label=name)
        for axes in (top, bottom):
            axes.axvline(begin, color="0.8", linewidth=0.8)
        begin += steps[-1]["samples"]
    top.set(ylabel="training loss", yscale="log")
    bottom.set(
        ylabel="held-out answers right\n(teacher forced, each stage's own clips)", xlabel="clips seen", ylim=(0, 1)
    )
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=100)


def install(folder: Path, output: Path) -> None:
    """Copies weights and logs into the repository and draws the curves."""
    shutil.copyfile(folder / "model.safetensors", ROOT / "model.safetensors")
    LOGS.mkdir(parents=True, exist_ok=True)
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
