import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import DTYPES, assert_within_budget, nudged

from moe_kernels import backend
from moe_kernels.ops.hypercolumn import Pyramid, dense, gather, inner, linear, norm, pyramid

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = pytest.mark.parametrize("name", ["cpp", "reference"])
GRID = (6, 7)
# Channels, rows, columns: as the grid, smaller in one axis, in both by no whole number, one pixel, odd channels.
SIZES = [(5, 6, 7), (70, 6, 3), (3, 4, 5), (17, 2, 7), (1, 3, 3), (33, 1, 1)]


def random_maps(sizes, batch=2, dtype=torch.float32):
    return [torch.randn(batch, *size).to(dtype) for size in sizes]


def example_pyramid(batch=2, dtype=torch.float32):
    return pyramid(random_maps(SIZES, batch, dtype), GRID)


def resized(maps, grid):
    """The hypercolumns (B, D, H, W) as the libraries at large build them."""
    return torch.cat([F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in maps], 1)


def results(name, tensors, points, upstreams):
    """Everything that the operator gives, with gradients, from maps ("map0", ...), weight, bias and columns."""
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    maps = [leaf for n, leaf in leaves.items() if n.startswith("map")]
    with backend.force(name):
        of = Pyramid(tuple(maps), GRID)
        outputs = {
            "gather": gather(of, points),
            "linear": linear(of, leaves["weight"], leaves["bias"]),
            "inner": inner(of, leaves["columns"]),
        }
        found = {"norm": norm(of), **outputs}
        for n, output in outputs.items():
            wanted = (
                maps + {"gather": [], "linear": [leaves["weight"], leaves["bias"]], "inner": [leaves["columns"]]}[n]
            )
            grads = torch.autograd.grad(output, wanted, upstreams[n].to(output.dtype))
            found |= {f"{n}'s gradient {i}": grad for i, grad in enumerate(grads)}
    return found


def operands(batch, dtype, points=4, outputs=19, count=3):
    tensors = {f"map{i}": m for i, m in enumerate(random_maps(SIZES, batch, dtype))}
    channels, locations = sum(size[0] for size in SIZES), GRID[0] * GRID[1]
    shapes = {"weight": (outputs, channels), "bias": (outputs,), "columns": (batch, count, channels)}
    tensors |= {n: torch.randn(shape).to(dtype) for n, shape in shapes.items()}
    upstreams = {
        "gather": torch.randn(batch, points, channels).to(dtype),
        "linear": torch.randn(batch, outputs, *GRID).to(dtype),
        "inner": torch.randn(batch, count, *GRID),
    }
    return tensors, torch.randint(-1, locations, (batch, points)), upstreams


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_within_budget(batch, dtype):
    tensors, *others = operands(batch, dtype, points=50)
    kernel, plain = (results(name, tensors, *others) for name in ("cpp", "reference"))
    exact = results("reference", {n: t.double() for n, t in tensors.items()}, *others)
    moved = [results("reference", nudged(tensors), *others) for _ in range(2)]
    for name, value in kernel.items():
        assert_within_budget(value, plain[name], exact[name], *(m[name] for m in moved), name=name)


def test_float64_is_the_dense_construction():
    tensors, *others = operands(2, torch.float64, points=50)
    kernel, plain = (results(name, tensors, *others) for name in ("cpp", "reference"))
    for name, value in kernel.items():
        torch.testing.assert_close(value, plain[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


size = st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))


