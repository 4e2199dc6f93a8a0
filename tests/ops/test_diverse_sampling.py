import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_kernels import backend
from moe_kernels.ops.diverse_sampling import METRICS, PENALTIES, diverse_sampling, farthest_points
from moe_kernels.ops.hypercolumn import Pyramid, dense, pyramid

pytestmark = pytest.mark.usefixtures("poisoned")
BACKENDS = ("cpp", "reference")
ON_BOTH = pytest.mark.parametrize("name", BACKENDS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def random_pyramid(batch=1, grid=(6, 9), channels=(20, 17, 40), *, signed=False, dtype=torch.float32, seed=0):
    """Smooth features of levels that are coarser and coarser, post-ReLU unless signed."""
    generator = torch.Generator().manual_seed(seed)
    maps = []
    for level, number in enumerate(channels):
        size = [max(1, length >> level) for length in grid]
        x = torch.randn(batch, number, *size, generator=generator) + torch.randn(
            batch, number, 1, 1, generator=generator
        )
        maps.append((x if signed else x.relu()).to(dtype))
    return pyramid(maps, grid)


def unit_columns(features):
    """(B, N, D) float64: the hypercolumns, of length 1."""
    columns = dense(features._replace(maps=tuple(m.double() for m in features.maps))).flatten(2).transpose(1, 2)
    return F.normalize(columns, dim=2, eps=1e-300)


def first_best(values, closed):
    """The index of the largest of ``values``, NaN first, the lowest of several; −1 where all are closed."""
    best = -1
    for i, value in enumerate(values):
        if closed[i] or (best >= 0 and np.isnan(values[best])):
            continue
        if best < 0 or np.isnan(value) or value > values[best]:
            best = i
    return best


class Greedy:
    """The definition in float64, one image: follows given picks and judges each by the values it was chosen from."""

    def __init__(self, columns, penalty, tolerance):
        self.gram = np.asarray(columns @ columns.T)
        self.penalty, self.tolerance = penalty, tolerance

    def follow(self, scores, picks, penalizing, closed):
        """Raise unless every pick is the best, or as good as it to the tolerance."""
        penalizing, closed = list(penalizing), list(closed)
        for k, pick in enumerate(picks):
            penalty = np.zeros(len(scores))
            if penalizing:
                similarity = self.gram[:, penalizing]
                penalty = similarity.sum(1) if self.penalty == "sum" else similarity.max(1)
            taken = np.isin(np.arange(len(scores)), closed)
            values = scores - penalty
            best = first_best(values, taken)
            if pick != best:
                assert best >= 0, f"pick {k} is {pick}, and none is left"
                assert 0 <= pick < len(scores), f"pick {k} is {pick}, and {best} is left"
                assert not taken[pick], f"pick {k}, {pick}, is taken"
                room = self.tolerance * (1 + abs(values[best]) + np.abs(penalty).max())
                assert values[best] - values[pick] <= room, (
                    f"pick {k}: {pick} {values[pick]}, best {best} {values[best]}"
                )
            if pick >= 0:
                penalizing.append(pick)
                closed.append(pick)
        return penalizing


def assert_greedy(samples, scores, columns, penalty, present=None, tolerance=1e-5):
    indices, background = samples
    for b in range(len(scores)):
        greedy = Greedy(columns[b], penalty, tolerance)
        seen = []
        for c, picks in enumerate(indices[b].tolist()):
            if present is not None and not present[b, c]:
                assert set(picks) <= {-1}
                continue
            seen += greedy.follow(scores[b, c].double().numpy(), picks, [], [])
        if background is not None:
            greedy.follow(np.zeros(scores.shape[2]), background[b].tolist(), seen, seen)


@settings(max_examples=250)
@given(data=st.data())
def test_picks_are_those_of_a_brute_force_greedy_in_float64(data):
    seed = data.draw(st.integers(0, 10**6), label="seed")
    batch, classes = data.draw(st.integers(0, 3), label="batch"), data.draw(st.integers(0, 3), label="classes")
    grid = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)), label="grid")
    channels = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), label="channels")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    penalty = data.draw(st.sampled_from(PENALTIES), label="penalty")
    samples = data.draw(st.integers(0, 12), label="samples")
    background = data.draw(st.booleans(), label="background")
    features = random_pyramid(batch, grid, channels, signed=data.draw(st.booleans()), dtype=dtype, seed=seed)
    columns = unit_columns(features)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, classes, features.locations, generator=generator) * data.draw(
        st.sampled_from((0, 1, 9))
    )
    present = torch.rand(batch, classes, generator=generator) < 0.7 if data.draw(st.booleans()) else None
    options = {"present": present, "penalty": penalty, "background": background}
    for name in BACKENDS:
        with backend.force(name):
            of_pyramid = diverse_sampling(scores, features, samples, **options)
            given_columns = columns.to(dtype)
            of_columns = diverse_sampling(scores, given_columns, samples, **options)
        assert of_pyramid.indices.shape == (batch, classes, samples)
        assert_greedy(of_pyramid, scores, columns, penalty, present)
        assert_greedy(of_columns, scores, given_columns.double(), penalty, present)


