"""likelihood.py: likelihoods that are known in closed form, and the whole command on a tiny model."""

import json
import math
import os
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image
from reference import SMALL, normal, stub

from checkpoint.opened import Checkpoint
from data.condition import Vectors
from data.config import DataConfig
from data.images import load_dataset
from diffusion import create_diffusion
from evaluation import likelihood
from evaluation.config import LikelihoodConfig
from models import DiT
from tools import likelihood as command

X_0 = normal("x0", 5, 4, 8, 8).clamp(-2, 2) * 0.5


def test_the_bound_of_a_perfect_model_is_the_entropy_of_gaussian_data():
    """Data N(0, s^2) has p(x_{t-1} | x_t) in closed form. With it the bound is tight: the entropy of the 8-bit values."""
    diffusion, s2 = create_diffusion(""), 0.25**2
    levels = torch.from_numpy(np.random.default_rng(0).normal(0, 0.25, (64, 1, 8, 8))).float()
    x_0 = ((levels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    def exact(x_t, t):
        alpha_bar = diffusion.at("alphas_cumprod", t, x_t)
        variance = s2 * (1 - alpha_bar) / (alpha_bar * s2 + 1 - alpha_bar)  # of x_0 given x_t
        eps = (1 - alpha_bar).sqrt() * x_t / (alpha_bar * s2 + 1 - alpha_bar)
        step = diffusion.at("posterior_variance", t, x_t) + diffusion.at("posterior_mean_coef1", t, x_t) ** 2 * variance
        low, high = diffusion.at("posterior_log_variance_clipped", t, x_t), diffusion.at("log_betas", t, x_t)
        fraction = 2 * (step.log() - low) / (high - low) - 1
        return torch.cat([eps, fraction.expand_as(x_t)], dim=1)

    rows = likelihood.bound(diffusion, exact, x_0, seed=0, indices=range(64))
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s2) + math.log2(127.5)  # of a density, in bins of width 2 / 255
    error = rows.sum(1).std().item() / 8
    assert error < 0.05
    assert rows.sum(1).mean().item() == pytest.approx(entropy, abs=3 * error)


def test_the_density_of_a_perfect_flow_is_the_entropy_of_gaussian_data():
    """The same data, whose 256 levels the uniform noise makes continuous."""
    s2 = 0.25**2
    levels = torch.from_numpy(np.random.default_rng(0).normal(0, 0.25, (64, 1, 8, 8))).float()
    x_0 = ((levels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    def exact(x, t):
        s = t / 1000
        return (s - (1 - s) * s2) * x / ((1 - s) ** 2 * s2 + s**2)

    rows = likelihood.flow_terms(40, exact, x_0, seed=0, indices=range(64))
    assert rows.shape == (64, 41)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s2) + math.log2(127.5)
    assert rows.sum(1).mean().item() == pytest.approx(entropy, abs=3 * rows.sum(1).std().item() / 8)
    alone = likelihood.flow_terms(40, exact, x_0[5:6], seed=0, indices=[5])
    torch.testing.assert_close(alone, rows[5:6], msg="an image's noise and probe are its own")


def test_rows_are_the_terms_of_the_diffusion_in_ascending_order():
    diffusion, model = create_diffusion("7"), stub(True)
    draws = {}

    def note(x, i):
        draws[i] = torch.randn_like(x)
        return draws[i]

    expected = diffusion.calc_bpd_loop(model, X_0, step_noise=note)
    assert list(draws) == list(range(6, -1, -1))
    torch.manual_seed(0)
    plain = diffusion.calc_bpd_loop(model, X_0)
    torch.manual_seed(0)
    assert torch.equal(plain["vb"], diffusion.calc_bpd_loop(model, X_0, step_noise=note)["vb"]), "torch's own stream"
    rows = likelihood.bound(diffusion, model, X_0, 0, range(len(X_0)))
    assert rows.shape == (len(X_0), 8)
    torch.testing.assert_close(rows[:, -1], expected["prior_bpd"].double())
    assert (rows[:, 0] / expected["vb"][:, -1] - 1).abs().max() < 0.2, "the decoder's term comes first"
    alone = likelihood.bound(diffusion, model, X_0[1:2], 0, [1])
    torch.testing.assert_close(alone, rows[1:2], msg="an image's noise is its own")


def options(ckpt, output, *extra):
    return ["--ckpt", ckpt, "--data-path", "digits", "--num-images", 7, "--num-timesteps", 6, "--device", "cpu",
            "--output", output, *extra]  # fmt: skip


def report(path):
    values = json.loads(path.read_text())
    return {name: values[name] for name in ("total", "prior", "terms")}, values["settings"]


@pytest.fixture(scope="module")
def measured(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("likelihood") / "report.json"
    assert call(command.main, *options(tiny_checkpoint, path, "--batch-size", 3)) == 0
    return path


def test_the_report_adds_up_and_has_its_plot(measured):
    found, settings = report(measured)
    terms = found["terms"]
    assert terms["timestep"] == [0, 200, 400, 599, 799, 999]
    assert len(terms["mean"]) == len(terms["standard_error"]) == 6
    assert found["total"]["mean"] == pytest.approx(sum(terms["mean"]) + found["prior"]["mean"])
    assert 0 < found["total"]["standard_error"] < found["total"]["mean"] < 100
    assert 0 <= found["prior"]["mean"] < 1e-3
    assert settings["checkpoint_step"] == 4
    with Image.open(measured.with_suffix(".png")) as image:
        assert image.width > 400


def test_a_flow_has_a_likelihood_too(tmp_path, capsys):
    flow = {"objective": "flow", "predict": "v", "learn_sigma": False, "in_channels": 1, "num_classes": 10, "input_size": 8}
    model = DiT(**{**SMALL, **flow})
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    state = {"model": model.state_dict(), "model_config": model.config, "args": {"vae": "none", "image_size": 8}}
    torch.save(state, tmp_path / "flow.pt")
    for batch in (3, 7):
        output = tmp_path / f"{batch}.json"
        assert call(command.main, *options(tmp_path / "flow.pt", output, "--batch-size", batch)) == 0
        assert "change of volume" in capsys.readouterr().out
    found, settings = report(tmp_path / "3.json")
    assert settings["objective"] == "flow"
    assert found["terms"]["timestep"] == pytest.approx([1000 * (i / 6) ** 2 for i in range(1, 7)])
    assert found["total"]["mean"] == pytest.approx(sum(found["terms"]["mean"]) + found["prior"]["mean"])
    assert found["total"]["mean"] == pytest.approx(report(tmp_path / "7.json")[0]["total"]["mean"], rel=1e-5)
    assert (tmp_path / "3.png").is_file()


@pytest.mark.parametrize(("batch", "world_size"), [(3, 2), (7, 1)])
def test_numbers_do_not_depend_on_processes_and_batches(measured, tiny_checkpoint, tmp_path, ranks, batch, world_size):
    argv = options(tiny_checkpoint, tmp_path / "report.json", "--batch-size", batch)
    run = ranks(command.main, argv, world_size)
    assert run.wait() == [0] * world_size, run.text()
    found, expected = report(tmp_path / "report.json")[0], report(measured)[0]
    if batch == 3:
        assert found == expected, "the same batches on more processes: the same bits"
    for part in found:
        assert found[part]["mean"] == pytest.approx(expected[part]["mean"], rel=1e-5)
    assert run.text().count("bits per dimension") == 1


def test_more_images_add_to_fewer():
    assert likelihood.choose(100, 20, seed=0)[:7] == likelihood.choose(100, 7, seed=0)
    assert sorted(likelihood.choose(5, 1000, seed=1)) == list(range(5))


def save_model(path, names=None, **config):
    model = DiT(**{**SMALL, **config})
    options = {"vae": "none", "image_size": model.input_size, "num_heads": SMALL["num_heads"], "class_names": names}
    torch.save({"model": model.state_dict(), "args": options}, path)
    return path


def pictures(folder, names):
    for name in names:
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (40 * i, 80, len(name))).save(folder / name / f"{i}.png")
    return folder


def refused(capfd, *argv):
    assert call(command.main, *argv, "--device", "cpu") == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len([line for line in lines if "error:" in line]) == 1
    assert "Traceback" not in "".join(lines)
    return lines[-1]


def class_numbers(ckpt, folder):
    data = DataConfig(data_path=str(folder))
    return Checkpoint.open(ckpt).condition.for_data(load_dataset(data, 8), data).numbers


@pytest.mark.parametrize(
    "names", [["n01440764", "n01494475", "n03482128"], ["tench", "hammerhead (n01494475)", "hammerhead (n03482128)"]]
)
def test_classes_of_imagenet_go_by_number_or_by_word(tmp_path, names):
    """Of two classes with the same name, a folder may hold one alone: it is then the only hammerhead there."""
    ckpt = save_model(tmp_path / "a.pt", names, in_channels=3, num_classes=3, input_size=8)
    assert class_numbers(ckpt, pictures(tmp_path / "all", ["n01440764", "n01494475", "n03482128"])) == [0, 1, 2]
    assert class_numbers(ckpt, pictures(tmp_path / "one", ["n03482128"])) == [2]


def test_classes_go_by_name_where_names_are_recorded(capfd, tmp_path):
    ckpt = save_model(tmp_path / "a.pt", ["ant", "bee", "cat"], in_channels=3, num_classes=3, input_size=8)
    folder = pictures(tmp_path / "some", ["bee", "cat"])
    assert class_numbers(ckpt, folder) == [1, 2]
    folder = pictures(tmp_path / "other", ["bee", "dog"])
    assert 'class "dog" is not one of the model\'s' in refused(capfd, "--ckpt", ckpt, "--data-path", folder)
    ckpt = save_model(tmp_path / "b.pt", None, in_channels=3, num_classes=3, input_size=8)
    assert "2 classes" in refused(capfd, "--ckpt", ckpt, "--data-path", folder)


def test_weights_without_a_record_need_the_options(capfd, tmp_path, tiny_checkpoint):
    state = torch.load(tiny_checkpoint)
    torch.save({"model": state["ema"], "args": {"num_heads": 2}}, tmp_path / "bare.pt")
    known = "--ckpt", tmp_path / "bare.pt", "--data-path", "digits"
    assert "but records no --vae; if it works on pixels, pass --vae none" in refused(capfd, *known)
    assert call(command.main, *known, "--vae", "none", "--num-timesteps", 2, "--num-images", 2, "--device", "cpu") == 0
    assert (tmp_path / "bare.likelihood.json").is_file()
    of_a_run = LikelihoodConfig(ckpt=str(tmp_path), data_path="digits")
    assert of_a_run.report == tmp_path / "likelihood.json", "not in the current folder"
    assert (tmp_path / "bare.likelihood.png").is_file()


def test_outputs_are_checked_before_anything_slow(capfd, tmp_path, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr(likelihood, "open_checkpoint", None)  # using it would raise
    (tmp_path / "a.png").mkdir()
    known = "--ckpt", tiny_checkpoint, "--data-path", "digits", "--output"
    assert "a.png: is a folder" in refused(capfd, *known, tmp_path / "a.json")


def test_a_full_disk_and_ctrl_c_end_with_one_line(capfd, tmp_path, monkeypatch, tiny_checkpoint):
    argv = options(tiny_checkpoint, tmp_path / "a.json")
    with monkeypatch.context() as patch:
        patch.setattr(likelihood.files, "replace_file", mock.Mock(side_effect=OSError(28, "No space left on device")))
        assert call(command.main, *argv) == 1
    out, err = capfd.readouterr()
    assert "bits per dimension" in out, "the numbers are not lost"
    assert "a.json: cannot be written (No space left on device)" in err.splitlines()[-1]
    monkeypatch.setattr(likelihood, "bound", mock.Mock(side_effect=KeyboardInterrupt))
    assert call(command.main, *argv) == 130
    assert capfd.readouterr().err.splitlines()[-1].endswith("error: interrupted")


def test_a_bound_that_is_not_finite_is_no_result(capfd, tmp_path, tiny_checkpoint):
    state = torch.load(tiny_checkpoint)
    state["ema"]["final_layer.linear.weight"].fill_(1e38)
    torch.save(state, tmp_path / "a.pt")
    assert call(command.main, *options(tmp_path / "a.pt", tmp_path / "a.json")) == 1
    assert "a.pt: the likelihood is not finite" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "a.json").exists()


def test_a_damaged_image_is_named_once_on_every_rank(tmp_path, ranks):
    ckpt = save_model(tmp_path / "a.pt", ["ant"], in_channels=3, num_classes=1, input_size=8)
    folder = pictures(tmp_path / "images", ["ant"])
    (folder / "ant/1.png").write_bytes(b"\x89PNG")
    argv = ["--ckpt", ckpt, "--data-path", folder, "--num-timesteps", 2, "--batch-size", 1, "--device", "cpu"]
    run = ranks(command.main, argv, 2)
    assert run.wait() == [2, 2]
    assert "1.png: not a readable image" in run.text(0)
    assert "skip-bad-images" not in run.text(0), "this command has no such option"
    assert run.text(1) == ""


def test_an_error_of_one_process_ends_all_with_one_line(tmp_path, ranks):
    """Such as of a file system that shows the checkpoint to one host alone."""
    ckpt = save_model(tmp_path / "a.pt", None, in_channels=1, num_classes=10, input_size=8)
    run = ranks(of_one_rank, options(ckpt, tmp_path / "a.json"), 2)
    assert run.wait() == [2, 2], run.text() + run.text(1)
    assert [run.text(rank).count("gone.pt: no such file") for rank in (0, 1)] == [1, 0]


def of_one_rank(argv):
    if os.environ["RANK"] == "1":
        argv[argv.index("--ckpt") + 1] = "gone.pt"
    command.main(argv)


def test_a_model_of_vectors_has_a_likelihood_that_depends_on_them(tmp_path):
    condition = Vectors(2)
    model = DiT(**{**SMALL, "in_channels": 3, "input_size": 8, "num_classes": 0}, condition=condition)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    record = {"kind": "vector", **condition.record()}
    options_of_run = {"vae": "none", "image_size": 8, "num_heads": SMALL["num_heads"]}
    state = {"model": model.state_dict(), "model_config": model.config, "condition": record, "args": options_of_run}
    torch.save(state, tmp_path / "a.pt")
    folder, totals = pictures(tmp_path / "images", ["ant"]), []
    for scale in (0, 1):
        np.save(folder / "vectors.npy", np.full((2, 2), scale, np.float32))
        argv = ["--ckpt", tmp_path / "a.pt", "--data-path", folder, "--num-timesteps", 4, "--device", "cpu"]
        assert call(command.main, *argv) == 0
        totals.append(report(tmp_path / "a.likelihood.json")[0]["total"]["mean"])
    assert totals[0] != totals[1]
