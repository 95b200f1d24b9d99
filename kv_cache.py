"""What is kept: key-value layers that grow in place, are shared between questions, and may hold pooled keys and
values.

What is surprising:
* A layer appends into a buffer with spare room, so a long prefill does not copy the whole cache for every chunk, as
  `torch.cat` does. `fork` shares the tensors with any number of followers. One follower at a time also borrows the
  spare room behind them, so a question usually copies nothing; any other copies at its first write.
* A layer may hold fewer keys than tokens went by (pooled or dropped ones). `get_seq_length` is then the logical
  length that `generate` counts with, and `get_mask_sizes` puts the keys that are left at the end of it.
* Keys are cached rotated. Moving one to another position is a rotation by the difference of the two angles; both
  angles are first rounded to float32, as the language model rounds them. Pooling needs un-rotated keys: the mean of
  rotated ones is no key at all.

B batch, K key-value heads, L tokens in the layer, M tokens kept of them, D head size, G groups, N visual tokens a
group.
"""

import weakref
from typing import NamedTuple

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

# Spare room when a buffer has to grow: a share of what it holds, and at least this many tokens.
GROWTH = 0.25
MIN_SPARE_TOKENS = 256
# Tokens that are rotated at once in float32: bounds the temporary copies.
ROTATED_AT_ONCE = 65536


class VideoXLCacheLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values [B, K, M, D] are views of buffers with spare room.

    Attributes:
        hidden: Tokens that went by but have no key of their own here: logical length minus held keys.
        row_padding: [B] keys at the start of each row that are padding, or None.
        row_shift: [B] by how much the positions of what follows are smaller than counted, or None.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = 0
        self.row_padding: torch.Tensor | None = None
        self.row_shift: torch.Tensor | None = None
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._reserved = 0
        self._shared = 0  # tokens that a fork may be looking at: never overwritten in place
        self._borrower = None  # weak reference to the fork that writes into the spare room
        self._pooled: dict = {}  # pool size -> pooled groups, shared with forks

    @property
    def held(self) -> int:
        """Keys in the layer."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    def get_seq_length(self) -> int:
        return self.held + self.hidden

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.hidden

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # override: append in place instead of concatenating
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, added = self.held, key_states.shape[-2]
        lent = self._borrower is not None and self._borrower() is not None
        if lent or length < self._shared or not self._has_room(length + added):
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
            keep = max(self.held - removed, 0)
            self.keys, self.values = self.keys[..., :keep, :], self.values[..., :keep, :]
            self._pooled = {}

    def reset(self) -> None:
        super().reset()
        self.hidden, self.row_padding, self.row_shift = 0, None, None
        self._buffers, self._shared, self._borrower, self._pooled = None, 0, None, {}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, function) -> None:
        self.row_padding = None if self.row_padding is None else function(self.row_padding)
        self.row_shift = None if self.row_shift is None else function(self.row_shift)

    def fork(self) -> "VideoXLCacheLayer":
        """A layer with the same content that may be extended without changing this one."""
        self._shared = max(self._shared, self.held)
        other = VideoXLCacheLayer()
        other.set_content(self.keys, self.values)
        if (self._borrower is None or self._borrower() is None) and self._has_room(self.held):
            other._buffers, other._shared = self._buffers, self.held
            self._borrower = weakref.ref(other)
        other.hidden, other.row_padding, other.row_shift = self.hidden, self.row_padding, self.row_shift
        other._pooled = self._pooled
        return other

    def set_content(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Takes over keys and values [B, K, L, D] as they are."""
        self.keys, self.values, self._buffers = keys, values, None
        self.is_initialized = keys is not None
        if self.is_initialized:
            self.dtype, self.device = keys.dtype, keys.device

    def pooled_groups(self, groups, pool_size: int, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Un-rotated pooled keys and pooled values of groups of visual tokens, computed once per video.

        Args:
            groups: (start, stop) of each group's visual tokens, all of one length N, in a layer that holds every
                token.
            pool_size: Kernel and stride of the pooling; a remainder of N is dropped.
            inv_freq: [D / 2] rotary frequencies.

        Returns:
            Keys and values on the device of `inv_freq`, each [1, K, G, N // pool_size, D].
        """
        if pool_size not in self._pooled or self._pooled[pool_size][0] != len(groups):
            pooled = ([], [])
            size = groups[0][1] - groups[0][0]
            used = size // pool_size * pool_size
            at_once = max(ROTATED_AT_ONCE // size, 1)
            for first in range(0, len(groups), at_once):
                starts = torch.tensor([start for start, _ in groups[first : first + at_once]], device=self.keys.device)
                positions = (starts[:, None] + torch.arange(used, device=starts.device)).flatten()
                taken = (states.index_select(2, positions).to(inv_freq.device) for states in (self.keys, self.values))
                keys, values = taken
                for target, states in zip(pooled, (rotate(keys, positions, None, inv_freq), values), strict=True):
                    target.append(states.float().unflatten(2, (len(starts), used // pool_size, pool_size)).mean(4))
            keys, values = (torch.cat(parts, dim=2).to(self.keys.dtype) for parts in pooled)
            self._pooled[pool_size] = (len(groups), keys, values)
        return self._pooled[pool_size][1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values and of what was pooled from them."""
        pooled = sum(keys.nbytes + values.nbytes for _, keys, values in self._pooled.values())
        return self.keys.nbytes + self.values.nbytes + pooled if self.is_initialized else 0

    def _has_room(self, tokens: int) -> bool:
        # Any method of the base class that replaces `keys` (reordering, repeating, moving) leaves the buffer behind.
        if self._buffers is None or self._buffers[0].shape[2] < tokens:
            return False
        same = self.keys.data_ptr() == self._buffers[0].data_ptr() and self.keys.shape[0] == self._buffers[0].shape[0]
        return same or self.held == 0

    def _grow(self, key_states, value_states, length, added) -> None:
        spare = max(int(GROWTH * (length + added)), MIN_SPARE_TOKENS)
        capacity = max(length + added + spare, self._reserved)
        buffers = []
        # Buffers must stay writable outside inference mode, where a later question may be asked.
        with torch.inference_mode(False), torch.no_grad():
            for states, previous in ((key_states, self.keys), (value_states, self.values)):
                shape = (states.shape[0], states.shape[1], capacity, states.shape[3])
                buffer = torch.empty(shape, dtype=states.dtype, device=states.device)
                if length:
                    buffer[:, :, :length] = previous
                buffers.append(buffer)
        self._buffers, self._shared, self._borrower = tuple(buffers), 0, None


class VideoXLOffloadedLayer(VideoXLCacheLayer):
    """A layer of one row whose content lives in host memory; the device holds what the next chunks see.

    `keys` and `values` are the whole content on the host, so saving, pooling and forking go on as ever. On the device
    are the positions from `near_start` on, and copies of text and timestamps before it. A step of attention that
    wants more gets the
    whole layer for a moment: text after a video, and timestamps in `mask` mode.
    """

    def __init__(self, device, **kwargs):
        super().__init__(**kwargs)
        self.near_start = 0
        self._home = torch.device(device)
        self._near: tuple[torch.Tensor, torch.Tensor] | None = None
        self._text: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # override: append on the host; what is returned covers the positions from `near_start` on
        super().update(key_states.cpu(), value_states.cpu())
        states = (key_states, value_states)
        if self._near is not None:
            states = tuple(torch.cat(pair, dim=2) for pair in zip(self._near, states, strict=True))
        self._near = states
        return states

    def retire(self, non_visual: torch.Tensor, keep_from: int) -> None:
        """Takes positions before `keep_from` off the device, except text and timestamps.

        Args:
            non_visual: Positions of text and timestamps in the whole sequence, ascending.
            keep_from: First position that later steps see in full.
        """
        keep_from = min(max(keep_from, self.near_start), self.held)
        if self._near is not None:
            gone = keep_from - self.near_start
            self._near = tuple(states[:, :, gone:].clone() for states in self._near)
        self.near_start = keep_from
        known = 0 if self._text is None else self._text[0].shape[2]
        wanted = non_visual[known : int(torch.searchsorted(non_visual, keep_from))].to(self.keys.device)
        fresh = tuple(states.index_select(2, wanted).to(self._home) for states in (self.keys, self.values))
        if self._text is not None:
            fresh = tuple(torch.cat(pair, dim=2) for pair in zip(self._text, fresh, strict=True))
        self._text = fresh

    def visible(self, step) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values on the device that the queries of an `AttentionStep` see."""
        gathered = 0 if step.gathered is None else len(step.gathered)
        known = 0 if self._text is None else self._text[0].shape[2]
        if step.window_start >= self.near_start and gathered <= known:
            window = slice(step.window_start - self.near_start, step.stop - self.near_start)
            parts = [states[:, :, window] for states in self._near]
            if gathered:
                parts = [torch.cat([t[:, :, :gathered], w], dim=2) for t, w in zip(self._text, parts, strict=True)]
            return tuple(parts)
        whole = self.whole(step.stop)
        if gathered == 0:
            return tuple(states[:, :, step.window_start :] for states in whole)
        index = torch.cat([step.gathered, torch.arange(step.window_start, step.stop)]).to(self._home)
        return tuple(states.index_select(2, index) for states in whole)

    def whole(self, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the positions before `stop`, on the device for the moment."""
        return tuple(states[:, :, :stop].to(self._home) for states in (self.keys, self.values))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        # The next `retire` and `update` start from the host's content.
        self.near_start, self._near, self._text = self.held, None, None


class KeptSpan(NamedTuple):
    """A run of tokens in a mixed cache: [start, stop) of the dense one, as it is or (`group`) that group pooled."""

    start: int
    stop: int
    group: int | None = None


def rotate(keys, old, new, inv_freq) -> torch.Tensor:
    """Moves rotated keys from positions `old` to `new`; None stands for not rotated.

    Args:
        keys: [B, K, L, D].
        old, new: [L] positions, any number type.
        inv_freq: [D / 2].

    Returns:
        [B, K, L, D] in float32.
    """
    inv_freq = inv_freq.to(keys.device, torch.float32)
    angle = 0.0
    for positions, sign in ((new, 1.0), (old, -1.0)):
        if positions is not None:
            angle = angle + sign * (positions.to(keys.device, torch.float32)[:, None] * inv_freq).double()
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = keys.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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
    dense_from, dense_to, pooled_from, pooled_to, cursor = [torch.arange(0)], [torch.arange(0)], [], [], 0
    for span in spans:
        kept = span.stop - span.start if span.group is None else size
        target = torch.arange(cursor, cursor + kept)
        if span.group is None:
            dense_from.append(torch.arange(span.start, span.stop))
            dense_to.append(target)
        else:
            pooled_from.append(span.group)
            pooled_to.append(target)
        cursor += kept
    device, home = inv_freq.device, cache.layers[0].keys.device
    dense_from, dense_to = torch.cat(dense_from), torch.cat(dense_to)
    stay = true_positions or torch.equal(dense_from, dense_to)
    dense_to = dense_to.to(device)
    pooled_from = torch.tensor(pooled_from, dtype=torch.long, device=device)
    pooled_to = torch.cat(pooled_to).to(device) if pooled_to else None
    mixed = DynamicCache()
    mixed.layers = []
    for layer in cache.layers:
        shape = (*layer.keys.shape[:2], cursor, layer.keys.shape[3])
        keys, values = (layer.keys.new_empty(shape, device=device) for _ in range(2))
        for begin in range(0, len(dense_from), ROTATED_AT_ONCE):
            part = slice(begin, begin + ROTATED_AT_ONCE)
            source, target = dense_from[part].to(home), dense_to[part]
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
    """Moves keys and values to a device, in place, and ends offloading; a no-op where they are there already."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, VideoXLOffloadedLayer) or (layer.held and layer.keys.device != torch.device(device)):
            cache.layers[index] = layer.fork()
            cache.layers[index].set_content(layer.keys.to(device), layer.values.to(device))


def offload_cache(cache: DynamicCache, device) -> None:
    """Gives a cache of one row layers that keep their content on the host and compute on `device`, in place."""
    for index, old in enumerate(cache.layers):
        layer = VideoXLOffloadedLayer(device)
        if old.held:
            layer.set_content(old.keys.cpu(), old.values.cpu())
            layer.near_start = layer.held
        layer._pooled = old._pooled
        cache.layers[index] = layer


def fork_cache(cache: DynamicCache) -> DynamicCache:
    """A cache with the same content that may be extended without changing the original."""
    other = DynamicCache()
    other.__dict__.update(cache.__dict__)
    other.layers = [layer.fork() for layer in cache.layers]
    return other


def stack_caches(cache: DynamicCache, rows: list[DynamicCache]) -> None:
    """Stacks single-row caches of any lengths into `cache`, in place, padded on the left with zeros."""
    held = [row.layers[0].held for row in rows]
    logical = max(row.get_seq_length() for row in rows)
    cache.layers = []
    for layers in zip(*(row.layers for row in rows), strict=True):
        stacked = VideoXLCacheLayer()
        pair = []
        for name in ("keys", "values"):
            states = [getattr(layer, name) for layer in layers]
            batch = states[0].new_zeros((len(rows), states[0].shape[1], max(held), states[0].shape[3]))
            for row, content in enumerate(states):
                batch[row, :, max(held) - content.shape[2] :] = content[0]
            pair.append(batch)
        stacked.set_content(*pair)
        stacked.hidden = logical - max(held)
        device = pair[0].device
        stacked.row_padding = torch.tensor([max(held) - count for count in held], device=device)
        shifts = [layer.row_shift for layer in layers]
        stacked.row_shift = torch.cat(
            [torch.zeros(1, dtype=torch.long, device=device) if s is None else s for s in shifts]
        )
        cache.layers.append(stacked)
    cache.layer_class_to_replicate = None
