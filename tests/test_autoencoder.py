"""data/autoencoder.py against a small autoencoder of the Stable Diffusion kind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.autoencoder import check_image_size, load_space
from runtime.errors import UserError


def test_space_comes_from_the_autoencoders_config(small_vae):
    space = load_space(str(small_vae)).place("cpu")
    assert (space.channels, space.factor, space.scaling, space.shift) == (4, 8, 0.18215, 0.0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.manual_seed(0)
    x_0 = space.encode(images)
    assert x_0.shape == (2, 4, 4, 4)
    posterior = space.vae.encode(images).latent_dist
    torch.manual_seed(0)
    torch.testing.assert_close(x_0, posterior.sample() * 0.18215)
    assert not torch.equal(x_0, space.encode(images)), "each encoding draws a fresh sample of the posterior"
    torch.testing.assert_close(space.decode(x_0), space.vae.decode(x_0 / 0.18215).sample)
    assert not any(p.requires_grad for p in space.vae.parameters())


def test_pixels_are_left_alone():
    space, images = load_space("none", image_channels=1), torch.rand(2, 1, 8, 8)
    assert (space.channels, space.factor) == (1, 1)
    assert space.place("cpu").decode(space.encode(images)) is images


@pytest.mark.parametrize("name", ["ema", "no/such-model", "/nowhere/vae", "."])
def test_an_autoencoder_that_cannot_be_had_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--vae .*: no usable autoencoder") as error:
        load_space(name)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_are_refused_with_the_nearest():
    check_image_size(256, 8, 2)
    with pytest.raises(UserError, match="--image-size 250: not a multiple of 16 .*; 240 and 256 are the nearest"):
        check_image_size(250, 8, 2)
    with pytest.raises(UserError, match="64 is the smallest"):
        check_image_size(20, 8, 8)


# What config.json of stabilityai/sd-vae-ft-mse holds, which diffusers 0.4.2 has written
KEYS_OF_0_4_2 = """act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block norm_num_groups
out_channels sample_size up_block_types""".split()
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def as_of_0_4_2(source, folder, kind):
    """The autoencoder as the released ones were saved: fewer keys in the config, other names in the attention blocks."""
    config = json.loads((source / "config.json").read_text())
    old = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.2", **{key: config[key] for key in KEYS_OF_0_4_2}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(old))
    weights = {}
    for name, tensor in load_file(source / "diffusion_pytorch_model.safetensors").items():
        for new, before in OLD_NAMES.items():
            name = name.replace(f".{new}.", f".{before}.")
        weights[name] = tensor
    assert any("query" in name for name in weights)
    if kind == "bin":
        torch.save(weights, folder / "diffusion_pytorch_model.bin")
    else:
        save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_an_autoencoder_of_the_releases_age_is_the_same_autoencoder(small_vae, tmp_path, kind):
    old = load_space(str(as_of_0_4_2(small_vae, tmp_path / "vae", kind))).place("cpu")
    new = load_space(str(small_vae)).place("cpu")
    assert (old.channels, old.factor, old.scaling, old.shift) == (4, 8, 0.18215, 0.0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(old.moments(images), new.moments(images))
    x_0 = torch.randn(2, 4, 4, 4)
    assert torch.equal(old.decode(x_0), new.decode(x_0))
    assert old.encoder_settings() == new.encoder_settings()


@pytest.mark.parametrize(
    "change",
    [
        {"scaling_factor": "0.18215"}, {"scaling_factor": None}, {"scaling_factor": 0}, {"shift_factor": "0"},
        {"latent_channels": None}, {"latent_channels": 4.5}, {"latent_channels": -4}, {"block_out_channels": 8},
        {"block_out_channels": []}, {"block_out_channels": ["8"]}, {"in_channels": [3]}, {"in_channels": True},
    ],
)  # fmt: skip
def test_values_of_wrong_types_in_the_config_are_named(small_vae, tmp_path, change):
    config = json.loads((small_vae / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=f"--vae {tmp_path}: no usable autoencoder in that folder") as error:
        load_space(str(tmp_path))
    assert next(iter(change)).replace("_", "-") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "null", "3", '{"_class_name": "AutoencoderKL"', '"text"'])
def test_a_config_that_is_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="no usable autoencoder in that folder") as error:
        load_space(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(small_vae, tmp_path, value):
    shutil.copytree(small_vae, tmp_path / "vae")
    path = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.weight"][0, 0] = value
    save_file(weights, path, metadata={"format": "pt"})
    space = load_space(str(tmp_path / "vae"))
    with pytest.raises(UserError, match="decoder.conv_in.weight.* not finite"):
        space.place("cpu")
