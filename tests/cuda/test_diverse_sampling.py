"""The CUDA kernel of diverse_sampling and farthest_points, against the float64 reference: on a GPU where there is one,
and on the CPU, where every block and thread of ``csrc/cuda/diverse_sampling.h`` takes its turn.
"""

import ctypes
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_kernels import backend
from moe_kernels.ops import diverse_sampling as ops
from moe_kernels.reference import diverse_sampling as reference
from moe_kernels.reference.hypercolumn import dense

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUM, MAX = range(2)
COSINE, EUCLIDEAN = range(2)
SLOTS, PIECES = 6144, 48  # of csrc/cuda/diverse_sampling.h


@pytest.fixture(scope="session")
def emulator(emulation):
    loaded = emulation("diverse_sampling")
    loaded.emulate.restype = loaded.blocks_of.restype = ctypes.c_int64
    loaded.key_is_the_order.restype = ctypes.c_bool
    return loaded


class Emulated:
    """The operators with the arguments of their schemas, on CPU tensors."""

    device = "cpu"

    def __init__(self, library, groups=1, blocks=2, *, backwards=False, at_once=False):
        self.library, self.sizes, self.order, self.barriers = library, (groups, blocks), (backwards, at_once), None

    def diverse_sampling(self, scores, present, maps, grid, normalized, num_samples, penalty, background):
        indices = torch.full((*scores.shape[:2], num_samples), -7)
        others = torch.full((scores.shape[0], num_samples if background else 0), -7)
        tensors = (scores.contiguous(), present, None, indices, others)
        self._emulate(maps, grid, scores.shape[1], num_samples, (penalty, COSINE), (normalized, background), tensors)
        return indices, others

    def farthest_points(self, maps, grid, num_points, start, metric):
        others = torch.full((start.shape[0], num_points), -7)
        self._emulate(maps, grid, 0, num_points, (MAX, metric), (False, True), (None, None, start, None, others))
        return others

    def _emulate(self, maps, grid, classes, samples, choices, flags, tensors) -> None:
        size = 16 // maps[0].element_size()
        pixels = [m.permute(0, 2, 3, 1) for m in maps]
        pixels = [F.pad(m, (0, -m.shape[3] % size)).contiguous() for m in pixels]
        shapes = [number for m in pixels for number in (m.data_ptr(), *m.shape[1:])]
        sizes = (len(pixels[0]), classes, samples, *grid, *self.sizes)
        self.barriers = self.library.emulate(
            (ctypes.c_int64 * len(shapes))(*shapes),
            ctypes.c_int64(len(pixels)),
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_int64 * 3)(DTYPES.index(maps[0].dtype), *choices),
            (ctypes.c_bool * 4)(*flags, *self.order),
            *(ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors),
        )


class Gpu:
    """The same on the GPU."""

    device = "cuda"

    @staticmethod
    def diverse_sampling(*arguments):
        return tuple(t.cpu() for t in ops._SAMPLING(*_on_gpu(arguments)))

    @staticmethod
    def farthest_points(*arguments):
        return ops._FARTHEST(*_on_gpu(arguments)).cpu()


def _on_gpu(arguments):
    return [
        a.cuda() if isinstance(a, torch.Tensor) else [m.cuda() for m in a] if isinstance(a, list) else a
        for a in arguments
    ]


ON_GPU = pytest.mark.skipif(bool(backend.refusal("cuda", "cuda")), reason=backend.refusal("cuda", "cuda") or "runs")


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=ON_GPU)])
def machine(request):
    return Gpu if request.param == "cuda" else Emulated(request.getfixturevalue("emulator"))


def wide(maps):
    return [m.double() for m in maps]


