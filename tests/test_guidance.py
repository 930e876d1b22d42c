"""diffusion/guidance.py against its equations, and how often it asks the model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import SMALL, HostTraffic, fill, normal

from diffusion import create_diffusion, sample, samplers
from diffusion.guidance import combine, guided_denoiser, mix_classes, rescale_to, scale_at
from models import DiT

Y, NULL = torch.tensor([1, 2, 7]), 10
X = normal("x", 3, 4, 8, 8)


def toy(calls=None, gain=1.0):
    """A model of (x_t, t, y) whose prediction depends on all three."""

    def model(x, t, y):
        if calls is not None:
            calls.append((len(x), t, y))
        eps = gain * (x + 0.1 * y.view(-1, 1, 1, 1) * torch.cos(x) + t.view(-1, 1, 1, 1) / 1000)
        return torch.cat([eps, torch.sin(x + y.view(-1, 1, 1, 1))], dim=1)

    return model


def at(t, n=3):
    return torch.full((n,), t)


def test_scale_one_makes_no_unconditional_pass():
    calls = []
    out = guided_denoiser(toy(calls), Y, NULL)(X, 500)
    assert torch.equal(out, toy()(X, at(500), Y))
    assert [n for n, _, _ in calls] == [3]


@pytest.mark.parametrize(("channels", "guided"), [(None, 4), (4, 4), (3, 3), (1, 1)])
def test_guided_channels_are_combined_and_the_others_are_the_conditional_ones(channels, guided):
    out = guided_denoiser(toy(), Y, NULL, cfg_scale=4.0, channels=channels)(X, 500)
    cond, uncond = toy()(X, at(500), Y), toy()(X, at(500), torch.full_like(Y, NULL))
    torch.testing.assert_close(out[:, :guided], (uncond + 4 * (cond - uncond))[:, :guided])
    assert torch.equal(out[:, guided:], cond[:, guided:])


def test_guided_ddpm_is_the_original_interfaces_bit_for_bit():
    """sample.py's way, a doubled batch with the second half thrown away, and ours, given the first half of its noise."""
    model, z = fill(DiT(**SMALL)), normal("zdit", 2, 4, 8, 8)
    y, kwargs = torch.tensor([1, 2]), {"y": torch.tensor([1, 2, 10, 10]), "cfg_scale": 3.0}
    torch.manual_seed(11)
    doubled = create_diffusion("12").p_sample_loop(
        model.forward_with_cfg, (4, 4, 8, 8), torch.cat([z, z]), clip_denoised=False, model_kwargs=kwargs, device="cpu"
    )
    torch.manual_seed(11)
    noise = {"step_noise": lambda x, i: torch.randn(4, 4, 8, 8)[:2]}
    denoiser = guided_denoiser(model, y, NULL, cfg_scale=3.0, channels=model.guided_channels)
    out = samplers.last(sample("ddpm", denoiser, z, 12, **noise))
    assert torch.equal(out, doubled[:2])


def test_outside_the_interval_the_unconditional_half_is_not_computed():
    calls = []
    denoiser = guided_denoiser(toy(calls), Y, NULL, cfg_scale=4.0, interval=(0.2, 0.6))
    samplers.last(sample("ddim", denoiser, X, 50))
    sizes = {int(t[0]): n for n, t, _ in calls}
    assert sizes == {t: 6 if 200 <= t <= 600 else 3 for t in range(0, 1000, 20)}
    assert torch.equal(denoiser(X, 601), toy()(X, at(601), Y))
    assert torch.equal(denoiser(X, 600), guided_denoiser(toy(), Y, NULL, cfg_scale=4.0)(X, 600))


