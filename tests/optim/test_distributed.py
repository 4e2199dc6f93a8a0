"""Two gloo ranks with different shards of data or parameters against one process with all of it."""

import copy

import pytest
import torch
from ranks import on_ranks
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from moe_kernels.optim import AnchoredAdamW, AnchoredSGD, project_gradients_

STEPS = 4
OPTIMIZERS = {
    "sgd": lambda params, **kwargs: AnchoredSGD(
        params, lr=0.1, momentum=0.9, weight_decay=0.01, coefficient=0.3, **kwargs
    ),
    "adamw": lambda params, **kwargs: AnchoredAdamW(params, lr=0.01, coefficient=0.3, **kwargs),
}


def model_and_data(width=7):
    torch.manual_seed(2)  # of which every case below has steps in conflict
    # 5 and 7 do not divide by two: shards of unequal size, and a bias of 1 of which one rank holds nothing.
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 5), nn.Tanh(), nn.Linear(5, 1))
    source = {
        name: tensor.detach() + 0.3 * torch.randn(tensor.shape)
        for name, tensor in model.named_parameters()
        if not name.startswith("4.")  # a new head
    }
    return model, source, torch.randn(STEPS, 8, 6), torch.randn(STEPS, 8, 1)


def train(model, optimizer, x, y, steps=range(STEPS)):
    for step in steps:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[step]), y[step]).backward()
        optimizer.step()


def assert_close(found, expected, tolerance):
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


def ddp(rank, folder, kind, scope):
    model, source, x, y = model_and_data()
    optimizer = OPTIMIZERS[kind](model.named_parameters(), anchor=source, scope=scope)
    half = slice(rank * 4, rank * 4 + 4)
    train(DistributedDataParallel(model), optimizer, x[:, half], y[:, half])
    torch.save([model.state_dict(), optimizer.facts()._asdict()], f"{folder}/{kind}-{scope}-{rank}.pt")


def test_ddp_is_one_process(tmp_path):
    cases = [(kind, scope) for kind in OPTIMIZERS for scope in ("global", "tensor")]
    on_ranks(2, tmp_path, *((ddp, case) for case in cases))
    for kind, scope in cases:
        model, source, x, y = model_and_data()
        optimizer = OPTIMIZERS[kind](model.named_parameters(), anchor=source, scope=scope)
        train(model, optimizer, x, y)
        ranks = [torch.load(tmp_path / f"{kind}-{scope}-{rank}.pt", weights_only=True) for rank in range(2)]
        for name, tensor in ranks[0][0].items():
            assert torch.equal(tensor, ranks[1][0][name]), (kind, scope, name)
        assert_close(ranks[0][0], model.state_dict(), 1e-6)
        assert torch.equal(ranks[0][1]["conflicts"], optimizer.facts().conflicts)
        assert optimizer.facts().conflicts.sum() > 0


