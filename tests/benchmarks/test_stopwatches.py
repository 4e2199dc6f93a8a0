"""Stopwatches: the wall clock with a clock that is made up, the replay of graphs with a CUDA that is."""

import pytest
import torch

from moe_kernels.benchmarks import stopwatches

CPU = torch.device("cpu")


def test_wall_clock_divides_by_the_calls():
    now = [0.0]

    def run():
        now[0] += 3.0
        return {}

    seconds = stopwatches.wall_clock(CPU, lambda: now[0])
    assert seconds(run, 1) == 3.0
    assert seconds(run, 4) == 3.0
    assert now == [15.0]


class FakeCuda:
    """Records what is asked of ``torch.cuda``; a replay takes two milliseconds."""

    def __init__(self):
        self.log, self.capturing, self.now = [], None, 0.0
        fake = self

        class Stream:
            def wait_stream(self, other):
                fake.log.append("wait")

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time = fake.now

            def elapsed_time(self, other):
                return other.time - self.time

        class CUDAGraph:
            def replay(self):
                fake.log.append(f"replay {self.held}")
                fake.now += 2.0

        class Context:
            def __init__(self, subject):
                self.subject = subject

            def __enter__(self):
                fake.capturing = self.subject if isinstance(self.subject, CUDAGraph) else None

            def __exit__(self, *_):
                fake.capturing = None

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph
        self.graph = self.stream = Context
        self.current_stream = Stream

    def synchronize(self):
        self.log.append("synchronize")

    def candidate(self, name):
        def run():
            if self.capturing:
                self.capturing.held = name
            self.log.append(f"run {name}")
            return {}

        return run


def test_graph_is_captured_once_after_a_warm_up_on_another_stream():
    cuda = FakeCuda()
    seconds = stopwatches.graph_replay(CPU, cuda)
    one, other = cuda.candidate("one"), cuda.candidate("other")
    assert seconds(one, 2) == pytest.approx(2e-3)
    assert cuda.log == [
        "wait",
        *["run one"] * 3,
        "wait",
        "synchronize",
        "run one",
        *["replay one", "synchronize"] * 2,
    ]
    cuda.log.clear()
    seconds(one, 1)
    assert cuda.log == ["replay one", "synchronize"]
    cuda.log.clear()
    assert seconds(other, 1) == pytest.approx(2e-3)
    assert cuda.log[-2:] == ["replay other", "synchronize"]


def test_candidate_that_cannot_be_captured_raises():
    cuda = FakeCuda()

    def run():
        if cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        stopwatches.graph_replay(CPU, cuda)(run, 1)


def test_cpu_caches_are_left_alone():
    assert stopwatches.cold_cache(CPU)() is None
