"""The files of a set of images: a folder of {index:06d}.png, and one .npz of all images and labels."""

import errno
import math
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from runtime.errors import RunError
from runtime.files import check_regular, reason, replace_file, write_errors
from runtime.npy import map_npz

NO_IMAGE = {None, errno.ENOENT, errno.EISDIR, errno.EINVAL}  # of errors that say that a file is missing or damaged


def png(folder, index):
    return folder / f"{index:06d}.png"


def write_pngs(folder, indices, images):
    """Write the images of these indices, several at a time. images: (N, H, W, 3) uint8."""
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write_png, [png(folder, index) for index in indices], images))  # which raises their errors


def write_png(path, pixels):
    """pixels: (H, W, 3) uint8. Raises RunError where the disk is full or the folder not writable."""
    with write_errors(path, "; the images so far are kept"):
        replace_file(path, lambda file: Image.fromarray(pixels).save(file, format="PNG"))


def read_png(path, size):
    """Pixels (H, W, 3) uint8, or None where the file is missing, damaged, or of another size than (H, W). Raises RunError
    where the system cannot read it now: it may be undamaged."""
    try:
        check_regular(path)
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:  # PIL raises a dozen kinds for damaged files
        if isinstance(error, OSError) and error.errno not in NO_IMAGE:
            raise RunError(path, f"cannot be read ({reason(error)})", "it is kept; run again when it can be read") from None
        return None
    return pixels if pixels.shape == (*size, 3) else None


def incomplete_batches(folder, number, batch_size):
    """The batches of which an image is missing, as ranges of indices. The whole batch is drawn again, as an undisturbed run
    would: the sums in a matrix product may depend, in the last bit, on what else is in the batch."""
    there = {path.name for path in folder.glob("*.png")}
    batches = (range(first, min(first + batch_size, number)) for first in range(0, number, batch_size))
    return [batch for batch in batches if any(png(folder, index).name not in there for index in batch)]


def is_complete(npz, shape):
    """Whether the file holds images `arr_0` of this shape."""
    try:
        return map_npz(npz, "arr_0").shape == shape
    except (OSError, KeyError, ValueError):
        return False


def write_npz(npz, folder, shape, label_of):
    """Write the images, of this shape (N, H, W, 3), or clips, (N, F, H, W, 3) from strips of their frames, as `arr_0` uint8
    and their labels, label_of(index), as `arr_1` (N,) int64, the same bytes as of numpy.savez, with one image in memory at
    a time. Returns whether that is done: damaged images are deleted instead, to be drawn again with missing ones."""
    bad, number, (*frames, height, width) = [], shape[0], shape[1:-1]

    def images():
        for index in tqdm(range(number), desc="Writing npz", unit="image"):
            pixels = read_png(png(folder, index), (height, math.prod(frames) * width))
            if pixels is None:
                bad.append(index)
                with write_errors(png(folder, index)):
                    png(folder, index).unlink(missing_ok=True)
                pixels = np.zeros(shape[1:], np.uint8)
            yield pixels.reshape(height, *frames, width, 3).swapaxes(0, 1) if frames else pixels

    def write(file):
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            write_array(archive, "arr_0", shape, np.uint8, images())
            write_array(archive, "arr_1", (number,), np.int64, (np.int64(label_of(index)) for index in range(number)))
        if bad:
            raise _DamagedError

    try:
        with write_errors(npz, f"; the images in {folder} are kept"):
            replace_file(npz, write)
    except _DamagedError:
        print(f"{len(bad)} damaged or missing images are drawn again, the first is {bad[0]:06d}.png", file=sys.stderr)
    return not bad


def write_array(archive, name, shape, dtype, rows):
    """Add an array to a zip archive as numpy.savez does, row by row, with the same date always."""
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for row in rows:
            file.write(row.tobytes())


class _DamagedError(Exception):
    """Keeps `replace_file` from giving an incomplete file its name."""
