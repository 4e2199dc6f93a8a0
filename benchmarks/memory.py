"""Peak memory of one call beyond inputs, parameters and gradients, by ``python -m moe_kernels.benchmarks.memory``.

Each candidate is weighed in a process of its own, so that it can hide nothing that it keeps. A tiny call loads the code
and starts the threads; then the case is made, what the process holds is read, the candidate is called twice, and what
it held at most is read. A compiled candidate is called once more before the first reading, for the compiler's own
memory is not the candidate's. Outputs count, and so do scratch and packed copies, whoever allocates them.

Gradients are subtracted from when on they are there: at the start of a backward that goes expert by expert there are
none yet. So a reading is taken, and the next one begun, whenever autograd hands over the gradient of a leaf; gradients
between which nothing was allocated came together.

On a CPU the kernel counts: the resident set (VmRSS) and its high-water mark (VmHWM), which writing 5 to
``/proc/self/clear_refs`` resets. malloc is told to give back every block above 64 KiB, so that no freed block is left
for the next call to take unseen. On a GPU torch's allocator counts.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from moe_kernels.benchmarks import registry
from moe_kernels.benchmarks.candidates import Candidate
from moe_kernels.benchmarks.harness import Case, Result
from moe_kernels.benchmarks.inductor import PREFIX
from moe_kernels.benchmarks.workloads import Workload

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_NOTHING = 2**20  # a resident set does not tell less


def peak_bytes(case: Case, candidate: str, device: torch.device) -> int:
    """The peak memory of ``candidate`` in a process of its own; a ``RuntimeError`` says why there is none."""
    request = {
        "operator": case.operator,
        "workload": dataclasses.asdict(case.workload),
        "direction": case.direction,
        "candidate": candidate,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }
    command = [sys.executable, "-m", "moe_kernels.benchmarks.memory", json.dumps(request)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | _MALLOC)
    if answer.returncode:
        raise RuntimeError((answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1])
    return int(answer.stdout.splitlines()[-1])


def weigh_rows(case: Case, result: Result, device: torch.device) -> None:
    """Add the peak memory to every row that has a speed, the bare one's aside."""
    for row in result.rows:
        if row.median is not None and row.candidate != case.bare:
            try:
                row.peak_bytes = peak_bytes(case, row.candidate, device)
            except RuntimeError as error:
                row.remarks.append(f"memory not measured: {error}")


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status, which are in KiB there."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


class Scale:
    """The most that this process holds beyond what it held at first, gradients that are there left out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.most = 0
        gc.collect()
        self._begin()
        self.before = self.now

    def _begin(self) -> None:
        """Begin a reading."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.now = torch.cuda.memory_allocated(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.now = _status("VmRSS")

    def _peak(self) -> int:
        """The most that was held since the reading began."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _status("VmHWM")

    def weigh(self, run: Candidate) -> None:
        """Call ``run`` and count what it holds meanwhile."""
        readings: list[tuple[int, int]] = []  # the peak, and the bytes of the gradients handed over at its end
        differentiate = torch.autograd.grad

        def hand_over(gradient: torch.Tensor) -> None:
            peak, bytes_ = self._peak(), gradient.nbytes
            if readings and peak - self.now < _NOTHING:
                peak, earlier = readings.pop()
                bytes_ += earlier
            readings.append((peak, bytes_))
            self._begin()

        def watched(outputs: Any, inputs: Sequence[torch.Tensor], *arguments: Any) -> Any:
            handles = [leaf.register_hook(hand_over) for leaf in inputs]
            try:
                return differentiate(outputs, inputs, *arguments)
            finally:
                for handle in handles:
                    handle.remove()

        self._begin()
        with mock.patch("torch.autograd.grad", watched):
            outputs = run()
        readings.append((self._peak(), 0))
        del outputs
        gradients = 0
        for peak, bytes_ in readings:
            gradients += bytes_
            self.most = max(self.most, peak - self.before - gradients)


def weigh(operator: str, workload: Workload, direction: str, candidate: str, device: torch.device) -> int:
    """The peak memory of a candidate, in this process, which has not called it before."""
    build = registry.BENCHMARKS[operator].build
    build(workload.tiny(), direction, device).candidates[candidate]()
    run = build(workload, direction, device).candidates[candidate]
    if candidate.startswith(PREFIX):
        torch.compiler.reset()
        run()
    scale = Scale(device)
    for _ in range(2):
        scale.weigh(run)
    return scale.most


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request.pop("threads"))
    kind = type(registry.BENCHMARKS[request["operator"]].quick[0])
    arguments = {**request, "workload": kind(**request["workload"]), "device": torch.device(request["device"])}
    print(weigh(**arguments))
