import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, nudged

from moe_kernels import backend
from moe_kernels.ops.dispatch import dispatch
from moe_kernels.ops.expert_ffn import ACTIVATIONS, expert_ffn
from moe_kernels.reference.expert_ffn import ACTIVATIONS as PLAIN_ACTIVATIONS

pytestmark = pytest.mark.usefixtures("poisoned")
NAMES = ("x", "w1", "b1", "w2", "b2", "gates")
SEED = torch.tensor([987654321])


def inputs(T=37, d=19, h=23, E=5, k=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    tensors = {
        "x": draw(T, d),
        "w1": draw(E, h, d, scale=1 / math.sqrt(d)),
        "b1": draw(E, h),
        "w2": draw(E, d, h, scale=1 / math.sqrt(h)),
        "b2": draw(E, d),
        "gates": torch.rand(T, k, generator=generator).to(dtype),
    }
    return tensors, torch.rand(T, E, generator=generator).argsort(1)[:, :k].contiguous()


def evaluate(function, tensors, upstream):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    y = function(**leaves)
    return {"y": y} | dict(zip(NAMES, torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype)), strict=True))


def plain_loop(experts, kept, activation="gelu"):
    """What one writes in plain PyTorch: a loop over experts in the dtype of the inputs."""

    def function(x, w1, b1, w2, b2, gates):
        y = torch.zeros_like(x)
        for e in range(w1.shape[0]):
            token, choice = ((experts == e) & kept).nonzero(as_tuple=True)
            hidden = PLAIN_ACTIVATIONS[activation](F.linear(x[token], w1[e], b1[e]))
            y = y.index_add(0, token, gates[token, choice, None] * F.linear(hidden, w2[e], b2[e]))
        return y

    return function


def log_uniform(low, high):
    return st.floats(math.log(low), math.log(high + 0.99)).map(lambda value: int(math.exp(value)))


