"""What was discovered, in the terms of a screen: latents in order, interventions by perturbation."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.data import splits
from crlseq.discovery.bootstrap import Stability
from crlseq.discovery.edges import Edges
from crlseq.discovery.kind_comparison import KindComparison
from crlseq.discovery.likelihood import Solution
from crlseq.discovery.moments import environment_moments, noise_level
from crlseq.discovery.n_latents import LatentChoice
from crlseq.discovery.negative_controls import Found
from crlseq.discovery.nonlinear_test import Preference
from crlseq.discovery.numbering import explained_by, numbered
from crlseq.discovery.ordering import Ordering
from crlseq.discovery.reassign import assign_targets
from crlseq.discovery.second_targets import SecondTargets
from crlseq.discovery.task import Cells, Start, Task
from crlseq.discovery.verdict import Verdict, judge_nonlinear
from crlseq.model.interventions import INTERVENTIONS

# Declared edges and the model that holds them, the verdict, the misfit of the model that it is about, and support.
Judged = tuple[Edges, Verdict, float, Stability | None]
LOG_SCALE = 1.4  # bound of a log noise scale that moments give
LEAST_VARIANCE = 1e-3  # of hit cells along their target, over that of control cells
CHUNK = 100_000  # cells whose latents are computed at a time
LEAST_OWN = 0.1  # share of the variance of latents over control cells that is not measurement's, at least


@dataclass(frozen=True)
class Discovery:
    """What a method found. Latents are in topological order, with noise of unit variance over control cells."""

    index: np.ndarray  # (n,) training and validation cells
    latents: np.ndarray  # (n, p)
    noise: np.ndarray  # (p,) variance that a cell's latents are known with
    adjacency: np.ndarray  # (p, p) weights of the edges, row -> column; declared if the verdict grants a graph
    intercept: np.ndarray  # (p,) constants of the equations
    target: np.ndarray  # (K,) int64 latent of each perturbation, -1 without a claim
    shift: np.ndarray  # (K,) what each does to its target in hit cells; 0 without a claim
    log_scale: np.ndarray  # (K,) likewise; 0 without a claim
    retention: np.ndarray  # (K,) likewise; 1 without a claim
    kind: InterventionKind  # of intervention that fits
    equations: str  # linear, nonlinear or flow
    verdict: Verdict
    held_out: dict[str, float]  # negative log-likelihood per held-out cell by model; empty without a likelihood
    gain: float  # of the graph, in log-likelihood of all held-out cells
    gain_error: float
    misfit: float  # of the model that the verdict is about (1: none)
    environments: np.ndarray  # (m,) perturbations that shaped the graph
    mechanisms: dict[str, Tensor] | None = None  # weights of the networks of equations of the kind flow
    straightened: bool = False  # by a network
    stability: Stability | None = None  # programs in order; its K are the perturbations of `environments`
    choice: LatentChoice | None = None  # of the number of latents; None if it was asked for
    ordering: Ordering | None = None  # what interventions change, programs in order; its perturbations are `acting`
    second: SecondTargets | None = None  # what the `acting` perturbations do to every program
    of_shifts: Found | None = None  # pairs that mere shifts of control cells order
    hit: np.ndarray | None = None  # (cells,) float32 probability of each to have been hit; NaN where it cannot be told

    @property
    def acting(self) -> np.ndarray:
        """Perturbations that act on a program."""
        return np.flatnonzero(self.target >= 0)

    @property
    def penetrance(self) -> tuple[np.ndarray, np.ndarray]:
        """Share of hit cells (K,) and its standard error, NaN where hit and escaped cells cannot be told apart."""
        share, error = np.full((2, len(self.target)), np.nan)
        for c, hit in {} if self.ordering is None else self.ordering.hits.items():
            share[self.acting[c]], error[self.acting[c]] = hit.share, hit.error
        return share, error


@dataclass(frozen=True)
class Claims:
    """What each of K perturbations does to its program, in the numbering of a solution; -1, 0, 0, 1 without a claim."""

    target: np.ndarray
    shift: np.ndarray
    log_scale: np.ndarray
    retention: np.ndarray


def claims_of(task: Task, start: Start, cells: Cells, solution: Solution) -> Claims:
    """Of the perturbations that shape the graph, and of the others with an effect: they have a place in it."""
    model, chosen, k = solution.model, start.environments, len(task.effect)
    named = model.unpack(solution.theta)
    target, shift, log_scale, retention = np.full(k, -1), np.zeros(k), np.zeros(k), np.ones(k)
    target[chosen] = solution.targets[0].numpy()
    shift[chosen] = named["shift"][0].numpy()
    log_scale[chosen] = model.log_scale(named["scale"])[0].numpy()
    retention[chosen] = model.retention(named["retention"])[0].numpy()
    others = np.setdiff1d(np.flatnonzero(task.effect > 0), chosen)
    if len(others):
        environment = task.environments(others)
        known = task.cells_of(splits.TRAIN, environment)
        own, crossed = environment[known], task.crossed(others)
        if crossed is not None and cells.context is not None:
            own = crossed.numbered(own, cells.context[known])
        n = len(others) + (1 if crossed is None else crossed.n_contexts)
        moments = environment_moments(cells.values[known], own, None, n, crossed)
        found = assign_targets(model, solution.theta, moments)
        target[others], shift[others] = found.targets.numpy(), found.shift.numpy()
        log_scale[others], retention[others] = found.log_scale.numpy(), found.retention.numpy()
    return Claims(target, shift, log_scale, retention)


def ordered_claims(task: Task, cells: Cells, claims: Claims, ordering: Ordering) -> Claims:
    """Hard interventions on the ordered programs, by the mean and variance of each perturbation's training cells."""
    shift, log_scale = np.zeros(len(claims.shift)), np.zeros(len(claims.shift))
    acting = np.flatnonzero(claims.target >= 0)
    environment = task.environments(acting).numpy()
    environment[task.data.split != splits.TRAIN] = -1
    directions, context = ordering.directions(), task.data.context
    noise = (cells.values[environment == 0].double().numpy() - ordering.center) @ ordering.axes
    level = _level(noise, context[environment == 0])
    for c, perturbation in enumerate(acting):
        direction = directions[:, claims.target[perturbation]]
        own = (cells.values[environment == c + 1].double().numpy() - ordering.center) @ direction
        if len(own) > 1:
            shift[perturbation] = own.mean()
            usual = level[context[environment == c + 1][0], claims.target[perturbation]]
            scale = np.log(max(own.std(), 1e-3)) - np.log(usual) / 2
            log_scale[perturbation] = np.clip(scale, -LOG_SCALE, LOG_SCALE)
    return Claims(claims.target, shift, log_scale, np.where(claims.target >= 0, 0.0, 1.0))


