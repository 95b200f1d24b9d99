"""Layers of the cache whose earlier content lies elsewhere: in host memory, or packed in 8 or 4 bits.

What is surprising:
* Prefill with a window reads text, timestamps and what its next chunks see. These stay as they are, on the device, so
  what runs into a packed cache comes out as if nothing were packed.
* Keys are packed as they were before their rotation, which is undone in float32. Rotated, a channel swings with the
  position, and the least and the largest value of a run say little about it.
* Keys and values are packed alike: each channel over `BLOCK_ROWS` visual rows, which span groups that are short.
  (On the bundled checkpoint values over a run of positions came out better than values over a token's channels, at
  half the cost in scales: `docs/measurements.md`.)
* A question reads nothing packed while it runs: what it keeps is unpacked before.

A sequence of text P, timestamps T and visual tokens V, packed (v) in blocks of four up to `near_start`:

    P T v v v T v T v v v T V V V T V V V
                            ^ near_start

K key-value heads, D head size, n rows, b blocks of rows.
"""

import copy

import torch

from .kv_cache import MIN_SPARE_TOKENS, VideoXLCache, VideoXLCacheLayer, rotate

# Bits of a number in each kind of store.
STORES = {"int8": 8, "int4": 4}
# Visual rows that share a step and a least value in each channel: a third of a bit a number.
BLOCK_ROWS = 96
# Rows that are packed or unpacked at once in float32: bounds the temporary copies. A multiple of `BLOCK_ROWS`.
ROWS_AT_ONCE = 80 * BLOCK_ROWS
# float16, in which steps and least values are kept: its relative spacing, and its smallest number.
HALF_SPACING, HALF_TINY = 2**-10, 2**-24


def require_store(store, policy) -> None:
    """Raises ValueError unless videos that are run by a policy can be packed so."""
    if store not in STORES:
        raise ValueError(f"store must be one of {', '.join(map(repr, STORES))}, or left out, got {store!r:.90}")
    if policy.text_only:
        raise ValueError(
            f"store={store!r} packs key-values of every visual token, and this video has others (beacons, a token "
            "selector's features, or hidden states of mm_llm_compress): leave store out, or encode it without these"
        )


def offload_cache(cache: VideoXLCache, device) -> None:
    """Gives a cache of one row layers that keep their content on the host and compute on `device`."""
    for index, layer in enumerate(cache.layers):
        if not layer.is_offloaded:
            cache.layers[index] = VideoXLOffloadedLayer.over(layer, device)


def pack_cache(cache: VideoXLCache, store: str, before: int, inv_freq, device, ragged=False) -> None:
    """Packs visual tokens of a cache of one row that holds every token; all of its layers, or none on an error.

    Args:
        store: One of `STORES`.
        before: The position up to which visual tokens are packed.
        inv_freq: [D / 2] rotary frequencies of the language model.
        device: Where prefill reads the rest.
        ragged: Also pack a last block of fewer rows, which later ones do not fill.
    """
    layers = []
    for layer in cache.layers:
        layer = layer.fork() if layer.store == store else VideoXLPackedLayer.over(layer, store, inv_freq, device)
        layer.pack(cache.layout.non_visual, before, ragged)
        layers.append(layer)
    cache.layers[:] = layers


def packed_bytes(rows: int, blocks: int, channels: int, store: str) -> int:
    """Bytes of `rows` packed visual tokens in `blocks` blocks, of `channels` keys and values together in a layer."""
    return rows * channels * STORES[store] // 8 + blocks * channels * 4


