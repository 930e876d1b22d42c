"""From labels and noise to images: the pipeline that every command draws with.

    pipeline = Pipeline.load("results/000-DiT-XL-2")           # the newest checkpoint of a run, or a checkpoint's path
    images = pipeline.draw(["golden retriever", "88"], seed=0)  # PIL images

Commands make an `Opened` first, which checks everything, and then call `Pipeline.build`."""

import math
from functools import partial

import torch
from PIL import Image
from torch import nn

from data.condition import Classes
from diffusion import create_diffusion, sample, samplers
from diffusion.flow import eps_denoiser
from diffusion.guidance import guided_denoiser
from runtime import seeds
from runtime.devices import check_memory, explain_out_of_memory, set_precision
from runtime.errors import UserError, about
from sampling.config import ComputeConfig, DrawConfig, GuidanceConfig, SamplerConfig, SourceConfig, TextConfig
from sampling.grid import as_pictures
from sampling.opened import Opened

LARGEST = 1e20  # of x_0, whose variance is about 1


class Pipeline:
    """Draws images from a model, in eval mode, with a sampler and guidance.

    space: of `data.autoencoder`, on the model's device. sampler: a SamplerConfig (default: of the model's objective).
    guide: a weaker model for autoguidance. precision: "bf16" runs the models under autocast; else torch's settings decide
    (`runtime.devices.set_precision`). condition: what the model draws by, on the model's device (default: its own). sides:
    of the latents (default: the model's input_size)."""

    def __init__(self, model, space, sampler=None, guidance=None, guide=None, precision="fp32", condition=None, sides=None):
        self.model, self.space, self.guide, self.precision = model, space, guide, precision
        self.condition = condition or model.condition or Classes(model.num_classes)
        self.sampler = (sampler or SamplerConfig()).completed(model.objective)
        self.guidance = (guidance or GuidanceConfig()).completed(model.objective)
        self.device = next(model.parameters()).device
        self.create_diffusion = partial(create_diffusion, learn_sigma=model.learn_sigma)
        self.shape = (model.in_channels, *(sides or model.sizes.sides))  # of one image's x_T

    @classmethod
    def load(cls, source, sampler=None, guidance=None, compute=None, device=None, text=None):
        """The pipeline of a checkpoint or a run's folder, by its path, or of a SourceConfig. The other arguments are the
        configs of `sampling.config`. device: a torch.device (default: of `compute`). Raises UserError."""
        source = source if isinstance(source, SourceConfig) else SourceConfig(ckpt=str(source))
        parts = text or TextConfig(), source, sampler or SamplerConfig(), guidance or GuidanceConfig()
        return cls.build(Opened.open(DrawConfig(*parts, compute or ComputeConfig())), device)

    @classmethod
    def build(cls, opened, device=None, draw_initial_weights=False):
        """The pipeline of an `Opened`, on the device. Sets torch's precision of matrix products for this process.

        draw_initial_weights: draw the initial weights of the model, the autoencoder and the guide, in this order, before
        they are overwritten: the images of sample.py depend on this part of torch's random stream."""
        config, device = opened.config, device or opened.device
        with explain_out_of_memory("the model does not fit; choose a --device with more memory"):
            model = place(opened.checkpoint.build_model(draw_initial_weights), config.compute, device)
            with about(opened.vae_name):
                space = opened.space.to(device)
            guide = opened.guide and place(opened.guide.build_model(draw_initial_weights), config.compute, device)
            condition = opened.condition.to(device)
        return cls(model, space, config.sampler, config.guidance, guide, config.compute.products, condition, opened.sides)

    def vary(self, opened):
        """A pipeline of the same weights with the sampler, the guidance and the size of another `Opened`."""
        config = opened.config.sampler, opened.config.guidance
        return Pipeline(self.model, self.space, *config, self.guide, self.precision, self.condition, opened.sides)

    def draw(self, what=None, seed=0, batch_size=32):
        """PIL images, of clips strips of their frames, one for each entry of `what`: words as --labels, --prompt or
        --vector take them, class numbers, or vectors (default: some classes). Image i depends on the seed and on i alone.
        batch_size: images drawn at once; they change in the last bits with it. Raises UserError."""
        if isinstance(what, str | int):
            raise UserError("what to draw", f"is one value, {what!r}", f"give a list, such as [{what!r}]")
        choices = self.condition.default() if what is None else self.condition.parse(what)
        images = []
        for first in range(0, len(choices), batch_size):
            batch = range(first, min(first + batch_size, len(choices)))
            x_0 = samplers.last(self.steps([choices[i] for i in batch], *self.noise(seed, batch)))
            images += map(Image.fromarray, as_pictures(self.to_pixels(x_0)))
        return images

    def noise(self, seed, indices):
        """(x_T, step_noise) of the images `indices` of the set that `seed` names: x_T (N, C, H, W) on the device, and the
        function that gives each step's noise. They depend on (seed, index) alone. Raises ValueError for other indices."""
        if not hasattr(indices, "__len__"):
            raise ValueError(f"indices is {indices!r}, must be a list or a range, such as range({indices})")
        steps = 0 if self.sampler.kind.is_deterministic(self.sampler.eta) else self.sampler.num_sampling_steps
        check_memory(4 * (steps + 1) * len(indices) * math.prod(self.shape), "lower --per-proc-batch-size")
        noise = image_noise(seed, indices, steps, self.shape)  # (steps + 1, N, C, H, W)
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # a step's noise is then copied to the GPU while it computes
        return noise[0].to(self.device, non_blocking=True), lambda x, i: noise[1 + i].to(x.device, non_blocking=True)

    def encode(self, images):
        """x_0 of images (N, 3, H, W) in [-1, 1], whose colours are averaged for a model of grey pixels."""
        images = images.to(self.device)
        return self.space.encode(images.mean(dim=1, keepdim=True) if self.shape[0] == 1 else images)

    def to_pixels(self, x_0):
        """x_0 (N, C, h, w) decoded, as numpy (N, H, W, 3) uint8; see `to_uint8`."""
        check_finite(x_0)
        return to_uint8(self.space.decode(x_0.to(self.device)))

    def denoiser(self, choices):
        """The guided model of these choices, (x_t, t) -> eps, or for a sampler of flows the velocity: `guided_denoiser`."""
        options, y = self.guidance, self.y(choices)
        channels = {"3": 3, "all": self.model.in_channels, None: self.model.guided_channels}[options.cfg_channels]
        denoise = guided_denoiser(
            self.model, y, self.condition.null(y), cfg_scale=options.cfg_scale, channels=channels,
            interval=options.guidance_interval, schedule=options.guidance_schedule, rescale=options.guidance_rescale,
            guide=self.guide,
        )  # fmt: skip
        denoise = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")(denoise)
        if self.model.predict == "eps" or self.sampler.kind.flow:
            return denoise
        return eps_denoiser(denoise, self.model.objective, self.model.predict, create_diffusion("").alphas_cumprod)

    def y(self, choices):
        """What the model takes for choices of the condition; a tensor is y itself. Raises UserError for no classes."""
        if not isinstance(choices, torch.Tensor):
            return self.condition.encode(choices, self.device)
        return self.condition.check(choices.to(self.device))

    def steps(self, choices, x_T, step_noise=None, progress=False, denoiser=None, **options):
        """The sampler's steps from x_T: an iterator of dicts of `sample` (x_t), `pred_xstart` (the predicted x_0) and
        `step`, which counts down to 0; see `diffusion.sample`, also for options. By default the noise of the steps is drawn
        from torch's own stream.

        choices: N of the condition, such as class numbers or prompts; or y, a tensor. denoiser: in place of the
        choices' own, such as an `inpainting_denoiser` around it. Raises ValueError for other shapes."""
        if not isinstance(x_T, torch.Tensor) or x_T.shape[1:] != self.shape:
            found = f"of shape {tuple(x_T.shape)}" if isinstance(x_T, torch.Tensor) else f"a {type(x_T).__name__}"
            wanted = ", ".join(map(str, self.shape))
            raise ValueError(f"x_T is {found}, must be a tensor (N, {wanted}), as `noise` draws it")
        if len(choices) != len(x_T):
            raise ValueError(f"there are {len(choices)} choices for {len(x_T)} noises, must be one for each")
        sampler = self.sampler
        return sample(
            sampler.sampler, denoiser or self.denoiser(choices), x_T, sampler.num_sampling_steps, eta=sampler.eta,
            spacing=sampler.spacing, step_noise=step_noise, progress=progress, create=self.create_diffusion,
            time_shift=self.model.time_shift, **options,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self, choices, x_T, step_noise=None, progress=False):
        """Images (N, C, H, W) in about [-1, 1]; arguments as of `steps`."""
        return self.space.decode(samplers.last(self.steps(choices, x_T, step_noise, progress)))


