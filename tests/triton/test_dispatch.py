"""The Triton kernels of dispatch, gather and combine: on a GPU, or on the CPU in the interpreter made strict."""

import interpreter
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget

from moe_kernels import backend
from moe_kernels.ops.dispatch import Dispatch, combine, dispatch, gather
from moe_kernels.triton import dispatch as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU; the interpreter has no streams and no real concurrency")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(bool(backend.refusal("triton", DEVICE)), reason=backend.refusal("triton", DEVICE) or "runs"),
]
# The interpreter computes bfloat16 wrongly.
TESTED = DTYPES if DEVICE == "cuda" else (torch.float32, torch.float16, torch.float64)
EXAMPLES = 40 if DEVICE == "cuda" else 12


def random_experts(T, k, E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(T, E, generator=generator).argsort(1)[:, :k].contiguous().to(DEVICE)


def on_triton(function):
    """The results of ``function`` on the Triton kernels, checked by the strict interpreter where there is no GPU."""
    with backend.force("triton"):
        return interpreter.in_any_order(function)


def on_reference(function):
    with backend.force("reference"):
        return function()


def assert_same_plan(experts, E, **options):
    plans = [run(lambda: dispatch(experts, E, **options)) for run in (on_triton, on_reference)]
    for ours, reference in zip(*plans, strict=True):
        assert torch.equal(ours, reference)
    return plans[0]


@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.generate))
@given(T=st.integers(0, 200), E=st.integers(1, 40), data=st.data())
def test_plan_is_the_references(T, E, data):
    k = data.draw(st.integers(1, min(E, 5)), label="k")
    capacity = data.draw(st.none() | st.integers(0, 2 * T // E + 1), label="capacity")
    priority = None
    if capacity is not None and data.draw(st.booleans(), label="priority"):
        priority = torch.randint(0, 4, (T,)).float().to(DEVICE)  # few distinct values: ties are common
    assert_same_plan(random_experts(T, k, E, seed=T), E, capacity=capacity, priority=priority)


@pytest.mark.parametrize(
    ("T", "E", "k", "capacity"), [(300, 300, 2, None), (0, 3, 2, 1), (1, 1, 1, None), (40, 6, 6, 20), (600, 3, 1, 150)]
)
def test_plan_at_the_edges(T, E, k, capacity):
    assert_same_plan(random_experts(T, k, E), E, capacity=capacity)


def test_prefix_sums_of_many_blocks():
    counts = torch.randint(0, 100, (3, 2500), dtype=torch.int32, device=DEVICE)
    starts, totals = torch.empty(3, 2500, dtype=torch.int64, device=DEVICE), torch.empty_like(counts[:, 0]).long()
    with interpreter.strict():
        kernels.dispatch_prefix_kernel[(3,)](counts, starts, totals, 2500)
    assert torch.equal(starts, counts.cumsum(1) - counts)
    assert torch.equal(totals, counts.sum(1))


def test_dead_experts_and_all_to_one():
    experts = torch.full((300, 1), 4, device=DEVICE)
    plan = assert_same_plan(experts, 9)
    assert plan.offsets.tolist() == [0] * 5 + [300] * 5
    assert_same_plan(experts, 9, capacity=130, priority=torch.rand(300, device=DEVICE))


def test_nan_is_served_first():
    experts = torch.zeros(4, 1, dtype=torch.int64, device=DEVICE)
    priority = torch.tensor([0.1, 0.9, float("nan"), 0.5], device=DEVICE)
    plan = assert_same_plan(experts, 1, capacity=2, priority=priority)
    assert plan.kept.flatten().tolist() == [False, True, True, False]


def test_id_out_of_range_reads_no_foreign_memory():
    experts = torch.tensor([[0], [7], [-3], [1]], device=DEVICE)
    plan = on_triton(lambda: dispatch(experts, 3))
    assert sorted(plan.order.tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "broken",
    [
        lambda plan: plan._replace(order=plan.order + 100),
        lambda plan: plan._replace(inverse=plan.inverse - 7),
        lambda plan: plan._replace(offsets=plan.offsets + 9),
    ],
)
def test_plan_that_dispatch_did_not_make_reads_no_foreign_memory(broken):
    plan = broken(on_reference(lambda: dispatch(random_experts(6, 2, 3), 3)))
    x, y = torch.randn(6, 4, device=DEVICE), torch.randn(12, 4, device=DEVICE)
    with backend.force("triton"), interpreter.strict():
        gather(x, plan)
        combine(y, torch.rand(6, 2, device=DEVICE), plan)


@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.generate))
@given(T=st.integers(0, 60), E=st.integers(1, 6), d=st.integers(1, 150), dtype=st.sampled_from(TESTED), data=st.data())
def test_gather_and_combine_with_gradients(T, E, d, dtype, data):
    k = data.draw(st.integers(1, E), label="k")
    capacity = data.draw(st.none() | st.integers(0, T // E + 1), label="capacity")
    plan = on_reference(lambda: dispatch(random_experts(T, k, E, seed=T), E, capacity=capacity))
    x, gates, upstream = (torch.randn(shape, device=DEVICE) for shape in ((T, d), (T, k), (T, d)))
    x, upstream = x.to(dtype), upstream.to(dtype)

    def run(wide):
        to = torch.float64 if wide else dtype
        wide_dtype = torch.float64 if to == torch.float64 else torch.float32
        leaves = [x.to(to).requires_grad_(), gates.to(wide_dtype).requires_grad_()]
        rows = gather(leaves[0], plan)
        y = combine(rows * 2, leaves[1], plan)
        return [rows, y, *torch.autograd.grad(y, leaves, upstream.to(to))]

    results = on_triton(lambda: run(False)), on_reference(lambda: run(False)), on_reference(lambda: run(True))
    for name, *values in zip(("rows", "y", "grad of x", "grad of gates"), *results, strict=True):
        assert_within_budget(*values, name=name)


def test_strided_inputs():
    plan = on_reference(lambda: dispatch(random_experts(20, 2, 4), 4))
    x = torch.randn(7, 20, device=DEVICE).t()
    assert torch.equal(on_triton(lambda: [gather(x, plan)])[0], on_reference(lambda: gather(x, plan)))


@pytest.mark.skipif(DEVICE == "cuda", reason="the Triton kernels have float64 in the interpreter only")
def test_gradcheck():
    plan = on_reference(lambda: dispatch(random_experts(5, 2, 3), 3, capacity=3))
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)
    with backend.force("triton"):
        assert torch.autograd.gradcheck(lambda x, g: combine(gather(x, plan), g, plan), (x, gates))


def test_opcheck_of_every_operator():
    operators = torch.ops.moe_kernels
    experts = random_experts(15, 2, 4)
    with backend.force("triton"):
        torch.library.opcheck(operators.dispatch.default, (experts, 4, 5, torch.rand(15, device=DEVICE)))
        plan = dispatch(experts, 4, capacity=5)[:3]
        x = torch.randn(15, 6, device=DEVICE, requires_grad=True)
        y = torch.randn(30, 6, device=DEVICE, requires_grad=True)
        gates = torch.rand(15, 2, device=DEVICE, requires_grad=True)
        torch.library.opcheck(operators.gather.default, (x, *plan))
        torch.library.opcheck(operators.combine.default, (y, gates, *plan))
        torch.library.opcheck(operators.gather_backward.default, (y.detach(), *plan))
        torch.library.opcheck(operators.combine_backward.default, (x.detach(), y.detach(), gates.detach(), *plan))


def test_compiles_without_graph_breaks():
    x = torch.randn(9, 5, device=DEVICE, requires_grad=True)
    gates = torch.rand(9, 2, device=DEVICE, requires_grad=True)
    experts = random_experts(9, 2, 3)

    def layer(x, gates):
        plan = dispatch(experts, 3, capacity=5, priority=gates[:, 0])
        return combine(gather(x, plan), gates, plan)

    with backend.force("triton"):
        eager = layer(x, gates)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, gates)
        for one, other in zip(
            torch.autograd.grad(eager.square().sum(), (x, gates)),
            torch.autograd.grad(compiled.square().sum(), (x, gates)),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(eager, compiled)


def huge(*shape, dtype=torch.float32, ghost=0):
    """Memory that is not there, which holds ``ghost``."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    tensor.ghost = ghost
    return tensor


@pytest.mark.skipif(not interpreter.INTERPRETING, reason="a GPU is here; addresses are checked in the interpreter")
def test_offsets_beyond_31_bits():
    T, k, d = 2**23, 2, 512
    order, inverse = (huge(*shape, dtype=torch.int64, ghost=T * k - 1) for shape in ((T * k,), (T, k)))
    offsets = huge(4, dtype=torch.int64, ghost=T * k)
    x, y, gates = huge(T, d), huge(T * k, d), huge(T, k)
    with interpreter.strict("ends"):
        kernels.gather(x, order, offsets, inverse)
        kernels.gather_backward(y, order, offsets, inverse)
        kernels.combine(y, gates, order, offsets, inverse)
        kernels.combine_backward(x, y, gates, order, offsets, inverse)
        experts = huge(2**31, 2, dtype=torch.int64)
        sort = kernels.triton.cdiv(experts.numel(), int(kernels.BLOCK))
        counts, kept = huge(4, sort, dtype=torch.int32), huge(2**31, 2, dtype=torch.bool, ghost=True)
        kernels.dispatch_count_kernel[(sort,)](experts, kept, None, counts, 2**31, 3, sort, TOP_K=2, QUEUE=False)
        kernels.dispatch_count_kernel[(sort,)](experts, None, None, counts, 2**31, 3, sort, TOP_K=2, QUEUE=True)


@GPU
def test_fifty_runs_give_the_same_bits():
    experts, x = random_experts(5000, 2, 7), torch.randn(5000, 130, device=DEVICE, requires_grad=True)
    gates = torch.rand(5000, 2, device=DEVICE, requires_grad=True)
    first = None
    for _ in range(50):
        plan = dispatch(experts, 7, capacity=1200, priority=gates.detach()[:, 0])
        y = combine(gather(x, plan), gates, plan)
        results = [*plan, y, *torch.autograd.grad(y.square().sum(), (x, gates))]
        first = first or results
        assert all(torch.equal(one, other) for one, other in zip(first, results, strict=True))


@GPU
def test_replayed_graph_follows_a_changed_routing():
    experts, x = random_experts(500, 2, 7), torch.randn(500, 33, device=DEVICE)
    gates = torch.rand(500, 2, device=DEVICE)

    def layer():
        plan = dispatch(experts, 7, capacity=130, priority=gates[:, 0])
        return Dispatch(*plan), combine(gather(x, plan), gates, plan)

    layer()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan, y = layer()
    for seed in (1, 2):
        experts.copy_(random_experts(500, 2, 7, seed=seed))
        gates.uniform_()
        graph.replay()
        expected_plan, expected = layer()
        assert all(torch.equal(one, other) for one, other in zip(plan, expected_plan, strict=True))
        assert torch.equal(y, expected)
