"""The Triton kernels of routing: on a GPU, or on the CPU in the interpreter made strict."""

import math
from unittest import mock

import interpreter
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, nudged

from moe_kernels import backend
from moe_kernels.ops.routing import route, route_linear
from moe_kernels.triton import routing as kernels
from moe_kernels.triton import routing_backward as backward_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU; the interpreter has no streams and no real concurrency")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(bool(backend.refusal("triton", DEVICE)), reason=backend.refusal("triton", DEVICE) or "runs"),
]
# The interpreter computes bfloat16 wrongly.
TESTED = DTYPES if DEVICE == "cuda" else (torch.float32, torch.float16)
NUDGES = 4
EXAMPLES = 40 if DEVICE == "cuda" else 10
SEED = torch.tensor([2**40 + 12345], device=DEVICE)
NAMES = ("x", "projection", "bias", "embedding", "log_scale")


def inputs(T=37, d=19, p=11, E=5, dtype=torch.float32, linear=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (T, d), "projection": (p, d), "bias": (p,), "embedding": (E, p), "log_scale": (1,)}
    if linear:
        shapes = {"x": (T, d), "weight": (E, d)}
    scale = {"projection": d**-0.5, "weight": d**-0.5, "log_scale": 1 / 3}
    return {
        name: (torch.randn(shape, generator=generator) * scale.get(name, 1)).to(DEVICE, dtype)
        for name, shape in shapes.items()
    }


def objective(routing):
    """A scalar that every differentiable output enters with weights of its own."""
    statistics = routing.statistics
    total = statistics.z * 1e-3
    for output in (routing.gates, *statistics[1:5]):
        weights = torch.linspace(-1, 1.5, output.numel(), dtype=torch.float64, device=DEVICE).view_as(output)
        total = total + (output.double() * weights).sum()
    return total


