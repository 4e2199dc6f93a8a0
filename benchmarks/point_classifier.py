"""The pixel classifier's training at the paper's size, whole: ``python -m moe_kernels.benchmarks.point_classifier``.

500,000 labelled points of 10,582 images, 4,224 features a point (VGG-16's hypercolumns) and 4,096 an image (fc7), two
epochs of batches of 100 points; the paper needs "less than 3 minutes" on a Titan X. The points are drawn here and lie
on disk in float16 as those of a fit do (4.3 GB). Ours is ``classifier.train`` as a fit calls it, from the first step to
the file. The peer is a loop as it is usually written, timed over some of its steps: a ``DataLoader`` that shuffles,
features joined to 8,320, two ``nn.Linear``, and ``torch.optim.Adam`` as it is by default.

It is no part of the harness, whose candidates are calls of milliseconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from moe_kernels.models import files
from moe_kernels.models.segmentation import classifier, rows
from moe_kernels.models.segmentation.configuration import SegmentConfig
from moe_kernels.models.segmentation.points import Points

CHANNELS, IMAGE_CHANNELS, CLASSES = 4224, 4096, 20
IMAGES_OF_PAPER, POINTS_OF_PAPER = 10_582, 500_000
BLOCK = 5_000


def draw(folder: Path, count: int, images: int) -> None:
    """Points as a fit writes them: features after a ReLU, and labels that a network can learn."""
    generator = np.random.default_rng(0)
    prototypes = generator.standard_normal((CLASSES + 1, CHANNELS), np.float32)
    layout = {"columns": ("float16", CHANNELS), "image": ("float16", IMAGE_CHANNELS), "about": ("int32", 3)}
    with rows.Writer(folder, layout, {"points": count}) as writer:
        noise = generator.standard_normal((BLOCK, CHANNELS), np.float32)
        for first in tqdm(range(0, count, BLOCK), desc="drawing points", unit="block"):
            place = np.arange(first, min(first + BLOCK, count))
            labels = generator.integers(0, CLASSES + 1, len(place))
            columns = np.maximum(noise[generator.permutation(BLOCK)[: len(place)]] + 0.1 * prototypes[labels], 0)
            about = np.stack([labels, place * images // count, np.zeros_like(place)], 1)
            empty = np.empty((0, IMAGE_CHANNELS), np.float16)
            writer.append(columns=columns.astype(np.float16), image=empty, about=about.astype(np.int32))
        for _ in range(images):
            image = np.maximum(generator.standard_normal((1, IMAGE_CHANNELS), np.float32), 0).astype(np.float16)
            writer.append(columns=np.empty((0, CHANNELS), np.float16), image=image, about=np.empty((0, 3), np.int32))
        writer.finish(images)


class Joined(Dataset[tuple[Tensor, int]]):
    """The points one by one, float32 (D + G,), with their labels."""

    def __init__(self, points: Points) -> None:
        self.points = points

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        features, labels = self.points.gather(np.array([index]))
        return features[0].float(), int(labels[0])


def usual(points: Points, config: SegmentConfig, steps: int) -> float:
    """Median seconds of a step of the usual loop."""
    features = points.channels + points.image_channels
    net = nn.Sequential(nn.Linear(features, config.hidden), nn.ReLU(), nn.Linear(config.hidden, CLASSES + 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=config.learning_rate)
    seconds, begun = [], time.perf_counter()
    for batch, labels in DataLoader(Joined(points), batch_size=config.batch, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch), labels).backward()
        optimizer.step()
        now = time.perf_counter()
        seconds.append(now - begun)
        begun = now
        if len(seconds) == steps:
            break
    return statistics.median(seconds)


def main(
    points: Annotated[int, typer.Option(min=100)] = POINTS_OF_PAPER,
    images: Annotated[int, typer.Option(min=1)] = IMAGES_OF_PAPER,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    peer_steps: Annotated[int, typer.Option(min=1, help="Of the usual loop.")] = 200,
    scratch: Annotated[Path | None, typer.Option(help="Where the points lie meanwhile.")] = None,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the figures.")] = None,
) -> None:
    """Train the pixel classifier at the paper's size and tell how long it takes."""
    from moe_kernels.cli.bench import environment  # a command's own, which imports all benchmarks

    torch.set_num_threads(threads)
    config = SegmentConfig()
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        draw(Path(folder, "points"), points, images)
        drawn = Points([Path(folder, "points")])
        peer = usual(drawn, config, peer_steps)
        total = classifier.steps(points, config)
        begun = time.perf_counter()
        with tqdm(total=total, desc="pixel classifier", unit="step") as bar:
            path = Path(folder, "classifier.safetensors")
            classifier.train(
                drawn, CLASSES + 1, path, config, description={}, on_step=lambda done, _: bar.update(done - bar.n)
            )
        seconds = time.perf_counter() - begun
    step_ms, usual_ms = 1e3 * seconds / total, 1e3 * peer
    found = {
        "points": points,
        "images": images,
        "features": CHANNELS + IMAGE_CHANNELS,
        "steps": total,
        "seconds": seconds,
        "step_ms": step_ms,
        "usual_step_ms": usual_ms,
    }
    typer.echo(
        f"{total} steps in {seconds:.1f} s, {step_ms:.2f} ms a step; "
        f"the usual loop: {usual_ms:.2f} ms a step, {usual_ms / step_ms:.2f} times as long"
    )
    if out:
        files.write_json(out, {**environment(torch.device("cpu"), 1, "wall", False), **found})


if __name__ == "__main__":
    typer.run(main)
