import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget

from moe_kernels import backend
from moe_kernels.ops.dispatch import Dispatch, combine, dispatch, expert_capacity, gather

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = pytest.mark.parametrize("name", ["cpp", "reference"])


def random_experts(T, k, E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(T, E, generator=generator).argsort(1)[:, :k].contiguous()


sizes = {"T": st.integers(0, 300), "E": st.integers(1, 12), "data": st.data()}


@settings(max_examples=150)
@given(**sizes)
def test_invariants_and_agreement_of_backends(T, E, data):
    k = data.draw(st.integers(1, E), label="k")
    capacity = data.draw(st.none() | st.integers(0, 2 * T // E + 1), label="capacity")
    prioritized = capacity is not None and data.draw(st.booleans(), label="priority")
    experts = random_experts(T, k, E, seed=T)
    # Few distinct values, so that ties are common.
    priority = torch.randint(0, 4, (T,)).float() if prioritized else None
    plans = []
    for name in ("cpp", "reference"):
        with backend.force(name):
            plans.append(dispatch(experts, E, capacity=capacity, priority=priority))
    for cpp, reference in zip(*plans, strict=True):
        assert torch.equal(cpp, reference)

    order, offsets, inverse, kept = plans[0]
    flat = experts.flatten()
    assert torch.equal(order.sort().values, torch.arange(T * k)), "order is a permutation"
    assert torch.equal(order[inverse.flatten()], torch.arange(T * k)), "inverse inverts it"
    total = offsets[-1]
    assert torch.equal(kept.flatten()[order], torch.arange(T * k) < total), "the dropped stand behind"
    for e in range(E):
        segment = order[offsets[e] : offsets[e + 1]]
        assert (flat[segment] == e).all()
        assert (segment.diff() > 0).all(), "stable"
        if capacity is not None:
            assert len(segment) == min(capacity, int((flat == e).sum()))
    if capacity is None:
        assert torch.equal(order, flat.argsort(stable=True))
        assert kept.all()


@BACKENDS
def test_first_choices_come_before_second_and_priority_before_order(name):
    experts = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]])
    with backend.force(name):
        plain = dispatch(experts, 2, capacity=2)
        prioritized = dispatch(experts, 2, capacity=2, priority=torch.tensor([0.1, 0.9, 0.5, float("nan")]))
    assert plain.kept.tolist() == [[True, True], [True, False], [True, False], [False, False]]
    # Expert 0: tokens 3 (NaN) and 1 as first choices. Expert 1: token 2 as first choice, then 3 as second.
    assert prioritized.kept.tolist() == [[False, False], [True, False], [True, False], [True, True]]


@BACKENDS
def test_out_of_range_expert_is_an_error(name):
    with backend.force(name), pytest.raises(RuntimeError, match=r"experts: expected ids in \[0, 3\), got 3"):
        dispatch(torch.tensor([[0], [3]]), 3)


def test_expert_capacity_is_tutels():
    assert expert_capacity(18912, 6, 1, 1.5) == 4728
    assert expert_capacity(18912, 6, 2, 1.5) == 9456
    assert expert_capacity(197, 6, 1, 1.5) == int(1.5 * 33)
    assert expert_capacity(197, 6, 1, 1.5, alignment=16) == 64
    assert expert_capacity(0, 6, 1, 1.5) == 0
    for bad in ({"factor": 0.0}, {"factor": -1.0}, {"factor": 1.0, "alignment": 0}):
        with pytest.raises(ValueError, match="expected"):
            expert_capacity(10, 2, 1, **bad)


