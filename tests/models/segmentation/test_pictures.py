import numpy as np
import pytest
from PIL import Image

from moe_kernels.models import figures
from moe_kernels.models.segmentation import pictures
from moe_kernels.models.segmentation.pictures import Row


def test_the_palette_is_vocs():
    colours = pictures.palette().tolist()
    assert len({tuple(colour) for colour in colours}) == 256
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 20: (0, 64, 128)}
    for label, colour in (known | {8: (64, 0, 0), 16: (0, 64, 0), 255: (224, 224, 192)}).items():
        assert tuple(colours[label]) == colour


def test_paint_leaves_the_background_as_it_is():
    image = np.random.default_rng(0).integers(256, size=(3, 4, 3), dtype=np.uint8)
    labels = np.zeros((3, 4), np.uint8)
    labels[1, 2], labels[2, 3] = 4, 255
    painted = pictures.paint(image, labels, 1.0)
    assert painted.dtype == np.uint8
    assert (painted[labels == 0] == image[labels == 0]).all()
    assert tuple(painted[1, 2]) == (0, 0, 128)
    assert tuple(painted[2, 3]) == (224, 224, 192)
    half = pictures.paint(image, labels, 0.5)[1, 2].astype(int)
    assert (abs(half - (image[1, 2].astype(int) + painted[1, 2]) / 2) <= 0.5).all()
    with pytest.raises(ValueError, match=r"image must be .*\(3, 4\), got \(4, 3, 3\)"):
        pictures.paint(image.transpose(1, 0, 2), labels)


@pytest.mark.parametrize("size", [(30, 40), (450, 600)])
def test_an_overlay_has_its_colours_and_a_legend_of_what_is_there(tmp_path, size):
    image, labels = np.full((*size, 3), 250, np.uint8), np.zeros(size, np.uint8)
    labels[:, : size[1] // 2] = 2
    labels[:2] = 255
    figure = pictures.overlay(image, labels, ["cat", "dog", "cow"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dog"]
    figures.save(figure, tmp_path / "overlay.png")
    with Image.open(tmp_path / "overlay.png") as picture:
        shown = np.asarray(picture.convert("RGB")).astype(int)
    width = max(400, size[1])
    assert shown.shape[1] == pytest.approx(width, abs=1)
    expected = pictures.paint(image, labels)[-1, 0].astype(int)
    height = round(width * size[0] / size[1])
    assert shown.shape[0] > height
    assert abs(shown[height // 2, width // 4] - expected).max() <= 1
    assert abs(shown[height // 2, 3 * width // 4] - 250).max() <= 1
    assert not pictures.overlay(image, labels * 0, ["cat"]).legends
    with pytest.raises(ValueError, match="labels must be 0 … 1 or 255, got 2"):
        pictures.overlay(image, labels, ["cat"])


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 9000), (100, 4000)), ((9000, 1), (4000, 100)), ((5000, 2500), (4000, 2000))]
)
def test_an_overlay_of_a_strip_or_a_large_picture_is_of_bounded_size(size, expected):
    figure = pictures.overlay(np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8), ["cat"])
    width, height = figure.get_size_inches() * pictures.DPI
    assert (round(height), round(width)) == expected


def test_a_line_a_row(tmp_path):
    image, truth = np.zeros((12, 16, 3), np.uint8), np.zeros((12, 16), np.uint8)
    truth[3:6, 3:6], samples = 1, np.array([[4, 4, 1], [10, 10, 0]])
    row = Row(image, np.ones((1, 12, 16)), [1], samples, {"truth": truth, "result": truth})
    empty = Row(image, np.ones((0, 12, 16)), [], samples[1:], {"truth": truth, "result": truth})
    sizes = []
    for rows in ([row], [row, empty]):
        pictures.plot_rows(rows, ["cat"], tmp_path / "rows.png")
        with Image.open(tmp_path / "rows.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][1] > sizes[0][1]
    assert sizes[0][0] > 400
