"""Images with tags."""

import numpy as np
import pytest
from PIL import Image

from moe_kernels.models.segmentation.data import tagged
from moe_kernels.models.segmentation.data.tagged import TaggedImages

CLASSES = ("cat", "dog", "cow")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def arrays(count=4):
    rng = np.random.default_rng(0)
    tags = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]])[:count]
    images = [rng.integers(0, 256, (5 + number, 8, 3), dtype=np.uint8) for number in range(count)]
    masks = [np.zeros((5 + number, 8), np.uint8) for number in range(count)]
    for mask, row in zip(masks, tags, strict=True):
        for label in np.flatnonzero(row):
            mask[label] = label + 1
        mask[4] = 255
    return {"names": [f"n{number}" for number in range(count)], "classes": CLASSES, "tags": tags} | {
        "images": images,
        "masks": masks,
    }


def on_disk(folder, **change):
    given = arrays() | change
    for number, image in enumerate(given["images"]):
        Image.fromarray(image).save(folder / f"i{number}.png")
        Image.fromarray(given["masks"][number]).save(folder / f"m{number}.png")
    files = {what: [folder / f"{what[0]}{number}.png" for number in range(4)] for what in ("images", "masks")}
    return TaggedImages(**(given | files))


def test_arrays_and_files_give_the_same(tmp_path):
    given = arrays()
    memory, disk = TaggedImages(**given), tagged.checked(on_disk(tmp_path), tmp_path)
    assert len(memory) == len(disk) == 4
    assert (memory.classes, memory.names) == (CLASSES, ("n0", "n1", "n2", "n3"))
    assert memory.tags.dtype == bool
    assert not memory.tags.flags.writeable
    given["tags"][0, 1] = 1
    assert not memory.tags[0, 1]
    assert memory.has_masks
    for index in range(4):
        for data in (memory, disk):
            assert data.image(index).mode == "RGB"
            assert np.array_equal(np.asarray(data.image(index)), given["images"][index])
            assert np.array_equal(data.mask(index), given["masks"][index])
            assert data.mask(index).dtype == np.uint8
    without = TaggedImages(**(given | {"masks": None}))
    assert without.mask(0) is None
    assert not without.has_masks
    some = TaggedImages(**(given | {"masks": [None, None, given["masks"][2], None]}))
    assert some.has_masks


def test_digests_tell_images_apart(tmp_path):
    given = arrays()
    data = TaggedImages(**given)
    assert len({data.digest(index) for index in range(4)}) == 4
    assert data.digests() == [data.digest(index) for index in range(4)]
    flat = given["images"][0].reshape(8, 5, 3)
    other = TaggedImages(**(given | {"images": [flat, *given["images"][1:]]}))
    assert other.digest(0) != data.digest(0)
    assert other.digest(1) == data.digest(1)
    disk = on_disk(tmp_path)
    before = disk.digest(2)
    Image.fromarray(given["images"][3]).save(tmp_path / "i2.png")
    assert disk.digest(2) == disk.digest(3) != before


def test_a_subset_keeps_classes_and_order():
    data = TaggedImages(**arrays()).subset(np.array([3, 1]))
    assert (data.names, data.classes) == (("n3", "n1"), CLASSES)
    assert data.tags.tolist() == [[False, False, True], [False, True, True]]
    assert data.image(0).size == (8, 8)
    assert data.mask(1).shape == (6, 8)
    assert len(data.subset([])) == 0


def test_other_names():
    data = TaggedImages(**arrays())
    renamed = data.renamed([f"new/{name}" for name in data.names])
    assert renamed.names == ("new/n0", "new/n1", "new/n2", "new/n3")
    assert renamed.digests() == data.digests()
    assert np.array_equal(renamed.tags, data.tags)
    assert np.array_equal(renamed.mask(2), data.mask(2))


@pytest.mark.parametrize("name", ["", ".", "..", " cow", "cow\n", "x" * 201, "牛" * 23])
def test_names_that_no_class_can_have(name):
    with pytest.raises(ValueError, match=r"the name of a class must not be empty, .* got '"):
        TaggedImages(**(arrays() | {"classes": ("cat", "dog", name)}))


def test_only_some_classes(tmp_path):
    for data in (TaggedImages(**arrays()), on_disk(tmp_path)):
        fewer = data.only(["cow", "cat"])
        assert fewer.classes == ("cow", "cat")
        assert fewer.tags.tolist() == [[False, True], [True, False], [False, True], [True, False]]
        assert fewer.mask(1)[:5, 0].tolist() == [0, 0, 1, 0, 255]
        assert fewer.mask(2)[:5, 0].tolist() == [2, 0, 0, 0, 255]
        assert fewer.only(["cat"]).mask(2)[:5, 0].tolist() == [1, 0, 0, 0, 255]
        assert fewer.subset([2]).mask(0)[0, 0] == 2
    with pytest.raises(ValueError, match=r"classes: there is no bird; there are cat, dog, cow"):
        data.only(["cat", "bird"])


def test_tags_from_masks():
    given = arrays()
    data = TaggedImages(**(given | {"tags": np.zeros((4, 3))}))
    assert np.array_equal(tagged.tagged_by_masks(data).tags, given["tags"].astype(bool))
    assert tagged.tagged_by_masks(data, [1, 3]).tags.any(1).tolist() == [False, True, False, True]
    partly = TaggedImages(**(given | {"masks": [None, *given["masks"][1:]]}))
    assert tagged.tagged_by_masks(partly, [2]).tags[0].tolist() == [True, False, False]
    with pytest.raises(ValueError, match="1 of 4 images have no mask to take tags from: n0"):
        tagged.tagged_by_masks(partly)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"classes": ("cat", "dog", "cat")}, "every class must have a name of its own; more than once: cat"),
        ({"names": ["a", "b", "a", "b"]}, "every image must have a name of its own; more than once: a, b"),
        ({"classes": ()}, r"classes must be 1 … 254 names, got 0"),
        ({"tags": np.ones((4, 2))}, r"tags must be \(4, 3\), images by classes, got \(4, 2\)"),
        ({"masks": [None]}, "masks must be 4, one a name, got 1"),
        ({"images": []}, "images must be 4, one a name, got 0"),
        ({"names": ["a", "b", "../c", "d"]}, r"names must be relative paths without '..', got '../c'"),
        ({"names": ["a", "b", "/c", "d"]}, "got '/c'"),
        ({"names": ["a", "b", "", "d"]}, "got ''"),
    ],
)
def test_what_does_not_fit_is_refused(change, what):
    with pytest.raises(ValueError, match=what):
        TaggedImages(**(arrays() | change))


def test_a_label_of_no_class_is_named_with_its_image():
    given = arrays()
    given["masks"][2][0, 0] = 4
    with pytest.raises(ValueError, match=r"mask of n2: unknown label 4; known are 0–3, 255"):
        TaggedImages(**given).mask(2)


def test_what_cannot_be_trained_is_named():
    data = TaggedImages(**arrays())
    data.check_trainable()
    with pytest.raises(ValueError, match="expected images to learn from, got none"):
        data.subset([]).check_trainable()
    with pytest.raises(ValueError, match=r"no image has the tag cow$"):
        data.subset([0, 2]).check_trainable()
    with pytest.raises(ValueError, match=r"all 2 images have the tag, .*bring images without dog"):
        data.subset([1, 2]).with_tags(np.array([[0, 1, 1], [1, 1, 0]])).check_trainable()
    untagged = data.with_tags(np.array([[1, 0, 0], [0, 0, 0], [0, 1, 1], [0, 0, 0]]))
    with pytest.warns(UserWarning, match=r"2 of 4 images have no tag and only show what the classes are not: n1, n3"):
        untagged.check_trainable()


def test_every_broken_file_is_named_at_once(tmp_path):
    data = on_disk(tmp_path)
    whole = (tmp_path / "i1.png").read_bytes()
    (tmp_path / "i1.png").write_bytes(whole[:-30])
    (tmp_path / "i3.png").unlink()
    with pytest.raises(
        ValueError, match=rf"(?s)2 of 4 pictures under {tmp_path} cannot be read.*--skip-bad.*i1.png: .*i3.png: No such"
    ):
        tagged.checked(data, tmp_path)
    with pytest.warns(UserWarning, match="2 of 4 pictures"):
        kept = tagged.checked(data, tmp_path, skip_bad=True)
    assert kept.names == ("n0", "n2")
    with pytest.raises(RuntimeError, match=rf"{tmp_path}/i1.png can no longer be read: "):
        data.image(1)
    (tmp_path / "i1.png").write_bytes(whole)
    Image.fromarray(arrays()["images"][3]).save(tmp_path / "i3.png")
    assert len(tagged.checked(data, tmp_path)) == 4


def test_every_wrong_mask_is_named_at_once(tmp_path):
    data = on_disk(tmp_path)
    Image.fromarray(np.full((6, 8), 9, np.uint8)).save(tmp_path / "m1.png")
    Image.fromarray(np.zeros((8, 6), np.uint8)).save(tmp_path / "m2.png")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        tagged.checked(data, tmp_path)
    lines = str(error.value).splitlines()
    assert "2 of 4 masks" in lines[0]
    assert [line.strip() for line in lines[1:]] == [
        f"{tmp_path}/m1.png: unknown label 9; known are 0–3, 255",
        f"{tmp_path}/m2.png: expected the size of its image, 8 × 7, got 6 × 8",
    ]
    with pytest.warns(UserWarning, match="2 of 4 masks"):
        assert tagged.checked(data, tmp_path, skip_bad=True).names == ("n0", "n3")
    with pytest.raises(RuntimeError, match=r"m1.png can no longer be read: unknown label 9"):
        data.mask(1)


@pytest.mark.filterwarnings("ignore:4 of 4")
def test_nothing_left_is_an_error(tmp_path):
    data = on_disk(tmp_path)
    for number in range(4):
        (tmp_path / f"i{number}.png").unlink()
    with pytest.raises(ValueError, match=f"no image under {tmp_path} can be read"):
        tagged.checked(data, tmp_path, skip_bad=True)
