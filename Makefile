# Every target works from a fresh clone; it needs Python >= 3.10 with venv, and a C++20 compiler
# (on Debian: apt-get install g++ python3-venv python3-dev).
#
#   PYTHON=python3.12   the interpreter that .venv is made of
#   TORCH=torch==2.12.0 the PyTorch to build against (remove the environment to change it)
#   CUDA=1              PyTorch with CUDA, nvcc from PyPI, libconvops_cuda demanded; in .venv-cuda
#   ARGS="-k im2col"    handed to pytest (test), the benchmark (bench) or the demo (demo)

PYTHON ?= python3
ifeq ($(CUDA),1)
TORCH  ?= torch==2.11.0
VENV   ?= .venv-cuda
TOOLS  := -r requirements-dev.txt -r requirements-cuda.txt
export CONVOPS_CUDA := 1
else
TORCH  ?= torch==2.13.0
VENV   ?= .venv
TOOLS  := -r requirements-dev.txt
endif

BIN        := $(VENV)/bin
SMOKE      := $(abspath build/smoke$(if $(filter 1,$(CUDA)),-cuda))
SOURCES    := $(shell find csrc scripts -type f 2>/dev/null) setup.py pyproject.toml conv_ops/__init__.py
CXX_FILES  := $(shell find csrc examples tests -regex '.*\.\(h\|cuh\|cpp\|cu\)' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help tools build demo test wheel bench lint format docker-test clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build  ## check and time a large convolution, filter a photograph; writes build/demo.png
	$(BIN)/python examples/demo.py $(ARGS)

test: build  ## run the tests
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

bench: build  ## compare with PyTorch (ARGS="--help" for the choices)
	$(BIN)/python -m benchmarks $(ARGS)

build: $(VENV)/built  ## build the package, in place

tools: $(VENV)/tools  ## make .venv: PyTorch and what builds, tests and lints

wheel: tools  ## build a wheel into dist/, try it in a clean environment
	rm -rf build/wheel build/*/lib.* $(SMOKE)
	$(BIN)/pip wheel --no-build-isolation --no-deps -w build/wheel .
	$(BIN)/python scripts/check_wheel.py build/wheel/*.whl
	$(PYTHON) -m venv $(SMOKE)
	$(SMOKE)/bin/pip install --quiet $(TORCH) numpy build/wheel/*.whl
	cd / && $(SMOKE)/bin/python -m conv_ops
	mkdir -p dist && cp build/wheel/*.whl dist/

lint: tools  ## check style: ruff, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: tools  ## bring the sources into that style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

docker-test:  ## build the image of the tests and run them in it
	docker build --target test --tag conv_ops:test .
	docker run --rm conv_ops:test

clean:  ## remove everything that the other targets made
	rm -rf .venv .venv-cuda build dist *.egg-info conv_ops/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/tools: requirements-dev.txt requirements-cuda.txt
	@command -v $${CXX:-c++} >/dev/null || { echo "No C++ compiler; on Debian: apt-get install g++"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH) $(TOOLS)
	touch $@

# Editable, so that the checkout and what is installed are the same package whatever the current
# directory; what a wheel holds is tried by `make wheel`.
$(VENV)/built: $(VENV)/tools $(SOURCES)
	$(BIN)/pip install --no-build-isolation --no-deps --editable .
	touch $@
