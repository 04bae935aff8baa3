# Everything needs only Python 3.11+ and make. The first call makes .venv and installs into it; later calls reuse it.
#   make race ARGS="digits --seeds 3"      PYTHON=python3.12 make test
PYTHON ?= python3
ARGS ?=
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m
# One process for each core, one thread for each process; a file stays on one process.
PYTEST := OMP_NUM_THREADS=1 $(RUN) pytest --numprocesses=auto --dist=loadfile
PIP := $(RUN) pip --disable-pip-version-check install --quiet --constraint constraints.txt

export PIP_NO_INPUT := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export NO_MKDOCS_2_WARNING := 1
# A constraints file of the caller's shell would fight with ours.
unexport PIP_CONSTRAINT

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help race test lint types docs check bench screenshot constraints clean distclean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

race: $(VENV)/.for-race  ## race the methods on the built-in text task (ARGS="..." goes to `steepest race`)
	$(BIN)/steepest race $(ARGS)

test: $(VENV)/.for-test  ## run the tests (PYTEST_ARGS="..." goes to pytest)
	$(PYTEST) $(PYTEST_ARGS)

lint: $(VENV)/.for-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(VENV)/.for-dev $(VENV)/.for-docs $(VENV)/.for-bench  ## check the types, of benchmarks and documentation hooks too
	$(RUN) pyright

docs: $(VENV)/.for-docs  ## build the documentation into site/, strictly
	$(RUN) mkdocs build --strict --clean

check: lint types docs $(VENV)/.for-test  ## all that a change must pass: lint, format, types, docs, tests
	$(PYTEST) $(PYTEST_ARGS)

bench: $(VENV)/.for-bench  ## time our optimizers beside their peers and store the table
	$(RUN) benchmarks $(ARGS)

screenshot: $(VENV)/.for-test  ## photograph the newest report under runs/ for the README (needs Chromium)
	$(BIN)/python docs/screenshot.py $(ARGS)

constraints:  ## renew constraints.txt: the newest versions that the ranges of pyproject.toml allow
	rm -rf .venv-fresh
	$(PYTHON) -m venv .venv-fresh
	torch=$$(sed -n 's/^torch==/torch==/p' constraints.txt) && .venv-fresh/bin/python -m pip install --quiet "$${TORCH:-$$torch}" hatchling
	.venv-fresh/bin/python -m pip install --quiet --no-build-isolation --editable '.[dev,docs,bench]'
	{ grep '^#' constraints.txt; .venv-fresh/bin/python -m pip freeze --exclude-editable | grep -v '^nvidia\|^triton\|^cuda' | sed 's/+[a-z0-9.]*$$//'; } > constraints.txt.new
	mv constraints.txt.new constraints.txt
	rm -rf .venv-fresh

clean:  ## remove what the commands wrote, but not .venv and not runs/
	rm -rf site dist .pytest_cache .ruff_cache .hypothesis .venv-fresh
	find steepest tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove .venv, too
	rm -rf $(VENV)

# One stamp for each set of extras. A stamp is written last, so an interrupted install is simply done again.
# PyTorch goes first, pinned, so that nothing pulls another build of it.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "steepest needs Python 3.11 or newer, and $(PYTHON) is %d.%d. Say which to use: make PYTHON=python3.12 ..." % v[:2])'
	@if ! $(RUN) pip --version >/dev/null 2>&1; then \
	    echo "Making $(VENV) ..."; \
	    $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) -m venv failed. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; \
	fi
	@touch $@

$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "Installing PyTorch (a large download the first time) ..."
	@$(PIP) "$$(grep '^torch==' constraints.txt)" "$$(grep '^hatchling==' constraints.txt)"
	@touch $@

$(VENV)/.for-race: EXTRAS :=
$(VENV)/.for-test: EXTRAS := [test]
$(VENV)/.for-dev: EXTRAS := [dev]
$(VENV)/.for-docs: EXTRAS := [docs]
$(VENV)/.for-bench: EXTRAS := [bench]
$(VENV)/.for-%: $(VENV)/.torch pyproject.toml constraints.txt
	@echo "Installing steepest$(EXTRAS) ..."
	@$(PIP) --no-build-isolation --editable '.$(EXTRAS)'
	@touch $@
