"""One training run of domain generalization: a model, domains to train on, domains held out, and a history.

The run is a function of its configuration alone. Step ``s`` draws its batch, the augmentation of each image
and the generator that router noise and dropout use from (run seed, ``s``), and the learning rate is a
function of ``s``; so there is no sampler, scheduler or generator state to lose, the number of loader workers
changes nothing, and a run that was killed and resumed ends with the same bits as one that was not (on the
same device, for the same number of threads and ranks; on a GPU as far as its kernels are deterministic).

A run's folder holds ``checkpoint.pt`` while it trains, ``selected.pt`` (the weights that training-domain
validation selects) and, once finished, ``result.json``. A finished run is not repeated.

Under ``torchrun`` every rank takes its share of each domain's batch (DistributedDataParallel), metrics are
summed over ranks, rank 0 writes. The auxiliary loss is that of the rank's own tokens.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from moe_kernels.nn import MoE, auxiliary_loss

from .. import distributed, files, runs
from ..data import batches
from ..data.domains import Domains, ImageDataset
from ..data.splits import seed_hash, split
from ..evaluation import accuracy, autocast

SELECTED = "selected.pt"


@dataclass(frozen=True)
class TrainConfig:
    """What a run computes; the defaults are GMoE's for PACS and VLCS.

    Args:
        held_out: names of the domains that are not trained on.
        trial: seed of the 80/20 splits, the order of the data, the new head and the noise.
        steps: optimizer steps. After step ``s`` (from 0) with ``s % eval_every == 0``, and after the last,
            accuracies are measured.
        batch_per_domain: images of each training domain in a step, over all ranks, drawn with replacement.
        schedule: ``"constant"``, or ``"cosine"`` to zero; before it ``warmup_steps`` of linear warm-up.
        auxiliary_weight: weight of :func:`moe_kernels.nn.auxiliary_loss`, which a dense model does not have.
        holdout: share of each domain that is split off for validation.
        eval_batch: images in an evaluation batch (with an expert capacity, predictions depend on it).
        precision: ``"bfloat16"`` runs the model under autocast.
    """

    held_out: tuple[str, ...] = ()
    trial: int = 0
    steps: int = 5001
    eval_every: int = 300
    batch_per_domain: int = 32
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 3e-5
    weight_decay: float = 1e-6
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    auxiliary_weight: float = 0.01
    holdout: float = 0.2
    eval_batch: int = 64
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "batch_per_domain", "eval_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("trial", "warmup_steps", "learning_rate", "weight_decay", "auxiliary_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 < self.holdout < 1:
            raise ValueError(f"holdout must be between 0 and 1, got {self.holdout}")
        for name, valid in (
            ("optimizer", ("adam", "adamw")),
            ("schedule", ("constant", "cosine")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of ``step``."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class StepBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item ``s`` is this rank's share of the batch of step ``s``: images (B, 3, H, W) and labels (B,).

    Every image is drawn and augmented from its own seed, so neither workers nor ranks change which images a
    step sees.
    """

    def __init__(
        self, domains: Sequence[tuple[ImageDataset, np.ndarray]], batch_per_domain: int, steps: int, seed: int
    ) -> None:
        self.rank, self.world = distributed.rank(), distributed.world()
        if batch_per_domain % self.world:
            raise ValueError(f"batch_per_domain must be a multiple of the {self.world} ranks, got {batch_per_domain}")
        self.domains, self.batch, self.steps, self.seed = domains, batch_per_domain, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        draw = np.random.default_rng((self.seed, step))
        mine = slice(self.rank, None, self.world)
        items = []
        for dataset, kept in self.domains:
            chosen = kept[draw.integers(len(kept), size=self.batch)]
            seeds = draw.integers(2**31, size=self.batch)
            items += [(dataset, index, seed) for index, seed in zip(chosen[mine], seeds[mine], strict=True)]
        return batches.load(items)


