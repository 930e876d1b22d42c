"""How much sooner a fine-tuned model learns the digits 5 to 9 than one that is trained on them from scratch.

    OMP_NUM_THREADS=1 python -m studies.finetune --json finetune.json --plot finetune.png

A model is trained on the digits 0 to 4. Then train.py's recipe is run on 5 to 9 twice: with --init-from, and without. Every
few steps images are drawn, and a classifier of all ten digits judges whether they show the digits that were asked for.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from checkpoint import files
from data.autoencoder import Pixels
from data.images import Digits
from data.order import GlobalOrder, make_loader
from runtime.config import Config, option
from runtime.files import write_errors, write_json
from runtime.parser import Parser
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline, to_uint8
from studies.digits import real_digits
from studies.plots import finish, save
from studies.recipes import begin

RECIPE = "--data-path digits --vae none --image-size 8 --num-classes 5 --global-batch-size 64 --lr 2e-3 --ema-warmup"
SIZES = "--hidden-size 96 --depth 4 --num-heads 4 --patch-size 2"
SAMPLER, GUIDANCE = SamplerConfig("ddim", 10), GuidanceConfig(cfg_scale=3.0)


@dataclass(frozen=True)
class FinetuneBenchmarkConfig(Config):
    """Options of finetune.py."""

    seeds: int = option(3, "number of seeds", low=1, high=1000)
    source_steps: int = option(600, "training steps on the digits 0 to 4", low=1, high=100_000)
    max_steps: int = option(1500, "most training steps on the digits 5 to 9", low=1, high=100_000)
    target: float = option(0.95, "class accuracy at which the training on 5 to 9 ends", above=0, high=1)
    every: int = option(25, "training steps between measurements of the class accuracy", low=1, high=100_000)
    samples: int = option(200, "images drawn for a measurement", low=5, high=100_000)
    json: str | None = option(None, "also write the numbers to this file", metavar="FILE", path="output")
    plot: str | None = option(None, "draw the class accuracy into this .png file", metavar="FILE", path="output")


class FiveDigits(Digits):
    """The digits `first` to `first` + 4, as classes 0 to 4."""

    def __init__(self, first):
        super().__init__(image_size=8)
        kept = (self.labels >= first) & (self.labels < first + 5)
        self.dataset = [self.dataset[index] for index in kept.nonzero()[0]]
        self.labels, self.classes = self.labels[kept] - first, self.classes[first:][:5]


def class_accuracy(model, first, samples):
    """Share of images of the digits `first` to `first` + 4 that the classifier takes for the digit that was asked for."""
    pipeline, labels = Pipeline(model, Pixels(1), SAMPLER, GUIDANCE), np.arange(samples) % 5
    images = to_uint8(pipeline(labels, *pipeline.noise(seed=0, indices=range(samples)))).mean(axis=-1)
    return float((real_digits()[2].predict(images.reshape(samples, -1) / 127.5 - 1) == labels + first).mean())


def run(argv, first, config):
    """Train on five digits as train.py would with these words. Returns (Trainer, [[step, class accuracy], ...]); without a
    FinetuneBenchmarkConfig nothing is measured, else the training ends where the accuracy reaches the target."""
    dataset, curve = FiveDigits(first), []
    options, trainer = begin([*RECIPE.split(), "--device", "cpu", *argv], Pixels(1), len(dataset), dataset.classes)
    recipe = options.recipe
    end = recipe.max_steps * recipe.global_batch_size
    order = GlobalOrder(len(dataset), recipe.global_batch_size, recipe.global_seed, 0, 1, 0, end)
    for batch in make_loader(dataset, order, num_workers=0, pin_memory=False):
        trainer.step(batch)
        if config and trainer.steps_made % config.every == 0:
            curve.append([trainer.steps_made, class_accuracy(trainer.ema.module, first, config.samples)])
            if curve[-1][1] >= config.target:
                break
    return trainer, curve


def compare(seed, config, folder):
    """The three trainings of one seed. Returns a dict of the two curves and of the steps that the target took, None where
    it was not reached."""
    seed_words, path = ["--global-seed", str(seed)], Path(folder) / f"{seed}.pt"
    trainer, _ = run([*SIZES.split(), *seed_words, "--max-steps", str(config.source_steps)], 0, None)
    files.save(path, {"ema": trainer.ema.module.state_dict(), "model_config": trainer.model.config})
    accuracy = class_accuracy(trainer.ema.module, 0, config.samples)
    result = {"seed": seed, "source_class_accuracy": accuracy}
    # --keep-classes: the digits 5 to 9 are other classes than 0 to 4, though they are as many
    starts = {"finetuned": ["--init-from", str(path), "--keep-classes", *"-----"], "scratch": SIZES.split()}
    for name, words in starts.items():
        _, curve = run([*words, *seed_words, "--max-steps", str(config.max_steps)], 5, config)
        reached = curve and curve[-1][1] >= config.target
        result |= {name: curve, f"{name}_steps": curve[-1][0] if reached else None}
    return result


def plot(results, target, path):
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, colour, label in (("finetuned", "C1", "fine-tuned from 0 to 4"), ("scratch", "C0", "from scratch")):
        for i, result in enumerate(results):
            axes.plot(*zip(*result[name], strict=True), color=colour, label=None if i else label)
    axes.axhline(target, color="black", linestyle=":", linewidth=1)
    axes.set_ylim(0, 1)
    finish(axes, "", "training steps on the digits 5 to 9", "class accuracy", "lower right")
    save(figure, path)


def main(argv=None):
    parser = Parser(FinetuneBenchmarkConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        torch.set_num_threads(1)
        results, start = [], time.perf_counter()
        print(f"steps until {100 * config.target:.0f} % of {config.samples} images show the digit asked for, of 5 to 9")
        print(f"{'seed':>4} {'fine-tuned':>11} {'from scratch':>13} {'ratio':>6} {'accuracy on 0 to 4 before':>26}")
        with tempfile.TemporaryDirectory() as folder:
            for seed in range(config.seeds):
                results.append(compare(seed, config, folder))
                tuned, scratch = results[-1]["finetuned_steps"], results[-1]["scratch_steps"]
                ratio = f"{scratch / tuned:.1f}" if tuned and scratch else "-"
                before = f"{100 * results[-1]['source_class_accuracy']:.1f} %"
                print(f"{seed:4} {tuned or 'never':>11} {scratch or 'never':>13} {ratio:>6} {before:>26}", flush=True)
        print(f"{time.perf_counter() - start:.0f} s")
        with write_errors("the results"):
            if config.json:
                write_json(config.json, results)
            if config.plot:
                plot(results, config.target, config.plot)


if __name__ == "__main__":
    main()
