"""What a checkpoint costs the training loop: the copy that the loop waits for, beside writing the file at once.

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
from benchmarks.timing import synchronize
from checkpoint import files
from checkpoint.config import MODELS
from checkpoint.saver import BackgroundSaver
from cli.parser import Parser
from models import DiT_models
from runtime.config import Config, option
from runtime.devices import pick_device
from runtime.files import check_output, write_errors, write_json
from training.ema import EMA


@dataclass(frozen=True)
class SavingConfig(Config):
    """Options of saving.py."""

    model: str = option("DiT-S/2", "model whose training state is saved", choices=MODELS, metavar="DiT-{S,B,L,XL}/{2,4,8}")
    device: str = option("cpu", "where the state is", choices=("cpu", "cuda"))
    folder: str = option(".", "folder on the disk to measure; a temporary folder is made in it")
    repeats: int = option(5, "number of measurements, whose median is printed", low=1, high=10_000)
    json: str | None = option(None, "write the numbers to this file (default: they are only printed)", metavar="FILE")


def measure(config):
    """({what: seconds of each repetition}, bytes of a checkpoint)."""
    device = torch.device(pick_device(config.device))
    state = trained_state(config.model, device)
    seconds = {"written at once": [], "copied, the loop waits": [], "then written in the background": []}

    def timed(what, action):
        synchronize(device)
        start = time.perf_counter()
        action()
        seconds[what].append(time.perf_counter() - start)

    with write_errors(f"--folder {config.folder}"), tempfile.TemporaryDirectory(dir=config.folder) as folder:
        saver = BackgroundSaver(folder, keep_last=1)
        for step in range(1, 2 * config.repeats, 2):
            timed("written at once", lambda step=step: files.save(f"{folder}/{step:07d}.pt", state))
            timed("copied, the loop waits", lambda step=step: saver.save(step + 1, state))
            timed("then written in the background", saver.wait)
        return seconds, os.path.getsize(files.newest_first(folder)[0])


def trained_state(name, device):
    """Model, EMA and optimizer after one update."""
    model = DiT_models[name]().to(device)
    ema, optimizer = EMA(model), torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in ema.weights:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model.state_dict(), "ema": ema.module.state_dict(), "opt": optimizer.state_dict()}


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
