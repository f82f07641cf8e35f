# make demo    the main job, from raw text to a trained and evaluated model
# make test    the tests
# Both do their own set-up, in .venv; all they need is Python >= 3.10, a C++ compiler and make.
# make bench | lint | clean
#
# PYTHON=python3.12         the interpreter of a new .venv
# ARGS='--corpus PATH'      passed on to what runs
# PIP_FLAGS='--index-url …' passed on to pip
# RETRO_CUDA=0|1            leave the CUDA code out, or insist on it (setup.py)

PYTHON ?= python3
ARGS ?=
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test bench lint clean install
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/retro-kernels demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest $(ARGS)

bench: $(READY)
	$(BIN)/python bench/run.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(READY)

$(READY): pyproject.toml constraints.txt setup.py $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than 3.10; name another one: make PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info retro_kernels/_C.*.so retro_kernels/_C.*.pyd
	rm -rf .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
