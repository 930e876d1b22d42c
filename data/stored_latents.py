"""A folder of latents: what the encoder makes of each image of an image folder, computed once by extract_latents.py.

index.json        what must agree later, and the checksums; written last: without it the folder is unfinished
images.json       the images' relative names and their labels
shard-00000.npy   numpy array (n, M, 2, C, h, w), float16 or float32: n images in the image folder's order; M = 2, the image
                  and its mirror, or 1; mean and standard deviation of the posterior, raw, neither scaled nor shifted
shard-00000.json  the shard's record: count, CRC-32, rounding error, replaced images
options.json      what the extraction was begun with
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data import autoencoder as latents
from data import images as data
from runtime import files
from runtime.errors import UserError

VERSION = 1
AGAIN = "run the same extract_latents.py command again"


def shard_path(folder, number, suffix=".npy"):
    return Path(folder) / f"shard-{number:05d}{suffix}"


def shard_shape(record, number):
    """(n, M, 2, C, h, w) of a shard, of the images and sizes in the folder's record."""
    count = min(record["shard_size"], record["images"] - number * record["shard_size"])
    cells = record["image_size"] // record["factor"]
    return (count, 1 + record["mirrors"], 2, record["channels"], cells, cells)


def num_shards(record):
    return -(-record["images"] // record["shard_size"])


def write_shard(folder, number, moments, squared_errors=(0.0, 0.0), replaced=()):
    """Write a shard's array and then its record. squared_errors: the sums over its values that `errors` is made of."""
    path = shard_path(folder, number)
    files.replace_file(path, lambda file: np.save(file, moments))
    record = {"count": len(moments), "crc32": files.checksum(path)}
    record |= {"squared_errors": list(squared_errors), "replaced": list(replaced)}
    files.write_json(shard_path(folder, number, ".json"), record)


def open_shard(folder, number, record):
    """The shard's array, mapped, not read. Raises UserError where it is not there or not of its size."""
    path = shard_path(folder, number)
    try:
        moments = np.load(path, mmap_mode="r")  # raises ValueError where the file is shorter than its header says
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None)  # the system's, such as that there is no such file
        reason = f"cannot be read ({reason})" if reason else "truncated or damaged"
        raise data.DataError(f"{path}: {reason}; {AGAIN}") from None
    size = moments.offset + moments.nbytes
    if moments.shape != shard_shape(record, number) or moments.dtype != record["dtype"] or path.stat().st_size != size:
        raise data.DataError(f"{path}: not of the size that index.json tells; {AGAIN}")
    return moments


def is_whole(folder, number, record):
    """Whether a shard and its record are there and agree; reads all of it."""
    try:
        open_shard(folder, number, record)
    except data.DataError:
        return False
    told = files.read_json(shard_path(folder, number, ".json"))
    return isinstance(told, dict) and told.get("crc32") == files.checksum(shard_path(folder, number))


def errors(record, shards):
    """What rounding to the stored dtype did, root mean square over all values: that of the mean, in units of the scaled
    latents (whose variance is about 1), and that of the standard deviation as a share of it."""
    values = sum(np.prod(shard_shape(record, number), dtype=float) for number in range(len(shards))) / 2
    mean, std = (np.sqrt(sum(shard["squared_errors"][i] for shard in shards) / values) for i in (0, 1))
    return {"mean_rms": float(mean * record["scaling"]), "std_relative_rms": float(std)}


def finish(folder, record, names, labels):
    """Make a folder of whole shards complete: write images.json and, last, index.json. A replaced image has the label of
    the one in its place. Returns (the index, whether anything had to be written)."""
    shards = [files.read_json(shard_path(folder, number, ".json")) for number in range(num_shards(record))]
    replaced = [line for shard in shards for line in shard["replaced"]]
    for line in replaced:
        labels[line["index"]] = line["label"]
    images = json.dumps({"names": names, "labels": labels}).encode()
    index = {**record, "replaced": len(replaced), "images_json_crc32": f"{zlib.crc32(images):08x}"}
    index["shards"] = [{"count": shard["count"], "crc32": shard["crc32"]} for shard in shards]
    index["rounding"] = errors(record, shards)
    stale = _damaged_images(folder, index) or files.read_json(Path(folder) / "index.json") != index
    if stale:
        files.replace_file(Path(folder) / "images.json", lambda file: file.write(images))
        files.write_json(Path(folder) / "index.json", index)
    return index, stale


def _damaged_images(folder, index):
    path = Path(folder) / "images.json"
    return not path.is_file() or files.checksum(path) != index["images_json_crc32"]


def recognised(folder):
    """Whether it is a folder of latents, finished or not."""
    records = (files.read_json(Path(folder) / name) for name in ("index.json", "options.json"))
    return any(isinstance(record, dict) and "encoder_crc32" in record for record in records)


