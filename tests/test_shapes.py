"""Images that are no squares, through every command."""

import json

import numpy as np
import pytest
from helpers import assert_same_state, call, latest, metrics, without_timings
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_models import SMALL

import evaluate
import extract_latents
import sample
import sample_ddp
import train
from checkpoint.config import ModelOptions
from checkpoint.opened import Checkpoint
from data.crop import center_crop_arr
from models import DiT
from runtime.errors import UserError
from runtime.shapes import ImageSize, plain_size, sides
from sampling import web
from sampling.config import ComputeConfig
from tools import complexity, convert, likelihood

# images are 24 to 26 wide and 20 to 23 high
WIDE = "--vae none --image-size 8x12 --hidden-size 16 --depth 1 --num-heads 2 --global-batch-size 4 --lr 1e-3 --device cpu "
WIDE = (WIDE + "--log-every 2 --ema-warmup --patch-size 2 --num-workers 0 --rope").split()
DRAW = ["--num-sampling-steps", 2, "--device", "cpu"]


def test_a_size_has_one_form():
    for size, form, both in ((256, 256, (256, 256)), ("256", 256, (256, 256)), ("256x256", 256, (256, 256)),
                             ("256x384", "256x384", (256, 384)), ((8, 12), "8x12", (8, 12))):  # fmt: skip
        assert (ImageSize(size), sides(size), plain_size(both)) == (form, both, form)
        assert ModelOptions(image_size=size).image_size == form
    assert type(ModelOptions().flat()["image_size"]) is int, "as recorded before there were rectangles"


@pytest.mark.parametrize("size", ["256*384", "256x", "x", "", "1x2x3", "-8", "-8x8", "8.0", True, None, "9" * 5000])
def test_what_is_no_size_is_refused(size):
    with pytest.raises(UserError, match="--image-size: .* is not the side of a square in pixels, nor HEIGHTxWIDTH"):
        ModelOptions(image_size=size)
    with pytest.raises(UserError, match="--image-size: 0 is not a whole number, 1 or more and 65536 or less"):
        ModelOptions(image_size="8x0")


@settings(max_examples=40, deadline=None)
@given(st.tuples(*[st.integers(1, 40)] * 4))
def test_the_crop_has_the_size_and_loses_one_direction_alone(numbers):
    height, width, crop_height, crop_width = numbers
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 6, columns * 6, 0 * rows], axis=2).astype(np.uint8)
    crop = np.asarray(center_crop_arr(Image.fromarray(pixels), (crop_height, crop_width)))
    assert crop.shape == (crop_height, crop_width, 3)
    for axis, whole in ((0, height * crop_width <= width * crop_height), (1, height * crop_width >= width * crop_height)):
        # the middle stays in the middle, and of the direction that is kept as a whole both ends are there
        values = crop[..., axis].astype(float) / 6
        assert abs(values.mean() - ((height, width)[axis] - 1) / 2) <= 1, "the centre"
        if whole and (crop_height, crop_width)[axis] >= 2 * (height, width)[axis]:
            assert (values.min(), values.max()) == pytest.approx((0, (height, width)[axis] - 1), abs=0.5)


def test_a_long_image_is_enlarged_to_a_long_crop():
    """As a whole it would take gigabytes, and where nothing but a strip is left the strip must not vanish."""
    for size in ((1, 60_000), (60_000, 1), (1, 1), (2, 3)):
        for crop in ((64, 8), (8, 64), (1, 200), (200, 1)):
            assert center_crop_arr(Image.new("RGB", size), crop).size == crop[::-1]


@pytest.fixture(scope="module")
def rectangle(tmp_path_factory, image_folder, inception_file):
    """A run on 8 x 12 pixels that is stopped and resumed, watched by all that there is; and an undisturbed one."""
    folder = tmp_path_factory.mktemp("rectangle")
    random = np.random.default_rng(0).integers(0, 256, (40, 8, 12, 3), np.uint8)
    np.savez(folder / "reference.npz", random)
    watch = ["--sample-every", 4, "--sample-sampling-steps", 2, "--val-every", 2, "--val-data-path", image_folder]
    watch += ["--eval-every", 4, "--eval-reference", folder / "reference.npz", "--eval-samples", 3]
    watch += ["--eval-sampling-steps", 2, "--inception-weights", inception_file]
    command = [*WIDE, "--data-path", image_folder, *watch, "--run-dir"]
    for steps, name in ((2, "parts"), (4, "parts"), (4, "whole")):
        assert call(train.main, *command, folder / name, "--max-steps", steps) == 0
    return folder


