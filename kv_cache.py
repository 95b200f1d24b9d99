"""What is kept of a sequence: one cache class with typed state, its layers, and how they fork, move, mix and grow.

What is surprising:
* A layer appends into a buffer with spare room, so a long prefill does not copy the whole cache for every chunk, as
  `torch.cat` does. `fork` shares the buffer with any number of followers. Whoever holds the most tokens of it may
  append in place, so one question at a time copies nothing; any other copies at its first write.
* A layer may hold fewer keys than tokens went by (pooled, compressed or dropped ones). `get_seq_length` is then the
  logical length that `generate` counts with, and `get_mask_sizes` puts the keys that are left at the end of it.
* Keys are cached rotated. Moving one to another position is a rotation by the difference of the two angles; both
  angles are first rounded to float32, as the language model rounds them. Pooling needs un-rotated keys: the mean of
  rotated ones is no key at all.
* Rows that wait for a question have no keys yet, and count as tokens that went by: such a cache is as long as its
  sequence.
* transformers 5.24 renamed `past_key_values` to `cache`; `CACHE_NAME` is what the installed release calls it.

B batch, K key-value heads, L tokens in the layer, M tokens kept of them, D head size, G groups, N visual tokens a
group, n rows of the language model's width.
"""

import copy
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable
from inspect import signature
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers import Qwen2Model
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

# Spare room when a buffer has to grow: a share of what it holds, and at least this many tokens.
GROWTH = 0.25
MIN_SPARE_TOKENS = 256
# Tokens that are rotated at once in float32: bounds the temporary copies.
ROTATED_AT_ONCE = 65536

CACHE_NAMES = ("cache", "past_key_values")
# The first that the library's own models know; a release that knows neither is not supported, and says so at import.
CACHE_NAME = next(name for name in CACHE_NAMES if name in signature(Qwen2Model.forward).parameters)


class VideoXLCache(DynamicCache):
    """The key-values of one sequence, or of several padded on the left, and what else is known of it.

    Attributes:
        layout: Where the videos of the sequence are (`VisualLayout`); None before the first token, and of several.
        policy: How its tokens are run (`SequencePolicy`); None before the first one.
        waiting: `WaitingRows` that run once the question is known, or None.
        progress: What the policy notes about a sequence that is under way, or None.
        choices: What became of each chunk for the question behind it (of several rows, of each); None without one.
    """

    def __init__(self, num_layers: int):
        # The base class's own would make layers on demand; `Cache` takes ready ones.
        Cache.__init__(self, layers=[VideoXLCacheLayer() for _ in range(num_layers)])
        self._forget()

    @classmethod
    def adopt(cls, cache: Cache, num_layers: int) -> bool:
        """Makes a dynamic cache one of ours, in place: `generate` and callers hold it by names of their own.

        Returns:
            False, with nothing changed, if it is of a kind whose layers are its own (static, quantised, offloaded).
        """
        if isinstance(cache, cls):
            return True
        filled = cache.layers
        if type(cache) is not DynamicCache or cache.offloading or any(type(x) is not DynamicLayer for x in filled):
            return False
        cache.__class__ = cls
        cls.__init__(cache, num_layers)
        for layer, old in zip(cache.layers, filled, strict=False):
            if old.get_seq_length():
                layer.set_content(old.keys, old.values)
        return True

    @property
    def held(self) -> int:
        """Keys in the first layer."""
        return self.layers[0].held

    @property
    def rows(self) -> int:
        """Sequences; one as long as it is empty."""
        return self.layers[0].rows

    @property
    def store(self) -> str | None:
        """In what the key-values of earlier visual tokens are packed; None for the model's precision."""
        return self.layers[0].store

    @property
    def nbytes(self) -> int:
        """Bytes of the key-values and of the rows that wait."""
        return sum(layer.nbytes for layer in self.layers) + (0 if self.waiting is None else self.waiting.nbytes)

    def fork(self, make_room=False) -> "VideoXLCache":
        """A cache with the same content that may be extended without changing this one (see the layers' `fork`)."""
        other = copy.copy(self)
        other.layers = [layer.fork(make_room) for layer in self.layers]
        return other

    def reset(self) -> None:
        super().reset()
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if not self.get_seq_length():
            self._forget()

    def _forget(self) -> None:
        self.layout = self.policy = self.waiting = self.progress = self.choices = None

    def wait(self, rows: torch.Tensor) -> None:
        """Appends rows [n, hidden] to those that wait for the question."""
        self.waiting = (self.waiting or WaitingRows()).then(rows)
        for layer in self.layers:
            layer.pass_by(len(rows))

    def rewind(self, length: int, held: int) -> None:
        """Goes back to a length at which the layers of a cache of one row held `held` keys."""
        if self.waiting is not None:
            self.waiting = self.waiting.until(length)
        for layer in self.layers:
            layer.rewind(length, held)

    def snapshot(self, held: int) -> Callable[[], None]:
        """A function that brings a cache of one row back to what it is now, whatever became of it meanwhile.

        Costs a copy of the keys and values behind the first `held` ones, to which the cache may be rewound meanwhile.
        """
        state, layers = dict(self.__dict__), list(self.layers)
        restored = [layer.snapshot(held) for layer in layers]

        def restore() -> None:
            for restore_layer in restored:
                restore_layer()
            self.__dict__.update(state)
            self.layers[:] = layers

        return restore

    def move(self, device) -> None:
        """Moves all that it holds to a device, and ends offloading; drops pooled groups that lie elsewhere."""
        self.waiting = None if self.waiting is None else self.waiting.to(device)
        self.layers[:] = [layer.at(device) for layer in self.layers]

    def unpack(self, device) -> None:
        """Gets layers with all key-values on a device and in full precision."""
        self.layers[:] = [layer.unpacked(device) for layer in self.layers]

    def stack(self, rows: "list[VideoXLCache]", length: int) -> None:
        """Becomes the caches of several single rows, padded on the left with zeros; `length` counts all padding."""
        self.layers[:] = [_stacked(layers, length) for layers in zip(*(row.layers for row in rows), strict=True)]
        self.layout, self.waiting = None, None
        self.policy = next((row.policy for row in rows if row.progress is not None), rows[0].policy)
        self.progress = next((row.progress for row in rows if row.progress is not None), None)
        self.choices = [row.choices for row in rows]


