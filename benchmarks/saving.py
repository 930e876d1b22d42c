"""What a checkpoint costs the training loop: the copy that the loop waits for, beside writing the file at once, and all
that the loop loses until the file is written, because the steps meanwhile are slower.

OMP_NUM_THREADS=1 python -m benchmarks.saving --model DiT-S/2
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python benchmarks/saving.py`
from benchmarks import train_step
from benchmarks.timing import synchronize
from checkpoint import files
from checkpoint.config import MODELS, DesignOptions
from checkpoint.saver import BackgroundSaver
from runtime.config import Config, option
from runtime.devices import pick_device
from runtime.files import check_output, write_errors, write_json
from runtime.parser import Parser
from training import setup

STEP = "a training step"
ROWS = "written at once", "copied, the loop waits", "then written in the background", "lost by a loop that goes on", STEP


@dataclass(frozen=True)
class SavingConfig(Config):
    """Options of saving.py."""

    design: DesignOptions
    model: str = option("DiT-S/2", "model whose training state is saved", choices=MODELS, metavar="DiT-{S,B,L,XL}/{2,4,8}")
    batch_size: int = option(4, "images of a training step", low=1, high=65536)
    device: str = option("cpu", "where the state is", choices=("cpu", "cuda"))
    folder: str = option(".", "folder on the disk to measure; a temporary folder is made in it")
    repeats: int = option(5, "number of measurements, whose median is printed", low=1, high=10_000)
    json: str | None = option(None, "write the numbers to this file (default: they are only printed)", metavar="FILE")


def measure(config):
    """({what: seconds of each repetition}, bytes of a checkpoint)."""
    options = {**config.design.flat(), "model": config.model, "batch_size": config.batch_size}
    options["device"] = pick_device(config.device)
    step_config = setup.resolve_precision(train_step.StepConfig.from_flat(options), torch.device(options["device"]))
    trainer, batch = train_step.make_trainer(step_config)
    step_of_loop, seconds = lambda: trainer.step(batch), {what: [] for what in ROWS}

    def timed(what, action):
        synchronize(trainer.device)
        start = time.perf_counter()
        action()
        synchronize(trainer.device)
        seconds[what].append(time.perf_counter() - start)

    def steps_until_written(saver, step, usual):
        """Returns the seconds that these steps took longer than usually, the copy among them."""
        synchronize(trainer.device)
        start, number = time.perf_counter(), 0
        saver.save(step, trainer.state_dict())
        while saver.thread and saver.thread.is_alive():
            step_of_loop()
            synchronize(trainer.device)
            number += 1
        return time.perf_counter() - start - number * usual

    with write_errors(f"--folder {config.folder}"), tempfile.TemporaryDirectory(dir=config.folder) as folder:
        saver = BackgroundSaver(folder, keep_last=1)
        step_of_loop()  # makes the optimizer's state
        for step in range(1, 3 * config.repeats, 3):
            timed(STEP, step_of_loop)
            timed(STEP, step_of_loop)
            timed("written at once", lambda step=step: files.save(f"{folder}/{step:07d}.pt", trainer.state_dict()))
            timed("copied, the loop waits", lambda step=step: saver.save(step + 1, trainer.state_dict()))
            timed("then written in the background", saver.wait)
            lost = steps_until_written(saver, step + 2, statistics.median(seconds[STEP]))
            saver.wait()
            seconds["lost by a loop that goes on"].append(lost)
        return seconds, os.path.getsize(files.newest_first(folder)[0])


def main(argv=None):
    parser = Parser(SavingConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        if config.json:
            check_output(config.json, "--json")
        seconds, size = measure(config)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{config.model} on {config.device}, {size / 2**20:.0f} MiB, median of {config.repeats} (min to max)")
    for name, values in seconds.items():
        print(f"{name:32}{medians[name]:8.3f} s   ({min(values):.3f} to {max(values):.3f})")
    if config.json:
        write_json(config.json, {"model": config.model, "bytes": size, **medians})


if __name__ == "__main__":
    main()
