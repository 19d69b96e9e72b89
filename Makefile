# Two commands on a fresh machine:  make chat  (install what chatting needs, talk to a real model)  and  make test.
# Everything is installed into .venv; a second call finds it there. On Linux, for torch without CUDA:
# see the README for the value of PIP_ARGS.

PYTHON   ?= python3
PIP_ARGS ?=
VENV     := .venv
BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip --disable-pip-version-check -qq
NATIVE   := CMakeLists.txt $(wildcard src/qwen2/kernels/*.cpp src/qwen2/kernels/*.h)

.PHONY: help chat test lint bench wheel install install-dev clean

help:
	@echo "make chat    install into $(VENV) and talk to a real 0.5B model (the first time, it is downloaded: 491 MB)"
	@echo "make test    lint and the whole test suite"
	@echo "make lint    ruff, mypy, import-linter"
	@echo "make bench   ours beside other engines; llama.cpp and others are built by bench/setup_peers.sh first"
	@echo "make wheel   a wheel in dist/"
	@echo "make clean   remove $(VENV) and what was built; models in QWEN2_HOME stay"

chat: $(VENV)/.base
	@$(BIN)/qwen2 run

test: lint
	@echo "test: pytest, two at a time"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadgroup $(PYTEST_ARGS)

lint: $(VENV)/.dev
	@echo "lint: ruff, mypy, import-linter"
	@$(BIN)/ruff check -q
	@$(BIN)/ruff format --check -q
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports > $(VENV)/imports.log || (cat $(VENV)/imports.log; exit 1)

bench: $(VENV)/.dev
	@$(BIN)/python bench/peers.py

wheel: $(VENV)/.base
	@echo "wheel: into dist/"
	@$(PIP) wheel --no-deps -w dist .

install: $(VENV)/.base

install-dev: $(VENV)/.dev

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

# ---------------------------------------------------------------- the environment; each file is touched when its step is done

$(VENV)/.created:
	@echo "install: virtual environment in $(VENV) ($(shell $(PYTHON) --version 2>&1))"
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'qwen2 needs Python 3.10 or newer; try: make PYTHON=python3.11')"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(VENV)/.created pyproject.toml constraints.txt $(NATIVE)
	@echo "install: qwen2 and its dependencies; torch is most of it, this takes a minute or more"
	@$(PIP) install -c constraints.txt $(PIP_ARGS) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "install: what the tests need"
	@$(PIP) install -c constraints.txt $(PIP_ARGS) -e ".[dev,train]"
	@touch $@
