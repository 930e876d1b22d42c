"""tools/sweep.py as a whole: images that differ by the setting alone, rows that are kept, and what is said of the best."""

import json
import shlex
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import call
from PIL import Image
from reference import fill
from sklearn.datasets import load_digits

import evaluate
import sample
import sample_ddp
from checkpoint import files
from checkpoint.opened import Checkpoint
from diffusion.registry import SAMPLERS
from evaluation import sweep as sweep_module
from evaluation.config import SweepConfig
from evaluation.features import NETWORKS, FeatureNetwork, Outputs
from evaluation.sweep import describe_best, settings
from models import DiT
from sampling.config import SampleSetConfig
from tools import sweep

seen = []  # batches of images that the network below was given


class Cells(FeatureNetwork):
    """Mean colours of 2x2 cells, which take no time."""

    side = 2

    def outputs(self, images):
        seen.append(images.numpy().copy())
        pooled = F.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, self.side).flatten(1)
        return Outputs(pooled, logits=pooled[:, :4])


class Finer(Cells):
    preprocessing, side = "4x4", 4


@pytest.fixture(autouse=True)
def cells(monkeypatch):
    monkeypatch.setitem(NETWORKS, "cells", Cells)
    monkeypatch.setitem(NETWORKS, "finer", Finer)
    seen.clear()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "digits.npz"
    np.savez(path, np.round(load_digits().images[:40, :, :, None] * (255 / 16)).astype(np.uint8).repeat(3, axis=3))
    return path


@pytest.fixture(scope="module")
def lively(tiny_checkpoint, tmp_path_factory):
    """A checkpoint whose predictions are far from zero, and whose average is not its last weights."""
    state = torch.load(tiny_checkpoint, weights_only=True)
    weights = fill(DiT(**Checkpoint(state).model_config)).state_dict()
    scaled = {"ema": {key: 0.5 * value for key, value in weights.items()}}
    scaled["model"] = {key: 0.8 * value for key, value in scaled["ema"].items()}
    path = tmp_path_factory.mktemp("lively") / "lively.pt"
    files.save(path, {**state, **scaled})
    return path


SHORT = "--num-fid-samples 22 --per-proc-batch-size 4 --sampler ddim --num-sampling-steps 3 --resamples 2 --device cpu"


def command(ckpt, reference, folder, *extra):
    return ["--ckpt", ckpt, "--ref", reference, "--output", folder, "--features", "cells", *SHORT.split(), *extra]


def results(folder):
    return json.loads((folder / "results.json").read_text())


def numbers(rows):
    return [(row["made_with"], row["networks"]) for row in rows]


def test_each_setting_is_what_its_command_draws_and_evaluate_measures(lively, reference, tmp_path, monkeypatch, capsys):
    """The same images as of sample_ddp.py, byte for byte: so settings share their noise and their labels. Nothing but the
    table and the curves is written."""
    folder, names = tmp_path / "sweep", [*Checkpoint.open(lively).averages]
    options = ["--cfg-scale", 1, 3, "--average", *names, "--eta", 0.5]
    assert call(sweep.main, *command(lively, reference, folder, *options)) == 0
    out, rows = capsys.readouterr().out, results(folder)
    images = np.concatenate(seen[1:]).reshape(4, 22, 8, 8, 3)  # the first batch is the reference
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "curves.png", "results.json"]
    assert Image.open(folder / "curves.png").size[0] > 1000
    assert len({image.tobytes() for image in images}) == 4, "every setting has images of its own"
    assert [(row["made_with"]["average"], row["made_with"]["cfg_scale"]) for row in rows] == [
        (name, scale) for name in names for scale in (1, 3)
    ]
    monkeypatch.chdir(tmp_path)
    python, script, *words = shlex.split(out.splitlines()[-2])
    assert (python, script) == ("python", "sample.py")
    assert call(sample.main, *words) == 0
    assert (tmp_path / "sample.png").exists()
    for row, drawn in zip(rows, images, strict=True):
        assert row["command"] in out or row is not min(rows, key=lambda row: row["networks"]["cells"]["fd"])
        python, script, *words = shlex.split(row["command"])
        assert (python, script) == ("python", "sample_ddp.py")
        assert call(sample_ddp.main, *words, "--folder", "set") == 0
        with np.load("samples/set.npz") as file:
            assert np.array_equal(file["arr_0"], drawn)
        measuring = ["--features", "cells", "--resamples", 2, "--device", "cpu"]
        assert call(evaluate.main, reference, "samples/set.npz", *measuring) == 0
        found = json.loads((tmp_path / "samples/set.npz.metrics.json").read_text())["networks"]["cells"]
        assert row["networks"]["cells"] == {name: found[name] for name in row["networks"]["cells"]}
        for path in (tmp_path / "samples").rglob("*.*"):
            path.unlink()


def test_two_processes_find_the_numbers_of_one(lively, reference, tmp_path, ranks):
    """Ranks draw whole batches: 22 images in batches of 4 are 6, and half of them are 11 images. Two networks see them."""
    argv = ["--cfg-scale", 1, 2, "--guidance-interval", 0, 1, 0.2, 0.8, "--features", "cells", "finer"]
    assert call(sweep.main, *command(lively, reference, tmp_path / "one", *argv)) == 0
    run = ranks(sweep.main, command(lively, reference, tmp_path / "two", *argv), 2)
    assert run.wait() == [0, 0], run.text() + run.text(1)
    assert numbers(results(tmp_path / "two")) == numbers(results(tmp_path / "one"))
    rows = results(tmp_path / "one")
    assert len(rows) == 3, "without guidance the interval does not count"
    assert all(row["networks"]["finer"]["fd"] > row["networks"]["cells"]["fd"] > 0 for row in rows)
    assert run.text().count("Best FD of") == 2


