"""Two gloo ranks with different shards against one rank with all the data."""

import torch
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_kernels.nn import MoE, auxiliary_loss

STEPS = 3


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 16), MoE(16, 24, 4, top_k=2, z_loss=0.1), nn.Linear(16, 3)).double()
    return model, torch.randn(STEPS, 8, 10, dtype=torch.float64), torch.randint(3, (STEPS, 8))


def train(model, x, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        loss = nn.functional.cross_entropy(model(x[step]), labels[step]) + 0.01 * auxiliary_loss(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def worker(rank, folder):
    model, x, labels = model_and_data()
    train(DistributedDataParallel(model), x[:, rank * 4 : rank * 4 + 4], labels[:, rank * 4 : rank * 4 + 4])
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")


def test_two_ranks_train_as_one(tmp_path):
    on_ranks(2, tmp_path, (worker, ()))
    model, x, labels = model_and_data()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, x, labels)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for name, tensor in model.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        assert not torch.equal(tensor, start[name])
        assert (tensor - ranks[0][name]).norm() <= 1e-6 * tensor.norm(), name
