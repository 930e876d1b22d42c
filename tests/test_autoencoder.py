"""data/autoencoder.py against small autoencoders of diffusers."""

import json
import shutil
import socket

import diffusers
import pytest
import torch
from helpers import call, make_images
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import extract_latents
import train
from checkpoint.opened import Checkpoint
from data.autoencoder import latent_sides, load_space, to_model_range
from data.images import ImageDataset
from data.latents import StoredLatents
from runtime.errors import UserError


def test_space_comes_from_the_autoencoders_config(small_vae):
    space = load_space(str(small_vae)).to("cpu")
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
    assert space.to("cpu").decode(space.encode(images)) is images


@pytest.mark.parametrize("name", ["ema", "no/such-model", "/nowhere/vae", "."])
def test_an_autoencoder_that_cannot_be_had_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--vae .*: no usable autoencoder") as error:
        load_space(name)
    assert "\n" not in str(error.value)


SHORT = {"out_channels": 3, "latent_channels": 4}
RESNETS = {**SHORT, "block_out_channels": (8, 8), "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4}  # fmt: skip
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 3.0]}
VIDEO = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, **STATISTICS}
FIVE = {"block_out_channels": (8,) * 5, "down_block_types": RESNETS["down_block_types"][:1] * 5,
    "up_block_types": RESNETS["up_block_types"][:1] * 5}  # fmt: skip
FEATURES = {"encoder_hidden_size": 64, "encoder_patch_size": 14, "encoder_num_hidden_layers": 1, "encoder_input_size": 28,
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "patch_size": 32,
    "decoder_intermediate_size": 32, "latents_mean": torch.randn(64, 2, 2).tolist(), "scaling_factor": 0.5}  # fmt: skip
KINDS = {  # (kind in diffusers, factor, channels, arguments of its class)
    "SD XL": ("AutoencoderKL", 2, 4, {**RESNETS, "scaling_factor": 0.5, **STATISTICS}),
    "FLUX": ("AutoencoderKL", 2, 16, {**RESNETS, "latent_channels": 16, "scaling_factor": 0.36, "shift_factor": 0.12}),
    "VA-VAE": ("AutoencoderKL", 16, 32, {**RESNETS, **FIVE, "latent_channels": 32, "scaling_factor": 1.0}),
    "DC-AE": ("AutoencoderDC", 32, 4, {"latent_channels": 4, "attention_head_dim": 4, "scaling_factor": 0.41,
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in {
            "block_types": "ResBlock", "block_out_channels": (8,) * 6, "layers_per_block": (1,) * 6,
            "qkv_multiscales": ((),) * 6}.items()}}),
    "TAESD": ("AutoencoderTiny", 8, 4, {**SHORT, "scaling_factor": 0.7, **{f"{part}_block_out_channels": (8, 8, 8, 8)
        for part in ("encoder", "decoder")}, "num_encoder_blocks": (1,) * 4, "num_decoder_blocks": (1,) * 4}),
    "FLUX.2": ("AutoencoderKLFlux2", 4, 16, RESNETS),
    "Qwen-Image": ("AutoencoderKLQwenImage", 8, 4, VIDEO),
    "Wan 2.1": ("AutoencoderKLWan", 8, 4, VIDEO),
    "Wan 2.2": ("AutoencoderKLWan", 16, 4, {**VIDEO, "patch_size": 2, "in_channels": 12, "out_channels": 12,
        "is_residual": True, "scale_factor_spatial": 16}),
    "RAE": ("AutoencoderRAE", 32, 64, FEATURES),
}  # fmt: skip


def patches(z):
    """2x2 patches, as FLUX.2's pipeline makes them."""
    n, c, h, w = z.shape
    return z.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


def unpatched(z):
    n, c, h, w = z.shape
    return z.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


