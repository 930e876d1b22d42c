"""The newer ideas that train.py and the samplers offer as switches: each against its equation, exact resume, bad values.
Data for the closed forms is N(MU, S^2) in every element (studies/gaussian.py)."""

import functools

import numpy as np
import pytest
import torch
from conftest import TINY
from helpers import assert_same_state, call, latest, without_timings
from reference import SMALL, normal, stub
from scipy import stats

import sample as sample_command
import train
from checkpoint import files
from checkpoint.config import ModelOptions
from checkpoint.opened import Checkpoint
from data.autoencoder import LatentSpace, Pixels
from data.images import Digits
from data.order import GlobalOrder, make_loader
from diffusion import check_sampler, create_diffusion, make_objective, sample, samplers
from diffusion.flow import Flow, eps_denoiser, flow_log_likelihood
from diffusion.registry import OBJECTIVES, SAMPLERS, Objective
from models import DiT
from runtime import distributed
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline
from studies.gaussian import ALPHA_BAR, MU, S, alpha_bar_at, denoiser, velocity
from tools import convert
from training.config import PRESETS, ComputeConfig, RecipeConfig
from training.setup import build_model, default_time_shift
from training.trainer import Trainer

X_T = normal("flow", 400, 1, 4, 4)
ONE_IMAGE = ("--labels", 3, "--num-sampling-steps", 4, "--device", "cpu")


def flow_error(method, num_steps, time_shift=1.0):
    """RMS error of x_0: the exact flow keeps (x_s - mean) / std."""
    x_0 = samplers.last(sample(f"flow-{method}", velocity, X_T, num_steps, time_shift=time_shift))
    return (x_0 - (MU + S * X_T)).square().mean().sqrt().item()


# ----------------------------------------------------------------------------------------------------------------------
# Flow


@pytest.mark.parametrize("time_shift", [1.0, 2.0])
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_solvers_of_flows_have_their_order_on_gaussian_data(method, order, time_shift):
    errors = [flow_error(method, num_steps, time_shift) for num_steps in (20, 40, 80)]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.02
    # Heun's last step is of order 1, but of length 1/N in time and nearly straight: it must not dominate
    assert (orders > order - 0.25).all(), (errors, orders)


def test_the_likelihood_of_a_flow_of_gaussian_data_is_exact():
    """Its Jacobian is diagonal, so that the probe, whose entries are +1 and -1, gives the divergence itself."""
    x_0 = (MU + S * normal("data", 50, 1, 4, 4)).double()
    probe = torch.randint(2, x_0.shape).double() * 2 - 1
    expected = torch.distributions.Normal(MU, S).log_prob(x_0).flatten(1).sum(1)
    errors = []
    for num_steps in (20, 40, 80):
        prior, integrals = flow_log_likelihood(velocity, x_0, num_steps, probe)
        assert integrals.shape == (50, num_steps)
        errors.append((prior + integrals.sum(1) - expected).abs().max().item())
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.01
    assert (orders > 1.75).all(), (errors, orders)


@pytest.mark.parametrize("time_shift", [1.0, 3.0])
def test_flow_sde_draws_the_datas_mean_and_spread(time_shift):
    torch.manual_seed(0)
    x_T = torch.randn(20_000, 1, 1, 1)
    x_0 = samplers.last(sample("flow-sde", velocity, x_T, 200, time_shift=time_shift))
    assert x_0.mean() == pytest.approx(MU, abs=0.015)
    assert x_0.std() == pytest.approx(S, abs=0.015)
    assert abs(torch.corrcoef(torch.stack([x_0.flatten(), x_T.flatten()]))[0, 1]) < 0.9  # the noise of the steps counts


def test_a_time_shift_moves_the_levels_as_published_and_one_changes_no_bit():
    assert Flow(num_timesteps=50, time_shift=1.0).levels == Flow(num_timesteps=50).levels
    levels = Flow(num_timesteps=4, time_shift=3.0).levels
    assert levels == pytest.approx([0.75 / 1.5, 1.5 / 2, 2.25 / 2.5, 1.0])
    ratios = [s / (1 - s) for s in levels[:3]]  # noise to signal: three times as much at each level
    assert ratios == pytest.approx([3 * s / (1 - s) for s in (0.25, 0.5, 0.75)])


