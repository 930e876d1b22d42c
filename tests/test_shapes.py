"""Images that are no squares, through every command."""

import json
import re
import time

import numpy as np
import pytest
import torch
from helpers import SHARDS, assert_same_state, call, latest, metrics, without_timings
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
from data.images import ORIENTATION, Digits, ImageDataset
from data.order import GlobalOrder, batches_of_one_shape
from models import DiT
from runtime import distributed
from runtime.errors import UserError
from runtime.shapes import ImageSize, bucket_shapes, plain_size, sides
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
        step = min(height / crop_height, width / crop_width)  # of the crop's pixels, in the image's
        assert abs(values.mean() - ((height, width)[axis] - 1) / 2) <= max(1, step), "the centre"
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
    random = np.random.default_rng(0).integers(0, 256, (4, 8, 12, 3), np.uint8)
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
    assert call(train.main, *run, tmp_path / "tall", "--image-size", "8x12") == 2
    assert "model input_size (12, 8), now (8, 12)" in capsys.readouterr().err


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


# ----------------------------------------------------------------------------------------------------------------------
# Buckets of shapes


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from([1, 2, 3]), st.integers(1, 4), st.integers(0, 9)
)
@settings(deadline=None, max_examples=60)
def test_every_batch_has_one_shape_and_every_image_is_seen_as_often(sizes, world_size, per_rank, seed):
    buckets = np.split(np.random.default_rng(seed).permutation(sum(sizes)), np.cumsum(sizes)[:-1])
    size, steps = world_size * per_rank, 40
    named = {"buckets": buckets, "stop": steps * size}
    whole = list(GlobalOrder(sum(sizes), size, seed, **named))
    bucket_of = {int(image): number for number, bucket in enumerate(buckets) for image in bucket}
    shapes = [{bucket_of[image] for image, _ in batch} for batch in whole]
    assert [len(batch) for batch in whole] == [size] * steps
    assert all(len(shape) == 1 for shape in shapes)
    for done in range(1, steps + 1):  # shares are never off by more than a few batches, whatever the step
        for number, n in enumerate(sizes):
            assert abs(sum(shape == {number} for shape in shapes[:done]) - done * n / sum(sizes)) <= len(sizes)
    for number, bucket in enumerate(buckets):  # nothing is left out: an epoch of a shape holds each of its images once
        keys = [key for batch, shape in zip(whole, shapes, strict=True) if shape == {number} for key in batch]
        for epoch in range(len(keys) // len(bucket)):
            assert sorted(image for image, e in keys if e == epoch) == sorted(bucket)
    shares = [list(GlobalOrder(sum(sizes), size, seed, rank, world_size, **named)) for rank in range(world_size)]
    for i, batch in enumerate(whole):
        assert sorted(batch) == sorted(key for share in shares for key in share[i]), "processes share each batch"
    for done in (1, 7, 39):
        assert list(GlobalOrder(sum(sizes), size, seed, start=done * size, **named)) == whole[done:], "it resumes"


def test_a_long_run_resumes_at_once():
    buckets = [np.arange(1000), np.arange(1000, 1003)]
    start = time.perf_counter()
    for done in (10**6, 10**12):
        first = next(iter(GlobalOrder(1003, 4, 0, start=4 * done, stop=4 * done + 40, buckets=buckets)))
        assert 0.99 < first[0][1] / (4 * done / 1003) < 1.01, "the epoch"
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("size", "unit"), [("256", 16), ("32", 4), ("24x32", 8), ("512", 32), ("8", 8)])
def test_shapes_have_about_one_area(size, unit):
    for number in (3, 5, 7, 9):
        shapes = bucket_shapes(size, number, unit)
        assert sides(size) in shapes
        assert len(set(shapes)) == len(shapes) <= number
        assert all(side % unit == 0 for shape in shapes for side in shape)
        if unit * 8 <= min(sides(size)):
            assert all(0.85 < h * w / np.prod(sides(size)) < 1.15 for h, w in shapes)
            ratios = [w / h for h, w in shapes]
            assert (min(ratios), max(ratios)) == pytest.approx((0.5, 2), rel=0.15)


