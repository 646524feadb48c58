# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer; see README.md.
PYTHON ?= python3
VENV ?= .venv
PLAN ?= configs/demo.yaml
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# Test files at a time.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-slow lint install

demo: $(STAMP)
	$(BIN)/python -m launch run $(PLAN) $(SET)

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

# The stamp is written last: an interrupted installation starts over.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	touch $(STAMP)
