"""DTensors as what this rank holds of them, and sums over all the ranks that hold a part.

``torch.distributed.tensor`` is imported by who makes a DTensor, never from here.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(tensor: object) -> TypeIs[DTensor]:
    """Whether ``tensor`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``: all of it where it is no DTensor. Use without grad."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """``tensor`` with the mesh and the placements of ``like``.

    A plain tensor is taken to be the same on every rank, which keeps its part: nothing is communicated.

    Raises:
        ValueError: ``tensor`` is a DTensor on another mesh, or one where ``like`` is none.
    """
    if not is_dtensor(like):
        if is_dtensor(tensor):
            raise ValueError(f"expected a plain tensor as the parameter is one, got a DTensor on {tensor.device_mesh}")
        return tensor
    if not is_dtensor(tensor):
        tensor = _replicated(tensor, like.device_mesh)
    elif tensor.device_mesh != like.device_mesh:
        raise ValueError(f"expected a DTensor on {like.device_mesh}, got one on {tensor.device_mesh}")
    return tensor.redistribute(placements=like.placements)


def copy_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of ``tensor`` in its own dtype, on the device and in the memory layout of ``like``.

    Dense where ``like`` is not. Of two DTensors with the same placements.
    """
    copy = torch.empty_like(like, dtype=tensor.dtype)
    local(copy).copy_(local(tensor))
    return copy


def _replicated(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(tensor.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)


class ShardedSum:
    """Sums over parameters of which every rank holds parts.

    A mesh dimension counts on which any of the parameters is sharded. There a parameter that is not sharded has
    replicas, each of which counts for its share, so that the parameter counts once. Dimensions that only replicate
    (data parallelism, the outer one of HSDP) are left out: their ranks compute the same.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        self.parts: dict[Tensor, tuple[DeviceMesh, float]] = {}
        """Of each parameter on a mesh that counts: the mesh, and for what share this rank's part counts."""
        dtensors = [param for param in params if is_dtensor(param)]
        dims: dict[DeviceMesh, set[int]] = {}
        for param in dtensors:
            dims.setdefault(param.device_mesh, set()).update(_sharded_dims(param))
        self._dims = {mesh: sorted(found) for mesh, found in dims.items() if found}
        for param in dtensors:
            mesh = param.device_mesh
            if mesh in self._dims:
                replicas = math.prod(mesh.size(dim) for dim in dims[mesh] - _sharded_dims(param))
                self.parts[param] = mesh, 1 / replicas

    def __bool__(self) -> bool:
        """Whether any parameter is sharded."""
        return bool(self._dims)

    def reduce(self, summands: dict[DeviceMesh | None, Tensor], like: Tensor) -> Tensor:
        """The sum of ``summands``, one a mesh or None, over ranks; of the shape and on the device of ``like``.

        Every rank has to call it; one that has nothing to add for a mesh leaves it out. One all-reduce for each mesh
        dimension that counts.
        """
        total = summands.get(None, torch.zeros_like(like))
        for mesh, dims in self._dims.items():
            summand = summands.get(mesh)
            summand = torch.zeros_like(like) if summand is None else summand
            if summand.device.type != mesh.device_type:  # parameters kept on the CPU, or none
                summand = summand.to(mesh.device_type)
            for dim in dims:
                dist.all_reduce(summand, group=mesh.get_group(dim))
            total = total + summand.to(total.device)
        return total


def _sharded_dims(param: DTensor) -> set[int]:
    return {dim for dim, placement in enumerate(param.placements) if not placement.is_replicate()}