@settings(max_examples=320)
@given(
    T=st.just(0) | log_uniform(1, 2000),
    d=log_uniform(1, 700),
    h=log_uniform(1, 700),
    E=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(("gelu", "gelu", *ACTIVATIONS)),
    save=st.sampled_from(("preactivation", "input")),
    data=st.data(),
)
def test_within_budget_of_float64(T, d, h, E, dtype, activation, save, data):
    torch.manual_seed(T)
    k = data.draw(st.integers(1, min(E, 3)), label="k")
    skewed = data.draw(st.booleans(), label="skewed")
    capacity = data.draw(st.none() | st.integers(0, 2 * T // E + 1), label="capacity")
    tensors, experts = inputs(T, d, h, E, k, dtype, seed=T + d)
    if skewed:  # one expert is everybody's first choice, so that others go empty
        experts = torch.arange(k).expand(T, k).contiguous()
    plan = dispatch(experts, E, capacity=capacity)
    upstream = torch.randn(T, d).to(dtype)

    def kernel(**leaves):
        with backend.force("cpp"):
            return expert_ffn(**leaves, dispatch=plan, activation=activation, save=save)

    ours = evaluate(kernel, tensors, upstream)
    loop = plain_loop(experts, plan.kept, activation)
    plain = evaluate(loop, tensors, upstream)
    exact = evaluate(loop, {name: tensor.double() for name, tensor in tensors.items()}, upstream)
    moved = evaluate(loop, nudged(tensors), upstream)
    for name in ("y", *NAMES):
        assert_within_budget(ours[name], plain[name], exact[name], moved[name], name=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_is_the_loop_over_experts(activation):
    tensors, experts = inputs(dtype=torch.float64)
    plan = dispatch(experts, 5, capacity=9)
    upstream = torch.randn(37, 19, dtype=torch.float64)
    with backend.force("reference"):
        reference = evaluate(
            lambda **leaves: expert_ffn(**leaves, dispatch=plan, activation=activation), tensors, upstream
        )
    loop = evaluate(plain_loop(experts, plan.kept, activation), tensors, upstream)
    for name in ("y", *NAMES):
        torch.testing.assert_close(reference[name], loop[name])


@pytest.mark.parametrize("save", ["preactivation", "input"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation, dropout, save):
    tensors, experts = inputs(T=7, d=3, h=5, E=3, dtype=torch.float64)
    plan = dispatch(experts, 3, capacity=4)

    def function(*leaves):
        with backend.force("cpp"):
            return expert_ffn(*leaves, plan, activation=activation, dropout_p=dropout, seed=SEED, save=save)

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_the_references(dtype, p):
    tensors, experts = inputs(h=30, dtype=dtype)
    plan = dispatch(experts, 5)
    upstream = torch.randn(37, 19)

    def run(name):
        def function(**leaves):
            with backend.force(name):
                return expert_ffn(**leaves, dispatch=plan, dropout_p=p, seed=SEED)

        return evaluate(function, tensors, upstream)

    cpp, reference = run("cpp"), run("reference")
    for name in ("y", *NAMES):
        torch.testing.assert_close(cpp[name], reference[name], rtol=3e-2, atol=3e-2)


def test_dropout_drops_the_right_fraction_and_keeps_the_mean():
    T, h = 400, 50
    identity = torch.ones(1, 1, h) / h
    plan = dispatch(torch.zeros(T, 1, dtype=torch.int64), 1)
    y = expert_ffn(
        torch.ones(T, 1), torch.ones(1, h, 1), torch.zeros(1, h), identity, torch.zeros(1, 1), torch.ones(T, 1), plan,
        activation="relu", dropout_p=0.25, seed=SEED,
    )  # fmt: skip
    assert abs(y.mean() - 1) < 0.02
    assert abs(y.var() * h - 0.25 / 0.75) < 0.06


@pytest.mark.parametrize("k", [1, 2])
def test_opcheck(k):
    tensors, experts = inputs(k=k)
    plan = dispatch(experts, 5, capacity=9)[:3]
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    for options in ((None, "gelu", 0.0), (SEED, "silu", 0.3)):
        for save in (True, False):
            torch.library.opcheck(torch.ops.moe_kernels.expert_ffn.default, (*leaves, *plan, *options, save))
            with torch.no_grad():
                y, z = torch.ops.moe_kernels.expert_ffn(*leaves, *plan, *options, save)
            detached = [leaf.detach() for leaf in leaves]
            torch.library.opcheck(torch.ops.moe_kernels.expert_ffn_backward.default, (y, *detached, z, *plan, *options))


def test_non_contiguous_inputs_and_upstream():
    tensors, experts = inputs()
    plan = dispatch(experts, 5)
    strided = {
        name: tensor.transpose(-1, -2).contiguous().transpose(-1, -2) if tensor.dim() > 1 else tensor
        for name, tensor in tensors.items()
    }
    upstream = torch.randn(19, 37).t()

    def function(**leaves):
        return expert_ffn(**leaves, dispatch=plan)

    one, other = evaluate(function, tensors, upstream.contiguous()), evaluate(function, strided, upstream)
    for name in ("y", *NAMES):
        torch.testing.assert_close(one[name], other[name])


def test_more_rows_than_a_block():
    # One expert with more rows than the kernels take at a time, forward and backward.
    tensors, _ = inputs(T=9000, d=5, h=7, E=2, k=1)
    experts = torch.ones(9000, 1, dtype=torch.int64)
    plan = dispatch(experts, 2)
    upstream = torch.randn(9000, 5)
    ours = evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=plan), tensors, upstream)
    loop = plain_loop(experts, plan.kept)
    plain = evaluate(loop, tensors, upstream)
    exact = evaluate(loop, {name: tensor.double() for name, tensor in tensors.items()}, upstream)
    for name in ("y", *NAMES):
        assert_within_budget(ours[name], plain[name], exact[name], name=name)


@pytest.mark.parametrize("name", ["cpp", "reference"])
def test_nan_stays_in_its_row_and_in_its_expert(name):
    tensors, experts = inputs(k=1)
    plan = dispatch(experts, 5)
    clean = expert_ffn(**tensors, dispatch=plan)
    tensors["x"][4, 2] = float("nan")
    with backend.force(name):
        results = evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=plan), tensors, torch.ones(37, 19))
    others = torch.arange(37) != 4
    assert results["y"][4].isnan().all()
    torch.testing.assert_close(results["y"][others], clean[others])
    mine = experts[4, 0]
    assert results["w1"][mine].isnan().any()
    assert results["w1"][torch.arange(5) != mine].isfinite().all()


def test_expert_without_tokens_has_zero_gradient():
    tensors, _ = inputs(k=1)
    plan = dispatch(torch.full((37, 1), 3), 5)
    results = evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=plan), tensors, torch.ones(37, 19))
    for name in ("w1", "b1", "w2", "b2"):
        assert (results[name][[0, 1, 2, 4]] == 0).all()
        assert results[name][3].abs().sum() > 0


