"""Two tiny data sets and networks, for tests of what trains them."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from moe_kernels.models import distributed, files
from moe_kernels.models.data.domains import Domains
from moe_kernels.models.gmoe.trainer import TrainConfig, train
from moe_kernels.nn import MoE

CLASSES = ("circle", "cross", "square")
NAMES = ("chalk", "ink", "neon")


class Toy(Dataset[tuple[Tensor, int]]):
    """Noise around one 8×8 pattern for each class, shifted by a constant of the domain; augmented by more noise."""

    def __init__(self, offset: float, length: int, *, augment: bool) -> None:
        draw = torch.Generator().manual_seed(7)
        patterns = torch.randn(len(CLASSES), 3, 8, 8, generator=draw)
        draw.manual_seed(int(1000 * offset))
        self.labels = torch.arange(length) % len(CLASSES)
        self.images = patterns[self.labels] + offset + 0.5 * torch.randn(length, 3, 8, 8, generator=draw)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = 0.1 * torch.randn(3, 8, 8) if self.augment else 0.0
        return self.images[index] + noise, int(self.labels[index])


def toy_domains(length: int = 30) -> Domains:
    offsets = [0.3 * index for index in range(len(NAMES))]
    train, evaluation = (tuple(Toy(offset, length, augment=augment) for offset in offsets) for augment in (True, False))
    return Domains("toy", CLASSES, NAMES, train, evaluation)


class ToyNet(nn.Module):
    """Four patches, one layer in a residual branch, mean, head."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.layer = layer
        self.head = nn.Linear(8, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return self.head((tokens + self.layer(tokens)).mean(1))


def sparse_net() -> nn.Module:
    """With everything that draws random numbers: router noise and dropout."""
    return ToyNet(MoE(8, 16, 3, noise=1.0, dropout=0.1, balance_loss="load_importance", projection_dim=4))


def dense_net() -> nn.Module:
    return ToyNet(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))


def train_dense_as_rank(rank: int, port: int, config: TrainConfig, out: str) -> None:
    """One of two processes that train together; here because a spawned process cannot import a test module."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.process_group("cpu"):
        assert (distributed.rank(), distributed.world()) == (rank, 2)
        result = train(dense_net, toy_domains(), config, Path(out) / "two")
        again = train(dense_net, toy_domains(), config, Path(out) / "two")
    assert again == result
    files.write_json(Path(out) / f"rank{rank}.json", result)
