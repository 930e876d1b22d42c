"""Training recipes, compared fairly: equal time and equal steps, the same data and model, several seeds.

    python -m studies.recipes --data digits --jobs 2 --output results/recipes-digits
    python -m studies.recipes --data /path/to/cifar10 --jobs 2 --output results/recipes-cifar10
    python -m studies.recipes --data /path/to/cifar10 --device cuda --steps 5000 \
        --flags="--hidden-size 384 --depth 12 --num-heads 6 --patch-size 2 --global-batch-size 256 --lr 1e-4"

A recipe is a set of train.py's options. Every run is train.py's own training step on data that is in memory, and the
averaged weights are judged by `studies.judge`, with 10 steps of dpm-solver++. One run serves both comparisons: it is
judged after --steps steps, and when it has taken a quarter, half and all of the time that the baseline takes for --steps.

How long a recipe's step takes, relative to the baseline's, is measured first, with all recipes in turns (`costs.json`). Its
share of the time is then a number of steps, so that a machine that does other things too gives the same results.

The folder --output gets a JSON line for each run (`runs.jsonl`), pictures of samples, and at the end a table and a plot.
The same command does the runs that are missing. They are in the order of the seeds, so that a benchmark that is stopped has
every recipe once before it has any of them twice.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import shlex
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.special import stdtrit
from tqdm import tqdm, trange

import train
from benchmarks import timing
from data.autoencoder import Pixels, to_model_range
from data.order import GlobalOrder, is_flipped
from diffusion import create_diffusion
from evaluation.likelihood import bound
from runtime import distributed
from runtime.config import Config, option
from runtime.devices import has_bf16
from runtime.errors import UserError
from runtime.files import check_output, read_json, replace_file, write_errors, write_json
from runtime.parser import Parser
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.grid import draw_grid, write_picture
from sampling.pipeline import Pipeline, to_uint8
from studies.judge import Judge, RealImages
from studies.plots import finish, save
from training import finetune, setup
from training.trainer import Trainer

RECIPES = {
    "baseline": "",  # the paper's
    "logit-normal": "--timestep-sampling logit-normal",
    "v": "--predict v",
    "flow": "--objective flow",
    "flow, logit-normal": "--objective flow --timestep-sampling logit-normal",
    "rope": "--rope",
    # combinations
    "logit-normal, rope": "--timestep-sampling logit-normal --rope",
    "flow, logit-normal, rope": "--objective flow --timestep-sampling logit-normal --rope",
}
BASELINE = "baseline"
TIMES = (0.25, 0.5, 1.0)  # when a run is judged, as shares of the baseline's time; and once after --steps steps
GUIDED_TIMES = (0.5, 1.0)  # when it is judged with guidance, too
ROUNDS, ROUND_STEPS = 9, 3  # in which the steps of the recipes are timed in turns
GUIDANCE_SCALES = (1.5, 3.0)
SAMPLING_STEPS, SAMPLING_BATCH = 10, 250
BOUND_IMAGES, BOUND_TIMESTEPS = 32, 100
GRID = 80  # images in a picture of samples


@dataclass(frozen=True)
class Setting:
    """What is trained on a kind of data. steps: of the baseline. flags: options of train.py, of all recipes."""

    image_size: int
    steps: int
    flags: str


COMMON = "--vae none --ema-warmup"
SETTINGS = {
    "digits": Setting(8, 720, "--hidden-size 96 --depth 4 --num-heads 4 --patch-size 2 --global-batch-size 32 --lr 4e-3"),
    "mnist": Setting(28, 1200, "--hidden-size 160 --depth 6 --num-heads 4 --patch-size 7 --global-batch-size 64 --lr 2e-3"),
    "folder": Setting(32, 600, "--hidden-size 256 --depth 4 --num-heads 4 --patch-size 4 --global-batch-size 32 --lr 2e-3"),
}


@dataclass(frozen=True)
class StudyConfig(Config):
    """What studies of models that they train have in common."""

    data: str = option("digits", 'what to train on: "digits", "mnist", or a folder of images, which may hold train and '
        "test")  # fmt: skip
    flags: str | None = option(None, "further options of train.py for every model, such as its sizes, in quotes (default: "
        "none)", metavar="'--OPTION VALUE ...'")  # fmt: skip
    image_size: int = option(32, "side of the images of a folder in pixels", low=4, high=512)
    seeds: int = option(3, "number of seeds", low=1, high=1000)
    jobs: int = option(1, "runs at a time, each in a process of one thread", low=1, high=1024)

    @property
    def setting(self):
        return SETTINGS.get(self.data, dataclasses.replace(SETTINGS["folder"], image_size=self.image_size))


@dataclass(frozen=True)
class RecipesConfig(StudyConfig):
    """Options of recipes.py."""

    recipes: tuple[str, ...] | None = option(None, "recipes to run (default: all)", choices=tuple(RECIPES), metavar="NAME")
    steps: int | None = option(None, "training steps of the baseline, whose time is that of all recipes (default: by the "
        "data)", low=4, high=10_000_000)  # fmt: skip
    samples: int = option(500, "images to judge; if there are fewer test images, as many as those", low=20, high=100_000)
    device: str = option("cpu", "where to train", choices=("cuda", "cpu"))
    output: str = option("results/recipes", "folder of the results; one folder holds one kind of data")

    @property
    def equal_steps(self):
        return self.steps or self.setting.steps

    def words(self, recipe):
        """The options of train.py that make up a recipe."""
        fixed = ["--data-path", self.data, "--image-size", str(self.setting.image_size), "--device", self.device]
        return [*fixed, *shlex.split(f"{COMMON} {self.setting.flags} {self.flags or ''} {RECIPES[recipe]}")]

    def text(self, recipe):
        """The options of a recipe as text, in which the folder of the data has its name alone: it may lie elsewhere."""
        words = self.words(recipe)
        return " ".join([words[0], Path(self.data).name, *words[2:]])

    def judged_at(self, recipe):
        """[(unit, mark, steps)]: after how many steps a recipe is judged: at shares of the time, and at --steps."""
        cost = read_costs(self.output)[recipe]
        times = [("time", share, max(1, round(share * self.equal_steps / cost))) for share in TIMES]
        return [*times, ("steps", self.equal_steps, self.equal_steps)]

    def start(self, images, recipe, seed):
        """The Run of a recipe with a seed."""
        return Run(self, images, recipe, seed)

    def record(self, recipe, seed):
        """What a run's numbers depend on: runs with an equal record are not repeated."""
        judged_at = [list(mark) for mark in self.judged_at(recipe)]
        return {"recipe": recipe, "seed": seed, "flags": self.text(recipe), "judged_at": judged_at, "samples": self.samples}


