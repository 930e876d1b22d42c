"""Judge samples of the digits: would one who has seen only real digits read the class that was asked for?

    python -m benchmarks.digits demo/samples.npz

Prints the share read right by a support-vector classifier, how varied the samples of a class are, how many are copies of
training images, and the Fréchet distance to the real digits in pixel space. Exit status 1
where a bound of the demo is missed.
"""

import argparse
import functools
import sys

import numpy as np
from scipy.spatial.distance import cdist, pdist
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from evaluation.metrics import frechet_distance

BOUNDS = {"read_as_asked": (">=", 0.97), "variety": (">=", 0.6), "copies": ("<", 0.05)}


@functools.cache
def real_digits():
    """(images (1797, 64) in [-1, 1], labels, a classifier fitted to them)."""
    data = load_digits()
    images = data.data / 8 - 1
    return images, data.target, SVC(C=10, gamma="scale").fit(images, data.target)


def judge(images, labels):
    """images: (N, 8, 8, 3) uint8, grey. labels: (N,), the classes asked for. Returns a dict of numbers:

    read_as_asked     share that the classifier reads as asked for
    variety           mean distance of two samples of a class over that of two real digits of the class
    copies            share nearer than 0.6 to a training image (Euclidean, pixels in [-1, 1])
    frechet_distance  between Gaussians fitted to the 64 pixels of samples and of real digits"""
    real, real_labels, classifier = real_digits()
    samples = images.mean(axis=-1).reshape(len(images), -1) / 127.5 - 1

    def spread(points, classes):
        return np.mean([pdist(points[classes == c]).mean() for c in range(10) if (classes == c).sum() > 1])

    moments = [(x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real, samples)]
    return {
        "read_as_asked": float((classifier.predict(samples) == labels).mean()),
        "variety": float(spread(samples, labels) / spread(real, real_labels)),
        "copies": float((cdist(samples, real).min(axis=1) < 0.6).mean()),
        "frechet_distance": float(frechet_distance(*moments[0], *moments[1])),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("npz", help="samples as sample_ddp.py writes them")
    path = parser.parse_args(argv).npz
    with np.load(path) as file:
        images, labels = file["arr_0"], file["arr_1"]
    numbers, met = judge(images, labels), True
    print(f"{len(images)} samples in {path}, judged by what has seen only real digits:")
    for name, value in numbers.items():
        sign, bound = BOUNDS.get(name, ("", 0))
        good = {">=": value >= bound, "<": value < bound, "": True}[sign]
        met &= good
        print(f"  {name:17} {value:7.4f}" + (f"   (asked for: {sign} {bound}{'' if good else ', MISSED'})" if sign else ""))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
