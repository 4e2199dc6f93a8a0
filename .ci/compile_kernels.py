"""Compile every Triton kernel for every shipped case, without a GPU, and hold what comes out against a file.

    python .ci/compile_kernels.py           fails where something is wrong or has become worse
    python .ci/compile_kernels.py --write   writes the file anew

The operators run on meta tensors, each launch is recorded with its types, constants, alignment and options as Triton
would specialize it, and every distinct one is compiled for sm_80 and sm_90. Of each: registers a thread, bytes spilled,
bytes of shared memory, tensor-core instructions. A problem is what does not compile, registers spilled, shared memory
that a multiprocessor does not have, tensor cores that are no longer used, and a kernel that is gone.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before the kernels are defined

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction
from triton.runtime.driver import driver

from moe_kernels.ops.expert_ffn import ACTIVATIONS
from moe_kernels.triton import dispatch, expert_ffn, expert_ffn_backward, hypercolumn, routing, routing_backward

FACTS = Path(__file__).with_name("compiled_kernels.json")
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that one program can have."""
TENSOR_CORES = re.compile(r"(wgmma)\.mma_async[\w.]*\.f32\.(\w+)\.|(mma)\.sync[\w.:]*\.f32\.(\w+)\.")


class Case(NamedTuple):
    """A shape class: T tokens, d and h features, p projected features, E experts, k choices."""

    name: str
    tokens: int
    dim: int
    hidden_dim: int
    projected_dim: int
    num_experts: int
    top_k: int
    dtypes: tuple[torch.dtype, ...]
    operators: tuple[str, ...] = ("routing", "dispatch", "expert_ffn")
    activations: tuple[str, ...] = ("gelu",)


FLOAT32, BFLOAT16 = (torch.float32,), (torch.bfloat16,)
ALL = (torch.bfloat16, torch.float16, torch.float32)
# All that a configuration is chosen by, once each: what differs in nothing but the number of tokens is one kernel.
CASES = (
    Case("gmoe", 18912, 384, 1536, 256, 6, 1, ALL),
    Case("gmoe, two choices", 18912, 384, 1536, 256, 6, 2, BFLOAT16, ("dispatch", "expert_ffn")),
    Case("gmoe, one image", 197, 384, 1536, 256, 6, 1, ALL, ("expert_ffn",)),
    Case("gmoe, eight images", 1576, 384, 1536, 256, 6, 1, ALL, ("expert_ffn",)),
    Case("large", 65536, 1024, 4096, 256, 32, 2, ALL),
    Case("many experts", 4096, 768, 3072, 256, 256, 2, BFLOAT16, ("routing", "dispatch")),
    Case("many experts", 4096, 768, 3072, 256, 256, 2, FLOAT32, ("routing",)),
    Case("odd", 1000, 50, 70, 30, 5, 2, ALL),
    Case("ones", 1, 1, 1, 1, 1, 1, BFLOAT16, activations=ACTIVATIONS),  # Triton makes constants of integers that are 1
)


class PyramidCase(NamedTuple):
    """Maps (C_l, H_l, W_l) of an image, the grid of their hypercolumns, and the outputs of a linear layer."""

    name: str
    maps: tuple[tuple[int, int, int], ...]
    grid: tuple[int, int]
    outputs: int
    dtypes: tuple[torch.dtype, ...]


PYRAMIDS = (
    PyramidCase("VGG-16", ((896, 64, 84), (1280, 32, 42), (1536, 16, 21), (512, 8, 10)), (64, 84), 512, ALL),
    # More maps than one launch takes, in numbers that no vector divides.
    PyramidCase("odd", ((5, 6, 7), (5, 6, 3), (5, 4, 5), (1, 2, 7), (1, 1, 1)), (6, 7), 3, FLOAT32),
)


