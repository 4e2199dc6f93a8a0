"""Fixtures of all tests."""

import os

import pytest
import torch
from hypothesis import settings

# Without a GPU the Triton kernels run in Triton's interpreter. Read where a kernel is defined, so set before any is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Memory that the C++ kernels keep for themselves holds NaN whenever it is taken. Read once, before the first call.
os.environ.setdefault("MOE_KERNELS_POISON", "1")

# The same examples at every run: a red test is a change of the code, not of the draw.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Memory that was not written holds NaN, in C++ too."""
    # On a GPU the references run on torch's kernels, some of which have no deterministic form.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_configure(config: pytest.Config) -> None:
    # Triton's interpreter with numpy >= 1.25: nothing that a test here could change.
    config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim > 0:DeprecationWarning:triton")
