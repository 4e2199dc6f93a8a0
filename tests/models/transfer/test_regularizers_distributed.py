"""Two gloo ranks with a share of the batches each weigh DELTA's channels as one rank with all of them."""

import torch
from ranks import on_ranks
from torch import nn

from moe_kernels.models.transfer.regularizers import DELTA

WORLD = 2


def estimate(rank, world):
    """The weights of rank ``rank``, of four batches that ``world`` ranks share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.Linear(5, 3)).double()
    batches = list(zip(torch.randn(4, 6, 2, 5, 5, dtype=torch.float64), torch.randint(3, (4, 6)), strict=True))
    regularizer = DELTA(0.1, layers=["0", "2"], head="4").bind(model)
    regularizer.estimate(model, batches[rank::world], nn.functional.cross_entropy)
    return regularizer.state_dict()["weights"]


def worker(rank, folder):
    torch.save(estimate(rank, WORLD), f"{folder}/rank{rank}.pt")


def test_ranks_agree_on_the_weights(tmp_path):
    on_ranks(WORLD, tmp_path, (worker, ()))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for name, expected in estimate(0, 1).items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], expected)
        assert not torch.allclose(estimate(0, WORLD)[name], expected)  # a share alone gives others