def test_empty_batch_gives_empty_output_and_zero_gradients():
    tensors, experts = inputs(T=0)
    results = evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=dispatch(experts, 5)), tensors, torch.ones(0, 19))
    assert results["y"].shape == (0, 19)
    for name in ("w1", "b1", "w2", "b2"):
        assert (results[name] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_again_and_for_any_number_of_threads(dtype):
    # Several units of an expert, and one whose rows need no packing of weights.
    tensors, _ = inputs(T=900, d=48, h=90, k=1, dtype=dtype)
    plan = dispatch(torch.tensor([0] * 840 + [1] * 60)[torch.randperm(900)][:, None], 5)
    upstream = torch.randn(900, 48)

    def run():
        return evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=plan), tensors, upstream)

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2, 3, *[threads] * 47):
            torch.set_num_threads(count)
            for name, tensor in run().items():
                assert torch.equal(first[name], tensor), (name, count)
    finally:
        torch.set_num_threads(threads)


def test_a_row_does_not_depend_on_its_batch_mates():
    for d, h in ((60, 90), (384, 1000)):
        tensors, experts = inputs(T=700, d=d, h=h)
        whole = expert_ffn(**tensors, dispatch=dispatch(experts, 5))
        part = {n: t[:7] if n in ("x", "gates") else t for n, t in tensors.items()}
        assert torch.equal(whole[:7], expert_ffn(**part, dispatch=dispatch(experts[:7], 5)))


def test_several_threads_of_python_may_call_at_once():
    tensors, experts = inputs(T=300, d=40, h=70)
    plan, upstream = dispatch(experts, 5), torch.randn(300, 40)

    def run(_=None):
        return evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=plan), tensors, upstream)

    first = run()
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(run, range(16)):
            assert all(torch.equal(first[name], tensor) for name, tensor in again.items())


def test_gradient_may_be_taken_twice_and_upstream_functions_see_it():
    tensors, experts = inputs()
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    y = expert_ffn(**leaves, dispatch=dispatch(experts, 5)).exp()
    first = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
    second = torch.autograd.grad(y.sum(), list(leaves.values()))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_memory_that_the_backward_keeps():
    tensors, experts = inputs(T=50, d=20, h=300, k=1)
    plan = dispatch(experts, 5)

    def kept_bytes(save):
        kept = []
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        own = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            expert_ffn(**leaves, dispatch=plan, save=save)
        return sum(kept)

    plan_bytes = sum(tensor.nbytes for tensor in plan[:3])
    assert kept_bytes("input") == plan_bytes
    assert kept_bytes("preactivation") == plan_bytes + 50 * 300 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_ffn_and_gives_gradients_in_the_parameters_dtype(dtype):
    tensors, experts = inputs()
    plan = dispatch(experts, 5)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    with torch.autocast("cpu", dtype=dtype):
        y = expert_ffn(**leaves, dispatch=plan)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y.float().sum(), list(leaves.values()))
    assert all(grad.dtype == torch.float32 for grad in grads)
    narrow = {
        name: tensor.detach() if name == "gates" else tensor.detach().to(dtype) for name, tensor in leaves.items()
    }
    # Parameters in float32 are taken as they are, so that this may be the more accurate of the two.
    torch.testing.assert_close(y, expert_ffn(**narrow, dispatch=plan), rtol=0.02, atol=0.05)


def test_float_functions_of_the_activations_are_accurate():
    # One expert that passes its input through: y = φ(x).
    x = torch.linspace(-12, 12, 100_001).float()[:, None]
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    plan = dispatch(torch.zeros(len(x), 1, dtype=torch.int64), 1)
    for activation in ACTIVATIONS:
        leaf = x.clone().requires_grad_()
        y = expert_ffn(leaf, one, zero, one, zero, torch.ones(len(x), 1), plan, activation=activation)
        wide = x.double().requires_grad_()
        exact = PLAIN_ACTIVATIONS[activation](wide)
        (slope,), (exact_slope,) = (torch.autograd.grad(v.sum(), t) for v, t in ((y, leaf), (exact, wide)))
        assert (y - exact).abs().max() < 2e-6, activation
        assert (slope - exact_slope).abs().max() < 1e-6, activation


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_infinities_and_nan_go_through_the_activation_as_in_plain_pytorch(activation):
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 200.0, -200.0])[:, None]
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    plan = dispatch(torch.zeros(5, 1, dtype=torch.int64), 1)
    y = expert_ffn(x, one, zero, one, zero, torch.ones(5, 1), plan, activation=activation)
    expected = PLAIN_ACTIVATIONS[activation](x)
    if activation == "gelu":  # the vectorized form in torch gives NaN at +inf, unlike the formula
        expected = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_relu_lets_no_gradient_through_not_even_an_infinite_one():
    # z = -1 and 1, and the gradient of the hidden feature is infinite.
    x = torch.tensor([[-1.0], [1.0]], requires_grad=True)
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    plan = dispatch(torch.zeros(2, 1, dtype=torch.int64), 1)
    y = expert_ffn(x, one, zero, one * math.inf, zero, torch.ones(2, 1), plan, activation="relu")
    (grad,) = torch.autograd.grad(y, x, torch.ones(2, 1))
    assert grad.tolist() == [[0.0], [math.inf]]


