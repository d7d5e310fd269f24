# make demo | demo-mixed | test | lint | types | wheel | study NAME=fashion_mnist/dir0.5 SEEDS="0 1 2" | bench NAME=mnist_methods JOBS=2 | report | speed | format | install | clean
# Everything runs in .venv, made on first use. Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SEEDS  ?= 0 1 2
JOBS   ?= 1
TEST_PROCESSES ?= 2
NOW    := $(shell date +%Y%m%d-%H%M%S)
OUT    ?=

# Flower must not phone anybody, nor install anything on its own.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help install demo demo-mixed test lint types format wheel study bench report speed clean

help:
	@head -n 2 Makefile | sed 's/^# //'

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else 1)' || \
	  { echo "cdfkd-strategy needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true); run: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "cannot create $(VENV): on Debian and Ubuntu, install the package python3-venv" >&2; rm -rf $(VENV); exit 1; }
	@$(BIN)/python -m pip --version >/dev/null
	@echo "installing into $(VENV) (PyTorch is large: this takes a few minutes the first time)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[simulation,dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/cdfkd run digits --out $(or $(OUT),runs/demo-$(NOW))

demo-mixed: $(STAMP)
	$(BIN)/cdfkd run digits_mixed --out $(or $(OUT),runs/demo-mixed-$(NOW))

test: $(STAMP)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist

# One cell, or a folder of cells (without its base), once per seed. A run that was cut off continues; a finished one is kept.
# The summaries go to simulations/results. The configuration says where the images come from.
CELLS = $(if $(wildcard simulations/configs/$(NAME)/.),$(filter-out $(NAME)/base,$(patsubst simulations/configs/%.yaml,%,$(wildcard simulations/configs/$(NAME)/*.yaml))),$(NAME))

study: $(STAMP)
	@test -n "$(NAME)" || { echo "which one? make study NAME=fashion_mnist/dir0.5 (a configuration under simulations/configs, or a folder of them)" >&2; exit 1; }
	@set -e; for cell in $(CELLS); do for seed in $(SEEDS); do \
	  run=runs/$$cell-seed$$seed; resume=; test ! -d $$run || resume=--resume; \
	  echo "== $$cell, seed $$seed"; \
	  $(BIN)/cdfkd run $$cell seed=$$seed --out $$run $$resume; \
	  $(BIN)/cdfkd report $$run --keep simulations/results >/dev/null; \
	done; done

# Methods on the same teachers. What is done is kept, the rest is run; the results go to simulations/results/NAME.
bench: $(STAMP)
	@test -n "$(NAME)" || { echo "which one? make bench NAME=mnist_methods (a file under simulations/configs/bench)" >&2; exit 1; }
	@run=runs/bench/$(NAME); resume=; test ! -d $$run || resume=--resume; \
	$(BIN)/cdfkd bench $(NAME) --out $$run $$resume --jobs $(JOBS) --keep simulations/results

# The tables in README.md and simulations/README.md, from the committed results.
report: $(STAMP)
	$(BIN)/cdfkd report simulations/results --tables --readme README.md
	$(BIN)/cdfkd report simulations/results --readme simulations/README.md >/dev/null
	$(BIN)/python simulations/benchmarks/speed_table.py

# Seconds per iteration of the product and of the plain loop, on this machine, with nothing else on its cores.
speed: $(STAMP)
	$(BIN)/python simulations/benchmarks/speed.py
	$(BIN)/python simulations/benchmarks/where_time_goes.py
	$(BIN)/python simulations/benchmarks/speed_table.py

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "kept: $(VENV) and runs/ (remove them by hand)"