def test_the_default_shift_keeps_the_error_of_what_many_numbers_have_in_common():
    """Gaussian data of d numbers that share half of their variance: the exact velocity is known for their scaled mean, of
    variance (d + 1) / 2, and for the rest, of variance 1/2. After 20 steps the mean's spread is too small."""

    def spread(numbers, time_shift):
        """Standard deviation over its true value: (of what is in common, of the rest)."""
        variances = torch.tensor([(numbers + 1) / 2, 0.5], dtype=torch.float64)

        def velocity(x, t):
            s = t / 1000
            return (s - (1 - s) * variances) / ((1 - s) ** 2 * variances + s**2) * x

        drawn = sample("flow-heun", velocity, torch.ones(1, 2, dtype=torch.float64), 20, time_shift=time_shift)
        return (samplers.last(drawn) / variances.sqrt())[0].tolist()

    common, rest = spread(4096, 1.0)
    assert (common, rest) == pytest.approx((0.554, 0.998), abs=1e-3)
    for numbers, without in ((16384, 0.308), (196608, 0.092)):
        shifted, rest = spread(numbers, default_time_shift(numbers))
        assert spread(numbers, 1.0)[0] == pytest.approx(without, abs=1e-3)
        assert shifted == pytest.approx(common, abs=0.01)
        assert rest > 0.88, "the steps that are left for it are longer"


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
def test_timesteps_of_training_follow_the_shifted_distribution(sampling):
    """Kolmogorov-Smirnov: logit t of a shifted time is logit t of the time itself plus log s."""
    dataset, recipe = Digits(image_size=8), RecipeConfig(global_batch_size=100, timestep_sampling=sampling)
    sizes = {"input_size": 8, "in_channels": 1, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 10}
    model, found = DiT(**sizes, objective="flow", predict="v", learn_sigma=False, time_shift=2.5), []
    trainer = Trainer(recipe, ComputeConfig(), distributed.setup("cpu"), model, Pixels(channels=1))
    losses = trainer.objective.training_losses
    trainer.objective.training_losses = lambda model, x, t, *rest: found.append(t) or losses(model, x, t, *rest)
    for batch in make_loader(dataset, GlobalOrder(len(dataset), 100, seed=0, stop=2000)):
        trainer.step(batch)
    s = torch.cat(found).double().numpy() / 1000
    logits = np.log(s / (1 - s)) - np.log(2.5)
    assert stats.kstest(logits, {"uniform": "logistic", "logit-normal": "norm"}[sampling]).pvalue > 0.01
    assert stats.kstest(logits + np.log(2.5), {"uniform": "logistic", "logit-normal": "norm"}[sampling]).pvalue < 1e-9


def test_flow_losses_are_those_of_the_velocity_and_the_model_is_told_1000_s():
    x_0, noise, t = normal("x0", 3, 1, 4, 4), normal("noise", 3, 1, 4, 4), torch.tensor([100.0, 500.0, 900.0])
    seen = []

    def model(x_s, t, y):
        seen.append((x_s, t))
        return noise - x_0 + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)

    losses = Flow().training_losses(model, x_0, t, {"y": None}, noise)
    torch.testing.assert_close(losses["loss"], torch.tensor([0.0, 1.0, 4.0]))
    torch.testing.assert_close(seen[0][0][1], (x_0[1] + noise[1]) / 2)
    assert torch.equal(seen[0][1], t)


def test_image_to_image_with_a_flow_starts_from_the_noised_image():
    started, init = [], normal("init", 2, 1, 4, 4)

    def recording(x, t):
        started.append((x, t))
        return velocity(x, t)

    list(sample("flow-euler", recording, X_T[:2], 10, init=init, strength=0.3))
    torch.testing.assert_close(started[0][0], 0.7 * init + 0.3 * X_T[:2])
    assert [t for _, t in started] == pytest.approx([300, 200, 100])


# ----------------------------------------------------------------------------------------------------------------------
# Predictions and their conversion


@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_target_and_prediction_are_inverse(predict):
    process, t = create_diffusion("", predict=predict), torch.tensor([0, 400, 999])
    x_0, noise = normal("x0", 3, 2, 4, 4).double(), normal("noise", 3, 2, 4, 4).double()
    target = process.target(x_0, t, noise)
    torch.testing.assert_close(process.predict_xstart_from_output(process.q_sample(x_0, t, noise), t, target), x_0)


