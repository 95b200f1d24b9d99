"""Haystacks with needles: where they stand, what is asked about them, and the frames, block by block.

What is surprising:
* One haystack carries many needles, several at each depth, each with a key of its own. A question asks for one of
  them and the others distract from it: harder than one needle a haystack, and far cheaper.
* The first needle of a depth stands exactly there, the others in a band around it (`SPREAD` of the length), so that at
  the ends not all of them fall into the first and last chunk, which bi-level decoding always keeps dense.
* "Which came first" and "how many" ask for a whole haystack, not for a depth; their haystacks hold few cards.
* Everything follows from seed, length and number, not from how many haystacks are asked for: more can be added later.

S side of a frame in pixels, F frames.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from videoxl import Sampling, open_video, video_world
from videoxl.shell.records import read_json

KINDS = ("single", "multi_hop", "ordering", "counting")
# Seeds go by place: new ones to the end. The last two are `published_needles`'.
RECIPES = ("single", "multi_hop", "few", "photos", "published_single", "published_multi_hop")
# Width of the band of one depth, as a share of the haystack's length.
SPREAD = 0.05
# Frames between two needles, at least: they never share a group of 4 frames.
GAP = 3
# Chains of two cards at one depth, at most: each needs a word of its own that leads from card to card.
CHAINS_PER_DEPTH = 3
# Cards in a haystack of ordering and counting questions.
FEW_CARDS = (1, 2, 3, 4)
# "Which card comes first" questions in such a haystack.
PAIRS = 2
# Share of the cards that show a word, the others show a digit.
WORD_SHARE = 0.6
# Frames that are made and encoded at once: whole scenes of 64 s, whole groups of 4 frames.
BLOCK_FRAMES = 512

OPTION = re.compile(r"^(?:Options: ?)?\(([A-Z])\) ?(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Needle:
    """Frames [frame, frame + count) that show `picture`, uint8 [S, S, 3]."""

    frame: int
    count: int
    picture: np.ndarray


@dataclass(frozen=True)
class Asked:
    """A question about a haystack.

    Attributes:
        kind: One of `KINDS`, or of `published_needles.KINDS`.
        depth: Of the needle that holds the answer, in percent; None where the whole haystack is asked for.
        type, text, answer, choices, evidence: As in `video_world.Question`.
    """

    kind: str
    depth: float | None
    type: str
    text: str
    answer: str
    choices: tuple[str, ...] | None
    evidence: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Haystack:
    """The `number`-th haystack of a recipe and a length (in frames): its needles in order, and the questions.

    Needles stand in place of frames or, `inserted`, between them.
    """

    recipe: str
    length: int
    number: int
    needles: tuple[Needle, ...]
    asked: tuple[Asked, ...]
    inserted: bool = False

    @property
    def total(self) -> int:
        """Frames, inserted needles included."""
        return self.length + self.inserted * sum(needle.count for needle in self.needles)

    @property
    def name(self) -> str:
        return f"{self.recipe}/{self.length}/{self.number}"


@dataclass(frozen=True)
class Settings:
    """What all haystacks of a run have in common.

    Attributes:
        seed: Of everything random.
        size: S.
        fps: Frames a second; timestamps are `frame / fps`.
        depths: In percent of the length.
        needles_per_depth: At most so many in one haystack.
        needle_frames: Frames that show one needle.
        options: Whether questions offer options.
        split: Of the procedural world.
        photos: Folder with `qa.json` and pictures, instead of cards.
        published, images: File of published needles, and the folder of their pictures, see `published_needles`.
    """

    seed: int = 0
    size: int = 48
    fps: float = 1.0
    depths: tuple[float, ...] = (0.0, 25.0, 50.0, 75.0, 100.0)
    needles_per_depth: int = 4
    needle_frames: int = 1
    options: bool = False
    split: str = "held_out"
    photos: str | None = None
    published: str | None = None
    images: str | None = None


def place(targets: Sequence[int | None], length: int, count: int, rng: np.random.Generator) -> list[int]:
    """Frames at which needles start, none nearer to another than `GAP` frames.

    Args:
        targets: Per needle, the wanted frame (None: anywhere). The first one with a target gets the free frame nearest
            to it; one whose target is taken gets a random free frame of the band around it.
        length: Frames of the haystack.
        count: Frames of a needle.

    Raises:
        ValueError: If they do not fit.
    """
    free = np.zeros(length, dtype=bool)
    free[: max(length - count + 1, 0)] = True
    placed, seen = [], set()
    for target in targets:
        candidates = np.flatnonzero(free)
        if target is not None and target in seen:
            low = min(max(target - SPREAD * length / 2, 0), max(length - count - SPREAD * length, 0))
            candidates = candidates[(candidates >= low) & (candidates <= low + SPREAD * length)]
        if len(candidates) == 0:
            raise ValueError(
                f"{len(targets)} needles of {count} frames do not fit into {length} frames with {GAP} frames between "
                "them: ask for fewer depths or needles, or longer haystacks"
            )
        if target is None or target in seen:
            frame = int(rng.choice(candidates))
        else:
            frame = int(candidates[np.abs(candidates - target).argmin()])
        seen.add(target)
        placed.append(frame)
        free[max(frame - count - GAP + 1, 0) : frame + count + GAP] = False
    return placed


def targets_of(depths: Sequence[float], each: int, length: int, count: int) -> list[int]:
    """The frames at the depths, `each` times: 0 % is the first, 100 % the last at which a needle can start."""
    return [round(depth / 100 * (length - count)) for _ in range(each) for depth in depths]


def recipe_of(kind: str, settings: Settings) -> str:
    """Which haystacks answer questions of a kind.

    Raises:
        ValueError: On an unknown kind, or one that photos cannot serve.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if settings.photos is not None:
        if kind != "single":
            raise ValueError(
                f"needles from pictures serve kind single only, not {kind}; leave --needles out for cards"
            )
        return "photos"
    return kind if kind in ("single", "multi_hop") else "few"


