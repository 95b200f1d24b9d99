"""A model plug-in for lmms-eval: `videoxl`, with the published settings as presets. lmms-eval itself stays as it is.

    python evaluation/lmms_eval_videoxl.py --model videoxl --tasks videomme --output_path results/ \\
        --model_args pretrained=converted/,preset=videomme
    accelerate launch --num_processes 8 evaluation/lmms_eval_videoxl.py ...          # one copy of the model a GPU
    accelerate launch --multi_gpu --num_processes 2 evaluation/lmms_eval_videoxl.py ...      # two, also on a CPU

All arguments are lmms-eval's. `model_args` takes `pretrained`, `preset`, `dtype` (default float16, as published),
`device`, `reload`, and every field of `presets.Preset`, which wins over the preset.

What is surprising:
* The command line puts the settings that a preset stands for into `model_args`, so that lmms-eval writes them into its
  result file. A preset's fields in a result file are what was run.
* Questions about the same file are asked one after the other, and the video is encoded once for all of them.
* Several processes share the questions out. A launch that looks like several and is not (each would do all the work,
  or one alone would run) is refused.
* An image of a task is an image for the model; several images or videos are shown in their order. A folder is a video
  of numbered pictures, and a task may give a path together with VideoChat-Flash's `media_dict`.
"""

import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import psutil
import torch
import torch.distributed.nn  # imported after the group is made, it would hold it for ever, as a default argument
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.evaluation.presets import PRESETS, PROMPTS, Preset, rewrite_times  # noqa: E402

NAME = "videoxl"
FIELDS = {field.name: field.type for field in fields(Preset)}
# What lmms-eval's generation settings may hold; the rest are switches of other models.
GENERATION_KEYS = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams", "do_sample", "until")


def resolve_settings(preset: str | None = None, **given) -> Preset:
    """The settings of a preset, with what is given in its place.

    Raises:
        ValueError: On an unknown preset, field or prompt.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    if unknown := sorted(set(given) - set(FIELDS)):
        raise ValueError(f"unknown model_args: {', '.join(unknown)}; settings are {', '.join(FIELDS)}")
    settings = replace(PRESETS.get(preset, Preset()), **given)
    if settings.prompt not in (*PROMPTS, "task"):
        raise ValueError(f"prompt must be task or one of {', '.join(PROMPTS)}, got {settings.prompt!r}")
    return settings


class VideoXL(lmms):
    """A checkpoint of this repository in lmms-eval.

    Args:
        pretrained: Folder or Hub id.
        preset: A name of `presets.PRESETS`.
        device: Where to; without it this process's GPU, or the CPU where there is none.
        dtype: Precision of the weights.
        attn_implementation: As for `from_pretrained`.
        reload: How chunks are chosen in bi-level decoding, a method's name.
        batch_size: Only 1.
        max_batch_size: As lmms-eval passes it; without effect.
        **settings: Fields of `presets.Preset`.

    Raises:
        ValueError: On settings that do not exist.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        preset: str | None = None,
        device: str | None = None,
        dtype: str = "float16",
        attn_implementation: str = "sdpa",
        reload: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **settings,
    ):
        super().__init__()
        self.settings = resolve_settings(preset, **settings)
        if int(batch_size) != 1:
            raise ValueError(f"batch_size must be 1 (questions about one video share it), got {batch_size}")
        self.accelerator = Accelerator()
        require_all_processes(self.accelerator.num_processes)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        options = {"dtype": dtype, "attn_implementation": attn_implementation, "trust_remote_code": True}
        self.model = AutoModel.from_pretrained(pretrained, **options).to(self.device).eval()
        self.model.config.sparse_attention = self.settings.sparse_attention(reload)
        self.tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=True)
        self._encoded = (None, None)  # the last video file, and what it was encoded to

    @property
    def sampling(self) -> dict:
        """Sampling arguments of `chat`."""
        settings = self.settings
        rates = {"sample_fps": settings.sample_fps or None, "max_sample_fps": settings.max_sample_fps or None}
        return {"max_num_frames": settings.max_num_frames, **rates}

    def generate_until(self, requests) -> list[str]:
        """Answers lmms-eval's requests, in their order."""
        docs = [self._doc(request) for request in requests]
        visuals = [_flat(request.args[2](doc)) for request, doc in zip(requests, docs, strict=True)]
        order = sorted(range(len(requests)), key=lambda index: str(visuals[index]))
        answers = [""] * len(requests)
        print(f"process {self.rank + 1} of {self.world_size}: {len(requests)} questions", file=sys.stderr)
        for index in tqdm(order, desc="questions", disable=self.rank != 0):
            context, generation = requests[index].args[:2]
            answers[index] = self._answer(visuals[index], self.prompt(context, docs[index]), generation)
            self.cache_hook.add_partial("generate_until", (context, generation), answers[index])
        return answers

    def prompt(self, context: str, doc: dict) -> str:
        """The question as it is asked: the task's text, or the published one."""
        name = self.settings.prompt
        text = context if name == "task" else PROMPTS[name](doc)
        return rewrite_times(text) if self.settings.rewrite_times else text

    def loglikelihood(self, requests):
        """Not offered: the published results come from generated answers."""
        raise NotImplementedError("videoxl generates answers; choose a task with output_type: generate_until")

    def generate_until_multi_round(self, requests):
        """Not offered: lmms-eval's rounds bring new images each time."""
        raise NotImplementedError("videoxl answers single questions; choose a task with output_type: generate_until")

    def _doc(self, request):
        _, _, _, doc_id, task, split = request.args
        return self.task_dict[task][split][doc_id]

    def _answer(self, visuals, prompt, generation) -> str:
        config = {key: value for key, value in generation.items() if key in GENERATION_KEYS}
        config.setdefault("do_sample", (config.get("temperature") or 0) > 0)
        if self.settings.max_new_tokens:
            config["max_new_tokens"] = self.settings.max_new_tokens
        options = {"return_history": False, "generation_config": config, **self.sampling}
        return self.model.chat(self._seen(visuals), self.tokenizer, prompt, **options)

    def _seen(self, visuals):
        """What `chat` is shown; a single video file comes back encoded, from the question before if it can."""
        media = {}
        if len(visuals) == 2 and isinstance(visuals[1], dict):
            visuals, media = visuals[:1], visuals[1]
        if len(visuals) != 1 or not isinstance(visuals[0], (str, os.PathLike)):
            items = [("video" if isinstance(visual, (str, os.PathLike)) else "image", visual) for visual in visuals]
            return [{"type": kind, kind: visual} for kind, visual in items] or None
        path = os.fspath(visuals[0])
        if os.path.isdir(path):
            media = {"video_read_type": "img", **media}
        if self._encoded[0] != (path, media):
            self._encoded = (None, None)  # two long videos need not be held at once
            video = self.model.encode_video(path, self.tokenizer, media_dict=media, **self.sampling)
            self._encoded = ((path, media), video)
        return self._encoded[1]


