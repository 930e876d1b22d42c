"""diffusion.sample and diffusion/editing.py against closed forms, diffusers' own loops, and the process's equations."""

import itertools
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import HostTraffic, normal, stub

from diffusion import check_sampler, create_diffusion, sample, samplers
from diffusion.editing import ddim_inversion, inpainting_denoiser, slerp
from diffusion.registry import SAMPLERS, SPACINGS, Sampler
from studies import gaussian

# diffusers reads its tensors in a way that numpy 2 calls old
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SOLVERS = [name for name, sampler in SAMPLERS.items() if sampler.scheduler]
DIFFUSIONS = [name for name, sampler in SAMPLERS.items() if not sampler.flow]  # test_recipe_options.py has those of flows
DETERMINISTIC = [name for name in DIFFUSIONS if SAMPLERS[name].is_deterministic()]
X_T = normal("x_T", 3, 4, 8, 8)
STRIDES = [n for n in range(1, 1001) if 1000 % n == 0]


def smooth(x, t):
    """A denoiser that is neither linear nor exact, of a model that sees timesteps of the full process."""
    return stub(learn_sigma=True)(x, torch.full((len(x),), t))


def predictor(sampler):
    """`smooth`, or for a sampler of flows a velocity that is as smooth."""
    return (lambda x, t, *r: smooth(x, t)[:, :4]) if SAMPLERS[sampler].flow else smooth


def of_images(x, t):
    """A denoiser that keeps x in the range of data: the exact one of N(0.3, 0.5^2), bent."""
    return gaussian.denoiser(x, t) + 0.1 * torch.sin(3 * torch.cat([x, x], dim=1))


def recorded(denoiser, seen):
    return lambda x, t, *r: seen.append(t) or denoiser(x, t, *r)


# ----------------------------------------------------------------------------------------------------------------------
# The interface


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_yields_each_step_and_asks_the_denoiser_as_often_as_documented(sampler):
    seen = []
    outs = list(sample(sampler, recorded(predictor(sampler), seen), X_T, 10))
    assert [out["step"] for out in outs] == list(range(9, -1, -1))
    assert len(seen) == SAMPLERS[sampler].evaluations(10)
    assert seen == sorted(seen, reverse=True)
    last = 1000 if SAMPLERS[sampler].flow else 999
    assert all(type(t) in (int, float) and 0 <= t <= last for t in seen), "t is a number, for denoisers that decide by it"
    for out in outs:
        assert out["sample"].shape == out["pred_xstart"].shape == X_T.shape
        assert out["sample"].dtype == X_T.dtype
    torch.testing.assert_close(outs[-1]["sample"], outs[-1]["pred_xstart"], rtol=0, atol=2e-3)


@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_what_is_yielded_is_x_t_of_ddpm_at_the_next_timestep(sampler):
    """With the exact eps of an image and a noise, x_t is their mixture at every level, from the first x_t on."""
    x_0, eps, seen = 0.5 * normal("x_0", *X_T.shape).double(), X_T.double(), []
    alpha_bar = gaussian.alpha_bar_at(900 if sampler == "ddim" else 999)
    x_T = alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps
    outs = list(sample(sampler, recorded(lambda x, t: torch.cat([eps, eps], dim=1), seen), x_T, 10))
    for out, t in zip(outs, [*dict.fromkeys(seen), None][1:], strict=True):
        alpha_bar = 1.0 if t is None else gaussian.alpha_bar_at(t)
        torch.testing.assert_close(out["pred_xstart"], x_0, rtol=0, atol=1e-3)  # diffusers counts in float32
        torch.testing.assert_close(out["sample"], alpha_bar**0.5 * x_0 + (1 - alpha_bar) ** 0.5 * eps, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("sampler", "options", "reason"),
    [
        ("plms", {}, "not one of ddpm, ddim, dpm-solver"),
        ("ddpm", {"eta": 0.5}, "eta is an option of ddim"),
        ("unipc", {"eta": 0.5}, "eta is an option of ddim"),
        ("ddim", {"spacing": "leading"}, "spacing is an option of"),
        ("heun", {"spacing": "even"}, "not one of leading, linspace, trailing"),
        ("ddim", {"init": X_T, "strength": 0.0}, "strength"),
        ("ddim", {"init": X_T[:1]}, "init has shape"),
        ("euler", {"init": X_T[:1]}, "init has shape"),
        ("ddim", {"num_steps": 0}, "0"),
        ("ddpm", {"num_steps": 1001}, "1001"),
        ("euler", {"num_steps": 1001}, "1001 steps"),
        ("dpm-solver++", {"num_steps": 1000}, "1000 steps"),  # diffusers would repeat a timestep
        ("unipc", {"num_steps": 61, "spacing": "trailing"}, "61 steps"),  # and here add timestep -1
        (
            "dpm-solver++",
            {"num_steps": 500, "spacing": "leading"},
            "starts at timestep 500 .* or take linspace or trailing",
        ),
        ("euler", {"num_steps": 400, "spacing": "leading"}, "starts at timestep 798"),
        ("heun", {"num_steps": 1}, "starts at timestep 0 .* or take trailing"),
        ("unipc", {"create": partial(create_diffusion, predict_xstart=True)}, "predicts eps"),
    ],
)
def test_impossible_options_are_refused_at_the_call(sampler, options, reason):
    with pytest.raises(ValueError, match=reason):
        sample(sampler, smooth, X_T, **{"num_steps": 10, **options})


