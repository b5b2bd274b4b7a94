"""Virtual cells of which some escaped: kinds, moments and likelihood of the mixture, by hand."""

import math

import pytest
import torch

from crlseq.model.discrepancy_vae import MOST_KINDS, DiscrepancyVAE

EDGE, SHIFT_A, SHIFT_B = 2.0, 1.5, -1.0


@torch.no_grad()
def model(*penetrance: float) -> DiscrepancyVAE:
    """P0 -2-> P1; perturbation 0 shifts P0, 1 cuts P1 off and shifts it. Encoder and decoder are the identity."""
    made = DiscrepancyVAE(2, 2, 2, 4, "hard").double()
    eye = torch.eye(2, dtype=torch.float64)
    for hidden, output in ((made.encoder.hidden, made.encoder.mean), (made.decoder.hidden, made.decoder.output)):
        hidden.weight.copy_(torch.cat([eye, -eye]))
        output.weight.copy_(torch.cat([eye, -eye], 1) / 1.2)  # relu(v) - relu(-v) = 1.2 v
        hidden.bias.zero_()
        output.bias.zero_()
    made.scm.graph.copy_(torch.tensor([[0.0, EDGE], [0.0, 0.0]]))
    made.scm.shift.copy_(torch.tensor([SHIFT_A, SHIFT_B]))
    made.intervention_encoder.given.copy_(torch.eye(2))
    made.intervention_encoder.is_given.fill_(True)
    made.penetrance.copy_(torch.tensor(penetrance))
    return made


def test_kinds_of_cells_of_a_combination() -> None:
    """Penetrances of .75 and .5: .375 hit by both, .375 by the first, .125 by the second, .125 by none."""
    uniform = (torch.arange(1000) + 0.5) / 1000
    found = list(model(0.75, 0.5).mixture(torch.tensor([0, 1, -1]), uniform))
    assert {(tuple(kind[0].tolist()), weight, int(own.sum())) for weight, kind, own in found} == {
        ((0, 1, -1), 0.375, 375), ((0, -1, -1), 0.375, 375), ((-1, 1, -1), 0.125, 125), ((-1, -1, -1), 0.125, 125),
    }  # fmt: skip
    assert torch.stack([own for _, _, own in found]).sum(0).eq(1).all()


def test_one_kind_where_no_cell_escapes() -> None:
    ((weight, kind, own),) = model(1.0, 0.5).mixture(torch.tensor([0, -1]), torch.rand(9))
    assert weight == 1 and kind.tolist() == [[0, -1]] and own.all()


def test_of_many_parts_the_most_probable_kinds_are_taken() -> None:
    made = DiscrepancyVAE(2, 2, 12)
    made.penetrance.fill_(0.75)
    found = list(made.mixture(torch.arange(12), torch.rand(100, generator=torch.Generator().manual_seed(0))))
    assert len(found) == MOST_KINDS
    assert sum(weight for weight, _, _ in found) == pytest.approx(1)
    assert torch.stack([own for _, _, own in found]).sum(0).eq(1).all()
    assert min(int((kind >= 0).sum()) for _, kind, _ in found) >= 9


@torch.no_grad()
def test_each_kind_of_cell_by_hand() -> None:
    """A cell with z = (1, 0.5), thus u = (1, 2.5), under both perturbations; residuals of those that hit it, common once."""
    made = model(0.5, 0.5)
    made.residual.copy_(torch.tensor([[10.0, 0.0], [0.0, 20.0]]))
    made.common.fill_(100.0)
    hit = torch.tensor([[[True, True], [True, False], [False, True], [False, False]]])
    z = torch.tensor([1.0, 0.5], dtype=torch.float64).expand(1, 4, 2)
    expected = torch.tensor([[[2.5, -0.5], [2.5, 5.5], [1.0, -0.5], [1.0, 2.5]]], dtype=torch.float64)
    torch.testing.assert_close(made.intervene(z, torch.tensor([[0, 1]]), hit), expected)
    missed = made.missed(torch.tensor([[0, 1]]), hit)
    assert missed.tolist() == [[[110, 120], [110, 100], [100, 120], [0, 0]]]
    assert made.missed(torch.tensor([[0, 1], [1, -1]])).tolist() == [[[110, 120]], [[100, 120]]]
    output = made(z, torch.tensor([[0, 1]]), hit=hit)
    torch.testing.assert_close(output.virtual[0, 3], z[0, 3], rtol=0, atol=1e-12)  # escaped: its control cell


