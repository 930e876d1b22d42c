"""Sets of finished images, to be measured: a .npz in ADM's layout or a folder of image files, read as a stream.

images = open_images("samples.npz")
for batch in images.batches(0, len(images), batch_size=64):     # uint8 (N, H, W, 3)
"""

import hashlib
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from runtime.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"}
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


def open_images(path):
    """NpzImages or FolderImages of `path`; raises UserError naming the file and what is wrong with it."""
    path = Path(path)
    if path.is_dir():
        return FolderImages(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    return NpzImages(path)


class NpzImages:
    """`arr_0` uint8 (N, H, W, 3), optionally labels `arr_1` (N,), and precomputed `mu`, `sigma`, `mu_s`, `sigma_s`.

    Images are read from the zip member as a stream: `np.load` would hold all of it, 40 GB for 50,000 at 512 px. Zip's
    own checksum is compared by whoever reads to the end. `size` is (H, W), or None without images."""

    def __init__(self, path):
        self.path, self.files, self.size, self.labels, self.length = path, [path], None, None, 0
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not a .npz file, or one cut short; write or download it again")
        try:
            with np.load(path, allow_pickle=False) as file:
                names = set(file.files)
                self.statistics = {name: np.asarray(file[name], np.float64) for name in STATISTICS if name in names}
                if "arr_1" in names:
                    self.labels = file["arr_1"]
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: damaged .npz file ({error}); write or download it again") from error
        for name, array in self.statistics.items():
            if array.shape != STATISTICS[name]:
                raise UserError(f"{path}: {name} has shape {array.shape}, the statistics of {STATISTICS[name]} expected")
        for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
            if (mu in names) != (sigma in names):
                raise UserError(f"{path}: only one of {mu} and {sigma} is there; give both or neither")
        if "arr_0" in names:
            self._check_images()
        elif not self.statistics:
            raise UserError(f"{path}: holds {sorted(names)}; needs arr_0 (images) or mu and sigma")

    def _check_images(self):
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
            shape, fortran_order, dtype = _read_header(stream)
            if len(shape) != 4 or shape[3] != 3 or fortran_order or 0 in shape:
                raise UserError(f"{self.path}: arr_0 has shape {shape}; must be (N, H, W, 3) in row-major order")
            if dtype != np.uint8:
                first = np.frombuffer(stream.read(min(shape[0], 16) * int(np.prod(shape[1:])) * dtype.itemsize), dtype)
                raise UserError(
                    f"{self.path}: arr_0 is {dtype} with values from {first.min():.4g} to {first.max():.4g} in its "
                    "first images; must be uint8, 0 to 255. Cut to bytes as they are, such images measure as black or "
                    "as noise; for values in [-1, 1] save np.clip(127.5 * x + 128, 0, 255).astype(np.uint8)"
                )
        self.length, self.size = shape[0], shape[1:3]

    def __len__(self):
        return self.length

    def check(self):
        """Nothing more to check before reading."""

    def batches(self, start, stop, batch_size):
        """Yield the images [start, stop) as uint8 (up to batch_size, H, W, 3). Raises UserError for a damaged file."""
        image = self.size[0] * self.size[1] * 3
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as stream:
                _read_header(stream)
                stream.seek(start * image, 1)
                for first in range(start, stop, batch_size):
                    n = min(batch_size, stop - first)
                    data = stream.read(n * image)
                    if len(data) < n * image:
                        raise EOFError("arr_0 ends early")
                    yield np.frombuffer(bytearray(data), np.uint8).reshape(n, *self.size, 3)
                if stop == self.length:
                    stream.read(1)  # the end of the member: here zipfile compares its checksum
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path}: damaged ({error}); write or download it again") from error


class FolderImages:
    """All image files below a folder, in the order of their relative paths; subfolders, if any, are labels."""

    def __init__(self, path, workers=4):
        self.path, self.workers, self.statistics = path, workers, {}
        self.files = sorted(
            (file for file in path.rglob("*") if file.suffix.lower() in EXTENSIONS),
            key=lambda file: file.relative_to(path).as_posix(),
        )
        if not self.files:
            raise UserError(f"{path}: no image in this folder ({' '.join(sorted(EXTENSIONS))})")
        height, width = _read(self.files[0]).shape[:2]
        self.size = (height, width)
        parents = [file.parent.relative_to(path).as_posix() for file in self.files]
        self.labels = np.array(parents) if set(parents) != {"."} else None

    def __len__(self):
        return len(self.files)

    def check(self):
        """Read the header of every file; raises UserError for one that is no image or has another size."""
        for file in tqdm(self.files, desc=f"checking {self.path.name}", unit="image"):
            try:
                with Image.open(file) as image:
                    width, height = image.size
            except (OSError, SyntaxError) as error:
                raise UserError(f"{file}: not a readable image ({error}); remove or rewrite it") from error
            self._check_size(file, (height, width))

    def _check_size(self, file, size):
        if size != self.size:
            raise UserError(
                f"{file}: {size[1]}x{size[0]} pixels, but {self.files[0]} has {self.size[1]}x{self.size[0]}; the "
                "network squeezes each image to one square, so a number over mixed sizes means little: crop to one size"
            )

    def batches(self, start, stop, batch_size):
        """Yield the images [start, stop) as uint8 (up to batch_size, H, W, 3). Raises UserError for a damaged file."""
        with ThreadPoolExecutor(self.workers) as pool:
            for first in range(start, stop, batch_size):
                files = self.files[first : min(first + batch_size, stop)]
                images = list(pool.map(_read, files))
                for file, image in zip(files, images, strict=True):
                    self._check_size(file, image.shape[:2])
                yield np.stack(images)


def _read_header(stream):
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _read(file):
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(f"{file}: mode {image.mode}, more than 8 bits a channel; save it as 8-bit RGB")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise UserError(f"{file}: damaged image ({error}); remove or rewrite it") from error


def checksum(path, files=None):
    """SHA-256 in hex of a file; for a folder, of what `sha256sum` prints for its `files`, by their relative paths."""
    total = sum(file.stat().st_size for file in files or [path])
    with tqdm(total=total, desc=f"checksum {path.name}", unit="B", unit_scale=True, leave=False) as bar:
        if not path.is_dir():
            return _sha256(path, bar)
        lines = [f"{_sha256(file, bar)}  {file.relative_to(path).as_posix()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path, bar):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
