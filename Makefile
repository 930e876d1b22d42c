# make setup   prepare .venv (needs python3 with venv, and the network once)
# make demo    train a small DiT on MNIST's handwritten digits and draw samples: demo/samples.png
# make demo-text    the same with captions in place of classes: demo/text.png
# make demo-video    clips of moving digits, from a model of single frames: demo/clips.gif
# make paper    the paper's findings on a laptop, and what fewer evaluations cost: docs/paper.md; an hour on two busy cores
# make test    run the tests
# make test-lowest PYTHON=python3.10    run them with the lowest versions that pyproject.toml allows, in .venv-lowest
# make test-newest PYTHON=python3.13    and with the newest, in .venv-newest; TESTS="tests/test_models.py ..." for some of them
PYTHON ?= python3
VENV := .venv/bin
# bytecode makes every start after the first several times faster
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup demo demo-text demo-video paper test test-lowest test-newest lint

setup: .venv/.complete

# uv installs torch and torchvision as a matching pair from one source, in seconds, and compiles all bytecode once: several
# processes that start at the same time for the first time would each compile the same files
.venv/.complete: pyproject.toml
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)/uv pip install --compile-bytecode --python $(VENV)/python --requirements pyproject.toml --group dev
	$(VENV)/python -c "import train, sample, sample_ddp, diffusers"
	touch $@

# The main job at its smallest: real images, the same scripts as ImageNet's, some minutes on two cores
# make demo SAMPLER=flow-heun STEPS=10   draws the same with another sampler
# ddim with noise in each step: it corrects errors of earlier steps, and strokes have fewer gaps (docs/laptop.md)
SAMPLER ?= ddim --eta 1
STEPS ?= 20
DEMO_CKPT := demo/run/checkpoints/0002400.pt
DRAW := --ckpt $(DEMO_CKPT) --cfg-scale 2 --sampler $(SAMPLER) --num-sampling-steps $(STEPS)

demo: setup
	$(VENV)/python train.py --data-path mnist --vae none --image-size 28 --num-classes 10 --run-dir demo/run \
	    --model DiT-S/2 --hidden-size 96 --depth 4 --num-heads 4 --patch-size 7 --global-batch-size 64 --lr 1e-2 \
	    --lr-warmup-steps 100 --lr-schedule cosine --ema-warmup --recipe fast --max-steps 2400
	$(VENV)/python sample.py $(DRAW) --output demo/samples.png \
	    --labels 0 1 2 3 4 5 6 7 8 9 --samples-per-label 8 --columns 8 --enlarge 3 --captions
	rm -rf demo/samples demo/samples.npz
	$(VENV)/python sample_ddp.py $(DRAW) --num-fid-samples 250 --balanced-labels --per-proc-batch-size 50 \
	    --sample-dir demo --folder samples
	$(VENV)/python -m studies.digits demo/samples.npz
	@echo "Look at demo/samples.png"

# Captions in place of classes: the text encoder is all-MiniLM-L6-v2, whose weights a package of `make setup` holds
TEXT := demo/text
PROMPTS := --prompt "a handwritten zero" "the number 3, drawn by hand" "a seven" "the digit 8 in pencil" \
    "please draw me a two" "five in black ink" "this is what a 9 looks like" "a handwritten digit" \
    "look, sevens" "VII"

demo-text: setup
	$(VENV)/python train.py --data-path digits --vae none --image-size 8 --text-encoder minilm --text-length 16 \
	    --run-dir $(TEXT)/run --model DiT-S/2 --hidden-size 96 --depth 4 --num-heads 4 --global-batch-size 64 --lr 2e-3 \
	    --ema-warmup --max-steps 1000
	$(VENV)/python sample.py --ckpt $(TEXT)/run/checkpoints/0001000.pt $(PROMPTS) --cfg-scale 3 --num-sampling-steps 50 \
	    --samples-per-label 5 --columns 5 --enlarge 24 --captions --output demo/text.png
	$(VENV)/python -m studies.text_digits --ckpt $(TEXT)/run/checkpoints/0001000.pt
	@echo "Look at demo/text.png"

# A model of clips that starts from one of single frames, as those of videos do from one of images (docs/video.md). Two
# processes of one thread each: models this small gain less from two threads
CLIPS := --ckpt demo/video/run/checkpoints/0000500.pt --cfg-scale 3 --sampler ddim --eta 1 --num-sampling-steps 30

demo-video: setup
	OMP_NUM_THREADS=1 $(VENV)/torchrun --nproc_per_node=2 train.py --init-from assets/moving.safetensors \
	    --data-path moving-mnist --vae none --image-size 32 --num-frames 6 --run-dir demo/video/run --model DiT-S/2 --hidden-size 72 --depth 6 --num-heads 6 \
	    --patch-size 4 --rope --recipe fast --time-shift 3 --ema-warmup --lr 6e-3 --lr-warmup-steps 50 --lr-schedule cosine \
	    --global-batch-size 16 --max-steps 500
	$(VENV)/python sample.py $(CLIPS) --labels 0 1 2 3 4 5 6 7 8 9 --columns 5 --enlarge 3 --output demo/clips.gif
	$(VENV)/python sample.py $(CLIPS) --labels 0 1 2 3 4 5 6 7 8 9 --columns 2 --enlarge 3 --captions --output demo/clips.png
	rm -rf demo/video/samples demo/video/samples.npz
	OMP_NUM_THREADS=1 $(VENV)/torchrun --nproc_per_node=2 sample_ddp.py $(CLIPS) --num-fid-samples 60 --balanced-labels \
	    --per-proc-batch-size 15 --sample-dir demo/video --folder samples
	$(VENV)/python -m studies.moving demo/video/samples.npz
	@echo "Look at demo/clips.gif, and at demo/clips.png frame by frame"

# Two runs at a time, each on one core. The same command resumes what was stopped.
paper: setup
	OMP_NUM_THREADS=1 $(VENV)/python -m studies.paper --jobs 2
	OMP_NUM_THREADS=1 $(VENV)/python -m studies.caching --jobs 2

# By whole files: what the tests of a file share is made and imported by one process
test: setup
	$(VENV)/python -m pytest -n 3 --dist loadfile

# --no-build: where the lowest version has no wheel for this Python, the next one that has is tested
TESTS ?= tests
test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-$*/bin/uv pip install --python .venv-$*/bin/python --no-build --resolution $(RESOLUTION) \
	    --requirements pyproject.toml --group dev
	.venv-$*/bin/python -m pytest -n 3 --dist loadfile $(TESTS)

lint: setup
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
