"""What `plan` counts where visual tokens are compressed: beacon memory, and selection by the question.

What is surprising:
* With beacon memory the key-values are those of text and beacons, and one window of all its tokens at a time. Tokens
  are counted as placeholders, so there are many more of them than key-values.
* With a token selector an encoded video is its features, and everything about the language model is the question's:
  its stage holds the scoring and the whole prefill of what is kept.
* Spare room is counted as if every buffer had just grown, which makes the peaks rise with the number of frames.

N visual tokens of a group, n rows that run through the language model at once.
"""

from .beacon_memory_videoxl import plan_windows
from .planning_memory_videoxl import largest, with_spare
from .prefill_videoxl import SEGMENT_TOKENS
from .sparse_attention import MAX_STEP_QUERIES
from .token_selector_videoxl import ROWS_AT_ONCE, kept_count


def compressed_stages(formulas, config, frames, groups, total, question_tokens, new_tokens):
    """The stages of a member of the family with beacon memory or a token selector.

    Args:
        formulas: `MemoryFormulas` of the model.
        config: `VideoXLConfig`.
        frames, groups: Of the video.
        total: Tokens of the prompt's header and the video, placeholders included.
        question_tokens, new_tokens: See `plan`.

    Returns:
        `(stages, bytes of the encoded video, tokens that a question runs behind)`.
    """
    visual = groups * formulas.visual
    # `generate` carries every token in int64, those without key-values too.
    counted = {"ids and masks": 24 * (total + question_tokens + new_tokens)}
    in_batch = min(frames, formulas.batch_frames)
    pixels = formulas.pixels(frames, in_batch)
    vision = formulas.vision(min(in_batch, config.resolve_vision_chunk_frames()))
    batch_tokens = min(groups, formulas.batch) * (total - formulas.header) // groups
    if config.token_selector is None:
        held, room, running = _prefill(formulas, total - visual, visual, 2 * batch_tokens)
        stages = {"vision": formulas.cached(held, room) | pixels | vision, "prefill": running | pixels}
        question, decode = formulas.question(held, room, question_tokens, new_tokens)
        stages |= {"question": largest(*question) | counted, "decode": largest(*decode) | counted}
        return stages, held * formulas.per_token, held
    # Rows wait in the language model's width; a batch is there twice more, as tokens and as embeddings.
    width = formulas.text_config.hidden_size * formulas.bytes
    waiting = formulas.cached(0, 0) | {"visual features": total * width}
    stages = {
        "vision": waiting | pixels | vision,
        "prefill": waiting | pixels | {"embeddings": 2 * batch_tokens * width},
    }
    kept = kept_count(visual, config.resolve_keep_ratio(), config.max_visual_tokens)
    held, room, running = _prefill(formulas, total - visual, kept, 2 * (total - visual + kept))
    # A part of the rows as it is read, in float32, and with timestamps: projected, attended, projected; all scores.
    part = min(ROWS_AT_ONCE, total) * formulas.text_config.hidden_size
    timed = 4 * formulas.bytes if config.token_selector == "timed_query" else 0
    scoring = {"scoring": part * (formulas.bytes + (0 if formulas.bytes == 4 else 4) + timed) + 4 * 4 * visual}
    question, decode = formulas.question(held, room, question_tokens, new_tokens)
    rows = {"visual features": total * width, **counted}
    stages["question"] = largest(waiting | scoring, running | rows, *(terms | rows for terms in question))
    stages["decode"] = largest(*decode) | rows
    return stages, total * width, held


def _prefill(formulas, text, visual, inputs) -> tuple[int, int, dict[str, int]]:
    """Tokens that are held, room for them, and the terms of running a sequence with a video.

    Args:
        formulas: See `compressed_stages`.
        text, visual: Tokens of text and timestamps, and visual tokens.
        inputs: Rows beside those that run.
    """
    beacons = formulas.settings.beacons
    held = keys = text + (visual if beacons is None else sum(w.count for w in plan_windows(visual, **beacons)))
    n, extra = min(text + visual, SEGMENT_TOKENS), {}
    if beacons is not None:
        *_, last = plan_windows(visual, **beacons)
        most = min(visual, beacons["window"]) // min(beacons["ratios"]) + 1
        n = min(visual, beacons["window"]) + most
        # A window's rows are put together and stay; its keys and values are in all layers until it is done. Of several
        # ratios a last, partial window may draw a smaller one than the same window when it is full.
        extra = {"window": 2 * n * formulas.text_config.hidden_size * formulas.bytes}
        extra["its key-values"] = n * formulas.per_token
        extra["other ratios"] = (most - last.count) * formulas.per_token if len(beacons["ratios"]) > 1 else 0
        keys = held + n + (most - last.count if len(beacons["ratios"]) > 1 else 0)
    room = with_spare(keys)
    running = formulas.forward(n, inputs, min(n, MAX_STEP_QUERIES), keys, moved=held)
    return held, room, formulas.cached(held, room) | extra | running


__all__ = ["compressed_stages"]
