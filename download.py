"""The two checkpoints of the original release: fetched when they are first asked for, resumable, checked.

    model.load_state_dict(find_model("DiT-XL-2-256x256.pt"))  # or the path of any other checkpoint

A file that is in `pretrained_models/` is used as it is, without a network.
"""

import fcntl
import http.client
import os
import shutil
import sys
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import files as checkpoint
from models import DiT_models
from runtime.errors import UserError

BASE_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
TIMEOUT = 60  # seconds without a byte
# The file's name: the model that it must fit, whose input is the image in latent cells of 8 pixels
RELEASED = {
    "DiT-XL-2-256x256.pt": partial(DiT_models["DiT-XL/2"], input_size=32, num_classes=1000),
    "DiT-XL-2-512x512.pt": partial(DiT_models["DiT-XL/2"], input_size=64, num_classes=1000),
}
NAMES = " and ".join(RELEASED)


class DownloadError(UserError):
    """A released checkpoint that could not be had; one line with the address, what is wrong and the way out."""


def released_checkpoint(image_size):
    """The name of the released checkpoint for images of `image_size` pixels. Raises DownloadError where there is none."""
    name = f"DiT-XL-2-{image_size}x{image_size}.pt"
    if name not in RELEASED:
        raise DownloadError(f"image size {image_size}: only {NAMES} were released; give a checkpoint of your own")
    return name


def find_model(name_or_path):
    """The state dict of a checkpoint, {key: tensor} on the CPU: the EMA weights where the file holds them, else the file's
    own. One of the two released names, where no such file exists, is taken from `pretrained_models/` in the current folder,
    downloaded when missing. Raises DownloadError or checkpoint.CheckpointError, both UserErrors."""
    path = Path(name_or_path)
    if not path.exists():
        path = download(str(path))
    return checkpoint.weights(checkpoint.load(path), path)


def download(name, folder="pretrained_models"):
    """Path of the released checkpoint `name` in `folder`: fetched if it is not there, checked, and only then named so.

    A download that broke off stays as `{name}.part` and is resumed by the next call. Any number of processes may call
    this at once: one fetches, the others wait. Raises DownloadError."""
    if name not in RELEASED:
        raise DownloadError(f"{name}: no such file, nor a released checkpoint; those are {NAMES}")
    path, part, url = Path(folder) / name, Path(folder) / f"{name}.part", BASE_URL + name
    if path.exists():
        return path
    by_hand = f"or download it by hand from {url} to {path}"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "ab") as file:
            lock(file)
            if path.exists():  # another process was faster, and `part` is one that we created in vain, if it exists
                part.unlink(missing_ok=True)
                return path
            fetch(url, file)
            try:
                check(part, RELEASED[name])
            except ValueError as error:
                file.truncate(0)  # not removed: others may be waiting for the lock on this very file
                raise DownloadError(f"{url}: what came is unfit: {error}; run again to fetch it anew, {by_hand}") from None
            os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # of the network or of the disk
        raise DownloadError(f"{url}: not fetched: {error}; run again to go on from there, {by_hand}") from None
    return path


def lock(file):
    """Wait until no other process holds `file`, and hold it until it is closed or this process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{file.name}: waiting for another process that is downloading it", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)


def fetch(url, file):
    """Complete `file`, open for appending, to the whole of `url`: from where it ends or, where the server will not resume,
    from the start. Raises OSError (urllib's errors are such) or http.client.HTTPException."""
    start = max(0, file.seek(0, os.SEEK_END) - 1)  # the last byte again: a range that begins at the end is refused
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"})
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # range not satisfiable: `file` is longer than what the server has
            raise
        response = urllib.request.urlopen(url, timeout=TIMEOUT)
    with response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0
        length = response.headers["Content-Length"]
        total = start + int(length) if length else None
        file.truncate(start)
        progress = {"desc": url.rpartition("/")[2], "total": total, "initial": start}
        with tqdm.wrapattr(response, "read", **progress) as stream:
            shutil.copyfileobj(stream, file, 1 << 20)
    file.flush()
    os.fsync(file.fileno())
    size = os.fstat(file.fileno()).st_size
    if total is not None and size != total:
        raise OSError(f"the connection broke off after {size:,} of {total:,} bytes")


def check(path, make_model):
    """Raises ValueError if `path` is not a checkpoint with exactly the keys and shapes of make_model()'s state dict."""
    with torch.device("meta"):  # shapes without memory
        expected = {key: tuple(tensor.shape) for key, tensor in make_model().state_dict().items()}
    found = {key: tuple(tensor.shape) for key, tensor in checkpoint.weights(checkpoint.load(path), path).items()}
    for key in [*expected, *found]:
        if found.get(key) != expected.get(key):
            raise ValueError(f"{key} is {found.get(key, 'missing')}, must be {expected.get(key, 'absent')}")
