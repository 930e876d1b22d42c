"""sample.py as a whole: the original's images from a seed, labels by name, and what mistakes get."""

import errno
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image
from reference import fill, filled, golden

import sample
import sample_ddp
import train
from checkpoint import files
from checkpoint.opened import Checkpoint, record_of
from data.autoencoder import Pixels
from data.condition import Vectors
from models import DiT, DiT_models
from runtime.errors import UserError
from sampling import grid, opened, pipeline, web
from sampling.config import ComputeConfig, SamplerConfig
from tools import convert, likelihood


def drawn_by_sample(monkeypatch):
    """A list to which the x_0 that sample.py draws are appended; three of their channels are written."""
    drawn, steps = [], pipeline.Pipeline.steps

    def note(*args, **options):
        for out in steps(*args, **options):
            yield {**out, "sample": out["sample"][:, :3]}
        drawn.append(out["sample"])

    monkeypatch.setattr(pipeline.Pipeline, "steps", note)
    return drawn


def test_the_scripts_own_random_stream_is_the_originals(tmp_path, monkeypatch):
    """The golden latents, through what sample.py runs: guided without a doubled sampling batch."""
    drawn = drawn_by_sample(monkeypatch)
    monkeypatch.setattr(opened, "load_space", lambda vae, channels: Pixels(channels))
    for key, expected in golden("sample_script").items():
        name, size, seed, steps, cfg_scale, labels = key.split(":")
        torch.save(filled(DiT_models[name], input_size=int(size), num_classes=1000).state_dict(), tmp_path / "golden.pt")
        argv = ["--ckpt", tmp_path / "golden.pt", "--seed", seed, "--cfg-scale", cfg_scale, "--device", "cpu"]
        argv += ["--num-sampling-steps", steps, "--labels", *labels.split(","), "--output", tmp_path / "a.png"]
        assert call(sample.main, *argv) == 0
        assert np.abs(drawn.pop().numpy() - expected).max() <= 2e-4 * np.abs(expected).max(), key


def test_a_grid_is_written(tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "grid.png"
    command = ["--ckpt", tiny_checkpoint, "--num-sampling-steps", 3, "--output", output, "--device", "cpu"]
    assert call(sample.main, *command, "--labels", 0, 3, "--samples-per-label", 3, "--enlarge", 4, "--columns", 3) == 0
    with Image.open(output) as grid:
        assert grid.size == (2 + 3 * (32 + 2), 2 + 2 * (32 + 2))
        pixels = np.asarray(grid)
    block = pixels[2 : 2 + 4, 2 : 2 + 4]
    assert (block == block[0, 0]).all(), "enlarged without smoothing"
    before = output.read_bytes()
    assert call(sample.main, *command, "--labels", 0, 3, "--samples-per-label", 3, "--enlarge", 4, "--columns", 3) == 0
    assert output.read_bytes() == before, "the same seed must give the same images"
    assert call(sample.main, *command, "--seed", 1, "--captions") == 0
    assert output.read_bytes() != before


@pytest.mark.parametrize("option", ["--output", "--save-trajectory"])
def test_a_folder_that_is_closed_to_us_is_refused_before_any_work(tiny_checkpoint, tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path / "closed"))  # root may write anywhere
    monkeypatch.setattr(pipeline.Pipeline, "build", mock.Mock(side_effect=AssertionError("a model is built")))
    (tmp_path / "closed").mkdir()
    output = ["--output", tmp_path / "a.png", option, tmp_path / "closed/a.gif"]
    assert call(sample.main, "--ckpt", tiny_checkpoint, *output) == 2
    assert f"{option} {tmp_path}/closed/a.gif: cannot be written to (permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.png", "t.png", "t.gif"])
