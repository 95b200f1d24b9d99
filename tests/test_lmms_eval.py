"""Benchmark runners: published settings and prompts, our plug-in in the real lmms-eval, adapters written by others.

The adapters of others are replayed call by call, with the arguments that they pass; lmms-eval itself runs where it is
installed (`pip install lmms-eval`, a heavy package that pins an older PyAV, so not in requirements.txt).
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import _undone

SHORT = {"max_new_tokens": 4, "min_new_tokens": 4}


@pytest.fixture(scope="module")
def presets():
    from videoxl.evaluation import presets

    return presets


# ---------------------------------------------------------------- published settings and prompts


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("What happens at 00:15?", "What happens at 15 seconds?"),
        ("from 25:50-30:15, who", "from 1550 seconds-1815 seconds, who"),
        ("at 01:02:33 and 1:00:02.", "at 3753 seconds and 3602 seconds."),
        ("at 100:05", "at 6005 seconds"),
        ("00:01:05.5 (00:07)", "65.5 seconds (7 seconds)"),
        ("It is 16:9, not 4:3; the ratio 1:2:3 and 12:34:56:78 stay.", None),
        ("on 2024:01:02, or 10:75, or v1.10:30", None),
        ("no times", None),
    ],
)
def test_clock_times_become_seconds(presets, text, seconds):
    assert presets.rewrite_times(text) == (text if seconds is None else seconds)


def test_published_settings(presets):
    def published(name):
        preset = presets.PRESETS[name]
        return preset.max_num_frames, preset.prefill, preset.chunk_groups, preset.window_chunks, preset.decode

    assert len(presets.PRESETS) == 12 + 7
    assert published("mlvu") == (256, "full", 4, 3, "full")
    assert published("videomme") == (400, "full", 4, 3, "full")
    assert published("videomme-chunk") == (300, "mask", 4, 3, "full")
    assert published("videomme-bilevel") == (400, "mask", 4, 3, "bilevel")
    assert published("longvideobench-chunk") == (400, "mask", 6, 5, "full")
    assert published("longvideobench-bilevel") == (400, "mask", 4, 3, "bilevel")
    assert published("lvbench-chunk") == (600, "mask", 4, 11, "full")
    for name, preset in presets.PRESETS.items():
        if name.startswith("flash-"):
            continue
        assert (preset.sample_fps, preset.max_sample_fps, preset.rewrite_times) == (1, 4, True)
        assert preset.max_new_tokens == (32 if "longvideobench" in name else 16)
        assert preset.prompt == name.split("-")[0] and preset.prompt in presets.PROMPTS


def test_published_settings_of_videochat_flash(presets):
    found = {name: preset for name, preset in presets.PRESETS.items() if name.startswith("flash-")}
    benchmarks = {"videomme", "mvbench", "mlvu", "lvbench", "longvideobench", "perceptiontest", "charades"}
    assert {name.removeprefix("flash-") for name in found} == benchmarks
    for name, preset in found.items():
        assert preset.max_num_frames == (640 if name == "flash-lvbench" else 512)
        assert preset.max_new_tokens == {"flash-longvideobench": 32, "flash-charades": 50}.get(name, 16)
        # The rates at which the model's own rule is in force.
        assert (preset.sample_fps, preset.max_sample_fps, preset.rewrite_times) == (1, 4, False)
        assert (preset.prefill, preset.decode) == ("full", "full")
        assert preset.prompt == (name if name in presets.PROMPTS else "task")


def test_published_prompts_of_videochat_flash(presets):
    doc = {"question": "What?", "candidates": ["One", "Two"]}
    asked = "Question: What?\nOption:\n(A) One\n(B) Two\n"
    by_letter = "Answer with the option's letter from the given choices directly."
    assert presets.flash_mvbench_prompt(doc) == f"{asked}Only give the best option."
    assert presets.flash_mlvu_prompt(doc) == asked + by_letter
    assert presets.flash_perceptiontest_prompt(doc) == (
        "Question: What?\nOption:\n(A). One\n(B). Two\nOnly give the best option."
    )
    videomme = presets.flash_videomme_prompt({"question": "What?", "options": ["A. One.", "B. Two."]})
    assert videomme.startswith("These are the frames of a video. Select the best answer")
    assert videomme.endswith(f"of the correct option.\nQuestion: What?\nOption:\nA. One.\nB. Two.\n{by_letter}")


def test_every_preset_is_a_valid_setting_of_the_model(presets, model):
    for preset in presets.PRESETS.values():
        model.config.sparse_attention = preset.sparse_attention()
        settings = model.config.resolve_sparse_attention()
        assert (settings.prefill, settings.decode) == (preset.prefill, preset.decode)
        assert settings.window_chunks == preset.window_chunks
    assert replace(preset, pool_size=9).sparse_attention("none")["reload"] == "none"


def test_published_prompts(presets):
    question, options = "What is it?", ["A. One.", "B. Two."]
    assert presets.mlvu_prompt({"question": "What?\n(A) 1\n(B) 2"}) == (
        "\nWhat?\n(A) 1\n(B) 2\nOnly give the best option.\n\nBest option: ("
    )
    assert presets.videomme_prompt({"question": question, "options": options}).endswith(
        "of the correct option.\nWhat is it?\n['A. One.', 'B. Two.']\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    numbered = {"question": question, "option0": "One", "option1": "Two", "option2": "N/A"}
    assert presets.longvideobench_prompt(numbered) == (
        "What is it?\nA. One\nB. Two\nAnswer with the option's letter from the given choices directly.\n"
    )
    doubled = "What is it?\nA. (A) One\nB. (B) Two\nAnswer with the option's letter from the given choices directly."
    assert presets.lvbench_prompt({"question": "What is it?\n(A) One\n(B) Two"}) == doubled
    assert presets.lvbench_prompt({"question": question, "options": ["One", "Two"]}) == doubled


# ---------------------------------------------------------------- the real lmms-eval

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {folder}}}
test_split: test
output_type: generate_until
doc_to_visual: !function {name}_utils.visual
doc_to_text: !function {name}_utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, top_p: 1.0, num_beams: 1, do_sample: false}}
process_results: !function {name}_utils.results
metric_list: [{{metric: answered, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""
UTILS = """
def visual(doc):
    return [doc["video"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def results(doc, answers):
    return {"answered": float(isinstance(answers[0], str))}
"""
NAME = "videoxl_clips"


@pytest.fixture
def task(tmp_path, clips):
    """A folder with a task of lmms-eval about two clips, its questions in turns."""
    docs = [
        {"video": clips[number % 2], "question": f"What moves at 00:0{number}?", "answer": "dots"}
        for number in range(5)
    ]
    (tmp_path / "docs.json").write_text(json.dumps(docs))
    (tmp_path / f"{NAME}.yaml").write_text(TASK.format(name=NAME, data=tmp_path / "docs.json", folder=tmp_path))
    (tmp_path / f"{NAME}_utils.py").write_text(UTILS)
    return tmp_path


PLUG_IN = "evaluation/lmms_eval_videoxl.py"
LAUNCH = ("-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")


def lmms_eval(root, home, *command):
    """Runs a Python program in an environment with lmms-eval."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip('lmms-eval is not installed: pip install lmms-eval "filelock<3.30", in an environment of its own')
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_DATASETS_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=400)


def run(task, root, program, model, model_args, launch=()):
    """Runs lmms-eval; what it wrote: (results, samples in the order of the questions), and said."""
    command = [*launch, *program, "--model", model, "--model_args", model_args, "--tasks", NAME]
    command += ["--include_path", task, "--output_path", task / "out", "--log_samples", "--batch_size", "1"]
    done = lmms_eval(root, task / "home", *command)
    files = sorted((task / "out").rglob("*.json*"))
    assert done.returncode == 0 and files, done.stdout[-3000:] + done.stderr[-3000:]
    results = next(json.loads(file.read_text()) for file in files if file.name.endswith("results.json"))
    lines = next(file.read_text().splitlines() for file in files if "samples" in file.name)
    samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    return results, samples, done.stderr


def answers_of(samples):
    found = [sample["filtered_resps"] for sample in samples]
    return [answer if isinstance(answer, str) else answer[0] for answer in found]


def test_plug_in_answers_as_chat_does(task, root, bundled_model, tokenizer, clips):
    arguments = f"pretrained={root},preset=lvbench-chunk,prompt=task,max_num_frames=12,dtype=float32,device=cpu"
    results, samples, _ = run(task, root, [PLUG_IN], "videoxl", arguments)
    bundled_model.config.sparse_attention = {"prefill": "mask", "chunk_groups": 4, "window_chunks": 11}
    options = {"return_history": False, "max_num_frames": 12, "generation_config": {"max_new_tokens": 16}}
    expected = [
        bundled_model.chat(clips[number % 2], tokenizer, f"What moves at {number} seconds?", **options)
        for number in range(5)
    ]
    assert answers_of(samples) == expected
    assert results["results"][NAME]["answered,none"] == 1.0
    # The result file says what a preset stands for, and what was given in its place.
    said = results["config"]["model_args"]
    said = said if isinstance(said, str) else json.dumps(said)
    for setting in ("preset", "lvbench-chunk", "window_chunks", "11", "max_num_frames", "12", "rewrite_times", "True"):
        assert setting in said, (setting, said)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch",
    [(*LAUNCH, "--multi_gpu"), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")],
    ids=["accelerate", "torchrun"],
)
def test_plug_in_with_two_processes(task, root, launch):
    arguments = f"pretrained={root},preset=mlvu,max_num_frames=8,dtype=float32"
    _, together, said = run(task, root, [PLUG_IN], "videoxl", arguments, launch)
    shared = [int(number) for number in re.findall(r"process \d of 2: (\d+) questions", said)]
    assert sorted(shared) in ([2, 3], [3, 3]), said[-3000:]  # lmms-eval may ask one twice, to keep them in step
    _, alone, said = run(task, root, [PLUG_IN], "videoxl", arguments)
    assert "process 1 of 1: 5 questions" in said
    assert len(together) == 5 and answers_of(together) == answers_of(alone)


@pytest.mark.slow
def test_launches_that_are_not_what_they_look_like_are_refused(root, tmp_path):
    demo = [PLUG_IN, "--model", "videoxl", "--tasks", "videoxl_demo", "--include_path", "evaluation/lmms_tasks"]
    demo += ["--model_args", "pretrained=.,dtype=float32", "--output_path", tmp_path / "out", "--batch_size", "1"]
    done = lmms_eval(root, tmp_path, *LAUNCH, "--cpu", *demo)
    assert "asked for 2 processes and has started 1" in done.stderr and done.returncode != 0
    alone = "import os, sys; os.environ['WORLD_SIZE'] = '2'; sys.path.append('evaluation'); import lmms_eval_videoxl"
    done = lmms_eval(root, tmp_path, "-c", f"{alone}; lmms_eval_videoxl.require_all_processes(1)")
    assert "one of 2 processes that know nothing of each other" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_documented_task_runs_without_network(root, tmp_path):
    page = (root / "docs" / "evaluation.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (line,) = re.findall(r"^python (evaluation/lmms_eval_videoxl.py .*videoxl_demo.*)$", page, re.MULTILINE)
    done = lmms_eval(root, tmp_path, *line.replace("results/", f"{tmp_path}/out").split())
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*results.json")
    assert json.loads(results.read_text())["results"]["videoxl_demo"]["exact_match,none"] == 1


@pytest.mark.slow
def test_plug_in_reads_only_what_it_knows(task, root):
    for arguments, found in (("preset=mlv", "there is no preset"), ("frames=3", "unknown model_args")):
        with pytest.raises(AssertionError, match=found):
            run(task, root, [PLUG_IN], "videoxl", f"pretrained={root},{arguments}")


@pytest.mark.slow
def test_lmms_evals_own_huggingface_model(task, root):
    """Unmodified, from its own command line: AutoModel, processor(text=..., videos=...), generate."""
    arguments = f"pretrained={root},trust_remote_code=True,device=cpu,device_map=cpu"
    _, samples, _ = run(task, root, ["-m", "lmms_eval"], "huggingface", arguments)
    assert len(samples) == 5 and all(isinstance(answer, str) for answer in answers_of(samples))


# ---------------------------------------------------------------- adapters of others, replayed


def test_adapter_for_video_xl_2(root, clips):
    """The calls of the third-party adapter for the published Video-XL-2 code."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(root, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        root,
        trust_remote_code=True,
        device_map=None,
        quantization_config=None,
        attn_implementation="sdpa",
        dtype=torch.float16,
        low_cpu_mem_usage=True,
    )
    model.config.enable_chunk_prefill = True
    model.config.prefill_config = {
        "chunk_prefill_mode": "streaming",
        "chunk_size": 4,
        "step_size": 1,
        "offload": True,
        "chunk_size_for_vision_tower": 24,
    }
    visual, context = clips[0], "What moves?\nA. Dots\nB. Cars"
    generation_config = {
        "max_new_tokens": 4, "temperature": None, "do_sample": False, "top_p": None, "num_beams": 1,
        "use_cache": True, "until": ["\n\n"], "image_sizes": None,
    }  # fmt: skip
    with torch.inference_mode():
        answer = model.chat(
            visual,
            tokenizer,
            context,
            chat_history=None,
            return_history=False,
            max_num_frames=16,
            sample_fps=None,
            max_sample_fps=None,
            generation_config=generation_config,
        )
    assert isinstance(answer, str)
    assert model.config.resolve_sparse_attention().prefill == "streaming"


@pytest.mark.parametrize("name", ["videoxl2", "videochatflash", "videochatflash_internvideo2"])
def test_adapter_for_videochat_flash(name, random_model, family_models, tokenizer, clips):
    """The calls of lmms-eval's adapter and of the model card, on its own models and on one with another tower."""
    with _undone(family_models.get(name, random_model)) as model:
        replay_videochat_flash(model, tokenizer, clips)


def replay_videochat_flash(model, tokenizer, clips):
    model.config.mm_llm_compress = False
    model.config.llm_compress_type = "attention"
    model.config.llm_compress_layer_list = [24]
    model.config.llm_image_token_ratio_list = [1.0, 0.5]
    config = {**SHORT, "temperature": 0, "do_sample": False, "top_p": None, "num_beams": 1}
    response = model.chat(
        clips[0],
        tokenizer,
        "What moves?",
        chat_history=None,
        return_history=False,
        max_num_frames=8,
        media_dict={"video_read_type": "decord"},
        generation_config=config,
    )
    by_name = model.chat(
        video_path=clips[0],
        tokenizer=tokenizer,
        user_prompt="What moves?",
        return_history=False,
        max_num_frames=8,
        generation_config={"do_sample": False, "temperature": 0.0, "top_p": 0.1, "num_beams": 1, **SHORT},
    )
    assert response == by_name
    output, history = model.chat(
        video_path=clips[0], tokenizer=tokenizer, user_prompt="What moves?", return_history=True, max_num_frames=8,
        generation_config=config,
    )  # fmt: skip
    second, _ = model.chat(
        video_path=clips[0], tokenizer=tokenizer, user_prompt="And then?", chat_history=history, return_history=True,
        max_num_frames=8, generation_config=config,
    )  # fmt: skip
    assert output == response and isinstance(second, str)
    # A task of its fork gives a path with a part of the file.
    video, media_dict = clips[0], {"video_read_type": "decord", "start": 1.0, "end": 3.0}
    part = model.chat(
        video, tokenizer, "What moves?", chat_history=None, return_history=False, max_num_frames=8,
        media_dict=media_dict, generation_config=config,
    )  # fmt: skip
    assert isinstance(part, str)


def test_what_this_model_cannot_do_is_said(model, tokenizer, clips):
    model.config.mm_llm_compress = True
    with pytest.raises(ValueError, match="mm_llm_compress"):
        model.chat(clips[0], tokenizer, "What?", max_num_frames=8)
    model.config.mm_llm_compress = False
    with pytest.raises(ValueError, match="media_dict"):
        model.chat(clips[0], tokenizer, "What?", media_dict={"video_read_type": "opencv"})
