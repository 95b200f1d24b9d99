"""The bundled checkpoint's recipes, their order, and the curves."""

import runpy
import sys

import pytest
from command_line import run_main

pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def workshop(root):
    sys.path.insert(0, str(root))
    import training.pretrain_reading as read
    import training.pretrain_vision as see
    import training.train_small as small

    yield {"see": see, "read": read}, small
    sys.path.remove(str(root))


def test_recipes_follow_each_other(workshop):
    programs, small = workshop
    names = small.stages()
    assert len(names) >= 2
    earlier = set()
    for name in names:
        path = small.RECIPES / f"{name}.yaml"
        recipe = programs[yaml.safe_load(path.read_text())["stage"]].load_recipe(path, [])
        assert recipe["output_dir"] == f"outputs/small/{name}"
        sources = [recipe["model"], recipe.get("heads"), *(part["path"] for part in recipe["load"].values())]
        for source in filter(None, sources):
            assert source.removesuffix("/heads.safetensors") in earlier, "a stage starts from earlier ones"
        earlier.add(recipe["output_dir"])


def test_commands_point_into_the_output_folder(workshop, tmp_path, monkeypatch):
    _, small = workshop
    commands = []

    def run(command, cwd, check):
        commands.append(command)

    monkeypatch.setattr(small.subprocess, "run", run)
    names = small.stages()
    assert small.train(tmp_path, None) == tmp_path / names[-1]
    assert [command[2].rsplit("/", 1)[1] for command in commands] == [f"{name}.yaml" for name in names]
    for command in commands:
        assert not any("=outputs/" in part for part in command)
    commands.clear()
    small.train(tmp_path, names[-1])
    assert len(commands) == 1 and f"model={small.ROOT}" in commands[0]
    # Every reading stage goes on with the committed story heads, whatever its recipe starts from.
    first = next(
        name for name in names if yaml.safe_load((small.RECIPES / f"{name}.yaml").read_text())["stage"] == "read"
    )
    commands.clear()
    small.train(tmp_path, first)
    assert f"heads={small.HEADS}" in commands[0] and small.HEADS.is_file()


def test_an_unknown_stage_and_an_unknown_key_are_named(workshop, tmp_path):
    programs, small = workshop
    with pytest.raises(ValueError, match="no stage 'x'"):
        small.train(tmp_path, "x")
    for stage, name in (("see", small.stages()[0]), ("read", small.stages()[-1])):
        with pytest.raises(ValueError, match="no colour"):
            programs[stage].load_recipe(small.RECIPES / f"{name}.yaml", ["colour=1"])


def test_stages_that_are_finished_are_skipped(workshop, tmp_path, capsys):
    _, small = workshop
    for name in small.stages():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert small.train(tmp_path, None) == tmp_path / small.stages()[-1]
    assert capsys.readouterr().out.count("finished before") == len(small.stages())


def test_curves_of_the_committed_logs(workshop, root, tmp_path):
    pytest.importorskip("matplotlib")
    _, small = workshop
    logs = small.read_logs(root / "training" / "logs" / "small")
    assert [name for name, _ in logs] == small.stages(), "the logs of the bundled checkpoint's stages"
    small.draw_curves(logs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_help(root, monkeypatch):
    for name in ("train_small", "pretrain_vision", "pretrain_reading"):
        path = root / "training" / f"{name}.py"
        # As Python starts a file.
        monkeypatch.syspath_prepend(str(path.parent))
        monkeypatch.setattr(sys, "argv", [str(path), "--help"])
        run = run_main(lambda _, path=path: runpy.run_path(str(path), run_name="__main__"))
        assert run.returncode == 0 and "usage" in run.stdout, run.stderr


def test_numbers_that_yaml_takes_for_text_and_unknown_looks(workshop):
    programs, small = workshop
    path = small.RECIPES / f"{small.stages()[-1]}.yaml"
    assert programs["read"].load_recipe(path, ["learning_rate=3e-3"])["learning_rate"] == 0.003
    with pytest.raises(ValueError, match="learning_rate must be a number, got 'fast'"):
        programs["read"].load_recipe(path, ["learning_rate=fast"])
    with pytest.raises(ValueError, match="look has no cards; it takes card, shape"):
        programs["read"].load_recipe(path, ["look.cards=[0, 0]"])
