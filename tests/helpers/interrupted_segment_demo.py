"""A segment demo in small, killed on its way: run as a script by tests/models/segmentation/test_demo.py, by itself.

The script forks; every child runs the demo in its folder and kills itself as it is about to put one of its files in its
place, or ends. It prints a line of JSON for each child: how it ended and how many files it wrote.

usage: interrupted_segment_demo.py FOLDER [FILE ...]
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch

from moe_kernels.models import files
from moe_kernels.models.segmentation import demo, pictures

QUICK = demo.plan(quick=True)
PLAN = replace(
    QUICK,
    letters=52,
    pretraining=replace(QUICK.pretraining, steps=2, eval_every=2, batch_per_domain=8),
    train=16,
    validation=2,
    more=2,
    more_validation=2,
    segmenter=replace(QUICK.segmenter, localization_hidden=16, hidden=16, samples=3),
    samples=(1, 3),
    size=32,
)


def attempt(folder: Path, last: int | None = None) -> None:
    """One child; ``last`` is the file after whose writing, and before whose appearance, it dies."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        replace_file, count = os.replace, 0

        def counted(*names: object) -> None:
            nonlocal count
            count += 1
            os.write(write, b".")
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)
            replace_file(*names)

        os.replace = counted
        demo.run(folder, PLAN, say=lambda line: None, progress=False)
        os._exit(0)
    os.close(write)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(read, "rb") as done:
        print(json.dumps({"ended": ended, "files": len(done.read())}), flush=True)


def main(folder: Path, instants: list[int]) -> None:
    torch.set_num_threads(1)
    pictures.plot_rows = lambda *arguments: files.write_bytes(arguments[-1], b"a picture")
    demo.demo_report.report.page = lambda *arguments: "a page"
    attempt(folder / "whole")
    for instant in instants:
        attempt(folder / "parts", instant)
    attempt(folder / "parts")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(instant) for instant in sys.argv[2:]])
