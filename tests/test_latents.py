"""latents.py against a small autoencoder of the Stable Diffusion kind."""

import pytest
import torch

import latents
import options
from errors import UserError


def test_space_comes_from_the_autoencoders_config(small_vae):
    space = latents.load(str(small_vae)).place("cpu")
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
    space, images = latents.load("none", image_channels=1), torch.rand(2, 1, 8, 8)
    assert (space.channels, space.factor) == (1, 1)
    assert space.place("cpu").decode(space.encode(images)) is images


@pytest.mark.parametrize("name", ["ema", "no/such-model", "/nowhere/vae", "."])
def test_an_autoencoder_that_cannot_be_had_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--vae .*: no usable autoencoder") as error:
        latents.load(name)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_are_refused_with_the_nearest():
    options.check_image_size(256, 8, 2)
    with pytest.raises(UserError, match="--image-size 250: not a multiple of 16 .*; 240 and 256 are the nearest"):
        options.check_image_size(250, 8, 2)
    with pytest.raises(UserError, match="64 is the smallest"):
        options.check_image_size(20, 8, 8)