def test_a_model_takes_all_of_its_sizes_as_one_made_for_each():
    for extra in ({}, {"rope": True}, {"block": "cross-attention"}, {"block": "in-context"}):
        model = DiT(**{**SMALL, "input_size": 8, **extra}, other_sizes=[(4, 16), (16, 4)]).eval()
        for parameter in model.parameters():
            if parameter is not model.pos_embed:
                torch.nn.init.normal_(parameter, std=0.1)
        assert model.state_dict().keys() == DiT(**{**SMALL, "input_size": 8, **extra}).state_dict().keys()
        t, y = torch.tensor([3.0, 500.0]), torch.tensor([1, 2])
        for size in ((8, 8), (4, 16), (16, 4)):
            alone = DiT(**{**SMALL, **extra, "input_size": size}).eval()
            alone.load_state_dict({**model.state_dict(), "pos_embed": alone.pos_embed})
            x = torch.randn(2, 4, *size)
            assert torch.equal(model(x, t, y), alone(x, t, y)), size
        with pytest.raises(ValueError, match=r"x is torch.float32 of shape \(2, 4, 8, 16\), must be float \(N, 4, 8, 8\)"):
            model(torch.randn(2, 4, 8, 16), t, y)
    for wrong in ([(4, 15)], [(4, 4, 4)], [(0, 4)], [(4.0, 4)], [3], 3):
        with pytest.raises((ValueError, TypeError)):
            DiT(**SMALL, other_sizes=wrong)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes: wide, tall and square pictures, one that EXIF data turn, one panorama, and a file that is no picture.
    A picture's colour tells its class, and a white frame shows what was cropped."""
    folder = tmp_path_factory.mktemp("photos")
    forms = [(60, 40)] * 5 + [(40, 60)] * 4 + [(40, 40)] * 3 + [(200, 20)]
    for label, name in enumerate(["ant", "bee"]):
        (folder / name).mkdir()
        for i, (width, height) in enumerate(forms):
            pixels = np.full((height, width, 3), 255, np.uint8)
            pixels[2:-2, 2:-2] = (40 + i, 200 * label, 90)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.jpg", quality=95)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (60, 40)).save(folder / "ant/99.jpg", exif=exif)
    (folder / "bee/99.png").write_bytes(b"no picture")
    return folder


BUCKETS = "--vae none --image-size 12 --aspect-buckets 3 --hidden-size 16 --depth 1 --num-heads 2 --global-batch-size 4 "
BUCKETS = (BUCKETS + "--lr 1e-3 --device cpu --log-every 2 --patch-size 2 --num-workers 0 --skip-bad-images --rope").split()


def test_images_go_to_the_nearest_shape(photos):
    photographs = ImageDataset(photos, 12, flip=False, skip_bad=True)
    photographs.read_ratios(distributed.setup("cpu"))
    line = photographs.divide([(16, 8), (12, 12), (8, 16)])
    assert line == "Images of each shape: 9 of 16x8, 7 of 12x12, 12 of 8x16"
    found = [photographs[index, 0]["image"] for index in range(len(photographs))]
    assert [tuple(image.shape[1:]) for image in found[:14]] == [(8, 16)] * 5 + [(16, 8)] * 4 + [(12, 12)] * 3 + [
        (8, 16), (16, 8)]  # fmt: skip
    assert found[-1].shape[1:] == (12, 12), "of the file that is replaced, whatever takes its place"
    for dataset in (Digits(8), photographs):
        batches = batches_of_one_shape(dataset, range(20), 3)
        assert sorted(index for batch in batches for index in batch) == list(range(20))
        shapes = [{tuple(dataset[index, 0]["image"].shape) for index in batch} for batch in batches]
        assert all(len(shape) == 1 for shape in shapes)


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory, photos):
    """A run that is stopped twice and resumed; an undisturbed one; and one of gradients accumulated in parts."""
    folder = tmp_path_factory.mktemp("bucketed")
    watch = ["--val-every", 3, "--val-data-path", photos, "--sample-every", 12, "--sample-sampling-steps", 2]
    command = [*BUCKETS, "--data-path", photos, *watch, "--run-dir"]
    for name, steps, extra in (("parts", 4, ()), ("parts", 7, ()), ("parts", 12, ()), ("whole", 12, ()),
                               ("accumulated", 12, ("--grad-accum", 3))):  # fmt: skip
        assert call(train.main, *command, folder / name, "--max-steps", steps, *extra) == 0
    return folder


