# make demo   install into .venv and run the main job on pictures with known truth
# make test   lint, types and all tests;  make fast: without the slow ones
# make bench  the benchmarks;  make format: rewrite the code in its style

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test fast lint bench format clean

demo: $(INSTALLED)
	$(BIN)/daskcell demo

# Two at a time, with one thread each: threads of both that wait for each other take twice as long.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations 15 -m "not alone" -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -q --durations 5 -m alone

fast: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow and not alone" -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The marker is younger than the project file only if the installation went through.
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable ".[test,hpc,fast]"
	touch $(INSTALLED)

clean:
	rm -rf .venv demo build dist
