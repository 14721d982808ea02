# `make demo` and `make test` work in a fresh clone: they set up everything they need in .venv.
#
#   PYTHON       the interpreter to use (3.10 to 3.13); by default the first fitting one on the PATH
#   TORCH_INDEX  an additional package index for torch, e.g. that of PyTorch's CPU wheels, which need no CUDA libraries
#   PYTEST_ARGS  arguments for pytest, e.g. "-k sampler"
#   WORKERS      processes that share the tests; 0: the tests run in pytest's own, one after the other
#   PARTS        parts of `make campaign` with commas between, see docs/campaign.md; SEED, MINUTES (of each part), NUMBER
#                (trials of each part), FIRST (number of the first one, to go on where a part was stopped), CASE (the folder of
#                a fault to try once more) are options of it too
#   FIGURES      what `make figures` measures, see docs/figures.md

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c '$(PYTHON_FITS)' 2>/dev/null && echo $$python && break; done)
PYTHON_FITS := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= 2
FIGURES ?= quick
PARTS ?= all
SEED ?= 1
MINUTES ?= 0
NUMBER ?= 0
FIRST ?= 0
CASE ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --constraint constraints.txt
# Each process gets a half of the tests in their order, so that it rarely builds what the other has built, and whoever is
# done first takes from the other's.
SHARED := -n $(WORKERS) --dist worksteal
PACKAGES := configs data launcher model routing
CLUSTER_PACKAGES := slurm-wlm munge openssh-server openssh-client pdsh iproute2

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-network test-cluster cluster-packages check lint import-rules typecheck wheel figures findings campaign gpu-check clean

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## create .venv with everything in it (the other targets do this by themselves)

demo: setup  ## compare five routers with the reference on eight domains; ends with a table and the path of the report
	$(BIN)/moe-testbed compare configs/suites/demo.yaml --jobs auto

test: setup  ## run the tests, except the slow ones and those on real daemons
	$(BIN)/pytest $(SHARED) -m "not slow and not network and not daemons" $(PYTEST_ARGS)

test-all: test  ## run the tests, then the slow ones
	$(BIN)/pytest $(SHARED) -m "slow and not network and not daemons" $(PYTEST_ARGS)

test-network: setup  ## run the tests that download something
	$(BIN)/pytest -m network $(PYTEST_ARGS)

test-cluster: setup cluster-packages  ## as root on Debian: test on real SLURM daemons and on hosts made of network namespaces
	MOE_TESTBED_REQUIRE_DAEMONS=1 $(BIN)/pytest -m daemons $(PYTEST_ARGS)

cluster-packages:  ## install what test-cluster needs, unless it is there
	@dpkg --status $(CLUSTER_PACKAGES) > /dev/null 2>&1 || { \
		echo "Installing $(CLUSTER_PACKAGES)"; \
		apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive \
			apt-get install --quiet=2 --yes --no-install-recommends $(CLUSTER_PACKAGES) > /dev/null; }

check: typecheck lint import-rules  ## lint, format, types and import rules

lint: setup  ## lint and format only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

import-rules: setup  ## import rules only
	$(BIN)/lint-imports

typecheck: setup  ## types only
	@mkdir -p .typing/moe_testbed
	@for package in $(PACKAGES); do ln -sfn ../../$$package .typing/moe_testbed/$$package; done
	$(BIN)/mypy

wheel: setup  ## build a wheel into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .

figures: setup  ## measure the figures of README and docs anew and stamp them: FIGURES=quick (default), demo, seeds, study, tests
	$(BIN)/python benchmarks/figures.py $(FIGURES)

campaign: setup  ## try thousands of broken inputs, kills and full disks: PARTS, SEED, MINUTES, NUMBER, FIRST, CASE (docs/campaign.md)
	$(BIN)/python -m tests.campaign --parts $(PARTS) --seed $(SEED) --minutes $(MINUTES) --number $(NUMBER) --first $(FIRST) $(if $(CASE),--case $(CASE))

gpu-check: setup  ## on a machine with a GPU: the same losses as on the CPU, and how fast it is (8 minutes)
	$(BIN)/python benchmarks/gpu_check.py

findings:  ## say which surprises of libraries in findings/ still hold (installs packages, takes minutes)
	@status=0; for finding in findings/*.sh; do \
		if PYTHON="$(PYTHON)" $$finding; then echo "$$finding: holds"; \
		else case $$? in 1) echo "$$finding: has changed"; status=1;; *) echo "$$finding: could not be tried"; status=1;; esac; fi; \
	done; exit $$status

clean:  ## remove what the tools wrote; .venv, the data cache and the runs stay
	rm -rf build dist .typing .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "No Python from 3.10 to 3.13 on the PATH: install one, or name it with make PYTHON=..." >&2; exit 1; }
	@"$(PYTHON)" -c '$(PYTHON_FITS)' || { echo "$(PYTHON) is $$("$(PYTHON)" --version): Python 3.10 to 3.13 is needed; name another with make PYTHON=..." >&2; exit 1; }
	@echo "Creating $(VENV) with $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

# torch comes first: DeepSpeed has no wheel, and its set-up script looks for torch. DS_BUILD_OPS=0 compiles none of its kernels.
$(VENV)/.torch: $(VENV)/.created constraints.txt
	@echo "Installing torch"
	@$(PIP_INSTALL) setuptools wheel
	@$(PIP_INSTALL) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	@echo "Installing moe-testbed and the packages it needs"
	@DS_BUILD_OPS=0 $(PIP_INSTALL) --editable '.[dev]'
	@touch $@
