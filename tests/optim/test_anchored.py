"""The optimizers' directions, and what they have in common with torch's."""

import copy

import pytest
import torch
from torch import nn

from moe_kernels.optim import AnchoredAdamW, AnchoredSGD

BACKENDS = {"kernels": {}, "reference": {"foreach": True}}
SHAPES = [(7, 3), (5,), (2, 3, 4), ()]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return BACKENDS[request.param]


def random(*, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def parameters(tensors):
    return [nn.Parameter(tensor.clone()) for tensor in tensors]


def set_grads(params, grads):
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.clone()


def direction(params, grads, **kwargs):
    """What a step of SGD with lr 1 subtracts."""
    before = [param.detach().clone() for param in params]
    optimizer = AnchoredSGD(params, lr=1.0, **kwargs)
    set_grads(params, grads)
    optimizer.step()
    return [old - param.detach() for old, param in zip(before, params, strict=True)], optimizer


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def conflicting(dtype=torch.float64):
    """Parameters, anchors and gradients with ⟨g, r⟩ < 0."""
    w, anchors = random(seed=1, dtype=dtype), random(seed=2, dtype=dtype)
    noise = random(seed=3, dtype=dtype)
    return w, anchors, [n - (x - a) for n, x, a in zip(noise, w, anchors, strict=True)]


def test_dtnh_in_conflict_follows_the_loss(backend):
    w, anchors, g = conflicting()
    d, _ = direction(parameters(w), g, anchor=anchors, coefficient=0.7, **backend)
    r = 2 * (flat(w) - flat(anchors))
    g = flat(g)
    assert g @ r < 0
    torch.testing.assert_close(flat(d) @ g, g @ g)
    torch.testing.assert_close(flat(d), (1 - 0.7 * (g @ r) / (g @ g)) * g + 0.7 * r)


def test_dtnh_without_conflict_is_the_sum(backend):
    w, anchors, g = conflicting()
    d, _ = direction(parameters(w), [-x for x in g], anchor=anchors, coefficient=0.7, **backend)
    torch.testing.assert_close(flat(d), -flat(g) + 0.7 * 2 * (flat(w) - flat(anchors)))


def test_dtnh_is_continuous_where_a_conflict_begins(backend):
    w, anchors = random(seed=1, dtype=torch.float64), random(seed=2, dtype=torch.float64)
    r = 2 * (flat(w) - flat(anchors))
    g = flat(random(seed=3, dtype=torch.float64))
    g = g - (g @ r) / (r @ r) * r
    sides = []
    for side in (-1e-9, 1e-9):
        near = g + side * r
        assert (near @ r).sign() == (-1 if side < 0 else 1)
        split = [part.reshape(shape) for part, shape in zip(near.split([21, 5, 24, 1]), SHAPES, strict=True)]
        d, _ = direction(parameters(w), split, anchor=anchors, coefficient=0.7, **backend)
        sides.append(flat(d))
    torch.testing.assert_close(*sides, rtol=0, atol=1e-7)


def test_scopes_differ(backend):
    """The first tensor agrees, the second conflicts by less: no conflict over both, one in the second."""
    w = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    anchors = [torch.zeros(2), torch.zeros(2)]
    g = [torch.tensor([3.0, 1.0]), torch.tensor([-2.0, 0.0])]
    plain = [x + 0.5 * 2 * v for x, v in zip(g, w, strict=True)]
    over_all, _ = direction(parameters(w), g, anchor=anchors, coefficient=0.5, scope="global", **backend)
    by_tensor, optimizer = direction(parameters(w), g, anchor=anchors, coefficient=0.5, scope="tensor", **backend)
    torch.testing.assert_close(over_all, plain)
    torch.testing.assert_close(by_tensor[0], plain[0])
    torch.testing.assert_close(by_tensor[1], torch.tensor([-2.0, 1.0]))
    assert optimizer.facts().conflicts.tolist() == [0, 1]
    params = parameters(w)
    groups = [{"params": [param], "anchor": [anchor]} for param, anchor in zip(params, anchors, strict=True)]
    optimizer = AnchoredSGD(groups, lr=1.0, coefficient=0.5, scope="group", **backend)
    set_grads(params, g)
    optimizer.step()
    torch.testing.assert_close([old - param.detach() for old, param in zip(w, params, strict=True)], by_tensor)
    assert optimizer.facts().conflicts.tolist() == [0, 1]


def test_the_pull_is_that_of_the_squared_distance(backend):
    """Ω = ‖w − w⁰‖² as in the paper, so r = 2 (w − w⁰)."""
    w, anchors = torch.randn(5), torch.randn(5)
    d, _ = direction(parameters([w]), [torch.zeros(5)], anchor=[anchors], coefficient=0.3, rule="l2sp", **backend)
    torch.testing.assert_close(d[0], 0.3 * 2 * (w - anchors))
    reference = w.clone().requires_grad_()
    (0.3 * (reference - anchors).square().sum()).backward()
    torch.testing.assert_close(d[0], reference.grad)


def test_groups_with_their_own_coefficients(backend):
    """Two groups are one vector for scope global, each weighted by its own λ."""
    w, anchors, g = conflicting()
    params = parameters(w)
    groups = [{"params": params[:2]}, {"params": params[2:], "coefficient": 0.1}]
    optimizer = AnchoredSGD(groups, lr=1.0, anchor=anchors, coefficient=0.7, **backend)
    set_grads(params, g)
    optimizer.step()
    weighted = flat([c * 2 * (x - a) for c, x, a in zip((0.7, 0.7, 0.1, 0.1), w, anchors, strict=True)])
    g = flat(g)
    expected = (1 - min(0, g @ weighted) / (g @ g)) * g + weighted
    assert g @ weighted < 0
    torch.testing.assert_close(flat([old - param.detach() for old, param in zip(w, params, strict=True)]), expected)
    assert optimizer.facts().steps.tolist() == [1]
    torch.testing.assert_close(optimizer.facts().scale, (1 - g @ weighted / (g @ g))[None])


def test_several_groups_are_the_bits_of_one(backend):
    """Where all have one λ; the moments are summed another way, in float64."""
    w, anchors, g = conflicting(torch.float32)
    one, _ = direction(parameters(w), g, anchor=anchors, coefficient=0.7, **backend)
    params = parameters(w)
    groups = [{"params": params[1:3], "anchor": anchors[1:3]}, {"params": params[:1], "anchor": anchors[:1]}]
    optimizer = AnchoredSGD(groups, lr=1.0, coefficient=0.7, **backend)
    optimizer.add_param_group({"params": params[3], "anchor": anchors[3:]})
    set_grads(params, g)
    optimizer.step()
    several = [old - param.detach() for old, param in zip(w, params, strict=True)]
    torch.testing.assert_close(several, one, rtol=3e-7, atol=1e-7)


def test_anchored_only_leaves_a_new_head_alone(backend):
    w, anchors, g = conflicting()
    d, optimizer = direction(parameters(w), g, anchor=[*anchors[:2], None, None], coefficient=0.7, **backend)
    r = flat([2 * (x - a) for x, a in zip(w[:2], anchors[:2], strict=True)])
    everything, body = flat(g), flat(g[:2])
    a = 1 - 0.7 * (body @ r) / (everything @ everything)
    assert a > 1
    torch.testing.assert_close(flat(d), torch.cat((a * body + 0.7 * r, a * flat(g[2:]))))

    d, optimizer = direction(
        parameters(w), g, anchor=[*anchors[:2], None, None], coefficient=0.7, anchored_only=True, **backend
    )
    a = 1 - 0.7 * (body @ r) / (body @ body)
    torch.testing.assert_close(flat(d), torch.cat((a * body + 0.7 * r, flat(g[2:]))))
    torch.testing.assert_close(optimizer.facts().scale, a[None])


def test_maximize_climbs_and_stays_near(backend):
    w, anchors, g = conflicting()
    descent, _ = direction(parameters(w), g, anchor=anchors, coefficient=0.7, **backend)
    climb, _ = direction(parameters(w), [-x for x in g], anchor=anchors, coefficient=0.7, maximize=True, **backend)
    torch.testing.assert_close(climb, descent)


def test_the_coefficient_matters(backend):
    """A regularizer without effect is a bug that happened."""
    ends = []
    for coefficient in (0.0, 0.01, 1.0):
        w, anchors, _ = conflicting(torch.float32)
        params = parameters(w)
        optimizer = AnchoredAdamW(params, lr=0.1, anchor=anchors, coefficient=coefficient, **backend)
        for step in range(3):
            set_grads(params, random(seed=step))
            optimizer.step()
        ends.append(flat([param.detach() for param in params]))
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


SGD_OPTIONS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "maximize": True},
    {"weight_decay": 0.1, "maximize": True},
]
ADAMW_OPTIONS = [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}, {"maximize": True, "weight_decay": 0}]


