"""The benchmarks: that they measure and draw what they say, on sizes as small as possible."""

import json
import os
import time

import numpy as np
import pytest
from helpers import call
from PIL import Image

import models
from benchmarks import digits, sampling, scaling, timing, train_step
from runtime.errors import RunError

# ----------------------------------------------------------------------------------------------------------------------
# timing.py, train_step.py, sampling.py


def sleeper(seconds, log):
    """Makes a call that sleeps and adds a letter to a file."""

    def make():
        def call():
            time.sleep(seconds)
            with open(log, "a") as file:
                file.write("f" if seconds < 0.01 else "s")

        return call

    return make


def test_variants_are_timed_in_turns(tmp_path):
    makers = {"fast": sleeper(0.002, tmp_path / "log"), "slow": sleeper(0.02, tmp_path / "log")}
    timings = timing.race(makers, "cpu", repeats=3, warmup=1)
    assert (tmp_path / "log").read_text() == "fs" * 5, "the start-up, a round that is not counted, three that are"
    assert [len(t.seconds) for t in timings.values()] == [3, 3]
    assert min(timings["fast"].seconds) >= 0.002
    assert min(timings["slow"].seconds) >= 0.02
    assert all(t.first > 0 and t.peak_memory_gib > 0 for t in timings.values())


@pytest.mark.parametrize(("step", "words"), [(lambda: 1 / 0, "division by zero"), (lambda: os._exit(3), "exit code 3")])
def test_a_variant_that_fails_is_named(step, words, tmp_path):
    with pytest.raises(RunError, match=f"^lame: .*{words}"):
        timing.race({"well": sleeper(0.001, tmp_path / "log"), "lame": lambda: step}, "cpu", repeats=1)


SMALL = ["--model", "DiT-S/8", "--batch-size", 2, "--image-size", 64, "--device", "cpu", "--repeats", 2]


