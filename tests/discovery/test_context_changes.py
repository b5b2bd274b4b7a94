"""What interventions change by context: what is pooled, what differs, and what noise of programs does not feign."""

from __future__ import annotations

import numpy as np
import pytest

from crlseq.discovery.axes import Consensus
from crlseq.discovery.changes import measure_changes
from crlseq.discovery.context_changes import _turns, changes_by_context, differences
from crlseq.discovery.ordering import Ints, order_programs

EDGE, OWN = 0.8, 1.0
Screen = tuple[np.ndarray, Ints, Ints, Ints]
SHIFTS = (1.5, -2.0, 2.5, -3.0)


def screen(own: float = 0.0, noise: float = 1.0, seed: int = 0, absent: int | None = None) -> Screen:
    """Programs 0 -> 1, and 1 -> 2 of size ``own`` in context 1 alone, where program 0 has noise of that deviation; four hard
    interventions on each program and context, none on ``absent`` in context 1. Cells, environments, targets and contexts.
    """
    rng, parts, targets = np.random.default_rng(seed), [], list[int]()
    mixing = rng.normal(size=(3, 6))
    for c in (0, 1):
        acting = [(i, a) for i in range(3) for a in SHIFTS if (c, i) != (1, absent)]
        for i, a in [(-1, 0.0), *acting]:
            z = rng.normal(size=(900 if i < 0 else 150, 3)) * ([noise, 1, 1] if c else 1)
            if i >= 0:
                z[:, i] = 0.7 * z[:, i] + a
                targets.append(i)
            u = z.copy()
            u[:, 1] += EDGE * u[:, 0] * (i != 1)
            u[:, 2] += own * c * u[:, 1] * (i != 2)
            parts.append((u, 0 if i < 0 else len(targets), c))
    u = np.concatenate([u for u, _, _ in parts])
    environment = np.concatenate([np.full(len(u), e) for u, e, _ in parts])
    context = np.concatenate([np.full(len(u), c) for u, _, c in parts])
    y = u @ mixing + 0.2 * rng.normal(size=(len(u), 6))
    for c in (0, 1):  # but for what cells that were held out of it move the mean
        y[context == c] -= y[(context == c) & (environment == 0)].mean(0) + 0.02
    return y, environment, np.array(targets), context


def test_an_edge_of_one_context_differs_and_what_is_shared_does_not() -> None:
    y, environment, targets, context = screen(own=OWN)
    found = order_programs(y, environment, targets, 3, context=context)
    assert found.differ is not None
    differ = found.differ <= 0.05
    assert differ[1, 2] and differ[0, 2]  # 0 acts on 2 through 1
    differ[[1, 0], 2] = False
    assert not differ.any() and np.isnan(np.diag(found.differ)).all()
    rest, stim = found.contexts
    assert rest.pairs.have("excluded")[1, 2] and stim.pairs.have("upstream")[1, 2]
    assert not rest.declared[1, 2] and stim.declared[1, 2]
    assert found.pairs.have("upstream")[0, 1] and found.declared[0, 1]
    moved = found.reordered(np.array([2, 0, 1]))
    assert moved.differ[2, 0] == found.differ[1, 2] and moved.contexts[1].declared[2, 0]


def test_changes_of_a_context_are_total_effects_whatever_the_noise_of_the_source() -> None:
    y, environment, targets, context = screen(noise=2.0)
    found = order_programs(y, environment, targets, 3, context=context)
    (rest, stim), level_error = changes_by_context(y, environment, targets, found.axes, context)
    assert rest.e[0, 1] == pytest.approx(stim.e[0, 1], rel=0.2)  # noise of 2 makes the plain change 4 times as large
    plain = [
        measure_changes((y[context == c] - found.center) @ found.axes, environment[context == c], targets)
        for c in (0, 1)
    ]
    assert plain[1].e[0, 1] / plain[0].e[0, 1] > 2.5
    assert level_error.shape == (2, 3) and (level_error > 0).all()
    fdr, error = differences([rest, stim], level_error)
    assert (fdr[~np.eye(3, dtype=bool)] > 0.05).all() and found.contexts == ()
    squares = [
        one.e_error[0, 1] ** 2 + one.e[0, 1] ** 2 * own[0] for one, own in zip((rest, stim), level_error, strict=True)
    ]
    assert error[0, 1] == pytest.approx(np.sqrt(sum(squares)))


