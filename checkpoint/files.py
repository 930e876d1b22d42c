"""The one place that writes and reads run state. A checkpoint is a dict of tensors and plain values:

    model, ema    state dicts            opt     the optimizer's state
    args          the run's options      step, images_seen, ...    where the run stands

It is complete or absent: written to a temporary name, flushed, renamed. Nothing that is loaded can run code.
"""

import argparse
import os
import pickle
import re
import threading
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from models import SIZES
from runtime import files
from runtime.errors import UserError


class CheckpointError(UserError):
    """A file that cannot be used; the message is one line that names it and the way out."""


def load(path, mmap=True):
    """The dict in `path` (.pt, or .safetensors for weights alone), on the CPU, with `weights_only=True`: of classes, only
    the argparse.Namespace in the original release's files is let in. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = zipfile.is_zipfile(path)  # older files are bare pickles, which cannot be mapped
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path}: refused, it carries code ({_culprit(error)}); only weights are loaded"
            ) from None
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from None
    except PermissionError:
        raise CheckpointError(f"{path}: no permission to read it") from None
    except Exception:  # a damaged file can make the readers raise almost anything
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(state).__name__}, not a dict")
    return state


def _culprit(error):
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return found.group(1) if found else "an unknown class"


def weights(state, path="the checkpoint"):
    """The state dict to draw samples with: the EMA's where there is one, else the model's, else the dict itself."""
    found = state.get("ema", state.get("model", state))
    if not isinstance(found, dict) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise CheckpointError(f"{path}: not a checkpoint of this project: it holds neither weights nor `ema` or `model`")
    return found


def options(state):
    """The options recorded in a checkpoint, as a dict; empty for bare weights."""
    args = state.get("args", {})
    return dict(vars(args)) if isinstance(args, argparse.Namespace) else dict(args)


def model_config(state, path="the checkpoint"):
    """DiT's keyword arguments, read off the weights' shapes; only what shapes leave open (the heads, whether there is a
    null class) is taken from the recorded options, or from the paper's table. Raises CheckpointError."""
    tensors, recorded = weights(state, path), options(state)
    try:
        hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        tokens = tensors["pos_embed"].shape[1]
        depth = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks."))
        mlp_size = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        rows = tensors["y_embedder.embedding_table.weight"].shape[0]
        out_channels = tensors["final_layer.linear.weight"].shape[0] // patch_size**2
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a DiT: it has no usable {error}") from None
    modulation = tensors.get("blocks.0.adaLN_modulation.1.weight")
    if modulation is not None:
        block = {6: "adaln-zero", 4: "adaln"}.get(modulation.shape[0] // hidden_size)
    else:
        block = "cross-attention" if "blocks.0.cross_attn.q.weight" in tensors else "in-context"
    in_table = [heads for d, width, heads in SIZES.values() if (d, width) == (depth, hidden_size)]
    num_heads = recorded.get("num_heads") or (in_table or [None])[0]
    if num_heads is None:
        raise CheckpointError(f"{path}: a DiT of width {hidden_size} and depth {depth} without a record of its heads")
    dropout = recorded.get("label_dropout", 0.1)
    return {
        "input_size": round(tokens**0.5) * patch_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": mlp_size / hidden_size,
        "class_dropout_prob": dropout,
        "num_classes": rows - 1 if dropout > 0 else recorded["num_classes"],
        "learn_sigma": out_channels == 2 * in_channels,
        "block": block,
    }


def describe(config):
    """The paper's name of a model of these sizes, such as DiT-XL/2, or the sizes themselves."""
    for name, (depth, width, heads) in SIZES.items():
        if (depth, width, heads) == (config["depth"], config["hidden_size"], config["num_heads"]):
            return f"DiT-{name}/{config['patch_size']}"
    return f"a DiT of width {config['hidden_size']}, depth {config['depth']} and patch {config['patch_size']}"


def verify(path):
    """Read every byte of a checkpoint against the CRC-32 that its archive holds of each member, which `torch.load` does
    not do. Raises CheckpointError for a truncated or altered file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a flipped byte in the archive's tables can make zipfile raise almost anything
        raise CheckpointError(f"{path}: truncated or damaged ({str(error) or type(error).__name__})") from None
    if damaged:
        raise CheckpointError(f"{path}: damaged: the checksum of {damaged} does not match")


def save(path, state):
    """Write a checkpoint, complete or not at all. Raises CheckpointError where the disk is full or closed to us."""
    try:
        files.replace_file(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch's archive writer turns a full disk into a RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).split("\n")[0]
        raise CheckpointError(f"{path}: cannot be written ({reason}); earlier checkpoints are untouched") from None


def newest_first(folder):
    """The training checkpoints in a folder, latest step first."""
    found = [path for path in Path(folder).glob("*.pt") if re.fullmatch(r"\d{7,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def load_newest(folder, warn):
    """(path, state) of the latest checkpoint in `folder` that is whole; (None, None) where there are no checkpoints.
    Damaged ones are passed over with a line to warn(). The state is read into memory, so that the file may be pruned.
    Raises CheckpointError where all are damaged: to start over would be to give up the run without a word."""
    found = newest_first(folder)
    for path in found:
        try:
            verify(path)
            return path, load(path, mmap=False)
        except CheckpointError as error:
            warn(f"{error}; trying the one before it")
    if found:
        raise CheckpointError(
            f"{folder}: none of its checkpoints ({len(found)}) is whole; bring one back from a copy, or start over in "
            "another folder"
        )
    return None, None


def set_aside(folder, step, warn):
    """Rename the checkpoints of later steps than `step`, where the run goes on: they are damaged, or of a course that it
    has left (--resume PATH). As `*.pt.aside` they are neither resumed from nor counted when pruning, but not lost."""
    for path in newest_first(folder):
        if int(path.stem) > step:
            aside = path.with_name(f"{path.name}.aside")
            os.replace(path, aside)
            warn(f"Set aside {path.name}, later than step {step}, as {aside}")


def to_host(state):
    """A copy of a nested state in the host's memory, which the next steps cannot change: pinned and asynchronous for
    CUDA tensors; call torch.cuda.synchronize before reading."""
    if isinstance(state, torch.Tensor):
        if state.device.type == "cpu":
            return state.detach().clone()
        copy = torch.empty(state.shape, dtype=state.dtype, pin_memory=state.device.type == "cuda")
        return copy.copy_(state.detach(), non_blocking=state.device.type == "cuda")
    if isinstance(state, dict):
        return {key: to_host(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(to_host(value) for value in state)
    return state


class Writer:
    """Writes checkpoints in the background, at most one at a time, and prunes only once the new one is on the disk.

    keep_last: how many of the latest to keep (0: all). keep_every: also keep those whose step it divides. `error` is what
    went wrong with the write, once it has, until wait() raises it."""

    def __init__(self, folder, keep_last=0, keep_every=0):
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.thread, self.error = None, None

    def save(self, step, state):
        """Copy the state and start writing it. Returns at once after the copy; without memory for one, when it is written.
        An error of the write before is raised."""
        self.wait()
        try:
            state = to_host(state)
        except RuntimeError:  # torch's, of the host's memory
            self._write(step, state, None)
            return self.wait()
        copied = None
        if torch.cuda.is_available():
            copied = torch.cuda.Event()
            copied.record()
        self.thread = threading.Thread(target=self._write, args=(step, state, copied))
        self.thread.start()

    def _write(self, step, state, copied):
        try:
            if copied is not None:
                copied.synchronize()
            save(self.folder / f"{step:07d}.pt", state)
            self._prune()
        except Exception as error:  # carried to the training loop, which raises it in wait()
            self.error = error

    def _prune(self):
        if not self.keep_last:
            return
        for path in newest_first(self.folder)[self.keep_last :]:
            if not self.keep_every or int(path.stem) % self.keep_every:
                path.unlink(missing_ok=True)

    def wait(self):
        """Until the checkpoint in flight, if any, is on the disk. Raises what went wrong with it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
