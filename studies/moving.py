"""Measure samples of `--data-path moving-mnist`: MNIST digits that move straight and bounce off the sides of a window.

    python -m studies.moving demo/video/samples.npz

Beside each number stands that of as many real clips, which the classifier was not fitted to. The exit status is 1 where a
bound of the demo is missed.

motion_error      pixels, root of the mean square, between the digit's path (the centre of its mass) and the nearest path
                  that is straight between walls with a constant speed; 0 for real clips
shape_error       mean absolute difference of the digit, cut out around its centre, between a frame and the clip's mean,
                  over the digit's mean brightness
class_accuracy    share of frames in which the classifier recognises the digit that was asked for
frame_distance    between Gaussians fitted to principal components of single frames and those of the real clips
change_distance   the same of the differences between neighbouring frames
"""

import functools
import itertools
import sys
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.svm import SVC

from data.clips import DIGIT, SIDE, SPEED, MovingDigits, bounce
from evaluation.metrics import Statistics, frechet_distance
from runtime.config import Config, option
from runtime.errors import UserError
from runtime.parser import Parser
from studies.judge import compare

COMPONENTS = 32
HELD_OUT = 1000  # of the 5,000 digits, which the classifier is not fitted to
BOUNDS = {"motion_error": ("<", 2.0), "class_accuracy": (">=", 0.8)}  # the demo: 1.3, 0.90; frames apart: 4.2, 0.92


@dataclass(frozen=True)
class MovingConfig(Config):
    """Options of moving.py."""

    samples: str = option(help="file of clips as sample_ddp.py writes it", positional=True, metavar="SAMPLES.npz")


def real_clips(number, num_frames, seed=1):
    """(clips (N, F, H, W) uint8, labels) of digits that the classifier was not fitted to."""
    data = MovingDigits(SIDE, seed, num_frames)
    order = np.random.default_rng(seed).permutation(HELD_OUT)[:number]
    items = [data.read(int(held_out_digits()[i])) for i in order]
    return np.stack([item["image"][0].numpy() for item in items]), np.array([item["label"] for item in items])


@functools.cache
def held_out_digits():
    return np.random.default_rng(0).permutation(5000)[:HELD_OUT]


@functools.cache
def classifier():
    """A support-vector machine on digits that `cut_out` found in frames, but for those held out."""
    data = MovingDigits(SIDE, 0, 1)
    kept = np.setdiff1d(np.arange(5000), held_out_digits())
    frames = np.stack([data.read(int(i))["image"][0].numpy() for i in kept])  # (N, 1, H, W)
    digits = cut_out(frames, centres_of(frames))
    return make_pipeline(PCA(40, random_state=0), SVC(C=10, gamma=0.05)).fit(
        digits.reshape(len(kept), -1), data.labels[kept]
    )


@functools.lru_cache(maxsize=2)
def reference(num_frames):
    """Of frames and of their changes: pairs of (principal components, Statistics) of 1,000 real clips."""
    clips = real_clips(1000, num_frames, seed=2)[0] / 255.0
    found = []
    for values in (clips, np.diff(clips, axis=1)):
        values = values.reshape(-1, SIDE * SIDE)
        components = PCA(COMPONENTS, random_state=0).fit(values)
        found.append((components, Statistics(COMPONENTS).update(components.transform(values))))
    return found


def centres_of(clips):
    """The centre of mass in each frame of clips (N, F, H, W): (N, F, 2), row and column."""
    light, places = clips.astype(np.float64), np.arange(SIDE) + 0.5
    mass = light.sum(axis=(2, 3)).clip(1e-6)
    return np.stack([(light.sum(axis=3) @ places) / mass, (light.sum(axis=2) @ places) / mass], axis=-1)


def cut_out(clips, centres):
    """The 16x16 pixels around each centre: (N, F, 16, 16) in [0, 1]."""
    window = np.lib.stride_tricks.sliding_window_view(clips, (DIGIT, DIGIT), axis=(2, 3))
    corner = np.rint(centres - DIGIT / 2).astype(int).clip(0, SIDE - DIGIT)
    n, f = np.ogrid[: len(clips), : clips.shape[1]]
    return window[n, f, corner[..., 0], corner[..., 1]] / 255.0


def motion_errors(centres):
    """centres: (N, F, 2). Root of the mean square distance (N,) to the nearest of all paths that are straight between
    walls, by whole pixels a frame. Where the mass lies in the digit is not known, so that a path may be moved by a
    constant. Each axis is on its own."""
    choices = [*itertools.product(range(SIDE - DIGIT + 1), range(-SPEED, SPEED + 1))]
    waves = np.stack([bounce(start, speed, centres.shape[1]) for start, speed in choices])  # (P, F)
    distance = centres[:, None] - waves[:, :, None]  # (N, P, F, 2)
    return np.sqrt(distance.var(axis=2).min(axis=1).sum(axis=-1))


def measure(clips, labels):
    """clips: (N, F, H, W) uint8. labels: (N,). Returns the dict of numbers that the module's docstring explains."""
    centres = centres_of(clips)
    digits = cut_out(clips, centres)
    changes = np.abs(digits - digits.mean(axis=1, keepdims=True)).mean(axis=(1, 2, 3))
    classes = classifier().predict(digits.reshape(-1, DIGIT * DIGIT)).reshape(clips.shape[:2])
    found = {
        "motion_error": float(np.sqrt(np.square(motion_errors(centres)).mean())),
        "shape_error": float((changes / digits.mean(axis=(1, 2, 3)).clip(1e-6)).mean()),
        "class_accuracy": float((classes == np.asarray(labels)[:, None]).mean()),
    }
    parts = {"frame_distance": clips / 255.0, "change_distance": np.diff(clips / 255.0, axis=1)}
    for (name, values), (components, known) in zip(parts.items(), reference(clips.shape[1]), strict=True):
        drawn = Statistics(COMPONENTS).update(components.transform(values.reshape(-1, SIDE * SIDE)))
        found[name] = frechet_distance(known.mu, known.sigma, drawn.mu, drawn.sigma)
    return found


def read_samples(path):
    """(clips (N, F, H, W), labels) of an .npz file. Raises UserError."""
    try:
        with np.load(path) as file:
            clips, labels = file["arr_0"], file["arr_1"]
    except Exception as error:  # a damaged file can make the reader raise almost anything
        raise UserError(f"{path}", f"cannot be read as clips of sample_ddp.py ({str(error).splitlines()[0]})") from None
    if clips.ndim != 5 or clips.shape[2:] != (SIDE, SIDE, 3) or clips.shape[1] < 2 or labels.shape != clips.shape[:1]:
        raise UserError(f"{path}", f"holds no clips (N, F, {SIDE}, {SIDE}, 3) with labels, but {clips.shape}")
    return clips[..., 0], labels


def main(argv=None):
    parser = Parser(MovingConfig, __doc__)
    path = parser.parse(argv).samples
    with parser.report_errors():
        clips, labels = read_samples(path)
    values, real = measure(clips, labels), measure(*real_clips(len(clips), clips.shape[1]))
    met = True
    print(f"{'':17} {len(clips):>7} samples{'real clips':>14}")
    for name, value in values.items():
        kept, words = compare(value, BOUNDS.get(name))
        met &= kept
        print(f"{name:17} {value:15.3f} {real[name]:13.3f}{words}")
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
