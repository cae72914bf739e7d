# The first two targets set everything up by themselves; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-long lint models page chromium bench clean

help:
	@echo "make demo       set everything up and run the main job on real proteins"
	@echo "make test       set everything up and pass the tests"
	@echo "make test-long  the long tests: kills at random moments, full-size corpora"
	@echo "make lint       ruff, mypy and the house's import rules"
	@echo "make models DATA=DIR   train the shipped models again from the data"
	@echo "make page       build the page's files again (needs Node.js)"
	@echo "make bench      every benchmark; dated results in benchmarks/results"

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/demo.py

# The page's tests drive a real browser; without one, where root may not install it, they are skipped and say so.
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "installing chromium for the page's tests" && \
		{ timeout 300 apt-get install -y -qq --no-install-recommends chromium || { timeout 120 apt-get update -qq && \
		timeout 300 apt-get install -y -qq --no-install-recommends chromium; }; } >/dev/null 2>&1; } || true

# Two processes, a file to one of them: most of the time goes into starting services and waiting for them.
test: $(STAMP) chromium
	@$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(STAMP)
	@$(BIN)/python -m pytest -m 'long and not gpu' --timeout 3600 --record

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

models: $(STAMP)
	@test -n "$(DATA)" || { echo "usage: make models DATA=DIR (see docs/default-model.md)"; exit 2; }
	@$(BIN)/python -m training.release.make_models --data $(DATA)

page:
	@cd serving/page/source && npm ci --no-fund --no-audit --silent && npm run --silent build

bench: $(STAMP)
	@for f in embed pretrain heads serve screen; do $(BIN)/python benchmarks/$$f.py || exit 1; done

clean:
	rm -rf .venv demo build *.egg-info
