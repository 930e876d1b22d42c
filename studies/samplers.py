"""Samplers and guidance on a model of digits: how good the samples are, by evaluations of the model and by time.

    python -m studies.samplers --ckpt results/digits/checkpoints/0001200.pt --json samplers.json --plot samplers.png

docs/training.md has the command that trains this model. All rows draw from the same noise and labels, and are measured as
the demo is. It takes half an hour on one core.
"""

import multiprocessing
import time
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.timing import table
from diffusion.registry import SAMPLERS
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import write_errors, write_json
from runtime.parser import Parser
from sampling.config import ComputeConfig, DrawConfig, GuidanceConfig, SamplerConfig, SourceConfig
from sampling.opened import Opened
from sampling.pipeline import Pipeline, to_uint8
from studies.digits import measure
from studies.plots import finish, save

NAMES = [name for name, sampler in SAMPLERS.items() if not sampler.flow]
STEPS = (5, 10, 20, 50, 250)
GUIDED = [  # each at 20 steps of dpm-solver++
    ("no guidance", {"cfg_scale": 1.0}),
    ("constant", {}),
    ("interval 0.2 to 0.6", {"guidance_interval": (0.2, 0.6)}),
    ("interval 0.2 to 0.9", {"guidance_interval": (0.2, 0.9)}),
    ("linear schedule", {"guidance_schedule": "linear"}),
    ("power-cosine schedule", {"guidance_schedule": "power-cosine"}),
    ("rescale 0.7", {"guidance_rescale": 0.7}),
    ("weaker model", {"guide_ckpt": None}),  # filled in with --guide-ckpt
]
COLUMNS = ("evaluations_per_image", "seconds", "class_accuracy", "variety", "frechet_distance")


@dataclass(frozen=True)
class SamplersConfig(Config):
    """Options of samplers.py."""

    ckpt: str = option(help="checkpoint of a model of digits", metavar="FILE")
    guide_ckpt: str | None = option(None, "an earlier checkpoint, to also measure guidance by a weaker model (default: "
        "not measured)", metavar="FILE")  # fmt: skip
    cfg_scale: float = option(2.0, "scale of classifier-free guidance", low=0)
    images: int = option(200, "images per seed and row", low=20, high=1_000_000)
    batch_size: int = option(100, "images drawn at once", low=1, high=65536)
    seeds: int = option(3, "number of seeds", low=1, high=1000)
    parallel: int = option(2, "number of rows computed at a time, each on one core", low=1, high=1024)
    json: str | None = option(None, "also write the numbers to this file", metavar="FILE", path="output")
    plot: str | None = option(None, "draw the samplers into this .png file", metavar="FILE", path="output")


@torch.inference_mode()
def run(job):
    """Draw and measure one row with one seed. Returns a dict of numbers."""
    config, name, seed, sampler, guidance = job
    torch.set_num_threads(1)
    pipeline = Pipeline.load(config.ckpt, sampler, guidance, ComputeConfig(device="cpu"))
    evaluated = []  # the batch sizes of the model's evaluations
    pipeline.model.register_forward_pre_hook(lambda model, inputs: evaluated.append(len(inputs[0])))
    labels, images, start = np.arange(config.images) % pipeline.condition.num_classes, [], time.perf_counter()
    for first in range(0, config.images, config.batch_size):
        indices = range(first, min(first + config.batch_size, config.images))
        images.append(to_uint8(pipeline(labels[indices], *pipeline.noise(seed, indices))))
    seconds = time.perf_counter() - start
    row = {"name": name, "sampler": sampler.sampler, "steps": sampler.num_sampling_steps, "seed": seed, "seconds": seconds}
    return {**row, "evaluations_per_image": sum(evaluated) / config.images, **measure(np.concatenate(images), labels)}


def summarise(results, rows):
    """Mean and standard deviation over the seeds. rows: the (name, steps) in the order wanted."""
    summary = []
    for name, steps in rows:
        group = [result for result in results if (result["name"], result["steps"]) == (name, steps)]
        row = {"name": name, "steps": steps, "seeds": len(group)}
        for column in COLUMNS:
            values = [result[column] for result in group]
            row[column], row[f"{column}_std"] = float(np.mean(values)), float(np.std(values, ddof=len(values) > 1))
        summary.append(row)
    return summary


