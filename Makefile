# make demo   the whole loop on this machine (SMOKE=1: four minutes, plumbing only)
# make test   linters, types, import contract, tests; installs Debian's Slurm for them where it may
# make setup  the virtual environment alone; both of the above call it
# VENV=DIR and PYTHON=python3.x override where and with what.

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.PHONY: demo test setup clean

demo: setup
	$(BIN)/astro-hpc demo $(if $(SMOKE),--smoke)

test: setup
	@tools/setup_slurm.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest $(ARGS)

setup:
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