def evaluate(tensors, **options):
    """gates, the statistics and the gradients of the inputs; by name."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    routing = (route_linear if "weight" in tensors else route)(*leaves.values(), **options)
    grads = torch.autograd.grad(objective(routing), list(leaves.values()))
    named = {"gates": routing.gates, "experts": routing.experts, **routing.statistics._asdict()}
    return named | {f"grad of {name}": grad for name, grad in zip(leaves, grads, strict=True)}


def on_triton(tensors, **options):
    """:func:`evaluate` on the Triton kernels, checked by the strict interpreter where there is no GPU."""
    names = []

    def run():
        results = evaluate(tensors, **options)
        names[:] = results
        return list(results.values())

    with backend.force("triton"):
        values = interpreter.in_any_order(run)
    return dict(zip(names, values, strict=True))


def on_reference(tensors, **options):
    with backend.force("reference"):
        return evaluate(tensors, **options)


def assert_right(tensors, **options):
    """Within the error budget of float64, wherever rounding leaves the choice of experts alone."""
    kernel, plain = on_triton(tensors, **options), on_reference(tensors, **options)
    exact = on_reference({name: tensor.double() for name, tensor in tensors.items()}, **options)
    moves = [nudged({name: tensor.cpu() for name, tensor in tensors.items()}) for _ in range(NUDGES)]
    moved = [on_reference({name: tensor.to(DEVICE) for name, tensor in move.items()}, **options) for move in moves]
    for other in (kernel, plain, *moved):
        if not torch.equal(other["experts"], exact["experts"]):
            differ = other["experts"] != exact["experts"]
            gap = (other["gates"].double() - exact["gates"])[differ].abs().max()
            assert gap < 1e-4, f"other experts, and not by rounding: {gap}"
            return
    assert torch.equal(kernel["counts"], exact["counts"])
    together = ("scores", "importance", "load", "scaled_load"), ("z", "entropy")
    for results in (kernel, plain, exact, *moved):
        for names in together:
            results[", ".join(names)] = torch.stack([results.pop(name) for name in names])
    for name in kernel.keys() - {"experts", "counts"}:
        assert_within_budget(*(results[name] for results in (kernel, plain, exact, *moved)), name=name)


@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.generate))
@given(
    T=st.integers(0, 90),
    d=st.integers(1, 80),
    p=st.integers(2, 70),
    E=st.integers(1, 9),
    noise=st.sampled_from([0.0, 0.5]),
    linear=st.booleans(),
    dtype=st.sampled_from(TESTED),
    data=st.data(),
)
def test_within_budget_of_float64(T, d, p, E, noise, linear, dtype, data):
    torch.manual_seed(T)
    k = data.draw(st.integers(1, E), label="k")
    renormalize = k > 1 and data.draw(st.booleans(), label="renormalize")
    tensors = inputs(T, d, p, E, dtype, linear, seed=T + d)
    assert_right(tensors, top_k=k, noise_std=noise, seed=SEED, renormalize=renormalize)


@pytest.mark.parametrize(
    ("T", "d", "p", "E", "k"),
    [(1, 1, 2, 1, 1), (0, 7, 5, 3, 2), (70, 65, 131, 3, 1), (20, 10, 6, 70, 3), (20, 9, 5, 6, 6), (600, 4, 3, 3, 1)],
)
def test_shapes_at_the_edges(T, d, p, E, k):
    tensors = inputs(T, d, p, E)
    assert_right(tensors, top_k=k, noise_std=0.25, seed=SEED, renormalize=k > 1)


def test_statistics_of_many_blocks():
    blocks, E, k = 300, 7, 2
    shares = torch.randn(blocks, 4 * E + 2, device=DEVICE)
    counted = torch.randint(0, 100, (blocks, k, E), dtype=torch.int32, device=DEVICE)
    with interpreter.strict():
        sums, totals = torch.empty(4, E, device=DEVICE), torch.empty(2, device=DEVICE)
        counts = torch.empty(k, E, dtype=torch.int64, device=DEVICE)
        arguments = (shares, counted, sums, totals, counts, blocks, 4 * E + 2, k * E)
        kernels.routing_statistics_kernel[(1,)](*arguments, BLOCKS=128, COLUMNS=32)
    expected = shares.sum(0)
    torch.testing.assert_close(sums.flatten(), expected[: 4 * E], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(totals, expected[4 * E :], rtol=1e-4, atol=1e-4)
    assert torch.equal(counts, counted.long().sum(0))


@pytest.mark.skipif(DEVICE == "cuda", reason="the Triton kernels have float64 in the interpreter only")
@pytest.mark.parametrize(("k", "noise"), [(1, 0.0), (3, 0.25)])
def test_float64_is_the_reference_to_rounding(k, noise):
    tensors = inputs(T=9, d=4, p=5, E=4, dtype=torch.float64)
    options = {"top_k": k, "noise_std": noise, "seed": SEED, "renormalize": k > 1}
    ours, reference = on_triton(tensors, **options), on_reference(tensors, **options)
    for name, value in ours.items():
        torch.testing.assert_close(value, reference[name], rtol=1e-6 if noise else 1e-12, atol=1e-6 if noise else 1e-12)


def test_all_to_one_and_dead_experts():
    tensors = inputs(T=40, linear=True)
    tensors["weight"] = torch.zeros_like(tensors["weight"])
    tensors["weight"][3] = 1.0
    tensors["x"] = tensors["x"].abs()
    results = on_triton(tensors, top_k=1)
    assert results["counts"].tolist() == [[0, 0, 0, 40, 0]]
    assert_right(tensors, top_k=1)


def test_ties_go_to_the_lowest_id():
    with backend.force("triton"):
        routing = route_linear(torch.randn(40, 8, device=DEVICE), torch.zeros(6, 8, device=DEVICE), top_k=3)
    assert torch.equal(routing.experts.cpu(), torch.tensor([0, 1, 2]).expand(40, 3))


@pytest.mark.parametrize("noise", [0.0, 0.25])
def test_nan_in_a_token_stays_in_its_row(noise):
    tensors = inputs()
    options = {"top_k": 2, "noise_std": noise, "seed": SEED}
    with backend.force("triton"):
        clean = route(*tensors.values(), **options)
        tensors["x"][11, 3] = float("nan")
        routing = route(*tensors.values(), **options)
    others = torch.arange(37, device=DEVICE) != 11
    assert routing.gates[11].isnan().all()
    assert routing.experts[11].tolist() == [0, 1]
    assert torch.equal(routing.gates[others], clean.gates[others])
    assert torch.equal(routing.experts[others], clean.experts[others])


def test_scale_above_its_limit_counts_as_the_limit_and_gets_no_gradient():
    tensors = inputs()
    tensors["log_scale"] = torch.tensor([7.0], device=DEVICE)
    above = on_triton(tensors, top_k=1)
    tensors["log_scale"] = torch.tensor([math.log(100)], device=DEVICE)
    assert above["grad of log_scale"].item() == 0
    torch.testing.assert_close(above["gates"], on_triton(tensors, top_k=1)["gates"])


def test_zero_vectors_do_not_divide_by_zero():
    tensors = inputs()
    tensors["x"][3] = 0
    tensors["bias"].zero_()
    tensors["embedding"][2] = 0
    ours, reference = on_triton(tensors, top_k=1), on_reference(tensors, top_k=1)
    torch.testing.assert_close(ours["gates"], reference["gates"])
    for name in NAMES:
        torch.testing.assert_close(ours[f"grad of {name}"], reference[f"grad of {name}"], rtol=1e-4, atol=1e-4)


def test_half_tokens_meet_float32_parameters():
    """Decisions, gates and the gradients of the parameters know nothing of the 16 bits but the rounding of x."""
    tensors = inputs(T=100, d=40)
    tensors["x"] = tensors["x"].half()
    assert_right(tensors, top_k=2)
    wide = on_triton({**tensors, "x": tensors["x"].float()}, top_k=2)
    half = on_triton(tensors, top_k=2)
    assert half["grad of x"].dtype == torch.float16
    assert torch.equal(half["experts"], wide["experts"])
    for name in ("gates", "grad of projection"):
        torch.testing.assert_close(half[name], wide[name], rtol=1e-5, atol=1e-5)


def test_strided_inputs():
    tensors = inputs()
    strided = {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in tensors.items()}
    ours, plain = on_triton(strided, top_k=1), on_triton(tensors, top_k=1)
    assert all(torch.equal(value, plain[name]) for name, value in ours.items())


def test_too_many_experts_are_refused():
    x, weight = torch.randn(2, 3, device=DEVICE), torch.randn(257, 3, device=DEVICE)
    with backend.force("triton"), pytest.raises(NotImplementedError, match="at most 256 experts, got 257"):
        route_linear(x, weight, top_k=1)


def test_opcheck_of_every_operator():
    operators = torch.ops.moe_kernels
    x, projection, bias, embedding, log_scale = (t.requires_grad_() for t in inputs(T=9).values())
    with backend.force("triton"):
        for dtype in (torch.float32, torch.float16):
            x = x.detach().to(dtype).requires_grad_()
            options = (SEED, 2, 0.5, True)
            arguments = (x, projection, bias, embedding, log_scale, *options)
            torch.library.opcheck(operators.routing_cosine.default, arguments)
            weight = torch.randn(5, 19, device=DEVICE, requires_grad=True)
            torch.library.opcheck(operators.routing_linear.default, (x, weight, *options))
            with torch.no_grad():
                gates, experts, _, sums, totals, _, logits, projected = operators.routing_cosine(*arguments)
            given = tuple(t.detach() for t in (gates, sums, totals, x, projection, embedding, log_scale))
            torch.library.opcheck(
                operators.routing_cosine_backward.default, (*given, logits, projected, experts, *options)
            )
            torch.library.opcheck(
                operators.routing_linear_backward.default, (*given[:4], weight.detach(), logits, experts, *options)
            )


def test_compiles_without_graph_breaks():
    tensors = [t.requires_grad_() for t in inputs(T=9).values()]

    def gates(*tensors):
        return route(*tensors, top_k=2).gates

    with backend.force("triton"):
        eager, compiled = gates(*tensors), torch.compile(gates, fullgraph=True, backend="aot_eager")(*tensors)
        torch.testing.assert_close(eager, compiled)
        pairs = (torch.autograd.grad(out.square().sum(), tensors) for out in (eager, compiled))
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other)


def huge(*shape, dtype=torch.float32, ghost=0):
    """Memory that is not there, which holds ``ghost``."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    tensor.ghost = ghost
    return tensor


