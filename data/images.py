"""Images for training: folders of them, or the handwritten digits that come with scikit-learn. load_dataset() also takes
folders of stored latents."""

import itertools
import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from data.autoencoder import load_space
from data.class_names import readable_names
from data.crop import center_crop_arr
from data.listing import list_images, printable
from data.order import is_mirrored
from data.stored_latents import StoredLatents, is_latents_folder
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

    listing: the folder's, where it is known. channels: of the images. classes: a name for each label. folders: the names of
    their folders. notes: lines to tell the user."""

    channels = 3
    in_memory = False

    def __init__(self, root, image_size, seed=0, flip=True, skip_bad=False, listing=None):
        listing = listing or list_images(root)
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
        """[number of images, CRC-32 of their names and labels]: by it a resumed run knows its data."""
        return [len(self), int(self.checksum, 16)]

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
        return {"image": image, "label": int(self.labels[source]), "index": index, "replaced": replaced}


class Digits(ImageDataset):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, ten classes, never mirrored."""

    channels = 1
    in_memory = True

    def __init__(self, image_size):
        from sklearn.datasets import load_digits  # takes a second to import

        if image_size != 8:
            raise UserError(f"--image-size {image_size}: the digits are 8x8 pixels; pass --image-size 8")
        data = load_digits()
        self.images = torch.from_numpy(np.round(data.images[:, None] * (255 / 16)).astype(np.uint8))  # 0..16 -> 0..255
        self.labels, self.classes, self.notes = data.target, [str(digit) for digit in range(10)], []
        self.checksum = files.checksum_of_text(["digits"])

    def name(self, index):
        return f"digits[{index}]"

    def __getitem__(self, key):
        index, _ = key
        return {"image": self.images[index], "label": int(self.labels[index]), "index": index, "replaced": ""}


def load_dataset(config, image_size, seed=0, context=None):
    """The dataset that a DataConfig names: an image folder, a folder of latents, or the digits. With a context all ranks
    call this, and rank 0 lists the images for all. Raises UserError."""
    path = config.data_path

    def look():
        return "latents" if is_latents_folder(path) else "digits" if path == "digits" else list_images(path)

    found = context.run_on_main(look) if context else look()
    if found == "digits":
        return Digits(image_size)
    if found == "latents":
        dataset = StoredLatents(path, seed, config.flip)
        dataset.check(image_size, config.skip_bad_images)
        return dataset
    return ImageDataset(path, image_size, seed, config.flip, config.skip_bad_images, found)
