"""The options of sampling, as sample.py and sample_ddp.py take them. Importing this module is fast: no torch."""

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint.config import MAX_SIZE, MODELS
from diffusion import check_sampler
from diffusion.registry import GUIDANCE_SCHEDULES, OBJECTIVES, SAMPLERS, SPACINGS
from runtime.config import Config, flag, option
from runtime.errors import UserError, about
from runtime.shapes import ImageSize

MAX_SEED = 2**63 - 1  # of torch.manual_seed
OF_SAMPLER = ("sampler", "num_sampling_steps", "eta")
# What a .safetensors file may say of the drawing: nothing that names a file
RECORDED = ("labels", "prompt", "samples_per_label", "columns", "enlarge", "captions", "cfg_scale", *OF_SAMPLER)
DEFAULTS = {name: objective.default_sampler for name, objective in OBJECTIVES.items()}
GRID_SAMPLER = ("dpm-solver++", 20)  # of grids in training, of all but flows: a twelfth of the time of DDPM's 250 steps


@dataclass(frozen=True)
class SourceConfig(Config):
    """model"""

    ckpt: str | None = option(None, "a checkpoint of train.py or of the original release; a run's folder, for the newest "
        "checkpoint; weights as .safetensors; or a folder or hub name in diffusers' format (default: the released DiT-XL/2 "
        "for --image-size 256 or 512, downloaded when missing)", basic=True)  # fmt: skip
    lora: str | None = option(None, "LoRA weights, a checkpoint of train.py --lora-rank or its run's folder, for the model "
        "--ckpt; needed where that is no longer where it was in training (default: those that --ckpt holds)")  # fmt: skip
    average: str | None = option(None, "weights to draw from: an average by its decay, such as 0.999, or model for the "
        "trained weights (default: the average of --ema-decay)")  # fmt: skip
    model: str | None = option(None, "size and patch size (default: the checkpoint's)", choices=MODELS,
        metavar="DiT-{S,B,L,XL}/{2,4,8}")  # fmt: skip
    image_size: ImageSize | None = option(None, "side of the images in pixels, or their HEIGHTxWIDTH (default: the "
        "checkpoint's)", low=1, high=MAX_SIZE)  # fmt: skip
    num_classes: int | None = option(None, "number of classes (default: the checkpoint's)", low=0, high=10_000_000)
    num_heads: int | None = option(None, "number of attention heads, if not recorded", low=1, high=MAX_SIZE)
    vae: str | None = option(None, 'autoencoder: "ema" or "mse" of the Stable Diffusion VAE, a folder or hub name of an '
        'autoencoder of diffusers, or "none" for pixels (default: the recorded one; for "ema", "mse" or without a record '
        "sample.py takes mse and sample_ddp.py ema)")  # fmt: skip

    def check(self):
        if self.lora and not self.ckpt:
            raise UserError(f"--lora {self.lora}", "needs --ckpt, the model that it changes", "name both")


@dataclass(frozen=True)
class SamplerConfig(Config):
    """sampler"""

    sampler: str | None = option(None, "; ".join(f"{s.name}: {s.help}" for s in SAMPLERS.values())
        + f" (default: {', '.join(f'{name} for a {kind}' for kind, (name, _) in DEFAULTS.items())})",
        choices="diffusion.registry:SAMPLERS", basic=True)  # fmt: skip
    num_sampling_steps: int | None = option(None, "number of sampling steps (default: "
        f"{', '.join(f'{steps} for a {kind}' for kind, (_, steps) in DEFAULTS.items())})", low=1, high=1000,
        basic=True)  # fmt: skip
    eta: float = option(0.0, "noise in each step of ddim, from 0 (none) to 1 (about as in ddpm)", low=0, high=1)
    spacing: str | None = option(None, "how the timesteps of dpm-solver++, unipc, heun and euler are spaced (default: "
        "linspace)", choices=SPACINGS)  # fmt: skip

    def completed(self, objective, path="the model"):
        """With the sampler and the number of steps of a model of this objective where none are given. path: of the model in
        messages. Raises UserError for what the sampler cannot do, or not with this model. Imports torch."""
        sampler, steps = OBJECTIVES[objective].default_sampler
        full = replace(self, sampler=self.sampler or sampler, num_sampling_steps=self.num_sampling_steps or steps)
        where = f"--sampler {full.sampler}"
        if full.kind.flow and not OBJECTIVES[objective].flow:
            raise UserError(where, f"{path} is no flow model", "choose ddpm, ddim or another solver")
        if full.kind.average and not OBJECTIVES[objective].average:
            raise UserError(where, f"{path} is no meanflow", f"choose {sampler} or another sampler")
        try:
            check_sampler(full.sampler, full.num_sampling_steps, self.eta, self.spacing)
        except ValueError as error:
            raise UserError(where, str(error)) from None
        return full

    @property
    def kind(self):
        """The Sampler, once it is known."""
        return SAMPLERS[self.sampler]


