"""The dense CRF."""

import sys

import numpy as np
import pytest

from moe_kernels.models.segmentation import crf


def scene():
    """A square on another ground, and probabilities that know it but for noise."""
    rng = np.random.default_rng(0)
    mask = np.zeros((40, 50), int)
    mask[12:28, 15:35] = 1
    image = np.where(mask[..., None] == 1, (200, 60, 40), (60, 120, 180)) + rng.integers(-8, 9, (40, 50, 3))
    foreground = np.clip(0.35 + 0.3 * mask + rng.normal(0, 0.25, mask.shape), 0.02, 0.98)
    rest = (1 - foreground) * 0.9
    return image.astype(np.uint8), np.stack([rest, foreground, 1 - foreground - rest]), mask


def test_noise_goes_and_edges_stay():
    pytest.importorskip("pydensecrf.densecrf")
    image, probabilities, mask = scene()
    before = (probabilities.argmax(0) != mask).mean()
    refined = crf.refine(image, probabilities)
    assert (refined.dtype, refined.shape) == (np.float32, probabilities.shape)
    np.testing.assert_allclose(refined.sum(0), 1, atol=1e-4)
    assert before > 0.15
    assert (refined.argmax(0) != mask).mean() < 0.01
    # without the colours edges are not seen
    blind = crf.refine(image, probabilities, bilateral=(80, 13, 0))
    assert (blind.argmax(0) != mask).mean() > 0.02


def test_the_defaults_are_the_authors():
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    image, probabilities, _ = scene()
    height, width = image.shape[:2]
    theirs = densecrf.DenseCRF2D(width, height, 3)
    theirs.setUnaryEnergy(-np.log(probabilities).reshape(3, -1).astype(np.float32))
    theirs.addPairwiseGaussian(sxy=(3, 3), compat=3)
    theirs.addPairwiseBilateral(sxy=(80, 80), srgb=(13, 13, 13), rgbim=image, compat=10)
    expected = np.array(theirs.inference(5)).reshape(3, height, width)
    np.testing.assert_allclose(crf.refine(image, probabilities), expected, atol=1e-5)
    fewer = np.array(theirs.inference(1)).reshape(3, height, width)
    np.testing.assert_allclose(crf.refine(image, probabilities, iterations=1), fewer, atol=1e-5)
    assert abs(fewer - expected).max() > 1e-3
    # arrays as they come: turned, float64, with zeros
    turned = np.ascontiguousarray(image.transpose(1, 0, 2)).transpose(1, 0, 2)
    np.testing.assert_allclose(crf.refine(turned, np.asfortranarray(probabilities)), expected, atol=1e-5)
    sure = np.stack([np.ones((height, width)), np.zeros((height, width))])
    assert (crf.refine(image, sure).argmax(0) == 0).all()
    # a probability of 0 is not beyond recall
    wrong = sure.copy()
    wrong[:, 20, 20] = 0, 1
    assert (crf.refine(np.full_like(image, 90), wrong).argmax(0) == 0).all()


def test_what_does_not_fit_is_refused():
    pytest.importorskip("pydensecrf.densecrf")
    image, probabilities, _ = scene()
    with pytest.raises(ValueError, match=r"image must be uint8 \(h, w, 3\), got float64 \(40, 50, 3\)"):
        crf.refine(image / 255, probabilities)
    with pytest.raises(ValueError, match=r"probabilities must be \(L, 40, 50\), got \(3, 40, 49\)"):
        crf.refine(image, probabilities[..., :-1])
    for bad in (probabilities * 2, probabilities - 1, np.where(probabilities < 0.02, np.nan, probabilities)):
        with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
            crf.refine(image, bad)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        crf.refine(image, probabilities, iterations=0)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    assert 'pip install "moe-kernels[crf]"' in crf.available()
    image, probabilities, _ = scene()
    with pytest.raises(RuntimeError, match=r"moe-kernels\[crf\]"):
        crf.refine(image, probabilities)


def test_available_with_the_package():
    pytest.importorskip("pydensecrf.densecrf")
    assert crf.available() == ""
