"""The original release's interface to the process, for scripts that are written for it: loops, single steps, classifier
guidance and the bound, by its names and with its arguments in its order. New code calls `diffusion.sample`.

Everywhere below, x is (N, C, ...) at step t: (N,) int64; clip_denoised, denoised_fn and model_kwargs are those of
`p_mean_variance`; cond_fn(x, t, **model_kwargs), t of the full process, is the scaled gradient of log p(y | x_t) by x."""

import math

import torch

from .gaussian_diffusion import GaussianDiffusion, check_shape, mean_flat, normal_kl, per_sample
from .samplers import ddim_step, fresh_noise, last, progress_bar


def initial_noise(model, shape, noise, device):
    """x_T of `shape`: `noise` where given, else drawn, on `device` or by default on the model's."""
    if noise is not None:
        check_shape("noise", noise, shape)
        return noise if device is None else noise.to(device)
    if device is None:
        device = next(getattr(model, "__self__", model).parameters()).device  # a bound method has its model's
    return torch.randn(*shape, device=device)


class OriginalDiffusion(GaussianDiffusion):
    """A `GaussianDiffusion` with the methods that `create_diffusion`'s result has in the original release."""

    # Classifier guidance

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """The mean of a `p_mean_variance`, shifted by variance times gradient: Dhariwal and Nichol 2021, algorithm 1."""
        return p_mean_var["mean"] + p_mean_var["variance"] * self._gradient(cond_fn, x, t, model_kwargs)

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """p_mean_var, a result of `p_mean_variance`, with the `pred_xstart` and `mean` of an eps from which
        sqrt(1 - alpha_bar) times the gradient is subtracted: Dhariwal and Nichol 2021, algorithm 2."""
        shift = self.at("sqrt_one_minus_alphas_cumprod", t, x) * self._gradient(cond_fn, x, t, model_kwargs)
        eps = self.predict_eps_from_xstart(x, t, p_mean_var["pred_xstart"]) - shift
        pred_xstart = self.predict_xstart_from_eps(x, t, eps)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {**p_mean_var, "mean": mean, "pred_xstart": pred_xstart}

    def _gradient(self, cond_fn, x, t, model_kwargs):
        return check_shape("cond_fn's gradient", cond_fn(x, self.model_timesteps(t, x), **(model_kwargs or {})), x.shape)

    # Single steps. Each returns a dict of `sample`, which is x at the next step, and `pred_xstart`

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                 draw_noise=torch.randn_like):  # fmt: skip
        """One step of ancestral sampling, from t to t - 1: DDPM, algorithm 2. draw_noise(x) gives the step's noise, like
        x; it is asked at t = 0 too, where nothing is added."""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        mean = p["mean"] if cond_fn is None else self.condition_mean(cond_fn, p, x, t, model_kwargs)
        std = torch.exp(0.5 * p["log_variance"]) * per_sample(t != 0, x)
        return {"sample": mean + std * check_shape("noise", draw_noise(x), x.shape), "pred_xstart": p["pred_xstart"]}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0,
                    draw_noise=torch.randn_like):  # fmt: skip
        """One step of DDIM, from t to t - 1: eq. 12, with the sigma of eq. 16 times eta; 0 is deterministic, 1 is close to
        DDPM. draw_noise as in `p_sample`, asked for every eta."""
        pred_xstart = self._ddim_prediction(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        noise = check_shape("noise", draw_noise(x), x.shape)
        return {"sample": ddim_step(self, x, t, pred_xstart, eta, noise), "pred_xstart": pred_xstart}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                            eta=0.0):  # fmt: skip
        """One step of DDIM towards noise, from t to t + 1: eq. 12 with sigma = 0. Raises ValueError for another eta."""
        if eta != 0:
            raise ValueError(f"eta {eta}: only the deterministic DDIM, with eta 0, can be reversed")
        pred_xstart = self._ddim_prediction(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        eps, alpha_bar = self.predict_eps_from_xstart(x, t, pred_xstart), self.at("alphas_cumprod_next", t, x)
        return {"sample": pred_xstart * alpha_bar.sqrt() + (1 - alpha_bar).sqrt() * eps, "pred_xstart": pred_xstart}

    def _ddim_prediction(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs):
        """x_0 as DDIM predicts it: with the clamp and the classifier's gradient."""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        return (p if cond_fn is None else self.condition_score(cond_fn, p, x, t, model_kwargs))["pred_xstart"]

    # Sampling loops through every step of this process

    def p_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                      model_kwargs=None, device=None, progress=False):  # fmt: skip
        """Ancestral sampling: DDPM, algorithm 2.

        shape: (N, C, ...). noise: x_T, by default drawn. device: by default the noise's, or the model's. progress: show a
        progress bar. The others as in `p_sample`. Each step draws one torch.randn_like(x), the last too. Returns x_0."""
        return last(self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress
        ))  # fmt: skip

    def p_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                  model_kwargs=None, device=None, progress=False):  # fmt: skip
        """`p_sample_loop`, yielding after each step the dict of `p_sample`. The next step starts from the dict's `sample`,
        which the caller may replace, as for inpainting."""
        options, x_T = (clip_denoised, denoised_fn, cond_fn, model_kwargs), initial_noise(model, shape, noise, device)
        return self._steps(lambda x, t: self.p_sample(model, x, t, *options), x_T, progress)

    def ddim_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                         model_kwargs=None, device=None, progress=False, eta=0.0):  # fmt: skip
        """DDIM sampling, DDIM eqs. 12 and 16: deterministic for eta = 0, close to `p_sample_loop`, whose arguments and
        random stream it shares, for eta = 1."""
        return last(self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta
        ))  # fmt: skip

    def ddim_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                     model_kwargs=None, device=None, progress=False, eta=0.0):  # fmt: skip
        """`ddim_sample_loop`, yielding as `p_sample_loop_progressive`."""
        options, x_T = (clip_denoised, denoised_fn, cond_fn, model_kwargs, eta), initial_noise(model, shape, noise, device)
        return self._steps(lambda x, t: self.ddim_sample(model, x, t, *options), x_T, progress)

    @torch.no_grad()
    def _steps(self, step, x, progress):
        for i in progress_bar(range(self.num_timesteps - 1, -1, -1), progress):
            out = {**step(x, torch.full((len(x),), i, device=x.device)), "step": i}
            yield out
            x = out["sample"]

    # The likelihood's bound

    def prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (N,): L_T of DDPM, eq. 5."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        zero = torch.zeros((), dtype=x_start.dtype, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    @torch.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None, step_noise=fresh_noise):
        """The whole variational bound, DDPM, eq. 5, one step after the other from the last to the first.

        x_start: (N, C, ...) in [-1, 1]. step_noise(x_start, i) gives the noise of step i, in the shape of x_start. Returns
        a dict: `total_bpd` and `prior_bpd` (N,); `vb`, `xstart_mse` and `mse` (N, num_timesteps), bits per dimension and
        mean squared errors of x_0 and eps, most noise first."""
        rows = []  # of each step, as named below
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), i, device=x_start.device)
            noise = step_noise(x_start, i)
            x_t = self.q_sample(x_start, t, noise)
            output, _ = self.call_model(model, x_t, t, model_kwargs)
            term = self.bound_term(output, x_start, x_t, t, clip_denoised)
            eps = self.predict_eps_from_xstart(x_t, t, term["pred_xstart"])
            rows.append((term["vb"], mean_flat((term["pred_xstart"] - x_start) ** 2), mean_flat((eps - noise) ** 2)))
        vb, xstart_mse, mse = (torch.stack(column, dim=1) for column in zip(*rows, strict=True))
        prior = self.prior_bpd(x_start)
        return {"total_bpd": vb.sum(1) + prior, "prior_bpd": prior, "vb": vb, "xstart_mse": xstart_mse, "mse": mse}
