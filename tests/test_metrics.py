"""The metrics against numbers of the field's own suite, closed forms and slow formulas."""

import itertools
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import polynomial_kernel, rbf_kernel

from evaluation import metrics
from evaluation.image_sets import open_images
from evaluation.metrics import (
    Statistics,
    check_covariance,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    kth_neighbour_distances,
    mean_discrepancy,
    precision_recall,
    standard_errors,
)
from runtime.errors import UserError

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")


def normal(key, *shape):
    return np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape).astype(np.float32)


def golden_inputs(key, n_ref, n_gen, dim):
    mix = normal(key + "mix", dim, dim) / np.float32(np.sqrt(dim))
    reference = normal(key + "ref", n_ref, dim) @ mix
    samples = normal(key + "gen", n_gen, dim) @ mix * np.float32(0.8) + np.float32(0.1)
    return reference, samples, normal(key + "logits", n_gen, 20) * 2


def statistics(x):
    return Statistics(x.shape[1]).update(x)


def distance(x, y):
    x, y = statistics(x), statistics(y)
    return frechet_distance(x.mu, x.sigma, y.mu, y.sigma)


@pytest.mark.parametrize(("key", "n_ref", "n_gen", "dim"), [("a", 400, 300, 32), ("b", 64, 64, 8)])
def test_agrees_with_the_suite(key, n_ref, n_gen, dim):
    reference, samples, logits = golden_inputs(key, n_ref, n_gen, dim)
    assert distance(reference, samples) == pytest.approx(GOLDEN[f"{key}:fid"], rel=1e-6)
    assert inception_score(logits, split_size=100) == pytest.approx(GOLDEN[f"{key}:is"], rel=1e-5)
    precision, recall = precision_recall(reference, samples)
    assert precision == pytest.approx(GOLDEN[f"{key}:precision"], abs=1e-9)
    assert recall == pytest.approx(GOLDEN[f"{key}:recall"], abs=1e-9)
    radii = kth_neighbour_distances(reference, k=3).numpy()
    assert np.abs(radii - GOLDEN[f"{key}:radii_ref"]).max() <= 5e-3 * radii.max()


def test_distance_of_gaussians_that_commute():
    """|m1 - m2|^2 + sum (s1 - s2)^2 for axis-aligned Gaussians with deviations s, and in any rotated frame."""
    rng = np.random.default_rng(0)
    m1, m2, s1, s2 = rng.normal(size=(2, 30)).tolist() + rng.uniform(0.1, 3, size=(2, 30)).tolist()
    m1, m2, s1, s2 = map(np.array, (m1, m2, s1, s2))
    q = np.linalg.qr(rng.normal(size=(30, 30)))[0]
    expected = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    measured = frechet_distance(q @ m1, q @ np.diag(s1**2) @ q.T, q @ m2, q @ np.diag(s2**2) @ q.T)
    assert measured == pytest.approx(expected, rel=1e-12)


@given(n=st.integers(2, 40), m=st.integers(2, 40), dim=st.integers(1, 24), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_distance_is_real_symmetric_and_zero_to_itself_at_any_rank(n, m, dim, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, dim)), rng.normal(size=(m, dim)) + 1
    there, back = distance(x, y), distance(y, x)
    assert np.isfinite(there)
    assert there > 0
    assert there == pytest.approx(back, rel=1e-5, abs=1e-5)
    assert distance(x, x) < 1e-5


def test_distance_of_fewer_images_than_dimensions():
    """Equal covariances of rank 9 in 200 dimensions, 3 apart: what remains is the distance of the means, squared."""
    x = np.random.default_rng(0).normal(size=(10, 200))
    shift = np.zeros(200)
    shift[0] = 3
    assert distance(x, x + shift) == pytest.approx(9, rel=1e-6)


def test_distance_refuses_what_would_be_nan():
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(np.zeros(2), np.full((2, 2), np.nan), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="at least 2"):
        _ = Statistics(4).update(np.zeros((1, 4))).sigma


