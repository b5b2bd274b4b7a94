"""Discovery methods: registered, told apart, and each no surer than its theory."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from crlseq.config import ModelConfig
from crlseq.discovery import causal_training, contrastive, factor_result, methods, ordering, score_differences
from crlseq.discovery import discover as steps
from crlseq.discovery.discover import compare_on
from crlseq.discovery.edges import Edges
from crlseq.discovery.likelihood import Solution, fit_linear
from crlseq.discovery.methods import NAMES, cauca, diffusion, find_programs, icm_flow, method_of, straighten
from crlseq.discovery.misfit import DESCRIBED, Misfit, misfit
from crlseq.discovery.moments import environment_moments
from crlseq.discovery.result import Discovery
from crlseq.discovery.task import Cells
from crlseq.discovery.verdict import Answer, judge
from crlseq.errors import InputError
from tests.discovery.test_discover import CONFIG, Screen

EXACTLY = {  # perturbations a program, of methods that take no other number
    **dict.fromkeys(("squires", "score-linear", "multi-node", "contrastive"), (1, factor_result.REASON)),
    "score": (2, factor_result.REASON_OF_PAIRS),
    "cauca": (3, cauca.REASON),
}
ORDER: tuple[Answer, ...] = ("not identified", "partly identified", "ancestry only", "identified")


@pytest.fixture(scope="module")
def hard() -> Screen:
    return Screen(n_doubles=2)


def found_by(screen: Screen, method: str, **changes: Any) -> Discovery:
    discovery = method_of(method).find(screen.task(CONFIG, **changes)).discovery
    assert discovery is not None
    return discovery


def test_the_configuration_offers_the_methods_that_there_are() -> None:
    files = {path.stem for path in Path(methods.__path__[0]).glob("*.py")} - {"__init__"}
    assert {name.replace("-", "_") for name in NAMES} == files


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is claimed does not depend on how long networks are trained."""
    monkeypatch.setattr(cauca, "TRIAL", 5)
    monkeypatch.setattr(causal_training, "CYCLES", (5,))
    for method in (icm_flow, diffusion, contrastive, score_differences):
        monkeypatch.setattr(method, "STEPS", 5)


@pytest.mark.parametrize("name", NAMES)
def test_each_method_says_what_it_assumes_and_identifies(name: str) -> None:
    document = method_of(name).__doc__ or ""
    assert all(f"\n{word}:" in document for word in ("Source", "Assumes", "Identified"))
    assert method_of(name).AT_MOST in get_args(Answer)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("name", NAMES)
def test_no_method_claims_more_than_its_theory(hard: Screen, name: str) -> None:
    each, reason = EXACTLY.get(name, (3, "as asked"))
    effect = (np.arange(12) % 3 < each).astype(float)
    programs = method_of(name).find(hard.task(effect=effect, targets=hard.known_targets()))
    assert (programs.n, programs.reason) == (4, reason)
    if programs.discovery is not None:
        assert programs.discovery.adjacency.shape == (4, 4) and programs.discovery.target.shape == (12,)
        assert ORDER.index(programs.discovery.verdict.answer) <= ORDER.index(method_of(name).AT_MOST)


@pytest.mark.parametrize("name", NAMES)
def test_more_programs_than_perturbations_are_refused(hard: Screen, name: str) -> None:
    with pytest.raises(InputError, match="13 programs were asked for, but only 12"):
        method_of(name).find(hard.task(CONFIG.model_copy(update={"n_latents": 13}), targets=hard.known_targets()))


@pytest.mark.parametrize("changes", [{"method": "gradient"}, {"causal_layer": False}])
def test_learned_by_gradient_where_nothing_else_is_asked_for(hard: Screen, changes: dict[str, Any]) -> None:
    programs = find_programs(hard.task(ModelConfig(**changes), effect=np.ones(12)))
    assert programs.discovery is None and programs.n == 12


