"""Fixtures of the tests of CUDA kernels."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """name → ``emulate_<name>.cpp``, the CPU's turn at a kernel; a vector at a wrong address ends the process."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"there is no C++ compiler ({compiler[0]})")

    def compiled(name: str) -> ctypes.CDLL:
        library = tmp_path_factory.mktemp("cuda") / f"{name}.so"
        flags = "-std=c++17 -O1 -shared -fPIC -pthread -Wno-unknown-pragmas"
        flags += " -fsanitize=undefined -fsanitize-undefined-trap-on-error"
        headers = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
        source = Path(__file__).with_name(f"emulate_{name}.cpp")
        subprocess.run([*compiler, *flags.split(), *headers, str(source), "-o", str(library)], check=True)
        return ctypes.CDLL(str(library))

    return compiled