@given(cuts=st.lists(st.integers(0, 50), max_size=5), split=st.integers(0, 50), offset=st.sampled_from([0, 1e6]))
@settings(max_examples=40, deadline=None)
def test_streamed_and_merged_statistics_are_those_of_the_whole(cuts, split, offset):
    """Batches and processes of any size, empty ones too; the offset breaks sums of squares that are not centred."""
    x = np.random.default_rng(1).normal(size=(50, 6)) + offset
    parts = [Statistics(6), Statistics(6)]
    edges = sorted({0, split, 50, *cuts})
    for start, stop in itertools.pairwise(edges):
        parts[start >= split].update(x[start:stop])
    merged = parts[1].merge(parts[0])
    assert merged.count == 50
    np.testing.assert_allclose(merged.mu, x.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.sigma, np.cov(x, rowvar=False), rtol=1e-8, atol=1e-9)


def test_inception_score_at_its_ends():
    """Certain and evenly spread over C classes: C. The same prediction for all: 1."""
    certain = torch.full((40, 8), -torch.inf)
    certain[torch.arange(40), torch.arange(40) % 8] = 0
    assert inception_score(certain) == pytest.approx(8, rel=1e-12)
    assert inception_score(torch.randn(1, 8).expand(40, 8)) == pytest.approx(1, rel=1e-12)


def test_inception_score_splits_in_order():
    """One class per split: each split scores 1, the whole set 2; a short last split counts as a whole one."""
    logits = torch.full((6, 2), -50.0)
    logits[:4, 0] = logits[4:, 1] = 50.0
    assert inception_score(logits, split_size=4) == pytest.approx(1, rel=1e-9)
    assert inception_score(logits[[0, 4, 1, 5, 2, 3]], split_size=4) == pytest.approx((2 + 1) / 2, rel=1e-9)


def slow_precision_recall(reference, samples, k):
    """Equations 1 and 2 of Kynkaanniemi et al. in float64, pair by pair."""

    def share_inside(points, centres):
        radii = [
            sorted(np.sum((c - o) ** 2) for j, o in enumerate(centres) if j != i)[k - 1] for i, c in enumerate(centres)
        ]
        inside = [any(np.sum((p - c) ** 2) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return np.mean(inside)

    return share_inside(samples, reference), share_inside(reference, samples)


@pytest.mark.parametrize("block", [1, 64, metrics.BLOCK])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_match_the_formula_in_any_block(monkeypatch, block, k):
    monkeypatch.setattr(metrics, "BLOCK", block)
    rng = np.random.default_rng(2)
    reference, samples = rng.normal(size=(50, 4)), rng.normal(size=(30, 4)) * 0.7 + 0.5
    assert precision_recall(reference, samples, k) == pytest.approx(slow_precision_recall(reference, samples, k))


def test_precision_recall_of_identical_disjoint_and_collapsed_sets():
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)) + 100
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 50) == (0.0, 0.0)
    assert precision_recall(x, x[:1].expand(20, 16)) == (1.0, 1 / 60)  # balls of radius 0 cover their own point only
    copies = x[:5].repeat(4, 1)
    assert precision_recall(copies, copies) == (1.0, 1.0)  # ... and must not lose it to rounding


def test_precision_recall_need_more_points_than_neighbours():
    with pytest.raises(ValueError, match="more than 3 points"):
        precision_recall(torch.randn(3, 4), torch.randn(9, 4))


def test_full_precision_gives_back_what_it_found():
    torch.set_float32_matmul_precision("high")
    try:
        with metrics.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_mps_which_has_no_float64_adds_up_on_the_cpu():
    statistics = Statistics(3, torch.device("mps"))
    assert (statistics.mean.device.type, statistics.mean.dtype) == ("cpu", torch.float64)
    x = torch.arange(12.0).reshape(4, 3)
    assert np.array_equal(statistics.update(x).mu, x.double().mean(0).numpy())


