"""What the tests of the benchmarks share."""

import pytest
import torch

from moe_kernels.benchmarks import limits


@pytest.fixture
def uncompiled(monkeypatch):
    """``torch.compile`` leaves functions as they are: compiling every candidate takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture(scope="session")
def probes():
    return limits.probes(torch.device("cpu"), torch.float32, quick=True)
