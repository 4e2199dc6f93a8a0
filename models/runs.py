"""A training run as a folder: what identifies it, what it left there, and when it writes.

A run is a function of its configuration. While it trains its folder holds ``checkpoint.pt``; once finished, it
holds ``result.json`` and is not repeated. Both carry the configuration under ``"run"``, and a folder of another
configuration is refused.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from . import distributed, files

CHECKPOINT, RESULT = "checkpoint.pt", "result.json"


def identity(*facts: Mapping[str, Any]) -> dict[str, Any]:
    """The ``facts`` (plain JSON) in one, as they come back from a file: tuples are lists."""
    merged: dict[str, Any] = {}
    for some in facts:
        merged |= some
    plain: dict[str, Any] = json.loads(json.dumps(merged))
    return plain


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], within: str = "") -> list[str]:
    """One line for each key on which two configurations differ; ``within`` is what stands before the keys."""
    lines = []
    for key in sorted({*theirs, *ours}):
        there, here = (side.get(key) for side in (theirs, ours))
        if isinstance(there, dict) and isinstance(here, dict):
            lines += differences(there, here, f"{within}{key}.")
            continue
        told, asked = (repr(side[key]) if key in side else "nothing" for side in (theirs, ours))
        if told != asked:
            lines.append(f"{within}{key}: {told} there, {asked} here")
    return lines


def read(folder: Path, run: Mapping[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The finished result and the checkpoint of ``folder``, whichever there is; the leftovers of a killed run go.

    Raises:
        ValueError: it is of another configuration than ``run``; the differences are listed.
    """
    files.remove_leftovers(folder)
    result = files.read_json(folder / RESULT) if (folder / RESULT).exists() else None
    checkpoint = files.read_torch(folder / CHECKPOINT) if (folder / CHECKPOINT).exists() else None
    for name, found in ((RESULT, result), (CHECKPOINT, checkpoint)):
        if found is not None and found.get("run") != run:
            lines = "\n  ".join(differences(found.get("run") or {}, run))
            raise ValueError(
                f"{folder / name} is of another configuration:\n  {lines}\n"
                "Ask for the same, choose another folder, or delete this one."
            )
    if result is not None and checkpoint is not None:
        (folder / CHECKPOINT).unlink()
        checkpoint = None
    return result, checkpoint


@contextmanager
def opened(
    folder: Path, run: Mapping[str, Any], device: torch.device
) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """:func:`read` of ``folder``, the same on every rank, which is this process group's for the length of the block.

    torch's generators are as before when the block ends.

    Raises:
        ValueError: ``folder`` is of another configuration.
        RuntimeError: another process works in it.
    """
    with (
        files.lock(folder) if distributed.rank() == 0 else nullcontext(),
        torch.random.fork_rng([device] if device.type == "cuda" else []),
    ):
        yield distributed.agree(read(folder, run) if distributed.rank() == 0 else None)
        distributed.barrier()


def finish(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a run; its checkpoint goes."""
    if distributed.rank() == 0:
        files.write_json(folder / RESULT, result)
        (folder / CHECKPOINT).unlink(missing_ok=True)


class Checkpoints:
    """Writes the checkpoints of a run, on rank 0, so often that they take ``share`` of the time at most.

    The first is written when first asked for, to learn what it costs.
    """

    def __init__(self, folder: Path, share: float) -> None:
        self.path, self.share, self.due = folder / CHECKPOINT, share, time.monotonic()

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write what ``state`` gives if it is time."""
        if distributed.rank() == 0 and time.monotonic() >= self.due:
            begun = time.monotonic()
            files.write_torch(self.path, state())
            now = time.monotonic()
            self.due = now + (now - begun) / self.share
