"""Measure samples of digits, scikit-learn's of 8x8 pixels or MNIST's of 28x28, with a classifier of the real ones.

    python -m studies.digits demo/samples.npz

Prints the share of samples that the classifier assigns to their label, how varied the samples of a class are, the share of
near copies of training images, and the Fréchet distance to the real digits in pixel space. Of real digits that it was not
fitted to, the classifier recognises 99 % (8x8) and 96 % (MNIST). The exit status is 1 where a bound of the demo is missed.
"""

import functools
import sys
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from data.images import DIGITS
from evaluation.metrics import frechet_distance
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.parser import Parser

COMPONENTS = 64  # principal ones, in which the Fréchet distance is computed: all of 8x8 pixels
CLASSIFIERS = {
    8: lambda: SVC(C=10, gamma="scale"),
    28: lambda: make_pipeline(PCA(40, random_state=0), SVC(C=10, gamma=0.016)),
}
# Euclidean, of pixels in [-1, 1]; of MNIST's digits 1 % are nearer than this to one of the others
COPY_DISTANCES = {8: 0.6, 28: 3.4}
BOUNDS = {"class_accuracy": (">=", 0.97), "variety": (">=", 0.6), "memorised": ("<", 0.05)}


@dataclass(frozen=True)
class DigitsConfig(Config):
    """Options of digits.py."""

    samples: str = option(help="file of samples as sample_ddp.py writes it", positional=True, metavar="SAMPLES.npz")


@functools.cache
def real_digits(side=8):
    """(images (N, side * side) in [-1, 1], labels, a support-vector classifier that is fitted to them). side: 8 or 28."""
    data = next(kind for kind in DIGITS.values() if kind.side == side)
    values, labels = data.load()
    images = values.reshape(len(values), -1) / 127.5 - 1
    return images, labels, CLASSIFIERS[side]().fit(images, labels)


@functools.cache
def principal_components(side):
    """Of the real digits, (side * side, 64)."""
    return np.linalg.eigh(np.cov(real_digits(side)[0], rowvar=False))[1][:, -COMPONENTS:]


def measure(images, labels):
    """images: (N, H, H, 3) uint8, grey, H 8 or 28. labels: (N,), the classes that were asked for. Returns a dict:

    class_accuracy    share of samples that the classifier assigns to their label
    variety           mean distance between two samples of a class, over that between two real digits of the class
    memorised         share nearer to a training image than `COPY_DISTANCES`
    frechet_distance  between Gaussians fitted to samples and real digits, in 64 principal components of the pixels"""
    side = images.shape[1]
    real, real_labels, classifier = real_digits(side)
    samples, components = images.mean(axis=-1).reshape(len(images), -1) / 127.5 - 1, principal_components(side)

    def spread(points, classes):
        return np.mean([pdist(points[classes == c]).mean() for c in range(10) if (classes == c).sum() > 1])

    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real @ components, samples @ components)]
    return {
        "class_accuracy": float((classifier.predict(samples) == labels).mean()),
        "variety": float(spread(samples, labels) / spread(real, real_labels)),
        "memorised": float((cdist(samples, real).min(axis=1) < COPY_DISTANCES[side]).mean()),
        "frechet_distance": float(frechet_distance(*moments[0], *moments[1])),
    }


def read_samples(path):
    """(images, labels) of an .npz file. Raises UserError."""
    try:
        with np.load(path) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except Exception as error:  # a damaged file can make the reader raise almost anything
        raise UserError(f"{path}: cannot be read as samples of sample_ddp.py ({str(error).splitlines()[0]})") from None
    if images.shape[1:] not in [(s, s, 3) for s in CLASSIFIERS] or labels.shape != images.shape[:1] or len(images) < 20:
        raise UserError(f"{path}: holds no 20 or more digits of 8x8 or 28x28 pixels with labels, but {images.shape}")
    return images, labels


def main(argv=None):
    parser = Parser(DigitsConfig, __doc__)
    path = parser.parse(argv).samples
    with parser.report_errors():
        images, labels = read_samples(path)
    numbers, met = measure(images, labels), True
    print(f"{len(images)} samples in {path}, measured against the real digits:")
    for name, value in numbers.items():
        sign, bound = BOUNDS.get(name, ("", 0))
        good = {">=": value >= bound, "<": value < bound, "": True}[sign]
        met &= good
        print(f"  {name:17} {value:7.4f}" + (f"   (bound: {sign} {bound}{'' if good else ', MISSED'})" if sign else ""))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
