"""The space that a model's x_0 lives in: latents of the frozen Stable Diffusion autoencoder, or pixels ("none").
Channels, downsampling, scaling and shift come from the autoencoder's own config, once.

    space = latents.load("ema")              # reads the config
    space.place(device)                      # reads the weights
    x_0 = space.encode(images)               # (N, 3, H, W) in [-1, 1] -> (N, C, H/8, W/8), about unit variance
    images = space.decode(x_0)
"""

from pathlib import Path

import torch

from errors import UserError


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


class Autoencoder:
    """diffusers' AutoencoderKL, frozen. name: a local folder or a hub name. Raises UserError, in one line, where there is
    no autoencoder or it cannot be fetched."""

    def __init__(self, name):
        from diffusers import AutoencoderKL  # takes seconds to import

        self.name, self._class = name, AutoencoderKL
        config = self._attempt(AutoencoderKL.load_config)
        self.channels = config["latent_channels"]
        self.factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.scaling, self.shift = config["scaling_factor"], config.get("shift_factor") or 0.0
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
        self.vae = (
            self._attempt(lambda name: self._class.from_pretrained(name, low_cpu_mem_usage=False))
            .to(device)
            .eval()
            .requires_grad_(False)
        )
        return self

    @torch.no_grad()
    def encode(self, images):
        """A sample of the posterior, drawn from torch's stream."""
        return (self.vae.encode(images).latent_dist.sample() - self.shift) * self.scaling

    @torch.no_grad()
    def decode(self, latents):
        return self.vae.decode(latents / self.scaling + self.shift).sample


RELEASED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}


def load(vae, image_channels=3):
    """The space that --vae names: "ema" or "mse" (the released fine-tuned decoders), a folder or hub name, or "none"."""
    return Pixels(image_channels) if vae == "none" else Autoencoder(RELEASED.get(vae, vae))
