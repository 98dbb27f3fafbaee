# onchip: `make` lists what there is to do. Every target sets up what it needs.

.DEFAULT_GOAL := help
.PHONY: help .venv demo test check native bench budgets clean test-gpu bench-gpu .gpu

BIN := .venv/bin
READY := .venv/.ready
NATIVE_SOURCES := $(wildcard CMakeLists.txt) $(shell find native -type f)

# Idle OpenMP threads sleep instead of spinning: on a machine with few cores spinning slows the others down.
export OMP_WAIT_POLICY ?= passive
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help: ## List the targets
	@printf 'usage: make TARGET\n\n'
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## Train a small language model on real text, sample from it, draw what it does (about 5 minutes)
	$(BIN)/onchip train --preset demo --out demo
	$(BIN)/onchip show demo
	@printf '\nEverything is in demo/. `. .venv/bin/activate` puts onchip on your PATH, for the commands above and for\n'
	@printf '  %s\n' 'onchip show demo --text "for i in range(10): print(i)"' 'onchip --help'

test: $(READY) ## Run the whole test suite; ARGS="-k name" for a part
	$(BIN)/python -m pytest -n 2 $(ARGS)

check: $(READY) ## Lint, format and type checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY) ## Measure attention against PyTorch's own, table only (about 20 minutes)
	$(BIN)/onchip bench attention

test-gpu: .gpu ## Run the tests of operations, mixers and models on the GPU, with the machine's own python3 (under 10 minutes)
	mkdir -p $(OUT)
	$(ON_GPU) -m pytest -n auto --maxprocesses 16 --dist worksteal --durations 20 --junit-xml $(OUT)/test-gpu.xml \
	  tests/ops tests/bench tests/cli/test_tune.py tests/test_on_gpu.py $(ARGS)

# Each has its share of the nine minutes; what is stopped keeps the rows it has.
bench-gpu: .gpu ## Measure the operations on the GPU, with the machine's own python3, into benchmarks/results (under 10 minutes)
	mkdir -p $(OUT)
	code=0; \
	bench() { limit=$$1; shift; $(ON_GPU) -m onchip bench "$$@" --device cuda --record $(ARGS) || code=$$?; }; \
	bench 260 attention --suite forward,backward,decode --seconds 0.5; \
	bench 40 causal_conv1d --seconds 1; \
	bench 80 selective_scan --seconds 1; \
	bench 50 ssd --seconds 1; \
	bench 60 mamba --suite step --seconds 1; \
	$(ON_GPU) benchmarks/table.py; cp -R benchmarks/results README.md docs/speed.md $(OUT); exit $$code

budgets: $(READY) ## Compile the kernels for GPUs that are not there and write what they take (about 3 minutes)
	$(BIN)/python -m onchip.testing.budgets tests/budgets.toml

native: ## Build the native kernels again
	@rm -f $(READY)
	@$(MAKE) --no-print-directory $(READY)

clean: ## Remove what was built, the caches and .venv; runs and demo stay
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache

.venv: $(READY) ## Set up: a virtual environment, the pinned dependencies, the native build

# A machine that is lent for its GPU may have all packages, no network and no right to change them: onchip is built into
# build/gpu, and nothing else is touched. OUT receives the results. 500 seconds and the build are nine minutes.
GPU_PYTHON := $(or $(PYTHON),python3)
OUT ?= build/gpu
ON_GPU = PYTHONPATH=$(CURDIR)/build/gpu/site TRITON_CACHE_DIR=$(CURDIR)/build/gpu/triton COLUMNS=140 \
  timeout --foreground -s INT -k 20 $${limit:-500} $(GPU_PYTHON)

.gpu:
	@$(GPU_PYTHON) benchmarks/require_gpu.py
	$(GPU_PYTHON) -m pip install -q --no-deps --no-index --no-build-isolation --upgrade --target build/gpu/site \
	  --config-settings=build-dir=build/gpu/cmake .
	@PYTHONPATH=build/gpu/site $(GPU_PYTHON) -c 'import onchip._native' || echo 'The native kernels were not built.'

define FIND_PYTHON
python=; for p in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11); do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && python=$$p && break; \
done; \
if [ -z "$$python" ]; then \
  echo 'onchip needs Python 3.11 or newer, and found none; install one, or name it: make PYTHON=/path/to/python3' >&2; \
  exit 1; \
fi; \
if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
  version=$$("$$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
  echo "$$python cannot make a virtual environment; on Debian and Ubuntu: sudo apt install $$version-venv" >&2; \
  exit 1; \
fi
endef

$(READY): pyproject.toml constraints.txt $(NATIVE_SOURCES)
	@test -x $(BIN)/pip && $(BIN)/python -c '' || { $(FIND_PYTHON); echo "Setting up .venv, once"; "$$python" -m venv --clear .venv; }
	PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --progress-bar off -e '.[dev]'
	@$(BIN)/python -c 'import onchip._native' 2>/dev/null || echo \
	  'The native kernels were not built (is there a C++20 compiler?): onchip works, slowly. `make native` tries again.'
	@touch $@
