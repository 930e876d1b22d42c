"""Solvers, and caches of features between steps, at equal numbers of full evaluations of the model.

    python -m studies.caching --jobs 2
    python -m studies.caching --data /path/to/cifar10 --output results/caching-cifar10

Trains the baseline of studies/recipes.py for --steps, and draws with every method from the same noise. Measured are
the Fréchet distance and the class accuracy of `studies.judge`, and the processor time of one thread. For the methods
that add no noise there is also the error: the root mean square difference of their pixels, in [-1, 1], from the exact
images of the same noise, for which 150 steps of dpm-solver++ stand.

The cache is that of TaylorSeer (Liu et al. 2025): every N-th evaluation is full, and between them the outputs of each
block's attention and MLP are those of the last full evaluation (order 0), or continue the line through the last two of them
(order 1). It is part of this benchmark alone.

The folder --output gets the model, a JSON line for each method and seed (`runs.jsonl`), and at the end a table and a plot.
The same command does what is missing.
"""

import contextlib
import copy
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn
from tqdm import trange

from benchmarks import timing
from checkpoint import files
from data.autoencoder import Pixels, to_model_range
from diffusion import create_diffusion, sample, samplers
from diffusion.registry import SAMPLERS, Sampler
from models import DiT
from runtime.config import option
from runtime.errors import UserError
from runtime.parser import Parser
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline, to_uint8
from studies.plots import finish, save
from studies.recipes import (
    BASELINE,
    Column,
    RecipesConfig,
    Run,
    StudyConfig,
    do_runs,
    measure,
    number,
    open_data,
    open_output,
    write_results,
)

EVALUATIONS = (5, 10, 20, 50)
BATCH = 250  # images drawn at once
EXACT_STEPS = 150
DEFAULT = "ddpm"  # the method of sample.py, with 250 steps


# ----------------------------------------------------------------------------------------------------------------------
# The cache


class CachedModule(nn.Module):
    """A block's attention or MLP, whose outputs at the last full evaluations are kept in `outputs`."""

    def __init__(self, module, cache):
        super().__init__()
        self.module, self.outputs = module, []
        object.__setattr__(self, "cache", cache)

    def forward(self, x, **positions):
        times = self.cache.times
        if self.cache.is_full:
            self.outputs = [*self.outputs, self.module(x, **positions)][-len(times) :]
            return self.outputs[-1]
        if len(times) < 2:
            return self.outputs[-1]
        before, last = self.outputs
        return last + (self.cache.t - times[1]) / (times[1] - times[0]) * (last - before)


class Cache:
    """Puts a cache into a DiT: of its evaluations in a row the first and every interval-th after it are full. An evaluation
    of another batch size than the one before, such as where guidance by interval begins, is full and the first of a row.

    order: 0 or 1. times: t of the full evaluations that are kept, at most order + 1. full_evaluations: so far."""

    def __init__(self, model, interval, order):
        self.interval, self.order, self.full_evaluations = interval, order, 0
        self.restart()
        for block in model.blocks:
            block.attn, block.mlp = CachedModule(block.attn, self), CachedModule(block.mlp, self)
        model.register_forward_pre_hook(self.begin_evaluation)

    def restart(self):
        """Forget all outputs: new images begin."""
        self.in_row, self.batch_size, self.times = 0, None, []

    def begin_evaluation(self, model, inputs):
        x, t = inputs[:2]
        if len(x) != self.batch_size:
            self.restart()
            self.batch_size = len(x)
        self.t, self.is_full = t[0].item(), self.in_row % self.interval == 0
        if self.is_full:
            self.times = [*self.times, self.t][-(self.order + 1) :]
            self.full_evaluations += 1
        self.in_row += 1


# ----------------------------------------------------------------------------------------------------------------------
# The methods


@dataclass(frozen=True)
class Method:
    """sampler: as in `diffusion.registry`. cache: (interval, order) or None. evaluations: of the model, at which the method
    is measured; its steps are interval times as many. learned_variance: of ddpm; else the variance of a step is beta."""

    sampler: Sampler
    cache: tuple | None = None
    evaluations: tuple = EVALUATIONS
    learned_variance: bool = True

    def steps(self, evaluations):
        return evaluations * (self.cache[0] if self.cache else 1)


def variant(name, **settings):
    """A sampler with other settings of diffusers' class."""
    return replace(SAMPLERS[name], settings={**SAMPLERS[name].settings, **settings})


