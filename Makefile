# What continuous integration runs, and what a developer runs before a commit.
PYTHON ?= python

.PHONY: test slow lint types bench check
test:
	$(PYTHON) -m pytest -n 2

slow:
	$(PYTHON) -m pytest -n 2 -m slow

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m pyright

bench:
	$(PYTHON) -m benchmarks

check: lint types test
