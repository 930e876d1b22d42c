"""The paper's findings on a laptop: its twelve models and four block designs, scaled down alike, trained on the digits.

    python -m studies.paper --jobs 2
    python -m studies.paper --quick --output results/quick        # half a minute; its numbers mean nothing

Compared with the paper, widths are divided by 16, depths by 6, heads and patch sizes by 2, and images are 8x8 pixels, so
that the numbers of tokens are 64, 16 and 4 in place of 256, 64 and 16. All models have the same recipe. It differs from the
paper's in the batch size, in the learning rate, and in the prediction: v in place of eps, with which models of this size
need many more steps. Small models are also trained for longer, to compare sizes at equal training compute.

The distance is Fréchet's in the features of `studies.judge`, of samples without guidance by 10 steps of dpm-solver++.
The folder --output gets a JSON line for each model and seed (`runs.jsonl`), and at the end `paper.json`, `paper.md` with
one sentence for each finding, and three pictures. The same command does the runs that are missing.
"""

import dataclasses
import functools
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evaluation.metrics import precision_recall
from models import BLOCKS as BLOCK_TABLE
from models import SIZES
from runtime.config import Config, option
from runtime.files import replace_file, write_errors, write_json
from runtime.parser import Parser
from sampling.config import SamplerConfig
from studies.plots import finish, save
from studies.recipes import COMMON, SETTINGS, Column, Run, do_runs, measure, open_data, open_output
from studies.scaling import COLORS, DESIGNS, SCALING, correlation
from training.cost import build, forward_macs

BLOCKS = [name for name, design in BLOCK_TABLE.items() if not design.needs_frames]
PATCHES = {4: "o", 2: "s", 1: "^"}  # their markers; the paper's patch sizes are twice as large
SHAPES = {
    f"{size}/{patch}": {
        "hidden_size": width // 16, "depth": round(depth / 6), "num_heads": heads // 2, "patch_size": patch,
        "block": "adaln-zero",
    }
    for patch in PATCHES
    for size, (depth, width, heads) in SIZES.items()
}  # fmt: skip
DESIGN = "XL/2"  # the model whose block designs are compared
SHAPES |= {f"{DESIGN}, {block}": {**SHAPES[DESIGN], "block": block} for block in BLOCKS[1:]}
SAMPLED = ("S/2", "XL/2")  # the models that are also sampled with more and fewer steps
GUIDED = "XL/2"  # the model that is also sampled with guidance
LONGER = {"S": 4, "B": 2}  # times as many steps
FLAGS = "--predict v --lr 4e-3"
SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
PAPERS = {row.model.removeprefix("DiT-"): row for row in SCALING}
PAPER_GUIDANCE = {1.0: (9.62, 0.67, 0.67), 1.25: (3.22, 0.76, 0.62), 1.5: (2.27, 0.83, 0.57)}  # FID, precision, recall


