"""The samplers: each is a generator that turns noise into x_0, given a denoiser, and reads like its paper's algorithm.

    process    what a step is: a `GaussianDiffusion` or a `Flow` that keeps the timesteps of these steps, `SolverSteps`.
               `timestep_map[i]` is t of step i, as the denoiser is told it
    denoise    (x, t) -> eps, then the variance's interpolation where it is learned; or the velocity, for flows
    x          (N, C, ...), at the level of the first of `steps`
    steps      the numbers of the steps, descending to 0
    noise      noise(x, i): the noise of step i, like x

After every step it yields a dict of `sample`, x at the next level, at the end x_0; `pred_xstart`, x_0 as predicted at the
step's start; and `step`. So progress, previews and early stopping are the caller's. `diffusion.sample` makes the arguments;
`registry.SAMPLERS` names the samplers."""

import torch
from tqdm.auto import tqdm

from .gaussian_diffusion import check_shape
from .registry import DEFAULT_SPACING, SPACINGS


def last(steps):
    """The final sample of a sampler."""
    for out in steps:  # noqa: B007 -- only the last one counts
        pass
    return out["sample"]


def fresh_noise(x, i):
    """The noise of step i as the original draws it: from torch's own stream, one draw a step."""
    return torch.randn_like(x)


def progress_bar(steps, show):
    return tqdm(steps, desc="Sampling", unit="step", leave=False) if show else steps


@torch.no_grad()
def ddpm(process, denoise, x, steps, noise):
    """Ancestral sampling: DDPM (Ho et al. 2020), algorithm 2."""
    for i in steps:
        p = process.p_from_output(denoise(x, process.timestep_map[i]), x, i)
        step_noise = check_shape("noise", noise(x, i), x.shape)  # asked for in the last step too, as the original draws it
        x = p["mean"] + torch.exp(0.5 * p["log_variance"]) * step_noise if i > 0 else p["mean"]
        out = {"sample": x, "pred_xstart": p["pred_xstart"], "step": i}
        yield out
        x = out["sample"]  # which the caller may have replaced


@torch.no_grad()
def ddim(process, denoise, x, steps, noise, eta=0.0):
    """DDIM (Song et al. 2021), section 4.1. eta: 0 is deterministic, 1 is close to DDPM."""
    for i in steps:
        x_0 = process.predict_xstart_from_output(x, i, denoise(x, process.timestep_map[i]))
        x = ddim_step(process, x, i, x_0, eta, check_shape("noise", noise(x, i), x.shape) if eta else 0.0)
        out = {"sample": x, "pred_xstart": x_0, "step": i}
        yield out
        x = out["sample"]


def ddim_step(process, x, t, x_0, eta, noise):
    """x at step t - 1: DDIM, eq. 12, with the sigma of eq. 16 times eta. x_0: as predicted at t."""
    eps = process.predict_eps_from_xstart(x, t, x_0)
    alpha_bar, alpha_bar_prev = process.at("alphas_cumprod", t, x), process.at("alphas_cumprod_prev", t, x)
    # 0 at t = 0, where alpha_bar_prev is 1
    sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
    return x_0 * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * eps + sigma * noise


# ----------------------------------------------------------------------------------------------------------------------
# Rectified flows: dx/ds = v from s = 1 to 0. The last step goes straight to the predicted x_0, with one evaluation


@torch.no_grad()
def flow_euler(process, denoise, x, steps, noise):
    """Euler's method, of order 1."""
    for i in steps:
        (_, s), (_, s_next) = process.alpha_sigma(i), process.alpha_sigma(i - 1)
        v = check_shape("the denoiser's velocity", denoise(x, process.timestep_map[i]), x.shape)
        x_0 = x - s * v
        x = x + (s_next - s) * v if i > 0 else x_0
        yield {"sample": x, "pred_xstart": x_0, "step": i}


@torch.no_grad()
def flow_heun(process, denoise, x, steps, noise):
    """Heun's method, of order 2."""
    for i in steps:
        (_, s), (_, s_next) = process.alpha_sigma(i), process.alpha_sigma(i - 1)
        v = check_shape("the denoiser's velocity", denoise(x, process.timestep_map[i]), x.shape)
        x_0 = x - s * v
        if i > 0:
            v = (v + denoise(x + (s_next - s) * v, process.timestep_map[i - 1])) / 2
        x = x + (s_next - s) * v if i > 0 else x_0
        yield {"sample": x, "pred_xstart": x_0, "step": i}


@torch.no_grad()
def flow_sde(process, denoise, x, steps, noise):
    """Euler-Maruyama for the reverse-time SDE that has the same marginals as the flow, with the diffusion coefficient
    w_s = s: Ma et al. 2024 (SiT), eqs. 4 and 10. The noise of the last step is asked for, and not added."""
    for i in steps:
        (_, s), (_, s_next) = process.alpha_sigma(i), process.alpha_sigma(i - 1)
        v = check_shape("the denoiser's velocity", denoise(x, process.timestep_map[i]), x.shape)
        x_0, eps = x - s * v, x + (1 - s) * v  # the score of q(x_s) is -eps / s
        step_noise = noise(x, i)
        x = x + (s_next - s) * (v + 0.5 * eps) + (s * (s - s_next)) ** 0.5 * step_noise if i > 0 else x_0
        yield {"sample": x, "pred_xstart": x_0, "step": i}


