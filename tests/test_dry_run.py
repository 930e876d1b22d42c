"""`train.py --dry-run`: the plan against what the run then does, its warnings, and that it writes nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from helpers import call
from PIL import Image

import train
from training import cost, plan
from training.cost import build, training_memory

PLAN = [*TINY, "--dry-run"]


@pytest.fixture
def dry_run(tmp_path, monkeypatch, capsys):
    """dry_run(*options) -> {title: text} of the plan, and the warnings, of a command that has to write nothing."""

    def run(*options):
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.chdir(tmp_path)
        assert call(train.main, *options) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "Plan of the run; nothing is written"
        assert sorted(tmp_path.rglob("*")) == before
        rows = {line[2:26].strip(): line[26:] for line in lines if line.startswith("  ")}
        return rows, [line.removeprefix("Warning: ") for line in lines if line.startswith("Warning: ")]

    return run


def test_the_plan_of_a_tiny_run(dry_run):
    rows, warnings = dry_run(*PLAN, "--max-steps", 599, "--ema-warmup")
    assert rows["data"] == "1,797 images of 10 classes from digits"
    assert rows["model"] == "DiT-1x16/2 (adaln-zero), 16 tokens"
    assert rows["whole run"].startswith("599 steps, 4.0 epochs, ")
    assert re.match(r"\S+ s measured, \S+ images a second", rows["time of an update"])
    assert rows["time of the run"].endswith("hours on one process on CPU")
    assert warnings == []


# other systems give the peak of a process's whole life, which its start has raised before the steps
LINUX = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory from Linux's /proc")
REAL_STEPS = """
import sys, torch
from data.autoencoder import LatentSpace
from models import DiT_models
from runtime.distributed import Context
from training.config import ComputeConfig, RecipeConfig
from training.trainer import Trainer

def make_steps(name, num_images, **sizes):
    model = DiT_models[name](num_classes=10, **sizes)
    context, recipe = Context(0, 0, 1, torch.device("cpu")), RecipeConfig(global_batch_size=num_images)
    trainer = Trainer(recipe, ComputeConfig(), context, model, LatentSpace(4, 8, 1.0, 0.0))
    for _ in range(2):
        moments, label = torch.rand(num_images, 2, 4, 32, 32), torch.zeros(num_images, dtype=torch.int64)
        trainer.step({"moments": moments, "label": label})

