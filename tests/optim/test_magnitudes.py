"""Gradients and references of any size: nothing over- or underflows on the way to d."""

import math

import pytest
import torch
from torch import nn

from moe_kernels.optim import AnchoredAdamW, AnchoredSGD, project_gradients_

N = 1031  # vectors and a rest


@pytest.fixture(params=[{}, {"foreach": True}], ids=["kernels", "reference"])
def backend(request):
    return request.param


def opposed(size, dtype=torch.float32):
    """w, w⁰ = 0 and a gradient of ``size`` against 2 w, in all but some of the elements."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(N, generator=generator).to(dtype)
    return w, torch.zeros_like(w), (size * (torch.randn(N, generator=generator) - w)).to(dtype)


def step(w, anchor, g, **kwargs):
    param = nn.Parameter(w.clone())
    optimizer = AnchoredSGD([param], lr=1.0, anchor=[anchor], coefficient=0.5, **kwargs)
    param.grad = g.clone()
    optimizer.step()
    return param.detach(), optimizer.facts()


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e-20, 1e-10, 1.0, 1e10, 1e18, 1e30])
def test_the_size_of_the_gradient_does_not_matter(size, dtype, scope, backend):
    w, anchor, g = opposed(size, dtype)
    found, facts = step(w, anchor, g, scope=scope, **backend)
    x, r = g.double(), w.double()
    expected = w.double() - (x + r - (x @ r) / (x @ x) * x)
    assert facts.conflicts.item() == 1
    assert torch.linalg.norm(found.double() - expected) <= 2 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("rule", ["dtnh", "pcgrad", "agem", "digrap", "gradvac"])
@pytest.mark.parametrize(
    ("make", "distance", "gradient"),
    [
        (make, distance, gradient)
        for make, most in ((AnchoredSGD, math.inf), (AnchoredAdamW, 1e18))  # where Adam's square of d overflows
        for distance in (1e-45, 1e-30, 1.0, 1e19)
        for gradient in (1e-45, 1e-41, 1e-30, 1e19, 1e30)
        if max(distance, gradient) < most
    ],
)
def test_what_is_finite_stays_so(make, distance, gradient, rule, backend):
    param = nn.Parameter(torch.full((N,), distance))
    optimizer = make([param], lr=1e-3, anchor=[torch.zeros(N)], coefficient=0.5, rule=rule, **backend)
    param.grad = torch.full((N,), -gradient)
    optimizer.step()
    assert param.isfinite().all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_in_its_element(value, backend):
    w, anchor, g = opposed(1.0)
    g[5] = value
    found, _ = step(w, anchor, g, **backend)
    assert found.isfinite().logical_not().nonzero().flatten().tolist() == [5]
    torch.testing.assert_close(found[6:], (w - (g + w))[6:], msg="no projection")


def test_gradvac_of_opposite_vectors(backend):
    """Whose cosine rounds to less than −1, and −1 is what is wanted at least."""
    for seed in range(50):
        w = torch.randn(33, generator=torch.Generator().manual_seed(seed))
        found, facts = step(w, torch.zeros(33), -1.7 * w, rule="gradvac", target_cosine=-1.0, **backend)
        torch.testing.assert_close(found, w - (-1.7 * w + w))
        assert facts.cosine.item() == pytest.approx(-1)
        assert facts.cosine.item() >= -1


def test_a_projection_by_itself():
    w, _, g = opposed(1e-25)
    param = nn.Parameter(w.clone())
    param.grad = g.clone()
    project_gradients_([param], [w], coefficient=1.0)
    x, r = g.double(), w.double()
    torch.testing.assert_close(param.grad.double(), x + r - (x @ r) / (x @ x) * x, rtol=1e-5, atol=1e-6)
