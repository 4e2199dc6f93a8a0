"""Feature maps are those of the networks that they are named after, and the work on them is what has to be done."""

import pytest
import torch

from moe_kernels.benchmarks import hypercolumn, pyramids
from moe_kernels.benchmarks.hypercolumn import DIRECTIONS, GATHER, INNER, LINEAR, NORM
from moe_kernels.benchmarks.pyramids import CONTIGUOUS, FeatureMaps
from moe_kernels.benchmarks.workloads import Draw

CPU = torch.device("cpu")
VGG = FeatureMaps("vgg16")


def test_vgg_is_torchvisions():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        layers, x = models.vgg16().features, torch.empty(1, 3, 256, 336)
    sizes = []
    for layer in layers:
        x = layer(x)
        if isinstance(layer, torch.nn.ReLU):
            sizes.append(tuple(x.shape[1:]))
        elif isinstance(layer, torch.nn.MaxPool2d):
            sizes[-1] = tuple(x.shape[1:])  # in the place of the block's last convolution
    assert tuple(sizes) == VGG.sizes


def test_sizes_and_title():
    assert (VGG.channels, VGG.locations) == (4224, 5376)
    levels = [(896, 64, 84), (1280, 32, 42), (1536, 16, 21), (512, 8, 10)]
    drawn = {layout: FeatureMaps("few", layout).maps(Draw(FeatureMaps("few"), CPU)) for layout in pyramids.LAYOUTS}
    assert [tuple(m.shape[1:]) for m in drawn["pyramid"]] == [(8, 6, 7), (8, 3, 4), (4, 1, 1)]
    assert [tuple(m.shape[1:]) for m in drawn["contiguous"]] == list(FeatureMaps("few").sizes)
    assert all(m.is_contiguous() for m in drawn["contiguous"])
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in drawn["channels last"])
    assert hypercolumn.work(VGG, LINEAR).flops == 2 * 512 * sum(c * h * w for c, h, w in levels)
    assert hypercolumn.work(VGG, INNER).flops == 2 * 20 * sum(c * h * w for c, h, w in levels)
    assert str(VGG) == "vgg16, D=4224 at 64×84, pyramid, float32"


def test_work_counts_every_byte_once():
    one = FeatureMaps("vit_base", dtype="float16")
    pixels, locations = 768 * 16 * 21, 5376
    assert hypercolumn.work(one, NORM) == hypercolumn.Work(0, 2 * (pixels + locations))
    assert hypercolumn.work(one, LINEAR).bytes == 2 * (pixels + 512 * (768 + 1 + locations))
    assert hypercolumn.work(one, GATHER) == hypercolumn.Work(0, 2 * 768 * (4 * 60 + 60))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_layouts_hold_the_same_values(direction):
    first, *others = (
        hypercolumn.BENCHMARK.build(workload, direction, CPU).candidates["plain PyTorch"]()["y"]
        for workload in pyramids.QUICK
    )
    for other in others:
        torch.testing.assert_close(first, other)
    assert [workload.representative for workload in pyramids.QUICK] == [True, False, False]
    assert FeatureMaps("vgg16", CONTIGUOUS).tiny() == pyramids.QUICK[2]
