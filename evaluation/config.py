"""Options of evaluate.py, of tools/likelihood.py and tools/sweep.py, and of FID during training."""

from dataclasses import dataclass
from pathlib import Path

from data.config import ColumnsConfig
from diffusion.registry import SAMPLERS
from runtime.config import Config, KeysOf, as_lists, option
from runtime.errors import UserError
from sampling.config import ComputeConfig, GuidanceConfig, SamplerConfig, SetConfig, SourceConfig, TextConfig


def check_networks(option, names):
    """Raises UserError for a name of no feature network."""
    known = KeysOf("evaluation.features:NETWORKS")
    for name in names:
        if name.partition(":")[0] not in known:
            raise UserError(f"{option} {name}", "no such network", f"take one of {', '.join(known)}; see --help")


@dataclass(frozen=True, kw_only=True)
class InceptionConfig(Config):
    """Inception network"""

    inception_weights: str | None = option(None, "file of the Inception network's weights (default: torch-fidelity's file, "
        "downloaded when missing)", path="file", metavar="FILE", changeable=True)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(InceptionConfig):
    """How sets of images are compared."""

    image_column: str | None = option(None, "column with the images, of Parquet or Arrow data that has one of that name "
        "(default: the only one there is)")  # fmt: skip
    features: tuple[str, ...] = option(("inception",), "feature networks to measure with, several in one pass over the "
        "images: inception, as published; efficientnet-lite0; clip, for CMMD; timm:NAME for any model of timm, such as "
        "timm:vit_large_patch14_dinov2.lvd142m for FD-DINOv2 (default: inception)", metavar="NETWORK")  # fmt: skip
    resamples: int = option(10, "random halves of the samples whose numbers give the standard errors; 0 for none", low=0)
    batch_size: int = option(64, "images per process and forward pass of the feature networks", low=1)
    cache: str | None = option(None, "folder that keeps the features, of inception 12 kB an image and 33 MB a set, and "
        "gives them back when the same images are measured again (default: none)", metavar="FOLDER")  # fmt: skip

    def check(self):
        super().check()
        check_networks("--features", self.features)
        if self.resamples == 1:
            raise UserError("--resamples 1", "one half has no standard error", "give 2 or more, or 0 for none")


@dataclass(frozen=True)
class EvaluateConfig(MeasureConfig):
    """evaluate.py's options."""

    reference: str = option(help=".npz file, folder of images, or Parquet or Arrow data to compare with", positional=True)
    samples: str = option(help=".npz file, folder, or Parquet or Arrow data of the images to measure", positional=True)
    device: str | None = option(None, "where to compute (default: the best there is)", choices=("cuda", "mps", "cpu"))


SWEPT = {SourceConfig: ("average",), SamplerConfig: None, GuidanceConfig: None}  # None: all options
Source, Sampler, Guidance = (as_lists(config_class, names) for config_class, names in SWEPT.items())


@dataclass(frozen=True, kw_only=True)
class SweepConfig(MeasureConfig, SetConfig):
    """Options of tools/sweep.py."""

    ref: str = option(help="what to compare with: a folder or .npz file of images of the size that the model draws; for "
        "the Inception network a file may hold mu and sigma instead", metavar="REF", basic=True)  # fmt: skip
    output: str = option("sweep", "folder of results.json, from which the command resumes, and of curves.png", basic=True)
    text: TextConfig
    source: Source
    sampler: Sampler
    guidance: Guidance
    compute: ComputeConfig

    def check(self):
        super().check()
        if self.num_fid_samples < 2:
            raise UserError("--num-fid-samples 1: one image has no covariance; draw 2 or more")


@dataclass(frozen=True)
class EvalConfig(InceptionConfig):
    """evaluation"""

    eval_every: int | None = option(None, "measure FID of the averaged weights every N steps (default: never)", low=1,
        metavar="N", changeable=True)  # fmt: skip
    eval_reference: str | None = option(None, "images that FID compares with: an .npz file, which may hold mu and sigma "
        "instead of images, a folder, or Parquet or Arrow data, in its column of --image-column if it has one of that name",
        metavar="PATH", changeable=True)  # fmt: skip
    eval_features: tuple[str, ...] = option(("inception",), "feature networks to measure the distance with, by the names "
        "that evaluate.py --features takes; FID is that of inception (default: inception)", metavar="NETWORK",
        changeable=True)  # fmt: skip
    eval_samples: int = option(10_000, "images that are drawn to measure FID; FID falls as their number grows, so compare "
        "only values of equally many images", low=2, changeable=True)  # fmt: skip
    eval_cfg_scale: float = option(1.0, "guidance scale of the images drawn to measure FID; 1 turns guidance off", low=0,
        changeable=True)  # fmt: skip
    eval_sampler: str | None = option(None, "sampler of the images drawn to measure FID (default: the objective's own: "
        "ddpm, flow-heun or meanflow)", choices=tuple(SAMPLERS), metavar="SAMPLER", changeable=True)  # fmt: skip
    eval_sampling_steps: int | None = option(None, "steps of that sampler (default: the objective's: 250 of ddpm, 20 of "
        "flow-heun, 1 of meanflow)", low=1, high=1000, changeable=True)  # fmt: skip

    def check(self):
        if (self.eval_every is None) != (self.eval_reference is None):
            raise UserError("--eval-every and --eval-reference: both are needed, or neither")
        check_networks("--eval-features", self.eval_features)


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(ColumnsConfig, SourceConfig):
    """Options of tools/likelihood.py."""

    ckpt: str = option(help="checkpoint of train.py, .safetensors, or a folder or hub name in diffusers' format")
    vae: str | None = option(None, 'autoencoder of the model, which must be "none": pixels (default: the recorded one)')
    data_path: str = option(help='folder of images with one folder per class, Parquet or Arrow data, "digits" or "mnist"')
    text_encoder: str | None = option(None, "text encoder of a model of texts (default: the recorded one)")
    num_images: int = option(1000, "images to measure, chosen from the data by --seed; all if there are fewer", low=2)
    num_timesteps: int = option(1000, "timesteps of the diffusion process; with fewer than the 1000 of training it is a "
        "different process, whose bound is looser; of a flow, steps through its ODE", low=2, high=1000)  # fmt: skip
    batch_size: int = option(32, "images per process and forward pass of the model", low=1)
    seed: int = option(0, "seed of the choice of images and of the noise of each image", low=0)
    output: str | None = option(None, "file of the report; the plot is written beside it, as .png (default: the "
        "name of the checkpoint's file with .likelihood.json, beside it; of a run's folder likelihood.json in it)",
        metavar="FILE")  # fmt: skip
    device: str | None = option(None, "where to compute (default: the best there is)", choices=("cuda", "mps", "cpu"))

    def check(self):
        if self.report.suffix != ".json":
            raise UserError(f"--output {self.output}", "name a .json file; the plot gets the same name with .png")

    @property
    def report(self):
        """The report's path: beside the checkpoint, in a run's folder, or, of a name on the hub, in this folder."""
        ckpt = Path(self.lora or self.ckpt)
        beside = ckpt / "likelihood.json" if ckpt.is_dir() else "likelihood.json"
        return Path(self.output or (ckpt.with_suffix(".likelihood.json") if ckpt.is_file() else beside))
