"""The ranks of ``torchrun``: one process does what this package does without it, several share the work.

Every function here also works, and does nothing, where no process group was started.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's rank; 0 on its own."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of ranks; 1 on its own."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agree(value: Any) -> Any:
    """Rank 0's ``value`` (picklable), on every rank."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` itself, with the sum over ranks in it."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_(tensors: Iterable[torch.Tensor]) -> None:
    """The mean over ranks into each of ``tensors``, one message for each dtype."""
    if world() > 1:
        _in_flat(tensors, lambda flat: dist.all_reduce(flat.div_(world())))


def broadcast_(tensors: Iterable[torch.Tensor]) -> None:
    """Rank 0's values into each of ``tensors``, one message for each dtype."""
    if world() > 1:
        _in_flat(tensors, lambda flat: dist.broadcast(flat, src=0))


def _in_flat(tensors: Iterable[torch.Tensor], change: Callable[[torch.Tensor], Any]) -> None:
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for some in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        change(flat)
        for tensor, part in zip(some, flat.split([tensor.numel() for tensor in some]), strict=True):
            tensor.copy_(part.view_as(tensor))


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        dist.barrier()


@contextmanager
def process_group(device: str = "auto") -> Iterator[torch.device]:
    """Join the process group that ``torchrun`` describes in the environment, if it does, and give this rank's
    device.

    Args:
        device: ``"auto"`` (CUDA where there is one, else the CPU), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
            Under ``torchrun`` a CUDA device is the one of the local rank. The CPU talks through gloo, CUDA
            through NCCL.

    Raises:
        ValueError: another kind of device.
        RuntimeError: the machine does not have it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:<index>, got {device!r}")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"device {device} was asked for, and torch sees no CUDA device")
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if chosen.type == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0)) if started else (chosen.index or 0)
        if index >= torch.cuda.device_count():
            raise RuntimeError(f"CUDA device {index} was asked for, and torch sees {torch.cuda.device_count()}")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if not started:
        yield chosen
        return
    # rank 0 decodes every image of a data set while the others wait, which takes long where there are many
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield chosen
    finally:
        dist.destroy_process_group()
