"""Images in the rows of a table: Parquet files, a folder that `save_to_disk` of the package datasets has written, or a data
set of the Hugging Face hub. Parquet becomes Arrow once, in that package's cache. Arrow files are mapped: a row is read
without the others, and processes share the memory.

listing = list_table(DataConfig("imagenet-1k/data"))
image = open_image(listing.table.file(7), "row 7")
"""

import contextlib
import io
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np

from data.captions import Captions, is_text
from data.listing import make_listing, printable
from data.pretrained import attempt
from models import MAX_CLASSES
from runtime.errors import UserError

SPLITS = ("train", "validation", "valid", "val", "test")  # with which the name of a Parquet file may begin
NO_LABELS = "none"  # of --label-column: all images are of one class
KINDS = {  # what a column may hold, by its type in Arrow
    "images": r"(large_)?binary|struct<bytes: (large_)?binary, path: (large_)?string>",
    "numbers": r"u?int\d+",
    "texts": r"(large_)?string",
    "lists of texts": r"(large_)?list<\w+: (large_)?string>",
}


def split_of(path):
    """(path, split) of "PATH:SPLIT"; the split is None where none is named."""
    base, colon, split = str(path).rpartition(":")
    return (base, split) if colon and not os.path.lexists(path) else (str(path), None)


def parquet_files(path):
    """{split: Parquet files} of a folder of them, or with data/, as repositories of the hub have it; or of one file."""
    found, own = defaultdict(list), [Path(path)] if str(path).endswith(".parquet") and os.path.isfile(path) else []
    for file in sorted(own + [file for pattern in ("*.parquet", "data/*.parquet") for file in Path(path).glob(pattern)]):
        word = re.match(r"[a-z]*", file.name)[0]
        found[word if word in SPLITS else "train"].append(str(file))
    return found


def is_table(path):
    """Whether --data-path names a table: of the hub where there is no such path and it looks like owner/name."""
    base, _ = split_of(path)
    if os.path.lexists(base):
        saved = any(Path(base, name).exists() for name in ("state.json", "dataset_dict.json"))
        return saved or is_arrow_file(base) or bool(parquet_files(base))
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base))


def is_arrow_file(path):
    return str(path).endswith(".arrow") and os.path.isfile(path)


def open_rows(path):
    """The `datasets.Dataset` of a table. Raises UserError."""
    (base, split), where = split_of(path), f"--data-path {path}"
    try:
        import datasets  # takes a second or two to import
    except ImportError:
        problem = "is a table" if os.path.lexists(base) else "no such folder; or a data set of the hub"
        raise UserError(where, f"{problem}, which needs the package datasets", 'pip install "datasets>=4.0"') from None

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are raised, and become one line

    def choose(splits):
        if split not in splits if split else len(splits) > 1 and "train" not in splits:
            raise UserError(where, f"its splits are {', '.join(splits)}", f"name one of them: {base}:{min(splits)}")
        return split or ("train" if "train" in splits else min(splits))

    def read(_):
        if is_arrow_file(base):
            return datasets.Dataset.from_file(base)
        if not (sources := parquet_files(base)):
            rows = datasets.load_from_disk(base) if os.path.lexists(base) else datasets.load_dataset(base)
            return rows[choose(rows)] if isinstance(rows, dict) else rows
        builder = datasets.load_dataset_builder("parquet", data_files=sources[choose(sources)])
        cache, needed = datasets.config.HF_DATASETS_CACHE, sum(map(os.path.getsize, sources[choose(sources)]))
        os.makedirs(cache, exist_ok=True)
        if not os.path.isdir(builder.cache_dir) and needed > (free := shutil.disk_usage(cache).free):
            problem = f"needs {needed / 1e6:,.1f} MB in {cache}, its copy as Arrow, and {free / 1e6:,.1f} MB are free"
            raise UserError(where, problem, "set HF_DATASETS_CACHE to a folder on another disk")
        try:
            builder.download_and_prepare()
        except datasets.exceptions.DatasetGenerationError as error:
            raise error.__cause__ from None
        return builder.as_dataset("train")

    cached = os.path.isdir(os.path.join(datasets.config.HF_DATASETS_CACHE, base.replace("/", "___")))
    return attempt("--data-path", base, "table of images", "check the path, or the name on the hub", read, datasets, cached)


def columns_in(path, columns):
    """{option: column}, without the columns that the table at `path` lacks: options of --data-path are for other tables of
    the command too, where they fit. NO_LABELS stays. Raises UserError."""
    there = {NO_LABELS, *(open_rows(path).column_names if any(columns.values()) else ())}
    return {option: column if column in there else None for option, column in columns.items()}


@contextlib.contextmanager
def beside_the_data():
    """For a table beside that of --data-path: let errors of the block that advise to name a column say how it can be."""
    try:
        yield
    except UserError as error:
        also = r"\1, if --data-path has it too, or give data with one"
        error.way_out = re.sub(r"(name one with --\w+-column)", also, error.way_out or "")
        raise


class MappedBytes(io.RawIOBase):
    """Bytes as a file, of which no more is read than is asked for. Unlike in Arrow's own, one can seek past the end: once
    all of Pillow's formats are loaded, as by writing a grid, each is tried for every image, and some do."""

    def __init__(self, data):
        self.data, self.position = memoryview(data).cast("B"), 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.position = max(0, offset + (0, self.position, len(self.data))[whence])
        return self.position

    def readinto(self, out):
        part = self.data[self.position : self.position + len(out)]
        out[: len(part)] = part
        self.position += len(part)
        return len(part)