class VideoXLOffloadedLayer(VideoXLCacheLayer):
    """A layer of one row whose content lives in host memory; the device holds what the next chunks see.

    `keys` and `values` are the whole content on the host, so saving, pooling and forking go on as ever. On the device
    are the positions from `near_start` on, and copies of text and timestamps before it. A step of attention that
    wants more gets the whole layer for a moment: text after a video, and timestamps in `mask` mode.
    """

    is_offloaded = _on_host = True

    def __init__(self, device, **kwargs):
        super().__init__(**kwargs)
        self.near_start, self._home = 0, torch.device(device)
        self._near = self._text = None  # keys and values on the device

    def works_on(self, device):
        return self._home == torch.device(device)

    @classmethod
    def over(cls, layer: VideoXLCacheLayer, device) -> "VideoXLOffloadedLayer":
        """An offloaded layer with the content of another one."""
        offloaded = cls(device)
        if layer.held:
            offloaded.set_content(layer.keys.cpu(), layer.values.cpu())
            offloaded.near_start = layer.held
        offloaded._pooled = layer._pooled
        return offloaded

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        # override: append on the host; what is returned covers the positions from `near_start` on
        super().update(key_states.cpu(), value_states.cpu())
        self._near = _joined(self._near, (key_states, value_states))
        return self._near

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
        self._text = _joined(self._text, fresh)

    def visible(self, step) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values on the device that the queries of an `AttentionStep` see."""
        gathered = torch.zeros(0, dtype=torch.long) if step.gathered is None else step.gathered
        known = 0 if self._text is None else self._text[0].shape[2]
        # Packed layers know all text in front of `near_start`; others learn it when they retire what is near.
        if step.window_start >= self.near_start and (self.store is not None or len(gathered) <= known):
            window = slice(step.window_start - self.near_start, step.stop - self.near_start)
            parts = tuple(states[:, :, window] for states in self._near)
            if not len(gathered):
                return parts
            later = (gathered[known:] - self.near_start).to(self._near[0].device)
            text = _joined(self._text, tuple(states.index_select(2, later) for states in self._near))
            return _joined(text, parts)
        whole = self.whole(step.stop)
        if not len(gathered):
            return tuple(states[:, :, step.window_start :] for states in whole)
        window = torch.arange(step.window_start, step.stop, device=gathered.device)
        index = torch.cat([gathered, window]).to(self._home)
        return tuple(states.index_select(2, index) for states in whole)

    def whole(self, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of the positions before `stop`, on the device for the moment."""
        return tuple(states[:, :, :stop].to(self._home) for states in (self.keys, self.values))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        # The next `retire` and `update` start from the host's content.
        self.near_start, self._near, self._text = self.held, None, None


