"""Feature networks by name: their arithmetic against slow formulas, and whole measurements against torch-fidelity's."""

import json
import socket

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torch_fidelity
from helpers import call
from huggingface_hub import constants
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.datasets import load_sample_images
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

import evaluate
from evaluation import comparison, features
from evaluation.features import NETWORKS, FeatureNetwork, Outputs, TimmFeatures, load_network
from runtime.errors import UserError


class Small(FeatureNetwork):
    """8 means of EfficientNet-Lite0's 1280 features, so that few images give covariances of full rank, and its logits."""

    preprocessing = "as efficientnet-lite0"

    def __init__(self, source=None):
        super().__init__()
        self.network = load_network("efficientnet-lite0")

    def outputs(self, images):
        pooled, _, logits = self.network(images)
        return Outputs(pooled.unflatten(1, (8, 160)).mean(2), logits=logits)


class ForFidelity(FeatureExtractorBase):
    """The same network in torch-fidelity's interface."""

    def __init__(self, name, features_list, **kwargs):
        super().__init__(name, features_list)
        self.network = Small()

    @staticmethod
    def get_provided_features_list():
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, images):
        outputs = self.network(images.permute(0, 2, 3, 1))
        return tuple(getattr(outputs, name) for name in self.features_list)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two folders of 12 crops each of a photograph of a temple and of one of a flower."""
    root = tmp_path_factory.mktemp("photographs")
    for picture, name in zip(load_sample_images().images, ("temple", "flower"), strict=True):
        (root / name).mkdir()
        for i in range(12):
            row, column = 80 * (i % 4), 150 * (i // 4)
            Image.fromarray(picture[row : row + 96, column : column + 96]).save(root / name / f"{i:02d}.png")
    return root


def test_numbers_are_those_of_torch_fidelity(photographs, monkeypatch, capsys):
    """Of the whole command, with two networks in one pass; EfficientNet alone tells the report's numbers apart."""
    monkeypatch.setitem(NETWORKS, "small", Small)
    monkeypatch.setattr(comparison, "HALVES_FROM", 12)
    torch_fidelity.register_feature_extractor("small", ForFidelity)
    reference, samples = photographs / "temple", photographs / "flower"
    expected = torch_fidelity.calculate_metrics(
        input1=str(samples), input2=str(reference), feature_extractor="small", cuda=False, cache=False, verbose=False,
        fid=True, kid=True, isc=True, prc=True, isc_splits=1, kid_subset_size=12, kid_subsets=2,
        save_cpu_ram=True,
    )  # fmt: skip
    argv = [reference, samples, "--features", "small", "efficientnet-lite0", "--device", "cpu", "--resamples", 2]
    assert call(evaluate.main, *argv) == 0
    report = json.loads((photographs / "flower.metrics.json").read_text())
    found, other = report["networks"]["small"], report["networks"]["efficientnet-lite0"]
    ours = {
        "frechet_inception_distance": "fd",
        "inception_score_mean": "inception_score",
        "kernel_inception_distance_mean": "kid",
        "precision": "precision",
        "recall": "recall",
    }
    for theirs, name in ours.items():
        # its kernels are float32, and KID is a difference of their means, which are about 1
        assert found[name] == pytest.approx(expected[theirs], rel=1e-6, abs=1e-6 if name == "kid" else 0), name
    assert found["fd"] > 0.01
    assert "fid" not in report, "FID is of the Inception network"
    assert other["fd"] > 10 * found["fd"]
    assert other["weights"]["sha256"] != found["weights"]["sha256"]
    assert "shorter side to 256 px, bicubic, antialiased" in other["preprocessing"]
    assert found["standard_errors"]["fd"] > 0
    assert found["sfd"] is None
    out = capsys.readouterr().out
    assert out.splitlines()[0].split() == ["12", "images", "small", "efficientnet-lite0"]
    assert f"{found['fd']:.3f} +- {found['standard_errors']['fd']:.3f}" in out


