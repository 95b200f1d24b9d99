"""Images to square tiles, cut as the published code cuts them ("anyres").

What is surprising:
* An image is fitted, keeping its shape, into one of several grids of tiles: the one in which most of its own pixels
  survive, of these the one with the least empty space. What stays empty is black, and the tiles are cut row by row.
* The published code of Video-XL also squashes the whole image into a first tile, and drops that tile in front of the
  language model. Here it is not made.
* VideoChat-Flash keeps that tile (the "overview"), and stretches the image over the grid for the others.
* Each tile becomes one group of visual tokens, as if it were `frames_per_group` equal frames (one frame in
  VideoChat-Flash), and has no timestamp.

Shapes: T tiles, S side of a tile, H x W the image.
"""

import math
import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, features

from .video_index_videoxl import AnyFile, MemoryFile, open_bytes

try:
    import pillow_heif
except (ImportError, OSError):  # OSError: a wheel whose shared libraries this system lacks
    pillow_heif = None

# PostScript: PIL would have Ghostscript run it, whatever the file is called.
PROGRAM_FORMATS = ("EPS",)
# White of grey of 32 bits and of floats, whose files do not say it: the first of these that no pixel exceeds. Floats
# may exceed 1 a little where it is their white. With negative levels it is the brightest pixel, and black the darkest.
_WHITES = (255.0, 65535.0, 2.0**31 - 1, 2.0**32 - 1)
_FLOAT_WHITES = (2.0, 255.0, 65535.0)
# The tag of a TIFF that says which numbers its levels are, and its value for those without a sign.
_SAMPLE_FORMAT, _UNSIGNED = 339, 1
# Largest number of rows and of columns, where no grids are given (36 grids; Video-XL-2's own list).
MAX_GRID_SIDE = 6


