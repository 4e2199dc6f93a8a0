"""``hypercolumn``: the four things that are done with hypercolumns, one direction each.

- "linear": a 1×1 convolution of the D channels to 512.
- "inner": the similarity of every location with 20 given hypercolumns.
- "norm": the norm of every location.
- "gather": the hypercolumns of 60 locations.

All candidates begin with the same maps. Where these are a network's own, ours includes :func:`pyramid`, which has
nothing to do where they are a pyramid's.

Peers: the dense construction that everybody writes, ``F.interpolate`` of each map, ``torch.cat``, and then what is to
be done; for "gather", ``F.grid_sample`` of each map; and ``torch.compile`` of these.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.benchmarks.candidates import OURS, Function, Problem
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.inductor import PREFIX, compiled
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.pyramids import QUICK, SUITES, FeatureMaps
from moe_kernels.benchmarks.workloads import Draw
from moe_kernels.ops.hypercolumn import gather, inner, linear, norm, pyramid

LINEAR, INNER, NORM, GATHER = DIRECTIONS = ("linear", "inner", "norm", "gather")
PLAIN = "plain PyTorch"
Grid = tuple[int, int]


def _our_linear(weight: Tensor, bias: Tensor, *, grid: Grid, **maps: Tensor) -> Mapping[str, Tensor]:
    return {"y": linear(pyramid(list(maps.values()), grid), weight, bias)}


def _our_inner(columns: Tensor, *, grid: Grid, **maps: Tensor) -> Mapping[str, Tensor]:
    return {"y": inner(pyramid(list(maps.values()), grid), columns)}


def _our_norm(*, grid: Grid, **maps: Tensor) -> Mapping[str, Tensor]:
    return {"y": norm(pyramid(list(maps.values()), grid))}


def _our_gather(*, points: Tensor, grid: Grid, **maps: Tensor) -> Mapping[str, Tensor]:
    return {"y": gather(pyramid(list(maps.values()), grid), points)}


def _dense(maps: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return torch.cat([F.interpolate(m, grid, mode="bilinear", align_corners=False) for m in maps.values()], 1)


def _plain_linear(weight: Tensor, bias: Tensor, *, grid: Grid, **maps: Tensor) -> Mapping[str, Tensor]:
    return {"y": F.conv2d(_dense(maps, grid), weight[..., None, None], bias)}


def _plain_inner(columns: Tensor, *, grid: Grid, **maps: Tensor) -> Mapping[str, Tensor]:
    similarities = columns @ _dense(maps, grid).flatten(2)
    return {"y": similarities.view(*similarities.shape[:2], *grid)}


def _plain_norm(*, grid: Grid, **maps: Tensor) -> Mapping[str, Tensor]:
    return {"y": torch.linalg.vector_norm(_dense(maps, grid), dim=1)}


def _plain_gather(*, points: Tensor, grid: Grid, **maps: Tensor) -> Mapping[str, Tensor]:
    height, width = grid
    places = torch.stack([(2 * (points % width) + 1) / width, (2 * (points // width) + 1) / height], -1) - 1
    found = []
    for m in maps.values():
        wide = m.to(torch.promote_types(m.dtype, torch.float32))  # 16 bits do not tell the places apart
        sampled = F.grid_sample(wide, places[:, None].to(wide), padding_mode="border", align_corners=False)
        found.append(sampled[:, :, 0].to(m))
    return {"y": torch.cat(found, 1).transpose(1, 2)}


def work(workload: FeatureMaps, direction: str) -> Work:
    """Products at the resolution of the maps, none larger than the grid; bytes of what is read of them, and the rest.

    Of a map that is larger than the grid at most two rows and two columns a location are read, for a point at most four
    pixels.
    """
    (height, width), locations = workload.grid, workload.locations
    reduced = sum(c * min(h, height) * min(w, width) for c, h, w in workload.sizes)
    read = sum(c * min(h, 2 * height) * min(w, 2 * width) for c, h, w in workload.sizes)
    if direction == LINEAR:
        flops = 2 * reduced * workload.outputs
        values = read + workload.outputs * (workload.channels + 1 + locations)
    elif direction == INNER:
        flops = 2 * reduced * workload.columns
        values = read + workload.columns * (workload.channels + locations)
    elif direction == NORM:
        flops, values = 0, read + locations
    else:
        touched = sum(c * min(h * w, 4 * workload.points) for c, h, w in workload.sizes)
        flops, values = 0, touched + workload.points * workload.channels
    return Work(flops, values * workload.torch_dtype.itemsize)


def _build(workload: FeatureMaps, direction: str, device: torch.device) -> Case:
    draw = Draw(workload, device)
    leaves = {f"map{number}": m for number, m in enumerate(workload.maps(draw))}
    others: dict[str, object] = {"grid": workload.grid}
    ours: Function
    plain: Function
    if direction == LINEAR:
        leaves["weight"] = draw.normal(workload.outputs, workload.channels, std=workload.channels**-0.5)
        leaves["bias"] = draw.normal(workload.outputs)
        ours, plain = _our_linear, _plain_linear
    elif direction == INNER:
        leaves["columns"] = draw.normal(1, workload.columns, workload.channels).relu()
        ours, plain = _our_inner, _plain_inner
    elif direction == NORM:
        ours, plain = _our_norm, _plain_norm
    else:
        chosen = torch.randperm(workload.locations, generator=draw.generator)[: workload.points]
        others["points"] = chosen[None].to(device)
        ours, plain = _our_gather, _plain_gather
    problem = Problem(leaves, others=others)
    return Case(
        "hypercolumn",
        workload,
        direction,
        candidates={
            OURS: problem.candidate(ours),
            PLAIN: problem.candidate(plain),
            f"{PREFIX}plain": problem.candidate(compiled(plain)),
        },
        exact=problem.exact(ours),
        plain=PLAIN,
        work=work(workload, direction),
    )


BENCHMARK = Benchmark(_build, SUITES, QUICK, directions=DIRECTIONS, weigh=LINEAR, gpu_dtype="float16")