@pytest.mark.parametrize(("objective", "predict"), [("diffusion", "v"), ("flow", "v")])
@pytest.mark.parametrize("t", [0, 10.5, 500, 999])
def test_every_prediction_is_converted_to_the_same_eps(objective, predict, t):
    def model(x_t, t):
        if objective == "flow":
            return velocity(x_t, t)
        alpha_bar = alpha_bar_at(t)
        eps = denoiser(x_t, t)[:, :1]
        x_0 = (x_t - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
        v = alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x_0
        return torch.cat([v, torch.zeros_like(eps)], dim=1)

    x_t = X_T.double()
    converted = eps_denoiser(model, objective, predict, ALPHA_BAR)(x_t, t)
    expected = denoiser(x_t, t)[:, : converted.shape[1]]
    torch.testing.assert_close(converted, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++", "unipc", "heun", "euler"])
def test_samplers_of_diffusions_draw_from_a_flow(sampler):
    """As from a model of eps: the two have the same trajectories where signal and noise have the same ratio."""
    convert = eps_denoiser(velocity, "flow", "v", ALPHA_BAR)
    ours = samplers.last(sample(sampler, lambda x, t: torch.cat([convert(x, t), 0 * x], 1), X_T, 20))
    torch.testing.assert_close(ours, samplers.last(sample(sampler, denoiser, X_T, 20)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("process", [create_diffusion(""), Flow()], ids=["diffusion", "flow"])
def test_logit_normal_timesteps_have_the_quantiles_of_the_sigmoid_of_a_normal(process):
    torch.manual_seed(0)
    t = process.draw_timesteps(100_000, "cpu", "logit-normal")
    found = torch.quantile(t.double() / 1000, torch.tensor([0.1586553, 0.5, 0.8413447], dtype=torch.double))
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0]).double().sigmoid(), atol=0.01, rtol=0)
    assert t.min() >= 0
    assert t.max() < 1000


# ----------------------------------------------------------------------------------------------------------------------
# Objectives


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_its_models_and_names_a_sampler_that_draws_from_them(name):
    objective = OBJECTIVES[name]
    model = DiT(**SMALL, objective=name, predict=objective.predicts[0], learn_sigma=False)
    made = make_objective(name, model.predict, model.learn_sigma)
    t = made.draw_timesteps(3, "cpu", "uniform")
    losses = made.training_losses(model, normal("x0", 3, 4, 8, 8), t, {"y": torch.tensor([1, 2, 3])})
    assert all(values.shape == (3,) for values in losses.values())
    assert "loss" in losses
    sampler, num_steps = objective.default_sampler
    check_sampler(sampler, num_steps)
    assert not SAMPLERS[sampler].flow or objective.flow


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_the_objective_of_the_paper_is_the_original_interfaces_process(predict):
    ours = make_objective("diffusion", predict)
    process = create_diffusion("", predict=predict)
    x_0, noise, t = normal("x0", 3, 4, 8, 8), normal("noise", 3, 4, 8, 8), torch.tensor([0, 400, 999])
    expected = process.training_losses(stub(True), x_0, t, noise=noise)
    losses = ours.training_losses(stub(True), x_0, t, noise=noise)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], expected[name]) for name in losses)


def test_objectives_refuse_what_they_lack():
    for options in (("flow", "eps", False), ("diffusion", "score"), ("flow", "v", True)):
        with pytest.raises(ValueError, match="predicts"):
            make_objective(*options)


def test_a_class_and_a_line_make_an_objective_that_names_its_losses(monkeypatch):
    class Huber(Flow):
        def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
            losses = super().training_losses(model, x_start, t, model_kwargs, noise)
            return {"loss": (losses["mse"] + 1).sqrt() - 1, "huber": (losses["mse"] + 1).sqrt() - 1}

    monkeypatch.setitem(OBJECTIVES, "flow-huber", Objective(Huber, ("v",), ("flow-heun", 20), flow=True))
    made = make_objective("flow-huber", learn_sigma=False)
    assert set(made.training_losses(lambda x, t: 0 * x, X_T, made.draw_timesteps(400, "cpu"))) == {"loss", "huber"}
    converted = eps_denoiser(velocity, "flow-huber", "v", ALPHA_BAR)  # its models are drawn as a flow's
    torch.testing.assert_close(converted(X_T, 500), denoiser(X_T, 500)[:, :1], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# The model's switches


def attention_products(model):
    """Of the same query and the same key at each pair of places of the model's grid: (*grid, *grid)."""
    from timm.layers import apply_rot_embed_cat

    rotations = model.rotations("cpu")  # (T, 2d)
    tokens, size = len(rotations), rotations.shape[1] // 2
    q, k = (normal(name, 1, 1, 1, size).expand(1, 1, tokens, size) for name in "qk")
    products = (apply_rot_embed_cat(q, rotations) @ apply_rot_embed_cat(k, rotations).transpose(-1, -2))[0, 0]
    return products.view(model.sizes.grid * 2)


def test_rotary_positions_of_a_clip_depend_on_differences_of_time_and_place():
    grid = attention_products(DiT(**{**SMALL, "num_heads": 4, "input_size": (3, 8, 8), "patch_size": (1, 2, 2)}, rope=True))
    torch.testing.assert_close(grid[0, 0, 0, 1, 1, 2], grid[1, 2, 1, 2, 3, 3])
    sides = [grid[0, 0, 0, 1, 0, 0], grid[0, 0, 0, 0, 1, 0], grid[0, 0, 0, 0, 0, 1]]
    assert len({round(float(value), 3) for value in sides}) == 3, "each side has a part of its own"


def test_rotary_positions_make_attention_depend_on_differences_of_positions():
    grid = attention_products(DiT(**SMALL, rope=True))  # row and column of q, row and column of k
    torch.testing.assert_close(grid[0, 0, 1, 2], grid[2, 1, 3, 3])
    torch.testing.assert_close(grid[1, 0, 0, 0], grid[3, 2, 2, 2])
    assert not torch.isclose(grid[0, 0, 1, 2], grid[0, 0, 2, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "flow"}, "objective 'flow' with 'eps'"),
        ({"rope": True, "block": "in-context"}, "in-context"),
        ({"rope": True, "hidden_size": 24, "num_heads": 4}, "multiple of 4"),
    ],
)
def test_models_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**SMALL, **options})


