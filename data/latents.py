"""A folder of latents: what the encoder makes of each image of an image folder, computed once by extract_latents.py. It
holds files shard-00000.safetensors ..., each of n images in the image folder's order, written atomically:

moments   (n, F, M, C, h, w), float16 or float32; of clips (n, F, M, C, frames, h, w). F = 2: the image and its flip, or 1.
          M = 2: mean and standard deviation of the posterior, or 1: the latent of a deterministic encoder. Neither scaled
          nor shifted
label     (n,) int64, of the image that was encoded
image     (n,) int64, its number in the image folder. Where an image could not be read, it is that of the next one
name      uint8, the paths of these images, relative to the image folder, with zero bytes between them
errors    (2,) float64, the sums over the shard's values that the last line of extract_latents.py needs
sums      (2, C) float64, the sums of z and z^2 of each channel, see data/statistics.py (not in older shards)

With --text-encoder it also holds:

text      uint8, a list in JSON of the texts, a list, of each image
tokens    (T, W), as `moments`: the tokens, without padding, of all these texts one after the other, and of the empty text
length    (number of texts + 1,) int64: their numbers of tokens

The metadata are the Settings, the same in every shard, and the CRC-32 of the shard's arrays."""

import contextlib
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import Dataset

from data.autoencoder import RELEASED, Autoencoder, LatentSpace, load_space
from data.captions import Captions, is_text
from data.config import MAX_BATCH, MAX_SHARD, MAX_SIDE
from data.listing import Names, printable, readable_names
from data.order import is_flipped
from data.statistics import channel_statistics
from data.text_encoder import StoredTexts, pad
from runtime import files
from runtime.config import Config, differences, option
from runtime.errors import UserError
from runtime.shapes import ImageSize, sides

VERSION = 2
AGAIN = "run the same extract_latents.py command again"
DTYPES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64"}  # as safetensors calls them


