"""The space that a model's x_0 lives in: latents of the frozen Stable Diffusion autoencoder, or pixels ("none"). A latent
is a draw from the encoder's posterior, a Gaussian whose mean and standard deviation may also be read from stored ones.

    space = load_space("ema")                # reads the config
    space.place(device)                      # reads the weights
    x_0 = space.encode(images)               # (N, 3, H, W) in [-1, 1] -> (N, C, H/8, W/8), about unit variance
    images = space.decode(x_0)
"""

import inspect
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.config import Config, option
from runtime.errors import UserError
from runtime.files import check_regular

RELEASED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


class Pixels:
    """Identity: the model works on pixels in [-1, 1]. channels: of the images."""

    factor = 1

    def __init__(self, channels):
        self.channels = channels

    def place(self, device):
        return self

    def encode(self, images):
        return images

    def decode(self, latents):
        return latents


class StoredSpace:
    """The space of stored moments, which needs neither diffusers nor the autoencoder. channels: of a latent. factor: pixels
    per latent cell. scaling, shift: x_0 = (latent - shift) * scaling has about unit variance."""

    def __init__(self, channels, factor, scaling, shift):
        self.channels, self.factor, self.scaling, self.shift = channels, factor, scaling, shift

    def place(self, device):
        return self

    def sample(self, moments):
        """x_0 (N, C, h, w) drawn from the posterior's moments (N, 2, C, h, w) with torch's random stream of their device,
        the same draw as diffusers' latent_dist.sample(), and scaled to about unit variance."""
        mean, std = moments.float().unbind(1)
        return (mean + std * torch.randn(mean.shape, device=mean.device) - self.shift) * self.scaling


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """What is needed of an AutoencoderKL's config.json."""

    in_channels: int = option(low=1, high=1024)
    latent_channels: int = option(low=1, high=1024)
    block_out_channels: tuple[int, ...] = option(low=1)
    scaling_factor: float = option(above=0)
    shift_factor: float | None = None


class Autoencoder(StoredSpace):
    """diffusers' AutoencoderKL, frozen. name: a local folder or a hub name. Raises UserError, in one line, where there is
    no autoencoder or it cannot be fetched."""

    def __init__(self, name):
        self.name, self.vae = name, None
        config = self._attempt(self._read_config)
        factor = 2 ** (len(config.block_out_channels) - 1)
        super().__init__(config.latent_channels, factor, config.scaling_factor, config.shift_factor or 0.0)
        if config.in_channels != 3:
            raise UserError(f"--vae {name}: takes {config.in_channels} channels, the images have 3")

    def _attempt(self, read):
        from diffusers import AutoencoderKL  # takes seconds to import

        try:
            for path in Path(self.name).glob("*.*"):  # what diffusers might open
                check_regular(path)
            return read(AutoencoderKL)
        except Exception as error:  # diffusers, the hub's client and its HTTP library each raise their own kinds
            where = "in that folder" if os.path.isdir(self.name) else "there, and no local folder of that name"
            reason = str(error).strip().removeprefix("--").split("\n")[0][:200] or type(error).__name__
            raise UserError(
                f"--vae {self.name}: no usable autoencoder {where} ({reason}); pass a folder written by "
                "AutoencoderKL.save_pretrained, or --vae none for pixels"
            ) from None

    def _read_config(self, kind):
        # a config of an older diffusers lacks the keys that were added since, as that of the released autoencoders lacks
        # scaling_factor: diffusers then takes the constructor's defaults, and so do we
        parameters = inspect.signature(kind.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        return AutoencoderConfig.from_flat({**defaults, **kind.load_config(self.name)})

    def _read_weights(self, kind):
        vae = kind.from_pretrained(self.name, low_cpu_mem_usage=False)
        for name, tensor in vae.state_dict().items():
            if not tensor.isfinite().all():
                raise ValueError(f"the weights {name} are not finite")
        return vae

    def place(self, device):
        self.vae = self.vae or self._attempt(self._read_weights)
        self.vae.to(device).eval().requires_grad_(False)
        return self

    def encoder_settings(self):
        """What decides on the latents: scaling, shift, sizes, and the CRC-32 of the encoder's weights, names and values."""
        crc = 0
        for name, tensor in sorted(self.vae.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                crc = zlib.crc32(tensor.cpu().numpy().tobytes(), zlib.crc32(name.encode(), crc))
        names = ("scaling", "shift", "channels", "factor")
        return {"encoder_crc32": f"{crc:08x}", **{name: getattr(self, name) for name in names}}

    @torch.no_grad()
    def moments(self, images):
        """(N, 3, H, W) in [-1, 1] -> (N, 2, C, h, w): mean and standard deviation of the posterior, unscaled."""
        posterior = self.vae.encode(images).latent_dist
        # contiguous: in a channels-last order torch.randn_like(x_0) would draw other noise than for stored moments
        return torch.stack([posterior.mean, posterior.std], dim=1).contiguous()

    def encode(self, images):
        """A sample of the posterior, drawn from torch's random stream."""
        return self.sample(self.moments(images))

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents / self.scaling + self.shift).sample


def load_space(vae, image_channels=3):
    """The space that --vae names: "ema" or "mse" (the released fine-tuned decoders), a folder or hub name, or "none"."""
    return Pixels(image_channels) if vae == "none" else Autoencoder(RELEASED.get(vae, vae))


def to_model_range(images):
    """uint8 (N, C, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def encode_batch(space, batch, device):
    """x_0 (N, C, h, w) of a batch's images, or of their stored moments: a fresh draw either way."""
    if "moments" in batch:
        return space.sample(batch["moments"].to(device, non_blocking=True))
    return space.encode(to_model_range(batch["image"].to(device, non_blocking=True)))


def check_image_size(image_size, factor, patch_size):
    """Raises UserError where the autoencoder's downsampling and the patch size do not divide the image."""
    unit = factor * patch_size
    if image_size % unit:
        below = image_size // unit * unit
        fits = f"{below} and {below + unit} are the nearest that fit" if below else f"{unit} is the smallest that fits"
        raise UserError(
            f"--image-size {image_size}: not a multiple of {unit} (autoencoder {factor} times patch {patch_size}); {fits}"
        )
