"""The diffusion process: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol and Dhariwal 2021 (learned variances).
Equations on tensors: this package knows nothing of files, labels' names or autoencoders.

    for out in sample("dpm-solver++", denoiser, x_T, num_steps=20):
        x_t, x_0 = out["sample"], out["pred_xstart"]

or, by the original release's names,

    x_0 = create_diffusion("250").p_sample_loop(model, x_T.shape, x_T, clip_denoised=False, model_kwargs=dict(y=y))
"""

# torch and numpy take seconds to import: the functions below import them, so that commands can check their options first
import contextlib

from .registry import OBJECTIVES, SAMPLERS, Objective, Sampler, check_options, load, make_objective  # noqa: F401 -- public


def create_diffusion(timestep_respacing, noise_schedule="linear", use_kl=False, sigma_small=False, predict_xstart=False,
                     learn_sigma=True, rescale_learned_sigmas=False, diffusion_steps=1000, predict="eps"):  # fmt: skip
    """Make the process of the paper: 1000 steps, linear betas, eps prediction, learned variances.

    timestep_respacing: "" or None for all steps, else as in `space_timesteps` ("250", "10,15,20", "ddim50").
    noise_schedule: "linear" or "squaredcos_cap_v2". use_kl: train on the variational bound alone. sigma_small: with
    learn_sigma=False, the posterior's variance instead of beta. predict_xstart: the model's output is x_0, not eps.
    rescale_learned_sigmas: weigh the bound in the hybrid loss by the number of kept steps / 1000. predict: "eps", "x0" or
    "v". Raises ValueError for an unknown schedule or an impossible spacing."""
    from .gaussian_diffusion import get_named_beta_schedule
    from .original import OriginalDiffusion
    from .respace import respaced_betas, space_timesteps

    timesteps = space_timesteps(diffusion_steps, "" if timestep_respacing is None else timestep_respacing)
    variance = "learned" if learn_sigma else "small" if sigma_small else "large"
    predict = "x0" if predict_xstart else predict
    vb_weight = len(timesteps) / 1000 if rescale_learned_sigmas else 1.0
    betas = respaced_betas(get_named_beta_schedule(noise_schedule, diffusion_steps), timesteps)
    return OriginalDiffusion(betas, timesteps, variance, predict, use_kl, vb_weight)


def sample(sampler, denoiser, x_T, num_steps, *, eta=0.0, spacing=None, step_noise=None, init=None, strength=1.0,
           progress=False, create=create_diffusion, time_shift=1.0):  # fmt: skip
    """Turn noise into x_0, step by step: returns an iterator that yields dicts of `sample` (x_t, at the end x_0),
    `pred_xstart` and `step`, which counts down to 0; `samplers.last` of it is x_0. Nothing is clipped. The next step of
    "ddpm" and "ddim" starts from the dict's `sample`, which the caller may replace.

    sampler: one of `registry.SAMPLERS`, by name. denoiser: maps (x_t, t) to (N, C or 2C, ...): eps, then the variance's
    interpolation where it is learned (`flow.eps_denoiser` makes one of models that predict something else); for a sampler
    of flows the velocity. t, the same for the batch, is a Python number in [0, 1000], so that the denoiser can decide by it
    without a GPU synchronisation, and may be fractional. `guidance.guided_denoiser` makes one of a model. x_T: (N, C, ...),
    standard normal.
    num_steps: steps in time; the sampler's `evaluations` says how often the denoiser is called.
        "ddpm": as create_diffusion(str(num_steps)). "ddim": "ddimN" where that exists, else evenly spaced.
    eta: of "ddim": noise in each step, 0 none to 1 about DDPM's. step_noise(x, i): the noise of step i, where one is added;
        by default drawn from torch's own stream.
    spacing: of diffusers' solvers, one of `registry.SPACINGS`, by default "linspace", which starts at the last timestep.
    init, strength: start from this image (N, C, ...), noised with x_T, and make the last round(strength * num_steps)
        steps, at least one; strength in (0, 1].
    create: `create_diffusion`, or a partial of it with the options that the model was trained with.
    time_shift: of the steps of a sampler of flows, see `flow.shift_time`.
    Raises ValueError for an option that the sampler lacks, or an impossible number of steps."""
    from . import samplers
    from .gaussian_diffusion import check_shape

    chosen = check_options(sampler, eta, spacing)
    if not 0 < strength <= 1:
        raise ValueError(f"strength {strength} is not in (0, 1]")
    process, x = sampling_process(chosen, num_steps, spacing, create, time_shift), x_T
    if init is not None:
        check_shape("init", init, x_T.shape)
        num_steps = max(1, round(strength * num_steps))
        x = process.q_sample(init, num_steps - 1, x_T)
    steps = samplers.progress_bar(range(num_steps - 1, -1, -1), progress)
    options = {"eta": eta} if "eta" in chosen.options else {}
    return load(chosen.function)(process, denoiser, x, steps, step_noise or samplers.fresh_noise, **options)


def check_sampler(name, num_steps, eta=0.0, spacing=None):
    """Raises ValueError for an option that the sampler lacks, or an impossible number of steps of the 1000."""
    sampling_process(check_options(name, eta, spacing), num_steps, spacing)


def sampling_process(sampler, num_steps, spacing=None, create=create_diffusion, time_shift=1.0):
    """What a Sampler gets as its process: num_steps steps of `create`'s process, or of a flow. Raises ValueError."""
    if sampler.flow:
        from .flow import Flow

        if not 1 <= num_steps <= 1000:
            raise ValueError(f"{sampler.name} cannot make {num_steps} steps: ask for 1 to 1000")
        return Flow(num_timesteps=num_steps, time_shift=time_shift)
    if sampler.scheduler:
        from .samplers import SolverSteps

        whole = create("")
        if whole.predict != "eps":
            raise ValueError(f"{sampler.name} needs a model that predicts eps; `eps_denoiser` makes one of others")
        return SolverSteps(sampler, whole.betas, num_steps, spacing)
    *preferred, always = (pattern.format(num_steps) for pattern in sampler.respacings)
    for respacing in preferred:
        with contextlib.suppress(ValueError):  # no integer stride leaves exactly num_steps
            return create(respacing)
    return create(always)