DDPM, DDIM = SAMPLERS["ddpm"], SAMPLERS["ddim"]
METHODS = {
    "ddpm": Method(DDPM, evaluations=(*EVALUATIONS, 250)),
    "ddpm, variance beta": Method(DDPM, evaluations=EVALUATIONS[:3], learned_variance=False),
    "ddim": Method(DDIM),
    "dpm-solver++": Method(SAMPLERS["dpm-solver++"]),
    "dpm-solver++, Karras": Method(variant("dpm-solver++", use_karras_sigmas=True)),
    "unipc": Method(SAMPLERS["unipc"]),
    "unipc, order 3": Method(variant("unipc", solver_order=3)),
    **{
        f"{sampler.name}, cache {interval}, order {order}": Method(sampler, (interval, order), evaluations)
        for sampler, interval, evaluations in ((DDIM, 2, EVALUATIONS), (DDIM, 3, EVALUATIONS), (DDPM, 2, EVALUATIONS[:3]))
        for order in (0, 1)
    },
}


@dataclass(frozen=True)
class CachingConfig(StudyConfig):
    """Options of caching.py."""

    methods: tuple[str, ...] | None = option(None, "methods to measure (default: all)", choices=tuple(METHODS),
        metavar="NAME")  # fmt: skip
    steps: int = option(2000, "training steps of the model", low=4, high=10_000_000)
    cfg_scale: float = option(1.5, "scale of classifier-free guidance", low=0)
    samples: int = option(200, "images to measure; if there are fewer test images, as many as those", low=20, high=100_000)
    output: str = option("results/caching", "folder of the results; one folder holds one kind of data")

    @property
    def recipe(self):
        """The config of the model's training."""
        names = ("data", "steps", "flags", "image_size", "output")
        return RecipesConfig(**{name: getattr(self, name) for name in names})

    def record(self, name, seed):
        """What the numbers of a method depend on: those with an equal record are not measured again."""
        method = METHODS[name]
        model = {"model": self.recipe.text(BASELINE), "steps_of_training": self.steps}
        method = {"cache": method.cache and [*method.cache], "evaluations": [*method.evaluations]}
        return {"recipe": name, "seed": seed, **model, **method, "samples": self.samples, "cfg_scale": self.cfg_scale}


