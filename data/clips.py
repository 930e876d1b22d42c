"""Clips for training: a folder of classes that hold animated GIF or WebP files, videos, or folders of frames; and MNIST
digits that move, made on the spot. The image of an item is (C, F, H, W)."""

import itertools
import os

import numpy as np
import torch
from PIL import Image

from data.crop import center_crop_arr
from data.images import ImageDataset, ImageError, Mnist, open_image, to_rgb
from data.listing import VIDEOS, is_image_file, printable
from runtime import files, seeds
from runtime.errors import UserError

SIDE, DIGIT, SPEED = 32, 16, 3  # of moving digits: the window's and the digit's side in pixels, the largest step along each
SPEEDS = [speed for speed in itertools.product(range(-SPEED, SPEED + 1), repeat=2) if any(speed)]


class ClipDataset(ImageDataset):
    """A folder of clips, as `data.listing.clips_in` finds them. Of each `num_frames` are taken, each stride-th, from a
    start that is a function of (seed, epoch, clip); all are cropped and flipped alike. Others: see `ImageDataset`."""

    def __init__(self, root, image_size, num_frames, stride=1, **options):
        super().__init__(root, image_size, **options)
        self.num_frames, self.stride = num_frames, stride

    def read(self, source, key):
        index, epoch = key
        random = seeds.generator(self.seed, seeds.CLIP_START, epoch, index)
        frames = read_frames(self.path(source), self.num_frames, self.stride, random)
        crops = [np.array(center_crop_arr(frame, self.image_size)) for frame in frames]
        return torch.from_numpy(np.stack(crops)).permute(3, 0, 1, 2)  # (C, F, H, W)


def read_frames(path, number, stride, random):
    """`number` RGB images of a clip, each stride-th, from a start drawn by `random`, numpy's. Raises ImageError."""

    def wanted(count):
        span = (number - 1) * stride + 1
        if count < span:
            text = f"has {count} frames, of which {span} are needed for {number} with a stride of {stride}"
            raise ImageError(printable(path), text, "remove it, or lower --num-frames or --frame-stride in a new run")
        start = int(random.integers(count - span + 1))
        return range(start, start + span, stride)

    if os.path.isdir(path):
        names = sorted(name for name in os.listdir(path) if is_image_file(name) and not name.startswith("."))
        return [open_image(os.path.join(path, names[i])) for i in wanted(len(names))]
    try:
        if not os.path.isfile(path):
            raise OSError("not a regular file")
        return [*(video_frames if path.lower().endswith(VIDEOS) else animation_frames)(path, wanted)]
    except UserError:
        raise
    except Exception as error:  # Pillow and PyAV raise a dozen kinds for damaged files
        reason = printable(files.reason(error).replace(str(path), "it"))
        raise ImageError(printable(path), f"not a readable clip ({reason})", "remove it") from None


def animation_frames(path, wanted):
    with Image.open(path) as file:
        for i in wanted(getattr(file, "n_frames", 1)):
            file.seek(i)
            yield to_rgb(file)


def video_frames(path, wanted):
    try:
        import av
    except ImportError:
        raise UserError(f"--data-path {printable(path)}", "videos need the package av", "pip install av") from None
    with av.open(str(path)) as file:
        count = file.streams.video[0].frames or sum(1 for _ in file.decode(video=0))
    chosen = wanted(count)
    with av.open(str(path)) as file:
        for i, frame in enumerate(file.decode(video=0)):
            if i in chosen:
                yield frame.to_image()
            if i >= chosen[-1]:
                return
    raise OSError(f"it has fewer frames than the {count} that it promises")


class MovingDigits(Mnist):
    """MNIST digits of 16x16 pixels that move through a window of 32x32, straight and at a constant speed, and bounce off
    its sides. Clip i shows digit i mod 5000; where it starts and how it moves, by whole pixels, is a function of (seed, i).
    Without num_frames images: the first frames."""

    source, title, side, per_digit, channels = "moving-mnist", "the moving digits", SIDE, 4, 1

    def __init__(self, image_size, seed=0, num_frames=None):
        self.check_side(image_size)
        values, labels = self.load()
        self.digits = [shrink(digit) for digit in values]
        self.labels, self.classes = np.tile(labels, self.per_digit), [str(label) for label in range(10)]
        self.folders, self.seed, self.flip, self.num_frames = self.classes, seed, False, num_frames
        self.checksum = files.checksum_of_text([self.source, str(seed), str(num_frames)])

    def read(self, index):
        random = seeds.generator(self.seed, seeds.CLIP, index)
        start, speed = random.integers(0, SIDE - DIGIT + 1, 2), SPEEDS[random.integers(len(SPEEDS))]
        frames = np.zeros((1, self.num_frames or 1, SIDE, SIDE), np.uint8)
        for frame, (y, x) in zip(frames[0], bounce(start, speed, frames.shape[1]), strict=True):
            frame[y : y + DIGIT, x : x + DIGIT] = self.digits[index % len(self.digits)]
        return {"image": torch.from_numpy(frames if self.num_frames else frames[:, 0]), "label": int(self.labels[index])}


def shrink(digit):
    """(28, 28) in [0, 255] -> (16, 16) uint8: the 20x20 pixels in the middle, which hold all of a digit, averaged."""
    return np.array(Image.fromarray(digit[4:24, 4:24].astype(np.uint8)).resize((DIGIT, DIGIT), Image.Resampling.BOX))


def bounce(start, speed, number, travel=SIDE - DIGIT):
    """Positions (number, ...) of what starts in [0, travel], moves by `speed` and is reflected: triangular waves."""
    path = (np.asarray(start) + np.asarray(speed) * np.arange(number).reshape(-1, *[1] * np.ndim(speed))) % (2 * travel)
    return np.minimum(path, 2 * travel - path)
