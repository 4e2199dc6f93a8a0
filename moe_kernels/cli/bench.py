"""``moe-kernels bench``: the operators beside their peers and beside the physical limit, on this machine."""

import dataclasses
import importlib.metadata
import os
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from moe_kernels import backend, benchmarks
from moe_kernels.benchmarks import harness, limits, memory, registry, report, stopwatches, workloads
from moe_kernels.benchmarks.candidates import OURS
from moe_kernels.cli import doctor

# A sample shorter than this is repeated: the clock and the scheduler disturb it too much.
SAMPLE_SECONDS = 0.02
QUICK_ROUNDS = 3
# Distributions that the figures depend on, stated where they are installed.
LIBRARIES = ("triton", "transformers", "tutel", "scattermoe", "megablocks", "sonic-moe")
# Of all operators; those of a GPU are these and larger ones.
SUITES = tuple(dict.fromkeys(name for benchmark in registry.BENCHMARKS.values() for name in benchmark.suites["cpu"]))

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first row its head; notes, which are long, stand below it."""
    head, *lines = rows
    width = len(head) - (head[-1] == "note")
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, name in enumerate(head[:width]):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line[:width])
    console = Console()
    console.width = max(console.width, 130)  # in a log, whose width is taken for 80, nothing is cut
    console.print(table)
    for line in lines:
        if note := "".join(line[width:]):
            typer.echo(f"  {line[0]}: {note}")


def _one_of(valid: tuple[str, ...], values: list[str]) -> list[str]:
    for value in values:
        if value not in valid:
            raise typer.BadParameter(f"expected one of {', '.join(valid)}, got {value!r}")
    return values


def default_folder() -> Path:
    """``benchmarks/results`` in the repository, elsewhere the current folder."""
    return Path("benchmarks/results") if Path("benchmarks/harness.py").is_file() else Path()


def commit() -> str | None:
    """The commit that the package is at, "-dirty" where files were changed; None where it is not in its repository."""
    folder = Path(benchmarks.__path__[0]).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Installed, the package may stand inside another project's repository, whose commit says nothing.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != folder.parent:
            return None
        return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str | None]:
    """Distribution name → version, of what the figures depend on and is installed."""
    everything = doctor.versions()
    found = {name: everything[name] for name in ("moe-kernels", "python", "torch")}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def environment(device: torch.device, rounds: int, stopwatch: str, quick: bool) -> dict[str, Any]:
    """What the figures of all operators depend on besides the code of the case."""
    processor, *others = doctor.devices()
    accelerator = [f"{row['name']}, {row['detail']}" for row in others if row["device"].startswith(device.type)]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": {
            "device": device.type,
            "processor": processor["name"],
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "isa": doctor.extension().get("isa", "unknown"),
            "accelerator": accelerator[0] if accelerator else None,
        },
        "rounds": rounds,
        "stopwatch": stopwatch,
        "quick": quick,
    }


def _device() -> torch.device:
    """The accelerator if there is one, else the processor."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def _chosen(
    device: torch.device, operators: list[str], suites: list[str], dtype: str | None, quick: bool
) -> dict[str, list[workloads.Workload]]:
    """Operator → its workloads; all operators that have one of the suites, where none is asked for by name."""
    _one_of(tuple(registry.BENCHMARKS), operators)
    found = {name: registry.BENCHMARKS[name].suites_on(device) for name in operators or registry.BENCHMARKS}
    _one_of(tuple(dict.fromkeys(suite for of_operator in found.values() for suite in of_operator)), suites)
    chosen = {}
    for name, of_operator in found.items():
        picked = [workload for suite in suites or of_operator for workload in of_operator.get(suite, ())]
        if picked:
            benchmark = registry.BENCHMARKS[name]
            kind = dtype or ("float32" if device.type == "cpu" else benchmark.gpu_dtype)
            chosen[name] = [dataclasses.replace(w, dtype=kind) for w in (benchmark.quick if quick else picked)]
        elif operators:
            raise typer.BadParameter(f"{name} has the suites {', '.join(of_operator)}, got {', '.join(suites)}")
    return chosen


@app.command()
def bench(
    operators: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(registry.BENCHMARKS)}; all of them by default.")
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(SUITES)}; repeat it for several; all of them by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every candidate is timed.")] = 15,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, to see that everything runs; the figures mean nothing.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch, its own choice by default.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of {', '.join(workloads.DTYPES)}; what is usual there by default.")
    ] = None,
    stopwatch: Annotated[
        str, typer.Option(help="wall: what a caller waits for. graph: replays of a CUDA graph, on a GPU.")
    ] = "wall",
    weigh: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Peak memory too, each candidate in a process of its own.")
    ] = True,
    out: Annotated[
        Path | None, typer.Option(help="Folder; benchmarks/results in the repository, else the current one.")
    ] = None,
) -> None:
    """Measure operators on the accelerator if there is one, else on the processor; write JSON, Markdown and a picture.

    Every candidate is first compared with float64. The exit status is 1 if one of ours is out of its error budget.
    """
    device = _device()
    _one_of(workloads.DTYPES, [dtype] if dtype else [])
    chosen = _chosen(device, operators or [], suite or [], dtype, quick)
    _one_of(tuple(stopwatches.STOPWATCHES), [stopwatch])
    if stopwatch == "graph" and device.type != "cuda":
        raise typer.BadParameter(f"--stopwatch=graph needs a CUDA device, got {device.type}")
    if threads is not None:
        torch.set_num_threads(threads)
    rounds = min(rounds, QUICK_ROUNDS) if quick else rounds

    command = ["moe-kernels", "bench", *(operators or ()), *(f"--suite={name}" for name in suite or ())]
    command += [f"--rounds={rounds}", f"--stopwatch={stopwatch}"]
    command += (
        ["--quick"] * quick + ["--no-memory"] * (not weigh) + ([] if threads is None else [f"--threads={threads}"])
    )
    found = environment(device, rounds, stopwatch, quick)
    sample_seconds = 0.0 if quick else SAMPLE_SECONDS
    inaccurate = []
    for operator, measured in chosen.items():
        results: list[harness.Result] = []
        written: list[Path] = []
        found["command"] = shlex.join([*command, f"--dtype={measured[0].dtype}"])
        # The layer is mostly its experts.
        found["backend"] = backend.choose("expert_ffn" if operator == "moe_layer" else operator, device.type)
        probes = limits.probes(device, measured[0].torch_dtype, quick=quick)
        for case in registry.cases(operator, measured, device):
            seconds = stopwatches.STOPWATCHES[stopwatch](device)
            result = harness.measure(case, seconds, probes, rounds=rounds, sample_seconds=sample_seconds)
            if weigh and not quick and registry.weighed(case):
                memory.weigh_rows(case, result, device)
            results.append(result)
            written = report.save(out or default_folder(), operator, results, found)  # kept if the next case is stopped
            _show(f"{operator}, {report.title(result)}", report.case_rows(result))
            typer.echo(report.limit(result))
            if result.row(OURS).note:
                inaccurate.append(f"{operator}, {report.title(result)}: {result.row(OURS).note}")
        _show(operator, report.summary_rows(results))
        typer.echo(report.conclusion(results))
        typer.echo("Written: " + ", ".join(map(str, written)))
    if quick:
        typer.echo("--quick: these figures mean nothing.")
    for line in inaccurate:
        typer.echo(f"error: ours has no speed: {line}", err=True)
    if inaccurate:
        raise typer.Exit(1)
