# make demo · make test · make lint: each sets up .venv on its first run, and not again until pyproject.toml changes.
# make test runs the tests in two processes; those of tests/parity in one, which sees whether all fixtures were read.
# make test-slow runs the tests that take minutes. make test-faults kills, stops and starves COUNT tiny runs, from SEED on,
# and gives the fuzz tests COUNT examples each.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEED ?= 0
COUNT ?= 51

.PHONY: demo test test-slow test-faults lint clean

demo: $(READY)
	$(BIN)/hvp demo

test: $(READY)
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadgroup --ignore tests/parity
	$(BIN)/python -m pytest -m 'not slow' tests/parity

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

test-faults: $(READY)
	$(BIN)/python -m tests.faults --seed $(SEED) --count $(COUNT)
	HVP_EXAMPLES=$(COUNT) $(BIN)/python -m pytest tests/faults --hypothesis-seed=$(SEED)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p hvp

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hvp needs Python 3.11 or later; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build *.egg-info
