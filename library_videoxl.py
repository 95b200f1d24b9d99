"""What this code expects of transformers: names of arguments, what calls may hold, and modes that models are in.

What is surprising:
* transformers 5.24 renamed `past_key_values` to `cache`. `CACHE_NAME` is what the installed release calls it, in its
  models' arguments, in outputs and in `generate`; calls may use either name.
* A cache or mask that came under a name which nobody reads would make answers silently wrong. So what is not known is
  an error, and so is a call that speaks of more tokens than its cache holds and it brings.
"""

from contextlib import contextmanager
from inspect import signature

import torch
from transformers import Qwen2Model
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

logger = logging.get_logger(__name__)

CACHE_NAMES = ("cache", "past_key_values")
# The first that the library's own models know; a release that knows neither is not supported, and says so at import.
CACHE_NAME = next(name for name in CACHE_NAMES if name in signature(Qwen2Model.forward).parameters)
# What `generate` leaves among a model's arguments and no model needs: with stop strings, the tokenizer.
WITHOUT_EFFECT = ("tokenizer",)


def given_cache(past_key_values, cache):
    """The cache of a call, under whichever of its two names it came.

    Raises:
        ValueError: If both came, or something that is no `Cache`.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names of one argument: give one of them")
    given = cache if past_key_values is None else past_key_values
    if given is not None and not isinstance(given, Cache):
        raise ValueError(
            f"past_key_values (or cache) must be a transformers Cache, got {type(given).__name__}: pass on what an "
            "earlier call returned"
        )
    return given


def refuse_unknown(where: str, arguments: dict) -> None:
    """Raises ValueError if any argument that `where` does not name holds something; None counts as absent."""
    for name, value in arguments.items():
        if value is not None and (name not in WITHOUT_EFFECT or _holds_cache(value)):
            held = " holds a cache: pass it as past_key_values or cache" if _holds_cache(value) else " is unknown"
            raise ValueError(
                f"{where} got an argument {name!r:.90}, which{held}. Nothing is ignored silently: leave it out, or, "
                "if transformers itself passed it, use a release this code was tested with (see the README)"
            )


def _holds_cache(value) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, Cache) or isinstance(value, (list, tuple)) and any(map(_holds_cache, value))


def require_whole_past(past_length, new_tokens, attention_mask, position_ids, prompt_length) -> None:
    """Raises ValueError if a call speaks of other tokens than its cache holds and it brings."""
    known = past_length + new_tokens
    told = known if attention_mask is None or attention_mask.ndim != 2 else attention_mask.shape[1]
    if prompt_length is not None and known < prompt_length and position_ids is not None:
        told = max(told, int(position_ids.max()) + 1)
    if told != known:
        raise ValueError(
            f"attention_mask (or position_ids) speaks of {told} tokens, but the cache holds {past_length} and "
            f"{new_tokens} came with this call: pass the cache of the earlier tokens as past_key_values or cache, and "
            "a mask of [batch, cached and new tokens]"
        )


@contextmanager
def evaluating(model):
    """Meanwhile a model runs as it answers, without dropout and gradient checkpointing; its mode is left as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


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
