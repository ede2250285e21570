# `make demo` and `make test` set up what they need in .venv, then run. Nothing else is needed beforehand.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
SEED ?= 0
RUN_DIR ?= runs/demo$(if $(filter-out 0,$(SEED)),-seed$(SEED))

.PHONY: setup demo test test-slow check clean
setup: $(STAMP)

# torch and torchvision first and together: unpinned, kronfluence's requirement of torchvision brings another torch.
# torchvision cannot load beside a torch without CUDA, and then breaks transformers; nothing here imports it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24" wheel
	$(BIN)/python -m pip install --quiet torch==2.13.0 torchvision==0.28.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -c "import torch, sys; sys.exit(torch.version.cuda is None)" || \
		$(BIN)/python -m pip uninstall --quiet --yes torchvision
	touch $(STAMP)

demo: setup
	$(BIN)/ifguide demo --set seed=$(SEED) --set run_dir=$(RUN_DIR)

# Two processes, each with a Ray cluster of its own; the files go to them one by one, those that run stages first.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: setup
	$(PYTEST) -m "not slow"

# The long schedules of kills and refused requests.
test-slow: setup
	$(PYTEST) -m slow

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(MAKE) test

clean:
	rm -rf runs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
