# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.

VENV ?= .venv
BIN := $(VENV)/bin

# The first Python from 3.11 to 3.13 that runs.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)

# With an NVIDIA driver torch is what pip finds, or what is installed already (the CUDA build); without one it is the
# pinned CPU build, taken from PyTorch's own index where that can be reached.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
ifeq ($(HAS_GPU),yes)
VENV_FLAGS := --system-site-packages
PIP_FLAGS :=
else
VENV_FLAGS :=
CPU_INDEX := https://download.pytorch.org/whl/cpu
PIP_FLAGS = -c constraints/cpu.txt $(shell curl -fsI -m 5 $(CPU_INDEX)/torch/ >/dev/null 2>&1 && echo --extra-index-url $(CPU_INDEX))
endif

.PHONY: demo test lint types layers tests test-slow test-gpu hook setup clean

demo: setup
	$(BIN)/antiphon demo

test: lint types layers tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

layers: setup
	$(BIN)/lint-imports

QUICK := not slow and not gpu and not multigpu

# By modules, so that tests share the engines, servers and references of their module; one run, so that tests which wait
# for processes run beside tests which compute. All modules are read once by each process, for 10 s.
tests: setup
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadscope -m "$(QUICK)"

# pytest ends with 5 where there is no such test yet.
test-slow: setup  # some 20 minutes
	$(BIN)/pytest -m "slow" || test $$? -eq 5

test-gpu: setup  # needs CUDA devices
	$(BIN)/pytest -m "gpu or multigpu" || test $$? -eq 5

hook: setup  # run the fast checks before every commit
	printf '#!/bin/sh\nexec make --no-print-directory lint types layers\n' > "$$(git rev-parse --git-path hooks)/pre-commit"
	chmod +x "$$(git rev-parse --git-path hooks)/pre-commit"

setup: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints/cpu.txt
	@test -n "$(PYTHON)" || { echo "No Python from 3.11 to 3.13 was found; install one, or run make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check $(PIP_FLAGS) --config-settings editable_mode=compat -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
