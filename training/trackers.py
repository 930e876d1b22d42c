"""Trackers that show a run's metrics and images in a browser. They follow metrics.jsonl: at each start of the run they are
given all of it again, so that after a kill and a resume no step is there twice and none is missing."""

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


class TensorBoard:
    """Event files in the run's folder `tensorboard`, which are made anew at each start."""

    def __init__(self, run_dir, options):
        from torch.utils.tensorboard import SummaryWriter

        folder = Path(run_dir) / "tensorboard"
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        # purge_step: a TensorBoard that is open at the time forgets what it has read of the old files
        self.writer = SummaryWriter(folder, purge_step=0, flush_secs=10)
        rows = [f"| {name} | {value} |" for name, value in options.items()]
        self.writer.add_text("options", "\n".join(["| option | value |", "|---|---|", *rows]))
        self.close = self.writer.close

    def add(self, step, values):
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self.writer.add_image(name, value, step, dataformats="HWC")
            else:
                self.writer.add_scalar(name, value, step)


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is kept in wandb.json; WANDB_MODE=offline records it in the run's folder `wandb`,
    anew at each start. A run on a server keeps its rows: those that it has are not sent again."""

    def __init__(self, run_dir, options):
        import wandb

        path = Path(run_dir) / "wandb.json"
        name = (files.read_json(path) or {}).get("id") or secrets.token_hex(4)
        files.write_json(path, {"id": name})
        for old in Path(run_dir).glob(f"wandb/offline-run-*-{name}"):
            shutil.rmtree(old)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "dit"), id=name, name=Path(run_dir).name, dir=run_dir, config=options,
            resume="allow", settings=wandb.Settings(console="off", save_code=False),
        )  # fmt: skip
        self.make_image, self.first_step, self.close = wandb.Image, self.run.step, self.run.finish

    def add(self, step, values):
        if step >= self.first_step:
            images = {name: self.make_image(value) for name, value in values.items() if isinstance(value, np.ndarray)}
            self.run.log({**values, **images}, step=step)


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def check_installed(names):
    """Raises UserError where the package of a tracker is missing."""
    for name in names or ():
        spec = importlib.util.find_spec(name)
        if not (spec and spec.origin):  # a folder of that name, which both packages make, is found too
            raise UserError(f"--report-to {name}", f"the package {name} is not installed", f"run: pip install {name}")


class Trackers:
    """The trackers `names` of the run in `run_dir`, with the history that the folder holds. options: of the run. A tracker
    that fails later is closed with a line of log(text): training need not end for it, and the next start adds the rest."""

    def __init__(self, names, run_dir, options, log):
        self.log, self.open = log, {}
        for name in dict.fromkeys(names or ()):
            try:
                self.open[name] = TRACKERS[name](run_dir, options)
            except Exception as error:  # every package raises its own kinds
                raise UserError(f"--report-to {name}", f"cannot start ({files.reason(error)})", "leave it out") from None
        path = Path(run_dir) / "metrics.jsonl"
        if self.open and path.exists():
            history = [(row.pop("step"), row) for row in map(json.loads, path.read_text().splitlines())]
            history += [(step, {name: path}) for step, name, path in image_paths(run_dir)]
            self.add(*sorted(history, key=lambda entry: entry[0]))

    def add(self, *rows):
        """Add pairs of a step and {name: number, PIL image, or path of an image}; None is left out."""
        for step, row in rows if self.open else ():
            values = {name: read_pixels(value) for name, value in row.items() if value is not None}
            self._each(lambda tracker, step=step, values=values: tracker.add(step, values))

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


def image_paths(run_dir):
    """[(step, name, path)] of the images in a run's folder, as `RunFolder.write_image` names them."""
    parts = [(path.stem.rpartition("-"), path) for path in sorted(Path(run_dir, "samples").glob("*.png"))]
    return [(int(step), name or "samples", path) for (name, _, step), path in parts if step.isdecimal()]


def read_pixels(value):
    """A PIL image, or a file of one, as (H, W, 3) uint8; a number as it is."""
    if isinstance(value, Path):
        with Image.open(value) as file:
            return np.asarray(file.convert("RGB"))
    return np.asarray(value) if isinstance(value, Image.Image) else value
