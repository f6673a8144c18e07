# Every target sets up .venv on its first run, and again only when pyproject.toml changes.
#   make demo          pretrain on generated images, evaluate, and draw what was selected
#   make test          the tests, in two processes; tests/parity in one, which checks that every fixture was read
#   make test-slow     the tests that take minutes
#   make test-faults   kill, stop and starve COUNT tiny runs, from SEED on; fuzz tests with COUNT examples each
#   make lint          ruff, its formatter, and mypy over the package and the tests
#   make docs          the documentation and an API reference, in site/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
SEED ?= 0
COUNT ?= 51

.PHONY: demo test test-slow test-faults lint docs clean

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
	$(BIN)/mypy -p hvp -p tests

docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hvp needs Python 3.11 or later; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $(DOCS_READY)

clean:
	rm -rf $(VENV) build site *.egg-info src/*.egg-info