def test_a_run_is_watched_and_resumes(rectangle):
    assert_same_state(latest(rectangle / "parts"), latest(rectangle / "whole"))
    assert without_timings(rectangle / "parts")[-3:] == without_timings(rectangle / "whole")[-3:]
    rows = metrics(rectangle / "whole")
    assert {"loss", "val_loss", "fid"} <= {name for row in rows for name in row}
    with Image.open(rectangle / "whole/samples/0000004.png") as grid:
        assert grid.size == (3 * (5 * 12 + 2) + 2, 5 * 8 + 2 + 20 + 2), "three classes, each pixel five times, titles"
    assert json.loads((rectangle / "whole/options.json").read_text())["image_size"] == "8x12"
    checkpoint = Checkpoint.open(rectangle / "whole")
    assert (checkpoint.image_size, checkpoint.model_config["input_size"]) == ("8x12", (8, 12))


def test_commands_draw_and_measure_it(rectangle, image_folder, tmp_path, inception_file, capsys):
    ckpt = ["--ckpt", rectangle / "whole"]
    photo = next(image_folder.glob("*/*.png"))
    assert call(sample.main, *ckpt, *DRAW, "--output", tmp_path / "a.png", "--labels", 0, 1, "--enlarge", 3) == 0
    with Image.open(tmp_path / "a.png") as grid:
        assert grid.size == (2 + 2 * (36 + 2), 2 + 24 + 2)
    changed = ["--init-image", photo, "--mask", photo, "--sampler", "ddim", "--image-size", "8x12"]
    film = ["--captions", "--save-trajectory", tmp_path / "a.gif"]
    assert call(sample.main, *ckpt, *DRAW, *changed, *film, "--output", tmp_path / "b.png", "--labels", 0) == 0
    with Image.open(tmp_path / "a.gif") as frames:
        assert frames.size == (16, 12)
    for words in (["--image-size", 12], ["--image-size", "12x8"]):
        assert call(sample.main, *ckpt, *DRAW, *words, "--output", tmp_path / "c.png") == 2
        assert f"--image-size {words[1]}: {rectangle}" in capsys.readouterr().err
    assert call(sample_ddp.main, *ckpt, *DRAW, "--num-fid-samples", 5, "--sample-dir", tmp_path) == 0
    (npz,) = tmp_path.glob("*-size-8x12-*.npz")
    with np.load(npz) as file:
        assert file["arr_0"].shape == (5, 8, 12, 3)
    (tmp_path / npz.stem / "000001.png").unlink()  # drawn again, the same
    before = npz.read_bytes()
    npz.unlink()
    assert call(sample_ddp.main, *ckpt, *DRAW, "--num-fid-samples", 5, "--sample-dir", tmp_path) == 0
    assert npz.read_bytes() == before
    assert call(evaluate.main, npz, tmp_path / npz.stem, "--inception-weights", inception_file, "--device", "cpu") == 0
    found = json.loads((tmp_path / f"{npz.stem}.metrics.json").read_text())
    assert (found["samples"]["height_width"], found["fid"]) == ([8, 12], pytest.approx(0, abs=1e-3))
    argv = [*ckpt, "--data-path", image_folder, "--num-images", 2, "--num-timesteps", 2, "--device", "cpu"]
    assert call(likelihood.main, *argv, "--output", tmp_path / "bits.json") == 0


def test_the_page_draws_it(rectangle, tmp_path):
    ckpt = str(rectangle / "whole/checkpoints/0000004.pt")
    values = {"ckpt": ckpt, "labels": ["0"], "interpolate": False, "samples_per_label": 2, "cfg_scale": 1.0,
              "num_sampling_steps": 2, "seed": 0, "sampler": "ddim"}  # fmt: skip
    *_, (config, _, images, titles) = web.Artist().draw(web.page_config(values, ComputeConfig(device="cpu")))
    assert (images.shape, config.enlarge) == ((2, 8, 12, 3), 8)
    path, *_ = web.write_pictures(tmp_path, config, images, titles)
    assert web.read_settings(path)["labels"] == ["0"]


