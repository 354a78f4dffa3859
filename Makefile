PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The lowest that pyproject.toml allows, and the newest that was tried.
TRANSFORMERS := 5.24.0
PROTOS := $(sort $(wildcard protos/insitu_proto/v1/*.proto))

.DEFAULT_GOAL := help
# Programs that some tests run, and skip without: Debian's names.
SYSTEM_PACKAGES := chromium fonts-dejavu-core postgresql prometheus

.PHONY: help setup system-packages demo test test-gpu test-transformers check k8s bench fmt lint types arch protos protos-check clean

help: ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed ## Makes the virtual environment and installs insitu with all that it needs.

# torch comes first, by its exact version: on a machine without a GPU pip then finds the CPU build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

system-packages: ## Installs the programs that some tests run, and skip without (Debian, as root).
	apt-get update --quiet=2
	DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install --quiet=2 --yes --no-install-recommends $(SYSTEM_PACKAGES)

demo: setup ## Starts a server with a small real model, runs the first session against it, stops it.
	$(BIN)/python examples/run_demo.py

# Tests of one file stay in one process, which shares its servers and models among them.
test: setup ## Runs all tests.
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

test-transformers: $(TRANSFORMERS:%=.venv-transformers-%/.installed) ## Runs the contract tests on the lowest and the newest transformers.
	for version in $(TRANSFORMERS); do .venv-transformers-$$version/bin/python -m pytest tests/contract || exit 1; done

.venv-transformers-%/.installed: pyproject.toml
	$(PYTHON) -m venv .venv-transformers-$*
	.venv-transformers-$*/bin/pip install --quiet torch==2.13.0
	.venv-transformers-$*/bin/pip install --quiet --editable '.[dev]' transformers==$*
	touch $@

test-gpu: setup ## Runs the tests that need a GPU.
	$(BIN)/python -m pytest tests/gpu

k8s: setup .venv-checkov/.installed ## Renders, checks and lints the Kubernetes manifests, and runs them as processes.
	@command -v kubectl >/dev/null || { echo 'kubectl, which renders the manifests, is not here: kubernetes.io/docs/tasks/tools'; exit 1; }
	folder=$$(mktemp --directory); trap "rm -r $$folder" EXIT; \
	  for overlay in deploy/k8s/overlays/*; do kubectl kustomize $$overlay > $$folder/$$(basename $$overlay).yaml || exit 1; done; \
	  .venv-checkov/bin/checkov --config-file deploy/k8s/checkov.yaml --directory $$folder
	$(BIN)/python -m pytest tests/deploy

.venv-checkov/.installed:
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/pip install --quiet checkov==3.3.30
	touch $@

bench: setup .venv-nnsight/.installed ## Measures, beside plain transformers and nnsight; a smoke run with BENCH_FLAGS=--quick.
	$(BIN)/python benchmarks/first_session.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/recording.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/hooks.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/sweep.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/logit_lens.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/attention.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/generation.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/gradients.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/many_clients.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/fairness.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/scheduler.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/loading.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/deployment.py $(BENCH_FLAGS)
	$(BIN)/python benchmarks/download.py $(BENCH_FLAGS)

.venv-nnsight/.installed:
	$(PYTHON) -m venv .venv-nnsight
	.venv-nnsight/bin/pip install --quiet torch==2.13.0
	.venv-nnsight/bin/pip install --quiet nnsight==0.8.1 transformers==5.23.0 accelerate==1.15.0
	touch $@

check: lint types arch protos-check test ## Everything that a change must pass.

fmt: setup ## Formats the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/buf format --write

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf lint

types: setup
	$(BIN)/mypy

arch: setup
	$(BIN)/lint-imports

protos: setup ## Generates the Python code of the contract.
	$(BIN)/python -m grpc_tools.protoc --proto_path=protos \
	  --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --python_out=protos --mypy_out=protos $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc --proto_path=protos \
	  --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	  --grpc_python_out=protos --mypy_grpc_out=protos $(filter %_service.proto,$(PROTOS))

protos-check: protos
	git diff --exit-code -- protos
	@test -z "$$(git status --porcelain -- protos)" || { git status --short -- protos; exit 1; }
	@if git rev-parse --verify --quiet origin/main >/dev/null; \
	  then $(BIN)/buf breaking --against '.git#ref=origin/main'; \
	  else echo 'no origin/main to compare the contract with'; fi

clean: ## Removes the virtual environment and caches.
	rm -rf $(VENV) .venv-checkov .venv-nnsight .venv-transformers-* .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
