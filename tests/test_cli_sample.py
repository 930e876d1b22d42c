"""sample.py as a whole: the original's images from a seed, labels by name, and what mistakes get."""

import argparse

import numpy as np
import pytest
import torch
from conftest import call
from PIL import Image
from reference import fill, golden

import checkpoint
import sample
import sampling
from diffusion import create_diffusion
from errors import UserError
from models import DiT, DiT_models


def test_the_scripts_own_random_stream_is_the_originals(tmp_path):
    """The golden latents, through what sample.py runs: guided without a doubled sampling batch."""
    for key, expected in golden("sample_script").items():
        name, size, seed, steps, cfg_scale, labels = key.split(":")
        weights = fill(DiT_models[name](input_size=int(size), num_classes=1000)).state_dict()
        args = argparse.Namespace(
            seed=int(seed), state={"model": weights}, ckpt="golden", vae="none", image_size=int(size),
            cfg_scale=float(cfg_scale), num_sampling_steps=int(steps),
        )  # fmt: skip
        latents = sample.draw(args, [int(label) for label in labels.split(",")], torch.device("cpu"))
        assert np.abs(latents.numpy() - expected).max() <= 2e-4 * np.abs(expected).max(), key


def test_guidance_is_the_same_as_with_a_doubled_batch():
    model = fill(DiT(input_size=8, hidden_size=24, depth=1, num_heads=2, num_classes=10))
    z, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    torch.manual_seed(5)
    old = create_diffusion("4").p_sample_loop(
        model.forward_with_cfg, (4, 4, 8, 8), torch.cat([z, z]), clip_denoised=False,
        model_kwargs={"y": torch.tensor([1, 2, 10, 10]), "cfg_scale": 2.0},
    )[:2]  # fmt: skip
    torch.manual_seed(5)
    space = sampling.latents.load("none")
    with torch.no_grad():
        new = sampling.draw(model, space, y, z, lambda x, i: torch.randn(4, 4, 8, 8)[:2], 2.0, 4)
    torch.testing.assert_close(new, old, rtol=0, atol=1e-5)


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


def test_labels_go_by_number_and_name():
    args = argparse.Namespace(state=None, num_classes=1000)
    assert sampling.parse_labels(["207", "golden retriever", "Daisy"], args) == [207, 207, 985]
    twice = argparse.Namespace(state={"args": {"class_names": ["crane", "bee", "Crane"]}}, num_classes=3)
    with pytest.raises(UserError, match=r"several classes are called that; did you mean 0 \(crane\), 2 \(Crane\)"):
        sampling.parse_labels(["crane"], twice)
    with pytest.raises(UserError, match="no class is called that; did you mean .*goldfish"):
        sampling.parse_labels(["goldfis"], args)
    own = argparse.Namespace(state={"args": {"class_names": ["ant", "bee"]}}, num_classes=2)
    assert sampling.parse_labels(["bee", "0"], own) == [1, 0]
    assert sampling.parse_labels(["0"], argparse.Namespace(state={}, num_classes=0)) == [0]


def test_pixels_are_rounded_as_published():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0]).view(1, 1, 1, 6)
    assert sampling.to_uint8(values)[0, 0].tolist() == [[v] * 3 for v in (0, 0, 128, 191, 255, 255)]


def bad(words, *argv):
    return pytest.param([str(a) for a in argv], words, id=" ".join(map(str, argv))[-50:])


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        bad("--labels 10: out of range, the model's classes are 0 to 9", "--labels", 3, 10),
        bad("--labels -1: out of range", "--labels", "-1"),
        bad("no class is called that", "--labels", "cat"),
        bad("--cfg-scale: -1 is not a number, 0 or more", "--cfg-scale", -1),
        bad("--model DiT-S/2: CKPT holds DiT-XL/2", "--model", "DiT-S/2"),
        bad("--image-size 256: CKPT holds 8", "--image-size", 256),
        bad("--num-classes 1000: CKPT holds 10", "--num-classes", 1000),
        bad("its folder does not exist", "--output", "nowhere/grid.png"),
        bad("name an image file", "--output", "grid"),
        bad("1001 is not a whole number, 1 or more and 1000 or less", "--num-sampling-steps", 1001),
        bad("absent.pt: no such file", "--ckpt", "absent.pt"),
        bad("cut.pt: not a checkpoint, or a truncated one", "--ckpt", "cut.pt"),
        bad("other.pt: not a DiT", "--ckpt", "other.pt"),
        bad("text.pt: not a checkpoint", "--ckpt", "text.pt"),
        bad("unrecognized arguments: --sampling-steps", "--sampling-steps", 3),
        bad("--vae VAE: 4 channels", "--vae", "VAE"),
        bad("--vae none: LATENT has 4 channels, it works on latents", "--ckpt", "LATENT", "--vae", "none"),
    ],
)
def test_mistakes_get_one_line(tiny_checkpoint, small_vae, tmp_path, monkeypatch, capsys, extra, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cut.pt").write_bytes(tiny_checkpoint.read_bytes()[:5000])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"a": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "VAE").symlink_to(small_vae)
    torch.save(DiT_models["DiT-S/8"](input_size=8).state_dict(), tmp_path / "LATENT")
    assert call(sample.main, "--ckpt", tiny_checkpoint, *extra) == 2
    error = capsys.readouterr().err
    assert words.replace("CKPT", str(tiny_checkpoint)) in error
    assert len([line for line in error.splitlines() if line.strip()]) == 1, error
    assert not list(tmp_path.glob("*.png"))


def test_without_a_checkpoint_only_the_released_models_are_drawn_from(capsys):
    for wrong in (["--model", "DiT-S/2"], ["--image-size", "128"], ["--num-classes", "10"]):
        assert call(sample.main, *wrong) == 2
        assert "name your own with --ckpt" in capsys.readouterr().err


def test_a_model_without_null_labels_cannot_be_guided(tmp_path, capsys):
    sizes = {"input_size": 8, "in_channels": 3, "hidden_size": 24, "depth": 1, "num_heads": 2}
    weights = DiT(**sizes, num_classes=3, class_dropout_prob=0.0).state_dict()
    args = {"num_heads": 2, "label_dropout": 0.0, "num_classes": 3, "image_size": 8, "vae": "none"}
    checkpoint.save(tmp_path / "a.pt", {"ema": weights, "args": args})
    command = ["--ckpt", tmp_path / "a.pt", "--output", tmp_path / "a.png", "--num-sampling-steps", 2, "--labels", 1]
    assert call(sample.main, *command) == 2
    assert "trained without null labels; pass --cfg-scale 1" in capsys.readouterr().err
    assert call(sample.main, *command, "--cfg-scale", 1) == 0