def linear_result(
    task: Task,
    start: Start,
    cells: Cells,
    comparison: KindComparison,
    judged: Judged,
    ordering: Ordering,
    second: SecondTargets,
) -> Discovery:
    """Latents in topological order, interventions by perturbation: of the likelihood, or by what interventions change."""
    edges, verdict, misfit, stability = judged
    solution, model = edges.solution, edges.solution.model
    named, index = model.unpack(solution.theta), task.fitted_cells()
    claims, kind, adjacency = claims_of(task, start, cells, solution), model.kind, edges.adjacency
    center, directions = named["offset"][0], solution.directions()
    if verdict.answer == "partly identified":
        claims, kind = ordered_claims(task, cells, claims, ordering), "hard"
        adjacency = torch.from_numpy(ordering.direct.effect * ordering.declared)
        center, directions = torch.from_numpy(ordering.center), torch.from_numpy(ordering.directions())
    variances = model.floor + named["psi"][0].exp()
    if cells.variances is not None:
        variances = cells.variances[cells.train].double().mean(0)
    some = torch.split(torch.from_numpy(index), CHUNK)  # no float64 copy of the whole screen
    latents = torch.cat([(cells.values[rows].double() - center) @ directions for rows in some])
    order = numbered(adjacency, explained_by(task, claims.target, claims.shift, model.p))
    target = np.where(claims.target >= 0, torch.argsort(order).numpy()[claims.target], -1)
    found = Discovery(
        index=index,
        latents=latents[:, order].numpy(),
        noise=(directions**2 * variances[:, None]).sum(0)[order].numpy(),
        adjacency=adjacency[order][:, order].numpy(),
        intercept=np.zeros(model.p),
        target=target,
        shift=claims.shift,
        log_scale=claims.log_scale,
        retention=claims.retention,
        kind=kind,
        equations="linear",
        verdict=verdict,
        held_out=comparison.held_out,
        gain=comparison.evidence.gain,
        gain_error=comparison.evidence.error,
        misfit=misfit,
        environments=start.environments,
        straightened=cells.variances is not None,
        stability=None if stability is None else stability.reordered(order),
        choice=start.choice,
        ordering=ordering.reordered(order.numpy()),
        second=second.reordered(order.numpy()),
        hit=_hit(task, cells, np.flatnonzero(target >= 0), ordering),
    )
    # Straightened latents and those that are "partly identified" have the unit of control cells.
    if (cells.variances is None or model.n_controls > 1) and verdict.answer != "partly identified":
        measured = torch.minimum(variances, torch.full_like(variances, noise_level(model.moments)))
        error = (directions**2 * measured[:, None]).sum(0)[order]
        control = (task.environments(start.environments)[index] == 0).numpy()
        found = with_unit_noise(found, control, error.numpy())
    fitted = named["shift"][0].numpy()
    return _of_hit_cells(task, _with_errors_in_units(found, fitted))


def _with_errors_in_units(found: Discovery, fitted: np.ndarray) -> Discovery:
    """With the bootstrap's errors of shifts, which are those of shifts (K,) as the likelihood ``fitted`` them, in units of shifts."""
    if found.stability is None:
        return found
    own = found.shift[found.environments]
    scale = np.abs(np.divide(own, fitted, out=np.ones_like(own), where=fitted != 0))
    error = found.stability.shift_error * torch.from_numpy(scale)
    return replace(found, stability=replace(found.stability, shift_error=error))


