"""What the tests of whole commands share: tiny runs, in this process or in forked ones, with a file to look at each."""

import os
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for a network fails at once; read when the hub is imported

from helpers import Ranks, call

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


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Weights of the Inception network's shapes, drawn at random: tests may not download the real ones."""
    from torch_fidelity import feature_extractor_inceptionv3 as port

    network = port.FeatureExtractorInceptionV3
    # its constructor insists on loading weights
    with (
        torch.device("meta"),
        mock.patch.object(port, "load_state_dict_from_url"),
        mock.patch.object(network, "load_state_dict"),
    ):
        inception = network("inception", ["2048"])
    torch.manual_seed(0)
    inception.to_empty(device="cpu")
    for module in inception.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):  # PyTorch's own defaults shrink features to 1e-8
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(inception.state_dict(), path)
    return path
