# Every target is one line over pip, pytest and the packages' own commands: without make, type that line.
PYTHON ?= python3
RUN := .venv/bin/python -m
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

TORCH := torch
TOOLS := pytest pytest-xdist hypothesis beartype
RANGES := $(addprefix tests/,hooked_mamba/loading hooked_mamba/test_text.py hooked_mamba/test_parity.py \
	hooked_mamba/analysis/test_plots.py hooked_mamba/test_cli.py saes/files saes/test_hub.py saes/explorer circuits/test_viewer.py)

.DEFAULT_GOAL := help
.PHONY: help install demo studies case-study stranger hybrid docs test test-all test-oldest test-newest bench lint format

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

install: .venv/.dev ## make .venv with everything the other targets need

demo: .venv/.installed ## look inside the bundled model; writes out/tour.html (offline)
	$(RUN) demos.tour

studies: .venv/.dev ## repeat six published experiments, compare five recurrences; writes out/studies/*.html (offline)
	$(RUN) demos.studies
	$(RUN) demos.recurrences

case-study: .venv/.dev ## test the story of a hunger feature claim by claim; writes out/hunger/report.html (offline)
	$(RUN) demos.hunger

stranger: .venv/.stranger ## look inside a package's trained classifier; writes out/stranger/index.html
	$(RUN) demos.stranger

hybrid: .venv/.dev ## what attention adds to a state, in models trained here; writes out/hybrid/index.html (offline)
	$(RUN) demos.hybrid

docs: .venv/.dev ## build the documentation; open out/site/index.html (offline)
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet --strict -f docs/site/mkdocs.yml

test: .venv/.dev ## the tests, without those that take minutes
	$(RUN) pytest $(PARALLEL)

test-all: .venv/.dev .venv/.stranger ## the slow tests as well
	$(RUN) pytest $(PARALLEL) --hypothesis-profile=many -m "not gpu and not peer"

test-oldest: ## tests of files, models and pages with the lowest versions that pyproject.toml promises, in .venv-oldest
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	$(PYTHON) -m tests.oldest > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install $(TORCH)
	.venv-oldest/bin/pip install -c .venv-oldest/constraints.txt -e '.[gguf]' $(TOOLS)
	.venv-oldest/bin/python -m pytest $(PARALLEL) $(RANGES)

test-newest: ## the same tests with the newest versions, in .venv-newest
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install $(TORCH)
	.venv-newest/bin/pip install --upgrade -e '.[gguf]' $(TOOLS)
	.venv-newest/bin/python -m pytest $(PARALLEL) $(RANGES)

bench: .venv/.dev .venv/peers/.installed ## time it against other libraries, one thread (docs/benchmarks.md)
	PYTHONPATH=.venv/peers $(RUN) tests.benchmarks $(ARGS)

lint: .venv/.dev ## formatting, lint rules and types
	$(RUN) ruff format --check . && $(RUN) ruff check . && $(RUN) mypy

format: .venv/.dev ## rewrite the code as `make lint` wants it
	$(RUN) ruff format . && $(RUN) ruff check --fix .

PIP := .venv/bin/pip install --disable-pip-version-check -c constraints.txt

# The package alone, which is all that `make demo` needs.
# torch first: a wheel without CUDA that pip already knows of is taken as it is.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.installed
	$(PIP) -e '.[dev,docs]'
	touch $@

.venv/.stranger: .venv/.installed
	$(PIP) -e '.[stranger]'
	touch $@

PEERS := .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target

.venv/peers/.installed: $(wildcard tests/benchmarks/requirements*.txt) .venv/.dev
	$(PEERS) .venv/peers -r tests/benchmarks/requirements.txt
	$(PEERS) .venv/peers/transformer_lens_4 -r tests/benchmarks/requirements-transformer-lens.txt
	$(PEERS) .venv/peers/nnsight_8 -r tests/benchmarks/requirements-nnsight.txt
	touch $@