@given(t=st.floats(0, 999), scale=st.floats(-2, 20))
def test_schedules_rise_from_no_guidance_at_pure_noise_to_the_full_scale(t, scale):
    assert scale_at(t, scale) == scale
    s = 1 - t / 1000
    assert scale_at(t, scale, schedule="linear") == pytest.approx(1 + (scale - 1) * s)
    assert scale_at(t, scale, schedule="power-cosine") == pytest.approx(
        1 + (scale - 1) * (1 - math.cos(math.pi * s**4)) / 2
    )
    assert scale_at(1000, scale, schedule="power-cosine") == scale_at(1000, scale, schedule="linear") == 1
    assert scale_at(0, scale, schedule="power-cosine") == scale_at(0, scale, schedule="linear") == scale


def test_a_weaker_model_guides_with_the_same_condition_and_no_doubled_batch():
    calls, weak_calls = [], []
    out = guided_denoiser(toy(calls), Y, NULL, cfg_scale=2.0, guide=toy(weak_calls, gain=0.8))(X, 300)
    cond, weak = toy()(X, at(300), Y), toy(gain=0.8)(X, at(300), Y)
    torch.testing.assert_close(out, torch.cat([(weak + 2 * (cond - weak))[:, :4], cond[:, 4:]], dim=1))
    assert [n for n, _, _ in calls] == [n for n, _, _ in weak_calls] == [3]
    assert torch.equal(weak_calls[0][2], Y)


def test_rescaling_gives_each_sample_the_conditional_standard_deviation():
    cond, uncond = normal("cond", 3, 4, 8, 8), normal("uncond", 3, 4, 8, 8)
    guided = combine(cond, uncond, 5.0)
    full = rescale_to(guided, cond, 1.0)
    torch.testing.assert_close(full.std((1, 2, 3)), cond.std((1, 2, 3)))
    torch.testing.assert_close(rescale_to(guided, cond, 0.7), 0.7 * full + 0.3 * guided)
    out = guided_denoiser(toy(), Y, NULL, cfg_scale=5.0, channels=3, rescale=1.0)(X, 500)
    torch.testing.assert_close(out[:, :3].std((1, 2, 3)), toy()(X, at(500), Y)[:, :3].std((1, 2, 3)))


@pytest.mark.parametrize(
    "options", [{"schedule": "square"}, {"interval": (0.6, 0.2)}, {"interval": (0.1, 600)}, {"rescale": 1.5}]
)
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="guidance"):
        guided_denoiser(toy(), Y, NULL, cfg_scale=2.0, **options)


def test_timesteps_reach_the_model_as_they_are():
    calls = []
    denoiser = guided_denoiser(toy(calls), Y, NULL, cfg_scale=2.0)
    denoiser(X, 7), denoiser(X, 7.5)
    assert [(t.dtype, t.tolist()) for _, t, _ in calls] == [(torch.int64, [7] * 6), (torch.float32, [7.5] * 6)]


def test_no_step_of_guided_sampling_waits_for_the_device():
    x_T, y = torch.empty(3, 4, 8, 8, device="meta"), Y.to("meta")
    denoiser = guided_denoiser(toy(), y, NULL, cfg_scale=2.0, interval=(0.3, 0.6), schedule="linear", rescale=0.5)
    steps = sample("ddim", denoiser, x_T, 10)
    next(steps)  # the first step places the tables
    with HostTraffic():
        assert len(list(steps)) == 9


def test_mixed_classes_interpolate_between_embeddings():
    model = fill(DiT(**SMALL))
    x, t, table = normal("x", 2, 4, 8, 8), at(400, 2), model.y_embedder.embedding_table.weight
    y_from, y_to = torch.tensor([3, 4]), torch.tensor([8, 10])
    mixed = mix_classes(y_from, y_to, 0.25, num_classes=10)
    torch.testing.assert_close(model.y_embedder(mixed), 0.75 * table[y_from] + 0.25 * table[y_to])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, mix_classes(y_from, y_to, 0.0, 10)), model(x, t, y_from))
        weights = guided_denoiser(model, mix_classes(y_from, y_to, 1.0, 10), NULL, cfg_scale=3.0)(x, 400)
        torch.testing.assert_close(weights, guided_denoiser(model, y_to, NULL, cfg_scale=3.0)(x, 400))
