# Two commands matter: `make demo` and `make test`. Both make .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process a core, each with one thread (tests/conftest.py). All tests of a file run in one process, for they share models.
WORKERS := -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test check docs format lowest clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("vitrim needs Python 3.11 or newer, but got %d.%d; set PYTHON=..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,docs,openvino,seg]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m vitrim.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(WORKERS)

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(WORKERS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The lower end of every range of pyproject.toml, in an environment of its own (docs/versions.md).
TESTS ?= tests
lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct -e '.[dev]'
	.venv-lowest/bin/python -m pytest -q $(WORKERS) -o filterwarnings=default $(TESTS)

clean:
	rm -rf $(VENV) .venv-lowest build dist src/*.egg-info
