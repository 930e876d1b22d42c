"""The equations of the diffusion process, on tensors.

Symbols: beta_t schedule, alpha_t = 1 - beta_t, alpha_bar_t their product up to t, x_0 data, x_t data after t + 1 steps of
noise (t = 0 is the least noise), eps the noise in x_t. A model maps (x_t, t) to eps, or to x_0 with `predict_xstart`,
and, where the variance is learned, to as many channels again. References: DDPM is Ho et al. 2020, DDIM Song et al. 2021,
IDDPM Nichol and Dhariwal 2021.
"""

import math

import numpy as np
import torch

from . import samplers


def get_named_beta_schedule(schedule_name, num_timesteps):
    """Returns betas, (num_timesteps,) float64. "linear": 1e-4 to 2e-2 for 1000 steps (DDPM, section 4), scaled so that
    any number of steps ends at the same noise. "squaredcos_cap_v2": IDDPM, eq. 17, with beta capped at 0.999."""
    if schedule_name == "linear":
        scale = 1000 / num_timesteps
        return np.linspace(scale * 1e-4, scale * 2e-2, num_timesteps, dtype=np.float64)
    if schedule_name == "squaredcos_cap_v2":
        t = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
        alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    raise ValueError(f"noise schedule {schedule_name!r} is not one of linear, squaredcos_cap_v2")


def mean_flat(x):
    """(N, ...) -> (N,): the mean over all other axes."""
    return x.flatten(1).mean(1)


