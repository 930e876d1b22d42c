"""The diffusion process: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol and Dhariwal 2021 (learned variances).
Equations on tensors: this package knows nothing of files, labels' names or autoencoders.

    for out in sample("dpm-solver++", denoiser, x_T, num_steps=20):
        x_t, x_0 = out["sample"], out["pred_xstart"]

or, by the original release's names,

    x_0 = create_diffusion("250").p_sample_loop(model, x_T.shape, x_T, clip_denoised=False, model_kwargs=dict(y=y))
"""

# torch and numpy take seconds to import: the functions below import them, so that commands can check their options first
from .registry import check_options


def create_diffusion(
    timestep_respacing,
    noise_schedule="linear",
    use_kl=False,
    sigma_small=False,
    predict_xstart=False,
    learn_sigma=True,
    rescale_learned_sigmas=False,
    diffusion_steps=1000,
    predict="eps",
    snr_gamma=None,
):
    """Make the process of the paper: 1000 steps, linear betas, eps prediction, learned variances.

    timestep_respacing: "" or None for all steps, else as in `space_timesteps` ("250", "10,15,20", "ddim50").
    noise_schedule: "linear" or "squaredcos_cap_v2". use_kl: train on the variational bound alone. sigma_small: with
    learn_sigma=False, the posterior's variance instead of beta. predict_xstart: the model's output is x_0, not eps.
    rescale_learned_sigmas: weigh the bound in the hybrid loss by the number of kept steps / 1000. predict: "eps", "x0" or
    "v"; snr_gamma: see `GaussianDiffusion`.
    Raises ValueError for an unknown schedule or an impossible spacing."""
    from .gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
    from .respace import respaced_betas, space_timesteps

    betas = get_named_beta_schedule(noise_schedule, diffusion_steps)
    timesteps = space_timesteps(diffusion_steps, "" if timestep_respacing is None else timestep_respacing)
    fixed_variance = "small" if sigma_small else "large"
    return GaussianDiffusion(
        respaced_betas(betas, timesteps),
        timestep_map=timesteps,
        variance="learned" if learn_sigma else fixed_variance,
        predict="x0" if predict_xstart else predict,
        use_kl=use_kl,
        vb_weight=len(timesteps) / 1000 if rescale_learned_sigmas else 1.0,
        snr_gamma=snr_gamma,
    )


def sample(
    sampler,
    denoiser,
    x_T,
    num_steps,
    *,
    eta=0.0,
    spacing=None,
    step_noise=None,
    init=None,
    strength=1.0,
    progress=False,
    create=create_diffusion,
):
    """Turn noise into x_0, step by step: returns an iterator that yields dicts of `sample` (x_t, at the end x_0),
    `pred_xstart` and `step`, which counts down to 0; `samplers.last` of it is x_0. Nothing is clipped. The next step of
    "ddpm" and "ddim" starts from the dict's `sample`, which the caller may replace.

    sampler: one of `registry.SAMPLERS`. denoiser: maps (x_t, t) to (N, C or 2C, ...): eps, then the variance's
    interpolation where it is learned (`flow.eps_denoiser` makes one of models that predict something else); t, the same for
    the batch, is a Python number in [0, 999], so that the denoiser can decide by it without a GPU synchronisation, and for
    "heun" and "euler" may be fractional. `guidance.guided_denoiser` makes one of a model. The samplers of flows take a
    denoiser of the velocity: `flow.flow_steps`. x_T: (N, C, ...), standard normal.
    num_steps: steps in time; the sampler's `evaluations` says how often the denoiser is called.
        "ddpm": as create_diffusion(str(num_steps)). "ddim": "ddimN" where that exists, else evenly spaced.
    eta: of "ddim": noise in each step, 0 none to 1 about DDPM's. step_noise(x, i): the noise of step i, where one is added;
        by default drawn from torch's own stream.
    spacing: of diffusers' solvers, one of `registry.SPACINGS`, by default "linspace", which starts at the last timestep.
    init, strength: start from this image (N, C, ...), noised with x_T, and make the last round(strength * num_steps)
        steps, at least one; strength in (0, 1].
    create: `create_diffusion`, or a partial of it with the options that the model was trained with.
    Raises ValueError for an option that the sampler lacks, or an impossible number of steps."""
    from . import samplers

    chosen = check_options(sampler, eta, spacing)
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength} is not in (0, 1]")
    if init is not None:
        samplers.check_shape("init", init, x_T.shape)
    made = max(1, round(strength * num_steps)) if init is not None else num_steps
    if chosen.flow:
        from .flow import flow_steps

        check_number(sampler, num_steps)
        step_noise = (step_noise or samplers.fresh_noise) if chosen.adds_noise else samplers.no_noise
        return flow_steps(chosen.flow, denoiser, x_T, num_steps, progress, step_noise, init, made)
    if chosen.scheduler:
        process = create("")
        if process.predict != "eps":
            raise ValueError(f"{sampler} needs a model that predicts eps; `eps_denoiser` makes one of others")
        scheduler = samplers.solver_scheduler(chosen, process.betas, num_steps, spacing)
        return samplers.solver_steps(scheduler, denoiser, x_T, made, progress, init)
    process = samplers.respaced_process(chosen, num_steps, create)
    step_noise = samplers.no_noise if chosen.is_deterministic(eta) else step_noise or samplers.fresh_noise
    make_step = chosen.step(process, eta)
    return samplers.process_steps(process, make_step, denoiser, x_T, made, progress, step_noise, init)


def check_sampler(name, num_steps, eta=0.0, spacing=None):
    """Raises ValueError for an option that the sampler lacks, or an impossible number of steps of the 1000."""
    from . import samplers

    sampler = check_options(name, eta, spacing)
    if sampler.flow:
        check_number(name, num_steps)
    elif sampler.scheduler:
        samplers.solver_scheduler(sampler, create_diffusion("").betas, num_steps, spacing)
    else:
        samplers.respaced_process(sampler, num_steps, create_diffusion)


def check_number(name, num_steps):
    """Raises ValueError for a number of steps that a sampler of flows does not make."""
    if not 1 <= num_steps <= 1000:
        raise ValueError(f"{name} cannot make {num_steps} steps: ask for 1 to 1000")