def test_an_interrupted_sweep_measures_only_what_it_lacks(lively, reference, tmp_path, monkeypatch, capsys):
    argv = command(lively, reference, tmp_path / "a", "--cfg-scale", 1, 2, 3)
    assert call(sweep.main, *argv) == 0
    undisturbed, table = results(tmp_path / "a"), capsys.readouterr().out
    measure, calls = sweep_module.measure, []

    def stopped(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(sweep_module, "measure", stopped)
    argv[argv.index(tmp_path / "a")] = tmp_path / "b"
    assert call(sweep.main, *argv) == 130
    assert numbers(results(tmp_path / "b")) == numbers(undisturbed)[:1]
    monkeypatch.undo()
    monkeypatch.setitem(NETWORKS, "cells", Cells)
    seen.clear()
    assert call(sweep.main, *argv) == 0
    assert sum(map(len, seen)) == 40 + 2 * 22, "the reference and two settings"
    assert numbers(results(tmp_path / "b")) == numbers(undisturbed)
    seen.clear()
    capsys.readouterr()
    assert call(sweep.main, *command(lively, reference, tmp_path / "a", "--cfg-scale", 1, 2, 3)) == 0
    assert (seen, capsys.readouterr().out) == ([], table), "nothing is left to do"


def test_rows_of_another_checkpoint_or_reference_are_not_taken(lively, reference, tmp_path):
    assert call(sweep.main, *command(lively, reference, tmp_path / "sweep")) == 0
    state = torch.load(lively, weights_only=True)
    state["ema"]["final_layer.linear.bias"] += 1
    (tmp_path / "other").mkdir()
    files.save(tmp_path / "other/lively.pt", state)
    with np.load(reference) as file:
        np.savez(tmp_path / "digits.npz", file["arr_0"][:30])
    for ckpt, images in ((tmp_path / "other/lively.pt", reference), (lively, tmp_path / "digits.npz")):
        assert call(sweep.main, *command(ckpt, images, tmp_path / "sweep")) == 0
    rows = results(tmp_path / "sweep")
    assert len(rows) == len({json.dumps(row["networks"]) for row in rows}) == 3


def test_every_option_of_the_samplers_takes_a_list(reference):
    """Each combination is a SampleSetConfig; pairs come one after the other."""
    lists = {"cfg_scale": (2.0, 3.0), "guidance_interval": (0.0, 0.5, 0.2, 0.8), "sampler": tuple(SAMPLERS)[:2]}
    found = settings(SweepConfig.from_flat({"ref": str(reference), "num_sampling_steps": [5], "labels": ["1"], **lists}))
    assert [(s.sampler.sampler, s.guidance.cfg_scale, s.guidance.guidance_interval) for _, s in found] == [
        (sampler, scale, interval)
        for sampler in lists["sampler"]
        for scale in lists["cfg_scale"]
        for interval in ((0.0, 0.5), (0.2, 0.8))
    ]
    assert {(s.labels, s.sampler.num_sampling_steps, type(s)) for _, s in found} == {(("1",), 5, SampleSetConfig)}


def test_the_best_is_named_with_what_cannot_be_told_from_it():
    scales = [SampleSetConfig.from_flat({"ckpt": "a b.pt", "cfg_scale": scale}) for scale in (2.0, 3.0, 4.0, 5.0)]
    found = {
        setting: {"networks": {"net": {"fd": fd, "standard_errors": {"fd": error}}}}
        for setting, fd, error in zip(scales, (10.0, 9.0, 9.9, 20.0), (0.4, 0.2, 0.5, 1.0), strict=True)
    }
    text = describe_best("net", found, {setting: setting.flat() for setting in scales}, ["cfg_scale"])
    assert text.splitlines() == [
        "Best FD of net: 9.000 +- 0.200, --cfg-scale 3.0; 1 of 3 others within two standard errors",
        "    python sample_ddp.py --ckpt 'a b.pt' --cfg-scale 3.0",
        "    python sample.py --ckpt 'a b.pt' --cfg-scale 3.0",
    ]
    alone = {scales[1]: found[scales[1]]}
    text = describe_best("net", alone, {scales[1]: scales[1].flat()}, [])
    assert text.startswith("Best FD of net: 9.000 +- 0.200, the only setting\n")


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        (["--ref", "large.npz"], "large.npz: 16x16 pixels, the model draws 8x8"),
        (["--ref", "statistics.npz"], "its mu and sigma are of the Inception network, cells needs images"),
        (["--output", "damaged"], "results.json: damaged; delete it, or choose another --output"),
        (["--output", "large.npz"], "it is not a folder"),
    ],
)
def test_mistakes_get_one_line_before_anything_is_drawn(lively, reference, tmp_path, monkeypatch, capfd, extra, what):
    monkeypatch.chdir(tmp_path)
    np.savez("large.npz", np.zeros((4, 16, 16, 3), np.uint8))
    np.savez("statistics.npz", mu=np.zeros(2048), sigma=np.zeros((2048, 2048)))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/results.json").write_text("[{}]")
    assert call(sweep.main, *command(lively, reference, tmp_path / "sweep"), *extra) == 2
    captured = capfd.readouterr()
    assert what in captured.err.strip().splitlines()[-1]
    assert "Traceback" not in captured.err
    assert not seen


def test_a_full_disk_is_one_line(lively, reference, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sweep_module.files, "write_json", mock.Mock(side_effect=OSError(28, "No space left on device")))
    assert call(sweep.main, *command(lively, reference, tmp_path)) == 1
    line = "results.json: cannot be written (No space left on device); the rows so far are kept"
    assert line in capfd.readouterr().err.strip().splitlines()[-1]
