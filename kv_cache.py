"""What is kept: whole caches of layers that grow in place (`cache_layers_videoxl.py`), shared between questions,
moved, offloaded, stacked, or mixed from dense and pooled keys and values.

What is surprising:
* Pooling needs un-rotated keys: the mean of rotated ones is no key at all.
* transformers 5.24 renamed `past_key_values` to `cache`. `CACHE_NAME` is what the installed release calls it, in its
  models' arguments, in outputs and in `generate`.

B batch, K key-value heads, L tokens in the layer, M tokens kept of them, D head size, G groups, N visual tokens a
group.
"""

from collections.abc import Callable
from inspect import signature
from typing import NamedTuple

import torch
from transformers import Qwen2Model
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache_layers_videoxl import ROTATED_AT_ONCE, VideoXLCacheLayer, VideoXLOffloadedLayer, rotate

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
                f"{where} got an argument {name!r}, which{held}. Nothing is ignored silently: leave it out, or, if "
                "transformers itself passed it, use a release this code was tested with (see the README)"
            )


def _holds_cache(value) -> bool:
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, Cache) or isinstance(value, (list, tuple)) and any(map(_holds_cache, value))


def rewind_cache(cache: DynamicCache, length: int, held: int) -> None:
    """Takes a cache of one row back to a length at which its layers held `held` keys, in place."""
    if getattr(cache, "deferred", None) is not None:
        cache.deferred = cache.deferred.until(length)
    for layer in cache.layers:
        layer.rewind(length, held)


def snapshot_cache(cache: DynamicCache, held: int) -> Callable[[], None]:
    """A function that brings a cache of one row back to what it is now, whatever became of it meanwhile.

    Costs a copy of the keys and values behind the first `held` ones, to which the cache may be rewound meanwhile.
    """
    facts = {**cache.__dict__, "layers": list(cache.layers)}
    restored = [layer.snapshot(held) for layer in cache.layers]

    def restore() -> None:
        for restore_layer in restored:
            restore_layer()
        cache.__dict__.update(facts)
        for name in set(cache.__dict__) - set(facts):
            del cache.__dict__[name]

    return restore


class KeptSpan(NamedTuple):
    """A run of tokens in a mixed cache: [start, stop) of the dense one, as it is or (`group`) that group pooled."""

    start: int
    stop: int
    group: int | None = None


def mix_cache(cache: DynamicCache, spans, groups, pool_size, inv_freq, true_positions=False) -> DynamicCache:
    """Builds a cache of dense and pooled key-values from a dense one (bi-level decoding).

    Args:
        cache: One row that holds all its tokens at their positions.
        spans: `KeptSpan`s in order; what they leave out is dropped.
        groups: (start, stop) of every group's visual tokens.
        pool_size: Kernel and stride of the pooling.
        inv_freq: [D / 2] rotary frequencies of the language model.
        true_positions: Keep positions (a pooled key stands in the middle of its tokens) instead of counting the kept
            keys from 0, which is what the reference does.

    Returns:
        A new cache on the device of `inv_freq`; the given one is unchanged, and may lie on another device.
    """
    length = cache.get_seq_length()
    size = (groups[0][1] - groups[0][0]) // pool_size if groups else 0
    dense = torch.tensor([span.group is None for span in spans], dtype=torch.bool)
    starts = torch.tensor([span.start for span in spans], dtype=torch.long)
    kept = torch.tensor([span.stop - span.start if span.group is None else size for span in spans], dtype=torch.long)
    targets, cursor = kept.cumsum(0) - kept, int(kept.sum())
    dense_from, dense_to = _runs(starts[dense], kept[dense]), _runs(targets[dense], kept[dense])
    pooled_from = [span.group for span in spans if span.group is not None]
    pooled_to = _runs(targets[~dense], kept[~dense])
    device = inv_freq.device
    stay = true_positions or torch.equal(dense_from, dense_to)
    dense_to = dense_to.to(device)
    pooled_from = torch.tensor(pooled_from, dtype=torch.long, device=device)
    pooled_to = pooled_to.to(device) if len(pooled_from) else None
    mixed = DynamicCache()
    mixed.layers = []
    for layer in cache.layers:
        shape = (*layer.keys.shape[:2], cursor, layer.keys.shape[3])
        keys, values = (layer.keys.new_empty(shape, device=device) for _ in range(2))
        for begin in range(0, len(dense_from), ROTATED_AT_ONCE):
            part = slice(begin, begin + ROTATED_AT_ONCE)
            source, target = dense_from[part].to(layer.keys.device), dense_to[part]
            moved = layer.keys.index_select(2, source).to(device)
            if not stay:
                moved = rotate(moved, source, target, inv_freq).to(keys.dtype)
            keys.index_copy_(2, target, moved)
            values.index_copy_(2, target, layer.values.index_select(2, source).to(device))
        if pooled_to is not None:
            pooled_keys, pooled_values = layer.pooled_groups(groups, pool_size, inv_freq)
            positions = pooled_to
            if true_positions:
                starts = torch.tensor([start for start, _ in groups], device=device)[pooled_from]
                middles = torch.arange(size, device=device) * pool_size + (pool_size - 1) / 2
                positions = (starts[:, None] + middles).flatten()
            picked = pooled_keys.index_select(2, pooled_from).flatten(2, 3)
            keys.index_copy_(2, pooled_to, rotate(picked, None, positions, inv_freq).to(keys.dtype))
            values.index_copy_(2, pooled_to, pooled_values.index_select(2, pooled_from).flatten(2, 3))
        new_layer = VideoXLCacheLayer()
        new_layer.set_content(keys, values)
        new_layer.hidden = length - cursor
        new_layer.row_shift = None if true_positions else torch.tensor([length - cursor], device=device)
        mixed.layers.append(new_layer)
    mixed.layer_class_to_replicate = None
    return mixed


