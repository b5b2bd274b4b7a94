"""What a likelihood found, in the terms of a screen: latents in order, interventions by perturbation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crlseq.config import InterventionKind
from crlseq.data import splits
from crlseq.data.dataset import PerturbSeqData
from crlseq.discovery.bootstrap import Stability
from crlseq.discovery.edges import reachable
from crlseq.discovery.likelihood import Solution
from crlseq.discovery.moments import environment_moments
from crlseq.discovery.n_latents import LatentChoice
from crlseq.discovery.nonlinear_test import Preference
from crlseq.discovery.reassign import assign_targets
from crlseq.discovery.verdict import KindComparison, Verdict
from crlseq.storage.stage_cache import kept

CHUNK = 100_000  # cells whose latents are computed at a time


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
        See `crlseq.discovery.verdict.KindComparison`.
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
    kind: InterventionKind
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


@kept
@dataclass(frozen=True)
class Coordinates:
    """Cells (N, .) in the coordinates of the likelihood, posterior variances if straightened, and environments (N,)."""

    values: Tensor
    variances: Tensor | None
    environment: Tensor
    train: Tensor

    def of_fit(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Values (n, .) in float64, variances and environments of the training cells."""
        variances = None if self.variances is None else self.variances[self.train]
        return self.values[self.train].double(), variances, self.environment[self.train]


def environments_of(data: PerturbSeqData, chosen: np.ndarray) -> Tensor:
    """(cells,) environment of each cell: 0 control, i + 1 the single perturbation ``chosen[i]``, -1 for others.

    A cell whose batch has no controls is one of the others.
    """
    number: dict[tuple[int, ...], int] = {(): 0} | {(int(k),): i + 1 for i, k in enumerate(chosen)}
    of_condition = np.array([*(number.get(parts, -1) for parts in data.conditions), -1])
    return torch.from_numpy(np.where(data.comparable(), of_condition[data.condition], -1))


def _order(adjacency: Tensor) -> Tensor:
    """A topological order: ancestors have fewer ancestors than their descendants."""
    return torch.argsort(reachable(adjacency != 0).sum(0), stable=True)


def _fitted_cells(data: PerturbSeqData) -> np.ndarray:
    return np.flatnonzero(np.isin(data.split, (splits.TRAIN, splits.VALIDATION)) & (data.condition >= 0))


def finish(
    data: PerturbSeqData,
    chosen: np.ndarray,
    effect: np.ndarray,
    comparison: KindComparison,
    cells: Coordinates,
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
    retention[chosen] = model.retention(named["retention"])[0].numpy()
    others = np.setdiff1d(np.flatnonzero(effect > 0), chosen)
    if len(others):  # they do not shape the graph, but have a place in it
        environment = environments_of(data, others)
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
        dispersion=comparison.misfit.dispersion,
        straightened=straightened,
        stability=None if stability is None else stability.reordered(order),
        environments=chosen,
        choice=choice,
    )


def finish_nonlinear(
    data: PerturbSeqData, chosen: np.ndarray, preference: Preference, values: Tensor, choice: LatentChoice | None
) -> Discovery:
    """Shifts under nonlinear equations, in components (N, p) as they are: the programs are read off them."""
    solution, n = preference.nonlinear, len(values)
    assert solution is not None and preference.misfit is not None
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
        dispersion=preference.misfit.value,
        straightened=False,
        stability=None,
        environments=chosen,
        choice=choice,
    )
