# The first two targets set everything up by themselves; a second run installs nothing.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
OUT ?= bioseq/models
.PHONY: help demo test test-long lint models heads page chromium bench clean

help:
	@echo "make demo       set everything up and run the main job on real proteins"
	@echo "make test       set everything up and pass the tests"
	@echo "make test-long  the long tests: kills at random moments, full-size corpora"
	@echo "make lint       ruff, mypy and the house's import rules"
	@echo "make models DATA=DIR   train the shipped models again from the data"
	@echo "make heads DATA=DIR [OUT=DIR]   make the shipped heads again on the shipped model, the same bits"
	@echo "make page       build the page's files again (needs Node.js)"
	@echo "make bench [DATA=DIR]   the benchmarks, with DATA those on labelled data too; dated results in benchmarks/results"

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

heads: $(STAMP)
	@test -n "$(DATA)" || { echo "usage: make heads DATA=DIR [OUT=DIR] (see docs/default-model.md)"; exit 2; }
	@$(BIN)/python -m training.release.make_heads $(DATA) $(OUT)

page:
	@cd serving/page/source && npm ci --no-fund --no-audit --silent && npm run --silent build

# Left out: gpu.py needs a GPU, chaos.py PostgreSQL, scaling.py measures nothing, reader.py and campaigns.py need what other commands prepare.
BENCH := embed pretrain heads:many heads:mixed serve backpressure screen registry vectors
BENCH_DATA := heads:shipped heads:gb1 heads:coverage heads:few heads:ood heads:cost heads:time variants
bench: $(STAMP)
	@for f in $(BENCH); do $(BIN)/python benchmarks/$${f%%:*}.py $$(expr "$$f" : '.*:\(.*\)') || exit 1; done
	@if test -z "$(DATA)"; then echo "left out without DATA=DIR: $(BENCH_DATA) homologs"; else \
		for f in $(BENCH_DATA); do $(BIN)/python benchmarks/$${f%%:*}.py $$(expr "$$f" : '.*:\(.*\)') $(DATA) || exit 1; done; \
		$(BIN)/python benchmarks/homologs.py --data $(DATA) --work runs/bench-homologs; fi

clean:
	rm -rf .venv demo build *.egg-info
