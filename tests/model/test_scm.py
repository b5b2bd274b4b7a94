"""Structural equations: numbers worked out by hand, and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.model.scm import LatentSCM, Mechanism


def chain(intervention="soft", equations="linear"):
    """P0 -2-> P1 -3-> P2, with perturbation 0 on P1: shift 5, noise scale 2 (at most e^3), retention 1/4."""
    scm = LatentSCM(3, 2, intervention, equations).double()
    with torch.no_grad():
        scm.graph.copy_(torch.tensor([[9.0, 2.0, 0.0], [9.0, 9.0, 3.0], [9.0, 9.0, 9.0]]))  # 9: must be ignored
        scm.shift.copy_(torch.tensor([5.0, 1.0]))
        scm.retention_logit.copy_(torch.tensor([1 / 4, 1 / 2]).logit())
        scm.log_scale.copy_(3 * torch.atanh(torch.tensor([2.0, 1.0]).log() / 3))
    return scm


Z = torch.tensor([[1.0, 10.0, 100.0]], dtype=torch.float64)
ON_P1 = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64)  # (conditions, parts, latents)


def test_control_cells_by_hand():
    # u0 = 1; u1 = 2*1 + 10 = 12; u2 = 3*12 + 100 = 136
    assert torch.equal(chain()(Z), torch.tensor([[1.0, 12.0, 136.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("shift", [1.0, 2 + 10 + 5, 3 * 17 + 100]),
        ("hard", [1.0, 2 * 10 + 5, 3 * 25 + 100]),
        ("soft", [1.0, 2 / 4 + 2 * 10 + 5, 3 * 25.5 + 100]),
    ],
)
def test_interventions_by_hand(kind, expected):
    scm = chain(kind)
    mechanism = scm.mechanism(torch.tensor([[0]]), ON_P1)
    assert torch.allclose(scm(Z[None], mechanism)[0], torch.tensor([expected], dtype=torch.float64))


def test_nonlinear_equations_by_hand():
    scm = chain(equations="nonlinear")
    z = torch.tensor([[-1.0, 1.0, 0.0]], dtype=torch.float64)
    # u0 = -1; u1 = 2 * relu(-1) + 1 = 1; u2 = 3 * relu(1)
    assert torch.allclose(scm(z), torch.tensor([[-1.0, 1.0, 3.0]], dtype=torch.float64))
    # with intercepts: u0 = -1 + 3 = 2; u1 = 2 * 2 + 1 - 6 = -1; u2 = 3 * relu(-1) + 0.5
    scm.intercept.copy_(torch.tensor([3.0, -6.0, 0.5]))
    assert torch.allclose(scm(z), torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64))


def test_combination_multiplies_retentions_and_adds_shifts_and_log_scales():
    scm = chain()
    both = scm.mechanism(torch.tensor([[0, 1]]), ON_P1.expand(1, 2, 3))
    assert both.retention[0].tolist() == pytest.approx([1, 1 / 8, 1])
    assert both.shift[0].tolist() == pytest.approx([0, 6, 0])
    assert both.log_scale[0].exp().tolist() == pytest.approx([1, 2, 1])


def test_fill_up_parts_change_nothing():
    scm = chain()
    weights = torch.softmax(torch.randn(1, 2, 3, dtype=torch.float64), -1)
    alone = scm.mechanism(torch.tensor([[1]]), weights[:, :1])
    filled = scm.mechanism(torch.tensor([[1, -1]]), weights)
    for field in ("retention", "log_scale", "shift"):
        assert torch.equal(getattr(alone, field), getattr(filled, field))


def test_half_a_target_weight_gives_half_a_shift():
    scm = chain("shift")
    mechanism = scm.mechanism(torch.tensor([[0]]), torch.tensor([[[0.5, 0.5, 0.0]]], dtype=torch.float64))
    assert mechanism.shift[0].tolist() == [2.5, 2.5, 0.0]
    assert mechanism.retention[0].tolist() == [1, 1, 1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.integers(1, 6), equations=st.sampled_from(["linear", "nonlinear"]))
def test_abduction_inverts_the_equations_under_any_mechanism(seed, p, equations):
    torch.manual_seed(seed)
    scm = LatentSCM(p, 3, "soft", equations).double()
    scm.intercept.normal_()
    mechanism = Mechanism(torch.rand(2, p).double(), torch.randn(2, p).double(), torch.randn(2, p).double())
    z = torch.randn(2, 5, p).double()
    assert torch.allclose(scm.abduct(scm(z, mechanism), mechanism), z, atol=1e-10)
    assert torch.allclose(scm.abduct(scm(z)), z, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(0, 4))
def test_an_intervention_moves_its_target_and_descendants_alone(seed, k):
    torch.manual_seed(seed)
    scm = LatentSCM(5, 1, "hard").double()
    weights = torch.nn.functional.one_hot(torch.tensor([[k]]), 5).double()
    z = torch.randn(1, 7, 5).double()
    changed = (scm(z, scm.mechanism(torch.tensor([[0]]), weights)) - scm(z)).abs().amax((0, 1)) > 1e-12
    reach = torch.linalg.inv(torch.eye(5).double() - (scm.adjacency != 0).double())[k] > 0.5
    assert not (changed & ~reach).any()
    assert changed[k]


def test_linear_equations_with_identity_phi_equal_the_inverse():
    torch.manual_seed(0)
    scm = LatentSCM(6, 1).double()
    z = torch.randn(4, 6).double()
    expected = z @ torch.linalg.inv(torch.eye(6).double() - torch.triu(scm.graph, 1))
    assert torch.allclose(scm(z), expected, atol=1e-12)


def test_ten_thousand_perturbations_are_a_table():
    from crlseq.model.networks import InterventionEncoder

    encoder = InterventionEncoder(10_000, 16, 50)
    weights = encoder(torch.tensor([[9_999, -1]]))
    assert weights.shape == (1, 2, 50)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 2))
    assert sum(parameter.numel() for parameter in encoder.parameters()) < 10_000 * 16 + 16 * 60
