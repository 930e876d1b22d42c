"""Clips: data, training, stored latents, sampling, fine-tuning from an image model, and the judge of moving digits."""

import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_same_state, call, latest, paced, wait_for
from PIL import Image

import extract_latents
import sample
import sample_ddp
import train
from data.clips import SIDE, ClipDataset, MovingDigits, bounce
from data.config import DataConfig
from data.images import ImageError, load_dataset
from data.listing import list_images
from evaluation.features import NETWORKS, FeatureNetwork, Outputs
from models import DiT
from runtime.errors import UserError
from studies import attention, moving
from tools import plot, sweep
from training.finetune import inflate

# A DiT of clips of four frames of the moving digits, a few steps long
TINY = (
    "--data-path moving-mnist --vae none --image-size 32 --num-frames 4 --patch-frames 2 --hidden-size 16 --depth 1 "
    "--num-heads 2 --patch-size 8 --global-batch-size 6 --lr 1e-3 --device cpu --log-every 2 --num-workers 0 --recipe fast"
).split()
DRAW = ["--sampler", "flow-heun", "--num-sampling-steps", 2, "--cfg-scale", 2]


@pytest.fixture(scope="module", autouse=True)
def digits():
    """Read here, so that forked processes need not."""
    MovingDigits.load()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two classes with two clips each, of six frames: an animation, a folder of frames, and what is no clip."""
    root = tmp_path_factory.mktemp("clips")
    for label, name in enumerate(["fall", "rise"]):
        for i in range(2):
            frames = [Image.fromarray(np.full((20, 24, 3), 20 * f + 10 * i + label, np.uint8)) for f in range(6)]
            (root / name / f"{i}").mkdir(parents=True)
            if i:
                frames[0].save(root / name / "b.gif", save_all=True, append_images=frames[1:], duration=50)
            else:
                for f, frame in enumerate(frames):
                    frame.save(root / name / f"{i}/{f}.png")
        Image.new("RGB", (9, 9)).save(root / name / "a picture.png")
    return root


def brightness(item):
    """Of each frame, which in `clips` tells its number."""
    image = item["image"]
    assert image.shape[:2] == (3, 3), "channels, frames"
    return image.float().mean(dim=(0, 2, 3)).tolist()


def test_a_folder_of_clips_is_listed_and_read(clips):
    listing = list_images(clips, clips=True)
    assert [*listing.names] == ["fall/b.gif", "fall/0", "rise/b.gif", "rise/0"]
    assert listing.labels.tolist() == [0, 0, 1, 1]
    assert any("2 .png" in note for note in listing.notes), "pictures that are no clips are named"
    data = ClipDataset(clips, 16, 3, stride=2, listing=listing, flip=True)
    for index in range(4):
        first = brightness(data[index, 0])
        steps = np.diff(first)
        assert np.allclose(steps, 40, atol=6), "every second frame, in order"
        assert brightness(data[index, 0]) == first, "a start is a function of seed, epoch and clip"
    starts = {round(brightness(data[1, epoch])[0]) for epoch in range(20)}
    assert starts == {0, 20}, "of six frames, three with a stride of two begin at the first or the second"
    with pytest.raises(ImageError, match="has 6 frames, of which 7 are needed for 4 with a stride of 2; remove it, or"):
        ClipDataset(clips, 16, 4, stride=2, listing=listing)[0, 0]


def test_videos_are_read_by_pyav(clips, tmp_path):
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    (tmp_path / "a").mkdir()
    with av.open(str(tmp_path / "a/clip.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for value in range(0, 250, 25):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), value, np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    data = load_dataset(DataConfig(str(tmp_path), frame_stride=3), 16, num_frames=3)
    found = brightness(data[0, 0])
    assert np.allclose(np.diff(found), 75, atol=8)
    assert min(abs(found[0] - value) for value in (0, 25, 50, 75)) < 8


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.gif", b"GIF89a", "not a readable clip"),
        ("a.mp4", b"no video", "not a readable clip|videos need the package av; pip install av"),
    ],
)
def test_a_damaged_clip_is_named_in_one_line(tmp_path, name, content, words):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(content)
    data = load_dataset(DataConfig(str(tmp_path)), 16, num_frames=2)
    with pytest.raises(UserError, match=words) as found:
        data[0, 0]
    assert "\n" not in str(found.value)
    assert name in str(found.value)


def test_digits_move_straight_and_bounce_off_the_sides():
    data = MovingDigits(SIDE, seed=3, num_frames=20)
    assert len(data) == 20_000
    again = MovingDigits(SIDE, seed=3, num_frames=20)
    for index in (0, 4999, 5000, 19_999):
        clip = data[index, 0]
        assert torch.equal(clip["image"], again[index, 7]["image"]), "a function of seed and index, not of the epoch"
        assert clip["image"].shape == (1, 20, SIDE, SIDE)
        assert (clip["image"].flatten(2).sum(-1) == clip["image"][0, 0].sum()).all(), "all of the digit, in all frames"
        assert clip["label"] == data.labels[index]
        assert torch.equal(MovingDigits(SIDE, seed=3)[index, 0]["image"], clip["image"][:, 0]), "without frames, an image"
    assert not torch.equal(data[0, 0]["image"], data[5000, 0]["image"])
    assert bounce([0, 15], [3, 1], 8)[:, 0].tolist() == [0, 3, 6, 9, 12, 15, 14, 11]
    assert bounce([0, 15], [3, 1], 4)[:, 1].tolist() == [15, 16, 15, 14]


def test_the_judge_sees_motion_and_shape():
    clips, labels = moving.real_clips(60, 6)
    real = moving.measure(clips, labels)
    assert real["motion_error"] < 1e-9
    assert real["class_accuracy"] > 0.9
    shuffled = moving.measure(clips[:, [3, 0, 5, 1, 4, 2]], labels)
    assert shuffled["motion_error"] > 2, "frames out of order"
    assert shuffled["frame_distance"] == pytest.approx(real["frame_distance"]), "single frames are the same"
    still = moving.measure(np.repeat(clips[:, :1], 6, axis=1), labels)
    assert still["change_distance"] > 5 * real["change_distance"], "no motion"
    other = clips.copy()
    other[:, 3:] = clips[::-1, 3:]
    changed = moving.measure(other, labels)
    assert changed["shape_error"] > 5 * real["shape_error"] > 0, "another digit in the second half"
    assert changed["class_accuracy"] < real["class_accuracy"] - 0.2


def test_attention_is_compared_at_equal_time_and_without_time_frames_are_images(capsys):
    torch.manual_seed(0)
    block, x, c = attention.FramesBlock(12, 2), torch.randn(2, 8, 12), torch.randn(2, 12)
    torch.nn.init.normal_(block.adaLN_modulation[1].weight)
    other = torch.cat([x[:, :4], torch.randn(2, 4, 12)], dim=1)
    assert torch.equal(block(x, c, 2)[:, :4], block(other, c, 2)[:, :4])
    options = "--seconds 0.01 --samples 10 --batch 2 --hidden-size 24 --depth 1 --num-heads 1".split()
    assert call(attention.main, *options, "--blocks", "adaln-zero", "frames") == 0
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["adaln-zero", "frames", "real clips"]
    assert float(rows[0][2]) > float(rows[1][2]), "GMACs"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = "--max-steps 4 --ckpt-every 2 --sample-every 4 --sample-sampling-steps 2 --val-every 4".split()
    assert call(train.main, *TINY, *options, "--val-data-path", "moving-mnist", "--run-dir", folder) == 0
    return folder


def test_a_model_of_clips_trains_and_draws_animations_strips_and_sets(run, tmp_path):
    with Image.open(run / "samples/0000004.png") as grid:
        assert grid.width > 4 * 64 > grid.height // 10, "a strip of four frames for each class"
        shown = grid.size
    assert call(plot.main, run, "--animate", tmp_path / "grids.gif") == 0
    with Image.open(tmp_path / "grids.gif") as file:
        assert file.width == shown[0], "a grid of strips in each frame"
    draw = ["--ckpt", run, "--labels", 3, 8, *DRAW]
    for name, frames, size in (("a.webp", 4, (70, 36)), ("a.gif", 4, (70, 36)), ("a.png", 1, (262, 36))):
        assert call(sample.main, *draw, "--output", tmp_path / name) == 0
        with Image.open(tmp_path / name) as file:
            assert (getattr(file, "n_frames", 1), file.size) == (frames, size)
    with Image.open(tmp_path / "a.webp") as file, Image.open(tmp_path / "a.png") as strips:
        file.seek(2)
        shown = np.asarray(file.convert("RGB"))[2:34, 2:34]
        assert np.array_equal(shown, np.asarray(strips)[2:34, 2 + 64 : 2 + 96]), "frame 2 is the same in both"
    options = ["--ckpt", run, "--num-fid-samples", 6, "--per-proc-batch-size", 3, "--sample-dir", tmp_path, "--folder", "s"]
    assert call(sample_ddp.main, *options, *DRAW) == 0
    with np.load(tmp_path / "s.npz") as file:
        assert file["arr_0"].shape == (6, 4, 32, 32, 3)
        with Image.open(tmp_path / "s/000004.png") as strip:
            assert np.array_equal(np.asarray(strip)[:, 96:], file["arr_0"][4, 3]), "files are strips of the frames"
        before = file["arr_0"]
    os.remove(tmp_path / "s.npz")
    os.remove(tmp_path / "s/000001.png")
    assert call(sample_ddp.main, *options, *DRAW) == 0
    with np.load(tmp_path / "s.npz") as file:
        assert np.array_equal(file["arr_0"], before)
    np.savez(tmp_path / "flat.npz", arr_0=before[:, 0], arr_1=np.zeros(6))
    with pytest.raises(UserError, match="holds no clips"):
        moving.read_samples(tmp_path / "flat.npz")
    assert moving.read_samples(tmp_path / "s.npz")[0].shape == (6, 4, 32, 32)


class Rows(FeatureNetwork):
    """Mean colours of the rows, which take no time."""

    def outputs(self, images):
        return Outputs(images.float().mean(dim=2).flatten(1))


def test_frames_of_clips_are_the_images_of_a_distance(run, tmp_path, monkeypatch):
    """A sweep draws the clips of sample_ddp.py, so that its distance to their file is 0; all frames are counted."""
    monkeypatch.setitem(NETWORKS, "rows", Rows)
    draw = ["--ckpt", run, "--average", "model", "--num-fid-samples", 10, "--per-proc-batch-size", 4, *DRAW]
    assert call(sample_ddp.main, *draw, "--sample-dir", tmp_path, "--folder", "s") == 0
    options = ["--ref", tmp_path / "s.npz", "--features", "rows", "--output", tmp_path / "sweep"]
    assert call(sweep.main, *draw, *options, "--cfg-scale", 2, 1) == 0
    same, other = json.loads((tmp_path / "sweep/results.json").read_text())
    assert abs(same["networks"]["rows"]["fd"]) < 1e-4 < other["networks"]["rows"]["fd"]
    assert round(same["images_per_second"] * same["seconds"]) == 40


def test_too_long_a_clip_is_asked_for_and_then_a_shorter_one(clips, tmp_path, capsys):
    """A run that fails before its first step leaves no checkpoint, which would refuse what its error advises."""
    command = [*TINY, "--data-path", clips, "--image-size", 16, "--run-dir", tmp_path / "run", "--max-steps", 1]
    assert call(train.main, *command, "--num-frames", 100) == 2
    assert "or lower --num-frames" in capsys.readouterr().err.splitlines()[-1]
    assert call(train.main, *command, "--num-frames", 2) == 0


def test_a_run_that_is_killed_three_times_is_an_undisturbed_one(tmp_path, ranks):
    """Two processes, killed by SIGKILL after each of the first three checkpoints."""
    options = [*TINY, "--max-steps", 9, "--ckpt-every", 2, "--log-every", 1]
    status = ranks(train.main, [*options, "--run-dir", tmp_path / "whole"], 2).wait()
    assert status == [0, 0]
    for step in (2, 4, 6):
        killed = ranks(paced, [*options, "--run-dir", tmp_path / "killed"], 2)
        wait_for(lambda step=step: (tmp_path / f"killed/checkpoints/{step:07d}.pt").exists())
        for process in killed.processes:
            os.kill(process.pid, signal.SIGKILL)
        killed.wait()
    assert ranks(train.main, [*options, "--run-dir", tmp_path / "killed"], 2).wait() == [0, 0]
    assert_same_state(latest(tmp_path / "whole"), latest(tmp_path / "killed"))


def test_latents_of_clips_are_those_of_their_frames_and_train(clips, small_vae, tmp_path):
    out = tmp_path / "latents"
    extract = ["--data-path", clips, "--vae", small_vae, "--image-size", 16, "--num-frames", 3, "--out", out, "--no-flip"]
    assert call(extract_latents.main, *extract, "--dtype", "float32") == 0
    stored = load_dataset(DataConfig(str(out), flip=False), 16, num_frames=3)
    assert stored[0, 0]["moments"].shape == (2, 4, 3, 2, 2), "mean and deviation, channels, frames, cells"
    data = load_dataset(DataConfig(str(clips), flip=False), 16, num_frames=3)
    space = data.open_space(str(small_vae)).to("cpu")
    for index in range(4):
        frames = data[index, 0]["image"].movedim(1, 0).float() / 127.5 - 1
        alone = torch.cat([space.moments(frame[None]) for frame in frames])  # (F, 2, C, h, w)
        torch.testing.assert_close(stored[index, 0]["moments"], alone.movedim(0, 2), rtol=1e-5, atol=1e-5)
    images = torch.rand(2, 3, 5, 16, 16)
    x_0 = torch.randn(2, 4, 5, 2, 2)
    assert space.encode(images).shape == x_0.shape
    alone = torch.stack([space.decode(x_0[:, :, f]) for f in range(5)], dim=2)
    torch.testing.assert_close(space.decode(x_0), alone, rtol=1e-5, atol=1e-5)
    sizes = "--model DiT-S/2 --hidden-size 16 --depth 1 --num-heads 2 --image-size 16 --num-frames 3".split()
    more = [*sizes, "--global-batch-size", 4, "--max-steps", 2, "--device", "cpu", "--no-flip"]
    run = ["--data-path", out, "--vae", small_vae, "--run-dir", tmp_path / "run", *more]
    assert call(train.main, *run, "--latent-norm", "channel") == 0
    assert call(sample.main, "--ckpt", tmp_path / "run", "--num-sampling-steps", 2, "--output", tmp_path / "a.webp") == 0
    with Image.open(tmp_path / "a.webp") as file:
        assert file.n_frames == 3


def test_stored_clips_are_not_taken_for_others(clips, small_vae, tmp_path, capsys):
    extract = ["--data-path", clips, "--vae", small_vae, "--image-size", 16, "--num-frames", 3, "--out", tmp_path / "l"]
    assert call(extract_latents.main, *extract) == 0
    options = ["--data-path", tmp_path / "l", "--vae", small_vae, "--image-size", 16]
    assert call(train.main, *options) == 2
    assert "pass --num-frames 3 --frame-stride 1" in capsys.readouterr().err.splitlines()[-1]
    assert call(train.main, *options, "--num-frames", 3, "--frame-stride", 2) == 2


@pytest.mark.parametrize("block", ["adaln-zero", "space-time"])
@pytest.mark.parametrize("patch_frames", [1, 2])
def test_an_image_models_weights_draw_still_clips_as_images(block, patch_frames):
    """A clip whose frames are one image: a model with the inflated weights predicts what the image model does. Attention
    over all tokens sees each token once more for each frame, which changes no weighted mean."""
    torch.manual_seed(0)
    sizes = {"in_channels": 2, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "learn_sigma": False}
    image = DiT(input_size=8, patch_size=4, **sizes).eval()
    for parameter in image.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    clip = DiT(input_size=(4, 8, 8), patch_size=(patch_frames, 4, 4), block=block, **sizes).eval()
    weights = inflate(image.state_dict(), image.sizes, clip)
    clip.load_state_dict({**weights, "pos_embed": clip.pos_embed})
    x, t, y = torch.randn(2, 2, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    still = x[:, :, None].expand(-1, -1, 4, -1, -1)
    expected = image(x, t, y)[:, :, None].expand(-1, -1, 4, -1, -1)
    torch.testing.assert_close(clip(still, t, y), expected, rtol=1e-4, atol=1e-5)


def test_the_attention_over_time_of_a_model_of_single_frames_begins_behind_a_closed_gate():
    torch.manual_seed(0)
    sizes = {"input_size": (1, 8, 8), "patch_size": (1, 4, 4), "hidden_size": 16, "depth": 2, "num_heads": 2}
    frame, clip = DiT(**sizes).eval(), DiT(**sizes, block="space-time").eval()
    for parameter in frame.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    clip.load_state_dict(inflate(frame.state_dict(), frame.sizes, clip))
    x, t, y = torch.randn(2, 4, 1, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 2])
    torch.testing.assert_close(clip(x, t, y), frame(x, t, y))


def test_a_run_of_clips_starts_from_an_image_model(tmp_path, capsys):
    small = "--hidden-size 16 --depth 1 --num-heads 2 --patch-size 4 --global-batch-size 4 --device cpu".split()
    image = ["--recipe", "fast", "--data-path", "mnist", "--vae", "none", "--image-size", 28, *small, "--max-steps", 2]
    assert call(train.main, *image, "--run-dir", tmp_path / "image") == 0
    start = ["--data-path", "moving-mnist", "--vae", "none", "--image-size", 32, "--num-frames", 2, "--max-steps", 2]
    start += ["--global-batch-size", 4, "--device", "cpu", "--init-from", latest_path(tmp_path / "image")]
    assert call(train.main, *start, "--block", "space-time", "--run-dir", tmp_path / "clip") == 0
    assert latest(tmp_path / "clip")["args"]["block"] == "space-time"
    assert call(train.main, *start, "--block", "space-time", "--run-dir", tmp_path / "clip", "--max-steps", 3) == 0
    capsys.readouterr()
    start[-1] = latest_path(tmp_path / "clip")
    assert call(train.main, *(word for word in start if word not in ("--num-frames", 2))) == 2


@pytest.mark.slow
def test_the_page_on_clips_shows_a_signal_that_is_learned():
    page = (ROOT / "docs/video.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert code.count("\n") <= 45
    exec(compile(code, "docs/video.md", "exec"), {})


def latest_path(run):
    return sorted((run / "checkpoints").glob("*.pt"))[-1]
