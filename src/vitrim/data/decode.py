"""Recognize image files by extension, and decode them to 8-bit RGB `PIL.Image`.

Images are decoded as by torchvision's `ImageFolder`: first frame, no EXIF orientation, alpha dropped. The exception is
grayscale images of more than 8 bits. They are scaled to 8 bits, because Pillow's own conversion clips values above 255.
"""

import functools
import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from vitrim.words.errors import DataError
from vitrim.words.plain import reason

__all__ = ["IMAGE_ENDINGS", "decode", "ending", "is_image", "read_whole", "readable_endings", "to_rgb", "why_not_whole"]

_FORMATS = {
    "JPEG": ".jpg .jpeg .jpe .jfif",
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "BMP": ".bmp .dib",
    "GIF": ".gif",
    "TIFF": ".tif .tiff",
    "AVIF": ".avif",
    "PPM": ".ppm .pgm .pbm .pnm",
    "JPEG2000": ".jp2 .j2k",
    "TGA": ".tga",
}
# Formats that a build of Pillow may lack.
_OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
# Image formats that Pillow cannot read, or only by running another program.
_OTHERS = ".heic .heif .hif .jxl .svg .eps .psd .exr .cr2 .cr3 .nef .arw .dng .raw"

IMAGE_ENDINGS = frozenset(" ".join([*_FORMATS.values(), _OTHERS]).split())
"""File extensions of image formats, including those that this build of Pillow cannot read."""

# Pillow rejects more than 179 million pixels; 16-bit RGB of that size, not compressed, is 1.07e9 bytes.
_MOST_BYTES = 2**30
_SIXTEEN = 65535


@functools.cache
def readable_endings() -> frozenset[str]:
    """Return the file extensions that this build of Pillow reads as images, in lower case with the dot."""
    kept = [endings for name, endings in _FORMATS.items() if name not in _OPTIONAL or features.check(_OPTIONAL[name])]
    return frozenset(" ".join(kept).split())


def ending(name: str) -> str:
    """Return the extension of a file name, in lower case with the dot; empty if it has none."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 creating a Path for each of a million files takes seconds


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image."""
    return ending(name) in readable_endings()


def why_not_whole(size: int) -> str | None:
    """Return why an encoded image of `size` bytes is too large to be read, or None."""
    return f"it has {size:,} bytes and at most {_MOST_BYTES:,} are read" if size > _MOST_BYTES else None


def read_whole(path: Path) -> bytes:
    """Read an image file.

    Raises:
        DataError: the file cannot be read, or is larger than 1 GiB.
    """
    try:
        with path.open("rb") as stream:
            why = why_not_whole(os.fstat(stream.fileno()).st_size)
            if why is None:
                return stream.read(_MOST_BYTES)
    except OSError as problem:
        why = reason(problem)
    raise DataError(f"{path}: every image must be readable, but {why}; replace or remove this file")


def decode(data: bytes | BinaryIO, name: str) -> Image.Image:
    """Decode one image to RGB.

    Args:
        data: the encoded image.
        name: its file, for the error message.

    Raises:
        DataError: the image is damaged, or its values have no agreed range.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with Image.open(stream) as image:
            return to_rgb(image)
    except UnidentifiedImageError:
        why = "it is not an image that Pillow can read"
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and zlib.error for damaged files.
    except Exception as problem:
        why = reason(problem)
    raise DataError(
        f"{name}: every image must decode, but {why}; replace or remove this file, or set data.skip_damaged"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to 8-bit RGB.

    Args:
        image: image of any mode; grayscale of 9 to 16 bits is scaled so that the largest possible value becomes 255.

    Raises:
        ValueError: the image is 32-bit or floating point, which has no agreed range of values.
    """
    if image.mode.startswith("I;16"):
        return _scaled(image, 2 ** _bits(image) - 1)
    # 16-bit PNG in older releases of Pillow, and PGM of more than 8 bits, which Pillow scales to 16 bits.
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return _scaled(image, _SIXTEEN)
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode '{image.mode}' has no agreed range of values; convert it to 8 or 16 bits")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        # The direct conversion gives the same colors, but Pillow warns.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _bits(image: Image.Image) -> int:
    """Return the bits per value: 16, or fewer if tag 258 of a TIFF file says so, as for 12-bit cameras."""
    given = getattr(image, "tag_v2", {}).get(258, (16,))
    bits = given[0] if isinstance(given, tuple) else given
    return bits if 8 < bits < 16 else 16


def _scaled(image: Image.Image, most: int) -> Image.Image:
    values = np.asarray(image).astype(np.float32) * (255 / most)
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
