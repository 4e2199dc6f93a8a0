"""Gloo ranks, each a process of its own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Body = Callable[..., None]


def on_ranks(world_size: int, folder: Path, *bodies: tuple[Body, tuple[Any, ...]]) -> None:
    """Run every ``body(rank, folder, *arguments)`` on ranks that are started once: that is what takes the time."""
    mp.spawn(_run, args=(str(folder), world_size, bodies), nprocs=world_size)


def _run(rank: int, folder: str, world_size: int, bodies: tuple[tuple[Body, tuple[Any, ...]], ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for body, arguments in bodies:
        body(rank, folder, *arguments)
    dist.destroy_process_group()
    os._exit(0)  # at the interpreter's end threads of gloo that want it can abort the process
