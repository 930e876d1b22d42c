"""FID while training: the number is right on any number of ranks, and training does not notice."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, call
from sklearn.datasets import load_digits
from test_cli_train import assert_same_state, latest, metrics, without_timings

import train
from checkpoint import files as checkpoint
from data import autoencoder as latents
from evaluation import during_training as evaluation
from evaluation.inception import load_inception
from evaluation.metrics import Statistics, frechet_distance
from models import DiT
from runtime import distributed
from sampling import pipeline as sampling
from training.watch import Progress

SETTINGS = {"eval_samples": 4, "eval_cfg_scale": 1.5, "eval_sampling_steps": 2, "global_seed": 0, "num_classes": 10,
            "image_size": 8}  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The first few digits as .npz, in grey levels of all three channels."""
    digits = np.round(load_digits().images[:4, :, :, None] * (255 / 16)).astype(np.uint8).repeat(3, axis=3)
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    np.savez(path, digits)
    return path


@pytest.fixture(scope="module")
def statistics_file(tmp_path_factory):
    """Mean and covariance alone, of low rank, which is quick to compare with."""
    path = tmp_path_factory.mktemp("statistics") / "statistics.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.diag((np.arange(2048) < 4).astype(float)))
    return path


def options(reference, inception_file):
    return ["--eval-reference", reference, "--inception-weights", inception_file, "--eval-samples", 2,
            "--eval-sampling-steps", 2, "--eval-cfg-scale", 1.5]  # fmt: skip


def test_training_is_bit_for_bit_the_same_with_it(tmp_path, statistics_file, inception_file):
    tiny = [*TINY, "--lr", 0.1, "--ema-decay", 0]  # the average has to move in four steps
    command = [*tiny, "--max-steps", 4, "--run-dir"]
    measuring = ["--eval-every", 2, *options(statistics_file, inception_file)]
    assert call(train.main, *command, tmp_path / "plain") == 0
    assert call(train.main, *command, tmp_path / "measured", *measuring) == 0
    assert_same_state(latest(tmp_path / "measured"), latest(tmp_path / "plain"))
    rows = without_timings(tmp_path / "measured")
    assert [row for row in rows if "loss" in row] == without_timings(tmp_path / "plain")
    rows = [row for row in rows if "fid" in row]
    assert [(row["step"], row["fid_samples"], sorted(row)) for row in rows] == [
        (step, 2, ["fid", "fid_samples", "step"]) for step in (2, 4)
    ]
    assert rows[0]["fid"] != rows[1]["fid"]
    assert f"(step=0000004) FID: {rows[1]['fid']:.4f} of 2 images" in (tmp_path / "measured/log.txt").read_text()

    # without it, then resumed with it: free to change, and no step stands twice
    assert call(train.main, *tiny, "--max-steps", 5, "--run-dir", tmp_path / "measured") == 0
    (tmp_path / "measured/checkpoints/0000005.pt").unlink()
    resumed = ["--eval-every", 5, *options(statistics_file, inception_file)]
    assert call(train.main, *tiny, "--max-steps", 6, "--run-dir", tmp_path / "measured", *resumed) == 0
    assert [row["step"] for row in metrics(tmp_path / "measured") if "fid" in row] == [2, 4, 5]


def measure(argv):
    """As a command, for `ranks`: FID of a checkpoint's average, into a file."""
    ckpt, reference, weights, output = argv
    context = distributed.setup("cpu")
    state = checkpoint.load(ckpt)
    model = DiT(**checkpoint.model_config(state)).eval()
    model.load_state_dict(checkpoint.weights(state))
    args = SimpleNamespace(eval_reference=reference, inception_weights=weights, global_batch_size=2, **SETTINGS)
    evaluator = evaluation.Evaluator(args, context, latents.load("none", 1))
    assert evaluator(model, SimpleNamespace(requested=context.rank == context.world_size - 1)) is None, "a stop ends it"
    fid = evaluator(model)
    assert (fid is None) == (not context.is_main)
    if context.is_main:
        Path(output).write_text(json.dumps(fid))
    distributed.close()


@pytest.fixture(scope="module")
def expected(tiny_checkpoint, reference, inception_file):
    """The same FID from the definition, in one batch."""
    state = checkpoint.load(tiny_checkpoint)
    model = DiT(**checkpoint.model_config(state)).eval()
    model.load_state_dict(checkpoint.weights(state))
    noise = sampling.image_noise(0, range(4), 2, (1, 8, 8))
    y = torch.tensor([sampling.image_label(0, i, 10) for i in range(4)])
    with torch.no_grad():
        images = sampling.draw(model, latents.load("none", 1), y, noise, 1.5, 2)
    network = load_inception(inception_file)
    with np.load(reference) as file:
        sets = torch.from_numpy(file["arr_0"]), torch.from_numpy(sampling.to_uint8(images))
    moments = [m for x in sets for s in [Statistics(2048).update(network(x)[0])] for m in (s.mu, s.sigma)]
    return frechet_distance(*moments)


def test_the_number_of_two_ranks_is_that_of_the_definition(
    tmp_path, tiny_checkpoint, reference, inception_file, ranks, expected
):
    files = [tiny_checkpoint, reference, inception_file, tmp_path / "fid.json"]
    run = ranks(measure, files, 2)
    assert run.wait() == [0, 0], run.text() + run.text(1)
    assert expected > 1e-3
    assert json.loads((tmp_path / "fid.json").read_text()) == pytest.approx(expected, rel=1e-3)


def test_time_of_the_evaluation_is_no_training_time():
    progress = Progress(torch.device("cpu"))
    before = time.perf_counter() - progress.start
    with progress.paused():
        time.sleep(0.2)
    assert time.perf_counter() - progress.start - before < 0.1


def test_mistakes_are_refused_before_a_run_folder_is_made(tmp_path, capfd, reference, inception_file):
    run = tmp_path / "run"

    def refused(*extra):
        assert call(train.main, *TINY, "--max-steps", 2, "--run-dir", run, *extra) == 2
        captured = capfd.readouterr()
        (line,) = [line for line in captured.err.splitlines() if "error:" in line]
        assert "Traceback" not in captured.err
        assert not run.exists()
        return line

    every = "--eval-every", 2
    known = *every, *options(reference, inception_file)
    assert "both are needed" in refused(*every)
    assert "both are needed" in refused("--eval-reference", reference)
    assert "none.npz: no such file" in refused(*every, "--eval-reference", tmp_path / "none.npz")
    assert "none.pth: no such file" in refused(*known, "--inception-weights", tmp_path / "none.pth")
    assert "not the weights" in refused(*known, "--inception-weights", reference)
    assert "1 is not a whole number, 2 or more" in refused(*known, "--eval-samples", 1)
    assert "null labels" in refused(*known, "--label-dropout", 0)
    np.savez(tmp_path / "large.npz", np.zeros((4, 16, 16, 3), np.uint8))
    assert "16x16 pixels, --image-size is 8" in refused(*known, "--eval-reference", tmp_path / "large.npz")
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    assert "neither mu and sigma nor 2 images" in refused(*known, "--eval-reference", tmp_path / "one.npz")
