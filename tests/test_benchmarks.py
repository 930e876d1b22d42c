"""The benchmarks: that they measure and draw what they say, on sizes as small as possible."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import SHARDS, call
from PIL import Image

import benchmarks.__main__
import models
from benchmarks import gpu, sampling, timing, train_step
from runtime.errors import RunError
from studies import digits, latents, lora, scaling

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


SMALL = ["--model", "DiT-S/8", "--batch-size", 2, "--image-size", 64, "--device", "cpu", "--repeats", 2, "--warmup", 0]


@pytest.fixture
def small_model(monkeypatch):
    """The name DiT-S/8 for a model of one narrow block; small matrices for the rate of their products."""
    monkeypatch.setattr(timing.MatrixProduct, "sides", (64, 64, 64))
    monkeypatch.setattr(timing, "PROFILED_CALLS", 1)
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
    assert product().__call__().shape == (2048, 2048)
    assert product.rate(timing.Timing(seconds=[2.0, 0.5, 1.0])) == 2 * 2048**3
    product = timing.MatrixProduct("cpu", "bf16", (3, 5, 7))
    assert (product().__call__().shape, product().__call__().dtype) == ((3, 7), torch.bfloat16)
    assert product.rate(timing.Timing(seconds=[0.5])) == 2 * 2 * 3 * 5 * 7


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
        (train_step, ["--compile", "nothing"], "--compile nothing: not a backend"),
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


def kernel(name, microseconds, operation=None):
    """A GPU's kernel as torch.profiler shows it: an event of its own, and one of the kernels of its operation."""
    if operation:
        operation.kernels.append(SimpleNamespace(name=name, duration=microseconds))
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=torch.autograd.DeviceType.CUDA, time_range=span)


def operation(name, parent=None):
    return SimpleNamespace(name=name, device_type=torch.autograd.DeviceType.CPU, cpu_parent=parent, kernels=[])


def test_kernels_of_a_gpu_are_divided_by_their_operations_and_names():
    """With PyTorch's and NVIDIA's names of kernels, most of which an H200 showed: a GPU cannot be asked for here."""
    average, adamw = operation("moving average"), operation("Optimizer.step#AdamW.step")
    parts = [operation("aten::mm"), operation("aten::mul_", average), operation("aten::_fused_adamw_", adamw)]
    full = operation("Command Buffer Full", parts[2])
    full.kernels.append(SimpleNamespace(name="void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>",
        duration=20.0))  # fmt: skip
    elementwise = "void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<float>>"
    events = [
        average, adamw, *parts, full,
        kernel("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", 100.0, parts[0]),
        kernel(elementwise, 10.0, parts[1]),
        kernel("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", 20.0, parts[2]),
        kernel("moving average", 10.0),  # the span of its kernels, which the profiler shows among them
        kernel(elementwise, 5.0),
        kernel("triton_per_fused__scaled_dot_product_flash_attention_add_native_layer_norm_3", 7.0),
        kernel("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", 30.0),
        kernel("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", 3.0),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 4.0),
        kernel("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 11.0),
    ]  # fmt: skip
    profile = SimpleNamespace(events=lambda: events)
    seconds = train_step.where_time_goes(profile, torch.device("cuda"))  # AdamW's kernel counts once
    found = dict.fromkeys(train_step.COLOURS, 0.0)
    for (category, _), value in seconds.items():
        found[category] += value * 1e6
    assert found == pytest.approx({
        "matrix products": 111, "attention": 33, "norms, GELU, other elementwise": 12, "optimizer": 20,
        "moving average": 10, "exchange of gradients": 4, "Python, dispatch, waiting": 0,
    })  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# rows.py


def measured(name, tmp_path, *words):
    """The rows of one measurement in the file of the numbers."""
    argv = name, *words, "--folder", tmp_path, "--json", tmp_path / "a.json"
    assert call(benchmarks.__main__.main, *argv) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert (found["settings"]["rows"], [path.name for path in tmp_path.iterdir()]) == ([name], ["a.json"])
    return found[name]


DESIGN = "--model DiT-S/8 --image-size 64 --depth 1 --hidden-size 48 --num-heads 2 --batch-size 2 --repeats 1".split()
READING = "--images 44 --image-size 16 --batch-size 2 --num-workers 0 --seconds 0.02 --repeats 2".split()


