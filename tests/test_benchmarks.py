"""benchmarks/timing.py and the scripts on it: that they time what they say, as small as it gets."""

import json
import os
import time

import pytest
from conftest import call

from benchmarks import sampling, timing, train_step
from runtime.errors import RunError


def sleeper(seconds):
    return lambda: lambda: time.sleep(seconds)


def test_a_race_takes_turns_and_tells_slow_from_fast():
    timings = timing.race({"fast": sleeper(0.002), "slow": sleeper(0.02)}, "cpu", repeats=3, warmup=1)
    assert [len(t.seconds) for t in timings.values()] == [3, 3]
    assert 0.002 <= timings["fast"].median < 0.02 <= timings["slow"].median
    assert all(t.first > 0 and t.peak_memory_gib > 0 for t in timings.values())


@pytest.mark.parametrize(("step", "words"), [(lambda: 1 / 0, "division by zero"), (lambda: os._exit(3), "exit code 3")])
def test_a_variant_that_fails_is_named(step, words):
    with pytest.raises(RunError, match=f"^lame: .*{words}"):
        timing.race({"well": sleeper(0.001), "lame": lambda: step}, "cpu", repeats=1)


SMALL = ["--model", "DiT-S/8", "--batch-size", "2", "--image-size", "64", "--device", "cpu", "--repeats", "2"]


@pytest.mark.parametrize(
    ("script", "extra"), [(train_step, ["--depth", "1", "--hidden-size", "48", "--num-heads", "2"]), (sampling, [])]
)
def test_reports_hold_together(script, extra, capsys):
    assert call(script.main, *SMALL, *extra, "--compile", "aot_eager", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    medians = {name: sorted(times["seconds"]) for name, times in report["variants"].items()}
    medians = {name: sum(seconds) / 2 for name, seconds in medians.items()}
    assert medians.keys() == {"baseline", "eager", "compiled"}
    assert report["baseline_seconds_per_step"] == pytest.approx(medians["baseline"])
    assert report["seconds_per_step"] == pytest.approx(medians[report["fastest"]])
    reached = report["flops_per_step"] / report["seconds_per_step"]
    assert report["share_of_matrix_rate"] == pytest.approx(reached / report["matrix_flops_per_second"])
    assert 0 < report["share_of_matrix_rate"] < 1, "nothing is faster than the products that it consists of"
    images = 2 if script is train_step else 2 / report["num_sampling_steps"]
    rate = report["images_per_second" if script is train_step else "images_per_second_without_decoding"]
    assert rate == pytest.approx(images / report["seconds_per_step"])


def test_a_profile_names_where_the_time_goes(tmp_path, capsys):
    argv = [*SMALL, "--variants", "baseline", "eager", "--depth", "2", "--profile", "--plot", tmp_path / "a.png"]
    assert call(train_step.main, *argv) == 0
    out = capsys.readouterr().out
    assert "speed-up" in out
    rows = {
        line[:34].strip(): [float(x.strip("% ")) for x in line[34:].split()]
        for line in out.split("where the time goes")[1].splitlines()[1:]
    }
    assert rows.keys() == set(train_step.COLOURS)
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == pytest.approx([100, 100], abs=1)
    for category in ("matrix products", "attention", "optimizer", "moving average"):
        assert min(rows[category]) > 0, f"{category} is part of every step"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("script", "extra", "words"),
    [
        (train_step, ["--grad-accum", 17], "--grad-accum 17: more than the 16 images"),
        (train_step, ["--num-heads", 5], "heads 5"),
        (train_step, ["--plot", "step.xyz"], "--plot step.xyz: name a .png file"),
        (sampling, ["--guidance-interval", 0.1, 0.5], "--guidance-interval: models here are random"),
        (sampling, ["--sampler", "heun", "--eta", 0.5], "eta is an option of ddim"),
        (sampling, ["--precision", "tf32", "--no-tf32"], "--precision tf32: contradicts --no-tf32"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_it_is_tried(script, extra, words, capsys):
    assert call(script.main, "--model", "DiT-S/2", "--device", "cpu", *extra) == 2
    assert words in capsys.readouterr().err


def test_without_a_compiler_the_compiled_variant_is_left_out_unless_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    _, mine, _ = train_step.parse_args(["--device", "cpu"])
    assert mine.variants == ["baseline", "eager"]
    assert "there is no no-such-compiler" in capsys.readouterr().err
    assert call(train_step.main, "--device", "cpu", "--variants", "compiled") == 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--model", "DiT-M/4"], "invalid choice"),
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
    assert words in error
    assert "Traceback" not in error
