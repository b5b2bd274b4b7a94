"""Which edges: decisions by likelihood ratio, never by a bare threshold.

The likelihood ratio of an edge is compared with ``dispersion * log N`` (quasi-BIC). The dispersion is the model's
deviance from the saturated model (a free Gaussian per environment) per degree of freedom: 1 where the model holds,
3 to 6 where a network mixes the latents, so that likelihood ratios are not believed beyond the model's own misfit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crlseq.discovery.likelihood import Solution
from crlseq.discovery.moments import DTYPE
from crlseq.storage.stage_cache import cached_on_disk

REFIT_STEPS = 6  # from the conditional maximum of the quadratic model: close already
FALLBACK_STEPS = 30
MIN_EFFECT = 0.25  # |G|: standard deviations of the child's own noise per unit of the parent


@cached_on_disk()
@dataclass(frozen=True)
class Edges:
    """Declared graph: refitted solution, ``adjacency`` and ``ratio`` (p, p; twice the log-likelihood that an edge
    is worth, over the dispersion), and the ``threshold`` that it passed."""

    solution: Solution
    adjacency: Tensor
    ratio: Tensor
    dispersion: float
    threshold: float


def dispersion(solution: Solution) -> float:
    """Deviance from the saturated model over its exact expectation under the model (Wishart), at least 1.

    Near 1 when latents, targets and mixing fit; the single most telling number about a fit.
    """
    return max(1.0, misfit(solution)[0])


def misfit(solution: Solution) -> tuple[float, float]:
    """`dispersion` without its bound, and its standard deviation under the model.

    With n S ~ Wishart(n - 1, Sigma) the deviance ``n (tr S - log|S| - q)`` of an environment, in units of Sigma, has
    variance ``n^2 sum_j psi'((n - j) / 2) - 2 n q``, j = 1 .. q.
    """
    model, m = solution.model, solution.model.moments
    n, q = m.counts, model.q
    usable = n > q + 1  # the others have no saturated likelihood
    if not bool(usable.any()):
        return 1.0, 0.0
    n = n[usable]
    fitted = model.per_environment(solution.theta, solution.targets, m)[0][usable]
    saturated = 0.5 * (torch.linalg.slogdet(m.covariances[usable])[1] + q)
    deviance = (2 * n * (fitted - saturated)).sum()
    half = (n[:, None] - torch.arange(1, q + 1)) / 2
    expected = -(n * (torch.digamma(half) + (2 / n)[:, None].log()).sum(1)).sum()
    variance = (n**2 * torch.polygamma(1, half).sum(1) - 2 * n * q).sum()
    freedom = expected - model.free(solution.mask).sum()
    if freedom <= 0:
        return 1.0, 0.0
    return float(deviance / freedom), float(variance.sqrt() / freedom)


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
    Last: edges with ``|G| < min_effect`` go, since misfit of the mixing makes small ones that are significant.
    """
    model, p = solution.model, solution.model.p
    cells = float(model.moments.counts.sum())
    phi = dispersion(solution) if scale is None else scale
    threshold = math.log(cells)

    def refit(mask: Tensor, start: Tensor, steps: int = REFIT_STEPS) -> Solution:
        start = start.clone()
        start[:, model.at["G"]] *= mask.flatten(1)
        return model.solve(start, solution.targets, mask, steps)

    def worth(now: Solution) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance (P, p p) of all parameters with the edges, all parameters, which edges are on."""
        root = _root(now.information[0])
        basis = torch.eye(model.size, p * p, dtype=DTYPE)  # G comes first
        covariance = torch.cholesky_solve(basis, root) / cells * phi
        return covariance, now.theta[0].clone(), now.mask[0].flatten().bool()

    now = solution
    while True:
        covariance, value, on = worth(now)
        wald = _wald(covariance, value, on, torch.inf)
        budget, gone, cost = max(1, (int((wald < threshold).sum()) + 1) // 2), 0, 0.0
        while gone < budget and bool(on.any()):
            wald = _wald(covariance, value, on, torch.inf)
            e = int(wald.argmin())
            if wald[e] > threshold:
                reach = reachable(on.reshape(p, p))
                cyclic = on & (reach.T.flatten())  # j -> k with a way back
                if gone or not bool(cyclic.any()):
                    break
                e = int(torch.where(cyclic, wald, torch.inf).argmin())
            cost += float(wald[e])
            value = value - covariance[:, e] * value[e] / covariance[e, e]
            column, row = covariance[:, e].clone(), covariance[e] / covariance[e, e]  # row e of G, G
            covariance.addr_(column, row, alpha=-1)
            on[e] = False
            gone += 1
        if not gone:
            break
        start = value[None].clone()
        mask = on.reshape(1, p, p).to(DTYPE)
        trial = refit(mask, start)
        lost = float(trial.nll[0] - now.nll[0]) * 2 * cells / phi
        if not lost < cost + threshold:  # the quadratic model reached too far
            trial = min(trial, refit(mask, now.theta, FALLBACK_STEPS), key=lambda s: float(s.nll[0]))
        now = trial
    for _ in range(p):
        more = _with_absent(now, threshold * phi, cells)
        if more is None:
            break
        now = refit(more, now.theta)
    small = (now.adjacency().abs() < min_effect) & now.mask[0].bool()
    if bool(small.any()):
        now = refit(now.mask * (~small), now.theta)
    covariance, value, on = worth(now)
    ratio = _wald(covariance, value, on, 0.0).reshape(p, p)
    return Edges(now, now.adjacency(), ratio, phi, threshold)


def _root(information: Tensor) -> Tensor:
    """Cholesky factor (P, P) of an information, with as much of its diagonal on top as that takes.

    Directions that the data leave flat have an information of 0, which rounding puts on either side of it.
    """
    diagonal = torch.diag(information.diagonal())
    root = diagonal
    for power in range(-9, 1):
        root, failed = torch.linalg.cholesky_ex(information + 10.0**power * diagonal)
        if not failed:
            break
    return root


def _wald(covariance: Tensor, value: Tensor, on: Tensor, off: float) -> Tensor:
    n = len(on)
    return torch.where(on, value[:n] ** 2 / covariance[:n].diagonal().clamp_min(1e-30), off)


def _with_absent(now: Solution, threshold: float, cells: float) -> Tensor | None:
    """The mask with absent edges whose score statistics pass the threshold, none of which closes a cycle.

    Best first, and at most half of those that pass (one at least): what one edge explains others need not.
    """
    model, p = now.model, now.model.p
    full = 1 - torch.eye(p, dtype=DTYPE)[None]
    _, gradient, information = model.information(now.theta, now.targets, full)
    on = torch.ones(model.size, dtype=torch.bool)
    on[: p * p] = now.mask[0].flatten().bool()
    absent = torch.nonzero(~on[: p * p] & full[0].flatten().bool())[:, 0]
    if not len(absent):
        return None
    cross = information[0][absent][:, on]
    inside = torch.linalg.solve(information[0][on][:, on], cross.T).T
    left = (information[0].diagonal()[absent] - (inside * cross).sum(1)).clamp_min(1e-30)
    statistic = cells * gradient[0][absent] ** 2 / left
    mask = now.mask.clone()
    added, most = 0, (int((statistic > threshold).sum()) + 1) // 2
    for i in statistic.argsort(descending=True).tolist():
        if added == most or statistic[i] <= threshold:
            break
        j, k = divmod(int(absent[i]), p)
        if not bool(reachable(mask[0])[k, j]):
            mask[0, j, k] = 1
            added += 1
    return mask if added else None