@pytest.fixture
def small_model(monkeypatch):
    """The name DiT-S/8 for a model of one narrow block."""
    monkeypatch.setitem(models.DiT_models["DiT-S/8"].keywords, "depth", 1)
    monkeypatch.setitem(models.DiT_models["DiT-S/8"].keywords, "hidden_size", 48)


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize("script", [train_step, sampling])
def test_numbers_of_a_report_agree(script, capsys):
    assert call(script.main, *SMALL, "--compile", "aot_eager", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    medians = {name: sorted(times["seconds"]) for name, times in report["variants"].items()}
    medians = {name: sum(seconds) / 2 for name, seconds in medians.items()}
    assert medians.keys() == {"baseline", "eager", "compiled"}
    assert report["baseline_seconds_per_step"] == pytest.approx(medians["baseline"])
    assert report["seconds_per_step"] == pytest.approx(medians[report["fastest"]])
    reached = report["flops_per_step"] / report["seconds_per_step"]
    assert report["share_of_matrix_rate"] == pytest.approx(reached / report["matrix_flops_per_second"])
    images = 2 if script is train_step else 2 / report["num_sampling_steps"]
    rate = report["images_per_second" if script is train_step else "images_per_second_without_decoding"]
    assert rate == pytest.approx(images / report["seconds_per_step"])


def test_the_matrix_rate_counts_two_operations_per_multiplication():
    product = timing.MatrixProduct("cpu", "fp32")
    assert product().__call__().shape == (product.side, product.side)
    assert product.rate(timing.Timing(seconds=[2.0, 0.5, 1.0])) == 2 * product.side**3


@pytest.mark.usefixtures("small_model")
def test_a_profile_shows_where_the_time_goes(tmp_path, capsys):
    argv = [*SMALL, "--variants", "baseline", "eager", "--profile", "--plot", tmp_path / "a.png", "--json"]
    assert call(train_step.main, *argv) == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("baseline", "eager"):
        for category in ("matrix products", "attention", "optimizer", "moving average"):
            assert report["variants"][name]["profile"][category] > 0, f"{category} is part of every step"
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
    timing.show(report, "a title", as_json=False)
    train_step.print_profile(report)
    out = capsys.readouterr().out
    assert "speed-up" in out
    rows = {
        line[:34].strip(): [float(x.strip("% ")) for x in line[34:].split()]
        for line in out.split("where the time goes")[1].splitlines()[1:]
    }
    assert rows.keys() == set(train_step.COLOURS)
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == pytest.approx([100, 100], abs=1)


@pytest.mark.parametrize(
    ("script", "extra", "words"),
    [
        (train_step, ["--grad-accum", 17], "--grad-accum 17: more than the 16 images"),
        (train_step, ["--num-heads", 5], "heads 5"),
        (train_step, ["--plot", "step.xyz"], "--plot step.xyz: name a .png file"),
        (train_step, ["--plot", "nowhere/step.png"], "--plot nowhere/step.png: its folder does not exist"),
        (sampling, ["--guidance-interval", 0.1, 0.5], "unrecognized arguments: --guidance-interval"),
        (sampling, ["--sampler", "heun", "--eta", 0.5], "eta is an option of ddim"),
        (sampling, ["--precision", "tf32", "--no-tf32"], "--precision tf32: contradicts --no-tf32"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_it_is_tried(script, extra, words, capsys):
    assert call(script.main, "--model", "DiT-S/2", "--device", "cpu", *extra) == 2
    assert words in capsys.readouterr().err


def test_without_a_compiler_the_compiled_variant_is_left_out_unless_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    config = train_step.StepConfig.from_flat({"device": "cpu"})
    assert timing.resolve(config, "bf16").timing.variants == ("baseline", "eager")
    assert "there is no no-such-compiler" in capsys.readouterr().err
    assert call(train_step.main, "--device", "cpu", "--variants", "compiled") == 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--model", "DiT-M/4"], "--model: 'DiT-M/4' is not one of DiT-S/2"),
        (["--repeats", 0], "argument --repeats: 0 is not a whole number, 1 or more"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
        (["--compile", "nothing"], "--compile nothing: not a backend"),
        (["--image-size", 100], "--image-size 100: not a multiple of 16"),
    ],
)
@pytest.mark.parametrize("script", [train_step, sampling])
def test_mistakes_get_one_line(script, extra, words, capsys):
    assert call(script.main, *extra, "--device", "cpu") == 2
    error = capsys.readouterr().err.strip()
    assert words in error.splitlines()[-1]
    assert "Traceback" not in error


# ----------------------------------------------------------------------------------------------------------------------
# scaling.py


def test_plot_of_the_papers_and_own_results(tmp_path, capsys):
    report = {"fid": 30.0, "samples": {"path": "samples/DiT-S-8-0400000-size-512-vae-ema-cfg-1.0-seed-0.npz"}}
    (tmp_path / "a.metrics.json").write_text(json.dumps(report))
    own = [{"model": "DiT-S/8", "fid": 9, "block": "adaln", "depth": 2}, {"model": "DiT-S/8", "fid": 50, "label": "mine"}]
    (tmp_path / "b.json").write_text(json.dumps(own))
    results = [tmp_path / name for name in ("a.metrics.json", "b.json")]
    assert call(scaling.main, tmp_path / "scaling.png", "--json", "--results", *results) == 0
    report = json.loads(capsys.readouterr().out)
    assert round(report["correlation_paper"], 2) == -0.93, "section 5 of the paper reports -0.93"
    points = report["results"]
    assert [point["label"] for point in points] == ["DiT-S/8, 512 px", "DiT-S/8, adaln, depth 2", "mine"]
    assert points[0]["gmacs"] > 3.9 * points[2]["gmacs"] > 3.9 * points[1]["gmacs"]
    correlation = scaling.correlation([(point["gmacs"], point["fid"]) for point in points])
    assert report["correlation_results"] == pytest.approx(correlation)
    with Image.open(tmp_path / "scaling.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 100, "an empty picture"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.metrics.json", "b.json", "scaling.png"]


def test_correlation_is_of_the_logarithm():
    assert scaling.correlation([(1, 30), (10, 20), (100, 10)]) == pytest.approx(-1)
    assert scaling.correlation([(1, 1), (10, 2), (1000, 4)]) == pytest.approx(1)


def test_equal_results_have_no_correlation(tmp_path, capsys):
    (tmp_path / "own.json").write_text(json.dumps([{"model": "DiT-S/8", "fid": 5}] * 3))
    assert call(scaling.main, tmp_path / "a.png", "--results", tmp_path / "own.json") == 0
    out, err = capsys.readouterr()
    assert "nan" not in out
    assert "Warning" not in err


@pytest.mark.parametrize(("path", "words"), [("a.pdf", ".png"), ("nowhere/a.png", "folder"), ("b.png", "is a folder")])
def test_pictures_that_cannot_be_written_are_refused(path, words, tmp_path, capsys):
    (tmp_path / "b.png").mkdir()
    assert call(scaling.main, tmp_path / path) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Expecting"),
        ("[" * 100_000, "recursion"),
        ("[3]", '"fid"'),
        ('{"model": "DiT-S/8"}', '"fid"'),
        ('{"model": "DiT-S/8", "fid": NaN}', '"fid"'),
        ('{"model": "DiT-S/8", "fid": true}', '"fid"'),
        ('{"model": "DiT-S/3", "fid": 3}', "DiT-S/3"),
        ('{"model": ["DiT-S/8"], "fid": 3}', "['DiT-S/8'] is not text"),
        ('{"model": "DiT-S/8", "fid": 3, "num_heads": 7}', "number of heads 7"),
        ('{"model": "DiT-S/8", "fid": 3, "num_heads": 0}', "--num-heads: 0 is not a whole number"),
        ('{"model": "DiT-S/8", "fid": 3, "image_size": 1e9}', "1000000000.0 is not a whole number"),
        (
            '{"model": "DiT-S/2", "fid": 3, "image_size": 65536, "patch_size": 1, "hidden_size": 65536, "num_heads": 8192}',
            "overflow",
        ),
        ('{"fid": 3, "samples": {"path": "samples/cats.npz"}}', "cats.npz"),
        ('{"fid": 3, "samples": "cats"}', "does not tell their model"),
        (None, "No such file"),
    ],
)
def test_wrong_results_are_refused_with_file_and_reason(text, words, tmp_path, capsys):
    file = tmp_path / "own.json"
    if text is not None:
        file.write_text(text)
    assert call(scaling.main, tmp_path / "a.png", "--results", file) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{file}: " in error
    assert words in error
    assert not (tmp_path / "a.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# digits.py


def save_digits(path, images, labels):
    pixels = np.rint((images + 1) * 127.5).astype(np.uint8).reshape(-1, 8, 8, 1).repeat(3, axis=3)
    np.savez(path, arr_0=pixels, arr_1=labels)


def test_training_images_count_as_memorised_and_as_their_class(tmp_path, capsys):
    real, labels, _ = digits.real_digits()
    save_digits(tmp_path / "a.npz", real, labels)
    with np.load(tmp_path / "a.npz") as file:
        numbers = digits.measure(file["arr_0"], file["arr_1"])
        wrong = digits.measure(file["arr_0"], (file["arr_1"] + 1) % 10)
    assert numbers["class_accuracy"] > 0.99
    assert wrong["class_accuracy"] < 0.01
    assert numbers["memorised"] == 1
    assert numbers["variety"] == pytest.approx(1, abs=0.01)
    assert numbers["frechet_distance"] == pytest.approx(0, abs=0.05)
    assert call(digits.main, tmp_path / "a.npz") == 1
    assert "MISSED" in capsys.readouterr().out


def test_varied_samples_of_the_right_class_meet_the_bounds(tmp_path, capsys):
    real, labels, _ = digits.real_digits()
    shift = np.random.default_rng(0).normal(0, 0.2, real.shape)  # further from every training image than a copy would be
    save_digits(tmp_path / "a.npz", np.clip(real + shift, -1, 1), labels)
    assert call(digits.main, tmp_path / "a.npz") == 0
    assert "MISSED" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"", {"arr_0": np.zeros((30, 16, 16, 3))}, {"images": np.zeros(3)}])
def test_files_without_digits_are_refused(content, tmp_path, capsys):
    path = tmp_path / "a.npz"
    if isinstance(content, dict):
        np.savez(path, arr_1=np.zeros(30, int), **content)
    elif content is not None:
        path.write_bytes(content)
    assert call(digits.main, path) == 2
    assert f"{path}: " in capsys.readouterr().err.splitlines()[-1]