def test_the_distance_is_that_of_pytorch_fid(photographs, monkeypatch):
    """Of the same two folders of photographs, by that package's own reader, statistics and distance."""
    theirs = pytest.importorskip("pytorch_fid.fid_score")
    monkeypatch.setattr(theirs.linalg, "sqrtm", lambda x, disp: (sqrtm(x), None))  # an argument that SciPy has given up
    monkeypatch.setitem(NETWORKS, "small", Small)
    network = Small()

    class ForPytorchFid(torch.nn.Module):
        def forward(self, images):  # (N, 3, H, W) in [0, 1]
            return [network((255 * images.permute(0, 2, 3, 1)).round().byte()).pooled[:, :, None, None]]

    folders = [photographs / name for name in ("temple", "flower")]
    moments = [theirs.compute_statistics_of_path(str(folder), ForPytorchFid(), 5, 8, "cpu", 0) for folder in folders]
    assert call(evaluate.main, *folders, "--features", "small", "--device", "cpu", "--resamples", 0) == 0
    report = json.loads((photographs / "flower.metrics.json").read_text())
    expected = theirs.calculate_frechet_distance(*moments[0], *moments[1])
    assert report["networks"]["small"]["fd"] == pytest.approx(expected, rel=1e-6)


def test_the_weights_of_efficientnet_know_a_daisy(photographs):
    """Class 985 of ImageNet: of 1,000 classes, in weights that are loaded by their order alone."""
    flower = torch.tensor(load_sample_images().images[1][None])
    assert load_network("efficientnet-lite0")(flower).logits.argmax() == 985


def cubic(x, a=-0.75):
    """The kernel of cubic convolution (Keys 1981), with PyTorch's a."""
    x = abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def interpolation(old, new):
    """(new, old) weights of the published interpolation: output i lies at (i + 1/2) old / (new + 0.1) - 1/2."""
    weights = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / (new + 0.1) - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, np.clip(tap, 0, old - 1)] += cubic(place - tap)
    return torch.from_numpy(weights)


def test_features_of_dinov2_are_the_class_token_of_the_published_arithmetic():
    """Random weights and one block; positions of 5x5 places are interpolated to 16x16."""
    model = timm.create_model("vit_small_patch14_dinov2", depth=1, embed_dim=16, num_heads=2, img_size=70)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    w = {name: value.double() for name, value in model.state_dict().items()}
    network = TimmFeatures(model)
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    x = (images.double() / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    patches = F.unfold(x.permute(0, 3, 1, 2), 14, stride=14).transpose(1, 2)  # (2, 256, 588)
    tokens = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    grid = w["pos_embed"][0, 1:].view(5, 5, 16)
    places = torch.einsum("ij,kl,jlc->ikc", interpolation(5, 16), interpolation(5, 16), grid).reshape(256, 16)
    x = torch.cat([(w["cls_token"] + w["pos_embed"][:, :1]).expand(2, 1, 16), tokens + places], dim=1)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    q, k, v = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").view(2, 257, 3, 2, 8).permute(2, 0, 3, 1, 4)
    attended = ((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + w["blocks.0.ls1.gamma"] * linear(attended, "blocks.0.attn.proj")
    hidden = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    x = x + w["blocks.0.ls2.gamma"] * linear(hidden, "blocks.0.mlp.fc2")
    pooled, spatial, logits = network(images)
    torch.testing.assert_close(pooled.double(), norm(x, "norm")[:, 0], rtol=1e-4, atol=1e-4)
    assert spatial is logits is None


@pytest.mark.parametrize("shape", [(50, 40), (300, 350)])
def test_images_are_resized_as_pillow_does(shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    height, width = (64 * n // min(shape) for n in shape)
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.BICUBIC))
    top, left = round((height - 56) / 2), round((width - 56) / 2)
    expected = expected[top : top + 56, left : left + 56]
    found = features.resize(torch.from_numpy(image[None]), 64, 56, "bicubic")[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() <= 1
    assert np.mean(found != expected) < 0.01


def test_embeddings_of_clip_have_length_one(monkeypatch):
    created = []

    def small(name, pretrained):
        created.append((name, pretrained))
        return timm.create_model(name, depth=1, embed_dim=16, num_heads=2, img_size=336)

    monkeypatch.setattr(features, "check_hub", lambda name: None)
    monkeypatch.setattr(features, "timm", type("Timm", (), {"create_model": staticmethod(small)}))
    pooled, _, logits = load_network("clip")(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
    assert created == [(features.CLIP, True)]
    assert logits is None
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(2))
    assert pooled.shape == (2, 768)


@pytest.mark.parametrize("name", ["clip", "timm:resnet50.a1_in1k", "timm:hf-hub:no/such-model@main"])
def test_without_a_network_it_is_said_at_once(monkeypatch, tmp_path, name):
    def unreachable(address, timeout):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "create_connection", unreachable)
    monkeypatch.setattr(features.timm, "create_model", None)  # calling it would raise
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(UserError, match=rf"^--features {name}.*no network: .* cannot be reached.*local-dir:FOLDER"):
        load_network(name)
