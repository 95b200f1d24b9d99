"""Gives the language model the head that asked in the vision stage.

The vision stage (`pretrain_vision.py`) trains a head of attention whose queries, one for each shape, find that shape's
tokens and read its colour, size, way and frames from them. A small language model takes thousands of steps to find out
that there is such a head; until then it answers with any colour that it has seen. So its weights are written into the
language model, which goes on learning from there: `hand_over` in a recipe.

What is surprising:
* The language model's hidden states are not the visual tokens any more. Keys, values and queries are therefore fitted,
  by ridge regression, to what the asking head says about the clips of a few batches: keys of visual tokens to its
  scores (and those of text to a low one), queries at the names of the shapes to the scores' axes.
* Scores stand in the slowest dimensions of the rotary embedding, so they hold at any distance.

V visual tokens, X text tokens, Q queries (shapes, a sign, a card), D head size, C width of the language model.
"""

import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.batches import videos_of
from training.pretrain_vision import AskingHead
from video_world import SHAPES

NAMES = (*SHAPES, "sign", "card")
# Score of text, below those of visual tokens that do not show what is asked for.
LOWEST = -6.0
SHARPNESS = 2.5  # of the attention, against the asking head's: queries are fitted to less than their axes
RIDGE = 1e-5  # of the mean of the inputs' squares


def load_asking_head(path: str | Path, hidden_size: int, frames_per_group: int) -> AskingHead:
    """The head that the vision stage has written beside its model.

    Raises:
        FileNotFoundError: If there is none.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such heads; pretrain_vision.py writes heads.safetensors with asked_weight"
        )
    head = AskingHead(hidden_size, frames_per_group)
    prefix = "asking_head."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)})
    return head.eval()


@torch.no_grad()
def hand_over(model, processor, batches: list[dict], head: AskingHead, reading=None, looking=None) -> None:
    """Writes an asking head's weights into heads of the language model, in place.

    Args:
        model: A Video-XL model.
        processor: Its processor.
        batches: A collator's batches with videos, to fit the weights to.
        head: See `load_asking_head`.
        reading: (layer, key-value head): keys, values and, of its first query head, queries and outputs are given; its
            other query heads are silenced.
        looking: (layer, key-value head): only keys and the queries of all its query heads are given, so that what has
            been found there can be read in another way.

    Raises:
        ValueError: If a head has no room for the queries, or what is read.
    """
    was_training = model.training
    model.eval()
    for place, reads in ((reading, True), (looking, False)):
        if place is not None:
            _give(model, processor, batches, head, tuple(place), reads)
    model.train(was_training)


def _give(model, processor, batches, head, place, reads) -> None:
    layer, group = place
    block = model.model.language_model.layers[layer]
    attention = block.self_attn
    size, per_group = attention.head_dim, attention.num_key_value_groups
    axes = slow_dimensions(size, len(NAMES))
    tokens, hidden, residual, ids = _states(model, batches, block)
    visual = ids == model.config.video_token_id
    text = ~visual & (ids != processor.tokenizer.pad_token_id)
    normed = tokens / tokens.pow(2).mean(dim=-1, keepdim=True).sqrt()
    scores = (head.key(normed) @ head.queries.T - head.thresholds).clamp(min=LOWEST)
    low = torch.full((int(text.sum()), len(NAMES)), LOWEST + 1)
    rows = slice(group * size, (group + 1) * size)

    key = _fit(
        torch.cat([hidden[visual], hidden[text]]),
        torch.cat([scores, low]),
        torch.cat([torch.full((len(scores),), 4 / len(scores)), torch.full((len(low),), 1 / len(low))]),
    )
    _write(attention.k_proj, rows, axes, key)

    names = torch.tensor([processor.tokenizer.encode(f" {name}")[0] for name in NAMES])
    named = (ids[text, None] == names).float()
    weight = 1 / len(named) + 0.3 * (named / named.sum(dim=0).clamp(min=1)).sum(dim=1)
    query, bias = _fit(hidden[text], named, weight)
    scale = SHARPNESS * math.sqrt(size)
    for number in range(group * per_group, group * per_group + (1 if reads else per_group)):
        _write(attention.q_proj, slice(number * size, (number + 1) * size), axes, (query * scale, bias * scale))
    if not reads:
        return

    found = head.shape(head.value(normed))
    if found.shape[1] > size:
        raise ValueError(f"{found.shape[1]} facts do not fit into a head of {size}")
    value = _fit(hidden[visual], found / found.std(), torch.full((len(found),), 1 / len(found)))
    _write(attention.v_proj, rows, list(range(found.shape[1])), value)
    # Anywhere in the residual stream, half as loud as what stands there.
    width = len(attention.o_proj.weight)
    directions, _ = torch.linalg.qr(torch.randn(width, found.shape[1], generator=torch.Generator().manual_seed(0)))
    loudness = 0.5 * residual[text].pow(2).mean(dim=-1).sqrt().median() * math.sqrt(width / found.shape[1])
    columns = attention.o_proj.weight[:, group * per_group * size : (group + 1) * per_group * size]
    columns.zero_()
    columns[:, : found.shape[1]] = directions * loudness


def slow_dimensions(size: int, count: int) -> list[int]:
    """Dimensions of a head that the rotary embedding turns least, in both halves of its pairs.

    Raises:
        ValueError: If there are not `count` among the slower half.
    """
    if count > size // 2:
        raise ValueError(f"{count} queries do not fit into the slower half of a head of {size}")
    half, pairs = size // 2, -(-count // 2)
    slow = list(range(half - pairs, half))
    return (slow + [half + number for number in slow])[:count]


def _states(model, batches, block):
    """Visual tokens [V, C]; and of all positions what the layer's attention reads and the residual stream, [B * L, C],
    with the ids [B * L]."""
    tokens, hidden, residual = [], [], []
    hooks = (
        block.input_layernorm.register_forward_hook(lambda module, given, output: hidden.append(output.flatten(0, 1))),
        block.register_forward_pre_hook(lambda module, given: residual.append(given[0].flatten(0, 1))),
    )
    try:
        for batch in batches:
            videos = videos_of(batch)
            tokens += [part.flatten(0, 1) for part in model.get_video_features(videos).pooler_output]
            model(input_ids=batch["input_ids"], pixel_values_videos=videos, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    return torch.cat(tokens), torch.cat(hidden), torch.cat(residual), ids


def _fit(inputs, wanted, weights):
    """Weighted ridge regression: weight [outputs, C] and bias [outputs]."""
    extended = torch.cat([inputs, torch.ones(len(inputs), 1)], dim=1).double()
    weighted = extended * weights.double()[:, None]
    gram = extended.T @ weighted
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solution = torch.linalg.solve(gram, weighted.T @ wanted.double()).float()
    return solution[:-1].T, solution[-1]


def _write(projection, rows, axes, weight_and_bias) -> None:
    """Puts a fitted map into some axes of a head's rows; its other axes become zero."""
    weight, bias = weight_and_bias
    for target, given in ((projection.weight, weight), (projection.bias, bias)):
        part = torch.zeros_like(target[rows])
        part[axes] = given
        target[rows] = part
