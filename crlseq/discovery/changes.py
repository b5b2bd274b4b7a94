"""What interventions change in the covariance of programs: a closed form that shows who is upstream of whom.

Programs obey u = u G + z + shift (row vectors; z has covariance Omega), and the mean shift of an intervention on i points
along row i of T = (I - G)^-1. In coordinates x in which it lies along axis i (`crlseq.discovery.axes`), x are the
exogenous variables of every environment, but for x_i under do(i), which loses what its parents gave:

    E[k, i] = Cov(x_k, x_i | do(i), hit cells) - Cov(x_k, x_i | controls) = -(Omega T)[k, i],      k != i.

Whatever all environments share cancels: background that nobody perturbs, noise. A mere shift changes nothing, a soft
intervention a part; escaped cells scale it, since their mixture varies along the shift and touches Var(x_i) alone. With
cells weighted by their posterior r, what is left of it is sum r^2 (s - mu)^2 / sum r (s - mu)^2, as E(x_k | s) is r times
that of hit cells.

Covariances beside x_i do not change, D[j, k] = 0 for j, k != i. What they do change by in the sample is noise that
E shares, so that it is taken off (control variates; b are the slopes of x_i on the x_k that it is seen to lose):

    E[k, i] = D[k, i] - sum_j b_j D[k, j].

Standard errors know of cells (influence values), of perturbations of one target that differ beyond them, and of axes that
are turned: a turn d of axis i towards k adds -d (Var(x_i | hit) - Var(x_i | controls)) to E[k, i], and one of axis j
-d E[j, i].

Where cells lie in several contexts, each perturbation is compared with controls of its own. E of a context is divided by
what Var(x_k) is there, over all controls 1: noise of programs may differ between contexts, effects in -E[k, i] / Var(x_k) do
then not. Contexts are pooled by inverse variance, and whether they differ is told by chi-square about the pooled value.

Source: this project; that covariances of interventional data identify a linear latent graph is due to Squires
et al. 2023, ICML.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from crlseq.discovery.axes import consensus
from crlseq.discovery.hits import Floats, Hit, hit_cells

MIN_SHIFT = 0.25  # standard deviations of control cells: a weaker perturbation says nothing about its target
MIN_CELLS = 10
SAME_CELLS = 1e-6  # share of controls' variance below which cells are copies of one
LEAST_VARIANCE = 0.1  # of a product's mean: a share of what it is in control cells
PRIOR_DEGREES = 4.0  # of freedom, that perturbations of a target agree
LOST = 2.5  # standard errors from which a change enters the control variates
SEEN = 2.0  # standard errors from which a change carries the error of another axis
RETAINED = 3.0  # standard errors from which a change tells how much of it a perturbation leaves
BENT, MOST_BENT = 1.15, 1.5  # see `bend_of`: from which it counts, and its most
REVERSED = 0.1  # of a change: what a network leaves in the reverse
BENT_PRIOR = 20.0  # values that the prior of no bend is worth
UNKNOWN_CUT = 0.5  # |change of Var(x_i)| where no perturbation shows it


@dataclass(frozen=True)
class Perturbed:
    """What one perturbation of program ``target`` changes."""

    target: int
    perturbation: int  # 0 .. K - 1
    shift: Floats  # (p,) of hit cells where they are told apart, else of all
    hit: Hit
    along: Floats  # (p,) its cells' scores are x @ along
    scale: float  # share of E that it shows: that of hit cells, where they are told apart among those taken for hit
    value: Floats  # (p,) E[:, target] times scale; at the target the change of its variance
    variance: Floats  # (p,) that its own cells leave
    escaped: Floats  # (p,) mean of escaped cells where they are told apart, else 0
    n_escaped: float


@dataclass(frozen=True)
class Changes:
    """E (p, p) of all pairs k -> i with standard errors, infinite where no perturbation can tell, and what the rules need."""

    e: Floats
    e_error: Floats
    cut: Floats  # (p,) change of Var(x_i) in hit cells, NaN unknown
    correlation: Floats  # (p, p) of x over controls, 0 on the diagonal
    beside: Floats  # (p, p, p) z of D[j, k] under do(i) at [i, j, k]; 0 where j or k is i
    outliers: float  # share of second targets among slopes of shifts
    by_target: list[list[Perturbed]]
    contexts: tuple[Changes, ...] = ()  # the same of each context, where there are several
    chi_square: Floats | None = None  # (p, p) of differences between contexts, and their number of degrees of freedom
    freedom: Floats | None = None


@dataclass(frozen=True)
class _Sample:
    """Cells of one perturbation, weighted and centred so that products of them estimate what it changes."""

    z: Floats  # (n, p) centred; where hit cells are not told apart, less ``lean`` x_i, so that the shift lies along x_i
    weight: Floats  # (n,)
    lean: Floats  # (p,)
    wider: float  # variance of x_i that escaped cells add, over that of controls, over the shift: error of lean
    shift: Floats  # (p,)
    hit: Hit
    along: Floats  # (p,)
    scale: float
    escaped: Floats  # (p,)
    n_escaped: float


@dataclass(frozen=True)
class _Part:
    """What perturbations change in one context, before axes are known to be turned."""

    e: Floats
    variance: Floats  # (p, p) infinite where no perturbation can tell
    cut: Floats
    beside: Floats
    by_target: list[list[Perturbed]]
    correlation: Floats
    slopes: tuple[
        Floats, Floats, NDArray[np.int64]
    ]  # mean shifts (m, p), their variances (m,), and whose they are (m,)
    level: Floats  # (p,) Var(x_k) over controls
    n_control: int


def measure_changes(
    x: Floats,
    environment: NDArray[np.int64],
    targets: NDArray[np.int64],
    context: NDArray[np.int64] | None = None,
    turned: Floats | None = None,
) -> Changes:
    """E of exogenous coordinates ``x`` (n, p); ``environment`` (n,) 0 for control and c + 1 for perturbation c, ``targets``
    (K,). Where there are several, ``context`` (n,) of each cell; a perturbation lies in one. ``turned`` (p, p) are the variances
    of the angles by which axes may be turned; by default those that mean shifts leave.
    """
    if context is None:
        part = _in_context(x, environment, targets)
        return _with_turns(part, *_turned([part], targets, x.shape[1]), targets)
    rows = [context == c for c in np.unique(context)]
    parts = [_in_context(x[own], environment[own], targets) for own in rows]
    variance, outliers = _turned(parts, targets, x.shape[1])
    pooled = _pooled_over(list(map(_levelled, parts)))
    return _with_turns(pooled, variance if turned is None else turned, outliers, targets)


def _in_context(x: Floats, environment: NDArray[np.int64], targets: NDArray[np.int64]) -> _Part:
    """Of cells that are compared with the controls among them."""
    p, count = x.shape[1], np.bincount(environment, minlength=len(targets) + 1)
    if (np.diff(environment) < 0).any():  # no copy of cells that are in order
        x = x[np.argsort(environment, kind="stable")]
    cells = np.split(x, np.cumsum(count)[:-1])
    base = cells[0].mean(0)
    control = cells[0] - base
    c0 = control.T @ control / len(control)
    inverse = np.linalg.pinv(c0)
    e, variance, beside = np.zeros((p, p)), np.full((p, p), np.inf), np.zeros((p, p, p))
    cut, by_target = np.full(p, np.nan), []
    for i in range(p):
        own = [int(c) for c in np.flatnonzero(targets == i)]
        found = {c: s for c in own if (s := _sample(cells[c + 1] - base, c0, inverse, i)) is not None}
        by_target.append(_perturbed(found, i, c0, len(control)))
        if found:
            e[:, i], variance[:, i], cut[i] = _pooled(by_target[i], control, i)
            beside[i] = _beside(list(found.values()), c0, len(control), i)
    np.fill_diagonal(e, 0)
    some = np.array([c for c in range(len(targets)) if count[c + 1] > 1], dtype=np.int64)
    mean = np.array([cells[c + 1].mean(0) - base for c in some]).reshape(-1, p)
    slopes = mean, 1 / count[some + 1] + 1 / count[0], some
    return _Part(e, variance, cut, beside, by_target, c0 * (1 - np.eye(p)), slopes, np.diag(c0), len(control))


def _levelled(part: _Part) -> _Part:
    """Rows over Var(x_k): what a perturbation takes from its target of each unit of x_k."""
    level = np.maximum(part.level, 1e-300)[:, None]
    by_target = [
        [replace(one, value=one.value / level[:, 0], variance=one.variance / level[:, 0] ** 2) for one in group]
        for group in part.by_target
    ]
    root = np.sqrt(level * level.T)
    return replace(
        part, e=part.e / level, variance=part.variance / level**2, cut=part.cut / level[:, 0], by_target=by_target,
        correlation=part.correlation / root,
    )  # fmt: skip


def _pooled_over(parts: list[_Part]) -> _Part:
    """E of several contexts by inverse variance, wider where they differ beyond their errors."""
    e, variance, beside = (np.stack([getattr(part, name) for part in parts]) for name in ("e", "variance", "beside"))
    n_control, weight = np.array([part.n_control for part in parts]), 1 / variance
    total = weight.sum(0)
    mean = (weight * e).sum(0) / np.maximum(total, 1e-300)
    freedom = np.maximum(np.isfinite(variance).sum(0) - 1.0, 0.0)
    scatter = np.maximum(1.0, ((weight * (e - mean) ** 2).sum(0) + PRIOR_DEGREES) / (freedom + PRIOR_DEGREES))
    cut = np.stack([part.cut for part in parts])
    known = np.isfinite(cut).sum(0)
    share = (n_control / n_control.sum())[:, None, None]
    with np.errstate(divide="ignore"):
        return replace(
            parts[0], e=mean, variance=scatter / total, n_control=int(n_control.sum()),
            cut=np.where(known > 0, np.nan_to_num(cut).sum(0) / np.maximum(known, 1), np.nan),
            by_target=[[one for part in parts for one in part.by_target[i]] for i in range(len(mean))],
            beside=beside.sum(0) / np.sqrt(np.maximum((beside != 0).sum(0), 1)),
            correlation=(share * np.stack([part.correlation for part in parts])).sum(0),
        )  # fmt: skip


def _with_turns(part: _Part, turned: Floats, outliers: float, targets: NDArray[np.int64]) -> Changes:
    """With the errors that turned axes make."""
    e, variance, cut = part.e, part.variance, part.cut
    seen = np.where(np.abs(e) > SEEN * np.sqrt(variance), e**2, 0)
    own_cut = np.where(np.isfinite(cut), cut**2, UNKNOWN_CUT**2)
    error = np.sqrt(variance + turned.T * own_cut + turned.T @ seen - np.diag(turned)[:, None] * seen)
    error[np.bincount(targets, minlength=len(e)) == 0] = np.inf  # their axes are arbitrary
    return Changes(e, error, cut, part.correlation, part.beside, outliers, part.by_target)


def retained(found: Changes) -> dict[int, tuple[float, float]]:
    """By perturbation, the share that it leaves in place of the clearest change E[k, i] of its target i, and its standard
    error: 1 less its own change over the median of those that are at least half of the largest.

    For targets with a clear change and several perturbations.
    """
    kept = {}
    for i, group in enumerate(found.by_target):
        z = np.abs(found.e[:, i]) / found.e_error[:, i]
        k = int(z.argmax())
        if len(group) > 1 and z[k] > RETAINED:
            own = np.array([one.value[k] / one.scale for one in group]) * np.sign(found.e[k, i])
            whole = float(np.median(own[own >= own.max() / 2]))
            for one, change in zip(group, own, strict=True):
                kept[one.perturbation] = 1 - float(change) / whole, float(np.sqrt(one.variance[k])) / one.scale / whole
    return kept


def bend_of(found: Changes) -> float:
    """By how much covariances beside x_i, which no intervention changes, differ between conditions more than by chance: the
    root mean square of their z, at most `MOST_BENT`, and 1 below `BENT`. Coordinates that a network straightened are bent
    a little still, which makes changes of all covariances.
    """
    z = found.beside[:, *np.triu_indices(len(found.e), 1)]
    square = np.minimum(z[z != 0] ** 2, 16.0)
    bend = float(np.sqrt((square.sum() + BENT_PRIOR) / (len(square) + BENT_PRIOR)))
    return min(bend, MOST_BENT) if bend > BENT else 1.0


def widened(found: Changes, bend: float | None) -> Changes:
    """With the errors that a network leaves which straightened the coordinates: its bend, and `REVERSED` of the reverse, which
    bends feign; the same for coordinates without a bend.
    """
    if bend is None:
        return found
    return replace(found, e_error=np.hypot(bend * found.e_error, REVERSED * np.abs(found.e.T)))


def _sample(cells: Floats, c0: Floats, inverse: Floats, i: int) -> _Sample | None:
    """The cells (n, p) of a perturbation of ``i``, centred on controls of covariance ``c0``; None if they can say nothing."""
    if (
        len(cells) < MIN_CELLS
        or abs(cells[:, i].mean()) < MIN_SHIFT
        or (cells.var(0) < SAME_CELLS * c0.diagonal()).any()
    ):
        return None
    mean = cells.mean(0)
    along = inverse @ mean / (mean @ inverse @ mean)
    scores = cells @ along
    hit = hit_cells(scores, float(along @ c0 @ along))
    if hit.told:
        posterior = hit.posterior(scores)
        weight = posterior / posterior.sum()
        spread = posterior * (scores - hit.mean) ** 2
        scale = float(
            posterior @ spread / spread.sum()
        )  # escaped cells among them, as far as they look hit, show nothing
        shift, n_escaped = weight @ cells, float((1 - posterior).sum())
        escaped = (1 - posterior) @ cells / max(n_escaped, 1e-9)
        return _Sample(cells - shift, weight, np.zeros_like(mean), 0.0, shift, hit, along, scale, escaped, n_escaped)
    lean, z = mean / mean[i], cells - mean
    lean[i] = 0
    wider = float((z[:, i] ** 2).mean() - c0[i, i]) / float(mean[i])
    weight = np.full(len(cells), 1 / len(cells))
    return _Sample(z - z[:, [i]] * lean, weight, lean, wider, mean, hit, along, hit.share, 0 * mean, 0.0)


def _perturbed(found: dict[int, _Sample], i: int, c0: Floats, n_control: int) -> list[Perturbed]:
    """What each perturbation of ``i`` changes, noise that it shares with covariances beside x_i taken off."""
    slopes = np.zeros(len(c0))
    samples = list(found.values())
    first = [_estimate(one, slopes, i, c0) for one in samples]
    if first:
        value, precision = _weighted([(one.scale, *own) for one, own in zip(samples, first, strict=True)])
        lost = np.abs(value) > LOST * np.sqrt(1 / precision + 1 / n_control)
        lost[i] = False
        slopes[lost] = np.linalg.lstsq(c0[np.ix_(lost, lost)], value[lost], rcond=None)[0]
    seen = []
    for c, one in found.items():
        value, variance = _estimate(one, slopes * one.scale, i, c0)
        same = (one.shift, one.hit, one.along, one.scale, value, variance, one.escaped, one.n_escaped)
        seen.append(Perturbed(i, c, *same))
    return seen


def _estimate(one: _Sample, slopes: Floats, i: int, c0: Floats) -> tuple[Floats, Floats]:
    """D[:, i] - D slopes (p,) of one perturbation and the variance that its cells leave; at i the change of Var(x_i)."""
    z, own = one.z, one.z[:, i]
    product = z * (own - z @ slopes)[:, None]
    product[:, i] = own**2
    value = one.weight @ product
    influence = one.weight[:, None] * (product - value - one.wider * z)
    cells = 1 / float(one.weight @ one.weight)
    variance = (influence**2).sum(0) * cells / max(cells - 2, 1.0)
    least: Floats = LEAST_VARIANCE * c0[i, i] * c0.diagonal() / cells
    turn = np.eye(len(c0))
    turn[i] -= one.lean
    of_control = turn.T @ c0 @ turn
    expected = of_control[:, i] - of_control @ slopes
    expected[i] = of_control[i, i]
    return value - expected, np.maximum(variance, least)


def _weighted(estimates: list[tuple[float, Floats, Floats]]) -> tuple[Floats, Floats]:
    """Weighted mean (p,) of values that show a known share of it, and its precision (p,)."""
    scale, value, variance = (np.stack([np.asarray(one[j]) for one in estimates]) for j in range(3))
    precision = (scale[:, None] ** 2 / variance).sum(0)
    return (scale[:, None] * value / variance).sum(0) / precision, precision


def _pooled(seen: list[Perturbed], control: Floats, i: int) -> tuple[Floats, Floats, float]:
    """E[:, i] (p,), its variance, widened where perturbations differ beyond their errors, and the change of Var(x_i)."""
    estimates = [(one.scale, one.value, one.variance) for one in seen]
    mean, precision = _weighted(estimates)
    square = sum((value - scale * mean) ** 2 / variance for scale, value, variance in estimates)
    scatter = np.maximum(1, (square + PRIOR_DEGREES) / (len(seen) + PRIOR_DEGREES - 1))
    lost = np.where(np.abs(mean) > LOST / np.sqrt(precision), mean, 0)
    lost[i] = 0
    own = (control * (control[:, i] - control @ lost)[:, None]).var(0) / len(control)
    shared = sum(scale / variance for scale, _, variance in estimates) / precision
    told = [(1.0, one.value, one.variance) for one in seen if one.hit.told]
    cut = float(_weighted(told)[0][i]) if told else np.nan
    return mean, scatter / precision + own * shared**2, cut


def _beside(samples: list[_Sample], c0: Floats, n_control: int, i: int) -> Floats:
    """z (p, p) of the changes of covariances beside x_i, pooled over the perturbations of ``i``; 0 in row and column i."""
    change, variance, total = np.zeros_like(c0), np.zeros_like(c0), 0.0
    for one in samples:
        z, w, w2 = one.z, one.weight[:, None], one.weight[:, None] ** 2
        n = 1 / float((w2).sum())
        turn = np.eye(len(c0))
        turn[i] -= one.lean
        moment, square = (z * w).T @ z, z**2
        change += n * (moment - turn.T @ c0 @ turn)
        variance += n**2 * ((square * w2).T @ square - 2 * moment * ((z * w2).T @ z) + moment**2 / n)
        total += n
    of_control = (np.outer(np.diag(c0), np.diag(c0)) + c0**2) / n_control  # normal variables
    z_score: Floats = change / total / np.sqrt(variance / total**2 + of_control)
    z_score[i] = z_score[:, i] = 0
    return z_score


def _turned(parts: list[_Part], targets: NDArray[np.int64], p: int) -> tuple[Floats, float]:
    """Variance (p, p) of the angle by which each axis (row) may be turned towards another; share of outlying slopes."""
    mean, sampling, some = (np.concatenate([part.slopes[j] for part in parts]) for j in range(3))
    own = mean[np.arange(len(some)), targets[some]]
    own = np.where(np.abs(own) < 1e-6, 1e-6, own)[:, None]
    agreed = consensus(mean / own, np.broadcast_to(sampling[:, None] / own**2, mean.shape), targets[some], p)
    return agreed.variance, agreed.outliers
