"""sample.py as a whole: the original's images from a seed, labels by name, and what mistakes get."""

import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import call
from PIL import Image
from reference import fill, filled, golden

import sample
from checkpoint import files
from checkpoint.opened import Checkpoint
from data.autoencoder import Pixels
from models import DiT, DiT_models
from sampling import grid, pipeline, source


def drawn_by_sample(monkeypatch):
    """A list to which the x_0 that sample.py draws are appended."""
    drawn, draw = [], sample.draw

    def note(*args):
        x_0, *others = draw(*args)
        drawn.append(x_0)
        return x_0[:, :3], *others

    monkeypatch.setattr(sample, "draw", note)
    return drawn


def test_the_scripts_own_random_stream_is_the_originals(tmp_path, monkeypatch):
    """The golden latents, through what sample.py runs: guided without a doubled sampling batch."""
    drawn = drawn_by_sample(monkeypatch)
    monkeypatch.setattr(source, "load_space", lambda vae, channels: Pixels(channels))
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


def bad(words, *argv):
    return pytest.param([str(a) for a in argv], words, id=" ".join(map(str, argv))[-50:])


@pytest.fixture(scope="module")
def latent_file(tmp_path_factory):
    """Weights alone of a model of the paper, which works on latents."""
    path = tmp_path_factory.mktemp("latent") / "LATENT"
    torch.save(DiT_models["DiT-S/8"](input_size=8).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        bad("--labels 10: out of range, the model's classes are 0 to 9", "--labels", 3, 10),
        bad("--labels -1: out of range", "--labels", "-1"),
        bad("no class is called that", "--labels", "cat"),
        bad("argument --cfg-scale: -1.0 is not a number, 0 or more", "--cfg-scale", -1),
        bad("--model DiT-S/2: CKPT holds DiT-XL/2", "--model", "DiT-S/2"),
        bad("--image-size 256: CKPT holds 8", "--image-size", 256),
        bad("--num-classes 1000: CKPT holds 10", "--num-classes", 1000),
        bad("its folder does not exist", "--output", "nowhere/grid.png"),
        bad("--output grid: cannot be written in this format; name an image file", "--output", "grid"),
        bad("--output VAE: is a folder", "--output", "VAE"),
        bad("--output a.psd: cannot be written in this format", "--output", "a.psd"),
        bad("--output a.xbm: cannot hold 42 x 22 pixels in colour", "--output", "a.xbm"),
        bad(
            "--output a.webp: cannot hold 20562 x ",
            "--output",
            "a.webp",
            "--columns",
            40,
            "--samples-per-label",
            40,
            "--enlarge",
            64,
        ),
        bad("--save-trajectory a.mpg: cannot be written in this format", "--save-trajectory", "a.mpg"),
        bad("--save-trajectory sample.png: is the file of --output too", "--save-trajectory", "sample.png"),
        bad("--save-trajectory nowhere/a.gif: its folder does not exist", "--save-trajectory", "nowhere/a.gif"),
        bad("1001 is not a whole number, 1 or more and 1000 or less", "--num-sampling-steps", 1001),
        bad("absent.pt: no such file", "--ckpt", "absent.pt"),
        bad("cut.pt: not a checkpoint, or a truncated one", "--ckpt", "cut.pt"),
        bad("other.pt: not a DiT", "--ckpt", "other.pt"),
        bad("text.pt: not a checkpoint", "--ckpt", "text.pt"),
        bad("unrecognized arguments: --sampling-steps", "--sampling-steps", 3),
        bad("--sampler ddpm: eta is an option of ddim", "--eta", 0.5),
        bad("--sampler ddim: spacing is an option of", "--sampler", "ddim", "--spacing", "leading"),
        bad("give 0 <= LO < HI <= 1", "--guidance-interval", 0.5, 0.2),
        bad("--cfg-channels 3: the model has 1", "--cfg-channels", 3),
        bad("--guide-ckpt LATENT: in_channels 4", "--guide-ckpt", "LATENT"),
        bad("--init-image a.jpg: no such file", "--init-image", "a.jpg"),
        bad("--init-image text.pt: not a readable image", "--init-image", "text.pt"),
        bad("--mask a.png: no such file", "--init-image", "picture.bmp", "--mask", "a.png"),
        bad("--mask: needs --init-image", "--mask", "a.png"),
        bad("--invert: needs --init-image", "--invert"),
        bad("--strength: needs --init-image", "--strength", 0.5),
        bad("--strength: does not go with --mask", "--init-image", "picture.bmp", "--mask", "a.png", "--strength", 0.5),
        bad("--to-seed: needs --interpolate seeds", "--to-seed", 2),
        bad("--to-seed: needs --interpolate seeds", "--to-seed", 0, "--interpolate", "classes"),
        bad("argument --seed: 9223372036854775808 is not a whole number, 0 or more and", "--seed", 2**63),
        bad("argument --enlarge: 65 is not a whole number, 1 or more and 64 or less", "--enlarge", 65),
        bad("draw fewer images, or enlarge them less", "--samples-per-label", 10000, "--enlarge", 64),
        bad("needs two --labels or more", "--interpolate", "classes", "--labels", 1),
        bad("--vae VAE: 4 channels", "--vae", "VAE"),
        bad("--vae none: LATENT has 4 channels, it works on latents", "--ckpt", "LATENT", "--vae", "none"),
    ],
)
def test_mistakes_get_one_line(tiny_checkpoint, latent_file, small_vae, tmp_path, monkeypatch, capsys, extra, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.pt").write_bytes(tiny_checkpoint.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.bmp")
    (tmp_path / "VAE").symlink_to(small_vae)
    (tmp_path / "LATENT").symlink_to(latent_file)
    assert call(sample.main, "--ckpt", tiny_checkpoint, *extra) == 2
    error = capsys.readouterr().err
    assert words.replace("CKPT", str(tiny_checkpoint)) in error
    assert "--skip-bad-images" not in error, "an option of train.py"
    assert len([line for line in error.splitlines() if line.strip()]) == 1, error
    assert not list(tmp_path.glob("*.png"))


