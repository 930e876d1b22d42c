"""Sets of finished images to be measured, read as a stream: an .npz file in ADM's layout, a folder of images, or a table.

images = open_images("samples.npz")
for batch in images.batches(0, len(images), batch_size=64):     # uint8 (N, H, W, 3)
"""

import contextlib
import hashlib
import math
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from data.config import DataConfig
from data.images import open_image
from data.listing import ENDINGS, notes_of, to_path, walk
from data.table import NO_LABELS, beside_the_data, columns_in, is_table, list_table
from evaluation.metrics import check_covariance
from runtime.errors import UserError, about
from runtime.files import OF_THE_FILE, reason
from runtime.npy import read_npy_header
from runtime.shapes import sides

STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
LARGEST = 1e30  # of a statistic; larger ones are errors, and their squares would overflow
MAX_RATIO = 1032  # of zip's compression (deflate)


def open_images(path, column=None):
    """NpzImages, FolderImages or TableImages of `path`; raises UserError naming the file and what is wrong with it. column:
    of a table, that holds the images, if it has one of that name (default: the only one)."""
    path = Path(path)
    if is_table(path) and path.suffix not in (".npz", ".json"):
        with about("images", option="--data-path"):
            return TableImages(path, column)
    if path.is_dir():
        return FolderImages(path)
    check_file(path)
    return NpzImages(path)


def open_reference(path, option, image_size, column=None):
    """The images that the option names, to compare samples of this size with. Raises UserError where that cannot be."""
    try:
        with beside_the_data() if option == "--eval-reference" else contextlib.nullcontext():
            images = open_images(path, column)
    except UserError as error:
        raise UserError(f"{option} {error}") from None
    where = f"{option} {images.path}"
    if images.size and tuple(images.size) != sides(image_size):
        found, wanted = ("x".join(map(str, size)) for size in (images.size, sides(image_size)))
        problem = f"{found} pixels, the model draws {wanted}"
        raise UserError(where, f"{problem}: sharpness would be part of the distance", "give a reference of that size")
    if "mu" not in images.statistics and len(images) < 2:
        raise UserError(where, "holds neither mu and sigma nor 2 images", "give 2 images or more")
    return images


def need_images(networks, images, option):
    """{name: network} of those whose statistics the images do not bring. Raises UserError where there are no images."""
    found = {name: network for name, network in networks.items() if not (network.published and "mu" in images.statistics)}
    if found and len(images) < 2:
        problem = f"its mu and sigma are of the Inception network, {', '.join(found)} needs images"
        raise UserError(f"{option} {images.path}", problem, "give 2 images or more")
    return found


def check_file(path):
    """Refuse what is not a regular file: reading from a FIFO or a terminal would wait for ever. Raises UserError."""
    if not path.exists():
        raise UserError(path, "a link to a file that does not exist" if path.is_symlink() else "no such file or folder")
    if not path.is_file():
        raise UserError(path, "not a regular file")


