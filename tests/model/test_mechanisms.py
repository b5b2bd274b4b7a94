"""Location-scale mechanisms: numbers by hand, and properties that must hold for any network."""

import math

import pytest
import torch

from crlseq.config import make_config
from crlseq.errors import UsageError
from crlseq.model.mechanisms import LocationScale
from crlseq.model.scm import LatentSCM
from tests.model.test_scm import ON_P1, Z, chain

KINDS = ("shift", "hard", "soft")


def drawn(intervention="soft", seed=0):
    """The chain P0 -> P1 -> P2 with networks that are not 0."""
    torch.manual_seed(seed)
    scm = chain(intervention, "flow")
    with torch.no_grad():
        scm.mechanisms.location.normal_()
        scm.mechanisms.scale.normal_()
        scm.intercept.copy_(torch.tensor([0.5, -1.0, 2.0]))
    return scm.double()


def test_by_hand():
    mechanisms = LocationScale(2).double()
    with torch.no_grad():
        for weight in mechanisms.parameters():
            weight.zero_()
        mechanisms.inner[0, 1, 0], mechanisms.bias[1, 0] = 2.0, 0.5
        mechanisms.location[1, 0], mechanisms.scale[1, 0] = 3.0, -1.0
    mean, log_scale = mechanisms(
        torch.tensor([[4.0, 7.0]], dtype=torch.float64), torch.tensor([[0.0, 0.25], [0.0, 0.0]]).double()
    )
    h = 2.5 / (1 + math.exp(-2.5)) - 0.5 / (1 + math.exp(-0.5))  # of 2 * 0.25 * 4 + 0.5
    assert mean[0].tolist() == pytest.approx([0, 0.25 * 4 + 3 * h])
    assert log_scale[0].tolist() == pytest.approx([0, 2 * math.tanh(-h / 2)])


@pytest.mark.parametrize("kind", KINDS)
def test_they_start_linear(kind):
    linear, flow = chain(kind), chain(kind, "flow")
    mechanism = linear.mechanism(torch.tensor([[0]]), ON_P1)
    torch.testing.assert_close(flow(Z), linear(Z))
    torch.testing.assert_close(flow(Z[None], mechanism), linear(Z[None], mechanism))
    u = linear(Z[None], mechanism)
    torch.testing.assert_close(flow.abduct(u, mechanism), linear.abduct(u, mechanism))
    torch.testing.assert_close(flow.log_density(u, mechanism), linear.log_density(u, mechanism))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_abducted(kind):
    scm = drawn(kind)
    z = torch.randn(1, 50, 3, dtype=torch.float64)
    for mechanism in (None, scm.mechanism(torch.tensor([[0]]), ON_P1)):
        torch.testing.assert_close(scm.abduct(scm(z, mechanism), mechanism), z)


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_is_that_of_the_noise_by_automatic_derivatives(kind):
    scm = drawn(kind)
    mechanism = scm.mechanism(torch.tensor([[0]]), ON_P1)
    u = torch.randn(3, dtype=torch.float64)

    def noise(u):
        return scm.abduct(u[None, None], mechanism)[0, 0]

    jacobian = torch.autograd.functional.jacobian(noise, u)
    expected = -0.5 * (noise(u) ** 2).sum() + torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(scm.log_density(u[None, None], mechanism)[0, 0], expected)


def test_a_hard_intervention_cuts_mean_and_scale_off_and_the_rest_stays():
    scm = drawn("hard")
    mechanism = scm.mechanism(torch.tensor([[0]]), ON_P1)
    z = torch.randn(1, 2, 3, dtype=torch.float64)
    z[0, 1] = z[0, 0] + torch.tensor([5.0, 0.0, 0.0])  # another parent, the same noise
    control, hit = scm(z), scm(z, mechanism)
    assert control[0, 0, 1] != control[0, 1, 1]
    assert hit[0, 0, 1] == hit[0, 1, 1]
    torch.testing.assert_close(hit[0, 0, 1], 2 * z[0, 0, 1] + 5 - 1)  # scale 2, shift 5, intercept -1
    assert hit[..., 0].tolist() == control[..., 0].tolist()


def test_a_latent_without_parents_has_noise_of_variance_one():
    scm = drawn()
    with torch.no_grad():
        scm.graph.zero_()
        scm.intercept.zero_()
    torch.testing.assert_close(scm(Z), Z)


def test_only_methods_that_learn_by_gradient_take_them():
    assert make_config(method="gradient", equations="flow").model.equations == "flow"
    with pytest.raises(UsageError, match="linear has no equations of the kind flow"):
        make_config(method="linear", equations="flow")
    assert LatentSCM(2, 1).mechanisms is None
