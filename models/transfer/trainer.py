"""One fine-tuning run: a pretrained model, a target task, a regularizer towards the source, and a history.

The run is a function of its configuration alone. Step ``s`` draws its batch, the augmentation of each image and the
generator that dropout uses from (run seed, ``s``), and learning rate and coefficient are functions of ``s``; so there
is no sampler, scheduler or generator state to lose, and a run that was killed and resumed ends with the same bits as
one that was not (on the same device, for the same number of threads and ranks; on a GPU as far as its kernels are
deterministic). The seed is of the task and ``config.seed``, not of the method: methods are compared on the same new
head and the same batches.

A run's folder holds ``checkpoint.pt`` while it trains, then ``final.pt`` (the last weights) and ``result.json``. A
finished run is not repeated, nor is one that diverged: its ``result.json`` says so.

With a regularizer in weight space (L2, L2-SP), its gradient is made in the optimizer's step. With one of features
(KnowDist, DELTA, attention transfer) the plain sum takes one backward of J + λΩ, and DTNH takes the gradients of both,
in two backwards of one forward.

Under ``torchrun`` every rank takes its share of the batch, and gradients are averaged before they are projected: by
DistributedDataParallel where there is one backward, in two flat buffers where there are two. Batch normalization sees
the rank's own images, and rank 0's running statistics count: they are what is tested and saved.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from moe_kernels.optim import AnchoredSGD

from .. import distributed, files, runs
from ..data import batches
from ..data.domains import ImageDataset
from ..data.images import some
from ..data.splits import seed_hash
from ..evaluation import accuracy_and_loss, autocast, logits_of
from .configuration import FineTuneConfig
from .data import Target
from .feature_space import DELTA, NotFinite

FINAL = "final.pt"


class Diverged(RuntimeError):
    """A loss is not finite. The run is not repeated."""


class StepBatches(Dataset[tuple[Tensor, Tensor]]):
    """Item ``s`` is this rank's share of the batch of step ``s``: images (B, C, H, W) and labels (B,).

    The batches are cut, one after the other, from the images in a new order for each epoch. Every image is augmented
    from its own seed, so neither workers nor ranks change what a step sees.
    """

    def __init__(self, dataset: ImageDataset, batch: int, steps: int, seed: int) -> None:
        self.rank, self.world = distributed.rank(), distributed.world()
        if batch % self.world:
            raise ValueError(f"batch must be a multiple of the {self.world} ranks, got {batch}")
        self.dataset, self.batch, self.steps, self.seed = dataset, batch, steps, seed

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        seeds = np.random.default_rng((self.seed, 0, step)).integers(2**31, size=self.batch)
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, places = np.divmod(places, len(self.dataset))
        chosen = np.empty(self.batch, np.int64)
        for epoch in np.unique(epochs):
            order = np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.dataset))
            chosen[epochs == epoch] = order[places[epochs == epoch]]
        mine = slice(self.rank, None, self.world)
        return batches.load((self.dataset, index, seed) for index, seed in zip(chosen[mine], seeds[mine], strict=True))


def identity(data: Target, config: FineTuneConfig, description: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What identifies a run of this process group: ``run`` in what :func:`finetune` gives."""
    facts = {"data": data.name, "classes": data.classes, "train": len(data.train), "test": len(data.test)}
    whole = {"target": data.identity, "ranks": distributed.world()}
    return runs.identity(facts, whole, config.identity(), description or {})


