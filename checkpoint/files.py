"""The file format of run state. A checkpoint is a dict of tensors and plain values:

    model, ema     state dicts                opt     the optimizer's state
    model_config   DiT's arguments            args    all options of the run
    class_names    list of str                step, images_seen, data    where the run stands in which data

It is written atomically, and every byte is verified before a run resumes from it. Nothing that is loaded can run code.
"""

import argparse
import os
import re
import stat
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from runtime import files
from runtime.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message is one line that names it and the way out."""


def load(path, mmap=True):
    """The dict in `path` (.pt, or .safetensors for weights alone) on the CPU. Of classes, only the argparse.Namespace of
    the original release's files is let in. Raises CheckpointError."""
    path = Path(path)
    check_regular_file(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = zipfile.is_zipfile(path)  # files of older versions of PyTorch are bare pickles, which cannot be mapped
        # leaving safe_globals removes what it was given: a Namespace that the caller has allowed must stay allowed
        extra = {argparse.Namespace}.difference(torch.serialization.get_safe_globals())
        with torch.serialization.safe_globals([*extra]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except PermissionError:
        raise CheckpointError(f"{path}: no permission to read it") from None
    except Exception as error:  # a damaged file can make the readers raise almost anything
        if culprit := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(f"{path}: refused, it carries code ({culprit[1]}); only weights are loaded") from None
        raise CheckpointError(f"{path}: not a checkpoint, or a truncated one") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(state).__name__}, not a dict")
    return state


def check_regular_file(path):
    """Raises CheckpointError unless `path` is a regular file: a FIFO, say, would be waited for."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        what = "no such file" if isinstance(error, FileNotFoundError) else files.reason(error)
        raise CheckpointError(f"{path}: {what}") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a file")


def verify(path):
    """Read every byte of a checkpoint against the CRC-32 that its archive holds of each member, which torch.load does not
    do. Raises CheckpointError for a truncated or altered file."""
    check_regular_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a flipped byte in the archive's tables can make zipfile raise almost anything
        raise CheckpointError(f"{path}: truncated or damaged ({str(error) or type(error).__name__})") from None
    if damaged:
        raise CheckpointError(f"{path}: damaged: the checksum of {damaged} does not match")


def save(path, state):
    """Write a checkpoint atomically. Raises CheckpointError where the disk is full or cannot be written to."""
    try:
        files.replace_file(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch's archive writer turns a full disk into a RuntimeError
        raise CheckpointError(
            f"{path}: cannot be written ({files.reason(error)}); earlier checkpoints are untouched"
        ) from None


def newest_first(folder):
    """The training checkpoints in a folder, latest step first."""
    return [path for path in _numbered(folder) if path.is_file()]


def _numbered(folder):
    """All that is named like a training checkpoint, latest step first."""
    found = [path for path in Path(folder).glob("*.pt") if re.fullmatch(r"\d{7,}", path.stem)]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


def load_newest(folder, warn):
    """(path, state) of the latest checkpoint in `folder` that is not damaged; (None, None) where there are no checkpoints.
    warn(line) is called for each damaged one. The state is read into memory, so that the file may be pruned.
    Raises CheckpointError where all are damaged: starting anew would silently give up the run."""
    found = newest_first(folder)
    for path in found:
        try:
            verify(path)
            return path, load(path, mmap=False)
        except CheckpointError as error:
            warn(f"{error}; trying the one before it")
    if found:
        raise CheckpointError(
            f"{folder}: all of its checkpoints ({len(found)}) are damaged; restore one from a copy, or start anew in "
            "another folder"
        )
    return None, None


def set_aside(folder, step, warn):
    """Rename the checkpoints of later steps than `step`, from which the run continues: they are damaged, or belong to a
    continuation that --resume PATH has abandoned. As `*.pt.aside` they are neither resumed from nor counted when
    pruning."""
    for path in _numbered(folder):  # folders too, which the run could not replace
        if int(path.stem) > step:
            aside = path.with_name(f"{path.name}.aside")
            os.replace(path, aside)
            warn(f"Renamed {path.name}, which is later than step {step}, to {aside.name}")
