# make demo | test | lab | notebooks | bench | format. Each sets up what it needs in .venv first; PYTHON names the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo lab test notebooks bench format
.DEFAULT_GOAL := demo

$(VENV)/core: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "grokscope needs Python 3.11 or newer; name one: make PYTHON=python3.12"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/dev: $(VENV)/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(VENV)/core
	$(BIN)/grokscope demo

lab: $(VENV)/core
	$(BIN)/jupyter lab --ServerApp.root_dir=notebooks

notebooks: $(VENV)/core  # executed, as HTML, in out/notebooks
	$(BIN)/jupyter nbconvert --execute --to html --output-dir out/notebooks notebooks/*.ipynb

test: $(VENV)/dev
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

$(VENV)/bench: $(VENV)/core
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	@touch $@

bench: $(VENV)/bench
	$(BIN)/python benchmarks/bench.py

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
