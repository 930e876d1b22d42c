"""A guided sampling step: ours, eager and compiled, against the original release's recipe and the matrix rate.

    python -m benchmarks sampling --model DiT-S/4 --batch-size 16 --device cpu --precision bf16 --json
    python -m benchmarks sampling --model DiT-XL/2 --batch-size 64 --device cuda --repeats 250

The original's recipe is float32 (on a GPU TF32), eager, with the batch doubled in every step: `p_sample_loop` around
`forward_with_cfg`. Ours is the loop of sample_ddp.py. The variants take turns; medians are printed. With --repeats 250 the
time is that of a whole run of 250 steps. Drawing the noise, the same for all, is not part of it. With --vae the decoding of
the batch is timed too, and counts in the images per second.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks import timing
from benchmarks.train_step import build_model
from checkpoint.config import ModelOptions
from data.autoencoder import latent_sides, load_space
from diffusion import create_diffusion
from runtime import distributed
from runtime.config import Config, option
from runtime.devices import set_precision
from runtime.parser import Parser
from sampling.config import ComputeConfig, GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline, place, to_uint8
from training.config import RecipeConfig
from training.cost import forward_macs


@dataclass(frozen=True)
class StepConfig(Config):
    """Options of sampling.py."""

    timing: timing.TimingConfig
    model: ModelOptions
    compute: ComputeConfig
    sampler: SamplerConfig
    cfg_scale: float = option(1.5, "scale of classifier-free guidance; 1 is no guidance", low=0)
    vae: str | None = option(None, 'also time the decoder of this autoencoder: "ema" or "mse", or a folder or hub name of '
        "an AutoencoderKL (default: off)")  # fmt: skip

    recipe = RecipeConfig()  # whose label dropout gives the model its null class


def labels(config, model, device):
    return torch.arange(config.timing.batch_size, device=device) % max(model.num_classes, 1)


def ours(config):
    """The next step of sample_ddp.py's loop, over and over."""
    device = distributed.setup(config.compute.device).device
    with device:  # where drawing the first weights of XL/2 takes no time
        model = build_model(config).eval()
    model = place(model, config.compute, device)
    guidance = GuidanceConfig(cfg_scale=config.cfg_scale)
    pipeline = Pipeline(model, None, config.sampler, guidance, precision=config.compute.products)
    y, noise = labels(config, model, device), pipeline.noise(0, range(config.timing.batch_size))

    def loop():
        while True:
            yield from pipeline.steps(y, *noise)

    return torch.inference_mode()(partial(next, loop()))


def decoding(config):
    """The decoding of a batch, as sample_ddp.py does it."""
    device = distributed.setup(config.compute.device).device
    set_precision(config.compute.products if config.compute.tf32 else "fp32", device)
    space = load_space(config.vae).to(device)
    cells = latent_sides(config.model.image_size, space.factor)
    x_0 = torch.randn(config.timing.batch_size, space.channels, *cells, device=device)
    return lambda: to_uint8(space.decode(x_0))


def original_recipe(config):
    """The next step of the original release's loop, over and over."""
    device = torch.device(config.compute.device)
    set_precision("tf32", device)
    with device:
        model = build_model(config).eval()
    diffusion, y = create_diffusion(str(config.sampler.num_sampling_steps)), labels(config, model, device)
    kwargs = {"y": torch.cat([y, torch.full_like(y, model.null_class)]), "cfg_scale": config.cfg_scale}
    shape = (2 * len(y), model.in_channels, *model.sizes.sides)
    noise = torch.randn(*shape, device=device)

    def loop():
        while True:
            yield from diffusion.p_sample_loop_progressive(
                model.forward_with_cfg, shape, noise, clip_denoised=False, model_kwargs=kwargs, device=device
            )

    return torch.no_grad()(partial(next, loop()))


def measure(config):
    """Time the step. Returns the report, a dict. Raises UserError for what cannot work, before anything slow."""
    config = timing.resolve(config, gpu_precision=config.compute.products)
    config = replace(config, sampler=config.sampler.completed("diffusion"))
    model, sampler, size = config.model, config.sampler, config.timing.batch_size
    with torch.device("meta"):
        macs = forward_macs(build_model(config))
    evaluations = sampler.kind.evaluations(sampler.num_sampling_steps) / sampler.num_sampling_steps
    flops = 2 * macs * evaluations * (1 if config.cfg_scale == 1 else 2) * size
    extra = {"decoding": partial(decoding, config)} if config.vae else None
    report = timing.compare(config, original_recipe, ours, flops, size / sampler.num_sampling_steps, extra=extra)
    if "images_per_second" in report:
        report["images_per_second_without_decoding"] = report.pop("images_per_second")
        if config.vae:
            seconds = sampler.num_sampling_steps * report["seconds_per_step"] + report["decoding_seconds"]
            report["images_per_second"] = size / seconds
    setting = {"model": model.name, "image_size": model.image_size, "sampler": sampler.sampler}
    setting |= {"num_sampling_steps": sampler.num_sampling_steps, "cfg_scale": config.cfg_scale, "batch_size": size}
    return setting | report


def main(argv=None):
    parser = Parser(StepConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        report = measure(config)
        title = "sampling step of {model}, {image_size} px, batch {batch_size}, {sampler}, guidance {cfg_scale}"
        timing.show(report, title.format(**report), config.timing.json)
