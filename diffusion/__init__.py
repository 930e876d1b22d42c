"""The diffusion process: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol and Dhariwal 2021 (learned variances).
Equations on tensors: it knows nothing of models, files, labels or guidance.

    for out in sample("dpm-solver++", denoiser, x_T, num_steps=20):
        x_t, x_0 = out["sample"], out["pred_xstart"]

or, by the original release's names,

    x_0 = create_diffusion("250").p_sample_loop(model, x_T.shape, x_T, clip_denoised=False, model_kwargs=dict(y=y))
"""

import contextlib

import torch

from . import samplers
from .gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from .respace import respaced_betas, space_timesteps


def create_diffusion(
    timestep_respacing,
    noise_schedule="linear",
    use_kl=False,
    sigma_small=False,
    predict_xstart=False,
    learn_sigma=True,
    rescale_learned_sigmas=False,
    diffusion_steps=1000,
):
    """Make the process of the paper: 1000 steps, linear betas, eps prediction, learned variances.

    timestep_respacing: "" or None for all steps, else as in `space_timesteps` ("250", "10,15,20", "ddim50").
    noise_schedule: "linear" or "squaredcos_cap_v2". use_kl: train on the variational bound alone. sigma_small: with
    learn_sigma=False, the posterior's variance instead of beta. predict_xstart: the model's output is x_0, not eps.
    rescale_learned_sigmas: weigh the bound by diffusion_steps / 1000 in the hybrid loss. Raises ValueError for an
    unknown schedule or an impossible spacing."""
    betas = get_named_beta_schedule(noise_schedule, diffusion_steps)
    timesteps = space_timesteps(diffusion_steps, timestep_respacing or "")
    fixed_variance = "small" if sigma_small else "large"
    return GaussianDiffusion(
        respaced_betas(betas, timesteps),
        timestep_map=timesteps,
        variance="learned" if learn_sigma else fixed_variance,
        predict_xstart=predict_xstart,
        use_kl=use_kl,
        vb_weight=diffusion_steps / 1000 if rescale_learned_sigmas else 1.0,
    )


def sample(
    sampler,
    denoiser,
    x_T,
    num_steps,
    *,
    eta=0.0,
    spacing=None,
    step_noise=samplers.fresh_noise,
    init=None,
    strength=1.0,
    progress=False,
    create=create_diffusion,
):
    """Turn noise into x_0, step by step: returns an iterator that yields dicts of `sample` (x_t, at the end x_0),
    `pred_xstart` and `step`, which counts down to 0; `samplers.last` of it is x_0. Nothing is clipped.

    sampler: one of `samplers.SAMPLERS`. denoiser: maps (x_t, t) to (N, C or 2C, ...): eps, then the variance's
    interpolation where it is learned; t, the same for the batch, is a Python number in [0, 999], so that the denoiser can
    decide by it without waiting for the device, and for "heun" and "euler" may be fractional. `guidance.guided_denoiser`
    makes one of a model. x_T: (N, C, ...), standard normal.
    num_steps: steps in time, one evaluation of the denoiser each, except "heun": `samplers.model_evaluations`.
        "ddpm": as create_diffusion(str(num_steps)). "ddim": "ddimN" where that exists, else evenly spaced.
    eta: of "ddim": noise in each step, 0 none to 1 about DDPM's. step_noise(x, i): the noise of step i, where one is added.
    spacing: of diffusers' solvers, one of `samplers.SPACINGS`, by default "linspace", which starts at the last timestep.
    init, strength: start from this image (N, C, ...), noised with x_T, and make the last round(strength * num_steps)
        steps, at least one; strength in (0, 1].
    create: `create_diffusion`, or a partial of it with the options that the model was trained with.
    Raises ValueError for an option that the sampler lacks, or an impossible number of steps."""
    check_sampler(sampler, num_steps, eta, spacing)
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength} is not in (0, 1]")
    made = max(1, round(strength * num_steps)) if init is not None else num_steps
    if sampler in samplers.SOLVERS:
        process = create("")
        if process.predict_xstart:
            raise ValueError(f"{sampler} needs a model that predicts eps")
        scheduler = samplers.solver_scheduler(sampler, process.betas, num_steps, spacing or "linspace")
        return samplers.solver(scheduler, denoiser, x_T, progress, made, init)

    process = create(str(num_steps))
    if sampler == "ddim":
        with contextlib.suppress(ValueError):  # no integer stride leaves exactly num_steps
            process = create(f"ddim{num_steps}")
    if init is not None:
        start = torch.full((len(x_T),), made - 1, device=x_T.device)
        x_T = process.q_sample(init, start, x_T)
    model = samplers.as_model(denoiser, process.timestep_map[made - 1 :: -1])
    options = {"num_steps": made, "clip_denoised": False}
    if sampler == "ddpm":
        return samplers.ddpm(process, model, x_T, progress, step_noise, **options)
    step_noise = step_noise if eta else lambda x, i: 0.0  # drawing noise per sample is not free
    return samplers.ddim(process, model, x_T, progress, step_noise, eta=eta, **options)


def check_sampler(sampler, num_steps, eta=0.0, spacing=None):
    """Raises ValueError for an option that the sampler lacks, or an impossible number of steps of the 1000."""
    if sampler not in samplers.SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is not one of {', '.join(samplers.SAMPLERS)}")
    if eta and sampler != "ddim":
        raise ValueError(f"eta is an option of ddim, not of {sampler}")
    if spacing is not None and sampler not in samplers.SOLVERS:
        raise ValueError(f"spacing is an option of {', '.join(samplers.SOLVERS)}, not of {sampler}")
    if sampler in samplers.SOLVERS:
        samplers.solver_scheduler(sampler, create_diffusion("").betas, num_steps, spacing or "linspace")
    else:
        space_timesteps(1000, num_steps)
