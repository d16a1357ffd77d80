# A fresh machine needs only make and Python >= 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TRITON := 3.9.0
WORKERS ?= 2
PYTEST_ARGS ?=

.PHONY: setup demo test check clean

setup: $(STAMP)

# torch goes first, at its exact version: a later requirement that admits newer builds then leaves it alone.
# triton: a CUDA build of torch brings the one it needs; only where it did not is the tested version taken.
$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"setup: expected Python >= 3.11, got {v.major}.{v.minor}; run make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip show --quiet triton 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt \
		"triton==$(TRITON); platform_system == 'Linux' and platform_machine == 'x86_64'"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/dplip train --config experiments/configs/digits.toml

# One thread a worker: more would fight over the same cores.
test: setup
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Leaves runs/ alone: results are not build products.
clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