def _joined(earlier, later) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of adjacent runs of tokens; None stands for no earlier ones."""
    return later if earlier is None else tuple(torch.cat(pair, dim=2) for pair in zip(earlier, later, strict=True))


class PackedRows:
    """Rows of keys and values, [2 K, n, D], in few bits. A value: its methods give another one.

    Attributes:
        codes: [2 K, n, D] uint8; with 4 bits [2 K, n, D / 2], the second half of the channels in the upper bits.
        scales: [2, 2 K, b, D] float16, per block and channel the least value and the step.
        edges: [b] each block's first row, on the host.
    """

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, edges: torch.Tensor, bits: int):
        self.codes, self.scales, self.edges, self.bits = codes, scales, edges, bits

    @classmethod
    def pack(cls, states: torch.Tensor, bits: int) -> "PackedRows":
        """Packs [2 K, n, D] float32, whole blocks and maybe a shorter last one; errors are half a step at most.

        Raises:
            ValueError: If a value is no number, or so large that float16 cannot hold a scale.
        """
        whole, levels = states.shape[1] // BLOCK_ROWS * BLOCK_ROWS, 2**bits - 1
        parts, codes, scales = [states[:, :whole].unflatten(1, (-1, BLOCK_ROWS)), states[:, None, whole:]], [], []
        for part in (part for part in parts if part.numel()):
            least, most = part.aminmax(dim=2)
            # Rounded so that the grid always reaches from the least to the largest value.
            least = (least - least.abs() * HALF_SPACING - HALF_TINY).half()
            step = ((most - least.float()) / levels * (1 + HALF_SPACING) + HALF_TINY).half()
            scales.append(torch.stack([least, step]))
            least, step = (scale.float().unsqueeze(2) for scale in scales[-1])
            codes.append(((part - least) / step).round_().clamp_(0, levels).to(torch.uint8).flatten(1, 2))
        codes, scales = torch.cat(codes, dim=1), torch.cat(scales, dim=2)
        if not scales.isfinite().all():
            raise ValueError("key-values that are no numbers, or beyond 65,504, cannot be packed: leave store out")
        if bits == 4:
            low, high = codes.chunk(2, dim=-1)
            codes = low | high << 4
        return cls(codes, scales, torch.arange(0, states.shape[1], BLOCK_ROWS), bits)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def __len__(self) -> int:
        return self.codes.shape[1]

    def then(self, other: "PackedRows") -> "PackedRows":
        """These rows followed by others; the others begin a new block."""
        pairs = (self.codes, other.codes, 1), (self.scales, other.scales, 2), (self.edges, other.edges + len(self), 0)
        return PackedRows(*(torch.cat(pair[:2], dim=pair[2]) for pair in pairs), self.bits)

    def to(self, device) -> "PackedRows":
        """The rows on a device."""
        return PackedRows(self.codes.to(device), self.scales.to(device), self.edges, self.bits)

    def read(self, rows: torch.Tensor, device) -> torch.Tensor:
        """Some rows [m], ascending, as [2 K, m, D] float32 on a device: packed they travel there, and are unpacked."""
        block = torch.bucketize(rows, self.edges, right=True) - 1
        used, block = block.unique_consecutive(return_inverse=True)
        codes = self.codes.index_select(1, rows.to(self.codes.device)).to(device)
        scales = self.scales.index_select(2, used.to(self.scales.device)).to(device).float()
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        least, step = (scale.index_select(1, block.to(device)) for scale in scales)
        return codes.float().mul_(step).add_(least)


class VideoXLPackedLayer(VideoXLOffloadedLayer):
    """A layer of one row whose visual tokens before `near_start` are packed; what a question sees is unpacked for it.

    `keys` and `values` are those from `near_start` on. Tensors are replaced, never written into, so that forks and
    snapshots share them. On the way through attention it serves as the offloaded layer does.
    """

    def __init__(self, store: str, inv_freq: torch.Tensor, device, on_host=False):
        super().__init__(device)
        self.store, self._inv_freq, self._on_host = store, inv_freq, on_host
        self._packed, self._stamps = None, torch.zeros(0, dtype=torch.long)  # places of text before `near_start`

    @classmethod
    def over(cls, layer: VideoXLCacheLayer, store: str, inv_freq, device) -> "VideoXLPackedLayer":
        """A layer with another one's content, nothing packed yet; an offloaded one packs on the host."""
        packed = cls(store, inv_freq.to(device), device, layer.is_offloaded and layer._on_host)
        if layer.held:
            layer = layer.unpacked("cpu" if packed._on_host else device)
            packed._hold(layer.keys, layer.values)
        return packed

    def _hold(self, keys, values) -> None:
        self.keys, self.values = self._near = keys, values
        self.is_initialized, self.dtype, self.device, self._pooled = True, keys.dtype, keys.device, {}

    @property
    def held(self) -> int:
        return self.near_start + (self.keys.shape[2] if self.is_initialized else 0)

    @property
    def rows(self) -> int:
        return 1

    @property
    def nbytes(self) -> int:
        parts = (*(self._near or ()), *(self._text or ()), *([] if self._packed is None else [self._packed]))
        return sum(part.nbytes for part in parts)

    def get_mask_sizes(self, query_length):
        raise ValueError(
            f"{self.store} key-values are unpacked before they are decoded from: give generate and forward "
            "video.question_cache(), not video.cache"
        )

    def update(self, key_states, value_states, *args, **kwargs):
        # override: what is returned covers the positions from `near_start` on
        states = tuple(
            part.to(self.dtype if self.is_initialized else value_states.dtype) for part in (key_states, value_states)
        )
        if self.is_initialized and self.device != key_states.device:
            self.__dict__.update(self.at(key_states.device).__dict__)
        self._hold(*_joined(self._near, states))
        return self._near

    def retire(self, non_visual, keep_from):
        self.pack(non_visual, keep_from)

    def pack(self, non_visual: torch.Tensor, before: int, ragged=False) -> None:
        """Packs visual tokens before a position, as many as fill blocks, or (`ragged`) all; see `pack_cache`."""
        known, packed = len(self._stamps), 0 if self._packed is None else len(self._packed)
        before = min(max(before, self.near_start), self.held)
        count = before - int(torch.searchsorted(non_visual, before))
        if not ragged:
            count = packed + (count - packed) // BLOCK_ROWS * BLOCK_ROWS
        # In front of the first visual token that stays; text between it and the packed ones is taken along.
        earlier = non_visual - torch.arange(len(non_visual))  # visual tokens before each text token
        start = min(count + int(torch.searchsorted(earlier, count, right=True)), before)
        if start <= self.near_start:
            return
        keys, values = self._near
        self._stamps = non_visual[: int(torch.searchsorted(non_visual, start))]
        text = self._stamps[known:] - self.near_start
        kept = (states.index_select(2, text.to(states.device)).to(self._home) for states in self._near)
        self._text = _joined(self._text, tuple(kept))
        visual = torch.ones(start - self.near_start, dtype=torch.bool)
        visual[text] = False
        places_of_visual = visual.nonzero().flatten()
        for begin in range(0, len(places_of_visual), ROWS_AT_ONCE):
            part = places_of_visual[begin : begin + ROWS_AT_ONCE]
            places = part.to(keys.device)
            plain = rotate(keys.index_select(2, places), part + self.near_start, None, self._inv_freq)
            rows = torch.cat([plain[0], values.index_select(2, places)[0].float()])
            rows = PackedRows.pack(rows, STORES[self.store])
            rows = rows.to("cpu" if self._on_host else self._home)
            self._packed = rows if self._packed is None else self._packed.then(rows)
        gone = start - self.near_start
        self._hold(*(states[:, :, gone:].clone().to(self._home) for states in self._near))
        self.near_start = start

    def read(self, places, positions, inv_freq):
        keys, values = self._near
        shape = (1, keys.shape[1], len(places), keys.shape[3])
        kinds = torch.float32 if positions is None else self.dtype, self.dtype
        outputs = tuple(torch.empty(shape, dtype=kind, device=inv_freq.device) for kind in kinds)
        places = places.cpu()
        stay, positions = positions is places, None if positions is None else positions.cpu()
        before = torch.searchsorted(self._stamps, places)  # text tokens before each
        near, text = places >= self.near_start, torch.isin(places, self._stamps)
        for chosen, index, states in (
            (near, places - self.near_start, self._near),
            (text, before, self._text),
            (~(near | text), places - before, None),
        ):
            chosen = chosen.nonzero().flatten()
            if not len(chosen):
                continue
            old, new = places[chosen], None if positions is None else positions[chosen]
            if states is None:
                packed = self._packed.read(index[chosen], inv_freq.device)[None]
                found, old = packed.chunk(2, dim=1), None
            else:
                found = [part.index_select(2, index[chosen].to(part.device)).to(inv_freq.device) for part in states]
            if old is not None and not stay or old is None and new is not None:
                found = rotate(found[0], old, new, inv_freq), found[1]
            for output, part in zip(outputs, found, strict=True):
                output.index_copy_(2, chosen.to(output.device), part.to(output.dtype))
        return outputs

    def whole(self, stop):
        pieces = [self.read(part, part, self._inv_freq) for part in torch.arange(stop).split(ROWS_AT_ONCE)]
        return tuple(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True))

    def all_keys(self):
        return self.whole(self.held)[0]

    def unpacked(self, device):
        layer, inv_freq = VideoXLCacheLayer(), self._inv_freq.to(device)
        layer.reserve(self.held + MIN_SPARE_TOKENS)
        for part in torch.arange(self.held).split(ROWS_AT_ONCE):
            layer.update(*self.read(part, part, inv_freq))
        return layer

    def at(self, device):
        layer = self.fork()
        layer._home, layer._on_host, layer._inv_freq = torch.device(device), False, self._inv_freq.to(device)
        layer._packed = None if self._packed is None else self._packed.to(device)
        layer._text = None if self._text is None else tuple(part.to(device) for part in self._text)
        if self.is_initialized:
            layer._hold(*(part.to(device) for part in self._near))
        return layer

    def fork(self, make_room=False):
        return copy.copy(self)

    def make_room(self, tokens):
        pass  # the tokens to come are appended to a window

    def snapshot(self, held):
        state = dict(self.__dict__)
        return lambda: self.__dict__.update(state)

    def crop(self, tokens_to_remove):
        keep = self.held + tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove
        assert keep >= self.near_start, "what is packed is not taken back"
        self._hold(*(states[:, :, : keep - self.near_start] for states in self._near))

    def reset(self):
        self.__init__(self.store, self._inv_freq, self._home, self._on_host)

    def state(self):
        named = {"keys": self.keys, "values": self.values}
        if self._text is not None:
            named |= {"text_keys": self._text[0], "text_values": self._text[1]}
        if self._packed is not None:
            named |= {"codes": self._packed.codes, "scales": self._packed.scales, "edges": self._packed.edges}
        return named

    def restore(self, state: dict[str, torch.Tensor], non_visual: torch.Tensor, length: int) -> None:
        """Takes over a layer's `state`, of so many tokens; `non_visual` are the places of text among them."""
        self.near_start = length - state["keys"].shape[2]
        self._stamps = non_visual[: int(torch.searchsorted(non_visual, self.near_start))]
        if "text_keys" in state:
            self._text = state["text_keys"].to(self._home), state["text_values"].to(self._home)
        if "codes" in state:
            codes, scales, edges = (state[name] for name in ("codes", "scales", "edges"))
            self._packed = PackedRows(codes, scales, edges, STORES[self.store]).to(self._home)
        self._hold(state["keys"].to(self._home), state["values"].to(self._home))
