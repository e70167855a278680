# make demo      train a Vision Mamba on real handwritten digits
# make demo-seg  train one to segment scenes composed of them
# make test      run the fast tests, some minutes
# make test-all  run all tests that continuous integration runs
# make test-latest  run a quarter of them with the newest versions that
#                setup.py allows; STACK=onedl for the fork of OpenMMLab
# make test-campaign  run what takes hours: the guarantee on 54,000 matrices,
#                the newest versions of both stacks, a rehearsal of the GPU suite
# make coverage  run all tests, and say which lines none of them reaches
# make lint      check style, types and spelling
# make docs      build the documentation into docs/_build/html
#
# Each first creates .venv with the tested versions (some minutes, 6 GB).
# Another Python: make demo PYTHON=python3.11

PYTHON ?= python3
# tools/dist_train.sh has a variable of that name
unexport PYTHON
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

# what differs between versions: imports, operators, both toolkits, tools
STACK ?= lite
LATEST ?= .venv-latest-$(STACK)
LATEST_TESTS := $(addprefix tests/,test_layering.py test_stack.py \
    test_loading.py test_compat.py test_model_hub.py test_tools.py \
    test_training.py test_segmentation_runs.py test_segmentation_inference.py \
    test_models/test_hosts.py test_models/test_vim_parity.py \
    test_engine/test_layer_decay.py test_ops/test_selective_scan.py \
    test_ops/test_fused_scan.py test_ops/test_causal_conv1d.py \
    test_ops/test_rms_norm.py test_ops/test_gated_merge.py)

.PHONY: help setup demo demo-seg test test-all test-latest test-campaign \
    coverage lint docs

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
	$(VENV_PYTHON) -m pytest -m 'not slow' $(PYTEST_ARGS)

test-all: setup
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

test-latest: $(LATEST)/.installed
	$(LATEST)/bin/python -m pytest $(PYTEST_ARGS) $(LATEST_TESTS)

test-campaign: setup
	MMSTABVIM_FUZZ=500 $(VENV_PYTHON) -m pytest $(PYTEST_ARGS) \
	    tests/test_layers/test_guarantee.py
	$(MAKE) test-latest STACK=lite
	$(MAKE) test-latest STACK=onedl
	$(VENV_PYTHON) tools/benchmarks/gpu_suite.py --quick

coverage: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m pytest $(PYTEST_ARGS) --cov \
	    --cov-report=term:skip-covered --cov-report=html

lint: $(VENV)/.installed-dev
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check
	$(VENV_PYTHON) -m mypy mmstabvim
	$(VENV)/bin/codespell

docs: $(VENV)/.installed-docs
	$(VENV_PYTHON) -m sphinx -W --keep-going -q -d docs/_build/doctrees \
	    docs docs/_build/html
	@echo 'Documentation: docs/_build/html/index.html'

$(VENV)/.installed: requirements/tested.txt requirements/test.txt
$(VENV)/.installed $(LATEST)/.installed: setup.py
	@command -v $(PYTHON) > /dev/null || { \
	    echo 'mmstabvim needs Python 3.10 to 3.13, and there is no' \
	    '"$(PYTHON)"' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	    sys.exit(not (3, 10) <= v <= (3, 13))' || { \
	    echo "mmstabvim needs Python 3.10 to 3.13, \"$(PYTHON)\" is" \
	    "$$($(PYTHON) --version 2>&1)." \
	    'Name another one: make PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
	    echo '"$(PYTHON)" cannot make virtual environments: install its' \
	    'venv module (on Debian and Ubuntu: apt install python3-venv)' \
	    >&2; exit 1; }
	$(PYTHON) -m venv $(@D)
	$(INSTALL)
	touch $@

$(VENV)/.installed: INSTALL = \
    $(VENV_PYTHON) -m pip install -r requirements/test.txt && \
    $(VENV_PYTHON) -m pip install --no-build-isolation \
        -c requirements/tested.txt -e . && \
    $(VENV_PYTHON) tools/link_editable.py
$(LATEST)/.installed: INSTALL = \
    $(LATEST)/bin/python -m pip install -e '.[$(STACK),test]' && \
    $(LATEST)/bin/python tools/link_editable.py

$(VENV)/.installed-dev $(VENV)/.installed-docs: \
    $(VENV)/.installed-%: $(VENV)/.installed requirements/%.txt
	$(VENV_PYTHON) -m pip install -r requirements/$*.txt
	touch $@
