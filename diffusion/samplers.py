"""Loops that turn noise into x_0. Each is a generator that yields, after every step, a dict of

    sample        x at the next, lower noise level; after the last step x_0
    pred_xstart   x_0 as predicted at the step's start
    step          the step's number, counting down: 0 is the last

so that progress, previews and early stopping are the caller's. `diffusion.sample` chooses among them by name.
"""

import torch
from tqdm.auto import tqdm

SOLVERS = ("dpm-solver++", "unipc", "heun", "euler")
SAMPLERS = ("ddpm", "ddim", *SOLVERS)
SPACINGS = ("leading", "linspace", "trailing")  # Lin et al. 2024, Table 2


def initial_noise(model, shape, noise, device):
    """x_T of `shape`: `noise` where given, else drawn, on `device` or by default on the model's."""
    if noise is not None:
        return noise if device is None else noise.to(device)
    if device is None:
        device = next(getattr(model, "__self__", model).parameters()).device  # a bound method has its model's
    return torch.randn(*shape, device=device)


def last(steps):
    """The final sample of a loop."""
    for out in steps:  # noqa: B007 -- only the last one counts
        pass
    return out["sample"]


def fresh_noise(x, i):
    """The noise of step i as the original draws it: from torch's own stream, one draw a step."""
    return torch.randn_like(x)


def model_evaluations(sampler, num_steps):
    """How often a sampler asks the denoiser: once a step, but Heun twice a step except in its last."""
    return 2 * num_steps - 1 if sampler == "heun" else num_steps


def with_bar(order, progress):
    return tqdm(order, desc="Sampling", unit="step", leave=False) if progress else order


def countdown(num_steps, progress):
    return with_bar(range(num_steps - 1, -1, -1), progress)


def steps_of(diffusion, x):
    """The process's steps 0, 1, ..., each as an (N,) tensor on x's device, made without a copy from the host."""
    return [step.expand(len(x)) for step in torch.arange(diffusion.num_timesteps, device=x.device)]


def as_model(denoiser, timesteps):
    """A denoiser as the model of (x, t) that GaussianDiffusion calls once a step, when the steps are at `timesteps`."""
    upcoming = iter(timesteps)
    return lambda x, t: denoiser(x, next(upcoming))


# ----------------------------------------------------------------------------------------------------------------------
# DDPM and DDIM, on a process that keeps only the steps to be made


@torch.no_grad()
def ddpm(diffusion, model, x_T, progress=False, step_noise=fresh_noise, num_steps=None, **p_options):
    """Ancestral sampling: DDPM, algorithm 2. step_noise(x, i) gives step i's noise, in the shape of x; it is asked at
    i = 0 too, where nothing is added. num_steps: make only the last so many steps. p_options: of `p_mean_variance`."""
    x, steps = x_T, steps_of(diffusion, x_T)
    for i in countdown(num_steps or diffusion.num_timesteps, progress):
        out = diffusion.p_mean_variance(model, x, steps[i], **p_options)
        noise = step_noise(x, i)
        x = out["mean"] + torch.exp(0.5 * out["log_variance"]) * noise if i else out["mean"]
        yield {"sample": x, "pred_xstart": out["pred_xstart"], "step": i}


@torch.no_grad()
def ddim(diffusion, model, x_T, progress=False, step_noise=fresh_noise, num_steps=None, eta=0.0, **p_options):
    """DDIM, eq. 12, with the sigma of eq. 16 times eta: 0 is deterministic, 1 is close to DDPM. Otherwise as `ddpm`."""
    x, steps = x_T, steps_of(diffusion, x_T)
    for i in countdown(num_steps or diffusion.num_timesteps, progress):
        t = steps[i]
        x_0 = diffusion.p_mean_variance(model, x, t, **p_options)["pred_xstart"]
        eps = diffusion.predict_eps_from_xstart(x, t, x_0)
        alpha_bar, alpha_bar_prev = diffusion.at("alpha_bar", t, x), diffusion.at("alpha_bar_prev", t, x)
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
        noise = step_noise(x, i)
        x = x_0 * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        if i:
            x = x + sigma * noise
        yield {"sample": x, "pred_xstart": x_0, "step": i}


