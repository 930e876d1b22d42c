"""Distances between two sets of images, from features and logits of any network.

fid = frechet_distance(reference.mu, reference.sigma, samples.mu, samples.sigma)     # Statistics of both sets
precision, recall = precision_recall(reference_features, sample_features)

METRICS is the table of all that evaluate.py measures; another metric is a function and its line there."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack

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
    semidefinite. Returns a float >= 0. Raises ValueError for shapes that differ, NaN, infinity and negative variances;
    `check_covariance` sees more.

    With sigma = L L^T for both, the trace of the root is the sum of singular values of L1^T L2, real and finite for any
    rank (fewer images than dimensions). It agrees with scipy's sqrtm to 1e-7 relative; the usual remedy for a near singular
    product, 1e-6 on both diagonals, would move the distance by up to 3e-5."""
    mu1, sigma1, mu2, sigma2 = (np.asarray(a, dtype=np.float64) for a in (mu1, sigma1, mu2, sigma2))
    if not (mu1.shape == mu2.shape and sigma1.shape == sigma2.shape == mu1.shape * 2):
        raise ValueError(f"means {mu1.shape}, {mu2.shape} and covariances {sigma1.shape}, {sigma2.shape} do not fit")
    if not all(np.isfinite(a).all() for a in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance holds NaN or infinity")
    if min(sigma1.diagonal().min(), sigma2.diagonal().min()) < 0:
        raise ValueError("a covariance has negative variances; compute it again")
    root = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False).sum()
    trace = np.trace(sigma1) + np.trace(sigma2) - 2 * root
    return max(float(np.square(mu1 - mu2).sum() + trace), 0.0)


def check_covariance(sigma):
    """Raises ValueError for a matrix (D, D) that is no covariance: not symmetric, or with an eigenvalue below zero by more
    than a thousandth of the largest variance, which rounding does not explain. The distance would be nonsense, or 0."""
    slack = 1e-3 * np.abs(sigma.diagonal()).max()
    if np.abs(sigma - sigma.T).max() > slack:
        raise ValueError("is no covariance: it is not symmetric; compute it again")
    try:
        np.linalg.cholesky(sigma + (slack + np.finfo(np.float64).tiny) * np.eye(len(sigma)))
    except np.linalg.LinAlgError:
        raise ValueError("is no covariance: it has negative eigenvalues; compute it again") from None


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


def precision_recall(reference, samples, k=3):
    """Improved precision and recall: Kynkaanniemi et al. 2019, eqs. 1 and 2.

    reference: (N, D), samples: (M, D) features, on the device and in the precision to compute in (float16 is raised to
    float32). Returns (precision, recall): the share of samples in the reference's manifold and the reverse, in [0, 1]. A
    manifold is the union of balls around its points, each reaching to the k-th nearest other one. At most three times
    BLOCK distances are held at once. Raises ValueError when a set has k points or fewer."""
    reference, samples = _centred(reference, samples)
    if min(len(reference), len(samples)) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} points, not {len(reference)} and {len(samples)}")
    radii_reference = kth_neighbour_distances(reference, k)
    radii_samples = kth_neighbour_distances(samples, k)
    inside = []  # per block of samples: inside the reference's manifold?
    covered = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, distances in _distance_blocks(samples, reference):
        inside.append((distances <= radii_reference).any(dim=1))
        covered |= (distances <= radii_samples[rows, None]).any(dim=0)
    return torch.cat(inside).sum().item() / len(samples), covered.sum().item() / len(reference)


def density_coverage(reference, samples, k=5):
    """Density and coverage: Naeem et al. 2020, eqs. 5 and 6 of section 3.

    reference, samples, balls, memory: as of `precision_recall`. Density is how many of the reference's balls a sample lies
    in, mean over samples, over k: a float >= 0, about 1 for samples of the same distribution. Coverage is the share of
    those balls that hold a sample. Raises ValueError when the reference has k points or fewer."""
    reference, samples = _centred(reference, samples)
    if len(reference) <= k:
        raise ValueError(f"k = {k} neighbours need more than {k} points of the reference, not {len(reference)}")
    radii = kth_neighbour_distances(reference, k)
    counts = torch.zeros(len(reference), dtype=torch.int64, device=reference.device)  # of samples in each ball
    for _, distances in _distance_blocks(samples, reference):
        counts += (distances <= radii).sum(dim=0)
    return counts.sum().item() / (k * len(samples)), (counts > 0).sum().item() / len(reference)


def kernel_distance(reference, samples, subsets=100, subset_size=1000, seed=0):
    """KID: Binkowski et al. 2018, section 4: the unbiased estimate of the squared maximum mean discrepancy with the kernel
    (x.y / D + 1)^3, of random subsets of both sets.

    reference: (N, D), samples: (M, D). Returns (mean, standard deviation) over the subsets; one subset where neither set
    has more than subset_size points. Raises ValueError for fewer than 2 points."""
    reference, samples = (_doubles(x) for x in (reference, samples))
    size = min(subset_size, len(reference), len(samples))
    if size < 2:
        raise ValueError("an unbiased estimate needs 2 points or more of each set")
    generator, values = np.random.default_rng(seed), []
    for _ in range(subsets if max(len(reference), len(samples)) > size else 1):
        x, y = (points[generator.permutation(len(points))[:size]] for points in (reference, samples))
        k_xx, k_yy, k_xy = (torch.addmm(x.new_ones(()), a, b.T, alpha=1 / x.shape[1]) for a, b in ((x, x), (y, y), (x, y)))
        within = sum(k.pow_(3).sum() - k.diagonal().sum() for k in (k_xx, k_yy)) / (size * (size - 1))
        values.append((within - 2 * k_xy.pow_(3).mean()).item())
    return float(np.mean(values)), float(np.std(values))