@given(st.sampled_from(SOLVERS), st.sampled_from(SPACINGS), st.integers(1, 1000))
@settings(max_examples=30, deadline=None)
def test_solvers_take_a_number_of_steps_or_refuse_it(sampler, spacing, num_steps):
    try:
        scheduler = samplers.SolverSteps(SAMPLERS[sampler], create_diffusion("").betas, num_steps, spacing).scheduler
    except ValueError as error:
        assert num_steps > 60 or num_steps == 1
        ways = re.findall("leading|linspace|trailing", str(error).partition("or take")[2])
        for way in ways:
            check_sampler(sampler, num_steps, spacing=way)
        assert ways or num_steps == 1000
        return
    assert len(scheduler.timesteps) == SAMPLERS[sampler].evaluations(num_steps)
    assert scheduler.timesteps.min() >= 0
    assert scheduler.timesteps.max() <= 999
    assert scheduler.timesteps[0] >= (900 if num_steps >= 10 else 500)


@pytest.mark.parametrize("sampler", DIFFUSIONS)
def test_without_learned_variances_the_solvers_are_the_same(sampler):
    """And DDPM is as with a learned variance that says beta, the upper end of the interpolation."""

    def says_beta(x, t):
        eps = smooth(x, t)[:, :4]
        return torch.cat([eps, torch.ones_like(eps)], dim=1)

    create, step_noise = partial(create_diffusion, learn_sigma=False), lambda x, i: normal(f"step{i}", *x.shape)
    fixed = sample(sampler, lambda x, t: smooth(x, t)[:, :4], X_T, 5, create=create, step_noise=step_noise)
    learned = sample(sampler, says_beta, X_T, 5, step_noise=step_noise)
    tolerance = 0 if SAMPLERS[sampler].is_deterministic() else 1e-5
    torch.testing.assert_close(samplers.last(fixed), samplers.last(learned), rtol=0, atol=tolerance)


@pytest.mark.parametrize(("sampler", "eta"), [*((name, 0.0) for name in SAMPLERS), ("ddim", 0.5)])
def test_the_registry_says_which_samplers_are_deterministic(sampler, eta):
    outs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        outs.append(samplers.last(sample(sampler, predictor(sampler), X_T, 5, eta=eta)))
    assert torch.equal(*outs) == SAMPLERS[sampler].is_deterministic(eta)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_one_scheduler_is_built_for_a_call(sampler, monkeypatch):
    import diffusers

    scheduler, built = getattr(diffusers, SAMPLERS[sampler].scheduler), []
    make = scheduler.__init__
    monkeypatch.setattr(scheduler, "__init__", lambda *args, **options: built.append(1) or make(*args, **options))
    samplers.last(sample(sampler, smooth, X_T, 5))
    assert len(built) == 1


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_next_step_starts_from_the_sample_that_the_caller_put_into_the_dict(sampler):
    seen = []

    def denoiser(x, t):
        seen.append(x)
        return smooth(x, t)

    for out in sample(sampler, denoiser, X_T, 5):
        out["sample"] = torch.full_like(X_T, out["step"])
    assert [x.flatten()[0].item() for x in seen[1:]] == [4, 3, 2, 1]


