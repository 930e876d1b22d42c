"""A folder of latents: what the encoder makes of each image of an image folder, computed once by extract_latents.py. With
--text-encoder it holds the tokens of the images' texts too.

index.json        what must agree later, and the checksums; written last: without it the folder is unfinished
images.json       the images' relative names and their labels; with texts, also each image's texts, and for each shard the
                  numbers of tokens of its texts
shard-00000.npy   numpy array (n, M, 2, C, h, w), float16 or float32: n images in the image folder's order; M = 2, the image
                  and its mirror, or 1; mean and standard deviation of the posterior, raw, neither scaled nor shifted
texts-00000.npy   numpy array (tokens, W) of the same dtype: the tokens, without padding, of all texts of the images, one
                  text after the other, and of the empty text last
shard-00000.json  the shard's record: count, CRC-32, rounding error, replaced images; numbers of tokens
options.json      the settings that the extraction was begun with
"""

import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from data.autoencoder import RELEASED, Autoencoder, StoredSpace, load_space
from data.captions import Captions, is_text
from data.class_names import readable_names
from data.config import MAX_BATCH, MAX_SHARD, MAX_SIDE
from data.listing import Names, printable
from data.order import is_mirrored
from data.text_encoder import StoredTexts, load_text_encoder, pad
from runtime import files
from runtime.config import Config, differences, option
from runtime.errors import UserError

VERSION = 1
AGAIN = "run the same extract_latents.py command again"


