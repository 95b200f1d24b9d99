"""What `plan` counts where visual tokens are dropped between layers of the language model.

What is surprising:
* An encoded video is the key-values of the layers in front of the first stage, those of the text before the video in
  the others, and what the first layers made of the video's tokens ("hidden states that wait").
* The question's stage holds the rest. Uniform stages are run for the first question and stay beside the video for all
  others; behind the first stage by attention everything is the question's own.
* Layers hold different numbers of keys: `held` below is a sum over layers, in keys of one layer.

V visual tokens of the video.
"""

from .planning_memory_videoxl import largest, with_spare
from .prefill_videoxl import SEGMENT_TOKENS
from .sparse_attention import MAX_STEP_QUERIES
from .token_dropping_videoxl import DropProgress, drop_stages


def dropping_stages(formulas, config, frames, groups, total, question_tokens, new_tokens):
    """The stages of a model that drops visual tokens.

    Args:
        formulas: `MemoryFormulas` of the model.
        config: `VideoXLConfig`.
        frames, groups: Of the video.
        total: Tokens of the prompt's header and the video.
        question_tokens, new_tokens: See `plan`.

    Returns:
        `(stages, bytes of the encoded video, bytes of the key-values that a question runs behind)`.
    """
    stages = drop_stages(formulas.settings.dropping)
    layers = [len(span) for span in DropProgress(stages).spans(config.text_config.num_hidden_layers)]
    visual, width = groups * formulas.visual, formulas.text_config.hidden_size * formulas.bytes
    text = total - visual
    left = [visual, *(int(visual * stage.after) for stage in stages)]  # in each span of layers
    shared = next((number for number, stage in enumerate(stages) if stage.by_attention), len(stages))

    def held(seen, spare=False):
        """Bytes of key-values where each span's layers hold `seen` tokens, with the room that is paid for."""
        sizes = [with_spare(tokens) if spare and not formulas.on_cpu else tokens for tokens in seen]
        return sum(count * tokens for count, tokens in zip(layers, sizes, strict=True)) * formulas.per_layer

    def terms(kept, waiting):
        spare = held(kept, spare=True) - held(kept)
        counted = {"weights": formulas.weight_bytes, "key-values": held(kept), "spare room": spare}
        return counted | {"hidden states that wait": waiting * width}

    encoded = [total, *[text] * len(stages)]
    in_batch, batch = min(frames, formulas.batch_frames), min(groups, formulas.batch) * formulas.visual
    pixels = formulas.pixels(frames, in_batch)
    vision = formulas.vision(min(in_batch, config.resolve_vision_chunk_frames()))

    def running(rows, inputs, keys):
        at_once = min(rows, SEGMENT_TOKENS)
        return formulas.forward(at_once, inputs, min(at_once, MAX_STEP_QUERIES), keys, moved=keys - rows)

    answered = question_tokens + new_tokens
    ids = {"ids and masks": 24 * (total + answered)}
    logits = {"logits": formulas.text_config.vocab_size * (formulas.bytes + 4)}
    asking, own = [], 0
    for number, stage in enumerate(stages):
        # Of a span's rows: those that were chosen from what waited, these with the question's, and what they become.
        rows = left[number + 1] + question_tokens
        seen = [text + tokens for tokens in left[: number + 2]] + [text] * (len(stages) - number - 1)
        beside = visual + (left[number] if number else 0)  # the video's own, and those in front of this stage
        asking.append(terms(seen, beside + left[number + 1]) | ids | running(rows, 2 * rows, text + rows))
        if stage.by_attention:
            # Keys of one layer, part by part and whole, and one row of its attention.
            keys = text + left[number] + question_tokens
            scoring = {
                "scoring": keys * formulas.per_layer + keys * 4 * (formulas.text_config.num_attention_heads + 1)
            }
            asking.append(terms(seen, beside) | ids | scoring)
        own += layers[number + 1] * (text + left[number + 1]) if number >= shared else 0
    seen = [text + tokens for tokens in left]
    # The question's fork of what all share copies it where the room behind it is short.
    kept = visual + (left[shared] if 0 < shared < len(stages) else 0)
    copied = {"copy of the key-values": held(seen) - own * formulas.per_layer if answered > with_spare(0) else 0}
    behind = {"new key-values": answered * formulas.per_token}
    decode = terms(seen, kept) | copied | behind | ids | logits
    return (
        {
            "vision": terms(encoded, visual) | pixels | vision,
            "prefill": terms(encoded, visual) | pixels | running(batch, 2 * batch, total),
            "question": largest(*asking) | behind,
            "decode": decode,
        },
        held(encoded) + visual * width,
        held(seen),
    )


__all__ = ["dropping_stages"]