def test_a_run_on_buckets_resumes_bit_for_bit(bucketed):
    assert_same_state(latest(bucketed / "parts"), latest(bucketed / "whole"))
    whole, accumulated = latest(bucketed / "whole"), latest(bucketed / "accumulated")
    for name, value in whole["model"].items():
        torch.testing.assert_close(accumulated["model"][name], value, rtol=1e-3, atol=1e-5)
    log = (bucketed / "whole/log.txt").read_text()
    assert "Images of each shape: 12 of 8x16, 7 of 12x12, 9 of 16x8" in log
    rows = [row for row in metrics(bucketed / "whole") if "val_loss" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    for row in rows:
        parts = [row[f"val_loss_{shape}"] * n for shape, n in (("16x8", 9), ("12x12", 7), ("8x16", 12))]
        assert sum(parts) / 28 == pytest.approx(row["val_loss"], rel=1e-5)
    assert re.search(r"Validation Loss: \d.*at t 750-999, \d\.\d+ at 8x16", log)


def test_processes_agree_on_buckets(bucketed, photos, tmp_path, ranks):
    """Noise belongs to a process, so the weights are compared between two runs of two, one of which was stopped."""
    command = [*BUCKETS, "--data-path", photos, "--val-every", 3, "--val-data-path", photos]
    for steps, name in ((12, "whole"), (5, "parts"), (12, "parts")):
        run = ranks(train.main, [*command, "--max-steps", steps, "--run-dir", tmp_path / name], 2)
        assert run.wait() == [0, 0], run.text()
    assert_same_state(latest(tmp_path / "parts"), latest(tmp_path / "whole"))
    names = {name for row in metrics(tmp_path / "whole") for name in row}
    assert {"val_loss_16x8", "val_loss_12x12", "val_loss_8x16"} <= names


def test_every_recorded_shape_is_drawn(bucketed, tmp_path, capsys):
    ckpt = bucketed / "whole"
    sizes = {"12": (12, 12), "8x16": (8, 16), "16x8": (16, 8)}
    for size, (height, width) in sizes.items():
        argv = ["--ckpt", ckpt, *DRAW, "--image-size", size]
        assert call(sample.main, *argv, "--labels", 0, 1, "--output", tmp_path / f"{size}.png") == 0
        with Image.open(tmp_path / f"{size}.png") as grid:
            assert grid.size == (2 + 2 * (width + 2), 2 + height + 2)
        assert call(sample_ddp.main, *argv, "--num-fid-samples", 3, "--sample-dir", tmp_path) == 0
        (npz,) = tmp_path.glob(f"*-size-{size}-*.npz")
        with np.load(npz) as file:
            assert file["arr_0"].shape == (3, height, width, 3)
    assert call(sample.main, "--ckpt", ckpt, *DRAW, "--labels", 0, 1, "--output", tmp_path / "own.png") == 0
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "12.png").read_bytes()
    capsys.readouterr()
    assert call(sample.main, "--ckpt", ckpt, *DRAW, "--image-size", "8x12", "--output", tmp_path / "bad.png") == 2
    assert f"--image-size 8x12: {ckpt}/checkpoints/0000012.pt holds 12, 16x8, 8x16; pass one of" in capsys.readouterr().err


def test_the_page_offers_the_shapes(bucketed):
    ckpt = str(bucketed / "whole/checkpoints/0000012.pt")
    assert web.offers(ckpt)[3] == ["12", "16x8", "8x16"]
    values = {"ckpt": ckpt, "labels": ["0"], "interpolate": False, "samples_per_label": 2, "cfg_scale": 1.0,
              "num_sampling_steps": 2, "seed": 0, "sampler": "ddim"}  # fmt: skip
    artist = web.Artist()
    for size in ("8x16", "12", "16x8"):
        *_, (config, _, images, _) = artist.draw(
            web.page_config({**values, "image_size": size}, ComputeConfig(device="cpu"))
        )
        assert images.shape[1:3] == sides(size)
        assert f"--image-size {size}" in web.command(config)


