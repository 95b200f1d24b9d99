"""Clips: what is where and when, and the frames that show it.

A clip has a background, two lanes in which shapes and signs come and go, and cards that fill the frame for a second.
All of it happens at whole seconds. Lanes lie one above the other (shapes move left or right) or side by side (up or
down); a moving shape crosses its lane once per appearance.

S side of a frame in pixels, F frames.
"""

import os
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from .drawing import (
    COLORS,
    DIGITS,
    SHAPES,
    SIZES,
    WORDS,
    background,
    compress,
    draw_needle,
    paste,
    scenery,
    shape_sprite,
    sign_sprite,
)
from .questions import Question, clip_questions

# Each split has random streams of its own; new ones go to the end.
SPLITS = ("train", "held_out", "demo")
LONGEST_VISIBLE = 10  # seconds
SEGMENT_SECONDS = 64  # of a haystack
CARD_DISTANCE = 4  # seconds, at least, from one card to the next


@dataclass(frozen=True)
class Item:
    """Something that comes and goes in a lane: a shape (`color`, `shape`, `size`) or a sign (`text`)."""

    spans: tuple[tuple[int, int], ...]  # visible from, until, in seconds from the clip's first frame
    lane: int
    place: float  # along the lane, 0 to 1
    color: str = ""
    shape: str = ""
    size: str = ""
    text: str = ""
    direction: str = ""  # "left", "right", "up", "down", or "" for one that stays
    change: tuple[int, str] | None = None  # from this second on it has this colour

    def span_at(self, second: float) -> tuple[int, int] | None:
        return next((span for span in self.spans if span[0] <= second < span[1]), None)


@dataclass(frozen=True)
class Card:
    """A card that fills the frame in [second, second + seconds): `key` is (colour, shape) or a word."""

    second: int
    key: tuple[str, str] | str
    value: str
    seconds: int = 1


@dataclass(frozen=True)
class Clip:
    """A clip and its questions. Times are in seconds; the first frame's is `start`."""

    seconds: int
    start: float
    size: int
    columns: bool  # lanes side by side
    items: tuple[Item, ...]
    cards: tuple[Card, ...]
    backdrop: np.ndarray  # [S, S, 3] float32
    noise: np.ndarray  # [S, S, 3] float32, shifted from frame to frame
    cuts: tuple[tuple[int, np.ndarray], ...] = ()  # from this second on there is this backdrop
    loss: float = 0.0  # of compression, see `drawing.compress`
    questions: tuple[Question, ...] = ()

    def frames(self, times) -> np.ndarray:
        """The pictures at `times` (start <= t < start + seconds), uint8 [F, S, S, 3].

        Raises:
            ValueError: On a time outside the clip.
        """
        frames = np.empty((len(times), self.size, self.size, 3), np.uint8)
        for number, time in enumerate(times):
            if not self.start <= time < self.start + self.seconds:
                raise ValueError(f"the clip lasts from {self.start} to {self.start + self.seconds} s, not at {time} s")
            frames[number] = self._frame(time - self.start)
        return frames

    def _frame(self, second: float) -> np.ndarray:
        frame = self._drawn(second)
        if self.loss:
            frame = compress(frame.astype(np.float32), self.loss)
        return np.clip(np.rint(frame), 0, 255).astype(np.uint8)

    def _drawn(self, second: float) -> np.ndarray:
        for card in self.cards:
            if card.second <= second < card.second + card.seconds:
                return draw_needle(card.key, card.value, self.size)
        frame = next((after for begin, after in reversed(self.cuts) if begin <= second), self.backdrop).copy()
        for item in self.items:
            if item.span_at(second) is not None:
                x, y = self.place_of(item, second)
                paste(frame, self._sprite(item, second), x * self.size, y * self.size)
        shift = int(second * 8) * 7
        return frame + np.roll(self.noise, (shift, shift // self.size), axis=(0, 1))

    def _sprite(self, item: Item, second: float) -> np.ndarray:
        if item.text:
            return sign_sprite(item.text, self.size)
        color = item.change[1] if item.change and second >= item.change[0] else item.color
        return shape_sprite(item.shape, color, round(SIZES[item.size] * self.size))

    def place_of(self, item: Item, second: float) -> tuple[float, float]:
        """The centre (x, y) of a visible item, 0 to 1 from the left and from the top."""
        begin, end = item.span_at(second)
        along = item.place
        if item.direction:
            along = 0.15 + 0.7 * (second - begin) / (end - begin)
            along = 1 - along if item.direction in ("left", "up") else along
        height, width = (side / self.size for side in self._sprite(item, second).shape[:2])
        half = (height if self.columns else width) / 2
        along, across = min(max(along, half), 1 - half), (0.27, 0.73)[item.lane]
        if self.columns:
            # A board is wider than a lane; it must not stick out of the frame.
            return min(max(across, width / 2), 1 - width / 2), along
        return along, across

    def write_video(self, path: str | os.PathLike, fps: int = 8, side: int = 192) -> None:
        """Writes the clip as H.264 in MP4, `side` pixels wide and high."""
        import av
        from PIL import Image

        with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "+faststart"}) as out:
            stream = out.add_stream("libx264", rate=fps, options={"crf": "20", "preset": "fast", "threads": "1"})
            stream.width = stream.height = side
            stream.pix_fmt, stream.gop_size = "yuv420p", 2 * fps
            for number in range(self.seconds * fps):
                picture = Image.fromarray(self.frames([self.start + float(Fraction(number, fps))])[0])
                out.mux(
                    stream.encode(av.VideoFrame.from_image(picture.resize((side, side), Image.Resampling.BICUBIC)))
                )
            out.mux(stream.encode())


