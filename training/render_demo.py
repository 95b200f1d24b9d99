"""Renders the demo clip: sixteen seconds of plain shapes with a story that can be asked about.

    python training/render_demo.py [assets/demo.mp4]

The story, in seconds:

    0 - 4    a red circle enters from the left and stops in the middle
    6        a blue square appears on the right
    8 - 11   the circle rises and leaves at the top
    12       the background turns from white to green
    13       a yellow triangle appears on the left

A counter at the lower left shows the whole seconds, so a frame tells its own time. Everything is drawn from numbers:
no font, no randomness, one encoder thread. The same PyAV and Pillow write the same bytes; another x264 may not.
"""

import argparse
import os
from pathlib import Path

import av
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 320, 240
FPS = 24
SECONDS = 16
# Shapes are drawn this many times larger and averaged down: smooth edges without a drawing library.
OVERSAMPLING = 3

WHITE, GREEN = (244, 242, 236), (60, 150, 90)
RED, BLUE, YELLOW, BLACK = (214, 40, 40), (30, 80, 200), (250, 205, 40), (25, 25, 25)

# Seven-segment digits; the bars are numbered from the top, left before right:  _ 0   |1 |2   _ 3   |4 |5   _ 6
SEGMENTS = ["012456", "25", "02346", "02356", "1235", "01356", "013456", "025", "0123456", "012356"]


def _between(seconds: float, start: float, end: float) -> float:
    """How much of [start, end] is over, from 0 to 1, slow at both ends."""
    share = min(max((seconds - start) / (end - start), 0.0), 1.0)
    return share * share * (3 - 2 * share)


def _draw_digit(draw: ImageDraw.ImageDraw, digit: int, left: float, top: float, size: float) -> None:
    """A digit `size` wide and twice as high."""
    bar = size / 5
    for segment in map(int, SEGMENTS[digit]):
        if segment in (0, 3, 6):
            y = top + (segment // 3) * (size - bar / 2)
            box = (left, y, left + size, y + bar)
        else:
            x = left + (size - bar if segment in (2, 5) else 0)
            y = top + (size - bar / 2 if segment > 3 else 0)
            box = (x, y, x + bar, y + size + bar / 2)
        draw.rectangle(box, fill=BLACK)


def draw_frame(seconds: float) -> Image.Image:
    """The picture at a time of the story, WIDTH x HEIGHT."""
    scale = OVERSAMPLING
    image = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), GREEN if seconds >= 12 else WHITE)
    draw = ImageDraw.Draw(image)

    radius = 34
    x = -radius + (WIDTH / 2 + radius) * _between(seconds, 0, 4)
    y = HEIGHT / 2 - (HEIGHT / 2 + radius + 2) * _between(seconds, 8, 11)
    draw.ellipse([scale * value for value in (x - radius, y - radius, x + radius, y + radius)], fill=RED)
    if seconds >= 6:
        draw.rectangle([scale * value for value in (236, 92, 292, 148)], fill=BLUE)
    if seconds >= 13:
        draw.polygon([scale * value for value in (64, 84, 30, 148, 98, 148)], fill=YELLOW)

    for place, digit in enumerate(f"{int(seconds):02d}"):
        _draw_digit(draw, int(digit), scale * (14 + 22 * place), scale * 198, scale * 15)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.BOX)


def render(path: str | os.PathLike) -> None:
    """Writes the clip as H.264 in MP4."""
    # Bit-exact muxing leaves out the version of the muxer; one thread makes the encoder's decisions repeatable.
    with av.open(os.fspath(path), "w", format="mp4", options={"fflags": "+bitexact", "movflags": "+faststart"}) as out:
        options = {"crf": "23", "preset": "slow", "threads": "1", "flags": "+bitexact"}
        stream = out.add_stream("libx264", rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = WIDTH, HEIGHT, "yuv420p", 2 * FPS
        for number in range(FPS * SECONDS):
            out.mux(stream.encode(av.VideoFrame.from_image(draw_frame(number / FPS))))
        out.mux(stream.encode())


def main() -> None:
    default = Path(__file__).resolve().parent.parent / "assets" / "demo.mp4"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", type=Path, default=default, help="file to write (default: assets/demo.mp4)")
    path = parser.parse_args().path
    path.parent.mkdir(parents=True, exist_ok=True)
    render(path)
    print(f"{path}: {path.stat().st_size} bytes, {WIDTH}x{HEIGHT}, {FPS} fps, {SECONDS} s")


if __name__ == "__main__":
    main()
