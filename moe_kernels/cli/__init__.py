"""The ``moe-kernels`` command.

Each sub-command is a module of this package with a ``typer.Typer`` named ``app`` (one command in it, or a
group). It is imported when it is called and not before, so that ``moe-kernels --help`` needs no extra.
"""

import importlib
from typing import Annotated

import typer

from moe_kernels._version import __version__

COMMANDS = {
    "doctor": "Say what is installed, which kernel runs where and why, and what to do about what is missing.",
    "demo": "Train a dense and a mixture-of-experts vision transformer on digits across shifted domains.",
    "bench": "Measure the operators beside their peers.",
    "gmoe": "Train and evaluate GMoE on folders of images.",
    "transfer": "Fine-tune pretrained networks near their source, with DTNH so that it never hurts.",
    "segment": "Learn to segment images from their tags alone, and add classes on the fly.",
}
# What the extra [models] brings, by import name.
EXTRA_MODULES = {"PIL", "matplotlib", "safetensors", "sklearn", "timm", "torchmetrics", "torchvision", "tqdm"}

app = typer.Typer(
    name="moe-kernels",
    help="Sparse mixture-of-experts vision transformers and transfer that never hurts: kernels, layers, models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _forward(name: str, arguments: list[str]) -> None:
    """Run the sub-command's own app; a missing extra ends in one sentence, any other error as it came."""
    try:
        importlib.import_module(f"moe_kernels.cli.{name}").app(arguments, prog_name=f"moe-kernels {name}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA_MODULES:
            raise
        typer.echo(f'moe-kernels {name} needs the module {error.name}: pip install "moe-kernels[models]"', err=True)
        raise typer.Exit(1) from None


def _register(name: str, description: str) -> None:
    @app.command(
        name,
        help=description,
        add_help_option=False,  # --help belongs to the sub-command, which knows its options
        context_settings={
            "allow_extra_args": True,
            "ignore_unknown_options": True,
            "allow_interspersed_args": False,
        },
    )
    def command(context: typer.Context) -> None:
        _forward(name, context.args)


for _name, _description in COMMANDS.items():
    _register(_name, _description)