@pytest.mark.parametrize("changes", [*({"method": name} for name in NAMES), {"n_latents": 3}], ids=str)
def test_without_any_effect_there_are_no_programs(hard: Screen, changes: dict[str, Any]) -> None:
    noted: list[str] = []
    programs = find_programs(hard.task(ModelConfig(**changes), effect=np.zeros(12), note=noted.append))
    assert programs.discovery is None and programs.n == 0
    (text,) = noted
    assert "No perturbation has a detectable effect" in text and ("asked for: 3" in text) == ("n_latents" in changes)


def test_the_ablation_without_a_causal_layer_learns_from_any_screen(hard: Screen) -> None:
    assert find_programs(hard.task(ModelConfig(causal_layer=False), effect=np.zeros(12))).n == 12


def test_perturbations_of_combinations_alone_are_not_without_an_effect(hard: Screen) -> None:
    """Nothing was tested of them, so that they are learned by gradient."""
    task, noted = hard.task(ModelConfig(), effect=np.zeros(12)), list[str]()
    alone = task.data.conditions.index((0,))
    data = replace(task.data, condition=np.where(task.data.condition == alone, -1, task.data.condition))
    programs = find_programs(replace(task, data=data, note=noted.append))
    assert programs.n == 12 and "learned by gradient" in noted[0]


# --- straightening


def poor_before_selection(solution: Solution) -> Misfit:
    """The misfit, made poor for a dense graph, which decides on straightening and on nothing else."""
    p = solution.model.p
    return Misfit(2.0, 0.01) if float(solution.mask.sum()) == p * (p - 1) else misfit(solution)