def place(model, compute, device):
    """The model on its device, compiled if asked, and torch's precision set for it, as a ComputeConfig says."""
    set_precision(compute.products if compute.tf32 else "fp32", device)
    if compute.products == "bf16":  # what autocast would do to these weights in every step
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            linear.bfloat16()
    if compute.compile:
        model.compile_blocks(compute.compile)
    return model.to(device)


def image_noise(seed, indices, num_steps, shape):
    """All the noise of the images `indices`, (num_steps + 1, N, *shape) float32 on the CPU: entry 0 is x_T, entry 1 + i the
    noise of step i. That of an image depends on (seed, index) alone."""
    generators = [seeds.generator(seed, seeds.SAMPLE_NOISE, index) for index in indices]
    rows = [torch.from_numpy(g.standard_normal((num_steps + 1, *shape), "float32")) for g in generators]
    return torch.stack(rows, dim=1)


def check_finite(images):
    """Raises UserError for values not finite, or so large that others overflowed: a decoder's norms would hide that."""
    if not (images.abs() < LARGEST).all():
        problem = "--cfg-scale is too large, or the weights are damaged"
        raise UserError("an image has values that are not finite", problem, "lower the scale, or try another checkpoint")


def to_uint8(images):
    """(N, C, H, W) in [-1, 1] -> numpy (N, H, W, 3) uint8, grey repeated: clamp(127.5 x + 128, 0, 255), truncated; clips
    (N, C, F, H, W) -> (N, F, H, W, 3). Raises UserError as `check_finite`."""
    check_finite(images)
    pixels = torch.clamp(127.5 * images + 128, 0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, *pixels.shape[2:]).movedim(1, -1).cpu().numpy()
