"""How fast stored latents are read, through data.loader as train.py uses it: the moments of an image or of its mirror,
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
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from runtime import files

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.timing import machine, synchronize
from cli import options
from data import images as data
from data import stored_latents as latent_folder
from runtime.errors import UserError
from training.watch import peak_memory

WARM_UP = 20  # batches: all that the workers read ahead, and more


def main(argv=None):
    parser = make_parser(__doc__, "a folder of extract_latents.py", images=20_000, batch_size=256)
    parser.add_argument("--cold", action="store_true", help="drop the files from the operating system's cache before each "
        "measurement, which then ends with the first epoch at the latest")  # fmt: skip
    args = parser.parse_args(argv)
    if args.cold and not args.data_path and args.images < 2 * (WARM_UP + 1) * args.batch_size:
        parser.error(
            f"--images {args.images}: --cold needs {2 * (WARM_UP + 1) * args.batch_size} or more, of which half count"
        )
    with parser.reporting(), folder_of(args, make_latents) as folder:
        flip = (files.read_json(Path(folder) / "index.json") or {}).get("mirrors", False)
        dataset = latent_folder.Latents(folder, flip=flip)
        shape = latent_folder.shard_shape(dataset.record, 0)[2:]
        report(args, dataset, "latents", {
            "shape": "x".join(map(str, shape)), "dtype": dataset.record["dtype"],
            "bytes_per_latent": int(np.prod(shape)) * np.dtype(dataset.record["dtype"]).itemsize,
        })  # fmt: skip


def make_parser(description, of, images, batch_size):
    parser = options.Parser(description.split("\n")[0])
    add = parser.add_argument
    add("--data-path", help=f"{of} (default: a temporary one is made)")
    add("--folder", default=tempfile.gettempdir(), help="on the disk to read from; the temporary folder is made in it")
    add("--images", type=options.positive, default=images, help="of the temporary folder")
    add("--image-size", type=options.positive, default=256, help="side in pixels")
    add("--batch-size", type=options.positive, default=batch_size, help="images in a batch")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the batches go")
    add("--num-workers", type=options.count, nargs="+", default=[0, 1, 2], help="processes that read; each is measured")
    add("--seconds", type=options.number(above=0), default=3.0, help="a measurement takes, at least")
    add("--repeats", type=options.positive, default=5, help="measurements of each, in turns, of which the median is shown")
    add("--json", action="store_true", help="print JSON instead of the table")
    return parser


@contextlib.contextmanager
def folder_of(args, make):
    """--data-path, or a temporary folder that make(folder, args) has filled."""
    if args.data_path:
        yield args.data_path
        return
    if not Path(args.folder).is_dir():
        raise UserError(f"--folder {args.folder}: no such folder")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make(Path(folder), args)
        yield folder


def make_latents(folder, args):
    record = {
        "version": latent_folder.VERSION, "vae": "random numbers", "encoder_crc32": "", "scaling": 0.18215, "shift": 0.0,
        "channels": 4, "factor": 8, "image_size": args.image_size, "dtype": "float16", "mirrors": True, "shard_size": 8192,
        "images": args.images, "classes": ["all"],
    }  # fmt: skip
    random = np.random.default_rng(0)
    for number in tqdm(range(latent_folder.num_shards(record)), desc="Making latents", unit="shard"):
        shape = latent_folder.shard_shape(record, number)
        moments = np.empty(shape, np.float16)
        for row in moments:
            row[:] = random.random(shape[1:], np.float32)
        latent_folder.write_shard(folder, number, moments)
    latent_folder.finish(folder, record, [f"all/{i}.png" for i in range(args.images)], [0] * args.images)


def report(args, dataset, unit, facts):
    """Measure each number of workers, in turns, and print."""
    rates = {workers: [] for workers in args.num_workers}
    for _ in tqdm(range(args.repeats), desc="Measuring", unit="turn", disable=args.json):
        for workers, found in rates.items():
            found.append(rate(args, dataset, workers))
    facts = {"machine": machine("cpu"), "torch": torch.__version__, **facts, "images": len(dataset),
        "batch_size": args.batch_size, "file_cache": "cold" if args.cold else "warm",
        "peak_memory_gib": round(peak_memory(torch.device("cpu")) / 2**30, 2)}  # fmt: skip
    rows = {workers: {"median": statistics.median(r), "least": min(r), "most": max(r)} for workers, r in rates.items()}
    if args.json:
        print(json.dumps({**facts, f"{unit}_per_second": rows}, indent=2))
        return
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items()))
    print(f"{'workers':>8}{unit + ' / s':>16}   (least to most of {args.repeats})")
    for workers, row in rows.items():
        print(f"{workers:8}{row['median']:16,.0f}   ({row['least']:,.0f} to {row['most']:,.0f})")


def rate(args, dataset, workers):
    """Images per second, after the workers' start and a few batches, when they only go to the device."""
    if args.cold:
        dataset.shards = {}  # pages in use by a map are not dropped
        for path in Path(dataset.folder).glob("*.npy"):
            drop_from_cache(path)
    order = data.GlobalOrder(len(dataset), args.batch_size, seed=0, stop=1 << 60)
    batches = iter(data.loader(dataset, order, workers, pin_memory=args.device == "cuda"))

    def take():
        batch = next(batches)
        batch.get("moments", batch.get("image")).to(args.device, non_blocking=True)
        return len(batch["index"])

    for _ in range(WARM_UP):
        take()
    # of a cold cache the first epoch alone; batches that the workers have read ahead already are not timed
    last = len(dataset) - (WARM_UP + 1) * args.batch_size if args.cold else float("inf")
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < args.seconds and count < last:
        count += take()
    synchronize(torch.device(args.device))
    return count / (time.perf_counter() - start)


def drop_from_cache(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
