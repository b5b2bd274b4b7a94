"""Discovery on small simulated screens with a known truth, and what it refuses and leaves out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch

from crlseq.config import ModelConfig, make_config
from crlseq.data.dataset import read_data
from crlseq.data.simulate import simulate
from crlseq.discovery import discover as module
from crlseq.discovery.bootstrap import Stability
from crlseq.discovery.discover import discover, passed_alone
from crlseq.discovery.misfit import Misfit
from crlseq.discovery.pairs import STATUSES
from crlseq.discovery.result import Discovery, with_unit_noise
from crlseq.discovery.task import Task
from crlseq.discovery.thresholds import DECLARED_SUPPORT
from crlseq.errors import InputError

SIZES: dict[str, Any] = {
    "n_latents": 4,
    "perturbations_per_latent": 3,
    "n_genes": 40,
    "cells_per_perturbation": 100,
    "n_control": 500,
    "noise": "gaussian",
    "seed": 1,
}
CONFIG = ModelConfig(n_latents=4, bootstrap=0)


class Screen:
    """A simulated screen as discovery takes it, with its truth in the order of its perturbations."""

    def __init__(self, **changes: Any) -> None:
        adata = simulate(**{**SIZES, **changes})
        self.data = read_data(adata, make_config().data, 0)
        truth = adata.uns["truth"]
        self.adjacency = truth["adjacency"] != 0
        self.target = truth["target"].loc[list(self.data.perturbation_names), "latent"].to_numpy()
        self.latents = adata.obsm["true_latents"]

    def discover(self, config: ModelConfig = CONFIG, **changes: Any) -> Discovery:
        return discover(self.task(config, **changes))

    def task(self, config: ModelConfig = CONFIG, **changes: Any) -> Task:
        return Task(**{"data": self.data, "effect": np.ones(12), "config": config, "seed": 0, **changes})

    def known_targets(self) -> dict[str, str]:
        """Programs L0 to L3 of the perturbations, upstream ones first."""
        order = nx.topological_sort(nx.from_numpy_array(self.adjacency, create_using=nx.DiGraph))
        names = np.array(self.data.perturbation_names)
        return {str(name): f"L{k}" for k in order for name in names[self.target == k]}

    def place(self, found: Discovery) -> np.ndarray:
        """The program found for each true latent, if every perturbation's target agrees with it."""
        place = np.array([found.target[self.target == k][0] for k in range(4)])
        assert sorted(place) == [0, 1, 2, 3]
        assert np.array_equal(place[self.target], found.target)
        return place


@pytest.fixture(scope="module")
def hard() -> Screen:
    return Screen(n_doubles=2)


@pytest.fixture(scope="module")
def found(hard: Screen) -> Discovery:
    return hard.discover()


@pytest.fixture(scope="module")
def shifted() -> Screen:
    return Screen(intervention="shift")


def test_targets_and_graph_are_recovered(hard: Screen, found: Discovery) -> None:
    place = hard.place(found)
    assert np.array_equal(found.adjacency[np.ix_(place, place)] != 0, hard.adjacency)
    assert hard.adjacency.sum() >= 2
    assert (found.kind, found.verdict.answer, found.equations) == ("hard", "identified", "linear")
    assert not found.straightened
    assert found.misfit < 1.05
    assert found.gain > 2 * found.gain_error
    assert (found.retention == 0).all()
    assert (
        found.log_scale < 0.1
    ).all()  # 0.7 in truth; what is noise of the latents and what of expression is told badly
    assert (found.environments == np.arange(12)).all()
    assert found.stability is None and found.choice is None


def test_latents_are_those_that_made_the_cells(hard: Screen, found: Discovery) -> None:
    place = hard.place(found)
    assert np.array_equal(found.index, np.flatnonzero(np.isin(hard.data.split, (1, 2))))
    truth, latents = hard.latents[found.index], found.latents[:, place]
    correlation = np.array([np.corrcoef(truth[:, k], latents[:, k])[0, 1] for k in range(4)])
    assert np.abs(correlation).min() > 0.97
    # in units of their own noise: slope 1 up to sign, and no more certain than they are
    for k in range(4):
        slope, offset = np.polyfit(truth[:, k], latents[:, k], 1)
        assert abs(slope) == pytest.approx(1, abs=0.15)
        left = latents[:, k] - slope * truth[:, k] - offset
        assert 0.7 * left.var() < found.noise[place[k]] < 1
    control = hard.data.condition[found.index] == 0
    assert np.abs(found.latents[control].mean(0)).max() < 0.3


