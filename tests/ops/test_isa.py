"""The C++ kernels of every instruction set that this processor has, each in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from support import assert_within_budget, nudged

from moe_kernels import backend
from moe_kernels.ops.dispatch import dispatch
from moe_kernels.ops.expert_ffn import expert_ffn
from moe_kernels.ops.routing import route

pytestmark = pytest.mark.skipif(bool(backend.refusal("cpp", "cpu")), reason="the C++ kernels were not built")

# T, d, h, E, k: tails of every width of a panel, several units of an expert, weights read as they stand and packed.
SHAPES = [(3, 16, 40, 2, 1), (37, 19, 23, 5, 2), (90, 16, 24, 2, 1), (130, 33, 70, 3, 3), (700, 48, 96, 1, 1)]


def in_process_of(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"MOE_KERNELS_ISA": isa}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_a_set_that_is_not_there_is_refused_by_name():
    result = in_process_of("avx1024", "-c", "import moe_kernels._C")
    assert result.returncode != 0
    assert "MOE_KERNELS_ISA: expected one of what this processor has, baseline" in result.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_all_shapes_in_a_process_of(isa):
    if in_process_of(isa, "-c", "import moe_kernels._C").returncode != 0:
        pytest.skip(f"this processor has no {isa}")
    result = in_process_of(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "shape_within_budget")
    assert result.returncode == 0, result.stdout[-3000:]


def assert_kernel_within_budget(run, tensors):
    """``run(backend, tensors)`` in the dtype of the tensors on both backends, and in float64."""
    kernel, plain = run("cpp", tensors), run("reference", tensors)
    exact = run("reference", {name: tensor.double() for name, tensor in tensors.items()})
    moved = run("reference", nudged(tensors))
    for name, tensor in kernel.items():
        if tensor.dtype == torch.float64:  # plain PyTorch is the exact result here
            torch.testing.assert_close(tensor, exact[name], rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(tensor, plain[name], exact[name], moved[name], name=name)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_within_budget(shape, dtype, save):
    tokens, dim, hidden, num_experts, top_k = shape
    experts = torch.rand(tokens, num_experts).argsort(1)[:, :top_k].contiguous()
    plan, seed = dispatch(experts, num_experts), torch.tensor([7])
    tensors = {
        "x": torch.randn(tokens, dim),
        "w1": torch.randn(num_experts, hidden, dim) / dim**0.5,
        "b1": torch.randn(num_experts, hidden),
        "w2": torch.randn(num_experts, dim, hidden) / hidden**0.5,
        "b2": torch.randn(num_experts, dim),
        "gates": torch.rand(tokens, top_k),
    }
    narrow = torch.float64 if dtype == torch.float64 else torch.float32  # of the gates
    tensors = {name: tensor.to(narrow if name == "gates" else dtype) for name, tensor in tensors.items()}
    upstream = torch.randn(tokens, dim)

    def run(name, tensors):
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in tensors.items()}
        with backend.force(name):
            y = expert_ffn(**leaves, dispatch=plan, dropout_p=0.3, seed=seed, save=save)
        grads = torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype))
        return dict(zip(("y", *leaves), (y, *grads), strict=True))

    assert_kernel_within_budget(run, tensors)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routing_of_shape_within_budget(shape):
    tokens, dim, features, num_experts, top_k = shape
    tensors = {
        "x": torch.randn(tokens, dim),
        "projection": torch.randn(features, dim),
        "bias": torch.randn(features),
        "embedding": torch.randn(num_experts, features),
        "log_scale": torch.tensor([0.7]),
    }

    def run(name, tensors):
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in tensors.items()}
        with backend.force(name):
            routing = route(**leaves, top_k=top_k, noise_std=0.5, seed=torch.tensor([3]))
        loss = routing.gates.square().sum() + routing.statistics.load.square().sum() / tokens
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(("gates", *leaves), (routing.gates, *grads), strict=True))

    assert_kernel_within_budget(run, tensors)
