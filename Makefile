# Needs python3 and make, from whatever folder it is called. PYTHON picks the interpreter, VENV the environment's place.
ROOT := $(dir $(abspath $(lastword $(MAKEFILE_LIST))))
PYTHON ?= python3
VENV ?= $(ROOT).venv
BIN := $(abspath $(VENV))/bin
INSTALLED := $(abspath $(VENV))/.installed
# A process a core, each file's tests in one of them: fixtures of a file are made once.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: help venv train test test-slow docs-check lint clean

help:
	@echo "make venv | train | test | test-slow | docs-check | lint | clean"

venv: $(INSTALLED)

# The stamp makes this run once, and again when the dependencies may have changed.
$(INSTALLED): $(ROOT)pyproject.toml
	$(PYTHON) -m venv "$(VENV)"
	cd "$(ROOT)" && "$(BIN)/python" -m pip install --quiet --editable ".[dev]"
	"$(BIN)/python" -m pip install --quiet --no-deps "trackers>=2.6"
	touch "$@"

train: venv
	cd "$(ROOT)" && "$(BIN)/python" train.py --norm cmbn

test: venv
	cd "$(ROOT)" && "$(BIN)/python" -m pytest -q $(SIDE_BY_SIDE)

test-slow: venv
	cd "$(ROOT)" && "$(BIN)/python" -m pytest -q -m slow $(SIDE_BY_SIDE)

docs-check: venv
	cd "$(ROOT)" && "$(BIN)/python" -m tests.docs

lint: venv
	cd "$(ROOT)" && "$(BIN)/ruff" check . && "$(BIN)/ruff" format --check . && "$(BIN)/mypy"

clean:
	rm -rf "$(VENV)" "$(ROOT)build" "$(ROOT)yolov4_norms.egg-info"
	rm -rf "$(ROOT).pytest_cache" "$(ROOT).ruff_cache" "$(ROOT).mypy_cache"
	find "$(ROOT)" -name __pycache__ -type d -prune -exec rm -rf {} +
