# The two commands of the README. Both do all the set-up on a fresh machine: Python 3.11 or newer is all they need.
#   make demo   run recipes/q4_to_q2.yaml on the built-in model, offline
#   make test   lint, types and the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := true

.PHONY: demo test test-slow bench lint clean

demo: $(VENV)/.installed
	$(BIN)/a1q run recipes/q4_to_q2.yaml

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m slow --timeout 3600

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and alone: with it installed, no other package can pull in another build of it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "torch>=2.7,<2.14"
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install -q -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
