"""Renders the demo clip: twenty-four seconds of the procedural world, of the split that nothing is trained on.

    python training/render_demo.py [assets/demo.mp4]

What is to be seen, in seconds:

     1 -  8   a sign with a 6
     3 -  5   a small green circle
     7 - 13   a small orange star
     9        a card: a purple ring, and the word EGG
    11 - 16   a small blue ring moves to the right
    14 - 22   a large red triangle, which turns cyan at 18
    19        a card: a red circle, and the word BOX
    23        a card: a yellow square, and a 4

Everything follows from the seed. The same PyAV writes the same pictures; another x264 may write other bytes.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # for `videoxl`, in a clone

from videoxl.video_world import Clip, make_clip  # noqa: E402

# Picked by eye: all that a clip can hold, on a calm background, nothing of it at the same time as something alike.
SEED, SECONDS = 324, 24
FPS, SIDE = 8, 192


def demo_clip() -> Clip:
    """The demo clip with every open question that it can answer, one wording each."""
    limits = {"shapes": 4, "signs": 1, "cards": 3, "chains": 0, "vivid": 0.0}
    return make_clip(SEED, split="demo", seconds=SECONDS, choice_share=0.0, **limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ROOT / "assets" / "demo.mp4"
    parser.add_argument("path", nargs="?", type=Path, default=default, help="file to write (default: assets/demo.mp4)")
    path = parser.parse_args().path
    path.parent.mkdir(parents=True, exist_ok=True)
    clip = demo_clip()
    clip.write_video(path, fps=FPS, side=SIDE)
    for question in clip.questions:
        print(f"{question.text}  {question.answer}")
    print(f"{path}: {path.stat().st_size} bytes, {SIDE}x{SIDE}, {FPS} fps, {SECONDS} s")


if __name__ == "__main__":
    main()
