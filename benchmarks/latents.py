"""How fast stored latents are read, through make_loader as train.py uses it: the moments of an image or of its mirror,
shuffled, in batches.

    OMP_NUM_THREADS=1 python benchmarks/latents.py --num-workers 0 1 2
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.timing import machine, synchronize
from data.order import GlobalOrder, make_loader
from data.stored_latents import VERSION, Settings, StoredLatents, write_index, write_shard
from runtime import files
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.parser import Parser
from training.meter import peak_memory

WARM_UP = 20  # batches: all that the workers read ahead, and more


@dataclass(frozen=True)
class ReadingConfig(Config):
    """Options of the benchmarks that read data."""

    data_path: str | None = option(None, "folder to read (default: a temporary one is made)")
    folder: str = option(tempfile.gettempdir(), "where the temporary folder is made, on the disk to measure")
    images: int = option(20_000, "number of images in the temporary folder", low=1, high=10**8)
    image_size: int = option(256, "side of the images in pixels", low=8, high=65536)
    batch_size: int = option(256, "number of images in a batch", low=1, high=65536)
    device: str = option("cpu", "where the batches go", choices=("cpu", "cuda"))
    num_workers: tuple[int, ...] = option((0, 1, 2), "numbers of processes that read; each is measured", low=0, high=1024)
    seconds: float = option(3.0, "duration of a measurement, at least", above=0)
    repeats: int = option(5, "number of measurements of each, in turns; their median is shown", low=1)
    json: bool = option(False, "print JSON instead of the table")


@dataclass(frozen=True)
class LatentsConfig(ReadingConfig):
    """Options of this benchmark."""

    cold: bool = option(False, "drop the files from the operating system's cache before each measurement, which then ends "
        "with the first epoch at the latest")  # fmt: skip

    def check(self):
        needed = 2 * (WARM_UP + 1) * self.batch_size
        if self.cold and not self.data_path and self.images < needed:
            raise UserError(f"--images {self.images}: --cold needs {needed} or more, of which half count")


def main(argv=None):
    parser = Parser(LatentsConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors(), folder_of(config, make_latents) as folder:
        flip = (files.read_json(Path(folder) / "index.json") or {}).get("mirrors") is True
        dataset = StoredLatents(folder, flip=flip)
        shape, dtype = dataset.settings.shard_shape(0)[2:], dataset.settings.dtype
        report(config, dataset, "latents", {
            "shape": "x".join(map(str, shape)), "dtype": dtype,
            "bytes_per_latent": int(np.prod(shape)) * np.dtype(dtype).itemsize,
        }, config.cold)  # fmt: skip


@contextlib.contextmanager
def folder_of(config, make):
    """--data-path, or a temporary folder that make(folder, config) has filled."""
    if config.data_path:
        yield config.data_path
        return
    if not Path(config.folder).is_dir():
        raise UserError(f"--folder {config.folder}: no such folder")
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        make(Path(folder), config)
        yield folder


def make_latents(folder, config):
    settings = Settings(
        version=VERSION, vae="random numbers", encoder_crc32="0" * 8, scaling=0.18215, shift=0.0, channels=4, factor=8,
        image_size=config.image_size, dtype="float16", mirrors=True, batch_size=1, shard_size=8192, tf32=False,
        images=config.images, names_crc32="0" * 8, classes=("all",),
    )  # fmt: skip
    random = np.random.default_rng(0)
    for number in tqdm(range(settings.num_shards), desc="Making latents", unit="shard"):
        moments = np.empty(settings.shard_shape(number), np.float16)
        for row in moments:
            row[:] = random.random(row.shape, np.float32)
        write_shard(folder, number, moments)
    write_index(folder, settings, [f"all/{i}.png" for i in range(config.images)], [0] * config.images)


def report(config, dataset, unit, facts, cold=False):
    """Measure each number of workers, in turns, and print."""
    rates = {workers: [] for workers in config.num_workers}
    for _ in tqdm(range(config.repeats), desc="Measuring", unit="turn", disable=config.json):
        for workers, found in rates.items():
            found.append(rate(config, dataset, workers, cold))
    facts = {"machine": machine("cpu"), "torch": torch.__version__, **facts, "images": len(dataset),
        "batch_size": config.batch_size, "file_cache": "cold" if cold else "warm",
        "peak_memory_gib": round(peak_memory(torch.device("cpu")) / 2**30, 2)}  # fmt: skip
    rows = {workers: {"median": statistics.median(r), "least": min(r), "most": max(r)} for workers, r in rates.items()}
    if config.json:
        print(json.dumps({**facts, f"{unit}_per_second": rows}, indent=2))
        return
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    print(f"{'workers':>8}{unit + ' / s':>16}   (least to most of {config.repeats})")
    for workers, row in rows.items():
        print(f"{workers:8}{row['median']:16,.0f}   ({row['least']:,.0f} to {row['most']:,.0f})")


def rate(config, dataset, workers, cold):
    """Images per second, read and moved to the device, after the workers' start and a few batches."""
    if cold:
        dataset.shards = {}  # pages in use by a map are not dropped
        for path in Path(dataset.folder).glob("*.npy"):
            drop_from_cache(path)
    order = GlobalOrder(len(dataset), config.batch_size, seed=0, stop=1 << 60)
    batches = iter(make_loader(dataset, order, workers, pin_memory=config.device == "cuda"))

    def take():
        batch = next(batches)
        batch.get("moments", batch.get("image")).to(config.device, non_blocking=True)
        return len(batch["index"])

    for _ in range(WARM_UP):
        take()
    # of a cold cache the first epoch alone; batches that the workers have read ahead already are not timed
    last = len(dataset) - (WARM_UP + 1) * config.batch_size if cold else float("inf")
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < config.seconds and count < last:
        count += take()
    synchronize(torch.device(config.device))
    return count / (time.perf_counter() - start)


def drop_from_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
