"""Noise and label of each image of a set: they depend on the seed and the image's index alone."""

import torch

from runtime import seeds


def image_label(seed, index, num_classes):
    """The class of image `index`, an int in [0, num_classes); 0 for an unconditional model."""
    return int(seeds.generator(seed, seeds.SAMPLE_LABEL, index).integers(max(num_classes, 1)))


def image_noise(seed, indices, num_steps, shape):
    """All the noise of the images `indices`, (num_steps + 1, N, *shape) float32 on the CPU: entry 0 is x_T, entry 1 + i the
    noise of step i."""
    rows = [
        torch.from_numpy(
            seeds.generator(seed, seeds.SAMPLE_NOISE, index).standard_normal((num_steps + 1, *shape), "float32")
        )
        for index in indices
    ]
    return torch.stack(rows, dim=1)
