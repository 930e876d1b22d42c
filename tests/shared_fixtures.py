"""What the tests of whole commands share: tiny runs, in this process or in forked ones, with a file to look at each."""

from unittest import mock

import pytest
import torch
from conftest import TINY
from helpers import Ranks, call, make_autoencoder, make_images, make_inception

from models import BLOCKS
from training import watchers

watchers.MAX_IMAGES = 48  # of held-out images: a validation of 512 takes a third of a second
torch.set_num_threads(1)  # the numbers are small, and forked processes may not use OpenMP's threads


@pytest.fixture(autouse=True)
def known_blocks():
    """Studies add designs to the table, which is as it was for the next test."""
    with mock.patch.dict(BLOCKS):
        yield


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
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def small_vae(tmp_path_factory):
    return make_autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    return make_inception(tmp_path_factory.mktemp("inception") / "inception.pth")
