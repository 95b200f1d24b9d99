"""The bundled checkpoint's own stages: seeing, the order of recipes, the curves."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, set_seed

pytest.importorskip("accelerate")
yaml = pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def workshop(root):
    sys.path.insert(0, str(root))
    import training.pretrain_vision as see
    import training.recipe as recipe
    import training.train_small as small

    yield see, recipe, small
    sys.path.remove(str(root))


def test_facts_say_what_a_frame_shows(workshop):
    import training.vision_facts as see
    from video_world import make_clip

    clip = make_clip(3, "held_out", seconds=32, cards=3, signs=2, shapes=4, num_questions=0)
    names = list(see.INDEX)
    for time in np.arange(0, 32, 0.25):
        facts, places = see.facts_of(clip, time)
        shown = {names[index] for index in facts.nonzero()[0]}
        cards = [card for card in clip.cards if card.second <= time < card.second + card.seconds]
        if cards:
            assert shown == {("card_key", cards[0].key), ("card_value", cards[0].value)}
            assert np.isnan(places).all()
            continue
        visible = [item for item in clip.items if item.span_at(time)]
        assert {value for kind, value in shown if kind == "sign"} == {item.text for item in visible if item.text}
        shapes = [item for item in visible if item.shape]
        assert {value[1] for kind, value in shown if kind == "shape"} == {item.shape for item in shapes}
        assert {value for kind, value in shown if kind == "size"} == {(item.shape, item.size) for item in shapes}
        assert np.isfinite(places).sum() == 2 * len(shapes)
    assert any(see.facts_of(clip, time)[0].any() for time in range(32))


def test_the_course_of_a_group(workshop):
    """Who stands in which frame, who moves which way, who ends in which colour, against the clip's own words."""
    import training.vision_facts as see
    from video_world import make_clip

    clip = make_clip(11, "held_out", seconds=32, cards=3, signs=2, shapes=6, num_questions=0)
    shares, seen = see.course_shares(4), set()
    for begin in np.arange(0, 31, 0.5):
        times = [begin + number * 0.25 for number in range(4)]
        parts = np.split(see.course_of(clip, times), np.cumsum(list(shares.values()))[:-1])
        standing, moving, ending = parts[0].reshape(-1, 4), parts[1].reshape(len(see.SHAPES), 4), parts[2]
        cards = [any(card.second <= time < card.second + card.seconds for card in clip.cards) for time in times]
        assert standing[-1].tolist() == cards
        for row, shape in enumerate(see.SHAPES):
            item = next((item for item in clip.items if item.shape == shape), None)
            there = [
                item is not None and item.span_at(t) is not None and not c for t, c in zip(times, cards, strict=True)
            ]
            assert standing[row].tolist() == there
            way = {see.DIRECTIONS[number] for number in moving[row].nonzero()[0]}
            assert way == ({item.direction} if sum(there) > 1 and item.direction else set())
            ends = [see.PAIRS[number][0] for number in ending.nonzero()[0] if see.PAIRS[number][1] == shape]
            assert len(ends) == any(there)
            if ends:
                last = max(time for time, visible in zip(times, there, strict=True) if visible)
                changed = item.change and last >= item.change[0]
                assert ends == [item.change[1] if changed else item.color]
            seen |= way | ({"changed"} if ends and changed else set())
    assert seen


