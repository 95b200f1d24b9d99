"""Pictures of the world: shapes, signs, cards and backgrounds, drawn from numbers at any size.

Sprites are drawn large and averaged down, so edges are smooth, and kept: a clip of a minute is a few milliseconds.

S side of a frame in pixels.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 225),
    "yellow": (245, 220, 30),
    "orange": (250, 135, 15),
    "purple": (135, 40, 170),
    "pink": (250, 130, 190),
    "cyan": (40, 205, 220),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.24, "large": 0.42}  # of a frame's side
WORDS = (
    *("sun", "cat", "dog", "key", "cup", "box", "car", "hat"),
    *("bus", "fox", "pig", "cow", "bee", "egg", "jam", "map"),
)
DIGITS = tuple("0123456789")
INK, PAPER = (15, 15, 15), (250, 250, 250)
_OVERSAMPLING = 6
BLOCK = 8  # side, in pixels, of what `compress` quantises together


def _polygon(points: int, inner: float, turn: float) -> list[tuple[float, float]]:
    """Corners, in [0, 1], of a star with `points` tips (or, at `inner` 0, a regular polygon)."""
    corners = []
    for index in range(2 * points if inner else points):
        radius = inner if inner and index % 2 else 1.0
        angle = math.pi * (2 * index / (2 * points if inner else points) + turn)
        corners.append((0.5 + radius * math.cos(angle) / 2, 0.5 + radius * math.sin(angle) / 2))
    return corners


@functools.lru_cache(maxsize=4096)
def shape_sprite(shape: str, color: str, side: int) -> np.ndarray:
    """A coloured shape, [side, side, 4] float32: colour 0-255 and opacity 0-1."""
    large = side * _OVERSAMPLING
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, large - 1, large - 1), fill=255)
        if shape == "ring":
            edge = large * 0.27
            draw.ellipse((edge, edge, large - edge, large - edge), fill=0)
    elif shape == "square":
        edge = large * 0.06
        draw.rectangle((edge, edge, large - edge, large - edge), fill=255)
    elif shape == "cross":
        for box in ((0.34, 0, 0.66, 1), (0, 0.34, 1, 0.66)):
            draw.rectangle([large * value for value in box], fill=255)
    else:
        corners = [(0.5, 0.03), (0.0, 0.95), (1.0, 0.95)] if shape == "triangle" else _polygon(5, 0.42, -0.5)
        draw.polygon([(large * x, large * y) for x, y in corners], fill=255)
    return _sprite(mask, COLORS[color], side, side)


@functools.lru_cache(maxsize=1024)
def text_sprite(text: str, height: int) -> np.ndarray:
    """Dark text in capitals, cropped to its ink and scaled to `height`, [height, width, 4] float32."""
    font = ImageFont.load_default(size=height * _OVERSAMPLING)
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text.upper(), stroke_width=2))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), text.upper(), fill=255, font=font, stroke_width=2)
    width = max(1, round((right - left) * height / (bottom - top)))
    return _sprite(mask, INK, width, height)


def _sprite(mask: Image.Image, color, width: int, height: int) -> np.ndarray:
    opacity = np.asarray(mask.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255
    sprite = np.empty((height, width, 4), np.float32)
    sprite[..., :3], sprite[..., 3] = color, opacity
    return sprite


def paste(frame: np.ndarray, sprite: np.ndarray, x: float, y: float) -> None:
    """Blends a sprite into a float frame [S, S, 3] in place, centred at (x, y) in pixels; what sticks out is cut."""
    height, width = sprite.shape[:2]
    left, top = round(x - width / 2), round(y - height / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, frame.shape[1]), min(top + height, frame.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    part = sprite[y0 - top : y1 - top, x0 - left : x1 - left]
    target = frame[y0:y1, x0:x1]
    target += (part[..., :3] - target) * part[..., 3:]


@functools.lru_cache(maxsize=1024)
def sign_sprite(text: str, frame_side: int) -> np.ndarray:
    """A sign: a word or digit on a pale board, about 0.4 of the frame high, [height, width, 4]."""
    ink = text_sprite(text, round(0.26 * frame_side))
    margin = max(1, round(0.06 * frame_side))
    height, width = ink.shape[0] + 2 * margin, ink.shape[1] + 2 * margin
    board = np.empty((height, width, 4), np.float32)
    board[..., :3], board[..., 3] = PAPER, 1
    colors = board[..., :3]
    paste(colors, ink, width / 2, height / 2)
    return board


@functools.lru_cache(maxsize=8192)
def _card(key: tuple[str, str] | str, value: str, size: int) -> np.ndarray:
    frame = np.empty((size, size, 3), np.float32)
    frame[:] = PAPER
    edge = max(1, round(size / 24))
    frame[:edge] = frame[-edge:] = frame[:, :edge] = frame[:, -edge:] = INK
    if isinstance(key, str):
        top = text_sprite(key, round(0.26 * size))
    else:
        color, shape = key
        top = shape_sprite(shape, color, round(0.42 * size))
    paste(frame, top, size / 2, 0.29 * size)
    frame[round(0.53 * size) : round(0.53 * size) + max(1, edge // 2), edge:-edge] = INK
    paste(frame, text_sprite(value, round(0.26 * size)), size / 2, 0.75 * size)
    return frame


def draw_needle(key: tuple[str, str] | str, value: str, size: int) -> np.ndarray:
    """A card that fills the frame: above the line its key, below it its value.

    Args:
        key: (colour, shape), or a word (a card that another card's word leads to).
        value: A word or digit.
        size: Side in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    return np.rint(_card(key, value, size)).astype(np.uint8)


def background(rng: np.random.Generator, size: int, vivid: bool) -> np.ndarray:
    """A cloudy background, float32 [size, size, 3]: muted, or (`vivid`) with colours, edges and contrast."""
    base = rng.uniform(50, 205)
    image = np.full((size, size, 3), base, np.float32)
    for cells in (2, 4, 8) if not vivid else (2, 3, 6, 12):
        # A few random values, magnified smoothly: clouds of several sizes.
        amplitude = (70 if vivid else 28) / cells**0.5
        grey = rng.normal(0, 1, (cells, cells, 1)).astype(np.float32)
        tint = rng.normal(0, 0.8 if vivid else 0.15, (cells, cells, 3)).astype(np.float32)
        clouds = amplitude * (grey + tint)
        for channel in range(3):
            part = Image.fromarray(np.ascontiguousarray(clouds[..., channel]))
            image[..., channel] += np.asarray(part.resize((size, size), Image.Resampling.BICUBIC))
    if vivid:
        for _ in range(rng.integers(0, 5)):
            (x0, x1), (y0, y1) = np.sort(rng.integers(0, size + 1, 2)), np.sort(rng.integers(0, size + 1, 2))
            image[y0:y1, x0:x1] += rng.normal(0, 45, 3)
    return np.clip(image, 0, 255)


def scenery(rng: np.random.Generator, size: int) -> np.ndarray:
    """A landscape, float32 [size, size, 3]: a graded sky, hills one behind the other, a tiled floor in perspective."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    sky = rng.uniform(70, 220, (2, 3))
    image = sky[0] + (sky[1] - sky[0]) * y[..., None]
    horizon = rng.uniform(0.4, 0.75)
    for depth in range(int(rng.integers(1, 4))):
        waves, turns = rng.uniform(3, 14, 3), rng.uniform(0, 6, 3)
        height = sum(np.sin(wave * x + turn) / wave for wave, turn in zip(waves, turns, strict=True))
        ridge = horizon - 0.25 + 0.12 * depth - rng.uniform(0.1, 0.6) * height
        shade = rng.uniform(40, 190, 3) * (1 - 0.3 * (y - ridge).clip(0, 1))[..., None]
        image = np.where((y > ridge)[..., None], shade, image)
    # Tiles get narrower towards the horizon.
    far = 1 / (y - horizon + 0.08).clip(0.05)
    columns, rows = rng.uniform(1, 4), rng.uniform(0.3, 1.5)
    tiles = np.sign(np.sin(columns * (x - rng.uniform(0, 1)) * far) * np.sin(rows * far * 3))
    floor = rng.uniform(50, 190, 3) + rng.uniform(4, 22) * tiles[..., None]
    image = np.where((y > horizon)[..., None], floor, image)
    return np.clip(image, 0, 255).astype(np.float32)


@functools.lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """The cosine transform of a block's rows, [BLOCK, BLOCK], orthonormal."""
    places = np.arange(BLOCK)
    matrix = np.cos(np.pi * (2 * places + 1) * places[:, None] / (2 * BLOCK)) * (2 / BLOCK) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.astype(np.float32)


# From red, green, blue to brightness and two differences of colour, as JPEG and H.264 have them.
_BRIGHTNESS = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], dtype=np.float32
)


