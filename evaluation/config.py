"""Options of evaluate.py, of likelihood.py, and of FID during training."""

from dataclasses import dataclass
from pathlib import Path

from runtime.config import Config, option
from runtime.errors import UserError
from sampling.config import SourceConfig


@dataclass(frozen=True, kw_only=True)
class InceptionConfig(Config):
    """Inception network"""

    inception_weights: str | None = option(None, "file of the Inception network's weights (default: torch-fidelity's file, "
        "downloaded when missing)", metavar="FILE", changeable=True)  # fmt: skip

    def check(self):
        path = self.inception_weights
        if path is not None and not Path(path).is_file():
            raise UserError(f"--inception-weights {path}: no such file; leave the option out to download the weights")


@dataclass(frozen=True)
class EvaluateConfig(InceptionConfig):
    """evaluate.py's options."""

    reference: str = option(help=".npz file or folder of images to compare with", positional=True, metavar="REFERENCE")
    samples: str = option(help=".npz file or folder of the images to measure", positional=True, metavar="SAMPLES")
    batch_size: int = option(64, "images per process and forward pass of the Inception network", low=1)
    cache: str | None = option(None, "folder that keeps the features, 12 kB an image and 33 MB a set, and gives them back "
        "when the same images are measured again (default: none)", metavar="FOLDER")  # fmt: skip
    device: str | None = option(None, "where to compute (default: the best there is)", choices=("cuda", "mps", "cpu"))


@dataclass(frozen=True)
class EvalConfig(InceptionConfig):
    """evaluation"""

    eval_every: int | None = option(
        None, "measure FID of the averaged weights every N steps (default: never)", low=1, metavar="N", changeable=True
    )
    eval_reference: str | None = option(None, "images that FID compares with: an .npz file, which may hold mu and sigma "
        "instead of images, or a folder", metavar="PATH", changeable=True)  # fmt: skip
    eval_samples: int = option(10_000, "images that are drawn to measure FID; FID falls as their number grows, so compare "
        "only values of equally many images", low=2, changeable=True)  # fmt: skip
    eval_cfg_scale: float = option(
        1.0, "guidance scale of the images drawn to measure FID; 1 turns guidance off", low=0, changeable=True
    )
    eval_sampling_steps: int = option(
        250, "DDPM steps of the images drawn to measure FID", low=1, high=1000, changeable=True
    )

    def check(self):
        super().check()
        if (self.eval_every is None) != (self.eval_reference is None):
            raise UserError("--eval-every and --eval-reference: both are needed, or neither")


@dataclass(frozen=True, kw_only=True)
class LikelihoodConfig(SourceConfig):
    """likelihood.py's options."""

    ckpt: str = option(help="checkpoint of train.py, weights as .safetensors, or a folder or hub name in diffusers' "
        "format")  # fmt: skip
    vae: str | None = option(None, 'autoencoder of the model, which must be "none": pixels (default: the recorded one)')
    data_path: str = option(help='folder of images with one folder per class, or "digits" or "mnist"')
    num_images: int = option(
        1000, "images to measure, chosen from the data at random by --seed; all of them if there are fewer", low=2
    )
    num_timesteps: int = option(1000, "timesteps of the diffusion process; with fewer than the 1000 of training it is a "
        "different process, whose bound is looser; of a flow, steps through its ODE", low=2, high=1000)  # fmt: skip
    batch_size: int = option(32, "images per process and forward pass of the model", low=1)
    seed: int = option(0, "seed of the choice of images and of the noise of each image", low=0)
    output: str = option("likelihood.json", "file of the report; the plot is written beside it, as .png", metavar="FILE")
    device: str | None = option(None, "where to compute (default: the best there is)", choices=("cuda", "mps", "cpu"))

    def check(self):
        if Path(self.output).suffix != ".json":
            raise UserError(f"--output {self.output}: name a .json file; the plot gets the same name with .png")
