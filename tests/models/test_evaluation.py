import pytest
import torch
from torch import nn
from toy_domains import dense_net, toy_domains

from moe_kernels.models import distributed
from moe_kernels.models.evaluation import accuracy, accuracy_and_loss


class Oracle(nn.Module):
    """Knows the labels of 30 toy images from their order, and is wrong where ``wrong`` says so."""

    def __init__(self, wrong: set[int]) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.images = torch.stack([toy_domains().evaluation[0][index][0] for index in range(30)])
        self.wrong, self.batches, self.modes = wrong, [], []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images))
        self.modes.append(self.training)
        indices = [(self.images == image).all(dim=(1, 2, 3)).nonzero().item() for image in images]
        guesses = torch.tensor([(index + (index in self.wrong)) % 3 for index in indices])
        return nn.functional.one_hot(guesses, 3).float()


def test_it_counts_the_right_ones():
    part = toy_domains().evaluation[0]
    assert accuracy(Oracle(set()), part) == 1
    assert accuracy(Oracle({0, 7, 29}), part) == 27 / 30
    assert accuracy(Oracle({0, 7, 29}), part, [0, 7, 8, 9]) == 2 / 4


def test_batches_and_modes():
    model = Oracle(set()).train()
    accuracy(model, toy_domains().evaluation[0], range(10), batch=4)
    assert model.batches == [4, 4, 2]
    assert model.modes == [False] * 3
    assert model.training
    accuracy(model.eval(), toy_domains().evaluation[0], range(10))
    assert not model.training


def test_the_loss_is_the_mean_cross_entropy_whatever_the_batch():
    part = toy_domains().evaluation[0]
    found = {batch: accuracy_and_loss(Oracle({0, 7, 29}), part, batch=batch) for batch in (7, 30)}
    right, wrong = (-torch.tensor([1.0, 0.0, 0.0]).log_softmax(0)[index].item() for index in (0, 1))
    for correct, loss in found.values():
        assert correct == 27 / 30
        assert loss == pytest.approx((27 * right + 3 * wrong) / 30, rel=1e-6)


def test_ranks_share_the_images(monkeypatch):
    model, shares = Oracle({1, 2}), []
    monkeypatch.setattr(distributed, "world", lambda: 2)

    def gather(sums: torch.Tensor) -> torch.Tensor:
        shares.append(sums[0].item())
        return sums

    monkeypatch.setattr(distributed, "sum_", gather)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        accuracy(model, toy_domains().evaluation[0], range(7))
    assert shares == [3, 2]
    assert sum(model.batches) == 7


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image, got none"):
        accuracy(dense_net(), toy_domains().evaluation[0], [])
