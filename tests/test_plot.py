"""plot.py: what it draws of metrics.jsonl, whole or damaged."""

import json

import numpy as np
import pytest
from helpers import call
from PIL import Image

from tools import plot
from tools.plot import PlotConfig, column, draw, moving_mean, positions, read_rows

ROWS = [
    {"step": 100, "loss": 0.5, "mse": 0.4, "vb": 0.1, "grad_norm": 2.0, "training_seconds": 3600},
    {"step": 200, "loss": None, "mse": None, "vb": None, "grad_norm": None, "training_seconds": 7200},
    {"step": 200, "fid": 70.0, "fid_samples": 1000},
    {"step": 250, "val_loss": 0.3, "val_loss_t0": 0.9, "val_loss_t1": 0.2},
    {"step": 300, "loss": 0.2, "mse": 0.15, "vb": 0.05, "grad_norm": 1.0, "training_seconds": 10800},
]


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, rows, **options) -> the path of a run folder with them."""

    def make(name, rows=ROWS, end="", **options):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
        (folder / "options.json").write_text(json.dumps(options))
        return str(folder)

    return make


def drawn(runs, **options):
    """{title: axes} of the figure of these runs."""
    figure = draw({run: read_rows(run) for run in runs}, PlotConfig(tuple(runs), **options))
    return {axes.get_title(): axes for axes in figure.axes}


def test_each_quantity_has_a_panel_and_each_run_a_colour(make_run):
    runs = [make_run("a"), make_run("b")]
    panels = drawn(runs, smooth=1)
    assert list(panels) == ["Loss", "Loss, part mse", "Loss, part vb", "Gradient norm", "Validation loss", "FID"]
    lines = [line for line in panels["Loss"].lines if len(line.get_xdata())]
    assert [line.get_color() for line in lines] == ["C0", "C1"]
    assert np.array_equal(lines[0].get_xdata(), [100, 300]), "a null is no point"
    assert list(lines[0].get_ydata()) == pytest.approx([0.5, 0.2])
    assert len(panels["Validation loss"].lines) == 6, "the total and two ranges of t, for two runs"
    assert [text.get_text() for text in panels["Validation loss"].texts] == ["t0", "t1"]
    texts = [text.get_text() for text in panels["Loss"].figure.legends[0].get_texts()]
    assert texts == ["a", "b"]


def test_runs_of_the_same_name_are_told_apart_by_their_paths(make_run):
    runs = [make_run("x/000-DiT-S-2"), make_run("y/000-DiT-S-2")]
    figure = drawn(runs)["Loss"].figure
    assert [text.get_text() for text in figure.legends[0].get_texts()] == runs


def test_the_x_axis_in_steps_images_and_hours(make_run):
    run = make_run("a", global_batch_size=32)
    rows = read_rows(run)
    assert list(positions(run, rows, [100, 300], "steps")) == [100, 300]
    assert list(positions(run, rows, [100, 300], "images")) == [3200, 9600]
    # FID and validation have no time of their own: that of their step
    assert list(positions(run, rows, [50, 200, 250], "hours")) == [0.5, 2.0, 2.5]
    assert drawn([run], x="hours")["FID"].get_xlabel() == "hours of training"


def test_the_moving_mean_against_a_loop():
    values = np.random.default_rng(0).normal(size=50)
    for window in (1, 2, 5, 8, 99):
        slow = [values[max(0, i - (window - 1) // 2) : i + window // 2 + 1].mean() for i in range(50)]
        np.testing.assert_allclose(moving_mean(values, window), slow, rtol=1e-12, atol=1e-12)
    assert np.array_equal(moving_mean(values, 1).round(12), values.round(12))


def test_damaged_rows_are_left_out(make_run):
    rows = [*ROWS, ["a list"], {"loss": 1}, {"step": True, "loss": 3}, {"step": 400, "loss": float("nan")}, {"step": "5"}]
    run = make_run("a", rows, end='{"step": 500, "lo')
    assert column(read_rows(run), "loss") == ([100, 300], [0.5, 0.2])
    assert column(read_rows(run), "no such column") == ([], [])


def test_panels_without_numbers_are_left_out(make_run):
    runs = [make_run("a", [{"step": 10, "loss": 0.5}]), make_run("b", [{"step": 20, "fid": 3.0}])]
    assert list(drawn(runs)) == ["Loss", "FID"]


def test_distances_of_other_networks_have_panels_of_their_own(make_run):
    numbers = {"fd_timm:vit": 3.0, "fd_timm:vit_samples": 100, "fd_timm:vit_tiny": 5.0, "fd_timm:vit_tiny_samples": 100}
    panels = drawn([make_run("a", [{"step": 10, "fid": 4.0, "fid_samples": 100, **numbers}])])
    assert list(panels) == ["FID", "FD of timm:vit", "FD of timm:vit_tiny"]
    assert [len(axes.lines) for axes in panels.values()] == [1 + 1, 1, 1]  # the first also has the legend's line


def test_the_command_writes_a_picture(make_run, tmp_path, capsys):
    rows = [{"step": i, "loss": 1 / (1 + i), "x": i} for i in range(120)]  # smoothed over two rows
    runs = [make_run("a", global_batch_size=8), make_run("b", rows, global_batch_size=16), make_run("c", [])]
    output = tmp_path / "curves.png"
    assert call(plot.main, *runs, "--output", output, "--x", "images") == 0
    assert Image.open(output).size[0] > 1000
    assert f"{runs[2]}: left out, metrics.jsonl has no rows yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([], [], "no rows in metrics.jsonl"),
        ([{"step": 1, "other": 2}], [], "none of the columns loss"),
        (ROWS, ["--x", "images"], "options.json has no global_batch_size; choose --x steps"),
        ([{"step": 1, "loss": 2}], ["--x", "hours"], "has no training_seconds; choose --x steps"),
        (ROWS, ["--animate", "film.gif"], "has no grids in samples/; train with --sample-every"),
        (ROWS, ["other", "--animate", "film.gif"], "--animate: shows one run, these are 2"),
    ],
)
def test_mistakes_end_in_one_line(rows, options, words, make_run, tmp_path, monkeypatch, capsys):
    run = make_run("a", rows)
    monkeypatch.chdir(tmp_path)
    assert call(plot.main, run, *options) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("plot.py: error: ") or "error: " in last
    assert words in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"], "nothing is written"
