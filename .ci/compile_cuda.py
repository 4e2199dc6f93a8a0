"""Compile every CUDA kernel for sm_80 and sm_90, without a GPU, and hold what comes out against a file.

    python .ci/compile_cuda.py           fails where something is wrong or has become worse
    python .ci/compile_cuda.py --write   writes the file anew

Of each kernel: registers a thread, bytes spilled, bytes of shared memory. A problem is what does not compile, registers
spilled, fewer threads at once on a multiprocessor than before, and a kernel that is gone. Without nvcc nothing is done.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[1]
FACTS = Path(__file__).with_name("compiled_cuda.json")
ARCHITECTURES = (80, 90)
REGISTERS = 65536
"""Of a multiprocessor, given out to warps of 32 threads by 8 a thread."""

FLAGS = ("-O3", "-std=c++17", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")
ENTRY = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:.*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
Facts = dict[str, dict[str, int]]


class Compiled(NamedTuple):
    facts: Facts
    errors: list[str]


def name_of(mangled: str) -> str:
    """``update_kernel<3>`` for what C++ makes of it."""
    name, argument = re.search(r"\d([a-z_]+_kernel)(?:IL\w*?E(\d+)E|E)", mangled).groups()
    return name if argument is None else f"{name}<{argument}>"


def facts_of(log: str, words: str) -> Facts:
    """Kernel and ``words`` → facts, from what ptxas -v says."""
    return {
        f"{name_of(entry['kernel'])} ({words})": {
            "registers": int(entry["registers"]),
            "spilled": int(entry["stores"]) + int(entry["loads"]),
            "shared": int(entry["shared"] or 0),
        }
        for part in re.split(r"(?=ptxas info\s+: Compiling)", log)
        if (entry := ENTRY.search(part))
    }


def compile_source(nvcc: str, source: Path, architecture: int) -> Compiled:
    words = f"{source.stem}, sm_{architecture}"
    headers = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *headers, f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", str(source)]
        done = subprocess.run([*command, "-o", f"{folder}/cubin"], capture_output=True, text=True)
    log = done.stdout + done.stderr
    if done.returncode:
        error = next((line for line in log.splitlines() if "error" in line), f"nvcc ended with {done.returncode}")
        return Compiled({}, [f"{words} does not compile: {error}"])
    return Compiled(facts_of(log, words), [])


def threads_at_once(registers: int) -> int:
    """How many threads' registers a multiprocessor has, in warps."""
    return REGISTERS // (32 * -(-registers // 8) * 8) * 32


def problems(found: Facts, before: Facts) -> list[str]:
    """What is wrong, or worse than before, each in one line with the kernel."""
    lines = []
    for kernel, facts in found.items():
        if facts["spilled"]:
            lines.append(f"{kernel} spills {facts['spilled']} bytes of registers")
        old = before.get(kernel, facts)["registers"]
        if threads_at_once(facts["registers"]) < threads_at_once(old):
            lines.append(f"{kernel} needs {facts['registers']} registers, before {old}: fewer threads at once")
    return lines + [f"{kernel} is gone; `--write` if that is meant" for kernel in before if kernel not in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FACTS.name} anew")
    arguments = parser.parse_args()
    home = os.environ.get("CUDA_HOME")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc")
    if nvcc is None:
        print("There is no nvcc: the CUDA kernels were not compiled.")
        return 0
    start = time.monotonic()
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(compile_source, nvcc, source, arch) for source in sources for arch in ARCHITECTURES]
        results = [job.result() for job in jobs]
    found = {kernel: facts for result in results for kernel, facts in result.facts.items()}
    before = {} if arguments.write or not FACTS.exists() else json.loads(FACTS.read_text())
    lines = [error for result in results for error in result.errors] + problems(found, before)
    if arguments.write:
        FACTS.write_text(json.dumps(found, indent=1) + "\n")
    print(*lines, sep="\n")
    print(f"{len(found)} CUDA kernels in {time.monotonic() - start:.0f} s: {len(lines)} problems")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
