"""studies/candidates.py: each idea is what its paper says, and is measured beside the baseline alone."""

import json

import pytest
import torch
from helpers import call
from reference import normal

from diffusion.flow import Flow
from evaluation.metrics import Statistics, frechet_distance
from studies import candidates, recipes
from studies.candidates import CANDIDATES, CandidatesConfig
from studies.judge import RealImages

SMALL = "--hidden-size 16 --depth 2 --num-heads 2 --global-batch-size 8"


@pytest.fixture(scope="module")
def images():
    return RealImages.load("digits", 8)


@pytest.fixture
def config(tmp_path, monkeypatch):
    def features(config, images):
        return normal("features", len(images.train), 112, 8, 8).half()  # two by two for each token

    monkeypatch.setattr(candidates, "open_features", features)
    return CandidatesConfig(data="digits", flags=SMALL, steps=4, output=str(tmp_path))


@pytest.mark.parametrize("name", [name for name in CANDIDATES if name != "muon" or hasattr(torch.optim, "Muon")])
def test_every_candidate_trains_and_its_average_draws(name, config, images):
    runs = [config.start(images, f"{which}, lr 0.004", 0) for which in (name, "baseline")]
    losses = [[run.step() for _ in range(4)] for run in runs]
    assert torch.stack(losses[0]).isfinite().all()
    drawn, labels = runs[0].draw(6, cfg_scale=2.0)
    assert (drawn.shape, labels.tolist()) == ((6, 1, 8, 8), [0, 1, 2, 3, 4, 5])
    weights = [run.trainer.model.blocks[0].attn.proj.weight for run in runs]
    assert torch.equal(*weights) == (name == "baseline"), "the candidate must change something"


def test_the_class_is_among_the_tokens_of_the_later_blocks(config, images):
    run = config.start(images, "class-tokens", 0)
    model, seen = run.trainer.model, []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: seen.append(args[0]))
    out = model(torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([3, 10]))
    assert [x.shape[1] for x in seen] == [16, 20]
    expected = model.y_embedder.embedding_table.weight[[3, 10]][:, None] + model.class_tokens.positions
    torch.testing.assert_close(seen[1][:, 16:], expected)
    assert out.shape == (2, 1, 8, 8)
    assert run.trainer.ema.module.class_tokens is not model.class_tokens, "the average has positions of its own"


def test_a_model_of_clean_images_gives_the_velocity_and_its_loss(config, images):
    """Exactly for the right image, also where s < 0.05 and the velocity is limited."""
    run, (x_0, noise) = config.start(images, "x0", 0), (normal(name, 3, 1, 8, 8) for name in ("x0", "noise"))
    model, objective = run.trainer.model, run.trainer.objective
    x_s, t = normal("x", 3, 1, 8, 8), torch.tensor([10.0, 500.0, 1000.0])
    with torch.no_grad():  # the last layer is zero at first, and so is the predicted image
        torch.testing.assert_close(model(x_s, t, torch.arange(3)), x_s / torch.tensor([0.05, 0.5, 1])[:, None, None, None])

    def right(x_s, t, y):
        return candidates.CleanImage.velocity(None, (x_s, t), x_0)

    losses = objective.training_losses(right, x_0, t, {"y": None}, noise)
    assert losses["loss"].max() < 1e-8
    losses, plain = (
        of.training_losses(lambda x, t, y: 0 * x, x_0, t, {"y": None}, noise)["loss"] for of in (objective, Flow())
    )
    torch.testing.assert_close(losses, plain * torch.tensor([0.2**2, 1, 1]))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this version of PyTorch has no Muon")
def test_muon_gets_the_matrices_of_the_blocks_and_the_schedule(config, images):
    run = config.start(images, "muon", 0)
    muon, adamw = run.trainer.optimizer.both
    parameters = dict(run.trainer.model.named_parameters())
    taken = {name for name, p in parameters.items() if any(p is matrix for matrix in muon.param_groups[0]["params"])}
    assert taken == {name for name in parameters if name.startswith("blocks") and name.endswith("weight")}
    assert len(taken) + len(adamw.param_groups[0]["params"]) == len(parameters)
    run.step()
    expected = run.trainer.recipe.learning_rate(0, run.trainer.total_steps)
    assert {o.param_groups[0]["lr"] for o in (muon, adamw)} == {expected}


def test_features_are_those_of_the_image_and_are_mirrored_with_it(config, images):
    run = config.start(images, "repa", 0)
    stored = candidates.open_features(config, images)
    run.candidate.see(run, {"index": torch.tensor([7, 7]), "flipped": torch.tensor([False, True])})
    straight, mirrored = run.trainer.objective.features.unflatten(1, (4, 4))
    expected = stored[7].float().unflatten(2, (4, 2)).unflatten(1, (4, 2)).mean((2, 4))  # (C, 4, 4)
    torch.testing.assert_close(straight, expected.permute(1, 2, 0))
    torch.testing.assert_close(mirrored, straight.flip(1))
    run.step()
    model, gradients = run.trainer.model, []
    for part in (model.aligned, model.blocks[0], model.blocks[1]):
        gradients.append(sum(float(p.grad.abs().sum()) for p in part.parameters()))
    assert gradients[0] > 0, "the projection learns"


def test_the_distance_of_few_images_is_the_frechet_distance():
    known, features = normal("known", 300, 40) @ normal("mix", 40, 40), normal("samples", 30, 40) + 0.2

    class Fixed:
        reference = Statistics(40).update(known)

        def read(self, images):
            return features, torch.zeros(30)

    found, other = candidates.measure(Fixed(), features, torch.zeros(30)), Statistics(40).update(features)
    reference = Fixed.reference
    expected = frechet_distance(reference.mu, reference.sigma, other.mu, other.sigma)
    assert found["distance"] == pytest.approx(expected, rel=1e-9)
    assert found["accuracy"] == 1
    assert 0 < found["error"] < found["distance"]


def test_the_command_tunes_trains_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    for name, number in {"SAMPLING_STEPS": 2, "ROUNDS": 1, "ROUND_STEPS": 1}.items():
        monkeypatch.setattr(recipes, name, number)
    monkeypatch.setattr(recipes.Judge, "train", lambda images, progress: make_judge(images))
    argv = ["--data", "digits", f"--flags={SMALL}", "--steps", 16, "--samples", 40, "--output", tmp_path]
    argv += ["--recipes", "baseline", "modern"]
    assert call(candidates.main, *argv) == 0, capsys.readouterr().err
    table = (tmp_path / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    tuned = [json.loads(line) for line in (tmp_path / "tuning/runs.jsonl").read_text().splitlines()]
    assert [(row["recipe"].split(",")[0], row["seed"]) for row in rows] == [
        ("baseline", 0), ("modern", 0), ("baseline", 1), ("modern", 1)
    ]  # fmt: skip
    assert len(tuned) == 6
    best = min(tuned[:3], key=lambda row: row["unguided"]["distance"])
    assert rows[0]["recipe"] == best["recipe"]
    assert "| modern | 2 |" in table
    monkeypatch.setattr(candidates, "train_and_judge", lambda *args, **named: pytest.fail("there is nothing left to do"))
    assert call(candidates.main, *argv) == 0
    assert (tmp_path / "table.md").read_text() == table


def make_judge(images):
    """A judge of an untrained network: training takes seconds, and it is not what is tested."""
    torch.manual_seed(0)
    judge = recipes.Judge(images, recipes.Judge.__init__.__globals__["Classifier"](1, 8, 10).eval(), None, 1.0, 0.5)
    judge.reference = Statistics(64).update(judge.read(images.train)[0])
    return judge