def test_seeing_lowers_its_loss_and_leaves_the_language_model_alone(workshop, root, tmp_path):
    see, _, _ = workshop
    recipe = see.DEFAULTS | {
        "init": {"config": str(root), "seed": 0},
        "output_dir": str(tmp_path / "see"),
        "data": {"split": "train", "size": 512, "clip": {"seconds": 4}},
        "batch_size": 8,
        "max_steps": 12,
        "warmup": 2,
        "save_steps": 12,
        "logging_steps": 4,
        "eval_steps": 12,
        "eval_size": 8,
        "workers": 0,
    }
    see.run(recipe)
    with pytest.raises(ValueError, match="--resume"):
        see.run(recipe)
    see.run(recipe | {"max_steps": 14}, resume=True)
    lines = [json.loads(line) for line in (tmp_path / "see" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert any("eval_accuracy/card_value" in line for line in lines)
    model = AutoModel.from_pretrained(tmp_path / "see", trust_remote_code=True)
    set_seed(0)
    fresh = AutoModel.from_config(model.config, trust_remote_code=True)
    moved = {
        name.split(".")[1]
        for (name, old), new in zip(fresh.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(old, new)
    }
    assert moved == {"vision_tower", "compressor", "multi_modal_projector"}
    assert AutoProcessor.from_pretrained(tmp_path / "see", trust_remote_code=True).tokens_per_group


def test_recipes_follow_each_other(workshop):
    see, recipe, small = workshop
    names = small.stages()
    assert len(names) >= 2
    earlier = set()
    for name in names:
        path = small.RECIPES / f"{name}.yaml"
        given = yaml.safe_load(path.read_text())
        loaded = see.load_recipe(path, []) if given.get("stage") == "see" else recipe.load_recipe(path)
        assert loaded["output_dir"] == f"outputs/small/{name}"
        sources = [loaded["model"]] if earlier else []
        sources += [part["path"] for part in loaded.get("load", {}).values()]
        assert set(sources) <= earlier, "a stage starts from earlier ones"
        assert bool(loaded["init"]) == (not earlier), "only the first stage starts from nothing"
        earlier.add(loaded["output_dir"])


def test_commands_point_into_the_output_folder(workshop, tmp_path, monkeypatch):
    _, _, small = workshop
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


def test_an_unknown_stage_and_an_unknown_key_are_named(workshop, tmp_path):
    see, _, small = workshop
    with pytest.raises(ValueError, match="no stage 'x'"):
        small.train(tmp_path, "x")
    with pytest.raises(ValueError, match="no colour"):
        see.load_recipe(small.RECIPES / f"{small.stages()[0]}.yaml", ["colour=1"])


def test_stages_that_are_finished_are_skipped(workshop, tmp_path, capsys):
    _, _, small = workshop
    for name in small.stages():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    assert small.train(tmp_path, None) == tmp_path / small.stages()[-1]
    assert capsys.readouterr().out.count("finished before") == len(small.stages())


def test_curves_of_the_committed_logs(workshop, root, tmp_path):
    pytest.importorskip("matplotlib")
    _, _, small = workshop
    logs = small.read_logs(root / "training" / "logs" / "small")
    assert [name for name, _ in logs] == small.stages(), "the logs of the bundled checkpoint's stages"
    small.draw_curves(logs, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5_000


def test_help(root):
    for name in ("train_small", "pretrain_vision"):
        run = subprocess.run(
            [sys.executable, root / "training" / f"{name}.py", "--help"], capture_output=True, text=True
        )
        assert run.returncode == 0 and "usage" in run.stdout, run.stderr


def test_given_heads_look_where_they_should(workshop, root, tmp_path):
    """The clock looks at its group's number, the others at what the asking head finds; other heads stay."""
    from training.batches import Collator, videos_of
    from training.data import MixtureDataset
    from training.hand_over import NAMES, hand_over, time_codes
    from training.train import first_batches
    from training.vision_facts import AskingHead

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(root, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True, attn_implementation="eager").eval()
    processor = AutoProcessor.from_pretrained(root, trust_remote_code=True)
    asking = AskingHead(config.text_config.hidden_size, processor.frames_per_group)
    asking.key.weight.data *= 8
    state = {f"asking_head.{name}": tensor for name, tensor in asking.state_dict().items()}
    save_file(state, tmp_path / "heads.safetensors")
    clip = {"seconds": 16, "shapes": 6, "signs": 1, "cards": 1, "num_questions": 8}
    dataset = MixtureDataset([{"world": {"size": 12, "split": "held_out", "clip": clip}}], processor)
    batches = first_batches(dataset, Collator(processor))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {"clock": [0, 1], "reading": [1, 1], "looking": [2, 0]}
    hand_over(model, processor, batches, tmp_path / "heads.safetensors", **places)

    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name.split(".")[3] for name in changed} == {"0", "1", "2"} and all("self_attn" in name for name in changed)
    size = config.text_config.hidden_size // config.text_config.num_attention_heads
    for layer, number in places.values():
        name = f"model.language_model.layers.{layer}.self_attn.k_proj.weight"
        rows = slice((1 - number) * size, (2 - number) * size)
        assert torch.equal(model.state_dict()[name][rows], before[name][rows])

    batch, maps = batches[0], {}
    layers = model.model.language_model.layers
    for layer in range(3):
        layers[layer].self_attn.register_forward_hook(
            lambda module, given, out, layer=layer: maps.__setitem__(layer, out[1])
        )
    with torch.no_grad():
        tokens = [part.flatten(0, 1) for part in model.get_video_features(videos_of(batch)).pooler_output]
        model(input_ids=batch["input_ids"], pixel_values_videos=videos_of(batch), use_cache=False)
        numbers = {processor.tokenizer.encode(f" {number}")[0] for number in range(101)}
        names = [processor.tokenizer.encode(f" {name}")[0] for name in NAMES]
        own, gains = [], {"reading": [], "looking": []}
        for row, ids in enumerate(batch["input_ids"].tolist()):
            visual = [place for place, token in enumerate(ids) if token == config.video_token_id]
            for place in visual:
                number = max(earlier for earlier in range(place) if ids[earlier] in numbers)
                own.append(maps[0][row, 3, place].argmax().item() == number)
            normed = tokens[row] / tokens[row].pow(2).mean(dim=-1, keepdim=True).sqrt()
            scores = asking.key(normed) @ asking.queries.T
            for place in (place for place, token in enumerate(ids) if token in names):
                score = scores[:, names.index(ids[place])]
                for part, layer, head in (("reading", 1, 3), ("looking", 2, 2)):
                    seen = maps[layer][row, head, place, visual]
                    gains[part].append(((seen @ score / seen.sum() - score.mean()) / score.std()).item())
    assert np.mean(own) > 0.95
    assert np.mean(gains["reading"]) > 0.5 and np.mean(gains["looking"]) > 0.5, gains
    codes = time_codes(torch.arange(101))
    assert torch.cdist(codes, codes).fill_diagonal_(9).min() > 0.05, "times stay apart"
    with pytest.raises(ValueError, match="reading, clock, looking"):
        hand_over(model, processor, batches, tmp_path / "heads.safetensors", watching=[0, 0])
    with pytest.raises(FileNotFoundError, match="pretrain_vision"):
        hand_over(model, processor, batches, tmp_path / "none.safetensors", clock=[0, 1])
