"""The slow oracle of token dropping: a whole sequence at once, dense masks, an L x L softmax, no cache, no chunks."""

import torch
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, repeat_kv

UNIFORM = {"attention": 0, "uniform0_attention": 1, "uniform1_attention": 2, "uniform": 99}


@torch.no_grad()
def run_oracle(language_model, embeds, videos, kind, layers, ratios, prompt_length=None):
    """Runs embeddings [1, L, hidden] through a Qwen2 model and drops tokens as the reference's description says.

    Args:
        videos: Per video, the positions of its visual tokens.
        kind, layers, ratios: As `llm_compress_type`, `llm_compress_layer_list`, `llm_image_token_ratio_list`.
        prompt_length: Positions from here on are generated tokens; None for none.

    Returns:
        Hidden states [1, L', hidden] after the norm, the original positions of the L' rows, the rows of every layer,
        and per stage per video the kept tokens as indices among the video's.
    """
    alive = torch.arange(embeds.shape[1])
    last = len(alive) - 1 if prompt_length is None else prompt_length - 1
    hidden, lengths, kept = embeds, [], []
    for index, layer in enumerate(language_model.layers):
        if index in layers:
            stage = layers.index(index)
            row = (
                scores_of(language_model, layer, hidden)[alive.tolist().index(last)]
                if stage >= UNIFORM[kind]
                else None
            )
            keep, chosen = torch.ones(len(alive), dtype=torch.bool), []
            for positions in videos:
                here = torch.tensor([place for place, position in enumerate(alive.tolist()) if position in positions])
                count = int(len(positions) * ratios[stage + 1])
                assert len(here) == int(len(positions) * ratios[stage])
                if row is None:
                    choice = torch.linspace(0, len(here) - 1, count, dtype=torch.int64)
                else:
                    choice = row[here].topk(count).indices.sort().values
                keep[here] = False
                keep[here[choice]] = True
                chosen.append([positions.index(position) for position in alive[here[choice]].tolist()])
            kept.append(chosen)
            alive, hidden = alive[keep], hidden[:, keep]
        lengths.append(len(alive))
        size = hidden.shape[1]
        mask = torch.full((size, size), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]
        positions = torch.arange(size)[None]
        rotary = language_model.rotary_emb(hidden, positions)
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
    return language_model.norm(hidden), alive, lengths, kept


def scores_of(language_model, layer, hidden) -> torch.Tensor:
    """[L, L] attention of a layer, mean over heads."""
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    query, key = (
        projection(normed).unflatten(2, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj)
    )
    rotary = language_model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    logits = query @ repeat_kv(key, attention.num_key_value_groups).transpose(2, 3) * attention.head_dim**-0.5
    hides = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.float().masked_fill(hides, -torch.inf).softmax(dim=-1).mean(dim=1)[0]
