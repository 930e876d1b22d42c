"""The equations of the diffusion process, on tensors.

Symbols: beta_t schedule, alpha_t = 1 - beta_t, alpha_bar_t their product up to t, x_0 data, x_t data after t + 1 steps of
noise (t = 0 is the least noise), eps the noise in x_t. A model maps (x_t, t) to eps, or to x_0 or to
v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho 2022, appendix D), as `predict` says, and, where the
variance is learned, to as many channels again. References: DDPM is Ho et al. 2020, DDIM Song et al. 2021,
IDDPM Nichol and Dhariwal 2021."""

import math

import numpy as np
import torch


def check_shape(what, tensor, shape):
    """The tensor. Raises ValueError where it has another shape, which the equations would broadcast without a word."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    return tensor


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
    ratio, distance = torch.exp(log_variance1 - log_variance2), (mean1 - mean2) ** 2 * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 - 1.0 + ratio + distance)


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
    hybrid loss, IDDPM, eq. 16. predict: "eps", "x0" or "v", what the model maps to."""

    def __init__(self, betas, timestep_map=None, variance="learned", predict="eps", use_kl=False, vb_weight=1.0):
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
        large = np.append(clipped[0], betas[1:])
        self.fixed_variance = self.posterior_variance if variance == "small" else large
        self.fixed_log_variance = np.log(clipped if variance == "small" else large)
        self._tables = {}  # (name, device, is float64) -> the table there: moved once, so that no step copies from the host

    def at(self, name, t, x):
        """A table's entries at t, (N,) int64 or one int for all, shaped to broadcast over x: (N, ...), on its device:
        float32, or float64 where x is; int64 of "timestep_map"."""
        if not isinstance(t, int):
            check_shape("t", t, (len(x),))
        key = name, x.device, x.dtype == torch.float64
        if key not in self._tables:
            table = torch.as_tensor(getattr(self, name))
            as_float32 = table.is_floating_point() and x.dtype != torch.float64
            self._tables[key] = (table.float() if as_float32 else table).to(x.device)
        return per_sample(self._tables[key][t], x)

    def alpha_sigma_at(self, t, x):
        """(alpha, sigma) at t, as `at`: x_t = alpha x_0 + sigma eps."""
        return self.at("sqrt_alphas_cumprod", t, x), self.at("sqrt_one_minus_alphas_cumprod", t, x)

    def alpha_sigma(self, i):
        """The same of step i as two numbers. Step -1 is the image: (1, 0)."""
        alpha_bar = self.alphas_cumprod[i].item() if i >= 0 else 1.0
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    # The forward process

    def q_mean_variance(self, x_start, t):
        """Mean, variance and log-variance of q(x_t | x_0), each (N, ...): DDPM, eq. 4."""
        alpha, sigma = self.alpha_sigma_at(t, x_start)
        log_variance = self.at("log_one_minus_alphas_cumprod", t, x_start)
        return alpha * x_start, (sigma**2).expand_as(x_start), log_variance.expand_as(x_start)

    def q_sample(self, x_start, t, noise=None):
        """Draw x_t from q(x_t | x_0): DDPM, eq. 4. x_start, noise: (N, ...); t: (N,) int64 or an int. Returns (N, ...)."""
        noise = torch.randn_like(x_start) if noise is None else check_shape("noise", noise, x_start.shape)
        alpha, sigma = self.alpha_sigma_at(t, x_start)
        return alpha * x_start + sigma * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), each (N, ...): DDPM, eqs. 6 and 7."""
        check_shape("x_start", x_start, x_t.shape)
        mean = self.at("posterior_mean_coef1", t, x_t) * x_start + self.at("posterior_mean_coef2", t, x_t) * x_t
        variance = self.at("posterior_variance", t, x_t).expand_as(x_t)
        return mean, variance, self.at("posterior_log_variance_clipped", t, x_t).expand_as(x_t)

    # The reverse process

    def call_model(self, model, x_t, t, model_kwargs=None):
        """The output of the model at step t, and what else it returns: the second of a pair, a list of more, or None."""
        output = model(x_t, self.model_timesteps(t, x_t), **(model_kwargs or {}))
        output, *extra = output if isinstance(output, tuple | list) else (output, None)
        return output, extra[0] if len(extra) == 1 else extra

    def model_timesteps(self, t, x):
        """The timesteps of the full process, which models and classifiers are told: (N,) int64."""
        return self.at("timestep_map", t, x).flatten()

    def split_output(self, output, x_t):
        """A model's output as (prediction, variance's interpolation or None), each like x_t, in its precision."""
        parts = 2 if self.variance == "learned" else 1
        shape = (len(x_t), parts * x_t.shape[1], *x_t.shape[2:])
        output = check_shape(f"the model's output, with {self.variance} variance,", output, shape).to(x_t.dtype)
        return output.chunk(2, dim=1) if parts == 2 else (output, None)

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """p(x_{t-1} | x_t), and the model's idea of x_0, from one call of the model.

        x: (N, C, ...) at step t: (N,) int64. denoised_fn, then with clip_denoised a clamp to [-1, 1], are applied to
        the predicted x_0. Returns a dict of `mean`, `variance`, `log_variance`, `pred_xstart`, each like x, and of `extra`
        where the model returns (output, extra)."""
        output, extra = self.call_model(model, x, t, model_kwargs)
        p = self.p_from_output(output, x, t, clip_denoised, denoised_fn)
        return p if extra is None else {**p, "extra": extra}

    def p_from_output(self, output, x, t, clip_denoised=False, denoised_fn=None):
        """`p_mean_variance` of a model's output at step t: (N,) int64 or an int."""
        output, fraction = self.split_output(output, x)
        if fraction is not None:
            fraction = (fraction + 1) / 2  # from [-1, 1]; IDDPM, eq. 15
            high, low = self.at("log_betas", t, x), self.at("posterior_log_variance_clipped", t, x)
            log_variance = fraction * high + (1 - fraction) * low
            variance = torch.exp(log_variance)
        else:
            variance, log_variance = (self.at(f"fixed_{name}", t, x).expand_as(x) for name in ("variance", "log_variance"))
        pred_xstart = self.predict_xstart_from_output(x, t, output)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, _ = self.q_posterior_mean_variance(pred_xstart, x, t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def predict_xstart_from_output(self, x_t, t, output):
        """x_0 as a model predicts it whose output is what `predict` says. A variance in the output is not read."""
        output = check_shape("the model's output", output[:, : x_t.shape[1]], x_t.shape).to(x_t.dtype)
        if self.predict == "eps":
            return self.predict_xstart_from_eps(x_t, t, output)
        if self.predict == "x0":
            return output
        alpha, sigma = self.alpha_sigma_at(t, x_t)
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

    # Losses, and the likelihood's bound

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """The training objective at steps t: (N,) int64, for clean x_start: (N, C, ...). Returns a dict of (N,) tensors:
        `loss`, and its parts `mse` (L_simple, DDPM, eq. 14) and `vb` (the bound's term in bits per dimension, which
        trains the variance with the mean detached: IDDPM, section 3.1), or `loss` alone with use_kl."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output, _ = self.call_model(model, x_t, t, model_kwargs)
        if self.use_kl:
            return {"loss": self.num_timesteps * self.bound_term(output, x_start, x_t, t)["vb"]}
        terms = {}
        prediction, fraction = self.split_output(output, x_t)
        if fraction is not None:
            detached = torch.cat([prediction.detach(), fraction], dim=1)
            terms["vb"] = self.bound_term(detached, x_start, x_t, t)["vb"] * self.vb_weight
        terms["mse"] = mean_flat((self.target(x_start, t, noise) - prediction) ** 2)
        terms["loss"] = terms["mse"] + terms.get("vb", 0)
        return terms

    def target(self, x_start, t, noise):
        """What the model's output should be for x_t made of x_0 and noise."""
        if self.predict == "eps":
            return noise
        if self.predict == "x0":
            return x_start
        alpha, sigma = self.alpha_sigma_at(t, x_start)
        return alpha * noise - sigma * x_start

    def draw_timesteps(self, number, device, sampling="uniform"):
        """Timesteps for training, (number,) int64. "logit-normal": t / num_timesteps is the sigmoid of a standard normal
        number, which prefers the middle (Esser et al. 2024, section 3.1)."""
        if sampling == "uniform":
            return torch.randint(self.num_timesteps, (number,), device=device)
        share = torch.randn(number, device=device).sigmoid()
        return (share * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)

    def bound_term(self, output, x_start, x_t, t, clip_denoised=False):
        """One term of the variational bound, in bits per dimension, (N,): L_{t-1} of DDPM, eq. 5, and L_0 at t = 0."""
        p = self.p_from_output(output, x_t, t, clip_denoised)
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(mean, log_variance, p["mean"], p["log_variance"]))
        nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, p["mean"], p["log_variance"]))
        return {"vb": torch.where(t == 0, nll, kl) / math.log(2), "pred_xstart": p["pred_xstart"]}


class Diffusion(GaussianDiffusion):
    """The paper's process as a training objective. predict: "eps", "x0" or "v"."""

    def __init__(self, predict="eps", learn_sigma=True):
        betas, variance = get_named_beta_schedule("linear", 1000), "learned" if learn_sigma else "large"
        super().__init__(betas, None, variance, predict)
