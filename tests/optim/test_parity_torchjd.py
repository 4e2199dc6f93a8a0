"""TorchJD on two objectives, the loss and the regularizer λΩ, whose gradients are g and λr.

What its aggregators make of two rows, where c = ⟨g, λr⟩ < 0 (else all of them add the rows up, or take the preferred):

- PCGrad takes from each row its part along the other: the rule ``pcgrad``.
- The dual cone of {g, λr} are the vectors at no more than 90° to both. The nearest point of it to g is g − c/‖λr‖² λr:
  it is orthogonal to λr, and its product with g is ‖g‖² − c²/‖λr‖² ≥ 0. So DualProj that prefers g is the rule
  ``agem``; DualProj that prefers λr leaves λr − c/‖g‖² g, and g plus that is the rule ``dtnh``; UPGrad, which adds the
  projections of both rows, is ``pcgrad`` (half of it by default, when it takes their mean).
- GradVac turns each row against the other as it was, the rule ``gradvac`` only λr: what both ways add is the sum.
"""

import pytest
import torch

from moe_kernels.optim import AnchoredSGD, project_gradients_

pytest.importorskip("torchjd")
pytest.importorskip("quadprog", reason="the projections of TorchJD need torchjd[quadprog-projector]")

from torchjd import aggregation, autojac
from torchjd.linalg import QuadprogProjector

SHAPES = [(4, 3, 2), (5,), (), (7, 3)]
EXACT = QuadprogProjector(norm_eps=0.0, reg_eps=0.0)
LOSS, REGULARIZER, BOTH = (torch.tensor(weights, dtype=torch.float64) for weights in ([1, 0], [0, 1], [1, 1]))


@pytest.fixture(params=[0.3, 1.0, 4.0], ids="λ={}".format)
def coefficient(request):
    return request.param


@pytest.fixture(params=[-0.9, -0.2, 0.4], ids="cosine {}".format)
def gradients(request):
    """g and r, flat, at this cosine."""
    return at(request.param)


def at(cosine):
    generator = torch.Generator().manual_seed(1)
    size = sum(torch.Size(shape).numel() for shape in SHAPES)
    g, r = torch.linalg.qr(torch.randn(size, 2, generator=generator, dtype=torch.float64)).Q.t()
    return 3 * g, 0.7 * (cosine * g + (1 - cosine**2) ** 0.5 * r)


def ours(g, r, coefficient, rule, **options):
    def tensors(flat):
        pieces = flat.clone().split([torch.Size(shape).numel() for shape in SHAPES])
        return [piece.view(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]

    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in SHAPES]
    for param, grad in zip(params, tensors(g), strict=True):
        param.grad = grad
    project_gradients_(params, tensors(r), coefficient=coefficient, rule=rule, **options)
    return torch.cat([param.grad.flatten() for param in params])


def close(mine, theirs):
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_sum(gradients, coefficient):
    g, r = gradients
    close(ours(g, r, coefficient, "l2sp"), aggregation.Sum()(torch.stack([g, coefficient * r])))


def test_pcgrad(gradients, coefficient):
    g, r = gradients
    close(ours(g, r, coefficient, "pcgrad"), aggregation.PCGrad()(torch.stack([g, coefficient * r])))


def test_pcgrad_is_upgrad(gradients, coefficient):
    g, r = gradients
    rows, mine = torch.stack([g, coefficient * r]), ours(g, r, coefficient, "pcgrad")
    close(mine, aggregation.UPGrad(BOTH, EXACT)(rows))
    close(mine / 2, aggregation.UPGrad(projector=EXACT)(rows))


def test_agem_is_the_projection_of_the_loss(gradients, coefficient):
    g, r = gradients
    close(ours(g, r, coefficient, "agem"), aggregation.DualProj(LOSS, EXACT)(torch.stack([g, coefficient * r])))


def test_dtnh_is_the_loss_and_the_projection_of_the_regularizer(gradients, coefficient):
    g, r = gradients
    projected = aggregation.DualProj(REGULARIZER, EXACT)(torch.stack([g, coefficient * r]))
    close(ours(g, r, coefficient, "dtnh"), g + projected)


@pytest.mark.parametrize("target", [0.0, 0.3])
def test_gradvac_both_ways(gradients, coefficient, target):
    g, r = gradients
    r = coefficient * r
    theirs = aggregation.GradVac(beta=1.0, eps=0.0)  # its target is the cosine of the rows before
    theirs(torch.stack(at(target)))
    both = sum(ours(*rows, 1.0, "gradvac", target_cosine=target) for rows in ((g, r), (r, g)))
    close(both - g - r, theirs(torch.stack([g, r])))


def network():
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).double()


@pytest.mark.parametrize(("rule", "aggregator"), [("l2sp", aggregation.Sum()), ("pcgrad", aggregation.PCGrad())])
def test_training_towards_an_anchor(rule, aggregator):
    """Theirs takes a Jacobian of two losses, ours one backward and the anchor."""
    x, y = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    mine, theirs = network(), network()
    anchor = [param.detach() + 0.3 * (i + 1) * param.detach().cos() for i, param in enumerate(mine.parameters())]
    optimizer = AnchoredSGD(
        mine.parameters(), 0.05, momentum=0.9, anchor=anchor, coefficient=0.2, rule=rule, measure=True
    )
    other = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9)
    for _ in range(20):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(mine(x), y[:, :2]).backward()
        optimizer.step()

        loss = torch.nn.functional.mse_loss(theirs(x), y[:, :2])
        penalty = sum((param - start).square().sum() for param, start in zip(theirs.parameters(), anchor, strict=True))
        autojac.backward([loss, 0.2 * penalty])
        autojac.jac_to_grad(theirs.parameters(), aggregator)
        other.step()
        other.zero_grad()
    assert optimizer.facts().conflicts > 0
    for one, same in zip(mine.parameters(), theirs.parameters(), strict=True):
        close(one, same)
