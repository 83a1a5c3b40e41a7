# `make help` lists the targets. Each prepares .venv by itself; only Python 3.11+, git and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The release that tests were last run with; `make TORCH=torch test` takes the newest.
TORCH ?= torch==2.13.0

.PHONY: help run methods notebooks test check format clean
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# A stamp instead of the directory: an installation that broke off is done again.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)' --editable '.[dev,analysis]'
	touch $@

run: $(VENV)/.installed ## ten methods side by side on the embedded model (CPU, no network)
	$(BIN)/python run.py -m experiment=first_run

methods: $(VENV)/.installed ## every method at four budgets: docs/methods.png, docs/results.md (hours on a CPU, minutes on a GPU)
	$(BIN)/python run.py -m experiment=methods
	$(BIN)/python -m analysis.figure pareto outputs/methods --out docs/methods.png
	$(BIN)/python -m analysis.table outputs/methods --out docs/results.md

notebooks: $(VENV)/.installed ## execute analysis/notebooks and keep what they show (CPU, no network, minutes)
	$(BIN)/python -m analysis.notebooks.execute

test: $(VENV)/.installed ## the whole test suite (CPU, no network), a process a core
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

check: $(VENV)/.installed ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed ## mend what lint and format can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment (outputs stay)
	rm -rf $(VENV)