def test_float16_overflows_to_infinity_but_a_finite_preactivation_stays_finite():
    x = torch.tensor([[60000.0], [math.inf]], dtype=torch.float16)
    weight, zero = torch.full((1, 1, 1), 2.0, dtype=torch.float16), torch.zeros(1, 1, dtype=torch.float16)
    plan = dispatch(torch.zeros(2, 1, dtype=torch.int64), 1)
    arguments = (x, weight, zero, weight, zero, torch.ones(2, 1), *plan[:3], None, "relu", 0.0, True)
    y, z = torch.ops.moe_kernels.expert_ffn(*arguments)
    assert y.flatten().tolist() == [math.inf, math.inf]
    assert z.flatten().tolist() == [65504.0, math.inf]


@pytest.mark.parametrize("save", ["preactivation", "input"])
def test_without_hidden_features_the_bias_is_left(save):
    tensors, experts = inputs(T=9, d=5, h=1, E=3, k=2)
    tensors |= {"w1": torch.empty(3, 0, 5), "b1": torch.empty(3, 0), "w2": torch.empty(3, 5, 0)}
    plan = dispatch(experts, 3)
    results = evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=plan, save=save), tensors, torch.ones(9, 5))
    torch.testing.assert_close(results["y"], torch.einsum("tk,tkd->td", tensors["gates"], tensors["b2"][experts]))
    assert (results["x"] == 0).all()


@pytest.mark.parametrize(
    ("position", "change", "message"),
    [
        (5, torch.ones(1, 1), "gates: the shape does not fit"),
        (3, torch.ones(5, 23, 19), "w2: the shape does not fit"),
        (5, torch.ones(37, 2, dtype=torch.float64), "gates: expected the dtype of the arithmetic, got Double"),
        (1, torch.ones(5, 23, 19, dtype=torch.float64), "weights: expected the dtype of x or float32, got Double"),
        (6, torch.zeros(74, dtype=torch.int32), "dispatch: expected int64 tensors, got Int"),
    ],
)
def test_the_raw_operator_refuses_what_it_would_read_wrongly(position, change, message):
    tensors, experts = inputs()
    arguments = [*tensors.values(), *dispatch(experts, 5)[:3], None, "gelu", 0.0, False]
    arguments[position] = change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.moe_kernels.expert_ffn(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.randn(37, 18)}, ValueError, r"w1: expected shape \(E, h, 18\), got \(5, 23, 19\)"),
        (
            {"x": torch.ones(37, 19, dtype=torch.int32)},
            TypeError,
            "x: expected a floating-point tensor, got torch.int32",
        ),
        ({"x": torch.randn(36, 19)}, ValueError, r"dispatch.inverse: expected shape \(36, k\), got \(37, 2\)"),
        ({"b1": torch.randn(5, 22)}, ValueError, r"b1: expected shape \(5, 23\), got \(5, 22\)"),
        ({"w2": torch.randn(5, 23, 19)}, ValueError, r"w2: expected shape \(5, 19, 23\), got \(5, 23, 19\)"),
        ({"b2": torch.randn(4, 19)}, ValueError, r"b2: expected shape \(5, 19\), got \(4, 19\)"),
        ({"gates": torch.rand(37, 3)}, ValueError, r"gates: expected shape \(37, 2\), got \(37, 3\)"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of gelu, .*, got 'tanh'"),
        ({"save": "all"}, ValueError, "save: expected one of preactivation, input, auto, got 'all'"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a probability in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.1}, ValueError, "seed: dropout_p=0.1 needs"),
    ],
)
def test_bad_input_is_named(change, error, message):
    tensors, experts = inputs()
    with pytest.raises(error, match=message):
        expert_ffn(**(tensors | {"dispatch": dispatch(experts, 5)} | change))
