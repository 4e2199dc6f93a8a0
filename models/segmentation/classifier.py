"""The class of every pixel, learned from a few labelled points (the paper's sections 3.3 and 4.1).

Two layers on the hypercolumn of a location and the global features of its image, D + G → hidden → ReLU → classes and
background. They are trained on single points, pooled over all images; a whole image is predicted without building its
hypercolumns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from .. import files, runs
from ..data.splits import seed_hash
from . import denormals, saved
from .ahead import ahead
from .backbones import Features
from .configuration import SegmentConfig
from .localization import new_layer, two_layers
from .points import Points
from .replay import Replayed


class PixelClassifier(nn.Module):
    """Two layers, D + G → hidden → ReLU → L labels, of which 0 is the background.

    Parameters: ``w1`` (hidden, D + G), ``b1`` (hidden,), ``w2`` (L, hidden), ``b2`` (L,).
    """

    def __init__(self, features: int, hidden: int, labels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.w1, self.b1 = new_layer(features, hidden, generator)
        self.w2, self.b2 = new_layer(hidden, labels, generator)

    def forward(self, points: Tensor) -> Tensor:
        """Features of points (b, D + G) → logits (b, L)."""
        return torch.addmm(self.b2, torch.addmm(self.b1, points, self.w1.T).relu(), self.w2.T)

    def probabilities(self, features: Features, size: tuple[int, int]) -> Tensor:
        """Of one image at ``size`` (h, w): (L, h, w) float32, the softmax on the grid enlarged bilinearly."""
        return _enlarged(self._on_grid(features), size)

    def labels(self, features: Features, size: tuple[int, int]) -> Tensor:
        """The most probable label of each pixel, uint8 (h, w).

        One label is enlarged after the other: all of them at the size of a photograph take gigabytes.
        """
        grid = self._on_grid(features)
        best = _enlarged(grid[:1], size)[0]
        labels = torch.zeros_like(best, dtype=torch.uint8)
        for label in range(1, len(grid)):
            value = _enlarged(grid[label : label + 1], size)[0]
            labels.masked_fill_(value > best, label)
            best = torch.maximum(best, value)
        return labels

    @torch.no_grad()
    def _on_grid(self, features: Features) -> Tensor:
        """Probabilities (L, H, W). What the global features add is the same everywhere, and goes into the bias."""
        channels, bias = features.pyramid.channels, self.b1
        if features.image is not None:
            bias = torch.addmv(bias, self.w1[:, channels:], features.image[0].float())
        logits = two_layers(features.pyramid, self.w1[:, :channels], bias, self.w2, self.b2)
        return logits[0].softmax(0)


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]


def step(net: PixelClassifier, optimizer: torch.optim.Optimizer, points: Tensor, labels: Tensor) -> Tensor:
    """One step of the training on points float32 (b, D + G) and labels int64 (b,); returns the loss."""
    optimizer.zero_grad()
    loss = cross_entropy(net(points), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def batches(length: int, config: SegmentConfig, start: int) -> Iterator[np.ndarray]:
    """Points (batch,) of each step from ``start`` on: one order of all points after the other, cut evenly."""
    batch = config.batch
    orders: dict[int, np.ndarray] = {}
    for first in range(start * batch, steps(length, config) * batch, batch):
        epochs, places = np.divmod(np.arange(first, first + batch), length)
        for epoch in np.unique(epochs):
            if epoch not in orders:
                orders = {old: order for old, order in orders.items() if old >= epochs[0]}
                orders[epoch] = np.random.default_rng((seed_hash(config.seed, "points"), epoch)).permutation(length)
        yield np.concatenate([orders[epoch][places[epochs == epoch]] for epoch in np.unique(epochs)])


def steps(length: int, config: SegmentConfig) -> int:
    """How many there are; the last may begin another epoch."""
    return -(-length * config.epochs // config.batch)


def train(
    points: Points,
    labels: int,
    path: str | os.PathLike[str],
    config: SegmentConfig,
    *,
    description: Mapping[str, Any],
    device: str | torch.device = "cpu",
    checkpoint_share: float = 0.015,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> PixelClassifier:
    """Train on ``points``, or resume, or read back what is in the file ``path``.

    A checkpoint lies beside it while it trains. A run that was killed and resumed ends with the same bits.

    Args:
        labels: L, classes and background.
        description: what identifies the result beside the configuration, plain JSON; a file of another is replaced when
            the training is done, and not before.
        on_step: called with the number of finished steps and their total, at the start too.

    Raises:
        ValueError: there is no point.
        RuntimeError: the loss is not finite.
    """
    path, device = Path(path), torch.device(device)
    if not len(points):
        raise ValueError("there must be points to train on, got none")
    kept = {name: getattr(config, name) for name in ("hidden", "batch", "epochs", "learning_rate", "seed")}
    run = runs.identity(kept, {"labels": labels, "points": len(points)}, description)
    if path.exists():
        tensors, facts = saved.read(path)
        if facts["run"] == run:
            return _of(tensors, device)
    generator = torch.Generator().manual_seed(seed_hash(config.seed, "classifier"))
    net = PixelClassifier(points.channels + points.image_channels, config.hidden, labels, generator).to(device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(net.parameters(), config.learning_rate, fused=True, capturable=on_gpu)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    start, total = 0, steps(len(points), config)
    checkpoint = path.parent / runs.CHECKPOINT
    if checkpoint.exists() and (state := files.read_torch(checkpoint))["run"] == run:
        start = state["step"]
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["capturable"] = on_gpu  # whatever device the run began on
        loss.copy_(state["loss"])
    checkpoints = runs.Checkpoints(path.parent, checkpoint_share)

    def now(done: int) -> dict[str, Any]:
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "loss": loss}
        return {"run": run, "step": done, **state}

    def advance(features: Tensor, wanted: Tensor) -> None:
        loss.add_(step(net, optimizer, features.float(), wanted))

    fetch, go = replayed(points, advance, device) if on_gpu else (points.gather, advance)
    on_step(start, total)
    for done, batch in enumerate(ahead(fetch, batches(len(points), config, start), 8), start + 1):
        go(*batch)
        if not on_gpu and done % denormals.EVERY == 0:
            denormals.flush_(optimizer)
        if done < total:
            checkpoints.offer(partial(now, done))
        on_step(done, total)
    if not loss.isfinite():
        raise RuntimeError("the loss of the pixel classifier is not finite; a smaller learning rate may help")
    saved.write(path, net.state_dict(), {"run": run, "loss": loss.item() / total})
    checkpoint.unlink(missing_ok=True)
    return net


def replayed(
    points: Points, advance: Callable[[Tensor, Tensor], None], device: torch.device
) -> tuple[Callable[[np.ndarray], tuple[Tensor, ...]], Callable[..., None]]:
    """What makes of the points of a step the arguments of the other, which is ``advance`` on them as a CUDA graph.

    The GPU keeps all points where half of its free memory has room for them; then they are gathered in the graph too.
    """
    if points.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return points.gather, Replayed(advance, device)
    gather = points.on(device)
    return lambda chosen: (torch.from_numpy(chosen),), Replayed(lambda chosen: advance(*gather(chosen)), device)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[PixelClassifier, dict[str, Any]]:
    """The classifier that :func:`train` wrote, and what identifies it."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is missing: the segmenter was not trained to the end")
    tensors, facts = saved.read(path)
    return _of(tensors, device), facts["run"]


def _of(tensors: Mapping[str, Tensor], device: str | torch.device) -> PixelClassifier:
    with torch.device("meta"):
        net = PixelClassifier(tensors["w1"].shape[1], tensors["w1"].shape[0], len(tensors["w2"]))
    net.load_state_dict(tensors, assign=True)
    return net.to(device)