# ----------------------------------------------------------------------------------------------------------------------
# The time of a step


def read_costs(folder):
    """{recipe: the time of its step relative to the baseline's} of costs.json; without those that are missing there."""
    found = read_json(Path(folder, "costs.json")) or {}
    return {recipe: cost for recipe, cost in found.items() if isinstance(cost, int | float) and cost > 0}


def measure_costs(config, images, recipes):
    """Time the steps of the recipes in turns, and add them to costs.json: medians over the rounds of the ratios to the
    baseline's step in the same round. On a CPU the time is the processor time of one thread, on a GPU the clock's."""
    runs = {recipe: config.start(images, recipe, 0) for recipe in recipes if recipe != BASELINE}
    reference, found = config.start(images, BASELINE, 0), {recipe: [] for recipe in runs}
    for i in trange(ROUNDS + 1 if runs else 0, desc="Timing the steps", unit="round", disable=not runs):
        first = time_steps(reference)
        seconds = {recipe: time_steps(run) for recipe, run in runs.items()}
        mean = (first + time_steps(reference)) / 2
        for recipe in runs if i else ():  # the first round warms up
            found[recipe].append(seconds[recipe] / mean)
    costs = {BASELINE: 1.0} | {recipe: statistics.median(ratios) for recipe, ratios in found.items()}
    write_json(Path(config.output, "costs.json"), read_costs(config.output) | costs)