class Latents(Dataset):
    """Stored latents, read as `data.Images` is. The batch of keys (index, epoch) is a dict of `moments` (N, 2, C, h, w) as
    stored, `label`, `index` and `replaced`; the same (seed, epoch, index) as there are mirrored. Raises DataError for a
    folder that is not whole as far as sizes tell; bytes are checked by extract_latents.py, given again."""

    channels = 3  # of the images

    def __init__(self, folder, seed=0, flip=True):
        self.folder, self.seed, self.flip, self.shards = Path(folder), seed, flip, {}
        path = self.folder / "index.json"
        if not self.folder.is_dir():
            raise data.DataError(f"--data-path {folder}: no such folder")
        if not path.exists():
            raise data.DataError(f"--data-path {folder}: unfinished latents, there is no index.json yet; {AGAIN}")
        self.record = record = files.read_json(path)
        if not isinstance(record, dict) or "version" not in record:
            raise data.DataError(f"{path}: damaged; {AGAIN}")
        if record["version"] != VERSION:
            raise data.DataError(f"{path}: of format {record['version']}, known is {VERSION}; extract the latents again")
        if flip and not record["mirrors"]:
            raise data.DataError(
                f"--flip: {folder} holds no mirrored latents; pass --no-flip, or extract them again, with --flip"
            )
        if _damaged_images(folder, record):
            raise data.DataError(f"{self.folder / 'images.json'}: missing or damaged; {AGAIN}")
        for number in range(num_shards(record)):
            open_shard(folder, number, record)
        images = files.read_json(self.folder / "images.json")
        self.classes, self.names, self.labels = record["classes"], images["names"], np.array(images["labels"], np.int64)

    def __len__(self):
        return len(self.names)

    def __getstate__(self):  # for workers that are not forked: a pickled map would be the whole file
        return {**self.__dict__, "shards": {}}

    def name(self, index):
        return self.names[index]

    def fingerprint(self):
        return ["latents", self.record["images_json_crc32"], *(shard["crc32"] for shard in self.record["shards"])]

    def check(self, image_size, skip_bad):
        """Refuse options that ask for what is not stored."""
        if image_size != self.record["image_size"]:
            raise UserError(
                f"--image-size {image_size}: {self.folder} holds latents of {self.record['image_size']} pixels; "
                f"pass --image-size {self.record['image_size']}, or extract others"
            )
        if skip_bad:
            raise UserError(f"--skip-bad-images: {self.folder} holds latents, and no images to skip; leave the option out")

    def space(self, vae, decodes=False):
        """The latents' space, without an autoencoder where it need not decode. vae: what --vae names, which has to be the
        recorded one or to have the same encoder. Raises UserError."""
        recorded = self.record["vae"]
        if latents.RELEASED.get(vae, vae) == latents.RELEASED.get(recorded, recorded):
            if not decodes and not Path(vae).is_dir():  # a folder's contents may have changed, and are read in a second
                return latents.Stored(self.record)
            space = latents.load(vae).place("cpu")
        else:
            try:
                space = latents.load(vae).place("cpu")
            except UserError:  # the way out is another one than for images
                space = None
        known = isinstance(space, latents.Autoencoder) and description(space)
        if not known or any(self.record[name] != value for name, value in known.items()):
            raise UserError(
                f"--vae {vae}: {self.folder} holds latents of {recorded}, and this is not that autoencoder, nor one with "
                f"its encoder; pass --vae {recorded}, or extract others"
            )
        return space if decodes else latents.Stored(self.record)

    def __getitem__(self, key):
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys):
        """One batch, gathered in one go: 10,000 latents a second leave no time for a tensor each."""
        moments = np.empty((len(keys), *shard_shape(self.record, 0)[2:]), self.record["dtype"])
        for row, (index, epoch) in zip(moments, keys, strict=True):
            number, place = divmod(index, self.record["shard_size"])
            if number not in self.shards:  # opened here: by each data worker for itself
                self.shards[number] = np.asarray(open_shard(self.folder, number, self.record))
            row[:] = self.shards[number][place, int(self.flip and data.mirrored(self.seed, index, epoch))]
        index = np.array([index for index, _ in keys])
        batch = {"moments": moments, "label": self.labels[index], "index": index}
        return {**{name: torch.from_numpy(array) for name, array in batch.items()}, "replaced": [""] * len(keys)}


def description(space):
    """What must agree between stored latents and an autoencoder, whose weights are there."""
    return {
        "encoder_crc32": space.encoder_checksum(),
        "scaling": space.scaling,
        "shift": space.shift,
        "channels": space.channels,
        "factor": space.factor,
    }
