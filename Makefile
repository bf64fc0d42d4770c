# Everything runs from .venv, which is made and filled with the locked set (constraints.txt) when it
# is missing or when pyproject.toml or constraints.txt have changed since. `make help` lists the rest.

PYTHON ?= python3
ARGS ?=

BIN = .venv/bin
INSTALLED = .venv/.installed
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# One pytest worker a core, at most 8. Empty means: count the cores in the recipe.
WORKERS ?=
CORES = nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1

.DELETE_ON_ERROR:
.PHONY: help bench benchmark test test-fast test-gpu test-versions gate gpu-results gpu-report lint install clean

help:
	@echo "make bench    run the benchmark           ARGS='...' goes to resblock-bench run"
	@echo "make test     run the tests               ARGS='...' goes to pytest, WORKERS=N sets how many run at once"
	@echo "make test-fast without the tests that start processes, compile or interpret much"
	@echo "make test-gpu the tests that need a GPU, with compiled kernels"
	@echo "make test-versions other versions of torch and Triton, about an hour; ARGS=--short: a minute"
	@echo "make benchmark the kernels under pytest-benchmark, e.g. ARGS='-k forward --benchmark-json=FILE'"
	@echo "make gpu-results all that is worth measuring on a GPU, in slices of 9 minutes: repeat it until it is over"
	@echo "make gpu-report what came of it: docs/gpu.md and pages"
	@echo "make gate     machine code, memory and accuracy against the saved pins, no GPU needed"
	@echo "make lint     ruff and mypy --strict"
	@echo "make install  make .venv with the locked set; the targets above do so when it is needed"
	@echo "make clean    remove .venv, builds and caches; results and .versions stay"
	@echo "PYTHON=...    the interpreter a new .venv is made with (3.10 or newer; default: python3)"

bench: $(INSTALLED)
	@$(BIN)/resblock-bench run $(ARGS)

# Each worker begins with a part of the files, so what a file makes once is mostly made once, and
# takes from another's part when its own is done.
# The workers share the cores, so each gets one thread. Torch's builds with MKL read MKL_NUM_THREADS;
# OMP_NUM_THREADS=1 would do it too, but a test checks that nothing leaves that in the environment.
SELECTED =
test-fast: SELECTED = -m 'not slow and not benchmark'
test test-fast: $(INSTALLED)
	@workers='$(WORKERS)'; \
	if [ -z "$$workers" ]; then workers=`$(CORES)`; [ "$$workers" -le 8 ] || workers=8; fi; \
	MKL_NUM_THREADS=$${MKL_NUM_THREADS:-1} $(BIN)/python -m pytest -n "$$workers" --dist worksteal $(SELECTED) $(ARGS)

test-gpu: $(INSTALLED)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/gpu $(ARGS)

# Unpacks them into .versions, which clean leaves: 15 GB that took a while to download.
test-versions: $(INSTALLED)
	@$(BIN)/python tests/versions.py $(ARGS)

benchmark: $(INSTALLED)
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m benchmark tests/benchmarks \
		--benchmark-columns=min,median,iqr,rounds $(ARGS)

gate: $(INSTALLED)
	$(BIN)/resblock-bench check --static --memory --accuracy

# A GPU is often lent for minutes, with torch and Triton and no network: where there is no .venv,
# PYTHON runs the checkout as it stands.
gpu-results gpu-report:
	@PYTHONPATH=.typing$${PYTHONPATH:+:$$PYTHONPATH} $(if $(wildcard $(INSTALLED)),$(BIN)/python,$(PYTHON)) \
		-m resblock_bench.bench $@ $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict -p resblock_bench.reference -p resblock_bench.kernels -p resblock_bench.bench

install: $(INSTALLED)

# The stamp appears by the last command only, so an interrupted install leaves none; it bears the time
# of the start, so a file edited meanwhile installs again. Setuptools comes first and builds without
# isolation: pip's isolated build would take a setuptools that the lock does not name.
# A .venv that is a link belongs to another checkout, which would run this one's code from then on.
$(INSTALLED): pyproject.toml constraints.txt
	@if [ -L .venv ]; then \
		echo "resblock-bench: .venv is a link to another checkout's: remove it, and make installs one here" >&2; \
		exit 1; fi
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		command -v $(PYTHON) >/dev/null 2>&1 || { \
			echo "resblock-bench needs Python 3.10 or newer, and there is no '$(PYTHON)' here: name one with make PYTHON=..." >&2; \
			exit 1; }; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
			echo "resblock-bench needs Python 3.10 or newer, and '$(PYTHON)' is `$(PYTHON) --version 2>&1`: name another with make PYTHON=..." >&2; \
			exit 1; }; \
		echo "Making .venv with `$(PYTHON) --version`."; \
		$(PYTHON) -m venv --clear .venv || exit 1; \
	fi
	@rm -f $@ && touch $@.part
	@echo "Installing the locked set into .venv: a few minutes the first time, torch is large."
	@$(PIP_INSTALL) setuptools
	@$(PIP_INSTALL) --no-build-isolation -e '.[test,lint]'
	@mv $@.part $@
	@echo "Installed."

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find bench kernels reference tests -name __pycache__ -type d -prune -exec rm -rf {} +
