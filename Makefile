# Every recipe works on a bare machine: the first one makes the environment. `make help` lists them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PYTHON VENV

.DEFAULT_GOAL := help
.PHONY: demo test check fix docs bench clean help

demo: ## compress a small model, measure what it cost, write everything to demo-output/
	@$(PYTHON) scripts/install.py
	@$(BIN)/conmoe demo demo-output --force

test: ## all checks and the whole test suite, as CI runs them (ARGS="-k reap" goes to pytest)
	@bash scripts/test.sh $(ARGS)

check: ## lint, formatting and types, without the tests
	@bash scripts/check.sh

fix: ## what can be mended by a tool: formatting, import order, simple lint
	@$(PYTHON) scripts/install.py dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: ## write the generated parts of the documentation again
	@$(PYTHON) scripts/install.py dev
	@$(BIN)/python scripts/docs.py
	@$(BIN)/python scripts/results.py

bench: ## list the benchmarks; each is run by hand and prints its result
	@for file in benchmarks/*.py; do \
		[ -f "$$file" ] && printf '%-44s %s\n' "$$file" "$$(sed -n '1s/"""//gp' "$$file")"; done; true

clean: ## remove the environment, caches and outputs
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## this list
	@sed -n 's/^\([a-z]*\): ## /\1\t/p' $(MAKEFILE_LIST) | while IFS="$$(printf '\t')" read -r name what; do \
		printf '  make %-6s %s\n' "$$name" "$$what"; done
