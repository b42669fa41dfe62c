# The project's commands. `make help` lists them.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready
# Python 3.12 by its own name, or as python3 (for instance through .python-version).
FIND_PYTHON = for name in python3.12 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && echo "$$name" && break; done
export OMP_NUM_THREADS ?= 1
# Files of tests that run at a time.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup slurm-packages test gpu-check lint demo bench

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv with pinned requirements and the m3 command (a second time: nothing to do)

$(READY): requirements.txt requirements-dev.txt requirements-demo.txt pyproject.toml
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || { python=$$($(FIND_PYTHON)); \
		test -n "$$python" || { echo "error: Python 3.12 not found: install python3.12 and run make again" >&2; exit 2; }; \
		"$$python" -m venv $(VENV); }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-demo.txt
	PYTHONWARNINGS=ignore $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

slurm-packages: ## Slurm and munge by apt, for the tests that need them, where root may install packages
	@if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null; then echo "Slurm is installed"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
			slurm-wlm munge; } >/dev/null || echo "Slurm could not be installed; its tests will be skipped"; \
	else echo "Slurm is not installed, and only root with apt-get can do that here; its tests will be skipped"; fi

test: setup ## run all tests
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile -m "not alone"
	$(PYTHON) -m pytest -m alone

gpu-check: setup ## on a machine with a CUDA card: the tests that need one, then times, added to tests/benchmarks/results.csv
	$(PYTHON) -m pytest -m gpu tests/gpu
	$(PYTHON) -m tests.benchmarks.bench_attention --record
	$(PYTHON) -m tests.benchmarks.bench_kernels --record

lint: setup ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

demo: setup ## the whole path on a real corpus: train, write memories, generate, score
	$(VENV)/bin/m3 demo

bench: setup ## speed and memory, each beside its floor
	@set -e; for script in tests/benchmarks/[a-z]*.py; do \
		echo "== $$script"; $(PYTHON) -m "$$(echo "$${script%.py}" | tr / .)"; done
