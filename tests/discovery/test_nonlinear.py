"""ReLU equations under shifts: the likelihood by hand, its gradient, recovery, and what is refused."""

import math

import pytest
import torch

from crlseq.discovery.moments import DTYPE
from crlseq.discovery.nonlinear import (
    NonlinearSolution,
    _Cells,
    _flipped,
    _profile,
    _solve,
    _State,
    fit_nonlinear,
)
from crlseq.discovery.nonlinear_test import prefers_nonlinear


def screen(adjacency, n=800, size=3.0, seed=0, relu=True):
    """Controls and two perturbations a latent, shifts of either sign, mixed by a well-conditioned square matrix."""
    generator = torch.Generator().manual_seed(seed)
    p = len(adjacency)
    latents, environment = [], []
    for c in range(2 * p + 1):
        u = torch.randn(n, p, generator=generator, dtype=DTYPE)
        for k in range(p):
            parents = torch.relu(u) if relu else u
            u[:, k] += parents @ adjacency[:, k] + (size if c % 2 else 0.7 * size) * (c > 0 and (c - 1) // 2 == k)
        latents.append(u)
        environment.append(torch.full((n,), c))
    mixing = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=DTYPE))[0] + 0.3 * torch.eye(p, dtype=DTYPE)
    return torch.cat(latents) @ mixing, torch.cat(environment)


def chain(p=3):
    return torch.diag(torch.ones(p - 1, dtype=DTYPE), 1)


def halves(values, environment):
    even = torch.arange(len(values)) % 2 == 0
    return (values[even], environment[even]), (values[~even], environment[~even])


def by_hand():
    return NonlinearSolution(
        B=torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=DTYPE), offset=torch.tensor([1.0, 0.0], dtype=DTYPE),
        intercept=torch.tensor([0.5, 0.0], dtype=DTYPE), adjacency=torch.tensor([[0.0, 3.0], [0.0, 0.0]], dtype=DTYPE),
        targets=torch.tensor([1]), shift=torch.tensor([4.0], dtype=DTYPE), nll=0.0,
    )  # fmt: skip


def test_likelihood_by_hand():
    values = torch.tensor([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]], dtype=DTYPE)
    environment = torch.tensor([0, 1, 0])
    # v - o = (1, 1): u = (3, 1), z = (2.5, 1 - 9) and, shifted, (2.5, -12); (-1, 1): u = (-1, 1), z = (-1.5, 1); det 2
    expected = torch.tensor([0.5 * (6.25 + 64), 0.5 * (6.25 + 144), 0.5 * (2.25 + 1)], dtype=DTYPE) - math.log(2)
    assert torch.allclose(by_hand().per_cell(values, environment), expected)


def point(mask, seed=1):
    values, environment = screen(chain(), n=40, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    a = torch.eye(3, dtype=DTYPE) + 0.3 * torch.randn(3, 3, generator=generator, dtype=DTYPE)
    cells = _Cells(values, environment, torch.bincount(environment).to(DTYPE))
    return cells, _State(a, 0.1 * torch.ones(3, dtype=DTYPE), mask, torch.tensor([0, 0, 1, 1, 2, 2]))


def test_gradient_is_the_slope_of_the_profile_likelihood():
    cells, state = point(torch.triu(torch.ones(3, 3, dtype=DTYPE), 1))
    _, by_a, by_o = _profile(cells, state)
    h = 1e-6
    for i in range(3):
        for name, slope, at in [("A", by_a, (i, 1)), ("o", by_o, (i,))]:
            values = []
            for sign in (1, -1):
                moved = {"A": state.A.clone(), "o": state.o.clone()}
                moved[name][at] += sign * h
                values.append(_profile(cells, _State(**moved, mask=state.mask, targets=state.targets))[0])
            assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(slope[at]), abs=1e-5)


def test_the_other_sign_of_a_parent_of_leaves_is_the_same_model():
    mask = torch.zeros(3, 3, dtype=DTYPE)
    mask[0, 1] = mask[0, 2] = 1
    cells, state = point(mask)
    G = _solve(cells, state).G
    residuals = []
    for at in (state, _flipped(cells, state, 0)):
        u = (cells.u - at.o) @ at.A
        residuals.append(u - torch.relu(u) @ G)
    assert torch.allclose(residuals[0][:, 1:], residuals[1][:, 1:])


@pytest.fixture(scope="module")
def preference():
    return prefers_nonlinear(*halves(*screen(chain(), n=400)))


def test_a_chain_is_recovered(preference):
    found = preference.nonlinear
    name = found.targets[::2]
    assert torch.equal(found.targets[1::2], name) and len(name.unique()) == 3
    adjacency = found.adjacency[name][:, name]
    assert torch.equal(adjacency != 0, chain() != 0)
    assert torch.allclose(adjacency.abs(), chain(), atol=0.25)
    assert torch.allclose(found.shift.abs(), torch.tensor([3.0, 2.1] * 3, dtype=DTYPE), atol=0.4)


def test_nonlinear_equations_are_preferred_where_they_hold(preference):
    assert preference.chosen
    assert preference.gain > 5 * preference.error
    assert preference.misfit.value == pytest.approx(1, abs=0.3)


def test_per_cell_agrees_with_the_fit(preference):
    cells = halves(*screen(chain(), n=400))[0]
    fitted = preference.nonlinear
    assert float(fitted.per_cell(*cells).mean()) == pytest.approx(fitted.nll, abs=1e-4)


def test_linear_equations_are_kept_where_they_hold():
    found = prefers_nonlinear(*halves(*screen(chain(), n=400, relu=False)))
    assert not found.chosen
    assert found.nonlinear is not None and not found.nonlinear.adjacency.any()


@pytest.mark.parametrize("spoil", ["constant", "collinear", "tiny", "missing", "nan"])
def test_what_cannot_be_fitted_keeps_linear_equations(spoil):
    values, environment = screen(chain(), n=60)
    if spoil == "constant":
        values[:, 1] = 2.0
    elif spoil == "collinear":
        values[:, 1] = values[:, 0] + values[:, 2]
    elif spoil == "tiny":
        kept = (environment != 2) | (torch.arange(len(values)) % 60 == 0)
        values, environment = values[kept], environment[kept]
    elif spoil == "missing":
        values, environment = values[environment != 2], environment[environment != 2]
    else:
        values[5, 1] = math.nan
    found = prefers_nonlinear((values, environment), (values, environment))
    assert not found.chosen
    assert found.nonlinear is None
    assert found.nonlinear is None and found.misfit is None


def test_collinear_shifts_and_few_cells_stay_finite():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(60, 3, generator=generator, dtype=DTYPE)
    environment = torch.arange(60) % 6
    values += environment[:, None] * torch.tensor([1.0, 2.0, 0.5], dtype=DTYPE)  # every shift along one line
    found = fit_nonlinear(values, environment)
    assert math.isfinite(found.nll)
    assert bool(torch.isfinite(found.adjacency).all())
    assert not bool((torch.matrix_power(found.adjacency, 3) != 0).any())
