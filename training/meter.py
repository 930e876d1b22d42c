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

    bad_in_a_row: how many of the latest updates were not finite, a tensor on the device. seconds: training time so far,
    evaluations excluded."""

    NAMES = ("loss", "mse", "vb", "grad_norm", "steps")

    def __init__(self, device, seconds=0.0):
        self.device, self.seconds = device, seconds
        self.absent = set()  # names of losses that the objective does not have
        self.dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.bad_in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._restart()

    def _restart(self):
        self.sums = torch.zeros(len(self.NAMES), dtype=self.dtype, device=self.device)
        self.steps = self.images = 0
        self.start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def add(self, losses, grad_norm, finite, num_images):
        """Add one update's losses, (N,) each. Skipped updates count in none of the means."""
        self.absent = {name for name in ("loss", "mse", "vb") if name not in losses}
        row = [losses[name].mean() if name in losses else torch.zeros_like(grad_norm) for name in ("loss", "mse", "vb")]
        row += [grad_norm, torch.ones_like(grad_norm)]
        self.sums += torch.where(finite, torch.stack(row).detach(), 0.0)
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
        values = {
            name: total / counted if counted else float("nan")
            for name, total in zip(self.NAMES, totals, strict=False)
            if name not in self.absent
        }
        values["skipped_steps"] = self.steps - round(counted / len(gathered))
        values["steps_per_second"] = self.steps / seconds
        values["images_per_second"] = sum(images for _, images in gathered) / seconds
        values["peak_memory_gib"] = peak_memory(self.device) / 2**30
        values["training_seconds"] = round(self.seconds, 2)
        self._restart()
        return values


def peak_memory(device):
    """Bytes: the most that was allocated on a GPU since the last line of the log, else the most that the process has
    held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
