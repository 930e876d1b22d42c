"""Measure samples of the digits with a classifier that has been trained on the real digits.

    python -m benchmarks.digits demo/samples.npz

Prints the share of samples that the classifier assigns to their label, how varied the samples of a class are, the share of
near copies of training images, and the Fréchet distance to the real digits in pixel space. The exit status is 1 where a
bound of the demo is missed.
"""

import functools
import sys
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist, pdist
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from cli.parser import Parser
from evaluation.metrics import frechet_distance
from runtime.config import Config, option
from runtime.errors import UserError

BOUNDS = {"class_accuracy": (">=", 0.97), "variety": (">=", 0.6), "memorised": ("<", 0.05)}


@dataclass(frozen=True)
class DigitsConfig(Config):
    """Options of digits.py."""

    samples: str = option(help="file of samples as sample_ddp.py writes it", positional=True, metavar="SAMPLES.npz")


@functools.cache
def real_digits():
    """(images (1797, 64) in [-1, 1], labels, a support-vector classifier that is fitted to them)."""
    data = load_digits()
    images = data.data / 8 - 1
    return images, data.target, SVC(C=10, gamma="scale").fit(images, data.target)


def measure(images, labels):
    """images: (N, 8, 8, 3) uint8, grey. labels: (N,), the classes that were asked for. Returns a dict of numbers:

    class_accuracy    share of samples that the classifier assigns to their label
    variety           mean distance between two samples of a class, over that between two real digits of the class
    memorised         share nearer than 0.6 to a training image (Euclidean distance, pixels in [-1, 1])
    frechet_distance  between Gaussians fitted to the 64 pixels of samples and of real digits"""
    real, real_labels, classifier = real_digits()
    samples = images.mean(axis=-1).reshape(len(images), -1) / 127.5 - 1

    def spread(points, classes):
        return np.mean([pdist(points[classes == c]).mean() for c in range(10) if (classes == c).sum() > 1])

    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real, samples)]
    return {
        "class_accuracy": float((classifier.predict(samples) == labels).mean()),
        "variety": float(spread(samples, labels) / spread(real, real_labels)),
        "memorised": float((cdist(samples, real).min(axis=1) < 0.6).mean()),
        "frechet_distance": float(frechet_distance(*moments[0], *moments[1])),
    }


def read_samples(path):
    """(images, labels) of an .npz file. Raises UserError."""
    try:
        with np.load(path) as file:
            images, labels = file["arr_0"], file["arr_1"]
    except Exception as error:  # a damaged file can make the reader raise almost anything
        raise UserError(f"{path}: cannot be read as samples of sample_ddp.py ({str(error).splitlines()[0]})") from None
    if images.shape[1:] != (8, 8, 3) or labels.shape != images.shape[:1] or len(images) < 20:
        raise UserError(f"{path}: holds no 20 or more digits of 8x8 pixels with labels, but arrays {images.shape}")
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
