"""The list of an image folder's files and classes, and readable names of classes."""

import functools
import itertools
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime import files
from runtime.errors import UserError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's


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
    """The images of a folder. names: their paths relative to it, for `to_path`. labels: (N,) int64, positions in `folders`,
    the names of the class folders. checksum: CRC-32 of names and labels, as eight hexadecimal digits. notes: lines about
    what was left out. captions: the images' texts, where they are read. table: whose rows the images are."""

    names: Names
    labels: np.ndarray
    folders: list
    checksum: str
    notes: list
    captions: object = None
    table: object = None


def make_listing(names, labels, folders, notes, extra=()):
    """The Listing of images. extra: lines that count for the checksum too."""
    lines = [f"{'/'.join(name.split('/')[-2:])} {label}" for name, label in zip(names, labels, strict=True)]
    return Listing(Names(names), np.array(labels, np.int64), folders, files.checksum_of_text([*lines, *extra]), notes)


def printable(name):
    """A file's name as one line of text that can be printed: bytes that are not UTF-8 become \\udce9 and the like."""
    return str(name).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def to_text(path):
    """A file's name as text in UTF-8, whatever the locale, whose encoding Python reads names with."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def to_path(name):
    """The other way round."""
    return os.fsdecode(name.encode("utf-8", "surrogateescape"))


ANIMATIONS = (".gif", ".webp")  # which Pillow reads
VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")  # which PyAV reads


def is_image_file(name):
    return name.lower().endswith(ENDINGS)


def images_in(folder, names):
    """(the images, the other files) of the names of a folder's files."""
    return [*filter(is_image_file, names)], [*itertools.filterfalse(is_image_file, names)]


def clips_in(folder, names):
    """(the clips, the other files) of the names of a folder's files: animations and videos; and of a folder in a class's,
    all its pictures, the frames of one clip, whose name is empty."""
    frames = [name for name in names if is_image_file(name)] if "/" in folder else []
    clips = [name for name in names if name.lower().endswith(ANIMATIONS + VIDEOS) and name not in frames]
    return clips + [""] * bool(frames), [name for name in names if name not in clips + frames]


def list_images(root, loose=False, clips=False):
    """The Listing of an image folder. Each folder in it is a class, whose images are in it or in folders below it; classes
    are in the order of their names. Hidden files and folders are ignored, and folders without images are no classes. loose:
    images beside the folders are a class too, ".". clips: what `clips_in` finds. Raises UserError where there are none."""
    if not os.path.isdir(root):
        problem = "is a file, and neither a .parquet nor an .arrow file" if os.path.lexists(root) else "no such folder"
        raise UserError(f"--data-path {root}", problem, "name a folder with one folder of images for each class")
    found, left_out = walk(root, "--data-path ", clips_in if clips else images_in)
    what, names, labels, classes, stray = "clips" if clips else "images", [], [], [], 0
    for path, images in found:
        folder = path.split("/")[0]
        if path == "." and not loose:
            stray = len(images)
            continue
        if images and folder not in classes[-1:]:
            classes.append(folder)
        names += [f"{path}/{name}".removeprefix("./").rstrip("/") for name in images]
        labels += [len(classes) - 1] * len(images)
    empty = sorted({path.split("/")[0] for path, _ in found} - {".", *classes})
    left_out = {f"folders without {what}, which are no classes": empty, **left_out}
    notes = notes_of(root, left_out | {f"{what} in no class's folder": [f"{stray:,}"] if stray else []})
    if not names:
        problem = f"no {what} in any of its {len(empty)} folders" if empty else "holds no folders"
        others = "" if clips else "; clips are read by train.py and extract_latents.py with --num-frames"
        way_out = f"put each class's {what} into one of its own{others}"
        raise UserError(f"--data-path {root}", problem, "; ".join([way_out, *notes]))
    return make_listing(names, labels, classes, notes)


def walk(root, option="", files_in=images_in):
    """([(folder, names of its images)], {what was left out: words}) of a folder and all below it, as text relative to it,
    without hidden ones; the folders of a class one after another, and sorted. Links are followed, but for those to a folder
    that they are in, which would never end. Raises UserError, beginning with `option`, where the folder cannot be read."""
    root = str(root)
    found, unreadable, endings, above = [], [], Counter(), {root: {os.path.realpath(root)}}

    def failed(error):
        if not isinstance(error, PermissionError) or error.filename == root:
            raise UserError(f"{option}{printable(error.filename)}: cannot be read ({files.reason(error)})")
        unreadable.append(to_text(os.path.relpath(error.filename, root)))

    for path, folders, names in os.walk(root, onerror=failed, followlinks=True):
        folder = to_text(Path(os.path.relpath(path, root)).as_posix())
        images, others = files_in(folder, sorted(to_text(name) for name in names if not name.startswith(".")))
        found.append((folder, images))
        if folder != ".":
            endings.update(os.path.splitext(name)[1].lower() or "without an ending" for name in others)
        for name in list(folders):
            below = os.path.join(path, name)
            real = os.path.realpath(below)
            if name.startswith(".") or real in above[path]:
                folders.remove(name)
            else:
                above[below] = above[path] | {real}
    left_out = {
        "files whose endings are not those of readable images": [f"{n:,} {ending}" for ending, n in endings.most_common()],
        "folders that cannot be read (Permission denied)": unreadable,
    }
    return sorted(found, key=lambda part: (part[0].split("/")[0], part[0])), left_out


def notes_of(root, left_out, most=5):
    """A line for each kind of what was left out: {what: words}."""
    short = {what: ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")
             for what, words in left_out.items() if words}  # fmt: skip
    return [printable(f"Left out of {root}: {what}: {words}") for what, words in short.items()]


# ----------------------------------------------------------------------------------------------------------------------
# Names of classes


@functools.cache
def imagenet_names():
    """{WordNet number: name} of all ImageNet classes, such as {"n02099601": "golden retriever"}. The first 1000 are those
    of ILSVRC 2012 in the order of their labels, with torchvision's names; the others have WordNet's first terms."""
    from timm.data import ImageNetInfo
    from torchvision.models import ResNet50_Weights

    thousand = dict(zip(ImageNetInfo().label_names(), ResNet50_Weights.IMAGENET1K_V1.meta["categories"], strict=True))
    terms = ImageNetInfo("imagenet-21k-goog").label_descriptions(as_dict=True)
    return thousand | {number: text.split(",")[0] for number, text in terms.items() if number not in thousand}


def readable_names(folders):
    """A name for each class's folder: its own; but where all folders are called by WordNet numbers that ImageNet has, their
    names, which are followed by the number where several classes have the same."""
    if not all(re.fullmatch(r"n\d{8}", folder) and folder in imagenet_names() for folder in folders):
        return list(folders)
    names = [imagenet_names()[folder] for folder in folders]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({folder})" for name, folder in zip(names, folders, strict=True)]


def comparable(name):
    """A name in the form in which names are compared: lower case, composed (a Mac's folders have decomposed names), and in
    UTF-8 where an ASCII locale has kept its bytes apart."""
    return unicodedata.normalize("NFC", name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")).lower()
