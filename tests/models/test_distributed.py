import pytest
import torch

from moe_kernels.models import distributed


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_process_on_its_own_is_rank_0_of_1():
    assert (distributed.rank(), distributed.world()) == (0, 1)
    value = object()
    assert distributed.agree(value) is value
    tensor = torch.arange(3)
    assert distributed.sum_(tensor) is tensor
    assert tensor.tolist() == [0, 1, 2]
    distributed.barrier()


def test_no_process_group_is_started_without_torchrun():
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu")
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("available", [False, True])
def test_the_device_of_its_own_choice(monkeypatch, available):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    expected = torch.device("cuda", 0) if available else torch.device("cpu")
    with distributed.process_group("auto") as device:
        assert device == expected
    assert chosen == [expected] * available


def test_one_rank_under_torchrun(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    with distributed.process_group("cpu"):
        assert torch.distributed.get_backend() == "gloo"
        assert (distributed.rank(), distributed.world()) == (0, 1)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:x", ""])
def test_other_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"device must be auto, cpu, cuda or cuda:<index>, got {device!r}"):
        distributed.process_group(device).__enter__()


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="device cuda was asked for, and torch sees no CUDA device"):
        distributed.process_group("cuda").__enter__()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeError, match="CUDA device 5 was asked for, and torch sees 2"):
        distributed.process_group("cuda:5").__enter__()


def test_many_tensors_go_in_one_message_of_each_dtype(monkeypatch):
    sent = []

    def double(flat, *args, **options):
        sent.append(flat.dtype)
        flat *= 2

    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", double)
    monkeypatch.setattr(distributed.dist, "broadcast", double)
    strided = torch.ones(3, 2).t()
    tensors = [torch.ones(2, 2), torch.ones((), dtype=torch.float64), strided, torch.ones(0)]
    distributed.mean_(tensors)
    assert sent == [torch.float32, torch.float64]
    # the sum of two equal ranks, halved
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors)
    distributed.broadcast_(tensor for tensor in tensors)
    assert all(torch.equal(tensor, 2 * torch.ones_like(tensor)) for tensor in tensors)
    assert torch.equal(strided, torch.full((2, 3), 2.0))
    distributed.mean_([])


def test_a_process_on_its_own_sends_nothing():
    tensor = torch.arange(3.0)
    distributed.mean_([tensor])
    distributed.broadcast_([tensor])
    assert tensor.tolist() == [0, 1, 2]
