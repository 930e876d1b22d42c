"""The diffusion process: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Nichol and Dhariwal 2021 (learned variances).
Equations on tensors: it knows nothing of models, files, labels or guidance.

    diffusion = create_diffusion("250")
    x_0 = diffusion.p_sample_loop(model, x_T.shape, x_T, clip_denoised=False, model_kwargs=dict(y=y))
"""

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
