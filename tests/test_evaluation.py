"""FID while training: the number is right on any number of ranks, and training does not notice."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import assert_same_state, call, latest, metrics, without_timings
from sklearn.datasets import load_digits
from test_monitor import events

import train
from checkpoint.opened import Checkpoint
from data.autoencoder import load_space
from data.condition import Classes, draw
from evaluation.config import EvalConfig
from evaluation.during_training import FID
from evaluation.features import load_network
from evaluation.inception import load_inception
from evaluation.metrics import Statistics, frechet_distance
from runtime import distributed
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline, to_uint8
from training.config import RecipeConfig
from training.meter import Meter


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

    averages = ["--ema-decay", 0.5, "--more-ema-decays", 0, "--watch-average", "0.0"]
    assert call(train.main, *command, tmp_path / "averages", *measuring, *averages) == 0
    assert without_timings(tmp_path / "averages") == without_timings(tmp_path / "measured"), "a FID of the average named"

    # without it, then resumed with it: free to change, and no step stands twice
    assert call(train.main, *tiny, "--max-steps", 5, "--run-dir", tmp_path / "measured") == 0
    (tmp_path / "measured/checkpoints/0000005.pt").unlink()
    resumed = ["--eval-every", 5, *options(statistics_file, inception_file)]
    assert call(train.main, *tiny, "--max-steps", 6, "--run-dir", tmp_path / "measured", *resumed) == 0
    assert [row["step"] for row in metrics(tmp_path / "measured") if "fid" in row] == [2, 4, 5]


def test_the_distance_of_another_network_is_called_by_its_name(tmp_path, reference, inception_file, statistics_file):
    """In metrics.jsonl, TensorBoard and the log. It takes the reference's images, Inception the statistics of the file."""
    run, both = tmp_path / "run", tmp_path / "both.npz"
    with np.load(reference) as images, np.load(statistics_file) as statistics:
        np.savez(both, **images, **statistics)
    measuring = ["--eval-every", 2, *options(both, inception_file), "--eval-features", "efficientnet-lite0", "inception"]
    argv = [*TINY, "--max-steps", 2, "--run-dir", run, *measuring, "--report-to", "tensorboard"]
    assert call(train.main, *argv) == 0
    (row,) = [row for row in metrics(run) if "fid" in row]
    assert sorted(row) == ["fd_efficientnet-lite0", "fd_efficientnet-lite0_samples", "fid", "fid_samples", "step"]
    assert events(run)["fd_efficientnet-lite0", 2] == [pytest.approx(row["fd_efficientnet-lite0"], rel=1e-6)]
    line = f"FD of efficientnet-lite0: {row['fd_efficientnet-lite0']:.4f}, FID: {row['fid']:.4f} of 2 images"
    assert f"(step=0000002) {line}" in (run / "log.txt").read_text()
    assert latest(run)["args"]["eval_features"] == ["efficientnet-lite0", "inception"]
    moments = definition(run / "checkpoints/0000002.pt", reference, load_network("efficientnet-lite0"), 2)
    assert row["fd_efficientnet-lite0"] == pytest.approx(frechet_distance(*moments), rel=1e-4)


def make_fid(reference, weights, context, batch_size=2, signals=None, **changes):
    options = {"eval_samples": 4, "eval_cfg_scale": 1.5, "eval_sampler": "ddpm", "eval_sampling_steps": 2} | changes
    config = EvalConfig(eval_every=1, eval_reference=str(reference), inception_weights=str(weights), **options)
    return FID(config, fake_trainer(context, load_space("none", 1), (8, 8), batch_size), 8, signals)


def fake_trainer(context, space, sides, batch_size):
    model = SimpleNamespace(sizes=SimpleNamespace(sides=sides), objective="diffusion")
    parts = {"condition": Classes(10), "part_size": batch_size, "recipe": RecipeConfig()}
    return SimpleNamespace(context=context, space=space, model=model, **parts)


def measure(argv):
    """As a command, for `ranks`: FID of a checkpoint's average, into a file."""
    ckpt, reference, weights, output = argv
    context = distributed.setup("cpu")
    model = Checkpoint.open(ckpt).build_model()
    signals = SimpleNamespace(requested=context.rank == context.world_size - 1)
    fid = make_fid(reference, weights, context, signals=signals)
    assert "a stop was asked for" in fid.measure(model)
    signals.requested = False
    found = fid.measure(model)
    assert (found is None) == (not context.is_main)
    if context.is_main:
        Path(output).write_text(json.dumps(found["fid"]))
    distributed.close()


