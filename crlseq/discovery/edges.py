"""Which edges: decisions by likelihood ratio, never by a bare threshold.

The likelihood ratio of an edge is compared with ``dispersion * log N`` (quasi-BIC), the dispersion being the misfit of
the model (`crlseq.discovery.misfit`), so that likelihood ratios are not believed beyond the model's own misfit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.likelihood import Solution
from crlseq.discovery.misfit import misfit
from crlseq.discovery.moments import DTYPE
from crlseq.discovery.scoring import Factor, positive_root
from crlseq.discovery.thresholds import DESCRIBED
from crlseq.storage.stage_cache import cached_on_disk

NEAR_STEPS = 20  # from the conditional maximum of the quadratic model: close already
FAR_STEPS = 60  # where the quadratic model reached too far
MIN_EFFECT = (
    0.25  # |G| where the model does not hold: standard deviations of the child's own noise per unit of the parent
)


@cached_on_disk()
@dataclass(frozen=True)
class Edges:
    """Declared graph: refitted solution, ``adjacency`` (p, p), and the dispersion that likelihood ratios were over."""

    solution: Solution
    adjacency: Tensor
    dispersion: float


def reachable(mask: Tensor) -> Tensor:
    """Transitive closure (p, p), bool."""
    reach = mask.bool()
    for _ in range(max(1, math.ceil(math.log2(max(len(mask), 2))))):
        reach = reach | ((reach.to(DTYPE) @ reach.to(DTYPE)) > 0)
    return reach


def select_edges(solution: Solution, min_effect: float = MIN_EFFECT, scale: float | None = None) -> Edges:
    """Backward elimination with refits from the dense graph, then forward steps; the result is a DAG.

    Backward: on the quadratic model of the profile likelihood the edge whose loss costs least goes, until every
    edge left is worth the threshold and no cycle is left; at most half of the doubtful ones between two refits.
    Forward: the absent edge with the best score test comes back if worth it and it closes no cycle.
    Last: where the model does not describe the moments edges with ``|G| < min_effect`` go, since misfit of the mixing
    makes small ones that are significant; up to there the limit grows with the dispersion, from 0 at a dispersion of 1.
    It is the whole one where retentions are learned, since a retention that is off makes small edges too.
    """
    phi = misfit(solution).dispersion if scale is None else scale
    threshold = math.log(float(solution.model.moments.counts.sum()))
    now = _eliminated(solution, phi, threshold)
    for _ in range(solution.model.p):
        more = _with_absent(now, threshold * phi)
        if more is None:
            break
        now = now.refitted(mask=more, steps=NEAR_STEPS)
    share = 1.0 if now.model.learns_retention else min(1.0, (phi - 1) / (DESCRIBED - 1))
    small = (now.adjacency().abs() < share * min_effect) & now.mask[0].bool()
    if bool(small.any()):
        now = now.refitted(mask=now.mask * (~small), steps=NEAR_STEPS)
    return Edges(now, now.adjacency(), phi)


class _Profile:
    """Quadratic model of the profile likelihood of the edges, from which edges can be taken away.

    ``value`` and ``variance`` (p p) of the edges given that those taken away are 0, ``on`` (p p) the others. A removal
    costs a row of ``directions``, what is known of the edges by all removals, and no new covariance.
    """

    def __init__(self, now: Solution, dispersion: float) -> None:
        model = now.model
        score = model.score(now.theta, now.targets, now.mask)
        edges = score.rows["G"]
        self.solution, self.places, self.start = (
            now,
            score.moving[edges],
            edges.start,
        )  # G comes first in theta, last here
        self.factor = Factor.exact(score)
        covariance = torch.cholesky_inverse(self.factor.root[self.start :, self.start :])
        self.covariance = covariance / float(model.moments.counts.sum()) * dispersion
        self.directions = torch.zeros(0, len(self.places), dtype=DTYPE)
        self.on = now.mask[0].flatten().bool()
        self.value = torch.where(self.on, now.theta[0, : len(self.on)], 0.0)
        self.variance = torch.ones_like(self.value)
        self.variance[self.places] = self.covariance.diagonal()

    def wald(self) -> Tensor:
        """Twice the log-likelihood that each edge is worth (p p), over the dispersion; infinite where there is none."""
        return torch.where(self.on, self.value**2 / self.variance.clamp_min(1e-30), torch.inf)

    def weakest(self, threshold: float, cycles_too: bool) -> int | None:
        """The edge below the threshold that is worth least, else with ``cycles_too`` that of a cycle."""
        wald, p = self.wald(), math.isqrt(len(self.on))
        e = int(wald.argmin())
        if wald[e] > threshold:
            cyclic = self.on & reachable(self.on.reshape(p, p)).T.flatten()  # j -> k with a way back
            if not cycles_too or not bool(cyclic.any()):
                return None
            e = int(torch.where(cyclic, wald, torch.inf).argmin())
        return e

    def remove(self, e: int) -> None:
        """Condition everything on edge ``e`` being 0."""
        own = int((self.places == e).nonzero())
        column = self.covariance[own] - self.directions[:, own] @ self.directions
        direction = column / column[own].clamp_min(1e-30).sqrt()
        self.value[self.places] -= direction * self.value[e] / direction[own]
        self.variance[self.places] -= direction**2
        self.directions = torch.cat([self.directions, direction[None]])
        self.on[e] = False

    def refitted(self) -> Solution:
        """The maximum without the edges taken away, from where the quadratic model sees it."""
        root, before, n = self.factor.root, self.solution.theta, len(self.on)
        theta, moving = before.clone(), self.factor.moving
        theta[0, :n] = torch.where(self.on, self.value, 0.0)
        pull = (theta - before)[0, self.places] @ root[self.start :, : self.start]
        others = torch.linalg.solve_triangular(root[: self.start, : self.start].T, pull[:, None], upper=True)
        theta[0, moving[: self.start]] -= others[:, 0]
        gone = torch.zeros(theta.shape[1], dtype=torch.bool)
        gone[self.places] = ~self.on[self.places]
        mask = self.on.view_as(self.solution.mask).to(DTYPE)
        return self.solution.refitted(theta=theta, mask=mask, steps=NEAR_STEPS, factor=self.factor.without(gone))


def _eliminated(now: Solution, dispersion: float, threshold: float) -> Solution:
    """Refitted without the edges that are not worth the threshold, and without cycles."""
    cells = float(now.model.moments.counts.sum())
    while True:
        profile = _Profile(now, dispersion)
        most, gone, cost = max(1, (int((profile.wald() < threshold).sum()) + 1) // 2), 0, 0.0
        while gone < most and bool(profile.on.any()):
            e = profile.weakest(threshold, cycles_too=not gone)
            if e is None:
                break
            cost += float(profile.wald()[e])
            profile.remove(e)
            gone += 1
        if not gone:
            return now
        trial = profile.refitted()
        lost = float(trial.nll[0] - now.nll[0]) * 2 * cells / dispersion
        if not lost < cost + threshold:
            trial = min(trial, now.refitted(mask=trial.mask, steps=FAR_STEPS), key=lambda s: float(s.nll[0]))
        now = trial


def score_absent(now: Solution) -> tuple[Tensor, Tensor]:
    """Absent edges (m,), as places in the flat graph, and their score statistics (m,).

    Twice the log-likelihood that an edge would gain with all other parameters free to follow, to second order:
    ``N g^2 / (i_ee - i_eo i_oo^-1 i_oe)``, g and i being gradient and information per cell, o what is there already.
    """
    model, p = now.model, now.model.p
    score = model.score(now.theta, now.targets, 1 - torch.eye(p, dtype=DTYPE)[None])
    edge, on = score.moving < p * p, torch.zeros(model.size, dtype=torch.bool)  # G comes first
    on[: p * p] = now.mask[0].flatten().bool()
    inside = ~edge | on[score.moving]
    lower = score.information().tril_()
    information = lower + lower.tril(-1).T
    absent, cross = score.moving[~inside], information[inside][:, ~inside]
    half = torch.linalg.solve_triangular(positive_root(information[inside][:, inside]), cross, upper=False)
    left = (information.diagonal()[~inside] - (half**2).sum(0)).clamp_min(1e-30)
    return absent, float(model.moments.counts.sum()) * score.gradient[absent] ** 2 / left


def _with_absent(now: Solution, threshold: float) -> Tensor | None:
    """The mask with the best half of the absent edges whose score statistics pass (one at least), without cycles."""
    absent, statistic = score_absent(now)
    mask = now.mask.clone()
    added, most = 0, (int((statistic > threshold).sum()) + 1) // 2
    for i in statistic.argsort(descending=True).tolist():
        if added == most or statistic[i] <= threshold:
            break
        j, k = divmod(int(absent[i]), now.model.p)
        if not bool(reachable(mask[0])[k, j]):
            mask[0, j, k] = 1
            added += 1
    return mask if added else None
