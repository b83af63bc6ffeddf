# `make` lists the targets. Each one creates $(VENV) and installs what it needs into it by itself.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
OUT ?=

PY = $(VENV)/bin/python
# This checkout's sources, also when $(VENV) is shared with another one.
RUN = PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" $(PY)
# glibc hands a step's memory back and faults it in again for the next one, or not, as luck has it:
# up to a tenth of a step. Keeping it is as fast for both sides of a ratio, and repeatable.
KEEP_MEMORY = MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8589934592
installed = $(VENV)/.tangent-ops-$(1)

.DEFAULT_GOAL := help
.PHONY: help demo test lint format bench compile-check gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  VENV=path    use this environment instead of .venv    PYTHON=path  make .venv with this Python'
	@echo '  ARGS="..."   passed on to the demo, pytest or the ViT benchmark'
	@echo '  OUT=folder   where bench, compile-check and gpu-check write their results as JSON'

demo: $(call installed,demo) ## fine-tune, compose and forget with a real ViT; results in out/
	$(RUN) examples/shards_demo.py $(ARGS)

test: $(call installed,test) ## run every test
	$(RUN) -m pytest $(ARGS)

lint: $(call installed,test) ## ruff, pyright and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" $(VENV)/bin/lint-imports --no-logo

format: $(call installed,test) ## ruff's fixes and format, in place
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(call installed,bench) ## CPU ratios of the ViT and times of the attention op
	$(KEEP_MEMORY) $(RUN) benchmarks/bench_vit.py $(if $(OUT),--out "$(OUT)") $(ARGS)
	$(RUN) -m pytest benchmarks/bench_attention.py $(if $(OUT),--benchmark-json="$(OUT)/attention.json")

compile-check: $(call installed,bench) ## every kernel compiled for four GPUs, without one: registers, spills
	$(RUN) benchmarks/compile_kernels.py $(if $(OUT),--out "$(OUT)") $(ARGS)

gpu-check: $(call installed,test) ## on a CUDA machine: the gpu tests and the GPU benchmarks
	$(RUN) benchmarks/gpu_check.py $(if $(OUT),--out "$(OUT)") $(ARGS)

clean: ## remove caches and build products; keeps .venv, downloads and out/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	find tangent_ops kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# --no-compile: Python compiles what it imports; compiling all of torch first takes half a minute.
$(call installed,%): pyproject.toml | $(VENV)/bin/pip
	$(PY) -m pip install --no-compile --editable ".[$*]"
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tangent-ops needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
