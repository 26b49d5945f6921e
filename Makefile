# Everything runs in .venv, which the first target that needs it builds; `make help` lists the targets.
# No package index is named here: pip uses the one that this machine is set up for.

# The first of these that is Python 3.11 or newer makes the virtual environment; `make PYTHON=python3.12` chooses.
PYTHON := python3.13 python3.12 python3.11 python3
VENV_PYTHON := .venv/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install -qq --disable-pip-version-check -c constraints.txt
# With the environment's own programs first, as if it were activated: DeepSpeed looks for ninja on the PATH.
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH" $(VENV_PYTHON)

.DEFAULT_GOAL := help
.PHONY: help install demo migrate-demo soak bench test check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## build .venv with the tested versions, the same on a CPU and on a GPU machine
	@echo 'Installed. `. .venv/bin/activate` puts the command fluxfill on your PATH.'

demo: .venv/.installed ## train a tiny FLUX-Fill on real photographs, on a CPU, from folders to filled holes
	@$(RUN) demo/run.py $(ARGS)

migrate-demo: .venv/.installed ## move three old folders, with planted faults, to fluxfill and train on them, on a CPU
	@$(RUN) demo/migrate.py $(ARGS)

soak: MINUTES ?= 15
soak: SEED ?= 1
soak: .venv/.installed ## train under random faults, on a CPU: make soak MINUTES=15 SEED=1; ARGS="--kills 20" kills one run
	@$(RUN) demo/soak.py --minutes $(MINUTES) --seed $(SEED) $(ARGS)

bench: .venv/.installed ## measure what this machine can, and write docs/performance.md; ARGS="overhead peer" measures some
	@$(RUN) -m benchmarks.run $(ARGS)

# A file stays together: it shares its fixtures. tests/conftest.py says how many at a time and which come first. What
# hundreds of processes import is compiled once.
test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/.installed ## run the tests but the slow ones; ARGS="tests/data -k order" goes to pytest
	@$(RUN) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/.installed ## lint, formatting and types
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy

format: .venv/.installed ## let ruff mend and format the code
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format

clean: ## remove caches and the demo's work; .venv and runs/ stay
	rm -rf demo/work build dist .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -path ./runs -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last, so an interrupted install is taken up again; nothing is done while it is newer than both files.
# An environment without pip (interrupted while it was made) or of an older Python is made anew.
.venv/.installed: pyproject.toml constraints.txt
	@$(VENV_PYTHON) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { new_enough=; usable=; \
	  for python in $(PYTHON); do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      new_enough=$$python; \
	      if $$python -c 'import ensurepip, venv' 2>/dev/null; then usable=$$python; break; fi; \
	    fi; \
	  done; \
	  if [ -z "$$new_enough" ]; then \
	    echo 'make: no Python 3.11 or newer among: $(PYTHON). Install one, or name it: make PYTHON=/path/to/python3' >&2; \
	    exit 1; \
	  fi; \
	  if [ -z "$$usable" ]; then \
	    echo "make: $$new_enough has no venv module. On Debian or Ubuntu: apt-get install python3-venv" >&2; \
	    exit 1; \
	  fi; \
	  echo "Making .venv with $$($$usable --version)"; \
	  $$usable -m venv --clear .venv; \
	}
	@echo 'Installing the pinned packages into .venv: 2 to 3 minutes the first time, more on a slow line (torch for CUDA is several GB).'
	@$(PIP_INSTALL) torch
	@$(PIP_INSTALL) -e '.[dev,demo]'
	@touch $@