def with_unit_noise(found: Discovery, control: np.ndarray, error: np.ndarray) -> Discovery:
    """In units in which the own noise of programs has variance 1 over ``control`` cells, a mask (n,) of the latents, beyond the
    variance ``error`` (p,) that measurement gives latents.

    A likelihood's latents have it where it describes the cells. Elsewhere the noise of its components takes up what varies
    among cells, and shifts in units of what is left are several times too large.
    """
    u, graph = found.latents[control], found.adjacency
    variance = (u - u @ graph).var(0)
    own = np.maximum(variance - error - error @ graph**2, LEAST_OWN * variance)
    unit = np.sqrt(np.where(own > 0, own, 1.0))
    return replace(
        found, latents=found.latents / unit, noise=found.noise / unit**2, adjacency=graph * unit[:, None] / unit,
        shift=found.shift / np.where(found.target >= 0, unit[found.target], 1.0),
    )  # fmt: skip


def _of_hit_cells(task: Task, found: Discovery) -> Discovery:
    """The interventions of hit cells, where they are told apart: those that were fitted are of all cells.

    With a share pi of hit cells, the mean of a target's own noise over all cells is pi a, and its covariances with its
    parents fall by pi (1 - r). The noise scale is that of cells weighted by their probability to have been hit, less what
    control cells vary beyond 1: the error of latents. Of contexts it is over that of their controls.
    """
    assert found.hit is not None
    share, u = found.penetrance[0], found.latents
    shift, log_scale, retention = found.shift.copy(), found.log_scale.copy(), found.retention.copy()
    environment = task.environments(found.acting).numpy()
    environment[task.data.split != splits.TRAIN] = -1
    environment = environment[found.index]
    control, context = u[environment == 0], task.data.context[found.index]
    of_controls = control - control @ found.adjacency
    error, level = of_controls.var(0) - 1, _level(of_controls, context[environment == 0])
    for c in np.flatnonzero(share[found.acting] > 0):
        k = found.acting[c]
        own, target = np.flatnonzero(environment == c + 1), found.target[k]
        shift[k] /= share[k]
        retention[k] = max(0.0, 1 - (1 - retention[k]) / share[k])
        if not INTERVENTIONS[found.kind].scales or len(own) < 2:
            continue
        parents = found.adjacency[:, target]
        noise, weight = u[own, target] - retention[k] * (u[own] @ parents), found.hit[found.index[own]]
        mean = np.average(noise, weights=weight)
        variance = max(np.average((noise - mean) ** 2, weights=weight) - error[target], LEAST_VARIANCE)
        log_scale[k] = np.clip(np.log(variance / level[context[own[0]], target]) / 2, -LOG_SCALE, LOG_SCALE)
    return replace(found, shift=shift, log_scale=log_scale, retention=retention)


def _level(noise: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Variance (contexts, p) of programs' own ``noise`` (n, p) in controls of each context; 1 is that over all of them."""
    each = [1 + noise[context == c].var(0) - noise.var(0) for c in range(context.max() + 1)]
    return np.maximum(np.stack(each) if len(each) > 1 else np.ones((1, noise.shape[1])), LEAST_VARIANCE)


def _hit(task: Task, cells: Cells, acting: np.ndarray, ordering: Ordering) -> np.ndarray:
    """Probability (cells,) of each cell of the screen to have been hit by its perturbation, those held out included."""
    environment = task.environments(acting).numpy()
    hit = np.full(len(environment), np.nan, dtype=np.float32)
    hit[environment == 0] = 0
    for c in ordering.hits:
        own = np.flatnonzero((environment == c + 1) & (task.data.split != splits.UNUSED))
        hit[own] = ordering.posterior(cells.values[own].double().numpy(), c)
    return hit


def nonlinear_result(task: Task, start: Start, preference: Preference) -> Discovery:
    """Shifts under nonlinear equations, in the first components as they are: the programs are read off them."""
    solution, values, k = preference.nonlinear, start.cells.values, len(task.effect)
    assert solution is not None and preference.misfit is not None
    index, p = task.fitted_cells(), start.n_latents
    gain, error = preference.gain * len(values), preference.error * len(values)
    target, shift = np.full(k, -1), np.zeros(k)
    target[start.environments] = solution.targets.numpy()
    shift[start.environments] = solution.shift.numpy()
    order = numbered(solution.adjacency, explained_by(task, target, shift, p))
    target[start.environments] = torch.argsort(order)[solution.targets].numpy()
    return Discovery(
        index=index,
        latents=solution.latents(values[index, :p].double())[:, order].numpy(),
        noise=np.zeros(p),
        adjacency=solution.adjacency[order][:, order].numpy(),
        intercept=solution.intercept[order].numpy(),
        target=target,
        shift=shift,
        log_scale=np.zeros(k),
        retention=np.ones(k),
        kind="shift",
        equations="nonlinear",
        verdict=judge_nonlinear(gain, error),
        held_out={"linear": float("nan"), "nonlinear": solution.nll},
        gain=gain,
        gain_error=error,
        misfit=preference.misfit.value,
        environments=start.environments,
        choice=start.choice,
    )