def _runs(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The numbers of adjacent runs: start, start + 1, ... of each."""
    offsets = starts - (lengths.cumsum(0) - lengths)
    return offsets.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def own_layers(cache: DynamicCache, num_layers: int) -> bool:
    """Replaces the layers of a dynamic cache by ours, in place, keeping what they hold.

    Returns:
        False, with nothing changed, if the cache is of a kind whose layers cannot be replaced (static, quantised,
        offloaded).
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    if any(type(layer) is not DynamicLayer and not hasattr(layer, "row_shift") for layer in cache.layers):
        return False
    layers = []
    for index in range(num_layers):
        old = cache.layers[index] if index < len(cache.layers) else None
        if not hasattr(old, "row_shift"):
            layer = VideoXLCacheLayer()
            if old is not None and old.get_seq_length():
                layer.set_content(old.keys, old.values)
            old = layer
        layers.append(old)
    cache.layers = layers
    cache.layer_class_to_replicate = None
    return True


def new_cache(num_layers: int) -> DynamicCache:
    """An empty cache with our layers."""
    cache = DynamicCache()
    own_layers(cache, num_layers)
    return cache


def move_cache(cache: DynamicCache, device) -> None:
    """Moves all that a cache holds to a device, in place, and ends offloading; a no-op where it is there already.

    Pooled groups are dropped unless they lie there.
    """
    if getattr(cache, "deferred", None) is not None:
        cache.deferred = cache.deferred.to(device)
    for index, layer in enumerate(cache.layers):
        moved = layer.keys.to(device) if layer.held else layer.keys
        if isinstance(layer, VideoXLOffloadedLayer) or moved is not layer.keys:
            cache.layers[index] = layer.fork()
            if moved is not layer.keys:
                cache.layers[index].set_content(moved, layer.values.to(device))
        if layer.held:
            cache.layers[index].forget_pooled(moved.device)


def offload_cache(cache: DynamicCache, device) -> None:
    """Gives a cache of one row layers that keep their content on the host and compute on `device`, in place."""
    for index, old in enumerate(cache.layers):
        layer = VideoXLOffloadedLayer(device)
        if old.held:
            layer.set_content(old.keys.cpu(), old.values.cpu())
            layer.near_start = layer.held
        layer._pooled = old._pooled
        cache.layers[index] = layer


def fork_cache(cache: DynamicCache, make_room=False) -> DynamicCache:
    """A cache with the same content that may be extended without changing the original (see the layers' `fork`)."""
    other = DynamicCache()
    other.__dict__.update(cache.__dict__)
    other.layers = [layer.fork(make_room) for layer in cache.layers]
    return other


def stack_caches(cache: DynamicCache, rows: list[DynamicCache], length: int) -> None:
    """Stacks single-row caches into `cache`, in place, padded on the left with zeros; `length` counts all padding."""
    cache.layers = []
    for layers in zip(*(row.layers for row in rows), strict=True):
        held = [layer.held for layer in layers]
        stacked = VideoXLCacheLayer()
        pair = []
        for name in ("keys", "values"):
            states = [getattr(layer, name) for layer in layers]
            batch = states[0].new_zeros((len(rows), states[0].shape[1], max(held), states[0].shape[3]))
            for row, content in enumerate(states):
                batch[row, :, max(held) - content.shape[2] :] = content[0]
            pair.append(batch)
        stacked.set_content(*pair)
        stacked.hidden = length - max(held)
        device = pair[0].device
        stacked.row_padding = torch.tensor([max(held) - count for count in held], device=device)
        shifts = [torch.zeros(1, dtype=torch.long) if layer.row_shift is None else layer.row_shift for layer in layers]
        stacked.row_shift = torch.cat([shift.to(device) for shift in shifts])
        cache.layers.append(stacked)
    cache.layer_class_to_replicate = None
