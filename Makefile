# Everything a developer or an operator runs by hand. CI runs `make test`, too.
SHELL := /bin/bash
PY := .venv/bin/python
ARGS ?=
# What needs processors only runs on all of them; real processes, which tests watch, have the machine to themselves.
ALONE := tests/hostile tests/integration tests/pods tests/torture tests/upgrade
TOGETHER := $(filter-out $(ALONE) tests/__pycache__,$(patsubst %/,%,$(wildcard tests/*/)))

.PHONY: help run demo test sim torture fuzz lint protos cli-page screenshots bench plots clean venv dev

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

venv:
	@scripts/bootstrap.sh broker,dispatch,cli

dev:
	@scripts/bootstrap.sh dev

run: venv  ## one node on loopback, data in ./spillway-data (ARGS="--listen ..." for more)
	@.venv/bin/spillway serve $(ARGS)

demo: venv  ## three nodes, five HTTP destinations, 20,000 events, one node killed; verifies order and loss
	@$(PY) -m demo $(ARGS)

test: dev  ## all tests (ARGS="-k name" to choose)
	@$(PY) -m pytest -n auto $(TOGETHER) $(ARGS) || [ $$? = 5 ]  # 5: ARGS choose none of these
	@$(PY) -m pytest $(ALONE) $(ARGS) || [ $$? = 5 ]

sim: dev  ## 2,000 seeds of a simulated cluster under faults (ARGS="--seeds 100 --first 7" or "--seed 7")
	@$(PY) -m tests.simulation $(ARGS)

torture: dev  ## real faults on real clusters for 20 minutes (ARGS="--minutes 60 --nodes 5 --seed 7 --faults kill,cut")
	@$(PY) -m tests.torture $(ARGS)

fuzz: dev  ## 100,000 inputs for every decoder (ARGS="--decoder entry --inputs 1000000 --seed 2", "--list")
	@$(PY) -m tests.fuzz $(ARGS)

lint: dev  ## ruff, mypy --strict, import contracts, generated code
	@.venv/bin/ruff check .
	@.venv/bin/mypy protos/spillway/contract client broker cluster
	@PYTHONPATH=protos:client:broker:cluster .venv/bin/lint-imports
	@$(PY) scripts/protos.py --check

protos: dev  ## regenerate the code of protos/
	@$(PY) scripts/protos.py

cli-page: dev  ## docs/cli.md from the commands and their help
	@$(PY) scripts/cli_page.py

screenshots: dev  ## what commands print of a running cluster, into docs/cli.md
	@$(PY) scripts/screenshots.py

bench: venv  ## all benchmarks (ARGS="a b --quick" to choose)
	@$(PY) -m bench $(ARGS)

plots: venv  ## the plots and figures of docs/ from a new run (ARGS="--dir DIR" for the nodes' data); on a quiet machine
	@$(PY) -m bench c e g --out build/plots/results.json $(ARGS)
	@$(PY) -m bench.plots build/plots/results.json docs/plots

clean:  ## remove the environment and caches; data stays
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .hypothesis
