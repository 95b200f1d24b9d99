"""Answers the questions of a file about many videos over many GPUs and machines, with Ray: `pip install ".[ray]"`.

    python -m videoxl.serving.ray_batch questions.jsonl --out answers.jsonl --model converted/ --actors 4

The files are those of `videoxl batch`, and either program goes on where the other has stopped.

What is surprising:
* An actor is a process with a model, on one GPU where there are any. It takes one video after the other, with all
  questions about it. Each answer is on disk before the next is asked, so an actor that dies is started again and asks
  what is left, and so does the same command after the driver died.
* On several machines (`--address`) the videos, the model and the folder of the answers must have the same paths on
  all of them.
* Ray keeps the constructor's arguments of an actor where they can be lost, so they are few, and small.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path

from tqdm import tqdm
from videoxl.shell.records import (
    Answers,
    Question,
    ask_video,
    describe_error,
    keep_answers,
    open_answers,
    read_json,
    settings_of,
    videos_folder,
)

SOME_FAILED = 3
SPARSE = ("prefill", "chunk_groups", "window_chunks", "decode", "decode_chunk_groups", "pool_size")
FRAMES = ("max_num_frames", "sample_fps", "max_sample_fps")
# Those of `videoxl batch`, by the same names.
DEFAULTS = {"dtype": "auto", "max_new_tokens": 256}
# Of a CPU core: Ray starts an actor only where so much is free, and its own readers need a core, too.
CPUS_OF_AN_ACTOR = 0.5


class PackageEngine:
    """Answers with this package: every mode of attention, videos of any length.

    Args:
        settings: Of `Driver`.
    """

    def __init__(self, settings: dict):
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        where = {"pretrained_model_name_or_path": settings["model"], "trust_remote_code": True}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        # Ray shows an actor its own GPU alone.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModel.from_pretrained(**where, dtype=settings["dtype"]).to(device)
        if sparse := {name: settings[name] for name in SPARSE if name in settings}:
            # The published switches would win over what the user has said.
            model.config.enable_sparse = model.config.enable_chunk_prefill = False
            model.config.sparse_attention = sparse
        encoding = {name: settings[name] for name in FRAMES if name in settings}
        self.ask = partial(
            ask_video, model, tokenizer, max_new_tokens=settings["max_new_tokens"], progress=False, **encoding
        )


class VllmEngine:
    """Answers with vLLM: all questions about a video at once, each over the whole of it. Not for sparse modes.

    Args:
        settings: Of `Driver`.
    """

    def __init__(self, settings: dict):
        from transformers import AutoConfig
        from vllm import LLM, SamplingParams

        if sparse := [name for name in SPARSE if name in settings]:
            raise ValueError(f"vLLM attends to the whole video, and knows no {', '.join(sparse)}; leave them out")
        dtype = settings["dtype"]
        if dtype == "auto":  # for vLLM half precision, whatever is stored; here and for the package what is stored
            stored = AutoConfig.from_pretrained(settings["model"], trust_remote_code=True).dtype
            dtype = "auto" if stored is None else str(stored).removeprefix("torch.")
        self.llm = LLM(
            settings["model"],
            trust_remote_code=True,
            dtype=dtype,
            allowed_local_media_path=settings["videos"],
            **settings.get("engine_args", {}),
        )
        self.sampling = SamplingParams(temperature=0.0, max_tokens=settings["max_new_tokens"])
        self.frames = {name: settings[name] for name in FRAMES if name in settings}

    def ask(self, questions: list[Question]):
        """An entry for each question, all at once; `seconds` would be those of all, so there are none."""
        try:
            video = {"type": "video_url", "video_url": {"url": Path(questions[0].path).resolve().as_uri()}}
            chats = [
                [{"role": "user", "content": [video, {"type": "text", "text": question.text}]}]
                for question in questions
            ]
            answers = self.llm.chat(chats, self.sampling, use_tqdm=False, mm_processor_kwargs=self.frames or None)
        except Exception as error:  # of whatever kind: one bad video must not stop the rest
            return [question.entry | {"error": describe_error(error)} for question in questions]
        said = [answer.outputs[0] for answer in answers]
        return [
            question.entry | {"answer": one.text.strip(), "tokens": len(one.token_ids)}
            for question, one in zip(questions, said, strict=True)
        ]


ENGINES = {"videoxl": PackageEngine, "vllm": VllmEngine}


class Actor:
    """What Ray starts: an engine that answers jobs, each a video with its questions, as JSON."""

    def __init__(self, settings: dict):
        self.engine = ENGINES[settings.get("engine", "videoxl")](settings)

    def __call__(self, batch: dict) -> dict:
        for job in map(json.loads, batch["job"]):
            questions = [Question(**question) for question in job["questions"]]
            for _ in keep_answers(Path(job["file"]), questions, self.engine.ask):
                pass  # what is in the file is all that is wanted
        return {"actor": [f"{os.uname().nodename}:{os.getpid()}"] * len(batch["job"])}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m videoxl.serving.ray_batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("questions", metavar="QUESTIONS", help="file of questions, see videoxl batch --help")
    parser.add_argument("--out", metavar="ANSWERS", required=True, help="file of answers; goes on if it exists")
    parser.add_argument("--videos", metavar="DIR", help="folder of the videos (default: that of QUESTIONS)")
    parser.add_argument("--model", metavar="DIR_OR_ID", required=True, help="folder or Hub id, whose code will run")
    parser.add_argument("--trust-remote-code", action="store_true", help="needed for a Hub id")
    parser.add_argument(
        "--settings",
        metavar="JSON",
        default="{}",
        help="what videoxl batch has options for, by name, as JSON or a file with it: "
        f"{', '.join((*DEFAULTS, *FRAMES, *SPARSE))}",
    )
    parser.add_argument("--engine", choices=ENGINES, default="videoxl", help="what answers (default: %(default)s)")
    parser.add_argument(
        "--engine-args", metavar="JSON", default={}, type=json.loads,
        help='arguments of vllm.LLM, such as {"tensor_parallel_size": 2}',
    )  # fmt: skip
    parser.add_argument("--actors", metavar="N", type=int, help="how many (default: one a GPU, or one)")
    parser.add_argument("--gpus", metavar="N", type=float, help="of an actor (default: 1 where there are any, or 0)")
    parser.add_argument("--address", help='of a Ray cluster, such as "auto" (default: this machine alone)')
    return parser


def settings_from(options: argparse.Namespace) -> dict:
    """What answers depend on, under the names that `videoxl batch` gives it.

    Raises:
        FileNotFoundError, ValueError: If something is unknown, or the model is none.
    """
    text = options.settings.strip()
    try:
        said = json.loads(text) if text.startswith("{") else read_json(Path(text))
    except ValueError as error:
        raise ValueError(f"--settings is not JSON: {error}") from error
    known = (*DEFAULTS, *FRAMES, *SPARSE)
    if not isinstance(said, dict) or (unknown := said.keys() - known):
        got = ", ".join(sorted(unknown)) if isinstance(said, dict) else text
        raise ValueError(f"--settings takes {', '.join(known)}; got {got:.200}")
    if options.actors is not None and options.actors < 1:
        raise ValueError(f"--actors must be at least 1, got {options.actors}")
    if options.engine_args and options.engine != "vllm":
        raise ValueError("--engine-args are those of vllm.LLM; add --engine vllm, or leave them out")
    if Path(options.model).is_dir():
        if not Path(options.model, "config.json").is_file():
            raise ValueError(f"{options.model} is not a model folder: it has no config.json")
        # Read by huggingface_hub when it is imported; the actors inherit it.
        os.environ["HF_HUB_OFFLINE"] = "1"
    elif not options.trust_remote_code:
        raise ValueError(f"no folder {options.model} here; if it is a Hub id that you trust: --trust-remote-code")
    said = DEFAULTS | said | ({} if options.engine == "videoxl" else {"engine": options.engine})
    return settings_of(said, options.model, videos_folder(options.questions, options.videos))


def _anywhere(question: Question) -> dict:
    """A question for an actor, which runs in another folder."""
    return asdict(question) | {"path": os.path.abspath(question.path)}


def answer_all(options: argparse.Namespace, settings: dict, answers: Answers) -> None:
    """Starts the actors, or finds the cluster, and returns when every question has been asked."""
    jobs = [
        # As text, in which any path is ASCII.
        {"job": json.dumps({"file": str(answers.part(questions)), "questions": list(map(_anywhere, questions))})}
        for questions in answers.to_ask()
    ]
    print(f"{len(jobs)} videos with questions that have no answer yet", file=sys.stderr)
    if not jobs:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            'this needs Ray: pip install ".[ray]" where the package is, or pip install "ray[data]"'
        ) from error
    here = {} if options.address else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(address=options.address, log_to_driver=False, logging_level="warning", **here)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        gpus = int(ray.cluster_resources().get("GPU", 0))
        actors = min(options.actors or gpus or 1, len(jobs))
        done = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
            Actor,
            fn_constructor_args=({**settings, "engine_args": options.engine_args},),
            batch_size=1,
            # A second video waits at each actor, no more, or others would go without. An actor that dies is started
            # again, and gets its videos again: that is Ray Data's default.
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=CPUS_OF_AN_ACTOR,
            num_gpus=options.gpus if options.gpus is not None else min(gpus, 1),
        )
        shares = Counter()
        with tqdm(total=len(jobs), unit="video") as bar:
            for row in done.iter_rows():
                shares[row["actor"]] += 1
                bar.update()
        print("videos of each actor:", *sorted(shares.values()), file=sys.stderr)
    except ray.exceptions.RayError as error:
        # The last of its lines says what went wrong in the actor.
        raise RuntimeError(str(error).strip().splitlines()[-1]) from error
    finally:
        ray.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, which is that of `videoxl batch`."""
    options = build_parser().parse_args(arguments)
    try:
        settings = settings_from(options)
        answers = open_answers(options.questions, options.out, options.videos)
        answers.settle(settings)
        answers.collect()
        try:
            answer_all(options, settings, answers)
        except BaseException:
            # What is there is worth having; without room for it, it stays where it is for the next run.
            with contextlib.suppress(OSError):
                answers.collect()
            raise
        answered, failed = answers.collect()
    except (KeyboardInterrupt, OSError, RuntimeError, ValueError) as error:
        print("error:", " ".join(str(error).split()) or "interrupted", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        return 2 if isinstance(error, (FileNotFoundError, ValueError)) else 1
    print(f"{answers.out}: {answered} answers, {failed} errors", file=sys.stderr)
    return SOME_FAILED if failed else 0


if __name__ == "__main__":
    sys.exit(main())
