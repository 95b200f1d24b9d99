"""Builds the small checkpoint's tokenizer: tokenizer.json and tokenizer_config.json in a folder.

Normalisation and special tokens of Qwen2.5's tokenizer, about a sixtieth of its vocabulary: all 256 bytes, so that any
text round-trips, then merges learnt from sentences about clips of moving shapes that this file writes itself and from
the questions of the procedural world. The split is Qwen2's but for numbers: up to three digits stay together, with
the space before them, so that a time below 1,000 seconds is one token, to be read and said at once; a timestamp
("Time 12.0s:") is four tokens. No randomness, no outside text: two runs give byte-identical files.

    python training/make_tokenizer.py FOLDER
"""

import argparse
import json
import re
import sys
from itertools import chain, product
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `videoxl`, in a clone
from videoxl.video_world import CHOICE_PROMPT, TEXTS  # noqa: E402
from videoxl.video_world import WORDS as WORLD_WORDS

# 256 bytes + 2,162 merges + 14 special tokens; a multiple of 64.
VOCAB_SIZE = 2432

# The tail of a timestamp, contractions, words with at most one leading sign, numbers of up to three digits,
# punctuation, white space.
SPLIT = (
    r"\.\p{N}s(?=:)|(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5's, in its order; they take the last ids.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

COLORS = "red green blue yellow orange purple pink brown black white gray cyan magenta"
SHAPES = "circle square triangle star ring cross diamond bar dot rectangle shape object"
PLACES = "left right top bottom center middle corner edge upper lower"
MOTIONS = "moves moving bounces jumps rolls grows shrinks spins turns blinks appears disappears enters leaves"
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve"
ORDINALS = "first second third fourth fifth last next"

# What answers and general questions need beyond the sentences below; the most useful ones first.
WORDS = """
the of and to in is that it for on with as are was this be at by from or an not which have has had but they he she his
her their its you we what when where who how many much does do did can could will would there here then than them these
those all any some no yes none both each every more most less few other same different only also very before after
while during until between again always never once twice about into over under above below behind front near far
out off up down still now just like so if because Time time times second seconds minute minutes frame frames start
starts end ends begin begins beginning video clip scene image picture screen background color colors shapes
number count counted long short small large big tiny little fast slow quickly slowly speed direction toward towards
away across around along through from side sides position place places move moved stop stops stopped stay stays appear
disappear visible hidden shown seen see show shows look looks happen happens happened change changes changed become
becomes turn grow shrink bounce jump roll spin blink flash flashes flashing enter leave answer question option options
choose correct best letter word words sentence describe briefly detail explain tell name give list summarize order
following true false only single line letter code secret text message read reads written says digit digits
person people man woman child dog cat bird ball car cup mug coffee table book box bottle flower tree house street
road sky water sun light dark night day hand face room door window wall floor food game music clock phone
walk walking run running stand standing sit sitting play playing talk talking hold holding open opens close closes
pick puts put take takes make makes made use used using bright steady empty full new old good another together first
system user assistant helpful You are a please Please thank What Which When Where Who How Is Does Are Describe Count
The A It At In There Yes No They This Then After Before Both None I hello Hello sure Sorry know think maybe
A B C D E horizontally vertically upwards downwards leftwards rightwards clockwise
half whole part total exactly quarter least most between later earlier early late finally immediately
"""


def corpus():
    """Yields the lines that the merges are learnt from."""
    colors, shapes, places, motions, numbers, ordinals = lists = [
        words.split() for words in (COLORS, SHAPES, PLACES, MOTIONS, NUMBERS, ORDINALS)
    ]
    # Lower-case words mostly follow a space, capitalised ones mostly open a line; short answers are bare words.
    for word in WORDS.split():
        yield from (word if word[0].isupper() else f" {word}",) * 40
    for word in chain(*lists):
        yield from (f" {word}", word, word.capitalize()) * 40
    for color, shape in product(colors, shapes):
        yield f"What color is the {shape}? The {shape} is {color}.\nWhen does the {color} {shape} appear?"
        yield f"A {color} {shape}.\nHow many {color} {shape}s are there in the video?"
    for shape, motion, place in product(shapes, motions, places):
        yield f"The {shape} {motion} to the {place}, then it {motion} from the {place}."
    for ordinal, number in product(ordinals, numbers):
        yield f"There are {number} shapes; the {ordinal} one appears at Time 12.0s: after {number} seconds."
    for number in range(1000):
        yield from (f" {number}",) * 60
    for number in range(100):
        yield from (f"{number}",) * 60
    for tenth in range(10):
        yield from (f"Time 0.{tenth}s:",) * 60
    for word in WORLD_WORDS:
        yield from (f" {word}", word) * 60
    # The wordings that there were first; later ones are made of words that it knows.
    for text in chain(*(texts[:2] for kind, texts in TEXTS.items() if kind != "describe"), [CHOICE_PROMPT]):
        yield from (re.sub(r"{\w+}", "star", text),) * 60
    for letter in "ABCD":
        yield from (f"\n{letter}. a star\n",) * 60
    for _ in range(40):
        yield "system\nYou are a helpful assistant.\nuser\nassistant\nTime 0.0s:Describe the video.\n\n"


def build():
    """Learns the merges.

    Returns:
        The `tokenizers.Tokenizer`, special tokens included.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = ByteLevel(trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the corpus has too few distinct words for this vocabulary"
    return tokenizer


def write(folder):
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
        folder: Where to; made if it is not there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # The chat template is no part of these files: chat_template.jinja holds it, for the tokenizer and the processor.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # Qwen2's own class brings its own split
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "padding_side": "left",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    texts = {
        "tokenizer.json": build().to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the small checkpoint's tokenizer.")
    parser.add_argument("folder", help="where to write tokenizer.json and tokenizer_config.json")
    write(parser.parse_args().folder)