def time_steps(run):
    start = run.clock()
    for _ in range(ROUND_STEPS):
        run.step()
    return run.clock() - start


# ----------------------------------------------------------------------------------------------------------------------
# One run


def resolve(words):
    """(TrainConfig, the Checkpoint of --init-from or None, the processes) of train.py's words. Raises UserError."""
    options = train.make_parser().parse(words)
    context = distributed.setup(options.compute.device)
    return *setup.resolve(options, context), context


def begin(words, space, number, classes=(), prepare=None):
    """(TrainConfig, Trainer) as of train.py with these words, on `number` images of `classes` that the caller has. prepare:
    what is done to the model before the trainer takes it."""
    options, source, context = resolve(words)
    recipe, compute, given = options.recipe, options.compute, options.model
    model = setup.build_model(given, recipe, space)
    if source:
        kept, dropout = options.finetune.keep_classes, recipe.label_dropout
        finetune.load_into(model, source, finetune.label_rows(source, kept, given.num_classes, dropout, classes))
    if prepare:
        prepare(model)
    return options, Trainer(recipe, compute, context, model, space, recipe.total_steps(number))


class Run:
    """The training of one recipe with one seed."""

    def __init__(self, config, images, recipe, seed):
        words = [*config.words(recipe), "--num-classes", str(len(images.classes)), "--global-seed", str(seed)]
        options, self.trainer = begin(words, Pixels(images.train.shape[1]), len(images.train), prepare=self.prepare)
        self.images, self.seed, self.batch_size = images, seed, options.recipe.global_batch_size
        self.on_gpu, self.batches = self.trainer.device.type == "cuda", self.endless_batches()

    def prepare(self, model):
        """What a study adds to a model, before its training begins."""

    def endless_batches(self):
        """train.py's batches, in its order and with its flips, without its data workers."""
        images = self.images
        for keys in GlobalOrder(len(images.train), self.batch_size, self.seed, 0, 1, 0, 2**62):
            index = torch.tensor([index for index, _ in keys])
            flipped = torch.tensor([images.flip and bool(is_flipped(self.seed, *key)) for key in keys])
            batch = torch.where(flipped[:, None, None, None], images.train[index].flip(-1), images.train[index])
            yield {"image": batch, "label": images.train_labels[index], "index": index, "flipped": flipped}

    def clock(self):
        if self.on_gpu:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def step(self):
        return self.trainer.step(next(self.batches)).losses["loss"].mean()

    @torch.no_grad()
    def draw(self, count, cfg_scale=1.0, sampler=None):
        """(images (N, C, H, W) uint8, labels (N,)) of the averaged weights; the classes take turns. None for the images
        where a value is not finite. The noise is that of the run's seed, the same for all recipes."""
        guidance = GuidanceConfig(cfg_scale=cfg_scale)
        sampler = sampler or SamplerConfig("dpm-solver++", SAMPLING_STEPS)
        fast = "bf16" if has_bf16(self.trainer.device) else "fp32"  # the same for all recipes, however they were trained
        space = self.trainer.space
        pipeline = Pipeline(self.trainer.ema.module, space, sampler, guidance, precision=fast)
        labels, found = torch.arange(count) % len(self.images.classes), []
        for indices in torch.arange(count).split(SAMPLING_BATCH):
            try:
                found.append(to_uint8(pipeline(labels[indices], *pipeline.noise(self.seed, indices.tolist()))))
            except UserError:
                return None, labels
        pixels = torch.from_numpy(np.concatenate(found))[..., : space.channels]  # (N, H, W, C)
        return pixels.permute(0, 3, 1, 2).contiguous(), labels

    @torch.no_grad()
    def bits_per_dimension(self):
        """The variational bound of test images by a process of fewer steps, or None where the model has no such bound: a
        flow, or a diffusion whose output is not finite."""
        model, images = self.trainer.ema.module, self.images
        if model.objective == "flow":
            return None
        diffusion = create_diffusion(str(BOUND_TIMESTEPS), learn_sigma=model.learn_sigma, predict=model.predict)
        device = self.trainer.device
        x_0 = to_model_range(images.test[:BOUND_IMAGES]).to(device)
        labels = images.test_labels[:BOUND_IMAGES].to(device)
        with self.trainer.autocast:
            terms = bound(diffusion, lambda x_t, t: model(x_t, t, labels), x_0, 0, range(len(x_0)))
        return number(terms.sum(dim=1).mean().item())


