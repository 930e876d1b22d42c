"""Newer ideas for `--recipe fast`, each measured beside it: equal time, several seeds, a learning rate tuned for each.

    python -m studies.candidates --data /path/to/cifar10 --output results/candidates
    python -m studies.candidates --data /path/to/cifar10 --output results/candidates --recipes baseline modern --seeds 2

The baseline is `--recipe fast` (flow, logit-normal timesteps) with a cosine schedule. A candidate is a class of this file
that changes the model, the loss or the optimizer of a run of `studies.recipes`. The time of its step is measured in turns
with the baseline's; it then gets the number of steps that take the baseline's time. Its learning rate is the best of three,
each tried in a run of a quarter of the steps.

Judged are the averaged weights, without guidance and at one scale of it: Frechet distance, its standard error over random
halves of the images, and class accuracy. Digits are judged by `studies.judge`; colour images by features of
EfficientNet-Lite0 at 128 pixels: the distance is to the test images, and a linear classifier of these tells the classes.

The same command does the runs that are missing, and `runs.jsonl` in --output keeps their numbers.
"""

import dataclasses
import functools
import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from torch import nn

from benchmarks import timing
from checkpoint import files
from diffusion.flow import Flow
from diffusion.gaussian_diffusion import mean_flat, per_sample
from evaluation.features import load_network, resize
from evaluation.metrics import Statistics, standard_errors
from models import BLOCKS, DiTBlock
from runtime.config import option
from runtime.errors import UserError
from runtime.files import replace_file, write_errors, write_json
from runtime.parser import Parser
from studies import recipes
from studies.judge import RealImages
from studies.recipes import BASELINE, Column, RecipesConfig, Run, Setting

CFG_SCALE = 3.0
SIDE, STRIDE = 128, 16  # of an image for EfficientNet-Lite0, and of the layer that is aligned with: 8x8 places


# ----------------------------------------------------------------------------------------------------------------------
# The candidates


class Candidate:
    """words: options of train.py. prepare: what is done to the model before its average and its optimizer are made; begin:
    to the run before its first step; see: to the objective before each step."""

    words = ""

    def prepare(self, model):
        pass

    def begin(self, run):
        pass

    def see(self, run, batch):
        pass


class SwiGLU(nn.Module):
    """(silu(x W) * x V) U: Shazeer 2020, eq. 6."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_and_value, self.out = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x):
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class ModernBlock(DiTBlock):
    """adaLN-Zero with RMSNorm, SwiGLU of as many parameters as the MLP, and RMSNorm of queries and keys."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **more):
        super().__init__(hidden_size, num_heads, mlp_ratio, **more)
        self.norm1, self.norm2 = (nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.attn = AttentionRope(
            hidden_size, num_heads, num_prefix_tokens=0, qk_norm=True, norm_layer=partial(nn.RMSNorm, eps=1e-6)
        )
        self.mlp = SwiGLU(hidden_size, int(hidden_size * mlp_ratio * 2 / 3))


class DropoutBlock(DiTBlock):
    """A tenth of the MLP's hidden units is dropped."""

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, **more):
        super().__init__(hidden_size, num_heads, mlp_ratio, **more)
        self.mlp.drop1 = nn.Dropout(0.1)


class Block(Candidate):
    """A block design of this file."""

    def __init__(self, name, design, words=""):
        self.words = f"--block {name} {words}"
        BLOCKS[name] = design


class Tokens(nn.Module):
    """Class embeddings with learned positions as further tokens, from block number `first` on (Li and He 2025, JiT)."""

    def __init__(self, model, number, first):
        super().__init__()
        self.positions = nn.Parameter(0.02 * torch.randn(number, model.hidden_size))
        model.y_embedder.register_forward_hook(self.keep)
        model.blocks[first].register_forward_pre_hook(self.add)

    def keep(self, module, args, y_emb):
        self.y_emb = y_emb

    def add(self, module, args):  # behind the image's tokens: the last layer reads those alone
        x, c = args
        return torch.cat([x, self.y_emb[:, None] + self.positions], dim=1), c