@torch.no_grad()
def meanflow(process, denoise, x, steps, noise):
    """Steps of the average velocity u over [r, s]: Geng et al. 2025. One step is x_0 = eps - u(eps, 0, 1). The
    yielded `pred_xstart` goes on to s = 0 with the u of the step."""
    for i in steps:
        (_, s), (_, r) = process.alpha_sigma(i), process.alpha_sigma(i - 1)
        u = check_shape("the denoiser's average velocity", denoise(x, 1000 * s, 1000 * r), x.shape)
        x_0 = x - s * u
        x = x - (s - r) * u
        yield {"sample": x, "pred_xstart": x_0, "step": i}


# ----------------------------------------------------------------------------------------------------------------------
# The published solvers, from diffusers, on our schedule

# The lowest timestep to start from: x_T is pure noise. "leading" with 10 to 100 steps starts at 900 to 990, which costs an
# error of 0.002 on data of variance 1/4, but with more steps at 800 (0.005), 666 (0.015) or 500 (0.045). With fewer than 10
# the solver's own error is above 0.05, and only a start at t = 0 is far off.
FIRST_TIMESTEP, FIRST_OF_FEW, FEW_STEPS = 900, 500, 10


class SolverSteps:
    """The steps of diffusers' scheduler of a sampler, of `registry.SAMPLERS`, for the process of `betas`: its timesteps are
    set, its sigma is sqrt(1 / alpha_bar - 1). Raises ValueError where it repeats a timestep or starts far from the last."""

    def __init__(self, sampler, betas, num_steps, spacing=None):
        spacing, refused = spacing or DEFAULT_SPACING, f"{sampler.name} cannot make {num_steps} steps"
        if not 1 <= num_steps <= len(betas):
            raise ValueError(f"{refused}: ask for 1 to {len(betas)}")
        self.scheduler, problem = spaced_scheduler(sampler, betas, num_steps, spacing)
        if problem:
            others = [other for other in SPACINGS if not spaced_scheduler(sampler, betas, num_steps, other)[1]]
            way_out = f", or take {' or '.join(others)} spacing" if others else ""
            raise ValueError(f"{refused} with {spacing} spacing, {problem}: change their number{way_out}")

    def index(self, i):
        """The place of step i in the scheduler's lists. Heun's have two entries for each step but the last."""
        return self.scheduler.order * (self.scheduler.num_inference_steps - 1 - i)

    def q_sample(self, x_start, i, noise):
        """Draw x_t at step i."""
        sigma = self.scheduler.sigmas[self.index(i)]  # on the host, like all of the scheduler's numbers
        return (x_start + sigma * noise) / (1 + sigma**2).sqrt()


def spaced_scheduler(sampler, betas, num_steps, spacing):
    """diffusers' scheduler with its timesteps set, and what is wrong with them, or None."""
    import diffusers  # here: it takes seconds

    settings = {"num_train_timesteps": len(betas), "prediction_type": "epsilon", "timestep_spacing": spacing}
    scheduler = getattr(diffusers, sampler.scheduler)(trained_betas=betas, **settings, **sampler.settings)
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.tolist()
    if len(set(timesteps)) != num_steps or min(timesteps) < 0:
        return scheduler, "which would repeat a timestep or leave the process"
    if timesteps[0] < (FIRST_OF_FEW if num_steps < FEW_STEPS else FIRST_TIMESTEP):
        return scheduler, f"which starts at timestep {timesteps[0]:.0f} of {len(betas) - 1}, where x is not yet pure noise"
    return scheduler, None


@torch.no_grad()
def solver(process, denoise, x_t, steps, noise):
    """A solver of diffusers; process: `SolverSteps`. x_T is standard normal, and every yielded x_t has the noise level
    alpha_bar_t of DDPM, whatever space the scheduler works in. The denoiser's eps is used, its variance is not."""
    scheduler, index = process.scheduler, process.index(len(steps) - 1)
    timesteps = scheduler.timesteps.tolist()
    scheduler.set_begin_index(index)
    # Euler's and Heun's own x is x_t / sqrt(alpha_bar); for the others the factor is 1
    x = x_t / scheduler.scale_model_input(torch.ones(()), timesteps[index])
    for i in steps:
        for stage in range(scheduler.order if i else 1):  # the last step leads to sigma = 0, where Heun has no slope
            t, sigma = timesteps[index], scheduler.sigmas[index]
            x_t = scheduler.scale_model_input(x, t)
            eps = check_shape("the denoiser's eps", denoise(x_t, t)[:, : x.shape[1]], x.shape).to(x.dtype)
            if stage == 0:
                x_0 = (1 + sigma**2).sqrt() * x_t - sigma * eps
            x = scheduler.step(eps, t, x).prev_sample
            index += 1
        yield {"sample": scheduler.scale_model_input(x, None), "pred_xstart": x_0, "step": i}
