"""The space that a model's x_0 lives in: latents of the frozen Stable Diffusion autoencoder, or pixels ("none").
Channels, downsampling, scaling and shift come from the autoencoder's own config, once.

An image's latent is a draw from the encoder's posterior, a Gaussian whose moments (mean and standard deviation) may also be
stored ones, of extract_latents.py.

    space = latents.load("ema")              # reads the config
    space.place(device)                      # reads the weights
    x_0 = space.encode(images)               # (N, 3, H, W) in [-1, 1] -> (N, C, H/8, W/8), about unit variance
    images = space.decode(x_0)
"""

import inspect
import zlib
from pathlib import Path

import torch

from runtime.errors import UserError


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


class Stored:
    """The space of stored moments, known from their record alone: neither diffusers nor the autoencoder is needed. record:
    its `channels`, `factor`, `scaling` and `shift`."""

    def __init__(self, record):
        self.channels, self.factor = record["channels"], record["factor"]
        self.scaling, self.shift = record["scaling"], record["shift"]

    def place(self, device):
        return self

    def sample(self, moments):
        """x_0 (N, C, h, w) drawn from the posterior's moments (N, 2, C, h, w) with torch's stream of their device, the same
        draw as diffusers' latent_dist.sample(), and scaled to about unit variance."""
        mean, std = moments.float().unbind(1)
        return (mean + std * torch.randn(mean.shape, device=mean.device) - self.shift) * self.scaling


class Autoencoder(Stored):
    """diffusers' AutoencoderKL, frozen. name: a local folder or a hub name. Raises UserError, in one line, where there is
    no autoencoder or it cannot be fetched."""

    def __init__(self, name):
        from diffusers import AutoencoderKL  # takes seconds to import

        self.name, self._class = name, AutoencoderKL
        # a config of an older diffusers lacks the keys that were added since, as that of the released autoencoders lacks
        # scaling_factor: diffusers then takes the constructor's defaults, and so do we
        parameters = inspect.signature(AutoencoderKL.__init__).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        config = {**defaults, **self._attempt(AutoencoderKL.load_config)}
        super().__init__({
            "channels": config["latent_channels"],
            "factor": 2 ** (len(config["block_out_channels"]) - 1),
            "scaling": config["scaling_factor"],
            "shift": config["shift_factor"] or 0.0,
        })  # fmt: skip
        self.vae = None
        self.image_channels = config["in_channels"]
        if self.image_channels != 3:
            raise UserError(f"--vae {name}: takes {self.image_channels} channels, the images have 3")

    def _attempt(self, read):
        try:
            return read(self.name)
        except Exception as error:  # diffusers, the hub's client and its HTTP library each raise their own kinds
            where = "in that folder" if Path(self.name).is_dir() else "there, and no local folder of that name"
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(
                f"--vae {self.name}: no usable autoencoder {where} ({reason}); pass a folder written by "
                "AutoencoderKL.save_pretrained, or --vae none for pixels"
            ) from None

    def place(self, device):
        if self.vae is None:
            self.vae = self._attempt(lambda name: self._class.from_pretrained(name, low_cpu_mem_usage=False))
        self.vae.to(device).eval().requires_grad_(False)
        return self

    def encoder_checksum(self):
        """CRC-32 of the encoder's weights, names and values: what decides on the latents, with the config's scaling."""
        crc = 0
        for name, tensor in sorted(self.vae.state_dict().items()):
            if name.startswith(("encoder.", "quant_conv.")):
                crc = zlib.crc32(tensor.cpu().numpy().tobytes(), zlib.crc32(name.encode(), crc))
        return f"{crc:08x}"

    @torch.no_grad()
    def moments(self, images):
        """(N, 3, H, W) in [-1, 1] -> (N, 2, C, h, w): mean and standard deviation of the posterior, unscaled."""
        posterior = self.vae.encode(images).latent_dist
        # a convolution may leave channels last, in which order torch.randn_like(x_0) would draw other noise than for stored
        # moments
        return torch.stack([posterior.mean, posterior.std], dim=1).contiguous()

    def encode(self, images):
        """A sample of the posterior, drawn from torch's stream."""
        return self.sample(self.moments(images))

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents / self.scaling + self.shift).sample


RELEASED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


def load(vae, image_channels=3):
    """The space that --vae names: "ema" or "mse" (the released fine-tuned decoders), a folder or hub name, or "none"."""
    return Pixels(image_channels) if vae == "none" else Autoencoder(RELEASED.get(vae, vae))
