"""Denoisers made of denoisers: classifier-free guidance (Ho and Salimans 2022). Pure functions on tensors."""


def default_channels(in_channels):
    """How many channels of eps are guided. The original release guides three of the autoencoder's four, and its published
    numbers depend on it; 1.5 on three is about 1.375 on four. Any other number of channels is guided whole."""
    return 3 if in_channels == 4 else in_channels


def combine(cond, uncond, cfg_scale):
    """Ho and Salimans 2022, eq. 6, with cfg_scale = 1 + w: 1 is no guidance, 0 is no condition."""
    return uncond + cfg_scale * (cond - uncond)
