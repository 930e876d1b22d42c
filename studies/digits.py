"""Measure samples of digits, scikit-learn's of 8x8 pixels or MNIST's of 28x28, beside real digits that were held out.

    python -m studies.digits demo/samples.npz

Prints for both, with standard errors: the share that a classifier assigns to their label, the share of near copies of
training images, how varied the images of a class are, the Fréchet distance to the real digits and, of MNIST's size, the
share of broken digits, whose strokes are in pieces: a gap in a stroke leaves a digit readable, and no classifier minds it.
The exit status is 1 where a bound of the demo is missed.

Digits of 8x8 pixels are classified by a support-vector machine, and their distance is that of pixels. Those of MNIST are
left to `studies.judge`, trained on 4,000 of the 5,000 images and kept in mnist.judge.pt; without the file it is trained
again, which takes minutes.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import label as find_pieces
from scipy.spatial.distance import cdist, pdist
from sklearn.svm import SVC

from data.images import DATASETS
from evaluation.metrics import Statistics, frechet_distance, standard_errors
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.parser import Parser
from studies.judge import Judge, RealImages, compare

INK = 64  # a stroke's pixels are brighter than this, of 255
# Euclidean, of pixels in [-1, 1]; of MNIST's digits 1 % are nearer than this to one of the others
COPY_DISTANCES = {8: 0.6, 28: 3.4}
BOUNDS = {"class_accuracy": (">=", 0.97), "variety": (">=", 0.6), "memorised": ("<", 0.05), "broken": ("<", 0.15)}
JUDGE = Path(__file__).with_name("mnist.judge.pt")


@dataclass(frozen=True)
class DigitsConfig(Config):
    """Options of digits.py."""

    samples: str = option(help="file of samples as sample_ddp.py writes it", positional=True, metavar="SAMPLES.npz")


@dataclass
class Reference:
    """Real digits that others are measured against. pixels: (N, side * side) in [-1, 1]. labels: (N,). read: a function of
    such pixels that returns features (M, 64) and classes (M,). known: Statistics of the real digits' features."""

    pixels: np.ndarray
    labels: np.ndarray
    read: Callable
    known: Statistics


@functools.cache
def real_digits(held_out=0):
    """(images (N, 64) in [-1, 1], labels, a support-vector classifier that is fitted to them) of scikit-learn's digits but
    for the last `held_out` ones."""
    values, labels = DATASETS["digits"].load()
    kept = len(labels) - held_out
    images, labels = to_vectors(values)[:kept], labels[:kept]
    return images, labels, SVC(C=10, gamma="scale").fit(images, labels)


@functools.cache
def mnist():
    """(RealImages, Judge) of MNIST."""
    images = RealImages.load("mnist", 28)
    return images, Judge.open(images, JUDGE)


@functools.cache
def reference_of(side, held_out=0):
    """The Reference of digits of 8x8 pixels, whose features are their principal components, or of 28x28, whose features are
    the judge's. held_out: the last ones of 8x8 pixels that are left out, or whether the judge's test images are."""
    if side == 8:
        images, labels, classifier = real_digits(held_out)
        components = np.linalg.eigh(np.cov(images, rowvar=False))[1]
        known = Statistics(64).update(images @ components)
        return Reference(images, labels, lambda x: (x @ components, classifier.predict(x)), known)
    images, judge = mnist()
    pixels, labels = [images.train, images.test], [images.train_labels, images.test_labels]
    pixels, labels = (torch.cat(parts[: 1 if held_out else 2]).numpy() for parts in (pixels, labels))

    def read(x):
        return judge.read(torch.from_numpy(np.rint((x + 1) * 127.5).astype(np.uint8)).view(-1, 1, side, side))

    return Reference(to_vectors(pixels), labels, read, judge.reference)


def to_vectors(images):
    """uint8 images (N, ...) to (N, D) in [-1, 1]."""
    return images.reshape(len(images), -1) / 127.5 - 1


def is_broken(image):
    """Whether the strokes of a digit (H, W), uint8, are in pieces. Pixels that touch at a corner are together."""
    return find_pieces(image > INK, np.ones((3, 3)))[1] > 1


def measure(images, labels, reference=None, errors=False):
    """images: (N, H, H, 3) uint8, grey, H 8 or 28. labels: (N,), the classes that were asked for. reference: a Reference,
    by default of all real digits. Returns a dict, and with `errors` another of standard errors:

    class_accuracy    share of samples that the classifier assigns to their label
    memorised         share nearer to a training image than `COPY_DISTANCES`
    broken            share in more than one piece; of 28x28 pixels alone
    variety           mean distance between two samples of a class, over that between two real digits of the class
    frechet_distance  between Gaussians fitted to the features of samples and of real digits"""
    side, labels = images.shape[1], np.asarray(labels)
    reference = reference or reference_of(side)
    samples = to_vectors(images.mean(axis=-1))
    features, classes = reference.read(samples)
    right, spread = np.asarray(classes) == labels, mean_distance(reference.pixels, reference.labels)
    copied = cdist(samples, reference.pixels).min(axis=1) < COPY_DISTANCES[side]
    broken = np.array([is_broken(image) for image in images[..., 0]])

    def numbers(part):
        found = Statistics(features.shape[1]).update(features[part])
        shares = {"class_accuracy": right, "memorised": copied, **({"broken": broken} if side == 28 else {})}
        return {
            **{name: float(which[part].mean()) for name, which in shares.items()},
            "variety": float(mean_distance(samples[part], labels[part]) / spread),
            "frechet_distance": frechet_distance(reference.known.mu, reference.known.sigma, found.mu, found.sigma),
        }

    values = numbers(slice(None))
    if not errors:
        return values
    return values, dict(zip(values, standard_errors(lambda part: [*numbers(part).values()], len(images)), strict=True))


def mean_distance(points, classes):
    """Between two points of a class, the mean over the classes."""
    return np.mean([pdist(points[classes == c]).mean() for c in range(10) if (classes == c).sum() > 1])


def measure_real(side, count):
    """`measure`, with errors, of `count` real digits against the others."""
    if side == 8:
        images, labels = (x[-count:] for x in DATASETS["digits"].load())
    else:
        images, labels = mnist()[0].test[:count, 0].numpy(), mnist()[0].test_labels[:count].numpy()
    return measure(np.repeat(images[..., None], 3, axis=3), labels, reference_of(side, count), errors=True)


def read_samples(path):
    """(images, labels) of an .npz file. Raises UserError."""
    try:
        with np.load(path) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except Exception as error:  # a damaged file can make the reader raise almost anything
        raise UserError(f"{path}: cannot be read as samples of sample_ddp.py ({str(error).splitlines()[0]})") from None
    if images.shape[1:] not in [(s, s, 3) for s in COPY_DISTANCES] or labels.shape != images.shape[:1] or len(images) < 20:
        raise UserError(f"{path}: holds no 20 or more digits of 8x8 or 28x28 pixels with labels, but {images.shape}")
    return images, labels


def main(argv=None):
    parser = Parser(DigitsConfig, __doc__)
    path = parser.parse(argv).samples
    with parser.report_errors():
        images, labels = read_samples(path)
        real, real_errors = measure_real(images.shape[1], min(len(images), 500))
    (values, errors), met = measure(images, labels, errors=True), True
    print(f"{'':17} {len(images):>7} samples{'real digits, held out':>25}")
    for name, value in values.items():
        kept, words = compare(value, BOUNDS.get(name))
        met &= kept
        print(f"{name:17} {value:7.3f} ± {errors[name]:.3f} {real[name]:15.3f} ± {real_errors[name]:.3f}{words}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
