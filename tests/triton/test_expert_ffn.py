"""The Triton kernels of expert_ffn: on a GPU, or on the CPU in the interpreter made strict."""

import logging
import math
from unittest import mock

import interpreter
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, nudged

from moe_kernels import backend
from moe_kernels.ops.dispatch import dispatch
from moe_kernels.ops.expert_ffn import ACTIVATIONS, cheaper_to_save, expert_ffn
from moe_kernels.reference import philox
from moe_kernels.reference.expert_ffn import ACTIVATIONS as PLAIN_ACTIVATIONS

pytest.importorskip("triton")
from moe_kernels.triton import configurations
from moe_kernels.triton import expert_ffn as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU; the interpreter has no streams and no real concurrency")
pytestmark = [
    pytest.mark.usefixtures("poisoned", "small_tiles"),
    pytest.mark.skipif(bool(backend.refusal("triton", DEVICE)), reason=backend.refusal("triton", DEVICE) or "runs"),
]
# The interpreter computes bfloat16 wrongly.
TESTED = (*DTYPES, torch.float16) if DEVICE == "cuda" else (torch.float32, torch.float16)
EXAMPLES = 10 if DEVICE == "cuda" else 6
WIDEST = torch.float32 if DEVICE == "cuda" else torch.float64
NAMES = ("x", "w1", "b1", "w2", "b2", "gates")
SEED = torch.tensor([987654321], device=DEVICE)
DEFAULT = configurations.DEFAULT
SMALL = configurations.Tile(16, 16, 16, 4, 2, width=16)


@pytest.fixture(scope="module")
def small_tiles():
    """Tiles so small that a few rows and columns take several; the shipped ones on a GPU, where nothing is slow."""
    if DEVICE == "cuda":
        yield
    else:
        tiles = {"up": SMALL._replace(width=8)}
        with (
            mock.patch.object(configurations, "choose", lambda kernel, *rest: tiles.get(kernel, SMALL)),
            mock.patch.object(configurations, "GATES", SMALL),
        ):
            yield


def inputs(T=19, d=17, h=18, E=2, k=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    tensors = {
        "x": draw(T, d),
        "w1": draw(E, h, d, scale=1 / math.sqrt(d)),
        "b1": draw(E, h),
        "w2": draw(E, d, h, scale=1 / math.sqrt(h)),
        "b2": draw(E, d),
        "gates": torch.rand(T, k, generator=generator).to(DEVICE, dtype),
    }
    return tensors, torch.rand(T, E, generator=generator).argsort(1)[:, :k].contiguous().to(DEVICE)


def plan_of(experts, E, capacity=None):
    with backend.force("reference"):
        return dispatch(experts, E, capacity=capacity)


def evaluate(function, tensors, upstream):
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    y = function(**leaves)
    return {"y": y} | dict(zip(NAMES, torch.autograd.grad(y, list(leaves.values()), upstream.to(y.dtype)), strict=True))


def on_triton(tensors, upstream, plan, **options):
    """y and all gradients, the same in any order of the programs."""

    def run():
        with backend.force("triton"):
            return list(
                evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=plan, **options), tensors, upstream).values()
            )

    return dict(zip(("y", *NAMES), interpreter.in_any_order(run), strict=True))


def on_reference(tensors, upstream, plan, **options):
    with backend.force("reference"):
        return evaluate(lambda **leaves: expert_ffn(**leaves, dispatch=plan, **options), tensors, upstream)


def plain_loop(experts, kept, activation):
    """What one writes in plain PyTorch: a loop over experts in the dtype of the inputs."""

    def function(x, w1, b1, w2, b2, gates):
        y = torch.zeros_like(x)
        for e in range(w1.shape[0]):
            token, choice = ((experts == e) & kept).nonzero(as_tuple=True)
            hidden = PLAIN_ACTIVATIONS[activation](F.linear(x[token], w1[e], b1[e]))
            y = y.index_add(0, token, gates[token, choice, None] * F.linear(hidden, w2[e], b2[e]))
        return y

    return function


