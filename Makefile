# Each target works from a bare clone: it makes a virtual environment, installs the pinned versions and the package with
# its extension (editable), once, and again when one of the files below has changed.
#
#   make demo | test | bench | lint
#   make test PYTEST_ARGS="tests/ops -x"   what pytest is given
#   make test VENV=/some/where             which environment is used (made if it is not there)

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(abspath $(VENV))/bin
SETUP := setup.py pyproject.toml constraints.txt Makefile
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# ninja is found on the path, where torch looks for it.
export PATH := $(BIN):$(PATH)

.PHONY: help demo test bench lint
help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: $(VENV)/installed
	$(BIN)/moe-kernels demo

test: $(VENV)/installed
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/installed
	$(BIN)/moe-kernels bench

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# torch stands in the environment before the extension is built, so that the build need not fetch a second one.
$(VENV)/torch: constraints.txt
	@echo "Installing torch into $(VENV): several gigabytes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch numpy setuptools ninja
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SETUP) $(CXX_FILES)
	@echo "Installing the package into $(VENV), with its C++ extension."
	$(PIP_INSTALL) --no-build-isolation --editable ".[dev]"
	@touch $@
