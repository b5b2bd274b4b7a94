"""The number of latents: rays worked out by hand, simulations with a known truth, odd input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crlseq.data.simulate import simulate
from crlseq.discovery import n_latents as module
from crlseq.discovery.n_latents import LatentChoice, choose_n_latents

CELLS = 60


def moved(shifts, n_components, seed=0, cells=CELLS, control=400):
    """Standard normal cells of the controls and of one perturbation for each row of ``shifts``."""
    rng = np.random.default_rng(seed)
    shifts = np.asarray(shifts, dtype=float)
    environment = np.repeat(np.arange(len(shifts) + 1), [control, *[cells] * len(shifts)])
    values = rng.standard_normal((len(environment), n_components))
    values[:, : shifts.shape[1]] += np.vstack([np.zeros(shifts.shape[1]), shifts])[environment]
    return torch.tensor(values), torch.tensor(environment)


def simulated(seed, **changes):
    sizes = {"n_latents": 5, "perturbations_per_latent": 4, "n_genes": 40, "cells_per_perturbation": 150}
    screen = simulate(**(sizes | {"n_control": 1000, "noise": "gaussian", "seed": seed} | changes))
    names = list(screen.uns["truth"]["target"].index)
    environment = torch.tensor([names.index(v) + 1 if v in names else 0 for v in screen.obs["perturbation"]])
    return torch.tensor(np.asarray(screen.X, dtype=np.float64)), environment


def bent(angle, seed=1):
    """One latent z with shifts -4, 4, whose two ways are at ``angle`` degrees, and a latent at right angles to both."""
    rng = np.random.default_rng(seed)
    shift = np.array([0, 4, 4, -4, -4, 0, 0])
    environment = np.repeat(np.arange(7), [1000, *[150] * 6])
    z = rng.standard_normal(len(environment)) + shift[environment]
    other = rng.standard_normal(len(environment)) + 3 * (environment >= 5)
    one, two = np.array([1.0, 0.0]), np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
    plane = np.maximum(z, 0)[:, None] * one + np.maximum(-z, 0)[:, None] * two
    values = np.column_stack([plane, other]) + 0.3 * rng.standard_normal((len(z), 3))
    return torch.tensor(values), torch.tensor(environment)


def test_perturbations_on_one_line_are_one_latent():
    assert choose_n_latents(*moved([[2, 0], [-2, 0], [1.5, 0], [-3, 0]], 5)).n_latents == 1


def test_orthogonal_lines_are_counted():
    shifts = np.vstack([2 * np.eye(4), -1.5 * np.eye(4), 3 * np.eye(4)])
    found = choose_n_latents(*moved(shifts, 8))
    assert found.n_latents == 4
    assert found.reason.startswith("clear effects span 4 directions, none of them")


def test_perturbations_without_effect_are_no_latents():
    shifts = np.vstack([2 * np.eye(2), np.zeros((20, 2))])
    found = choose_n_latents(*moved(shifts, 6))
    assert found.n_latents == 2
    assert found.reason.startswith("clear effects span 2 directions")


def scaled(targets, scales, shifts=(), cells=400, seed=0):
    """Perturbations that scale one of six components, and further ones that shift the first components."""
    rng = np.random.default_rng(seed)
    environment = np.repeat(np.arange(len(targets) + len(shifts) + 1), cells)
    values = rng.standard_normal((len(environment), 6))
    for c, (target, scale) in enumerate(zip(targets, scales, strict=True)):
        values[environment == c + 1, target] *= scale
    for c, (target, shift) in enumerate(shifts):
        values[environment == len(targets) + c + 1, target] += shift
    return torch.tensor(values), torch.tensor(environment)


def test_programs_of_perturbations_that_change_variances_alone_are_counted():
    found = choose_n_latents(*scaled([0, 1, 2, 0, 1], [2.0, 1.7, 0.4, 0.5, 2.0]))
    assert found.n_latents == 3
    assert found.reason == "No mean shifts; variances change along 3 directions."
    shifts = [(0, 2.0), (0, -2.0), (1, 1.5)]
    both = choose_n_latents(*scaled([0, 3, 3], [2.0, 2.0, 0.5], shifts))  # the first is on the line of two shifts
    assert both.n_latents == 3
    assert both.reason.endswith("rank 2; variances alone change along 1 direction more.")


def test_no_variance_is_taken_for_a_program_by_chance():
    for seed in range(5):
        values, environment = scaled([0] * 20, [1.0] * 20, cells=100, seed=seed)
        assert choose_n_latents(values, environment).n_latents == 1
    heavy = torch.tensor(np.random.default_rng(0).standard_t(5, size=values.shape))
    assert choose_n_latents(heavy, environment).n_latents == 1


@pytest.mark.parametrize("angle", [90, 120, 180])
def test_a_bent_line_is_one_latent(angle):
    found = choose_n_latents(*bent(angle))
    assert found.n_latents == 2
    assert ("rank 3" in found.reason) == (angle < 180)  # the rank alone counts both ways


def test_exclusion_of_the_two_ways_of_one_latent_and_of_unrelated_rays():
    values, environment = bent(90)
    shifts = module._shifts(*module._usable(values, environment))
    rays, members = module._bundle(shifts)
    assert len(rays) == 3
    score = module._exclusion(rays, members, shifts)
    one, two, other = int(members[0]), int(members[2]), int(members[4])
    assert score[one, two] < module.ONE_LATENT
    assert abs(score[one, other]) < 0.3
    assert abs(score[two, other]) < 0.3
    assert torch.allclose(score, score.T)


def test_members_of_rays():
    shifts = module._shifts(*moved([[3, 0], [0, 3], [2, 0], [0, 0], [0, 2], [3, 0.3]], 4))
    rays, members = module._bundle(shifts)
    assert rays.shape == (2, 2)
    assert rays.norm(dim=1).numpy() == pytest.approx(np.ones(2))
    a, b = int(members[0]), int(members[1])
    assert members.tolist() == [a, b, a, -1, b, a]


@pytest.mark.parametrize(("mixing", "seed"), [("linear", 21), ("linear", 22), ("network", 21), ("network", 23)])
def test_simulations(mixing, seed):
    assert abs(choose_n_latents(*simulated(seed, mixing=mixing)).n_latents - 5) <= (mixing == "network")


def test_relu_chain_with_one_perturbation_a_latent_and_constant_components():
    rng = np.random.default_rng(0)
    environment = np.repeat(np.arange(6), [2000, *[400] * 5])
    latents = rng.standard_normal((len(environment), 5)) + 5 * np.eye(6, 5, -1)[environment]
    for k in range(1, 5):
        latents[:, k] += np.maximum(latents[:, k - 1], 0)
    values = torch.tensor(np.column_stack([latents, np.zeros((len(latents), 5))]))
    assert choose_n_latents(values, torch.tensor(environment)).n_latents == 5


def test_labels_without_effect_give_one():
    rng = np.random.default_rng(3)
    for _ in range(5):
        values = torch.tensor(rng.standard_normal((1000, 20)))
        found = choose_n_latents(values, torch.tensor(rng.integers(0, 12, 1000)))
        assert found == LatentChoice(1, [], found.reason)


def test_curve_rises_to_the_number_and_no_further():
    shifts = np.vstack([2 * np.eye(3), -1.5 * np.eye(3), 3 * np.eye(3)])
    curve = choose_n_latents(*moved(shifts, 8)).curve
    assert [point["n_latents"] for point in curve] == list(range(1, 8))
    held_out = [point["held_out"] for point in curve]
    assert held_out[0] < held_out[1] < held_out[2]
    assert max(held_out[3:]) < held_out[2] + 2
    assert curve[2]["standard_error"] == 0
    assert all(point["standard_error"] > 0 for point in curve[:2])


def test_held_out_score_of_one_line():
    values, environment = moved([[3.0, 0], [-3.0, 0]], 2, cells=2000, control=2000)
    curve = choose_n_latents(values, environment).curve
    # 3^2 over the squared standard error of half the cells, 1/1000 + 1/1000; whitening 1
    assert curve[0]["held_out"] == pytest.approx(9 / 0.002, rel=0.06)


def test_invariant_to_invertible_maps_and_to_the_order_of_cells():
    values, environment = simulated(21, mixing="network")
    rng = np.random.default_rng(1)
    order = torch.tensor(rng.permutation(len(values)))
    mixed = values @ torch.tensor(rng.standard_normal((40, 40)) + 5 * np.eye(40)) + 7
    expected = choose_n_latents(values, environment).n_latents
    assert choose_n_latents(mixed[order], environment[order]).n_latents == expected


def test_same_seed_same_curve():
    cells = moved(2 * np.eye(3), 5)
    assert choose_n_latents(*cells, seed=4) == choose_n_latents(*cells, seed=4)


def test_collinear_components_change_nothing():
    values, environment = moved(2 * np.eye(3), 5)
    wide = torch.cat([values, values @ torch.ones(5, 2, dtype=values.dtype), torch.ones(len(values), 1)], 1)
    assert choose_n_latents(wide, environment).n_latents == 3


@pytest.mark.parametrize(
    "environment",
    [[], [0], [0, 0, 0], [1, 1, 2, 2], [0, 0, 1, 2, 3], [0, 1, 1, 1], [0, 0, 5, 5], [0, 0, 1, 1, 2, 2]],
)
@pytest.mark.parametrize("constant", [False, True])
def test_few_cells_give_one(environment, constant):
    drawn = torch.randn(len(environment), 3, generator=torch.Generator().manual_seed(0))
    values = torch.ones_like(drawn) if constant else drawn  # by chance two cells may lie far apart: 9 of 1000 draws
    assert choose_n_latents(values, torch.tensor(environment, dtype=torch.long)).n_latents == 1


def test_ten_thousand_perturbations():
    shifts = 4 * np.eye(6)[np.arange(10_000) % 6]
    found = choose_n_latents(*moved(shifts, 12, cells=3, control=3000))
    assert found.n_latents == 6
    assert len(found.curve) <= module.MAX_CURVE


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 6), st.floats(0, 1e6), st.integers(0, 10_000)
)
def test_never_fails_and_stays_within_bounds(environment, q, size, seed):
    rng = np.random.default_rng(seed)
    labels = np.array(environment)
    values = rng.standard_normal((len(labels), q)) + size * rng.standard_normal((6, q))[labels]
    found = choose_n_latents(torch.tensor(values), torch.tensor(labels))
    n_perturbations = len(set(environment) - {0})
    assert 1 <= found.n_latents <= max(1, min(n_perturbations, q))
    assert all(math.isfinite(value) for point in found.curve for value in point.values())
