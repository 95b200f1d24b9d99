"""No test may take a greedy answer where the two best words are as good as equal: other processors round otherwise.

Every greedy step of every model that a test runs in this process is watched. Seeds and questions are chosen so that
the best word leads by `CHOSEN` at every step; a test fails below `TIE`, which is far above what rounding moves (1e-4).
A test that compares no words, or words of the same computation, is marked `ties`.
"""

import functools

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import GenerationMixin

CHOSEN, TIE = 1e-2, 5e-3  # logits

# Leads of the best word over the next, of all steps since the list was last cleared.
leads = []


class Watch(LogitsProcessor):
    """Notes by how much the best word leads; changes nothing."""

    def __init__(self, ended):
        self.ended = ended

    def __call__(self, input_ids, scores):
        best, next_best = scores.float().topk(2, dim=-1).values.unbind(-1)
        # What follows the end of a row in a batch is padding.
        going_on = best.isfinite()
        if input_ids.shape[1]:  # a prompt of embeddings has no ids
            going_on &= ~torch.isin(input_ids[:, -1], self.ended)
        leads.extend((best - next_best)[going_on].tolist())
        return scores


@functools.cache
def watch_answers() -> None:
    """From now on, greedy steps of all models fill `leads`."""
    generate = GenerationMixin.generate

    @functools.wraps(generate)
    def watched(self, inputs=None, generation_config=None, logits_processor=None, **kwargs):
        config = generation_config or self.generation_config
        value = {name: kwargs.get(name, getattr(config, name)) for name in ("num_beams", "do_sample", "eos_token_id")}
        if (value["num_beams"] or 1) == 1 and not value["do_sample"]:
            ended = torch.tensor(value["eos_token_id"] or [-1]).flatten()
            logits_processor = LogitsProcessorList([*(logits_processor or []), Watch(ended)])
        return generate(self, inputs, generation_config, logits_processor, **kwargs)

    GenerationMixin.generate = watched


def greedy_choice(scores: torch.Tensor, least: float = CHOSEN) -> int:
    """The best of `scores` [vocabulary], which must lead by `least`."""
    best = scores.topk(2)
    lead = (best.values[0] - best.values[1]).item()
    assert lead > least, f"the best word leads by {lead:.2g} only: choose another seed or question"
    return best.indices[0].item()


def beam_scores(model, **inputs) -> torch.Tensor:
    """Log-likelihoods [rows] of the best beams: unlike their words, they are the same where two beams are as good."""
    return model.generate(**inputs, return_dict_in_generate=True, output_scores=True).sequences_scores
