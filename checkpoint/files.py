"""The file format of run state. A checkpoint is a dict of tensors and plain values:

    model, ema     state dicts                opt     the optimizer's state
    model_config   DiT's arguments            args    all options of the run
    class_names    list of str                step, images_seen, data    where the run stands in which data

It is written atomically, and every byte is verified before it is used. Nothing that is loaded can run code."""

import argparse
import errno
import json
import os
import re
import stat
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from runtime import files
from runtime.errors import RunError, UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message is one line that names it and the way out."""


class UnreadableError(RunError):
    """A checkpoint that the system cannot read now. It may be undamaged, so that no other may take its place."""


def load(path, mmap=True, verify=True):
    """The dict in `path` (.pt, or .safetensors for weights alone) on the CPU. Of classes, only the argparse.Namespace of
    the original release's files is let in. mmap: map tensors where that is possible. verify: compare every byte with the
    file's checksums first. Raises CheckpointError for one missing, damaged or other, UnreadableError if reading fails."""
    path = Path(path)
    check_regular_file(path)
    try:
        # bare pickles of older versions of PyTorch have no checksums and cannot be mapped; .safetensors have one of our own
        zipped = path.suffix != ".safetensors" and zipfile.is_zipfile(path)
        if zipped and verify:
            _check_bytes(path)
        state = _read(path, mmap and zipped)
        if path.suffix == ".safetensors" and verify and header(path).get("crc32") not in (None, checksum_of(state)):
            raise CheckpointError(f"{path}: damaged: the checksum of its weights does not match")
    except UserError:
        raise
    except Exception as error:  # a damaged file can make the readers raise almost anything
        if culprit := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(f"{path}: refused, it carries code ({culprit[1]}); only weights are loaded") from None
        raise _explain(path, error, "not a checkpoint, or a truncated one") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not a checkpoint: it holds a {type(state).__name__}, not a dict")
    return state


def _read(path, mmap):
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except Exception:  # perhaps of the mapping: some file systems have none
            return safetensors.torch.load(path.read_bytes())
    # leaving safe_globals removes what it was given: a Namespace that the caller has allowed must stay allowed
    extra = {argparse.Namespace}.difference(torch.serialization.get_safe_globals())
    with torch.serialization.safe_globals([*extra]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
        return torch.load(path, map_location="cpu", weights_only=True)


def _explain(path, error, otherwise):
    """The error to raise where reading has failed: only what the file's bytes say is damage."""
    found = files.of_system(error)
    if "allocate memory" in str(error) or isinstance(error, MemoryError):
        found = "out of memory"
    elif found is None or found.errno in (None, errno.EINVAL):  # EINVAL: of a damaged offset
        try:  # PyTorch's and zipfile's readers hide the system's reason
            files.checksum(path)
            return CheckpointError(f"{path}: {otherwise}")
        except OSError as error_of_system:
            found = error_of_system
    why = files.reason(found)
    return UnreadableError(path, f"cannot be read ({why})", "nothing was changed; run again when it can be read")


def header(path):
    """The metadata of a .safetensors file, {name: text}."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__") or {}


def checksum_of(tensors):
    """CRC-32 of the names and values of {name: tensor}, as eight hexadecimal digits."""
    return files.checksum_of_arrays({name: x.reshape(-1).view(torch.uint8).numpy() for name, x in tensors.items()})


def check_regular_file(path):
    """Raises CheckpointError unless `path` is a regular file: a FIFO, say, would be waited for."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise CheckpointError(f"{path}: {files.reason(error)}") from None
        raise _explain(path, error, "not readable") from None
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: not a file")


def verify(path):
    """Read every byte of a checkpoint against the CRC-32 that its archive holds of each member, which torch.load does not
    do. Raises CheckpointError for a truncated or altered file, UnreadableError where the system fails to read it."""
    check_regular_file(path)
    _check_bytes(path)


def _check_bytes(path):
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a flipped byte in the archive's tables can make zipfile raise almost anything
        raise _explain(path, error, f"truncated or damaged ({str(error) or type(error).__name__})") from None
    if damaged:
        raise CheckpointError(f"{path}: damaged: the checksum of {damaged} does not match")


def save(path, state):
    """Write a checkpoint atomically. Raises RunError where the disk is full or cannot be written to."""
    with files.write_errors(path, "; earlier checkpoints are untouched"):
        files.replace_file(path, lambda file: torch.save(state, file))


def newest_first(folder, folders=False):
    """The training checkpoints in a folder, latest step first. folders: with what is named like one and is no file. Raises
    UnreadableError where the folder cannot be listed: it would look like an empty one."""
    try:
        found = [Path(folder, name) for name in os.listdir(folder) if re.fullmatch(r"\d{7,}\.pt", name)]
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CheckpointError(folder, "is a file, where the run has its folder of checkpoints", "move it away") from None
    except OSError as error:
        raise _explain(folder, error, "not readable") from None
    return sorted((path for path in found if folders or path.is_file()), key=lambda path: int(path.stem), reverse=True)


def load_newest(folder, warn):
    """(path, state) of the latest checkpoint in `folder` that is not damaged; (None, None) where there are no checkpoints.
    warn(line) is called for each damaged one. The state is read into memory, so that the file may be pruned. Raises
    CheckpointError where all are damaged: starting anew would give up the run; UnreadableError where one cannot be read."""
    found = newest_first(folder)
    for path in found:
        try:
            verify(path)
            return path, load(path, mmap=False, verify=False)
        except CheckpointError as error:
            warn(f"{error}; trying the one before it")
    if found:
        problem = f"all of its checkpoints ({len(found)}) are damaged"
        raise CheckpointError(folder, problem, "restore one from a copy, or start anew in another folder")
    return None, None


def set_aside(folder, step, warn):
    """Rename the checkpoints of later steps than `step`, from which the run continues: they are damaged, or belong to a
    continuation that --resume PATH has abandoned. As `*.pt.aside` they are not resumed from, nor counted when pruning."""
    for path in newest_first(folder, folders=True):  # which the run could not replace
        if int(path.stem) > step:
            aside = path.with_name(f"{path.name}.aside")
            os.replace(path, aside)
            warn(f"Renamed {path.name}, which is later than step {step}, to {aside.name}")
