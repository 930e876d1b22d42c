"""What the tests of whole commands share: tiny runs, in this process or in forked ones, with a file to look at each."""

import gc
import os
import signal
from unittest import mock

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for a network fails at once; read when the hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: several tests run at a time, each on small numbers

from helpers import Ranks, call, make_autoencoder, make_images, make_inception

from models import BLOCKS
from training import watchers

for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name):  # ignored under nohup, and by a job in the background; commands of tests inherit it
        signal.signal(getattr(signal, name), handler)
gc.set_threshold(50_000)  # as commands have it, see runtime/parser.py
watchers.MAX_IMAGES = 48  # of held-out images: a validation of 512 takes a third of a second
torch.set_num_threads(1)  # the numbers are small, and forked processes may not use OpenMP's threads


def pytest_collection_finish():
    """What is imported by now stays. Looking through it again takes a third of a second each time, and in a forked process
    copies its pages too."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # else libraries report at exit what they still hold


# A DiT of 30 thousand parameters on the digits, a few steps long
TINY = (
    "--data-path digits --vae none --image-size 8 --num-classes 10 --hidden-size 16 --depth 1 --num-heads 2 "
    "--patch-size 2 --global-batch-size 12 --lr 1e-3 --device cpu --log-every 2 --num-workers 0"
).split()


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