@dataclass(frozen=True)
class Settings(Config):
    """What a folder of latents is made with and of."""

    vae: str = option()
    encoder_crc32: str = option()
    scaling: tuple[float, ...] = option(above=0)  # one number, or one for each channel
    shift: tuple[float, ...] = option()
    channels: int = option(low=1, high=1024)
    factor: int = option(low=1, high=1024)
    moments: int = option(low=1, high=2)
    image_size: ImageSize = option(low=1, high=MAX_SIDE)
    dtype: str = option(choices=("float16", "float32"))
    flip: bool = option()
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
    num_frames: int | None = option(None, low=1, high=MAX_SIDE)  # of clips
    frame_stride: int = option(1, low=1, high=MAX_SIDE)

    @property
    def num_shards(self):
        return -(-self.images // self.shard_size)

    def shard_shape(self, number):
        """(n, F, M, C, h, w) of a shard's moments; of clips (n, F, M, C, frames, h, w)."""
        count, cells = min(self.shard_size, self.images - number * self.shard_size), sides(self.image_size)
        frames = () if self.num_frames is None else (self.num_frames,)
        return (count, 1 + self.flip, self.moments, self.channels, *frames, *(side // self.factor for side in cells))


# ----------------------------------------------------------------------------------------------------------------------
# Files


class DamagedError(UserError):
    """A shard that is missing or damaged, so that it has to be made again; not one that the system cannot read."""


def shard_path(folder, number):
    return Path(folder) / f"shard-{number:05d}.safetensors"


def write_shard(folder, number, settings, arrays):
    """Write a shard atomically. arrays: {name: array}, as above. Raises OSError."""
    record = {"version": VERSION, "settings": json.dumps(settings.flat()), "crc32": files.checksum_of_arrays(arrays)}
    metadata = {"latents": json.dumps(record)}  # one entry, since the library writes several in any order

    def write(file):
        try:
            save_file(arrays, file.name, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from None

    files.replace_file(shard_path(folder, number), write)


@functools.lru_cache(maxsize=2)
def parse_settings(text):
    """The Settings of a JSON text, which is the same in all shards. Raises ValueError or AttributeError."""
    return Settings.from_flat(json.loads(text))


class Shard:
    """A shard, mapped, not read: `settings`, `crc32`. Raises DamagedError; UserError where the system cannot read it."""

    def __init__(self, folder, number):
        self.path, self.number = shard_path(folder, number), number
        with self.errors():
            files.check_regular(self.path)
            open(self.path, "rb").close()  # of whatever error in opening, safe_open says that there is no such file
            self.file = safe_open(self.path, "np")  # which checks that sizes, offsets and the file's length agree
            record = json.loads(self.file.metadata()["latents"])
            self.crc32, version = f"{int(record['crc32'], 16):08x}", record["version"]
            self.settings = parse_settings(record["settings"]) if version == VERSION else None
        if not self.settings:
            raise UserError(f"{self.path}", f"of format {version}, known is {VERSION}", "extract the latents again")

    @contextlib.contextmanager
    def errors(self):
        """Raise what is wrong with the file as one line."""
        try:
            yield
        except FileNotFoundError:
            raise DamagedError(f"{self.path}: missing; {AGAIN}") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({files.reason(error)})") from None
        except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise DamagedError(f"{self.path}: truncated or damaged; {AGAIN}") from None

    def map(self, name):
        """An array that is read where it is indexed."""
        try:
            return safe_open(self.path, "pt").get_tensor(name).numpy()  # seven times as fast as a slice, and no open file
        except SafetensorError:  # of a path that is not UTF-8
            return self.file.get_slice(name)

    def check(self, settings, every_byte=False):
        """(names of the images, labels, list of texts of each, numbers of tokens), the last two None without texts. Raises
        DamagedError where it is no shard of these Settings, as far as sizes and small values tell, or all bytes."""
        read, count, texts, lengths = self.file.get_tensor, settings.shard_shape(self.number)[0], None, None
        with self.errors():
            names, labels, images = bytes(read("name")).split(b"\0"), read("label"), read("image")
            shapes = {"label": ((count,), "I64"), "image": ((count,), "I64"), "errors": ((2,), "F64")}
            shapes["moments"] = settings.shard_shape(self.number), DTYPES[settings.dtype]
            if "sums" in self.file.keys():  # noqa: SIM118
                shapes["sums"] = (2, settings.channels), "F64"
            fits = self.settings == settings and len(names) == count
            fits &= min(labels.min(), images.min()) >= 0 and labels.max() < len(settings.classes)
            if settings.text_encoder:
                texts, lengths = json.loads(bytes(read("text"))), read("length")
                fits &= len(texts) == count and all(texts) and all(is_text(text) for part in texts for text in part)
                fits &= lengths.min() > 0 and lengths.max() <= settings.text_length
                shapes["length"] = (sum(map(len, texts)) + 1,), "I64"
                shapes["tokens"] = (int(lengths.sum()), settings.text_width), DTYPES[settings.dtype]
            arrays = {name: self.file.get_slice(name) for name in shapes}
            fits &= {name: (tuple(a.get_shape()), a.get_dtype()) for name, a in arrays.items()} == shapes
            every = fits and every_byte and {name: read(name) for name in self.file.keys()}  # noqa: SIM118
            if not fits or (every and self.crc32 != files.checksum_of_arrays(every)):
                raise ValueError
        return [name.decode("utf-8", "surrogateescape") for name in names], labels, texts, lengths


def is_complete(folder, number, settings):
    """Whether a shard is there and undamaged; reads all of it. Raises UserError where the system cannot read it."""
    with contextlib.suppress(DamagedError):
        return bool(Shard(folder, number).check(settings, every_byte=True))
    return False


def read_settings(folder):
    """The Settings of the first shard that is not damaged. Raises UserError: DamagedError where there is none."""
    problem = DamagedError(f"{folder}: no latents; {AGAIN}")
    for number in sorted(int(n) for p in Path(folder).glob("shard-*.safetensors") if (n := p.stem[6:]).isdecimal()):
        try:
            return Shard(folder, number).settings
        except DamagedError as error:
            problem = error
    raise problem


def read_statistics(folder, settings):
    """Each channel's mean and standard deviation over images and flips; None where shards lack sums. Raises UserError."""
    files = [Shard(folder, number).file for number in range(settings.num_shards)]
    if not all("sums" in file.keys() for file in files):  # noqa: SIM118
        return None
    values = sum(math.prod(settings.shard_shape(number)) for number in range(len(files)))
    sums = torch.from_numpy(sum(file.get_tensor("sums") for file in files))
    return channel_statistics(sums, values / settings.moments / settings.channels)


def is_latents_folder(folder):
    """Whether it is a folder of latents, finished or not, of this format or of the one before."""
    old = (files.read_json(Path(folder) / name) for name in ("index.json", "options.json"))
    return any(Path(folder).glob("shard-*.safetensors")) or any(record and "encoder_crc32" in record for record in old)


# ----------------------------------------------------------------------------------------------------------------------
# The dataset


class StoredLatents(Dataset):
    """Stored latents, read as data.images.ImageDataset is. The batch of keys (index, epoch) is a dict of `moments`
    (N, M, C, h, w) as stored, `label`, `index` and `replaced`; the same (seed, epoch, index) as there are flipped. Raises
    UserError for a folder that is not complete as far as sizes tell; bytes are checked by extract_latents.py, run again."""

    channels = 3  # of the images
    in_memory, shape_of = False, None

    def __init__(self, folder, seed=0, flip=True):
        self.folder, self.seed, self.flip, self.shards, self.notes = Path(folder), seed, flip, {}, []
        where = f"--data-path {folder}"
        if not self.folder.is_dir():
            raise UserError(where, "no such folder", "check the path")
        found = len([*self.folder.glob("shard-*.safetensors")])
        if not found and is_latents_folder(folder):
            raise UserError(where, "latents of an older format", "extract them again, into another folder")
        self.settings = now = read_settings(folder)
        if found < now.num_shards:
            raise UserError(where, f"unfinished latents, {found} of {now.num_shards} shards are there", AGAIN)
        if flip and not now.flip:
            way_out = "pass --no-flip, or extract them again, with --flip"
            raise UserError("--flip", f"{folder} holds no flipped latents", way_out)
        self.folders = list(now.classes)
        self.classes = readable_names([printable(name) for name in now.classes])
        shards = [Shard(folder, number) for number in range(now.num_shards)]
        names, labels, texts, self.lengths = zip(*(shard.check(now) for shard in shards), strict=True)
        self.names, self.labels = Names(name for part in names for name in part), np.concatenate(labels)
        self.captions = Captions([entry for part in texts for entry in part]) if now.text_encoder else None
        self.with_text = False
        self.ends = [part.cumsum() for part in self.lengths if part is not None]
        self.checksum = files.checksum_of_text(["latents", *(shard.crc32 for shard in shards)])

    def __len__(self):
        return len(self.labels)

    def __getstate__(self):  # for workers that are not forked: a pickled map would be the whole file
        return {**self.__dict__, "shards": {}}

    def name(self, index):
        return printable(self.names[index])

    def fingerprint(self):
        """[number of images, CRC-32 of the shards' checksums]: by it a resumed run knows its data."""
        return [len(self), int(self.checksum, 16)]

    def check(self, image_size, skip_bad, num_frames=None, frame_stride=1):
        """Refuse options that ask for what is not stored."""
        stored, holds = self.settings.image_size, f"{self.folder} holds latents"
        if image_size != stored:
            way_out = f"pass --image-size {stored}, or extract others"
            raise UserError(f"--image-size {image_size}", f"{holds} of {stored} pixels", way_out)
        asked, found = (num_frames, frame_stride), (self.settings.num_frames, self.settings.frame_stride)
        if asked != found:
            asked, stored = ("--num-frames {} --frame-stride {}".format(*pair) for pair in (asked, found))
            way_out = f"pass {stored}" if found[0] else "leave it out"
            raise UserError(asked, f"{holds} of {f'clips with {stored}' if found[0] else 'images'}", way_out)
        if skip_bad:
            raise UserError("--skip-bad-images", f"{holds}, and no images to skip", "leave the option out")

    def open_space(self, vae, decode=False):
        """The latent space, without an autoencoder where it need not decode. vae: what --vae names, which has to be the
        recorded one or to have the same encoder. Raises UserError."""
        now = self.settings
        stored = LatentSpace(now.channels, now.factor, now.scaling, now.shift)
        same_name = RELEASED.get(vae, vae) == RELEASED.get(now.vae, now.vae)
        if same_name and not decode and not Path(vae).is_dir():  # a folder's contents may have changed
            return stored
        try:
            space = load_space(vae).to("cpu")
        except UserError:
            if same_name:
                raise
            space = None  # the way out is another one than for images
        if not isinstance(space, Autoencoder) or differences(now.flat(), space.encoder_settings()):
            problem = f"{self.folder} holds latents of {now.vae}, this is not that autoencoder, nor one with its encoder"
            raise UserError(f"--vae {vae}", problem, f"pass --vae {now.vae}, or extract others")
        return space if decode else stored

    def open_text(self, config):
        """The StoredTexts of a DataConfig; None if it names no encoder. Raises UserError where it names another one."""
        now, name, length = self.settings, config.text_encoder, config.text_length
        if not name:
            return None
        if not self.captions:
            way_out = "extract the latents again, with --text-encoder"
            raise UserError(f"--text-encoder {name}", f"{self.folder} holds no texts", way_out)
        if length not in (None, now.text_length):
            raise UserError(f"--text-length {length}", f"{self.folder} has up to {now.text_length} tokens", "leave it out")
        self.with_text = True
        null = torch.from_numpy(self.array(0, "tokens")[int(self.ends[0][-2]) :]).float()
        null = pad(null, torch.tensor([len(null)]), now.text_length)[0]
        stored = StoredTexts(name, now.text_crc32, now.text_width, now.text_length, null)
        if name != now.text_encoder or Path(name).is_dir():  # a folder's contents may have changed
            stored.load(f"the tokens of {self.folder}; that was {now.text_encoder}")
        return stored

    def array(self, number, name):
        """An array of a shard, mapped; each data worker opens it for itself."""
        if (number, name) not in self.shards:
            self.shards[number, name] = Shard(self.folder, number).map(name)
        return self.shards[number, name]

    def texts(self, keys):
        """The part of a batch of keys (index, epoch) that is about texts: `text_tokens` (sum of the lengths, W) as stored,
        and `text_lengths` (N,). A dict, empty where texts are not asked for."""
        if not self.with_text:
            return {}
        parts = []
        for index, epoch in keys:
            shard = index // self.settings.shard_size
            text = self.captions.choose(self.seed, index, epoch) - self.captions.starts[shard * self.settings.shard_size]
            end = int(self.ends[shard][text])
            parts.append(self.array(shard, "tokens")[end - int(self.lengths[shard][text]) : end])
        return {"text_tokens": torch.from_numpy(np.concatenate(parts)), "text_lengths": torch.tensor([*map(len, parts)])}

    def __getitem__(self, key):
        return {name: values[0] for name, values in self.__getitems__([key]).items()}

    def __getitems__(self, keys):
        """One batch, gathered in one go: 10,000 latents a second leave no time for a tensor each."""
        moments = np.empty((len(keys), *self.settings.shard_shape(0)[2:]), self.settings.dtype)
        for row, (index, epoch) in zip(moments, keys, strict=True):
            number, position = divmod(index, self.settings.shard_size)
            row[:] = self.array(number, "moments")[position, int(self.flip and is_flipped(self.seed, index, epoch))]
        index = torch.tensor([index for index, _ in keys])
        label = torch.from_numpy(self.labels)[index]
        batch = {"moments": torch.from_numpy(moments), "label": label, "index": index, "replaced": [""] * len(keys)}
        return batch | self.texts(keys)
