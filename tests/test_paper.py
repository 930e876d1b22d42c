"""studies/paper.py: the models have the paper's proportions, and what is said of its findings follows from the data."""

import functools
import json
import math

import numpy as np
import pytest
from helpers import call
from PIL import Image

import train
from runtime import distributed
from studies import judge, paper
from studies.paper import SHAPES, PaperConfig, Results
from studies.scaling import SCALING
from training import setup


@functools.cache
def costs():
    return {name: paper.gmacs(name) for name in SHAPES}


def make_rows(distance, seeds=3, config=None):
    """Lines of runs in which distance(model, steps, GMACs) is that of the mean, with one percent of noise."""
    config, rows, noise = config or PaperConfig(), [], (0, 0.01, -0.01)
    for name, cost in costs().items():
        for seed in range(seeds):
            curve = [
                {"steps": steps, "frechet_distance": distance(name, steps, cost) * (1 + noise[seed])}
                for steps in config.marks(name)
            ]
            end = distance(name, config.steps, cost) * (1 + noise[seed])
            sampling = [{"steps": n, "frechet_distance": end * (1 + 1 / n)} for n in config.sampling_steps]
            guidance = [
                {"scale": s, "frechet_distance": end * (1 + abs(s - 2)), "class_accuracy": 0.9} for s in paper.SCALES
            ]
            for entry in guidance:
                share = entry["scale"] / 5 + noise[seed]
                entry.update(precision=share, recall=1 - share)
            rows.append(
                {"recipe": name, "seed": seed, "curve": curve, "sampling": sampling, "guidance": guidance, "seconds": 1}
            )
    return rows


def verdicts(distance, seeds=3):
    found = paper.findings(Results(PaperConfig(), make_rows(distance, seeds)))
    return [entry["verdict"] for entry in found], found


def test_the_models_have_the_proportions_of_the_papers():
    ours = [paper.gmacs(f"{size}/{patch}") for size, patch in map(paper.paper_name, SCALING)]
    papers = [row.gmacs for row in SCALING]
    assert np.corrcoef(np.log(ours), np.log(papers))[0, 1] > 0.995
    assert SHAPES["XL/1"] == {"hidden_size": 72, "depth": 5, "num_heads": 8, "patch_size": 1, "block": "adaln-zero"}
    assert SHAPES["S/4"] == {"hidden_size": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "block": "adaln-zero"}


@pytest.mark.parametrize("name", SHAPES)
def test_train_py_takes_the_options_of_every_model(name):
    config, _ = setup.resolve(train.make_parser().parse(PaperConfig().words(name)), distributed.setup("cpu"))
    assert {key: getattr(config.model, key) for key in SHAPES[name]} == SHAPES[name]
    assert (config.model.predict, config.recipe.global_batch_size, config.data.data_path) == ("v", 16, "digits")


def test_small_models_are_trained_for_longer():
    config = PaperConfig(steps=8)
    assert [config.marks(name) for name in ("S/1", "B/2", "L/4", "XL/1", "XL/2, adaln")] == [
        [2, 4, 8, 16, 32], [2, 4, 8, 16], [2, 4, 8], [2, 4, 8], [2, 4, 8],
    ]  # fmt: skip


def test_findings_of_data_that_is_as_the_paper_says():
    def distance(name, steps, gmacs):
        worse = 1.2 if "," in name else 1
        return worse * 10 * gmacs**-0.3 / math.log(steps)

    said, found = verdicts(distance)
    assert said[:4] + said[5:] == ["holds"] * 7  # the fifth has a test of its own
    assert "in 9 of 9 pairs of neighbours the distance is lower, in 0 it is higher" in found[0]["text"]
    assert "in 8 of 8 pairs" in found[1]["text"]
    assert "adaln-zero is better than 3 of the 3" in found[5]["text"]
    assert "at scale 2 and is" in found[7]["text"]


