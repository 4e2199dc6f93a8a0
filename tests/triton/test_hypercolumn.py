"""The Triton kernels of hypercolumn: on a GPU, or on the CPU in the interpreter made strict."""

import interpreter
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, nudged

from moe_kernels import backend
from moe_kernels.ops.hypercolumn import Pyramid, gather, inner, linear, norm, pyramid
from moe_kernels.triton import hypercolumn as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU; the interpreter has no streams and no real concurrency")
pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(bool(backend.refusal("triton", DEVICE)), reason=backend.refusal("triton", DEVICE) or "runs"),
]
# The interpreter computes bfloat16 wrongly.
TESTED = DTYPES if DEVICE == "cuda" else (torch.float32, torch.float16, torch.float64)
EXAMPLES = 40 if DEVICE == "cuda" else 8


def on_triton(function):
    """The results of ``function`` on the Triton kernels, checked by the strict interpreter where there is no GPU."""
    with backend.force("triton"):
        return interpreter.in_any_order(function)


def on_reference(function):
    with backend.force("reference"):
        return function()


def random_maps(sizes, batch, dtype=torch.float32):
    return [torch.randn(batch, *size, device=DEVICE).to(dtype) for size in sizes]


def results(tensors, grid, points, upstream):
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    maps = [leaf for name, leaf in leaves.items() if name.startswith("map")]
    of = Pyramid(tuple(maps), grid)
    columns, y = gather(of, points), linear(of, leaves["weight"], leaves["bias"])
    outputs = [columns, y, inner(of, leaves["columns"]), norm(of)]
    of_columns = torch.autograd.grad(columns, maps, upstream["columns"].to(columns.dtype))
    of_y = torch.autograd.grad(y, [*maps, leaves["weight"], leaves["bias"]], upstream["y"].to(y.dtype))
    return [*outputs, *of_columns, *of_y]


def assert_agrees(sizes, grid, batch, count, dtype):
    channels = sum(size[0] for size in sizes)
    tensors = {f"map{i}": m for i, m in enumerate(random_maps(sizes, batch, dtype))}
    for name, shape in {"weight": (5, channels), "bias": (5,), "columns": (batch, 2, channels)}.items():
        tensors[name] = torch.randn(shape, device=DEVICE).to(dtype)
    points = torch.randint(-1, grid[0] * grid[1], (batch, count), device=DEVICE)
    upstream = {"columns": torch.randn(batch, count, channels), "y": torch.randn(batch, 5, *grid)}
    upstream = {name: t.to(DEVICE, dtype) for name, t in upstream.items()}
    wide = {name: t.double() for name, t in tensors.items()}
    found = on_triton(lambda: results(tensors, grid, points, upstream))
    plain, exact = (on_reference(lambda t=t: results(t, grid, points, upstream)) for t in (tensors, wide))
    moved = [on_reference(lambda: results(nudged(tensors), grid, points, upstream)) for _ in range(3)]
    for number, values in enumerate(zip(found, plain, exact, *moved, strict=True)):
        assert_within_budget(*values, name=f"result {number}")


# As the grid, smaller along one axis, by no whole number, one pixel; more maps than one launch takes.
MANY = [(130, 4, 5), (5, 4, 2), (3, 3, 4), (2, 2, 5), (9, 1, 1)]
GRID = (4, 5)


@pytest.mark.parametrize("dtype", TESTED, ids=str)
def test_many_maps(dtype):
    assert_agrees(MANY, GRID, 2, 7, dtype)


@settings(max_examples=EXAMPLES, phases=(Phase.explicit, Phase.generate))
@given(
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    batch=st.integers(0, 2),
    count=st.integers(0, 5),
    dtype=st.sampled_from(TESTED),
    data=st.data(),
)
def test_any_shapes(grid, batch, count, dtype, data):
    size = st.tuples(st.integers(1, 20), st.integers(1, grid[0]), st.integers(1, grid[1]))
    assert_agrees(data.draw(st.lists(size, min_size=1, max_size=3), label="sizes"), grid, batch, count, dtype)


