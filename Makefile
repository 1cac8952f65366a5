# Ten short targets; `run` and `test` set up everything they need in .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A development install is editable; a lock of hashes is for the image (requirements.lock).
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: run test check fmt docs bench chaos clean

run: $(STAMP)  ## answer examples/requests.jsonl on this machine: embedded Pub/Sub, worker, simulated backend
	$(BIN)/inference-worker local examples/requests.jsonl out.jsonl

test: $(STAMP)-dev  ## every test; what a machine lacks is skipped with a printed reason
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(STAMP)-dev  ## lint, format, types, architecture, generated documents
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/generate_docs.py --check

fmt: $(STAMP)-dev  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)-dev  ## generate docs/settings.md and docs/metrics.md
	$(BIN)/python tools/generate_docs.py

bench: $(STAMP)-dev  ## benchmarks; BENCH_ARGS=--short for a quick form
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

chaos: $(STAMP)-dev  ## break things under a running worker and print what it cost; CHAOS_ARGS="--scale 0.1" for a short form
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

clean:  ## remove what the targets above made
	rm -rf $(VENV) build dist out.jsonl .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml | $(BIN)/python
	$(PIP) install --upgrade 'pip>=25.1'
	$(PIP) install --editable .
	touch $@

$(STAMP)-dev: $(STAMP)
	$(PIP) install --group test --group check
	touch $@
