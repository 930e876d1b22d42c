"""The paper's four block designs on the digits: equal sizes, equal steps, the demo's recipe, several seeds.

    python -m benchmarks.designs --json designs.json

Trains each design with train.py, draws from it with sample_ddp.py and measures the samples as the demo does. The runs are
kept in --folder; the same command resumes them.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.digits import measure
from checkpoint.config import BLOCKS
from cli.parser import Parser
from runtime.config import Config, option
from runtime.errors import RunError
from runtime.files import check_output, write_json

DEMO = (
    "--data-path digits --vae none --image-size 8 --num-classes 10 --model DiT-S/2 --hidden-size 96 --depth 4 "
    "--num-heads 4 --global-batch-size 64 --lr 2e-3 --ema-warmup --device cpu"
).split()
DRAW = (
    "--cfg-scale 3 --num-sampling-steps 50 --balanced-labels --per-proc-batch-size 50 --device cpu --folder samples".split()
)


@dataclass(frozen=True)
class DesignsConfig(Config):
    """Options of designs.py."""

    seeds: int = option(3, "number of seeds", low=1, high=1000)
    steps: int = option(1200, "training steps of each run", low=1, high=9_999_999)
    samples: int = option(500, "samples to measure, more than 20 so that each class has a few", low=20, high=1_000_000)
    parallel: int = option(2, "number of runs at a time, each on one core", low=1, high=1024)
    folder: str = option("results/designs", "folder in which the runs are kept")
    json: str | None = option(None, "write the numbers to this file (default: they are only printed)", metavar="FILE")


def run(block, seed, config):
    """Train one design with one seed, draw from it and measure the samples. Returns a dict of numbers."""
    folder = Path(config.folder) / f"{block}-{seed}"
    train = [*DEMO, "--block", block, "--global-seed", seed, "--max-steps", config.steps, "--run-dir", folder]
    train += ["--log-every", min(100, config.steps)]
    draw = [*DRAW, "--ckpt", folder / f"checkpoints/{config.steps:07d}.pt", "--num-fid-samples", config.samples]
    draw += ["--global-seed", seed, "--sample-dir", folder]
    for script, options in (("train.py", train), ("sample_ddp.py", draw)):
        command = [sys.executable, script, *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RunError(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with np.load(folder / "samples.npz") as file:
        numbers = measure(file["arr_0"], file["arr_1"])
    return {"block": block, "seed": seed, "first_loss": losses[0], "last_loss": float(np.mean(losses[-3:])), **numbers}


def main(argv=None):
    parser = Parser(DesignsConfig, __doc__)
    config = parser.parse(argv)
    jobs = [(block, seed) for seed in range(config.seeds) for block in BLOCKS]
    with parser.report_errors(), ThreadPoolExecutor(config.parallel) as pool:
        if config.json:
            check_output(config.json, "--json")
        results = list(tqdm(pool.map(lambda job: run(*job, config), jobs), total=len(jobs), unit="run"))
    columns = ["first_loss", "last_loss", "class_accuracy", "variety", "frechet_distance"]
    print("".join(f"{name:>18}" for name in ["block", *columns]))
    for block in BLOCKS:
        rows = [[result[column] for column in columns] for result in results if result["block"] == block]
        spread = np.std(rows, axis=0, ddof=1) if len(rows) > 1 else np.zeros(len(columns))
        cells = [f"{mean:.3f} ± {std:.3f}" for mean, std in zip(np.mean(rows, axis=0), spread, strict=True)]
        print("".join(f"{cell:>18}" for cell in [block, *cells]))
    if config.json:
        write_json(config.json, results)


if __name__ == "__main__":
    main()
