"""train.py as a whole: what it leaves, that a stopped run goes on as if it had not stopped, and what mistakes get."""

import argparse
import errno
import functools
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import tempfile
import time
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY
from helpers import assert_same_state, call, flat, latest, metrics, paced, to_the_end, wait_for, without_timings
from PIL import Image
from reference import assert_golden, fill, golden, training_batch
from test_models import SMALL
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm.auto import tqdm

import train
from checkpoint import files as checkpoint
from checkpoint.config import ModelOptions
from checkpoint.opened import Checkpoint
from checkpoint.saver import BackgroundSaver
from data import crop, order
from data.autoencoder import Pixels
from data.images import Digits
from diffusion.flow import Flow
from diffusion.registry import OBJECTIVES, Objective
from models import DiT
from runtime import distributed
from runtime.files import lock_folder
from training import run_folder, setup
from training.signals import StopSignals
from training.trainer import Trainer


def test_a_run_leaves_what_explains_and_continues_it(tiny_checkpoint):
    folder = tiny_checkpoint.parents[1]
    state = torch.load(tiny_checkpoint, weights_only=True)
    assert state.keys() >= {"model", "ema", "opt", "args", "step"}
    assert state["step"] == 4
    assert isinstance(state["args"], dict)
    assert re.search(
        r"\(step=0000002\) Train Loss: \d+\.\d{4}, Train Steps/Sec: \d+\.\d{2}", (folder / "log.txt").read_text()
    )
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[0].keys() >= {"loss", "mse", "vb", "grad_norm", "images_per_second", "peak_memory_gib"}
    assert rows[0]["loss"] == pytest.approx(rows[0]["mse"] + rows[0]["vb"])
    options = json.loads((folder / "options.json").read_text())
    assert (options["lr"], options["label_dropout"], options["hidden_size"]) == (1e-3, 0.1, 16)
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_numbered_folders_count_up_and_are_called_by_the_models_sizes(tmp_path):
    for _ in range(2):
        assert call(train.main, *TINY, "--max-steps", 1, "--results-dir", tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000-DiT-1x16-2", "001-DiT-1x16-2"]
    assert (tmp_path / "001-DiT-1x16-2/checkpoints/0000001.pt").is_file()
    assert json.loads((tmp_path / "001-DiT-1x16-2/options.json").read_text())["model"] is None
    names = {"DiT-XL/2": {}, "DiT-S/4": {"model": "DiT-S/4"}, "DiT-28x64/2": {"hidden_size": 64, "num_heads": 4},
             "DiT-S/7": {"model": "DiT-S/2", "patch_size": 7}}  # fmt: skip
    assert [ModelOptions(**options).name for options in names.values()] == [*names]


FOLDER = "--vae none --image-size 8 --num-classes 3 --hidden-size 16 --depth 1 --num-heads 2 --global-batch-size 4 "
FOLDER = (FOLDER + "--lr 1e-3 --device cpu --log-every 4 --label-dropout 0.3 --ema-warmup --more-ema-decays 0.2 0").split()


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 2), (2, 1)])
def test_two_runs_are_bit_for_bit_one(tmp_path, image_folder, ranks, world_size, workers):
    """Flips, label dropout and workers are on; the stop at 3 is inside an epoch and between two lines of the log."""
    command = [*FOLDER, "--data-path", image_folder, "--num-workers", workers]
    for steps, folder in ((9, "whole"), (3, "parts"), (9, "parts")):
        run = ranks(train.main, [*command, "--max-steps", steps, "--run-dir", tmp_path / folder], world_size)
        assert run.wait() == [0] * world_size, run.text()
    assert_same_state(latest(tmp_path / "parts"), latest(tmp_path / "whole"))
    assert latest(tmp_path / "parts")["emas"].keys() == {"0.2", "0.0"}
    parts, whole = without_timings(tmp_path / "parts"), without_timings(tmp_path / "whole")
    assert [row["step"] for row in parts] == [row["step"] for row in whole] == [4, 8]
    assert parts[1] == whole[1], "a row whose interval began after the stop"


def test_each_average_is_that_of_a_run_with_its_decay_alone(tmp_path, tiny_checkpoint):
    command = [*TINY, "--max-steps", 4, "--run-dir"]
    assert call(train.main, *command, tmp_path / "both", "--more-ema-decays", 0.5, 0) == 0
    assert call(train.main, *command, tmp_path / "alone", "--ema-decay", 0.5) == 0
    both, alone, usual = latest(tmp_path / "both"), latest(tmp_path / "alone"), torch.load(tiny_checkpoint)
    assert_same_state({**both, "emas": {}}, usual)  # more averages change nothing else
    assert "emas" not in usual, "a checkpoint of one average is as it was"
    assert_same_state({**both, "ema": both["emas"]["0.5"], "emas": {}}, alone)
    assert_same_state({**both, "ema": both["emas"]["0.0"], "emas": {}}, {**both, "ema": both["model"], "emas": {}})


def test_an_average_that_is_added_starts_at_the_weights_and_one_that_is_dropped_goes(tmp_path, capsys):
    command = [*TINY, "--run-dir", tmp_path / "run", "--more-ema-decays"]
    assert call(train.main, *command, 0.5, "--max-steps", 2) == 0
    capsys.readouterr()
    assert call(train.main, *command, 1, "--max-steps", 4) == 2
    assert "made with --more-ema-decays [0.5], now [1.0]; use the same, or pass --allow-changes" in capsys.readouterr().err
    before = latest(tmp_path / "run")["model"]
    assert call(train.main, *command, 1, "--max-steps", 4, "--allow-changes") == 0
    emas = latest(tmp_path / "run")["emas"]
    assert emas.keys() == {"1.0"}
    assert all(torch.equal(emas["1.0"][name], value) for name, value in before.items()), "a decay of 1 keeps the start"


