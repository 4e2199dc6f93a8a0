"""Image files of any mode as RGB."""

import numpy as np
import pytest
from PIL import Image

from moe_kernels.models.data.rgb import read_rgb


def saved(image, path):
    image.save(path)
    return path


def test_sixteen_bits_are_scaled(tmp_path):
    values = np.array([[0, 255, 257, 32896, 65535]], np.uint16)
    for name in ("x.png", "x.tiff"):
        image = read_rgb(saved(Image.fromarray(values), tmp_path / name))
        assert image.mode == "RGB"
        assert np.asarray(image)[0].tolist() == [[value] * 3 for value in (0, 1, 1, 128, 255)]
    wide = tmp_path / "wide.pgm"
    wide.write_bytes(b"P5 5 1 65535\n" + values.astype(">u2").tobytes())
    assert Image.open(wide).mode == "I"
    assert np.asarray(read_rgb(wide))[0, :, 0].tolist() == [0, 1, 1, 128, 255]


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
    found = np.asarray(read_rgb(tmp_path / ("x.tiff" if mode == "PA" else "x.png")))
    assert found.shape == (2, 3, 3)
    assert (found[0] == 90).all()
    assert (found[1] == 255).all()


def test_what_lies_under_it_is_shown_if_asked(tmp_path):
    image = Image.new("RGBA", (2, 2), (0, 100, 200, 0))
    found = np.asarray(read_rgb(saved(image, tmp_path / "x.png"), over_white=False))
    assert found[0, 0].tolist() == [0, 100, 200]


def test_a_grey_of_sixteen_bits_may_be_transparent(tmp_path):
    Image.fromarray(np.array([[0, 500 * 65]], np.uint16)).save(tmp_path / "x.png", transparency=500 * 65)
    assert Image.open(tmp_path / "x.png").mode == "I;16"
    assert np.asarray(read_rgb(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 255]
    assert np.asarray(read_rgb(tmp_path / "x.png", over_white=False))[0, :, 0].tolist() == [0, 126]


def test_half_transparent_is_mixed_with_white(tmp_path):
    image = Image.new("RGBA", (2, 2), (0, 100, 200, 128))
    found = np.asarray(read_rgb(saved(image, tmp_path / "x.png")))[0, 0]
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
    assert np.array_equal(np.asarray(read_rgb(file)), np.asarray(expected))


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "integers")])
def test_values_without_a_range_are_refused(tmp_path, dtype, kind):
    file = saved(Image.fromarray(np.ones((2, 2), dtype)), tmp_path / "x.tiff")
    with pytest.raises(ValueError, match=f"expected 8 or 16 bits a channel, got {kind} of 32 bits"):
        read_rgb(file)
