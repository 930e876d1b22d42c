"""Images for training: folders of them, or the handwritten digits that ship with scikit-learn; the training crop; and the
order of the data, which is a function of (seed, epoch) alone, whatever the number of processes and workers."""

import itertools
import signal
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import ImageFolder

from runtime import seeds
from runtime.errors import UserError


class DataError(UserError):
    """Images that cannot be used; the message is one line that names the file or folder and the way out."""


def open_image(path):
    """The file as an upright 8-bit RGB picture: grey, 16-bit, palette, CMYK, transparent and EXIF-rotated files alike.
    Raises DataError naming the file where it cannot be read whole."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")  # about metadata and palettes, which are dealt with here
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would cut off at 255 instead of scaling
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if image.mode in ("P", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")  # resolves a palette's transparency, which is then dropped
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: the file is gone") from None
    except Exception as error:  # PIL raises a dozen kinds for damaged files, struct.error and SyntaxError among them
        reason = str(error).replace(str(path), "it").split("\n")[0] or type(error).__name__
        raise DataError(f"{path}: not a readable image ({reason}); remove it, or pass --skip-bad-images") from None


def center_crop_arr(image, size):
    """The training crop of a PIL image, (size, size): halved by box averages while the shorter side is at least twice the
    size (which keeps fine detail from aliasing), then bicubic so that the shorter side is the size, then the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), resample=Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def mirrored(seed, index, epoch):
    """Whether an image is seen mirrored in this epoch, 0 or 1: a fair coin."""
    return int(seeds.generator(seed, seeds.FLIP, epoch, index).integers(2))


class Images(Dataset):
    """An image folder, one folder a class. Item (index, epoch) is a dict of `image` (C, H, W) uint8, `label` and `index`;
    whether it is mirrored depends on (seed, epoch, index). channels: of a pixel-space model. With skip_bad an unreadable
    image is replaced by the next readable one, and reported in `replaced`; otherwise it raises DataError."""

    channels = 3

    def __init__(self, folder, image_size, seed=0, flip=True, skip_bad=False):
        self.image_size, self.seed, self.flip, self.skip_bad = image_size, seed, flip, skip_bad
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"--data-path {folder}: no such folder")
        if not any(entry.is_dir() for entry in root.iterdir()):
            raise DataError(f"--data-path {folder}: holds no folders; put each class's images into a folder of its own")
        try:
            found = ImageFolder(root, allow_empty=True)
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"--data-path {folder}: {error}") from None
        if not found.samples:
            raise DataError(f"--data-path {folder}: no images in any of its {len(found.classes)} folders")
        self.samples, self.classes = found.samples, found.classes

    def __len__(self):
        return len(self.samples)

    def name(self, index):
        return self.samples[index][0]

    def fingerprint(self):
        """What identifies the data on resuming: the files' relative names and labels, in order."""
        return [f"{Path(path).parent.name}/{Path(path).name} {label}" for path, label in self.samples]

    def __getitem__(self, key):
        index, epoch = key
        image, replaced = None, ""
        for source in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = open_image(self.samples[source][0])
                break
            except DataError as error:
                if not self.skip_bad:
                    raise
                replaced = str(error)
        if image is None:
            raise DataError("none of the images can be read")
        image = np.asarray(center_crop_arr(image, self.image_size)).transpose(2, 0, 1)
        return self.item(image, self.samples[source][1], index, epoch, replaced)

    def item(self, image, label, index, epoch, replaced=""):
        if self.flip and mirrored(self.seed, index, epoch):
            image = image[:, :, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(image))
        return {"image": image, "label": label, "index": index, "replaced": replaced}


class Digits(Images):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, ten classes, never mirrored."""

    channels = 1

    def __init__(self, image_size):
        from sklearn.datasets import load_digits  # takes a second to import

        if image_size != 8:
            raise DataError(f"--image-size {image_size}: the digits are 8x8 pixels; pass --image-size 8")
        data = load_digits()
        self.images = np.round(data.images[:, None] * (255 / 16)).astype(np.uint8)  # 0..16 -> 0..255
        self.labels, self.classes, self.flip = data.target, [str(digit) for digit in range(10)], False

    def __len__(self):
        return len(self.images)

    def name(self, index):
        return f"digits[{index}]"

    def fingerprint(self):
        return ["digits"]

    def __getitem__(self, key):
        index, epoch = key
        return self.item(self.images[index], int(self.labels[index]), index, epoch)


def load(data_path, image_size, seed=0, flip=True, skip_bad=False):
    """The dataset that --data-path names: a folder, or "digits". Raises DataError."""
    if data_path == "digits":
        return Digits(image_size)
    return Images(data_path, image_size, seed, flip, skip_bad)


class GlobalOrder(Sampler):
    """Batches of (index, epoch) for one process. The epochs' shuffled images form one endless row, of which global batch b
    is the b-th stretch and process r takes every world_size-th, so that any number of processes sees the same batches and
    a run can go on anywhere. An epoch's end falls inside a batch; no image is left out or seen twice in an epoch.

    start, stop: positions in that row, in images."""

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
                epoch, place = divmod(position, self.num_images)
                if epoch != shuffled_epoch:
                    order = seeds.generator(self.seed, seeds.DATA_ORDER, epoch).permutation(self.num_images)
                    shuffled_epoch = epoch
                batch.append((int(order[place]), epoch))
            yield batch


def _worker_init(worker_id):
    # a scheduler's signal reaches the whole process group; the training process decides when the workers end
    for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)
    torch.set_num_threads(1)


def _as_it_is(batch):
    return batch


def loader(dataset, order, num_workers=0, pin_memory=False):
    """Batches of dataset in the given order, read ahead by worker processes (none for data in memory). A dataset with
    `__getitems__` makes the batch of a list of keys itself."""
    if isinstance(dataset, Digits):
        num_workers = 0
    return DataLoader(
        dataset,
        batch_sampler=order,
        collate_fn=_as_it_is if hasattr(dataset, "__getitems__") else None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_worker_init,
        persistent_workers=num_workers > 0,
    )


def next_batch(batches):
    """(batch, None), or (None, what went wrong in one line): another rank may be waiting, so an error is not raised yet."""
    try:
        return next(batches), None
    except (DataError, RuntimeError, OSError, EOFError) as error:
        # the frames of the traceback hold the DataLoader's iterator; as long as anything holds the error, its workers would
        # live on, and the interpreter waits for them at exit for ever
        error.__traceback__ = None
        text = str(error).strip()
        if isinstance(error, DataError):  # from a worker, it comes with the worker's traceback around it
            return None, text.split("DataError: ")[-1].split("\n")[0]
        if isinstance(error, RuntimeError) and "DataLoader worker" not in text and "shared memory" not in text:
            raise
        reason = " ".join(text.split())[:300]
        return None, (
            f"a data worker died: {reason} (if memory was short: lower --num-workers; if /dev/shm is small, as in Docker, "
            "start the container with --ipc=host or a larger --shm-size)"
        )


def to_model_range(images):
    """uint8 (N, C, H, W) -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
