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
# Folder of wheels for machines without network.
WHEELS ?= wheels
CUDA_HOME ?= $(firstword $(wildcard /usr/local/cuda-13.0 /usr/local/cuda-13 /usr/local/cuda))
# Transformer Engine's torch part is compiled with the headers of the CUDA libraries that torch brings.
BUILD_TE = nvidia=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia; \
	CUDA_HOME=$(CUDA_HOME) CPATH=$$nvidia/cu13/include:$$nvidia/cudnn/include:$$nvidia/nccl/include \
	NVTE_PYTORCH_FORCE_BUILD=TRUE
NEED_TOOLKIT = test -d "$(CUDA_HOME)" || { echo "error: no CUDA toolkit: set CUDA_HOME to the folder of CUDA 13.0," \
	"whose compiler transformer-engine-torch needs, or copy wheels/ that make gpu-wheels filled elsewhere" >&2; exit 2; }
# Benchmarks that make gpu-check runs.
CARD_BENCHMARKS := bench_attention bench_kernels bench_card_training bench_card_generation

.DEFAULT_GOAL := help
.PHONY: help setup slurm-packages test gpu-wheels gpu-setup gpu-check lint demo bench

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

gpu-wheels: setup ## fill wheels/ for a machine with a CUDA card and no network; goes on where it was cut off
	@$(NEED_TOOLKIT)
	@echo "downloads about 5 GB and compiles transformer-engine-torch with $(CUDA_HOME), 12 minutes on two cores"
	$(BUILD_TE) $(PYTHON) -m tests.gpu.fill_wheels $(WHEELS)

gpu-setup: $(VENV)/.gpu-ready ## Transformer Engine and faiss-gpu, from wheels/ where it is filled, else from the registries

# Where this fails, the venv counts as not set up: make setup then brings faiss-cpu back.
$(VENV)/.gpu-ready: $(READY) requirements-gpu.txt
	@test -e $(WHEELS)/complete || $(NEED_TOOLKIT)
	@rm -f $(READY)
	$(PYTHON) -m pip uninstall --quiet --yes faiss-cpu faiss-gpu
	$(BUILD_TE) $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
		-r requirements-gpu.txt
	@touch $(READY) $@

# Target-specific variables reach setup too, so with a filled folder no registry is asked for anything.
ifneq ($(wildcard $(WHEELS)/complete),)
gpu-check gpu-setup: export PIP_NO_INDEX := 1
gpu-check gpu-setup: export PIP_FIND_LINKS := $(abspath $(WHEELS))
endif

gpu-check: gpu-setup ## on a machine with a CUDA card: the tests that need one, then times, added to tests/benchmarks/results.csv
	@failed=0; record=--record; $(PYTHON) -m pytest -m gpu -rs tests/gpu || { failed=1; record=; }; \
		for name in $(CARD_BENCHMARKS); do echo "== $$name"; \
		$(PYTHON) -m tests.benchmarks.$$name $$record || failed=1; done; \
		$(PYTHON) -m tests.benchmarks.results --write && exit $$failed

lint: setup ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

demo: setup ## the whole path on a real corpus: train, write memories, generate, score
	$(VENV)/bin/m3 demo

bench: setup ## speed and memory, each beside its floor
	@set -e; for script in tests/benchmarks/[a-z]*.py; do \
		echo "== $$script"; $(PYTHON) -m "$$(echo "$${script%.py}" | tr / .)"; done
