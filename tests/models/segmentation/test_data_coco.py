"""The layout of COCO."""

import json

import numpy as np
import pytest
from PIL import Image

from moe_kernels.models.segmentation import data
from moe_kernels.models.segmentation.data import coco


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def content():
    return {
        "categories": [
            {"id": 90, "name": "toothbrush"},
            {"id": 1, "name": "person"},
            {"id": 13, "name": "airplane"},
        ],
        "images": [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (9, 25, 30, 34)],
        "annotations": [
            {"id": 1, "image_id": 25, "category_id": 13},
            {"id": 2, "image_id": 9, "category_id": 90, "iscrowd": 1},
            {"id": 3, "image_id": 9, "category_id": 1},
            {"id": 4, "image_id": 9, "category_id": 1},
            {"id": 5, "image_id": 34, "category_id": 1},
        ],
    }


def write(root, found, split="train2017", images=None):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))
    folder = root / (images or split)
    folder.mkdir(parents=True, exist_ok=True)
    for item in found.get("images", ()):
        Image.new("RGB", (12, 9)).save(folder / item["file_name"])
    return root


TAGS = [[True, False, True], [False, True, False], [False, False, False], [True, False, False]]


@pytest.mark.parametrize("images", ["train2017", "images/train2017"])
def test_objects_are_tags(tmp_path, images):
    root = write(tmp_path / "coco", content(), images=images)
    found = coco.load(root)
    assert found.classes == ("person", "airplane", "toothbrush")
    assert found.names == ("000000000009", "000000000025", "000000000030", "000000000034")
    assert found.tags.tolist() == TAGS
    assert found.image(3).size == (12, 9)
    assert not found.has_masks
    assert data.load(root).tags.tolist() == TAGS
    with pytest.warns(UserWarning, match="1 of 4 images have no tag .*: 000000000030"):
        found.check_trainable()


@pytest.mark.parametrize("folder", ["SegmentationClass/val2014", "masks/val2014"])
@pytest.mark.parametrize(("numbers", "values"), [("position", [0, 1, 2, 3, 255]), ("id", [0, 1, 13, 90, 255])])
def test_masks_by_position_or_id(tmp_path, folder, numbers, values):
    root = write(tmp_path, content(), "val2014")
    (root / folder).mkdir(parents=True)
    mask = np.resize(np.array(values, np.uint8), (9, 12))
    Image.fromarray(mask).save(root / folder / "000000000025.png")
    found = coco.load(root, "val2014", mask_numbers=numbers)
    assert [found.mask(index) is None for index in range(4)] == [True, False, True, True]
    assert np.array_equal(found.mask(1), np.resize(np.array([0, 1, 2, 3, 255], np.uint8), (9, 12)))
    other = "id" if numbers == "position" else "position"
    with pytest.raises(ValueError, match=r"000000000025.png: unknown label "):
        coco.load(root, "val2014", mask_numbers=other)
    assert not coco.load(root, "val2014", mask_numbers=other, masks=False).has_masks


def changed(**lists):
    return content() | lists


@pytest.mark.parametrize(
    ("found", "what"),
    [
        ({"info": {}}, r"is not of COCO's form \(categories, images, annotations\): KeyError\('categories'\)"),
        (changed(images=[]), "images must be some, each with an id of its own, got 0"),
        (changed(categories=[]), "categories must be some"),
        (changed(images=content()["images"] * 2), "images must be some, each with an id of its own, got 8, 4 ids"),
        (changed(annotations=[{"image_id": 9, "category_id": 2}]), "an annotation has image_id 9, category_id 2"),
        (changed(annotations=[{"image_id": 8, "category_id": 1}]), "an annotation has image_id 8, category_id 1"),
        (changed(annotations=[{"image_id": 8}]), "is not of COCO's form"),
        (
            changed(images=[{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "a.jpg"}], annotations=[]),
            "every image must have a name of its own; more than once: a",
        ),
    ],
)
def test_a_json_that_does_not_fit_is_refused(tmp_path, found, what):
    with pytest.raises(ValueError, match=what):
        coco.load(write(tmp_path, found))


def test_what_is_missing_is_named(tmp_path):
    root = write(tmp_path, content())
    with pytest.raises(ValueError, match=r"there is no .*instances_val2017.json; there are the splits train2017"):
        coco.load(root, "val2017")
    with pytest.raises(ValueError, match="mask_numbers must be one of position, id, got 'ids'"):
        coco.load(root, mask_numbers="ids")
    (root / "train2017" / "000000000030.jpg").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 of 4 pictures .*000000000030.jpg: No such file"):
        coco.load(root)
    with pytest.warns(UserWarning, match="1 of 4 pictures"):
        assert coco.load(root, skip_bad=True).tags.tolist() == [TAGS[0], TAGS[1], TAGS[3]]
    (root / "annotations" / "instances_train2017.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"instances_train2017.json is not a JSON file"):
        coco.load(root)
