"""A plain folder with a table."""

import numpy as np
import pytest
from PIL import Image

from moe_kernels.models.segmentation import data
from moe_kernels.models.segmentation.data import folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


TABLE = "file,tags\nbeach.jpg,person dog\nsub/kitchen.png,chair;dining table\nwall,\ncat.png, dog \n"


def write(root, table=TABLE, images=("beach.jpg", "sub/kitchen.png", "wall.png", "cat.png")):
    for image in images:
        (root / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9)).save(root / "images" / image)
    (root / "tags.csv").write_text(table)
    return root


def test_tags_of_the_table(tmp_path):
    root = write(tmp_path / "mine")
    (root / "images" / ".thumbs").mkdir()
    Image.new("L", (3, 3)).save(root / "images" / ".thumbs" / "x.png")
    (root / "images" / "notes.txt").touch()
    found = folder.load(root)
    assert found.classes == ("chair", "dining table", "dog", "person")
    assert found.names == ("beach", "sub/kitchen", "wall", "cat")
    assert found.tags.astype(int).tolist() == [[0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert not found.has_masks
    assert found.image(1).size == (12, 9)
    assert data.load(root).names == found.names
    with pytest.raises(ValueError, match=r"mine has the layout of folder, for which there is no split, tags"):
        data.load(root, split="train", tags="xml", skip_bad=True)
    ordered = data.load(root, classes=["person", "dog", "dining table", "chair", "cow"])
    assert ordered.tags[0].astype(int).tolist() == [1, 1, 0, 0, 0]


def test_a_table_from_a_spreadsheet(tmp_path):
    root = write(tmp_path)
    (root / "tags.csv").write_bytes(
        b"\xef\xbb\xbffile,note,tags\r\n" + b'beach.jpg,"a, b",dog;\r\ncat.png,,cat;dog\r\n'
    )
    for image in ("sub/kitchen.png", "wall.png"):
        (root / "images" / image).unlink()
    found = folder.load(root)
    assert found.classes == ("cat", "dog")
    assert found.tags.tolist() == [[False, True], [True, True]]


def test_masks_lie_beside(tmp_path):
    root = write(tmp_path)
    (root / "masks" / "sub").mkdir(parents=True)
    mask = np.resize(np.array([0, 1, 4, 255], np.uint8), (9, 12))
    Image.fromarray(mask).save(root / "masks" / "sub" / "kitchen.png")
    with pytest.raises(ValueError, match=r"nothing says what their numbers stand for: write class_names.txt"):
        folder.load(root)
    (root / "class_names.txt").write_text("_background_\nperson\ndog\n\ncow\nchair\ndining table\n")
    found = folder.load(root)
    assert found.classes == ("person", "dog", "cow", "chair", "dining table")
    assert found.tags[1].tolist() == [False, False, False, True, True]
    assert [found.mask(index) is None for index in range(4)] == [True, False, True, True]
    assert np.array_equal(found.mask(1), mask)
    with pytest.raises(ValueError, match=r"masks/sub/kitchen.png: unknown label 4; known are 0–2, 255"):
        folder.load(write(root, "file,tags\nbeach,a\nsub/kitchen,b\nwall,\ncat,\n"), classes=["a", "b"])
    (root / "class_names.txt").unlink()
    assert not folder.load(root, masks=False).has_masks


@pytest.mark.parametrize(
    ("table", "what"),
    [
        ("file;tags\na;b\n", r"tags.csv must have the columns file and tags, got file;tags"),
        ("", "must have the columns file and tags, got nothing"),
        ("file,tags\n", "tags.csv has no row"),
        ("file,tags\nbeach,a\nbeach,b\n", "line 3: beach is there already"),
        ("file,tags\nbeach,a\nbeach.jpg,b\nwall,\ncat,\nsub/kitchen,", "more than once: beach"),
        ("file,tags\nbeach,a,b\n", "line 2: more than two columns; separate tags by ; or a space"),
        ("file,tags\nbeach.png,a\n", r"there is no image 'beach.png' in .*images"),
        ("file,tags\n,a\n", "there is no image '' in"),
        ("file,tags\nbeach,a\ncat,\n", r"says nothing of 2 images: sub/kitchen.png, wall.png; give each a row"),
        ("file,tags\nbeach,\nsub/kitchen,\nwall,\ncat,\n", "tags.csv has no tag"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path, table, what):
    with pytest.raises(ValueError, match=what):
        folder.load(write(tmp_path, table))


def test_images_that_do_not_fit_are_refused(tmp_path):
    root = write(tmp_path)
    with pytest.raises(
        ValueError, match=r"tags.csv: beach.jpg has the tag person; classes are dog, chair, dining table"
    ):
        folder.load(root, classes=["dog", "chair", "dining table"])
    Image.new("L", (2, 2)).save(root / "images" / "cat.jpg")
    with pytest.raises(ValueError, match=r"has two images of one name, cat.jpg and cat.png"):
        folder.load(root)
    (root / "images" / "cat.jpg").unlink()
    (root / "images" / "cat.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)1 of 4 pictures .*cat.png: cannot identify image file"):
        folder.load(root)
    with pytest.warns(UserWarning, match="1 of 4 pictures"):
        assert folder.load(root, skip_bad=True).names == ("beach", "sub/kitchen", "wall")
    for image in ("beach.jpg", "sub/kitchen.png", "wall.png", "cat.png"):
        (root / "images" / image).unlink()
    with pytest.raises(ValueError, match=r"images has no image \(.jpg, "):
        folder.load(root)


def test_a_folder_of_no_layout_says_what_there_is(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(
        ValueError, match=r"(?s)has none of the layouts below; it has pictures\n  voc: .*coco: .*folder: "
    ):
        data.load(tmp_path)
    with pytest.raises(ValueError, match="there is no such folder"):
        data.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is no plain folder of tagged images: expected images/, tags.csv"):
        folder.load(tmp_path)


@pytest.mark.parametrize(
    ("encoding", "file"), [("latin-1", "tags.csv"), ("utf-16", "tags.csv"), ("utf-16", "class_names.txt")]
)
def test_text_of_another_encoding_is_named(tmp_path, encoding, file):
    root = write(tmp_path)
    (root / file).write_bytes("file,tags\nbeach,bär\n".encode(encoding))
    with pytest.raises(ValueError, match=rf"{file} must be UTF-8: "):
        folder.load(root)


def test_names_of_classes_are_some(tmp_path):
    (write(tmp_path) / "class_names.txt").write_text("_background_\n")
    with pytest.raises(ValueError, match=r"class_names.txt must have a line for each class, got none"):
        folder.load(tmp_path)