def test_the_digits_model_has_the_loss_that_the_docs_state(tmp_path):
    """Of docs/results.md, by the command of docs/training.md: whoever sees another one trains something else."""
    docs = Path(train.__file__).parent / "docs"
    shown = re.findall(r"python train\.py (.*?)\n(?:python|```)", (docs / "training.md").read_text(), re.S)
    (command,) = (words.replace("\\\n", " ") for words in shown if "results/digits" in words)
    stated = float(re.search(r"^\| \[the digits model\].*? \| (0\.\d+), ", (docs / "results.md").read_text(), re.M)[1])
    here = ["--max-steps", 100, "--run-dir", tmp_path / "run", "--device", "cpu", "--num-workers", 0]
    assert call(train.main, *shlex.split(command), *here) == 0
    assert metrics(tmp_path / "run")[-1]["loss"] == pytest.approx(stated, rel=1e-3)  # another seed: 5e-3


def test_another_number_of_processes_goes_on_with_the_unseen_images(tmp_path, image_folder, ranks):
    command = [*FOLDER, "--data-path", image_folder, "--num-workers", 0, "--run-dir", tmp_path]
    assert ranks(train.main, [*command, "--max-steps", 2], 1).wait() == [0]
    run = ranks(train.main, [*command, "--max-steps", 4], 2)
    assert run.wait() == [0, 0], run.text()
    assert "of 1 processes, now 2" in run.text()
    state = latest(tmp_path)
    assert (state["step"], state["images_seen"], state["args"]["world_size"]) == (4, 16, 2)
    assert metrics(tmp_path)[-1]["skipped_steps"] == 0


def test_a_signal_to_any_rank_saves_and_exits_cleanly(tmp_path, image_folder, ranks):
    command = [*FOLDER, "--data-path", image_folder, "--num-workers", 1, "--log-every", 1, "--run-dir"]
    step = 0
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        run = ranks(paced, [*command, tmp_path / "parts", "--max-steps", 100_000], 2)
        wait_for(lambda: metrics(tmp_path / "parts")[-1]["step"] > step + 2)  # noqa: B023
        os.kill(run.processes[1].pid, number)
        assert run.wait() == [0, 0], run.text()
        status = json.loads((tmp_path / "parts/status.json").read_text())
        assert status["state"] == "preempted"
        step = latest(tmp_path / "parts")["step"]
        assert status["step"] == step == metrics(tmp_path / "parts")[-1]["step"]
    for folder in ("parts", "whole"):
        assert ranks(train.main, [*command, tmp_path / folder, "--max-steps", step + 2], 2).wait() == [0, 0]
    assert_same_state(latest(tmp_path / "parts"), latest(tmp_path / "whole"))


