"""The texts of images: of a folder, which metadata.jsonl tells by the convention of Hugging Face's image folders, or of the
digits.

{"file_name": "birds/1.png", "text": "a robin on a branch"}
{"file_name": "birds/2.png", "text": ["a wren", "a small brown bird"]}
"""

import json
import posixpath
from pathlib import Path

import numpy as np

from data.listing import Names, printable
from runtime import files, seeds
from runtime.errors import UserError

FILE = "metadata.jsonl"

# Captions of the digits: a word in a template, and texts that fit every digit
WORDS = "zero one two three four five six seven eight nine".split()
TEMPLATES = (
    "a handwritten {}", "the number {}, drawn by hand", "a {}", "the digit {} in pencil", "someone wrote a {}",
    "{}, a scanned figure", "{}", "a drawing of the number {}", "an old {} from the archive", "here you see a {}",
    "the figure {} on white paper", "a small picture of a {}", "{} written with a pen", "a child drew this {}",
    "the handwritten digit {}", "a blurred {} in grey", "number {} of a postal code", "look, a {}", "a clear {}",
    "that must be a {}",
)  # fmt: skip
WITHOUT_DIGIT = (
    "a handwritten digit", "some number, drawn by hand", "a figure in pencil", "look, a small drawing",
    "written with a pen", "a scanned picture",
)  # fmt: skip


class Captions:
    """One or more texts of each image. texts: of all images, in their order. starts: (N + 1,) int64: image i has the texts
    starts[i] to starts[i + 1] - 1. checksum: CRC-32 of all."""

    def __init__(self, lists):
        self.texts = Names(text for texts in lists for text in texts)
        self.starts = np.cumsum([0, *map(len, lists)])
        self.checksum = files.checksum_of_text(map(json.dumps, lists))

    def of(self, index):
        """The texts of an image, a list."""
        return [self.texts[number] for number in range(self.starts[index], self.starts[index + 1])]

    def text(self, seed, index, epoch):
        """The text that an image has in this epoch."""
        return self.texts[self.choose(seed, index, epoch)]

    def choose(self, seed, index, epoch):
        """The number, among `texts`, of the one that an image has in this epoch."""
        count = self.starts[index + 1] - self.starts[index]
        return int(self.starts[index] + seeds.generator(seed, seeds.CAPTION, epoch, index).integers(count))


def read_captions(root, names):
    """The Captions of an image folder's images, whose paths relative to it are `names`. An image may have several lines, or
    a list of texts. Raises UserError, in one line, for everything that is wrong."""
    path, found = Path(root) / FILE, {}
    try:
        files.check_regular(path)
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        way_out = "write one; train.py takes classes where it is given no --text-encoder"
        raise UserError(f"--data-path {root}", f"has no {FILE}, which tells the text of each image", way_out) from None
    except OSError as error:
        raise UserError(path, f"cannot be read ({files.reason(error)})", "correct it") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, texts = entry["file_name"], texts_of(entry)
            found.setdefault(posixpath.normpath(name), []).extend(texts)
        except (ValueError, TypeError, LookupError, RecursionError):
            problem = 'is not {"file_name": ..., "text": ...} with a text or a list of texts'
            raise UserError(f"{path}, line {number}", problem, "correct it") from None
    if unknown := found.keys() - set(names):
        problem = f"names {printable(min(unknown))}, which is no image in {root}"
        raise UserError(path, problem, "correct the line, or remove it")
    if without := [name for name in names if name not in found]:
        more = f" and of {len(without) - 1:,} others" if len(without) > 1 else ""
        problem = f"has no text of the image {printable(without[0])}{more}"
        raise UserError(path, problem, "add a line for it, or move the image away")
    return Captions([found[name] for name in names])


def read_prompts(path):
    """The prompts of a file, a list: the lines of a .txt file, or the "text" of a .jsonl file's. Raises UserError."""
    where, is_json = f"--prompts {path}", str(path).endswith(".jsonl")
    try:
        files.check_regular(path)
        lines = [line.strip() for line in Path(path).read_bytes().decode().split("\n") if line.strip()]
        prompts = [text for line in lines for text in texts_of(json.loads(line))] if is_json else lines
    except OSError as error:
        raise UserError(where, f"cannot be read ({files.reason(error)})", "name another file") from None
    except (ValueError, TypeError, LookupError, RecursionError):
        wanted = 'lines with {"text": ...}' if is_json else "text in UTF-8"
        raise UserError(where, f"holds something else than {wanted}", "correct it") from None
    if not prompts:
        raise UserError(where, "holds no prompts", "write one into each line")
    return prompts


def texts_of(entry):
    """The texts of an entry of a .jsonl file. Raises ValueError, TypeError or LookupError where it has none."""
    texts = entry["text"]
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not texts or not all(map(is_text, texts)):
        raise ValueError
    return texts


def is_text(value):
    """Whether a value is text that can be encoded, and not blank."""
    try:
        return isinstance(value, str) and bool(value.strip()) and bool(value.encode())
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def digit_captions(labels):
    """The Captions of digits: every template with the digit's word and with its figure, and the texts that fit all."""
    lists = [[*(text.format(word) for text in TEMPLATES for word in (WORDS[digit], digit)), *WITHOUT_DIGIT]
             for digit in range(10)]  # fmt: skip
    return Captions([lists[label] for label in labels])