def test_findings_of_data_that_is_not_as_the_paper_says():
    said, _ = verdicts(lambda name, steps, gmacs: 10 * gmacs**0.3 * (0.8 if "," in name else 1))
    no = "does not hold at this scale"
    assert said[:3] == [no] * 3
    assert said[5:7] == [no] * 2


def test_noise_counts_where_it_is_known():
    """Differences of half a percent are within the noise of three seeds; of one seed nobody knows."""
    said, found = verdicts(lambda name, steps, gmacs: 10 - 0.005 * math.log(gmacs))
    assert (said[0], said[1]) == ("does not hold at this scale",) * 2
    assert "in 0 of 9 pairs of neighbours the distance is lower, in 0 it is higher" in found[0]["text"]
    said, _ = verdicts(lambda name, steps, gmacs: 10 - 0.005 * math.log(gmacs), seeds=1)
    assert said[:2] == ["holds"] * 2


def test_sizes_are_compared_at_equal_training_compute():
    """Where the distance depends on compute alone, and less on that of small models, the best size grows."""

    def distance(name, steps, gmacs):
        size, compute = name.split("/")[0], gmacs * steps
        return {"S": 1.0, "B": 0.9, "L": 0.8, "XL": 0.7}[size] * compute**-0.5

    results = Results(PaperConfig(), make_rows(distance))
    for steps in (600, 1400):
        budget = results.compute("B/2", steps)
        assert results.at_compute("B/2", budget) == pytest.approx(distance("B/2", steps, results.gmacs["B/2"]), rel=1e-6)
    assert math.isnan(results.at_compute("B/2", results.compute("B/2", 6000)))
    assert results.compute("B/2", 10) == pytest.approx(3 * 16 * 10 * results.gmacs["B/2"])
    said, text = paper.finding_training_compute(results)
    assert said == "holds"
    assert "patch size 2: L, XL, XL" in text
    said, text = paper.finding_training_compute(Results(PaperConfig(), make_rows(lambda name, steps, gmacs: gmacs)))
    assert (said, text.count("S, B, L")) == ("holds", 3), "where small models are best at every compute they reach"


@pytest.fixture
def small(monkeypatch):
    """All models are as small as can be, and so is the judge, which is not trained."""
    for shape in SHAPES.values():
        for key, value in {"hidden_size": 8, "depth": 1, "num_heads": 1}.items():
            monkeypatch.setitem(shape, key, value)

    def untrained(images, progress):
        return judge.Classifier(1, 8, 10).eval().requires_grad_(False)

    monkeypatch.setattr(judge, "train_classifier", untrained)


@pytest.mark.slow  # fifteen runs and three pictures
def test_everything_by_one_command_that_resumes(small, tmp_path, capsys):
    words = ["--quick", "--jobs", 1, "--output", tmp_path]
    assert call(paper.main, *words) == 0
    text, before = capsys.readouterr().out, (tmp_path / "runs.jsonl").read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    assert {row["recipe"] for row in rows} == {*SHAPES}
    assert len(rows) == len(SHAPES)
    guided = next(row for row in rows if row["recipe"] == paper.GUIDED)
    assert [entry["scale"] for entry in guided["guidance"]] == [*paper.SCALES]
    assert all(0 <= entry["recall"] <= 1 for entry in guided["guidance"])
    assert all(row["sampling"] for row in rows if row["recipe"] in paper.SAMPLED)
    assert (tmp_path / "paper.md").read_text().strip() in text
    assert all(f"**{claim}: " in text for claim in paper.FINDINGS)
    assert len(json.loads((tmp_path / "paper.json").read_text())["findings"]) == len(paper.FINDINGS)
    for name in paper.PICTURES:
        with Image.open(tmp_path / f"paper-{name}.png") as picture:
            assert picture.format == "PNG"
    assert call(paper.main, *words) == 0
    assert (tmp_path / "runs.jsonl").read_text() == before, "nothing is left to do"