def definition(ckpt, reference, network, count):
    """Means and covariances of the reference and of `count` samples, each set in one batch."""
    model = Checkpoint.open(ckpt).build_model()
    pipeline = Pipeline(model, load_space("none", 1), SamplerConfig(num_sampling_steps=2), GuidanceConfig(cfg_scale=1.5))
    images = pipeline(draw(0, range(count), 10), *pipeline.noise(0, range(count)))
    with np.load(reference) as file:
        sets = torch.from_numpy(file["arr_0"]), torch.from_numpy(to_uint8(images))
    found = [network(x).pooled for x in sets]
    return [m for x in found for s in [Statistics(x.shape[1]).update(x)] for m in (s.mu, s.sigma)]


@pytest.fixture(scope="module")
def expected(tiny_checkpoint, reference, inception_file):
    """The same FID from the definition."""
    return frechet_distance(*definition(tiny_checkpoint, reference, load_inception(inception_file), 4))


def test_the_number_of_two_ranks_is_that_of_the_definition(
    tmp_path, tiny_checkpoint, reference, inception_file, ranks, expected
):
    files = [tiny_checkpoint, reference, inception_file, tmp_path / "fid.json"]
    run = ranks(measure, files, 2)
    assert run.wait() == [0, 0], run.text() + run.text(1)
    assert expected > 1e-3
    assert json.loads((tmp_path / "fid.json").read_text()) == pytest.approx(expected, rel=1e-3)


def test_training_finds_everything_as_it_was(tiny_checkpoint, statistics_file, inception_file):
    """torch's random state and its precision settings."""
    model = Checkpoint.open(tiny_checkpoint).build_model()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = False
    state = torch.get_rng_state()
    try:
        make_fid(statistics_file, inception_file, distributed.setup("cpu")).measure(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


def test_samples_that_are_not_finite_do_not_end_training(tmp_path, statistics_file, inception_file):
    measuring = ["--eval-every", 1, *options(statistics_file, inception_file), "--eval-cfg-scale", 1e38]
    assert call(train.main, *TINY, "--lr", 1, "--max-steps", 2, "--run-dir", tmp_path, *measuring) == 0
    line = "(step=0000002) FID: an image has values that are not finite: --eval-cfg-scale is too large"
    assert line in (tmp_path / "log.txt").read_text()


def test_images_are_drawn_in_batches_that_the_decoder_has_seen(statistics_file, inception_file):
    """From stored latents nothing was decoded before the first FID, perhaps after 50,000 steps."""
    seen = []
    space = SimpleNamespace(channels=4, factor=2, decode=lambda x: seen.append(x.shape))
    config = EvalConfig(eval_every=1, eval_reference=str(statistics_file), inception_weights=str(inception_file))
    fid = FID(config, fake_trainer(distributed.setup("cpu"), space, (4, 4), 1000), 8)
    assert (fid.batch_size, seen) == (32, [(32, 4, 4, 4)])


def test_all_of_its_options_may_change_when_a_run_resumes():
    assert EvalConfig().flat().keys() == EvalConfig.changeable()


def test_time_of_the_evaluation_is_no_training_time():
    meter = Meter(torch.device("cpu"))
    before = time.perf_counter() - meter.start
    with meter.paused():
        time.sleep(0.2)
    assert time.perf_counter() - meter.start - before < 0.1


def test_a_reference_that_does_not_fit_is_refused_before_a_run_folder_is_made(
    tmp_path, capfd, inception_file, statistics_file
):
    np.savez(tmp_path / "large.npz", np.zeros((4, 16, 16, 3), np.uint8))
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), np.uint8))
    for reference, features, words in (
        (
            statistics_file,
            "efficientnet-lite0",
            "mu and sigma are of the Inception network, efficientnet-lite0 needs images",
        ),
        (tmp_path / "large.npz", "inception", "16x16 pixels, the model draws 8x8"),
        (tmp_path / "one.npz", "inception", "neither mu and sigma nor 2 images"),
    ):
        known = ["--eval-every", 2, *options(reference, inception_file), "--eval-features", features]
        assert call(train.main, *TINY, "--max-steps", 2, "--run-dir", tmp_path / "run", *known) == 2
        error = capfd.readouterr().err
        assert words in error
        assert error.count("error:") == 1
        assert not (tmp_path / "run").exists()
