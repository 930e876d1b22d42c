"""Rectified flow, also called the linear interpolant: Lipman et al. 2023, Liu et al. 2023, Ma et al. 2024 (SiT).

    x_s = (1 - s) x_0 + s eps,   v = d x_s / d s = eps - x_0,   s in [0, 1]

A model maps (x_s, t) to v, where t = 1000 s. Noise is at s = 1, as in the other processes; some papers turn the direction
of time around. `eps_denoiser` lets every sampler draw from such a model, and from those that predict v."""

import itertools
import math

import numpy as np
import torch

from .gaussian_diffusion import check_shape, mean_flat, per_sample
from .registry import OBJECTIVES


def shift_time(t, shift):
    """t in [0, 1], moved towards noise where shift is above 1: Esser et al. 2024, eq. 23. It is the change of time that
    keeps the signal-to-noise ratio of a mean over `shift`^2 times as many numbers."""
    return shift * t / (1 + (shift - 1) * t)


class Flow:
    """The flow in num_timesteps steps, equal before `shift_time`, and its training objective: the mean squared error of v.
    Step i goes from s = (i + 1) / num_timesteps to i / num_timesteps. The model is told t = 1000 s, a real number."""

    def __init__(self, predict="v", learn_sigma=False, num_timesteps=1000, time_shift=1.0):
        if (predict, learn_sigma) != ("v", False):
            raise ValueError("a flow predicts v alone, without a variance")
        self.num_timesteps = num_timesteps
        self.levels = shift_time(np.linspace(1, 0, num_timesteps + 1), time_shift).tolist()[-2::-1]  # s of each step
        self.timestep_map = [1000 * s for s in self.levels]

    def alpha_sigma(self, i):
        """(alpha, sigma) of step i, two numbers: x_s = alpha x_0 + sigma eps, sigma = s. Step -1 is the image: (1, 0)."""
        s = self.levels[i] if i >= 0 else 0.0
        return 1 - s, s

    def q_sample(self, x_start, i, noise):
        """x_s of step i. x_start, noise: (N, ...)."""
        alpha, sigma = self.alpha_sigma(i)
        return alpha * x_start + sigma * noise

    def predict_xstart_from_output(self, x, i, output):
        """x_0 as a model of the velocity predicts it at step i."""
        return x - self.alpha_sigma(i)[1] * check_shape("the model's output, the velocity,", output, x.shape)

    def draw_timesteps(self, number, device, sampling="uniform"):
        """Timesteps for training, (number,) float32 in (0, 1000): uniform, or "logit-normal", where s is the sigmoid of a
        standard normal number (Esser et al. 2024, section 3.1)."""
        if sampling == "uniform":
            return torch.rand(number, device=device) * 1000
        return torch.randn(number, device=device).sigmoid() * 1000

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The losses at t: (N,) for clean x_start: (N, C, ...): a dict of (N,) tensors, `loss`, and the same as `mse`."""
        noise = torch.randn_like(x_start) if noise is None else noise
        s = per_sample(t / 1000, x_start).to(x_start.dtype)
        x_s = (1 - s) * x_start + s * noise
        output = model(x_s, t, **(model_kwargs or {})).to(x_s.dtype)
        check_shape("the model's output, the velocity,", output, x_s.shape)
        mse = mean_flat((noise - x_start - output) ** 2)
        return {"loss": mse, "mse": mse}


@torch.no_grad()
def flow_log_likelihood(velocity, x_0, num_steps, probe):
    """The parts of log p(x_0), in nats, of the density that the flow's ODE gives to x_0: (N, ...), by the instantaneous
    change of variables (Chen et al. 2018, theorem 1), integrated from s = 0 to 1 with num_steps steps of Heun's method:

        log p(x_0) = log N(x_1; 0, I) + integral of div v(x_s) ds

    velocity: maps (x_s, 1000 s) to v, differentiably. probe: like x_0, of independent entries +1 or -1: the divergence is
    estimated by probe^T J probe, which is unbiased (Grathwohl et al. 2019, FFJORD, eq. 7). Returns the first summand, (N,),
    and the integral over each step, (N, num_steps), whose bounds are those of `likelihood_levels`."""

    def slope(x, s):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            v = velocity(x, 1000 * s)
            check_shape("the velocity", v, x.shape)
            (product,) = torch.autograd.grad(v, x, probe)
        return v.detach(), (product * probe).flatten(1).sum(1)

    x, integrals = x_0, []
    for s, to in itertools.pairwise(likelihood_levels(num_steps)):
        v, divergence = slope(x, s)
        v_to, divergence_to = slope(x + (to - s) * v, to)
        x = x + (to - s) * (v + v_to) / 2
        integrals.append((to - s) * (divergence + divergence_to) / 2)
    prior = -0.5 * (x**2 + math.log(2 * math.pi)).flatten(1).sum(1)
    return prior, torch.stack(integrals, dim=1)


def likelihood_levels(num_steps):
    """The bounds of the steps in s, from 0 to 1: close together near the data, where the divergence is largest."""
    return [(i / num_steps) ** 2 for i in range(num_steps + 1)]


def eps_denoiser(denoiser, objective, predict, alphas_cumprod):
    """A denoiser of eps, for every sampler of a diffusion, from one that predicts something else, in x_t's noise levels.

    denoiser: maps (x_t, t) to v, then the variance's interpolation where it is learned; or, for an objective that is a
    flow, (x_s, 1000 s) to the velocity. alphas_cumprod: (T,) of the full process; between timesteps sqrt(1 / alpha_bar - 1)
    is linear, as in diffusers' solvers. A flow has the signal-to-noise ratio of x_t at s = sigma / (alpha + sigma), with
    alpha = sqrt(alpha_bar_t) and sigma = sqrt(1 - alpha_bar_t), where x_s = x_t / (alpha + sigma)."""
    if predict == "eps":
        return denoiser
    ratios = np.sqrt(1 / alphas_cumprod - 1)

    def denoise(x_t, t):
        ratio = np.interp(t, np.arange(len(ratios)), ratios).item()
        alpha = (1 + ratio**2) ** -0.5
        sigma = ratio * alpha
        if OBJECTIVES[objective].flow:
            x_s = x_t / (alpha + sigma)
            return x_s + alpha / (alpha + sigma) * denoiser(x_s, 1000 * sigma / (alpha + sigma))
        output = denoiser(x_t, t)
        v, variance = output[:, : x_t.shape[1]], output[:, x_t.shape[1] :]
        return torch.cat([alpha * v + sigma * x_t, variance], dim=1)

    return denoise
