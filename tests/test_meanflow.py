"""MeanFlow: its equations, its product of Jacobian and vector, and whole commands. Data for the closed forms is N(MU, S^2)
in every element (studies/gaussian.py)."""

import diffusers  # noqa: F401 -- forked processes start faster with what is imported here already
import numpy as np
import pytest
import sklearn.datasets  # noqa: F401
import torch
from conftest import TINY
from helpers import SHARDS, assert_same_state, call, latest, without_timings
from hypothesis import given
from hypothesis import strategies as st
from reference import normal
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import sample as sample_command
import train
from checkpoint.opened import Checkpoint
from data.autoencoder import Pixels
from diffusion import sample
from diffusion.flow import Flow
from diffusion.meanflow import MeanFlow, average_slope
from models import BLOCKS, DiT, TimestepEmbedder
from runtime.distributed import Context, processes
from runtime.errors import UserError
from sampling import web
from sampling.config import GuidanceConfig, SamplerConfig
from sampling.pipeline import Pipeline
from studies.gaussian import MU, S
from tools import convert
from training.config import ComputeConfig, RecipeConfig
from training.cost import build, forward_macs, training_flops
from training.trainer import Trainer

SMALL = {"input_size": 8, "in_channels": 1, "hidden_size": 24, "depth": 2, "num_heads": 2, "num_classes": 10}
MEANFLOW = [*TINY, "--objective", "meanflow", "--recipe", "fast", "--guidance-in-target", 2]


def make_model(**options):
    """A model of which no weight is zero, so that r counts."""
    torch.manual_seed(0)
    model = DiT(**{**SMALL, "objective": "meanflow", "predict": "v", "learn_sigma": False, **options})
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def variance(s, std=S):
    """Of x_s."""
    return (1 - s) ** 2 * std**2 + s**2


def average_velocity(x, s, r, mean=MU, std=S):
    """u of Gaussian data in closed form: its flow keeps (x_s - (1 - s) mean) / std_s. Written without 0 / 0 at s = r."""
    std_s, std_r = variance(s, std) ** 0.5, variance(r, std) ** 0.5
    factor = ((1 + std**2) * (s + r) - 2 * std**2) / (std_s * (std_s + std_r))  # (1 - std_r / std_s) / (s - r)
    return factor * (x - (1 - s) * mean) - mean


# ----------------------------------------------------------------------------------------------------------------------
# Equations


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_loss_is_its_formula(guidance):
    """With u = a x + b y s + e r, whose slope is du/ds = a v + b y where v = u(x, s, s)."""
    a, b, e = 0.3, 0.7, -0.4

    def model(x, t, y, r=None):
        s, r = (values.view(-1, 1, 1, 1) / 1000 for values in (t, t if r is None else r))
        return a * x + b * y.view(-1, 1, 1, 1) * s + e * r

    x_0, noise, y = normal("x0", 3, 1, 4, 4).double(), normal("noise", 3, 1, 4, 4).double(), torch.tensor([2.0, 0, 1])
    t = torch.tensor([[900.0, 300.0], [500.0, 500.0], [700.0, 100.0]], dtype=torch.float64)
    objective = MeanFlow(guidance=guidance, null=torch.zeros_like)
    losses = objective.training_losses(model, x_0, t, {"y": y}, noise)
    for i in range(3):
        s, r = t[i] / 1000
        x_s = (1 - s) * x_0[i] + s * noise[i]
        u, velocity = a * x_s + b * y[i] * s + e * r, a * x_s + b * y[i] * s + e * s
        unguided = velocity - b * y[i] * s  # y = 0 is no condition
        wanted = noise[i] - x_0[i] + (1 - 1 / guidance) * (velocity - unguided)
        error = u + (s - r) * (a * velocity + b * y[i]) - wanted
        assert losses["mse"][i].item() == pytest.approx(error.square().mean().item(), rel=1e-12)
        assert losses["loss"][i].item() == pytest.approx(np.log(error.square().mean().item() + 1e-3), rel=1e-12)


def test_the_gradient_is_that_of_the_weighted_square_of_u_alone():
    """Neither the target nor the weight 1 / (mse + c) has a gradient."""
    model, x_0, noise = make_model().double(), normal("x0", 4, 1, 8, 8).double(), normal("noise", 4, 1, 8, 8).double()
    t = torch.tensor([[900.0, 300.0], [500.0, 500.0], [700.0, 100.0], [10.0, 0.0]], dtype=torch.float64)
    y, objective = torch.arange(4), MeanFlow(guidance=2.0, null=lambda y: torch.full_like(y, 10))
    objective.training_losses(model, x_0, t, {"y": y}, noise)["loss"].sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    s, r = (values.view(-1, 1, 1, 1) / 1000 for values in t.unbind(1))
    x_s = (1 - s) * x_0 + s * noise
    with torch.no_grad():
        velocity, unguided = model(x_s, t[:, 0], y), model(x_s, t[:, 0], torch.full_like(y, 10))
        slope = average_slope(model, x_s, *t.unbind(1), y, velocity)
        target = noise - x_0 + (velocity - unguided) / 2 - (s - r) * slope
    squares = (model(x_s, t[:, 0], y, t[:, 1]) - target).square().flatten(1).mean(1)
    (squares / (squares.detach() + 1e-3)).sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"block": block} for block in BLOCKS] + [{"rope": True}], ids=str)