def needles_at_depth(recipe: str, length: int, settings: Settings) -> int:
    """Questions of a haystack of this recipe and length about one depth."""
    # Half of what the band could hold: what was placed at random must leave room for the next.
    fit = 1 + int(SPREAD * length / (settings.needle_frames + GAP) / 2)
    most = {"multi_hop": CHAINS_PER_DEPTH, "photos": 1}.get(recipe, settings.needles_per_depth)
    return max(1, min(settings.needles_per_depth, most, fit))


def make_haystack(recipe: str, length: int, number: int, settings: Settings) -> Haystack:
    """Plans a haystack: needles and questions, no frames yet.

    Raises:
        ValueError: If the needles do not fit, or more keys are wanted than there are.
    """
    rng = np.random.default_rng([settings.seed, length, number, RECIPES.index(recipe)])
    if recipe == "photos":
        return _photo_haystack(length, number, settings, rng)
    count = settings.needle_frames
    keys = [(color, shape) for color in video_world.COLORS for shape in video_world.SHAPES]
    keys = [keys[index] for index in rng.permutation(len(keys))]
    words, digits = [str(word) for word in rng.permutation(video_world.WORDS)], list(video_world.DIGITS)
    depths: list[float | None] = []
    cards: list[tuple] = []  # (key, value)
    each = needles_at_depth(recipe, length, settings)
    targets = targets_of(settings.depths, each, length, count)
    needed = {"single": len(targets), "multi_hop": len(targets), "few": FEW_CARDS[number % len(FEW_CARDS)]}[recipe]
    if needed > len(keys) or (recipe == "multi_hop" and needed > len(words)):
        raise ValueError(
            f"{needed} needles a haystack need as many keys, there are {len(keys)} (and {len(words)} words that lead "
            "from card to card): ask for fewer depths or needles per depth"
        )

    def value():
        return str(rng.choice(words)) if rng.random() < WORD_SHARE else str(rng.choice(digits))

    if recipe == "single":
        cards, depths = [(keys[index], value()) for index in range(needed)], list(settings.depths) * each
    elif recipe == "few":
        cards, targets, depths = [(keys[index], value()) for index in range(needed)], [None] * needed, [None] * needed
    else:
        # The second cards stand at the depths, the first ones, which name them, anywhere.
        cards = [(words[index], str(rng.choice(digits))) for index in range(needed)]
        cards += [(keys[index], words[index]) for index in range(needed)]
        depths, targets = [*list(settings.depths) * each, *[None] * needed], targets + [None] * needed
    frames = place(targets, length, count, rng)
    order = sorted(range(len(cards)), key=frames.__getitem__)
    seconds = count / settings.fps
    shown = [video_world.Card(frames[index] / settings.fps, *cards[index], seconds) for index in order]
    depth_at = {card.second: depths[index] for card, index in zip(shown, order, strict=True)}
    needles = tuple(
        Needle(frames[index], count, video_world.draw_needle(*cards[index], settings.size)) for index in order
    )
    asked = []
    for kind in KINDS:
        if recipe_of(kind, settings) == recipe:
            questions = video_world.needle_questions(shown, kind, rng, choice_share=float(settings.options))
            if kind == "ordering":
                pairs = [question for question in questions if question.type == "card_first"]
                chosen = [pairs[index] for index in rng.permutation(len(pairs))[:PAIRS]]
                questions = [question for question in questions if question.type != "card_first"] + chosen
            for question in questions:
                depth = depth_at[question.evidence[-1][0]] if recipe != "few" else None
                facts = question.type, question.text, question.answer, question.choices, question.evidence
                asked.append(Asked(kind, depth, *facts))
    return Haystack(recipe, length, number, needles, tuple(asked))