def test_a_full_disk_is_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, name):
    write, full = grid.replace_file, mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(grid, "replace_file", lambda path, w: full() if Path(path).name == name else write(path, w))
    command = ["--ckpt", tiny_checkpoint, *SHORT, "--labels", 1, "--output", tmp_path / "a.png"]
    assert call(sample.main, *command, *([] if name == "a.png" else ["--save-trajectory", tmp_path / name])) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"{name}: cannot be written (No space left on device)")
    assert (tmp_path / "a.png").exists() == (name != "a.png"), "the images must not be lost with the trajectory"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "lower --samples-per-label"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "lower --samples-per-label"),
    ],
)
def test_what_stops_it_is_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, error, status, words):
    monkeypatch.setattr(pipeline.Pipeline, "steps", mock.Mock(side_effect=error))
    assert call(sample.main, "--ckpt", tiny_checkpoint, "--output", tmp_path / "a.png") == status
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_images_that_are_not_finite_are_not_written(lively, tmp_path, capsys):
    command = ["--ckpt", lively, *SHORT, "--labels", 1, "--output", tmp_path / "a.png"]
    assert call(sample.main, *command, "--cfg-scale", 1e38) == 2
    assert "not finite: --cfg-scale is too large" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_without_a_checkpoint_only_the_released_models_are_drawn_from(capsys):
    for wrong in (["--model", "DiT-S/2"], ["--image-size", "128"], ["--num-classes", "10"]):
        assert call(sample.main, *wrong) == 2
        assert "name your own with --ckpt" in capsys.readouterr().err


def test_a_model_without_null_labels_is_drawn_without_guidance(tmp_path, capsys):
    sizes = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 1, "num_heads": 2}
    weights = DiT(**sizes, num_classes=3, class_dropout_prob=0.0).state_dict()
    args = {"num_heads": 2, "label_dropout": 0.0, "num_classes": 3, "image_size": 8, "vae": "none"}
    files.save(tmp_path / "a.pt", {"ema": weights, "args": args})
    command = ["--ckpt", tmp_path / "a.pt", "--output", tmp_path / "a.png", "--num-sampling-steps", 2, "--labels", 1]
    assert call(sample.main, *command, "--cfg-scale", 3) == 2
    assert "--cfg-scale 3.0: " in (line := capsys.readouterr().err)
    assert "trained without null labels; pass --cfg-scale 1" in line
    drawn = []
    for scale in ([], ["--cfg-scale", 1]):
        assert call(sample.main, *command, *scale) == 0
        drawn.append((tmp_path / "a.png").read_bytes())
    assert drawn[0] == drawn[1]


SHORT = ["--num-sampling-steps", "4", "--device", "cpu", "--columns", "3"]


def test_every_command_draws_from_the_average_that_is_named(tiny_checkpoint, tmp_path, capsys):
    """By the trained weights under another name: a file that holds these weights alone gives the same."""
    state = torch.load(tiny_checkpoint, weights_only=True)
    weights = fill(DiT(**Checkpoint(state).model_config)).state_dict().items()
    scales = {"ema": 0.5, "0.5": 0.45, "model": 0.4}
    found = {name: {key: scale * value for key, value in weights} for name, scale in scales.items()}
    several, alone = tmp_path / "0000004.pt", tmp_path / "alone.safetensors"
    torch.save({**state, "ema": found["ema"], "emas": {"0.5": found["0.5"]}, "model": found["model"]}, several)
    assert call(convert.main, several, alone, "--average", 0.5) == 0
    assert all(torch.equal(value, found["0.5"][key]) for key, value in Checkpoint.open(alone).weights.items())
    drawn = {}
    for name, source in {"named": [several, "--average", 0.5], "alone": [alone], "usual": [several]}.items():
        argv = ["--ckpt", *source, "--num-sampling-steps", 3, "--device", "cpu"]
        assert call(sample.main, *argv, "--output", tmp_path / "a.png") == 0
        several_images = ["--num-fid-samples", 3, "--sample-dir", tmp_path / name]
        assert call(sample_ddp.main, *argv, *several_images) == 0
        output = ["--data-path", "digits", "--num-images", 2, "--num-timesteps", 3, "--output", tmp_path / "a.json"]
        assert call(likelihood.main, "--ckpt", *source, *output, "--device", "cpu") == 0
        (npz,) = (tmp_path / name).glob("*.npz")
        assert npz.stem.endswith("-average-0.5-seed-0") == (name == "named")
        report = json.loads((tmp_path / "a.json").read_text())
        assert report["settings"]["average"] == ("0.5" if name == "named" else None)
        drawn[name] = (tmp_path / "a.png").read_bytes(), npz.read_bytes(), report["total"]
    assert drawn["named"] == drawn["alone"]
    assert all(a != b for a, b in zip(drawn["named"], drawn["usual"], strict=True))
    folder = ["--num-fid-samples", 3, "--sample-dir", tmp_path / "named", "--folder", npz_name(tmp_path / "named")]
    assert call(sample_ddp.main, "--ckpt", several, "--num-sampling-steps", 3, "--device", "cpu", *folder) == 2
    assert "its images were made with --average 0.5, now None" in capsys.readouterr().err


