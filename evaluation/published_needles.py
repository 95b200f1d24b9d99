"""The needles of VideoChat-Flash's published harness: one picture to find, or chains of pictures that lead to one.

What is surprising:
* A needle is a clip of its own: one picture, four times. It is inserted between frames of the haystack and replaces
  none, so a haystack of 1,000 frames and one needle has 1,004.
* Single-hop: one needle a haystack, behind `int(depth * frames)` frames. Multi-hop: the pictures of a sample stand at
  equal distances, one at either end, in the order of the sample, which is not that of the chain; distractors are among
  them. A chain is asked for twice: which caption fits its last picture, and a question about that.
* Both rules can cut a clip of the haystack in two. Here a needle then stands in front of that clip, at most three
  frames earlier (never on the published grid of single-hop lengths and depths).
* As published an answer is the first token, right if it is the letter, and a prompt says nothing about the length of
  the video. Published frames were padded to squares; here they are stretched, as `chat` does.

Source: `xtuner-eval_niah` of the public VideoChat-Flash code. Its pictures are in the data set OpenGVLab/NIAH-Video.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from videoxl.evaluation.haystacks import OPTION, Asked, Haystack, Needle, Settings
from videoxl.shell.records import read_json

KINDS = ("published_single", "published_caption", "published_qa")
RECIPES = {"published_single": ("published_single",), "published_multi_hop": ("published_caption", "published_qa")}
# Times that a needle's picture is shown: the frames of a clip.
NEEDLE_FRAMES = 4


def recipe_of(kind: str) -> str:
    """Which haystacks answer questions of a kind."""
    return next(recipe for recipe, kinds in RECIPES.items() if kind in kinds)


def is_right(answer: str, letter: str) -> bool:
    """The published rule: the answer without brackets is the letter, in any case."""
    return answer.strip().lower().replace("(", "").replace(")", "") == letter.lower()


def single_hop_place(length: int, depth: float) -> int:
    """Frames of the haystack in front of a needle at `depth`, 0 to 1."""
    return int(depth * length)


def multi_hop_places(length: int, count: int) -> list[int]:
    """Frames of the haystack in front of each of `count` pictures: equal distances, from the very start to the end."""
    distance = length / (count - 1)
    return [int(number * distance) for number in range(count - 1)] + [length]


@lru_cache(maxsize=4)
def read_samples(path: str, recipe: str) -> tuple[dict, ...]:
    """Reads a file of samples.

    Raises:
        FileNotFoundError, ValueError: If there is none, or it is of another form.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: --needles names the JSON file of the published needles")
    samples = read_json(path)
    needed = ("image", "question", "answer")
    if recipe == "published_multi_hop":
        needed = ("images", "question1", "answer1", "question2", "answer2")
    if not isinstance(samples, list) or not samples or not all(isinstance(sample, dict) for sample in samples):
        raise ValueError(f"{path} holds no list of samples, which {recipe} needs")
    for number, sample in enumerate(samples):
        if missing := [name for name in needed if name not in sample]:
            raise ValueError(f"{path}: sample {number} lacks {', '.join(missing)}, which {recipe} needs")
        if recipe == "published_multi_hop" and len(sample["images"]) < 2:
            raise ValueError(f"{path}: sample {number} has {len(sample['images'])} pictures, a chain has two or more")
    return tuple(samples)


def number_of_haystacks(recipe: str, settings: Settings, most: int | None) -> int:
    """Haystacks of a length: one a sample and, for single-hop, depth."""
    samples = len(read_samples(settings.published, recipe))
    samples = samples if most is None else min(samples, most)
    return samples * len(settings.depths) if recipe == "published_single" else samples


def published_haystack(recipe: str, length: int, number: int, settings: Settings) -> Haystack:
    """Plans a haystack of `length` frames of its own, and its needles.

    Raises:
        FileNotFoundError, ValueError: If samples or pictures are missing or do not fit.
    """
    samples = read_samples(settings.published, recipe)
    if recipe == "published_single":
        number_of_sample, place = divmod(number, len(settings.depths))
        sample, depth = samples[number_of_sample], settings.depths[place]
        names, places = [sample["image"]], [single_hop_place(length, depth / 100)]
        questions = [("published_single", sample["question"], sample["answer"], depth)]
    else:
        sample = samples[number]
        names, places = sample["images"], multi_hop_places(length, len(sample["images"]))
        questions = [
            ("published_caption", sample["question1"], sample["answer1"], None),
            ("published_qa", sample["question2"], sample["answer2"], None),
        ]
    needles = []
    for index, (name, place) in enumerate(zip(names, places, strict=True)):
        frame = place // NEEDLE_FRAMES * NEEDLE_FRAMES + index * NEEDLE_FRAMES
        needles.append(Needle(frame, NEEDLE_FRAMES, read_picture(settings, name)))
    evidence = tuple((needle.frame / settings.fps, (needle.frame + needle.count) / settings.fps) for needle in needles)
    asked = []
    for kind, text, answer, depth in questions:
        choices = tuple(option.strip() for _, option in OPTION.findall(text))
        asked.append(Asked(kind, depth, "published", text, answer, choices, evidence))
    return Haystack(recipe, length, number, tuple(needles), tuple(asked), inserted=True)


def read_picture(settings: Settings, name: str) -> np.ndarray:
    """A needle's picture, uint8 [S, S, 3], by its name in the samples or without the folders of that.

    Raises:
        FileNotFoundError: If it is not there.
    """
    folder = Path(settings.images or Path(settings.published).parent)
    found = next((path for path in (folder / name, folder / Path(name).name) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder / name} does not exist: --images names the folder with the needles' pictures (of the data set "
            "OpenGVLab/NIAH-Video)"
        )
    with Image.open(found) as image:
        return np.array(image.convert("RGB").resize((settings.size, settings.size), Image.Resampling.BICUBIC))


def published_scores(records: Iterable[dict]) -> list[dict]:
    """Per length what the published harness reports of multi-hop samples.

    Args:
        records: Of questions, see `niah.py`.

    Returns:
        `length`, `samples`, `score` (the mean of the next two), `caption_score`, `qa_score`, and of how many samples
        `both`, `only_caption`, `only_qa` or `none` of the two questions were answered rightly. Only samples of which
        both were asked count.
    """
    pairs: dict[tuple[int, str], dict[str, bool]] = {}
    for record in records:
        if record["kind"] in RECIPES["published_multi_hop"]:
            pairs.setdefault((record["length"], record["haystack"]), {})[record["kind"]] = record["correct"]
    scores = []
    for length in sorted({length for length, _ in pairs}):
        verdicts = [
            (pair["published_caption"], pair["published_qa"])
            for (own, _), pair in pairs.items()
            if own == length and len(pair) == 2
        ]
        if verdicts:
            scores.append({"length": length, "samples": len(verdicts), **_scores(verdicts)})
    return scores


def _scores(verdicts: Sequence[tuple[bool, bool]]) -> dict:
    caption, qa = (sum(verdict[place] for verdict in verdicts) / len(verdicts) for place in (0, 1))
    counts = {
        "both": verdicts.count((True, True)),
        "only_caption": verdicts.count((True, False)),
        "only_qa": verdicts.count((False, True)),
        "none": verdicts.count((False, False)),
    }
    means = {"score": (caption + qa) / 2, "caption_score": caption, "qa_score": qa}
    return {name: round(value, 4) for name, value in means.items()} | counts
