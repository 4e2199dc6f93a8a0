"""Pixels out of image files."""

import numpy as np
import pytest
from PIL import Image

from moe_kernels.models.segmentation.data import pixels


def saved(image, path):
    image.save(path)
    return path


def test_a_palette_is_read_by_its_indices(tmp_path):
    mask = np.array([[0, 1, 2], [20, 255, 5]], np.uint8)
    image = Image.fromarray(mask)
    # colours of which some are one another's: indices cannot be told from them
    image.putpalette(np.arange(768) % 7 % 256)
    file = saved(image, tmp_path / "x.png")
    assert Image.open(file).mode == "P"
    found = pixels.read_mask(file, pixels.labels(20))
    assert (found.dtype, found.tolist()) == (np.uint8, mask.tolist())
    grey = saved(Image.fromarray(mask), tmp_path / "grey.png")
    assert pixels.read_mask(grey, pixels.labels(20), (3, 2)).tolist() == mask.tolist()
    deep = saved(Image.fromarray(mask.astype(np.uint16)), tmp_path / "deep.png")
    assert pixels.read_mask(deep, pixels.labels(20)).tolist() == mask.tolist()
    binary = saved(Image.fromarray(mask == 1), tmp_path / "binary.png")
    assert Image.open(binary).mode == "1"
    assert pixels.read_mask(binary, pixels.labels(1)).tolist() == (mask == 1).astype(int).tolist()


def test_numbers_may_stand_for_classes_in_gaps(tmp_path):
    numbers = pixels.labels(3, [2, 5, 90])
    file = saved(Image.fromarray(np.array([[0, 2, 5, 90, 255]], np.uint8)), tmp_path / "x.png")
    assert pixels.read_mask(file, numbers).tolist() == [[0, 1, 2, 3, 255]]
    file = saved(Image.fromarray(np.array([[0, 2, 1, 91, 1]], np.uint8)), tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"unknown label 1, 91; known are 0, 2, 5, 90, 255$"):
        pixels.read_mask(file, numbers)
    for values in ([0, 1], [3, 255]):
        with pytest.raises(ValueError, match=r"must be in 1 … 254, got"):
            pixels.labels(2, values)


def test_masks_that_are_none_are_refused(tmp_path):
    draw = np.random.default_rng(0)
    colours = saved(Image.fromarray(draw.integers(0, 256, (3, 4, 3), dtype=np.uint8)), tmp_path / "x.png")
    with pytest.raises(ValueError, match="palette or grey image of class numbers, got mode RGB"):
        pixels.read_mask(colours, pixels.labels(3))
    deep = saved(Image.fromarray(np.array([[1, 300, 65535]], np.uint16)), tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"unknown label 300, 65535; known are 0–3, 255$"):
        pixels.read_mask(deep, pixels.labels(3))
    small = saved(Image.fromarray(np.zeros((3, 4), np.uint8)), tmp_path / "small.png")
    with pytest.raises(ValueError, match="expected the size of its image, 3 × 4, got 4 × 3"):
        pixels.read_mask(small, pixels.labels(3), (3, 4))
