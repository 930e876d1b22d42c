"""Random numbers that belong to the thing they are for, never to a process: every use has its own stream, and within it
every thing its own key. Seeds are hashed (numpy's SeedSequence), so that neighbouring keys share nothing."""

import numpy as np

DATA_ORDER, FLIP, TRAINING_STEP, SAMPLE_NOISE, SAMPLE_LABEL, BOUND_CHOICE, BOUND_NOISE, VALIDATION, CAPTION = range(9)
CLIP, CLIP_START = 9, 10


def generator(seed, stream, *key):
    """A numpy Generator of its own for this (seed, stream, key); all are integers from 0 up. 128 bits of state: with the
    32 that torch's CPU generator reads, one set of 50,000 images in four would hold two with the same noise."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, *key])))


def torch_seed(seed, stream, *key):
    """A 32-bit seed for `torch.manual_seed`."""
    return int(np.random.SeedSequence([seed, stream, *key]).generate_state(1)[0])
