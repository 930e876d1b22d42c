"""Watching a run: grids of samples, the loss on held-out images, trackers, and the numbers of the progress bar."""

import importlib.util
import json
import os
import re
import shutil
import signal
import struct
import time
from unittest import mock

import numpy as np
import pytest
import sklearn.datasets
import torch
from conftest import TINY
from helpers import assert_same_state, call, latest, metrics, wait_for, without_timings
from PIL import Image

import train
from checkpoint import files
from data.condition import Classes
from diffusion.registry import OBJECTIVES
from tools import plot
from training import watchers
from training.cost import build, forward_macs, peak_tflops
from training.run import postfix
from training.watchers import Validation, choose_sampler, num_columns

LEARNS = [*TINY, "--lr", 0.01, "--ema-warmup"]  # fast enough to be seen in six steps
WATCHED = ["--sample-every", 3, "--val-data-path", "digits", "--val-every", 2]


def events(folder):
    """{(tag, step): values} of a run's TensorBoard files, each read to its end; options and pictures too."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    found = {}
    for path in sorted((folder / "tensorboard").glob("events.*")):
        for event in loader.EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                number = value.tensor.float_val[0] if len(value.tensor.float_val) else None
                found.setdefault((value.tag, event.step), []).append(number)
    return found


def assert_follows_metrics(folder):
    """The event files hold every number of metrics.jsonl once, every grid once, and nothing else."""
    found = events(folder)
    rows = {
        (name, row["step"]): v for row in metrics(folder) for name, v in row.items() if name != "step" and v is not None
    }
    grids = {("samples", int(path.stem)) for path in (folder / "samples").glob("*.png")}
    assert found.keys() == rows.keys() | grids | {("options/text_summary", 0)}
    assert all(len(values) == 1 for values in found.values()), "a step is there twice"
    for key, value in rows.items():
        assert found[key][0] == pytest.approx(value, rel=1e-6), key


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """The folder of a run of six steps with grids, validation and, where it is installed, TensorBoard."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    trackers = ["--report-to", "tensorboard"] if importlib.util.find_spec("tensorboard") else []
    assert call(train.main, *LEARNS, "--max-steps", 6, "--run-dir", folder, *WATCHED, *trackers) == 0
    return folder


def test_training_is_bit_for_bit_the_same_with_and_without(watched, tmp_path):
    assert call(train.main, *LEARNS, "--max-steps", 6, "--run-dir", tmp_path / "bare") == 0
    assert_same_state(latest(watched), latest(tmp_path / "bare"))
    training_rows = [row for row in without_timings(watched) if "val_loss" not in row]
    assert training_rows == without_timings(tmp_path / "bare")


def test_the_average_that_is_watched_can_be_chosen(watched, tmp_path):
    """A decay of 0 keeps the trained weights: the validation's own, and those of a run that averages so alone."""
    short = [*LEARNS, "--max-steps", 3, *WATCHED]
    assert call(train.main, *short, "--more-ema-decays", 0, "--watch-average", "0.0", "--run-dir", tmp_path / "0") == 0
    assert call(train.main, *short, "--ema-decay", 0, "--run-dir", tmp_path / "alone") == 0
    assert without_timings(tmp_path / "0") == without_timings(tmp_path / "alone")
    grids = [(folder / "samples/0000003.png").read_bytes() for folder in (tmp_path / "0", tmp_path / "alone", watched)]
    assert grids[0] == grids[1] != grids[2]
    assert call(train.main, *short, "--watch-average", "0.9999", "--run-dir", tmp_path / "averaged") == 0
    averaged, trained = (metrics(tmp_path / name)[1]["val_loss"] for name in ("averaged", "0"))
    assert averaged != trained


def test_grids_and_animation(watched, tmp_path):
    grids = [Image.open(watched / f"samples/000000{step}.png") for step in (3, 6)]
    assert sorted(path.name for path in (watched / "samples").iterdir()) == ["0000003.png", "0000006.png"]
    assert grids[0].size == grids[1].size == (5 * 66 + 2, 2 * (64 + 22) + 2)  # ten classes, enlarged to 64 pixels
    assert np.any(np.asarray(grids[0]) != np.asarray(grids[1]))
    both = ["--animate", tmp_path / "again.gif", "--output", tmp_path / "curves.svg"]
    assert call(plot.main, watched, *both) == 0
    assert (tmp_path / "curves.svg").exists()
    for path in (watched / "samples.gif", tmp_path / "again.gif"):
        with Image.open(path) as gif:
            assert (gif.n_frames, gif.size) == (2, (grids[0].width, grids[0].height + 20))