@pytest.mark.parametrize("sampler", ["ddpm", "unipc"])
def test_a_bar_is_shown_where_asked_for(sampler, capsys):
    samplers.last(sample(sampler, smooth, X_T, 5))
    assert not capsys.readouterr().err
    samplers.last(sample(sampler, smooth, X_T, 5, progress=True))
    assert "Sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [("diffusion, diffusion.registry", {"torch", "numpy", "diffusers"}), ("diffusion.editing", {"diffusers"})],
)
def test_what_is_heavy_is_imported_where_it_is_used(modules, heavy):
    code = f"import sys, {modules}; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_no_step_waits_for_the_device(sampler):
    def on_the_device(x, t):
        return torch.cat([x, torch.full((len(x), 1, 1, 1), t, device=x.device) * x], dim=1)

    steps = sample(sampler, on_the_device, torch.empty(2, 4, 8, 8, device="meta"), 10, eta=0.5 * (sampler == "ddim"))
    next(steps)  # the first step places the tables
    with HostTraffic():
        assert len(list(steps)) == 9


# ----------------------------------------------------------------------------------------------------------------------
# DDPM and DDIM


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.7), ("ddim", 0.0)])
def test_ours_are_the_loops_of_the_original_interface_bit_for_bit(sampler, eta):
    torch.manual_seed(3)
    got = samplers.last(sample(sampler, smooth, X_T, 20, eta=eta))
    torch.manual_seed(3)
    if sampler == "ddpm":
        expected = create_diffusion("20").p_sample_loop(stub(True), X_T.shape, X_T, clip_denoised=False)
    else:
        expected = create_diffusion("ddim20").ddim_sample_loop(stub(True), X_T.shape, X_T, clip_denoised=False, eta=eta)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("num_steps", [n for n in STRIDES if 5 <= n <= 250])
def test_ddim_is_diffusers_ddim(num_steps, eta):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        trained_betas=create_diffusion("").betas,
        timestep_spacing="leading",
        steps_offset=0,
        set_alpha_to_one=True,
        clip_sample=False,
    )
    scheduler.set_timesteps(num_steps)
    x = X_T
    for i, t in zip(reversed(range(num_steps)), scheduler.timesteps, strict=True):
        noise = normal(f"step{i}", *x.shape)
        x = scheduler.step(of_images(x, t.item())[:, :4], t, x, eta=eta, variance_noise=noise).prev_sample
    steps = sample("ddim", of_images, X_T, num_steps, eta=eta, step_noise=lambda x, i: normal(f"step{i}", *x.shape))
    torch.testing.assert_close(samplers.last(steps), x, rtol=0, atol=1e-5)


def test_ddim_takes_the_stride_where_it_exists_and_else_even_steps():
    for num_steps, first in ((50, 980), (30, 986), (40, 975), (45, 999)):
        seen = []
        samplers.last(sample("ddim", recorded(smooth, seen), X_T, num_steps))
        assert (len(seen), seen[0], seen[-1]) == (num_steps, first, 0)


@pytest.mark.parametrize("fraction", [None, -1.0, -0.3, 1.0])
def test_mean_and_variance_of_ddpm_follow_their_recursion(fraction):
    """x_0 is linear in x_T and in each step's noise: sample 0 has none of them, sample 1 a unit of x_T, sample 2 + i a
    unit of step i's noise, and the squares of what they add are the variance. No random number is involved."""
    num_steps = 12
    impulse = torch.eye(num_steps + 2, dtype=torch.float64).view(num_steps + 2, 1, 1, -1)
    create = partial(create_diffusion, learn_sigma=fraction is not None)

    def denoiser(x, t):
        return gaussian.denoiser(x, t, fraction or 0.0)[:, : 1 if fraction is None else 2]

    steps = sample(
        "ddpm", denoiser, impulse[..., 1:2], num_steps, create=create, step_noise=lambda x, i: impulse[..., 2 + i : 3 + i]
    )
    expected = gaussian.ddpm_recursion(num_steps, fraction)[1:]
    for out, (mean, variance) in zip(steps, expected, strict=True):
        x = out["sample"].flatten()
        assert abs(x[0] - mean) < 1e-10
        assert abs(((x[1:] - x[0]) ** 2).sum() - variance) < 1e-10