def finetune(
    build: Callable[[], nn.Module],
    data: Target,
    config: FineTuneConfig,
    folder: str | os.PathLike[str],
    *,
    description: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    workers: int = 0,
    checkpoint_share: float = 0.015,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune, or resume, or read back, the run of ``folder``.

    Args:
        build: makes the model on the CPU with the source's weights and a new head, its output one logit per class (a
            tensor, the first of a tuple, or ``.logits`` of a transformers output); called with torch's generator
            seeded for the run, and not at all when the run is finished.
        folder: the run's own folder. One process group at a time.
        description: more of what identifies the run (``source``, ``model``, a digest of the weights), plain JSON. It,
            ``data.identity``, ``config`` and the number of ranks must be those of what the folder holds.
        workers: loader processes a rank; 0 loads in this process.
        checkpoint_share: largest share of the time that writing checkpoints may take; the first is written after the
            first step, to learn what it costs.
        on_step: called with the number of finished steps, at the start too.

    Returns:
        The content of ``result.json``: ``run`` (:func:`identity`), ``history`` and ``final``, its last entry. An entry
        has ``step`` (how many are done), ``empirical_loss`` (the data term of the batches since the last entry, mean),
        ``regularizer`` (Ω: in weight space at this step, of features the mean since the last entry), ``coefficient`` (λ
        of this step), ``test_loss`` and ``test_accuracy``, and, as means over the steps since the last entry,
        ``angle_to_loss`` and ``angle_to_regularizer`` (of the direction stepped along, in degrees: the paper's angles 1
        and 2 of a DTNH run, 3 and 4 of an L2-SP run), ``conflict_rate`` and ``cosine`` (of the two gradients) and
        ``scale`` (a in d = a g + λ r). What a method does not have is null; over several segments (``scope``) facts are
        averaged.

    Raises:
        ValueError: a folder of another configuration (the differences are listed); layers, head or scope that do not
            fit the model; a model that has not one logit a class, nothing to train, or weights that are not finite.
        Diverged: the loss is not finite, now or when the folder was written. Its ``result.json`` then has ``final``
            ``null`` and the message under ``diverged``.
        RuntimeError: another process works in the folder.
    """
    folder, device = Path(folder), torch.device(device)
    run = identity(data, config, description)
    on_step = on_step or (lambda step: None)
    with runs.opened(folder, run, device) as (result, checkpoint):
        if result is None:
            torch.manual_seed(_seed(data, config))
            training = _Training(build().to(device), data, config, device, workers)
            try:
                if checkpoint is not None:
                    training.restore(checkpoint)
                start = 0 if checkpoint is None else checkpoint["step"]
                result = _train(training, start, folder, run, checkpoint_share, on_step)
            except Diverged as error:
                result = {"run": run, "history": training.history, "final": None, "diverged": str(error)}
                runs.finish(folder, result)
            finally:
                training.close()
        on_step(config.steps)
    if result["final"] is None:
        raise Diverged(result["diverged"])
    return result


def _seed(data: Target, config: FineTuneConfig) -> int:
    return seed_hash("transfer", data.name, config.seed)


_FACTS = ("angle_to_loss", "angle_to_regularizer", "conflict_rate", "cosine", "scale")


class _Training:
    """What changes while a run trains, and what is done to it."""

    def __init__(
        self, model: nn.Module, data: Target, config: FineTuneConfig, device: torch.device, workers: int
    ) -> None:
        self.model, self.data, self.config, self.device, self.workers = model, data, config, device, workers
        self.seed = _seed(data, config)
        self.named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not self.named:
            raise ValueError(f"build: expected a model to train, all parameters of {type(model).__name__} are frozen")
        broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
        broken += [name for name, buffer in model.named_buffers() if buffer.isnan().any()]  # masks may hold −∞
        if broken:
            raise ValueError(f"build: the model's weights are not finite in {some(broken)}")
        self.regularizer = config.regularizer()
        if self.regularizer is not None:
            self.regularizer.bind(model)
            if isinstance(self.regularizer, DELTA) and not self.regularizer.head:
                raise ValueError("head: delta weighs its channels with a new head trained alone, got none")
        self.features = self.regularizer is not None and self.regularizer.uses_features
        self.two_gradients = self.features and (config.dtnh or config.measure)
        self.projects = self.regularizer is not None and (not self.features or self.two_gradients)
        self.network: nn.Module = model
        if distributed.world() > 1 and not self.two_gradients:
            devices = [device] if device.type == "cuda" else None
            self.network = DistributedDataParallel(model, devices, broadcast_buffers=False)
        self.optimizer = self._optimizer()
        if not self.features:
            self.close()  # the optimizer has its own copies of the anchors
        self.history: list[dict[str, Any]] = []
        # since the last entry of the history: empirical loss, Ω of features and steps; the facts and how often there
        # was one of each
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.facts = torch.zeros(2, len(_FACTS), dtype=torch.float64, device=device)

    def close(self) -> None:
        if self.regularizer is not None:
            self.regularizer.close()

    def _optimizer(self) -> AnchoredSGD:
        decay = {} if self.regularizer is None else self.regularizer.decay()
        groups = [
            {"params": [pair for pair in self.named if decay.get(pair[0], 0.0) == value], "weight_decay": value}
            for value in sorted({decay.get(name, 0.0) for name, _ in self.named})
        ]
        return AnchoredSGD(
            groups,
            lr=self.config.learning_rate,
            momentum=self.config.momentum,
            anchor=self.regularizer.anchors() if self.regularizer is not None and not self.features else None,
            coefficient=self.config.initial_coefficient,
            rule=("dtnh" if self.config.dtnh else "l2sp") if self.projects else "none",
            scope=self.config.scope,
            anchored_only=self.config.anchored_only,
            measure=self.projects,
        )

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regularizer": {} if self.regularizer is None else self.regularizer.state_dict(),
            "history": self.history,
            "sums": self.sums,
            "facts": self.facts,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.regularizer is not None:
            self.regularizer.load_state_dict(state["regularizer"])
        self.history = state["history"]
        self.sums.copy_(state["sums"])
        self.facts.copy_(state["facts"])

    def batches(self, start: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the steps from ``start``, on the device."""
        loader = DataLoader(
            StepBatches(self.data.train, self.config.batch, steps, seed),
            batch_size=None,
            sampler=range(start, steps),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        for images, labels in loader:
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def update(self, step: int, images: Tensor, labels: Tensor) -> None:
        """One optimizer step."""
        coefficient = self.config.coefficient_at(step, len(self.data.train))
        for group in self.optimizer.param_groups:
            group["lr"], group["coefficient"] = self.config.learning_rate_at(step), coefficient
        self.optimizer.zero_grad()
        with autocast(self.device, self.config.precision):
            output = self._forward(images)
        loss = self._loss(output, labels)
        penalty = self.regularizer.penalty() if self.regularizer is not None and self.features else None
        if penalty is not None and not penalty.requires_grad:
            raise ValueError(f"method {self.config.name!r}: no parameter that is trained changes its penalty")
        if penalty is None:
            loss.backward()
            self.optimizer.step()
        elif self.two_gradients:
            self.optimizer.step(regularizer_grads=self._two_backwards(loss, penalty))
        else:
            (loss + coefficient * penalty).backward()
            self.optimizer.step()
        omega = torch.zeros_like(loss) if penalty is None else penalty.detach().to(loss)
        self.sums += torch.stack((loss.detach(), omega, torch.ones_like(loss)))
        if self.projects:
            self._note_facts()

    def _forward(self, images: Tensor) -> Any:
        try:
            return self.network(images)
        except ValueError as error:  # such as batch normalization of a single image
            raise ValueError(f"the model refuses a batch of shape {tuple(images.shape)}: {error}") from error

    def _loss(self, output: Any, labels: Tensor) -> Tensor:
        """The empirical loss, of what the model gives."""
        logits, expected = logits_of(output), (len(labels), len(self.data.classes))
        if logits.shape != expected:
            raise ValueError(f"build: expected a model that gives logits {expected}, got {tuple(logits.shape)}")
        return cross_entropy(logits.float(), labels)

    def _two_backwards(self, loss: Tensor, penalty: Tensor) -> dict[str, Tensor | None]:
        """Sets the gradients of the loss and gives the penalty's by name; each is the mean over ranks."""
        parameters = [parameter for _, parameter in self.named]
        ours = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(penalty, parameters, allow_unused=True)
        for gradients in (ours, theirs):
            distributed.mean_(gradient for gradient in gradients if gradient is not None)
        for parameter, gradient in zip(parameters, ours, strict=True):
            parameter.grad = gradient
        return {name: gradient for (name, _), gradient in zip(self.named, theirs, strict=True)}

    def _note_facts(self) -> None:
        facts = self.optimizer.facts()
        means = [facts.direction_to_loss, facts.direction_to_regularizer, facts.cosine < 0, facts.cosine, facts.scale]
        values = torch.stack([mean.double().nanmean() for mean in means])
        self.facts += torch.stack((values.nan_to_num(), ~values.isnan()))

    def evaluate(self, done: int) -> None:
        """Append to the history, ``done`` steps being done."""
        loss, penalty, count = distributed.sum_(self.sums.clone()).tolist()
        if not math.isfinite(loss + penalty):
            omega = f", regularizer {penalty / count}" if self.features else ""
            raise self._diverged(f"the loss is not finite by step {done} (empirical loss {loss / count}{omega})")
        distributed.broadcast_(self.model.buffers())
        facts = [total / times if times else None for total, times in self.facts.T.tolist()]
        right, test_loss = accuracy_and_loss(
            self.model,
            self.data.test,
            batch=self.config.eval_batch,
            workers=self.workers,
            precision=self.config.precision,
        )
        omega = penalty / count if self.features else self._distance()
        if not math.isfinite(test_loss):
            raise self._diverged(f"the loss on the test set is not finite after {done} steps ({test_loss})")
        self.history.append(
            {
                "step": done,
                "empirical_loss": loss / count,
                "regularizer": omega,
                "coefficient": self.config.coefficient_at(done - 1, len(self.data.train)),
                "test_loss": test_loss,
                "test_accuracy": right,
                **dict(zip(_FACTS, facts, strict=True)),
            }
        )
        self.sums.zero_()
        self.facts.zero_()

    def _diverged(self, what: str) -> Diverged:
        coefficient = self.config.initial_coefficient
        of_it = f" or a coefficient below {coefficient:g}, such as cross-validation finds," if coefficient else ""
        return Diverged(f"{what}; a learning rate below {self.config.learning_rate:g}{of_it} may help")

    def _distance(self) -> float | None:
        """Ω of a regularizer in weight space: ‖w − w₀‖² over what has an anchor."""
        anchored = [(weight, self.optimizer.state[weight].get("anchor")) for _, weight in self.named]
        with torch.no_grad():
            squares = [(w - w0).double().square().sum() for w, w0 in anchored if w0 is not None]
        return float(sum(squares)) if squares else None

    def prepare(self) -> None:
        """What has to be known before the first step: DELTA's channel weights.

        They are estimated on a copy of the model whose head alone was trained; the training itself starts from the new
        head, as without.
        """
        delta = self.regularizer
        if not isinstance(delta, DELTA):
            return
        model, config = copy.deepcopy(self.model), self.config
        head = [parameter for name, parameter in model.named_parameters() if name in delta.head]
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in head:
            parameter.requires_grad_(True)
        optimizer = torch.optim.SGD(head, lr=config.learning_rate, momentum=config.momentum)
        model.eval()
        steps = math.ceil(config.head_epochs * len(self.data.train) / config.batch)
        seed = seed_hash(self.seed, "head")
        for images, labels in _bar(steps, "delta: the head alone", self.batches(0, steps, seed)):
            optimizer.zero_grad()
            self._loss(model(images), labels).backward()
            distributed.mean_(parameter.grad for parameter in head if parameter.grad is not None)
            optimizer.step()
        with _bar(0, "delta: channels") as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            try:
                delta.estimate(model, self.batches(steps, steps + config.estimate_batches, seed), self._loss, show)
            except NotFinite as error:
                raise self._diverged(f"with the head that delta trains alone, {error}") from error


def _bar(total: int, what: str, items: Iterable[Any] | None = None) -> Any:
    """Of what comes before the first step; gone when that is done."""
    return tqdm(items, total=total, desc=what, leave=False, disable=None if distributed.rank() == 0 else True)


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
    checkpoints = runs.Checkpoints(folder, checkpoint_share)
    on_step(start)
    if start == 0:
        training.prepare()
    training.network.train()
    for step, (images, labels) in enumerate(training.batches(start, config.steps, training.seed), start):
        torch.manual_seed(seed_hash(training.seed, step, distributed.rank()))
        training.update(step, images, labels)
        done = step + 1
        if done % config.eval_every == 0 or done == config.steps:
            training.evaluate(done)
        if done < config.steps:
            checkpoints.offer(lambda done=done: {"run": run, "step": done, **training.state()})  # type: ignore[misc]
        on_step(done)
    result = {"run": run, "history": training.history, "final": training.history[-1]}
    if distributed.rank() == 0:
        files.write_torch(folder / FINAL, {"run": run, "step": config.steps, "model": model.state_dict()})
    runs.finish(folder, result)
    return result
