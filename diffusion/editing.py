"""Uses of a trained model that need no training: inversion, inpainting, interpolation. (Starting from a noised image is
`diffusion.sample` with `init` and `strength`.)"""

import numpy as np
import torch

from .samplers import progress_bar


@torch.no_grad()
def ddim_inversion(process, denoise, x_0, progress=False):
    """From an image to the noise from which "ddim" with eta = 0 and the same steps returns to it: DDIM, section 5.4. Each
    step up takes the eps of the level below, so the way back is exact only in the limit of many steps.

    process: of the steps, `create_diffusion("ddim50")`. denoise, and what is yielded: as `diffusion.sample`, with as many
    evaluations as steps; `step` counts up, and the last `sample` is x_T. x_0: (N, C, ...)."""
    x = pred_xstart = x_0
    for i in progress_bar(range(process.num_timesteps), progress):
        below = max(i - 1, 0)  # the image itself is taken for a sample of step 0
        predicted = process.predict_xstart_from_output(x, below, denoise(x, process.timestep_map[below]))
        eps = process.predict_eps_from_xstart(x, below, predicted)
        if i == 0:
            x = process.q_sample(x_0, 0, eps)
        else:
            pred_xstart, alpha_bar = predicted, process.at("alphas_cumprod", i, x)
            x = pred_xstart * alpha_bar.sqrt() + (1 - alpha_bar).sqrt() * eps  # eq. 12 with sigma = 0, upwards
        yield {"sample": x, "pred_xstart": pred_xstart, "step": i}


def inpainting_denoiser(denoiser, diffusion, x_0, mask):
    """A denoiser that knows the image where the mask is 1: there it predicts x_0 itself. With every sampler this keeps the
    known part of x_t distributed as q(x_t | x_0) at each step, which is what RePaint replaces it by (Lugmayr et al. 2022,
    eq. 8; without its resampling), and leaves x_0 there in the end: a deterministic solver mixes x_0 and x_T at each noise
    level, DDPM draws from its eq. 7. Where the mask is 0 the model's prediction stays.

    diffusion: the whole process, `create_diffusion("")`. x_0: (N, C, H, W). mask: (N or 1, 1, H, W), 0 or 1."""
    sigmas = diffusion.sqrt_recipm1_alphas_cumprod

    def denoise(x_t, t):
        output = denoiser(x_t, t)
        sigma = np.interp(t, np.arange(len(sigmas)), sigmas).item()  # linear between timesteps, as diffusers' solvers do
        eps = ((1 + sigma**2) ** 0.5 * x_t - x_0) / sigma
        known = torch.cat([eps, torch.full_like(eps, -1.0)], dim=1)  # -1 is the posterior's variance: IDDPM, eq. 15
        return torch.where(mask.bool(), known[:, : output.shape[1]], output)

    return denoise


def slerp(a, b, weight):
    """Spherical interpolation from a (weight 0) to b (weight 1), sample by sample (Shoemake 1985). Unlike the linear one it
    keeps the norm of Gaussian noises, which a model expects. a, b: (N, ...). weight: a number, or (N, 1, ...)."""
    axes = tuple(range(1, a.ndim))
    norms = (a.square().sum(axes, keepdim=True) * b.square().sum(axes, keepdim=True)).sqrt()
    turns = torch.acos(((a * b).sum(axes, keepdim=True) / norms).clamp(-1, 1)) / torch.pi
    # sin(w angle) / sin(angle), by way of sinc for noises that are the same
    return sum(w * torch.sinc(w * turns) / torch.sinc(turns) * noise for w, noise in ((1 - weight, a), (weight, b)))
