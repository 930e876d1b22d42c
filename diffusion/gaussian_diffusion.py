"""The equations of the diffusion process, on tensors.

Symbols: beta_t schedule, alpha_t = 1 - beta_t, alpha_bar_t their product up to t, x_0 data, x_t data after t + 1 steps of
noise (t = 0 is the least noise), eps the noise in x_t. A model maps (x_t, t) to eps, or to x_0 or to
v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho 2022, appendix D), as `predict` says, and, where the
variance is learned, to as many channels again. References: DDPM is Ho et al. 2020, DDIM Song et al. 2021,
IDDPM Nichol and Dhariwal 2021.
"""

import math

import numpy as np
import torch

from .samplers import check_shape, fresh_noise, last, run_steps


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


def per_sample(values, x):
    """(N,) -> (N, 1, ...), to broadcast over x: (N, ...)."""
    return values.view(-1, *[1] * (x.ndim - 1))


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


def initial_noise(model, shape, noise, device):
    """x_T of `shape`: `noise` where given, else drawn, on `device` or by default on the model's."""
    if noise is not None:
        check_shape("noise", noise, shape)
        return noise if device is None else noise.to(device)
    if device is None:
        device = next(getattr(model, "__self__", model).parameters()).device  # a bound method has its model's
    return torch.randn(*shape, device=device)


# the tables of a fixed variance and its log
FIXED_VARIANCES = {
    "large": ("large_variance", "large_log_variance"),
    "small": ("posterior_variance", "posterior_log_variance_clipped"),
}


