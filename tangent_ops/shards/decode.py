"""From a file's bytes to an image in RGB: in known formats, and at their depth, or not at all."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image

from tangent_ops.errors import SampleError

# And the ends of their files' names. PIL hands some others to programs of the system, EPS say.
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
    """A sample in RGB: of a file's bytes, or of an image that was decoded elsewhere.

    Raises:
        SampleError: it is no image that can be read, or of numbers whose range nobody knows.
    """
    try:
        if isinstance(read, Image.Image):
            return to_rgb(read)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # odd EXIF data, palettes
            with Image.open(io.BytesIO(read), formats=tuple(FORMATS)) as image:
                return to_rgb(image)
    except Exception as error:  # a decoder raises what it likes
        raise SampleError(
            f"sample {sample!r} is no image that can be read ({type(error).__name__}: {error}): "
            f"replace or remove it. Formats are {', '.join(FORMATS)}"
        ) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """As PIL converts it; but 16 bits are scaled to 8, where PIL cuts them off at 255: white.

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
            f"mode {image.mode}, {what}, has no range that is white: save it with 8 or 16 bits a "
            "channel"
        )
    return image.convert("RGB")