@settings(max_examples=100)
@given(data=st.data())
def test_farthest_points_are_those_of_a_brute_force_greedy_in_float64(data):
    seed, batch = data.draw(st.integers(0, 10**6), label="seed"), data.draw(st.integers(0, 3), label="batch")
    grid = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)), label="grid")
    metric, dtype = data.draw(st.sampled_from(METRICS)), data.draw(st.sampled_from(DTYPES))
    signed, points = data.draw(st.booleans(), label="signed"), data.draw(st.integers(0, 12), label="points")
    features = random_pyramid(batch, grid, (20, 17), signed=signed, dtype=dtype, seed=seed)
    exact = features._replace(maps=tuple(m.double() for m in features.maps))
    columns = dense(exact).flatten(2).transpose(1, 2)
    start = torch.randint(features.locations, (batch,), generator=torch.Generator().manual_seed(seed))
    for name in BACKENDS:
        with backend.force(name):
            found = farthest_points(features, points, start=start, metric=metric)
            of_columns = farthest_points(columns.to(dtype), points, start=start, metric=metric)
        for picks, right in ((found, columns), (of_columns, columns.to(dtype).double())):
            assert picks.shape == (batch, points)
            for b in range(batch):
                unit = F.normalize(right[b], dim=1, eps=1e-300) if metric == "cosine" else right[b]
                distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist").square().numpy()
                row, nearest, taken = picks[b].tolist(), np.full(len(unit), np.inf), np.zeros(len(unit), bool)
                for k, pick in enumerate(row):
                    best = int(start[b]) if k == 0 else first_best(nearest, taken)
                    if pick != best:
                        assert k > 0
                        assert best >= 0
                        assert pick >= 0
                        assert not taken[pick]
                        scale = 1 if metric == "cosine" else unit.square().sum(1).max().item()
                        assert nearest[best] - nearest[pick] <= 1e-5 * scale
                    if pick >= 0:
                        nearest, taken[pick] = np.minimum(nearest, distance[pick]), True


@pytest.fixture
def problem():
    """Larger than what one thread does alone; three images, one of which lacks a class."""
    features = random_pyramid(3, (18, 22), (500, 300, 100), seed=5)
    present = torch.tensor([[True, True], [False, True], [True, True]])
    return torch.randn(3, 2, features.locations), features, present


def on_threads(number, run):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(number)
        return run()
    finally:
        torch.set_num_threads(threads)


def all_picks(scores, features, present):
    """Of both penalties and both metrics."""
    found = []
    for penalty in PENALTIES:
        found += diverse_sampling(scores, features, 9, present=present, penalty=penalty)
    return found + [farthest_points(features, 9, start=7, metric=metric) for metric in METRICS]