@dataclass(frozen=True)
class GuidanceConfig(Config):
    """guidance"""

    cfg_scale: float | None = option(None, "scale of classifier-free guidance; 1 is no guidance (default: 4 of sample.py, "
        "else 1.5; 1 for a model that was trained without null labels or has learned its guidance)", low=0,
        basic=True)  # fmt: skip
    cfg_channels: str | None = option(None, "how many channels are guided (default: 3 of 4 channels with the paper's "
        "objective, as in the published results; else all)", choices=("3", "all"))  # fmt: skip
    guidance_interval: tuple[float, float] | None = option(None, "guide only where LO <= t / 1000 <= HI, and save the "
        "unconditional evaluations elsewhere (default: guide everywhere)", low=0, high=1, metavar=("LO", "HI"))  # fmt: skip
    guidance_schedule: str = option("constant", "growth of the scale towards the image", choices=tuple(GUIDANCE_SCHEDULES))
    guidance_rescale: float = option(0.0, "share of the guided prediction whose standard deviation is set back to that of "
        "the conditional one: phi of Lin et al. 2024", low=0, high=1)  # fmt: skip
    guide_ckpt: str | None = option(None, "a weaker model, named as by --ckpt, to guide away from, in place of the "
        "unconditional prediction (Karras et al. 2024, autoguidance)")  # fmt: skip

    def check(self):
        low, high = self.guidance_interval or (0, 1)
        if low >= high:
            raise UserError(f"--guidance-interval {low} {high}: is empty; give 0 <= LO < HI <= 1, in t / 1000")
        if self.guide_ckpt and self.cfg_scale == 1:
            raise UserError("--guide-ckpt: does nothing at --cfg-scale 1; give a larger scale")

    def completed(self, objective, path="the model", usual=1.5):
        """With a scale for a model of this objective where none is given, by default `usual`. path: of the model in
        messages. Raises UserError where a model is to be guided that has learned its guidance in training."""
        if not OBJECTIVES[objective].average:
            return replace(self, cfg_scale=usual) if self.cfg_scale is None else self
        problem = f"{path} is a meanflow, which learns its guidance in training, by --guidance-in-target"
        if self.guide_ckpt:
            raise UserError(f"--guide-ckpt {self.guide_ckpt}", problem, "leave it out")
        if self.cfg_scale not in (None, 1):
            raise UserError(f"--cfg-scale {self.cfg_scale}", problem, "pass --cfg-scale 1")
        return replace(self, cfg_scale=1.0)


def choose_sampler(kind, objective, name, steps, cfg_scale=1.0):
    """The SamplerConfig of --{kind}-sampler and --{kind}-sampling-steps, whose defaults are the objective's own. Raises
    UserError for a sampler that cannot draw so, or not with --{kind}-cfg-scale."""
    with about(f"--{kind}-cfg-scale", option="--cfg-scale"):
        GuidanceConfig(cfg_scale=cfg_scale).completed(objective)
    default = OBJECTIVES[objective].default_sampler
    default = GRID_SAMPLER if kind == "sample" and not OBJECTIVES[objective].flow else default
    with about(f"--{kind}-sampler", option="--sampler"):
        return SamplerConfig(sampler=name or default[0], num_sampling_steps=steps or default[1]).completed(objective)


@dataclass(frozen=True)
class TextConfig(Config):
    """models of texts"""

    negative_prompt: str | None = option(None, "text to guide away from, in place of the empty one", metavar="TEXT")
    text_encoder: str | None = option(None, "the model's text encoder, a folder or Hugging Face hub name (default: the one "
        "that the checkpoint records)")  # fmt: skip


