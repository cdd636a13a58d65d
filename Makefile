# `make demo` and `make test` do all set-up themselves: Python 3.12 and make are enough.

PYTHON ?= python3
BIN := .venv/bin
export JAX_PLATFORMS ?= cpu
# XLA's large buffers on huge pages: a fifth less time a step on a CPU.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: demo test test-slow lint docs bench
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/nash-jax demo --config=stories --workdir=runs/demo

test: .venv/ready
	$(BIN)/python -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

# Many processes, runs that are killed over and over, notebooks, whole runs of what `make test` tests
# by parts; some alone by TESTS=tests/colab.
test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow $(TESTS)

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site of docs/: open build/site/index.html. A broken link, reference or anchor fails.
docs: .venv/ready
	$(BIN)/python docs/build_site.py

bench: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
bench: .venv/ready
	$(BIN)/python -m benchmarks.decode

.venv: .venv/ready

.venv/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and f"Python 3.12 or newer is needed, $(PYTHON) is {sys.version.split()[0]}: make PYTHON=python3.12")'
	@echo "installing into .venv, a minute or two"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint requirements.lock --editable '.[dev]'
	@touch $@