def test_grids_and_validation_do_not_depend_on_the_number_of_processes(watched, tmp_path, ranks):
    two = ranks(train.main, [*TINY, "--max-steps", 2, "--run-dir", tmp_path / "two", *WATCHED, "--sample-every", 2], 2)
    assert two.wait() == [0, 0], two.text()
    one = [*TINY, "--max-steps", 2, "--run-dir", tmp_path / "one", *WATCHED, "--sample-every", 2]
    assert call(train.main, *one) == 0
    left, right = (np.asarray(Image.open(tmp_path / name / "samples/0000002.png")).astype(int) for name in ("one", "two"))
    assert left.shape == right.shape
    # the two trained with other noise, so their models differ a little, and so do the grids; a misplaced image would a lot
    assert np.abs(left - right).mean() < 2
    left, right = (metrics(tmp_path / name)[-1] for name in ("one", "two"))
    assert left.keys() == right.keys() == {"step", "val_loss", *(f"val_loss_t_{n}_{n + 249}" for n in range(0, 1000, 250))}
    for name, value in left.items():
        assert value == pytest.approx(right[name], rel=0.02), name


def test_validation_is_the_mean_of_its_ranges_and_has_the_same_noise_each_time(tmp_path):
    arguments = [*TINY, "--lr", 1e-30, "--max-steps", 2, "--run-dir", tmp_path / "run"]  # weights that do not change
    assert call(train.main, *arguments, "--val-data-path", "digits", "--val-every", 1) == 0
    first, second = (row for row in metrics(tmp_path / "run") if "val_loss" in row)
    assert {**first, "step": 2} == second
    ranges = [value for name, value in first.items() if name.startswith("val_loss_t")]
    assert len(ranges) == 4
    assert first["val_loss"] == pytest.approx(np.mean(ranges))
    # a new model predicts 0 for eps, so that its mean squared error is the noise's variance, 1, and vb is added to it
    assert all(value > 0.97 for value in ranges)
    assert "Validation Loss: " in (tmp_path / "run/log.txt").read_text()


def test_latents_and_held_out_classes_by_name(image_folder, small_vae, tmp_path, capsys):
    held_out = tmp_path / "held out"
    shutil.copytree(image_folder / "cat", held_out / "cat")  # the third class of training, the first one here
    arguments = [
        *TINY, "--data-path", image_folder, "--vae", small_vae, "--image-size", 16, "--num-classes", 3, "--epochs", 9,
        "--max-steps", 1, "--sample-every", 1, "--sample-labels", "cat", 0, "--val-every", 1, "--val-data-path",
    ]  # fmt: skip
    read, seen = Validation.losses, []
    with mock.patch.object(Validation, "losses", lambda self, *more: seen.append(self.held_out[0][1]) or read(self, *more)):
        assert call(train.main, *arguments, held_out, "--run-dir", tmp_path / "run") == 0
    assert [y.tolist() for y in seen] == [[2, 2, 2, 2]]
    assert Image.open(tmp_path / "run/samples/0000001.png").size == (2 * 66 + 2, 64 + 22 + 2)
    (held_out / "cat").rename(held_out / "dog")
    assert call(train.main, *arguments, held_out, "--run-dir", tmp_path / "refused") == 2
    assert 'its class "dog" is not one of the model' in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_the_last_weights_are_drawn_and_validated_too(tmp_path, monkeypatch):
    monkeypatch.setattr(watchers, "MAX_IMAGES", 8)
    arguments = [*TINY, "--max-steps", 5, "--sample-every", 3, "--run-dir", tmp_path, "--sample-labels", 1]
    arguments += ["--val-every", 4, "--val-data-path", "digits"]
    assert call(train.main, *arguments, "--recipe", "fast", "--sample-sampling-steps", 2) == 0
    assert [path.name for path in sorted((tmp_path / "samples").iterdir())] == ["0000003.png", "0000005.png"]
    assert [row["step"] for row in metrics(tmp_path) if "val_loss" in row] == [4, 5]


@pytest.mark.parametrize(
    ("kind", "objective", "given", "expected"),
    [
        ("sample", "diffusion", (None, None), ("dpm-solver++", 20)),
        ("eval", "diffusion", (None, None), ("ddpm", 250)),
        ("eval", "diffusion", ("ddim", 50), ("ddim", 50)),
        ("sample", "flow", (None, None), OBJECTIVES["flow"].default_sampler),
        ("eval", "flow", (None, 9), (OBJECTIVES["flow"].default_sampler[0], 9)),
    ],
)
def test_an_objective_is_drawn_by_its_own_sampler(kind, objective, given, expected):
    sampler = choose_sampler(kind, objective, *given)
    assert (sampler.sampler, sampler.num_sampling_steps) == expected