def number(value):
    """A float, or None where it is not finite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def measure(judge, images, labels):
    """What the judge says; None for each number where there are no images, because the training has diverged."""
    if images is None:
        return {"frechet_distance": None, "class_accuracy": None}
    return judge.measure(images, labels)


def train_and_judge(config, images, judge, recipe, seed):
    """Train a recipe with a seed. Returns the dict that is a line of runs.jsonl, and the images of a picture, or None."""
    run, count, losses, curve = config.start(images, recipe, seed), min(config.samples, len(images.test)), [], []
    marks = sorted(config.judged_at(recipe), key=lambda mark: mark[2])
    end, numbers, sample = {}, None, None
    for unit, mark, steps in marks:
        if run.trainer.steps_made < steps or numbers is None:
            while run.trainer.steps_made < steps:
                losses.append(run.step())
            sample, labels = run.draw(count)
            numbers = {"steps": steps, **measure(judge, sample, labels)}
        if unit == "time" and mark in GUIDED_TIMES:
            numbers["guided"] = guided(run, judge, count)
        curve.append({"unit": unit, "mark": mark, **numbers})
        if (unit, mark) == ("time", 1.0):
            memorised = None if sample is None else judge.memorised(sample)
            end = {"memorised": memorised, "bits_per_dimension": run.bits_per_dimension()}
            end["loss"] = number(torch.stack(losses[-50:]).mean().item())
            scale = best_scale(numbers["guided"])
            picture = sample if scale is None else run.draw(min(count, GRID), cfg_scale=scale["cfg_scale"])[0]
    parameters = sum(p.numel() for p in run.trainer.model.parameters())
    return {**config.record(recipe, seed), "parameters": parameters, "curve": curve, **end}, picture


def guided(run, judge, count):
    """What the judge says with guidance of each scale, as a list."""
    return [{"cfg_scale": scale, **measure(judge, *run.draw(count, cfg_scale=scale))} for scale in GUIDANCE_SCALES]


def best_scale(entries):
    """The entry of the least distance among those of `guided`, or None."""
    entries = [entry for entry in entries if entry["frechet_distance"] is not None]
    return min(entries, key=lambda entry: entry["frechet_distance"], default=None)


# ----------------------------------------------------------------------------------------------------------------------
# All runs

worker = None  # of a process of the pool: (config, images, judge)


@functools.lru_cache(maxsize=1)
def open_data(config):
    """(RealImages, Judge) of the config; the first time the judge is trained."""
    torch.set_num_threads(1)
    images = RealImages.load(config.data, config.setting.image_size)
    return images, Judge.open(images, os.path.join(config.output, "judge.pt"))


def start_worker(*data):
    global worker
    torch.set_num_threads(1)
    worker = data


def do_job(work, job):
    return *job, *work(*worker, *job)


def finished_runs(config):
    """{(recipe, seed): line} of the lines of runs.jsonl that this command would make again."""
    path, found = Path(config.output, "runs.jsonl"), {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut off, or of recipes that are gone
            row = json.loads(line)
            key = row["recipe"], row["seed"]
            if {**row, **config.record(*key)} == row:
                found[key] = row
    return found


def do_runs(config, order, work, say, data=None):
    """Do those of the (recipe, seed) jobs that runs.jsonl lacks, and append their lines as they finish. work: what to do, a
    function like `train_and_judge`; config: has a `record`. say(row): what is printed of a run. data: as of `open_data`,
    which is the default. Returns the lines of all jobs by their seeds. Raises UserError where they cannot be written."""
    done, path = finished_runs(config), Path(config.output, "runs.jsonl")
    jobs, do = [job for job in order if job not in done], partial(do_job, work)
    data = config, *(data or open_data(config))
    with contextlib.ExitStack() as stack:
        if config.jobs == 1 or not jobs:
            start_worker(*data)
            results = map(do, jobs)
        else:  # new processes, not forked ones: OpenMP's threads and CUDA do not survive a fork. They share the tensors
            pool = multiprocessing.get_context("spawn").Pool(min(config.jobs, len(jobs)), start_worker, data)
            results = stack.enter_context(pool).imap_unordered(do, jobs)
        for recipe, seed, row, picture in tqdm(results, "Runs", len(jobs), disable=not jobs):
            with write_errors(config.output), open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if picture is not None:
                grid = draw_grid(picture[:GRID].expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy(), 10, 2)
                write_picture(Path(config.output, f"{recipe.replace(', ', '-').replace(' ', '-')}-{seed}.png"), grid)
            tqdm.write(f"{recipe}, seed {seed}: {say(row)}")
    return [row for job, row in sorted(finished_runs(config).items(), key=lambda item: item[0][1]) if job in order]


def open_output(config):
    """Make the folder of the results. Raises UserError where it cannot be written."""
    os.makedirs(config.output, exist_ok=True)
    check_output(Path(config.output, "runs.jsonl"), "--output")


# ----------------------------------------------------------------------------------------------------------------------
# Table and plot


def at_time(row, share):
    """The entry of a run's curve at this share of the time."""
    return next(entry for entry in row["curve"] if entry["unit"] == "time" and entry["mark"] == share)