@pytest.mark.skipif(not interpreter.INTERPRETING, reason="a GPU is here; addresses are checked in the interpreter")
def test_offsets_beyond_31_bits():
    T, d, p, E, k = 2**26, 33, 34, 40, 33
    x, projection, embedding, scale = huge(T, d), huge(p, d), huge(E, p, ghost=1), huge(1)
    grads = huge(T, k), huge(4, E), huge(2)
    ids = huge(T, k, dtype=torch.int64)
    seed = huge(1, dtype=torch.int64)
    logits, projected, selection = huge(T, E), huge(T, p), (seed, k, 0.5, True)
    chunks = T // 256
    # Sums over all blocks and chunks are loops that only a GPU can run through; what they add up is a small table.
    with interpreter.strict("ends"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels._Outputs, "reduced", lambda self: ())
        kernels.routing_cosine(x, projection, huge(p), embedding, scale, *selection)
        kernels.routing_linear(x, huge(E, d), *selection)
        for name in ("_add", "_token_sums"):
            patch.setattr(backward_kernels, name, lambda *tensors, **options: (huge(1, E, p), None))
        patch.setattr(backward_kernels, "routing_embedding_backward_kernel", mock.MagicMock())
        backward_kernels.routing_cosine_backward(
            *grads, x, projection, embedding, scale, logits, projected, ids, *selection
        )
        backward_kernels.routing_token_sum_kernel[(1, 1, chunks)](
            logits, projected, huge(chunks, E, p), huge(chunks, E), T, 256, E, p, M=64, N=64, K=64
        )


@GPU
def test_fifty_runs_give_the_same_bits():
    tensors = inputs(T=5000, d=130, p=70)
    first = None
    for _ in range(50):
        results = evaluate(tensors, top_k=2, noise_std=0.2, seed=SEED)
        first = first or results
        assert all(torch.equal(value, results[name]) for name, value in first.items())


@GPU
def test_replayed_graph_follows_changed_tokens_and_seed():
    tensors, seed = inputs(T=500), SEED.clone()
    options = {"top_k": 2, "noise_std": 0.2, "seed": seed}
    evaluate(tensors, **options)  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(tensors, **options)
    for _ in range(2):
        tensors["x"].normal_()
        seed += 1
        graph.replay()
        expected = evaluate(tensors, **options)
        assert all(torch.equal(value, captured[name]) for name, value in expected.items())
