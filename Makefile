# make run: set up, then the main job on the sample; make test: set up, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# make test-gpu: set up, then on a CUDA device the tests of all that computes on one.
.PHONY: run test test-gpu test-spark lint format docs viz clean

run: $(INSTALLED)
	$(BIN)/kedro run

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto

test-gpu: $(INSTALLED)
	$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "there is no CUDA device"'
	$(BIN)/python -m pytest -n 8 tests/losses tests/models tests/evaluation tests/training \
		tests/profiling tests/diagnostics tests/recommendation

# make test-spark: set up with Spark, which needs Java and 500 MB, then the tests that run on it.
test-spark: $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[spark]'
	$(BIN)/python -m pytest tests/interactions/test_engines.py tests/pipelines/test_spark.py
	$(BIN)/python -m pytest --on-spark tests/interactions/test_cleaning.py \
		tests/interactions/test_filters.py tests/interactions/test_splits.py \
		tests/interactions/test_encoding.py tests/interactions/test_build_sequences.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# make docs: set up, then the documentation as a site in site/; what links to nothing fails.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

viz: $(INSTALLED)
	$(BIN)/kedro viz run

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,docs,viz]'
	touch $@

clean:
	rm -rf $(VENV)