def require_all_processes(running: int) -> None:
    """Raises ValueError if more processes were asked for than work together."""
    remedy = "on a CPU take `accelerate launch --multi_gpu` or `torchrun --nproc_per_node N`"
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > running:
        raise ValueError(
            f"this is one of {started} processes that know nothing of each other, each would answer all questions: "
            f"{remedy}, on GPUs `accelerate launch`; both with evaluation/lmms_eval_videoxl.py"
        )
    asked = asked_of_accelerate(psutil.Process().parent())
    if asked > running:
        raise ValueError(
            f"accelerate launch was asked for {asked} processes and has started {running}, as it does on a CPU: "
            f"{remedy}"
        )


def asked_of_accelerate(parent) -> int:
    """The `--num_processes` of the `accelerate launch` that has started this process; 1 if nothing has."""
    try:
        words = [] if parent is None else parent.cmdline()
    except psutil.Error:
        return 1
    if not any("accelerate" in word for word in words[:3]):
        return 1
    for place, word in enumerate(words):
        name, _, value = word.replace("-", "_").partition("=")
        if name == "__num_processes":
            value = value or (words[place + 1] if place + 1 < len(words) else "")
            return int(value) if value.isdecimal() else 1
    return 1


def _flat(visuals) -> list:
    if visuals is None:
        return []
    return [part for visual in visuals for part in (visual if isinstance(visual, (list, tuple)) else [visual])]


def spell_out(model_args: str) -> str:
    """`model_args` with every setting that its preset stands for."""
    given = dict(part.split("=", 1) for part in model_args.split(",") if part)
    preset = given.get("preset")
    named = {name: value for name, value in given.items() if name in FIELDS}
    settings = resolve_settings(preset).to_dict() | named
    rest = {name: value for name, value in given.items() if name not in FIELDS}
    return ",".join(f"{name}={value}" for name, value in {**rest, **settings}.items())


def register() -> None:
    """Makes `--model videoxl` known to lmms-eval."""
    manifest = ModelManifest(model_id=NAME, simple_class_path=f"{Path(__file__).stem}.{VideoXL.__name__}")
    MODEL_REGISTRY_V2.register_manifest(manifest, overwrite=True)


def main() -> None:
    """lmms-eval's own command line, with `videoxl` among its models."""
    from lmms_eval.__main__ import cli_evaluate

    register()
    if not torch.cuda.is_available():
        # Else accelerate takes processes without a GPU for separate runs.
        os.environ["ACCELERATE_USE_CPU"] = "true"
    try:
        require_all_processes(int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:
        sys.exit(f"error: {error}")  # lmms-eval would tell it, and exit as if all were well
    for place, argument in enumerate(sys.argv):
        if argument == "--model_args" and place + 1 < len(sys.argv):
            sys.argv[place + 1] = spell_out(sys.argv[place + 1])
        elif argument.startswith("--model_args="):
            sys.argv[place] = f"--model_args={spell_out(argument.partition('=')[2])}"
    cli_evaluate()
    if torch.distributed.is_initialized():
        # A thread of gloo that is busy when the interpreter ends can abort the process.
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