class Table:
    """The columns of a table. kinds: {column: what it holds, a key of KINDS or "classes"}. column: that of the images
    (default: the only one). A copy in another process opens the files for itself."""

    def __init__(self, path, column=None):
        import pyarrow.compute as pc

        rows = open_rows(path)
        self.path, self.features, self.columns = path, rows.features, rows.with_format("arrow")[:]  # mapped, not read
        self.kinds = {}
        for field in self.columns.schema:
            found = (kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, str(field.type)))
            named = hasattr(self.features[field.name], "names")  # a ClassLabel
            self.kinds[field.name] = "classes" if named else next(found, str(field.type))
        self.column = self.find("--image-column", column, ("images",))
        self.data, self.paths = self.columns.column(self.column), None
        if "path" in str(self.data.type):
            self.data, self.paths = (pc.struct_field(self.data, part) for part in ("bytes", "path"))

    def __reduce__(self):
        return Table, (self.path, self.column)

    def __len__(self):
        return len(self.data)

    def file(self, row):
        """An image as PIL opens it: its bytes, mapped, so that a header alone may be read; or its path."""
        data, path = self.data[row].as_buffer(), self.paths and self.paths[row].as_py()
        return path if path and not data else io.BufferedReader(MappedBytes(data or b""))

    def find(self, option, given, *groups, needed=True):
        """The column that `option` has given, or the only one of the first of these groups of kinds that has any; None
        where none has, and none is needed. Raises UserError."""
        columns = f"its columns are {', '.join(f'{printable(name)} ({kind})' for name, kind in self.kinds.items())}"
        wanted = " or ".join(kind for group in groups for kind in group)
        if given is not None and not any(self.kinds.get(given) in group for group in groups):
            raise UserError(f"{option} {given}", f"{self.path} has no such column of {wanted}", columns)
        found = ([name for name, kind in self.kinds.items() if kind in group] for group in groups)
        found = [given] if given is not None else next(filter(None, found), [])
        if len(found) > 1 or (needed and not found):
            problem, way_out = f"has {len(found) or 'no'} columns of {wanted}", f"name one with {option}; {columns}"
            raise UserError(f"--data-path {self.path}", problem, way_out)
        return found[0] if found else None

    def wrong(self, row, problem):
        return UserError(f"{self.path}, row {row}", problem, "correct it, or name another column")

    def labels(self, name):
        """(labels (N,) int64, names of the classes) of a column. Raises UserError."""
        column, kind = self.columns.column(name), self.kinds[name]
        for row in np.flatnonzero(column.is_null())[:1]:
            raise self.wrong(row, f"has no {name}")
        if kind == "texts":
            classes, labels = np.unique(column.to_pylist(), return_inverse=True)
            return labels, classes.tolist()
        labels = column.to_numpy()
        for row in np.flatnonzero((labels < 0) | (labels > MAX_CLASSES))[:1]:  # -1 where a test set's are not known
            raise self.wrong(row, f"its {name} is {labels[row]}, no number of a class")
        return labels, self.features[name].names if kind == "classes" else [*map(str, range(labels.max() + 1))]

    def captions(self, name):
        """The Captions of a column. Raises UserError."""
        texts = [[entry] if isinstance(entry, str) else entry for entry in self.columns.column(name).to_pylist()]
        for row, entry in enumerate(texts):
            if not entry or not all(map(is_text, entry)):
                raise self.wrong(row, f"has no {name}")
        return Captions(texts)


def list_table(config):
    """The Listing of the table that a DataConfig names. Raises UserError."""
    import pyarrow.compute as pc

    table, with_text, label, text = Table(config.data_path, config.image_column), bool(config.text_encoder), None, None
    if not len(table):
        raise UserError(f"--data-path {config.data_path}", "holds no rows", "give a table with images")
    if config.label_column != NO_LABELS:
        groups = [("classes",), ("numbers",), ("texts",)][: 1 if with_text and not config.label_column else 3]
        label = table.find("--label-column", config.label_column, *groups, needed=False)
    labels, classes = table.labels(label) if label else (np.zeros(len(table), np.int64), ["."])
    if with_text:
        text = table.find("--caption-column", config.caption_column, ("texts", "lists of texts"))
    elif config.caption_column:
        raise UserError(f"--caption-column {config.caption_column}", "needs --text-encoder", "give it, or leave this out")
    paths = table.paths.to_pylist() if table.paths else [None] * len(table)
    names = [os.path.basename(path) if path else f"row {row}" for row, path in enumerate(paths)]
    if label:  # as in a folder of images
        names = [f"{classes[number]}/{name}" for number, name in zip(labels, names, strict=True)]
    used = {"images": table.column, "labels": label, "texts": text}
    used = ", ".join(f"{what} {printable(name)}" for what, name in used.items() if name)
    sizes = [] if all(paths) else map(str, pc.binary_length(table.data).to_pylist())  # tell rows apart that have no names
    listing = make_listing(names, labels, classes, [f"Columns of {config.data_path}: {used}"], sizes)
    listing.table, listing.captions = table, table.captions(text) if text else None
    return listing
