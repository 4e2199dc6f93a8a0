"""The common interface of data sets with domains."""

import numpy as np
import pytest
import torch

from moe_kernels.models.data.domains import Domains, ImageDataset, normalized_name


class Flat(ImageDataset):
    """Images of one colour each."""

    def __init__(self, labels, values):
        self.labels, self.values = torch.tensor(labels), values

    def __getitem__(self, index):
        return torch.full((3, 2, 2), self.values[index]), int(self.labels[index])


def make(domains=("Art", "Real World"), **changes):
    sets = tuple(Flat([0, 1, 0], [-1.0, 0.0, 1.0]) for _ in range(2))
    fields = {"name": "toy", "classes": ("a", "b"), "domains": domains, "train": sets, "evaluation": sets}
    return Domains(**(fields | changes))


@pytest.mark.parametrize("name", ["Real World", "Real_World", "realworld", "REAL-WORLD", 1, "1", "photo"])
def test_a_domain_is_found_under_its_names(name):
    assert make(aliases={"Photo": "Real World"}).index(name) == 1


def test_a_name_goes_before_an_alias_and_an_index():
    data = make(domains=("1", "0"), aliases={"1": "0"})
    assert data.index("1") == 0
    assert data.index(1) == 1


@pytest.mark.parametrize("name", ["Clipart", "", "2", 2, -1, "-1"])
def test_an_unknown_domain_lists_the_valid_ones(name):
    with pytest.raises(ValueError, match=r"toy has no domain .*; its domains are 0: Art, 1: Real World"):
        make().index(name)


def test_parts_must_fit_together():
    one = (Flat([0], [0.0]),)
    with pytest.raises(ValueError, match=r"train must have one data set a domain: 2 domains .* got 1"):
        make(train=one)
    with pytest.raises(ValueError, match="domain 'Real World' they have 1 and 3"):
        make(train=(Flat([0, 1, 0], [0.0] * 3), *one))
    with pytest.raises(ValueError, match="different names"):
        make(domains=("Real World", "real_world"))


def test_normalized_names():
    assert normalized_name("Real_World 2") == "realworld2"


def test_pixels_undo_the_normalization():
    data = make(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    raw = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    normalized = (raw.astype(np.float32) / 255 - np.float32(data.mean)) / np.float32(data.std)
    assert np.array_equal(data.pixels(torch.from_numpy(normalized).permute(0, 3, 1, 2)), raw)
    assert data.pixels(torch.full((3, 1, 1), 9.0)).tolist() == [[[255, 255, 255]]]
