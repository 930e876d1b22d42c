"""Classifier-free guidance (Ho and Salimans 2022) and its variants, as plain functions on tensors.

    denoiser = guided_denoiser(model, y, null_class, cfg_scale=4.0, channels=3, interval=(0.1, 0.6))
    x_0 = samplers.last(sample("ddpm", denoiser, x_T, num_steps=250))

A denoiser maps (x_t, t) to the model's output; t, the same for the batch, is a Python number."""

import torch
import torch.nn.functional as F

from .registry import GUIDANCE_SCHEDULES


def combine(cond, uncond, cfg_scale):
    """Ho and Salimans 2022, eq. 6, with cfg_scale = 1 + w: 1 is no guidance, 0 is no condition."""
    return uncond + cfg_scale * (cond - uncond)


def rescale_to(guided, cond, phi):
    """Lin et al. 2024, eqs. 15 and 16: give each sample's guided prediction the standard deviation of the conditional
    one, by the share phi in [0, 1]. (N, C, ...) each."""
    axes = tuple(range(1, cond.ndim))
    rescaled = guided * (cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
    return phi * rescaled + (1 - phi) * guided


def scale_at(t, cfg_scale, interval=None, schedule="constant"):
    """The guidance scale at the timestep t, a number: 1 outside of `interval`, in it 1 + (cfg_scale - 1) times the share
    that `registry.GUIDANCE_SCHEDULES` gives. interval: (low, high) in t / 1000, inclusive (Kynkäänniemi et al. 2024)."""
    time = t / 1000
    if interval is not None and not interval[0] <= time <= interval[1]:
        return 1.0
    share = GUIDANCE_SCHEDULES[schedule](1 - time)
    return cfg_scale if share == 1 else 1 + (cfg_scale - 1) * share  # not 1 + (cfg_scale - 1), which rounds


def guided_denoiser(
    model, y, null_class, cfg_scale=1.0, channels=None, interval=None, schedule="constant", rescale=0.0, guide=None
):
    """A denoiser for `diffusion.sample`: a model of (x_t, t, y), guided towards the condition y. Where the scale is 1 the
    model is called once on the batch, elsewhere once on [conditional; unconditional].

    y: (N,) int64 labels, or (N, K) weights as of `mix_classes`, or what the model's `Condition` gives. null_class: the
    label of "no class", or a tensor that stands for no condition, of y's shape or of one sample's. cfg_scale, interval,
    schedule: see `scale_at`. channels: how many of eps's channels are guided, the first ones; None is all of them; see
    `DiT.guided_channels`. rescale: phi of `rescale_to`, over the guided channels. guide: a weaker model of (x_t, t, y), to
    be guided away from in place of the unconditional prediction; it is given y (Karras et al. 2024, autoguidance). The
    variance's channels are the conditional prediction's. Raises ValueError for values out of range."""
    if schedule not in GUIDANCE_SCHEDULES:
        raise ValueError(f"guidance schedule {schedule!r} is not one of {', '.join(GUIDANCE_SCHEDULES)}")
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance interval {interval[0]} to {interval[1]}: give 0 <= LO < HI <= 1, in t / 1000")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance rescale {rescale} is not in [0, 1]")
    y_both = None if guide is not None else torch.cat([y, null_like(y, null_class)])

    def denoise(x_t, t, *r):  # r: of the average velocity alone, as t
        scale = scale_at(t, cfg_scale, interval, schedule)
        times, *ends = (torch.full((len(x_t),), time, device=x_t.device) for time in (t, *r))
        if scale == 1:
            return model(x_t, times, y, *ends).to(x_t.dtype)
        if guide is not None:
            cond, weak = model(x_t, times, y, *ends), guide(x_t, times, y, *ends)
        else:
            x_both, *times = (torch.cat([values, values]) for values in (x_t, times, *ends))
            cond, weak = model(x_both, times[0], y_both, *times[1:]).chunk(2)
        cond, weak = cond.to(x_t.dtype), weak.to(x_t.dtype)
        guided = x_t.shape[1] if channels is None else channels
        eps = combine(cond[:, :guided], weak[:, :guided], scale)
        if rescale:
            eps = rescale_to(eps, cond[:, :guided], rescale)
        return torch.cat([eps, cond[:, guided:]], dim=1)

    return denoise


def null_like(y, null_class):
    """The null class in the form of y: labels, weights of the classes, or texts."""
    if isinstance(null_class, torch.Tensor):
        return null_class.expand_as(y)
    labels = torch.full((len(y),), null_class, device=y.device)
    return F.one_hot(labels, y.shape[1]).to(y.dtype) if y.is_floating_point() else labels


def mix_classes(y_from, y_to, weight, num_classes):
    """Weights that interpolate linearly between the embeddings of two labels: what a DiT takes for y in place of labels.
    y_from, y_to: (N,) int64. weight: of y_to, a number or (N, 1). Returns (N, num_classes + 1) float32."""
    y_from, y_to = (F.one_hot(y, num_classes + 1).float() for y in (y_from, y_to))
    return y_from + weight * (y_to - y_from)
