"""The small models in assets/: their cards tell the truth, their images stay, and README's command draws them."""

import hashlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

import sample
from checkpoint.opened import Checkpoint
from sampling.config import GuidanceConfig, SamplerConfig, SourceConfig
from sampling.pipeline import Pipeline, to_uint8

ROOT = Path(__file__).parents[1]
MODELS = [ROOT / "assets/mnist.safetensors", ROOT / "assets/moving.safetensors"]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_card_belongs_to_the_file(path):
    card, checkpoint = path.with_suffix(".md").read_text(), Checkpoint.open(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    trained = {name: tensor for name, tensor in checkpoint.weights.items() if name != "pos_embed"}
    assert f"{sum(tensor.numel() for tensor in trained.values()):,} parameters" in card
    assert {tensor.dtype for tensor in trained.values()} == {torch.bfloat16}
    assert path.stat().st_size < 8e6


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_their_images_have_not_changed_by_more_than_rounding(path):
    """tests/golden/README.md says how the files were made. Other kernels than there move few pixels by a shade or two."""
    sampler, guidance = SamplerConfig("dpm-solver++", 6), GuidanceConfig(cfg_scale=2.0)
    pipeline = Pipeline.load(SourceConfig(ckpt=str(path)), sampler, guidance)
    pixels = to_uint8(pipeline(range(10), *pipeline.noise(seed=0, indices=range(10))))[..., 0].squeeze()
    with np.load(ROOT / f"tests/golden/{path.stem}_model.npz") as golden:
        difference = np.abs(pixels.astype(int) - golden["pixels"])
    assert difference.max() <= 3
    assert (difference > 0).mean() < 0.02


def test_the_first_command_of_the_readme_draws_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(re.search(r"^python sample\.py (--ckpt assets/\S+)", (ROOT / "README.md").read_text(), re.M)[1])
    assert call(sample.main, *words, "--output", tmp_path / "digits.png") == 0
    with Image.open(tmp_path / "digits.png") as drawn, Image.open(ROOT / "assets/samples.png") as shown:
        drawn, shown = (np.asarray(picture.convert("RGB")).astype(int) for picture in (drawn, shown))
    assert drawn.shape == shown.shape
    assert np.abs(drawn - shown).mean() < 0.5, "the picture beside the command is what it draws"
