"""``diverse_sampling``: 20 samples of each of three classes and of the background of an image, by the sum ("sum") and
by the maximum of the similarities ("max"); and ``farthest_points``: 20 of its locations ("farthest"). On a GPU also of
several images at once.

Ours is given a pyramid, or the unit-norm columns of all locations. Peers have those in float32, whatever the storage
of ours, of the same rounded values: one product of the columns with a vector for every step of every class and image in
plain PyTorch, also with the time it takes to build the columns; on a GPU also one product for a step of all classes and
images, of the columns that ours is given where these are it; and for farthest points of one image ``fpsample``,
``torch_quickfps`` and ``torch_cluster``, whose Euclidean distance orders columns of norm 1 as the cosine does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_kernels.benchmarks.candidates import OURS, Candidate, Outputs, Problem
from moe_kernels.benchmarks.harness import Benchmark, Case
from moe_kernels.benchmarks.limits import Work
from moe_kernels.benchmarks.pyramids import GRIDS, MAPS
from moe_kernels.benchmarks.workloads import Draw, Workload
from moe_kernels.ops.diverse_sampling import diverse_sampling, farthest_points
from moe_kernels.ops.hypercolumn import Pyramid, dense, pyramid

SUM, MAX, FARTHEST = DIRECTIONS = ("sum", "max", "farthest")
PYRAMID, COLUMNS = ("pyramid", "columns")
PLAIN, WITH_COLUMNS = "plain PyTorch", "plain PyTorch, builds the columns"
BATCHED = "plain PyTorch, batched"


@dataclass(frozen=True)
class Image(Workload):
    """Features of images by ``network``, one of ``MAPS``, given as ``layout``."""

    network: str
    layout: str
    classes: int = 3
    samples: int = 20
    images: int = 1

    def tiny(self) -> Image:
        return dataclasses.replace(self, network="few", samples=4, images=min(self.images, 2))

    def __str__(self) -> str:
        height, width = GRIDS[self.network]
        channels = sum(size[0] for size in MAPS[self.network])
        shape = f"B={self.images} N={height * width} D={channels}"
        return f"{self.network}, {shape}, {self.layout}, K={self.samples} {self.dtype}"


def _smooth(draw: Draw[Image], channels: int, height: int, width: int, cell: int) -> Tensor:
    """(B, C, h, w) float32: normal noise that changes over ``cell`` pixels."""
    shape = draw.workload.images, channels, height // cell + 2, width // cell + 2
    noise = torch.randn(shape, generator=draw.generator)
    return F.interpolate(noise, (height, width), mode="bicubic", align_corners=False)


def features(draw: Draw[Image], device: torch.device) -> Pyramid:
    """Post-ReLU maps, half zeros, smooth in space, channels of different strength."""
    grid, maps = GRIDS[draw.workload.network], []
    for channels, height, width in MAPS[draw.workload.network]:
        size = min(height, grid[0]), min(width, grid[1])
        x = _smooth(draw, channels, *size, max(1, size[0] // 8)) + 0.5 * _smooth(draw, channels, *size, 1)
        strength = torch.exp(0.5 * torch.randn(1, channels, 1, 1, generator=draw.generator))
        maps.append((x.relu() * strength).to(device))
    return pyramid(maps, grid, dtype=draw.workload.torch_dtype)


def unit_columns(maps: Pyramid) -> Tensor:
    """(B, N, D) float32, of norm 1."""
    wide = maps._replace(maps=tuple(m.float() for m in maps.maps))
    return F.normalize(dense(wide).flatten(2).transpose(1, 2), dim=2).contiguous()


def _add(penalty: Tensor | None, similarity: Tensor, rule: str) -> Tensor:
    if penalty is None:
        return similarity
    return penalty + similarity if rule == SUM else torch.maximum(penalty, similarity)


def plain_sampling(scores: Tensor, columns: Tensor, samples: int, rule: str) -> Outputs:
    """One image: scores (C, N), columns (N, D); one matrix-vector product for a step of a class."""
    indices, background = [], []
    behind: Tensor | None = None
    closed = torch.zeros(columns.shape[0], dtype=torch.bool, device=columns.device)
    for score in scores:
        penalty, taken = None, torch.zeros_like(closed)
        for _ in range(samples):
            values = score if penalty is None else score - penalty
            indices.append(values.masked_fill(taken, -torch.inf).argmax())
            taken[indices[-1]] = True
            penalty = _add(penalty, columns @ columns[indices[-1]], rule)
        closed |= taken
        assert penalty is not None
        behind = _add(behind, penalty, rule)
    assert behind is not None
    for k in range(samples):
        background.append(behind.masked_fill(closed, torch.inf).argmin())
        closed[background[-1]] = True
        if k + 1 < samples:
            behind = _add(behind, columns @ columns[background[-1]], rule)
    return {"indices": torch.stack(indices).view(1, -1, samples), "background": torch.stack(background)[None]}


def similarity(columns: Tensor, picks: Tensor) -> Tensor:
    """(B, P, N) float32: all columns (B, N, D) with those at ``picks`` (B, P)."""
    picked = columns.gather(1, picks.unsqueeze(2).expand(-1, -1, columns.shape[2]))
    wide = {} if columns.dtype == torch.float32 else {"out_dtype": torch.float32}
    return torch.bmm(picked, columns.transpose(1, 2), **wide)


def batched_sampling(scores: Tensor, columns: Tensor, samples: int, rule: str) -> Outputs:
    """All images and classes together: scores (B, C, N), columns (B, N, D); one product of matrices for a step."""
    indices, background = [], []
    penalty, taken = None, torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(samples):
        values = scores if penalty is None else scores - penalty
        indices.append(values.masked_fill(taken, -torch.inf).argmax(2))
        taken.scatter_(2, indices[-1].unsqueeze(2), True)
        penalty = _add(penalty, similarity(columns, indices[-1]), rule)
    assert penalty is not None
    behind, closed = penalty.sum(1) if rule == SUM else penalty.amax(1), taken.any(1)
    for _ in range(samples):
        background.append(behind.masked_fill(closed, torch.inf).argmin(1, keepdim=True))
        closed.scatter_(1, background[-1], True)
        behind = _add(behind, similarity(columns, background[-1])[:, 0], rule)
    return {"indices": torch.stack(indices, 2), "background": torch.cat(background, 1)}


def batched_farthest(columns: Tensor, samples: int) -> Tensor:
    """(B, K), all images together: columns (B, N, D) of norm 1."""
    points = [torch.zeros(len(columns), 1, dtype=torch.int64, device=columns.device)]
    nearest = None
    for _ in range(samples - 1):
        nearest = _add(nearest, similarity(columns, points[-1])[:, 0], MAX)
        points.append(nearest.argmin(1, keepdim=True))
    return torch.cat(points, 1)


def plain_farthest(columns: Tensor, samples: int) -> Outputs:
    """One image: columns (N, D) of norm 1."""
    points = [torch.zeros((), dtype=torch.int64, device=columns.device)]
    nearest = None
    for _ in range(samples - 1):
        nearest = _add(nearest, columns @ columns[points[-1]], MAX)
        points.append(nearest.argmin())
    return {"points": torch.stack(points)}


def _fpsample(columns: Tensor, samples: int) -> Outputs:
    import fpsample

    return {"points": torch.from_numpy(fpsample.fps_sampling(columns.numpy(), samples, start_idx=0).astype("int64"))}


def _quickfps(columns: Tensor, samples: int) -> Outputs:
    import torch_quickfps

    return {"points": torch_quickfps.sample_idx(columns[None], samples, start_idx=0)[0]}


def _cluster(columns: Tensor, samples: int) -> Outputs:
    import torch_cluster

    return {"points": torch_cluster.fps(columns, ratio=(samples - 0.5) / len(columns), random_start=False)}


FARTHEST_PEERS = {"fpsample": _fpsample, "torch_quickfps": _quickfps, "torch_cluster": _cluster}


def work(maps: Pyramid, classes: int) -> Work:
    """Every feature and score is read once."""
    values = sum(m.numel() for m in maps.maps)
    return Work(0, values * maps.dtype.itemsize + 4 * maps.batch * classes * maps.locations)


def _build(workload: Image, direction: str, device: torch.device) -> Case:
    draw = Draw(workload, device)
    maps, samples = features(draw, device), workload.samples
    columns = stored = unit_columns(maps)
    grid = maps.grid
    scores = _smooth(draw, workload.classes, *grid, max(1, grid[0] // 8)).flatten(2)
    scores = (2 * scores + 0.1 * torch.randn(scores.shape, generator=draw.generator)).to(device)
    leaves = {f"map{number}": m for number, m in enumerate(maps.maps)}
    if workload.layout == COLUMNS:
        columns = columns.to(workload.torch_dtype)
        leaves = {"columns": columns.clone()}
        maps = Pyramid((columns.transpose(1, 2).unsqueeze(3),), (columns.shape[1], 1))
        stored, columns = columns, columns.float()

    def given(tensors: dict[str, Tensor]) -> Tensor | Pyramid:
        return tensors["columns"] if workload.layout == COLUMNS else Pyramid(tuple(tensors.values()), grid)

    def ours(**tensors: Tensor) -> dict[str, Tensor]:
        if direction == FARTHEST:
            return {"points": farthest_points(given(tensors), samples).flatten()}
        found = diverse_sampling(scores, given(tensors), samples, penalty=direction)
        assert found.background is not None
        return {"indices": found.indices, "background": found.background}

    def plain(columns: Tensor) -> Outputs:
        if direction == FARTHEST:
            each = [plain_farthest(image, samples) for image in columns]
        else:
            each = [plain_sampling(*image, samples, direction) for image in zip(scores, columns, strict=True)]
        return {name: torch.cat([found[name] for found in each]) for name in each[0]}

    def batched() -> Outputs:
        if direction == FARTHEST:
            return {"points": batched_farthest(stored, samples).flatten()}
        return batched_sampling(scores, stored, samples, direction)

    def peer(function: Callable[[Tensor, int], Outputs]) -> Candidate:
        return lambda: function(columns[0], samples)

    problem = Problem(leaves)
    candidates: dict[str, Candidate] = {OURS: problem.candidate(ours), PLAIN: lambda: plain(columns)}
    if workload.layout == PYRAMID:
        candidates[WITH_COLUMNS] = lambda: plain(unit_columns(maps))
    if device.type == "cuda":
        candidates[BATCHED] = batched
    if direction == FARTHEST and workload.images == 1:
        candidates |= {name: peer(function) for name, function in FARTHEST_PEERS.items()}
    return Case(
        "diverse_sampling",
        workload,
        direction,
        candidates,
        exact=problem.exact(ours),
        plain=PLAIN,
        work=work(maps, 0 if direction == FARTHEST else workload.classes),
    )


SUITES = {
    "cpu": {
        "pyramid": (Image("vgg16", PYRAMID),),
        "columns": (Image("vgg16", COLUMNS),),
    },
    "cuda": {layout: (Image("vgg16", layout), Image("vgg16", layout, images=16)) for layout in (PYRAMID, COLUMNS)},
}
"""Kind of device → name of the suite → its workloads."""
QUICK = (Image("few", PYRAMID, samples=4), Image("few", COLUMNS, samples=4))
BENCHMARK = Benchmark(_build, SUITES, QUICK, directions=DIRECTIONS, gpu_dtype="float16")