# ----------------------------------------------------------------------------------------------------------------------
# Solvers


@pytest.mark.parametrize(
    ("sampler", "low", "high"),
    [("ddim", 0.9, 1.1), ("euler", 0.9, 1.1), ("heun", 1.9, 2.2), ("dpm-solver++", 1.9, 2.2), ("unipc", 2.8, 3.2)],
)
def test_error_against_the_exact_trajectory_falls_with_the_solvers_order(sampler, low, high):
    """At t = 250, where alpha_bar is about a half: before the last step, which is of order 1 for all. The corrector of
    UniPC raises its order by one (Zhao et al. 2023), to 3."""
    numbers = [20, 28, 40, 56, 80]
    order = gaussian.fitted_order(numbers, [gaussian.error_at(sampler, n, 250, X_T.double()) for n in numbers])
    assert low < order < high, f"{sampler} has order {order:.2f}"


@pytest.mark.parametrize(
    ("sampler", "bound"), [("ddim", 0.04), ("euler", 0.04), ("heun", 3e-3), ("dpm-solver++", 9e-3), ("unipc", 9e-3)]
)
def test_x_0_is_near_the_exact_one_after_forty_steps(sampler, bound):
    assert gaussian.error_at(sampler, 40, None, X_T.double()) < bound


def test_the_floor_is_what_the_last_step_from_the_lowest_noise_leaves():
    """The last step, from sigma_0 = 0.01 to 0, is one of Euler's, and loses sigma_0^2 / 2s of each standard deviation."""
    sigma = (1 / gaussian.ALPHA_BAR[0] - 1) ** 0.5
    z = gaussian.exact_trajectory(X_T.double(), 999, None).sub(gaussian.MU) / gaussian.S
    floor = sigma**2 / (2 * gaussian.S) * z.square().mean().sqrt().item()
    assert abs(gaussian.error_at("heun", 1000, None, X_T.double()) / floor - 1) < 0.1