def npz_name(folder):
    return next(folder.glob("*.npz")).stem


@pytest.fixture(scope="module")
def lively(tiny_checkpoint, tmp_path_factory):
    """A checkpoint whose predictions are far from zero, and depend on the class."""
    state = torch.load(tiny_checkpoint, weights_only=True)
    model = fill(DiT(**Checkpoint(state).model_config))
    path = tmp_path_factory.mktemp("lively") / "lively.pt"
    files.save(path, {**state, "ema": {key: 0.5 * value for key, value in model.state_dict().items()}})
    return path


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver++", "unipc", "heun", "euler"])
def test_every_sampler_draws(lively, tmp_path, sampler):
    output = tmp_path / "a.png"
    command = ["--ckpt", lively, *SHORT, "--sampler", sampler, "--labels", 1, 2, "--output", output]
    assert call(sample.main, *command) == 0
    first = output.read_bytes()
    assert call(sample.main, *command) == 0
    assert output.read_bytes() == first


@pytest.mark.parametrize(
    "change",
    [
        ["--cfg-scale", 2],
        ["--guidance-interval", 0.1, 0.6],
        ["--guidance-schedule", "linear"],
        ["--guidance-schedule", "power-cosine"],
        ["--guidance-rescale", 0.7],
        ["--guide-ckpt", "CKPT"],
        ["--sampler", "ddim", "--eta", 0.5],
        ["--sampler", "euler", "--spacing", "trailing"],
    ],
    ids=str,
)
def test_every_option_changes_the_images(lively, tmp_path, monkeypatch, change):
    drawn = drawn_by_sample(monkeypatch)

    def images(name, *extra):
        command = ["--ckpt", lively, *SHORT, "--labels", 1, 2, "--output", tmp_path / name]
        assert call(sample.main, *command, *extra) == 0
        return drawn.pop()

    weaker = tmp_path / "weaker.pt"  # with other weights
    state = torch.load(lively, weights_only=True)
    state["ema"] = {key: value * 0.9 for key, value in state["ema"].items()}
    torch.save(state, weaker)
    base = [option for option in change[:2] if "--sampler" in change] or ["--cfg-scale", 4]
    change = [weaker if word == "CKPT" else word for word in change]
    assert not torch.allclose(images("a.png", *base), images("b.png", *change), rtol=1e-3)


def test_interpolations_start_and_end_at_their_ends(lively, tmp_path):
    def pixels(name, *extra):
        command = ["--ckpt", lively, *SHORT, "--sampler", "ddim", "--output", tmp_path / name]
        assert call(sample.main, *command, *extra) == 0
        grid = np.asarray(Image.open(tmp_path / name)).astype(int)
        return [grid[2:10, left : left + 8] for left in range(2, grid.shape[1] - 8, 10)]

    one, two = pixels("a.png", "--labels", 1)[0], pixels("b.png", "--labels", 2)[0]
    row = pixels("c.png", "--labels", 1, 2, "--interpolate", "classes")
    assert np.abs(row[0] - one).max() <= 1
    assert np.abs(row[2] - two).max() <= 1
    assert np.abs(row[1] - one).max() > 0
    other = pixels("d.png", "--labels", 1, "--seed", 0, "--interpolate", "seeds", "--to-seed", 9)
    assert np.abs(other[0] - one).max() <= 1
    assert np.abs(other[2] - one).max() > 1


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def read(path):
    return np.asarray(Image.open(path)).astype(int)[2:10, 2:10, 0]


