"""Where a class is, learned from tags: one small network a class on the hypercolumns (the paper's section 3.1).

A network gives every location a score of its class and a score of everything else. The probability that an image with
maps s and b has the class is

    "pixel"   σ(maxᵢ (sᵢ − bᵢ))             softmax at each location, then the maximum (Eq. 1)
    "global"  σ(maxᵢ sᵢ − maxᵢ bᵢ)          the maximum of each map, then softmax (Eq. 2)

and its log-loss is what is learned, one image at a time. Either way the gradient goes through one or two locations
only: the maps are computed without a gradient, forward and backward are repeated at their maxima. This is exact.

Each class trains on its positives and as many random negatives. An epoch's order of images is one for all classes, so
that all which use an image advance together; but which negatives a class has, and where they stand in the order,
follows from the seed and the names of class and images alone. A class's network is therefore the same, bit for bit,
whether it is trained beside others or added later.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from moe_kernels.ops import hypercolumn
from moe_kernels.ops.hypercolumn import Pyramid

from .. import files, runs
from ..data.splits import seed_hash
from . import denormals, saved
from .ahead import ahead
from .configuration import SegmentConfig


class Localizer(nn.Module):
    """Two layers, D → hidden → ReLU → 2: the score of a class and that of everything else.

    Parameters: ``w1`` (hidden, D), ``b1`` (hidden,), ``w2`` (2, hidden), ``b2`` (2,).
    """

    def __init__(self, channels: int, hidden: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.w1, self.b1 = new_layer(channels, hidden, generator)
        self.w2, self.b2 = new_layer(hidden, 2, generator)

    def forward(self, columns: Tensor) -> Tensor:
        """Columns (..., D) → scores (..., 2)."""
        hidden = torch.addmm(self.b1, columns.flatten(0, -2), self.w1.T).relu()
        return torch.addmm(self.b2, hidden, self.w2.T).unflatten(0, columns.shape[:-1])

    def maps(self, pyramid: Pyramid) -> Tensor:
        """The scores at every location, (B, 2, H, W), without a gradient."""
        return two_layers(pyramid, self.w1, self.b1, self.w2, self.b2)


def new_layer(inputs: int, outputs: int, generator: torch.Generator | None) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight (outputs, inputs) and bias (outputs,), uniform in ± inputs^-½ as ``nn.Linear`` and Torch7 have them."""
    bound = inputs**-0.5
    weight, bias = torch.empty(outputs, inputs), torch.empty(outputs)
    for tensor in (weight, bias):
        tensor.uniform_(-bound, bound, generator=generator)
    return nn.Parameter(weight), nn.Parameter(bias)


