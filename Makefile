# `make demo` and `make test` need nothing but Python 3.11 or newer: each makes .venv and installs what constraints.txt
# pins, once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-distributed test-kills bench docs

demo: $(STAMP)
	$(BIN)/trl-distill demo

# The one gate, for people and CI: lint, types, tests, in that order.
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# DeepSpeed ZeRO-2 and ZeRO-3 and FSDP2 on two CPU processes. Minutes.
test-distributed: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m heavy tests/distributed

# `cache build` killed at 50 random moments. Ten minutes and more.
test-kills: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m heavy --timeout 3600 tests/cli/test_cache_kills.py

bench: $(STAMP)
	$(BIN)/python benchmarks/loss_engine.py

# The plots of docs/losses.md, under a minute.
docs: $(STAMP)
	$(BIN)/python docs/draw_losses.py

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found; install Python 3.11 or newer, or set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: %s is Python %s; Python 3.11 or newer is needed, set PYTHON=..." % (sys.executable, sys.version.split()[0]))'
	@echo "installing into $(VENV) (once; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
