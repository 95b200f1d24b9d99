"""The file of an encoded video: what is read is what was written, bit for bit, or it is refused with the reason."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from videoxl import video_file_videoxl as video_file
from videoxl.video_file_videoxl import load_video_file, require_match, save_video_file
from videoxl.witness_videoxl import SAMPLED_VALUES, model_fingerprint

ROOT = Path(__file__).resolve().parent.parent
FACTS = {
    "model": "0af3",
    "sampling": {"sample_fps": 1, "max_num_frames": None},
    "timestamps": [0.1, 2 / 3, 1e-17],
    "ü": "ß",
}
# Runs in a process of its own, with the file's module as `video_file`.
PRELUDE = f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import torch; from videoxl import video_file_videoxl as video_file
"""


def start(code, *arguments):
    """A Python process that runs `code` with `video_file` imported."""
    command = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process):
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    return out


def same_bits(one, other):
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # A copy into new memory: a single value with another stride than 1 cannot be viewed as bytes.
    one, other = (torch.empty(one.numel(), dtype=one.dtype).copy_(t.detach().flatten()) for t in (one, other))
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def some_tensors():
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randn(1, 2, 50, 8, generator=generator)
    halves = torch.randn(2, 3, 4, 4, generator=generator)
    with torch.inference_mode():
        inferred = torch.randn(3, 3, generator=generator)
    return {
        "float32": buffer,
        "first part of each head": buffer.clone()[:, :, :37],
        "transposed": buffer.clone().transpose(1, 2),
        "every other one": buffer.clone()[..., ::2],
        "one value, many times": torch.tensor(1.5).expand(4, 5),
        "bfloat16": buffer.bfloat16(),
        "float16": buffer.half()[:, 1:],
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "int64": torch.randint(-(2**62), 2**62, (7,), generator=generator),
        "uint8": torch.arange(13, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "float8": buffer.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(7, dtype=torch.bfloat16),
        "one strided value": buffer.clone()[0, 0, 0, ::8],
        "two of a buffer": halves[0],
        "the others of it": halves[1],
        "empty": torch.empty(0),
        "empty too": torch.empty(2, 0, 3, dtype=torch.int64),
        "with gradient": torch.nn.Parameter(torch.ones(3)),
        "inferred": inferred,
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.videoxl"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a good file, and a path to write changed ones to."""
    path = tmp_path_factory.mktemp("damage") / "a.videoxl"
    tensors = {
        "keys": torch.randn(1, 2, 9, 4).bfloat16(),
        "ids": torch.arange(5),
        "last": torch.tensor([1, 2, 3]).byte(),
    }
    save_video_file(path, tensors, FACTS)
    return path.read_bytes(), path


@pytest.mark.parametrize("verify", [True, False])
def test_round_trip_bit_for_bit(path, verify):
    tensors = some_tensors()
    assert save_video_file(path, tensors, FACTS) is None
    loaded, facts = load_video_file(path, verify=verify)
    assert facts == FACTS
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
    assert os.listdir(path.parent) == [path.name]
    other = load_file(path)  # any reader of safetensors reads it
    assert all(same_bits(other[name], tensor) for name, tensor in tensors.items() if tensor.is_contiguous())
    heads = torch.stack([other[f"first part of each head/{head:05}"] for head in range(2)])
    assert same_bits(heads[None], tensors["first part of each head"])  # stored head by head


def test_no_tensors_and_no_facts(path):
    save_video_file(path, {}, {})
    assert load_video_file(path) == ({}, {})


def test_same_content_gives_same_bytes(path):
    save_video_file(path, {"a": torch.ones(2), "b": torch.zeros(3)}, {"x": 1, "y": 2})
    first = path.read_bytes()
    save_video_file(path, {"b": torch.zeros(6)[::2], "a": torch.ones(2)}, {"y": 2, "x": 1})
    assert path.read_bytes() == first


def test_flipped_bits_of_the_header_are_refused(good):
    content, path = good
    header = 8 + int.from_bytes(content[:8], "little")
    for bit in range(0, 8 * header, 3):  # 3 and 8 share no factor: every bit of a byte has its turn
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            load_video_file(path)
    path.write_bytes(content)


def test_flipped_bits_of_the_data_are_refused(good):
    content, path = good
    header = 8 + int.from_bytes(content[:8], "little")
    for bit in [*range(8 * header, 8 * len(content), 5), 8 * len(content) - 1]:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="does not agree with its digest"):
            load_video_file(path)
    path.write_bytes(content)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_changed_bytes_are_refused(good, data):
    content, path = good
    begin = data.draw(st.integers(0, len(content)))
    changed = (
        content[:begin] + data.draw(st.binary(max_size=20)) + content[data.draw(st.integers(begin, len(content))) :]
    )
    path.write_bytes(changed)
    if changed == content:
        load_video_file(path)
    else:
        with pytest.raises(ValueError, match="damaged"):
            load_video_file(path)
        try:  # unchecked, it may load, but it never fails in another way
            load_video_file(path, verify=False)
        except ValueError as error:
            assert "damaged" in str(error)
    path.write_bytes(content)


@pytest.mark.parametrize("verify", [True, False])
def test_every_truncation_and_extension_is_refused(good, verify):
    content, path = good
    for changed in [*(content[:length] for length in range(len(content))), content + b"\0", content * 2]:
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            load_video_file(path, verify=verify)
    path.write_bytes(content)


def test_files_of_the_version_before_load_and_are_checked(path):
    content = (ROOT / "tests" / "fixtures" / "before" / "bundled_full.videoxl").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(content)
    tensors, facts = load_video_file(path)
    assert len(facts["timestamps"]) == 7
    expected = load_file(path)
    assert all(torch.equal(tensors.pop(name), tensor) for name, tensor in expected.items()) and not tensors
    for bit in [*range(0, 8 * header, 1001), *range(8 * header, 8 * len(content), 500_001)]:
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="damaged"):
            load_video_file(path)


