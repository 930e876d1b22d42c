"""Trackers that show a run's metrics and pictures in a browser. They follow metrics.jsonl: at each start of the run they
are given all of it again, so that after a kill and a resume no step is there twice and none is missing."""

import importlib.util
import json
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from runtime import files
from runtime.errors import UserError
from training.grids import grid_paths


class TensorBoard:
    """Event files in the run's folder `tensorboard`, which are made anew at each start."""

    def __init__(self, run_dir, options):
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(run_dir) / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        # purge_step: a TensorBoard that is open at the time forgets what it has read of the old files
        self.writer = SummaryWriter(folder, purge_step=0)
        rows = [f"| {name} | {value} |" for name, value in options.items()]
        self.writer.add_text("options", "\n".join(["| option | value |", "|---|---|", *rows]))

    def add_row(self, row):
        for name, value in row.items():
            if name != "step" and value is not None:
                self.writer.add_scalar(name, value, row["step"])

    def add_picture(self, step, pixels):
        self.writer.add_image("samples", pixels, step, dataformats="HWC")

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is kept in wandb.json; WANDB_MODE=offline records it in the run's folder `wandb`.

    It takes no step that comes before one it has. A record made offline is made anew at each start, as TensorBoard's is. A
    run on a server keeps its rows, and those that it has are not sent again."""

    def __init__(self, run_dir, options):
        import wandb

        path = Path(run_dir) / "wandb.json"
        name = (files.read_json(path) or {}).get("id") or secrets.token_hex(4)
        files.write_json(path, {"id": name})
        for old in Path(run_dir).glob(f"wandb/offline-run-*-{name}"):
            shutil.rmtree(old)
        self.make_image = wandb.Image
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dit"), id=name, name=Path(run_dir).name, dir=run_dir, config=options,
            resume="allow", settings=wandb.Settings(console="off", save_code=False),
        )  # fmt: skip
        self.first_step = self.run.step

    def add(self, step, values):
        if step >= self.first_step:
            self.run.log(values, step=step)

    def add_row(self, row):
        self.add(row["step"], {name: value for name, value in row.items() if name != "step" and value is not None})

    def add_picture(self, step, pixels):
        self.add(step, {"samples": self.make_image(pixels)})

    def flush(self):
        """Does nothing: another process writes what it is given."""

    def close(self):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_installed(names):
    """Raises UserError where the package of a tracker is missing."""
    for name in names or ():
        spec = importlib.util.find_spec(name)
        if not (spec and spec.origin):  # a folder of that name, which both packages make, is found too
            raise UserError(f"--report-to {name}: the package {name} is not installed; run: pip install {name}")


class Trackers:
    """The trackers `names` of the run in `run_dir`, with the history that the folder holds. options: of the run. A tracker
    that fails later is given up with a line of log(text), because training need not end for it; the next start of the run
    makes up for what it has missed."""

    def __init__(self, names, run_dir, options, log):
        self.log = log
        self.open = {}
        for name in dict.fromkeys(names or ()):
            try:
                self.open[name] = TRACKERS[name](run_dir, options)
            except Exception as error:  # every package raises its own kinds
                raise UserError(f"--report-to {name}: cannot start ({files.reason(error)}); leave it out") from None
        path = Path(run_dir) / "metrics.jsonl"
        if not self.open or not path.exists():
            return
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        history = [(row["step"], row) for row in rows] + [(int(grid.stem), grid) for grid in grid_paths(run_dir)]
        for step, entry in sorted(history, key=lambda entry: entry[0]):
            if isinstance(entry, dict):
                self._each(lambda tracker, row=entry: tracker.add_row(row))
            else:
                self._each(lambda tracker, step=step, path=entry: tracker.add_picture(step, read_pixels(path)))
        self._each(lambda tracker: tracker.flush())

    def add_row(self, row):
        """Add a row of metrics.jsonl, whose null is None."""
        self._each(lambda tracker: (tracker.add_row(row), tracker.flush()))

    def add_picture(self, step, picture):
        """Add a PIL image."""
        self._each(lambda tracker: (tracker.add_picture(step, np.asarray(picture)), tracker.flush()))

    def close(self):
        self._each(lambda tracker: tracker.close())

    def _each(self, action):
        for name, tracker in list(self.open.items()):
            try:
                action(tracker)
            except Exception as error:  # every package raises its own kinds
                del self.open[name]
                why = f"{type(error).__name__}: {files.reason(error)}"
                self.log(f"--report-to {name}: given up ({why}); metrics.jsonl has all numbers")


def read_pixels(path):
    """A picture file as (H, W, 3) uint8."""
    with Image.open(path) as file:
        return np.asarray(file.convert("RGB"))