@dataclass(frozen=True)
class PaperConfig(Config):
    """Options of paper.py."""

    seeds: int = option(3, "number of seeds", low=1, high=1000)
    steps: int = option(1280, "training steps of each run; S and B make four times and twice as many", low=4, high=10**7)
    batch_size: int = option(16, "images in a training step", low=1, high=1000)
    samples: int = option(300, "images to judge, up to the 449 test images", low=20, high=449)
    jobs: int = option(2, "runs at a time, each in a process of one thread", low=1, high=1024)
    quick: bool = option(False, "make all runs tiny, in order to try the command")
    output: str = option("results/paper", "folder of the results")

    # what studies.recipes reads
    data, device, setting = "digits", "cpu", SETTINGS["digits"]

    @property
    def sampling_steps(self):
        return (2, 4) if self.quick else (8, 16, 32, 64, 250)

    def marks(self, name):
        """The numbers of steps at which a model is judged."""
        last = self.steps * LONGER.get(name.split("/")[0], 1)
        return [mark for mark in (self.steps * 2**i // 4 for i in range(5)) if mark <= last]

    def words(self, name):
        """The options of train.py for a model."""
        words = f"--data-path digits --image-size 8 --device cpu {COMMON} {FLAGS} --global-batch-size {self.batch_size}"
        return words.split() + [
            word for key, value in SHAPES[name].items() for word in (f"--{key.replace('_', '-')}", str(value))
        ]

    def record(self, name, seed):
        """What a run's numbers depend on: runs with an equal record are not repeated."""
        settings = {"steps": self.steps, "samples": self.samples, "sampling_steps": [*self.sampling_steps]}
        return {"recipe": name, "seed": seed, "flags": " ".join(self.words(name)), **settings}


# ----------------------------------------------------------------------------------------------------------------------
# One run


def train_and_judge(config, images, judge, name, seed):
    """Train a model with a seed. Returns the dict that is a line of runs.jsonl, and None: no picture."""
    start, run, row = time.process_time(), Run(config, images, name, seed), {"curve": [], "sampling": [], "guidance": []}
    for steps in config.marks(name):
        while run.trainer.steps_made < steps:
            run.step()
        row["curve"].append({"steps": steps, **measure(judge, *run.draw(config.samples))})
        if steps == config.steps and name in SAMPLED:
            for number in config.sampling_steps:
                drawn = run.draw(config.samples, sampler=SamplerConfig("ddpm", number))
                row["sampling"].append({"steps": number, **measure(judge, *drawn)})
        if steps == config.steps and name == GUIDED:
            row["guidance"] = [{"scale": scale, **measure_guided(judge, run, config, scale)} for scale in SCALES]
    return {**config.record(name, seed), **row, "seconds": time.process_time() - start}, None


def measure_guided(judge, run, config, scale):
    """As the judge measures, and precision and recall in its features, as the paper's tables have them."""
    drawn, labels = run.draw(config.samples, cfg_scale=scale)
    precision, recall = None, None
    if drawn is not None:
        precision, recall = precision_recall(judge.read(judge.images.train)[0], judge.read(drawn)[0])
    return {**measure(judge, drawn, labels), "precision": precision, "recall": recall}


# ----------------------------------------------------------------------------------------------------------------------
# Findings


class Results:
    """The numbers of all runs. curves: {model: {steps: Column of the distance}}; sampling: {model: {sampling steps: Column
    of the distance}}; guidance: {quantity: {scale: Column}}; gmacs: {model: GMACs of a forward pass}."""

    def __init__(self, config, rows):
        self.config, self.rows = config, rows
        groups = {name: [row for row in rows if row["recipe"] == name] for name in SHAPES}
        self.curves = {name: collect(group, "curve", "steps") for name, group in groups.items()}
        self.sampling = {name: collect(groups[name], "sampling", "steps") for name in SAMPLED}
        quantities = ("frechet_distance", "class_accuracy", "precision", "recall")
        self.guidance = {name: collect(groups[GUIDED], "guidance", "scale", name) for name in quantities}
        self.gmacs = {name: gmacs(name) for name in SHAPES}

    def at_end(self, name):
        """The distance at the steps that all models make."""
        return self.curves[name][self.config.steps]

    def compute(self, name, steps):
        """GMACs of so many training steps: the backward pass takes two products for each one of the forward pass."""
        return 3 * self.gmacs[name] * self.config.batch_size * steps

    def at_compute(self, name, budget):
        """The mean distance at this training compute, interpolated in ln(distance) over ln(compute); nan outside."""
        curve = self.curves[name]
        x = np.log([self.compute(name, steps) for steps in curve])
        y = np.log([column.mean for column in curve.values()])
        return math.exp(np.interp(math.log(budget * (1 - 1e-9)), x, y, left=math.nan, right=math.nan))


def collect(rows, part, key, quantity="frechet_distance"):
    """{key: Column of the quantity over the rows} of a part of each row."""
    entries = [entry for row in rows for entry in row[part]]
    return {at: Column([e[quantity] for e in entries if e[key] == at]) for at in dict.fromkeys(e[key] for e in entries)}


def papers_model(name):
    """The row of the paper's table for a model of ours, whose patches are half as large."""
    size, patch = name.split("/")
    return PAPERS[f"{size}/{2 * int(patch)}"]


def gmacs(name):
    return count_gmacs(**SHAPES[name])


@functools.cache  # a tenth of a second each, and every report needs those of all models
def count_gmacs(**shape):
    return forward_macs(build("DiT-S/2", **shape, input_size=8, in_channels=1, num_classes=10)) / 1e9


def below(ours, theirs):
    """Whether a Column is lower than another by more than two standard errors of the difference; with one seed, whose noise
    is not known, whether it is lower at all."""
    spreads = (0, 0) if len(ours.values) == 1 else (ours.spread, theirs.spread)
    return theirs.mean - ours.mean > 2 * math.hypot(*spreads) / math.sqrt(len(ours.values))


def verdict(holds, of):
    """What is said of a finding that holds in `holds` of `of` cases."""
    return "holds" if holds == of else "holds in part" if holds > of / 2 else "does not hold at this scale"


def compare(results, pairs):
    """(verdict, text) of the finding that in each pair of models (larger, smaller) the larger one is better."""
    columns = [(results.at_end(larger), results.at_end(smaller)) for larger, smaller in pairs]
    better = sum(below(*pair) for pair in columns)
    worse = sum(below(*reversed(pair)) for pair in columns)
    text = f"in {better} of {len(pairs)} pairs of neighbours the distance is lower, in {worse} it is higher"
    return verdict(better, len(pairs)), text


def finding_size(results):
    pairs = [(f"{b}/{p}", f"{a}/{p}") for p in PATCHES for a, b in itertools.pairwise(SIZES)]
    return compare(results, pairs)


def finding_tokens(results):
    pairs = [(f"{s}/{b}", f"{s}/{a}") for s in SIZES for a, b in itertools.pairwise(PATCHES)]
    return compare(results, pairs)


def ours_and_papers(results):
    """Points (GMACs, distance) of our twelve models, and (GMACs, FID) of the paper's."""
    ours = [(results.gmacs[f"{s}/{p}"], results.at_end(f"{s}/{p}").mean) for p in PATCHES for s in SIZES]
    return ours, [(row.gmacs, row.fid) for row in SCALING]


def finding_gmacs(results):
    ours, papers = map(correlation, ours_and_papers(results))
    said = "holds" if ours < -0.8 else "holds in part" if ours < -0.5 else "does not hold at this scale"
    return said, f"the correlation of log GMACs and distance is {ours:.2f}, in the paper {papers:.2f}"


def finding_equal_gmacs(results):
    texts, near = [], 0
    for a, b in (pairs := [("S/1", "B/2"), ("S/2", "B/4"), ("B/1", "L/2")]):
        ratio = results.at_end(a).mean / results.at_end(b).mean
        near += 0.8 < ratio < 1.25
        papers = papers_model(a).fid / papers_model(b).fid
        texts.append(f"{a} has {ratio:.2f} times the distance of {b} (paper: {papers:.2f})")
    return verdict(near, len(pairs)), "; ".join(texts)


def finding_training_compute(results):
    grows, texts, sizes = 0, [], list(SIZES)
    for patch in PATCHES:
        best = []
        for size in sizes[:-1]:
            name = f"{size}/{patch}"
            budget = results.compute(name, max(results.curves[name]))
            distances = {s: results.at_compute(f"{s}/{patch}", budget) for s in sizes}
            best.append(min((d, s) for s, d in distances.items() if not math.isnan(d))[1])
        order = [sizes.index(size) for size in best]
        grows += order == sorted(order) and order[-1] > order[0]
        texts.append(f"patch size {patch}: {', '.join(best)}")
    text = "the best size at the compute at which S, B and L end is, for "
    return verdict(grows, len(PATCHES)), text + "; for ".join(texts)


def finding_designs(results):
    names = {block: DESIGN if block == BLOCKS[0] else f"{DESIGN}, {block}" for block in BLOCKS}
    distances = {block: results.at_end(name) for block, name in names.items()}
    zero = distances[BLOCKS[0]]
    better = sum(below(zero, distances[block]) for block in BLOCKS[1:])
    order = sorted(BLOCKS, key=lambda block: distances[block].mean)
    papers = ", ".join(row.block for row in sorted(DESIGNS, key=lambda row: row.fid))
    shown = ", ".join(f"{block} {distances[block].text('{:.2f}')}" for block in order)
    text = f"adaln-zero is better than {better} of the 3 other designs: {shown}"
    return verdict(better, 3), f"{text} (the paper's order: {papers})"


def finding_sampling_compute(results):
    small, large = SAMPLED
    steps, least = min(results.sampling[small].items(), key=lambda item: item[1].mean)
    most = max(results.sampling[small])
    text = f"{small} has a distance of {least.mean:.2f} at best, with {steps} of up to {most} steps, "
    budget = results.gmacs[small] * most
    points = {n: column for n, column in results.sampling[large].items() if results.gmacs[large] * n <= budget}
    cheap = min(points.items(), key=lambda item: item[1].mean, default=None)
    number, best = min(results.sampling[large].items(), key=lambda item: item[1].mean)
    if cheap:
        text += f"{large} one of {cheap[1].mean:.2f} with {cheap[0]} steps, which cost less than {most} of {small}, and "
    holds = below(best, least) + bool(cheap and below(cheap[1], least))
    said = ("does not hold at this scale", "holds in part", "holds")[holds]
    return said, f"{text}{large} one of {best.mean:.2f} with {number} steps"


def finding_guidance(results):
    distance, accuracy, precision, recall = results.guidance.values()
    best, last = min(distance, key=lambda scale: distance[scale].mean), SCALES[-1]
    cases = (below(distance[best], distance[1.0]), below(precision[1.0], precision[last]), below(recall[last], recall[1.0]))
    text = f"the distance falls from {distance[1.0].mean:.2f} to {distance[best].mean:.2f} at scale {best:g} and is "
    text += f"{distance[last].mean:.2f} at {last:g}"
    for name, columns in (("class accuracy", accuracy), ("precision", precision), ("recall", recall)):
        text += f"; {name} goes from {columns[1.0].mean:.2f} to {columns[best].mean:.2f} and {columns[last].mean:.2f}"
    return verdict(sum(cases), len(cases)), text


FINDINGS = {
    "Larger transformers are better at every patch size (Figure 6, top)": finding_size,
    "Smaller patches, and so more tokens, are better at every size (Figure 6, bottom)": finding_tokens,
    "GMACs decide about quality (Figure 8)": finding_gmacs,
    "Models of about equal GMACs are about equally good, however they spend them (section 5)": finding_equal_gmacs,
    "The best size grows with the training compute (Figure 9)": finding_training_compute,
    "adaLN-Zero is the best of the four block designs (Figure 5)": finding_designs,
    "More sampling steps do not make up for a smaller model (Figure 10)": finding_sampling_compute,
    "Guidance trades recall for precision, and a moderate scale has the lowest distance (Tables 2 and 3)": finding_guidance,
}


def findings(results):
    """What is said of each of the `FINDINGS`, as a list of dicts."""
    found = [(claim, *function(results)) for claim, function in FINDINGS.items()]
    return [dict(zip(("finding", "verdict", "text"), entry, strict=True)) for entry in found]


def report(results, judge, found):
    """All that is to be said, as Markdown."""
    config, floor = results.config, judge.floor(results.config.samples)["frechet_distance"]
    minutes = sum(row["seconds"] for row in results.rows) / 60
    text = (
        f"{len(results.rows)} runs took {minutes:.0f} minutes of processor time; on two idle cores that is half as many. "
        f"{config.samples} samples are judged, and the distance of as many real test images is {floor:.2f}. "
    )
    if config.seeds > 1:
        text += f"Each model has {config.seeds} seeds, and lower means lower by more than two standard errors.\n\n"
    else:
        text += "There is one seed only: its noise is not known, and what is said rests on the bare numbers.\n\n"
    text += "".join(f"- **{entry['finding']}: {entry['verdict']}.** {entry['text']}.\n" for entry in found)
    text += (
        "\n| model | width, depth | MMACs | steps | distance | paper's model | Gflops | FID-50K |\n" + "|---" * 8 + "|\n"
    )
    for size, patch in itertools.product(SIZES, PATCHES):
        name = f"{size}/{patch}"
        shape, paper, ends = SHAPES[name], papers_model(name), results.curves[name]
        for steps in dict.fromkeys((config.steps, max(ends))):
            text += f"| {name} | {shape['hidden_size']}, {shape['depth']} | {1000 * results.gmacs[name]:.2f} | {steps} | "
            text += f"{ends[steps].text('{:.2f}')} | {paper.model} | {paper.gmacs} | {paper.fid} |\n"
    return text


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def line(axes, points, **style):
    """Means of Columns over x, with their standard deviations. points: {x: Column}."""
    means, spreads = ([getattr(column, name) for column in points.values()] for name in ("mean", "spread"))
    axes.errorbar([*points], means, spreads, capsize=2, markersize=4, linewidth=1.3, **style)


def draw_training(results, floor):
    """Figure 6: distance over training steps, by size for each patch size, and by patch size for each size."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, 12)
    panels = [(0, 4 * i, 4, f"patch size {patch}", [f"{s}/{patch}" for s in SIZES]) for i, patch in enumerate(PATCHES)]
    panels += [(1, 3 * i, 3, f"size {size}", [f"{size}/{p}" for p in PATCHES]) for i, size in enumerate(SIZES)]
    for row, column, width, title, names in panels:
        axes = figure.add_subplot(grid[row, column : column + width])
        for name in names:
            size, patch = name.split("/")
            label = f"{name} (paper: {papers_model(name).fid:g})"
            line(axes, results.curves[name], color=COLORS[size], marker=PATCHES[int(patch)], label=label)
        finish(axes, title, "training steps", "" if column else "Fréchet distance", log="xy", floor=floor)
    figure.suptitle("Distance over training steps; in brackets the paper's FID-50K after 400K steps; dotted: real images")
    return figure


def draw_compute(results, floor):
    """Figures 8 and 9: over GMACs, the paper's models and ours; over training compute, ours."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    papers, ours, training = figure.subplots(1, 3)
    points = dict(zip((ours, papers), ours_and_papers(results), strict=True))
    order = {ours: [(s, p) for p in PATCHES for s in SIZES], papers: [paper_name(row) for row in SCALING]}
    for axes, title in ((papers, "the paper's models, 400K steps"), (ours, f"ours, {results.config.steps} steps")):
        for (x, y), (size, patch) in zip(points[axes], order[axes], strict=True):
            spread = results.at_end(f"{size}/{patch}").spread if axes is ours else 0
            label = f"{size}/{patch if axes is ours else 2 * patch}"
            axes.errorbar(x, y, spread, color=COLORS[size], marker=PATCHES[patch], capsize=2, label=label, linestyle="")
        title = f"{title}: correlation {correlation(points[axes]):.2f}"
        quantity, real = ("Fréchet distance", floor) if axes is ours else ("FID-50K", None)
        finish(axes, title, "GMACs of a forward pass", quantity, None, "xy", real)
        axes.legend(frameon=False, fontsize=7, ncols=3)
    for size, patch in order[ours]:
        name = f"{size}/{patch}"
        curve = {results.compute(name, steps): column for steps, column in results.curves[name].items()}
        line(training, curve, color=COLORS[size], marker=PATCHES[patch], alpha=0.8)
    compute = "GMACs of all training steps, an image at a time"
    finish(training, "training compute", compute, "Fréchet distance", None, "xy", floor)
    return figure


def paper_name(row):
    """(size, our patch size) of a row of the paper's table."""
    size, patch = row.model.removeprefix("DiT-").split("/")
    return size, int(patch) // 2


def draw_findings(results, floor):
    """Figures 5 and 10, and guidance."""
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    (designs, sampling), (distance, others) = figure.subplots(2, 2)
    fids = {row.block: row.fid for row in DESIGNS}
    for i, block in enumerate(BLOCKS):
        name = f"{DESIGN}, {block}" if i else DESIGN
        line(designs, results.curves[name], marker="s", color=f"C{i}", label=f"{block} (paper: {fids[block]:g})")
    style = {"ylabel": "Fréchet distance", "floor": floor}
    finish(designs, f"block designs of {DESIGN}; in brackets the paper's FID-50K", "training steps", log="xy", **style)
    for name, points in results.sampling.items():
        at = {results.gmacs[name] * steps: column for steps, column in points.items()}
        line(sampling, at, marker="s", color=COLORS[name.split("/")[0]], label=name)
    finish(sampling, "sampling compute, DDPM", "GMACs of all sampling steps of an image", log="xy", **style)
    line(distance, results.guidance["frechet_distance"], marker="o", label=GUIDED)
    scales, papers = [*PAPER_GUIDANCE], list(zip(*PAPER_GUIDANCE.values(), strict=True))
    distance.plot(scales, papers[0], "k--", marker="x", label="the paper's XL/2 at 256 px, FID-50K")
    finish(distance, "guidance", "guidance scale", log="y", **style)
    for i, quantity in enumerate(("class_accuracy", "precision", "recall")):
        line(others, results.guidance[quantity], marker="o", color=f"C{i}", label=quantity.replace("_", " "))
        if i:
            others.plot(scales, papers[i], "--", marker="x", color=f"C{i}", label=f"the paper's {quantity}")
    others.set(ylim=(0, 1.02))
    finish(others, "guidance", "guidance scale", legend="lower left")
    return figure


PICTURES = {"training": draw_training, "compute": draw_compute, "findings": draw_findings}


def main(argv=None):
    parser = Parser(PaperConfig, __doc__)
    config = parser.parse(argv)
    if config.quick:
        config = dataclasses.replace(config, steps=4, batch_size=4, samples=40, seeds=1)
    with parser.report_errors():
        open_output(config)
        order = [(name, seed) for seed in range(config.seeds) for name in sorted(SHAPES, key=gmacs, reverse=True)]
        _, judge = open_data(config)
        rows = do_runs(config, order, train_and_judge, lambda row: f"{row['seconds']:.0f} s, {row['curve'][-1]}")
        results = Results(config, rows)
        found, floor = findings(results), judge.floor(config.samples)["frechet_distance"]
        text = report(results, judge, found)
        with write_errors(config.output):
            replace_file(Path(config.output, "paper.md"), lambda file: file.write(text.encode()))
            write_json(Path(config.output, "paper.json"), {"floor": floor, "findings": found, "runs": results.rows})
            for name, draw in PICTURES.items():
                save(draw(results, floor), Path(config.output, f"paper-{name}.png"), dpi=80)
        print(text)


if __name__ == "__main__":
    main()
