"""How far a fit would change with other cells: bootstrap of edges, ancestry, targets, programs and shifts.

Every replicate draws the cells of each environment again with replacement, finds the targets again (from those of the
fit by likelihood, and afresh), refits, and selects the edges again with the dispersion of the fit. Support is the share
of replicates in which a finding is made again: near 1/2 for an edge that just passes its likelihood ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import one_hot

from crlseq.discovery.edges import Edges, reachable, score_absent, select_edges
from crlseq.discovery.likelihood import Solution, allowed_edges
from crlseq.discovery.moments import DTYPE, Crossed, Moments
from crlseq.discovery.propose import propose_targets
from crlseq.discovery.reassign import reassign_targets
from crlseq.storage.stage_cache import cached_on_disk
from crlseq.threads import counted, in_parallel

REPLICATE_STEPS = 20  # of scoring, from the fit or from fresh targets
MOVING_ROUNDS = 3  # of moving perturbations; from the fit hardly any move
DOUBTFUL = 0.25  # of the threshold: an absent edge with this score statistic is offered to the elimination again


@cached_on_disk()
@dataclass(frozen=True)
class Stability:
    """Shares of ``n`` replicates, programs named as in the fit."""

    edge: Tensor  # (p, p) row -> column
    ancestor: Tensor  # (p, p) row -> column
    target: Tensor  # (K,) the target of the fit
    assignment: Tensor  # (K, p) targets
    program: Tensor  # (p,) mean |cosine| of loadings with the fit's, whitened by the covariance within environments
    shift_error: Tensor  # (K,) standard deviation over the replicates that keep the target, NaN where fewer than two do
    n: int
    failed: int  # more replicates, which found no maximum

    def reordered(self, order: Tensor) -> Stability:
        """The same with programs in another order (p,)."""
        edge, ancestor = (matrix[order][:, order] for matrix in (self.edge, self.ancestor))
        assignment, program = self.assignment[:, order], self.program[order]
        return replace(self, edge=edge, ancestor=ancestor, assignment=assignment, program=program)


def bootstrap(
    values: Tensor, variances: Tensor | None, environment: Tensor, edges: Edges, n: int, seed: int = 0, threads: int = 1
) -> Stability:
    """Stability of a fit under resampling of cells within environments.

    What made ``values`` (components, a network) is held fixed. ``values`` and ``variances`` (N, q), float64, are the
    cells that ``edges`` was fitted to and their posterior variances if they have any; ``environment`` (N,) is 0 for
    control, ``i + 1`` for perturbation ``i`` of the fit: a `ValueError` if they are others. The standard error of a
    support ``s`` is ``sqrt(s (1 - s) / n)``. Replicates have random numbers of their own: ``threads`` change no result.
    """
    fit = edges.solution
    n_environments = len(fit.model.moments.counts)
    counts = torch.bincount(environment, minlength=n_environments)
    if len(counts) != n_environments or not torch.equal(counts.to(DTYPE), fit.model.moments.counts):
        raise ValueError("environment must hold the cells of the fit, no others.")
    draw = _sampler(values, variances, environment, fit.model.moments.crossed)
    p, k = fit.model.p, fit.model.k
    edge, ancestor, assignment, program = (torch.zeros(shape, dtype=DTYPE) for shape in ((p, p), (p, p), (k, p), (p,)))
    shifts: list[Tensor] = []
    seeds = torch.randint(2**62, (n,), generator=torch.Generator().manual_seed(seed)).tolist()

    def replicate(own_seed: int) -> Solution | None:
        generator = torch.Generator().manual_seed(own_seed)
        return _refit(edges, draw(generator), generator)

    for again in counted(in_parallel(replicate, seeds, threads), n):
        if again is not None:
            order, sign, cosine = match_programs(fit, again)
            on = (again.adjacency() != 0)[order][:, order]
            edge += on
            ancestor += reachable(on)
            targets = order.argsort()[again.targets[0]]
            assignment += one_hot(targets, p)
            program += cosine
            shift = again.model.unpack(again.theta)["shift"][0] * sign[targets]
            shifts.append(torch.where(targets == fit.targets[0], shift, torch.nan))
    done = len(shifts)
    share = 1 / max(1, done)
    target = assignment[torch.arange(k), fit.targets[0]]
    error = _deviation(torch.stack(shifts) if shifts else torch.full((1, k), torch.nan, dtype=DTYPE))
    return Stability(
        edge * share, ancestor * share, target * share, assignment * share, program * share, error, done, n - done
    )


def match_programs(fit: Solution, other: Solution) -> tuple[Tensor, Tensor, Tensor]:
    """Programs of ``other`` that stand for those of ``fit``: index, sign and \\|cosine\\| of the loadings, (p,) each.

    Hungarian method on the number of perturbations shared, ties by the direction of the loadings.
    """
    p = fit.model.p
    shared = _shared(fit.targets[0], other.targets[0], p)
    root = torch.linalg.cholesky(fit.model.moments.pooled() + 1e-9 * torch.eye(fit.model.q, dtype=DTYPE))
    direction = []
    for s in (fit, other):
        white = torch.linalg.solve_triangular(root, s.model.unpack(s.theta)["W"][0].T, upper=False)
        direction.append(white / white.norm(dim=0).clamp_min(1e-12))
    cosine = direction[0].T @ direction[1]
    # p cosines sum to at most p, so that they never outweigh one shared perturbation
    _, column = linear_sum_assignment(-(shared + cosine.abs() / (p + 1)).numpy())
    order = torch.from_numpy(column)
    matched = cosine[torch.arange(p), order]
    return order, matched.sign(), matched.abs()


def _sampler(
    values: Tensor, variances: Tensor | None, environment: Tensor, crossed: Crossed | None = None
) -> Callable[[torch.Generator], Moments]:
    """Draws moments of resampled cells: counts of how often each cell is drawn weigh it, no cell is copied."""
    cells: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for c in range(int(environment.max()) + 1):
        own = environment == c
        x = values[own].to(DTYPE)
        center = x.mean(0)  # taken off: second moments about 0 would cancel
        cells.append((x - center, center, None if variances is None else variances[own].to(DTYPE)))
    counts = torch.tensor([len(x) for x, _, _ in cells], dtype=DTYPE)

    def draw(generator: torch.Generator) -> Moments:
        means, covariances = [], []
        for x, center, variance in cells:
            m = len(x)
            weight = torch.bincount(torch.randint(m, (m,), generator=generator), minlength=m).to(DTYPE) / m
            mean = weight @ x
            covariance = (x * weight[:, None]).T @ x - mean[:, None] * mean
            if variance is not None:
                covariance = covariance + torch.diag(weight @ variance)
            means.append(center + mean)
            covariances.append(covariance)
        return Moments(torch.stack(means), torch.stack(covariances), counts, crossed)

    return draw


def _refit(edges: Edges, moments: Moments, generator: torch.Generator) -> Solution | None:
    """Targets (from those of the fit or afresh, by likelihood), parameters and edges for other moments; None where the
    likelihood has no maximum.
    """
    now = reassign_targets(edges.solution.refitted(moments=moments, steps=REPLICATE_STEPS), MOVING_ROUNDS)
    rival = _afresh(now, generator)
    if now.model.intervention.graph == "nothing":
        now = rival or now
    else:
        now = select_edges(rival, scale=edges.dispersion).solution if rival else _select(now, edges.dispersion)
    return now if bool(torch.isfinite(now.nll).all() & torch.isfinite(now.theta).all()) else None


def _afresh(now: Solution, generator: torch.Generator) -> Solution | None:
    """A fit from targets that know nothing of ``now``, dense, if it ends elsewhere and at a better likelihood."""
    model, p = now.model, now.model.p
    proposed = propose_targets(model.moments, p, 1, generator)[0]
    _, column = linear_sum_assignment(-_shared(now.targets[0], proposed, p).numpy())
    targets = torch.from_numpy(column).argsort()[proposed]  # named as in now
    if torch.equal(targets, now.targets[0]):
        return None
    full, start = allowed_edges(p, model.kind), model.start(targets[None])
    other = reassign_targets(model.solve(start, targets[None], full, REPLICATE_STEPS), MOVING_ROUNDS)
    if torch.equal(other.targets, now.targets):
        return None
    return other if bool(other.nll[0] < now.refitted(mask=full, steps=REPLICATE_STEPS).nll[0]) else None


def _shared(targets: Tensor, others: Tensor, p: int) -> Tensor:
    """How many perturbations program ``i`` of the one and ``j`` of the other have in common (p, p)."""
    return one_hot(targets, p).to(DTYPE).T @ one_hot(others, p).to(DTYPE)


def _select(now: Solution, scale: float) -> Solution:
    """Edge selection from the declared graph and the doubtful edges beside it rather than from the dense graph."""
    absent, statistic = score_absent(now)
    doubtful = DOUBTFUL * math.log(float(now.model.moments.counts.sum()))
    mask = now.mask.clone()
    mask.view(-1)[absent[statistic / scale > doubtful]] = 1
    return select_edges(now.refitted(mask=mask, steps=REPLICATE_STEPS), scale=scale).solution


def _deviation(shifts: Tensor) -> Tensor:
    """Standard deviation (K,) over the rows of ``shifts`` (n, K) that are not NaN."""
    seen = ~shifts.isnan()
    n = seen.sum(0)
    mean = shifts.nansum(0) / n
    square = torch.where(seen, (shifts - mean) ** 2, 0.0).sum(0)
    return torch.where(n > 1, (square / (n - 1).clamp_min(1)).sqrt(), torch.nan)
