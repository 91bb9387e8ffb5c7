# make demo    demonstrations → training → closed-loop success → report, on a CPU
# make test    the whole test suite
# make compare flow matching, diffusion and discretised actions, trained and measured alike (compare-quick: a small form)
# make check   formatting, lint and types
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN ?= runs/tabletop
SEED ?= 0
JOBS ?= 2
# One test process more than cores, since some tests wait for other processes.
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)

.PHONY: demo test compare compare-quick check format clean
.DELETE_ON_ERROR:

demo: data/tabletop/meta/info.json data/tabletop-validation/meta/info.json
	$(BIN)/python train.py configs/tabletop.py --run-dir $(RUN) --seed $(SEED) $(if $(wildcard $(RUN)/checkpoints),--resume)
	$(BIN)/pi0 report $(RUN)

compare compare-quick: data/tabletop/meta/info.json data/tabletop-validation/meta/info.json
	$(BIN)/pi0 compare configs/compare_tabletop.py $(if $(findstring quick,$@),--quick) --jobs $(JOBS)

test: $(VENV)/dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

check: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

data/tabletop/meta/info.json: | $(VENV)/sim
	$(BIN)/pi0 record data/tabletop --env tabletop

data/tabletop-validation/meta/info.json: | $(VENV)/sim
	$(BIN)/pi0 record data/tabletop-validation --env tabletop --split validation --episodes 60

# These files mark what is installed; after a change of pyproject.toml it is installed again.
$(VENV)/sim: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[sim,report]'
	touch $@

$(VENV)/dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[sim,rlds,vla-eval,dev]'
	touch $@ $(VENV)/sim

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pi0_jax needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build *.egg-info
