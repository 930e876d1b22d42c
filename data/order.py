"""The order of the data and the horizontal flips: functions of (seed, epoch, image), whatever the number of processes and
workers. And the DataLoader that reads in this order."""

import signal

import torch
from torch.utils.data import DataLoader, Sampler

from runtime import seeds
from runtime.errors import UserError


def is_mirrored(seed, index, epoch):
    """Whether an image is seen mirrored in this epoch, 0 or 1, each with probability 1/2."""
    return int(seeds.generator(seed, seeds.FLIP, epoch, index).integers(2))


class GlobalOrder(Sampler):
    """Batches of (index, epoch) for one process. The shuffled images of all epochs form one endless sequence. Global batch
    b is its b-th section, of which process r takes every world_size-th image. So any number of processes sees the same
    global batches, and a run can resume anywhere. An epoch may end inside a batch; it holds every image exactly once.

    batch_size: of the global batch. start, stop: positions in that sequence, in images."""

    def __init__(self, num_images, batch_size, seed, rank=0, world_size=1, start=0, stop=None):
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.world_size, self.start, self.stop = rank, world_size, start, stop

    def __len__(self):
        return (self.stop - self.start) // self.batch_size

    def __iter__(self):
        shuffled_epoch, order = None, None
        for first in range(self.start, self.stop - self.batch_size + 1, self.batch_size):
            batch = []
            for position in range(first + self.rank, first + self.batch_size, self.world_size):
                epoch, offset = divmod(position, self.num_images)
                if epoch != shuffled_epoch:
                    order = seeds.generator(self.seed, seeds.DATA_ORDER, epoch).permutation(self.num_images)
                    shuffled_epoch = epoch
                batch.append((int(order[offset]), epoch))
            yield batch


def _start_worker(worker_id):
    # a scheduler's signal reaches the whole process group; the training process decides when the workers end
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)


def _unchanged(batch):
    return batch


def make_loader(dataset, order, num_workers=0, pin_memory=False):
    """A DataLoader of the dataset's batches in the given order, read ahead by worker processes, of which there are none for
    a dataset that is `in_memory`. A dataset with `__getitems__` makes a batch of a list of keys itself."""
    num_workers = 0 if dataset.in_memory else num_workers
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=_unchanged if hasattr(dataset, "__getitems__") else None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        persistent_workers=num_workers > 0,
    )


def next_batch(batches):
    """(batch, None), or (None, what went wrong in one line). An error is not raised yet, because another rank may be
    waiting for this one."""
    try:
        return next(batches), None
    except (UserError, RuntimeError, OSError, EOFError) as error:
        # the frames of the traceback hold the DataLoader's iterator; as long as anything holds the error, its workers would
        # live on, and the interpreter waits for them at exit for ever
        error.__traceback__ = None
        text = str(error).strip()
        if isinstance(error, UserError):  # from a worker, it comes with the worker's traceback around it
            line = str(*error.args).split("UserError: ")[-1].split("\n")[0]
            # open_image does not know of this option, which all commands that read through a loader have
            return None, line.replace("; remove it", "; remove it, or pass --skip-bad-images")
        if isinstance(error, RuntimeError) and "DataLoader worker" not in text and "shared memory" not in text:
            raise
        reason = (text.splitlines() or [type(error).__name__])[-1][:300]
        return None, (
            f"a data worker died: {reason} (if memory was short: lower --num-workers; if /dev/shm is "
            "small, as in Docker, start the container with --ipc=host or a larger --shm-size)"
        )