class Launch(NamedTuple):
    """One specialization of a kernel, as Triton makes it at a launch."""

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    arch: int

    @property
    def key(self) -> str:
        return f"{self.arch} {self.kernel.__name__} {self.signature} {self.constants} {self.attributes} {self.options}"


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """The launches within the context, none of which happens, on a device of this architecture."""
    launches: list[Launch] = []
    target = GPUTarget("cuda", arch, 32)

    def record(kernel, key, signature, device, constants, options, attributes, warmup):
        launches.append(Launch(kernel, signature, constants, attributes, vars(options), arch))

    machine = SimpleNamespace(
        get_current_device=lambda: arch, get_current_stream=lambda device: 0, get_current_target=lambda: target
    )
    users = [m for n, m in sys.modules.items() if n.startswith("moe_kernels.triton") and hasattr(m, "capability")]
    driver.set_active(machine)
    with mock.patch.object(JITFunction, "_do_compile", record):
        patches = [mock.patch.object(user, "capability", return_value=divmod(arch, 10)) for user in users]
        for patch in patches:
            patch.start()
        try:
            yield launches
        finally:
            for patch in patches:
                patch.stop()


def run_operators(case: Case, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Operator → its calls, forward and backward, on meta tensors of the case."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    _, T, d, h, p, E, k, *_ = case
    ids = empty(T, k, dtype=torch.int64)
    x, seed = empty(T, d, dtype=dtype), empty(1, dtype=torch.int64)
    grads = empty(T, k), empty(4, E), empty(2)
    plan = empty(T * k, dtype=torch.int64), empty(E + 1, dtype=torch.int64), ids

    def route() -> None:
        projection, embedding, scale, logits = empty(p, d), empty(E, p), empty(1), empty(T, E)
        for selection in ((None, k, 0.0, k > 1), (seed, k, 0.5, k > 1)):
            routing.routing_cosine(x, projection, empty(p), embedding, scale, *selection)
            routing_backward.routing_cosine_backward(
                *grads, x, projection, embedding, scale, logits, empty(T, p), ids, *selection
            )
            routing.routing_linear(x, empty(E, d), *selection)
            routing_backward.routing_linear_backward(*grads, x, empty(E, d), logits, ids, *selection)

    def sort_and_combine() -> None:
        dispatch.dispatch(ids, E, None, None)
        dispatch.dispatch(ids, E, T // E, None)
        dispatch.gather(x, *plan)
        rows = empty(T * k, d, dtype=dtype)
        dispatch.gather_backward(rows, *plan)
        dispatch.combine(rows, empty(T, k), *plan)
        dispatch.combine_backward(x, rows, empty(T, k), *plan)

    def feed_forward() -> None:
        # float32 parameters beside 16-bit rows differ in the gradients that are written, not in what is saved.
        settings = [
            (dtype, save, p, activation)
            for activation in case.activations
            for p in (0.0, 0.1)
            for save in (True, False)
        ]
        for parameter_dtype, save, p, activation in (*settings, (torch.float32, True, 0.0, case.activations[0])):
            weights = [empty(*s, dtype=parameter_dtype) for s in ((E, h, d), (E, h), (E, d, h), (E, d))]
            options = (seed if p else None, activation, p)
            expert_ffn.expert_ffn(x, *weights, empty(T, k), *plan, *options, save)
            saved = empty(T * k if save else 0, h, dtype=dtype)
            expert_ffn_backward.expert_ffn_backward(x, x, *weights, empty(T, k), saved, *plan, *options)

    runs = {"routing": route, "dispatch": sort_and_combine, "expert_ffn": feed_forward}
    return {operator: runs[operator] for operator in case.operators}


def run_hypercolumn(case: PyramidCase, dtype: torch.dtype) -> None:
    """Every operator on meta tensors of two images and their points."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def maps(channels: int | None = None) -> list[Tensor]:
        return [empty(2, h, w, channels or c).permute(0, 3, 1, 2) for c, h, w in case.maps]

    points, grid = empty(2, 60, dtype=torch.int64), case.grid
    columns = hypercolumn.hypercolumn_gather(maps(), points, grid)
    hypercolumn.hypercolumn_gather_backward(columns, points, [size for m in case.maps for size in m], grid)
    y = hypercolumn.hypercolumn_resize_sum(maps(case.outputs), grid, empty(case.outputs))
    hypercolumn.hypercolumn_resize_sum_backward(y, [size for m in case.maps for size in m[1:]])
    hypercolumn.hypercolumn_norm(maps(), grid)


def record_all() -> dict[str, list[Launch]]:
    """Operator, case, dtype and architecture, in words → what it launches."""
    found = {}
    for arch in SHARED:
        runs: list[tuple[str, torch.dtype, Callable[[], Any]]] = [
            (f"{operator}: {case.name}", dtype, run)
            for case in CASES
            for dtype in case.dtypes
            for operator, run in run_operators(case, dtype).items()
        ]
        runs += [
            (f"hypercolumn: {pyramid.name}", dtype, functools.partial(run_hypercolumn, pyramid, dtype))
            for pyramid in PYRAMIDS
            for dtype in pyramid.dtypes
        ]
        for words, dtype, run in runs:
            with recorded(arch) as launches:
                run()
            found[f"{words}, {str(dtype).removeprefix('torch.')}, sm_{arch}"] = launches
    return found


def compile_launch(launch: Launch) -> dict[str, Any]:
    """registers, spilled, shared, tensor_cores; or error."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    log = io.StringIO()
    try:
        with redirect_stdout(log), triton.knobs.compilation.scope(), triton.knobs.nvidia.scope():
            triton.knobs.compilation.always_compile = True  # or there is no log
            triton.knobs.nvidia.dump_ptxas_log = True
            built = triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)
    except Exception as error:  # of any kind: it is reported with the kernel's name
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log.getvalue()))),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", log.getvalue()))),
        "shared": built.metadata.shared,
        "tensor_cores": sorted({" ".join(filter(None, found)) for found in TENSOR_CORES.findall(built.asm["ptx"])}),
    }


