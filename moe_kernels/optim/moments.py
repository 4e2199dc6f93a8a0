"""The moments of several batches, and of what other ranks hold, in one record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from moe_kernels.optim.batches import Batch
from moe_kernels.parallel.sharding import ShardedSum

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Summand(NamedTuple):
    """What one batch adds."""

    batch: Batch
    segments: Sequence[int]
    """Of each of the batch's T tensors: all one row, or each its own, then the ones that take no part, −1."""
    moments: Tensor
    """(T, 3) float64, r not weighted."""
    coefficient: float | Tensor


def gather_moments_(record: Tensor, summands: Sequence[Summand], sums: ShardedSum) -> None:
    """Write the moments of every segment into ``record`` (S, 6), in a fixed order, each parameter counted once.

    With sharded parameters every rank has to call this, whatever it has to add.
    """
    total = record[:, :3]
    sums_of_mesh: dict[DeviceMesh | None, Tensor] = {}
    for batch, segments, moments, coefficient in summands:
        moments[:, 0] *= coefficient
        moments[:, 2] *= coefficient
        moments[:, 2] *= coefficient
        taking_part = range(len(segments) - segments.count(-1))
        of_mesh: dict[DeviceMesh | None, list[int]] = {}
        shares = []
        for i in taking_part:
            mesh, share = sums.parts.get(batch.owners[i], (None, 1.0))
            of_mesh.setdefault(mesh, []).append(i)
            shares.append(share)
        if any(share != 1 for share in shares):
            moments = moments[: len(shares)] * moments.new_tensor(shares)[:, None]
        for mesh, members in of_mesh.items():
            rows = moments[: len(members)] if len(of_mesh) == 1 else moments[members]
            if mesh not in sums_of_mesh:
                sums_of_mesh[mesh] = torch.zeros_like(total, device=None if mesh is None else moments.device)
            sum_of_mesh = sums_of_mesh[mesh]
            where = [segments[i] for i in members]
            if len(set(where)) == 1:
                sum_of_mesh[where[0]] += rows.sum(0).to(sum_of_mesh.device)
            else:
                sum_of_mesh[where] = rows.to(sum_of_mesh.device)
    total.copy_(sums.reduce(sums_of_mesh, total))