def _streams(split: str, seed: int, purpose: int) -> np.random.Generator:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return np.random.default_rng([SPLITS.index(split), int(seed), purpose])


def make_clip(
    seed: int,
    split: str = "train",
    seconds: int = 16,
    *,
    size: int = 48,
    start: float = 0.0,
    num_questions: int | None = None,
    kinds: dict[str, float] | tuple[str, ...] | None = None,
    choice_share: float = 0.3,
    shapes: int | None = None,
    signs: int | None = None,
    cards: int | None = None,
    chains: int | None = None,
    vivid: float = 0.2,
    lifelike: float = 0.0,
    wordings: int = 2,
) -> Clip:
    """Makes the clip of a seed.

    Args:
        seed: Any non-negative integer; each split has clips of its own for it.
        split: One of `SPLITS`.
        seconds: Length, at least 1.
        size: Side of the frames in pixels.
        start: Time of the first frame.
        num_questions: How many questions to draw (None: all that can be asked).
        kinds: Question types to draw from, with or without weights (None: all but `questions.OPTIONAL`).
        choice_share: Share of the questions that offer options to choose from.
        shapes, signs, cards: At most so many of each (None: drawn by length).
        chains: Pairs of cards of which the first names the second (None: drawn).
        vivid: Probability of a background with colours and edges.
        lifelike: Probability of what films have, too: landscapes, cuts, stronger noise, traces of compression. What
            happens, and what is asked, is the same with and without it.
        wordings: How many wordings of each question there are to draw from, at most `questions.WORDINGS`.

    Raises:
        ValueError: On an unknown split or kind, or a length below 1.
    """
    if seconds < 1:
        raise ValueError(f"seconds must be at least 1, got {seconds!r}")
    rng = _streams(split, seed, 0)
    columns = bool(rng.random() < 0.5)
    items = _items(rng, seconds, columns, shapes, signs)
    placed = _cards(rng, seconds, items, cards, chains)
    clip = Clip(
        seconds=int(seconds),
        start=start,
        size=size,
        columns=columns,
        items=items,
        cards=placed,
        backdrop=background(rng, size, bool(rng.random() < vivid)),
        noise=rng.normal(0, rng.uniform(0, 5), (size, size, 3)).astype(np.float32),
    )
    film = np.random.default_rng([SPLITS.index(split), int(seed), 0, 1])
    if film.random() < lifelike:
        clip = replace(clip, **_film(film, clip))
    return replace(
        clip, questions=clip_questions(clip, _streams(split, seed, 1), num_questions, kinds, choice_share, wordings)
    )