# ----------------------------------------------------------------------------------------------------------------------
# Whole commands

SWITCHES = {
    "rope": ["--predict", "v", "--rope"],
    "flow": ["--objective", "flow", "--timestep-sampling", "logit-normal", "--time-shift", 2.0],
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_resumed_run_with_switches_is_the_uninterrupted_one_and_can_be_drawn_from(name, tmp_path):
    base = [*TINY, *SWITCHES[name]]
    assert call(train.main, *base, "--max-steps", 6, "--run-dir", tmp_path / "whole") == 0
    assert call(train.main, *base, "--max-steps", 2, "--run-dir", tmp_path / "parts") == 0
    assert call(train.main, *base, "--max-steps", 6, "--run-dir", tmp_path / "parts") == 0
    assert_same_state(latest(tmp_path / "whole"), latest(tmp_path / "parts"))
    assert without_timings(tmp_path / "whole") == without_timings(tmp_path / "parts")
    checkpoint = tmp_path / "parts/checkpoints/0000006.pt"
    for sampler in ["ddpm", "dpm-solver++"] + (["flow-heun"] if name == "flow" else []):
        output = tmp_path / f"{sampler}.png"
        argv = ("--ckpt", checkpoint, *ONE_IMAGE, "--sampler", sampler, "--output", output)
        assert call(sample_command.main, *argv) == 0
        assert output.exists()


def test_large_latents_of_flows_are_shifted_as_published():
    model, flow = functools.partial(ModelOptions, hidden_size=16, depth=1, num_heads=2), {"objective": "flow"}

    def shift(space, side, **options):
        with torch.device("meta"):
            return build_model(model(image_size=side, **options), RecipeConfig(), space).time_shift

    assert shift(LatentSpace(4, 8, 0.18215, 0.0), 256, **flow) == 1, "Stable Diffusion's 4,096 numbers stay as they were"
    assert shift(LatentSpace(4, 8, 0.18215, 0.0), 64, **flow) == 1, "and fewer"
    assert shift(LatentSpace(16, 8, 1.0, 0.0), 512, **flow) == 4
    assert shift(LatentSpace(768, 16, 1.0, 0.0), 256, **flow) == pytest.approx(48**0.5)
    assert shift(LatentSpace(16, 8, 1.0, 0.0), 512, **flow, time_shift=1.5) == 1.5
    assert shift(LatentSpace(16, 8, 1.0, 0.0), 512) == shift(Pixels(3), 128, **flow) == 1


def test_a_resumed_or_finetuned_run_keeps_the_time_shift_of_its_checkpoint(tmp_path, capsys):
    base = [*TINY, "--objective", "flow"]
    assert call(train.main, *base, "--time-shift", 2.0, "--max-steps", 2, "--run-dir", tmp_path / "run") == 0
    assert "The time of the flow is shifted by 2 (--time-shift)" in (tmp_path / "run/log.txt").read_text()
    assert call(train.main, *base, "--max-steps", 3, "--run-dir", tmp_path / "run") == 0
    assert latest(tmp_path / "run")["model_config"]["time_shift"] == 2
    assert call(train.main, *base, "--time-shift", 3.0, "--max-steps", 4, "--run-dir", tmp_path / "run") == 2
    assert "model time_shift 2.0, now 3.0" in capsys.readouterr().err
    for given, expected in (([], 2), (["--time-shift", 1.0], 1)):
        argv = [*TINY, "--init-from", tmp_path / "run", *given, "--max-steps", 1]
        assert call(train.main, *argv, "--run-dir", tmp_path / f"tuned-{expected}") == 0
        assert latest(tmp_path / f"tuned-{expected}")["model_config"]["time_shift"] == expected
    assert call(train.main, *TINY, "--time-shift", 2.0, "--run-dir", tmp_path / "diffusion") == 2
    assert "--time-shift 2.0: a diffusion has none; pass --objective flow" in capsys.readouterr().err


def test_a_sampler_takes_the_models_time_shift():
    model = DiT(**{**SMALL, "objective": "flow", "predict": "v", "learn_sigma": False, "time_shift": 3.0}).eval()
    pipeline, seen = Pipeline(model, Pixels(model.in_channels), SamplerConfig("flow-euler", 4), GuidanceConfig(1.0)), []
    model.register_forward_pre_hook(lambda module, args: seen.append(float(args[1][0])))
    pipeline([1], torch.zeros(1, *pipeline.shape))
    assert seen == pytest.approx([1000.0, 900.0, 750.0, 500.0])


def test_a_recipe_stands_for_the_same_from_python():
    given = {"data_path": "digits", "vae": "none", "recipe": "fast"}
    words = ["--data-path", "digits", "--vae", "none", "--recipe", "fast"]
    assert train.TrainConfig.from_flat(given) == train.make_parser().parse(words)
    assert train.TrainConfig.from_flat(given | {"objective": "diffusion"}).model.objective == "diffusion"


def test_a_recipe_is_recorded_in_full_and_what_is_given_wins(tmp_path):
    assert call(train.main, *TINY, "--recipe", "fast", "--max-steps", 1, "--run-dir", tmp_path / "fast") == 0
    state = latest(tmp_path / "fast")
    assert all(state["args"][name] == value for name, value in PRESETS["fast"].items())
    assert state["model_config"]["objective"] == "flow"
    assert "--recipe fast is --objective flow --timestep-sampling logit-normal" in (tmp_path / "fast/log.txt").read_text()
    argv = [*TINY, "--recipe", "fast", "--objective", "diffusion", "--max-steps", 1]
    assert call(train.main, *argv, "--run-dir", tmp_path / "mixed") == 0
    state = latest(tmp_path / "mixed")
    assert state["model_config"]["objective"] == "diffusion"
    assert state["args"]["timestep_sampling"] == "logit-normal"
    assert call(train.main, *TINY, "--max-steps", 2, "--run-dir", tmp_path / "fast") == 2  # the paper's recipe now


def test_a_run_with_an_option_that_was_removed_needs_consent_to_go_on_and_can_be_drawn_from(tmp_path, capsys):
    run, argv = tmp_path / "run", [*TINY, "--max-steps", 2, "--run-dir", tmp_path / "run"]
    assert call(train.main, *argv) == 0
    path = run / "checkpoints/0000002.pt"
    state = files.load(path)
    state["args"] |= {"loss_weight": "min-snr", "ddp_comm": "fp32"}
    files.save(path, state)
    argv[argv.index("--max-steps") + 1] = 4
    capsys.readouterr()
    assert call(train.main, *argv) == 2
    error = "made with --loss-weight min-snr, now uniform (the option was removed); pass --allow-changes\n"
    assert capsys.readouterr().err.endswith(error)
    assert call(sample_command.main, "--ckpt", path, *ONE_IMAGE, "--output", tmp_path / "out.png") == 0
    assert call(train.main, *argv, "--allow-changes") == 0
    assert "Changed on resuming: --loss-weight min-snr, now uniform (the option was removed)" in capsys.readouterr().out
    assert call(train.main, *argv) == 0, "which is recorded: the next time there is nothing to ask"


def test_switches_survive_safetensors_and_are_refused_where_they_would_be_lost(tmp_path, capsys):
    assert call(train.main, *TINY, "--predict", "v", "--max-steps", 2, "--run-dir", tmp_path / "run") == 0
    checkpoint = tmp_path / "run/checkpoints/0000002.pt"
    assert call(convert.main, checkpoint, tmp_path / "v.safetensors") == 0
    assert Checkpoint.open(tmp_path / "v.safetensors").model_config["predict"] == "v"
    capsys.readouterr()
    for target in ("v.pt", "v"):
        assert call(convert.main, checkpoint, tmp_path / target) == 2
        assert "--predict v" in capsys.readouterr().err
        assert not (tmp_path / target).exists()
