"""Image to image: interpolated noise and classes, and pictures to start from."""

import os

import numpy as np
import torch

from data.autoencoder import to_model_range
from data.crop import center_crop_arr
from data.images import open_image
from diffusion.editing import slerp
from diffusion.guidance import mix_classes
from runtime.errors import UserError


def interpolate_seeds(z, y, captions, columns, seed):
    """(z, y, captions) of rows of `columns` images, each from one noise of z (N, C, H, W) to a noise drawn with `seed`."""
    generator = torch.Generator(z.device).manual_seed(seed)
    ends = torch.randn(z.shape, device=z.device, generator=generator)
    weights = torch.linspace(0, 1, columns, device=z.device).view(-1, 1, 1, 1)
    rows = [slerp(start, end, weights) for start, end in zip(z.split(1), ends.split(1), strict=True)]
    return torch.cat(rows), y.repeat_interleave(columns), [text for text in captions for _ in range(columns)]


def interpolate_classes(z, y, captions, columns, num_classes):
    """(z, y, captions) of rows of `columns` images, each from one of the N classes to the next, linearly between their
    embeddings. The noise of a row is that of its first class; y is (N - 1) * columns weights of classes."""
    weights = torch.linspace(0, 1, columns, device=z.device)
    pairs = [(a.expand(columns), b.expand(columns)) for a, b in zip(y[:-1], y[1:], strict=True)]
    texts = zip(captions[:-1], captions[1:], strict=True)
    return (
        z[:-1].repeat_interleave(columns, dim=0),
        torch.cat([mix_classes(a, b, weights[:, None], num_classes) for a, b in pairs]),
        [f"{a} - {b} {weight:.2f}" for a, b in texts for weight in weights.tolist()],
    )


def read_picture(path, size, option):
    """An image file, cropped like training images, as (1, 3, size, size) in [-1, 1]. Raises UserError naming the option."""
    if not os.path.exists(path):
        raise UserError(f"{option} {path}: no such file")
    try:
        picture = center_crop_arr(open_image(path), size)
    except UserError as error:  # its way out, to remove the file, is that of a folder of images
        raise UserError(f"{option} {str(error).split('; ')[0]}") from None
    return to_model_range(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None])