@pytest.mark.parametrize("signed", [False, True])
def test_any_number_of_threads_gives_the_same(problem, signed):
    scores, features, present = problem
    if signed:
        features = random_pyramid(3, features.grid, (500, 300, 100), signed=True)
    with backend.force("cpp"):
        results = [on_threads(number, lambda: all_picks(scores, features, present)) for number in (1, 2, 3, 5)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_images_do_not_depend_on_their_batch_mates(problem):
    scores, features, present = problem
    with backend.force("cpp"):
        together = all_picks(scores, features, present)
        for b in range(3):
            alone = features._replace(maps=tuple(m[b : b + 1] for m in features.maps))
            for mine, all_ in zip(all_picks(scores[b : b + 1], alone, present[b : b + 1]), together, strict=True):
                assert torch.equal(mine[0], all_[b])


def test_classes_do_not_depend_on_each_other(problem):
    scores, features, _ = problem
    with backend.force("cpp"):
        for penalty in PENALTIES:
            both = diverse_sampling(scores, features, 9, penalty=penalty).indices
            alone = diverse_sampling(scores[:, 1:], features, 9, penalty=penalty, background=False)
            assert torch.equal(both[:, 1:], alone.indices)
            assert alone.background is None


@ON_BOTH
@pytest.mark.parametrize("penalty", PENALTIES)
def test_duplicates_and_ties_go_to_the_lowest_index(name, penalty):
    columns = F.normalize(torch.rand(1, 5, 30), dim=2).repeat(1, 3, 1)  # 0 to 4, three times
    scores = torch.tensor([0.1, 0.5, 0.2, 0.5, 0.3]).repeat(3).view(1, 1, 15)
    with backend.force(name):
        found = diverse_sampling(scores, columns, 15, penalty=penalty)
        flat = diverse_sampling(torch.zeros(1, 2, 15), torch.zeros(1, 15, 30), 15, penalty=penalty)
    picks = found.indices[0, 0].tolist()
    assert sorted(picks) == list(range(15))
    assert picks[0] == 1
    for i in range(5):
        assert picks.index(i) < picks.index(i + 5) < picks.index(i + 10)
    assert found.background.tolist() == [[-1] * 15]
    assert flat.indices.tolist() == [[list(range(15))] * 2]


@ON_BOTH
def test_more_samples_than_locations_end_in_minus_one(name):
    features = random_pyramid(2, (2, 3), (4, 3))
    with backend.force(name):
        samples = diverse_sampling(torch.randn(2, 1, 6), features, 8)
        points = farthest_points(features, 8, start=3)
    for row in (*samples.indices[:, 0].tolist(), *points.tolist()):
        assert sorted(row[:6]) == list(range(6))
        assert row[6:] == [-1, -1]
    assert (samples.background == -1).all()


@ON_BOTH
@pytest.mark.parametrize("penalty", PENALTIES)
def test_no_present_class_starts_the_background_at_0(name, penalty):
    features = random_pyramid(2)
    scores = torch.randn(2, 2, features.locations)
    with backend.force(name):
        absent = diverse_sampling(scores, features, 3, present=torch.zeros(2, 2, dtype=torch.bool), penalty=penalty)
        none = diverse_sampling(scores[:, :0], features, 3, penalty=penalty)
    assert (absent.indices == -1).all()
    assert none.indices.shape == (2, 0, 3)
    assert torch.equal(absent.background, none.background)
    assert (none.background[:, 0] == 0).all()
    assert_greedy(none, scores[:, :0], unit_columns(features), penalty)


@ON_BOTH
@pytest.mark.parametrize("penalty", PENALTIES)
def test_scores_that_are_not_finite_are_ordered_as_by_argmax(name, penalty):
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[[0.5, -inf, nan, inf, -inf, nan, 0.25, inf]]])
    columns = F.normalize(torch.rand(1, 8, 5), dim=2)
    columns[0, 6] = 0.01 * columns[0, 6]  # close to none
    with backend.force(name):
        picks = diverse_sampling(scores, columns, 8, penalty=penalty, background=False).indices[0, 0].tolist()
    assert picks[:4] == [2, 5, 3, 7]
    assert sorted(picks[4:6]) == [0, 6]
    assert picks[6:] == [1, 4]


