# Every target installs what it needs into .venv first, once: see scripts/install.sh.
# ARGS goes to the command: make demo ARGS="--steps 5", make test ARGS="-k sleep".

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test slow check build clean

python := .venv/bin/python

help: ## what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## a short training loop on a real engine, with its telemetry (ARGS)
	@scripts/install.sh demo
	@.venv/bin/vgen demo $(ARGS)

test: ## the tests; those that need CUDA are skipped without it (ARGS)
	@scripts/install.sh test
	@$(python) -m pytest $(ARGS)

slow: ## the longer matrices of cases, which `make test` leaves out (ARGS)
	@scripts/install.sh slow
	@$(python) -m pytest -m slow $(ARGS)

check: ## lint, format and types
	@scripts/install.sh lint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright

build: ## the sdist and the wheel, into dist/
	@scripts/install.sh build
	@$(python) -m build

clean: ## remove what was built and cached; .venv stays
	rm -rf build dist htmlcov .coverage .hypothesis .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
