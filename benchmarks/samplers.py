"""Samplers and guidance on the demo's model: what is read as asked for, and how far from real digits, by steps and by time.

    make demo
    python -m benchmarks.samplers --ckpt demo/run/checkpoints/0001200.pt --json samplers.json --plot assets/samplers.png

Every row draws the same images (seed and index give noise and label), judged as the demo's. Half an hour on one core.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.digits import judge
from checkpoint import files as checkpoint
from diffusion import samplers
from sampling import pipeline as sampling

STEPS = (5, 10, 20, 50, 250)
GUIDED = [  # each at 20 steps of dpm-solver++
    ("no guidance", {"cfg_scale": 1.0}),
    ("constant", {}),
    ("interval 0.2 to 0.6", {"guidance_interval": (0.2, 0.6)}),
    ("interval 0.2 to 0.9", {"guidance_interval": (0.2, 0.9)}),
    ("linear schedule", {"guidance_schedule": "linear"}),
    ("power-cosine schedule", {"guidance_schedule": "power-cosine"}),
    ("rescale 0.7", {"guidance_rescale": 0.7}),
    ("weaker model", {"guide": True}),
]


def settings(sampler, num_steps, **changes):
    plain = {
        "sampler": sampler, "num_sampling_steps": num_steps, "eta": 0.0, "spacing": None, "precision": None,
        "cfg_channels": None, "guidance_interval": None, "guidance_schedule": "constant", "guidance_rescale": 0.0,
    }  # fmt: skip
    return argparse.Namespace(**{**plain, **changes})


@torch.inference_mode()
def run(job):
    """Draw and judge one row with one seed. Returns a dict of numbers."""
    args, name, seed, sampler, num_steps, changes = job
    torch.set_num_threads(1)
    changes = dict(changes)
    guide = load(args.guide_ckpt) if changes.pop("guide", False) else None
    options, model = settings(sampler, num_steps, **{"cfg_scale": args.cfg_scale, **changes}), load(args.ckpt)
    images, labels, evaluations, start = [], np.arange(args.images) % model.num_classes, 0, time.perf_counter()

    def counted(*inputs):
        nonlocal evaluations
        evaluations += len(inputs[0])
        return model(*inputs)

    counted.null_class = model.null_class
    for first in range(0, args.images, args.batch_size):
        indices = range(first, min(first + args.batch_size, args.images))
        noises = 0 if sampling.is_deterministic(options) else num_steps
        noise = sampling.image_noise(seed, indices, noises, (1, 8, 8))
        denoise = sampling.denoiser(options, counted, torch.from_numpy(labels[indices.start : indices.stop]), guide)
        steps = sampling.steps(options, denoise, noise[0], lambda x, i, noise=noise: noise[1 + i])
        images.append(sampling.to_uint8(samplers.last(steps)))
    seconds = time.perf_counter() - start
    numbers = judge(np.concatenate(images), labels)
    row = {"name": name, "sampler": sampler, "steps": num_steps, "seed": seed, "seconds": seconds}
    return {**row, "evaluations_per_image": evaluations / args.images, **numbers}


def load(path):
    state = checkpoint.load(path)
    return sampling.build(state, checkpoint.model_config(state, path), path)


def summarise(results, names):
    """Mean and standard deviation over the seeds, in the order of names."""
    rows = []
    for key in names:
        group = [r for r in results if (r["name"], r["steps"]) == key]
        row = {"name": key[0], "steps": key[1], "seeds": len(group)}
        for column in ("evaluations_per_image", "seconds", "read_as_asked", "variety", "frechet_distance"):
            values = [r[column] for r in group]
            row[column], row[f"{column}_std"] = (
                float(np.mean(values)),
                float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            )
        rows.append(row)
    return rows


def print_table(rows):
    print("| sampler | steps | evaluations an image | seconds | read as asked | Fréchet distance | variety |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        cells = f"{r['evaluations_per_image']:.0f} | {r['seconds']:.1f} | {100 * r['read_as_asked']:.1f} %"
        spread = f"{r['frechet_distance']:.2f} ± {r['frechet_distance_std']:.2f}"
        print(f"| {r['name']} | {r['steps']} | {cells} | {spread} | {r['variety']:.2f} |")


def plot(rows, path):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, column, label in zip(
        figure.subplots(1, 2),
        ("frechet_distance", "read_as_asked"),
        ("Fréchet distance, pixels", "read as asked"),
        strict=True,
    ):
        for sampler in samplers.SAMPLERS:
            line = [r for r in rows if r["name"] == sampler]
            x, y = [r["evaluations_per_image"] / 2 for r in line], [r[column] for r in line]
            axes.plot(x, y, marker="o", markersize=4, label=sampler)
        axes.set(xscale="log", xlabel="evaluations of the guided model", ylabel=label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_yscale("log")
    figure.axes[1].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ckpt", required=True, help="the demo's model")
    parser.add_argument("--guide-ckpt", help="an earlier checkpoint, for guidance by a weaker model")
    parser.add_argument("--cfg-scale", type=float, default=2.0, help="guidance weight")
    parser.add_argument("--images", type=int, default=200, help="images a seed and row")
    parser.add_argument("--batch-size", type=int, default=100, help="images at once")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--parallel", type=int, default=2, help="rows at a time, one core each")
    parser.add_argument("--json", help="write the numbers here")
    parser.add_argument("--plot", help="draw the samplers here")
    args = parser.parse_args(argv)
    rows = [(sampler, sampler, steps, {}) for steps in reversed(STEPS) for sampler in samplers.SAMPLERS]
    guided = [(name, "dpm-solver++", 20, c) for name, c in GUIDED if args.guide_ckpt or "guide" not in c]
    jobs = [
        (args, name, seed, sampler, steps, tuple(changes.items()))
        for name, sampler, steps, changes in guided + rows
        for seed in range(args.seeds)
    ]
    torch.set_num_threads(1)
    with multiprocessing.get_context("fork").Pool(args.parallel) as pool:
        results = list(tqdm(pool.imap_unordered(run, jobs), total=len(jobs), unit="row"))
    by_steps = summarise(results, [(sampler, steps) for sampler in samplers.SAMPLERS for steps in STEPS])
    options = summarise(results, [(name, 20) for name, *_ in guided])
    print_table(by_steps)
    print_table(options)
    reference = next(r for r in by_steps if (r["name"], r["steps"]) == ("ddpm", 250))
    few = [
        r for r in by_steps if r["steps"] == 20 and 12 * r["evaluations_per_image"] <= reference["evaluations_per_image"]
    ]
    best = min(few, key=lambda r: abs(r["frechet_distance"] - reference["frechet_distance"]))
    points = 100 * (best["read_as_asked"] - reference["read_as_asked"])
    percent = 100 * (best["frechet_distance"] / reference["frechet_distance"] - 1)
    share = best["seconds"] / reference["seconds"]
    print(
        f"At 20 steps {best['name']} is {points:+.1f} points of accuracy and {percent:+.1f} % of distance from 250 of "
        f"ddpm, in 1/{1 / share:.1f} of its time"
    )
    if args.json:
        Path(args.json).write_text(json.dumps({"samplers": by_steps, "guidance": options}, indent=2) + "\n")
    if args.plot:
        plot(by_steps, args.plot)


if __name__ == "__main__":
    main()
