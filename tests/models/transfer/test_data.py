import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from moe_kernels.models.transfer.data import Tensors, from_tensors, load, transform

CLASSES = ("cat", "dog", "owl")


def image(shade: int) -> Image.Image:
    return Image.new("RGB", (20, 12), (shade, shade, shade))


def write(folder, names=CLASSES, count=5):
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image(10 * label + index).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shades(dataset) -> list[int]:
    """Which file an item is, by its shade."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return [round(float(((dataset[i][0][:, 0, 0] * std + mean) * 255).mean())) for i in range(len(dataset))]


def test_train_and_test_folders(tmp_path):
    write(tmp_path / "pets" / "train")
    write(tmp_path / "pets" / "test", count=2)
    data = load(tmp_path / "pets", resize=10, crop=8)
    assert (data.name, data.classes) == ("pets", CLASSES)
    assert data.train.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.train[0][0].shape == data.test[0][0].shape == (3, 8, 8)
    assert shades(data.plain) == shades(data.train) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 20, 21, 22, 23, 24]
    assert data.test[3][1] == 1


def test_so_many_of_each_class_to_train_and_to_test_on(tmp_path):
    root = write(tmp_path / "pets", count=6)
    data = load(root, train_per_class=3, test_per_class=2, crop=8, resize=8)
    assert data.name == "pets-3"
    assert data.train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert not set(shades(data.train)) & set(shades(data.test))
    assert shades(load(root, train_per_class=3, test_per_class=2, crop=8, resize=8).train) == shades(data.train)
    assert shades(load(root, train_per_class=3, seed=1, crop=8, resize=8).train) != shades(data.train)
    assert len(load(root, train_per_class=1, crop=8, resize=8).test) == 15


def test_the_transforms_are_the_papers():
    gradient = Image.fromarray(np.arange(300 * 400 * 3, dtype=np.uint32).reshape(300, 400, 3).astype(np.uint8))
    resized, cropped, mirrored, *rest = transform(augment=True).transforms
    assert resized(gradient).size == (256, 256)
    assert cropped.size == (224, 224)
    assert mirrored.p == 0.5
    plain = transform(augment=False)
    assert torch.equal(plain(gradient), plain(gradient))
    assert plain(gradient).shape == (3, 224, 224)
    # the middle of the resized image, normalized
    expected = torch.from_numpy(np.asarray(resized(gradient))[16:240, 16:240].copy()).movedim(-1, 0) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(plain(gradient), (expected - mean) / std)
    assert len(rest) == 3


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda root: None, {}, "is missing"),
        (lambda root: root.write_text(""), {}, "is a file"),
        (write, {}, r"root must have the folders train and test, or one folder a class and train_per_class"),
        (write, {"train_per_class": 5}, "class cat has 5 images, too few for 5 to train on and some to test on"),
        (write, {"train_per_class": 3, "test_per_class": 3}, "too few for 3 to train on and 3 to test on"),
        (write, {"train_per_class": 0}, "train_per_class must be at least 1, got 0"),
        (write, {"train_per_class": 1, "crop": 300}, "crop must be in 1 … 256, the size after resize, got 300"),
        (lambda root: write(root, ("cat",)), {"train_per_class": 1}, "at least two; it has cat"),
        (lambda root: (write(root / "train"), write(root / "test", ("cat", "dog"))), {}, "they differ in owl"),
        (lambda root: (write(root / "train"), write(root / "test")), {"train_per_class": 1}, "without train and test"),
    ],
)
def test_a_folder_of_another_form_is_refused(tmp_path, make, options, message):
    root = tmp_path / "root"
    make(root)
    with pytest.raises(ValueError, match=message):
        load(root, **options)


def test_every_image_is_looked_at_before_training(tmp_path):
    root = write(tmp_path / "pets")
    (root / "dog" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"(?s)1 of 15 images under .*cannot be read.*dog/3\.png"):
        load(root, train_per_class=2)
    with pytest.warns(UserWarning, match=re.escape("1 of 15 images")):
        data = load(root, train_per_class=2, skip_bad=True, crop=8, resize=8)
    assert len(data.train) + len(data.test) == 14


def test_images_of_any_mode(tmp_path):
    root = write(tmp_path / "pets", count=1)
    deep = Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))
    clear = Image.new("RGBA", (8, 8), (200, 200, 200, 0))  # torchvision's ImageFolder shows what lies under it
    deep.save(root / "cat" / "1.png")
    clear.save(root / "dog" / "1.png")
    image(30).save(root / "owl" / "1.png")
    data = load(root, train_per_class=1, crop=8, resize=8)
    assert sorted(shades(data.train) + shades(data.test)) == [0, 10, 20, 30, 100, 200]
    Image.fromarray(np.zeros((8, 8), np.float32)).save(root / "owl" / "2.tiff")
    with pytest.raises(ValueError, match=r"(?s)1 of 7 images .*2\.tiff: expected 8 or 16 bits a channel, got floats"):
        load(root, train_per_class=1)


def test_every_class_has_images_in_both_parts(tmp_path):
    root = tmp_path / "pets"
    write(root / "train", count=2)
    write(root / "test", count=2)
    for image in (root / "train" / "dog").iterdir():
        image.write_bytes(b"no image")
    lacking = r"train must have images that can be read of every class; it has none of dog$"
    with pytest.warns(UserWarning, match="2 of 12 images"), pytest.raises(ValueError, match=lacking):
        load(root, skip_bad=True)
    for part, name in (("train", "dog"), ("test", "owl")):
        for image in (root / part / name).iterdir():
            image.unlink()
        with pytest.raises(ValueError, match=f"{part} must have images .* none of {name}$"):
            load(root)
        image = write(tmp_path / part) / name / "0.png"
        shutil.copy(image, root / part / name)
    assert len(load(root).test) == 5


def test_what_identifies_a_task_of_files(tmp_path):
    sizes = {"resize": 10, "crop": 8}
    root = write(tmp_path / "pets", count=6)

    def identity(root=root, **options):
        return load(root, **{"train_per_class": 3, **sizes, **options}).identity

    own = identity()
    assert json.loads(json.dumps(own)) == own
    assert {key: own[key] for key in ("name", "classes", "train", "test", "resize", "crop")} == {
        "name": "pets-3",
        "classes": list(CLASSES),
        "train": 9,
        "test": 9,
        **sizes,
    }
    assert own["split"] == {"seed": 0, "train_per_class": 3, "test_per_class": None}
    others = [
        identity(crop=9),
        identity(resize=11),
        identity(seed=1),
        identity(train_per_class=4),
        identity(test_per_class=3),
        identity(mean=(0.5, 0.5, 0.5)),
        load(root, train_per_class=3, **sizes).fold(0, 2).identity,
        load(root, train_per_class=3, **sizes).fold(1, 2).identity,
        load(root, train_per_class=3, **sizes).fold(1, 2, seed=1).identity,
    ]
    assert identity(seed=1)["content"] != own["content"]
    # the same tree in another place, and seen by another process
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "pets")
    program = "import json, sys; from moe_kernels.models.transfer.data import load; "
    program += f"print(json.dumps(load(sys.argv[1], train_per_class=3, **{sizes}).identity))"
    there = subprocess.run([sys.executable, "-c", program, moved], capture_output=True, text=True, check=True).stdout
    assert json.loads(there) == own
    # one other picture, of the same name; two names exchanged
    image(200).save(moved / "dog" / "2.png")
    others.append(identity(moved))
    shutil.copy(root / "dog" / "2.png", moved / "dog" / "2.png")
    assert identity(moved) == own
    (moved / "owl" / "0.png").rename(moved / "owl" / "x.png")
    (moved / "owl" / "1.png").rename(moved / "owl" / "0.png")
    (moved / "owl" / "x.png").rename(moved / "owl" / "1.png")
    others.append(identity(moved))
    told = [json.dumps(other) for other in (own, *others)]
    assert len(set(told)) == len(told)


def test_what_identifies_a_task_of_tensors():
    images, labels = torch.arange(4 * 3 * 6 * 6.0).reshape(4, 3, 6, 6), torch.tensor([0, 1, 0, 1])

    def identity(train=images, labels=labels, test=images, **options):
        return from_tensors("t", ("a", "b"), (train, labels), (test, labels), **options).identity

    assert identity() == identity(train=images.clone())
    assert identity(mean=torch.full((3,), 0.5), std=np.full(3, 0.5, np.float32)) == identity()
    assert (identity()["shape"], identity(crop=4)["crop"]) == ([3, 6, 6], 4)
    changed = images.clone()
    changed[3, 2, 1, 0] += 1
    others = [
        identity(train=changed),
        identity(test=changed),
        identity(labels=labels.flip(0)),
        identity(crop=4),
        identity(mirror=True),
        identity(std=(1.0, 1.0, 1.0)),
        identity(train=images.view(4, 3, 4, 9)),
    ]
    told = [json.dumps(other) for other in (identity(), *others)]
    assert len(set(told)) == len(told)


def test_tensors_are_cropped_and_mirrored_by_chance_in_training_only():
    images = torch.arange(2 * 3 * 6 * 6.0).reshape(2, 3, 6, 6)
    data = from_tensors(
        "t", ("a", "b"), (images, torch.tensor([0, 1])), (images, torch.tensor([0, 1])), crop=4, mirror=True
    )
    for part in (data.plain, data.test):
        assert torch.equal(part[1][0], images[1, :, 1:5, 1:5])
    windows = [images[0, :, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    known = [*windows, *(window.flip(-1) for window in windows)]
    drawn = [data.train[0][0] for _ in range(200)]
    found = {next(i for i, window in enumerate(known) if torch.equal(window, image)) for image in drawn}
    assert len(found) == 18
    data.train[0][0].zero_()
    assert images[0].count_nonzero() == 107
    assert Tensors(images, torch.tensor([0, 1]))[0][0].shape == (3, 6, 6)


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            torch.zeros(2),
            {},
            r"images must be floats \(N, C, H, W\), got torch.float32 \(2, 3, 4\)",
        ),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), {}, "images must be floats"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(3), {}, r"labels must be \(2,\), one an image, got \(3,\)"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2), {}, r"labels must be integers, got torch.float32"),
        (
            torch.zeros(2, 3, 4, 4),
            torch.zeros(2).long(),
            {"crop": 5},
            "crop must be in 1 … 4, the size of the images, got 5",
        ),
        (torch.zeros(2, 3, 4, 4), torch.tensor([0, 2]), {}, "labels of train must be in 0 … 1, got 0 … 2"),
        (torch.zeros(0, 3, 4, 4), torch.zeros(0).long(), {}, "train must have at least one image, got none"),
    ],
)
def test_bad_tensors_are_refused(images, labels, options, message):
    with pytest.raises(ValueError, match=message):
        from_tensors("t", ("a", "b"), (images, labels), (images, labels), **options)


def test_one_class_is_no_task():
    images = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="classes must be at least two, got 1: a"):
        from_tensors("t", ("a",), (images, torch.zeros(2).long()), (images, torch.zeros(2).long()))


def test_folds_deal_every_class_out_evenly_and_test_each_image_once():
    labels = torch.tensor([0] * 9 + [1] * 6 + [2] * 3)
    images = torch.arange(18.0)[:, None, None, None].expand(18, 3, 2, 2)
    data = from_tensors("t", "abc", (images, labels), (images[:1], labels[:1]))
    tested = []
    for index in range(3):
        fold = data.fold(index, 3)
        assert torch.bincount(fold.test.labels).tolist() == [3, 2, 1]
        assert torch.bincount(fold.train.labels).tolist() == [6, 4, 2]
        out = [int(fold.test[i][0][0, 0, 0]) for i in range(len(fold.test))]
        kept = [int(fold.train[i][0][0, 0, 0]) for i in range(len(fold.train))]
        assert sorted(out + kept) == list(range(18))
        assert [int(fold.plain[i][0][0, 0, 0]) for i in range(len(fold.plain))] == kept
        assert [fold.test[i][1] for i in range(len(fold.test))] == labels[out].tolist()
        tested += out
    assert sorted(tested) == list(range(18))
    with pytest.raises(ValueError, match=r"folds must be in 2 … 18, the number of images, got 19"):
        data.fold(0, 19)
    with pytest.raises(ValueError, match=r"index must be in 0 … 2, got 3"):
        data.fold(3, 3)