def as_in_the_pipeline(vae, images, x_0):
    """(x_0, images): what diffusers' pipeline of this kind makes of images (the posterior's draw is the next of torch's
    stream), and of x_0."""
    kind, config = type(vae).__name__, vae.config
    if kind == "AutoencoderRAE":  # takes and gives images in [0, 1], latents in normalised form
        return vae.encode(images / 2 + 0.5).latent, vae.decode(x_0).sample * 2 - 1
    if kind == "AutoencoderKLFlux2":  # Flux2Pipeline
        mean = vae.bn.running_mean.view(1, -1, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + config.batch_norm_eps)
        posterior = vae.encode(images).latent_dist
        drawn = patches(posterior.mean) + patches(posterior.std) * torch.randn(x_0.shape)  # ours draws in patches' order
        return (drawn - mean) / std, vae.decode(unpatched(x_0 * std + mean)).sample
    if kind in ("AutoencoderKLQwenImage", "AutoencoderKLWan"):  # QwenImagePipeline, WanPipeline
        mean, std = (torch.tensor(STATISTICS[name]).view(1, 4, 1, 1, 1) for name in STATISTICS)
        encoded = (vae.encode(images[:, :, None]).latent_dist.sample() - mean) / std
        return encoded[:, :, 0], vae.decode(x_0[:, :, None] * std + mean).sample[:, :, 0]
    scaling, shift = config.scaling_factor, getattr(config, "shift_factor", None) or 0.0
    if kind != "AutoencoderKL":
        return (vae.encode(images)[0] - shift) * scaling, vae.decode(x_0 / scaling + shift).sample
    drawn = vae.encode(images).latent_dist.sample()
    if config.latents_mean:  # StableDiffusionXLPipeline
        mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in (config.latents_mean, config.latents_std))
        return (drawn - mean) * scaling / std, vae.decode(x_0 * std / scaling + mean).sample
    return (drawn - shift) * scaling, vae.decode(x_0 / scaling + shift).sample  # FluxPipeline


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_normalised_as_in_diffusers_pipelines(tmp_path, name):
    kind, factor, channels, arguments = KINDS[name]
    torch.manual_seed(0)
    vae = getattr(diffusers, kind)(**arguments).eval()
    for weights in vae.decoder.parameters():
        if name == "RAE":
            weights.data.normal_(0, 0.1)  # its head would start at zero
    if name == "FLUX.2":
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.1, 5)
    vae.save_pretrained(tmp_path / "vae")
    space = load_space(str(tmp_path / "vae")).to("cpu")
    assert (space.channels, space.factor, space.kind) == (channels, factor, kind)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    torch.manual_seed(1)
    x_0 = space.encode(images)
    torch.manual_seed(1)
    with torch.no_grad():
        expected, decoded = as_in_the_pipeline(vae, images, x_0)
    assert min(x_0.std(), decoded.std()) > 0.01, "or the test would say nothing"
    torch.testing.assert_close(x_0, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(space.decode(x_0), decoded, rtol=1e-4, atol=1e-5)
    draws = kind not in ("AutoencoderDC", "AutoencoderTiny", "AutoencoderRAE")
    assert torch.equal(space.encode(images), x_0) != draws

    make_images(tmp_path / "images")
    argv = ["--data-path", tmp_path / "images", "--vae", tmp_path / "vae", "--out", tmp_path / "latents"]
    argv += ["--image-size", 64, "--batch-size", 2, "--num-workers", 0, "--dtype", "float32"]
    assert call(extract_latents.main, *argv) == 0
    stored = StoredLatents(tmp_path / "latents", flip=False)
    moments = stored[3, 0]["moments"][None]
    assert moments.shape == (1, 1 + draws, channels, 64 // factor, 64 // factor)
    image = to_model_range(ImageDataset(tmp_path / "images", 64, flip=False)[3, 0]["image"][None])
    found = []
    for draw in (lambda: stored.open_space(str(tmp_path / "vae")).sample(moments), lambda: space.encode(image)):
        torch.manual_seed(2)
        found.append(draw())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["encoder.conv_in.bias", "decoder.conv_out.weight", "quant_conv.weight"])
def test_weights_that_are_missing_are_not_drawn_at_random(small_vae, tmp_path, name):
    shutil.copytree(small_vae, tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)
    with pytest.raises(UserError, match=f"no usable autoencoder in that folder .the weights {name} are missing"):
        load_space(str(tmp_path / "vae")).to("cpu")


def test_features_without_a_grid_and_images_of_another_size_are_refused(tmp_path, image_folder, capfd):
    diffusers.AutoencoderRAE(**FEATURES, reshape_to_2d=False).save_pretrained(tmp_path / "tokens")
    with pytest.raises(UserError, match="its latents have no grid: reshape_to_2d is off"):
        load_space(str(tmp_path / "tokens"))
    diffusers.AutoencoderRAE(**FEATURES).save_pretrained(tmp_path / "rae")
    commands = (extract_latents.main, "--out", tmp_path / "latents"), (train.main, "--dry-run", "--patch-size", 1)
    for main, *argv in commands:
        argv += ["--data-path", image_folder, "--vae", tmp_path / "rae", "--image-size", 128]
        assert call(main, *argv) == 2
        assert "--image-size 128: the autoencoder takes 64 pixels alone; pass 64\n" in capfd.readouterr().err


def test_a_folder_with_half_precision_files_alone_is_read(small_vae, tmp_path):
    diffusers.AutoencoderKL.from_pretrained(small_vae).half().save_pretrained(tmp_path, variant="fp16")
    assert not (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    space = load_space(str(tmp_path)).to("cpu")
    assert space.encode(torch.zeros(1, 3, 16, 16)).dtype == torch.float32


def test_without_a_network_it_is_said_at_once(monkeypatch):
    def unreachable(address, timeout):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="^--vae no/such-model: .*no network: .* cannot be reached"):
        load_space("no/such-model")
    with pytest.raises(UserError, match="^no/such-DiT: no such file or folder, nor .*no network: .* cannot be reached"):
        Checkpoint.open("no/such-DiT")


def test_sizes_that_do_not_fit_are_refused_with_the_nearest():
    assert [latent_sides(size, 8, 2) for size in (256, "256x384")] == [(32, 32), (32, 48)]
    with pytest.raises(UserError, match="--image-size 250: not a multiple of 16 .*; 240 and 256 are the nearest"):
        latent_sides(250, 8, 2)
    with pytest.raises(UserError, match="64 is the nearest that fits"):
        latent_sides(20, 8, 8)
    with pytest.raises(UserError, match="--image-size 250x384: not a multiple of 16 .*; 256x384 is the nearest"):
        latent_sides("250x384", 8, 2)


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
    old = load_space(str(as_of_0_4_2(small_vae, tmp_path / "vae", kind))).to("cpu")
    new = load_space(str(small_vae)).to("cpu")
    assert (old.channels, old.factor, old.scaling, old.shift) == (4, 8, 0.18215, 0.0)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(old.moments(images), new.moments(images))
    x_0 = torch.randn(2, 4, 4, 4)
    assert torch.equal(old.decode(x_0), new.decode(x_0))
    assert old.encoder_settings() == new.encoder_settings()