def test_weights_keep_the_shapes(bucketed, tmp_path, capsys):
    source = bucketed / "whole/checkpoints/0000012.pt"
    assert call(convert.main, source, tmp_path / "a.safetensors") == 0
    for ckpt, output in ((source, "a.png"), (tmp_path / "a.safetensors", "b.png")):
        argv = ["--ckpt", ckpt, *DRAW, "--image-size", "8x16", "--labels", 0, "--output", tmp_path / output]
        assert call(sample.main, *argv) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert call(convert.main, source, tmp_path / "a.pt") == 2
    assert "cannot record --rope True --aspect-buckets" in capsys.readouterr().err


def test_a_square_goes_on_with_buckets(photos, tmp_path):
    run = [*BUCKETS, "--data-path", photos, "--max-steps", 1, "--run-dir"]
    square = [word for word in run if word not in ("--aspect-buckets", "3")]
    assert call(train.main, *square, tmp_path / "square") == 0
    assert call(train.main, *run, tmp_path / "run", "--init-from", tmp_path / "square") == 0
    assert call(train.main, *square, tmp_path / "run") == 2, "it is another model"


def test_latents_of_buckets_and_what_they_are_normalised_by(photos, small_vae, tmp_path):
    """Each shape is encoded by itself: with --latent-norm channel too, which measures batches of the data."""
    run = [*BUCKETS, "--data-path", photos, "--max-steps", 2, "--run-dir", tmp_path / "run", "--latent-norm", "channel"]
    for option, value in (("--vae", small_vae), ("--image-size", 64), ("--patch-size", 1)):
        run[run.index(option) + 1] = value
    assert call(train.main, *run) == 0
    config = Checkpoint.open(tmp_path / "run").model_config
    assert (config["input_size"], config["other_sizes"]) == (8, ((11, 6), (6, 11)))


def test_plans_and_costs_tell_the_shapes(photos, tmp_path, capsys):
    assert call(train.main, *BUCKETS, "--data-path", photos, "--max-steps", 4, "--dry-run", "--global-batch-size", 8) == 0
    output = capsys.readouterr().out
    assert "Images of each shape: 12 of 8x16, 7 of 12x12, 9 of 16x8" in output
    assert "Warning: Of the shapes 12x12 there are fewer images than --global-batch-size" in output
    assert re.search(r"of other shapes +0.00 of 16x8, 0.00 of 8x16 latent cells", output)
    argv = ["--model", "DiT-S/2", "--aspect-buckets", 3, "--json"]
    assert call(complexity.main, *argv) == 0
    counted = json.loads(capsys.readouterr().out)
    assert counted["forward_macs_by_latent_size"].keys() == {"46x22", "22x46"}
    for macs in counted["forward_macs_by_latent_size"].values():
        assert macs == pytest.approx(counted["forward_macs_per_image"], rel=0.1)


def test_compiled_and_sharded_models_take_all_shapes(photos, tmp_path, ranks):
    command = [*BUCKETS, "--data-path", photos, "--max-steps", 6, "--run-dir"]
    sharded = [("plain", 2, ()), ("sharded", 2, ("--shard",))] if SHARDS else []
    runs = [*sharded, ("one", 1, ()), ("compiled", 1, ("--compile", "aot_eager"))]
    for name, world_size, extra in runs:
        run = ranks(train.main, [*command, tmp_path / name, *extra], world_size)
        assert run.wait() == [0] * world_size, run.text()
    for (one, *_), (other, *_) in zip(runs[::2], runs[1::2], strict=True):
        weights = latest(tmp_path / one)["model"]
        for name, value in latest(tmp_path / other)["model"].items():
            torch.testing.assert_close(value, weights[name], rtol=1e-3, atol=1e-5)
