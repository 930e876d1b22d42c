"""From labels and noise to images: the pipeline that every command draws with.

    pipeline = Pipeline.load("results/000-DiT-XL-2/checkpoints/0400000.pt", SamplerConfig(num_sampling_steps=50))
    x_T, step_noise = pipeline.noise(seed=0, indices=range(2))
    images = to_uint8(pipeline(pipeline.parse_labels(["golden retriever", "88"]), x_T, step_noise))

Commands open a `Source` first, which checks everything, and then call `Pipeline.build`.
"""

import math
from functools import partial

import torch
from torch import nn

from diffusion import create_diffusion, sample, samplers
from diffusion.flow import eps_denoiser
from diffusion.guidance import guided_denoiser
from diffusion.registry import SAMPLERS
from runtime.devices import check_memory, explain_out_of_memory, pick_device, set_precision
from runtime.errors import UserError
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.labels import parse_labels
from sampling.noise import image_noise
from sampling.source import Source

LARGEST = 1e20  # of x_0, whose variance is about 1


class Pipeline:
    """Draws images from a model, in eval mode, with a sampler and guidance.

    space: of `data.autoencoder`, on the model's device. guide: a weaker model for autoguidance. precision: "bf16" runs the
    models under autocast; else torch's settings decide (`runtime.devices.set_precision`). class_names: by number. Of a
    model of texts these are the prompts, which labels count. text_encoder: encodes them, on the model's device. negative:
    the text to guide away from (default: the empty one)."""

    def __init__(self, model, space, sampler=None, guidance=None, guide=None, precision="fp32", class_names=None,
                 text_encoder=None, negative=None):  # fmt: skip
        self.model, self.space, self.guide, self.class_names = model, space, guide, class_names or []
        self.text_encoder, self.negative = text_encoder, negative
        self.sampler, self.guidance, self.precision = sampler or SamplerConfig(), guidance or GuidanceConfig(), precision
        self.device = next(model.parameters()).device
        self.num_classes, self.null_class = model.num_classes, model.null_class
        self.create_diffusion = partial(create_diffusion, learn_sigma=model.learn_sigma)
        self.shape = (model.in_channels, model.input_size, model.input_size)  # of one image's x_T

    @classmethod
    def load(cls, source, sampler=None, guidance=None, compute=None, device=None, text=None, prompts=()):
        """The pipeline of a checkpoint's path or a SourceConfig. device: a torch.device (default: of `compute`). text,
        prompts: for a model of texts, a TextConfig and what to draw. Raises UserError."""
        return cls.build(Source.open(source, sampler, guidance, compute, text=text, prompts=prompts), device)

    @classmethod
    def build(cls, source, device=None, draw_initial_weights=False):
        """The pipeline of an opened Source, on the device. Sets torch's precision of matrix products for this process.

        draw_initial_weights: draw the initial weights of the model, the autoencoder and the guide, in this order, before
        they are overwritten: the images of sample.py depend on this part of torch's random stream."""
        device = device or torch.device(pick_device(source.compute.device))
        with explain_out_of_memory("the model does not fit; choose a --device with more memory"):
            model = source.checkpoint.build_model(draw_initial_weights)
            space = source.place_space(device)
            text = {"text_encoder": source.place_text_encoder(device), "negative": source.negative}
            guide = source.guide and source.guide.build_model(draw_initial_weights)
            model, guide = (network and place(network, source.compute, device) for network in (model, guide))
        return cls(
            model, space, source.sampler, source.guidance, guide, source.compute.products, source.class_names, **text
        )

    def parse_labels(self, words):
        """Class numbers of words that are numbers, names or WordNet numbers. Raises UserError."""
        return parse_labels(words, self.class_names, self.num_classes)

    def class_name(self, label):
        """The class's name, or its number as text where the name is not known."""
        return self.class_names[label] if label < len(self.class_names) else str(label)

    def noise(self, seed, indices):
        """(x_T, step_noise) of the images `indices` of the set that `seed` names: x_T (N, C, H, W) on the device, and the
        function that gives the noise of each step. They depend on the seed and each image's index alone."""
        deterministic = SAMPLERS[self.sampler.sampler].is_deterministic(self.sampler.eta)
        steps = 0 if deterministic else self.sampler.num_sampling_steps
        check_memory(4 * (steps + 1) * len(indices) * math.prod(self.shape), "lower --per-proc-batch-size")
        noise = image_noise(seed, indices, steps, self.shape)  # (steps + 1, N, C, H, W)
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # a step's noise is then copied to the GPU while it computes
        return noise[0].to(self.device, non_blocking=True), lambda x, i: noise[1 + i].to(x.device, non_blocking=True)

    def encode(self, pictures):
        """x_0 of pictures (N, 3, H, W) in [-1, 1], whose colours are averaged for a model of grey pixels."""
        pictures = pictures.to(self.device)
        return self.space.encode(pictures.mean(dim=1, keepdim=True) if self.shape[0] == 1 else pictures)

    def to_pixels(self, x_0):
        """x_0 (N, C, h, w) decoded, as numpy (N, H, W, 3) uint8; see `to_uint8`."""
        check_finite(x_0)
        return to_uint8(self.space.decode(x_0.to(self.device)))

    def denoiser(self, labels):
        """The guided model of these labels as a function of (x_t, t), for the sampler: it predicts eps, or for a sampler of
        flows the velocity. See `diffusion.guidance.guided_denoiser`."""
        options, labels = self.guidance, torch.as_tensor(labels, device=self.device)
        null = self.null_class
        if self.model.text_width:
            null = self.text_encoder([self.negative])[0] if self.negative else self.model.text_embedder.null_text
            if not labels.is_floating_point():
                labels = self.text_encoder([self.class_names[label] for label in labels.tolist()])
        channels = {"3": 3, "all": self.model.in_channels, None: self.model.guided_channels}[options.cfg_channels]
        denoise = guided_denoiser(
            self.model, labels, null, cfg_scale=options.cfg_scale, channels=channels,
            interval=options.guidance_interval, schedule=options.guidance_schedule, rescale=options.guidance_rescale,
            guide=self.guide,
        )  # fmt: skip
        denoise = torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")(denoise)
        if self.model.predict == "eps" or SAMPLERS[self.sampler.sampler].flow:
            return denoise
        return eps_denoiser(denoise, self.model.objective, self.model.predict, create_diffusion("").alphas_cumprod)

    def steps(self, labels, x_T, step_noise=None, progress=False, denoiser=None, **options):
        """The sampler's steps from x_T: an iterator of dicts of `sample` (x_t), `pred_xstart` (the predicted x_0) and
        `step`, which counts down to 0; see `diffusion.sample`, also for options. By default the noise of the steps is drawn
        from torch's own stream.

        labels: N numbers of classes or prompts, or (N, K) weights of classes, or (N, L, W + 1) texts. denoiser: in place of
        the labels' own, such as an `inpainting_denoiser` around it."""
        sampler = self.sampler
        return sample(
            sampler.sampler, denoiser or self.denoiser(labels), x_T, sampler.num_sampling_steps, eta=sampler.eta,
            spacing=sampler.spacing, step_noise=step_noise, progress=progress,
            create=self.create_diffusion, **options,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self, labels, x_T, step_noise=None, progress=False):
        """Images (N, C, H, W) in about [-1, 1]; arguments as of `steps`."""
        return self.space.decode(samplers.last(self.steps(labels, x_T, step_noise, progress)))


def place(model, compute, device):
    """The model on its device, compiled if asked, and torch's precision set for it, as a ComputeConfig says."""
    set_precision(compute.products if compute.tf32 else "fp32", device)
    if compute.products == "bf16":  # what autocast would do to these weights in every step
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            linear.bfloat16()
    if compute.compile:
        model.compile_blocks(compute.compile)
    return model.to(device)


def check_finite(images):
    """Raises UserError where a value of images or latents is not finite, or so large that it has overflowed elsewhere: the
    norms of an autoencoder's decoder would hide that."""
    if not (images.abs() < LARGEST).all():
        raise UserError(
            "an image has values that are not finite: --cfg-scale is too large, or the weights are damaged; lower the "
            "scale, or try another checkpoint"
        )


def to_uint8(images):
    """(N, C, H, W) in [-1, 1] -> numpy (N, H, W, 3) uint8, grey repeated: clamp(127.5 x + 128, 0, 255), truncated. Raises
    UserError where a value is not finite."""
    check_finite(images)
    pixels = torch.clamp(127.5 * images + 128, 0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
