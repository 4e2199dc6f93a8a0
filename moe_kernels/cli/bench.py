"""``moe-kernels bench``: the operators beside their peers and beside the physical limit, on this machine."""

import dataclasses
import os
import shlex
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from moe_kernels import backend, benchmarks
from moe_kernels.benchmarks import harness, registry, report, workloads
from moe_kernels.cli import doctor

# A sample shorter than this is repeated: the clock and the scheduler disturb it too much.
SAMPLE_SECONDS = 0.02
QUICK_ROUNDS = 3

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def _show(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Print a table, the first row its head."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for index, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if index else "left", no_wrap=name != "note")
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 90)  # in a log, whose width is taken for 80, nothing is cut
    console.print(table)


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


def environment(device: torch.device, command: Sequence[str], rounds: int, quick: bool) -> dict[str, Any]:
    """What the figures depend on besides the code of the case."""
    versions = doctor.versions()
    processor, *others = doctor.devices()
    accelerator = [f"{row['name']}, {row['detail']}" for row in others if row["device"].startswith(device.type)]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(command),
        "commit": commit(),
        "versions": {name: versions[name] for name in ("moe-kernels", "python", "torch")},
        "backend": backend.choose(device.type),
        "machine": {
            "device": device.type,
            "processor": processor["name"],
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "isa": doctor.extension().get("isa_detected", "unknown"),
            "accelerator": accelerator[0] if accelerator else None,
        },
        "rounds": rounds,
        "quick": quick,
    }


@app.command()
def bench(
    operators: Annotated[
        list[str] | None, typer.Argument(help=f"Of {', '.join(registry.BENCHMARKS)}; all of them by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every candidate is timed.")] = 15,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, to see that everything runs; the figures mean nothing.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch, its own choice by default.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of {', '.join(workloads.DTYPES)}.")] = "float32",
    out: Annotated[
        Path | None, typer.Option(help="Folder; benchmarks/results in the repository, else the current one.")
    ] = None,
) -> None:
    """Measure operators on the accelerator if there is one, else on the processor; write JSON and Markdown.

    Every candidate is first compared with float64. The exit status is 1 if one of ours is out of its error budget.
    """
    chosen = _one_of(tuple(registry.BENCHMARKS), operators or list(registry.BENCHMARKS))
    _one_of(workloads.DTYPES, [dtype])
    if threads is not None:
        torch.set_num_threads(threads)
    rounds = min(rounds, QUICK_ROUNDS) if quick else rounds
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
    suite = [dataclasses.replace(w, dtype=dtype) for w in (workloads.QUICK if quick else workloads.FULL)]

    command = ["moe-kernels", "bench", *(operators or ()), f"--rounds={rounds}", f"--dtype={dtype}"]
    command += ["--quick"] * quick + ([] if threads is None else [f"--threads={threads}"])
    found = environment(device, command, rounds, quick)
    sample_seconds = 0.0 if quick else SAMPLE_SECONDS
    inaccurate = []
    for operator in chosen:
        results = []
        for case in registry.cases(operator, suite, device):
            result = harness.measure(case, harness.stopwatch(device), rounds=rounds, sample_seconds=sample_seconds)
            results.append(result)
            _show(f"{operator}, {report.title(result)}", report.case_rows(result))
            if result.row(harness.OURS).note:
                inaccurate.append(f"{operator}, {report.title(result)}: {result.row(harness.OURS).note}")
        _show(report.heading(operator, results), report.summary_rows(results))
        typer.echo(report.conclusion(results))
        typer.echo("Written: " + ", ".join(map(str, report.save(out or default_folder(), operator, results, found))))
    if quick:
        typer.echo("--quick: these figures mean nothing.")
    for line in inaccurate:
        typer.echo(f"error: ours is inaccurate: {line}", err=True)
    if inaccurate:
        raise typer.Exit(1)
