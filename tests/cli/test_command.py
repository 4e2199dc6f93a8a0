"""The command's own shell: sub-commands imported when called, one sentence where an extra is missing."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import moe_kernels
from moe_kernels import cli

runner = CliRunner()


def test_help_lists_every_command_and_imports_none():
    code = (
        "import sys\n"
        "from moe_kernels import cli\n"
        "try:\n"
        "    cli.app(['--help'])\n"
        "except SystemExit:\n"
        "    print('imported:', *(n for n in cli.COMMANDS if f'moe_kernels.cli.{n}' in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    for name in cli.COMMANDS:
        assert name in result.stdout
    assert result.stdout.rstrip().endswith("imported:")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_shows_its_own_help(name):
    result = runner.invoke(cli.app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert f"moe-kernels {name}" in result.stdout


def test_version():
    assert runner.invoke(cli.app, ["--version"]).stdout.strip() == moe_kernels.__version__


def test_unknown_command_is_an_error():
    result = runner.invoke(cli.app, ["nonsense"])
    assert result.exit_code == 2
    assert "nonsense" in result.output


def test_unknown_option_is_the_sub_commands_error():
    result = runner.invoke(cli.app, ["doctor", "--nonsense"])
    assert result.exit_code == 2
    assert "--nonsense" in result.output


@pytest.mark.parametrize("module", ["timm", "sklearn.datasets"])
def test_missing_extra_is_one_sentence(monkeypatch, module):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    result = runner.invoke(cli.app, ["demo"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == f'moe-kernels demo needs the module {module}: pip install "moe-kernels[models]"\n'


def test_own_missing_module_is_not_hidden(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'moe_kernels.nn'", name="moe_kernels.nn")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert isinstance(runner.invoke(cli.app, ["demo"]).exception, ModuleNotFoundError)