def test_a_killed_run_goes_on_and_a_second_run_is_refused(tmp_path, image_folder, ranks, capfd):
    command = [*FOLDER, "--data-path", image_folder, "--num-workers", 2, "--log-every", 1, "--ckpt-every", 2, "--run-dir"]
    run = ranks(paced, [*command, tmp_path / "parts", "--max-steps", 100_000])
    wait_for(lambda: len(metrics(tmp_path / "parts")) > 5)
    assert call(train.main, *command, tmp_path / "parts") == 2
    assert "another run is writing here" in capfd.readouterr().err
    os.kill(run.processes[0].pid, signal.SIGKILL)
    assert run.wait() == [-9]
    step = latest(tmp_path / "parts")["step"]
    with open(tmp_path / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 100, "lo')  # what a kill may leave
    for folder in ("parts", "whole"):  # at once: the dead run's workers must not hold the lock
        assert ranks(train.main, [*command, tmp_path / folder, "--max-steps", step + 3]).wait() == [0]
    assert_same_state(latest(tmp_path / "parts"), latest(tmp_path / "whole"))
    assert without_timings(tmp_path / "parts") == without_timings(tmp_path / "whole")
    steps = [row["step"] for row in metrics(tmp_path / "parts")]
    assert steps == sorted(set(steps)), "no step may stand twice"


def test_a_damaged_checkpoint_is_passed_over(tmp_path, capfd):
    command = [*TINY, "--ckpt-every", 2, "--run-dir", tmp_path]
    assert call(train.main, *command, "--max-steps", 4) == 0
    expected = latest(tmp_path)
    newest = tmp_path / "checkpoints/0000004.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert call(train.main, *command, "--max-steps", 4) == 0
    assert "0000004.pt: truncated or damaged" in capfd.readouterr().out
    assert "0000004.pt: truncated or damaged" in (tmp_path / "log.txt").read_text(), "lines from before it is open too"
    assert_same_state(latest(tmp_path), expected)


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_later_checkpoint_is_not_the_one_that_pruning_keeps(tmp_path):
    command = [*TINY, "--run-dir", tmp_path, "--max-steps"]
    assert call(train.main, *command, 2) == 0
    assert call(train.main, *command, 4) == 0
    damage(tmp_path / "checkpoints/0000004.pt")
    assert call(train.main, *command, 3, "--keep-last", 1) == 0
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["0000003.pt", "0000004.pt.aside"]


def test_a_course_that_was_left_is_not_resumed(tmp_path):
    """Going back with --resume PATH: what comes later in the folder belongs to the course before."""
    command = [*TINY, "--run-dir", tmp_path, "--ckpt-every", 2]
    assert call(train.main, *command, "--max-steps", 6) == 0
    back = [*command, "--resume", tmp_path / "checkpoints/0000002.pt", "--lr", 1e-4, "--allow-changes"]
    assert call(train.main, *back, "--max-steps", 3) == 0
    assert call(train.main, *command, "--lr", 1e-4, "--max-steps", 4) == 0
    assert latest(tmp_path)["opt"]["param_groups"][0]["lr"] == 1e-4
    assert latest(tmp_path)["step"] == 4


def test_a_killed_rank_does_not_leave_the_other_waiting(tmp_path, image_folder, ranks):
    command = [*FOLDER, "--data-path", image_folder, "--num-workers", 1, "--log-every", 1, "--max-steps", 100_000]
    run = ranks(paced, [*command, "--ckpt-every", 2, "--run-dir", tmp_path], 2)
    wait_for(lambda: len(metrics(tmp_path)) > 3)
    os.kill(run.processes[1].pid, signal.SIGKILL)
    assert run.wait(timeout=60)[1] == -9
    assert run.processes[0].exitcode > 0
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def limited(argv):
    """train.main on a disk with room for small files only."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    train.main(argv)


def test_a_full_disk_stops_all_ranks_at_once_with_one_line(tmp_path, ranks):
    command = [*TINY, "--run-dir", tmp_path, "--ckpt-every", 2, "--max-steps"]
    assert ranks(train.main, [*command, 2], 2).wait() == [0, 0]
    run = ranks(limited, [*command, 100_000, "--ckpt-every", 4], 2)
    assert run.wait() == [1, 1], run.text()
    assert run.text().count("error: ") == 1
    assert "0000004.pt: cannot be written (" in run.text()
    assert "Traceback" not in run.text(0) + run.text(1)
    assert metrics(tmp_path)[-1]["step"] < 1000, "it stops when the write has failed, not at the end"
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["0000002.pt"]
    checkpoint.verify(tmp_path / "checkpoints/0000002.pt")


def test_records_that_cannot_be_written_stop_the_run(tmp_path, monkeypatch, capfd):
    start = run_folder.RunFolder.start

    def start_on_a_full_disk(folder, options, step):
        start(folder, options, step)
        folder.metrics_file = open("/dev/full", "w", buffering=1)  # noqa: SIM115

    monkeypatch.setattr(run_folder.RunFolder, "start", start_on_a_full_disk)
    assert call(train.main, *TINY, "--run-dir", tmp_path, "--max-steps", 50) == 1
    assert f"error: {tmp_path}: cannot be written to (No space left on device)" in capfd.readouterr().err


def elsewhere(argv):
    if os.environ["RANK"] == "1":
        argv = [word.replace("images-of-0", "images-of-1") for word in argv]
    train.main(argv)


def test_processes_that_see_different_images_are_refused(tmp_path, image_folder, ranks):
    for rank in (0, 1):
        shutil.copytree(image_folder, tmp_path / f"images-of-{rank}")
    (tmp_path / "images-of-1/cat/3.png").unlink()
    command = [*FOLDER, "--data-path", tmp_path / "images-of-0", "--run-dir", tmp_path / "run", "--max-steps", 2]
    run = ranks(elsewhere, command, 2)
    assert run.wait() == [2, 2], run.text()
    assert "the processes do not see the same images" in run.text()
    shutil.rmtree(tmp_path / "images-of-1")
    run = ranks(elsewhere, command, 2)
    assert run.wait() == [2, 2], run.text()
    assert "images-of-1: the processes do not see the same images" in run.text(), "rank 0 prints what another rank found"


def test_a_damaged_checkpoint_by_name_is_refused_on_all_ranks(tmp_path, tiny_checkpoint, ranks):
    shutil.copy(tiny_checkpoint, tmp_path / "0000004.pt")
    damage(tmp_path / "0000004.pt")
    run = ranks(train.main, [*TINY, "--resume", tmp_path / "0000004.pt", "--run-dir", tmp_path / "run"], 2)
    assert run.wait() == [2, 2], run.text()
    assert "0000004.pt: damaged: the checksum of" in run.text()
    assert run.text(1) == ""


def signalled(argv):
    """A scheduler changes its mind while the model is being built."""
    build = setup.build_model
    setup.build_model = lambda *args: (os.kill(os.getpid(), signal.SIGTERM), build(*args))[1]
    train.main(argv)


def test_a_signal_during_start_up_is_kept_until_there_is_something_to_save(tmp_path, ranks):
    assert ranks(signalled, [*TINY, "--run-dir", tmp_path, "--max-steps", 5]).wait() == [0]
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "preempted"
    assert latest(tmp_path)["step"] == 0


def test_an_error_ends_the_data_workers(tmp_path, image_folder, monkeypatch):
    """They ignore the SIGTERM that the interpreter would send them at its exit, and it would wait for ever."""
    monkeypatch.setattr(Trainer, "step", lambda self, batch: 1 / 0)
    before = multiprocessing.active_children()
    with pytest.raises(ZeroDivisionError) as error:
        call(train.main, *FOLDER, "--data-path", image_folder, "--num-workers", 2, "--run-dir", tmp_path)
    assert error.tb is not None, "the traceback is still held"
    assert multiprocessing.active_children() == before


def test_an_unreadable_image_ends_the_command_and_its_workers(tmp_path, image_folder, ranks):
    """In one process, whose interpreter would wait for data workers that something still refers to."""
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images/ant/3.png").write_bytes(b"broken")
    command = [*FOLDER, "--data-path", tmp_path / "images", "--num-workers", 2, "--run-dir", tmp_path / "run"]
    run = ranks(functools.partial(to_the_end, train.main), command)
    assert run.wait(timeout=90) == [2], run.text()
    assert "3.png: not a readable image" in run.text().splitlines()[-1]


@pytest.mark.parametrize(
    "error",
    [RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: Resource temporarily unavailable (11)"),
     RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. \nIt is possible that shared memory ran out")],
)  # fmt: skip
def test_a_lack_of_shared_memory_names_the_way_out(error):
    def batches():
        raise error
        yield

    batch, line = order.next_batch(batches())
    assert batch is None
    assert "shared memory" in line
    assert "/dev/shm" in line
    assert "--ipc=host" in line
    assert "\n" not in line
    assert error.__traceback__ is None, "its frames would keep the data workers alive"


def test_a_start_that_fails_does_not_keep_the_old_status(tmp_path, capfd):
    """A job script that requeues preempted runs would otherwise requeue this one for ever."""
    for mistake, state in ((["--data-path", tmp_path / "absent"], "failed"), (["--init-from", "absent.pt"], "starting")):
        (tmp_path / "status.json").write_text('{"state": "preempted", "step": 4}')
        assert call(train.main, *TINY, *mistake, "--run-dir", tmp_path) == 2
        assert json.loads((tmp_path / "status.json").read_text())["state"] == state


def test_a_stopped_run_says_how_it_is_resumed(tmp_path, ranks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ranks(signalled, [*TINY, "--max-steps", 5])
    assert run.wait() == [0]
    assert "to resume, give the same command with --run-dir results/000-DiT-1x16-2" in run.text()
    assert call(train.main, *TINY, "--max-steps", 5, "--run-dir", "results/000-DiT-1x16-2") == 0
    assert latest(Path("results/000-DiT-1x16-2"))["step"] == 5


def test_workers_that_torchrun_leaves_behind_stop(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stop = StopSignals()
    assert not stop.requested
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert stop.requested
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert not StopSignals().requested, "a run in the background of a shell that has ended goes on"


def test_ctrl_c_that_a_launcher_repeats_is_one(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopSignals()
    stop._handle(signal.SIGINT, None)
    stop._handle(signal.SIGINT, None)
    assert stop.requested
    assert stop.interrupted
    now[0] += 2
    with pytest.raises(KeyboardInterrupt):
        stop._handle(signal.SIGINT, None)


def test_changed_options_are_named_and_refused(tmp_path, capsys):
    command = [*TINY, "--run-dir", tmp_path]
    assert call(train.main, *command, "--max-steps", 2) == 0
    assert call(train.main, *command, "--max-steps", 4, "--lr", 2e-3, "--label-dropout", 0.2) == 2
    error = capsys.readouterr().err
    assert "--label-dropout 0.1, now 0.2" in error
    assert "--lr 0.001, now 0.002" in error
    assert "--allow-changes" in error
    assert call(train.main, *command, "--max-steps", 3, "--lr", 2e-3, "--allow-changes", "--log-every", 1) == 0
    assert latest(tmp_path)["opt"]["param_groups"][0]["lr"] == 2e-3
    assert (tmp_path / "log.txt").read_text().count("] Changed on resuming: --lr 0.001, now 0.002\n") == 1
    assert call(train.main, *command, "--block", "adaln", "--allow-changes") == 2
    assert "block adaln-zero, now adaln" in capsys.readouterr().err
    assert call(train.main, *command, "--resume", "none") == 2


def test_a_finished_run_has_nothing_left_to_do(tiny_checkpoint, capfd):
    before = tiny_checkpoint.read_bytes()
    assert call(train.main, *TINY, "--max-steps", 4, "--run-dir", tiny_checkpoint.parents[1]) == 0
    assert "Nothing left to do" in capfd.readouterr().out
    assert tiny_checkpoint.read_bytes() == before


def test_the_way_to_go_on_after_a_finished_run_works(tmp_path, capfd):
    for schedule, way_out in (("constant", []), ("cosine", ["--allow-changes"])):  # a cosine is as long as the run
        command = [*TINY, "--run-dir", tmp_path / schedule, "--lr-schedule", schedule, "--max-steps"]
        assert [call(train.main, *command, 2) for _ in range(2)] == [0, 0]
        advice = capfd.readouterr().out.split("to go on, ")[1].split("\n")[0]
        assert advice == "raise --max-steps or --epochs" + ", and pass --allow-changes" * len(way_out)
        assert call(train.main, *command, 3, *way_out) == 0
        assert latest(tmp_path / schedule)["step"] == 3


def test_a_named_checkpoint_starts_another_run(tiny_checkpoint, tmp_path):
    assert call(train.main, *TINY, "--max-steps", 5, "--resume", tiny_checkpoint, "--run-dir", tmp_path) == 0
    assert latest(tmp_path)["step"] == 5


def test_non_finite_updates_are_skipped_and_stop_the_run(tmp_path, capfd):
    command = [*TINY, "--run-dir", tmp_path, "--ckpt-every", 1, "--max-bad-steps", 3, "--max-steps", 50, "--log-every", 1]
    assert call(train.main, *command, "--lr", 1e30) == 1
    error = capfd.readouterr().err
    assert re.search(r"step \d+: loss or gradient not finite, the last [3-9] updates were skipped", error)
    assert "there is no good checkpoint; start in another folder with a lower --lr" in error, "all came too late"
    assert "digits[" in error, "the batch must be named"
    state = latest(tmp_path)
    assert all(value.isfinite().all() for value in [*state["model"].values(), *state["ema"].values()])
    assert any(row["skipped_steps"] for row in metrics(tmp_path))
    assert "the averaged weights move on towards the weights as they are" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"


def test_the_last_good_checkpoint_is_one_that_an_update_was_made_from(tmp_path, capfd):
    """The advice works as it is given."""
    command = [*TINY, "--run-dir", tmp_path, "--ckpt-every", 1, "--max-bad-steps", 3, "--log-every", 1]
    assert call(train.main, *command, "--max-steps", 2) == 0
    changed = [*command, "--lr", 1e30, "--allow-changes"]
    assert call(train.main, *changed, "--max-steps", 4) == 0, "two updates: one breaks the weights, one is skipped"
    assert latest(tmp_path)["bad_steps"] == 1
    assert call(train.main, *changed, "--max-steps", 50) == 1
    captured = capfd.readouterr()
    assert "0000004.pt was written after 1 updates that were skipped" in captured.out
    good = tmp_path / "checkpoints/0000002.pt"
    advice = f"give the same command with --resume {good} --allow-changes and a lower --lr"
    assert f"the last good checkpoint is {good}; {advice}" in captured.err
    assert call(train.main, *command, "--resume", good, "--allow-changes", "--max-steps", 4) == 0
    assert metrics(tmp_path)[-1]["skipped_steps"] == 0


@pytest.mark.parametrize("error", [ValueError("not foreseen"), OSError(5, "Input/output error")])
def test_whatever_ends_the_writing_of_a_checkpoint_is_recorded(tmp_path, monkeypatch, error):
    monkeypatch.setattr(BackgroundSaver, "_prune", mock.Mock(side_effect=error))
    try:
        status = call(train.main, *TINY, "--run-dir", tmp_path, "--max-steps", 2)
    except ValueError:
        status = "a traceback, since it is a fault of ours"
    assert status in (1, "a traceback, since it is a fault of ours")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "failed"
    assert (
        f"Stopped at step 2: {'not foreseen' if isinstance(error, ValueError) else tmp_path}"
        in (tmp_path / "log.txt").read_text()
    )
    lock_folder(tmp_path).close()  # raises where it is still held


def test_the_status_is_written_before_the_last_line_is_printed(tmp_path, monkeypatch):
    """A terminal that is closed lets printing fail."""
    write = tqdm.write

    def closed(text, *args, **named):
        if text.startswith("Done"):
            raise OSError("the terminal is gone")
        write(text, *args, **named)

    monkeypatch.setattr(tqdm, "write", closed)
    call(train.main, *TINY, "--run-dir", tmp_path, "--max-steps", 1)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"


def test_what_cannot_be_read_now_is_not_passed_over(tmp_path, tiny_checkpoint, monkeypatch, capfd):
    """Only damage is: an error of the system may be over soon, and the run would go on from an older checkpoint."""
    run = shutil.copytree(tiny_checkpoint.parents[1], tmp_path / "run")
    shutil.copy(tiny_checkpoint, run / "checkpoints/0000002.pt")
    at = TINY.index("--num-classes")  # without it a resumed run looks into its checkpoint before it reads it
    command = [*TINY[:at], *TINY[at + 2 :], "--max-steps", 5, "--run-dir", run]
    stale = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    for module, name in ((zipfile, "ZipFile"), (torch, "load")):
        reader = getattr(module, name)

        def fails(path, *args, **named):
            if Path(getattr(path, "name", path)).name == "0000004.pt":
                raise stale
            return reader(path, *args, **named)  # noqa: B023

        monkeypatch.setattr(module, name, fails)
        assert call(train.main, *command) == 1
        line = f"4.pt: cannot be read ({stale.strerror}); nothing was changed; run again when it can be read\n"
        assert capfd.readouterr().err.endswith(line)
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0000002.pt", "0000004.pt"]
        monkeypatch.undo()
    assert call(train.main, *command) == 0
    assert "Resumed from" in (run / "log.txt").read_text()
    assert latest(run)["step"] == 5


def test_a_lack_of_files_or_a_long_folder_for_sockets_ends_a_run_that_is_saved(
    tmp_path, image_folder, ranks, monkeypatch, capfd
):
    command = [*FOLDER, "--data-path", image_folder, "--num-workers", 4, "--log-every", 1, "--run-dir", tmp_path / "run"]
    run = ranks(functools.partial(to_the_end, paced), [*command, "--max-steps", 100_000])
    wait_for(lambda: len(metrics(tmp_path / "run")) > 2)
    files = {*range(1000)}  # those that stay open; batches on their way need others
    for _ in range(100):
        files &= {*map(int, os.listdir(f"/proc/{run.processes[0].pid}/fd"))}
        time.sleep(0.005)
    few = min({*range(1000)} - files)
    resource.prlimit(run.processes[0].pid, resource.RLIMIT_NOFILE, (few, few))
    assert run.wait(timeout=90) == [2], run.text()
    assert "raise the limit with ulimit -n, or lower --num-workers" in run.text().splitlines()[-1]
    assert "Traceback" not in run.text()
    step = latest(tmp_path / "run")["step"]
    assert step == json.loads((tmp_path / "run/status.json").read_text())["step"] > 2
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + 140 * "x")
    assert call(train.main, *command, "--max-steps", step + 1) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.endswith(
        "for the sockets of data workers; set it to a folder of up to 75 characters, or pass --num-workers 0"
    )
    monkeypatch.undo()
    assert call(train.main, *command, "--max-steps", step + 1) == 0


def test_the_number_of_classes_is_that_of_the_data_and_then_that_of_the_run(tmp_path, image_folder, capfd):
    at = FOLDER.index("--num-classes")
    command = [*FOLDER[:at], *FOLDER[at + 2 :], "--data-path", image_folder, "--num-workers", 0, "--run-dir"]
    assert call(train.main, *command, tmp_path / "a", "--max-steps", 1) == 0
    assert latest(tmp_path / "a")["args"]["num_classes"] == 3
    assert call(train.main, *command, tmp_path / "b", "--num-classes", 7, "--max-steps", 1) == 0
    assert call(train.main, *command, tmp_path / "b", "--max-steps", 2) == 0, "a checkpoint made with 1000, the old default"
    assert latest(tmp_path / "b")["model_config"]["num_classes"] == 7


def test_class_folders_that_are_numbers_out_of_order_are_named():
    assert setup.class_notes([str(digit) for digit in range(10)]) == []
    (line,) = setup.class_notes(sorted(map(str, range(12))))
    assert '"10" is class 2' in line


def test_the_log_has_the_losses_that_an_objective_names(tmp_path, monkeypatch):
    class Huber(Flow):
        def training_losses(self, *args):
            huber = (super().training_losses(*args)["mse"] + 1).sqrt() - 1
            return {"loss": huber, "huber": huber}

    monkeypatch.setitem(OBJECTIVES, "flow-huber", Objective(Huber, ("v",), ("flow-euler", 3), flow=True))
    command = [*TINY, "--objective", "flow-huber", "--max-steps", 2, "--sample-every", 2, "--run-dir", tmp_path]
    assert call(train.main, *command) == 0
    row = metrics(tmp_path)[0]
    assert row["huber"] == row["loss"] > 0
    assert "mse" not in row
    assert (tmp_path / "samples/0000002.png").exists()
    assert latest(tmp_path)["model_config"]["objective"] == "flow-huber"


def test_a_run_from_python_takes_a_dataset_and_watchers(tmp_path, image_folder):
    class Watcher:
        every = 2

        def __call__(self, trainer):
            return {"decay": trainer.ema.decay, "picture": Image.new("RGB", (4, 4))}

    values = {"data_path": "mine", "vae": "none", "image_size": 8, "hidden_size": 16, "depth": 1, "num_heads": 2}
    values |= {"lr": 1e-3, "global_batch_size": 4, "max_steps": 4, "device": "cpu", "num_workers": 0}
    config = train.TrainConfig.from_flat({**values, "run_dir": str(tmp_path)})
    signals = mock.Mock(requested=False)
    assert train.train(config, signals, dataset=Digits(8), watchers=[Watcher()]) == 0
    assert [(row["step"], row["decay"]) for row in metrics(tmp_path)] == [(2, 0.9999), (4, 0.9999)]
    assert (tmp_path / "samples/picture-0000004.png").exists()
    assert "(step=0000004) decay 0.9999" in (tmp_path / "log.txt").read_text()


def make_trainer(extra=(), **model_options):
    config = train.make_parser().parse([*TINY, *extra])
    model = DiT(**{**SMALL, **model_options})
    return Trainer(config.recipe, config.compute, distributed.setup("cpu"), model, Pixels(4))


def optimizer_step(trainer, loss):
    """Returns the gradient's norm and whether it was finite."""
    trainer.optimizer.zero_grad()
    loss.backward()
    return trainer.optimizer_step()


def test_a_bad_gradient_changes_nothing_and_a_good_one_does():
    trainer = make_trainer()
    trainer.steps_made = 5
    optimizer_step(trainer, sum(p.square().sum() for p in trainer.ema.weights))
    before = {key: value.clone() for key, value in flat(trainer.optimizer.state_dict()["state"]).items()}
    weights = [p.clone() for p in trainer.ema.weights]
    assert not optimizer_step(trainer, sum((p * float("nan")).sum() for p in trainer.ema.weights))[1]
    assert all(torch.equal(p, w) for p, w in zip(trainer.ema.weights, weights, strict=True))
    after = flat(trainer.optimizer.state_dict()["state"])
    assert all(torch.equal(after[key], value) for key, value in before.items()), "moments and step count must stay"
    assert optimizer_step(trainer, sum(p.square().sum() for p in trainer.ema.weights))[1]
    assert not torch.equal(trainer.ema.weights[0], weights[0])


def test_gradient_clipping_limits_the_norm():
    trainer = make_trainer(["--clip-grad-norm", "0.5"])
    grad_norm, _ = optimizer_step(trainer, sum(p.square().sum() for p in trainer.ema.weights))
    assert grad_norm > 1
    norm = torch.nn.utils.get_total_norm([p.grad for p in trainer.ema.weights])
    assert norm == pytest.approx(0.5, rel=1e-4)


SWITCHES = ["", "--grad-accum 3", "--grad-checkpoint 1", "--grad-checkpoint 2", "--compile aot_eager"]
SWITCHES += ["--compile aot_eager --grad-accum 2 --grad-checkpoint 1"]


@pytest.mark.parametrize("switches", [SWITCHES[0], SWITCHES[-1]])
def test_thirty_updates_of_the_trainer_match_the_reference(switches):
    """What train.py runs, not a copy of it: the fused optimizer and average give the reference's numbers, with the switches
    that make it faster or smaller together."""
    data = golden("train")
    trainer = make_trainer(["--lr", "1e-3", "--ema-decay", "0.99", *switches.split()], class_dropout_prob=0.3)
    fill(trainer.model)
    trainer.ema.module.load_state_dict(trainer.model.state_dict())
    losses = []
    for i in range(30):
        x, noise, t, y = training_batch(i)
        torch.manual_seed(i)
        losses.append(trainer.backward(x, t, noise, trainer.condition.drop(y, 0.3))["loss"].mean().item())
        trainer.optimizer_step()
    assert_golden(losses, data["losses"], "losses", tol=2e-4)
    for key in data:
        if key != "losses":
            kind, name = key.split(":")
            module = trainer.ema.module if kind == "ema" else trainer.model
            assert_golden(module.state_dict()[name], data[key], key, tol=2e-4)


def gradients(switches):
    """Losses and gradients of one update in float64, every weight random."""
    trainer = make_trainer(switches.split())
    fill(trainer.model).double()
    x, noise, t, y = training_batch(0)
    losses = trainer.backward(x.double(), t, noise.double(), y)
    return [*losses.values(), *(p.grad for p in trainer.ema.weights)]


@pytest.mark.parametrize("switches", SWITCHES[1:])
def test_switches_change_no_gradient(switches):
    exact = switches.startswith("--grad-checkpoint")  # the same operations again; the others sum in another order
    for changed, plain in zip(gradients(switches), gradients(""), strict=True):
        torch.testing.assert_close(changed, plain, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-12)


def test_checkpointing_runs_the_blocks_forward_twice_and_accumulation_each_part():
    for switches, calls in [("", 4), ("--grad-checkpoint 1", 8), ("--grad-checkpoint 2", 6), ("--grad-accum 3", 12)]:
        trainer = make_trainer(switches.split(), depth=4)
        seen = []
        for block in trainer.model.blocks:
            block.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(len(inputs[0])))
        x, noise, t, y = training_batch(0)
        trainer.backward(x, t, noise, y)
        assert len(seen) == calls, switches
        assert max(seen) == (3 if "accum" in switches else 8), "8 images in parts of 3, 3 and 2"