def fsdp(rank, folder, kind, scope, shape=(2,)):
    """FSDP2; over a mesh of (2, 2) as HSDP, or with tensor parallelism in the inner dimension."""
    model, source, x, y = model_and_data(8 if shape == "tp" else 7)
    plain = copy.deepcopy(model)
    names = ("data", "model") if shape == "tp" else ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", (2, 2) if shape == "tp" else shape, mesh_dim_names=names)
    shards = mesh.size()
    if shape == "tp":
        parallelize_module(model, mesh["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        mesh, shards, rank = mesh["data"], 2, rank // 2
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    parameters = dict(model.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
    optimizer = OPTIMIZERS[kind](parameters.items(), anchor=source, scope=scope)
    for name, anchor in source.items():
        kept = optimizer.state[parameters[name]]["anchor"]
        assert kept.placements == parameters[name].placements
        assert torch.equal(kept.full_tensor(), anchor), name
    part = slice(rank * (8 // shards), (rank + 1) * (8 // shards))
    train(model, optimizer, x[:, part], y[:, part])

    expected = OPTIMIZERS[kind](plain.named_parameters(), anchor=source, scope=scope)
    train(plain, expected, x, y)
    found = {name: parameter.full_tensor() for name, parameter in parameters.items()}
    assert_close(found, dict(plain.named_parameters()), 1e-5)
    assert expected.facts().conflicts.sum() > 0
    for name, fact in optimizer.facts()._asdict().items():
        torch.testing.assert_close(fact, getattr(expected.facts(), name), rtol=1e-4, atol=1e-2, equal_nan=True)


def test_fsdp_is_one_process(tmp_path):
    on_ranks(2, tmp_path, *((fsdp, (kind, scope)) for kind in OPTIMIZERS for scope in ("global", "tensor", "group")))


def scaled(rank, folder, wrap):
    """A gradient scaler and two micro-batches a step; on one rank alone the third step's gradient is not finite."""
    model, source, x, y = model_and_data()
    plain = copy.deepcopy(model)
    model = DistributedDataParallel(model) if wrap == "ddp" else fully_shard(model)
    prefix = "module." if wrap == "ddp" else ""

    def train_scaled(model, anchor, rows, broken):
        optimizer = OPTIMIZERS["sgd"](model.named_parameters(), anchor=anchor)
        scaler = torch.amp.GradScaler("cpu", 1024.0)
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in rows.chunk(2):
                loss = nn.functional.mse_loss(model(x[step, part]), y[step, part]) / 2
                scaler.scale(loss * torch.inf if broken and step == 2 else loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return optimizer

    anchor = {prefix + name: tensor for name, tensor in source.items()}
    optimizer = train_scaled(model, anchor, torch.arange(rank, 8, 2), broken=rank == 1)
    expected = train_scaled(plain, source, torch.arange(8), broken=True)
    found = {
        name.removeprefix(prefix): weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
        for name, weight in model.named_parameters()
    }
    assert_close(found, dict(plain.named_parameters()), 1e-5)
    for facts in (optimizer.facts(), expected.facts()):
        assert facts.skipped.tolist() == [1]
        assert facts.steps.tolist() == [STEPS - 1]


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_a_scaler_and_accumulation(tmp_path, wrap):
    on_ranks(2, tmp_path, (scaled, (wrap,)))


def test_meshes_of_two_dimensions(tmp_path):
    on_ranks(4, tmp_path, (fsdp, ("sgd", "tensor", (2, 2))), (fsdp, ("sgd", "global", "tp")))


def checkpoint(rank, folder, kind, full):
    def sharded(weights=None):
        model, source, x, y = model_and_data()
        if weights is not None:
            model.load_state_dict(weights)
        fully_shard(model)
        return model, OPTIMIZERS[kind](model.named_parameters(), anchor=source), x, y

    options = StateDictOptions(full_state_dict=full)
    model, optimizer, x, y = sharded()
    before = get_optimizer_state_dict(model, optimizer)["state"]["0.weight"]
    assert set(before) > {"anchor"}, "what a checkpoint is read into lacks a state"
    train(model, optimizer, x, y, range(2))
    weights = {name: parameter.full_tensor().detach().clone() for name, parameter in model.named_parameters()}
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    train(model, optimizer, x, y, range(2, 4))

    other, loaded, x, y = sharded(weights)
    set_optimizer_state_dict(other, loaded, state, options=options)
    train(other, loaded, x, y, range(2, 4))
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter.to_local(), same.to_local()), name

    state["state"]["0.weight"]["anchor"] = state["state"]["0.weight"]["anchor"] + 1
    with pytest.raises(ValueError, match=r"state_dict: .* got others for 0\.weight$"):
        set_optimizer_state_dict(other, loaded, state, options=options)


def test_distributed_checkpoint(tmp_path):
    on_ranks(2, tmp_path, *((checkpoint, (kind, full)) for kind in OPTIMIZERS for full in (False, True)))


def tensor_parallel(rank, folder, scope):
    """A sharded and a replicated parameter on one mesh, and one that is no DTensor, all with given gradients."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    placements = [[Shard(0)], [Replicate()], None, [Shard(1)]]
    full, grads, anchors = ([torch.randn(4, 6) for _ in placements] for _ in range(3))

    def sharded(tensors):
        return [
            tensor.clone() if placement is None else distribute_tensor(tensor.clone(), mesh, placement)
            for tensor, placement in zip(tensors, placements, strict=True)
        ]

    def step(params, grads, anchors):
        params = [nn.Parameter(param) for param in params]
        optimizer = AnchoredSGD(params, lr=0.1, anchor=anchors, coefficient=0.3, scope=scope)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        facts = optimizer.facts()
        projection = project_gradients_(params, anchors, coefficient=0.3, scope="global")
        return [*params, *(param.grad for param in params)], facts, projection

    expected, facts, projection = step([tensor.clone() for tensor in full], [g.clone() for g in grads], anchors)
    found, found_facts, found_projection = step(sharded(full), sharded(grads), sharded(anchors))
    assert facts.conflicts.sum() > 0
    for tensor, other in zip(expected, found, strict=True):
        other = other.full_tensor() if isinstance(other, DTensor) else other
        assert (tensor - other).norm() <= 1e-6 * tensor.norm()
    for name in ("conflicts", "cosine", "scale"):
        torch.testing.assert_close(getattr(found_facts, name), getattr(facts, name), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(getattr(found_projection, name), getattr(projection, name), rtol=1e-6, atol=1e-9)


def uneven(rank, folder):
    """A rank whose gradients are missing takes part in the reduction all the same; a gradient may be sharded
    another way than its parameter."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight, grad, anchor = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 6)
    expected = nn.Parameter(weight.clone())
    expected.grad = grad.clone()
    AnchoredSGD([expected], lr=0.1, anchor=[anchor], coefficient=0.3).step()

    parameter = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    parameter.grad = distribute_tensor(grad, mesh, [Shard(1)])
    AnchoredSGD([parameter], lr=0.1, anchor=[anchor], coefficient=0.3).step()
    torch.testing.assert_close(parameter.full_tensor(), expected.detach())

    parameter = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    if rank == 0:
        parameter.grad = distribute_tensor(grad, mesh, [Shard(0)], src_data_rank=None)
    AnchoredSGD([parameter], lr=0.1, anchor=[anchor], coefficient=0.3).step()
    rows = slice(0, 2) if rank == 0 else slice(2, 4)
    assert torch.equal(parameter.to_local(), weight[rows]) == (rank == 1)

    elsewhere = distribute_tensor(anchor, init_device_mesh("cpu", (1, 2)), [Shard(0), Shard(0)])
    with pytest.raises(ValueError, match=r"anchor: expected a DTensor on .* for parameter 0"):
        AnchoredSGD([parameter], anchor=[elsewhere], coefficient=0.3)


def test_meshes(tmp_path):
    on_ranks(2, tmp_path, (tensor_parallel, ("global",)), (tensor_parallel, ("tensor",)), (uneven, ()))
