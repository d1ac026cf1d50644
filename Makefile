# Every target sets up .venv first; a machine needs Python 3.11, make and access to a package registry.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
PY := $(VENV)/bin/python
LOCK := requirements.lock
STAMP := $(VENV)/.stamp
NEED_GB := 10
export OMP_NUM_THREADS ?= 1

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

.PHONY: setup
setup: $(STAMP) ## the pinned stack in .venv, about 8.6 GB: the registry's torch carries CUDA

$(STAMP): $(LOCK) pyproject.toml hatch_build.py nxdt_nemo_activate.pth
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	if [ ! -d $(VENV)/lib/python3.11/site-packages/torch ]; then
	  free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}')
	  if [ "$$free" -lt $(NEED_GB) ]; then echo "make: $$free GB free here, the stack needs $(NEED_GB) GB" >&2; exit 1; fi
	  echo "setting up $(VENV): about 8.6 GB, because the registry's torch carries CUDA; some minutes"
	fi
	if uv=$$(command -v uv); then
	  [ -x $(PY) ] || "$$uv" venv --quiet --allow-existing --python "$$(command -v $(PYTHON))" $(VENV)
	else
	  [ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	  uv=$(VENV)/bin/uv
	  [ -x "$$uv" ] || { $(PY) -m ensurepip >/dev/null; $(PY) -m pip install --quiet uv; }
	fi
	"$$uv" pip install --python $(PY) --compile-bytecode -r $(LOCK)
	"$$uv" pip install --python $(PY) --no-deps --no-build-isolation -e .
	env -u PYTHONDONTWRITEBYTECODE $(PY) -m compileall -q nxdt_nemo
	touch $@

.PHONY: demo
demo: $(STAMP) ## trains a small Llama on real English text, saves, resumes, generates: under 5 minutes
	@$(PY) tools/demo.py

.PHONY: demo-finetune
demo-finetune: $(STAMP) ## a Hugging Face model learns answers by LoRA on two ranks, is merged and exported: under 8 minutes
	@$(PY) tools/demo_finetune.py

.PHONY: test
test: $(STAMP) ## every test that is not slow
	@$(PY) -m pytest -q

.PHONY: test-slow
test-slow: $(STAMP) ## the slow ones
	@$(PY) -m pytest -q -m slow

.PHONY: test-layouts
test-layouts: $(STAMP) ## every model family in every parallel layout against one rank, at most 8 ranks; writes docs/results/layouts.md
	@$(PY) tools/layouts.py

.PHONY: test-communication
test-communication: $(STAMP) ## bytes of a step by process group and collective, against the least that the layout has to send
	@$(PY) tools/communication.py

.PHONY: test-memory
test-memory: $(STAMP) ## bytes of a step on each rank against the formula of docs/memory.md, at most 4 ranks; writes docs/results/memory.md
	@$(PY) tools/memory.py

.PHONY: test-neuron
test-neuron: $(STAMP) ## the neuron lane on a stand-in for its device against the cpu lane; writes docs/results/neuron_torch2.9.md
	@$(PY) tools/neuron.py

.PHONY: test-neuron-lock
test-neuron-lock: ## the same with torch 2.14 and fast tests of the cpu lane, in .venv-neuron; writes docs/results/neuron_torch2.14.md
	@$(MAKE) --no-print-directory VENV=.venv-neuron LOCK=requirements-neuron.lock test-neuron test-on-lock

.PHONY: test-on-lock
test-on-lock: $(STAMP)
	@$(PY) -m pytest -q tests/patching tests/apex tests/runtime tests/megatron/test_parity.py tests/nemo/test_stock_script.py tests/nemo/test_resume.py

.PHONY: test-upstream
test-upstream: $(STAMP) ## NVIDIA's own tests from the sdist of nemo_toolkit, without us and with us, 12 minutes
	@$(PY) tools/test_upstream.py

.PHONY: test-megatron
test-megatron: $(STAMP) ## megatron-core's own unit tests on 1, 2, 4 and 8 ranks: those that have not run yet; writes docs/results/megatron.md
	@$(PY) tools/test_megatron.py

.PHONY: test-xla-run
test-xla-run: $(STAMP) ## the stock NeMo script on the xla lane: graphs compiled, tensors read back; writes docs/results/xla_run.md
	@$(PY) tools/xla_run.py

.PHONY: test-lift
test-lift: $(STAMP) ## ranks of the xla lane, all in one process or as processes, against the cpu lane's; writes docs/results/xla_lift.md
	@$(PY) tools/lift.py

.PHONY: test-audit
test-audit: $(STAMP) ## nxdt-nemo audit of Llama-3 8B and 70B in worlds of 64 to 2,048 ranks; writes docs/results/audit.md
	@$(PY) tools/audit.py

.PHONY: lint
lint: $(STAMP) ## ruff, mypy --strict, import-linter
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

.PHONY: format
format: $(STAMP) ## ruff's formatter and its safe fixes
	@$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: lock
lock: ## requirements.lock from pyproject.toml
	@tools/lock.sh

.PHONY: wheel
wheel: $(STAMP) ## the wheel, in dist/
	@$(PY) -m build --wheel --no-isolation

.PHONY: clean
clean: ## what tests, builds and the demo leave; keeps .venv
	@rm -rf dist build demo outputs nemo_experiments .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find nxdt_nemo tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
