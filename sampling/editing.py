"""The noise that sample.py and the page start from, with the original release's random stream, and image to image:
interpolations, and image files to start from."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from data.autoencoder import to_model_range
from data.crop import center_crop_arr
from data.images import open_image
from diffusion import sampling_process
from diffusion.editing import ddim_inversion, inpainting_denoiser, slerp
from runtime.errors import UserError


def draw_noise(pipeline, choices, editing, columns, generator=None):
    """(start, titles) of an image of each choice, or of rows that interpolate; start: arguments of `Pipeline.steps`. The
    stream is the original's: x_T, then at every step the noise of a doubled batch, whose second half, that of the
    unconditional images, is not used.

    editing: an EditingConfig. columns: images in an interpolating row. generator: on the device (default: torch's own)."""
    draw = partial(torch.randn, device=pipeline.device, generator=generator)
    condition, row = pipeline.condition, columns if editing.interpolate else 1
    z = draw(len(choices), *pipeline.shape)
    y, titles = condition.encode(choices, pipeline.device), condition.titles(choices)
    weights = torch.linspace(0, 1, row, device=pipeline.device)
    if editing.interpolate == "seeds":
        seed = 1 if editing.to_seed is None else editing.to_seed
        ends = torch.randn(z.shape, device=z.device, generator=torch.Generator(z.device).manual_seed(seed))
        steps = weights.view(-1, *[1] * (z.ndim - 1))
        z = torch.cat([slerp(start, end, steps) for start, end in zip(z.split(1), ends.split(1), strict=True)])
        y, titles = y.repeat_interleave(row, dim=0), [title for title in titles for _ in range(row)]
    elif editing.interpolate == "classes":
        starts, ends = (part.repeat_interleave(row, dim=0) for part in (y[:-1], y[1:]))
        y = condition.mix(starts, ends, weights.repeat(len(y) - 1)[:, None])
        titles = [f"{a} - {b} {w:.2f}" for a, b in zip(titles[:-1], titles[1:], strict=True) for w in weights.tolist()]
        z = z[:-1].repeat_interleave(row, dim=0)  # of each row's first one

    def step_noise(x, i):
        # one noise for the images of a row, else they would jump
        return draw(2 * len(x) // row, *x.shape[1:]).chunk(2)[0].repeat_interleave(row, dim=0)

    return {"choices": y, "x_T": z, "step_noise": step_noise}, titles


def start_from(pipeline, start, editing, image, mask=None):
    """The start of `draw_noise`, from an image: noised, inverted, or redrawn where the mask is white, as an EditingConfig
    says. image, mask: (1, 3, H, W) in [-1, 1]."""
    x_0 = pipeline.encode(image).expand_as(start["x_T"])
    if not (editing.invert or editing.mask):
        return start | {"init": x_0, "strength": editing.strength or 0.75}
    denoiser = pipeline.denoiser(start["choices"])
    if editing.invert:
        steps = pipeline.sampler.num_sampling_steps
        process = sampling_process(pipeline.sampler.kind, steps, create=pipeline.create_diffusion)
        *_, out = ddim_inversion(process, denoiser, x_0, progress=True)
        return start | {"x_T": out["sample"]}
    known = (F.max_pool2d(mask[:, :1], pipeline.space.factor) < 0).float().to(x_0.device)  # cells without any white
    return start | {"denoiser": inpainting_denoiser(denoiser, pipeline.create_diffusion(""), x_0, known)}


def read_image(path, size, option):
    """An image file, cropped like training images, as (1, 3, H, W) in [-1, 1]. Raises UserError naming the option."""
    try:
        image = center_crop_arr(open_image(path), size)
    except UserError as error:  # its way out, to remove the file, is that of a folder of images
        why = getattr(error.__context__, "strerror", None)  # of the system; other reasons are PIL's own words
        problem = f"cannot be read ({why})" if why else "not a readable image"
        raise UserError(f"{option} {path}", problem, "name an image file, such as a .png") from None
    return to_model_range(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None])
