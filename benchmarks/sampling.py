"""A guided sampling step: ours, eager and compiled, against the original release's recipe and the matrix rate.

    python -m benchmarks.sampling --model DiT-S/4 --batch-size 16 --device cpu --precision bf16 --json
    python -m benchmarks.sampling --model DiT-XL/2 --batch-size 64 --device cuda --repeats 250

The original's recipe is float32 (on a GPU TF32), eager, with the batch doubled in every step: `p_sample_loop` around
`forward_with_cfg`. Ours is the loop of sample_ddp.py. The variants take turns; medians are printed. With --repeats 250 the
time is that of a whole run of 250 steps. Drawing the noise and decoding, the same for all, are not part of it.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `python benchmarks/sampling.py`
import complexity
from benchmarks import timing
from checkpoint.config import ModelOptions
from cli.parser import Parser
from data.autoencoder import check_image_size
from diffusion import create_diffusion
from diffusion.registry import SAMPLERS
from models import DiT_models
from runtime import distributed
from runtime.config import Config, option
from runtime.devices import set_precision
from sampling.config import ComputeConfig, GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline, place


@dataclass(frozen=True)
class StepConfig(Config):
    """Options of sampling.py."""

    timing: timing.TimingConfig
    model: ModelOptions
    sampler: SamplerConfig
    compute: ComputeConfig
    cfg_scale: float = option(1.5, "scale of classifier-free guidance; 1 is no guidance", low=0)


def build(config):
    return DiT_models[config.model.model](input_size=config.model.image_size // 8, num_classes=config.model.num_classes)


def labels(config, device):
    return torch.arange(config.timing.batch_size, device=device) % max(config.model.num_classes, 1)


@dataclass
class Ours:
    """Makes the next step of sample_ddp.py's loop, over and over."""

    config: StepConfig

    def __call__(self):
        config, device = self.config, distributed.setup(self.config.compute.device).device
        model = place(timing.replace_zeros(build(config)).eval(), config.compute, device)
        guidance = GuidanceConfig(cfg_scale=config.cfg_scale)
        pipeline = Pipeline(model, None, config.sampler, guidance, precision=config.compute.products)
        y, noise = labels(config, device), pipeline.noise(0, range(config.timing.batch_size))

        def loop():
            while True:
                yield from pipeline.steps(y, *noise)

        return torch.inference_mode()(partial(next, loop()))


@dataclass
class OriginalRecipe:
    """Makes the next step of the original release's loop, over and over."""

    config: StepConfig

    def __call__(self):
        config, device = self.config, torch.device(self.config.compute.device)
        set_precision("tf32", device)
        model = timing.replace_zeros(build(config)).eval().to(device)
        diffusion, y = create_diffusion(str(config.sampler.num_sampling_steps)), labels(config, device)
        kwargs = {"y": torch.cat([y, torch.full_like(y, model.null_class)]), "cfg_scale": config.cfg_scale}
        shape = (2 * len(y), model.in_channels, model.input_size, model.input_size)
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
    model, sampler, size = config.model, config.sampler, config.timing.batch_size
    sampler.check_steps()
    check_image_size(model.image_size, 8, DiT_models[model.model].keywords["patch_size"])
    with torch.device("meta"):
        macs = complexity.forward_macs(build(config))
    evaluations = SAMPLERS[sampler.sampler].evaluations(sampler.num_sampling_steps) / sampler.num_sampling_steps
    flops = 2 * macs * evaluations * (1 if config.cfg_scale == 1 else 2) * size
    report = timing.compare(config, OriginalRecipe, Ours, flops, size / sampler.num_sampling_steps)
    if "images_per_second" in report:
        report["images_per_second_without_decoding"] = report.pop("images_per_second")
    return {
        "model": model.model,
        "image_size": model.image_size,
        "sampler": sampler.sampler,
        "num_sampling_steps": sampler.num_sampling_steps,
        "cfg_scale": config.cfg_scale,
        "batch_size": size,
        **report,
    }


def main(argv=None):
    parser = Parser(StepConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        report = measure(config)
        title = "sampling step of {model}, {image_size} px, batch {batch_size}, {sampler}, guidance {cfg_scale}"
        timing.show(report, title.format(**report), config.timing.json)


if __name__ == "__main__":
    main()
