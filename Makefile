# The daily commands; `make` lists them. Everything they install lies in .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= experiments/configs/default.py
STEPS ?=
FLAGS ?=
RUN_FLAGS := --config=$(CONFIG) $(if $(STEPS),--config.steps=$(STEPS)) $(FLAGS)
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: help train report test test-slow lint format tables bench bench-mixers kernel-report clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Made again when what is to be installed changes; half-made ones have no stamp.
$(VENV)/.installed: setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name another with PYTHON="; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

train: $(VENV)/.installed  ## trains (or goes on training) the default model, then reports on it; STEPS= lengthens it
	$(PY) -m experiments.main $(RUN_FLAGS)
	$(PY) -m experiments.report $(RUN_FLAGS)

report: $(VENV)/.installed  ## reports on the newest checkpoint again
	$(PY) -m experiments.report $(RUN_FLAGS)

test: $(VENV)/.installed  ## the tests, on two cores
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -n 2 --dist worksteal -m 'not slow'

test-slow: $(VENV)/.installed  ## whole trainings
	$(PY) -m pytest -m slow

lint: $(VENV)/.installed  ## what `make test` says of the style
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed  ## formats the code
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

tables: $(VENV)/.installed  ## writes docs/results from the lines of finished runs; trains nothing
	$(PY) -m experiments.tables

bench: $(VENV)/.installed  ## times the op and decoding; writes benchmarks/results
	$(PY) -m benchmarks.op_cost
	$(PY) -m benchmarks.decode_cost

bench-mixers: $(VENV)/.installed  ## times every mixer, and from which length on it is faster than attention
	$(PY) -m benchmarks.mixers

kernel-report: $(VENV)/.installed  ## what the compilers say of the kernels, no GPU or TPU needed
	$(PY) -m pip install --quiet --disable-pip-version-check 'triton==3.6.0'
	$(PY) -m benchmarks.kernel_gpu
	$(PY) -m pip install --quiet --disable-pip-version-check --upgrade --no-deps --target $(VENV)/libtpu libtpu
	$(PY) -m benchmarks.kernel_tpu

clean:  ## removes what the commands made, runs and their checkpoints excepted
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .ruff_cache
