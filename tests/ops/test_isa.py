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
from moe_kernels.ops.grad_projection import adamw_, new_record, project_gradients_, sgd_
from moe_kernels.ops.hypercolumn import gather, linear, norm, pyramid
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
    result = in_process_of(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "within_budget")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["direction", "sgd", "adamw"])
def test_grad_projection_within_budget(kind, dtype):
    sizes = (1, 70, 1025, 20000)
    tensors = {f"{name}{n}": torch.randn(n).to(dtype) for name in ("w", "g", "anchor", "m") for n in sizes}
    tensors |= {f"v{n}": torch.rand(n).to(dtype) for n in sizes}
    common = {"segments": [0] * len(sizes), "coefficient": 0.3, "rule": "dtnh"}

    def run(name, tensors):
        w, g, anchor, m, v = ([tensors[f"{kind}{n}"].clone() for n in sizes] for kind in ("w", "g", "anchor", "m", "v"))
        options = {**common, "record": new_record(1), "reference": name == "reference"}
        if kind == "direction":
            project_gradients_(g, anchor, params=w, **options)
            return dict(zip(map(str, sizes), g, strict=True))
        if kind == "sgd":
            sgd_(w, g, anchor, m, anchored=True, lr=0.1, momentum=0.9, **options)
        else:
            betas = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
            adamw_(w, g, anchor, m, v, [torch.ones(())] * len(sizes), anchored=True, lr=0.1, **betas, **options)
        return dict(zip(map(str, sizes), w, strict=True))

    assert_kernel_within_budget(run, tensors)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_hypercolumn_within_budget(dtype):
    """Maps larger than the grid and smaller, channels and pixels with tails of every width."""
    sizes, grid = [(5, 40, 21), (70, 20, 21), (133, 7, 9), (64, 1, 1)], (20, 21)
    tensors = {f"map{i}": torch.randn(2, *size).to(dtype) for i, size in enumerate(sizes)}
    tensors |= {"weight": torch.randn(37, 272).to(dtype), "bias": torch.randn(37).to(dtype)}
    points, of_columns, of_y = torch.randint(-1, 420, (2, 30)), torch.randn(2, 30, 272), torch.randn(2, 37, *grid)

    def run(name, tensors):
        leaves = {n: tensor.clone().requires_grad_() for n, tensor in tensors.items()}
        with backend.force(name):
            of = pyramid([leaves[f"map{i}"] for i in range(len(sizes))], grid)
            columns, y, norms = gather(of, points), linear(of, leaves["weight"], leaves["bias"]), norm(of)
            grads = torch.autograd.grad((columns, y), list(leaves.values()), (of_columns.to(y), of_y.to(y)))
        return dict(zip(("columns", "y", "norms", *leaves), (columns, y, norms, *grads), strict=True))

    assert_kernel_within_budget(run, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_and_its_rounding_are_torchs_within_budget(dtype):
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    options = {"record": new_record(1), "segments": [-1], "coefficient": 0.0, "rule": "none"}
    kept = every.clone()
    project_gradients_([kept], [], **options)
    assert torch.equal(kept.nan_to_num(), every.nan_to_num())
    assert torch.equal(kept.isnan(), every.isnan())
    assert torch.equal(kept[~kept.isnan()].signbit(), every[~every.isnan()].signbit())
    w, g = every.repeat(4), every[torch.randint(65536, (4 * 65536,))]
    rounded = (w.float() - g.float()).to(dtype)
    sgd_([w], [g], [], [], anchored=False, lr=1.0, **options)
    assert torch.equal(w.isnan(), rounded.isnan())
    assert torch.equal(w.nan_to_num(), rounded.nan_to_num())
