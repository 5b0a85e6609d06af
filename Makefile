# make demo    a site with a running budget, from nothing
# make test    the suite, once per database server that can be reached; minutes
# make test-deep    the same at length: all crash points, full contention; an hour or more
# make check   style, types, imports, migrations and documentation; warnings are errors
# make audit   known vulnerabilities of what is installed; asks PyPI
# make docs    the documentation, in docs/_build/html
# make screenshots    the pictures of the documentation
# make clean   remove everything made here
#
# ARGS goes to the demo or to pytest: make test ARGS="tests/ledger -x"
# Also to override: PYTHON, VENV, PACKAGE (what is installed), DJANGO (which one).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

DEMO_VENV := $(or $(VENV),.venv)
DEV_VENV := $(or $(VENV),.venv-dev)
DEMO_STAMP := $(DEMO_VENV)/.demo-stamp
DEV_STAMP := $(DEV_VENV)/.dev-stamp
DEV := $(DEV_VENV)/bin

DJANGO ?= Django
PACKAGE ?= --editable .[celery,prometheus,otel]
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check

# The first Python that is new enough and can make virtual environments. A name on PATH is not
# enough: a version manager's shim may stand there for a Python that is not active.
CANDIDATES = python3 python3.13 python3.12 python3.11 python $(wildcard $(HOME)/.pyenv/versions/*/bin/python3)
SUITABLE = import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))
FIND_PYTHON = for candidate in "$(PYTHON)" $(CANDIDATES); do \
		if [ -n "$$candidate" ] && "$$candidate" -c '$(SUITABLE)' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
		if [ -n "$(PYTHON)" ]; then echo "$(PYTHON) is not a Python 3.11 or newer with venv." >&2; exit 1; fi; \
	done; \
	if [ -z "$${python:-}" ]; then echo "Python 3.11 or newer, with venv, is needed; name one with PYTHON=." >&2; exit 1; fi

.PHONY: help install demo test test-deep check lint types imports migrations audit docs screenshots clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

demo: $(DEMO_STAMP)
	@$(DEMO_VENV)/bin/python manage.py demo $(ARGS)

# What `test` and `check` need, for whoever wants it beforehand.
install: $(DEV_STAMP)

test: $(DEV_STAMP)
	@$(DEV)/python -m tests.run $(ARGS)

test-deep: export AI_BUDGET_TEST_DEPTH = deep
test-deep: test

check: lint types imports migrations docs

# In an environment of its own, so that what it needs itself is not what it looks at.
audit: $(DEV_STAMP)
	@$(DEV)/python -m venv $(DEV_VENV)/audit
	@$(DEV_VENV)/audit/bin/python $(PIP_INSTALL) pip-audit
	@$(DEV_VENV)/audit/bin/pip-audit --progress-spinner off \
		--path "$$($(DEV)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

screenshots: $(DEV_STAMP)
	@$(DEV)/python -m docs.screenshots

lint: $(DEV_STAMP)
	$(DEV)/ruff check
	$(DEV)/ruff format --check

types: $(DEV_STAMP)
	$(DEV)/mypy

imports: $(DEV_STAMP)
	$(DEV)/lint-imports --no-logo

# The models must not depend on a site's settings, so a site with other settings has none to make.
migrations: export DJANGO_SETTINGS_MODULE = tests.settings
migrations: $(DEV_STAMP)
	$(DEV)/python manage.py makemigrations --check --dry-run
	AI_BUDGET_TEST_USER_MODEL=custom AI_BUDGET_TEST_AUTO_FIELD=django.db.models.AutoField \
		$(DEV)/python manage.py makemigrations --check --dry-run

docs: $(DEV_STAMP)
	$(DEV)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html

clean:
	rm -rf .venv .venv-dev build dist docs/_build htmlcov
	rm -rf .coverage* .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

$(DEMO_STAMP): pyproject.toml
	@$(FIND_PYTHON); \
	echo "Installing into $(DEMO_VENV) with $$("$$python" -V) ..."; \
	"$$python" -m venv $(DEMO_VENV)
	@$(DEMO_VENV)/bin/python $(PIP_INSTALL) --editable .
	@touch $@

$(DEV_STAMP): pyproject.toml
	@$(FIND_PYTHON); \
	echo "Installing into $(DEV_VENV) with $$("$$python" -V) ..."; \
	"$$python" -m venv $(DEV_VENV)
	@$(DEV)/python $(PIP_INSTALL) --upgrade "pip>=25.1"
	@$(DEV)/python $(PIP_INSTALL) $(PACKAGE) --group dev "$(DJANGO)"
	@touch $@