def test_only_the_method_straighten_straightens_and_only_where_the_model_fails(
    hard: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[bool] = []

    def straightened(*args: object) -> None:
        called.append(True)  # finds nothing better

    found = found_by(hard, "linear")
    monkeypatch.setattr(straighten, "straightened", straightened)
    found_by(hard, "straighten")
    with monkeypatch.context() as patch:
        patch.setattr(steps, "misfit", lambda solution: Misfit(DESCRIBED + 0.01, 0.01))  # within chance
        found_by(hard, "straighten")
    monkeypatch.setattr(steps, "misfit", poor_before_selection)
    found_by(hard, "linear")
    found_by(hard, "straighten")  # mean shifts of one program lie on a line
    assert not called
    monkeypatch.setattr(straighten, "curved", lambda *args: True)
    again = found_by(hard, "straighten")
    assert called and not again.straightened
    assert np.array_equal(again.adjacency, found.adjacency)


def test_straightened_latents_take_the_place_of_the_components(hard: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    """What straightening hands over is what comes out: here the same solution, its cells moved and made uncertain."""

    def straightened(task: Any, components: Cells, dense: Any, linear: Any) -> Any:
        cells = components.first(20)
        variances = 0.5 * cells.values.new_ones(cells.values.shape)
        return replace(cells, values=cells.values.double() + 1, variances=variances), linear

    found = found_by(hard, "straighten")
    monkeypatch.setattr(steps, "misfit", poor_before_selection)
    monkeypatch.setattr(straighten, "curved", lambda *args: True)
    monkeypatch.setattr(straighten, "straightened", straightened)
    monkeypatch.setattr(ordering, "bend_of", lambda found: 1.0)  # of few programs it is in part chance
    again = found_by(hard, "straighten")
    assert again.straightened
    moved = again.latents - found.latents * again.latents.std(0) / found.latents.std(0)  # in the unit of the likelihood
    assert np.abs(moved - moved[0]).max() < 1e-9 < np.abs(moved[0]).max()
    assert not np.allclose(again.noise, found.noise)


def test_a_straightened_fit_that_loses_every_edge_in_the_last_selection_is_not_identified(
    hard: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = hard.task(CONFIG.model_copy(update={"bootstrap": 0}))
    start = steps.find_components(task)
    cells = start.cells.first(10)
    dense = steps.fit_likelihood(task, cells, 4)
    linear = compare_on(task, cells, dense, 0)
    assert judge(linear.evidence).answer == "identified"
    monkeypatch.setattr(straighten, "FREE", tuple(replace(phase, steps=5) for phase in straighten.FREE))
    monkeypatch.setattr(straighten, "CAUSAL", replace(straighten.CAUSAL, steps=5))
    monkeypatch.setattr(straighten, "compare_on", lambda *args: linear)
    monkeypatch.setattr(straighten, "select_edges", lambda found: Edges(found, torch.zeros(4, 4).double(), 1.0))
    trained = straighten.train_once(task, start.cells, dense.targets[0], 4, math.inf, 0)
    assert trained is not None
    found, _, _ = steps.ordered(task, start, trained[0], trained[1].edges.solution)
    edges, verdict, _, _ = steps.judged(task, *trained, found)
    assert not verdict.by_likelihood and "No edge" in verdict.reason
    assert edges.solution.model.kind == "shift" and not edges.adjacency.any()


@pytest.mark.parametrize("mixing", ["linear", "network"])
def test_a_curved_mixing_is_told_from_escaped_cells_and_background(mixing: Any) -> None:
    """Mean shifts of different sizes leave the line of their program where a network mixes the programs."""
    screen = Screen(mixing=mixing, n_genes=60, background=2, penetrance=(0.4, 0.9), shift_size=(2.0, 4.0))
    task = screen.task(CONFIG)
    cells = steps.find_components(task).cells.first(20)
    dense = steps.fit_likelihood(task, cells, 4)
    assert straighten.curved(cells, dense) == (mixing == "network")


def attempts(screen: Screen, monkeypatch: pytest.MonkeyPatch, misfits: list[float | None]) -> tuple[Any, list[Any]]:
    """What is kept if trainings end with these misfits (None: latents no better), and what they started from."""
    task = screen.task(seed=7)
    start = steps.find_components(task)
    cells = start.cells.first(10)
    values, _, numbers = cells.training()
    dense = fit_linear(environment_moments(values, numbers), 4, "hard", 1, 0)
    linear = compare_on(task, cells, dense, 0)
    of_misfit: dict[Any, float] = {linear.edges.solution: 2.0, dense: 2.0}
    starts: list[Any] = []

    def train_once(task: Any, components: Any, targets: Any, p: int, worst: float, seed: int) -> Any:
        assert (p, worst) == (4, 2.0) and seed == 7 + len(starts)
        starts.append(targets)
        excess = misfits[len(starts) - 1]
        if excess is None:
            return None
        solution = replace(linear.edges.solution, targets=dense.targets.roll(len(starts), 1))
        of_misfit[solution] = excess
        return cells, replace(linear, edges=replace(linear.edges, solution=solution))

    monkeypatch.setattr(straighten, "train_once", train_once)
    monkeypatch.setattr(straighten, "misfit", lambda solution: Misfit(of_misfit[solution], 0.0))
    found = straighten.straightened(task, start.cells, dense, linear)
    assert torch.equal(starts[0], dense.targets[0])
    for again in starts[1:]:  # from a partition that was found
        assert any(torch.equal(again, dense.targets[0].roll(i)) for i in range(1, len(starts)))
    return None if found is None else of_misfit[found[1].edges.solution], starts


@pytest.mark.parametrize(
    ("misfits", "kept", "trained"),
    [
        ([1.1], 1.1, 1),  # described: enough
        ([1.5, 1.1], 1.1, 2),
        ([1.5, 1.7, 1.4], 1.4, 3),
        ([1.4, 1.7, 1.5], 1.4, 3),
        ([2.5], None, 1),  # worse than the linear model
        ([None], None, 1),
        ([1.5, None], 1.5, 2),
    ],
)
def test_straightening_is_done_again_until_it_describes_the_cells_and_the_best_is_kept(
    hard: Screen, monkeypatch: pytest.MonkeyPatch, misfits: list[float | None], kept: float | None, trained: int
) -> None:
    found, starts = attempts(hard, monkeypatch, misfits)
    assert found == kept and len(starts) == trained
