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

# The C++ and CUDA kernels do all their sums themselves, in an order that depends neither on the number of threads nor
# on the GPU. The reference's sums and products are torch's.
ANY_THREADS = "same bits for any number of threads"
ANY_DEVICE = "same bits on any GPU"
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


def cuda_extension() -> dict[str, str]:
    """State of ``moe_kernels._C_cuda``: "not loaded" with the reason, or "loaded" with how it was built."""
    if backend.cuda_extension_problem:
        return {"status": "not loaded", "error": backend.cuda_extension_problem}
    return {"status": "loaded", **backend.cuda_extension()}


def _determinism(row: backend.Choice) -> str:
    if row.backend == "reference":
        return SAME_THREADS if row.device == "cpu" else SAME_DEVICE
    return {"cpp": ANY_THREADS, "cuda": ANY_DEVICE, "triton": SAME_DEVICE}.get(row.backend, "")


def operators() -> list[dict[str, str]]:
    """The kernel of every operator on every device, and why."""
    return [{**row._asdict(), "determinism": _determinism(row)} for row in backend.report()]


def advice(report: dict[str, Any]) -> list[str]:
    """What to do about what is missing, most important first; empty when nothing is."""
    steps = []
    if stuck := [f"{row['operator']} on {row['device']}" for row in report["operators"] if row["backend"] == "none"]:
        steps.append(f"{', '.join(stuck)} cannot run: unset MOE_KERNELS_BACKEND to let the fastest kernel be chosen.")
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
    for row in report["operators"]:
        if row["device"] == "cuda" and row["backend"] == "reference":
            steps.append(f"On the GPU {row['operator']} runs as plain PyTorch. {row['reason']}")
    return steps


def examine() -> dict[str, Any]:
    """Everything the command prints, ready for JSON."""
    report: dict[str, Any] = {
        "versions": versions(),
        "devices": devices(),
        "extension": extension(),
        "cuda_extension": cuda_extension(),
        "operators": operators(),
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


def _cuda_extension_line(state: dict[str, str]) -> str:
    if state["status"] != "loaded":
        return f"  {state['error']}"
    return (
        f"  built for {state['cuda_arch']} by CUDA {state['cuda']} with torch {state['built_torch']}, "
        f"for any torch >= {state['torch_target']} for CUDA {state['cuda'].partition('.')[0]}"
    )


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = ["Versions"]
    lines += [f"  {name:14}{version or 'not installed'}" for name, version in report["versions"].items()]
    lines += ["", "Devices", *_table(report["devices"], ("device", "name", "detail"))]
    lines += ["", "C++ extension (moe_kernels._C)", _extension_line(report["extension"])]
    lines += ["", "CUDA extension (moe_kernels._C_cuda)", _cuda_extension_line(report["cuda_extension"])]
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
