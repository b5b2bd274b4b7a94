"""Hard and soft interventions that look alike, by exact moments; how far retentions of one program agree."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.discovery.edges import select_edges
from crlseq.discovery.likelihood import LinearModel, fit_linear
from crlseq.discovery.moments import DTYPE
from crlseq.discovery.retentions import Kept, agreement, kept, shortcuts
from tests import structural
from tests.structural import AROUND, CHAIN, TARGETS, P, truth


def of(kind: InterventionKind, graph: Tensor, count: float) -> Kept:
    """Of exact moments of so many cells of each perturbation."""
    moments = truth(kind, graph).moments(count)
    return kept(select_edges(fit_linear(moments, P, "hard", targets=TARGETS[None], noise_floor=0.03)))


def test_interventions_that_keep_one_share_are_hard_ones_of_a_graph_with_edges_around() -> None:
    """0 -> 1 -> 2 with weights 1 and 0.8, and half of its input left to 1: as hard ones with 0.5, 0.8 and 0.4 from 0 to 2.

    v_1 = u_1 - 0.5 u_0 is 0.5 u_0 + z_1 in control cells and z_1 + a under intervention; u_2 = 0.8 v_1 + 0.4 u_0 + z_2. With
    loadings W of u those of v are W with 0.5 of row 1 more in row 0.
    """
    targets, w = torch.tensor([[0, 1, 1, 2]]), torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    moments = truth().moments(100)  # of which the implied ones take no more than the number of environments
    moments = type(moments)(moments.means[:5, :5], moments.covariances[:5, :5, :5], moments.counts[:5])
    named = {
        "W": w, "shift": torch.tensor([[1.0, 2, -1, 1.5]], dtype=DTYPE), "scale": torch.full((1, 4), -0.3, dtype=DTYPE),
        "psi": torch.zeros(1, 5, dtype=DTYPE), "offset": torch.zeros(1, 5, dtype=DTYPE),
    }  # fmt: skip
    g = torch.zeros(1, 3, 3, dtype=DTYPE)
    g[0, 0, 1], g[0, 1, 2] = 1.0, 0.8
    soft, hard = LinearModel(moments, 3, "soft"), LinearModel(moments, 3, "hard")
    # An intervention on 2, which has no children, is hard: its logit is far below 0.
    logits = torch.tensor([[0.0, 0, 0, -40]], dtype=DTYPE)
    mean, covariance = soft.environments(soft.pack({**named, "G": g, "retention": logits}), targets)
    g[0, 0, 1], g[0, 0, 2] = 0.5, 0.4
    w = w.clone()
    w[0, 0] += 0.5 * w[0, 1]
    nothing = torch.zeros(1, 0, dtype=DTYPE)
    again = hard.environments(hard.pack({**named, "G": g, "W": w, "retention": nothing}), targets)
    torch.testing.assert_close(again, (mean, covariance))


def test_edges_around_a_program_have_the_sign_of_the_chain() -> None:
    assert shortcuts(AROUND).nonzero().tolist() == [[0, 2]]
    other = CHAIN.clone()
    other[0, 2] = 0.6
    assert not shortcuts(other).any() and not shortcuts(CHAIN).any()
    assert of("hard", other, 100) == Kept(False)


def test_soft_interventions_that_differ_are_seen() -> None:
    assert of("soft", CHAIN, 1000) == Kept(True)


def test_one_share_that_all_interventions_keep_is_seen_where_it_stands_for_several_edges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hard interventions need the edges 0 -> 2, 1 -> 3 and 0 -> 3 in place of one retention."""
    monkeypatch.setattr(structural, "RETENTIONS", torch.full((len(TARGETS),), 0.5, dtype=DTYPE))
    assert of("soft", CHAIN, 2000) == Kept(True)


def test_a_true_edge_around_a_program_is_sure_with_enough_cells_and_in_doubt_with_few() -> None:
    assert of("hard", AROUND, 2000) == Kept(False)
    assert of("hard", AROUND, 100) == Kept(False, 1)


def test_retentions_agree_or_differ_by_the_likelihood_of_their_contrast() -> None:
    """Two of one program, each with a variance of 0.0025: (a - b) / sqrt 2 has that, or 0.0225 more."""
    covariance, targets, gene = 0.0025 * torch.eye(3, dtype=DTYPE), torch.tensor([4, 4, 1]), torch.arange(3)

    def found(a: float, b: float, gene: Tensor = gene) -> float:
        return agreement(torch.tensor([a, b, -2.0], dtype=DTYPE), covariance, targets, gene)

    assert found(-0.5, -0.5) == pytest.approx(math.log(10))
    assert found(-0.5, -0.3) == pytest.approx(math.log(10) + 0.02 / 0.025 - 0.02 / 0.0025)
    assert found(-0.5, -0.3, torch.tensor([0, 0, 1])) == pytest.approx(
        0
    )  # one gene's in two contexts may keep the same