def test_the_product_is_that_of_finite_differences_and_of_double_backward(options):
    model = make_model(**options).double()
    x, v = normal("x", 3, 1, 8, 8).double(), normal("v", 3, 1, 8, 8).double()
    (t, r), y = torch.tensor([[900.0, 500.0, 10.0], [300.0, 0.0, 10.0]]).double(), torch.arange(3)
    found, h = average_slope(model, x, t, r, y, v), 1e-6
    with torch.no_grad():
        differences = (model(x + h * v, t + 1000 * h, y, r) - model(x - h * v, t - 1000 * h, y, r)) / (2 * h)
    torch.testing.assert_close(found, differences, rtol=0, atol=1e-6 * differences.abs().max().item())
    with sdpa_kernel(SDPBackend.MATH):
        x, t = x.requires_grad_(), t.requires_grad_()
        u = model(x, t, y, r)
        weights = torch.zeros_like(u, requires_grad=True)  # of a linear function of them, whose gradient is the product
        by_x, by_t = torch.autograd.grad(u, (x, t), weights, create_graph=True)
        (product,) = torch.autograd.grad((by_x * v).sum() + 1000 * by_t.sum(), weights)
    torch.testing.assert_close(found, product, rtol=1e-6, atol=1e-9)


def test_where_r_is_t_the_model_and_its_loss_are_a_flows():
    model, x_0, noise = make_model(), normal("x0", 3, 1, 8, 8), normal("noise", 3, 1, 8, 8)
    t, y = torch.tensor([100.0, 500.0, 900.0]), torch.arange(3)
    assert torch.equal(model(x_0, t, y), model(x_0, t, y, t))
    assert not torch.allclose(model(x_0, t, y), model(x_0, t, y, 0 * t))
    found, flow = (objective.training_losses(model, x_0, t, {"y": y}, noise) for objective in (MeanFlow(), Flow()))
    assert torch.equal(found["mse"], flow["mse"])


@given(st.integers(1, 300), st.sampled_from(["uniform", "logit-normal"]))
def test_one_sample_of_four_has_r_below_t(number, sampling):
    t, r = MeanFlow().draw_timesteps(number, "cpu", sampling).unbind(1)
    assert ((r >= 0) & (r <= t) & (t <= 1000)).all()
    assert (r < t).sum() == -(-number // 4)


def test_timesteps_have_the_papers_quantiles():
    torch.manual_seed(0)
    t = MeanFlow().draw_timesteps(200_000, "cpu", "logit-normal")[::4].flatten() / 1000
    assert t.quantile(0.5) == pytest.approx(torch.tensor(-0.4).sigmoid().item(), abs=0.005)
    assert t.quantile(0.8413) == pytest.approx(torch.tensor(0.6).sigmoid().item(), abs=0.005)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_sampler_is_exact_with_the_exact_average_velocity(num_steps):
    def denoise(x, t, r):
        return average_velocity(x, t / 1000, r / 1000)

    x_T = normal("x_T", 10, 1, 4, 4).double()
    outs = list(sample("meanflow", denoise, x_T, num_steps))
    assert [out["step"] for out in outs] == [*range(num_steps)][::-1]
    torch.testing.assert_close(outs[-1]["sample"], MU + S * x_T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(outs[-1]["pred_xstart"], outs[-1]["sample"], rtol=1e-9, atol=1e-9)


class Guess(nn.Module):
    """u for another mean and spread, and an error that vanishes where r = s, so that nothing but the slope corrects it."""

    def __init__(self):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64))
        self.error = nn.Parameter(torch.full((2, 6), 0.3, dtype=torch.float64))

    def forward(self, x, t, y, r=None):
        s, r = t / 1000, (t if r is None else r) / 1000
        error = self.error @ torch.stack([s**i * r**j for i in range(3) for j in range(3 - i)])
        s, r, factor, shift = (values.view(-1, 1, 1, 1) for values in (s, r, *error))
        return average_velocity(x, s, r, *self.numbers) + (s - r) * (factor * x + shift)