def _photo_haystack(length: int, number: int, settings: Settings, rng) -> Haystack:
    photos = read_photos(settings.photos, settings.size)
    if not settings.options:
        raise ValueError("the questions of needles from pictures have their options in the text: use --options")
    if len(photos) < len(settings.depths):
        raise ValueError(f"{len(photos)} pictures cannot stand at {len(settings.depths)} depths: give fewer depths")
    count = settings.needle_frames
    frames = place(targets_of(settings.depths, 1, length, count), length, count, rng)
    needles, asked = [], []
    for index, (frame, depth) in enumerate(zip(frames, settings.depths, strict=True)):
        picture, text, answer, choices = photos[(number + index) % len(photos)]
        needles.append(Needle(frame, count, picture))
        evidence = ((frame / settings.fps, (frame + count) / settings.fps),)
        asked.append(Asked("single", depth, "photo", text, answer, choices, evidence))
    needles.sort(key=lambda needle: needle.frame)
    return Haystack("photos", length, number, tuple(needles), tuple(asked))


def read_photos(folder: str, size: int) -> list[tuple[np.ndarray, str, str, tuple[str, ...]]]:
    """Reads needles from pictures: (picture uint8 [S, S, 3], question, letter, options) each.

    Args:
        folder: Holds `qa.json` with the lists `needle` (file names), `retrieval_question` (with options such as
            "(A) cat", one a line) and `answer` (letters), as published for VideoChat-Flash and Video-XL.
        size: S; pictures are stretched to a square, as frames are.

    Raises:
        FileNotFoundError, ValueError: If something is missing or the lists do not fit together.
    """
    path = Path(folder) / "qa.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: needles from pictures need qa.json beside them")
    lists = read_json(path)
    names = ("needle", "retrieval_question", "answer")
    if missing := [name for name in names if not isinstance(lists.get(name), list)]:
        raise ValueError(f"{path} has no list {missing[0]!r}; it needs {', '.join(names)}")
    photos = []
    for name, question, answer in zip(*(lists[name] for name in names), strict=True):
        options = dict(OPTION.findall(question))
        if answer not in options or sorted(options) != [chr(ord("A") + index) for index in range(len(options))]:
            raise ValueError(f"{path}: the question about {name} needs options (A), (B), ..., {answer!r} among them")
        with Image.open(path.parent / name) as image:
            picture = np.array(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
        photos.append((picture, question, answer, tuple(options[letter].strip() for letter in sorted(options))))
    return photos


class GeneratedFrames:
    """Ordinary scenes of the procedural world, without cards."""

    def __init__(self, settings: Settings):
        self._settings = settings

    def block(self, haystack: Haystack, first: int, stop: int) -> np.ndarray:
        """Frames [first, stop), uint8 [F, S, S, 3]."""
        settings = self._settings
        numbers = [settings.seed, haystack.length, haystack.number, RECIPES.index(haystack.recipe)]
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        times = [frame / settings.fps for frame in range(first, stop)]
        return video_world.haystack_frames(seed, times, settings.size, settings.split)


class FilmFrames:
    """Frames of a video file, in order, from a random frame on, begun again at its end.

    Args:
        path: Of the file. It is sampled once, at the settings' rate, or evenly where it is longer than `most` frames.
        settings: For size, rate and seed.
        most: The longest haystack, in frames.

    Raises:
        FileNotFoundError, ValueError: If the file cannot be read.
    """

    def __init__(self, path: str, settings: Settings, most: int):
        rate = Sampling(most, settings.fps, settings.fps)
        with open_video(path, size=settings.size, sampling=rate) as film:
            batches = [batch.frames.permute(0, 2, 3, 1).numpy() for batch in film]
        self._frames, self._settings = np.concatenate(batches), settings

    def block(self, haystack: Haystack, first: int, stop: int) -> np.ndarray:
        """Frames [first, stop), uint8 [F, S, S, 3]."""
        numbers = [self._settings.seed, haystack.length, haystack.number, RECIPES.index(haystack.recipe)]
        # Published haystacks begin with their film.
        begin = 0 if haystack.inserted else int(np.random.default_rng(numbers).integers(len(self._frames)))
        return self._frames[(begin + np.arange(first, stop)) % len(self._frames)]


def blocks(haystack: Haystack, source, settings: Settings) -> Iterator[tuple[np.ndarray, list[float]]]:
    """The haystack with its needles, as (frames uint8 [F, S, S, 3], their seconds), `BLOCK_FRAMES` at a time."""
    for first in range(0, haystack.total, BLOCK_FRAMES):
        stop = min(first + BLOCK_FRAMES, haystack.total)
        frames = _inserted(haystack, source, first, stop) if haystack.inserted else source.block(haystack, first, stop)
        for needle in haystack.needles:
            frames[max(needle.frame - first, 0) : max(needle.frame + needle.count - first, 0)] = needle.picture
        yield frames, [frame / settings.fps for frame in range(first, stop)]


def _inserted(haystack: Haystack, source, first: int, stop: int) -> np.ndarray:
    """Frames [first, stop) with room for the needles between them."""
    own = np.ones(haystack.total, dtype=bool)
    for needle in haystack.needles:
        own[needle.frame : needle.frame + needle.count] = False
    begin, here = int(own[:first].sum()), own[first:stop]
    frames = np.zeros((stop - first, *haystack.needles[0].picture.shape), dtype=np.uint8)
    if here.any():
        frames[here] = source.block(haystack, begin, begin + int(here.sum()))
    return frames


def encode(checkpoint, haystack: Haystack, source, settings: Settings, store=None):
    """Encodes a haystack block by block, so that its frames are never held all at once; an `EncodedVideo`."""
    video = None
    for frames, times in blocks(haystack, source, settings):
        if video is None:
            options = {"timestamps": times, "progress": False, "store": store}
            video = checkpoint.model.encode_video(frames, checkpoint.tokenizer, **options)
        else:
            video.append(frames, times)
    return video