def test_saving_shows_what_the_loop_loses(tmp_path, capsys):
    seconds = {row["what"]: row["seconds"] for row in measured("saving", tmp_path, *DESIGN)}
    assert abs(seconds.pop("lost by a loop that goes on")) < 10
    assert len(seconds) == 4
    assert min(seconds.values()) > 0
    assert "| written at once |" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["images", "latents"])
def test_reading_is_measured(name, tmp_path):
    (row,) = measured(name, tmp_path, *READING, "--images", 4)
    assert 0 < row["least"] <= row["per second"] <= row["most"]


def test_a_cold_cache_needs_enough_latents(tmp_path, capsys):
    assert measured("latents", tmp_path, *READING, "--cold", "--images", 99)[0]["per second"] > 0
    assert call(benchmarks.__main__.main, "latents", *READING, "--cold") == 2
    assert "--images 44: --cold needs 84" in capsys.readouterr().err


def test_texts_cost_more_than_classes(tmp_path):
    rows = measured("text", tmp_path, *DESIGN, "--text-width", 8, "--text-length", 6)
    assert [row["model of"] for row in rows] == ["classes", "texts"]
    assert rows[0]["GMACs"] < rows[1]["GMACs"]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.skipif(not SHARDS, reason="this version of PyTorch does not shard models on CPUs")
def test_sharding_and_listing_are_measured_in_two_processes(tmp_path):
    copies, shards = measured("memory", tmp_path, *DESIGN, "--processes", 2)
    assert copies["GiB of all"] >= copies["GiB of the largest"] > copies["GiB before the model"] > 0
    assert shards["million parameters"] == copies["million parameters"]
    rows = measured("listing", tmp_path, "--images", 30)
    assert [(row["way"], row["process"]) for row in rows] == [(w, p) for w in ("ImageFolder", "train.py") for p in "01"]


def test_unknown_rows_are_refused(capsys):
    assert call(benchmarks.__main__.main, "colour") == 2
    assert "ROW colour: they are images, latents" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# gpu.py


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """bench(*options) runs gpu.py with a list of three rows: well, lame, which fails, and late, which takes a minute.
    Returns the exit status and the rows' names and errors."""
    made = []

    def late(bench):
        if bench.left() < 60:
            bench.deadline = 0.0  # the time passes
            raise gpu.TimeUpError
        return {"speed": 2.0}

    def lame(bench, what):
        raise RunError(what)

    rows = {"well": (lambda bench: made.append(1) or {"speed": len(made) + 0.5, "share": 0.25},), "lame": (lame, "broke"),
        "late": (late,)}  # fmt: skip
    monkeypatch.setattr(gpu, "make_list", lambda config: rows)

    def run(*options):
        status = call(gpu.main, "--device", "cpu", "--folder", tmp_path / "gpu", *options)
        return status, [(row["name"], row.get("error")) for row in gpu.read_rows(tmp_path / "gpu/rows.jsonl")]

    return run


def test_the_list_goes_on_where_it_ended(bench, tmp_path, capsys):
    assert bench("--only", "we") == (0, [("well", None)])
    assert bench("--minutes", 0.5) == (1, [("well", None), ("lame", "broke")]), "late was cut off: it is no row"
    out, err = capsys.readouterr()
    assert "1 rows are left; the same command goes on with late" in out
    assert "rows that failed: lame; with --retry" in err
    assert bench("--minutes", 0.5)[1][2] == ("late", "did not end within 0 s"), "it had the whole time, and needs more"
    assert bench("--retry")[1][3:] == [("lame", "broke"), ("late", None)]
    report = json.loads((tmp_path / "gpu/gpu.json").read_text())
    assert [(row["name"], row.get("speed")) for row in report["rows"]] == [("well", 1.5), ("lame", None), ("late", 2.0)]
    assert report["machine"] == timing.machine("cpu")
    text = (tmp_path / "gpu/gpu.md").read_text()
    assert "| name | speed | share | took seconds |" in text
    assert "| well | 1.5 | 25.0% |" in text


def test_rows_of_two_settings_are_not_mixed(bench, tmp_path, capsys):
    assert bench("--only", "well")[0] == 0
    assert bench("--small")[0] == 2
    assert "its rows were measured with small False" in capsys.readouterr().err
    assert bench("--only", "none")[0] == 2
    assert "--only none: no row begins so; they are well, lame, late" in capsys.readouterr().err
    with open(tmp_path / "gpu/rows.jsonl", "a") as file:
        file.write('{"name": "la')  # cut off by a crash
    assert bench("--only", "well") == (0, [("well", None)])
    (tmp_path / "gpu/rows.jsonl").write_text("{")
    assert bench()[0] == 2
    assert "rows.jsonl: damaged" in capsys.readouterr().err


