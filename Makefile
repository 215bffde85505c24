# make test      set up, then the tests that take minutes     make demo    set up, then the main job, with its report
# make test-slow the slow tests, those alone                  make lint    ruff and mypy
# make test-all  all of them, on the GPU too if there is one  make clean   remove the environment and build outputs
#
# PYTHON=...       the interpreter to use (3.11 or 3.12; the first usable one on PATH is taken)
# CONSTRAINTS=...  another set of versions (CONSTRAINTS=/dev/null: the newest that pyproject.toml allows)
# PYTEST_ARGS=...  passed on to pytest

# Threads that wait by spinning take the cores from those they wait for, tenfold slower on a busy machine; those that
# sleep at once are woken late (scripts/bench_threads.py).
export GOMP_SPINCOUNT ?= 5000
# Every process of the tests would compile the package, and every worker rewrite each test, anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := test
.PHONY: setup test test-slow test-all demo lint clean

CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=

# A name on PATH can be a stub that does not start, or a Python without venv; so each is tried.
usable := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	"$$p" -c '$(usable)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

workers := --numprocesses auto --maxprocesses 4 --dist worksteal

venv := .venv
python := $(venv)/bin/python

setup: $(venv)/.ready

$(venv)/.ready: pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or 3.12 with venv on PATH; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(python) || "$(PYTHON)" -m venv $(venv)
	@echo "Installing diffaccel and its tests' tools into $(venv) (a few minutes the first time)"
	$(python) -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[test]"
	@touch $@

test: setup
	$(python) -m pytest $(workers) -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: setup
	$(python) -m pytest $(workers) -m "slow and not gpu" $(PYTEST_ARGS)

test-all: setup
	$(python) -m pytest $(workers) -m "" $(PYTEST_ARGS)

demo: setup
	$(python) -m scripts.demo --out out/demo

lint: setup
	$(python) -m ruff check .
	$(python) -m mypy

clean:
	rm -rf $(venv) build dist out *.egg-info .coverage .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
