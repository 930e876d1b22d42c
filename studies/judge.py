"""A judge of generated images: a small convolutional classifier of the real ones, on which no generative model is trained.

    images = RealImages.load("digits", 8)                     # or "mnist", 28; or a folder of images and a size
    judge = Judge.open(images, "results/digits.judge.pt")     # trains the classifier, or reads it
    judge.measure(samples, labels)                            # {"frechet_distance": ..., "class_accuracy": ...}

The classifier has 64 features, so that a thousand images suffice for a covariance. Distances are to the training images,
and `judge.floor(count)` is that of as many real test images, which neither the classifier nor a generative model has seen.
Everything is computed on the CPU with fixed seeds, and the same number of threads gives the same numbers.
"""

import itertools
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import files
from data.autoencoder import to_model_range
from data.config import DataConfig
from data.images import DATASETS, load_dataset
from evaluation.metrics import Statistics, frechet_distance
from runtime.devices import has_bf16
from runtime.errors import UserError
from runtime.files import checksum_of_text

FEATURES = 64
LARGEST_TEST_SET = 10_000


@dataclass
class RealImages:
    """Real images in memory, all of one size: train and test (N, C, H, W) uint8 with labels (N,) int64. classes: their
    names. flip: whether training may flip them, which digits do not stand. identity: of the data, as text."""

    train: torch.Tensor
    train_labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor
    classes: list
    flip: bool
    identity: str

    @classmethod
    def load(cls, data, image_size):
        """data: "digits", "mnist", or a folder of images: one that holds train and test, each with one folder a class; or
        one with one folder a class. Where there is no test set it is a quarter of the images, at most a thousand, chosen by
        a fixed seed. Raises UserError."""
        if data not in DATASETS and all(os.path.isdir(os.path.join(data, part)) for part in ("train", "test")):
            train, test = (
                load_dataset(DataConfig(os.path.join(data, p), flip=False), image_size) for p in ("train", "test")
            )
            if train.classes != test.classes:
                raise UserError(f"--data {data}: train and test have different classes")
            identity = [image_size, *train.fingerprint(), *test.fingerprint()]
            (images, labels), (test_images, test_labels) = read(train), read(test, LARGEST_TEST_SET)
        else:
            train = load_dataset(DataConfig(data, flip=False), image_size)
            images, labels = read(train)
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            held_out, kept = order.tensor_split([min(len(order) // 4, 1000)])
            images, labels, test_images, test_labels = images[kept], labels[kept], images[held_out], labels[held_out]
            identity = [image_size, *train.fingerprint()]
        if min(len(labels), len(test_labels)) < 2:
            raise UserError(f"--data {data}: has too few images to train and to test a classifier")
        flip, text = data not in DATASETS, checksum_of_text(map(str, identity))
        return cls(images, labels, test_images, test_labels, train.classes, flip, text)


def read(dataset, most=None):
    """(images (N, C, H, W) uint8, labels (N,)) of a dataset, in the order of a fixed seed; `most` of them at most."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:most]
    items = [dataset[int(index), 0] for index in order]
    return torch.stack([item["image"] for item in items]), torch.tensor([item["label"] for item in items])


def convolution(channels, width, stride=1, side=3):
    layer = nn.Conv2d(channels, width, side, stride, side // 2, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = convolution(width, width)

    def forward(self, x):
        return x + self.layer(x)


class Classifier(nn.Module):
    """A small residual network. Each of its stages halves the resolution, down to 4 pixels or a little more. The features
    are the means of the last layer's channels over the image."""

    def __init__(self, channels, image_size, num_classes):
        super().__init__()
        widths = (24, 48, 64, 96, 128)[: max(2, int(math.log2(image_size)) - 1)]
        layers = [convolution(channels, widths[0])]
        for width, following in itertools.pairwise(widths):
            layers += [convolution(width, following, stride=2), Residual(following)]
        self.trunk = nn.Sequential(*layers, convolution(widths[-1], FEATURES, side=1))
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x):
        """x: (N, C, H, W) in [-1, 1]. Returns (N, 64)."""
        return self.trunk(x).mean(dim=(2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def train_classifier(images, progress=True):
    """A Classifier of the training images of RealImages: AdamW with one cycle of the learning rate; images are shifted by
    up to an eighth of their side, and flipped where that is allowed."""
    _, channels, side, _ = images.train.shape
    epochs, batch_size, shift = min(40, max(8, 200_000 // len(images.train))), 128, max(1, side // 8)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu")))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Classifier(channels, side, len(images.classes)).to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
        steps = epochs * -(-len(images.train) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        with tqdm(total=steps, desc="Judge", unit="step", disable=not progress) as bar:
            for _ in range(epochs):
                for batch in torch.randperm(len(images.train)).split(batch_size):
                    x = to_model_range(images.train[batch])
                    rows, columns = torch.randint(2 * shift + 1, (2,)).tolist()  # of the whole batch
                    x = F.pad(x, [shift] * 4, mode="replicate")[:, :, rows : rows + side, columns : columns + side]
                    if images.flip:
                        x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
                    x = x.contiguous(memory_format=torch.channels_last)
                    optimizer.zero_grad()
                    with autocast:
                        logits = network(x)
                    F.cross_entropy(logits.float(), images.train_labels[batch], label_smoothing=0.1).backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
    return network.eval().requires_grad_(False)


def compare(value, bound):
    """(whether the value keeps its bound, words about it). bound: (">=" or "<", number), or None."""
    if bound is None:
        return True, ""
    sign, limit = bound
    kept = value >= limit if sign == ">=" else value < limit
    return kept, f"   bound: {sign} {limit}{'' if kept else ', MISSED'}"


class Judge:
    """Measures images against the real ones. accuracy: the classifier's share of right test images.

    reference: Statistics of the training images' features. copy_distance: the distance in pixels from which on 1 % of the
    test images are nearer to a training image; a sample that is nearer counts as memorised."""

    def __init__(self, images, classifier, reference, copy_distance, accuracy):
        self.images, self.classifier, self.accuracy = images, classifier, accuracy
        self.reference, self.copy_distance = reference, copy_distance

    @classmethod
    def open(cls, images, path, progress=True):
        """The judge of these images that the file holds; a new one is trained where the file is missing, and written.
        Raises UserError where the file holds another judge."""
        _, channels, side, _ = images.train.shape
        network = Classifier(channels, side, len(images.classes))
        if not os.path.exists(path):
            files.save(path, cls.train(images, progress).state_dict())
        try:
            state = files.load(path)
            if state["identity"] != images.identity:
                raise UserError(f"{path}: the judge of other images; remove the file, or name another folder")
            network.load_state_dict(state["classifier"])
            reference = Statistics(FEATURES)
            reference.count, reference.mean, reference.scatter = state["count"], state["mean"], state["scatter"]
        except (KeyError, TypeError, RuntimeError):
            raise UserError(f"{path}: not the file of a judge, or an older one; remove it") from None
        return cls(images, network.eval().requires_grad_(False), reference, state["copy_distance"], state["accuracy"])

    @classmethod
    def train(cls, images, progress=True):
        judge = cls(images, train_classifier(images, progress), None, None, None)
        judge.reference = Statistics(FEATURES).update(judge.read(images.train)[0])
        judge.accuracy = float((judge.read(images.test)[1] == images.test_labels).float().mean())
        test = images.test[:1000]
        judge.copy_distance = float(judge.nearest(test).quantile(0.01))
        return judge

    def state_dict(self):
        reference = {name: getattr(self.reference, name) for name in ("count", "mean", "scatter")}
        numbers = {"accuracy": self.accuracy, "copy_distance": self.copy_distance, "identity": self.images.identity}
        return {"classifier": self.classifier.state_dict(), **reference, **numbers}

    @torch.no_grad()
    def read(self, images):
        """Features (N, 64) and predicted classes (N,) of images (N, C, H, W) uint8."""
        features = torch.cat([self.classifier.features(to_model_range(part)) for part in images.split(500)])
        return features, self.classifier.head(features).argmax(dim=1)

    def measure(self, images, labels):
        """images: (N, C, H, W) uint8. labels: (N,), the classes that were asked for. Returns a dict:

        frechet_distance    between Gaussians fitted to the features of these and of all training images
        class_accuracy      share of images that the classifier assigns to their label"""
        features, classes = self.read(images)
        found, known = Statistics(FEATURES).update(features), self.reference
        return {
            "frechet_distance": frechet_distance(known.mu, known.sigma, found.mu, found.sigma),
            "class_accuracy": float((classes == torch.as_tensor(labels)).float().mean()),
        }

    def floor(self, count):
        """What `measure` says of `count` real test images, or of all if there are fewer."""
        return self.measure(self.images.test[:count], self.images.test_labels[:count])

    def nearest(self, images):
        """Distance in pixels, of range [-1, 1], of each image (N, C, H, W) uint8 to the nearest training image, flipped or
        not where training flips. Returns (N,)."""
        samples, found = to_model_range(images).flatten(1), []
        for part in self.images.train.split(5000):
            for real in (part, part.flip(-1)) if self.images.flip else (part,):
                found.append(torch.cdist(samples, to_model_range(real).flatten(1)).amin(dim=1))
        return torch.stack(found).amin(dim=0)

    def memorised(self, images):
        """Share of images (N, C, H, W) uint8 that are nearer to a training image than 99 % of the test images are; 0.01 is
        what real images have."""
        return float((self.nearest(images) < self.copy_distance).float().mean())