def test_training_finds_the_average_velocity_of_gaussian_data():
    torch.manual_seed(0)
    model, objective, steps = Guess(), MeanFlow(), 300
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x_0, noise = torch.randn(2, 256, 1, 4, 4, dtype=torch.float64)
        x_0, t = MU + S * x_0, objective.draw_timesteps(256, "cpu").double()
        s = t[:, 0].view(-1, 1, 1, 1) / 1000
        # each pair, and the one of the same x_s that is as likely and as far from the mean: their mean v is exact
        score = ((1 - s) * (x_0 - MU) + s * noise) / variance(s)
        x_0, noise = torch.cat([x_0, 2 * (MU + (1 - s) * S**2 * score) - x_0]), torch.cat([noise, 2 * s * score - noise])
        optimizer.zero_grad()
        t = torch.cat([t, t])
        objective.training_losses(model, x_0, t, {"y": t[:, 0]}, noise)["loss"].mean().backward()
        optimizer.step()
        schedule.step()
    s, r = torch.rand(2, 4096, 1, 1, 1, dtype=torch.float64).sort(dim=0, descending=True).values
    x_s = (1 - s) * MU + variance(s).sqrt() * torch.randn(4096, 1, 4, 4)
    with torch.no_grad():
        error = model(x_s, 1000 * s.flatten(), None, 1000 * r.flatten()) - average_velocity(x_s, s, r)
    assert error.square().mean().sqrt() < 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# The training step


def gradients(context, **compute):
    """Of a batch of eight, of which each process has its part: {name: gradient}, and the losses of all."""
    recipe = RecipeConfig(global_batch_size=8, guidance_in_target=2.0)
    trainer = Trainer(recipe, ComputeConfig(**compute), context, make_model(depth=3), Pixels(1))
    mine, random = slice(context.rank, None, context.world_size), torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 8, 1, 8, 8, generator=random)[:, mine]
    t = 1000 * torch.rand(8, 2, generator=random).sort(descending=True).values
    t[::3, 1] = t[::3, 0]
    losses = trainer.backward(x_0, t[mine], noise, torch.arange(8)[mine])
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    if compute.get("shard"):
        found = {name: gradient.full_tensor() for name, gradient in found.items()}
    return found, torch.cat(context.all_gather(losses["loss"])).tolist()


SHARING = (None, "all") if SHARDS else (None,)  # with DDP, and with --shard


def save_gradients(argv):
    """In each process, as SHARING says."""
    (folder,) = argv
    with processes("cpu") as context:
        for how in SHARING:
            found = gradients(context, shard=how)
            if context.is_main:
                torch.save(found, f"{folder}/{how}.pt")


@pytest.fixture(scope="module")
def expected():
    return gradients(Context(0, 0, 1, torch.device("cpu")))


def assert_same_gradients(found, expected):
    assert sorted(found[1]) == pytest.approx(sorted(expected[1]), rel=1e-4)
    for name, gradient in expected[0].items():
        torch.testing.assert_close(
            found[0][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_have_one_processs_gradients(ranks, tmp_path, expected):
    """The target's passes go past DDP, whose exchange they would disturb without a word."""
    done = ranks(save_gradients, (tmp_path,), 2)
    assert done.wait() == [0, 0], done.text() + done.text(1)
    for how in SHARING:
        assert_same_gradients(torch.load(tmp_path / f"{how}.pt"), expected)


@pytest.mark.parametrize("compute", [{"grad_accum": 3}, {"grad_checkpoint": 2}, {"compile": "aot_eager"}], ids=str)
def test_gradients_are_the_same_however_they_are_computed(compute, expected):
    assert_same_gradients(gradients(Context(0, 0, 1, torch.device("cpu")), **compute), expected)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_plan_counts_the_passes_of_the_target(guidance):
    model, objective = make_model(), MeanFlow(guidance=guidance, null=lambda y: torch.full_like(y, 10))
    x, t, y = normal("x", 8, 1, 8, 8), objective.draw_timesteps(8, "cpu"), torch.arange(8)
    with FlopCounterMode(display=False) as counter:
        objective.training_losses(model, x, t, {"y": y})["loss"].sum().backward()
    macs = forward_macs(build("DiT-S/2", **model.config))
    # attention's slope takes more than twice the products; the first layer's input has no gradient
    assert training_flops(model, macs, guidance) == pytest.approx(counter.get_total_flops() / 8, rel=0.08)


def test_in_bf16_the_product_is_as_accurate_as_the_model():
    model, (x, v) = make_model(), normal("xv", 2, 8, 1, 8, 8)
    t, y = torch.linspace(100, 900, 8), torch.arange(8)
    exact = average_slope(model.double(), x.double(), t.double(), t.double() / 3, y, v.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = average_slope(model.float(), x, t, t / 3, y, v)
    assert (found - exact).norm() / exact.norm() < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Whole commands


def test_a_resumed_run_is_the_uninterrupted_one_and_can_be_drawn_from(tmp_path):
    more = ["--val-data-path", "digits", "--val-every", 4, "--sample-every", 4]
    for folder, stops in (("whole", (6,)), ("parts", (3, 6))):
        for stop in stops:
            assert call(train.main, *MEANFLOW, *more, "--max-steps", stop, "--run-dir", tmp_path / folder) == 0
    assert_same_state(latest(tmp_path / "whole"), latest(tmp_path / "parts"))
    rows = [[row for row in without_timings(tmp_path / folder) if row["step"] == 6] for folder in ("whole", "parts")]
    assert rows[0] == rows[1]
    assert {"loss", "mse"} <= rows[0][0].keys()
    assert (tmp_path / "whole/samples/0000004.png").exists()
    assert call(convert.main, tmp_path / "parts", tmp_path / "weights.safetensors") == 0
    for checkpoint in (tmp_path / "parts", tmp_path / "weights.safetensors"):
        for words in ("", "--num-sampling-steps 4", "--sampler flow-heun --num-sampling-steps 3",
                      "--sampler ddim --num-sampling-steps 3"):  # fmt: skip
            output = tmp_path / "out.png"
            argv = ("--ckpt", checkpoint, "--labels", 3, "--output", output, *words.split())
            assert call(sample_command.main, *argv, "--device", "cpu") == 0
            assert output.exists()
            output.unlink()


def test_one_step_is_one_evaluation_and_needs_no_guidance(mean_checkpoint):
    evaluations = []

    class Counting(DiT):
        def forward(self, x, t, y, r=None):
            evaluations.append((len(x), t[0].item(), r[0].item()))
            return super().forward(x, t, y, r)

    model = Counting(**SMALL, objective="meanflow", predict="v", learn_sigma=False).eval()
    pipeline = Pipeline(model, Pixels(1))
    pipeline([3, 4], *pipeline.noise(0, [0, 1]))
    assert evaluations == [(2, 1000.0, 0.0)]
    assert web.offers(str(mean_checkpoint))[2] == ("meanflow", 1, 1.0)  # the web page's fields
    with pytest.raises(UserError, match="learns its guidance in training"):
        Pipeline(model, Pixels(1), guidance=GuidanceConfig(cfg_scale=2.0))


def test_a_flow_becomes_a_meanflow_that_starts_as_the_flow(tmp_path):
    assert call(train.main, *TINY, "--recipe", "fast", "--max-steps", 4, "--run-dir", tmp_path / "flow") == 0
    start = ["--init-from", tmp_path / "flow", "--run-dir", tmp_path / "mean", "--lr", "1e-30", "--max-steps", 2]
    sizes = [word for word in MEANFLOW if word != "1e-3"]
    sizes.remove("--lr")
    assert call(train.main, *sizes, *start) == 0
    flow, mean = (Checkpoint.open(tmp_path / name).build_model() for name in ("flow", "mean"))
    x, t, y = normal("x", 3, 1, 8, 8), torch.tensor([10.0, 500.0, 1000.0]), torch.arange(3)
    for r in (t / 2, 0 * t):
        torch.testing.assert_close(mean(x, t, y, r), mean(x, t, y))
    mean.t_embedder.forward = flow.t_embedder.forward  # the only other part, which is fitted
    torch.testing.assert_close(mean(x, t, y), flow(x, t, y))
    log = (tmp_path / "mean/log.txt").read_text()
    assert "span_embedder" in log
    assert "Timestep embedding: fitted" in log


def test_an_embedder_of_slower_time_imitates_a_smooth_one():
    torch.manual_seed(0)
    fast, slow, t = TimestepEmbedder(64), TimestepEmbedder(64, scale=0.01), torch.linspace(0, 1000, 77)
    nn.init.zeros_(fast.mlp[0].weight[:, :64])  # the fastest sinusoids, which no slow ones can follow
    nn.init.zeros_(fast.mlp[0].weight[:, 128:192])
    slow.imitate(fast)
    assert (slow(t) - fast(t)).norm() < 0.1 * (fast(t) - fast(t).mean(0)).norm()


def test_its_sampler_is_for_meanflows_alone():
    with pytest.raises(UserError, match="--sampler meanflow: the model is no meanflow; choose flow-heun or another"):
        SamplerConfig("meanflow").completed("flow")
    with pytest.raises(UserError, match="--sampler meanflow: the model is no flow model"):
        SamplerConfig("meanflow").completed("diffusion")


@pytest.fixture(scope="module")
def mean_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mean")
    assert call(train.main, *MEANFLOW, "--max-steps", 2, "--run-dir", folder) == 0
    return folder / "checkpoints/0000002.pt"
