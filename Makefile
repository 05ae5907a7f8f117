# Each target first installs what it needs into .venv, once: see scripts/install.sh.
# ARGS are passed to the command: make demo ARGS="--steps 5", make test ARGS="-k sleep".

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test slow families matrix faults mutants fuzz check build clean

python := .venv/bin/python

help: ## the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: ## run a short, traced training loop on a real engine (ARGS)
	@scripts/install.sh demo
	@.venv/bin/vgen demo $(ARGS)

test: ## run the tests; those for CUDA are skipped without it (ARGS)
	@scripts/install.sh test
	@$(python) -m pytest $(ARGS)

slow: ## run the slow tests, which `make test` leaves out (ARGS)
	@scripts/install.sh slow
	@$(python) -m pytest -m slow $(ARGS)

families: ## sync tiny models of many architectures on the real engine, judged by the trainer's own forward (ARGS)
	@scripts/install.sh slow
	@PYTHONPATH=src:tests $(python) scripts/families.py --out families.json $(ARGS)

matrix: ## check every architecture, which makes docs/support.md (about 40 minutes)
	@scripts/install.sh slow
	@.venv/bin/vgen check --matrix docs/results/support.json $(ARGS)
	@$(python) -m vgen.checks.matrix page docs/results/support.json > docs/support.md

faults: ## plant faults and count which of them verification finds (about 20 minutes; ARGS)
	@scripts/install.sh slow
	@$(python) benchmarks/planted_faults.py $(ARGS)

mutants: ## change 300 places of the source and count the changes that the tests notice (up to 150 minutes; ARGS)
	@scripts/install.sh test
	@$(python) scripts/mutants.py $(ARGS)

fuzz: ## fuzz what strangers and peers send, half an hour for each of four targets (ARGS)
	@scripts/install.sh slow
	@VGEN_FUZZ_SECONDS=1800 $(python) -m pytest -m slow tests/fuzz -k test_no_input_breaks_a_rule -s $(ARGS)

check: ## check lint, format, types, complexity, and known vulnerabilities of what is installed
	@scripts/install.sh lint
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyright
	$(python) -m xenon --max-absolute C src  # C: at most 20
	$(python) scripts/audit.py

build: ## build the sdist and the wheel, into dist/
	@scripts/install.sh build
	@$(python) -m build

clean: ## remove build outputs and caches; .venv stays
	rm -rf build dist htmlcov .coverage .hypothesis .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