@settings(max_examples=80)
@given(**sizes, d=st.integers(1, 70), dtype=st.sampled_from((*DTYPES, torch.float64)))
def test_gather_and_combine_with_gradients(T, E, d, dtype, data):
    k = data.draw(st.integers(1, E), label="k")
    capacity = data.draw(st.none() | st.integers(0, T // E + 1), label="capacity")
    plan = dispatch(random_experts(T, k, E, seed=T), E, capacity=capacity)
    x = torch.randn(T, d).to(dtype)
    gates = torch.rand(T, k)
    upstream = torch.randn(T, d).to(dtype)

    def run(name, wide):
        to = torch.float64 if wide else dtype
        leaves = [x.to(to).requires_grad_(), gates.to(torch.float64 if wide else torch.float32).requires_grad_()]
        with backend.force(name):
            rows = gather(leaves[0], plan)
            y = combine(rows * 2, leaves[1], plan)
        return [rows, y, *torch.autograd.grad(y, leaves, upstream.to(to))]

    results = zip(run("cpp", False), run("reference", False), run("reference", True), strict=True)
    for name, values in zip(("rows", "y", "grad of x", "grad of gates"), results, strict=True):
        if name == "grad of gates" and dtype == torch.float64:
            values = [value.double() for value in values]
        assert_within_budget(*values, name=name)


def test_combine_inverts_gather_and_drops_are_zero():
    x = torch.randn(20, 7)
    plan = dispatch(random_experts(20, 2, 4), 4, capacity=7)
    assert not plan.kept.all()
    rows = gather(x, plan)
    assert (rows[plan.offsets[-1] :] == 0).all()
    assert torch.equal(combine(rows, torch.ones(20, 2), plan), x * plan.kept.sum(1, keepdim=True))


def test_bitwise_equal_for_any_number_of_threads():
    experts, gates = random_experts(3000, 2, 7), torch.rand(3000, 2, requires_grad=True)
    x = torch.randn(3000, 33, requires_grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            plan = dispatch(experts, 7, capacity=600, priority=gates.detach()[:, 0])
            y = combine(gather(x, plan), gates, plan)
            results.append([*plan, y, *torch.autograd.grad(y.square().sum(), (x, gates))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck():
    plan = dispatch(random_experts(9, 2, 3), 3, capacity=5)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    with backend.force("cpp"):
        assert torch.autograd.gradcheck(lambda x, g: combine(gather(x, plan), g, plan), (x, gates))


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck_of_every_operator(permuted):
    operators = torch.ops.moe_kernels
    experts = random_experts(15, 2, 4)
    torch.library.opcheck(operators.dispatch.default, (experts, 4, None, None))
    torch.library.opcheck(operators.dispatch.default, (experts.t().contiguous().t(), 4, 5, torch.rand(15)))
    plan = dispatch(experts, 4, capacity=5)[:3]
    x, y = torch.randn(15, 6), torch.randn(30, 6)
    if permuted:
        x, y = torch.randn(6, 15).t(), torch.randn(6, 30).t()
    x, y, gates = x.requires_grad_(), y.requires_grad_(), torch.rand(15, 2, requires_grad=True)
    torch.library.opcheck(operators.gather.default, (x, *plan))
    torch.library.opcheck(operators.combine.default, (y, gates, *plan))
    torch.library.opcheck(operators.gather_backward.default, (y.detach(), *plan))
    torch.library.opcheck(operators.combine_backward.default, (x.detach(), y.detach(), gates.detach(), *plan))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3, 2), 4), TypeError, "experts: expected an int64 tensor, got torch.float32"),
        ((torch.zeros(3, dtype=torch.int64), 4), ValueError, r"experts: expected shape \(T, k\), got \(3,\)"),
        ((torch.zeros(3, 1, dtype=torch.int64), 0), ValueError, "num_experts: expected at least 1, got 0"),
    ],
)
def test_bad_experts_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        dispatch(*arguments)


def test_bad_options_are_named():
    experts = torch.zeros(3, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="capacity: expected at least 0 or None, got -1"):
        dispatch(experts, 2, capacity=-1)
    with pytest.raises(ValueError, match="priority: has a meaning only with a capacity"):
        dispatch(experts, 2, priority=torch.rand(3))
    with pytest.raises(ValueError, match=r"priority: expected shape \(3,\), got \(4,\)"):
        dispatch(experts, 2, capacity=1, priority=torch.rand(4))
    plan = dispatch(experts, 2)
    with pytest.raises(ValueError, match=r"x: expected shape \(3, d\), got \(4, 5\)"):
        gather(torch.randn(4, 5), plan)
    with pytest.raises(ValueError, match=r"gates: expected shape \(3, 1\), got \(3, 2\)"):
        combine(torch.randn(3, 5), torch.rand(3, 2), plan)
    with pytest.raises(ValueError, match=r"dispatch.order: expected shape \(3,\), got \(2,\)"):
        gather(torch.randn(3, 5), Dispatch(plan.order[:2], *plan[1:]))


@pytest.mark.parametrize(
    "broken",
    [
        lambda plan: plan._replace(order=plan.order + 100),
        lambda plan: plan._replace(order=torch.zeros_like(plan.order)),
        lambda plan: plan._replace(inverse=plan.inverse - 7),
        lambda plan: plan._replace(offsets=plan.offsets + 1),
        lambda plan: plan._replace(offsets=plan.offsets.flip(0)),
        lambda plan: plan._replace(offsets=plan.offsets[:0]),
    ],
)
def test_a_plan_that_dispatch_did_not_make_is_an_error_and_no_crash(broken):
    plan = broken(dispatch(random_experts(6, 2, 3), 3))
    with backend.force("cpp"), pytest.raises(RuntimeError, match="dispatch: "):
        gather(torch.randn(6, 4), plan)
    with backend.force("cpp"), pytest.raises(RuntimeError, match="dispatch: "):
        combine(torch.randn(12, 4), torch.rand(6, 2), plan)
