"""What the commands that train share: options, one-sentence errors, where they write, and who looks at images first."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from moe_kernels.models import distributed

T = TypeVar("T")

# Of models as small as the demos' two threads are all that help, and the bits depend on their number.
THREADS = 2

Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:<index>; under torchrun each rank takes its own GPU.")
]
Workers = Annotated[int, typer.Option(min=0, help="Processes that load images, for each rank.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read instead of stopping.")]


class Precision(str, Enum):
    """Of the model's arithmetic."""

    float32 = "float32"
    bfloat16 = "bfloat16"


@contextmanager
def one_sentence(*, resumes: bool = True) -> Iterator[None]:
    """What the user can mend ends in a sentence and not in a traceback, and a warning is its text alone.

    Args:
        resumes: whether the command, when it was interrupted, goes on where it was.
    """
    formatted, warnings.formatwarning = warnings.formatwarning, lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command " + ("goes on from here" if resumes else "begins anew"), err=True)
        raise typer.Exit(130) from None
    finally:
        warnings.formatwarning = formatted


def check_writable(out: Path) -> None:
    """Make the folder ``out``, and refuse one that files cannot be written to.

    Raises:
        ValueError: why not.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"out (--out): {out} must be a folder that can be written to ({error.strerror})") from error


def first_rank_first(load: Callable[[], T]) -> T:
    """``load()``. The first rank decodes every image once, the others find that done."""
    if distributed.rank() > 0:
        distributed.barrier()
    loaded = load()
    if distributed.rank() == 0:
        distributed.barrier()
    return loaded
