# PYTHON: which interpreter builds .venv.  DEVICE: auto (default), cpu or cuda.
# ARGS: more arguments for the demo.  JOBS: engine tests side by side.
# SECONDS: how long the soak's traffic lasts.
PYTHON ?= python3
JOBS ?= 2
SECONDS ?= 3600
DEVICE ?= $(or $(VLLM_PPD_DEVICE),auto)

# Commands of .venv first, so that tests and engines start what was installed there.
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH"
# Tests that start servers or several workers want the machine's memory to themselves.
ALONE_TESTS := $(wildcard tests/e2e tests/engine/test_parallel.py \
	tests/engine/v2/test_parallel_v2.py)

.PHONY: help setup demo test test-unit verify soak lint format clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: ## make .venv with vLLM (CUDA or CPU) and this project, once
	@$(PYTHON) scripts/setup_env.py --device $(DEVICE)

demo: setup ## a small chat model answers, plain against PPD
	@export $(RUN); model="$$(python scripts/smollm2.py)" && \
		vllm-ppd demo --eager --model "$$model" $(ARGS)

test: test-unit ## all tests; those that need a GPU are skipped without one
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 tests/kernels
	@$(RUN) python -m pytest -n $(JOBS) --dist loadfile tests/engine \
		$(addprefix --ignore=,$(filter tests/engine/%,$(ALONE_TESTS)))
	@$(RUN) python -m pytest $(ALONE_TESTS)

test-unit: setup ## quick: tests that start no engine and compile no kernel
	@$(RUN) OMP_NUM_THREADS=1 python -m pytest -n auto --maxprocesses 4 tests/unit

verify: setup ## an hour or more: PPD against plain vLLM over a table of settings
	@$(RUN) python benchmarks/exactness.py --out benchmarks/results/exactness_v1.json
	@$(RUN) python benchmarks/exactness.py --runner v2 \
		--out benchmarks/results/exactness_v2.json

soak: setup ## an hour of mixed traffic, then faults
	@$(RUN) python -m tests.soak --seconds $(SECONDS) \
		--out benchmarks/results/soak_v1.json

lint: setup ## ruff and mypy, changing nothing
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy vllm_ppd

format: setup ## let ruff fix and format
	@$(RUN) ruff check --fix .
	@$(RUN) ruff format .

clean: ## remove .venv and caches; build/ (trained models) stays
	rm -rf .venv dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './build/*' -prune -exec rm -rf {} +