def test_a_consistent_change_of_facts_is_refused(path):
    save_video_file(path, {"a": torch.ones(2)}, {"model": "one"})
    path.write_bytes(path.read_bytes().replace(b"one", b"two"))
    assert load_video_file(path, verify=False)[1] == {"model": "two"}
    with pytest.raises(ValueError, match="damaged"):
        load_video_file(path)


def test_other_files_are_refused_with_the_reason(path, tmp_path, monkeypatch):
    for content in (b"", b"not safetensors at all", b"\x02" + b"\0" * 7 + b"[]", b"\xff" * 4000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="expected a video saved by EncodedVideo.save.*Encode the video again"):
            load_video_file(path, verify=False)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="a safetensors file of format None"):
        load_video_file(path)
    save_file({"weight": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="a safetensors file of format 'pt'"):
        load_video_file(path)
    monkeypatch.setattr(video_file, "LAYOUT_VERSION", 4)
    save_video_file(path, {}, {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="layout version 4 .this code reads 1 to 3"):
        load_video_file(path)
    with pytest.raises(ValueError, match="is a folder"):
        load_video_file(tmp_path)
    with pytest.raises(FileNotFoundError, match="no saved video .*check the path"):
        load_video_file(tmp_path / "absent")


def test_what_cannot_be_saved_leaves_no_file(path, tmp_path):
    cases = [
        ({"a": [1, 2]}, {}, "dense tensor"),
        ({"a": torch.ones(3).to_sparse()}, {}, "dense tensor"),
        ({"a": torch.ones(3, device="meta")}, {}, "dense tensor"),
        ({"a": torch.ones(3, dtype=torch.complex128)}, {}, "complex128"),
        ({"a": (shared := torch.ones(3)), "b": shared[1:]}, {}, "not overlap"),
        ({"__metadata__": torch.ones(3)}, {}, "name"),
        ({}, {"a": torch.ones(3)}, "JSON"),
        ({}, {"a": float("nan")}, "JSON"),
    ]
    for tensors, facts, message in cases:
        with pytest.raises(ValueError, match=message):
            save_video_file(path, tensors, facts)
    with pytest.raises(ValueError, match="is a folder"):
        save_video_file(tmp_path, {}, {})
    with pytest.raises(FileNotFoundError, match="does not exist: create it"):
        save_video_file(tmp_path / "absent" / "a", {}, {})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "os.chmod", "hashlib.sha256"])
def test_a_failing_save_keeps_the_old_file(path, monkeypatch, failing):
    def fail(*_):
        raise OSError("no space left")

    save_video_file(path, {"a": torch.ones(2)}, FACTS)
    before = path.read_bytes()
    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="no space left"):
        save_video_file(path, {"a": torch.zeros(2)}, FACTS)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files")
def test_a_full_disk_keeps_the_old_file(path):
    code = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    video_file.save_video_file(sys.argv[1], {"a": torch.ones(100_000)}, {})
except OSError as error:
    print(error)
