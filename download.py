"""The two checkpoints of the original release, downloaded to `pretrained_models/` when they are first asked for.

model.load_state_dict(find_model("DiT-XL-2-256x256.pt"))  # or the path of any other checkpoint
"""

from functools import partial
from pathlib import Path

import torch

from checkpoint.opened import Checkpoint, check_shapes
from models import DiT_models
from runtime.download import DownloadError, fetch

BASE_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
# The file's name: the model that it must fit, whose input is the image in latent cells of 8 pixels
RELEASED = {
    "DiT-XL-2-256x256.pt": partial(DiT_models["DiT-XL/2"], input_size=32, num_classes=1000),
    "DiT-XL-2-512x512.pt": partial(DiT_models["DiT-XL/2"], input_size=64, num_classes=1000),
}
NAMES = " and ".join(RELEASED)


def released_checkpoint(image_size):
    """The name of the released checkpoint for images of `image_size` pixels. Raises DownloadError where there is none."""
    name = f"DiT-XL-2-{image_size}x{image_size}.pt"
    if name not in RELEASED:
        raise DownloadError(f"image size {image_size}: only {NAMES} were released; give a checkpoint of your own")
    return name


def find_model(name_or_path):
    """The state dict of a checkpoint, {key: tensor} on the CPU: the EMA weights where the file holds them, else the file's
    own. Where no such file exists, one of the two released names is taken from `pretrained_models/` in the current folder,
    downloaded when missing. Raises DownloadError or checkpoint.files.CheckpointError, which are UserErrors."""
    return Checkpoint.open(name_or_path).weights if Path(name_or_path).exists() else download_model(str(name_or_path))


def download_model(name):
    """The state dict of the released checkpoint `name`, downloaded when missing. Raises as `find_model`."""
    return Checkpoint.open(download(name)).weights


def download(name, folder="pretrained_models"):
    """Path of the released checkpoint `name` in `folder`, downloaded when missing (`runtime.download.fetch`). A file
    that is there is used as it is, without a network. Raises DownloadError."""
    if name not in RELEASED:
        raise DownloadError(f"{name}: no such file, nor a released checkpoint; those are {NAMES}")
    return fetch(BASE_URL + name, Path(folder) / name, partial(check, make_model=RELEASED[name]))


def check(path, make_model):
    """Raises ValueError if `path` is not a checkpoint with exactly the keys and shapes of make_model()'s state dict."""
    with torch.device("meta"):  # shapes without memory
        check_shapes(Checkpoint.open(path).weights, make_model().state_dict())
