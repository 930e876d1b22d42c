"""Loops that turn noise into x_0. Each is a generator that yields, after every step, a dict of

    sample        x at the next, lower noise level; after the last step x_0
    pred_xstart   x_0 as predicted at the step's start
    step          the step's number, counting down: 0 is the last

so that progress, previews and early stopping are the caller's. `diffusion.sample` chooses among them by name.
"""

import contextlib

import torch
from tqdm.auto import tqdm

from .registry import DEFAULT_SPACING


def check_shape(what, tensor, shape):
    """Raises ValueError for a tensor of another shape, which the equations would broadcast without a word."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, not {tuple(shape)}")


def last(steps):
    """The final sample of a loop."""
    for out in steps:  # noqa: B007 -- only the last one counts
        pass
    return out["sample"]


def fresh_noise(x, i):
    """The noise of step i as the original draws it: from torch's own stream, one draw a step."""
    return torch.randn_like(x)


def no_noise(x, i):
    """The noise of the steps of a deterministic sampler, in place of noise that would be drawn and multiplied by 0."""
    return torch.zeros_like(x)


def progress_bar(steps, show):
    return tqdm(steps, desc="Sampling", unit="step", leave=False) if show else steps


# ----------------------------------------------------------------------------------------------------------------------
# DDPM and DDIM: single steps of a GaussianDiffusion that keeps only the timesteps of these steps


def respaced_process(sampler, num_steps, create):
    """The process of `create` that keeps num_steps timesteps as the sampler, of `registry.SAMPLERS`, chooses them.
    Raises ValueError where none is possible."""
    *preferred, always = (pattern.format(num_steps) for pattern in sampler.respacings)
    for spacing in preferred:
        with contextlib.suppress(ValueError):  # no integer stride leaves exactly num_steps
            return create(spacing)
    return create(always)


@torch.no_grad()
def run_steps(step, x_T, num_steps, progress=False):
    """The steps i = num_steps - 1, ..., 0 from x_T. step(x, t, i) makes step i, where t is (N,) and holds i, and returns a
    dict of `sample` and `pred_xstart`. The caller may replace the dict's `sample`: the next step starts from it."""
    x = x_T
    for i in progress_bar(range(num_steps - 1, -1, -1), progress):
        out = {**step(x, torch.full((len(x),), i, device=x.device), i), "step": i}
        yield out
        x = out["sample"]


def process_steps(process, make_step, denoiser, x_T, num_steps, progress=False, step_noise=fresh_noise, init=None):
    """The last num_steps steps of a process, each made by make_step, the process's `p_sample` or `ddim_sample`. denoiser
    and step_noise are those of `diffusion.sample`. init: start from this image, noised by x_T to the first step's level."""
    if init is not None:
        start = torch.full((len(x_T),), num_steps - 1, device=x_T.device)
        x_T = process.q_sample(init, start, x_T)

    def step(x, t, i):
        return make_step(
            lambda x_t, _: denoiser(x_t, process.timestep_map[i]),
            x,
            t,
            clip_denoised=False,
            draw_noise=lambda x_t: step_noise(x_t, i),
        )

    return run_steps(step, x_T, num_steps, progress)


# ----------------------------------------------------------------------------------------------------------------------
# The published solvers, from diffusers, on our schedule


def solver_scheduler(sampler, betas, num_steps, spacing=None):
    """diffusers' scheduler of a sampler, of `registry.SAMPLERS`, for the process of `betas`, its timesteps set. Raises
    ValueError where the spacing has no such number of distinct timesteps."""
    import diffusers  # here: it takes seconds

    spacing = spacing or DEFAULT_SPACING
    scheduler = getattr(diffusers, sampler.scheduler)(
        num_train_timesteps=len(betas),
        trained_betas=betas,
        prediction_type="epsilon",
        timestep_spacing=spacing,
        **sampler.settings,
    )
    if 1 <= num_steps <= len(betas):
        scheduler.set_timesteps(num_steps)
        # for some numbers a spacing silently repeats a timestep or leaves the process
        if len(set(scheduler.timesteps.tolist())) == num_steps and scheduler.timesteps.min() >= 0:
            return scheduler
    raise ValueError(
        f"{sampler.name} cannot make {num_steps} steps with {spacing} spacing: change their number or the spacing"
    )


@torch.no_grad()
def solver_steps(scheduler, denoiser, x_T, num_steps, progress=False, init=None):
    """The last num_steps steps of a scheduler of `solver_scheduler`. x_T is standard normal and every yielded x_t has the
    noise level alpha_bar_t of DDPM, whatever space the scheduler works in. init: start from this image, noised by x_T to
    the level of the first step. The denoiser's eps is used, its variance is not."""
    # Heun lists two timesteps for each step but the last
    timesteps, index = scheduler.timesteps.tolist(), scheduler.order * (scheduler.num_inference_steps - num_steps)
    scheduler.set_begin_index(index)
    if init is None:
        x_t = x_T
    else:
        sigma = scheduler.sigmas[index]  # sqrt(1 / alpha_bar - 1), on the host like all of the scheduler's numbers
        x_t = (init + sigma * x_T) / (1 + sigma**2).sqrt()
    # Euler's and Heun's own x is x_t / sqrt(alpha_bar); for the others the factor is 1
    x = x_t / scheduler.scale_model_input(torch.ones(()), timesteps[index])
    for i in progress_bar(range(num_steps - 1, -1, -1), progress):
        for stage in range(scheduler.order if i else 1):  # the last step leads to sigma = 0, where Heun has no slope
            t, sigma = timesteps[index], scheduler.sigmas[index]
            x_t = scheduler.scale_model_input(x, t)
            eps = denoiser(x_t, t)[:, : x.shape[1]].to(x.dtype)
            check_shape("the denoiser's eps", eps, x.shape)
            if stage == 0:
                pred_xstart = (1 + sigma**2).sqrt() * x_t - sigma * eps
            x = scheduler.step(eps, t, x).prev_sample
            index += 1
        yield {"sample": scheduler.scale_model_input(x, None), "pred_xstart": pred_xstart, "step": i}
