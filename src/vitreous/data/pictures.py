"""Reading one picture file, whatever is in it, into 8-bit RGB or grey."""

from __future__ import annotations

import io
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    from .shards import Member

MAX_PIXELS = 64_000_000
MAX_BYTES = 512 * 1024 * 1024  # of memory that one picture may take while it is decoded and brought to 8 bits
# What Pillow and `to_8_bit` take for each pixel: decoded, turned upright, laid on white; and what some decoders take besides.
BYTES = {"1": 3, "L": 3, "P": 9, "RGB": 8, "YCbCr": 8, "CMYK": 12, "LAB": 12, "HSV": 12, "I": 9, "F": 8}
OTHER = 17  # with transparency, and modes that are rare
DECODER = {"JPEG2000": 16, "AVIF": 8, "WEBP": 8, "TIFF": 3}
MAX_ASPECT = 100  # beyond it, a resize of the shorter side would make millions of columns

# Only formats that decode in this process: EPS, for one, would start another program on the file.
Image.init()
WANTED = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
FORMATS = [f for f in WANTED if f in Image.OPEN]


class Unreadable(Exception):
    """A file that cannot be used as a picture; the message is the reason, fit for a list."""


def read_picture(path: Path | Member, probe: bool = False) -> Image.Image:
    """The picture at `path`, or in a shard, upright (EXIF), in mode `RGB` or `L`, 8 bits a channel.

    16-bit grey is scaled (÷ 257), transparency laid on white; of an animation the first frame is taken. With `probe`
    every byte is still read, but a JPEG is decoded at an eighth of its size: enough to learn whether it is whole.
    Raises `Unreadable` with the reason.
    """
    try:
        with Image.open(_bytes_of(path), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise Unreadable(f"{width} x {height} pixels: over {MAX_PIXELS // 10**6} megapixels, not decoded")
            told = 5 if image.mode.startswith("I;16") else OTHER if image.has_transparency_data else BYTES.get(image.mode, OTHER)
            needed = width * height * (told + DECODER.get(str(image.format), 0))
            if needed > MAX_BYTES:
                raise Unreadable(
                    f"{width} x {height} pixels need {needed >> 20} MB of memory: over {MAX_BYTES >> 20}, not decoded"
                )
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise Unreadable(f"{width} x {height} pixels: longer than {MAX_ASPECT} times its width")
            if probe:
                image.draft(None, (1, 1))
            image.load()
            return to_8_bit(ImageOps.exif_transpose(image))
    except Unreadable:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"over {MAX_PIXELS // 10**6} megapixels, not decoded (decompression bomb)") from error
    except UnidentifiedImageError as error:
        raise Unreadable("not a picture in a known format") from error
    except FileNotFoundError as error:
        raise Unreadable("broken link" if isinstance(path, Path) and path.is_symlink() else "no such file") from error
    except Exception as error:  # Pillow's decoders raise nearly every built-in kind on damaged files
        raise Unreadable(f"cannot be read: {getattr(error, 'strerror', None) or error or type(error).__name__}") from error


def _bytes_of(path: Path | Member) -> Path | io.BytesIO:
    """What Pillow opens. Raises `Unreadable` where there is nothing to decode."""
    if isinstance(path, Path):
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise Unreadable("not a regular file")
    if (info.st_size if isinstance(path, Path) else path.size) == 0:
        raise Unreadable("empty file (0 bytes)")
    return path if isinstance(path, Path) else io.BytesIO(path.read())


def to_8_bit(image: Image.Image) -> Image.Image:
    """`image`, of any mode that a file can have, in mode `RGB` or `L`. Raises `Unreadable` where the scale is unknown."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable("32-bit pixels outside 0 to 65535, whose scale is unknown")
        grey = np.empty(values.shape, np.uint8)
        for rows in range(0, len(values), 64):  # a few at a time: in between they are wider
            grey[rows : rows + 64] = (values[rows : rows + 64].astype(np.int64) + 128) // 257
        return Image.fromarray(grey)
    if image.mode == "F":
        raise Unreadable("floating-point pixels, whose scale is unknown")
    if image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", rgba.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("L" if image.mode in ("1", "L") else "RGB")
