"""Means, speed and memory between two lines of the log."""

import contextlib
import sys
import time

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


class Meter:
    """Sums since the last line of the log, kept on the device so that no step waits for it.

    bad_in_a_row: number of the latest updates that were not finite, on the device. seconds: of training alone, so far."""

    def __init__(self, device, seconds=0.0, bad_in_a_row=0):
        self.device, self.seconds, self.names = device, seconds, ()
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.bad_in_a_row = torch.tensor(bad_in_a_row, device=device)
        self._restart()

    def _restart(self):
        self.sums = torch.zeros(1, dtype=self.dtype, device=self.device)  # takes the shape of what is added
        self.steps = self.images = 0
        self.start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def add(self, losses, grad_norm, finite, num_images):
        """Add one update's losses, (N,) each, by their names. Skipped updates count in none of the means."""
        self.names = (*losses, "grad_norm")
        row = [values.mean() for values in losses.values()] + [grad_norm, torch.ones_like(grad_norm)]
        self.sums = self.sums + torch.where(finite, torch.stack(row).detach(), 0.0)
        self.bad_in_a_row = torch.where(finite, 0, self.bad_in_a_row + 1)
        self.steps += 1
        self.images += num_images

    @contextlib.contextmanager
    def paused(self):
        """Time spent inside does not count as training time."""
        start = time.perf_counter()
        yield
        self.start += time.perf_counter() - start

    def training_seconds(self):
        return self.seconds + time.perf_counter() - self.start

    def summarise(self, context):
        """Means over the interval and all ranks, with speed and memory; then start anew."""
        gathered = context.all_gather((self.sums.tolist(), self.images))
        *totals, counted = (sum(column) for column in zip(*(sums for sums, _ in gathered), strict=True))
        seconds = time.perf_counter() - self.start
        self.seconds += seconds
        values = {n: total / counted if counted else float("nan") for n, total in zip(self.names, totals, strict=True)}
        values["skipped_steps"] = self.steps - round(counted / len(gathered))
        values["steps_per_second"] = self.steps / seconds
        values["images_per_second"] = sum(images for _, images in gathered) / seconds
        values["peak_memory_gib"] = peak_memory(self.device) / 2**30
        values["training_seconds"] = round(self.seconds, 2)
        self._restart()
        return values


def peak_memory(device):
    """Bytes: the most allocated on a GPU since the last line of the log, else the most that the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
