# make demo | test | test-all | lint | format | coverage | notebooks | docs | benchmark | profile | mutation | clean
# The environments are made by the first target that needs them and kept: .venv (TransformerLens 3.9, the pinned one)
# and .venv-tl43 (TransformerLens 4.3). ARGS="-k name" goes to pytest or to the demo, PYTHON names the interpreter,
# JOBS is the number of processes that tests run in.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PYTHONNOUSERSITE := 1
PYTHON ?= python3
export PYTHON
ARGS ?=

VENV := .venv
VENV43 := .venv-tl43
BIN := $(VENV)/bin
JOBS ?= 2
PYTEST := python -m pytest -q -n $(JOBS) --dist worksteal
INSTALL := @bash constraints/install.sh
INPUTS := constraints/install.sh pyproject.toml
DEV := constraints/dev.txt

# An environment that was copied or moved here, or whose Python is gone, does not count as ready.
$(shell for v in $(VENV) $(VENV43); do [ ! -d $$v ] || { [ -x $$v/bin/python ] && [ "$$(cat $$v/.root 2>/dev/null)" = \
	"$$(pwd -P)" ]; } || rm -f $$v/.ready-*; done)

.PHONY: help demo test test-tl43 test-all lint format coverage notebooks docs benchmark profile mutation clean

help:
	@echo 'make demo       the pipeline from end to end, on a model that comes by pip; writes a report'
	@echo 'make test       fast tests, TransformerLens 3.9'
	@echo 'make test-tl43  fast tests, TransformerLens 4.3'
	@echo 'make test-all   all tests with both, and the notebooks; two hours'
	@echo 'make lint       ruff and mypy'
	@echo 'make format     ruff, changing files'
	@echo 'make coverage   fast tests, and the lines that they do not reach'
	@echo 'make benchmark  time and memory against peers, an hour and more; ARGS makes it shorter'
	@echo 'make mutation   300 errors put into the program one by one: do the tests notice? About an hour'
	@echo 'make docs       the reference from the docstrings, docs/reference/index.html'
	@echo 'make profile    where the time of the demo goes'

$(VENV)/.ready-run: constraints/tl39.txt $(INPUTS)
	$(INSTALL) $(VENV) $<

$(VENV)/.ready-dev: constraints/tl39.txt $(DEV) $(INPUTS)
	$(INSTALL) $(VENV) $< $(DEV)

$(VENV43)/.ready-dev: constraints/tl43.txt $(DEV) $(INPUTS)
	$(INSTALL) $(VENV43) $< $(DEV)

demo: $(VENV)/.ready-run
	@$(BIN)/sink-circuits demo --overwrite $(ARGS)

test: $(VENV)/.ready-dev
	@$(BIN)/$(PYTEST) $(ARGS)

test-tl43: $(VENV43)/.ready-dev
	@$(VENV43)/bin/$(PYTEST) $(ARGS)

test-all: $(VENV)/.ready-dev $(VENV43)/.ready-dev
	@$(BIN)/$(PYTEST) --runslow $(ARGS)
	@$(VENV43)/bin/$(PYTEST) --runslow $(ARGS)
	@$(MAKE) notebooks

notebooks: $(VENV)/.ready-dev
	@for n in notebooks/*.ipynb; do \
		[ -e "$$n" ] || { echo 'no notebooks'; break; }; \
		echo "$$n"; $(BIN)/jupyter-execute --timeout=1800 "$$n" >/dev/null; \
	done

lint: $(VENV)/.ready-dev
	@$(BIN)/ruff check --quiet --output-format=concise .
	@$(BIN)/ruff format --quiet --check . || { $(BIN)/ruff format --check . || true; echo 'run make format'; exit 1; }
	@$(BIN)/mypy sink_circuits

format: $(VENV)/.ready-dev
	@$(BIN)/ruff check --quiet --fix . || true
	@$(BIN)/ruff format .

coverage: $(VENV)/.ready-dev
	@$(BIN)/$(PYTEST) --cov=sink_circuits --cov-branch --cov-report=term-missing:skip-covered $(ARGS)

benchmark: $(VENV)/.ready-run
	@$(BIN)/python benchmarks/benchmark.py $(ARGS)

docs: $(VENV)/.ready-dev
	@$(BIN)/python docs/make_reference.py docs/reference

profile: $(VENV)/.ready-run
	@$(BIN)/python benchmarks/profile_demo.py $(ARGS)

mutation: $(VENV)/.ready-dev
	@$(BIN)/python tests/mutation.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV43) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache htmlcov .coverage
