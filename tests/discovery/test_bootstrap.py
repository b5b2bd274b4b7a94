"""Bootstrap of a fit: what is resampled, how programs are matched, support of strong and of absent findings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crlseq.discovery import bootstrap as stability
from crlseq.discovery.bootstrap import Stability, bootstrap, match_programs
from crlseq.discovery.edges import Edges, select_edges
from crlseq.discovery.likelihood import Solution, fit_linear
from crlseq.discovery.moments import DTYPE, environment_moments
from crlseq.discovery.reassign import reassign_targets

P, Q, CELLS = 4, 8, 120
TRUE = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])  # and one more perturbation without effect
SHIFTS = (2.5, -2.0, 2.0, -2.5, 2.0, -2.0, -2.5, 2.0)


def cells(seed: int = 0) -> tuple[Tensor, Tensor]:
    """0 -> 1 -> 2 and 3 apart under hard interventions, in eight noisy components; the last perturbation does nothing."""
    generator = torch.Generator().manual_seed(seed)
    loadings = torch.randn(P, Q, generator=generator, dtype=DTYPE)
    values, environment = [], []
    for c in range(len(TRUE) + 2):
        n = CELLS if c else 4 * CELLS
        u = torch.randn(n, P, generator=generator, dtype=DTYPE)
        for k in range(P):
            hit = 0 < c <= len(TRUE) and int(TRUE[c - 1]) == k
            u[:, k] = 0.7 * u[:, k] + SHIFTS[c - 1] if hit else u[:, k] + (u[:, k - 1] if k in (1, 2) else 0)
        values.append(u @ loadings + 0.3 * torch.randn(n, Q, generator=generator, dtype=DTYPE))
        environment.append(torch.full((n,), c))
    return torch.cat(values), torch.cat(environment)


def fit(values: Tensor, environment: Tensor) -> Edges:
    return select_edges(reassign_targets(fit_linear(environment_moments(values, environment), P, restarts=2)))


@pytest.fixture(scope="module")
def screen() -> tuple[Tensor, Tensor, Edges]:
    values, environment = cells()
    return values, environment, fit(values, environment)


@pytest.fixture(scope="module")
def result(screen: tuple[Tensor, Tensor, Edges]) -> Stability:
    values, environment, edges = screen
    return bootstrap(values, None, environment, edges, n=12, seed=3)


def test_strong_findings_are_made_again_and_absent_ones_are_not(
    screen: tuple[Tensor, Tensor, Edges], result: Stability
) -> None:
    edges = screen[2]
    program = edges.solution.targets[0, [0, 2, 4, 6]]  # of latents 0, 1, 2, 3
    edge, ancestor = result.edge[program][:, program], result.ancestor[program][:, program]
    assert edge[0, 1] == 1 and edge[1, 2] == 1
    assert float(edge.sum()) - 2 < 0.5
    assert ancestor[0, 1] == ancestor[1, 2] == ancestor[0, 2] == 1
    assert bool((ancestor >= edge).all())
    assert bool((result.target[:8] == 1).all())
    assert bool((result.program > 0.95).all())
    assert (result.n, result.failed) == (12, 0)


def test_a_perturbation_without_effect_wanders_among_programs_without_parents(
    screen: tuple[Tensor, Tensor, Edges], result: Stability
) -> None:
    targets = screen[2].solution.targets[0]
    roots = targets[[0, 6]]  # cutting a program from no parents and shifting it by nothing does nothing
    assert float(result.assignment[8, roots].sum()) == 1
    assert bool((result.assignment[8, roots] > 0).all())


def test_shares_of_targets_sum_to_one(screen: tuple[Tensor, Tensor, Edges], result: Stability) -> None:
    torch.testing.assert_close(result.assignment.sum(1), torch.ones(9, dtype=DTYPE))
    of_fit = result.assignment.gather(1, screen[2].solution.targets[0][:, None])[:, 0]
    assert torch.equal(result.target, of_fit)


def test_shift_errors_are_near_those_of_the_information(
    screen: tuple[Tensor, Tensor, Edges], result: Stability
) -> None:
    now = screen[2].solution
    cells = now.model.moments.counts.sum()
    expected = (
        torch.linalg.inv(now.model.information(now.theta, now.targets, now.mask)[2][0]).diagonal() / cells
    ).sqrt()[now.model.at["shift"]]
    assert bool((result.shift_error[:8] / expected[:8]).log().abs().max() < math.log(2.5))


def test_one_seed_one_answer(screen: tuple[Tensor, Tensor, Edges]) -> None:
    values, environment, edges = screen
    first = bootstrap(values, None, environment, edges, n=2, seed=5)
    again = bootstrap(values, None, environment, edges, n=2, seed=5, threads=2)
    assert torch.equal(first.edge, again.edge)
    assert torch.equal(first.program, again.program)


def test_drawn_moments_are_those_of_the_copied_cells() -> None:
    values, environment = cells(1)
    variances = torch.rand(values.shape, dtype=DTYPE, generator=torch.Generator().manual_seed(2))
    drawn = stability._sampler(values, variances, environment)(torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(7)
    rows = []
    for c in range(int(environment.max()) + 1):
        own = torch.nonzero(environment == c)[:, 0]
        rows.append(own[torch.randint(len(own), (len(own),), generator=generator)])
    taken = torch.cat(rows)
    expected = environment_moments(values[taken], environment[taken], variances[taken])
    torch.testing.assert_close(drawn.means, expected.means)
    torch.testing.assert_close(drawn.covariances, expected.covariances)
    assert torch.equal(drawn.counts, expected.counts)


def permuted(solution: Solution, order: list[int], sign: list[float]) -> Solution:
    """The same fit with program ``i`` called ``order.index(i)`` and turned by ``sign``."""
    model, index = solution.model, torch.tensor(order)
    w = model.unpack(solution.theta)
    turn = torch.tensor(sign, dtype=DTYPE)
    loadings = w["W"][:, index] * turn[:, None]
    named = {**w, "G": w["G"][:, index][:, :, index] * turn[:, None] * turn, "W": loadings}
    return replace(solution, theta=model.pack(named), targets=index.argsort()[solution.targets])


def test_programs_are_matched_under_any_names_and_signs(screen: tuple[Tensor, Tensor, Edges]) -> None:
    solution = screen[2].solution
    order, sign, cosine = match_programs(solution, permuted(solution, [2, 0, 1, 3], [-1.0, 1.0, 1.0, 1.0]))
    assert order.tolist() == [1, 2, 0, 3]
    assert sign.tolist() == [1, 1, -1, 1]
    torch.testing.assert_close(cosine, torch.ones(P, dtype=DTYPE))


def test_programs_that_share_no_perturbation_are_matched_by_direction(screen: tuple[Tensor, Tensor, Edges]) -> None:
    solution = screen[2].solution
    on_one = torch.zeros_like(solution.targets)
    other = replace(permuted(solution, [0, 2, 1, 3], [1.0, 1.0, 1.0, 1.0]), targets=on_one)
    order, _, _ = match_programs(replace(solution, targets=on_one), other)
    assert order.tolist() == [0, 2, 1, 3]


def test_the_deviation_leaves_out_replicates_that_moved() -> None:
    nan = math.nan
    shifts = torch.tensor([[1.0, nan, nan], [3.0, 5.0, nan], [nan, 2.0, 1.0]], dtype=DTYPE)
    deviation = stability._deviation(shifts)
    assert deviation[:2].tolist() == pytest.approx([math.sqrt(2), math.sqrt(4.5)])
    assert math.isnan(deviation[2])


def test_pure_shifts_get_no_edges(screen: tuple[Tensor, Tensor, Edges]) -> None:
    values, environment, _ = screen
    moments = environment_moments(values, environment)
    solution = fit_linear(moments, P, "shift", restarts=1, steps=10)
    none = torch.zeros(P, P, dtype=DTYPE)
    assert float(bootstrap(values, None, environment, Edges(solution, none, 1.0), n=2).edge.sum()) == 0


def test_latents_with_posterior_variances_are_resampled_with_them() -> None:
    values, environment = cells(4)
    values = values[:, :P]  # as many coordinates as programs: latents without noise of their own
    variances = torch.full_like(values, 0.02)
    solution = fit_linear(environment_moments(values, environment, variances), P, restarts=2, fit_noise=False)
    edges = select_edges(reassign_targets(solution))
    result = bootstrap(values, variances, environment, edges, n=3)
    program = edges.solution.targets[0, [0, 2, 4]]
    assert result.failed == 0
    assert result.edge[program[0], program[1]] == result.edge[program[1], program[2]] == 1


def test_other_cells_are_refused(screen: tuple[Tensor, Tensor, Edges]) -> None:
    values, environment, edges = screen
    with pytest.raises(ValueError, match="cells of the fit"):
        bootstrap(values[1:], None, environment[1:], edges, n=1)
