# Short targets; `run` and `test` set up everything they need in .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A development install is editable, at the versions of requirements-dev.lock: a release of a library breaks no checkout.
# The image has a lock of its own, with hashes (requirements.lock).
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
LOCK := requirements-dev.lock
SITE := $(BIN)/python -m sphinx --quiet --fresh-env --write-all --fail-on-warning --keep-going -c docs -b html . build/site
SBOM := $(BIN)/python -W ignore::UserWarning -m cyclonedx_py requirements --pyproject pyproject.toml --output-reproducible \
	--output-format JSON --output-file build/sbom.cdx.json requirements.lock

# Where `make install` puts the command.
BINDIR ?= $(HOME)/.local/bin

.PHONY: run install help test test-fast control-plane check fmt docs docs-site sbom image bench chaos clean

run: $(STAMP)  ## answer examples/requests.jsonl on this machine: embedded Pub/Sub, worker, simulated backend
	$(BIN)/inference-worker local examples/requests.jsonl out.jsonl --simulated
	@echo "30 of the 271 lines are wrong on purpose (examples/README.md): their errors are the expected answers."
	@command -v inference-worker >/dev/null || echo "The command: $(BIN)/inference-worker, or after \`make install\` inference-worker."

install: $(STAMP)  ## put `inference-worker` on the PATH: a link in ~/.local/bin (BINDIR=) to this checkout
	mkdir -p "$(BINDIR)"
	ln -sf "$(abspath $(BIN))/inference-worker" "$(BINDIR)/inference-worker"
	@case ":$$PATH:" in *":$(BINDIR):"*) ;; *) echo "$(BINDIR) is not on your PATH yet: export PATH=\"$(BINDIR):\$$PATH\"" ;; esac

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Most of the tests outside tests/unit wait, for a lease or for a process, so three at a time share two cores well.
# Chunks of four keep the order of tests/conftest.py, and no process ends up with a row of long tests.
PARALLEL ?= -n 3 --dist load --maxschedchunk 4

test: $(STAMP)-dev  ## every test; what a machine lacks is skipped with a printed reason
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-fast: $(STAMP)-dev  ## the unit tests alone: a minute on two cores
	$(BIN)/python -m pytest -n 2 tests/unit $(PYTEST_ARGS)

control-plane: $(STAMP)-dev  ## the manifests on a real Kubernetes control plane, built of Go modules: an hour, later 20 minutes
	CONTROL_PLANE_TESTS=1 $(BIN)/python -m pytest tests/deploy/test_control_plane.py $(PYTEST_ARGS)

check: $(STAMP)-dev  ## lint, format, types, architecture, generated documents, the documentation site, the bill of materials
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/generate_docs.py --check
	$(BIN)/python deploy/alerts/generate.py --check
	$(BIN)/python deploy/grafana/generate.py --check
	$(SITE)
	$(SBOM)

sbom: $(STAMP)-dev  ## what is in the image, as CycloneDX, from its lock: build/sbom.cdx.json
	mkdir -p build
	$(SBOM)

docs-site: $(STAMP)-dev  ## build the documentation into build/site; a broken link, anchor or list fails
	$(SITE)

fmt: $(STAMP)-dev  ## format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)-dev  ## generate what is generated: settings, metrics, alerts, dashboard, model of scaling
	$(BIN)/python tools/generate_docs.py
	$(BIN)/python deploy/alerts/generate.py
	$(BIN)/python deploy/grafana/generate.py
	$(BIN)/python -m benchmarks.scaling --write docs/scaling.md

IMAGE ?= localhost/inference-worker
image:  ## build the container image with podman, buildah or docker, whichever is there
	@engine=$$(command -v podman || command -v buildah || command -v docker) || { echo "no podman, buildah or docker"; exit 1; }; \
	set -x; "$$engine" build $(BUILD_FLAGS) -t $(IMAGE) .

bench: $(STAMP)-dev  ## benchmarks; BENCH_ARGS=--short for a quick form
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

chaos: $(STAMP)-dev  ## break things under a running worker and print what it cost; CHAOS_ARGS="--scale 0.1" for a short form
	$(BIN)/python -m tests.chaos $(CHAOS_ARGS)

clean:  ## remove what the targets above made
	rm -rf $(VENV) build dist out.jsonl .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(STAMP): pyproject.toml $(LOCK) | $(BIN)/python
	$(PIP) install --upgrade 'pip>=25.1'
	$(PIP) install --constraint $(LOCK) --editable '.[batches]'
	touch $@

$(STAMP)-dev: $(STAMP)
	$(PIP) install --constraint $(LOCK) --group test --group check
	$(PYTHON) -m venv $(VENV)/terraform && $(VENV)/terraform/bin/python -m pip --disable-pip-version-check --quiet install 'tf==1.2.0'
	touch $@