@settings(max_examples=5 * EXAMPLES, phases=(Phase.explicit, Phase.generate))
@example(3, 64)
@example(7, 8)
@given(size=st.integers(1, 30), out=st.integers(1, 40))
def test_a_gradient_reaches_every_pixel_of_an_axis(size, out):
    """All that a resize reads, and nothing besides: the gradient of the sum of all locations."""
    size = min(size, out)
    grad = torch.ones(1, 1, 1, out, device=DEVICE)
    found = kernels.hypercolumn_resize_sum_backward(grad, [1, size])[0].double()
    m = torch.zeros(1, 1, 1, size, dtype=torch.float64, device=DEVICE, requires_grad=True)
    whole = torch.nn.functional.interpolate(m, (1, out), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, torch.autograd.grad(whole.sum(), m)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="the Triton kernels have float64 in the interpreter only")
def test_gradcheck():
    maps = [m.requires_grad_() for m in random_maps([(1, 2, 2), (1, 1, 1)], 1, torch.float64)]
    weight = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    points = torch.tensor([[0, 5, -1]])
    with backend.force("triton"):
        assert torch.autograd.gradcheck(lambda *m: gather(Pyramid(m, (2, 3)), points), maps)
        assert torch.autograd.gradcheck(lambda w, *m: linear(Pyramid(m, (2, 3)), w), (weight, *maps))


def test_a_point_out_of_range_reads_no_foreign_memory():
    maps = [m.requires_grad_() for m in random_maps([(3, 2, 2)], 1)]
    points = torch.tensor([[0, 100, -7, 3]], device=DEVICE)

    def run():
        columns = gather(Pyramid(tuple(maps), (2, 2)), points)
        return [columns, *torch.autograd.grad(columns.sum(), maps)]

    columns, grad = on_triton(run)
    assert torch.equal(columns[0, 1:3], torch.zeros(2, 3, device=DEVICE))
    assert torch.equal(grad.sum((0, 1)), torch.tensor([[3.0, 0.0], [0.0, 3.0]], device=DEVICE))


def test_a_pixel_without_weight_is_not_read():
    of = Pyramid((torch.tensor([[[[1.0, torch.inf, 2.0]]]], device=DEVICE),), (1, 3))
    found, norms = on_triton(lambda: [gather(of, torch.tensor([[0, 2]], device=DEVICE)), norm(of)])
    assert found.flatten().tolist() == [1, 2]
    assert norms.flatten().tolist() == [1, torch.inf, 2]


def test_opcheck_of_every_operator():
    operators, grid = torch.ops.moe_kernels, list(GRID)
    maps = [m.requires_grad_() for m in random_maps(MANY[1:3], 1)]
    products = [m.requires_grad_() for m in random_maps([(3, *size[1:]) for size in MANY[:3]], 1)]
    points = torch.randint(-1, 20, (1, 3), device=DEVICE)
    bias = torch.randn(3, device=DEVICE, requires_grad=True)
    columns = torch.randn(1, 3, 8, device=DEVICE)
    sizes = [s for size in MANY[1:3] for s in size]
    grad = torch.randn(1, 3, *grid, device=DEVICE)
    with backend.force("triton"):
        torch.library.opcheck(operators.hypercolumn_gather.default, (maps, points, grid))
        torch.library.opcheck(operators.hypercolumn_resize_sum.default, (products, grid, bias))
        torch.library.opcheck(operators.hypercolumn_gather_backward.default, (columns, points, sizes, grid))
        sizes = [s for size in MANY[:3] for s in size[1:]]
        torch.library.opcheck(operators.hypercolumn_resize_sum_backward.default, (grad, sizes))
        torch.library.opcheck(operators.hypercolumn_norm.default, ([m.detach() for m in maps], grid))