def test_an_image_is_changed_by_its_strength_inverted_and_inpainted(tiny_checkpoint, tmp_path, picture):
    output = tmp_path / "a.png"
    command = ["--ckpt", tiny_checkpoint, "--device", "cpu", "--labels", 1, "--cfg-scale", 1, "--output", output]
    command += ["--init-image", picture]
    original, distance = np.asarray(Image.open(picture)).astype(int), {}
    for strength in (0.05, 1.0):
        assert call(sample.main, *command, "--num-sampling-steps", 20, "--strength", strength) == 0
        distance[strength] = np.abs(read(output) - original).mean()
    assert distance[0.05] < 20 < distance[1.0]
    assert call(sample.main, *command, "--num-sampling-steps", 500, "--sampler", "ddim", "--invert") == 0
    assert np.abs(read(output) - original).mean() < 6, "inversion must lead back to the image"
    assert call(sample.main, *command, "--num-sampling-steps", 300, "--sampler", "ddim", "--invert") == 0, "no even stride"
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    command += ["--num-sampling-steps", 10, "--mask", tmp_path / "mask.png", "--sampler"]
    for sampler in ("ddpm", "dpm-solver++"):
        assert call(sample.main, *command, sampler) == 0
        assert np.abs(read(output) - original)[:, :4].max() <= 2, f"{sampler}: what is known must stay"
        assert np.abs(read(output) - original)[:, 4:].mean() > 10, f"{sampler}: what is white must be redrawn"


def test_a_runs_folder_stands_for_its_newest_checkpoint(tiny_checkpoint, tmp_path):
    run = tiny_checkpoint.parents[1]
    for name, ckpt, guide in (("a.png", tiny_checkpoint, tiny_checkpoint), ("b.png", run, run)):
        command = [*SHORT, "--labels", 1, "--guide-ckpt", guide, "--output", tmp_path / name]
        assert call(sample.main, "--ckpt", ckpt, *command) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_word_that_is_a_name_and_another_classs_number_is_refused(tmp_path, capsys):
    """Class folders called 0 to 11 are numbered in the order of their names: 0, 1, 10, 11, 2 ..."""
    names, ckpt = sorted(str(i) for i in range(12)), tmp_path / "run"
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / "0.png")
    run = "--vae none --image-size 8 --global-batch-size 4 --device cpu --num-workers 0 --max-steps 1 --data-path"
    sizes = "--hidden-size 16 --depth 1 --num-heads 2 --patch-size 2".split()
    run = [*run.split(), tmp_path / "images"]
    assert call(train.main, *run, *sizes, "--run-dir", ckpt) == 0
    assert (ckpt / "log.txt").read_text().count('Classes are numbered in the order of their names: "10" is class 2.') == 1
    in_doubt = 'is the name of class 2 and the number of class "8"; write name:10 or number:10'
    for option, more in (
        ("--sample-labels", [*sizes, "--sample-every", 1, "--sample-labels", 10]),
        ("--keep-classes", ["--init-from", ckpt, "--keep-classes", 10, *"-" * 11]),
    ):
        assert call(train.main, *run, *more, "--run-dir", tmp_path / "other") == 2
        assert f"{option} 10: {in_doubt}" in capsys.readouterr().err
    command = ["--ckpt", ckpt, *SHORT, "--output", tmp_path / "a.png", "--labels"]
    assert call(sample.main, *command, 10) == 2
    assert f"--labels 10: {in_doubt}" in capsys.readouterr().err
    assert call(sample.main, *command, 1, "name:10", "number:10") == 0
    assert call(sample_ddp.main, "--ckpt", ckpt, *SHORT[:-2], "--sample-dir", tmp_path, "--labels", 2) == 2
    assert '--labels 2: is the name of class 4 and the number of class "10"; write name:2' in capsys.readouterr().err
    choices, *_ = web.offers(str(ckpt))
    assert choices[:3] == [("0", "0"), ("1", "1"), ("2 10", "number:2")]
    condition = pipeline.Pipeline.load(ckpt, SamplerConfig(num_sampling_steps=4)).condition
    assert condition.parse(word for _, word in choices) == condition.parse(range(12)) == [*range(12)]
    assert condition.parse(f"name:{name}" for name in names) == [*range(12)]