def print_table(rows):
    print(table([{
        "sampler": r["name"], "steps": r["steps"], "evaluations per image": f"{r['evaluations_per_image']:.0f}",
        "seconds": f"{r['seconds']:.1f}", "class accuracy": f"{r['class_accuracy']:.1%}",
        "Fréchet distance": f"{r['frechet_distance']:.2f} ± {r['frechet_distance_std']:.2f}",
        "variety": f"{r['variety']:.2f}",
    } for r in rows]))  # fmt: skip


def print_best_of_20_steps(rows):
    """Compare the sampler of 20 steps that is nearest to 250 steps of ddpm with those."""
    reference = next(r for r in rows if (r["name"], r["steps"]) == ("ddpm", 250))
    most = reference["evaluations_per_image"] / 12
    few = [r for r in rows if r["steps"] == 20 and r["evaluations_per_image"] <= most]
    best = min(few, key=lambda r: abs(r["frechet_distance"] - reference["frechet_distance"]))
    points = 100 * (best["class_accuracy"] - reference["class_accuracy"])
    percent = 100 * (best["frechet_distance"] / reference["frechet_distance"] - 1)
    print(
        f"Compared with 250 steps of ddpm, 20 steps of {best['name']} change the class accuracy by {points:+.1f} points "
        f"and the Fréchet distance by {percent:+.1f} %, in 1/{reference['seconds'] / best['seconds']:.1f} of the time"
    )


def plot(rows, path):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    labels = {"frechet_distance": "Fréchet distance, pixels", "class_accuracy": "class accuracy"}
    for axes, (column, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        for sampler in NAMES:
            line = [r for r in rows if r["name"] == sampler]
            x, y = [r["evaluations_per_image"] / 2 for r in line], [r[column] for r in line]
            axes.plot(x, y, marker="o", markersize=4, label=sampler)
        finish(axes, "", "evaluations of the guided model", label, log="xy" if column == "frechet_distance" else "x")
    save(figure, path)


def make_jobs(config):
    """The rows of the two tables, samplers and guidance, as lists of (name, SamplerConfig, GuidanceConfig)."""
    plain, twenty = GuidanceConfig(cfg_scale=config.cfg_scale), SamplerConfig("dpm-solver++", 20)
    samplers = [(name, SamplerConfig(name, steps), plain) for name in NAMES for steps in STEPS]
    guided = []
    for name, changes in GUIDED:
        changes = {"guide_ckpt": config.guide_ckpt} if "guide_ckpt" in changes else changes
        if changes != {"guide_ckpt": None}:
            guided.append((name, twenty, GuidanceConfig(**{"cfg_scale": config.cfg_scale, **changes})))
    return samplers, guided


def main(argv=None):
    parser = Parser(SamplersConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        samplers, guided = make_jobs(config)
        for _, sampler, guidance in guided:
            drawing = DrawConfig(source=SourceConfig(ckpt=config.ckpt), sampler=sampler, guidance=guidance)
            if Opened.open(drawing).settings["image_size"] != 8:
                raise UserError(f"--ckpt {config.ckpt}: is not a model of the digits, whose images are 8x8 pixels")
        jobs = [(config, *row[:1], seed, *row[1:]) for row in [*guided, *samplers] for seed in range(config.seeds)]
        torch.set_num_threads(1)
        with multiprocessing.get_context("fork").Pool(config.parallel) as pool:
            results = list(tqdm(pool.imap_unordered(run, jobs), total=len(jobs), unit="row"))
        tables = [summarise(results, [(name, s.num_sampling_steps) for name, s, _ in rows]) for rows in (samplers, guided)]
        for rows in tables:
            print_table(rows)
        print_best_of_20_steps(tables[0])
        with write_errors("the results"):
            if config.json:
                write_json(config.json, dict(zip(("samplers", "guidance"), tables, strict=True)))
            if config.plot:
                plot(tables[0], config.plot)


if __name__ == "__main__":
    main()
