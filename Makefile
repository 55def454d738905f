# Every target is one line over pip, pytest and the packages' own commands: without make, type that line.
PYTHON ?= python3
RUN := .venv/bin/python -m
PARALLEL := -n auto --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install demo studies case-study stranger docs test test-all bench lint format

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1	\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

install: .venv/.installed ## make .venv with everything the other targets need

demo: .venv/.installed ## look inside the bundled model; writes out/tour.html (offline)
	$(RUN) demos.tour

studies: .venv/.installed ## repeat six published experiments; writes out/studies/*.html (offline)
	$(RUN) demos.studies

case-study: .venv/.installed ## test the story of a hunger feature claim by claim; writes out/hunger/report.html (offline)
	$(RUN) demos.hunger

stranger: .venv/.stranger ## look inside a package's trained classifier; writes out/stranger/index.html
	$(RUN) demos.stranger

docs: .venv/.installed ## build the documentation; open out/site/index.html (offline)
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet --strict -f docs/site/mkdocs.yml

test: .venv/.installed ## the tests, without those that take minutes
	$(RUN) pytest $(PARALLEL)

test-all: .venv/.installed .venv/.stranger ## the slow tests as well
	$(RUN) pytest $(PARALLEL) --hypothesis-profile=many -m "not gpu and not peer"

bench: .venv/.installed .venv/peers/.installed ## time it against other libraries, one thread (docs/benchmarks.md)
	PYTHONPATH=.venv/peers $(RUN) tests.benchmarks $(ARGS)

lint: .venv/.installed ## formatting, lint rules and types
	$(RUN) ruff format --check . && $(RUN) ruff check . && $(RUN) mypy

format: .venv/.installed ## rewrite the code as `make lint` wants it
	$(RUN) ruff format . && $(RUN) ruff check --fix .

# torch first and alone: a wheel without CUDA that pip already knows of is taken as it is.
.venv/.installed: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $@

.venv/.stranger: .venv/.installed
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[stranger]'
	touch $@

PEERS := .venv/bin/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target

.venv/peers/.installed: $(wildcard tests/benchmarks/requirements*.txt) .venv/.installed
	$(PEERS) .venv/peers -r tests/benchmarks/requirements.txt
	$(PEERS) .venv/peers/transformer_lens_4 -r tests/benchmarks/requirements-transformer-lens.txt
	touch $@