def _stacked(layers, length: int) -> "VideoXLCacheLayer":
    held, stacked = [layer.held for layer in layers], VideoXLCacheLayer()
    padding = [max(held) - count for count in held]

    def stack(states):
        return torch.cat([F.pad(row, (0, 0, count, 0)) for row, count in zip(states, padding, strict=True)])

    stacked.set_content(stack(layer.keys for layer in layers), stack(layer.values for layer in layers))
    stacked.hidden, device = length - max(held), stacked.keys.device
    stacked.row_padding = torch.tensor(padding, device=device)
    shifts = [torch.zeros(1, dtype=torch.long) if layer.row_shift is None else layer.row_shift for layer in layers]
    stacked.row_shift = torch.cat([shift.to(device) for shift in shifts])
    return stacked


class WaitingRows:
    """Rows of a sequence that will run through the language model once the question is known.

    A value: its methods give another one. `rows[start:stop]` gives [n, hidden]; `begin` is the first row's position.
    """

    def __init__(self, parts: tuple[torch.Tensor, ...] = (), begin: int = 0):
        self.parts, self.begin = parts, begin
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, wanted: slice) -> torch.Tensor:
        start, stop, _ = wanted.indices(len(self))
        return torch.cat(self._cut(start, stop))

    def _cut(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        begins = [0, *self.ends]
        first = bisect_right(self.ends, start)
        found = zip(begins[first:], self.parts[first:], strict=False)
        return tuple(part[max(start - begin, 0) : stop - begin] for begin, part in found if begin < stop)

    def then(self, rows: torch.Tensor) -> "WaitingRows":
        """These rows followed by [n, hidden] others."""
        return WaitingRows((*self.parts, rows), self.begin)

    def until(self, length: int) -> "WaitingRows":
        """These rows up to the position `length` of their sequence."""
        return WaitingRows(self._cut(0, length - self.begin), self.begin)

    def since(self, start: int) -> "WaitingRows":
        """The rows from `start` on."""
        return WaitingRows(self._cut(start, len(self)))

    def select(self, places: torch.Tensor) -> "WaitingRows":
        """The rows at some places, ascending."""
        begins = [0, *self.ends]
        bounds = torch.searchsorted(places, torch.tensor(begins)).tolist()
        pieces = zip(begins, self.parts, bounds, bounds[1:], strict=False)
        chosen = (part.index_select(0, (places[a:b] - begin).to(part.device)) for begin, part, a, b in pieces)
        return WaitingRows(tuple(chosen), self.begin)

    def to(self, device) -> "WaitingRows":
        """The rows on a device."""
        return WaitingRows(tuple(part.to(device) for part in self.parts), self.begin)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        return sum(part.nbytes for part in self.parts)


class _Room:
    """Buffers that a layer and its forks share. Whoever holds the most tokens may append in place; the others copy."""

    def __init__(self, buffers: tuple[torch.Tensor, torch.Tensor]):
        self.buffers = buffers
        self.ends: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # living layer -> tokens it looks at
        self._lock = threading.Lock()  # two questions may be asked from two threads

    def claim(self, layer, length: int, end: int) -> bool:
        """Whether nobody else looks at tokens from `length` on; if so, they are `layer`'s up to `end` now."""
        with self._lock:
            if any(tokens > length for other, tokens in self.ends.items() if other is not layer):
                return False
            self.ends[layer] = end
            return True

    def set_end(self, layer, end: int | None) -> None:
        """Notes how many tokens a layer looks at; None if it left."""
        with self._lock:
            self.ends.pop(layer, None)
            if end is not None:
                self.ends[layer] = end

    def __deepcopy__(self, memo):
        return None  # a copied layer makes its own at its first write


class VideoXLCacheLayer(DynamicLayer):
    """A `DynamicLayer` whose keys and values [B, K, M, D] are views of buffers with spare room.

    Attributes:
        hidden: Tokens that went by but have no key of their own here: logical length minus held keys.
        row_padding: [B] keys at the start of each row that are padding, or None.
        row_shift: [B] by how much the positions of what follows are smaller than counted, or None.
    """

    is_offloaded = False
    store = None

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = 0
        self.row_padding = self.row_shift = self._room = None
        self._view = None  # `keys`, while they are a view of the room's buffer
        self._sole = False  # whether nobody else may write behind them, so that no claim is needed
        self._reserved = 0
        self._pooled: dict = {}  # pool size -> pooled groups; shared by forks until either one's content changes

    @property
    def held(self) -> int:
        """Keys in the layer."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    @property
    def rows(self) -> int:
        """Sequences in the layer; one as long as it is empty."""
        return self.keys.shape[0] if self.is_initialized and self.keys.numel() else 1

    def get_seq_length(self) -> int:
        return self.held + self.hidden

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.hidden

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # override: append in place instead of concatenating. Autocast rotates keys into float32 and leaves values as
        # they are; a layer keeps both in one dtype, that of its first values.
        dtype = self.keys.dtype if self.held else value_states.dtype
        key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._leave_room()
            self._pooled = {}
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, added = self.held, key_states.shape[-2]
        if length and self.keys.device != key_states.device:
            # The language model's layers may lie on several devices, and what was moved or loaded on one.
            self.set_content(self.keys.to(key_states.device), self.values.to(key_states.device))
        if not (self._has_room(length + added) and (self._sole or self._room.claim(self, length, length + added))):
            self._grow(key_states, value_states, length, added)
        self._sole = True
        for buffer, states in zip(self._room.buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + added] = states
        self._look_at(length + added)
        self._pooled = {}
        return self.keys, self.values

    def _look_at(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._room.buffers)
        self._view = self.keys

    def reserve(self, tokens: int) -> None:
        """Makes the next growth leave room for `tokens` in all, so that a known length is allocated once."""
        self._reserved = max(self._reserved, tokens)

    def crop(self, tokens_to_remove: int) -> None:
        # override: 5.17 reads a positive number as the length to keep; and the buffer stays behind the shortened view
        tokens = int(tokens_to_remove)
        removed = self.get_seq_length() - tokens if tokens > 0 else -tokens
        if removed > 0 and self.is_initialized:
            keep = max(self.held - removed, 0)
            in_room = self._has_room(0)
            self.keys, self.values = self.keys[..., :keep, :], self.values[..., :keep, :]
            self._pooled = {}
            if in_room:
                self._view, self._sole = self.keys, False  # forks may look at what is behind
                self._room.set_end(self, keep)

    def keep_of_last(self, count: int, kept: torch.Tensor, tokens: int, inv_freq: torch.Tensor) -> None:
        """Of the last `count` keys of a layer of one row, keeps some and moves them up behind the earlier ones.

        Args:
            count: Keys to choose from; they stand at the positions of their places.
            kept: [b] which of them to keep, ascending.
            tokens: Tokens that they stand for: from now on `tokens - b` more went by without a key of their own.
            inv_freq: [D / 2] rotary frequencies.
        """
        before, kept = self.held - count, kept.to(self.keys.device)
        places = torch.arange(before, before + len(kept), device=kept.device)
        keys, values = (states[:, :, before:].index_select(2, kept) for states in (self.keys, self.values))
        self.crop(-count)
        self.update(rotate(keys, kept + before, places, inv_freq).to(keys.dtype), values)
        self.pass_by(tokens - len(kept))

    def pass_by(self, tokens: int) -> None:
        """Counts tokens that have no key here, and that take no positions either."""
        if tokens:
            self.hidden += tokens
            self.row_shift = torch.tensor([tokens]) if self.row_shift is None else self.row_shift + tokens

    def rewind(self, length: int, held: int) -> None:
        """Goes back to a length at which `held` keys, or all of fewer, were here (one row without padding)."""
        held = min(held, self.held)
        if self.held > held:
            self.crop(held - self.held)
        self.hidden = length - held
        self.row_shift = torch.tensor([self.hidden]) if self.hidden else None

    def reset(self) -> None:
        # override: 5.17 writes zeros into the views, behind which forks have their keys, too, and keeps their length
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()
        self.hidden, self.row_padding, self.row_shift = 0, None, None
        self._leave_room()
        self._pooled = {}

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

    def fork(self, make_room=False) -> "VideoXLCacheLayer":
        """A layer with the same content that may be extended without changing this one; see `make_room`."""
        if make_room:
            self.make_room(MIN_SPARE_TOKENS)
        other = VideoXLCacheLayer()
        other.set_content(self.keys, self.values)
        if self._has_room(self.held):
            other._room, other._view, self._sole = self._room, self.keys, False
            for layer in (self, other):
                self._room.set_end(layer, self.held)
        other.hidden, other.row_padding, other.row_shift = self.hidden, self.row_padding, self.row_shift
        other._pooled = self._pooled
        return other

    def works_on(self, device) -> bool:
        """Whether it leaves what it computes with on a device, whatever else it holds elsewhere."""
        return False

    def at(self, device) -> "VideoXLCacheLayer":
        """This layer on a device, not offloaded: itself if it is so, without pooled groups that lie elsewhere."""
        moved, layer = self.keys.to(device) if self.held else self.keys, self
        if self.is_offloaded or moved is not self.keys:
            layer = self.fork()
            if moved is not self.keys:
                layer.set_content(moved, self.values.to(device))
        if self.held:
            layer.forget_pooled(moved.device)
        return layer

    def unpacked(self, device) -> "VideoXLCacheLayer":
        """This layer on a device and in full precision."""
        return self.at(device)

    def all_keys(self) -> torch.Tensor:
        """The keys of every token, rotated, wherever they lie."""
        return self.keys

    def state(self) -> dict[str, torch.Tensor]:
        """What a file holds of it, by name."""
        return {"keys": self.keys, "values": self.values} if self.held else {}

    def make_room(self, tokens: int) -> None:
        """Sees to it that so many more keys can be appended without copying, if need be by one copy of this layer."""
        length = self.held
        if length and not self._has_room(length + tokens):
            self._grow(self.keys, self.values, length, tokens)
            self._look_at(length)

    def snapshot(self, held: int) -> Callable[[], None]:
        """As the cache's; only the keys behind the first `held` ones are copied, and restoring allocates nothing."""
        state = dict(self.__dict__)
        behind = [states[:, :, held:].clone() for states in (self.keys, self.values)] if self.held > held else ()

        def restore() -> None:
            self._leave_room()
            self.__dict__.update(state)
            self._sole = False  # there may be forks meanwhile
            if self._has_room(self.held):  # other content is never written over
                self._room.set_end(self, self.held)
                for states, kept in zip((self.keys, self.values), behind, strict=False):
                    states[:, :, held:] = kept

        return restore

    def set_content(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Takes over keys and values [B, K, L, D] as they are."""
        self._leave_room()
        self.keys, self.values = keys, values
        self.is_initialized = keys is not None
        if self.is_initialized:
            self.dtype, self.device = keys.dtype, keys.device

    def read(self, places, positions, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at [n] places of a layer that holds every token, on the device of `inv_freq` [D / 2].

        The keys come rotated to other positions [n], or (None) un-rotated, in float32; as they are where `positions`
        is `places` itself.
        """
        taken = (states.index_select(2, places.to(states.device)) for states in (self.keys, self.values))
        keys, values = (states.to(inv_freq.device) for states in taken)
        return keys if positions is places else rotate(keys, places, positions, inv_freq), values

    def pooled_groups(self, groups, pool_size: int, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Un-rotated pooled keys and pooled values of groups of visual tokens, computed once per video and device.

        Args:
            groups: (start, stop) of each group's N visual tokens, in a layer that holds every token.
            pool_size: Kernel and stride of the pooling; a remainder of N is dropped.
            inv_freq: [D / 2] rotary frequencies.

        Returns:
            Keys and values on the device of `inv_freq`, each [1, K, G, N // pool_size, D].
        """
        if pool_size not in self._pooled or self._pooled[pool_size][0].device != inv_freq.device:
            pooled, size = ([], []), groups[0][1] - groups[0][0]
            used, at_once = size // pool_size * pool_size, max(ROTATED_AT_ONCE // size, 1)
            for first in range(0, len(groups), at_once):
                starts = torch.tensor([start for start, _ in groups[first : first + at_once]])
                places = (starts[:, None] + torch.arange(used)).flatten()
                for target, states in zip(pooled, self.read(places, None, inv_freq), strict=True):
                    target.append(states.float().unflatten(2, (len(starts), used // pool_size, pool_size)).mean(4))
            self._pooled[pool_size] = tuple(torch.cat(parts, dim=2).to(self.keys.dtype) for parts in pooled)
        return self._pooled[pool_size]

    def forget_pooled(self, device) -> None:
        """Drops pooled groups that lie on other devices; they are computed anew where they are asked for."""
        kept = {size: pooled for size, pooled in self._pooled.items() if pooled[0].device == device}
        if len(kept) < len(self._pooled):
            self._pooled = kept  # forks keep theirs

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values; of pooled groups nothing is counted."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def _has_room(self, tokens: int) -> bool:
        # Any method of the base class that replaces `keys` (reordering, repeating, moving) leaves the buffer behind.
        return self._room is not None and self.keys is self._view and self._room.buffers[0].shape[2] >= tokens

    def _grow(self, key_states, value_states, length, added) -> None:
        spare = max(int(GROWTH * (length + added)), MIN_SPARE_TOKENS)
        capacity = max(length + added + spare, self._reserved)
        # Buffers must stay writable outside inference mode, where a later question may be asked.
        with torch.inference_mode(False), torch.no_grad():
            buffers = tuple(
                torch.empty((*states.shape[:2], capacity, states.shape[3]), dtype=states.dtype, device=states.device)
                for states in (key_states, value_states)
            )
            for buffer, previous in zip(buffers, (self.keys, self.values) * (length > 0), strict=False):
                buffer[:, :, :length] = previous
        self._leave_room()
        self._room = _Room(buffers)
        self._room.set_end(self, length + added)

    def _leave_room(self) -> None:
        if self._room is not None:
            self._room.set_end(self, None)
        self._room, self._view, self._sole = None, None, False


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
