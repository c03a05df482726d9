# Everything runs in .venv, which is made on first use and kept until pyproject.toml or
# constraints.txt change. Another Python: make PYTHON=python3.12 quickstart

PYTHON ?= python3
DIR ?= runs/quickstart
WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet
WHEELS := $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir .venv/wheels
# What constraints.txt holds for other extras, and what is for Linux alone.
ELSEWHERE := accelerate einops lm_eval $(if $(filter Linux,$(shell uname)),,triton)
space := $(subst ,, )
# Every other of the packages wanted, as pip takes them: $(call pinned,0) and $(call pinned,1)
pinned = $$(grep -vE '^(uv|$(subst $(space),|,$(strip $(ELSEWHERE))))==' constraints.txt | \
  awk 'NR % 2 == $(1)')
# A module's tests stay together, so that what they share is made once; slow modules go first.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install quickstart report test test-plain test-shapes test-rest check format doctor clean distclean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=$(PYTHON) makes .venv; DIR=$(DIR) is reported on; WORKERS=$(WORKERS) run tests."

install: $(INSTALLED)  ## Make .venv with everything in it (the other targets do so by themselves)

# pip finds every package by its version, so whichever build of torch the index serves, CPU or CUDA,
# is taken, and uv unpacks them, which is faster. What else a platform needs pip adds.
# The newest pip looks through the index in a third of the time of the one that Python 3.11 has.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is wanted; $(PYTHON) is older or missing. Use make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv --upgrade-deps .venv
	rm -rf .venv/wheels .venv/cache
	$(PIP) $$(grep '^uv==' constraints.txt)
	$(WHEELS) $(call pinned,0) & first=$$!; \
	  $(WHEELS) $(call pinned,1); second=$$?; wait $$first && exit $$second
	$(BIN)/uv pip install --quiet --python $(BIN)/python --cache-dir .venv/cache --no-deps \
	  --no-index --find-links .venv/wheels $(call pinned,0) $(call pinned,1)
	rm -rf .venv/wheels .venv/cache
	$(PIP) --no-build-isolation -c constraints.txt -e '.[text,ray,dev]'
	@touch $@

quickstart: $(INSTALLED)  ## Train attention and a gated convolution on recall, and chart it (3 minutes on 2 cores)
	$(BIN)/recallzoo run quickstart --out runs/quickstart
	$(BIN)/recallzoo report runs/quickstart

report: $(INSTALLED)  ## Chart the results in DIR
	$(BIN)/recallzoo report $(DIR)

test: test-shapes test-rest  ## Run all tests, with annotated shapes checked where that can be

test-plain: $(INSTALLED)  ## All tests as they are
	$(PYTEST)

test-shapes: $(INSTALLED)  ## The quick tests with tensor shapes and types checked
	$(PYTEST) --jaxtyping-packages=recallzoo,shape_checks.checker

# Compiled code and the checks do not go together, and other processes do not see them.
test-rest: $(INSTALLED)  ## The tests that test-shapes leaves out
	$(PYTEST) --unchecked-only

check: $(INSTALLED)  ## Lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED)  ## Put the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: $(INSTALLED)  ## What this machine can do
	$(BIN)/recallzoo doctor

clean:  ## Delete caches and builds; results stay
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	rm -rf src/*.egg-info

distclean: clean  ## Delete .venv as well
	rm -rf .venv
