# make demo      train a Vision Mamba on real handwritten digits
# make demo-seg  train one to segment scenes composed of them
# make test      run the tests
# make lint      check style and types
#
# Each first creates .venv with the tested versions (some minutes, 6 GB).
# Another Python: make demo PYTHON=python3.11

PYTHON ?= python3
VENV ?= .venv
# two workers; `make test PYTEST_ARGS="-n 0 -x"` for one that stops at a failure
PYTEST_ARGS ?= -n 2
VENV_PYTHON := $(VENV)/bin/python
# Steps this small gain little from threads, and on a shared machine threads
# that spin while they wait make them many times slower.
THREADS := 1
demo-seg: THREADS := 2
export OMP_NUM_THREADS ?= $(THREADS)
DEMO := vim-nano-p4_1xb64-20e_digits
DEMO_SEG := vim-nano-p4_upernet_1xb8-2k_digit-scenes-64x64

.PHONY: help setup demo demo-seg test lint

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

setup: $(VENV)/.installed

demo: setup
	$(VENV_PYTHON) tools/train.py configs/vim/$(DEMO).py \
	    --work-dir work_dirs/$(DEMO)

demo-seg: setup
	$(VENV_PYTHON) tools/train.py configs/upernet/$(DEMO_SEG).py \
	    --work-dir work_dirs/$(DEMO_SEG)

test: setup
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy mmstabvim

$(VENV)/.installed: setup.py requirements/tested.txt requirements/test.txt
	@command -v $(PYTHON) > /dev/null || { \
	    echo 'mmstabvim needs Python 3.10 to 3.12, and there is no' \
	    '"$(PYTHON)"' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    sys.exit(not (3, 10) <= v <= (3, 12))' || { \
	    echo "mmstabvim needs Python 3.10 to 3.12, \"$(PYTHON)\" is" \
	    "$$($(PYTHON) --version 2>&1)." \
	    'Name another one: make PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	    echo '"$(PYTHON)" cannot make virtual environments: install its' \
	    'venv module (on Debian and Ubuntu: apt install python3-venv)' \
	    >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV_PYTHON) -m pip install -r requirements/test.txt
	$(VENV_PYTHON) -m pip install --no-build-isolation \
	    -c requirements/tested.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.txt
	$(VENV_PYTHON) -m pip install -r requirements/dev.txt
	touch $@
