"""The fully connected CRF of Krähenbühl and Koltun (2011), through pydensecrf2."""

from __future__ import annotations

import numpy as np


def available() -> str:
    """Empty where it can be used, else why it cannot and what would help."""
    try:
        import pydensecrf.densecrf  # noqa: F401
    except ImportError as error:
        return f'the dense CRF needs pydensecrf2 ({error}): pip install "moe-kernels[crf]"'
    return ""


def refine(
    image: np.ndarray,
    probabilities: np.ndarray,
    *,
    iterations: int = 5,
    gaussian: tuple[float, float] = (3.0, 3.0),
    bilateral: tuple[float, float, float] = (80.0, 13.0, 10.0),
) -> np.ndarray:
    """Class probabilities after some iterations of mean field, float32 (L, h, w).

    The defaults are those of the authors' code: unaries −log p, both kernels normalized symmetrically. Others are in
    use: DeepLab's are ``iterations=10, gaussian=(1, 3), bilateral=(67, 3, 4)``.

    Args:
        image: uint8 (h, w, 3), RGB.
        probabilities: (L, h, w) in [0, 1], at the size of the image; below 1e-5 they count as that.
        gaussian: the width in pixels and the weight of the kernel of places.
        bilateral: the widths in pixels and in values of a colour, and the weight, of the kernel of places and colours.

    Raises:
        RuntimeError: pydensecrf2 is not installed.
        ValueError: shapes, dtypes or values that do not fit.
    """
    if why := available():
        raise RuntimeError(why)
    from pydensecrf.densecrf import DenseCRF2D
    from pydensecrf.utils import unary_from_softmax

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 (h, w, 3), got {image.dtype} {image.shape}")
    height, width = image.shape[:2]
    if probabilities.ndim != 3 or probabilities.shape[1:] != (height, width):
        raise ValueError(f"probabilities must be (L, {height}, {width}), got {probabilities.shape}")
    if not 0 <= probabilities.min() <= probabilities.max() <= 1 + 1e-4:  # NaN fails too
        raise ValueError(f"probabilities must be in [0, 1], got {probabilities.min()} … {probabilities.max()}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    labels = len(probabilities)
    crf = DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(unary_from_softmax(np.ascontiguousarray(probabilities, np.float32), clip=1e-5))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    place, colour, weight = bilateral
    crf.addPairwiseBilateral(sxy=place, srgb=colour, rgbim=np.ascontiguousarray(image), compat=weight)
    return np.array(crf.inference(iterations), np.float32).reshape(labels, height, width)