def test_vectors_are_drawn_by_all_commands(tmp_path, capsys):
    model = fill(DiT(8, 2, 1, 16, 1, 2, num_classes=0, condition=Vectors(3)))
    weights = {name: 0.5 * value for name, value in model.state_dict().items()}
    files.save(tmp_path / "a.pt", {"ema": weights, "args": {"vae": "none", "image_size": 8}, **record_of(model)})
    vectors = np.array([[0, 1, 2], [1, 0, -1], [2, 2, 2]], np.float32)
    np.save(tmp_path / "v.npy", vectors)
    np.save(tmp_path / "one.npy", vectors[1])
    assert call(convert.main, tmp_path / "a.pt", tmp_path / "b.safetensors") == 0
    assert call(convert.main, tmp_path / "b.safetensors", tmp_path / "c.pt") == 2
    assert "cannot record --condition vector; write a .safetensors" in capsys.readouterr().err
    for name in ("a.pt", "b.safetensors"):
        command = ["--ckpt", tmp_path / name, *SHORT, "--vector", tmp_path / "v.npy", "--output", tmp_path / f"{name}.png"]
        assert call(sample.main, *command, "--captions", "--interpolate", "classes", "--sampler", "ddim") == 0
    assert (tmp_path / "a.pt.png").read_bytes() == (tmp_path / "b.safetensors.png").read_bytes()

    command = ["--ckpt", tmp_path / "a.pt", *SHORT[:-2], "--sample-dir", tmp_path]
    command += ["--folder", "set", "--num-fid-samples", 5]
    assert call(sample_ddp.main, *command, "--vector", tmp_path / "v.npy") == 0
    with np.load(tmp_path / "set.npz") as found:
        images, positions = found["arr_0"], found["arr_1"]
    assert positions.tolist() == [0, 1, 2, 0, 1]
    drawn = pipeline.Pipeline.load(tmp_path / "a.pt", SamplerConfig(num_sampling_steps=4)).draw([*vectors, *vectors[:2]])
    assert np.abs(np.stack(drawn).astype(int) - images).max() <= 1
    assert len({image.tobytes() for image in images}) == 5
    capsys.readouterr()
    assert call(sample_ddp.main, *command, "--vector", tmp_path / "one.npy") == 2
    assert "its images were made with --prompts" in capsys.readouterr().err, "the vectors' checksum"
    for extra, words in (
        ([], "--vector: says what to draw, and the model needs it; give it"),
        (["--labels", 1], "--labels: CKPT draws by vectors of 3 numbers; use --vector"),
        (["--vector", tmp_path / "a.npy"], "a.npy: no such file"),
        (["--negative-prompt", "a"], "--negative-prompt: CKPT draws by vectors of 3 numbers, not by texts; leave it out"),
    ):
        assert call(sample.main, "--ckpt", tmp_path / "a.pt", *SHORT, "--output", tmp_path / "a.png", *extra) == 2
        assert words.replace("CKPT", str(tmp_path / "a.pt")) in capsys.readouterr().err
    assert web.offers(str(tmp_path / "a.pt"))[:2] == ([], [])
    values = {"ckpt": str(tmp_path / "a.pt"), "labels": [], "prompt": "a dog", "samples_per_label": 1, "interpolate": False}
    values |= {"sampler": "ddim", "num_sampling_steps": 2, "cfg_scale": 2, "seed": 0}
    with pytest.raises(UserError, match="^Prompts: .*draws by vectors of 3 numbers; use sample.py with --vector"):
        next(web.Artist().draw(web.page_config(values, ComputeConfig(device="cpu"))))


def test_trajectories_are_written(lively, tmp_path):
    command = ["--ckpt", lively, *SHORT, "--labels", 1, 2, "--output", tmp_path / "a.png", "--save-trajectory"]
    assert call(sample.main, *command, tmp_path / "t.gif") == 0
    assert call(sample.main, *command, tmp_path / "t.png") == 0
    with Image.open(tmp_path / "t.gif") as gif:
        assert 1 < gif.n_frames <= 4  # frames that are the same are merged
    with Image.open(tmp_path / "t.png") as grid:
        assert grid.size == (2 + 4 * 10, 2 + 2 * 10)