"""
    save_video_file(path, {"a": torch.ones(2)}, FACTS)
    before = path.read_bytes()
    assert "could not be written" in output_of(start(code, path))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_link_is_followed(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    save_video_file(link, {"a": torch.ones(2)}, {})
    assert link.is_symlink()
    assert load_video_file(path)[0]["a"].sum() == 2
    assert path.stat().st_mode & 0o777 == 0o666 & ~(mask := os.umask(0))
    os.umask(mask)


def test_loaded_tensors_outlive_the_file_and_do_not_write_to_it(path):
    save_video_file(path, {"a": torch.ones(1000)}, {})
    before = path.read_bytes()
    first = load_video_file(path)[0]["a"]
    first[0] = 5
    assert path.read_bytes() == before
    save_video_file(path, {"a": torch.zeros(1000)}, {})  # over a file that is mapped
    assert first.sum() == 1004
    assert load_video_file(path)[0]["a"].sum() == 0
    save_video_file(path, load_video_file(path)[0], {})  # onto itself
    second = load_video_file(path)[0]["a"]
    path.unlink()
    assert second.sum() == 0


KILLED = """
tensors = {str(i): torch.full((2_000_000,), float(i)) for i in range(16)}
print("ready", flush=True)
for version in range(1, 1000):
    video_file.save_video_file(sys.argv[1], tensors, {"version": version})
"""


def test_killing_the_process_leaves_a_complete_file(path):
    save_video_file(path, {"old": torch.ones(2)}, {"version": 0})
    versions = set()
    for _ in range(4):
        process = start(KILLED, path)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(random.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        tensors, facts = load_video_file(path)
        versions.add(facts["version"])
        assert all(tensor.eq(float(name)).all() for name, tensor in tensors.items() if name != "old")
        for left in path.parent.iterdir():
            assert left == path or left.name.startswith(".videoxl-")
    assert versions


def test_concurrent_saves_and_loads(path):
    code = """
name = sys.argv[2]
for version in range(15):
    video_file.save_video_file(sys.argv[1], {name: torch.full((300_000,), float(name))}, {"name": name})
"""
    save_video_file(path, {"0": torch.zeros(3)}, {"name": "0"})
    writers = [start(code, path, name) for name in "12"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        try:
            tensors, facts = load_video_file(path)
        except ValueError as error:
            assert "was replaced" in str(error)  # too busy a machine to read it between two writes
            continue
        assert list(tensors) == [facts["name"]]
        assert tensors[facts["name"]].eq(float(facts["name"])).all()
        seen.add(facts["name"])
    for writer in writers:
        output_of(writer)
    assert load_video_file(path)[1]["name"] in "12"
    assert seen
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="resident memory is read from /proc")
def test_loading_and_saving_take_little_memory(path):
    code = """
def resident(field="VmRSS:"):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) // 1024

