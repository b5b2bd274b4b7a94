"""From cells to targets, interventions and a graph, by likelihood; a network comes in only to straighten the latents.

1. Cells become whitened components (`crlseq.discovery.components`), environments their moments.
2. The Gaussian interventional likelihood (`crlseq.discovery.likelihood`) gives targets and a dense graph; kinds of intervention
   are compared on held-out cells, and edges selected (`crlseq.discovery.verdict`).
3. Where it does not describe the moments (misfit above `STRAIGHT`): if shifts fit best, nonlinear equations are
   tried (`crlseq.discovery.nonlinear_test`); else a network straightens the latents (`crlseq.discovery.straighten`) and 2. is
   repeated on them.
4. A bootstrap says how sure edges, ancestry, targets and programs are (`crlseq.discovery.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crlseq.config import InterventionKind, ModelConfig
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.discovery.bootstrap import Stability, bootstrap
from crlseq.discovery.components import whitened_components
from crlseq.discovery.edges import select_edges
from crlseq.discovery.likelihood import Solution, fit_linear
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import environment_moments, fold_moments, noise_level
from crlseq.discovery.n_latents import LatentChoice, choose_n_latents
from crlseq.discovery.nonlinear_test import prefers_nonlinear
from crlseq.discovery.reassign import reassign_targets
from crlseq.discovery.result import Coordinates, Discovery, environments_of, finish, finish_nonlinear
from crlseq.discovery.straighten import CAUSAL, FREE, Straightener, starting_directions
from crlseq.discovery.verdict import KindComparison, compare_kinds, require_description
from crlseq.errors import InputError
from crlseq.model.interventions import INTERVENTIONS
from crlseq.threads import in_parallel, on_threads

COMPONENTS = 40
MAX_ENVIRONMENTS = 300  # perturbations that shape the graph: those with the largest effects
MIN_NOISE = 0.8  # share of the measurement noise that every component has at least
RESTARTS, FOLDS = 6, 5
MANY_LATENTS, FEW_RESTARTS, FEW_FOLDS = 20, 1, 2  # fewer where each is dear
ATTEMPTS = 3  # trainings of the straightening network where the first ones do not describe the cells
PARTITION_STEPS = 60
REPLICATES = 20
DECLARED_SUPPORT = 0.5  # an edge that just passes its likelihood ratio is found in half of the replicates


def discover(
    data: PerturbSeqData,
    effect: np.ndarray,
    config: ModelConfig,
    seed: int,
    stage: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
    keep: Callable[[str, Callable[[], Any]], Any] = lambda name, make: make(),
) -> Discovery:
    """Targets, interventions and graph of a screen, from its single perturbations with an effect.

    Parameters
    ----------
    effect
        (K,) size of each perturbation's effect; 0 without one, and for perturbations that only occur in combinations.
    stage, note
        Told what is being done, and what was found.
    keep
        Gives what a stage finds, found now or in an earlier attempt (`crlseq.storage.stage_cache`).

    Raises
    ------
    InputError
        If there are more latents than perturbations with an effect.
    """
    chosen = np.sort(np.argsort(-effect, kind="stable")[: min(int((effect > 0).sum()), MAX_ENVIRONMENTS)])
    environment = environments_of(data, chosen)
    train = torch.from_numpy(data.split == splits.TRAIN) & (environment >= 0)
    stage("finding components and the number of programs")
    n_components = COMPONENTS if config.n_latents == "auto" else max(COMPONENTS, config.n_latents + 10)
    y = torch.from_numpy(keep("components", lambda: whitened_components(data, n_components, seed)))
    p, choice, reason = keep("number", lambda: _number(y[train], environment[train], config, len(chosen), seed))
    note(f"{p} programs: {reason}")
    if p + 10 > n_components:
        y = torch.from_numpy(keep("more components", lambda: whitened_components(data, p + 10, seed)))
    threads = torch.get_num_threads()
    with on_threads(1 if p < MANY_LATENTS else threads):
        return _discover(data, effect, chosen, (y, environment, train), choice, p, config, seed, threads, stage, keep)


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
    keep: Callable[[str, Callable[[], Any]], Any],
) -> Discovery:
    """`discover` once components, environments, training cells and the number of latents are known."""
    y, environment, train = components
    stage("fitting the interventional likelihood")
    kind: InterventionKind | None = None if config.intervention == "auto" else config.intervention
    cells = plain = Coordinates(y[:, : p + 10 if p > 10 else 20], None, environment, train)
    values, _, environments = cells.of_fit()
    moments = environment_moments(values, environments)
    restarts = RESTARTS if p < MANY_LATENTS else FEW_RESTARTS
    floor, each = MIN_NOISE * noise_level(moments), partial(in_parallel, threads=threads)
    start = partial(fit_linear, moments, p, "hard", restarts, seed, floor, each=each)
    dense = keep("likelihood", lambda: reassign_targets(start()))
    comparison = linear = keep("kinds", lambda: _compare(dense, cells, kind, seed, each))
    straightened = False
    if not misfit(dense).describes and config.method == "straighten":
        open_graph = INTERVENTIONS[comparison.kind].graph == "nothing"
        if open_graph and config.equations != "linear" and kind in (None, comparison.kind):
            stage("trying nonlinear equations")
            test = torch.from_numpy(data.split == splits.VALIDATION) & (environment >= 0)
            flat = y[:, :p].double()
            sides = [(flat[part], environment[part]) for part in (train, test)]
            preference = keep("equations", lambda: prefers_nonlinear(sides[0], sides[1], seed=seed))
            if preference.chosen:
                return finish_nonlinear(data, chosen, preference, flat, choice)
        stage("straightening the latents")
        better = keep("straightened", lambda: _straighten(y, plain, dense, linear, kind, seed))
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
        fitted, n, edges = cells.of_fit(), n_bootstrap, comparison.edges
        stability = keep("bootstrap", lambda: bootstrap(*fitted, edges, n, seed, threads))
        comparison = _supported(comparison, stability)
    return finish(data, chosen, effect, comparison, cells, straightened, stability, choice)


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
    dense: Solution,
    cells: Coordinates,
    kind: InterventionKind | None,
    seed: int,
    each: Callable[..., Iterable[Any]] = map,
) -> KindComparison:
    generator = torch.Generator().manual_seed(seed)
    values, variances, environment = cells.of_fit()
    n_folds = FOLDS if dense.model.p < MANY_LATENTS else FEW_FOLDS
    return compare_kinds(dense, fold_moments(values, environment, variances, n_folds, generator), kind, each)


def _straighten(
    y: Tensor, cells: Coordinates, dense: Solution, linear: KindComparison, kind: InterventionKind | None, seed: int
) -> tuple[Coordinates, KindComparison] | None:
    """Straightened latents and the models on them; None if the structural model describes them no better.

    A training can end in a wrong partition of the perturbations. Where the latents are not described it is done again,
    from the partition that the best one found and with another seed: the lowest misfit is kept.
    """
    best: tuple[Coordinates, KindComparison] | None = None
    start = dense
    for attempt in range(ATTEMPTS):
        found = _straightened(y, cells, start, misfit(dense).dispersion, kind, seed + attempt)
        if found is None:  # what is wrong is not the mixing
            break
        reference = linear if best is None else best[1]
        if found[1].misfit.dispersion < reference.misfit.dispersion:
            best = found
        if best is None or best[1].misfit.describes:
            break
        targets = best[1].edges.solution.targets
        start = dense.model.solve(dense.model.start(targets), targets, dense.mask, PARTITION_STEPS)
    return best


def _straightened(
    y: Tensor, cells: Coordinates, start: Solution, worst: float, kind: InterventionKind | None, seed: int
) -> tuple[Coordinates, KindComparison] | None:
    """One training from a solution in the first components; None if free latents have a misfit of `worst` or more."""
    train, environment = cells.train, cells.environment
    directions = starting_directions(start, environment_moments(y[train], environment[train]))
    straightener = Straightener(y[train].double(), environment[train], directions, seed)
    for free in FREE:
        straightener.train(free)
    free_fit = straightener.fit_prior("hard", fresh=True)
    if misfit(free_fit).dispersion >= worst:
        return None
    comparison = _compare(free_fit, Coordinates(*straightener.encode(y), environment, train), kind, seed)
    straightener.train(CAUSAL, comparison.kind)
    final = reassign_targets(straightener.fit_prior(comparison.kind, fresh=True))
    if comparison.verdict == "not identified":
        edges = replace(comparison.edges, solution=final, dispersion=misfit(final).dispersion)
    else:
        edges = select_edges(final)
    comparison = replace(comparison, edges=edges, misfit=misfit(edges.solution))
    return Coordinates(*straightener.encode(y), environment, train), comparison


def _supported(comparison: KindComparison, stability: Stability) -> KindComparison:
    """The comparison with edges of little support taken out of the graph."""
    edges, solution = comparison.edges, comparison.edges.solution
    kept = (edges.adjacency != 0) & (stability.edge >= DECLARED_SUPPORT)
    if stability.n == 0 or bool((kept == (edges.adjacency != 0)).all()):
        return comparison
    solution = solution.refitted(mask=solution.mask * kept)
    edges = replace(edges, solution=solution, adjacency=solution.adjacency())
    return replace(comparison, edges=edges, misfit=misfit(solution))
