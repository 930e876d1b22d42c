"""Which average of the weights is best: Fréchet distance of each in checkpoints of one run, or of runs with several seeds.

    python -m studies.averages --data digits --ckpt results/a/checkpoints/0001200.pt results/b/checkpoints/0001200.pt

All averages draw from the same noise and labels. A judge of the real images (`studies.judge`) gives the distances; ± is a
standard error over random halves of the images.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.timing import table
from checkpoint.opened import Checkpoint
from data.images import DATASETS
from evaluation.metrics import Statistics, frechet_distance, standard_errors
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.parser import Parser
from sampling.config import ComputeConfig, GuidanceConfig, SamplerConfig, SourceConfig
from sampling.pipeline import Pipeline, to_uint8
from studies.judge import FEATURES, Judge, RealImages

HALVES = 20
JUDGES = {"mnist": Path(__file__).with_name("mnist.judge.pt")}  # of other data one is trained, in seconds


@dataclass(frozen=True)
class AveragesConfig(Config):
    """Options of averages.py."""

    ckpt: tuple[str, ...] = option(help="checkpoints, each of which has its own columns", metavar="FILE")
    data: str = option("digits", "the real images", choices=tuple(DATASETS))
    images: int = option(1000, "images of each average", low=100)
    cfg_scale: float = option(1.0, "guidance scale; 1 is no guidance", low=0)
    steps: int = option(10, "steps of dpm-solver++", low=1, high=1000)


@torch.inference_mode()
def draw(ckpt, average, config):
    """(images (N, C, H, W) uint8, labels (N,)) of an average; the classes take turns."""
    source, guidance = SourceConfig(ckpt=ckpt, average=average), GuidanceConfig(cfg_scale=config.cfg_scale)
    pipeline = Pipeline.load(source, SamplerConfig("dpm-solver++", config.steps), guidance, ComputeConfig(device="cpu"))
    labels, images = torch.arange(config.images) % pipeline.condition.num_classes, []
    for indices in torch.arange(config.images).split(100):
        images.append(to_uint8(pipeline(labels[indices], *pipeline.noise(0, indices.tolist()))))
    pixels = torch.from_numpy(np.concatenate(images))[..., : pipeline.space.channels]
    return pixels.permute(0, 3, 1, 2).contiguous(), labels


def distance(judge, images, labels):
    """(Fréchet distance, its standard error, class accuracy)."""
    (features, classes), known = judge.read(images), judge.reference

    def frechet(part):
        found = Statistics(FEATURES).update(features[part])
        return frechet_distance(known.mu, known.sigma, found.mu, found.sigma)

    (error,) = standard_errors(lambda half: [frechet(half)], len(images), HALVES)
    return frechet(slice(None)), error, float((classes == labels).float().mean())


def main(argv=None):
    parser = Parser(AveragesConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        names = [*Checkpoint.open(config.ckpt[0]).averages]
        for ckpt in config.ckpt:
            if not names or [*Checkpoint.open(ckpt).averages] != names:
                raise UserError(f"--ckpt {ckpt}", "its averages are not those of the first", "name runs of equal options")
        images = RealImages.load(config.data, DATASETS[config.data].side)
        judge = Judge.open(images, JUDGES.get(config.data, "results/digits.judge.pt"))
        floor, rows = judge.floor(config.images)["frechet_distance"], []
        for name in tqdm(names, unit="average"):
            found = [distance(judge, *draw(ckpt, name, config)) for ckpt in config.ckpt]
            mean, error = np.mean([f[0] for f in found]), math.sqrt(sum(f[1] ** 2 for f in found)) / len(found)
            row = {"average": name} | {
                Path(c).parents[1].name: f"{f[0]:.2f}" for c, f in zip(config.ckpt, found, strict=True)
            }
            rows.append(row | {"mean": f"{mean:.2f} ± {error:.2f}", "accuracy": f"{np.mean([f[2] for f in found]):.1%}"})
        print(table(rows))
        print(f"real test images ({min(config.images, len(images.test))}): {floor:.2f}")


if __name__ == "__main__":
    main()
