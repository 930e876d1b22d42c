"""diffusion/ against the reference's numbers, closed forms and properties."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import OPTIONS, SMALL, HostTraffic, assert_golden, fill, golden, normal, stub, training_batch

from diffusion import create_diffusion
from diffusion.gaussian_diffusion import discretized_gaussian_log_likelihood, get_named_beta_schedule
from diffusion.respace import space_timesteps
from models import DiT, DiT_models
from studies import gaussian

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


@pytest.mark.parametrize("key", golden("steps"))
def test_single_steps_and_classifier_guidance_match_the_reference(key):
    """Arguments are given by position: their order is part of the original's interface."""
    data = golden("steps")[key]
    if key.startswith("steps:"):
        assert sorted(space_timesteps(1000, key.removeprefix("steps:"))) == list(data)
        return
    spacing, option, seed, what, *part = key.split(":")
    diffusion, model = create_diffusion(spacing, **OPTIONS[option]), stub(OPTIONS[option].get("learn_sigma", True))
    z, kwargs, end = normal("z", 3, 4, 8, 8), {"y": torch.tensor([0, 1, 2])}, diffusion.num_timesteps - 1
    t = torch.tensor([0, end // 2, end])
    calls = {
        "loop_cond": lambda: diffusion.p_sample_loop(model, z.shape, z, False, None, cond_fn, kwargs, "cpu", False),
        "ddim_cond": lambda: diffusion.ddim_sample_loop(model, z.shape, z, True, None, cond_fn, kwargs, "cpu", False, 0.5),
        "p_sample_cond": lambda: diffusion.p_sample(model, z, t, True, None, cond_fn, kwargs),
        "p_sample": lambda: diffusion.p_sample(model, z, t, False, torch.tanh, None, kwargs),
        "ddim_sample": lambda: diffusion.ddim_sample(model, z, t, True, None, cond_fn, kwargs, 0.3),
        "ddim_reverse": lambda: diffusion.ddim_reverse_sample(model, z, t, True, None, None, kwargs),
        "q": lambda: dict(zip(("mean", "variance", "log_variance"), diffusion.q_mean_variance(z, t), strict=True)),
    }
    torch.manual_seed(int(seed))
    out = calls[what]()
    assert_golden(out[part[0]] if part else out, data, key, tol=2e-4)


def cond_fn(x, t, y=None):
    """The classifier's gradient of steps.npz."""
    return 0.3 * (1 + t.view(-1, 1, 1, 1) / 1000 + 0.5 * y.view(-1, 1, 1, 1)) * torch.sin(x)


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
    counts = data.draw(st.lists(st.integers(0, n // 3), min_size=3, max_size=3).filter(any))
    steps = space_timesteps(n, ",".join(map(str, counts)))
    ends = np.cumsum([n // 3 + (i < n % 3) for i in range(3)])
    assert [int(c) for c in np.histogram(steps, [0, *ends])[0]] == counts


@pytest.mark.parametrize(
    "spacing", ["ddim300", "ddim0", "ddimx", "1001", "0", "0,0", "600,600", "5,x", "-3", "5,-1,30", 0, []]
)
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


@pytest.mark.parametrize(("spacing", "diffusion_steps"), [("", 200), ("200", 1000), ("ddim200", 400)])
def test_rescaled_variance_weight_is_the_kept_steps_and_applies_to_the_bound_alone(spacing, diffusion_steps):
    t, create = torch.tensor([0, 5, 50, 150, 199]), partial(create_diffusion, spacing, diffusion_steps=diffusion_steps)
    plain, scaled = (
        create(rescale_learned_sigmas=rescale).training_losses(stub(learn_sigma=True), X_0, t, noise=NOISE)
        for rescale in (False, True)
    )
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


LOOPS = ["p_sample_loop_progressive", "ddim_sample_loop_progressive"]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_next_step_starts_from_the_sample_that_the_caller_put_into_the_dict(loop):
    seen = []

    def model(x, t):
        seen.append(x)
        return stub(learn_sigma=True)(x, t)

    for i, out in enumerate(getattr(create_diffusion("5"), loop)(model, X_0.shape, X_0, device="cpu")):
        out["sample"] = torch.full_like(X_0, i)
    assert len(seen) == 5
    for i, x in enumerate(seen[1:]):
        assert torch.equal(x, torch.full_like(X_0, i))


def test_ddim_with_the_exact_classifier_samples_the_posterior():
    """Data N(MU, S^2) and a measurement y = x_0 + noise of standard deviation r: x_0 given x_t is Gaussian, so that
    log p(y | x_t) and p(x_0 | y) are known. DDIM is linear in x_T, so x_T = 0 and x_T = 1 show the mean and the deviation.
    """
    y, r, diffusion = 1.0, 0.4, create_diffusion("250", learn_sigma=False)

    def cond_fn(x, t):
        alpha_bar = gaussian.ALPHA_BAR[t[0]]
        mean, std = gaussian.marginal(alpha_bar)
        with torch.enable_grad():  # as scripts write it: the loop itself keeps no gradients
            x = x.detach().requires_grad_()
            mean_0 = gaussian.MU + alpha_bar**0.5 * gaussian.S**2 / std**2 * (x - mean)  # of x_0 given x_t
            variance_0 = gaussian.S**2 * (1 - alpha_bar) / std**2
            log_p = -((y - mean_0) ** 2) / (2 * (variance_0 + r**2))
            return torch.autograd.grad(log_p.sum(), x)[0]

    x_T = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
    x_0 = diffusion.ddim_sample_loop(
        lambda x, t: gaussian.denoiser(x, t[0].item())[:, :1], x_T.shape, x_T, False, None, cond_fn
    ).flatten()
    precision = 1 / gaussian.S**2 + 1 / r**2
    assert abs(x_0[0] - (gaussian.MU / gaussian.S**2 + y / r**2) / precision) < 0.01
    assert abs(x_0[1] - x_0[0] - precision**-0.5) < 0.01


def test_ddim_reverse_is_for_the_deterministic_process_and_undoes_ddim():
    diffusion = create_diffusion("")
    x = X_0[:2].double()
    with pytest.raises(ValueError, match="eta 0.5"):
        diffusion.ddim_reverse_sample(stub(learn_sigma=True), X_0, torch.arange(5), eta=0.5)

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


@pytest.mark.parametrize(
    ("what", "call"),
    [
        ("t has shape", lambda d, t: d.q_sample(X_0, t[:1])),
        ("t has shape", lambda d, t: d.training_losses(stub(True), X_0, t[:1])),
        ("t has shape", lambda d, t: d.p_sample(stub(True), X_0, t[:1])),
        ("t has shape", lambda d, t: d.p_mean_variance(stub(True), X_0, t[:, None])),
        ("x_start has shape", lambda d, t: d.q_posterior_mean_variance(X_0[:1], X_0, t)),
        ("noise has shape", lambda d, t: d.training_losses(stub(True), X_0, t, noise=NOISE[:1])),
        ("noise has shape", lambda d, t: d.p_sample_loop(stub(True), X_0.shape, NOISE[:1])),
        ("model's output", lambda d, t: d.p_mean_variance(lambda x, t: torch.zeros(1, 8, 8, 8), X_0, t)),
        ("model's output", lambda d, t: d.training_losses(lambda x, t: torch.zeros(5, 2, 8, 8), X_0[:, :2], t)),
        ("model's output", lambda d, t: d.ddim_sample(stub(False), X_0, t)),
        ("gradient", lambda d, t: d.p_sample(stub(True), X_0, t, cond_fn=lambda x, t: x[:1])),
    ],
)
def test_shapes_that_disagree_are_refused(what, call):
    with pytest.raises(ValueError, match=what):
        call(create_diffusion(""), torch.arange(5))


def test_a_model_may_return_more_than_its_output():
    diffusion, t = create_diffusion(""), torch.arange(5)

    def model(x, t):
        return stub(True)(x, t), "extra"

    p = diffusion.p_mean_variance(model, X_0, t)
    assert p.pop("extra") == "extra"
    assert diffusion.p_mean_variance(lambda x, t: [model(x, t)[0], 1, 2], X_0, t)["extra"] == [1, 2]
    plain = diffusion.p_mean_variance(stub(True), X_0, t)
    assert p.keys() == plain.keys()
    assert all(torch.equal(p[name], plain[name]) for name in p)
    losses = (diffusion.training_losses(either, X_0, t, noise=NOISE)["loss"] for either in (model, stub(True)))
    assert torch.equal(*losses)
    bounds = (
        create_diffusion("3").calc_bpd_loop(either, X_0, step_noise=lambda x, i: NOISE) for either in (model, stub(True))
    )
    assert torch.equal(*(bound["total_bpd"] for bound in bounds))


def test_a_fixed_variance_takes_no_second_half_of_channels():
    with pytest.raises(ValueError, match="large variance"):
        create_diffusion("", learn_sigma=False).training_losses(stub(learn_sigma=True), X_0, torch.arange(5))


def test_tables_have_the_originals_names_in_float64():
    diffusion, t = create_diffusion("10"), torch.arange(10)
    x_0, x_t = normal("x_0", 10, 1).double(), normal("x_t", 10, 1).double()
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_0, x_t, t)
    expected = {
        "alphas_cumprod": np.cumprod(1 - diffusion.betas),
        "alphas_cumprod_prev": [1, *np.cumprod(1 - diffusion.betas)[:-1]],
        "alphas_cumprod_next": [*np.cumprod(1 - diffusion.betas)[1:], 0],
        "sqrt_alphas_cumprod": diffusion.alphas_cumprod**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - diffusion.alphas_cumprod) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log(1 - diffusion.alphas_cumprod),
        "sqrt_recip_alphas_cumprod": diffusion.alphas_cumprod**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / diffusion.alphas_cumprod - 1) ** 0.5,
        "posterior_variance": variance[:, 0],
        "posterior_log_variance_clipped": log_variance[:, 0],
        "posterior_mean_coef1": ((mean - diffusion.at("posterior_mean_coef2", t, x_t) * x_t) / x_0)[:, 0],
        "posterior_mean_coef2": ((mean - diffusion.at("posterior_mean_coef1", t, x_0) * x_0) / x_t)[:, 0],
    }
    for name, table in expected.items():
        assert getattr(diffusion, name).dtype == np.float64
        np.testing.assert_allclose(getattr(diffusion, name), table, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("loop", LOOPS)
def test_no_step_copies_from_the_host_or_waits_for_the_device(loop):
    """On the meta device a copy to the host fails by itself; the rest is caught by watching every operation."""
    diffusion = create_diffusion("10")
    x_T = torch.empty(2, 4, 8, 8, device="meta")
    steps = getattr(diffusion, loop)(stub(learn_sigma=True), x_T.shape, x_T, clip_denoised=True)
    next(steps)  # the first step places the tables
    with HostTraffic():
        assert len(list(steps)) == 9


def test_classifier_guidance_is_there_under_its_names():
    """By the original's names: condition_mean shifts DDPM's mean by variance times gradient, condition_score DDIM's eps."""
    diffusion = create_diffusion("10")
    x, t = normal("z", 3, 4, 8, 8), torch.tensor([0, 5, 9])
    p = diffusion.p_mean_variance(stub(True), x, t, clip_denoised=False)

    def cond_fn(x, t, y=None):
        return torch.sin(x)

    expected = p["mean"] + p["variance"] * torch.sin(x)
    torch.testing.assert_close(diffusion.condition_mean(cond_fn, p, x, t), expected)
    scored = diffusion.condition_score(cond_fn, p, x, t)
    eps = diffusion.predict_eps_from_xstart(x, t, p["pred_xstart"])
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod).float()[t].view(-1, 1, 1, 1)
    shifted = diffusion.predict_xstart_from_eps(x, t, eps - (1 - alpha_bar).sqrt() * torch.sin(x))
    torch.testing.assert_close(scored["pred_xstart"], shifted, rtol=1e-4, atol=1e-4)
