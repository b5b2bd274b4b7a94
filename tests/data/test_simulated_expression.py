"""Expression of simulated cells: mixing, background, counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from crlseq.data.simulated_expression import (
    DISPERSION,
    background_loadings,
    counts,
    draw_background,
    draw_dispersions,
    mixed,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("mixing", ["linear", "network"])
def test_latents_move_the_genes_that_are_loaded_on_them_and_no_others(mixing: Any) -> None:
    loaded, latents = rng().random((4, 200)) < 0.3, rng().standard_normal((50, 4))

    def signal(values: np.ndarray) -> np.ndarray:
        return mixed(values, 200, mixing, loaded, rng(1))

    for k in range(4):
        moved = latents.copy()
        moved[:, k] += 1
        assert ((signal(moved) != signal(latents)).any(0) == loaded[k]).all()


def test_background_factors_are_uncorrelated_and_of_variance_one() -> None:
    factors = draw_background(20_000, 3, cell_cycle=True, rng=rng())
    assert factors.shape == (20_000, 5)
    assert np.cov(factors.T) == pytest.approx(np.eye(5), abs=0.04)
    assert (factors[:, 3:] ** 2).sum(1) == pytest.approx(2)  # the circle
    assert (factors[:, 3] > 0).mean() == pytest.approx(0.5, abs=0.02)
    assert draw_background(10, 2, cell_cycle=False, rng=rng()).shape == (10, 2)
    assert draw_background(10, 0, cell_cycle=True, rng=rng()).shape == (10, 2)


def test_background_loads_two_genes_of_five() -> None:
    loadings = background_loadings(4, 5000, 0.3, rng())
    assert (loadings != 0).mean(1) == pytest.approx(0.4, abs=4 * np.sqrt(0.24 / 5000))
    assert loadings[loadings != 0].std() == pytest.approx(0.3, rel=0.04)


def dispersion_of(drawn: np.ndarray, depth: float) -> tuple[np.ndarray, np.ndarray]:
    """(variance - mean) / mean^2 of the expressed genes, and which they are."""
    share = drawn / drawn.sum(1, keepdims=True) * depth
    mean, variance = share.mean(0), share.var(0)
    expressed = mean > 20
    return (variance[expressed] - mean[expressed]) / mean[expressed] ** 2, expressed


def test_depth_and_dispersion_of_counts() -> None:
    flat, depth = np.zeros((4000, 50)), np.full(4000, 5000.0)
    depth[2000:] *= 2
    drawn = counts(flat, depth, np.full(50, DISPERSION), rng()).toarray()
    assert np.median(drawn[2000:].sum(1)) / np.median(drawn[:2000].sum(1)) == pytest.approx(2, abs=0.15)
    found, _ = dispersion_of(drawn, 5000)
    assert 0.12 < np.median(found) < 0.26


def test_dispersions_of_genes_are_those_asked_for() -> None:
    asked = np.where(np.arange(50) < 25, 0.05, 0.8)
    found, expressed = dispersion_of(counts(np.zeros((4000, 50)), np.full(4000, 5000.0), asked, rng()).toarray(), 5000)
    assert np.median(found[asked[expressed] == 0.05]) < 0.12 and np.median(found[asked[expressed] == 0.8]) > 0.5
    drawn = draw_dispersions(20_000, rng())
    assert drawn.min() == 0.02 and drawn.max() == 1
    assert drawn.mean() == pytest.approx(DISPERSION, rel=0.03)
