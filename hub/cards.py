"""Model cards: what is known of the published checkpoints, the card of a converted one, and checks of metadata.

What is surprising:
* A card in the converted checkpoint's own folder knows better than the table here what licence the weights have.
* Results come from result files of `evaluation/` that name the weights by their hash, and from nowhere else. A card
  that brings a `model-index` of its own is refused.
* The Hub has the last word on metadata (`ModelCard.validate`, which needs the network). What is checked here is what
  it is known to refuse, and what it needs for its buttons.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

LIBRARY, PIPELINE = "transformers", "video-text-to-text"
TAGS = ("video", "long-video", "conversational", "custom_code")
RESULT_FORMAT = "videoxl-report-1"

# The identifiers that the Hub knows as `license`.
# fmt: off
LICENSES = frozenset((
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0",
    "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "cdla-sharing-1.0", "creativeml-openrail-m",
    "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "gemma", "gfdl",
    "gpl", "gpl-2.0", "gpl-3.0", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl",
    "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl", "postgresql",
    "unknown", "unlicense", "wtfpl", "zlib",
))
# fmt: on


@dataclass(frozen=True)
class Published:
    """What a card says about a family of published checkpoints.

    Args:
        title: Its name.
        base_models: Hub ids of its checkpoints.
        license: What its publishers are known to have put the weights under; None where that is not known.
        arxiv, paper: The paper.
    """

    title: str
    base_models: tuple[str, ...]
    license: str | None
    arxiv: str
    paper: str


# By the names of `families.FAMILIES`.
PUBLISHED = {
    "videoxl2": Published(
        "Video-XL-2",
        ("BAAI/Video-XL-2",),
        "apache-2.0",
        "2506.19225",
        "Video-XL-2: Towards Very Long-Video Understanding Through Task-Aware KV Sparsification",
    ),
    # Of this one there are two generations, and which of them a repository holds is not known for sure.
    **dict.fromkeys(
        ("videoxlpro", "videoxlpro_march"),
        Published(
            "Video-XL-Pro",
            ("MINT-SJTU/Video-XL-Pro-3B", "lxr2003/Video-XL-Pro-3B"),
            None,
            "2503.18478",
            "Video-XL-Pro: Reconstructive Token Compression for Extremely Long Video Understanding",
        ),
    ),
    "videoxl1": Published(
        "Video-XL",
        ("sy1998/Video_XL",),
        None,
        "2409.14485",
        "Video-XL: Extra-Long Vision Language Model for Hour-Scale Video Understanding",
    ),
    "videochatflash": Published(
        "VideoChat-Flash",
        (
            "OpenGVLab/VideoChat-Flash-Qwen2-7B_res448",
            "OpenGVLab/VideoChat-Flash-Qwen2-7B_res224",
            "OpenGVLab/VideoChat-Flash-Qwen2_5-2B_res448",
            "OpenGVLab/VideoChat-Flash-Qwen2_5-7B-1M_res224",
        ),
        "apache-2.0",
        "2501.00574",
        "VideoChat-Flash: Hierarchical Compression for Long-Context Video Modeling",
    ),
    "videochatflash_internvideo2": Published(
        "VideoChat-Flash",
        ("OpenGVLab/VideoChat-Flash-Qwen2_5-7B_InternVideo2-1B",),
        "apache-2.0",
        "2501.00574",
        "VideoChat-Flash: Hierarchical Compression for Long-Context Video Modeling",
    ),
}

CARD = """\
# {title}, converted for current transformers

These are the weights of {origin}, with the tensors renamed and nothing trained,
together with remote code for transformers 5.17 and newer. The code downloads nothing and needs no flash-attn.

```bash
pip install "transformers>=5.17,<6" "torch>=2.11" "av>=17" einops pillow tqdm
```

```python
import torch
from transformers import AutoModel, AutoTokenizer

model_path = "REPOSITORY"  # this repository's id, or a folder with its files
tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
model = AutoModel.from_pretrained(model_path, trust_remote_code=True, dtype=torch.bfloat16).to("cuda")

answer, history = model.chat("video.mp4", tokenizer, "What happens in this video?", max_num_frames=128)
print(answer)
answer, history = model.chat(None, tokenizer, "And then?", chat_history=history)
print(answer)
```

The second question decodes and encodes nothing again. `AutoProcessor`, `apply_chat_template` and `generate` work as
they do for models of the library.

## Results

Results that were measured on these weights with this code are in the metadata (`model-index`), written from result
files. Where there is none, none has been measured. What was published about the original stands in its own card.

## Licence and citation

{license_text} The code (`*.py`) is under the Apache License 2.0, see `LICENSE-CODE`. If you use the model, cite its
paper:

