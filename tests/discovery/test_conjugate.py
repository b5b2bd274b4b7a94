"""Products with the information, and the search by them: against the information itself, direct solves and exact scoring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.discovery import conjugate, scoring
from crlseq.discovery import likelihood as linear
from crlseq.discovery.conjugate import Problem, conjugate_gradients, search
from crlseq.discovery.edges import select_edges
from crlseq.discovery.likelihood import LinearModel, allowed_edges
from crlseq.discovery.moments import DTYPE, environment_moments
from tests.discovery.test_likelihood import FLOOR, KINDS, somewhere
from tests.structural import GRAPH, TARGETS, P, matched, truth


@pytest.mark.parametrize("fit_noise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_value_gradient_and_products_are_those_of_the_information(kind: InterventionKind, fit_noise: bool) -> None:
    model, theta, targets, mask = somewhere(kind, restarts=1, fit_noise=fit_noise)
    nll, gradient, information = model.information(theta, targets, mask)
    problem = model.problem(targets[0], mask[0])
    value, slope = problem.score(theta[0])
    torch.testing.assert_close(value, nll[0])
    torch.testing.assert_close(problem.value(theta[0]), nll[0])
    torch.testing.assert_close(slope, gradient[0])
    free, times = problem.free, problem.product(theta[0])
    for vector in torch.randn(3, model.size, generator=torch.Generator().manual_seed(0), dtype=DTYPE) * free:
        torch.testing.assert_close(times(vector), information[0] @ vector)


def test_a_value_is_infinite_where_a_covariance_is_not_positive() -> None:
    model, theta, targets, mask = somewhere("hard", restarts=1)
    theta[0, model.at["W"]] = torch.nan
    value, _ = model.problem(targets[0], mask[0]).score(theta[0])
    assert float(value) == float("inf")


def test_conjugate_gradients_by_hand() -> None:
    """As many products as the preconditioned matrix has different eigenvalues."""
    matrix, b = torch.diag(torch.tensor([1.0, 1, 4, 4], dtype=DTYPE)), torch.tensor([1.0, 2, 8, 4], dtype=DTYPE)
    for precondition, products in ((lambda v: v, 2), (lambda v: v / matrix.diagonal(), 1)):
        x, n = conjugate_gradients(lambda v: matrix @ v, precondition, b)
        torch.testing.assert_close(x, torch.tensor([1.0, 2, 2, 1], dtype=DTYPE))
        assert n == products


def test_lengths_by_hand() -> None:
    step = torch.tensor([0.3, -6.0, 0.6], dtype=DTYPE)
    cut, whole, part = conjugate._lengths(step, slice(1, 2))
    torch.testing.assert_close(cut, torch.tensor([0.3, -1.5, 0.6], dtype=DTYPE))
    torch.testing.assert_close(whole, step / 4)
    torch.testing.assert_close(part, step / 16)


def quadratic(matrix: Tensor, free: Tensor, made: list[int]) -> Problem:
    """Half of x' A x - sum x; counts how often the information is made."""

    def information(_: Tensor) -> Tensor:
        made.append(1)
        return matrix.clone()

    def score(x: Tensor) -> tuple[Tensor, Tensor]:
        return 0.5 * x @ matrix @ x - x.sum(), (matrix @ x - 1) * free

    return Problem(
        lambda x: score(x)[0], score, lambda _: lambda v: (matrix @ v) * free, information, free, slice(0, 0)
    )


def test_a_quadratic_is_minimised_with_one_factor_and_what_is_not_free_stays() -> None:
    spread = torch.randn(6, 12, generator=torch.Generator().manual_seed(0), dtype=DTYPE)
    matrix, free = spread @ spread.T / 12, torch.ones(6, dtype=DTYPE)
    free[2], made = 0, list[int]()
    start = torch.full((6,), 0.2, dtype=DTYPE)
    end, value, converged = search(quadratic(matrix, free, made), start, 1e6, 50)
    rest = torch.tensor([0, 1, 3, 4, 5])
    expected = torch.linalg.solve(matrix[rest][:, rest], 1 - matrix[rest, 2] * 0.2)
    torch.testing.assert_close(end[rest], expected, atol=1e-3, rtol=0)
    assert end[2] == 0.2 and bool(converged) and len(made) == 1
    torch.testing.assert_close(value, 0.5 * end @ matrix @ end - end.sum())


def test_a_search_without_a_way_down_stays_and_does_not_converge() -> None:
    infinite, one = torch.tensor(torch.inf, dtype=DTYPE), torch.ones(2, dtype=DTYPE)
    hopeless = Problem(lambda _: infinite, lambda _: (infinite, one), lambda _: lambda v: v, lambda _: torch.eye(2, dtype=DTYPE), one, slice(0, 0))  # fmt: skip
    end, _, converged = search(hopeless, torch.zeros(2, dtype=DTYPE), 10.0, 100)
    assert torch.equal(end, torch.zeros(2, dtype=DTYPE)) and not bool(converged)


# Hard interventions with a dense graph end slowly.
@pytest.mark.parametrize(("kind", "tolerance"), [("hard", 1e-6), ("soft", 1e-4), ("shift", 1e-4)])
def test_products_end_where_the_information_does(kind: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (scoring, conjugate):
        monkeypatch.setattr(module, "TOLERANCE", tolerance)
    moments = environment_moments(*truth(kind).cells(300))
    model = LinearModel(moments, P, kind, FLOOR)
    mask = allowed_edges(P, kind) if kind != "soft" else (GRAPH != 0).to(DTYPE)[None]
    exact = model.solve(model.start(TARGETS[None]), TARGETS[None], mask)
    monkeypatch.setattr(linear, "INFORMATION_VALUES", 1)
    found = model.solve(model.start(TARGETS[None]), TARGETS[None], mask)
    assert found.converged.tolist() == exact.converged.tolist() == [True]
    torch.testing.assert_close(found.nll, exact.nll, atol=1e-6, rtol=0)
    assert not torch.equal(found.theta, exact.theta)  # it was another way


def test_the_graph_is_the_same_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "INFORMATION_VALUES", 1)
    model = LinearModel(environment_moments(*truth().cells(150)), P, "hard", FLOOR)
    dense = model.solve(model.start(TARGETS[None]), TARGETS[None], allowed_edges(P, "hard"))
    assert torch.equal(matched(select_edges(dense).adjacency, TARGETS) != 0, GRAPH != 0)
