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

# The main job at its smallest: real images, the same scripts as ImageNet's, two minutes on two cores
# make demo SAMPLER=dpm-solver++ STEPS=20   draws the same with another sampler
SAMPLER ?= ddpm
STEPS ?= 50
DEMO_CKPT := demo/run/checkpoints/0001200.pt
DRAW := --ckpt $(DEMO_CKPT) --cfg-scale 3 --sampler $(SAMPLER) --num-sampling-steps $(STEPS)

demo: setup
	$(VENV)/python train.py --data-path digits --vae none --image-size 8 --num-classes 10 --run-dir demo/run \
	    --model DiT-S/2 --hidden-size 96 --depth 4 --num-heads 4 --global-batch-size 64 --lr 2e-3 --ema-warmup \
	    --max-steps 1200
	$(VENV)/python sample.py $(DRAW) --output demo/samples.png \
	    --labels 0 1 2 3 4 5 6 7 8 9 --samples-per-label 8 --columns 8 --enlarge 8 --captions
	rm -rf demo/samples demo/samples.npz
	$(VENV)/python sample_ddp.py $(DRAW) --num-fid-samples 250 --balanced-labels --per-proc-batch-size 50 \
	    --sample-dir demo --folder samples
	$(VENV)/python -m benchmarks.digits demo/samples.npz
	@echo "Look at demo/samples.png"

test: setup
	$(VENV)/python -m pytest -n 2

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