def test_a_whole_run_goes_as_without_the_switches(tmp_path, ranks):
    """On two processes, with label dropout, against one without: the parts must not change what is drawn, nor what DDP
    exchanges."""
    for switches in ("", "--grad-accum 3 --grad-checkpoint 1", "--compile aot_eager"):
        run = ranks(train.main, [*TINY, *switches.split(), "--max-steps", 6, "--run-dir", tmp_path / f"run{switches}"], 2)
        assert run.wait() == [0, 0], run.text()
        for row, plain in zip(metrics(tmp_path / f"run{switches}"), metrics(tmp_path / "run"), strict=True):
            found, expected = ([of[name] for name in ("loss", "mse", "vb")] for of in (row, plain))
            assert found == pytest.approx(expected, rel=1e-5), switches
        expected = latest(tmp_path / "run")["ema"]
        for name, value in latest(tmp_path / f"run{switches}")["ema"].items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=f"{switches} {name}")


def test_blocks_are_compiled_once_for_all():
    """A model of thirty blocks must not take fifteen times the start-up of one of two."""
    from torch._dynamo.utils import counters

    graphs = []
    for depth in (2, 6):
        torch._dynamo.reset()
        counters.clear()
        trainer = make_trainer(["--compile", "aot_eager"], depth=depth)
        x, noise, t, y = training_batch(0)
        for _ in range(2):
            trainer.backward(x, t, noise, y)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1]
    assert not torch._dynamo.config.optimize_ddp, "DDP's buckets would cut the blocks"
    assert trainer.model.state_dict().keys() == DiT(**{**SMALL, "depth": 6}).state_dict().keys()


