"""What is watched while training: the sums between two lines of the log, updates that were skipped, signals to stop."""

import collections
import contextlib
import os
import resource
import signal
import sys
import time

import torch


class Progress:
    """Sums since the last line of the log, kept on the device so that no step waits for it."""

    NAMES = ("loss", "mse", "vb", "grad_norm", "steps")

    def __init__(self, device):
        self.device = device
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.restart()

    def restart(self):
        self.sums = torch.zeros(len(self.NAMES), dtype=self.dtype, device=self.device)
        self.steps = self.timed_steps = self.images = 0
        self.start = time.perf_counter()

    def add(self, losses, grad_norm, finite, images):
        """Add one update's losses, (N,) each. Updates that were skipped count in none of the means."""
        row = [losses[name].mean() for name in ("loss", "mse", "vb")] + [grad_norm, torch.ones_like(grad_norm)]
        self.sums += torch.where(finite, torch.stack(row).detach(), 0.0)
        self.steps += 1
        self.timed_steps += 1
        self.images += images

    @contextlib.contextmanager
    def paused(self):
        """Time spent inside does not count in the speed."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def state(self):
        """What an exact continuation of this rank needs."""
        return {"sums": self.sums.tolist(), "steps": self.steps}

    def restore(self, states, context):
        """Take up this rank's sums; on another number of processes every rank takes up the mean of all."""
        states = [states[context.rank]] if len(states) == context.world_size else states
        for state in states:
            self.sums += torch.tensor(state["sums"], dtype=self.dtype, device=self.device) / len(states)
        self.steps = states[0]["steps"]

    def summarise(self, context):
        """Means over the interval and all ranks, with speed and memory; then start anew."""
        gathered = context.all_gather((self.sums.tolist(), self.images))
        *totals, counted = (sum(column) for column in zip(*(sums for sums, _ in gathered), strict=True))
        seconds = time.perf_counter() - self.start
        values = {
            name: total / counted if counted else float("nan") for name, total in zip(self.NAMES, totals, strict=False)
        }
        values["skipped_steps"] = self.steps - round(counted / len(gathered))
        values["steps_per_second"] = self.timed_steps / seconds
        values["images_per_second"] = sum(images for _, images in gathered) / seconds
        values["peak_memory_gib"] = peak_memory(self.device) / 2**30
        self.restart()
        return values


def peak_memory(device):
    """Bytes: the most that was allocated on a GPU, else the most that the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class BadSteps:
    """Counts updates that were skipped because they were not finite, a step or more later, when the device has got there:
    the host never waits. `too_many` says that `limit` came in a row, of which `step` and `batch` are the last."""

    def __init__(self, limit):
        self.limit, self.in_a_row, self.pending = limit, 0, collections.deque()
        self.too_many, self.step, self.batch = False, None, []

    def note(self, step, batch, finite):
        host, arrived = finite, None
        if finite.device.type == "cuda":
            host = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append((step, batch, host, arrived))

    def count(self, say, wait=False):
        while self.pending and not self.too_many:
            step, batch, host, arrived = self.pending[0]
            if arrived is not None and not wait and not arrived.query():
                break
            if arrived is not None:
                arrived.synchronize()
            self.pending.popleft()
            if host.item():
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            self.step, self.batch = step, batch
            say(f"Step {step}: loss or gradient not finite, update skipped ({self.in_a_row} in a row)")
            self.too_many = self.in_a_row >= self.limit


class StopSignals:
    """SIGTERM and SIGUSR1, which schedulers send, and Ctrl-C ask for a stop after the step; a second Ctrl-C stops now (but
    not one that comes at once, since a launcher passes on what the terminal has sent already). So does the end of torchrun,
    which a signal that it does not handle, or a kill, would have leave its workers behind, in sessions of their own."""

    def __init__(self):
        self.by_hand = self._signalled = False
        self.first = None
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, self._handle)

    @property
    def requested(self):
        return self._signalled or self.launcher not in (None, os.getppid())

    def _handle(self, number, frame):
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.by_hand and now - self.first > 1:
                raise KeyboardInterrupt
            self.by_hand, self.first = True, self.first or now
        self._signalled = True
