"""Which tensors live at once: the formulas behind `plan`, stage by stage, as named terms in bytes.

What is surprising:
* The formulas follow `encode_video` and `chat`. Each part of a model that could hold the most is a candidate, and the
  largest one is the stage's peak: in a layer's MLP the attention's tensors are gone.
* A cache layer has spare room (`GROWTH` in `cache_layers_videoxl`). CUDA pays for it at once; on a CPU pages that
  nothing was written to take no memory, so there it counts as 0.
* Attention is taken to be SDPA's fused kernels, which keep no scores. On a CPU, and in float32, they need a mask.
* Not counted: the process itself (a CUDA context is some hundred megabytes), workspaces of cuDNN, cuBLAS and oneDNN,
  and what an allocator keeps for later. Offloading is counted as if it were off.

F frames, G groups of frames, S side of the compressor's grid, n tokens that run through the language model at once;
"ends" [G] are the tokens of the sequence up to the end of each group.
"""

import numpy as np

from .kv_cache import GROWTH, MIN_SPARE_TOKENS, ROTATED_AT_ONCE
from .prefill_videoxl import SEGMENT_TOKENS
from .sparse_attention import MASK_ROWS, MAX_STEP_QUERIES

# Batches of uint8 frames in memory while a batch is encoded: it, two in the queue, and one that is being filled.
FRAME_BATCHES = 4


