"""Data sets on disk."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from moe_kernels.models.data import folders

CLASSES = ("cat", "dog")
DATASETS = {
    "PACS": ("art_painting", "cartoon", "photo", "sketch"),
    "VLCS": ("Caltech101", "LabelMe", "SUN09", "VOC2007"),
    "OfficeHome": ("Art", "Clipart", "Product", "Real World"),
    "TerraIncognita": ("location_100", "location_38", "location_43", "location_46"),
    "DomainNet": ("clipart", "infograph", "painting", "quickdraw", "real", "sketch"),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path, seed=0, size=(20, 14)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def tree(root, domains=("one", "two"), classes=CLASSES, images=3):
    for d, domain in enumerate(domains):
        for c, name in enumerate(classes):
            for i in range(images):
                write(root / domain / name / f"{i}.{('jpg', 'png', 'JPEG')[i % 3]}", 100 * d + 10 * c + i)
    return root


def test_a_tree_of_ones_own(tmp_path):
    data = folders.load(tree(tmp_path / "mine", ("b", "a")), image_size=16)
    assert (data.name, data.domains, data.classes) == ("mine", ("a", "b"), CLASSES)
    assert (data.skipped, data.aliases) == ((), {})
    for train, evaluation in zip(data.train, data.evaluation, strict=True):
        assert train.labels.tolist() == evaluation.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert train.files == evaluation.files
        for dataset in (train, evaluation):
            image, label = dataset[4]
            assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.float32, 1)


@pytest.mark.parametrize("name", DATASETS)
def test_known_data_sets_are_recognized(tmp_path, name):
    data = folders.load(tree(tmp_path / "any_name", DATASETS[name], images=1), image_size=8)
    assert (data.name, data.domains) == (name, DATASETS[name])
    assert tuple(sorted(data.domains)) == data.domains


@pytest.mark.parametrize(
    ("name", "on_disk"),
    [
        ("OfficeHome", ("art", "clipart", "product", "Real_World")),
        ("OfficeHome", ("Art", "Clipart", "Product", "RealWorld")),
        ("VLCS", ("CALTECH", "LABELME", "SUN", "PASCAL")),
        ("TerraIncognita", ("100", "38", "43", "46")),
        ("PACS", ("Art Painting", "Cartoon", "Photo", "Sketch")),
    ],
)
def test_names_of_mirrors_become_the_usual_ones(tmp_path, name, on_disk):
    data = folders.load(tree(tmp_path / "x", on_disk, images=1), image_size=8)
    assert (data.name, data.domains) == (name, DATASETS[name])
    for index, (folder, dataset) in enumerate(zip(on_disk, data.evaluation, strict=True)):
        assert data.index(folder) == data.index(DATASETS[name][index]) == index
        assert f"/{folder}/cat/" in dataset.files[0]


def test_an_unknown_domain_lists_the_valid_ones(tmp_path):
    data = folders.load(tree(tmp_path / "x", DATASETS["PACS"], images=1), image_size=8)
    assert data.index("art") == 0
    with pytest.raises(ValueError, match=r"PACS has no domain 'painting'.* art_painting, 1: cartoon, 2: photo"):
        data.index("painting")


def test_items_are_in_imagefolders_order(tmp_path):
    root = tree(tmp_path / "x", classes=("a", "B", "c d"), images=4)
    for name in ("Z.png", "10.png", "9.png", "sub/0.png", "sub-1/0.png", "sub/deep/0.png"):
        write(root / "one" / "a" / name)
    data = folders.load(root, image_size=8)
    theirs = ImageFolder(root / "one")
    assert list(zip(data.train[0].files, data.train[0].labels.tolist(), strict=True)) == theirs.samples
    assert list(data.classes) == theirs.classes


def test_hidden_and_other_files_are_ignored(tmp_path):
    root = tree(tmp_path / "x")
    before = folders.load(root, image_size=8).train[0].files
    for name in (".git/a/x.png", "__MACOSX/one/cat/x.png", "one/.thumbs/x.png", "one/cat/.x.png"):
        write(root / name)
    write(root / "one" / "cat" / ".cache" / "x.png")
    write(root / "one" / "readme.png")
    write(root / "logo.png")
    (root / "one" / "cat" / "notes.txt").write_text("not an image")
    (root / "list.csv").touch()
    data = folders.load(root, image_size=8)
    assert (data.domains, data.classes) == (("one", "two"), CLASSES)
    assert data.train[0].files == before


def test_a_folder_of_documents_is_no_domain_but_an_unpacked_one_is_an_error(tmp_path):
    root = tree(tmp_path / "x")
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").touch()
    with pytest.warns(UserWarning, match="lists has no images and is not taken for a domain"):
        assert folders.load(root, image_size=8).domains == ("one", "two")
    (root / "lists" / "train.txt").rename(root / "train.txt")
    (root / "lists").rename(root / "three")
    with pytest.raises(ValueError, match=r"three has no <class>/<image>.*\(one, two\)"):
        folders.load(root, image_size=8)
    write(root / "three" / "x.png")
    with pytest.raises(ValueError, match=r"three has no <class>/<image>"):
        folders.load(root, image_size=8)


@pytest.mark.parametrize(("below", "what"), [("one", "one domain"), ("one/cat", "one class")])
def test_a_root_too_deep_names_the_right_one(tmp_path, below, what):
    root = tree(tmp_path / "x")
    with pytest.raises(ValueError, match=f"folder of {what}: pass the folder of all domains, {root}$"):
        folders.load(root / below)


def test_a_root_too_high_names_the_right_ones(tmp_path):
    tree(tmp_path / "data" / "PACS", DATASETS["PACS"], images=1)
    with pytest.raises(ValueError, match=rf"PACS/.*folder above: pass {tmp_path}/data/PACS$"):
        folders.load(tmp_path / "data")
    write(tmp_path / "data" / "cover.png")
    tree(tmp_path / "data" / "VLCS", DATASETS["VLCS"], images=1)
    with pytest.raises(ValueError, match=rf"pass {tmp_path}/data/PACS or {tmp_path}/data/VLCS$"):
        folders.load(tmp_path / "data")
    with pytest.raises(ValueError, match=rf"pass {tmp_path}/data/PACS or {tmp_path}/data/VLCS$"):
        folders.load(tmp_path)


def test_a_root_without_images_says_what_is_there(tmp_path):
    (tmp_path / "x" / "pacs.zip").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"it has no image \(.jpg, .*\); it has: pacs.zip$"):
        folders.load(tmp_path / "x")


def test_a_missing_root_says_what_is_beside_it(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(ValueError, match=f"root {tmp_path}/PACS does not exist; {tmp_path} has: pictures$"):
        folders.load(tmp_path / "PACS")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="root must be a folder"):
        folders.load(tmp_path / "file")
    with pytest.raises(ValueError, match="image_size must be positive, got 0"):
        folders.load(tmp_path, image_size=0)


@pytest.mark.parametrize(
    ("asked", "there", "name"),
    [("PACS", "kfold", "PACS"), ("OfficeHome", "OfficeHomeDataset_10072016", "OfficeHome")],
)
def test_another_name_of_the_data_sets_folder_is_taken(tmp_path, asked, there, name):
    tree(tmp_path / there, DATASETS[name], images=1)
    assert folders.load(tmp_path / asked, image_size=8).name == name


def test_a_relative_root(tmp_path, monkeypatch):
    tree(tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    assert folders.load(".", image_size=8).name == "x"


def test_classes_must_be_the_same_everywhere(tmp_path):
    root = tree(tmp_path / "x", ("one", "two", "three"))
    write(root / "two" / "horse" / "0.png")
    (root / "three" / "dog").rename(root / "three" / "Dog")
    with pytest.raises(ValueError, match="same classes") as error:
        folders.load(root)
    lines = str(error.value).splitlines()
    assert lines[1:4] == ["  one lacks Dog, horse", "  three lacks dog, horse", "  two lacks Dog"]


def test_an_empty_class_folder_is_a_warning(tmp_path):
    root = tree(tmp_path / "x")
    (root / "one" / "horse").mkdir()
    write(root / "two" / "horse" / "0.png")
    with pytest.warns(UserWarning, match="domain 'one' has no image of horse"):
        data = folders.load(root, image_size=8)
    assert data.classes == ("cat", "dog", "horse")
    assert data.train[1].labels.tolist().count(2) == 1


@pytest.fixture
def broken(tmp_path):
    root = tree(tmp_path / "x")
    (root / "one" / "cat" / "0.jpg").write_bytes(b"")
    (root / "two" / "dog" / "2.JPEG").write_bytes((root / "two" / "dog" / "2.JPEG").read_bytes()[:300])
    (root / "two" / "dog" / "gone.png").symlink_to(root / "nowhere.png")
    return root, [str(root / name) for name in ("one/cat/0.jpg", "two/dog/2.JPEG", "two/dog/gone.png")]


def test_all_bad_images_are_named_in_one_error(broken):
    root, bad = broken
    with pytest.raises(ValueError, match=rf"^3 of 13 images under {root} cannot be read; .*skip_bad=True") as error:
        folders.load(root)
    assert [line.split(": ")[0].strip() for line in str(error.value).splitlines()[1:]] == bad


def test_bad_images_can_be_left_out_and_are_counted(broken):
    root, bad = broken
    with pytest.warns(UserWarning, match="3 of 13 images"):
        data = folders.load(root, image_size=8, skip_bad=True)
    assert data.skipped == tuple(bad)
    assert [len(dataset) for dataset in data.train] == [5, 5]
    assert data.train[0].labels.tolist() == [0, 0, 1, 1, 1]
    for dataset in data.evaluation:
        assert not set(bad) & set(dataset.files)
        assert len([dataset[i] for i in range(len(dataset))]) == 5


@pytest.mark.filterwarnings("ignore:4 of 8 images")
def test_a_domain_without_a_readable_image_is_an_error(tmp_path):
    root = tree(tmp_path / "x", images=2)
    for file in (root / "one").rglob("*.*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"domain 'one' .* has no image that can be read"):
        folders.load(root, skip_bad=True)


def test_an_image_that_breaks_later_is_named(tmp_path):
    data = folders.load(tree(tmp_path / "x"), image_size=8)
    (tmp_path / "x" / "one" / "cat" / "1.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"one/cat/1.png can no longer be read: cannot identify"):
        data.train[0][1]


def test_eval_transform_is_resize_and_normalization(tmp_path):
    flat = Image.new("RGB", (30, 10), (255, 0, 128))
    image = folders.eval_transform(16)(flat)
    expected = (torch.tensor([1, 0, 128 / 255]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(image, expected[:, None, None].expand(3, 16, 16))
    # The whole width is kept, squeezed: the left half stays the left half.
    halves = Image.new("RGB", (40, 10))
    halves.paste((255, 255, 255), (20, 0, 40, 10))
    squeezed = folders.eval_transform(16)(halves)
    assert (squeezed[:, :, :6] < -1.7).all()
    assert (squeezed[:, :, 10:] > 2.2).all()


def test_train_transform_follows_torchs_generator_and_augments():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, transform = Image.fromarray(pixels), folders.train_transform(16)
    torch.manual_seed(1)
    first = [transform(image) for _ in range(40)]
    torch.manual_seed(1)
    assert all(torch.equal(one, transform(image)) for one in first)
    assert len({one.numpy().tobytes() for one in first}) == 40
    std, mean = torch.tensor(folders.IMAGENET_STD), torch.tensor(folders.IMAGENET_MEAN)
    grey = [(one * std[:, None, None] + mean[:, None, None]).std(0).max() < 1e-3 for one in first]
    assert 0 < sum(grey) < 15


def test_train_transform_has_domainbeds_strengths():
    crop, flip, jitter, grey = folders.train_transform(16).transforms[:4]
    assert (tuple(crop.size), crop.scale, flip.p, grey.p) == ((16, 16), (0.7, 1.0), 0.5, 0.1)
    for strength in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert strength == pytest.approx((0.7, 1.3))
    assert jitter.hue == pytest.approx((-0.3, 0.3))


def test_data_sets_go_to_worker_processes(tmp_path):
    data = folders.load(tree(tmp_path / "x"), image_size=8)
    copy = pickle.loads(pickle.dumps(data.evaluation[0]))
    assert torch.equal(copy[2][0], data.evaluation[0][2][0])
    loader = torch.utils.data.DataLoader(data.train[1], batch_size=3, num_workers=1)
    assert [labels.tolist() for _, labels in loader] == [[0, 0, 0], [1, 1, 1]]