def check_sampling(machine, scores, present, maps, grid, normalized, samples, penalty, background=True):
    found = machine.diverse_sampling(scores, present, maps, grid, normalized, samples, penalty, background)
    expected = reference.diverse_sampling(
        scores.double(), present, wide(maps), grid, normalized, samples, penalty, background
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    return found


def check_farthest(machine, maps, grid, points, start, metric):
    found = machine.farthest_points(maps, grid, points, start, metric)
    torch.testing.assert_close(
        found, reference.farthest_points(wide(maps), grid, points, start, metric), rtol=0, atol=0
    )
    return found


def features(batch, grid, channels, *, dtype=torch.float32, seed=0, signed=False):
    """A map of the grid's size and coarser and coarser ones."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for level, number in enumerate(channels):
        size = [max(1, length - level * length // 3) for length in grid]
        m = torch.randn(batch, number, *size, generator=generator)
        maps.append((m if signed else m.relu() + 0.01).to(dtype))
    return maps


@settings(max_examples=60)
@given(data=st.data())
def test_whole_numbers_give_the_same_picks(emulator, data):
    """Nothing is rounded, so ties are ties: shapes, classes, groups and blocks as they come."""
    draw = data.draw
    grid = draw(st.sampled_from([(1, 1), (4, 4), (8, 4), (5, 1), (1, 7), (16, 8)]))
    batch, classes, samples = draw(st.integers(1, 3)), draw(st.integers(0, 6)), draw(st.integers(1, 9))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 999))
    halvings = draw(st.lists(st.integers(0, 2), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for n in halvings:
        size = [length >> n if length % (1 << n) == 0 else length for length in grid]
        channels = draw(st.sampled_from([1, 2, 7, 8, 33, 130]))
        maps.append(torch.randint(-1, 2, (batch, channels, *size), generator=generator).to(dtype) * 4)
    locations = math.prod(grid)
    scores = torch.randint(-3, 4, (batch, classes, locations), generator=generator).float() * 16
    present = torch.rand(batch, classes, generator=generator) < 0.7 if draw(st.booleans()) else None
    machine = Emulated(emulator, draw(st.integers(1, 3)), draw(st.integers(1, 3)), backwards=draw(st.booleans()))
    penalty = draw(st.sampled_from([SUM, MAX]))
    check_sampling(machine, scores, present, maps, grid, True, samples, penalty, draw(st.booleans()))
    check_farthest(machine, maps, grid, samples, torch.randint(locations, (batch,), generator=generator), EUCLIDEAN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("penalty", [SUM, MAX])
@pytest.mark.parametrize(("grid", "channels"), [((9, 12), (24, 70, 33)), ((7, 5), (300,)), ((6, 6), (3, 5, 8, 1))])
def test_norms_of_resized_maps(machine, dtype, penalty, grid, channels):
    maps = features(2, grid, channels, dtype=dtype, signed=True)
    scores = torch.randn(2, 3, math.prod(grid))
    present = torch.tensor([[True, False, True], [True, True, True]])
    check_sampling(machine, scores, present, maps, grid, False, 8, penalty)
    for metric in (COSINE, EUCLIDEAN):
        check_farthest(machine, maps, grid, 8, torch.tensor([3, 0]), metric)


def test_more_classes_than_a_pass_takes(machine):
    maps = features(1, (8, 8), (40, 16))
    check_sampling(machine, torch.randn(1, 11, 64), None, maps, (8, 8), False, 6, SUM)
    check_sampling(machine, torch.randn(1, 11, 64), torch.arange(11)[None] % 2 == 1, maps, (8, 8), False, 6, MAX)


def test_more_locations_than_threads(machine):
    maps = features(1, (40, 60), (8, 16))
    check_sampling(machine, torch.randn(1, 2, 2400), None, maps, (40, 60), False, 5, SUM)


@pytest.mark.parametrize("channels", [(SLOTS + 1,), (5000, 5000), (3 * SLOTS + 5, 9)])
def test_more_channels_than_shared_memory_has_room_for(machine, channels):
    maps = features(1, (3, 4), channels, signed=True)
    check_sampling(machine, torch.randn(1, 2, 12), None, maps, (3, 4), False, 6, SUM)
    check_farthest(machine, maps, (3, 4), 6, torch.tensor([5]), EUCLIDEAN)


def test_as_many_maps_as_a_launch_takes(machine, emulator):
    maps = [torch.randn(1, 2, 3, 3) for _ in range(PIECES)]
    check_sampling(machine, torch.randn(1, 1, 9), None, maps, (3, 3), False, 4, SUM)
    maps.append(torch.randn(1, 2, 3, 3))
    if machine is Gpu:
        with pytest.raises(RuntimeError, match=f"maps: expected at most {PIECES}, .* got {PIECES + 1}"):
            machine.farthest_points(maps, (3, 3), 4, torch.tensor([0]), COSINE)
    else:
        machine.farthest_points(maps, (3, 3), 4, torch.tensor([0]), COSINE)
        assert machine.barriers == -1


def test_locations_run_out(machine):
    maps = features(2, (2, 3), (8,))
    indices, others = check_sampling(machine, torch.randn(2, 2, 6), None, maps, (2, 3), False, 9, SUM)
    assert (indices[..., 6:] == -1).all()
    assert (indices[..., :6].sort().values == torch.arange(6)).all()
    assert (others == -1).all()
    assert (check_farthest(machine, maps, (2, 3), 9, torch.tensor([4, 5]), COSINE)[:, 6:] == -1).all()


def test_background_avoids_every_class(machine):
    maps = features(1, (4, 5), (16,))
    indices, others = check_sampling(machine, torch.randn(1, 3, 20), None, maps, (4, 5), False, 5, MAX)
    assert not set(indices.flatten().tolist()) & set(others[others >= 0].tolist())


@pytest.mark.parametrize("penalty", [SUM, MAX])
def test_images_without_classes(machine, penalty):
    maps = features(2, (4, 5), (16, 8))
    present = torch.tensor([[False, False], [False, True]])
    indices, others = check_sampling(machine, torch.randn(2, 2, 20), present, maps, (4, 5), False, 4, penalty)
    assert others[0, 0] == 0
    assert (indices[0] == -1).all()
    check_sampling(machine, torch.randn(2, 0, 20), None, maps, (4, 5), False, 4, penalty)


def test_start_that_is_no_location_gives_none(machine):
    maps = features(3, (3, 3), (8,))
    found = machine.farthest_points(maps, (3, 3), 4, torch.tensor([-1, 9, 8]), EUCLIDEAN)
    assert (found[:2] == -1).all()
    assert found[2, 0] == 8


@pytest.mark.parametrize("penalty", [SUM, MAX])
def test_scores_that_are_no_numbers(machine, penalty):
    maps = features(1, (3, 4), (16,))
    scores = torch.randn(1, 4, 12)
    scores[0, 0, [5, 3]] = torch.nan
    scores[0, 1, [5, 3]] = torch.inf
    scores[0, 2, :] = -torch.inf
    scores[0, 3, :] = torch.tensor([-0.0, 0.0] * 6)
    indices, _ = check_sampling(machine, scores, None, maps, (3, 4), False, 12, penalty)
    assert indices[0, 0, :2].tolist() == [3, 5]
    assert indices[0, 3, 0] == 0


def test_column_of_zeros_and_column_that_is_no_number(machine):
    maps = features(1, (3, 4), (16,), signed=True)
    maps[0][:, :, 1, 2] = 0
    maps[0][:, 3, 2, 2] = torch.nan
    for penalty in (SUM, MAX):
        scores = torch.arange(24.0).view(1, 2, 12)
        indices, _ = check_sampling(machine, scores, None, maps, (3, 4), False, 4, penalty)
        assert indices[0, :, :2].tolist() == [[11, 10]] * 2
    check_farthest(machine, maps, (3, 4), 5, torch.tensor([0]), COSINE)


def rounding_decides(batch=5):
    """Columns that differ by rounding only, on several maps: whoever sums in another order picks other locations."""
    maps = [torch.ones(batch, c, *size) + 1e-6 * torch.randn(batch, c, *size) for c, *size in SIZES]
    return torch.zeros(batch, 3, 72), None, maps, (8, 9), False, 10, SUM, True


SIZES = ((300, 8, 9), (77, 5, 4), (128, 2, 3))


def test_groups_and_blocks_change_no_pick(emulator):
    case = rounding_decides()
    expected = Emulated(emulator, 1, 1).diverse_sampling(*case)
    for groups, blocks, backwards in ((1, 2, False), (2, 5, True), (5, 1, True), (3, 3, False)):
        found = Emulated(emulator, groups, blocks, backwards=backwards).diverse_sampling(*case)
        assert all(map(torch.equal, found, expected))
    with pytest.raises(AssertionError):  # or the case would show nothing
        check_sampling(Emulated(emulator), *case[:-1])


@pytest.mark.parametrize(("groups", "blocks"), [(1, 2), (2, 1)])
def test_warps_blocks_and_groups_at_the_same_time(emulator, groups, blocks):
    """``csrc/cuda/diverse_sampling_kernel.h``, each thread of which is one of the CPU's, sums and waits as in turn."""
    maps = [torch.ones(2, c, *size) + 1e-6 * torch.randn(2, c, *size) for c, *size in ((300, 4, 5), (40, 2, 3))]
    case = (torch.randn(2, 3, 20) * 1e-6, None, maps, (4, 5), False, 3, SUM, True)
    at_once, in_turn = Emulated(emulator, groups, blocks, at_once=True), Emulated(emulator, groups, blocks)
    assert all(map(torch.equal, at_once.diverse_sampling(*case), in_turn.diverse_sampling(*case)))
    assert at_once.barriers * groups == in_turn.barriers


def test_an_image_without_a_step_waits_for_its_group(emulator):
    """Or a block would prepare the next image while another still reads how many classes this one has."""
    scores, columns = torch.randn(8, 2, 6), features(8, (6, 1), (8,))
    present = torch.ones(8, 2, dtype=torch.bool)
    present[::2] = False
    case = (scores, present, columns, (6, 1), True, 2, SUM, False)
    at_once, in_turn = Emulated(emulator, 1, 2, at_once=True), Emulated(emulator, 1, 2)
    assert all(map(torch.equal, at_once.diverse_sampling(*case), in_turn.diverse_sampling(*case)))
    assert at_once.barriers == in_turn.barriers


def test_batch_mates_change_no_pick(machine):
    scores, present, maps, *rest = rounding_decides()
    together = machine.diverse_sampling(scores, present, maps, *rest)
    for b in range(len(scores)):
        alone = machine.diverse_sampling(scores[b : b + 1], present, [m[b : b + 1] for m in maps], *rest)
        assert all(torch.equal(one[0], all_[b]) for one, all_ in zip(alone, together, strict=True))


def test_step_waits_twice(emulator):
    machine = Emulated(emulator)
    machine.diverse_sampling(torch.randn(1, 3, 20), None, features(1, (4, 5), (16,)), (4, 5), False, 6, SUM, True)
    # Norms, preparation, the first samples; then two for every step, of which the background begins with one.
    assert machine.barriers == 2 + 1 + 2 * 6 + 1 + 2 * 5


@given(a=st.floats(width=32), i=st.integers(0, 2**31 - 1), b=st.floats(width=32), j=st.integers(0, 2**31 - 1))
def test_key_is_the_order(emulator, a, i, b, j):
    assume(i != j)
    one, other, first, second = ctypes.c_float(a), ctypes.c_float(b), ctypes.c_int64(i), ctypes.c_int64(j)
    assert emulator.key_is_the_order(one, first, other, second)
    assert emulator.key_is_the_order(one, first, one, second)


A100 = (40 << 20, 4.9e12, 2.0e12, 108)
H200 = (50 << 20, 8.4e12, 4.8e12, 132)
VGG = 7_094_272  # values of the paper's pyramid


def launch(emulator, gpu, images, size):
    groups = ctypes.c_int64()
    cache, cache_rate, memory_rate, resident = gpu
    arguments = (ctypes.c_int64(cache), ctypes.c_double(cache_rate), ctypes.c_double(memory_rate))
    numbers = map(ctypes.c_int64, (resident, images, size))
    blocks = emulator.blocks_of(*arguments, *numbers, ctypes.byref(groups))
    return groups.value, blocks


@pytest.mark.parametrize(
    ("gpu", "images", "size", "expected"),
    [
        (A100, 100, 2 * VGG, (2, 54)),  # what the cache holds
        (A100, 1, 2 * VGG, (1, 108)),
        (H200, 64, 4 * VGG, (16, 8)),  # memory is nearly as fast: more images wait less
        (H200, 17, 4 * VGG, (9, 14)),  # two rounds of nearly as many
        (H200, 4, 1 << 16, (4, 2)),  # no more blocks than there is to do
        (H200, 4, 0, (4, 1)),
        (H200, 1000, 3 << 15, (125, 1)),
        (H200, 2, 1 << 36, (2, 66)),
    ],
)
def test_images_at_once(emulator, gpu, images, size, expected):
    assert launch(emulator, gpu, images, size) == expected


@given(images=st.integers(1, 10**5), size=st.integers(0, 2**36), resident=st.integers(1, 300), rate=st.floats(0, 1e13))
def test_every_block_of_a_launch_is_resident(emulator, images, size, resident, rate):
    groups, blocks = launch(emulator, (40 << 20, 5e12, rate, resident), images, size)
    assert 1 <= groups <= images
    assert groups <= groups * blocks <= resident


@ON_GPU
def test_cuda_graph_replays_and_waits_for_nothing():
    maps = [m.cuda() for m in features(3, (9, 12), (24, 70, 33))]
    scores, start = torch.randn(3, 4, 108, device="cuda"), torch.tensor([3, 0, 5], device="cuda")

    def step():
        picks = ops._SAMPLING(scores, None, maps, (9, 12), False, 8, SUM, True)
        return *picks, ops._FARTHEST(maps, (9, 12), 8, start, COSINE)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    scores.copy_(torch.randn_like(scores))
    start.fill_(7)
    graph.replay()
    assert all(map(torch.equal, found, step()))


@ON_GPU
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_size_of_the_paper(dtype):
    """Every pick is the best, or as good as it but for rounding."""
    grid, sizes = (64, 84), ((896, 64, 84), (1280, 32, 42), (1536, 16, 21), (512, 8, 10))
    maps = [torch.randn(5, c, h, w, device="cuda").relu().to(dtype) for c, h, w in sizes]
    scores = torch.randn(5, 3, 5376, device="cuda") * 3
    arguments = (scores, None, maps, grid, False, 20, SUM, True)
    indices, others = ops._SAMPLING(*arguments)
    columns = F.normalize(dense(wide(maps), grid).flatten(2).transpose(1, 2), dim=2)
    for b in range(5):
        tracks = [(score.double(), [], picks) for score, picks in zip(scores[b], indices[b], strict=True)]
        tracks.append((torch.zeros(5376, device="cuda"), indices[b].flatten().tolist(), others[b]))
        for score, before, picks in tracks:
            for pick in picks.tolist():
                values = score - columns[b] @ columns[b, before].sum(0)
                values[before] = -torch.inf
                assert values[pick] >= values.max() - 1e-4
                before.append(pick)
    assert all(map(torch.equal, ops._SAMPLING(*arguments), (indices, others)))


@ON_GPU
def test_memory_as_it_comes():
    """Maps that are not channels-last, at addresses for no vector, scores and starts with gaps."""
    plain = features(2, (5, 6), (13, 8))
    around = torch.zeros(2, 5, 6, 13 + 3, device="cuda")[..., 3:]
    around.copy_(plain[0].permute(0, 2, 3, 1))
    maps = [around.permute(0, 3, 1, 2), plain[1].cuda().contiguous()]
    scores = torch.randn(2, 30, 3)
    found = ops._SAMPLING(scores.cuda().transpose(1, 2), None, maps, (5, 6), False, 6, MAX, True)
    expected = reference.diverse_sampling(
        scores.double().transpose(1, 2), None, wide(plain), (5, 6), False, 6, MAX, True
    )
    assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


@ON_GPU
def test_nothing_to_do():
    maps = [m.cuda() for m in features(2, (3, 3), (8,))]
    indices, others = ops._SAMPLING(torch.randn(2, 3, 9, device="cuda"), None, maps, (3, 3), False, 0, SUM, True)
    assert indices.shape == (2, 3, 0)
    assert others.shape == (2, 0)
    none = [m[:0] for m in maps]
    assert ops._FARTHEST(none, (3, 3), 4, torch.zeros(0, dtype=torch.int64, device="cuda"), COSINE).shape == (0, 4)


@ON_GPU
def test_what_the_kernel_cannot_take_is_named():
    maps = [m.cuda() for m in features(1, (3, 3), (8,), dtype=torch.float64)]
    with pytest.raises(RuntimeError, match="maps: expected float32, bfloat16 or float16 on a GPU, got Double"):
        ops._FARTHEST(maps, (3, 3), 4, torch.zeros(1, dtype=torch.int64, device="cuda"), COSINE)