@dataclass(frozen=True)
class ComputeConfig(Config):
    """arithmetic"""

    tf32: bool = option(True, "compute matrix products and convolutions in TF32 on GPUs")
    precision: str | None = option(None, "precision of the model's matrix products (default: tf32 with --tf32, else fp32)",
        choices=("fp32", "tf32", "bf16"))  # fmt: skip
    compile: str | None = option(None, "compile the model's blocks with this backend of torch.compile; inductor if "
        "none is named (default: off)", metavar="BACKEND", const="inductor")  # fmt: skip
    device: str | None = option(None, "where to compute (default: the best there is)", choices=("cuda", "mps", "cpu"))

    def check(self):
        if self.precision == "tf32" and not self.tf32:
            raise UserError("--precision tf32: contradicts --no-tf32; leave one of them out")

    @property
    def products(self):
        """Precision of the model's matrix products: "fp32", "tf32" or "bf16"."""
        return self.precision or ("tf32" if self.tf32 else "fp32")


@dataclass(frozen=True)
class EditingConfig(Config):
    """image to image"""

    interpolate: str | None = option(None, "draw rows of --columns images: from a label's noise to that of --to-seed, or "
        "from a class to the next (default: off)", choices=("seeds", "classes"))  # fmt: skip
    to_seed: int | None = option(None, "seed at the end of --interpolate seeds (default: 1)", low=0, high=MAX_SEED)
    init_image: str | None = option(None, "start from this image file, cropped like training images", path="file")
    strength: float | None = option(None, "share of the sampling steps that --init-image goes through, more than 0 and "
        "up to 1: the larger, the less is left of it (default: 0.75)", above=0, high=1)  # fmt: skip
    invert: bool = option(False, "start from the noise that DDIM inversion finds for --init-image; needs --sampler ddim")
    mask: str | None = option(None, "redraw --init-image only where this image file is white", path="file")

    def check(self):
        if not self.init_image:
            for name in ("strength", "invert", "mask"):
                if getattr(self, name):
                    raise UserError(f"--{name}: needs --init-image, the image to work on")
        elif self.interpolate:
            raise UserError("--interpolate: does not go with --init-image")
        if self.to_seed is not None and self.interpolate != "seeds":
            raise UserError("--to-seed: needs --interpolate seeds")
        if self.strength and (self.invert or self.mask):
            raise UserError(f"--strength: does not go with --{'invert' if self.invert else 'mask'}, which makes all steps")


@dataclass(frozen=True)
class DrawConfig(Config):
    """Which model to draw from, and how: what `Opened.open` takes."""

    released_vae = "ema"  # no option: of the released decoders, "ema" and "mse", the one to use where nothing names one
    usual_scale = 1.5  # of guidance, where none is given

    text: TextConfig = TextConfig()
    source: SourceConfig = SourceConfig()
    sampler: SamplerConfig = SamplerConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    compute: ComputeConfig = ComputeConfig()


@dataclass(frozen=True)
class SampleConfig(DrawConfig):
    """Options of sample.py."""

    script, released_vae, usual_scale = "sample.py", "mse", 4.0

    labels: tuple[str, ...] | None = option(None, "classes by number, name or WordNet number (default: 207 360 387 974 88 "
        "979 417 279, or the first eight of a model with other classes)", metavar="CLASS", basic=True)  # fmt: skip
    prompt: tuple[str, ...] | None = option(None, "what to draw, for a model of texts, in place of --labels; may be given "
        "several times (default: none)", metavar="TEXT", repeatable=True, basic=True)  # fmt: skip
    vector: tuple[str, ...] | None = option(None, "what to draw, for a model of vectors, in place of --labels: .npy files "
        "with one vector or (N, size) of them (default: none)", path="file", metavar="FILE", repeatable=True)  # fmt: skip
    seed: int = option(0, "seed of all random numbers", low=0, high=MAX_SEED, basic=True)
    samples_per_label: int = option(1, "images of each label", low=1, high=10_000, basic=True)
    output: str = option("sample.png", "file of the grid of images", path="output", metavar="FILE", basic=True)
    columns: int = option(4, "images in a row of the grid", low=1, high=10_000)
    enlarge: int = option(1, "repeat each pixel this many times in both directions", low=1, high=64)
    captions: bool = option(False, "write the class or the prompt under each image")
    save_trajectory: str | None = option(None, "file for the predicted x_0 during sampling: an animation if it is a .gif, "
        "else a grid with a row for each image (default: not saved)", path="output", metavar="FILE")  # fmt: skip
    editing: EditingConfig = EditingConfig()

    def check(self):
        editing, sampler = self.editing, self.sampler
        if editing.invert and (sampler.sampler != "ddim" or sampler.eta or editing.mask):
            raise UserError("--invert: needs --sampler ddim with --eta 0, and does not go with --mask")
        if editing.mask and sampler.sampler and sampler.kind.flow:  # also once the default is filled in
            raise UserError("--mask", f"does not go with --sampler {sampler.sampler}", "choose ddim or another solver")
        if editing.interpolate and self.columns < 2:
            raise UserError(f"--columns {self.columns}: --interpolate needs two or more")
        if editing.interpolate and self.samples_per_label > 1:
            raise UserError("--samples-per-label: does not go with --interpolate")
        if self.save_trajectory and os.path.realpath(self.save_trajectory) == os.path.realpath(self.output):
            raise UserError(f"--save-trajectory {self.output}: is the file of --output too; name another")


