"""From cells to targets, interventions and a graph, by likelihood; a network comes in only to straighten the latents.

1. Cells become whitened components (`crlseq.data.components`), environments their moments.
2. The Gaussian interventional likelihood (`crlseq.model.linear`) gives targets and a dense graph; kinds of intervention
   are compared on held-out cells, and edges selected (`crlseq.model.kinds`).
3. Where it does not describe the moments (misfit above `STRAIGHT`): if shifts fit best, nonlinear equations are
   tried (`crlseq.model.equations`); else a network straightens the latents (`crlseq.training.straighten`) and 2. is
   repeated on them.
4. A bootstrap says how sure edges, ancestry, targets and programs are (`crlseq.training.stability`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crlseq.config import ModelConfig
from crlseq.data import splits
from crlseq.data.components import whitened_components
from crlseq.data.dataset import PerturbSeqData
from crlseq.errors import InputError
from crlseq.model.assignment import assign_targets, reassign_targets
from crlseq.model.edges import dispersion, misfit, reachable, select_edges
from crlseq.model.equations import Preference, prefers_nonlinear
from crlseq.model.kinds import KindComparison, Verdict, compare_kinds, describes, require_description
from crlseq.model.linear import Kind, Solution, fit_linear
from crlseq.model.moments import environment_moments, fold_moments, noise_level
from crlseq.threads import in_parallel, on_threads
from crlseq.training.n_latents import LatentChoice, choose_n_latents
from crlseq.training.stability import Stability, bootstrap
from crlseq.training.straighten import CAUSAL, FREE, Straightener, starting_directions

STRAIGHT = 1.05  # misfit up to which moments count as described; where mixing is linear it is 1.00 to 1.03
CHANCE = 3.0  # standard deviations of chance that come on top
COMPONENTS = 40
MAX_ENVIRONMENTS = 300  # perturbations that shape the graph: those with the largest effects
MIN_NOISE = 0.8  # share of the measurement noise that every component has at least
RESTARTS, FOLDS = 6, 5
MANY_LATENTS, FEW_RESTARTS, FEW_FOLDS = 20, 1, 2  # fewer where each is dear
ATTEMPTS = 3  # trainings of the straightening network where the first ones do not describe the cells
PARTITION_STEPS = 60
CHUNK = 100_000  # cells
REPLICATES = 20
DECLARED_SUPPORT = 0.5  # an edge that just passes its likelihood ratio is found in half of the replicates


@dataclass(frozen=True)
class Discovery:
    """What the likelihood found. Latents are in topological order, with noise of unit variance over control cells.

    Attributes
    ----------
    index, latents
        (n,) training and validation cells, and their (n, p) latents.
    noise
        (p,) variance that a cell's latents are known with.
    adjacency, intercept
        (p, p) weights of the declared edges, row -> column; (p,) constants of the equations.
    target
        (K,) int64 latent of each perturbation, -1 without a claim.
    shift, log_scale, retention
        (K,) what each does to its target; 0, 0, 1 without a claim.
    kind, equations, verdict, reason
        Kind of intervention and of equations that fit, and what that says about the graph.
    held_out, gain, gain_error
        See `crlseq.model.kinds.KindComparison`.
    dispersion, straightened
        Misfit of the final moments (1: none), and whether a network straightened the latents.
    stability
        Of the bootstrap, programs in order; None without one. Its K are the perturbations of `environments`.
    environments
        (m,) perturbations that shaped the graph.
    choice
        How the number of latents was chosen; None if it was asked for.
    """

    index: np.ndarray
    latents: np.ndarray
    noise: np.ndarray
    adjacency: np.ndarray
    intercept: np.ndarray
    target: np.ndarray
    shift: np.ndarray
    log_scale: np.ndarray
    retention: np.ndarray
    kind: Kind
    equations: str
    verdict: Verdict
    reason: str
    held_out: dict[str, float]
    gain: float
    gain_error: float
    dispersion: float
    straightened: bool
    stability: Stability | None
    environments: np.ndarray
    choice: LatentChoice | None


@dataclass(frozen=True)
class _Coordinates:
    """Cells (N, .) in the coordinates of the likelihood, posterior variances if straightened, and environments (N,)."""

    values: Tensor
    variances: Tensor | None
    environment: Tensor
    train: Tensor

    def of_fit(self) -> tuple[Tensor, Tensor | None, Tensor]:
        variances = None if self.variances is None else self.variances[self.train]
        return self.values[self.train].double(), variances, self.environment[self.train]


def discover(
    data: PerturbSeqData,
    effect: np.ndarray,
    config: ModelConfig,
    seed: int,
    stage: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
) -> Discovery:
    """Targets, interventions and graph of a screen, from its single perturbations with an effect.

    Parameters
    ----------
    effect
        (K,) size of each perturbation's effect; 0 without one, and for perturbations that only occur in combinations.
    stage, note
        Told what is being done, and what was found.

    Raises
    ------
    InputError
        If there are more latents than perturbations with an effect.
    """
    chosen = np.sort(np.argsort(-effect, kind="stable")[: min(int((effect > 0).sum()), MAX_ENVIRONMENTS)])
    environment = _environments(data, chosen)
    train = torch.from_numpy(data.split == splits.TRAIN) & (environment >= 0)
    stage("finding components and the number of programs")
    n_components = COMPONENTS if config.n_latents == "auto" else max(COMPONENTS, config.n_latents + 10)
    y = torch.from_numpy(whitened_components(data, n_components, seed))
    p, choice, reason = _number(y[train], environment[train], config, len(chosen), seed)
    note(f"{p} programs: {reason}")
    if p + 10 > n_components:
        y = torch.from_numpy(whitened_components(data, p + 10, seed))
    threads = torch.get_num_threads()
    with on_threads(1 if p < MANY_LATENTS else threads):
        return _discover(data, effect, chosen, (y, environment, train), choice, p, config, seed, threads, stage)


def _discover(
    data: PerturbSeqData,
    effect: np.ndarray,
    chosen: np.ndarray,
    components: tuple[Tensor, Tensor, Tensor],
    choice: LatentChoice | None,
    p: int,
    config: ModelConfig,
    seed: int,
    threads: int,
    stage: Callable[[str], None],
) -> Discovery:
    """`discover` once components, environments, training cells and the number of latents are known."""
    y, environment, train = components
    stage("fitting the interventional likelihood")
    kind: Kind | None = None if config.intervention == "auto" else config.intervention
    cells = _Coordinates(y[:, : p + 10 if p > 10 else 20], None, environment, train)
    values, _, environments = cells.of_fit()
    moments = environment_moments(values, environments)
    restarts = RESTARTS if p < MANY_LATENTS else FEW_RESTARTS
    each = partial(in_parallel, threads=threads)
    floor = MIN_NOISE * noise_level(moments)
    dense = reassign_targets(fit_linear(moments, p, "hard", restarts, seed, floor, each=each))
    comparison = _compare(dense, cells, kind, seed, each)
    straightened = False
    excess, error = misfit(dense)
    if excess > STRAIGHT + CHANCE * error and config.method == "straighten":
        if comparison.kind == "shift" and config.equations != "linear" and kind in (None, "shift"):
            stage("trying nonlinear equations")
            test = torch.from_numpy(data.split == splits.VALIDATION) & (environment >= 0)
            flat = y[:, :p].double()
            preference = prefers_nonlinear(
                (flat[train], environment[train]), (flat[test], environment[test]), seed=seed
            )
            if preference.chosen:
                return _finish_nonlinear(data, chosen, preference, flat, choice)
        stage("straightening the latents")
        better = _straighten(y, cells, dense, comparison, kind, seed)
        if better is not None:
            cells, comparison = better
            straightened = True
    comparison = require_description(comparison)
    stability = None
    n_bootstrap = config.bootstrap
    if n_bootstrap == "auto":
        n_bootstrap = REPLICATES if p < MANY_LATENTS else 0
    if n_bootstrap:
        stage(f"bootstrapping {n_bootstrap} times")
        stability = bootstrap(*cells.of_fit(), comparison.edges, n_bootstrap, seed, threads)
        comparison = _supported(comparison, stability)
    return _finish(data, chosen, effect, comparison, cells, straightened, stability, choice)


def _number(
    values: Tensor, environment: Tensor, config: ModelConfig, n_environments: int, seed: int
) -> tuple[int, LatentChoice | None, str]:
    if config.n_latents != "auto":
        if config.n_latents > n_environments:
            raise InputError(
                f"{config.n_latents} programs were asked for, but only {n_environments} single perturbations have a"
                " detectable effect.",
                "Each program needs a perturbation with an effect of its own: ask for fewer programs.",
            )
        return config.n_latents, None, "as asked."
    choice = choose_n_latents(values, environment, seed)
    return min(choice.n_latents, n_environments), choice, choice.reason


def _compare(
    dense: Solution, cells: _Coordinates, kind: Kind | None, seed: int, each: Callable[..., Iterable[Any]] = map
) -> KindComparison:
    generator = torch.Generator().manual_seed(seed)
    values, variances, environment = cells.of_fit()
    n_folds = FOLDS if dense.model.p < MANY_LATENTS else FEW_FOLDS
    return compare_kinds(dense, fold_moments(values, environment, variances, n_folds, generator), kind, each)


def _straighten(
    y: Tensor, cells: _Coordinates, dense: Solution, linear: KindComparison, kind: Kind | None, seed: int
) -> tuple[_Coordinates, KindComparison] | None:
    """Straightened latents and the models on them; None if the structural model describes them no better.

    A training can end in a wrong partition of the perturbations. Where the latents are not described it is done again,
    from the partition that the best one found and with another seed: the lowest misfit is kept.
    """
    best: tuple[_Coordinates, KindComparison] | None = None
    start = dense
    for attempt in range(ATTEMPTS):
        found = _straightened(y, cells, start, dispersion(dense), kind, seed + attempt)
        if found is None:  # what is wrong is not the mixing
            break
        reference = linear if best is None else best[1]
        if dispersion(found[1].edges.solution) < dispersion(reference.edges.solution):
            best = found
        if best is None or describes(best[1].edges.solution):
            break
        targets = best[1].edges.solution.targets
        start = dense.model.solve(dense.model.start(targets), targets, dense.mask, PARTITION_STEPS)
    return best


def _straightened(
    y: Tensor, cells: _Coordinates, start: Solution, worst: float, kind: Kind | None, seed: int
) -> tuple[_Coordinates, KindComparison] | None:
    """One training from a solution in the first components; None if free latents have a misfit of `worst` or more."""
    train, environment = cells.train, cells.environment
    directions = starting_directions(start, environment_moments(y[train], environment[train]))
    straightener = Straightener(y[train].double(), environment[train], directions, seed)
    for free in FREE:
        straightener.train(free)
    free_fit = straightener.fit_prior("hard", fresh=True)
    if dispersion(free_fit) >= worst:
        return None
    comparison = _compare(free_fit, _Coordinates(*straightener.encode(y), environment, train), kind, seed)
    straightener.train(CAUSAL, comparison.kind)
    final = reassign_targets(straightener.fit_prior(comparison.kind, fresh=True))
    if comparison.verdict == "not identified":
        edges = replace(comparison.edges, solution=final, dispersion=dispersion(final))
    else:
        edges = select_edges(final)
    return _Coordinates(*straightener.encode(y), environment, train), replace(comparison, edges=edges)


def _supported(comparison: KindComparison, stability: Stability) -> KindComparison:
    """The comparison with edges of little support taken out of the graph."""
    edges, solution = comparison.edges, comparison.edges.solution
    kept = (edges.adjacency != 0) & (stability.edge >= DECLARED_SUPPORT)
    if stability.n == 0 or bool((kept == (edges.adjacency != 0)).all()):
        return comparison
    mask = solution.mask * kept
    theta = solution.theta.clone()
    theta[:, solution.model.at["G"]] *= mask.flatten(1)
    solution = solution.model.solve(theta, solution.targets, mask)
    return replace(comparison, edges=replace(edges, solution=solution, adjacency=solution.adjacency()))


def _environments(data: PerturbSeqData, chosen: np.ndarray) -> Tensor:
    """(cells,) environment of each cell: 0 control, i + 1 the single perturbation ``chosen[i]``, -1 for others."""
    number: dict[tuple[int, ...], int] = {(): 0} | {(int(k),): i + 1 for i, k in enumerate(chosen)}
    of_condition = np.array([*(number.get(parts, -1) for parts in data.conditions), -1])
    return torch.from_numpy(of_condition[data.condition])


def _order(adjacency: Tensor) -> Tensor:
    """A topological order: ancestors have fewer ancestors than their descendants."""
    return torch.argsort(reachable(adjacency != 0).sum(0), stable=True)


def _fitted_cells(data: PerturbSeqData) -> np.ndarray:
    return np.flatnonzero(np.isin(data.split, (splits.TRAIN, splits.VALIDATION)) & (data.condition >= 0))


def _finish(
    data: PerturbSeqData,
    chosen: np.ndarray,
    effect: np.ndarray,
    comparison: KindComparison,
    cells: _Coordinates,
    straightened: bool,
    stability: Stability | None,
    choice: LatentChoice | None,
) -> Discovery:
    """Latents in topological order, in units of their own noise; interventions by perturbation."""
    solution: Solution = comparison.edges.solution
    model, k = solution.model, len(data.perturbation_names)
    named = model.unpack(solution.theta)
    order = _order(comparison.edges.adjacency)
    place = torch.argsort(order)
    index, (directions, noise) = _fitted_cells(data), solution.directions()
    some = torch.split(torch.from_numpy(index), CHUNK)  # no float64 copy of the whole screen
    latents = torch.cat([(cells.values[rows].double() - named["offset"][0]) @ directions for rows in some])
    if cells.variances is not None:
        noise = (directions**2 * cells.variances[cells.train].mean(0)[:, None]).sum(0)
    target, shift, log_scale, retention = np.full(k, -1), np.zeros(k), np.zeros(k), np.ones(k)
    target[chosen] = place[solution.targets[0]].numpy()
    shift[chosen] = named["shift"][0].numpy()
    log_scale[chosen] = model.log_scale(named["scale"])[0].numpy()
    retention[chosen] = model.keep(named["retention"])[0].numpy()
    others = np.setdiff1d(np.flatnonzero(effect > 0), chosen)
    if len(others):  # they do not shape the graph, but have a place in it
        environment = _environments(data, others)
        known = cells.train.new_tensor(data.split == splits.TRAIN) & (environment >= 0)
        moments = environment_moments(cells.values[known], environment[known], None, len(others) + 1)
        found = assign_targets(model, solution.theta, moments)
        target[others], shift[others] = place[found.targets].numpy(), found.shift.numpy()
        log_scale[others], retention[others] = found.log_scale.numpy(), found.retention.numpy()
    return Discovery(
        index=index,
        latents=latents[:, order].numpy(),
        noise=noise[order].numpy(),
        adjacency=comparison.edges.adjacency[order][:, order].numpy(),
        intercept=np.zeros(model.p),
        target=target,
        shift=shift,
        log_scale=log_scale,
        retention=retention,
        kind=comparison.kind,
        equations="linear",
        verdict=comparison.verdict,
        reason=comparison.reason,
        held_out=comparison.held_out,
        gain=comparison.gain,
        gain_error=comparison.error,
        dispersion=dispersion(solution),
        straightened=straightened,
        stability=None if stability is None else stability.reordered(order),
        environments=chosen,
        choice=choice,
    )


def _finish_nonlinear(
    data: PerturbSeqData, chosen: np.ndarray, preference: Preference, values: Tensor, choice: LatentChoice | None
) -> Discovery:
    solution, n = preference.nonlinear, len(values)
    assert solution is not None
    index, k = _fitted_cells(data), len(data.perturbation_names)
    order = _order(solution.adjacency)
    target, shift = np.full(k, -1), np.zeros(k)
    target[chosen] = torch.argsort(order)[solution.targets].numpy()
    shift[chosen] = solution.shift.numpy()
    return Discovery(
        index=index,
        latents=solution.latents(values[index])[:, order].numpy(),
        noise=np.zeros(values.shape[1]),
        adjacency=solution.adjacency[order][:, order].numpy(),
        intercept=solution.intercept[order].numpy(),
        target=target,
        shift=shift,
        log_scale=np.zeros(k),
        retention=np.ones(k),
        kind="shift",
        equations="nonlinear",
        verdict="ancestry only",
        reason=f"{preference.reason} If expression is linear in the programs, shifts then tell who is upstream.",
        held_out={"linear": float("nan"), "nonlinear": solution.nll},
        gain=preference.gain * n,
        gain_error=preference.error * n,
        dispersion=preference.misfit[1],
        straightened=False,
        stability=None,
        environments=chosen,
        choice=choice,
    )
