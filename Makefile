# What continuous integration runs, and what a developer runs before a commit.
PYTHON ?= python

.PHONY: test lint types bench check
test:
	$(PYTHON) -m pytest -n 2

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m pyright

bench:
	$(PYTHON) -m benchmarks

check: lint types test
