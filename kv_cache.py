"""What is kept: key-value layers that grow in place and can be shared between questions.

What is surprising:
* A layer appends into a buffer with spare room, so a long prefill does not copy the whole cache for every chunk, as
  `torch.cat` does.
* `fork` shares the tensors of a finished layer with any number of followers; a follower copies them at its first write. So
  one encoded video serves many questions, and none of them can change it.

B batch, K key-value heads, L tokens in the layer, D head size.
"""

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

# Spare room when a buffer has to grow: a share of what it holds, and at least this many tokens.
GROWTH = 0.25
MIN_SPARE_TOKENS = 256


class VideoXLCacheLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values [B, K, L, D] are views of buffers with spare room."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._reserved = 0
        self._shared = 0  # tokens that a fork may be looking at: never overwritten in place

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # override: append in place instead of concatenating
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, added = self.get_seq_length(), key_states.shape[-2]
        if length < self._shared or not self._has_room(length + added):
            self._grow(key_states, value_states, length, added)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + added] = states
        self.keys, self.values = (buffer[:, :, : length + added] for buffer in self._buffers)
        return self.keys, self.values

    def reserve(self, tokens: int) -> None:
        """Makes the next growth leave room for `tokens` in all, so that a known length is allocated once."""
        self._reserved = tokens

    def crop(self, tokens_to_remove: int) -> None:
        # override: 5.17 reads a positive number as the length to keep; and the buffer stays behind the shortened view
        tokens = int(tokens_to_remove)
        removed = self.get_seq_length() - tokens if tokens > 0 else -tokens
        if removed > 0 and self.is_initialized:
            keep = max(self.get_seq_length() - removed, 0)
            self.keys, self.values = self.keys[..., :keep, :], self.values[..., :keep, :]

    def fork(self) -> "VideoXLCacheLayer":
        """A layer with the same content that copies it at its first write."""
        self._shared = max(self._shared, self.get_seq_length())
        other = VideoXLCacheLayer()
        other.dtype, other.device = getattr(self, "dtype", None), getattr(self, "device", None)
        other.keys, other.values, other.is_initialized = self.keys, self.values, self.is_initialized
        return other

    def _has_room(self, tokens: int) -> bool:
        # Any method of the base class that replaces `keys` (reordering, repeating, moving) leaves the buffer behind.
        if self._buffers is None or self.keys.numel() == 0:
            return self._buffers is not None and self._buffers[0].shape[2] >= tokens
        same = self.keys.data_ptr() == self._buffers[0].data_ptr() and self.keys.shape[0] == self._buffers[0].shape[0]
        return same and self._buffers[0].shape[2] >= tokens

    def _grow(self, key_states, value_states, length, added) -> None:
        spare = max(int(GROWTH * (length + added)), MIN_SPARE_TOKENS)
        capacity = max(length + added + spare, self._reserved)
        old = (self.keys, self.values)
        buffers = []
        # Buffers must stay writable outside inference mode, where a later question may be asked.
        with torch.inference_mode(False), torch.no_grad():
            for states, previous in zip((key_states, value_states), old, strict=True):
                shape = (states.shape[0], states.shape[1], capacity, states.shape[3])
                buffer = torch.empty(shape, dtype=states.dtype, device=states.device)
                if length:
                    buffer[:, :, :length] = previous
                buffers.append(buffer)
        self._buffers, self._shared = tuple(buffers), 0


def own_layers(cache: DynamicCache, num_layers: int) -> bool:
    """Replaces the layers of a dynamic cache by ours, in place, keeping what they hold.

    Returns:
        False, with nothing changed, if the cache is of a kind whose layers cannot be replaced (static, quantised,
        offloaded).
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    if any(type(layer) not in (DynamicLayer, VideoXLCacheLayer) for layer in cache.layers):
        return False
    layers = []
    for index in range(num_layers):
        old = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(old, VideoXLCacheLayer):
            layers.append(old)
            continue
        layer = VideoXLCacheLayer()
        if old is not None and old.get_seq_length():
            layer.dtype, layer.device = old.dtype, old.device
            layer.keys, layer.values, layer.is_initialized = old.keys, old.values, True
        layers.append(layer)
    cache.layers = layers
    cache.layer_class_to_replicate = None
    return True


def new_cache(num_layers: int) -> DynamicCache:
    """An empty cache with our layers."""
    cache = DynamicCache()
    own_layers(cache, num_layers)
    return cache


def fork_cache(cache: DynamicCache) -> DynamicCache:
    """A cache with the same content that may be extended without changing the original."""
    other = DynamicCache()
    other.layers = [layer.fork() for layer in cache.layers]
    other.layer_class_to_replicate = None
    return other


def stack_caches(caches: list[DynamicCache]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Stacks single-row caches of any lengths into one batch, padded on the left with zeros.

    Returns:
        Per layer, keys and values [B, K, max L, D].
    """
    length = max(cache.get_seq_length() for cache in caches)
    stacked = []
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        pair = []
        for name in ("keys", "values"):
            rows = [getattr(layer, name) for layer in layers]
            batch = rows[0].new_zeros((len(rows), rows[0].shape[1], length, rows[0].shape[3]))
            for row, states in enumerate(rows):
                batch[row, :, length - states.shape[2] :] = states[0]
            pair.append(batch)
        stacked.append(tuple(pair))
    return stacked
