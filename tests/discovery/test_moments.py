"""Sufficient statistics of environments: by hand, empty environments, folds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.discovery.moments import DTYPE, Moments, environment_moments, fold_moments, noise_level

VALUES = torch.tensor([[0.0, 1.0], [2.0, 3.0], [10.0, 0.0], [4.0, 5.0], [14.0, 0.0]])
ENVIRONMENT = torch.tensor([0, 0, 1, 0, 1])


def test_by_hand() -> None:
    m = environment_moments(VALUES, ENVIRONMENT)
    assert m.counts.tolist() == [3, 2]
    assert m.means.tolist() == [[2, 3], [12, 0]]
    third = 8 / 3  # (4 + 0 + 4) / 3, over n and not n - 1
    assert m.covariances.flatten().tolist() == pytest.approx([third] * 4 + [4, 0, 0, 0])
    assert m.pooled().flatten().tolist() == pytest.approx([(8 + 8) / 5, 8 / 5, 8 / 5, 8 / 5])


def test_posterior_variances_are_added_to_the_diagonal_as_means_of_their_environment() -> None:
    variances = torch.tensor([[1.0, 0.0], [2.0, 0.0], [5.0, 1.0], [3.0, 0.0], [7.0, 3.0]])
    plain, wide = environment_moments(VALUES, ENVIRONMENT), environment_moments(VALUES, ENVIRONMENT, variances)
    added = wide.covariances - plain.covariances
    assert added.flatten().tolist() == pytest.approx([2, 0, 0, 0, 6, 0, 0, 2])
    assert torch.equal(wide.means, plain.means)


def test_environments_without_cells_are_zero_when_their_number_is_given() -> None:
    m = environment_moments(VALUES, 2 * ENVIRONMENT, torch.ones(5, 2), n_environments=4)
    assert m.counts.tolist() == [3, 0, 2, 0]
    for empty in (1, 3):
        assert not m.means[empty].any() and not m.covariances[empty].any()
    assert m.means[2].tolist() == [12, 0]


@pytest.mark.parametrize("environment", [[0, 0, 1, 1, 2], [0, 0, 2, 2, 2]])
def test_fewer_than_two_cells_are_refused(environment: list[int]) -> None:
    with pytest.raises(ValueError, match="at least two cells"):
        environment_moments(VALUES, torch.tensor(environment))


def joined(a: Moments, b: Moments) -> Moments:
    """Moments of two sets of cells together."""
    counts = a.counts + b.counts
    share = (a.counts / counts)[:, None], (b.counts / counts)[:, None]
    means = share[0] * a.means + share[1] * b.means
    second = sum(
        s[..., None] * (m.covariances + m.means[:, :, None] * m.means[:, None])
        for s, m in zip(share, (a, b), strict=True)
    )
    assert isinstance(second, torch.Tensor)
    return Moments(means, second - means[:, :, None] * means[:, None], counts)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(2, 9), min_size=1, max_size=5),
    n_folds=st.integers(2, 5),
    seed=st.integers(0, 1000),
    posterior=st.booleans(),
)
def test_folds_partition_the_cells_and_add_up_to_the_whole(
    counts: list[int], n_folds: int, seed: int, posterior: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    environment = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    environment = environment[torch.randperm(len(environment), generator=generator)]
    values = torch.randn(len(environment), 2, generator=generator, dtype=DTYPE)
    variances = torch.rand(len(environment), 2, generator=generator, dtype=DTYPE) if posterior else None
    whole = environment_moments(values, environment, variances)
    folds = fold_moments(values, environment, variances, n_folds, generator)
    assert len(folds) == n_folds
    for rest, fold in folds:
        both = joined(rest, fold)
        for name in ("counts", "means", "covariances"):
            torch.testing.assert_close(getattr(both, name), getattr(whole, name))
    each = torch.stack([fold.counts for _, fold in folds])
    assert torch.equal(each.sum(0), whole.counts)
    assert float((each.max(0).values - each.min(0).values).max()) <= 1  # every environment over all folds
    sums = torch.stack([fold.counts[:, None] * fold.means for _, fold in folds]).sum(0)
    torch.testing.assert_close(sums, whole.counts[:, None] * whole.means)


def test_folds_are_drawn_by_the_generator() -> None:
    values = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    environment = torch.arange(40) % 2

    def means(seed: int) -> list[float]:
        return (
            fold_moments(values, environment, None, 2, torch.Generator().manual_seed(seed))[0][1].means[:, 0].tolist()
        )

    assert means(1) == means(1)
    assert means(1) != means(2)


def test_noise_level_is_the_mean_of_the_smallest_quarter_of_the_eigenvalues() -> None:
    covariance = torch.diag(torch.tensor([9.0, 1.0, 3.0, 8.0, 7.0, 6.0, 5.0, 4.0], dtype=DTYPE))[None]
    m = Moments(torch.zeros(1, 8, dtype=DTYPE), covariance, torch.ones(1, dtype=DTYPE))
    assert noise_level(m) == pytest.approx((1 + 3) / 2)
    one = Moments(torch.zeros(1, 1, dtype=DTYPE), torch.full((1, 1, 1), 5.0, dtype=DTYPE), torch.ones(1, dtype=DTYPE))
    assert noise_level(one) == pytest.approx(5)
