# Browsecast. `make help` says what there is. PYTHON=/path/to/python3 chooses another interpreter.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CANDIDATES := python3.11 python3.12 python3.13 python3.14 python3 python
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
BENCHMARKS := sessionize recovery latency refresh
ARGS ?=

.PHONY: help demo test lint types rooms pytest bench format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(VENV)/.installed ## set everything up and run the main job (ARGS="--bootstrap-servers HOST:PORT" for any Kafka)
	$(BIN)/browsecast demo $(ARGS)

test: lint types rooms pytest ## set everything up and pass the tests

lint: $(VENV)/.installed-dev ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint --strict docker-compose.yml deploy

types: $(VENV)/.installed-dev ## types
	$(BIN)/mypy

rooms: $(VENV)/.installed-dev ## which room may import which
	$(BIN)/lint-imports --no-logo

pytest: $(VENV)/.installed-dev ## the tests alone (ARGS="-k sessions")
	$(BIN)/python -m tests $(ARGS)

bench: $(VENV)/.installed-dev .venv-bench/.installed ## benchmarks, one JSON line each (ARGS="--bootstrap-servers HOST:PORT")
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.inference --size ci
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name $(ARGS); done

format: $(VENV)/.installed-dev ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the demo and the tools left behind (not the virtual environment)
	rm -rf demo state build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@python="$(PYTHON)"; \
	for candidate in $(CANDIDATES); do \
	    [ -z "$$python" ] || break; \
	    ! "$$candidate" -c '$(NEW_ENOUGH)' >/dev/null 2>&1 || python="$$candidate"; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "make: no Python 3.11 or later with its venv module was found (tried: $(CANDIDATES))." >&2; \
	    echo "Install one (on Debian and Ubuntu also python3-venv), or name it: make demo PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	fi; \
	if ! "$$python" -c '$(NEW_ENOUGH)'; then \
	    echo "make: PYTHON=$$python is not Python 3.11 or later with its venv module." >&2; \
	    exit 1; \
	fi; \
	"$$python" -m venv $(VENV)

# The lock pins every package by hash; the project itself needs no isolation, its build tool is in the lock.
$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python
	$(PIP) install --require-hashes --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: requirements-dev.lock pyproject.toml | $(BIN)/python
	$(PIP) install --require-hashes --requirement requirements-dev.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

# Quix Streams wants other versions than we do, so it has a virtual environment of its own.
.venv-bench/.installed: benchmarks/requirements.lock | $(BIN)/python
	$(BIN)/python -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check install --require-hashes --requirement $<
	touch $@