@torch.no_grad()
def two_step(process, denoise, x, steps, noise):
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: a sampler of a user, which keeps its history."""
    before = None
    for i in steps:
        (alpha, sigma), (alpha_next, sigma_next) = process.alpha_sigma(i), process.alpha_sigma(i - 1)
        x_0 = process.predict_xstart_from_output(x, i, denoise(x, process.timestep_map[i]))
        if i == 0:
            x = x_0
        else:
            h = math.log(alpha_next / sigma_next) - math.log(alpha / sigma) if alpha else math.inf
            ahead = x_0 + h / (2 * before[1]) * (x_0 - before[0]) if before else x_0
            x = sigma_next / sigma * x + alpha_next * (1 - math.exp(-h)) * ahead
            before = x_0, h
        yield {"sample": x, "pred_xstart": x_0, "step": i}


def test_a_function_and_a_line_make_a_sampler_for_diffusions_and_for_flows(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "2m", Sampler("2m", "", two_step))
    monkeypatch.setitem(SAMPLERS, "flow-2m", Sampler("flow-2m", "", two_step, flow=True))
    x_T, numbers = X_T.double(), [20, 28, 40, 56, 80]
    order = gaussian.fitted_order(numbers, [gaussian.error_at("2m", n, 250, x_T) for n in numbers])
    assert 1.9 < order < 2.3, order

    errors = []
    for n in numbers:  # at s = 1/2, as at t = 250 above
        *_, out = itertools.islice(sample("flow-2m", gaussian.velocity, x_T, n), n // 2)
        exact = 0.5 * gaussian.MU + (0.25 * gaussian.S**2 + 0.25) ** 0.5 * x_T
        errors.append((out["sample"] - exact).abs().max().item())
    assert 1.8 < gaussian.fitted_order(numbers, errors) < 2.2
    for sampler, predict in (("2m", gaussian.denoiser), ("flow-2m", gaussian.velocity)):  # image to image comes with it
        assert len(list(sample(sampler, predict, x_T, 10, init=x_T, strength=0.4))) == 4


# ----------------------------------------------------------------------------------------------------------------------
# Starting from an image


@pytest.mark.parametrize("sampler", DIFFUSIONS)
def test_strength_makes_the_last_steps_only_from_the_image_at_their_noise_level(sampler):
    image, all_seen, seen, first = 0.5 * normal("x_0", *X_T.shape), [], [], []
    list(sample(sampler, recorded(smooth, all_seen), X_T, 10))

    def denoiser(x, t):
        first.append(x)
        return smooth(x, t)

    outs = list(sample(sampler, recorded(denoiser, seen), X_T, 10, init=image, strength=0.4))
    assert [out["step"] for out in outs] == [3, 2, 1, 0]
    assert seen == all_seen[-SAMPLERS[sampler].evaluations(4) :]
    alpha_bar = gaussian.alpha_bar_at(seen[0])
    torch.testing.assert_close(first[0], alpha_bar**0.5 * image + (1 - alpha_bar) ** 0.5 * X_T, rtol=1e-4, atol=1e-4)


def test_ddim_returns_to_the_inverted_image_and_closer_with_more_steps():
    image, errors = 0.5 * normal("x_0", *X_T.shape).double(), []
    for n in (20, 40, 80):
        *_, up = ddim_inversion(create_diffusion(f"ddim{n}" if n != 80 else "80"), smooth, image)
        errors.append((samplers.last(sample("ddim", smooth, up["sample"], n)) - image).abs().max().item())
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2], errors


def test_ddim_inversion_follows_the_exact_trajectory_with_order_one():
    image, errors = gaussian.MU + gaussian.S * X_T.double(), []
    for n, last_timestep in ((125, 992), (500, 998)):
        *_, up = ddim_inversion(create_diffusion(f"ddim{n}"), gaussian.denoiser, image)
        assert up["step"] == n - 1
        errors.append((up["sample"] - gaussian.exact_trajectory(image, None, last_timestep)).abs().max())
    assert 3 < errors[0] / errors[1] < 5
    assert errors[1] < 0.03


@pytest.mark.parametrize("sampler", DIFFUSIONS)
def test_inpainting_keeps_the_known_part_and_leaves_the_rest_to_the_model(sampler):
    image, mask = 0.5 * normal("x_0", *X_T.shape), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    denoiser = inpainting_denoiser(smooth, create_diffusion(""), image, mask)
    out = samplers.last(sample(sampler, denoiser, X_T, 10, step_noise=lambda x, i: normal(f"step{i}", *x.shape)))
    torch.testing.assert_close(out[..., :4], image[..., :4], rtol=0, atol=1e-4)
    free = samplers.last(sample(sampler, smooth, X_T, 10, step_noise=lambda x, i: normal(f"step{i}", *x.shape)))
    torch.testing.assert_close(out[..., 4:], free[..., 4:])  # `smooth` looks at each element alone


def test_the_known_part_of_ddpms_x_t_is_distributed_as_the_noised_image():
    image = torch.full((20000, 1, 1, 1), 0.8)
    denoiser = inpainting_denoiser(lambda x, t: torch.zeros(len(x), 2, 1, 1), create_diffusion(""), image, torch.ones(()))
    process = create_diffusion("5")
    torch.manual_seed(0)
    for out in sample("ddpm", denoiser, torch.randn_like(image), 5):
        if out["step"]:
            alpha_bar = np.cumprod(1 - process.betas)[out["step"] - 1]
            assert abs(out["sample"].mean() - alpha_bar**0.5 * 0.8) < 0.03
            assert abs(out["sample"].std() - (1 - alpha_bar) ** 0.5) < 0.03


def test_slerp_keeps_the_norm_and_meets_its_ends():
    a, b = normal("a", 3, 4, 8, 8).double(), normal("b", 3, 4, 8, 8).double()
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, 0.3), a, rtol=0, atol=1e-6)
    b = b * (a.flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(slerp(a, b, 0.3).flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
    angle = torch.acos((a * b).flatten(1).sum(1) / a.flatten(1).norm(dim=1) ** 2)
    part = torch.acos((a * slerp(a, b, 0.25)).flatten(1).sum(1) / a.flatten(1).norm(dim=1) ** 2)
    torch.testing.assert_close(part, 0.25 * angle)
