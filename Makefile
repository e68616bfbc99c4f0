# make demo    set up, run the whole pipeline on a tiny model, say where to look
# make test    set up, lint, type-check, run all tests (.ci/run calls this)
# make test-fast   the same without the slow tests
# make clean   remove the environment and what the demo wrote

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A process a core; the tests of a file, which share fixtures, in one process; slow files first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast clean

demo: $(VENV)/.installed
	$(BIN)/olmoscope demo

test: $(VENV)/.installed-dev
	tools/install_browser.sh
	$(BIN)/ruff check src tests tools
	$(BIN)/mypy
	$(PYTEST)

# Without what kills processes, drives a browser, compiles or runs whole commands: while you work.
test-fast: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests tools
	$(BIN)/mypy
	$(PYTEST) -m "not slow"

# torch first and by itself: everything else then finds the build that is there.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("olmoscope needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[browse]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) olmoscope-demo
