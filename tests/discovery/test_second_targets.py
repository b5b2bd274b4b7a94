"""Second targets: directions that most perturbations agree on, by hand; recovery, error rate and odd input."""

from __future__ import annotations

import numpy as np
import pytest

from crlseq.discovery.second_targets import SecondTargets, second_targets

P, CELLS = 5, 300


def screen(
    seed: int, second: dict[int, tuple[int, float]], lean: np.ndarray | None = None, k: int = 20, p: int = P
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates, environments and targets: perturbation c shifts c % p by 2 to 4 along e + lean in 70 % of its cells,
    and those in ``second`` a further program by a size.
    """
    rng = np.random.default_rng(seed)
    targets = np.arange(k) % p
    shifts = np.eye(p)[targets] * (rng.uniform(2, 4, k) * rng.choice([-1, 1], k))[:, None]
    for c, (program, size) in second.items():
        shifts[c, program] += size
    directions = np.eye(p) if lean is None else np.eye(p) + lean
    environment = np.repeat(np.arange(k + 1), [1500, *[CELLS] * k])
    hit = (rng.random(len(environment)) < 0.7) & (environment > 0)
    x = rng.normal(size=(len(environment), p))
    x[hit] += (shifts @ directions)[environment[hit] - 1]
    return x, environment, targets


def found(seen: SecondTargets) -> set[tuple[int, int]]:
    return {(int(c), int(j)) for c, j in zip(*np.nonzero(seen.fdr <= 0.05), strict=True)}


def test_second_targets_are_found_with_their_size() -> None:
    second = {0: (2, 1.5), 1: (4, -1.2), 7: (0, 2.0), 13: (1, 1.0)}
    seen = second_targets(*screen(0, second))
    assert found(seen) == {(c, program) for c, (program, _) in second.items()}
    for c, (program, size) in second.items():
        assert seen.shift[c, program] == pytest.approx(0.7 * size, abs=4 * seen.error[c, program])
        assert seen.z[c, program] == pytest.approx(seen.shift[c, program] / seen.error[c, program])


def test_a_lean_that_all_perturbations_of_a_target_share_is_none() -> None:
    lean = np.zeros((P, P))
    lean[0, 3], lean[2, 1] = 0.3, -0.2
    seen = second_targets(*screen(1, {5: (2, 1.5)}, lean))
    assert found(seen) == {(5, 2)}
    assert seen.directions == pytest.approx(np.eye(P) + lean, abs=0.06)


def test_none_are_found_where_there_are_none() -> None:
    some = [second_targets(*screen(seed, {})) for seed in range(20)]
    assert sum(bool(found(seen)) for seen in some) <= 3
    z = np.concatenate([seen.z[np.isfinite(seen.z)] for seen in some])
    assert np.std(z) < 1.1


def test_one_that_disagrees_with_the_only_other_of_its_target_is_not_told() -> None:
    seen = second_targets(*screen(2, {0: (3, 2.0)}, k=2 * P))  # 0 and 5 share a target
    assert np.isnan(seen.fdr[0, 3]) and np.isnan(seen.fdr[5, 3])
    assert not found(seen)
    assert np.isfinite(seen.fdr[1, 3])  # 1 and 6 agree
    assert np.isnan(second_targets(*screen(2, {}, k=P)).z).all()  # one perturbation a target


def test_order_of_perturbations_and_units_of_shifts() -> None:
    x, environment, targets = screen(3, {4: (0, 1.5)})
    seen = second_targets(x, environment, targets)
    order = np.random.default_rng(0).permutation(len(targets))
    number = np.r_[0, np.argsort(order) + 1]
    again = second_targets(x, number[environment], targets[order])
    assert again.z == pytest.approx(seen.z[order], nan_ok=True)
    scaled = second_targets(x * np.linspace(0.5, 2, P), environment, targets)
    assert found(scaled) == found(seen)


def test_a_perturbation_of_few_cells_and_one_program() -> None:
    x, environment, targets = screen(4, {})
    few = np.flatnonzero(environment != 3)
    cells = np.sort(np.r_[few, np.flatnonzero(environment == 3)[:5]])
    seen = second_targets(x[cells], environment[cells], targets)
    assert np.isnan(seen.z[2]).all() and np.isfinite(seen.shift[2]).all()
    gone = second_targets(x[few], environment[few], targets)
    assert np.isnan(gone.z[2]).all() and np.isfinite(gone.z[3]).any()
    alone = second_targets(*screen(5, {}, k=3, p=1))
    assert alone.shift.shape == (3, 1) and np.isnan(alone.fdr).all()
