"""A tiny target task and networks to fine-tune, for tests of what trains them."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels.models import distributed, files
from moe_kernels.models.transfer.configuration import FineTuneConfig
from moe_kernels.models.transfer.data import Target, from_tensors
from moe_kernels.models.transfer.trainer import finetune

CLASSES = ("circle", "cross", "square")
CONFIG = FineTuneConfig(steps=10, batch=8, eval_every=4, head_epochs=1, estimate_batches=1)
# in the range where they are felt, on networks as small as these
FELT = {"l2": 0.01, "l2-sp": 0.1, "know-dist": 0.1, "delta": 0.5, "attention-transfer": 0.5}


def config(method: str, dtnh: bool = False, **changes: Any) -> FineTuneConfig:
    return replace(CONFIG, method=method, dtnh=dtnh, coefficient=FELT.get(method), **changes)


class Interrupted(Exception):
    pass


def interrupt_after(last: int):
    def on_step(step: int) -> None:
        if step == last:
            raise Interrupted

    return on_step


def toy_target(length: int = 30, name: str = "toy") -> Target:
    """Noise around one 8×8 pattern for each class; a margin of a pixel is cropped at random."""
    draw = torch.Generator().manual_seed(7)
    patterns = torch.randn(len(CLASSES), 3, 10, 10, generator=draw)
    parts = []
    for _ in range(2):
        labels = torch.arange(length) % len(CLASSES)
        parts.append((patterns[labels] + 0.5 * torch.randn(length, 3, 10, 10, generator=draw), labels))
    return from_tensors(name, CLASSES, *parts, crop=8)


class Block(nn.Module):
    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm = norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.conv1(x).relu()))


class ToyNet(nn.Module):
    """A residual network of two stages, named as a ResNet's."""

    def __init__(self, norm: type[nn.Module] = nn.Identity, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.layer1 = nn.Sequential(Block(6, norm))
        self.layer2 = nn.Sequential(Block(6, norm))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(6 * 4, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        features = self.layer2(self.layer1(self.conv1(images).relu()))
        return self.fc(self.dropout(nn.functional.adaptive_avg_pool2d(features, 2).flatten(1)))


def pretrained(**options: object) -> ToyNet:
    """The source's weights, always the same, under a new head from torch's generator."""
    model = ToyNet(**options)
    state = torch.random.get_rng_state()
    torch.manual_seed(123)
    source = {name: value for name, value in ToyNet(**options).state_dict().items() if not name.startswith("fc.")}
    torch.random.set_rng_state(state)
    model.load_state_dict(source, strict=False)
    return model


def batch_norm_net() -> ToyNet:
    """With everything that has a state or draws random numbers."""
    return pretrained(norm=nn.BatchNorm2d, dropout=0.2)


def tune_as_rank(rank: int, port: int, configs: dict[str, FineTuneConfig], out: str) -> None:
    """One of two processes that train together; here because a spawned process cannot import a test module."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.process_group("cpu"):
        for name, config in configs.items():
            build = batch_norm_net if name.startswith("batch norm") else pretrained
            result = finetune(build, toy_target(), config, Path(out) / name)
            files.write_json(Path(out) / f"{name} rank{rank}.json", result)


def tune_and_die(rank: int, config: FineTuneConfig, folder: str, writes: int) -> None:
    """Fine-tunes until it kills itself half-way through the bytes of checkpoint number ``writes``."""
    torch.set_num_threads(1)
    save, count = torch.save, [0]

    def save_half(content: object, file: Any) -> None:
        save(content, file)
        count[0] += 1
        if count[0] == writes:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    files.torch.save = save_half
    finetune(batch_norm_net, toy_target(), config, folder, checkpoint_share=1e9)