# ----------------------------------------------------------------------------------------------------------------------
# The published solvers, from diffusers, on our schedule


def solver_scheduler(sampler, betas, num_steps, spacing="linspace"):
    """diffusers' scheduler for the process of `betas`, its timesteps set. Settings are those that the papers advise for
    guided sampling. Raises ValueError where the spacing has no such number of distinct timesteps."""
    import diffusers  # here: it takes seconds

    make, options = {
        # Lu et al. 2022, "DPM-Solver++": 2M, multistep of order 2 on the predicted x_0, for guided sampling; thresholding
        # only for pixels, whose range is known
        "dpm-solver++": (
            diffusers.DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "thresholding": False},
        ),
        # Zhao et al. 2023, "UniPC": order 2 on the predicted x_0, with B_2(h) = e^h - 1, for guided sampling
        "unipc": (
            diffusers.UniPCMultistepScheduler,
            {"predict_x0": True, "solver_order": 2, "solver_type": "bh2", "thresholding": False},
        ),
        "heun": (diffusers.HeunDiscreteScheduler, {}),  # Karras et al. 2022, algorithm 1
        "euler": (diffusers.EulerDiscreteScheduler, {}),
    }[sampler]
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    common = {"prediction_type": "epsilon", "timestep_spacing": spacing}
    scheduler = make(num_train_timesteps=len(betas), trained_betas=betas, **common, **options)
    if 1 <= num_steps <= len(betas):
        scheduler.set_timesteps(num_steps)
        # for some numbers a spacing silently repeats a timestep or leaves the process
        if len(set(scheduler.timesteps.tolist())) == num_steps and scheduler.timesteps.min() >= 0:
            return scheduler
    raise ValueError(f"{sampler} cannot make {num_steps} steps with {spacing} spacing: change their number or the spacing")


@torch.no_grad()
def solver(scheduler, denoiser, x_T, progress=False, num_steps=None, init=None):
    """Sampling with a scheduler of `solver_scheduler`. x_T is standard normal and every yielded x_t has the noise level
    alpha_bar_t of DDPM, whatever space the scheduler works in. num_steps: make only the last so many steps. init: start
    from this image, noised by x_T to the level of the first step. The denoiser's eps is used, its variance is not."""
    skipped = scheduler.num_inference_steps - (num_steps or scheduler.num_inference_steps)
    timesteps, index = scheduler.timesteps.tolist(), scheduler.order * skipped  # Heun lists a step's two stages
    scheduler.set_begin_index(index)
    if init is None:
        x_t = x_T
    else:
        sigma = scheduler.sigmas[index]  # sqrt(1 / alpha_bar - 1), on the host like all of the scheduler's numbers
        x_t = (init + sigma * x_T) / (1 + sigma**2).sqrt()
    # Euler's and Heun's own x is x_t / sqrt(alpha_bar); for the others the factor is 1
    x = x_t / scheduler.scale_model_input(torch.ones(()), timesteps[index])
    for i in countdown(scheduler.num_inference_steps - skipped, progress):
        for stage in range(scheduler.order if i else 1):  # the last step leads to sigma = 0, where Heun has no slope
            t, sigma = timesteps[index], scheduler.sigmas[index]
            x_t = scheduler.scale_model_input(x, t)
            eps = denoiser(x_t, t)[:, : x.shape[1]].to(x.dtype)
            if stage == 0:
                pred_xstart = (1 + sigma**2).sqrt() * x_t - sigma * eps
            x = scheduler.step(eps, t, x).prev_sample
            index += 1
        yield {"sample": scheduler.scale_model_input(x, None), "pred_xstart": pred_xstart, "step": i}
