"""Folders that commit 8023fbc has made go on here: a training run, a set of images, latents. See fixtures/README.md."""

import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call, latest, metrics
from safetensors.torch import load_file

import extract_latents
import sample_ddp
import train
from runtime.files import checksum

FIXTURES = Path(__file__).parent / "fixtures/8023fbc"
MODEL = "--model DiT-S/2 --hidden-size 4 --depth 1 --num-heads 1 --mlp-ratio 1 --lr 0.03 --ema-warmup --device cpu"
MODEL += " --num-workers 0"
DIGITS = (
    f"--data-path digits --vae none --image-size 8 --num-classes 10 {MODEL} --global-batch-size 12 --log-every 2".split()
)
LATENTS = f"--vae vae --image-size 16 --num-classes 2 {MODEL} --global-batch-size 4 --log-every 1 --max-steps 3".split()
SAMPLES = (
    "--ckpt run/checkpoints/0000004.pt --num-fid-samples 12 --per-proc-batch-size 4 --num-sampling-steps 5 --sample-dir S "
    "--folder set --device cpu"
).split()


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    for archive in FIXTURES.glob("*.tar.xz"):
        with tarfile.open(archive) as file:
            file.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_near(value, expected, name):
    """Up to what another processor's rounding does; lost optimizer state is off by ten times as much."""
    error = (value.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    assert error < 2e-4, f"{name} is off by {error:.1e} of its largest value"


def test_a_training_run_resumes(unpacked, capfd):
    command = [*DIGITS, "--ckpt-every", "4", "--run-dir", "run", "--max-steps", "8"]
    assert call(train.main, *command, "--clip-grad-norm", "0.001") == 2
    assert "--clip-grad-norm None, now 0.001" in capfd.readouterr().err, "the old record leaves out what was off"
    assert call(train.main, *command) == 0
    state, expected = latest(Path("run")), json.loads(Path("run.json").read_text())
    assert (state["step"], state["images_seen"]) == (expected["step"], expected["images_seen"])
    rows = metrics(Path("run"))
    assert [row["step"] for row in rows] == [row["step"] for row in expected["metrics"]] == [2, 4, 6, 8]
    for row, old in zip(rows, expected["metrics"], strict=True):
        assert row["loss"] == pytest.approx(old["loss"], rel=1e-5), row["step"]
    values = {f"{part}/{key}": value for part in ("model", "ema") for key, value in state[part].items()}
    values |= {f"opt/{i}/{key}": value for i, moments in state["opt"]["state"].items() for key, value in moments.items()}
    stored = load_file("run.safetensors")
    assert stored.keys() == values.keys()
    for name, tensor in stored.items():
        if "qkv.bias" not in name:  # its keys' part has a gradient of rounding errors alone
            value = values[name][:, ::8] if values[name].shape == (4, 256) else values[name]
            assert_near(value, tensor, name)


def test_a_set_of_images_is_completed_with_the_same_bytes(unpacked):
    assert call(sample_ddp.main, *SAMPLES) == 0
    expected = json.loads(Path("samples.json").read_text())
    images = np.load("S/set.npz")
    assert f"{zlib.crc32(images['arr_0'].tobytes()):08x}" == expected["arr_0_crc32"]
    assert np.array_equal(images["arr_1"], np.load("set.npz")["arr_1"])
    assert checksum("S/set.npz") == expected["npz_crc32"]


def test_a_set_of_images_of_other_settings_is_refused(unpacked, capfd):
    assert call(sample_ddp.main, *SAMPLES, "--cfg-scale", "2") == 2
    assert "--cfg-scale 1.5, now 2.0" in capfd.readouterr().err


def test_latents_are_completed_and_trained_on(unpacked):
    extract = "--data-path images --vae vae --image-size 16 --shard-size 2 --dtype float16 --device cpu --num-workers 0"
    assert call(extract_latents.main, *extract.split(), "--out", "unfinished") == 0
    expected = json.loads(Path("latents.json").read_text())
    for name, crc in expected["files_crc32"].items():
        if name.endswith(".npy") or name == "images.json":
            assert checksum(Path("unfinished") / name) == crc, name
    for number, folder in enumerate(("latents", "unfinished")):
        assert call(train.main, "--data-path", folder, *LATENTS, "--run-dir", f"run{number}") == 0
        for row, old in zip(metrics(Path(f"run{number}")), expected["metrics"], strict=True):
            assert row["loss"] == pytest.approx(old["loss"], rel=1e-5)


def test_the_checkpoint_of_the_old_run_is_opened(unpacked):
    from checkpoint.opened import Checkpoint

    opened = Checkpoint.open("run/checkpoints/0000004.pt")
    assert (opened.step, opened.image_size, opened.vae) == (4, 8, "none")
    assert opened.class_names == [str(digit) for digit in range(10)]
    model = opened.build_model()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64)).isfinite().all()
