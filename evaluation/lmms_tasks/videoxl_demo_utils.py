"""What `videoxl_demo.yaml` calls: the clip, the question, and whether the answer is right."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def visual(doc):
    """The video of a question."""
    return [str(ROOT / doc["video"])]


def text(doc, lmms_eval_specific_kwargs=None):
    """The question."""
    return doc["question"]


def results(doc, answers):
    """1 for the right answer, 0 for any other."""
    return {"exact_match": float(answers[0].strip() == doc["answer"])}