def open_model(config, images):
    """The model, in eval mode: trained where the folder has none. Raises UserError where it has another one."""
    path, record = os.path.join(config.output, "model.pt"), config.record(DEFAULT, 0)
    record = {name: record[name] for name in ("model", "steps_of_training")}
    if not os.path.exists(path):
        run = Run(config.recipe, images, BASELINE, seed=0)
        for _ in trange(config.steps, desc="Training", unit="step"):
            run.step()
        model = run.trainer.ema.module
        files.save(path, {"config": model.config, "weights": model.state_dict(), **record})
    state = files.load(path, mmap=False)
    if {**state, **record} != state:
        raise UserError(f"{path}: was trained in another way; remove the file, or name another --output")
    model = DiT(**state["config"])
    model.load_state_dict(state["weights"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def draw(model, method, steps, labels, seed, cfg_scale):
    """Images (N, C, H, W) uint8 of the labels (N,), each from its own noise of the seed; the processor time in seconds; and
    how many evaluations were full."""
    model = copy.deepcopy(model)  # which gets the cache
    cache = Cache(model, *(method.cache or (1, 0)))
    kind = SamplerConfig("ddpm" if method.sampler.adds_noise else "ddim", steps)  # for the noise
    pipeline = Pipeline(model, Pixels(model.in_channels), kind, GuidanceConfig(cfg_scale=cfg_scale))
    found, seconds, batches = [], 0.0, torch.arange(len(labels)).split(BATCH)
    for indices in batches:
        cache.restart()
        x_T, step_noise = pipeline.noise(seed, indices.tolist())
        made = make_steps(pipeline.denoiser(labels[indices]), method, steps, x_T, step_noise)
        start = time.process_time()
        x_0 = samplers.last(made)
        seconds += time.process_time() - start
        found.append(torch.from_numpy(to_uint8(x_0)[..., : model.in_channels]).permute(0, 3, 1, 2))
    return torch.cat(found), seconds, cache.full_evaluations / len(batches)


def make_steps(denoiser, method, steps, x_T, step_noise):
    """`diffusion.sample` with a method. Raises ValueError for an impossible number of steps."""
    create = partial(create_diffusion, learn_sigma=method.learned_variance)
    if not method.learned_variance:
        eps_and_variance, denoiser = denoiser, lambda x_t, t: eps_and_variance(x_t, t)[:, : x_t.shape[1]]
    return sample(method.sampler, denoiser, x_T, steps, step_noise=step_noise, create=create)


def measure_method(config, images, judge, name, seed):
    """Draw and judge with one method and one seed. Returns the dict that is a line of runs.jsonl, and None: no picture."""
    method, model, points = METHODS[name], open_model(config, images), []
    labels = torch.arange(min(config.samples, len(images.test))) % len(images.classes)
    exact = None if method.sampler.adds_noise else exact_images(config, images, labels, seed)
    for evaluations in method.evaluations:
        point = {"evaluations": evaluations, **measure(judge, None, None), "seconds": None, "error": None}
        with contextlib.suppress(ValueError):  # a spacing that has no such number of steps: the point stays empty
            arguments = method.steps(evaluations), labels, seed, config.cfg_scale
            drawn, seconds, full = draw(model, method, *arguments)
            assert full == evaluations
            point |= {**judge.measure(drawn, labels), "seconds": seconds}
            if exact is not None:
                point["error"] = number((to_model_range(drawn) - exact).square().mean().sqrt().item())
        points.append(point)
    return {**config.record(name, seed), "points": points}, None


def exact_images(config, images, labels, seed):
    """(N, C, H, W) in [-1, 1]: where the exact trajectories of the seed's noise end. Kept in the folder."""
    path = Path(config.output, f"exact-{seed}.pt")
    settings = {"samples": len(labels), "cfg_scale": config.cfg_scale}
    if path.exists():
        state = files.load(path, mmap=False)
        if {**state, **settings} == state:
            return to_model_range(state["images"])
    model, method = open_model(config, images), Method(SAMPLERS["dpm-solver++"])
    drawn, _, _ = draw(model, method, EXACT_STEPS, labels, seed, config.cfg_scale)
    files.save(path, {"images": drawn, **settings})
    return to_model_range(drawn)


# ----------------------------------------------------------------------------------------------------------------------
# Table, sentences and plot

QUANTITIES = {"frechet_distance": "{:.3f}", "class_accuracy": "{:.3f}", "error": "{:.3f}", "seconds": "{:.1f}"}
NAMES = {"frechet_distance": "Fréchet distance"}
SAID = {"cache": "the cache is better", "solver": "the solver is better", "neither": "no difference"}


def summarise(rows):
    """{method: {evaluations: {quantity: Column}}} of the lines of runs.jsonl, in the order of `METHODS`."""
    summary = {}
    for name, method in METHODS.items():
        own = [row["points"] for row in rows if row["recipe"] == name]
        points = [dict(zip(method.evaluations, zip(*own, strict=True), strict=True))] if own else []
        for evaluations, group in (points[0] if points else {}).items():
            columns = {quantity: Column([point[quantity] for point in group]) for quantity in QUANTITIES}
            summary.setdefault(name, {})[evaluations] = columns
    return summary


def table(summary):
    """The table as Markdown."""
    return timing.table([
        {"method": name, "full evaluations": evaluations, "steps": METHODS[name].steps(evaluations)}
        | {NAMES.get(quantity, quantity): columns[quantity].text(pattern) for quantity, pattern in QUANTITIES.items()}
        for name, points in summary.items()
        for evaluations, columns in points.items()
    ])  # fmt: skip


def lower(ours, theirs):
    """Whether `ours` is lower than `theirs` by more than two standard errors of the difference; both are Columns over the
    same noise, seed by seed. With one seed, whose noise is not known, whether it is lower at all."""
    if not (ours.whole and theirs.whole):
        return False
    difference = Column([a - b for a, b in zip(ours.values, theirs.values, strict=True)])
    count = len(difference.values)
    return difference.mean < (-2 * difference.spread / count**0.5 if count > 1 else 0)


def best(summary, evaluations, quantity, cached):
    """The (mean, name, Column) of the lowest mean among the methods with or without a cache, or None."""
    found = [
        (points[evaluations][quantity].mean, name, points[evaluations][quantity])
        for name, points in summary.items()
        if (METHODS[name].cache is not None) == cached and evaluations in points and points[evaluations][quantity].whole
    ]
    return min(found, default=None, key=lambda entry: entry[0])


def compare_caches(summary):
    """For each number of full evaluations the best cache beside the best solver, as a list of dicts; `winner` is "cache" or
    "solver" where one is `lower`, else "neither"."""
    found = []
    for evaluations in sorted(set().union(*summary.values())):
        for quantity in ("frechet_distance", "error"):
            cache, solver = (best(summary, evaluations, quantity, cached) for cached in (True, False))
            if cache and solver:
                winner = "cache" if lower(cache[2], solver[2]) else "solver" if lower(solver[2], cache[2]) else "neither"
                row = {"evaluations": evaluations, "quantity": quantity, "winner": winner}
                found.append({**row, "cache": cache[1], "with": cache[0], "solver": solver[1], "without": solver[0]})
    return found


def cheapest(summary):
    """{method: (evaluations, its columns)}: of each method without a cache the fewest evaluations than whose distance that
    of the most evaluations of the paper's sampler is not `lower`."""
    if DEFAULT not in summary:
        return {}
    target, found = summary[DEFAULT][max(summary[DEFAULT])]["frechet_distance"], {}
    for name, points in summary.items():
        for evaluations, columns in points.items() if METHODS[name].cache is None else ():
            distance = columns["frechet_distance"]
            if distance.whole and not lower(target, distance):
                found.setdefault(name, (evaluations, columns))
    return found


def report(config, judge, rows):
    """All that is to be said, as Markdown."""
    summary, count = summarise(rows), min(config.samples, len(judge.images.test))
    floor = judge.floor(count)["frechet_distance"]
    noise = "Better means by more than two standard errors" if config.seeds > 1 else "With one seed the noise is not known"
    text = (
        f"{Path(config.data).name}: {count} images for each of {config.seeds} seeds, guidance scale {config.cfg_scale:g}. "
        f"The floor, the Fréchet distance of as many real test images, is {floor:.3f}. The "
        f"judge recognises {100 * judge.accuracy:.1f} % of them. Seconds are of one thread for all images. "
        f"{noise}.\n\n{table(summary)}\n\nThe best cache and the best solver at equal full evaluations:\n\n"
    )
    for row in compare_caches(summary):
        what = NAMES.get(row["quantity"], row["quantity"])
        text += f"- {row['evaluations']} full evaluations, {what}: {row['cache']} {row['with']:.3f}, {row['solver']} "
        text += f"{row['without']:.3f}: {SAID[row['winner']]}.\n"
    if found := cheapest(summary):
        most = max(summary[DEFAULT])
        slowest = summary[DEFAULT][most]["seconds"].mean
        text += f"\nFewest evaluations whose distance is not worse than that of {most} of {DEFAULT}:\n\n"
        for name, (evaluations, columns) in found.items():
            share, accuracy = slowest / columns["seconds"].mean, columns["class_accuracy"].mean
            text += f"- {name}: {evaluations}, distance {columns['frechet_distance'].mean:.3f}, class accuracy "
            text += f"{accuracy:.3f}, 1/{share:.1f} of the time\n"
    return text


def plot(config, judge, rows, path):
    """Distance and error over full evaluations, and the distance over time."""
    summary, figure = summarise(rows), Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for i, (name, points) in enumerate(summary.items()):
        cached = METHODS[name].cache is not None
        style = {"color": f"C{i % 10}", "linestyle": "--" if cached else "-", "marker": "^" if cached else "o"}
        for axes, quantity in zip(panels, ("frechet_distance", "error", "frechet_distance"), strict=True):
            shown = [(count, columns) for count, columns in points.items() if columns[quantity].whole]
            at = [columns["seconds"].mean if axes is panels[2] else count for count, columns in shown]
            means, spreads = ([getattr(columns[quantity], name) for _, columns in shown] for name in ("mean", "spread"))
            label = name if axes is panels[0] else None
            axes.errorbar(at, means, spreads, markersize=4, linewidth=1, capsize=2, label=label, **style)
    floor = judge.floor(min(config.samples, len(judge.images.test)))["frechet_distance"]
    for axes, label in zip(panels, ("full evaluations", "full evaluations", "processor time in seconds"), strict=True):
        quantity, real = ("error", None) if axes is panels[1] else ("Fréchet distance", floor)
        finish(axes, "", label, quantity, None, "xy", real)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    save(figure, path, dpi=90)


def main(argv=None):
    parser = Parser(CachingConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        open_output(config)
        order = [(name, seed) for seed in range(config.seeds) for name in config.methods or METHODS]
        images, judge = open_data(config)
        open_model(config, images)  # before there are several processes
        rows = do_runs(config, order, measure_method, lambda row: row["points"][-1])
        write_results(config, judge, rows, report, plot, "caching.png")


if __name__ == "__main__":
    main()
