"""Losses against values worked out by hand, plain loops and other estimators."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

from crlseq.model.discrepancy_vae import DiscrepancyVAE
from crlseq.model.losses import (
    Kernel,
    kl_divergence,
    loss_terms,
    median_bandwidth,
    mmd_squared,
    multi_kernel,
    squared_distances,
)

A = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
B = torch.tensor([[2.0], [4.0]], dtype=torch.float64)


def k(d2):  # one kernel of bandwidth 1
    return math.exp(-d2)


def test_unbiased_mmd_by_hand():
    expected = k(1) + k(4) - 2 * (k(4) + k(16) + k(1) + k(9)) / 4
    assert mmd_squared(A, B, Kernel(1.0, 1)).item() == pytest.approx(expected, abs=1e-14)


def test_biased_mmd_by_hand():
    expected = (2 + 2 * k(1)) / 4 + (2 + 2 * k(4)) / 4 - 2 * (k(4) + k(16) + k(1) + k(9)) / 4
    assert mmd_squared(A, B, Kernel(1.0, 1, unbiased=False)).item() == pytest.approx(expected, abs=1e-14)


def test_bandwidths_double_around_the_middle():
    # five kernels: bandwidths 1/4, 1/2, 1, 2, 4 times sigma; ten: 2^-5 .. 2^4, as published
    d2 = torch.tensor([0.3], dtype=torch.float64)
    five = sum(math.exp(-0.3 / (7.0 * 2.0**i)) for i in range(-2, 3))
    ten = sum(math.exp(-0.3 / (7.0 * 2.0**i)) for i in range(-5, 5))
    assert multi_kernel(d2, 7.0, 5).item() == pytest.approx(five, rel=1e-14)
    assert multi_kernel(d2, 7.0, 10).item() == pytest.approx(ten, rel=1e-13)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(2, 12),
    m=st.integers(2, 12),
    g=st.integers(1, 30),
    kernels=st.integers(1, 10),
)
def test_mmd_equals_scikit_learn_kernels(seed, n, m, g, kernels):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, g)), rng.normal(size=(m, g)) + 1
    widths = [g * 2.0 ** (i - kernels // 2) for i in range(kernels)]
    aa, bb, ab = (sum(rbf_kernel(x, y, 1 / w) for w in widths) for x, y in ((a, a), (b, b), (a, b)))
    unbiased = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1)) - 2 * ab.mean()
    biased = aa.mean() + bb.mean() - 2 * ab.mean()
    ta, tb = torch.tensor(a), torch.tensor(b)
    assert mmd_squared(ta, tb, Kernel(float(g), kernels)).item() == pytest.approx(unbiased, abs=1e-9)
    assert mmd_squared(ta, tb, Kernel(float(g), kernels, unbiased=False)).item() == pytest.approx(biased, abs=1e-9)


def test_masked_rows_do_not_count():
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 3).double()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    a[0, 3:], b[0, 3:] = 10, -10
    masked = mmd_squared(a, b, Kernel(2.0, 5), a_mask=mask, b_mask=mask)
    assert masked[0].item() == pytest.approx(mmd_squared(a[0, :3], b[0, :3], Kernel(2.0, 5)).item(), abs=1e-12)
    assert masked[1].item() == pytest.approx(mmd_squared(a[1], b[1], Kernel(2.0, 5)).item(), abs=1e-12)


def test_unbiased_mmd_of_equal_distributions_is_zero_on_average():
    rng = np.random.default_rng(0)
    draws = [
        mmd_squared(*(torch.tensor(rng.normal(size=(20, 5))) for _ in range(2)), Kernel(5.0, 5)).item()
        for _ in range(300)
    ]
    assert abs(np.mean(draws)) < 4 * np.std(draws) / math.sqrt(300)
    assert min(draws) < 0 < max(draws)


def test_distances_hold_in_float32_far_from_the_origin():
    # |a|^2 is 1e8 times the distances here: without centring the inner products would cancel to noise.
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(8, 50)) + 1e4, rng.normal(size=(6, 50)) + 1e4
    a, b = a.astype(np.float32), b.astype(np.float32)
    exact = euclidean_distances(a.astype(float), b.astype(float), squared=True)
    ours = squared_distances(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    assert np.abs(ours / exact - 1).max() < 1e-3


def test_median_bandwidth_leaves_out_self_distances():
    cells = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)  # squared distances 1, 4, 9
    assert median_bandwidth(cells) == 4.0
    assert median_bandwidth(torch.ones(4, 2)) > 0


def test_kl_by_hand():
    mean, variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, math.e]])
    assert kl_divergence(mean, variance).item() == pytest.approx(0.5 * 1 + 0.5 * (math.e - 1 - 1))


def test_gaussian_terms_are_the_evidence_lower_bound_per_gene():
    torch.manual_seed(0)
    model = DiscrepancyVAE(7, 3, 2, n_hidden=4).double()
    with torch.no_grad():
        model.log_noise.normal_()
    x, y = torch.randn(2, 6, 7).double(), torch.randn(2, 6, 7).double()
    output = model(x, torch.tensor([[0], [1]]), torch.randn(2, 6, 3).double())
    terms = loss_terms(model, output, x, y, Kernel(1.0, 5), None)
    normal = torch.distributions.Normal(output.reconstruction, (model.log_noise / 2).exp())
    assert terms["reconstruction"].item() == pytest.approx(-normal.log_prob(x).sum(-1).mean().item() / 7)
    posterior = torch.distributions.Normal(output.mean, output.variance.sqrt())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(-1).mean()
    assert terms["kl"].item() == pytest.approx(kl.item() / 7)


def test_abducted_noise_makes_an_empty_intervention_change_nothing():
    torch.manual_seed(0)
    model = DiscrepancyVAE(7, 3, 2, n_hidden=4, intervention="shift").double()
    with torch.no_grad():
        model.scm.shift.zero_()
    x = torch.randn(1, 6, 7).double()
    assert torch.allclose(model(x, torch.tensor([[1]])).virtual, x)