@settings(max_examples=120)
@given(
    sizes=st.lists(size, min_size=1, max_size=4),
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.integers(0, 3),
    points=st.integers(0, 9),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
)
@example([(3, 9, 2), (3, 2, 9)], (4, 4), 1, 3, torch.float32)  # each larger than the grid along one axis only
@example([(0, 2, 2), (3, 1, 1)], (1, 1), 1, 1, torch.float32)
def test_pyramid_of_any_maps_has_their_hypercolumns(sizes, grid, batch, points, dtype):
    maps = random_maps(sizes, batch, dtype)
    of = pyramid(maps, grid)
    assert of.batch == batch
    assert of.channels == sum(size[0] for size in sizes)
    assert of.locations == grid[0] * grid[1]
    assert (of.dtype, of.device) == (dtype, maps[0].device)
    assert all(m.permute(0, 2, 3, 1).is_contiguous() for m in of.maps)
    chosen = torch.randint(-1, of.locations, (batch, points))
    weight = torch.randn(3, of.channels).to(dtype)
    with backend.force("cpp"):
        found = gather(of, chosen), norm(of), linear(of, weight)
    if batch == 0 or of.channels == 0:
        return
    columns = resized([m.double() for m in maps if m.shape[1]], grid)
    kept = resized([m.double() for m in of.maps if m.shape[1]], grid)  # after the one rounding of what was reduced
    eps = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).eps
    torch.testing.assert_close(kept, columns, rtol=0, atol=8 * eps * float(columns.abs().max()))
    expected = kept.flatten(2).gather(2, chosen.clamp(min=0)[:, None].expand(-1, of.channels, -1)).transpose(1, 2)
    expected = expected * (chosen >= 0)[..., None]
    exact = [expected, kept.norm(dim=1), F.conv2d(kept, weight.double()[..., None, None])]
    for ours, right in zip(found, exact, strict=True):
        scale = float(right.abs().max()) if right.numel() else 0.0
        torch.testing.assert_close(ours.double(), right, rtol=0, atol=4 * eps * max(scale, 1.0))


def test_maps_of_one_size_are_merged_only_beside_each_other():
    maps = random_maps([(2, 4, 4), (3, 4, 4), (1, 2, 2), (4, 4, 4), (2, 9, 8), (1, 1, 12)])
    of = pyramid(maps, (4, 5), dtype=torch.float64)
    assert [tuple(m.shape[1:]) for m in of.maps] == [(5, 4, 4), (1, 2, 2), (4, 4, 4), (2, 4, 5), (1, 1, 5)]
    torch.testing.assert_close(dense(of), resized([m.double() for m in maps], (4, 5)), rtol=0, atol=1e-5)


