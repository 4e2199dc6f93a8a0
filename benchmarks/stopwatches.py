"""How long a candidate takes: by the wall clock, or on a GPU by replaying its CUDA graph.

The wall clock counts what a caller waits for: Python, launches and the device's work. A graph's replay leaves only the
last of these. On a GPU every call finds the caches cold, on a CPU as the call before it left them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from moe_kernels.benchmarks.candidates import Candidate

FLUSHED_BYTES = 2**28  # several times the level-2 cache of any GPU

Stopwatch = Callable[[Candidate, int], float]
"""Seconds a call, of a candidate that is called so many times."""


def cold_cache(device: torch.device) -> Callable[[], object]:
    """A function that takes a GPU's level-2 cache for itself; on a CPU it does nothing."""
    if device.type == "cpu":
        return lambda: None
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device).zero_


def wall_clock(device: torch.device, timer: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """What a caller waits for, the device's work included."""
    flush = cold_cache(device)

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    def seconds(run: Candidate, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            flush()
            wait()
            begun = timer()
            run()
            wait()
            total += timer() - begun
        return total / calls

    return seconds


def graph_replay(device: torch.device, cuda: Any = torch.cuda) -> Stopwatch:
    """The device's work alone: each candidate is captured once, its replays lie between two events.

    A candidate that cannot be captured, because it waits for the device or draws shapes from its data, raises a
    ``RuntimeError``. ``cuda`` is ``torch.cuda`` or something that behaves like it.
    """
    flush = cold_cache(device)
    graphs: dict[Candidate, Any] = {}

    def capture(run: Candidate) -> Any:
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):  # lazy set-up must be over before a capture
            for _ in range(3):
                run()
        cuda.current_stream().wait_stream(side)
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            run()
        return graph

    def seconds(run: Candidate, calls: int) -> float:
        if run not in graphs:
            graphs[run] = capture(run)
        total = 0.0
        for _ in range(calls):
            begun, ended = (cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            begun.record()
            graphs[run].replay()
            ended.record()
            cuda.synchronize()
            total += begun.elapsed_time(ended) / 1e3
        return total / calls

    return seconds


STOPWATCHES: dict[str, Callable[[torch.device], Stopwatch]] = {"wall": wall_clock, "graph": graph_replay}
