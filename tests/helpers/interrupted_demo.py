"""A demo in small, killed on its way: run as a script by tests/models/gmoe/test_demo.py, in a process of its own.

The script loads everything once and forks; every child runs the demo in its folder and is killed, or ends. It prints a
line of JSON for each child: how it ended and after how many seconds.

usage: interrupted_demo.py FOLDER SEED
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_kernels.models import files
from moe_kernels.models.data.domains import Domains
from moe_kernels.models.gmoe import demo
from moe_kernels.models.gmoe.trainer import TrainConfig
from moe_kernels.models.runs import CHECKPOINT

PLAN = demo.Plan(
    letters=104,
    pretraining=TrainConfig(steps=4, eval_every=2, batch_per_domain=8, optimizer="adamw", learning_rate=1e-3),
    training=TrainConfig(steps=5, eval_every=2, batch_per_domain=4, optimizer="adamw", learning_rate=1e-3),
    trials=1,
)


def shrink(data: Domains, length: int = 20) -> Domains:
    """The first images of each domain, and only two domains."""
    train, evaluation = (
        tuple(torch.utils.data.Subset(part, range(length)) for part in parts[:2])
        for parts in (data.train, data.evaluation)
    )
    for part in evaluation:
        part.labels = part.dataset.labels[:length]
    return replace(data, domains=data.domains[:2], train=train, evaluation=evaluation)


def prepare() -> None:
    """In place of the whole data set a small one, in place of pictures none, and a checkpoint as often
    as half of the time allows."""
    small = shrink(demo.digits.load())
    demo.digits.load = lambda: small
    for name in ("plot_curves", "plot_domains", "plot_routing"):
        setattr(demo.pictures, name, lambda *args, **kw: files.write_bytes(args[-1], b"a picture"))
    for name in ("train", "perform"):
        whole = getattr(demo, name)
        setattr(demo, name, lambda *args, whole=whole, **kw: whole(*args, **kw, checkpoint_share=1.0))


def die_inside_checkpoint(which: int) -> None:
    """Makes this process kill itself half-way through the bytes of its ``which``-th checkpoint."""
    save, count = torch.save, [0]

    def save_half(content: Any, file: Any) -> None:
        if not file.name.split("/")[-1].startswith(f".{CHECKPOINT}"):
            save(content, file)
            return
        count[0] += 1
        save(content, file)
        if count[0] == which:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    files.torch.save = save_half


def attempt(folder: Path, *, before: Callable[[], None] = lambda: None, kill_after: float | None = None) -> float:
    """One child; the seconds that it lived."""
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        before()
        demo.run(folder, PLAN, say=lambda line: None, progress=False)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seconds = time.monotonic() - begun
    print(json.dumps({"ended": ended, "seconds": seconds}), flush=True)
    return seconds


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    prepare()
    whole = attempt(folder / "whole")
    draw = random.Random(seed)
    attempt(folder / "parts", before=lambda: die_inside_checkpoint(3))
    for _ in range(3):
        attempt(folder / "parts", kill_after=draw.uniform(0.02, 0.25) * whole)
    attempt(folder / "parts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
