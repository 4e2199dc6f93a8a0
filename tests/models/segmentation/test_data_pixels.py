"""Pixels out of image files."""

import numpy as np
import pytest
from PIL import Image

from moe_kernels.models.segmentation.data import pixels


def saved(image, path):
    image.save(path)
    return path


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 255, 257, 32896, 65535]], np.uint16)
    for name in ("x.png", "x.tiff"):
        image = pixels.read_rgb(saved(Image.fromarray(values), tmp_path / name))
        assert image.mode == "RGB"
        assert np.asarray(image)[0].tolist() == [[value] * 3 for value in (0, 1, 1, 128, 255)]
    wide = saved(Image.fromarray(values.astype(np.int32)), tmp_path / "wide.tiff")
    assert Image.open(wide).mode == "I"
    assert np.asarray(pixels.read_rgb(wide))[0, :, 0].tolist() == [0, 1, 1, 128, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_what_is_transparent_lies_over_white(tmp_path, mode):
    colours = np.zeros((2, 3, 4), np.uint8)
    colours[0], colours[1] = (90, 90, 90, 255), (40, 40, 40, 0)
    image = Image.fromarray(colours)
    if mode == "P":
        image = Image.fromarray(np.array([[0] * 3, [1] * 3], np.uint8))
        image.putpalette([90, 90, 90, 40, 40, 40])
        image.save(tmp_path / "x.png", transparency=1)
    else:
        image.convert(mode).save(tmp_path / ("x.tiff" if mode == "PA" else "x.png"))
    found = np.asarray(pixels.read_rgb(tmp_path / ("x.tiff" if mode == "PA" else "x.png")))
    assert found.shape == (2, 3, 3)
    assert (found[0] == 90).all()
    assert (found[1] == 255).all()


def test_half_transparent_is_mixed_with_white(tmp_path):
    image = Image.new("RGBA", (2, 2), (0, 100, 200, 128))
    found = np.asarray(pixels.read_rgb(saved(image, tmp_path / "x.png")))[0, 0]
    np.testing.assert_allclose(found, [127, 177, 227], atol=1)


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "png"), ("1", "png"), ("CMYK", "jpg"), ("P", "png"), ("YCbCr", "jpg")]
)
def test_other_modes_are_as_pillow_has_them(tmp_path, mode, form):
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode)
    file = saved(picture, tmp_path / f"x.{form}")
    expected = Image.open(file).convert("RGB")
    assert np.asarray(expected).std() > 10
    assert np.array_equal(np.asarray(pixels.read_rgb(file)), np.asarray(expected))


def test_values_without_a_scale_are_refused(tmp_path):
    floats = saved(Image.fromarray(np.ones((2, 2), np.float32)), tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="expected whole numbers, got an image of floats"):
        pixels.read_rgb(floats)
    large = saved(Image.fromarray(np.array([[-1, 70000]], np.int32)), tmp_path / "y.tiff")
    with pytest.raises(ValueError, match=r"expected values in 0 … 65535, got -1 … 70000"):
        pixels.read_rgb(large)


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
