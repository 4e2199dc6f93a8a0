"""``moe-kernels doctor``: what is installed, which kernel runs where and why, and what to do about gaps."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moe_kernels import backend
from moe_kernels._version import __version__

CORE = ("torch", "numpy", "typer")
EXTRA = ("timm", "torchvision", "scikit-learn", "matplotlib", "safetensors", "tqdm")
OPTIONAL = ("triton", "transformers")

# Operators whose C++ kernels do all their sums themselves, in an order that does not depend on the number of
# threads. The matrix products of the others, and everything on the reference, are torch's.
ANY_THREADS = "same bits for any number of threads"
SAME_THREADS = "same bits for the same number of threads"
SAME_DEVICE = "same bits on the same kind of device"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def versions() -> dict[str, str | None]:
    """Distribution name → version, or None where it is not installed."""
    found: dict[str, str | None] = {"moe-kernels": __version__, "python": platform.python_version()}
    for name in (*CORE, *EXTRA, *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["torch"] = torch.__version__  # with the local part, which says what it was built for
    return found


def _processor() -> str:
    """The processor's name as Linux gives it (platform.processor() is mostly empty there)."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def devices() -> list[dict[str, str]]:
    """The processor and every CUDA device; where there is none, why."""
    found = [
        {
            "device": "cpu",
            "name": _processor(),
            "detail": f"{torch.get_num_threads()} threads of {len(os.sched_getaffinity(0))} cores",
        }
    ]
    if not torch.cuda.is_available():
        built = torch.version.cuda
        detail = f"torch is built for CUDA {built}, no device is visible" if built else "torch is a CPU build"
        return [*found, {"device": "cuda", "name": "none", "detail": detail}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "detail": f"sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB",
            }
        )
    return found


def extension() -> dict[str, str]:
    """State of ``moe_kernels._C``: "absent", "broken" with the error, or "loaded" with how it was built."""
    if importlib.util.find_spec("moe_kernels._C") is None:
        return {"status": "absent"}
    try:
        build: dict[str, str] = importlib.import_module("moe_kernels._C").build_info()
    except ImportError as error:
        return {"status": "broken", "error": str(error)}
    return {"status": "loaded", **build}


def _determinism(row: backend.Choice) -> str:
    if row.backend == "triton":
        return SAME_DEVICE
    return ANY_THREADS if row.backend == "cpp" else SAME_THREADS


def operators() -> tuple[list[dict[str, str]], str]:
    """The kernel of every operator on every device and why; and the error where a forced one cannot run."""
    try:
        rows = backend.report()
    except RuntimeError as error:
        return [], str(error)
    return [{**row._asdict(), "determinism": _determinism(row)} for row in rows], ""


def advice(report: dict[str, Any]) -> list[str]:
    """What to do about what is missing, most important first; empty when nothing is."""
    steps = []
    if report["problem"]:
        steps.append(f"{report['problem']}. Unset MOE_KERNELS_BACKEND to let the fastest kernel be chosen.")
    if report["extension"]["status"] != "loaded":
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            steps.append(f"There is no C++ compiler ({compiler!r}); install one, for example: apt install g++")
        steps.append(
            "Build the C++ kernels, in the source tree: "
            "MOE_KERNELS_REQUIRE_EXT=1 pip install --no-build-isolation --no-deps --force-reinstall ."
        )
    if missing := [name for name in EXTRA if report["versions"][name] is None]:
        steps.append(f'For the models and the demo ({", ".join(missing)} missing): pip install "moe-kernels[models]"')
    if slow := [row for row in report["operators"] if row["device"] == "cuda" and row["backend"] == "reference"]:
        steps.append(f"On the GPU the operators run as plain PyTorch. {slow[0]['reason']}")
    return steps


def examine() -> dict[str, Any]:
    """Everything the command prints, ready for JSON."""
    rows, problem = operators()
    report: dict[str, Any] = {
        "versions": versions(),
        "devices": devices(),
        "extension": extension(),
        "operators": rows,
        "problem": problem,
    }
    return {**report, "advice": advice(report)}


def _table(rows: list[dict[str, str]], columns: tuple[str, ...]) -> list[str]:
    widths = [max([len(column), *(len(row[column]) for row in rows)]) for column in columns]
    lines = [columns, *(tuple(row[column] for column in columns) for row in rows)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]


def _extension_line(state: dict[str, str]) -> str:
    if state["status"] == "absent":
        return "  not built: every operator runs on its plain PyTorch reference"
    if state["status"] == "broken":
        return f"  built, but it does not load: {state['error']}"
    return (
        f"  built by {state['compiler']} (C++{state['cxx_standard']}) with torch {state['built_torch']}, "
        f"for any torch >= {state['torch_target']}; instruction set here: {state['isa']}"
    )


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = ["Versions"]
    lines += [f"  {name:14}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["", "Devices", *_table(report["devices"], ("device", "name", "detail"))]
    lines += ["", "C++ extension (moe_kernels._C)", _extension_line(report["extension"])]
    lines += ["", "Operators"]
    lines += _table(report["operators"], ("operator", "device", "backend", "determinism", "reason"))
    lines += ["", "What to do", *(f"  - {step}" for step in report["advice"] or ["Nothing is missing."])]
    return "\n".join(lines)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts and bug reports.")] = False,
) -> None:
    """Say what is installed, which kernel runs where and why, and what to do about what is missing."""
    report = examine()
    typer.echo(json.dumps(report, indent=2) if as_json else render(report))