_unique: list[Launch] = []


def _compile_numbered(number: int) -> dict[str, Any]:
    return compile_launch(_unique[number])


def compile_all(recorded_launches: dict[str, list[Launch]]) -> dict[str, dict[str, Any]]:
    """Case in words → kernel → facts; a kernel's later specializations within a case are numbered from 2."""
    by_key = {launch.key: launch for launches in recorded_launches.values() for launch in launches}
    _unique[:] = by_key.values()
    with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count() or 1)) as pool:
        facts = dict(zip(by_key, pool.map(_compile_numbered, range(len(_unique)), chunksize=1), strict=True))
    table: dict[str, dict[str, Any]] = {}
    for words, launches in recorded_launches.items():
        table[words], seen = {}, set()
        for launch in launches:
            if launch.key not in seen:
                seen.add(launch.key)
                name, number = launch.kernel.__name__, 2
                while name in table[words]:
                    name, number = f"{launch.kernel.__name__} #{number}", number + 1
                table[words][name] = facts[launch.key]
    return table


def problems(found: dict[str, dict[str, Any]], before: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong, or worse than before, each in one line with the kernel and its case."""
    lines = []
    for words, kernels in found.items():
        arch = int(words[-2:])
        for kernel, facts in kernels.items():
            name, old = f"{kernel} ({words})", before.get(words, {}).get(kernel, {})
            if "error" in facts:
                lines.append(f"{name} does not compile: {facts['error']}")
                continue
            if facts["shared"] > SHARED[arch]:
                lines.append(f"{name}: {facts['shared']} bytes of shared memory, sm_{arch} has {SHARED[arch]}")
            if facts["spilled"]:
                lines.append(f"{name} spills {facts['spilled']} bytes of registers")
            if lost := set(old.get("tensor_cores", ())) - set(facts["tensor_cores"]):
                after = ", ".join(facts["tensor_cores"]) or "none"
                lines.append(f"{name} lost tensor-core instructions: {after}, before {', '.join(sorted(lost))} too")
    for words, kernels in before.items():
        lines += [
            f"{kernel} ({words}) is gone; `--write` if that is meant"
            for kernel in kernels
            if kernel not in found.get(words, {})
        ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {FACTS.name} anew")
    arguments = parser.parse_args()
    start = time.monotonic()
    found = compile_all(record_all())
    before = {} if arguments.write or not FACTS.exists() else json.loads(FACTS.read_text())
    lines = problems(found, before)
    if arguments.write:
        FACTS.write_text(json.dumps(found, indent=1) + "\n")
    print(*lines, sep="\n")
    kernels = {launch.kernel.__name__ for launch in _unique}
    seconds = time.monotonic() - start
    print(f"{len(_unique)} specializations of {len(kernels)} kernels in {seconds:.0f} s: {len(lines)} problems")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
