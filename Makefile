# make demo   the whole pipeline on this machine, some minutes, no GPU: the table, and a report to open
# make test   lint, types and tests
# make test-all  the same with the tests that take minutes each
# make smoke  the pipeline shortened to some minutes; make smoke-docker: with the code world in containers;
#             make smoke-vllm: sampled by vLLM, which it installs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test test-all smoke smoke-docker smoke-vllm
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/posttrain run configs/tiny/pipeline.yaml --out runs/demo

smoke: $(VENV)/installed
	$(BIN)/posttrain run configs/tiny/smoke.yaml --out runs/smoke

smoke-docker: $(VENV)/installed
	$(BIN)/posttrain run configs/tiny/docker.yaml --out runs/smoke-docker

smoke-vllm: $(VENV)/installed
	scripts/install-vllm.sh
	$(BIN)/posttrain run configs/tiny/vllm.yaml --out runs/smoke-vllm

test: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder -m 'not long'

test-all: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "posttrain needs Python 3.11 or later; name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(INPUTS) | $(BIN)/python
	@echo "installing posttrain into $(VENV), the first time some minutes"
	$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(INPUTS) | $(BIN)/python
	@echo "installing posttrain and what its tests need into $(VENV), the first time some minutes"
	$(PIP) -e '.[dev,bench]'
	@touch $(VENV)/installed $@
