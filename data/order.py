"""The order of the data and the horizontal flips: functions of (seed, epoch, image), whatever the number of processes and
workers. And the DataLoader that reads in this order."""

import contextlib
import heapq
import itertools
import multiprocessing.queues
import os
import re
import signal
import sys
import tempfile
import threading
import warnings

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from runtime import seeds
from runtime.errors import UserError

MAX_FOLDER = 75  # characters of TMPDIR: sockets' names have up to 107, of which Python adds 32


def is_flipped(seed, index, epoch):
    """Whether an image is seen flipped in this epoch, 0 or 1, each with probability 1/2."""
    return int(seeds.generator(seed, seeds.FLIP, epoch, index).integers(2))


class GlobalOrder(Sampler):
    """Batches of (index, epoch) for one process. The shuffled images of all epochs form one endless sequence. Global batch
    b is its b-th section, of which process r takes every world_size-th image. So any number of processes sees the same
    global batches, and a run can resume anywhere. An epoch may end inside a batch; it holds every image exactly once.

    With buckets, arrays of images, the images of each form such a sequence of their own. Every global batch is the next
    section of one of them, which take turns in proportion to their numbers of images. So all images are seen equally often.

    batch_size: of the global batch. start, stop: positions in that sequence, in images."""

    def __init__(self, num_images, batch_size, seed, rank=0, world_size=1, start=0, stop=None, buckets=None):
        self.buckets, self.batch_size, self.seed = buckets or [np.arange(num_images)], batch_size, seed
        self.rank, self.world_size, self.start, self.stop = rank, world_size, start, stop

    def __len__(self):
        return (self.stop - self.start) // self.batch_size

    def __iter__(self):
        shuffled = {}  # bucket: (epoch, its images in the order of this epoch)
        for bucket, number in itertools.islice(self._turns(), len(self)):
            images, batch = self.buckets[bucket], []
            first = number * self.batch_size + self.start % self.batch_size
            for position in range(first + self.rank, first + self.batch_size, self.world_size):
                epoch, offset = divmod(position, len(images))
                if bucket not in shuffled or shuffled[bucket][0] != epoch:
                    key = (epoch, bucket) if bucket else (epoch,)
                    order = seeds.generator(self.seed, seeds.DATA_ORDER, *key).permutation(len(images))
                    shuffled[bucket] = epoch, images[order]
                batch.append((int(shuffled[bucket][1][offset]), epoch))
            yield batch

    def _turns(self):
        """(bucket, number of its batch) of each global batch from `start` on, without an end. The turn of batch j of a
        bucket with n images is at the time (j + 1/2) / n."""
        done, sizes = self.start // self.batch_size, [*map(len, self.buckets)]
        # these batches of each bucket are over for certain, so that nothing has to be counted from the beginning of a run
        over = [max(0, done * size // sum(sizes) - len(sizes)) for size in sizes]

        def batches(bucket):
            return (((j + 0.5) / sizes[bucket], bucket, j) for j in itertools.count(over[bucket]))

        turns = heapq.merge(*map(batches, range(len(sizes))))
        return ((bucket, j) for _, bucket, j in itertools.islice(turns, done - sum(over), None))


def order_of(dataset, *arguments):
    """The GlobalOrder of a dataset, with a bucket of each shape that its images have."""
    shape_of = dataset.shape_of
    shapes = () if shape_of is None else np.unique(shape_of)
    return GlobalOrder(len(dataset), *arguments, buckets=[np.flatnonzero(shape_of == shape) for shape in shapes])


def batches_of_one_shape(dataset, indices, size):
    """Lists of up to `size` of the indices, in their order, of images that have one shape."""
    groups = {}
    for index in indices:
        groups.setdefault(0 if dataset.shape_of is None else dataset.shape_of[index], []).append(index)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def _start_worker(worker_id):
    # a scheduler's signal reaches the whole process group; the training process decides when the workers end
    for name in {"SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"}.intersection(dir(signal)):  # Windows has two of them
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    # called by the thread that hands over files, where the training process, which tells what is wrong, has none left
    sys.excepthook = lambda *error: None
    # a thread hands over the batches; without the one that it could not hand over, the training process would wait for ever
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)


def _end_worker(error, batch):
    print(f"data worker: a batch cannot be handed over ({error})", file=sys.stderr, flush=True)
    os._exit(1)


@contextlib.contextmanager
def _without_ctrl_c():
    """Handle Ctrl-C after the block in which processes are forked: Python drops what is raised by the hooks of a fork."""
    handler, pressed = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    signal.signal(signal.SIGINT, lambda *details: pressed.append(details))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if pressed:
        handler(*pressed[0])


def make_loader(dataset, order, num_workers=0, pin_memory=False):
    """Yield a dataset's batches in the given order, read ahead by worker processes, of which there are none for a dataset
    that is `in_memory`. They start with the first batch, so that `next_batch` reports what goes wrong with that. A dataset
    with `__getitems__` makes a batch of a list of keys itself."""
    num_workers, folder = 0 if dataset.in_memory else num_workers, tempfile.gettempdir()
    if num_workers and len(os.fsencode(folder)) > MAX_FOLDER:
        way_out = f"set it to a folder of up to {MAX_FOLDER} characters, or pass --num-workers 0"
        raise UserError(f"TMPDIR {folder}", "too long for the sockets of data workers", way_out)
    # what `__getitems__` returns is the batch, a dict already
    collate, others = dict if hasattr(dataset, "__getitems__") else None, set(multiprocessing.active_children())
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "worker_init_fn": _start_worker}
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores: as the user asked for
    batches = DataLoader(dataset, batch_sampler=order, collate_fn=collate, **options)
    try:
        with _without_ctrl_c():
            batches = iter(batches)
        # PyTorch would raise a worker's death anywhere, in the middle of an update too; next_batch notices it by itself
        if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()  # now: the traceback of an error would keep them alive
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()  # they ignore SIGTERM


ADVICE = {  # by what the system or PyTorch says
    "too many open files|ancdata": "raise the limit with ulimit -n, or lower --num-workers",
    "af_unix": "set TMPDIR to a shorter path, or pass --num-workers 0",
    "": "if memory was short: lower --num-workers; if /dev/shm is small, as in Docker, start the container with --ipc=host "
    "or a larger --shm-size; if too many files were open: raise the limit with ulimit -n, or lower --num-workers",
}


def next_batch(batches):
    """(batch, None), or (None, what went wrong in one line): not raised yet, because another rank may wait for this one."""
    try:
        return next(batches), None
    except (UserError, RuntimeError, OSError, EOFError) as error:
        error.__traceback__ = None  # its frames hold the DataLoader
        text = (str(error.args[0]) if len(error.args) == 1 else str(error)).strip()
        if isinstance(error, UserError):  # from a worker, it comes with the worker's traceback around it
            line = text.split(f"{type(error).__name__}: ")[-1].split("\n")[0]
            # open_image does not know of this option, which all commands that read through a loader have
            return None, line.replace("; remove it", "; remove it, or pass --skip-bad-images")
        reason = (text.splitlines() or [type(error).__name__])[-1].split(". ")[0][:300]
        advice = next(advice for words, advice in ADVICE.items() if re.search(words, text.lower()))
        return None, f"a data worker died: {reason} ({advice})"