def test_pooled_changes_have_the_precision_of_both_contexts() -> None:
    y, environment, targets, context = screen()
    axes = order_programs(y, environment, targets, 3, context=context).axes
    both = measure_changes(y @ axes, environment, targets, context)
    parts = [measure_changes((y @ axes)[context == c], environment[context == c], targets) for c in (0, 1)]
    assert min(part.e[0, 1] for part in parts) < both.e[0, 1] < max(part.e[0, 1] for part in parts)
    assert both.e_error[0, 1] < min(part.e_error[0, 1] for part in parts)
    assert [len(group) for group in both.by_target] == [8, 8, 8]


def test_a_program_that_nothing_perturbs_in_a_context_is_compared_in_no_pair_into_it() -> None:
    found = order_programs(*screen(absent=2)[:3], 3, context=screen(absent=2)[3])
    assert found.differ is not None
    assert np.isnan(found.differ[:, 2]).all() and np.isfinite(found.differ[0, 1])
    assert found.pairs.have("upstream")[0, 1]


def test_one_context_changes_nothing_but_the_level() -> None:
    y, environment, targets, context = screen()
    own = context == 0
    targets = targets[:12]
    x = (y @ order_programs(y[own], environment[own], targets, 3).axes)[own]
    one, same = (
        measure_changes(x, environment[own], targets),
        measure_changes(x, environment[own], targets, context[own]),
    )
    level = x[environment[own] == 0].var(0)[:, None]
    np.testing.assert_allclose(same.e, one.e / level, rtol=1e-12)


def agreed(slope: np.ndarray, variance: float) -> Consensus:
    return Consensus(slope, np.full(slope.shape, variance), 0.0, 0.1)


def test_only_the_axis_that_contexts_do_not_share_is_turned() -> None:
    rng, p = np.random.default_rng(0), 5
    everywhere = np.ones(p, dtype=bool)
    rest, stim = 0.02 * rng.normal(size=(2, p, p))
    stim[1, 2] += 1.0
    turn, variance = _turns((agreed(rest, 4e-4), agreed(stim, 4e-4)), (everywhere, everywhere))
    assert turn[1, 1, 2] == pytest.approx(stim[1, 2], abs=0.02) and turn[0, 1, 2] == pytest.approx(rest[1, 2], abs=0.02)
    assert variance[1, 1, 2] == pytest.approx(4e-4, rel=0.01)
    turn[:, 1, 2] = variance[:, 1, 2] = 0
    assert np.abs(turn).max() < 0.01 and variance.max() < 1e-4
    assert not np.diagonal(turn, axis1=1, axis2=2).any()


def test_a_doubtful_turn_is_no_surer_than_its_odds() -> None:
    everywhere, p = np.ones(4, dtype=bool), 4
    slopes = np.zeros((p, p)), np.zeros((p, p))
    slopes[1][0, 1] = 0.35  # 2.5 standard errors of the difference
    turn, variance = _turns((agreed(slopes[0], 0.01), agreed(slopes[1], 0.01)), (everywhere, everywhere))
    assert 0.02 < turn[1, 0, 1] < 0.33 and variance[1, 0, 1] > variance[1, 1, 2]


def test_an_axis_without_perturbations_in_a_context_stays() -> None:
    p = 3
    slopes = np.zeros((p, p)), np.zeros((p, p))
    slopes[0][0, 1] = 1.0
    known = np.ones(p, dtype=bool), np.array([False, True, True])
    turn, variance = _turns((agreed(slopes[0], 1e-4), agreed(slopes[1], 1.0)), known)
    assert not turn.any()
    assert variance[1, 0, 1] == 1.0