@pytest.mark.parametrize("inert", [{"coefficient": 0.0}, {"coefficient": 2.0, "rule": "none"}], ids=["zero", "none"])
@pytest.mark.parametrize(
    ("ours", "theirs", "options"),
    [(AnchoredSGD, torch.optim.SGD, options) for options in SGD_OPTIONS]
    + [(AnchoredAdamW, torch.optim.AdamW, options) for options in ADAMW_OPTIONS],
)
def test_without_a_regularizer_it_is_torchs_optimizer(ours, theirs, options, inert, backend):
    w, anchors = random(seed=1), random(seed=2)
    mine, torchs = parameters(w), parameters(w)
    optimizer = ours(mine, lr=0.1, anchor=anchors, **inert, **options, **backend)
    expected = theirs(torchs, lr=0.1, fused=True, **options)
    for step in range(6):
        g = random(seed=10 + step)
        if step == 2:
            g[1] = None
        set_grads(mine, g)
        set_grads(torchs, g)
        with torch.no_grad():  # from where torch's is: what a step rounds is not to add up
            for param, other in zip(mine, torchs, strict=True):
                param.copy_(other)
                for key, state in expected.state[other].items():
                    optimizer.state[param][key].copy_(state)
        before = [param.detach().clone() for param in torchs]
        optimizer.step()
        expected.step()
        for param, other, old in zip(mine, torchs, before, strict=True):
            # One unit in the last place of what was added up, which may cancel.
            unit = torch.finfo(torch.float32).eps * torch.maximum(old.abs(), other.abs()).clamp(min=1)
            assert ((param - other).abs() <= unit).all(), (step, param.shape)
            for key, state in expected.state[other].items():
                unit = torch.finfo(torch.float32).eps * state.abs().clamp(min=1)
                assert ((optimizer.state[param][key] - state).abs() <= unit).all(), (step, key)