class MemoryFormulas:
    """The sizes of a model at the moment, and what they make of a number of frames or tokens."""

    def __init__(self, model):
        config, text = model.config, model.config.text_config
        self.settings, self.compressor = config.resolve_sparse_attention(), config.compressor_config
        self.vision_config, self.text_config = config.vision_config, text
        self.frames_per_group, self.visual = config.frames_per_group, self.compressor.tokens_per_group
        # As `encode_video` reads a file: whole units at a time.
        unit = config.resolve_unit_frames(self.settings.beacons)
        self.batch_frames = max(config.resolve_vision_chunk_frames() // unit, 1) * unit
        self.batch = self.batch_frames // self.frames_per_group
        weights = model.get_input_embeddings().weight
        self.bytes, self.device = weights.element_size(), weights.device.type
        self.on_cpu = self.device == "cpu"
        self.masks = self.on_cpu or self.bytes == 4  # flash kernels, which need no mask, have no float32
        self.head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        # Keys and values of one token, in one layer and in all.
        self.per_layer = 2 * text.num_key_value_heads * self.head_size * self.bytes
        self.per_token = self.per_layer * text.num_hidden_layers
        self.weight_bytes = model.get_memory_footprint()
        self.header = 0

    def end(self, ends, groups) -> int:
        """Tokens of the sequence up to the end of its first `groups` groups."""
        return int(ends[groups - 1]) if groups else self.header

    def capacity(self, ends, groups) -> tuple[int, int | None, int]:
        """Tokens that a layer's buffers have room for behind `groups` groups, as `VideoXLCacheLayer` grows them.

        Returns:
            The room, the tokens held when it last grew (None: never), and the room before that.
        """
        room, grown_from, earlier = with_spare(self.header), None, 0
        while room < self.end(ends, groups):
            first = int(np.searchsorted(ends, room, side="right")) // self.batch * self.batch
            stop = min(first + self.batch, groups)
            grown_from = self.end(ends, first)
            for tokens in self._segments(ends, first, stop):
                if grown_from + tokens > room:
                    break
                grown_from += tokens
            room, earlier = max(with_spare(grown_from + tokens), self.end(ends, stop)), room
        return room, grown_from, earlier

    def _steps(self, ends, first, last) -> list[tuple[int, int, int]]:
        """Attention steps of groups [first, last), as `plan_prefill` makes them: (group, first token, end)."""
        begins, size, steps = [first], self.settings.chunk_groups, []
        if self.settings.prefill != "full":
            begins += range((first // size + 1) * size, last, size)
        for begin, end in zip(begins, [*begins[1:], last], strict=True):
            stop = self.end(ends, end)
            starts = range(self.end(ends, begin), stop, MAX_STEP_QUERIES)
            steps += [(begin, start, min(start + MAX_STEP_QUERIES, stop)) for start in starts]
        return steps

    def _segments(self, ends, first, last) -> list[int]:
        """Tokens of each run through the language model over groups [first, last)."""
        segments = [0]
        for _, start, stop in self._steps(ends, first, last):
            if segments[-1] and segments[-1] + stop - start > SEGMENT_TOKENS:
                segments.append(0)
            segments[-1] += stop - start
        return segments

    def cached(self, held, room) -> dict[str, int]:
        """Weights and cache: `held` tokens in buffers for `room`."""
        spare = self._paid(held, room) - held * self.per_token
        return {"weights": self.weight_bytes, "key-values": held * self.per_token, "spare room": spare}

    def _paid(self, held, room) -> int:
        return (held if self.on_cpu else room) * self.per_token

    def pixels(self, frames, in_batch) -> dict[str, int]:
        """Pixels of a batch, in float32 until its prefill is done; uint8 frames are host memory."""
        frame = 3 * self.vision_config.image_size**2
        queued = min(FRAME_BATCHES * self.batch_frames, frames) * frame if self.on_cpu else 0
        return {"pixels": 4 * in_batch * frame, "decoded frames": queued}

    def vision(self, frames) -> dict[str, int]:
        """Tower, compressor and projector over one batch of frames."""
        e, c, config = self.bytes, self.compressor, self.vision_config
        whole = -(-frames // self.frames_per_group) * self.frames_per_group
        features = frames * (config.image_size // config.patch_size) ** 2 * config.hidden_size * e
        cast = {"cast pixels": 0 if e == 4 else frames * 3 * config.image_size**2 * e}
        # Embeddings, a layer's input, and in the MLP: residual and normed states, both sides of the activation; in
        # attention: normed states, queries, keys, values, output and its projection.
        widened = features * config.intermediate_size // config.hidden_size
        tower = {"tower's states": 4 * features, "tower's MLP": 2 * widened}
        attention = {"tower's states": 8 * features}
        cells = whole * c.grid_size**2  # F S^2
        # Projector: its input, and both sides of the activation.
        width = c.hidden_size + 2 * self.text_config.hidden_size
        projector = {"tower's features": features, "projector": cells // self.frames_per_group * width * e}
        if c.compressor_type == "none":
            return cast | largest(tower, attention, projector)
        if c.compressor_type == "tome":
            return cast | self._clips(whole, features * whole // frames, widened * whole // frames)
        values = cells * c.hidden_size
        # Temporal attention in its projection: resized grid, input, cells, queries-keys-values (3), attended, the same
        # in the convolution's order, output: 9 e; float32 queries and keys: 8; on a CPU oneDNN's own order: e.
        temporal = {"tower's features": features, "temporal attention": values * (9 * e + 8 + e * self.on_cpu)}
        # Spatial attention: resized grid, input, normed, queries, keys, values, attended: 7 e. Logits and their
        # softmax in float32, and in half precision its cast: 8 or 10 bytes for each pair of a frame's cells.
        pairs = cells * c.grid_size**2 * (8 if e == 4 else 10)
        spatial = {"tower's features": features, "spatial attention": values * 7 * e, "its logits": pairs}
        # Convolution: resized grid, input, and the output of half the size; what is padded by 1 in time and k - 1 in
        # space, twice (float32 and cast, or reordered by oneDNN); the kernels, reordered.
        time, side, k = self.frames_per_group, c.grid_size, c.kernel_size
        padded = values * (time + 1) * (side + k - 1) ** 2 // (time * side**2) * (4 + e)
        kernels = k**3 * c.hidden_size**2 * e
        convolution = {"tower's features": features, "convolution": values * 5 * e // 2 + padded + kernels}
        return cast | largest(tower, attention, temporal, spatial, convolution, projector)

    def _clips(self, frames, features, widened) -> dict[str, int]:
        """A tower that sees clips, and token merging: clip by clip, but the features of all frames stay to the end.

        Args:
            frames: In whole clips.
            features, widened: Their features in bytes, and these in the width of the MLP.
        """
        config, clips = self.vision_config, frames // self.frames_per_group
        one, tokens = features // clips, self.frames_per_group * config.grid_size**2
        exact = one * 4 // self.bytes
        # Input and normed states; queries, keys and values, two of them once more with biases or in float32 when
        # they are normalised; attended, and its projection.
        attention = {"tower's states": 9 * one + 2 * exact * config.qk_norm}
        mlp = {"tower's states": 4 * one, "tower's MLP": 2 * widened // clips}
        # In float32: tokens, weighted, and of half as many the moved ones, sums, sums added, result. Similarities are
        # of half with half.
        merging = {"token merging": 4 * exact, "its similarities": tokens**2}
        result = {"tower's features": features} | largest(attention, mlp, merging)
        return largest(result, {"tower's features": 2 * features})

    def prefill(self, ends, stamps, first, last, moved) -> dict[str, int]:
        """The language model over groups [first, last); `moved` tokens were in a layer that grows meanwhile.

        Args:
            ends: [G], see above.
            stamps: [G] tokens of each group's timestamp.
        """
        settings, found = self.settings, []
        # The batch's embeddings, and the visual tokens that went into them.
        inputs = self.end(ends, last) - self.end(ends, first) + (last - first) * self.visual
        for group, start, stop in self._steps(ends, first, last):
            keys, gathered, wide = stop, 0, 0
            if settings.prefill != "full":
                chunk = group // settings.chunk_groups * settings.chunk_groups
                window = max(chunk - settings.window_chunks * settings.chunk_groups, 0)
                if window:  # text and timestamps before the window, copied with it
                    keys = self.header + int(stamps[:window].sum()) + stop - self.end(ends, window)
                    gathered = keys
                    if settings.prefill == "mask":
                        wide = min(int(stamps[group : chunk + settings.chunk_groups].sum()), stop - start)
            found.append((stop - start, keys, gathered, wide, stop, moved))
        return largest(*(self.forward(max(self._segments(ends, first, last)), inputs, *step) for step in found))

    def forward(self, n, inputs, rows, keys, gathered=0, wide=0, past=0, moved=0) -> dict[str, int]:
        """n tokens through one layer of the language model.

        Args:
            n: Tokens.
            inputs: Embeddings beside them.
            rows, keys: Queries of an attention step and the keys they see.
            gathered: How many of these are copied.
            wide, past: Queries that see everything, and how much that is.
            moved: Tokens in the layer's old buffer, if it grows.
        """
        e, text = self.bytes, self.text_config
        states, queries = n * text.hidden_size * e, n * text.num_attention_heads * self.head_size * e
        always = {"embeddings": inputs * text.hidden_size * e, "rotary tables": 2 * n * self.head_size * e}
        # The layer's input, residual and normed states; activated gate, the other half, their product.
        mlp = {"hidden states": 3 * states, "MLP": 3 * n * text.intermediate_size * e}
        # Input and normed states; queries and finished outputs, and with masks the step's output in blocks and whole.
        # Masks: one block of rows; for wide queries bool and float, on CUDA once more per query head of a key head.
        per_key_head = text.num_attention_heads // text.num_key_value_heads
        mask = min(rows, MASK_ROWS) * keys * e if self.masks and rows > 1 else 0
        wide_mask = wide * past * (1 + e + (0 if self.on_cpu else per_key_head * e))
        attention = {
            "hidden states": 2 * states,
            "queries and outputs": 2 * queries + (queries * rows // n if self.masks else 0),
            "gathered keys and values": gathered * self.per_layer,
            "attention mask": max(mask, wide_mask),
        }
        # Rotation: queries, their product with the cosine, their turned halves, the product of these with the sine.
        rotation = {"hidden states": 2 * states, "queries, keys, values": 4 * queries + n * self.per_layer}
        # While a layer moves into a larger buffer, the old one is still there.
        growth = {"hidden states": 2 * states, "queries, keys, values": queries + n * self.per_layer}
        growth["layer that grows"] = moved * self.per_layer
        return always | largest(mlp, attention, rotation, growth)

    def question(self, total, room, question_tokens, new_tokens) -> tuple[list, list]:
        """Candidates for the peaks of a question's run and of decoding behind all key-values."""
        asked, answered = total + question_tokens, total + question_tokens + new_tokens
        run = self.forward(question_tokens, question_tokens, question_tokens, asked)
        candidates = []
        if room < total + MIN_SPARE_TOKENS:
            # The video's layers are given room, one after the other.
            room = with_spare(total)
            candidates.append(self.cached(total, room) | {"layer that grows": total * self.per_layer})
        # A question and its answer run in the room behind the video; without enough of it the whole cache is copied.
        always = self.cached(total, room) | self._rows(answered)
        copied = with_spare(asked) if asked > room else 0
        candidates.append(always | self._behind(total, asked, copied) | run)
        if answered > (copied or room):
            copied = with_spare((copied or room) + 1)
        return candidates, [always | self._behind(total, answered, copied)]

    def _rows(self, tokens) -> dict[str, int]:
        # Ids, mask and positions in int64; one row of logits, and its float32 copy that `generate` picks from.
        return {"ids and masks": 24 * tokens, "logits": self.text_config.vocab_size * (self.bytes + 4)}

    def _behind(self, total, held, copied) -> dict[str, int]:
        if copied:
            return {"copy of the key-values": self._paid(held, copied)}
        return {"new key-values": (held - total) * self.per_token if self.on_cpu else 0}

    def mixed_question(self, total, room, question_tokens, new_tokens, mixed, pooled, probed) -> tuple[list, list]:
        """The same for bi-level decoding, with `mixed` and `pooled` tokens; `probed` in the scorer's cache, or 0."""
        always = self.cached(total, room) | self._rows(total + question_tokens + new_tokens)
        always["pooled key-values"] = pooled * self.per_token  # they stay with the video
        probed += question_tokens if probed else 0
        # While the mixed cache is made, the one in which everything is pooled, which the scorer ran over, still lives.
        mixing = {"scorer's cache": self._paid(probed, with_spare(probed)) if probed else 0}
        mixing["mixed cache"] = mixed * self.per_token
        # Rotated keys: as they are and in float32, four halves (products, result), angles in float64 and float32.
        heads = self.text_config.num_key_value_heads
        size = heads * (self.bytes + (0 if self.bytes == 4 else 4) + 8) + 8
        mixing["rotation"] = max(pooled, min(mixed, ROTATED_AT_ONCE)) * self.head_size * size
        # The mixed cache has no spare room: the question's tokens copy it, layer by layer.
        asked = mixed + question_tokens
        running = {"mixed cache": self._paid(asked, with_spare(asked))}
        running |= self.forward(question_tokens, question_tokens, question_tokens, asked, moved=mixed)
        held, room = asked + new_tokens, with_spare(asked)
        decoding = {"mixed cache": self._paid(held, room if held <= room else with_spare(room + 1))}
        return [always | mixing, always | running], [always | decoding]


def with_spare(tokens) -> int:
    """Tokens that a buffer has room for once it has grown to hold `tokens`."""
    return tokens + max(int(GROWTH * tokens), MIN_SPARE_TOKENS)


def largest(*candidates) -> dict[str, int]:
    """The candidate whose terms sum to the most."""
    return max(candidates, key=lambda terms: sum(terms.values()))