def compress(frame: np.ndarray, loss: float) -> np.ndarray:
    """What an encoder leaves of a picture: cosines of blocks in steps, coarser for fine detail and for colours.

    Args:
        frame: float32 [S, S, 3], 0 to 255.
        loss: Width of the steps of brightness; 4 is hardly seen, 40 blurs words.

    Returns:
        float32 [S, S, 3], not clipped.
    """
    size = len(frame)
    room = -size % BLOCK
    planes = np.pad(frame, ((0, room), (0, room), (0, 0)), mode="edge") @ _BRIGHTNESS.T
    side = (size + room) // BLOCK
    blocks = planes.reshape(side, BLOCK, side, BLOCK, 3).transpose(0, 2, 4, 1, 3)
    cosines = _cosines()
    finer = np.arange(BLOCK)
    steps = loss * (1 + (finer[:, None] + finer) / 6) * np.array([1, 2, 2])[:, None, None]
    kept = np.rint((cosines @ blocks @ cosines.T) / steps) * steps
    blocks = (cosines.T @ kept.astype(np.float32) @ cosines).transpose(0, 3, 1, 4, 2)
    planes = blocks.reshape(size + room, size + room, 3)[:size, :size]
    return planes @ np.linalg.inv(_BRIGHTNESS).T.astype(np.float32)
