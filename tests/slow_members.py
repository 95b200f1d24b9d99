"""A slow reference of Video-XL and both Video-XL-Pro: one prompt, loops over windows and groups, no cache library.

Written from the papers' and the published code's formulas, over tensors under their published names. It shares nothing
with the package: not the towers of transformers, nor its rotary embedding, nor attention kernels.

F frames, P patches, C channels, H width of the language model, n rows of a sequence, M rows of the memory.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

TOWER = "model.vision_tower.vision_tower.vision_model."


class SlowMember:
    """Runs one published checkpoint.

    Args:
        config: The parsed config.json as published.
        tensors: The checkpoint's tensors.
    """

    def __init__(self, config: dict, tensors: dict):
        self.config, self.tensors = config, {name: tensor.float() for name, tensor in tensors.items()}
        self.has_beacons = "model.beacon_embed_tokens.weight" in tensors
        self.has_selector = "model.text_mlp.0.weight" in tensors
        self.has_times = "model.WindowTimeToTokenAttention.q_proj.weight" in tensors
        self.is_clip = TOWER + "embeddings.class_embedding" in tensors

    def linear(self, states, name):
        return F.linear(states, self.tensors[name + ".weight"], self.tensors.get(name + ".bias"))

    def layer_norm(self, states, name):
        eps = self.config["vision_config"]["layer_norm_eps"]
        weight, bias = self.tensors[name + ".weight"], self.tensors[name + ".bias"]
        centred = states - states.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias

    # ------------------------------------------------------------------------------------------------ vision

    def tower(self, pixels):
        """Pixels [F, 3, S, S] -> [F, P, C]: raw output of the layer that is taken."""
        vision, tensors = self.config["vision_config"], self.tensors
        size = vision["patch_size"]
        patches = pixels.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        kernel = tensors[TOWER + "embeddings.patch_embedding.weight"].flatten(1)
        states = F.linear(patches, kernel, tensors.get(TOWER + "embeddings.patch_embedding.bias"))
        if self.is_clip:
            first = tensors[TOWER + "embeddings.class_embedding"].expand(len(states), 1, -1)
            states = torch.cat([first, states], dim=1)
        states = states + tensors[TOWER + "embeddings.position_embedding.weight"]
        stored = 1 + max(int(n.split("layers.")[1].split(".")[0]) for n in tensors if n.startswith(TOWER + "enc"))
        if self.is_clip:
            states = self.layer_norm(states, TOWER + "pre_layrnorm")
            stored += 1 + self.config["mm_vision_select_layer"]
        heads = vision["num_attention_heads"]
        for number in range(stored):
            name = f"{TOWER}encoder.layers.{number}."
            normed = self.layer_norm(states, name + "layer_norm1")
            q, k, v = (
                self.linear(normed, f"{name}self_attn.{part}_proj").unflatten(2, (heads, -1)).transpose(1, 2)
                for part in "qkv"
            )
            weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(-1)
            states = states + self.linear((weights @ v).transpose(1, 2).flatten(2), name + "self_attn.out_proj")
            inner = self.linear(self.layer_norm(states, name + "layer_norm2"), name + "mlp.fc1")
            inner = inner * torch.sigmoid(1.702 * inner) if self.is_clip else F.gelu(inner, approximate="tanh")
            states = states + self.linear(inner, name + "mlp.fc2")
        return states[:, 1:] if self.is_clip else states

    def visual_tokens(self, pixels, tiles=False):
        """[tokens, H] of a video [F, 3, S, S] or an image's tiles [T, 3, S, S]."""
        features = self.tower(pixels)
        if not self.is_clip:
            features = features.repeat_interleave(4, dim=0) if tiles else features
            side = math.isqrt(features.shape[1])
            maps = features.transpose(1, 2).unflatten(2, (side, side))
            maps = F.interpolate(maps, size=(24, 24), mode="bilinear", align_corners=False)
            while len(maps) % 4:
                maps = torch.cat([maps, maps[-1:]])
            features = torch.stack([self.dts(maps[first : first + 4]) for first in range(0, len(maps), 4)])
            features = features.flatten(2).transpose(1, 2)
        projected = self.linear(F.gelu(self.linear(features, "model.mm_projector.0")), "model.mm_projector.2")
        side = math.isqrt(projected.shape[1])
        grid = projected.unflatten(1, (side // 2, 2, side // 2, 2))
        return grid.mean(dim=(2, 4)).flatten(0, 2)

    def dts(self, maps):
        """Four maps [4, C, 24, 24] -> [C, 24, 24]."""
        channels = maps.shape[1]
        # The same memory read as [C, 4, ...]: no transpose, as in the published code.
        states = maps.reshape(channels, 4, *maps.shape[2:])
        states = states + self.tensors["model.sae.temporal_encoding"].T[..., None, None]
        for number in (0, 3):
            name = f"model.sae.encoder.{number}."
            normed = self.group_norm(states, name + "norm")
            out = []
            for step in range(states.shape[1]):
                flat = normed[:, step].flatten(1).T
                q, k, v = (self.pointwise(flat, name + part) for part in "qkv")
                attended = (q @ k.T * channels**-0.5).softmax(-1) @ v
                out.append(self.pointwise(attended, name + "proj_out").T.reshape(channels, *states.shape[2:]))
            states = states + torch.stack(out, dim=1)
            states = states + self.temporal(states, f"model.sae.encoder.{number + 1}.")
            padded = F.pad(states[None], (1, 1, 1, 1, 1, 0), mode="replicate")
            name = f"model.sae.encoder.{number + 2}.conv"
            weight, bias = self.tensors[name + ".weight"], self.tensors[name + ".bias"]
            states = F.conv3d(padded, weight, bias, stride=(2, 1, 1))[0]
        return states[:, 0]

    def group_norm(self, states, name):
        """[C, ...]: 32 groups of channels, statistics over all the rest."""
        grouped = states.reshape(32, -1)
        centred = grouped - grouped.mean(1, keepdim=True)
        normed = (centred / (centred.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()).reshape(states.shape)
        shape = (-1, *[1] * (states.ndim - 1))
        return normed * self.tensors[name + ".weight"].view(shape) + self.tensors[name + ".bias"].view(shape)

    def pointwise(self, rows, name):
        return rows @ self.tensors[name + ".weight"].flatten(1).T + self.tensors[name + ".bias"]

    def temporal(self, states, name):
        channels, time, height, width = states.shape
        cells = states.flatten(2).permute(2, 0, 1)  # [cells, C, T]
        normed = torch.stack([self.group_norm(cell, name + "norm") for cell in cells])
        q, k, v = self.pointwise(normed.transpose(1, 2), name + "qkv").chunk(3, dim=2)
        table_k = self.tensors[name + "relative_position_k.embeddings_table"]
        table_v = self.tensors[name + "relative_position_v.embeddings_table"]
        logits = torch.zeros(len(cells), time, time)
        for i in range(time):
            for j in range(time):
                logits[:, i, j] = (q[:, i] * k[:, j]).sum(1) * channels**-0.5
                logits[:, i, j] += q[:, j] @ table_k[i - j + 64] * channels**-0.25
        weights = logits.softmax(-1)
        out = torch.zeros_like(v)
        for i in range(time):
            for j in range(time):
                out[:, i] += weights[:, i, j, None] * (v[:, j] + table_v[j - i + 64])
        return self.pointwise(out, name + "proj_out").permute(2, 1, 0).reshape(channels, time, height, width)

    # ------------------------------------------------------------------------------------------------ selector

    def select(self, block, stamps, tokens, text_ids, keep_ratio, limit=None):
        """Rows of a video [n, H], in groups of `stamps[g]` timestamp rows and `tokens` visual ones -> kept rows."""
        text = F.gelu(self.linear(self.tensors["model.embed_tokens.weight"][text_ids], "model.text_mlp.0"))
        scored, visual, cursor = [], [], 0
        for stamp in stamps:
            times, rows = block[cursor : cursor + stamp], block[cursor + stamp : cursor + stamp + tokens]
            visual += range(cursor + stamp, cursor + stamp + tokens)
            if self.has_times:
                name = "model.WindowTimeToTokenAttention."
                q = self.linear(times, name + "q_proj").unflatten(1, (4, -1))
                k = self.linear(rows, name + "k_proj").unflatten(1, (4, -1))
                weights = (torch.einsum("nhd,thd->hnt", k, q) / math.sqrt(q.shape[-1])).softmax(-1)
                rows = self.linear(torch.einsum("hnt,thd->nhd", weights, q).flatten(1), name + "out_proj")
            scored.append(rows)
            cursor += stamp + tokens
        scores = (torch.cat(scored) @ text.T).mean(1)
        scores = (scores - scores.min()) / (scores.max() - scores.min())
        width, turned = block.shape[1], block.clone()
        for i in range(width // 2):
            angle = torch.arange(len(block)) * torch.exp(torch.tensor(-2.0 * i) * (math.log(1e6) / width))
            turned[:, 2 * i] = block[:, 2 * i] * angle.cos() - block[:, 2 * i + 1] * angle.sin()
            turned[:, 2 * i + 1] = block[:, 2 * i + 1] * angle.cos() + block[:, 2 * i] * angle.sin()
        turned[visual] += scores[:, None]
        count = math.floor(len(visual) * keep_ratio)
        count = (count if limit is None else min(count, limit)) // 16 * 16
        dropped = set(torch.tensor(visual)[scores.argsort(descending=True)[count:]].tolist())
        kept = [row for row in range(len(block)) if row not in dropped]
        return turned[kept]

    # ------------------------------------------------------------------------------------------------ language model

    def run(self, rows, memory, is_beacon=None):
        """Rows [n, H] behind a memory (per layer keys before rotation, values) -> hidden states, new keys, values."""
        config, new = self.config, []
        heads, held = config["num_attention_heads"], config["num_key_value_heads"]
        size, total = config["hidden_size"] // heads, len(rows) + len(memory[0][0])
        is_beacon = torch.zeros(len(rows), dtype=torch.bool) if is_beacon is None else is_beacon
        mask = torch.ones(len(rows), total).tril(total - len(rows)).bool()
        for number in range(config["num_hidden_layers"]):
            name = f"model.layers.{number}."
            normed, parts = self.rms_norm(rows, name + "input_layernorm"), {}
            for part in "qkv":
                parts[part] = self.linear(normed, f"{name}self_attn.{part}_proj")
                if self.has_beacons:
                    own = self.linear(normed, f"{name}self_attn.beacon_{part}_proj")
                    parts[part] = torch.where(is_beacon[:, None], own, parts[part])
            new.append((parts["k"], parts["v"]))
            keys, values = (torch.cat([old, now]) for old, now in zip(memory[number], new[-1], strict=True))
            out = []
            places = torch.arange(total)
            for head in range(heads):
                shared = slice(head * held // heads * size, (head * held // heads + 1) * size)
                query = self.rotate(parts["q"][:, head * size : (head + 1) * size], places[total - len(rows) :])
                logits = query @ self.rotate(keys[:, shared], places).T / math.sqrt(size)
                out.append(logits.masked_fill(~mask, -math.inf).softmax(-1) @ values[:, shared])
            rows = rows + self.linear(torch.cat(out, dim=1), name + "self_attn.o_proj")
            normed = self.rms_norm(rows, name + "post_attention_layernorm")
            inner = F.silu(self.linear(normed, name + "mlp.gate_proj")) * self.linear(normed, name + "mlp.up_proj")
            rows = rows + self.linear(inner, name + "mlp.down_proj")
        return self.rms_norm(rows, "model.norm"), new

    def rms_norm(self, states, name):
        scale = (states.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).rsqrt()
        return states * scale * self.tensors[name + ".weight"]

    def rotate(self, rows, places):
        half = rows.shape[1] // 2
        angle = places[:, None] * self.config["rope_theta"] ** (-torch.arange(half) / half)
        first, second = rows[:, :half], rows[:, half:]
        return torch.cat(
            [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=1
        )

    def logits(self, pieces, ratio="none", mix="step-random", seed=42):
        """Logits at all rows behind the last video; the memory stays in `memory`.

        Args:
            pieces: Text ids [n] and videos' rows [n, H] as the language model gets them, in turns; text is last.
            ratio, mix, seed: Of the beacons.
        """
        memory = [(torch.zeros(0, self.kv_width), torch.zeros(0, self.kv_width))] * self.config["num_hidden_layers"]
        output = None
        for number, piece in enumerate(pieces):
            if number % 2 == 0 or not self.has_beacons or ratio == "none":
                rows = self.tensors["model.embed_tokens.weight"][piece] if number % 2 == 0 else piece
                if len(rows):
                    output, new = self.run(rows, memory)
                    memory = self.extend(memory, new, slice(None))
                continue
            generator, since, ratios = np.random.default_rng(seed), 0, ratio if isinstance(ratio, list) else [ratio]
            window, candidates, used = self.config["beacon_window"], None, None
            for turn, first in enumerate(range(0, len(piece), window)):
                part = piece[first : first + window]
                if len(ratios) == 1:
                    used = ratios[0]
                elif mix == "step-random" or turn == 0:
                    candidates = [r for r in ratios if r <= len(part) and len(part) % r == 0]
                    used = candidates[0] if mix == "sequence" else int(generator.choice(candidates))
                elif mix == "sequence":
                    used = candidates[turn % len(candidates)]
                rows, is_beacon = [], []
                for row in part:
                    rows.append(row)
                    is_beacon.append(False)
                    since += 1
                    if since >= used:
                        rows.append(self.tensors["model.beacon_embed_tokens.weight"][0])
                        is_beacon.append(True)
                        since = 0
                is_beacon = torch.tensor(is_beacon)
                output, new = self.run(torch.stack(rows), memory, is_beacon)
                memory = self.extend(memory, new, is_beacon)
        self.memory = memory
        return self.head(output)

    @property
    def kv_width(self):
        return self.config["hidden_size"] // self.config["num_attention_heads"] * self.config["num_key_value_heads"]

    def extend(self, memory, new, kept):
        return [
            (torch.cat([old_k, k[kept]]), torch.cat([old_v, v[kept]]))
            for (old_k, old_v), (k, v) in zip(memory, new, strict=True)
        ]

    def continue_with(self, token):
        """Logits [vocabulary] behind one more token."""
        states, new = self.run(self.tensors["model.embed_tokens.weight"][[token]], self.memory)
        self.memory = self.extend(self.memory, new, slice(None))
        return self.head(states)[-1]

    def head(self, states):
        name = "lm_head.weight" if "lm_head.weight" in self.tensors else "model.embed_tokens.weight"
        return states @ self.tensors[name].T
