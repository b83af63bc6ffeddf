"""Decodes a file's bytes to an RGB image; refuses other formats and unknown ranges of values."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from tangent_ops.errors import SampleError

# Formats and their files' suffixes. PIL passes some others, such as EPS, to other programs.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
}
_TIFF_BITS, _TIFF_PHOTOMETRIC, _BLACK_IS_ZERO = 258, 262, 1


def decoded(read: bytes | Image.Image, sample: str) -> Image.Image:
    """A sample in RGB, from a file's bytes or from an image that is decoded already.

    Raises:
        SampleError: the image cannot be read, or the range of its values is unknown.
    """
    try:
        if isinstance(read, Image.Image):
            return to_rgb(read)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # odd EXIF data, palettes
            with Image.open(io.BytesIO(read), formats=tuple(FORMATS)) as image:
                return to_rgb(image)
    except UnidentifiedImageError as error:
        raise SampleError(
            f"sample {sample!r} is damaged, or cannot be read as an image: replace or remove it. "
            f"Formats are {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # decoders raise errors of many kinds
        raise SampleError(
            f"sample {sample!r} cannot be read as an image ({type(error).__name__}: {error}): "
            f"replace or remove it. Formats are {', '.join(FORMATS)}"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert as PIL does, but scale 16 bits to 8, where PIL would clip the values at 255.

    Raises:
        ValueError: integers of 32 bits, floats, or a TIFF of 12 bits or with white as zero.
    """
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", None)  # of a TIFF
        if tags is not None:
            found = tags.get(_TIFF_BITS), tags.get(_TIFF_PHOTOMETRIC)
            if found != ((16,), _BLACK_IS_ZERO):
                raise ValueError(
                    f"a TIFF in mode {image.mode} of {found[0]} bits, photometric {found[1]}: "
                    "expected 16 bits and 1, black is zero; save it with 8 bits a channel"
                )
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255
    elif image.mode in ("I", "F"):
        what = {"I": "integers of 32 bits", "F": "floats"}[image.mode]
        raise ValueError(
            f"mode {image.mode}, {what}, has no defined white: save it with 8 or 16 bits a channel"
        )
    return image.convert("RGB")
