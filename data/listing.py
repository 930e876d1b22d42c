"""The list of an image folder's files and classes."""

import itertools
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import is_image_file

from runtime import files
from runtime.errors import UserError


class Names:
    """A sequence of strings in one buffer. Data workers are forked and would each copy a list of strings little by little,
    since reading a string writes its reference count."""

    def __init__(self, names):
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]  # a file's name may hold any bytes
        self.buffer, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)  # which also ends an iteration
        return self.buffer[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogatepass")


@dataclass
class Listing:
    """The images of a folder. names: their paths relative to it. labels: (N,) int64, positions in `folders`, the names of
    the class folders. checksum: CRC-32 of names and labels, as eight hexadecimal digits. notes: lines about what was left
    out. captions: the images' texts, where they are read."""

    names: Names
    labels: np.ndarray
    folders: list
    checksum: str
    notes: list
    captions: object = None


def printable(name):
    """A file's name as one line of text that can be printed: bytes that are not UTF-8 become \\udce9 and the like."""
    return str(name).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def list_images(root, loose=False):
    """The Listing of an image folder. Each folder in it is a class, whose images are in it or in folders below it; classes
    are in the order of their names. Hidden files and folders are ignored, and folders without images are no classes. loose:
    images beside the folders are a class too, called ".". Raises UserError where there are no images at all."""
    if not os.path.isdir(root):
        raise UserError(f"--data-path {root}: no such folder")
    found, unreadable = _walk(str(root))
    names, labels, classes, stray, endings = [], [], [], 0, Counter()
    for path, entries in found:
        folder, images = path.split("/")[0], list(filter(is_image_file, entries))
        if path == "." and not loose:
            stray = len(images)
            continue
        if images and folder not in classes[-1:]:
            classes.append(folder)
        names += [f"{path}/{name}".removeprefix("./") for name in images]
        labels += [len(classes) - 1] * len(images)
        others = itertools.filterfalse(is_image_file, entries)
        endings.update(os.path.splitext(name)[1].lower() or "without an ending" for name in others if path != ".")
    empty = sorted({path.split("/")[0] for path, _ in found} - {".", *classes})
    left_out = {
        "folders without images, which are no classes": empty,
        "files whose endings are not those of readable images": [f"{n:,} {ending}" for ending, n in endings.most_common()],
        "images in no class's folder": [f"{stray:,}"] if stray else [],
        "folders that cannot be read (Permission denied)": unreadable,
    }
    notes = [printable(f"Left out of {root}: {what}: {_shortened(of)}") for what, of in left_out.items() if of]
    if not names:
        no_folders = "holds no folders; put each class's images into a folder of its own"
        problem = f"no images in any of its {len(empty)} folders" if empty else no_folders
        raise UserError("; ".join([f"--data-path {root}: {problem}", *notes]))
    lines = [f"{'/'.join(name.split('/')[-2:])} {label}" for name, label in zip(names, labels, strict=True)]
    return Listing(Names(names), np.array(labels, np.int64), classes, files.checksum_of_text(lines), notes)


def _walk(root):
    """([(folder, names of its files)], folders that cannot be read), relative to root, a class's folders one after another
    and sorted. Links are followed, but for those to a folder that they are in, which would never end."""
    found, unreadable, above = [], [], {root: {os.path.realpath(root)}}

    def failed(error):
        if not isinstance(error, PermissionError):
            raise UserError(f"--data-path {error.filename}: cannot be read ({files.reason(error)})")
        unreadable.append(os.path.relpath(error.filename, root))

    for path, folders, names in os.walk(root, onerror=failed, followlinks=True):
        found.append((Path(os.path.relpath(path, root)).as_posix(), sorted(n for n in names if not n.startswith("."))))
        for name in list(folders):
            below = os.path.join(path, name)
            real = os.path.realpath(below)
            if name.startswith(".") or real in above[path]:
                folders.remove(name)
            else:
                above[below] = above[path] | {real}
    return sorted(found, key=lambda part: (part[0].split("/")[0], part[0])), unreadable


def _shortened(words, most=5):
    return ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")
