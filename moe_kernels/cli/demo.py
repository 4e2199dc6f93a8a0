"""``moe-kernels demo``: the main job, on data that the package brings."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from moe_kernels.cli import accuracy
from moe_kernels.cli.common import THREADS, one_sentence
from moe_kernels.models.gmoe import demo, tables

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Folder for results, report and checkpoints.")] = Path("moe-kernels-demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Trials of each model on each held-out domain.")] = 3,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Train just enough to see that everything runs; the accuracies mean nothing."),
    ] = False,
) -> None:
    """Train a dense ViT and a GMoE on handwritten digits in four domains, each in turn held out.

    It takes a few minutes on two cores and needs no download. If it is interrupted, in whatever way, the same command
    goes on where it was and ends with the same numbers.
    """
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    begun = time.monotonic()
    with one_sentence():
        table = demo.run(out, demo.plan(seeds, quick))
    accuracy.show(f"Out-of-domain accuracy, %: mean ± standard error, trials: {seeds}", tables.accuracy_rows(table))
    typer.echo(tables.comparison(table, demo.SPARSE, demo.DENSE))
    typer.echo(f"{time.monotonic() - begun:.0f} s. Report: {out / 'report.html'}, {out / 'report.md'}")
