# The few commands there are. Each sets up what it needs: nothing has to be run before it.
#
#   make demo     a small model learns a task in minutes, on a CPU
#   make test     the tests
#   make fuzz     damaged files for everything that reads files, for FUZZ_SECONDS
#   make check    style, types, layers of imports, dependencies
#   make bench    speed, memory and losses against PEFT + bitsandbytes
#   make clean    remove what the above made

PYTHON ?= python3
VENV   ?= .venv
# torch of the version in constraints.txt. Where there is no NVIDIA driver, its CPU build is tried
# first, and the ordinary one is taken where the package index has others: it does the same, and
# brings 3 GB of CUDA. An index that names no version at all was not reached, and pip says why.
# TORCH=torch==2.13.0+cpu or any other takes that one and nothing else.
TORCH  ?=
# What `make demo` and `make bench` use; without it, halfbyte fetches the demo's model.
MODEL  ?=
SEED   ?= 0
# How long `make fuzz` runs, and from which seed: by default another one each time.
FUZZ_SECONDS ?= 600
FUZZ_SEED    ?= $(shell date +%s)

VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
BIN := $(VENV)/bin
FREE := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PIP := $(FREE) --constraint constraints.txt

# Without bytecode, each of the many processes of the tests compiles what it imports again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test fuzz check bench clean

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "halfbyte needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH),)
	$(PIP) '$(TORCH)'
else ifneq ($(shell command -v nvidia-smi),)
	$(PIP) 'torch==$(VERSION)'
else
	@# Constrained, pip would not say which versions there are. What torch needs comes with halfbyte.
	$(FREE) --no-deps 'torch==$(VERSION)+cpu' 2>$@.said || { grep -q 'from versions: [0-9]' $@.said || { cat $@.said >&2; exit 1; }; echo 'no CPU build of torch $(VERSION) to be had: taking the ordinary one, with 3 GB of CUDA' >&2; $(PIP) 'torch==$(VERSION)'; }
	@rm -f $@.said
endif
	@touch $@

$(VENV)/.halfbyte: $(VENV)/.torch pyproject.toml
	$(PIP) --editable .
	@touch $@

$(VENV)/.development: $(VENV)/.halfbyte
	$(PIP) --editable '.[test,check]'
	@touch $@

setup: $(VENV)/.development

demo: $(VENV)/.halfbyte
	$(BIN)/halfbyte demo $(if $(MODEL),--model $(MODEL)) --output demo-out --seed $(SEED)

test: $(VENV)/.development
	$(BIN)/python -m pytest --numprocesses 2

fuzz: $(VENV)/.development
	$(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED)

check: $(VENV)/.development
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry src

bench: $(VENV)/.development
	$(BIN)/python benchmarks/cpu_kernels.py
	$(BIN)/python benchmarks/cpu_step.py --model "$(or $(MODEL),$$($(BIN)/python -m halfbyte.tools.demo_model))"

clean:
	rm -rf $(VENV) demo-out fuzz-failures
