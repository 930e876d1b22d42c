"""FID, sFID, Inception Score, precision and recall, from features and logits of any network.

fid = frechet_distance(reference.mu, reference.sigma, samples.mu, samples.sigma)     # Statistics of both sets
precision, recall = precision_recall(reference_features, sample_features)
"""

import contextlib
import math

import numpy as np
import torch
from scipy.linalg import lapack
from tqdm.auto import tqdm

BLOCK = 2**24  # distances held at once: 64 MiB in float32


class Statistics:
    """Mean and covariance of a stream of vectors, in float64 and one pass: Chan, Golub & LeVeque 1983, eqs. 1.5a, 1.5b.

    Sums of squares are kept about the running mean, so a large common offset costs no digits. Two objects over parts
    of a set merge to the statistics of the whole, up to float64 rounding, in any order and split. device: where to
    add up; for "mps", which has no float64, that is the CPU."""

    def __init__(self, dim, device="cpu"):
        self.count = 0
        device = "cpu" if torch.device(device).type == "mps" else device
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)  # (dim,)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # sum of (x - mean)(x - mean)^T

    def update(self, x):
        """Add the vectors x: (N, dim), any N and floating type. Returns self."""
        x = torch.as_tensor(x).to(self.mean.device).double()
        if len(x):
            mean = x.mean(0)
            self.scatter.addmm_((x - mean).T, x - mean)
            self._move_mean(len(x), mean)
        return self

    def cpu(self):
        """Move to the CPU. Returns self."""
        self.mean, self.scatter = self.mean.cpu(), self.scatter.cpu()
        return self

    def merge(self, other):
        """Add all that `other` has seen. Returns self."""
        self.scatter += other.scatter.to(self.scatter)
        self._move_mean(other.count, other.mean.to(self.mean))
        return self

    def _move_mean(self, count, mean):
        total, delta = self.count + count, mean - self.mean
        if count:
            self.scatter.addr_(delta, delta, alpha=self.count * count / total)
            self.mean += delta * (count / total)
            self.count = total

    @property
    def mu(self):
        """Mean, (dim,) float64 numpy."""
        return self.mean.cpu().numpy()

    @property
    def sigma(self):
        """Covariance with divisor N - 1, as `numpy.cov`: (dim, dim) float64 numpy. Raises ValueError for N < 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 vectors, not {self.count}")
        return (self.scatter / (self.count - 1)).cpu().numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Squared Frechet distance of two Gaussians: Dowson & Landau 1982, eq. 4; FID (Heusel et al. 2017, eq. 6).

    |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)). mu: (D,), sigma: (D, D) symmetric, positive
    semidefinite. Returns a float >= 0. Raises ValueError for shapes that differ and for NaN or infinity.

    With sigma = L L^T for both, the trace of the root is the sum of singular values of L1^T L2, real and finite for any
    rank (fewer images than dimensions). It agrees with scipy's sqrtm to 1e-7 relative; the usual remedy for a near singular
    product, 1e-6 on both diagonals, would move the distance by up to 3e-5."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not (mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2):
        raise ValueError(f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} do not fit")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance holds NaN or infinity")
    root = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(float(np.square(mu1 - mu2).sum() + trace), 0.0)


def _factor(sigma):
    """L with L L^T = sigma (D, D), positive semidefinite: (D, rank). Cholesky with pivoting stops at the rank."""
    packed, pivots, rank, _ = lapack.dpstrf(sigma, lower=1)
    factor = np.empty((len(sigma), rank))
    factor[pivots - 1] = np.tril(packed)[:, :rank]
    return factor


def inception_score(logits, split_size=5000):
    """Inception Score (Salimans et al. 2016, section 4): exp(E_x KL(p(y|x) || p(y))), averaged over splits.

    logits: (N, classes), the classifier's outputs before softmax. Splits are consecutive and not shuffled, so the order
    of images matters; a last short split counts as the others. Returns a float in [1, classes]."""
    log_p = torch.as_tensor(logits).double().log_softmax(dim=1)
    scores = []
    for split in log_p.split(split_size):
        log_marginal = split.logsumexp(dim=0) - math.log(len(split))
        # where p underflows to 0 its term is 0, also for logits that differ by infinity
        divergence = torch.where(split.exp() > 0, split.exp() * (split - log_marginal), 0).sum(dim=1)
        scores.append(divergence.mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(reference, samples, k=3, progress=False):
    """Improved precision and recall: Kynkaanniemi et al. 2019, eqs. 1 and 2.

    reference: (N, D), samples: (M, D) features, both on the device and in the precision to compute in (float16 is
    raised to float32). Returns (precision, recall): the share of samples that lie in the reference's manifold and the
    reverse, floats in [0, 1]. A manifold is the union of balls around its points, each reaching to the k-th nearest
    other one. At most three times BLOCK distances are held at once. Raises ValueError when a set has k points or fewer."""
    reference, samples = (_floats(x) for x in (reference, samples))
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} points, not {len(reference)} and {len(samples)}")
    centre = reference.mean(0)  # distances are the same, and the expanded square loses fewer digits
    reference, samples = reference - centre, samples - centre
    radii_reference = kth_neighbour_distances(reference, k, progress and "reference manifold")
    radii_samples = kth_neighbour_distances(samples, k, progress and "sample manifold")
    inside = []  # per block of samples: inside the reference's manifold?
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, distances in _distance_blocks(samples, reference, progress and "precision, recall"):
        inside.append((distances <= radii_reference).any(dim=1))
        covered |= (distances <= radii_samples[rows, None]).any(dim=0)
    return torch.cat(inside).sum().item() / len(samples), covered.sum().item() / len(reference)


def kth_neighbour_distances(x, k, progress=False):
    """Squared distance of each point to its k-th nearest other point. x: (N, D), N > k. Returns (N,)."""
    x = _floats(x)
    # k + 1 smallest: the point itself is one of them, at distance 0
    radii = [d.topk(k + 1, largest=False).values[:, k] for _, d in _distance_blocks(x, x, progress)]
    return torch.cat(radii)


def _floats(x):
    x = torch.as_tensor(x)
    return x if x.dtype == torch.float64 else x.float()


def _distance_blocks(a, b, progress):
    """Yield (rows, squared distances of a[rows] to b) with at most BLOCK distances at once; `progress` names a bar.

    The expanded square |a|^2 + |b|^2 - 2ab is a matrix product, but is zero only up to rounding: what is below the
    rounding counts as zero, so that a copy of a point lies in its ball of radius 0."""
    squares_a, squares_b = (x.square().sum(1) for x in (a, b))
    noise = 8 * torch.finfo(a.dtype).eps
    step = max(1, BLOCK // len(b))
    with tqdm(total=len(a), desc=progress or None, unit="image", disable=not progress) as bar:
        for start in range(0, len(a), step):
            rows = slice(start, min(start + step, len(a)))
            with full_precision():
                distances = torch.addmm(squares_b, a[rows], b.T, alpha=-2)
            distances += squares_a[rows, None]
            floor = noise * (squares_a[rows, None] + squares_b)
            yield rows, distances.masked_fill_(distances < floor, 0)
            bar.update(rows.stop - rows.start)


@contextlib.contextmanager
def full_precision():
    """Float32 products and convolutions without TF32, whose 11-bit significand is as coarse as what ports differ by."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution
