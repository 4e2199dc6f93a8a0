"""The layout of VOC."""

import numpy as np
import pytest
import toy_voc
from PIL import Image

from moe_kernels.models.segmentation import data
from moe_kernels.models.segmentation.data import voc


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return toy_voc.make(tmp_path)


def lists(root):
    return root / "ImageSets" / "Segmentation"


def tags_of(numbers):
    return [[name in toy_voc.contents(number) for name in toy_voc.CLASSES] for number in numbers]


def test_the_miniature(root):
    found = voc.load(root, "train")
    assert found.classes == toy_voc.CLASSES
    assert found.names == tuple(toy_voc.names("train"))
    assert found.tags.tolist() == tags_of(range(16))
    for index in range(16):
        picture, mask, _ = toy_voc.draw(index)
        assert found.image(index).mode == "RGB"
        assert found.image(index).size == picture.shape[1::-1]
        assert np.array_equal(found.mask(index), mask)
    found.check_trainable()
    val = voc.load(root, "val")
    assert val.tags.tolist() == tags_of(range(16, 22))
    assert len(voc.load(root, "trainval")) == 22


def test_of_two_forms_of_a_picture_the_jpeg_is_taken(root):
    for number, form in ((0, "png"), (1, "jpg")):
        Image.new("RGB", toy_voc.draw(number)[0].shape[1::-1]).save(root / "JPEGImages" / f"2007_00000{number}.{form}")
    found = voc.load(root, "train")
    assert np.asarray(found.image(0)).any()
    assert not np.asarray(found.image(1)).any()


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_any_of_the_outer_folders_will_do(root, below):
    assert len(data.load(root.parent.parent / below, split="val")) == 6


@pytest.mark.filterwarnings("ignore:train_?aug lists")
@pytest.mark.parametrize("name", ["Segmentation/trainaug", "SegmentationAug/train_aug", "Main/train_aug", "train_aug"])
@pytest.mark.parametrize("pairs", [False, True])
def test_train_aug_under_all_its_names(root, name, pairs):
    lines = (lists(root) / "train_aug.txt").read_text()
    (lists(root) / "train_aug.txt").unlink()
    file = root / "ImageSets" / f"{name}.txt"
    file.parent.mkdir(exist_ok=True)
    file.write_text(lines if pairs else "\r\n".join(toy_voc.names("train")))
    # which masks are meant is seen from one that is in one folder only
    (root / "SegmentationClass" / "2007_000004.png").unlink()
    for split in ("train_aug", "trainaug"):
        found = voc.load(root, split)
        assert found.names == tuple(toy_voc.names("train"))
        assert np.array_equal(found.mask(4), toy_voc.draw(4)[1])


def test_train_aug_from_train_and_aug(root):
    (lists(root) / "train_aug.txt").unlink()
    names = toy_voc.names("train")
    (lists(root) / "train.txt").write_text("\n".join(names[:10]))
    with pytest.raises(ValueError, match=r"there is no list 'train_aug' in .*; there are Segmentation/train, .*val"):
        voc.load(root)
    (lists(root) / "aug.txt").write_text("\n".join(names[10:]))
    with pytest.warns(UserWarning, match="train_aug lists 16 images; that of VOC 2012 lists 10,582"):
        assert voc.load(root).names == tuple(names)
    (lists(root) / "aug.txt").write_text("\n".join(names[9:]))
    with pytest.raises(ValueError, match=r"train.txt and .*aug.txt lists 2007_000009 more than once"):
        voc.load(root)


def test_the_masks_of_train_aug_are_the_augmented_ones(root):
    other = np.zeros_like(toy_voc.draw(0)[1])
    Image.fromarray(other).save(root / "SegmentationClassAug" / "2007_000000.png")
    with pytest.warns(UserWarning, match="10,582"):
        assert not voc.load(root).mask(0).any()
    assert voc.load(root, "train").mask(0).any()


def test_a_pair_says_which_mask_it_means(root):
    Image.fromarray(np.zeros_like(toy_voc.draw(0)[1])).save(root / "SegmentationClassAug" / "2007_000000.png")
    line = "/JPEGImages/2007_000000.jpg /SegmentationClass{}/2007_000000.png\n"
    (lists(root) / "plain.txt").write_text(line.format(""))
    assert voc.load(root, "plain").mask(0).any()
    (lists(root) / "augmented.txt").write_text(line.format("Aug"))
    assert not voc.load(root, "augmented").mask(0).any()


def test_names_may_have_dots(root):
    for file in list(root.rglob("2007_000000.*")):
        file.rename(file.with_name(f"shot.0{file.suffix}"))
    (lists(root) / "one.txt").write_text("shot.0\n")
    found = voc.load(root, "one")
    assert found.names == ("shot.0",)
    assert np.array_equal(found.mask(0), toy_voc.draw(0)[1])


def test_lists_of_main_and_files_anywhere(root, tmp_path):
    (root / "ImageSets" / "Main").mkdir()
    (root / "ImageSets" / "Main" / "train.txt").write_text("2007_000003\n")
    (root / "ImageSets" / "Main" / "disc_val.txt").write_text("2007_000016  1\n2007_000018 -1\n")
    assert len(voc.load(root, "train")) == 16
    assert voc.load(root, "Main/train").names == ("2007_000003",)
    assert voc.load(root, "disc_val").names == ("2007_000016", "2007_000018")
    (tmp_path / "mine.txt").write_text("\n2007_000001\n\n2007_000000\n")
    assert voc.load(root, str(tmp_path / "mine.txt")).names == ("2007_000001", "2007_000000")
    with pytest.raises(ValueError, match=r"nowhere.txt: there is no such file"):
        voc.load(root, "nowhere.txt")


def test_vocs_own_classes(root):
    (root / "class_names.txt").unlink()
    with pytest.raises(
        ValueError, match=r"2007_000000.xml: disc is none of the classes, which are aeroplane, .*class_names.txt"
    ):
        voc.load(root, "train")
    for file in (root / "Annotations").iterdir():
        text = file.read_text()
        for own, theirs in zip(toy_voc.CLASSES, ("aeroplane", "bicycle", "bird", "boat"), strict=True):
            text = text.replace(f"<name>{own}</name>", f"<name>{theirs}</name>")
        file.write_text(text)
    found = voc.load(root, "train")
    assert len(found.classes) == 20
    assert found.classes[19] == "tvmonitor"
    assert found.tags.sum(0).tolist() == [6, 6, 6, 6] + [0] * 16
    with pytest.raises(ValueError, match="no image has the tag bottle, bus, "):
        found.check_trainable()
    assert voc.load(root, "train", classes=found.classes[:4]).classes == ("aeroplane", "bicycle", "bird", "boat")


def test_tags_of_xml_or_of_masks(root):
    # an object that no mask shows, and one that only the mask does
    file = root / "Annotations" / "2007_000000.xml"
    file.write_text(file.read_text().replace("<name>disc</name>", "<name>ring</name>"))
    ring, disc = [False, False, False, True], [True, False, False, False]
    assert voc.load(root, "train").tags[0].tolist() == ring
    assert voc.load(root, "train", tags="masks").tags[0].tolist() == disc
    assert voc.load(root, "train", tags="masks").tags[1:].tolist() == tags_of(range(1, 16))
    file.unlink()
    assert voc.load(root, "train").tags.tolist() == tags_of(range(16))
    with pytest.raises(ValueError, match=r"image 2007_000000 of train has no tags: .* has no xml in Annotations of it"):
        voc.load(root, "train", tags="xml")
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        (root / folder / "2007_000000.png").unlink()
    with pytest.raises(
        ValueError, match=r"2007_000000 of train .* no xml in Annotations or mask in SegmentationClass or"
    ):
        voc.load(root, "train")
    with pytest.raises(
        ValueError, match=r"2007_000000 of train .* no mask in SegmentationClass or SegmentationClassAug"
    ):
        voc.load(root, "train", tags="masks")
    with pytest.raises(ValueError, match="tags must be one of xml, masks, got 'png'"):
        voc.load(root, "train", tags="png")


def test_difficult_objects_count_and_parts_do_not(root):
    text = (root / "Annotations" / "2007_000001.xml").read_text()
    assert "<difficult>1</difficult>" in text
    assert "<part><name>head</name>" in text
    assert voc.load(root, "train").tags[1].tolist() == [False, True, True, False]


def test_images_without_masks(root):
    for folder in ("SegmentationClass", "SegmentationClassAug"):
        for file in (root / folder).iterdir():
            file.unlink()
    found = voc.load(root, "train")
    assert not found.has_masks
    assert found.mask(0) is None
    assert found.tags.tolist() == tags_of(range(16))


def test_masks_that_are_not_asked_for_do_not_matter(root):
    for number in (0, 1):
        (root / "SegmentationClass" / f"2007_00000{number}.png").write_bytes(b"no image")
    assert not voc.load(root, "train", masks=False).has_masks
    (root / "Annotations" / "2007_000001.xml").unlink()
    with pytest.raises(ValueError, match=r"(?s)1 of 1 masks .*2007_000001.png: cannot identify") as error:
        voc.load(root, "train", masks=False)
    assert "2007_000000" not in str(error.value)


def test_bad_lists_and_annotations_are_named(root):
    (lists(root) / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty.txt lists no image"):
        voc.load(root, "empty")
    (lists(root) / "twice.txt").write_text("2007_000001\n2007_000002\n2007_000001\n")
    with pytest.raises(ValueError, match=r"twice.txt lists 2007_000001 more than once"):
        voc.load(root, "twice")
    (root / "Annotations" / "2007_000002.xml").write_text("<annotation><object>")
    with pytest.raises(ValueError, match=r"2007_000002.xml is no XML: "):
        voc.load(root, "train")
    with pytest.raises(ValueError, match=r"has not the layout of VOC: expected JPEGImages/"):
        voc.load(root / "JPEGImages")


def test_bad_files_are_named_or_left_out(root):
    (root / "JPEGImages" / "2007_000003.jpg").write_bytes(b"<html>")
    (lists(root) / "train.txt").write_text("\n".join([*toy_voc.names("train"), "2009_000000"]))
    mask = toy_voc.draw(7)[1]
    mask[0, 0] = 21
    toy_voc.save_mask(mask, root / "SegmentationClass" / "2007_000007.png")
    (root / "Annotations" / "2009_000000.xml").write_text("<annotation></annotation>")
    with pytest.raises(
        ValueError, match=r"(?s)2 of 17 pictures .*2007_000003.jpg: cannot identify.*2009_000000.jpg: No such"
    ):
        voc.load(root, "train")
    with (
        pytest.warns(UserWarning, match="2 of 17 pictures"),
        pytest.warns(UserWarning, match="(?s)1 of 15 masks.*2007_000007.png: unknown label 21; known are 0–4, 255"),
    ):
        found = voc.load(root, "train", skip_bad=True)
    assert found.names == tuple(name for name in toy_voc.names("train") if name[-1] not in "37" or name[-2] == "1")
    assert found.tags.tolist() == tags_of(number for number in range(16) if number not in (3, 7))