def normal_kl(mean1, log_variance1, mean2, log_variance2):
    """KL(N(mean1, var1) || N(mean2, var2)) of each element, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1.0
        + torch.exp(log_variance1 - log_variance2)
        + (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    )


def discretized_gaussian_log_likelihood(x, mean, log_variance):
    """Log-probability, in nats, of the 8-bit value that x in [-1, 1] encodes: a Gaussian's mass in the bin of width 2/255
    around x, the first and last bins open (DDPM, eq. 13), with the tanh approximation of the normal CDF."""

    def cdf(z):
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    inv_std = torch.exp(-0.5 * log_variance)
    upper = cdf(inv_std * (x - mean + 1 / 255))
    lower = cdf(inv_std * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


class GaussianDiffusion:
    """A forward process q with its reverse p, its losses and its likelihood bound.

    betas: (num_timesteps,) float64. timestep_map: the timesteps that the model is told, by default 0, 1, 2, ...; a
    process that skips steps passes the originals. variance: "learned" (interpolated by the model), or fixed: "large"
    (beta) or "small" (the posterior's). use_kl: the loss is the bound alone. vb_weight: weight of the bound in the
    hybrid loss, IDDPM, eq. 16.
    """

    def __init__(self, betas, timestep_map=None, variance="learned", predict_xstart=False, use_kl=False, vb_weight=1.0):
        self.betas = betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one row of numbers in (0, 1]")
        self.num_timesteps = len(betas)
        self.variance, self.predict_xstart, self.use_kl, self.vb_weight = variance, predict_xstart, use_kl, vb_weight

        alpha_bar = np.cumprod(1.0 - betas)
        alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
        posterior_variance = betas * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
        # the posterior variance is 0 at t = 0, so its log is -inf; entry 1 stands in for entry 0
        clipped = np.append(posterior_variance[1], posterior_variance[1:]) if len(betas) > 1 else betas
        tables = {
            "alpha_bar": alpha_bar,
            "alpha_bar_prev": alpha_bar_prev,
            "alpha_bar_next": np.append(alpha_bar[1:], 0.0),
            "sqrt_alpha_bar": np.sqrt(alpha_bar),
            "sqrt_one_minus_alpha_bar": np.sqrt(1.0 - alpha_bar),
            "log_one_minus_alpha_bar": np.log(1.0 - alpha_bar),
            "sqrt_recip_alpha_bar": np.sqrt(1.0 / alpha_bar),
            "sqrt_recipm1_alpha_bar": np.sqrt(1.0 / alpha_bar - 1.0),
            "posterior_variance": posterior_variance,
            "posterior_log_variance": np.log(clipped),
            "posterior_x_start_weight": betas * np.sqrt(alpha_bar_prev) / (1.0 - alpha_bar),
            "posterior_x_t_weight": (1.0 - alpha_bar_prev) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar),
            "log_beta": np.log(betas),
            # beta_0 would make the last step far too wide; the posterior's variance at 1 is the original's choice
            "large_variance": np.append(clipped[0], betas[1:]),
            "large_log_variance": np.log(np.append(clipped[0], betas[1:])),
        }
        timestep_map = np.arange(self.num_timesteps) if timestep_map is None else np.asarray(timestep_map)
        self.timestep_map = timestep_map.tolist()  # on the host, for who must not wait for the device
        self._tables = {name: torch.from_numpy(table) for name, table in tables.items()}
        self._tables["timestep_map"] = torch.from_numpy(timestep_map.astype(np.int64))
        self._placed = {}  # (name, device, dtype) -> the table there: moved once, so that no step copies from the host

    def table(self, name, like):
        """A table of the schedule, (num_timesteps,), on the device of the tensor `like`: int64 for "timestep_map", else
        float64 where `like` is, and float32 otherwise."""
        key = name, like.device, like.dtype == torch.float64
        if key not in self._placed:
            table = self._tables[name]
            if table.is_floating_point() and like.dtype != torch.float64:
                table = table.float()
            self._placed[key] = table.to(like.device)
        return self._placed[key]

    def at(self, name, t, x):
        """The table's entries at t: (N,), shaped to broadcast over x: (N, ...)."""
        return self.table(name, x)[t].view(-1, *[1] * (x.ndim - 1))

    # ------------------------------------------------------------------------------------------------------------------
    # The forward process

    def q_sample(self, x_start, t, noise=None):
        """Draw x_t from q(x_t | x_0): DDPM, eq. 4. x_start, noise: (N, ...); t: (N,) int64. Returns (N, ...)."""
        if noise is None:
            noise = torch.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise of shape {tuple(noise.shape)} for x_start of shape {tuple(x_start.shape)}")
        return self.at("sqrt_alpha_bar", t, x_start) * x_start + self.at("sqrt_one_minus_alpha_bar", t, x_start) * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), each (N, ...): DDPM, eqs. 6 and 7."""
        mean = self.at("posterior_x_start_weight", t, x_t) * x_start + self.at("posterior_x_t_weight", t, x_t) * x_t
        variance = self.at("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self.at("posterior_log_variance", t, x_t).expand_as(x_t)

    # ------------------------------------------------------------------------------------------------------------------
    # The reverse process

    def call_model(self, model, x_t, t, model_kwargs=None):
        """The model at step t of this process. Whatever precision it computes in, the equations go on in x_t's."""
        return model(x_t, self.table("timestep_map", x_t)[t], **(model_kwargs or {})).to(x_t.dtype)

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """p(x_{t-1} | x_t), and the model's idea of x_0, from one call of the model.

        x: (N, C, ...) at step t: (N,) int64. denoised_fn, then with clip_denoised a clamp to [-1, 1], are applied to
        the predicted x_0. Returns a dict of `mean`, `variance`, `log_variance`, `pred_xstart`, each like x."""
        output = self.call_model(model, x, t, model_kwargs)
        return self._p_from_output(output, x, t, clip_denoised, denoised_fn)

    def _p_from_output(self, output, x, t, clip_denoised=True, denoised_fn=None):
        if self.variance == "learned":
            if output.shape[1] != 2 * x.shape[1]:
                raise ValueError(f"a model with learned variance gives {2 * x.shape[1]} channels, not {output.shape[1]}")
            output, fraction = output.chunk(2, dim=1)
            fraction = (fraction + 1) / 2  # from [-1, 1]; IDDPM, eq. 15
            high, low = self.at("log_beta", t, x), self.at("posterior_log_variance", t, x)
            log_variance = fraction * high + (1 - fraction) * low
            variance = torch.exp(log_variance)
        elif self.variance == "large":
            variance = self.at("large_variance", t, x).expand_as(x)
            log_variance = self.at("large_log_variance", t, x).expand_as(x)
        else:
            variance = self.at("posterior_variance", t, x).expand_as(x)
            log_variance = self.at("posterior_log_variance", t, x).expand_as(x)
        pred_xstart = output if self.predict_xstart else self.predict_xstart_from_eps(x, t, output)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def predict_xstart_from_eps(self, x_t, t, eps):
        """DDPM, eq. 4, solved for x_0."""
        return self.at("sqrt_recip_alpha_bar", t, x_t) * x_t - self.at("sqrt_recipm1_alpha_bar", t, x_t) * eps

    def predict_eps_from_xstart(self, x_t, t, x_start):
        """DDPM, eq. 4, solved for eps."""
        return (self.at("sqrt_recip_alpha_bar", t, x_t) * x_t - x_start) / self.at("sqrt_recipm1_alpha_bar", t, x_t)

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """One step of the deterministic process towards noise: DDIM, eq. 12 with sigma = 0, from t to t + 1.
        Returns a dict of `sample`, x_{t+1}, and `pred_xstart`."""
        pred_xstart = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)["pred_xstart"]
        eps = self.predict_eps_from_xstart(x, t, pred_xstart)
        alpha_bar = self.at("alpha_bar_next", t, x)
        return {"sample": pred_xstart * alpha_bar.sqrt() + (1 - alpha_bar).sqrt() * eps, "pred_xstart": pred_xstart}

    # ------------------------------------------------------------------------------------------------------------------
    # Sampling loops, by the original release's names; the loops themselves are in samplers.py

    def p_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
    ):
        """Ancestral sampling, DDPM, algorithm 2, through every step of this process.

        shape: (N, C, ...). noise: x_T, by default drawn. device: by default the noise's, or the model's. progress: show a
        bar. The others as in `p_mean_variance`. Each step draws one torch.randn_like(x), the last too. Returns x_0."""
        return samplers.last(
            self.p_sample_loop_progressive(model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress)
        )

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
    ):
        """`p_sample_loop`, yielding after each step a dict of `sample` (x_{t-1}) and `pred_xstart`."""
        x_T = samplers.initial_noise(model, shape, noise, device)
        p_options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "model_kwargs": model_kwargs}
        yield from samplers.ddpm(self, model, x_T, progress, **p_options)

    def ddim_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
    ):
        """DDIM sampling, DDIM eqs. 12 and 16: deterministic for eta = 0, close to `p_sample_loop`, whose arguments and
        random stream it shares, for eta = 1."""
        return samplers.last(
            self.ddim_sample_loop_progressive(
                model, shape, noise, clip_denoised, denoised_fn, model_kwargs, device, progress, eta
            )
        )

    def ddim_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
    ):
        """`ddim_sample_loop`, yielding after each step a dict of `sample` (x_{t-1}) and `pred_xstart`."""
        x_T = samplers.initial_noise(model, shape, noise, device)
        p_options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "model_kwargs": model_kwargs}
        yield from samplers.ddim(self, model, x_T, progress, eta=eta, **p_options)

    # ------------------------------------------------------------------------------------------------------------------
    # Losses and likelihood

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The training objective at steps t: (N,) int64, for clean x_start: (N, C, ...). Returns a dict of (N,) tensors:
        `loss`, and its parts `mse` (L_simple, DDPM, eq. 14) and `vb` (the bound's term in bits per dimension, which
        trains the variance with the mean detached: IDDPM, section 3.1), or `loss` alone with use_kl."""
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)
        output = self.call_model(model, x_t, t, model_kwargs)
        if self.use_kl:
            return {"loss": self.num_timesteps * self._bound_term(output, x_start, x_t, t, clip_denoised=False)["vb"]}
        terms = {}
        mean_output = output
        if self.variance == "learned":
            mean_output, variance_output = output.chunk(2, dim=1)
            detached = torch.cat([mean_output.detach(), variance_output], dim=1)
            terms["vb"] = self._bound_term(detached, x_start, x_t, t, clip_denoised=False)["vb"] * self.vb_weight
        terms["mse"] = mean_flat(((x_start if self.predict_xstart else noise) - mean_output) ** 2)
        terms["loss"] = terms["mse"] + terms.get("vb", 0)
        return terms

    def _bound_term(self, output, x_start, x_t, t, clip_denoised):
        """One term of the variational bound, in bits per dimension, (N,): L_{t-1} of DDPM, eq. 5, and L_0 at t = 0."""
        p = self._p_from_output(output, x_t, t, clip_denoised)
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(mean, log_variance, p["mean"], p["log_variance"]))
        nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, p["mean"], p["log_variance"]))
        return {"vb": torch.where(t == 0, nll, kl) / math.log(2), "pred_xstart": p["pred_xstart"]}

    def prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, I)) in bits per dimension, (N,): L_T of DDPM, eq. 5."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        zero = torch.zeros((), dtype=x_start.dtype, device=x_start.device)
        mean = self.at("sqrt_alpha_bar", t, x_start) * x_start
        log_variance = self.at("log_one_minus_alpha_bar", t, x_start)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    @torch.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None, step_noise=samplers.fresh_noise):
        """The whole variational bound, DDPM, eq. 5, one step after the other from the last to the first.

        x_start: (N, C, ...) in [-1, 1]. step_noise(x_start, i) gives the noise of step i, in the shape of x_start. Returns
        a dict: `total_bpd` and `prior_bpd` (N,); `vb`, `xstart_mse` and `mse` (N, num_timesteps), bits per dimension and
        mean squared errors of x_0 and eps, most noise first."""
        columns = {"vb": [], "xstart_mse": [], "mse": []}
        steps = torch.arange(self.num_timesteps, device=x_start.device)
        for i in reversed(range(self.num_timesteps)):
            t = steps[i].expand(len(x_start))
            noise = step_noise(x_start, i)
            x_t = self.q_sample(x_start, t, noise)
            term = self._bound_term(self.call_model(model, x_t, t, model_kwargs), x_start, x_t, t, clip_denoised)
            eps = self.predict_eps_from_xstart(x_t, t, term["pred_xstart"])
            columns["vb"].append(term["vb"])
            columns["xstart_mse"].append(mean_flat((term["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        prior_bpd = self.prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(1) + prior_bpd, "prior_bpd": prior_bpd, **terms}