@torch.no_grad()
def test_mean_and_variance_of_the_mixture() -> None:
    """30 % of the cells shifted by 1.5: the mean moves by .45, the variance grows by .3 x .7 x 1.5^2."""
    made, n = model(0.3, 1.0), 40_000
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, n, 2, generator=generator, dtype=torch.float64)
    hit = torch.rand(1, n, 1, generator=generator) < made.chance(torch.tensor([[0]]))[:, None]
    change = made.intervene(z, torch.tensor([[0]]), hit)[0] - made.scm(z)[0]
    assert change[:, 0].mean().item() == pytest.approx(0.3 * SHIFT_A, abs=0.015)
    assert change[:, 0].var().item() == pytest.approx(0.21 * SHIFT_A**2, rel=0.02)
    assert change[:, 1].mean().item() == pytest.approx(EDGE * 0.3 * SHIFT_A, abs=0.03)


@torch.no_grad()
def test_where_all_parts_hit_nothing_changes() -> None:
    made = model(1.0, 1.0).float()
    x, eps = torch.randn(2, 2, 7, 2, generator=torch.Generator().manual_seed(0))
    conditions = torch.tensor([[0, 1], [1, -1]])
    plain, mixed = made(x, conditions, eps), made(x, conditions, eps, torch.ones(2, 7, 2, dtype=torch.bool))
    assert torch.equal(plain.virtual, mixed.virtual) and torch.equal(plain.latents, mixed.latents)


@torch.no_grad()
def test_the_prior_of_a_cell_is_a_mean_over_what_hit_it() -> None:
    """Of a combination by the penetrances, of a single perturbation by what is known of the cell."""
    made = model(0.75, 0.5)
    weights = torch.eye(2, dtype=torch.float64).expand(2, 2, 2)
    hit = torch.tensor([[math.nan, math.nan], [0.2, 1.0]], dtype=torch.float64)
    changed = made.changed(torch.tensor([[0, 1], [0, -1]]), weights, hit)
    torch.testing.assert_close(
        changed, torch.tensor([[[0.75, 0.5]] * 2, [[0.2, 1], [1, 1]]], dtype=torch.float64)
    )  # fmt: skip
    x, eps = torch.randn(2, 1, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    both = torch.tensor([[0, -1]])
    as_hit, as_control, between = (
        made.infer(x, both, eps, torch.full((1, 5), share, dtype=torch.float64)).divergence for share in (1.0, 0.0, 0.2)
    )
    torch.testing.assert_close(as_hit, made.infer(x, both, eps).divergence)
    torch.testing.assert_close(as_control, made.infer(x, torch.tensor([[-1, -1]]), eps).divergence)
    torch.testing.assert_close(between, 0.2 * as_hit + 0.8 * as_control)


@torch.no_grad()
def test_errors_of_the_mean_effect() -> None:
    """Each part's by its penetrance, the common one by the probability of being hit at all: 1 - .25 x .5."""
    made = model(0.75, 0.5)
    made.residual_error.copy_(torch.tensor([[4.0, 0.0], [0.0, 2.0]]))
    made.common_error.fill_(8.0)
    found = made.missed_error(torch.tensor([[0, 1], [1, -1]]))
    assert found[0].tolist() == pytest.approx([math.hypot(3, 7), math.hypot(1, 7)])
    assert found[1].tolist() == pytest.approx([4, math.hypot(1, 4)])