def at_equal_steps(row):
    return next(entry for entry in row["curve"] if entry["unit"] == "steps")


def best(entry, quantity="frechet_distance"):
    """A quantity of an entry of a curve at the best scale of guidance, or None."""
    return (best_scale(entry["guided"]) or {}).get(quantity)


COLUMNS = {  # of the table: how a run's value is found, and its format
    "steps": (lambda row: at_time(row, 1.0)["steps"], "{:.0f}"),
    "distance, 1/4 of the time": (lambda row: at_time(row, 0.25)["frechet_distance"], "{:.2f}"),
    "1/2": (lambda row: at_time(row, 0.5)["frechet_distance"], "{:.2f}"),
    "equal time": (lambda row: at_time(row, 1.0)["frechet_distance"], "{:.2f}"),
    "equal steps": (lambda row: at_equal_steps(row)["frechet_distance"], "{:.2f}"),
    "class accuracy": (lambda row: at_time(row, 1.0)["class_accuracy"], "{:.3f}"),
    "guided, 1/2": (lambda row: best(at_time(row, 0.5)), "{:.2f}"),
    "guided": (lambda row: best(at_time(row, 1.0)), "{:.2f}"),
    "guided accuracy": (lambda row: best(at_time(row, 1.0), "class_accuracy"), "{:.3f}"),
    "bits per dimension": (lambda row: row["bits_per_dimension"], "{:.2f}"),
    "memorised": (lambda row: row["memorised"], "{:.3f}"),
}
JUDGED = ("equal time", "equal steps", "guided")  # the columns whose differences from the baseline are judged
CURVES = {  # the columns of each share of the time
    "equal time": {0.25: "distance, 1/4 of the time", 0.5: "1/2", 1.0: "equal time"},
    "guided": {0.5: "guided, 1/2", 1.0: "guided"},
}


