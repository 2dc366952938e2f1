# Two commands: `make demo` shows the product on a real model, `make test` is what CI runs.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DEMO := .demo
WORKERS ?= 2
# As many test processes as cores, so each has one thread for arithmetic.
ONE_THREAD := OMP_NUM_THREADS=1

.PHONY: demo test unit lint install clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

$(DEMO)/model.gguf: $(VENV)/.installed ci/demo_model.sh
	bash ci/demo_model.sh $(BIN) $(DEMO)

demo: $(DEMO)/model.gguf
	$(BIN)/lowprec calibrate $(DEMO)/model.gguf --budget 5% --effort fast --out $(DEMO)/run

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: $(VENV)/.installed
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) -m "not slow"

test: lint $(DEMO)/model.gguf
	bash ci/browser.sh
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) -m "not slow"
	$(ONE_THREAD) $(BIN)/pytest -n $(WORKERS) --dist loadfile -m slow

clean:
	rm -rf $(DEMO) build *.egg-info
