# make setup   prepare .venv (needs python3 with venv, and the network once)
# make demo    train a small DiT on handwritten digits and draw samples: demo/samples.png
# make test    run the tests
PYTHON ?= python3
VENV := .venv/bin
# bytecode makes every start after the first several times faster
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo test lint clean

setup: .venv/.complete

# uv installs torch and torchvision as a matching pair from one source, in seconds
.venv/.complete: pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/uv pip install --python $(VENV)/python --requirements pyproject.toml --group dev
	$(VENV)/python -c "import train, sample, sample_ddp, diffusers"
	touch $@

test: setup
	$(VENV)/python -m pytest -n 2

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
