"""Checkpoints that commit dc9b1cd has made draw the same images here, and train on alike. See fixtures/README.md."""

import json
import tarfile
from pathlib import Path

import pytest
from fixtures import make
from helpers import call
from safetensors.torch import load_file

import sample
import sample_ddp
import train
from checkpoint.opened import Checkpoint
from data.condition import Classes, Texts


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    for archive in make.FIXTURES.glob("*.tar.xz"):
        with tarfile.open(archive) as file:
            file.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_near(value, expected, name):
    """Up to what another processor's rounding does; lost optimizer state is off by ten times as much."""
    error = (value.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error < 2e-4, f"{name} is off by {error:.1e} of its largest value"


@pytest.mark.parametrize("name", make.RUNS)
def test_an_old_checkpoint_draws_the_same_images_and_trains_on(unpacked, name):
    expected = json.loads(Path("expected.json").read_text())[name]
    (_, *training), (_, *drawing), (_, *grid) = make.commands(name)
    assert call(sample_ddp.main, *drawing) == 0
    assert call(sample.main, *grid) == 0
    assert make.drawn_images(name) == {"set": expected["set"], "grid": expected["grid"]}
    assert call(train.main, *training, "--max-steps", 8) == 0
    rows = make.metrics(name)
    assert [row["step"] for row in rows] == [6, 8]
    for row, old in zip(rows, expected["metrics"], strict=True):
        assert row == pytest.approx(old, rel=1e-5)
    if name == "classes":
        stored, values = load_file("classes.safetensors"), make.tensors(name)
        assert stored.keys() == values.keys()
        for key, tensor in stored.items():
            if "qkv.bias" not in key:  # its keys' part has a gradient of rounding errors alone
                assert_near(values[key], tensor, key)


def test_an_old_checkpoint_says_what_it_is(unpacked):
    opened = {name: Checkpoint.open(f"{name}/checkpoints/0000004.pt") for name in make.RUNS}
    for name, checkpoint in opened.items():
        assert (checkpoint.step, checkpoint.image_size, checkpoint.vae) == (4, 8, "none")
        assert checkpoint.class_names == [str(digit) for digit in range(10)], name
        assert checkpoint.build_model().objective == ("flow" if name == "flow" else "diffusion")
    assert isinstance(opened["flow"].condition, Classes)
    text = opened["text"].condition
    assert isinstance(text, Texts)
    assert (text.width, text.length, text.name) == (8, 8, "encoder")
