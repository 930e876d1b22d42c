"""docs/extending.md: every block of code runs as it stands, so that the page cannot go out of date."""

import multiprocessing
import os
import re
import signal
import sys
import traceback

import pytest
import torch
from helpers import ROOT, assert_same_state, latest, metrics, paced, wait_for, without_timings
from torch.utils.data import TensorDataset

import extract_latents
import train
from data.config import DataConfig
from data.images import DATASETS, MapDataset, load_dataset
from runtime.errors import UserError

PAGE = (ROOT / "docs/extending.md").read_text()
PARTS = re.split(r"^##+ (.+)$", PAGE, flags=re.M)[1:]  # title, text, title, text, ...
BLOCKS = [
    (title, code)
    for title, text in zip(PARTS[::2], PARTS[1::2], strict=True)
    for code in re.findall(r"```python\n(.*?)```", text, re.S)
]
SEAMS = "block condition autoencoder shape loss sampler data watch feature".split()


def test_every_seam_has_a_block_of_at_most_40_lines():
    titles = [title.lower() for title, _ in BLOCKS]
    assert all(any(seam in title for title in titles) for seam in SEAMS), titles
    for title, code in BLOCKS:
        assert code.count("\n") <= 40, f"{title}: {code.count(chr(10))} lines"


def run(code, folder):
    """In a forked process, because a block adds to the tables."""
    os.chdir(folder)
    os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    try:
        exec(compile(code, "docs/extending.md", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    os._exit(0)


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_block_runs(title, code, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=run, args=(code, tmp_path))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0, f"{title}:\n{(tmp_path / 'output.txt').read_text()[-3000:]}"


@pytest.fixture
def noise(monkeypatch):
    """A dataset of PyTorch, by a name that all commands know."""
    images = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(24) % 2)
    monkeypatch.setitem(DATASETS, "noise", lambda image_size, seed, with_text: MapDataset(data, ["even", "odd"], seed))
    return images


@pytest.mark.slow
def test_a_dataset_from_python_does_what_a_folder_does(noise, small_vae, tmp_path, ranks):
    """Killed and resumed it is bit for bit the undisturbed run, with grids and held-out images; its latents train too."""
    options = "--image-size 16 --hidden-size 16 --depth 1 --num-heads 2 --global-batch-size 4 --lr 1e-3 --device cpu"
    options += " --val-data-path noise --val-every 4 --sample-every 4 --sample-sampling-steps 2 --log-every 1"
    command = [*options.split(), "--ckpt-every", 2, "--data-path", "noise", "--vae", "none", "--run-dir"]
    run = ranks(paced, [*command, tmp_path / "killed", "--max-steps", 100_000])
    wait_for(lambda: metrics(tmp_path / "killed")[-1]["step"] > 5)
    os.kill(run.processes[0].pid, signal.SIGKILL)
    assert run.wait() == [-signal.SIGKILL]
    end = latest(tmp_path / "killed")["step"] + 5
    for folder in ("killed", "whole"):
        run = ranks(train.main, [*command, tmp_path / folder, "--max-steps", end])
        assert run.wait() == [0], run.text()
    assert_same_state(latest(tmp_path / "killed"), latest(tmp_path / "whole"))
    assert without_timings(tmp_path / "killed") == without_timings(tmp_path / "whole")
    assert "val_loss" in metrics(tmp_path / "whole")[4]
    assert (tmp_path / f"whole/samples/{end:07d}.png").exists()

    command = ["--data-path", "noise", "--vae", small_vae, "--image-size", 16, "--device", "cpu"]
    run = ranks(extract_latents.main, [*command, "--out", tmp_path / "latents"])
    assert run.wait() == [0], run.text()
    latents = load_dataset(DataConfig(str(tmp_path / "latents")), 16)
    assert (len(latents), latents.classes, latents.name(3)) == (24, ["even", "odd"], "3")


def test_items_keep_their_flips_and_sizes(noise):
    dataset = load_dataset(DataConfig("noise"), 16, seed=1)
    flipped = [not torch.equal(dataset[i, 0]["image"], noise[i]) for i in range(24)]
    assert 4 < sum(flipped) < 20
    dataset = load_dataset(DataConfig("noise", flip=False), 16)
    assert all(torch.equal(dataset[i, 0]["image"], noise[i]) for i in range(24))
    with pytest.raises(UserError, match="--image-size 8: the images of the dataset are 16x16 pixels; resize them, or"):
        load_dataset(DataConfig("noise"), 8)
    values = {"data_path": "x", "image_size": 8, "vae": "none", "dry_run": True, "device": "cpu"}
    config = train.TrainConfig.from_flat(values)
    with pytest.raises(UserError, match="--image-size 8: the images of the dataset are 16x16 pixels"):
        train.train(config, dataset=dataset)