def test_a_checkpoint_of_the_original_release_resumes(tmp_path, tiny_checkpoint):
    """Its optimizer state is that of a plain AdamW over all parameters, its options a Namespace, its step in the name."""
    state = checkpoint.load(tiny_checkpoint)
    options = argparse.Namespace(model="DiT-XL/2", num_classes=10, image_size=8, vae="ema", num_heads=2)
    model = DiT(**Checkpoint(state).model_config)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    plain.load_state_dict({**state["opt"], "param_groups": plain.state_dict()["param_groups"]})
    old = {"model": state["model"], "ema": state["ema"], "opt": plain.state_dict(), "args": options}
    torch.save(old, tmp_path / "0000004.pt")
    command = [*TINY, "--run-dir", tmp_path / "run", "--resume", tmp_path / "0000004.pt", "--max-steps", 6]
    assert call(train.main, *command, "--allow-changes") == 0
    assert latest(tmp_path / "run")["step"] == 6


def test_files_that_go_bad_while_training_are_named_and_the_work_is_saved(tmp_path, image_folder, ranks):
    shutil.copytree(image_folder, tmp_path / "images")
    command = [*FOLDER, "--data-path", tmp_path / "images", "--num-workers", 2, "--log-every", 1, "--run-dir"]
    run = ranks(paced, [*command, tmp_path / "run", "--max-steps", 100_000], 2)
    wait_for(lambda: len(metrics(tmp_path / "run")) > 2)
    (tmp_path / "images/bee/1.png").unlink()
    assert run.wait() == [2, 2], run.text()
    assert "bee/1.png: the file is gone" in run.text(0)
    assert run.text(1) == "", "rank 0 alone prints the line"
    assert "Traceback" not in run.text(0) + run.text(1)
    assert latest(tmp_path / "run")["step"] >= 2


def test_a_dead_data_worker_is_reported(tmp_path, image_folder, ranks):
    command = [*FOLDER, "--data-path", image_folder, "--num-workers", 1, "--log-every", 1, "--max-steps", 100_000]
    run = ranks(paced, [*command, "--run-dir", tmp_path / "run"])
    wait_for(lambda: len(metrics(tmp_path / "run")) > 2)
    children = Path(f"/proc/{run.processes[0].pid}/task/{run.processes[0].pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert run.wait() == [2], run.text()
    assert "a data worker died" in run.text()
    assert "Traceback" not in run.text()


def test_latents_of_an_autoencoder_are_trained_on(tmp_path, image_folder, small_vae):
    sizes = "--image-size 16 --num-classes 3 --hidden-size 16 --depth 1 --num-heads 2 --global-batch-size 4 --device cpu"
    command = ["--data-path", image_folder, "--vae", small_vae, *sizes.split(), "--num-workers", 0, "--max-steps", 2]
    assert call(train.main, *command, "--log-every", 1, "--run-dir", tmp_path) == 0
    config = Checkpoint(latest(tmp_path)).model_config
    assert (config["in_channels"], config["input_size"], config["num_classes"]) == (4, 2, 3)


def test_unconditional_training_has_the_null_class_alone(tmp_path):
    assert call(train.main, *TINY, "--num-classes", 0, "--max-steps", 2, "--run-dir", tmp_path) == 0
    assert latest(tmp_path)["model"]["y_embedder.embedding_table.weight"].shape == (1, 16)


def test_bf16_follows_the_float32_losses(tmp_path):
    found = []
    for words in ("fp32", "bf16", "bf16 --compile aot_eager"):
        argv = [*TINY, "--precision", *words.split(), "--max-steps", 20, "--run-dir", tmp_path / words]
        assert call(train.main, *argv) == 0
        found.append([row["loss"] for row in metrics(tmp_path / words)])
        assert (found[-1] == found[0]) == (words == "fp32"), "bf16 must change the arithmetic"
        assert max(abs(x - y) / x for x, y in zip(found[0], found[-1], strict=True)) < 0.01, "1 % is the band"


# Inductor writes C++ and has it compiled. Where there is no compiler train.py refuses --compile, which test_cli.py
# holds it to, and the tests with aot_eager above trace the same blocks; there is nothing left to run here.
NO_COMPILER = not shutil.which(os.environ.get("CXX", "g++"))


def compiled_anew(argv):
    torch._dynamo.reset()  # what this process has compiled before it was forked
    train.main(argv)


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="no C++ compiler: train.py refuses --compile here, see test_cli.py")
def test_really_compiled_blocks_go_as_eager_ones(tmp_path, ranks):
    command = [*TINY, "--max-steps", "6", "--run-dir"]
    assert call(train.main, *command, tmp_path / "eager") == 0
    run = ranks(compiled_anew, [*command, tmp_path / "compiled", "--compile"])
    assert run.wait(timeout=300) == [0], run.text()
    a, b = ([row["loss"] for row in metrics(tmp_path / name)] for name in ("eager", "compiled"))
    assert a == pytest.approx(b, rel=1e-5)


