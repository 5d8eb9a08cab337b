# Every target does its own set-up: the environment in .venv is made when it is missing
# and brought up to date when setup.cfg has changed. `make` alone lists the targets.

PYTHON ?= python3
TORCH ?= torch==2.13.0
OLD_TRANSFORMERS ?= transformers==4.57.6

VENV := .venv
OLD_VENV := .venv-old-transformers
BIN := $(VENV)/bin
OLD_BIN := $(OLD_VENV)/bin
READY := $(VENV)/.ready
OLD_READY := $(OLD_VENV)/.ready
EXTRAS_VENV := .venv-extras
EXTRAS_BIN := $(EXTRAS_VENV)/bin
EXTRAS_READY := $(EXTRAS_VENV)/.ready
ENGINES_VENV := .venv-engines
ENGINES_BIN := $(ENGINES_VENV)/bin
ENGINES_READY := $(ENGINES_VENV)/.ready
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

# More arguments for pytest, e.g. `make test PYTEST="-x -k sidecar"`.
PYTEST ?=
# The tests run in two processes. `make test WORKERS=` runs them in one.
WORKERS ?= -n 2 --dist worksteal
# The parts of the suite in which the versions of Transformers differ.
OLD_TESTS ?= tests/hf tests/cli/test_status.py tests/cli/test_checkpoints.py tests/cli/test_replay_command.py
# The share of the slow tests that `make test-slow-share` runs: another one each day of the year.
TURN ?= $(shell date +%j | sed 's/^0*//')
# The oldest and the newest Python, for `make test-pythons`.
PYTHONS ?= 3.10 3.13
# What a benchmark gets; continuous integration runs them with `BENCH=--short`.
BENCH ?=
# The environments of `make compat`; `make compat COMPAT=--short` takes two of them.
COMPAT ?=
# Set by the workflow that publishes: the check is then as strict as a release needs.
RELEASE ?=

export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-slow-share test-pythons test-recipes test-engines test-trl test-trackers test-gpu test-page \
	cov style quality types docs docs-check \
	notebooks bench bench-kill bench-detection bench-recovery bench-overhead bench-alerts \
	bench-crash-points bench-engines bench-kill-engines bench-command-line trace old-transformers compat ci-long build \
	release-check address clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- environments

install: $(READY) ## Make the environment in .venv: PyTorch, the package (editable), its tools

# PyTorch comes first and alone: an open range would bring a build for graphics cards, of some gigabytes.
$(READY): setup.cfg
	@echo "Setting up $(VENV) (some minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python $(PIP_INSTALL) "$(TORCH)"
	@$(BIN)/python $(PIP_INSTALL) -e ".[dev]"
	@touch $@

$(OLD_READY): setup.cfg
	@echo "Setting up $(OLD_VENV) with $(OLD_TRANSFORMERS) (some minutes the first time) ..."
	@test -x $(OLD_BIN)/python || $(PYTHON) -m venv $(OLD_VENV)
	@$(OLD_BIN)/python $(PIP_INSTALL) "$(TORCH)"
	@$(OLD_BIN)/python $(PIP_INSTALL) "$(OLD_TRANSFORMERS)" -e ".[dev]"
	@touch $@

# For the recipes and the documentation: TRL, PEFT, sentence-transformers, Sphinx.
$(EXTRAS_READY): setup.cfg
	@echo "Setting up $(EXTRAS_VENV) (some minutes the first time) ..."
	@test -x $(EXTRAS_BIN)/python || $(PYTHON) -m venv $(EXTRAS_VENV)
	@$(EXTRAS_BIN)/python $(PIP_INSTALL) "$(TORCH)"
	@$(EXTRAS_BIN)/python $(PIP_INSTALL) "$(TORCH)" -e ".[dev,trl,sentence-transformers,trackers,docs,release]"
	@touch $@

