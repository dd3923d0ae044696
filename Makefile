# Every target makes .venv and installs what it needs, once.
.PHONY: demo test integrations lint bench docs matrix matrix-quick clean
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

demo: $(READY)
	$(BIN)/optimstate demo --out optimstate-demo --force

# Some tests wait for other processes, so that one worker more than there are cores keeps all of them busy.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist worksteal

# Live runs in trainers that want another torch, or much beside: timm, torchtitan, fastai, Composer (500 MB).
integrations: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/integrations --requirement tests/integrations/packages.txt
	PYTHONPATH=$(VENV)/integrations $(BIN)/python -m pytest tests/integrations

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m tests.bench

# Other releases of torch, hours; the oldest and the newest, minutes. INDEX is pip's for torch (CPU wheels), MAKE_ENV a program
# that makes an environment, called with release, folder and interpreter; PYTHONS are the interpreters.
MATRIX := $(if $(INDEX),--index $(INDEX)) $(if $(MAKE_ENV),--make '$(MAKE_ENV)') $(if $(PYTHONS),--python $(PYTHONS))
matrix:
	$(PYTHON) -m tests.matrix $(MATRIX)

matrix-quick:
	$(PYTHON) -m tests.matrix --quick $(MATRIX)

docs: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]' --no-build-isolation --config-settings editable_mode=compat
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0 setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --config-settings editable_mode=compat --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
