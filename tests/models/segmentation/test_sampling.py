from dataclasses import replace

import numpy as np
import pytest
import torch

from moe_kernels.models.segmentation.configuration import SegmentConfig
from moe_kernels.models.segmentation.sampling import label_map, normalized, sample
from moe_kernels.ops import hypercolumn
from moe_kernels.ops.diverse_sampling import diverse_sampling

GRID = (6, 8)
CONFIG = SegmentConfig(samples=5)
HIGHEST = torch.tensor([2.0, 3.0])


@pytest.fixture
def pyramid():
    return hypercolumn.pyramid([torch.rand(1, 4, 6, 8), torch.rand(1, 3, 3, 4)], GRID)


@pytest.fixture
def scores():
    return torch.randn(2, 48)


def by_class(samples, classes=2):
    return [samples.locations[samples.labels == label].tolist() for label in range(classes + 1)]


def test_diverse_is_the_operator(pyramid, scores):
    for penalty in ("sum", "max"):
        found = sample(scores, pyramid, replace(CONFIG, penalty=penalty), highest=HIGHEST)
        expected = diverse_sampling(scores[None], pyramid, 5, penalty=penalty)
        background, *classes = by_class(found)
        assert background == expected.background[0].tolist()
        assert classes == expected.indices[0].tolist()


def test_top_takes_the_highest_and_the_lowest(pyramid, scores):
    background, *classes = by_class(sample(scores, pyramid, replace(CONFIG, strategy="top"), highest=HIGHEST))
    for row, chosen in zip(scores, classes, strict=True):
        assert chosen == row.topk(5).indices.tolist()
    highest = scores.amax(0)
    highest[[place for chosen in classes for place in chosen]] = torch.inf
    assert background == highest.topk(5, largest=False).indices.tolist()


@pytest.mark.parametrize("penalty", ["sum", "max"])
def test_spatial_is_the_greedy_rule_on_distances(pyramid, scores, penalty):
    config = replace(CONFIG, strategy="spatial", penalty=penalty, spatial_sigma=0.3)
    background, *classes = by_class(sample(scores, pyramid, config, highest=HIGHEST))
    places = np.stack(np.divmod(np.arange(48), 8), 1).astype(np.float64)
    similar = np.exp(-((places[:, None] - places[None]) ** 2).sum(2) / (2 * (0.3 * 6) ** 2))
    reduce = np.sum if penalty == "sum" else np.max

    def greedy(values, known, taken):
        picks = []
        for _ in range(5):
            penalties = reduce(similar[known + picks], 0) if known + picks else 0
            merit = values - penalties
            merit[taken + picks] = -np.inf
            picks.append(int(merit.argmax()))
        return picks

    expected = [greedy(row.double().numpy(), [], []) for row in scores]
    assert classes == expected
    everything = expected[0] + expected[1]
    assert background == greedy(np.zeros(48), everything, everything)


def test_dense_draws_from_the_label_map(pyramid, scores):
    config = replace(CONFIG, strategy="dense", threshold=0.3)
    found = sample(scores, pyramid, config, highest=HIGHEST, seed=1)
    assert len(found.locations.unique()) == 15
    best, row = (scores / HIGHEST[:, None]).max(0)
    expected = torch.where(best >= 0.3, row + 1, 0)[found.locations]
    assert found.labels.tolist() == expected.tolist()
    assert set(expected.tolist()) == {0, 1, 2}
    again, other = (sample(scores, pyramid, config, highest=HIGHEST, seed=seed) for seed in (1, 2))
    assert again.locations.tolist() == found.locations.tolist() != other.locations.tolist()


@pytest.mark.parametrize("strategy", ["diverse", "top", "spatial", "dense"])
def test_few_locations_and_no_class(strategy):
    small = hypercolumn.pyramid([torch.rand(1, 4, 2, 3)], (2, 3))
    config = replace(CONFIG, strategy=strategy, samples=4)
    found = sample(torch.randn(1, 6), small, config, highest=HIGHEST[:1])
    assert sorted(found.locations.tolist()) == list(range(6))
    if strategy != "dense":
        assert found.labels.tolist() == [1, 1, 1, 1, 0, 0]
    none = sample(torch.empty(0, 6), small, config, highest=HIGHEST[:0])
    assert none.labels.tolist() == [0] * 4
    assert len(none.locations.unique()) == 4


def test_normalized_scores_are_highest_at_one_on_average():
    maps = torch.tensor([[[4.0, 1.0], [2.0, 0.0]], [[-3.0, -5.0], [-1.0, -9.0]]])  # class, image, location
    found = normalized(maps, maps.amax(2).mean(1))
    torch.testing.assert_close(found.amax(2).mean(1), torch.ones(2))
    # scaled where that keeps the order, moved where it would not
    torch.testing.assert_close(found[0], maps[0] / 3)
    torch.testing.assert_close(found[1], maps[1] + 3)


def test_label_map():
    scores = torch.tensor([[0.1, 0.5, 0.2], [0.2, 0.1, 0.1]])
    assert label_map(scores, 0.2).tolist() == [2, 1, 1]
    assert label_map(scores, 0.3).tolist() == [0, 1, 0]
    assert label_map(scores[:0], 0.3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "best"}, "strategy must be one of diverse, top, spatial, dense, got 'best'"),
        ({"loss": "local"}, "loss must be one of global, pixel, got 'local'"),
        ({"penalty": "mean"}, "penalty must be one of sum, max, got 'mean'"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"localization_rates": ()}, "localization_rates must be one finite rate an epoch"),
        ({"localization_rates": (1e-3, float("nan"))}, "localization_rates must be one finite rate an epoch"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite and not negative, got inf"),
        ({"spatial_sigma": 0.0}, "spatial_sigma must be finite and positive, got 0.0"),
    ],
)
def test_a_configuration_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        SegmentConfig(**change)