# For the tests of sharded training: DeepSpeed.
$(ENGINES_READY): setup.cfg
	@echo "Setting up $(ENGINES_VENV) (some minutes the first time) ..."
	@test -x $(ENGINES_BIN)/python || $(PYTHON) -m venv $(ENGINES_VENV)
	@$(ENGINES_BIN)/python $(PIP_INSTALL) "$(TORCH)"
	@$(ENGINES_BIN)/python $(PIP_INSTALL) "$(TORCH)" -e ".[dev,engines]"
	@touch $@

# ---- to see it

demo: $(READY) ## Train one model through the same fault, stock and guarded: a table and a picture
	@$(BIN)/python examples/demo.py

# ---- to check it

test: $(READY) ## Run the tests that are not slow, with doctests
	@$(BIN)/python -m pytest -m "not slow" $(WORKERS) $(PYTEST)

test-all: $(READY) ## Run every test
	@$(BIN)/python -m pytest $(WORKERS) $(PYTEST)

test-slow-share: $(READY) ## Run a quarter of the slow tests of the Trainer, another quarter each day
	@$(BIN)/python -m pytest tests/hf --ignore=tests/hf/engines -m slow --turn $(TURN) $(WORKERS) $(PYTEST)

test-pythons: ## Run the tests that need no PyTorch with the oldest and the newest Python, where they are installed
	@$(PYTHON) tests/pythons.py $(PYTHONS)

test-recipes: $(EXTRAS_READY) ## Run every recipe of examples/, with TRL and sentence-transformers
	@$(EXTRAS_BIN)/python -m pytest tests/test_recipes.py $(WORKERS) $(PYTEST)

test-trl: $(EXTRAS_READY) ## Run unchanged scripts under `hf-divguard run`: TRL's command line, sentence-transformers
	@$(EXTRAS_BIN)/python -m pytest tests/cli/test_run_scripts.py $(WORKERS) $(PYTEST)

test-trackers: $(EXTRAS_READY) ## Read findings back from TensorBoard, MLflow, W&B and Trackio
	@$(EXTRAS_BIN)/python -m pytest tests/trackers $(PYTEST)

test-engines: $(ENGINES_READY) ## Run the tests of sharded training: FSDP, DeepSpeed, DistributedConfig, restarts
	@$(ENGINES_BIN)/python -m pytest tests/hf/engines -rs $(WORKERS) $(PYTEST)

test-gpu: $(READY) ## Run the tests that need a graphics card
	@CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(BIN)/python -m pytest tests/gpu $(PYTEST)

cov: $(READY) ## Run the tests that are not slow and show which lines they miss
	@$(BIN)/python -m pytest -m "not slow" --cov=hf_divguard --cov-report=term-missing:skip-covered $(PYTEST)

old-transformers: $(OLD_READY) ## Run the tests with the oldest Transformers that is supported
	@$(OLD_BIN)/python -m pytest -m "not slow" $(WORKERS) $(PYTEST)

compat: ## Run trainer classes and versions in an environment each, and write docs/compatibility.md
	@$(PYTHON) tests/matrix/environments.py --torch "$(TORCH)" $(COMPAT)

# A browser comes from Debian where this user may install packages, and from playwright elsewhere.
test-page: $(READY) ## Test the page of `hf-divguard report` in a real browser
	@$(BIN)/python -c "import playwright" 2> /dev/null || $(BIN)/python $(PIP_INSTALL) -e ".[page]"
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
		|| $(BIN)/python -m playwright install chromium \
		|| echo "No browser could be installed: the tests say so and are skipped."
	@$(BIN)/python -m pytest tests/page $(PYTEST)

style: $(READY) ## Fix and format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

quality: $(READY) ## Check style and format, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY) ## Check the types
	@$(BIN)/mypy

