"""numpy's .npy format: its header, read from a stream that need not be a file, and checked before memory is allocated; and
the arrays of an .npz file as memory maps."""

import math
import zipfile

import numpy as np

from runtime.files import check_regular, reason


def read_npy_header(stream, size=None, row_major=True):
    """(shape, dtype) of the .npy array in a binary stream, which is left at the first byte of the data.

    size: bytes of the whole .npy, header included, if known. row_major: refuse Fortran order. Raises ValueError, whose
    text continues a sentence about the array."""
    try:
        version = np.lib.format.read_magic(stream)
        # 3.0 differs from 2.0 in the encoding of the names of fields, which our arrays do not have
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"its version {version[0]}.{version[1]} is unknown")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
    except Exception as error:  # a damaged header makes numpy's parser raise many kinds
        raise ValueError(f"is not a readable .npy array ({reason(error)}); write it again with numpy") from None
    if not all(isinstance(length, int) and length >= 0 for length in shape):
        raise ValueError(f"has the impossible shape {shape}; write it again")
    if dtype.hasobject:
        raise ValueError("holds Python objects; must hold numbers")
    if fortran_order and row_major:
        raise ValueError(f"has shape {shape} in column-major (Fortran) order; save it in row-major order, as "
                         "numpy.ascontiguousarray(x)")  # fmt: skip
    promised = math.prod(shape) * dtype.itemsize
    if size is not None and promised > (found := max(size - stream.tell(), 0)):
        raise ValueError(f"has a header that promises {promised:,} bytes where there are {found:,}; the file is damaged")
    return shape, dtype


def map_npz(path, name):
    """The array of this name in an .npz file whose arrays are not compressed, as a memory map: what is used of it is read.
    Raises KeyError where there is none, ValueError, whose text continues a sentence about the file, and OSError."""
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"has {name} compressed; write it with numpy.savez")
            with archive.open(member) as stream:
                shape, dtype = read_npy_header(stream, member.file_size)
                header = stream.tell()
    except zipfile.BadZipFile as error:
        raise ValueError(f"is not a readable .npz file ({error})") from None
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)  # its name's and its extra field's length, which differ from the directory's
        sizes = np.frombuffer(file.read(4), "<u2")
    return np.memmap(path, dtype, "r", member.header_offset + 30 + int(sizes.sum()) + header, shape)