class GaussianDiffusion:
    """A forward process q with its reverse p, its losses and its likelihood bound.

    betas: (num_timesteps,) float64. timestep_map: the timesteps that the model is told, by default 0, 1, 2, ...; a
    process that skips steps passes the originals. variance: "learned" (interpolated by the model), or fixed: "large"
    (beta) or "small" (the posterior's). use_kl: the loss is the bound alone. vb_weight: weight of the bound in the
    hybrid loss, IDDPM, eq. 16. predict: "eps", "x0" or "v", what the model maps to. snr_gamma: with a number, the mean
    squared error is weighted as one of x_0 by min(SNR_t, snr_gamma), SNR_t = alpha_bar_t / (1 - alpha_bar_t): Hang et al.
    2023, eq. 9.
    """

    def __init__(self, betas, timestep_map=None, variance="learned", predict="eps", use_kl=False, vb_weight=1.0,
                 snr_gamma=None):  # fmt: skip
        self.betas = betas = np.asarray(betas, dtype=np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("betas must be one row of numbers in (0, 1]")
        self.num_timesteps = len(betas)
        if predict not in ("eps", "x0", "v"):
            raise ValueError(f"prediction {predict!r} is not one of eps, x0, v")
        self.variance, self.predict, self.use_kl, self.vb_weight = variance, predict, use_kl, vb_weight
        self.timestep_map = list(range(len(betas)) if timestep_map is None else timestep_map)  # ints, read without the GPU

        # the tables of the schedule by the original release's names, each (num_timesteps,) float64; `at` reads them
        self.alphas_cumprod = alpha_bar = np.cumprod(1.0 - betas)
        self.alphas_cumprod_prev = alpha_bar_prev = np.append(1.0, alpha_bar[:-1])
        self.alphas_cumprod_next = np.append(alpha_bar[1:], 0.0)
        self.sqrt_alphas_cumprod = np.sqrt(alpha_bar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - alpha_bar)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - alpha_bar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / alpha_bar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / alpha_bar - 1.0)
        self.posterior_variance = betas * (1.0 - alpha_bar_prev) / (1.0 - alpha_bar)
        # the posterior variance is 0 at t = 0, so its log is -inf; entry 1 stands in for entry 0
        clipped = np.append(self.posterior_variance[1], self.posterior_variance[1:]) if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = np.log(clipped)
        self.posterior_mean_coef1 = betas * np.sqrt(alpha_bar_prev) / (1.0 - alpha_bar)  # of x_0
        self.posterior_mean_coef2 = (1.0 - alpha_bar_prev) * np.sqrt(1.0 - betas) / (1.0 - alpha_bar)  # of x_t
        self.log_betas = np.log(betas)
        # beta_0 would make the last step far too wide; the posterior's variance at 1 is the original's choice
        self.large_variance = np.append(clipped[0], betas[1:])
        self.large_log_variance = np.log(self.large_variance)
        snr = alpha_bar / (1 - alpha_bar)
        # the squared error of x_0 times SNR is that of eps, and times SNR + 1 that of v
        of_x0 = {"x0": 1, "eps": snr, "v": snr + 1}[predict]
        self.mse_weights = None if snr_gamma is None else np.minimum(snr, snr_gamma) / of_x0
        self._placed = {}  # (name, device, is float64) -> the table there: moved once, so that no step copies from the host

    def table(self, name, like):
        """A table of the schedule, (num_timesteps,), on the device of the tensor `like`: int64 for "timestep_map", else
        float64 where `like` is, and float32 otherwise."""
        key = name, like.device, like.dtype == torch.float64
        if key not in self._placed:
            table = torch.as_tensor(getattr(self, name))
            if table.is_floating_point() and like.dtype != torch.float64:
                table = table.float()
            self._placed[key] = table.to(like.device)
        return self._placed[key]

    def at(self, name, t, x):
        """The table's entries at t: (N,) int64, shaped to broadcast over x: (N, ...)."""
        check_shape("t", t, (len(x),))
        return per_sample(self.table(name, x)[t], x)

    # ------------------------------------------------------------------------------------------------------------------
    # The forward process

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log-variance of q(x_t | x_0), each (N, ...): DDPM, eq. 4."""
        mean = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        variance = self.at("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2
        log_variance = self.at("log_one_minus_alphas_cumprod", t, x_start)
        return mean, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start, t, noise=None):
        """Draw x_t from q(x_t | x_0): DDPM, eq. 4. x_start, noise: (N, ...); t: (N,) int64. Returns (N, ...)."""
        if noise is None:
            noise = torch.randn_like(x_start)
        check_shape("noise", noise, x_start.shape)
        return (
            self.at("sqrt_alphas_cumprod", t, x_start) * x_start
            + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), each (N, ...): DDPM, eqs. 6 and 7."""
        check_shape("x_start", x_start, x_t.shape)
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        variance = self.at("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self.at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)

    # ------------------------------------------------------------------------------------------------------------------
    # The reverse process

    def call_model(self, model, x_t, t, model_kwargs=None):
        """The model at step t of this process. Whatever precision it computes in, the equations go on in x_t's."""
        output = model(x_t, self.model_timesteps(t, x_t), **(model_kwargs or {})).to(x_t.dtype)
        channels = 2 * x_t.shape[1] if self.variance == "learned" else x_t.shape[1]
        check_shape(f"the model's output, with {self.variance} variance,", output, (len(x_t), channels, *x_t.shape[2:]))
        return output

    def model_timesteps(self, t, x):
        """The timesteps of the full process, which models and classifiers are told: (N,) int64."""
        return self.at("timestep_map", t, x).flatten()

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """p(x_{t-1} | x_t), and the model's idea of x_0, from one call of the model.

        x: (N, C, ...) at step t: (N,) int64. denoised_fn, then with clip_denoised a clamp to [-1, 1], are applied to
        the predicted x_0. Returns a dict of `mean`, `variance`, `log_variance`, `pred_xstart`, each like x."""
        output = self.call_model(model, x, t, model_kwargs)
        return self._p_from_output(output, x, t, clip_denoised, denoised_fn)

    def _p_from_output(self, output, x, t, clip_denoised=True, denoised_fn=None):
        if self.variance == "learned":
            output, fraction = output.chunk(2, dim=1)
            fraction = (fraction + 1) / 2  # from [-1, 1]; IDDPM, eq. 15
            high, low = self.at("log_betas", t, x), self.at("posterior_log_variance_clipped", t, x)
            log_variance = fraction * high + (1 - fraction) * low
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = (self.at(name, t, x).expand_as(x) for name in FIXED_VARIANCES[self.variance])
        pred_xstart = self.predict_xstart_from_output(x, t, output)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def predict_xstart_from_output(self, x_t, t, output):
        """x_0 as a model predicts it whose output, without the variance, is what `predict` says."""
        if self.predict == "eps":
            return self.predict_xstart_from_eps(x_t, t, output)
        if self.predict == "x0":
            return output
        alpha, sigma = self.at("sqrt_alphas_cumprod", t, x_t), self.at("sqrt_one_minus_alphas_cumprod", t, x_t)
        return alpha * x_t - sigma * output

    def predict_xstart_from_eps(self, x_t, t, eps):
        """DDPM, eq. 4, solved for x_0."""
        check_shape("eps", eps, x_t.shape)
        return self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - self.at("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def predict_eps_from_xstart(self, x_t, t, x_start):
        """DDPM, eq. 4, solved for eps."""
        check_shape("x_start", x_start, x_t.shape)
        scaled_noise = self.at("sqrt_recip_alphas_cumprod", t, x_t) * x_t - x_start
        return scaled_noise / self.at("sqrt_recipm1_alphas_cumprod", t, x_t)

    # ------------------------------------------------------------------------------------------------------------------
    # Classifier guidance: cond_fn(x, t, **model_kwargs) is the gradient of log p(y | x_t) with respect to x, times its
    # scale; t is the timestep of the full process

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """The mean of p_mean_var, a result of `p_mean_variance`, shifted by the variance times the gradient: Dhariwal and
        Nichol 2021, algorithm 1."""
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
        gradient = cond_fn(x, self.model_timesteps(t, x), **(model_kwargs or {}))
        check_shape("cond_fn's gradient", gradient, x.shape)
        return gradient

    # ------------------------------------------------------------------------------------------------------------------
    # Single steps. x: (N, C, ...) at step t: (N,) int64. clip_denoised, denoised_fn and model_kwargs are those of
    # `p_mean_variance`. Each step returns a dict of `sample`, which is x at the next step, and `pred_xstart`.

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                 draw_noise=torch.randn_like):  # fmt: skip
        """One step of ancestral sampling, from t to t - 1: DDPM, algorithm 2. draw_noise(x) gives the step's noise, in the
        shape of x; it is asked at t = 0 too, where nothing is added."""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        mean = p["mean"] if cond_fn is None else self.condition_mean(cond_fn, p, x, t, model_kwargs)
        noise = draw_noise(x)
        check_shape("noise", noise, x.shape)
        std = torch.exp(0.5 * p["log_variance"]) * per_sample(t != 0, x)
        return {"sample": mean + std * noise, "pred_xstart": p["pred_xstart"]}

    def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0,
                    draw_noise=torch.randn_like):  # fmt: skip
        """One step of DDIM, from t to t - 1: eq. 12, with the sigma of eq. 16 times eta; 0 is deterministic, 1 is close to
        DDPM. draw_noise as in `p_sample`."""
        pred_xstart, eps = self._ddim_prediction(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        alpha_bar, alpha_bar_prev = self.at("alphas_cumprod", t, x), self.at("alphas_cumprod_prev", t, x)
        # 0 at t = 0, where alpha_bar_prev is 1
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
        noise = draw_noise(x)
        check_shape("noise", noise, x.shape)
        mean = pred_xstart * alpha_bar_prev.sqrt() + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        return {"sample": mean + sigma * noise, "pred_xstart": pred_xstart}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
                            eta=0.0):  # fmt: skip
        """One step of DDIM towards noise, from t to t + 1: eq. 12 with sigma = 0. Raises ValueError for another eta than 0,
        with which there is no way back."""
        if eta != 0:
            raise ValueError(f"eta {eta}: only the deterministic DDIM, with eta 0, can be reversed")
        pred_xstart, eps = self._ddim_prediction(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        alpha_bar = self.at("alphas_cumprod_next", t, x)
        return {"sample": pred_xstart * alpha_bar.sqrt() + (1 - alpha_bar).sqrt() * eps, "pred_xstart": pred_xstart}

    def _ddim_prediction(self, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs):
        """x_0 and eps as DDIM predicts them: with the clamp and the classifier's gradient."""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            p = self.condition_score(cond_fn, p, x, t, model_kwargs)
        return p["pred_xstart"], self.predict_eps_from_xstart(x, t, p["pred_xstart"])

    # ------------------------------------------------------------------------------------------------------------------
    # Sampling loops through every step of this process, by the original release's names

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

        def step(x, t, i):
            return self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)

        return run_steps(step, initial_noise(model, shape, noise, device), self.num_timesteps, progress)

    def ddim_sample_loop(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                         model_kwargs=None, device=None, progress=False, eta=0.0):  # fmt: skip
        """DDIM sampling, DDIM eqs. 12 and 16: deterministic for eta = 0, close to `p_sample_loop`, whose arguments and
        random stream it shares, for eta = 1."""
        return last(self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta
        ))  # fmt: skip

    def ddim_sample_loop_progressive(self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
                                     model_kwargs=None, device=None, progress=False, eta=0.0):  # fmt: skip
        """`ddim_sample_loop`, yielding after each step the dict of `ddim_sample`, as `p_sample_loop_progressive`."""

        def step(x, t, i):
            return self.ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta)

        return run_steps(step, initial_noise(model, shape, noise, device), self.num_timesteps, progress)

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
        terms["mse"] = mean_flat((self.target(x_start, t, noise) - mean_output) ** 2)
        weighted = terms["mse"] if self.mse_weights is None else self.at("mse_weights", t, x_start).flatten() * terms["mse"]
        terms["loss"] = weighted + terms.get("vb", 0)
        return terms

    def target(self, x_start, t, noise):
        """What the model's output should be for x_t made of x_0 and noise."""
        if self.predict == "eps":
            return noise
        if self.predict == "x0":
            return x_start
        alpha, sigma = self.at("sqrt_alphas_cumprod", t, x_start), self.at("sqrt_one_minus_alphas_cumprod", t, x_start)
        return alpha * noise - sigma * x_start

    def draw_timesteps(self, number, device, sampling="uniform"):
        """Timesteps for training, (number,) int64. "logit-normal": t / num_timesteps is the sigmoid of a standard normal
        number, which prefers the middle (Esser et al. 2024, section 3.1)."""
        if sampling == "uniform":
            return torch.randint(self.num_timesteps, (number,), device=device)
        share = torch.randn(number, device=device).sigmoid()
        return (share * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

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
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)

    @torch.no_grad()
    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None, step_noise=fresh_noise):
        """The whole variational bound, DDPM, eq. 5, one step after the other from the last to the first.

        x_start: (N, C, ...) in [-1, 1]. step_noise(x_start, i) gives the noise of step i, in the shape of x_start. Returns
        a dict: `total_bpd` and `prior_bpd` (N,); `vb`, `xstart_mse` and `mse` (N, num_timesteps), bits per dimension and
        mean squared errors of x_0 and eps, most noise first."""
        columns = {"vb": [], "xstart_mse": [], "mse": []}
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((len(x_start),), i, device=x_start.device)
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
