# make demo    set up, run the whole pipeline on a tiny model, say where to look
# make test    set up, lint, type-check, run all tests (.ci/run calls this)
# make test-fast   the same without the slow tests
# make lint    lint and type-check
# make wheel   build the packages in dist/, and test what is built
# make docs    the documentation site, strictly, in build/docs; the site of a failed build stays, to look at
# make notebook   execute the notebook of the documentation, and keep what it prints
# make coverage   which lines the tests run (make COVERED='-m "not slow"' coverage: without the slow tests)
# make clean   remove the environment, what was built, and what the demo wrote

PYTHON ?= python3
VENV := .venv
# What a new environment gets; .ci/run installs all at once, which takes less than one after the other.
EXTRAS ?= browse
COMMA := ,
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# A process a core; the tests of a file, which share fixtures, in one process; slow files first.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast lint wheel docs notebook coverage clean

demo: $(VENV)/.installed
	$(BIN)/olmoscope demo

test: lint
	tools/install_browser.sh
	$(PYTEST)

# Without what kills processes, drives a browser, compiles or runs whole commands: while you work.
test-fast: lint
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests tools docs benchmarks
	$(BIN)/mypy

wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build
	$(PYTEST) tests/end_to_end/test_wheel.py

# -n: every reference leads somewhere; -W: a warning is an error; -E: all pages are read anew, as some are made of files outside
# docs/. It asks no network.
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -W --keep-going -n -E -q -b html docs build/docs
	@echo "The site: build/docs/index.html"

notebook: $(VENV)/.installed-docs
	$(BIN)/python tools/run_notebook.py docs/tutorials/first-hour.ipynb

coverage: $(VENV)/.installed-dev
	$(PYTEST) --cov --cov-report= $(COVERED)
	$(BIN)/coverage report
	$(BIN)/coverage html -d build/coverage

# torch first and by itself: everything else then finds the build that is there.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("olmoscope needs Python 3.11 or newer: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[$(EXTRAS)]'
	touch $@ $(patsubst %,$@-%,$(filter dev docs,$(subst $(COMMA), ,$(EXTRAS))))

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist olmoscope-demo
