"""The spike-and-slab lasso: what EM computes, by hand, and the mode that coordinate ascent finds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crlseq.model.spike_slab import SpikeSlab, fit_masks

PRIOR = SpikeSlab(100, 1.0, 50.0)
SHARE = torch.tensor([0.2], dtype=torch.float64)


def masks(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_probability_and_rate_by_hand() -> None:
    # At 0 the densities are 0.2 * 1 / 2 and 0.8 * 50 / 2; at 0.1 the slab's is smaller by e^-0.1, the spike's by e^-5.
    at_zero = 0.2 / (0.2 + 0.8 * 50)
    slab, spike = 0.2 * math.exp(-0.1), 40 * math.exp(-5)
    at_tenth = slab / (slab + spike)
    assert PRIOR.probability(masks(0, 0.1, -0.1), SHARE).flatten().tolist() == pytest.approx(
        [at_zero, at_tenth, at_tenth]
    )
    assert PRIOR.rate(masks(0.1), PRIOR.odds(SHARE)).item() == pytest.approx(at_tenth + 50 * (1 - at_tenth))
    assert PRIOR.shares(masks(0, 0.1), SHARE).item() == pytest.approx((at_zero + at_tenth) / 2)


def test_rates_follow_from_the_number_of_cells() -> None:
    prior = SpikeSlab.of(10_000)
    assert (prior.slab, prior.spike) == (1.0, 800.0)
    assert prior.annealed(0).spike == 1 and prior.annealed(1) == prior
    assert prior.annealed(0.5).spike == pytest.approx(math.sqrt(800))
    # About four standard errors, of z / sqrt(n), whatever the share of genes.
    curvature = torch.tensor([10_000.0])
    errors = [float(prior.threshold(curvature, torch.tensor([share]))) / 100 for share in (0.5, 0.1, 0.02)]
    assert errors == pytest.approx([3.67, 4.22, 4.60], abs=0.01)


def test_without_sparsity_nothing_is_shrunk_to_zero_but_by_the_slab() -> None:
    flat = PRIOR.annealed(0)
    curvature, share = torch.tensor([100.0]), torch.tensor([0.3])
    assert flat.threshold(curvature, share).item() == pytest.approx(1.0)
    assert flat.rate(masks(3, 0, 3), flat.odds(SHARE)).flatten().tolist() == pytest.approx([1.0] * 3)


@settings(max_examples=60, deadline=None)
@given(z=st.floats(-120, 120), share=st.floats(0.01, 0.9), start=st.floats(-1, 1))
def test_one_mask_is_the_global_mode_wherever_it_starts(z: float, share: float, start: float) -> None:
    """-z w + n w^2 / 2 - log prior(w) on a grid: the mode is where coordinate ascent ends, but for ties of two modes."""
    prior = SpikeSlab.of(100)
    eta = torch.tensor([share], dtype=torch.float64)
    # Many genes of one kind hold the share where it is.
    others = torch.cat([torch.zeros(round(1000 * (1 - share))), torch.full((round(1000 * share),), 300.0)]).double()
    cross = torch.cat([torch.tensor([z], dtype=torch.float64), others])[:, None]
    begin = torch.cat([torch.tensor([start], dtype=torch.float64), others / 100])[:, None]
    gram = torch.tensor([[100.0]], dtype=torch.float64)
    found, eta = fit_masks(prior, begin, eta, torch.ones_like(begin), cross, gram)
    grid = torch.linspace(-2, 2, 40_001, dtype=torch.float64)

    def height(w: Tensor) -> Tensor:
        density = (
            eta * prior.slab * (-prior.slab * w.abs()).exp() + (1 - eta) * prior.spike * (-prior.spike * w.abs()).exp()
        )
        return z * w - 50 * w**2 + density.log()

    best = height(grid).max()
    # The threshold is Rockova and George's bound, from which the place where the modes tie is a little off.
    assert float(best - height(found[0, :1])) < 0.6


def test_correlated_programs_are_told_apart() -> None:
    """Least squares would load noise on both; the mode has the four masks that made the genes."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(4000, 3, generator=generator, dtype=torch.float64)
    u[:, 1] += u[:, 0]
    true = torch.zeros(30, 3, dtype=torch.float64)
    true[0, 0], true[1, 1], true[2, 2], true[3, :2] = 0.5, -0.4, 0.3, torch.tensor([0.3, 0.3])
    x = u @ true.T + torch.randn(4000, 30, generator=generator, dtype=torch.float64)
    gram, cross = u.T @ u, x.T @ u
    start = torch.linalg.solve(gram, cross.T).T
    share = torch.full((3,), 0.5, dtype=torch.float64)
    found, share = fit_masks(SpikeSlab.of(4000), start, share, torch.ones_like(start), cross, gram)
    assert ((found != 0) == (true != 0)).all()
    assert (found - true).abs().max() < 0.08
    assert (share < 0.2).all()


def test_units_of_one_program_are_one_function() -> None:
    """Two features a program with weights (1, -1) are the feature of their difference."""
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(500, 4, generator=generator, dtype=torch.float64)  # units of programs 0, 1, 0, 1
    function = h[:, :2] - h[:, 2:]
    x = function @ torch.tensor([[1.0, 0], [0, 2], [0, 0]], dtype=torch.float64).T
    shape = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64).expand(3, 4)
    start, share = torch.zeros(3, 2, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    prior = SpikeSlab.of(500)
    one = fit_masks(prior, start, share, shape, x.T @ h, h.T @ h)
    other = fit_masks(prior, start, share, torch.ones(3, 2, dtype=torch.float64), x.T @ function, function.T @ function)
    torch.testing.assert_close(one[0], other[0])
    assert one[0].diagonal().tolist() == pytest.approx([1, 2], abs=0.01)
    assert (one[0][[0, 1, 2, 2], [1, 0, 0, 1]] == 0).all()