def test_a_batch_that_the_processes_do_not_divide_is_refused_once(ranks):
    run = ranks(train.main, [*TINY, "--global-batch-size", 9, "--max-steps", 1], 2)
    assert run.wait() == [2, 2]
    assert "--global-batch-size 9: not a multiple of the 2 processes; 10 is" in run.text(0)
    assert run.text(1) == "", "rank 0 alone prints the line"


def elastic(argv):
    """The launcher behind torchrun's command line, with forked workers, whose imports it has made."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]  # as a shell starts it
    where = {"run_id": "test", "rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0"}
    config = LaunchConfig(1, 1, nproc_per_node=2, max_restarts=1, start_method="fork", **where)
    elastic_launch(config, paced)(argv)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank_and_a_hang_up_is_saved(tmp_path, image_folder, ranks):
    """With --max-restarts of two workers, one is killed; both are started again and go on. Then the terminal is closed."""
    options = [*FOLDER, "--data-path", image_folder, "--num-workers", "0", "--log-every", "1", "--ckpt-every", "5"]
    run = ranks(elastic, [*options, "--run-dir", tmp_path / "run", "--max-steps", 100_000])
    launcher = run.processes[0].pid
    wait_for(lambda: len(metrics(tmp_path / "run")) > 8, seconds=120)
    workers = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    wait_for(lambda: "Resumed from" in run.text() and len(metrics(tmp_path / "run")) > 20, seconds=240)
    os.kill(launcher, signal.SIGHUP)
    assert run.wait(timeout=240) == [99], "torchrun raises SignalException"
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "preempted"
    assert status["step"] == latest(tmp_path / "run")["step"]
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, status["step"] + 1))


# ----------------------------------------------------------------------------------------------------------------------
# Faults that were mended


def apart(argv):
    """Two nodes whose run folder has the same name and is not the same folder."""
    folder = Path(argv[argv.index("--run-dir") + 1]).parent / f"node{os.environ['RANK']}"
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    argv[argv.index("--run-dir") + 1] = "run"
    check = run_folder.RunFolder.check_shared
    run_folder.RunFolder.check_shared = lambda folder: check(folder, patience=0.5)
    train.main(argv)


def test_nodes_that_do_not_share_the_run_folder_are_refused(tmp_path, ranks):
    run = ranks(apart, [*TINY, "--max-steps", 2, "--run-dir", tmp_path / "run"], 2)
    assert run.wait() == [2, 2], run.text()
    assert "--run-dir run: process 1 does not see the folder that process 0 writes to" in run.text()
    assert not (tmp_path / "node0/run").exists(), "nothing was begun"


def test_a_mistake_leaves_no_numbered_folder(tmp_path, capfd):
    assert call(train.main, *TINY, "--data-path", tmp_path / "absent", "--results-dir", tmp_path / "results") == 2
    assert list((tmp_path / "results").iterdir()) == []


def test_out_of_memory_names_the_ways_out(tmp_path, monkeypatch, capfd):
    def no_memory(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more lines")

    monkeypatch.setattr(Trainer, "step", no_memory)
    assert call(train.main, *TINY, "--run-dir", tmp_path, "--max-steps", 2) == 1
    error = capfd.readouterr().err.splitlines()[-1]
    assert "out of memory" in error
    assert "pass --grad-accum or --grad-checkpoint" in error


def test_more_classes_than_the_data_has_get_a_warning(tmp_path, image_folder, capfd):
    command = [*FOLDER, "--data-path", image_folder, "--num-workers", 0, "--max-steps", 1, "--run-dir", tmp_path]
    assert call(train.main, *command, "--num-classes", 1000) == 0
    assert "--num-classes 1000: the data has 3 classes, so labels from 3 on are never trained" in capfd.readouterr().out


def test_names_of_the_original_release_can_be_imported_from_train():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    expected = 0.9 * a.weight + 0.1 * b.weight
    train.update_ema(a, b, decay=0.9)
    torch.testing.assert_close(a.weight, expected)
    train.requires_grad(a, False)
    assert not any(p.requires_grad for p in a.parameters())
    assert train.center_crop_arr is crop.center_crop_arr