def test_compiles_without_graph_breaks():
    maps = [m.requires_grad_() for m in random_maps([(2, 5, 4), (3, 2, 2)], 1)]
    points = torch.randint(-1, 12, (1, 5), device=DEVICE)
    weight = torch.randn(4, 5, device=DEVICE, requires_grad=True)

    def run(function):
        found = function(maps, weight)
        return [*found, *torch.autograd.grad(found[0].sum() + found[1].square().sum(), (*maps, weight))]

    def head(maps, weight):
        of = pyramid(maps, (3, 4))
        return linear(of, weight), gather(of, points), norm(of)

    with backend.force("triton"):
        for eager, traced in zip(run(head), run(torch.compile(head, fullgraph=True, backend="aot_eager")), strict=True):
            torch.testing.assert_close(eager, traced)


def huge(*shape, dtype=torch.float32, ghost=0):
    """Memory that is not there, which holds ``ghost``."""
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    tensor.ghost = ghost
    return tensor


@pytest.mark.skipif(not interpreter.INTERPRETING, reason="a GPU is here; addresses are checked in the interpreter")
def test_offsets_beyond_31_bits():
    batch, channels, height, width = 600, 512, 80, 100
    maps = [huge(batch, h, w, channels).permute(0, 3, 1, 2) for h, w in ((height, width), (33, 47))]
    assert maps[0].numel() > 2**31
    grid, points = (height, width), huge(batch, 7, dtype=torch.int64, ghost=height * width - 1)
    with interpreter.strict("ends"):
        kernels.hypercolumn_gather(maps, points, grid)
        kernels.hypercolumn_norm(maps, grid)
        kernels.hypercolumn_resize_sum(maps, grid, huge(channels))
        kernels.hypercolumn_resize_sum_backward(maps[0], [33, 47])
        pixels, order = batch * 33 * 47, huge(2**31, 4, dtype=torch.int64, ghost=2**33 - 1)
        rows = huge(2**31, 1000)
        starts, weight = huge(pixels + 1, dtype=torch.int64), huge(2**31, 4)
        kernels.hypercolumn_gather_backward_kernel[(pixels, 4)](
            rows, order, weight, starts, huge(pixels, channels), channels, 1000, COLUMNS=128, DTYPE=kernels.tl.float32
        )
        kernels.hypercolumn_corners_kernel[(2**31 // 256,)](
            huge(2**31, dtype=torch.int64),
            order,
            weight,
            2**31,
            2**20,
            80,
            100,
            80,
            100,
            ROWS=256,
            DTYPE=kernels.tl.float32,
        )


@GPU
def test_fifty_runs_give_the_same_bits():
    maps = [m.requires_grad_() for m in random_maps([(70, 24, 28), (130, 12, 14), (33, 5, 7)], 2)]
    points = torch.randint(-1, 24 * 28, (2, 3000), device=DEVICE)
    weight = torch.randn(50, 233, device=DEVICE)
    first = None
    for _ in range(50):
        of = Pyramid(tuple(maps), (24, 28))
        columns, y = gather(of, points), linear(of, weight)
        found = [columns, y, norm(of), *torch.autograd.grad(columns.square().sum() + y.square().sum(), maps)]
        first = first or found
        assert all(torch.equal(one, other) for one, other in zip(first, found, strict=True))


@GPU
def test_replayed_graph_follows_changed_maps():
    maps = random_maps([(70, 24, 28), (130, 12, 14)], 2, torch.float16)
    points, weight = torch.randint(-1, 24 * 28, (2, 30), device=DEVICE), torch.randn(50, 200, device=DEVICE).half()

    def run():
        of = Pyramid(tuple(maps), (24, 28))
        return gather(of, points), linear(of, weight), norm(of)

    run()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(2):
        for m in maps:
            m.normal_()
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(found, run(), strict=True))


def test_no_output_channel():
    of = pyramid([torch.randn(2, 7, 3, 4, device=DEVICE)], (3, 4))
    with backend.force("triton"):
        assert linear(of, torch.randn(0, 7, device=DEVICE)).shape == (2, 0, 3, 4)
        assert inner(of, torch.randn(2, 0, 7, device=DEVICE)).shape == (2, 0, 3, 4)