def train(
    build: Callable[[], nn.Module],
    data: Domains,
    config: TrainConfig,
    folder: str | os.PathLike[str],
    *,
    description: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    checkpoint_share: float = 0.015,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train, or resume, or read back, the run of ``folder``.

    Args:
        build: makes the model on the CPU, its output one logit per class; called with torch's generator
            seeded for the run, and not at all when the run is finished.
        data: the domains; those of ``config.held_out`` are only evaluated on.
        folder: the run's own folder. One process group at a time.
        description: more of what identifies the run (the model's name, say), plain JSON. It and ``config``
            must be those of what the folder holds.
        workers: loader processes a rank; 0 loads in this process.
        checkpoint_share: largest share of the time that writing checkpoints may take; the first is written
            after the first step, to learn what it costs.
        on_step: called with the number of finished steps, at the start too.

    Returns:
        The content of ``result.json``: ``run`` (the configuration), ``history`` (one entry an evaluation:
        ``step``, mean ``loss`` and ``auxiliary`` since the last, ``accuracy`` per domain
        and split, ``validation``, ``test``) and ``selected``, the entry with the best ``validation``, the
        earliest of equals. ``validation`` is the mean accuracy on the training domains' held-out fifth;
        ``test`` the mean over held-out domains on the other four fifths of theirs, as in DomainBed (null
        where nothing is held out).

    Raises:
        ValueError: an unknown domain (the valid ones are listed), or a folder of another configuration (the
            differences are listed).
        RuntimeError: the loss is not finite, or another process works in the folder.
    """
    folder = Path(folder)
    device = torch.device(device)
    config = replace(config, held_out=tuple(data.domains[data.index(name)] for name in config.held_out))
    run = _identity(data, config, description)
    on_step = on_step or (lambda step: None)
    with runs.opened(folder, run, device) as (result, checkpoint):
        if result is None:
            torch.manual_seed(_seed(data, config))
            training = _Training(build().to(device), data, config, device, workers)
            if checkpoint is not None:
                training.restore(checkpoint)
            start = 0 if checkpoint is None else checkpoint["step"]
            result = _train(training, start, folder, run, checkpoint_share, on_step)
        on_step(config.steps)
    return result


def _identity(data: Domains, config: TrainConfig, description: Mapping[str, Any] | None) -> dict[str, Any]:
    if len(set(config.held_out)) != len(config.held_out):
        raise ValueError(f"held_out must not name a domain twice, got {', '.join(config.held_out)}")
    if set(config.held_out) == set(data.domains):
        raise ValueError(f"held_out must leave a domain to train on, got all of {', '.join(data.domains)}")
    facts = {
        "data": data.name,
        "classes": data.classes,
        "images": dict(zip(data.domains, (len(part) for part in data.evaluation), strict=True)),  # type: ignore[arg-type]
    }
    return runs.identity(facts, asdict(config), description or {})


class _Training:
    """What changes while a run trains, and what is done to it."""

    def __init__(
        self, model: nn.Module, data: Domains, config: TrainConfig, device: torch.device, workers: int
    ) -> None:
        self.model, self.data, self.config, self.device, self.workers = model, data, config, device, workers
        self.parts = _parts(data, config)
        self.sparse = any(isinstance(module, MoE) for module in model.modules())
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
        self.optimizer = kind(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
        self.history: list[dict[str, Any]] = []
        # cross entropy, auxiliary loss and steps since the last entry of the history
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def state(self) -> dict[str, Any]:
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"model": model, "optimizer": optimizer, "history": self.history, "sums": self.sums}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]
        self.sums.copy_(state["sums"])

    def batches(self, seed: int, start: int) -> DataLoader[tuple[Tensor, Tensor]]:
        """The batches of the steps from ``start``."""
        kept = [
            (self.data.train[index], self.parts[name][0])
            for index, name in enumerate(self.data.domains)
            if name not in self.config.held_out
        ]
        return DataLoader(
            StepBatches(kept, self.config.batch_per_domain, self.config.steps, seed),
            batch_size=None,
            sampler=range(start, self.config.steps),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )

    def update(self, network: nn.Module, step: int, images: Tensor, labels: Tensor) -> None:
        """One optimizer step; ``network`` is the model, or what runs it over several ranks."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step)
        self.optimizer.zero_grad()
        with autocast(self.device, self.config.precision):
            logits = network(images.to(self.device, non_blocking=True))
        loss = cross_entropy(logits.float(), labels.to(self.device, non_blocking=True))
        auxiliary = auxiliary_loss(self.model) if self.sparse else torch.zeros_like(loss)
        (loss + self.config.auxiliary_weight * auxiliary).backward()
        self.optimizer.step()
        self.sums += torch.stack((loss.detach(), auxiliary.detach().float(), torch.ones_like(loss)))

    def evaluate(self, step: int) -> bool:
        """Append to the history; true where its validation accuracy is the best so far."""
        loss, auxiliary, count = distributed.sum_(self.sums.clone()).tolist()
        if not math.isfinite(loss + auxiliary):
            raise RuntimeError(
                f"the loss is not finite by step {step} (cross entropy {loss / count}, auxiliary loss "
                f"{auxiliary / count}); a smaller learning rate may help"
            )
        best = max((entry["validation"] for entry in self.history), default=-1.0)
        entry = {"step": step, "loss": loss / count, "auxiliary": auxiliary / count} | self._accuracies()
        self.history.append(entry)
        self.sums.zero_()
        return bool(entry["validation"] > best)

    def _accuracies(self) -> dict[str, Any]:
        measured: dict[str, dict[str, float]] = {}
        for index, name in enumerate(self.data.domains):
            kept, out = self.parts[name]
            # accuracy on what was trained on says nothing here, and those are most of the images
            halves = {"in": kept, "out": out} if name in self.config.held_out else {"out": out}
            measured[name] = {
                half: accuracy(
                    self.model,
                    self.data.evaluation[index],
                    indices,
                    batch=self.config.eval_batch,
                    workers=self.workers,
                    precision=self.config.precision,
                )
                for half, indices in halves.items()
            }
        validation = [halves["out"] for name, halves in measured.items() if name not in self.config.held_out]
        test = [measured[name]["in"] for name in self.config.held_out]
        return {
            "accuracy": measured,
            "validation": sum(validation) / len(validation),
            "test": sum(test) / len(test) if test else None,
        }


def _train(
    training: _Training,
    start: int,
    folder: Path,
    run: dict[str, Any],
    checkpoint_share: float,
    on_step: Callable[[int], None],
) -> dict[str, Any]:
    """Train from step ``start`` to the end."""
    config, model = training.config, training.model
    network: nn.Module = model
    if distributed.world() > 1:
        network = DistributedDataParallel(model, [training.device] if training.device.type == "cuda" else None)
    seed = _seed(training.data, config)
    checkpoints = runs.Checkpoints(folder, checkpoint_share)
    on_step(start)
    network.train()
    for step, (images, labels) in enumerate(training.batches(seed, start), start):
        torch.manual_seed(seed_hash(seed, step, distributed.rank()))
        training.update(network, step, images, labels)
        last = step == config.steps - 1
        better = (step % config.eval_every == 0 or last) and training.evaluate(step)
        if better and distributed.rank() == 0:
            files.write_torch(folder / SELECTED, {"run": run, "step": step, "model": model.state_dict()})
        if not last:
            checkpoints.offer(lambda step=step: {"run": run, "step": step + 1, **training.state()})  # type: ignore[misc]
        on_step(step + 1)
    selected = max(training.history, key=lambda entry: entry["validation"])
    result = {"run": run, "history": training.history, "selected": selected}
    runs.finish(folder, result)
    return result


def _seed(data: Domains, config: TrainConfig) -> int:
    """The run's seed: of the domains and the trial, not of the model, so that models are compared on the same data."""
    return seed_hash(data.name, sorted(config.held_out), config.trial)


def _parts(data: Domains, config: TrainConfig) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The (in, out) indices of every domain; DomainBed splits the held-out ones too."""
    parts = {}
    for index, (name, items) in enumerate(zip(data.domains, data.evaluation, strict=True)):
        length = len(items)  # type: ignore[arg-type]
        kept, out = (np.asarray(half) for half in split(length, config.trial, index, config.holdout))
        if not len(kept) or not len(out):
            raise ValueError(f"domain {name} has {length} images, too few to split off {config.holdout:.0%}")
        parts[name] = kept, out
    return parts
