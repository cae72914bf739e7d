# The first two targets set everything up by themselves; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint models bench clean

help:
	@echo "make demo       set everything up and run the main job on real proteins"
	@echo "make test       set everything up and pass the tests"
	@echo "make test-long  the long tests: kills at random moments, full-size corpora"
	@echo "make lint       ruff, mypy and the house's import rules"
	@echo "make models DATA=DIR   train the shipped models again from the data"
	@echo "make bench      every benchmark; dated results in benchmarks/results"

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

test: $(STAMP)
	@$(BIN)/python -m pytest

test-long: $(STAMP)
	@$(BIN)/python -m pytest -m 'long and not gpu' --timeout 3600 --record

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

models: $(STAMP)
	@test -n "$(DATA)" || { echo "usage: make models DATA=DIR (see docs/default-model.md)"; exit 2; }
	@$(BIN)/python -m training.release.make_models --data $(DATA)

bench: $(STAMP)
	@for f in embed pretrain heads serve screen; do $(BIN)/python benchmarks/$$f.py || exit 1; done

clean:
	rm -rf .venv demo build *.egg-info