def test_first_step_with_dampening_by_parameter(backend):
    """A parameter whose first gradient comes later than that of the others begins with buffer = d, as in torch."""
    w = random(seed=1)
    mine, torchs = parameters(w), parameters(w)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer = AnchoredSGD(mine, anchor=w, coefficient=0.0, rule="dtnh", **options, **backend)
    expected = torch.optim.SGD(torchs, foreach=False, **options)
    for step in range(4):
        g = random(seed=10 + step)
        g[2] = g[2] if step >= 2 else None
        set_grads(mine, g)
        set_grads(torchs, g)
        optimizer.step()
        expected.step()
    torch.testing.assert_close(mine, torchs)
    assert optimizer.facts().steps.tolist() == [4]


def test_regularizer_grads_in_the_place_of_anchors(backend):
    w, anchors, g = conflicting()
    expected, _ = direction(parameters(w), g, anchor=anchors, coefficient=0.7, **backend)
    params = parameters(w)
    named = [(f"p{i}", param) for i, param in enumerate(params)]
    r = [2 * (x - a) for x, a in zip(w, anchors, strict=True)]
    for given in (r, {f"p{i}": x for i, x in enumerate(r)}):
        for param, old in zip(params, w, strict=True):
            param.data.copy_(old)
        optimizer = AnchoredSGD(named, lr=1.0, coefficient=0.7, **backend)
        set_grads(params, g)
        optimizer.step(regularizer_grads=given)
        torch.testing.assert_close([x - param.detach() for x, param in zip(w, params, strict=True)], expected)


def test_no_gradient_no_part(backend):
    """A parameter without a gradient neither moves nor counts; one with a gradient of zero is still drawn."""
    w, anchors, g = conflicting()
    d, _ = direction(
        parameters(w), [g[0], None, torch.zeros_like(g[2]), g[3]], anchor=anchors, coefficient=0.7, **backend
    )
    kept = [0, 2, 3]
    expected, _ = direction(
        parameters([w[i] for i in kept]),
        [g[0], torch.zeros_like(g[2]), g[3]],
        anchor=[anchors[i] for i in kept],
        coefficient=0.7,
        **backend,
    )
    assert torch.equal(d[1], torch.zeros_like(w[1]))
    torch.testing.assert_close([d[i] for i in kept], expected)
    assert not torch.equal(d[2], torch.zeros_like(d[2]))


def test_frozen_and_then_not(backend):
    w, anchors, g = conflicting()
    params = parameters(w)
    params[0].requires_grad_(False)
    optimizer = AnchoredSGD(params, lr=1.0, momentum=0.9, anchor=anchors, coefficient=0.7, **backend)
    assert "momentum_buffer" not in optimizer.state[params[0]]
    set_grads(params, [None, *g[1:]])
    optimizer.step()
    assert torch.equal(params[0], w[0])
    params[0].requires_grad_(True)
    set_grads(params, g)
    optimizer.step()
    assert not torch.equal(params[0], w[0])


