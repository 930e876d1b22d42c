"""MeanFlow, for samples in one step: Geng et al. 2025 (arXiv 2505.13447), improved in arXiv 2512.02012.

A flow's model gives the velocity v(x_s, s), which a sampler integrates. A MeanFlow's model gives its average over [r, s]:

    u(x_s, r, s) = 1 / (s - r) * integral of v(x_q, q) dq from r to s,   so   x_r = x_s - (s - r) u(x_s, r, s)

and u(x_s, s, s) is the velocity itself. Differentiating (s - r) u along the path, where dx/ds = v, gives what is trained:

    v = u + (s - r) du/ds,   du/ds = (d_x u) v + d_s u

Models are told the timesteps t = 1000 s and 1000 r. As in `diffusion/flow.py`, noise is at s = 1."""

import warnings

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .flow import Flow
from .gaussian_diffusion import check_shape, mean_flat, per_sample

# PyTorch's own, when it loads its rules of forward-mode differentiation
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


class MeanFlow(Flow):
    """The flow as a process, and the training objective of its average velocity.

    guidance: the scale w of the classifier-free guidance that is learned, so that sampling needs none: v is replaced by
    v + (1 - 1/w) (u(x_s, s, s | y) - u(x_s, s, s)), whose fixed point is the velocity guided with w. null(y): "no
    condition", in y's form."""

    every = 4  # one sample of so many has r < t; the others are trained as a flow
    mean = -0.4  # of the logits of s and r
    c = 1e-3

    def __init__(self, predict="v", learn_sigma=False, num_timesteps=1000, guidance=1.0, null=None):
        super().__init__(predict, learn_sigma, num_timesteps)
        self.guidance, self.null = guidance, null

    def draw_timesteps(self, number, device, sampling="uniform"):
        """t and r <= t for training, (number, 2) float32: two draws in order, but r = t in three samples of four. With
        "logit-normal" they are sigmoids of normal numbers of mean -0.4."""
        if sampling == "uniform":
            s = torch.rand(number, 2, device=device)
        else:
            s = (torch.randn(number, 2, device=device) + self.mean).sigmoid()
        t, r = (1000 * s).sort(dim=1, descending=True).values.unbind(1)
        return torch.stack([t, torch.where(torch.arange(number, device=device) % self.every == 0, r, t)], dim=1)

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """As `Flow.training_losses`; t: (N, 2), t and r, or (N,), where r = t. `loss` is log(mse + c), whose gradient is
        that of mse with the adaptive weight 1 / (mse + c) (Geng et al. 2025, with p = 1)."""
        noise = torch.randn_like(x_start) if noise is None else noise
        t, r = t.unbind(1) if t.ndim == 2 else (t, t)
        y = model_kwargs["y"]
        s = per_sample(t / 1000, x_start).to(x_start.dtype)
        x_s, v = (1 - s) * x_start + s * noise, noise - x_start
        # u goes through DDP's wrapper, which exchanges its gradient; what only makes the target goes past it
        u = model(x_s, t, y, r).to(x_s.dtype)
        check_shape("the model's output, the average velocity,", u, x_s.shape)
        model, rows = getattr(model, "module", model), (r < t).nonzero()[:, 0]
        target = v
        with torch.no_grad():
            velocity = u.detach().clone()  # u(x_s, s, s)
            if len(rows):
                velocity[rows] = model(x_s[rows], t[rows], y[rows]).to(x_s.dtype)
            if self.guidance != 1:
                target = v + (1 - 1 / self.guidance) * (velocity - model(x_s, t, self.null(y)).to(x_s.dtype))
            if len(rows):
                slope = average_slope(model, x_s[rows], t[rows], r[rows], y[rows], velocity[rows])
                target = target.index_add(0, rows, -per_sample((t - r)[rows] / 1000, slope).to(slope.dtype) * slope)
        mse = mean_flat((u - target) ** 2)
        return {"loss": (mse + self.c).log(), "mse": mse}


@torch.no_grad()
def average_slope(model, x_s, t, r, y, velocity):
    """du/ds along dx/ds = velocity, (N, C, ...): the Jacobian-vector product of (x_s, s) -> u(x_s, r, s), by forward-mode
    differentiation. Attention has no such derivative in its fused kernels, and compiled blocks have none."""
    with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"), forward_ad.dual_level():
        x_s, t = forward_ad.make_dual(x_s, velocity), forward_ad.make_dual(t, torch.full_like(t, 1000))
        return forward_ad.unpack_dual(model(x_s, t, y, r).to(x_s.dtype)).tangent
