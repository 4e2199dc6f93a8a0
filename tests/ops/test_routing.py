import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, nudged

from moe_kernels import backend
from moe_kernels.ops.routing import route, route_linear
from moe_kernels.reference import philox

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = ("x", "projection", "bias", "embedding", "log_scale")
SEED = torch.tensor([2**40 + 12345])
NUDGES = 4


def inputs(T=37, d=19, p=11, E=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (T, d), "projection": (p, d), "bias": (p,), "embedding": (E, p), "log_scale": (1,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["projection"] = tensors["projection"] / math.sqrt(d)
    tensors["log_scale"] = tensors["log_scale"] / 3
    return tensors


def objective(routing):
    """A scalar that every differentiable output enters with weights of its own."""
    statistics = routing.statistics
    outputs = (routing.gates, statistics.scores, statistics.importance, statistics.load, statistics.scaled_load)
    total = statistics.z * 1e-3
    for output in outputs:
        weights = torch.linspace(-1, 1.5, output.numel(), dtype=torch.float64).view_as(output)
        total = total + (output.double() * weights).sum()
    return total


def evaluate(function, tensors, **kwargs):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    routing = function(*leaves.values(), **kwargs)
    grads = torch.autograd.grad(objective(routing), list(leaves.values()))
    return routing, dict(zip(leaves, grads, strict=True))


def same_decisions(routing, exact):
    """Whether the experts agree; where they do not, the probabilities must be closer than rounding can tell."""
    if torch.equal(routing.experts, exact.experts):
        return True
    differ = routing.experts != exact.experts
    gap = (routing.gates.double() - exact.gates)[differ].abs().max()
    assert gap < 1e-4, f"other experts, and not by rounding: {gap}"
    return False


@settings(max_examples=120)
@given(
    T=st.integers(0, 600),
    d=st.integers(1, 200),
    p=st.integers(2, 90),
    E=st.integers(1, 9),
    noise=st.sampled_from([0.0, 0.5]),
    linear=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_within_budget_of_float64(T, d, p, E, noise, linear, dtype, data):
    torch.manual_seed(T)
    k = data.draw(st.integers(1, E), label="k")
    options = {
        "top_k": k,
        "noise_std": noise,
        "seed": SEED,
        "renormalize": k > 1 and data.draw(st.booleans(), label="renormalize"),
    }
    tensors = inputs(T, d, p, E, dtype, seed=T + d)
    function = route
    if linear:
        tensors = {"x": tensors["x"], "weight": torch.randn(E, d).to(dtype) / math.sqrt(d)}
        function = route_linear
    with backend.force("cpp"):
        kernel, grads = evaluate(function, tensors, **options)
    with backend.force("reference"):
        plain, plain_grads = evaluate(function, tensors, **options)
        exact, exact_grads = evaluate(function, {n: t.double() for n, t in tensors.items()}, **options)
        moves = [evaluate(function, nudged(tensors), **options) for _ in range(NUDGES)]
    moved, moved_grads = zip(*moves, strict=True)
    assert kernel.gates.dtype == torch.float32
    if not all(same_decisions(other, exact) for other in (kernel, plain, *moved)):
        return
    assert torch.equal(kernel.statistics.counts, exact.statistics.counts)
    assert_within_budget(kernel.gates, plain.gates, exact.gates, *(r.gates for r in moved), name="gates")
    for names in (("scores", "importance", "load", "scaled_load"), ("z", "entropy")):
        routings = (kernel, plain, exact, *moved)
        values = [torch.stack([getattr(r.statistics, name) for name in names]) for r in routings]
        assert_within_budget(*values, name=", ".join(names))
    for name in tensors:
        assert grads[name].dtype == dtype
        values = [every[name] for every in (grads, plain_grads, exact_grads, *moved_grads)]
        assert_within_budget(*values, name=f"grad of {name}")


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_gradcheck(k, noise):
    tensors = [t.requires_grad_() for t in inputs(T=6, d=4, p=5, E=4, dtype=torch.float64).values()]

    def function(*leaves):
        with backend.force("cpp"):
            routing = route(*leaves, top_k=k, noise_std=noise, seed=SEED, renormalize=k > 1)
        return routing.gates, *(routing.statistics[1:6])

    assert torch.autograd.gradcheck(function, tensors)


def test_opcheck_of_every_operator():
    x, projection, bias, embedding, log_scale = (t.requires_grad_() for t in inputs().values())
    operators = torch.ops.moe_kernels
    for options in ((None, 2, 0.0, True), (SEED, 1, 0.3, False)):
        arguments = (x, projection, bias, embedding, log_scale, *options)
        torch.library.opcheck(operators.routing_cosine.default, arguments)
        weight = torch.randn(5, 19, requires_grad=True)
        torch.library.opcheck(operators.routing_linear.default, (x, weight, *options))
        with torch.no_grad():
            gates, experts, _, sums, totals, _, logits, projected = operators.routing_cosine(*arguments)
        given = tuple(t.detach() for t in (gates, sums, totals, x, projection, embedding, log_scale))
        torch.library.opcheck(operators.routing_cosine_backward.default, (*given, logits, projected, experts, *options))
        torch.library.opcheck(
            operators.routing_linear_backward.default,
            (*given[:4], weight.detach(), logits, experts, *options),
        )


def test_cosine_is_the_papers_formula():
    x, projection, bias, embedding, log_scale = inputs(T=50).values()
    routing = route(x, projection, bias, embedding, log_scale, top_k=1)
    projected = x @ projection.T + bias
    cosines = F.cosine_similarity(projected[:, None], embedding[None], dim=-1)
    probabilities = (cosines * log_scale.exp()).softmax(1)
    torch.testing.assert_close(routing.gates[:, 0], probabilities.max(1).values)
    assert torch.equal(routing.experts[:, 0], probabilities.argmax(1))


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_ties_go_to_the_lowest_id(name):
    with backend.force(name):
        routing = route_linear(torch.randn(40, 8), torch.zeros(6, 8), top_k=3)
    assert torch.equal(routing.experts, torch.tensor([0, 1, 2]).expand(40, 3))


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_nan_in_a_token_stays_in_its_row(name):
    tensors = inputs()
    clean = route(*tensors.values(), top_k=2)
    tensors["x"][11, 3] = float("nan")
    with backend.force(name):
        routing = route(*tensors.values(), top_k=2)
    others = torch.arange(37) != 11
    assert routing.gates[11].isnan().all()
    assert routing.experts[11].tolist() == [0, 1]
    torch.testing.assert_close(routing.gates[others], clean.gates[others])
    assert torch.equal(routing.experts[others], clean.experts[others])


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_scale_above_its_limit_counts_as_the_limit_and_gets_no_gradient(name):
    tensors = inputs()
    tensors["log_scale"] = torch.tensor([7.0])
    with backend.force(name):
        above, grads = evaluate(route, tensors, top_k=1)
        tensors["log_scale"] = torch.tensor([math.log(100)])
        at, _ = evaluate(route, tensors, top_k=1)
    assert grads["log_scale"].item() == 0
    torch.testing.assert_close(above.gates, at.gates)


def test_zero_vectors_do_not_divide_by_zero():
    tensors = inputs()
    tensors["x"][3] = 0
    tensors["bias"].zero_()
    tensors["embedding"][2] = 0
    kernel, grads = evaluate(route, tensors, top_k=1)
    with backend.force("reference"):
        plain, plain_grads = evaluate(route, tensors, top_k=1)
    torch.testing.assert_close(kernel.gates, plain.gates)
    for name in NAMES:
        torch.testing.assert_close(grads[name], plain_grads[name], rtol=1e-4, atol=1e-4)


def test_decision_is_float32_accurate_for_bfloat16_tokens():
    tensors = inputs(T=12000, d=64, p=32, E=6)
    x = tensors.pop("x").bfloat16()
    routing = route(x, *tensors.values(), top_k=1)
    exact = route(x.double(), *(t.double() for t in tensors.values()), top_k=1)
    rounded = route(x, *(t.bfloat16() for t in tensors.values()), top_k=1)
    assert (routing.experts != exact.experts).sum() <= 1
    assert (rounded.experts != exact.experts).sum() > 10


def test_autocast_does_not_lower_the_decision():
    tensors = inputs(T=500)
    outside = route(*tensors.values(), top_k=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = route(*tensors.values(), top_k=2)
    assert inside.gates.dtype == torch.float32
    assert torch.equal(outside.gates, inside.gates)


def test_same_bits_again_and_for_any_number_of_threads():
    tensors = inputs(T=1500)
    arguments = {"top_k": 2, "noise_std": 0.2, "seed": SEED}
    first, threads = evaluate(route, tensors, **arguments), torch.get_num_threads()
    try:
        for count in (1, 2, 3, *[threads] * 47):
            torch.set_num_threads(count)
            again = evaluate(route, tensors, **arguments)
            assert torch.equal(first[0].gates, again[0].gates)
            for name in NAMES:
                assert torch.equal(first[1][name], again[1][name]), (name, count)
    finally:
        torch.set_num_threads(threads)


def test_noise_is_a_function_of_seed_and_position():
    x, weight = torch.randn(30, 8), torch.randn(4, 8)
    options = {"top_k": 1, "noise_std": 1.0}
    one = route_linear(x, weight, seed=torch.tensor([1]), **options)
    other = route_linear(x, weight, seed=torch.tensor([2]), **options)
    assert torch.equal(one.gates, route_linear(x, weight, seed=torch.tensor([1]), **options).gates)
    assert not torch.equal(one.gates, other.gates)
    head = route_linear(x[:10], weight, seed=torch.tensor([1]), **options)
    torch.testing.assert_close(head.gates, one.gates[:10])


def test_philox_gives_the_published_words():
    # Known answers of the Random123 distribution for Philox 4x32-10: all zero, and all ones in counter and key.
    zero = philox.words(torch.tensor([0]), torch.tensor([0]))
    assert [int(w) for w in zero] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_philox_noise_is_standard_normal():
    draw = philox.normal(SEED, 2000, 50).double()
    assert abs(draw.mean()) < 0.01
    assert abs(draw.std() - 1) < 0.01
    assert abs((draw.abs() > 1.959964).double().mean() - 0.05) < 0.003


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(3, 4, 5)}, ValueError, r"x: expected shape \(T, d\), got \(3, 4, 5\)"),
        (
            {"x": torch.ones(3, 19, dtype=torch.int64)},
            TypeError,
            "x: expected a floating-point tensor, got torch.int64",
        ),
        ({"projection": torch.randn(11, 18)}, ValueError, r"projection: expected shape \(p, 19\), got \(11, 18\)"),
        ({"bias": torch.randn(12)}, ValueError, r"bias: expected shape \(11,\), got \(12,\)"),
        ({"embedding": torch.randn(0, 11)}, ValueError, "at least one expert, got 0"),
        ({"log_scale": torch.randn(())}, ValueError, r"log_scale: expected shape \(1,\)"),
        ({"bias": torch.randn(11, device="meta")}, ValueError, "bias: expected a tensor on cpu, got meta"),
        ({"top_k": 6}, ValueError, r"top_k: expected 1 to 5 \(the number of experts\), got 6"),
        ({"top_k": 0}, ValueError, "top_k: expected 1 to 5"),
        ({"renormalize": True}, ValueError, "renormalize: .*top_k=1"),
        ({"noise_std": -1.0}, ValueError, "noise_std: expected a number ≥ 0, got -1.0"),
        ({"noise_std": 0.1}, ValueError, "seed: noise_std=0.1 needs"),
        ({"noise_std": 0.1, "seed": torch.tensor([1.0])}, TypeError, "seed: expected an int64 tensor"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {**inputs(), "top_k": 1} | change
    with pytest.raises(error, match=message):
        route(**arguments)


def test_second_derivative_is_refused_not_wrong():
    tensors = [t.requires_grad_() for t in inputs().values()]
    gates = route(*tensors, top_k=1).gates
    (grad,) = torch.autograd.grad(gates.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
