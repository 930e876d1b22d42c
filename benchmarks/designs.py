"""The paper's four block designs on the digits: equal size, equal steps, the demo's recipe, several seeds.

    python -m benchmarks.designs --json designs.json

Trains each with train.py, draws from it with sample_ddp.py and judges the samples as the demo does; prints losses and
numbers. Runs are kept under --folder and gone on with when the command is given again. An hour on one core.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.digits import judge
from models import BLOCKS

DEMO = (
    "--data-path digits --vae none --image-size 8 --num-classes 10 --model DiT-S/2 --hidden-size 96 --depth 4 "
    "--num-heads 4 --global-batch-size 64 --lr 2e-3 --ema-warmup --device cpu"
).split()


def run(block, seed, args):
    """Train, draw and judge one design with one seed. Returns a dict of numbers."""
    folder = Path(args.folder) / f"{block}-{seed}"
    train = [*DEMO, "--block", block, "--global-seed", seed, "--max-steps", args.steps, "--run-dir", folder]
    draw = [
        "--ckpt",
        folder / f"checkpoints/{args.steps:07d}.pt",
        "--cfg-scale",
        3,
        "--num-sampling-steps",
        50,
        "--device",
        "cpu",
    ]
    draw += ["--num-fid-samples", args.samples, "--balanced-labels", "--per-proc-batch-size", 50]
    draw += ["--global-seed", seed, "--sample-dir", folder, "--folder", "samples"]
    for script, options in (("train.py", train), ("sample_ddp.py", draw)):
        command = [sys.executable, script, *map(str, options)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with np.load(folder / "samples.npz") as file:
        numbers = judge(file["arr_0"], file["arr_1"])
    return {"block": block, "seed": seed, "first_loss": losses[0], "last_loss": float(np.mean(losses[-3:])), **numbers}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=1200, help="training steps")
    parser.add_argument("--samples", type=int, default=500, help="samples to judge")
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--folder", default="results/designs", help="where the runs are kept")
    parser.add_argument("--json", help="write the numbers here")
    args = parser.parse_args(argv)
    jobs = [(block, seed) for seed in range(args.seeds) for block in BLOCKS]
    with ThreadPoolExecutor(args.parallel) as pool:
        results = list(tqdm(pool.map(lambda job: run(*job, args), jobs), total=len(jobs), unit="run"))
    columns = ["first_loss", "last_loss", "read_as_asked", "variety", "frechet_distance"]
    print("".join(f"{name:>18}" for name in ["block", *columns]))
    for block in BLOCKS:
        rows = [r for r in results if r["block"] == block]
        cells = [f"{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}" for v in ([r[c] for r in rows] for c in columns)]
        print(f"{block:>18}" + "".join(f"{cell:>18}" for cell in cells))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