torch.set_num_threads(1)
make_steps("DiT-S/8", 1, depth=1)  # what is loaded with the first step is no part of a step's memory
before = int(open("/proc/self/statm").read().split()[1]) * 4096
open("/proc/self/clear_refs", "w").write("5")  # the peak is counted from here
make_steps(sys.argv[1], int(sys.argv[2]), depth=int(sys.argv[3]))
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024 - before)
"""


@LINUX
def test_memory_is_within_15_per_cent_of_real_steps():
    """Of a model whose weights and activations take about as much. Of fewer blocks, the 40 MB that a process can use again
    would count."""
    name, depth = "DiT-S/2", 12
    command = [sys.executable, "-c", REAL_STEPS, name, "4", str(depth)]
    done = subprocess.run(command, cwd=Path(train.__file__).parent, capture_output=True, text=True, check=True)
    model = build(name, num_classes=10, depth=depth)
    planned = training_memory(model, 4, "fp32")["total"]
    assert planned == pytest.approx(int(done.stdout), rel=0.15)


@pytest.mark.parametrize("options", ["", "--keep-last 1", "--keep-last 2 --keep-every 4", "--more-ema-decays 0.9 0.99"])
def test_number_and_size_of_checkpoints_are_those_of_the_run(options, dry_run, tmp_path, monkeypatch, capsys):
    options = [*TINY, "--hidden-size", 64, "--max-steps", 7, "--ckpt-every", 2, "--run-dir", "run", *options.split()]
    for module in (plan, cost):
        monkeypatch.setattr(module, "gib", str)
    rows, _ = dry_run(*options, "--dry-run")
    written, kept, size = map(int, re.match(r"(\d+) to write, (\d+) to keep, (\d+) each", rows["checkpoints"]).groups())
    assert call(train.main, *options) == 0
    capsys.readouterr()
    found = list((tmp_path / "run/checkpoints").glob("*.pt"))
    assert written == 4, "of the steps 2, 4, 6 and 7"
    assert len(found) <= kept <= len(found) + 1, "of periodic ones, the latest may be counted twice"
    assert int(rows["memory: ema"]) == (3 if "0.9" in options else 1) * int(rows["memory: weights"]), "one for each average"
    assert found[0].stat().st_size == pytest.approx(size, rel=0.1)

    rows, _ = dry_run(*options, "--max-steps", 8, "--dry-run")
    assert rows["whole run"].endswith("; 7 steps are made"), "the plan of a run that is resumed"
    assert rows["checkpoints"].startswith("1 to write, ")


def test_warnings_about_the_recipe_and_the_classes(dry_run, image_folder):
    folder = ["--data-path", image_folder, "--image-size", 16, "--num-classes", 7, "--lr", "1e-4", "--epochs", 10]
    _, warnings = dry_run(*PLAN, *folder)
    text = "\n".join(warnings)
    assert "3 of 3 classes have fewer than 50 images: ant (4), bee (4), cat (4)" in text
    assert "--num-classes 7: the data has 3 classes, so labels from 3 on are never trained" in text
    assert "--lr 0.0001: is the paper's for batches of 256, --global-batch-size is 12; in proportion" in text
    assert "--ema-decay 0.9999: after 10 steps the average still has 100% of the initial weights" in text
    assert "--image-size" not in text, "no image is smaller than the crop"


def test_warnings_about_images_that_are_small_or_damaged(dry_run, tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    for i, side in enumerate((8, 30, 40, 40)):
        Image.new("RGB", (side, 50)).save(tmp_path / f"images/a/{i}.png")
    (tmp_path / "images/a/5.png").write_bytes(b"no image")
    options = ["--data-path", "images", "--image-size", 32, "--global-batch-size", 5, "--vae", "no/such"]
    rows, warnings = dry_run(*PLAN, *options)
    assert "--image-size 32: 2 of 5 images looked at are smaller, and will be enlarged" in warnings
    assert any(line.startswith("1 of 5 images looked at cannot be read") for line in warnings)
    assert any(line.startswith("training would not start: --vae no/such: no usable autoencoder") for line in warnings)
    assert rows["model"] == "DiT-1x16/2 (adaln-zero), 4 tokens", "counted with the released autoencoder's sizes"
    assert rows["time of an update"].endswith("not measured, because there is no autoencoder")


def test_real_steps_with_an_autoencoder(dry_run, image_folder, small_vae):
    rows, _ = dry_run(*PLAN, "--data-path", image_folder, "--image-size", 16, "--vae", small_vae, "--epochs", 5)
    assert " s measured, " in rows["time of an update"]


def test_what_is_too_slow_or_too_large_is_not_tried(dry_run, monkeypatch):
    monkeypatch.setattr(plan, "product_rate", lambda device, precision: 1e3)
    monkeypatch.setattr(plan, "measure", None)
    rows, _ = dry_run(*PLAN)
    assert rows["time of an update"].endswith("not measured, because one would take more than 10 s")
    monkeypatch.setattr(plan, "free_memory", lambda context: 1000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    rows, warnings = dry_run(*PLAN, "--ckpt-every", 10)
    assert rows["time of an update"].endswith("not measured, because the memory is too small")
    assert any(line.startswith("the device has 0.00 GiB free, of ") for line in warnings)
    assert any(
        "the checkpoints need" in line and line.endswith("--keep-last 1, or raise --ckpt-every") for line in warnings
    )


def test_gradient_accumulation_and_checkpointing_need_less_memory(dry_run, monkeypatch):
    monkeypatch.setattr(cost, "gib", str)
    options = [*PLAN, "--depth", 8, "--global-batch-size", 24]
    values = [
        int(dry_run(*options, *more)[0]["memory: activations"])
        for more in ([], ["--grad-accum", 2], ["--grad-checkpoint", 1])
    ]
    assert values[1] == pytest.approx(values[0] / 2, rel=0.01)
    assert values[2] < values[0] / 3


def test_two_processes_print_one_plan(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = ranks(train.main, [*PLAN, "--max-steps", 3], 2)
    assert started.wait() == [0, 0]
    assert started.text().count("Plan of the run") == 1
    assert "hours on 2 processes on CPU" in started.text()