def test_a_model_of_vectors_is_trained_watched_and_resumed(tmp_path, ranks):
    """A folder of digits whose condition is a vector in place of the class."""
    digits, random = sklearn.datasets.load_digits(), np.random.default_rng(0)
    for name, images in (("images", digits.images[:24]), ("held out", digits.images[24:30])):
        (tmp_path / name / "all").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray((image * 15.9).astype(np.uint8)).save(tmp_path / f"{name}/all/{i:03d}.png")
        np.save(tmp_path / name / "vectors.npy", random.normal(size=(len(images), 2)))
    at = TINY.index("--num-classes")
    command = [*TINY[:at], *TINY[at + 2 :], "--data-path", tmp_path / "images", "--condition", "vector", *WATCHED]
    command += ["--val-data-path", tmp_path / "held out", "--sample-sampling-steps", 2, "--run-dir"]
    np.save(tmp_path / "two.npy", np.zeros((2, 2)))
    for folder, steps, world_size in (("whole", 6, 2), ("parts", 4, 2), ("parts", 6, 2)):
        run = ranks(train.main, [*command, tmp_path / folder, "--max-steps", steps], world_size)
        assert run.wait() == [0] * world_size, run.text()
    assert_same_state(latest(tmp_path / "whole"), latest(tmp_path / "parts"))
    assert latest(tmp_path / "parts")["condition"] == {"kind": "vector", "size": 2}
    assert [row["step"] for row in metrics(tmp_path / "whole") if "val_loss" in row] == [2, 4, 6]
    assert Image.open(tmp_path / "whole/samples/0000006.png").size == (4 * 66 + 2, 4 * 86 + 2), "16 of the data"
    drawn = [*command, tmp_path / "named", "--max-steps", 1, "--sample-every", 1, "--sample-labels", tmp_path / "two.npy"]
    assert call(train.main, *drawn) == 0
    assert Image.open(tmp_path / "named/samples/0000001.png").size == (2 * 66 + 2, 86 + 2)


find_spec = importlib.util.find_spec


def without_tensorboard(argv):
    if os.environ["RANK"] == "1":
        importlib.util.find_spec = find_but_tensorboard
    train.main(argv)


def find_but_tensorboard(name, *more):
    return None if name == "tensorboard" else find_spec(name, *more)


def test_a_package_that_another_node_lacks_is_named(tmp_path, ranks):
    """It used to end as a lost connection, because the check was nested in another one."""
    pytest.importorskip("tensorboard")
    run = ranks(without_tensorboard, [*TINY, "--report-to", "tensorboard", "--run-dir", tmp_path / "run"], 2)
    assert run.wait() == [2, 2], run.text()
    assert "--report-to tensorboard: the package tensorboard is not installed; run: pip install" in run.text(0)
    assert run.text(1) == ""


def test_image_that_is_not_finite_is_a_line_in_the_log(tmp_path):
    arguments = [*TINY, "--max-steps", 2, "--run-dir", tmp_path / "run", "--sample-every", 1, "--sample-cfg-scale", 1e38]
    assert call(train.main, *arguments, "--lr", 1) == 0
    assert (
        "(step=0000002) Samples: an image has values that are not finite: --sample-cfg-scale is too large"
        in (tmp_path / "run/log.txt").read_text()
    )


def test_event_files_follow_the_metrics(watched):
    assert_follows_metrics(watched)


@pytest.mark.slow
def test_after_kills_and_resumes_no_step_is_there_twice_and_none_is_missing(tmp_path, ranks):
    pytest.importorskip("torch.utils.tensorboard")  # imported here, so that the ten processes need not
    folder, steps, random = tmp_path / "run", 120, np.random.default_rng(0)
    arguments = [*TINY, "--max-steps", steps, "--run-dir", folder, "--ckpt-every", 5, "--keep-last", 2, "--report-to",
        "tensorboard", "--sample-every", 8, "--sample-labels", 1, "--val-every", 12, "--val-data-path",
        "digits"]  # fmt: skip
    log, reached = folder / "log.txt", 0
    for _ in range(10):
        run, target = ranks(train.main, arguments), reached + random.integers(2, 10)
        wait_for(lambda target=target: metrics(folder)[-1]["step"] >= target, pause=0.001)
        time.sleep(random.uniform(0, 0.02))
        run.processes[0].kill()
        assert run.wait() == [-signal.SIGKILL], "the run is too short to be killed ten times"
        reached = max(int(step) for step in re.findall(r"step=(\d+)", log.read_text()))
    assert reached > 24, "no kill came after validation and after deleted checkpoints"
    last = ranks(train.main, arguments)
    assert last.wait() == [0], last.text()
    assert log.read_text().count("Resumed from") > 3
    assert_follows_metrics(folder)
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(2, steps + 1, 2))
    assert [row["step"] for row in metrics(folder) if "val_loss" in row] == list(range(12, steps + 1, 12))
    assert len(list((folder / "samples").glob("*.png"))) == steps // 8


