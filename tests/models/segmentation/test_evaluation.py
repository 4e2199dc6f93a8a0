"""Intersection over union."""

import numpy as np
import pytest

from moe_kernels.models.segmentation.evaluation import MeanIoU


def by_hand(pairs, classes):
    """From the definition, pixel by pixel."""
    hit, union = np.zeros(classes), np.zeros(classes)
    for prediction, mask in pairs:
        for p, m in zip(prediction.ravel().tolist(), mask.ravel().tolist(), strict=True):
            if m != 255:
                hit[m] += p == m
                for label in {p, m}:
                    union[label] += 1
    return [h / u if u else None for h, u in zip(hit, union, strict=True)]


def test_one_matrix_over_all_images():
    rng = np.random.default_rng(0)
    pairs = []
    for size in ((5, 7), (9, 4), (6, 6)):
        mask = rng.integers(0, 4, size).astype(np.uint8)
        mask[rng.random(size) < 0.2] = 255
        # class 3 is predicted only; the network says anything at ignored pixels
        pairs.append((rng.integers(0, 5, size), np.where(mask == 3, 0, mask)))
    metric = MeanIoU(["a", "b", "c", "d", "e"])
    for prediction, mask in pairs:
        metric.update(prediction, mask)
    mean, each = metric.compute()
    expected = by_hand(pairs, 6)
    assert list(each) == ["background", "a", "b", "c", "d", "e"]
    assert list(each.values()) == pytest.approx(expected, abs=1e-6)
    assert each["c"] == 0
    assert each["e"] is None
    assert mean == pytest.approx(np.mean(expected[:5]), abs=1e-6)
    alone = []
    for pair in pairs:
        single = MeanIoU(["a", "b", "c", "d", "e"])
        single.update(*pair)
        alone.append(single.compute()[0])
    assert abs(np.mean(alone) - mean) > 1e-3


def test_what_does_not_fit_is_refused():
    metric, labels = MeanIoU(["a"]), np.zeros((3, 4), np.uint8)
    with pytest.raises(ValueError, match=r"size of its mask, \(3, 4\), got \(4, 3\)"):
        metric.update(labels.T, labels)
    with pytest.raises(ValueError, match=r"prediction must have labels in 0 … 1, got 0 … 2"):
        metric.update(labels + 2 * np.eye(3, 4, dtype=np.int64), labels)
    with pytest.raises(ValueError, match=r"mask must have labels in 0 … 1, got 7 … 7"):
        metric.update(labels, labels + 7)
    with pytest.raises(ValueError, match="not all 255, got none"):
        metric.compute()
    metric.update(labels, labels + 255)
    with pytest.raises(ValueError, match="not all 255, got none"):
        metric.compute()
    metric.update(labels, labels)
    assert metric.compute() == (1.0, {"background": 1.0, "a": None})
