"""Denoisers made of denoisers: classifier-free guidance (Ho and Salimans 2022). Pure functions on tensors."""

import torch


def default_channels(in_channels):
    """How many channels of eps are guided. The original release guides three of the autoencoder's four, and its published
    numbers depend on it; 1.5 on three is about 1.375 on four. Any other number of channels is guided whole."""
    return 3 if in_channels == 4 else in_channels


def combine(cond, uncond, cfg_scale):
    """Ho and Salimans 2022, eq. 6, with cfg_scale = 1 + w: 1 is no guidance, 0 is no condition."""
    return uncond + cfg_scale * (cond - uncond)


def guided_eps(model, x_t, t, y, cfg_scale, null_class, channels):
    """Classifier-free guidance of the first `channels` of eps, from one call of the model on twice the batch.

    x_t: (N, C, H, W); t, y: (N,). Returns the model's output under y with its eps guided, (N, 2C, H, W) where the variance
    is learned: the other channels are the conditional ones."""
    y_both = torch.cat([y, torch.full_like(y, null_class)])
    cond, uncond = model(torch.cat([x_t, x_t]), torch.cat([t, t]), y_both).chunk(2)
    guided = combine(cond[:, :channels], uncond[:, :channels], cfg_scale)
    return torch.cat([guided, cond[:, channels:]], dim=1)