def test_pairs_and_edges_agree_in_sign(found: Discovery) -> None:
    assert found.ordering is not None
    upstream = found.ordering.pairs.have("upstream") & (found.adjacency != 0)
    assert upstream.sum() >= 2
    alone = upstream & ((found.adjacency != 0).sum(0) == 1)  # no other path may turn the sign of the whole effect
    np.testing.assert_array_equal(np.sign(found.ordering.pairs.change)[alone], np.sign(found.adjacency)[alone])


def test_programs_come_in_topological_order(found: Discovery) -> None:
    assert found.adjacency.any()
    assert not np.tril(found.adjacency).any()


def test_one_seed_one_result(hard: Screen, found: Discovery) -> None:
    again = hard.discover()
    for name in ("latents", "adjacency", "target", "shift", "log_scale"):
        assert np.array_equal(getattr(again, name), getattr(found, name))


def test_shifts_tell_no_graph(shifted: Screen) -> None:
    found = shifted.discover()
    shifted.place(found)
    assert (found.kind, found.verdict.answer) == ("shift", "not identified")
    assert shifted.adjacency.any() and not found.adjacency.any()
    assert (found.retention == 1).all() and not found.log_scale.any()


def test_more_programs_than_perturbations_with_an_effect_are_refused(hard: Screen) -> None:
    effect = np.zeros(12)
    effect[:3] = 1
    with pytest.raises(InputError, match="4 programs were asked for, but only 3 single perturbations"):
        hard.discover(effect=effect)


def test_perturbations_without_effect_have_no_target_and_no_say(hard: Screen) -> None:
    first = [int(np.flatnonzero(hard.target == k)[0]) for k in range(4)]
    effect = np.ones(12)
    idle = np.setdiff1d(np.arange(12), first)[:3]
    effect[idle] = 0
    found = hard.discover(effect=effect)
    assert (found.target[idle] == -1).all()
    assert not found.shift[idle].any() and not found.log_scale[idle].any() and (found.retention[idle] == 1).all()
    others = np.setdiff1d(np.arange(12), idle)
    assert np.array_equal(found.environments, others)
    assert (found.target[others] >= 0).all()


def components_of(screen: Screen, y: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "whitened_components", lambda data, most, least, seed, device: (y, None))