def mean_discrepancy(reference, samples, sigma=10):
    """1000 times the squared maximum mean discrepancy with a Gaussian kernel exp(-|x - y|^2 / (2 sigma^2)): Gretton et al.
    2012, eq. 5, the biased estimate, which is >= 0. On CLIP's embeddings it is CMMD (Jayasumana et al. 2024).

    reference: (N, D), samples: (M, D). Memory as of `precision_recall`."""
    reference, samples = _centred(_doubles(reference), _doubles(samples))

    def mean_kernel(a, b):
        blocks = (distances.div_(-2 * sigma**2).exp_().sum() for _, distances in _distance_blocks(a, b))
        return sum(blocks).item() / (len(a) * len(b))

    within = mean_kernel(reference, reference) + mean_kernel(samples, samples)
    return 1000 * max(within - 2 * mean_kernel(reference, samples), 0.0)


def kth_neighbour_distances(x, k):
    """Squared distance of each point to its k-th nearest other point. x: (N, D), N > k. Returns (N,)."""
    # k + 1 smallest: the point itself is one of them, at distance 0
    x = _floats(x)
    return torch.cat([d.topk(k + 1, largest=False).values[:, k] for _, d in _distance_blocks(x, x)])


def _centred(reference, samples):
    """Both less the reference's mean: distances are the same, and the expanded square loses fewer digits."""
    reference, samples = _floats(reference), _floats(samples)
    centre = reference.mean(0)
    return reference - centre, samples - centre


def _floats(x):
    x = torch.as_tensor(x)
    return x if x.dtype == torch.float64 else x.float()


def _doubles(x):
    x = torch.as_tensor(x)
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


def _distance_blocks(a, b):
    """Yield (rows, squared distances of a[rows] to b) with at most BLOCK distances at once.

    The expanded square |a|^2 + |b|^2 - 2ab is a matrix product, but is zero only up to rounding: what is below the
    rounding counts as zero, so that a copy of a point lies in its ball of radius 0."""
    squares_a, squares_b = (x.square().sum(1) for x in (a, b))
    noise = 8 * torch.finfo(a.dtype).eps
    step = max(1, BLOCK // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, min(start + step, len(a)))
        with full_precision():
            distances = torch.addmm(squares_b, a[rows], b.T, alpha=-2)
        distances += squares_a[rows, None]
        yield rows, distances.masked_fill_(distances < noise * (squares_a[rows, None] + squares_b), 0)


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


@dataclass
class FeatureSet:
    """What METRICS take of a set of images, each None where there is no such thing: pooled features (N, D) and logits
    (N, classes); Statistics of the spatial features; mean and covariance of the pooled and of the spatial ones, numpy."""

    pooled: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    spatial: Statistics | None = None
    mu: np.ndarray | None = None
    sigma: np.ndarray | None = None
    mu_s: np.ndarray | None = None
    sigma_s: np.ndarray | None = None

    def part(self, indices):
        """The set of these images alone, without spatial features."""
        pooled = self.pooled[indices]
        statistics = Statistics(pooled.shape[1], pooled.device).update(pooled)
        logits = None if self.logits is None else self.logits[indices]
        return FeatureSet(pooled, logits, mu=statistics.mu, sigma=statistics.sigma)


@dataclass(frozen=True)
class Metric:
    """titles: {name in the report: title in the printed table} of the numbers that measure(reference, samples), which takes
    FeatureSets, returns in this order. reference, samples: the attribute that either set must have. fewest: images that it
    needs of each. halves: whether halves of the samples, which have no spatial features, give its standard errors."""

    titles: dict
    measure: Callable
    reference: str | None = "pooled"
    samples: str = "pooled"
    fewest: int = 2
    digits: int = 4
    halves: bool = True


METRICS = [
    Metric({"fd": "FD (of inception: FID)"}, lambda r, s: [frechet_distance(r.mu, r.sigma, s.mu, s.sigma)],
           "mu", "mu", digits=3),
    Metric({"sfd": "FD, spatial (sFID)"}, lambda r, s: [frechet_distance(r.mu_s, r.sigma_s, s.mu_s, s.sigma_s)],
           "mu_s", "mu_s", digits=3, halves=False),
    Metric({"inception_score": "Inception Score"}, lambda r, s: [inception_score(s.logits)], None, "logits", digits=3),
    Metric({"precision": "precision", "recall": "recall"}, lambda r, s: precision_recall(r.pooled, s.pooled), fewest=4),
    Metric({"density": "density", "coverage": "coverage"}, lambda r, s: density_coverage(r.pooled, s.pooled), fewest=6),
    Metric({"kid": "KID", "kid_deviation": "KID, deviation"}, lambda r, s: kernel_distance(r.pooled, s.pooled),
           digits=6, halves=False),
    Metric({"mmd": "MMD (of clip: CMMD)"}, lambda r, s: [mean_discrepancy(r.pooled, s.pooled)], digits=3),
]  # fmt: skip


def standard_errors(measure, count, resamples=10, seed=0):
    """Standard errors of the numbers measure(indices) of a set of `count` items, by bootstrap: their standard deviations
    over random halves of the set, drawn without replacement (Shao and Wu 1989, the delete-d jackknife with d = count / 2).

    The usual bootstrap draws as many as there are with replacement. Copies are each other's nearest neighbours, so that it
    gives recall twice its error: docs/metrics.md has the measurement."""
    generator = np.random.default_rng(seed)
    halves = [np.sort(generator.permutation(count)[: count // 2]) for _ in range(resamples)]
    return np.std([measure(torch.from_numpy(half)) for half in halves], axis=0, ddof=1).tolist()