@dataclass
class Column:
    """Mean and standard deviation over the seeds of a recipe's values, which are missing where a run has diverged or has no
    such number. values: by seed, None where missing."""

    values: list

    @property
    def whole(self):
        return bool(self.values) and None not in self.values

    @property
    def mean(self):
        return float(np.mean(self.values)) if self.whole else math.nan

    @property
    def spread(self):
        return float(np.std(self.values, ddof=1)) if self.whole and len(self.values) > 1 else math.nan

    def text(self, pattern):
        if not self.whole:
            return "-"
        spread = "" if math.isnan(self.spread) else f" ± {pattern.format(self.spread)}"
        return pattern.format(self.mean) + spread


def summarise(rows):
    """{recipe: {column: Column}} in the order of `RECIPES`."""
    summary = {}
    for recipe in RECIPES:
        if own := [row for row in rows if row["recipe"] == recipe]:
            summary[recipe] = {name: Column([value(row) for row in own]) for name, (value, _) in COLUMNS.items()}
    return summary


def noise(columns):
    """(standard deviation between seeds of ln(value), over these columns together, its degrees of freedom); (nan, 0) where
    each has one seed. Distances spread in proportion to their size, so that their logarithms are compared."""
    groups = [np.log(column.values) for column in columns]
    freedom = sum(len(group) - 1 for group in groups)
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    return (math.sqrt(squares / freedom), freedom) if freedom else (math.nan, 0)


def usual_noise(summary, name):
    """The median over the recipes of the noise between their seeds; nan with one seed."""
    found = [noise([c[name]])[0] for c in summary.values() if c[name].whole and len(c[name].values) > 1]
    return float(np.median(found)) if found else math.nan


def verdict(summary, recipe, name):
    """The recipe is "better" or "worse" than the baseline where the difference of the means of ln(column) is outside of the
    95 % interval of the noise of the two, else "same"; "diverged", or "" where nothing can be said. This is Student's test,
    whose interval is wide where few runs tell the noise. The noise of other recipes does not count: it may be ten times
    as large."""
    ours, theirs = summary[recipe][name], summary.get(BASELINE, summary[recipe])[name]
    if not ours.whole:
        return "diverged"
    if recipe == BASELINE or BASELINE not in summary or not theirs.whole:
        return ""
    deviation, freedom = noise([ours, theirs])
    if not freedom:
        return ""
    difference = np.log(ours.values).mean() - np.log(theirs.values).mean()
    error = deviation * math.sqrt(1 / len(ours.values) + 1 / len(theirs.values))
    if abs(difference) <= stdtrit(freedom, 0.975) * error:
        return "same"
    return "better" if difference < 0 else "worse"


def time_to_baseline(summary, recipe, name):
    """The share of the time at which the recipe's mean distance is the baseline's final one, interpolated between the
    judged times in ln(distance) over ln(time), as text: "-" where it is not reached, "<" where it was at the first one.
    name: of `CURVES`."""
    target = summary[BASELINE][name].mean if BASELINE in summary else math.nan
    means = {time: summary[recipe][column].mean for time, column in CURVES[name].items()}
    first = min(means)
    if means[first] <= target:
        return f"< {first:g}"
    for (t0, d0), (t1, d1) in itertools.pairwise(means.items()):
        if d0 > target >= d1:
            share = math.log(d0 / target) / math.log(d0 / d1)
            return f"{t0 * (t1 / t0) ** share:.2f}"
    return "-"


def table(summary, costs):
    """The table as Markdown. costs: as of `read_costs`."""
    shown = [name for name in COLUMNS if any(columns[name].whole for columns in summary.values())]
    rows = []
    for recipe, columns in summary.items():
        row = {"recipe": recipe, "runs": len(columns["steps"].values), "time of a step": f"{costs[recipe]:.2f}"}
        row |= {name: columns[name].text(COLUMNS[name][1]) for name in shown}
        row |= {f"{name}: share of the time to the baseline's": time_to_baseline(summary, recipe, name) for name in CURVES}
        rows.append(row | {f"{name}: verdict": verdict(summary, recipe, name) for name in JUDGED})
    return timing.table(rows)


