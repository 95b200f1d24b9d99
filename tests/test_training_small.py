"""The bundled checkpoint's recipes, their order, and the curves."""

import json
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
from command_line import run_main

pytest.importorskip("accelerate")
pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def small(root):
    import videoxl.training.train_small as small

    return small


def test_recipes_follow_each_other(small):
    finished, trained = set(), set()
    names = small.parts()
    for stage in sorted({name[0] for name in names}):
        now = [name for name in names if name[0] == stage]
        recipes = [small.read_part(small.RECIPES / f"{name}.yaml") for name in now]
        for recipe in recipes:
            assert set(recipe["from"]) <= finished, "a part starts from those of earlier stages"
            assert recipe["data"] and recipe["held_out"] and recipe["frames"] <= {"1_see", "1_read"}.issubset(finished)
        assert sum(recipe["processes"] for recipe in recipes) <= 2, "a stage is for two cores"
        finished |= set(now)
        trained |= {recipe["trains"] for recipe in recipes}
    assert trained == {"see", "read"}


def test_every_source_gives_batches(small, root):
    """As small as they can be: what a recipe's sources name is known."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(root, trust_remote_code=True)
    for name in small.parts():
        recipe = small.read_part(small.RECIPES / f"{name}.yaml")
        for source in recipe["data"] + recipe["held_out"]:
            clip = source["clip"] | {"seconds": min(source["clip"]["seconds"], 16)}
            source = source | {"clip": clip | {"cards": 2, "chains": 1}, "clips": 1, "from": 0, "segments": 1}
            batch = small.batches_of(recipe | {"groups": 4, "frames": False}, processor, [source], 0)[0]
            assert batch["facts"].shape[-2:] == (9, 91)


def test_wrong_recipes_are_named(small):
    path = small.RECIPES / "1_read.yaml"
    assert small.read_part(path, ["learning_rate=3e-3"])["learning_rate"] == 0.003
    for override, says in (
        ("colour=1", "no colour"),
        ("learning_rate=fast", "learning_rate must be a number, got 'fast'"),
        ("look.cards=[0, 0]", "look has no cards; it takes card, shape"),
        ("trains=write", "trains must be see or read, got 'write'"),
        ("rates={0: much}", "rates must be numbers by step"),
    ):
        with pytest.raises(ValueError, match=says):
            small.read_part(path, [override])


def test_finished_stages_are_skipped_and_the_next_is_started(small, tmp_path, monkeypatch, capsys):
    commands = []

    class Process:
        def __init__(self, command, env):
            commands.append(command)
            small.State(tmp_path, command[command.index("--part") + 1]).path.touch()

        def poll(self):
            return 0

        wait = poll

    class State:
        def __init__(self, folder, name):
            self.path = folder / name
            self.facts = {"finished": self.path.is_file(), "step": 10**6}

    monkeypatch.setattr(small, "State", State)
    monkeypatch.setattr(small.subprocess, "Popen", Process)
    (tmp_path / "1_see").touch()
    assert small.train(tmp_path)
    assert capsys.readouterr().out == "1_see: finished before\n"
    started = [command[command.index("--part") + 1] for command in commands]
    assert started == ["1_read", "2_meet", "2_meet"]
    assert [command[command.index("--place") + 1] for command in commands] == ["0", "0", "1"]
    assert small.train(tmp_path) and len(commands) == 3


def test_a_recipe_that_became_longer_goes_on(small, tmp_path):
    state = small.State(tmp_path, "1_see")
    steps = small.read_part(small.RECIPES / "1_see.yaml")["steps"]
    for step, finished in ((steps - 1, True), (steps, False), (steps, True)):
        state.save(small.torch.nn.Linear(1, 1), SimpleNamespace(parts=[]), step=step, finished=finished)
        assert small.is_finished(tmp_path, "1_see") == (finished and step == steps)


def test_a_process_that_fails_stops_its_stage(small, tmp_path, monkeypatch):
    class Process:
        def __init__(self, command, env):
            self.code = 1 if "1_see" in command else None

        def poll(self):
            return self.code

        def wait(self):
            return self.code

        def terminate(self):
            self.code = -15

    monkeypatch.setattr(small.subprocess, "Popen", Process)
    with pytest.raises(RuntimeError, match="stage 1 failed"):
        small.train(tmp_path)


TOGETHER = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
from videoxl.training import small_model, train_small
small_model.PLACE_WEIGHT = 0.0
recipe = train_small.DEFAULTS | json.loads(sys.argv[3])
recipe["rates"] = {0: 0, 1: 1}  # JSON has no numbers as keys
train_small.train_part("p", pathlib.Path(sys.argv[2]), place=tuple(map(int, sys.argv[4:])), recipe=recipe)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(small, root, tmp_path, monkeypatch):
    """The mean of both gradients: a step of two processes with clips of their own is what all clips ask for.

    But for where shapes stand: that is a mean over the shapes shown, of which one process has many more.
    """
    import torch
    from videoxl.training import small_model

    monkeypatch.setattr(small_model, "PLACE_WEIGHT", 0.0)

    text = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3}
    recipe = {
        "trains": "see",
        "groups": 16,  # several clips each: what is told is a mean over what is shown, and clips show more or less
        "data": [{"clip": {"seconds": 4}}],
        "steps": 2,
        "save_steps": 1,
    }
    recipe |= {"text_config": text, "learning_rate": 1e-3, "max_norm": 1e9}
    port = small.free_port()
    command = [sys.executable, "-c", TOGETHER, str(root), str(tmp_path), json.dumps(recipe)]
    both = [subprocess.Popen([*command, str(rank), "2", str(port)]) for rank in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    state = small.State(tmp_path, "p")
    assert state.facts["step"] == 2 and state.facts["finished"]

    class Both:
        def __init__(self, *given):
            self.batches = found(*given)

        def __getitem__(self, index):
            pair = [self.batches[2 * index + rank] for rank in range(2)]
            return {key: torch.cat([batch[key] for batch in pair]) for key in pair[0]}

    found = small.batches_of
    small.batches_of = Both
    try:
        alone = small.train_part("one", tmp_path, recipe=small.DEFAULTS | recipe | {"rates": {0: 0, 1: 1}})
    finally:
        small.batches_of = found
    assert alone.facts["step"] == 2
    weights = small.State(tmp_path, "one").weights()
    fresh = dict(small.build(small.DEFAULTS | recipe, tmp_path)[0].named_parameters())

    def far(others):
        return (
            sum(float((value - others[name].detach()).square().sum()) for name, value in state.weights().items())
            ** 0.5
        )

    assert far(weights) < 0.2 * far(fresh)


def test_curves_of_the_committed_logs(small, root, tmp_path):
    pytest.importorskip("matplotlib")
    logs = small.read_logs(root / "training" / "logs" / "small")
    assert logs
    small.draw_curves(logs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_what_is_installed_is_what_was_trained(small, root, tmp_path, monkeypatch):
    """The weights of all parts, under the names that the repository's file has."""
    pytest.importorskip("matplotlib")
    import torch
    from safetensors.torch import load_file

    eyes = {"trains": "see", "groups": 2, "data": [{"clip": {"seconds": 4}}]}
    mind = {"trains": "read", "data": [{"clips": 1, "questions": 2, "clip": {"seconds": 4}}], "from": ["eyes"]}
    for name, part in (("eyes", eyes), ("mind", mind)):
        part |= {"steps": 1, "log_steps": 1, "held_out": part["data"], "eval_steps": 1, "eval_batches": 1}
        small.train_part(name, tmp_path, recipe=small.DEFAULTS | part)
    monkeypatch.setattr(small, "parts", lambda: ["eyes", "mind"])
    small.install(tmp_path, tmp_path)
    written, before = (load_file(folder / "model.safetensors") for folder in (tmp_path, root))
    assert {name: value.shape for name, value in written.items()} == {n: v.shape for n, v in before.items()}
    seen, read = (small.State(tmp_path, name).weights() for name in ("eyes", "mind"))
    heads = ("story", "patch_head", "place_head")  # are thrown away
    trained = {name: value for name, value in (seen | read).items() if not name.startswith(heads)}
    assert all(torch.equal(written[f"model.{name}"], value) for name, value in trained.items())
    assert set(written) - {f"model.{name}" for name in trained} <= {n for n in written if "vision_tower" in n}
    assert sorted(path.name for path in (tmp_path / "training/logs/small").iterdir()) == [
        "curves.png", "eyes.jsonl", "mind.jsonl"]  # fmt: skip


def test_help(root, monkeypatch):
    path = root / "training" / "train_small.py"
    # As Python starts a file.
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    run = run_main(lambda _: runpy.run_path(str(path), run_name="__main__"))
    assert run.returncode == 0 and "usage" in run.stdout, run.stderr
