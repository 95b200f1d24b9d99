"""What training needs beside a model's usual ways: labels, packed prompts, checkpointing.

What is surprising:
* Where of a video nothing but key-values is left, only the sequence's end has outputs: positions are counted from it.
* Gradient checkpointing runs a layer a second time in the backward pass. A cache would be filled twice, or not at all.

B batch, L sequence, n positions.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)


def require_trainable(in_force, whole: bool, logits_to_keep) -> None:
    """Raises ValueError where labels do not go with the settings."""
    if whole and logits_to_keep:
        raise ValueError("labels are for all positions: leave logits_to_keep out, or give the positions as a tensor")
    if in_force.decoding.text_only:
        raise ValueError("labels cannot be used with decode='bilevel': train with a prefill plan and decode='full'")
    if in_force.policy.untrainable:
        raise ValueError(f"labels cannot be used with {in_force.policy.untrainable}")


def among_outputs(first: int, positions) -> torch.Tensor:
    """Positions [n] of a sequence as places among its outputs, which begin with position `first`."""
    if first and len(positions) and int(positions.min()) < first:
        raise ValueError(
            "with decode='bilevel', beacon memory, a token selector or mm_llm_compress logits exist behind the last "
            f"video only, from position {first} on; logits_to_keep asks for {positions.tolist()!r:.90}"
        )
    return positions - first


def of_whole_length(output, length: int):
    """An output with a row for each of `length` tokens, as other trainers expect: zeros where there is none."""
    missing = length - output.last_hidden_state.shape[1]
    if missing:
        output.last_hidden_state = F.pad(output.last_hidden_state, (0, 0, missing, 0))
    return output


def packed_samples(position_ids) -> torch.Tensor | None:
    """[samples, L] the samples of a sequence [1, L] whose positions start anew, 1 where each stands; else None."""
    if position_ids is None or len(position_ids) != 1:
        return None
    begins = torch.cat([position_ids.new_ones(1), (position_ids[0].diff() <= 0).long()])
    numbers = begins.cumsum(0)
    return (numbers == torch.arange(1, int(numbers[-1]) + 1, device=numbers.device)[:, None]).long()


def checkpointed_layers(language_model) -> list[GradientCheckpointingLayer]:
    """The layers whose activations would be computed again in the backward pass of what runs now."""
    layers = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [layer for layer in layers if layer.training and layer.gradient_checkpointing]


@contextmanager
def without_checkpointing(layers: list[GradientCheckpointingLayer]):
    """Meanwhile these layers fill a cache: checkpointed they would get none, or fill it twice."""
    if layers and torch.is_grad_enabled():
        logger.warning_once(
            "gradient checkpointing does not reach the language model where its activations pass through a cache "
            "(use_cache=True, beacon memory, a token selector): they stay in memory"
        )
    try:
        for layer in layers:
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
