"""Which edges: decisions by likelihood ratio, never by a bare threshold.

The likelihood ratio of an edge is compared with ``dispersion * log N`` (quasi-BIC), the dispersion being the misfit of
the model (`crlseq.discovery.misfit`), so that likelihood ratios are not believed beyond the model's own misfit.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.likelihood import Solution
from crlseq.discovery.misfit import CHANCE, misfit
from crlseq.discovery.moments import DTYPE
from crlseq.discovery.thresholds import DESCRIBED
from crlseq.storage.stage_cache import cached_on_disk

NEAR_STEPS = 6  # from the conditional maximum of the quadratic model: close already
FAR_STEPS = 30  # where the quadratic model reached too far
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
    edge left is worth the threshold; then the others are refitted, until none goes and no cycle is left.
    Forward: absent edges with the best score tests come back if worth it and they close no cycle, and those go again that
    others make superfluous: where one is missing, all that could stand for it pass.
    Last: where the model does not describe the moments edges with ``|G| < min_effect`` go, since misfit of the mixing
    makes small ones that are significant; up to there the limit grows with the misfit beyond chance, from 0 at 1.
    It is the whole one where retentions are learned, since a retention that is off makes small edges too.
    """
    of_model = misfit(solution)
    phi = of_model.dispersion if scale is None else scale
    threshold = math.log(float(solution.model.moments.counts.sum()))
    now = _eliminated(solution, phi, threshold)
    for _ in range(solution.model.p):
        more = _with_absent(now, threshold * phi)
        if more is None:
            break
        grown = now.refitted(mask=more, steps=NEAR_STEPS)
        # Where retentions are learned all edges may seem to be worth nothing, one for the other: so the better graph of both.
        grown = min(grown, _eliminated(grown, phi, threshold), key=lambda found: _quasi_bic(found, phi))
        if torch.equal(grown.mask, now.mask):
            break
        now = grown
    beyond = max(0.0, phi - CHANCE * of_model.error - 1)
    share = 1.0 if now.model.learns_retention else min(1.0, beyond / (DESCRIBED - 1))
    small = (now.adjacency().abs() < share * min_effect) & now.mask[0].bool()
    if bool(small.any()):
        now = now.refitted(mask=now.mask * (~small), steps=NEAR_STEPS)
    return Edges(now, now.adjacency(), phi)


def _quasi_bic(solution: Solution, dispersion: float) -> float:
    """Minus twice the log-likelihood over the dispersion, and log N for every edge."""
    cells = float(solution.model.moments.counts.sum())
    return 2 * cells * float(solution.nll[0]) / dispersion + math.log(cells) * float(solution.mask.sum())


class _Profile:
    """Quadratic model of the profile likelihood of the edges, from which edges can be taken away.

    ``value`` and ``variance`` (p p) of the edges given that those taken away are 0, ``on`` (p p) the others. A removal
    adds a row to ``directions``: what all removals tell of the edges.
    """

    def __init__(self, now: Solution, dispersion: float) -> None:
        model, self.before = now.model, now.theta[0]
        self.on = now.mask[0].flatten().bool()
        self.places = torch.nonzero(self.on)[:, 0]
        # The edges last, so that the end of the factor is that of their own profile likelihood.
        others = model.free(now.mask)[0] > 0
        others[self.places] = False
        self.others = torch.nonzero(others)[:, 0]
        order, n = torch.cat([self.others, self.places]), len(self.others)
        root = _root(model.information(now.theta, now.targets, now.mask)[2][0][order[:, None], order])
        self.inside, self.cross = root[:n, :n], root[n:, :n]
        scale = dispersion / float(model.moments.counts.sum())
        self.covariance = torch.cholesky_inverse(root[n:, n:]) * scale
        self.directions = torch.zeros(0, len(self.places), dtype=DTYPE)
        self.value, self.variance = self.before[: len(self.on)] * self.on, torch.ones(len(self.on), dtype=DTYPE)
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
        """Condition the other edges on edge ``e`` being 0."""
        own = int(torch.searchsorted(self.places, e))
        column = self.covariance[own] - self.directions[:, own] @ self.directions
        direction = column / column[own].clamp_min(1e-30).sqrt()
        self.value[self.places] -= direction * (self.value[e] / direction[own])
        self.variance[self.places] -= direction**2
        self.directions = torch.cat([self.directions, direction[None]])
        self.on[e] = False

    def parameters(self) -> Tensor:
        """All parameters (P,) given the edges."""
        theta, n = self.before.clone(), len(self.on)
        theta[:n] = self.value * self.on
        pull = (theta - self.before)[self.places] @ self.cross
        theta[self.others] -= torch.linalg.solve_triangular(self.inside.T, pull[:, None], upper=True)[:, 0]
        return theta


def _eliminated(now: Solution, dispersion: float, threshold: float) -> Solution:
    """Refitted without the edges that are not worth the threshold, and without cycles."""
    cells = float(now.model.moments.counts.sum())
    while True:
        profile = _Profile(now, dispersion)
        cost, before = 0.0, profile.on.clone()
        while bool(profile.on.any()):
            e = profile.weakest(threshold, cycles_too=torch.equal(profile.on, before))
            if e is None:
                break
            cost += float(profile.wald()[e])
            profile.remove(e)
        if torch.equal(profile.on, before):
            return now
        mask = profile.on.view_as(now.mask).to(DTYPE)
        trial = now.refitted(theta=profile.parameters()[None], mask=mask, steps=NEAR_STEPS)
        lost = float(trial.nll[0] - now.nll[0]) * 2 * cells / dispersion
        if not lost < cost + threshold:
            trial = min(trial, now.refitted(mask=mask, steps=FAR_STEPS), key=lambda s: float(s.nll[0]))
        now = trial


def _root(information: Tensor) -> Tensor:
    """Cholesky factor (P, P) of an information, with as much of its diagonal on top as rounding about 0 takes; what is
    given is changed.
    """
    diagonal = information.diagonal().clone()
    root = torch.diag(diagonal)
    for power in range(-9, 1):
        information.diagonal().copy_(diagonal * (1 + 10.0**power))
        root, failed = torch.linalg.cholesky_ex(information)
        if not failed:
            break
    return root


def score_absent(now: Solution) -> tuple[Tensor, Tensor]:
    """Absent edges (m,), as places in the flat graph, and their score statistics (m,).

    Twice the log-likelihood that an edge would gain with all other parameters free to follow, to second order:
    ``N g^2 / (i_ee - i_eo i_oo^-1 i_oe)``, g and i being gradient and information per cell, o what is there already.
    """
    model, p = now.model, now.model.p
    full = 1 - torch.eye(p, dtype=DTYPE)[None]
    _, gradient, information = model.information(now.theta, now.targets, full)
    on = torch.ones(model.size, dtype=torch.bool)
    on[: p * p] = now.mask[0].flatten().bool()  # G comes first
    absent = torch.nonzero(~on[: p * p] & full[0].flatten().bool())[:, 0]
    half = torch.linalg.solve_triangular(_root(information[0][on][:, on]), information[0][on][:, absent], upper=False)
    left = (information[0].diagonal()[absent] - (half**2).sum(0)).clamp_min(1e-30)
    return absent, float(model.moments.counts.sum()) * gradient[0][absent] ** 2 / left


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