def report(config, judge, rows):
    """All that is to be said of the runs, as Markdown."""
    count = min(config.samples, len(judge.images.test))
    floor, summary = judge.floor(count), summarise(rows)
    deviations = ", ".join(f"{name} {100 * usual_noise(summary, name):.1f} %" for name in JUDGED)
    return (
        f"{Path(config.data).name}: {config.equal_steps} steps of the baseline, {count} samples of {SAMPLING_STEPS} steps. "
        f"The judge recognises {100 * judge.accuracy:.1f} % of the test images. The floor, the "
        f"Fréchet distance of {count} of these, is {floor['frechet_distance']:.2f}.\n\n"
        f"{table(summary, read_costs(config.output))}\n\n"
        f"Standard deviation between seeds, median of the recipes: {deviations} of the distance. A recipe is called better "
        f"or worse where the difference is outside of the 95 % interval of its noise and the baseline's.\n"
    )


def plot(config, judge, rows, path):
    """Distance over time of all recipes, and the distances at the end with and without guidance."""
    summary = summarise(rows)
    figure = Figure(figsize=(11, 1.6 + 0.32 * max(8, len(summary))), layout="constrained")
    curves, final = figure.subplots(1, 2, width_ratios=(1, 1.1))
    floor = judge.floor(min(config.samples, len(judge.images.test)))["frechet_distance"]
    colours = {recipe: "black" if recipe == BASELINE else colormaps["tab20"](i % 20) for i, recipe in enumerate(summary)}
    for i, (recipe, columns) in enumerate(summary.items()):
        of_time = [columns[name] for name in CURVES["equal time"].values()]
        times = [share * 1.01 ** (i - len(summary) / 2) for share in TIMES]  # the bars side by side
        curves.errorbar(
            times, [c.mean for c in of_time], [c.spread for c in of_time], marker="o", markersize=3, capsize=2,
            color=colours[recipe], label=recipe, linewidth=2 if recipe == BASELINE else 1, zorder=3 - (i > 0),
        )  # fmt: skip
        for name, marker in zip(JUDGED, "os^", strict=True):
            column, place = columns[name], -i + 0.2 * (1 - JUDGED.index(name))
            filled = "none" if name == "equal steps" else colours[recipe]
            final.errorbar(
                column.mean, place, xerr=column.spread, marker=marker, color=colours[recipe], markerfacecolor=filled,
                capsize=2, linestyle="", label=name if i == 0 else None,
            )  # fmt: skip
    finish(curves, "", "share of the baseline's training time", "Fréchet distance", log="xy")
    curves.set_xticks(TIMES, map(str, TIMES))
    finish(final, "", "Fréchet distance", log="x")
    final.set(yticks=[-i for i in range(len(summary))], yticklabels=[*summary])
    means = [columns[name].mean for columns in summary.values() for name in JUDGED if columns[name].whole]
    if means and floor > min(means) / 3:  # further away it would take most of the room
        final.axvline(floor, color="grey", linestyle=":", linewidth=1)
    save(figure, path)


def write_results(config, judge, rows, report, plot, picture):
    """Print and write the table and the picture of the runs. report and plot: a study's own. Raises UserError."""
    with write_errors(config.output):
        text = report(config, judge, rows)
        replace_file(Path(config.output, "table.md"), lambda file: file.write(text.encode()))
        plot(config, judge, rows, Path(config.output, picture))
    print(text)


def main(argv=None):
    parser = Parser(RecipesConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        open_output(config)
        order = [(recipe, seed) for seed in range(config.seeds) for recipe in config.recipes or RECIPES]
        for recipe in dict.fromkeys(recipe for recipe, _ in order):
            resolve(config.words(recipe))  # refuses what cannot be trained
        images, judge = open_data(config)
        if unknown := [recipe for recipe, seed in order if seed == 0 and recipe not in read_costs(config.output)]:
            measure_costs(config, images, unknown)
        rows = do_runs(config, order, train_and_judge, lambda row: at_time(row, 1.0))
        write_results(config, judge, rows, report, plot, "recipes.png")


if __name__ == "__main__":
    main()
