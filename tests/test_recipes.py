"""studies/judge.py and recipes.py: the judge tells real images from others, and the comparison is fair."""

import contextlib
import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image

from data.images import ImageDataset
from data.order import GlobalOrder, is_flipped
from runtime.errors import UserError
from studies import recipes
from studies.judge import Judge, RealImages
from studies.recipes import RECIPES, Column, Run

SIDE = 8
SMALL = "--flags=--hidden-size 16 --depth 4 --num-heads 2 --patch-size 4 --global-batch-size 12"


def make_folder(folder, per_class, seed=0):
    """Three classes of coloured gradients: along the columns, along the rows, and of one colour."""
    random, ramp = np.random.default_rng(seed), np.linspace(0, 1, SIDE)
    shapes = {"columns": np.tile(ramp, (SIDE, 1)), "rows": np.tile(ramp[:, None], (1, SIDE)), "flat": np.ones((SIDE, SIDE))}
    for name, shape in shapes.items():
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = shape[..., None] * random.uniform(80, 230, 3) + random.uniform(0, 25, (SIDE, SIDE, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    make_folder(path / "train", 60)
    make_folder(path / "test", 20, seed=1)
    return path


@pytest.fixture(scope="module")
def images(folder):
    return RealImages.load(str(folder), SIDE)


@pytest.fixture
def quick(monkeypatch):
    """Few steps, of sampling and others, where it is not their number that is tested."""
    for name, number in {"SAMPLING_STEPS": 2, "BOUND_TIMESTEPS": 5, "ROUNDS": 1, "ROUND_STEPS": 1}.items():
        monkeypatch.setattr(recipes, name, number)


@pytest.fixture(scope="module")
def judge(images, tmp_path_factory):
    return Judge.open(images, tmp_path_factory.mktemp("judge") / "judge.pt", progress=False)


# ----------------------------------------------------------------------------------------------------------------------
# The judge


def test_folders_and_digits_are_split_into_train_and_test(images, folder):
    assert (images.train.shape, images.test.shape) == ((180, 3, 8, 8), (60, 3, 8, 8))
    assert (images.classes, images.flip) == (["columns", "flat", "rows"], True)
    alone = RealImages.load(str(folder / "train"), SIDE)
    assert (len(alone.train), len(alone.test)) == (135, 45)
    both = torch.cat([alone.train, alone.test]).flatten(1)
    assert len(both.unique(dim=0)) == 180, "no image may be in both sets"
    digits = RealImages.load("digits", 8)
    assert (len(digits.train), len(digits.test), digits.flip) == (1348, 449, False)


def test_the_judge_tells_real_images_from_others(judge, images):
    assert judge.accuracy > 0.95
    floor = judge.floor(60)
    assert floor["class_accuracy"] == judge.accuracy
    wrong = judge.measure(images.test, (images.test_labels + 1) % 3)
    assert wrong["class_accuracy"] < 0.05
    assert wrong["frechet_distance"] == floor["frechet_distance"], "it does not depend on the labels"
    random = torch.randint(256, images.test.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert judge.measure(random, images.test_labels)["frechet_distance"] > 10 * floor["frechet_distance"]
    one_class = images.test[images.test_labels == 1]
    assert judge.measure(one_class, torch.ones(len(one_class)))["frechet_distance"] > 3 * floor["frechet_distance"]


def test_copies_count_as_memorised_flipped_or_not(judge, images):
    assert judge.memorised(images.train[:40]) == judge.memorised(images.train[:40].flip(-1)) == 1
    assert judge.memorised(images.test) == pytest.approx(1 / 60), "1 % of the test images, to the next whole one"
    pixels = (images.train[:3].flatten(1).float() - images.test[:1].flatten(1).float()).norm(dim=1) / 127.5
    small = Judge(RealImages(images.train[:3], *[None] * 4, False, ""), None, None, None, None)
    torch.testing.assert_close(small.nearest(images.test[:1]), pixels.amin(dim=0, keepdim=True), rtol=1e-4, atol=0)


def test_the_judge_is_deterministic_and_kept_in_a_file(judge, images, folder, tmp_path):
    again = Judge.open(images, tmp_path / "again.pt", progress=False)
    stored = Judge.open(images, tmp_path / "again.pt")
    for other in (again, stored):
        assert other.measure(images.test, images.test_labels) == judge.measure(images.test, images.test_labels)
        assert (other.accuracy, other.copy_distance) == (judge.accuracy, judge.copy_distance)
    with pytest.raises(UserError, match=r"again\.pt: the judge of other images; remove the file"):
        Judge.open(RealImages.load(str(folder / "train"), SIDE), tmp_path / "again.pt")
    torch.save({"identity": images.identity}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: not the file of a judge"):
        Judge.open(images, tmp_path / "other.pt")


def test_folders_that_cannot_be_judged_are_refused(tmp_path):
    make_folder(tmp_path / "train", 1)
    make_folder(tmp_path / "test", 1)
    (tmp_path / "test/flat").rename(tmp_path / "test/steep")
    with pytest.raises(UserError, match="train and test have different classes"):
        RealImages.load(str(tmp_path), SIDE)
    with pytest.raises(UserError, match="too few images"):
        RealImages.load(str(tmp_path / "train"), SIDE)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def make_config(folder, output="unused", **values):
    flags = SMALL.removeprefix("--flags=")
    return recipes.RecipesConfig(
        **{"data": str(folder), "image_size": SIDE, "flags": flags, "output": str(output), **values}
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_and_draws(recipe, images, folder):
    config = make_config(folder, steps=4)
    run = Run(config, images, recipe, seed=0)
    losses = torch.stack([run.step() for _ in range(4)])
    assert losses.isfinite().all()
    drawn, labels = run.draw(6, cfg_scale=2.0)
    assert (drawn.shape, drawn.dtype, labels.tolist()) == ((6, 3, 8, 8), torch.uint8, [0, 1, 2, 0, 1, 2])
    bits = run.bits_per_dimension()
    assert bits is None if "flow" in recipe else 0 < bits < math.inf
    plain = Run(config, images, "baseline", seed=0)
    for _ in range(4):
        plain.step()
    weights = [torch.cat([p.detach().flatten() for p in r.trainer.model.parameters()]) for r in (run, plain)]
    assert torch.equal(*weights) == (recipe == "baseline"), "the recipe must change something"


def test_the_batches_are_those_of_train_py(images, folder):
    """The same order of the images, and the same ones mirrored, over more than one epoch."""
    run, dataset = Run(make_config(folder), images, "baseline", seed=3), ImageDataset(folder / "train", SIDE, seed=3)
    in_memory = torch.randperm(180, generator=torch.Generator().manual_seed(0))  # the dataset's number of each image
    for keys in GlobalOrder(180, 12, 3, stop=240):
        batch = next(run.batches)
        assert batch["index"].tolist() == [index for index, _ in keys]
        for place, (index, epoch) in enumerate(keys):
            number = int(in_memory[index])
            straight = ImageDataset.__getitem__(dataset, (number, epoch))
            assert batch["label"][place] == straight["label"]
            flipped = is_flipped(3, index, epoch) != is_flipped(3, number, epoch)
            assert torch.equal(batch["image"][place], straight["image"].flip(-1) if flipped else straight["image"])


def run_small(folder, output, *words):
    argv = ["--data", folder, "--image-size", SIDE, SMALL, "--output", output, "--samples", 20, "--steps", 8]
    return call(recipes.main, *argv, *words)


def lines(output):
    return [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]


def test_runs_are_recorded_and_not_repeated(quick, folder, tmp_path, capsys):
    words = ["--recipes", "baseline", "rope", "--seeds", 2]
    assert run_small(folder, tmp_path, *words) == 0
    rows = lines(tmp_path)
    assert [(row["recipe"], row["seed"]) for row in rows] == [("baseline", 0), ("rope", 0), ("baseline", 1), ("rope", 1)]
    for row in rows:
        marks = [[entry["unit"], entry["mark"], entry["steps"]] for entry in row["curve"]]
        assert sorted(marks) == sorted(row["judged_at"])
        assert recipes.at_equal_steps(row)["steps"] == 8
        if row["recipe"] == "baseline":
            assert [recipes.at_time(row, share)["steps"] for share in recipes.TIMES] == [2, 4, 8]
        guided = [entry for at in row["curve"] for entry in at.get("guided", [])]
        assert len(guided) >= 2 * len(recipes.GUIDED_TIMES)
        assert all(0 < entry["frechet_distance"] < math.inf for entry in row["curve"] + guided)
        assert 0 <= row["memorised"] <= 1
        assert row["bits_per_dimension"] > 0
    text = (tmp_path / "table.md").read_text()
    assert "| rope | 2 |" in text
    assert text.strip() in capsys.readouterr().out
    for name in ("recipes", "baseline-0", "rope-1"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG"

    with open(tmp_path / "runs.jsonl", "a") as file:
        file.write('{"recipe": "rope", "se')  # a line that was cut off
    before = [(tmp_path / name).read_text() for name in ("runs.jsonl", "costs.json")]
    assert run_small(folder, tmp_path, *words) == 0
    after = [(tmp_path / name).read_text() for name in ("runs.jsonl", "costs.json")]
    assert after == before, "nothing is left to do, and the costs are measured once"


def test_the_time_of_a_step_decides_how_many_steps_a_recipe_makes(quick, folder, tmp_path, images):
    config = make_config(folder, tmp_path, steps=100)
    (tmp_path / "costs.json").write_text(json.dumps({"logit-normal": 1.25}))
    recipes.measure_costs(config, images, ["baseline", "rope"])
    costs = recipes.read_costs(tmp_path)
    assert [*costs] == ["logit-normal", "baseline", "rope"]
    assert costs["baseline"] == 1
    assert 0.1 < costs["rope"] < 10
    steps = [("time", 0.25, 20), ("time", 0.5, 40), ("time", 1.0, 80), ("steps", 100, 100)]
    assert config.judged_at("logit-normal") == steps
    for damaged in ("", "{", "[1]", '{"logit-normal": [1.25, 1.0], "rope": "fast", "v": -1}'):
        (tmp_path / "costs.json").write_text(damaged)
        assert recipes.read_costs(tmp_path) == {}, "they are measured again"


def test_a_run_of_other_settings_is_not_taken_for_this_one(folder, tmp_path):
    config = make_config(folder, tmp_path, steps=40)
    (tmp_path / "costs.json").write_text(json.dumps({"logit-normal": 1.0}))
    row = {**config.record("logit-normal", 1), "curve": []}
    (tmp_path / "runs.jsonl").write_text(f"[3]\n{json.dumps(row)}\n")
    assert recipes.finished_runs(config) == {("logit-normal", 1): row}
    for other in ({"flags": config.flags + " --lr 1e-3"}, {"steps": 50}, {"samples": 100}):
        assert not recipes.finished_runs(make_config(folder, tmp_path, **{"steps": 40, **other}))
    (tmp_path / "costs.json").write_text(json.dumps({"logit-normal": 1.5}))
    assert not recipes.finished_runs(config), "of other costs"


def test_two_processes_do_the_same_runs(quick, folder, images, tmp_path, monkeypatch):
    """In this process: new ones would import PyTorch. All that they are given must survive the way to new ones."""

    class Pool(contextlib.nullcontext):
        def __init__(self, number, initializer, data):
            super().__init__(self)
            assert number == 2
            assert pickle.loads(pickle.dumps(data))[0] == data[0]
            initializer(*data)

        def imap_unordered(self, do, jobs):
            return map(*pickle.loads(pickle.dumps((do, jobs))))

    monkeypatch.setattr(recipes.multiprocessing, "get_context", {"spawn": SimpleNamespace(Pool=Pool)}.get)
    words = ["--recipes", "logit-normal", "--seeds", 2, "--jobs", 2]
    assert run_small(folder, tmp_path, *words) == 0
    rows = lines(tmp_path)
    assert sorted(row["seed"] for row in rows) == [0, 1]
    assert rows[0]["curve"] != rows[1]["curve"]
    assert run_small(folder, tmp_path, *words) == 0, "there is nothing left to do"
    assert lines(tmp_path) == rows


def test_a_run_that_diverges_is_recorded_as_such(quick, images, judge, folder, tmp_path):
    config = make_config(folder, tmp_path, steps=4, flags=f"{SMALL.split('=')[1]} --lr 1e30")
    (tmp_path / "costs.json").write_text(json.dumps({"baseline": 1.0}))
    row, picture = recipes.train_and_judge(config, images, judge, "baseline", 0)
    assert picture is None
    assert recipes.at_time(row, 1.0)["frechet_distance"] is None
    json.dumps(row, allow_nan=False)
    assert "diverged" in recipes.table(recipes.summarise([row]), recipes.read_costs(tmp_path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "--data-path nowhere: "),
        (["--flags", "--lr quick"], "argument --lr: 'quick' is not a number"),
        (["--flags", "--num-heads 5"], "heads 5"),
    ],
)
def test_mistakes_get_one_line(words, message, folder, tmp_path, capsys):
    argv = ["--data", folder, "--image-size", SIDE, "--output", tmp_path / "out"]
    assert call(recipes.main, *argv, *words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


# ----------------------------------------------------------------------------------------------------------------------
# The table


def make_rows(distances, recipe, steps_distances=None):
    """Lines of runs whose distance at 1/4, 1/2 and all of the time is 4, 2 and 1 times that of `distances`, by seed."""
    found = []
    for seed, distance in enumerate(distances):
        curve = []
        for mark in recipes.TIMES:
            entry = {"unit": "time", "mark": mark, "steps": 9, "frechet_distance": distance / mark, "class_accuracy": 0.5}
            scales = [{"cfg_scale": s, "frechet_distance": distance / mark / s, "class_accuracy": 0.9} for s in (1.5, 3)]
            curve.append({**entry, "guided": scales})
        curve.append({"unit": "steps", "steps": 9, "frechet_distance": (steps_distances or distances)[seed]})
        row = {"recipe": recipe, "seed": seed, "curve": curve}
        found.append({**row, "memorised": 0.0, "bits_per_dimension": None if recipe == "flow" else 5.0})
    return found


def test_only_differences_beyond_the_noise_are_called_better():
    rows = make_rows([10, 11, 9], "baseline") + make_rows([5, 5.5, 4.5], "flow", [10, 11, 9])
    rows += make_rows([9.5, 10.5, 8.5], "logit-normal") + make_rows([20, 22, 18], "rope")
    summary = recipes.summarise(rows)
    said = {name: recipes.verdict(summary, name, "equal time") for name in summary}
    assert said == {"baseline": "", "logit-normal": "same", "flow": "better", "rope": "worse"}
    assert recipes.verdict(summary, "flow", "equal steps") == "same"
    deviation = np.std(np.log([10, 11, 9]), ddof=1)
    assert recipes.usual_noise(summary, "equal time") == pytest.approx(deviation, rel=0.05)
    assert summary["baseline"]["guided"].mean == pytest.approx(10 / 3), "the better scale of the two"
    text = recipes.table(summary, dict.fromkeys(summary, 1.5))
    assert "| flow | 3 | 1.50 | 9 ± 0 | 20.00 ± 2.00 | 10.00 ± 1.00 | 5.00 ± 0.50 | 10.00 ± 1.00 |" in text


def test_one_seed_has_no_noise_and_no_verdict():
    summary = recipes.summarise(make_rows([10], "baseline") + make_rows([1], "flow"))
    assert math.isnan(recipes.usual_noise(summary, "equal time"))
    assert recipes.verdict(summary, "flow", "equal time") == ""
    few = recipes.summarise(make_rows([10, 11], "baseline") + make_rows([6], "flow"))
    assert recipes.verdict(few, "flow", "equal time") == "same", "two runs tell too little of the noise: t is 12.7"
    assert Column([1.5]).text("{:.1f}") == "1.5"


def test_an_unstable_recipe_hides_no_difference_of_the_others():
    """One recipe whose seeds differ tenfold, as those of predicting x_0 did on CIFAR-10, made the common noise 24 %."""
    rows = make_rows([10, 11, 9], "baseline") + make_rows([7, 7.5, 6.5], "flow") + make_rows([5, 50, 20], "logit-normal")
    summary = recipes.summarise(rows)
    said = {name: recipes.verdict(summary, name, "equal time") for name in summary}
    assert said == {"baseline": "", "flow": "better", "logit-normal": "same"}
    baseline, flow = (np.log([10, 11, 9]), np.log([7, 7.5, 6.5]))
    deviation = math.sqrt((flow.var(ddof=1) + baseline.var(ddof=1)) / 2)
    columns = [summary[name]["equal time"] for name in ("flow", "baseline")]
    assert recipes.noise(columns) == (pytest.approx(deviation), 4)


def test_a_diverged_run_spoils_its_recipe_alone():
    rows = make_rows([10, 11], "baseline") + make_rows([5, 5.5], "v")
    rows[-1]["curve"][2]["frechet_distance"] = None
    summary = recipes.summarise(rows)
    assert recipes.verdict(summary, "v", "equal time") == "diverged"
    assert recipes.usual_noise(summary, "equal time") == pytest.approx(np.std(np.log([10, 11]), ddof=1))


def test_the_time_to_the_baselines_distance_is_interpolated():
    def share(distance):
        rows = make_rows([10, 10], "baseline") + make_rows([distance] * 2, "flow")
        summary = recipes.summarise(rows)
        alone, guided = (recipes.time_to_baseline(summary, "flow", name) for name in ("equal time", "guided"))
        assert guided == ("< 0.5" if alone.startswith("<") else alone), "with guidance all distances are a third"
        return alone

    assert share(10) == "1.00"
    assert share(10 / 1.9) == "0.53"
    assert share(10 / math.sqrt(2)) == "0.71", "distances fall as 1 / time"
    assert share(2) == "< 0.25"
    assert share(11) == "-"


def test_a_recipe_of_train_py_means_the_same_in_a_study():
    words = "--data-path digits --vae none --image-size 8 --recipe fast --device cpu"
    options, _, _ = recipes.resolve(words.split())
    assert (options.model.objective, options.recipe.timestep_sampling) == ("flow", "logit-normal")
