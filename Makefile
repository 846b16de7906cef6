# The only front door. `make demo` and `make test` install what they need; both begin with `make setup`.
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY   := .venv/bin/python
BIN  := .venv/bin
DESTDIR ?=

.PHONY: help setup venv native image demo may-demo test check matrix bench chaos chaos-bank chaos-kafka mutants lock install uninstall clean format

help:           ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

demo: may-demo setup ## real jobs in real virtual machines on three nodes; KEEP=1 leaves a shell in the sandbox
	@scripts/demo $(if $(KEEP),--keep)
may-demo:
	@scripts/demo --may-i

test: setup     ## all tests; the skips and their reasons are printed at the end; ARGS= goes to pytest
	@scripts/test $(ARGS)

check: venv     ## format, lint, types, layers, C, fast tests: green at every commit
	@scripts/check

matrix: setup   ## the tests on other releases of Slurm, each on a Debian of its own; RELEASES="24.11 26.05" ARGS=
	@scripts/matrix "$(RELEASES)" $(ARGS)

bench: setup    ## the benchmarks, printing their own figures
	@$(PY) benchmarks/run.py $(ARGS)

chaos: setup    ## kills parts of Slurm and Carrel at random while jobs run, then looks what is left; SECONDS=300 SEED=
	@$(PY) scripts/chaos $(or $(SECONDS),300) $(SEED)

chaos-bank: setup ## the same for the bank: an array of a thousand, races for the last money, kills; SECONDS=300 RACES=10 SEED=
	@$(BIN)/pytest -rP -m long tests/bank
	@$(PY) scripts/chaos-bank $(or $(SECONDS),300) $(or $(RACES),10) $(SEED)

chaos-kafka: setup ## Kafka is away for minutes while jobs run and carreld is killed; then counts the samples; SECONDS=150
	@$(PY) scripts/chaos-kafka $(or $(SECONDS),150)

mutants: venv   ## breaks the decisions line by line and sees that a test fails each time (minutes)
	@$(PY) scripts/mutants
	@$(PY) scripts/mutants --ledger
	@$(PY) scripts/mutants --model

setup:          ## everything that demo and test need: packages, virtual environment, C parts, an image
	@scripts/setup

venv:
	@scripts/setup venv

native: ## the C parts, into build/libexec
	@$(MAKE) --no-print-directory -C guest BUILD=$(CURDIR)/build
	@$(MAKE) --no-print-directory -C slurm BUILD=$(CURDIR)/build

image: ## the Debian 12 image, its kernel and its initramfs
	@$(BIN)/carrel image build debian12

install: venv native ## below DESTDIR=, for a cluster; docs/how-to/install.md says what Slurm must be told
	@DESTDIR="$(DESTDIR)" scripts/install

uninstall: ## takes away what install put below DESTDIR=; settings, images, samples and the ledger stay
	@DESTDIR="$(DESTDIR)" scripts/install --remove

format:         ## put the Python sources into their form
	@$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

lock: venv      ## pin the dependencies anew: all of them, and those that an installation needs
	@$(BIN)/pip install --quiet uv
	@for out in "requirements.lock --extra controller --extra postgresql --extra dev --extra frames --extra gpu --extra kafka --extra prometheus --extra vsphere" "requirements-run.lock --extra controller --extra postgresql"; do set -- $$out; \
	    $(BIN)/uv pip compile --quiet --upgrade --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate \
	        --exclude-newer "$$(date -ud '7 days ago' +%FT%TZ)" pyproject.toml -o $$out; done

clean:          ## remove what was built; the virtual environment stays
	rm -rf build
