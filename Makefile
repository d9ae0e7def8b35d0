# `make demo` and `make test` set up all they need in .venv: Python 3.11 or newer, git and make must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint unit long test-slow benchmark clean

demo: .venv/ready
	$(BIN)/bitquorum run digits
	$(BIN)/bitquorum plane digits
	$(BIN)/bitquorum detect digits
	$(BIN)/bitquorum report digits

test: lint unit long

lint: .venv/ready
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

unit: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'not slow and not long'

long: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m 'long and not slow' tests

# Needs minutes; data sets outside the repository are used where $$BITQUORUM_DATA holds them, and skipped elsewhere.
test-slow: .venv/ready
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -m slow -rs

benchmark: .venv/ready
	$(BIN)/bitquorum benchmark

# The pins make a fresh machine install what the tests ran with; the package itself takes newer versions too.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bitquorum needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