def test_its_weights_keep_the_size(rectangle, tmp_path, capsys):
    assert call(convert.main, rectangle / "whole/checkpoints/0000004.pt", tmp_path / "a.safetensors") == 0
    opened = Checkpoint.open(tmp_path / "a.safetensors")
    assert (opened.image_size, opened.vae, opened.build_model().config["input_size"]) == ("8x12", "none", (8, 12))
    draws = [*DRAW, "--labels", 0, 1]
    for source, output in ((rectangle / "whole", "a.png"), (tmp_path / "a.safetensors", "b.png")):
        assert call(sample.main, "--ckpt", source, *draws, "--output", tmp_path / output) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    # 4 x 6 patches: nothing in a .pt file of weights tells them from 3 x 8, or a square's
    for target, words in (("a.pt", "cannot record --rope True --image-size 8x12"), ("a", "its input is not a square")):
        assert call(convert.main, rectangle / "whole/checkpoints/0000004.pt", tmp_path / target) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("size", ["huge", -8, "1x2x3", 8.5])
def test_a_damaged_size_is_told(size):
    model = DiT(**SMALL)
    with pytest.raises(UserError, match="the checkpoint: damaged: its image_size"):
        _ = Checkpoint({"model": model.state_dict(), "args": {"image_size": size}}).check_record()


def test_another_shape_starts_from_a_square(tmp_path, image_folder, capsys):
    run = [*WIDE, "--data-path", image_folder, "--max-steps", 1, "--run-dir"]
    run[run.index("8x12")] = 8
    assert call(train.main, *run, tmp_path / "square") == 0
    run[run.index(8)] = "12x8"
    assert call(train.main, *run, tmp_path / "tall", "--init-from", tmp_path / "square") == 0
    assert "Position embedding: computed for 6 x 4 patches, was 4 x 4" in (tmp_path / "tall/log.txt").read_text()
    capsys.readouterr()
    run[run.index("12x8")] = "12x9"
    assert call(train.main, *run, tmp_path / "bad") == 2
    assert "--image-size 12x9: not a multiple of 2 (autoencoder 1 times patch 2); 12x8 is the" in capsys.readouterr().err
    assert call(train.main, *run[:-1], tmp_path / "tall", "--image-size", "8x12") == 2, "it is of 12x8"


def test_latents_are_stored_and_trained_on(tmp_path, image_folder, small_vae, capsys):
    options = ["--vae", small_vae, "--image-size", "16x32", "--device", "cpu", "--num-workers", 0]
    assert call(extract_latents.main, "--data-path", image_folder, "--out", tmp_path / "latents", *options) == 0
    small = "--hidden-size 16 --depth 1 --num-heads 2 --global-batch-size 4 --patch-size 1".split()
    run = [*options, *small, "--data-path", tmp_path / "latents", "--max-steps", 1, "--run-dir", tmp_path / "run"]
    assert call(train.main, *run) == 0
    assert Checkpoint.open(tmp_path / "run").model_config["input_size"] == (2, 4)
    capsys.readouterr()
    run[run.index("16x32")] = "32x16"
    assert call(train.main, *run) == 2
    assert f"{tmp_path}/latents holds latents of 16x32 pixels; pass --image-size 16x32" in capsys.readouterr().err
    options[options.index("16x32")] = "20x32"
    assert call(extract_latents.main, "--data-path", image_folder, "--out", tmp_path / "other", *options) == 2
    assert "--image-size 20x32: not a multiple of 8 (autoencoder 8 times patch 1); 16x32 is the" in capsys.readouterr().err


def test_its_cost_is_counted(image_folder, capsys):
    """DiT-S/4: linear layers for each token, attention with T^2, and once for each image what regresses the modulations."""
    depth, width, macs = 12, 384, {}
    for size, tokens in (("256", 256 // 4), ("256x512", 512 // 4), ("512x256", 512 // 4)):
        assert call(complexity.main, "--model", "DiT-S/4", "--patch-size", 4, "--image-size", size, "--json") == 0
        counted = json.loads(capsys.readouterr().out)
        assert (counted["tokens"], str(counted["image_size"])) == (tokens, size)
        macs[tokens] = counted["forward_macs_per_image"]
    once = 256 * width + width**2 + (6 * depth + 2) * width**2
    assert macs[128] - once == 2 * (macs[64] - once) + 2 * depth * width * (128**2 - 2 * 64**2)
    assert call(train.main, *WIDE, "--data-path", image_folder, "--max-steps", 4, "--dry-run") == 0
    assert ", 24 tokens" in capsys.readouterr().out