```bibtex
@article{{{key},
  title   = {{{paper}}},
  journal = {{arXiv preprint arXiv:{arxiv}}},
  url     = {{https://arxiv.org/abs/{arxiv}}},
}}
```
"""


def converted_card(family: str, hub_id: str | None, folder: str = "", published_card: str | None = None) -> str:
    """The card of a converted checkpoint.

    Args:
        family: A key of `PUBLISHED`.
        hub_id: The Hub id that it was converted from, if it was no local folder.
        folder: Name of the local folder.
        published_card: The text of README.md that the checkpoint came with, if there is one: its licence counts.

    Returns:
        README.md. Its `base_model` is missing if the family has several checkpoints and the folder's name is not that
        of just one.
    """
    facts = PUBLISHED[family]
    base_model = hub_id or _base_model(facts, folder)
    known = [base_model] if base_model else facts.base_models
    link = f"https://huggingface.co/{known[0]}"
    license_fields, said_by = _license(facts, link, published_card)
    text = CARD.format(
        title=facts.title,
        origin=" or ".join(f"[{name}](https://huggingface.co/{name})" for name in known),
        license_text=f"The weights are under the licence of the checkpoint that they come from: {said_by} {link}.",
        key="".join(letter for letter in facts.title.lower() if letter.isalnum()) + f"20{facts.arxiv[:2]}",
        paper=facts.paper,
        arxiv=facts.arxiv,
    )
    data = ModelCardData(
        **license_fields,
        language=["en"],
        library_name=LIBRARY,
        pipeline_tag=PIPELINE,
        base_model=[base_model] if base_model else None,
        tags=list(TAGS),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def _base_model(facts, folder):
    if len(facts.base_models) == 1:
        return facts.base_models[0]
    named = [name for name in facts.base_models if name.split("/")[1] == folder]
    return named[0] if len(named) == 1 else None


def _license(facts, link, published_card):
    """Fields of the metadata, and whose word they are."""
    fields = {}
    if published_card is not None:
        data = _metadata(published_card)
        fields = {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}
    if isinstance(fields.get("license"), str):
        return fields, f"`{fields.get('license_name') or fields['license']}` by its own card,"
    if facts.license is not None:
        return {"license": facts.license}, f"`{facts.license}` as far as known when this card was generated; see"
    return {"license": "other", "license_name": "see-base-model", "license_link": link}, "see"


def _metadata(card: str) -> dict:
    try:
        return ModelCard(card).data.to_dict()
    except Exception as error:  # yaml's own kinds, and ValueError
        raise ValueError(f"the metadata of README.md cannot be read: {' '.join(str(error).split())}") from error


def check_card(card: str, needs_base_model: bool = True) -> dict:
    """Checks a card as far as that is possible without the network.

    Args:
        card: The text of README.md.
        needs_base_model: Whether the weights were made from other weights.

    Returns:
        The metadata.

    Raises:
        ValueError: With all that is missing or wrong.
    """
    if not card.startswith("---\n"):
        raise ValueError("README.md has no metadata: it must begin with a block of YAML between two lines ---")
    data, wrong = _metadata(card), []
    if "model-index" in data or "model_name" in data:
        wrong.append("model-index must come from result files (evaluation/results), not from the card")
    if data.get("license") not in LICENSES:
        wrong.append(
            f"license must be one that the Hub knows, such as apache-2.0 or other, got {data.get('license')!r}"
        )
    if data.get("license") == "other" and not (data.get("license_name") and data.get("license_link")):
        wrong.append("license: other needs license_name and license_link")
    for key, expected in (("library_name", LIBRARY), ("pipeline_tag", PIPELINE)):
        if data.get(key) != expected:
            wrong.append(f"{key} must be {expected}, got {data.get(key)!r}")
    tags = data.get("tags") if isinstance(data.get("tags"), list) else []
    if missing := [tag for tag in ("conversational", "custom_code") if tag not in tags]:
        wrong.append(f"tags lack {', '.join(missing)}")
    if not data.get("language"):
        wrong.append("language is missing")
    base_models = data.get("base_model") or []
    base_models = [base_models] if isinstance(base_models, str) else base_models
    if needs_base_model and not base_models:
        wrong.append("base_model is missing: the Hub id of the checkpoint that the weights were made from")
    if strange := [name for name in base_models if not isinstance(name, str) or name.count("/") != 1]:
        wrong.append(f"base_model must be Hub ids (org/name), got {strange}")
    if not card.split("---\n", 2)[-1].strip():
        wrong.append("there is no text below the metadata")
    if wrong:
        raise ValueError("README.md: " + "; ".join(wrong))
    return data


def with_results(card: str, files: Iterable[Path], weights_sha256: str) -> tuple[str, list[str]]:
    """Adds the results that were measured on these very weights to a card's metadata.

    Args:
        card: README.md; its first heading names the model.
        files: Result files of evaluation/.
        weights_sha256: The hash of the weights, as result files have it.

    Returns:
        The card, and the names of the files that were used.
    """
    results, used = [], []
    for file in sorted(files):
        report = json.loads(file.read_text(encoding="utf-8"))
        if report.get("format") != RESULT_FORMAT:
            continue
        configuration = report["configuration"]
        if configuration["checkpoint"]["weights_sha256"] == weights_sha256:
            used.append(file.name)
            results += _results(file, configuration, report["summary"])
    if results:
        model_card = ModelCard(card)
        title = re.search(r"^# (.+)$", model_card.text, re.MULTILINE)
        model_card.data.model_name, model_card.data.eval_results = title[1] if title else "model", results
        card = str(model_card)
    return card, used


def _results(file, configuration, summary):
    seconds = "/".join(map(str, configuration["seconds"]))
    for mode, figures in summary.items():
        figures = figures["all"]
        yield EvalResult(
            task_type=PIPELINE,
            dataset_type="procedural-video-world",
            dataset_name=f"Generated video world, held-out clips of {seconds} s",
            dataset_split=configuration["split"],
            dataset_args={"result_file": f"evaluation/results/{file.name}", "questions": figures["total"]},
            metric_type="accuracy",
            metric_name=f"Exact match, {mode}",
            metric_value=figures["accuracy"],
            metric_args={"mode": mode, "interval_95": figures["interval"]},
        )