def test_mistakes_are_told_without_importing_torch():
    """Importing it takes seconds."""
    script = "import sys; sys.modules['torch'] = sys.modules['numpy'] = None; import sample, sample_ddp; {}.main(['{}'])"
    for command in ("sample", "sample_ddp"):
        for option, status in (("--help", 0), ("--typo", 2)):
            code = script.format(command, option)
            done = subprocess.run([sys.executable, "-c", code], cwd=Path(sample.__file__).parent, capture_output=True)
            assert done.returncode == status, done.stderr


def fail(error):
    def call(*args, **options):
        raise error

    return call


@pytest.mark.parametrize("option", ["--output", "--save-trajectory"])
def test_a_folder_that_is_closed_to_us_is_refused_before_any_work(tiny_checkpoint, tmp_path, monkeypatch, capsys, option):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path / "closed"))  # root may write anywhere
    monkeypatch.setattr(pipeline.Pipeline, "build", fail(AssertionError("a model is built")))
    (tmp_path / "closed").mkdir()
    output = ["--output", tmp_path / "a.png", option, tmp_path / "closed/a.gif"]
    assert call(sample.main, "--ckpt", tiny_checkpoint, *output) == 2
    assert f"{option} {tmp_path}/closed/a.gif: cannot be written to (permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.png", "t.png", "t.gif"])
def test_a_full_disk_is_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, name):
    full, write = fail(OSError(errno.ENOSPC, "No space left on device")), grid.replace_file
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
    monkeypatch.setattr(pipeline.Pipeline, "steps", fail(error))
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


def test_a_model_without_null_labels_cannot_be_guided(tmp_path, capsys):
    sizes = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 1, "num_heads": 2}
    weights = DiT(**sizes, num_classes=3, class_dropout_prob=0.0).state_dict()
    args = {"num_heads": 2, "label_dropout": 0.0, "num_classes": 3, "image_size": 8, "vae": "none"}
    files.save(tmp_path / "a.pt", {"ema": weights, "args": args})
    command = ["--ckpt", tmp_path / "a.pt", "--output", tmp_path / "a.png", "--num-sampling-steps", 2, "--labels", 1]
    assert call(sample.main, *command) == 2
    assert "trained without null labels; pass --cfg-scale 1" in capsys.readouterr().err
    assert call(sample.main, *command, "--cfg-scale", 1) == 0


SHORT = ["--num-sampling-steps", "4", "--device", "cpu", "--columns", "3"]


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
    for sampler in ("ddpm", "dpm-solver++"):
        assert (
            call(sample.main, *command, "--num-sampling-steps", 10, "--mask", tmp_path / "mask.png", "--sampler", sampler)
            == 0
        )
        assert np.abs(read(output) - original)[:, :4].max() <= 2, f"{sampler}: what is known must stay"
        assert np.abs(read(output) - original)[:, 4:].mean() > 10, f"{sampler}: what is white must be redrawn"


def test_trajectories_are_written(lively, tmp_path):
    command = ["--ckpt", lively, *SHORT, "--labels", 1, 2, "--output", tmp_path / "a.png", "--save-trajectory"]
    assert call(sample.main, *command, tmp_path / "t.gif") == 0
    assert call(sample.main, *command, tmp_path / "t.png") == 0
    with Image.open(tmp_path / "t.gif") as gif:
        assert 1 < gif.n_frames <= 4  # frames that are the same are merged
    with Image.open(tmp_path / "t.png") as grid:
        assert grid.size == (2 + 4 * 10, 2 + 2 * 10)
