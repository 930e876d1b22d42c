"""Loops that turn noise into x_0. Each is a generator that yields, after every step, a dict of `sample` (x_{t-1}) and
`pred_xstart` (the predicted x_0), so that progress, previews and early stopping are the caller's."""

import torch
from tqdm.auto import tqdm


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


def _countdown(diffusion, x_T, progress):
    """(i, t) from the last step to the first: i the number, t its (N,) tensor on the device, made without a copy."""
    steps = torch.arange(diffusion.num_timesteps, device=x_T.device)
    order = range(diffusion.num_timesteps - 1, -1, -1)
    for i in tqdm(order, desc="Sampling", unit="step", leave=False) if progress else order:
        yield i, steps[i].expand(len(x_T))


@torch.no_grad()
def ddpm(diffusion, model, x_T, progress=False, step_noise=fresh_noise, **p_options):
    """Ancestral sampling: DDPM, algorithm 2. step_noise(x, i) gives step i's noise, in the shape of x; it is asked at
    i = 0 too, where nothing is added. p_options: of `p_mean_variance`."""
    x = x_T
    for i, t in _countdown(diffusion, x_T, progress):
        out = diffusion.p_mean_variance(model, x, t, **p_options)
        noise = step_noise(x, i)
        x = out["mean"] + torch.exp(0.5 * out["log_variance"]) * noise if i else out["mean"]
        yield {"sample": x, "pred_xstart": out["pred_xstart"]}


@torch.no_grad()
def ddim(diffusion, model, x_T, progress=False, step_noise=fresh_noise, eta=0.0, **p_options):
    """DDIM, eq. 12, with the sigma of eq. 16 times eta: 0 is deterministic, 1 is close to DDPM. Otherwise as `ddpm`."""
    x = x_T
    for i, t in _countdown(diffusion, x_T, progress):
        x_0 = diffusion.p_mean_variance(model, x, t, **p_options)["pred_xstart"]
        eps = diffusion.predict_eps_from_xstart(x, t, x_0)
        alpha_bar, alpha_bar_prev = diffusion.at("alpha_bar", t, x), diffusion.at("alpha_bar_prev", t, x)
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
        noise = step_noise(x, i)
        x = x_0 * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        if i:
            x = x + sigma * noise
        yield {"sample": x, "pred_xstart": x_0}