def test_the_reason_of_a_failure_is_found_in_the_output():
    assert (
        gpu.reason_in("bar\ntrain.py: error: --x: wrong\nTraceback\nValueError: later\n") == "train.py: error: --x: wrong"
    )
    assert gpu.reason_in("Traceback\n  File\nRuntimeError: cause\n====\ntorch.X.ChildFailedError: \n===") == (
        "RuntimeError: cause"
    )
    assert gpu.reason_in("Killed\n") == "Killed"
    assert gpu.reason_in("") == ""


def test_the_lists_of_one_and_of_eight_gpus():
    alone, eight = (list(gpu.make_list(gpu.GPUConfig(processes=number))) for number in (1, 8))
    assert {name.split("-")[0] for name in alone} == {"train", "command", "sample", "saving", "start", "matrix"}
    assert set(eight) - set(alone) == {"train-XL-256-b128-sharded"}
    assert {name.split("-")[0] for name in eight} == {"train", "command"}


def run_here(bench, *words, **options):
    """`Bench.run` in this process: starting Python takes most of the time of a small row."""
    name = f"{words[1]}.__main__" if words[0] == "-m" else words[0].removesuffix(".py")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert call(importlib.import_module(name).main, *words[2 if words[0] == "-m" else 1 :]) == 0
    return out.getvalue()


@pytest.mark.slow
def test_rows_of_each_kind_can_be_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu.Bench, "run", run_here)
    monkeypatch.setattr(timing, "PROFILED_CALLS", 1)
    kinds = "train-XL-256-b2-original command-train sample-XL-256-b2-original command-sample-20 matrix".split()
    argv = "--small", "--device", "cpu", "--folder", tmp_path
    status = call(gpu.main, *argv, "--only", *kinds)
    rows = {row["name"]: row for row in gpu.read_rows(tmp_path / "rows.jsonl")}
    assert status == 0, {name: row.get("error") for name, row in rows.items()}
    assert len(rows) == 5
    row = rows["train-XL-256-b2-original"]
    assert row["images/s"] == pytest.approx(2 / row["seconds_per_step"])
    assert sum(row["profile"].values()) == pytest.approx(1)
    row = rows["sample-XL-256-b2-original"]
    assert row["images/s, 250 steps"] == pytest.approx(2 / (250 * row["seconds_per_step"] + row["decoding seconds"]))
    assert rows["command-train"]["images/s"] > 0
    assert rows["command-sample-20"]["images/s, 20 steps"] > 0
    assert rows["matrix"]["square TFLOP/s"] > 0
    out = capsys.readouterr().out
    assert "Where the time goes" in out
    assert all(name in out for name in rows)


def test_the_start_is_timed_until_the_first_line_of_the_metrics(tmp_path, monkeypatch):
    """With a shell in the place of train.py, which writes the line after a while."""

    def start(bench, *words, **options):
        assert words[0] == "train.py"
        started.append("--compile" in words)
        run = words[words.index("--run-dir") + 1]
        return subprocess.Popen(["sh", "-c", f"sleep 0.2; mkdir -p {run}; echo 1 > {run}/metrics.jsonl; sleep 60"],
            start_new_session=True)  # fmt: skip

    started = []
    monkeypatch.setattr(gpu.Bench, "start", start)
    assert call(gpu.main, "--small", "--device", "cpu", "--folder", tmp_path, "--only", "start") == 0
    (row,) = gpu.read_rows(tmp_path / "rows.jsonl")
    assert started == [False, True, True]
    assert all(0.2 < row[f"{name}, seconds"] < 20 for name in ("eager", "compiled", "compiled again"))


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
        ('{"model": "DiT-S/8", "fid": 3, "image_size": 1e9}', "'1000000000.0' is not the side of a square"),
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
    side = int(images.shape[1] ** 0.5)
    pixels = np.rint((images + 1) * 127.5).astype(np.uint8).reshape(-1, side, side, 1).repeat(3, axis=3)
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


