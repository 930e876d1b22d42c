"""Data that is distributed as N(MU, S^2) in every element: the exact denoiser, the exact trajectory and DDPM's moments are
known in closed form. Used by solver_order.py and by the tests of the samplers."""

import numpy as np
import torch

from diffusion import create_diffusion, sample

MU, S = 0.3, 0.5
ALPHA_BAR = create_diffusion("").alphas_cumprod


def alpha_bar_at(t):
    """Between timesteps sqrt(1 / alpha_bar - 1) is linear, as in diffusers' schedulers."""
    return 1 / (1 + np.interp(t, np.arange(1000), np.sqrt(1 / ALPHA_BAR - 1)) ** 2)


def marginal(alpha_bar):
    """Mean and standard deviation of x_t."""
    return alpha_bar**0.5 * MU, (alpha_bar * S**2 + 1 - alpha_bar) ** 0.5


def denoiser(x_t, t, fraction=0.0):
    """The exact eps, sqrt(1 - alpha_bar_t) times minus the score, and a fixed interpolation of the variance."""
    alpha_bar = alpha_bar_at(t)
    mean, std = marginal(alpha_bar)
    eps = (1 - alpha_bar) ** 0.5 * (x_t - mean) / std**2
    return torch.cat([eps, torch.full_like(eps, fraction)], dim=1)


def velocity(x_s, t):
    """The exact velocity of a flow between noise and the data: E[eps - x_0 | x_s] of two Gaussians."""
    s = t / 1000
    rest = (x_s - (1 - s) * MU) / ((1 - s) ** 2 * S**2 + s**2)
    return s * rest - (MU + (1 - s) * S**2 * rest)


def exact_trajectory(x, t_from, t_to):
    """The probability-flow ODE from x at t_from to t_to, None for the image: it keeps (x_t - mean_t) / std_t."""
    (mean, std), (mean_to, std_to) = (marginal(1.0 if t is None else alpha_bar_at(t)) for t in (t_from, t_to))
    return mean_to + std_to * (x - mean) / std


def ddpm_recursion(num_steps, fraction=None):
    """Mean and variance of the x of "ddpm" before each step and at the end, from N(0, 1): x_{t-1} is linear in x_t.
    Returns (num_steps + 1, 2). fraction: of the learned variance, in [-1, 1], or None for the fixed one, beta."""
    process = create_diffusion(str(num_steps))
    betas, alpha_bar, alpha_bar_prev = process.betas, process.alphas_cumprod, process.alphas_cumprod_prev
    posterior = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)  # DDPM, eq. 7
    posterior[0] = posterior[1]
    weight = 1.0 if fraction is None else (fraction + 1) / 2
    variance = np.exp(weight * np.log(betas) + (1 - weight) * np.log(posterior))  # IDDPM, eq. 15
    moments = [(0.0, 1.0)]
    for i in reversed(range(num_steps)):
        mean, var = moments[-1]
        slope = betas[i] / (alpha_bar[i] * S**2 + 1 - alpha_bar[i])  # eps = slope (x - mean_t) sqrt(1 - alpha_bar) / beta
        # DDPM, algorithm 2: (x - beta / sqrt(1 - alpha_bar) eps) / sqrt(alpha)
        gain = (1 - slope) / (1 - betas[i]) ** 0.5
        shift = slope * alpha_bar[i] ** 0.5 * MU / (1 - betas[i]) ** 0.5
        moments.append((gain * mean + shift, gain**2 * var + (variance[i] if i else 0.0)))
    return np.array(moments)


def error_at(sampler, num_steps, t_end, x_T, **options):
    """RMS error against the exact trajectory from the same x_T, after the step that ends closest to t_end, None for x_0."""
    timesteps = []

    def recorded(x_t, t):
        timesteps.append(t)
        return denoiser(x_t, t)

    samples = [out["sample"] for out in sample(sampler, recorded, x_T, num_steps, **options)]
    ends = [*dict.fromkeys(timesteps), None][1:]  # Heun asks twice at a timestep
    index = num_steps - 1 if t_end is None else min(range(num_steps - 1), key=lambda k: abs(ends[k] - t_end))
    return (samples[index] - exact_trajectory(x_T, timesteps[0], ends[index])).square().mean().sqrt().item()


def fitted_order(numbers, errors):
    return -np.polyfit(np.log(numbers), np.log(errors), 1)[0]