def _film(rng, clip) -> dict:
    """What makes a clip look like a film: landscapes, cuts, noise, compression."""

    def view():
        return scenery(rng, clip.size) if rng.random() < 0.7 else background(rng, clip.size, bool(rng.random() < 0.5))

    cuts = rng.integers(1, max(clip.seconds, 2), rng.integers(0, 2 + clip.seconds // 8))
    return {
        "backdrop": view(),
        "noise": rng.normal(0, rng.uniform(0, 9), clip.noise.shape).astype(np.float32),
        "cuts": tuple((second, view()) for second in sorted(set(cuts.tolist()))),
        "loss": float(rng.uniform(4, 20)) if rng.random() < 0.7 else 0.0,
    }


def _items(rng, seconds, columns, shapes, signs) -> tuple[Item, ...]:
    """Shapes and signs, placed so that nothing in a lane meets; those that do not fit are left out."""
    most = max(1, min(6, seconds // 3))
    shapes = int(rng.integers(1, most + 1)) if shapes is None else min(shapes, len(SHAPES))
    signs = int(rng.integers(0, 3 if seconds > 8 else 2)) if signs is None else signs
    wanted = [("shape", shape) for shape in rng.permutation(SHAPES)[:shapes]]
    # Mostly different colours; now and then one twice, so that colour alone does not name a shape.
    colors = [str(color) for color in rng.permutation(list(COLORS))]
    texts = [str(text) for text in rng.permutation(WORDS)[:1]] + [str(text) for text in rng.permutation(DIGITS)[:1]]
    wanted += [("sign", text) for text in rng.permutation(texts)[:signs]]
    taken, items = ([], []), []
    for number in rng.permutation(len(wanted)):
        kind, name = wanted[number]
        moving = kind == "shape" and rng.random() < 0.4
        times = 1
        if kind == "shape" and not moving and seconds >= 16 and rng.random() < 0.25:
            times = int(rng.integers(2, 4))
        lane = int(rng.integers(2))
        spans = []
        for _ in range(times):
            span = _free_span(rng, seconds, taken[lane], 6 if moving else LONGEST_VISIBLE, 3 if moving else 2)
            if span is not None:
                taken[lane].append(span)
                spans.append(span)
        if not spans:
            continue
        spans, facts = tuple(sorted(spans)), {}
        if kind == "sign":
            facts = {"text": str(name)}
        else:
            color = colors[number] if rng.random() < 0.85 else str(rng.choice(list(COLORS)))
            facts = {"shape": str(name), "color": color, "size": str(rng.choice(list(SIZES)))}
            if moving:
                facts["direction"] = str(rng.choice(("up", "down") if columns else ("left", "right")))
            elif len(spans) == 1 and spans[0][1] - spans[0][0] >= 4 and rng.random() < 0.3:
                new = str(rng.choice([name for name in COLORS if name != facts["color"]]))
                facts["change"] = (int(rng.integers(spans[0][0] + 2, spans[0][1] - 1)), new)
        items.append(Item(spans, lane, float(rng.uniform(0.2, 0.8)), **facts))
    return tuple(sorted(items, key=lambda item: item.spans))


def _free_span(rng, seconds, taken, longest, shortest) -> tuple[int, int] | None:
    """A span of whole seconds at least one second away from all in `taken`, or None."""
    for _ in range(12):
        length = int(rng.integers(min(shortest, seconds), min(longest, seconds) + 1))
        begin = int(rng.integers(0, seconds - length + 1))
        if all(begin + length < other[0] or begin > other[1] for other in taken):
            return begin, begin + length
    return None


def _cards(rng, seconds, items, cards, chains) -> tuple[Card, ...]:
    """Cards at seconds in which nothing else begins or ends."""
    most = min(4, seconds // 4)
    cards = int(rng.integers(0, most + 1)) if cards is None else cards
    chains = int(cards >= 2 and rng.random() < 0.5) if chains is None else chains
    busy = {edge + shift for item in items for span in item.spans for edge in span for shift in (-1, 0)}
    busy |= {item.change[0] + shift for item in items if item.change for shift in (-1, 0)}
    free = [second for second in range(seconds) if second not in busy] or range(seconds)
    seconds_free = []
    for second in map(int, rng.permutation(free)):
        # Apart, so that no group of four frames holds two.
        if len(seconds_free) < cards and all(abs(second - other) >= CARD_DISTANCE for other in seconds_free):
            seconds_free.append(second)
    keys = [(str(c), str(s)) for c in COLORS for s in SHAPES]
    keys = [keys[index] for index in rng.permutation(len(keys))[: len(seconds_free)]]
    words = [str(word) for word in rng.permutation(WORDS)]
    placed = []
    for number, (second, key) in enumerate(zip(seconds_free, keys, strict=True)):
        # Once all words were there, some are there twice.
        value = (words.pop() if words else str(rng.choice(WORDS))) if rng.random() < 0.6 else str(rng.choice(DIGITS))
        if chains and number % 2 == 1 and number // 2 < chains:
            # The card before leads here: it shows a word, this one has the word as its key.
            word = words.pop()
            previous = placed[-1]
            placed[-1] = Card(previous.second, previous.key, word)
            key, value = word, str(rng.choice(DIGITS))
        placed.append(Card(second, key, value))
    return tuple(sorted(placed, key=lambda card: card.second))


def haystack_frames(seed: int, times, size: int = 48, split: str = "held_out", lifelike: float = 0.0) -> np.ndarray:
    """Ordinary scenes without cards, one after the other, as long as wanted.

    Args:
        seed: Of the haystack.
        times: Seconds, ascending.
        size, split, lifelike: See `make_clip`.

    Returns:
        uint8 [len(times), size, size, 3].
    """
    frames, clip, segment = np.empty((len(times), size, size, 3), np.uint8), None, None
    for number, time in enumerate(times):
        if segment != (segment := int(time // SEGMENT_SECONDS)):
            clip_seed = int(_streams(split, seed, 2 + segment).integers(2**31))
            options = {"size": size, "num_questions": 0, "cards": 0, "lifelike": lifelike}
            clip = make_clip(clip_seed, split, SEGMENT_SECONDS, **options)
        frames[number] = clip.frames([time % SEGMENT_SECONDS])[0]
    return frames