docs: $(EXTRAS_READY) ## Build the documentation into docs/_build/html; a warning is an error
	@$(EXTRAS_BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-check: $(READY) ## Check that documentation, code and Makefile agree
	@$(BIN)/python -m pytest tests/test_docs.py $(PYTEST)

notebooks: $(READY) ## Run every notebook from top to bottom
	@$(BIN)/python notebooks/execute.py notebooks/*.ipynb

# ---- to measure it

bench: bench-overhead bench-alerts bench-detection bench-kill bench-recovery ## Run every benchmark (hours)

bench-kill: $(READY) ## Kill training runs and resume them, stock and guarded
	@$(BIN)/python -m benchmarks.kill_resume $(BENCH)

bench-detection: $(READY) ## Compare detection rules on labelled loss curves
	@$(BIN)/python -m benchmarks.detection.evaluate $(BENCH)
	@$(BIN)/python -m benchmarks.detection.robustness

bench-recovery: $(READY) ## Put faults into runs, compare how they end, and time a rollback
	@$(BIN)/python -m benchmarks.recovery $(BENCH)
	@$(BIN)/python -m benchmarks.rollback_time $(BENCH)

bench-overhead: $(READY) ## Measure what guarding costs per value, per step and per save
	@$(BIN)/python -m benchmarks.detection.update_cost
	@$(BIN)/python -m benchmarks.step_overhead $(BENCH)
	@$(BIN)/python -m benchmarks.save_cost

bench-alerts: $(READY) ## Measure what alerts cost, with servers that work and that do not
	@$(BIN)/python -m benchmarks.alert_cost $(BENCH)

bench-command-line: $(READY) ## Time the commands of hf-divguard on 10,000 checkpoints and 1,000,000 log lines
	@$(BIN)/python -m benchmarks.command_line $(BENCH)

trace: $(READY) ## Count the functions and files that one step passes
	@$(BIN)/python -m benchmarks.trace

bench-kill-engines: $(ENGINES_READY) ## Kill one rank of sharded runs at random moments and resume them (hours)
	@$(ENGINES_BIN)/python -W ignore -m benchmarks.kill_engines $(BENCH)

bench-engines: $(ENGINES_READY) ## Put faults into sharded runs, and measure saves and rollbacks by the number of processes
	@$(ENGINES_BIN)/python -W ignore -m benchmarks.engines.recovery $(BENCH)
	@$(ENGINES_BIN)/python -W ignore -m benchmarks.engines.cost $(BENCH)

bench-crash-points: $(READY) ## Try every crash point of saving, rotating and resuming
	@$(BIN)/python benchmarks/crash_points.py $(BENCH)

# ---- to publish it

build: $(READY) ## Build the source archive and the wheel into dist/
	@$(BIN)/python -m build

release-check: $(EXTRAS_READY) ## Build the package, check it as PyPI does, and train with the wheel in an empty environment
	@rm -rf dist
	@$(EXTRAS_BIN)/python -m build --outdir dist > /dev/null
	@$(EXTRAS_BIN)/python -m twine check --strict dist/*
	@$(EXTRAS_BIN)/python docs/release_check.py $(if $(RELEASE),--release)
	@$(EXTRAS_BIN)/python -m pytest -q tests/test_package.py $(PYTEST)

address: ## Write the address of the repository into every file: make address ADDRESS=https://github.com/...
	@$(PYTHON) docs/project_address.py "$(ADDRESS)"

ci-long: $(READY) $(OLD_READY) $(EXTRAS_READY) ## What continuous integration runs after `make test`, in shortened form
	@$(MAKE) --no-print-directory notebooks docs release-check test-page
	@$(EXTRAS_BIN)/python -m pytest tests/test_recipes.py -k "adapter or f1 or nan_gradient or embeddings" $(WORKERS) $(PYTEST)
	@$(EXTRAS_BIN)/python -m pytest tests/matrix $(WORKERS) $(PYTEST)
	@$(MAKE) --no-print-directory test-pythons PYTHONS=3.10
	@$(MAKE) --no-print-directory bench-kill BENCH=--short
	@$(MAKE) --no-print-directory bench-recovery BENCH=--short
	@$(OLD_BIN)/python -m pytest -m "not slow" $(WORKERS) $(OLD_TESTS) $(PYTEST)

clean: ## Remove environments, builds and results
	@rm -rf $(VENV) $(OLD_VENV) $(EXTRAS_VENV) $(ENGINES_VENV) .compat docs/_build docs/reference build dist demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
