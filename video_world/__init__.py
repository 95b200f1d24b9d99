"""A procedural video world: clips of shapes, signs and cards, and questions whose answers are known.

Everything follows from a seed and a split; train and held-out clips never share a random stream. Training and
evaluation both draw from here; nothing here knows of models.

    from videoxl.video_world import make_clip
    clip = make_clip(7, split="held_out", seconds=64)
    clip.frames([0, 1, 2.5])            # uint8 [3, 48, 48, 3]
    clip.questions[0]                   # Question(type='color', text='What color is the star?', answer='red', ...)
    clip.write_video("clip.mp4")        # H.264
"""

from .clips import SPLITS, Card, Clip, Item, haystack_frames, make_clip
from .drawing import COLORS, DIGITS, SHAPES, SIZES, WORDS, draw_needle
from .grounding import GROUNDING_PROMPTS, Moment, grounding_moments, grounding_question
from .questions import (
    ABSENT,
    CHOICE_PROMPT,
    NEEDLE_KINDS,
    NOT_THERE,
    TEXTS,
    WORDINGS,
    Question,
    absent_keys,
    facts_told,
    name_of,
    needle_questions,
    render_choices,
)

__all__ = [
    "ABSENT",
    "CHOICE_PROMPT",
    "COLORS",
    "Card",
    "Clip",
    "DIGITS",
    "GROUNDING_PROMPTS",
    "Item",
    "Moment",
    "NEEDLE_KINDS",
    "NOT_THERE",
    "Question",
    "SHAPES",
    "SIZES",
    "SPLITS",
    "TEXTS",
    "WORDINGS",
    "WORDS",
    "absent_keys",
    "draw_needle",
    "facts_told",
    "grounding_moments",
    "grounding_question",
    "haystack_frames",
    "make_clip",
    "name_of",
    "needle_questions",
    "render_choices",
]
