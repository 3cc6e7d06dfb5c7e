# Two targets are enough on a fresh machine: `make repro` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
# nothing here reports home
export DVC_NO_ANALYTICS := 1
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.DEFAULT_GOAL := help
.PHONY: help repro test lint format bench clean

help: ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "harken needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint constraints.txt --editable '.[dev,cluster,cpu]'
	@touch $@

repro: $(READY) ## run the pipeline that params.yaml describes (as committed: the built-in world)
	dvc repro

test: $(READY) ## ruff, types, import contracts and the default tests
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: $(READY) ## style, types and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## put the code into the house's style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(READY) ## ratios against named peers, printed by each benchmark
	@set -e; for f in benchmarks/bench_*.py; do echo "== $$f"; $(BIN)/python $$f; done

clean: ## remove the environment and every result
	rm -rf $(VENV) data/world models reports .work .dvc/cache .dvc/tmp