@BACKENDS
def test_pyramid_is_differentiable(name):
    maps = [m.requires_grad_() for m in random_maps([(2, 5, 3), (3, 3, 4), (1, 7, 9), (2, 2, 2)], 2, torch.float64)]
    with backend.force(name):
        assert torch.autograd.gradcheck(lambda *m: dense(pyramid(m, (3, 4))), maps)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dense_of_maps_in_both_layouts(dtype):
    """As the grid, larger in both axes or one, smaller; more pixels and channels than a square of the transposition."""
    sizes, grid = [(35, 5, 40), (40, 11, 90), (3, 5, 90), (17, 9, 40), (1, 1, 1), (20, 4, 21)], (5, 40)
    maps = random_maps(sizes, 2, dtype)
    mixed = [m.contiguous(memory_format=torch.channels_last) if i % 2 else m for i, m in enumerate(maps)]
    other = [m if i % 2 else m.contiguous(memory_format=torch.channels_last) for i, m in enumerate(maps)]
    exact = resized([m.double() for m in maps], grid)
    plain = resized(maps, grid)
    for given_maps in (mixed, other):
        of_reduced = torch.ops.moe_kernels.hypercolumn_merge(given_maps, grid)
        assert of_reduced.permute(0, 2, 3, 1).is_contiguous()
        if dtype == torch.float64:
            torch.testing.assert_close(of_reduced, exact, rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget(of_reduced, plain, exact)


@BACKENDS
def test_gather_by_hand(name):
    of = Pyramid((torch.tensor([[[[0.0, 4.0], [8.0, 12.0]]]]), torch.tensor([[[[7.0]]]])), (4, 4))
    with backend.force(name):
        found = gather(of, torch.tensor([[0, 1, 5, 15, -1, 5]]))
    assert found.tolist() == [[[0, 7], [1, 7], [3, 7], [12, 7], [0, 0], [3, 7]]]


@BACKENDS
def test_a_pixel_without_weight_is_not_read(name):
    of = Pyramid((torch.tensor([[[[1.0, torch.inf, 2.0]]]]),), (1, 3))
    with backend.force(name):
        assert gather(of, torch.tensor([[0, 2]])).flatten().tolist() == [1, 2]
        assert norm(of).flatten().tolist() == [1, torch.inf, 2]


def test_a_reduction_reads_no_pixel_without_weight():
    planes = torch.tensor([1.0, 3.0])[:, None, None] * torch.tensor([torch.inf, 2.0, torch.inf])
    for m in (planes[None], planes[None].contiguous(memory_format=torch.channels_last)):
        assert torch.ops.moe_kernels.hypercolumn_merge([m], (1, 1)).flatten().tolist() == [2, 6]


def test_gradcheck_of_the_kernels():
    maps = [m.requires_grad_() for m in random_maps([(2, 3, 4), (3, 2, 2), (1, 1, 1)], 2, torch.float64)]
    points = torch.tensor([[0, 5, 5, -1], [11, 3, 0, 7]])
    weight, bias = torch.randn(2, 6).double().requires_grad_(), torch.randn(2).double().requires_grad_()
    columns = torch.randn(2, 2, 6).double().requires_grad_()
    with backend.force("cpp"):
        assert torch.autograd.gradcheck(lambda *m: gather(Pyramid(m, (3, 4)), points), maps)
        assert torch.autograd.gradcheck(lambda w, b, *m: linear(Pyramid(m, (3, 4)), w, b), (weight, bias, *maps))
        assert torch.autograd.gradcheck(lambda c, *m: inner(Pyramid(m, (3, 4)), c), (columns, *maps))


def test_bitwise_equal_for_any_number_of_threads():
    sizes = [(70, 24, 28), (130, 12, 14), (33, 5, 7)]
    maps = [m.requires_grad_() for m in random_maps(sizes)]
    points, weight = torch.randint(-1, 24 * 28, (2, 300)), torch.randn(50, 233)
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            of = Pyramid(tuple(maps), (24, 28))
            columns = gather(of, points)
            products = [m[:, :30] for m in maps]
            total = torch.ops.moe_kernels.hypercolumn_resize_sum(products, [24, 28], weight[:30, 0])
            grads = torch.autograd.grad(columns.square().sum() + total.square().sum(), maps)
            merged = torch.ops.moe_kernels.hypercolumn_merge(maps, [13, 28])
            found.append([columns, total, norm(of), merged, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_maps_in_any_memory_format(dtype):
    of = example_pyramid(dtype=dtype)
    plain = of._replace(maps=tuple(m.contiguous() for m in of.maps))
    points = torch.randint(-1, of.locations, (2, 9))
    weight = torch.randn(5, of.channels).to(dtype)
    with backend.force("cpp"):
        assert torch.equal(gather(of, points), gather(plain, points))
        assert torch.equal(norm(of), norm(plain))
        torch.testing.assert_close(linear(of, weight), linear(plain, weight))
        assert torch.equal(gather(of, points.t().contiguous().t()), gather(of, points))
        assert linear(of, weight).is_contiguous(memory_format=torch.channels_last)


def test_linear_and_inner_have_their_dtypes():
    of = example_pyramid(dtype=torch.float16)
    weight, columns = torch.randn(4, of.channels), torch.randn(2, 3, of.channels)
    for name in ("cpp", "reference"):
        with backend.force(name):
            found = linear(of, weight), inner(of, columns.half())
            assert [t.dtype for t in found] == [torch.float32] * 2
            assert linear(of, weight.half()).dtype == torch.float16
            exact = F.conv2d(resized([m.float() for m in of.maps], GRID), weight[..., None, None])
            tolerance = 1e-4 if name == "cpp" else 3e-2  # the reference rounds what it resizes to float16
            torch.testing.assert_close(found[0], exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sizes", [[(5, 6, 7)], [(3, 2, 2)], [(5, 6, 7), (3, 2, 2), (4, 6, 7)]], ids=str)
def test_linear_without_gradients(sizes, biased):
    """Where it may add in place: neither the maps nor the bias change."""
    of = Pyramid(tuple(random_maps(sizes)), GRID)
    weight, bias = torch.randn(9, of.channels), torch.randn(9) if biased else None
    kept = [m.clone() for m in of.maps]
    with backend.force("cpp"), torch.no_grad():
        found = [linear(of, weight, bias) for _ in range(2)]
    assert torch.equal(*found)
    assert all(torch.equal(m, before) for m, before in zip(of.maps, kept, strict=True))
    torch.testing.assert_close(found[0], F.conv2d(resized(of.maps, GRID), weight[..., None, None], bias))


def test_pyramid_of_several_dtypes_is_stored_in_one():
    maps = [torch.randn(1, 2, 9, 9), torch.randn(1, 3, 6, 7).half(), torch.randn(1, 1, 2, 2).bfloat16()]
    of = pyramid(maps, GRID, dtype=torch.float16)
    assert [m.dtype for m in of.maps] == [torch.float16] * 2
    assert torch.equal(of.maps[0][:, 2:], maps[1])
    expected = resized([m.float() for m in maps], GRID)
    torch.testing.assert_close(dense(of).float(), expected, rtol=0, atol=4e-3)


def test_autocast_changes_nothing():
    of, weight = example_pyramid(), torch.randn(4, 129)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(of, weight), linear(of, weight))
        found = linear(of, weight), inner(of, weight.expand(2, -1, -1))
    assert torch.equal(found[0], linear(of, weight))
    assert torch.equal(found[1], inner(of, weight.expand(2, -1, -1)))


def test_opcheck_of_every_operator():
    operators = torch.ops.moe_kernels
    of = example_pyramid()
    maps = [m.requires_grad_() for m in of.maps]
    products = [m[:, :1].contiguous().detach().requires_grad_() for m in maps]
    points, bias = torch.randint(-1, of.locations, (2, 5)), torch.randn(1, requires_grad=True)
    torch.library.opcheck(operators.hypercolumn_merge.default, (maps, (3, 8)))
    torch.library.opcheck(operators.hypercolumn_gather.default, (maps, points, GRID))
    torch.library.opcheck(operators.hypercolumn_resize_sum.default, (products, GRID, bias))
    torch.library.opcheck(operators.hypercolumn_resize_sum.default, (products, GRID, None))
    sizes = [size for m in maps for size in m.shape[1:]]
    torch.library.opcheck(
        operators.hypercolumn_gather_backward.default, (torch.randn(2, 5, of.channels), points, sizes, GRID)
    )
    sizes = [size for m in maps for size in m.shape[2:]]
    torch.library.opcheck(operators.hypercolumn_resize_sum_backward.default, (torch.randn(2, 3, *GRID), sizes))
    torch.library.opcheck(operators.hypercolumn_norm.default, ([m.detach() for m in maps], GRID))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic):
    maps = [m.requires_grad_() for m in random_maps([(2, 9, 9), (3, 4, 5), (3, 4, 5), (1, 1, 1)])]
    points = torch.randint(-1, 42, (2, 5))
    weight, bias = torch.randn(4, 9, requires_grad=True), torch.randn(4, requires_grad=True)

    def head(maps, weight, bias):
        of = pyramid(maps, GRID)
        hidden = linear(of, weight, bias).relu()
        return hidden, gather(of, points), inner(of, gather(of, points)), norm(of)

    def run(function):
        found = function(maps, weight, bias)
        return [*found, *torch.autograd.grad(sum(t.square().sum() for t in found[:3]), (*maps, weight, bias))]

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for eager, traced in zip(run(head), run(compiled), strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_refused():
    of = Pyramid(tuple(m.requires_grad_() for m in random_maps(SIZES)), GRID)
    points = torch.zeros(2, 1, dtype=torch.int64)
    with backend.force("cpp"):
        for output in (gather(of, points), inner(of, torch.randn(2, 1, of.channels))):
            (grad,) = torch.autograd.grad(output.square().sum(), of.maps[0], create_graph=True)
            with pytest.raises(RuntimeError, match="has no second derivative"):
                torch.autograd.grad(grad.sum(), of.maps[0])


@BACKENDS
@pytest.mark.parametrize("point", [-2, 42])
def test_a_location_out_of_range_is_an_error(name, point):
    of = example_pyramid()
    with (
        backend.force(name),
        pytest.raises(RuntimeError, match=rf"points: expected locations in \[-1, 42\), got {point}"),
    ):
        gather(of, torch.tensor([[0], [point]]))


@pytest.mark.parametrize(
    ("maps", "grid", "options", "error", "message"),
    [
        ([], (2, 2), {}, ValueError, "maps: expected at least one map, got none"),
        ([torch.zeros(1, 2, 2)], (2, 2), {}, ValueError, r"maps\[0\]: expected shape \(B, C, h, w\), got \(1, 2, 2\)"),
        (
            [torch.zeros(1, 2, 2, 2), torch.zeros(2, 2, 2, 2)],
            (2, 2),
            {},
            ValueError,
            r"maps\[1\]: expected shape \(1, C, h, w\), got \(2, 2, 2, 2\)",
        ),
        ([torch.zeros(1, 2, 2, 2).long()], (2, 2), {}, TypeError, r"maps\[0\]: expected a floating-point tensor"),
        (
            [torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1).half()],
            (2, 2),
            {},
            TypeError,
            r"maps\[1\]: expected torch.float32 as the first map, got torch.float16",
        ),
        (
            [torch.zeros(1, 1, 0, 1)],
            (2, 2),
            {},
            ValueError,
            r"maps\[0\]: expected at least one pixel, got \(1, 1, 0, 1\)",
        ),
        (
            [torch.zeros(1, 1, 1, 1)],
            (2, 0),
            {},
            ValueError,
            r"grid: expected two integers \(H, W\) of at least 1, got \(2, 0\)",
        ),
        (
            [torch.zeros(1, 1, 1, 1)],
            (2,),
            {},
            ValueError,
            r"grid: expected two integers \(H, W\) of at least 1, got \(2,\)",
        ),
        (
            [torch.zeros(1, 1, 1, 1)],
            (2, 2),
            {"dtype": torch.int64},
            TypeError,
            "dtype: expected a floating-point dtype",
        ),
        ([3], (2, 2), {}, TypeError, r"maps\[0\]: expected a tensor, got int"),
        (torch.zeros(1, 2, 3, 3), (2, 2), {}, TypeError, "maps: expected a sequence of tensors, got a tensor of shape"),
        ([torch.zeros(1, 2, 3, 3)], (2.0, 2), {}, ValueError, r"grid: expected two integers \(H, W\) of at least 1"),
    ],
)
def test_bad_maps_are_named(maps, grid, options, error, message):
    with pytest.raises(error, match=message):
        pyramid(maps, grid, **options)


def test_bad_arguments_are_named():
    of = example_pyramid()
    large = of._replace(grid=(5, 7))
    with pytest.raises(ValueError, match=r"maps\[0\]: expected 1 to 5 rows and 1 to 7 columns, got \(6, 7\); pyramid"):
        norm(large)
    with pytest.raises(ValueError, match=r"points: expected shape \(2, P\), got \(3, 1\)"):
        gather(of, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"points: expected an int64 tensor, got torch.int32"):
        gather(of, torch.zeros(2, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"weight: expected shape \(O, 129\), got \(4, 128\)"):
        linear(of, torch.zeros(4, 128))
    with pytest.raises(ValueError, match=r"bias: expected shape \(4,\), got \(5,\)"):
        linear(of, torch.zeros(4, 129), torch.zeros(5))
    with pytest.raises(TypeError, match=r"bias: expected torch.float32 as the weight, got torch.float64"):
        linear(of, torch.zeros(4, 129), torch.zeros(4).double())
    with pytest.raises(ValueError, match=r"columns: expected shape \(2, M, 129\), got \(1, 3, 129\)"):
        inner(of, torch.zeros(1, 3, 129))


def test_the_operators_themselves_refuse_what_does_not_belong_together():
    operators, maps = torch.ops.moe_kernels, random_maps([(2, 3, 3), (3, 2, 2)])
    points = torch.zeros(2, 1, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="maps: expected 2 channels as of the first, got 3"):
        operators.hypercolumn_resize_sum(maps, [3, 3], None)
    with pytest.raises(RuntimeError, match="bias: expected 2 elements"):
        operators.hypercolumn_resize_sum(maps[:1], [3, 3], torch.zeros(3))
    with pytest.raises(RuntimeError, match="maps: expected one dtype"):
        operators.hypercolumn_norm([maps[0], maps[1].half()], [3, 3])
    with pytest.raises(RuntimeError, match=r"maps: expected shape \(2, C, h, w\) and one dtype"):
        operators.hypercolumn_merge([maps[0], maps[1][:1]], [3, 3])
    with pytest.raises(RuntimeError, match="sizes: expected 4 channels, got 2"):
        operators.hypercolumn_gather_backward(torch.zeros(2, 1, 4), points, [2, 3, 3], [3, 3])
    with pytest.raises(RuntimeError, match="grid: expected a height and a width"):
        operators.hypercolumn_norm(maps, [3])


def test_sizes_that_are_none_of_maps_are_refused():
    operators = torch.ops.moe_kernels
    with pytest.raises(RuntimeError, match="sizes: expected heights and widths of at least 1"):
        operators.hypercolumn_resize_sum_backward(torch.randn(1, 2, 3, 3), [0, 1])
    for sizes in ([3, 0, 2], [-1, 2, 2, 4, 2, 2]):
        with pytest.raises(RuntimeError, match="sizes: expected those of maps"):
            operators.hypercolumn_gather_backward(torch.randn(1, 2, 3), torch.zeros(1, 2).long(), sizes, [2, 2])
    with pytest.raises(RuntimeError, match="at most 2147483647 locations"):
        operators.hypercolumn_norm([torch.randn(1, 1, 2, 2)], [2**40, 2**40])
