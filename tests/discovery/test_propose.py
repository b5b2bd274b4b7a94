"""k-lines: which perturbations share a target, up to sign, length and basis, by means or variances."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.discovery.moments import DTYPE, Moments
from crlseq.discovery.propose import leading_changes, most_telling, propose_targets


def lines(k: int, p: int, q: int, seed: int, noise: float = 0.0) -> tuple[Moments, list[int]]:
    """K perturbations on p random lines, shifts of length 1 to 3 and either sign; the partition."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.arange(p), torch.randint(p, (k - p,), generator=generator)])
    axes = torch.linalg.qr(torch.randn(q, p, generator=generator, dtype=DTYPE))[0].T
    length = 1 + 2 * torch.rand(k, 1, generator=generator, dtype=DTYPE)
    sign = 2.0 * torch.randint(2, (k, 1), generator=generator) - 1
    means = torch.randn(1, q, generator=generator, dtype=DTYPE).expand(k + 1, -1).clone()
    means[1:] += sign * length * axes[targets] + noise * torch.randn(k, q, generator=generator, dtype=DTYPE)
    return Moments(means, torch.eye(q, dtype=DTYPE).repeat(k + 1, 1, 1), torch.full((k + 1,), 100.0, dtype=DTYPE)), (
        partition(targets)
    )


def partition(labels: torch.Tensor) -> list[int]:
    names: dict[int, int] = {}
    return [names.setdefault(label, len(names)) for label in labels.tolist()]


def best(moments: Moments, p: int, seed: int = 0) -> list[int]:
    return partition(propose_targets(moments, p, 1, torch.Generator().manual_seed(seed))[0])


@settings(max_examples=25, deadline=None)
@given(p=st.integers(1, 6), more=st.integers(0, 8), wider=st.integers(0, 4), seed=st.integers(0, 10**6))
def test_a_partition_into_orthogonal_lines_is_recovered(p: int, more: int, wider: int, seed: int) -> None:
    moments, expected = lines(p + more, p, p + wider, seed)
    assert best(moments, p) == expected


