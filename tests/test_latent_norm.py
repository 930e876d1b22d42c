"""--latent-norm channel: what is measured, recorded, resumed, undone in sampling, and carried by conversions."""

import numpy as np
import pytest
import torch
from helpers import call, latest
from safetensors.torch import load_file

import extract_latents
import train
from checkpoint.opened import Checkpoint
from data import statistics
from data.latents import read_settings, read_statistics
from sampling.pipeline import Pipeline
from tools import convert

TINY = (
    "--image-size 16 --hidden-size 16 --depth 1 --num-heads 2 --patch-size 1 --global-batch-size 6 --lr 1e-3 --device cpu "
    "--num-workers 0 --max-steps 3 --log-every 1"
).split()


@pytest.fixture(scope="module")
def latents(image_folder, small_vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "stored"
    argv = ["--data-path", image_folder, "--vae", small_vae, "--image-size", 16, "--num-workers", 0, "--dtype", "float32"]
    assert call(extract_latents.main, *argv, "--out", folder) == 0
    return folder


def run(data, vae, folder, *extra):
    return call(train.main, *TINY, "--data-path", data, "--vae", vae, "--run-dir", folder, *extra)


@pytest.fixture(scope="module")
def trained(latents, small_vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("channel") / "run"
    assert run(latents, small_vae, folder, "--latent-norm", "channel") == 0
    return folder


def test_a_run_from_latents_records_their_statistics_and_sampling_undoes_them(trained, latents):
    found = latest(trained)["latents"]
    assert found == read_statistics(latents, read_settings(latents))
    assert (
        "Latents are normalised by each channel's mean and standard deviation, of all images"
        in (trained / "log.txt").read_text()
    )
    space = Pipeline.load(trained).space
    moments = torch.cat([load_file(path)["moments"] for path in latents.glob("*.safetensors")]).flatten(0, 1)
    x_0 = torch.cat([space.sample(moments) for _ in range(200)])
    torch.testing.assert_close(x_0.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.02)
    torch.testing.assert_close(x_0.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.02)
    expected = space.vae.decode(
        x_0[:2] * torch.tensor(found["std"])[:, None, None] + torch.tensor(found["mean"])[:, None, None]
    )
    torch.testing.assert_close(space.decode(x_0[:2]), expected.sample, rtol=1e-4, atol=1e-5)


def test_images_are_measured_alike_on_any_number_of_processes(
    image_folder, latents, small_vae, tmp_path, ranks, monkeypatch
):
    monkeypatch.setattr(statistics, "BATCH_SIZE", 5)
    found = []
    for world_size in (1, 2):
        argv = [*TINY, "--data-path", image_folder, "--vae", small_vae, "--run-dir", tmp_path / str(world_size)]
        process = ranks(train.main, [*argv, "--latent-norm", "channel", "--no-flip"], world_size)
        assert process.wait() == [0] * world_size, process.text()
        found.append(latest(tmp_path / str(world_size))["latents"])
    assert found[0] == found[1], "to the last bit"
    stored = [load_file(path)["moments"][:, 0] for path in latents.glob("*.safetensors")]  # without the flips
    mean, std = torch.cat(stored).double().unbind(1)
    np.testing.assert_allclose(found[0]["mean"], mean.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    variance = mean.var((0, 2, 3), correction=0) + (std**2).mean((0, 2, 3))
    np.testing.assert_allclose(found[0]["std"], variance.sqrt(), rtol=1e-4)


def test_a_resumed_run_has_the_statistics_of_its_checkpoint(trained, latents, small_vae, image_folder, tmp_path):
    for steps in (2, 4):
        assert run(image_folder, small_vae, tmp_path / "parts", "--latent-norm", "channel", "--max-steps", steps) == 0
    assert run(image_folder, small_vae, tmp_path / "whole", "--latent-norm", "channel", "--max-steps", 4) == 0
    parts, whole = (latest(tmp_path / name) for name in ("parts", "whole"))
    assert parts["latents"] == whole["latents"]
    assert all(torch.equal(value, whole["ema"][name]) for name, value in parts["ema"].items())
    assert run(image_folder, small_vae, tmp_path / "parts", "--max-steps", 5) == 2, "the option has changed"


def test_fine_tuning_goes_on_in_the_same_latent_space(trained, image_folder, small_vae, tmp_path):
    before = Checkpoint.open(str(trained)).latents
    validation = ["--val-every", 2, "--val-data-path", image_folder]
    assert run(image_folder, small_vae, tmp_path / "tuned", "--init-from", trained, *validation) == 0
    assert Checkpoint.open(str(tmp_path / "tuned")).latents == before
    assert run(image_folder, small_vae, tmp_path / "tuned", "--init-from", "gone.pt", "--max-steps", 4, *validation) == 0
    assert Checkpoint.open(str(tmp_path / "tuned")).latents == before
    options = ["--init-from", trained, "--latent-norm", "factor"]
    assert run(image_folder, small_vae, tmp_path / "factor", *options) == 0
    assert "latents" not in latest(tmp_path / "factor")


def test_conversions_carry_the_statistics_or_say_that_they_cannot(trained, tmp_path, capfd):
    assert call(convert.main, trained, tmp_path / "model.safetensors") == 0
    assert Checkpoint.open(tmp_path / "model.safetensors").latents == Checkpoint.open(str(trained)).latents
    for target in ("model.pt", "folder"):
        assert call(convert.main, trained, tmp_path / target) == 2
        assert "--latent-norm channel" in capfd.readouterr().err


@pytest.mark.parametrize(
    "record", [{"mean": [0.0] * 4, "std": [1.0] * 3 + [0.0]}, {"mean": [0.0] * 3, "std": [1.0] * 4}, {}]
)
def test_a_damaged_record_is_refused(trained, tmp_path, record):
    state = latest(trained)
    torch.save({**state, "latents": record}, tmp_path / "broken.pt")
    with pytest.raises(Exception, match=r"damaged: its latents' (mean|std) is .*, not 4 such numbers"):
        Checkpoint.open(tmp_path / "broken.pt")