def with_gaps(images, number, seed=0):
    """The images (N, H, W), uint8, where `number` short stretches of the strokes are erased."""
    random, places, out = np.random.default_rng(seed), np.indices(images.shape[1:]), images.copy()
    for image in out:
        for _ in range(number):
            ink = np.argwhere(image > 127)
            y, x = ink[random.integers(len(ink))]
            image[np.hypot(places[0] - y, places[1] - x) < 2] = 0
    return out


def test_the_judge_of_mnists_digits_sees_gaps_in_strokes():
    """One or two gaps leave most digits readable; the distance and the share of broken ones must rise all the same."""
    images, _ = digits.mnist()
    real, labels, known = images.test[:300, 0].numpy(), images.test_labels[:300].numpy(), digits.reference_of(28, True)
    whole, *gaps = (
        digits.measure(np.repeat(with_gaps(real, n)[..., None], 3, axis=3), labels, known, errors=True) for n in (0, 1, 2)
    )
    for (values, errors), rise in zip(gaps, (0.2, 0.4), strict=True):
        assert values["broken"] > whole[0]["broken"] + rise
        assert values["frechet_distance"] > whole[0]["frechet_distance"] + errors["frechet_distance"]
    assert whole[0]["broken"] < 0.05
    assert whole[0]["class_accuracy"] > 0.97
    assert gaps[0][0]["class_accuracy"] > 0.85


def test_copies_of_mnists_digits_count_as_memorised(tmp_path, capsys):
    images, _ = digits.mnist()
    pixels, labels = images.train[:100, 0].flatten(1).numpy() / 127.5 - 1, images.train_labels[:100].numpy()
    save_digits(tmp_path / "a.npz", pixels, labels)
    assert call(digits.main, tmp_path / "a.npz") == 1
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert lines.keys() == {"class_accuracy", "memorised", "broken", "variety", "frechet_distance"}
    assert re.match(r"memorised +1\.000 ± 0\.000 +0\.0\d\d ± 0\.0\d\d +bound: < 0\.05, MISSED", lines["memorised"])
    assert "MISSED" not in lines["class_accuracy"]


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


@pytest.mark.parametrize(
    ("what", "found"),
    [("colours", {"kind": "AutoencoderTiny"}), ("shift", {"shift": 2.0, "seed": 0})],
)
def test_latents_of_small_autoencoders_and_shifts_are_compared(what, found, image_folder, tmp_path):
    argv = [what, "--data-path", image_folder, "--output", tmp_path / "out", "--kinds", "AutoencoderTiny", "--shifts", 2]
    argv += ["--autoencoder-steps", 1, "--steps", 1, "--num-samples", 2, "--seeds", 1]
    assert call(latents.main, *argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert found.items() <= rows[0].items()
    assert rows[0]["distance"] > 0 if what == "shift" else max(rows[0]["decoded"], rows[0]["drawn"]) < 1
    (picture,) = (tmp_path / "out").glob("*.png")
    with Image.open(picture) as image:
        assert image.width >= 8 * 64 if what == "colours" else image.width >= 2 * 64


def test_how_much_of_the_colours_is_there():
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.integers(0, 256, (2, 3, 64, 64), dtype=np.uint8))
    grey = images.float().mean(1, keepdim=True).round().to(torch.uint8).expand(-1, 3, -1, -1)
    assert latents.explained(images, images) == 1
    assert latents.explained(images, grey) == pytest.approx(0, abs=0.01)
    assert latents.explained(images, 255 - images) == pytest.approx(-3), "the opposite colours: 1 - |-2 c|^2 / |c|^2"


def test_lora_is_compared_with_all_weights(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # a process that is spawned would import PyTorch
    monkeypatch.setattr(lora.multiprocessing, "get_context", lambda kind: fork)
    digits = np.random.default_rng(0).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    assert (lora.turn(lora.turn(digits)) == digits).all()
    assert lora.real("enlarged", 100) == lora.real("turned", 50) == 1, "what is turned or enlarged is still recognised"
    config = lora.LoraConfig(output=str(tmp_path), steps=20, samples=10)
    found = lora.measure(config, "enlarged", "LoRA, rank 4", 3e-3)
    assert 0 <= found["accuracy"] <= 1
    assert min(found["seconds_per_step"], found["peak_mib"] - 100) > 0
    assert 0.7 < found["checkpoint_mb"] < 1.5, "a quarter is A and B, the rest their average and AdamW's two moments"