class NpzImages:
    """`arr_0` uint8 (N, H, W, 3), or clips (N, F, H, W, 3), whose frames are the images; optionally labels `arr_1` (N,),
    and precomputed `mu`, `sigma`, `mu_s`, `sigma_s`.

    Images are read from the zip member as a stream: `np.load` would hold all of them, 40 GB for 50,000 at 512 px. Zip's
    checksum is compared whenever a member is read to its end. `size` is (H, W), or None without images."""

    def __init__(self, path):
        self.path, self.size, self.labels, self.length, self.frames, self.jpeg = path, None, None, 0, 1, None
        if path.suffix == ".json":
            raise UserError(path, "a report, not a set of images", "name the .npz file or the folder that it is about")
        try:
            with open(path, "rb") as file:  # of a path, is_zipfile says that it is no zip where it cannot be opened
                is_zip = zipfile.is_zipfile(file)
        except OSError as error:
            raise UserError(path, f"cannot be read ({reason(error)})") from None
        if not is_zip:
            way_out = "write or download it again, or name a folder of images, or a .parquet or .arrow file"
            raise UserError(path, "not a .npz file, or one cut short", way_out)
        with self._archive() as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
            self.statistics = {name: self._read_statistic(archive, name) for name in STATISTICS if name in names}
            for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
                if (mu in names) != (sigma in names):
                    raise UserError(path, f"holds only one of {mu} and {sigma}", "give both or neither")
            if "arr_0" in names:
                self._check_images(archive)
            elif not self.statistics:
                raise UserError(path, f"holds {sorted(names)}; needs arr_0 (images) or mu and sigma")
            if "arr_1" in names:
                with self._open(archive, "arr_1") as (stream, shape, dtype):
                    if shape == (self.length // self.frames,):  # other arrays are no labels
                        self.labels = np.frombuffer(stream.read(), dtype).repeat(self.frames)

    @contextlib.contextmanager
    def _archive(self):
        """The open file, in which a damaged zip makes the readers raise almost anything. Raises UserError for it."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except UserError:
            raise
        except Exception as error:
            if getattr(error, "errno", None) not in OF_THE_FILE:
                raise UserError(self.path, f"cannot be read ({reason(error)})") from None
            raise UserError(self.path, f"damaged .npz file ({reason(error)})", "write or download it again") from error

    @contextlib.contextmanager
    def _open(self, archive, name, row_major=True):
        """(stream, shape, dtype) of one array; the stream is at its first value. Raises UserError for a ValueError of the
        block too, whose text continues a sentence about the array."""
        member = archive.getinfo(f"{name}.npy")
        with archive.open(member) as stream:
            try:
                size = min(member.file_size, MAX_RATIO * self.path.stat().st_size)
                yield stream, *read_npy_header(stream, size, row_major)
            except ValueError as error:
                raise UserError(self.path, f"{name} {error}") from None

    def _read_statistic(self, archive, name):
        # a covariance is symmetric, so that its order does not matter
        with self._open(archive, name, row_major=False) as (stream, shape, dtype):
            if shape != STATISTICS[name]:
                raise ValueError(f"has shape {shape}, must have {STATISTICS[name]}")
            if dtype.kind not in "fiu":
                raise ValueError(f"is {dtype}; must be floating-point numbers")
            values = np.frombuffer(stream.read(), dtype).reshape(shape).astype(np.float64)
            if not (np.abs(values) < LARGEST).all():
                raise ValueError(f"holds NaN, infinity or values above {LARGEST:g}; compute it again")
            if values.ndim == 2:
                check_covariance(values)
        return values

    def _check_images(self, archive):
        with self._open(archive, "arr_0") as (stream, shape, dtype):
            if len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
                raise ValueError(f"has shape {shape}; must be (N, H, W, 3) in row-major order, of clips (N, F, H, W, 3)")
            if dtype != np.uint8:
                values = ""
                if dtype.kind in "iuf":
                    first = np.frombuffer(stream.read(min(shape[0], 16) * math.prod(shape[1:]) * dtype.itemsize), dtype)
                    values = f" with values from {first.min():.4g} to {first.max():.4g} in its first images"
                must = "must be uint8, 0 to 255. Converted as they are, such images become black or noise"
                way_out = "for values in [-1, 1] save np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)"
                raise ValueError(f"is {dtype}{values}; {must}; {way_out}")
        self.length, self.frames, self.size = math.prod(shape[:-3]), math.prod(shape[1:-3]), shape[-3:-1]

    def __len__(self):
        return self.length

    def checksum(self):
        """SHA-256 in hex of the file."""
        return checksum(self.path)

    def check(self):
        """Nothing more to check before reading."""

    def batches(self, start, stop, batch_size):
        """Yield the images [start, stop) as uint8 (up to batch_size, H, W, 3). Raises UserError for a damaged file."""
        image = self.size[0] * self.size[1] * 3
        with self._archive() as archive, self._open(archive, "arr_0") as (stream, _, _):
            stream.seek(start * image, 1)
            for first in range(start, stop, batch_size):
                n = min(batch_size, stop - first)
                data = bytearray(stream.read(n * image))
                if len(data) < n * image:
                    raise EOFError("arr_0 ends early")
                yield np.frombuffer(data, np.uint8).reshape(n, *self.size, 3)
            if stop == self.length:
                stream.read(1)  # at the end of the member zipfile compares the checksum


class FolderImages:
    """All image files below a folder, in the order of their relative paths, `names`; subfolders, if any, are labels. jpeg:
    the share of JPEG files, known after `check`."""

    workers, jpeg = 4, None

    def __init__(self, path):
        self.path, self.statistics = path, {}
        found, left_out = walk(path)
        self.files = sorted((path / to_path(folder) / to_path(name) for folder, names in found for name in names),
                            key=lambda file: file.relative_to(path).as_posix())  # fmt: skip
        self.notes = notes_of(path, left_out)
        if not self.files:
            raise UserError(path, f"no image in this folder ({' '.join(sorted(ENDINGS))})")
        self.names = [file.relative_to(path).as_posix() for file in self.files]
        self.size = open_image(self.files[0]).size[::-1]
        parents = [file.parent.relative_to(path).as_posix() for file in self.files]
        self.labels = np.array(parents) if set(parents) != {"."} else None

    def __len__(self):
        return len(self.names)

    def file(self, index):
        """What PIL opens."""
        return self.files[index]

    def checksum(self):
        """SHA-256 in hex of what `sha256sum` prints for the images by their names."""
        indices = tqdm(range(len(self)), desc=f"checksum {self.path.name}", unit="image", leave=False)
        lines = [f"{_sha256(self.file(index))}  {self.names[index]}\n" for index in indices]
        return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()  # names may hold any bytes

    def check(self):
        """Read the header of every file. Raises UserError for one that is no 8-bit image or that has another size."""
        for note in self.notes:
            tqdm.write(note)
        indices = tqdm(range(len(self)), desc=f"checking {self.path.name}", unit="image")
        self.jpeg = np.mean([self._check_header(index) == "JPEG" for index in indices])

    def _check_header(self, index):
        """The format of an image."""
        file, name = self.file(index), self.path / self.names[index]
        if isinstance(file, str | Path):
            check_file(Path(file))
        try:
            with Image.open(file) as image:
                mode, size = image.mode, image.size[::-1]
        except Exception as error:  # PIL raises many kinds
            raise UserError(name, f"not a readable image ({reason(error)})", "remove it or write it again") from error
        if mode.startswith(("I", "F")):
            raise UserError(name, f"mode {mode}, more than 8 bits a channel", "save it as 8-bit RGB")
        if sorted(size) != sorted(self.size):  # the rotation that EXIF data may ask for is not known here
            self._check_size(name, size)
        return image.format

    def _check_size(self, name, size):
        if size != self.size:
            first = self.path / self.names[0]
            text = f"{size[1]}x{size[0]} pixels, but {first} has {self.size[1]}x{self.size[0]}; the network squeezes"
            text += " each image to one square, so a number over mixed sizes means little: crop to one size"
            raise UserError(name, text)

    def batches(self, start, stop, batch_size):
        """Yield the images [start, stop) as uint8 (up to batch_size, H, W, 3). Raises UserError for a damaged file."""
        with ThreadPoolExecutor(self.workers) as pool:
            for first in range(start, stop, batch_size):
                yield np.stack(list(pool.map(self._read, range(first, min(first + batch_size, stop)))))

    def _read(self, index):
        name = str(self.path / self.names[index])
        image = np.array(open_image(self.file(index), name))
        self._check_header(index)
        self._check_size(name, image.shape[:2])
        return image


class TableImages(FolderImages):
    """The images of a table, see `data.table`, in the order of its rows; the labels are those that training would find."""

    def __init__(self, path, column=None):
        columns = columns_in(path, {"image_column": column})
        try:
            listing = list_table(DataConfig(str(path), **columns))
        except UserError:  # without labels, if it is for these: they are not needed
            listing = list_table(DataConfig(str(path), label_column=NO_LABELS, **columns))
        self.path, self.statistics, self.notes, self.file = path, {}, listing.notes, listing.table.file
        self.names, self.labels = listing.names, np.array(listing.folders)[listing.labels]
        self.labels = None if set(listing.folders) == {"."} else self.labels
        self.size = open_image(self.file(0), f"{path}/{self.names[0]}").size[::-1]


def checksum(file):
    """SHA-256 in hex of a file."""
    size, name = Path(file).stat().st_size, Path(file).name
    with tqdm(total=size, desc=f"checksum {name}", unit="B", unit_scale=True, leave=False) as bar:
        return _sha256(file, bar.update)


def _sha256(file, progress=lambda count: None):
    digest = hashlib.sha256()
    with open(file, "rb") if isinstance(file, str | Path) else file as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()
