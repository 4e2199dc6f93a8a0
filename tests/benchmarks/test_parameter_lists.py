"""Parameter lists are those of the networks that they are named after."""

import pytest

from moe_kernels.benchmarks import parameter_lists
from moe_kernels.benchmarks.parameter_lists import ParameterList


def shapes(network):
    return [tuple(parameter.shape) for parameter in network.parameters()]


def test_resnet18_is_torchvisions():
    models = pytest.importorskip("torchvision.models")
    assert ParameterList("resnet18").shapes == shapes(models.resnet18())


@pytest.mark.parametrize("name", ["vit_small", "vit_base"])
def test_vit_is_timms(name):
    timm = pytest.importorskip("timm")
    assert ParameterList(name).shapes == shapes(timm.create_model(f"{name}_patch16_224"))


@pytest.mark.parametrize(
    ("model", "tensors", "elements"),
    [
        ("resnet18", 62, 11_689_512),
        ("vit_small", 152, 22_050_664),
        ("vit_base", 152, 86_567_656),
        ("many", 2000, 2000 * 2048),
    ],
)
def test_sizes(model, tensors, elements):
    workload = ParameterList(model)
    assert (len(workload.shapes), workload.elements) == (tensors, elements)


def test_suites_hold_one_list_each_and_a_gpu_has_a_larger_one():
    on_cpu, on_gpu = parameter_lists.SUITES["cpu"], parameter_lists.SUITES["cuda"]
    assert all(suite == (ParameterList(name),) for name, suite in on_gpu.items())
    assert set(on_gpu) - set(on_cpu) == {"vit_base"}
    assert set(on_cpu) < set(on_gpu)


def test_title_and_tiny():
    workload = ParameterList("resnet18", dtype="bfloat16")
    assert str(workload) == "resnet18, 11.7 M in 62 tensors, bfloat16"
    assert workload.tiny() == ParameterList("few", dtype="bfloat16")
    assert workload.tiny().elements < 2000
