"""The benchmarks that wait for other machines: their command lines, and what they count."""

import importlib
import shlex
import subprocess
import sys

import pytest
import torch
from torch import nn


@pytest.fixture
def benchmark(root, monkeypatch):
    """Imports a benchmark by name, as the scripts import each other."""
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module


def steps(root) -> dict[str, list[str]]:
    """What `gpu_run.sh` runs: the words of each step's command line."""
    listed = subprocess.run([root / "benchmarks/gpu_run.sh", "--list"], capture_output=True, text=True, check=True)
    lines = (line.split("\t") for line in listed.stdout.splitlines())
    return {name: shlex.split(command) for name, command in lines}


def test_every_step_of_the_gpu_run_has_a_command_line_that_parses(root, benchmark, monkeypatch):
    class Parsed(Exception):
        pass

    def parse(arguments):
        raise Parsed(arguments.parse_args())

    found, files = steps(root), []
    assert len(found) > 10
    for name, (_, script, *words) in found.items():
        if script == "-m":
            assert all((root / word).is_file() for word in words if word.startswith("tests/"))
            continue
        module = benchmark(script.removeprefix("benchmarks/").removesuffix(".py"))
        monkeypatch.setattr(module, "parse", parse)
        monkeypatch.setattr(sys, "argv", [script, *words])
        with pytest.raises(Parsed) as parsed:
            module.main()
        files.append(parsed.value.args[0].out)
        assert files[-1] == f"{name}_gpu"
    assert len(set(files)) == len(files)


def test_the_summary_reads_what_the_gpu_run_writes(root, benchmark):
    summary, written = benchmark("gpu_summary"), {f"{name}_gpu" for name in steps(root)}
    assert {name for *_, (name, _) in summary.TARGETS} <= written


@pytest.mark.slow
def test_rehearsal_of_the_gpu_run(root, tmp_path):
    environment = {"PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OUT": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [root / "benchmarks/gpu_run.sh", "--rehearse"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "not measured" not in done.stdout
    assert (tmp_path / "gpu_run.tgz").stat().st_size > 1000


def test_counted_flops_are_those_of_the_library(benchmark):
    from torch.utils.flop_counter import FlopCounterMode

    common = benchmark("common")
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(16, 5), nn.Conv1d(8, 2, 1))
    stages = common.Stages(model, {"all": [model]}, "cpu")
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, 16, 16))
    assert common.linear_flop(model, stages.rows) == counter.get_total_flops()
    assert stages.seconds["all"] > 0
    stages.reset()
    assert common.linear_flop(model, stages.rows) == 0


def test_one_run_beside_other_models(root, benchmark, tmp_path):
    """Ours, a token of an answer from a file; what the peers need is not here."""
    peers = benchmark("peers")
    args = peers.argparse.Namespace(
        device="cpu", dtype="float32", attention="sdpa", scale=16, true_size=False, tokenizer=str(root)
    )
    clip = tmp_path / "clip.mp4"
    peers.make_clip(clip, 8)
    with torch.no_grad():
        found = peers.run("streaming", 8, str(clip), str(clip), args)
    assert found["frames_read"] == 8
    # Two groups of 144 visual tokens; the rest is time, header and question.
    assert 288 < found["tokens"] < 340
    assert found["seconds"]["first"] > found["seconds"]["vision"] > 0
    assert found["true_tflop"] > 100 * found["tflop"] > 0
    merged = peers.merged([found, found])
    assert merged["seconds"]["rest"] > 0
    other = {
        **merged,
        "system": "qwen3-vl",
        "seconds": {name: 300 * value for name, value in merged["seconds"].items()},
    }
    other["seconds"]["by_hand"] = merged["seconds"]["second"]
    (compared,) = peers.compare([merged, other])
    assert compared["second_times_faster"] == 300
    assert compared["seconds_per_flop"] == pytest.approx(1 / 300, abs=1e-3)
    assert compared["reached"] == {"second": None, "seconds_per_flop": True, "memory": None}
    line = {"results": {"runs": [merged, other, {"frames": 8, "system": "full", "failed": "not finished"}]}}
    peers.show(line["results"]["runs"])
    pytest.importorskip("matplotlib")
    peers.plot(line, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_attention_of_a_peer_counts_its_windows(benchmark):
    from types import SimpleNamespace as Values

    peers = benchmark("peers")
    text = Values(num_hidden_layers=2, num_attention_heads=3, head_dim=4)
    tower = {"depth": 4, "hidden_size": 8, "temporal_patch_size": 2}
    whole = Values(vision_config=Values(**tower), text_config=text)
    windows = Values(vision_config=Values(**tower, fullatt_block_indexes=[3]), text_config=text)
    language = 4 * 55 * 2 * 12
    assert peers.attention_flop(whole, "qwen3-vl", 6, 256, 10) == 4 * 3 * 4 * 256**2 * 8 + language
    pairs = 256**2 + 3 * 256 * 64
    assert peers.attention_flop(windows, "qwen2.5-vl", 6, 256, 10) == 4 * 3 * pairs * 8 + language