@ON_BOTH
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite(name, penalty, value):
    columns = F.normalize(torch.rand(1, 40, 6), dim=2)
    columns[0, 17, 3] = value
    scores = torch.arange(40.0).view(1, 1, 40) / 40
    with backend.force(name):
        picks = diverse_sampling(scores, columns, 3, penalty=penalty, background=False).indices[0, 0].tolist()
        points = farthest_points(columns, 3).tolist()[0]
    if np.isnan(value):  # worth NaN as soon as anything penalizes, and then so are all
        assert picks == [39, 17, 0]
        assert points == [0, 17, 1]
    else:  # an infinite similarity is the worst there is
        assert 17 not in picks
        assert points[1] == 17  # inf / inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_give_the_same(dtype):
    features = random_pyramid(2, (7, 5), (9, 11), dtype=dtype)
    scores = torch.randn(2, 3, 35)
    transposed = scores.transpose(0, 2).contiguous().transpose(0, 2)
    contiguous = features._replace(maps=tuple(m.contiguous() for m in features.maps))
    columns = unit_columns(features).to(dtype)
    with backend.force("cpp"):
        for a, b in ((features, contiguous), (columns, columns.transpose(1, 2).contiguous().transpose(1, 2))):
            for mine, other in zip(diverse_sampling(scores, a, 4), diverse_sampling(transposed, b, 4), strict=True):
                assert torch.equal(mine, other)


def test_looking_at_few_locations_gives_the_bits_of_looking_at_all():
    """One negative feature that no product notices makes the kernel look at all."""
    features = random_pyramid(1, (24, 30), (60, 80), seed=3)
    scores = 3 * torch.randn(1, 3, features.locations)
    extended = [torch.cat([m, torch.zeros_like(m[:, :1])], 1) for m in features.maps]
    other = [m.clone() for m in extended]
    other[0][:, -1] = -1e-30
    with backend.force("cpp"):
        few = diverse_sampling(scores, Pyramid(tuple(extended), features.grid), 20)
        all_ = diverse_sampling(scores, Pyramid(tuple(other), features.grid), 20)
    assert torch.equal(few.indices, all_.indices)
    assert torch.equal(few.background, all_.background)


def test_opcheck_and_compile():
    features = random_pyramid(2, (5, 6), (8, 7))
    scores, maps = torch.randn(2, 3, 30), list(features.maps)
    operators = torch.ops.moe_kernels
    present = torch.tensor([[True, False, True], [True, True, True]])
    for penalty, background in ((0, True), (1, False)):
        arguments = (scores, present if background else None, maps, features.grid, False, 4, penalty, background)
        torch.library.opcheck(operators.diverse_sampling.default, arguments)
    torch.library.opcheck(operators.farthest_points.default, (maps, features.grid, 4, torch.tensor([3, 0]), 1))

    def both(scores, features):
        return (*diverse_sampling(scores, features, 4, present=present), farthest_points(features, 4, start=2))

    for name in BACKENDS:
        with backend.force(name):
            compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
            assert all(
                torch.equal(a, b) for a, b in zip(compiled(scores, features), both(scores, features), strict=True)
            )


def test_gradients_are_not_asked_for():
    columns = torch.rand(1, 6, 4, requires_grad=True)
    samples = diverse_sampling(torch.rand(1, 1, 6, requires_grad=True), columns, 2)
    assert not samples.indices.requires_grad