def wandb_rows(folder):
    """[(step, {name: value})] of the one offline record of a run: protocol buffers in LevelDB's log format."""
    records = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, position, payload, rows = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a header does not cross the border of a block
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record, payload = records.Record.FromString(payload), b""
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                rows.append((record.history.step.num, values))
    return rows


@pytest.mark.slow
def test_offline_record_of_weights_and_biases_has_each_step_once(tmp_path, ranks, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = tmp_path / "run"
    arguments = [*TINY, "--max-steps", 24, "--run-dir", folder, "--ckpt-every", 4, "--report-to", "wandb", "--sample-every",
        6, "--val-every", 4, "--val-data-path", "digits"]  # fmt: skip
    killed = ranks(train.main, arguments)
    wait_for(lambda: "Validation" in (folder / "log.txt").read_text() and metrics(folder)[-1]["step"] >= 6)
    killed.processes[0].kill()
    assert killed.wait() == [-signal.SIGKILL]
    again = ranks(train.main, arguments)
    assert again.wait() == [0], again.text()
    assert "Resumed from" in (folder / "log.txt").read_text()
    rows = wandb_rows(folder)
    assert [step for step, _ in rows] == sorted({row["step"] for row in metrics(folder)})
    recorded = dict(rows)
    for row in metrics(folder):
        for name in row.keys() - {"step"}:
            assert recorded[row["step"]][name] == pytest.approx(row[name]), (row["step"], name)
    assert [step for step, values in rows if "samples" in values] == [6, 12, 18, 24]


def test_a_resumed_run_forgets_later_steps(watched, tmp_path):
    shutil.copytree(watched, tmp_path / "run")
    checkpoints = tmp_path / "run/checkpoints"
    state = torch.load(checkpoints / "0000006.pt", weights_only=True)
    (checkpoints / "0000006.pt").unlink()
    files.save(checkpoints / "0000004.pt", {**state, "step": 4, "images_seen": 48})
    assert call(train.main, *LEARNS, "--max-steps", 4, "--run-dir", tmp_path / "run", *WATCHED) == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["0000003.png"]


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path):
    pytest.importorskip("tensorboard")
    with mock.patch("training.trackers.TensorBoard.add", side_effect=OSError("disk full")):
        arguments = ["--max-steps", 4, "--run-dir", tmp_path / "run", "--report-to", "tensorboard"]
        assert call(train.main, *TINY, *arguments) == 0
    text = (tmp_path / "run/log.txt").read_text()
    assert text.count("--report-to tensorboard: given up (OSError: disk full)") == 1
    assert len(metrics(tmp_path / "run")) == 2


def test_missing_package_is_one_line_with_the_command_that_installs_it(tmp_path, capsys):
    with mock.patch("importlib.util.find_spec", find_but_tensorboard):
        assert call(train.main, *TINY, "--run-dir", tmp_path / "run", "--report-to", "tensorboard") == 2
    assert capsys.readouterr().err.endswith("is not installed; run: pip install tensorboard\n")


def test_progress_bar(tmp_path, capsys):
    arguments = [*TINY, "--max-steps", 2, "--run-dir", tmp_path / "run", "--peak-tflops", 0.5]
    assert call(train.main, *arguments) == 0
    (row,) = metrics(tmp_path / "run")
    model = torch.load(tmp_path / "run/checkpoints/0000002.pt", weights_only=True)["model_config"]
    flops = 6 * forward_macs(build("DiT-S/2", **model))  # a training step of an image
    assert row["utilization"] == pytest.approx(row["images_per_second"] * flops / 0.5e12)
    bar = capsys.readouterr().err
    assert f"loss {row['loss']:.4f}, {row['images_per_second']:,.4g} images/s, {row['utilization']:.1%} of the peak" in bar
    values = {"loss": 0.15, "images_per_second": 1234.5, "peak_memory_gib": 40.0, "utilization": 0.4}
    expected = "loss 0.1500, 1,234 images/s, 40.0 GiB, 40.0% of the peak"
    assert postfix(values, torch.device("cuda")) == expected


def test_table_of_peaks():
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-80GB", "NVIDIA A10", "NVIDIA L40S", "Unknown"]
    assert [peak_tflops(name, "bf16") for name in names] == [989, 756, 312, 125, 362, None]
    assert peak_tflops("Tesla V100-SXM2-16GB", "fp32") == 15.7
    assert peak_tflops("Tesla V100-SXM2-16GB", "bf16") is None


def test_labels_and_columns():
    assert Classes(10).examples("cpu")[0].tolist() == list(range(10))
    assert Classes(1000).examples("cpu")[0].tolist() == [i * 1000 // 16 for i in range(16)]
    assert Classes(0).examples("cpu")[0].tolist() == [0] * 16
    assert [num_columns(n) for n in (1, 2, 8, 10, 12, 13, 16)] == [1, 2, 4, 5, 4, 4, 4]