video_file.save_video_file(sys.argv[1] + ".small", {"a": torch.ones(2, 3)[:, :2]}, {})
video_file.load_video_file(sys.argv[1] + ".small")
buffer = torch.ones(1, 4, 120_000, 128)  # 234 MiB; what is saved is a view of it
start = resident()
video_file.save_video_file(sys.argv[1], {"keys": buffer[:, :, :100_000]}, {})
save = resident("VmHWM:") - start
del buffer
start = resident()
tensors, _ = video_file.load_video_file(sys.argv[1], verify=False)
unchecked = resident() - start
again, _ = video_file.load_video_file(sys.argv[1])
verified = resident() - start
assert tensors["keys"][0, 2, 5, 3] == 1
touched = resident() - start
print([save, unchecked, verified, touched])
"""
    save, unchecked, verified, touched = json.loads(output_of(start(code, path)))
    assert path.stat().st_size > 200e6
    assert save < 60  # MiB: a few pieces, not the 195 MiB of a copy
    assert unchecked < 5
    assert verified < 30
    assert touched < 35


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda", torch.device("cuda", 0)])
def test_cuda_tensors_are_saved_without_a_copy_on_the_gpu(path, device):
    keys = torch.randn(1, 4, 50_000, 128, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    save_video_file(path, {"keys": keys[:, :, :40_000]}, {})
    assert torch.cuda.max_memory_allocated() - before < 2**20
    loaded = load_video_file(path, device=device)[0]["keys"]
    assert loaded.device.type == "cuda"
    assert torch.equal(loaded, keys[:, :, :40_000])


def test_source_fingerprint(tmp_path):
    source = tmp_path / "a.mp4"
    content = bytearray(random.Random(0).randbytes(3 * 2**20))
    source.write_bytes(content)
    first = video_file.source_fingerprint(source)
    assert first == video_file.source_fingerprint(str(source))
    assert first["size"] == len(content)
    for place in (0, 2**20 - 1, 2 * 2**20, len(content) - 1):
        content[place] ^= 1
        source.write_bytes(content)
        assert video_file.source_fingerprint(source)["sha256"] != first["sha256"]
        content[place] ^= 1
    source.write_bytes(content + b"\0")
    assert video_file.source_fingerprint(source) != first
    source.write_bytes(b"")
    assert video_file.source_fingerprint(source)["size"] == 0
    for absent in (tmp_path / "b.mp4", tmp_path, "", None):
        assert video_file.source_fingerprint(absent) is None


def test_settings_do_not_enter_the_model_fingerprint(model):
    first = model_fingerprint(model)
    model.config.sparse_attention = {"prefill": "streaming", "decode": "bilevel", "window_chunks": 1}
    model.config.enable_sparse = True
    model.config.sparse_mode = "mask"
    model.config.sparse_config = {"block_size_chosed": 4, "prev_blocks_num": 3}
    model.config.enable_chunk_prefill = True
    model.config.prefill_config = {"chunk_size": 4}
    model.config.vision_chunk_frames = 8
    model.config.keep_ratio = 0.5
    model.config.use_cache = False
    model.config._name_or_path = "/elsewhere"
    model.train()
    assert model_fingerprint(model) == first


def test_weights_and_architecture_enter_the_model_fingerprint(model):
    first = model_fingerprint(model)
    name, weight = next((n, w) for n, w in model.named_parameters() if n.endswith("layers.1.mlp.up_proj.weight"))
    step = weight.numel() // SAMPLED_VALUES | 1
    with torch.no_grad():
        for place in (0, step, 63 * step):
            row, column = divmod(place, weight.shape[1])
            before = weight[row, column].clone()
            weight[row, column] += 1e-3
            assert model_fingerprint(model) != first, (name, place)
            weight[row, column] = before
    assert model_fingerprint(model) == first
    for change in ({"vision_feature_layer": -1}, {"time_format": "{seconds}"}, {"image_mean": [0.1, 0.2, 0.3]}):
        before = {key: getattr(model.config, key) for key in change}
        model.config.__dict__.update(change)
        assert model_fingerprint(model) != first
        model.config.__dict__.update(before)
    text = model.config.text_config
    before, text.num_attention_heads = text.num_attention_heads, 8
    assert model_fingerprint(model) != first
    text.num_attention_heads = before
    assert model_fingerprint(model) == first


def test_dtype_enters_the_model_fingerprint(root):
    from transformers import AutoModel

    options = {"trust_remote_code": True}
    fingerprints = [
        model_fingerprint(AutoModel.from_pretrained(root, dtype=dtype, **options))
        for dtype in (torch.float32, torch.bfloat16, torch.float32)
    ]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
    with pytest.raises(ValueError, match="meta device"):
        model_fingerprint(AutoModel.from_pretrained(root, **options).to("meta"))


def test_model_fingerprint_is_the_same_in_every_process(bundled_model, root):
    code = """
from transformers import AutoModel
from videoxl.witness_videoxl import model_fingerprint
print(model_fingerprint(AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)))
"""
    assert output_of(start(code, root)).strip() == model_fingerprint(bundled_model)


def test_require_match():
    facts = {
        "model": "a" * 100,
        "sampling": {"sample_fps": 1, "max_num_frames": 64},
        "mean": [0.5, 0.5],
        "source": None,
    }
    fitting = [{}, facts, {"sampling": {"sample_fps": 1.0}}, {"mean": (0.5, 0.5)}, {"model": None, "absent": None}]
    for expected in [*fitting, {"sampling": {"sample_fps": None}}]:
        require_match(facts, expected, "the file a.videoxl")
    expected = {"model": "b", "sampling": {"sample_fps": 2, "max_num_frames": 64}, "source": {"size": 3}, "absent": 1}
    with pytest.raises(ValueError) as caught:
        require_match(facts, expected, "the file a.videoxl")
    message = str(caught.value)
    assert message.startswith('the file a.videoxl does not fit: model: the file has "aaaa')
    assert "sampling.sample_fps: the file has 1, asked for 2;" in message
    assert 'source: the file has null, asked for {"size":3}' in message
    assert "absent: the file has nothing, asked for 1." in message
    assert "max_num_frames" not in message
    assert "encode the video again" in message
    assert len(message) < 500