@torch.no_grad()
def two_layers(pyramid: Pyramid, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """w2 relu(w1 z + b1) + b2 of all hypercolumns z: (B, O, H, W), without a gradient."""
    hidden = hypercolumn.linear(pyramid, w1, b1).relu_().permute(0, 2, 3, 1)
    return torch.nn.functional.linear(hidden, w2, b2).permute(0, 3, 1, 2)


def evidence(maps: Tensor, loss: str) -> Tensor:
    """The map that tells where the class is, (B, 2, H, W) → (B, H, W).

    With the global softmax that is the class's score; with the pixel softmax, whose two scores mean something together
    only, their difference.
    """
    return maps[:, 0] if loss == "global" else maps[:, 0] - maps[:, 1]


def peaks(maps: Tensor, loss: str) -> Tensor:
    """The locations through which the gradient goes: of the class's score and of the other, (B, 2, H, W) → (B, 2)."""
    if loss == "global":
        return maps.flatten(2).argmax(2)
    return evidence(maps, loss).flatten(1).argmax(1)[:, None].expand(-1, 2)


def image_loss(scores: Tensor, present: Tensor) -> Tensor:
    """The log-loss of images from the scores at their :func:`peaks`: (..., 2, 2), bool (...) → (...).

    Row 0 has both scores where that of the class counts, row 1 where the other does. For both kinds of softmax the
    probability is σ(s − b), and the loss softplus(∓(s − b)).
    """
    margin = scores[..., 0, 0] - scores[..., 1, 1]
    return softplus(torch.where(present, -margin, margin))


@dataclass(frozen=True)
class Task:
    """A class to localize: its name, the images with it, and those without, of which as many are drawn.

    Attributes:
        digests: image → what tells it from another of the same name, where that is known.

    Raises:
        ValueError: there are none of one kind.
    """

    name: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.positives:
            raise ValueError(f"class {self.name} has no image: no tag names it")
        if not self.negatives:
            raise ValueError(f"class {self.name} has no negatives: every image has its tag")

    def images(self, seed: int) -> dict[tuple[str, int], bool]:
        """What the class sees in an epoch: (image, how many times before) → whether it has the class.

        Negatives are drawn without replacement; where there are fewer than positives, all of them several times.
        """
        shuffled = sorted(self.negatives, key=lambda image: seed_hash(seed, "negative", self.name, image))
        drawn = ((shuffled[i % len(shuffled)], i // len(shuffled)) for i in range(len(self.positives)))
        return {(image, 0): True for image in self.positives} | dict.fromkeys(drawn, False)

    def identity(self) -> dict[str, Any]:
        """What its network follows from, beside seed and configuration."""
        return {
            "class": self.name,
            "positives": self._digest(self.positives),
            "negatives": self._digest(self.negatives),
        }

    def _digest(self, images: Sequence[str]) -> str:
        return saved.digest(f"{image}: {self.digests.get(image)}" for image in sorted(images))


def tasks(
    names: Sequence[str], classes: Sequence[str], tags: np.ndarray, digests: Mapping[str, str] | None = None
) -> list[Task]:
    """One task a class from the tags, bool (images, classes)."""
    listed = np.array(names, dtype=object)
    return [
        Task(name, tuple(listed[tags[:, place]]), tuple(listed[~tags[:, place]]), digests or {})
        for place, name in enumerate(classes)
    ]


class Training:
    """The networks of several tasks side by side: what changes while they train, and what is done to them."""

    def __init__(self, todo: Sequence[Task], channels: int, config: SegmentConfig, device: torch.device) -> None:
        self.todo, self.config, self.device = todo, config, device
        self.nets = nn.ModuleList(
            Localizer(
                channels,
                config.localization_hidden,
                torch.Generator().manual_seed(seed_hash(config.seed, "localization", task.name)),
            )
            for task in todo
        ).to(device)
        # One optimizer for all: it leaves alone what has no gradient, and counts the steps of each tensor.
        self.optimizer = torch.optim.Adam(self.nets.parameters(), fused=True)

    def order(self) -> list[tuple[int, str, list[int], list[bool]]]:
        """The steps: epoch, image, and the places in ``todo`` of the classes that use it, with whether it has them."""
        users: dict[tuple[str, int], list[tuple[int, bool]]] = {}
        for place, task in enumerate(self.todo):
            for item, present in task.images(self.config.seed).items():
                users.setdefault(item, []).append((place, present))
        return [
            (epoch, item[0], [place for place, _ in users[item]], [present for _, present in users[item]])
            for epoch in range(len(self.config.localization_rates))
            for item in sorted(users, key=lambda item: (seed_hash(self.config.seed, "order", epoch, *item), item))
        ]

    def step(self, epoch: int, pyramid: Pyramid, places: Sequence[int], present: Sequence[bool]) -> Tensor:
        """One image, for the networks at ``places``; returns their losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.localization_rates[epoch]
        nets = [self.nets[place] for place in places]
        with torch.no_grad():
            # a product for each class: as fast as one of all, and its bits do not depend on the others
            points = torch.cat([peaks(net.maps(pyramid), self.config.loss) for net in nets], 1)
            columns = hypercolumn.gather(pyramid, points)[0].unflatten(0, (-1, 2))
        scores = torch.stack([net(pair) for net, pair in zip(nets, columns, strict=True)])
        losses = image_loss(scores, torch.tensor(present, device=self.device))
        self.optimizer.zero_grad()
        losses.sum().backward()
        self.optimizer.step()
        return losses.detach()

    def state(self) -> dict[str, Any]:
        return {"nets": self.nets.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.nets.load_state_dict(state["nets"])
        self.optimizer.load_state_dict(state["optimizer"])


def train(
    todo: Sequence[Task],
    features: Callable[[str], Pyramid],
    channels: int,
    folder: str | os.PathLike[str],
    config: SegmentConfig,
    *,
    description: Mapping[str, Any] | None = None,
    replace: bool = False,
    device: str | torch.device = "cpu",
    checkpoint_share: float = 0.015,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Localizer]:
    """Train the networks of ``todo``, or resume, or read them back from ``folder``.

    ``folder`` holds ``<class>.safetensors`` for each class, and ``checkpoint.pt`` while they train. One process at a
    time. A run that was killed and resumed ends with the same bits.

    Args:
        features: the float32 pyramid of an image, by name, on ``device``; batch 1. Called in a thread, a little early.
        channels: D of those.
        description: more of what identifies the networks (the backbone), plain JSON.
        replace: networks of these classes that were trained otherwise are trained anew, not refused.
        checkpoint_share: largest share of the time that writing checkpoints may take.
        on_step: called with the number of finished steps and their total, at the start too.

    Raises:
        ValueError: ``folder`` holds a network of one of these classes that was trained otherwise, without ``replace``.
        RuntimeError: a loss is not finite.
    """
    folder, device = Path(folder), torch.device(device)
    facts = {task.name: _facts(task, channels, config, description or {}) for task in todo}
    found = {task.name: _read(folder, task.name, facts[task.name], device, replace) for task in todo}
    nets = {name: net for name, net in found.items() if net is not None}
    if len(nets) == len(todo):
        return nets
    training = Training(todo, channels, config, device)
    steps = training.order()
    losses = torch.zeros(len(config.localization_rates), len(todo), dtype=torch.float64, device=device)
    run = runs.identity({"classes": list(facts.values())})
    state = files.read_torch(folder / runs.CHECKPOINT) if (folder / runs.CHECKPOINT).exists() else {"run": None}
    start = 0
    # a checkpoint of other classes is what an addition left that was given up
    if state["run"] == run:
        start = state["step"]
        training.restore(state)
        losses.copy_(state["losses"])
    checkpoints = runs.Checkpoints(folder, checkpoint_share)
    on_step = on_step or (lambda done, total: None)
    on_step(start, len(steps))
    pyramids = ahead(features, (image for _, image, _, _ in steps[start:]))
    for done, (pyramid, (epoch, _, places, present)) in enumerate(zip(pyramids, steps[start:], strict=True), start + 1):
        losses[epoch, places] += training.step(epoch, pyramid, places, present)
        if device.type == "cpu" and done % denormals.EVERY == 0:
            denormals.flush_(training.optimizer)
        if done < len(steps):
            checkpoints.offer(
                lambda done=done: {"run": run, "step": done, "losses": losses, **training.state()}  # type: ignore[misc]
            )
        on_step(done, len(steps))
    for task, net, sums in zip(todo, training.nets, losses.T.tolist(), strict=True):
        if not np.isfinite(sums).all():
            raise RuntimeError(f"the loss of class {task.name} is not finite; a smaller learning rate may help")
        means = [value / (2 * len(task.positives)) for value in sums]
        saved.write(_file(folder, task.name), net.state_dict(), {**facts[task.name], "losses": means})
    (folder / runs.CHECKPOINT).unlink(missing_ok=True)
    return dict(zip(facts, training.nets, strict=True))  # type: ignore[arg-type]


def load(folder: str | os.PathLike[str], name: str, device: str | torch.device = "cpu") -> Localizer:
    """The network of class ``name`` that :func:`train` left in ``folder``."""
    path = _file(Path(folder), name)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: class {name} has no localization network in {folder}")
    tensors, _ = saved.read(path)
    return _of(tensors, device)


def losses(folder: str | os.PathLike[str], name: str) -> list[float]:
    """The mean loss of class ``name`` in each epoch of its training."""
    _, facts = saved.read(_file(Path(folder), name))
    found: list[float] = facts["losses"]
    return found


def _of(tensors: Mapping[str, Tensor], device: str | torch.device) -> Localizer:
    with torch.device("meta"):
        net = Localizer(tensors["w1"].shape[1], tensors["w1"].shape[0])
    net.load_state_dict(tensors, assign=True)
    return net.to(device)


def _file(folder: Path, name: str) -> Path:
    return folder / f"{quote(name, safe=' ')}.safetensors"


def _facts(task: Task, channels: int, config: SegmentConfig, description: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: getattr(config, name) for name in ("loss", "localization_hidden", "localization_rates", "seed")}
    return runs.identity(task.identity(), {"channels": channels}, kept, description)


def _read(folder: Path, name: str, facts: Mapping[str, Any], device: torch.device, replace: bool) -> Localizer | None:
    path = _file(folder, name)
    if not path.exists():
        return None
    tensors, there = saved.read(path)
    there.pop("losses")
    if there != facts:
        if replace:
            return None
        lines = "\n  ".join(saved.differences(there, facts, ("positives", "negatives")))
        raise ValueError(f"{path} was trained otherwise:\n  {lines}\nAsk for the same, or choose another folder.")
    return _of(tensors, device)