@dataclass(frozen=True)
class Settings(Config):
    """What a folder of latents is made with and of: options.json, and the first part of index.json."""

    version: int = option()
    vae: str = option()
    encoder_crc32: str = option()
    scaling: float = option(above=0)
    shift: float = option()
    channels: int = option(low=1, high=1024)
    factor: int = option(low=1, high=1024)
    image_size: int = option(low=1, high=MAX_SIDE)
    dtype: str = option(choices=("float16", "float32"))
    mirrors: bool = option()
    batch_size: int = option(low=1, high=MAX_BATCH)
    shard_size: int = option(low=1, high=MAX_SHARD)
    tf32: bool = option()
    images: int = option(low=1, high=10**10)
    names_crc32: str = option()
    classes: tuple[str, ...] = option()
    text_encoder: str | None = None
    text_crc32: str | None = None  # of the encoder
    captions_crc32: str | None = None
    text_width: int | None = option(None, low=1, high=MAX_SIDE)
    text_length: int | None = option(None, low=1, high=MAX_SIDE)

    def record(self):
        """What is written: without texts, the same as before there were any."""
        return {name: value for name, value in self.flat().items() if value is not None}

    @property
    def num_shards(self):
        return -(-self.images // self.shard_size)

    def shard_shape(self, number):
        """(n, M, 2, C, h, w) of a shard."""
        count = min(self.shard_size, self.images - number * self.shard_size)
        cells = self.image_size // self.factor
        return (count, 1 + self.mirrors, 2, self.channels, cells, cells)


@dataclass(frozen=True)
class ShardRecord(Config):
    """shard-*.json. squared_errors: the sums over the shard's values that rounding_errors() needs. replaced: for each image
    that could not be read its index, the label of the one in its place, and why; with texts, also that one's index, the
    `source`. text_lengths: numbers of tokens."""

    count: int = option(low=1)
    crc32: str = option()
    squared_errors: tuple[float, float] = option(low=0)
    replaced: list = option()  # noqa: RUF009 -- option() makes a field, no list
    text_crc32: str | None = None
    text_lengths: tuple[int, ...] | None = option(None, low=1)

    def check(self):
        for image in self.replaced:
            if not isinstance(image, dict) or any(type(image.get(name)) is not int for name in ("index", "label")):
                raise UserError("--replaced: an entry lacks the index or the label")


@dataclass(frozen=True, kw_only=True)
class Index(Settings):
    """index.json. shards: a dict for each, with its checksum."""

    replaced: int = option(low=0)
    images_json_crc32: str = option()
    shards: tuple[dict, ...] = option()

    def check(self):
        checksums = [shard.get("crc32") for shard in self.shards]
        if len(checksums) != self.num_shards or not all(re.fullmatch("[0-9a-f]{8}", str(crc32)) for crc32 in checksums):
            raise UserError("--shards: not one checksum for each shard")


def read_record(kind, path, way_out=AGAIN):
    """The Config `kind` in a JSON file. Raises UserError, in one line, where the file is missing or damaged."""
    values = files.read_json(path)
    if values is None:
        raise UserError(f"{path}: damaged; {way_out}")
    if isinstance(version := values.get("version"), int) and version != VERSION:
        raise UserError(f"{path}: of format {version}, known is {VERSION}; extract the latents again")
    try:
        return kind.from_flat(values)
    except UserError as error:
        raise UserError(f"{path}: damaged ({str(error).removeprefix('--')}); {way_out}") from None


def shard_path(folder, number, suffix=".npy", kind="shard"):
    return Path(folder) / f"{kind}-{number:05d}{suffix}"


def write_shard(folder, number, moments, squared_errors=(0.0, 0.0), replaced=(), texts=None):
    """Write a shard's array and then its record, a ShardRecord. texts: (tokens (T, W), lengths), or None."""
    path = shard_path(folder, number)
    files.replace_file(path, lambda file: np.save(file, moments))
    record = {"count": len(moments), "crc32": files.checksum(path), "squared_errors": squared_errors, "replaced": replaced}
    if texts:
        path = shard_path(folder, number, kind="texts")
        files.replace_file(path, lambda file: np.save(file, texts[0]))
        record |= {"text_crc32": files.checksum(path), "text_lengths": texts[1]}
    record = ShardRecord.from_flat({**record, "replaced": list(replaced)}).flat()
    files.write_json(shard_path(folder, number, ".json"), {k: v for k, v in record.items() if v is not None})


def open_shard(folder, number, settings):
    """The shard's array, mapped, not read. Raises UserError where it is not there or not of its size."""
    return open_array(shard_path(folder, number), settings.shard_shape(number), settings.dtype)


def open_texts(folder, number, settings, lengths):
    """The tokens of the shard's texts, likewise. lengths: their numbers."""
    shape = (int(np.sum(lengths)), settings.text_width)
    return open_array(shard_path(folder, number, kind="texts"), shape, settings.dtype)


def open_array(path, shape, dtype):
    """The array in a file, mapped. Raises UserError where it is not there or not of this shape."""
    try:
        files.check_regular(path)
        array = np.lib.format.open_memmap(path, mode="r")  # raises ValueError where the file is shorter than it says
    except Exception as error:  # of a damaged header numpy raises half a dozen kinds
        reason = getattr(error, "strerror", None)  # the system's, such as that there is no such file
        reason = f"cannot be read ({reason})" if reason else "truncated or damaged"
        raise UserError(f"{path}: {reason}; {AGAIN}") from None
    if array.shape != shape or array.dtype != dtype or path.stat().st_size != array.offset + array.nbytes:
        raise UserError(f"{path}: not of the size that index.json tells; {AGAIN}")
    return array


def is_complete(folder, number, settings):
    """Whether a shard and its record are there and agree; reads all of the shard."""
    path, count, first = shard_path(folder, number), settings.shard_shape(number)[0], number * settings.shard_size
    try:
        open_shard(folder, number, settings)
        record = read_record(ShardRecord, path.with_suffix(".json"))
        if settings.text_encoder:
            open_texts(folder, number, settings, record.text_lengths or ())
            if record.text_crc32 != files.checksum(shard_path(folder, number, kind="texts")):
                return False
            _ = [image["source"] for image in record.replaced]
    except (UserError, KeyError):
        return False
    fits = all(
        first <= image["index"] < first + count and 0 <= image["label"] < len(settings.classes) for image in record.replaced
    )
    return fits and record.count == count and record.crc32 == files.checksum(path)


def rounding_errors(settings, shards):
    """Root mean square, over all values, of what rounding to the stored dtype did: to the mean, in units of the scaled
    latents (whose variance is about 1), and to the standard deviation, relative to it."""
    values = sum(math.prod(settings.shard_shape(number)) for number in range(len(shards))) / 2
    mean, std = (np.sqrt(sum(shard.squared_errors[i] for shard in shards) / values) for i in (0, 1))
    return {"mean_rms": float(mean * settings.scaling), "std_relative_rms": float(std)}


def write_index(folder, settings, names, labels, captions=None):
    """Finish a folder whose shards are complete: write images.json and, last, index.json. A replaced image has the label,
    and the texts, of the one in its place. Returns (the index as a dict, whether anything had to be written)."""
    folder, labels = Path(folder), list(labels)
    shards = [read_record(ShardRecord, shard_path(folder, number, ".json")) for number in range(settings.num_shards)]
    replaced = [image for shard in shards for image in shard.replaced]
    for image in replaced:
        labels[image["index"]] = image["label"]
    images = {"names": list(names), "labels": labels}
    if captions:
        texts, sources = [captions.of(index) for index in range(len(labels))], {i["index"]: i["source"] for i in replaced}
        images["texts"] = [texts[sources.get(index, index)] for index in range(len(labels))]
        images["text_lengths"] = [shard.text_lengths for shard in shards]
    images = json.dumps(images).encode()
    index = {**settings.record(), "replaced": len(replaced), "images_json_crc32": f"{zlib.crc32(images):08x}"}
    index["shards"] = [{"count": shard.count, "crc32": shard.crc32} for shard in shards]
    for entry, shard in zip(index["shards"], shards, strict=True) if captions else ():
        entry["text_crc32"] = shard.text_crc32
    index["rounding"] = rounding_errors(settings, shards)
    path = folder / "images.json"
    changed = not path.is_file() or path.read_bytes() != images or files.read_json(folder / "index.json") != index
    if changed:
        files.replace_file(path, lambda file: file.write(images))
        files.write_json(folder / "index.json", index)
    return index, changed


def is_latents_folder(folder):
    """Whether it is a folder of latents, finished or not."""
    records = (files.read_json(Path(folder) / name) for name in ("index.json", "options.json"))
    return any(record and "encoder_crc32" in record for record in records)


class StoredLatents(Dataset):
    """Stored latents, read as data.images.ImageDataset is. The batch of keys (index, epoch) is a dict of `moments`
    (N, 2, C, h, w) as stored, `label`, `index` and `replaced`; the same (seed, epoch, index) as there are mirrored. Raises
    UserError for a folder that is not complete as far as sizes tell; bytes are checked by extract_latents.py, run again."""

    channels = 3  # of the images
    in_memory = False

    def __init__(self, folder, seed=0, flip=True):
        self.folder, self.seed, self.flip, self.shards, self.notes = Path(folder), seed, flip, {}, []
        path = self.folder / "index.json"
        if not self.folder.is_dir():
            raise UserError(f"--data-path {folder}: no such folder")
        if not path.exists():
            raise UserError(f"--data-path {folder}: unfinished latents, there is no index.json yet; {AGAIN}")
        self.settings = read_record(Index, path)
        if flip and not self.settings.mirrors:
            raise UserError(
                f"--flip: {folder} holds no mirrored latents; pass --no-flip, or extract them again, with --flip"
            )
        self.classes = readable_names([printable(name) for name in self.settings.classes])
        self.captions, self.with_text = None, False
        self.names, self.labels = self._read_images(self.folder / "images.json")
        for number in range(self.settings.num_shards):
            open_shard(folder, number, self.settings)
            if self.captions:
                open_texts(folder, number, self.settings, self.lengths[number])

    def _read_images(self, path):
        """(names, labels (N,) int64) of images.json."""
        try:
            files.check_regular(path)
            content = path.read_bytes()
            if f"{zlib.crc32(content):08x}" != self.settings.images_json_crc32:
                raise ValueError
            images = json.loads(content)
            names, labels = Names(images["names"]), np.array(images["labels"])
            fits = labels.dtype == np.int64 and labels.shape == (self.settings.images,) == (len(names),)
            if not fits or labels.min() < 0 or labels.max() >= len(self.classes):
                raise ValueError
            if self.settings.text_encoder:
                self._read_texts(images["texts"], images["text_lengths"])
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise UserError(f"{path}: missing or damaged; {AGAIN}") from None
        return names, labels

    def _read_texts(self, texts, lengths):
        """Take over the texts of images.json. Raises ValueError or TypeError where they are damaged."""
        now = self.settings
        if not all(texts) or not all(is_text(text) for entry in texts for text in entry) or not now.text_crc32:
            raise ValueError
        self.captions, self.lengths = Captions(texts), [np.array(part) for part in lengths]
        firsts = [*range(0, now.images, now.shard_size), now.images]
        counts = np.diff(self.captions.starts[firsts]) + 1  # of each shard's texts, with the empty one
        if len(texts) != now.images or [len(part) for part in lengths] != counts.tolist():
            raise ValueError
        if not all(part.dtype == np.int64 and part.min() > 0 and part.max() <= now.text_length for part in self.lengths):
            raise ValueError
        self.ends = [part.cumsum() for part in self.lengths]

    def __len__(self):
        return len(self.labels)

    def __getstate__(self):  # for workers that are not forked: a pickled map would be the whole file
        return {**self.__dict__, "shards": {}}

    def name(self, index):
        return printable(self.names[index])

    def identity(self):
        """[number of images, CRC-32 of the folder's contents]: by it a resumed run knows its data."""
        lines = ["latents", self.settings.images_json_crc32, *(shard["crc32"] for shard in self.settings.shards)]
        lines += [str(shard.get("text_crc32")) for shard in self.settings.shards if self.with_text]
        return [len(self), int(files.checksum_of_text(lines), 16)]

    def check(self, image_size, skip_bad):
        """Refuse options that ask for what is not stored."""
        stored = self.settings.image_size
        if image_size != stored:
            raise UserError(
                f"--image-size {image_size}: {self.folder} holds latents of {stored} pixels; "
                f"pass --image-size {stored}, or extract others"
            )
        if skip_bad:
            raise UserError(f"--skip-bad-images: {self.folder} holds latents, and no images to skip; leave the option out")

    def open_space(self, vae, decode=False):
        """The latents' space, without an autoencoder where it need not decode. vae: what --vae names, which has to be the
        recorded one or to have the same encoder. Raises UserError."""
        now = self.settings
        stored = StoredSpace(now.channels, now.factor, now.scaling, now.shift)
        same_name = RELEASED.get(vae, vae) == RELEASED.get(now.vae, now.vae)
        if same_name and not decode and not Path(vae).is_dir():  # a folder's contents may have changed
            return stored
        try:
            space = load_space(vae).place("cpu")
        except UserError:
            if same_name:
                raise
            space = None  # the way out is another one than for images
        if not isinstance(space, Autoencoder) or differences(now.flat(), space.encoder_settings()):
            raise UserError(
                f"--vae {vae}: {self.folder} holds latents of {now.vae}, and this is not that autoencoder, nor one with "
                f"its encoder; pass --vae {now.vae}, or extract others"
            )
        return space if decode else stored

    def open_text(self, config, prompts=False):
        """What gives the texts of a DataConfig: with `prompts` its TextEncoder, else StoredTexts, which needs none. None if
        the config names no encoder. Raises UserError where it names another one than the stored texts'."""
        now, name, length = self.settings, config.text_encoder, config.text_length
        if not name:
            return None
        if not self.captions:
            raise UserError(
                f"--text-encoder {name}: {self.folder} holds no texts; extract the latents again, with --text-encoder"
            )
        if length not in (None, now.text_length):
            raise UserError(f"--text-length {length}: {self.folder} holds up to {now.text_length} tokens; leave it out")
        self.with_text = True
        ends = self.ends[0]
        null = torch.from_numpy(np.array(open_texts(self.folder, 0, now, self.lengths[0])[ends[-2] :])).float()
        null = pad(null, torch.tensor([len(null)]), now.text_length)[0]
        stored = StoredTexts(now.text_encoder, now.text_crc32, now.text_width, now.text_length, null)
        if name == now.text_encoder and not prompts and not Path(name).is_dir():  # a folder's contents may have changed
            return stored
        encoder = load_text_encoder(name, now.text_length)
        if encoder.crc32 != now.text_crc32:
            raise UserError(
                f"--text-encoder {name}: {self.folder} holds texts encoded by {now.text_encoder}, and this is not that "
                f"encoder; pass --text-encoder {now.text_encoder}, or extract others"
            )
        return encoder if prompts else stored

    def texts(self, keys):
        """The part of a batch of keys (index, epoch) that is about texts: `text_tokens` (sum of the lengths, W) as stored,
        and `text_lengths` (N,). A dict, empty where texts are not asked for."""
        if not self.with_text:
            return {}
        parts = []
        for index, epoch in keys:
            shard = index // self.settings.shard_size
            text = self.captions.choose(self.seed, index, epoch) - self.captions.starts[shard * self.settings.shard_size]
            if (shard, "texts") not in self.shards:
                self.shards[shard, "texts"] = np.asarray(open_texts(self.folder, shard, self.settings, self.lengths[shard]))
            end = self.ends[shard][text]
            parts.append(self.shards[shard, "texts"][end - self.lengths[shard][text] : end])
        return {"text_tokens": torch.from_numpy(np.concatenate(parts)), "text_lengths": torch.tensor([*map(len, parts)])}

    def __getitem__(self, key):
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys):
        """One batch, gathered in one go: 10,000 latents a second leave no time for a tensor each."""
        moments = np.empty((len(keys), *self.settings.shard_shape(0)[2:]), self.settings.dtype)
        for row, (index, epoch) in zip(moments, keys, strict=True):
            number, place = divmod(index, self.settings.shard_size)
            if number not in self.shards:  # opened here: by each data worker for itself
                self.shards[number] = np.asarray(open_shard(self.folder, number, self.settings))
            row[:] = self.shards[number][place, int(self.flip and is_mirrored(self.seed, index, epoch))]
        index = torch.tensor([index for index, _ in keys])
        label = torch.from_numpy(self.labels)[index]
        batch = {"moments": torch.from_numpy(moments), "label": label, "index": index, "replaced": [""] * len(keys)}
        return batch | self.texts(keys)