def points(shift, n, dim=6):
    return torch.from_numpy(np.random.default_rng(n).normal(size=(n, dim))) * 2 + shift


def test_kernel_distances_are_those_of_scikit_learn():
    """KID of one subset, which is the whole set, and MMD, each from matrices of kernels."""
    x, y = points(0, 40), points(1, 40)

    def within(k):
        return (k.sum() - np.trace(k)) / (40 * 39)

    k_xx, k_yy, k_xy = (polynomial_kernel(a, b, degree=3, gamma=1 / 6, coef0=1) for a, b in ((x, x), (y, y), (x, y)))
    mean, deviation = kernel_distance(x, y, subset_size=40)
    assert mean == pytest.approx(within(k_xx) + within(k_yy) - 2 * k_xy.mean(), rel=1e-10)
    assert deviation == 0
    k_xx, k_yy, k_xy = (rbf_kernel(a, b, gamma=1 / 200) for a, b in ((x, x), (y, y), (x, y)))
    expected = 1000 * (k_xx.mean() + k_yy.mean() - 2 * k_xy.mean())
    assert mean_discrepancy(x, y) == pytest.approx(expected, rel=1e-9)
    assert mean_discrepancy(x, x) == pytest.approx(0, abs=1e-9)


def test_kid_of_subsets_spreads_around_that_of_the_whole_sets():
    x, y = points(0, 400), points(0.2, 300)
    whole, _ = kernel_distance(x[:300], y, subset_size=300)
    mean, deviation = kernel_distance(x, y, subset_size=50)
    assert deviation > 0
    assert mean == pytest.approx(whole, abs=0.5 * deviation)


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_match_the_formula(k):
    """Equations of Naeem et al., section 3, pair by pair."""
    x, y = points(0, 50), points(0.3, 30)
    radii = [sorted(np.linalg.norm(a - b) for j, b in enumerate(x) if j != i)[k - 1] for i, a in enumerate(x)]
    inside = np.array([[np.linalg.norm(a - b) <= r for a, r in zip(x, radii, strict=True)] for b in y])
    assert density_coverage(x, y, k) == pytest.approx((inside.sum() / (k * len(y)), inside.any(0).mean()))
    assert density_coverage(x, x, k)[1] == 1
    assert density_coverage(x, x + 1000, k) == (0, 0)
    with pytest.raises(ValueError, match=f"more than {k} points"):
        density_coverage(x[:k], y, k)


@pytest.mark.parametrize(
    ("sigma", "what"),
    [(-np.eye(3), "negative"), (np.ones((3, 3)) - np.eye(3), "negative"), (np.tri(3), "not symmetric")],
)
def test_what_is_no_covariance_is_refused(tmp_path, sigma, what):
    with pytest.raises(ValueError, match=f"is no covariance: it .*{what}"):
        check_covariance(sigma)
    full = np.eye(2048)
    full[:3, :3] = sigma
    np.savez(tmp_path / "bad.npz", mu=np.zeros(2048), sigma=full)
    with pytest.raises(UserError, match=f"bad.npz: sigma is no covariance: it .*{what}.*; compute it again"):
        open_images(tmp_path / "bad.npz")
    rows = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float16)
    check_covariance(np.cov(rows, rowvar=False).astype(np.float16).astype(float))  # of rank 1, rounded
    check_covariance(np.zeros((4, 4)))


def test_distance_refuses_negative_variances():
    with pytest.raises(ValueError, match="negative variances"):
        frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), -np.eye(2))


def test_standard_errors_are_those_of_the_mean_in_closed_form():
    """s / sqrt(n), within the chance of 200 resamples; and the same for the same seed."""
    x = points(0, 100)

    def mean(indices):
        return x[indices].mean(0).tolist()

    found = standard_errors(mean, 100, resamples=200)
    assert found == pytest.approx((x.std(0) / 10).tolist(), rel=0.2)
    assert standard_errors(mean, 100, 3) == standard_errors(mean, 100, 3) != standard_errors(mean, 100, 3, seed=1)
