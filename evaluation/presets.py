"""The settings under which Video-XL-2's and VideoChat-Flash's benchmark results were published, and their prompts.

What is surprising:
* The published tables have three variants a benchmark: dense ("videomme"), chunked prefill ("videomme-chunk") and that
  with bi-level decoding ("videomme-bilevel"). The chunked VideoMME run used 300 frames, the others 400.
* For bi-level decoding the published code read the chunks to reload from files made by an external retriever. Here
  the question chooses them; chunk sizes are the published ones, where several were used the smaller.
* The published evaluator rewrites `mm:ss` in questions to seconds, and gets `hh:mm:ss` wrong. `rewrite_times` gets
  both right, so the few questions with hours are asked as they should have been.
* VideoChat-Flash's presets ("flash-videomme") are 512 frames by the model's own rule, of which 64 are the least; in
  LVBench 640, of folders of pictures a second apart. Dropping of visual tokens was off. Published LongVideoBench
  results had subtitles between the questions' words; that, and the instruction for Charades, is the task's to write.

Source: the evaluation scripts of the public Video-XL-2 and VideoChat-Flash code. Of the latter's VideoMME preamble the
middle, "to the following multiple-choice question based on the video", is lmms-eval's own wording.
"""

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass

# h:mm:ss or mm:ss, with a fraction perhaps. Not part of a longer run of digits and colons, so not a date or a ratio.
_TIME = re.compile(r"(?<![\d:.])(?:(\d{1,2}):([0-5]?\d)|(\d{1,3})):([0-5]\d)(\.\d+)?(?![\d:])")
_ANSWER_BY_LETTER = "Answer with the option's letter from the given choices directly."
_VIDEOMME_INSTRUCTION = (
    "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond "
    "with only the letter (A, B, C, or D) of the correct option.\n"
)
_FLASH_VIDEOMME_INSTRUCTION = (
    "These are the frames of a video. Select the best answer to the following multiple-choice question based on the "
    "video. Respond with only the letter (A, B, C, or D) of the correct option.\n"
)


def rewrite_times(text: str) -> str:
    """Writes clock times as seconds: "from 01:05 to 1:00:02" becomes "from 65 seconds to 3602 seconds"."""

    def seconds(match):
        hours, minutes, only_minutes, rest, fraction = match.groups()
        total = int(hours or 0) * 3600 + int(minutes or only_minutes) * 60 + int(rest)
        return f"{total}{fraction or ''} seconds"

    return _TIME.sub(seconds, text)


def options_of(doc: dict) -> list[str]:
    """The answer options of a question, as data sets spell them (`options`, `candidates`, or `option0` and so on)."""
    if found := doc.get("options") or doc.get("candidates"):
        return list(found)
    numbered = (doc.get(f"option{number}") for number in range(10))
    return [option for option in numbered if option not in (None, "N/A")]


def mlvu_prompt(doc: dict) -> str:
    """The question holds its options."""
    return f"\n{doc['question']}\nOnly give the best option.\n\nBest option: ("


def videomme_prompt(doc: dict) -> str:
    """The options stand in brackets as Python prints a list: that is how the results were made."""
    return f"{_VIDEOMME_INSTRUCTION}{doc['question']}\n{options_of(doc)}\n\n{_ANSWER_BY_LETTER}"


def longvideobench_prompt(doc: dict) -> str:
    """Without subtitles."""
    options = "".join(f"{chr(ord('A') + number)}. {option}\n" for number, option in enumerate(options_of(doc)))
    return f"{doc['question']}\n{options}{_ANSWER_BY_LETTER}\n"


def lvbench_prompt(doc: dict) -> str:
    """Letters stand twice, as published: "A. (A) ..."."""
    question, options = doc["question"], options_of(doc)
    if not options:  # the data set's own form: options in the lines behind the question
        question, *lines = question.split("\n")
        options = [line for line in lines if line.strip()]
    lettered = []
    for number, option in enumerate(options):
        letter = chr(ord("A") + number)
        lettered.append(f"{letter}. {option if option.startswith('(') else f'({letter}) {option}'}\n")
    return f"{question}\n{''.join(lettered)}{_ANSWER_BY_LETTER}"


def _question_and_options(doc: dict, mark: str, ending: str) -> str:
    """VideoChat-Flash's form; `mark` is a letter's, such as "(A) "."""
    options = options_of(doc)
    lettered = [mark.replace("A", chr(ord("A") + number)) + option for number, option in enumerate(options)]
    return "\n".join([f"Question: {doc['question']}", "Option:", *lettered, ending])


def flash_videomme_prompt(doc: dict) -> str:
    """Without subtitles; the options bring their letters."""
    return _FLASH_VIDEOMME_INSTRUCTION + _question_and_options(doc, "", _ANSWER_BY_LETTER)


def flash_mvbench_prompt(doc: dict) -> str:
    """Brackets around the letters."""
    return _question_and_options(doc, "(A) ", "Only give the best option.")


def flash_mlvu_prompt(doc: dict) -> str:
    """As for MVBench, with another ending."""
    return _question_and_options(doc, "(A) ", _ANSWER_BY_LETTER)


def flash_perceptiontest_prompt(doc: dict) -> str:
    """A dot behind the brackets."""
    return _question_and_options(doc, "(A). ", "Only give the best option.")


PROMPTS: dict[str, Callable[[dict], str]] = {
    "mlvu": mlvu_prompt,
    "videomme": videomme_prompt,
    "longvideobench": longvideobench_prompt,
    "lvbench": lvbench_prompt,
    "flash-videomme": flash_videomme_prompt,
    "flash-mvbench": flash_mvbench_prompt,
    "flash-mlvu": flash_mlvu_prompt,
    "flash-perceptiontest": flash_perceptiontest_prompt,
}


@dataclass(frozen=True)
class Preset:
    """Settings of one run.

    Attributes:
        prompt: A name of `PROMPTS`, or "task" for the prompt that lmms-eval's task writes.
        rewrite_times: Whether clock times in the prompt become seconds.
        max_num_frames, sample_fps, max_sample_fps: As in `chat`; a rate of 0 is None there.
        prefill, chunk_groups, window_chunks, decode, decode_chunk_groups, pool_size: Fields of `sparse_attention`.
        max_new_tokens: Longest answer; 0 leaves it to the task. Decoding is greedy unless the task samples.
    """

    prompt: str = "task"
    rewrite_times: bool = False
    max_num_frames: int = 512
    sample_fps: float = 1
    max_sample_fps: float = 4
    prefill: str = "full"
    chunk_groups: int = 4
    window_chunks: int = 3
    decode: str = "full"
    decode_chunk_groups: int = 4
    pool_size: int = 4
    max_new_tokens: int = 0

    def sparse_attention(self, reload: str | dict = "auto") -> dict:
        """The value for `model.config.sparse_attention`."""
        names = ("prefill", "chunk_groups", "window_chunks", "decode", "decode_chunk_groups", "pool_size")
        return {**{name: getattr(self, name) for name in names}, "reload": reload}

    def to_dict(self) -> dict:
        """Plain values, for a result file."""
        return asdict(self)


def _variants(name, dense, chunked, bilevel, decode_chunk_groups, max_new_tokens=16):
    """Three presets of (frames, chunk_groups, window_chunks)."""
    shared = {"prompt": name, "rewrite_times": True, "max_new_tokens": max_new_tokens}
    result = {name: Preset(max_num_frames=dense, **shared)}
    for suffix, (frames, groups, window) in (("chunk", chunked), ("bilevel", bilevel)):
        plan = {"prefill": "mask", "chunk_groups": groups, "window_chunks": window}
        if suffix == "bilevel":
            plan |= {"decode": "bilevel", "decode_chunk_groups": decode_chunk_groups}
        result[f"{name}-{suffix}"] = Preset(max_num_frames=frames, **plan, **shared)
    return result


PRESETS: dict[str, Preset] = {
    **_variants("mlvu", 256, (256, 4, 3), (256, 4, 3), 4),
    **_variants("videomme", 400, (300, 4, 3), (400, 4, 3), 6),
    **_variants("longvideobench", 400, (400, 6, 5), (400, 4, 3), 6, max_new_tokens=32),
    **_variants("lvbench", 600, (600, 4, 11), (600, 4, 11), 12),
    "flash-videomme": Preset("flash-videomme", max_new_tokens=16),
    "flash-mvbench": Preset("flash-mvbench", max_new_tokens=16),
    "flash-mlvu": Preset("flash-mlvu", max_new_tokens=16),
    "flash-perceptiontest": Preset("flash-perceptiontest", max_new_tokens=16),
    "flash-lvbench": Preset(max_num_frames=640, max_new_tokens=16),
    "flash-longvideobench": Preset(max_new_tokens=32),
    "flash-charades": Preset(max_new_tokens=50),
}