@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.generate))
@given(
    T=st.integers(0, 20),
    d=st.integers(1, 33),
    h=st.integers(1, 33),
    E=st.integers(1, 4),
    dtype=st.sampled_from(TESTED),
    activation=st.sampled_from(ACTIVATIONS),
    save=st.sampled_from(("preactivation", "input")),
    data=st.data(),
)
def test_within_budget_of_float64(T, d, h, E, dtype, activation, save, data):
    k = data.draw(st.integers(1, min(E, 3)), label="k")
    skewed = data.draw(st.booleans(), label="skewed")
    capacity = data.draw(st.none() | st.integers(0, 2 * T // E + 1), label="capacity")
    tensors, experts = inputs(T, d, h, E, k, dtype, seed=T + d)
    if skewed:  # one expert is everybody's first choice, so that others go empty
        experts = torch.arange(k, device=DEVICE).expand(T, k).contiguous()
    plan = plan_of(experts, E, capacity)
    upstream = torch.randn(T, d).to(DEVICE, dtype)
    ours = on_triton(tensors, upstream, plan, activation=activation, save=save)
    loop = plain_loop(experts.cpu(), plan.kept.cpu(), activation)
    tensors, upstream = {name: tensor.cpu() for name, tensor in tensors.items()}, upstream.cpu()
    plain = evaluate(loop, tensors, upstream)
    exact = evaluate(loop, {name: tensor.double() for name, tensor in tensors.items()}, upstream)
    moved = evaluate(loop, nudged(tensors), upstream)
    for name in ("y", *NAMES):
        assert_within_budget(ours[name].cpu(), plain[name], exact[name], moved[name], name=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_is_the_reference_dropout_included(activation):
    # With k = 2 two row tiles an expert; two column tiles; capacity. A mask of other bits would show in every gradient.
    k, save = (1, "input") if activation in ("relu", "silu") else (2, "preactivation")
    tensors, experts = inputs(k=k, dtype=WIDEST)
    plan = plan_of(experts, 2, capacity=9 * k)
    upstream = torch.randn(19, 17).to(DEVICE)
    options = {"activation": activation, "dropout_p": 0.3, "seed": SEED}
    ours = on_triton(tensors, upstream, plan, save=save, **options)
    for name, theirs in on_reference(tensors, upstream, plan, **options).items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-5, atol=5e-5 if DEVICE == "cuda" else 2e-6)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_mask_is_the_references(p):
    T, h, E = 20, 21, 2
    experts = torch.arange(T, device=DEVICE)[:, None] % E
    tensors, _ = inputs(T, h, h, E, 1)
    tensors["w1"].zero_()
    tensors["b1"].fill_(1 - p)
    tensors["w2"].copy_(torch.eye(h))
    tensors["b2"].zero_()
    tensors["gates"].fill_(1)
    with backend.force("triton"), interpreter.strict():
        y = expert_ffn(**tensors, dispatch=plan_of(experts, E), activation="relu", dropout_p=p, seed=SEED)
    rows = torch.arange(T, device=DEVICE) * E + experts[:, 0]
    torch.testing.assert_close(y, philox.keep(SEED, rows, h, p).float())


def test_input_saved_or_preactivation_saved_is_the_same():
    tensors, experts = inputs(T=9)
    plan, upstream = plan_of(experts, 2), torch.randn(9, 17).to(DEVICE)
    one, other = (on_triton(tensors, upstream, plan, save=save) for save in ("input", "preactivation"))
    for name in ("y", *NAMES):
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "capacity"),
    [
        ({"T": 0, "k": 1}, None),
        ({"T": 1, "d": 1, "h": 1, "E": 1, "k": 1}, None),
        ({"T": 3, "E": 40, "k": 1, "h": 5}, None),
        ({"T": 4, "E": 4, "k": 4, "h": 5}, None),
        ({"T": 5, "k": 2, "h": 5}, 0),
        ({"T": 5, "k": 1, "h": 5}, 1),
        ({"T": 150, "d": 3, "h": 18, "E": 1, "k": 1}, 140),  # more row tiles than go together through the columns
    ],
)
def test_at_the_edges(shape, capacity):
    tensors, experts = inputs(**shape, dtype=WIDEST)
    plan = plan_of(experts, tensors["w1"].shape[0], capacity)
    upstream = torch.randn(tensors["x"].shape).to(DEVICE)
    ours, theirs = (run(tensors, upstream, plan) for run in (on_triton, on_reference))
    for name in ("y", *NAMES):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5)


def test_float16_preactivation_saturates():
    tensors, experts = inputs(T=3, d=4, h=5, k=1, dtype=torch.float16)
    tensors["b1"].fill_(60000)
    tensors["x"].fill_(50)
    tensors["w1"].fill_(300)
    plan = plan_of(experts, 2)
    arguments = (*tensors.values(), *plan[:3], None, "relu", 0.0, True)
    with interpreter.strict():
        saved = kernels.expert_ffn(*arguments)[1]
    assert (saved == 65504).all()


def test_nan_stays_in_its_row_and_in_its_expert():
    tensors, experts = inputs(T=9, k=1)
    plan = plan_of(experts, 2)
    tensors["x"][4, 2] = float("nan")
    results = on_triton(tensors, torch.ones(9, 17, device=DEVICE), plan)
    others = torch.arange(9, device=DEVICE) != 4
    assert results["y"][4].isnan().all()
    assert results["y"][others].isfinite().all()
    mine = torch.arange(2, device=DEVICE) == experts[4, 0]
    assert results["w1"][mine].isnan().any()
    assert results["w1"][~mine].isfinite().all()


def test_float32_gradients_of_float32_weights_do_not_pass_through_16_bits():
    tensors, experts = inputs(T=9, k=1)
    tensors["x"] = tensors["x"].half()
    plan = plan_of(experts, 2)
    with interpreter.strict():
        y, saved = kernels.expert_ffn(*tensors.values(), *plan[:3], None, "gelu", 0.0, True)
        grads = kernels.expert_ffn_backward(torch.ones_like(y), *tensors.values(), saved, *plan[:3], None, "gelu", 0.0)
    assert [grad.dtype for grad in grads] == [torch.float16] + 5 * [torch.float32]
    for grad in grads[1:5]:
        assert (grad != grad.half()).any()


