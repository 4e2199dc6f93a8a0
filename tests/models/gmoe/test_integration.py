"""A ViT of somebody else's, converted, in the hands of torch.compile, autocast, DDP and torch.export."""

import pytest
import torch
import torch.multiprocessing as mp
from ranks import on_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_kernels.models import gmoe
from moe_kernels.nn import auxiliary_loss

timm = pytest.importorskip("timm")
STEPS, SHARD, CLASSES = 3, 4, 5


def converted():
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": CLASSES}
    model = timm.models.vision_transformer.VisionTransformer(**options)
    return gmoe.convert(model, num_experts=4, top_k=2, renormalize=True, z_loss=0.1)


def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(STEPS, 2 * SHARD, 3, 32, 32, generator=generator)
    return images, torch.randint(CLASSES, (STEPS, 2 * SHARD), generator=generator)


def loss_of(forward, model, images, labels):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = forward(images)
    return nn.functional.cross_entropy(logits.float(), labels) + 0.01 * auxiliary_loss(model)


def train(forward, model, shards):
    """Steps on the mean of the losses of the shards that this process has."""
    images, labels = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for shard in shards:
            rows = slice(shard * SHARD, (shard + 1) * SHARD)
            (loss_of(forward, model, images[step, rows], labels[step, rows]) / len(shards)).backward()
        optimizer.step()
    return model.state_dict()


def alone(_, folder):
    torch.set_num_threads(1)
    model = converted()
    torch.save(train(torch.compile(model), model, (0, 1)), f"{folder}/alone.pt")


def worker(rank, folder):
    model = converted()
    torch.save(train(DistributedDataParallel(torch.compile(model)), model, (rank,)), f"{folder}/{rank}.pt")


def test_compile_autocast_and_ddp_on_two_ranks_give_what_one_rank_gives(tmp_path):
    mp.spawn(alone, args=(str(tmp_path),), nprocs=1)  # first, so that the ranks find its graphs in the compiler's cache
    on_ranks(2, tmp_path, (worker, ()))
    start = converted().state_dict()
    first, second, one = (torch.load(tmp_path / f"{who}.pt", weights_only=True) for who in (0, 1, "alone"))
    for name, tensor in one.items():
        assert torch.equal(first[name], second[name]), name
        assert (tensor - first[name]).norm() <= 1e-6 * tensor.norm(), name
    moved = [name for name in one if not torch.equal(one[name], start[name])]
    assert {"blocks.0.mlp.w1", "blocks.2.mlp.router.projection.weight", "head.weight"} <= set(moved)


def test_evaluation_model_exports():
    model = converted().eval()
    images = torch.randn(3, 3, 32, 32)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    other = torch.randn(7, 3, 32, 32)
    torch.testing.assert_close(program.module()(other), model(other))
    names = {str(node.target) for node in program.graph.nodes}
    assert "moe_kernels.expert_ffn.default" in names
