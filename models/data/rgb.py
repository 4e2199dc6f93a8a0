"""Image files of any mode as RGB."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
# Of these formats Pillow keeps 16 bits in integers of 32, as it always does or in older releases.
_WIDENED = ("PNG", "PPM")


def read_rgb(file: str | os.PathLike[str], *, over_white: bool = True) -> Image.Image:
    """The picture of an image file, :func:`in_rgb`.

    A note of the camera on how to turn it (EXIF) is not followed: the pixels are as they are stored.

    Raises:
        Exception: of many kinds, as Pillow's decoders raise it, when the file is missing, truncated or no image.
        ValueError: values without a defined range, floats or integers of 32 bits.
    """
    with Image.open(file) as image:
        return in_rgb(image, over_white=over_white)


def in_rgb(image: Image.Image, *, over_white: bool = True) -> Image.Image:
    """An image of any mode in RGB.

    16-bit grey is scaled: 65535 is white. (Pillow's own conversion shows all above 255 as white.) Opaque images of 8
    bits are as Pillow converts them.

    Args:
        over_white: lay what is transparent over white, as a viewer shows it; else show what lies under it, as Pillow's
            conversion does, and with it torchvision's ``ImageFolder`` and DomainBed.

    Raises:
        ValueError: values without a defined range, floats or integers of 32 bits.
    """
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _WIDENED):
        values = np.asarray(image).astype(np.int64)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)
        if over_white and "transparency" in image.info:  # of PNG: the value that is
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ValueError(f"expected 8 or 16 bits a channel, got {kind} of 32 bits, whose black and white are unknown")
    if over_white and image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")