def test_gradient_accumulation_projects_once(backend):
    """Two micro-batches and one step are one batch: the regularizer's gradient does not depend on the data."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    ends = []
    for parts in (1, 2):
        torch.manual_seed(1)
        model = nn.Linear(4, 2)
        anchor = [parameter.detach() - 1 for parameter in model.parameters()]
        optimizer = AnchoredSGD(model.parameters(), lr=0.1, anchor=anchor, coefficient=0.7, **backend)
        for inputs, labels in zip(x.chunk(parts), y.chunk(parts), strict=True):
            (nn.functional.mse_loss(model(inputs), labels) / parts).backward()
        optimizer.step()
        ends.append(flat([parameter.detach() for parameter in model.parameters()]))
    torch.testing.assert_close(*ends)


def test_closures_and_schedules(backend):
    model = nn.Linear(4, 2)
    anchor = [parameter.detach() - 1 for parameter in model.parameters()]
    optimizer = AnchoredSGD(model.parameters(), lr=1.0, momentum=0.9, anchor=anchor, coefficient=0.7, **backend)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    x = torch.randn(3, 4)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    expected = model(x).square().sum()
    assert optimizer.step(closure) == expected
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    before = model.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step(closure)
    assert torch.equal(model.weight, before)
    optimizer.param_groups[0]["coefficient"] = -1.0
    with pytest.raises(ValueError, match="coefficient: expected a finite number ≥ 0, got -1"):
        optimizer.step(closure)


def test_scalars_as_tensors(backend):
    w, anchors, g = conflicting(torch.float32)
    expected, _ = direction(parameters(w), g, anchor=anchors, coefficient=0.5, **backend)
    params = parameters(w)
    coefficient = torch.tensor([0.0])
    optimizer = AnchoredSGD(params, lr=torch.tensor(1.0), anchor=anchors, coefficient=coefficient, **backend)
    coefficient.fill_(0.5)
    set_grads(params, g)
    optimizer.step()
    torch.testing.assert_close([old - param.detach() for old, param in zip(w, params, strict=True)], expected)


@pytest.mark.parametrize("ours", [AnchoredSGD, AnchoredAdamW])
def test_a_compiled_model(ours):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plain = copy.deepcopy(model)
    anchor = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    x = torch.randn(3, 4)
    compiled = torch.compile(model, backend="aot_eager")
    for trained, parameters_of in ((compiled, model), (plain, plain)):
        optimizer = ours(parameters_of.named_parameters(), lr=0.1, anchor=anchor, coefficient=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            trained(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


def test_a_compiled_training_step():
    model = nn.Linear(4, 2)
    plain = copy.deepcopy(model)
    anchor = [parameter.detach() + 1 for parameter in model.parameters()]
    x = torch.randn(3, 4)

    def train(model, optimizer):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    for trained, step in ((model, torch.compile(train, backend="aot_eager")), (plain, train)):
        optimizer = AnchoredSGD(trained.parameters(), lr=0.1, anchor=anchor, coefficient=0.1)
        for _ in range(3):
            step(trained, optimizer)
        assert optimizer.facts().steps.tolist() == [3]
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))


def test_weight_averaging():
    """SWA and copies of the model take nothing of the optimizer with them."""
    model = nn.Linear(4, 2)
    anchor = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = AnchoredSGD(model.parameters(), lr=0.1, anchor=anchor, coefficient=0.1)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    schedule = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
        averaged.update_parameters(model)
        schedule.step()
    assert averaged.module.weight.isfinite().all()
    for parameter, original in zip(model.parameters(), anchor, strict=True):
        assert torch.equal(optimizer.state[parameter]["anchor"], original)


@pytest.mark.parametrize("rule", ["none", "l2sp", "dtnh", "pcgrad", "agem", "digrap", "gradvac"])
def test_every_rule(rule, backend):
    w, anchors, g = conflicting()
    d, _ = direction(
        parameters(w), g, anchor=anchors, coefficient=0.7, rule=rule, omega=0.5, target_cosine=0.2, **backend
    )
    g, r = flat(g), 0.7 * 2 * (flat(w) - flat(anchors))
    dot, loss, pull = g @ r, g @ g, r @ r
    assert dot < 0
    cosine = dot / (loss * pull).sqrt()
    turn = (pull / loss).sqrt() * (0.2 * (1 - cosine**2).sqrt() - cosine * 0.96**0.5) / 0.96**0.5
    expected = {
        "none": g,
        "l2sp": g + r,
        "dtnh": (1 - dot / loss) * g + r,
        "pcgrad": (1 - dot / loss) * g + (1 - dot / pull) * r,
        "agem": g - dot / pull * r,
        "digrap": g - 0.5 * dot / pull * r,
        "gradvac": (1 + turn) * g + r,
    }[rule]
    torch.testing.assert_close(flat(d), expected)
    if rule == "gradvac":
        turned = expected - g
        torch.testing.assert_close(turned @ g / (turned.norm() * g.norm()), torch.tensor(0.2, dtype=torch.float64))
