"""Features on disk."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from moe_kernels.models import files
from moe_kernels.models.segmentation import backbones, cache
from moe_kernels.models.segmentation.data.tagged import TaggedImages


def wrap(name="toy", **choice):
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3, padding=1))
    facts = {"image_size": (16, 24), "grid": (16, 24), "head": "3"} | choice
    return backbones.wrap(net, ["1", "2", "3"], name=name, **facts)


def dataset(count=5, seed=0):
    rng = np.random.default_rng(seed)
    images = [rng.integers(0, 256, (10 + number, 30, 3), dtype=np.uint8) for number in range(count)]
    return TaggedImages([f"part/{number}" for number in range(count)], ["a"], np.ones((count, 1)), images)


@pytest.fixture
def forwards(monkeypatch):
    """How many images each forward had."""
    sizes, forward = [], backbones.Backbone.forward
    monkeypatch.setattr(
        backbones.Backbone, "forward", lambda self, images: sizes.append(len(images)) or forward(self, images)
    )
    return sizes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_read_is_what_the_backbone_gives(tmp_path, dtype):
    backbone, data = wrap(), dataset()
    kept = cache.FeatureCache(tmp_path / "cache", backbone, dtype)
    kept.fill(data, batch=2)
    for index, name in enumerate(data.names):
        found, exact = kept.features(name), backbone.features(data.image(index))
        assert found.pyramid.grid == exact.pyramid.grid
        assert len(found.pyramid.maps) == len(exact.pyramid.maps) == 2
        for m, other in zip((*found.pyramid.maps, found.image), (*exact.pyramid.maps, exact.image), strict=True):
            assert (m.dtype, m.shape) == (dtype, other.shape)
            torch.testing.assert_close(m.float(), other, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert all(m.is_contiguous(memory_format=torch.channels_last) for m in found.pyramid.maps)


def test_maps_are_views_of_the_file(tmp_path):
    kept, data = cache.FeatureCache(tmp_path, wrap()), dataset(1)
    kept.fill(data)
    maps, file = kept.features("part/0").pyramid.maps, kept.path("part/0")
    size = file.stat().st_size
    assert kept.backbone.values * 2 < size < kept.backbone.values * 2 + 1000
    assert all(m.any() for m in maps)
    with open(file, "r+b") as inside:
        inside.seek(1000)
        inside.write(bytes(size - 1000))
    assert not all(m.any() for m in maps)


def test_a_backbone_without_global_features(tmp_path):
    kept, data = cache.FeatureCache(tmp_path, wrap(head=None)), dataset(2)
    kept.fill(data)
    assert kept.features("part/1").image is None
    assert len(kept.features("part/1").pyramid.maps) == 2


def test_only_what_is_missing_is_computed(tmp_path, forwards):
    data = dataset()
    cache.FeatureCache(tmp_path, wrap()).fill(data.subset([1, 3]))
    forwards.clear()
    kept = cache.FeatureCache(tmp_path, wrap())
    kept.fill(data, batch=2)
    assert forwards == [2, 1]
    kept.fill(data)
    assert forwards == [2, 1]
    # other images of the same names
    other = dataset(seed=1)
    kept.fill(other.subset([4, 2]))
    assert forwards == [2, 1, 1, 1]
    torch.testing.assert_close(kept.features("part/4").image, wrap().features(other.image(4)).image.half())
    torch.testing.assert_close(kept.features("part/0").image, wrap().features(data.image(0)).image.half())


def test_an_interrupted_fill_is_resumed(tmp_path, forwards, monkeypatch):
    data, kept = dataset(), cache.FeatureCache(tmp_path, wrap())
    prepare = backbones.Backbone.prepare

    def interrupted(self, image):
        if image.size[1] == 13:
            raise KeyboardInterrupt
        return prepare(self, image)

    monkeypatch.setattr(backbones.Backbone, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept.fill(data, batch=1)
    monkeypatch.undo()
    # what a kill inside a write leaves
    (tmp_path / "part" / ".3.safetensors.0a1b.tmp").write_bytes(b"half")
    there = {path.name for path in tmp_path.rglob("*.safetensors")}
    assert there <= {"0.safetensors", "1.safetensors", "2.safetensors"}
    assert there
    kept.fill(data)
    assert {path.name for path in (tmp_path / "part").iterdir()} == {f"{number}.safetensors" for number in range(5)}


@pytest.mark.parametrize(
    ("other", "dtype", "what"),
    [
        (wrap(image_size=(16, 32)), torch.float16, r"image_size: \[16, 24\] there, \[16, 32\] here"),
        (
            wrap("other"),
            torch.float16,
            r"not of this other:.*backbone: 'toy' there, 'other' here",
        ),
        (wrap(), torch.float32, "dtype: 'float16' there, 'float32' here"),
    ],
)
def test_a_folder_of_another_backbone_is_refused(tmp_path, other, dtype, what):
    kept = cache.FeatureCache(tmp_path, wrap())
    kept.fill(dataset(1))
    with pytest.raises(ValueError, match=rf"(?s){tmp_path} holds features of toy, .*{what}.*Take another folder"):
        cache.FeatureCache(tmp_path, other, dtype)
    changed = wrap()
    with torch.no_grad():
        changed.extractor.module[0].weight[0] += 0.1
    with pytest.raises(ValueError, match="weights: '"):
        cache.FeatureCache(tmp_path, changed)
    kept.features("part/0")


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"is not empty and no cache of features \(features.json is missing\)"):
        cache.FeatureCache(tmp_path, wrap())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    # what a kill at the very beginning leaves is no something else
    (tmp_path / "thesis.tex").rename(tmp_path / ".features.json.0a1b.tmp")
    cache.FeatureCache(tmp_path, wrap()).fill(dataset(1))


def test_missing_and_damaged_files_are_named(tmp_path, forwards):
    kept, data = cache.FeatureCache(tmp_path, wrap()), dataset(2)
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path} has no features of part/0; fill the cache"):
        kept.features("part/0")
    kept.fill(data)
    file = kept.path("part/0")
    whole = file.read_bytes()
    for content in (whole[:-10], b"", b"no safetensors", whole[:20]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file} is damaged .*delete it and fill the cache again"):
            kept.features("part/0")
    forwards.clear()
    kept.fill(data)
    assert forwards == [1]
    assert file.read_bytes() == whole


@pytest.mark.parametrize("value", [7e4, -7e4, float("nan")])
def test_values_beyond_the_dtype_are_refused(tmp_path, monkeypatch, value):
    extractor = backbones.Hooked.forward

    def extreme(self, images):
        maps, image = extractor(self, images)
        maps[1][0, 2, 3, 4] = value
        return maps, image

    backbone = wrap()
    monkeypatch.setattr(backbones.Hooked, "forward", extreme)
    kept = cache.FeatureCache(tmp_path / "half", backbone)
    with pytest.raises(
        ValueError, match="image part/0: a feature is beyond the range of float16; take bfloat16 or float32"
    ):
        kept.fill(dataset(1))
    if abs(value) > 1:
        cache.FeatureCache(tmp_path / "single", backbone, torch.float32).fill(dataset(1))


def test_too_little_room_is_said_before_anything_is_computed(tmp_path, monkeypatch, forwards):
    kept = cache.FeatureCache(tmp_path, wrap())
    needed = 5 * kept.backbone.values * 2
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed - 1))
    with pytest.raises(OSError, match=r"has 0.0 GB free, and the features of 5 images take 0.0 GB"):
        kept.fill(dataset())
    assert forwards == []
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=needed))
    kept.fill(dataset())


def test_features_of_another_image_of_the_same_name(tmp_path):
    kept, data, other = cache.FeatureCache(tmp_path, wrap()), dataset(3), dataset(3, seed=1)
    kept.fill(data)
    kept.fill(other.subset([1]))
    assert kept.lacking(dict(zip(data.names, data.digests(), strict=True)) | {"new": "1"}) == ["part/1", "new"]
    kept.features("part/0", data.digest(0))
    kept.features("part/1", other.digest(1))
    with pytest.raises(ValueError, match=r"part/1\.safetensors is of another image of the same name"):
        kept.features("part/1", data.digest(1))


def test_names_too_long_for_a_file_system(tmp_path):
    names = ["ä" * 120, "part/" + "x" * 255, "part/" + "x" * 256]
    kept, data = cache.FeatureCache(tmp_path, wrap()), dataset(3).renamed(names)
    kept.fill(data)
    for index, name in enumerate(names):
        torch.testing.assert_close(kept.features(name).image, wrap().features(data.image(index)).image.half())


def test_what_cannot_be_a_cache(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match="link leads to gone, which is not there"):
        cache.FeatureCache(tmp_path / "link", wrap())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file must be a folder for features"):
        cache.FeatureCache(tmp_path / "file", wrap())
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, float32, got int8"):
        cache.FeatureCache(tmp_path, wrap(), torch.int8)
    files.write_json(tmp_path / "features.json", {})
    with pytest.raises(ValueError, match=r"holds features of None"):
        cache.FeatureCache(tmp_path, wrap())


def test_a_file_that_can_no_longer_be_read_is_named(tmp_path):
    data = dataset(2)
    missing = TaggedImages(data.names, data.classes, data.tags, [tmp_path / "gone.png", data.image(0)])
    with pytest.raises(OSError, match=r"gone\.png"):
        cache.FeatureCache(tmp_path / "cache", wrap()).fill(missing)
