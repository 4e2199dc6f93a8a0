"""A transfer demo in small, killed on its way: run as a script by tests/models/transfer/test_demo.py, by itself.

The script forks; every child runs the demo in its folder and kills itself at one of its optimizer steps, or ends. It
prints a line of JSON for each child: how it ended and how many steps it did.

usage: interrupted_transfer_demo.py FOLDER STEP ...
"""

import json
import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from moe_kernels.models import files
from moe_kernels.models.transfer import demo, demo_report
from moe_kernels.optim import AnchoredSGD

PLAN = replace(
    demo.plan(1, quick=True),
    images=64,
    coefficients={"l2-sp": (0.5,), "know-dist": (2e-3,)},
    sources=("textures",),
)


def prepare() -> None:
    """A picture is its name, and a checkpoint is written after every step."""
    for place, name in (
        (demo_report, "plot_tasks"),
        *((demo_report.pictures, f"plot_{what}") for what in ("losses", "angles_to_loss", "angles_to_regularizer")),
    ):
        setattr(place, name, lambda *arguments: files.write_bytes(arguments[-1], b"a picture"))
    for place, name in ((demo, "finetune"), (demo.protocol, "perform")):
        setattr(place, name, partial(getattr(place, name), checkpoint_share=1e9))


def attempt(folder: Path, last: int | None = None) -> None:
    """One child; ``last`` is the step in the middle of which it dies."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        step = AnchoredSGD.step

        def counted(self: AnchoredSGD, *args: object, **options: object) -> object:
            done = step(self, *args, **options)
            os.write(write, b".")
            counted.steps += 1
            if counted.steps == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        counted.steps = 0
        AnchoredSGD.step = counted
        demo.run(folder, PLAN, say=lambda line: None, progress=False)
        os._exit(0)
    os.close(write)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(read, "rb") as done:
        print(json.dumps({"ended": ended, "steps": len(done.read())}), flush=True)


def main(folder: Path, instants: list[int]) -> None:
    torch.set_num_threads(1)
    prepare()
    attempt(folder / "whole")
    for step in instants:
        attempt(folder / "parts", step)
    attempt(folder / "parts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(step) for step in sys.argv[2:]])
