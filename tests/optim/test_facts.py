"""Facts against what float64 vectors say."""

import math

import pytest
import torch
from torch import nn

from moe_kernels.optim import AnchoredSGD, Facts


@pytest.fixture(params=[{}, {"foreach": True}], ids=["kernels", "reference"])
def backend(request):
    return request.param


def angle(u, v):
    return torch.rad2deg(torch.arccos((u @ v / (u.norm() * v.norm())).clamp(-1, 1)))


def vectors(seed, conflict):
    generator = torch.Generator().manual_seed(seed)
    w, anchor, noise = torch.randn(3, 20, dtype=torch.float64, generator=generator)
    r = 2 * (w - anchor)
    return w, anchor, 2 * noise - r if conflict else 2 * noise + r


def expected(g, r, d, a):
    return {
        "cosine": g @ r / (g.norm() * r.norm()),
        "scale": torch.as_tensor(a, dtype=torch.float64),
        "direction_to_loss": angle(d, g),
        "direction_to_regularizer": angle(d, r),
        "sum_to_loss": angle(g + r, g),
        "sum_to_regularizer": angle(g + r, r),
    }


def stepped(w, anchor, g, *, steps=1, **kwargs):
    params = [nn.Parameter(part.clone()) for part in w.split([15, 5])]
    optimizer = AnchoredSGD(params, lr=0.0, anchor=anchor.split([15, 5]), coefficient=0.4, **kwargs)
    for _ in range(steps):
        for param, grad in zip(params, g.split([15, 5]), strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return optimizer.facts()


@pytest.mark.parametrize("conflict", [True, False])
@pytest.mark.parametrize("rule", ["dtnh", "pcgrad", "agem"])
def test_facts_of_a_step(rule, conflict, backend):
    w, anchor, g = vectors(0, conflict)
    r = 0.4 * 2 * (w - anchor)
    c = min(0, g @ r)
    a, b = {
        "dtnh": (1 - c / (g @ g), 1),
        "pcgrad": (1 - c / (g @ g), 1 - c / (r @ r)),
        "agem": (1, -c / (r @ r)),
    }[rule]
    facts = stepped(w, anchor, g, steps=3, rule=rule, **backend)
    for name, value in expected(g, r, a * g + b * r, a).items():
        torch.testing.assert_close(getattr(facts, name), value[None], rtol=1e-9, atol=1e-5, msg=name)
    assert facts.steps.tolist() == [3]
    assert facts.conflicts.tolist() == [3 * conflict]
    assert facts.skipped.tolist() == [0]


@pytest.mark.parametrize("rule", ["none", "l2sp"])
def test_rules_that_need_no_moments_have_facts_when_measured(rule, backend):
    w, anchor, g = vectors(0, True)
    r = 0.4 * 2 * (w - anchor)
    facts = stepped(w, anchor, g, rule=rule, measure=True, **backend)
    for name, value in expected(g, r, g if rule == "none" else g + r, 1).items():
        torch.testing.assert_close(getattr(facts, name), value[None], rtol=1e-9, atol=1e-5, msg=name)
    assert facts.conflicts.tolist() == [1]
    unmeasured = stepped(w, anchor, g, rule=rule, **backend)
    assert unmeasured.cosine.isnan().all()
    assert unmeasured.steps.tolist() == [1]
    assert unmeasured.scale.tolist() == [1]


def test_angle_1_is_at_most_angle_3():
    """At one point it is algebra: d of dtnh is never farther from g than the sum g + λr is."""
    for seed in range(50):
        for conflict in (True, False):
            facts = stepped(*vectors(seed, conflict))
            assert facts.direction_to_loss <= facts.sum_to_loss + 1e-6
            if facts.cosine < 0:
                assert facts.direction_to_loss < facts.sum_to_loss


def test_facts_of_every_tensor_and_group(backend):
    w, anchor, g = vectors(0, True)
    g = torch.cat((g[:15], -g[15:]))
    r = 0.4 * 2 * (w - anchor)
    by_tensor = stepped(w, anchor, g, scope="tensor", **backend)
    cosines = [g[part] @ r[part] / (g[part].norm() * r[part].norm()) for part in (slice(0, 15), slice(15, 20))]
    torch.testing.assert_close(by_tensor.cosine, torch.stack(cosines))
    assert by_tensor.conflicts.tolist() == [int(cosine < 0) for cosine in cosines]

    params = [nn.Parameter(part.clone()) for part in w.split([5, 10, 5])]
    anchors = anchor.split([5, 10, 5])
    groups = [{"params": params[:2], "anchor": anchors[:2]}, {"params": params[2:], "anchor": anchors[2:]}]
    optimizer = AnchoredSGD(groups, coefficient=0.4, scope="group", **backend)
    for param, grad in zip(params, g.split([5, 10, 5]), strict=True):
        param.grad = grad
    optimizer.step()
    torch.testing.assert_close(optimizer.facts().cosine, torch.stack(cosines))


def test_before_any_step_and_with_nothing_to_say():
    weight = nn.Parameter(torch.ones(2))
    optimizer = AnchoredSGD([weight], anchor=[torch.ones(2)], coefficient=0.4)
    before = optimizer.facts()
    assert isinstance(before, Facts)
    assert before.steps.tolist() == [0]
    assert before.cosine.isnan().all()
    weight.grad = torch.ones(2)
    optimizer.step()  # at the anchor r is 0 and has no direction
    facts = optimizer.facts()
    assert facts.cosine.isnan().all()
    assert facts.direction_to_loss.tolist() == [0]
    assert facts.scale.tolist() == [1]
    assert before.steps.tolist() == [0]  # facts are not changed by later steps
    weight.grad = torch.zeros(2)
    optimizer.step()
    facts = optimizer.facts()
    assert facts.scale.tolist() == [1]
    assert math.isnan(facts.direction_to_loss)


def test_a_group_that_is_added_later_has_facts():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AnchoredSGD([first], anchor=[torch.zeros(2)], coefficient=0.4, scope="tensor")
    first.grad = -torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "anchor": [torch.zeros(2)]})
    second.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.facts().steps.tolist() == [2, 1]
    assert optimizer.facts().conflicts.tolist() == [2, 0]


def test_what_is_no_longer_measured_is_no_longer_counted(backend):
    w, anchor, g = vectors(0, conflict=True)
    param = nn.Parameter(w.clone())
    optimizer = AnchoredSGD([param], lr=0.0, anchor=[anchor], coefficient=0.4, rule="l2sp", measure=True, **backend)
    for measure in (True, True, False, False):
        optimizer.measure = measure
        param.grad = g.clone()
        optimizer.step()
    assert optimizer.facts().steps.tolist() == [4]
    assert optimizer.facts().conflicts.tolist() == [2]
    assert optimizer.facts().cosine.isnan().all()