def recorded_drawing(values):
    """{name: value} of RECORDED that the file of --ckpt in `values`, options of sample.py, records. Raises UserError."""
    from checkpoint.opened import Checkpoint  # imports torch

    if not (values["ckpt"] or "").endswith(".safetensors"):
        return {}
    recorded = Checkpoint.open(values["ckpt"]).drawing or {}
    others = OF_SAMPLER if values.get("sampler") not in (None, recorded.get("sampler")) else ()  # are of another sampler
    found = {name: value for name, value in recorded.items() if name in RECORDED and name not in others}
    with about(f"{values['ckpt']}: its record of the drawing"):
        SampleConfig.from_flat(found)
    return found | ({"samples_per_label": 1} if values.get("interpolate") else {})


@dataclass(frozen=True)
class SetConfig(Config):
    """Which images a set holds."""

    num_fid_samples: int = option(50_000, "number of images", low=1, high=10**8, basic=True)
    per_proc_batch_size: int = option(32, "images that each process draws at once", low=1, high=1_000_000, basic=True)
    global_seed: int = option(0, "seed of labels and noise", low=0, high=MAX_SEED, basic=True)
    balanced_labels: bool = option(False, "give image i the class i modulo the number of classes, not a random one")
    labels: tuple[str, ...] | None = option(None, "classes by number, name or WordNet number: image i is of the class at "
        "position i modulo their number (default: a random class for each image)", metavar="CLASS")  # fmt: skip
    prompts: str | None = option(None, "file of prompts, for a model of texts: .txt with one in each line, or .jsonl with "
        '"text" in each line; image i has the prompt i modulo their number (default: none)', path="file",
        metavar="FILE")  # fmt: skip
    vector: tuple[str, ...] | None = option(None, "what to draw, for a model of vectors: .npy files with (N, size) of "
        "them; image i has the vector i modulo their number (default: none)", path="file", metavar="FILE",
        repeatable=True)  # fmt: skip

    def check(self):
        given = [flag(name) for name in ("prompts", "labels", "balanced_labels") if getattr(self, name)]
        if len(given) > 1:
            raise UserError(given[0], f"does not go with {given[1]}", "leave one of them out")


@dataclass(frozen=True)
class SampleSetConfig(SetConfig, DrawConfig):
    """Options of sample_ddp.py."""

    script = "sample_ddp.py"

    sample_dir: str = option("samples", "folder in which the folder of images and the .npz file are made", basic=True)
    folder: str | None = option(None, "name of the folder of images (default: made of the settings)")

    def check(self):
        super().check()
        if self.folder and Path(self.folder).name in ("", ".."):
            raise UserError(f"--folder {self.folder}: is no name of a folder; choose one, such as samples-1")


def command(config):
    """The command line for a SampleConfig or a SampleSetConfig."""
    words, defaults = ["python", config.script], {**config.defaults(), "cfg_scale": config.usual_scale}
    defaults |= recorded_drawing(config.flat()) if isinstance(config, SampleConfig) else {}
    for name, value in config.flat().items():
        if value in (None, defaults[name]):
            continue
        given = [] if isinstance(value, bool) else value if isinstance(value, list) else [value]
        words += [flag(name if value is not False else f"no_{name}"), *map(str, given)]
    return shlex.join(words)