# Files with these endings are images, unless they begin otherwise; everything else is a video (animated GIFs, too).
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".heic", ".heif", ".hif", ".avif"),
)
# Files that begin so are images, whatever they are called, or videos. JPEG pictures in a row are a video.
_IMAGE_HEADS = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n|II\*\0|MM\0\*|RIFF....WEBP|BM....\0\0\0\0", re.DOTALL)
_VIDEO_HEADS = re.compile(rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI |GIF8|FLV\x01|OggS|\0\0\x01\xba", re.DOTALL)
_JPEG_ROWS = (".mjpeg", ".mjpg")
# Photos of phones, and AVIF: by the brand of the file; sequences have others (hevc, avis, msf1).
_HEIF_HEADS = re.compile(rb"....ftyp(?:hei[cxms]|mif1|avif)", re.DOTALL)


def file_head(path: AnyFile) -> bytes:
    """How a file begins; nothing of what cannot be read."""
    try:
        with open_bytes(path) as file:
            return file.read(16)
    except (OSError, ValueError):
        return b""


def is_heif(path: AnyFile) -> bool:
    """Whether a file is a photo as HEIC, HEIF or AVIF, of which video readers see tiles only."""
    return _HEIF_HEADS.match(file_head(path)) is not None


def is_image_file(path: AnyFile) -> bool:
    """Whether a file is one image, not a video.

    How it begins decides, and its ending where that says nothing or there is no such file.
    """
    head, name = file_head(path), str(path).lower()
    if _HEIF_HEADS.match(head) or (_IMAGE_HEADS.match(head) and not name.endswith(_JPEG_ROWS)):
        return True
    return name.endswith(IMAGE_SUFFIXES) and not _VIDEO_HEADS.match(head)


@contextmanager
def reading_image(name: str):
    """Turns what PIL raises on a broken image, a dozen types of error, into a `ValueError` that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} is too large to be read safely ({error}); save it smaller, or, if you trust it, raise "
            "PIL.Image.MAX_IMAGE_PIXELS."
        ) from error
    except Exception as error:
        reason = re.sub(r" <_io\.[^>]*>", "", str(error)) or type(error).__name__
        raise ValueError(f"{name} is no image that can be read ({reason}); save or copy it again.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image in RGB; grey of 16 and 32 bits and of floats, which PIL would cut off at 255, is scaled to it."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image.convert("RGB")
    levels = np.asarray(image)
    if image.mode == "I" and _UNSIGNED in getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT, ()):
        levels = levels.view(np.uint32)  # a TIFF's; PIL has no mode for them
    return Image.fromarray(_to_bytes(levels)).convert("RGB")


def _to_bytes(levels: np.ndarray) -> np.ndarray:
    """Numbers of any kind and shape as uint8 of the same shape."""
    kind, size = levels.dtype.kind, levels.dtype.itemsize
    if levels.dtype == np.uint8 or levels.size == 0:
        return levels.astype(np.uint8)
    levels = np.nan_to_num(levels.astype(np.float64), posinf=0, neginf=0)
    black, white = min(levels.min(), 0.0), levels.max()
    if (kind, size) == ("u", 2):
        white = 65535.0
    elif black == 0:
        white = next((level for level in (_FLOAT_WHITES if kind == "f" else _WHITES) if white <= level), white)
        white = 1.0 if kind == "b" or (kind == "f" and white == _FLOAT_WHITES[0]) else white
    scaled = (levels - black) * (255 / ((white - black) or 1))
    return np.clip(scaled, 0, 255).round().astype(np.uint8)


def _open_heif(path: AnyFile) -> Image.Image | None:
    """A HEIF photo in whole and upright; None for an AVIF, which PIL reads."""
    if b"avif" in file_head(path) and features.check("avif"):
        return None
    if pillow_heif is None:
        raise ValueError(
            f"{path}: a photo as HEIC, HEIF or AVIF needs the package pillow-heif, which is not here. Install it, "
            "or save the photo as JPEG."
        )
    with reading_image(str(path)), open_bytes(path) as file:
        return pillow_heif.open_heif(file).to_pillow()


def existing_image(path: str) -> str:
    """Returns the path of an image file; FileNotFoundError if there is none, ValueError if it is an address."""
    if not os.path.exists(path):
        if re.match(r"[A-Za-z][A-Za-z0-9+.\-]*:", path):
            raise ValueError(f"{path:.100} is an address; only local files are opened. Download it, pass the path.")
        raise FileNotFoundError(f"{path:.300}: no such image file (looked from {os.getcwd()}).")
    return path


def load_image(source: Any) -> Image.Image:
    """Opens an image, turned as its EXIF data say, in RGB.

    Args:
        source: Path of a local file, the content of one, a PIL image, or an array [H, W, 3] or [H, W]: uint8, or other
            numbers, whose largest is taken to be white as `_WHITES` says.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Anything that is no image, is broken, or too large.
    """
    name = getattr(source, "filename", None) or "the image"
    if isinstance(source, (np.ndarray, torch.Tensor)):
        pixels = source
        if isinstance(source, torch.Tensor):
            pixels = (source.float() if source.is_floating_point() else source).detach().cpu().numpy()
        if pixels.dtype.kind not in "buif" or pixels.ndim not in (2, 3) or (*pixels.shape, 3)[2] not in (1, 3):
            raise ValueError(
                f"an image as an array must be uint8 [H, W, 3], or numbers [H, W], got {pixels.dtype} {pixels.shape}"
            )
        pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
        source = Image.fromarray(np.ascontiguousarray(_to_bytes(pixels))) if pixels.size else Image.new("L", (0, 0))
    elif isinstance(source, (str, os.PathLike, MemoryFile)):
        path = source if isinstance(source, MemoryFile) else existing_image(os.fspath(source))
        name = str(path)
        source = _open_heif(path) if is_heif(path) else None
        if source is None:
            with reading_image(name), open_bytes(path) as file, Image.open(file) as source:
                if source.format in PROGRAM_FORMATS:
                    raise ValueError(f"{source.format}, which another program would have to draw")
                source.load()
    elif not isinstance(source, Image.Image):
        raise ValueError(f"an image must be a path, a PIL image or uint8 [H, W, 3], got {type(source).__name__}.")
    if 0 in source.size:
        raise ValueError(f"an image needs pixels, got one of size {source.size}.")
    with reading_image(name):
        return ImageOps.exif_transpose(to_rgb(source))


def choose_grid(size: tuple[int, int], grids: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The grid that keeps most of an image's pixels; of several the one with the least empty space, then the first.

    Args:
        size: (width, height) of the image.
        grids: (width, height) of each grid, in pixels.
    """
    width, height = size

    def worth(grid):
        scale = min(grid[0] / width, grid[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - grid[0] * grid[1]

    return max(grids, key=worth)


def cut_tiles(image: Image.Image, size: int, grids: Sequence[tuple[int, int]] | None = None) -> torch.Tensor:
    """Fits an image into its grid and cuts it (see the module docstring).

    Args:
        image: In RGB.
        size: S, in pixels.
        grids: (width, height) of each grid in pixels, multiples of S; None for all of 1 to 6 columns and rows.

    Returns:
        uint8 [T, 3, S, S], row by row.

    Raises:
        ValueError: On a grid that is not made of whole tiles.
    """
    grid = choose_grid(image.size, _checked_grids(size, grids))
    (width, height), (full_width, full_height) = image.size, grid
    # The scale first, as published: rounding up what it gives can add a pixel to an exact quotient.
    across, down = full_width / width, full_height / height
    if across < down:
        fitted = full_width, min(math.ceil(height * across), full_height)
    else:
        fitted = min(math.ceil(width * down), full_width), full_height
    canvas = Image.new("RGB", grid)
    resized = image.resize(fitted, Image.Resampling.BICUBIC)
    canvas.paste(resized, ((full_width - fitted[0]) // 2, (full_height - fitted[1]) // 2))
    return _cut(canvas, size).flatten(0, 1)


def tile_image(image: Image.Image, size: int, grids=None, tiling: str = "pad") -> torch.Tensor:
    """Cuts an image into the tiles that the model takes.

    Args:
        image, size, grids: See `cut_tiles`.
        tiling: `"pad"` or `"overview"`, see `VideoXLConfig.image_tiling`.

    Returns:
        uint8 [T, 1, 3, S, S]; with an overview [1 + rows, columns, 3, S, S], whose first row holds copies of it.

    Raises:
        ValueError: On a grid that is not made of whole tiles.
    """
    if tiling == "pad":
        return cut_tiles(image, size, grids)[:, None]
    grid = choose_grid(image.size, _checked_grids(size, grids))
    overview, tiles = (_cut(image.resize(to, Image.Resampling.BICUBIC), size) for to in ((size, size), grid))
    return torch.cat([overview.expand(-1, tiles.shape[1], -1, -1, -1), tiles])


def count_tiles(tiles: torch.Tensor) -> int:
    """T, the tiles in what `tile_image` returns; copies of the overview do not count."""
    return 1 + (tiles.shape[0] - 1) * tiles.shape[1]


def _checked_grids(size, grids):
    sides = range(size, size * MAX_GRID_SIDE + 1, size)
    grids = (
        [tuple(grid) for grid in grids] if grids is not None and len(grids) else [(x, y) for x in sides for y in sides]
    )
    if wrong := [grid for grid in grids if len(grid) != 2 or any(side <= 0 or side % size for side in grid)]:
        raise ValueError(f"image_grid_pinpoints must be pairs of multiples of {size} pixels, got {wrong[0]}")
    return grids


def _cut(image, size):
    """uint8 [rows, columns, 3, S, S]."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).contiguous()