def test_doubles_do_not_take_part(hard: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    y = module.whitened_components(hard.data, module.COMPONENTS, 4, 0)[0]
    components_of(hard, y, monkeypatch)
    plain = hard.discover()
    double = np.isin(hard.data.condition, [c for c, parts in enumerate(hard.data.conditions) if len(parts) == 2])
    assert double.sum() == 200
    components_of(hard, np.where(double[:, None], 1e3, y), monkeypatch)
    found = hard.discover()
    for name in ("adjacency", "target", "shift", "misfit"):
        assert np.array_equal(getattr(found, name), getattr(plain, name))
    # but their cells have latents
    assert np.isin(np.flatnonzero(double & np.isin(hard.data.split, (1, 2))), found.index).all()


def test_those_that_tell_most_shape_the_graph_and_the_others_find_their_place(
    hard: Screen, found: Discovery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ENVIRONMENTS", 4)
    few = module.find_components(hard.task()).environments
    assert sorted(hard.target[few]) == [0, 1, 2, 3]  # each program has one before another has two
    monkeypatch.setattr(module, "MAX_ENVIRONMENTS", 10)
    some = hard.discover()
    late = np.setdiff1d(np.arange(12), some.environments)
    assert len(late) == 2 and set(hard.target[some.environments]) == {0, 1, 2, 3}
    hard.place(some)  # all twelve
    assert np.abs(some.shift[late]) == pytest.approx(np.abs(found.shift[late]), abs=0.3)


def test_a_kind_that_was_asked_for_is_taken(hard: Screen) -> None:
    found = hard.discover(CONFIG.model_copy(update={"intervention": "shift"}))
    assert (found.kind, found.verdict.answer) == ("shift", "not identified")
    assert not found.adjacency.any()
    assert found.verdict.reason.startswith("Shifts were asked for")


def test_the_number_of_programs_is_found_and_told(hard: Screen) -> None:
    notes: list[str] = []
    stages: list[str] = []
    found = hard.discover(ModelConfig(bootstrap=0), note=notes.append, stage=stages.append)
    assert found.choice is not None and found.choice.n_latents == 4 == len(found.adjacency)
    assert notes == [f"4 programs: {found.choice.reason}"]
    assert stages == ["finding the programs", "fitting the likelihood", "ordering the programs"]


def test_bootstrap_support_is_in_the_order_of_the_programs(hard: Screen, found: Discovery) -> None:
    sure = hard.discover(CONFIG.model_copy(update={"bootstrap": 3}))
    assert sure.stability is not None and sure.stability.n == 3
    assert np.array_equal(sure.adjacency != 0, found.adjacency != 0)
    support = sure.stability.edge.numpy()
    assert (support[sure.adjacency != 0] >= DECLARED_SUPPORT).all()
    assert support[sure.adjacency == 0].max() < DECLARED_SUPPORT
    assert (sure.stability.target.numpy() > 0.5).all()


@pytest.fixture
def unordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interventions change nothing: what is left is the likelihood."""
    real = module.order_programs

    def order(*args: Any) -> Any:
        found = real(*args)
        p = len(found.declared)
        nothing = np.full((p, p), STATUSES.index("undecided"))
        return replace(found, declared=np.zeros((p, p), bool), pairs=replace(found.pairs, status=nothing))

    monkeypatch.setattr(module, "order_programs", order)


def test_without_its_last_edge_a_graph_is_not_identified(
    hard: Screen, found: Discovery, monkeypatch: pytest.MonkeyPatch, unordered: None
) -> None:
    """Edges that the bootstrap does not support are not declared; without any there is no graph to identify."""

    def unsure(values: Any, variances: Any, environment: Any, edges: Any, n: int, *rest: Any) -> Stability:
        p, k = len(edges.adjacency), len(edges.solution.targets[0])
        one = torch.ones(k, dtype=torch.float64)
        support = torch.full((p, p), DECLARED_SUPPORT - 0.05, dtype=torch.float64)
        return Stability(support, support, one, one[:, None].expand(k, p) / p, one[:p], one, n, 0)

    assert found.verdict.answer == "identified"
    monkeypatch.setattr(module, "bootstrap", unsure)
    left = hard.discover(CONFIG.model_copy(update={"bootstrap": 20}))
    assert left.verdict.answer == "not identified"
    assert "bootstrap removed the last edge" in left.verdict.reason and "0.45" in left.verdict.reason
    assert left.kind == "shift" and not left.adjacency.any()
    assert (left.retention == 1).all() and not left.log_scale.any()
    hard.place(left)
    assert left.stability is not None and left.misfit == pytest.approx(found.misfit)


def test_a_graph_that_does_not_describe_the_cells_is_not_identified_and_its_misfit_is_the_one_recorded(
    hard: Screen, found: Discovery, monkeypatch: pytest.MonkeyPatch, unordered: None
) -> None:
    monkeypatch.setattr(
        module, "misfit", lambda solution: Misfit(1.51 if solution.model.kind == "hard" else 1.60, 0.01)
    )
    left = hard.discover()
    assert (left.kind, left.verdict.answer) == ("shift", "not identified")
    assert "misfit 1.51" in left.verdict.reason and left.misfit == 1.51
    assert left.gain == found.gain and not left.adjacency.any()


def test_where_the_likelihood_falls_the_pairs_that_interventions_order_are_declared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hard = Screen(cells_per_perturbation=300, n_control=1500)  # enough to tell direct from indirect effects
    found = hard.discover()
    monkeypatch.setattr(module, "misfit", lambda solution: Misfit(1.51, 0.01))
    left = hard.discover()
    assert (left.kind, left.verdict.answer) == ("hard", "partly identified")
    assert left.verdict.reason.startswith("Interventions order") and "misfit 1.51" in left.verdict.reason
    assert (left.adjacency != 0).sum() >= 2 and not ((left.adjacency != 0) & (found.adjacency == 0)).any()
    assert not np.tril(left.adjacency).any()  # in topological order
    hard.place(left)
    assert left.ordering is not None and left.hit is not None
    upstream = left.ordering.pairs.have("upstream")
    assert (upstream[left.adjacency != 0]).all()
    acting = left.acting
    assert (left.retention[acting] == 0).all() and np.isfinite(left.log_scale[acting]).all()


def test_threads_change_nothing_and_are_given_back(hard: Screen, found: Discovery) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = hard.discover()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(again.target, found.target)
    assert np.allclose(again.shift, found.shift, rtol=1e-6)  # components are sums over cells, in another order


def test_programs_between_others_with_one_perturbation_alone() -> None:
    chain = torch.zeros(4, 4)
    chain[0, 1] = chain[1, 2] = chain[2, 3] = 0.7
    targets = torch.tensor([[0, 1, 2, 2, 3, 3]])
    model = SimpleNamespace(moments=SimpleNamespace(crossed=None))
    edges: Any = SimpleNamespace(adjacency=chain, solution=SimpleNamespace(targets=targets, model=model))
    assert passed_alone(edges) == 1  # of 0 and 1, which have one, the first is no child
    edges.adjacency = chain * 0
    assert passed_alone(edges) == 0


def test_units_are_the_deviations_of_own_noise_over_control_cells(found: Discovery) -> None:
    """u_0 = z_0 and u_1 = 2 u_0 + z_1 with noises of deviations 5 and 3, measured with variances 9 and 1.

    Beyond measurement z_0 has the variance 25 - 9 = 16; z_1, less what 2 u_0 measures, 4 * 9 + 1 = 37 of 50, 13; a third
    latent is all measurement, of which a tenth of the variance stays.
    """
    z = np.array([[1.0, 1, 1], [1, -1, 1], [-1, 1, -1], [-1, -1, -1]]) * [5, np.sqrt(50), 2]
    graph = np.zeros((3, 3))
    graph[0, 1] = 2.0
    u = np.vstack([z @ np.linalg.inv(np.eye(3) - graph), np.full((2, 3), 100.0)])
    plain = replace(
        found, latents=u, adjacency=graph, noise=np.array([9.0, 1, 4]), target=np.array([0, 1, -1, 2]),
        shift=np.array([8.0, 26, 0, 1]),
    )  # fmt: skip
    scaled = with_unit_noise(plain, np.arange(6) < 4, np.array([9.0, 1, 4]))
    unit = np.array([4, np.sqrt(13), np.sqrt(0.4)])
    np.testing.assert_allclose(scaled.latents, u / unit)
    np.testing.assert_allclose(scaled.noise, plain.noise / unit**2)
    np.testing.assert_allclose(scaled.shift, [2, 26 / np.sqrt(13), 0, 1 / np.sqrt(0.4)])
    np.testing.assert_allclose(scaled.adjacency[0, 1], 2 * 4 / np.sqrt(13))


@pytest.mark.parametrize("background", [0, 2])
def test_shifts_have_the_unit_of_control_cells_without_a_graph_too(background: int) -> None:
    """Whatever else varies among cells: before, found shifts were 1.3 to 2.1 and 2.5 to 4.5 times the true ones."""
    screen = Screen(intervention="shift", background=background)
    found = screen.discover(ModelConfig(n_latents=4, bootstrap=6))
    control = screen.latents[screen.data.condition == 0].mean(0)
    true = [
        abs(screen.latents[screen.data.condition == screen.data.conditions.index((c,))].mean(0) - control)[target]
        for c, target in enumerate(screen.target)
    ]  # of mere shifts all that the own noise of the target changes by, whose deviation is 1
    hit = np.nan_to_num(found.penetrance[0], nan=1.0)
    assert found.verdict.answer == "not identified"
    np.testing.assert_allclose(np.abs(found.shift) * hit / true, 1, atol=0.2)
    assert found.stability is not None
    assert (
        np.median(found.stability.shift_error.numpy() / true) < 0.2
    )  # in units of the likelihood 0.33 with background
