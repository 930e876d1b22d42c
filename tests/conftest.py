"""What the tests of whole commands share: tiny runs, in this process or in forked ones, with a file to look at each."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.runs import Ranks, call

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for a network fails at once
torch.set_num_threads(1)  # the numbers are small, and forked processes may not use OpenMP's threads

# A DiT of 30 thousand parameters on the digits, a few steps long
TINY = (
    "--data-path digits --vae none --image-size 8 --num-classes 10 --hidden-size 16 --depth 1 --num-heads 2 "
    "--patch-size 2 --global-batch-size 12 --lr 1e-3 --device cpu --log-every 2 --num-workers 0"
).split()


@pytest.fixture
def ranks(tmp_path):
    """ranks(main, argv, world_size) starts a command on several processes."""
    started = []

    def start(main, argv, world_size=1):
        started.append(Ranks(main, argv, world_size, tmp_path / f"output{len(started)}"))
        return started[-1]

    yield start
    for process in (p for run in started for p in run.processes if p.is_alive()):
        process.kill()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A checkpoint of a short run on the digits, EMA and all."""
    import train

    folder = tmp_path_factory.mktemp("tiny")
    assert call(train.main, *TINY, "--max-steps", 4, "--run-dir", folder / "run") == 0
    return folder / "run/checkpoints/0000004.pt"


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Three classes of four pictures each, of different sizes."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for label, name in enumerate(["ant", "bee", "cat"]):
        (root / name).mkdir()
        for i in range(4):
            pixels = random.integers(0, 256, (20 + i, 24 + label, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session")
def small_vae(tmp_path_factory):
    """A folder with a small random AutoencoderKL of the Stable Diffusion kind: 4 latent channels, a factor of 8."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    vae = AutoencoderKL(
        latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **blocks
    )
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder
