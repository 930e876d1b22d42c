"""studies/caching.py: the cache keeps its schedule, the variants have their settings, the best is called the best."""

import json

import pytest
import torch
from helpers import call
from PIL import Image
from torch import nn

from diffusion import create_diffusion, samplers
from diffusion.guidance import guided_denoiser
from models import DiT
from studies import caching, judge
from studies.caching import DDIM, DDPM, METHODS, Cache, Method, draw

LABELS = torch.arange(6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = DiT(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=2, num_heads=2, num_classes=10)
    for weights in network.parameters():
        nn.init.normal_(weights, std=0.1)  # adaLN-Zero begins without any attention
    return network.eval().requires_grad_(False)


class Counter(nn.Module):
    """In place of an attention: its output is a function of t alone, `line`; `calls` counts."""

    def __init__(self, cache_of, line):
        super().__init__()
        self.cache_of, self.line, self.calls = cache_of, line, 0

    def forward(self, x):
        self.calls += 1
        return torch.full_like(x, self.line(self.cache_of().t))


@pytest.fixture
def evaluate(model):
    """evaluate(interval, order, line, evaluations): the outputs of a cached module at evaluations (t, batch size), how many
    of them were full, and how often the module itself was called."""

    def evaluate(interval, order, line, evaluations):
        holder = []
        inner = model.blocks[0].attn = Counter(lambda: holder[0], line)
        holder.append(Cache(model, interval, order))
        found = []
        model.blocks[0].attn.register_forward_hook(lambda module, inputs, output: found.append(output[0, 0, 0].item()))
        for t, number in evaluations:
            model(torch.zeros(number, 1, 8, 8), torch.full((number,), t), torch.zeros(number, dtype=torch.long))
        return found, holder[0].full_evaluations, inner.calls

    return evaluate


def test_the_modules_are_called_in_every_nth_evaluation_alone(evaluate):
    times = [(t, 2) for t in (900, 800, 700, 600, 500, 400, 300)]
    outputs, full, calls = evaluate(3, 0, lambda t: t, times)
    assert outputs == [900, 900, 900, 600, 600, 600, 300]
    assert full == calls == 3


def test_order_1_continues_the_line_through_the_last_two(evaluate):
    times = [(t, 2) for t in (900, 800, 650, 600, 500, 410, 300, 200)]
    outputs, full, calls = evaluate(2, 1, lambda t: 3 * t + 5, times)
    assert outputs[1] == outputs[0], "there is only one evaluation to continue"
    assert outputs[2:] == pytest.approx([3 * t + 5 for t, _ in times[2:]]), "a line is continued without error"
    assert full == calls == 4
    outputs, _, _ = evaluate(2, 1, lambda t: t**2, times)
    slope = (500**2 - 650**2) / (500 - 650)
    assert outputs[5] == pytest.approx(500**2 + (410 - 500) * slope)


def test_an_evaluation_of_another_batch_size_is_full_and_begins_anew(evaluate):
    times = [(900, 2), (800, 2), (700, 4), (600, 4), (500, 2), (400, 2), (300, 2)]
    outputs, full, _ = evaluate(2, 1, lambda t: t, times)
    assert outputs == [900, 900, 700, 700, 500, 500, 300]
    assert full == 4


def test_guidance_by_interval_goes_with_the_cache(model):
    cache = Cache(model, 3, 1)
    denoise = guided_denoiser(model, LABELS, 10, cfg_scale=2.0, interval=(0.3, 0.6))
    full = []
    for t in range(900, 0, -100):
        denoise(torch.zeros(6, 1, 8, 8), t)
        full.append(cache.is_full)
    assert full == [True, False, False, True, False, False, True, True, False]


def test_without_steps_between_nothing_changes(model):
    """Interval 1 draws the images of the model without a cache, whatever the order."""
    x_T = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def images():
        denoiser = guided_denoiser(model, LABELS, 10, cfg_scale=1.5)
        return samplers.last(caching.make_steps(denoiser, Method(DDIM), 5, x_T, None))

    plain = images()
    Cache(model, 1, 1)
    assert torch.equal(images(), plain)


@pytest.mark.parametrize("sampler", [DDIM, DDPM])
@pytest.mark.parametrize("order", [0, 1])
def test_an_image_depends_on_its_seed_and_index_alone(model, sampler, order, monkeypatch):
    method = Method(sampler, (2, order))
    whole, _, full = draw(model, method, 6, LABELS, 0, 1.5)
    assert (whole.shape, whole.dtype, full) == ((6, 1, 8, 8), torch.uint8, 3)
    monkeypatch.setattr(caching, "BATCH", 4)
    parts, _, full = draw(model, method, 6, LABELS, 0, 1.5)
    assert full == 3
    assert (whole.int() - parts.int()).abs().max() <= 1
    plain, _, _ = draw(model, Method(sampler), 6, LABELS, 0, 1.5)
    assert (whole.int() - plain.int()).abs().max() > 1, "the cache must change something"


def test_the_variants_are_those_of_their_names():
    betas = create_diffusion("").betas

    def scheduler(name):
        return samplers.SolverSteps(METHODS[name].sampler, betas, 10).scheduler

    assert scheduler("unipc, order 3").config.solver_order == 3
    assert scheduler("unipc").config.solver_order == scheduler("dpm-solver++").config.solver_order == 2
    karras, plain = (scheduler(name).sigmas[:-1] for name in ("dpm-solver++, Karras", "dpm-solver++"))
    roots = karras.double() ** (1 / 7)
    torch.testing.assert_close(roots.diff(), roots.diff().mean().expand(9), rtol=1e-3, atol=0)  # Karras et al., eq. 5
    assert not torch.allclose(plain, karras, rtol=0.1)


def test_the_variance_beta_is_that_of_a_model_without_learned_variance(model):
    x_T = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    process = create_diffusion("4", learn_sigma=False)
    method, no_noise = METHODS["ddpm, variance beta"], lambda x, i: torch.zeros_like(x)
    steps = caching.make_steps(lambda x_t, t: model(x_t, torch.full((6,), t), LABELS), method, 4, x_T, no_noise)
    expected = x_T
    for i, out in zip((3, 2, 1, 0), steps, strict=True):
        t = torch.full((6,), i)
        eps = model(expected, torch.as_tensor(process.timestep_map)[t], LABELS)[:, :1]
        expected = process.q_posterior_mean_variance(process.predict_xstart_from_eps(expected, t, eps), expected, t)[0]
        torch.testing.assert_close(out["sample"], expected)


# ----------------------------------------------------------------------------------------------------------------------
# Table and sentences


def make_rows(**distances):
    """Lines of three seeds, whose distance at N evaluations is 1 + distances[name] / N, and whose noise is the seed's."""
    names = {"ddpm": "ddpm", "solver": "dpm-solver++", "cache": "ddim, cache 2, order 1", "other": "ddim, cache 3, order 0"}
    rows = []
    for key, distance in distances.items():
        method = METHODS[names[key]]
        for seed in range(3):
            points = [
                {
                    "evaluations": n,
                    "frechet_distance": (1 + distance / n) * (1 + seed / 10) + 0.001 * (seed == 1) * len(rows),
                    "class_accuracy": 0.9,
                    "seconds": float(n * method.steps(1)),
                    "error": None if key == "ddpm" else distance / n,
                }
                for n in method.evaluations
            ]
            rows.append({"recipe": names[key], "seed": seed, "points": points})
    return rows


def winners(**distances):
    found = caching.compare_caches(caching.summarise(make_rows(**distances)))
    assert [row["evaluations"] for row in found] == [5, 5, 10, 10, 20, 20, 50, 50]
    return {(row["quantity"], row["winner"]) for row in found}


def test_the_better_of_cache_and_solver_is_named():
    assert winners(solver=1, cache=5, other=9) == {("frechet_distance", "solver"), ("error", "solver")}
    assert winners(solver=9, cache=5, other=1) == {("frechet_distance", "cache"), ("error", "cache")}
    assert winners(solver=5, cache=5, other=9) == {("frechet_distance", "neither"), ("error", "neither")}


def test_the_fewest_evaluations_that_are_as_good_as_the_papers():
    found = caching.cheapest(caching.summarise(make_rows(ddpm=5, solver=0.4, cache=0)))
    assert {name: number for name, (number, _) in found.items()} == {"ddpm": 250, "dpm-solver++": 20}


def test_a_spacing_that_does_not_exist_leaves_its_point_empty():
    rows = make_rows(ddpm=5, solver=0.4)
    for row in rows[3:]:
        row["points"][0].update(frechet_distance=None, class_accuracy=None, error=None, seconds=None)
    summary = caching.summarise(rows)
    assert "| dpm-solver++ | 5 | 5 | - | - | - | - |" in caching.table(summary)
    assert caching.cheapest(summary)["dpm-solver++"][0] == 20


# ----------------------------------------------------------------------------------------------------------------------
# The command

SMALL = ["--flags=--hidden-size 8 --depth 2 --num-heads 1 --patch-size 4 --global-batch-size 4", "--steps", 4]
SMALL += ["--samples", 20, "--methods", "ddim", "dpm-solver++", "ddim, cache 3, order 1"]


def test_the_command_measures_what_is_missing(tmp_path, monkeypatch, capsys):
    untrained = judge.Classifier(1, 8, 10).eval().requires_grad_(False)
    monkeypatch.setattr(judge, "train_classifier", lambda images, progress: untrained)
    assert call(caching.main, *SMALL, "--seeds", 2, "--output", tmp_path) == 0
    text, before = capsys.readouterr().out, (tmp_path / "runs.jsonl").read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert [(row["recipe"], row["seed"]) for row in rows] == [(name, seed) for seed in (0, 1) for name in SMALL[-3:]]
    for row in rows:
        assert [point["evaluations"] for point in row["points"]] == [5, 10, 20, 50]
        assert all(0 <= point["error"] < 2 and point["seconds"] > 0 for point in row["points"])
    errors = [point["error"] for point in rows[1]["points"]]
    assert errors == sorted(errors, reverse=True), "the more evaluations, the nearer to the exact images"
    assert "| ddim, cache 3, order 1 | 5 | 15 |" in text
    assert (tmp_path / "table.md").read_text().strip() in text
    with Image.open(tmp_path / "caching.png") as picture:
        assert picture.format == "PNG"
    assert call(caching.main, *SMALL, "--seeds", 2, "--output", tmp_path) == 0
    assert (tmp_path / "runs.jsonl").read_text() == before, "nothing is left to do"
    assert call(caching.main, *SMALL, "--steps", 5, "--output", tmp_path) == 2
    assert "model.pt: was trained in another way; remove the file" in capsys.readouterr().err