def test_an_invalid_plan_touches_no_foreign_memory():
    tensors, experts = inputs(T=64, d=3, h=5, E=3, k=1)
    order, offsets, inverse, _ = plan_of(experts, 3)
    # The last gives all rows to two experts, which are more row tiles than any valid plan has, and a race.
    for wrong in (offsets + 5, -offsets, offsets.flip(0), offsets.new_tensor([0, 64, 0, 64])):
        arguments = (order * 3 - 7, wrong, inverse, None, "gelu", 0.0)
        with interpreter.strict(), mock.patch.object(interpreter.Memory, "_claim"):
            y, saved = kernels.expert_ffn(*tensors.values(), *arguments, True)
            kernels.expert_ffn_backward(y, *tensors.values(), saved, *arguments)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter has memory of any size")
@pytest.mark.parametrize("save", [True, False])
def test_offsets_beyond_32_bits(save):
    # The last 5 rows of 50 million belong to the last of half a million experts: 3.2e9 hidden features, 2.2e9 weights.
    T, d, h, E = 50_000_000, 48, 64, 700_000

    def meta(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    order = meta(T, dtype=torch.int64)
    order.ghost = T - 1
    offsets = torch.full((E + 1,), T - 5)
    offsets[E] = T
    tensors = (meta(T, d), meta(E, h, d), meta(E, h), meta(E, d, h), meta(E, d), meta(T, 1))
    plan = (order, offsets, meta(T, 1, dtype=torch.int64), None, "gelu", 0.0)
    with interpreter.strict("ends"):
        y, saved = kernels.expert_ffn(*tensors, *plan, save)
        kernels.expert_ffn_backward(y, *tensors, saved, *plan)


@pytest.mark.parametrize("k", [1, 2])
def test_opcheck(k):
    tensors, experts = inputs(T=5, d=5, h=6, E=2, k=k)
    plan = plan_of(experts, 2, capacity=4)[:3]
    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    with backend.force("triton"):
        torch.library.opcheck(torch.ops.moe_kernels.expert_ffn.default, (*leaves, *plan, SEED, "silu", 0.3, True))


def test_every_shipped_table_is_complete_and_a_missing_one_is_told_once(caplog):
    for tables in configurations.TABLE.values():
        assert tuple(tables) == configurations.SIZES
    for table in (*(table for tables in configurations.TABLE.values() for table in tables.values()), DEFAULT):
        assert set(table) == set(DEFAULT)
        for tile in table.values():
            assert tile.block_n % tile.width == 0
            assert tile.width % 4 == 0
            assert tile.block_m <= 256
    configurations._tables.cache_clear()
    with caplog.at_level(logging.WARNING, logger="moe_kernels"):
        tables = [configurations._tables((8, 6), 2) for _ in range(3)]
    assert tables == [dict.fromkeys(configurations.SIZES, DEFAULT)] * 3
    assert [record.message for record in caplog.records] == [
        "expert_ffn: no tuned tiles for compute capability 8.6 and elements of 2 bytes, a default is used"
    ]


@pytest.mark.parametrize(
    ("dim", "element_size", "capability", "expected"),
    [
        (367, 2, (9, 0), "input"),
        (368, 2, (9, 0), "preactivation"),
        (328, 2, (8, 0), "input"),
        (329, 2, (8, 0), "preactivation"),
        (122, 4, (9, 0), "input"),
        (123, 4, (9, 0), "preactivation"),
        (8, 2, (12, 0), "preactivation"),
        (8, 2, None, "preactivation"),
    ],
)
def test_the_input_is_saved_where_that_is_not_slower(dim, element_size, capability, expected):
    assert cheaper_to_save(dim, element_size, capability) == expected


@GPU
def test_50_runs_are_equal():
    tensors, experts = inputs(T=5000, d=384, h=1536, E=6, k=2, dtype=torch.bfloat16)
    plan, upstream = plan_of(experts, 6), torch.randn(5000, 384).to(DEVICE)
    first = on_triton(tensors, upstream, plan, dropout_p=0.1, seed=SEED)
    for _ in range(49):
        for name, again in on_triton(tensors, upstream, plan, dropout_p=0.1, seed=SEED).items():
            assert torch.equal(first[name], again), name


@GPU
@pytest.mark.parametrize("k", [1, 2])
def test_a_graph_may_be_replayed_with_another_routing(k):
    tensors, experts = inputs(T=700, d=60, h=90, E=5, k=k)
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    upstream = torch.randn(700, 60).to(DEVICE)

    def step():
        y = expert_ffn(**leaves, dispatch=dispatch(experts, 5))
        return y, *torch.autograd.grad(y, list(leaves.values()), upstream)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for seed in range(3):
        experts.copy_(inputs(T=700, d=60, h=90, E=5, k=k, seed=seed)[1])
        if seed == 2:
            experts.copy_(torch.arange(k).expand(700, k))
        graph.replay()
        for replayed, eager in zip(results, step(), strict=True):
            assert torch.equal(replayed, eager)