COLUMNS, SCORES = torch.rand(2, 6, 4), torch.rand(2, 3, 6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((SCORES, COLUMNS[0], 2), {}, ValueError, r"columns: expected shape \(B, N, D\), got \(6, 4\)"),
        ((SCORES, COLUMNS.long(), 2), {}, TypeError, "columns: expected a floating-point tensor, got torch.int64"),
        ((SCORES, COLUMNS[:, :0], 2), {}, ValueError, "columns: expected a location and a channel at least"),
        ((SCORES, COLUMNS[..., :0], 2), {}, ValueError, "columns: expected a location and a channel at least"),
        (
            (torch.zeros(1, 3, 4), pyramid([torch.zeros(1, 0, 1, 1)], (2, 2)), 2),
            {},
            ValueError,
            "columns: expected maps of at least one channel",
        ),
        ((SCORES, COLUMNS, 2.0), {}, TypeError, "num_samples: expected an integer, got 2.0"),
        ((SCORES, [COLUMNS], 2), {}, TypeError, "columns: expected a tensor, got list"),
        ((SCORES[:1], COLUMNS, 2), {}, ValueError, r"scores: expected shape \(2, C, 6\), got \(1, 3, 6\)"),
        ((SCORES[..., :5], COLUMNS, 2), {}, ValueError, r"scores: expected shape \(2, C, 6\), got \(2, 3, 5\)"),
        ((SCORES, COLUMNS, -1), {}, ValueError, "num_samples: expected at least 0, got -1"),
        ((SCORES, COLUMNS, 2), {"penalty": "mean"}, ValueError, "penalty: expected one of sum, max, got 'mean'"),
        (
            (SCORES, COLUMNS, 2),
            {"present": torch.ones(2, 3)},
            TypeError,
            "present: expected a bool tensor, got torch.fl",
        ),
        ((SCORES, COLUMNS, 2), {"present": SCORES[0] > 0}, ValueError, r"present: expected shape \(2, 3\) on cpu, got"),
    ],
)
def test_bad_arguments_of_sampling_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        diverse_sampling(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": 2.0}, TypeError, "k: expected an integer, got 2.0"),
        ({"k": -1}, ValueError, "k: expected at least 0, got -1"),
        ({"k": 2, "start": 6}, ValueError, r"start: expected a location in \[0, 6\), got 6"),
        ({"k": 2, "start": torch.tensor([1])}, ValueError, r"start: expected shape \(2,\), got \(1,\)"),
        ({"k": 2, "start": torch.rand(2)}, TypeError, "start: expected an int64 tensor"),
        ({"k": 2, "start": torch.tensor([1, 6])}, RuntimeError, r"start: expected locations in \[0, 6\), got 6"),
        ({"k": 2, "metric": "l1"}, ValueError, "metric: expected one of cosine, euclidean, got 'l1'"),
    ],
)
@ON_BOTH
def test_bad_arguments_of_farthest_points_are_named(name, options, error, message):
    with backend.force(name), pytest.raises(error, match=message):
        farthest_points(COLUMNS, **options)


@ON_BOTH
def test_euclidean_distances_of_whole_numbers_are_exact(name):
    # both are √5 from the first, in float32 too: the tie goes to the lower location
    columns = torch.tensor([[[2.0, 1.0], [3.0, 3.0], [0.0, 0.0]]])
    with backend.force(name):
        assert farthest_points(columns, 2, metric="euclidean").tolist() == [[0, 1]]


@ON_BOTH
def test_a_column_too_short_to_have_an_inverse_is_like_none(name):
    features = torch.rand(1, 3, 2, 2) + 0.5
    features[:, :, 0, 1] = 1e-40
    scores = torch.tensor([[[3.0, 1.0, 2.0, 0.0]]])
    with backend.force(name):
        found = diverse_sampling(scores, pyramid([features], (2, 2)), 4, background=False)
    assert found.indices.tolist() == [[[0, 2, 1, 3]]]
