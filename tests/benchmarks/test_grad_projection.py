"""The steps that are compared: the same for all, on values that stay what they are, put back before each is judged."""

import pytest
import torch

from moe_kernels.benchmarks import grad_projection
from moe_kernels.benchmarks.grad_projection import ADAMW, COEFFICIENT, LOOP, MOMENTUM, SGD, SGD_TENSOR, State
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.parameter_lists import ParameterList

CPU = torch.device("cpu")
FEW = ParameterList("few")
DIRECTIONS = grad_projection.BENCHMARK.directions


def case(direction):
    return grad_projection.BENCHMARK.build(FEW, direction, CPU)


def copied(outputs):
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in outputs.items()}


def inner(left, right):
    return sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True))


def test_bytes_of_each_element():
    n = FEW.elements
    assert grad_projection.work(FEW, SGD) == Work(0, 36 * n)
    assert grad_projection.work(FEW, SGD_TENSOR) == Work(0, 24 * n)
    assert grad_projection.work(FEW, ADAMW) == Work(0, 44 * n)
    assert grad_projection.work(ParameterList("few", dtype="bfloat16"), SGD) == Work(0, 18 * n)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_step_is_judged_from_the_same_values(direction):
    compared = case(direction)
    run = compared.candidates[LOOP]
    first = copied(run())
    second = copied(run())
    compared.restore()
    again = run()
    for name, tensors in again.items():
        assert all(map(torch.equal, tensors, first[name]))
        assert not any(map(torch.equal, tensors, second[name]))


@pytest.mark.parametrize("direction", [SGD, SGD_TENSOR])
def test_the_step_projects(direction):
    """d = (buffer − μ buffer before) must have the gradient's own part along the gradient, and more across it."""
    state = State.draw(FEW, direction, CPU).double()
    before = [buffer.clone() for buffer in state.buffers["momentum_buffer"]]
    pulls = [2 * (w - anchor) for w, anchor in zip(state.params, state.anchors, strict=True)]
    grads = state.grads
    grad_projection._foreach(state, direction)()
    d = [new - MOMENTUM * old for new, old in zip(state.buffers["momentum_buffer"], before, strict=True)]
    if direction == SGD:
        assert inner(grads, pulls) < 0
        assert inner(d, grads) == pytest.approx(inner(grads, grads))
        across = inner(pulls, pulls) - inner(grads, pulls) ** 2 / inner(grads, grads)
        assert inner(d, d) == pytest.approx(inner(grads, grads) + COEFFICIENT**2 * across)
    else:
        conflicts = [inner([g], [r]) < 0 for g, r in zip(grads, pulls, strict=True)]
        assert any(conflicts)
        for one, g, r, conflict in zip(d, grads, pulls, conflicts, strict=True):
            expected = inner([g], [g]) + (0 if conflict else COEFFICIENT * inner([g], [r]))
            assert inner([one], [g]) == pytest.approx(expected)


def test_scopes_differ():
    of_all, of_each = (case(direction).candidates[LOOP]()["momentum_buffer"] for direction in (SGD, SGD_TENSOR))
    assert not any(map(torch.equal, of_all, of_each))


def test_bare_is_torchs_step_without_anchors():
    state = State.draw(FEW, SGD, CPU)
    buffers = state.buffers["momentum_buffer"]
    plain = [MOMENTUM * buffer + grad for buffer, grad in zip(buffers, state.grads, strict=True)]
    assert grad_projection._bare(state, SGD)() == {}
    torch.testing.assert_close(buffers, plain)


@pytest.mark.parametrize("direction", [SGD, ADAMW])
def test_a_thousand_steps_leave_ordinary_numbers(direction):
    """A measurement must not time NaN, infinity or subnormal numbers; and the loop must go on to project."""
    state = State.draw(FEW, direction, CPU)
    run = grad_projection._foreach(state, direction)
    for _ in range(1000):
        run()
    for tensor in state.changed():
        assert tensor.isfinite().all()
        assert (tensor.abs()[tensor != 0] > torch.finfo(tensor.dtype).tiny).all()
    assert inner(state.grads, [w - anchor for w, anchor in zip(state.params, state.anchors, strict=True)]) < 0


def test_list_that_is_too_long_to_compile_says_so(monkeypatch):
    assert len(ParameterList("vit_base").shapes) < grad_projection.MOST_COMPILED < len(ParameterList("many").shapes)
    monkeypatch.setattr(grad_projection, "MOST_COMPILED", 3)
    compared = case(SGD)
    with pytest.raises(RuntimeError, match="at most 3 tensors, got 4"):
        compared.candidates["compiled foreach"]()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_step_the_same_memory(direction):
    """So that none has better pages or a warmer cache than another."""
    compared = case(direction)
    changed = compared.candidates["foreach"]()
    for name, run in compared.candidates.items():
        if not name.startswith("compiled"):
            compared.restore()
            before = copied(changed)
            run()
            assert not any(any(map(torch.equal, before[key], changed[key])) for key in changed), name