class ClassTokens(Candidate):
    def prepare(self, model):
        model.class_tokens = Tokens(model, 4, model.depth // 2)


class CleanImage(Candidate):
    """The model predicts x_0; its error is that of the velocity (x_s - x_0) / max(s, 0.05) (Li and He 2025, JiT)."""

    low = 0.05

    def prepare(self, model):
        model.register_forward_hook(self.velocity)

    @classmethod
    def velocity(cls, model, args, output):
        x_s, t = args[:2]
        return (x_s - output) / per_sample(t / 1000, x_s).clamp(min=cls.low)

    def begin(self, run):
        run.trainer.objective = VelocityLoss(self.low)


class VelocityLoss(Flow):
    def __init__(self, low):
        super().__init__()
        self.low = low

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        s = per_sample(t / 1000, x_start)
        velocity = model((1 - s) * x_start + s * noise, t, **model_kwargs)
        mse = mean_flat((velocity - s / s.clamp(min=self.low) * (noise - x_start)) ** 2)
        return {"loss": mse, "mse": mse}


class Muon(Candidate):
    """torch.optim.Muon for the matrices of the blocks, with steps as long as AdamW's usual ones, AdamW for the rest."""

    def begin(self, run):
        run.trainer.optimizer = MuonAndAdamW(run.trainer.model, run.trainer.recipe)


class MuonAndAdamW:
    """What the Trainer uses of an optimizer."""

    def __init__(self, model, recipe):
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
        if not hasattr(torch.optim, "Muon"):
            raise UserError("--recipes muon", f"PyTorch {torch.__version__} has no Muon", "use version 2.9 or later")
        muon = torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")
        self.both = muon, torch.optim.AdamW(others, lr=recipe.lr, betas=recipe.betas, weight_decay=0, fused=True)
        self.param_groups = [{"lr": recipe.lr}]

    def zero_grad(self):
        for optimizer in self.both:
            optimizer.zero_grad()

    def step(self):
        for optimizer in self.both:
            optimizer.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            optimizer.step()


class Alignment(Candidate):
    """REPA (Yu et al. 2025): the tokens after the middle block, through a small MLP, are to point where the features of the
    same clean image do that a pretrained network has at their places. The features are computed once, and stored."""

    weight = 0.5

    def prepare(self, model):
        width = model.hidden_size
        model.aligned = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 112))

    def begin(self, run):
        model, stored = run.trainer.model, open_features(run.config, run.images)
        model.blocks[model.depth // 2 - 1].register_forward_hook(self.keep)
        run.trainer.objective = AlignedFlow(self, stored, model.aligned, model.sizes.grid)

    def keep(self, block, args, x):
        self.tokens = x

    def see(self, run, batch):
        run.trainer.objective.see(batch)


class AlignedFlow(Flow):
    def __init__(self, middle, stored, projection, grid):
        super().__init__()
        self.middle, self.stored, self.projection, self.grid = middle, stored, projection, grid

    def see(self, batch):
        features = F.adaptive_avg_pool2d(self.stored[batch["index"]].float(), self.grid)  # (N, C, *grid)
        flipped = batch["flipped"][:, None, None, None]
        self.features = torch.where(flipped, features.flip(-1), features).flatten(2).transpose(1, 2)  # (N, T, C)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        losses = super().training_losses(model, x_start, t, model_kwargs, noise)
        cosine = F.cosine_similarity(self.projection(self.middle.tokens), self.features, dim=-1).mean(dim=1)
        return {"loss": losses["loss"] - self.middle.weight * cosine, "mse": losses["mse"], "cosine": cosine}


CANDIDATES = {
    BASELINE: Candidate,
    "modern": partial(Block, "modern", ModernBlock, "--rope"),
    "class-tokens": ClassTokens,
    "muon": Muon,
    "repa": Alignment,
    "x0": CleanImage,
    "dropout": partial(Block, "dropout", DropoutBlock),
}


# ----------------------------------------------------------------------------------------------------------------------
# The judge, and features that are stored


@functools.cache
def network():
    found = load_network("efficientnet-lite0")
    found.side = found.size = SIDE  # of small images: 128 pixels cost a quarter of 224
    return found


@torch.inference_mode()
def features_of(images):
    """Features (N, 1280) of images (N, 3, H, W) uint8."""
    return torch.cat([network()(part.permute(0, 2, 3, 1)).pooled for part in images.split(100)])


def open_features(config, images):
    """Features of the training images at 8x8 places, (N, 112, 8, 8) float16, computed once. Each channel has mean 0 and
    deviation 1 over the images, so that no constant part makes all of them alike."""
    path = Path(config.output, "features.pt")
    if not path.exists():
        net, found = network(), []
        layers = nn.Sequential(net.model.conv_stem, net.model.bn1, *net.model.blocks[:5])
        with torch.inference_mode():
            for part in images.train.split(100):
                x = resize(part.permute(0, 2, 3, 1), net.side, net.size, net.filter)
                found.append(layers((x - net.mean) / net.std).half())
        found = torch.cat(found)
        deviation, mean = torch.std_mean(found[:5000].float(), dim=(0, 2, 3), keepdim=True)
        for part in found.split(1000):
            part.copy_((part - mean) / deviation)
        files.save(path, {"features": found})
    return files.load(path, mmap=True)["features"]


class FeatureJudge:
    """Judges in EfficientNet-Lite0's features of the test images, which neither it nor a model of the study was trained on.
    accuracy: of the classes that ridge regression tells, where it is fitted to one half and asked for the other."""

    def __init__(self, images, path):
        if not os.path.exists(path):
            files.save(path, {"features": features_of(images.test)})
        x = files.load(path)["features"].double()
        self.reference, labels = Statistics(x.shape[1]).update(x), images.test_labels
        self.weights = self.fit(x, labels)
        half = self.fit(x[::2], labels[::2])
        self.accuracy = float((self.classes(x[1::2], half) == labels[1::2]).float().mean())

    def fit(self, x, labels):
        self.mean, self.scale = self.reference.mean, (self.reference.scatter.diagonal() / self.reference.count).sqrt()
        x = F.pad((x - self.mean) / self.scale, (0, 1), value=1.0)
        return torch.linalg.solve(x.T @ x + 100 * torch.eye(x.shape[1]).double(), x.T @ F.one_hot(labels).double())

    def classes(self, x, weights):
        return (F.pad((x - self.mean) / self.scale, (0, 1), value=1.0) @ weights).argmax(dim=1)

    def read(self, images):
        features = features_of(images).double()
        return features, self.classes(features, self.weights)


def measure(judge, images, labels):
    """{"distance", "error": its standard error, "accuracy"} of drawn images, None each where the training has diverged."""
    if images is None:
        return {"distance": None, "error": None, "accuracy": None}
    features, classes = judge.read(images)
    known, features = judge.reference, features.double()
    sigma = known.scatter / (known.count - 1)

    def distance(rows):
        """`frechet_distance` for fewer images than features: the root's trace is that of a matrix of images."""
        x = features[rows] - features[rows].mean(0)
        trace = sigma.trace() + (x**2).sum() / (len(x) - 1)
        roots = torch.linalg.eigvalsh(x @ sigma @ x.T / (len(x) - 1)).clamp(min=0).sqrt()
        return float(((features[rows].mean(0) - known.mean) ** 2).sum() + trace - 2 * roots.sum())

    accuracy = float((classes == labels).float().mean())
    return {"distance": distance(slice(None)), "error": standard_errors(distance, len(features)), "accuracy": accuracy}


# ----------------------------------------------------------------------------------------------------------------------
# Runs

COMMON = "--lr-schedule cosine --lr-warmup-steps 50"
LRS = {"digits": (2e-3, 4e-3, 8e-3), "mnist": (2e-3, 4e-3, 8e-3), "folder": (1e-3, 2e-3, 4e-3)}
SETTINGS = {  # a run takes half a minute, two and three minutes of a core
    "digits": Setting(8, 720, f"--hidden-size 96 --depth 4 --num-heads 4 --patch-size 2 --global-batch-size 32 {COMMON}"),
    "mnist": Setting(28, 1600, f"--hidden-size 96 --depth 4 --num-heads 4 --patch-size 7 --global-batch-size 64 {COMMON}"),
    "folder": Setting(32, 1500, f"--hidden-size 96 --depth 4 --num-heads 4 --patch-size 4 --global-batch-size 32 {COMMON}"),
}


class CandidateRun(Run):
    def __init__(self, config, images, recipe, seed):
        self.config, self.candidate = config, CANDIDATES[split(recipe)[0]]()
        super().__init__(config, images, recipe, seed)
        self.candidate.begin(self)

    def prepare(self, model):
        self.candidate.prepare(model)

    def step(self):
        batch = next(self.batches)
        self.candidate.see(self, batch)
        return self.trainer.step(batch).losses["loss"].mean()


def split(recipe):
    """ "NAME, lr RATE" -> (NAME, RATE); RATE may be missing."""
    name, _, lr = recipe.partition(", lr ")
    return name, lr or "1e-3"


@dataclass(frozen=True)
class CandidatesConfig(RecipesConfig):
    """Options of candidates.py."""

    recipes: tuple[str, ...] = option(tuple(CANDIDATES), "candidates to run", choices=tuple(CANDIDATES), metavar="NAME")
    seeds: int = option(2, "number of seeds; 0 tunes the learning rates alone", low=0, high=1000)
    lrs: tuple[float, ...] | None = option(None, "learning rates to try in short runs; a single one is taken untried "
        "(default: by the data)", above=0)  # fmt: skip
    samples: int = option(1000, "images to judge", low=20, high=100_000)

    @property
    def setting(self):
        return SETTINGS.get(self.data, dataclasses.replace(SETTINGS["folder"], image_size=self.image_size))

    def steps_of(self, recipe):
        return max(1, round(self.equal_steps / recipes.read_costs(self.output).get(split(recipe)[0], 1.0)))

    def words(self, recipe):
        name, lr = split(recipe)
        fixed = f"--image-size {self.setting.image_size} --device {self.device} --recipe fast {recipes.COMMON}"
        words = f"{fixed} {self.setting.flags} {self.flags or ''} {CANDIDATES[name]().words}"
        return ["--data-path", self.data, *words.split(), "--lr", lr, "--max-steps", str(self.steps_of(recipe))]

    def start(self, images, recipe, seed):
        return CandidateRun(self, images, recipe, seed)

    def record(self, recipe, seed):
        return {"recipe": recipe, "seed": seed, "flags": self.text(recipe), "samples": self.samples}


def train_and_judge(config, images, judge, recipe, seed, guided=True):
    """Train a candidate with a seed: (the dict that is a line of runs.jsonl, images of a picture or None)."""
    started, run = time.process_time(), config.start(images, recipe, seed)
    losses = [run.step() for _ in range(config.steps_of(recipe))]
    row = {**config.record(recipe, seed), "seconds": time.process_time() - started}
    row |= {"parameters": sum(p.numel() for p in run.trainer.model.parameters())}
    row |= {"loss": recipes.number(torch.stack(losses[-50:]).mean().item())}
    count = min(config.samples, len(images.test))
    sample, labels = run.draw(count)
    row["unguided"] = measure(judge, sample, labels)
    if guided:
        sample, labels = run.draw(count, cfg_scale=CFG_SCALE)
        row["guided"] = measure(judge, sample, labels)
    return row, sample


def say(row):
    return ", ".join(f"{row[kind]['distance']:.2f} {kind}" for kind in ("unguided", "guided") if kind in row)


def tune(config, recipe, data):
    """(the best of the learning rates in short runs, their distances)."""
    rates = config.lrs or LRS.get(config.data, LRS["folder"])
    if len(rates) == 1:
        return f"{rates[0]:g}", {}
    short = dataclasses.replace(config, steps=config.equal_steps // 4, output=f"{config.output}/tuning", samples=500)
    os.makedirs(short.output, exist_ok=True)
    write_json(Path(short.output, "costs.json"), recipes.read_costs(config.output))
    order = [(f"{recipe}, lr {lr:g}", 0) for lr in rates]
    rows = recipes.do_runs(short, order, partial(train_and_judge, guided=False), say, data)
    found = {split(row["recipe"])[1]: row["unguided"]["distance"] for row in rows}
    return min(found, key=lambda lr: found[lr] or float("inf")), found


def open_data(config):
    """(RealImages, what judges)."""
    if config.data in SETTINGS:
        return recipes.open_data(config)
    torch.set_num_threads(1)
    images = RealImages.load(config.data, config.setting.image_size)
    return images, FeatureJudge(images, os.path.join(config.output, "reference.pt"))


COLUMNS = {
    "distance": (lambda row: row["unguided"]["distance"], "{:.3g}"),
    "error": (lambda row: row["unguided"]["error"], "{:.2g}"),
    "accuracy": (lambda row: row["unguided"]["accuracy"], "{:.3f}"),
    "guided": (lambda row: row["guided"]["distance"], "{:.3g}"),
    "guided error": (lambda row: row["guided"]["error"], "{:.2g}"),
    "guided accuracy": (lambda row: row["guided"]["accuracy"], "{:.3f}"),
    "steps": (lambda row: row["steps"], "{:.0f}"),
    "seconds": (lambda row: row["seconds"], "{:.0f}"),
}


def report(config, rows, tuned):
    """The table as Markdown. tuned: {recipe: (lr, {lr: distance})}."""
    summary, costs, lines = {}, recipes.read_costs(config.output), []
    for row in rows:
        summary.setdefault(split(row["recipe"])[0], []).append(row | {"steps": config.steps_of(row["recipe"])})
    summary = {
        name: {column: Column([value(row) for row in own]) for column, (value, _) in COLUMNS.items()}
        for name, own in summary.items()
    }
    for name, columns in summary.items():
        line = {"recipe": name, "runs": len(columns["steps"].values), "lr": tuned[name][0]}
        line["quarter"] = ", ".join(f"{lr}: {value:.3g}" for lr, value in tuned[name][1].items())
        line |= {"time of a step": f"{costs[name]:.2f}"}
        line |= {column: columns[column].text(pattern) for column, (_, pattern) in COLUMNS.items()}
        verdicts = [recipes.verdict(summary, name, column) for column in ("distance", "guided")]
        lines.append(line | {"verdict": verdicts[0], "guided verdict": verdicts[1]})
    return timing.table(lines) + "\n"


def main(argv=None):
    parser = Parser(CandidatesConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        recipes.open_output(config)
        for recipe in config.recipes:
            recipes.resolve(config.words(recipe))
        data = open_data(config)
        if unknown := [recipe for recipe in config.recipes if recipe not in recipes.read_costs(config.output)]:
            recipes.measure_costs(config, data[0], unknown)
        tuned = {recipe: tune(config, recipe, data) for recipe in config.recipes}
        order = [(f"{recipe}, lr {tuned[recipe][0]}", seed) for seed in range(config.seeds) for recipe in config.recipes]
        rows = recipes.do_runs(config, order, train_and_judge, say, data)
        with write_errors(config.output):
            text = report(config, rows, tuned)
            replace_file(Path(config.output, "table.md"), lambda file: file.write(text.encode()))
        print(text)


if __name__ == "__main__":
    main()
