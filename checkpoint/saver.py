"""Checkpoints written in the background, while training continues."""

import threading
from pathlib import Path

import torch

from checkpoint import files


def copy_to_host(tensor):
    """A copy in the host's memory, which later steps cannot change. Copies of CUDA tensors are pinned and asynchronous:
    wait for the device before reading them."""
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    on_gpu = tensor.device.type == "cuda"
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu).copy_(tensor.detach(), non_blocking=on_gpu)


def map_tensors(function, state):
    """function(tensor) in place of each tensor of a nested state."""
    if isinstance(state, torch.Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: map_tensors(function, value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map_tensors(function, value) for value in state)
    return state


class BackgroundSaver:
    """Writes checkpoints in a thread, one at a time, and prunes old ones once the new one is on the disk.

    keep_last: how many of the latest to keep; 0 keeps all. keep_every: also keep those whose step is a multiple of it.
    error: what went wrong with the last write, until wait() raises it."""

    def __init__(self, folder, keep_last=0, keep_every=0):
        self.folder, self.keep_last, self.keep_every = Path(folder), keep_last, keep_every
        self.thread, self.error = None, None

    def save(self, step, state, is_copy=False):
        """Copy the state, unless it is a copy that `copy_to_host` has made, and start writing it. Returns after the copy;
        where the host has no memory for a copy, after the write. Raises the error of the previous write."""
        self.wait()
        try:
            state = state if is_copy else map_tensors(copy_to_host, state)
        except RuntimeError:  # what torch raises when the host is out of memory
            self._write(step, state, None)
            return self.wait()
        # asking for the stream would make a CUDA context, also in a run with --device cpu
        copied = torch.cuda.current_stream().record_event() if torch.cuda.is_initialized() else None
        self.thread = threading.Thread(target=self._write, args=(step, state, copied))
        self.thread.start()

    def _write(self, step, state, copied):
        try:
            if copied is not None:
                copied.synchronize()
            files.save(self.folder / f"{step:07d}.pt", state)
            self._prune()
        except Exception as error:  # raised in the training loop, by wait()
            self.error = error

    def _prune(self):
        if not self.keep_last:
            return
        for path in files.newest_first(self.folder)[self.keep_last :]:
            if not self.keep_every or int(path.stem) % self.keep_every:
                path.unlink(missing_ok=True)

    def wait(self):
        """Wait until the checkpoint that is being written is on the disk. Raises what went wrong with it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error