def test_most_telling_by_hand() -> None:
    """In standard errors 8, 9, 10 along one axis and 4, 5 along another: by z^2 / (1 + sum of z^2 so far), on each axis."""
    z = torch.tensor([[8.0, 0], [9, 0], [10, 0], [0, 4], [0, -5]], dtype=DTYPE)
    means = torch.cat([torch.zeros(1, 2, dtype=DTYPE), 0.1 * z])  # of 200 cells each, 1/200 + 1/200 = 0.1^2
    moments = Moments(means, torch.eye(2, dtype=DTYPE).repeat(6, 1, 1), torch.full((6,), 200.0, dtype=DTYPE))
    order = [[2], [2, 4], [1, 2, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]  # 100; 25 > 81/101; 81/101 > 16/26; 16/26 > 64/182
    assert [most_telling(moments, n).tolist() for n in range(1, 6)] == order


@settings(max_examples=25, deadline=None)
@given(p=st.integers(1, 6), more=st.integers(0, 8), wider=st.integers(0, 4), seed=st.integers(0, 10**6))
def test_each_line_is_told_of_before_one_is_told_of_twice(p: int, more: int, wider: int, seed: int) -> None:
    moments, partition = lines(p + more, p, p + wider, seed)
    assert {partition[k] for k in most_telling(moments, p).tolist()} == set(range(p))


def test_noise_of_the_means_does_not_hide_the_partition() -> None:
    for seed in range(5):
        moments, expected = lines(24, 8, 12, seed, noise=0.14)  # as of 100 cells each
        assert best(moments, 8) == expected


@pytest.mark.parametrize("seed", range(3))
def test_sign_of_shifts_does_not_matter(seed: int) -> None:
    moments, expected = lines(12, 4, 6, seed, noise=0.1)
    flip = 1 - 2.0 * (torch.arange(12) % 2)
    delta = moments.means[1:] - moments.means[0]
    flipped = replace(moments, means=torch.cat([moments.means[:1], moments.means[0] + flip[:, None] * delta]))
    assert best(flipped, 4) == best(moments, 4) == expected


@pytest.mark.parametrize("seed", range(3))
def test_any_invertible_map_and_translation_of_the_components_gives_the_same(seed: int) -> None:
    moments, expected = lines(12, 4, 5, seed, noise=0.1)
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(5, 5, generator=generator, dtype=DTYPE) * torch.tensor([0.1, 1, 1, 10, 30], dtype=DTYPE)
    mapped = Moments(moments.means @ mixing + 7, mixing.T @ moments.covariances @ mixing, moments.counts)
    assert best(mapped, 4) == best(moments, 4) == expected


def test_a_shift_weighs_by_its_standard_error() -> None:
    # Three lines, the second and third close to each other; the last perturbation has the longest mean shift.
    means = torch.tensor([[0.0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 2.9, 0.8], [0, 0, 4]], dtype=DTYPE)
    eye = torch.eye(3, dtype=DTYPE).repeat(5, 1, 1)
    counts = torch.tensor([1000.0, 200, 200, 200, 2], dtype=DTYPE)
    # of two cells it is mere noise, of as many as the others a line of its own
    assert best(Moments(means, eye, counts), 3)[:3] == [0, 1, 2]
    assert best(Moments(means, eye, torch.full((5,), 200.0, dtype=DTYPE)), 3) == [0, 1, 1, 2]


@pytest.mark.parametrize("p", [-1, 0, 4])
def test_numbers_of_latents_that_cannot_be_are_refused(p: int) -> None:
    moments, _ = lines(3, 2, 3, 0)
    with pytest.raises(ValueError, match="n_latents must lie between 1 and the 3 perturbations"):
        propose_targets(moments, p, 1, torch.Generator())


def test_proposals_are_distinct_and_the_best_comes_first() -> None:
    moments, expected = lines(12, 4, 6, 1, noise=0.3)
    found = propose_targets(moments, 4, 5, torch.Generator().manual_seed(0))
    assert found.shape == (5, 12) and found.dtype == torch.int64
    assert len({tuple(partition(row)) for row in found}) == 5
    assert partition(found[0]) == expected


def test_the_last_is_repeated_when_there_are_no_more_partitions() -> None:
    moments, _ = lines(3, 1, 2, 0)
    assert propose_targets(moments, 1, 4, torch.Generator().manual_seed(0)).tolist() == [[0, 0, 0]] * 4


def test_one_seed_one_result() -> None:
    moments, _ = lines(12, 4, 6, 2, noise=1.0)

    def found(seed: int) -> torch.Tensor:
        return propose_targets(moments, 4, 6, torch.Generator().manual_seed(seed))

    assert torch.equal(found(3), found(3))


def test_shifts_of_zero_length_and_a_constant_component_do_no_harm() -> None:
    moments, _ = lines(6, 2, 3, 0)
    covariances = moments.covariances.clone()
    covariances[:, 2] = covariances[:, :, 2] = 0
    still = Moments(moments.means[:1].expand(7, -1), covariances, moments.counts)
    found = propose_targets(still, 3, 2, torch.Generator().manual_seed(0))
    assert bool(((found >= 0) & (found < 3)).all())


def by_variances(targets: list[int], scales: list[float], n: float = 1000.0) -> tuple[Moments, torch.Tensor]:
    """Perturbations that move no mean: they set the variance of one of three independent sources, mixed."""
    mixing = torch.tensor([[2.0, 0.3, 0], [-1, 1, 0.5], [0.4, 0, 3]], dtype=DTYPE)
    variances = torch.ones(len(targets) + 1, 3, dtype=DTYPE)
    for c, (target, scale) in enumerate(zip(targets, scales, strict=True)):
        variances[c + 1, target] = scale
    covariances = mixing.T @ torch.diag_embed(variances) @ mixing
    counts = torch.full((len(targets) + 1,), n, dtype=DTYPE)
    return Moments(torch.zeros(len(targets) + 1, 3, dtype=DTYPE), covariances, counts), mixing


def test_perturbations_that_change_variances_alone_share_a_target() -> None:
    moments, _ = by_variances([0, 1, 2, 0, 1, 2, 0], [2, 3, 0.4, 0.5, 2, 3, 4])
    assert best(moments, 3) == [0, 1, 2, 0, 1, 2, 0]


def test_leading_changes_by_hand() -> None:
    # Two perturbations of the first source by its variance, the third by its mean.
    moments, mixing = by_variances([0, 0, 0], [4, 0.25, 1])
    moments.means[3] = mixing[0]
    leading = leading_changes(moments)
    assert leading.of_means.tolist() == [False, False, True]
    error = (2 / 1000) ** 0.5
    assert leading.errors.tolist() == pytest.approx([error] * 3)
    changes = leading.in_components(torch.zeros(3, dtype=DTYPE))
    torch.testing.assert_close(changes[2], mixing[0])  # a mean shift as it is
    for change in changes:  # all along the row of the mixing
        cosine = (change @ mixing[0]).abs() / change.norm() / mixing[0].norm()
        assert float(cosine) == pytest.approx(1, abs=1e-6)
    # The variance of the first source within environments is (1 + 4 + 1/4 + 1) / 4; the largest change by chance is off.
    pooled = (1 + 4 + 0.25 + 1) / 4
    by_chance = (2 * 3**0.5 + 3 * error) ** 2
    expected = (((3 / pooled / error) ** 2 - by_chance) / 2) ** 0.5
    assert float(leading.lengths[0]) == pytest.approx(expected, rel=1e-6)


def test_too_few_cells_tell_no_change_of_variances() -> None:
    moments, _ = by_variances([0, 1], [4, 4], n=8)
    assert leading_changes(moments).lengths.tolist() == [0, 0]
