# `make` lists the targets. Each one creates $(VENV) and installs what it needs into it by itself.

PYTHON ?= python3
VENV ?= $(if $(OLDEST),.venv-oldest,.venv)
ARGS ?=
OUT ?=

PY = $(VENV)/bin/python
# This checkout's sources, also when $(VENV) is shared with another one.
RUN = PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" $(PY)
PER_CORE = -n auto --dist loadfile --no-loadscope-reorder
# Triton 3.6's interpreter needs numpy below 2.4.
OLDEST_VERSIONS = "torch==2.11.*" "triton==3.6.*" "numpy<2.4"
installed = $(VENV)/.tangent-ops-$(1)

.DEFAULT_GOAL := help
.PHONY: help demo exact-demo private-demo meanflow study test lint docs format bench bench-compiled gpu-bench publish pictures compile-check rehearse gpu-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  VENV=path    use this environment instead of .venv    PYTHON=path  make .venv with this Python'
	@echo '  OLDEST=1     the oldest torch and triton that are supported, in .venv-oldest'
	@echo '  ARGS="..."   passed on to the demo, pytest or the suite'
	@echo '  OUT=folder   where docs, bench, gpu-bench and gpu-check write their results'

demo: $(call installed,demo) ## add up statistics of shards, forget an image and a shard, with a real ViT; a picture in out/
	$(RUN) examples/demo.py $(ARGS)

exact-demo: $(call installed,demo) ## optima, certificates and influences on 1,000 of its images
	$(RUN) examples/exact_demo.py $(ARGS)

private-demo: $(call installed,private-demo) ## fine-tune with differential privacy, and say what that promises
	$(RUN) examples/private_demo.py $(ARGS)

meanflow: $(call installed,demo) ## train a small DiT by MeanFlow on MNIST-5k; digits in one step, as a picture in out/
	$(RUN) examples/meanflow.py $(ARGS)

study: $(call installed,study) ## the paper's claims on real images, into docs/study; run again, it goes on
	$(RUN) -m studies.paper $(ARGS)

# Triton decides at import whether to interpret kernels, so their tests need processes of their own.
# pytest's exit status 5: ARGS selects none of them.
test: $(call installed,test) ## run every test, a process per core: first without the kernels, then they, interpreted
	$(RUN) -m pytest $(PER_CORE) $(ARGS)
	TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= $(RUN) -m pytest $(PER_CORE) $(ARGS) || [ $$? -eq 5 ]

lint: $(call installed,test) $(call installed,docs) ## ruff, pyright and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	PYTHONPATH="$(CURDIR):$(CURDIR)/kernels" $(VENV)/bin/lint-imports --no-logo

docs: $(call installed,docs) ## the pages as a site, its tutorial executed: out/site/index.html; offline
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --site-dir "$(or $(OUT),out/site)" $(ARGS)

format: $(call installed,test) ## ruff's fixes and format, in place
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(call installed,bench) ## the benchmarks on this machine: times, memory, limits, targets
	$(RUN) -m benchmarks.run --out "$(or $(OUT),out/bench)" $(if $(ARGS),-- $(ARGS))

# A process per size: the largest model needs the memory that the others' would not give back.
bench-compiled: $(call installed,bench) ## whole models of every size, eager and torch.compile; run again, it goes on
	status=0; for model in small base large; do \
	  TANGENT_OPS_BENCH_COMPILE=1 $(RUN) -m benchmarks.run --resume \
	    --out "$(or $(OUT),out/compiled)/$$model" -- --extent=full \
	    -k "vit_$$model and (model_forward or train_step) and (taft or finetune) and not (cached or finetune-1)" \
	    $(ARGS) || status=$$?; \
	done; exit $$status

gpu-bench: $(call installed,bench) ## on a CUDA machine: the benchmarks, file by file; run again, it goes on
	$(RUN) -m benchmarks.run --resume $(if $(OUT),--out "$(OUT)") $(if $(ARGS),-- $(ARGS))

publish: $(call installed,bench) ## docs/benchmarks.md and its pictures, from the stored results
	$(RUN) -m benchmarks.report --docs

pictures: $(call installed,study) ## every picture of docs/ again, from what is stored
	$(RUN) -m studies.paper --pages-only
	$(RUN) -m benchmarks.report --docs
	$(RUN) -m tools.pages.pictures

compile-check: $(call installed,bench) ## every kernel compiled for four GPUs, without one: registers, spills, serialized wgmma
	$(RUN) -m tools.kernels.compile_kernels $(ARGS)

rehearse: $(call installed,rehearsal) ## launches as on a GPU, and every test for one, without one; OLDEST=1: oldest torch, triton
	$(RUN) -m pytest -n auto -m "long or not long" tests/kernels/test_launches.py tests/tools/test_gpu_check.py $(ARGS)

gpu-check: $(call installed,test) ## on a CUDA machine: four parts of 9 minutes (ARGS=smoke: one), an archive each
	$(RUN) -m tools.gpu_check $(or $(ARGS),smoke tune models tests) --out "$(or $(OUT),out/gpu)"

clean: ## remove caches and build products; keeps .venv, downloads and out/
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .benchmarks
	find tangent_ops kernels tests benchmarks tools examples studies -name __pycache__ -prune -exec rm -rf {} +

# --no-compile: Python compiles what it imports; compiling all of torch first takes half a minute.
$(call installed,%): pyproject.toml | $(VENV)/bin/pip
	$(PY) -m pip install --no-compile --editable ".[$*]" $(if $(OLDEST),$(OLDEST_VERSIONS))
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("tangent-ops needs Python 3.11 or later; this is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
