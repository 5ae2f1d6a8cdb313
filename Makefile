# Thin: each target is what a reader could type. The environment is made once, in .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

VERSION := $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' rlscuda/__init__.py)
FROM ?= dist/rlscuda-$(VERSION).tar.gz# what `make wheel` builds: the sdist, or a folder with its files

.PHONY: demo docs test lint bench wheel wheel-check clean

demo: .venv/installed
	$(BIN)/rlscuda train --model lenet5 --data mnist5k --optimizer rls,sgd,adam --lr sgd=0.05,adam=0.005 --epochs 8 --out runs/demo --overwrite
	$(BIN)/rlscuda prune --run runs/demo --ratio 0.7 --recover 1 --overwrite

docs: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -E -W --keep-going -q docs docs/_build/html
	@echo "$(CURDIR)/docs/_build/html/index.html"
	@test -z "$$DISPLAY$$WAYLAND_DISPLAY" || $(BIN)/python -m webbrowser "file://$(CURDIR)/docs/_build/html/index.html"

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

bench: .venv/installed
	$(BIN)/rlscuda bench

wheel: .venv/installed
	rm -rf dist build/linux
	$(BIN)/python setup.py -q sdist
	$(BIN)/python -m pip wheel "$(FROM)" --no-build-isolation --no-deps -w build/linux
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/linux/*.whl
	$(BIN)/python tests/package/wheel_check.py dist/*.whl

wheel-check: .venv/installed
	$(BIN)/python tests/package/wheel_check.py dist/*.whl --torch 2.10.0 2.11.0 2.13.0

.venv/installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy ninja pybind11
	$(BIN)/python -m pip install --quiet --no-build-isolation "$(TORCH)" -e ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info rlscuda/*.so docs/_build docs/auto_tutorials
