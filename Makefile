# Everything here sets itself up: Python, pip and make are all it needs.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test lint install clean

demo: install ## contact sheet of guidance rules and policies on the bundled model, in out/compare
	$(BIN)/diffusers-guidance compare --out out/compare

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/typed .
	MYPYPATH=build/typed $(BIN)/mypy -p diffusers_guidance

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
