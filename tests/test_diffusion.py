"""diffusion/ against the reference's numbers, closed forms and properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import OPTIONS, assert_golden, fill, golden, normal, stub, training_batch
from test_models import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import create_diffusion
from diffusion.gaussian_diffusion import discretized_gaussian_log_likelihood, get_named_beta_schedule
from diffusion.respace import space_timesteps
from models import DiT, DiT_models

X_0 = normal("x0", 5, 4, 8, 8).clamp(-2, 2) * 0.5
NOISE = normal("noise", 5, 4, 8, 8)


def test_respacing_and_schedules_match_the_reference():
    data = golden("respacing")
    for key in data:
        kind, rest = key.split(":", 1)
        if kind == "steps":
            assert sorted(space_timesteps(1000, rest or [1000])) == list(data[key]), key
        elif kind == "betas":
            assert_golden(create_diffusion(rest).betas, data[key], key, tol=1e-12)
        else:
            name, steps = rest.split(":")
            assert_golden(get_named_beta_schedule(name, int(steps)), data[key], key, tol=1e-12)


@pytest.mark.parametrize("option", OPTIONS)
def test_distributions_and_losses_match_the_reference(option):
    data, diffusion = golden("diffusion"), create_diffusion("", **OPTIONS[option])
    model = stub(OPTIONS[option].get("learn_sigma", True))
    steps = diffusion.num_timesteps
    t = torch.tensor([0, 1, steps // 3, steps - 2, steps - 1])
    x_t = diffusion.q_sample(X_0, t, NOISE)
    got = {"q_sample": x_t, "prior_bpd": diffusion.prior_bpd(X_0)}
    got |= {f"posterior{i}": v for i, v in enumerate(diffusion.q_posterior_mean_variance(X_0, x_t, t))}
    for clip in (0, 1):
        p = diffusion.p_mean_variance(model, x_t, t, clip_denoised=bool(clip))
        got |= {f"p_{name}:clip={clip}": value for name, value in p.items()}
    losses = diffusion.training_losses(model, X_0, t, noise=NOISE)
    got |= {f"loss_{name}": value for name, value in losses.items()}
    got["ddim_reverse"] = diffusion.ddim_reverse_sample(model, x_t, t, clip_denoised=False)["sample"]
    expected = {key.split(":", 1)[1]: data[key] for key in data if key.startswith(option + ":")}
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert_golden(got[name], value, f"{option} {name}")


@pytest.mark.parametrize("key", [key for key in golden("loops") if key != "dit_cfg_12"])
def test_loops_from_a_seed_match_the_reference(key):
    data = golden("loops")[key]
    spacing, option, seed, what = key.split(":")
    diffusion, model = create_diffusion(spacing, **OPTIONS[option]), stub(OPTIONS[option].get("learn_sigma", True))
    z = normal("z", 3, 4, 8, 8)
    torch.manual_seed(int(seed))
    if what == "ddpm":
        out = diffusion.p_sample_loop(model, z.shape, z, clip_denoised=False, device="cpu")
    elif what.startswith("ddim"):
        out = diffusion.ddim_sample_loop(model, z.shape, z, clip_denoised=True, device="cpu", eta=float(what[4:]))
    else:
        out = diffusion.calc_bpd_loop(model, X_0, clip_denoised=True)[what.removeprefix("bpd_")]
    assert_golden(out, data, key, tol=2e-4)


def test_guided_loop_of_a_model_matches_the_reference():
    model, z = fill(DiT(**SMALL)), normal("zdit", 2, 4, 8, 8)
    torch.manual_seed(11)
    zz = torch.cat([z, z])
    kwargs = {"y": torch.tensor([1, 2, 10, 10]), "cfg_scale": 3.0}
    out = create_diffusion("12").p_sample_loop(
        model.forward_with_cfg, zz.shape, zz, clip_denoised=False, model_kwargs=kwargs, device="cpu"
    )
    assert_golden(out, golden("loops")["dit_cfg_12"], "dit_cfg_12", tol=2e-4)


def test_what_the_sampling_script_draws_matches_the_reference():
    data = golden("sample_script")
    for key in data:
        name, size, seed, steps, cfg_scale, labels = key.split(":")
        labels, size = [int(label) for label in labels.split(",")], int(size)
        torch.manual_seed(int(seed))
        model = fill(DiT_models[name](input_size=size, num_classes=1000))
        z = torch.randn(len(labels), 4, size, size)
        y = torch.tensor(labels + [1000] * len(labels))
        out = create_diffusion(steps).p_sample_loop(
            model.forward_with_cfg,
            (2 * len(z), *z.shape[1:]),
            torch.cat([z, z]),
            clip_denoised=False,
            model_kwargs={"y": y, "cfg_scale": float(cfg_scale)},
        )
        assert_golden(out[: len(z)], data[key], key, tol=2e-4)


def test_thirty_optimisation_steps_match_the_reference():
    data, diffusion = golden("train"), create_diffusion("")
    model = fill(DiT(**SMALL, class_dropout_prob=0.3)).train()
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    losses = []
    for i in range(30):
        x, noise, t, y = training_batch(i)
        torch.manual_seed(i)
        loss = diffusion.training_losses(model, x, t, {"y": y}, noise)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, value in model.state_dict().items():
            ema[name] = 0.99 * ema[name] + 0.01 * value
    assert_golden(losses, data["losses"], "losses", tol=2e-4)
    for key in data:
        if key != "losses":
            kind, name = key.split(":")
            assert_golden((ema if kind == "ema" else model.state_dict())[name], data[key], key, tol=2e-4)


@given(n=st.integers(1, 2000), data=st.data())
def test_kept_steps_are_increasing_in_range_and_reach_both_ends(n, data):
    k = data.draw(st.integers(1, n))
    steps = space_timesteps(n, k)
    assert len(steps) == k
    assert list(steps) == sorted(set(steps))
    assert steps[0] == 0
    assert steps[-1] == (n - 1 if k > 1 else 0)


@given(n=st.integers(3, 500), data=st.data())
def test_sections_split_the_process_evenly(n, data):
    counts = [data.draw(st.integers(1, n // 3)) for _ in range(3)]
    steps = space_timesteps(n, ",".join(map(str, counts)))
    ends = np.cumsum([n // 3 + (i < n % 3) for i in range(3)])
    assert [int(c) for c in np.histogram(steps, [0, *ends])[0]] == counts


@pytest.mark.parametrize("spacing", ["ddim300", "ddim0", "ddimx", "1001", "0", "600,600", "5,x", "-3"])
def test_impossible_spacings_are_refused(spacing):
    with pytest.raises(ValueError, match="timesteps|spacing"):
        create_diffusion(spacing)


@given(st.integers(1, 1000))
@settings(max_examples=20, deadline=None)
def test_respaced_process_has_the_alpha_bar_of_its_timesteps(k):
    kept = space_timesteps(1000, k)
    long, short = create_diffusion(""), create_diffusion(str(k))
    np.testing.assert_allclose(np.cumprod(1 - short.betas), np.cumprod(1 - long.betas)[kept], rtol=1e-9)


def test_posterior_matches_bayes_rule_in_closed_form():
    """q(x_{t-1} | x_t, x_0) is the product of two Gaussians: N(x_{t-1}; sqrt(alpha_bar') x_0, 1 - alpha_bar') and
    N(x_t; sqrt(1 - beta) x_{t-1}, beta), up to its norm."""
    diffusion = create_diffusion("")
    betas, alpha_bar = diffusion.betas, np.cumprod(1 - diffusion.betas)
    for i in (1, 10, 500, 999):
        x_0, x_t = torch.randn(1, 3).double(), torch.randn(1, 3).double()
        mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_0, x_t, torch.tensor([i]))
        precision = 1 / (1 - alpha_bar[i - 1]) + (1 - betas[i]) / betas[i]
        weighted = math.sqrt(alpha_bar[i - 1]) * x_0 / (1 - alpha_bar[i - 1]) + math.sqrt(1 - betas[i]) * x_t / betas[i]
        torch.testing.assert_close(mean, weighted / precision, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(variance, torch.full_like(x_t, 1 / precision), rtol=1e-9, atol=0)
        torch.testing.assert_close(log_variance, variance.log())


def test_bins_of_the_discretised_gaussian_sum_to_one():
    x = (torch.arange(256).double() * 2 / 255 - 1).view(1, -1)
    for mean, log_std in ((0.0, -1.0), (0.7, -4.0), (-1.3, 0.0)):
        args = torch.full_like(x, mean), torch.full_like(x, 2 * log_std)
        assert abs(discretized_gaussian_log_likelihood(x, *args).exp().sum() - 1) < 1e-9


def test_rescaled_variance_weight_applies_to_the_bound_alone():
    t, model = torch.tensor([0, 5, 50, 150, 199]), stub(learn_sigma=True)
    plain = create_diffusion("", diffusion_steps=200).training_losses(model, X_0, t, noise=NOISE)
    scaled = create_diffusion("", diffusion_steps=200, rescale_learned_sigmas=True)
    scaled = scaled.training_losses(model, X_0, t, noise=NOISE)
    torch.testing.assert_close(scaled["vb"], plain["vb"] * 0.2)
    torch.testing.assert_close(scaled["mse"], plain["mse"])
    torch.testing.assert_close(scaled["loss"], plain["mse"] + 0.2 * plain["vb"])


def test_bound_trains_the_variance_and_leaves_the_mean_alone():
    output = torch.randn(5, 8, 8, 8, requires_grad=True)
    losses = create_diffusion("").training_losses(lambda x, t: output, X_0, torch.full((5,), 400), noise=NOISE)
    (grad,) = torch.autograd.grad(losses["vb"].sum(), output)
    assert not grad[:, :4].any(), "the bound must not reach the mean"
    assert grad[:, 4:].any()


def test_exact_denoiser_of_one_image_returns_it():
    """For data at a single point x_0 the exact eps is known, and every loop must end at x_0."""
    diffusion = create_diffusion("20", learn_sigma=False)
    x_0 = X_0[:1].double()
    alpha_bar = torch.from_numpy(np.cumprod(1 - create_diffusion("").betas))

    def exact(x, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (x - a.sqrt() * x_0) / (1 - a).sqrt()

    x_T = torch.randn(3, 4, 8, 8).double()
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        out = loop(exact, x_T.shape, x_T, clip_denoised=False, device="cpu")
        torch.testing.assert_close(out, x_0.expand_as(out), rtol=0, atol=1e-8)


def test_ddim_reverse_undoes_ddim():
    diffusion = create_diffusion("")
    x = X_0[:2].double()

    def model(x, t):  # smooth in x and t, so that neighbouring steps agree
        eps = 0.3 * x + 0.1 * t.view(-1, 1, 1, 1) / 1000
        return torch.cat([eps, eps], dim=1)

    for i in range(diffusion.num_timesteps - 1):
        x = diffusion.ddim_reverse_sample(model, x, torch.full((2,), i), clip_denoised=False)["sample"]
    out = diffusion.ddim_sample_loop(model, x.shape, x, clip_denoised=False, device="cpu")
    assert (out - X_0[:2]).abs().max() < 0.02


def test_noise_is_drawn_on_the_models_device_when_none_is_given():
    model = fill(DiT(**SMALL))
    kwargs = {"y": torch.tensor([1, 10]), "cfg_scale": 2.0}
    out = create_diffusion("2").p_sample_loop(model.forward_with_cfg, (2, 4, 8, 8), model_kwargs=kwargs)
    assert out.shape == (2, 4, 8, 8)


class HostTraffic(TorchDispatchMode):
    """Fails on what would copy between host and device, or wait for the device, were the device a GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.ndim > 0]
        assert "_local_scalar_dense" not in name, "a step waits for the device"
        assert not any(a.device.type == "cpu" for a in tensors), f"{name} reads a tensor on the host"
        assert "_to_copy" not in name or not tensors or tensors[0].device.type != "cpu", f"{name} copies from the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loop", ["p_sample_loop_progressive", "ddim_sample_loop_progressive"])
def test_no_step_copies_from_the_host_or_waits_for_the_device(loop):
    """On the meta device a copy to the host fails by itself; the rest is caught by watching every operation."""
    diffusion = create_diffusion("10")
    x_T = torch.empty(2, 4, 8, 8, device="meta")
    steps = getattr(diffusion, loop)(stub(learn_sigma=True), x_T.shape, x_T, clip_denoised=True)
    next(steps)  # the first step places the tables
    with HostTraffic():
        assert len(list(steps)) == 9
